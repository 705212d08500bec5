"""How fast and how small, each system in a process of its own, in turns, so that a slow moment of the machine meets them all;
medians are reported, with the least and the most.

    python bench.py decode --vs=transformers      # a prompt's first token, and the steps after it (prefill: the same)
    python bench.py towers --vs=transformers      # the vision towers' hidden states
    python bench.py train --vs=transformers       # a training step of each stage
    python bench.py load --vs=transformers        # from a checkpoint on the disk to the first token
    python bench.py loader --vs=transformers      # from a JPEG file to pixels
    python bench.py connectors                    # every kind of connector

Weights are random, nothing is downloaded. Without --vs=transformers our side runs alone. The machine's limits are measured
beside every turn, `limits`: the FLOP/s of a 4096³ matrix product in the dtype at hand, and the bytes/s of a sum. What a figure
is `of the limit` is its share of them; FLOPs and bytes are counted by formula, those that the work cannot do without. It all
runs on CUDA as well, but never has: there was no GPU.

`decode`: a LLaMA of 1.1B (TinyLlama's shape), PROMPT tokens in, ANSWER out, greedily. `ours_compiled` is what
sample.py --compile does (llama.compile_decoding), transformers' forms are generate with its dynamic cache, its static one, and
the dynamic one with a compiled forward. The warm-up, three tokens, contains what is compiled.

`towers`: CLIP-L/14 and DINOv2-L/14 at 336 pixels, a batch of 4; ours gives the layers that COMM reads, transformers all of
them, so that the same 24 blocks run. Compiled is ours block by block, theirs as a whole.

`train`: a step (forward, backward, AdamW) on eight dialogues of uneven length about a picture each: a frozen CLIP-B/16 at
224, LLaVA-1.5's connector and a LLaMA of 160M, random weights, the same for all. Ours packs them into one row; transformers'
LlavaForConditionalGeneration gets them padded on the right. Rates count real tokens, pictures' included, padding not. The FLOPs
are those of the blocks that are read, causal attention within a dialogue, logits of supervised tokens, gradients of what learns.

`load` writes a sharded LLaMA of 2.2 GB (TinyLlama's shape, bf16, random weights) into a temporary folder and times from the
call of from_pretrained to the end of a forward of one token:

    ours            Llama.from_pretrained
    transformers    LlamaForCausalLM.from_pretrained, with --vs=transformers
    floor           what no loader can do without: the module built on the meta device, every tensor of the memory-mapped
                    files assigned, every page of them touched once, and the same forward

Importing libraries does not count, and the files are in the system's cache, so that the disk does not count either.
`anonymous` is the memory that a process takes beyond the mapped files, which the system can drop and share: at its highest,
and 0 on systems that do not tell it (all but Linux).

`loader`: one thread, JPEG files of a photograph's size and spectrum to 336 x 336. Ours gives uint8, since the towers normalise
on the device; transformers' processor gives normalised float32 (`transformers`), or uint8 if it is told to.

`connectors`: on the hidden states of CLIP-L/14 at 336 (comm: and of DINOv2-L/14), to an LLM that is 4096 wide; forward alone,
and forward with the backward of its own parameters.
"""
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cli
from hub import InputError

@dataclass
class BenchConfig:
    what: str = "decode"      # decode (or prefill), towers, train, load, loader, connectors
    vs: str = ""              # transformers: side by side with it, where it is installed
    repeats: int = 5          # turns of every contender; the median is reported
    layers: int = 22          # load, prefill, decode: blocks of the LLaMA, 22: 2.2 GB
    batch: int = 0            # rows of prefill and decode (0: 1), pictures of towers and connectors (0: 4)
    dtype: str = "bfloat16"   # or float32; decode, towers, connectors: of the weights; train: bfloat16 is autocast
    tower: str = ""           # towers: clip or dinov2 alone; empty: both
    device: str = "auto"      # auto, cpu, cuda, mps
    json: bool = False        # print one JSON object last
    # what a contender's own process is told
    contender: str = ""       # ours, transformers, floor or limits: one turn of it, on `folder`
    folder: str = ""          # the checkpoint
    stage: int = 1            # train: 1 or 2


def tiny_llama(layers):
    from llama import LlamaConfig
    return LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                       num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5)


