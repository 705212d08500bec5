"""A training run: its options, its processes, its folder, its log and what it prints.

out/dense/log.jsonl      one line of numbers every log_every steps; "loss" and "tokens" are the
                         step's, "mean_loss" and "skipped" are of all steps since the last line
out/dense/loss.png       the mean losses
out/dense/checkpoints/   see checkpoint.py
out/dense/model/         the finished model
out/dense/adapter/       with LoRA, the adapters alone
"""

import errno
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

from common import checkpoint, distributed, faults
from common.cli import option, pick_device
from common.errors import InputError
from common.pretrained import LARGE, stored

PARTS = ("vision", "connector", "llm")  # the parts of a model that can be trained
AT_LEAST_1 = "batch1 batch2 micro_batch log_every save_every max_length".split()
AT_LEAST_0 = (
    "steps1 steps2 seed workers image_size lr1 lr2 connector_lr2 "
    "lora_rank lora_alpha lora_lr2 clip weight_decay warmup"
).split()


@dataclass
class Config:
    connector: str = option(
        "dense", "a name in connector.py, such as dense or comm", section="model"
    )
    connector_options: dict = option({}, "of the connector, such as --connector.groups=3 (above)")
    vision: list[str] = option([], "towers: folders or hub ids; default: the tiny ones")
    llm: str = option("", "folder or hub id; default: the tiny LLaMA")
    tokenizer: str = option("", "folder or hub id; default: the LLM's")
    template: str = option("", "chat template of stage 2; default: the LLM's")
    template1: str = option("plain", "template of stage 1")
    image_size: int = option(0, "side in pixels; 0: what the first tower was trained at")
    image_mode: str = option("pad", "pad, crop or stretch an image to a square")
    stage: int = option(
        0, "1, 2, or 0: both", section="stages (options that end in 1 or 2 belong to that stage)"
    )
    init: str = option(
        "", "start stage 2 from this checkpoint or connector; default: stage 1; 'new': none"
    )
    train1: list[str] = option(["connector"], "trainable parts: vision, connector, llm")
    train2: list[str] = option(["connector", "llm"], "the same for stage 2")
    data1: list[str] = option(["world"], "LLaVA's .json or .jsonl, rec:FILE, reg:FILE, or world")
    data2: list[str] = option(["world"], "several files are mixed in proportion to their size")
    equal1: bool = option(False, "repeat the smaller files: all count alike")
    equal2: bool = option(False, "the same for stage 2")
    image_dir: str = option("", "folder of the images; default: the folder of each data file")
    max_length: int = option(2048, "longest dialogue in tokens; later turns are dropped")
    batch1: int = option(16, "samples per optimizer step, over all ranks")
    batch2: int = option(16, "the same for stage 2")
    micro_batch: int = option(32, "samples per forward pass on one rank")
    steps1: int = option(150, "optimizer steps; 0: use epochs1")
    steps2: int = option(1500, "the same for stage 2")
    epochs1: float = option(1.0, "passes over the data, if steps1 is 0")
    epochs2: float = option(1.0, "the same for stage 2")
    lora_rank: int = option(0, "train the LLM by LoRA adapters of this rank; 0: all of it")
    lora_alpha: int = option(0, "LoRA scaling is alpha / rank; 0: twice the rank")
    lr1: float = option(3e-3, "peak learning rate of stage 1", section="optimizer")
    lr2: float = option(2e-3, "peak learning rate of stage 2")
    connector_lr2: float = option(3e-3, "the connector's in stage 2; 0: lr2")
    lora_lr2: float = option(0.0, "the adapters' in stage 2; 0: lr2")
    warmup: float = option(0.03, "fraction of the steps; a cosine to zero follows")
    weight_decay: float = option(0.0, "of AdamW")
    adam_beta: float = option(0.98, "AdamW's second beta; the papers use 0.999")
    clip: float = option(1.0, "clip the gradient norm to this; 0: no clipping")
    seed: int = option(0, "of the connector's initial weights and the order of the data")
    out: str = option("", "folder of the run; default: out/CONNECTOR", section="run")
    resume: bool = option(False, "continue from the newest checkpoint")
    save_every: int = option(500, "steps between checkpoints; Ctrl-C saves too")
    log_every: int = option(50, "steps between log lines")
    log: list[str] = option([], "tensorboard, wandb: in addition to log.jsonl")
    evaluate: bool = option(True, "print the scores at the end, on the toy world")
    device: str = option("auto", "auto, cuda, mps or cpu")
    bf16: bool | None = option(None, "autocast; default: on CUDA, and for a large 16-bit LLM")
    compile: bool | None = option(None, "torch.compile the blocks; default: on CUDA")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks")
    activation_checkpointing: bool = option(False, "recompute the LLM's blocks: less memory")
    workers: int | None = option(None, "loader processes per rank; default: 4 on CUDA, else 0")

    def __post_init__(self):
        self.lora_alpha = self.lora_alpha or 2 * self.lora_rank


