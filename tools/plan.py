"""Estimate what a training run needs: parameters, GPU memory, FLOPs and hours.

    python -m tools.plan config/dense_7b.toml --gpus=8 --gpu_memory=80

The model is built on the meta device (shapes without storage), so it needs config.json files only.
common/shapes.json has those of the recipes in config/, which need no download. The plan follows
train.py: packed dialogues without padding, float32 trained weights, AdamW's two moments in float32,
bf16 autocast, frozen towers and a frozen LLM in bf16, and logits at supervised positions only.

Memory of one GPU in bytes. A forward has T tokens, n of them supervised, and I images. b is 2 under
autocast, otherwise 4. e is the residual stream's: 2 for a bf16 LLM and with FSDP under autocast,
otherwise 4. C is the LLM's width, F its MLP's, W that of all query heads, K that of all key heads,
H the number of heads, L of blocks, V the vocabulary.

    weights      4 a parameter, b in the towers and a frozen LLM. FSDP splits the LLM and all
                 trained parameters.
                 It gathers the embedding, lm_head and two blocks at a time, b a parameter.
    gradients    4 a trained parameter; DDP keeps them between the steps
    optimizer    8 a trained parameter
    LLM block    T·(8C [both norms] + b(2W + 2K) [queries, output, keys, values]
                 + 3bF [gate, SiLU, up]). If the LLM is trained, T·b(2C or 5C [inputs of the linear
                 layers, each cast separately by autocast] + F [input of the last]) more, and
                 without LoRA T·2eC [outputs of the norms]. In float32 4T(H + W [if trained]) more.
                 With LoRA's dropout every linear layer keeps its own input and a mask instead,
                 T(b + 1) a channel. Phi: 4C, no gate and up, 4C inputs, no outputs of norms.
                 A block that is compiled, as by default on a GPU, keeps 3/4 of this.
    all blocks   L of these. With activation checkpointing: the share --memory_budget of each, at
                 least its input (eC·T), and one block.
    casts        2 a weight of a float32 LLM under autocast
    connector    b a value of the inputs of linear layers and GELUs, 4 + b of LayerNorms, 4 of
                 convolutions and BatchNorms. The queries, keys and values of mgm are not counted.
    logits       12nV: log-softmax and two gradients in float32, of MAX_LOGITS values at a time
    peak         weights, optimizer, and the most that exists at one time: at the end of the
                 forward; with the logits; in the backward of the last block; in that of the first
                 block, when all gradients exist

FLOPs are those of matrix products and convolutions. PyTorch counts those of the towers and of the
connector. In the LLM a weight takes 2 a token in the forward, 2 for the gradient of its input and 2
for its own. Attention takes 2W·T² in the forward (causal), twice that backward. With activation
checkpointing the backward computes the products of the forward again. With a --memory_budget it
computes attention and a part of the linear layers again, from 0.7 on attention alone, at 1 nothing.

The plan does not know the CUDA context, fragmentation and the communication library, so a run fits
if it takes at most ROOM of the memory. The loader groups dialogues by length, so some micro-batches
are far longer than the mean. tests/test_tools.py compares the plan with PyTorch's allocator and
FLOP counter on a CPU, tests/live_fake_gpu.py with the memory and products of compiled steps.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import cli
from common.cli import option, parse_options
from common.errors import InputError
from common.images import ImageSpec, prepare
from common.layouts import SHAPES
from common.pretrained import build_part, on_meta, read_config, read_json
from common.run import PARTS, Config
from common.speed import MAX_LOGITS
from connector import CONNECTORS
from mllm import LLMS, MLLM, TOWERS

# The share of a GPU's memory that may be planned for.
ROOM = 0.9
# The share of its activations that a compiled block keeps. tests/fake_cuda.py compares whole steps.
COMPILED = 0.75
# The --memory_budget with which no linear layer is computed again.
ALL_PRODUCTS = 0.7
# The papers' files and mixtures: their number of samples (0: unknown), and the assumed text tokens
# and supervised tokens of a dialogue.
DATA = read_json(Path(__file__).with_name("data.json"))


@dataclass
class PlanConfig(Config):
    gpus: int = option(8, "number of GPUs")
    gpu_memory: float = option(80, "memory of a GPU in GB (1e9 bytes)")
    gpu_flops: float = option(989, "peak of a GPU in bf16, in TFLOP/s; 989: an H100")
    utilization: float = option(0.4, "the share of the peak that matrix products reach")


class Load(NamedTuple):
    """What one forward (or one dialogue) contains; averages may be fractions."""

    tokens: float  # T, images included
    squared: float  # the sum of T² over the dialogues
    supervised: float  # n
    images: float  # I

    def times(self, factor):
        return Load(*(value * factor for value in self))


class Plan(NamedTuple):
    """One stage on one GPU."""

    config: PlanConfig
    model: MLLM  # on the meta device
    trains_llm: bool  # the connector is always trained, the towers never
    load: Load  # of one forward
    forwards: int  # in an optimizer step
    bf16: bool
    lora_rank: int = 0  # 0: without adapters
    shards: int = 1  # FSDP: the number of GPUs that share a model

    @property
    def tunes_llm(self):
        """Whether the LLM's own weights are trained."""
        return self.trains_llm and not self.lora_rank

    @property
    def is_compiled(self):
        return self.config.compile is not False

    @property
    def budget(self):
        """The share of activations kept by compiled blocks; 0: whole blocks are computed again."""
        return self.config.memory_budget if self.is_compiled else 0

    @property
    def activation_bytes(self):
        return 2 if self.bf16 else 4

    @property
    def llm_bytes(self):
        return 4 if self.tunes_llm else self.activation_bytes

    def adapters(self):
        """Count LoRA's parameters: rank · (in + out) for every linear layer of the blocks."""
        weights = linear_weights(self.model.llm.layers)
        return self.lora_rank * sum(sum(weight.shape) for weight in weights)

    def num_trained(self):
        """Count the trained parameters."""
        llm = size(self.model.llm) if self.tunes_llm else self.adapters()
        return llm + size(self.model.connector)