def write_llama(folder, layers):
    """TinyLlama-1.1B in bf16, random weights, in shards of a few blocks each, as the hub has models of this size -> bytes."""
    import torch
    from safetensors.torch import save_file

    from hub import on_meta
    from llama import Llama
    config = tiny_llama(layers)
    with on_meta():
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    shards, total = [[]], 0
    for name, shape in shapes.items():
        if sum(shapes[other].numel() for other in shards[-1]) > 350e6:       # 0.7 GB
            shards.append([])
        shards[-1].append(name)
        total += 2 * shape.numel()
    places = {}
    for i, names in enumerate(shards, 1):
        shard = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name if name.startswith("lm_head.") else f"model.{name}":
                   torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.03, 0.03) for name in names}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "bfloat16"}))
    return total


def load_ours(folder, device):
    import torch

    from llama import Llama
    return lambda: Llama.from_pretrained(folder, dtype=torch.bfloat16, device=device)


def load_transformers(folder, device):
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaForCausalLM    # the lazy import of it does not count
    transformers.logging.disable_progress_bar()
    options = {} if device == "cpu" else {"device_map": device}
    return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def load_floor(folder, device):
    import torch
    from safetensors import safe_open

    from hub import on_meta, read_config
    from llama import Llama, LlamaConfig

    def load():
        with on_meta():
            model = Llama(LlamaConfig.from_dict(read_config(folder), folder))
        tensors = {}
        for shard in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(shard, framework="pt", device=device) as file:
                tensors |= {model.name_of(name): file.get_tensor(name) for name in file.keys()}
        model.load_state_dict(tensors, assign=True)
        for tensor in tensors.values():
            tensor.flatten()[::2048].sum()                           # 4096 bytes further each time: one value of every page
        return model
    return load


LOADERS = {"ours": load_ours, "transformers": load_transformers, "floor": load_floor}


def load_turn(config):
    """The contender's own process: load, one forward -> seconds and bytes."""
    import torch
    load = LOADERS[config.contender](config.folder, config.device)
    with torch.inference_mode():
        token = torch.ones(1, 1, dtype=torch.long, device=config.device)
        small = torch.ones(8, 8, dtype=torch.bfloat16, device=config.device)
        small @ small                                                # the first product sets libraries up, which does not count
        before = anonymous_memory()
        highest, ended = [before], threading.Event()
        watcher = threading.Thread(target=watch, args=(highest, ended))
        watcher.start()
        start = time.perf_counter()
        model = load()
        loaded = time.perf_counter()
        logits = model(token)
        getattr(logits, "logits", logits).float().sum().item()       # waits for the device, too
        end = time.perf_counter()
    ended.set()
    watcher.join()
    highest.append(anonymous_memory())
    return {"seconds": end - start, "load": loaded - start, "anonymous": max(highest) - before}


def anonymous_memory():
    """Bytes of this process that no file backs; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def watch(highest, ended):
    while not ended.wait(0.01):
        highest.append(anonymous_memory())


def bench_load(config):
    """-> {contender: {"seconds", "load", "anonymous"}}: medians, and the ratios that matter. Prints a table."""
    contenders = [name for name in LOADERS if name != "transformers" or config.vs]
    turns = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        size = write_llama(Path(folder), config.layers)
        print(f"{size / 1e9:.2f} GB of bf16 weights, {config.repeats} turns on {config.device}", flush=True)
        for _ in range(config.repeats):
            for name in contenders:
                turns[name].append(turn(config, name, folder=folder))
    result = {"bytes": size}
    for name in contenders:
        median = result[name] = {key: statistics.median(turn[key] for turn in turns[name]) for key in turns[name][0]}
        print(f"{name:12} {median['seconds']:6.2f} s to the first token, loaded after {median['load']:.2f} s, "
              f"{median['anonymous'] / 1e6:5.0f} MB anonymous ({median['anonymous'] / size:.1%} of the weights)")
    for name in contenders[1:]:
        result[f"ours_over_{name}"] = result["ours"]["seconds"] / result[name]["seconds"]
        print(f"ours / {name}: {result[f'ours_over_{name}']:.2f}")
    return result


# --- a training step --------------------------------------------------------------------------------------------------

TEXTS = (212, 472, 154, 271, 310, 71, 211, 105)                      # tokens of text in each dialogue, as in LLaVA's instructions
SUPERVISED = 0.6                                                     # the share of a text that is answers, its end here


def write_llava(folder, tower=None, llm=None):
    """A LLaVA in the layout that both sides load, float32, random weights. tower, llm: configs, None: the reference case's."""
    import torch
    from tokenizers import Tokenizer

    from clip import CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig
    from export import export
    from images import ImageSpec
    from llama import Llama, LlamaConfig
    from mllm import MLLM
    tower = tower or CLIPVisionConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                                      image_size=224, patch_size=16)
    llm = llm or LlamaConfig(vocab_size=32000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                             num_attention_heads=12)
    torch.manual_seed(0)
    words = Tokenizer.from_file(str(Path(__file__).parent / "weights" / "llama" / "tokenizer.json"))      # any: no text is read
    export(MLLM([CLIPVision(tower)], Llama(llm), ConnectorConfig("mlp"), words, "vicuna_v1", ImageSpec(tower.image_size)), folder)


