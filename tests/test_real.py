"""Both stages on real input, by train.py itself: photographs, human captions, LLaVA-format dialogues, a real trained LLaMA with
its vocabulary, and the real LLaMA-2 tokenizer. The towers alone are small and random, so a picture tells the model which
picture it is, and nothing about what is in it: what is shown here is that everything fits together and can be learnt by heart.
"""
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

import train
from images import open_image
from llama import Llama, LlamaConfig
from mllm import MLLM


@pytest.fixture(autouse=True)
def as_found(monkeypatch, tmp_path):
    """Every run starts in an empty working directory, and leaves the signal handlers as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def sentencepiece(pieces):
    """A sentencepiece BPE vocabulary, in order of rank, -> the tokenizers library's BPE. A piece is made by joining any two
    others; the earlier piece is joined first. What no piece covers is written in bytes."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))
              if piece[:cut] in ids and piece[cut:] in ids and not piece.startswith("<")]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def stories(real, tmp_path_factory):
    """The real tiny LLaMA in a folder of its own, with the tokenizer.json that it was published without."""
    folder = tmp_path_factory.mktemp("stories") / "llama"
    shutil.copytree(real / "llama-stories260K", folder)
    expected = json.loads((folder / "expected.json").read_text())
    pieces = [piece.encode("latin-1").decode() for piece in expected["vocab_latin1"]]
    pieces[1:3] = ["<s>", "</s>"]                                    # its author's file prints a line end around these two
    sentencepiece([piece if piece.startswith("<0x") else piece.replace(" ", "▁") for piece in pieces]).save(str(folder / "tokenizer.json"))
    return folder, expected


def losses(run="run"):
    records = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {stage: [record["loss"] for record in records if record["stage"] == stage] for stage in (1, 2)}


def test_the_rebuilt_tokenizer_writes_the_published_ids(stories):
    folder, expected = stories
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = expected["greedy_ids_with_bos"]
    assert ids[0] == tokenizer.token_to_id("<s>") == 1
    assert tokenizer.decode(ids[1:]) == expected["greedy_text"]
    assert tokenizer.encode(expected["greedy_text"], add_special_tokens=False).ids == ids[1:]
    assert tokenizer.decode(tokenizer.encode("naïve 日本 [0.390,0.483]", add_special_tokens=False).ids) == "naïve 日本 [0.390,0.483]"


def test_the_real_llama_learns_real_dialogues_by_heart(stories, real, tiny_folders, tmp_path):
    """Captions in stage 1, then dialogues about eight photographs: yes or no, counts, boxes, and the human captions as answers
    to one and the same question, which only the picture decides. Afterwards every answer comes back word for word."""
    dialogues = [entry for entry in json.loads((real / "llava_instruct.json").read_text()) if "image" in entry][:6]
    for entry in dialogues:
        entry["conversations"] = entry["conversations"][:6]          # three turns: the model's context is 512 tokens
    captions = json.loads((real / "captions.json").read_text())
    for name in sorted(captions)[:4]:
        dialogues.append({"id": name, "image": name, "conversations": [{"from": "human", "value": "<image>\nDescribe the photograph."},
                                                                       {"from": "gpt", "value": captions[name][0]}]})
    (tmp_path / "dialogues.json").write_text(json.dumps(dialogues))
    train.main([f"--vision={tiny_folders['clip']}", f"--llm={stories[0]}", "--template=tiny", f"--data1={real / 'llava_pretrain.json'}",
                f"--data2={tmp_path / 'dialogues.json'}", f"--image_dir={real / 'images'}", "--max_length=512", "--image_mode=pad",
                "--batch1=8", "--batch2=10", "--steps1=8", "--steps2=48", "--lr1=2e-3", "--lr2=3e-3", "--device=cpu",
                "--log_every=1", "--out=run"])
    found = losses()
    assert found[1][-1] < found[1][0] and found[2][-1] < 0.02 * found[2][0]
    model, asked, wrong = MLLM.from_pretrained("run/model"), 0, []
    for entry in dialogues:
        texts = [message["value"] for message in entry["conversations"]]
        turns = list(zip(texts[::2], texts[1::2]))
        picture = open_image(real / "images" / entry["image"])
        for i, (question, answer) in enumerate(turns):
            said = model.generate([picture], [[*turns[:i], (question, None)]], max_new_tokens=80)[0]
            asked += 1
            wrong += [] if said == answer.strip() else [(entry["id"], question, answer, said)]
    assert not wrong and asked > 20
    same_question = [model.generate([open_image(real / "images" / name)], ["<image>\nDescribe the photograph."], 80)[0]
                     for name in sorted(captions)[:4]]
    assert same_question == [captions[name][0].strip() for name in sorted(captions)[:4]]


def test_the_real_llama2_tokenizer_and_vicunas_layout_train(real, tiny_folders, tmp_path):
    """All dialogues as they are, boxes of Shikra's format beside them, a vocabulary of 32000: a few steps, and the loss falls."""
    torch.manual_seed(0)
    Llama(LlamaConfig(vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      max_position_embeddings=2048)).save_pretrained(tmp_path / "llama")
    shutil.copy(real / "tokenizers" / "llama2" / "tokenizer.json", tmp_path / "llama")
    train.main([f"--vision={tiny_folders['clip']},{tiny_folders['dinov2']}", f"--llm={tmp_path / 'llama'}", "--connector=comm",
                f"--data1={real / 'llava_pretrain.json'}", f"--data2={real / 'llava_instruct.json'},rec:{real / 'shikra_rec.jsonl'},"
                f"reg:{real / 'shikra_rec.jsonl'}", f"--image_dir={real / 'images'}", "--batch1=8", "--batch2=8", "--micro_batch=4",
                "--steps1=3", "--steps2=12", "--lr2=1e-2", "--device=cpu", "--log_every=1", "--out=run"])
    found = losses()
    assert abs(found[1][0] - 10.37 - 0.5) < 0.2                      # ln 32000: guessing; logits of variance 1 cost 0.5 more
    assert found[2][-1] < 0.75 * found[2][0]
    model = MLLM.from_pretrained("run/model")
    assert model.template == "vicuna_v1"
    assert model.generate([open_image(real / "images" / "caption_0.jpg")], ["What is this?"], 4)
