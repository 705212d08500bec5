"""attention.py: two products, some queries at a time, are the attention of PyTorch."""
import pytest
import torch
import torch.nn.functional as F

import attention
from conftest import relative_error


def random(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("batch, heads, groups, tokens", ((1, 4, 4, 9), (2, 4, 2, 9), (3, 2, 1, 8), (1, 1, 1, 2), (2, 2, 2, 4)))
def test_products_are_the_fused_attention_whatever_is_taken_at_a_time(causal, batch, heads, groups, tokens, monkeypatch):
    """In float64, where only the order of sums differs, with gradients; 1e-12 is far above its rounding. 9 queries in fours are
    4, 4 and 1."""
    monkeypatch.setattr(attention, "ROWS", 4)
    q, k, v = (random(batch, h, tokens, 8, dtype=torch.float64, seed=h + i).requires_grad_() for i, h in enumerate((heads, groups, groups)))
    weights, found = random(batch, heads, tokens, 8, dtype=torch.float64, seed=9), []
    for x in (attention.attention_by_products(q, k, v, causal), F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)):
        found.append((x, *torch.autograd.grad((x * weights).sum(), (q, k, v))))
    for ours, fused in zip(*found):
        assert ours.shape == fused.shape and relative_error(ours, fused) < 1e-12


@pytest.mark.parametrize("causal", (False, True))
def test_bfloat16_products_of_small_scores_err_less_than_three_times_as_much_as_the_fused_ones(causal):
    """Both round the result to 8 bits; the products also round scores and weights before they are used."""
    q, k, v = (random(2, 4, 300, 16, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    errors = [relative_error(x.double(), exact) for x in (attention.attention(q, k, v, causal),
                                                          F.scaled_dot_product_attention(q, k, v, is_causal=causal))]
    assert max(errors) < 2 ** -6 and errors[0] < 3 * errors[1]


@pytest.mark.parametrize("dtype, tokens, learns, products", (
    (torch.bfloat16, 12, False, True), (torch.bfloat16, 12, True, True), (torch.bfloat16, 40, False, True),
    (torch.bfloat16, 40, True, False), (torch.float32, 12, False, False)), ids=str)
def test_products_serve_bfloat16_on_a_cpu_where_their_scores_may_be_kept(dtype, tokens, learns, products, monkeypatch):
    """A backward pass keeps T² scores, the fused kernel none."""
    monkeypatch.setattr(attention, "LONGEST", 20)
    calls, by_products = [], attention.attention_by_products
    monkeypatch.setattr(attention, "attention_by_products", lambda *a: calls.append(1) or by_products(*a))
    q = random(1, 2, tokens, 8, dtype=dtype, seed=0).requires_grad_(learns)
    with torch.set_grad_enabled(learns):
        attention.attention(q, q, q)
    assert bool(calls) == products
