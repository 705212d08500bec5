"""Connectors: hidden states of the vision towers go in, visual tokens for the LLM come out.

    image -> tower -> hidden[0] ... hidden[L], each (B, N, D) -> connector -> (B, M, C) -> LLM

Shallow layers keep detail that the last has lost. The Dense Connector (arXiv 2405.13800) reads
several of one tower. COMM (arXiv 2310.08825) weighs those of two. docs/connectors.svg draws all.

    name           paper             hidden states read (L = 24)      tokens M (N = 576)
    linear, mlp    LLaVA, LLaVA-1.5  23                               576
    sti            Dense Connector   23, 7, 15                        576 + 72 + 72 = 720
    sci            Dense Connector   23, 7, 15                        576
    dense (= dci)  Dense Connector   23, mean(0..11), mean(12..23)    576
    efficient      Dense Connector   the same                         144
    comm           COMM              CLIP 1..24, DINOv2 19..24        576
    comm_clip, comm_dino             one of its two towers            576
    mgm            Mini-Gemini       CLIP 23, ConvNeXt's map          576

hidden[0] enters the first block, hidden[i] is the output of block i. The final layer is
hidden[L - 1], as in LLaVA. Connectors see patch tokens only. Letters: B images, N patches, D width
of a tower, L its depth, M visual tokens an image, C width of the LLM.

A new connector is one class with @register("name"): `python train.py --connector=name` trains it.
The keywords of its constructor are its options: `--connector.groups=3`.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import find_class, options_of
from common.errors import InputError
from common.grid import ConvNorm, check_same_grid, check_squares, squares
from common.pool import half_side, halve_grid
from common.pretrained import ranges_from_json, ranges_to_json

CONNECTORS = {}


def register(*names):
    """Add a class to CONNECTORS under these names; a model is saved with the first one."""

    def add(cls):
        cls.name = names[0]
        CONNECTORS.update(dict.fromkeys(names, cls))
        return cls

    return add


class Tower(NamedTuple):
    """What a connector needs to know about a vision tower: L, D, N and which one it is."""

    depth: int
    width: int
    num_patches: int
    model_type: str = ""


class Connector(nn.Module):
    """Base class. A subclass has:

    layers       for each tower a list: an int is a hidden state, a range the mean over several
    num_tokens   M, visual tokens an image; N by default
    forward      for each tower [(B, N, D) for each entry of its layers] -> (B, M, C)
    """

    sides = ("vision",)  # a name for each tower
    crops = 0  # Mini-Gemini's

    def __init__(self, towers):
        super().__init__()
        self.num_tokens = towers[0].num_patches

    def spec(self):
        """Return what a saved model records: {"name", its options, "layers"}, ready for JSON."""
        return {"name": self.name, **self.options, "layers": ranges_to_json(self.layers)}


def mlp(in_width, out_width, width=None):
    """LLaVA-1.5's projector: linear layers at 0 and 2 of a Sequential, GELU between them."""
    width = width or out_width
    return nn.Sequential(nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, out_width))


def norm_linear(in_width, out_width):
    """LayerNorm, then a linear layer."""
    return nn.Sequential(nn.LayerNorm(in_width), nn.Linear(in_width, out_width))


class Channels(Connector):
    """Hidden states of one tower, concatenated along the channels, then an MLP."""

    projector = staticmethod(mlp)

    def __init__(self, towers, llm_width, layers):
        super().__init__(towers)
        self.layers = [layers]
        self.mm_projector = self.projector(len(layers) * towers[0].width, llm_width)

    def forward(self, hidden):
        return self.mm_projector(torch.cat(hidden[0], dim=-1))  # (B, N, D) each -> (B, N, C)


@register("mlp")
class MLP(Channels):
    """LLaVA-1.5 (arXiv 2310.03744): a two-layer MLP on one hidden state, by default hidden[L-1]."""

    def __init__(self, towers, llm_width, layer: int | None = None):
        layer = towers[0].depth - 1 if layer is None else layer
        super().__init__(towers, llm_width, [layer])


@register("linear")
class Linear(MLP):
    """LLaVA (arXiv 2304.08485): one linear layer on one hidden state."""

    projector = nn.Linear


# ---- Dense Connector: several layers of one tower ------------------------------------------------


