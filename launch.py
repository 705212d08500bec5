"""What surrounds training: the processes that torchrun started, the folder of the run, and its log.

    check         options that would break a run later
    Ranks         this process among the others: rank, device, sums over all, and whether it was asked to stop
    run_folder    where a run lives, and whether it may
    Log           log.jsonl, TensorBoard, wandb
"""
import errno
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import cli
from hub import InputError


PARTS = ("vision", "connector", "llm")                               # of a model, each of which may learn


class Ranks:
    """This process among those that torchrun started (or alone): its rank, its device, sums over all of them, and whether it
    was asked to stop."""

    def __init__(self, device):
        self.rank, self.size, self.stop = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), False
        self.doing, self.lock = "the start", None                    # for in_contact; the run's folder is this process's alone
        self.device = cli.pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")               # TF32: faster float32 products of ten-bit fractions
        if self.size > 1:
            nccl = self.device.type == "cuda"                        # its ten minutes are short for rank 0 writing a large model
            dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(minutes=30), device_id=self.device if nccl else None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)

    def ask_to_stop(self, number, frame):
        if self.stop:                                                # asked twice: at once
            sys.exit(128 + number)
        self.stop = True
        if multiprocessing.parent_process() is None:                 # a loader's worker has this handler too, and says nothing
            say(self.rank == 0, "\nfinishing this step, then saving (once more: stop at once)")

    def stop_at_once(self):
        """From here on there is nothing to save: a signal ends the process."""
        signal.signal(signal.SIGINT, signal.default_int_handler if self.rank == 0 else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def sum(self, tensor):
        """Sum over all processes; a tensor on the CPU stays there."""
        if self.size > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor = moved.to(tensor.device)
        return tensor

    @contextmanager
    def in_contact(self, run):
        """What happens in here ends in one line if another rank is lost: killed, or ended by an error. Whoever waits for it
        then gets an error from gloo or NCCL, in their words."""
        try:
            yield
        except RuntimeError as error:
            words = "gloo", "NCCL", "Connection ", "Broken pipe"
            killed = "DataLoader worker (pid" in str(error)          # for want of memory, most often
            if not killed and (self.size == 1 or not (isinstance(error, dist.DistError) or any(word in str(error) for word in words))):
                raise
            what = f"a loader's worker ({' '.join(str(error).split())})" if killed else "contact with another rank"
            saved = [path for stage in (1, 2) for path in checkpoint.newest_last(run / "checkpoints", stage)]
            raise InputError(f"rank {self.rank}: lost {what} in {self.doing}; " + (
                f"the last checkpoint is {saved[-1]}: start again with --resume, on any number of ranks" if saved else
                "there is no checkpoint yet: start again")) from None
        finally:
            if self.lock:
                self.lock.close()

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def enter(self, run):
        """Make the run's folder. InputError where it cannot be made, where another process trains in it, or where a rank does not
        see it: checkpoints are written by one and read by all."""
        seen = run / ".ranks"
        if self.rank == 0:
            try:
                run.mkdir(parents=True, exist_ok=True)
                self.lock = self.lock or lock(run / ".lock")        # a second one, let go of, would release the first
                if self.size > 1:
                    seen.touch()
            except OSError as error:
                raise InputError(f"{run}: cannot be written ({error.strerror}); --out= chooses another folder") from None
        if self.size == 1:
            return
        self.barrier()
        for _ in range(60):                                          # a disk of the network may show it late
            if seen.exists():
                break
            time.sleep(1)
        else:
            raise InputError(f"rank {self.rank}: does not see {run}, which rank 0 has made: it must be on a disk that all nodes share")
        self.barrier()
        if self.rank == 0:
            seen.unlink()

    def agree(self, what, number):
        """InputError unless the number is the same on all ranks."""
        mine = torch.zeros(self.size, dtype=torch.float64)
        mine[self.rank] = number
        if len(numbers := {int(each) for each in self.sum(mine)}) > 1:
            raise InputError(f"the ranks differ in {what}, {sorted(numbers)}: they must see the same files, on a disk that all nodes share")

    def close(self):
        self.barrier()
        if self.size > 1:
            dist.destroy_process_group()


def lock(path):
    """The file, open and locked until this process ends (its forked workers do not hold it). InputError if another one does."""
    try:
        import fcntl
    except ImportError:                                              # Windows
        return None
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:                                         # else a disk that knows no locks
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"{path.parent}: another process trains in this folder; --out= chooses another one") from None
    return file


def say(main, text):
    if main:
        try:
            print(text, flush=True)
        except BrokenPipeError:                                      # the reader (head, tee) is gone, the run is not
            sys.stdout = open(os.devnull, "w")


def last_written(run):
    """When the run last wrote a checkpoint or a line of its log."""
    return max(path.stat().st_mtime for path in (run, run / "checkpoints", run / "log.jsonl") if path.exists())


