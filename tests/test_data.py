"""dialogue.py, images.py and data.py: templates, labels, pixels, formats and the loader, each against a reference written out by hand."""
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import ConcatDataset

import data
import dialogue
from data import LlavaData, Loader, Sample, ShikraData, collate, order
from dialogue import IGNORE, IMAGE, TEMPLATES, cut_to_length, encode, end_ids, find_template, load_tokenizer, render
from hub import InputError
from images import BadImage, ImageSpec, format_box, open_image, pad_box, parse_box, to_pixels, unpad_box

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
DIALOGUES = [
    [("<image>\nWhat is this?", "A cat.")],
    [("<image>\nWhat is this?", "A cat."), ("Where?", "[0.390,0.483,0.884,0.866]"), ("Sure?", "Yes")],
    [("Compare <image> with <image>", "  The first,\n\nas it   is older."), ("Naïve 日本 🎉?", "¿Qué? 日本 🎉")],
    [("What is two plus two?", "'s not five: \"4\".\n")],
]


@pytest.fixture(scope="session")
def small():
    """A byte-level BPE tokenizer made here, with merges and all special tokens: for tests that need no real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted({token for template in TEMPLATES.values() for token in template.special})
    texts = [text for turns in DIALOGUES for turn in turns for text in turn] + [VICUNA]
    tokenizer.train_from_iterator(texts * 3, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return tokenizer


@pytest.fixture(scope="session", params=["small", "llama2", "llama3"])
def tokenizer(request, small):
    """Three kinds: one made here; sentencepiece's; tiktoken's. The real ones get the special tokens that they lack."""
    if request.param == "small":
        return small
    loaded = load_tokenizer(request.getfixturevalue("real") / "tokenizers" / request.param)
    loaded.add_special_tokens([token for template in TEMPLATES.values() for token in template.special])
    return loaded


# --- templates ---

def test_layouts_are_written_as_their_authors_wrote_them():
    turns = [("q1", "a1"), ("q2", "a2")]
    system = dialogue.LLAVA
    assert render(turns, "vicuna_v1")[0] == f"{VICUNA} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert render(turns, "llama_2")[0] == (
        f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert render(turns, "llama_3")[0] == (
        f"{header('system')}{system}<|eot_id|>{header('user')}q1<|eot_id|>{header('assistant')}a1<|eot_id|>"
        f"{header('user')}q2<|eot_id|>{header('assistant')}a2<|eot_id|>")
    assert render(turns, "chatml")[0] == (
        "<|im_start|>system\nAnswer the questions.<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>")
    assert render(turns, "tiny")[0] == "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert render([("Describe it.\n<image>", "A cat.")], "plain")[0] == "<image>A cat.\n"


def test_prompt_ends_where_the_answer_is_to_begin():
    assert render([("q1", "a1"), ("q2", None)], "vicuna_v1")[0].endswith("ASSISTANT: a1</s>USER: q2 ASSISTANT:")
    assert render([("<image>\nq", None)], "plain")[0] == "<image>"


@pytest.mark.parametrize("template", TEMPLATES)
def test_spans_are_the_answers_with_their_end(template):
    layout = TEMPLATES[template]
    for turns in DIALOGUES:
        text, spans = render(turns, template)
        assert [text[a:b] for a, b in spans] == [layout.reply + answer.lstrip() + layout.end for _, answer in turns]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_tokens_are_a_prefix_of_training_tokens(tokenizer, template):
    for turns in DIALOGUES:
        for k in range(len(turns)):
            prompt, labels = encode(tokenizer, turns[:k] + [(turns[k][0], None)], template)
            trained, targets = encode(tokenizer, turns[:k + 1], template)
            assert trained[:len(prompt)] == prompt
            assert labels == targets[:len(prompt)]
            assert all(label != IGNORE for label in targets[len(prompt):])   # what is generated is what was supervised


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_and_their_end_tokens(tokenizer, template):
    for turns in DIALOGUES:
        ids, labels = encode(tokenizer, turns, template)
        assert len(ids) == len(labels) and all(label in (token, IGNORE) for token, label in zip(ids, labels))
        assert ids.count(IMAGE) == sum(question.count("<image>") for question, _ in turns)
        supervised = tokenizer.decode([label for label in labels if label != IGNORE], skip_special_tokens=False)
        expected = "".join(answer.lstrip() + TEMPLATES[template].end for _, answer in turns)
        assert supervised.replace(" ", "") == expected.replace(" ", "")      # decoders add and drop spaces at the ends


def test_labels_survive_a_tokenizer_that_trims_its_offsets(small):
    """Llama-3's own post-processor leaves spaces out of the offsets: a token of spaces only then has an empty range."""
    trimming = Tokenizer.from_str(small.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    turns = [("q  q", "so  many   spaces 🎉  "), ("q", "  a")]
    for template in TEMPLATES:
        assert encode(trimming, turns, template) == encode(small, turns, template)


def test_an_empty_answer_is_not_supervised(small):
    ids, labels = encode(small, [("q1", " \n"), ("q2", "a2")], "vicuna_v1")
    assert small.decode([label for label in labels if label != IGNORE], skip_special_tokens=False).strip() == "a2</s>"
    assert set(encode(small, [("q1", "")], "chatml")[1]) == {IGNORE}


def test_a_template_whose_tokens_the_tokenizer_lacks_is_an_error(real):
    llama3 = load_tokenizer(real / "tokenizers" / "llama3")                  # this file has no special tokens
    for template, token in (("llama_3", "<|begin_of_text|>"), ("vicuna_v1", "<s>"), ("chatml", "<|im_start|>")):
        with pytest.raises(InputError, match=re.escape(f"no token {token}")):
            encode(llama3, DIALOGUES[0], template)
    llama3.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(InputError, match=r"no token <s>, .* it has the tokens of chatml\)"):
        encode(llama3, DIALOGUES[0], "vicuna_v1")
    with pytest.raises(InputError, match="no template 'vicuna': there are plain, vicuna_v1"):
        render(DIALOGUES[0], "vicuna")


def test_generation_stops_at_what_was_trained_to_be_last(tokenizer):
    for template in TEMPLATES:
        for turns in DIALOGUES:
            assert encode(tokenizer, turns, template)[0][-1] in end_ids(tokenizer, template)
    assert end_ids(tokenizer, "vicuna_v1") == [tokenizer.token_to_id("</s>")]


def llavas_tokenizer_image_token(prompt, tokenizer):
    """LLaVA's llava/mm_utils.py: every chunk is tokenised with a BOS, which is taken off again behind a picture."""
    chunks = [[1] + tokenizer.encode(chunk, add_special_tokens=False).ids for chunk in prompt.split("<image>")]
    ids = [1]
    for i, chunk in enumerate(chunks):
        ids += ([IMAGE] if i else []) + chunk[1:]
    return ids


def llavas_vicuna_v1(turns):
    """LLaVA's llava/conversation.py, SeparatorStyle.TWO with sep " " and sep2 "</s>"."""
    text = VICUNA + " "
    for question, answer in turns:
        text += "USER: " + question + " "
        text += "ASSISTANT:" if answer is None else "ASSISTANT: " + answer + "</s>"
    return text


def llavas_mask(conversation, ids, tokenizer):
    """LLaVA's preprocess_v1: lengths of re-tokenised prefixes, less 2 for the BOS and the last space."""
    targets, place = list(ids), 1
    targets[0] = IGNORE
    for turn in conversation.split("</s>"):
        if not turn:
            break
        instruction = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(llavas_tokenizer_image_token(turn, tokenizer))
        masked = len(llavas_tokenizer_image_token(instruction, tokenizer)) - 2
        targets[place:place + masked] = [IGNORE] * masked
        place += length
    assert place == len(ids)                                         # else LLaVA warns of a "tokenization mismatch"
    return targets


def test_vicuna_tokens_and_labels_are_llavas_own(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    dialogues = [sample.turns for sample in LlavaData(real / "llava_instruct.json", real / "images").samples]
    plain = [[(question, answer.strip()) for question, answer in turns] for turns in DIALOGUES]
    for turns in dialogues + plain:
        ids, labels = encode(tokenizer, turns, "vicuna_v1")
        conversation = llavas_vicuna_v1(turns)
        assert ids == llavas_tokenizer_image_token(conversation, tokenizer)
        assert labels == llavas_mask(conversation, ids, tokenizer)
        prompt = turns[:-1] + [(turns[-1][0], None)]
        theirs = llavas_tokenizer_image_token(llavas_vicuna_v1(prompt), tokenizer)
        assert encode(tokenizer, prompt, "vicuna_v1")[0] == theirs
    assert ids[0] == 1 and ids.count(1) == 1


def test_plain_tokens_are_llavas_stage_one(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    for sample in LlavaData(real / "llava_pretrain.json", real / "images").samples:
        caption = sample.turns[0][1]
        ids, labels = encode(tokenizer, sample.turns, "plain")
        assert ids == llavas_tokenizer_image_token(f"<image>{caption}\n", tokenizer)
        assert labels == [IGNORE, IGNORE] + ids[2:]                  # BOS and picture; then everything is learnt


def test_tokenizer_is_loaded_without_truncation_padding_and_trimming(small, tmp_path):
    dirty = Tokenizer.from_str(small.to_str())
    dirty.enable_truncation(4)
    dirty.enable_padding(length=50)
    dirty.post_processor = processors.ByteLevel(trim_offsets=True)
    dirty.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), DIALOGUES[2], "chatml") == encode(small, DIALOGUES[2], "chatml")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "elsewhere")


