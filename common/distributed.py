"""Several ranks: torchrun starts one process, a rank, for each GPU. See common.run.Ranks."""

from datetime import timedelta

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP


def connect(device):
    """Join the other ranks: NCCL on GPUs, gloo on CPUs."""
    # NCCL's ten minutes are too short while rank 0 writes a large model
    timeout = timedelta(minutes=30)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def data_parallel(model, device):
    """Wrap a model in DDP: every rank has the whole model, and gradients are averaged.

    DDP first copies rank 0's weights to all ranks. Frozen parameters are left out, because writing
    to a mapped file would copy it into every process. So are buffers: BatchNorm's are each rank's.
    """
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)
    devices = [device] if device.type == "cuda" else None
    # gradients are views of the buffers that DDP sends, not copies
    return DDP(model, device_ids=devices, gradient_as_bucket_view=True)
