"""A benchmark's question, and the parts that read it from a file.

    Item                               one question: images, prompt, target
    ask(config, question, ...)         the prompt, in the papers' wording
    records(path, key)                 the records of a JSON file, with checked fields
    find_image(config, record, name)   the path of an image in --image_dir
    images_of(item)                    the images of a question, PIL

Prompts: LLaVA-1.5 (arXiv 2310.03744, table of evaluation formats). For boxes and captions: Shikra
(arXiv 2306.15195), whose formats COMM (arXiv 2310.08825) uses.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.images import open_frames, open_image
from common.records import read_records
from dialogue import MARK

SHORT = "<question>\nAnswer the question using a single word or phrase."
LETTER = "<question>\nAnswer with the option's letter from the given choices directly."


class Item(NamedTuple):
    # Names the answer; unique in a run.
    id: str
    # Each a path, the bytes of an image file, or a Video.
    images: list
    prompt: str
    # What the score compares with. None: not published.
    target: object
    # Splits or question types that are scored together.
    groups: tuple = ("all",)
    # What the server wants next to the answer.
    record: dict = {}


class Video(NamedTuple):
    # A folder of frames, or an animated image.
    path: str
    # Number of frames to show.
    frames: int


# --- reading ------------------------------------------------------------------------------


class Record(dict):
    """A record that knows where it is: file, and line or number."""

    def __init__(self, record, where):
        if not isinstance(record, dict):
            raise InputError(f"{where}: must be an object, got {json.dumps(record)[:60]}")
        super().__init__(record)
        self.where = where

    def need(self, *keys, kind=(str, int)):
        """Return the value of the first of these keys.

        Raises InputError if the record has none of them, or the value is of another kind.
        """
        for key in keys:
            if key in self:
                if not isinstance(self[key], kind) or isinstance(self[key], bool):
                    value = json.dumps(self[key])[:60]
                    raise InputError(f"{self.where}: {key!r} cannot be {value}")
                return self[key]
        raise InputError(f"{self.where}: no {' or '.join(keys)}; is this the benchmark's file?")

    def text(self, *keys):
        return self.need(*keys, kind=str)


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
    if key not in content:
        return [Record(record, where) for where, record in read_records(path)]
    if not isinstance(content[key], list):
        raise InputError(f"{path}: {key!r} must be a list")
    return [Record(record, f"{path}, {key} {i}") for i, record in enumerate(content[key])]


def find_image(config, record, *names):
    """Return the path of the first of these names that is in --image_dir."""
    for name in names:
        path = Path(config.image_dir, str(name))
        if path.exists():
            return path
    names = " or ".join(map(str, names))
    raise InputError(f"{record.where}: no {names} in --image_dir={config.image_dir}")


# --- asking -------------------------------------------------------------------------------


def ask(config, question="", expr="", boxes=""):
    """Fill the template --prompt, which is the paper's by default.

    A question that already ends in the template's instruction, as in LLaVA's files, gets no second.
    """
    template, question = config.prompt, question.replace(MARK, "").strip()
    instruction = template.split("<question>")[-1].strip()
    if "<question>" in template and instruction and question.endswith(instruction):
        return question
    template = template.replace("<expr>", expr.replace(MARK, "")).replace("<boxes>", boxes)
    return template.replace("<question>", question)


def images_of(item):
    """Open the images of a question, PIL. Raises InputError (BadImage)."""
    images = []
    for image in item.images:
        if isinstance(image, Video):
            images += open_frames(image.path, image.frames)
        else:
            images.append(open_image(io.BytesIO(image) if isinstance(image, bytes) else image))
    return images
