"""The papers' benchmarks: from the files that they are published as to questions for a model (questions.py).

    read(task, config)  ->  [Item, ...]; config holds eval.py's flags

A function a task reads its files; the docstring of each says which those are. A file that is not what it should be is an
InputError that names it, and the line or record.
"""
import ast
import base64
import binascii
import csv
import itertools
import os
import re
from pathlib import Path

from data import read_records, shikra_fields
from dialogue import MARK
from hub import InputError
from images import format_box, pad_box
from questions import LETTERS, PROMPTS, SHORT, Item, Video, ask, find_picture, letters, need, objects, read_object, text_of


# --- boxes and captions -------------------------------------------------------------------------------------------------

def read_rec(path, config):
    """Shikra's REC_refcoco*.jsonl, one a split: {"img_path", "expression", "bbox" in pixels, "width", "height"} a line."""
    items = []
    for i, (where, record) in enumerate(read_records(path)):
        image, expression, box, width, height = shikra_fields(record, where)
        items.append(Item(str(i), (Path(path).stem,), [find_picture(config, where, image)], ask("rec", config, expr=expression),
                          (box, width, height)))
    return items


def read_reg(path, config):
    """The same files the other way round, one item an object: all that people said of it are its references."""
    items = {}
    for where, record in read_records(path):
        image, expression, box, width, height = shikra_fields(record, where)
        name = f"{image} {format_box(box, 2)}"
        if name not in items:
            prompt = ask("reg", config, boxes=format_box(pad_box(box, width, height)))
            items[name] = Item(name, (Path(path).stem,), [find_picture(config, where, image)], prompt, [])
        items[name].truth.append(expression)
    return list(items.values())


def read_caption(path, config):
    """COCO's captions_*.json; Karpathy's dataset_coco.json or dataset_flickr30k.json, of which --split is taken; or
    Shikra's JSONL, {"img_path", "caption"} a line."""
    items, prompt = {}, ask("caption", config)
    whole = read_object(path, "images")
    annotations = whole.get("annotations") if whole else None
    for where, record in objects(path, "images") if whole else read_records(path):
        if "sentences" in record:                                    # Karpathy's
            if text_of(record, where, "split") != config.split:
                continue
            file, told = text_of(record, where, "filename"), need(record, where, "sentences", kind=list)
            told = [text_of(sentence, where, "raw") for sentence in told]
            name, files = record.get("cocoid", file), [os.path.join(record.get("filepath", ""), file), file]
        elif annotations is not None:
            name, files, told = need(record, where, "id"), [text_of(record, where, "file_name")], []
        else:
            name = text_of(record, where, "img_path", "image")
            files, told = [name], [text_of(record, where, "caption")]
        if name not in items:
            picture = find_picture(config, where, *files)
            items[name] = Item(str(name), (Path(path).stem,), [picture], prompt, [], {"image_id": name})
        items[name].truth.extend(told)
    for where, record in objects(path, "annotations") if annotations is not None else []:
        name = need(record, where, "image_id")
        if name not in items:
            raise InputError(f"{where}: a caption of image {name}, which is not among the images")
        items[name].truth.append(text_of(record, where, "caption"))
    if not items:
        raise InputError(f"{path}: no picture of the split {config.split!r} (--split=)")
    return [item if item.truth else item._replace(truth=None) for item in items.values()]


# --- questions with short answers ---------------------------------------------------------------------------------------

def read_pope(path, config):
    """POPE's coco_pope_random.json (popular, adversarial), lines of {"question_id", "image", "text", "label"}."""
    items = []
    for where, record in read_records(path):
        truth = text_of(record, where, "label").lower()
        if truth not in ("yes", "no"):
            raise InputError(f"{where}: the label is {truth!r}, neither yes nor no")
        picture = find_picture(config, where, text_of(record, where, "image"))
        items.append(Item(str(need(record, where, "question_id")), (Path(path).stem,), [picture],
                          ask("pope", config, text_of(record, where, "text")), truth))
    return items


def people(record, where):
    """What ten people answered, as texts."""
    answers = need(record, where, "answers", kind=list)
    return [text_of(answer, where, "answer") if isinstance(answer, dict) else str(answer) for answer in answers]


