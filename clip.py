"""CLIP: a vision and a text tower that embed an image and its caption at the same place; SigLIP.

Papers: "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020);
"Sigmoid Loss for Language Image Pre-Training" (arXiv 2303.15343), of which only the vision tower is
here. Checkpoints: openai/clip-vit-*, laion/CLIP-* in Hugging Face layout, google/siglip-*. LLaVA,
COMM and the Dense Connector use the vision tower alone.

    vision: pixels (B, 3, R, R) uint8 -> patches, class token, positions, pre-LayerNorm, blocks
    text:   tokens (B, T)             -> embeddings, positions, causal blocks
    both:   one token of hidden[L] (class token; end of text) -> LayerNorm -> linear layer
            -> unit vector (B, E)
    logits (B, texts) = exp(logit_scale) · image vectors · text vectorsᵀ

Differences from vit.py: a LayerNorm before the first block, no bias in the patch embedding, and
quick-GELU in OpenAI's checkpoints. SigLIP has neither class token nor pre-LayerNorm.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer

from common import layouts
from common.errors import InputError
from common.pretrained import Pretrained, build_clip, our_name
from common.save import save_clip
from vit import TowerConfig, VisionTower, make_blocks, prepend, run_blocks


@dataclass
class CLIPVisionConfig(TowerConfig):
    """`vision_config` of config.json: ViT's keys, where Hugging Face has other defaults."""

    hidden_act: str = "quick_gelu"  # OpenAI's; LAION's checkpoints say gelu
    layer_norm_eps: float = 1e-5
    patch_size: int = 32  # P
    model_type: str = "clip_vision_model"


@dataclass
class SigLIPVisionConfig(CLIPVisionConfig):
    """`vision_config` of SigLIP's config.json, with Hugging Face's defaults."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    patch_size: int = 16
    model_type: str = "siglip_vision_model"


@dataclass
class CLIPTextConfig:
    """`text_config` of config.json, with Hugging Face's defaults."""

    hidden_size: int = 512  # D
    num_hidden_layers: int = 12  # L
    num_attention_heads: int = 8  # H
    intermediate_size: int = 2048  # width inside the MLP
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    vocab_size: int = 49408  # V
    max_position_embeddings: int = 77  # longest text in tokens
    eos_token_id: int = 49407  # the token whose hidden state represents the text
    model_type: str = "clip_text_model"


