"""What a run will take, before it takes it: parameters, memory a card, FLOPs, hours, and whether it fits.

    python train.py config/dense_7b.toml --plan --gpus=8 --gpu_memory=80      (--plan --help lists what else can be said)

The model is built on the meta device (shapes, no storage), of its config.json alone, so nothing is downloaded but that; for the
checkpoints of config/*.toml not even that (SHAPES). What is counted is what train.py does: packed rows without padding, float32
weights of all that learns, AdamW's two moments in float32, bf16 autocast, a frozen LLM in bf16 on CUDA, logits at supervised
positions only. In bytes on one card, for a micro-batch of T tokens of which n are supervised and I pictures of N patches, where
b is 2 under autocast, else 4, and e, of the residual stream, is 2 for an LLM in bf16, else 4 (C width of the LLM, F of its MLP,
H heads of queries, W wide together, those of keys K, V vocabulary, L blocks, D width of a tower):

    weights      4 a parameter, 2 in a frozen LLM; gradients 4 and optimizer 8 a parameter that learns; DDP's buckets 4 more
                 FSDP on n cards: 1/n of the LLM's and of what learns, frozen towers whole; and b a parameter of what is gathered
                 at once, embedding, lm_head and two blocks, as much again for their gradients and 4 a parameter of one block
    a block      T·(8C [both norms in float32] + b(2W + 2K) [queries, values out; keys, values] + 3bF [gate, its SiLU, up])
                 and if it learns T·(2eC [the norms' outputs] + b(2C or 5C [inputs of the maps; each has its own copy where
                 autocast makes it from float32] + F [input of the last one]))
                 on a CPU, which goes dialogue by dialogue, bW·T more for what learns, and in bf16 the scores, bH·Σ Tᵢ²
    all blocks   L of these; with activation checkpointing L inputs, eC·T each, and one block while it is recomputed
    casts        2 a weight of a float32 LLM under autocast: the copies live as long as what they have computed
    connector    b·I·N·(width in + 2C), COMM: (4 + 2b)D a merged layer and b·(D + 2·expansion·D) an MLP
    logits       12·n·V: log-softmax and two gradients, float32; of a chunk of mllm.LOGITS / V positions if n is more
    peak         weights, optimizer and the most that is alive at once of: towers' layers and connector; the end of the forward
                 pass; logits; the first block going back; the last one, when all gradients are there. Of several forwards a
                 step, all but the first begin with gradients

FLOPs are those of matrix products, 2 a weight and token: forward; again for what flows back; again for weights that learn;
attention 2W·Tᵢ² forward (causal) and twice that back; checkpointing repeats a block's forward but for its last map.

What it does not know: the context, the communication library and fragmentation (a form fits if its peak is at most ROOM of the
memory), torch.compile, which should keep less than this, and the spread of lengths: the loader puts dialogues of like length
together, so some micro-batches are far longer than the mean; the plan says for how many tokens there is room. On a CPU it is held
against the allocator and PyTorch's FLOP counter (tests/test_plan.py), FSDP's memory against that of two ranks (tests/test_shard.py);
nothing of CUDA and LoRA has been measured.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch.nn as nn

import cli
from connector import SIDES, ConnectorConfig
from dialogue import IGNORE, IMAGE, cut_to_length, encode, find_template, load_tokenizer
from hub import LARGE, InputError, fields_of, on_meta, read_config, read_json
from images import BadImage, ImageSpec
from llama import LlamaConfig
from mllm import LOGITS, MLLM, llm_class, tower_class
from train import HERE, PARTS, TINY, Config, build_data, check, choose_trained, settings

ROOM = 0.9                                                           # the share of a card's memory that may be planned for
NODE, IN_NODE = 8, 450e9                                             # cards of a node; bytes/s each way of one in it (NVLink)
BETWEEN_NODES = 50e9                                                 # bytes/s each way of a card out of its node (400 Gbit/s)

llama = lambda V, C, F, L, H, G, **others: dict(model_type="llama", vocab_size=V, hidden_size=C, intermediate_size=F,
                                                num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=G, **others)
SHAPES = {                                                           # what is needed of the config.json of config/*.toml's
    "openai/clip-vit-large-patch14-336": dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                                              num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14),
    "google/siglip-so400m-patch14-384": dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
                                             num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14),
    "facebook/dinov2-large": dict(model_type="dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                  image_size=518, patch_size=14),
    "lmsys/vicuna-7b-v1.5": llama(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
    "meta-llama/Meta-Llama-3-8B-Instruct": llama(128256, 4096, 14336, 32, 32, 8, max_position_embeddings=8192),
    "NousResearch/Nous-Hermes-2-Yi-34B": llama(64000, 7168, 20480, 60, 56, 8, max_position_embeddings=4096),
    "meta-llama/Meta-Llama-3-70B-Instruct": llama(128256, 8192, 28672, 80, 64, 8, max_position_embeddings=8192)}
# The papers' files, for where they are not at hand: samples (None: not counted there, the recipe states steps), tokens of text a
# dialogue, supervised ones among them. The first are published; the others assumed, for instructions as in benches/train.py
SHORT, LONG = (20, 18), (226, 135)
DATA = {"blip_laion_cc_sbu_558k.json": (558_128, *SHORT), "llava_v1_5_mix665k.json": (665_298, *LONG),
        "llava_instruct_150k.json": (157_712, *LONG), "shikra_rd.json": (5_922, *LONG)} | dict.fromkeys(
    ("vqav2.json", "coco_captions.json", "refcoco_train.jsonl", "refcocog_train.jsonl", "visual_genome.jsonl", "visual7w.json"),
    (None, 60, 12))


@dataclass
class PlanConfig(Config):
    # the plan; beside these all options of train.py
    plan: bool = True                    # say what the run takes, and train nothing
    gpus: int = 8                        # cards in all
    gpu_memory: float = 80               # of a card, in GB (1e9 bytes)
    gpu_flops: float = 989               # peak of a card in bf16, in TFLOP/s; 989: an H100
    utilisation: float = 0.4             # the share of it that the matrix products reach


# --- what is planned for: a model of shapes, and how much data a card sees at once -------------------------------------

def config_of(name):
    """config.json of a checkpoint: of its folder, as SHAPES has it, from the local cache, or this one file from the hub."""
    if Path(name).is_dir():
        return read_config(Path(name))
    if str(name) in SHAPES:
        return SHAPES[str(name)]
    owner, _, revision = str(name).partition("@")
    try:
        from huggingface_hub import hf_hub_download
        return read_json(hf_hub_download(owner, "config.json", revision=revision or None))
    except InputError:
        raise
    except Exception as error:                                       # as in hub.locate: the clients raise anything at all
        raise InputError(f"{name}: the plan needs its config.json: not in a folder of that name, not in the local cache, "
                         f"and could not be downloaded ({type(error).__name__})") from None


def build(config):
    """The run's model on the meta device: shapes alone. The towers' statistics and the tokenizer do not matter here."""
    tiny = [HERE / "weights" / name for name in TINY.get(config.connector, ("clip",))]
    shape = ConnectorConfig(config.connector, config.groups, config.merge, config.dino_depth, config.dino_expansion, config.layer)
    with on_meta():
        towers = []
        for name in config.vision or tiny:
            stated = config_of(name)
            kind, tower_config = tower_class(stated.get("model_type", "timm_wrapper"), name)
            towers.append(kind(fields_of(tower_config, stated.get("vision_config", stated), name)))
        name = config.llm or HERE / "weights" / "llama"
        stated = config_of(name)
        kind = llm_class(stated.get("model_type", "llama"), name)
        if kind.config_class is not LlamaConfig:
            raise InputError(f"{name}: only models of LLaMA's kind are planned for")
        words = SimpleNamespace(get_vocab_size=lambda: 0)
        return MLLM(towers, kind(LlamaConfig.from_dict(stated, name)), shape, words, "",
                    ImageSpec(config.image_size or towers[0].config.image_size))


class Load(NamedTuple):
    """What one forward on one card holds, or one dialogue; means may be fractions."""
    tokens: float                                                    # T, pictures included
    squares: float                                                   # Σ Tᵢ² over the dialogues
    supervised: float                                                # n
    pictures: float                                                  # I

    def times(self, factor):
        return Load(*(value * factor for value in self))


class Run(NamedTuple):
    """A stage on one card."""
    config: PlanConfig
    model: MLLM                                                      # on the meta device
    trained: dict                                                    # {part: the parameters that learn}
    load: Load                                                       # of one forward
    forwards: int                                                    # a step
    bf16: bool
    on_cuda: bool


class Form(NamedTuple):
    """A way to spread the run over cards."""
    name: str
    rank: int = 0                                                    # LoRA's; 0: the LLM's own weights learn
    shards: int = 1                                                  # FSDP: over so many cards


def data_of(config, stage, model):
    """-> samples of the stage (None: not known), the mean dialogue as a Load, and where these numbers are from."""
    own, M = settings(config, stage), model.tokens_per_image
    files = [Path(name.partition(":")[2] or name) for name in own["data"]]
    llm = Path(config.tokenizer or config.llm or HERE / "weights" / "llama")
    at_hand = all(name == "world" or file.exists() for name, file in zip(own["data"], files))
    dataset = build_data(config, stage) if at_hand else None
    if at_hand and llm.is_dir():
        tokenizer = load_tokenizer(llm)
        template = own["template"] if stage == 1 else config.template or find_template(llm) or "vicuna_v1"
        longest, dialogues = min(config.max_length, model.llm.config.context), []
        for index in range(0, len(dataset), max(1, len(dataset) // 256)):
            try:
                images, turns, _ = dataset[index]
            except BadImage:                                         # training will skip it, and say so
                continue
            ids, labels = cut_to_length(*encode(tokenizer, turns, template, bool(images)), longest, M)
            T = len(ids) + (M - 1) * ids.count(IMAGE)
            dialogues.append((T, T * T, sum(label != IGNORE for label in labels), ids.count(IMAGE)))
        if dialogues:
            return len(dataset), Load(*(sum(column) / len(dialogues) for column in zip(*dialogues))), "of the data at hand"
    known = [DATA.get(file.name, (None, *LONG)) for file in files]
    counts = [count for count, *_ in known]
    samples = len(dataset) if at_hand else None if None in counts else sum(counts) if not own["equal"] else sum(
        count * round(max(counts) / count) for count in counts)
    text, supervised = (sum(column) / len(known) for column in list(zip(*known))[1:])
    T = min(text + M, config.max_length, model.llm.config.context)
    return samples, Load(T, T * T, supervised, 1), "assumed" if at_hand else "assumed: the data is not at hand"


# --- memory, FLOPs, bytes sent ----------------------------------------------------------------------------------------

def size(module):
    return sum(p.numel() for p in module.parameters())


def maps(module):
    """The linear maps' weights, biases apart: what matrix products go through."""
    return [m.weight for m in module.modules() if isinstance(m, nn.Linear)]


