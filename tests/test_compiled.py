"""compiled.py: what is compiled computes the same, and is compiled once for texts of all lengths."""
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from compiled import compile_blocks, compile_decoding, compile_step, linear_of_one_row
from conftest import ROOT, relative_error
from test_llama import prompts, seeded, small

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")    # torch's own


def test_rows_of_any_lengths_share_the_graphs_of_the_first_row():
    """Compiled block by block, as train.py does, by the backend that only traces. Attention is the one thing that stays out of
    the graphs, and only where there is no single kernel for all sequences: not on CUDA."""
    import torch._dynamo
    plain, compiled = small(), small()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled.layers, backend="aot_eager")
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


@pytest.mark.parametrize("dtype, settings", (
        (torch.bfloat16, {}), (torch.float32, {"tie_word_embeddings": True, "qkv_bias": True})),
                         ids=("bfloat16", "float32, tied, biases"))
def test_compiled_products_of_one_row_change_no_greedy_text(dtype, settings):
    plain, compiled = small(**settings).to(dtype), small(**settings).to(dtype)
    if not compile_decoding(compiled):
        pytest.skip("no C++ compiler")
    calls, one_row = [], compiled.linear.args[0]
    compiled.linear = partial(linear_of_one_row, lambda x, weight: calls.append(len(weight)) or one_row(x, weight))
    tokens = prompts(1, 9)
    assert torch.equal(compiled.generate(tokens, 20), plain.generate(tokens, 20))
    assert calls.count(61) == 20 and len(calls) == 20 + 19 * 2 * 7   # lm_head; and in 19 steps 2 blocks of 7 maps
    calls.clear()
    batch = prompts(3, 9)                                            # more rows than one, and gradients: F.linear as ever
    assert torch.equal(compiled.generate(batch, 5), plain.generate(batch, 5)) and not calls
    assert compiled(tokens[:, :1]).requires_grad and not calls


@pytest.mark.parametrize("rows, columns", ((256, 64), (128, 128), (1, 32), (64, 5632), (16, 11008)))
def test_a_compiled_row_is_as_near_to_the_exact_product_as_rounding_allows(rows, columns):
    model = small().bfloat16()
    if not compile_decoding(model):
        pytest.skip("no C++ compiler")
    x, weight = torch.randn(1, 1, columns, generator=seeded(1)), torch.randn(rows, columns, generator=seeded(2))
    x, weight = x.bfloat16(), weight.bfloat16()
    with torch.no_grad():
        y = model.linear(x, weight)
    exact = F.linear(x.double(), weight.double())
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 ** -8 * exact.abs().max()    # the one rounding at the end, to 8 bits


@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=("", "window"))
def test_a_compiled_step_is_one_graph_for_all_steps_and_changes_no_text(settings):
    """As on CUDA, but with the backend that only traces, and no CUDA graph. A break would be an error (fullgraph)."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = small(max_position_embeddings=600, **settings), small(max_position_embeddings=600, **settings)
    compile_step(compiled, backend="aot_eager")
    for batch, length in ((1, 9), (1, 17), (1, 40)):                 # one room of 512 holds them all
        assert torch.equal(compiled.generate(prompts(batch, length), 12), plain.generate(prompts(batch, length), 12))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    lengths = torch.tensor([5, 9, 2])
    assert torch.equal(compiled.generate(prompts(3, 9), 8, lengths=lengths), plain.generate(prompts(3, 9), 8, lengths=lengths))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2   # a batch is compiled anew


def test_without_a_compiler_generation_stays_as_it_is(tmp_path):
    code = """import torch, llama
from compiled import compile_decoding
torch.manual_seed(0)
model, tokens = llama.Llama(llama.LlamaConfig(61, 32, 40, 2, 4, eos_token_id=None)), torch.ones(1, 5, dtype=torch.long)
plain = model.generate(tokens, 6)
assert not compile_decoding(model) and model.linear is torch.nn.functional.linear
assert torch.equal(model.generate(tokens, 6), plain)"""
    env = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
