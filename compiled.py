"""What torch.compile makes faster, and why not more of it. All of it may be left out: the models compute the same without.

    compile_blocks    training: the blocks of a tower or an LLM, for rows of any lengths
    compile_step      generation on CUDA: a step as a whole
"""
import torch

import llama


def compile_blocks(blocks, **options):
    """torch.compile, block by block: quick to compile, and no break at a block's borders. Attention sequence by sequence stays
    outside, or it would be compiled anew for every set of lengths. DDP would cut the blocks' graphs where a bucket of gradients
    is full: a block is small enough to be sent as it is."""
    import torch._dynamo
    torch._dynamo.config.optimize_ddp = False
    llama.attend_each = torch.compiler.disable(llama.attend_each)    # not at import: this imports the compiler
    for block in blocks:
        block.compile(dynamic=True, **options)


def compile_step(llm, backend="inductor"):
    """Let `llm` take its steps of generation, a token a row, compiled as a whole. With CUDA graphs (never run: there was no GPU) a
    step is one launch in place of hundreds. A graph works at fixed addresses and shapes, so the cache's tensors are declared to stay
    where they are, and its room is rounded up: few lengths are compiled. A backend other than inductor only traces, for tests."""
    # tuning makes a row's products of a kernel that reads at the memory's bandwidth, and fuses with norm and SiLU
    options = {"triton.cudagraphs": True, "coordinate_descent_tuning": True} if backend == "inductor" else None
    compiled = torch.compile(llm.step, fullgraph=True, backend=backend, options=options)

    def step(token, positions, cache):
        for tensor in (*cache.keys, *cache.values):
            torch._dynamo.mark_static_address(tensor)                # else a graph that writes into it would not be captured
        torch.compiler.cudagraph_mark_step_begin()                   # what the step before returned may be written over
        return compiled(token, positions, cache)
    llm.step, llm.room_of = step, 512
