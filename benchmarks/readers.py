"""The papers' benchmarks: how each is read, asked, scored and submitted.

    read(config)  ->  [Item, ...]

BENCHMARKS at the end is the table of all. To add one, write a reader and a line there. A reader
takes a file as it is published, named in its docstring, and yields questions. LLaVA's own question
files are read, too; most have no answers. A file that is not what it should be is an InputError
that names it, and the key that it lacks.
"""

import ast
import base64
import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from benchmarks import judged, scores
from benchmarks.answers import answer_file, mmbench_sheet, mmmu_file, texts_by_id
from benchmarks.captions import caption_scores
from benchmarks.prompts import Item, ask, read_object, records
from benchmarks.scores import LETTERS, accuracy, exact
from common.cli import find_class
from common.errors import InputError
from common.images import format_box, pad_box
from common.shikra import shikra_fields
from common.video import ENDINGS
from dialogue import MARK

SHORTLY = "Answer the question using a single word or phrase."
BY_LETTER = "Answer with the option's letter from the given choices directly."
# What questions are grouped by.
TYPES = """
    answer_type question_type structural capability category l2-category subject type task skills
""".split()


def types_of(record):
    """Return the groups "all" and "type: value", or none for a record without types."""
    record, groups = {**record, **record.get("types", {}), **(record.get("metadata") or {})}, []
    for key in TYPES:
        values = record.get(key, [])
        values = values if isinstance(values, list) else [values]
        groups += [f"{key}: {value}" for value in values]
    return ["all", *groups] if groups else []


# --- boxes and captions -------------------------------------------------------------------


def read_rec(path, config):
    """Read Shikra's REC_refcoco*.jsonl, one per split.

    Each line has {"img_path", "expression", "bbox" in pixels, "width", "height"}.
    """
    for record in records(path):
        image, expression, *target = shikra_fields(record, path)
        yield Item(image, [image], expression, target)


def read_reg(path, config):
    """Read the files of "rec" for the reverse task: from an object's box to its expressions."""
    items = {}
    for record in records(path):
        image, expression, box, width, height = shikra_fields(record, path)
        name = f"{image} {format_box(box, 2)}"
        text = format_box(pad_box(box, width, height))
        items.setdefault(name, Item(name, [image], text, [])).target.append(expression)
    return items.values()


def read_caption(path, config):
    """Read captions: COCO's, Karpathy's or Shikra's.

    COCO: captions_*.json. Karpathy: dataset_coco.json or dataset_flickr30k.json, of which the
    split test is taken. Shikra: JSONL, {"img_path", "caption"} a line.
    """
    items, captions = {}, defaultdict(list)
    for annotation in read_object(path).get("annotations", []):
        captions[annotation["image_id"]].append(annotation["caption"])
    for record in records(path):
        if record.get("split", "test") != "test":
            continue
        image = record.first("filename", "file_name", "img_path", "image")
        name = record.id
        captions[name] += [sentence["raw"] for sentence in record.get("sentences", [])]
        if "caption" in record:
            captions[name].append(record["caption"])
        image = [f"{record.get('filepath', '.')}/{image}", image]
        items[name] = Item(name, image, "", captions[name], record)
    return items.values()


# --- questions ----------------------------------------------------------------------------


def read_questions(path, config):
    """Read a list, JSONL or {id: question}; --annotations may have the answers.

    POPE: coco_pope_random.json. VQAv2, OK-VQA: *_questions.json and *_annotations.json. VizWiz:
    val.json. TextVQA: TextVQA_0.5.1_val.json. GQA: testdev_balanced_questions.json. MM-Vet:
    mm-vet.json. LLaVA-Bench (in the wild): questions.jsonl. MSVD, MSRVTT, ActivityNet: test_q.json
    and test_a.json.
    """
    annotations = {}
    for annotation in records(config.annotations) if config.annotations else ():
        annotations[annotation.id] = annotation
        annotations[annotation.get("image_id"), annotation.get("question", "").lower()] = annotation
    for record in records(path):
        text = record.question
        # LLaVA's file for TextVQA: the id is the image's, and OCR tokens follow the question.
        key = record.id, text.split("\n")[0].lower()
        record |= annotations.get(key) or annotations.get(record.id, {})
        # Ten people's, unless they are not published.
        answers = record.get("answers", [])
        people = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
        target = people or record.get("label") or record.get("answer")
        yield Item(record.id, names_of(record), text, target, record)


