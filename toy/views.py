"""Images of the world as its towers are trained on them: crops, and two views of a scene.

crops         one object, cut out, resized and flipped                       MAE, DeiT
make_views    the same objects twice: other places, colors and backgrounds   DINOv2
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from toy import world

PATCH, GRID = 8, world.SIDE // 8


def pixels_of(scenes, split="train"):
    """Draw [(index, objects), ...] -> uint8 (B, 3, 64, 64)."""
    images = np.stack([world.draw(objects, split, index) for index, objects in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def object_of_patch(objects):
    """Return the number of the object under the middle of each patch, (64,), or -1."""
    middle = (np.arange(GRID) + 0.5) * PATCH
    numbers = np.full((GRID, GRID), -1)
    for i, o in enumerate(objects):
        rows = (middle > o.y) & (middle < o.y + o.side)
        columns = (middle > o.x) & (middle < o.x + o.side)
        numbers[np.ix_(rows, columns)] = i
    return numbers.flatten()


# --- crops --------------------------------------------------------------------------------


def crops(scenes, generator, rng):
    """Cut a square around the largest object out of every image: uint8 (B, 3, 64, 64).

    A random square of 0.7 to 1 of its side is resized, flipped and changed in brightness at random.
    Colors stay, since they have meaning here.
    """
    B, size = len(scenes), world.SIDE
    side = rng.integers(32, size + 1)
    squares = []
    for image, (_, objects) in zip(pixels_of(scenes), scenes, strict=True):
        corner = np.array(objects[0].center) - side / 2
        x, y = corner.clip(0, size - side).astype(int)
        squares.append(image[:, y : y + side, x : x + side].float())
    scale = torch.empty(B).uniform_(0.7, 1.0, generator=generator)
    center = (torch.rand(B, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    flip = torch.randint(2, (B,), generator=generator) * 2 - 1
    affine = torch.zeros(B, 2, 3)
    affine[:, 0, 0] = scale * flip
    affine[:, 1, 1] = scale
    affine[:, :, 2] = center
    grid = F.affine_grid(affine, (B, 3, size, size), align_corners=False)
    images = torch.stack(squares)
    images = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    light = torch.empty(B, 1, 1, 1).uniform_(0.7, 1.3, generator=generator)
    return (images * light).clamp(0, 255).byte()


# --- two views ----------------------------------------------------------------------------


def make_views(scenes, whole, rng, generator):
    """Draw two views of every scene -> pixels (V, 3, 64, 64), parts (V, n), mask (V, n).

    Views i and i + V/2 show the same objects elsewhere, on another background, in other colors.
    parts: the patches to see, all if `whole`. mask: 10% to 50% of them, in half of the views if
    `whole`, else in a quarter.
    """
    views = []
    for offset in (0, 7_777_777):
        views += [(index + offset, move(objects, rng)) for index, objects in scenes]
    pixels = recolor(pixels_of(views), generator)
    if whole:
        parts = torch.arange(GRID**2).expand(len(views), -1)
    else:
        parts = torch.stack([patches_around(objects[0], rng) for _, objects in views])
    amount = torch.rand(len(views), 1, generator=generator) * 0.4 + 0.1
    mask = torch.rand(parts.shape, generator=generator) < amount
    mask &= torch.rand(len(views), 1, generator=generator) < (0.5 if whole else 0.25)
    mask[0, :2] = True
    return pixels, parts, mask


def move(objects, rng):
    """Put the same objects elsewhere, up to a fifth larger or smaller, at most 24 pixels."""
    sides = np.clip([o.side * rng.uniform(0.8, 1.2) for o in objects], 12, 24)
    # The largest is placed first. Without room for all, they shrink.
    order, placed = np.argsort(-sides), None
    kinds = [objects[i].kind for i in order]
    while not placed:
        placed = world.place(kinds, sides[order], rng)
        sides = np.maximum(12, 0.97 * sides)
    return [placed[i] for i in np.argsort(order)]


def recolor(pixels, generator):
    """Change the light of uint8 (B, 3, H, W), and the colors of four in five.

    Their channels are exchanged and stretched, or gray, so that color identifies no object.
    """
    B, x = len(pixels), pixels.float()
    order = torch.rand(B, 3, generator=generator).argsort(1)[:, :, None, None].expand_as(x)
    other = x.gather(1, order) * torch.empty(B, 3, 1, 1).uniform_(0.6, 1.4, generator=generator)
    gray, changed, light = torch.rand(3, B, 1, 1, 1, generator=generator)
    other = torch.where(gray < 0.2, other.mean(1, keepdim=True), other)
    return (torch.where(changed < 0.8, other, x) * (0.7 + 0.6 * light)).clamp(0, 255).byte()


def patches_around(o, rng):
    """Choose 4 x 4 of the 8 x 8 patches that cover an object of 24 pixels or fewer: (16,)."""
    slices = []
    for start in (o.y, o.x):
        lowest = max(0, math.ceil((start + o.side) / PATCH) - 4)
        first = rng.integers(lowest, min(4, int(start / PATCH)) + 1)
        slices.append(slice(first, first + 4))
    return torch.arange(GRID**2).view(GRID, GRID)[*slices].flatten()
