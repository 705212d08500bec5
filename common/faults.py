"""Faults of a training run, and what to do: skipped steps, nothing to learn, lost processes."""

import sys

import torch.distributed as dist

from common.errors import InputError

LOST_RANK = ("gloo", "NCCL", "Connection ", "Broken pipe")  # in the error of a rank that waits
LOST_WORKER = "DataLoader worker (pid"  # killed, most often because memory ran out


def print_bad_step(step, loss, norm, micro_batches, losses):
    """Name the samples of this rank whose loss is not finite."""
    names = []
    for batch, loss_sum in zip(micro_batches, losses, strict=True):
        if not loss_sum.isfinite():
            names += batch.ids
    among = f" (among {', '.join(names)})" if names else ""
    message = f"step {step}: loss {loss}, gradient norm {norm}: step skipped{among}"
    print(message, file=sys.stderr, flush=True)


def check_progress(stage, step, bad_steps, empty_steps, steps):
    """Raise InputError after ten bad steps in a row, or ten without a supervised token."""
    if bad_steps == 10:
        raise InputError(
            f"step {step}: ten steps in a row without a finite loss: continue from the last "
            f"checkpoint with --resume and a lower --lr{stage}"
        )
    if empty_steps == min(10, steps):
        raise InputError(
            f"step {step}: {empty_steps} steps in a row without a supervised token: is "
            "--max_length shorter than the visual tokens of an image?"
        )


def lost_process(error):
    """Say which process a RuntimeError is about that was killed or ended with an error, or ""."""
    text = " ".join(str(error).split())
    if LOST_WORKER in text:
        return f"a worker of the data loader ({text})"
    is_lost = isinstance(error, dist.DistError) or any(word in text for word in LOST_RANK)
    return "contact with another rank" if is_lost and dist.is_initialized() else ""
