"""Steps on a GPU, checked without one: on fake CUDA tensors, and the compiled blocks by tracing."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial

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
def guard(tmp_path_factory):
    if sys.platform != "linux" or not shutil.which("c++") or torch.version.cuda:
        pytest.skip("fake CUDA tensors need Linux, a C++ compiler and PyTorch for CPUs")
    return fake_cuda.build(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize(
    "flags",
    (
        "config/dense_7b.toml",
        "config/dense_7b.toml --stage=1",
        "config/comm_7b.toml --gpus=32 --rank=31",
        "config/dense_siglip_8b.toml --fsdp2=false --lora_rank=128 --batch2=16 --gpus=1",
    ),
)
def test_a_recipe_trains_on_cuda_with_few_waits_and_in_the_memory_planned(flags, guard):
    """Real widths, a few blocks of the LLM. An error would be a wrong device or dtype."""
    command = [sys.executable, "tests/fake_cuda.py", *flags.split(), "--layers=2"]
    environment = fake_cuda.environment(guard)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    waits = Counter()
    for place, count in found["waits"].items():
        waits[place.partition(":")[0]] += count
    # Loss and gradient norm; the counts of the global batch, to NCCL and back.
    expected = {"train.py": 2, "common/run.py": 2}
    assert waits == ({"train.py": 2} if flags.endswith("--gpus=1") else expected)
    assert found["plan"] == pytest.approx(found["peak"], rel=0.15)


@pytest.fixture
def fake_ranks():
    """Be one of eight ranks, of which the others say nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_all_batches_share_a_few_compiled_graphs_without_a_break(fake_ranks, monkeypatch):
    """CUDA's default: FSDP, bfloat16, checkpointing. A kernel of zeros replaces FlashAttention."""
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
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = MLLM.assemble([ROOT / "weights/clip"], ROOT / "weights/llama", "dense")
    del model.llm.layers[2:]
    train.freeze(model, ["connector", "llm"])
    fsdp.shard(model, torch.device("cpu"), torch.float32, bf16=True)
    speed.speed_up(model.train(), "train", compile=True)
    model.llm.gradient_checkpointing = True
    M, graphs = model.tokens_per_image, []
    sizes = ((M, 3), (M, 4), (M, 1), (0, 3))
    batches = [make_batch(model.spec, tokens, size) for tokens, size in sizes]
    # the samples of a rank may all be skipped
    batches.append(collate([], [], {}, model.spec, M))
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch)
        loss.backward()
        model.zero_grad()
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert not dynamo.utils.counters["graph_break"]
    # One image or one token make new graphs. PyTorch allows eight for a function.
    assert graphs[0] == graphs[1] and graphs[2] == graphs[3] and graphs[4] <= 10, graphs
