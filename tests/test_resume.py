"""A stopped or killed run continues bit for bit, and no run overwrites another."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import in_process, records, refused
from safetensors.torch import load_file
from test_train import write_dialogues
from torch.utils.data import ConcatDataset

import train
from common import checkpoint
from common.run import Log, Ranks, fingerprint, run_folder
from data import LlavaData
from mllm import MLLM

LAST = "stage2-0000006"

pytestmark = pytest.mark.usefixtures("clean_run")


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of that run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main(flags(out=folder))
    return folder


def interrupted(arguments):
    """Train up to STOP, "what when": kill this process or fill its disk."""
    what, when = os.environ["STOP"].split(maxsplit=1)
    write, replace_folder, rmtree = Log.write, checkpoint.replace_folder, shutil.rmtree

    def act(now):
        if now == when and what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))
        elif now == when:
            os.kill(os.getpid(), getattr(signal, what))

    def write_then_act(log, record):
        write(log, record)
        act(f"{log.stage} {record['step']}")

    def act_then_replace(partial, folder):
        act(f"saving {folder.name}")
        replace_folder(partial, folder)

    def act_then_delete(path, **options):
        act(f"deleting {path.name}")
        rmtree(path, **options)

    Log.write = write_then_act
    checkpoint.replace_folder = act_then_replace
    checkpoint.shutil.rmtree = act_then_delete
    train.main(arguments)


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
    logs = []
    for folder in (run, whole):
        logs.append(records(folder))
        for line in logs[-1]:
            del line["seconds"], line["tokens_per_second"], line["seconds_per_step"]
    assert logs[0] == logs[1]
    assert tensors(run) == tensors(whole)
    assert checkpoints(run) == ["stage1-0000002", LAST]


# where a run is killed, and the checkpoints that it leaves
KILLS = {
    "1 0": "",
    "2 4": "stage1-0000002 stage2-0000004",
    "saving stage2-0000004": "stage1-0000002 stage2-0000002 stage2-0000004.partial",
    "deleting stage2-0000002": "stage1-0000002 stage2-0000002 stage2-0000004",
}


def stop(arguments, what, when):
    return in_process(interrupted, arguments, STOP=f"{what} {when}")


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_resumes_bit_for_bit(when, flags, whole):
    assert stop(flags(), "SIGKILL", when).returncode == -signal.SIGKILL
    assert " ".join(checkpoints()) == KILLS[when]
    with open("run/log.jsonl", "a", errors="surrogateescape") as log:
        log.write('{"stage": 1, "st\udcff')  # the kill may cut a line
    train.main([*flags(workers=1), "--resume"])
    assert_equal_runs("run", whole)


def test_a_signal_saves_and_stops_and_a_second_one_stops_at_once(flags, whole):
    for when, name in (("1 0", "SIGINT"), ("2 2", "SIGTERM")):
        assert stop([*flags(), "--resume"], name, when).returncode == 0
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
    done = stop(flags(), "full", "2 2")
    assert done.returncode == 2 and done.stderr.startswith("error: run/checkpoints/stage2-0000004")
    assert done.stderr.count("\n") == 1 and "stage2-0000002" in checkpoints()
    train.main([*flags(), "--resume"])
    assert_equal_runs("run", whole)


def test_one_stage_after_the_other_is_both_at_once(flags, whole):
    train.main(flags(stage=1))
    copy = Path("run/checkpoints/stage2-0000001-best")  # is kept
    copy.mkdir()
    train.main(flags(stage=2))
    copy.rmdir()
    assert_equal_runs("run", whole)


def test_a_finished_run_is_never_overwritten(flags, whole):
    shutil.copytree(whole, "run")
    times = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    for options in ({}, {"stage": 1}, {"stage": 2}, {"stage": 2, "init": "new"}):
        with refused("run: "):
            train.main(flags(**options))
    with refused("run: --stage=1 cannot be resumed"):
        train.main([*flags(stage=1), "--resume"])
    assert run_folder(train.Config(connector="mlp"), Ranks("cpu")) == Path("out/mlp")
    shutil.copytree("run/model", "out/mlp/model")
    with refused("out/mlp: "):
        run_folder(train.Config(connector="mlp"), Ranks("cpu"))
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == times
    train.main([*flags(), "--resume"])
    assert_equal_runs("run", whole)


def test_two_processes_never_train_in_one_folder(flags):
    Path("run").mkdir()
    code = "import fcntl as f; a = open('run/.lock', 'w'); f.lockf(a, f.LOCK_EX); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        with refused("another process"):
            train.main(flags())
        other.kill()


def test_a_run_is_not_resumed_with_other_options_data_or_layers(flags, whole, tiny_folders):
    shutil.copytree(whole, "run")
    for option in ("clip=2", "connector=mlp", "batch2=2", "train2=llm"):
        with refused(f"--{option.partition('=')[0]}="):
            train.main([*flags(), f"--{option}", "--resume"])
    # Moved folders and what only saves memory are no change. Copies of checkpoints are ignored.
    shutil.copytree(tiny_folders["llama"], "moved/llama")
    for name in (f"{LAST}-backup2", f"{LAST}.copy1", "stage2-9"):
        shutil.copytree(Path("run/checkpoints", LAST), Path("run/checkpoints", name))
    train.main([*flags(llm="moved/llama", activation_checkpointing=True), "--resume"])
    assert tensors() == tensors(whole)
    path = Path("run/checkpoints", LAST, "state.json")
    state = json.loads(path.read_text())
    wrong = [{"connector": {"name": "dense", "layers": [[0]]}}, {"data": 7}]
    for change in wrong:
        path.write_text(json.dumps(state | change))
        with refused(LAST):
            train.main([*flags(), "--resume"])


def test_the_fingerprint_of_data_changes_with_a_text_but_not_with_the_folder():
    paths = [write_dialogues(Path(name), 2) for name in ("a", "b", "c")]
    paths[2].write_text(paths[2].read_text().replace("yes", "yet"))
    values = [fingerprint(ConcatDataset([LlavaData(path)] * 2)) for path in paths]
    assert values[0] == values[1] != values[2]


def test_a_checkpoint_that_does_not_fit_is_refused(flags, whole):
    with refused("run: has no stage 1"):
        train.main(flags(stage=2))
    start = Path("run/checkpoints/stage1-0000002")
    shutil.copytree(whole / "checkpoints" / start.name, start)
    (file,) = start.glob("*.safetensors")
    content = file.read_bytes()
    for wrong in (content[:-1] + b"?", content[:-100], b""):
        file.write_bytes(wrong)
        with refused(start.name):
            train.main(flags(stage=2))
    file.write_bytes(content)
    # --init takes a model, not a checkpoint
    with refused("stage1"):
        train.main(flags(stage=2, out="next", init=start))


def test_batchnorm_continues_bit_for_bit_and_is_saved(flags):
    options = {"connector": "comm", "connector.merge": "conv"}
    train.main(flags(out="whole", **options))
    assert stop(flags(**options), "SIGKILL", "2 4").returncode == -signal.SIGKILL
    train.main([*flags(**options), "--resume"])
    assert_equal_runs("run", "whole")
    saved = load_file("run/model/model.safetensors")
    name = "connector.dino_merge.align.0.1.running_var"
    assert torch.equal(saved[name], MLLM.from_pretrained("run/model").state_dict()[name])
