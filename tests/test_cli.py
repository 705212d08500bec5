"""cli.py: how flags, files and defaults become a configuration, and how an error reaches a person."""
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest
import torch

import cli
import eval as eval_command
import pretrain
import sample
import train
from cli import parse
from conftest import ROOT
from hub import InputError


@dataclass
class Recipe:
    picture: str = ""                    # what to look at
    # numbers
    steps: int = 10                      # how often
    lr: float = 1e-3                     # how fast
    # the rest
    names: list[str] = field(default_factory=lambda: ["world"])  # whom
    resume: bool = False                 # go on
    bf16: bool | None = None             # none: by the device


def test_flags_override_defaults_and_a_lone_flag_means_true():
    assert parse(Recipe, []) == Recipe()
    assert parse(Recipe, ["--steps=1_000", "--lr=5", "--resume", "--bf16=no", "--names=a,b"]) == \
        Recipe("", 1000, 5.0, ["a", "b"], True, False)
    assert parse(Recipe, ["--bf16"]).bf16 is True                    # also where it may be none
    assert parse(Recipe, ["--bf16=none", "--names=", "--steps=1", "--steps=2"]) == Recipe(steps=2, names=[])
    assert isinstance(parse(Recipe, ["--lr=5"]).lr, float)


def test_dashes_and_underscores_are_the_same():
    assert parse(train.Config, ["--image-dir=x"]).image_dir == parse(train.Config, ["--image_dir=x"]).image_dir == "x"


def test_a_value_may_hold_an_equals_sign_and_a_word_is_the_first_field():
    assert parse(Recipe, ["https://host/a.png?size=3", "--steps=3"]) == Recipe("https://host/a.png?size=3", 3)
    assert parse(Recipe, ["--picture=a=b"]).picture == "a=b"


def test_a_tilde_is_the_home_folder_which_a_shell_does_not_see_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(Recipe, ["--picture=~/a.png", "--names=~/b,rec:~/c.jsonl,d~/e,~"]) == Recipe(
        f"{tmp_path}/a.png", names=[f"{tmp_path}/b", f"rec:{tmp_path}/c.jsonl", "d~/e", "~"])


def test_flags_win_over_a_file_wherever_they_stand(tmp_path):
    recipe = tmp_path / "a.toml"
    recipe.write_text('steps = 7\nlr = 1\nnames = ["a", "b,c"]\nresume = true\nbf16 = false\npicture = "x"\n')
    assert parse(Recipe, [str(recipe)]) == Recipe("x", 7, 1.0, ["a", "b,c"], True, False)
    assert parse(Recipe, ["--steps=8", str(recipe), "--lr=2"]) == Recipe("x", 8, 2.0, ["a", "b,c"], True, False)


@pytest.mark.parametrize("arguments, message", {
    "an unknown key names the nearest": (["--step=3"], "--step: unknown option, the nearest is steps"),
    "even where nothing is near": (["--=3"], "unknown option, the nearest is"),
    "no dash": (["steps=3"], "steps=3: options begin with two dashes: --steps=3"),
    "one dash": (["-steps=3"], "-steps=3: options begin with two dashes"),
    "a word for a number": (["--steps=many"], "--steps: should be int, got 'many'"),
    "a fraction for a count": (["--steps=1.5"], "--steps: should be int, got '1.5'"),
    "a number for yes or no": (["--resume=2"], "--resume: should be bool, got '2'"),
    "a number without one": (["--lr="], "--lr: should be float, got ''"),
    "no value": (["--steps"], "--steps needs a value"),
    "a second word": (["a.png", "b.png"], "'b.png': options look like --key=value"),
    "no such file": (["missing.toml"], "missing.toml: no such file"),
}.values(), ids=lambda value: None)
def test_a_wrong_argument_is_one_line_that_says_what_to_do(arguments, message):
    with pytest.raises(InputError) as error:
        parse(Recipe, arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("stepz = 3", "stepz: unknown option, the nearest is steps"),
    ("steps = 1.5", "steps: should be int, got 1.5"),
    ("steps = true", "steps: should be int, got True"),
    ("picture = 3", "picture: should be str, got 3"),
    ("lr = [1]", "lr: should be float, got [1]"),
    ("names = 3", "names: should be a list, got 3"),
    ("names = true", "names: should be a list, got True"),
    ("[steps]\na = 1", "steps: should be int"),
    ("steps =", "not TOML"),
    ("steps = 3\nsteps = 4", "not TOML")])
