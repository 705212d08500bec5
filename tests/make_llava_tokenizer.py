"""The small tokenizer of the LLaVA tests."""
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

IMAGE_TOKEN = 356


def make_tokenizer():
    """Of LLaMA's kind, sentencepiece in small: a space is ▁, one stands before every text, what is unknown falls apart into
    bytes; behind the 32000 (here 356) come <image> and <pad>."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"] + [chr(c) for c in range(33, 127)]
    pieces += ["▁a", "▁t"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "t")],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>", "<image>", "<pad>")])
    assert tokenizer.token_to_id("<image>") == IMAGE_TOKEN
    return tokenizer
