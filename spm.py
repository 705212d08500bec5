"""LLaMA's tokenizer.model, for checkpoints without a tokenizer.json: Vicuna, LLaVA-1.5, the Dense Connector's 7B and 13B.

The file is sentencepiece's (arXiv 1808.06226), a protobuf message: all pieces of text with a score each, best first. Here it
is read without a package for either, into the same kind of tokenizer that a tokenizer.json gives:

    "a photo" --normalise--> "▁a▁photo" --letters, then merge the neighbours that make the best piece, again and again--> ids

What no piece covers falls apart into bytes, <0x00> to <0xFF>. sentencepiece scores pieces, tokenizers ranks merges: so every
way to cut a piece into two pieces becomes a merge, ranked by the score of the whole.
"""
import struct

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from hub import InputError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4                             # types of pieces; 1 is normal, 6 a byte
BPE = 2                                                              # model_type of the trainer; 1 is unigram


def fields(message):
    """A protobuf message, bytes -> its (field number, value) in order; values are ints, floats or bytes."""
    place = 0

    def varint():
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 2: None, 5: 4}[kind]
        length = varint() if length is None else length
        value, place = message[place:place + length], place + length
        if place > len(message):
            raise IndexError("ends within a field")
        yield number, struct.unpack("<f", value)[0] if kind == 5 else value


def read_pieces(message):
    """tokenizer.model's bytes -> [(piece, score, type)] in the order of their ids, and the specifications of the trainer
    and of the normaliser, {field number: value} each."""
    pieces, trainer, normaliser = [], {}, {}
    for number, value in fields(message):
        if number == 1:
            piece = dict(fields(value))
            pieces.append((piece[1].decode("utf-8"), piece.get(2, 0.0), piece.get(3, 1)))
        elif number == 2:
            trainer = dict(fields(value))
        elif number == 3:
            normaliser = dict(fields(value))
    return pieces, trainer, normaliser


def merges_of(pieces):
    """[(left, right)], best first. Equal scores keep the order of the pieces; ways to cut one piece that of their halves' ids."""
    ids, found = {piece: i for i, (piece, _, _) in enumerate(pieces)}, []
    for piece, score, _ in pieces:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
        found += [(-score, cut) for cut in sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]]))]
    return [cut for _, cut in sorted(found, key=lambda scored: scored[0])]


def load_tokenizer_model(path, added={}):
    """tokenizer.model -> tokenizers.Tokenizer. `added`: {token: id} of added_tokens.json. Raises InputError."""
    try:
        pieces, trainer, normaliser = read_pieces(path.read_bytes())
    except (OSError, IndexError, KeyError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a sentencepiece model, truncated or damaged ({type(error).__name__}: {error})") from None
    if not pieces or trainer.get(3, 1) != BPE or normaliser.get(2):
        raise InputError(f"{path}: not a sentencepiece model of LLaMA's kind (BPE, text as it is): take a tokenizer.json")
    unknown = next((piece for piece, _, kind in pieces if kind == UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE({piece: i for i, (piece, _, _) in enumerate(pieces)}, merges_of(pieces), unk_token=unknown,
                                     fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("▁")] if normaliser.get(3, 1) else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if before else [])])
    special = [piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, _, kind in pieces if kind == USER_DEFINED])
    for token, number in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise InputError(f"{path.parent}/added_tokens.json: {token} is {number}, but {path.name} leads to "
                             f"{tokenizer.token_to_id(token)}")
    return tokenizer
