"""Measure how much of a tower's variance is the place of a patch, and what whitening changes.

    python runs/places.py weights/clip weights/dinov2        a table for each of these towers
    python runs/places.py weights/dinov2 --train=dense       train mlp or dense, and score it
    python runs/places.py weights/dinov2 --train=dense --whiten

The table has the share of the variance that is linear in the row and the column of the patch: for
each hidden state, and for the channels that the connectors mlp and dense read, with linear probes.
Whitening decorrelates the channels and scales each to variance one. The dense connector's groups
are whitened one by one, on 600 training scenes.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as scoring  # noqa: E402
import train  # noqa: E402
from connector import CONNECTORS  # noqa: E402
from mllm import MLLM, TOWERS, load_part  # noqa: E402
from toy import world  # noqa: E402
from toy.pretrain import probe_scores  # noqa: E402
from toy.scenes import task_questions  # noqa: E402
from toy.views import GRID, pixels_of  # noqa: E402

SCENES, QUESTIONS = 600, 400
BUDGET = ["--steps1=60", "--steps2=240", "--evaluate=false"]


def patches_of(tower):
    """Return a tower's hidden states on training scenes, each (SCENES, N, D)."""
    pixels = pixels_of([(index, world.scene("train", index)) for index in range(SCENES)])
    return [x[:, tower.num_prefix_tokens :] for x in tower(pixels)]


class Inputs:
    """Stands in for a tower. Its two hidden states are what the connectors mlp and dense read."""

    def __init__(self, tower):
        self.tower, self.num_prefix_tokens = tower, tower.num_prefix_tokens

    def __call__(self, pixels):
        hidden = torch.stack(self.tower(pixels))
        L = len(hidden) - 1
        means = [hidden[: L // 2].mean(0), hidden[L // 2 : L].mean(0)]
        return hidden[L - 1], torch.cat([hidden[L - 1], *means], dim=-1)


def share_of_places(x):
    """Return the share of the variance of x (B, N, D) that is linear in row and column."""
    x = x.double()
    x = x - x.mean((0, 1))
    along = torch.arange(GRID).double() - (GRID - 1) / 2
    places = torch.cartesian_prod(along, along)  # (N, 2)
    # The two columns are orthogonal and of one length, so this is the least-squares fit.
    fit = places @ (places.T @ x.mean(0)) / places[:, 0].square().sum()
    return (fit.square().mean() / x.square().mean()).item()


def whitening(x):
    """Return the mean (D,) and the matrix (D, D) that whiten x (B, N, D)."""
    x = x.flatten(0, 1).double()
    mean = x.mean(0)
    x = x - mean
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    # Directions of hardly any variance are noise.
    scale = (variance + 1e-3 * variance.mean()).rsqrt()
    return mean.float(), (directions * scale).float()


def whiten_inputs(cls, hidden, layers):
    """Let a connector of one tower see whitened layers."""
    fits = []
    for layer in layers:
        group = [layer] if isinstance(layer, int) else layer
        fits.append(whitening(sum(hidden[i] for i in group) / len(group)))
    plain = cls.forward

    def forward(self, hidden):
        pairs = zip(hidden[0], fits, strict=True)
        return plain(self, [[(x - mean) @ matrix for x, (mean, matrix) in pairs]])

    cls.forward = forward


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("towers", nargs="+")
    parser.add_argument("--train", choices=["mlp", "dense"])
    parser.add_argument("--whiten", action="store_true")
    parser.add_argument("--seed", default=0)
    options = parser.parse_args()
    if options.train and len(options.towers) > 1:
        parser.error("--train takes one tower")
    for folder in options.towers:
        with torch.no_grad():
            tower = load_part(TOWERS, folder)
            hidden = patches_of(tower)
            read = patches_of(Inputs(tower))
            probes = probe_scores(Inputs(tower)).values()
        shares = [f"{share_of_places(x):.1%}" for x in hidden]
        print(f"{folder}: {' '.join(shares)} of the variance of hidden[0], [1], ... are places")
        for name, x, scores in zip(("mlp", "dense"), read, probes, strict=True):
            print(f"  channels of {name}: {share_of_places(x):.1%}, probe {scores}")
        if not options.train:
            continue
        if options.whiten:
            L = len(hidden) - 1
            layers = {"mlp": [L - 1], "dense": [L - 1, range(0, L // 2), range(L // 2, L)]}
            whiten_inputs(CONNECTORS[options.train], hidden, layers[options.train])
        kind = "whitened" if options.whiten else "plain"
        out = f"out/places/{Path(folder).name}-{options.train}-{kind}-{options.seed}"
        arm = [f"--connector={options.train}", f"--vision={folder}", f"--seed={options.seed}"]
        train.main([*BUDGET, *arm, f"--out={out}"])
        model = MLLM.from_pretrained(f"{out}/model")
        for task in ("rec", "reg", "presence"):
            images, texts, targets = task_questions(task, QUESTIONS)
            answers = scoring.answer(model, images, texts, 50)
            print(task, scoring.score(task, answers, targets))


if __name__ == "__main__":
    main()
