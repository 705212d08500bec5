"""Train a multimodal LLM in the two stages of LLaVA, COMM and the Dense Connector.

    python train.py                                              the toy world, minutes on a laptop
    python train.py --connector=comm                             COMM's merge of CLIP and DINOv2
    python train.py config/dense_7b.toml --data1=... --image_dir=...    a recipe on your data
    torchrun --nproc_per_node=8 train.py config/dense_7b.toml    the same on 8 GPUs
    python train.py --resume                                     continue the run in out/dense

Stage 1 trains the connector on captions. Stage 2 trains connector and LLM on dialogues. The vision
towers stay frozen. A run writes to --out: log.jsonl, loss.png, checkpoints/ (what is trained, the
optimizer; for --resume and the next stage), model/ (for sample.py and eval.py), LoRA's adapter/.
"""

import gc
import math
import re
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch.utils.data import ConcatDataset

from common import checkpoint, cli, fsdp, lora
from common.distributed import data_parallel
from common.draw import draw_losses
from common.errors import InputError
from common.records import check_images
from common.run import (
    NO_STEPS,
    PARTS,
    Config,
    Log,
    Ranks,
    check_progress,
    fingerprint,
    name_out_of_memory,
    print_bad_step,
    print_stage,
    profiled,
    run_folder,
    save_model,
)
from common.speed import speed_up
from connector import CONNECTORS
from data import DATASETS, Loader
from mllm import MLLM

# ---- model and data ------------------------------------------------------------------------------


def build_model(config, stage, device, is_sharded=False):
    """Load towers and LLM and add a new connector. With FSDP the LLM stays in its files."""
    torch.manual_seed(config.seed)
    return MLLM.assemble(
        *config.checkpoints(),
        {"name": config.connector, **config.connector_options},
        template=config.template,
        image_size=config.image_size,
        image_mode=config.stage_options(stage).image_mode,
        device=device,
        vision_dtype=config.dtype("vision", stage, device),
        llm_dtype=None if is_sharded else config.dtype("llm", stage, device),
    )


def build_stage(config, stage, run, ranks):
    """Build the model, add LoRA adapters if asked, and load what stage 1 trained."""
    options, device = config.stage_options(stage), ranks.device
    ranks.is_sharded = options.fsdp and ranks.size > 1
    model = build_model(config, stage, device, ranks.is_sharded)
    # A whole model or a connector comes before LoRA and FSDP, stage 1's checkpoint after them.
    if config.init not in ("", "new"):
        from interop.load import start_from

        model = start_from(model, config.init, ranks.is_sharded)
    if config.lora_rank and "llm" in options.train:
        lora.adapt(model.llm, config.lora_rank, config.lora_alpha, config.lora_dropout)
    if ranks.is_sharded:
        freeze(model, options.train)
        dtype, bf16 = config.dtype("llm", stage, device), config.uses_bf16(device)
        fsdp.shard(model, device, config.fsdp_replicas, dtype, bf16)
    if stage == 2 and not config.init:
        checkpoint.load_stage_1(run, model)
    return model


def read_data(config, stage, names, split="train"):
    """Open the files of --data1 or another such option. Errors name file and line."""
    options = config.stage_options(stage)
    datasets = []
    # The command line has split vqa:QUESTIONS,ANNOTATIONS at the comma: join them again.
    for name in re.findall("vqa:[^,]+,[^,]+|[^,]+", ",".join(names)):
        kind, colon, path = name.partition(":")
        if name == "world":
            from toy.world import World

            size = 200 if split == "test" else options.steps * options.batch or 20_000
            datasets.append(World(split, size, "caption" if stage == 1 else "dialogue"))
            continue
        if not colon:
            kind, path = "llava", name
        cls = cli.find_class(DATASETS, kind, f"{name}: KIND")
        if cls.has_boxes and options.image_mode != "pad":
            raise InputError(f"--image_mode={options.image_mode}: the boxes of {name} need pad")
        datasets.append(cls(path, options.image_dir))
        check_images(datasets[-1])
    return datasets


def build_dataset(config, stage):
    """Return the training data of a stage."""
    options = config.stage_options(stage)
    datasets = read_data(config, stage, options.data)
    has_images = any(getattr(dataset, "num_with_images", True) for dataset in datasets)
    if not has_images and "llm" not in options.train:
        raise InputError(f"--data{stage}: has no images, so --train{stage} must contain llm")
    if options.equal:
        largest = max(len(dataset) for dataset in datasets)
        datasets = [d for d in datasets for _ in range(round(largest / len(d)))]
    return ConcatDataset(datasets)