def test_a_checkpoints_own_template_is_recognised(tmp_path):
    def found(chat):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
        return find_template(tmp_path)
    assert find_template(tmp_path) is None and found(None) is None and found("") is None
    assert found("{{ bos_token }}{% for m in messages %}<|start_header_id|>...<|eot_id|>") == "llama_3"
    assert found([{"name": "default", "template": "{% for m in messages %}{{'<|im_start|>' + m.role}}"}]) == "chatml"
    assert found("{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}") == "chatml"
    assert found("{% if system %}<<SYS>>\\n{% endif %}[INST] {{ content }} [/INST]") == "llama_2"
    assert found("{% for m in messages %}USER: {{ m }} ASSISTANT: {% endfor %}") == "vicuna_v1"
    for chat, name in (("{{ bos_token }}{% for m in messages %}[INST] {{ m }} [/INST]{% endfor %}", "Mistral's"),
                       ("{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + eos_token }}", "Zephyr's"),  # TinyLlama
                       ("{% for m in messages %}Human: {{ m }}", "which begins '{% for m in messages %}Human: {{ m }}'")):
        with pytest.raises(InputError, match=re.escape(f"{name}, is none of ours: choose one with --template= (plain, vicuna_v1")):
            found(chat)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>")
    assert find_template(tmp_path) == "chatml"
    (tmp_path / "config.json").write_text('{"template": "tiny"}')
    assert find_template(tmp_path) == "tiny"
    (tmp_path / "config.json").write_text('{"template": "huge"}')
    with pytest.raises(InputError, match="no template 'huge'"):
        find_template(tmp_path)


