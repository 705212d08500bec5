"""What differs between checkpoints: names of tensors and config keys, by model_type.

Checkpoints: google/vit-*, facebook/deit-*, timm/deit3_*, facebook/vit-mae-*, facebook/dinov2-*,
openai/clip-vit-*, laion/CLIP-*, google/siglip-*.
"""

from dataclasses import dataclass, field, replace

# mean and std of the pixels
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of one model_type are written."""

    architecture: str = ""  # transformers' class of the tower; none: it cannot be written
    processor: str = "CLIPImageProcessor"  # transformers' class that prepares images
    statistics: tuple = IMAGENET  # mean and std of the pixels if the checkpoint gives none
    names: dict = field(default_factory=dict)  # their part of a tensor name -> ours
    prefixes: tuple = ()  # beginnings of their tensor names that are dropped
    ignored: tuple = ()  # their tensors that are not loaded
    saved_prefix: str = ""  # beginning of the tensor names that are written
    defaults: dict = field(default_factory=dict)  # config keys, where ours differ from theirs
    fixed: dict = field(default_factory=dict)  # config keys with only one value


VIT_NAMES = {
    "embeddings.patch_embeddings.projection.": "patch.",
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "position_embeddings",
    "encoder.layer.": "blocks.",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm.": "norm.",
}
CLIP_NAMES = {
    "embeddings.patch_embedding.": "patch.",
    "embeddings.position_embedding.weight": "position_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.class_embedding": "class_embedding",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm_post",
    "final_layer_norm": "norm_final",
    "encoder.layers.": "blocks.",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
}
PLAIN_VIT = Layout(
    "ViTModel",
    "ViTImageProcessor",
    HALF,
    VIT_NAMES
    | {
        "embeddings.distillation_token": "distillation_token",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "cls_classifier": "classifier",
    },
    prefixes=("vit.", "deit."),
    # MAE's decoder, and poolers, which are not trained
    ignored=("decoder.", "pooler."),
)
# timm's names; timm.py reads its config
DEIT3 = Layout(
    names={
        "patch_embed.proj.": "patch.",
        "pos_embed": "position_embeddings",
        "ls1.gamma": "scale1.gamma",
        "ls2.gamma": "scale2.gamma",
        "head.": "classifier.",
    },
    prefixes=("timm_model.",),
)
PLAIN_DINOV2 = Layout(
    "Dinov2Model",
    names=VIT_NAMES
    | {
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "register_tokens",
        "layer_scale1.lambda1": "scale1.gamma",
        "layer_scale2.lambda1": "scale2.gamma",
    },
    prefixes=("dinov2.", "dinov2_with_registers."),
    ignored=("classifier.",),
    fixed={"num_register_tokens": 0},
)
CLIP_VISION = Layout(
    "CLIPVisionModel",
    statistics=OPENAI,
    names=CLIP_NAMES,
    prefixes=("vision_model.",),
    saved_prefix="vision_model.",
    # the rest of a whole checkpoint, SigLIP's pooling head, and a constant in older files
    ignored=(
        "text_model.",
        "visual_projection.",
        "text_projection.",
        "logit_scale",
        "logit_bias",
        "head.",
        "embeddings.position_ids",
    ),
)
SIGLIP_VISION = replace(
    CLIP_VISION,
    architecture="SiglipVisionModel",
    processor="SiglipImageProcessor",
    statistics=HALF,
    fixed={"vision_use_head": False},
)
WHOLE_CLIP = Layout(
    names={"vision_model.": "vision.", "text_model.": "text."} | CLIP_NAMES,
    # constants in older files
    ignored=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
)

# for each class of tower: model_type -> Layout
VIT = {
    "vit": PLAIN_VIT,
    "deit": replace(PLAIN_VIT, architecture="DeiTModel", statistics=IMAGENET),
    "deit3": DEIT3,
    "vit_mae": replace(PLAIN_VIT, architecture="ViTMAEModel", statistics=IMAGENET),
}
DINOV2 = {
    "dinov2": PLAIN_DINOV2,
    "dinov2_with_registers": replace(
        PLAIN_DINOV2,
        architecture="Dinov2WithRegistersModel",
        defaults={"num_register_tokens": 4, "patch_size": 16},
        fixed={},
    ),
}
CLIP = {"clip": CLIP_VISION, "clip_vision_model": CLIP_VISION}
SIGLIP = {"siglip": SIGLIP_VISION, "siglip_vision_model": SIGLIP_VISION}

# --- LLMs ---

# The values that transformers takes for keys that config.json lacks.
LLAMA = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
