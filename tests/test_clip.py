"""CLIP's towers, their similarity and SigLIP against what transformers computed (tests/make_tower_fixtures.py)."""
import json
import math
import shutil

import pytest
import torch
from conftest import recorded, relative_error
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clip import CLIP, CLIPTextConfig, CLIPVision, CLIPVisionConfig, SigLIPVision
from hub import InputError

TOLERANCE = 1e-5     # float32 parity as the project promises it; other orders of summation give about 1e-7
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEXTS = ["a red circle", "two dogs on a sofa", "a"]


def make_clip(vocab_size=64, eos_token_id=63, max_position_embeddings=12):
    torch.manual_seed(0)
    text = CLIPTextConfig(**SMALL, vocab_size=vocab_size, eos_token_id=eos_token_id,
                          max_position_embeddings=max_position_embeddings)
    return CLIP(CLIPVisionConfig(**SMALL, image_size=32, patch_size=8), text, projection_dim=8).eval()


def write_tokenizer(folder):
    """A tokenizer of words for TEXTS: id 62 begins a text, id 63 ends it."""
    words = {word: i for i, word in enumerate(dict.fromkeys(" ".join(TEXTS).split()))}
    tokenizer = Tokenizer(models.WordLevel(words | {"<unk>": 61, "<s>": 62, "</s>": 63}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 62), ("</s>", 63)])
    tokenizer.enable_padding(length=12)                              # as some public files: similarity must not depend on it
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("variant", ["clip", "clip_gelu_legacy", "clip_laion", "clip_vision"])
@torch.no_grad()
def test_vision_tower_equals_transformers(variant):
    """clip_gelu_legacy: exact GELU. clip_vision: a checkpoint of the vision tower alone, in the layout of the hub."""
    folder, expected = recorded(variant)
    hidden = CLIPVision.from_pretrained(folder)(expected["32.pixels"])
    assert len(hidden) == 4 and hidden[0].shape == (2, 1 + 16, 24 if variant == "clip_laion" else 16)
    for i, state in enumerate(hidden):
        assert relative_error(state, expected[f"32.hidden.{i}"]) < TOLERANCE, f"hidden[{i}]"


@pytest.mark.parametrize("variant, side", [("siglip_vision", 32), ("siglip2", 35)])
@torch.no_grad()
def test_siglip_vision_tower_equals_transformers(variant, side):
    """siglip2: a whole checkpoint, and patches of 8 that do not fill a picture of 35, as so400m's 14 do not fill 384."""
    folder, expected = recorded(variant)
    tower = SigLIPVision.from_pretrained(folder)
    hidden = tower(expected[f"{side}.pixels"])
    assert tower.num_prefix_tokens == 0 and len(hidden) == 4 and hidden[0].shape == (2, 16, 16)
    for i, state in enumerate(hidden):
        assert relative_error(state, expected[f"{side}.hidden.{i}"]) < TOLERANCE, f"hidden[{i}]"


@pytest.mark.parametrize("variant", ["clip", "clip_gelu_legacy", "clip_laion"])
@torch.no_grad()
def test_text_tower_and_logits_equal_transformers(variant):
    """clip_gelu_legacy states eos_token_id 2, as OpenAI's first configs: the text is then read at its highest id."""
    folder, expected = recorded(variant)
    clip = CLIP.from_pretrained(folder)
    for i, state in enumerate(clip.text(expected["tokens"])):
        assert relative_error(state, expected[f"text.{i}"]) < TOLERANCE, f"text hidden[{i}]"
    images, texts = clip.image_features(expected["32.pixels"]), clip.text_features(expected["tokens"])
    assert relative_error(clip.logit_scale.exp() * images @ texts.T, expected["32.logits"]) < TOLERANCE


def test_the_vision_tower_is_the_same_alone_and_within_clip():
    folder, expected = recorded("clip")
    alone, within = CLIPVision.from_pretrained(folder), CLIP.from_pretrained(folder).vision
    assert alone.config == within.config and alone.num_prefix_tokens == within.num_prefix_tokens == 1
    assert torch.equal(alone(expected["32.pixels"])[-1], within(expected["32.pixels"])[-1])


@torch.no_grad()
def test_similarity_is_the_scaled_cosine_and_does_not_depend_on_the_other_texts(tmp_path, pixels):
    make_clip().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    clip = CLIP.from_pretrained(tmp_path)
    logits = clip.similarity(pixels, TEXTS)
    images, texts = clip.image_features(pixels), clip.text_features(clip.tokenize(TEXTS))
    cosines = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=-1)      # (B, texts)
    assert logits.shape == (2, 3) and relative_error(logits, cosines * math.exp(2.6592)) < TOLERANCE     # CLIP starts there
    for i, text in enumerate(TEXTS):     # alone, without filling: equal but for the order of summation
        assert relative_error(clip.similarity(pixels, [text])[:, 0], logits[:, i]) < TOLERANCE


