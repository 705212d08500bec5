"""Measure how fast training and decoding are, and how much memory they take.

    python -m tools.bench train --vs=transformers       a training step of each stage
    python -m tools.bench decode --vs=transformers      the first token of an answer, and the others
    python -m tools.bench train --against=FOLDER        compare with another checkout of this code
    python -m tools.bench train --size=1b --batch=16    a GPU's size

Every contender runs in its own process, in turns, so a slow moment of the machine meets all of
them. Medians are printed, with the smallest and the largest value. Each process also measures the
machine's limits: the FLOP/s of a large matmul and the bytes/s of a sum. "of the limit" is the share
of them that the FLOPs or bytes of the work need. Weights are random and nothing is downloaded.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import option
from common.errors import InputError
from tools.bench import decode, train

BENCHES = {"train": train, "decode": decode}
KNOWN = {
    "what": BENCHES,
    "vs": ("", "transformers"),
    "dtype": ("bfloat16", "float32"),
    "size": train.SIZES,
    "stage": (0, 1, 2),
}


@dataclass
class Config:
    what: str = option("train", "train or decode")
    vs: str = option("", "transformers: compare with it")
    against: str = option("", "folder of another checkout: compare with it")
    repeats: int = option(5, "turns of every contender")
    batch: int = option(0, "dialogues of train (default 8), prompts of decode (default 1)")
    dtype: str = option("bfloat16", "or float32; in training: autocast")
    size: str = option("160m", "train: the LLM, 160m (with CLIP-B/16), 1b or 7b (with CLIP-L/14)")
    stage: int = option(0, "train: 1, 2, or 0 for both")
    layers: int = option(22, "decode: blocks of the LLM, 22: 1.1B parameters")
    device: str = option("auto", "auto, cpu, cuda, mps")
    json: bool = option(False, "print the result as JSON in the last line")
    contender: str = option("", "internal: run one turn of this contender")
    folder: str = option("", "internal: the checkpoint")


def check(config):
    for key, known in KNOWN.items():
        value = getattr(config, key)
        if value not in known:
            raise InputError(
                f"--{key}={value}: must be one of {', '.join(filter(None, map(str, known)))}"
            )
    if config.vs and not importlib.util.find_spec("transformers"):
        raise InputError("--vs=transformers: pip install -r requirements-dev.txt")
    if config.against and not Path(config.against).is_dir():
        raise InputError(f"--against={config.against}: no such folder")
    if min(config.repeats, config.layers) < 1 or config.batch < 0:
        raise InputError("--repeats and --layers must be 1 or more, --batch 0 or more")


def main(arguments):
    config = cli.parse(Config, arguments, f"{__doc__}\n{train.__doc__}\n{decode.__doc__}")
    check(config)
    config.batch = config.batch or {"train": 8, "decode": 1}[config.what]
    config.device = str(cli.pick_device(config.device))
    bench = BENCHES[config.what]
    if config.contender:
        print(json.dumps(bench.one_turn(config)))
        return
    result = bench.bench(config)
    if config.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
