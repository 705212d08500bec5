"""train.py and checkpoint.py: the loss, who learns, stops of every kind and going on after them, ranks, and bad input.

Runs are real ones, in process, on random checkpoints a few thousand parameters large; only what has to die does so in a
process of its own. Losses "the same" are compared bit for bit where the arithmetic is the same, and else within SAME.
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import cli
import train
from conftest import ROOT
from connector import ConnectorConfig
from data import Loader
from dialogue import IGNORE, encode
from dinov2 import DINOv2, DINOv2Config
from hub import InputError
from mllm import MLLM

SAME = 1e-5          # other micro-batches or ranks sum the same float32 numbers in another order: about 1e-7 a step, growing


@pytest.fixture(autouse=True)
def as_found(monkeypatch, tmp_path):
    """Every run starts in an empty working directory, and leaves the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def flags(tiny_folders):
    """flags(out=..., ...) -> the command line of a short run on the embedded world."""
    def flags(**options):
        comm = options.get("connector") == "comm"
        defaults = dict(vision=f"{tiny_folders['clip']}" + (f",{tiny_folders['dinov2']}" if comm else ""), llm=tiny_folders["llama"],
                        connector="dense", batch1=4, batch2=4, micro_batch=4, steps1=2, steps2=6, save_every=2, log_every=1,
                        evaluate="false", device="cpu", out="run")
        return [f"--{key}={value}" for key, value in (defaults | options).items()]
    return flags


def records(run="run"):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def losses(run="run"):
    """{(stage, step): loss}; steps that were done again after a stop must have given the same loss again."""
    found = {}
    for record in records(run):
        assert found.setdefault((record["stage"], record["step"]), record["loss"]) == record["loss"]
    return found


def weights(run="run"):
    return load_file(Path(run) / "model" / "model.safetensors")


def model_bytes(run="run"):
    return (Path(run) / "model" / "model.safetensors").read_bytes()


def changed(before, after):
    """Names of the tensors that differ in any bit."""
    assert sorted(before) == sorted(after)
    return {name for name in before if not torch.equal(before[name], after[name])}


def near(ours, theirs):
    assert list(ours) == list(theirs)
    return max(abs(ours[key] - theirs[key]) / theirs[key] for key in ours) < SAME


def in_a_process(arguments, before=""):
    """`train.main(arguments)` in a process of its own, after the statements `before`, with as many threads as here."""
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\nimport os, signal, train, checkpoint\n{before}\n"
    code += f"train.main({arguments!r})"
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def dialogues(folder, samples, name="data.json"):
    """LLaVA's JSON in `folder`. samples: (picture file or None, turns of (question, answer))."""
    entries = []
    for i, (picture, turns) in enumerate(samples):
        messages = [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)]
        entries.append({"id": f"s{i}", "conversations": messages} | ({"image": picture} if picture else {}))
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def pictures(folder, count):
    """Files of random colours."""
    for i in range(count):
        Image.new("RGB", (40 + i, 50), tuple(np.random.default_rng(i).integers(0, 255, 3).tolist())).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def ragged(folder, count=14):
    """Dialogues with a picture and with text only, with one to six turns and answers of one word to nine."""
    samples = []
    for i, picture in enumerate(pictures(folder, count)):
        turns = [("<image>\nWhat is this?" if i % 2 else "What is this?", " ".join(["red circle square"] * (i % 4)) or "yes")]
        samples.append((picture if i % 2 else None, turns + [("And now?", "small blue cross")] * (i % 6)))
    return dialogues(folder, samples)


