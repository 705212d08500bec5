"""DINOv2: a Vision Transformer that learnt from pictures alone, without a word of text.

Papers: "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193); "Vision Transformers Need
Registers" (arXiv 2309.16588). Checkpoints: facebook/dinov2-{small,base,large,giant}, facebook/dinov2-with-registers-*,
and their *-imagenet1k-1-layer forms. COMM takes it as its second tower: CLIP knows what things are, DINOv2 where.

    pixels (B, 3, R, R) uint8
      | normalise, cut into P x P patches, one linear map each          N = (R / P)²
      | in pretraining: masked patches become the mask token
    patches (B, N, D)
      | class token in front, add position embeddings (resized to this R), put the registers after the class token
    hidden[0] (B, S, D)                                                 S = 1 + registers + N
      | block 1: x + scale1 · attention(norm(x)), then x + scale2 · MLP(norm(x))
    hidden[1] (B, S, D)
      | ... L blocks in all
    hidden[L] (B, S, D)  -> norm -> class token: the picture; patches: its parts

What differs from a plain ViT: LayerScale (scale1, scale2, in vit.py's block), a SwiGLU in place of the giant's MLP,
registers, and positions that are resized to any resolution. It was trained at 518 x 518 (37 x 37 patches of 14); COMM
shows it 336 x 336 (24 x 24), so that its patches lie exactly on those of CLIP-L/14 at 336.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from hub import InputError, fields_of, load_weights, locate, on_meta, read_config, renamer, save_checkpoint
from vit import IMAGENET_MEAN, IMAGENET_STD, Block, Normalize, check_pixels, pixel_statistics, run_blocks


@dataclass
class DINOv2Config:
    """The keys of config.json that matter here, with Hugging Face's defaults."""
    hidden_size: int = 768               # D
    num_hidden_layers: int = 12          # L
    num_attention_heads: int = 12        # H
    mlp_ratio: int = 4                   # width inside the MLP, as a multiple of D
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224                # R that the position embeddings were trained at; other R are welcome
    patch_size: int = 14                 # P
    qkv_bias: bool = True
    layerscale_value: float = 1.0        # where LayerScale starts
    use_swiglu_ffn: bool = False         # the giant's feed-forward
    num_register_tokens: int = 0         # 4 in facebook/dinov2-with-registers-*
    model_type: str = "dinov2"           # with registers: dinov2_with_registers

    def __post_init__(self):
        self.model_type = "dinov2_with_registers" if self.num_register_tokens else "dinov2"


class SwiGLU(nn.Module):
    """A gated MLP (arXiv 2002.05202), (B, S, D) -> (B, S, D): one half of the first map gates the other."""

    def __init__(self, width, hidden_width):
        super().__init__()
        hidden_width = (int(hidden_width * 2 / 3) + 7) // 8 * 8      # 2/3: three maps, the weights of the MLP's two
        self.weights_in = nn.Linear(width, 2 * hidden_width)
        self.weights_out = nn.Linear(hidden_width, width)

    def forward(self, x):
        gate, value = self.weights_in(x).chunk(2, dim=-1)            # (B, S, hidden_width) each
        return self.weights_out(F.silu(gate) * value)


