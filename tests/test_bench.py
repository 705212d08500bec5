"""bench.py: it measures what it says, and leaves nothing behind. What is compared is the same: test_bench_live.py."""
import json
from pathlib import Path

import pytest
import torch

import bench
from benches import connectors, decode, loader, towers, train, turns
from conftest import ROOT
from connector import ConnectorConfig, layers_needed, make_connector
from dialogue import IGNORE, IMAGE
from hub import InputError
from llama import Llama, LlamaConfig
from train import Config, llm_dtype


def test_loading_a_small_llama_is_timed_and_copies_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench.main(["load", "--layers=1", "--repeats=1", "--device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bytes"] == 2 * (2 * 32000 * 2048 + 2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048 + 3 * 2048)
    for contender in ("ours", "floor"):
        assert 0 < result[contender]["load"] < result[contender]["seconds"]
    assert result["ours_over_floor"] > 0
    if Path("/proc/self/status").exists():
        assert result["ours"]["anonymous"] < 0.1 * result["bytes"]   # 350 MB of weights, none of them copied
    assert not list(tmp_path.iterdir())


HEADS = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
SMALL = (dict(num_hidden_layers=3, image_size=64, patch_size=16, **HEADS),
         dict(vocab_size=3000, num_hidden_layers=2, num_key_value_heads=2, **HEADS))


LIMITS = {"limit_flops": 1e9, "limit_read": 1e9}


def run(monkeypatch, capsys, what, *flags):
    """A benchmark with its turns in this process, and a made-up machine's limits -> its JSON object."""
    section = bench.BENCHES[what]
    if hasattr(section, "limits"):
        monkeypatch.setattr(section, "limits", lambda config: LIMITS)
    monkeypatch.setattr(turns, "turn", lambda config, name, **options: section.one_turn(
        bench.BenchConfig(what, device="cpu", dtype=config.dtype, contender=name, **options)))
    bench.main([what, "--repeats=2", "--device=cpu", "--json", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def keep(monkeypatch, section, name, *contenders):
    """Without the forms that are compiled: not every machine has a compiler, and it takes long."""
    monkeypatch.setattr(section, name, {key: getattr(section, name)[key] for key in contenders})


def in_order(one, *figures):
    return all(0 < one[f"{key}_range"][0] <= one[key] <= one[f"{key}_range"][1] for key in figures)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_a_training_step_of_a_small_llava_is_timed(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(train.SIZES, "160m", SMALL)
    keep(monkeypatch, train, "TRAINERS", "ours")
    result = run(monkeypatch, capsys, "train", f"--dtype={dtype}")
    for stage in ("stage1", "stage2"):
        ours = result[stage]["ours"]
        assert in_order(ours, "seconds", "warm_up") and ours["memory"] > 1e8
        assert ours["of_the_limit"] == pytest.approx(result[stage]["flops"] / ours["seconds"] / 1e9)
        assert 7 < ours["loss"] < 10                                 # log 3000 = 8.0: random weights
    assert result["stage1"]["flops"] < result["stage2"]["flops"]
    assert not list(tmp_path.glob("bench-*"))


@pytest.mark.parametrize("connector, lora_rank", (("dense", 0), ("comm", 4)))
def test_a_training_step_of_ones_own_is_timed_and_taken_apart(connector, lora_rank, monkeypatch, capsys):
    """Another connector, adapters, more dialogues; the profile's shares are of one step each."""
    monkeypatch.setitem(train.SIZES, "1b", SMALL)
    keep(monkeypatch, train, "TRAINERS", "ours")
    monkeypatch.setattr(train, "turn", lambda config, name, **options: train.one_turn(
        bench.BenchConfig("train", device="cpu", dtype=config.dtype, contender=name, **options | {"profile": True})))
    result = run(monkeypatch, capsys, "train", "--size=1b", f"--connector={connector}", f"--lora_rank={lora_rank}", "--stage=2",
                 "--batch=3", "--profile")
    assert "stage1" not in result
    ours, flops = result["stage2"]["ours"], result["stage2"]["flops"]
    assert ours["tokens_per_second"] * ours["seconds"] == pytest.approx(sum(train.TEXTS[:3]) + 3 * 16)
    assert ours["mfu"] == pytest.approx(flops / ours["seconds"] / 989e12)
    phases, kinds = ours["profile"]["phases"], ours["profile"]["kinds"]
    assert set(phases) == {"forward", "backward", "optimizer"} and set(kinds) == {*train.KINDS, "rest"}
    assert all(seconds > 0 for seconds in (*phases.values(), *kinds.values()))
    assert kinds["products"] > kinds["optimizer"] and sum(kinds.values()) < 3 * sum(phases.values())


def test_what_learns_and_in_what_dtype_is_as_train_py_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "160m", SMALL)
    train.write_llava(tmp_path / "llava")
    for stage, rank, dtype, expected in ((1, 0, "bfloat16", torch.bfloat16), (2, 0, "bfloat16", torch.float32),
                                         (2, 4, "bfloat16", torch.bfloat16), (1, 0, "float32", torch.float32)):
        model, _ = train.train_ours(tmp_path / "llava", stage, "cpu", dtype=dtype, connector="comm", lora_rank=rank)
        config = Config(connector="comm", lora_rank=rank, bf16=dtype == "bfloat16")
        assert model.llm.embed_tokens.weight.dtype == expected == llm_dtype(config, stage, "cpu")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if name.startswith("connector.") or
                           stage == 2 and name.startswith("llm.") and (not rank or ".lora_" in name)}
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_prefill_and_decode_of_a_small_llama_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(decode, "PROMPT", 9), monkeypatch.setattr(decode, "ANSWER", 5)
    keep(monkeypatch, decode, "GENERATORS", "ours")
    result = run(monkeypatch, capsys, "decode", "--layers=1", "--batch=2")
    ours = result["ours"]
    assert in_order(ours, "first", "token", "warm_up") and ours["first"] > ours["token"]
    assert ours["of_the_limit"]["token"] == pytest.approx(result["bytes_read"] / ours["token"] / 1e9)
    assert ours["of_the_limit"]["first"] == pytest.approx(result["flops"] / ours["first"] / 1e9)


def test_a_prompts_flops_by_formula_are_those_that_torch_counts(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setattr(decode, "PROMPT", 9)
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, num_key_value_heads=2, **HEADS)
    model, tokens = Llama(config), torch.ones(3, 9, dtype=torch.long)
    flops, read = decode.decode_work(config, batch=3, width=2)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens, hidden_only=True)[:, -1])
    assert flops - 3 * 2 * 2 * 32 * 9 ** 2 == counter.get_total_flops()                    # attention's kernel is not counted
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert read == 2 * weights + 2 * 2 * 3 * 2 * 16 * (9 + decode.ANSWER // 2)              # bf16; keys and values of two blocks


def test_small_towers_are_timed_and_their_flops_are_those_that_torch_counts(monkeypatch, capsys):
    from torch.utils.flop_counter import FlopCounterMode
    shape = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
    monkeypatch.setattr(towers, "TOWERS", {"clip": shape | {"intermediate_size": 128}, "dinov2": shape})
    monkeypatch.setattr(towers, "SIDE", 28)
    keep(monkeypatch, towers, "SEERS", "ours")
    result = run(monkeypatch, capsys, "towers", "--batch=2", "--dtype=float32")
    for name in ("clip", "dinov2"):
        assert in_order(result[name]["ours"], "seconds")
        tower, see = towers.tower_ours(name, "cpu", torch.float32, False)
        assert sum(p.numel() for p in tower.parameters()) == result[name]["ours"]["parameters"]
        with FlopCounterMode(display=False) as counter:
            hidden = see(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
        assert len(hidden) == {"clip": 4, "dinov2": 1}[name] and all(state.isfinite().all() for state in hidden)
        assert result[name]["flops"] - 2 * 4 * 4 * 5 ** 2 * 32 == counter.get_total_flops()    # attention, of four blocks


def test_loading_pictures_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(loader, "PICTURES", 2)
    threads = torch.get_num_threads()
    result = run(monkeypatch, capsys, "loader")
    torch.set_num_threads(threads)
    assert in_order(result["ours"], "seconds") and in_order(result["ours_pad"], "seconds")
    assert result["ours"]["pictures_per_second"] == pytest.approx(1 / result["ours"]["seconds"])
    assert not list(tmp_path.glob("bench-*"))


@pytest.mark.parametrize("kind", connectors.CONNECTORS)
def test_a_connectors_flops_by_formula_are_those_that_torch_counts(kind):
    """The formula is of the paper's sizes, and so is this connector; on the meta device it costs nothing."""
    from torch.utils.flop_counter import FlopCounterMode
    shapes = [(24, 1024, 576)] * (1 + (kind == "comm"))
    with torch.device("meta"):
        connector = make_connector(ConnectorConfig(kind), shapes, connectors.WIDTH)
        needed = layers_needed(ConnectorConfig(kind), [24] * len(shapes))
        hidden = [[torch.empty(1, 576, 1024) for _ in layers] for layers in needed]
        with FlopCounterMode(display=False) as counter:
            connector(hidden)
    assert counter.get_total_flops() == connectors.connector_flops(kind)


def test_connectors_are_timed(monkeypatch, capsys):
    monkeypatch.setattr(connectors, "WIDTH", 32), monkeypatch.setattr(connectors, "CONNECTORS", ("dci", "comm"))
    result = run(monkeypatch, capsys, "connectors", "--batch=1")
    for kind in ("dci", "comm"):
        assert in_order(result[kind], "forward", "seconds") and result[kind]["tokens"] == 576


def test_the_reference_dialogues_are_those_that_the_docstring_names():
    examples = train.dialogues(224, 196)
    assert [len(tokens) for _, tokens, _, _ in examples] == [196 + length for length in train.TEXTS]
    for _, tokens, labels, (pixels, ) in examples:
        assert tokens.count(IMAGE) == 196 and pixels.shape == (3, 224, 224)
        assert sum(label != IGNORE for label in labels) == int(0.6 * (len(tokens) - 196))
        assert all(label in (IGNORE, token) for token, label in zip(tokens, labels, strict=True))


@pytest.mark.parametrize("connector", ("mlp", "dense", "comm"))
def test_flops_by_formula_are_those_that_torch_counts(connector, tmp_path, monkeypatch):
    """FlopCounterMode counts the products of a real step, to the last; all but attention, whose CPU kernel it does not know."""
    from torch.utils.flop_counter import FlopCounterMode
    monkeypatch.setitem(train.SIZES, "160m", SMALL)
    monkeypatch.setattr(train, "TEXTS", (40, 25))
    train.write_llava(tmp_path / "llava")
    config = bench.BenchConfig("train", device="cpu", dtype="float32", batch=2, connector=connector, lora_rank=4)
    for stage in (1, 2):
        model, loss_of = train.train_ours(tmp_path / "llava", stage, "cpu", (40, 25), "float32", connector=connector, lora_rank=4)
        with FlopCounterMode(display=False) as counter:
            loss_of().backward()
        deepest = [max(layers) for layers in model.layers]
        attention = sum(2 * 4 * layers * 17 ** 2 * 32 for layers in deepest) + 3 * 2 * 2 * 32 * sum((16 + n) ** 2 for n in (40, 25))
        flops, _, lengths = train.planned(config, stage)
        assert flops - attention == counter.get_total_flops() and lengths == [56, 41]


@pytest.mark.parametrize("arguments, message", [
    (["save"], "no such benchmark; there are load, train, prefill"),
    (["train", "--dtype=int8"], "--dtype=int8: bfloat16 or float32"),
    (["--vs=llamafile"], "--vs=llamafile: only transformers can be compared with, and nanovlm in train"),
    (["train", "--vs=transformers,llamafile"], "--vs=llamafile: only transformers"),
    (["decode", "--vs=nanovlm"], "--vs=nanovlm: decode cannot be compared with it, only train can"),
    (["train", "--vs=nanovlm"], "needs --nanovlm=FOLDER; it should be a checkout of https://github.com/huggingface/nanoVLM"),
    (["train", "--vs=nanovlm", "--nanovlm=nowhere"], "--nanovlm=nowhere: no such folder; it should be a checkout"),
    (["train", "--vs=nanovlm", f"--nanovlm={ROOT}"], "not nanoVLM, it has no models/vision_language_model.py; it should be"),
    (["train", "--size=3b"], "--size=3b: 160m, 1b, 7b"), (["train", "--stage=3"], "--stage=3: 1, 2, or 0 for both"),
    (["train", "--connector=q-former"], "q-former"), (["--lora_rank=-1"], "--lora_rank 0 or more"),
    (["train", "--vs=nanovlm", f"--nanovlm={ROOT}", "--size=1b"], "not nanoVLM"),
    (["towers", "--tower=vit"], "--tower=vit: clip or dinov2"), (["--repeats=0"], "must be 1 or more")])
def test_what_cannot_be_measured_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.main(arguments)
