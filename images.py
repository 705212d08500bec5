"""Pictures and boxes: from any image file to the uint8 pixels that a tower was trained on.

    open_image(file)        -> PIL image, RGB, upright
    open_frames(video, n)   -> n of them, of a folder of frames or of an animated image
    to_pixels(image, spec)  -> uint8 (3, R, R), the very pixels that transformers' PIL processors make
    pad_box, unpad_box      boxes between a picture's pixels and the square-padded picture, 0 to 1

Normalising (mean, deviation) is left to the towers, on the device: one uint8 tensor serves them all. Boxes in text follow
Shikra (arXiv 2306.15195): "[x1,y1,x2,y2]", by the side of the padded square, three decimals.
"""
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from hub import InputError, read_json


class BadImage(InputError):
    """A picture that cannot be used. The loader skips its sample, and stops the run when they are too many."""


@dataclass(frozen=True)
class ImageSpec:
    """How a checkpoint wants pictures. pad: pad to a square with the mean colour, then resize; nothing is lost, and
    boxes keep their meaning. crop: resize the shorter side, cut out the middle. stretch: resize to a square."""
    size: int                                                        # R, the side of what the tower sees
    mode: str = "pad"
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)                # OpenAI CLIP's; towers normalise on the device
    std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3                                                # PIL's number: 3 bicubic, 2 bilinear
    resize_to: int = None                                            # crop, stretch: resize to this, then crop to size

    @classmethod
    def from_folder(cls, folder):
        """preprocessor_config.json of CLIP, SigLIP, DINOv2 (Bit), ViT, DeiT and LLaVA, old spellings included."""
        path = Path(folder) / "preprocessor_config.json"
        if not path.exists() and (Path(folder) / "processor_config.json").exists():
            path = Path(folder) / "processor_config.json"            # where transformers 5 keeps a LLaVA's
        config = read_json(path)
        try:
            config = config.get("image_processor", config)
            unnamed = "CLIP" if "crop_size" in config else "ViT"     # ViT's and MAE's first files do not name their kind
            kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or unnamed)
            size, crop = config["size"], config.get("crop_size") if config.get("do_center_crop") else None
            if not isinstance(size, dict):                           # a number: CLIP's shorter side, or ViT's square
                square = kind.startswith(("ViT", "DeiT", "Siglip"))
                size = {"height": size, "width": size} if square else {"shortest_edge": size}
            crop = crop if isinstance(crop, dict) or crop is None else {"height": crop, "width": crop}
            if any(sides and sides.get("height") != sides.get("width") for sides in (size, crop)):
                raise InputError(f"{path}: only square pictures are supported")
            resize_to = size["height"] if "height" in size else size["shortest_edge"]
            final = crop["height"] if crop else resize_to
            mode = "stretch" if "height" in size else "pad" if config.get("do_pad") else "crop"
            resample = config.get("resample", 2 if kind.startswith("ViT") else 3)     # the default of each kind
            return cls(final, mode, tuple(config["image_mean"]), tuple(config["image_std"]), resample,
                       resize_to if resize_to != final else None)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the description of an image processor ({error!r})") from None

    def config(self):
        """The preprocessor_config.json that from_folder reads back as this spec; transformers reads it, too."""
        side = self.resize_to or self.size
        size = dict(height=side, width=side) if self.mode == "stretch" else dict(shortest_edge=side)
        return dict(image_processor_type="LlavaImageProcessor", do_pad=self.mode == "pad", do_resize=True, size=size,
                    do_center_crop=True, crop_size=dict(height=self.size, width=self.size), resample=int(self.resample),
                    do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(self.mean),
                    image_std=list(self.std), do_convert_rgb=True)


