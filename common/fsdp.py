"""Training a model that is larger than one GPU: --fsdp shards it over all ranks.

This is PyTorch's fully_shard (FSDP2, stage 3 of ZeRO, arXiv 1910.02054). Rank r of N keeps rows
r·ceil(n/N) to (r+1)·ceil(n/N) of every tensor (n, ...), of its gradient, and of AdamW's moments:

    forward    a unit gathers its rows from all ranks, computes, and frees the rows of the others
    backward   it gathers them again, computes, and each rank gets its rows of the mean gradient

A unit is a block of the LLM, a trained tower or a trained connector. The rest of the LLM
(embedding, final norm, lm_head) belongs to the whole model: it is gathered in the forward pass and
kept until the backward pass is over. A frozen LLM is sharded too. Frozen towers and a frozen
connector are small: every rank has all of them, as with DDP.

With --fsdp_replicas=2 (HSDP) each half of the ranks is a replica: it shards a copy of the model as
above, and its N is half as large. After every backward pass the replicas average their gradients.

No rank ever holds the whole model. pretrained.py maps the LLM's files into memory without reading
them, and each rank reads its rows. All ranks write a checkpoint, each its rows (checkpoint.py).
Rank 0 writes the finished model, one gathered tensor at a time (`gathered`).
"""

import warnings

import torch
import torch.distributed as dist

from common.lora import LoRALinear


def shard(model, device, replicas, llm_dtype, bf16):
    """Shard an MLLM over the ranks of its replica, in place. requires_grad must be set before.

    The LLM may be on the CPU in any dtype. Trained parameters become float32, a frozen LLM becomes
    llm_dtype. bf16: the LLM's blocks are gathered and computed in bfloat16, and their gradients are
    reduced in float32. A trained tower or connector is gathered in float32 and cast by autocast.
    """
    # imported here, so that a run without --fsdp starts faster
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    # a view would be a problem only if it were changed in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    sizes = replicas, dist.get_world_size() // replicas
    ranks = init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "rows"))
    replica = ranks["rows"]  # that of this rank
    mesh = ranks if replicas > 1 else replica
    # inputs keep their dtype: the tables of RoPE stay float32
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    parts = [*model.vision, model.connector]
    trained = [part for part in parts if any(p.requires_grad for p in part.parameters())]
    source = detach_tensors(model, [model.llm, *trained], llm_dtype)
    ignored = {p for p in model.parameters() if not p.is_meta}
    for unit in [*model.llm.layers, *trained, model]:
        policy = bfloat16 if bf16 and unit not in trained else float32
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    shards = {}
    for name, p in model.named_parameters():
        if name in source:
            rows_per_rank = -(-len(p) // replica.size())
            start = replica.get_local_rank() * rows_per_rank
            rows = source.pop(name)[start : start + rows_per_rank]
            rows = rows.to(device, p.dtype, copy=True)
            shards[name] = DTensor.from_local(
                rows, mesh, p.placements, shape=p.shape, stride=p.stride()
            )
    model.load_state_dict(shards, strict=False, assign=True)


def detach_tensors(model, parts, llm_dtype):
    """Replace the parameters of `parts` by shapes on the meta device -> {name: tensor} of them."""
    sharded = {p for part in parts for p in part.parameters()}
    source, shapes = {}, {}
    for name, p in model.named_parameters():
        if p in sharded:
            source[name] = p.detach()
            dtype = torch.float32 if p.requires_grad else llm_dtype
            shapes[name] = torch.empty_like(p, device="meta", dtype=dtype)
    model.load_state_dict(shapes, strict=False, assign=True)
    return source


def full(tensor):
    """Gather all rows of a tensor, if it is a DTensor, on every rank. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def gathered(model):
    """Yield (name, full tensor) of a sharded model, LoRA adapters merged. All ranks iterate."""
    adapted = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapted[f"{name}.weight"] = module
    for name, tensor in model.state_dict().items():
        if name in adapted:
            yield name, adapted[name].merged_weight(full)
        elif ".lora_" not in name:
            yield name, full(tensor)