def read_vqav2(path, config, task="vqav2"):
    """VQA's *_questions.json, and *_annotations.json as --annotations; without those (test-dev) there is no score, only the
    file for the server. The pictures are COCO's."""
    whole, truths = read_object(path, "questions"), {}
    if whole is None:
        raise InputError(f"{path}: not VQA's questions, one JSON object with a list \"questions\"")
    subtype = str(whole.get("data_subtype", "")).replace("test-dev", "test")
    if config.annotations:
        truths = {need(record, where, "question_id"): (where, record)
                  for where, record in objects(config.annotations, "annotations")}
    items = []
    for where, record in objects(path, "questions"):
        name, image = need(record, where, "question_id"), need(record, where, "image_id")
        groups, truth = ("all",), None
        if truths:
            if name not in truths:
                raise InputError(f"{where}: question {name} has no answers in {config.annotations}; do the two files belong "
                                 "together?")
            told, annotation = truths[name]
            truth = people(annotation, told)
            groups += tuple(f"{kind}: {annotation[f'{kind}_type']}" for kind in ("answer", "question")
                            if f"{kind}_type" in annotation)
        number = f"{image:012d}" if isinstance(image, int) else image
        picture = find_picture(config, where, f"COCO_{subtype}_{number}.jpg", f"{number}.jpg")
        items.append(Item(str(name), groups, [picture], ask(task, config, text_of(record, where, "question")), truth,
                          {"question_id": name}))
    return items


def read_okvqa(path, config):
    """OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations.json: VQA's formats."""
    return read_vqav2(path, config, "okvqa")


def read_vizwiz(path, config):
    """VizWiz's val.json or test.json (which has no answers): a list of {"image", "question", "answers", "answer_type"}."""
    items = []
    for where, record in read_records(path):
        image = text_of(record, where, "image")
        groups = ("all",) + ((f"answer: {record['answer_type']}",) if "answer_type" in record else ())
        items.append(Item(image, groups, [find_picture(config, where, image)],
                          ask("vizwiz", config, text_of(record, where, "question")),
                          people(record, where) if "answers" in record else None, {"image": image}))
    return items


def read_textvqa(path, config):
    """TextVQA_0.5.1_val.json; or LLaVA's llava_textvqa_val_v051_ocr.jsonl, whose questions come with the words that a
    reader found ("Reference OCR token: ..."), with the former as --annotations."""
    if read_object(path, "data") is not None:
        return [Item(str(need(record, where, "question_id")), ("all",),
                     [find_picture(config, where, f"{need(record, where, 'image_id')}.jpg")],
                     ask("textvqa", config, text_of(record, where, "question")),
                     people(record, where) if "answers" in record else None, {"question_id": record["question_id"]})
                for where, record in objects(path, "data")]
    if not config.annotations:
        raise InputError(f"{path}: questions alone; --annotations=TextVQA_0.5.1_val.json has the answers")
    truths = {(str(need(record, where, "image_id")), text_of(record, where, "question").lower()): (where, record)
              for where, record in objects(config.annotations, "data")}
    items = []
    for i, (where, record) in enumerate(read_records(path)):
        text, image = text_of(record, where, "text"), str(need(record, where, "question_id"))
        asked = [line for line in text.split("\n") if not line.startswith("Reference OCR token:") and line != SHORT.strip()]
        key = (image, "\n".join(asked).lower())
        if key not in truths:
            raise InputError(f"{where}: {config.annotations} has no question {' '.join(asked)!r} about image {image}")
        told, annotation = truths[key]
        name = need(annotation, told, "question_id")
        items.append(Item(f"{name}#{i}", ("all",),                   # the file may ask one question twice
                          [find_picture(config, where, text_of(record, where, "image"))], ask("textvqa", config, text),
                          people(annotation, told), {"question_id": name}))
    return items


def read_gqa(path, config):
    """GQA's testdev_balanced_questions.json: {id: {"imageId", "question", "answer", "types"}}."""
    whole = read_object(path)
    if whole is None:
        raise InputError(f"{path}: not GQA's questions, one JSON object of questions by their id")
    items = []
    for name, record in whole.items():
        where = f"{path}, question {name}"
        if not isinstance(record, dict):
            raise InputError(f"{where}: should be an object, is a {type(record).__name__}")
        structure = (record.get("types") or {}).get("structural")
        groups = ("all",) + ((f"{'open' if structure == 'query' else 'binary'}", f"structure: {structure}") if structure else ())
        items.append(Item(name, groups, [find_picture(config, where, f"{need(record, where, 'imageId')}.jpg")],
                          ask("gqa", config, text_of(record, where, "question")), record.get("answer"), {"questionId": name}))
    return items


def read_mme(path, config):
    """LLaVA's llava_mme.jsonl, {"question_id", "image", "text", "category"} a line, with MME_Benchmark_release_version,
    whose text files have the answers, as --annotations (or a "label", yes or no, in every line)."""
    items, seen = [], {}
    for where, record in read_records(path):
        category, text = text_of(record, where, "category"), text_of(record, where, "text")
        name = str(need(record, where, "question_id", "image"))
        truth = record["label"] if "label" in record else mme_truth(config, where, category, name, text)
        if str(truth).lower() not in ("yes", "no"):
            raise InputError(f"{where}: the answer is {truth!r}, neither yes nor no")
        image = text_of(record, where, "image")
        picture = find_picture(config, where, image, os.path.join(category, "images", Path(image).name))
        seen[name] = seen.get(name, 0) + 1
        items.append(Item(f"{name}#{seen[name]}", (category,), [picture], ask("mme", config, text),
                          {"answer": str(truth).lower(), "picture": name}))
    return items


