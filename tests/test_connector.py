"""The connectors against plain, slow re-derivations: loops over images, tokens and layers, in float64.

The re-derivations name their layers by number (PINNED) and call nothing of connector.py. Both sides compute in
float64, so they agree to rounding: EXACT is some thousand times the 2e-16 of one operation, and far below any wrong
layer, order or weight, which moves the random outputs here by their own size.
"""
import math

import pytest
import torch

from conftest import relative_error
from connector import (ConnectorConfig, dense_groups, final_layer, layers_needed, make_connector, mean, sparse_layers,
                       visual_tokens)
from hub import InputError

EXACT = 1e-12
B, N, D, C = 2, 16, 6, 5                                             # 16 patches are a 4x4 grid, and two windows of 8
PINNED = {                                                           # blocks: final, sparse, the two dense groups
    24: (23, (7, 15), (range(0, 12), range(12, 24))),                # CLIP-L
    27: (26, (7, 15), (range(0, 13), range(13, 26))),                # SigLIP-so400m
    12: (11, (3, 7), (range(0, 6), range(6, 12))),
    6: (5, (1, 3), (range(0, 3), range(3, 6))),
}
ONE_TOWER = ("linear", "mlp", "sti", "sci", "dci", "efficient")
MERGES = ("lln", "layerscale", "mean_half", "mean_all")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(kind, towers, seed=0, **options):
    """A connector in float64 whose parameters are all random, the layer weights and LayerNorms too."""
    module = make_connector(ConnectorConfig(kind=kind, **options), towers, C).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def run(module, config, towers_hidden):
    """All L+1 hidden states of each tower -> the connector's output, given only the layers that it asks for."""
    needed = layers_needed(config, [len(hidden) - 1 for hidden in towers_hidden])
    return module([[hidden[i] for i in layers] for hidden, layers in zip(towers_hidden, needed)])


def towers_for(kind, depth=6):
    return [(depth, D, N), (depth, D + 1, N)] if kind == "comm" else [(depth, D, N)]


# ---- the slow arithmetic: one vector at a time -----------------------------------------------------------------------

def linear(state, name, x):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return torch.stack([(weight[row] * x).sum() + bias[row] for row in range(len(bias))])


def gelu(x):
    return torch.tensor([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()], dtype=torch.float64)


def layer_norm(state, name, x):
    average = x.sum() / len(x)
    variance = ((x - average) ** 2).sum() / len(x)
    return (x - average) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def two_linears(state, name, x):
    return linear(state, f"{name}.2", gelu(linear(state, f"{name}.0", x)))


def per_image(function):
    return torch.stack([torch.stack(function(b)) for b in range(B)]).detach()


@pytest.mark.parametrize("depth", PINNED)
class TestOneTower:
    @pytest.fixture
    def hidden(self, depth):
        return [random(B, N, D, seed=100 + i) for i in range(depth + 1)]

    def test_linear_and_mlp_read_the_second_to_last_hidden_state(self, depth, hidden):
        final, _, _ = PINNED[depth]
        for kind in ("linear", "mlp"):
            module = built(kind, [(depth, D, N)])
            state = module.state_dict()
            project = {"linear": linear, "mlp": two_linears}[kind]
            expected = per_image(lambda b: [project(state, "mm_projector", hidden[final][b, n]) for n in range(N)])
            assert relative_error(run(module, ConnectorConfig(kind=kind), [hidden]), expected) < EXACT

    def test_sti_appends_two_layers_averaged_over_runs_of_eight_tokens(self, depth, hidden):
        final, sparse, _ = PINNED[depth]
        module = built("sti", [(depth, D, N)])
        state = module.state_dict()

        def tokens(b):
            rows = [hidden[final][b, n] for n in range(N)]
            for layer in sparse:
                rows += [sum(hidden[layer][b, start + k] for k in range(8)) / 8 for start in range(0, N - 7, 8)]
            return [two_linears(state, "mm_projector", row) for row in rows]

        out = run(module, ConnectorConfig(kind="sti"), [hidden])
        assert out.shape == (B, 16 + 2 + 2, C)
        assert relative_error(out, per_image(tokens)) < EXACT

    def test_sci_puts_three_layers_side_by_side_the_final_first(self, depth, hidden):
        final, (first, second), _ = PINNED[depth]
        module = built("sci", [(depth, D, N)])
        state = module.state_dict()
        expected = per_image(lambda b: [two_linears(state, "mm_projector", torch.cat(
            [hidden[final][b, n], hidden[first][b, n], hidden[second][b, n]])) for n in range(N)])
        assert relative_error(run(module, ConnectorConfig(kind="sci"), [hidden]), expected) < EXACT

    @pytest.mark.parametrize("kind", ("dci", "efficient"))
    def test_dci_adds_the_means_of_the_groups_and_efficient_then_averages_squares_of_four(self, depth, hidden, kind):
        final, _, groups = PINNED[depth]
        module = built(kind, [(depth, D, N)])
        state = module.state_dict()

        def tokens(b):
            out = []
            for n in range(N):
                channels = [hidden[final][b, n]]
                for group in groups:
                    channels.append(sum(hidden[layer][b, n] for layer in group) / len(group))
                out.append(two_linears(state, "mm_projector", torch.cat(channels)))
            if kind == "dci":
                return out
            corners = [4 * (2 * row) + 2 * column for row in range(2) for column in range(2)]    # of a 4x4 grid
            return [(out[n] + out[n + 1] + out[n + 4] + out[n + 5]) / 4 for n in corners]

        out = run(module, ConnectorConfig(kind=kind), [hidden])
        assert out.shape == (B, 16 if kind == "dci" else 4, C)
        assert relative_error(out, per_image(tokens)) < EXACT


