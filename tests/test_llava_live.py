"""interop beside transformers: LLaVA in every naming of its tensors, with and without an image."""

import json

import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import relative_error
from make_llava_fixtures import (
    QUESTIONS,
    SIDE,
    TEXT,
    VISION,
    answers,
    make_tokenizer,
    older_name,
    randomize,
    reference,
    save,
)
from make_llava_tokenizer import IMAGE_TOKEN
from PIL import Image

from common.images import to_pixels
from dialogue import IMAGE
from interop.load import load_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NAMES = {
    "public": older_name,
    "transformers 5": None,
    "in memory": lambda name: name,
    "in memory, towers in full": lambda name: name.replace(
        "vision_tower.", "vision_tower.vision_model."
    ),
}


@pytest.mark.parametrize("naming", NAMES)
@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(naming, tmp_path):
    theirs, tokenizer = reference(len(naming)), make_tokenizer()
    save(theirs, tmp_path, NAMES[naming])
    ours = load_model(tmp_path)
    assert (ours.template, ours.spec.mode, ours.spec.size) == ("vicuna_v1", "crop", SIDE)
    photograph = Image.effect_noise((50, 40), 80).convert("RGB").resize((70, 44))
    pixels = to_pixels(photograph, ours.spec)[None]
    expected = answers(theirs, tokenizer, pixels)
    for name, question in QUESTIONS.items():
        images = [photograph] if name == "picture" else []
        seen, ids, _ = ours.prompt(images, [(question, None)])
        assert [356 if i == IMAGE else i for i in ids] == expected[f"{name}.tokens"][0].tolist()
        logits = ours.llm(embeds=ours.embed(torch.tensor([ids]), seen))
        assert relative_error(logits, expected[f"{name}.logits"]) < 1e-5
        (text,) = ours.generate([images], [question], 12)
        assert text == ours.text(expected[f"{name}.greedy"][0].tolist())


@pytest.mark.parametrize("naming", ("public", "transformers 5"))
@torch.no_grad()
def test_anyres_is_that_of_transformers(naming, tmp_path):
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
    save(theirs, tmp_path, NAMES[naming])
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
    inputs["attention_mask"] = torch.ones_like(tokens)
    greedy = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(ids) :]
    (text,) = ours.generate([images], ["What?"], 12)
    assert text == ours.text(greedy.tolist())
