"""The command line: flags, recipes, help, and how a command ends."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from conftest import refused

import eval as eval_command
import sample
import train
from common import cli
from common.cli import option, parse


@dataclass
class Recipe:
    image: str = option("", "what to look at", section="input")
    steps: int = option(10, "optimizer steps, 100%")
    lr: float = option(1e-3, "learning rate", section="training")
    names: list[str] = option(["world"], "data files")
    resume: bool = option(False, "continue")
    bf16: bool | None = option(None, "default: by the device")
    connector_options: dict = option({}, "of the connector")


def test_flags_set_fields_of_every_type(monkeypatch, tmp_path):
    flags = ["--steps=1_000", "--lr=5", "--resume", "--bf16=False", "--names=a,b"]
    assert parse(Recipe, flags) == Recipe("", 1000, 5.0, ["a", "b"], True, False)
    flags = ["--bf16=none", "--names=", "--steps=1", "--steps=2"]
    assert parse(Recipe, flags) == Recipe(steps=2, names=[])
    assert parse(Recipe, ["https://host/a.png?b=3", "--resume"]).image == "https://host/a.png?b=3"
    flags = ["--connector.groups=3", "--connector.dino-depth=1", "--connector.wide"]
    options = {"groups": "3", "dino_depth": "1", "wide": "true"}
    assert parse(Recipe, flags).connector_options == options
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse(Recipe, ["--image=~/a.png", "--names=~/b,d~/e"])
    assert (recipe.image, recipe.names) == (f"{tmp_path}/a.png", [f"{tmp_path}/b", "d~/e"])


def test_flags_override_a_recipe_in_any_order(tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text(
        'steps = 7\nlr = 1\nnames = ["a", "b"]\nresume = true\nbf16 = false\n'
        '"connector.depth" = 2\n"connector.groups" = 3\n"connector.layers" = [0, 2]\n'
    )
    options = {"depth": "2", "groups": "3", "layers": "0,2"}
    expected = Recipe("", 8, 1.0, ["a", "b"], True, False, options | {"groups": "4"})
    assert parse(Recipe, ["--steps=8", str(file), "--connector.groups=4"]) == expected
    with pytest.raises(SystemExit):
        parse(Recipe, [str(file), "--help"])
    assert "--steps=7 " in capsys.readouterr().out


def test_a_wrong_option_is_an_error_that_names_it(tmp_path):
    wrong = "--step=3 --=3 --conector.groups=3 --connector_options=3 -steps=3 --steps"
    wrong = (wrong + " --steps=many --steps=1.5 --resume=2 --lr= missing.toml").split()
    recipes = ["stepz = 3", "steps = 1.5", "steps = true", "lr = [1, 2]", "steps =", "[a]\nb = 1"]
    for i, text in enumerate([*recipes, "\x89PNG\xff"]):
        wrong.append(str(tmp_path / f"{i}.toml"))
        Path(wrong[-1]).write_text(text, encoding="latin1")
    for argument in wrong:
        with refused() as error:
            parse(Recipe, [argument])
        assert argument.partition("=")[0] in str(error.value), argument


def test_help_lists_every_field(capsys):
    for cls in (Recipe, train.Config, sample.Config, eval_command.Config):
        with pytest.raises(SystemExit) as stopped:
            parse(cls, ["--help"], "About")
        printed = capsys.readouterr().out
        assert not stopped.value.code and printed.startswith("About")
        for field in fields(cls):
            name = field.name.replace("_options", ".KEY")
            (line,) = [x for x in printed.splitlines() if x.startswith(f"  --{name}=")]
            assert field.metadata["help"] in line and field.metadata["help"]


def test_a_command_ends_with_a_status_and_at_most_one_line(capsys):
    def end_with(error):
        raise error

    out_of_memory = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
    endings = [
        (lambda: None, 0, 0),
        (lambda: parse(Recipe, ["--lr=\n\n"]), 2, 1),
        (lambda: open("/missing/file"), 2, 1),
        (lambda: sys.exit(143), 143, 0),
        (lambda: end_with(KeyboardInterrupt), 130, 0),
        (lambda: end_with(BrokenPipeError), 0, 0),
        (lambda: end_with(out_of_memory), 2, 1),
    ]
    for end, status, lines in endings:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda arguments, end=end: end())
        assert (stopped.value.code, capsys.readouterr().err.count("\n")) == (status, lines)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.run(lambda arguments: 1 / 0)


def test_an_option_of_a_class_has_the_type_of_its_annotation_or_of_its_default():
    class Blend:
        def __init__(self, towers, ratio=0.5, depth: int | None = None):
            pass

    options = cli.parse_options({"blend": Blend}, "blend", {"ratio": "0.25"}, "--connector")
    assert options == {"ratio": 0.25, "depth": None}