def test_phi_has_no_chat_template_and_takes_the_one_that_the_dense_connector_taught_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi"}')
    assert find_template(tmp_path) == "phi"
    text = render([("q1", "a1"), ("q2", None)], "phi")[0]
    assert text == f"{VICUNA} USER: q1 ASSISTANT: a1<|endoftext|>USER: q2 ASSISTANT:"


@pytest.mark.parametrize("template", TEMPLATES)
def test_too_long_a_dialogue_is_cut_at_a_whole_turn(tokenizer, template):
    turns = [("<image>\nfirst " + "q " * 5, "a " * 4 + "end"), ("second", "yes"), ("<image> and <image>", "no, not"),
             ("last", "it is")]
    wholes = [encode(tokenizer, turns[:k], template) for k in range(1, 5)]
    lengths = [sum(10 if token == IMAGE else 1 for token in ids) for ids, _ in wholes]
    for limit in range(lengths[-1] + 2):
        fitting = [whole for whole, length in zip(wholes, lengths) if length <= limit]
        expected = fitting[-1] if fitting else ([], [])
        if template == "plain" and fitting:                          # no questions: captions in a row are one text
            expected = ([([], [])] + [whole for whole in (wholes[1], wholes[3]) if whole in fitting])[-1]
        assert cut_to_length(*wholes[-1], limit, 10) == expected


# --- pictures ---

def saved(image, path, **options):
    image.save(path, **options)
    return path


@pytest.fixture
def rgb():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


def test_every_mode_opens_as_rgb(rgb, tmp_path):
    grey, palette = rgb.convert("L"), rgb.convert("P")
    opened = {mode: open_image(saved(image, tmp_path / f"{mode}.{kind}")) for mode, image, kind in [
        ("L", grey, "png"), ("P", palette, "png"), ("1", rgb.convert("1"), "png"),
        ("CMYK", rgb.convert("CMYK"), "tiff")]}
    assert all(image.mode == "RGB" and image.size == (20, 12) for image in opened.values())
    assert np.array_equal(opened["L"], np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    assert np.array_equal(opened["P"], palette.convert("RGB"))
    assert np.array_equal(opened["CMYK"], rgb)                       # PIL's RGB to CMYK and back loses nothing


def test_transparency_is_seen_on_white(rgb, tmp_path):
    alpha = np.full((12, 20), 255, np.uint8)
    alpha[:, :10] = 0
    rgba = Image.merge("RGBA", [*rgb.split(), Image.fromarray(alpha)])
    pixels = np.asarray(open_image(saved(rgba, tmp_path / "rgba.png")))
    assert (pixels[:, :10] == 255).all() and np.array_equal(pixels[:, 10:], np.asarray(rgb)[:, 10:])
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert np.asarray(open_image(saved(palette, tmp_path / "p.png", transparency=1))).min() == 255


def test_sixteen_bits_become_eight(tmp_path):
    values = (np.arange(256, dtype=np.uint16) * 256 + 77).reshape(16, 16)
    for kind in ("png", "tiff"):
        path = saved(Image.fromarray(values), tmp_path / f"deep.{kind}")
        assert np.array_equal(np.asarray(open_image(path))[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)), (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    (8, lambda a: np.rot90(a))])
