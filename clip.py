"""CLIP: a vision tower and a text tower that put a picture and its caption at the same place; and SigLIP's vision tower.

Papers: "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020); "Sigmoid Loss for
Language Image Pre-Training" (arXiv 2303.15343). Checkpoints: openai/clip-vit-*, laion/CLIP-* in Hugging Face layout,
google/siglip-*. LLaVA, COMM and the Dense Connector look through the vision tower alone.

    vision: pixels (B, 3, R, R) uint8 -> patches, class token, positions, pre-LayerNorm -> hidden[0] .. hidden[L] (B, S, D)
    text:   tokens (B, T)             -> embeddings, positions, causal blocks          -> hidden[0] .. hidden[L] (B, T, D)
    both:   one token of the last layer (class token; end of text) -> LayerNorm -> Linear -> unit vector (B, E)
            logits (B, texts) = exp(logit_scale) · image vectors · text vectorsᵀ

What differs from vit.py: a LayerNorm before the first block, no bias in the patch embedding, quick-GELU in OpenAI's own
checkpoints. SigLIP has neither class token nor pre-LayerNorm.
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from hub import InputError, fields_of, load_weights, locate, on_meta, read_config, renamer, save_checkpoint
from vit import Block, Normalize, check_pixels, pixel_statistics, run_blocks

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class CLIPVisionConfig:
    """`vision_config` of config.json, with the defaults that Hugging Face leaves out of the file."""
    hidden_size: int = 768               # D
    num_hidden_layers: int = 12          # L
    num_attention_heads: int = 12        # H
    intermediate_size: int = 3072        # width inside the MLP
    hidden_act: str = "quick_gelu"       # OpenAI's; LAION's checkpoints say gelu
    layer_norm_eps: float = 1e-5
    image_size: int = 224                # R
    patch_size: int = 32                 # P
    model_type: str = "clip_vision_model"


@dataclass
class SigLIPVisionConfig(CLIPVisionConfig):
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    patch_size: int = 16
    model_type: str = "siglip_vision_model"


@dataclass
class CLIPTextConfig:
    """`text_config` of config.json."""
    hidden_size: int = 512               # D
    num_hidden_layers: int = 12          # L
    num_attention_heads: int = 8         # H
    intermediate_size: int = 2048        # width inside the MLP
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408              # V
    max_position_embeddings: int = 77    # longest text in tokens
    eos_token_id: int = 49407            # where the sentence is read off
    model_type: str = "clip_text_model"


class CLIPVision(nn.Module):
    """CLIP's vision tower: uint8 (B, 3, R, R) -> hidden states, each (B, S, D), S = 1 + N."""
    num_prefix_tokens = 1                                            # the class token
    config_class, model_types = CLIPVisionConfig, ("clip", "clip_vision_model")
    architecture = "CLIPVisionModel"
    statistics = CLIP_MEAN, CLIP_STD
    # what a full checkpoint holds beside this tower, left behind on purpose (position_ids: a constant in older files)
    skip = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias",
            "vision_model.embeddings.position_ids", "embeddings.position_ids", "vision_model.head.", "head.")

    def __init__(self, config, mean=None, std=None):
        super().__init__()
        c = self.config = config
        self.normalize = Normalize(mean or self.statistics[0], std or self.statistics[1])
        is_siglip = not self.num_prefix_tokens
        self.patch = nn.Conv2d(3, c.hidden_size, kernel_size=c.patch_size, stride=c.patch_size, bias=is_siglip)
        if not is_siglip:
            self.class_embedding = nn.Parameter(torch.empty(c.hidden_size).normal_(std=0.02))
            self.norm_pre = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        num_positions = self.num_prefix_tokens + (c.image_size // c.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(num_positions, c.hidden_size).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act,
                                          c.layer_norm_eps) for _ in range(c.num_hidden_layers))
        self.norm_post = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, pixels, layers=None):
        """pixels: uint8 (B, 3, R, R). layers None: all L + 1 hidden states; a list of indices: those, in that order,
        and for a range their mean. Each is (B, S, D); hidden[0] is after the pre-LayerNorm, none is after the last one. Raises InputError."""
        check_pixels(pixels, self.config.image_size)
        patches = self.patch(self.normalize(pixels, self.patch.weight.dtype))
        x = patches.flatten(2).transpose(1, 2)                       # (B, N, D)
        if self.num_prefix_tokens:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.position_embedding                              # (B, S, D)
        if self.num_prefix_tokens:
            x = self.norm_pre(x)
        return run_blocks(self.blocks, x, layers)

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """The vision tower of a whole CLIP (or SigLIP) checkpoint, or of one that holds nothing else. Raises InputError."""
        folder = locate(folder_or_id)
        config = read_config(folder)
        if config.get("model_type") not in cls.model_types:
            raise InputError(f"{folder}: model_type {config.get('model_type')!r} is not one of {', '.join(cls.model_types)}")
        config = fields_of(cls.config_class, config.get("vision_config", config), folder)
        with on_meta():
            tower = cls(config, *pixel_statistics(folder, *cls.statistics))
        return load_weights(tower, folder, cls.name_of, dtype, device).eval()

    @classmethod
    def name_of(cls, name):
        """A checkpoint's name of a tensor -> ours, None for what is left behind."""
        return renamer([("vision_model.", "")] + RENAMES, cls.skip)(name)

    def hugging_face(self):
        """-> {name: tensor} and config.json's object, as CLIPVisionModel or SiglipVisionModel reads them."""
        their_name = renamer([(ours, theirs) for theirs, ours in reversed(RENAMES)])
        architecture = {"architectures": [self.architecture], "vision_use_head": False}    # SigLIP's head is not here
        return ({f"vision_model.{their_name(name)}": tensor for name, tensor in self.state_dict().items()},
                architecture | asdict(self.config))

    def save_pretrained(self, folder):
        save_checkpoint(folder, *self.hugging_face())


