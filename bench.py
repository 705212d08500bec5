"""How fast and how small, each system in a process of its own, in turns, so that a slow moment of the machine meets them all;
medians are reported, with the least and the most.

    python bench.py decode --vs=transformers      # a prompt's first token, and the steps after it (prefill: the same)
    python bench.py towers --vs=transformers      # the vision towers' hidden states
    python bench.py train --vs=transformers       # a training step of each stage (--vs=transformers,nanovlm: benches/nanovlm.py)
    python bench.py train --size=1b --connector=dense --batch=16 --profile     # for a GPU: the step that is yours, and its parts
    python bench.py load --vs=transformers        # from a checkpoint on the disk to the first token
    python bench.py loader --vs=transformers      # from a JPEG file to pixels
    python bench.py connectors                    # every kind of connector

Weights are random, nothing is downloaded. Without --vs our side runs alone. Each process measures the machine's limits right after
its own work: the FLOP/s of a 4096³ matrix product in the dtype at hand (linear.py's, where that is faster; 8192³ on a GPU), and
the bytes/s of a sum. What a figure is `of the limit` is its share of them; FLOPs and bytes are counted by formula, those that the
work cannot do without. It all runs on CUDA as well, but never has: there was no GPU.
"""
import importlib.util
import json
from dataclasses import dataclass, field

import cli
from benches import connectors, decode, load, loader, nanovlm, towers, train
from hub import InputError


@dataclass
class BenchConfig:
    what: str = "decode"      # decode (or prefill), towers, train, load, loader, connectors
    vs: list[str] = field(default_factory=lambda: [])  # side by side with transformers, where it is installed; train: and nanovlm
    nanovlm: str = ""         # train --vs=nanovlm: the folder of a checkout of nanoVLM
    repeats: int = 5          # turns of every contender; the median is reported
    layers: int = 22          # load, prefill, decode: blocks of the LLaMA, 22: 2.2 GB
    batch: int = 0            # rows of prefill and decode (0: 1), dialogues of train (0: 8), pictures of the others (0: 4)
    dtype: str = "bfloat16"   # or float32; decode, towers, connectors: of the weights; train: bfloat16 is autocast
    tower: str = ""           # towers: clip or dinov2 alone; empty: both
    size: str = "160m"        # train: the LLM, 160m (with CLIP-B/16 at 224), 1b or 7b (with CLIP-L/14 at 336)
    connector: str = "mlp"    # train: of ours
    lora_rank: int = 0        # train: in stage 2 our LLM learns by adapters of this rank; 0: all of it
    stage: int = 0            # train: 1, 2, or 0 for both
    profile: bool = False     # train: where our time goes
    gpu_flops: float = 989    # train: peak of the GPU in TFLOP/s, of which MFU is the share; 989: an H100 in bf16
    device: str = "auto"      # auto, cpu, cuda, mps
    json: bool = False        # print one JSON object last
    # what a contender's own process is told
    contender: str = ""       # ours, transformers or floor: one turn of it, on `folder`
    folder: str = ""          # the checkpoint


# Each file of benches/ opens with what it compares. Its bench(config) gives the turns and prints a table; one_turn(config) is what
# a contender's own process runs.
BENCHES = {"load": load, "train": train, "prefill": decode, "decode": decode, "towers": towers, "loader": loader,
           "connectors": connectors}


def main(arguments):
    about = [__doc__, *(section.__doc__ for section in (decode, towers, train, load, loader, connectors))]
    config = cli.parse(BenchConfig, arguments, "\n\n".join(text.strip() for text in about))
    if config.what not in BENCHES:
        raise InputError(f"{config.what!r}: no such benchmark; there are {', '.join(BENCHES)}")
    for peer in config.vs:
        if peer not in ("transformers", "nanovlm"):
            raise InputError(f"--vs={peer}: only transformers can be compared with, and nanovlm in train")
    if "nanovlm" in config.vs:
        if config.what != "train":
            raise InputError(f"--vs=nanovlm: {config.what} cannot be compared with it, only train can")
        nanovlm.check_checkout(config.nanovlm)
    if "transformers" in config.vs and not importlib.util.find_spec("transformers"):
        raise InputError("--vs=transformers: it is not installed (pip install -r requirements-dev.txt)")
    if config.dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype={config.dtype}: bfloat16 or float32")
    if config.tower and config.tower not in towers.TOWERS:
        raise InputError(f"--tower={config.tower}: {' or '.join(towers.TOWERS)}")
    if config.repeats < 1 or config.layers < 1 or config.batch < 0 or config.lora_rank < 0:
        raise InputError("--repeats and --layers must be 1 or more, --batch and --lora_rank 0 or more")
    config.batch = config.batch or {"prefill": 1, "decode": 1, "train": 8}.get(config.what, 4)
    config.device = str(cli.pick_device(config.device))
    section = BENCHES[config.what]
    if config.contender:
        if config.contender.startswith("ours"):
            cli.keep_freed_memory()                                  # as all commands here do
        print(json.dumps(section.one_turn(config)))
        return
    result = section.bench(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main, keep=False)
