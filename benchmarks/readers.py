"""The papers' benchmarks: how each is read, asked, scored and submitted.

    read(config)  ->  [Item, ...]

BENCHMARKS at the end is the table of all. To add one, write a reader and a line there. A reader
takes a file as it is published, named in its docstring, and yields questions. LLaVA's own question
files are read, too; most have no answers. A file that is not what it should be is an InputError
that names it, and where possible the line or record.
"""

import ast
import base64
import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

from benchmarks import answers, scores
from benchmarks.captions import caption_scores
from benchmarks.prompts import (
    DAMAGE,
    LETTER,
    NUMBERED,
    SHORT,
    Item,
    Record,
    ask,
    by_id,
    read_object,
    records,
)
from benchmarks.scores import LETTERS
from common.errors import InputError
from common.images import format_box, pad_box
from common.shikra import shikra_fields


def types_of(record, *keys):
    """Return the groups "all" and, for each of these keys that the record has, "key: value"."""
    return ("all", *(f"{key}: {record[key]}" for key in keys if key in record))


# --- boxes and captions -------------------------------------------------------------------


def read_rec(path, config):
    """Read Shikra's REC_refcoco*.jsonl, one per split.

    Each line has {"img_path", "expression", "bbox" in pixels, "width", "height"}.
    """
    for record in records(path):
        image, expression, *target = shikra_fields(record, record.where)
        yield Item(image, [(image,)], expression, target)


def read_reg(path, config):
    """Read the files of "rec" for the reverse task: from an object's box to its expressions."""
    items = {}
    for record in records(path):
        image, expression, box, width, height = shikra_fields(record, record.where)
        name = f"{image} {format_box(box, 2)}"
        text = format_box(pad_box(box, width, height))
        item = items.setdefault(name, Item(name, [(image,)], text, []))
        item.target.append(expression)
    return items.values()


def read_caption(path, config):
    """Read captions: COCO's, Karpathy's or Shikra's.

    COCO: captions_*.json. Karpathy: dataset_coco.json or dataset_flickr30k.json, of which --split
    is taken. Shikra: JSONL, {"img_path", "caption"} a line.
    """
    items, captions = {}, defaultdict(list)
    for annotation in read_object(path).get("annotations", []):
        captions[annotation["image_id"]].append(annotation["caption"])
    for record in records(path, "images"):
        if record.get("split", config.split) != config.split:
            continue
        image = record.first("filename", "file_name", "img_path", "image")
        name = record.get("cocoid", record.get("id", image))
        captions[name] += [sentence["raw"] for sentence in record.get("sentences", [])]
        if "caption" in record:
            captions[name].append(record["caption"])
        names = (f"{record.get('filepath', '.')}/{image}", image)
        items[name] = Item(str(name), [names], "", captions[name], record=name)
    return items.values()


# --- questions with short answers ---------------------------------------------------------


def read_pope(path, config):
    """Read POPE's coco_pope_random.json (popular, adversarial).

    Each line has {"question_id", "image", "text", "label"}.
    """
    for record in records(path):
        yield Item(str(record.id), [(record["image"],)], record.question, record.get("label"))


def people(record):
    """Return the answers of ten people as texts; none if they are not published."""
    answers = record.get("answers", [])
    return [answer["answer"] if isinstance(answer, dict) else str(answer) for answer in answers]


def read_vqa(path, config):
    """Read VQAv2's or OK-VQA's *_questions.json, with *_annotations.json as --annotations.

    Without annotations (test-dev) there is no score, only the file for the server. The images are
    COCO's.
    """
    subtype = read_object(path).get("data_subtype", "").replace("test-dev", "test")
    annotations = by_id(config.annotations, "annotations")
    for record in records(path, "questions"):
        image = record.get("image") or f"{record['image_id']:012d}.jpg"
        names = (f"COCO_{subtype}_{image}", image)
        annotation = annotations.get(record.id, {})
        groups = types_of(annotation, "answer_type", "question_type")
        target = people(annotation)
        yield Item(str(record.id), [names], record.question, target, groups, record.id)


