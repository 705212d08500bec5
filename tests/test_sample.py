"""sample.py as a person uses it, and common/draw.py."""

import io
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

import sample
from common.draw import COLORS, TRUE_COLOR, panel
from common.images import BadImage
from common.pool import POOLS
from common.video import ENDINGS, midpoints, open_frames
from dialogue import IMAGE
from mllm import MLLM

PINK = (255, 79, 216)  # COLORS[0]


class Parrot:
    """In place of a model: it gives one answer to all prompts, and remembers them."""

    def __init__(self, model, text):
        self.text, self.prompts = model.text, []
        self.ids = model.tokenizer.encode(text, add_special_tokens=False).ids

    def stream(self, images, prompts):
        self.prompts += prompts
        yield from torch.tensor(self.ids)[:, None]


def test_streamed_pieces_together_are_what_generate_returns(tiny_model):
    image, turns = Image.new("RGB", (64, 64), "red"), [("What?", None)]
    for temperature in (0, 1):
        options = dict(max_new_tokens=30, temperature=temperature)
        options["generator"] = torch.Generator().manual_seed(1)
        text = "".join(sample.stream_answer(tiny_model, [image], turns, **options))
        options["generator"].manual_seed(1)
        assert [text] == tiny_model.generate([image], [turns], **options)
    text = "a naïve 漢字 and 🦙🏽 yes"
    parrot = Parrot(tiny_model, text)
    pieces = list(sample.stream_answer(parrot, [], [("?", None)]))
    # a character of several tokens is one piece
    assert len(parrot.ids) > len(text) and len(pieces) > 5
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_boxes_are_drawn_in_original_pixels():
    """80x40 is padded by 20 above and below: its upper half is [0, 1/4, 1, 1/2] of the square."""
    drawn = panel(Image.new("RGB", (80, 40)), [(COLORS[0], [0, 0.25, 1, 0.5])], [], side=400)
    rows, columns = np.nonzero((np.asarray(drawn) == PINK).all(-1))
    # a margin of 8, and a scale of 5
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 108, 8, 408)
    # whatever a model writes can be drawn
    boxes = [(COLORS[0], [1, 1, 0, 0]), (TRUE_COLOR, [-9e300, 0, float("inf"), 2])]
    panel(Image.new("RGB", (500, 1)), boxes, [("white", "line\nbreak 漢字 " * 300)])


