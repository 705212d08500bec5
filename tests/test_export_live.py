"""export.py beside transformers: what we write, their classes load, and compute the same with it."""
import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import recorded, relative_error
from make_dense_folder import wide
from make_llava_tokenizer import make_tokenizer
from tokenizers import Tokenizer

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from connector import ConnectorConfig
from dialogue import IMAGE
from dinov2 import DINOv2, DINOv2Config
from export import export
from hub import InputError, read_config
from images import ImageSpec
from llama import Llama, LlamaConfig
from mllm import MLLM, tower_class
from vit import ViT, ViTConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4     # relative, float32; other orders of summation give about 1e-6


@pytest.mark.parametrize("variant, name", [
    ("clip", "CLIPVisionModel"), ("siglip_vision", "SiglipVisionModel"), ("dinov2", "Dinov2Model"),
    ("dinov2_registers", "Dinov2WithRegistersModel"), ("vit", "ViTModel"), ("deit", "DeiTModel"), ("mae", "ViTMAEModel")])
@torch.no_grad()
def test_transformers_reads_a_tower_that_we_save(variant, name, tmp_path):
    """Nothing is left over, nothing is missing but a pooler that the tower never had; all hidden states are equal."""
    folder, expected = recorded(variant)
    tower_type = tower_class(read_config(folder)["model_type"], folder)[0]
    tower = tower_type.from_pretrained(folder)
    tower.save_pretrained(tmp_path)
    options = {"mask_ratio": 0.0} if name == "ViTMAEModel" else {}   # else it hides patches
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("pooler" in key for key in report["missing_keys"])
    side = next(key for key in expected if key.endswith(".pixels"))
    pixels = tower.normalize(expected[side], torch.float32)
    noise = {"noise": torch.arange(tower.config.image_size ** 2 // tower.config.patch_size ** 2)[None].float().expand(
        len(pixels), -1)} if name == "ViTMAEModel" else {}           # MAE shuffles patches by noise; this keeps their order
    hidden = theirs.eval()(pixels, output_hidden_states=True, **noise).hidden_states
    for ours, reference in zip(tower(expected[side]), hidden, strict=True):
        assert relative_error(ours, reference) < TOLERANCE
    again = tower_type.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tower(expected[side]), again(expected[side])))


def model_of(kind, tower="clip", template="vicuna_v1", **llm):
    """A small MLLM with wide random weights and a tokenizer of LLaMA's kind that has no <image>."""
    torch.manual_seed(len(kind) + len(tower))
    shape = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=8)
    tower = {"clip": lambda: CLIPVision(CLIPVisionConfig(intermediate_size=24, **shape)),
             "siglip": lambda: SigLIPVision(SigLIPVisionConfig(intermediate_size=24, **shape)),
             "dinov2": lambda: DINOv2(DINOv2Config(mlp_ratio=2, **shape)),
             "registers": lambda: DINOv2(DINOv2Config(mlp_ratio=2, num_register_tokens=2, **shape)),
             "vit": lambda: ViT(ViTConfig(intermediate_size=24, **shape)),
             "mae": lambda: ViT(ViTConfig(intermediate_size=24, model_type="vit_mae", **shape))}[tower]()
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str().replace("<image>", "<other>"))
    llm = Llama(LlamaConfig(vocab_size=358, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=512, **llm))
    return wide(MLLM([tower], llm, ConnectorConfig(kind), tokenizer, template, ImageSpec(32)), 5)


@pytest.mark.parametrize("kind, tower, llm", [
    ("mlp", "clip", {}), ("linear", "clip", {}), ("mlp", "siglip", dict(num_key_value_heads=1)), ("linear", "dinov2", {}),
    ("mlp", "vit", {}), ("mlp", "clip", dict(tie_word_embeddings=True)), ("mlp", "clip", dict(sliding_window=9)),
    ("linear", "clip", dict(qkv_bias=True))])
@torch.no_grad()
def test_transformers_llava_gives_the_logits_of_what_we_trained(kind, tower, llm, tmp_path):
    """Its own tokenizer, chat template and <image> token; our pixels. The rows behind our vocabulary are never the likeliest.
    ViT's pooler, which nobody reads, is the one thing that transformers makes up."""
    ours = model_of(kind, tower, **llm)
    assert export(ours, tmp_path / "hf") == "llava-hf"
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("pooler" in key for key in report["missing_keys"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    picture = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    for images in ([picture], []):
        pixels, ids = ours.prompt(images, [("What is this?", None)])
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What is this?"}]
        text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        tokens = tokenizer(text.replace("<image>", "<image>" * 16), return_tensors="pt").input_ids
        image = theirs.config.image_token_index
        assert tokens[0].tolist() == [image if i == IMAGE else i for i in ids]
        inputs = {"pixel_values": ours.vision[0].normalize(pixels, torch.float32)} if images else {}
        expected = ours.llm(embeds=ours.embed(torch.tensor([ids]), pixels))
        logits = theirs.eval()(input_ids=tokens, **inputs).logits
        assert relative_error(logits[..., :358], expected) < TOLERANCE
        assert (logits.argmax(-1) < 358).all()
        greedy = theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False,
                                 **inputs)[0, tokens.shape[1]:]
        assert ours.generate([images], ["What is this?"], 10) == [ours.text(greedy.tolist())]


@torch.no_grad()
def test_transformers_reads_the_llm_alone(tmp_path):
    ours = model_of("dense", template="llama_2")
    export(ours, tmp_path / "llm", "llama")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llm", output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM" and not any(report.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm")
    turns = [("What is red?", "A colour."), ("And two?", None)]
    messages = [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "A colour."},
                {"role": "user", "content": "And two?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens[0].tolist() == ours.prompt([], turns)[1]
    assert relative_error(theirs(tokens).logits, ours.llm(tokens)) < TOLERANCE


def test_what_the_layout_of_transformers_has_no_place_for_is_an_error(tmp_path):
    for tower, message in (("registers", "a dinov2_with_registers tower has no place"), ("mae", "a vit_mae tower has no place")):
        with pytest.raises(InputError, match=message):
            export(model_of("mlp", tower), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
