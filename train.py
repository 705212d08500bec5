"""Train a multimodal LLM in the two stages of LLaVA, COMM and the Dense Connector.

    python train.py                                                        the embedded world, on a laptop, in minutes
    python train.py --connector=comm                                       COMM's merge of CLIP and DINOv2
    python train.py config/dense_7b.toml --data1=... --image_dir=...       a paper's recipe on your data
    torchrun --nproc_per_node=8 train.py config/dense_7b.toml              the same on 8 GPUs; the 7B and 8B recipes set --fsdp
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...    on two nodes
    torchrun --nproc_per_node=8 train.py --fsdp ...                        what is larger than one card (shard.py)
    python train.py config/dense_7b.toml --lora_rank=128 ...               the LLM by adapters (lora.py)
    python train.py --resume                                               go on after a stop, bit for bit
    python train.py config/dense_7b.toml --plan --gpus=8 --gpu_memory=80   what it would take: memory, FLOPs, hours

Stage 1 teaches the connector to speak the LLM's language, on captions; stage 2 trains connector and LLM, on dialogues. What a
run writes, under --out: log.jsonl, checkpoints/ (only what is trained, with the optimizer: for --resume and for the next
stage), model/ (the whole model, for sample.py and eval.py) and with LoRA adapter/ (what it adds to the LLM, alone).
"""
import gc
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset

import checkpoint
import cli
import lora
import shard
from compiled import compile_blocks
from connector import ConnectorConfig
from data import LlavaData, Loader, ShikraData
from hub import LARGE, InputError, stored
from launch import PARTS, Log, Ranks, check, run_folder, say
from linear import by_convolution
from llava import load_connector
from mllm import MLLM
from world import World

HERE = Path(__file__).resolve().parent
TINY = {"comm": ("clip", "dinov2"), "comm_dino": ("dinov2",)}          # towers where none are named; the others: CLIP


