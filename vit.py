"""The Vision Transformer: an image is cut into patches, which attend to each other like tokens.

Paper: "An Image is Worth 16x16 Words" (arXiv 2010.11929). Other trainings use the same network.
DeiT (arXiv 2012.12877) adds a distillation token. DeiT III (arXiv 2204.07118) adds LayerScale, and
its class token has no position. MAE (arXiv 2111.06377) pretrains it as an encoder of the visible
patches. Checkpoints: google/vit-*, facebook/deit-*, timm/deit3_*, facebook/vit-mae-*.
dinov2.py and clip.py are built from the parts of this file.

    pixels (B, 3, R, R) uint8
      | normalize, cut into P x P patches, one linear layer             N = (R / P)²
    patches (B, N, D)
      | prepend the class token (DeiT: and the distillation token), add position embeddings
    hidden[0] (B, S, D)                                                 S = prefix tokens + N
      | block 1: x + attention(norm(x)), then x + MLP(norm(x))
    hidden[1] (B, S, D)
      | ... L blocks in all
    hidden[L] (B, S, D)  -> final norm -> class token -> head (if the checkpoint has one)
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.cli import find_class
from common.errors import InputError
from common.images import Normalize
from common.layouts import VIT
from common.pretrained import PretrainedTower


def quick_gelu(x):
    """Approximate GELU, with which OpenAI's CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class Attention(nn.Module):
    """Multi-head self-attention: (B, S, D) -> (B, S, D)."""

    # common.speed may replace it by one that is faster on a device
    sdpa = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, width, num_heads, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x, is_causal=False):
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)  # (B, H, S, D / H)
        k = self.k(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)
        x = self.sdpa(q, k, v, is_causal=is_causal)  # (B, H, S, D / H)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, S, D)


class MLP(nn.Module):
    """Two linear layers with an activation between them, on each token: (B, S, D) -> (B, S, D)."""

    def __init__(self, width, hidden_width, act="gelu"):
        super().__init__()
        self.act = find_class(ACTIVATIONS, act, "hidden_act")
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor (arXiv 2103.17239): (B, S, D) -> (B, S, D).

    Factors that start near zero keep a deep tower stable.
    """

    def __init__(self, width, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(start)))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """A pre-norm transformer block: (B, S, D) -> (B, S, D).

    layer_scale: initial factor of LayerScale, or None for none. is_causal: for CLIP's text tower.
    """

    def __init__(self, width, num_heads, hidden_width, act, eps, qkv_bias=True, layer_scale=None):
        super().__init__()
        scale = nn.Identity if layer_scale is None else partial(LayerScale, width, layer_scale)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qkv_bias)
        self.scale1 = scale()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden_width, act)
        self.scale2 = scale()

    def forward(self, x, is_causal=False):
        x = x + self.scale1(self.attn(self.norm1(x), is_causal))
        return x + self.scale2(self.mlp(self.norm2(x)))


def make_blocks(c, hidden_width, *options):
    """Build the L blocks of a config. options: qkv_bias and layer_scale of Block."""
    shape = c.hidden_size, c.num_attention_heads, hidden_width, c.hidden_act, c.layer_norm_eps
    return nn.ModuleList(Block(*shape, *options) for _ in range(c.num_hidden_layers))


def prepend(token, x):
    """Put a token (1, 1, D), or several, before each sequence of x (B, N, D) -> (B, 1 + N, D)."""
    return torch.cat([token.expand(len(x), -1, -1), x], dim=1)


def run_blocks(blocks, x, layers=None, **options):
    """Run blocks on x (B, S, D) -> the hidden states of `layers`, each (B, S, D).

    hidden[0] is x, hidden[i] the output of block i. layers: a list; None: all L + 1. A range in it
    means the mean of those hidden states. It is summed in float32 while the blocks run.
    Blocks beyond the deepest layer do not run. Raises InputError.
    """
    L = len(blocks)
    layers = range(L + 1) if layers is None else layers
    needed = set()
    for layer in layers:
        needed.update(layer if isinstance(layer, range) else [layer])
    if not needed <= set(range(L + 1)):
        raise InputError(f"layers {layers}: this tower has hidden[0] to hidden[{L}]")
    states = [None] * len(layers)
    for i in range(max(needed) + 1):
        if i > 0:
            x = blocks[i - 1](x, **options)
        for j, layer in enumerate(layers):
            if layer == i:
                states[j] = x
            elif isinstance(layer, range) and i in layer:
                states[j] = x.float() if states[j] is None else states[j] + x
    for j, layer in enumerate(layers):
        if isinstance(layer, range):
            states[j] = (states[j] / len(layer)).to(x.dtype)
    return states


class VisionTower(PretrainedTower):
    """What all towers share. common/pretrained.py reads, writes and checks (PretrainedTower)."""

    num_prefix_tokens = 1  # tokens before the patches

    def __init__(self, config, mean=None, std=None, patch_bias=True):
        super().__init__()
        self.config = config
        D, P = config.hidden_size, config.patch_size
        self.normalize = Normalize(*self.statistics(mean, std))
        self.patch = nn.Conv2d(3, D, P, stride=P, bias=patch_bias)

    def embed_patches(self, pixels):
        """Normalize and embed uint8 pixels (B, 3, R, R) -> (B, N, D). Raises InputError."""
        x = self.read_pixels(pixels, self.patch.weight.dtype)
        x = self.patch(x)  # (B, D, R / P, R / P)
        return x.flatten(2).transpose(1, 2)


@dataclass
class TowerConfig:
    """The keys of config.json that ViT and CLIP need, with Hugging Face's defaults for ViT."""

    hidden_size: int = 768  # D
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 12  # H
    intermediate_size: int = 3072  # width inside the MLP
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224  # R
    patch_size: int = 16  # P
    model_type: str = "vit"  # vit, deit, deit3, vit_mae


