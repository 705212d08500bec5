"""A training run: its options, its processes, its folder, its log and what it prints.

out/dense/log.jsonl      one line of numbers every log_every steps; "loss" and "tokens" are the
                         step's, "mean_loss" and "skipped" are of all steps since the last line
out/dense/loss.png       the mean losses
out/dense/checkpoints/   see checkpoint.py
out/dense/model/         the finished model
out/dense/adapter/       with LoRA, the adapters alone
out/dense/profile2.json  with --profile=STEP, what CPU and GPU did in that step of stage 2
"""

import json
import math
import multiprocessing
import os
import secrets
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.data import ConcatDataset

from common import checkpoint, distributed, fsdp, lora
from common.cli import check_name, option, pick_device
from common.errors import InputError
from common.pretrained import LARGE, stored

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PARTS = ("vision", "connector", "llm")  # the parts of a model that can be trained
# dense bf16 TFLOP/s of GPUs, by NVIDIA's data sheets; the first key in a GPU's name counts
PEAKS = {"A100": 312, "NVL": 835, "H100 PCIe": 756, "H100": 989, "H200": 989}
IMAGE_MODES = ("pad", "crop", "stretch", "anyres")
# The least and the greatest value of an option, of both stages. Other numbers are from 0 to 1e9.
AT_LEAST_1 = "batch micro_batch log_every save_every max_length fsdp_replicas gpus gpu_flops"
LIMITS = dict.fromkeys(AT_LEAST_1.split(), (1, 1e9)) | {
    "stage": (0, 2),
    "epochs": (1e-6, 1e9),
    "warmup": (0, 1),
    "memory_budget": (0, 1),
    "adam_beta": (0, 0.999999),
    "lora_dropout": (0, 0.999999),
}