@dataclass
class Config:
    # the model
    connector: str = "dense"             # linear, mlp, sti, sci, dci (= dense), efficient, comm; its sides: comm_clip, comm_dino
    vision: list[str] = field(default_factory=lambda: [])  # towers, folders or hub ids; none: the tiny CLIP (comm: and DINOv2)
    llm: str = ""                        # LLaMA folder or hub id; empty: the tiny one
    tokenizer: str = ""                  # folder with a tokenizer.json; empty: the LLM's own
    template: str = ""                   # of stage 2: vicuna_v1, llama_2, llama_3, chatml, phi, tiny, ...; empty: the LLM's own
    image_size: int = 0                  # side R in pixels; 0: what the first tower was trained at
    image_mode: str = "pad"              # a picture becomes a square by pad, crop or stretch
    groups: int = 2                      # dense: number of groups of layers
    merge: str = "lln"                   # comm: lln, layerscale, mean_half, mean_all
    dino_depth: int = 2                  # comm: MLPs after DINOv2's merge
    dino_expansion: int = 4              # comm: their width inside, as a multiple of DINOv2's
    layer: int | None = None             # linear, mlp: the hidden state that they read, 0 .. depth; none: the second to last
    # what is trained on what: a key that ends in 1 is stage 1's, in 2 stage 2's
    stage: int = 0                       # 1, 2, or 0: both in a row
    init: str = ""                       # start stage 2 from this checkpoint or connector; empty: this run's stage 1; "new": from nothing
    train1: list[str] = field(default_factory=lambda: ["connector"])  # parts that learn: vision, connector, llm
    train2: list[str] = field(default_factory=lambda: ["connector", "llm"])  # the same for stage 2
    data1: list[str] = field(default_factory=lambda: ["world"])  # LLaVA's .json(l); rec:FILE or reg:FILE (Shikra's); world
    data2: list[str] = field(default_factory=lambda: ["world"])  # several files are mixed, in proportion to their size
    equal1: bool = False                 # every file counts alike: the smaller ones are repeated
    equal2: bool = False                 # the same for stage 2
    image_dir: str = ""                  # folder of the pictures; empty: beside each data file
    template1: str = "plain"             # template of stage 1
    max_length: int = 2048               # tokens a dialogue, pictures included, or the LLM's context if shorter; the turns over it are cut
    batch1: int = 16                     # samples an optimizer step, over all ranks and micro-batches
    batch2: int = 16                     # the same for stage 2
    micro_batch: int = 32                # samples a forward on one rank; a step takes as many forwards as it needs
    steps1: int = 150                    # optimizer steps of stage 1; 0: epochs1 says
    steps2: int = 1500                   # optimizer steps of stage 2; 0: epochs2 says
    epochs1: float = 1                   # passes over the data, where steps1 is 0
    epochs2: float = 1                   # the same for stage 2
    lora_rank: int = 0                   # the LLM learns through adapters of this rank (lora.py); 0: all of it learns
    lora_alpha: int = 0                  # what they add counts alpha / rank times; 0: twice the rank, as in the paper's recipe
    # optimisation
    lr1: float = 3e-3                    # peak learning rate of stage 1
    lr2: float = 2e-3                    # peak learning rate of stage 2, of the LLM and the towers
    connector_lr2: float = 3e-3          # of the connector in stage 2; 0: lr2
    lora_lr2: float = 0.0                # of the LLM's adapters in stage 2; 0: lr2
    warmup: float = 0.03                 # share of the steps in which the learning rate rises; then a cosine to zero
    weight_decay: float = 0.0            # AdamW's
    beta2: float = 0.98                  # AdamW's second moment; the papers use 0.999
    clip: float = 1.0                    # largest norm of the gradient; 0: it is not clipped
    seed: int = 0                        # of the connector's start and the order of the data
    # how it runs
    out: str = ""                        # folder of the run; empty: out/<connector>, with a number where that is taken
    resume: bool = False                 # go on from the newest checkpoint of --out (or of the newest such run)
    save_every: int = 500                # steps between checkpoints; SIGINT and SIGTERM save as well
    log_every: int = 50                  # steps between lines
    log: list[str] = field(default_factory=lambda: [])  # tensorboard and/or wandb, beside log.jsonl
    evaluate: bool = True                # print the scores at the end, where the data is the embedded world
    device: str = "auto"                 # cuda, mps, cpu
    bf16: bool | None = None             # autocast to bfloat16; none: on CUDA, and for a large LLM of 16 bits
    compile: bool | None = None          # torch.compile the transformer blocks; none: on CUDA
    fsdp: bool = False                   # spread weights, gradients and optimizer over all ranks (shard.py); one rank: no effect
    activation_checkpointing: bool = False  # recompute the LLM's blocks in the backward pass: less memory, a third slower
    workers: int | None = None           # loader processes a rank, 0: in line; none: 4 on CUDA, which else waits for pictures

    def __post_init__(self):
        self.lora_alpha = self.lora_alpha or 2 * self.lora_rank


# --- what a stage needs -----------------------------------------------------------------------------------------------

def uses_bf16(config, device):
    """Where --bf16 is not given: on CUDA, and on a CPU for a large LLM whose file has 16 bits a number: 13 GB would be 26."""
    kind = torch.device(device).type
    if config.bf16 is None and kind == "cpu" and config.llm:
        numbers, halved = stored(config.llm)
        return halved and numbers >= LARGE
    fast = kind == "cuda" and not (torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False))
    return fast if config.bf16 is None else config.bf16              # a card before Ampere has no bfloat16


def settings(config, stage):
    """The fields of one stage, without the 1 or 2 at their end."""
    return {key[:-1]: value for key, value in asdict(config).items() if key.endswith(str(stage))}


def llm_dtype(config, stage, device):
    """float32 for an LLM whose own weights learn. Under autocast another one needs no such master copy: it goes from its bf16
    file to the card as it is, and on a CPU is not even copied: all processes of a node read the mapped file."""
    learns = "llm" in settings(config, stage)["train"] and not config.lora_rank
    return torch.bfloat16 if uses_bf16(config, device) and not learns else torch.float32