@register("sti")
class SparseTokens(Connector):
    """Sparse Token Integration: two shallower layers, averaged 8 to 1, appended as tokens."""

    def __init__(self, towers, llm_width):
        super().__init__(towers)
        self.layers = [sparse_layers(towers[0].depth)]
        self.num_tokens += self.num_tokens // 8 * 2
        self.mm_projector = mlp(towers[0].width, llm_width)

    def forward(self, hidden):
        final, *shallow = hidden[0]
        pooled = [x.unfold(1, 8, 8).mean(dim=-1) for x in shallow]  # (B, N // 8, D) each
        return self.mm_projector(torch.cat([final, *pooled], dim=1))  # (B, M, C)


@register("sci")
class SparseChannels(Channels):
    """Sparse Channel Integration: the final layer and two shallower ones, 3D channels."""

    def __init__(self, towers, llm_width):
        super().__init__(towers, llm_width, sparse_layers(towers[0].depth))


@register("dense", "dci")
class DenseChannels(Channels):
    """Dense Channel Integration: the final layer, and the mean of each group of neighbors."""

    def __init__(self, towers, llm_width, groups: int = 2):
        super().__init__(towers, llm_width, dense_layers(towers[0].depth, groups))


@register("efficient")
class Efficient(DenseChannels):
    """Dense channels, then the grid of tokens is resized to half its side: N / 4 tokens."""

    def __init__(self, towers, llm_width, groups: int = 2):
        super().__init__(towers, llm_width, groups)
        self.num_tokens = half_side(self.num_tokens) ** 2

    def forward(self, hidden):
        return halve_grid(super().forward(hidden))


# ---- Two towers: COMM's learned weights over layers, and Mini-Gemini's search for detail ---------

MERGES = {"lln": norm_linear, "conv": ConvNorm}
MERGES |= dict.fromkeys(("layerscale", "mean_half", "mean_all"), nn.Identity)


class LayerMerge(nn.Module):
    """Merge n layers into one, (B, N, D) each -> (B, N, D): sum_i w_i align_i(h_i).

    align_i is MERGES[merge], of which lln is the paper's choice. w is a softmax, of zeros at the
    start, and equal for mean_half and mean_all.
    """

    def __init__(self, merge, num_layers, width):
        super().__init__()
        self.scale = None if "mean" in merge else nn.Parameter(torch.zeros(num_layers))
        align = find_class(MERGES, merge, "--connector.merge")
        self.align = nn.ModuleList(align(width, width) for _ in range(num_layers))

    def weights(self):
        """Return the weight of each layer, (n,), summing to one."""
        if self.scale is None:
            return torch.ones(len(self.align), dtype=torch.float64) / len(self.align)
        return self.scale.softmax(dim=0)

    def forward(self, layers):
        merged = 0
        for weight, align, x in zip(self.weights(), self.align, layers, strict=True):
            x = align(x)
            # In bfloat16 a long sum loses bits.
            merged = merged + (weight * x).to(torch.promote_types(x.dtype, torch.float32))
        return merged.to(layers[0].dtype)


@register("comm")
class COMM(Connector):
    """COMM (section 4): tokens = Linear([v1, MLP(v2)]), v1 and v2 the merges of CLIP and DINOv2.

    DINOv2 never saw text and needs the MLP: average REC is 63.5 without, 74.9 with two in a row.
    """

    sides = ("clip", "dino")

    def __init__(
        self, towers, llm_width, merge: str = "lln", dino_depth: int = 2, dino_expansion: int = 4
    ):
        super().__init__(towers)
        check_same_grid(towers[0], towers[-1])
        self.layers = []
        for side, tower in zip(self.sides, towers, strict=True):
            layers = merged_layers(merge, tower.depth, side)
            self.layers.append(layers)
            self.add_module(f"{side}_merge", LayerMerge(merge, len(layers), tower.width))
        if "dino" in self.sides:
            D = towers[-1].width
            mlps = [mlp(D, D, dino_expansion * D) for _ in range(dino_depth)]
            self.dino_mlp = nn.Sequential(*mlps)
        self.mm_projector = nn.Linear(sum(tower.width for tower in towers), llm_width)

    def layer_weights(self):
        """Return alpha (of CLIP's layers) and beta (of DINOv2's), one tensor for each tower."""
        return [getattr(self, f"{side}_merge").weights() for side in self.sides]

    def forward(self, hidden):
        features = []
        for side, layers in zip(self.sides, hidden, strict=True):
            features.append(getattr(self, f"{side}_merge")(layers))  # (B, N, D)
        if "dino" in self.sides:
            features[-1] = self.dino_mlp(features[-1])
        return self.mm_projector(torch.cat(features, dim=-1))  # (B, N, 2D) -> (B, N, C)


