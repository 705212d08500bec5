"""plan.py against what a step of the tiny model really takes: every allocation of it, and every matrix product."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cli
import plan
import train
from conftest import ROOT
from data import Batches
from hub import InputError
from llama import Llama


def tiny_run(stage, bf16, recompute, connector="dense", samples=8, merge="lln"):
    """-> the planner's Run for `samples` samples of the embedded world on a CPU, and the model, optimizer and step of it."""
    config = cli.parse(plan.PlanConfig, [f"--connector={connector}", f"--merge={merge}", f"--bf16={bf16}", f"--activation_checkpointing={recompute}",
                                         "--device=cpu", "--gpus=1"])
    own = train.settings(config, stage)
    model = train.build_model(config, torch.device("cpu"), stage).train()
    trained = train.choose_trained(model, own["train"])
    model.llm.gradient_checkpointing = recompute
    learning = [p for part in trained.values() for p in part]
    optimizer = torch.optim.AdamW(learning, fused=True)
    template = own["template"] if stage == 1 else model.template
    dataset = train.build_data(config, stage)
    batch = Batches(dataset, model.tokenizer, template, model.spec, model.tokens_per_image, 512)[range(samples)]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, number = model(batch.pixels, batch.tokens, batch.labels, batch.lengths, batch.shown)
        (loss / number).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    shapes = plan.build(config)
    assert all(p.is_meta for p in shapes.parameters())
    load = plan.Load(sum(batch.lengths), sum(length ** 2 for length in batch.lengths), (batch.labels >= 0).sum().item(),
                     len(batch.pixels))
    planned = plan.Run(config, shapes, train.choose_trained(shapes, own["train"]), load, 1, bf16, False)
    return planned, model, optimizer, step


