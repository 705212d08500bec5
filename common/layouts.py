"""What differs between checkpoints: names of tensors and config keys, by model_type.

layouts.toml has it for google/vit-*, facebook/deit-*, timm/deit3_*, timm/convnext_large*,
facebook/vit-mae-*, facebook/dinov2-*, openai/clip-vit-*, laion/CLIP-*, google/siglip-*, and LLMs of
LLaMA's kind.
"""

import json
import tomllib
from pathlib import Path
from typing import NamedTuple

FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
# What config.json of some public checkpoints holds: {Hugging Face id: dict}.
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


class Layout(NamedTuple):
    """How the checkpoints of one model_type are written."""

    like: str = ""  # the model_type whose layout this one is, but for its own keys
    architecture: str = ""  # transformers' class of the tower; none: it cannot be written
    processor: str = "CLIPImageProcessor"  # transformers' class that prepares images
    statistics: list = ()  # mean and std of the pixels if the checkpoint gives none
    names: dict = {}  # their part of a tensor name -> ours
    prefixes: list = ()  # beginnings of their tensor names that are dropped
    ignored: list = ()  # beginnings of the names of their tensors that are not loaded
    saved_prefix: str = ""  # beginning of the tensor names that are written
    defaults: dict = {}  # config keys, where ours differ from theirs
    fixed: dict = {}  # config keys with only one value


def read(model_type):
    keys = FILE["towers"][model_type]
    return read(keys["like"])._replace(**keys) if "like" in keys else Layout(**keys)


def layouts(*model_types):
    """Return {model_type: Layout} of a class of towers."""
    return {model_type: read(model_type) for model_type in model_types}


VIT = layouts("vit", "deit", "deit3", "vit_mae")
CONVNEXT = layouts("convnext")
DINOV2 = layouts("dinov2", "dinov2_with_registers")
CLIP = layouts("clip", "clip_vision_model")
SIGLIP = layouts("siglip", "siglip_vision_model")
WHOLE_CLIP = read("whole_clip")
# mean and std of OpenAI's CLIP
OPENAI = tuple(map(tuple, CLIP["clip"].statistics))
LLAMA, ROPE_KEYS = FILE["llms"], FILE["rope"]
