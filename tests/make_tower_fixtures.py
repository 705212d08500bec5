"""Write tests/fixtures/<variant>/: small random vision towers and transformers' outputs.

    pip install -r requirements-dev.txt && python tests/make_tower_fixtures.py

Each folder is a checkpoint (config.json and model.safetensors in float16, whose values are exact in
float32) and expected.safetensors, computed in float32. For every resolution R of the variant:
`R.pixels` uint8 (B, 3, R, R) and `R.hidden.0` to `R.hidden.L` (B, S, D). Some variants also have:
`R.mask` (B, N) with `R.masked.i`, `R.logits` (B, classes). For CLIP: `tokens` (B, T) with `text.i`
(B, T, D) and `R.logits` (B, texts).
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
GELU = dict(hidden_act="gelu")
VIT = dict(**SHAPE, intermediate_size=28, image_size=32, patch_size=8)
DECODER = ("hidden_size", 8), ("num_hidden_layers", 1), ("num_attention_heads", 1)
MAE = VIT | {f"decoder_{key}": value for key, value in DECODER}
MAE |= dict(mask_ratio=0.0, decoder_intermediate_size=8)
DINO = dict(**SHAPE, mlp_ratio=2, image_size=35, patch_size=7)
# transformers has no DeiT III; its DINOv2 without a position for the class token is the same
# network under other names
DEIT3 = dict(**SHAPE, mlp_ratio=4, image_size=32, patch_size=8)
SIDES = (35, 28, 42)  # the trained one, a smaller and a larger
TEXT = dict(**SHAPE, intermediate_size=28, vocab_size=61, max_position_embeddings=12)
TEXT |= dict(bos_token_id=59, eos_token_id=60)
# as in OpenAI's first configs; 60 still ends a text
LEGACY = TEXT | dict(bos_token_id=0, eos_token_id=2)
# as so400m: the patches do not fill the image (384 / 14)
SIGLIP2 = VIT | dict(image_size=35, intermediate_size=34)
TEACHER, CLASSIFIER = "ForImageClassificationWithTeacher", "ForImageClassification"


def both(vision, text, **options):
    return dict(vision_config=vision, text_config=text, **options)


OLD_CLIP = both(VIT | GELU, LEGACY | GELU, projection_dim=16)
# towers of two widths, and exact GELU
LAION = both(VIT | GELU | dict(hidden_size=24), TEXT | GELU, projection_dim=20)
# variant -> (begin of the config class, rest of the model class, settings, resolutions)
VARIANTS = {
    "vit": ("ViT", CLASSIFIER, dict(**VIT, num_labels=5), (32,)),
    "vit_headless": ("ViT", "Model", dict(**VIT, qkv_bias=False), (32,)),
    "deit": ("DeiT", TEACHER, dict(**VIT, num_labels=5), (32,)),
    # two classes: the config omits them
    "deit_one_head": ("DeiT", CLASSIFIER, VIT, (32,)),
    "mae": ("ViTMAE", "ForPreTraining", MAE, (32,)),
    "dinov2": ("Dinov2", "Model", DINO, SIDES),
    "dinov2_swiglu": ("Dinov2", "Model", DINO | dict(use_swiglu_ffn=True), (35,)),
    "dinov2_registers": ("Dinov2WithRegisters", "Model", DINO, SIDES),
    "dinov2_classifier": ("Dinov2", CLASSIFIER, DINO, (35,)),
    "clip": ("CLIP", "Model", both(VIT, TEXT, projection_dim=16), (32,)),
    "clip_gelu_legacy": ("CLIP", "Model", OLD_CLIP, (32,)),
    "clip_vision": ("CLIPVision", "Model", VIT, (32,)),
    "siglip_vision": ("SiglipVision", "Model", VIT, (32,)),
    # DeiT without distillation is a ViT
    "deit_plain": ("ViT", CLASSIFIER, dict(**VIT, num_labels=3), (32,)),
    "deit3": ("Dinov2", "Model", DEIT3, (32,)),
    "clip_laion": ("CLIP", "Model", LAION, (32,)),
    "siglip2": ("Siglip", "Model", both(SIGLIP2, TEXT | dict(vocab_size=90)), (35,)),
}


def build(variant, seed, dtype=torch.float32):
    """Build transformers' model of a variant in float32, with weights rounded through `dtype`.

    The weights are so large that every part changes the result by far more than the tests'
    tolerance: norms, LayerScale and biases are not trivial, attention is far from uniform.
    """
    kind, rest, settings, _ = VARIANTS[variant]
    config = getattr(transformers, kind + "Config")(**settings)
    # explicit matmuls, so not what vit.py calls
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + rest)(config).eval()
    model.variant = variant
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith("weight") and parameter.dim() == 1 or "lambda1" in name
            if name != "logit_scale":
                parameter.copy_(around_one + 0.2 * noise)
            parameter.copy_(parameter.to(dtype))
        if variant == "deit3":
            model.embeddings.position_embeddings[:, 0] = 0
            # Dinov2Model has no head
            model.head = torch.nn.Linear(16, 4)
            for parameter in model.head.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((0.2 * noise).to(dtype))
    return model


def save(model, folder, dtype=torch.float32):
    """Write the checkpoint as transformers does.

    A vision-only one gets its older layout, in which every name begins with `vision_model.`: the
    hub's checkpoints have it, new files lack it.
    """
    model.to(dtype).save_pretrained(folder)
    if model.variant == "deit3":
        save_as_timm(folder)
    if model.variant == "deit_plain":
        # a ViT, but with ImageNet's statistics
        mean, std = statistics("deit_plain")
        stated = dict(image_mean=mean, image_std=std)
        (folder / "preprocessor_config.json").write_text(json.dumps(stated) + "\n")
    if type(model).__name__ == "CLIPVisionModel":
        tensors = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
        tensors = {f"vision_model.{name}": tensor for name, tensor in bare.items()}
        # a constant in old files
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.float()


def save_as_timm(folder):
    """Rewrite a folder of transformers as timm's releases of DeiT III."""
    theirs, tensors = load_file(folder / "model.safetensors"), {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "encoder.layer.": "blocks.",
        "attention.output.dense.": "attn.proj.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm.": "norm.",
        "attention.attention.query": "attn.qkv",
    }
    for name, tensor in theirs.items():
        if name == "embeddings.position_embeddings":
            tensors["pos_embed"] = tensor[:, 1:].contiguous()
        elif not any(part in name for part in ("attention.key", "attention.value", "mask_token")):
            if "attention.query" in name:
                parts = [theirs[name.replace("query", part)] for part in ("query", "key", "value")]
                tensor = torch.cat(parts)
            for old, new in names.items():
                name = name.replace(old, new)
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = statistics("deit3")
    config = dict(architecture="deit3_small_patch16_224", num_classes=4)
    config["model_args"] = dict(embed_dim=16, depth=3, num_heads=2, img_size=32, patch_size=8)
    config["pretrained_cfg"] = dict(mean=mean, std=std)
    (folder / "config.json").write_text(json.dumps(config))