def test_alone_it_asks_about_test_scenes_and_a_chat_proposes_questions(
    model_folder, monkeypatch, capsys
):
    sample.main(["--count=3", "--max_new_tokens=8", "--temperature=1", "--top_k=50"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi?"))
    sample.main(["--chat", "--max_new_tokens=1"])
    printed = capsys.readouterr()
    assert printed.out.count("test scene") == 3
    assert all(words in printed.err for words in ("out/chat.png", "Where is the", "empty line"))
    # the chat has not replaced the image of three scenes
    assert Image.open("out/sample.png").width > 900
    sample.main(["--image=out/chat.png,out/sample.png", "--prompt=Hi?", "--max_new_tokens=1"])
    assert Image.open("out/sample.png").width > 1500


def test_an_answer_with_a_box_is_drawn_and_a_conversation_continues(
    tiny_model, tmp_path, monkeypatch, capsys
):
    image, out, answer = Image.new("RGB", (80, 40)), tmp_path / "a.png", "[0.25,0.50,0.75,0.75]."
    parrot = Parrot(tiny_model, f"{answer}</s>")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\nAnd now?\n\nnever asked\n"))
    sample.chat(parrot, [image], out, {})
    assert capsys.readouterr().out == f"{answer}\n{answer}\n"
    assert parrot.prompts == [[("Where?", None)], [("Where?", answer), ("And now?", None)]]
    assert (np.asarray(Image.open(out)) == PINK).all(-1).any()
    # a question that is too long does not end the chat
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi?\n{'long ' * 300}\nWell?\n"))
    sample.chat(tiny_model, [], out, {"max_new_tokens": 2})
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 2 and printed.err.count("error:") == 1


def test_frames_and_pooling_are_those_of_the_dense_connectors_code():
    """tests/fixtures/video.json recorded them. Our frames may be one beside theirs, never twice."""
    recorded = json.loads((ROOT / "tests" / "fixtures" / "video.json").read_text())
    for case in recorded["frames"]:
        ours = midpoints(case["total"], case["frames"])
        assert len(set(ours)) == len(case["indices"]) and ours == sorted(ours)
        assert all(abs(a - b) <= 1 for a, b in zip(ours, case["indices"], strict=True))
    pool = recorded["pool"]
    tokens = torch.tensor(pool["x"]).view(pool["T"], pool["N"], pool["D"])
    assert POOLS["pairs"](tokens).flatten(0, 1).tolist() == pool["pooled"]
    assert POOLS["pairs"](torch.zeros(1, 729, 1)).shape[1] == recorded["tokens_per_frame"]["729"]
    # LLaVA-NeXT's grid: 27 becomes 14, and what is linear in the place stays so
    halved = POOLS["grid"](torch.arange(27.0).repeat(27)[None, :, None]).view(14, 14)
    assert torch.allclose(halved, ((torch.arange(14) + 0.5) * 27 / 14 - 0.5).expand(14, 14))


def test_frames_come_from_a_folder_an_animation_or_a_video(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (64, 32), (i * 20, 0, 0)) for i in range(12)]
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "folder" / f"frame{i}.png")
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    (tmp_path / "damaged.mp4").write_bytes(b"no video")

    def check(name):
        opened = open_frames(tmp_path / name, 3)
        assert [round(frame.getpixel((9, 9))[0] / 20) for frame in opened] == [2, 6, 10], name
        assert opened[0].size == (64, 32) and len(open_frames(tmp_path / name, 100)) == 12

    check("folder")
    check("clip.png")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        with refused("damaged.mp4.*pip install av"):
            open_frames(tmp_path / "damaged.mp4", 3)
    av = pytest.importorskip("av", reason="no video file is read: pip install av")
    for ending in ENDINGS:
        with av.open(tmp_path / f"clip{ending}", "w") as file:
            stream = file.add_stream("mpeg4", rate=5, width=64, height=32)
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_image(frame)))
            file.mux(stream.encode())
        check(f"clip{ending}")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "damaged.mp4", "none.mkv"):
        with pytest.raises(BadImage, match=name):
            open_frames(tmp_path / name, 3)


def test_frames_touch_in_front_of_the_bare_question(model_folder, monkeypatch):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue", "white")]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    prompt, asked = MLLM.prompt, []

    def remember(model, images, turns):
        asked.append((turns[0][0], len(turns), prompt(model, images, turns)[1].count(IMAGE)))
        return prompt(model, images, turns)

    monkeypatch.setattr(MLLM, "prompt", remember)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Why?\nHow?\n"))
    flags = ["--image=clip.gif", "--frames=3", "--max_new_tokens=2"]
    sample.main([*flags, "--prompt=Why?", "--pool=pairs"])
    sample.main([*flags, "--chat"])
    first = "<image><image><image>\nWhy?"
    assert asked == [(first, 1, 3 * 8), (first, 1, 3 * 16), (first, 2, 3 * 16)]


def test_bad_input_is_named(model_folder, monkeypatch, capsys):
    flags = ["image=missing.jpg", "image=out/tiny/model/config.json", "temperature=-1", "count=0"]
    flags += ["seed=-1", "max_new_tokens=0", "out=out/image.docx", "model=nowhere/at/all"]
    flags += ["out=out/tiny/model/config.json/a.png", "device=abacus", "frames=-1", "pool=all"]
    flags += ["image=clip.mp4"]
    for flag in flags:
        name, _, value = flag.partition("=")
        with refused() as error:
            sample.main(["--prompt=Hi?", f"--{flag}"])
        assert name in str(error.value) or value in str(error.value)
    with refused("2 <image> marks"):
        sample.main(["--prompt=<image> <image>"])
    # without a model
    capsys.readouterr()
    monkeypatch.chdir("out/tiny")
    for command in ("sample.py", "eval.py"):
        monkeypatch.setattr(sys, "argv", [command])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(ROOT / command, run_name="__main__")
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
