"""The papers' benchmarks: how each is read, asked, scored and submitted.

    read(config)  ->  [Item, ...]

BENCHMARKS at the end is the table of all. To add one, write a reader and a line there. A reader
takes a file as it is published, named in its docstring, and yields questions. A file that is not
what it should be is an InputError that names it, and the line or record.
"""

import ast
import base64
import csv
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from benchmarks import answers, scores
from benchmarks.captions import caption_scores
from benchmarks.prompts import (
    LETTER,
    SHORT,
    Item,
    Record,
    Video,
    ask,
    find_image,
    read_object,
    records,
)
from benchmarks.scores import LETTERS
from common.errors import InputError
from common.images import format_box, pad_box
from common.shikra import shikra_fields
from dialogue import MARK


def split_of(path):
    """Return the groups of a file whose questions are scored together."""
    return (Path(path).stem,)


def types_of(record, **keys):
    """Return the groups "all" and, for each key that the record has, "name: its value"."""
    return ("all", *(f"{name}: {record[key]}" for name, key in keys.items() if key in record))


# --- boxes and captions -------------------------------------------------------------------


def read_rec(path, config):
    """Read Shikra's REC_refcoco*.jsonl, one per split.

    Each line has {"img_path", "expression", "bbox" in pixels, "width", "height"}.
    """
    for i, record in enumerate(records(path)):
        name, expression, box, width, height = shikra_fields(record, record.where)
        image = find_image(config, record, name)
        prompt = ask(config, expr=expression)
        yield Item(str(i), [image], prompt, (box, width, height), split_of(path))


def read_reg(path, config):
    """Read the files of "rec" for the reverse task: from an object's box to its expressions."""
    items = {}
    for record in records(path):
        name, expression, box, width, height = shikra_fields(record, record.where)
        image = find_image(config, record, name)
        prompt = ask(config, boxes=format_box(pad_box(box, width, height)))
        key = f"{name} {format_box(box, 2)}"
        item = items.setdefault(key, Item(key, [image], prompt, [], split_of(path)))
        item.target.append(expression)
    return items.values()


def read_caption(path, config):
    """Read captions: COCO's, Karpathy's or Shikra's.

    COCO: captions_*.json. Karpathy: dataset_coco.json or dataset_flickr30k.json, of which --split
    is taken. Shikra: JSONL, {"img_path", "caption"} a line.
    """
    items = {}
    for record in records(path, "images"):
        if record.get("split", config.split) != config.split:
            continue
        file = record.text("filename", "file_name", "img_path", "image")
        name = record.get("cocoid", record.get("id", file))
        if name not in items:
            image = find_image(config, record, f"{record.get('filepath', '.')}/{file}", file)
            server = {"image_id": name}
            items[name] = Item(str(name), [image], ask(config), [], split_of(path), server)
        items[name].target.extend(sentence["raw"] for sentence in record.get("sentences", []))
        if "caption" in record:
            items[name].target.append(record.text("caption"))
    for annotation in read_object(path).get("annotations", []):
        items[annotation["image_id"]].target.append(annotation["caption"])
    return [item if item.target else item._replace(target=None) for item in items.values()]


# --- questions with short answers ---------------------------------------------------------


def read_pope(path, config):
    """Read POPE's coco_pope_random.json (popular, adversarial).

    Each line has {"question_id", "image", "text", "label"}.
    """
    for record in records(path):
        target = record.text("label").lower()
        if target not in ("yes", "no"):
            raise InputError(f"{record.where}: the label must be yes or no, got {target!r}")
        image = find_image(config, record, record.text("image"))
        name = str(record.need("question_id"))
        yield Item(name, [image], ask(config, record.text("text")), target, split_of(path))


def people(record):
    """Return the answers of ten people as texts, or None if they are not published."""
    if "answers" not in record:
        return None
    answers = record["answers"]
    return [answer["answer"] if isinstance(answer, dict) else str(answer) for answer in answers]


