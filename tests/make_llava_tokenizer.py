"""The small tokenizer of the LLaVA tests."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

IMAGE_TOKEN = 356


def make_tokenizer():
    """Make a tokenizer of LLaMA's kind: a space is ▁, one before every text, and bytes.

    <image> and <pad> come after LLaMA's 32000 tokens (here 356), as in LLaVA-1.5.
    """
    pieces = (
        ["<unk>", "<s>", "</s>"]
        + [f"<0x{byte:02X}>" for byte in range(256)]
        + ["▁"]
        + [chr(c) for c in range(33, 127)]
    )
    pieces += ["▁a", "▁t"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "t")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>", "<pad>")]
    )
    assert tokenizer.token_to_id("<image>") == IMAGE_TOKEN
    return tokenizer
