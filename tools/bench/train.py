"""train: a training step (forward, backward, AdamW) of a LLaVA.

Frozen CLIP, MLP connector and LLaMA with random weights. The dialogues have different lengths and
one image each. Ours packs the dialogues into one row, as train.py does.
transformers' LlavaForConditionalGeneration gets them padded on the right. Rates count tokens
without padding, and the same FLOPs for all contenders (tools/plan.py): those of the blocks that are
read, causal attention within a dialogue, logits of supervised tokens, trained parameters.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

import train
from clip import CLIPVision, CLIPVisionConfig
from common.images import ImageSpec
from common.pretrained import on_meta
from common.speed import speed_up
from dialogue import IGNORE, IMAGE
from interop.load import load_model
from llama import Llama, LlamaConfig
from mllm import MLLM
from tools import plan
from tools.bench.turns import (
    ROOT,
    limits,
    list_contenders,
    peak_memory,
    ratios,
    spread,
    take_turns,
    wait,
)

# Text tokens of eight of LLaVA's dialogues, and the share of them that are answers.
TEXTS = (212, 472, 154, 271, 310, 71, 211, 105)
SUPERVISED = 0.6
CLIP_B = {"image_size": 224, "patch_size": 16}
CLIP_L = plan.KNOWN["checkpoints"]["openai/clip-vit-large-patch14-336"]
SIZES = {
    "160m": (CLIP_B, plan.KNOWN["checkpoints"]["JackFram/llama-160m"]),
    "1b": (CLIP_L, plan.KNOWN["checkpoints"]["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]),
    "7b": (CLIP_L, plan.KNOWN["checkpoints"]["lmsys/vicuna-7b-v1.5"]),
}


def make_model(size):
    """Build an MLLM with random weights, where torch puts new tensors."""
    tower, llm = SIZES[size]
    tower = CLIPVision(CLIPVisionConfig(**tower))
    llm = Llama(LlamaConfig.from_dict(llm, size))
    tokenizer = Tokenizer.from_file(str(train.WEIGHTS / "llama" / "tokenizer.json"))
    spec = ImageSpec(tower.config.image_size)
    return MLLM([tower], llm, "mlp", tokenizer, "vicuna_v1", spec)


def dialogues(side, tokens_per_image, batch):
    """Make random dialogues -> lists of tokens and labels, pixels (batch, 3, R, R)."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels, pixels = [], [], []
    for i in range(batch):
        length = TEXTS[i % len(TEXTS)]
        text = torch.randint(3, 600, (length,), generator=generator).tolist()
        question = length - int(SUPERVISED * length)
        tokens.append(text[:1] + [IMAGE] * tokens_per_image + text[1:])
        labels.append([IGNORE] * (tokens_per_image + question) + text[question:])
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        pixels.append(image)
    return tokens, labels, torch.stack(pixels)


def train_ours(config):
    """Return the model and a function that computes the loss."""
    device = config.device
    model = load_model(config.folder, device=device).train()
    if config.dtype == "bfloat16" and config.stage == 1:
        # As train.py does with a frozen LLM.
        model.llm.bfloat16()
    speed_up(model, "train", compile=config.contender == "ours_compiled")
    train.freeze(model, ["connector"] if config.stage == 1 else ["connector", "llm"])
    tokens, labels, pixels = dialogues(model.spec.size, model.tokens_per_image, config.batch)
    lengths = [len(row) for row in tokens]
    # No token predicts the first one of a dialogue.
    labels = torch.tensor([x for row in labels for x in [IGNORE, *row[1:]]], device=device)[None]
    tokens = torch.tensor([x for row in tokens for x in row], device=device)[None]
    pixels = pixels.to(device)

    def loss():
        total, number = model(pixels, tokens, labels, lengths)
        return total / number

    return model, loss


def train_transformers(config):
    import transformers

    transformers.logging.disable_progress_bar()
    device, stage = config.device, config.stage
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model = load(config.folder, dtype=torch.float32).to(device).train()
    model.requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if stage == 1 and config.dtype == "bfloat16":
        model.model.language_model.bfloat16()
        model.lm_head.bfloat16()
    vision = model.config.vision_config
    side, num_patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    tokens, labels, pixels = dialogues(side, num_patches, config.batch)
    tokens = pad_sequence([torch.tensor(row) for row in tokens], True, 0).to(device)  # (B, T)
    labels = pad_sequence([torch.tensor(row) for row in labels], True, IGNORE).to(device)
    # No text token has the id 0.
    mask = (tokens != 0).long()
    tokens = tokens.masked_fill(tokens == IMAGE, model.config.image_token_index)
    mean, std = torch.tensor(ImageSpec.mean), torch.tensor(ImageSpec.std)
    pixels = ((pixels / 255 - mean[:, None, None]) / std[:, None, None]).to(device)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}
    return model, lambda: model(**inputs, pixel_values=pixels).loss


def one_turn(config):
    """Build, warm up with three steps, then return the median seconds of three steps."""
    build = train_ours if config.contender.startswith("ours") else train_transformers
    model, loss_of = build(config)
    device_type = torch.device(config.device).type
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    if device_type == "cuda":
        # The memory of the steps, not of loading.
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(6):
        start = wait(config.device)
        with torch.autocast(device_type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(wait(config.device) - start)
    found = {"seconds": statistics.median(times[3:]), "warm_up": times[0], "loss": losses[0]}
    found["memory"] = peak_memory(config.device)
    # The limits need room.
    del model, loss_of, optimizer, parameters, loss
    return found | limits(config)


def planned(config, stage):
    """Return the plan of a step, for plan.flops and plan.memory."""
    with on_meta():
        model = make_model(config.size)
    _, labels, _ = dialogues(model.spec.size, model.tokens_per_image, config.batch)
    lengths = [len(row) for row in labels]
    supervised = sum(label != IGNORE for row in labels for label in row)
    load = plan.Load.of(lengths, supervised, config.batch)
    one_gpu = SimpleNamespace(activation_checkpointing=False, gpus=1)
    return plan.Plan(one_gpu, model, stage == 2, load, 1, config.dtype == "bfloat16")


def bench(config):
    """Print a table and return {stage: {contender: medians}}."""
    contenders = list_contenders(config, ["ours", "ours_compiled"], ["transformers"])
    result = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        with torch.device(config.device):
            make_model(config.size).save(folder / "ours")
        # transformers and other checkouts read this layout.
        export = [sys.executable, "-m", "interop.export", f"--model={folder}/ours"]
        subprocess.run([*export, f"--to={folder}/llava"], cwd=ROOT, check=True)
        for stage in [config.stage] if config.stage else [1, 2]:
            step = planned(config, stage)
            parts, num_tokens = plan.flops(step), step.load.tokens
            # Recomputed logits are not necessary work.
            flops = sum(parts.values()) - parts["again"]
            print(f"stage {stage}: {config.batch} dialogues, {num_tokens:,} tokens", flush=True)
            found = take_turns(
                config, contenders, folder=folder / "llava", stage=stage, batch=config.batch
            )
            for name in contenders:
                one = found[name]
                share = flops / one["seconds"] / one["limit_flops"]
                print(
                    f"  {name:14} {spread(one, 'seconds')} s, "
                    f"{num_tokens / one['seconds']:,.0f} tokens/s, {share:.0%} of the limit, "
                    f"{one['memory'] / 2**30:.1f} GiB, loss {one['loss']:.4f}, "
                    f"first step {one['warm_up']:.1f} s"
                )
            ratios(found, contenders, "seconds")
            result[f"stage{stage}"] = found
    return result