def adapters(model, form):
    """LoRA's parameters: rank · (in + out) for every linear map of the blocks."""
    return sum(form.rank * sum(weight.shape) for weight in maps(model.llm.layers)) if form.rank else 0


def learning(run, form):
    """How many parameters learn, on all cards."""
    own = sum(p.numel() for part in run.trained for p in run.trained[part] if part != "llm" or not form.rank)
    return own + adapters(run.model, form)


def block_bytes(c, load, e, b, learns, norms_learn, on_cuda):
    """What a block of the LLM keeps for its backward pass; see the top of the file."""
    W, K, F, C = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.intermediate_size, c.hidden_size
    channels = 8 * C + b * (2 * W + 2 * K + 3 * F) + norms_learn * 2 * e * C
    channels += learns * b * ((2 if e == b else 5) * C + F)
    if on_cuda and b == 2:                                           # one kernel for all dialogues
        return load.tokens * channels
    if b == 4:                                                       # dialogue by dialogue; each one's logarithms beside it
        return load.tokens * (channels + learns * b * W + 4 * c.num_attention_heads)
    return load.tokens * (channels + b * ((learns - 1) * W + 2 * (W - K))) + b * c.num_attention_heads * load.squares


def tokens_joined(model):
    """Tokens a picture that go through the connector's maps; `efficient` quarters them behind."""
    return model.tokens_per_image * (4 if model.connector_config.kind == "efficient" else 1)


