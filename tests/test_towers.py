"""ViT, DINOv2, CLIP and SigLIP against what transformers computed (make_tower_fixtures.py)."""

import re

import pytest
import torch
from conftest import ROOT, recorded, refused, relative_error
from safetensors.torch import load_file
from tower_outputs import CLASSES, outputs, random_pixels

from clip import CLIP, CLIPVision, CLIPVisionConfig, SigLIPVision
from common.images import ImageSpec
from dinov2 import DINOv2, DINOv2Config
from vit import ViT, ViTConfig

# float32 parity; another order of summation gives about 1e-7
TOLERANCE = 1e-5
SHAPE = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
SIDE = dict(image_size=32, patch_size=8)
FIXTURES = ROOT / "tests" / "fixtures"
RECORDED = [p.name for p in sorted(FIXTURES.iterdir()) if p.is_dir() and p.name[:3] in CLASSES]


def new_towers():
    """One small tower of each class with random weights, all with 4 x 4 patches of 8."""
    torch.manual_seed(0)
    dino = DINOv2Config(**SHAPE, **SIDE, mlp_ratio=2, num_register_tokens=2)
    return [
        ViT(ViTConfig(**SHAPE, **SIDE, num_labels=3)).eval(),
        DINOv2(dino).eval(),
        CLIPVision(CLIPVisionConfig(**SHAPE, **SIDE)).eval(),
        SigLIPVision(SigLIPVision.config_class(**SHAPE, **SIDE)).eval(),
    ]


@pytest.mark.parametrize("variant", RECORDED)
def test_every_hidden_state_and_logit_equals_transformers(variant):
    folder, expected = recorded(variant)
    for name, output in outputs(variant, folder, expected).items():
        assert relative_error(output, expected[name]) < TOLERANCE, name


@torch.no_grad()
def test_layers_come_in_the_order_asked_and_a_range_is_their_mean():
    for tower in new_towers():
        for dtype in (torch.float32, torch.bfloat16):
            every = tower.to(dtype)(random_pixels(32))
            layers = [3, range(0, 2), 1, range(2, 5), 3, range(1, 2)]
            for layer, state in zip(layers, tower(random_pixels(32), layers), strict=True):
                group = layer if isinstance(layer, range) else [layer]
                mean = torch.stack([every[i] for i in group]).float().mean(0).to(dtype)
                assert state.dtype == dtype and relative_error(state, mean) < 1e-6
    for wrong in ([-1], [5], [range(-1, 2)], [1, range(3, 6)]):
        with refused():
            tower(random_pixels(32), wrong)


def test_freeze_above_freezes_what_a_hidden_state_does_not_depend_on():
    for deepest in (0, 2, 4):
        for tower in new_towers():
            tower.freeze_above(deepest)
            frozen = {n for n, p in tower.named_parameters() if not p.requires_grad}
            tower.requires_grad_(True)
            tower(random_pixels(32), [deepest])[0].square().sum().backward()
            unused = {n for n, p in tower.named_parameters() if p.grad is None}
            assert frozen == unused, type(tower)


def test_towers_take_their_own_resolution_and_dinov2_any_multiple_of_its_patches():
    for tower in new_towers():
        tower.check_size(32)
        if tower.any_resolution:
            assert tower(random_pixels(40))[0].shape[1] == 3 + (40 // 8) ** 2
        else:
            with refused("40"):
                tower.check_size(40)
        for shape in ((2, 3, 36, 36), (2, 3, 0, 0), (2, 3, 32, 40), (3, 32, 32), (2, 1, 32, 32)):
            with refused():
                tower(torch.zeros(shape, dtype=torch.uint8))


@torch.no_grad()
def test_similarity_is_the_scaled_cosine_and_does_not_depend_on_the_other_texts():
    texts, pixels = ["a red circle", "two dogs on a sofa", "a"], random_pixels(64)
    clip = CLIP.from_pretrained(ROOT / "weights" / "clip")
    logits = clip.similarity(pixels, texts)
    images, features = clip.image_features(pixels), clip.text_features(clip.tokenize(texts))
    cosines = torch.cosine_similarity(images[:, None], features[None], dim=-1)
    assert logits.shape == (2, 3)
    assert relative_error(logits, cosines * clip.logit_scale.exp()) < TOLERANCE
    for i, text in enumerate(texts):
        assert relative_error(clip.similarity(pixels, [text])[:, 0], logits[:, i]) < TOLERANCE
    # a text that is too long is cut, and keeps its end
    tokens = clip.tokenize(["a " * 300, "a"])
    assert tokens.shape == (2, 64) and tokens[0, -1] == 3
    clip.tokenizer = None
    with refused("tokenizer.json"):
        clip.similarity(pixels, texts)


# --- load and save ---

LEFT_OUT = ("classifier", "decoder", "pooler", "head", "position_ids", "text", "logit_")


def tensors_of(folder):
    """Read tensors under their names without the prefixes that only some files have."""
    tensors = load_file(folder / "model.safetensors")
    prefix = r"^(vit|deit|dinov2|vision_model)\."
    return {re.sub(prefix, "", name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", [name for name in RECORDED if name != "deit3"])
def test_saving_gives_back_the_checkpoint_and_its_pixel_statistics(variant, tmp_path):
    tower_class = CLASSES[variant[:3]]
    folder, expected = recorded(variant)
    loaded_class = CLIP if "tokens" in expected else tower_class
    model = loaded_class.from_pretrained(folder, dtype=torch.float16)
    tower = getattr(model, "vision", model)
    tower.normalize.mean[0] = 0.125
    model.save_pretrained(tmp_path)
    saved = tensors_of(tmp_path)
    for name, tensor in tensors_of(folder).items():
        if name in saved:
            assert torch.equal(saved.pop(name), tensor), name
        else:
            assert loaded_class is not CLIP and any(part in name for part in LEFT_OUT), name
    assert not saved
    again = tower_class.from_pretrained(tmp_path)
    headless = {"num_labels": 0, "distilled_head": False} if tower_class is ViT else {}
    assert vars(again.config) == vars(tower.config) | headless
    spec = ImageSpec.from_folder(tmp_path)
    assert spec.size == tower.config.image_size and spec.mean[0] == 0.125
    assert again.normalize.mean[0] == 0.125
    assert spec.mode == ("crop" if tower_class in (CLIPVision, DINOv2) else "stretch")


def test_another_kind_of_checkpoint_is_an_error(tmp_path):
    wrong = [(ViT, "clip"), (DINOv2, "vit"), (SigLIPVision, "clip")]
    for tower_class, variant in [*wrong, (CLIPVision, "siglip_vision")]:
        with refused("model_type"):
            tower_class.from_pretrained(recorded(variant)[0])
    with refused("deit3"):
        ViT.from_pretrained(recorded("deit3")[0]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_base"}')
    with refused("vit_base"):
        ViT.from_pretrained(tmp_path)
    with refused("swish"):
        ViT(ViTConfig(hidden_act="swish"))
