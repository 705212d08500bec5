"""common/speed.py: each fast form computes what the plain form does, and each use gets its own."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from common import speed
from common.speed import FastLinear, attention, speed_up
from llama import Llama, LlamaConfig

SDPA = F.scaled_dot_product_attention
TIED = {"tie_word_embeddings": True, "sliding_window": 9}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def prompts(batch, length):
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(1))


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


@pytest.mark.parametrize("settings", ({"qkv_bias": True}, TIED), ids=str)
def test_a_fast_llama_learns_and_answers_as_the_plain_one(monkeypatch, settings):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    row, lengths = prompts(1, 700), [300, 1, 399]
    plain = model_of(**settings)
    fast = copy.deepcopy(plain)
    rounded = copy.deepcopy(plain).bfloat16()
    speed_up(fast, "train")
    speed_up(rounded, "chat")
    gradients = []
    for model in (plain, fast, rounded):
        F.cross_entropy(model(row, lengths=lengths)[0, :-1], row[0, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5
    assert relative_error(gradients[2], gradients[0]) < 0.1
    heads = [rounded.tied_head] if plain.config.tie_word_embeddings else []
    assert type(rounded.layers[0].mlp.up_proj) is FastLinear and heads in ([], [speed.linear])
    with torch.no_grad():
        for tokens in (prompts(1, 300), prompts(3, 9), prompts(3, 1), prompts(1, 1)):
            assert torch.equal(fast.generate(tokens, 9), plain.generate(tokens, 9))
            assert relative_error(rounded(tokens), plain(tokens)) < 2e-2
    assert torch.backends.mkldnn.enabled


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
