"""Draw boxes and text on images, and save them. Draw the losses of a run."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.errors import InputError
from common.images import unpad_box

COLORS = ("#ff4fd8", "#5dff5d", "#ffb000", "#4fc3ff", "#ff6a5d")  # of an image's predicted boxes
TRUE_COLOR = "white"
STAGE_COLORS = ("#c2185b", "#1565c0")
MARGIN, LINE, DASH = 8, 21, 6  # pixels


def panel(image, boxes, lines, side=448):
    """Scale an image to the longer side `side`, draw boxes in it and write lines below it.

    boxes: [(color, box)], normalized by the side of the padded image. A box in TRUE_COLOR is
    dashed. lines: [(color, text)].
    """
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    size = side + 2 * MARGIN, height + 2 * MARGIN + LINE * len(lines)
    canvas = Image.new("RGB", size, "#202020")
    canvas.paste(image.resize((width, height), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(canvas)
    for color, box in boxes:
        corners = np.reshape(unpad_box(box, *image.size), (2, 2)) * scale
        # a model may predict any number, and the corners in any order
        corners = MARGIN + np.clip(np.sort(corners, axis=0), -MARGIN, (width, height))
        if color == TRUE_COLOR:
            draw_dashed(canvas, corners.ravel().tolist())
        else:
            draw.rectangle(corners.ravel().tolist(), outline=color, width=3)
    font = ImageFont.load_default(size=15)
    for i, (color, text) in enumerate(lines):
        text = " ".join(text.split())[:200]
        draw.text((MARGIN, height + MARGIN + 4 + LINE * i), text, color, font)
    return canvas


def draw_dashed(canvas, box):
    """Draw white dashes on a black rectangle: they can be seen on any background."""
    outline = Image.new("L", canvas.size)
    ImageDraw.Draw(outline).rectangle(box, outline="white", width=2)
    canvas.paste("black", mask=outline)
    y, x = np.indices((canvas.height, canvas.width))
    dashes = np.asarray(outline) * ((x + y) // DASH % 2 == 0)
    canvas.paste(TRUE_COLOR, mask=Image.fromarray(dashes))


def arrange(panels, columns):
    """Arrange panels in rows, as one image."""
    rows = -(-len(panels) // columns)
    width = max(image.width for image in panels)
    height = max(image.height for image in panels)
    sheet = Image.new("RGB", (width * columns, height * rows), "#202020")
    for i, image in enumerate(panels):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_image(panels, path):
    """Save panels, two in a row, as one image file. Raises InputError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        arrange(panels, min(2, len(panels))).save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--out={path}: cannot be written ({error})") from None


def draw_losses(run):
    """Draw the mean losses in a run's log.jsonl into its loss.png, one stage after the other."""
    lines = (run / "log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record.get("mean_loss")]
    highest = max(record["mean_loss"] for record in records)
    steps = {record["stage"]: record["step"] + 1 for record in records}
    left, top, width, height = 60, 40, 620, 300
    canvas = Image.new("RGB", (left + width + 20, top + height + 40), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    draw.rectangle((left, top, left + width, top + height), outline="#dddddd")
    draw.text((left - 8, top), f"{highest:.2f}", "black", font, anchor="rm")
    x, step_width = left, width / sum(steps.values())
    for color, stage in zip(STAGE_COLORS, steps, strict=False):
        points = []
        for record in records:
            if record["stage"] == stage:
                y = top + height * (1 - record["mean_loss"] / highest)
                points.append((x + step_width * record["step"], y))
        draw.line(points, color, 2)
        draw.text((left + 200 * (stage - 1), MARGIN), f"loss, stage {stage}", color, font)
        x += step_width * steps[stage]
        draw.text((x, top + height + MARGIN), f"{steps[stage]} steps", color, font, anchor="rt")
    save_image([canvas], run / "loss.png")
