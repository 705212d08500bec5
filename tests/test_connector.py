"""The connectors against slow re-derivations in float64, layer by layer.

The re-derivations name their layers by number (PINNED) and call nothing of connector.py. EXACT is a
thousand times the rounding of float64 and far below the effect of a wrong layer, order or weight.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, relative_error

from connector import CONNECTORS, MERGES, Tower, make_connector

EXACT = 1e-12
# 16 patches are a 4 x 4 grid, and two windows of 8.
B, N, D, C = 2, 16, 6, 5
# depth of the tower -> final layer, sparse layers, two dense groups, DINOv2's last quarter
PINNED = {
    24: (23, (7, 15), (range(0, 12), range(12, 24)), range(19, 25)),
    27: (26, (7, 15), (range(0, 13), range(13, 26)), range(21, 28)),
    12: (11, (3, 7), (range(0, 6), range(6, 12)), range(10, 13)),
    6: (5, (1, 3), (range(0, 3), range(3, 6)), range(5, 7)),
}
# test_mini_gemini.py has mgm
EVERY = [{"name": name} for name in CONNECTORS if name not in ("dci", "mgm")]
EVERY += [{"name": "comm", "merge": merge} for merge in list(MERGES)[1:]]
EVERY += [{"name": "dense", "groups": 3}, {"name": "mlp", "layer": 2}]


def random_connector(spec, depth=6):
    """Build a connector in float64 with random parameters -> (module, all hidden states)."""
    towers = [Tower(depth, D, N), Tower(depth, D + 1, N)][: 1 + (spec["name"] == "comm")]
    module = make_connector(spec, towers, C).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    hidden = []
    for tower in towers:
        shape = (tower.depth + 1, B, tower.num_patches, tower.width)
        hidden.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return module, hidden


def run(module, hidden):
    """Call a connector on the layers that it reads; a range is the mean over its layers."""
    read = []
    for states, layers in zip(hidden, module.layers, strict=True):
        read.append([states[list(x)].mean(0) if type(x) is range else states[x] for x in layers])
    return module(read)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def two_linears(state, name, x):
    return linear(state, f"{name}.2", F.gelu(linear(state, f"{name}.0", x)))


def layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def conv_and_norm(state, name, x):
    """A 3 x 3 convolution over the grid of 4 x 4 patches, then BatchNorm with batch statistics."""
    (conv, norm) = [[state[f"{name}.{i}.{key}"] for key in ("weight", "bias")] for i in (0, 1)]
    x = F.conv2d(x.mT.reshape(B, -1, 4, 4), *conv, padding=1)
    return F.batch_norm(x, None, None, *norm, training=True).flatten(2).mT


def by_hand_dense(spec, module, hidden, pinned):
    """hidden: (L + 1, B, N, D)."""
    name, (final, sparse, groups, _) = spec["name"], pinned
    if spec.get("groups") == 3:
        groups = [range(0, 2), range(2, 4), range(4, 6)]
    x = hidden[spec.get("layer", final)]
    if name == "sti":
        windows = [hidden[layer, :, s : s + 8] for layer in sparse for s in (0, 8)]
        x = torch.cat([x, *(window.mean(1, keepdim=True) for window in windows)], dim=1)
    if name == "sci":
        x = torch.cat([x, *(hidden[layer] for layer in sparse)], dim=2)
    if name in ("dense", "efficient"):
        means = [sum(hidden[layer] for layer in group) / len(group) for group in groups]
        x = torch.cat([x, *means], dim=2)
    project = linear if name == "linear" else two_linears
    tokens = project(module.state_dict(), "mm_projector", x)
    if name == "efficient":
        windows = [(n, n + 1, n + 4, n + 5) for n in (0, 2, 8, 10)]
        tokens = torch.stack([sum(tokens[:, n] for n in window) / 4 for window in windows], dim=1)
    return tokens


def by_hand_comm(spec, module, hidden, pinned):
    state, merge = module.state_dict(), spec.get("merge", "lln")
    sides = {"comm": "clip dino", "comm_clip": "clip", "comm_dino": "dino"}[spec["name"]].split()
    parts = []
    for side, states in zip(sides, hidden, strict=True):
        depth = len(states) - 1
        layers = pinned[3] if side == "dino" else range(1, depth + 1)
        layers = {"mean_half": range(depth // 2 + 1, depth + 1)}.get(merge, layers)
        layers = {"mean_all": range(1, depth + 1)}.get(merge, layers)
        weights = [1 / len(layers)] * len(layers)
        if "mean" not in merge:
            raw = [math.exp(v) for v in state[f"{side}_merge.scale"].tolist()]
            weights = [v / sum(raw) for v in raw]
        merged = 0
        for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
            x = states[layer]
            if merge == "lln":
                x = layer_norm(state, f"{side}_merge.align.{i}.0", x)
                x = linear(state, f"{side}_merge.align.{i}.1", x)
            if merge == "conv":
                x = conv_and_norm(state, f"{side}_merge.align.{i}", x)
            merged = merged + weight * x
        if side == "dino":
            merged = two_linears(state, "dino_mlp.0", merged)
            merged = two_linears(state, "dino_mlp.1", merged)
        parts.append(merged)
    return linear(state, "mm_projector", torch.cat(parts, dim=2))


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_every_connector_equals_its_slow_derivation_which_bfloat16_hardly_changes(spec):
    for depth, pinned in PINNED.items():
        if len(spec) > 1 and depth != 6:
            continue
        module, hidden = random_connector(spec, depth)
        out = run(module, hidden)
        if spec["name"].startswith("comm"):
            expected = by_hand_comm(spec, module, hidden, pinned)
        else:
            expected = by_hand_dense(spec, module, hidden[0], pinned)
        assert out.shape == (B, module.num_tokens, C)
        assert relative_error(out, expected) < EXACT
    hidden = [states.bfloat16() for states in hidden]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(run(module.float(), hidden), expected) < 0.03
    assert relative_error(run(module.bfloat16(), hidden), expected) < 0.03


def test_token_counts_are_those_of_the_papers():
    for name, number in {"mlp": 576, "sti": 720, "sci": 576, "dci": 576, "efficient": 144}.items():
        assert make_connector(name, [Tower(24, 8, 576)], 4).num_tokens == number
    assert make_connector("dci", [Tower(24, 8, 576)], 4).spec()["name"] == "dense"


def test_what_does_not_fit_is_one_line():
    one, two = [Tower(6, D, N)], [Tower(6, D, N)] * 2
    convnext = Tower(4, D, 9 * N, "convnext")
    for spec, towers in (
        ("dense", two),
        ("comm", one),
        ("comm", [Tower(6, D, N), Tower(6, D, 25)]),
        ("comm", [Tower(6, D, N, "dinov2"), Tower(6, D, N, "clip")]),
        ("efficient", [Tower(6, D, 24)]),
        ("mgm", two),
        ("mgm", [*one, convnext]),
        ("mgm", [Tower(6, D, N, "clip_vision_model"), convnext._replace(num_patches=100)]),
        ({"name": "mgm", "hd": True}, [Tower(6, D, N, "clip_vision_model"), convnext]),
        ({"name": "comm", "merge": "sum"}, two),
        ({"name": "dense", "groups": 7}, one),
    ):
        with refused():
            make_connector(spec, towers, C)