def connector_bytes(model, I, b):
    """What the connector keeps for its backward pass."""
    kind, C, N = model.connector_config, model.llm.config.hidden_size, tokens_joined(model)
    if kind.kind in SIDES:
        D, merged = model.vision[-1].config.hidden_size, sum(map(len, model.layers))
        depth = kind.dino_depth if "dino" in SIDES[kind.kind] else 0
        each = {"lln": 4 + 2 * b, "layerscale": 4}.get(kind.merge, 0)  # a merged layer; a mean keeps nothing
        return I * N * (merged * each * D + depth * b * D * (1 + 2 * kind.dino_expansion) + len(model.vision) * b * D)
    projector = maps(model.connector)
    return I * N * b * (projector[0].shape[1] + (len(projector) - 1) * 2 * C)


def towers_bytes(model, I, b):
    """The layers and means that the connector asked for, float32, while it has not read them all, and an MLP at work."""
    kept = 0
    for tower, layers in zip(model.vision, model.asked):
        S = (model.spec.size // tower.config.patch_size) ** 2 + tower.num_prefix_tokens
        widest = max(weight.shape[0] for weight in maps(tower.blocks[0]))
        kept += S * (4 * tower.config.hidden_size * (len(layers) + 1) + 2 * b * widest)
    return I * kept


def memory(run, form):
    """-> {part: bytes on one card}; "peak": what is needed at once."""
    model, load, c = run.model, run.load, run.model.llm.config
    V, C, L = c.vocab_size, c.hidden_size, c.num_hidden_layers
    learns, recompute = "llm" in run.trained, run.config.activation_checkpointing
    tuned = learns and not form.rank                                 # the LLM's own weights learn
    b = 2 if run.bf16 else 4
    weight_bytes = 2 if run.bf16 and not tuned else 4                # as an LLM's weight is kept
    e = b if form.shards > 1 else weight_bytes                       # FSDP gathers an embedding of b bytes, too
    block_size, head, changing = size(model.llm.layers[0]), V * C, learning(run, form)
    rest, joins = size(model.llm) - L * block_size, "connector" in run.trained           # embedding, final norm, lm_head

    weights = (4 * (adapters(model, form) + joins * size(model.connector)) + weight_bytes * size(model.llm)) / form.shards
    weights += 4 * (size(model.vision) + (not joins) * size(model.connector))            # frozen ones are whole on every card
    optimizer, gradients, copies = 8 * changing / form.shards, 4 * changing / form.shards, 0
    if form.shards > 1:                                              # gathered: what is no block, and two blocks, one early
        weights += b * (rest + 2 * block_size)
        copies = b * rest + (b + 4) * block_size if tuned else 0     # their gradients; a block's again in float32, to reduce it
    elif run.config.gpus > 1:
        copies = 4 * changing                                        # DDP's buckets

    block = block_bytes(c, load, e, b, learns, tuned, run.on_cuda) + load.tokens * 7 * b * form.rank     # LoRA: between its maps
    casts = 2 * (L * block_size + head) if e > b and form.shards == 1 else 0
    lasting = 0 if recompute else casts                              # from the forward pass into the backward
    first = connector_bytes(model, load.pictures, b) + (2 * size(model.connector) if run.bf16 else 0)
    last = load.tokens * (4 + e * tuned) * C + load.supervised * e * C                   # the final norm and what it gives
    stored = first + L * (load.tokens * e * C if recompute else block) + last
    one = block + casts / L if recompute else 0
    flowing = load.tokens * (e * C + 2 * b * c.intermediate_size)    # gradients on their way through a block
    rows = min(load.supervised, max(1, LOGITS // V))
    most = max(first + towers_bytes(model, load.pictures, b),
               stored + (casts if tuned else lasting) + (6 + b) * rows * V,
               stored + lasting + 12 * rows * V,
               stored + lasting + one + flowing)
    most = max(most + (gradients if run.forwards > 1 else 0), gradients + first + (one or block + casts / L) + flowing)
    return {"weights": weights, "gradients": gradients + copies, "optimizer": optimizer, "logits": 12 * rows * V,
            "activations": stored + max(casts if tuned else lasting, one), "peak": weights + optimizer + copies + most}


def flops(run, form):
    """-> {part: FLOPs of a forward and its backward on one card}; "again": what the backward pass repeats of the forward, blocks
    under activation checkpointing and logits of more than a chunk."""
    model, load, c, kind = run.model, run.load, run.model.llm.config, run.model.connector_config.kind
    learns, seen, numbers = "llm" in run.trained and not form.rank, 0, lambda weights: sum(weight.numel() for weight in weights)
    for tower, layers in zip(model.vision, model.layers):
        blocks, D, P = tower.blocks[:max(layers)], tower.config.hidden_size, tower.config.patch_size
        N = (model.spec.size // P) ** 2
        S = N + tower.num_prefix_tokens
        seen += 2 * N * 3 * P ** 2 * D + 2 * S * numbers(maps(blocks)) + 4 * S ** 2 * D * len(blocks)
    projected, block = numbers(maps(model.connector)), numbers(maps(model.llm.layers))
    entry = 0 if kind in SIDES else maps(model.connector)[0].numel()                    # no gradient flows into the towers
    joined = 3 * projected - entry if "connector" in run.trained else projected
    attention = c.num_hidden_layers * 2 * c.num_attention_heads * c.head_dim * load.squares
    last = numbers(layer.mlp.down_proj.weight for layer in model.llm.layers)
    head, in_chunks = c.vocab_size * c.hidden_size, load.supervised > LOGITS // c.vocab_size
    return {"towers": load.pictures * seen, "connector": 2 * load.pictures * tokens_joined(model) * joined,
            "llm": 2 * load.tokens * (block * (2 + learns) + 3 * adapters(model, form)), "attention": 3 * attention,
            "logits": 2 * load.supervised * head * (2 + learns),
            "again": run.config.activation_checkpointing * (2 * load.tokens * (block - last) + attention)
            + in_chunks * 2 * load.supervised * head}


def sent(run, form):
    """Bytes that a card sends (and receives) a step. In a ring each card passes on (n-1)/n of a buffer to gather or to
    reduce-scatter it, twice that to all-reduce. DDP: the gradients, once a step. FSDP: every forward and its backward gather the
    weights that are spread (those of no block: once), and reduce-scatters the gradients."""
    ring = (run.config.gpus - 1) / run.config.gpus
    if form.shards == 1:
        return ring * 2 * 4 * learning(run, form)
    llm, connector = run.model.llm, size(run.model.connector) if "connector" in run.trained else 0
    gathered = 2 * (size(llm.layers) + adapters(run.model, form) + connector) + size(llm) - size(llm.layers)
    return ring * run.forwards * ((2 if run.bf16 else 4) * gathered + 4 * learning(run, form))


def room(run, form):
    """How many tokens a forward may hold, its dialogues being like the mean one; 0: not even a few."""
    low, high = 0.0, 2.0 ** 20
    for _ in range(48):
        middle = (low + high) / 2
        fits = memory(run._replace(load=run.load.times(middle)), form)["peak"] <= ROOM * run.config.gpu_memory * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return int(low * run.load.tokens)


# --- the plan, told ---------------------------------------------------------------------------------------------------

def plan_stage(config, stage):
    """Print the plan of one stage."""
    own, model = settings(config, stage), build(config)
    if "vision" in own["train"]:
        raise InputError(f"--train{stage}: the plan knows frozen towers only")
    samples, mean, source = data_of(config, stage, model)
    steps = own["steps"] or (samples and math.ceil(own["epochs"] * samples / own["batch"]))
    if not steps:
        raise InputError(f"--data{stage}: not at hand, and not the papers' files: say with --steps{stage} how long the run is")
    mine = math.ceil(own["batch"] / config.gpus)                     # samples a step on the busiest card
    held = min(mine, config.micro_batch)
    on_cuda = config.device.partition(":")[0] in ("auto", "cuda")
    bf16 = on_cuda or config.device == "cpu" and bool(config.llm) and size(model.llm) >= LARGE    # as train.uses_bf16, of a 16-bit file
    trained = choose_trained(model, own["train"])
    run = Run(config, model, trained, mean.times(held), math.ceil(mine / config.micro_batch),
              bf16 if config.bf16 is None else config.bf16, on_cuda)
    rank = config.lora_rank or 128                                 # the Dense Connector's
    forms = [Form("DDP" if config.gpus > 1 else "one card")] + [Form("LoRA", rank)] * ("llm" in trained)
    forms += [Form(form.name.replace("DDP", "") + " FSDP", form.rank, config.gpus) for form in forms if config.gpus > 1]

    print(f"\nstage {stage}: " + ", ".join(f"{part} {size(getattr(model, part)) / 1e6:,.2f}M "
                                           f"{'trained' if part in trained else 'frozen'}" for part in PARTS))
    print(f"  {f'{samples:,} samples, ' if samples else ''}{steps:,} steps of {own['batch']}, {mean.tokens * own['batch']:,.0f} "
          f"tokens each; {mean.tokens:,.0f} tokens a dialogue, {mean.supervised:,.0f} supervised ({source})")
    print(f"  a card: {mine} samples a step, {held} a forward, {run.load.tokens:,.0f} tokens (the longest dialogues: "
          f"{held * min(config.max_length, model.llm.config.context):,}), {'bf16' if run.bf16 else 'float32'}"
          f"{', activation checkpointing' * config.activation_checkpointing}")
    whole = flops(run._replace(load=mean.times(own["batch"])), forms[0])
    shares = ", ".join(f"{part} {value / sum(whole.values()):.0%}" for part, value in whole.items() if value)
    tera = sum(whole.values()) / 1e12
    print(f"  {tera:,.{0 if tera > 10 else 4}f} TFLOP a step ({shares}), done at {config.utilisation:.0%} of "
          f"{config.gpu_flops:g} TFLOP/s a card")
    # As NCCL lays its rings: as many as a node has cards, each leaves the node over another card's link, so these add up
    link = IN_NODE if config.gpus <= NODE else min(IN_NODE, NODE * BETWEEN_NODES)
    unit, name = (1e9, "GB") if size(model) > 1e8 else (1e6, "MB")
    print(f"  {name} a card       weights gradients optimizer activations logits   peak  room for tokens   sends  takes s"
          "  products s   hours")
    for form in forms:
        parts, tokens, bytes_sent = memory(run, form), room(run, form), sent(run, form)
        sums = sum(flops(run._replace(load=mean.times(mine)), form).values()) / (config.gpu_flops * 1e12 * config.utilisation)
        hours = steps * max(sums, bytes_sent / link) / 3600          # at best one hides behind the other
        numbers = [parts[key] / unit for key in ("weights", "gradients", "optimizer", "activations", "logits", "peak")]
        verdict = f"{tokens:,}" if tokens >= run.load.tokens else f"{tokens:,}: too few" if tokens else "does not fit"
        print("  {:<15} {:7.2f} {:9.2f} {:9.2f} {:11.2f} {:6.2f} {:6.1f}".format(
            (f"{form.name} {form.rank}" if form.rank and form.shards == 1 else form.name).strip(), *numbers)
            + f"  {verdict:>15} {bytes_sent / unit:7.2f} {bytes_sent / link:8.3f} {sums:11.3f} {hours:7.2f}")


def main(arguments):
    config = cli.parse(PlanConfig, arguments, __doc__)
    check(config)
    for key in ("gpus", "gpu_memory", "gpu_flops", "utilisation"):
        if getattr(config, key) <= 0:
            raise InputError(f"--{key}={getattr(config, key)}: should be more than 0")
    print(f"{config.connector} connector on {config.gpus} x {config.gpu_memory:g} GB, of which {ROOM:.0%} may be filled; "
          "nothing is trained")
    for stage in [config.stage] if config.stage else [1, 2]:
        plan_stage(config, stage)
