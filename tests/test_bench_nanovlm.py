"""bench.py train beside nanoVLM: what its step computes is the reference case. NANOVLM=FOLDER names a checkout of it."""
import json
import math
import os
import subprocess
import sys

import pytest

import bench
from benches import train
from conftest import ROOT
from llama import Llama, LlamaConfig

HEADS = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
LLM = dict(vocab_size=3000, num_hidden_layers=2, num_key_value_heads=2, **HEADS)
SMALL = dict(num_hidden_layers=3, image_size=64, patch_size=16, **HEADS), LLM
TEXTS = (30, 9, 21, 700, 14, 500)                                    # with 16 visual tokens each: two rows of 1024

# One step in each dtype, in a process of its own, for nanoVLM's `data` is not ours.
STEP = """
import json, sys
sys.path.insert(0, {root!r})
import torch
from benches import nanovlm, train
checkout, folder, stage = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, loss_of = train.train_nanovlm(folder, stage, "cpu", {texts}, checkout=checkout)
found = {{"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}}
for dtype in ("float32", "bfloat16"):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = loss_of()
    loss.backward()
    found[dtype] = loss.item()
found["learning"] = sorted({{name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}})
found["finite"] = all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
batch = nanovlm.pack(train.dialogues(64, 16, {texts}), 16)
found["rows"], found["real"] = batch["input_ids"].shape, int(batch["attention_mask"].sum())
labels, following = batch["labels"][:, :-1], batch["input_ids"][:, 1:]
found["supervised"], found["next"] = int((labels != -100).sum()), bool((labels == following)[labels != -100].all())
found["pictures"] = [int((row == 1).sum()) for row in batch["input_ids"]], [16 * len(row) for row in batch["images"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def checkout():
    folder = os.environ.get("NANOVLM")
    if not folder:
        pytest.skip("no checkout of nanoVLM: NANOVLM=FOLDER names one (git clone https://github.com/huggingface/nanoVLM)")
    return folder


@pytest.mark.parametrize("stage", (1, 2))
def test_nanovlm_trains_the_same_parts_on_the_same_tokens(stage, checkout, tmp_path, monkeypatch):
    monkeypatch.setitem(train.SIZES, "160m", SMALL)
    train.write_llava(tmp_path / "llava")
    step = STEP.format(root=str(ROOT), texts=TEXTS)
    done = subprocess.run([sys.executable, "-c", step, checkout, tmp_path / "llava", str(stage)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    llm = sum(p.numel() for p in Llama(LlamaConfig(**LLM)).parameters())
    assert found["trained"] == 32 * 32 + (llm if stage == 2 else 0)  # its projector is one map without bias
    assert found["learning"] == (["MP"] if stage == 1 else ["MP", "decoder"]) and found["finite"]
    for dtype in ("float32", "bfloat16"):
        assert found[dtype] == pytest.approx(math.log(3000), abs=0.1)        # its weights start at 0.02: almost uniform
    assert found["rows"] == [2, 1024] and found["real"] == sum(TEXTS) + len(TEXTS) * 16
    assert found["supervised"] == sum(int(train.SUPERVISED * length) for length in TEXTS) and found["next"]
    assert found["pictures"][0] == found["pictures"][1]              # a row's placeholders are those of its pictures


def test_nanovlm_is_timed_beside_ours(checkout, tmp_path, monkeypatch, capsys):
    """The command itself, on small sizes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(train.SIZES, "160m", SMALL)
    monkeypatch.setattr(train, "TRAINERS", {name: train.TRAINERS[name] for name in ("ours", "transformers", "nanovlm")})
    bench.main(["train", "--vs=nanovlm", f"--nanovlm={checkout}", "--repeats=1", "--device=cpu", "--json"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    for stage in (1, 2):
        found = result[f"stage{stage}"]
        assert "transformers" not in found                           # who is not asked for takes no turn
        assert found["times_nanovlm"] == pytest.approx(found["nanovlm"]["seconds"] / found["ours"]["seconds"])
        assert found["nanovlm"]["loss"] == pytest.approx(math.log(3000), abs=0.1)
        assert f"stage {stage}  ours is {found['times_nanovlm']:.2f} times as fast as nanovlm" in printed
