"""interop beside transformers: LLaVA in every naming of its tensors, with and without an image."""

import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import relative_error
from make_llava_fixtures import (
    QUESTIONS,
    SIDE,
    answers,
    make_tokenizer,
    older_name,
    reference,
    save,
)
from PIL import Image

from common.errors import InputError
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
    assert (ours.template, ours.spec.mode, ours.spec.size, ours.tokens_per_image) == (
        "vicuna_v1",
        "crop",
        SIDE,
        16,
    )
    photograph = Image.effect_noise((50, 40), 80).convert("RGB").resize((70, 44))
    pixels = to_pixels(photograph, ours.spec)[None]
    expected = answers(theirs, tokenizer, pixels)
    for name, question in QUESTIONS.items():
        images = [photograph] if name == "picture" else []
        seen, ids = ours.prompt(images, [(question, None)])
        assert [356 if i == IMAGE else i for i in ids] == expected[f"{name}.tokens"][0].tolist()
        logits = ours.llm(embeds=ours.embed(torch.tensor([ids]), seen))
        assert relative_error(logits, expected[f"{name}.logits"]) < 1e-5
        (text,) = ours.generate([images], [question], 12)
        assert text == ours.text(expected[f"{name}.greedy"][0].tolist())


@torch.no_grad()
def test_shards_are_one_model_and_a_missing_one_is_named(tmp_path):
    theirs = reference(1)
    save(theirs, tmp_path, None)
    whole = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    for ours, other in zip(load_model(tmp_path).parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, other)
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_model(tmp_path)


@torch.no_grad()
def test_pictures_are_cropped_as_transformers_crops_them(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    save(reference(0), tmp_path)
    ours, processor = (
        load_model(tmp_path),
        CLIPImageProcessorPil.from_pretrained(tmp_path),
    )
    photograph = Image.effect_noise((61, 40), 90).convert("RGB")
    theirs = torch.tensor(processor(photograph)["pixel_values"][0])
    seen, _ = ours.prompt([photograph], [("What?", None)])
    assert (ours.vision[0].normalize(seen, torch.float32)[0] - theirs).abs().max() < 1e-6
