"""Show what each tower gives to a COMM model: replace one side of its merge by a constant.

    python train.py --connector=comm --evaluate=false
    python runs/sides.py out/comm/model 1000        the number of questions of each task

The constant is the mean of the side's vectors over the patches of 50 images. So what the model
still answers right, it reads from the other tower. Prints percents, a row for the whole model and
one for each tower alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import answer, score  # noqa: E402
from interop.load import load_model  # noqa: E402
from toy.findings import TASKS  # noqa: E402
from toy.scenes import task_questions  # noqa: E402


def to_constant(module, inputs, output):
    """Replace vectors (B, N, D) by their mean. A forward hook returns the new output."""
    return output.mean((0, 1)).expand_as(output)


folder, count = sys.argv[1], int(sys.argv[2])
model = load_model(folder)
# What the model reads, and the module whose output becomes constant.
replaced = {"both": None, "CLIP": model.connector.dino_mlp, "DINOv2": model.connector.clip_merge}
print("reads ", *(f"{heading:>9}" for heading in TASKS.values()))
for name, module in replaced.items():
    hook = module and module.register_forward_hook(to_constant)
    scores = []
    for task in TASKS:
        images, texts, targets = task_questions(task, count)
        first, *_ = score(task, answer(model, images, texts, 50), targets).values()
        scores.append(f"{first:9.1%}")
    print(f"{name:6}", *scores, flush=True)
    if hook:
        hook.remove()
