"""Answers as files: those of a run, which may stop at any moment and go on, and those that a benchmark's server takes.

    read_answers(folder, items)         what is known already: {id: {"id", "prompt", "answer", "truth"}}
    append_answers(path, lines)         after every batch, each process to a file of its own
    merge(folder, items, known)         answers.jsonl, in the order of the questions
    submission(task, items, {id: answer})  ->  (file name, bytes), or None where a benchmark has no server

VQAv2, OK-VQA, TextVQA and VizWiz get JSON with the answers normalised, as LLaVA sends them; MMBench an Excel sheet, written here
since it is only a zip of five small XML files; GQA and COCO captions the JSON that their own scripts read.
"""
import io
import json
import os
import re
import zipfile
from xml.sax.saxutils import escape

from hub import InputError
from scores import evalai_normalise, option_letter


# --- of a run -----------------------------------------------------------------------------------------------------------

def read_answers(folder, items):
    """All that was answered before, by any number of processes -> {id: line}, of questions that are still asked in the same
    words. The last line of a file may be torn: the run was stopped while it was written."""
    prompts, known = {item.id: item.prompt for item in items}, {}
    for path in sorted(folder.glob("answers*.jsonl")):
        *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                if prompts.get(line["id"], line["prompt"]) == line["prompt"]:
                    known[line["id"]] = line | {"answer": "" + line["answer"]}       # TypeError if it is no text
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}, line {number}: not an answer that eval.py wrote; remove the line, and its question is "
                                 "asked again") from None
    return known


def append_answers(path, lines):
    """Add whole lines to a file, after a torn one is cut off."""
    torn = path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    with open(path, "ab") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def merge(folder, items, known):
    """The answers of all processes as one file, in the order of the questions; answers beyond --limit are kept at the end."""
    order = dict.fromkeys([*(item.id for item in items), *known])
    partial = folder / "answers.partial"
    partial.write_text("".join(json.dumps(known[name], ensure_ascii=False) + "\n" for name in order), encoding="utf-8")
    os.replace(partial, folder / "answers.jsonl")
    for path in folder.glob("answers.rank*.jsonl"):
        path.unlink()


# --- for servers --------------------------------------------------------------------------------------------------------

def submission(task, items, said):
    """-> (file name, bytes), what the benchmark's server or its own script takes; None if it has neither."""
    if task == "mmbench":
        return "submission.xlsx", mmbench_sheet(items, said)
    if task in ("vqav2", "okvqa", "textvqa", "vizwiz"):              # as LLaVA sends them
        rows = [{**item.record, "answer": evalai_normalise(said[item.id])} for item in items]
    elif task == "gqa":
        rows = [{**item.record, "prediction": said[item.id].rstrip(".").lower()} for item in items]
    elif task == "caption":
        rows = [{**item.record, "caption": said[item.id]} for item in items]
    else:
        return None
    return "submission.json", (json.dumps(rows, ensure_ascii=False) + "\n").encode()


def mmbench_sheet(items, said):
    """MMBench's server takes an Excel sheet: the questions as they are in the table, and the letter of the prediction."""
    asked = [item for item in items if item.record]
    columns = [key for key in asked[0].record if key in ("index", "question", "answer", "split", *"ABCDEFGH")] + ["prediction"]
    rows = [columns] + [[{**item.record, "prediction": option_letter(said[item.id], item.record["options"]) or said[item.id]}[key]
                         for key in columns] for item in asked]
    return sheet(rows)


def sheet(rows):
    """Rows of texts -> the bytes of an .xlsx file, the least that Excel and openpyxl read: a zip of five XML files."""
    def cell(value):
        value = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", str(value))     # XML has no such characters
        if re.fullmatch(r"0|[1-9]\d{0,14}", value):
            return f"<c><v>{value}</v></c>"
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
    schemas, kind = "http://schemas.openxmlformats.org", "application/vnd.openxmlformats-officedocument.spreadsheetml"
    main, package = f"{schemas}/spreadsheetml/2006/main", f"{schemas}/package/2006"
    office = f"{schemas}/officeDocument/2006/relationships"
    files = {
        "[Content_Types].xml":
            f'<Types xmlns="{package}/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{kind}.sheet.main+xml"/>'
            f'<Override PartName="/xl/sheet.xml" ContentType="{kind}.worksheet+xml"/></Types>',
        "_rels/.rels":
            f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/_rels/workbook.xml.rels":
            f'<Relationships xmlns="{package}/relationships">'
            f'<Relationship Id="r1" Type="{office}/worksheet" Target="sheet.xml"/></Relationships>',
        "xl/workbook.xml":
            f'<workbook xmlns="{main}" xmlns:r="{office}">'
            '<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/sheet.xml":
            f'<worksheet xmlns="{main}"><sheetData>'
            + "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows) + "</sheetData></worksheet>"}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>{text}')
    return packed.getvalue()
