"""A model larger than one card: --fsdp spreads what is large over all ranks, and gathers it when it is needed.

PyTorch's own fully_shard (FSDP2; ZeRO stage 3 of arXiv 1910.02054, torch.distributed.fsdp). Of every tensor (n, ...) rank r of N
keeps the rows from r·ceil(n/N) to (r+1)·ceil(n/N), and so of its gradient and of AdamW's moments:

    forward    a unit gathers its rows from all ranks, computes, and gives the others' rows back
    backward   it gathers them once more, computes, and every rank gets the sum (mean) of the gradient's rows that it keeps

A unit is a block of the LLM, a tower or a connector that learns; the rest of the LLM (embedding, final norm, lm_head) belongs to the
whole model, whose forward gathers it, and which keeps it until its backward pass is over. What is frozen and small (towers,
the connector) stays whole on every rank, as under DDP; a frozen LLM is spread as well.

No rank ever holds the whole: the LLM comes as it lies in its files, mapped into memory and not read (hub.py), and `spread` takes
unit by unit. Checkpoints are written by all ranks, each its own rows (checkpoint.py); the finished model by rank 0, which is
handed one whole tensor at a time (`gathered`).
"""
import warnings

import torch
import torch.distributed as dist

from lora import LoRALinear


def spread(model, device, llm_dtype, bf16):
    """Spread an MLLM over all ranks, in place; requires_grad has been set, its LLM may lie on the CPU in any dtype. What learns
    becomes float32, a frozen LLM llm_dtype. bf16: what is gathered, travels as bfloat16, gradients as float32."""
    from torch.distributed.device_mesh import init_device_mesh       # imported here: a run without --fsdp need not wait for it
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")        # none is changed in place here
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32 if bf16 else None, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "mp_policy": policy}
    learns = lambda module: any(p.requires_grad for p in module.parameters())
    small = [*model.vision, model.connector]
    whole = {p for module in small if not learns(module) for p in module.parameters()}         # stays so on every rank
    for unit in [*model.llm.layers, *filter(learns, small), model]:
        for p in unit.parameters():                                  # of the model: what no unit before it has taken
            if p not in whole and not is_spread(p):
                p.data = p.data.to(device, torch.float32 if p.requires_grad else llm_dtype)
        fully_shard(unit, ignored_params=whole, **options)


def is_spread(tensor):
    return hasattr(tensor, "full_tensor")                            # PyTorch's DTensor


def whole(tensor):
    """All rows of a tensor, on every rank: all must ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def rows_of(tensor):
    """The rows that this rank keeps, as a plain tensor that shares their memory, and which they are: start, stop."""
    if not is_spread(tensor):
        return tensor, 0, len(tensor) if tensor.dim() else 1
    n, each = len(tensor), -(-len(tensor) // dist.get_world_size())
    return tensor.to_local(), min(n, dist.get_rank() * each), min(n, (dist.get_rank() + 1) * each)


@torch.no_grad()
def gathered(model):
    """Yield (name, tensor) of the whole model, adapters merged, one tensor at a time; all ranks must go through it."""
    adapted = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, tensor in model.state_dict().items():
        if name in adapted:
            yield name, adapted[name].merged_weight(whole)
        elif ".lora_" not in name:
            yield name, whole(tensor)