@register("comm_clip")
class COMMClip(COMM):
    sides = ("clip",)


@register("comm_dino")
class COMMDino(COMM):
    sides = ("dino",)


@register("mgm")
class MiniGemini(Channels):
    """Mini-Gemini (arXiv 2403.18814): each patch of CLIP attends to its square of ConvNeXt's map.

    groups: the Dense Connector's means, as further channels. hd: the towers see each image as five,
    whole and in four crops, for 5N tokens. interop/convnext.py explains the two image sizes.
    """

    sides = ("clip", "convnext")

    def __init__(self, towers, llm_width, groups: int = 0, hd: bool = False):
        clip, detail = towers
        layers = dense_layers(clip.depth, groups) if groups else [clip.depth - 1]
        super().__init__(towers, llm_width, layers)
        self.layers.append([detail.depth])
        self.crops = 2 if hd else 1
        self.num_tokens *= 5 if hd else 1
        check_squares(clip, detail, self.crops)
        self.vlm_uni_query_projector = norm_linear(clip.width, clip.width)
        self.vlm_uni_aux_projector = norm_linear(detail.width, clip.width)
        self.vlm_uni_val_projector = norm_linear(detail.width, clip.width)

    def forward(self, hidden):
        (final, *means), (detail,) = hidden  # (B, N, D) each, (B, N P², E)
        detail = squares(detail, final.shape[1])  # (B, N, P², E)
        q = self.vlm_uni_query_projector(final)[:, :, None]  # (B, N, 1, D)
        k = self.vlm_uni_aux_projector(detail)  # (B, N, P², D)
        v = self.vlm_uni_val_projector(detail)
        mined = F.scaled_dot_product_attention(q, k, v)[:, :, 0]  # (B, N, D)
        tokens = super().forward([[final + mined, *means]])  # (B, N, C)
        return tokens.reshape(-1, self.num_tokens, tokens.shape[-1])


# ---- Which layers, for a tower of depth L --------------------------------------------------------


def sparse_layers(L):
    """Return the final layer, the last of the first and of the second third: 24 -> 23, 7, 15."""
    third = (L - L % 2) // 3
    return [L - 1, third - 1, 2 * third - 1]


def dense_layers(L, groups=2):
    """Return the final layer and groups of neighbors: 24 -> [23, range(0, 12), range(12, 24)]."""
    # The authors leave out the last of SigLIP's 27 blocks.
    usable = L - L % 2
    if not 1 <= groups <= usable:
        raise InputError(f"--connector.groups={groups}: must be between 1 and {usable}")
    cuts = [group * usable // groups for group in range(groups + 1)]
    return [L - 1, *map(range, cuts, cuts[1:])]


def merged_layers(merge, L, side):
    """Return the layers to merge: all of CLIP's and the last quarter of DINOv2's, or the means'."""
    if merge == "mean_half":
        return list(range(L // 2 + 1, L + 1))
    # DINOv2's shallow layers did harm (section 3): 24 -> 19..24
    first = 3 * L // 4 + 1 if side == "dino" and merge != "mean_all" else 1
    return list(range(first, L + 1))


def make_connector(spec, towers, llm_width):
    """Build a connector from its name or from what Connector.spec returns; towers: a Tower each.

    Recorded layers replace the default ones. Raises InputError where something does not fit.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    cls = find_class(CONNECTORS, given.pop("name"), "--connector")
    layers = ranges_from_json(given.pop("layers", []))
    if len(towers) != len(cls.sides):
        raise InputError(f"--vision: {cls.name} reads {len(cls.sides)} tower(s), got {len(towers)}")
    options = {name: parameter.default for name, parameter in options_of(cls).items()} | given
    connector = cls(towers, llm_width, **options)
    connector.options = options
    if layers:
        connector.layers = layers
    return connector
