"""A benchmark's question, and the parts that read it from a file.

Prompts: LLaVA-1.5 (arXiv 2310.03744, table of evaluation formats). For boxes and captions: Shikra
(arXiv 2306.15195), whose formats COMM (arXiv 2310.08825) uses.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.images import open_image
from common.pretrained import read_json
from common.records import read_records
from common.video import open_frames
from dialogue import MARK


class Item(NamedTuple):
    # Names the answer: text, once readers.read has it.
    id: str
    # Its image or video: a list of the names that it may have in --image_dir, or a file, or None.
    image: object
    # A reader gives the text of <question>; readers.read fills the template.
    prompt: str
    # What the score compares with. Empty: not published.
    target: object
    # The question in the file, of which the server or the judge wants parts.
    record: dict = {}
    # Question types that are scored together. Empty: those of the record, or all of the file.
    groups: tuple = ()
    # The answer's column there, if it is not that of the benchmark.
    key: str = ""


# --- reading ------------------------------------------------------------------------------


class Record(dict):
    """A record of a file, whose keys have other names in other benchmarks."""

    def first(self, *keys):
        """Return the value of the first of these keys that the record has."""
        return self[next((key for key in keys if key in self), keys[0])]

    @property
    def id(self):
        """Return the question's id, or its image's name if it has none."""
        return self.first("question_id", "cocoid", "id", "filename", "img_path", "image")

    @property
    def question(self):
        """Return the question, also of LLaVA's own question files, which call it "text"."""
        return self.first("question", "text").replace(MARK, "")


def read_object(path):
    """Read a file that is one JSON object. Returns {} for any other file."""
    with suppress(InputError):
        return read_json(path)
    return {}


def records(path):
    """Read a list, JSONL, {id: record}, or a list in an object -> [Record, ...]."""
    content = read_object(path)
    for key in ("questions", "data", "images", "annotations"):
        if key in content:
            return list(map(Record, content[key]))
    if content and all(isinstance(record, dict) for record in content.values()):
        return [Record({"id": name} | row) for name, row in content.items()]
    return [Record(record) for _, record in read_records(path)]


# --- asking -------------------------------------------------------------------------------


def ask(template, text):
    """Fill the template's <question> with a text.

    A question that already ends in the template's instruction, as in LLaVA's files, gets no second.
    """
    question = text.strip()
    instruction = template.partition("<question>")[2].strip()
    if instruction and question.endswith(instruction):
        return question
    return template.replace("<question>", question)


def find_images(items, folder):
    """Find the images in --image_dir -> items with paths, names of missing images."""
    found, missing = [], []
    for item in items:
        image = item.image
        if isinstance(image, list):
            paths = [Path(folder, str(name)) for name in image]
            image = next(filter(Path.exists, paths), None)
        if image or not item.image:
            found.append(item._replace(image=image))
        else:
            missing.append(item.image[0])
    return found, missing


def open_question(item, frames):
    """Open the image or video of a question -> list of PIL images, prompt. Raises BadImage.

    frames: to show of a video, or 0, in front of the question, without text between them.
    """
    if frames:
        images = open_frames(item.image, frames)
        return images, f"{MARK * len(images)}\n{item.prompt}"
    return [open_image(item.image)] if item.image else [], item.prompt
