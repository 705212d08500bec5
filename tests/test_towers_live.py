"""ViT, DINOv2, CLIP and SigLIP beside transformers itself: fresh weights, fresh pictures, every variant, both directions.

The recorded tests hold the same where transformers is not installed; requirements-dev.txt installs it.
"""
import shutil

import pytest

transformers = pytest.importorskip("transformers")

import make_tower_fixtures
import torch
from conftest import relative_error
from make_tower_fixtures import VARIANTS, build, reference, save
from safetensors.torch import load_file, save_file

from clip import CLIP, CLIPTextConfig, CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from dinov2 import DINOv2, DINOv2Config
from vit import ViT, ViTConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5     # float32 parity as the project promises it; other orders of summation give about 1e-7


def tower_class(variant):
    return {"vit": ViT, "dei": ViT, "mae": ViT, "din": DINOv2, "cli": CLIPVision, "sig": SigLIPVision}[variant[:3]]


def logits_of(clip, pixels, tokens):
    return clip.logit_scale.exp() * clip.image_features(pixels) @ clip.text_features(tokens).T


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_hidden_state_and_logit_equals_transformers(variant, tmp_path):
    seed = 1000 + list(VARIANTS).index(variant)
    model = build(variant, seed)
    save(model, tmp_path)
    tower = tower_class(variant).from_pretrained(tmp_path)
    expected = reference(variant, model, seed, batch=3)
    clip = CLIP.from_pretrained(tmp_path) if "tokens" in expected else None
    for name, theirs in expected.items():
        side, kind, *index = name.split(".") if "." in name else (None, name)
        if side == "text":
            ours = clip.text(expected["tokens"])[int(kind)]
        elif kind == "hidden":
            ours = tower(expected[f"{side}.pixels"])[int(index[0])]
        elif kind == "masked":
            ours = tower(expected[f"{side}.pixels"], mask=expected[f"{side}.mask"])[int(index[0])]
        elif kind == "logits" and clip:
            ours = logits_of(clip, expected[f"{side}.pixels"], expected["tokens"])
        elif kind == "logits":
            ours = tower.classify(expected[f"{side}.pixels"])
        else:
            continue                                                 # an input
        assert relative_error(ours, theirs) < TOLERANCE, name


@torch.no_grad()
def test_similarity_equals_transformers_with_the_real_tokenizer(real, tmp_path, monkeypatch):
    """Pictures and texts all the way: OpenAI's vocabulary, legacy eos_token_id 2, texts of several lengths, one too long."""
    text = make_tower_fixtures.LEGACY | dict(vocab_size=49408, max_position_embeddings=77)
    settings = dict(vision_config=make_tower_fixtures.VIT, text_config=text, projection_dim=16)
    monkeypatch.setitem(VARIANTS, "clip_real", ("CLIPModel", "CLIPConfig", settings, (32,)))
    model = build("clip_real", 7)
    save(model, tmp_path)
    shutil.copy(real / "tokenizers" / "clip" / "tokenizer.json", tmp_path)
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a photo of a cat", "Two dogs, asleep on the RED sofa!", "", "naïve café 東京", "very " * 200 + "long"]
    tokens = words(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    clip = CLIP.from_pretrained(tmp_path)
    theirs = model(tokens["input_ids"], clip.vision.normalize(pixels, torch.float32), tokens["attention_mask"]).logits_per_image
    ours = clip.similarity(pixels, texts)
    assert relative_error(ours, theirs) < TOLERANCE
    assert ours.std() > 1                                            # they differ between texts by far more than that


def loads_without_complaint(model_class, folder):
    model, report = getattr(transformers, model_class).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report                          # missing, unexpected or mismatched keys
    return model.eval()


@pytest.mark.parametrize("registers, swiglu", [(0, False), (0, True), (3, False)])
@torch.no_grad()
def test_transformers_loads_what_dinov2_saves(registers, swiglu, tmp_path):
    torch.manual_seed(0)
    tower = DINOv2(DINOv2Config(**make_tower_fixtures.DINO, num_register_tokens=registers, use_swiglu_ffn=swiglu)).eval()
    tower.save_pretrained(tmp_path)
    model = loads_without_complaint("Dinov2WithRegistersModel" if registers else "Dinov2Model", tmp_path)
    pixels = torch.randint(0, 256, (2, 3, 42, 42), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    theirs = model(tower.normalize(pixels, torch.float32)).last_hidden_state
    assert relative_error(tower.norm(tower(pixels)[-1]), theirs) < TOLERANCE
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is type(model)


@torch.no_grad()
def test_transformers_loads_what_clip_saves(tmp_path):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=28, hidden_act="gelu")
    clip = CLIP(CLIPVisionConfig(**shape, image_size=32, patch_size=8),
                CLIPTextConfig(**shape, vocab_size=61, max_position_embeddings=12, eos_token_id=60), projection_dim=8).eval()
    clip.save_pretrained(tmp_path)
    model = loads_without_complaint("CLIPModel", tmp_path)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tokens = torch.tensor([[59, 4, 5, 60], [59, 7, 60, 60]])
    theirs = model(tokens, clip.vision.normalize(pixels, torch.float32)).logits_per_image
    assert relative_error(logits_of(clip, pixels, tokens), theirs) < TOLERANCE


@pytest.mark.parametrize("variant", ["vit", "deit", "dinov2_swiglu", "clip"])
@torch.no_grad()
def test_shards_that_transformers_writes_load_like_one_file(variant, tmp_path):
    model = build(variant, 3)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = (tower_class(variant).from_pretrained(tmp_path / name) for name in ("whole", "shards"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), shards.parameters(), strict=True))