def read_vizwiz(path, config):
    """Read VizWiz's val.json, or test.json, which has no answers.

    A list of {"image", "question", "answers", "answer_type"}.
    """
    for record in records(path):
        name, groups = record["image"], types_of(record, "answer_type")
        yield Item(name, [(name,)], record.question, people(record), groups, name)


def read_textvqa(path, config):
    """Read TextVQA_0.5.1_val.json, or LLaVA's llava_textvqa_val_v051_ocr.jsonl.

    LLaVA's file adds the words that an OCR program found ("Reference OCR token: ..."). It has the
    question's image and text but not its id, so its answers are in the former file, --annotations.
    """
    known = {}
    for record in records(config.annotations or path, "data"):
        if "answers" in record:
            known[str(record["image_id"]), record.question.lower()] = record
    for record in records(path, "data"):
        image, text = str(record.first("image_id", "question_id")), record.question
        annotation = known.get((image, text.split("\n")[0].lower()), record)
        name, target = annotation.id, people(annotation)
        yield Item(str(name), [(f"{image}.jpg",)], text, target, record=name)


def read_questions(path, config):
    """Read GQA's testdev_balanced_questions.json, MM-Vet's mm-vet.json or LLaVA-Bench's questions.

    The first two are one object, {id: {"imageId", "question", "answer", "types"}} and {id:
    {"imagename", "question", "answer"}}. LLaVA-Bench: {"question_id", "image", "text"} a line.
    """
    for name, question in (read_object(path) or by_id(path)).items():
        record = Record(question, f"{path}, question {name}")
        image = record.get("imagename") or record.get("image") or f"{record['imageId']}.jpg"
        groups = types_of(record.get("types", {}), "structural")
        yield Item(name, [(image,)], record.question, record.get("answer"), groups, name)


def read_mme(path, config):
    """Read LLaVA's llava_mme.jsonl, with the folder MME_Benchmark_release_version as --annotations.

    Each line has {"question_id", "image", "text", "category"}. The answers are in the folder's text
    files.
    """
    answers = mme_answers(config.annotations)
    for record in records(path):
        category, image, name = record["category"], record["image"], str(record.id)
        answer = answers.get((category, Path(name).stem, mme_question(record.question)))
        target = {"answer": answer, "image": name, "category": category} if answer else None
        names = (image, f"{category}/images/{Path(image).name}")
        ability = "perception" if category in scores.MME_PERCEPTION else "cognition"
        yield Item(name, [names], record.question, target, (category, ability))


def mme_answers(folder):
    """Read MME's answers: a text file per image in its category's folder, "question<tab>Yes"."""
    answers = {}
    for path in Path(folder).rglob("*.txt") if folder else ():
        category = path.relative_to(folder).parts[0]
        for line in path.read_text("utf-8", "replace").splitlines():
            question, _, answer = line.partition("\t")
            answers[category, path.stem, mme_question(question)] = answer.strip().lower()
    return answers


def mme_question(text):
    """Remove the instructions behind a question, which is one line."""
    return text.strip().partition("\n")[0].removesuffix("Please answer yes or no.").strip()


# --- multiple choice ----------------------------------------------------------------------


# An option within a question of LLaVA's: "A. red".
OPTION = re.compile(r"(?m)^[A-Z]\. (.+)$")


def lettered(options):
    """Write options as the lines "A. ...", "B. ..."."""
    return "".join(map("\n{}. {}".format, LETTERS, options))


def read_scienceqa(path, config):
    """Read LLaVA's llava_test_CQM-A.json, whose second turn is the answer.

    A list of {"id", "image", "conversations": [{"value": question}, {"value": answer}]}.
    """
    for record in records(path):
        question, *answers = [turn["value"] for turn in record["conversations"]]
        target = scores.scienceqa_letter(answers[0]) if answers else None
        images = [(record["image"],)] if record.get("image") else []
        groups = ("image", "all") if images else ("all",)
        yield Item(str(record.id), images, question, target, groups)


