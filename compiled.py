"""What torch.compile makes faster, and why not more of it. All of it may be left out: the models compute the same without.

    compile_blocks      training: the blocks of a tower or an LLM, for rows of any lengths
    compile_decoding    generation: on a CPU the products of a single row, on CUDA a step as a whole
"""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import llama


def compile_blocks(blocks, **options):
    """torch.compile, block by block: quick to compile, and no break at a block's borders. Attention sequence by sequence stays
    outside, or it would be compiled anew for every set of lengths."""
    llama.attend_each = torch.compiler.disable(llama.attend_each)    # not at import: this imports the compiler
    for block in blocks:
        block.compile(dynamic=True, **options)


LONGEST_SUM = 4096                                                   # above it inductor's sum is another one, at half the speed


def product_and_sum(x, weight):
    """weight (N, P, K/P) times x (P, K/P) -> (N,): multiplied and added up in float32, in P parts."""
    return (weight.float() * x.float()).sum(2).sum(1).to(x.dtype)


def linear_of_one_row(compiled, x, weight, bias=None):
    """F.linear, except for a single row on a CPU: a step of generation. It reads every weight for two operations each, so the
    memory sets its pace; PyTorch's matrix product reaches half of that or less, a compiled product_and_sum most of it."""
    one_row = x.numel() == x.shape[-1] and x.dtype == weight.dtype and x.device.type == "cpu"
    if not one_row or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    N, K = weight.shape
    parts = next(parts for parts in range(1, K + 1) if K % parts == 0 and K // parts <= LONGEST_SUM)
    weight = weight.detach()                                         # of a Parameter every shape would be compiled anew
    y = compiled(x.reshape(parts, -1), weight.view(N, parts, -1)).view(*x.shape[:-1], N)
    return y if bias is None else y + bias


def compile_step(llm, **options):
    """Let `llm` take its steps of generation, a token a row, compiled as a whole. options: torch.compile's; with CUDA graphs
    (mode="reduce-overhead") a step is one launch in place of hundreds. A graph works at fixed addresses and shapes, so the
    cache's tensors are declared to stay where they are, and its room is rounded up: few lengths are compiled."""
    compiled = torch.compile(llm.step, fullgraph=True, **options)

    def step(token, positions, cache):
        for tensor in (cache.keys, cache.values):
            torch._dynamo.mark_static_address(tensor)                # else a graph that writes into it would not be captured
        torch.compiler.cudagraph_mark_step_begin()                   # what the step before returned may be written over
        return compiled(token, positions, cache)
    llm.step, llm.room_of = step, 512


def compile_decoding(llm):
    """Let `llm` generate faster -> True, or False where there is no C++ compiler: then all stays as it is. On a CPU through
    linear_of_one_row: one kernel serves all shapes, and inductor keeps it on the disk: the first run takes seconds longer, the
    others one. On CUDA by compile_step, which was never run there: there was no GPU."""
    if llm.embed_tokens.weight.is_cuda:
        compile_step(llm, mode="reduce-overhead")
        return True
    compiled, weight = torch.compile(product_and_sum, dynamic=True), llm.embed_tokens.weight
    try:
        with torch.no_grad():
            compiled(weight.new_ones(1, 96, device="cpu"), weight.new_ones(64, 1, 96, device="cpu"))
    except torch._inductor.exc.InductorError:
        return False
    llm.linear = partial(linear_of_one_row, compiled)
    for module in llm.modules():
        if type(module) is nn.Linear:
            module.forward = lambda x, module=module: llm.linear(x, module.weight, module.bias)
    return True
