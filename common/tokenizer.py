"""Load LLaMA's tokenizer.model, for a checkpoint without a tokenizer.json.

Vicuna, LLaVA-1.5 and the Dense Connector's 7B and 13B only have a tokenizer.model. It is
sentencepiece's (arXiv 1808.06226), a protobuf message of all pieces of text with a score each,
best first. It is read here without a package for either, into the kind of tokenizer that a
tokenizer.json gives:

    "a photo" -> "▁a▁photo" -> characters -> merge the best-scored neighbors until none -> ids

What no piece covers falls apart into bytes, <0x00> to <0xFF>. sentencepiece scores pieces, the
tokenizers library ranks merges. So every way to cut a piece into two pieces becomes a merge,
ranked by the score of the whole.
"""

import io
import struct
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from common.errors import InputError
from common.pretrained import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)  # types of pieces
BPE = 2  # the trainer's model_type; 1 is unigram


def set_prefix(tokenizer, folder):
    """Put a space before a text, but not behind a special token within it, if "legacy" is false.

    LLaMA's first tokenizers put one before every piece of text between two special tokens, as the
    normalizer Prepend does. LLaVA-1.5's has "legacy": false in its tokenizer_config.json, and so
    other ids behind "</s>".
    """
    config = Path(folder) / "tokenizer_config.json"
    is_new = config.exists() and read_json(config).get("legacy") is False
    if is_new and '"type":"Prepend"' in tokenizer.to_str():
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        # Texts have no spaces by now: the first step adds one at the start, the second replaces it.
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        second = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])


def read_varint(stream):
    """Read a protobuf integer: 7 bits a byte, low bits first."""
    value, shift = 0, 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


def fields(message):
    """Yield the (field number, value) of a protobuf message; values are ints, floats or bytes."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, wire_type = divmod(read_varint(stream), 8)
        if wire_type == 0:
            yield number, read_varint(stream)
        elif wire_type == 5:
            yield number, struct.unpack("<f", stream.read(4))[0]
        else:
            yield number, stream.read(read_varint(stream))


def read_pieces(message):
    """Read a tokenizer.model -> [(piece, score, type)] by id, and two {field number: value}.

    The dictionaries are the specifications of the trainer and of the normalizer.
    """
    pieces, specifications = [], {2: {}, 3: {}}
    for number, value in fields(message):
        if number == 1:
            piece = dict(fields(value))
            pieces.append((piece[1].decode("utf-8"), piece.get(2, 0.0), piece.get(3, NORMAL)))
        elif number in specifications:
            specifications[number] = dict(fields(value))
    return pieces, *specifications.values()


def merges_of(pieces, ids):
    """List the merges (left, right), best first. ids: {piece: its id}.

    Equal scores keep the order of the pieces. Cuts of one piece are in the order of their ids.
    """
    ranked = []
    for number, (piece, score, _) in enumerate(pieces):
        for i in range(1, len(piece)):
            cut = piece[:i], piece[i:]
            if cut[0] in ids and cut[1] in ids:
                ranked.append((-score, number, ids[cut[0]], ids[cut[1]], cut))
    return [cut for *_, cut in sorted(ranked)]


def load_tokenizer_model(folder):
    """Load the tokenizer.model of a folder, and its added_tokens.json. Raises InputError."""
    path = Path(folder) / "tokenizer.model"
    try:
        pieces, trainer, normalizer = read_pieces(path.read_bytes())
    except (OSError, IndexError, KeyError, ValueError, struct.error) as error:
        raise InputError(f"{path}: missing or damaged, and no tokenizer.json ({error!r})") from None
    if trainer.get(3) != BPE or normalizer.get(2) or not normalizer.get(3, 1):
        raise InputError(f"{path}: not a sentencepiece BPE model: take one with a tokenizer.json")
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(ids, merges_of(pieces, ids), **options))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    for piece, _, type_ in pieces:
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED):
            is_special = type_ != USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece, normalized=False, special=is_special)])
    path = path.with_name("added_tokens.json")
    added = read_json(path) if path.exists() else {}
    for token in sorted(added, key=added.get):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != added[token]:
            raise InputError(f"{path}: {token} does not follow the tokens of tokenizer.model")
    set_prefix(tokenizer, folder)
    return tokenizer
