"""compiled.py: what is compiled computes the same, and is compiled once for texts of all lengths."""
import pytest
import torch

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
