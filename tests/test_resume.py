"""A stopped or killed run continues bit for bit, and no run overwrites another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, records
from safetensors.torch import load_file

import train
from common import checkpoint
from common.distributed import Ranks
from common.errors import InputError
from common.run import Log, run_folder

LAST = "stage2-0000006"

pytestmark = pytest.mark.usefixtures("clean_run")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of that run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main(flags(out=folder))
    return folder


def run_process(arguments, before=""):
    """Run train.main in a process, after the statements `before`."""
    code = f"""
import os, signal, sys
import torch, train
from common import checkpoint, cli
from common.run import Log
torch.set_num_threads({torch.get_num_threads()})
sys.argv[1:] = {arguments!r}
{before}
cli.run(train.main)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def tensors(run="run"):
    """{file and name: bytes} of the tensors in the model and in the last checkpoint."""
    files = [Path(run) / "model" / "model.safetensors"]
    files += sorted((Path(run) / "checkpoints" / LAST).glob("*.safetensors"))
    found = {}
    for file in files:
        for name, tensor in load_file(file).items():
            found[file.name, name] = tensor.numpy().tobytes()
    return found


def checkpoints(run="run"):
    return sorted(path.name for path in Path(run).glob("checkpoints/*"))


def assert_equal_runs(run, whole):
    losses = []
    for folder in (run, whole):
        losses.append([(line["stage"], line["step"], line["loss"]) for line in records(folder)])
    assert losses[0] == losses[1]
    assert tensors(run) == tensors(whole)
    assert checkpoints(run) == ["stage1-0000002", LAST]


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
AFTER_STEP = """
write = Log.write
def act(self, record):
    write(self, record)
    if (record["stage"], record["step"]) == {step}:
        {action}
Log.write = act
"""
DURING_SAVE = """
replace = checkpoint.replace_folder
def die(partial, folder):
    if folder.name == "stage2-0000004":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, folder)
checkpoint.replace_folder = die
"""
BEFORE_DELETING = """
def die(path, **options):
    if not options:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.shutil.rmtree = die
"""
KILLS = [
    (AFTER_STEP.format(step=(2, 4), action=KILL), "stage1-0000002 stage2-0000004"),
    (DURING_SAVE, "stage1-0000002 stage2-0000002 stage2-0000004.partial"),
    (BEFORE_DELETING, "stage1-0000002 stage2-0000002 stage2-0000004"),
]


@pytest.mark.parametrize("before, left", KILLS, ids=range(3))
def test_a_killed_run_resumes_bit_for_bit(before, left, flags, whole):
    assert run_process(flags(), before).returncode == -signal.SIGKILL
    assert " ".join(checkpoints()) == left
    with open("run/log.jsonl", "a") as log:
        log.write('{"stage": 1, "st')  # the kill may cut a line
    train.main([*flags(workers=1), "--resume"])
    assert_equal_runs("run", whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(flags, whole):
    before = AFTER_STEP.format(step=(1, 0), action=KILL)
    assert run_process(flags(), before).returncode == -signal.SIGKILL
    shutil.copytree("run", "resumed")
    train.main([*flags(out="resumed"), "--resume"])
    assert_equal_runs("resumed", whole)
    log = Path("run/log.jsonl").read_text()
    train.main(flags())
    assert_equal_runs("run", whole)
    assert Path("run/log.jsonl.old").read_text() == log


def test_a_signal_saves_and_stops_and_a_second_one_stops_at_once(flags, whole):
    for step, number in (((1, 0), "SIGINT"), ((2, 2), "SIGTERM")):
        before = AFTER_STEP.format(step=step, action=KILL.replace("SIGKILL", number))
        assert run_process([*flags(), "--resume"], before).returncode == 0
        assert not Path("run/model").exists()
    train.main([*flags(), "--resume"])
    assert_equal_runs("run", whole)
    ranks = Ranks("cpu")
    os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.stop
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(flags, whole):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))"
    done = run_process(flags(), AFTER_STEP.format(step=(2, 2), action=full))
    assert done.returncode == 2 and done.stderr.startswith("error: run/checkpoints/stage2-0000004")
    assert done.stderr.count("\n") == 1 and "stage2-0000002" in checkpoints()
    train.main([*flags(), "--resume"])
    assert_equal_runs("run", whole)