def test_a_wrong_line_in_a_file_is_one_line_that_names_the_file(text, message, tmp_path):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(text)
    with pytest.raises(InputError) as error:
        parse(Recipe, [str(recipe)])
    assert str(recipe) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "picture.toml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match="picture.toml: not TOML"):
        parse(Recipe, [str(tmp_path / "picture.toml")])


@pytest.mark.parametrize("command", [train, sample, eval_command, pretrain], ids=lambda module: module.__name__)
def test_help_shows_every_field_with_its_default_and_its_comment(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert not stopped.value.code
    for option in fields(command.Config):
        line = next((line for line in shown.splitlines() if line.startswith(f"  --{option.name}=")), None)
        assert line and len(line.split(maxsplit=1)[1]) > 3, f"--{option.name} is not explained"
    assert parse(command.Config, []) == command.Config()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_read(path):
    config = parse(train.Config, [str(path)])
    assert config != train.Config() or path.stem == "tiny"


def test_tiny_toml_is_the_default():
    assert parse(train.Config, [str(ROOT / "config" / "tiny.toml")]) == train.Config()


def test_devices_are_found_or_refused_in_one_line():
    assert cli.pick_device("cpu") == torch.device("cpu")
    assert cli.pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="--device=abacus: cannot be used"):
        cli.pick_device("abacus")


def test_under_torchrun_every_process_asks_for_its_own_card(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")                           # no machine has it, so the error names it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda"):
        with pytest.raises(InputError, match="--device=cuda:99: cannot be used"):
            cli.pick_device(name)
    assert cli.pick_device("cpu") == torch.device("cpu")


def test_a_command_prints_an_error_as_one_line_and_exits_with_2(capsys):
    def refuse(arguments):
        raise InputError("two\n  lines")
    with pytest.raises(SystemExit) as stopped:
        cli.run(refuse)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize("raised, status", [(KeyboardInterrupt, 130), (BrokenPipeError, 0)])
def test_leaving_early_is_no_fault(raised, status):
    def leave(arguments):
        raise raised
    with pytest.raises(SystemExit) as stopped:
        cli.run(leave, keep=False)
    assert stopped.value.code == status


def test_what_the_system_refuses_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda arguments: (tmp_path / "file" / "run").mkdir(), keep=False)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and str(tmp_path / "file" / "run") in said and said.count("\n") == 1


@pytest.mark.parametrize("what, status", (("pass", 0), ("raise InputError('lost')", 2), ("sys.exit(143)", 143), ("sys.exit()", 0)))
@pytest.mark.parametrize("ranks", (1, 2))
def test_one_of_several_ranks_ends_without_taking_python_down(ranks, what, status):
    """What is registered for the end happens, what was printed arrives, and the status is the same."""
    code = f"""import atexit, sys, cli
from hub import InputError
class Alive:
    def __del__(self, write=sys.stderr.write):
        write("taken down")
alive = Alive()
atexit.register(print, "the end")
def main(arguments):
    print("said before")
    {what}
cli.run(main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"WORLD_SIZE": str(ranks)})
    assert (done.returncode, done.stdout) == (status, "said before\nthe end\n")
    assert done.stderr == "error: lost\n" * (status == 2) + "taken down" * (ranks == 1)


def test_a_bug_keeps_its_traceback():
    def broken(arguments):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        cli.run(broken, keep=False)


def test_the_command_itself_says_one_line_and_exits_with_2():
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--conector=comm"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --conector: unknown option, the nearest is connector (--help lists all)\n"


FAULTS = """
import resource, sys
import cli
if sys.argv[1] == "keep":
    cli.keep_freed_memory()
def step():
    b"x" * int(sys.argv[2])                                          # 50 MB: 12,000 pages of 4 KiB; freed at once
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """Blocks that go back to the system come again page by page."""
    faults = {}
    for how in ("keep", "as it is"):
        child = subprocess.run([sys.executable, "-c", FAULTS, how, "50_000_000"], cwd=ROOT, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        faults[how] = int(child.stdout)
    assert faults["keep"] < 20 < 100 < faults["as it is"], faults