@dataclass
class Config:
    connector: str = option("dense", "a name in connector.py, such as comm", section="model")
    connector_options: dict = option({}, "of the connector, such as --connector.groups=3 (above)")
    vision: list[str] = option([], "towers: folders or hub ids; default: the tiny ones")
    llm: str = option("", "folder or hub id; default: the tiny LLaMA")
    template: str = option("", "chat template of stage 2; default: the LLM's")
    template1: str = option("plain", "template of stage 1")
    image_size: int = option(0, "side in pixels; 0: what the first tower was trained at")
    image_mode: str = option("pad", "pad, crop or stretch an image to a square; anyres: also tiles")
    stage: int = option(
        0, "1, 2, or 0: both", section="stages (options that end in 1 or 2 belong to that stage)"
    )
    init: str = option("", "start of stage 2: a model, a connector, or new; default: stage 1")
    train1: list[str] = option(["connector"], "trainable parts: vision, connector, llm")
    train2: list[str] = option(["connector", "llm"], "the same for stage 2")
    data1: list[str] = option(["world"], "LLaVA's .json or .jsonl, world, or KIND:FILE (mix.py)")
    data2: list[str] = option(["world"], "several files are mixed in proportion to their size")
    eval_data1: list[str] = option([], "held-out files; their loss is logged at each checkpoint")
    eval_data2: list[str] = option([], "the same for stage 2")
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
    lora_dropout: float = option(0.0, "fraction of the inputs of the adapters that is dropped")
    lr1: float = option(3e-3, "peak learning rate of stage 1", section="optimizer")
    lr2: float = option(2e-3, "peak learning rate of stage 2")
    connector_lr2: float = option(3e-3, "the connector's in stage 2; 0: lr2")
    vision_lr2: float = option(0.0, "the towers' in stage 2, if train2 has vision; 0: lr2")
    lora_lr2: float = option(0.0, "the adapters' in stage 2; 0: lr2")
    warmup: float = option(0.03, "fraction of the steps; a cosine to zero follows")
    weight_decay: float = option(0.0, "of AdamW")
    adam_beta: float = option(0.98, "AdamW's second beta; the papers use 0.999")
    clip: float = option(1.0, "clip the gradient norm to this; 0: no clipping")
    seed: int = option(0, "of initial weights, the order of the data and dropout")
    out: str = option("", "folder of the run; default: out/CONNECTOR", section="run")
    resume: bool = option(False, "continue from the newest checkpoint; without one, start")
    save_every: int = option(500, "steps between checkpoints; Ctrl-C saves too")
    log_every: int = option(50, "steps between log lines")
    profile: int | None = option(None, "step to record in OUT/profile1.json and profile2.json")
    wandb: bool = option(False, "log to Weights & Biases as well as to log.jsonl")
    evaluate: bool = option(True, "print the scores at the end, on the toy world")
    device: str = option("auto", "auto, cuda, mps or cpu")
    bf16: bool | None = option(None, "autocast; default: on CUDA, on a CPU for a large 16-bit LLM")
    compile: bool | None = option(
        None, "torch.compile the blocks; default: on CUDA, if there is a C compiler"
    )
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks")
    fsdp_replicas: int = option(1, "copies of the sharded model (HSDP): one for each node")
    activation_checkpointing: bool = option(False, "recompute the LLM's blocks: less memory")
    memory_budget: float = option(
        0.0, "share of activations that recomputed blocks keep; needs --compile"
    )
    workers: int | None = option(None, "loader processes per rank; default: 4 on CUDA, else 0")
    image_mode1: str | None = option(
        None, "image_mode of stage 1 only", section="the same for one stage; default: as above"
    )
    image_mode2: str | None = option(None, "image_mode of stage 2 only")
    image_dir1: str | None = option(None, "image_dir of stage 1 only")
    image_dir2: str | None = option(None, "image_dir of stage 2 only")
    fsdp1: bool | None = option(None, "fsdp in stage 1 only")
    activation_checkpointing1: bool | None = option(None, "recompute in stage 1 only")

    def __post_init__(self):
        self.lora_alpha = self.lora_alpha or 2 * self.lora_rank
        for key, value in vars(self).items():
            least, greatest = LIMITS.get(key.rstrip("12"), (0, 1e9))
            # false for NaN too
            if isinstance(value, int | float) and not least <= value <= greatest:
                raise InputError(f"--{key}={value}: must be from {least:g} to {greatest:g}")
        for stage in (1, 2):
            options = self.stage_options(stage)
            check_name(options.image_mode, IMAGE_MODES, "--image_mode")
            for part in options.train or [""]:
                check_name(part, PARTS, f"--train{stage}")
        if self.wandb and not find_spec("wandb"):
            raise InputError("--wandb: not installed; pip install wandb")
        if self.memory_budget and self.lora_dropout:
            # blocks that are computed again would draw other random numbers
            raise InputError("--lora_dropout: needs --memory_budget=0")
        if self.init and self.stage != 2:
            raise InputError(f"--init={self.init}: names the start of stage 2, so add --stage=2")

    def stage_options(self, stage):
        """Return the options of one stage: in stage 1 .lr is --lr1, and --fsdp1 overrides .fsdp."""
        options = dict(vars(self))
        for key, value in vars(self).items():
            if key.endswith(str(stage)) and value is not None:
                options[key[:-1]] = value
        return SimpleNamespace(**options)

    def checkpoints(self):
        """Return the names of the towers and of the LLM, by default of the tiny ones."""
        tiny = {"comm": ["clip", "dinov2"], "comm_dino": ["dinov2"]}.get(self.connector, ["clip"])
        towers = self.vision or [str(WEIGHTS / name) for name in tiny]
        return towers, self.llm or str(WEIGHTS / "llama")

    def uses_bf16(self, device):
        """Decide about autocast: CUDA from Ampere on, a CPU for a large LLM in files of 16 bits."""
        if self.bf16 is not None:
            return self.bf16
        if device.type == "cpu" and self.llm:
            num_parameters, is_half = stored(self.llm)
            return is_half and num_parameters >= LARGE
        # A GPU before Ampere has no bfloat16.
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def uses_compile(self, device):
        """Decide about torch.compile: by default on CUDA, where a C compiler is installed."""
        if self.compile is not None or device.type != "cuda":
            return bool(self.compile)
        compiler = which(os.environ.get("CC", "cc"))
        if not compiler:
            print("no C compiler: torch.compile is off", file=sys.stderr)
        return bool(compiler)

    def num_workers(self, device):
        """Return the number of loader processes per rank: on CUDA the GPU should not wait."""
        if self.workers is not None:
            return self.workers
        return 4 if device.type == "cuda" else 0

    def dtype(self, part, stage, device):
        """Trained parameters are float32. Under autocast a frozen tower or LLM is bfloat16."""
        is_adapted = part == "llm" and self.lora_rank
        is_trained = part in self.stage_options(stage).train and not is_adapted
        return torch.bfloat16 if self.uses_bf16(device) and not is_trained else torch.float32