def test_one_stage_after_the_other_is_both_at_once(flags, whole):
    train.main(flags(stage=1))
    train.main(flags(stage=2))
    assert_equal_runs("run", whole)
    train.main(flags(stage=2, out="named", init="run/checkpoints/stage1-0000002"))
    assert tensors("named") == tensors(whole)


def test_a_finished_run_is_never_overwritten(flags, whole):
    shutil.copytree(whole, "run")
    times = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    for options in ({}, {"stage": 1}, {"stage": 2}, {"stage": 2, "init": "new"}):
        with pytest.raises(InputError, match="run: "):
            train.main(flags(**options))
    with pytest.raises(InputError, match="run: "):
        train.main([*flags(stage=1), "--resume"])
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == times
    train.main([*flags(), "--resume"])
    assert_equal_runs("run", whole)


def test_two_processes_never_train_in_one_folder(flags):
    ranks = Ranks("cpu")
    ranks.enter(Path("run"))
    ranks.enter(Path("run"))  # its stage 2
    done = run_process(flags())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--out" in done.stderr
    assert [path.name for path in Path("run").iterdir()] == [".lock"]
    with ranks.guard(Path("run")):
        ranks.close()
    # A closed pipe does not end a run.
    before = "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)"
    assert run_process(flags(steps1=1, steps2=1), before).returncode == 0
    assert Path("run/model").exists()


def test_a_run_without_a_name_gets_a_free_folder_and_resume_finds_the_newest():
    def folder(**options):
        return str(run_folder(train.Config(connector="mlp", **options)))

    assert folder() == "out/mlp"
    with pytest.raises(InputError, match="--out"):
        folder(resume=True)
    for number, name in enumerate(["mlp", "mlp-2", "mlp-4", "mlp-other"]):
        Path("out", name).mkdir(parents=True)
        Path("out", name, "log.jsonl").touch()
        for path in (Path("out", name, "log.jsonl"), Path("out", name)):
            os.utime(path, (number, number))
    Path("out/mlp-5").mkdir()  # failed before its first step
    assert folder() == "out/mlp-3"
    assert folder(resume=True) == folder(stage=2) == "out/mlp-4"


def test_a_run_is_not_resumed_with_other_options_or_layers(flags, whole):
    shutil.copytree(whole, "run")
    for option in ("lr2=1", "connector=mlp", "batch2=2", "seed=1", "train2=llm"):
        with pytest.raises(InputError, match=f"--{option.partition('=')[0]}="):
            train.main([*flags(), f"--{option}", "--resume"])
    state = json.loads(Path("run/checkpoints", LAST, "state.json").read_text())
    state["connector"]["layers"] = [[0]]
    Path("run/checkpoints", LAST, "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=LAST):
        train.main([*flags(), "--resume"])


def test_a_checkpoint_that_does_not_fit_is_refused(flags, whole):
    start = whole / "checkpoints" / "stage1-0000002"
    shutil.copytree(start, "damaged")
    (file,) = Path("damaged").glob("*.safetensors")
    for content in (file.read_bytes()[:-100], b""):
        file.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            train.main(flags(stage=2, init="damaged"))
    # Stage 2 alone: the connector that stage 1 trained is not in its checkpoint.
    train.main(flags(steps1=1, steps2=1, train2="llm"))
    with pytest.raises(InputError, match="connector"):
        train.main(flags(stage=2, out="next", init="run/checkpoints/stage2-0000001"))


def test_other_files_next_to_the_checkpoints_are_kept(tiny_model):
    folder = Path("run/checkpoints")
    for name in ("stage1-0000001", "stage1-0000001-best", "stage2-0000001"):
        (folder / name).mkdir(parents=True)
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    checkpoint.save(folder / "stage1-0000002", tiny_model, optimizer, {"stage": 1, "step": 2})
    assert checkpoints() == ["stage1-0000001-best", "stage1-0000002", "stage2-0000001"]


def test_boards_get_the_numbers_of_the_log(monkeypatch):
    wandb, board = MagicMock(run=None), MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    record = {"stage": 1, "step": 3, "loss": float("nan"), "lr": 0.1, "gradient_norm": 1}
    record["tokens_per_second"] = 5
    Log(train.Config(log=["wandb", "tensorboard"]), Path(), True, 1, 0).write(record)
    assert json.loads(Path("log.jsonl").read_text())["loss"] is None
    assert wandb.init().log.call_args.args[0]["stage1/lr"] == 0.1
    board.SummaryWriter().add_scalar.assert_called_with("stage1/tokens_per_second", 5, 3)
