"""The Vision Transformer: a picture is cut into patches, and the patches talk to each other like words.

Paper: "An Image is Worth 16x16 Words" (arXiv 2010.11929). The same network, trained otherwise, is DeiT ("Training
data-efficient image transformers", arXiv 2012.12877: one more token, for distillation), DeiT III ("Revenge of the ViT",
arXiv 2204.07118: LayerScale, and a class token without a position) and the encoder of MAE ("Masked Autoencoders Are
Scalable Vision Learners", arXiv 2111.06377). Checkpoints: google/vit-*, facebook/deit-*, timm/deit3_*,
facebook/vit-mae-*. The parts here (patch embedding, attention, MLP, block) also serve dinov2.py and clip.py.

    pixels (B, 3, R, R) uint8
      | normalise, cut into P x P patches, one linear map each          N = (R / P)²
    patches (B, N, D)
      | put the class token (DeiT: and the distillation token) in front, add position embeddings
    hidden[0] (B, S, D)                                                 S = prefix tokens + N
      | block 1: x + attention(norm(x)), then x + MLP(norm(x))
    hidden[1] (B, S, D)
      | ... L blocks in all
    hidden[L] (B, S, D)  -> final norm -> class token -> head (where the checkpoint has one)
"""
import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import attention
from hub import (InputError, fields_of, load_weights, locate, on_meta, read_config, read_json, renamer, save_checkpoint,
                 tensor_files)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def quick_gelu(x):
    """OpenAI's CLIP was trained with this approximation of GELU; with the exact one its features are off."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "quick_gelu": quick_gelu}


class Normalize(nn.Module):
    """uint8 pixels (B, 3, R, R) -> (pixel / 255 - mean) / std in `dtype`. Every tower has its own mean and deviation, so one
    uint8 tensor serves them all; this runs on the device, where it costs nothing."""

    def __init__(self, mean, std):
        super().__init__()                                           # device="cpu": real numbers even in a module built on "meta"
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1), persistent=False)

    def _apply(self, fn, recurse=True):
        """What .to() and .half() run: mean and deviation follow to the device, but stay float32."""
        mean, std = self.mean, self.std
        super()._apply(fn, recurse)
        self.mean, self.std = mean.to(self.mean.device), std.to(self.std.device)
        return self

    def forward(self, pixels, dtype):
        return ((pixels.float() / 255 - self.mean) / self.std).to(dtype)


def pixel_statistics(folder, mean, std):
    """Mean and standard deviation from the checkpoint's preprocessor_config.json, or the given ones where it has none."""
    path = Path(folder) / "preprocessor_config.json"
    stated = read_json(path) if path.exists() else {}
    return tuple(stated.get("image_mean") or mean), tuple(stated.get("image_std") or std)


class Attention(nn.Module):
    """Multi-head self-attention, (B, S, D) -> (B, S, D). q, k and v are apart, as in the checkpoints: each tensor of a file
    becomes a parameter as it is, with nothing to concatenate."""

    def __init__(self, width, num_heads, qkv_bias=True):
        super().__init__()
        if width % num_heads:
            raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {num_heads}")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(width, width, bias=qkv_bias)
        self.v = nn.Linear(width, width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x, is_causal=False):
        q, k, v = (linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for linear in (self.q, self.k, self.v))           # (B, H, S, D/H) each
        x = attention(q, k, v, is_causal)
        return self.proj(x.transpose(1, 2).flatten(2))               # (B, S, D)


