"""Show what each tower gives to a COMM model: replace one side of its merge by a constant.

    python train.py --connector=comm --evaluate=false
    python runs/sides.py out/comm/model --count=1000

The constant is the mean of the side's vectors over the patches of 50 images. So what the model
still answers right, it reads from the other tower. Prints percents, a row for the whole model and
one for each tower alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli  # noqa: E402
from common.errors import InputError  # noqa: E402
from eval import answer, score  # noqa: E402
from interop.load import load_model  # noqa: E402
from toy.findings import TASKS  # noqa: E402
from toy.scenes import task_questions  # noqa: E402


def to_constant(module, inputs, output):
    """Replace vectors (B, N, D) by their mean. A forward hook returns the new output."""
    return output.mean((0, 1)).expand_as(output)


def print_scores(name, model, count):
    scores = []
    for task in TASKS:
        images, texts, targets = task_questions(task, count)
        first, *_ = score(task, answer(model, images, texts, 50), targets).values()
        scores.append(f"{first:9.1%}")
    print(f"{name:6}", *scores, flush=True)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200, help="questions of each task")
    config = parser.parse_args(arguments)
    model = load_model(config.model)
    connector = model.connector
    if connector.name != "comm":
        raise InputError(f"{config.model}: has the connector {connector.name}, not comm")
    print("reads ", *(f"{heading:>9}" for heading in TASKS.values()))
    print_scores("both", model, config.count)
    # What the model still reads, and the module whose output becomes constant.
    for name, module in {"CLIP": connector.dino_mlp, "DINOv2": connector.clip_merge}.items():
        hook = module.register_forward_hook(to_constant)
        print_scores(name, model, config.count)
        hook.remove()


if __name__ == "__main__":
    cli.run(main)