@pytest.mark.parametrize("kind", ("linear", "mlp"))
@pytest.mark.parametrize("layer", range(7))
def test_linear_and_mlp_read_the_layer_that_is_named_and_nothing_else(kind, layer):
    hidden = [random(B, N, D, seed=100 + i) for i in range(7)]
    config = ConnectorConfig(kind=kind, layer=layer)
    assert layers_needed(config, [6]) == [[layer]]
    module = built(kind, [(6, D, N)], layer=layer)
    state, project = module.state_dict(), {"linear": linear, "mlp": two_linears}[kind]
    expected = per_image(lambda b: [project(state, "mm_projector", hidden[layer][b, n]) for n in range(N)])
    assert relative_error(run(module, config, [hidden]), expected) < EXACT
    if layer == 5:                                                   # the second to last, named: the very default
        assert torch.equal(run(module, config, [hidden]), run(built(kind, [(6, D, N)]), ConnectorConfig(kind=kind), [hidden]))


def test_three_dense_groups_make_four_parts_of_channels():
    hidden = [random(B, N, D, seed=100 + i) for i in range(25)]
    config = ConnectorConfig(kind="dci", groups=3)
    module = built("dci", [(24, D, N)], groups=3)
    state = module.state_dict()

    def token(b, n):
        means = [sum(hidden[layer][b, n] for layer in range(start, start + 8)) / 8 for start in (0, 8, 16)]
        return two_linears(state, "mm_projector", torch.cat([hidden[23][b, n], *means]))

    expected = per_image(lambda b: [token(b, n) for n in range(N)])
    assert relative_error(run(module, config, [hidden]), expected) < EXACT


# COMM: CLIP of 24 blocks and DINOv2 of 12, of different widths, so that nothing can be taken for the other
CLIP_DEPTH, DINO_DEPTH, D_DINO = 24, 12, 7
COMM_LAYERS = {"lln": (range(1, 25), range(10, 13)), "layerscale": (range(1, 25), range(10, 13)),
               "mean_half": (range(13, 25), range(7, 13)), "mean_all": (range(1, 25), range(1, 13))}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("dino_depth", (0, 1, 2))
