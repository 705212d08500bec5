"""docs/lessons: every snippet and every command in them runs, every change in them applies, every name in them exists.

The text says how, so that what a student reads is what is tested:

    ```python                       one namespace a lesson; what follows a change has one of its own, and the changed files
    ```diff, first line --- FILE    the change of an exercise; its old lines must stand in FILE exactly once
    ```sh                           lines `python COMMAND.py --key=value`, all in one working directory a lesson
    <!-- short: --steps1=2 -->      before a block of commands: further flags in the tests
    <!-- short: 300 => 60 -->       before a snippet: what the tests put in the place of what
    <!-- fails: words -->           before a command: it ends with an error that has these words

Commands run in this process, as `train.main([...])`: starting Python and PyTorch twenty times would take longer than they do.
"""
import importlib
import re
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from conftest import ROOT

LESSONS = sorted((ROOT / "docs" / "lessons").glob("[0-9]*.md"))
MODULES = [path.stem for path in ROOT.glob("*.py")]
COMMANDS = ("train", "sample", "look", "eval")
BLOCK = re.compile(r"^(?:<!-- (short|fails): ([^\n]+) -->\n)?```(python|sh|diff)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    kind: str                                                        # python, sh or diff
    text: str
    note: tuple                                                      # ("short" or "fails", its words), (None, None) without
    line: int                                                        # of the lesson, counted from 0, where the text begins


def read(lesson):
    """-> [(heading, [Block, ...]), ...]: the walk first, then a part for each exercise."""
    text, parts = lesson.read_text(encoding="utf-8"), []
    starts = [0, *(found.start() for found in re.finditer(r"^### ", text, re.M)), len(text)]
    for start, stop in zip(starts, starts[1:]):
        blocks = [Block(found[3], found[4], (found[1], found[2]), text.count("\n", 0, found.start(4)))
                  for found in BLOCK.finditer(text, start, stop)]
        parts.append((text[start:stop].split("\n", 1)[0], blocks))
    return parts


def apply_change(diff, folder):
    """--- FILE, then lines that begin with "-" (old), "+" (new) or a space (both)."""
    name, *lines = diff.splitlines()
    path = folder / name.removeprefix("--- ")
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in sides) for sides in (" -", " +"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@contextmanager
def modules_of(folder):
    """Inside, `import llama` imports folder/llama.py; afterwards everything is as it was."""
    held = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(held)


def run_command(line, note):
    what, words = note
    python, file, *arguments = shlex.split(line, comments=True)
    assert python == "python" and file.removesuffix(".py") in COMMANDS, line
    module = importlib.import_module(file.removesuffix(".py"))
    if what != "fails":
        return module.main(arguments + (words.split() if words else []))
    with pytest.raises(importlib.import_module("hub").InputError) as error:
        module.main(arguments)
    assert words in str(error.value)


def run_blocks(blocks, namespace, lesson):
    for block in blocks:
        if block.kind == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                run_command(line, block.note)
        elif block.kind == "python":
            text = block.text
            if block.note[0]:
                old, new = block.note[1].split(" => ")
                assert old in text
                text = text.replace(old, new)
            exec(compile("\n" * block.line + text, lesson, "exec"), namespace)       # errors name the lesson's own line


def at_change(blocks):
    """An exercise's blocks -> those before its change, the change (perhaps in several parts), those that show what it does."""
    first = next((place for place, block in enumerate(blocks) if block.kind == "diff"), len(blocks))
    return blocks[:first], [block for block in blocks if block.kind == "diff"], [b for b in blocks[first:] if b.kind != "diff"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The working directory of a lesson: empty but for weights/. Ctrl-C, which a training run takes for itself, is given back."""
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path / "desk")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_runs_as_it_is_written(lesson, desk):
    (_, walk), *exercises = read(lesson)
    namespace = {"__name__": "lesson"}
    run_blocks(walk, namespace, str(lesson))
    for i, (_, blocks) in enumerate(exercises):
        before, changes, after = at_change(blocks)
        run_blocks(before, namespace, str(lesson))
        if changes:
            (copy := desk / f"exercise{i + 1}").mkdir()
            for path in ROOT.glob("*.py"):
                shutil.copy(path, copy)
            (copy / "weights").symlink_to(ROOT / "weights")
            for change in changes:
                apply_change(change.text, copy)
            with modules_of(copy):
                run_blocks(after, {"__name__": "exercise"}, str(lesson))


CHANGES = [pytest.param(lesson, blocks, id=f"{lesson.stem}-{heading[4:14]}") for lesson in LESSONS
           for heading, blocks in read(lesson) if at_change(blocks)[1]]


@pytest.mark.parametrize("lesson, blocks", CHANGES)
def test_what_an_exercise_shows_comes_from_its_change(lesson, blocks, desk):
    """Without the change its assertion fails, so it is the change that has the effect."""
    with pytest.raises(AssertionError):
        run_blocks(at_change(blocks)[2], {"__name__": "exercise"}, str(lesson))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_has_two_or_three_exercises_that_show_something(lesson):
    _, *exercises = read(lesson)
    assert 2 <= len(exercises) <= 3
    for heading, blocks in exercises:
        assert {"python", "sh"} & {block.kind for block in blocks}, heading


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_no_block_and_no_note_is_overlooked(lesson):
    text, blocks = lesson.read_text(encoding="utf-8"), [block for _, blocks in read(lesson) for block in blocks]
    assert len(blocks) == len(re.findall(r"^```\w", text, re.M)) and text.count("```") == 2 * len(blocks)
    assert len([block for block in blocks if block.note[0]]) == text.count("<!--")
    assert max(map(len, "\n".join(block.text for block in blocks).splitlines())) <= 130


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_names_in_a_lesson_exist(lesson):
    """`llama.Attention.forward` is that; a reference that is out of date fails here."""
    names = re.findall(r"`(\w+)((?:\.\w+)+)(?:\(\))?`", lesson.read_text(encoding="utf-8"))
    names = [(module, path[1:].split(".")) for module, path in names if module in MODULES and path != ".py"]
    assert names
    for module, path in names:
        found = importlib.import_module(module)
        for name in path:
            assert hasattr(found, name) or name in getattr(found, "__annotations__", {}), f"{module}.{'.'.join(path)}"
            found = getattr(found, name, None)


def test_the_index_lists_every_lesson_and_the_readme_the_index():
    index = (ROOT / "docs" / "lessons" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d[^)]*)\)", index) == [lesson.name for lesson in LESSONS] and len(LESSONS) >= 6
    assert "docs/lessons/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_lessons_walk_through_every_file_of_the_model():
    told = "".join(lesson.read_text(encoding="utf-8") for lesson in LESSONS)
    for name in ("vit", "dinov2", "clip", "llama", "connector", "mllm", "dialogue", "images", "data", "world", "train", "launch",
                 "checkpoint", "sample", "look", "eval"):
        assert f"`{name}.py`" in told, name


def test_the_best_guessers_scores_are_those_that_readme_and_answers_tell(capsys):
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/lessons/answers.md", "README.md"))
    (code,) = (text for _, _, kind, text in BLOCK.findall(page) if kind == "python")
    exec(code, {})
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(scores) == ["presence", "count", "attribute", "relation"]
    assert "It prints {}, {}, {} and {}.".format(*scores.values()) in page
    told = "reaches {:.1f} in presence, {:.1f} in count, {:.1f} in attribute and {:.1f} in relation".format(
        *(100 * float(score) for score in scores.values()))
    assert told in " ".join(readme.split())