def statistics(variant):
    """Return the pixel mean and std of a variant, as the hub's preprocessors have them."""
    if variant.startswith("clip"):
        return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    half = variant.startswith(("vit", "siglip"))
    return ((0.5,) * 3, (0.5,) * 3) if half else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def reference(variant, model, seed, batch=2):
    """Compute transformers' outputs on new images (and texts) -> {name: tensor}, see above."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in statistics(variant))
    tower = getattr(model, "vision_model", None) or getattr(model, model.base_model_prefix, model)
    expected = {}
    for side in VARIANTS[variant][3]:
        shape = (batch, 3, side, side)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        values = (pixels / 255 - mean) / std
        options = dict(output_hidden_states=True)
        if variant == "mae":
            # keep every patch, in its order
            options["noise"] = torch.arange(16.0).expand(batch, -1)
        expected[f"{side}.pixels"] = pixels
        states = tower(values, **options).hidden_states
        expected |= {f"{side}.hidden.{i}": hidden for i, hidden in enumerate(states)}
        if variant in ("dinov2", "dinov2_registers") and side == SIDES[1]:
            mask = torch.rand(batch, (side // 7) ** 2, generator=generator) < 0.4
            expected[f"{side}.mask"] = mask
            states = tower(values, bool_masked_pos=mask, **options).hidden_states
            expected |= {f"{side}.masked.{i}": hidden for i, hidden in enumerate(states)}
        if variant in ("vit", "deit_plain", "deit", "deit_one_head"):
            expected[f"{side}.logits"] = model(values).logits
        if variant == "deit3":
            expected[f"{side}.logits"] = model.head(model(values).last_hidden_state[:, 0])
        if variant in ("clip", "clip_gelu_legacy", "clip_laion"):
            tokens = torch.randint(3, 59, (3, 9), generator=generator)
            tokens[:, 0] = 59
            # texts of three lengths, padded with their end token
            for row, end in zip(tokens, (8, 5, 3), strict=True):
                row[end:] = 60
            expected["tokens"] = tokens
            states = model.text_model(tokens, output_hidden_states=True).hidden_states
            expected |= {f"text.{i}": hidden for i, hidden in enumerate(states)}
            expected[f"{side}.logits"] = model(tokens, values).logits_per_image
    return {name: tensor.contiguous() for name, tensor in expected.items()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed, variant in enumerate(VARIANTS):
        folder = ROOT / "tests" / "fixtures" / variant
        shutil.rmtree(folder, ignore_errors=True)
        model = build(variant, seed, torch.float16)
        expected = reference(variant, model, 100 + seed)
        save(model, folder, torch.float16)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(expected, folder / "expected.safetensors")
        print(f"{variant:20} {len(expected)} tensors")