def read_vqa(path, config):
    """Read VQAv2's or OK-VQA's *_questions.json, with *_annotations.json as --annotations.

    Without annotations (test-dev) there is no score, only the file for the server. The images are
    COCO's.
    """
    subtype = str(read_object(path).get("data_subtype", "")).replace("test-dev", "test")
    targets = {}
    if config.annotations:
        targets = {r.need("question_id"): r for r in records(config.annotations, "annotations")}
    for record in records(path, "questions"):
        name, image = record.need("question_id"), record.need("image_id", kind=int)
        if targets and name not in targets:
            raise InputError(f"{record.where}: {config.annotations} has no answers to {name}")
        file = find_image(config, record, f"COCO_{subtype}_{image:012d}.jpg", f"{image:012d}.jpg")
        annotation = targets.get(name, {})
        groups = types_of(annotation, answer="answer_type", question="question_type")
        prompt, server = ask(config, record.text("question")), {"question_id": name}
        yield Item(str(name), [file], prompt, people(annotation), groups, server)


def read_vizwiz(path, config):
    """Read VizWiz's val.json, or test.json, which has no answers.

    A list of {"image", "question", "answers", "answer_type"}.
    """
    for record in records(path):
        name, prompt = record.text("image"), ask(config, record.text("question"))
        image, groups = find_image(config, record, name), types_of(record, answer="answer_type")
        yield Item(name, [image], prompt, people(record), groups, {"image": name})


def read_textvqa(path, config):
    """Read TextVQA_0.5.1_val.json, or LLaVA's llava_textvqa_val_v051_ocr.jsonl.

    LLaVA's file adds the words that an OCR program found ("Reference OCR token: ..."). It has the
    question's image and text but not its id, so it needs the former file as --annotations.
    """
    known = {}
    for record in records(config.annotations or path, "data"):
        if "question" in record:
            known[str(record.need("image_id")), record.text("question").lower()] = record
    for i, record in enumerate(records(path, "data")):
        text, image = record.text("text", "question"), record.need("image_id", "question_id")
        question = known.get((str(image), text.split("\n")[0].lower()))
        if question is None:
            raise InputError(f"{record.where}: needs --annotations with the answers to {text!r}")
        file, name = find_image(config, record, f"{image}.jpg"), question["question_id"]
        # The file may ask one question twice.
        item = Item(f"{name}#{i}", [file], ask(config, text), people(question))
        yield item._replace(record={"question_id": name})


def read_gqa(path, config):
    """Read GQA's testdev_balanced_questions.json.

    One object {id: {"imageId", "question", "answer", "types"}}.
    """
    for name, question in read_object(path).items():
        record = Record(question, f"{path}, question {name}")
        image = find_image(config, record, f"{record.need('imageId')}.jpg")
        groups = types_of(record.get("types", {}), structure="structural")
        prompt, server = ask(config, record.text("question")), {"questionId": name}
        yield Item(name, [image], prompt, record.get("answer"), groups, server)


def read_mme(path, config):
    """Read LLaVA's llava_mme.jsonl, with the folder MME_Benchmark_release_version as --annotations.

    Each line has {"question_id", "image", "text", "category"}. The answers are in the folder's text
    files.
    """
    seen = Counter()
    for record in records(path):
        category, image = record.text("category"), record.text("image")
        name = str(record.need("question_id"))
        file = find_image(config, record, image, f"{category}/images/{Path(image).name}")
        answer = mme_answer(config, record, category, name).lower()
        seen[name] += 1
        prompt, target = ask(config, record.text("text")), {"answer": answer, "image": name}
        yield Item(f"{name}#{seen[name]}", [file], prompt, target, (category,))


def mme_answer(config, record, category, name):
    """Find the answer in MME's folder: one text file per image, "question<tab>Yes" a line."""
    if not config.annotations:
        raise InputError(f"{record.where}: needs --annotations=MME_Benchmark_release_version")
    question = mme_question(record.text("text"))
    for path in Path(config.annotations, category).rglob(f"{Path(name).stem}.txt"):
        for line in path.read_text("utf-8", "replace").splitlines():
            other, _, answer = line.partition("\t")
            if mme_question(other) == question:
                return answer.strip()
    raise InputError(f"{record.where}: no answer in {config.annotations}/{category}")


def mme_question(text):
    """Remove the instructions behind a question."""
    text = text.strip().removesuffix(SHORT.partition("\n")[2])
    return text.strip().removesuffix("Please answer yes or no.").strip()


# --- multiple choice ----------------------------------------------------------------------