def test_comm_is_the_weighted_sum_of_the_layers_of_two_towers(merge, dino_depth):
    clip = [random(B, N, D, seed=200 + i) for i in range(CLIP_DEPTH + 1)]
    dino = [random(B, N, D_DINO, seed=300 + i) for i in range(DINO_DEPTH + 1)]
    options = dict(merge=merge, dino_depth=dino_depth, dino_expansion=3)
    module = built("comm", [(CLIP_DEPTH, D, N), (DINO_DEPTH, D_DINO, N)], **options)
    state = module.state_dict()

    def merged(name, hidden, layers, b, n):
        exponentials = [math.exp(s) for s in state.get(f"{name}.scale", torch.zeros(len(layers))).tolist()]
        total = 0
        for k, layer in enumerate(layers):
            x = hidden[layer][b, n]
            if merge == "lln":
                x = linear(state, f"{name}.linears.{k}", layer_norm(state, f"{name}.norms.{k}", x))
            total = total + exponentials[k] / sum(exponentials) * x
        return total

    def token(b, n):
        v1 = merged("clip_merge", clip, COMM_LAYERS[merge][0], b, n)
        v2 = merged("dino_merge", dino, COMM_LAYERS[merge][1], b, n)
        for k in range(dino_depth):
            v2 = two_linears(state, f"dino_mlp.{k}", v2)
        return linear(state, "mm_projector", torch.cat([v1, v2]))

    expected = per_image(lambda b: [token(b, n) for n in range(N)])
    assert relative_error(run(module, ConnectorConfig(kind="comm", **options), [clip, dino]), expected) < EXACT


@pytest.mark.parametrize("merge", MERGES)
def test_one_side_of_comm_is_its_merge_then_its_mlp_then_a_linear(merge):
    hidden = [random(B, N, D, seed=300 + i) for i in range(DINO_DEPTH + 1)]
    layers = {"comm_clip": {"mean_half": range(7, 13)}.get(merge, range(1, 13)), "comm_dino": COMM_LAYERS[merge][1]}
    for kind, depth in (("comm_clip", 0), ("comm_dino", 0), ("comm_dino", 2)):
        options, side = dict(merge=merge, dino_depth=depth), kind.removeprefix("comm_")
        module = built(kind, [(DINO_DEPTH, D, N)], **options)
        state = module.state_dict()

        def token(b, n):
            shares, total = module.layer_weights()[0].double(), 0
            for k, layer in enumerate(layers[kind]):
                x = hidden[layer][b, n]
                if merge == "lln":
                    x = linear(state, f"{side}_merge.linears.{k}", layer_norm(state, f"{side}_merge.norms.{k}", x))
                total = total + shares[k] * x
            for k in range(depth):
                total = two_linears(state, f"dino_mlp.{k}", total)
            return linear(state, "mm_projector", total)

        expected = per_image(lambda b: [token(b, n) for n in range(N)])
        tolerance = EXACT if merge in ("lln", "layerscale") else 1e-6    # the means' weights are float32
        assert relative_error(run(module, ConnectorConfig(kind=kind, **options), [hidden]), expected) < tolerance
        assert layers_needed(ConnectorConfig(kind=kind, **options), [DINO_DEPTH]) == [list(layers[kind])]


# ---- layers and tokens -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", PINNED)
def test_layer_indices_are_the_pinned_ones(depth):
    final, sparse, groups = PINNED[depth]
    assert final_layer(depth) == final
    assert sparse_layers(depth) == sparse
    assert dense_groups(depth) == list(groups)


@pytest.mark.parametrize("depth", range(4, 49))
@pytest.mark.parametrize("groups", (1, 2, 3))
def test_dense_groups_cover_the_usable_layers_once_and_evenly_at_any_depth(depth, groups):
    cut = dense_groups(depth, groups)
    assert [layer for group in cut for layer in group] == list(range(depth - depth % 2))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert 0 <= sparse_layers(depth)[0] < sparse_layers(depth)[1] < final_layer(depth)


def test_layers_needed_are_ascending_and_no_deeper_than_the_connector_reads():
    def needed(kind, *depths, **options):
        return layers_needed(ConnectorConfig(kind=kind, **options), list(depths))

    assert needed("linear", 24) == needed("mlp", 24) == [[23]]
    assert needed("sti", 24) == needed("sci", 24) == [[7, 15, 23]]
    assert needed("dci", 24) == needed("efficient", 24) == [list(range(24))]
    assert needed("sti", 27) == needed("sci", 27) == [[7, 15, 26]]
    assert needed("dci", 27) == [list(range(27))]
    assert needed("comm", 24, 24) == [list(range(1, 25)), list(range(19, 25))]
    assert needed("comm", 12, 40) == [list(range(1, 13)), list(range(31, 41))]
    assert needed("comm", 24, 24, merge="mean_half") == [list(range(13, 25))] * 2
    assert needed("comm", 24, 24, merge="mean_all") == [list(range(1, 25))] * 2


