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
    """Meet the other ranks. Raises InputError if they cannot be reached."""
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            # NCCL's ten minutes are too short while rank 0 writes a large model
            timeout=timedelta(minutes=30),
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the ranks cannot meet: {reason}; check torchrun's options") from None


def total(tensor, device):
    """Return the sum over all ranks, on the device of `tensor`."""
    summed = tensor.to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def agree(what, number, device):
    """Raise InputError unless the number is the same on all ranks."""
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.float64)
    numbers[dist.get_rank()] = number
    numbers = sorted({int(each) for each in total(numbers, device)})
    if len(numbers) > 1:
        raise InputError(
            f"the ranks differ in {what}, {numbers}: "
            "all nodes must see the same files, on a shared disk"
        )


def wait_for(file, rank):
    """Wait until this rank sees a file that rank 0 made. Raises InputError."""
    dist.barrier()
    waited = 0
    while not file.exists():  # a network disk may show it late
        if waited == 60:
            raise InputError(
                f"rank {rank}: does not see {file.parent}, which rank 0 made: "
                "--out must be on a disk that all nodes share"
            )
        time.sleep(1)
        waited += 1


def barrier():
    dist.barrier()


def close():
    dist.barrier()
    dist.destroy_process_group()


def data_parallel(model, device):
    """Wrap a model in DDP: every rank has the whole model, and gradients are averaged.

    DDP first copies rank 0's weights to all ranks. Frozen parameters are left out, because writing
    to a mapped file would copy it into every process. Buffers are equal on all ranks.
    """
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DDP(model, device_ids=[device] if device.type == "cuda" else None)
