"""common/speed.py on a GPU: each fast form computes what the plain form computes on a CPU.

These tests need a GPU and are skipped without one. bfloat16 sums have a relative error of 2 ** -7.
"""

import copy

import pytest
import torch
from conftest import relative_error
from test_speed import SDPA, model_of, prompts

from common import speed
from common.speed import speed_up
from llama import attend_packed

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_one_kernel_attends_as_sequence_by_sequence_with_its_gradients():
    lengths = [5, 1, 40, 130, 12]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
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
            x = attend(SDPA, *leaves, starts.to(device), max(lengths), window)
            x.square().sum().backward()
            found.append([x.detach(), *(leaf.grad for leaf in leaves)])
        for ours, exact in zip(*found, strict=True):
            assert ours.dtype == torch.bfloat16 and relative_error(ours.cpu(), exact) < 2**-6


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
                model(row.to(device), lengths=lengths).float().logsumexp(-1).sum().backward()
            found.append(torch.cat([p.grad.cpu().flatten() for p in model.parameters()]))
        errors = [relative_error(gradients, found[0]) for gradients in found[1:]]
        assert errors[0] < 1e-4 and max(errors) < 0.1
    assert not dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("settings", ({}, {"sliding_window": 7}), ids=str)
def test_a_decoding_step_as_one_graph_changes_no_text(settings):
    torch.set_float32_matmul_precision("highest")
    plain = model_of(**settings)
    fast, compiled = copy.deepcopy(plain).to("cuda"), copy.deepcopy(plain).to("cuda")
    speed_up(fast, "chat")
    speed_up(compiled, "chat", compile=True)
    for tokens in (prompts(1, 9), prompts(1, 40), prompts(2, 17)):
        ids = plain.generate(tokens, 12)
        for model in (fast, compiled):
            assert torch.equal(model.generate(tokens.to("cuda"), 12).cpu(), ids)