def test_exif_orientation_is_applied(rgb, tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(rgb, tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(path), upright(np.asarray(rgb)))
    assert torch.equal(to_pixels(Image.open(path), ImageSpec(20)), to_pixels(open_image(path), ImageSpec(20)))


def test_unreadable_exif_is_no_reason_to_lose_a_picture(rgb, tmp_path):
    assert open_image(saved(rgb, tmp_path / "broken.jpg", exif=b"Exif\0\0MM garbage")).size == (20, 12)


def test_of_an_animation_the_first_frame_is_seen(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("gif", "png", "webp"):
        path = saved(red, tmp_path / f"moving.{kind}", save_all=True, append_images=[blue])
        assert Image.open(path).n_frames == 2
        assert np.asarray(open_image(path))[0, 0, 0] > 250


def test_a_picture_that_cannot_be_used_is_named_in_one_line(rgb, tmp_path, monkeypatch):
    whole = saved(rgb.resize((200, 200)), tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    saved(rgb.resize((300, 300)), tmp_path / "bomb.png")
    (tmp_path / "folder.jpg").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60000)            # 90000 pixels: where PIL itself only warns
    for name in ("truncated.jpg", "text.jpg", "empty.png", "bomb.png", "folder.jpg", "missing.jpg"):
        with pytest.raises(BadImage) as error:
            open_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert open_image(tmp_path / "whole.jpg").size == (200, 200)
    assert open_image(io.BytesIO(whole)).size == (200, 200)


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_a_needle_is_refused_before_it_fills_the_memory(mode):
    with pytest.raises(BadImage, match="1x60000 is too elongated"):          # padded: 3.6e9 pixels; cropped: 336 x 20e6
        to_pixels(Image.new("RGB", (1, 60000)), ImageSpec(336, mode))
    assert to_pixels(Image.new("RGB", (1, 60000)), ImageSpec(336, "stretch")).shape == (3, 336, 336)


def test_pixels_are_those_recorded_from_transformers():
    """Recorded by make_data_fixtures.py; test_data_live.py compares with transformers itself, on photographs too."""
    recorded = load_file(Path(__file__).parent / "fixtures" / "pixels.safetensors")
    specs = {"clip": ImageSpec(32, "crop"), "siglip": ImageSpec(32, "stretch"),
             "dinov2": ImageSpec(32, "crop", resize_to=37), "llava": ImageSpec(32, "pad")}
    for name, theirs in recorded.items():
        picture, processor = name.split(".")
        if processor in specs:
            assert torch.equal(to_pixels(recorded[f"{picture}.input"].numpy(), specs[processor]), theirs), name


MEAN = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 0.3])


@pytest.mark.parametrize("config, expected", [
    # as published: openai/clip-vit-large-patch14-336, openai/clip-vit-base-patch16, facebook/dinov2-base,
    # google/siglip-so400m-patch14-384
    ({"crop_size": 336, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3,
      "size": 336}, (336, "crop", 3, None)),
    ({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "image_processor_type": "CLIPImageProcessor",
      "size": {"shortest_edge": 224}}, (224, "crop", 3, None)),
    ({"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "image_processor_type": "BitImageProcessor",
      "resample": 3, "size": {"shortest_edge": 256}}, (224, "crop", 3, 256)),
    ({"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": {"height": 384, "width": 384}},
     (384, "stretch", 3, None)),
    # google/vit-base-patch16-224, facebook/vit-mae-base, facebook/deit-base-distilled-patch16-224,
    # llava-hf/llava-1.5-7b-hf
    ({"image_processor_type": "ViTImageProcessor", "resample": 2, "size": {"height": 224, "width": 224}},
     (224, "stretch", 2, None)),
    ({"feature_extractor_type": "ViTFeatureExtractor", "resample": 2, "size": 224}, (224, "stretch", 2, None)),
    ({"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3,
      "size": 256}, (224, "stretch", 3, 256)),
    ({"crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_pad": True, "resample": 3,
      "image_processor_type": "LlavaImageProcessor", "size": {"shortest_edge": 336}}, (336, "pad", 3, None)),
])
def test_preprocessing_is_read_from_published_configs(config, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | MEAN))
    spec = ImageSpec.from_folder(tmp_path)
    assert (spec.size, spec.mode, spec.resample, spec.resize_to) == expected
    assert spec.mean == (0.5, 0.4, 0.3) and spec.std == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(spec.config()))
    assert ImageSpec.from_folder(tmp_path) == spec


@pytest.mark.parametrize("config", [{}, {"size": 224}, [1], {"size": {"longest_edge": 3}, **MEAN},
                                    {"size": {"height": 224, "width": 448}, **MEAN}])
def test_a_preprocessing_that_cannot_be_followed_is_an_error(config, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="preprocessor_config.json: (not the description|only square)"):
        ImageSpec.from_folder(tmp_path)


# --- boxes ---

