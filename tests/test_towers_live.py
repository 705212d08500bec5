"""Towers and exports against transformers: its classes load what we write and compute the same."""

import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import recorded, relative_error
from make_dense_folder import wide
from make_llava_tokenizer import make_tokenizer
from tokenizers import Tokenizer
from tower_outputs import CLASSES, logits_of, random_pixels

from clip import CLIP, CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from common.images import ImageSpec, to_pixels
from dialogue import IMAGE
from dinov2 import DINOv2, DINOv2Config
from interop.export import export
from llama import Llama, LlamaConfig
from mllm import MLLM
from vit import ViT, ViTConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Relative, in float32; another order of summation gives about 1e-6.
TOLERANCE, TOWER_TOLERANCE = 1e-4, 1e-5
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
SHAPE |= {"image_size": 32, "patch_size": 8}
VOCABULARY = 358


# ---- towers -------------------------------------------------------------------------------------


@torch.no_grad()
def test_transformers_loads_what_towers_save(tmp_path):
    """No key is missing or left over, outputs are equal, and so are the processor's pixels."""
    saved = {"vit": "ViTModel", "deit": "DeiTModel", "mae": "ViTMAEModel", "clip": "CLIPModel"}
    saved |= {"dinov2_swiglu": "Dinov2Model", "dinov2_registers": "Dinov2WithRegistersModel"}
    saved |= {"clip_vision": "CLIPVisionModel", "siglip_vision": "SiglipVisionModel"}
    for variant, name in saved.items():
        folder, recorded_outputs = recorded(variant)
        read = CLIP if variant == "clip" else CLASSES[variant[:3]]
        model = read.from_pretrained(folder)
        model.save_pretrained(tmp_path / name)
        load = getattr(transformers, name).from_pretrained
        theirs, report = load(tmp_path / name, output_loading_info=True)
        missing = {key for key in report.pop("missing_keys") if not key.startswith("pooler.")}
        assert not missing and not any(report.values()), (name, missing, report)
        tower = getattr(model, "vision", model)
        pixels = random_pixels(tower.config.image_size)
        values = tower.normalize(pixels, torch.float32)
        options = {"noise": torch.arange(16.0).expand(2, -1)} if variant == "mae" else {}
        if variant == "clip":
            tokens = recorded_outputs["tokens"]
            expected = theirs.eval()(tokens, values).logits_per_image
            assert relative_error(logits_of(model, pixels, tokens), expected) < TOWER_TOLERANCE
        else:
            expected = theirs.eval()(values, output_hidden_states=True, **options).hidden_states
            assert relative_error(tower(pixels)[-1], expected[-1]) < TOWER_TOLERANCE, name
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / name)
        image = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
        values = processor(image, return_tensors="pt")["pixel_values"]
        spec = ImageSpec.from_folder(tmp_path / name)
        ours = tower.normalize(to_pixels(image, spec)[None], torch.float32)
        assert (values - ours).abs().max() < 0.02, name


# ---- exports ------------------------------------------------------------------------------------


def assert_complete(report):
    """Nothing is left over; only a pooler is missing, which our towers never have."""
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("pooler" in key for key in report["missing_keys"])


def model_of(connector, tower, template="vicuna_v1", **llm):
    """Build a small MLLM whose tokenizer is of LLaMA's kind and has no <image>."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_str(make_tokenizer().to_str().replace("<image>", "<other>"))
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 512}
    llm = Llama(LlamaConfig(vocab_size=VOCABULARY, **sizes, **llm))
    return wide(MLLM([tower], llm, connector, tokenizer, template, ImageSpec(32)), 5)


def clip_tower():
    return CLIPVision(CLIPVisionConfig(intermediate_size=24, **SHAPE))


@torch.no_grad()
def test_transformers_llava_gives_the_logits_of_what_we_trained(tmp_path):
    """With its own tokenizer, chat template and <image> token; a new token is never chosen."""
    cases = [
        ("mlp", SigLIPVision(SigLIPVisionConfig(**SHAPE)), {"num_key_value_heads": 1}),
        ("linear", DINOv2(DINOv2Config(mlp_ratio=2, **SHAPE)), {}),
        ("mlp", ViT(ViTConfig(intermediate_size=24, **SHAPE)), {}),
        ("mlp", clip_tower(), {"tie_word_embeddings": True}),
        ("mlp", clip_tower(), {"sliding_window": 9}),
        ("linear", clip_tower(), {"qkv_bias": True}),
    ]
    for i, (connector, tower, llm) in enumerate(cases):
        ours, folder = model_of(connector, tower, **llm), tmp_path / str(i)
        assert export(ours, folder) == "llava-hf"
        theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
        assert_complete(report)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
        for images in ([image], []):
            check_answer(ours, theirs.eval(), tokenizer, images)


def check_answer(ours, theirs, tokenizer, images):
    """Compare prompt, logits and greedy answer."""
    pixels, ids, _ = ours.prompt(images, [("What is this?", None)])
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What is this?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    tokens = tokenizer(text.replace("<image>", "<image>" * 16), return_tensors="pt").input_ids
    image_id = theirs.config.image_token_index
    assert tokens[0].tolist() == [image_id if i == IMAGE else i for i in ids]
    inputs = {"input_ids": tokens}
    if images:
        inputs["pixel_values"] = ours.vision[0].normalize(pixels, torch.float32)
    logits = theirs(**inputs).logits
    expected = ours.llm(embeds=ours.embed(torch.tensor([ids]), pixels))
    assert relative_error(logits[..., :VOCABULARY], expected) < TOLERANCE
    assert (logits.argmax(-1) < VOCABULARY).all()
    inputs["attention_mask"] = torch.ones_like(tokens)
    greedy = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)
    answer = greedy[0, tokens.shape[1] :].tolist()
    assert ours.generate([images], ["What is this?"], 10) == [ours.text(answer)]
