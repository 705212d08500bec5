"""Measure how fast training and decoding are, and how much memory they take.

    python -m tools.bench train --vs=transformers       a training step of each stage
    python -m tools.bench decode --vs=transformers      the first token of an answer, and the others
    python -m tools.bench train --vs=FOLDER             compare with another checkout of this code
    python -m tools.bench train --size=1b --batch=16    a GPU's size
    python -m tools.bench gpu-dry config/dense_7b.toml --stage=2 --gpus=8    a step, without a GPU

Every contender runs in its own process, in turns, so a slow moment of the machine meets all of
them. Median seconds are printed, with the smallest and the largest, and the rate: FLOPs or bytes
that the work needs, by the median. Weights are random and nothing is downloaded.

train: a training step (forward, backward, AdamW) of frozen CLIP, MLP connector and LLaMA. The
dialogues have different lengths and one image each. Ours packs the dialogues into one row, as
train.py does. transformers' LlavaForConditionalGeneration gets them padded on the right. The FLOPs
are the same for all (tools/plan.py): those of the blocks that are read, causal attention within a
dialogue, logits of supervised tokens, trained parameters.

decode: answers of a LLaMA, greedy, PROMPT tokens in, ANSWER tokens out. "ours_fast" is what --fast
runs on CUDA. transformers runs generate with its dynamic cache and with its static cache. The FLOPs
and bytes are those of the weights that are read.

gpu-dry: the operators of a recipe's step on one of several GPUs, run on tensors without data by
tests/fake_cuda.py, whose flags it takes. The time is a model: matrix products at MATMULS, all other
bytes at the GPU's bandwidth, and everything sent as in tools/plan.py. It has not been measured.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

import train
from clip import CLIPVision, CLIPVisionConfig
from common import cli
from common.cli import option
from common.errors import InputError
from common.images import ImageSpec, prepare
from common.layouts import SHAPES
from common.pretrained import DTYPES, on_meta
from common.run import WEIGHTS
from common.speed import speed_up
from data import collate
from dialogue import IGNORE, IMAGE
from interop.load import load_model
from llama import Llama, LlamaConfig
from mllm import MLLM
from tools import plan

PROMPT, ANSWER = 700, 64
# gpu-dry: FLOP/s of large bf16 matrix products on an H100 or H200, and the peak
MATMULS, PEAK = 790e12, 989e12
# seconds of the host for each kernel
LAUNCH = 6e-6
# share of eager's bytes and kernels that is left in a compiled block
FUSED = 0.18
# bytes/s of the memory
GPUS = {"H100": 3.35e12, "H200": 4.8e12}
# Text tokens of eight of LLaVA's dialogues, and the share of them that are answers.
TEXTS = (212, 472, 154, 271, 310, 71, 211, 105)
SUPERVISED = 0.6
CLIP_L = SHAPES["openai/clip-vit-large-patch14-336"]
SIZES = {
    "160m": ({"image_size": 224, "patch_size": 16}, SHAPES["JackFram/llama-160m"]),
    "1b": (CLIP_L, SHAPES["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]),
    "7b": (CLIP_L, SHAPES["lmsys/vicuna-7b-v1.5"]),
}


@dataclass
class Config:
    what: str = option("train", "train or decode; gpu-dry has other options")
    vs: list[str] = option([], "compare with: transformers, folders of other checkouts")
    repeats: int = option(5, "turns of every contender")
    batch: int = option(0, "dialogues of train (default 8), prompts of decode (default 1)")
    dtype: str = option("bfloat16", "or float16, float32; in training: autocast")
    size: str = option("", "160m (default of train; CLIP-B/16), 1b (of decode) or 7b (CLIP-L/14)")
    stage: int = option(0, "train: 1, 2, or 0 for both")
    device: str = option("auto", "auto, cpu, cuda, mps")
    profile: bool = option(False, "train: print the operators of a step that take longest")
    contender: str = option("", "internal: run one turn of this contender")
    folder: str = option("", "internal: the checkpoint")


# ---- decode --------------------------------------------------------------------------------------


def load_ours(config):
    """Return generate(tokens, put), which calls put(token) for each new token."""
    model = Llama.from_pretrained(config.folder, DTYPES[config.dtype], config.device)
    speed_up(model, "chat", compile=config.contender == "ours_fast")

    def generate(tokens, put):
        for token in model.stream(tokens, max_new_tokens=ANSWER, eos=[]):
            put(token)

    return generate


def load_transformers(config):
    """Return the same. put gets the prompt first."""
    import transformers

    load = transformers.LlamaForCausalLM.from_pretrained
    model = load(config.folder, dtype=DTYPES[config.dtype]).to(config.device)
    model.generation_config.eos_token_id = None

    def generate(tokens, put):
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=ANSWER,
            do_sample=False,
            streamer=SimpleNamespace(put=put, end=lambda: None),
            cache_implementation=config.contender,
        )

    return generate


def measure_decoding(config):
    """Answer once to warm up, then measure the first token and the others."""
    load = load_ours if config.contender.startswith("ours") else load_transformers
    generate = load(config)
    tokens = torch.randint(3, 32000, (config.batch, PROMPT), device=config.device)
    times = []
    for _ in range(2):
        times.append(wait(config.device))
        generate(tokens, lambda _: times.append(wait(config.device)))
    first = times[-ANSWER] - times[len(times) // 2]
    return {"first": first, "token": (times[-1] - times[-ANSWER]) / (ANSWER - 1)}


def compare_decoding(config, folder):
    model = Llama(LlamaConfig.from_dict(SIZES[config.size][1], config.size)).bfloat16()
    model.save_pretrained(folder)
    # Products with weights. Attention needs a few percent more.
    blocks, all_weights = (plan.numel(plan.linear_weights(part)) for part in (model.layers, model))
    del model
    work = {
        "first": (2 * blocks * PROMPT * config.batch, "FLOP/s"),
        "token": (DTYPES[config.dtype].itemsize * all_weights, "B/s"),
    }
    ours = ["ours"] if config.device.type == "cpu" else ["ours", "ours_fast"]
    compare(config, ours, ["dynamic", "static"], work, folder)


# ---- train ---------------------------------------------------------------------------------------


def make_model(size):
    """Build an MLLM with random weights, where torch puts new tensors."""
    tower, llm = SIZES[size]
    tower = CLIPVision(CLIPVisionConfig(**tower))
    llm = Llama(LlamaConfig.from_dict(llm, size))
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "llama" / "tokenizer.json"))
    spec = ImageSpec(tower.config.image_size)
    return MLLM([tower], llm, "mlp", tokenizer, "vicuna_v1", spec)


def make_batch(spec, tokens_per_image, size, text_only=False):
    """Make a data.Batch of random dialogues, each with one image of 640 x 480."""
    generator = np.random.default_rng(0)
    rows, images = [], {}
    for i in range(size):
        length = TEXTS[i % len(TEXTS)]
        tokens = generator.integers(3, 600, length).tolist()
        if not text_only:
            pixels = generator.integers(256, size=(480, 640, 3), dtype=np.uint8)
            images[i] = prepare(pixels, spec, tokens_per_image)
            tokens[1:1] = [IMAGE] * len(images[i].rows)
        answer = int(SUPERVISED * length)
        labels = [IGNORE] * (len(tokens) - answer) + tokens[-answer:]
        rows.append((i, np.array([tokens, labels]), [] if text_only else [i]))
    return collate(rows, [], images, spec, tokens_per_image)


def random_batch(config):
    """Return the batch that all contenders get, and a model on the meta device."""
    with on_meta():
        model = make_model(config.size)
    return make_batch(model.spec, model.tokens_per_image, config.batch), model


def train_ours(config):
    """Return the model and a function that computes the loss."""
    model = load_model(config.folder, device=config.device).train()
    if config.dtype == "bfloat16":
        # As train.py does with frozen parts.
        (model if config.stage == 1 else model.vision).bfloat16()
        model.connector.float()
    speed_up(model, "train", compile=config.contender == "ours_compiled")
    train.freeze(model, ["connector"] if config.stage == 1 else ["connector", "llm"])
    batch, _ = random_batch(config)
    return model, lambda: model(batch) / len(batch.supervised)


def train_transformers(config):
    import transformers

    device, stage = config.device, config.stage
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model = load(config.folder, dtype=torch.float32).to(device).train()
    model.requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if config.dtype == "bfloat16":
        (model if stage == 1 else model.model.vision_tower).bfloat16()
        model.model.multi_modal_projector.float()
    batch, ours = random_batch(config)
    tokens = pad_sequence(batch.tokens[0].split(batch.lengths), True, 0).to(device)  # (B, T)
    labels = pad_sequence(batch.labels[0].split(batch.lengths), True, IGNORE).to(device)
    # No text token has the id 0.
    mask = (tokens != 0).long()
    tokens = tokens.masked_fill(tokens == IMAGE, model.config.image_token_index)
    # without the black image of data.collate
    pixels = ours.vision[0].normalize(batch.pixels[: config.batch], torch.float32).to(device)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}
    return model, lambda: model(**inputs, pixel_values=pixels).loss


def measure_training(config):
    """Build, warm up with three steps, then return the median seconds of three steps."""
    build = train_ours if config.contender.startswith("ours") else train_transformers
    model, loss_of = build(config)
    device_type = config.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    if device_type == "cuda":
        # The memory of the steps, not of loading.
        torch.cuda.reset_peak_memory_stats()

    def step():
        start = wait(config.device)
        with torch.autocast(device_type, DTYPES[config.dtype], enabled=config.dtype != "float32"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), wait(config.device) - start

    losses, times = zip(*[step() for _ in range(6)], strict=True)
    if config.profile:
        with torch.profiler.profile() as profile:
            step()
        order = f"self_{device_type}_time_total"
        print(config.contender, profile.key_averages().table(sort_by=order, row_limit=20))
    return {"seconds": statistics.median(times[3:]), "loss": losses[0]}


def compare_training(config, folder):
    with torch.device(config.device):
        make_model(config.size).save(f"{folder}/ours")
    # transformers and other checkouts read this layout.
    run(".", "-m", "interop.export", f"--model={folder}/ours", f"--to={folder}/llava")
    batch, model = random_batch(config)
    squared = sum(length**2 for length in batch.lengths)
    load = plan.Load(sum(batch.lengths), squared, len(batch.supervised), config.batch)
    options, bf16 = plan.PlanConfig(gpus=1), config.dtype == "bfloat16"
    for stage in [config.stage] if config.stage else [1, 2]:
        config.stage = stage
        parts = plan.flops(plan.Plan(options, model, stage == 2, load, 1, bf16))
        # Recomputed logits are not necessary work.
        work = {"seconds": (sum(parts.values()) - parts["again"], "FLOP/s")}
        print(f"stage {stage}: {config.batch} dialogues, {load.tokens:,} tokens", flush=True)
        compare(config, ["ours", "ours_compiled"], ["padded"], work, f"{folder}/llava")


# ---- gpu-dry -------------------------------------------------------------------------------------


def gpu_dry(arguments):
    """Print what a step of a recipe would launch, move, wait for, hold and take on GPUs."""
    child = run(".", "tests/fake_cuda.py", *arguments)
    if "--help" in arguments:
        print(child)
        return
    found = json.loads(child.splitlines()[-1])
    moved, kernels = sum(found["bytes"].values()), found["kernels"]
    print(f"{kernels:,} kernels, {found['graphs']} compiled graphs")
    print(f"bytes, matrix products excepted: {moved / 1e9:,.0f} GB")
    for place, number in list(found["bytes"].items())[:12]:
        print(f"  {number / 1e9:9,.1f} GB  {place}")
    for place, number in found["waits"].items():
        print(f"  the host waits {number} times at {place}")
    for way, (peak, planned) in found["memory"].items():
        print(f"peak memory, {way}: {peak / 1e9:.1f} GB, planned {planned / 1e9:.1f} GB")
    flops = sum(found["flops"].values())
    # seconds at the peak for the products of forward and backward, each once
    ideal = (flops - found["flops"]["again"]) / PEAK
    sending = found["sending"]
    for gpu, bandwidth in GPUS.items():
        math = flops / MATMULS + FUSED * moved / bandwidth
        host = LAUNCH * FUSED * kernels
        step = max(math, sending, host)
        print(f"{gpu}: {step:.2f} s, MFU {ideal / step:.0%}")
        print(f"  math {math:.2f} s, sending {sending:.2f} s, host {host:.2f} s")
        print(f"  if nothing overlaps: MFU {ideal / (math + sending):.0%}")


# ---- turns ---------------------------------------------------------------------------------------


def run(tree, *arguments):
    """Run a command of a checkout and return what it prints."""
    command = [sys.executable, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    if child.returncode:
        raise InputError(f"{' '.join(arguments)} failed: {child.stderr.strip()[-300:]}")
    return child.stdout


def compare(config, ours, theirs, work, folder):
    """Run all contenders in turns and print the result.

    ours and theirs: the names of contenders, theirs for transformers. work: {what is timed: (its
    FLOPs or bytes, the unit of the rate)}. folder: the checkpoint.
    """
    flags = [f"--folder={folder}"]
    for key in ("stage", "batch", "size", "device", "dtype", "profile"):
        flags.append(f"--{key}={getattr(config, key)}")
    # Peers first: a missing folder is an error at once.
    contenders = []
    for peer in [*config.vs, ""]:
        names = theirs if peer == "transformers" else ours
        contenders += [(peer, name) for name in names]
    results = defaultdict(list)
    for peer, name in contenders * config.repeats:
        tree = "." if peer in ("", "transformers") else peer
        printed = run(tree, "-m", "tools.bench", config.what, f"--contender={name}", *flags)
        *table, result = printed.splitlines(keepends=True)
        sys.stdout.writelines(table)
        results[peer, name].append(json.loads(result))
    for (peer, name), found in results.items():
        texts = [f"{peer} {name}".strip()]
        for key, (amount, unit) in work.items():
            times = [one[key] for one in found]
            median = statistics.median(times)
            texts.append(f"{key} {median:.4g} ({min(times):.4g} to {max(times):.4g})")
            texts.append(f"{amount / median / 1e9:.4g} G{unit}")
        texts.append(f"{max(one['memory'] for one in found) / 2**30:.1f} GiB")
        if "loss" in found[0]:
            texts.append(f"loss {found[0]['loss']:.4f}")
        print(", ".join(texts))


def wait(device):
    """Return the time when the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Return the peak bytes of the GPU, or of this process (0 without /proc)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# what: (a contender's turn, all turns, the default batch and size)
BENCHES = {
    "train": (measure_training, compare_training, 8, "160m"),
    "decode": (measure_decoding, compare_decoding, 1, "1b"),
}


def main(arguments):
    if arguments[:1] == ["gpu-dry"]:
        gpu_dry(arguments[1:])
        return
    config = cli.parse(Config, arguments, __doc__)
    measure, compare_all, batch, size = cli.find_class(BENCHES, config.what, "--what")
    config.batch, config.size = config.batch or batch, config.size or size
    cli.find_class(SIZES, config.size, "--size")
    cli.find_class(DTYPES, config.dtype, "--dtype")
    config.device = cli.pick_device(config.device)
    torch.manual_seed(0)
    if config.contender:
        print(json.dumps(measure(config) | {"memory": peak_memory(config.device)}))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        compare_all(config, folder)


if __name__ == "__main__":
    cli.run(main)
