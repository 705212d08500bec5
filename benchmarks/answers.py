"""Answers as files: those of a run, which may stop and resume, and those for a benchmark's server.

After every batch each process appends lines {"id", "prompt", "answer", "target"} to its own file.
"""

import json
from contextlib import suppress

from benchmarks.scores import mmbench_letter, mmmu_parse
from common.errors import InputError
from common.save import write_json

# --- of a run -----------------------------------------------------------------------------


def read_answers(folder):
    """Read all earlier answers -> {id: line}.

    A line that cannot be read is skipped, so its question is asked again: a run that is stopped may
    leave half a line.
    """
    known = {}
    for path in sorted(folder.glob("answers*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                known[line["id"]] = line
    return known


def write_lines(path, lines, mode="a"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def merge(folder, items):
    """Write the answers of all processes to answers.jsonl, in the order of the questions.

    Answers beyond --limit are kept at the end. -> {id: answer} of the questions that have one.
    """
    known = read_answers(folder)
    lines = {item.id: known[item.id] for item in items if item.id in known}
    write_lines(folder / "answers.partial", (lines | known).values(), "w")
    (folder / "answers.partial").replace(folder / "answers.jsonl")
    for path in folder.glob("answers.rank*.jsonl"):
        path.unlink()
    return {name: line["answer"] for name, line in lines.items()}


# --- for servers and judges ---------------------------------------------------------------


def answer_file(key, name="", form="list", normalize=str):
    """Return a function that writes a row for each question.

    It has the answer under `key`, and the question's id under `name`, or all of its record. form:
    list; object, {question's id: row}; lines, JSONL.
    """

    def write(folder, items, answers):
        rows = {}
        for item in items:
            # "query" is MathVista's prompt.
            row = {"id": item.id, "answer_id": item.id, "prompt": item.prompt, "query": item.prompt}
            row |= {"model_id": "", "metadata": {}, **item.record}
            row = {name: item.record.id} if name else row
            # The two questions of a pair of Video-ChatGPT share a row.
            row = rows.setdefault(item.id.removesuffix("#2") if item.key else item.id, row)
            row[item.key or key] = normalize(answers[item.id])
        if form == "lines":
            write_lines(folder / "submission.jsonl", rows.values(), "w")
        else:
            rows = rows if form == "object" else list(rows.values())
            write_json(folder / "submission.json", rows)

    return write


def texts_by_id(folder, items, answers):
    """Write {question's id: answer} for MM-Vet."""
    write_json(folder / "submission.json", answers)


def mmmu_file(folder, items, answers):
    """Write {question's id: letter, or answer to an open question} for main_eval_only.py."""
    parsed = mmmu_parse(answers.values(), [item.record for item in items])
    texts_by_id(folder, items, dict(zip(answers, parsed, strict=True)))


def mmbench_sheet(folder, items, answers):
    """Write the columns of MMBench's table and the letter of each prediction as an Excel sheet."""
    try:
        from openpyxl import Workbook
    except ImportError:
        raise InputError(
            "MMBench's server takes an Excel sheet: pip install openpyxl, then repeat the command "
            "(the answers are saved)"
        ) from None
    columns = ["index", "question", *"ABCD", "answer", "split", "prediction"]
    workbook = Workbook()
    workbook.active.append(columns)
    for item in items:
        answer = answers[item.id]
        letter = mmbench_letter(answer, item.record["options"])
        # A sheet cannot hold control characters.
        prediction = letter or "".join(filter(str.isprintable, answer))
        row = {**item.record, "prediction": prediction}
        workbook.active.append([row.get(key) for key in columns])
    workbook.save(folder / "submission.xlsx")
