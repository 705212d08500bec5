"""dialogue.py and common/tokenizer.py against texts, tokens and labels written out by hand."""

import json
import struct

import pytest
from conftest import ROOT, refused
from tokenizers import Tokenizer

import dialogue
from data import LlavaData
from dialogue import IGNORE, IMAGE, TEMPLATES, encode, find_template, load_tokenizer, render

DIALOGUES = [
    [("<image>\nWhat is this?", "A cat."), ("Where?", "[0.390,0.483,0.884,0.866]"), ("?", "Yes")],
    [("Compare <image> with <image>", "  The first\n\nis   older."), ("日本 🎉?", "¿Qué? 日 🎉")],
    [("What is two plus two?", '\'s not five: "4".\n')],
]
TWO_TURNS = [("q1", "a1"), ("q2", "a2")]


@pytest.fixture(scope="session", params=["toy", "llama2", "llama3"])
def tokenizer(request, world_tokenizer):
    """Three kinds, of byte-level BPE, sentencepiece and tiktoken, with all special tokens."""
    tokenizer = Tokenizer.from_str(world_tokenizer.to_str())
    if request.param != "toy":
        real = request.getfixturevalue("real")
        tokenizer = load_tokenizer(real / "tokenizers" / request.param)
    special = {token for template in TEMPLATES.values() for token in template.special}
    tokenizer.add_special_tokens(sorted(special))
    return tokenizer


def test_layouts_are_those_of_their_authors(world_tokenizer):
    expected = json.loads((ROOT / "tests" / "fixtures" / "templates.json").read_text())
    assert {name: render(TWO_TURNS, name)[0] for name in TEMPLATES} == expected
    assert render([("Describe it.\n<image>", "A cat.")], "plain")[0] == "<image>A cat.\n"
    for name, image in (("llama_3", "<image>\n"), ("llama_3_dense", "<image>")):
        assert f"\n\n{image}q<|eot_id|>" in render([("<image>\nq", None)], name)[0]
    assert render(TWO_TURNS, "vicuna_v1", "Be brief.")[0].startswith("Be brief. USER: q1")
    with refused("tiny"):
        render(TWO_TURNS, "tiny", "Be brief.")
    with refused("vicuna_v1"):
        render(TWO_TURNS, "vicuna")
    with refused("chatml"):
        encode(world_tokenizer, TWO_TURNS, "chatml")


def test_a_prompt_is_a_prefix_of_what_is_trained_and_labels_are_the_answers(tokenizer):
    for name, template in TEMPLATES.items():
        for turns in DIALOGUES:
            for k, (question, _) in enumerate(turns):
                prompt, prompt_labels = encode(tokenizer, [*turns[:k], (question, None)], name)
                ids, labels = encode(tokenizer, turns[: k + 1], name)
                assert ids[: len(prompt)] == prompt
                assert labels[: len(prompt)] == prompt_labels
                assert labels[len(prompt) :] == ids[len(prompt) :]
                assert ids[-1] in dialogue.end_ids(tokenizer, name)
            assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
            assert ids.count(IMAGE) == sum(question.count("<image>") for question, _ in turns)
            supervised = [label for label in labels if label != IGNORE]
            text = tokenizer.decode(supervised, skip_special_tokens=False)
            expected = "".join(answer + template.end for _, answer in turns)
            # decoders drop and add spaces
            assert text.replace(" ", "") == expected.replace(" ", "")
    # an empty answer is not supervised
    labels = encode(tokenizer, [("q1", " \n"), ("q2", "a2")], "vicuna_v1")[1]
    supervised = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(supervised, skip_special_tokens=False).strip() == "a2</s>"


def test_too_long_a_dialogue_is_cut_at_a_whole_turn(tokenizer):
    turns = [("<image>\nfirst q q", "a a end"), ("second", "yes"), ("<image> or <image>", "no")]
    # captions in a row are one text, so that plain has no turns to cut
    for name in TEMPLATES.keys() - {"plain"}:
        wholes = [encode(tokenizer, turns[:k], name) for k in (1, 2, 3)]
        lengths = [len(ids) + 9 * ids.count(IMAGE) for ids, _ in wholes]
        for limit in range(lengths[-1] + 2):
            fitting = [w for w, length in zip(wholes, lengths, strict=True) if length <= limit]
            expected = fitting[-1] if fitting else ([], [])
            assert dialogue.cut_to_length(*wholes[-1], limit, [10] * 3) == expected


def llava_tokens(tokenizer, text):
    """LLaVA's mm_utils.tokenizer_image_token: each chunk gets a BOS, dropped after an image."""
    ids = []
    for i, chunk in enumerate(text.split("<image>")):
        ids += [IMAGE] if i else [1]
        ids += tokenizer.encode(chunk, add_special_tokens=False).ids
    return ids


def llava_labels(tokenizer, text, ids):
    """LLaVA's preprocess_v1: lengths of prefixes that are tokenized again."""
    labels, place = [IGNORE] + ids[1:], 1
    for turn in text.split("</s>")[:-1]:
        question = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        masked = len(llava_tokens(tokenizer, question)) - 2
        labels[place : place + masked] = [IGNORE] * masked
        place += len(llava_tokens(tokenizer, turn))
    assert place == len(ids)
    return labels


