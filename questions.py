"""A benchmark's question: what it shows, how it is asked, and the small parts that read it from a file.

    Item                               id, groups, images, prompt, truth, record
    ask(task, config, question, ...)   the prompt, as the papers ask
    objects(path, key), need(...)      records of a JSON file, and their fields; an InputError names file and record
    pictures(item)                     its pictures, PIL images

Prompts: LLaVA-1.5 (arXiv 2310.03744, its table of evaluation formats) and, for boxes and captions, Shikra (2306.15195), whose
formats COMM (2310.08825) uses.
"""
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

from data import read_records
from dialogue import MARK
from hub import InputError
from images import open_frames, open_image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = {                                                          # without <image>, the picture stands before the text
    "rec": "Where is <expr> <image>? answer in [x0,y0,x1,y1] format.",
    "reg": "Please generate a distinguishing description for the region <boxes> in the image <image>.",
    "caption": "Describe this image <image> as simply as possible.",
    "pope": "<question>" + SHORT, "vqav2": "<question>" + SHORT, "okvqa": "<question>" + SHORT, "textvqa": "<question>" + SHORT,
    "vizwiz": "<question>\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
    "gqa": "<question>" + SHORT, "mme": "<question>" + SHORT, "video": "<question>" + SHORT,
    "scienceqa": "<question>" + LETTER, "mmbench": "<question>" + LETTER, "choice": "<question>" + LETTER}


class Item(NamedTuple):
    id: str                                                          # one of its own in the task: names the answer
    groups: tuple                                                    # what it is scored with: splits, types of question
    images: list                                                     # a path, the bytes of an image file, or a Video
    prompt: str
    truth: object                                                    # what the score compares with; None: not published
    record: dict = {}                                                # what the server wants back beside the answer


class Video(NamedTuple):
    path: str                                                        # a folder of frames, or an animated image
    frames: int                                                      # so many of them are shown


# --- reading ----------------------------------------------------------------------------------------------------------

def read_object(path, *keys):
    """The file's one JSON object, if it is one and has all these keys; else None (it may be a list, or JSONL)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        if text.strip() and error.msg == "Extra data":               # JSONL: after one object comes another
            return None
        raise InputError(f"{path}: not JSON, line {error.lineno}: {error.msg}") from None
    return content if isinstance(content, dict) and all(key in content for key in keys) else None


def objects(path, key):
    """The records of a file that is a list, JSONL, or one object whose list is under `key` -> [(where, record), ...]."""
    whole = read_object(path, key)
    if whole is None:
        return read_records(path)
    if not isinstance(whole[key], list) or not all(isinstance(record, dict) for record in whole[key]):
        raise InputError(f"{path}: {key!r} should be a list of objects")
    return [(f"{path}, {key} {i}", record) for i, record in enumerate(whole[key])]


def need(record, where, *keys, kind=(str, int)):
    """The first of these keys that the record has; its value has to be of this kind."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: should be an object, is {json.dumps(record)[:60]}")
    for key in keys:
        if key in record:
            if not isinstance(record[key], kind) or isinstance(record[key], bool):
                named = {str: "a text", (str, int): "a text or a whole number", int: "a whole number", list: "a list"}[kind]
                raise InputError(f"{where}: {key!r} should be {named}, is {json.dumps(record[key])[:60]}")
            return record[key]
    raise InputError(f"{where}: has no {' and no '.join(map(repr, keys))}; is this the file that the task reads?")


def text_of(record, where, *keys):
    return need(record, where, *keys, kind=str)


def find_picture(config, where, *names):
    """The first of these names that is there in --image_dir -> its path."""
    folder = os.path.abspath(config.image_dir)
    for name in map(str, names):
        path = os.path.normpath(os.path.join(folder, name.replace("\0", "")))
        if os.path.commonpath([os.path.realpath(path), os.path.realpath(folder)]) != os.path.realpath(folder):
            raise InputError(f"{where}: the picture {name} is outside of --image_dir={config.image_dir}")
        if os.path.exists(path):
            return path
    raise InputError(f"{where}: no {' and no '.join(map(str, names))} in {config.image_dir}: --image_dir= names the folder "
                     "of the pictures")


def ask(task, config, question="", expr="", boxes=""):
    """The prompt. A question that brings the papers' instruction with it (LLaVA's own files do) keeps it and gets no second
    one."""
    template = config.prompt or PROMPTS[task]
    question, expr = question if task == "choice" else question.replace(MARK, "").strip(), expr.replace(MARK, "")
    tail = template.split("<question>")[-1].strip()
    if "<question>" in template and tail and question.rstrip().endswith(tail):
        return question.rstrip()
    return template.replace("<expr>", expr).replace("<boxes>", boxes).replace("<question>", question)


def letters(options):
    """Options as the lines "A. ...", "B. ..."."""
    return "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, options))


def pictures(item):
    """What the item shows, as PIL images."""
    found = []
    for image in item.images:
        if isinstance(image, Video):
            found += open_frames(*image)
        elif isinstance(image, bytes):
            found.append(open_image(io.BytesIO(image)))
        else:
            found.append(open_image(image))
    return found
