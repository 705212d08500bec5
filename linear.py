"""nn.Linear on a CPU, by another part of PyTorch where the one that it takes by itself is slower. The sums are the same, in another
order; all of it may be left out.

    by_row            one answer's words, bfloat16: a single row's product without oneDNN
    pack              many answers at once: weights that lie as oneDNN's kernels read them
    by_convolution    training and prompts: float32 on AMD's processors with AVX-512

PyTorch hands a bfloat16 product to oneDNN with the weights in rows, and of a few tokens' product most of the time goes into laying
them out anew. A float32 product it hands to Intel's MKL, which on AMD's processors leaves half of their arithmetic unused.
"""
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDE = 256                                                           # what a map takes and gives; narrower ones win nothing
ROWS = 256                                                           # of x; with fewer the weights' new layout costs more
FEWEST = 4                                                           # rows of x for which a packed weight is read fastest


@cache
def slow_in(dtype):
    """Whether PyTorch's own product of this dtype is the slower one on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    about = Path("/proc/cpuinfo")
    if dtype != torch.float32 or not torch.backends.mkl.is_available() or not about.exists():
        return False
    words = about.read_text()
    return "AuthenticAMD" in words and "avx512f" in words


def gains(weight):
    """Whether another product is worth it for this weight: on a CPU, wide enough, of a dtype whose own product is the slower one."""
    return weight.device.type == "cpu" and min(weight.shape) >= WIDE and slow_in(weight.dtype)


def exchange(model, dtype, kind, product):
    """Make the large maps of this dtype, if they gain, maps of another kind, in place: the same parameters under the same names."""
    wins = lambda weight: weight.dtype == dtype and gains(weight)
    for module in model.modules():
        if type(module) is nn.Linear and wins(module.weight):
            module.__class__ = kind
        if getattr(module, "linear", None) is F.linear and wins(module.embed_tokens.weight):
            module.linear = product                                  # a Llama's head, where it is its embedding


# --- generation -------------------------------------------------------------------------------------------------------

def one_row(x, weight, bias=None):
    """F.linear. Of a single row, a word of one answer, not by oneDNN but by PyTorch's own kernel: it reads the weight as it lies,
    which is all that there is to do, and takes the sum in float32. With two rows it would read the weight twice."""
    if x.numel() > x.shape[-1]:
        return F.linear(x, weight, bias)
    mkldnn = torch.backends.mkldnn                                   # oneDNN's name of old
    before, mkldnn.enabled = mkldnn.enabled, False
    try:
        return F.linear(x, weight, bias)
    finally:
        mkldnn.enabled = before


class LinearByRow(nn.Linear):
    """nn.Linear by `one_row`."""

    def forward(self, x):
        return one_row(x, self.weight, self.bias)


def by_row(model):
    """Let the large linear maps of a bfloat16 model that answers one question at a time be computed by `one_row`, in place. Nothing
    is copied."""
    exchange(model, torch.bfloat16, LinearByRow, one_row)


class PackedLinear(nn.Module):
    """A linear map whose weight lies in oneDNN's blocks: a copy that only this reads, without gradients."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x):
        rows = x.flatten(0, -2)  # (T, C)
        T = len(rows)
        if T < FEWEST:                                               # oneDNN's kernels for one and two rows are slower
            rows = F.pad(rows, (0, 0, 0, FEWEST - T))
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return y[:T].view(*x.shape[:-1], y.shape[-1])  # (..., N)


def pack(model):
    """Exchange the large linear maps of a model that only generates, in place -> how many there were. Copying them takes as
    long as some dozens of tokens; the weights that they were are let go one by one."""
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and gains(child.weight):
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                packed += 1
        if getattr(parent, "linear", None) is F.linear and parent.config.tie_word_embeddings and gains(parent.embed_tokens.weight):
            head = PackedLinear(parent.embed_tokens.weight)          # a Llama whose head is its embedding
            parent.linear = lambda hidden, weight, head=head: head(hidden)
            packed += 1
    return packed


# --- training ---------------------------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """F.linear by oneDNN. x (..., C), weight (N, C), bias (N,) -> (..., N)"""
    return F.linear(x, weight, bias) if x.numel() < ROWS * x.shape[-1] else Product.apply(x, weight, bias)


def convolved(x, weight, bias=None):
    """The product as a convolution of one by one over a picture one pixel wide: convolutions PyTorch gives to oneDNN."""
    picture = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)   # (1, C, T, 1); "channels last", as x lies: no copy
    y = F.conv2d(picture, weight[:, :, None, None], bias)  # (1, N, T, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Product(torch.autograd.Function):
    """`convolved`, with a backward pass of two more such products. A convolution's own would keep x even where the weight does
    not learn, in stage 1 nearly twice the memory, and takes seconds for the gradient of an LLM's head."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return convolved(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (x_learns, weight_learns, bias_learns) = ctx.saved_tensors, ctx.needs_input_grad
        rows, of_weight = gradient.flatten(0, -2), None  # (T, N)
        if weight_learns:
            x = x.flatten(0, -2)  # (T, C); the wider one is the rows: that is faster
            of_weight = convolved(rows.t(), x.t()) if rows.shape[1] >= x.shape[1] else convolved(x.t(), rows.t()).t()  # (N, C)
        return convolved(gradient, weight.t()) if x_learns else None, of_weight, rows.sum(0) if bias_learns else None


class LinearByConvolution(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def by_convolution(model):
    """Let the large linear maps of a float32 model be computed by `linear`, in place; where nothing is gained by it, nothing
    changes. Not together with torch.compile, which would compile a convolution anew for every length."""
    exchange(model, torch.float32, LinearByConvolution, linear)
