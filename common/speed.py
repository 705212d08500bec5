"""What exists only for speed or memory. One call makes a model faster on its device:

    speed_up(model, "train")   before training; compile=True compiles the blocks
    speed_up(model, "chat")    before answers; compile=True makes a step one CUDA graph

The model computes the same, except that sums are rounded in another order. It works in place on any
model: attention modules have an attribute `sdpa`, linear layers are nn.Linear. Measurements are in
docs/speed.md.
"""

from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

# Narrower linear layers gain nothing.
WIDE = 256
# Queries at a time in attention by matmuls: their scores stay in the CPU's cache.
QUERIES = 256
# Tokens up to which a backward pass may keep all attention scores.
LONGEST = 1024
# Numbers in the logits that training holds at once: 256 MiB in float32.
MAX_LOGITS = 2**26
# The length of a compiled step's cache is a multiple of this, so that few lengths are compiled.
ROOM = 512


def speed_up(model, use, compile=False, memory_budget=1.0):
    """Replace parts of an MLLM, LLM or tower by forms that suit its device, in place.

    use: "train" or "chat". compile: use torch.compile, which takes a minute at first.
    memory_budget: the share of its activations that a compiled block keeps for the backward pass.
    The rest is computed again, the cheapest first: at 0.7 no matrix product of a LLaMA. Dropout
    computed again would draw other random numbers.
    """
    device = next(model.parameters()).device.type
    for module in model.modules():
        if hasattr(module, "sdpa"):
            module.sdpa = attention
        if hasattr(module, "attend_packed"):
            module.attend_packed = packed_attention(module.attend_packed, device, compile)
        if type(module) is nn.Linear and gains(module.weight):
            # The object stays the same: FSDP refers to it.
            module.__class__ = FastLinear
        if hasattr(module, "tied_head") and gains(module.embed_tokens.weight):
            module.tied_head = linear
    if use == "train" and compile:
        compile_blocks(model, memory_budget)
    elif compile and device == "cuda":
        compile_step(model)


# --- attention --------------------------------------------------------------------------------


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """F.scaled_dot_product_attention in the form that is fastest here.

    q: (B, H, T, D); k, v: (B, G, S, D) -> (B, H, T, D). The fused kernel (FlashAttention, arXiv
    2205.14135) never stores the scores. It is fastest on a GPU and in float32. On a CPU it computes
    bfloat16 in float32, at a tenth of the rate of bfloat16 matmuls.
    """
    if q.shape[2] == 1:
        return attend_from_one(q, k, v, attn_mask)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and attn_mask is None
    if slow and (q.shape[2] <= LONGEST or not q.requires_grad):
        return attend_by_matmuls(q, k, v, is_causal)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa
    )


def attend_from_one(q, k, v, mask):
    """Attention of a single query, a step of generation, as two matmuls.

    All query heads that share a key head are rows of one matmul. The fused kernel takes several
    times as long on a CPU, and on CUDA it copies keys and values for grouped heads with a mask.
    """
    # Scaled first: unscaled products overflow float16.
    rows = q.reshape(*k.shape[:2], -1, k.shape[-1]) * k.shape[-1] ** -0.5  # (B, G, H/G, D)
    scores = rows @ k.transpose(2, 3)  # (B, G, H/G, S)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return (scores.softmax(-1) @ v).reshape(q.shape)


