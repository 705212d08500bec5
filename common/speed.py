"""What exists only for speed: one call makes a model faster on its device.

    speed_up(model, "train")   before training; compile=True compiles the blocks
    speed_up(model, "chat")    one answer at a time; compile=True makes a step one CUDA graph
    speed_up(model, "batch")   many answers at once; the model cannot be trained afterwards

The model computes the same, except that sums are rounded in another order. It works in place on any
model: attention modules have an attribute `sdpa`, linear layers are nn.Linear. Reasons and numbers
are in docs/speed.md.
"""

import ctypes
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

USES = ("train", "chat", "batch")
# Narrower linear layers gain nothing.
WIDE = 256
# Rows of x from which a convolution is faster: for fewer, the weight's new layout costs more.
ROWS = 256
# Rows of x from which a packed weight is read fastest.
FEWEST = 4
# Queries at a time in attention by matmuls: their scores stay in the CPU's cache.
QUERIES = 256
# Tokens up to which a backward pass may keep all attention scores.
LONGEST = 1024
# The length of a compiled step's cache is a multiple of this, so that few lengths are compiled.
ROOM = 512


def speed_up(model, use, compile=False):
    """Replace parts of an MLLM, LLM or tower by forms that suit its device, in place.

    use: "train", "chat" or "batch". compile: use torch.compile, which takes a minute at first.
    """
    if use not in USES:
        raise ValueError(f"use={use!r}: must be one of {', '.join(USES)}")
    device = next(model.parameters()).device.type
    for module in model.modules():
        if hasattr(module, "sdpa"):
            module.sdpa = attention
        if hasattr(module, "attend_packed"):
            module.attend_packed = packed_attention(module.attend_packed, device, compile)
    if use == "train" and compile:
        compile_blocks(model)
    elif use == "chat" and compile and device == "cuda":
        compile_step(model)
    elif use == "batch":
        pack(model)
    else:
        exchange(model)


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
    if slow and (q.shape[2] <= LONGEST or not torch.is_grad_enabled()):
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
    # PyTorch 2.11 takes grouped heads without the option.
    grouped = q.shape[1] != k.shape[1] and torch.__version__ >= "2.12"
    options = {"enable_gqa": True} if grouped else {}
    x = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(before, 0), **options)
    return x.transpose(0, 1)[None]  # (1, H, T, D)


# --- linear layers on a CPU -------------------------------------------------------------------
# PyTorch gives a bfloat16 matmul to oneDNN with the weight in rows. For a few tokens most of the
# time then goes into a new layout of the weight. A float32 matmul goes to Intel's MKL, which uses
# half of the arithmetic of AMD's processors.


@cache
def is_slow(dtype):
    """Tell whether PyTorch's own matmul of this dtype is slow on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    about = Path("/proc/cpuinfo")
    if dtype != torch.float32 or not torch.backends.mkl.is_available() or not about.exists():
        return False
    cpu = about.read_text()
    return "AuthenticAMD" in cpu and "avx512f" in cpu


def gains(weight):
    """Tell whether a faster form is worth it for this weight."""
    return weight.device.type == "cpu" and min(weight.shape) >= WIDE and is_slow(weight.dtype)


def tied_heads(model):
    """Return the LLMs in `model` whose output layer is their embedding, if it gains."""
    llms = [module for module in model.modules() if hasattr(module, "tied_head")]
    return [m for m in llms if m.config.tie_word_embeddings and gains(m.embed_tokens.weight)]


def exchange(model):
    """Let the large linear layers compute by `linear`, in place. Nothing is copied."""
    for module in model.modules():
        if type(module) is nn.Linear and gains(module.weight):
            # The object stays the same: FSDP refers to it.
            module.__class__ = FastLinear
    for llm in tied_heads(model):
        llm.tied_head = linear


class FastLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear in the form that is fastest here.

    x: (..., C); weight: (N, C); bias: (N,) -> (..., N)
    """
    rows = x.numel() // x.shape[-1]
    if weight.dtype == torch.bfloat16 and rows == 1:
        return without_onednn(x, weight, bias)
    autocast = torch.is_autocast_enabled("cpu")
    if weight.dtype == torch.float32 and rows >= ROWS and not autocast:
        return Convolved.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def without_onednn(x, weight, bias):
    """F.linear by PyTorch's own kernel, which does not copy the weight for one row."""
    mkldnn = torch.backends.mkldnn
    before, mkldnn.enabled = mkldnn.enabled, False
    try:
        return F.linear(x, weight, bias)
    finally:
        mkldnn.enabled = before


