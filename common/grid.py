"""Patches as a grid: how Mini-Gemini cuts it, and COMM's convolution over it."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.errors import InputError


def views(x, crops):
    """Look at maps (B, D, H, W) whole and in crops x crops parts -> (B * V, D, H/crops, W/crops).

    Mini-Gemini-HD has 2 crops a side and V = 5. The whole comes first. With 1 nothing changes.
    """
    if crops < 2:
        return x
    size = x.shape[2] // crops, x.shape[3] // crops
    whole = F.interpolate(x.float(), size, mode="bilinear").to(x.dtype)
    parts = x.unflatten(3, (crops, -1)).unflatten(2, (crops, -1)).permute(0, 2, 4, 1, 3, 5)
    return torch.cat([whole[:, None], parts.flatten(1, 2)], dim=1).flatten(0, 1)


def squares(x, N):
    """Cut a square grid of tokens into N squares of P x P: (B, N P², D) -> (B, N, P², D)."""
    side = math.isqrt(N)
    P = math.isqrt(x.shape[1]) // side
    x = x.unflatten(1, (side, P, side, P)).transpose(2, 3)  # (B, side, side, P, P, D)
    return x.flatten(3, 4).flatten(1, 2)


def check_same_grid(clip, dino):
    """Raise InputError unless COMM can pair the patches of two towers (connector.Tower)."""
    if clip.num_patches != dino.num_patches:
        raise InputError("--vision: comm needs two towers with the same number of patches")
    if "dinov2" in clip.model_type and "dinov2" not in dino.model_type:
        raise InputError("--vision: comm reads CLIP first and DINOv2 second: swap them")


def check_squares(clip, detail, crops):
    """Raise InputError unless a map of ConvNeXt can be cut into a square for each patch of CLIP.

    clip, detail: connector.Tower; crops: see views.
    """
    if "clip" not in clip.model_type or detail.model_type != "convnext":
        raise InputError("--vision: mgm reads CLIP first and ConvNeXt second")
    num_squares = clip.num_patches * crops**2
    if detail.num_patches % num_squares:
        # ConvNeXt's first map has a quarter of the image's side
        multiple = 4 * math.isqrt(num_squares)
        raise InputError(f"--image_size: must be a multiple of {multiple} for mgm and this CLIP")


class ConvNorm(nn.Sequential):
    """A 3 x 3 convolution over the grid of patches, then BatchNorm: (B, N, D) -> (B, N, D).

    In training BatchNorm normalizes over the images of a micro-batch, so the loss depends on
    --micro_batch and on the number of ranks. COMM's paper gives no kernel size; with 1 x 1 this
    would be a linear layer.
    """

    def __init__(self, in_width, width):
        super().__init__(nn.Conv2d(in_width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).unflatten(2, (side, side))  # (B, D, side, side)
        # not in bfloat16 under autocast, in which a CPU convolves 20 times as slowly; meta has none
        with torch.autocast(x.device.type.replace("meta", "cpu"), enabled=False):
            grid = super().forward(grid.to(self[0].weight.dtype))
        return grid.flatten(2).transpose(1, 2)
