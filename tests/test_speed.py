"""common/speed.py: each fast form computes what the plain form does, and each use gets its own."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from common import speed
from common.speed import FastLinear, attention, speed_up
from llama import Llama, LlamaConfig, attend_packed, pack

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
    shape = {"num_key_value_heads": 2, "max_position_embeddings": 600, "eos_token_id": []}
    return Llama(LlamaConfig(300, 256, 256, 2, 4, **shape | settings))


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
def test_a_fast_llama_learns_and_answers_as_the_plain_one(settings):
    row, lengths = prompts(1, 700), [300, 1, 399]
    plain = model_of(**settings)
    fast = copy.deepcopy(plain)
    rounded = copy.deepcopy(plain).bfloat16()
    speed_up(fast, "train")
    speed_up(rounded, "chat")
    gradients = []
    for model in (plain, fast, rounded):
        F.cross_entropy(model(row, packed=pack(lengths))[0, :-1], row[0, 1:]).backward()
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


def test_a_compiled_step_is_one_graph_for_all_lengths_and_changes_no_text(monkeypatch):
    """By the backend that only traces. A break is an error (fullgraph)."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    compiler = torch.compile

    def trace(function, fullgraph, options):
        return compiler(function, fullgraph=fullgraph, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", trace)
    plain = model_of(sliding_window=7)
    compiled = copy.deepcopy(plain)
    speed.compile_step(compiled)
    for length in (9, 17, 40):
        tokens = prompts(1, length)
        assert torch.equal(compiled.generate(tokens, 12), plain.generate(tokens, 12))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_memory_budget_keeps_fewer_activations_and_changes_no_gradient(monkeypatch):
    """By the backend that decides what to keep, but generates no code."""
    import torch._dynamo as dynamo
    import torch._functorch.config as config

    monkeypatch.setattr(config, "activation_memory_budget", 1.0)
    compiler = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiler)
    kept, gradients = [], []

    def keep(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for budget in (1.0, 0.3):
        dynamo.reset()
        kept.append(0)
        model = model_of().train()
        speed_up(model, "train", compile=True, memory_budget=budget)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(prompts(1, 600)).logsumexp(-1).sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert kept[1] < 0.8 * kept[0]
    assert relative_error(*gradients) < 1e-5


# ---- on a GPU: bfloat16 sums have a relative error of 2 ** -7 ------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@on_a_gpu
def test_one_kernel_attends_as_sequence_by_sequence_with_its_gradients():
    lengths = [5, 1, 40, 130, 12]
    _, starts, longest = pack(lengths)
    kernel = speed.packed_attention(attend_packed, "cuda", compile=False)
    for heads, groups, D, window in ((4, 4, 64, None), (8, 2, 128, None), (8, 2, 64, 7)):
        found = []
        for attend, dtype, device in (
            (kernel, torch.bfloat16, "cuda"),
            (attend_packed, torch.float64, "cpu"),
        ):
            torch.manual_seed(0)
            leaves = [torch.randn(1, h, sum(lengths), D) for h in (heads, groups, groups)]
            leaves = [leaf.bfloat16().to(device, dtype).requires_grad_() for leaf in leaves]
            x = attend(SDPA, *leaves, starts.to(device), longest, window)
            x.square().sum().backward()
            found.append([x.detach(), *(leaf.grad for leaf in leaves)])
        for ours, exact in zip(*found, strict=True):
            assert ours.dtype == torch.bfloat16 and relative_error(ours.cpu(), exact) < 2**-6


@on_a_gpu
@pytest.mark.parametrize("settings", ({}, {"tie_word_embeddings": True, "sliding_window": 7}))
def test_loss_and_gradients_are_those_of_a_cpu_compiled_once_for_all_lengths(settings):
    import torch._dynamo as dynamo

    dynamo.reset()
    plain = model_of(**settings).train()
    fast, compiled = copy.deepcopy(plain).to("cuda"), copy.deepcopy(plain).to("cuda")
    speed_up(fast, "train")
    speed_up(compiled, "train", compile=True)
    dynamo.utils.counters.clear()
    for number, lengths in enumerate(([30, 9], [3, 50, 20, 8], [25, 4], [6, 6, 6])):
        row, found = prompts(1, sum(lengths)), []
        for model, dtype in ((plain, None), (fast, None), (fast, "bf16"), (compiled, "bf16")):
            model.zero_grad()
            device = model.embed_tokens.weight.device
            with (
                torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bf16"),
                dynamo.config.patch(error_on_recompile=number > 0),
            ):
                positions, starts, longest = pack(lengths)
                packed = positions.to(device), starts.to(device), longest
                model(row.to(device), packed=packed).float().logsumexp(-1).sum().backward()
            found.append(torch.cat([p.grad.cpu().flatten() for p in model.parameters()]))
        errors = [relative_error(gradients, found[0]) for gradients in found[1:]]
        assert errors[0] < 1e-4 and max(errors) < 0.1
    assert not dynamo.utils.counters["graph_break"]


@on_a_gpu
@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=str)
def test_a_decoding_step_as_one_graph_changes_no_text(settings):
    torch.set_float32_matmul_precision("highest")
    plain = model_of(**settings)
    fast, compiled = copy.deepcopy(plain).to("cuda"), copy.deepcopy(plain).to("cuda")
    speed_up(fast, "chat")
    speed_up(compiled, "chat", compile=True)
    for tokens in (prompts(1, 9), prompts(1, 40), prompts(2, 17)):
        # without an end, since a GPU may stop up to seven tokens later
        ids = plain.generate(tokens, 12, eos=[])
        for model in (fast, compiled):
            assert torch.equal(model.generate(tokens.to("cuda"), 12, eos=[]).cpu(), ids)