def stage_options(config, stage):
    """Return the options of one stage without their suffix: {"train", "data", "lr", ...}."""
    return {key[:-1]: value for key, value in asdict(config).items() if key.endswith(str(stage))}


def uses_bf16(config, device):
    """Decide about autocast: on CUDA, and on a CPU for a large LLM whose files have 16 bits."""
    if config.bf16 is not None:
        return config.bf16
    if device.type == "cpu" and config.llm:
        num_parameters, is_half = stored(config.llm)
        return is_half and num_parameters >= LARGE
    # A GPU before Ampere has no bfloat16.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def uses_compile(config, device):
    """Decide about torch.compile: by default on CUDA."""
    return device.type == "cuda" if config.compile is None else config.compile


def num_workers(config, device):
    """Return the number of loader processes per rank: on CUDA four, so that it need not wait."""
    if config.workers is not None:
        return config.workers
    return 4 if device.type == "cuda" else 0


def llm_dtype(config, stage, device):
    """Trained parameters are float32. Under autocast a frozen LLM is bfloat16."""
    is_trained = "llm" in stage_options(config, stage)["train"] and not config.lora_rank
    return torch.bfloat16 if uses_bf16(config, device) and not is_trained else torch.float32


def check(config):
    """Raise InputError for options of train.py that would fail later, perhaps after hours."""
    if "/" in config.connector or "." in config.connector:
        raise InputError(
            f"{config.connector}: no such recipe; recipes are files in config/ that end in .toml"
        )
    if config.stage not in (0, 1, 2):
        raise InputError(f"--stage={config.stage}: must be 1, 2, or 0 for both")
    if config.init and config.stage != 2:
        raise InputError(f"--init={config.init}: names the start of stage 2, so add --stage=2")
    if config.image_mode not in ("pad", "crop", "stretch"):
        raise InputError(f"--image_mode={config.image_mode}: must be pad, crop or stretch")
    check_numbers(config)
    for name in config.log:
        if name not in ("tensorboard", "wandb"):
            raise InputError(f"--log={name}: must be tensorboard or wandb")
        if find_spec(name) is None:
            raise InputError(f"--log={name}: not installed; pip install {name}")
    for key in ("train1", "train2"):
        parts = getattr(config, key)
        if not parts or set(parts) - set(PARTS):
            raise InputError(
                f"--{key}={','.join(parts)}: must be one or more of {', '.join(PARTS)}"
            )
    if config.lora_rank and "llm" not in config.train1 + config.train2:
        raise InputError(
            f"--lora_rank={config.lora_rank}: adapters train the LLM, "
            "so --train1 or --train2 must contain llm"
        )
    if not config.lora_rank and (config.lora_alpha or config.lora_lr2):
        raise InputError("--lora_alpha and --lora_lr2: add --lora_rank, without it LoRA is off")


def check_numbers(config):
    for key in AT_LEAST_1 + AT_LEAST_0:
        value, least = getattr(config, key), int(key in AT_LEAST_1)
        if value is not None and not least <= value < 2**63:  # false for NaN too
            raise InputError(f"--{key}={value}: must be at least {least}")
    if config.warmup > 1:
        raise InputError(
            f"--warmup={config.warmup}: must be between 0 and 1 (fraction of the steps)"
        )
    if not 0 <= config.adam_beta < 1:
        raise InputError(f"--adam_beta={config.adam_beta}: must be at least 0 and less than 1")
    for stage in (1, 2):
        steps, epochs = getattr(config, f"steps{stage}"), getattr(config, f"epochs{stage}")
        if config.stage in (0, stage) and not steps and not 0 < epochs < math.inf:
            raise InputError(
                f"--epochs{stage}={epochs}: must be more than 0 because --steps{stage}=0"
            )


