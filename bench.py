"""How fast and how small, each system in a process of its own, in turns, so that a slow moment of the machine meets them all;
medians are reported.

    python bench.py load --vs=transformers        # from a checkpoint on the disk to the first token
    python bench.py train --vs=transformers       # a training step of each stage

`load` writes a sharded LLaMA of 2.2 GB (TinyLlama's shape, bf16, random weights) into a temporary folder and times from the
call of from_pretrained to the end of a forward of one token:

    ours            Llama.from_pretrained
    transformers    LlamaForCausalLM.from_pretrained, with --vs=transformers
    floor           what no loader can do without: the module built on the meta device, every tensor of the memory-mapped
                    files assigned, every page of them touched once, and the same forward

Importing libraries does not count, and the files are in the system's cache, so that the disk does not count either.
`anonymous` is the memory that a process takes beyond the mapped files, which the system can drop and share: at its highest,
and 0 on systems that do not tell it (all but Linux).

`train` times a step (forward, backward, AdamW) on eight dialogues of uneven length about a picture each: a frozen CLIP-B/16 at
224, LLaVA-1.5's connector and a LLaMA of 160M, random weights, the same for all. Ours packs them into one row; transformers'
LlavaForConditionalGeneration gets them padded on the right. Rates count real tokens, pictures' included, padding not. `of the
limit` is the share of the machine's matrix-product rate, measured first, at which the FLOPs are done that the step cannot do
without: the blocks that are read, causal attention within a dialogue, logits of supervised tokens, gradients of what learns.
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
from pathlib import Path

import cli
from hub import InputError

@dataclass
class BenchConfig:
    what: str = "load"        # load: from a checkpoint on the disk to the first token; train: a training step of each stage
    vs: str = ""              # transformers: side by side with it, where it is installed
    repeats: int = 5          # turns of every contender; the median is reported
    layers: int = 22          # blocks of the LLaMA that load writes, 22: 2.2 GB
    dtype: str = "bfloat16"   # train: bfloat16 (autocast) or float32
    device: str = "auto"      # auto, cpu, cuda, mps
    json: bool = False        # print one JSON object last
    # what a contender's own process is told
    contender: str = ""       # ours, transformers, floor or limits: one turn of it, on `folder`
    folder: str = ""          # the checkpoint
    stage: int = 1            # train: 1 or 2


def write_llama(folder, layers):
    """TinyLlama-1.1B in bf16, random weights, in shards of a few blocks each, as the hub has models of this size -> bytes."""
    import torch
    from safetensors.torch import save_file

    from hub import on_meta
    from llama import Llama, LlamaConfig
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5)
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


def train_ours(folder, stage, device, texts=TEXTS):
    """-> the model, and a function that gives the loss of the dialogues."""
    from data import collate
    from mllm import MLLM
    from train import choose_trained
    model = MLLM.from_pretrained(folder, device=device).train()
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


TRAINERS = {"ours": train_ours, "transformers": train_transformers}


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
    (loss, _), (_, seconds) = step(), step()
    return {"seconds": seconds, "memory": peak_memory(config.device), "loss": loss}


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
    """-> {"limits", "stage1", "stage2"}: of every contender the median seconds with the lowest and highest, real tokens a second,
    peak bytes, share of the limit, first loss; and ours against theirs. Prints a table."""
    contenders = ["ours"] + (["transformers"] if config.vs else [])
    result = {"limits": turn(config, "limits"), "dtype": config.dtype}
    print(f"limits: {result['limits']['flops'] / 1e9:,.0f} GFLOP/s in {config.dtype}, "
          f"{result['limits']['read'] / 1e9:.0f} GB/s read, on {config.device}")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        folder = Path(folder) / "llava"
        write_llava(folder)
        tokens = sum(TEXTS) + len(TEXTS) * 196
        longest = max(TEXTS) + 196
        padding = 1 - tokens / len(TEXTS) / longest
        print(f"{len(TEXTS)} dialogues of {tokens:,} tokens; padded to the longest, {padding:.0%} would be padding")
        for stage in (1, 2):
            turns, flops = {name: [] for name in contenders}, train_flops(folder, stage)
            for _ in range(config.repeats):
                for name in contenders:
                    turns[name].append(turn(config, name, folder=folder, stage=stage))
            found = result[f"stage{stage}"] = {"flops": flops}
            for name in contenders:
                times = [one["seconds"] for one in turns[name]]
                seconds = statistics.median(times)
                one = found[name] = {
                    "seconds": seconds, "least": min(times), "most": max(times), "tokens_per_second": tokens / seconds,
                    "of_the_limit": flops / seconds / result["limits"]["flops"], "loss": turns[name][0]["loss"],
                    "memory": max(one["memory"] for one in turns[name])}
                print(f"stage {stage}  {name:12} {seconds:6.2f} s ({min(times):.2f} to {max(times):.2f}), "
                      f"{one['tokens_per_second']:5.0f} tokens/s, {one['of_the_limit']:.0%} of the limit for "
                      f"{flops / 1e12:.2f} TFLOP, {one['memory'] / 2 ** 30:.1f} GiB, loss {one['loss']:.4f}", flush=True)
            if config.vs:
                found["times_transformers"] = found["transformers"]["seconds"] / found["ours"]["seconds"]
                print(f"stage {stage}  ours is {found['times_transformers']:.2f} times as fast")
    return result


# --- the command ------------------------------------------------------------------------------------------------------

BENCHES = {"load": (bench_load, load_turn), "train": (bench_train, train_turn)}


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
    if config.repeats < 1 or config.layers < 1:
        raise InputError("--repeats and --layers must be 1 or more")
    config.device = str(cli.pick_device(config.device))
    bench, one_turn = BENCHES[config.what]
    if config.contender:
        print(json.dumps(one_turn(config)))
        return
    result = bench(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
