"""spm.py: a tokenizer.model gives the tokenizer that the published tokenizer.json is."""
import json
import struct

import pytest
from tokenizers import Tokenizer

from dialogue import load_tokenizer
from hub import InputError
from make_llava_tokenizer import make_tokenizer
from spm import load_tokenizer_model

TEXTS = ["", "a photo of a cat", "  two  spaces\n\nand lines ", "Ünïcode, 漢字 and 🦙", "<s> is no token here </s>", "1234567890",
         "def f(x):\n\treturn x**2", "A chat between a curious user and an artificial intelligence assistant."]


def varint(value):
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number, value):
    """One protobuf field: an int, a float, or bytes."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def write_model(tokenizer, path, model_type=2, charsmap=b"", prefix=1):
    """A tokenizer.json of LLaMA's kind as sentencepiece would have it. LLaMA's scores: one less from piece to piece, -1e9 for
    runs of spaces. (Its letters come last; no merge makes them, so their scores are of no account.)"""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    message, score = b"", 0
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = 2 if number == 0 else 3 if number < 3 else 6 if piece.startswith("<0x") else 1
        score -= kind == 1
        stated = -1e9 if len(piece) > 1 and not piece.strip("▁") else float(score) if kind == 1 else 0.0
        message += field(1, field(1, piece.encode()) + field(2, stated) + (field(3, kind) if kind != 1 else b""))
    path.write_bytes(message + field(2, field(1, b"corpus") + field(3, model_type)) +
                     field(3, field(1, b"identity") + field(2, charsmap) + field(3, prefix)))


def test_llamas_own_tokenizer_comes_out_merge_for_merge(real, tmp_path):
    """Written back into sentencepiece's format, the published tokenizer.json of Llama 2 gives the same 61249 merges in the
    same order, the same ids and the same text."""
    theirs = load_tokenizer(real / "tokenizers" / "llama2")
    write_model(theirs, tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)                                  # found where there is no tokenizer.json
    described, published = (json.loads(tokenizer.to_str()) for tokenizer in (ours, theirs))
    assert described["model"]["vocab"] == published["model"]["vocab"] and len(published["model"]["merges"]) == 61249
    assert described["model"]["merges"] == published["model"]["merges"]
    captions = [caption for entry in json.loads((real / "captions.json").read_text()) for caption in [json.dumps(entry)]]
    for text in TEXTS + captions:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_a_small_one_too_and_added_tokens_take_their_ids(tmp_path):
    theirs = make_tokenizer()
    write_model(theirs, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 357, "<image>": 356}))
    ours = load_tokenizer(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS + ["<image>\nWhat?<pad>"]:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    with pytest.raises(InputError, match="<pad> is 400, but tokenizer.model leads to 356"):
        load_tokenizer(tmp_path)


def test_without_the_space_before_a_text(tmp_path):
    write_model(make_tokenizer(), tmp_path / "tokenizer.model", prefix=0)
    tokenizer = load_tokenizer_model(tmp_path / "tokenizer.model")
    assert tokenizer.encode("a b").tokens == ["a", "▁", "b"] and tokenizer.decode(tokenizer.encode(" a").ids) == " a"


@pytest.mark.parametrize("settings", (dict(model_type=1), dict(charsmap=b"nfkc")))
def test_another_kind_of_model_is_an_error(settings, tmp_path):
    write_model(make_tokenizer(), tmp_path / "tokenizer.model", **settings)
    with pytest.raises(InputError, match="not a sentencepiece model of LLaMA's kind"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    write_model(make_tokenizer(), tmp_path / "tokenizer.model")
    whole = (tmp_path / "tokenizer.model").read_bytes()
    for damaged in (whole[:-3], whole[:200], b"", b"\x00" * 40, b"PK\x03\x04" + whole, whole[:50] + b"\xff" * 30 + whole[80:]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(InputError, match="tokenizer.model: not a sentencepiece model"):
            load_tokenizer(tmp_path)


def test_without_either_file_the_error_names_both(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json, and no tokenizer.model"):
        load_tokenizer(tmp_path)