class Ranks:
    """This process among all ranks: rank, size, device, and whether it was asked to stop.

    torchrun starts a rank for each GPU. Without it there is one rank.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.device = pick_device(device)
        self.stop = False
        self.doing = "the start"  # for the message of `guard`
        self.lock = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32: faster float32 matmuls
        if self.size > 1:
            distributed.connect(self.device)
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

    def print(self, text):
        """Print on rank 0 only. A closed pipe (head, tee) does not end the run."""
        if self.is_main:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")

    def sum(self, tensor):
        """Return the sum over all ranks, on the device of `tensor`."""
        return distributed.total(tensor, self.device) if self.size > 1 else tensor

    def agree(self, what, number):
        """Raise InputError unless the number is the same on all ranks."""
        if self.size > 1:
            distributed.agree(what, number, self.device)

    def barrier(self):
        if self.size > 1:
            distributed.barrier()

    def shards(self, config):
        """Tell whether the model is sharded over the ranks (common/fsdp.py)."""
        return config.fsdp and self.size > 1

    def enter(self, run):
        """Make and lock the run folder, which belongs to one run.

        Raises InputError if it cannot be written, if another process trains in it, or if a rank
        does not see it (rank 0 writes checkpoints, and all ranks read them).
        """
        if self.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
                # closing a second handle on the file would release the lock of the first
                self.lock = self.lock or lock(run / ".lock")
            except OSError as error:
                reason = f"cannot be written ({error.strerror})"
                raise InputError(f"{run}: {reason}; --out= chooses another folder") from None
        if self.size > 1:
            distributed.wait_for(run / ".lock", self.rank)

    @contextmanager
    def guard(self, run):
        """Convert the error of a lost rank or loader process into a one-line InputError."""
        try:
            yield
        except RuntimeError as error:
            lost = faults.lost_process(error)
            if not lost:
                raise
            raise InputError(
                f"rank {self.rank}: lost {lost} in {self.doing}; --resume continues from the last "
                f"checkpoint in {run}, on any number of ranks"
            ) from None

    def close(self):
        """Leave the other ranks. From here on a signal ends the process: all is saved."""
        on_interrupt = signal.default_int_handler if self.is_main else signal.SIG_DFL
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.size > 1:
            distributed.close()
        if self.lock:
            self.lock.close()


def lock(path):
    """Open and lock a file until it is closed. Raises InputError if another process holds it.

    Forked workers of the data loader do not hold the lock.
    """
    file = open(path, "w")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError as error:
        # other errors: the disk does not support locks
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"{path.parent}: another process trains in this folder; "
                "--out= chooses another folder"
            ) from None
    return file


def fingerprint(dataset):
    """Return a CRC-32 of all samples. The image folder does not count."""
    value = 0
    for part in getattr(dataset, "datasets", [dataset]):
        if not hasattr(part, "samples"):
            value = zlib.crc32(f"{type(part).__name__} {len(part)}".encode(), value)
            continue
        folder = json.dumps(part.image_dir)[1:-1].encode()
        for start, end in pairwise(part.samples.ends):
            value = zlib.crc32(part.samples.buffer[start:end].replace(folder, b""), value)
    return value


def run_folder(config):
    """Choose the folder of this run. An earlier run is never overwritten. Raises InputError."""
    continues = config.resume or (config.stage == 2 and not config.init)
    if config.out:
        run = Path(config.out)
    elif continues:
        run = newest_run(config.connector)
    else:
        run = free_folder(config.connector)
    if run.exists() and not run.is_dir():
        raise InputError(f"--out={run}: is a file; choose a folder")
    stages = (1, 2) if run.exists() else ()
    saved_stages = [stage for stage in stages if checkpoint.newest(run, stage)]
    last_saved = max(saved_stages, default=0)
    if config.resume and config.stage == 1 and last_saved == 2:
        raise InputError(f"{run}: stage 2 was trained already; resume it without --stage=1")
    if not config.resume and (
        last_saved >= (config.stage or 1) or not continues and (run / "model").exists()
    ):
        raise InputError(
            f"{run}: contains a run already; continue it with --resume, or choose another --out"
        )
    for stage in saved_stages:
        if config.resume and config.stage in (0, stage):
            checkpoint.check_same(config, checkpoint.newest(run, stage))
    return run


def free_folder(connector):
    """Return the first of out/dense, out/dense-2, out/dense-3, ... that does not exist."""
    run, number = Path("out") / connector, 1
    while run.exists():
        number += 1
        run = Path("out") / f"{connector}-{number}"
    return run


def newest_run(connector):
    """Return the run of free_folder's names whose log is the newest."""
    pattern = re.compile(re.escape(connector) + r"(-\d+)?")
    runs = [run for run in Path("out").glob(f"{connector}*") if pattern.fullmatch(run.name)]
    if not runs:
        raise InputError(
            f"out/{connector}: no run to continue; name it with --out, or run stage 1 first"
        )
    # a run without a log failed before its first step
    logs = [run / "log.jsonl" for run in runs if (run / "log.jsonl").exists()]
    return max(logs, key=os.path.getmtime).parent if logs else runs[0]


