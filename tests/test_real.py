"""Both stages on real input: photographs, captions, dialogues, a trained LLaMA and its vocabulary.

The tower is small and random. It tells the model which image it sees, but not what is in it.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import losses

import train
from common.images import open_image
from common.tokenizer import merges_of
from dialogue import load_tokenizer
from mllm import MLLM

pytestmark = pytest.mark.usefixtures("clean_run")


def write_stories(real, folder):
    """Write the trained LLaMA, with a tokenizer.json made of its published vocabulary."""
    shutil.copytree(real / "llama-stories260K", folder)
    expected = json.loads((folder / "expected.json").read_text())
    pieces = [piece.encode("latin-1").decode() for piece in expected["vocab_latin1"]]
    pieces = [p if p.startswith("<0x") else p.replace(" ", "▁") for p in pieces]
    pieces[1:3] = ["<s>", "</s>"]
    tokenizer = json.loads((real / "tokenizers" / "llama2" / "tokenizer.json").read_text())
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = merges_of([(piece, -i, 1) for i, piece in enumerate(pieces)], ids)
    tokenizer["model"] |= {"vocab": ids, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoding = load_tokenizer(folder).encode(expected["greedy_text"], add_special_tokens=False)
    assert encoding.ids == expected["greedy_ids_with_bos"][1:]


def test_a_trained_llama_memorizes_real_dialogues(real, flags):
    """Captions and boxes in stage 1, then dialogues, four with the same question."""
    write_stories(real, Path("stories"))
    dialogues = json.loads((real / "llava_instruct.json").read_text())
    dialogues = [dialogue for dialogue in dialogues if "image" in dialogue][:4]
    for dialogue in dialogues:
        # two turns fit into the context of 512 tokens
        del dialogue["conversations"][4:]
    captions = json.loads((real / "captions.json").read_text())
    for name in sorted(captions)[:4]:
        question = {"from": "human", "value": "<image>\nDescribe the photograph."}
        turns = [question, {"from": "gpt", "value": captions[name][0]}]
        dialogues.append({"id": name, "image": name, "conversations": turns})
    Path("dialogues.json").write_text(json.dumps(dialogues))
    captions, boxes = real / "llava_pretrain.json", real / "shikra_rec.jsonl"
    options = dict(data1=f"{captions},rec:{boxes},reg:{boxes}", data2="dialogues.json")
    options |= dict(image_dir=real / "images", max_length=512, image_mode="pad")
    options |= dict(llm="stories", template="tiny", micro_batch=32, save_every=50)
    options |= dict(batch1=8, batch2=8, steps1=4, steps2=40, lr1=2e-3, lr2=3e-3)
    train.main(flags(**options))
    found = losses()
    assert found[1, 3] < found[1, 0] and found[2, 39] < 0.02 * found[2, 0]
    model, wrong = MLLM.from_pretrained("run/model"), []
    for dialogue in dialogues:
        texts = [message["value"] for message in dialogue["conversations"]]
        turns = list(zip(texts[::2], texts[1::2], strict=True))
        image = open_image(real / "images" / dialogue["image"])
        for i, (question, target) in enumerate(turns):
            (answer,) = model.generate([image], [[*turns[:i], (question, None)]], 80)
            wrong += [] if answer == target.strip() else [(question, target, answer)]
    assert not wrong