def names_of(record):
    """Return the names that a record's image or video may have in --image_dir."""
    image = record.get("image") or record.get("imagename")
    if image:
        return [image]
    if "imageId" in record:
        return [f"{record['imageId']}.jpg"]
    if "image_id" in record:
        # COCO's number, or 16 letters of TextVQA
        image = f"{record['image_id']:0>12}.jpg"
        return [image, *(f"COCO_{split}_{image}" for split in ("train2014", "val2014", "test2015"))]
    # A folder of frames, a file or an animated image.
    video = record.first("video_name", "video_id", "video")
    names = [f"{prefix}{video}" for prefix in ("", "video", "vid", "v_")]
    return [f"{name}{ending}" for ending in ("", *ENDINGS, ".gif") for name in names]


def read_video_chatgpt(path, config):
    """Read Video-ChatGPT's generic_qa.json, temporal_qa.json or consistency_qa.json.

    A list of {"video_name", "Q", "A"}, or of pairs, {"video_name", "Q1", "Q2", "A"}. The questions
    of a video are called NAME_0, NAME_1, ..., as the judge's script calls them.
    """
    counts = Counter()
    for record in records(path):
        video = record["video_name"]
        name = f"{video}_{counts[video]}"
        counts[video] += 1
        for key in ("Q", "Q1", "Q2"):
            if key in record:
                pred = key.replace("Q", "pred")
                yield Item(name, names_of(record), record[key], record["A"], record, key=pred)


def read_mme(path, config):
    """Read LLaVA's llava_mme.jsonl, with the folder MME_Benchmark_release_version as --annotations.

    Each line has {"question_id", "image", "text", "category"}. The answers are in the folder's text
    files.
    """
    answers = mme_answers(config.annotations)
    for record in records(path):
        category, image, name = record["category"], record["image"], record.id
        answer = answers.get((category, Path(name).stem, mme_question(record.question)))
        target = {"answer": answer, "image": name, "category": category} if answer else None
        names = [image, f"{category}/images/{Path(image).name}"]
        ability = "perception" if category in scores.MME_PERCEPTION else "cognition"
        yield Item(name, names, record.question, target, groups=(category, ability))


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
    return text.strip().split("\n")[0].removesuffix("Please answer yes or no.").strip()


# --- multiple choice ----------------------------------------------------------------------


def lettered(options, form="\n{}. {}"):
    """Write options as the lines "A. ...", "B. ..."."""
    return "".join(map(form.format, LETTERS, options))


def read_scienceqa(path, config):
    """Read LLaVA's llava_test_CQM-A.json, whose second turn is the answer.

    A list of {"id", "image", "conversations": [{"value": question}, {"value": answer}]}.
    """
    for record in records(path):
        question, answer = [turn["value"] for turn in record["conversations"]]
        target = scores.scienceqa_letter(answer)
        image = [record["image"]] if record.get("image") else None
        groups = ("image", "all") if image else ("all",)
        yield Item(record.id, image, question.replace(MARK, ""), target, groups=groups)


EMPTY = (None, "", "nan", "NaN", "None", "none")