def lettered(options):
    """Write options as the lines "A. ...", "B. ..."."""
    return "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def read_scienceqa(path, config):
    """Read LLaVA's llava_test_CQM-A.json, whose second turn is the answer.

    A list of {"id", "image", "conversations": [{"value": question}, {"value": answer}]}.
    """
    for record in records(path):
        turns = record.need("conversations", kind=list)
        if len(turns) < 2:
            raise InputError(f"{record.where}: needs a question and an answer")
        question, answer = (Record(turn, record.where).text("value") for turn in turns[:2])
        files = [record["image"]] if record.get("image") else []
        images = [find_image(config, record, file) for file in files]
        target = scores.scienceqa_letter(answer)
        groups = ("image", "all") if images else ("all",)
        yield Item(str(record.need("id")), images, ask(config, question), target, groups)


EMPTY = (None, "", "nan", "NaN", "None", "none")


def read_table(path):
    """Read a table with tabs -> [Record, ...], without empty cells."""
    csv.field_size_limit(1 << 30)
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restkey="more")
            for row in reader:
                row = {key: cell for key, cell in row.items() if cell not in EMPTY}
                rows.append(Record(row, f"{path}, line {reader.line_num}"))
                if "more" in row:
                    raise csv.Error(f"line {reader.line_num} has more cells than the heading")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table with tabs ({error})") from None
    return rows


def read_mmbench(path, config):
    """Read MMBench's TSV: index, question, hint, A to D, answer, category, image (base64).

    The published files have a row for each rotation of a question's options. The index of a
    rotation is that of the question plus some millions.
    """
    rows = read_table(path)
    # A row may name another one that has the image.
    encoded = {row.get("index"): row.get("image") for row in rows}
    for row in rows:
        index, question, image = row.text("index"), row.text("question"), row.text("image")
        options = [row[letter] for letter in takewhile(row.__contains__, LETTERS)]
        try:
            number = int(index)
            image = base64.b64decode(encoded.get(image, image), validate=True)
        except ValueError:
            raise InputError(f"{row.where}: needs a number as index, and a base64 image") from None
        target = None
        if "answer" in row:
            target = {"letter": row["answer"], "options": options, "index": number}
        groups = types_of(row, **{"category": "category", "l2-category": "l2-category"})
        hint = f"{row['hint']}\n" if "hint" in row else ""
        prompt = ask(config, hint + question + lettered(options))
        yield Item(index, [image], prompt, target, groups, {**row, "options": options})


def read_choice(path, config):
    """Read multiple choice as in MMMU, or LLaVA's question files with options in the "text".

    Each line has {"id" or "question_id", "question", "options": [...], "answer": a letter} and
    "image", a name or a list of names, which "<image 1>" in the question refers to.
    """
    for record in records(path):
        name, text = str(record.need("question_id", "id")), record.text("question", "text")
        options = choices_of(record, text)
        letter, target = record.get("answer"), None
        if letter:
            if letter not in LETTERS[: len(options)]:
                raise InputError(f"{record.where}: {letter!r} is not one of {len(options)} options")
            target = {"letter": letter, "options": options}
        if "options" in record:
            text += lettered(options)
        files = record.get("image") or []
        files = [files] if isinstance(files, str) else files
        numbers = [int(number) for number in re.findall(r"<image (\d+)>", text)]
        if max(numbers, default=0) > len(files):
            raise InputError(f"{record.where}: refers to image {max(numbers)} of {len(files)}")
        files = [files[number - 1] for number in numbers] or files
        images = [find_image(config, record, file) for file in files]
        prompt = re.sub(r"<image \d+>", MARK, ask(config, text))
        groups = types_of(record, category="category", subject="subject")
        yield Item(name, images, prompt, target, groups)


def choices_of(record, text):
    """Return the options as texts. MMMU writes the list as Python does."""
    options = record.get("options") or re.findall(r"(?m)^[A-Z]\. (.+)$", text)
    try:
        options = ast.literal_eval(options) if isinstance(options, str) else options
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list) or len(options) < 2:
        raise InputError(f"{record.where}: needs two or more options; leave out open questions")
    return [str(option) for option in options]


# --- video --------------------------------------------------------------------------------


