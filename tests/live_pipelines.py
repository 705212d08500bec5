"""Exported folders in transformers' own pipelines: the same prompts and answers as ours."""

import pytest

transformers = pytest.importorskip("transformers")

from conftest import ROOT
from PIL import Image
from test_export import build

from clip import CLIP
from common.images import ImageSpec, to_pixels
from dialogue import TEMPLATES, render
from interop.export import export

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def message(role, text, *images):
    content = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def last(outputs):
    """Read the answers of a pipeline to several dialogues."""
    return [output["generated_text"][-1]["content"].strip() for (output,) in outputs]


def test_pipelines_of_transformers_answer_as_we_do(tmp_path):
    """A batch of prompts of different lengths, with and without images."""
    photographs = [Image.effect_noise(size, 90).convert("RGB") for size in ((32, 32), (32, 50))]
    questions = ["What?", "How many small red dogs do you see?"]
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    for template in ("vicuna_v1", "llama_2"):
        ours = build("mlp", template=template, mode="crop")
        export(ours, tmp_path / template / "llm", "llama")
        export(ours, tmp_path / template / "hf", "llava-hf")
        pipeline = transformers.pipeline("text-generation", str(tmp_path / template / "llm"))
        chats = [[{"role": "user", "content": question}] for question in questions]
        ids = pipeline.tokenizer.apply_chat_template(chats[0]).input_ids
        assert ids == ours.prompt([], [(questions[0], None)])[1]
        assert last(pipeline(chats, **options)) == ours.generate([[], []], questions, 8)
        pipeline = transformers.pipeline("image-text-to-text", str(tmp_path / template / "hf"))
        pairs = zip(photographs, questions, strict=True)
        chats = [[message("user", question, image)] for image, question in pairs]
        answers = ours.generate([[image] for image in photographs], questions, 8)
        assert last(pipeline(text=chats, **options)) == answers


def test_a_system_message_replaces_the_system_prompt(tmp_path):
    for template in ("vicuna_v1", "llama_2", "tiny"):
        ours = build("mlp", template=template)
        export(ours, tmp_path / template, "llama")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / template)
        dialogue = [message("system", "Be brief."), message("user", "What?")]
        if "{system}" in TEMPLATES[template].first:
            text = tokenizer.apply_chat_template(dialogue, tokenize=False)
            assert text == "<s>" + render([("What?", None)], template, "Be brief.")[0]
        else:
            with pytest.raises(Exception, match="no place for a system message"):
                tokenizer.apply_chat_template(dialogue)


def test_the_tiny_clip_classifies_in_transformers_pipeline():
    folder = ROOT / "weights" / "clip"
    photograph, labels = Image.effect_noise((64, 64), 90).convert("RGB"), ["a red circle", "no"]
    ours = CLIP.from_pretrained(folder)
    pixels = to_pixels(photograph, ImageSpec.from_folder(folder))[None]
    expected = ours.similarity(pixels, labels).softmax(-1)[0].tolist()
    classify = transformers.pipeline("zero-shot-image-classification", str(folder))
    found = classify(photograph, candidate_labels=labels, hypothesis_template="{}")
    found = {entry["label"]: entry["score"] for entry in found}
    assert [found[label] for label in labels] == pytest.approx(expected, abs=1e-3)
