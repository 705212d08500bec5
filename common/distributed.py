"""The processes that torchrun started. Each is one rank; without torchrun there is one rank.

A run folder belongs to one run: rank 0 locks it. If a rank is killed, the others end with one line.
"""

import errno
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import checkpoint, cli
from common.errors import InputError

LOST_RANK = ("gloo", "NCCL", "Connection ", "Broken pipe")  # in the error of a rank that waits
LOST_WORKER = "DataLoader worker (pid"  # killed, most often because memory ran out


class Ranks:
    """This process among all ranks: rank, size, device, and whether it was asked to stop."""

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = cli.pick_device(device)
        self.stop = False
        self.doing = "the start"  # for the message of `guard`
        self.lock = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32: faster float32 matmuls
        if self.size > 1:
            on_gpu = self.device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                # NCCL's ten minutes are too short while rank 0 writes a large model
                timeout=timedelta(minutes=30),
                device_id=self.device if on_gpu else None,
            )
        signal.signal(signal.SIGINT, self.ask_to_stop)
        signal.signal(signal.SIGTERM, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        """Handle a signal: stop after this step. A second signal stops at once."""
        if self.stop:
            sys.exit(128 + number)
        self.stop = True
        # workers of the data loader inherit this handler
        if multiprocessing.parent_process() is None:
            self.print("\nfinishing this step, then saving (once more: stop at once)")

    def restore_signals(self):
        """Let a signal end the process from here on: nothing is left to save."""
        on_interrupt = signal.default_int_handler if self.is_main else signal.SIG_DFL
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def print(self, text):
        """Print on rank 0 only. A closed pipe (head, tee) does not end the run."""
        if self.is_main:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")

    def sum(self, tensor):
        """Return the sum over all ranks, on the device of `tensor`."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def shards(self, config):
        """Tell whether the model is sharded over the ranks (common/fsdp.py)."""
        return config.fsdp and self.size > 1

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def agree(self, what, number):
        """Raise InputError unless the number is the same on all ranks."""
        numbers = torch.zeros(self.size, dtype=torch.float64)
        numbers[self.rank] = number
        numbers = sorted({int(each) for each in self.sum(numbers)})
        if len(numbers) > 1:
            raise InputError(
                f"the ranks differ in {what}, {numbers}: "
                "all nodes must see the same files, on a shared disk"
            )

    def enter(self, run):
        """Make and lock the run folder.

        Raises InputError if it cannot be written, if another process trains in it, or if a rank
        does not see it (rank 0 writes checkpoints, and all ranks read them).
        """
        seen = run / ".ranks"
        if self.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
                # closing a second handle on the file would release the lock of the first
                self.lock = self.lock or lock(run / ".lock")
                if self.size > 1:
                    seen.touch()
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                raise InputError(f"{run}: {reason}; --out= chooses another folder") from None
        if self.size == 1:
            return
        self.barrier()
        waited = 0
        while not seen.exists():  # a network disk may show it late
            if waited == 60:
                raise InputError(
                    f"rank {self.rank}: does not see {run}, which rank 0 made: "
                    "--out must be on a disk that all nodes share"
                )
            time.sleep(1)
            waited += 1
        self.barrier()
        if self.is_main:
            seen.unlink()

    @contextmanager
    def guard(self, run):
        """Convert a lost-rank error of gloo or NCCL into a one-line InputError.

        The other ranks get such an error when one was killed or ended with an error.
        """
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if LOST_WORKER in text:
                lost = f"a worker of the data loader ({text})"
            elif self.size > 1 and self.is_lost_rank(error):
                lost = "contact with another rank"
            else:
                raise
            saved = checkpoint.newest(run, 2) or checkpoint.newest(run, 1)
            advice = "there is no checkpoint yet: start again"
            if saved:
                advice = f"resume from {saved} with --resume, on any number of ranks"
            message = f"rank {self.rank}: lost {lost} in {self.doing}; {advice}"
            raise InputError(message) from None
        finally:
            if self.lock:
                self.lock.close()

    def is_lost_rank(self, error):
        return isinstance(error, dist.DistError) or any(word in str(error) for word in LOST_RANK)

    def close(self):
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def data_parallel(model, ranks):
    """Wrap a model in DDP: every rank has the whole model, and gradients are averaged.

    DDP first copies rank 0's weights to all ranks. Frozen parameters are left out, because writing
    to a mapped file would copy it into every process. Buffers are equal on all ranks.
    """
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DDP._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DDP(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def lock(path):
    """Open and lock a file until this process ends. Raises InputError if another one holds it.

    Forked workers of the data loader do not hold the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # other errors: the disk does not support locks
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"{path.parent}: another process trains in this folder; "
                "--out= chooses another folder"
            ) from None
    return file