def mme_truth(config, where, category, name, text):
    """The answer that MME's folder has: a text file a picture, "question<tab>Yes" a line."""
    if not config.annotations:
        raise InputError(f"{where}: no label; --annotations=MME_Benchmark_release_version names the folder with the answers")
    file = Path(name).stem + ".txt"
    for path in (Path(config.annotations, category, "questions_answers_YN", file), Path(config.annotations, category, file)):
        if path.is_file():
            bare = lambda asked: asked.removesuffix(SHORT.strip()).strip().removesuffix("Please answer yes or no.").strip()
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                asked, _, answer = line.partition("\t")
                if bare(asked) == bare(text):
                    return answer.strip()
            raise InputError(f"{where}: {path} has no answer to {bare(text)!r}")
    raise InputError(f"{where}: no {category}/{file} in --annotations={config.annotations}")


# --- multiple choice --------------------------------------------------------------------------------------------------------

def read_scienceqa(path, config):
    """LLaVA's llava_test_CQM-A.json, and ScienceQA's problems.json as --annotations (else the answer that LLaVA's file has)."""
    problems = read_object(config.annotations) if config.annotations else {}
    if problems is None:
        raise InputError(f"{config.annotations}: not ScienceQA's problems, one JSON object of problems by their id")
    items = []
    for where, record in read_records(path):
        name, talk = str(need(record, where, "id", "question_id")), need(record, where, "conversations", kind=list)
        texts = [text_of(turn, where, "value") for turn in talk if isinstance(turn, dict)]
        if not texts:
            raise InputError(f"{where}: no question in conversations")
        if config.annotations and name not in problems:
            raise InputError(f"{where}: no problem {name} in {config.annotations}")
        if config.annotations:
            truth = LETTERS[need(problems[name], f"{config.annotations}, problem {name}", "answer", kind=int) % len(LETTERS)]
        else:
            told = re.findall(r"The answer is ([A-Z])\.|^([A-Z])$", texts[1] if len(texts) > 1 else "")
            truth = told[-1][0] or told[-1][1] if told else None
        pictures = [find_picture(config, where, record["image"])] if record.get("image") else []
        items.append(Item(name, ("image",) * bool(pictures) + ("all",), pictures,
                          ask("scienceqa", config, texts[0].replace(MARK, "").strip()), truth))
    return items


def read_mmbench(path, config):
    """MMBench's TSV: index, question, hint, A to D, answer (not in the test split), category, image (base64). Every
    question is asked once for each rotation of its options, unless the file has the rotations (an index of a million more)
    or --circular=false."""
    csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from None
    for where, row in rows:
        if None in row:
            raise InputError(f"{where}: has more cells than the heading; is this a table with tabs between its cells?")
    cells = [{key: value for key, value in row.items() if value is not None and value.strip().lower() not in ("", "nan", "none")}
             for _, row in rows]
    encoded = {row.get("index"): row.get("image", "") for row in cells}
    rotated = any(row.get("index", "").isdigit() and int(row["index"]) >= 1_000_000 for row in cells)
    items = []
    for (where, original), row in zip(rows, cells):
        index, _ = text_of(row, where, "index"), text_of(row, where, "question")
        options = [row[letter] for letter in itertools.takewhile(row.__contains__, LETTERS)]
        if not index.isdigit() or len(options) < 2 or ("answer" in row and row["answer"] not in list(LETTERS[:len(options)])):
            raise InputError(f"{where}: needs an index that is a number, two options at least, and as answer the letter of one")
        image = encoded.get(row.get("image"), text_of(row, where, "image"))     # a later row may name an earlier one's
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{where}: the image is not base64") from None
        groups = ("all",) + tuple(f"{key}: {row[key]}" for key in ("category", "l2-category") if key in row)
        for turn in range(len(options) if config.circular and not rotated else 1):
            shown = options[turn:] + options[:turn]
            right = LETTERS[(LETTERS.index(row["answer"]) - turn) % len(options)] if "answer" in row else None
            text = "\n".join([row[key] for key in ("hint", "question") if key in row]) + letters(shown)
            items.append(Item(f"{index}#{turn}" if turn else index, groups, [image], ask("mmbench", config, text),
                              right and {"letter": right, "options": shown, "question": int(index) % 1_000_000,
                                         "first": turn == 0 and int(index) < 1_000_000},
                              {} if turn else {**original, "image": "", "options": shown}))
    return items