class MLP(nn.Module):
    """Linear, activation, Linear on every token by itself: (B, S, D) -> (B, S, D)."""

    def __init__(self, width, hidden_width, act="gelu"):
        super().__init__()
        if act not in ACTIVATIONS:
            raise InputError(f"hidden_act {act!r} is not one of {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[act]
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block. `is_causal` is for CLIP's text tower. `layer_scale` is where LayerScale (arXiv
    2103.17239; DINOv2, DeiT III) starts, None: there is none. It multiplies each branch by a learnt vector before it is
    added; a vector that starts near zero keeps a deep tower stable."""

    def __init__(self, width, num_heads, hidden_width, act, eps, qkv_bias=True, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, qkv_bias)
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, hidden_width, act)
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(self, x, is_causal=False):
        attended = self.attn(self.norm1(x), is_causal)
        x = x + (attended if self.scale1 is None else self.scale1 * attended)
        thought = self.mlp(self.norm2(x))
        return x + (thought if self.scale2 is None else self.scale2 * thought)


def run_blocks(blocks, x, layers=None, **options):
    """hidden[0] = x, hidden[i] = output of block i. Returns the hidden states asked for (None: all L + 1 of them), in the
    order asked, each (B, S, D), and runs no block beyond the deepest of them. A range asks for the mean of its hidden states:
    it is summed up, in float32 at least, while the blocks run, so that none of them has to be kept."""
    layers = list(range(len(blocks) + 1) if layers is None else layers)
    deepest = [max(layer) if isinstance(layer, range) else layer for layer in layers]
    for layer in [*deepest, *(min(layer) for layer in layers if isinstance(layer, range))]:
        if not 0 <= layer <= len(blocks):
            raise InputError(f"hidden[{layer}] asked of a tower of {len(blocks)} blocks, which has hidden[0] to hidden[{len(blocks)}]")
    kept = {}
    for i in range(max(deepest, default=0) + 1):
        x = blocks[i - 1](x, **options) if i else x
        for layer in layers:
            if layer == i:
                kept[layer] = x
            elif isinstance(layer, range) and i in layer:
                kept[layer] = kept[layer] + x if layer in kept else x.to(torch.promote_types(x.dtype, torch.float32))
    return [(kept[layer] / len(layer)).to(x.dtype) if isinstance(layer, range) else kept[layer] for layer in layers]


def check_pixels(pixels, side):
    """Raise InputError unless `pixels` is uint8 (B, 3, side, side); side None: any."""
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3:
        raise InputError(f"pixels should be uint8 (B, 3, R, R), got {str(pixels.dtype)[6:]} {tuple(pixels.shape)}")
    if side and pixels.shape[2:] != (side, side):
        raise InputError(f"pictures of {pixels.shape[2]} x {pixels.shape[3]} for a tower that was trained at {side} x {side}")


@dataclass
class ViTConfig:
    """The keys of config.json that matter here, with the defaults that Hugging Face leaves out of the file."""
    hidden_size: int = 768               # D
    num_hidden_layers: int = 12          # L
    num_attention_heads: int = 12        # H
    intermediate_size: int = 3072        # width inside the MLP
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224                # R
    patch_size: int = 16                 # P
    qkv_bias: bool = True
    model_type: str = "vit"              # vit, deit (has a distillation token), deit3 (LayerScale, no class position), vit_mae
    num_labels: int = 0                  # classes of the head, 0: the checkpoint has none
    distilled_head: bool = False         # DeiT's teacher-student form: two heads, averaged


class ViT(nn.Module):
    """ViT, DeiT or MAE encoder: uint8 (B, 3, R, R) -> hidden states, each (B, S, D)."""

    def __init__(self, config, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        c = self.config = config
        self.num_prefix_tokens = 2 if c.model_type == "deit" else 1
        self.normalize = Normalize(mean, std)
        self.patch = nn.Conv2d(3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        if c.model_type == "deit":
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        is_deit3 = c.model_type == "deit3"
        num_positions = (0 if is_deit3 else self.num_prefix_tokens) + (c.image_size // c.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, c.hidden_size))
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act,
                                          c.layer_norm_eps, c.qkv_bias, layer_scale=1e-6 if is_deit3 else None)
                                    for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        if c.num_labels:
            self.classifier = nn.Linear(c.hidden_size, c.num_labels)
        if c.distilled_head:
            self.distillation_classifier = nn.Linear(c.hidden_size, c.num_labels)

    def forward(self, pixels, layers=None):
        """pixels: uint8 (B, 3, R, R). layers None: all L + 1 hidden states; a list of indices: those, in that order,
        and for a range their mean. Each is (B, S, D), before the final norm. Raises InputError for other pixels or layers."""
        check_pixels(pixels, self.config.image_size)
        patches = self.patch(self.normalize(pixels, self.patch.weight.dtype))
        x = patches.flatten(2).transpose(1, 2)                       # (B, N, D)
        prefix = [self.cls_token] + ([self.distillation_token] if self.num_prefix_tokens == 2 else [])
        if self.config.model_type == "deit3":                        # positions are the patches' alone
            x = x + self.position_embeddings
        x = torch.cat([token.expand(len(x), -1, -1) for token in prefix] + [x], dim=1)                 # (B, S, D)
        if self.config.model_type != "deit3":
            x = x + self.position_embeddings
        return run_blocks(self.blocks, x, layers)                    # each (B, S, D)

    def classify(self, pixels):
        """pixels -> logits (B, num_labels) of the checkpoint's head. InputError if it has none."""
        if not self.config.num_labels:
            raise InputError("this checkpoint has no classification head")
        x = self.norm(self(pixels, [self.config.num_hidden_layers])[0])
        if self.config.distilled_head:                               # DeiT: the mean of what both tokens say
            return (self.classifier(x[:, 0]) + self.distillation_classifier(x[:, 1])) / 2
        return self.classifier(x[:, 0])

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """Load google/vit-*, facebook/deit-*, facebook/vit-mae-*, timm/deit3_* or a folder of that layout.
        Raises InputError."""
        folder = locate(folder_or_id)
        raw = read_config(folder)
        if "architecture" in raw:
            return cls.from_timm(folder, raw, dtype, device)
        config = fields_of(ViTConfig, {key: raw[key] for key in raw if key not in ("num_labels", "distilled_head")}, folder)
        if config.model_type not in ("vit", "deit", "vit_mae"):
            raise InputError(f"{folder}: model_type {config.model_type!r} is not a ViT (vit, deit, vit_mae)")
        names = tensor_files(folder)                                 # the config does not say which head there is
        config.distilled_head = "distillation_classifier.weight" in names
        if config.distilled_head or "classifier.weight" in names:
            config.num_labels = len(raw.get("id2label", "ab"))       # Hugging Face leaves the default, two classes, out
        mean, std = ((0.5,) * 3,) * 2 if config.model_type == "vit" else (IMAGENET_MEAN, IMAGENET_STD)
        with on_meta():
            tower = cls(config, *pixel_statistics(folder, mean, std))
        return load_weights(tower, folder, cls.name_of, dtype, device).eval()

    @classmethod
    def from_timm(cls, folder, stated, dtype, device):
        """DeiT III in timm's layout: config.json names an architecture, `model_args` what differs from it, `pretrained_cfg`
        the pictures' statistics."""
        name = re.match(r"deit3_([a-z]+)_patch(\d+)_(\d+)", str(stated["architecture"]))
        if not name or name[1] not in DEIT3:
            raise InputError(f"{folder}: architecture {stated['architecture']!r}: of timm's models only DeiT III "
                             "(deit3_*) is read")
        width, depth, heads = DEIT3[name[1]]
        c = dict(embed_dim=width, depth=depth, num_heads=heads, patch_size=int(name[2]), img_size=int(name[3]))
        c |= stated.get("model_args") or {}
        names, pictures = tensor_files(folder), stated.get("pretrained_cfg") or {}
        has_head = any(name.endswith("head.weight") for name in names)
        config = ViTConfig(c["embed_dim"], c["depth"], c["num_heads"], 4 * c["embed_dim"], layer_norm_eps=1e-6,
                           image_size=c["img_size"], patch_size=c["patch_size"], model_type="deit3",
                           num_labels=stated.get("num_classes", 1000) if has_head else 0)
        with on_meta():
            tower = cls(config, pictures.get("mean", IMAGENET_MEAN), pictures.get("std", IMAGENET_STD))
        return load_weights(tower, folder, cls.timm_name_of, dtype, device).eval()

    @staticmethod
    def timm_name_of(name):
        """timm's name of a tensor -> ours. It keeps q, k and v in one matrix, one below the other: three names for those."""
        name = renamer(TIMM_RENAMES)(name)
        return [name.replace(".qkv.", f".{part}.") for part in "qkv"] if ".qkv." in name else name

    @classmethod
    def name_of(cls, name):
        """A checkpoint's name of a tensor -> ours, None for MAE's decoder and the untrained poolers."""
        return renamer(RENAMES, skip=("pooler.", "vit.pooler.", "deit.pooler.", "decoder."))(name)

    def hugging_face(self):
        """-> {name: tensor} and config.json's object, as ViTModel, DeiTModel or ViTMAEModel reads them: without a head."""
        if self.config.model_type not in ARCHITECTURES:
            raise InputError("transformers has no class for DeiT III: nothing there could read it")
        their_name = renamer([(ours, theirs) for theirs, ours in reversed(RENAMES) if ours and "classifier" not in ours])
        tensors = {their_name(name): tensor for name, tensor in self.state_dict().items() if "classifier" not in name}
        tensors = {name if name.startswith(("encoder.", "layernorm.", "embeddings.")) else f"embeddings.{name}": tensor
                   for name, tensor in tensors.items()}
        config = {key: value for key, value in asdict(self.config).items() if key not in ("num_labels", "distilled_head")}
        return tensors, {"architectures": [ARCHITECTURES[self.config.model_type]]} | config

    def save_pretrained(self, folder):
        save_checkpoint(folder, *self.hugging_face())


DEIT3 = {"small": (384, 12, 6), "medium": (512, 12, 8), "base": (768, 12, 12), "large": (1024, 24, 16),
         "huge": (1280, 32, 16)}                                     # D, L, H
TIMM_RENAMES = [("timm_model.", ""), ("patch_embed.proj.", "patch."), ("pos_embed", "position_embeddings"),
                ("ls1.gamma", "scale1"), ("ls2.gamma", "scale2"), ("head.", "classifier.")]
ARCHITECTURES = {"vit": "ViTModel", "deit": "DeiTModel", "vit_mae": "ViTMAEModel"}
RENAMES = [("vit.", ""), ("deit.", ""), ("embeddings.patch_embeddings.projection.", "patch."), ("embeddings.", ""),
           ("encoder.layer.", "blocks."), ("attention.attention.query", "attn.q"),
           ("attention.attention.key", "attn.k"), ("attention.attention.value", "attn.v"),
           ("attention.output.dense", "attn.proj"), ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
           ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("layernorm.", "norm."),
           ("cls_classifier", "classifier")]
