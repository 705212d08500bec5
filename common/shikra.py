"""Read Shikra's boxes and expressions (arXiv 2306.15195), for training and for the benchmarks."""

import re

from common.errors import BadImage, InputError, printable
from common.images import format_box, pad_box
from common.records import is_text


def write_boxes(turn, groups, size, where):
    """Replace each "<boxes>" in the texts of a turn by the next group of boxes, in pixels.

    size: (width, height) of the image. Several boxes are one text, "[x1,y1,x2,y2;x1,y1,x2,y2]".
    """
    texts = []
    for group in groups:
        boxes = [pad_box(clip_box(box, *size, where), *size) for box in group]
        texts.append(";".join(map(format_box, boxes)).replace("];[", ";"))
    texts = iter(texts)
    return [re.sub("<boxes>", lambda _: next(texts), text) for text in turn]


def clip_box(box, width, height, where):
    """Cut off what is outside the image, as in some of Visual Genome's boxes. Raises BadImage."""
    x1, y1, x2, y2 = box
    is_inside = x1 <= min(x2, width) and y1 <= min(y2, height) and min(x2, y2) >= 0
    is_normalized = max(box) <= 1 and any(value % 1 for value in box)
    if not is_inside or is_normalized:
        raise BadImage(f"{where}: bbox {box} is not x1, y1, x2, y2 in pixels of {width}x{height}")
    limits = (width, height, width, height)
    return [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]


def check_size(path, size, stated):
    """Refuse an image whose aspect ratio is not the one that its boxes were made for."""
    if abs(size[1] * stated[0] / (size[0] * stated[1]) - 1) > 0.02:
        path = printable(path, 300)
        raise BadImage(f"{path}: its size is {size} upright, but its boxes are for {stated}")


def is_box(box):
    """Say whether a value is a list of four numbers. NaN compares false."""
    is_four = isinstance(box, list) and len(box) == 4
    return is_four and all(type(value) in (int, float) and abs(value) < 1e9 for value in box)


def shikra_fields(record, where):
    """Check a record of Shikra's -> image, expression, box, width, height.

    {"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "width", "height"}.
    """
    keys = ("img_path", "expression", "bbox", "width", "height")
    image, expression, box, width, height = map(record.get, keys)
    is_good = is_text(image) and is_text(expression) and is_box(box)
    if not is_good or not is_box([1, 1, width, height]) or min(width, height) < 1:
        raise InputError(f"{where}: needs {', '.join(keys)}; bbox has four numbers in pixels")
    return image, expression, clip_box(box, width, height, where), width, height