# --- the loss ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", (1, 2))
def test_loss_is_the_sum_over_supervised_tokens_divided_by_their_number(stage, flags, tmp_path):
    """Again slowly: every sample of the first global batch alone, all its logits, in float64; means of means would differ."""
    data = ragged(tmp_path)
    arguments = flags(stage=stage, data1=data, data2=data, template1="tiny", batch1=7, batch2=7, micro_batch=3, steps1=1, steps2=1)
    arguments += ["--init=new"] if stage == 2 else []
    train.main(arguments)
    config = cli.parse(train.Config, arguments)
    model, dataset = train.build_model(config, torch.device("cpu")), train.build_data(config, stage)
    loader = Loader(dataset, model.tokenizer, "tiny", model.spec, model.tokens_per_image, 2048, 7, 1, config.seed + stage)
    total, number, of_each = 0.0, 0, []
    for batch in next(iter(loader)):
        with torch.no_grad():
            scores = model.llm(embeds=model.embed(batch.tokens, batch.pixels))[0].double().log_softmax(-1)
        terms = [-scores[place, label].item() for place, label in enumerate(batch.labels[0, 1:]) if label != IGNORE]
        total, number, of_each = total + sum(terms), number + len(terms), [*of_each, sum(terms) / len(terms)]
    record, = records()
    assert record["supervised"] == number
    assert record["loss"] == pytest.approx(total / number, rel=SAME)
    assert abs(np.mean(of_each) - total / number) > 10 * SAME * record["loss"]      # so the test can tell them apart


def test_micro_batches_change_nothing(flags, tmp_path):
    data = ragged(tmp_path)
    for size in (8, 2, 3):
        train.main(flags(out=f"by{size}", data2=data, batch1=8, batch2=8, micro_batch=size, lr1=1e-3, lr2=1e-3))
    assert near(losses("by2"), losses("by8")) and near(losses("by3"), losses("by8"))
    counted = [[(record["supervised"], record["tokens"]) for record in records(run)] for run in ("by2", "by3", "by8")]
    assert counted[0] == counted[1] == counted[2]


def test_workers_change_nothing(flags, tmp_path):
    data = ragged(tmp_path)
    train.main(flags(out="inline", data1=data, data2=data))
    train.main(flags(out="workers", data1=data, data2=data, workers=2))
    assert losses("inline") == losses("workers") and model_bytes("inline") == model_bytes("workers")


