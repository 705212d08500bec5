"""softmax(Q K^T / sqrt(D)) V, in the form that is fast where it runs.

PyTorch's scaled_dot_product_attention never holds the scores (FlashAttention, arXiv 2205.14135), which is fastest on a GPU, and in
float32 everywhere. On a CPU its kernel works in float32 inside, at a tenth of the rate of bfloat16 products: there two products
with the scores between them take half its time. They are rounded to bfloat16, as in transformers' eager attention: the larger the
scores, the farther from the fused kernel's result.
"""
import torch
import torch.nn.functional as F

ROWS = 256                                                           # queries at a time: their scores stay in the CPU's cache
LONGEST = 1024                                                       # tokens up to which a backward pass may keep all scores


def attention(q, k, v, causal=False):
    """q (B, H, T, D) looks at k, v (B, G, S, D) -> (B, H, T, D): each group of H/G query heads shares one head of keys and
    values. causal: T is S, and a token sees itself and those before it only."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if slow and (q.shape[2] <= LONGEST or not torch.is_grad_enabled()):
        return attention_by_products(q, k, v, causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def attention_by_products(q, k, v, causal=False):
    """The same by two products, ROWS queries at a time; keys and values are repeated for the heads that share them. baddbmm scales
    and masks in the pass that multiplies."""
    B, H, T, D = q.shape
    q, k, v = (x.repeat_interleave(H // x.shape[1], 1).flatten(0, 1) for x in (q, k, v))  # (B·H, T or S, D) each
    attended = []
    for start in range(0, T, ROWS):
        queries = q[:, start:start + ROWS]  # (B·H, n, D)
        keys = start + queries.shape[1] if causal else k.shape[1]    # all that one of these queries may see
        bias = queries.new_zeros(1, 1, 1)
        if causal:
            bias = queries.new_full((1, queries.shape[1], keys), -torch.inf).triu(start + 1)
        scores = torch.baddbmm(bias, queries, k[:, :keys].transpose(1, 2), alpha=D ** -0.5)  # (B·H, n, keys)
        attended.append(scores.softmax(-1) @ v[:, :keys])
    return torch.cat(attended, 1).view(B, H, T, D)