def test_576_patches_become_720_tokens_under_sti_144_under_efficient_else_576():
    tokens = {kind: visual_tokens(ConnectorConfig(kind=kind), 576) for kind in (*ONE_TOWER, "dense", "comm")}
    assert tokens == {"linear": 576, "mlp": 576, "sti": 720, "sci": 576, "dci": 576, "dense": 576, "efficient": 144,
                      "comm": 576}


@pytest.mark.parametrize("kind", (*ONE_TOWER, "dense", "comm"))
def test_forward_returns_as_many_tokens_as_visual_tokens_says(kind):
    config = ConnectorConfig(kind=kind)
    for patches in (4, 36, 64, 576):                                 # 36 is no multiple of sti's window, 4 is below it
        towers = [(depth, width, patches) for depth, width, _ in towers_for(kind)]
        module = make_connector(config, towers, C)
        out = run(module, config, [[torch.zeros(1, n, d)] * (depth + 1) for depth, d, n in towers])
        assert out.shape == (1, visual_tokens(config, patches), C)


def test_dense_is_another_name_of_dci():
    assert ConnectorConfig().kind == "dense"
    hidden = [random(B, N, D, seed=i) for i in range(25)]
    dense, dci = (run(built(kind, [(24, D, N)]), ConnectorConfig(kind=kind), [hidden]) for kind in ("dense", "dci"))
    assert torch.equal(dense, dci)


# ---- parameters ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, channels", (("mlp", D), ("sti", D), ("sci", 3 * D), ("dci", 3 * D), ("dense", 3 * D),
                                            ("efficient", 3 * D)))
def test_names_and_shapes_are_those_of_the_authors_checkpoints(kind, channels):
    shapes = {name: tuple(x.shape) for name, x in make_connector(ConnectorConfig(kind=kind), [(24, D, N)], C)
              .state_dict().items()}
    assert shapes == {"mm_projector.0.weight": (C, channels), "mm_projector.0.bias": (C,),
                      "mm_projector.2.weight": (C, C), "mm_projector.2.bias": (C,)}


def test_the_linear_connector_has_llavas_two_names():
    module = make_connector(ConnectorConfig(kind="linear"), [(24, D, N)], C)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {"mm_projector.weight": (C, D),
                                                                                 "mm_projector.bias": (C,)}


@pytest.mark.parametrize("merge", MERGES)
def test_comms_layer_weights_sum_to_one_and_start_uniform(merge):
    module = make_connector(ConnectorConfig(kind="comm", merge=merge), [(24, D, N), (24, D, N)], C)
    needed = layers_needed(ConnectorConfig(kind="comm", merge=merge), [24, 24])
    for weights, layers in zip(module.layer_weights(), needed):
        assert weights.shape == (len(layers),)
        torch.testing.assert_close(weights, torch.full((len(layers),), 1 / len(layers)))
    random_weights = built("comm", [(24, D, N), (24, D, N)], merge=merge).layer_weights()
    for weights in random_weights:
        assert abs(weights.sum().item() - 1) < 1e-6                  # the means' weights are float32
        assert (weights > 0).all()


@pytest.mark.parametrize("options", [{"kind": kind} for kind in (*ONE_TOWER, "comm", "comm_clip", "comm_dino")]
                         + [{"kind": "comm", "merge": merge} for merge in MERGES] + [{"kind": "comm", "dino_depth": 0}])
def test_gradients_reach_every_parameter_and_every_layer_that_was_asked_for(options):
    config, towers = ConnectorConfig(**options), towers_for(options["kind"])
    module = built(towers=towers, **options)
    hidden = [[random(B, N, d, seed=i).requires_grad_() for i in range(depth + 1)] for depth, d, _ in towers]
    (run(module, config, hidden) * random(1, 1, C, seed=9)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for states, layers in zip(hidden, layers_needed(config, [depth for depth, _, _ in towers])):
        assert [i for i, x in enumerate(states) if x.grad is not None and x.grad.abs().sum() > 0] == layers


# ---- low precision ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{"kind": kind} for kind in ONE_TOWER] + [{"kind": "comm", "merge": merge}
                                                                              for merge in MERGES])