class Ranks:
    """This process among all ranks: rank, size, device, and whether it was asked to stop.

    torchrun starts a rank for each GPU. Without it there is one rank, which never waits.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.is_sharded = False  # the model of this stage, over the ranks (fsdp.py)
        self.device = pick_device(device)
        self.stop = False
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
        """Print on rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def sum(self, tensor):
        """Return the sum over all ranks, on the device of `tensor`."""
        if self.size == 1:
            return tensor
        summed = tensor.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def agree(self, fingerprint):
        """Raise InputError, on one rank at least, unless all ranks have the same data."""
        if self.sum(torch.tensor(fingerprint)) != self.size * fingerprint:
            raise InputError("the ranks differ in their data: all nodes must see the same files")

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def close(self):
        """Leave the other ranks. From here on a signal ends the process at once: all is saved."""
        self.stop = True
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def run_folder(config, ranks):
    """Make the folder of this run. An earlier run is never overwritten. Raises InputError."""
    run = Path(config.out or f"out/{config.connector}")
    if run.exists():
        checkpoint.check_run(config, run)
    run.mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        ranks.lock = lock(run)  # kept open: closing the file would unlock it
    ranks.barrier()
    if not (run / ".lock").exists():
        raise InputError(f"rank {ranks.rank}: --out={run} must be on a disk that all nodes share")
    return run


def lock(run):
    """Lock a run's folder until this process ends. Raises InputError if another has the lock."""
    file = open(run / ".lock", "w")
    # Windows has no fcntl, and some disks have no locks.
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another process trains here; choose another --out") from None
    return file


def fingerprint(dataset):
    """Return a CRC-32 of all samples of a ConcatDataset. The image folder does not count."""
    value = 0
    for part in dataset.datasets:
        content = f"{type(part).__name__} {len(part)}".encode()
        if hasattr(part, "buffer"):
            folder = json.dumps(part.image_dir)[1:-1].encode()
            content = part.buffer.replace(folder, b"")
        value = zlib.crc32(content, value)
    return value


# Sums over the steps since the last line of the log. They are part of a checkpoint.
NO_STEPS = {"steps": 0, "loss": 0.0, "skipped": 0}