@pytest.mark.parametrize("width, height", [(640, 480), (333, 500), (64, 64), (7, 1000)])
def test_boxes_move_with_the_padding_and_back(width, height):
    """A white rectangle is found in the padded picture where pad_box says, and unpad_box leads back to its pixels."""
    box = [width // 4, height // 4, width // 2 + 1, height // 2 + 1]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[box[1]:box[3], box[0]:box[2]] = 255
    side = max(width, height)
    white = (to_pixels(pixels, ImageSpec(side)) == 255).all(0).nonzero()     # (white pixels, 2): y, x
    (top, left), (bottom, right) = white.min(0).values.tolist(), (white.max(0).values + 1).tolist()
    padded = pad_box(box, width, height)
    assert np.allclose(np.array(padded) * side, [left, top, right, bottom])
    assert np.allclose(unpad_box(padded, width, height), box)


def test_boxes_are_text_and_text_is_boxes():
    assert format_box([0.39, 0.48301, 0.8836, 1]) == "[0.390,0.483,0.884,1.000]"
    assert format_box([0, 0.5, 1, 1], decimals=2) == "[0.00,0.50,1.00,1.00]"
    assert parse_box("It is at [0.390,0.483,0.884,0.866].") == [0.39, 0.483, 0.884, 0.866]
    assert parse_box("[ 0, .5, 1., 1.25 ] or [1,1,1,1]") == [0, 0.5, 1, 1.25]
    for text in ("", "no", "[0.1,0.2,0.3]", "[0.1,0.2,0.3,x]", "0.1,0.2,0.3,0.4", "[nan,0,0,0]", "[1,2,3,4,5]"):
        assert parse_box(text) is None


# --- formats ---

def write(path, records, lines=False):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_llava_json_and_jsonl_give_the_same_samples(tmp_path):
    records = [{"id": "one", "image": "sub/a.jpg", "conversations": talk("<image>\nq", "a", "q2", "a2")},
               {"id": 2, "image": ["a.jpg", "b.jpg"], "conversations": talk("<image> or <image>?", "the first")},
               {"conversations": talk("", "said before it was asked", "no picture", "none", "not answered")[1:]}]
    expected = [Sample([str(tmp_path / "sub" / "a.jpg")], [("<image>\nq", "a"), ("q2", "a2")], "one"),
                Sample([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], [("<image> or <image>?", "the first")], "2"),
                Sample([], [("no picture", "none")], "2")]
    for file in (write(tmp_path / "a.json", records), write(tmp_path / "a.jsonl", records, lines=True)):
        dataset = LlavaData(file, tmp_path)
        assert [dataset[i] for i in range(len(dataset))] == expected
        assert dataset.length(0) > dataset.length(2) and dataset.length(1) > dataset.length(0)
    assert len(LlavaData(write(tmp_path / "text.json", records[2:]), tmp_path / "no folder needed")) == 1


def test_real_dialogues_and_their_boxes(real):
    dataset = LlavaData(real / "llava_instruct.json", real / "images")
    boxes = {(sample.images[0], re.sub(r".*?is the |\?", "", question, flags=re.S)): answer
             for sample in dataset.samples for question, answer in sample.turns if "Where" in question}
    shikra = ShikraData(real / "shikra_rec.jsonl", real / "images")
    found = 0
    for i, line in enumerate((real / "shikra_rec.jsonl").read_text().splitlines()):
        record, sample = json.loads(line), shikra[i]
        assert record["expression"] in sample.turns[0][0] or "box" in sample.turns[0][0]
        restored = unpad_box(parse_box(sample.turns[0][1]), record["width"], record["height"])
        rounding = 0.0005 * max(record["width"], record["height"])   # three decimals of the side
        assert np.allclose(restored, record["bbox"], atol=rounding + 1e-6)
        theirs = boxes.get((sample.images[0], record["expression"].removeprefix("the ")))
        if theirs:                                                   # the dialogues have the same object
            assert np.allclose(parse_box(sample.turns[0][1]), parse_box(theirs), atol=0.001)
            found += 1
    assert len(shikra) == 113 and found > 20


def test_shikra_asks_for_the_box_or_gives_it(tmp_path):
    records = [{"img_path": "a.jpg", "expression": f"the cat {i}", "bbox": [10, 0, 30, 50], "height": 50, "width": 100}
               for i in range(8)]
    file = write(tmp_path / "s.jsonl", records, lines=True)
    box = "[0.100,0.250,0.300,0.750]"                                # 25 rows of padding above
    rec, reg = ShikraData(file, tmp_path, "rec"), ShikraData(file, tmp_path, "reg")
    for i in range(8):
        (asked, answer), = rec[i].turns
        assert asked.startswith("<image>\n") and f"the cat {i}" in asked and answer == box
        (asked, answer), = reg[i].turns
        assert asked.startswith("<image>\n") and box in asked and answer == f"the cat {i}"
    assert len({rec[i].turns[0][0].replace(str(i), "") for i in range(8)}) == 4
    assert [sample for sample in ShikraData(file, tmp_path, "rec")] == [rec[i] for i in range(8)]
    with pytest.raises(InputError, match="no task 'find'"):
        ShikraData(file, tmp_path, "find")


GOOD = {"id": "good", "image": "a.jpg", "conversations": talk("<image>\nq", "a")}
BOX = {"img_path": "a.jpg", "expression": "it", "bbox": [1, 1, 2, 2], "height": 9, "width": 9}
BROKEN = {
    "role": ({"id": "x7", "conversations": [{"value": "q"}]}, "sample 1 (id x7): every message needs a role"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "q"}]}, "sample 1: every message needs a role"),
    "no text": ({"conversations": [{"from": "human"}]}, 'needs a text, "value"'),
    "no conversations": ({"id": 3}, "(id 3): no conversations"),
    "empty conversations": ({"conversations": []}, "no conversations"),
    "no answer": ({"conversations": talk("q")}, "without a question and its answer"),
    "two questions in a row": ({"conversations": talk("q")[:1] * 2}, "should take turns"),
    "a mark too many": (GOOD | {"conversations": talk("<image><image>q", "a")}, "2 <image> marks but 1 images"),
    "no mark": (GOOD | {"conversations": talk("q", "a")}, "0 <image> marks but 1 images"),
    "no image": ({"conversations": talk("<image>q", "a")}, "1 <image> marks but 0 images"),
    "image is a number": (GOOD | {"image": 3}, "image should be a file name"),
    "image above": (GOOD | {"image": "../a.jpg"}, "leaves the image folder"),
    "image above, hidden": (GOOD | {"image": "sub/../../a.jpg"}, "leaves the image folder"),
    "image beside": (GOOD | {"image": "../images2/a.jpg"}, "leaves the image folder"),
    "image elsewhere": (GOOD | {"image": "/etc/passwd"}, "leaves the image folder"),
    "image with a zero": (GOOD | {"image": "a\0.jpg"}, "image should be a file name"),
    "not an object": ([1], "should be an object, is a list"),
}