@torch.no_grad()
def test_a_long_text_is_cut_and_keeps_its_end_token(tmp_path):
    make_clip().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    clip = CLIP.from_pretrained(tmp_path)
    tokens = clip.tokenize(["a " * 30, "a"])
    assert tokens.shape == (2, 12) and tokens[0, 0] == 62 and tokens[0, -1] == 63
    assert tokens[1].tolist() == [62, 0] + [63] * 10


@torch.no_grad()
def test_with_the_real_tokenizer_a_text_is_begun_ended_and_cut_as_openai_does(real, tmp_path):
    make_clip(vocab_size=49408, eos_token_id=49407, max_position_embeddings=77).save_pretrained(tmp_path)
    shutil.copy(real / "tokenizers" / "clip" / "tokenizer.json", tmp_path)
    clip = CLIP.from_pretrained(tmp_path)
    tokens = clip.tokenize(["a photo of a cat", "cat " * 100])
    # the ids of "a photo of a cat" in OpenAI's own vocabulary
    assert tokens.shape == (2, 77) and tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokens[1].tolist() == [49406] + [2368] * 75 + [49407]


def test_a_clip_without_a_tokenizer_says_so(pixels):
    with pytest.raises(InputError, match="no tokenizer.json"):
        CLIP.from_pretrained(recorded("clip")[0]).similarity(pixels, ["a cat"])


def test_a_text_too_long_for_the_tower_is_an_error():
    with pytest.raises(InputError, match="a text of 13 tokens for a tower of 12 positions"):
        make_clip().text(torch.zeros(1, 13, dtype=torch.long))


@torch.no_grad()
def test_the_text_tower_never_looks_ahead():
    text, tokens = make_clip().text, torch.arange(12)[None]
    changed = tokens.clone()
    changed[0, 7:] += 20
    before, after = text(tokens)[-1], text(changed)[-1]
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.isclose(before[:, 7:], after[:, 7:]).all()


@pytest.mark.parametrize("tower_class", [CLIPVision, SigLIPVision])
@torch.no_grad()
def test_layers_come_in_the_order_asked_and_deeper_blocks_do_not_run(tower_class, pixels):
    torch.manual_seed(0)
    tower = tower_class(tower_class.config_class(**SMALL | dict(num_hidden_layers=3), image_size=32, patch_size=8)).eval()
    every = tower(pixels)
    tower.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 3 ran, hidden[2] is the deepest that was asked for"))
    for layers in ([2, 0], [1], [0, 1, 2, 1]):
        assert all(torch.equal(a, every[i]) for a, i in zip(tower(pixels, layers), layers, strict=True))
    with pytest.raises(InputError, match=r"hidden\[-2\] asked of a tower of 3 blocks"):
        tower(pixels, [-2])                                          # LLaVA's way to count: say hidden[2] instead
    with pytest.raises(InputError, match="56 x 56 for a tower that was trained at 32 x 32"):
        tower(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


@pytest.mark.parametrize("variant", ["clip", "clip_gelu_legacy", "clip_laion"])
def test_saving_gives_back_names_and_values_of_the_checkpoint(variant, tmp_path):
    folder, _ = recorded(variant)
    CLIP.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    saved, original = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    assert saved.keys() == original.keys()
    assert all(saved[name].dtype == torch.float16 and torch.equal(saved[name], original[name]) for name in original)
    again, before = CLIP.from_pretrained(tmp_path), CLIP.from_pretrained(folder)
    assert again.vision.config == before.vision.config and again.text.config == before.text.config
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_constants_of_older_files_are_left_behind(tmp_path):
    folder, expected = recorded("clip")
    shutil.copy(folder / "config.json", tmp_path)
    constants = {"vision_model.embeddings.position_ids": torch.arange(17)[None],
                 "text_model.embeddings.position_ids": torch.arange(12)[None]}
    save_file(load_file(folder / "model.safetensors") | constants, tmp_path / "model.safetensors")
    for load in (lambda place: CLIP.from_pretrained(place).vision, CLIPVision.from_pretrained):
        assert torch.equal(load(tmp_path)(expected["32.pixels"])[-1], load(folder)(expected["32.pixels"])[-1])


def test_a_projection_that_is_missing_is_named(tmp_path):
    folder, _ = recorded("clip")
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"visual_projection\.weight missing"):
        CLIP.from_pretrained(tmp_path)
    CLIPVision.from_pretrained(tmp_path)                             # which does not need it


@pytest.mark.parametrize("tower_class, variant", [(CLIPVision, "siglip_vision"), (SigLIPVision, "clip"), (CLIP, "clip_vision")])
def test_another_kind_of_checkpoint_is_refused(tower_class, variant):
    with pytest.raises(InputError, match="model_type .* is not"):
        tower_class.from_pretrained(recorded(variant)[0])


def test_a_start_from_scratch_is_one_that_can_learn(pixels):
    clip = make_clip()
    tokens = torch.tensor([[62, 1, 2, 63], [62, 3, 4, 63]])
    logits = clip.logit_scale.exp() * clip.image_features(pixels) @ clip.text_features(tokens).T
    torch.nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    for name, parameter in clip.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