class SigLIPVision(CLIPVision):
    """SigLIP's vision tower: uint8 (B, 3, R, R) -> hidden states, each (B, N, D): no class token. Its pooling head is left out."""
    num_prefix_tokens = 0
    config_class, model_types = SigLIPVisionConfig, ("siglip", "siglip_vision_model")
    architecture = "SiglipVisionModel"
    statistics = (0.5,) * 3, (0.5,) * 3


class CLIPText(nn.Module):
    """CLIP's text tower: tokens (B, T) -> hidden states, each (B, T, D). Raises InputError for a text longer than it reads."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(c.max_position_embeddings, c.hidden_size).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(c.hidden_size, c.num_attention_heads, c.intermediate_size, c.hidden_act,
                                          c.layer_norm_eps) for _ in range(c.num_hidden_layers))
        self.norm_final = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, tokens, layers=None):
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise InputError(f"a text of {tokens.shape[1]} tokens for a tower of {self.config.max_position_embeddings} positions")
        x = self.token_embedding(tokens) + self.position_embedding[:tokens.shape[1]]   # (B, T, D)
        return run_blocks(self.blocks, x, layers, is_causal=True)


class CLIP(nn.Module):
    """Both towers and their similarity. `clip.vision` and `clip.text` are the towers."""

    def __init__(self, vision_config, text_config, projection_dim=512, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.vision = CLIPVision(vision_config, mean, std)
        self.text = CLIPText(text_config)
        self.visual_projection = nn.Linear(vision_config.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))        # ln(1 / 0.07), CLIP's start
        self.tokenizer = None                                        # set by from_pretrained where there is a tokenizer.json

    def image_features(self, pixels):
        """pixels uint8 (B, 3, R, R) -> unit vectors (B, E)."""
        last = self.vision(pixels, [self.vision.config.num_hidden_layers])[0]
        return F.normalize(self.visual_projection(self.vision.norm_post(last[:, 0])), dim=-1)

    def text_features(self, tokens):
        """tokens (B, T), each row ended by the end-of-text token -> unit vectors (B, E), read at that token."""
        last = self.text.norm_final(self.text(tokens, [self.text.config.num_hidden_layers])[0])    # (B, T, D)
        eos = self.text.config.eos_token_id
        # OpenAI's first configs state eos_token_id 2, which is wrong; the end of text is their highest id
        end = tokens.argmax(dim=-1) if eos == 2 else (tokens == eos).int().argmax(dim=-1)         # (B,) the first one
        return F.normalize(self.text_projection(last[torch.arange(len(tokens), device=tokens.device), end]), dim=-1)

    def tokenize(self, texts):
        """List of texts -> tokens (B, T), begun and ended as the tokenizer says, cut to the tower's length.
        Rows are filled up with end-of-text tokens: causal attention never looks at them. Raises InputError without a tokenizer."""
        if self.tokenizer is None:
            raise InputError("this CLIP checkpoint has no tokenizer.json: texts cannot be read")
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        longest = max(map(len, rows))
        tokens = [row + row[-1:] * (longest - len(row)) for row in rows]
        return torch.tensor(tokens, device=self.logit_scale.device)

    def similarity(self, pixels, texts):
        """pixels uint8 (B, 3, R, R), list of texts -> logits (B, len(texts)): zero-shot classification is their softmax."""
        return self.logit_scale.exp() * self.image_features(pixels) @ self.text_features(self.tokenize(texts)).T

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """openai/clip-vit-*, laion/CLIP-* or a folder of that layout. Raises InputError."""
        folder = locate(folder_or_id)
        config = read_config(folder)
        if config.get("model_type") != "clip":
            raise InputError(f"{folder}: model_type {config.get('model_type')!r} is not clip")
        vision = fields_of(CLIPVisionConfig, config.get("vision_config", {}), folder)
        text = fields_of(CLIPTextConfig, config.get("text_config", {}), folder)
        with on_meta():
            clip = cls(vision, text, config.get("projection_dim", 512), *pixel_statistics(folder, CLIP_MEAN, CLIP_STD))
        skip = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
        load_weights(clip, folder, renamer(WHOLE + RENAMES, skip), dtype, device)
        if (folder / "tokenizer.json").exists():
            clip.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            clip.tokenizer.no_padding()
            clip.tokenizer.enable_truncation(text.max_position_embeddings)
        return clip.eval()

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors as Hugging Face's CLIPModel reads them."""
        their_name = renamer([(ours, theirs) for theirs, ours in reversed(WHOLE + RENAMES)])
        config = {"architectures": ["CLIPModel"], "model_type": "clip",
                  "dtype": str(self.logit_scale.dtype).removeprefix("torch."),
                  "projection_dim": self.visual_projection.out_features,
                  "vision_config": {**asdict(self.vision.config), "projection_dim": self.visual_projection.out_features},
                  "text_config": {**asdict(self.text.config), "projection_dim": self.text_projection.out_features}}
        save_checkpoint(folder, {their_name(name): tensor for name, tensor in self.state_dict().items()}, config)


WHOLE = [("vision_model.", "vision."), ("text_model.", "text.")]
RENAMES = [("embeddings.patch_embedding.", "patch."), ("embeddings.position_embedding.weight", "position_embedding"),
           ("embeddings.token_embedding.", "token_embedding."), ("embeddings.class_embedding", "class_embedding"),
           ("pre_layrnorm", "norm_pre"), ("post_layernorm", "norm_post"), ("final_layer_norm", "norm_final"),
           ("encoder.layers.", "blocks."), ("layer_norm1", "norm1"),
           ("layer_norm2", "norm2"), ("self_attn.q_proj", "attn.q"), ("self_attn.k_proj", "attn.k"),
           ("self_attn.v_proj", "attn.v"), ("self_attn.out_proj", "attn.proj")]
