"""Read Shikra's boxes and expressions (arXiv 2306.15195), for training and for the benchmarks."""

from common.errors import InputError, printable
from common.images import BadImage, format_box, pad_box
from common.records import is_text

QUESTIONS = {
    "rec": (
        "Where is <expr>? Answer with the box [x1,y1,x2,y2].",
        "Give the coordinates of <expr> in the picture.",
        "Please find <expr> and tell me its box.",
        "Which region shows <expr>? Answer with a box.",
    ),
    "reg": (
        "What is in the box <boxes>? Tell it from everything else.",
        "Describe the region <boxes>.",
        "Give a phrase that means only the object at <boxes>.",
        "Which object does the box <boxes> show?",
    ),
}


def shikra_turn(record, task, index, where):
    """Turn a record into a question of "rec" or "reg" -> image, its size, question, answer."""
    name, expression, box, width, height = shikra_fields(record, where)
    box = format_box(pad_box(box, width, height))
    question = QUESTIONS[task][index % 4].replace("<expr>", expression).replace("<boxes>", box)
    return name, (width, height), question, box if task == "rec" else expression


def check_size(path, size, stated):
    """Refuse an image whose aspect ratio is not the one that its boxes were made for."""
    (width, height), (stated_width, stated_height) = size, stated
    if abs(width * stated_height - height * stated_width) > 0.02 * width * stated_height:
        raise BadImage(
            f"{printable(path, 300)}: is {width}x{height} upright, but its boxes are for "
            f"{stated_width}x{stated_height}"
        )


def shikra_fields(record, where):
    """Check a record of Shikra's -> image, expression, box, width, height.

    {"img_path", "expression", "bbox": [x1, y1, x2, y2] in pixels, "width", "height"}. The part of a
    box that is outside its image, as in some of Visual Genome's, is cut off.
    """
    image, expression, box = (record.get(key) for key in ("img_path", "expression", "bbox"))
    width, height = record.get("width"), record.get("height")
    if not is_text(image) or not is_text(expression):
        raise InputError(f"{where}: needs img_path, the name of an image, and an expression")
    numbers = [width, height, *box] if isinstance(box, list) and len(box) == 4 else [None]
    # NaN compares false
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in numbers):
        raise InputError(f"{where}: needs width and height in pixels, and a bbox of four numbers")
    x1, y1, x2, y2 = box
    overlaps = x1 <= min(x2, width) and y1 <= min(y2, height) and min(x2, y2) >= 0
    if min(width, height) < 1 or not overlaps:
        raise InputError(
            f"{where}: bbox {box} is not x1, y1, x2, y2 inside an image of {width}x{height} pixels"
        )
    if max(box) <= 1 and any(value % 1 for value in box):
        raise InputError(f"{where}: bbox {box} is normalized, but Shikra's boxes are in pixels")
    limits = (width, height, width, height)
    box = [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]
    return image, expression, box, int(width), int(height)