def allocated(step):
    """The most that the allocator had given out at once since the step began, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("connector", ("dense", "comm", "comm_dino"))
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("stage", (1, 2))
def test_memory_is_within_15_percent_of_what_the_allocator_gives_out(stage, bf16, recompute, connector):
    """The whole, and also what a step adds to weights and moments, so that these (exact) cannot hide an error in it."""
    planned, model, optimizer, step = tiny_run(stage, bf16, recompute, connector)
    step()                                                           # the moments are made
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    found = plan.memory(planned, plan.Form("one card"))
    assert found["weights"] == weights and found["optimizer"] == moments
    added = allocated(step)
    assert found["peak"] == pytest.approx(weights + moments + added, rel=0.15)
    assert found["peak"] - weights - moments == pytest.approx(added, rel=0.15)


def added(planned):
    """What the plan adds to weights and moments."""
    found = plan.memory(planned, plan.Form("one card"))
    return found["peak"] - found["weights"] - found["optimizer"]


@pytest.mark.parametrize("merge", ("layerscale", "mean_half", "mean_all"))
@pytest.mark.parametrize("recompute", (False, True))
def test_memory_of_comms_other_merges(recompute, merge):
    """So near that four bytes a number of a merged layer, more or fewer, would be seen."""
    planned, _, _, step = tiny_run(1, False, recompute, "comm", 32, merge)
    step()
    assert added(planned) == pytest.approx(allocated(step), rel=0.04)


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("stage", (1, 2))
def test_a_second_forward_begins_with_the_gradients_of_the_first(stage, recompute, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self, set_to_none: None)          # they stay
    planned, model, _, step = tiny_run(stage, False, recompute)
    step()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    assert added(planned._replace(forwards=2)) == pytest.approx(gradients + allocated(step), rel=0.15)


@pytest.mark.parametrize("recompute", (False, True))
def test_a_frozen_llm_in_bf16_as_on_cuda(recompute, monkeypatch):
    """Its weights and what its blocks keep; only attention is the CPU's, which keeps scores, so the plan is told of that."""
    planned, model, _, step = tiny_run(1, True, recompute)
    model.llm.to(torch.bfloat16)
    block_bytes = plan.block_bytes
    monkeypatch.setattr(plan, "block_bytes", lambda *arguments: block_bytes(*arguments[:-1], False))
    planned = planned._replace(on_cuda=True)
    step()
    assert plan.memory(planned, plan.Form("one card"))["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert added(planned) == pytest.approx(allocated(step), rel=0.15)


@pytest.mark.parametrize("bf16", (False, True))
def test_fewer_heads_for_keys_and_values(bf16, monkeypatch):
    def grouped(build):
        def built(*arguments):
            model = build(*arguments)
            with torch.device(model.llm.embed_tokens.weight.device):
                model.llm = Llama(replace(model.llm.config, num_key_value_heads=1))
            return model
        return built
    monkeypatch.setattr(train, "build_model", grouped(train.build_model))
    monkeypatch.setattr(plan, "build", grouped(plan.build))
    planned, _, _, step = tiny_run(2, bf16, False)
    step()
    assert added(planned) == pytest.approx(allocated(step), rel=0.15)


@pytest.mark.parametrize("flags, told", [
    ("--device=cpu", "float32"), ("--device=cuda:0", "bf16"), ("--device=cpu --bf16=true", "bf16"), ("--device=cpu --llm", "bf16"),
    ("--device=cpu --llm --bf16=false", "float32"), ("--device=mps --llm", "float32"), ("--device=cuda", "bf16")])
def test_the_plan_takes_the_dtype_that_train_would(flags, told, monkeypatch, capsys):
    """A large LLM of 16 bits that is named trains in bf16 on a CPU; here the tiny one counts as large."""
    monkeypatch.setattr(plan, "LARGE", 1e6)
    plan.main(flags.replace("--llm", f"--llm={ROOT / 'weights' / 'llama'}").split())
    assert capsys.readouterr().out.count(f", {told}\n") == 2           # both stages


def test_data_at_hand_is_counted(tmp_path, capsys):
    """Forty dialogues of words and no picture: one epoch in batches of 16 is three steps, and the words are tokenised."""
    turns = [{"from": "human", "value": "Is there a red circle?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 40))
    plan.main(["--stage=2", f"--data2={tmp_path / 'data.json'}", "--steps2=0"])
    told = capsys.readouterr().out
    assert "40 samples, 3 steps of 16" in told and "(of the data at hand)" in told


@pytest.mark.parametrize("connector", ("dense", "comm", "comm_clip", "comm_dino", "sti", "efficient", "linear"))
@pytest.mark.parametrize("stage, recompute", ((1, False), (2, False), (2, True)))
def test_flops_are_those_that_pytorch_counts(stage, recompute, connector):
    """Exactly, once attention is written as products (the counter does not know the CPU's kernel), which computes the half of the
    scores that causal attention never looks at; the plan leaves that half out."""
    planned, _, _, step = tiny_run(stage, False, recompute, connector, samples=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    found = plan.flops(planned, plan.Form("one card"))
    forward = found["attention"] // 3
    assert counter.get_total_flops() == sum(found.values()) + found["attention"] + (forward if recompute else 0)


def test_logits_of_a_long_row_are_planned_in_chunks(monkeypatch):
    planned, _, _, step = tiny_run(1, False, False, samples=3)
    whole, V = plan.memory(planned, plan.Form("one card"))["logits"], planned.model.llm.config.vocab_size
    for module in ("mllm", "plan"):
        monkeypatch.setattr(f"{module}.LOGITS", 4 * V)               # four positions at once
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    found = plan.flops(planned, plan.Form("one card"))
    assert counter.get_total_flops() == sum(found.values()) + found["attention"]
    assert plan.memory(planned, plan.Form("one card"))["logits"] == 12 * 4 * V < whole


@pytest.mark.parametrize("recipe", ("llava15_7b", "dense_7b", "dense_siglip_8b", "comm_7b", "tiny"))
def test_every_recipe_is_planned_without_its_checkpoints(recipe, capsys):
    train.main([str(ROOT / "config" / f"{recipe}.toml"), "--plan", "--gpus=8", "--gpu_memory=80"])
    told = capsys.readouterr().out
    assert told.count("\n  DDP ") == told.count("\n  FSDP ") == 2 and "stage 1" in told and "stage 2" in told
    assert ("does not fit" in told) == (recipe != "tiny")            # 7B and 8B in float32 under DDP


@pytest.mark.parametrize("flag", ("--plan=true", "--plan=yes", "--plan=1", "--PLAN"))
def test_a_plan_may_be_asked_for_as_any_other_switch(flag, monkeypatch):
    planned = []
    monkeypatch.setattr(plan, "main", planned.append)
    train.main([flag, "--gpus=8"])
    assert planned == [[flag, "--gpus=8"]]


def rows(capsys, *flags):
    """{form: columns} of stage 2 of the dense recipe."""
    plan.main([str(ROOT / "config" / "dense_7b.toml"), "--stage=2", *flags])
    lines = capsys.readouterr().out.replace("does not fit", "0").splitlines()
    return {line[2:17].strip(): line[17:].split() for line in lines if line.startswith(("  DDP", "  FSDP", "  LoRA"))}


def test_public_sizes(capsys):
    """Vicuna-7B has 6,738.4M parameters, CLIP-L/336's tower 303.5M, LLaVA-1.5's projector from three layers 29.4M."""
    run = cli.parse(plan.PlanConfig, [str(ROOT / "config" / "dense_7b.toml")])
    model = plan.build(run)
    assert [round(plan.size(part) / 1e6, 1) for part in (model.llm, model.vision, model.connector)] == [6738.4, 303.5, 29.4]
    found = rows(capsys, "--gpus=8")
    P = 6738.4e6 + 29.4e6
    assert float(found["DDP"][2]) == pytest.approx(8 * P / 1e9, abs=0.01)                      # AdamW's moments
    assert float(found["FSDP"][2]) == pytest.approx(P / 1e9, abs=0.01)                         # an eighth of them
    assert float(found["DDP"][7]) == pytest.approx(2 * 7 / 8 * 4 * P / 1e9, abs=0.01)          # gradients, in a ring


def test_data_with_a_bad_picture_is_planned_without_it(tmp_path, capsys):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    lines = [{"img_path": "a.jpg", "expression": "a dog", "bbox": [1, 2, 9, 8], "width": w, "height": h} for w, h in ((40, 20), (20, 40))]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plan.main(["--stage=2", f"--data2=rec:{tmp_path / 'boxes.jsonl'}", "--steps2=0"])
    assert "(of the data at hand)" in capsys.readouterr().out


@pytest.mark.parametrize("memory", (1, 1000))
def test_room_for_tokens_is_what_fills_the_card(memory):
    planned = tiny_run(2, True, False)[0]
    planned = planned._replace(config=cli.parse(plan.PlanConfig, ["--gpus=1", f"--gpu_memory={memory}"]), on_cuda=True)
    form = plan.Form("one card")
    load = planned.load.times(plan.room(planned, form) / planned.load.tokens)
    assert plan.memory(planned._replace(load=load), form)["peak"] == pytest.approx(plan.ROOM * memory * 1e9, rel=0.01)


@pytest.mark.parametrize("flags, message", (
    (["--llm=no/such-model"], "no/such-model: the plan needs its config.json"),
    (["--vision=./nowhere"], "./nowhere: the plan needs its config.json"),
    (["--gpus=0"], "--gpus=0: should be more than 0"),
    (["--train2=vision,llm", "--stage=2"], "--train2: the plan knows frozen towers only"),
    (["--data2=nowhere.json", "--steps2=0", "--stage=2"], "--data2: not at hand"),
    (["--gpu=4"], "--gpu: unknown option, the nearest is gpus")))
def test_what_cannot_be_planned_is_one_line(flags, message):
    with pytest.raises(InputError, match="^" + message.replace(".", r"\.")) as error:
        train.main(["--plan", *flags])
    assert "\n" not in str(error.value)
