"""Images and boxes: from any image file to the uint8 pixels that a tower was trained on.

    open_image(file)        -> PIL image, RGB, upright; read_image takes a URL, too
    to_pixels(image, spec)  -> uint8 (3, R, R), equal to those of transformers' PIL processors
    prepare, join           -> the pixels of one and of several images, and their visual tokens
    Normalize               uint8 pixels -> floats; each tower has its own mean and std
    pad_box, unpad_box      boxes between an image's pixels and the square-padded image, 0 to 1

Boxes in text follow Shikra (arXiv 2306.15195): "[x1,y1,x2,y2]", normalized by the side of the
padded square. format_box writes three decimals.
"""

import io
import math
import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageOps

from common import anyres
from common.errors import BadImage, InputError, printable
from common.layouts import OPENAI
from common.pretrained import read_processor

# Only these are opened: for EPS, whatever a file's name is, Pillow would start Ghostscript. AVIF is
# last, since Pillow before 11.3 does not know it.
FORMATS = "JPEG PNG GIF WEBP BMP TIFF JPEG2000 AVIF".split()
# some servers, Wikimedia's for one, refuse the default one of requests
USER_AGENT = "nanoMLLM/1.0 (educational code for multimodal LLMs)"


# --- how a checkpoint wants its images ---


