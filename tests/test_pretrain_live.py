"""The checkpoints that pretrain.py writes, in transformers: they load by their own config.json and compute the same.

requirements-dev.txt installs transformers.
"""
import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import relative_error
from test_pretrain import folders, fresh                             # noqa: F401 (fixtures)

import pretrain
import world
from clip import CLIP
from dinov2 import DINOv2
from llama import Llama
from vit import ViT

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-5     # float32 parity as the project promises it; other orders of summation give about 1e-7


@pytest.fixture(scope="module")
def drawn():
    return [(index, world.scene("test", index)) for index in range(3)]


def pixel_values(tower, pixels):
    return tower.normalize(pixels, torch.float32)


@torch.no_grad()
def test_transformers_computes_the_same_clip(folders, drawn):
    ours = CLIP.from_pretrained(folders["clip"])
    theirs = transformers.AutoModel.from_pretrained(folders["clip"], dtype=torch.float32).eval()
    assert type(theirs).__name__ == "CLIPModel"
    pixels, texts = pretrain.pictures(drawn, "test"), ["a large red circle at the left", "a small blue cross", "an orange square"]
    tokens = ours.tokenize(texts)
    result = theirs(input_ids=tokens, pixel_values=pixel_values(ours.vision, pixels), output_hidden_states=True)
    assert relative_error(ours.similarity(pixels, texts), result.logits_per_image) < TOLERANCE
    hidden = theirs.vision_model(pixel_values(ours.vision, pixels), output_hidden_states=True).hidden_states
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(ours.vision(pixels), hidden, strict=True))


@torch.no_grad()
def test_transformers_computes_the_same_dinov2(folders, drawn):
    ours = DINOv2.from_pretrained(folders["dinov2"])
    theirs = transformers.AutoModel.from_pretrained(folders["dinov2"], dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Dinov2Model"
    pixels = pretrain.pictures(drawn, "test")
    hidden = theirs(pixel_values(ours, pixels), output_hidden_states=True).hidden_states
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(ours(pixels), hidden, strict=True))


@pytest.mark.parametrize("name, kind, options", [("mae", "ViTMAEModel", {"mask_ratio": 0.0}), ("deit", "ViTModel", {})])
@torch.no_grad()
def test_transformers_computes_the_same_mae_and_deit(folders, drawn, name, kind, options):
    """MAE with nothing hidden, and with the order of its patches kept, which it shuffles by noise."""
    ours = ViT.from_pretrained(folders[name])
    options |= {"dtype": torch.float32, "output_loading_info": True}
    theirs, report = transformers.AutoModel.from_pretrained(folders[name], **options)
    assert type(theirs).__name__ == kind
    assert not report["unexpected_keys"] and all("pooler" in key for key in report["missing_keys"])
    pixels = pretrain.pictures(drawn, "test")
    noise = {"noise": torch.arange(64.0).expand(len(pixels), -1)} if name == "mae" else {}
    hidden = theirs.eval()(pixel_values(ours, pixels), output_hidden_states=True, **noise).hidden_states
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(ours(pixels), hidden, strict=True))


@torch.no_grad()
def test_transformers_computes_the_same_llama_with_the_same_tokenizer(folders):
    ours = Llama.from_pretrained(folders["llama"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    text = "USER: small red circle [0.10,0.20,0.35,0.45]\nWhere is the small red circle? ASSISTANT:"
    tokens = torch.tensor([[pretrain.BOS, *tokenizer(text, add_special_tokens=False).input_ids]])
    assert relative_error(ours(tokens), theirs(tokens).logits) < TOLERANCE
    expected = theirs.generate(tokens, max_new_tokens=12, do_sample=False)[:, tokens.shape[1]:]
    assert ours.generate(tokens, 12)[:, :expected.shape[1]].tolist() == expected.tolist()
    assert tokenizer.decode(tokens[0, 1:]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (pretrain.BOS, pretrain.EOS, 0)
