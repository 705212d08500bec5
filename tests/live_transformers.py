"""Against transformers: its classes load what we write and compute the same, and the reverse."""

import json
import math
import os
import shutil

import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import ROOT, losses, recorded, relative_error
from make_llama_fixtures import VARIANTS, reference
from make_llava_fixtures import SIDE, TEXT, VISION, older_name, randomize, save
from make_llava_tokenizer import IMAGE_TOKEN, make_tokenizer
from PIL import Image
from test_export import LLM, build
from tokenizers import Tokenizer
from tower_outputs import CLASSES, random_pixels

import train
from common.errors import InputError
from common.pretrained import locate
from dialogue import IMAGE, encode, find_template, load_tokenizer
from interop.export import export
from interop.load import load_model
from interop.phi import Phi
from llama import Llama, LlamaConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Relative, in float32; another order of summation gives about 1e-6.
TOLERANCE, TOWER_TOLERANCE = 1e-4, 1e-5
VOCABULARY = 358


@torch.no_grad()
def test_transformers_loads_what_towers_save(tmp_path):
    """No key is missing or left over, and outputs are equal."""
    saved = {"vit": "ViTModel", "deit": "DeiTModel", "mae": "ViTMAEModel"}
    saved |= {"dinov2_swiglu": "Dinov2Model", "dinov2_registers": "Dinov2WithRegistersModel"}
    saved |= {"clip_vision": "CLIPVisionModel", "siglip_vision": "SiglipVisionModel"}
    for variant, name in saved.items():
        folder, _ = recorded(variant)
        model = CLASSES[variant[:3]].from_pretrained(folder)
        model.save_pretrained(tmp_path / name)
        load = getattr(transformers, name).from_pretrained
        theirs, report = load(tmp_path / name, output_loading_info=True)
        missing = {key for key in report.pop("missing_keys") if not key.startswith("pooler.")}
        assert not missing and not any(report.values()), (name, missing, report)
        pixels = random_pixels(model.config.image_size)
        values = model.normalize(pixels, torch.float32)
        options = {"noise": torch.arange(16.0).expand(2, -1)} if variant == "mae" else {}
        expected = theirs.eval()(values, output_hidden_states=True, **options).hidden_states
        assert relative_error(model(pixels)[-1], expected[-1]) < TOWER_TOLERANCE, name


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers_which_reads_what_we_save(variant, tmp_path):
    """Half of the variants are read from float16 shards."""
    theirs = reference(variant, seed=7, dtype=torch.float16)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 40), generator=generator)
    expected = theirs(tokens).logits
    if sorted(VARIANTS).index(variant) % 2:
        theirs.to(torch.float16).save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        theirs.save_pretrained(tmp_path)
    ours = (Phi if theirs.config.model_type == "phi" else Llama).from_pretrained(tmp_path)
    assert relative_error(ours(tokens), expected) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    load = transformers.AutoModelForCausalLM.from_pretrained
    # SmolLM3's default padding token is outside this small vocabulary.
    again, report = load(tmp_path / "ours", output_loading_info=True, pad_token_id=0)
    assert not any(report.values()), report
    assert relative_error(again(tokens).logits, expected) < 1e-5