class CLIPVision(VisionTower):
    """CLIP's vision tower: uint8 (B, 3, R, R) -> hidden states, each (B, S, D), S = 1 + N.

    from_pretrained reads a whole CLIP checkpoint, or one of the vision tower alone.
    """

    config_class = CLIPVisionConfig
    layouts = layouts.CLIP
    after_blocks = ("norm_post.",)

    def __init__(self, config, mean=None, std=None):
        # SigLIP has no class token and no pre-LayerNorm, but a bias in the patch embedding.
        has_class_token = self.num_prefix_tokens == 1
        super().__init__(config, mean, std, patch_bias=not has_class_token)
        c, D = config, config.hidden_size
        self.norm_pre = nn.Identity()
        if has_class_token:
            self.class_embedding = nn.Parameter(torch.empty(D).normal_(std=0.02))
            self.norm_pre = nn.LayerNorm(D, eps=c.layer_norm_eps)
        num_positions = self.num_prefix_tokens + (c.image_size // c.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(num_positions, D).normal_(std=0.02))
        self.blocks = make_blocks(c, c.intermediate_size)
        self.norm_post = nn.LayerNorm(D, eps=c.layer_norm_eps)

    def forward(self, pixels, layers=None):
        """Compute the hidden states of `layers` (see vit.run_blocks).

        hidden[0] is after the pre-LayerNorm; none is after the last LayerNorm. pixels: uint8
        (B, 3, R, R) -> list of (B, S, D). Raises InputError.
        """
        x = self.embed_patches(pixels)  # (B, N, D)
        if self.num_prefix_tokens:
            x = prepend(self.class_embedding.to(x.dtype)[None, None], x)
        x = x + self.position_embedding  # (B, S, D)
        return run_blocks(self.blocks, self.norm_pre(x), layers)


class SigLIPVision(CLIPVision):
    """SigLIP's vision tower, without its pooling head: uint8 (B, 3, R, R) -> each (B, N, D)."""

    num_prefix_tokens = 0
    config_class = SigLIPVisionConfig
    layouts = layouts.SIGLIP


class CLIPText(nn.Module):
    """CLIP's text tower: tokens (B, T) -> hidden states, each (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        D, length = c.hidden_size, c.max_position_embeddings
        self.token_embedding = nn.Embedding(c.vocab_size, D)
        self.position_embedding = nn.Parameter(torch.empty(length, D).normal_(std=0.02))
        self.blocks = make_blocks(c, c.intermediate_size)
        self.norm_final = nn.LayerNorm(D, eps=c.layer_norm_eps)

    def forward(self, tokens):
        """Compute all hidden states of texts of at most max_position_embeddings tokens."""
        positions = self.position_embedding[: tokens.shape[1]]  # (T, D)
        x = self.token_embedding(tokens) + positions  # (B, T, D)
        return run_blocks(self.blocks, x, is_causal=True)


class CLIP(Pretrained):
    """Both towers (.vision and .text) and their similarity."""

    save_pretrained = save_clip

    def __init__(self, vision_config, text_config, projection_dim=512, mean=None, std=None):
        super().__init__()
        self.vision = CLIPVision(vision_config, mean, std)
        self.text = CLIPText(text_config)
        self.visual_projection = nn.Linear(vision_config.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(text_config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # ln(1 / 0.07), as CLIP starts
        self.tokenizer = None  # from_pretrained sets it if there is a tokenizer.json

    def image_features(self, pixels):
        """Embed images: uint8 (B, 3, R, R) -> unit vectors (B, E)."""
        x = self.vision(pixels)[-1]  # (B, S, D)
        x = self.vision.norm_post(x[:, 0])
        return F.normalize(self.visual_projection(x), dim=-1)

    def text_features(self, tokens):
        """Embed texts: tokens (B, T), each row with an end-of-text token -> unit vectors (B, E)."""
        x = self.text.norm_final(self.text(tokens)[-1])  # (B, T, D)
        eos = self.text.config.eos_token_id
        # OpenAI's first configs state eos_token_id 2, which is wrong: it is the highest id
        scores = tokens if eos == 2 else (tokens == eos).int()
        end = scores.argmax(dim=-1)  # (B,), the first end token of each row
        rows = torch.arange(len(tokens), device=tokens.device)
        return F.normalize(self.text_projection(x[rows, end]), dim=-1)

    def tokenize(self, texts):
        """Encode a list of texts -> tokens (B, T), cut to the tower's length.

        Rows are padded with zeros, which causal attention never looks at. Raises InputError
        without a tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("this CLIP checkpoint has no tokenizer.json: it cannot read texts")
        self.tokenizer.enable_padding()
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        return torch.tensor(rows, device=self.logit_scale.device)

    def similarity(self, pixels, texts):
        """Compare images with texts -> logits (B, len(texts)); softmax classifies zero-shot."""
        images = self.image_features(pixels)
        texts = self.text_features(self.tokenize(texts))
        return self.logit_scale.exp() * images @ texts.T

    @classmethod
    def from_folder(cls, folder):
        """Build openai/clip-vit-*, laion/CLIP-* or a folder of that layout. Raises InputError."""
        clip = build_clip(cls, CLIPVisionConfig, CLIPTextConfig, folder)
        if (folder / "tokenizer.json").exists():
            clip.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            clip.tokenizer.enable_truncation(clip.text.config.max_position_embeddings)
        return clip

    def name_of(self, name):
        return our_name(layouts.WHOLE_CLIP, name)
