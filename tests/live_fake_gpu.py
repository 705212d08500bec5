"""Steps on a GPU, checked without one: on fake CUDA tensors, and the compiled blocks by tracing."""

import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import fake_cuda
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import train
from common import fsdp, speed
from data import collate
from mllm import MLLM
from tools.bench import make_batch


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """Yield a pool for fake_cuda.measure: one process that has loaded the guard."""
    if sys.platform != "linux" or not shutil.which("c++") or torch.version.cuda:
        pytest.skip("fake CUDA tensors need Linux, a C++ compiler and PyTorch for CPUs")
    guard = fake_cuda.build(tmp_path_factory.mktemp("guard"))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LD_PRELOAD", str(guard))
            patch.setenv("OMP_NUM_THREADS", "1")
            # The process starts with its first task.
            pool.submit(len, "").result()
        yield pool


RECIPES = sorted(path.stem for path in (ROOT / "config").glob("*.toml") if path.stem != "tiny")
STAGES = [f"{recipe} --stage={stage}" for recipe in RECIPES for stage in (1, 2)]
# COMM trains the same parts in both stages.
STAGES.remove("comm_7b --stage=2")
WAYS = [
    "dense_7b --lora_rank=128",
    "dense_7b --lora_rank=128 --fsdp=false",
    "dense_7b --text_only --batch2=8",
    "comm_7b --gpus=64 --rank=63",
    "dense_7b --gpus=16 --rank=9 --fsdp_replicas=2",
    "dense_siglip_8b --fsdp=false --lora_rank=128 --gpus=1 --batch2=16",
]


@pytest.mark.parametrize("flags", STAGES + WAYS)
def test_a_recipe_trains_on_cuda_with_few_waits_and_in_the_memory_planned(flags, gpu):
    """Real widths, few blocks of the LLM. An error would be a wrong device or dtype."""
    recipe, *flags = flags.split()
    # With three blocks, half of dense_phi2's peak would be one block's working memory.
    layers = 10 if recipe == "dense_phi2" else 3
    flags = [f"--layers={layers}", "--batch1=32", "--batch2=64", *flags]
    # Without torch.compile the other recipes would repeat dense_7b.
    flags.append(f"--eager={recipe in ('dense_7b', 'dense_phi2', 'small')}")
    found = gpu.submit(fake_cuda.measure, [f"config/{recipe}.toml", *flags]).result()
    waits = Counter()
    for place, count in found["waits"].items():
        waits[place.partition(":")[0]] += count
    # Loss and gradient norm; the counts of the global batch, to NCCL and back.
    expected = {"train.py": 1, "common/run.py": 2}
    assert waits == ({"train.py": 1} if "--gpus=1" in flags else expected)
    for key, error in (("memory", 0.15), ("products", 0.02)):
        for way, (measured, planned) in found[key].items():
            assert planned == pytest.approx(measured, rel=error), (key, way)
    # One for the blocks of each tower and of the LLM.
    assert found["graphs"] == (3 if recipe == "comm_7b" else 2)


@pytest.fixture
def fake_ranks():
    """Join a fake group as rank 0 of eight. Nothing is sent."""
    import torch._functorch.config as functorch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    # speed_up sets it for good
    with functorch.patch(activation_memory_budget=1.0):
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("budget", (0, 0.3))
def test_all_batches_share_the_compiled_graphs_without_a_break(budget, fake_ranks, monkeypatch):
    """FSDP in bfloat16 with recomputed activations. A kernel of zeros replaces FlashAttention."""
    import torch._dynamo as dynamo
    from torch.nn.attention import varlen  # noqa: F401, registers the kernel

    def forward(q, k, v, *_):
        return (
            torch.zeros_like(q),
            q.new_zeros(q.shape[1::-1]).float(),
            torch.zeros(2, dtype=torch.uint64),
        )

    def backward(gradient, q, k, v, *_):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
    choose = speed.packed_attention
    monkeypatch.setattr(
        speed, "packed_attention", lambda plain, _, compile: choose(plain, "cuda", compile)
    )
    # Only this backend applies the memory budget. It is slower.
    backend = "aot_eager_decomp_partition" if budget else "aot_eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = MLLM.assemble([ROOT / "weights/clip"], ROOT / "weights/llama", "dense")
    del model.llm.layers[2:]
    train.freeze(model, ["connector", "llm"])
    fsdp.shard(model, torch.device("cpu"), 1, torch.float32, bf16=True)
    speed.speed_up(model.train(), "train", compile=True, memory_budget=budget or 1.0)
    model.llm.gradient_checkpointing = not budget
    M, graphs = model.tokens_per_image, []
    kinds = ((3, False), (4, False), (1, False), (3, True))
    batches = [make_batch(model.spec, M, size, text_only) for size, text_only in kinds]
    # the samples of a rank may all be skipped
    batches.append(collate([], [], {}, model.spec, M))
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        model.zero_grad()
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert not dynamo.utils.counters["graph_break"]
    assert len(set(graphs)) == 1, graphs