def attend_by_matmuls(q, k, v, is_causal=False):
    """Attention as two matmuls, QUERIES queries at a time."""
    B, H, T, D = q.shape
    q = q.contiguous().flatten(0, 1)  # (B·H, T, D)
    k = k.repeat_interleave(H // k.shape[1], 1).flatten(0, 1)  # (B·H, S, D)
    v = v.repeat_interleave(H // v.shape[1], 1).flatten(0, 1)  # (B·H, S, D)
    attended = []
    for start in range(0, T, QUERIES):
        queries = q[:, start : start + QUERIES]  # (B·H, n, D)
        seen = start + queries.shape[1] if is_causal else k.shape[1]
        bias = queries.new_zeros(1, 1, 1)
        if is_causal:
            bias = queries.new_full((1, queries.shape[1], seen), -torch.inf).triu(start + 1)
        # baddbmm scales and masks in the pass that multiplies.
        keys = k[:, :seen].transpose(1, 2)
        scores = torch.baddbmm(bias, queries, keys, alpha=D**-0.5)  # (B·H, n, seen)
        attended.append(scores.softmax(-1) @ v[:, :seen])
    return torch.cat(attended, 1).view(B, H, T, D)


@cache
def packed_attention(plain, device, compile):
    """Return the form of `plain` (llama.attend_packed) for a device.

    All blocks get the same object, because torch.compile compiles a block again for another one.
    """
    if compile:
        # It would be compiled again for every set of lengths.
        plain = torch.compiler.disable(plain)
    return partial(attend_in_one_kernel, plain) if device == "cuda" else plain


def attend_in_one_kernel(plain, sdpa, q, k, v, starts, longest, window):
    """llama.attend_packed by CUDA's kernel for sequences of different lengths."""
    if q.dtype == torch.float32:
        return plain(sdpa, q, k, v, starts, longest, window)
    # Imported here, because it imports the compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    q = q[0].transpose(0, 1)  # (T, H, D)
    k = k[0].transpose(0, 1)  # (T, G, D)
    v = v[0].transpose(0, 1)  # (T, G, D)
    # How many tokens before itself a token sees; -1: all.
    before = -1 if window is None else window - 1
    x = varlen_attn(
        q, k, v, starts, starts, longest, longest, window_size=(before, 0), enable_gqa=True
    )
    return x.transpose(0, 1)[None]  # (1, H, T, D)


# --- copies to a GPU --------------------------------------------------------------------------


class Movable:
    """A dataclass that moves to a device with all tensors in its fields."""

    def to(self, device):
        """Copy to a device. The host does not wait for a copy from pinned memory."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self):
        """Copy to pinned memory. DataLoader calls it."""
        return self.each(torch.Tensor.pin_memory)

    def each(self, function):
        return replace(self, **tree_map_only(torch.Tensor, function, vars(self)))


# --- the loss ---------------------------------------------------------------------------------


def sum_in_parts(loss, hidden, targets, vocab_size):
    """Sum loss(hidden, targets) over parts with at most MAX_LOGITS logits: (n, C), (n,) -> ()."""
    size = max(1, MAX_LOGITS // vocab_size)
    if len(hidden) <= size:
        return loss(hidden, targets)
    # The backward pass computes the logits again, so one part at a time is in memory.
    losses = []
    for part in zip(hidden.split(size), targets.split(size), strict=True):
        losses.append(checkpoint(loss, *part, use_reentrant=False))
    return torch.stack(losses).sum()


# --- linear layers on a CPU -------------------------------------------------------------------


def gains(weight):
    """Tell whether `linear` is worth it for this weight: a large one in bfloat16 on a CPU."""
    is_large = min(weight.shape) >= WIDE
    return is_large and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


class FastLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear, for a single row of x without oneDNN.

    PyTorch gives a bfloat16 matmul to oneDNN, which first copies the weight into another layout.
    For one row this takes most of the time, and PyTorch's own kernel does not copy.
    x: (..., C); weight: (N, C); bias: (N,) -> (..., N)
    """
    is_single = x.numel() == x.shape[-1]
    mkldnn = torch.backends.mkldnn
    before, mkldnn.enabled = mkldnn.enabled, mkldnn.enabled and not is_single
    try:
        return F.linear(x, weight, bias)
    finally:
        mkldnn.enabled = before


# --- torch.compile ----------------------------------------------------------------------------


def compile_blocks(model, memory_budget):
    """Compile every block, i.e. each module that contains an attention.

    Blocks are quick to compile, and their borders are no breaks in a graph.
    """
    import torch._dynamo
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = memory_budget
    # DDP would split the blocks where a bucket of gradients is full.
    torch._dynamo.config.optimize_ddp = False
    for module in list(model.modules()):
        if any(hasattr(child, "sdpa") for child in module.children()):
            module.compile(dynamic=True)


def compile_step(model):
    """Compile the LLM's decoding step into one CUDA graph."""
    llm = getattr(model, "llm", model)
    # Tuning finds a kernel for single rows that reads at the memory's bandwidth.
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    compiled = torch.compile(llm.step, fullgraph=True, options=options)

    def step(token, positions, cache):
        for tensors in (cache.keys, cache.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % ROOM))
                # A graph works on fixed addresses: it may only write to a cache that never moves.
                torch._dynamo.mark_static_address(tensors[layer])
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, positions, cache)

    llm.step = step