def is_kept(line, stage, start):
    """Tell whether a line of log.jsonl is from another stage or from a step before `start`."""
    try:
        record = json.loads(line)
        return record["stage"] != stage or record["step"] < start
    except (ValueError, TypeError, KeyError):  # a killed run may leave half a line
        return False


class Log:
    """Print the numbers of a stage, and write them to log.jsonl and what --log names. For rank 0.

    state: has the stage, its number of steps, and the step at which it starts or continues. Lines
    of later steps are dropped: a killed run trained them after its last checkpoint, and they are
    trained again.
    """

    def __init__(self, config, run, ranks, state):
        self.ranks = ranks
        self.start, self.steps = state["step"], state["steps"]
        self.path = run / "log.jsonl"
        self.boards = []
        self.began = self.interval_began = time.time()
        self.tokens = self.num_printed = 0
        self.interval = state["interval"]
        if not ranks.is_main:
            return
        if self.path.exists():
            self.drop_lines(state["stage"])
        if config.log:
            from common import boards

            self.boards = [boards.BOARDS[name](config, run) for name in config.log]

    def drop_lines(self, stage):
        """Drop the lines of steps that will be trained again."""
        lines = self.path.read_text(errors="replace").splitlines(True)
        partial = self.path.with_name("log.jsonl.partial")
        partial.write_text("".join(line for line in lines if is_kept(line, stage, self.start)))
        partial.replace(self.path)

    @staticmethod
    def new_interval():
        """Return sums over the steps since the last line. They are part of a checkpoint."""
        return {"steps": 0, "loss": 0.0, "skipped": 0}

    def count(self, loss, num_tokens, num_skipped, skipped):
        """Add a step to the interval, and name the samples that were skipped for the first time."""
        self.tokens += num_tokens
        self.interval["skipped"] += num_skipped
        if math.isfinite(loss):
            self.interval["steps"] += 1
            self.interval["loss"] += loss
        for name, error in list(skipped.values())[self.num_printed :]:
            print(f"skipped {name}: {error}", file=sys.stderr)
        self.num_printed = len(skipped)

    def write(self, record):
        """Print and write a line: record has stage, step, and numbers such as loss."""
        now, step = time.time(), record["step"]
        speed = round(self.tokens / max(now - self.interval_began, 1e-9))
        num_finite = self.interval["steps"]
        mean_loss = self.interval["loss"] / num_finite if num_finite else math.nan
        record |= {"mean_loss": mean_loss, "skipped": self.interval["skipped"]}
        self.tokens, self.interval_began = 0, now
        self.interval.update(self.new_interval())
        seconds_a_step = (now - self.began) / (step + 1 - self.start)
        minutes, seconds = divmod(round(seconds_a_step * (self.steps - step - 1)), 60)
        record |= {"tokens_per_second": speed, "seconds": round(now - self.began, 1)}
        self.ranks.print(
            f"stage {record['stage']}  step {step:5d}/{self.steps}  loss {mean_loss:.4f}  "
            f"lr {record['lr']:.2e}  {speed:,} tokens/s  {minutes}m{seconds:02d}s left"
        )
        if not self.ranks.is_main:
            return
        # JSON has no NaN
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")
        for board in self.boards:
            board.write(record)


def print_stage(config, stage, model, trainable, num_samples, steps, ranks):
    """Say what is trained on what. num_samples: of all samples, and of those with images."""
    options = stage_options(config, stage)
    parts = []
    for part in PARTS:
        numbers = sum(p.numel() for p in getattr(model, part).parameters()) / 1e6
        parts.append(f"{part} {numbers:.2f}M {'trained' if part in trainable else 'frozen'}")
    if "lora" in trainable:
        numbers = sum(p.numel() for p in trainable["lora"]) / 1e6
        parts.append(f"of these lora {numbers:.2f}M trained")
    precision = "bfloat16" if uses_bf16(config, ranks.device) else "float32"
    sharding = ", FSDP" if ranks.shards(config) else ""
    ranks.print(
        f"\nstage {stage}: {', '.join(parts)}\n"
        f"  {num_samples[0]:,} samples ({', '.join(options['data'])}), {num_samples[1]:,} with "
        f"images, {model.tokens_per_image} visual tokens an image\n"
        f"  {steps} steps of {options['batch']}, peak learning rate {options['lr']:g}, "
        f"{precision} on {ranks.size} x {ranks.device.type}{sharding}"
    )