def read_mmbench(path, config):
    """Read MMBench's TSV: index, question, hint, A to D, answer, category, image (base64).

    The published files have a row for each rotation of a question's options. The index of a
    rotation is that of the question plus some millions.
    """
    rows = []
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            rows.append({key: cell for key, cell in row.items() if cell not in EMPTY})
    # A row may name another one that has the image.
    encoded = {row["index"]: row["image"] for row in rows}
    for row in rows:
        options = [row[letter] for letter in takewhile(row.__contains__, LETTERS)]
        target = None
        if "answer" in row:
            target = {"letter": row["answer"], "options": options, "index": int(row["index"])}
        image = io.BytesIO(base64.b64decode(encoded.get(row["image"], row["image"])))
        hint = f"{row['hint']}\n" if "hint" in row else ""
        text = hint + row["question"] + lettered(options)
        row["options"] = options
        yield Item(row["index"], image, text, target, row)


def read_mmmu(path, config):
    """Read MMMU's validation set as JSONL, to be asked as MMMU's own script does.

    Each line has {"id", "question", "options": [...], "answer": a letter} and "image", a name or a
    list of which only the first is shown. Open questions have no options. They are only in the
    submission.
    """
    for record in records(path):
        options, letter, image = record["options"], record.get("answer"), record["image"]
        # The published list is text, as Python writes it.
        options = ast.literal_eval(options) if isinstance(options, str) else options
        record["options"] = options
        end = lettered(options, "({}) {}\n") + f"\n\n{BY_LETTER}" if options else SHORTLY
        target = {"letter": letter, "options": options} if options and letter else None
        names = image if isinstance(image, list) else [image]
        text = f"{record.question}\n\n{end}"
        yield Item(record.id, names[:1], text, target, record)


# MathVista's hints, by the type of the answer and its decimals.
HINTS = {
    "text 0": "and provide the correct option letter, e.g., A, B, C, D,",
    "integer 0": "requiring an integer answer and provide the final value, e.g., 1, 2, 3,",
    "float 1": "requiring a floating-point number with one decimal place and provide the final "
    "value, e.g., 1.2, 1.3, 1.4,",
    "float 2": "requiring a floating-point number with two decimal places and provide the final "
    "value, e.g., 1.23, 1.34, 1.45,",
    "list 0": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4],",
}


def read_mathvista(path, config):
    """Read MathVista's testmini.json, an object {id: problem}."""
    for record in records(path):
        hint = HINTS[f"{record['answer_type']} {record['precision'] or 0:.0f}"]
        text = f"Hint: Please answer the question {hint} at the end.\nQuestion: {record.question}"
        if record["unit"]:
            text += f" (Unit: {record['unit']})"
        if record["choices"]:
            text += "\nChoices:" + lettered(record["choices"], "\n({}) {}")
        target = record if record.get("answer") else None
        yield Item(record.id, names_of(record), text, target, record)


# --- all of them --------------------------------------------------------------------------


class Benchmark(NamedTuple):
    # (answers, targets) -> {metric: value}; None: only a judge scores
    score: Callable | None
    # (folder, items, {id: answer}) writes the file for the server or the judge's script
    submit: Callable | None = None
    # (path, config) -> items
    read: Callable = read_questions
    # With <question>. Without <image>, the image is in front of the text.
    prompt: str = f"<question>\n{SHORTLY}"
    max_new_tokens: int = 128
    # What of the judge's row is its verdict, and (verdicts, targets) -> {metric: value}.
    verdict: str | int | None = None
    judge: Callable | None = None


