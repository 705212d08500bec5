"""The connector: hidden states of the vision towers go in, tokens for the LLM come out.

A vision tower has read the image; its patch tokens are D wide. The LLM reads tokens that are C wide. Something has to
stand between them, and the two papers taught here ask the same question about it: why look at one layer only? A tower's
shallow layers know where things are and what they look like, its deep layers know what they are.

  Dense Connector (Yao et al. 2024, arXiv 2405.13800): three ways to hand the LLM several layers of one tower:
  as more tokens (sti), as more channels (sci), or as more channels out of *every* layer (dci); and a variant with a
  quarter of the tokens (efficient). None has parameters of its own: all of them only feed LLaVA's MLP.
  COMM (Jiang et al. 2023, arXiv 2310.08825): learn how much of each layer to take, and take them from two towers,
  CLIP (it knows words) and DINOv2 (it never saw a word, and locates better).

Both stand beside the two plain connectors that they are compared with, those of LLaVA (linear) and LLaVA-1.5 (mlp).

    image ──► tower ──► hidden[0] ... hidden[L], each (B, N, D) ──► gather ──► project ──► (B, N_out, C) ──► LLM

  kind         towers  hidden states read, at 24 blocks  channels into the projector  tokens N_out   of N = 576
  linear       1       23, or what `layer` names         D                            N              576
  mlp          1       23, or what `layer` names         D                            N              576
  sti          1       7, 15, 23                         D                            N + 2·(N // 8) 720
  sci          1       7, 15, 23                         3D                           N              576
  dci (dense)  1       0 .. 23                           D + groups·D = 3D            N              576
  efficient    1       0 .. 23                           3D                           N / 4          144
  comm         2       CLIP 1 .. 24, DINOv2 19 .. 24     D_clip + D_dino              N              576
  comm_clip    1       1 .. 24                           D                            N              576
  comm_dino    1       19 .. 24                          D                            N              576

hidden[i] is the output of block i, hidden[0] what enters the first block. Connectors see patch tokens only: class token
and registers are dropped before. Letters: B batch, N patches, D width of a tower, C width of the LLM, L blocks.

The authors' checkpoints load as they are, since names and shapes are LLaVA's: `mm_projector.weight` for linear,
`mm_projector.0.weight` and `mm_projector.2.weight` for the MLP of the others. Weights start as PyTorch starts any
Linear; LLaVA does the same, and COMM's paper does not say.
"""
import difflib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from hub import InputError

KINDS = ("linear", "mlp", "sti", "sci", "dci", "dense", "efficient", "comm", "comm_clip", "comm_dino")  # dense is dci
SIDES = {"comm": ("clip", "dino"), "comm_clip": ("clip",), "comm_dino": ("dino",)}    # comm's ablation: one side alone
MERGES = ("lln", "layerscale", "mean_half", "mean_all")


@dataclass
class ConnectorConfig:
    kind: str = "dense"      # linear | mlp | sti | sci | dci (alias dense) | efficient | comm | comm_clip | comm_dino
    groups: int = 2          # dci, efficient: dense groups that the layers are cut into; 2 is the paper's choice
    merge: str = "lln"       # comm: lln (each layer its LayerNorm, Linear, weight) | layerscale | mean_half | mean_all
    dino_depth: int = 2      # comm: MLPs in a row on DINOv2's side; 2 is the ablation's best, 0 leaves the Linear alone
    dino_expansion: int = 4  # comm: the hidden width of these MLPs, in widths of DINOv2
    layer: int | None = None  # linear, mlp: the hidden state that is read, 0 .. L; none: LLaVA's, the second to last

    def __post_init__(self):
        for name, value, choices in (("kind", self.kind, KINDS), ("merge", self.merge, MERGES)):
            if value not in choices:
                nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)[0]
                raise InputError(f"connector {name} {value!r} is unknown, nearest {nearest!r} ({', '.join(choices)})")
        for name, least in (("groups", 1), ("dino_depth", 0), ("dino_expansion", 1)):
            if getattr(self, name) < least:
                raise InputError(f"connector {name} is {getattr(self, name)}, the least is {least}")
        if self.layer is not None and self.kind not in ("linear", "mlp"):
            raise InputError(f"connector layer is {self.layer}, but only linear and mlp read a single layer, not {self.kind}")


class TowerShape(NamedTuple):
    """What a connector has to know of a vision tower."""
    num_hidden_layers: int   # L
    hidden_size: int         # D
    num_patches: int         # N


# ---- Which layers: pure functions from a tower's depth L to indices into its hidden states ---------------------------

def final_layer(L):
    """LLaVA's second to last layer; CLIP's loss never reached the patch tokens of the last. 24 -> 23, 27 -> 26."""
    return L - 1