def pack(model):
    """Copy the large weights into the layout of oneDNN's kernels, one by one."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and gains(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
    for llm in tied_heads(model):
        llm.tied_head = PackedLinear(llm.embed_tokens.weight).forward


class PackedLinear(nn.Module):
    """A linear layer without gradients, whose weight is stored in oneDNN's blocks."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x, weight=None):
        """weight: the argument of a tied head. It is packed already."""
        rows = x.flatten(0, -2)  # (T, C)
        T = len(rows)
        if T < FEWEST:
            rows = F.pad(rows, (0, 0, 0, FEWEST - T))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return y[:T].view(*x.shape[:-1], y.shape[-1])  # (..., N)


def convolved(x, weight, bias=None):
    """F.linear as a 1x1 convolution, which PyTorch gives to oneDNN."""
    # (1, C, T, 1) in "channels last" order, as x is stored: no copy.
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias)  # (1, N, T, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Convolved(torch.autograd.Function):
    """`convolved` with a backward pass of two more such products.

    A convolution's own backward pass would keep x even if the weight is frozen, and takes seconds
    for the weight gradient of an LLM's head.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return convolved(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = bias_grad = None
        rows = gradient.flatten(0, -2)  # (T, N)
        if ctx.needs_input_grad[0]:
            x_grad = convolved(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            x = x.flatten(0, -2)  # (T, C)
            # Faster with the wider one as rows.
            if rows.shape[1] >= x.shape[1]:
                weight_grad = convolved(rows.t(), x.t())  # (N, C)
            else:
                weight_grad = convolved(x.t(), rows.t()).t()  # (N, C)
        if ctx.needs_input_grad[2]:
            bias_grad = rows.sum(0)
        return x_grad, weight_grad, bias_grad


# --- torch.compile ----------------------------------------------------------------------------


def compile_blocks(model):
    """Compile every block, i.e. each module that contains an attention.

    Blocks are quick to compile, and their borders are no breaks in a graph.
    """
    import torch._dynamo

    # DDP would split the blocks where a bucket of gradients is full.
    torch._dynamo.config.optimize_ddp = False
    for module in list(model.modules()):
        if any(hasattr(child, "sdpa") for child in module.children()):
            module.compile(dynamic=True)


def compile_step(model, **options):
    """Compile the LLM's decoding step into one CUDA graph.

    options: of torch.compile; tests give another backend.
    """
    (llm,) = (module for module in model.modules() if hasattr(module, "step"))
    # Tuning finds a kernel for single rows that reads at the memory's bandwidth.
    graph = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    options = options or {"options": graph}
    compiled = torch.compile(llm.step, fullgraph=True, **options)

    def step(token, positions, cache):
        for tensors in (cache.keys, cache.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % ROOM))
                # A graph works on fixed addresses: it may only write to a cache that never moves.
                torch._dynamo.mark_static_address(tensors[layer])
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, positions, cache)

    llm.step = step


# --- memory -----------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc keep freed blocks. By default it returns large ones to the system.

    The next training step would get them again page by page and zeroed, which makes it slower. The
    process's memory then stays at its peak. Other allocators are left alone.
    """
    # The option numbers of malloc.h.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # Blocks below 1 GiB come from the heap, and the heap never shrinks.
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, -1)