def dialogues(side, tokens_per_image, texts=TEXTS):
    """Eight random dialogues -> [(name, tokens, labels, [pixels])] as data.collate takes them: a token, a picture, the rest."""
    import torch

    from dialogue import IGNORE, IMAGE
    random, examples = torch.Generator().manual_seed(0), []
    for i, length in enumerate(texts):
        words = torch.randint(3, 600, (length,), generator=random).tolist()
        asked = length - int(SUPERVISED * length)
        tokens = [words[0], *[IMAGE] * tokens_per_image, *words[1:]]
        labels = [IGNORE] * (tokens_per_image + asked) + words[asked:]
        examples.append((f"{i}", tokens, labels, [torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=random)]))
    return examples


def train_ours(folder, stage, device, texts=TEXTS, compiled=False):
    """-> the model, and a function that gives the loss of the dialogues."""
    from data import collate
    from llama import compile_blocks
    from mllm import MLLM
    from train import choose_trained
    model = MLLM.from_pretrained(folder, device=device).train()
    if compiled:                                                     # as train.py --compile=true
        for blocks in (model.llm.layers, *(tower.blocks for tower in model.vision)):
            compile_blocks(blocks)
    choose_trained(model, ["connector"] if stage == 1 else ["connector", "llm"])
    batch = collate(dialogues(model.spec.size, model.tokens_per_image, texts), [], model.spec.size)
    pixels, tokens, labels, shown = (tensor.to(device) for tensor in (batch.pixels, batch.tokens, batch.labels, batch.shown))

    def loss():
        total, number = model(pixels, tokens, labels, batch.lengths, shown)
        return total / number
    return model, loss


def train_transformers(folder, stage, device, texts=TEXTS):
    import torch
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    from clip import CLIP_MEAN, CLIP_STD
    from dialogue import IGNORE, IMAGE
    from vit import Normalize
    transformers.logging.disable_progress_bar()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).train()
    model.requires_grad_(stage == 2)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    side, image = model.config.vision_config.image_size, model.config.image_token_index
    _, tokens, labels, pixels = zip(*dialogues(side, (side // model.config.vision_config.patch_size) ** 2, texts))
    tokens = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)                    # (B, T)
    tokens = tokens.masked_fill(tokens == IMAGE, image).to(device)
    labels = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE).to(device)
    pixels = Normalize(CLIP_MEAN, CLIP_STD)(torch.cat([torch.stack(picture) for picture in pixels]), torch.float32).to(device)
    lengths = torch.tensor([length + tokens.shape[1] - max(texts) for length in texts], device=device)
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    return model, lambda: model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels, use_cache=False).loss


TRAINERS = {"ours": train_ours, "ours_compiled": partial(train_ours, compiled=True), "transformers": train_transformers}


def train_turn(config):
    """The contender's own process: build, a step to warm up, a step -> seconds, bytes at the highest, the first loss."""
    import torch
    if config.contender == "limits":
        return limits(config)
    model, loss_of = TRAINERS[config.contender](config.folder, config.stage, config.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True)

    def step():
        start = time.perf_counter()
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), wait(config.device) - start
    (loss, warm_up), (_, seconds) = step(), step()
    return {"seconds": seconds, "warm_up": warm_up, "memory": peak_memory(config.device), "loss": loss}


