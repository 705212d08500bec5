"""Several ranks: torchrun starts one process, a rank, for each GPU.

common.run.Ranks calls these functions. A run of one process never does.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common.errors import InputError


def connect(device):
    """Meet the other ranks."""
    on_gpu = device.type == "cuda"
    # NCCL's ten minutes are too short while rank 0 writes a large model
    timeout = timedelta(minutes=30)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timeout, device_id=device if on_gpu else None)


def total(tensor, device):
    """Return the sum over all ranks, on the device of `tensor`."""
    summed = tensor.to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def agree(number, what, device):
    """Raise InputError unless a number is the same on all ranks."""
    largest, smallest = torch.tensor([number, -number], device=device)[:, None]
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(smallest, dist.ReduceOp.MAX)
    if largest != -smallest:
        raise InputError(f"the ranks differ in {what}: all nodes must see the same files")


def wait_for(folder, rank):
    """Wait until this rank sees a folder that rank 0 made. Raises InputError."""
    dist.barrier()
    for _ in range(60):  # a network disk may show it late
        if folder.exists():
            return
        time.sleep(1)
    raise InputError(
        f"rank {rank}: does not see {folder}, which rank 0 made: "
        "--out must be on a disk that all nodes share"
    )


def barrier():
    dist.barrier()


def close():
    dist.barrier()
    dist.destroy_process_group()


def data_parallel(model, device):
    """Wrap a model in DDP: every rank has the whole model, and gradients are averaged.

    DDP first copies rank 0's weights to all ranks. Frozen parameters are left out, because writing
    to a mapped file would copy it into every process. So are buffers: BatchNorm's are each rank's.
    """
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DDP(model, device_ids=[device] if device.type == "cuda" else None)
