"""train.py and checkpoint.py: stops of every kind, and going on after them, as if there had been none."""
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import torch

import checkpoint
import cli
import launch
import train
from hub import InputError
from test_train import (as_found, assert_as_uninterrupted, flags, in_a_process, losses, model_bytes,
                        records, uninterrupted)  # noqa: F401, the fixtures, too
from test_train_errors import refused


# --- stops, and going on ------------------------------------------------------------------------------------------------

KILLS = {
    "before the first save": ("write = train.Log.write\ndef die(self, record):\n    write(self, record)\n"
                              "    if record['stage'] == 1: os.kill(os.getpid(), signal.SIGKILL)\ntrain.Log.write = die", []),
    "between two saves": ("write = train.Log.write\ndef die(self, record):\n    write(self, record)\n"
                          "    if (record['stage'], record['step']) == (2, 4): os.kill(os.getpid(), signal.SIGKILL)\ntrain.Log.write = die",
                          ["stage1-0000002", "stage2-0000004"]),
    "during a save": ("save, files = checkpoint.save_safetensors, []\ndef die(tensors, path):\n    save(tensors, path)\n"
                      "    files.append(path)\n    if len(files) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
                      "checkpoint.save_safetensors = die",               # two files a save: the first of stage 2's second save
                      ["stage1-0000002", "stage2-0000002", "stage2-0000004.partial"]),
    "before the former checkpoint is gone": ("checkpoint.shutil.rmtree = lambda path, **options: None if options else "
                                             "os.kill(os.getpid(), signal.SIGKILL)",
                                             ["stage1-0000002", "stage2-0000002", "stage2-0000004"])}


@pytest.mark.parametrize("before, left", KILLS.values(), ids=KILLS)
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(before, left, flags, uninterrupted):
    done = in_a_process(flags(), before)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = Path("run/checkpoints")
    assert sorted(path.name for path in (found.iterdir() if found.exists() else ())) == left
    assert not Path("run/model").exists()
    if Path("run/log.jsonl").exists():
        with open("run/log.jsonl", "a") as log:
            log.write('{"stage": 1, "st')                            # a kill while a line is written
    train.main([*flags(), "--resume"])
    assert_as_uninterrupted(uninterrupted)
    steps = [(record["stage"], record["step"]) for record in records()]
    assert steps == [(record["stage"], record["step"]) for record in records(uninterrupted)]     # each once, in order
    assert sorted(path.name for path in found.iterdir()) == ["stage1-0000002", "stage2-0000006"]      # nothing half written is left


def test_two_runs_at_once_do_not_share_a_folder(flags, uninterrupted):
    """The second says so and touches nothing; it may go on once the first has ended, also where that was killed and left a
    worker of its loader behind."""
    begun = launch.Ranks("cpu")
    begun.enter(Path("run"))
    begun.enter(Path("run"))                                         # its second stage
    assert sorted(path.name for path in Path("run").iterdir()) == [".lock"]
    child = os.fork()                                                # as a loader's worker is
    if not child:
        time.sleep(600)
    try:
        done = in_a_process(flags(), "")
        assert done.stderr.endswith("InputError: run: another process trains in this folder; --out= chooses another one\n")
        assert [path.name for path in Path("run").iterdir()] == [".lock"]
        begun.lock.close()
        train.main(flags())
        assert_as_uninterrupted(uninterrupted)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_run_begun_again_after_a_kill_before_its_first_checkpoint_has_a_log_of_its_own(flags, uninterrupted):
    assert in_a_process(flags(), KILLS["before the first save"][0]).returncode == -signal.SIGKILL
    assert len(records()) == 1
    train.main(flags())
    assert [(record["stage"], record["step"]) for record in records()] == [
        (record["stage"], record["step"]) for record in records(uninterrupted)]
    assert_as_uninterrupted(uninterrupted)
    assert Path("run/log.jsonl.old").exists()                        # and nothing is lost


def test_resume_passes_over_a_newer_run_that_failed_before_its_first_step(flags):
    unnamed = [flag for flag in flags(stage=1, steps1=1) if not flag.startswith("--out")]
    train.main(unnamed)
    shutil.rmtree("out/dense/model")
    with pytest.raises(InputError, match="--log=paper"):
        train.main([*unnamed, "--log=paper"])
    assert Path("out/dense-2").exists()
    train.main([*unnamed, "--resume"])
    assert Path("out/dense/model").exists() and not Path("out/dense-2/model").exists()


