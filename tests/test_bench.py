"""bench.py: it measures what it says, and leaves nothing behind. What is compared is the same: test_bench_live.py."""
import json
from pathlib import Path

import pytest

import bench
from clip import CLIPVisionConfig
from dialogue import IGNORE, IMAGE
from hub import InputError
from llama import LlamaConfig


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
TOWER = CLIPVisionConfig(num_hidden_layers=3, image_size=64, patch_size=16, **HEADS)
LLM = LlamaConfig(vocab_size=3000, num_hidden_layers=2, num_key_value_heads=2, **HEADS)


def test_a_training_step_of_a_small_llava_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write = bench.write_llava
    monkeypatch.setattr(bench, "write_llava", lambda folder: write(folder, TOWER, LLM))
    monkeypatch.setattr(bench, "turn", lambda config, name, **options: {"flops": 1e9, "read": 1e9} if name == "limits" else
                        bench.train_turn(bench.BenchConfig("train", device="cpu", contender=name, **options)))
    bench.main(["train", "--repeats=2", "--device=cpu", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for stage in ("stage1", "stage2"):
        ours = result[stage]["ours"]
        assert 0 < ours["least"] <= ours["seconds"] <= ours["most"] and ours["memory"] > 1e8
        assert ours["of_the_limit"] == pytest.approx(result[stage]["flops"] / ours["seconds"] / 1e9)
        assert 7 < ours["loss"] < 10                                 # log 3000 = 8.0: random weights
    assert result["stage1"]["flops"] < result["stage2"]["flops"]
    assert not list(tmp_path.glob("bench-*"))


def test_the_reference_dialogues_are_those_that_the_docstring_names():
    examples = bench.dialogues(224, 196)
    assert [len(tokens) for _, tokens, _, _ in examples] == [196 + length for length in bench.TEXTS]
    for _, tokens, labels, (pixels, ) in examples:
        assert tokens.count(IMAGE) == 196 and pixels.shape == (3, 224, 224)
        assert sum(label != IGNORE for label in labels) == int(0.6 * (len(tokens) - 196))
        assert all(label in (IGNORE, token) for token, label in zip(tokens, labels, strict=True))


def test_flops_by_formula_are_those_that_torch_counts(tmp_path):
    """FlopCounterMode counts the products of a real step, to the last; all but attention, whose CPU kernel it does not know."""
    from torch.utils.flop_counter import FlopCounterMode
    bench.write_llava(tmp_path / "llava", TOWER, LLM)
    texts = (40, 25)
    for stage in (1, 2):
        model, loss_of = bench.train_ours(tmp_path / "llava", stage, "cpu", texts)
        with FlopCounterMode(display=False) as counter:
            loss_of().backward()
        attention = 2 * 4 * 2 * 17 ** 2 * 32 + 3 * 2 * 2 * 32 * sum((16 + length) ** 2 for length in texts)  # tower, LLM
        assert bench.train_flops(tmp_path / "llava", stage, texts) - attention == counter.get_total_flops()


@pytest.mark.parametrize("arguments, message", [
    (["save"], "no such benchmark; there are load, train"), (["train", "--dtype=int8"], "--dtype=int8: bfloat16 or float32"),
    (["--vs=llamafile"], "only transformers can be compared with"),
    (["--repeats=0"], "must be 1 or more")])
def test_what_cannot_be_measured_is_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.main(arguments)
