"""A model larger than one card: --fsdp spreads what is large over all ranks, and gathers it when it is needed.

PyTorch's own fully_shard (FSDP2; stage 3 of ZeRO, arXiv 1910.02054). Of every tensor (n, ...) rank r of N keeps the rows from
r·ceil(n/N) to (r+1)·ceil(n/N), and so of its gradient and of AdamW's moments:

    forward    a unit gathers its rows from all ranks, computes, and frees those of the others
    backward   it gathers them once more, computes, and every rank gets the mean over ranks of the gradient's rows that it keeps

A unit is a block of the LLM, a tower or a connector that learns; the rest of the LLM (embedding, final norm, lm_head) belongs to
the whole model, whose forward gathers it, and which keeps it until its backward pass is over. A frozen LLM is spread as well;
frozen towers and a frozen connector are small and stay whole on every rank, as under DDP.

No rank ever holds the whole: the LLM comes as it lies in its files, mapped into memory and not read (hub.py), and every rank
reads the rows that it keeps. Checkpoints are written by all ranks, each its own rows (checkpoint.py); the finished model by rank 0,
which is handed one whole tensor at a time (`gathered`).
"""
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn

from lora import LoRALinear


def spread(model, device, llm_dtype, bf16):
    """Spread an MLLM over all ranks, in place; requires_grad has been set, and its LLM may lie on the CPU in any dtype. What
    learns becomes float32, a frozen LLM llm_dtype. bf16: the LLM's weights travel (and compute) as bfloat16, its gradients as
    float32; what is small travels as float32, for autocast, as under DDP."""
    from torch.distributed.device_mesh import init_device_mesh       # imported here: a run without --fsdp need not wait for it
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")        # none is changed in place here
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)          # RoPE's tables are float32 and stay so
    halved = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    learning = [part for part in (*model.vision, model.connector) if any(p.requires_grad for p in part.parameters())]
    source = {}                                                      # {name: tensor}, while the model holds only its shape
    large = {p for part in (model.llm, *learning) for p in part.parameters()}
    for name, p in list(model.named_parameters()):
        if p in large:
            source[name] = p.detach()
            place, _, leaf = name.rpartition(".")
            shape = torch.empty(p.shape, device="meta", dtype=torch.float32 if p.requires_grad else llm_dtype)
            setattr(model.get_submodule(place), leaf, nn.Parameter(shape, requires_grad=p.requires_grad))
    kept_whole = {p for p in model.parameters() if not p.is_meta}
    for unit in [*model.llm.layers, *learning, model]:
        fully_shard(unit, mesh=mesh, mp_policy=halved if bf16 and unit not in learning else exact, ignored_params=kept_whole)
    rows = {}
    for name, p in model.named_parameters():
        if name in source:
            _, start, stop = rows_of(p)
            own = source.pop(name)[start:stop].to(device, p.dtype, copy=True)
            rows[name] = DTensor.from_local(own, mesh, p.placements, shape=p.shape, stride=p.stride())
    model.load_state_dict(rows, strict=False, assign=True)


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