def wait(device):
    """The time when the device has done what it was given."""
    import torch
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes at the highest: of the GPU, or of this process with its libraries (0 where the system does not say)."""
    import torch
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def limits(config):
    """What the machine can do at best -> {"flops": FLOP/s of a large matrix product in the dtype, "read": bytes/s of a sum}."""
    import torch
    dtype = getattr(torch, config.dtype)
    a, b = (torch.randn(4096, 4096, device=config.device).to(dtype) for _ in range(2))
    large = torch.ones(2 ** 28, device=config.device)                # 1 GiB

    def best(work):
        work()
        times = []
        for _ in range(5):
            start = wait(config.device)
            work()
            times.append(wait(config.device) - start)
        return min(times)
    return {"flops": 2 * 4096 ** 3 / best(lambda: a @ b), "read": large.numel() * 4 / best(large.sum)}


def train_flops(folder, stage, texts=TEXTS):
    """FLOPs that a step cannot do without. A linear map costs 2 a weight and token, forward; its backward costs the same for
    what flows back, and again for its weights if they learn. Attention's is twice its forward. Elementwise work is left out."""
    from clip import CLIPVisionConfig
    from hub import fields_of, read_config
    from llama import LlamaConfig
    config = read_config(folder)
    v, c = fields_of(CLIPVisionConfig, config["vision_config"], folder), LlamaConfig.from_dict(config["text_config"], folder)
    patches, D, C = (v.image_size // v.patch_size) ** 2, v.hidden_size, c.hidden_size
    lengths = [length + patches for length in texts]
    tower = len(texts) * (2 * patches * 3 * v.patch_size ** 2 * D + (v.num_hidden_layers - 1) * (
        2 * (patches + 1) * (4 * D * D + 2 * D * v.intermediate_size) + 4 * (patches + 1) ** 2 * D))
    connector = 2 * len(texts) * patches * (2 * (D * C + C * C) + C * C)     # both maps forward and their weights, one back
    heads = c.num_attention_heads * c.head_dim
    weights = c.num_hidden_layers * (2 * C * (heads + c.num_key_value_heads * c.head_dim) + 3 * C * c.intermediate_size)
    linear = 2 * (weights * sum(lengths) + C * c.vocab_size * sum(int(SUPERVISED * length) for length in texts))
    attention = c.num_hidden_layers * 2 * heads * sum(length ** 2 for length in lengths)     # causal: half of all pairs
    return tower + connector + (1 + stage) * linear + 3 * attention


def bench_train(config):
    """-> {"stage1", "stage2"}: {"limits", contender: medians} with real tokens a second, share of the limit, first loss; and how
    many times as fast the faster form of ours is. Prints a table."""
    contenders, result = [name for name in TRAINERS if name.startswith("ours") or config.vs], {"dtype": config.dtype}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        folder = Path(folder) / "llava"
        write_llava(folder)
        tokens = sum(TEXTS) + len(TEXTS) * 196
        padding = 1 - tokens / len(TEXTS) / (max(TEXTS) + 196)
        print(f"{len(TEXTS)} dialogues of {tokens:,} tokens; padded to the longest, {padding:.0%} would be padding")
        for stage in (1, 2):
            flops = train_flops(folder, stage)
            found = result[f"stage{stage}"] = take_turns(config, contenders, folder=folder, stage=stage)
            found["flops"] = flops
            for name in contenders:
                one = found[name]
                one["tokens_per_second"] = tokens / one["seconds"]
                one["of_the_limit"] = flops / one["seconds"] / found["limits"]["flops"]
                print(f"stage {stage}  {name:13} {spread(one)}, {one['tokens_per_second']:5.0f} tokens/s, "
                      f"{one['of_the_limit']:.0%} of the limit for {flops / 1e12:.2f} TFLOP, {one['memory'] / 2 ** 30:.1f} GiB, "
                      f"loss {one['loss']:.4f}, first step {one['warm_up']:.1f} s", flush=True)
            if config.vs:
                found["times_transformers"] = fastest(found, "transformers") / fastest(found, "ours")
                print(f"stage {stage}  ours is {found['times_transformers']:.2f} times as fast", flush=True)
    return result


# --- generation -------------------------------------------------------------------------------------------------------

PROMPT, ANSWER = 700, 64                                             # tokens in, tokens out


def decode_ours(folder, device, dtype, form):
    from llama import Llama, compile_decoding
    model = Llama.from_pretrained(folder, dtype=dtype, device=device)
    if form == "compiled" and not compile_decoding(model):
        raise InputError("there is no C++ compiler (g++)")

    def generate(tokens, new, told):
        for _ in model.stream(tokens, max_new_tokens=new, eos=[]):
            told()
    return generate


def decode_transformers(folder, device, dtype, form):
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    model.generation_config.eos_token_id = None                      # so that nothing ends the text
    cache = {"cache_implementation": "static"} if form == "static" else {}
    if form == "compiled":
        model.forward = torch.compile(model.forward, dynamic=True)

    class Teller:                                                    # generate shows it the prompt and then every token
        def __init__(self, told):
            self.told, self.prompt = told, True

        def put(self, tokens):
            if not self.prompt:
                self.told()
            self.prompt = False

        def end(self):
            pass
    return lambda tokens, new, told: model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                                                    do_sample=False, streamer=Teller(told), **cache)