def single_layer(config, L):
    """The one layer that linear and mlp read: `layer`, else LLaVA's."""
    if config.layer is None:
        return final_layer(L)
    if not 0 <= config.layer <= L:
        raise InputError(f"connector layer is {config.layer}, a tower of {L} blocks has hidden[0] to hidden[{L}]")
    return config.layer


def usable_layers(L):
    """How many of hidden[0], hidden[1], ... the Dense Connector divides: L, or L-1 for a tower of odd depth, whose last
    block is dropped so that the halves are equal. 24 -> 24 and, as the authors do with SigLIP, 27 -> 26."""
    return L - L % 2


def sparse_layers(L):
    """The last layer of the first and of the second third, where a third is that of the usable layers, rounded down:
    L/3-1 and 2L/3-1. 24 -> 7, 15; 12 -> 3, 7; 6 -> 1, 3; and SigLIP's 27, of which 26 are usable -> 7, 15."""
    third = usable_layers(L) // 3
    if third == 0:
        raise InputError(f"connectors sti and sci need a tower of at least 4 blocks, this one has {L}")
    return third - 1, 2 * third - 1


def dense_groups(L, groups=2):
    """The usable layers cut into `groups` runs of neighbours. 24 -> 0..11 and 12..23; 27 -> 0..12 and 13..25."""
    usable = usable_layers(L)
    if groups > usable:
        raise InputError(f"connector groups is {groups}, a tower of {L} blocks has {usable} layers to put in groups")
    cuts = [g * usable // groups for g in range(groups + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:])]


def merged_layers(merge, clip_depth, dino_depth):
    """What COMM merges: every block of CLIP, and of DINOv2 the last quarter (24 -> 19..24), for its shallow layers did
    harm (section 3). The ablation's two means name their own layers, here the same for both towers."""
    if merge == "mean_half":
        return [range(L // 2 + 1, L + 1) for L in (clip_depth, dino_depth)]      # 24 -> 13..24
    if merge == "mean_all":
        return [range(1, L + 1) for L in (clip_depth, dino_depth)]
    return [range(1, clip_depth + 1), range(3 * dino_depth // 4 + 1, dino_depth + 1)]


def layers_needed(config, depths):
    """Depths L, one a tower -> for each tower the hidden indices that its connector reads, ascending.
    No block beyond the deepest has to run. In this order the hidden states go into the connector's forward. Raises InputError."""
    if config.kind == "comm":
        if len(depths) != 2:
            raise InputError(f"connector comm reads two towers, CLIP and then DINOv2; it was given {len(depths)}")
        return [list(layers) for layers in merged_layers(config.merge, *depths)]
    if len(depths) != 1:
        raise InputError(f"connector {config.kind} reads one tower, it was given {len(depths)} (comm reads two)")
    (L,) = depths
    if config.kind in ("linear", "mlp"):
        return [[single_layer(config, L)]]
    if config.kind in SIDES:
        clip, dino = merged_layers(config.merge, L, L)
        return [list(clip if config.kind == "comm_clip" else dino)]
    if config.kind in ("sti", "sci"):
        return [[*sparse_layers(L), final_layer(L)]]
    return [sorted({final_layer(L)}.union(*dense_groups(L, config.groups)))]


def layers_asked(config, depths):
    """As layers_needed, but dci's and efficient's groups as ranges: a tower sums such a mean up while it runs (vit.run_blocks),
    so that the memory of the hidden states does not grow with its depth. 24 -> [23, range(0, 12), range(12, 24)]."""
    if config.kind not in ("dci", "dense", "efficient"):
        return layers_needed(config, depths)
    return [[final_layer(L), *dense_groups(L, config.groups)] for L in depths]


# ---- How many tokens -------------------------------------------------------------------------------------------------

def grid(N):
    """A count of patches as a person pictures it: 576 -> "24x24 (576 patches)"."""
    side = math.isqrt(N)
    return f"{side}x{side} ({N} patches)" if side * side == N else f"{N} patches"


def half_side(N):
    """Half the side of a square grid of N patches: 576 -> 12."""
    side = math.isqrt(N)
    if side * side != N or side % 2:
        raise InputError(f"connector efficient halves the side of the grid, which must be square with an even side: "
                         f"this tower gives {grid(N)}; change the resolution or the connector")
    return side // 2


def visual_tokens(config, N):
    """How many tokens the LLM sees for an image of N patches."""
    if config.kind == "sti":
        return N + 2 * (N // 8)
    return half_side(N) ** 2 if config.kind == "efficient" else N


# ---- How layers become one input: pure functions over `hidden`, {hidden index: (B, N, D)} ----------------------------

def running_sum(terms):
    """The sum of an iterable of (B, N, D), one term at a time: a stack of 24 layers is never built. It runs in float32
    at least, and stays there, for in bfloat16 each addition would lose bits of a sum that grows."""
    terms = iter(terms)
    first = next(terms)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for term in terms:
        total += term
    return total


def mean(layers):
    """A list of layers, (B, N, D) each -> their mean (B, N, D)."""
    return (running_sum(layers) / len(layers)).to(layers[0].dtype)


def sparse_tokens(hidden, L):
    """sti, "Sparse Token Integration": more tokens. Two shallower layers, averaged over runs of 8 tokens (window 8 and
    stride 8 in reading order, not squares of the grid), stand after the final layer's tokens.
    -> (B, N + 2·(N // 8), D); N = 576: 576 + 72 + 72 = 720 tokens."""
    def pooled(x):                                                       # (B, N, D) -> (B, N // 8, D)
        B, N, D = x.shape
        return x[:, :N // 8 * 8].reshape(B, N // 8, 8, D).mean(dim=2)
    return torch.cat([hidden[final_layer(L)], *(pooled(hidden[i]) for i in sparse_layers(L))], dim=1)


def sparse_channels(hidden, L):
    """sci, "Sparse Channel Integration": more channels. The same three layers side by side, the final one first.
    -> (B, N, 3D); N tokens, whatever the number of layers."""
    return torch.cat([hidden[final_layer(L)], *(hidden[i] for i in sparse_layers(L))], dim=-1)


def dense_channels(hidden, L, groups):
    """dci, "Dense Channel Integration": every layer. Neighbouring layers say similar things, so each group of them is
    averaged, and the means stand beside the final layer, which comes first (and, at even depth, is in a group too).
    Where a tower has averaged a group itself, hidden[range] is the mean.
    -> (B, N, (1 + groups)·D), 3D at the default two groups; N tokens."""
    means = [hidden[group] if group in hidden else mean([hidden[i] for i in group]) for group in dense_groups(L, groups)]
    return torch.cat([hidden[final_layer(L)], *means], dim=-1)


def halve_grid(tokens):
    """efficient, "Efficient Dense Connector": dci, and after the projector the grid of tokens is resized bilinearly to
    half its side. At exactly half, every new token falls in the middle of a square of four and is their mean.
    (B, N, C) -> (B, N / 4, C); N = 576: 144 tokens."""
    B, N, C = tokens.shape
    half = half_side(N)
    picture = tokens.transpose(1, 2).reshape(B, C, 2 * half, 2 * half)   # tokens lie row by row
    picture = F.interpolate(picture, size=(half, half), mode="bilinear", align_corners=False)
    return picture.flatten(2).transpose(1, 2)


# ---- The modules -----------------------------------------------------------------------------------------------------

def mlp(width_in, width, width_out):
    """LLaVA-1.5's projector, and COMM's MLP: two Linears with a GELU between, at 0 and 2 of a Sequential."""
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width_out))


class OneTower(nn.Module):
    """Gather the layers of one tower, then project them; only the projector learns. sti, sci, dci and efficient gather
    as told above; linear (LLaVA: one Linear) and mlp (LLaVA-1.5) take one layer as it is, N tokens.
    [[(B, N, D) for each layer of layers_needed]], or [{layer of layers_asked: (B, N, D)}] -> (B, visual_tokens(config, N), C)"""

    def __init__(self, config, tower, llm_width):
        super().__init__()
        self.config, self.L = config, tower.num_hidden_layers
        (self.layers,) = layers_needed(config, [self.L])
        if config.kind == "linear":
            self.mm_projector = nn.Linear(tower.hidden_size, llm_width)
        else:
            parts = {"mlp": 1, "sti": 1, "sci": 3}.get(config.kind, 1 + config.groups)
            self.mm_projector = mlp(parts * tower.hidden_size, llm_width, llm_width)

    def forward(self, hidden):
        (hidden,) = hidden
        if not isinstance(hidden, dict):
            hidden = dict(zip(self.layers, hidden, strict=True))         # {hidden index: (B, N, D)}
        if self.config.kind in ("linear", "mlp"):
            (features,) = hidden.values()
        elif self.config.kind == "sti":
            features = sparse_tokens(hidden, self.L)
        elif self.config.kind == "sci":
            features = sparse_channels(hidden, self.L)
        else:
            features = dense_channels(hidden, self.L, self.config.groups)
        tokens = self.mm_projector(features)                             # (B, N or more, C)
        return halve_grid(tokens) if self.config.kind == "efficient" else tokens


class LayerMerge(nn.Module):
    """Many layers of a tower become one, in four of the paper's five ways (section 3, "multi-level feature merging"); the fifth, a
    convolution and BatchNorm in the place of LN and Linear, is left out.

    lln: Σ wᵢ·Linearᵢ(LNᵢ(hᵢ)), which brings the layers to one space first; layerscale: Σ wᵢ·hᵢ; mean_half and mean_all:
    the same with wᵢ = 1/n, over other layers. The paper has the weights sum to one and does not say how, nor where they
    start: here they are the softmax of parameters that start at zero, so that training starts from the mean.
    [n layers, (B, N, D) each] -> (B, N, D)"""

    def __init__(self, merge, num_layers, width):
        super().__init__()
        self.num_layers, per_layer = num_layers, num_layers if merge == "lln" else 0
        self.scale = nn.Parameter(torch.zeros(num_layers)) if merge in ("lln", "layerscale") else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(per_layer))
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(per_layer))

    def weights(self):
        """(n,), summing to one: the share of each layer."""
        return torch.full((self.num_layers,), 1 / self.num_layers) if self.scale is None else self.scale.softmax(dim=0)

    def forward(self, layers):
        if self.scale is None:
            return mean(layers)
        dtype = layers[0].dtype
        if self.norms:
            layers = (linear(norm(x)) for x, norm, linear in zip(layers, self.norms, self.linears, strict=True))
        return running_sum(w * x for w, x in zip(self.weights(), layers, strict=True)).to(dtype)


class COMM(nn.Module):
    """comm (section 4): v1 = Σ αᵢ·Linear(LN(clipᵢ)), v2 = Σ βⱼ·Linear(LN(dinoⱼ)), out = Linear([v1, MLP(v2)]).

    CLIP needs no MLP, it was trained against text; DINOv2 was not, and a Linear alone serves it badly (63.5 average REC
    in the ablation, 74.9 with two MLPs; four or more break it). The MLPs stand in plain sequence: the paper mentions no
    residuals and nothing between them, so there is none. The ablation's comm_clip is Linear(v1), comm_dino Linear(MLP(v2)).
    [CLIP's layers (B, N, D_clip), DINOv2's layers (B, N, D_dino)] -> (B, N, C); N tokens, patch i of one tower beside
    patch i of the other, so both must cut the image into the same grid. With one side: [its layers (B, N, D)]."""

    def __init__(self, config, towers, llm_width):
        super().__init__()
        if len({tower.num_patches for tower in towers}) > 1:
            clip, dino = towers
            raise InputError(f"connector comm joins the towers patch by patch, but their grids differ: CLIP gives "
                             f"{grid(clip.num_patches)}, DINOv2 {grid(dino.num_patches)}; take equal patch sizes")
        self.sides = SIDES[config.kind]
        for side, tower, layers in zip(self.sides, towers, layers_needed(config, [t.num_hidden_layers for t in towers])):
            self.add_module(f"{side}_merge", LayerMerge(config.merge, len(layers), tower.hidden_size))
        if "dino" in self.sides:
            D = towers[-1].hidden_size
            self.dino_mlp = nn.Sequential(*(mlp(D, config.dino_expansion * D, D) for _ in range(config.dino_depth)))
        self.mm_projector = nn.Linear(sum(tower.hidden_size for tower in towers), llm_width)

    def layer_weights(self):
        """alpha and beta: the share of each merged layer of CLIP and of DINOv2 (or of the one side there is), in the order
        of layers_needed."""
        return tuple(getattr(self, f"{side}_merge").weights() for side in self.sides)

    def forward(self, hidden):
        layers, merged = dict(zip(self.sides, hidden, strict=True)), []
        if "clip" in layers:
            merged.append(self.clip_merge(layers["clip"]))               # v1 (B, N, D_clip)
        if "dino" in layers:
            merged.append(self.dino_mlp(self.dino_merge(layers["dino"])))    # v2 (B, N, D_dino)
        return self.mm_projector(torch.cat(merged, dim=-1))              # (B, N, C)


def make_connector(config, towers, llm_width):
    """The connector between `towers`, one (L, D, N) each, and an LLM of width C. Its forward takes, for each tower, the
    list of hidden states that layers_needed names, or (but for comm) {layer: state} of layers_asked, patch tokens only, and
    returns (B, visual_tokens(config, N), C)."""
    towers = [TowerShape(*tower) for tower in towers]
    layers_needed(config, [tower.num_hidden_layers for tower in towers])     # raises if the number of towers is wrong
    if config.kind in SIDES:
        return COMM(config, towers, llm_width)
    visual_tokens(config, towers[0].num_patches)                             # raises if efficient cannot halve the grid
    return OneTower(config, towers[0], llm_width)