class Log:
    """Print the numbers of a stage, and write them to log.jsonl and, with --wandb, to W&B.

    state: has the stage, its number of steps, and the step at which it starts or continues. Lines
    of later steps are dropped: a killed run trained them after its last checkpoint, and they are
    trained again.
    """

    def __init__(self, config, model, run, ranks, state):
        self.ranks = ranks
        # FLOPs a token: 2 in the forward, 2 for an input's gradient, 2 for that of a trained weight
        parameters = model.llm.parameters()
        self.token_flops = sum(p.numel() * (4 + 2 * p.requires_grad) for p in parameters)
        self.start, self.steps = state["step"], state["steps"]
        self.path = run / "log.jsonl"
        self.began = self.interval_began = time.perf_counter()
        self.stage = state["stage"]
        self.tokens = self.num_steps = 0
        self.interval = state["interval"]
        has_wandb = config.wandb and ranks.is_main
        self.wandb = start_wandb(config, run, self.stage) if has_wandb else None
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if ranks.is_main:
            self.drop_lines()

    def drop_lines(self):
        """Drop the lines of steps that will be trained again, and a line that a kill has cut."""
        self.path.touch()
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if record["stage"] != self.stage or record["step"] < self.start:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept))

    def count(self, loss, num_tokens, num_skipped):
        """Add a step to the interval."""
        self.tokens += num_tokens
        self.num_steps += 1
        self.interval["skipped"] += num_skipped
        if math.isfinite(loss):
            self.interval["steps"] += 1
            self.interval["loss"] += loss

    def write(self, record):
        """Print and write a line: record has step, lr, and the other numbers of the step."""
        now, step = time.perf_counter(), record["step"]
        num_finite = self.interval["steps"]
        mean_loss = self.interval["loss"] / num_finite if num_finite else math.nan
        seconds = now - self.interval_began
        step_seconds, speed = seconds / self.num_steps, round(self.tokens / seconds)
        record |= {
            "mean_loss": mean_loss,
            "skipped": self.interval["skipped"],
            "tokens_per_second": speed,
            "seconds_per_step": step_seconds,
            "seconds": round(now - self.began, 1),
        }
        gpu = ""
        if self.ranks.device.type == "cuda":
            record["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            record["tflops"] = self.token_flops * speed / self.ranks.size / 1e12
            gpu = f"{record['tflops']:.0f} TFLOP/s  {record['peak_gb']:.1f} GB  "
            name = torch.cuda.get_device_name()
            peaks = [PEAKS[known] for known in PEAKS if known in name]
            if peaks:
                record["mfu"] = record["tflops"] / peaks[0]
                gpu = f"MFU {record['mfu']:.0%}  {gpu}"
        self.tokens, self.num_steps, self.interval_began = 0, 0, now
        self.interval.update(NO_STEPS)
        left = (now - self.began) / (step + 1 - self.start) * (self.steps - step - 1)
        minutes, seconds = divmod(round(left), 60)
        self.ranks.print(
            f"stage {self.stage}  step {step:5d}/{self.steps}  loss {mean_loss:.4f}  "
            f"lr {record['lr']:.2e}  {speed:,} tokens/s  {step_seconds:.2f} s/step  {gpu}"
            f"{minutes}m{seconds:02d}s left"
        )
        self.append(record)

    @torch.no_grad()
    def write_held_out(self, step, model, datasets, loader, autocast):
        """Print and write the mean loss over the supervised tokens of held-out datasets, if any.

        loader: of the training data. autocast: a context for the forward pass.
        """
        if not datasets:
            return
        ranks, began = self.ranks, time.perf_counter()
        loader = replace(loader, dataset=ConcatDataset(datasets))
        model.eval()
        sums = torch.zeros(2)
        indices = range(ranks.rank, len(loader.dataset), ranks.size)
        # FSDP: all ranks need the same number of forward passes. A last one may have no samples.
        for start in range(0, -(-len(loader.dataset) // ranks.size), loader.micro_batch):
            batch = loader[indices[start : start + loader.micro_batch]]
            loader.count(batch)
            with autocast:
                loss = model(batch).item()
            sums += torch.tensor([loss, len(batch.supervised)])
        if ranks.is_sharded:
            # a backward pass does this in training
            model.reshard()
        model.train()
        loss, num_tokens = ranks.sum(sums).tolist()
        loss /= max(1, num_tokens)
        ranks.print(f"stage {self.stage}  step {step:5d}/{self.steps}  held-out loss {loss:.4f}")
        self.append({"step": step, "held_out_loss": loss})
        # The time of training steps does not include this.
        self.interval_began += time.perf_counter() - began

    def append(self, record):
        """Write numbers of a step to log.jsonl and W&B."""
        if not self.ranks.is_main:
            return
        # JSON has no NaN
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"stage": self.stage} | finite) + "\n")
        if self.wandb:
            self.wandb.log({f"stage{self.stage}/{key}": record[key] for key in record})