@pytest.mark.parametrize("record, message", BROKEN.values(), ids=BROKEN)
def test_a_bad_record_is_named_in_one_line(record, message, tmp_path):
    (tmp_path / "images").mkdir()
    file = write(tmp_path / "bad.json", [GOOD, record])
    with pytest.raises(InputError, match=re.escape(message)) as error:
        LlavaData(file, tmp_path / "images")
    assert str(error.value).startswith(f"{file}, sample 1") and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    {"bbox": [1, 2, 3]}, {"bbox": None}, {"bbox": [1, 1, "2", 2]}, {"bbox": [3, 1, 2, 2]}, {"bbox": [1, 1, 2, 99]},
    {"bbox": [1, 1, 2, math.inf]}, {"width": 0}, {"height": None}, {"expression": None}, {"img_path": None},
    {"img_path": "../a.jpg"}])
def test_a_bad_box_is_named_in_one_line(change, tmp_path):
    file = write(tmp_path / "bad.jsonl", [BOX, BOX | change], lines=True)
    with pytest.raises(InputError, match=re.escape(f"{file}, line 2: ")) as error:
        ShikraData(file, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ('[{"id": 1},\n {"id": 2}\n {"id": 3}]', "not JSON, line 3"), ('{"id": 1}\n{"id": \n', "not JSON, line 2"),
    ('[]', "holds no samples"), ('', "holds no samples"), ('\n\n', "holds no samples"),
    ('[{"id": 1}', "not JSON, line 1"), (b"\xff\xfe\x00", "cannot be read")])
def test_a_file_that_is_not_json_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        LlavaData(tmp_path / "bad.json", tmp_path)
    assert str(tmp_path / "bad.json") in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_missing_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="none.json: cannot be read"):
        LlavaData(tmp_path / "none.json", tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        LlavaData(write(tmp_path / "a.json", [GOOD]), tmp_path / "nowhere")


# --- the loader ---

class Listed:
    """A dataset of samples in memory: sample i has a picture full of i and an answer whose length depends on i."""

    def __init__(self, n, length=lambda i: 1 + i * 7 % 40, bad=(), empty=()):
        self.n, self.lengths, self.bad, self.empty = n, length, set(bad), set(empty)

    def __len__(self):
        return self.n

    def length(self, i):
        return self.lengths(i)

    def __getitem__(self, i):
        picture = "missing.jpg" if i in self.bad else np.full((8, 8, 3), i % 256, np.uint8)
        return Sample([picture], [("<image>\nq", "" if i in self.empty else "x" * self.lengths(i))], f"n{i}")


def loader(dataset, tokenizer, global_batch=8, micro_batch=3, **options):
    return Loader(dataset, tokenizer, "tiny", ImageSpec(8), 4, 200, global_batch, micro_batch, **options)


def take(loader, steps):
    iterator = iter(loader)
    return [next(iterator) for _ in range(steps)]


def names(steps):
    """Of every step the names of its samples."""
    return [[name for batch in step for name in batch.ids] for step in steps]


def same(a, b):
    return all(torch.equal(x.tokens, y.tokens) and torch.equal(x.labels, y.labels) and torch.equal(x.pixels, y.pixels)
               and x.ids == y.ids for x, y in zip(sum(a, []), sum(b, []), strict=True))


def rows(batch):
    """Its dialogues apart again: [(tokens, labels), ...]."""
    return [*zip(batch.tokens[0].split(batch.lengths), batch.labels[0].split(batch.lengths), strict=True)]


def test_a_batch_has_its_pictures_tokens_and_labels_and_no_padding(small):
    class Mixed(Listed):
        def __getitem__(self, i):
            black, white = np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (4, 2), "white")
            return [super().__getitem__(7), Sample([], [("no picture", "ok")], "text"),
                    Sample([black, white], [("<image><image>", "two")], "two")][i]

    (batch, ), = take(loader(Mixed(3), small, global_batch=3), 1)
    assert sorted(batch.ids) == ["n7", "text", "two"] and batch.skipped == []
    assert batch.pixels.shape == (3, 3, 8, 8) and batch.pixels.dtype == torch.uint8 and batch.shown.tolist() == [0, 1, 2]
    assert batch.tokens.shape == batch.labels.shape == (1, sum(batch.lengths)) and batch.tokens.dtype == torch.long
    for (tokens, labels), name in zip(rows(batch), batch.ids):
        marks = {"n7": 1, "text": 0, "two": 2}[name]
        assert (tokens == IMAGE).sum() == 4 * marks
        supervised = labels != IGNORE
        assert torch.equal(labels[supervised], tokens[supervised])
        assert supervised[-1] and not supervised[0]                  # the end token is the last; none predicts the first
    row_of_picture = [name for name in batch.ids for _ in range({"n7": 1, "text": 0, "two": 2}[name])]
    assert batch.pixels[row_of_picture.index("n7")].unique().tolist() == [7]


