"""common/lora.py: the start, the merge, a run of two ranks and its files in peft's format."""

import json
from pathlib import Path

import pytest
import torch
from conftest import relative_error, saved_weights
from safetensors.torch import load_file
from test_train import changed

import train
from common import lora
from interop import export
from interop.phi import Phi, PhiConfig
from llama import Llama, LlamaConfig

SHAPE = (96, 32, 48, 2, 4)
TOKENS = torch.arange(24).view(2, 12) * 3


@torch.no_grad()
def test_training_starts_at_the_base_model_and_ends_in_a_plain_one():
    torch.manual_seed(0)
    qwen2 = LlamaConfig(*SHAPE, qkv_bias=True, tie_word_embeddings=True)
    # 7 and 6 linear layers a block
    for layers, llm in ((7, Llama(qwen2)), (6, Phi(PhiConfig(*SHAPE)))):
        plain, names = llm(TOKENS), set(dict(llm.named_parameters()))
        lora.adapt(llm, 4, 8, dropout=0.1)
        assert torch.equal(llm(TOKENS), plain)
        assert len(lora.adapters(llm)) == 2 * 2 * layers
        assert set(dict(llm.named_parameters())) == names | set(lora.adapters(llm))
        for p in lora.adapters(llm).values():
            p.add_(0.1 * torch.randn(p.shape))
        assert relative_error(llm.train()(TOKENS), llm.eval()(TOKENS)) > 1e-3
        logits = llm(TOKENS)
        lora.merge(llm)
        assert set(dict(llm.named_parameters())) == names and not lora.adapters(llm)
        assert relative_error(llm(TOKENS), logits) < 1e-5 < 1e-2 < relative_error(logits, plain)


def test_dropout_zeroes_inputs_of_the_adapter_alone():
    """What peft computes: W x + alpha / rank · B A dropout(x), where what is left is doubled."""
    layer = lora.LoRALinear(torch.nn.Linear(1, 1), 1, 3, dropout=0.5)
    torch.nn.init.ones_(layer.lora_A.weight)
    torch.nn.init.ones_(layer.lora_B.weight)
    added = layer(torch.ones(100, 1)) - layer.weight - layer.bias
    assert {round(number, 4) for number in added.flatten().tolist()} == {0, 2 * 3}


def test_a_run_saves_the_base_with_the_adapters_added(clean_run, flags, tiny_folders, monkeypatch):
    options = dict(connector="mlp", steps1=1, steps2=4, micro_batch=2, lora_rank=4, lora_alpha=16)
    # --lr2=7 would move what is frozen.
    options |= dict(lora_lr2=3e-3, lr2=7, lora_dropout=0.5)
    with monkeypatch.context() as patch:
        # killed after step 2, whose checkpoint is the last one
        patch.setattr(train, "check_progress", lambda stage, step, *_: 1 / (2 - step))
        with pytest.raises(ZeroDivisionError):
            train.main(flags(**options))
    train.main([*flags(**options), "--resume"])
    train.main(flags(out="whole", **options))
    assert not changed(saved_weights("whole"), saved_weights())
    base = load_file(tiny_folders["llama"] / "model.safetensors")
    model, adapter = saved_weights(), Path("run/adapter")
    added = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_dropout"] == 0.5
    assert config["base_model_name_or_path"] == str(tiny_folders["llama"])
    for name, weight in base.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in added:
            A, B = added.pop(f"{stem}.lora_A.weight"), added.pop(f"{stem}.lora_B.weight")
            weight = weight + 16 / 4 * B @ A
            assert relative_error(weight, base[name]) > 1e-3
        assert relative_error(model["llm." + name.removeprefix("model.")], weight) < 1e-6
    assert not added
    # A checkpoint has the adapters apart. Exporting adds them.
    folder = max(Path("run/checkpoints").glob("stage2-*"))
    export.main([f"--model={folder}", "--to=exported", "--format=llama"])
    for name, tensor in load_file("exported/model.safetensors").items():
        assert torch.equal(tensor, model["llm." + name.removeprefix("model.")]), name