EMPTY = (None, "", "nan", "NaN", "None", "none")


def read_table(path):
    """Yield the rows of a table with tabs as Records, without empty cells."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        for row in reader:
            row = {key: cell for key, cell in row.items() if cell not in EMPTY}
            yield Record(row, f"{path}, line {reader.line_num}")


def read_mmbench(path, config):
    """Read MMBench's TSV: index, question, hint, A to D, answer, category, image (base64).

    The published files have a row for each rotation of a question's options. The index of a
    rotation is that of the question plus some millions.
    """
    rows = list(read_table(path))
    # A row may name another one that has the image.
    encoded = {row["index"]: row["image"] for row in rows}
    for row in rows:
        options = [row[letter] for letter in takewhile(row.__contains__, LETTERS)]
        target = None
        if "answer" in row:
            target = {"letter": row["answer"], "options": options, "index": int(row["index"])}
        image = base64.b64decode(encoded.get(row["image"], row["image"]))
        hint = f"{row['hint']}\n" if "hint" in row else ""
        text = hint + row["question"] + lettered(options)
        groups = types_of(row, "category", "l2-category")
        yield Item(row["index"], [image], text, target, groups, {**row, "options": options})


def read_choice(path, config):
    """Read multiple choice as in MMMU, or LLaVA's question files with options in the "text".

    Each line has {"id" or "question_id", "question", "options": [...], "answer": a letter} and
    "image", a name or a list of names, which "<image 1>" in the question refers to.
    """
    for record in records(path):
        options, text, letter = choices_of(record), record.question, record.get("answer")
        if letter and letter not in LETTERS[: len(options)]:
            raise InputError(f"{record.where}: {letter!r} is not one of {len(options)} options")
        if "options" in record:
            text += lettered(options)
        files = record.get("image") or []
        files = [files] if isinstance(files, str) else files
        # "<image 2>" is the second one.
        files = [files[int(number) - 1] for number in NUMBERED.findall(text)] or files
        images = [(file,) for file in files]
        target = {"letter": letter, "options": options} if letter else None
        groups = types_of(record, "category", "subject")
        yield Item(str(record.id), images, text, target, groups)


def choices_of(record):
    """Return the options as texts. MMMU writes the list as Python does."""
    options = record.get("options") or OPTION.findall(record.question)
    options = ast.literal_eval(options) if isinstance(options, str) else options
    if len(options) < 2:
        raise InputError(f"{record.where}: needs two or more options; leave out open questions")
    return [str(option) for option in options]


# --- video --------------------------------------------------------------------------------


def read_video(path, config):
    """Read MSVD's, MSRVTT's or ActivityNet's questions; --annotations may have the answers.

    Each is {"video_name" or "video_id" or "video", "question", "question_id" or "id", "answer"}. A
    video is a folder of frames in --image_dir, or an animated GIF.
    """
    annotations = by_id(config.annotations or path)
    for record in records(path):
        video = record.first("video_name", "video_id", "video")
        names = [f"{prefix}{video}" for prefix in ("", "video", "vid", "v_")]
        names.append(f"{video}.gif")
        annotation = annotations.get(record.id, {})
        target, groups = annotation.get("answer"), types_of(annotation, "type")
        name = str(record.id)
        yield Item(name, [names], record.question, target, groups, frames=config.frames)


# --- all of them --------------------------------------------------------------------------


class Benchmark(NamedTuple):
    # (path, config) -> items
    read: Callable
    # With <question>, <expr> or <boxes>. Without <image>, the image is in front of the text.
    prompt: str
    # (answers, targets) -> {metric: value}. None: benchmarks.judge scores.
    score: Callable | None
    # (folder, items, {id: answer}) -> path of the file for the server or the official script
    submit: Callable | None = None


REC = "Where is <expr> <image>? answer in [x0,y0,x1,y1] format."
REG = "Please generate a distinguishing description for the region <boxes> in the image <image>."
CAPTION = "Describe this image <image> as simply as possible."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
VIZWIZ = SHORT.replace("\n", f"\n{UNANSWERABLE}\n")
VQA = scores.accuracy(scores.submitted_vqa_accuracy)
# LLaVA normalizes the answers that it submits.
TO_VQA = answers.json_file("question_id", "answer", scores.evalai_normalize)
TO_VIZWIZ = answers.json_file("image", "answer", scores.evalai_normalize)
TO_GQA = answers.json_file("questionId", "prediction", scores.gqa_normalize)

BENCHMARKS = {
    "rec": Benchmark(read_rec, REC, scores.box_scores),
    "reg": Benchmark(read_reg, REG, caption_scores),
    "caption": Benchmark(
        read_caption, CAPTION, caption_scores, answers.json_file("image_id", "caption")
    ),
    "pope": Benchmark(read_pope, SHORT, scores.pope_scores),
    "vqav2": Benchmark(read_vqa, SHORT, VQA, TO_VQA),
    "okvqa": Benchmark(read_vqa, SHORT, VQA, TO_VQA),
    "vizwiz": Benchmark(read_vizwiz, VIZWIZ, scores.accuracy(scores.vizwiz_accuracy), TO_VIZWIZ),
    "textvqa": Benchmark(read_textvqa, SHORT, scores.accuracy(scores.textvqa_accuracy), TO_VQA),
    "gqa": Benchmark(read_questions, SHORT, scores.exact(scores.gqa_normalize), TO_GQA),
    "scienceqa": Benchmark(read_scienceqa, LETTER, scores.exact(scores.scienceqa_letter)),
    "mmbench": Benchmark(read_mmbench, LETTER, scores.mmbench_scores, answers.mmbench_sheet),
    "mme": Benchmark(read_mme, SHORT, scores.mme_scores),
    "choice": Benchmark(read_choice, LETTER, scores.accuracy(scores.choice_match)),
    "mm_vet": Benchmark(read_questions, "<question>", None),
    "llava_bench": Benchmark(read_questions, "<question>", None),
    "video": Benchmark(
        read_video, SHORT, scores.exact(scores.evalai_normalize, scores.evalai_normalize)
    ),
}


def read(config):
    """Read the questions of config.task from all files of config.data, at most config.limit.

    Several files share the limit.
    """
    if config.task not in BENCHMARKS:
        raise InputError(f"{config.task!r} is no benchmark; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[config.task]
    if not config.data:
        help = " ".join(benchmark.read.__doc__.split())
        raise InputError(f"{config.task} needs --data=FILE. {help}")
    for part in ("<question>", "<expr>", "<boxes>"):
        if config.prompt and part in benchmark.prompt and part not in config.prompt:
            raise InputError(f"--prompt={config.prompt}: {config.task} needs {part} in it")
    items, seen = [], Counter()
    for i, path in enumerate(config.data):
        for item in read_file(benchmark, path, config, i):
            name = f"{Path(path).stem}/{item.id}" if len(config.data) > 1 else item.id
            # Files may ask one question twice.
            seen[name] += 1
            name = f"{name}#{seen[name]}" if seen[name] > 1 else name
            groups = item.groups or (Path(path).stem,)
            items.append(item._replace(id=name, groups=groups))
    if not items:
        raise InputError(f"{path}: no question; is it the right file, and --split={config.split}?")
    return items


def read_file(benchmark, path, config, index):
    """Read the questions of file `index` of config.data, at most its share of config.limit."""
    share = config.limit and len(range(index, config.limit, len(config.data)))
    try:
        items = islice(benchmark.read(path, config), share)
        prompt = config.prompt or benchmark.prompt
        return [item._replace(prompt=ask(prompt, item.prompt)) for item in items]
    except DAMAGE as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: is this the file of {config.task}? ({what})") from error