def test_a_reader_that_goes_away_does_not_end_the_run(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError
    monkeypatch.setattr(sys, "stdout", Gone())
    launch.say(True, "a line")
    launch.say(True, "another")
    assert not isinstance(sys.stdout, Gone)


def test_a_killed_worker_is_one_line(tmp_path):
    ranks = launch.Ranks("cpu")
    with pytest.raises(InputError, match=r"rank 0: lost a loader's worker \(DataLoader worker .* Killed.\) in the start; there is no checkpoint yet: start again"):
        with ranks.in_contact(tmp_path):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="a bug"):                 # a bug there keeps its traceback
        with ranks.in_contact(tmp_path):
            raise RuntimeError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback: a bug")


def test_what_a_person_put_beside_the_checkpoints_stays(flags):
    train.main(flags(stage=1, steps1=1))
    shutil.copytree("run/checkpoints/stage1-0000001", "run/checkpoints/stage1-0000001-best")
    Path("run/checkpoints/stage1-notes.txt").touch()
    shutil.rmtree("run/model")
    os.rename("run/checkpoints/stage1-0000001", "run/checkpoints/stage1-0000000")
    model = train.build_model(cli.parse(train.Config, flags(stage=1)), "cpu")
    checkpoint.save(Path("run/checkpoints/stage1-0000002"), model, torch.optim.AdamW(model.parameters()), {"stage": 1, "step": 2})
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["stage1-0000001-best", "stage1-0000002", "stage1-notes.txt"]


def test_a_signal_after_the_last_step_ends_the_closing_evaluation(flags, monkeypatch):
    import eval as scores
    monkeypatch.setattr(scores, "evaluate", lambda *args, **options: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags(steps1=1, steps2=1), "--evaluate=true", "--data2=world"])
    assert Path("run/model").exists()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
@pytest.mark.parametrize("at", [(1, 0), (1, 1), (2, 2)])
def test_a_signal_saves_and_stops_and_resume_completes_the_run(number, at, flags, uninterrupted, monkeypatch, capsys):
    write = train.Log.write
    def interrupt(self, record):
        write(self, record)
        if (record["stage"], record["step"]) == at:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", interrupt)
        train.main(flags())
    printed = capsys.readouterr().out
    if at == (1, 1):                                                 # after stage 1's last step: stage 2 stops at its first
        at = (2, -1)
    assert f"stopped at step {at[1] + 2} of stage {at[0]}, saved; go on with --resume" in printed
    assert Path(f"run/checkpoints/stage{at[0]}-{at[1] + 2:07d}").exists() and not Path("run/model").exists()
    train.main([*flags(), "--resume"])
    assert f"resumed from run/checkpoints/stage{at[0]}-{at[1] + 2:07d} at step {at[1] + 2}" in capsys.readouterr().out
    assert_as_uninterrupted(uninterrupted)


def test_a_second_signal_stops_at_once(flags, monkeypatch):
    ranks = train.Ranks("cpu")
    os.kill(os.getpid(), signal.SIGTERM)
    assert ranks.stop
    with pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):                                        # a handler runs between two instructions
            pass
    assert stopped.value.code == 128 + signal.SIGTERM


def test_one_stage_after_the_other_is_both_in_a_row(flags, uninterrupted):
    train.main(flags(stage=1))
    connector_only = model_bytes()
    train.main(flags(stage=2))
    assert_as_uninterrupted(uninterrupted)
    assert connector_only != model_bytes()


def test_stage_2_starts_from_the_checkpoint_that_is_named(flags, uninterrupted):
    train.main(flags(stage=2, init=uninterrupted / "checkpoints" / "stage1-0000002"))
    theirs = {key: loss for key, loss in losses(uninterrupted).items() if key[0] == 2}
    assert losses() == theirs and model_bytes() == model_bytes(uninterrupted)


def test_a_finished_run_resumed_is_left_as_it_is(flags, uninterrupted, capsys):
    shutil.copytree(uninterrupted, "run")
    train.main([*flags(), "--resume"])
    assert_as_uninterrupted(uninterrupted)
    assert len(records()) == len(records(uninterrupted))
    train.main([*flags(stage=2), "--resume"])
    assert_as_uninterrupted(uninterrupted)


def test_stage_1_resumed_does_not_write_over_the_model_of_stage_2(flags, uninterrupted):
    shutil.copytree(uninterrupted, "run")
    with pytest.raises(InputError, match="run: holds a run of stage 2 already; leave out --stage=1 to go on with it"):
        train.main([*flags(stage=1), "--resume"])
    assert_as_uninterrupted(uninterrupted)


