"""Read the records of a data file and check them, so that no run breaks on its last sample.

A file is a JSON array, or JSONL (one object a line). Every error is an InputError in one line that
names the file, and the line or the number of the sample.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import InputError, printable
from common.images import BadImage, open_image

MARK = "<image>"  # an image in the text
# Half a character, as of an emoji that was cut: JSON can hold it, UTF-8 and tokenizers cannot.
SURROGATE = re.compile("[\ud800-\udfff]")
# LLaVA's names of the roles in other words
ROLES = {"human": "user", "gpt": "assistant"}
# Keys that hold media or a system prompt elsewhere. Ignoring them would train on text alone.
UNREAD = (
    "image images img img_path image_path image_file image_url picture photo video video_path "
    "frames audio system system_prompt"
).split()


class Sample(NamedTuple):
    images: list  # one for each "<image>": a path, a PIL image or uint8 (H, W, 3)
    turns: list  # (question, answer), in order
    id: str  # names the sample in messages
    system: str = ""  # system prompt; "": the template's
    size: list = None  # [width, height] of the image that the boxes in the text were made for


class FileData:
    """The samples of a data file, which is checked as a whole. A subclass is a format.

    It has parse(record, where, index) -> the fields of a Sample, and more if it likes. The first
    line of its docstring describes a record. The images are in image_dir; default: the folder of
    the file.
    """

    # with boxes in the text, images have to be padded
    has_boxes = False

    def __init__(self, path, image_dir=""):
        self.image_dir = os.path.abspath(image_dir or Path(path).parent)
        self.num_with_images, texts, where = 0, [], path
        try:
            for index, (where, record) in enumerate(self.read(path)):
                fields = self.parse(record, where, index)
                self.num_with_images += bool(fields[0])
                texts.append(json.dumps(fields).encode())
        except (LookupError, TypeError, AttributeError) as error:
            form = type(self).__doc__.splitlines()[0]
            raise InputError(f"{where}: should be {form} ({error!r})") from None
        # One buffer of JSON: Python objects take several times as much memory. Forked workers count
        # references in what they read, so each would come to hold a copy.
        self.buffer = b"".join(texts)
        self.ends = np.cumsum([0, *map(len, texts)])

    def read(self, path):
        return read_records(path)

    def __len__(self):
        return len(self.ends) - 1

    def load(self, index):
        """Return what `parse` returned for a sample."""
        return json.loads(self.buffer[self.ends[index] : self.ends[index + 1]])

    def __getitem__(self, index):
        return Sample(*self.load(index))

    def length(self, index):
        """Estimate the length of a sample in characters; an image counts as 2000."""
        images, turns, *_ = self.load(index)
        return sum(len(text) for turn in turns for text in turn) + 2000 * len(images)


def read_records(path, table=None):
    """Read a JSON array or JSONL -> [(where, value), ...]; `where` names a value in messages.

    table: read this list of a file that is one object, such as COCO's "annotations".
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    values = []
    if text.startswith("{") and ("\n{" in text or not table):
        for i, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, line {i}"
            if line.strip():
                values.append((where, parse(line, where)))
    else:
        content = parse(text, path)
        if isinstance(content, dict):
            content = content.get(table, [content])
        values = [(f"{path}, sample {i}", each) for i, each in enumerate(content)]
    if not values:
        raise InputError(f"{path}: holds no samples")
    return values


def parse(text, where):
    """Parse JSON. Raises InputError."""
    try:
        return json.loads(text)
    # ValueError: also a number of thousands of digits; RecursionError: lists in lists in lists
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: neither a JSON array nor JSONL ({error})") from None


def is_text(value):
    return isinstance(value, str) and not SURROGATE.search(value)


def read_turns(record, where):
    """Read the messages of LLaVA's format -> turns [(question, answer), ...], system prompt.

    An answer before the first question is dropped, as in LLaVA, and a question after the last
    answer. Without a message from "system" the system prompt is "".
    """
    roles, texts = [], []
    for message in record.get("conversations") or record["messages"]:
        role = message.get("from", message.get("role"))
        roles.append(ROLES.get(role, role))
        texts.append(message.get("value", message.get("content")))
    if not all(map(is_text, texts)):
        raise InputError(f'{where}: every message needs a text, "value", of whole characters')
    system = ""
    if roles[0] == "system":
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if roles[:1] == ["assistant"]:
        roles, texts = roles[1:], texts[1:]
    in_turns = ["user", "assistant"] * len(roles)
    if roles != in_turns[: len(roles)]:
        raise InputError(
            f'{where}: "from" should be human and gpt, or user and assistant, in turns; the first '
            "message may be from system"
        )
    return list(zip(texts[::2], texts[1::2], strict=False)), system


def llava_fields(record, image_dir, where):
    """Check a record of LLaVA's -> paths of its images, turns, system prompt; see LlavaData.

    There must be as many marks as images. Without images a mark may be text within a message.
    """
    for key in record:
        if record[key] and key not in ("image", "images") and key.lower() in UNREAD:
            raise InputError(
                f'{where}: the key {key} is not read: images belong under "image", texts '
                'under "conversations", a system prompt into a message from "system"'
            )
    turns, system = read_turns(record, where)
    names = record.get("image") or record.get("images") or []
    images = image_paths(names, image_dir, where) if turns else []
    texts = [text.strip() for turn in turns for text in turn]
    marks = sum(text.count(MARK) for text in texts)
    at_an_end = any(text.startswith(MARK) or text.endswith(MARK) for text in texts)
    if marks != len(images) and (images or at_an_end):
        raise InputError(f"{where}: {marks} {MARK} marks but {len(images)} images")
    return images, turns, system


def image_paths(names, folder, where):
    """Join the names of images with their folder, an absolute path, which none may leave.

    Links are followed: data sets are often linked into one folder.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(map(is_text, names)):
        raise InputError(f"{where}: image should be a file name or a list of them")
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    for path in paths:
        if not path.startswith(os.path.join(folder, "")):
            name = printable(path, 300)
            raise InputError(f"{where}: the image path {name} is not inside the folder {folder}")
    return paths


def check_images(dataset):
    """Open the images of 100 random samples before a run, so that it need not end days later.

    As in the loader, three may be bad. Raises InputError.
    """
    indices = np.random.default_rng(0).permutation(len(dataset))[:100].tolist()
    bad = []
    for index in indices:
        try:
            # some datasets open an image for its size
            for image in dataset[index].images:
                if isinstance(image, str):
                    open_image(image)
        except BadImage as error:
            bad.append(error)
    if len(bad) > 3:
        raise InputError(f"{len(bad)} of {len(indices)} random samples are bad, such as {bad[-1]}")