def build_model(config, device, stage=2, sharded=False):
    """The MLLM that the options name, its connector new. sharded: its LLM stays in its mapped files. Raises InputError."""
    tiny = [HERE / "weights" / name for name in TINY.get(config.connector, ("clip",))]
    shape = ConnectorConfig(config.connector, config.groups, config.merge, config.dino_depth, config.dino_expansion, config.layer)
    torch.manual_seed(config.seed)                                   # the connector's start
    return MLLM.assemble(config.vision or tiny, config.llm or HERE / "weights" / "llama", shape, config.template or None,
                         config.image_size or None, config.image_mode, config.tokenizer or None, device=device,
                         llm_dtype=llm_dtype(config, stage, device), llm_mapped=sharded)


def build_stage(config, stage, run, device, main=True, sharded=False):
    """The model that a stage starts from: the weights that were named, adapters if the LLM has learnt through them by then, and
    what the stage before it has learnt. sharded: spread over all ranks."""
    model = build_model(config, device, stage, sharded)              # anew for stage 2: from the very weights that were named
    if config.lora_rank and any("llm" in settings(config, past)["train"] for past in (1, 2)[:stage]):
        lora.adapt(model.llm, config.lora_rank, config.lora_alpha)
    model.learnt = set()                                             # what differs by now from the weights that were named
    from_run = stage == 2 and config.init != "new" and (not config.init or (Path(config.init) / "state.json").exists())
    if stage == 2 and config.init not in ("", "new") and not from_run:
        load_connector(model, config.init)                           # no run of ours: a connector alone, or a public model's
    if sharded:
        choose_trained(model, settings(config, stage)["train"])
        shard.spread(model, device, llm_dtype(config, stage, device), uses_bf16(config, device))
    if from_run:
        former = [Path(config.init)] if config.init else checkpoint.newest_last(run / "checkpoints", 1)
        if not former:
            raise InputError(f"stage 2 starts from stage 1's connector, and {run}/checkpoints has none: run stage 1 first, or "
                             "name a checkpoint with --init=FOLDER (--init=new starts from a random connector)")
        state = checkpoint.load(former[-1], model)
        model.learnt = {*state.get("learnt", checkpoint.Rows(former[-1], "trained").names())}
        if state["step"] < state["steps"]:
            say(main, f"note: {former[-1]} is unfinished, step {state['step']} of {state['steps']}")
        checkpoint.check_start(config, former[-1], state, main)
        alpha = state["config"].get("lora_alpha", 0)                 # 0: its LLM learnt without adapters, if at all
        if "llm" in state["config"][f"train{state['stage']}"] and config.lora_rank and alpha not in (0, config.lora_alpha):
            raise InputError(f"{former[-1]}: was trained with --lora_alpha={alpha}, not {config.lora_alpha}: its adapters "
                             "would count differently")
    if "llm" not in settings(config, stage)["train"] and not sharded:
        lora.merge(model.llm)                                        # stage 1's, which this stage leaves as they are
    return model


def build_data(config, stage):
    """The stage's dataset. Errors name file and line, before anything is trained."""
    own, parts = settings(config, stage), []
    for name in own["data"]:
        kind, colon, path = name.partition(":")
        if name == "world":
            parts.append(World("train", own["steps"] * own["batch"] or 20_000, "caption" if stage == 1 else "dialogue"))
        elif colon and kind in ("rec", "reg"):
            if config.image_mode != "pad":
                raise InputError(f"{name}: boxes are those of padded pictures, with --image_mode={config.image_mode} they are wrong")
            parts.append(ShikraData(path, config.image_dir or Path(path).parent, kind))
        else:
            parts.append(LlavaData(name, config.image_dir or Path(name).parent))
    if not parts:
        raise InputError(f"--data{stage} is empty")
    if own["equal"]:
        parts = [part for part in parts for _ in range(round(max(map(len, parts)) / len(part)))]
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def choose_trained(model, parts):
    """Set requires_grad: `parts` learn, the others are frozen; of an LLM with adapters only they learn, and are a part of their
    own, "lora". Returns {part: its trained parameters}."""
    adapters = list(lora.adapters(model.llm).values())
    for part in PARTS:
        getattr(model, part).requires_grad_(part in parts and not (part == "llm" and adapters))
    for adapter in adapters:
        adapter.requires_grad_("llm" in parts)
    for tower, layers in zip(model.vision, model.layers):            # nothing beyond the deepest layer read can learn
        for name, parameter in tower.named_parameters():
            depth = int(name.split(".")[1]) if name.startswith("blocks.") else -1       # embeddings: before all blocks
            if depth >= max(layers) or name.startswith(("norm.", "norm_post.", "classifier", "distillation_c", "mask_token")):
                parameter.requires_grad_(False)
    trained = {part: [p for p in getattr(model, part).parameters() if p.requires_grad] for part in parts}
    return {"lora" if part == "llm" and adapters else part: parameters for part, parameters in trained.items()}


