"""DINOv2: a Vision Transformer trained on images alone, without any text.

Papers: "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193); "Vision
Transformers Need Registers" (arXiv 2309.16588). Checkpoints: facebook/dinov2-{small,base,large,
giant}, facebook/dinov2-with-registers-*, and their *-imagenet1k-1-layer forms. COMM uses it as its
second tower: CLIP knows what things are, DINOv2 where.

    pixels (B, 3, R, R) uint8
      | normalize, cut into P x P patches, one linear layer             N = (R / P)²
      | in pretraining: replace masked patches by the mask token
    patches (B, N, D)
      | prepend the class token, add position embeddings (resized to this R)
      | insert registers after the class token
    hidden[0] (B, S, D)                                                 S = 1 + registers + N
      | block 1: x + scale1 · attention(norm(x)), then x + scale2 · MLP(norm(x))
    hidden[1] (B, S, D)
      | ... L blocks in all
    hidden[L] (B, S, D)  -> norm -> class token: the whole image; patches: its parts

Differences from a plain ViT: LayerScale (scale1, scale2), a SwiGLU instead of the giant's MLP,
registers, and positions that are resized to any resolution. DINOv2 was trained at 518 x 518
(37 x 37 patches of 14). COMM runs it at 336 x 336 (24 x 24), so that its patches coincide with
those of CLIP-L/14 at 336.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.layouts import DINOV2
from vit import VisionTower, make_blocks, prepend, run_blocks


@dataclass
class DINOv2Config:
    """The keys of config.json that DINOv2 needs, with Hugging Face's defaults."""

    hidden_size: int = 768  # D
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 12  # H
    mlp_ratio: int = 4  # width inside the MLP, as a multiple of D
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224  # R of the position embeddings; the tower takes other R, too
    patch_size: int = 14  # P
    qkv_bias: bool = True
    layerscale_value: float = 1.0  # where LayerScale starts
    use_swiglu_ffn: bool = False  # the giant's feed-forward
    num_register_tokens: int = 0  # 4 in facebook/dinov2-with-registers-*
    model_type: str = "dinov2"  # with registers: dinov2_with_registers

    def __post_init__(self):
        self.model_type = "dinov2_with_registers" if self.num_register_tokens else "dinov2"


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202): (B, S, D) -> (B, S, D).

    The first half of the input projection gates the second half.
    """

    def __init__(self, width, hidden_width):
        super().__init__()
        # two thirds, since there are three matrices instead of two; rounded up to a multiple of 8
        hidden_width = (int(hidden_width * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(width, 2 * hidden_width)
        self.weights_out = nn.Linear(hidden_width, width)

    def forward(self, x):
        gate, value = self.weights_in(x).chunk(2, dim=-1)  # (B, S, hidden_width) each
        return self.weights_out(F.silu(gate) * value)


class DINOv2(VisionTower):
    """DINOv2, with or without registers: uint8 (B, 3, R, R) -> hidden states, each (B, S, D).

    R is any multiple of the patch size P.
    """

    config_class = DINOv2Config
    layouts = DINOV2
    any_resolution = True
    after_blocks = ("norm.", "mask_token")

    def __init__(self, config, mean=None, std=None):
        super().__init__(config, mean, std)
        c, D = config, config.hidden_size
        self.num_prefix_tokens = 1 + c.num_register_tokens
        self.grid = c.image_size // c.patch_size  # side of the position table, in patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.mask_token = nn.Parameter(torch.zeros(1, D))
        if c.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.num_register_tokens, D))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid**2, D))
        hidden_width = int(D * c.mlp_ratio)
        self.blocks = make_blocks(c, hidden_width, c.qkv_bias, c.layerscale_value)
        if c.use_swiglu_ffn:
            for block in self.blocks:
                block.mlp = SwiGLU(D, hidden_width)
        self.norm = nn.LayerNorm(D, eps=c.layer_norm_eps)
        self.init_weights()

    def init_weights(self):
        """Initialize for training from scratch, as the authors do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # registers have no position: if they started equal, they would stay equal
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "register_tokens", "position_embeddings"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, grid):
        """Return the position embeddings of grid x grid patches, (1, grid², D).

        For another grid than the trained one, they are resized bicubically, always in float32.
        """
        table = self.position_embeddings[:, 1:]
        if grid == self.grid:
            return table
        table = table.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        # transformers resizes so, with antialiasing only for towers with registers. The authors'
        # code without registers uses the factor (grid + 0.1) / self.grid. That moves the sampling
        # points by up to a tenth of a patch.
        antialias = self.config.num_register_tokens > 0
        resized = F.interpolate(table.float(), (grid, grid), mode="bicubic", antialias=antialias)
        return resized.to(table.dtype).flatten(2).transpose(1, 2)

    def forward(self, pixels, layers=None, mask=None):
        """Compute the hidden states of `layers` (see vit.run_blocks), before the final norm.

        pixels: uint8 (B, 3, R, R), R a multiple of P -> list of (B, S, D). mask (pretraining): bool
        (B, N), True where the mask token replaces the patch. Raises InputError.
        """
        x = self.embed_patches(pixels)  # (B, N, D)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = x + self.positions(pixels.shape[-1] // self.config.patch_size)
        if self.config.num_register_tokens:
            x = prepend(self.register_tokens, x)
        x = prepend(self.cls_token + self.position_embeddings[:, :1], x)  # (B, S, D)
        return run_blocks(self.blocks, x, layers)
