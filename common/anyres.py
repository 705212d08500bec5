"""AnyRes (LLaVA-NeXT): an image is seen whole, and again in tiles of R x R pixels: docs/highres.md.

Sizes are (width, height). A tile has M visual tokens: a square grid, and image_newline at the end.
"""

import math

import numpy as np
import torch
from PIL import Image

from common.errors import BadImage, InputError


def best_canvas(size, pinpoints):
    """Choose the canvas that keeps the most pixels of an image; of equals, the smallest."""

    def fit(canvas):
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, -canvas[0] * canvas[1]

    return max(pinpoints, key=fit)


def split(image, spec):
    """Cut a PIL image into tiles, row by row -> PIL images, the whole image first."""
    (W, H), (w, h), R = image.size, best_canvas(image.size, spec.pinpoints), spec.size
    scale = min(w / W, h / H)
    size = min(math.ceil(W * scale), w), min(math.ceil(H * scale), h)
    canvas = Image.new("RGB", (w, h))
    canvas.paste(image.resize(size, spec.resample), ((w - size[0]) // 2, (h - size[1]) // 2))
    corners = [(x, y) for y in range(0, h, R) for x in range(0, w, R)]
    return [image, *(canvas.crop((x, y, x + R, y + R)) for x, y in corners)]


def order(size, spec, M):
    """Order an image's visual tokens -> rows (V,) of those of all its tiles, (tiles * M, C)."""
    (W, H), (w, h) = size, best_canvas(size, spec.pinpoints)
    columns, rows, side = w // spec.size, h // spec.size, math.isqrt(M)
    tokens = np.arange((1 + rows * columns) * M).reshape(-1, M)
    whole, tiles = tokens[0, :-1], tokens[1:, :-1].reshape(rows, columns, side, side)
    lines = tiles.swapaxes(1, 2).reshape(rows * side, columns * side)
    height, width = lines.shape
    # leave out the canvas's black borders
    scale = min(width / W, height / H)
    x, y = (width - int(W * scale)) // 2, (height - int(H * scale)) // 2
    lines = lines[y : height - y, x : width - x]
    if not lines.size:
        raise BadImage(f"an image of {W}x{H} is too elongated")
    lines = np.pad(lines, ((0, 0), (0, 1)), constant_values=M - 1)
    return np.concatenate([whole, lines.flatten()])


def add_newline(connector, width):
    """Give a connector the parameter image_newline (C,), which then ends each tile's tokens."""

    def append(connector, hidden, tokens):
        newline = connector.image_newline.to(tokens.dtype)
        return torch.cat([tokens, newline.expand(len(tokens), 1, -1)], dim=1)

    if math.isqrt(connector.num_tokens) ** 2 != connector.num_tokens:
        raise InputError(f"--image_mode=anyres: the tokens of {connector.name} are no square grid")
    connector.num_tokens += 1
    connector.image_newline = torch.nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
    connector.register_forward_hook(append)