# --- several processes --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_ranks(tiny_folders, tmp_path_factory):
    """The same run by one process and by two. Its data are ragged; in stage 1 some global batches, and some ranks of others,
    hold no picture at all, while the connector is all that learns. -> (log of one, log of two, their standard output)."""
    folder = tmp_path_factory.mktemp("ranks")
    data = ragged(folder)
    arguments = [f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", f"--data1={data}", f"--data2={data}",
                 "--template1=tiny", "--batch1=4", "--batch2=6", "--micro_batch=2", "--steps1=8", "--steps2=6", "--log_every=1",
                 "--lr1=1e-3", "--lr2=1e-3", "--evaluate=false", "--device=cpu"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([*arguments, f"--out={folder / 'one'}"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    launched = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
                               "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), *arguments, f"--out={folder / 'two'}"],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert launched.returncode == 0, launched.stderr
    return folder / "one", folder / "two", launched.stdout


def test_two_processes_give_the_losses_of_one(two_ranks):
    one, two, _ = two_ranks
    assert len(losses(one)) == 14 and near(losses(two), losses(one))
    assert [record["supervised"] for record in records(two)] == [record["supervised"] for record in records(one)]
    assert max(record["supervised"] for record in records(one)) > 2 * min(record["supervised"] for record in records(one))
    for name, tensor in weights(two).items():                        # Adam turns the last bit of a gradient near zero into
        assert (tensor - weights(one)[name]).abs().max() < 2e-4, name    # a step of up to lr = 1e-3, in either direction


def test_two_processes_share_batches_that_hold_only_text(two_ranks, tmp_path):
    """That such batches were among them: the loader's own, here once more."""
    one, two, _ = two_ranks
    config = json.loads((one / "checkpoints" / "stage1-0000008" / "state.json").read_text())["config"]
    config = train.Config(**config)
    model, dataset = train.build_model(config, torch.device("cpu")), train.build_data(config, 1)
    def with_pictures(rank, size):
        loader = iter(Loader(dataset, model.tokenizer, "tiny", model.spec, 16, 2048, 4, 2, config.seed + 1, rank, size))
        return [any(len(batch.pixels) for batch in next(loader)) for _ in range(8)]
    assert not all(with_pictures(0, 1))                              # a step without any picture
    assert with_pictures(0, 2) != with_pictures(1, 2)                # a step in which one rank had some, the other none


def test_only_one_of_two_processes_writes_and_speaks(two_ranks):
    one, two, printed = two_ranks
    assert printed.count("stage 1: vision") == 1 and printed.count("wrote ") == 1
    assert "float32 on 2 x cpu" in printed and len(records(two)) == 14


# --- who learns -------------------------------------------------------------------------------------------------------

def test_stage_1_moves_the_connector_and_not_a_bit_of_anything_else(flags):
    arguments = flags(stage=1, lr1=1e-2)
    start = train.build_model(cli.parse(train.Config, arguments), torch.device("cpu")).state_dict()
    train.main(arguments)
    moved = changed(start, weights())
    assert moved == {name for name in start if name.startswith("connector.")}
    assert {name for name in load_file("run/checkpoints/stage1-0000002/trained.safetensors")} == moved


def test_stage_2_moves_connector_and_llm_and_leaves_the_towers(flags):
    arguments = flags(stage=2, init="new", steps2=3, lr2=1e-2)
    start = train.build_model(cli.parse(train.Config, arguments), torch.device("cpu")).state_dict()
    train.main(arguments)
    moved = changed(start, weights())
    assert moved == {name for name in start if name.startswith(("connector.", "llm."))}


@pytest.mark.parametrize("connector, read", [("mlp", {"vision.0": 5}), ("dense", {"vision.0": 5}),
                                             ("comm", {"vision.0": 6, "vision.1": 5})])
def test_towers_that_are_trained_move_as_deep_as_they_are_read(connector, read, flags, capsys):
    arguments = flags(connector=connector, stage=2, init="new", steps2=2, lr2=1e-2, train2="vision,connector,llm")
    start = train.build_model(cli.parse(train.Config, arguments), torch.device("cpu")).state_dict()
    train.main(arguments)
    moved = changed(start, weights())
    for name in start:
        tower = name[:len("vision.0")]
        if tower in read:
            part = name.removeprefix(f"{tower}.")
            is_read = not part.startswith(("norm.", "norm_post.", "mask_token")) and not any(
                part.startswith(f"blocks.{depth}.") for depth in range(read[tower], 6))
            # a bias on all keys alike changes no attention: its gradient is zero but for rounding
            assert (name in moved) == is_read or part.endswith("attn.k.bias"), name
        else:
            assert name in moved
    assert "vision" in capsys.readouterr().out


@pytest.mark.parametrize("tower", ("clip", "siglip", "dinov2", "registers", "vit", "deit", "mae"))
def test_whatever_is_said_to_be_trained_gets_a_gradient(tower, world_tokenizer):
    """Or DDP would wait for it for ever. With every kind of tower, and a connector that reads all but the last block."""
    from images import ImageSpec
    from llama import Llama, LlamaConfig
    from test_mllm import HEADS, MAKE
    llm = Llama(LlamaConfig(vocab_size=world_tokenizer.get_vocab_size(), intermediate_size=64, num_hidden_layers=1, **HEADS))
    model = MLLM([MAKE[tower]()], llm, ConnectorConfig("dense"), world_tokenizer, "tiny", ImageSpec(64))
    trained = train.choose_trained(model, ["vision", "connector", "llm"])
    tokens = torch.tensor([[2, *[-200] * model.tokens_per_image, 5, 6]])
    model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), tokens, tokens.clamp(min=0))[0].backward()
    assert all(p.grad is not None for part in trained.values() for p in part)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert len(trained["vision"]) > 20


def test_the_connector_has_a_learning_rate_of_its_own_in_stage_2(flags):
    train.main(flags(stage=1))
    shutil.copytree("run", "only_connector"), shutil.copytree("run", "only_llm")
    base = weights()
    train.main(flags(out="only_connector", stage=2, lr2=0, connector_lr2=1e-2))
    moved = changed(base, weights("only_connector"))
    assert moved == {name for name in base if name.startswith("connector.")}
    train.main(flags(out="only_llm", stage=2, lr2=1e-2, connector_lr2=1e-30))
    assert {name for name in changed(base, weights("only_llm"))} == {name for name in base if name.startswith("llm.")}


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine(flags):
    assert [train.learning_rate(step, 100, 0.04) for step in (0, 1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert train.learning_rate(52, 100, 0.04) == pytest.approx(0.5)
    assert train.learning_rate(28, 100, 0.04) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert train.learning_rate(99, 100, 0.04) == pytest.approx((1 - math.cos(math.pi / 96)) / 2)
    assert train.learning_rate(0, 1, 0.03) == train.learning_rate(0, 100, 0) == 1.0
    factors = [train.learning_rate(step, 1000, 0.03) for step in range(1000)]
    assert max(factors) == factors[29] == 1.0 and factors[30:] == sorted(factors[30:], reverse=True) and min(factors) > 0
    train.main(flags(stage=1, steps1=8, lr1=0.5, warmup=0.25))
    assert [record["lr"] for record in records()] == [pytest.approx(0.5 * train.learning_rate(step, 8, 0.25)) for step in range(8)]


def test_the_peak_of_each_stage_is_its_own(flags):
    train.main(flags(steps1=2, steps2=2, lr1=0.01, lr2=0.002, warmup=0))
    assert {record["stage"]: max(r["lr"] for r in records() if r["stage"] == record["stage"]) for record in records()} == \
        {1: pytest.approx(0.01), 2: pytest.approx(0.002)}


# --- stops, and going on ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def uninterrupted(tiny_folders, tmp_path_factory):
    """flags' default run without a stop: (folder of the run, its checkpoint of stage 2)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", "--connector=dense", "--batch1=4",
                "--batch2=4", "--micro_batch=4", "--steps1=2", "--steps2=6", "--save_every=2", "--log_every=1",
                "--evaluate=false", "--device=cpu", f"--out={folder / 'run'}"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder / "run"


def assert_as_uninterrupted(uninterrupted, run="run"):
    assert losses(run) == losses(uninterrupted)
    assert model_bytes(run) == model_bytes(uninterrupted)
    for name in ("trained", "optimizer"):
        file = f"checkpoints/stage2-0000006/{name}.safetensors"
        assert (Path(run) / file).read_bytes() == (uninterrupted / file).read_bytes()
    assert sorted(path.name for path in (Path(run) / "checkpoints").iterdir()) == ["stage1-0000002", "stage2-0000006"]


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
    train.main([*flags(), "--resume"])
    assert_as_uninterrupted(uninterrupted)


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


# --- losses that are not numbers ----------------------------------------------------------------------------------------

def spoil(monkeypatch, steps, value=math.nan):
    """Forwards number `steps` (from 0; a step is one forward here) give this loss."""
    forward, calls = MLLM.forward, []
    def spoiled(self, *batch):
        loss, number = forward(self, *batch)
        calls.append(1)
        return loss * (value if len(calls) - 1 in steps else 1), number
    monkeypatch.setattr(MLLM, "forward", spoiled)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_step_without_a_finite_loss_is_skipped_and_its_samples_are_named(value, flags, monkeypatch, capsys):
    train.main(flags(out="whole", stage=1, steps1=3, batch1=2, save_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)    # keep every checkpoint
        spoil(patch, [2], value)
        train.main(flags(stage=1, steps1=4, batch1=2, save_every=1, warmup=0, lr1=1e-2))
    said = capsys.readouterr().err
    line, = [line for line in said.splitlines() if "step skipped" in line]
    config = cli.parse(train.Config, flags(stage=1, steps1=4, batch1=2))
    model = train.build_model(config, torch.device("cpu"))
    loader = iter(Loader(train.build_data(config, 1), model.tokenizer, "plain", model.spec, 16, 2048, 2, 4, 1))
    expected = [name for _ in range(2) for batch in next(loader) for name in batch.ids], next(loader)[0].ids
    assert line.startswith("step 2: loss") and line.endswith("among " + ", ".join(expected[1])) and expected[0] != expected[1]
    saved = {n: [load_file(f"run/checkpoints/stage1-000000{n}/{kind}.safetensors") for kind in ("trained", "optimizer")] for n in (2, 3, 4)}
    assert not changed(saved[2][0], saved[3][0]) and not changed(saved[2][1], saved[3][1])    # weights, moments, Adam's step
    assert changed(saved[3][0], saved[4][0]) == set(saved[3][0])     # and the run goes on


def test_ten_bad_steps_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(flags, monkeypatch):
    arguments = flags(stage=1, steps1=30, batch1=1)
    with monkeypatch.context() as patch:
        spoil(patch, range(5, 99))
        with pytest.raises(InputError, match="ten steps in a row without a finite loss, stopped at step 14; .* run/checkpoints is good"):
            train.main(arguments)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["stage1-0000014"]
    train.main([*arguments, "--resume"])
    found = {record["step"]: record["loss"] is not None for record in records()}
    assert [step for step in range(30) if not found[step]] == list(range(5, 14))     # 14 was done again, and was good
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_nine_bad_steps_do_not_stop_the_run(flags, monkeypatch):
    spoil(monkeypatch, [*range(0, 9), *range(10, 19)])
    train.main(flags(stage=1, steps1=20, batch1=1))
    assert all(tensor.isfinite().all() for tensor in weights().values())


# --- bad pictures -------------------------------------------------------------------------------------------------------

def with_bad(folder, count, bad):
    names = pictures(folder, count)
    for name in names[:bad]:
        (folder / name).write_bytes((folder / name).read_bytes()[:30])
    return dialogues(folder, [(name, [("<image>\nWhat is this?", "a red circle")]) for name in names])


def test_corrupt_pictures_are_skipped_and_named(flags, tmp_path, capsys):
    data = with_bad(tmp_path, 12, 3)
    (tmp_path / "2.png").unlink()
    train.main(flags(stage=1, data1=data, template1="tiny", steps1=3))
    said = capsys.readouterr().err
    assert sorted(line.split(":")[0] for line in said.splitlines()) == ["skipped s0", "skipped s1", "skipped s2"]
    assert "2.png: no such image" in said and "0.png: not a readable image" in said
    assert records()[-1]["skipped"] == 3


def test_too_many_corrupt_pictures_stop_the_run(flags, tmp_path):
    with pytest.raises(InputError, match="4 samples with bad images, more than 1% of those seen; .*s3"):
        train.main(flags(stage=1, data1=with_bad(tmp_path, 12, 4), template1="tiny", steps1=3))
    assert not Path("run/model").exists()


def test_a_dataset_that_teaches_nothing_stops_the_run(flags, tmp_path):
    """Here no turn fits: every sample is skipped, and a loss of zero tokens is not zero."""
    with pytest.raises(InputError, match="no sample of the dataset can be learnt from; the last one: .* not even the first turn fits"):
        train.main(flags(stage=1, max_length=8))
    assert not Path("run/model").exists()


def test_a_dialogue_is_cut_to_the_llms_own_context(flags, tiny_folders, tmp_path, capsys):
    """Positions that the LLM was not made for are not trained, and it would refuse to generate there."""
    shutil.copytree(tiny_folders["llama"], "short")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    name, = pictures(tmp_path, 1)
    question, answer = "Where is the red circle?", "[0.10,0.20,0.30,0.40]"
    data = dialogues(tmp_path, [(name, [(f"<image>\n{question}", answer)] + [(question, answer)] * 9)])
    train.main(flags(stage=1, llm="short", data1=data, template1="tiny", steps1=1, batch1=1))
    record, = records()
    assert 30 < record["tokens"] <= 50 and record["supervised"] == 14     # two whole turns: [, four numbers, ], </s>


# --- wrong input, in one line -------------------------------------------------------------------------------------------

def refused(arguments):
    with pytest.raises(InputError) as error:
        train.main(arguments)
    assert "\n" not in str(error.value)
    assert not Path("run/model").exists() and not list(Path(".").rglob("stage*"))
    return str(error.value)


@pytest.mark.parametrize("options, message", {
    "mistyped recipe": (dict(connector="config/dense_7b.tml"), "config/dense_7b.tml: no such recipe; they are files that end in .toml"),
    "unknown connector": (dict(connector="dens"), "connector kind 'dens' is unknown, nearest 'dense'"),
    "layer of a dense connector": (dict(layer=3), "connector layer is 3, but only linear and mlp read a single layer, not dense"),
    "no such layer": (dict(connector="mlp", layer=7), "connector layer is 7, a tower of 6 blocks has hidden[0] to hidden[6]"),
    "unknown merge": (dict(connector="comm", merge="all"), "connector merge 'all' is unknown, nearest 'lln'"),
    "unknown template": (dict(template="vicuna"), "no template 'vicuna': there are plain, vicuna_v1"),
    "unknown template of stage 1": (dict(template1="plane"), "no template 'plane'"),
    "template without its tokens": (dict(template="chatml"), "the tokenizer has no token <|im_start|>"),
    "stage 2 first": (dict(stage=2), "stage 2 starts from stage 1's connector, and run/checkpoints has none"),
    "stage 3": (dict(stage=3), "--stage=3: 1, 2, or 0 for both"),
    "no such init": (dict(stage=2, init="nowhere"), "nowhere: no such folder"),
    "no data": (dict(data1=""), "--data1 is empty"),
    "no such data": (dict(data1="missing.json"), "missing.json: cannot be read"),
    "no such data of stage 2": (dict(data2="missing.json"), "missing.json: cannot be read"),
    "boxes of crops": (dict(data1="rec:x.jsonl", image_mode="crop"), "with --image_mode=crop they are wrong"),
    "image mode": (dict(image_mode="fold"), "--image_mode=fold: pad, crop or stretch"),
    "unknown part": (dict(train2="tower"), "--train2=tower: what learns is one or more of vision, connector, llm"),
    "nothing trained": (dict(train1=""), "--train1=: what learns is one or more of vision"),
    "a start for both stages": (dict(init="new"), "--init says where stage 2 starts: it goes with --stage=2"),
    "no such tower": (dict(vision="./nowhere"), "./nowhere: no such folder"),
    "two towers for one": (dict(connector="mlp", two=True), "connector mlp reads one tower, it was given 2"),
    "no samples": (dict(batch1=0), "--batch1=0: should be 1 or more"),
    "negative seed": (dict(seed=-3), "--seed=-3: should be 0 or more"),
    "no such device": (dict(device="abacus"), "--device=abacus: cannot be used"),
    "unknown log": (dict(log="paper"), "--log=paper: tensorboard or wandb")}.values(), ids=lambda value: None)
def test_a_wrong_option_is_one_line_before_anything_is_trained(options, message, flags, tiny_folders):
    if options.pop("two", False):
        options |= {"vision": f"{tiny_folders['clip']},{tiny_folders['dinov2']}"}
    assert message in refused(flags(**options))


def test_nothing_to_resume_and_nothing_to_go_on_with_are_named(flags):
    arguments = [flag for flag in flags() if not flag.startswith("--out")]
    assert "nothing to go on with under out/dense" in refused([*arguments, "--resume"])
    assert "nothing to go on with under out/dense" in refused([*arguments, "--stage=2"])


def test_folders_that_hold_no_usable_checkpoint_are_named(flags, tiny_folders, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty/config.json: no such file" in refused(flags(vision="empty"))
    shutil.copytree(tiny_folders["llama"], "mute")
    os.remove("mute/tokenizer.json")
    assert "mute: no tokenizer.json, and no tokenizer.model: a language model needs its tokenizer" in refused(flags(llm="mute"))
    assert "empty: no tokenizer.json" in refused(flags(tokenizer="empty"))
    shutil.copytree(tiny_folders["llama"], "hollow")
    os.remove("hollow/model.safetensors")
    assert "hollow: no checkpoint in this folder" in refused(flags(llm="hollow"))
    shutil.copytree(tiny_folders["llama"], "pickled")
    os.rename("pickled/model.safetensors", "pickled/pytorch_model.bin")
    assert "pickled: only pickled weights (pytorch_model.bin)" in refused(flags(llm="pickled"))
    shutil.copytree(tiny_folders["clip"], "short")
    whole = Path("short/model.safetensors").read_bytes()
    Path("short/model.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "short/model.safetensors: not a readable safetensors file, truncated" in refused(flags(vision="short"))


def test_towers_whose_grids_differ_are_an_error_under_comm(flags, tiny_folders):
    DINOv2(DINOv2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=8)).save_pretrained("fine")
    message = refused(flags(connector="comm", vision=f"{tiny_folders['clip']},fine"))
    assert "grids differ: CLIP gives 4x4 (16 patches), DINOv2 8x8 (64 patches)" in message
    assert "swap the two towers" in refused(flags(connector="comm", vision=f"{tiny_folders['dinov2']},{tiny_folders['clip']}"))


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


# --- other ways to compute the same ---------------------------------------------------------------------------------------

def test_activation_checkpointing_changes_nothing(flags, uninterrupted):
    """The backward pass computes the very same numbers once more."""
    train.main(flags(activation_checkpointing="true"))
    assert losses() == losses(uninterrupted) and model_bytes() == model_bytes(uninterrupted)


def test_bfloat16_is_near_and_keeps_float32_weights(flags, uninterrupted):
    train.main(flags(bf16="true"))
    ours, theirs = losses(), losses(uninterrupted)
    assert ours != theirs and max(abs(ours[key] - theirs[key]) / theirs[key] for key in theirs) < 0.02    # bf16 has 8 bits
    assert {tensor.dtype for tensor in weights().values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")                # torch's own
def test_compiled_blocks_give_the_same_losses_and_are_compiled_once(flags, tmp_path, monkeypatch):
    """With the backend that only traces: no C++ compiler is needed, and nothing is fused, so that losses stay near. Batches
    of every length share the graphs of the first ones: at the eighth new graph torch would quietly give up compiling."""
    import torch._dynamo
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = ragged(tmp_path)
    train.main(flags(out="plain", stage=2, init="new", data2=data, steps2=4))
    assert not torch._dynamo.utils.counters["stats"]
    train.main(flags(out="compiled", stage=2, init="new", data2=data, steps2=4, compile="true"))
    assert near(losses("compiled"), losses("plain"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 8
    breaks = torch._dynamo.utils.counters["graph_break"]             # the one on purpose: dialogues' lengths stay outside
    assert len(breaks) == 1 and "attend_each" in next(iter(breaks))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.main(flags(out="longer", stage=2, init="new", data2=data, steps2=9, compile="true"))
    assert len({record["tokens"] for record in records("longer")}) >= 5                    # batches of as many sizes, one graph
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert sorted(weights("compiled")) == sorted(weights("plain"))   # names are those of the model that is not compiled
    torch._dynamo.reset()


def test_a_model_keeps_the_layer_that_it_was_trained_on(flags):
    """The folder says it, a folder from before there was the option means the second to last, and blocks beyond do not run."""
    train.main(flags(connector="linear", layer=2, steps2=2))
    model = MLLM.from_pretrained("run/model")
    assert model.connector_config == ConnectorConfig("linear", layer=2) and model.layers == [[2]]
    train.main(flags(connector="linear", steps2=2, out="default"))
    train.main(flags(connector="linear", steps2=2, out="named", layer=5))
    assert model_bytes("default") == model_bytes("named") != model_bytes()
    config = json.loads(Path("default/model/config.json").read_text())
    del config["connector"]["layer"]
    Path("default/model/config.json").write_text(json.dumps(config))
    assert MLLM.from_pretrained("default/model").layers == [[5]]
    with pytest.raises(InputError, match="was trained with --layer=2, not 3"):
        train.main([*flags(connector="linear", layer=3, steps2=2), "--resume"])


@pytest.mark.parametrize("connector", ("linear", "mlp", "sti", "sci", "efficient", "comm", "comm_clip", "comm_dino"))
def test_every_connector_trains_and_its_loss_falls(connector, flags, tmp_path):
    train.main(flags(connector=connector, data1=(data := ragged(tmp_path, 4)), data2=data, steps1=3, steps2=12, lr2=1e-2))
    found = losses()
    assert found[2, 11] < 0.8 * found[2, 0]
    assert MLLM.from_pretrained("run/model").connector_config.kind == connector


# --- what a person sees ---------------------------------------------------------------------------------------------------

def test_a_run_says_what_it_trains_how_it_goes_and_what_to_do_next(flags, capsys):
    train.main(flags(steps1=3, steps2=3, log_every=2))
    out = capsys.readouterr().out
    assert "dense connector, run folder run" in out
    assert "stage 1: vision 0.08M frozen, connector 0.00M trained, llm 0.20M frozen" in out
    assert "stage 2: vision 0.08M frozen, connector 0.00M trained, llm 0.20M trained" in out
    assert "12 samples, 3 steps of 4, 16 visual tokens a picture, peak learning rate 0.002, float32 on 1 x cpu" in out
    steps = [line for line in out.splitlines() if "tokens/s" in line]
    assert [line.split()[3] for line in steps] == ["0/3", "2/3"] * 2     # every second, and always the last
    assert all(word in steps[0] for word in ("loss", "lr", "tokens/s", "left"))
    assert "wrote run/model" in out and "next: python sample.py --model=run/model" in out


def test_log_counts_tokens_with_their_pictures(flags, tmp_path):
    data = dialogues(tmp_path, [(pictures(tmp_path, 1)[0], [("<image>\nWhat is this?", "a red circle")])])
    train.main(flags(stage=1, data1=data, template1="tiny", steps1=1, batch1=1))
    record, = records()
    ids, labels = encode(MLLM.from_pretrained("run/model").tokenizer, [("<image>\nWhat is this?", "a red circle")], "tiny")
    assert record["supervised"] == sum(label != IGNORE for label in labels) == 4     # a, red, circle, </s>
    assert record["tokens"] == len(ids) - 1 + 16
    assert set(record) >= {"stage", "step", "loss", "lr", "gradient_norm", "tokens_per_second", "skipped", "seconds"}


def test_boards_get_the_same_numbers_where_installed(flags, monkeypatch):
    from types import SimpleNamespace
    logged = []
    fake = SimpleNamespace(run=None, init=lambda **options: SimpleNamespace(log=logged.append))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main(flags(stage=1, log="wandb"))
    assert [entry["stage1/loss"] for entry in logged] == list(losses().values())
    for name, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)               # as if it were not installed
        with pytest.raises(InputError, match=f"--log={name}: not installed; pip install {name}"):
            train.main(flags(out=name, stage=1, log=name))


def test_epochs_count_steps_where_steps_are_zero(flags, tmp_path):
    data = ragged(tmp_path, 10)
    train.main(flags(stage=1, data1=data, template1="tiny", steps1=0, epochs1=1.5, batch1=4))
    assert len(records()) == math.ceil(15 / 4)


def test_files_are_mixed_by_size_or_alike(tmp_path, flags):
    names = pictures(tmp_path, 2)
    few = dialogues(tmp_path, [(names[0], [("<image>", "few")])] * 2, "few.json")
    many = dialogues(tmp_path, [(names[1], [("<image>", "many")])] * 7, "many.json")
    config = cli.parse(train.Config, flags(data1=f"{few},{many},world", steps1=2, batch1=3))
    assert [len(part) for part in train.build_data(config, 1).datasets] == [2, 7, 6]
    config.equal1 = True
    assert [len(part) for part in train.build_data(config, 1).datasets] == [2, 2, 2, 2, 7, 6]


def test_the_scores_stand_at_the_end_of_a_run_on_the_world(flags, monkeypatch, capsys):
    import eval as evaluation
    monkeypatch.setattr(evaluation, "evaluate", lambda model, count:
                        {"rec": {"samples": count, "scores": {"mean IoU": 0.5}, "blind": None}})
    train.main(flags(stage=2, init="new", steps2=1, evaluate="true"))
    assert "mean IoU" in capsys.readouterr().out
