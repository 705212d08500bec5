"""Write tests/fixtures/<variant>/: small random vision towers beside what transformers computes with them.

    pip install -r requirements-dev.txt && python tests/make_tower_fixtures.py

Each folder is a checkpoint (config.json and model.safetensors, in float16 to be small; its values are exact in float32)
and expected.safetensors, computed in float32. For every resolution R of the variant: `R.pixels` uint8 (B, 3, R, R) and
`R.hidden.0` to `R.hidden.L` (B, S, D), and where the variant has them `R.mask` (B, N) with `R.masked.i`, `R.logits`
(B, classes), and for CLIP `tokens` (B, T) with `text.i` (B, T, D) and `R.logits` (B, texts).
test_towers_live.py compares the same variants with fresh weights and pictures.
"""
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
VIT = dict(**SHAPE, intermediate_size=28, image_size=32, patch_size=8)
MAE = dict(**VIT, mask_ratio=0.0, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1,
           decoder_intermediate_size=8)
DINO = dict(**SHAPE, mlp_ratio=2, image_size=35, patch_size=7)
SIDES = (35, 28, 42)                                                 # the trained one, a smaller and a larger
TEXT = dict(**SHAPE, intermediate_size=28, vocab_size=61, max_position_embeddings=12, bos_token_id=59, eos_token_id=60)
LEGACY = TEXT | dict(bos_token_id=0, eos_token_id=2)                 # as in OpenAI's first configs; 60 still ends a text

# variant -> (model class, config class, settings, resolutions)
VARIANTS = {
    "vit": ("ViTForImageClassification", "ViTConfig", dict(**VIT, num_labels=5), (32,)),
    "vit_headless": ("ViTModel", "ViTConfig", dict(**VIT, qkv_bias=False), (32,)),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", dict(**VIT, num_labels=5), (32,)),
    "deit_one_head": ("DeiTForImageClassification", "DeiTConfig", VIT, (32,)),       # two classes: the config omits them
    "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", MAE, (32,)),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, SIDES),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", DINO | dict(use_swiglu_ffn=True), (35,)),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, SIDES),
    "dinov2_classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO, (35,)),
    "dinov2_registers_classifier": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                                    DINO | dict(num_register_tokens=2), (42,)),
    "clip": ("CLIPModel", "CLIPConfig", dict(vision_config=VIT, text_config=TEXT, projection_dim=16), (32,)),
    "clip_gelu_legacy": ("CLIPModel", "CLIPConfig", dict(
        vision_config=VIT | dict(hidden_act="gelu"), text_config=LEGACY | dict(hidden_act="gelu"), projection_dim=16), (32,)),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", VIT, (32,)),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", VIT, (32,)),
    "siglip": ("SiglipModel", "SiglipConfig", dict(vision_config=VIT, text_config=TEXT), (32,)),
    "deit_plain": ("ViTForImageClassification", "ViTConfig", dict(**VIT, num_labels=3), (32,)),     # without distillation: a ViT
    # transformers has no DeiT III; its DINOv2 without a position for the class token is the same network, save for the names
    "deit3": ("Dinov2Model", "Dinov2Config", dict(**SHAPE, mlp_ratio=4, image_size=32, patch_size=8), (32,)),
    "clip_laion": ("CLIPModel", "CLIPConfig", dict(                                  # towers of two widths, and exact GELU
        vision_config=VIT | dict(hidden_act="gelu", hidden_size=24), text_config=TEXT | dict(hidden_act="gelu"),
        projection_dim=20), (32,)),
    "siglip2": ("SiglipModel", "SiglipConfig", dict(             # as so400m: the patches do not fill the picture (384 / 14)
        vision_config=VIT | dict(image_size=35, intermediate_size=34), text_config=TEXT | dict(vocab_size=90)), (35,)),
}
LIVE_ONLY = ("dinov2_registers_classifier", "siglip")                # the recorded ones are enough to tell these


def build(variant, seed, dtype=torch.float32):
    """transformers' model of a variant, in float32, with weights rounded through `dtype`. The weights are so large that
    every part changes the result by far more than the tests' tolerance: norms, LayerScale and biases are not trivial,
    attention is far from uniform."""
    model_class, config_class, settings, _ = VARIANTS[variant]
    config = getattr(transformers, config_class)(**settings)
    config._attn_implementation = "eager"                            # explicit products, so not what vit.py calls
    model = getattr(transformers, model_class)(config).eval()
    model.variant = variant
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = name.endswith("weight") and parameter.dim() == 1 or "lambda1" in name
            weight = parameter if name == "logit_scale" else 1 + 0.2 * noise if around_one else 0.2 * noise
            parameter.copy_(weight.to(dtype))
        if variant == "deit3":
            model.embeddings.position_embeddings[:, 0] = 0
            model.head = torch.nn.Linear(16, 4)                      # read off the class token, which Dinov2Model leaves to others
            model.head.weight.copy_((0.2 * torch.randn(4, 16, generator=generator)).to(dtype))
            model.head.bias.copy_((0.2 * torch.randn(4, generator=generator)).to(dtype))
    return model


