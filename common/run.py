"""A training run: its options, its folder, its log and what it prints.

out/dense/log.jsonl      one line of numbers every log_every steps
out/dense/checkpoints/   see checkpoint.py
out/dense/model/         the finished model
out/dense/adapter/       with LoRA, the adapters alone
"""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import checkpoint
from common.cli import option
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
    beta2: float = option(0.98, "of AdamW; the papers use 0.999")
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
    if not 0 <= config.beta2 < 1:
        raise InputError(f"--beta2={config.beta2}: must be at least 0 and less than 1")
    for stage in (1, 2):
        steps, epochs = getattr(config, f"steps{stage}"), getattr(config, f"epochs{stage}")
        if config.stage in (0, stage) and not steps and not 0 < epochs < math.inf:
            raise InputError(
                f"--epochs{stage}={epochs}: must be more than 0 because --steps{stage}=0"
            )


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
    """Return the run of free_folder's names that wrote last. One without a log comes last."""
    pattern = re.compile(re.escape(connector) + r"(-\d+)?")
    runs = [run for run in Path("out").glob(f"{connector}*") if pattern.fullmatch(run.name)]
    if not runs:
        raise InputError(
            f"out/{connector}: no run to continue; name it with --out, or run stage 1 first"
        )
    # a run without a log failed before its first step
    return max(runs, key=lambda run: ((run / "log.jsonl").exists(), last_written(run)))


def last_written(run):
    """Return the time of a run's last checkpoint or line of its log."""
    paths = (run, run / "checkpoints", run / "log.jsonl")
    return max(path.stat().st_mtime for path in paths if path.exists())


def is_kept(line, stage, start):
    """Tell whether a line of log.jsonl is from another stage or from a step before `start`."""
    try:
        record = json.loads(line)
        return record["stage"] != stage or record["step"] < start
    except (ValueError, TypeError, KeyError):  # a killed run may leave half a line
        return False


class Log:
    """log.jsonl, and TensorBoard or wandb with --log. Only rank 0 writes.

    start: the step at which the stage starts or continues. Lines of later steps are dropped: a
    killed run trained them after its last checkpoint, and they are trained again.
    """

    def __init__(self, config, run, is_main, stage, start):
        self.is_main = is_main
        self.path = run / "log.jsonl"
        self.board = self.wandb = None
        if is_main and self.path.exists():
            lines = self.path.read_text().splitlines(True)
            kept = [line for line in lines if is_kept(line, stage, start)]
            if not config.resume and len(kept) < len(lines):
                # the lines may be all that is left of another run
                self.path.with_name("log.jsonl.old").write_text("".join(lines))
            partial = self.path.with_name("log.jsonl.partial")
            partial.write_text("".join(kept))
            partial.replace(self.path)
        for name in config.log:
            if name not in ("tensorboard", "wandb"):
                raise InputError(f"--log={name}: must be tensorboard or wandb")
            try:
                self.open(name, config, run)
            except ImportError:
                raise InputError(f"--log={name}: not installed; pip install {name}") from None

    def open(self, name, config, run):
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(run) if self.is_main else None
        else:
            import wandb

            if self.is_main:
                self.wandb = wandb.run or wandb.init(project="nanoMLLM", config=asdict(config))

    def write(self, record):
        """Write one line: record has stage, step, and numbers such as loss."""
        if not self.is_main:
            return
        # JSON has no NaN
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")
        stage = f"stage{record['stage']}"
        if self.board:
            for key in ("loss", "lr", "gradient_norm", "tokens_per_second"):
                self.board.add_scalar(f"{stage}/{key}", record[key], record["step"])
            self.board.flush()  # a killed run keeps what it wrote
        if self.wandb:
            self.wandb.log({f"{stage}/{key}": value for key, value in record.items()})


def print_stage(config, stage, model, trainable, num_samples, num_with_images, steps, ranks):
    """Say what is trained on what: parameters, samples, steps, precision, device."""
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
        f"  {num_samples:,} samples ({', '.join(options['data'])}), {num_with_images:,} with "
        f"images, {model.tokens_per_image} visual tokens an image\n"
        f"  {steps} steps of {options['batch']}, peak learning rate {options['lr']:g}, "
        f"{precision} on {ranks.size} x {ranks.device.type}{sharding}"
    )


def print_bad_step(step, loss, norm, micro_batches, losses):
    """Name the samples of this rank whose loss is not finite."""
    names = []
    for batch, loss_sum in zip(micro_batches, losses, strict=True):
        if not loss_sum.isfinite():
            names += batch.ids
    among = f" (among {', '.join(names)})" if names else ""
    message = f"step {step}: loss {loss}, gradient norm {norm}: step skipped{among}"
    print(message, file=sys.stderr, flush=True)


def check_progress(step, bad_steps, empty_steps, steps, run):
    """Raise InputError after ten bad steps in a row, or ten without a supervised token."""
    if bad_steps == 10:
        raise InputError(
            f"step {step}: ten steps in a row without a finite loss; the checkpoints under {run} "
            "are good: lower the learning rate and start stage by stage with another --out"
        )
    if empty_steps == min(10, steps):
        raise InputError(
            f"step {step}: {empty_steps} steps in a row without a supervised token: is "
            "--max_length shorter than the visual tokens of an image?"
        )
