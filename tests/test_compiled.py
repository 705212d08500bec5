"""compiled.py: what is compiled computes the same, and is compiled once for texts of all lengths."""
import pytest
import torch

import llama
from compiled import compile_blocks, compile_step
from conftest import relative_error
from test_llama import prompts, small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")    # torch's own


def test_rows_of_any_lengths_share_the_graphs_of_the_first_row():
    """Compiled block by block, as train.py does, by the backend that only traces. Attention is the one thing that stays out of
    the graphs, and only where there is no single kernel for all sequences: not on CUDA."""
    import torch._dynamo
    plain, compiled = small(), small()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled.layers, backend="aot_eager")
    assert not torch._dynamo.config.optimize_ddp                     # it would break them where a bucket of gradients is full
    for number, lengths in enumerate(([9, 4], [3, 30, 2, 8, 1], [25], [6, 6, 6], [1, 2])):
        row, gradients = prompts(1, sum(lengths)), []
        for model in (plain, compiled):
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                model(row, lengths=lengths).logsumexp(-1).sum().backward()
            gradients.append(model.layers[0].self_attn.q_proj.weight.grad)
        assert relative_error(*gradients) < 1e-5
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert len(breaks) == 1 and "attend_each" in next(iter(breaks))
    torch._dynamo.reset()


def attention_weights(query, key, starts, window, causal):
    """softmax(Q K^T / sqrt(D)), (H, T, T), of sequences in a row; window: how many before and behind itself a token sees, -1: all."""
    sequence, place = torch.bucketize(torch.arange(len(query)), starts[1:].long(), right=True), torch.arange(len(query))
    back, (left, right) = place[:, None] - place, (window[0], 0 if causal else window[1])
    seen = (sequence[:, None] == sequence) & ((back <= left) | (left < 0)) & ((back >= -right) | (right < 0))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def kernel(query, key, value, starts, _, longest, longest_key, causal=False, scale=None, window=None, *more):
    """What CUDA's flash attention computes, with its three outputs, for a CPU."""
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    x = attention_weights(query, key, starts, window, causal) @ value.transpose(0, 1)
    return x.transpose(0, 1).contiguous(), torch.zeros(query.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)


def backward_kernel(gradient, query, key, value, out, logsumexp, starts, _, longest, longest_key, causal, state, scale=None,
                    window=None, *more):
    G, many = key.shape[1], query.shape[1] // key.shape[1]
    weights, of_x = attention_weights(query, key, starts, window, causal), gradient.transpose(0, 1)  # (H, T, T), (H, T, D)
    of_weights = of_x @ value.repeat_interleave(many, 1).permute(1, 2, 0)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    own = lambda x: x.unflatten(0, (G, many)).sum(1).transpose(0, 1).contiguous()            # (H, T, D) -> (T, G, D)
    return ((of_scores @ key.repeat_interleave(many, 1).transpose(0, 1)).transpose(0, 1).contiguous(),
            own(of_scores.mT @ query.transpose(0, 1)), own(weights.mT @ of_x))


@pytest.mark.parametrize("recompute", (False, True), ids=("", "checkpointing"))
@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=("", "window"))
def test_with_the_one_kernel_of_cuda_rows_of_any_lengths_are_one_graph_without_a_break(settings, recompute, monkeypatch):
    """PyTorch's own operator, with its shapes and its autograd; what it launches on CUDA alone stands in."""
    import torch._dynamo
    from torch.nn.attention import varlen                            # noqa: F401  (it defines the operators)
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", kernel)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward_kernel)
    plain, compiled, each = small(**settings).train(), small(**settings).train(), llama.attend_each
    compiled.gradient_checkpointing = recompute
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.layers:
        block.compile(dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(([9, 4], [3, 30, 2, 8, 1], [25], [6, 6, 6], [1, 2])):
        row, gradients = prompts(1, sum(lengths)), []
        for model in (plain, compiled):
            monkeypatch.setattr(llama, "attend_each", each if model is plain else llama.attend_in_one_kernel)
            model.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                model(row, lengths=lengths).logsumexp(-1).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert relative_error(*gradients) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=("", "window"))
def test_a_compiled_step_is_one_graph_for_all_steps_and_changes_no_text(settings, monkeypatch):
    """As on CUDA, but with the backend that only traces, and no CUDA graph. A break would be an error (fullgraph)."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = small(max_position_embeddings=600, **settings), small(max_position_embeddings=600, **settings)
    compile_step(compiled, backend="aot_eager")
    static, mark = [], torch._dynamo.mark_static_address
    monkeypatch.setattr(torch._dynamo, "mark_static_address", lambda tensor: static.append(tensor) or mark(tensor))
    for batch, length in ((1, 9), (1, 17), (1, 40)):                 # one room of 512 holds them all
        assert torch.equal(compiled.generate(prompts(batch, length), 12), plain.generate(prompts(batch, length), 12))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len({id(tensor) for tensor in static}) == 3 * 2 * 2       # every prompt's keys and values of two blocks: they stay in place
    lengths = torch.tensor([5, 9, 2])
    assert torch.equal(compiled.generate(prompts(3, 9), 8, lengths=lengths), plain.generate(prompts(3, 9), 8, lengths=lengths))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2   # a batch is compiled anew