def freeze(model, parts):
    """Make only `parts` trainable and return {part: its trainable parameters}.

    With LoRA only the adapters of the LLM are trained, as the part "lora".
    """
    adapters = [p for name, p in model.llm.named_parameters() if ".lora_" in name]
    for part in PARTS:
        is_trained = part in parts and not (part == "llm" and adapters)
        getattr(model, part).requires_grad_(is_trained)
    for parameter in adapters:
        parameter.requires_grad_("llm" in parts)
    # A block above the deepest layer that the connector reads would never get a gradient.
    for tower, layers in zip(model.vision, model.connector.layers, strict=True):
        tower.freeze_above(max(max(x) if isinstance(x, range) else x for x in layers))
    if model.spec.mode == "anyres":
        # As in LLaVA-NeXT: stage 1 trains the projector alone.
        model.connector.image_newline.requires_grad_({"connector", "llm"} <= set(parts))
    trainable = {}
    for part in parts:
        name = "lora" if part == "llm" and adapters else part
        parameters = getattr(model, part).parameters()
        trainable[name] = [p for p in parameters if p.requires_grad]
    return trainable


def learning_rate(step, steps, warmup):
    """Return a factor from 0 to 1: linear warmup, then cosine decay to zero."""
    warmup_steps = max(1, round(steps * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


# ---- the loop ------------------------------------------------------------------------------------


def train_stage(config, stage, model, dataset, held_out, run, ranks):
    """Train one stage. Return False if the run was asked to stop before the end."""
    options = config.stage_options(stage)
    device = ranks.device
    has_boxes = any(getattr(part, "has_boxes", False) for part in dataset.datasets)
    if has_boxes and model.spec.mode != "pad":
        # With --init the image mode is the model's.
        raise InputError(f"--data{stage}: has boxes, which need pad, not {model.spec.mode}")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.uses_bf16(device))
    steps = options.steps or math.ceil(options.epochs * len(dataset) / options.batch)

    # optimizer: one group for each part, with its own peak learning rate
    groups = []
    for part, parameters in freeze(model, options.train).items():
        peak = getattr(options, f"{part}_lr", 0) or options.lr
        groups.append({"part": part, "params": parameters, "peak": peak})
    optimizer = torch.optim.AdamW(
        groups, betas=(0.9, config.adam_beta), weight_decay=config.weight_decay, fused=True
    )
    parameters = [p for group in groups for p in group["params"]]

    # resume: `state` goes into the checkpoints
    state = {"stage": stage, "step": 0, "steps": steps, "config": asdict(config)}
    state |= {"data": fingerprint(dataset), "interval": dict(NO_STEPS)}
    ranks.agree(state["data"])
    if config.resume:
        checkpoint.resume(run, model, optimizer, state, ranks)
    start = state["step"]

    # data: the order is a function of the seed, so the loader can start at any sample
    loader = Loader(
        dataset,
        model.tokenizer,
        options.template if stage == 1 else model.template,
        model.spec,
        model.tokens_per_image,
        min(config.max_length, model.llm.config.context),
        options.batch,
        config.micro_batch,
        seed=config.seed + stage,
        rank=ranks.rank,
        world_size=ranks.size,
        workers=config.num_workers(device),
        start=start * options.batch,
    )

    # With a budget, compiled blocks choose what to recompute (common/speed.py).
    has_budget = config.memory_budget and config.compile
    model.llm.gradient_checkpointing = options.activation_checkpointing and not has_budget
    model.train()
    network = model
    if ranks.size > 1 and not ranks.is_sharded:
        network = data_parallel(model, device)
    log = Log(config, model, run, ranks, state)
    print_stage(config, stage, model, groups, len(dataset), steps, ranks)

    useless_steps = 0
    batches = zip(range(start, steps), loader, strict=False)
    for step, micro_batches in profiled(batches, config, stage, run, ranks):
        # learning rate
        factor = learning_rate(step, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        # the random numbers of LoRA's dropout: a function of seed, step and rank, for --resume
        torch.manual_seed(config.seed + step * ranks.size + ranks.rank)

        # The loss is a mean over the supervised tokens of the global batch: count them first.
        num_supervised = sum(len(batch.supervised) for batch in micro_batches)
        num_tokens = sum(batch.tokens.numel() for batch in micro_batches if batch.ids)
        num_skipped = sum(len(batch.skipped) for batch in micro_batches)
        # ranks.stop is summed too: all ranks stop at the same step.
        counts = torch.tensor([num_supervised, num_tokens, num_skipped, ranks.stop])
        num_supervised, num_tokens, num_skipped, stop = ranks.sum(counts).tolist()

        # forward and backward
        losses = []
        for i, batch in enumerate(micro_batches):
            # DDP sums gradients over the ranks once, after the last micro-batch.
            is_synced = network is model or i + 1 == len(micro_batches)
            syncing = nullcontext() if is_synced else network.no_sync()
            with syncing, name_out_of_memory(step, batch):
                with autocast:
                    loss = network(batch)
                # DDP and FSDP average gradients over the ranks: multiply by their number.
                (loss * (ranks.size / max(1, num_supervised))).backward()
            losses.append(loss.detach())
        loss = ranks.sum(torch.stack(losses).sum())

        # clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        norm = fsdp.full(norm) if ranks.is_sharded else norm
        # The host waits for the GPU here.
        loss, norm = torch.stack([loss, norm]).tolist()
        loss /= max(1, num_supervised)

        # step, unless something is not finite; loss and norm are equal on all ranks
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if is_finite:
            optimizer.step()
        else:
            print_bad_step(step, loss, norm, micro_batches, losses)
        optimizer.zero_grad()
        useless_steps = 0 if is_finite and num_supervised else useless_steps + 1
        check_progress(stage, step, useless_steps, steps)

        # log
        log.count(loss, num_tokens, num_skipped)
        is_finished = step + 1 == steps
        if step % config.log_every == 0 or is_finished or stop:
            record = {"step": step, "loss": loss, "lr": options.lr * factor}
            record |= {"gradient_norm": norm, "tokens": num_tokens, "supervised": num_supervised}
            log.write(record)

        # save at the end; before it not after a skipped step, since the weights may be why
        is_due = stop or (step + 1) % config.save_every == 0
        if is_finished or (is_due and is_finite):
            log.write_held_out(step, model, held_out, loader, autocast)
            state["step"] = step + 1
            checkpoint.save(run, model, optimizer, state, ranks)
        if stop:
            ranks.print(f"stopped at step {step + 1}; --resume continues from the last checkpoint")
            return False
    return True


def print_scores(config, model, run, ranks):
    """Print the scores on the toy world, and what to do next."""
    is_world = "world" in config.stage_options(config.stage or 2).data
    if config.evaluate and is_world and not ranks.is_sharded:
        from eval import evaluate, table

        lora.merge(model.llm)
        # Prompts of all lengths would compile the blocks again and again.
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            print(f"\n{table(evaluate(model.float(), count=200))}")
    print(f"\nnext: python sample.py --model={run}/model")


def main(arguments):
    about = f"{__doc__}\nOptions of the connectors:\n{cli.class_help(CONNECTORS, '--connector')}\n"
    config = cli.parse(Config, arguments, about)
    config.connector_options = cli.parse_options(
        CONNECTORS, config.connector, config.connector_options, "--connector"
    )
    stages = [config.stage] if config.stage else [1, 2]
    ranks, began = Ranks(config.device), time.time()
    config.compile = config.uses_compile(ranks.device)
    if ranks.size % config.fsdp_replicas:
        raise InputError(f"--fsdp_replicas: must divide the number of ranks, {ranks.size}")
    run = run_folder(config, ranks)
    ranks.print(f"{config.connector} connector, run folder {run}")
    data = {}
    for stage in stages:
        held_out = read_data(config, stage, config.stage_options(stage).eval_data, "test")
        data[stage] = build_dataset(config, stage), held_out
    for stage in stages:
        # Free the model of stage 1 before the next one is built.
        model = None
        gc.collect()
        model = build_stage(config, stage, run, ranks)
        is_recomputed = config.stage_options(stage).activation_checkpointing
        budget = config.memory_budget if is_recomputed else 0
        speed_up(model, "train", config.compile, budget or 1.0)
        is_finished = train_stage(config, stage, model, *data[stage], run, ranks)
        ranks.barrier()
        if not is_finished:
            break
    if is_finished:
        save_model(config, model, run, ranks)
    ranks.close()
    if is_finished and ranks.is_main:
        draw_losses(run)
        print(f"\nwrote {run}/model and {run}/loss.png after {time.time() - began:.0f} s")
        print_scores(config, model, run, ranks)


if __name__ == "__main__":
    cli.run(main)
