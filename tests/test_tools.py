"""plan, look and bench: each runs, writes its output, and its main numbers are right."""

import re

import pytest
import torch
from conftest import ROOT, refused
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train
from common import cli
from data import Batches
from mllm import MLLM
from tools import look, plan, web


def most_allocated(step):
    """Return the most bytes that the allocator has given out at one time during the step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("connector", ["dense", "comm --connector.merge=conv"])
def test_planned_memory_and_flops_are_those_that_pytorch_measures(connector):
    """Peak memory within 15%. PyTorch counts all pairs of attention, the plan the causal half."""
    flags = f"--connector={connector} --activation_checkpointing --compile=false --gpus=1"
    config = cli.parse(plan.PlanConfig, flags.split())
    model = train.build_model(config, 2, torch.device("cpu")).train()
    model.llm.gradient_checkpointing = True
    trainable = train.freeze(model, config.stage_options(2).train)
    parameters = [p for part in trainable.values() for p in part]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    samples = train.build_dataset(config, 2), model.tokenizer, model.template, model.spec
    batch = Batches(*samples, model.tokens_per_image, 512)[range(8)]

    def step():
        (model(batch) / len(batch.supervised)).backward()
        optimizer.step()
        optimizer.zero_grad()

    supervised, squared = len(batch.supervised), sum(n**2 for n in batch.lengths)
    load = plan.Load(sum(batch.lengths), squared, supervised, len(batch.pixels))
    planned = plan.Plan(config, plan.build(config, 2), True, load, 1, False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    flops, memory = plan.flops(planned), plan.memory(planned)
    assert counter.get_total_flops() == sum(flops.values()) + flops["attention"] * 4 // 3
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 * 4 * sum(p.numel() for p in parameters)
    assert (memory["weights"], memory["optimizer"]) == (weights, moments)
    added = memory["peak"] - weights - moments
    assert added == pytest.approx(most_allocated(step), rel=0.15)


def test_recipes_are_planned_without_their_checkpoints(capsys):
    """Vicuna-7B has 6,738.4M parameters and the connector 29.4M, in float32 with two moments."""
    for recipe in (ROOT / "config").glob("*.toml"):
        plan.main([str(recipe), "--gpus=8", "--gpu_memory=80", "--stage=2"])
        table = dict(
            re.findall(r"^  ((?:LoRA )?(?:DDP|FSDP)) +(.*)", capsys.readouterr().out, re.M)
        )
        assert {"DDP", "FSDP", "LoRA FSDP"} <= table.keys()
        if recipe.stem == "dense_7b":
            moments = 8 * (6738.4 + 29.4) / 1000
            assert float(table["DDP"].split()[2]) == pytest.approx(moments, abs=0.01)
            assert float(table["FSDP"].split()[2]) == pytest.approx(moments / 8, abs=0.01)
            assert "not fit" in table["DDP"] and "not fit" not in table["FSDP"]
    for flag, name in (("--llm=no/such", "no/such"), ("--train1=vision,llm", "--train1")):
        with refused(name):
            plan.main([flag])


def test_look_draws_models_and_towers(model_folder, tmp_path):
    weights = ROOT / "weights"
    comm = MLLM.assemble([weights / "clip", weights / "dinov2"], weights / "llama", "comm")
    comm.save(tmp_path / "comm")
    Image.new("RGB", (90, 60), "blue").save(tmp_path / "photo.png")
    for flags in (
        ["--image=photo.png", "--prompt=What?"],
        [f"--vision={weights / 'clip'},{weights / 'dinov2'}"],
        ["--scene=3", "--model=comm"],
    ):
        look.main([*flags, "--device=cpu", "--out=sheet.png"])
        assert Image.open(tmp_path / "sheet.png").height > 200
    # A slider for each of three questions and for the colors and the attention of two towers.
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<input") == 3 + 4 and page.count('alt="block 4, head 4') == 3
    assert page.count('alt="hidden[') == 14 and "weight 0.167" in page
    with refused("--out"):
        look.main(["--out=sheet.txt"])


def test_the_page_names_what_to_install(monkeypatch):
    monkeypatch.setattr(web, "gr", None)
    with refused("requirements-extra.txt"):
        web.main([])
