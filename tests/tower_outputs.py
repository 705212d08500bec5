"""What our towers compute for each tensor that make_tower_fixtures.py records of transformers."""

import re

import torch

from clip import CLIP, CLIPVision, SigLIPVision
from dinov2 import DINOv2
from vit import ViT

# the first three letters of a variant's name -> class
CLASSES = {"vit": ViT, "dei": ViT, "mae": ViT, "din": DINOv2, "cli": CLIPVision}
CLASSES["sig"] = SigLIPVision


def random_pixels(side, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def logits_of(clip, pixels, tokens):
    return clip.logit_scale.exp() * clip.image_features(pixels) @ clip.text_features(tokens).T


def expand(tensors):
    """{"layers.{12}.weight": shape} -> layers.0.weight to layers.11.weight."""
    shapes = {}
    for name, shape in tensors.items():
        first, *rest = re.split(r"\{(\d+)\}", name)
        for i in range(int(rest[0]) if rest else 1):
            shapes[f"{first}{i}{rest[1]}" if rest else name] = shape
    return shapes


@torch.no_grad()
def outputs(variant, folder, expected):
    """{name: tensor} for every name in `expected` but the inputs."""
    tower = CLASSES[variant[:3]].from_pretrained(folder)
    clip = CLIP.from_pretrained(folder) if "tokens" in expected else None
    ours = {}
    for name, value in expected.items():
        side, _, kind = name.partition(".")
        pixels = expected.get(f"{side}.pixels")
        if kind == "pixels":
            ours |= {f"{side}.hidden.{i}": state for i, state in enumerate(tower(pixels))}
        elif kind == "mask":
            states = tower(pixels, mask=value)
            ours |= {f"{side}.masked.{i}": state for i, state in enumerate(states)}
        elif name == "tokens":
            ours |= {f"text.{i}": state for i, state in enumerate(clip.text(value))}
        elif kind == "logits":
            tokens = expected.get("tokens")
            ours[name] = logits_of(clip, pixels, tokens) if clip else tower.classify(pixels)
    inputs = {name for name in expected if name.endswith(("pixels", "mask", "tokens"))}
    assert ours.keys() == expected.keys() - inputs
    return ours