# ---- the model and its data ----------------------------------------------------------------------


def read_shape(name):
    """Return a checkpoint's config.json: from its folder, shapes.json or the hub."""
    if Path(name).is_dir():
        return read_config(name)
    if name in SHAPES:
        return SHAPES[name]
    from huggingface_hub import hf_hub_download

    try:
        return read_json(hf_hub_download(name, "config.json"))
    except Exception as error:
        raise InputError(f"{name}: its config.json cannot be read or downloaded: {error}") from None


def build(config, stage):
    """Build the run's model on the meta device."""
    vision, llm = config.checkpoints()
    connector = {"name": config.connector, **config.connector_options}
    with on_meta():
        towers = [build_part(TOWERS, read_shape(name), name) for name in vision]
        llm = build_part(LLMS, read_shape(llm), llm)
        image_mode = config.stage_options(stage).image_mode
        spec = ImageSpec(config.image_size or towers[0].config.image_size, image_mode)
        return MLLM(towers, llm, connector, None, "", spec)


def read_data(config, model):
    """Return the number of samples (0: unknown) and the assumed mean dialogue."""
    names = " ".join(Path(name.rpartition(":")[2]).name for name in config.data)
    known = DATA.get(names, DATA["other"])
    photograph = prepare(Image.new("RGB", (640, 480)), model.spec, model.tokens_per_image)
    tokens, images = known["text_tokens"] + len(photograph.rows), len(photograph.pixels)
    length = min(tokens, config.max_length, model.llm.config.context)
    return known["samples"], Load(length, length**2, known["supervised"], images)


# ---- memory, FLOPs, communication ----------------------------------------------------------------


def numel(tensors):
    return sum(tensor.numel() for tensor in tensors)


def size(module):
    return numel(module.parameters())


def linear_weights(module):
    return [part.weight for part in module.modules() if isinstance(part, nn.Linear)]


@cache
def vision_costs(model, b):
    """Run the towers and the connector on an image without storage -> FLOPs, bytes.

    The FLOPs include the connector's backward. The bytes are those that the connector keeps for it.
    """
    sizes = {nn.Linear: b, nn.GELU: b, nn.LayerNorm: 4 + b, nn.Conv2d: 4, nn.BatchNorm2d: 4}
    kept = {}

    def keep(module, inputs, output):
        # two modules of one type that read the same tensor keep it once
        kept[type(module), inputs[0]] = sizes[type(module)] * inputs[0].numel()

    for module in model.connector.modules():
        if type(module) in sizes:
            module.register_forward_hook(keep)
    model.vision.requires_grad_(False)
    side = model.spec.size
    pixels = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.see(pixels).sum().backward()
    return counter.get_total_flops(), sum(kept.values())


