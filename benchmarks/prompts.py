"""A benchmark's question, and the parts that read it from a file.

    Item                          one question: images, prompt, target
    records(path, key)            the records of a JSON file
    ask(template, text)           the prompt, in the papers' wording
    find_images(items, folder)    the items whose images are there, and the missing ones
    images_of(item)               the images of a question, PIL

Prompts: LLaVA-1.5 (arXiv 2310.03744, table of evaluation formats). For boxes and captions: Shikra
(arXiv 2306.15195), whose formats COMM (arXiv 2310.08825) uses.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.images import open_frames, open_image
from common.records import read_records
from dialogue import MARK

SHORT = "<question>\nAnswer the question using a single word or phrase."
LETTER = "<question>\nAnswer with the option's letter from the given choices directly."
# What reading a file of another benchmark raises.
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, OSError, SyntaxError, csv.Error)
NUMBERED = re.compile(r"<image (\d+)>")


class Item(NamedTuple):
    # Names the answer.
    id: str
    # Each the names that a file in --image_dir may have, or the bytes of an image file.
    images: list
    # A reader gives the text of <question>, <expr> or <boxes>; readers.read fills the template.
    prompt: str
    # What the score compares with. Empty: not published.
    target: object
    # Question types that are scored together. Empty: all questions of the file.
    groups: tuple = ()
    # What the server wants next to the answer: the question's id, or its row of a table.
    record: object = None
    # Frames to show of a video (a folder of frames, or an animated image). None: images.
    frames: int | None = None


# --- reading ------------------------------------------------------------------------------


class Record(dict):
    """A record that knows where it is: file, and line or number."""

    def __init__(self, record, where):
        super().__init__(record)
        self.where = where

    def __missing__(self, key):
        raise InputError(f"{self.where}: no {key}; is this the benchmark's file?")

    def first(self, *keys):
        """Return the value of the first of these keys that the record has."""
        return self[next((key for key in keys if key in self), keys[0])]

    @property
    def id(self):
        return self.first("question_id", "id")

    @property
    def question(self):
        """Return the question, also of LLaVA's own question files, which call it "text"."""
        return self.first("question", "text")


def read_object(path):
    """Read a file that is one JSON object. Returns {} for any other file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def records(path, key=None):
    """Read a list, JSONL, or one object with a list under `key` -> [Record, ...]."""
    content = read_object(path) if key else {}
    if key in content:
        return [Record(record, f"{path}, {key} {i}") for i, record in enumerate(content[key])]
    return [Record(record, where) for where, record in read_records(path)]


def by_id(path, key=None):
    """Read a file as {id of the question: Record}. Without a path it is empty."""
    return {record.id: record for record in records(path, key)} if path else {}


# --- asking -------------------------------------------------------------------------------


def ask(template, text):
    """Fill the template's <question>, <expr> or <boxes> with a text.

    A question that already ends in the template's instruction, as in LLaVA's files, gets no second.
    MMMU's questions say where each image belongs: <image 2>.
    """
    text = text.replace(MARK, "")
    question = text.strip()
    instruction = template.partition("<question>")[2].strip()
    if instruction and question.endswith(instruction):
        template = "<question>"
    filled = template.replace("<expr>", text).replace("<boxes>", text)
    return NUMBERED.sub(MARK, filled.replace("<question>", question))


def find_images(items, folder):
    """Find the images in --image_dir -> items with paths, names of missing images."""
    found, missing = [], []
    for item in items:
        paths = [find(folder, image) for image in item.images]
        if None in paths:
            missing.append(item.images[paths.index(None)][0])
        else:
            found.append(item._replace(images=paths))
    return found, missing


def find(folder, image):
    """Return the path of the first of an image's names that is in the folder, or None."""
    if isinstance(image, bytes):
        return image
    paths = [Path(folder, str(name)) for name in image]
    return next((path for path in paths if path.exists()), None)


def images_of(item):
    """Open the images of a question, PIL. Raises BadImage."""
    images = []
    for image in item.images:
        if item.frames:
            images += open_frames(image, item.frames)
        else:
            images.append(open_image(io.BytesIO(image) if isinstance(image, bytes) else image))
    return images