def learning_rate(step, steps, warmup):
    """Factor on the peak rate: a linear rise over the first `warmup` share of the steps, then a cosine to zero."""
    rise = max(1, round(steps * warmup))
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


# --- the loop ---------------------------------------------------------------------------------------------------------

def train_stage(config, stage, model, dataset, run, ranks):
    """One stage on this rank. `run`: its folder. Returns False if it was asked to stop before the end."""
    own, main, sharded = settings(config, stage), ranks.rank == 0, config.fsdp and ranks.size > 1
    use_bf16 = uses_bf16(config, ranks.device)
    trained = choose_trained(model, own["train"])
    steps = own["steps"] or math.ceil(own["epochs"] * len(dataset) / own["batch"])
    rates = {part: own.get(f"{part}_lr") or own["lr"] for part in trained}     # connector_lr2, lora_lr2
    optimizer = torch.optim.AdamW([{"params": trained[part], "peak": rates[part]} for part in trained], lr=own["lr"],
                                  betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True)
    saved, start = checkpoint.newest_last(run / "checkpoints", stage) if config.resume else [], 0
    ranks.agree("the number of samples", len(dataset))
    ranks.agree("the step to go on from", int(saved[-1].name.rpartition("-")[2]) if saved else 0)
    if saved:
        state = checkpoint.load(saved[-1], model, optimizer)
        start = state["step"]
        if state.get("samples", len(dataset)) != len(dataset):
            raise InputError(f"{saved[-1]}: was trained on {state['samples']:,} samples, and the data now has {len(dataset):,}: its "
                             "order would be another; start anew with another --out")
        say(main, f"resumed from {saved[-1]} at step {start}")
        if start >= steps:
            return True
    template = own.get("template") if stage == 1 else model.template
    longest = min(config.max_length, model.llm.config.context)
    workers = 4 * (ranks.device.type == "cuda") if config.workers is None else config.workers
    loader = Loader(dataset, model.tokenizer, template, model.spec, model.tokens_per_image, longest, own["batch"],
                    config.micro_batch, config.seed + stage, ranks.rank, ranks.size, workers, start * own["batch"])
    model.llm.gradient_checkpointing = config.activation_checkpointing
    model.train()
    network = model
    if ranks.size > 1 and not sharded:
        # DDP begins by copying rank 0's weights to all ranks; written over, a mapped file would be copied into every process. Buffers
        # (RoPE's table, the pixels' statistics) are the same on all, and need not be sent before every forward
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, p in model.named_parameters() if not p.requires_grad] + [name for name, _ in model.named_buffers()])
        network = DistributedDataParallel(model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)

    count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS}
    if "lora" in trained:
        count["lora"] = sum(p.numel() for p in trained["lora"])
        count["llm"] -= count["lora"]
    say(main, f"\nstage {stage}: " + ", ".join(f"{part} {count[part] / 1e6:.2f}M {'trained' if part in trained else 'frozen'}"
                                              for part in count))
    say(main, f"  {len(dataset):,} samples ({', '.join(own['data'])}), {steps} steps of {own['batch']}, "
              f"{model.tokens_per_image} visual tokens a picture, peak learning rate {own['lr']:g}, {'bfloat16' if use_bf16 else 'float32'} on {ranks.size} x {ranks.device.type}"
              + ", FSDP" * sharded)

    writer, bad_steps, empty_steps, skipped, began = Log(config, run, main, stage, start), 0, 0, 0, time.time()
    tokens_seen, since = 0, time.time()
    save = lambda step: (main or sharded) and checkpoint.save(
        run / "checkpoints" / f"stage{stage}-{step:07d}", model, optimizer,
        {"stage": stage, "step": step, "steps": steps, "samples": len(dataset), "config": asdict(config),
         "learnt": sorted(model.learnt | {name for name, p in model.named_parameters() if p.requires_grad})}, ranks if sharded else None)
    for step, micro_batches in zip(range(start, steps), loader):
        ranks.doing = f"step {step} of stage {stage}"
        factor = learning_rate(step, steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        # every rank learns how many tokens the whole global batch supervises, how many it holds, and whether one should stop
        supervised = sum((batch.labels >= 0).sum().item() for batch in micro_batches)
        held = sum(batch.tokens.numel() for batch in micro_batches if batch.ids)
        supervised, held, stop, left_out = ranks.sum(torch.tensor(
            [supervised, held, ranks.stop, len(loader.skipped)], dtype=torch.float64)).tolist()
        losses = []
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            # DDP sums up over micro-batches first; FSDP reduces after each, for whole gradients may be larger than a card
            with nullcontext() if last or network is model else network.no_sync():
                with torch.autocast(ranks.device.type, torch.bfloat16, enabled=use_bf16):
                    pixels, tokens, labels, shown = (tensor.to(ranks.device) for tensor in
                                                     (batch.pixels, batch.tokens, batch.labels, batch.shown))
                    loss, _ = network(pixels, tokens, labels, batch.lengths, shown)
                # DDP and FSDP average over ranks, ranks.size undoes that: the gradient is that of sum / number of the global batch
                (loss * (ranks.size / max(1, supervised))).backward()
                losses.append(loss.detach())
        total = ranks.sum(torch.stack(losses).sum())
        norm = shard.whole(torch.nn.utils.clip_grad_norm_([p for part in trained.values() for p in part], config.clip or math.inf))
        loss, norm = total.item() / max(1, supervised), norm.item()  # a GPU is waited for here
        if math.isfinite(loss) and math.isfinite(norm):              # both are the same on every rank, so all decide alike
            optimizer.step()
            bad_steps = 0
        else:
            bad_steps += 1
            mine = [name for batch, part in zip(micro_batches, losses) if not part.isfinite() for name in batch.ids]
            print(f"step {step}: loss {loss}, gradient norm {norm}: step skipped" + (f"; among {', '.join(mine)}" if mine else ""),
                  file=sys.stderr, flush=True)
            if bad_steps == 10:
                raise InputError(f"ten steps in a row without a finite loss, stopped at step {step}; the last checkpoint under "
                                 f"{run}/checkpoints is good: lower the learning rate, then --resume")
        optimizer.zero_grad()
        tokens_seen += held
        empty_steps = 0 if supervised else empty_steps + 1
        for name, error in list(loader.skipped.values())[skipped:]:
            print(f"skipped {name}: {error}", file=sys.stderr)
        skipped = len(loader.skipped)
        if empty_steps == min(10, steps):
            raise InputError(f"{empty_steps} steps in a row without a token to learn from, stopped at step {step}; a picture takes "
                             f"{model.tokens_per_image} tokens, a dialogue may have {longest}")
        if step % config.log_every == 0 or step + 1 == steps or stop:
            now = time.time()
            left = (now - began) / (step + 1 - start) * (steps - step - 1)
            say(main, f"stage {stage}  step {step:5d}/{steps}  loss {loss:.4f}  lr {own['lr'] * factor:.2e}  "
                      f"{tokens_seen / max(now - since, 1e-9):,.0f} tokens/s  {left // 60:.0f}m{left % 60:02.0f}s left")
            writer.write({"stage": stage, "step": step, "loss": loss, "lr": own["lr"] * factor, "gradient_norm": norm,
                          "tokens": int(held), "supervised": int(supervised), "tokens_per_second":
                          round(tokens_seen / max(now - since, 1e-9)), "skipped": int(left_out), "seconds": round(now - began, 1)})
            tokens_seen, since = 0, now
        if stop or step + 1 == steps or (step + 1) % config.save_every == 0:
            save(step + 1)
        if stop:
            say(main, f"stopped at step {step + 1} of stage {stage}, saved; go on with --resume")
            return False
    return True


def write(config, model, run, main, sharded):
    """model/, with LoRA adapter/ beside it, and merges the adapters. Rank 0 writes; of a spread model the others hand it their
    rows, one tensor at a time."""
    if adapters := {name: shard.whole(p) for name, p in lora.adapters(model.llm).items()}:
        if any(name.startswith("llm.") and ".lora_" not in name for name in model.learnt):
            say(main, f"note: no {run}/adapter: stage 1 trained the LLM itself, so adapters alone would fit no LLM that is named")
        elif main:
            lora.save(adapters, run / "adapter", config.lora_rank, config.lora_alpha,
                      str(config.llm or HERE / "weights" / "llama"))
    if not sharded:
        lora.merge(model.llm)
    named = shard.gathered(model) if sharded else None
    if main:
        model.eval().save(run / "model", named=named)
    elif sharded:
        for _ in named:
            pass


def main(arguments):
    if {"--plan", "--plan=true", "--plan=yes", "--plan=1"} & {argument.lower() for argument in arguments}:
        import plan                                                  # it says what the run would take, and trains nothing
        return plan.main(arguments)
    config = cli.parse(Config, arguments, __doc__)
    check(config)
    stages = [config.stage] if config.stage else [1, 2]
    ranks, began = Ranks(config.device), time.time()
    run, sharded = run_folder(config), config.fsdp and ranks.size > 1
    with ranks.in_contact(run):
        ranks.barrier()                                              # all ranks have looked before one of them writes
        say(ranks.rank == 0, f"{config.connector} connector, run folder {run}")
        datasets = {stage: build_data(config, stage) for stage in stages}
        for stage in stages:
            model = None                                             # stage 1's, which FSDP's cycles of references would keep
            gc.collect()
            model = build_stage(config, stage, run, ranks.device, ranks.rank == 0, sharded)
            compiled = ranks.device.type == "cuda" if config.compile is None else config.compile
            if compiled:
                for blocks in [model.llm.layers, *(tower.blocks for tower in model.vision)]:
                    compile_blocks(blocks)
            elif not uses_bf16(config, ranks.device):
                by_convolution(model)                                # float32: on an AMD with AVX-512 twice as fast
            ranks.enter(run)
            finished = train_stage(config, stage, model, datasets[stage], run, ranks)
            ranks.barrier()                                          # stage 2 reads what rank 0 saved
            if not finished:
                break
        if finished:
            ranks.doing = f"writing {run}/model"
            write(config, model, run, ranks.rank == 0, sharded)
            ranks.stop_at_once()
    if finished and ranks.rank == 0:
        on_world = "world" in (config.data1 if config.stage == 1 else config.data2)
        say(True, f"\nwrote {run}/model after {time.time() - began:.0f} s")
        if config.evaluate and on_world and not (sharded or ranks.stop):
            from eval import evaluate, table
            # texts of all lengths would compile the blocks over and over
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                scores = evaluate(model, count=200)
            say(True, "\nscores on held-out scenes, and blind: the same questions with the pictures exchanged\n" + table(scores))
        if on_world:
            say(True, f"\nnext: python sample.py --model={run}/model   (answers beside the truth, and a picture with boxes)\n"
                      f"      python eval.py --model={run}/model"
                      + "     (the scores: this run's model is spread over its ranks)" * sharded)
        else:
            say(True, f"\nnext: python sample.py --model={run}/model --image=photo.jpg --prompt='...'")
    with ranks.in_contact(run):
        ranks.close()


if __name__ == "__main__":
    cli.run(main)
