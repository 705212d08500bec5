"""Fewer visual tokens: what the connector `efficient` does, and pooling without training.

`python sample.py --image=clip.mp4 --frames=8 --pool=pairs` pools the tokens of a model that was
trained without, so that several frames fit into the LLM's context.
"""

import torch
import torch.nn.functional as F

from common.cli import find_class
from common.errors import InputError


def half_side(num_tokens):
    """Return half the side of a square grid, rounded up: 576 -> 12, 729 -> 14."""
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise InputError(f"--connector=efficient, --pool=grid: {num_tokens} is no square grid")
    return (side + 1) // 2


def halve_grid(tokens):
    """Resize the grid bilinearly to half its side: (B, N, C) -> (B, N / 4, C).

    An even side gives the mean of 2 x 2 tokens.
    """
    half, side = half_side(tokens.shape[1]), round(tokens.shape[1] ** 0.5)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
    return F.interpolate(grid, (half, half), mode="bilinear").flatten(2).transpose(1, 2)


def halve_pairs(tokens):
    """Keep the maximum of each two neighbors in reading order: (B, N, C) -> (B, N // 2, C)."""
    return F.max_pool1d(tokens.transpose(1, 2), 2).transpose(1, 2)


POOLS = {"grid": halve_grid, "pairs": halve_pairs}


def pool_tokens(model, name):
    """Let a trained MLLM pool the tokens of every image, so that several frames fit.

    grid: a quarter of the tokens, as `efficient`. pairs: half of them, as the Dense Connector does
    with video.
    """
    if model.spec.mode == "anyres":
        raise InputError(f"--pool={name}: not for a model with AnyRes, whose tokens have an order")
    pool = find_class(POOLS, name, "--pool")
    model.tokens_per_image = pool(torch.zeros(1, model.tokens_per_image, 1)).shape[1]
    model.connector.register_forward_hook(lambda connector, hidden, tokens: pool(tokens))