@torch.no_grad()
def test_a_clip_vision_tower_loads_from_all_layouts_of_its_file(tmp_path):
    """Names with `vision_model.` (the hub), without it (transformers 5 writes some so), and a whole CLIP's."""
    model = build("clip_vision", 5)
    save(model, tmp_path)
    old = CLIPVision.from_pretrained(tmp_path)
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    new = CLIPVision.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    today = CLIPVision.from_pretrained(tmp_path)
    for parameters in zip(old.parameters(), new.parameters(), today.parameters(), strict=True):
        assert torch.equal(parameters[0], parameters[1]) and torch.equal(parameters[0], parameters[2])


@torch.no_grad()
def test_the_papers_resolution_equals_transformers(tmp_path, monkeypatch):
    """518 to 336 with patches of 14, for the tower without registers and the antialiased one with them."""
    shape = make_tower_fixtures.DINO | dict(image_size=518, patch_size=14, num_hidden_layers=1)
    for name in ("dinov2", "dinov2_registers"):
        monkeypatch.setitem(VARIANTS, name, (*VARIANTS[name][:2], shape, (336,)))
        model = build(name, 11)
        save(model, tmp_path)
        expected = reference(name, model, 11, batch=1)
        hidden = DINOv2.from_pretrained(tmp_path)(expected["336.pixels"])
        assert all(relative_error(state, expected[f"336.hidden.{i}"]) < TOLERANCE for i, state in enumerate(hidden))


@pytest.mark.parametrize("ours, theirs", [
    (ViTConfig, "ViTConfig"), (ViTConfig, "DeiTConfig"), (ViTConfig, "ViTMAEConfig"), (DINOv2Config, "Dinov2Config"),
    (CLIPVisionConfig, "CLIPVisionConfig"), (CLIPTextConfig, "CLIPTextConfig"), (SigLIPVisionConfig, "SiglipVisionConfig")])
def test_keys_that_a_config_json_omits_have_the_defaults_of_transformers(ours, theirs):
    """A config.json of the hub leaves out whatever is a default of its class, in nested configurations above all."""
    ours, theirs = ours(), getattr(transformers, theirs)()
    own = {"model_type", "num_labels", "distilled_head", "num_register_tokens"}      # not read from there, or not a key there
    different = {key: (value, getattr(theirs, key)) for key, value in vars(ours).items()
                 if key not in own and value != getattr(theirs, key)}
    assert not different