class DINOv2(nn.Module):
    """DINOv2 with or without registers: uint8 (B, 3, R, R), R any multiple of P -> hidden states, each (B, S, D)."""

    def __init__(self, config, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        c = self.config = config
        self.num_prefix_tokens = 1 + c.num_register_tokens           # class token and registers
        self.grid = c.image_size // c.patch_size                     # side of the position table, in patches
        self.normalize = Normalize(mean, std)
        self.patch = nn.Conv2d(3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, c.hidden_size))
        if c.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.num_register_tokens, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, c.hidden_size))
        hidden_width = int(c.hidden_size * c.mlp_ratio)
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_attention_heads, hidden_width, c.hidden_act, c.layer_norm_eps,
                                          c.qkv_bias, c.layerscale_value) for _ in range(c.num_hidden_layers))
        if c.use_swiglu_ffn:
            for block in self.blocks:
                block.mlp = SwiGLU(c.hidden_size, hidden_width)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.init_weights()

    def init_weights(self):
        """A start for training from scratch, as the authors': linear maps and positions narrow normal, biases zero. The
        registers must differ, or they would stay alike for ever: nothing else tells them apart, not even a position."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "register_tokens", "position_embeddings"):
                nn.init.trunc_normal_(parameter, std=0.02)

    def positions(self, grid):
        """The position embeddings for grid x grid patches, (1, 1 + grid², D): the trained table, its patch part
        resized bicubically if the grid is another one: in float32 also for a bf16 tower, then rounded to its type."""
        if grid == self.grid:
            return self.position_embeddings
        table = self.position_embeddings[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        # As transformers does: from one grid's size to the other's, antialiased for the towers with registers only.
        # The authors' code does the same for those; for the towers without registers it resizes by the factor
        # (grid + 0.1) / self.grid instead, which moves the sampling points by up to a tenth of a patch.
        table = F.interpolate(table.float(), size=(grid, grid), mode="bicubic", align_corners=False,
                              antialias=self.config.num_register_tokens > 0).to(table.dtype)     # (1, D, grid, grid)
        return torch.cat([self.position_embeddings[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels, layers=None, mask=None):
        """pixels: uint8 (B, 3, R, R), R a multiple of the patch size. layers None: all L + 1 hidden states; a list of
        indices: those, in that order, and for a range their mean. Each is (B, S, D), before the final norm. mask
        (pretraining): bool (B, N), True where the mask token stands in for the patch. Raises InputError for other pixels or layers."""
        check_pixels(pixels, None)
        height, width = pixels.shape[2:]
        if height != width or height % self.config.patch_size or not height:
            raise InputError(f"pictures of {height} x {width} for a tower with patches of {self.config.patch_size}: "
                             f"make them square, with a multiple of {self.config.patch_size} as side")
        x = self.patch(self.normalize(pixels, self.patch.weight.dtype)).flatten(2).transpose(1, 2)     # (B, N, D)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(height // self.config.patch_size)
        if self.config.num_register_tokens:                          # they enter after the positions and have none
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return run_blocks(self.blocks, x, layers)                    # each (B, S, D)

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """Load facebook/dinov2-*, facebook/dinov2-with-registers-* or a folder of that layout. A classification
        checkpoint loads too, without its classifier. Raises InputError."""
        folder = locate(folder_or_id)
        raw = read_config(folder)
        if raw.get("model_type") not in ("dinov2", "dinov2_with_registers"):
            raise InputError(f"{folder}: model_type {raw.get('model_type')!r} is not dinov2 or dinov2_with_registers")
        if raw["model_type"] == "dinov2":
            raw["num_register_tokens"] = 0                           # whatever else the file says
        else:
            raw = {"num_register_tokens": 4, "patch_size": 16} | raw     # Hugging Face's defaults for this type
        config = fields_of(DINOv2Config, raw, folder)
        with on_meta():
            tower = cls(config, *pixel_statistics(folder, IMAGENET_MEAN, IMAGENET_STD))
        return load_weights(tower, folder, cls.name_of, dtype, device).eval()

    @classmethod
    def name_of(cls, name):
        """A checkpoint's name of a tensor -> ours, None for what is left behind."""
        return renamer([("dinov2_with_registers.", ""), ("dinov2.", "")] + RENAMES, skip=("classifier.",))(name)

    def hugging_face(self):
        """-> {name: tensor} and config.json's object, as Dinov2Model or Dinov2WithRegistersModel reads them."""
        their_name = renamer([(ours, theirs) for theirs, ours in reversed(RENAMES)])
        config = {"architectures": ["Dinov2WithRegistersModel" if self.config.num_register_tokens else "Dinov2Model"],
                  "dtype": str(self.cls_token.dtype).removeprefix("torch."), **asdict(self.config)}
        return {their_name(name): tensor for name, tensor in self.state_dict().items()}, config

    def save_pretrained(self, folder):
        save_checkpoint(folder, *self.hugging_face())


RENAMES = [("embeddings.patch_embeddings.projection.", "patch."), ("embeddings.cls_token", "cls_token"),
           ("embeddings.mask_token", "mask_token"), ("embeddings.register_tokens", "register_tokens"),
           ("embeddings.position_embeddings", "position_embeddings"), ("encoder.layer.", "blocks."),
           ("attention.attention.query", "attn.q"), ("attention.attention.key", "attn.k"),
           ("attention.attention.value", "attn.v"), ("attention.output.dense", "attn.proj"),
           ("layer_scale1.lambda1", "scale1"), ("layer_scale2.lambda1", "scale2"), ("layernorm.", "norm.")]
