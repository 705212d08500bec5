"""Run every snippet and command of docs/lessons and apply every change.

```python, ```sh              one namespace a lesson, and a new one after a change or for an
                              exercise that does not say "Continue"
```diff, first --- FILE       a change; its old lines must be in FILE exactly once
<!-- short: --steps1=2 -->    before commands: further flags for the tests
<!-- short: 300 => 60 -->     before a snippet: a replacement for the tests
<!-- fails: words -->         before a command: it ends with an error that has these words
"""

import codeop
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from collections import namedtuple
from contextlib import contextmanager, redirect_stdout

import pytest
from conftest import ROOT

from tools.notebooks import notebook

ANSWERS = ROOT / "docs" / "lessons" / "answers.md"
LESSONS = sorted((ROOT / "docs" / "lessons").glob("[0-9]*.md"))
CONTINUE = "Continue in the Python of the walk"
FILES = [path.stem for path in ROOT.glob("*.py")]
ROOMS = ["common", "toy", "benchmarks", "interop", "tools"]
OTHERS = shutil.ignore_patterns(".*", "docs", "out", "runs", "shared", "tests")
BLOCK = re.compile(r"(?ms)^(?:<!-- (short|fails): ([^\n]+) -->\n)?```(python|sh|diff)\n(.*?)^```$")
# note: ("short" or "fails" or "", words)
Block = namedtuple("Block", ["kind", "text", "note"])


def read(lesson):
    """Return (text, blocks) of the walk, then of each exercise."""
    parts = []
    for part in re.split(r"^(?=### )", lesson.read_text(encoding="utf-8"), flags=re.M):
        blocks = [Block(kind, text, note) for *note, kind, text in BLOCK.findall(part)]
        parts.append((part, blocks))
    return parts


def apply_change(diff, folder):
    """Apply --- FILE and the lines that begin with "-" (old), "+" (new) or a space (both)."""
    name, *lines = diff.splitlines()
    path = folder / name.removeprefix("--- ")
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def is_ours(module):
    return module.split(".")[0] in FILES + ROOMS


@contextmanager
def modules_of(folder):
    """Import our modules from this folder inside, and restore everything afterwards."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in filter(is_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(before)


def run_command(line, note):
    what, text = note
    words = [word for word in shlex.split(line, comments=True) if word != "-m"]
    assert words[0] == "python", line
    command = importlib.import_module(words[1].removesuffix(".py"))
    if what == "fails":
        with pytest.raises(importlib.import_module("common.errors").InputError, match=text):
            command.main(words[2:])
    else:
        command.main(words[2:] + text.split())


def run_blocks(blocks, namespace, lesson):
    for block in blocks:
        text = block.text
        if block.kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                run_command(line, block.note)
            continue
        if block.note[0]:
            old, new = block.note[1].split(" => ")
            assert old in text
            text = text.replace(old, new)
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, lesson.name, "exec"), namespace)
        assert printed.getvalue(), f"this snippet prints nothing:\n{text}"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Work in an empty folder that has weights/."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_runs_as_written(lesson, desk):
    (_, walk), *exercises = read(lesson)
    namespace = {"__name__": "lesson"}
    run_blocks(walk, namespace, lesson)
    for i, (text, blocks) in enumerate(exercises):
        changes = [block for block in blocks if block.kind == "diff"]
        first = blocks.index(changes[0]) if changes else len(blocks)
        before, after = blocks[:first], blocks[first + len(changes) :]
        run_blocks(before, namespace if CONTINUE in text else {}, lesson)
        if changes:
            copy = desk / f"exercise{i}"
            shutil.copytree(ROOT, copy, ignore=OTHERS)
            for change in changes:
                apply_change(change.text, copy)
            with modules_of(copy):
                run_blocks(after, {"__name__": "exercise"}, lesson)


@pytest.mark.parametrize("lesson", [*LESSONS, ANSWERS], ids=lambda lesson: lesson.stem)
def test_every_block_is_read_and_can_be_pasted_and_the_notebook_is_up_to_date(lesson):
    """Python 3.11 reads a paste line by line: a blank line must follow an indented block."""
    text = lesson.read_text(encoding="utf-8")
    blocks = [block for _, part in read(lesson) for block in part]
    assert text.count("```") == 2 * len(blocks)
    assert text.count("<!--") == len([block for block in blocks if block.note[0]])
    for block in blocks:
        waiting = []
        for line in [*block.text.splitlines(), ""] if block.kind == "python" else []:
            waiting.append(line)
            if codeop.compile_command("\n".join(waiting), lesson.name):
                waiting = []
        assert not waiting
    if lesson != ANSWERS:
        written = ROOT / "docs" / "notebooks" / f"{lesson.stem}.ipynb"
        written = json.loads(written.read_text(encoding="utf-8"))
        assert written == notebook(text), "run python -m tools.notebooks"


def test_the_best_guess_of_the_answers_is_the_one_that_the_docs_state(capsys):
    page = ANSWERS.read_text(encoding="utf-8")
    exec(BLOCK.search(page)[4], {})
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert "It prints {}, {}, {} and {}.".format(*scores.values()) in page
    percent = [f"{100 * float(score):.1f}" for score in scores.values()]
    stated = "{} in presence, {} in count, {} in attribute and {} in relation".format(*percent)
    assert stated in " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    row = "| {} | {} | | | {} | {} |".format(*percent)
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")