def test_a_public_llm_answers_as_with_transformers_and_trains(real, clean_run):
    """SmolLM2-135M-Instruct: that of the cache, or the folder in the variable SMOLLM2."""
    try:
        folder = locate(os.environ.get("SMOLLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    except InputError:
        pytest.skip("no SmolLM2-135M-Instruct: set SMOLLM2 to its folder")
    tokenizer, ours = load_tokenizer(folder), Llama.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, _ = encode(tokenizer, [("What is the capital of France?", None)], find_template(folder))
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-5
    answer = ours.generate(tokens, 24)[0].tolist()
    greedy = theirs.generate(tokens, max_new_tokens=24, do_sample=False)
    assert greedy[0, len(ids) :].tolist() == answer and "Paris" in tokenizer.decode(answer)
    options = {"vision": ROOT / "weights" / "clip", "llm": folder, "device": "cpu", "out": "run"}
    options |= {"data1": real / "llava_pretrain.json", "data2": real / "llava_instruct.json"}
    options |= {"image_dir": real / "images", "steps1": 1, "steps2": 2}
    options |= {"batch1": 2, "batch2": 2, "micro_batch": 2}
    flags = [f"--{key}={value}" for key, value in options.items()]
    train.main([str(ROOT / "config" / "small.toml"), *flags])
    # Below a guess among all tokens. The checkpoint has 2 GB.
    assert max(losses().values()) < math.log(tokenizer.get_vocab_size())
    shutil.rmtree("run")


@pytest.mark.parametrize("rename", (older_name, None, str), ids=("public", "5", "in memory"))
@torch.no_grad()
def test_anyres_is_that_of_transformers(rename, tmp_path):
    """LLaVA-NeXT: pixels, tokens and logits of several images of different shapes."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    pinpoints = [[h * SIDE, w * SIDE] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=pinpoints,
    )
    theirs = randomize(transformers.LlavaNextForConditionalGeneration(config), 5)
    save(theirs, tmp_path, rename)
    path = tmp_path / "preprocessor_config.json"
    next_processor = {"image_processor_type": "LlavaNextImageProcessor"}
    next_processor |= {"image_grid_pinpoints": pinpoints, "do_pad": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | next_processor))
    ours, processor = load_model(tmp_path), LlavaNextImageProcessorPil.from_pretrained(tmp_path)
    sizes = ((70, 44), (20, 30), (30, 120), (33, 31))
    images = [Image.effect_noise(size, 90).convert("RGB").resize(size) for size in sizes]
    inputs = processor(images, return_tensors="pt")
    pixels, ids, image_index = ours.prompt(images, [("What?", None)])
    tokens = torch.tensor([ids])
    inputs["input_ids"] = tokens.masked_fill(tokens == IMAGE, IMAGE_TOKEN)
    assert (tokens == IMAGE).sum() == len(image_index) > 4 * 16
    logits = ours.llm(embeds=ours.embed(tokens, pixels, image_index))
    assert relative_error(logits, theirs(**inputs).logits) < 1e-5
    assert export(ours, tmp_path / "again") == "llava-hf"
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "again")
    inputs = LlavaNextImageProcessorPil.from_pretrained(tmp_path / "again")(
        images, return_tensors="pt"
    )
    inputs["input_ids"] = tokens.masked_fill(tokens == IMAGE, again.config.image_token_index)
    same = again.eval()(**inputs).logits[..., : logits.shape[-1]]
    assert relative_error(same, logits) < 1e-5


@torch.no_grad()
def test_transformers_llava_gives_the_logits_of_what_we_trained(tmp_path):
    """With its own tokenizer, chat template and <image> token; a new token is never chosen."""
    without_image = Tokenizer.from_str(make_tokenizer().to_str().replace("<image>", "<other>"))
    cases = [
        ("sci", "siglip", {"num_key_value_heads": 1}),
        ("mlp", "dinov2", {}),
        ("mlp", "vit", {}),
        ("mlp", "clip", {"tie_word_embeddings": True}),
        ("sci", "clip", {"sliding_window": 9}),
        ("mlp", "clip", {"qk_norm": True}),
    ]
    for i, (connector, tower, options) in enumerate(cases):
        llm, folder = LlamaConfig(**LLM | options | {"vocab_size": VOCABULARY}), tmp_path / str(i)
        ours = build(connector, (tower,), llm=Llama(llm), tokenizer=without_image)
        assert export(ours, folder) == "llava-hf"
        theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True
        )
        # Our towers never have a pooler.
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        assert all("pooler" in key for key in report["missing_keys"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
        for images in ([image], []):
            check_answer(ours, theirs.eval(), tokenizer, images)


def check_answer(ours, theirs, tokenizer, images):
    """Compare prompt and logits. live_pipelines.py compares answers."""
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
