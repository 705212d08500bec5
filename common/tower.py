"""Vision towers in Hugging Face's layout: read and write checkpoint folders, check sizes, freeze.

LAYOUTS says for each model_type how its tensors and config are named there. Checkpoints:
google/vit-*, facebook/deit-*, timm/deit3_*, facebook/vit-mae-*, facebook/dinov2-*,
openai/clip-vit-*, laion/CLIP-*, google/siglip-*.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from common.errors import InputError
from common.hub import (
    fields_of,
    load_weights,
    locate,
    on_meta,
    read_config,
    read_statistics,
    save_checkpoint,
    tensor_files,
    write_json,
)
from common.images import OPENAI, Normalize

# mean and std of the pixels if a checkpoint gives none
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# our tensors and config keys that are not written
HEADS = ("classifier.", "distillation_classifier.", "num_labels", "distilled_head")


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

    def our_name(self, name):
        """Translate a checkpoint's tensor name into ours. None: a tensor that is not loaded."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        if name.startswith(self.ignored):
            return None
        for theirs, ours in self.names.items():
            name = name.replace(theirs, ours)
        if ".qkv." in name:
            # one matrix, which is cut into three
            return [name.replace("qkv", part) for part in "qkv"]
        return name

    def their_tensors(self, module):
        """Return a module's tensors under their names, without classification heads."""
        tensors = {}
        for name, tensor in module.state_dict().items():
            if not name.startswith(HEADS):
                for theirs, ours in reversed(self.names.items()):
                    name = name.replace(ours, theirs)
                tensors[self.saved_prefix + name] = tensor
        return tensors


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
VIT = Layout(
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
DINOV2 = Layout(
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
REGISTERS = {"num_register_tokens": 4, "patch_size": 16}
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
LAYOUTS = {
    "vit": VIT,
    "deit": replace(VIT, architecture="DeiTModel", statistics=IMAGENET),
    "vit_mae": replace(VIT, architecture="ViTMAEModel", statistics=IMAGENET),
    "deit3": DEIT3,
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(
        DINOV2, architecture="Dinov2WithRegistersModel", defaults=REGISTERS, fixed={}
    ),
    "clip": CLIP_VISION,
    "clip_vision_model": CLIP_VISION,
    "siglip": SIGLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
}


class PretrainedTower:
    """What a vision tower can do besides computing: read and write checkpoints, check, freeze."""

    config_class = None
    model_types = ()  # what the tower reads
    layouts = LAYOUTS  # model_type -> Layout; a tower may have its own
    any_resolution = False  # False: takes only the image_size of its config
    after_blocks = ()  # parameters that no hidden state depends on

    @property
    def layout(self):
        return self.layouts[self.config.model_type]

    def normalizer(self, mean, std):
        """Make the module that normalizes pixels; mean, std: None for the default."""
        default = self.layout.statistics
        return Normalize(mean or default[0], std or default[1])

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """Load a checkpoint folder or a Hugging Face id. Raises InputError."""
        folder = locate(folder_or_id)
        config, mean, std = cls.read(folder)
        with on_meta():
            tower = cls(fields_of(cls.config_class, config, folder), mean, std)
        return load_weights(tower, folder, tower.name_of, dtype, device).eval()

    @classmethod
    def read(cls, folder):
        """Read a checkpoint's config -> dict, and the mean and std of its pixels or None."""
        config = read_config(folder)
        if "architecture" in config and "deit3" in cls.model_types:
            from common import timm  # imported here: only DeiT III has this layout

            return timm.read(config, folder)
        kind = config.get("model_type")
        if kind not in cls.model_types:
            known = ", ".join(cls.model_types)
            raise InputError(f"{folder}: model_type {kind!r}: {cls.__name__} reads {known}")
        layout, names = cls.layouts[kind], tensor_files(folder)
        # the weights show whether there is a head; config.json omits the default, 2 classes
        is_distilled = "distillation_classifier.weight" in names
        has_head = is_distilled or "classifier.weight" in names
        config["num_labels"] = len(config.get("id2label", "ab")) if has_head else 0
        config["distilled_head"] = is_distilled
        config = layout.defaults | config.get("vision_config", config) | layout.fixed
        return config, *read_statistics(folder)

    def name_of(self, name):
        """Translate a checkpoint's tensor name into ours. None: a tensor that is not loaded."""
        return self.layout.our_name(name)

    def save_pretrained(self, folder):
        """Write weights, config and pixel statistics as transformers reads them."""
        save_checkpoint(folder, *hugging_face(self))
        save_processor(self, folder)

    def check_pixels(self, pixels):
        """Raise InputError unless pixels are uint8 (B, 3, R, R) of a size that this tower takes."""
        shape = tuple(pixels.shape)
        if pixels.dtype != torch.uint8 or shape[1:] != (3, shape[-1], shape[-1]):
            raise InputError(f"pixels should be uint8 (B, 3, R, R), got {pixels.dtype} {shape}")
        self.check_size(shape[-1])

    def check_size(self, side):
        """Raise InputError unless this tower takes images of side x side pixels."""
        R, P = self.config.image_size, self.config.patch_size
        name = type(self).__name__
        if self.any_resolution and (side % P or not side):
            raise InputError(f"image size {side}: should be a multiple of {name}'s patches of {P}")
        if not self.any_resolution and side != R:
            raise InputError(f"image size {side}: this {name} takes only {R}, as in its training")

    def freeze_above(self, deepest):
        """Set requires_grad to False for all parameters that hidden[deepest] does not depend on."""
        self.blocks[deepest:].requires_grad_(False)
        for name, parameter in self.named_parameters():
            if name.startswith(self.after_blocks):
                parameter.requires_grad_(False)


def hugging_face(tower):
    """Translate a vision tower into Hugging Face's layout -> ({name: tensor}, config dict).

    Raises InputError if transformers has no class for it.
    """
    layout = tower.layout
    if not layout.architecture:
        kind = tower.config.model_type
        raise InputError(f"a {kind} tower cannot be written: transformers has no class for it")
    config = {"architectures": [layout.architecture], "dtype": dtype_name(tower)} | layout.fixed
    for key, value in asdict(tower.config).items():
        if value is not None and key not in HEADS:
            config[key] = value
    return layout.their_tensors(tower), config


def dtype_name(module):
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def save_processor(tower, folder):
    """Write preprocessor_config.json: how images are resized, their mean and std."""
    R, processor = tower.config.image_size, tower.layout.processor
    square = {"height": R, "width": R}
    config = {
        "image_processor_type": processor,
        "size": {"shortest_edge": R} if processor == "CLIPImageProcessor" else square,
        "do_center_crop": True,
        "crop_size": square,
        "image_mean": tower.normalize.mean.flatten().tolist(),
        "image_std": tower.normalize.std.flatten().tolist(),
    }
    write_json(Path(folder) / "preprocessor_config.json", config)


# --- a whole CLIP ---

WHOLE_CLIP = Layout(
    names={"vision_model.": "vision.", "text_model.": "text."} | CLIP_NAMES,
    # constants in older files
    ignored=("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
)


def load_clip(cls, vision_class, text_class, folder, dtype, device):
    """Load a new `cls`, which clip.CLIP is, with configs of these classes. Raises InputError."""
    config = read_config(folder)
    if config.get("model_type") != "clip":
        raise InputError(f"{folder}: model_type {config.get('model_type')!r} is not clip")
    vision = fields_of(vision_class, config.get("vision_config", {}), folder)
    text = fields_of(text_class, config.get("text_config", {}), folder)
    with on_meta():
        clip = cls(vision, text, config.get("projection_dim", 512), *read_statistics(folder))
    return load_weights(clip, folder, WHOLE_CLIP.our_name, dtype, device).eval()


def save_clip(clip, folder):
    """Write a checkpoint that transformers reads as CLIPModel, without a tokenizer."""
    width = {"projection_dim": clip.visual_projection.out_features}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype_name(clip),
        "vision_config": asdict(clip.vision.config) | width,
        "text_config": asdict(clip.text.config) | width,
    }
    save_checkpoint(folder, WHOLE_CLIP.their_tensors(clip), config | width)
    save_processor(clip.vision, folder)
