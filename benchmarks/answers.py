"""Answers as files: those of a run, which may stop and resume, and those for a benchmark's server.

    read_answers(folder, items)      earlier answers: {id: {"id", "prompt", "answer", "target"}}
    write_lines(path, lines)         after every batch, each process to its own file
    merge(folder, items, known)      answers.jsonl, in the order of the questions
    json_file, mmbench_sheet         the file for the server or the official script

MMBench's server takes an Excel sheet (.xlsx), the others JSON.
"""

import json
import os

from benchmarks.scores import mmbench_letter
from common.errors import InputError

# --- of a run -----------------------------------------------------------------------------


def read_answers(folder, items, names="answers*.jsonl"):
    """Read all earlier answers -> {id: line}, except to questions whose prompt has changed.

    A line that cannot be read is skipped, so its question is asked again: a run that is stopped may
    leave half a line.
    """
    prompts, known = {item.id: item.prompt for item in items}, {}
    for path in sorted(folder.glob(names)):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
                name, prompt = line["id"], line["prompt"]
            except (ValueError, KeyError, TypeError):
                continue
            if prompts.get(name, prompt) == prompt:
                known[name] = line
    return known


def write_lines(path, lines, mode="a"):
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def merge(folder, items, known):
    """Write the answers of all processes to answers.jsonl, in the order of the questions.

    Answers beyond --limit are kept at the end.
    """
    lines = {item.id: known[item.id] for item in items} | known
    write_lines(folder / "answers.partial", lines.values(), "w")
    os.replace(folder / "answers.partial", folder / "answers.jsonl")
    for path in folder.glob("answers.rank*.jsonl"):
        path.unlink()


# --- for servers --------------------------------------------------------------------------


def json_file(id_key, key, normalize=str):
    """Return a function that writes [{id_key: the question's id, key: its answer}, ...]."""

    def write(folder, items, answers):
        rows = [{id_key: item.record, key: normalize(answers[item.id])} for item in items]
        path = folder / "submission.json"
        path.write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    return write


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
    workbook, path = Workbook(), folder / "submission.xlsx"
    workbook.active.append(columns)
    for item in items:
        answer = answers[item.id]
        letter = mmbench_letter(answer, item.record["options"])
        # A sheet cannot hold control characters.
        prediction = letter or "".join(filter(str.isprintable, answer))
        row = {**item.record, "prediction": prediction}
        workbook.active.append([row.get(key) for key in columns])
    workbook.save(path)
    return path