def save(model, folder, dtype=torch.float32):
    """The checkpoint as transformers writes it. A vision-only one gets its older layout, in which every name begins with
    `vision_model.`: the hub's checkpoints have it, new files lack it."""
    model.to(dtype).save_pretrained(folder)
    if model.variant == "deit3":
        save_as_timm(folder)
    if model.variant == "deit_plain":                                # a ViT, but with ImageNet's statistics
        stated = dict(zip(("image_mean", "image_std"), statistics("deit_plain")))
        (folder / "preprocessor_config.json").write_text(json.dumps(stated) + "\n")
    if type(model).__name__ == "CLIPVisionModel":
        tensors = load_file(folder / "model.safetensors")
        tensors = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]     # a constant that old files carry
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.float()


def save_as_timm(folder):
    """A folder that transformers wrote, rewritten as timm's releases of DeiT III are."""
    theirs, tensors = load_file(folder / "model.safetensors"), {}
    names = {"embeddings.cls_token": "cls_token", "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
             "encoder.layer.": "blocks.", "attention.output.dense.": "attn.proj.", "layer_scale1.lambda1": "ls1.gamma",
             "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm."}
    for name, tensor in theirs.items():
        if name == "embeddings.position_embeddings":
            tensors["pos_embed"] = tensor[:, 1:].contiguous()
        elif "attention.attention.query" in name:
            parts = [theirs[name.replace("query", part)] for part in ("query", "key", "value")]
            tensors[name.replace("encoder.layer", "blocks").replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        elif "attention.attention." not in name and "mask_token" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = dict(embed_dim=16, depth=3, num_heads=2, img_size=32, patch_size=8)
    mean, std = statistics("deit3")
    (folder / "config.json").write_text(json.dumps(dict(
        architecture="deit3_small_patch16_224", num_classes=4, num_features=16, model_args=arguments,
        pretrained_cfg=dict(input_size=[3, 32, 32], mean=mean, std=std, interpolation="bicubic"))))


def statistics(variant):
    """Mean and deviation of the variant's pictures, as its papers and the hub's preprocessors have them."""
    if variant.startswith("clip"):
        return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    half = variant.startswith(("vit", "siglip"))
    return ((0.5,) * 3, (0.5,) * 3) if half else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def reference(variant, model, seed, batch=2):
    """What transformers says about fresh pictures (and texts): {name: tensor}, see the top of the file."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in statistics(variant))
    tower = getattr(model, "vision_model", None) or getattr(model, model.base_model_prefix, model)
    expected = {}
    for side in VARIANTS[variant][3]:
        pixels = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
        values = (pixels / 255 - mean) / std
        options = dict(output_hidden_states=True)
        if variant == "mae":                                         # keep every patch, in its order
            options["noise"] = torch.arange(16.0).expand(batch, -1)
        expected[f"{side}.pixels"] = pixels
        for i, hidden in enumerate(tower(values, **options).hidden_states):
            expected[f"{side}.hidden.{i}"] = hidden
        if variant in ("dinov2", "dinov2_registers") and side == SIDES[1]:
            mask = expected[f"{side}.mask"] = torch.rand(batch, (side // 7) ** 2, generator=generator) < 0.4
            for i, hidden in enumerate(tower(values, bool_masked_pos=mask, **options).hidden_states):
                expected[f"{side}.masked.{i}"] = hidden
        if variant in ("vit", "deit_plain", "deit", "deit_one_head"):
            expected[f"{side}.logits"] = model(values).logits
        if variant == "deit3":
            expected[f"{side}.logits"] = model.head(model(values).last_hidden_state[:, 0])
        if variant in ("clip", "clip_gelu_legacy", "clip_laion"):
            tokens = torch.randint(3, 59, (3, 9), generator=generator)
            tokens[:, 0] = 59
            for row, end in zip(tokens, (8, 5, 3)):                  # texts of three lengths, filled up with their end
                row[end:] = 60
            expected["tokens"] = tokens
            for i, hidden in enumerate(model.text_model(tokens, output_hidden_states=True).hidden_states):
                expected[f"text.{i}"] = hidden
            expected[f"{side}.logits"] = model(tokens, values).logits_per_image
    return {name: tensor.contiguous() for name, tensor in expected.items()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed, variant in enumerate(name for name in VARIANTS if name not in LIVE_ONLY):
        folder = ROOT / "tests" / "fixtures" / variant
        shutil.rmtree(folder, ignore_errors=True)
        model = build(variant, seed, torch.float16)
        expected = reference(variant, model, 100 + seed)
        save(model, folder, torch.float16)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(expected, folder / "expected.safetensors")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{variant:20} {size / 1000:6.1f} kB  {len(expected)} tensors")