def block_memory(plan, e):
    """Count the activations that the backward of a block of the LLM needs, in bytes."""
    c, b = plan.model.llm.config, plan.activation_bytes
    W, K = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    C, F = c.hidden_size, c.intermediate_size
    norms, inner, inputs = 2, 3 * F, 2 if e == b else 5
    # Phi has no gate, and one norm in a block.
    if len(linear_weights(plan.model.llm.layers[0].mlp)) == 2:
        norms, inner, inputs = 1, F, 4
    channels = 4 * norms * C + b * (2 * W + 2 * K + inner)
    if plan.lora_rank and plan.config.lora_dropout:
        weights = linear_weights(plan.model.llm.layers[0])
        channels += (b + 1) * sum(weight.shape[1] for weight in weights)
    elif plan.trains_llm:
        channels += b * (inputs * C + F)
    if plan.tunes_llm and norms == 2:
        channels += 2 * e * C
    if b == 4:
        channels += 4 * (c.num_attention_heads + W * plan.trains_llm)
    # The inputs of LoRA's second factors.
    channels += 7 * b * plan.lora_rank
    return plan.load.tokens * channels * (COMPILED if plan.is_compiled else 1)


def memory(plan):
    """Return {part: bytes on one GPU}; "peak" is the most that exists at one time."""
    model, load, c, b = plan.model, plan.load, plan.model.llm.config, plan.activation_bytes
    V, C, L, T = c.vocab_size, c.hidden_size, c.num_hidden_layers, load.tokens
    recompute, sharded = plan.config.activation_checkpointing, plan.shards > 1
    block_size = size(model.llm.layers[0])
    rest = size(model.llm) - L * block_size

    split = plan.llm_bytes * size(model.llm) + 4 * plan.adapters() + 4 * size(model.connector)
    weights = split / plan.shards + plan.activation_bytes * size(model.vision)
    gradients = 4 * plan.num_trained() / plan.shards
    copies = 0
    if sharded:
        weights += b * (rest + 2 * block_size)
        if plan.tunes_llm:
            copies = b * rest + (b + 4) * block_size

    e = b if sharded else plan.llm_bytes
    casts = 2 * (L * block_size + V * C) if e > b else 0
    _, per_image = vision_costs(model, b)
    connector = load.images * per_image + 2 * size(model.connector) * plan.bf16
    block = block_memory(plan, e)
    # What a block keeps until the backward reaches it.
    kept = max(T * e * C, plan.budget * block) if recompute else block
    working = block + casts / L
    # What the final norm keeps and returns.
    head = T * (4 + e * plan.tunes_llm) * C + load.supervised * e * C
    # The gradients on their way through a block.
    flow = T * (e * C + 2 * b * c.intermediate_size)
    # With activation checkpointing the backward casts and computes one block at a time.
    casts_left, recomputed = (0, working) if recompute else (casts, 0)
    stored = connector + L * kept + head
    casts_at_end = casts if plan.tunes_llm else casts_left
    logits = min(load.supervised, max(1, MAX_LOGITS // V)) * V
    forward = max(
        stored + casts_at_end + (6 + b) * logits,
        stored + casts_left + 12 * logits,
        stored + casts_left + recomputed + flow,
    )
    if plan.forwards > 1 or (plan.config.gpus > 1 and not sharded):
        # All forwards of a step but the first begin with gradients. DDP's always exist.
        forward += gradients
    peak = max(forward, gradients + connector + working + flow)
    return {
        "weights": weights,
        "gradients": gradients + copies,
        "optimizer": 2 * gradients,
        "activations": stored + max(casts_at_end, recomputed),
        "peak": weights + 2 * gradients + copies + peak,
    }


def linear_again(plan):
    """Count the FLOPs of the blocks' linear layers that activation checkpointing does again."""
    layers = plan.model.llm.layers
    weights = numel(linear_weights(layers)) + plan.adapters()
    # A backward needs no output of a block's last layer. It is computed again only in a compiled
    # block without a budget, and with LoRA, which multiplies by W before its adapter.
    if plan.budget or not (plan.is_compiled or plan.lora_rank):
        weights -= numel(linear_weights(block.mlp)[-1] for block in layers)
    return max(0, 1 - plan.budget / ALL_PRODUCTS) * 2 * plan.load.tokens * weights


def flops(plan):
    """Return {part: FLOPs of a forward and its backward}; "again": what is computed twice."""
    model, load, c = plan.model, plan.load, plan.model.llm.config
    per_image, _ = vision_costs(model, plan.activation_bytes)
    blocks = numel(linear_weights(model.llm.layers))
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * load.squared
    logits = 2 * load.supervised * c.vocab_size * c.hidden_size
    again = logits if load.supervised > MAX_LOGITS // c.vocab_size else 0
    if plan.config.activation_checkpointing:
        again += linear_again(plan) + attention * (plan.budget < 1)
    passes = 2 + plan.tunes_llm
    return {
        "vision": load.images * per_image,
        "llm": 2 * load.tokens * (blocks * passes + 3 * plan.adapters()),
        "attention": 3 * attention,
        "logits": logits * passes,
        "again": again,
    }


def sent(plan):
    """Count the bytes that a GPU sends in a step: within its replica, and to the other replicas.

    With DDP every GPU is a replica, and gradients are averaged once a step. With FSDP all GPUs are
    one. HSDP sends both, the gradients to the other replicas after every backward pass. In a ring's
    all-gather each of n GPUs sends the fraction 1 - 1 / n of a buffer.
    """
    gradients = 4 * plan.num_trained()
    summed = 2 * (1 - plan.shards / plan.config.gpus) * gradients / plan.shards
    if plan.shards == 1:
        return 0, summed
    # FSDP gathers blocks in the forward and in the backward, and the rest once.
    llm = plan.model.llm
    twice = size(llm.layers) + plan.adapters() + size(plan.model.connector)
    gathered = plan.activation_bytes * (2 * twice + size(llm) - size(llm.layers))
    within = (1 - 1 / plan.shards) * (gathered + gradients)
    return plan.forwards * within, plan.forwards * summed


def sending(plan):
    """Return the seconds of a step's communication: 450 GB/s within a node of 8 GPUs, each way.

    A node has 8 network cards of 50 GB/s. With HSDP each of its GPUs is in another ring between the
    replicas, and these rings share the cards.
    """
    within, between = sent(plan)
    network = 8 * 50e9
    seconds = within / (450e9 if plan.shards <= 8 else network)
    return seconds + between / (450e9 if plan.config.gpus <= 8 else network / min(8, plan.shards))


# ---- the report ----------------------------------------------------------------------------------


def plan_stage(config, stage):
    """Print the plan of one stage."""
    model, config = build(config, stage), config.stage_options(stage)
    if {*config.train} not in ({"connector"}, {"connector", "llm"}):
        raise InputError(f"--train{stage}: the plan knows connector, or connector,llm")
    samples, mean = read_data(config, model)
    if config.gpus % config.fsdp_replicas:
        raise InputError(
            f"--fsdp_replicas={config.fsdp_replicas}: must divide --gpus={config.gpus}"
        )
    batch = config.batch
    steps = config.steps or math.ceil(config.epochs * samples / batch)
    if not steps:
        raise InputError(f"--data{stage}: not known; give the number of steps, --steps{stage}")
    share = math.ceil(batch / config.gpus)
    rows, forwards = min(share, config.micro_batch), math.ceil(share / config.micro_batch)
    # A forward has two images at least (data.collate).
    mean = mean._replace(images=max(mean.images, 2 / rows))
    trains_llm, bf16 = "llm" in config.train, config.bf16 is not False
    plan = Plan(config, model, trains_llm, mean.times(rows), forwards, bf16)

    print(
        f"\nstage {stage}, {batch} dialogues a step: {samples or 'unknown'} samples, {steps} steps"
    )
    for part in PARTS:
        print(f"  {part:10}{size(getattr(model, part)) / 1e6:10,.2f}M parameters")
    print(f"  a dialogue (assumed): {mean.tokens:,.0f} tokens, {mean.supervised:,.0f} supervised")
    total = sum(flops(plan._replace(load=mean.times(batch))).values())
    print(f"  {total / 1e12:,.4f} TFLOP a step")
    print_table(plan, steps, mean.times(share))


def print_table(plan, steps, load):
    """Print a line for every way to use the GPUs. load: a step's on one GPU."""
    config = plan.config
    print(
        "  GB a GPU     weights gradients optimizer activations    peak      sent  math s   hours"
    )
    ranks = [0, config.lora_rank or 128] if plan.trains_llm else [0]
    # of equal keys the last one counts
    kinds = {config.gpus // config.fsdp_replicas: "HSDP", config.gpus: "FSDP", 1: "DDP"}
    for rank, shards in product(ranks, sorted(kinds)):
        way = plan._replace(lora_rank=rank, shards=shards)
        name = f"LoRA {kinds[shards]}" if rank else kinds[shards]
        found = memory(way) | {"sent": sum(sent(way))}
        math_flops = sum(flops(way._replace(load=load)).values())
        math_time = math_flops / (config.gpu_flops * 1e12 * config.utilization)
        # At best, communication and math overlap completely.
        hours = f"{steps * max(math_time, sending(way)) / 3600:8.2f}"
        if found["peak"] > ROOM * config.gpu_memory * 1e9:
            hours += "  does not fit"
        numbers = [f"{value / 1e9:9.4f}" for value in found.values()]
        print(f"  {name:10}", *numbers, f"{math_time:7.3f}{hours}")


def main(arguments):
    config = cli.parse(PlanConfig, arguments, __doc__)
    config.connector_options = parse_options(
        CONNECTORS, config.connector, config.connector_options, "--connector"
    )
    for stage in [config.stage] if config.stage else [1, 2]:
        plan_stage(config, stage)


if __name__ == "__main__":
    cli.run(main)