def test_a_run_takes_the_next_free_name_and_resume_the_newest(flags):
    def unnamed(**options):
        return [flag for flag in flags(steps1=1, steps2=1, connector="mlp", **options) if not flag.startswith("--out")]
    train.main(unnamed(stage=1))
    train.main(unnamed(stage=2))                                     # goes on in out/mlp
    assert [path.name for path in Path("out").iterdir()] == ["mlp"] and len(records("out/mlp")) == 2
    train.main(unnamed())
    assert sorted(path.name for path in Path("out").iterdir()) == ["mlp", "mlp-2"]
    before = {path: path.stat().st_mtime_ns for path in Path("out/mlp").rglob("*")}
    shutil.rmtree("out/mlp-2/model")
    train.main([*unnamed(), "--resume"])
    assert Path("out/mlp-2/model").exists()
    assert before == {path: path.stat().st_mtime_ns for path in Path("out/mlp").rglob("*")}


def test_a_run_without_a_name_goes_on_with_the_one_that_wrote_last(flags):
    def unnamed(**options):
        return [flag for flag in flags(stage=1, steps1=1, connector="mlp", **options) if not flag.startswith("--out")]
    train.main(unnamed())
    train.main(unnamed())
    shutil.rmtree("out/mlp")                                         # a gap in the numbers
    train.main(unnamed())
    os.utime("out/mlp/log.jsonl", (0, 0)), os.utime("out/mlp/checkpoints", (0, 0)), os.utime("out/mlp", (0, 0))
    train.main([flag for flag in flags(stage=2, steps2=1, connector="mlp") if not flag.startswith("--out")])
    assert [path.parts[1] for path in Path("out").glob("*/checkpoints/stage2-*")] == ["mlp-2"]


@pytest.mark.parametrize("again", [{}, {"stage": 1}, {"stage": 2}, {"stage": 2, "init": "new"}], ids=str)
def test_a_finished_run_is_never_written_over(again, flags, uninterrupted):
    shutil.copytree(uninterrupted, "run")
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    with pytest.raises(InputError, match="run: holds a run of stage .* already; --resume goes on with it, another --out"):
        train.main(flags(**again))
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


def test_a_finished_run_without_a_name_is_not_written_over_either(flags):
    def unnamed(**options):
        return [flag for flag in flags(steps1=1, steps2=1, connector="mlp", **options) if not flag.startswith("--out")]
    train.main(unnamed())
    before = model_bytes("out/mlp")
    with pytest.raises(InputError, match="holds a run of stage 2 already"):
        train.main(unnamed(stage=2, lr2=1))
    assert model_bytes("out/mlp") == before


def test_a_run_of_stage_2_alone_is_not_written_over_by_both(flags):
    train.main(flags(stage=2, init="new", steps2=1))
    before = model_bytes()
    with pytest.raises(InputError, match="holds a run of stage 2 already"):
        train.main(flags())
    assert model_bytes() == before


@pytest.mark.parametrize("option, shown", [("lr2=1e-5", "--lr2=0.002, not 1e-05"), ("connector=mlp", "--connector=dense, not mlp"),
                                           ("batch2=2", "--batch2=4, not 2"), ("seed=1", "--seed=0, not 1"),
                                           ("train2=llm", "--train2=['connector', 'llm'], not ['llm']")])
def test_a_run_is_not_resumed_with_other_options(option, shown, flags, uninterrupted):
    shutil.copytree(uninterrupted, "run")
    for stage in ({}, {"stage": 2}):
        with pytest.raises(InputError, match="run/checkpoints/stage.*: was trained with") as error:
            train.main([*flags(**stage), f"--{option}", "--resume"])
        assert shown in str(error.value)
    assert_as_uninterrupted(uninterrupted)


def test_options_that_change_no_result_may_change_on_resume(flags, uninterrupted):
    done = in_a_process(flags(), KILLS["between two saves"][0])
    assert done.returncode == -signal.SIGKILL
    os.rename("run", "moved")
    train.main([*flags(out="moved", workers=1, log_every=2, save_every=50), "--resume"])
    assert model_bytes("moved") == model_bytes(uninterrupted)


def test_another_models_checkpoint_does_not_load(flags, uninterrupted):
    message = refused(flags(stage=2, connector="linear", init=uninterrupted / "checkpoints" / "stage1-0000002"))
    assert "stage1-0000002: tensor connector.mm_projector.0.bias does not fit: this is the checkpoint of another model" in message
    message = refused(flags(stage=2, connector="mlp", init=uninterrupted / "checkpoints" / "stage1-0000002"))
    assert "tensor connector.mm_projector.0.weight has shape (32, 96), the model's (32, 32)" in message