@dataclass
class ViTConfig(TowerConfig):
    """The keys that only a ViT has."""

    qkv_bias: bool = True
    mask_ratio: float | None = None  # MAE's share of hidden patches, kept for transformers
    num_labels: int = 0  # classes of the head; 0: no head
    distilled_head: bool = False  # DeiT trained with a teacher: two heads, averaged


class ViT(VisionTower):
    """ViT, DeiT, DeiT III or MAE encoder: uint8 (B, 3, R, R) -> hidden states, each (B, S, D)."""

    config_class = ViTConfig
    layouts = VIT
    after_blocks = ("norm.", "classifier.", "distillation_classifier.")

    def __init__(self, config, mean=None, std=None):
        super().__init__(config, mean, std)
        D = config.hidden_size
        self.is_deit = config.model_type == "deit"
        self.is_deit3 = config.model_type == "deit3"
        self.num_prefix_tokens = 2 if self.is_deit else 1
        num_patches = (config.image_size // config.patch_size) ** 2
        num_positions = num_patches if self.is_deit3 else self.num_prefix_tokens + num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if self.is_deit:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, D))
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, D))
        layer_scale = 1e-6 if self.is_deit3 else None
        self.blocks = make_blocks(config, config.intermediate_size, config.qkv_bias, layer_scale)
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        if config.num_labels:
            self.classifier = nn.Linear(D, config.num_labels)
        if config.distilled_head:
            self.distillation_classifier = nn.Linear(D, config.num_labels)

    def forward(self, pixels, layers=None):
        """Compute the hidden states of `layers` (see run_blocks), before the final norm.

        pixels: uint8 (B, 3, R, R) -> list of (B, S, D). Raises InputError.
        """
        x = self.embed_patches(pixels)  # (B, N, D)
        positions = self.position_embeddings
        if self.is_deit3:
            # the class token has no position: add zero
            positions = F.pad(positions, (0, 0, 1, 0))
        if self.is_deit:
            x = prepend(self.distillation_token, x)
        x = prepend(self.cls_token, x) + positions  # (B, S, D)
        return run_blocks(self.blocks, x, layers)

    def classify(self, pixels):
        """Compute the logits (B, num_labels) of a checkpoint with a head."""
        x = self.norm(self(pixels)[-1])  # (B, S, D)
        logits = self.classifier(x[:, 0])
        if self.config.distilled_head:
            logits = (logits + self.distillation_classifier(x[:, 1])) / 2
        return logits
