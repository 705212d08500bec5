"""Measure how much of a tower's variance is the place of a patch, and what whitening changes.

    python runs/places.py weights/clip weights/dinov2        a table for each of these towers
    python runs/places.py weights/dinov2 --train=dense       train mlp or dense, and score it
    python runs/places.py weights/dinov2 --train=dense --whiten
    python runs/places.py weights/clip --forget=450 --to=out/forget       continue without places
    python runs/places.py out/forget --forget=300 --positions=2 --to=out/louder

The table has the share of the variance that is linear in the row and the column of the patch: for
each hidden state, and for the channels that the connectors mlp and dense read, with linear probes.
Whitening decorrelates the channels and scales each to variance one. The dense connector's groups
are whitened one by one, on 600 training scenes. --forget trains a CLIP for some steps on captions
that do not say where things are; --positions first multiplies its position embeddings.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as scoring  # noqa: E402
import train  # noqa: E402
from clip import CLIP  # noqa: E402
from connector import CONNECTORS, dense_layers  # noqa: E402
from mllm import MLLM, TOWERS, load_part  # noqa: E402
from toy import pretrain, world  # noqa: E402
from toy.scenes import task_questions  # noqa: E402
from toy.views import GRID, pixels_of  # noqa: E402

SCENES, QUESTIONS = 600, 400
BUDGET = ["--steps1=60", "--steps2=240", "--evaluate=false"]


def patches_of(tower):
    """Return a tower's hidden states on training scenes, each (SCENES, N, D)."""
    pixels = pixels_of([(index, world.scene("train", index)) for index in range(SCENES)])
    return [x[:, tower.num_prefix_tokens :] for x in tower(pixels)]


def read(name, hidden):
    """Return what the connector mlp or dense reads: layers, or means over several."""
    L = len(hidden) - 1
    groups = []
    for layer in dense_layers(L) if name == "dense" else [L - 1]:
        layers = [layer] if isinstance(layer, int) else layer
        groups.append(sum(hidden[i] for i in layers) / len(layers))
    return groups


class Inputs:
    """Stands in for a tower. Its two hidden states are what the connectors mlp and dense read."""

    def __init__(self, tower):
        self.tower, self.num_prefix_tokens = tower, tower.num_prefix_tokens

    def __call__(self, pixels):
        hidden = self.tower(pixels)
        return [torch.cat(read(name, hidden), dim=-1) for name in ("mlp", "dense")]


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


def whiten_inputs(name, hidden):
    """Let the connector mlp or dense see whitened layers."""
    cls, fits = CONNECTORS[name], [whitening(group) for group in read(name, hidden)]
    plain = cls.forward

    def forward(self, hidden):
        pairs = zip(hidden[0], fits, strict=True)
        return plain(self, [[(x - mean) @ matrix for x, (mean, matrix) in pairs]])

    cls.forward = forward


def name_some(objects, rng):
    """Write toy.language.clip_caption without the places."""
    chosen = rng.permutation(len(objects))[: rng.integers(1, 4)]
    return " and ".join(f"a {objects[i].name}" for i in chosen)


def forget_places(folder, to, steps, positions):
    """Continue a CLIP on captions without places."""
    torch.manual_seed(0)
    clip = CLIP.from_pretrained(folder)
    clip.vision.position_embedding.data.mul_(positions)
    config = pretrain.Config(steps=steps, batch=128, seed=5)

    def loss_of(step):
        return pretrain.caption_loss(clip, pretrain.scenes_of(config, step, 0, 0), name_some)

    pretrain.train(clip, loss_of, config, adamw=0.25)
    pretrain.save(clip, Path(to))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("towers", nargs="+")
    parser.add_argument("--train", choices=["mlp", "dense"])
    parser.add_argument("--whiten", action="store_true")
    parser.add_argument("--seed", default=0)
    parser.add_argument("--forget", type=int, metavar="STEPS")
    parser.add_argument("--positions", type=float, default=1)
    parser.add_argument("--to", metavar="FOLDER")
    options = parser.parse_args()
    if options.train and len(options.towers) > 1:
        parser.error("--train takes one tower")
    if options.forget:
        if not options.to:
            parser.error("--forget needs --to")
        return forget_places(options.towers[0], options.to, options.forget, options.positions)
    for folder in options.towers:
        with torch.no_grad():
            tower = load_part(TOWERS, folder)
            hidden = patches_of(tower)
            channels = patches_of(Inputs(tower))
            probes = pretrain.probe_scores(Inputs(tower)).values()
        shares = [f"{share_of_places(x):.1%}" for x in hidden]
        print(f"{folder}: {' '.join(shares)} of the variance of hidden[0], [1], ... are places")
        sizes = [f"{(x - x.mean((0, 1))).std():.1f}" for x in hidden]
        print(f"  standard deviations: {' '.join(sizes)}")
        for name, x, scores in zip(("mlp", "dense"), channels, probes, strict=True):
            print(f"  channels of {name}: {share_of_places(x):.1%}, probe {scores}")
        if not options.train:
            continue
        if options.whiten:
            whiten_inputs(options.train, hidden)
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
