"""On a GPU: what has a path of its own there computes what a CPU computes. `pytest tests/test_cuda.py` first, on a machine with one.

bfloat16 has 8 bits, so that a sum of many products comes out with a relative error of some 2 ** -7; float32 runs without TF32.
"""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import bench
import llama
import train
from benches import train as training
from compiled import compile_blocks, compile_step
from conftest import ROOT, relative_error
from llama import Llama, Packed, attend_each, attend_in_one_kernel
from mllm import MLLM
from test_llama import prompts, small

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning")]      # torch's own
GPU = "cuda"
BF16 = 2 ** -6


@pytest.fixture(autouse=True)
def as_found(monkeypatch, tmp_path):
    """An empty working directory; signal handlers, compiler and the products' precision as they were."""
    import torch._dynamo
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama, "attend_each", attend_each)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)   # of convolutions: the patches'
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(precision)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("window", (None, 7))
@pytest.mark.parametrize("heads, groups", ((4, 4), (8, 2)))
@pytest.mark.parametrize("D", (64, 128))
def test_the_one_kernel_is_attention_sequence_by_sequence_with_its_gradients(D, heads, groups, window):
    lengths, random = (5, 1, 40, 130, 12), torch.Generator().manual_seed(D + heads)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    leaves = [torch.randn(1, sum(lengths), n, D, generator=random).bfloat16() for n in (heads, groups, groups)]
    weights, found = torch.randn(1, sum(lengths), heads * D, generator=random), []
    for attend, dtype, device in ((attend_in_one_kernel, torch.bfloat16, GPU), (attend_each, torch.float64, "cpu")):
        q, k, v = inputs = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        packed = Packed(starts.to(device), max(lengths), window)
        x = attend(*(leaf.transpose(1, 2) for leaf in (q, k, v)), packed)
        (x * weights.to(device, dtype)).sum().backward()
        found.append([x, *(leaf.grad for leaf in inputs)])
    for ours, exact in zip(*found):
        assert ours.dtype == torch.bfloat16 and relative_error(ours.cpu(), exact) < BF16


def test_a_row_on_a_gpu_goes_through_the_one_kernel_in_bfloat16_alone(monkeypatch):
    called = []
    monkeypatch.setattr(llama, "attend_in_one_kernel", lambda *inputs: called.append(1) or attend_in_one_kernel(*inputs))
    model = small(hidden_size=64).to(GPU)
    row = prompts(1, 13).to(GPU)
    with torch.no_grad():
        exact = model(row, lengths=[9, 4])
        assert not called
        with torch.autocast(GPU, torch.bfloat16):
            assert relative_error(model(row, lengths=[9, 4]), exact) < 0.05      # logits, after several bfloat16 maps
    assert len(called) == model.config.num_hidden_layers


@pytest.fixture
def llava(tmp_path, monkeypatch):
    """A LLaVA of 15M parameters with heads of 64, as the large ones have, in its folder."""
    heads = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512)
    monkeypatch.setitem(training.SIZES, "160m", (dict(num_hidden_layers=4, image_size=64, patch_size=16, **heads), dict(
        vocab_size=16000, num_hidden_layers=4, num_key_value_heads=2, **heads)))
    training.write_llava(tmp_path / "llava")
    return tmp_path / "llava"


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("connector", ("mlp", "dense", "comm"))
def test_loss_and_gradients_are_those_of_a_cpu(connector, stage, llava):
    found = []
    for device, dtype, compiled in (("cpu", "float32", False), (GPU, "float32", False), (GPU, "bfloat16", False),
                                    (GPU, "bfloat16", True)):
        torch.manual_seed(1)                                         # the new connector's start
        model, loss_of = training.train_ours(llava, stage, device, (30, 9, 21), dtype, compiled, connector)
        with torch.autocast(GPU, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        found.append((loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}))
    (exact, expected), *others = found
    for (loss, gradients), tolerance in zip(others, (1e-4, 0.1, 0.1)):
        assert loss == pytest.approx(exact, rel=tolerance / 10) and gradients.keys() == expected.keys()
        whole = [torch.cat([of[name].flatten() for name in expected]) for of in (gradients, expected)]
        assert relative_error(*whole) < tolerance


def test_compiled_blocks_meet_rows_of_any_lengths_without_a_break_or_compiling_again(llava):
    model, _ = training.train_ours(llava, 2, GPU, (30, 9), compiled=True)
    torch._dynamo.utils.counters.clear()
    for number, texts in enumerate(((30, 9), (3, 50, 20, 8), (25, 4), (6, 6, 6), (100, 2))):
        _, loss_of = batch_of(model, texts)
        with torch._dynamo.config.patch(error_on_recompile=number > 1), torch.autocast(GPU, torch.bfloat16):
            loss_of().backward()
    assert not torch._dynamo.utils.counters["graph_break"]


def batch_of(model, texts):
    from data import collate
    batch = collate(training.dialogues(model.spec.size, model.tokens_per_image, texts), [], model.spec.size)
    inputs = [tensor.to(GPU) for tensor in (batch.pixels, batch.tokens, batch.labels)]
    return batch, lambda: model(*inputs, batch.lengths, batch.shown.to(GPU))[0]