def test_bfloat16_weights_and_autocast_stay_near_float64(options):
    """bfloat16 keeps 8 bits: 0.4% a rounding; a few roundings in a row, averaged over channels, stay below 2%."""
    config, towers = ConnectorConfig(**options), towers_for(options["kind"], depth=24)
    module = make_connector(config, towers, C)
    hidden = [[random(B, N, d, seed=i) for i in range(depth + 1)] for depth, d, _ in towers]
    expected = run(module.double(), config, hidden)
    half = [[x.bfloat16() for x in states] for states in hidden]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = run(module.float(), config, half)
    assert relative_error(under_autocast, expected) < 0.02
    in_bfloat16 = run(module.bfloat16(), config, half)
    assert in_bfloat16.dtype == torch.bfloat16
    assert relative_error(in_bfloat16, expected) < 0.02


def test_the_mean_of_bfloat16_layers_is_rounded_once():
    """The nearest bfloat16 lies within 2^-8 of a number, relative. A sum in bfloat16 errs more than twice as much."""
    layers = [(1 + random(B, N, D, seed=i).abs()).bfloat16() for i in range(12)]
    exact = sum(layer.double() for layer in layers) / 12
    errors = ((mean(layers).double() - exact) / exact).abs()
    assert errors.max() <= 2 ** -8 * (1 + 1e-4)                      # 1e-4: the float32 sum itself, which comes first
    assert ((sum(layers) / 12 - exact) / exact).abs().max() > 2 ** -7


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", (*ONE_TOWER, "dense"))
def test_a_connector_of_one_tower_refuses_none_and_two(kind):
    for towers in ([], [(24, D, N), (24, D, N)]):
        with pytest.raises(InputError, match=f"{kind} reads one tower, it was given {len(towers)}"):
            make_connector(ConnectorConfig(kind=kind), towers, C)


def test_comm_refuses_one_tower_and_three():
    for towers in ([(24, D, N)], [(24, D, N)] * 3):
        with pytest.raises(InputError, match=f"CLIP and then DINOv2; it was given {len(towers)}"):
            make_connector(ConnectorConfig(kind="comm"), towers, C)


def test_comm_refuses_towers_whose_grids_differ_and_names_both():
    with pytest.raises(InputError, match=r"CLIP gives 24x24 \(576 patches\), DINOv2 16x16 \(256 patches\)"):
        make_connector(ConnectorConfig(kind="comm"), [(24, D, 576), (24, D, 256)], C)


@pytest.mark.parametrize("patches, pictured", ((729, r"27x27 \(729 patches\)"), (50, "50 patches")))
def test_efficient_refuses_a_grid_that_has_no_half(patches, pictured):
    with pytest.raises(InputError, match=f"square with an even side: this tower gives {pictured}"):
        make_connector(ConnectorConfig(kind="efficient"), [(24, D, patches)], C)


def test_an_unknown_kind_or_merge_is_an_error_that_names_the_nearest():
    with pytest.raises(InputError, match="kind 'dense_channel' is unknown, nearest 'dense'"):
        ConnectorConfig(kind="dense_channel")
    with pytest.raises(InputError, match="kind 'com' is unknown, nearest 'comm'"):
        ConnectorConfig(kind="com")
    with pytest.raises(InputError, match="merge 'layer_scale' is unknown, nearest 'layerscale'"):
        ConnectorConfig(kind="comm", merge="layer_scale")


def test_a_layer_that_is_not_there_or_that_the_kind_does_not_read_is_one_line():
    for layer in (-1, 7):
        with pytest.raises(InputError, match=rf"^connector layer is {layer}, a tower of 6 blocks has hidden\[0\] to hidden\[6\]$"):
            make_connector(ConnectorConfig(kind="mlp", layer=layer), [(6, D, N)], C)
    for kind in ("dense", "sti", "comm", "comm_dino"):
        with pytest.raises(InputError, match=f"^connector layer is 3, but only linear and mlp read a single layer, not {kind}$"):
            ConnectorConfig(kind=kind, layer=3)


def test_towers_too_shallow_and_counts_below_the_least_are_errors():
    with pytest.raises(InputError, match="at least 4 blocks, this one has 3"):
        make_connector(ConnectorConfig(kind="sti"), [(3, D, N)], C)
    with pytest.raises(InputError, match="groups is 7, a tower of 6 blocks has 6 layers"):
        make_connector(ConnectorConfig(kind="dci", groups=7), [(6, D, N)], C)
    for option in ({"groups": 0}, {"dino_depth": -1}, {"dino_expansion": 0}):
        with pytest.raises(InputError, match=f"connector {next(iter(option))} is"):
            ConnectorConfig(**option)