REC = "Where is <question> <image>? answer in [x0,y0,x1,y1] format."
REG = "Please generate a distinguishing description for the region <question> in the image <image>."
CAPTION = "Describe this image <image> as simply as possible."
BARE = "<question>"
LETTER, LETTER_CN = f"{BARE}\n{BY_LETTER}", f"{BARE}\n请直接回答选项字母。"
VIZWIZ = f"""{BARE}
When the provided information is insufficient, respond with 'Unanswerable'.
{SHORTLY}"""
VQA = accuracy(scores.submitted_vqa_accuracy)
EVALAI = scores.evalai_normalize
RULE, EXTRACTED = accuracy(judged.mathvista_rule), accuracy(judged.mathvista_match)
# LLaVA normalizes the answers that it submits.
TO_VQA = answer_file("answer", "question_id", normalize=EVALAI)
TO_VIZWIZ = answer_file("answer", "image", normalize=EVALAI)
TO_GQA = answer_file("prediction", "questionId", normalize=scores.gqa_normalize)
TO_COCO = answer_file("caption", "image_id")
TO_MATHVISTA = answer_file("response", form="object")
TO_LLAVA_BENCH = answer_file("text", form="lines")
TO_VIDEO = answer_file("pred", form="lines")

BENCHMARKS = {
    "rec": Benchmark(scores.box_scores, None, read_rec, REC),
    "reg": Benchmark(caption_scores, None, read_reg, REG),
    "caption": Benchmark(caption_scores, TO_COCO, read_caption, CAPTION),
    "pope": Benchmark(scores.pope_scores),
    "vqav2": Benchmark(VQA, TO_VQA),
    "okvqa": Benchmark(VQA, TO_VQA),
    "vizwiz": Benchmark(accuracy(scores.vizwiz_accuracy), TO_VIZWIZ, prompt=VIZWIZ),
    "textvqa": Benchmark(accuracy(scores.textvqa_accuracy), TO_VQA),
    "gqa": Benchmark(exact(scores.gqa_normalize), TO_GQA),
    "scienceqa": Benchmark(exact(scores.scienceqa_letter), None, read_scienceqa, LETTER),
    "mmbench": Benchmark(scores.mmbench_scores, mmbench_sheet, read_mmbench, LETTER),
    "mmbench_cn": Benchmark(scores.mmbench_scores, mmbench_sheet, read_mmbench, LETTER_CN),
    "mme": Benchmark(scores.mme_scores, None, read_mme),
    "mmmu": Benchmark(scores.mmmu_scores, mmmu_file, read_mmmu, BARE),
    "mathvista": Benchmark(RULE, TO_MATHVISTA, read_mathvista, BARE, 1024, "extraction", EXTRACTED),
    "mm_vet": Benchmark(
        None, texts_by_id, read_questions, BARE, 1024, "score", judged.mm_vet_scores
    ),
    "llava_bench": Benchmark(
        None, TO_LLAVA_BENCH, read_questions, BARE, 1024, "tuple", judged.llava_bench_scores
    ),
    "video": Benchmark(exact(EVALAI), TO_VIDEO, read_questions, BARE, 512, 0, judged.video_scores),
    "video_chatgpt": Benchmark(
        None, TO_VIDEO, read_video_chatgpt, BARE, 512, 0, judged.video_points
    ),
}


def read(config):
    """Read the questions of config.task from all files of config.data."""
    benchmark = find_class(BENCHMARKS, config.task, "benchmark")
    if not config.data:
        raise InputError(f"{config.task} needs --data=FILE. {benchmark.read.__doc__}")
    if config.prompt and BARE in benchmark.prompt and BARE not in config.prompt:
        raise InputError(f"--prompt={config.prompt}: {config.task} needs {BARE} in it")
    items, seen = [], Counter()
    for path in config.data:
        try:
            found = list(benchmark.read(path, config))[: config.limit]
        except Exception as error:  # a file of another kind raises many
            raise InputError(f"{path}: is this {config.task}'s file? ({error!r})") from error
        stem = Path(path).stem
        for item in found:
            name = f"{stem}/{item.id}" if len(config.data) > 1 else str(item.id)
            # Files may ask one question twice.
            seen[name] += 1
            if seen[name] > 1:
                name += f"#{seen[name]}"
            prompt = ask(config.prompt or benchmark.prompt, item.prompt)
            groups = item.groups or types_of(item.record) or [stem]
            items.append(item._replace(id=name, prompt=prompt, groups=groups))
    return items