@dataclass
class ImageSpec:
    """How images are brought to R x R pixels.

    pad: pad to a square with the mean color, then resize; boxes keep their meaning. crop: resize
    the shorter side, then cut out the middle. stretch: resize to a square. anyres: stretch, and
    then the image again in tiles of R x R (anyres.py).
    """

    size: int  # R
    mode: str = "pad"
    mean: tuple = OPENAI[0]
    std: tuple = OPENAI[1]
    resample: int = 3  # PIL's number: 3 bicubic, 2 bilinear
    resize_to: int = None  # crop, stretch: resize to this side, then cut out the middle
    pinpoints: tuple = ()  # anyres: possible sizes (width, height); default: LLaVA-NeXT's

    def __post_init__(self):
        if self.mode == "anyres" and not self.pinpoints:
            R = self.size
            self.pinpoints = (R, 2 * R), (2 * R, R), (2 * R, 2 * R), (3 * R, R), (R, 3 * R)

    @classmethod
    def from_folder(cls, folder):
        """Read a checkpoint's preprocessor_config.json or processor_config.json.

        Reads CLIP, SigLIP, DINOv2 (Bit), ViT, DeiT and LLaVA, and their older spellings. Raises
        InputError.
        """
        path, config = read_processor(folder)
        try:
            return cls.from_config(config)
        except Exception as error:  # a wrong value raises many kinds
            raise InputError(f"{path}: no usable preprocessor_config.json ({error!r})") from None

    @classmethod
    def from_config(cls, config):
        # the first files of ViT and MAE do not name their processor
        default = "CLIP" if "crop_size" in config else "ViT"
        kind = config.get("image_processor_type", config.get("feature_extractor_type", default))
        size = config["size"]
        # a number is the side of a square for these, else the shorter side
        is_square = kind.startswith(("ViT", "DeiT", "Siglip"))
        if isinstance(size, dict):
            is_square = "height" in size
        mode = "pad" if config.get("do_pad") else "crop"
        if is_square:
            mode = "stretch"
        pinpoints = tuple((w, h) for h, w in config.get("image_grid_pinpoints") or ())
        if pinpoints:
            mode = "anyres"
        resize_to = side = side_of(size)
        if config.get("do_center_crop"):
            side = side_of(config.get("crop_size") or size)
        return cls(
            side,
            mode,
            tuple(config["image_mean"]),
            tuple(config["image_std"]),
            config.get("resample", 2 if kind.startswith("ViT") else 3),
            resize_to if resize_to != side else None,
            pinpoints,
        )

    def config(self):
        """Write the preprocessor_config.json that from_folder and transformers read."""
        side = self.resize_to or self.size
        stretched = {"height": side, "width": side}
        config = {
            "image_processor_type": "LlavaImageProcessor",
            # with AnyRes transformers pads the number of tiles
            "do_pad": self.mode in ("pad", "anyres"),
            "size": stretched if self.mode == "stretch" else {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "resample": self.resample,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        if self.mode == "anyres":
            config["image_processor_type"] = "LlavaNextImageProcessor"
            config["image_grid_pinpoints"] = [[h, w] for w, h in self.pinpoints]
        return config


def side_of(size):
    """Read 224, {"shortest_edge": 224} or {"height": 224, "width": 224} -> 224."""
    # one number, since only square images are supported
    (side,) = set(size.values()) if isinstance(size, dict) else {size}
    return side


# --- open ---


def open_image(path):
    """Open any image file -> PIL image, RGB and upright; the first frame of an animation.

    Raises BadImage, which names the file.
    """
    return open_file(path)[0]


def open_file(path_or_file, name=None, choose=lambda total: [0]):
    """Open the frames that choose(total) picks, by default the first one. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            # an image of very many pixels is an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path_or_file, formats=FORMATS) as image:
                frames = []
                for i in choose(getattr(image, "n_frames", 1)):
                    image.seek(i)
                    frames.append(to_rgb(image))
                return frames
    except Exception as error:  # on damaged files, decoders raise many kinds
        where = printable(name or path_or_file, 300)
        cause = printable(f"{type(error).__name__}: {error}", 200)
        raise BadImage(f"{where}: not a readable image ({cause})") from None


def read_image(name):
    """Open an image file, or an http(s) URL -> PIL image, RGB. Raises InputError."""
    if not name.startswith(("http://", "https://")):
        return open_image(name)
    import requests  # imported here: it is slow, and files do not need it

    try:
        reply = requests.get(name, timeout=20, headers={"User-Agent": USER_AGENT})
        reply.raise_for_status()
    except requests.RequestException as error:
        raise InputError(f"{name}: cannot be downloaded ({error})") from None
    return open_file(io.BytesIO(reply.content), name)[0]


# --- convert ---


class Prepared(NamedTuple):
    """An image as a model takes it. M: the visual tokens that the model makes of R x R pixels."""

    pixels: torch.Tensor  # (tiles, 3, R, R) uint8; one tile unless spec.mode is anyres
    rows: torch.Tensor  # (V,); which of its tiles * M visual tokens it has in the text, in order
    size: tuple  # (width, height) of the image


def prepare(image, spec, num_tokens):
    """Prepare an image: PIL, a uint8 array (H, W, 3), or a file; num_tokens: M -> Prepared.

    Raises BadImage or InputError.
    """
    image = open_image(image) if isinstance(image, str | os.PathLike) else to_rgb(image)
    tiles, rows = [image], np.arange(num_tokens)
    if spec.mode == "anyres":
        tiles, rows = anyres.split(image, spec), anyres.order(image.size, spec, num_tokens)
    pixels = torch.stack([to_pixels(tile, spec) for tile in tiles])
    return Prepared(pixels, torch.from_numpy(rows), image.size)


def join(images, marks, spec, num_tokens):
    """Join the images of a text -> pixels (I, 3, R, R) of all tiles, image_index (V,).

    images: {key: Prepared}; marks: the key of each "<image>". image_index: which of the I * M
    visual tokens follow each other in the text. An image without a mark is left out.
    """
    pixels = [torch.zeros(0, 3, spec.size, spec.size, dtype=torch.uint8)]
    rows, first = {}, 0
    for key in dict.fromkeys(marks):
        pixels.append(images[key].pixels)
        rows[key] = first + images[key].rows
        first += len(images[key].pixels) * num_tokens
    image_index = [torch.arange(0), *(rows[key] for key in marks)]
    return torch.cat(pixels), torch.cat(image_index)


def to_rgb(image):
    """Convert PIL or uint8 (H, W, 3) to PIL RGB: upright, transparent parts on white.

    Raises BadImage for more than 8 bits per color.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.load()
    with suppress(Exception):  # damaged EXIF raises many kinds: take the image as it is
        image = ImageOps.exif_transpose(image)
    # floats and integers of unknown range, which convert() would clip at 255
    if image.mode[0] in "FI":
        raise BadImage(f"its pixels have the format {image.mode}: save it with 8 bits per color")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image, spec):
    """Convert a PIL image or uint8 (H, W, 3) to uint8 (3, R, R), as transformers' PIL processors.

    Raises BadImage for an image that is too elongated.
    """
    image = to_rgb(image)
    size = [spec.resize_to or spec.size] * 2
    if spec.mode == "pad":
        side, (left, top, _, _) = padding(*image.size)
        check_area([side, side], image)
        # the mean color, as LLaVA's expand2square
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in spec.mean))
        square.paste(image, (left, top))
        image = square
    elif spec.mode == "crop":
        size = [int(size[0] * edge / min(image.size)) for edge in image.size]
        check_area(size, image)
    # all of it: resizing only what is kept would be faster, but differs by one level
    image = image.resize(size, spec.resample)
    left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
    image = image.crop((left, top, left + spec.size, top + spec.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def check_area(size, image):
    """Raise BadImage if an image of this size, made of `image`, would not fit into memory."""
    if math.prod(size) > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"an image of {image.width}x{image.height} is too elongated")


class Normalize(nn.Module):
    """Turn uint8 pixels (B, 3, R, R) into (pixels / 255 - mean) / std.

    Each tower has its own mean and std, so one uint8 tensor on the device serves all towers.
    """

    def __init__(self, mean, std):
        super().__init__()
        # plain tensors, not buffers: float32 whatever becomes of the module
        self.mean = torch.tensor(mean, device="cpu").view(3, 1, 1)
        self.std = torch.tensor(std, device="cpu").view(3, 1, 1)

    def forward(self, pixels, dtype):
        # kept on the device: the host waits for such a copy
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return ((pixels.float() / 255 - self.mean) / self.std).to(dtype)


# --- boxes ---


def padding(width, height):
    """Return the side of the padded square, and the image's offsets in it: x, y, x, y."""
    side = max(width, height)
    return side, ((side - width) // 2, (side - height) // 2) * 2


def pad_box(box, width, height):
    """Convert a box from pixels of the image to fractions (0 to 1) of the padded square."""
    side, offsets = padding(width, height)
    return [(value + offset) / side for value, offset in zip(box, offsets, strict=True)]


def unpad_box(box, width, height):
    """Convert a box from fractions of the padded square to pixels of the image."""
    side, offsets = padding(width, height)
    return [value * side - offset for value, offset in zip(box, offsets, strict=True)]


def format_box(box, decimals=3):
    """Write a box as text: "[0.390,0.483,0.884,0.866]"."""
    return "[" + ",".join(f"{value:.{decimals}f}" for value in box) + "]"


NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
BOX = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]")


def parse_boxes(text):
    """Find all boxes in a text -> list of [x1, y1, x2, y2]."""
    return [[float(value) for value in found.groups()] for found in BOX.finditer(text)]


def parse_box(text):
    """Find the first box in a text -> [x1, y1, x2, y2], or None."""
    return next(iter(parse_boxes(text)), None)


def iou(a, b):
    """Compute the intersection over union of two boxes (x1, y1, x2, y2).

    A reversed box (x2 < x1) has no area: 0.
    """
    top_left = map(max, a[:2], b[:2])
    bottom_right = map(min, a[2:], b[2:])
    both = area([*top_left, *bottom_right])
    return both / (area(a) + area(b) - both) if both else 0.0


def area(box):
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)