def test_tokens_and_labels_of_real_dialogues_are_llavas(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    for sample in LlavaData(real / "llava_instruct.json", real / "images"):
        ids, labels = encode(tokenizer, sample.turns, "vicuna_v1")
        text = dialogue.VICUNA + " "
        for question, answer in sample.turns:
            text += f"USER: {question} ASSISTANT: {answer.strip()}</s>"
        assert ids == llava_tokens(tokenizer, text)
        assert labels == llava_labels(tokenizer, text, ids)
    for sample in LlavaData(real / "llava_pretrain.json", real / "images"):
        ids, labels = encode(tokenizer, sample.turns, "plain")
        assert ids == llava_tokens(tokenizer, f"<image>{sample.turns[0][1]}\n")
        assert labels == [IGNORE, IGNORE, *ids[2:]]


def test_the_template_of_a_checkpoint_is_recognized(tmp_path):
    def find(chat="", config="{}"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
        (tmp_path / "config.json").write_text(config)
        return find_template(tmp_path)

    assert find(None) is None
    for chat, name in [
        ("<|start_header_id|>...<|eot_id|>", "llama_3"),
        ([{"name": "default", "template": "{{'<|im_start|>' + m.role}}"}], "chatml"),
        ("<|im_start|>{% if enable_thinking is false %}...", "no_think"),
        ("<<SYS>>\\n[INST] {{ content }} [/INST]", "llama_2"),
        ("[INST] {{ m.content }} [/INST]", "mistral_instruct"),
        ("{{ 'ASSISTANT:' }}", "vicuna_v1"),
    ]:
        assert find(chat) == name and find(chat, '{"template": "tiny"}') == "tiny"
    assert find(config='{"model_type": "phi"}') == "phi"
    with refused("config.json"):
        find("### Human: {{ m }}")
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>")
    assert find_template(tmp_path) == "chatml"


def protobuf(number, value):
    """Write one field of a protobuf message: an int, a float, or bytes."""

    def varint(value):
        low = value & 127
        return bytes([low | 128]) + varint(value >> 7) if value > 127 else bytes([low])

    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def write_model(tokenizer, folder, model_type=2):
    """Write a tokenizer as tokenizer.model; LLaMA's scores: -1, -2, ..., -1e9 for spaces."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    message, score = b"", 0.0
    for piece in sorted(vocabulary, key=vocabulary.get):
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(piece, 6 if piece.startswith("<0x") else 1)
        score -= kind == 1
        spaces = len(piece) > 1 and not piece.strip("▁")
        value = protobuf(1, piece.encode()) + protobuf(2, -1e9 if spaces else score)
        message += protobuf(1, value + protobuf(3, kind))
    message += protobuf(2, protobuf(1, b"corpus") + protobuf(3, model_type))
    (folder / "tokenizer.model").write_bytes(message)
    return message


# a tokenizer of LLaMA's kind with 356 pieces
SMALL = ROOT / "tests" / "fixtures" / "llava"
TEXTS = ("", "a photo of a cat", "  two  spaces\n\n ", "Ünï, 漢字 🦙", "<s> x**2 </s>a")


@pytest.mark.parametrize("name", ["small", "llama2"])
def test_a_tokenizer_model_gives_the_published_tokenizer_json(name, request, tmp_path):
    """For LLaMA-2 all 61,249 merges in their order, and the same ids and texts."""
    folder = SMALL if name == "small" else request.getfixturevalue("real") / "tokenizers" / name
    published = load_tokenizer(folder)
    write_model(published, tmp_path)
    ours = load_tokenizer(tmp_path)
    assert json.loads(ours.to_str())["model"] == json.loads(published.to_str())["model"]
    for text in TEXTS:
        ids = published.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == published.decode(ids)


def test_added_tokens_are_read_and_legacy_false_puts_no_space_behind_a_special_token(tmp_path):
    legacy = load_tokenizer(SMALL)
    write_model(legacy, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 357, "<image>": 356}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == legacy.get_vocab()
    assert tokenizer.encode("a</s>t<image>").tokens == ["▁a", "</s>", "▁t", "<image>"]
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a</s>t a").tokens == ["▁a", "</s>", "t", "▁a"]
    for text in TEXTS[:4]:
        assert tokenizer.encode(text).ids == legacy.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_damaged_tokenizer_is_named(tmp_path):
    small = load_tokenizer(SMALL)
    unigram, whole = write_model(small, tmp_path, model_type=1), write_model(small, tmp_path)
    for name, content in (
        ("added_tokens.json", b'{"<pad>": 400}'),
        ("tokenizer.model", b""),
        ("tokenizer.model", whole[:-3]),
        ("tokenizer.model", unigram),
        ("tokenizer.json", b'{"model": 3}'),
    ):
        (tmp_path / name).write_bytes(content)
        with refused(name):
            load_tokenizer(tmp_path)
    with refused("nowhere"):
        load_tokenizer(tmp_path / "nowhere")