def test_the_first_token_of_a_dialogue_is_never_supervised_by_the_one_before_it():
    batch = collate([("a", [5, 6], [5, 6], []), ("b", [7, 8, 9], [7, IGNORE, 9], [])], [], 8)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]] and batch.lengths == [2, 3]
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, IGNORE, 9]]


def test_a_file_that_several_dialogues_are_about_is_decoded_and_held_once(small, rgb, tmp_path, monkeypatch):
    saved(rgb, tmp_path / "a.png"), saved(rgb.rotate(180), tmp_path / "b.png")
    shown = ["a.png", "b.png", "a.png", "a.png"]
    records = [{"id": f"n{i}", "image": name, "conversations": talk("<image>q", "a")} for i, name in enumerate(shown)]
    decoded = []
    monkeypatch.setattr(data, "open_image", lambda path: decoded.append(path) or open_image(path))
    (batch, ), = take(loader(LlavaData(write(tmp_path / "a.json", records), tmp_path), small, global_batch=4, micro_batch=4), 1)
    assert len(decoded) == len(batch.pixels) == 2
    assert [Path(decoded[place]).name for place in batch.shown] == [shown[int(name[1:])] for name in batch.ids]


def test_a_batch_of_text_has_an_empty_pixel_tensor(small):
    class Text(Listed):
        def __getitem__(self, i):
            return Sample([], [("q", "a")], f"t{i}")

    (batch, ), = take(loader(ConcatDataset([Text(1), Text(2)]), small, global_batch=3), 1)
    assert batch.pixels.shape == (0, 3, 8, 8) and len(batch.ids) == 3


def test_order_is_a_pure_function_of_seed_and_epoch():
    lengths = [i * 7 % 40 for i in range(100)]
    torch.manual_seed(1)
    first = order(100, seed=3, epoch=2, lengths=lengths, global_batch=8)
    torch.manual_seed(2), np.random.seed(5)
    assert first == order(100, seed=3, epoch=2, lengths=lengths, global_batch=8)
    assert sorted(first) == sorted(order(100, 3, 2)) == list(range(100))
    others = [order(100, seed, epoch, lengths, 8) for seed, epoch in ((3, 1), (4, 2), (2, 3))]
    assert all(first != other for other in others)


def test_grouping_by_length_gives_ranks_and_micro_batches_alike_work(small):
    class Blind(Listed):
        def length(self, i):
            return 0

    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist()

    def unevenness(cls):
        steps = take(loader(cls(200, lengths.__getitem__), small, global_batch=16, micro_batch=4), 12)
        totals = [[sum(batch.lengths) for batch in step] for step in steps]
        return np.mean([max(total) / np.mean(total) - 1 for total in totals])
    assert unevenness(Listed) < 0.5 * unevenness(Blind)


def test_ranks_share_a_global_batch_without_repeats(small):
    whole = names(take(loader(Listed(50), small, global_batch=10), 7))
    for world_size in (2, 3, 4):
        ranks = [take(loader(Listed(50), small, global_batch=10, rank=rank, world_size=world_size), 7)
                 for rank in range(world_size)]
        assert len({tuple(len(step) for step in rank) for rank in ranks}) == 1   # as many forwards each
        assert all(len(batch.ids) <= 3 for rank in ranks for step in rank for batch in step)
        for k in range(7):
            parts = [names(rank)[k] for rank in ranks]
            assert sorted(sum(parts, [])) == sorted(whole[k]) and len(set(sum(parts, []))) == 10
            assert parts[1] == whole[k][1::world_size]


def test_the_stream_is_one_epoch_after_another_from_any_sample(small):
    dataset = Listed(30)
    whole = sum(names(take(loader(dataset, small, global_batch=1), 100)), [])
    expected = sum((order(30, 0, epoch, [dataset.length(i) for i in range(30)], 1) for epoch in range(4)), [])
    assert whole == [f"n{i}" for i in expected[:100]]
    uninterrupted = take(loader(dataset, small), 11)
    for done in (1, 3, 4, 8):                                        # 24 samples: in the first epoch; 32: in the second
        assert same(take(loader(dataset, small, start=done * 8), 3), uninterrupted[done:done + 3])
    stream = sum(names(uninterrupted), [])
    assert names(take(loader(dataset, small, start=13), 2)) == [stream[13:21], stream[21:29]]


def test_workers_change_nothing(small):
    options = dict(rank=1, world_size=2, start=5)
    dataset = Listed(60, bad=[3, 11], empty=[4])
    alone, helped = loader(dataset, small, **options), loader(dataset, small, workers=2, **options)
    state = torch.get_rng_state()
    assert same(take(alone, 8), take(helped, 8))
    assert alone.seen == helped.seen and list(alone.skipped) == list(helped.skipped) != []
    assert torch.equal(state, torch.get_rng_state())                 # and the run's random state is its own