@pytest.mark.parametrize("stage, lora_rank", ((1, 0), (2, 0), (2, 16)))
def test_a_step_takes_the_memory_that_the_plan_says(stage, lora_rank, monkeypatch, tmp_path):
    """Uncompiled, as the plan counts it; large enough that the context's own few megabytes do not matter."""
    heads = dict(hidden_size=1024, num_attention_heads=16, intermediate_size=2816)
    monkeypatch.setitem(training.SIZES, "160m", (dict(num_hidden_layers=4, image_size=224, patch_size=16, **heads), dict(
        num_hidden_layers=8, **heads)))
    training.write_llava(tmp_path / "llava")
    config = bench.BenchConfig("train", contender="ours", device=GPU, folder=str(tmp_path / "llava"), stage=stage, batch=8,
                               lora_rank=lora_rank)
    _, planned, _ = training.planned(config, stage)
    assert training.one_turn(config)["memory"] == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize("extra", ([], ["--lora_rank=4"], ["--activation_checkpointing"], ["--connector=comm"], ["--compile=false"]),
                         ids=str)
def test_a_run_in_two_stages_learns_stops_and_goes_on(extra, tiny_folders, monkeypatch):
    """The command as users type it: compiled and in bfloat16, which are CUDA's defaults."""
    vision = f"{tiny_folders['clip']}" + f",{tiny_folders['dinov2']}" * ("--connector=comm" in extra)
    flags = [f"--vision={vision}", f"--llm={tiny_folders['llama']}", "--steps1=3", "--steps2=8", "--batch1=4", "--batch2=8",
             "--log_every=1", "--evaluate=false", f"--device={GPU}", *extra]
    train.main([*flags, "--out=whole"])
    rate, asked = train.learning_rate, []

    def stopping(step, steps, warmup):
        if (step, steps) == (4, 8) and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return rate(step, steps, warmup)
    monkeypatch.setattr(train, "learning_rate", stopping)
    train.main([*flags, "--out=halves"])
    train.main([*flags, "--out=halves", "--resume"])
    whole, halves = ([json.loads(line) for line in open(f"{run}/log.jsonl")] for run in ("whole", "halves"))
    assert [record["step"] for record in halves] == [record["step"] for record in whole] == [*range(3), *range(8)]
    losses = [record["loss"] for record in whole]
    assert losses[-1] < losses[3] and [record["loss"] for record in halves] == pytest.approx(losses, rel=0.02)    # atomic sums
    model = MLLM.from_pretrained("halves/model", device=GPU)
    assert all(p.is_cuda and p.isfinite().all() for p in model.parameters())
    assert isinstance(model.generate([None], ["How many things?"], max_new_tokens=4)[0], str)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU; this takes two")
@pytest.mark.parametrize("extra", ([], ["--fsdp"]), ids=str)
def test_two_gpus_give_the_losses_of_one(extra, tiny_folders):
    flags = [f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", "--steps1=2", "--steps2=4", "--batch1=4",
             "--batch2=8", "--log_every=1", "--evaluate=false", "--bf16=false", "--compile=false", "--workers=0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, ROOT / "train.py", *flags, "--out=two", *extra], check=True, timeout=300)
    subprocess.run([sys.executable, ROOT / "train.py", *flags, "--out=one"], check=True, timeout=300)
    one, two = ([json.loads(line)["loss"] for line in open(f"{run}/log.jsonl")] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2)                       # train.py lets float32 products use TF32


@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=("", "window"))
def test_a_step_of_generation_as_one_graph_changes_no_text(settings):
    plain, fast = (small(max_position_embeddings=600, hidden_size=64, **settings).to(GPU) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    compile_step(fast)
    expected = small(max_position_embeddings=600, hidden_size=64, **settings)
    expected.load_state_dict(plain.state_dict())
    for batch, length in ((1, 9), (1, 40), (2, 17)):
        tokens = prompts(batch, length)
        text = expected.generate(tokens, 12)
        assert torch.equal(plain.generate(tokens.to(GPU), 12).cpu(), text)
        assert torch.equal(fast.generate(tokens.to(GPU), 12).cpu(), text)
    lengths, tokens = torch.tensor([5, 9, 2]), prompts(3, 9)
    assert torch.equal(fast.generate(tokens.to(GPU), 8, lengths=lengths).cpu(), expected.generate(tokens, 8, lengths=lengths))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_come_to_the_gpu_as_they_are(dtype, tiny_folders):
    on_gpu, on_cpu = (Llama.from_pretrained(tiny_folders["llama"], dtype, device) for device in (GPU, "cpu"))
    for ours, theirs in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        assert ours.is_cuda and torch.equal(ours.cpu(), theirs)
    assert on_gpu.rope_frequencies.is_cuda and on_gpu.rope_frequencies.dtype == torch.float32


@pytest.mark.parametrize("what", ("train", "decode", "towers"))
def test_a_benchmark_runs_there(what, llava, monkeypatch, capsys):
    bench.main([what, "--repeats=1", "--device=cuda", "--layers=2", "--json", *["--tower=clip"] * (what == "towers")])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    ours = {"train": lambda: result["stage2"]["ours_compiled"], "decode": lambda: result["ours_fast"],
            "towers": lambda: result["clip"]["ours_compiled"]}[what]()
    assert ours["memory"] > 1e6 and ("MFU" in printed) == (what == "train")
