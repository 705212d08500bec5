"""Video: some frames of a file, a folder or an animated image, as a list of images.

A model sees them one behind the other, without text between them (arXiv 2405.13800): the prompt is
an <image> for each frame, a line break and the question.
"""

import re
from functools import partial
from pathlib import Path

from PIL import Image

from common.errors import InputError, printable
from common.images import FORMATS, BadImage, open_file, open_image

# Endings of the files that PyAV opens, and their formats. No others: a playlist opens more files.
ENDINGS = (".mp4", ".avi", ".mov", ".mkv")
CONTAINERS = {"format_whitelist": "mov,avi,matroska"}


def open_frames(path, count):
    """Open `count` frames of a video -> PIL images, RGB and upright; all, if there are fewer.

    path: a video file, an animated image (GIF, WebP, APNG), or a folder of images, in the order of
    the numbers in their names. Raises BadImage, and InputError without PyAV.
    """
    path, choose = Path(path), partial(midpoints, count=count)
    if path.is_dir():
        return open_folder(path, choose)
    if path.suffix.lower() in ENDINGS:
        return open_video(path, choose)
    return open_file(path, choose=choose)


def midpoints(total, count):
    """Choose `count` of `total` frames: those in the middle of as many equal segments.

    The Dense Connector's rule is (round(s i) + round(s (i + 1))) // 2 with s = (total - 1) / count.
    It gives the same frames or their neighbors, but may show a frame twice.
    """
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def open_folder(path, choose):
    formats = Image.registered_extensions()
    names = [name for name in path.iterdir() if formats.get(name.suffix.lower()) in FORMATS]
    if not names:
        raise BadImage(f"{path}: no image files in this folder; it should hold a video's frames")
    names.sort(key=number_order)
    return [open_image(names[i]) for i in choose(len(names))]


def number_order(path):
    """Sort key by which frame2.png comes before frame10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdigit() else part for part in parts]


def open_video(path, choose):
    try:
        # Decoded twice: what a file says of its number of frames may be wrong, or nothing.
        chosen = choose(sum(1 for _ in decode(path)))
        # phones note in the file how to turn a frame
        frames = [
            frame.to_image().rotate(frame.rotation, expand=True)
            for i, frame in enumerate(decode(path))
            if i in chosen
        ]
    except ImportError:
        raise InputError(f"{path}: needs PyAV (pip install av), or a folder of frames") from None
    except Exception as error:  # on damaged files, decoders raise many kinds
        cause = printable(f"{type(error).__name__}: {error}", 200)
        raise BadImage(f"{printable(path, 300)}: not a readable video ({cause})") from None
    if not frames:
        raise BadImage(f"{path}: a video without frames")
    return frames


def decode(path):
    """Yield the frames of a video file."""
    import av

    with open(path, "rb") as file, av.open(file, options=CONTAINERS) as video:
        yield from video.decode(video=0)
