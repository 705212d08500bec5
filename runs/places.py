"""Measure how much of a tower's variance is the place of a patch, layer by layer.

    python runs/places.py weights/clip weights/dinov2

It prints the share of the variance that is linear in the row and the column of the patch, and the
standard deviation, of each hidden state on 600 training scenes. The same share and linear probes
follow for the channels that the connectors mlp and dense read.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from connector import dense_layers  # noqa: E402
from mllm import TOWERS, load_part  # noqa: E402
from toy import pretrain, world  # noqa: E402
from toy.views import GRID, pixels_of  # noqa: E402

SCENES = 600


def patches_of(tower):
    """Return a tower's hidden states on training scenes, each (SCENES, N, D)."""
    pixels = pixels_of([(index, world.scene("train", index)) for index in range(SCENES)])
    return [x[:, tower.num_prefix_tokens :] for x in tower(pixels)]


class Channels:
    """Stands in for a tower. Its two hidden states are what the connectors mlp and dense read."""

    def __init__(self, tower):
        self.tower, self.num_prefix_tokens = tower, tower.num_prefix_tokens

    def __call__(self, pixels):
        hidden = self.tower(pixels)
        L = len(hidden) - 1
        last, *groups = dense_layers(L)
        means = [sum(hidden[i] for i in layers) / len(layers) for layers in groups]
        return [hidden[last], torch.cat([hidden[last], *means], dim=-1)]


def share_of_places(x):
    """Return the share of the variance of x (B, N, D) that is linear in row and column."""
    x = x.double()
    x = x - x.mean((0, 1))
    along = torch.arange(GRID).double() - (GRID - 1) / 2
    places = torch.cartesian_prod(along, along)  # (N, 2)
    # The two columns are orthogonal and of one length, so this is the least-squares fit.
    fit = places @ (places.T @ x.mean(0)) / places[:, 0].square().sum()
    return (fit.square().mean() / x.square().mean()).item()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("towers", nargs="+")
    for folder in parser.parse_args().towers:
        tower = load_part(TOWERS, folder)
        hidden, read = patches_of(tower), Channels(tower)
        shares = [f"{share_of_places(x):.1%}" for x in hidden]
        print(f"{folder}: {' '.join(shares)} of the variance of hidden[0], [1], ... are places")
        sizes = [f"{(x - x.mean((0, 1))).std():.1f}" for x in hidden]
        print(f"  standard deviations: {' '.join(sizes)}")
        probes = pretrain.probe_scores(read).values()
        for name, x, scores in zip(("mlp", "dense"), patches_of(read), probes, strict=True):
            print(f"  channels of {name}: {share_of_places(x):.1%}, probe {scores}")


if __name__ == "__main__":
    main()