GENERATORS = {"ours": decode_ours, "ours_compiled": decode_ours, "transformers": decode_transformers,
              "transformers_static": decode_transformers, "transformers_compiled": decode_transformers}


def decode_turn(config):
    """The contender's own process: load, three tokens to warm up, then PROMPT tokens in and ANSWER out."""
    import torch
    if config.contender == "limits":
        return limits(config)
    name, _, form = config.contender.partition("_")
    generate = GENERATORS[name](config.folder, config.device, getattr(torch, config.dtype), form)
    tokens = torch.randint(3, 32000, (config.batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(config.device)
    start = wait(config.device)
    generate(tokens, 3, lambda: None)
    ready, times = wait(config.device), []
    generate(tokens, ANSWER, lambda: times.append(wait(config.device)))
    steps = [after - before for before, after in zip(times, times[1:])]
    return {"warm_up": ready - start, "first": times[0] - ready, "token": statistics.median(steps),
            "memory": peak_memory(config.device)}


def decode_work(config, batch, width):
    """-> FLOPs of the prompt with the first token, and bytes that a step in the middle of the answer reads: every weight but
    the embeddings, and the cached keys and values of all rows. width: bytes of a number."""
    C, L, narrow = config.hidden_size, config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    weights = L * (2 * C * C + 2 * C * narrow + 3 * C * config.intermediate_size)
    head = config.vocab_size * C
    flops = batch * (2 * weights * PROMPT + 2 * L * C * PROMPT ** 2 + 2 * head)      # attention is causal: half of all pairs
    return flops, width * (weights + head + 2 * batch * L * narrow * (PROMPT + ANSWER // 2))


def bench_decode(config):
    """-> {"limits", contender: medians}, and how many times the fastest form of theirs ours is. Prints a table."""
    contenders = [name for name in GENERATORS if name.startswith("ours") or config.vs]
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as folder:
        size = write_llama(Path(folder), config.layers)
        flops, read = decode_work(tiny_llama(config.layers), config.batch, 2 if config.dtype == "bfloat16" else 4)
        print(f"{size / 2e9:.2f}B parameters, {config.dtype}; batch {config.batch}, {PROMPT} tokens in "
              f"({flops / 1e12:.2f} TFLOP), {ANSWER} out ({read / 1e9:.2f} GB read a step), on {config.device}", flush=True)
        result = take_turns(config, contenders, folder=folder, batch=config.batch)
    result |= {"parameters": size // 2, "flops": flops, "bytes_read": read}
    for name in contenders:
        one = result[name]
        one["of_the_limit"] = {"first": flops / one["first"] / result["limits"]["flops"],
                               "token": read / one["token"] / result["limits"]["read"]}
        print(f"{name:22} first token {spread(one, 'first')}, {one['of_the_limit']['first']:.0%} of the limit; then "
              f"{spread(one, 'token', 1e3, 'ms')} a step, {read / one['token'] / 1e9:.1f} GB/s, "
              f"{one['of_the_limit']['token']:.0%} of the limit; warm-up {one['warm_up']:.1f} s, "
              f"{one['memory'] / 2 ** 30:.1f} GiB")
    if config.vs:
        for key in ("first", "token"):
            result[f"{key}_times_transformers"] = fastest(result, "transformers", key) / fastest(result, "ours", key)
            print(f"{key}: ours is {result[f'{key}_times_transformers']:.2f} times as fast, the fastest form of each")
    return result


# --- towers -----------------------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}    # ViT-L/14
TOWERS = {"clip": LARGE | {"intermediate_size": 4096, "image_size": 336}, "dinov2": LARGE | {"image_size": 518}}
SIDE = 336                                                           # of the pictures
READ = {"clip": "comm_clip", "dinov2": "comm_dino"}                  # the connector whose layers ours is asked for


def fill(model, device, dtype):
    """Random weights for a module that was built on the meta device."""
    model = model.to_empty(device=device).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    return model


def tower_ours(name, device, dtype, compiled):
    from clip import CLIP_MEAN, CLIP_STD, CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig, layers_needed
    from dinov2 import DINOv2, DINOv2Config
    from hub import on_meta
    from llama import compile_blocks
    from vit import Normalize
    kind, shape = {"clip": (CLIPVision, CLIPVisionConfig), "dinov2": (DINOv2, DINOv2Config)}[name]
    with on_meta():
        tower = kind(shape(**TOWERS[name]))
    tower = fill(tower, device, dtype)
    tower.normalize = Normalize(CLIP_MEAN, CLIP_STD).to(device)      # to_empty has forgotten it, too
    (layers,) = layers_needed(ConnectorConfig(READ[name]), [tower.config.num_hidden_layers])
    if compiled:
        compile_blocks(tower.blocks)
    return tower, lambda pixels: tower(pixels, layers)


def tower_transformers(name, device, dtype, compiled):
    import torch
    import transformers

    from clip import CLIP_MEAN, CLIP_STD
    from vit import Normalize
    kind, shape = {"clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
                   "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config)}[name]
    model = kind._from_config(shape(**TOWERS[name]), attn_implementation="sdpa", dtype=dtype).to(device).eval()
    normalize = Normalize(CLIP_MEAN, CLIP_STD).to(device)
    forward = torch.compile(model) if compiled else model
    return model, lambda pixels: forward(pixel_values=normalize(pixels, dtype), output_hidden_states=True).hidden_states


SEERS = {"ours": tower_ours, "ours_compiled": tower_ours, "transformers": tower_transformers,
         "transformers_compiled": tower_transformers}


def towers_turn(config):
    """The contender's own process: build, a forward to warm up, three that are timed."""
    import torch
    if config.contender == "limits":
        return limits(config)
    name, _, form = config.contender.partition("_")
    model, see = SEERS[name](config.tower, config.device, getattr(torch, config.dtype), form == "compiled")
    pixels = torch.randint(0, 256, (config.batch, 3, SIDE, SIDE), dtype=torch.uint8, device=config.device)
    with torch.inference_mode():
        start = wait(config.device)
        see(pixels)
        times = [wait(config.device)]
        for _ in range(3):
            see(pixels)
            times.append(wait(config.device))
    return {"warm_up": times[0] - start, "seconds": statistics.median(after - before for before, after in zip(times, times[1:])),
            "parameters": sum(p.numel() for p in model.parameters()), "memory": peak_memory(config.device)}


def tower_flops(shape, side, blocks):
    """FLOPs of a picture through the first `blocks` blocks, with one prefix token."""
    D, P = shape["hidden_size"], shape["patch_size"]
    N = (side // P) ** 2
    return 2 * N * 3 * P ** 2 * D + blocks * (2 * (N + 1) * (4 * D * D + 2 * D * shape.get("intermediate_size", 4 * D))
                                              + 4 * (N + 1) ** 2 * D)


def bench_towers(config):
    """-> {tower: {"limits", contender: medians}}, and how many times the fastest form of theirs ours is. Prints a table."""
    contenders, result = [name for name in SEERS if name.startswith("ours") or config.vs], {"dtype": config.dtype}
    for tower, shape in {name: TOWERS[name] for name in ([config.tower] if config.tower else TOWERS)}.items():
        flops = config.batch * tower_flops(shape, SIDE, shape["num_hidden_layers"])
        found = result[tower] = take_turns(config, contenders, tower=tower, batch=config.batch) | {"flops": flops}
        for name in contenders:
            one = found[name]
            one["of_the_limit"] = flops / one["seconds"] / found["limits"]["flops"]
            print(f"{tower:7} {name:22} {spread(one)}, {one['of_the_limit']:.0%} of the limit for {flops / 1e12:.2f} TFLOP, "
                  f"{one['parameters'] / 1e6:.0f}M parameters, warm-up {one['warm_up']:.1f} s, {one['memory'] / 2 ** 30:.1f} GiB",
                  flush=True)
        if config.vs:
            found["times_transformers"] = fastest(found, "transformers") / fastest(found, "ours")
            print(f"{tower:7} ours is {found['times_transformers']:.2f} times as fast, the fastest form of each", flush=True)
    return result


# --- loading pictures -------------------------------------------------------------------------------------------------

PICTURES, SIZE = 32, (640, 480)                                      # JPEG files of COCO's usual size


def write_pictures(folder):
    """Seeded noise that falls off with the frequency, as a photograph's does; quality 90 -> bytes of all files."""
    import numpy as np
    from PIL import Image
    random, (width, height) = np.random.default_rng(0), SIZE
    for i in range(PICTURES):
        picture = np.zeros((height, width, 3))
        for octave in range(8):
            grid = random.normal(size=(2 ** octave * 3, 2 ** octave * 4, 3)) / 2 ** octave
            for channel in range(3):
                picture[..., channel] += np.asarray(Image.fromarray(grid[..., channel].astype(np.float32)).resize(SIZE, 3))
        picture = (picture - picture.min()) / np.ptp(picture) * 255
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:02}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir())


def loader_ours(mode):
    from images import ImageSpec, open_image, to_pixels
    spec = ImageSpec(SIDE, mode)
    return lambda file: to_pixels(open_image(file), spec)


def loader_transformers(form):
    """CLIP's processor, as LLaVA uses it: resize, crop, scale and normalise, here with NumPy and PIL."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    plain = {"do_rescale": False, "do_normalize": False} if form == "uint8" else {}
    return lambda file: processor(Image.open(file), return_tensors="pt", **plain)["pixel_values"]


LOADS = {"ours": loader_ours, "ours_pad": loader_ours, "transformers": loader_transformers,
         "transformers_uint8": loader_transformers}


def loader_turn(config):
    """One thread, all files twice, the second time counts -> seconds a picture."""
    import torch
    if config.contender == "limits":
        return limits(config)
    torch.set_num_threads(1)
    name, _, form = config.contender.partition("_")
    load = LOADS[name](form or "crop" if name == "ours" else form)
    for _ in range(2):
        start = time.perf_counter()
        for file in sorted(Path(config.folder).iterdir()):
            load(file)
        seconds = time.perf_counter() - start
    return {"seconds": seconds / PICTURES, "memory": peak_memory("cpu")}


def bench_loader(config):
    """-> {contender: medians}, and how many times as fast ours is as theirs. Prints a table."""
    contenders = [name for name in LOADS if name.startswith("ours") or config.vs]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        size = write_pictures(Path(folder))
        print(f"{PICTURES} JPEG files of {SIZE[0]} x {SIZE[1]}, {size / PICTURES / 1000:.0f} kB each, to {SIDE} x {SIDE}",
              flush=True)
        result = take_turns(config, contenders, folder=folder)
    for name in contenders:
        one = result[name]
        one["pictures_per_second"] = 1 / one["seconds"]
        print(f"{name:18} {spread(one, scale=1e3, unit='ms')} a picture, {one['pictures_per_second']:.0f} a second and core, "
              f"{one['memory'] / 2 ** 20:.0f} MiB")
    if config.vs:
        result["times_transformers"] = result["transformers"]["seconds"] / result["ours"]["seconds"]
        print(f"ours is {result['times_transformers']:.2f} times as fast, with the same crop")
    return result


# --- connectors -------------------------------------------------------------------------------------------------------

WIDTH = 4096                                                         # of the LLM
CONNECTORS = ("linear", "mlp", "sti", "sci", "dci", "efficient", "comm")


def connector_flops(kind, N=576, D=1024, C=WIDTH):
    """FLOPs of a picture, forward: 2 for each weight that a token meets; norms, sums and pooling are left out."""
    parts = {"mlp": 1, "sti": 1, "sci": 3, "dci": 3, "efficient": 3}
    if kind == "linear":
        return 2 * N * D * C
    if kind == "comm":                                               # 24 and 6 layers, two MLPs of 4D, two widths side by side
        return 2 * N * (30 * D * D + 2 * 8 * D * D + 2 * D * C)
    return 2 * (N + 2 * (N // 8) if kind == "sti" else N) * (parts[kind] * D * C + C * C)


def connectors_turn(config):
    """A connector of its own process, on hidden states of CLIP-L/336 (comm: and DINOv2-L's) -> seconds forward, and forward with
    backward to its own parameters."""
    import torch

    from connector import ConnectorConfig, layers_asked, make_connector
    if config.contender == "limits":
        return limits(config)
    shape, dtype = (24, 1024, 576), getattr(torch, config.dtype)
    shapes, connector_config = [shape] * (1 + (config.contender == "comm")), ConnectorConfig(config.contender)
    connector = make_connector(connector_config, shapes, WIDTH).to(config.device, dtype)
    asked = layers_asked(connector_config, [24] * len(shapes))
    hidden = [{layer: torch.randn(config.batch, 576, 1024, device=config.device).to(dtype) for layer in layers}
              for layers in asked]
    hidden = [list(states.values()) for states in hidden] if config.contender == "comm" else hidden
    found = {"forward": [], "seconds": []}
    for _ in range(4):
        start = wait(config.device)
        with torch.no_grad():
            tokens = connector(hidden)
        found["forward"].append(wait(config.device) - start)
        start = wait(config.device)
        connector(hidden).sum().backward()
        found["seconds"].append(wait(config.device) - start)
    return {key: statistics.median(times[1:]) for key, times in found.items()} | {
        "tokens": tokens.shape[1], "parameters": sum(p.numel() for p in connector.parameters()),
        "memory": peak_memory(config.device)}


def bench_connectors(config):
    """-> {"limits", kind: medians}. Prints a table."""
    result = take_turns(config, CONNECTORS, batch=config.batch)
    print(f"{config.batch} pictures, CLIP-L/14 at 336 (comm: and DINOv2-L/14) to an LLM of width {WIDTH}, {config.dtype}")
    for kind in CONNECTORS:
        one, flops = result[kind], config.batch * connector_flops(kind)
        one |= {"flops": flops, "of_the_limit": flops / one["forward"] / result["limits"]["flops"]}
        print(f"{kind:10} {one['tokens']:.0f} tokens, {one['parameters'] / 1e6:5.1f}M parameters, "
              f"{flops / config.batch / 1e9:4.0f} GFLOP a picture; forward {spread(one, 'forward')}, {one['of_the_limit']:.0%} of the limit; with backward {spread(one)}; "
              f"{one['memory'] / 2 ** 30:.1f} GiB")
    return result


# --- the command ------------------------------------------------------------------------------------------------------

BENCHES = {"load": (bench_load, load_turn), "train": (bench_train, train_turn), "prefill": (bench_decode, decode_turn),
           "decode": (bench_decode, decode_turn), "towers": (bench_towers, towers_turn), "loader": (bench_loader, loader_turn),
           "connectors": (bench_connectors, connectors_turn)}


def take_turns(config, contenders, **options):
    """Turns of all contenders, and of the limits, for what a moment of the machine yields -> {name: the medians of what its
    turns say}, and beside each figure `figure_range`, the least and the most. Memory: the most."""
    turns = {name: [] for name in ("limits", *contenders)}
    for _ in range(config.repeats):
        for name in turns:
            turns[name].append(turn(config, name, **options))
    result = {}
    for name, all_of_it in turns.items():
        result[name] = {key: statistics.median(one[key] for one in all_of_it) for key in all_of_it[0]}
        result[name] |= {f"{key}_range": [f(one[key] for one in all_of_it) for f in (min, max)] for key in all_of_it[0]}
        if "memory" in result[name]:
            result[name]["memory"] = max(one["memory"] for one in all_of_it)
    found = result["limits"]
    print(f"limits: {spread(found, 'flops', 1e-9, 'GFLOP/s')} in {config.dtype}, {spread(found, 'read', 1e-9, 'GB/s')} read, "
          f"on {config.device}", flush=True)
    return result


def spread(one, key="seconds", scale=1, unit="s"):
    """A median and its range as text."""
    least, most = one[f"{key}_range"]
    return f"{one[key] * scale:.3g} {unit} ({least * scale:.3g} to {most * scale:.3g})"


def fastest(result, side, key="seconds"):
    return min(one[key] for name, one in result.items() if name.startswith(side))


def turn(config, contender, **options):
    """One turn of a contender in a process of its own -> the dict that it prints."""
    options = {"contender": contender, "device": config.device, "dtype": config.dtype} | options
    child = subprocess.run([sys.executable, __file__, config.what, *(f"--{key}={value}" for key, value in options.items())],
                           capture_output=True, text=True)
    if child.returncode:
        raise InputError(f"{contender} failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def main(arguments):
    config = cli.parse(BenchConfig, arguments, __doc__)
    if config.what not in BENCHES:
        raise InputError(f"{config.what!r}: no such benchmark; there are {', '.join(BENCHES)}")
    if config.vs not in ("", "transformers"):
        raise InputError(f"--vs={config.vs}: only transformers can be compared with")
    if config.vs and not importlib.util.find_spec("transformers"):
        raise InputError("--vs=transformers: it is not installed (pip install -r requirements-dev.txt)")
    if config.dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype={config.dtype}: bfloat16 or float32")
    if config.tower and config.tower not in TOWERS:
        raise InputError(f"--tower={config.tower}: {' or '.join(TOWERS)}")
    if config.repeats < 1 or config.layers < 1 or config.batch < 0:
        raise InputError("--repeats and --layers must be 1 or more, --batch 0 or more")
    config.batch = config.batch or (1 if config.what in ("prefill", "decode") else 4)
    config.device = str(cli.pick_device(config.device))
    bench, one_turn = BENCHES[config.what]
    if config.contender:
        print(json.dumps(one_turn(config)))
        return
    result = bench(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main, keep=False)
