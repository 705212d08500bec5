"""`load` writes a sharded LLaMA of 2.2 GB (TinyLlama's shape, bf16, random weights) into a temporary folder and times from the
call of from_pretrained to the end of a forward of one token:

    ours            Llama.from_pretrained
    transformers    LlamaForCausalLM.from_pretrained, with --vs=transformers
    floor           what no loader can do without: the module built on the meta device, every tensor of the memory-mapped
                    files assigned, every page of them touched once, and the same forward

Importing libraries does not count, and the files are in the system's cache, so that the disk does not count either.
`anonymous` is the memory that a process takes beyond the mapped files, which the system can drop and share: at its highest,
and 0 on systems that do not tell it (all but Linux).
"""
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from benches.turns import anonymous_memory, turn, watch


def tiny_llama(layers):
    from llama import LlamaConfig
    return LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
                       num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-5)


def write_llama(folder, layers):
    """TinyLlama-1.1B in bf16, random weights, in shards of a few blocks each, as the hub has models of this size -> bytes."""
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
    from llama import Llama
    return lambda: Llama.from_pretrained(folder, dtype=torch.bfloat16, device=device)


def load_transformers(folder, device):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaForCausalLM    # the lazy import of it does not count
    transformers.logging.disable_progress_bar()
    options = {} if device == "cpu" else {"device_map": device}
    return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def load_floor(folder, device):
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


def one_turn(config):
    """The contender's own process: load, one forward -> seconds and bytes."""
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


def bench(config):
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
