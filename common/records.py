"""Read the records of a data file and check them, so that no run breaks on its last sample.

A file is a JSON array, or JSONL (one object a line). Every error is an InputError in one line that
names the file, and the line or the number of the sample.
"""

import difflib
import functools
import json
import os
import re
from pathlib import Path

import numpy as np

from common.errors import InputError
from common.images import BadImage

# Half a character, as of an emoji that was cut: JSON can hold it, UTF-8 and tokenizers cannot.
SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
READ = ("id", "image", "images", "conversations", "messages")
# Keys that hold media or a system prompt elsewhere. Ignoring them would train on text alone.
OTHERS = ("img", "img_path", "image_path", "image_file", "image_url", "picture", "photo", "video")
OTHERS += ("video_path", "frames", "audio", "system", "system_prompt")


def read_records(path):
    """Read a data file -> [(where, object), ...]; `where` names a record in messages."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if text.lstrip().startswith("["):
        records = [(f"{path}, sample {i}", record) for i, record in enumerate(parse(text, path, 1))]
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [(f"{path}, line {i}", parse(line, path, i)) for i, line in lines if line.strip()]
    if not records:
        raise InputError(f"{path}: holds no samples")
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be an object, is a {type(record).__name__}")
    return records


def parse(text, path, number):
    """Parse JSON that begins at line `number` of a file."""
    try:
        return json.loads(text)
    # ValueError: also a number of thousands of digits; RecursionError: lists in lists in lists
    except (ValueError, RecursionError) as error:
        number += getattr(error, "lineno", 1) - 1
        raise InputError(
            f"{path}: not JSON, line {number}: {getattr(error, 'msg', error)} "
            "(a file should be a JSON array, or JSONL: one object a line)"
        ) from None


def pack(values):
    """Write JSON values into one buffer -> bytes, the positions where they begin and end.

    Python objects take several times as much memory. Forked workers, which count references in
    what they read, would even come to hold a copy each.
    """
    buffer, ends = bytearray(), [0]
    for value in values:
        buffer += json.dumps(value).encode()
        ends.append(len(buffer))
    return buffer, np.array(ends)


def unpack(buffer, ends, index):
    """Read a value of `pack`, as a list does: -1 is the last. Raises IndexError."""
    index = range(len(ends) - 1)[index]
    return json.loads(buffer[ends[index] : ends[index + 1]])


def is_text(value):
    return isinstance(value, str) and not SURROGATE.search(value)


@functools.cache
def looks_read(key):
    """Say whether a key that is not read looks like media, a system prompt or a misspelled key."""
    names = READ[1:] + OTHERS
    return key not in READ and bool(difflib.get_close_matches(key.lower(), names, 1, 0.8))


def check_keys(record, where):
    for key, value in record.items():
        if value and looks_read(key):
            raise InputError(
                f'{where}: the key {key!r:.80} is not read: images belong under "image", texts '
                'under "conversations", a system prompt into a message from "system"'
            )


def read_turns(record, where):
    """Read the messages of LLaVA's format -> turns [(question, answer), ...], system prompt.

    An answer before the first question is dropped, as in LLaVA, and a question after the last
    answer. Without a message from "system" the system prompt is "".
    """
    messages = record.get("conversations") or record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no conversations")
    roles, texts = [], []
    for message in messages:
        if not isinstance(message, dict):
            raise InputError(f"{where}: a message should be an object")
        role = ROLES.get(str(message.get("from", message.get("role"))))
        text = message.get("value", message.get("content"))
        if role is None:
            raise InputError(f'{where}: every message needs a role, "from": {", ".join(ROLES)}')
        if not is_text(text):
            raise InputError(f'{where}: every message needs a text, "value", of whole characters')
        roles.append(role)
        texts.append(text)
    system = texts[0] if roles[0] == "system" else ""
    skip = 1 if roles[0] == "system" else 0
    if roles[skip:] and roles[skip] == "assistant":
        skip += 1
    roles, texts = roles[skip:], texts[skip:]
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise InputError(f"{where}: user and assistant should take turns")
    return list(zip(texts[::2], texts[1::2], strict=False)), system


def llava_fields(record, image_dir, mark, where):
    """Check a record of LLaVA's -> paths of its images, turns, system prompt; see LlavaData.

    There must be as many marks as images. Without images a mark may be text within a message.
    """
    check_keys(record, where)
    turns, system = read_turns(record, where)
    names = record.get("image") or record.get("images") or []
    images = image_paths(names, image_dir, where) if turns else []
    texts = [text.strip() for turn in turns for text in turn]
    marks = sum(text.count(mark) for text in texts)
    at_an_end = any(text.startswith(mark) or text.endswith(mark) for text in texts)
    if marks != len(images) and (images or at_an_end):
        raise InputError(f"{where}: {marks} {mark} marks but {len(images)} images")
    return images, turns, system


def is_inside(path, folder):
    return os.path.commonpath([path, folder]) == folder


def image_paths(names, folder, where):
    """Join the names of images with their folder, an absolute path, which none may leave."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(is_text(name) and "\0" not in name for name in names):
        raise InputError(f"{where}: image should be a file name or a list of them")
    paths = [os.path.normpath(os.path.join(folder, name)) for name in names]
    for path, name in zip(paths, names, strict=True):
        if path == folder:
            raise InputError(f"{where}: {name!r} is no image's name")
        if not is_inside(path, folder):
            raise InputError(f"{where}: the image path {path} leaves the image folder {folder}")
    return paths


def check_folders(folders, image_dir, path):
    """Check the folders of all images of a data file at once, not at the first use."""
    if folders and not os.path.isdir(image_dir):
        raise InputError(f"{image_dir}: no such folder; the images of {path} should be in it")
    check_links(folders, image_dir)


def check_links(paths, folder):
    """Refuse files and folders that are links out of the image folder."""
    for path in paths:
        if not is_inside(os.path.realpath(path), os.path.realpath(folder)):
            raise BadImage(
                f"{path}: is a link out of the image folder {folder}: move the images there (or "
                "mount them), or choose an --image_dir that holds them all"
            )