def start_wandb(config, run, stage):
    """Start the curves of a run in Weights & Biases, or continue those of a resumed run."""
    import wandb

    name = run / "wandb.id"
    if not name.exists():
        name.write_text(secrets.token_hex(4))
    board = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "nanoMLLM"),
        id=name.read_text(),
        resume="allow",
        dir=run,
        config=asdict(config),
    )
    board.define_metric(f"stage{stage}/*", step_metric=f"stage{stage}/step")
    return board


def profiled(steps, config, stage, run, ranks):
    """Yield the items of `steps`, (step, micro-batches), and record the step --profile.

    The time in which the loader makes the batches is not part of it.
    """
    for item in steps:
        if item[0] != config.profile or not ranks.is_main:
            yield item
            continue
        with torch.profiler.profile() as profiler:
            yield item
        profiler.export_chrome_trace(str(run / f"profile{stage}.json"))


def print_stage(config, stage, model, groups, num_samples, steps, ranks):
    """Print the parts, the data, the steps and the learning rates of the optimizer's groups."""
    options = config.stage_options(stage)
    trained = {group["part"]: group["peak"] for group in groups}
    parts = []
    for part in PARTS:
        numbers = sum(p.numel() for p in getattr(model, part).parameters()) / 1e6
        parts.append(f"{part} {numbers:.2f}M {'trained' if part in trained else 'frozen'}")
    rates = ", ".join(f"{part} {rate:g}" for part, rate in trained.items())
    precision = "bfloat16" if config.uses_bf16(ranks.device) else "float32"
    extras = ", FSDP" if ranks.is_sharded else ""
    extras += ", compiled" if config.compile else ""
    ranks.print(
        f"\nstage {stage}: {', '.join(parts)}\n"
        f"  {num_samples:,} samples ({', '.join(options.data)}), "
        f"{model.tokens_per_image} visual tokens an image or tile\n"
        f"  {steps} steps of {options.batch}, peak learning rates: {rates}; "
        f"{precision} on {ranks.size} x {ranks.device.type}{extras}"
    )


def print_bad_step(step, loss, norm, micro_batches, losses):
    """Name the samples of this rank whose loss is not finite."""
    names = []
    for batch, loss_sum in zip(micro_batches, losses, strict=True):
        if not loss_sum.isfinite():
            names += batch.ids
    among = f" (among {', '.join(names)})" if names else ""
    print(f"step {step}: loss {loss}, gradient norm {norm}: step skipped{among}", file=sys.stderr)


@contextmanager
def name_out_of_memory(step, batch):
    """Raise InputError if a GPU's memory is not enough for a batch: with step and tokens."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"step {step}: out of memory with {batch.tokens.numel():,} tokens: lower --micro_batch "
            "or --max_length, or add --activation_checkpointing or --fsdp"
        ) from None


def check_progress(stage, step, useless_steps, steps):
    """Raise InputError after ten steps in a row without a loss that counts."""
    if useless_steps == min(10, steps):
        raise InputError(
            f"step {step}: {useless_steps} steps in a row without a finite loss or a supervised "
            f"token: continue from the last checkpoint with --resume and a lower --lr{stage}, or "
            "choose a --max_length that is longer than the visual tokens of an image"
        )


def save_model(config, model, run, ranks):
    """Write run/model, and with LoRA run/adapter. Rank 0 writes.

    With FSDP the other ranks send it their shards, one tensor at a time.
    """
    adapters = {name: fsdp.full(p) for name, p in lora.adapters(model.llm).items()}
    if adapters and ranks.is_main:
        base = getattr(model, "base", config.checkpoints()[1])
        lora.save(adapters, run / "adapter", config, base)
    tensors = fsdp.gathered(model)
    if ranks.is_main:
        model.eval().save(run / "model", tensors=tensors)
    for _ in tensors:
        # Every rank takes part in gathering each tensor.
        pass
