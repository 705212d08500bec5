"""How fast and how small. One subcommand so far:

    python bench.py load --vs=transformers        # from a checkpoint on the disk to the first token

`load` writes a sharded LLaMA of 2.2 GB (TinyLlama's shape, bf16, random weights) into a temporary folder and times, side by
side in one run, each time in a process of its own, from the call of from_pretrained to the end of a forward of one token:

    ours            Llama.from_pretrained
    transformers    LlamaForCausalLM.from_pretrained, with --vs=transformers
    floor           what no loader can do without: the module built on the meta device, every tensor of the memory-mapped
                    files assigned, every page of them touched once, and the same forward

Importing libraries does not count. The contenders take turns, so that a slow moment of the machine meets them all, and the
median of the turns is reported; the files are in the system's cache, so that the disk does not count either. `anonymous` is
the memory that a process takes beyond the mapped files, which the system can drop and share: at its highest, and 0 on systems
that do not tell it (all but Linux).
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
    what: str = "load"        # load: from a checkpoint on the disk to the first token
    vs: str = ""              # transformers: side by side with it, where it is installed
    repeats: int = 5          # turns of every contender; the median is reported
    layers: int = 22          # blocks of the LLaMA that load writes, 22: 2.2 GB
    device: str = "auto"      # auto, cpu, cuda, mps
    json: bool = False        # print one JSON object last
    # what a contender's own process is told
    contender: str = ""       # ours, transformers or floor: one turn of it, on `folder`
    folder: str = ""          # the checkpoint


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


CONTENDERS = {"ours": load_ours, "transformers": load_transformers, "floor": load_floor}


def one_turn(config):
    """The contender's own process: load, one forward -> seconds and bytes, as JSON on stdout."""
    import torch
    load = CONTENDERS[config.contender](config.folder, config.device)
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
    print(json.dumps({"seconds": end - start, "load": loaded - start, "anonymous": max(highest) - before}))


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
    contenders = [name for name in CONTENDERS if name != "transformers" or config.vs]
    turns = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        size = write_llama(Path(folder), config.layers)
        print(f"{size / 1e9:.2f} GB of bf16 weights, {config.repeats} turns on {config.device}", flush=True)
        for _ in range(config.repeats):
            for name in contenders:
                options = f"--contender={name}", f"--folder={folder}", f"--device={config.device}"
                child = subprocess.run([sys.executable, __file__, "load", *options], capture_output=True, text=True)
                if child.returncode:
                    raise InputError(f"{name} failed: {child.stderr.strip()[-300:]}")
                turns[name].append(json.loads(child.stdout.splitlines()[-1]))
    result = {"bytes": size}
    for name in contenders:
        median = result[name] = {key: statistics.median(turn[key] for turn in turns[name]) for key in turns[name][0]}
        print(f"{name:12} {median['seconds']:6.2f} s to the first token, loaded after {median['load']:.2f} s, "
              f"{median['anonymous'] / 1e6:5.0f} MB anonymous ({median['anonymous'] / size:.1%} of the weights)")
    for name in contenders[1:]:
        result[f"ours_over_{name}"] = result["ours"]["seconds"] / result[name]["seconds"]
        print(f"ours / {name}: {result[f'ours_over_{name}']:.2f}")
    return result


def main(arguments):
    config = cli.parse(BenchConfig, arguments, __doc__)
    if config.what != "load":
        raise InputError(f"{config.what!r}: no such benchmark; there is load")
    if config.vs not in ("", "transformers"):
        raise InputError(f"--vs={config.vs}: only transformers can be compared with")
    if config.vs and not importlib.util.find_spec("transformers"):
        raise InputError("--vs=transformers: it is not installed (pip install -r requirements-dev.txt)")
    if config.repeats < 1 or config.layers < 1:
        raise InputError("--repeats and --layers must be 1 or more")
    config.device = str(cli.pick_device(config.device))
    if config.contender:
        return one_turn(config)
    result = bench_load(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