def read_video(path, config):
    """Read MSVD's, MSRVTT's or ActivityNet's questions; --annotations may have the answers.

    Each is {"video_name" or "video_id" or "video", "question", "question_id" or "id", "answer"}. A
    video is a folder of frames in --image_dir, or an animated GIF.
    """
    source = config.annotations or path
    answers = {record.need("question_id", "id"): record for record in records(source)}
    for record in records(path):
        name = record.need("question_id", "id")
        if name not in answers:
            raise InputError(f"{record.where}: {source} has no answer to question {name}")
        video = record.need("video_name", "video_id", "video")
        names = [f"{prefix}{video}" for prefix in ("", "video", "vid", "v_")]
        names.append(f"{video}.gif")
        frames = Video(find_image(config, record, *names), config.frames)
        prompt, answer = ask(config, record.text("question")), answers[name]
        yield Item(str(name), [frames], prompt, answer.get("answer"), types_of(answer, type="type"))


# --- all of them --------------------------------------------------------------------------


class Benchmark(NamedTuple):
    # (path, config) -> items
    read: Callable
    # With <question>, <expr> or <boxes>. Without <image>, the image is in front of the text.
    prompt: str
    # (answers, targets) -> {metric: value}
    score: Callable
    # (items, {id: answer}) -> (file name, bytes) for the server or the official script
    submit: Callable | None = None
    # {group: result} -> {group: result}, sums over groups
    totals: Callable | None = None


def accuracy_of(match):
    return partial(scores.accuracy, match)


def submit_as(key, normalize=str):
    return partial(answers.json_file, key, normalize)


REC = "Where is <expr> <image>? answer in [x0,y0,x1,y1] format."
REG = "Please generate a distinguishing description for the region <boxes> in the image <image>."
CAPTION = "Describe this image <image> as simply as possible."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
VIZWIZ = SHORT.replace("\n", f"\n{UNANSWERABLE}\n")
VQA = accuracy_of(scores.submitted_vqa_accuracy)
# LLaVA normalizes the answers that it submits.
TO_VQA = submit_as("answer", scores.evalai_normalize)
TO_GQA = submit_as("prediction", scores.gqa_normalize)

BENCHMARKS = {
    "rec": Benchmark(read_rec, REC, scores.box_scores),
    "reg": Benchmark(read_reg, REG, caption_scores),
    "caption": Benchmark(read_caption, CAPTION, caption_scores, submit_as("caption")),
    "pope": Benchmark(read_pope, SHORT, scores.pope_scores),
    "vqav2": Benchmark(read_vqa, SHORT, VQA, TO_VQA),
    "okvqa": Benchmark(read_vqa, SHORT, VQA, TO_VQA),
    "vizwiz": Benchmark(read_vizwiz, VIZWIZ, accuracy_of(scores.vizwiz_accuracy), TO_VQA),
    "textvqa": Benchmark(read_textvqa, SHORT, accuracy_of(scores.textvqa_accuracy), TO_VQA),
    "gqa": Benchmark(read_gqa, SHORT, accuracy_of(scores.gqa_match), TO_GQA),
    "scienceqa": Benchmark(read_scienceqa, LETTER, accuracy_of(scores.scienceqa_match)),
    "mmbench": Benchmark(read_mmbench, LETTER, scores.mmbench_scores, answers.mmbench_sheet),
    "mme": Benchmark(read_mme, SHORT, scores.mme_scores, totals=scores.mme_totals),
    "choice": Benchmark(read_choice, LETTER, accuracy_of(scores.choice_match)),
    "video": Benchmark(read_video, SHORT, accuracy_of(scores.video_match)),
}


def read(config):
    """Read the questions of config.task from all files of config.data, at most config.limit."""
    if config.task not in BENCHMARKS:
        raise InputError(f"{config.task!r} is no benchmark; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[config.task]
    if not config.data:
        help = " ".join(benchmark.read.__doc__.split())
        raise InputError(f"{config.task} needs --data=FILE. {help}")
    for part in re.findall("<(?:expr|boxes|question)>", benchmark.prompt):
        if config.prompt and part not in config.prompt:
            raise InputError(f"--prompt={config.prompt}: {config.task} needs {part} in it")
    config = replace(config, prompt=config.prompt or benchmark.prompt)
    items = {}
    for path in config.data:
        for item in islice(benchmark.read(path, config), config.limit):
            if len(config.data) > 1:
                item = item._replace(id=f"{Path(path).stem}/{item.id}")
            if item.id in items:
                raise InputError(f"{path}: two questions have the id {item.id!r}")
            items[item.id] = item
    if not items:
        raise InputError(f"{path}: no question; is it the right file, and --split={config.split}?")
    return list(items.values())[: config.limit]