def check(config):
    """InputError for options of train.py that would break a run later, perhaps after hours."""
    if "/" in config.connector or "." in config.connector:
        raise InputError(f"{config.connector}: no such recipe; they are files that end in .toml, in config/")
    if config.stage not in (0, 1, 2):
        raise InputError(f"--stage={config.stage}: 1, 2, or 0 for both")
    if config.init and config.stage != 2:
        raise InputError("--init says where stage 2 starts: it goes with --stage=2")
    if config.image_mode not in ("pad", "crop", "stretch"):
        raise InputError(f"--image_mode={config.image_mode}: pad, crop or stretch")
    least = dict(batch1=1, batch2=1, micro_batch=1, log_every=1, save_every=1, max_length=1, steps1=0, steps2=0, seed=0,
                 workers=0, lora_rank=0, lora_alpha=0, lora_lr2=0)
    for key, value in (least | dict(clip=0, lr1=0, lr2=0, connector_lr2=0, warmup=0, weight_decay=0, image_size=0)).items():
        if not value <= (getattr(config, key) or 0) < 2 ** 63:       # nor NaN
            raise InputError(f"--{key}={getattr(config, key)}: should be {value} or more")
    if config.warmup > 1:
        raise InputError(f"--warmup={config.warmup}: is a share of the steps, 1 at most")
    if not 0 <= config.beta2 < 1:
        raise InputError(f"--beta2={config.beta2}: should be 0 or more, and less than 1")
    for stage in (1, 2):
        if config.stage in (0, stage) and not getattr(config, f"steps{stage}") and not (
                0 < getattr(config, f"epochs{stage}") < math.inf):
            raise InputError(f"--epochs{stage}={getattr(config, f'epochs{stage}')}: should be more than 0 where --steps{stage} is 0")
    for key in ("train1", "train2"):
        parts = getattr(config, key)
        if not parts or set(parts) - set(PARTS):
            raise InputError(f"--{key}={','.join(parts)}: what learns is one or more of {', '.join(PARTS)}")
    if config.lora_rank and "llm" not in config.train1 + config.train2:
        raise InputError(f"--lora_rank={config.lora_rank}: adapters are the LLM's, and neither --train1 nor --train2 trains llm")
    if not config.lora_rank and (config.lora_alpha or config.lora_lr2):
        raise InputError("--lora_alpha and --lora_lr2 are those of adapters, and without --lora_rank there are none")


def run_folder(config):
    """Where this run lives. A run that is there already is never written over."""
    goes_on = config.resume or (config.stage == 2 and not config.init)
    name = lambda i: Path("out") / (config.connector + (f"-{i}" if i > 1 else ""))
    there = [name(i) for i in range(1, 10_000) if name(i).exists()]
    if goes_on:                                                      # what failed before its first step is passed over
        there = [run for run in there if (run / "log.jsonl").exists()] or there
    if goes_on and not there and not config.out:
        raise InputError(f"nothing to go on with under {name(1)}: name the run with --out, or run stage 1 first")
    run = Path(config.out) if config.out else (max(there, key=last_written) if goes_on else
                                               next(name(i) for i in range(1, 10_000) if name(i) not in there))
    if run.exists() and not run.is_dir():
        raise InputError(f"--out={run}: is a file; a run needs a folder")
    held = [stage for stage in (1, 2) if checkpoint.newest_last(run / "checkpoints", stage)]
    last = (config.stage or 2) if config.resume else (config.stage or 1) - 1     # the last stage that may be there
    if held and held[-1] > last or not goes_on and (run / "model").exists():
        raise InputError(f"{run}: holds a run{f' of stage {held[-1]}' if held else ''} already; " + (
            "leave out --stage=1 to go on with it" if config.resume else "--resume goes on with it, another --out starts anew"))
    for stage in held if config.resume else []:
        if config.stage in (0, stage):
            checkpoint.check_same(config, checkpoint.newest_last(run / "checkpoints", stage)[-1])
    return run


def is_before(line, stage, step):
    """Whether a line of log.jsonl tells of a step before this one; the last line of a killed run may be half a line."""
    try:
        record = json.loads(line)
        return (record["stage"], record["step"]) < (stage, step)
    except (ValueError, TypeError, KeyError):
        return False


class Log:
    """log.jsonl, and TensorBoard or wandb where asked for; rank 0 alone writes. A stage begins, or goes on, at step `start`."""

    def __init__(self, config, run, main, stage, start):
        self.main, self.path, self.board, self.wandb = main, run / "log.jsonl", None, None
        if main and self.path.exists():                              # what a killed run did after its last checkpoint comes again
            lines = self.path.read_text().splitlines(True)
            kept = [line for line in lines if is_before(line, stage, start)]
            if not config.resume and len(kept) < len(lines):         # of a run that left no checkpoint, or another's
                self.path.with_name("log.jsonl.old").write_text("".join(lines))
            partial = self.path.with_name("log.jsonl.partial")
            partial.write_text("".join(kept))
            partial.replace(self.path)
        for name in config.log:
            if name not in ("tensorboard", "wandb"):
                raise InputError(f"--log={name}: tensorboard or wandb")
            try:
                if name == "tensorboard":
                    from torch.utils.tensorboard import SummaryWriter
                    self.board = SummaryWriter(run) if main else None
                else:
                    import wandb
                    self.wandb = (wandb.run or wandb.init(project="mllm", config=asdict(config))) if main else None
            except ImportError:
                raise InputError(f"--log={name}: not installed; pip install {name}") from None

    def write(self, record):
        if self.main:
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}       # JSON has no NaN
            with open(self.path, "a") as file:
                file.write(json.dumps(finite) + "\n")
            if self.board:
                for key in ("loss", "lr", "gradient_norm", "tokens_per_second"):
                    self.board.add_scalar(f"stage{record['stage']}/{key}", record[key], record["step"])
                self.board.flush()                                   # a killed run keeps what it wrote
            if self.wandb:
                self.wandb.log({f"stage{record['stage']}/{key}": value for key, value in record.items()})