def test_a_bad_picture_is_skipped_counted_and_named(small, rgb, tmp_path):
    for i in range(8):
        saved(rgb, tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:100])
    (tmp_path / "5.png").unlink()
    records = [{"id": f"n{i}", "image": f"{i}.png", "conversations": talk("<image>q", "" if i == 6 else "a")}
               for i in range(8)]
    loading = loader(LlavaData(write(tmp_path / "a.json", records), tmp_path), small)
    step, = take(loading, 1)
    assert sorted(names([step])[0]) == ["n0", "n1", "n3", "n4", "n7"] and loading.seen == 8
    assert sorted(loading.skipped) == sorted(name for batch in step for name, _ in batch.skipped) == ["n2", "n5", "n6"]
    assert "2.png: not a readable image" in str(loading.skipped["n2"])
    assert "5.png: no such image" in str(loading.skipped["n5"])
    assert "no supervised token: its answers are empty" in str(loading.skipped["n6"])


def test_more_than_one_percent_of_bad_pictures_stop_the_run(small):
    def seen_before_the_end(bad, n, steps):
        loading = loader(Listed(n, bad=bad), small, global_batch=10, micro_batch=10)
        try:
            take(loading, steps)
        except InputError as error:
            assert "\n" not in str(error) and "more than 1%" in str(error)
            assert "missing.jpg: no such image" in str(error)
            return loading.seen
    assert seen_before_the_end([5, 6, 7], 40, 40) is None            # three are forgiven, in ten epochs
    assert seen_before_the_end([5, 6, 7, 8], 40, 40) <= 40           # four of 40 are more than 1%
    assert seen_before_the_end(range(0, 2000, 200), 2000, 200) is None       # ten of 2000: 0.5%
    assert seen_before_the_end(range(0, 2000, 50), 2000, 200) < 1900         # 2%


def test_samples_with_nothing_to_learn_are_skipped_and_do_not_stop_the_run(small):
    loading = loader(Listed(40, empty=range(20)), small)
    take(loading, 5)
    assert loading.seen == 40 and sorted(loading.skipped) == sorted(f"n{i}" for i in range(20))
    short = Loader(Listed(8, lambda i: 300 if i == 3 else 3), small, "tiny", ImageSpec(8), 4, 100, 8, 8)
    take(short, 1)
    assert "n3" in short.skipped and "not even the first turn fits into 100 tokens" in str(short.skipped["n3"])


def test_a_dataset_of_which_nothing_is_left_stops_the_run(small):
    with pytest.raises(InputError, match="no sample of the dataset can be learnt from; the last one: n"):
        take(loader(Listed(5, empty=range(5)), small), 9)


def test_turns_that_are_cut_off_take_their_pictures_along(small):
    class Long(Listed):
        def __getitem__(self, i):
            black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
            return Sample([black, white], [("<image>q", "a"), ("<image>q", "a" * 300)], f"n{i}")

    (batch, ), = take(loader(Long(1), small, global_batch=1), 1)
    assert batch.pixels.shape == (1, 3, 8, 8) and batch.pixels.max() == 0 and (batch.tokens == IMAGE).sum() == 4


def test_a_rank_with_nothing_left_still_makes_its_forwards(small):
    empty, three = Listed(5, empty=range(4)), Listed(3)
    ranks = [take(loader(empty, small, global_batch=5, micro_batch=2, rank=rank, world_size=2), 2) for rank in (0, 1)]
    ranks.append(take(loader(three, small, global_batch=3, micro_batch=1, rank=1, world_size=2), 2))
    for steps in ranks:
        for step in steps:
            assert len(step) == 2
            for batch in step:
                if not batch.ids:
                    assert batch.tokens.shape == (1, 1) and batch.labels.tolist() == [[IGNORE]] and batch.lengths == [1]
                    assert batch.pixels.shape == (0, 3, 8, 8)
    assert not ranks[2][0][1].ids                                    # three samples on two ranks: one, and a stand-in


@pytest.mark.parametrize("workers", [0, 1])
def test_a_link_out_of_the_image_folder_stops_the_run_in_one_line(workers, small, rgb, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    os.symlink(saved(rgb, tmp_path / "secret.png"), images / "a.jpg")
    dataset = LlavaData(write(tmp_path / "a.json", [GOOD]), images)
    with pytest.raises(InputError, match="^sample good: the image path .*secret.png leaves the image folder .*images$"):
        take(loader(dataset, small, workers=workers), 1)
    (tmp_path / "link").symlink_to(images)                           # a link to the folder itself is fine
    (images / "a.jpg").unlink()
    saved(rgb, images / "a.jpg", format="PNG")
    dataset = LlavaData(tmp_path / "a.json", tmp_path / "link")
    assert names(take(loader(dataset, small, global_batch=1), 1)) == [["good"]]


def test_real_photographs_become_batches(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    dataset = ConcatDataset([LlavaData(real / "llava_instruct.json", real / "images"),
                             ShikraData(real / "shikra_rec.jsonl", real / "images")])
    loading = Loader(dataset, tokenizer, "vicuna_v1", ImageSpec(112), 16, 2048, 16, 8)
    for step in take(loading, 4):
        for batch in step:
            assert (batch.tokens == IMAGE).sum() == 16 * len(batch.shown) and batch.pixels.float().std() > 20
    assert loading.seen == 64 and not loading.skipped