def open_image(path_or_file):
    """Any image file -> PIL image: RGB, upright, of an animation the first frame. BadImage names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path_or_file) as image:
                return to_rgb(image).copy()                          # of its own: the file is closed
    except FileNotFoundError:
        raise BadImage(f"{path_or_file}: no such image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImage(f"{path_or_file}: has more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels: make it smaller") from None
    except Exception as error:                                       # on damaged bytes decoders raise anything at all
        raise BadImage(f"{path_or_file}: not a readable image "
                       f"({' '.join(f'{type(error).__name__}: {error}'.split())})") from None


def midpoints(total, count):
    """Which `count` of `total` frames stand for a video: those in the middle of as many equal segments; all, if there are
    fewer."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def open_frames(path, count):
    """A folder of frames (in the order of the numbers in their names), or an animated image (GIF, WebP, APNG) -> the frames
    at the midpoints of `count` segments, PIL images like open_image's."""
    if Path(path).is_dir():
        names = [name for name in Path(path).iterdir() if name.suffix.lower() in Image.registered_extensions()]
        names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.name)])
        if not names:
            raise BadImage(f"{path}: a folder without image files; the frames of a video should be in it")
        return [open_image(names[i]) for i in midpoints(len(names), count)]
    frames = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                for i in midpoints(getattr(image, "n_frames", 1), count):
                    image.seek(i)
                    frames.append(to_rgb(image.copy()))
    except Exception as error:                                       # as in open_image
        raise BadImage(f"{path}: not a readable animated image "
                       f"({' '.join(f'{type(error).__name__}: {error}'.split())})") from None
    return frames


def upright_size(path):
    """(width, height) of a picture file as open_image gives it, of its header alone; None if that cannot be read."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)       # by a quarter
            return image.size[::-1] if turned else image.size
    except Exception:                                                # decoders raise anything; open_image will say what
        return None


def to_rgb(image):
    """PIL image of any mode -> RGB: turned as EXIF says, 16 bits to 8, transparency on white (as transformers does)."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:       # else exif_transpose would copy it
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImage("its pixels are floats, whose white is not known: save it with 8 bits a colour")
    if image.mode.startswith("I"):                                   # 16-bit grey; convert() would clip it at 255
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pixels(image, spec):
    """PIL image or uint8 (H, W, 3) -> uint8 (3, R, R): the very pixels that transformers' PIL processors make."""
    if not isinstance(image, Image.Image):
        if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError("a picture should be PIL's, or a uint8 array (H, W, 3)")
        image = Image.fromarray(image)
    image = to_rgb(image)
    longest, shortest = max(image.size), min(image.size)
    side = spec.size if spec.mode == "pad" else spec.resize_to or spec.size
    largest = {"pad": longest ** 2, "crop": side * int(side * longest / shortest), "stretch": side ** 2}[spec.mode]
    if largest > 2 * Image.MAX_IMAGE_PIXELS:
        raise BadImage(f"a picture of {image.width}x{image.height} is too elongated to {spec.mode}")
    if spec.mode == "pad":                                           # LLaVA's expand2square
        square = Image.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in spec.mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    resized = tuple(int(side * edge / shortest) for edge in image.size) if spec.mode == "crop" else (side, side)
    image = image.resize(resized, spec.resample)                     # all of it: to resize the crop alone is faster, and off by a level
    left, top = ((edge - spec.size) // 2 for edge in image.size)
    image = image.crop((left, top, left + spec.size, top + spec.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def padding(width, height):
    """Side of the padded square, and where the picture begins in it (as to_pixels pads)."""
    side = max(width, height)
    return side, ((side - width) // 2, (side - height) // 2) * 2


def pad_box(box, width, height):
    """Box (x1, y1, x2, y2) in pixels of a picture -> the same in the square-padded picture, by its side: 0 to 1."""
    side, offsets = padding(width, height)
    return [(value + offset) / side for value, offset in zip(box, offsets)]


def unpad_box(box, width, height):
    """The inverse of pad_box: scores are computed in original pixels."""
    side, offsets = padding(width, height)
    return [value * side - offset for value, offset in zip(box, offsets)]


def format_box(box, decimals=3):
    """Box -> "[0.390,0.483,0.884,0.866]"."""
    return "[" + ",".join(f"{value:.{decimals}f}" for value in box) + "]"


def parse_boxes(text):
    """All boxes in a text, four floats each."""
    return [box for box in (parse_box(part + "]") for part in text.split("]")[:-1]) if box]


def parse_box(text):
    """The first box in a text -> four floats, or None."""
    found = re.search(r"\[" + ",".join([r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"] * 4) + r"\]", text)
    return [float(value) for value in found.groups()] if found else None