def read_choice(path, config):
    """Multiple choice as in MMMU, or in LLaVA's question files: {"id" or "question_id", "image": a name or a list (or
    none), "question" with "<image 1>" where pictures stand, "options": [...], "answer": a letter} a line; LLaVA's "text"
    has the options in it."""
    items = []
    for where, record in read_records(path):
        name, text = str(need(record, where, "question_id", "id")), text_of(record, where, "question", "text")
        options = record.get("options") or re.findall(r"(?m)^[A-Z]\. (.+)$", text)
        try:
            options = ast.literal_eval(options) if isinstance(options, str) else options     # MMMU spells the list as Python does
        except (ValueError, SyntaxError):
            options = None
        if not isinstance(options, list) or len(options) < 2:
            raise InputError(f"{where}: needs two options at least (questions with open answers should be left out of the file)")
        options, truth = list(map(str, options)), record.get("answer", record.get("label"))
        if truth is not None and truth not in list(LETTERS[:len(options)]):
            raise InputError(f"{where}: the answer is {truth!r}, not the letter of one of {len(options)} options")
        files = record.get("image") or []
        files = [files] if isinstance(files, str) else files
        asked = text + letters(options) if "options" in record else text
        numbers = [int(number) for number in re.findall(r"<image (\d+)>", asked)]
        if any(not 1 <= number <= len(files) for number in numbers):
            raise InputError(f"{where}: speaks of image {max(numbers)}, and has {len(files)}")
        files = [files[number - 1] for number in numbers] or files
        asked = re.sub(r"<image \d+>", MARK, asked)
        groups = ("all",) + tuple(f"{key}: {record[key]}" for key in ("category", "subject") if key in record)
        items.append(Item(name, groups, [find_picture(config, where, file) for file in files], ask("choice", config, asked),
                          truth and {"letter": truth, "options": options}))
    return items


# --- video --------------------------------------------------------------------------------------------------------------------

def read_video(path, config):
    """MSVD's, MSRVTT's and ActivityNet's questions: {"video_name" or "video_id" or "video", "question", "question_id" or
    "id", "answer"}; the answers may be in a file of their own, --annotations. A video is a folder of frames in --image_dir,
    or an animated image."""
    truths = {need(record, where, "question_id", "id"): (where, record) for where, record in
              (read_records(config.annotations) if config.annotations else [])}
    items = []
    for where, record in read_records(path):
        name, video = need(record, where, "question_id", "id"), need(record, where, "video_name", "video_id", "video")
        told, answer = truths.get(name, (where, record))
        if config.annotations and name not in truths:
            raise InputError(f"{where}: {config.annotations} has no answer to question {name}")
        stems = [str(video)] + [f"{prefix}{video}" for prefix in ("video", "vid", "v_")]
        place = find_picture(config, where, *(stem + ending for stem in stems for ending in ("", ".gif", ".webp", ".png")))
        groups = ("all",) + ((f"type: {answer['type']}",) if "type" in answer else ())
        items.append(Item(str(name), groups, [Video(place, config.frames)],
                          ask("video", config, text_of(record, where, "question")),
                          text_of(answer, told, "answer") if "answer" in answer else None))
    return items


# --- all of them ----------------------------------------------------------------------------------------------------------------

READERS = {"rec": read_rec, "reg": read_reg, "caption": read_caption, "pope": read_pope, "vqav2": read_vqav2, "okvqa": read_okvqa,
           "vizwiz": read_vizwiz, "textvqa": read_textvqa, "gqa": read_gqa, "scienceqa": read_scienceqa, "mmbench": read_mmbench,
           "mme": read_mme, "choice": read_choice, "video": read_video}


def read(task, config):
    """The task's items, of all files of config.data in their order."""
    if task not in READERS:
        raise InputError(f"--task={task}: no such benchmark; there are {', '.join(READERS)}")
    if not config.data:
        raise InputError(f"--task={task} needs --data=FILE: {' '.join(READERS[task].__doc__.split())}")
    placeholders = re.findall("<(?:expr|boxes|question)>", PROMPTS[task])
    if config.prompt and not all(part in config.prompt for part in placeholders):
        raise InputError(f"--prompt={config.prompt}: for {task} it needs {placeholders[0]}, where the question puts its words")
    items = []
    for path in config.data:
        found = READERS[task](path, config)
        items += found if len(config.data) == 1 else [item._replace(id=f"{Path(path).stem}/{item.id}") for item in found]
    seen = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"{', '.join(config.data)}: two questions have the id {item.id!r}")
        seen.add(item.id)
    return items
