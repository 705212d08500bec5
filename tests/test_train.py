"""train.py: the loss, who learns, ranks, and what computes the same. test_resume.py has its stops, test_train_errors.py bad input.

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

import cli
import train
from conftest import ROOT
from connector import ConnectorConfig
from data import Loader
from dialogue import IGNORE, encode
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


def test_a_tower_of_which_the_embeddings_are_read_learns_them(flags):
    arguments = flags(connector="mlp", layer=0, stage=2, init="new", steps2=2, lr2=1e-2, train2="vision")
    start = train.build_model(cli.parse(train.Config, arguments), torch.device("cpu")).state_dict()
    train.main(arguments)
    moved = changed(start, weights())
    assert {"vision.0.patch.weight", "vision.0.position_embedding"} <= moved and not any(".blocks." in name for name in moved)


def test_without_a_largest_norm_a_gradient_stays_as_it_is(flags):
    runs = [losses_of(flags, clip) for clip in (0, 1e9, 1e-9)]
    assert runs[0] == runs[1] != runs[2]


def losses_of(flags, clip):
    train.main(flags(stage=1, steps1=3, clip=clip, out=f"clip{clip}"))
    return [record["loss"] for record in records(f"clip{clip}")]


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
    assert "12 samples (world), 3 steps of 4, 16 visual tokens a picture, peak learning rate 0.002, float32 on 1 x cpu" in out
    steps = [line for line in out.splitlines() if "tokens/s" in line]
    assert [line.split()[3] for line in steps] == ["0/3", "2/3"] * 2     # every second, and always the last
    assert all(word in steps[0] for word in ("loss", "lr", "tokens/s", "left"))
    assert "wrote run/model" in out and "next: python sample.py --model=run/model   (answers beside the truth" in out


def test_log_counts_tokens_with_their_pictures(flags, tmp_path, capsys):
    data = dialogues(tmp_path, [(pictures(tmp_path, 1)[0], [("<image>\nWhat is this?", "a red circle")])])
    train.main(flags(stage=1, data1=data, template1="tiny", steps1=1, batch1=1))
    out = capsys.readouterr().out                                    # of one's own data: nothing about the world's scenes
    assert f"1 samples ({data})" in out and out.endswith("next: python sample.py --model=run/model --image=photo.jpg --prompt='...'\n")
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
    written, waiting = [], []
    board = lambda folder: SimpleNamespace(add_scalar=lambda *point: waiting.append(point),
                                           flush=lambda: (written.extend(waiting), waiting.clear()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=board))
    train.main(flags(out="boards", stage=1, log="tensorboard"))
    assert [value for key, value, _ in written if key == "stage1/loss"] == list(losses("boards").values())
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


def test_the_closing_scores_compile_nothing(flags, monkeypatch):
    """Texts of all lengths, a token at a time: the compiled blocks would be compiled anew for each."""
    import torch._dynamo
    import eval as evaluation
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_blocks, found = train.compile_blocks, []
    monkeypatch.setattr(train, "compile_blocks", lambda blocks: compile_blocks(blocks, backend="eager"))

    def evaluate(model, count):
        before = graphs()
        texts = model.generate([None, None], ["How many things are there?", "Why?"], max_new_tokens=3)
        found.append((before, graphs(), len(texts)))
        return {"rec": {"samples": count, "scores": {"mean IoU": 0.5}, "blind": None}}
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.main(flags(stage=2, init="new", steps2=2, evaluate="true", compile="true"))
    (before, after, texts), = found
    assert before == after > 0 and texts == 2
    torch._dynamo.reset()
