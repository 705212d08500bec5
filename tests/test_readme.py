"""Check README and docs: links, commands with their options, and line counts."""

import contextlib
import importlib
import io
import re
import shlex
from functools import cache

import pytest
from conftest import ROOT
from count import count

PAGES = [ROOT / "README.md", ROOT / "weights" / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands_of(text):
    """Yield (module, arguments) of each `python ...` and `torchrun ...` command."""
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).splitlines()
    for line in lines + re.findall(r"`((?:python|torchrun) [^`]+)`", text):
        words = shlex.split(line, comments=True)
        if words[:1] not in (["python"], ["torchrun"]):
            continue
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        name, *arguments = [word for word in words[start:] if word != "-m"]
        if name != "pytest" and not name.startswith("runs/"):
            yield name.removesuffix(".py"), arguments


@cache
def help_of(module):
    """Return what `python MODULE --help` prints."""
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    return out.getvalue()


@each_page
def test_commands_name_options_and_recipes_that_exist(page):
    for module, arguments in commands_of(page.read_text(encoding="utf-8")):
        for argument in arguments:
            if argument.startswith("--") and argument != "--help":
                assert re.search(rf"{argument.split('=')[0]}\b", help_of(module)), argument
            elif argument.endswith(".toml"):
                assert (ROOT / argument).is_file(), argument


@each_page
def test_links_and_file_names_resolve(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|sh))`", text):
        assert (ROOT / name).is_file(), name


def test_the_readme_has_the_set_up_commands_and_the_line_counts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^pip install -r requirements\.txt && (.*)$", text, re.M)
    assert commands == ["python train.py", "python -m pytest"]
    counts = dict(re.findall(r"`(\w+\.py)`\s\((\d+)(?:\slines)?\)", text))
    assert sorted(counts) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines in counts.items():
        assert abs(int(lines) - count(ROOT / name)[0]) <= 5, name
