"""common/speed.py: each fast form computes what the plain form does, and each use gets its own."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import relative_error

from common import speed
from common.speed import PackedLinear, attention, linear, speed_up
from llama import Llama, LlamaConfig, attend_packed

SDPA = F.scaled_dot_product_attention
TIED = {"tie_word_embeddings": True, "sliding_window": 9}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def prompts(batch, length):
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def slow_cpu(monkeypatch):
    """A CPU whose own matmuls are slow in all dtypes, as AMD's with AVX-512."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not have what oneDNN needs for bfloat16")
    monkeypatch.setattr(speed, "is_slow", lambda dtype: True)


def model_of(**settings):
    torch.manual_seed(0)
    shape = {"num_key_value_heads": 2, "eos_token_id": []} | settings
    return Llama(LlamaConfig(300, 256, 256, 3, 4, **shape))


def results(compute, tensors):
    """Return what `compute` gives for copies of the tensors, and their gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    x = compute(*leaves)
    (x * x.detach().roll(1, -1)).sum().backward()
    return [x.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_fast_linear_layers_are_as_near_to_the_exact_product_as_rounding_allows(slow_cpu, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    for N, C in ((300, 256), (256, 2816)):
        weight, bias = randn(N, C, seed=1, dtype=dtype), randn(N, seed=2, dtype=dtype)
        packed = PackedLinear(weight, bias)
        for rows in ((1, 1), (3, 1), (8,), (2, 150)):
            x = randn(*rows, C, seed=3, dtype=dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            for y in (packed(x), linear(x, weight, bias)):
                assert y.shape == exact.shape and y.dtype == dtype
                assert relative_error(y, exact) < tolerance
    assert torch.backends.mkldnn.enabled


def test_attention_by_matmuls_is_the_fused_one_with_its_gradients():
    """In float64, where only the order of sums differs. 300 queries are two parts."""
    for tokens, causal in ((9, False), (300, False), (300, True)):
        shapes = ((2, 4, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 8))
        tensors = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]
        ours = results(partial(speed.attend_by_matmuls, is_causal=causal), tensors)
        fused = results(partial(SDPA, is_causal=causal, enable_gqa=True), tensors)
        for a, b in zip(ours, fused, strict=True):
            assert relative_error(a, b) < 1e-12
    # Unscaled, the products of a single query overflow float16.
    k, v = randn(2, 2, 9, 16, seed=1).half(), randn(2, 2, 9, 16, seed=2).half()
    assert attention(100 * randn(2, 6, 1, 16).half(), 100 * k, v).isfinite().all()


def test_cuda_kernel_takes_what_a_packed_row_gives_it():
    """Shapes only, on the meta device. test_cuda.py compares the numbers."""
    starts = torch.tensor([0, 7, 12], dtype=torch.int32)
    kernel = speed.packed_attention(attend_packed, "cuda", compile=False)
    for dtype, window in ((torch.bfloat16, None), (torch.float16, 4)):
        q, k, v = (torch.empty(1, h, 12, 8, dtype=dtype, device="meta") for h in (4, 2, 2))
        assert kernel(SDPA, q, k, v, starts.to("meta"), 7, window).shape == q.shape
    q, k, v = randn(1, 4, 12, 8), randn(1, 2, 12, 8), randn(1, 2, 12, 8)
    arguments = (SDPA, q, k, v, starts, 7, None)
    assert torch.equal(kernel(*arguments), attend_packed(*arguments))


@pytest.mark.parametrize("settings", ({"qkv_bias": True}, TIED), ids=str)
def test_a_fast_llama_learns_and_answers_as_the_plain_one(slow_cpu, settings):
    row, lengths = prompts(1, 700), [300, 1, 399]
    plain = model_of(**settings)
    fast = copy.deepcopy(plain)
    speed_up(fast, "train")
    assert list(fast.state_dict()) == list(plain.state_dict())
    gradients = []
    for model in (plain, fast):
        F.cross_entropy(model(row, lengths=lengths)[0, :-1], row[0, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 0 < relative_error(*gradients) < 1e-5
    for use in ("chat", "batch"):
        exact, rounded = copy.deepcopy(plain), copy.deepcopy(plain).bfloat16()
        speed_up(exact, use)
        speed_up(rounded, use)
        with torch.no_grad():
            for tokens in (prompts(1, 300), prompts(3, 9), prompts(3, 1)):
                assert torch.equal(exact.generate(tokens, 9), plain.generate(tokens, 9))
                assert relative_error(rounded(tokens), plain(tokens)) < 2e-2


def test_small_layers_of_a_multimodal_model_stay_and_its_attention_is_the_fast_one(
    tiny_model, monkeypatch
):
    """The toy world's layers are narrow: its scores do not depend on the machine."""
    assert not speed.is_slow(torch.half) and speed.is_slow(torch.float32) in (True, False)
    monkeypatch.setattr(speed, "is_slow", lambda dtype: True)
    model = copy.deepcopy(tiny_model)
    kinds = [type(module) for module in model.modules()]
    for use in ("train", "chat", "batch"):
        speed_up(model, use)
    compiled = copy.deepcopy(tiny_model)
    speed_up(compiled, "train", compile=True)
    assert list(compiled.state_dict()) == list(tiny_model.state_dict())
    assert [type(module) for module in model.modules()] == kinds and nn.Linear in kinds
    attentions = [module for module in model.modules() if hasattr(module, "sdpa")]
    assert len(attentions) == len(model.llm.layers) + len(model.vision[0].blocks)
    assert all(module.sdpa is attention for module in attentions)
    with pytest.raises(ValueError, match="use"):
        speed_up(model, "fast")
    speed.keep_freed_memory()


def test_a_compiled_step_is_one_graph_for_all_lengths_and_changes_no_text():
    """By the backend that only traces. A break is an error (fullgraph)."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    plain = model_of(max_position_embeddings=600, sliding_window=7)
    compiled = copy.deepcopy(plain)
    speed.compile_step(compiled, backend="aot_eager")
    for length in (9, 17, 40):
        tokens = prompts(1, length)
        assert torch.equal(compiled.generate(tokens, 12), plain.generate(tokens, 12))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
