"""sample.py as a person uses it: scenes, pictures, conversations, streaming, and what goes wrong."""
import io
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import linear
import sample
from conftest import ROOT
from hub import InputError
from images import parse_boxes
from mllm import MLLM
from sample import panel, read_picture, stream_answer

PINK = (255, 79, 216)                                                # sample.COLOURS[0]


def photo(path, width=80, height=40):
    Image.fromarray(np.full((height, width, 3), 128, dtype=np.uint8)).save(path)
    return str(path)


def saying(model, text, monkeypatch):
    """Make the model say `text`, byte by byte where the tokenizer has no word for it."""
    ids = model.tokenizer.encode(text + "</s>", add_special_tokens=False).ids
    monkeypatch.setattr(type(model), "stream", lambda *args, **kwargs: iter(torch.tensor(ids)[:, None]))
    return ids


# --- streaming --------------------------------------------------------------------------------------------------------

def test_streamed_pieces_together_are_what_generate_returns(tiny_model):
    picture = Image.new("RGB", (64, 64), "red")
    for temperature in (0, 1):
        pieces = list(stream_answer(tiny_model, [picture], [("What?", None)], 30, temperature=temperature,
                                    generator=torch.Generator().manual_seed(1)))
        whole = tiny_model.generate([picture], ["What?"], 30, temperature=temperature, generator=torch.Generator().manual_seed(1))
        assert "".join(pieces) == whole[0]


def test_a_character_of_many_bytes_is_never_printed_in_parts(tiny_model, monkeypatch):
    text = "a naïve 漢字 and 🦙🏽 yes"
    ids = saying(tiny_model, text, monkeypatch)
    assert len(ids) > len(text)                                      # its characters are indeed spread over tokens
    pieces = list(stream_answer(tiny_model, [], [("?", None)], 99))
    assert "".join(pieces) == text and len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_spaces_come_between_words_and_not_around_the_answer(tiny_model, monkeypatch):
    saying(tiny_model, "  small blue cross ", monkeypatch)
    assert "".join(stream_answer(tiny_model, [], [("?", None)], 99)) == "small blue cross"


def test_an_answer_cut_inside_a_character_still_ends(tiny_model, monkeypatch):
    ids = tiny_model.tokenizer.encode("yes 🦙", add_special_tokens=False).ids[:-1]
    monkeypatch.setattr(type(tiny_model), "stream", lambda *args, **kwargs: iter(torch.tensor(ids)[:, None]))
    assert "".join(stream_answer(tiny_model, [], [("?", None)], 99)).startswith("yes")


# --- pictures ---------------------------------------------------------------------------------------------------------

def test_boxes_are_found_wherever_they_stand():
    assert parse_boxes("a cat [0.1,0.2,0.3,0.4] and [[0.5, 0.5, 1, 1]].") == [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1, 1]]
    assert parse_boxes("") == parse_boxes("]") == parse_boxes("[1,2,3] [a]") == []


def test_a_box_is_drawn_in_original_pixels():
    """A picture of 80x40 is padded by 20 above and below: the box of its upper half is [0, 1/4, 1, 1/2] of the square."""
    drawn = np.asarray(panel(Image.new("RGB", (80, 40)), [(sample.COLOURS[0], [0, 0.25, 1, 0.5])], [], side=400))
    rows, columns = np.nonzero((drawn == PINK).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 108, 8, 408)     # 8 of margin, scaled by 5


def test_true_boxes_are_dashed():
    drawn = np.asarray(panel(Image.new("RGB", (64, 64), "grey"), [(sample.TRUE, [0.25, 0.25, 0.75, 0.75])], [], side=400))
    line = drawn[8 + 100, 8 + 110:8 + 290]                           # along its upper edge
    assert set(map(tuple, line.tolist())) == {(0, 0, 0), (255, 255, 255)}


def test_any_box_and_any_text_can_be_drawn():
    boxes = [(sample.COLOURS[0], [1, 1, 0, 0]), (sample.TRUE, [-9e300, 0, float("inf"), 2]), (sample.TRUE, [0.5] * 4)]
    panel(Image.new("RGB", (500, 1)), boxes, [("white", "line\nbreak " * 300), ("white", ""), ("white", "漢字")])


def test_pictures_come_from_files_and_from_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = photo(tmp_path / "a.png")
    assert read_picture(path).size == (80, 40)
    answers = {"/a.png": (200, open(path, "rb").read()), "/page": (200, b"<html>"), "/none": (404, b"")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers[self.path]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert read_picture(url + "/a.png").size == (80, 40)
        for page, message in (("/page", "/page: what is there is not a readable image"), ("/none", "404")):
            with pytest.raises(InputError, match=message):
                read_picture(url + page)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(InputError, match="cannot be downloaded"):    # nobody listens any more
        read_picture(url + "/a.png")


def test_a_download_without_end_is_stopped(monkeypatch):
    class Endless:
        __enter__, __exit__ = lambda self: self, lambda self, *args: None
        raise_for_status = lambda self: None
        iter_content = lambda self, size: iter(lambda: bytes(size), None)
    monkeypatch.setattr("requests.get", lambda *args, **kwargs: Endless())
    monkeypatch.setattr(sample, "LARGEST_DOWNLOAD", 1_000_000)
    with pytest.raises(InputError, match="larger than 1 MB"):
        read_picture("https://example.org/endless.jpg")


# --- the command ------------------------------------------------------------------------------------------------------

def test_alone_it_asks_about_test_scenes_and_saves_a_picture(model_folder, capsys):
    sample.main(["--count=3", "--max_new_tokens=8"])
    printed = capsys.readouterr().out
    assert printed.count("test scene") == 3 and "Where is the" in printed and "Is there a" in printed
    assert Image.open("out/sample.png").width > 900                  # large enough for a person: two panels of 448 pixels


def test_a_model_that_is_right_is_called_right(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {}

    def remember(objects, rng):
        asked = questions(objects, rng)
        known.update({question: truth for question, truth, _ in asked})
        return asked
    questions = sample.questions
    monkeypatch.setattr(sample, "questions", remember)
    model = SimpleNamespace(generate=lambda pictures, prompts, new, **sampling: [known[prompt] for prompt in prompts])
    sample.show_scenes(model, sample.Config(count=2, out="deep/folder/boxes.jpg"), {})
    printed = capsys.readouterr().out
    assert "wrong" not in printed and "no box" not in printed and "IoU 0.0" not in printed
    assert Image.open("deep/folder/boxes.jpg").size[0] > 900


def test_an_answer_with_a_box_about_a_photo_saves_the_photo_with_it(tiny_model, model_folder, monkeypatch, capsys):
    saying(tiny_model, "It is at [0.25,0.50,0.75,0.75].", monkeypatch)
    sample.main([f"--image={photo('a.png')}", "--prompt=Where is it?"])
    assert capsys.readouterr().out == "It is at [0.25,0.50,0.75,0.75].\n"
    assert (np.asarray(Image.open("out/sample.png")) == PINK).all(-1).any()


def test_chat_remembers_the_turns_and_keeps_the_picture(tiny_model, model_folder, monkeypatch, capsys):
    heard = []

    def stream(self, images, prompts, max_new_tokens, **sampling):
        heard.append((images[0][0].size, list(prompts[0])))
        return iter(torch.tensor(tiny_model.tokenizer.encode(f"yes {len(heard)}</s>", add_special_tokens=False).ids)[:, None])
    monkeypatch.setattr(type(tiny_model), "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is it red?\nAnd blue?\n\nnever asked\n"))
    sample.main([f"--image={photo('a.png')}", "--chat"])
    assert heard == [((80, 40), [("Is it red?", None)]), ((80, 40), [("Is it red?", "yes 1"), ("And blue?", None)])]
    assert capsys.readouterr().out == "yes 1\nyes 2\n"


def test_where_the_picture_cannot_be_saved_the_answer_is_still_given_and_remembered(tiny_model, model_folder, monkeypatch, capsys):
    Path("full").write_text("a file where a folder should be")
    box, heard = "[0.25,0.50,0.75,0.75]", []
    saying(tiny_model, f"At {box}.", monkeypatch)
    said = type(tiny_model).stream
    monkeypatch.setattr(type(tiny_model), "stream", lambda *given, **rest: heard.append(list(given[2][0])) or said(*given, **rest))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\nAnd now?\n"))
    sample.main(["--chat", "--out=full/a.png"])                      # about a test scene, which cannot be saved either
    printed = capsys.readouterr()
    assert printed.out == f"At {box}.\nAt {box}.\n" and heard[1][0] == ("Where?", f"At {box}.")
    assert printed.err.count("note: --out=full/a.png: cannot be written (") == 3 == printed.err.count("\n")


def test_a_question_that_is_too_long_does_not_end_the_chat(model_folder, monkeypatch, capsys):
    context = MLLM.from_pretrained(model_folder).llm.config.context
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi?\n{'long ' * context}\nWell?\n"))
    sample.main(["--image=none", "--chat", "--max_new_tokens=2"])
    said = capsys.readouterr()
    assert said.out.count("\n") == 2 and f"exceed the model's context of {context}: shorten one of them, or begin anew" in said.err


def test_the_same_seed_draws_the_same_answer(model_folder, capsys):
    flags = ["--image=none", "--prompt=Tell me", "--temperature=1", "--top_k=50", "--top_p=0.9", "--max_new_tokens=12"]
    said = []
    for seed in (3, 3, 4):
        sample.main([*flags, f"--seed={seed}"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_an_answer_on_a_cpu_is_by_rows_or_by_convolution_and_fast_says_that_it_is_for_cuda(model_folder, monkeypatch, capsys):
    flags = ["--image=none", "--prompt=Is there a red cross?", "--device=cpu"]
    sample.main(flags)                                               # maps of 128: too narrow to gain
    said = capsys.readouterr().out
    sample.main([*flags, "--fast"])
    assert capsys.readouterr() == (said, "note: --fast changes nothing on cpu: it compiles for CUDA\n")
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(linear, "slow_in", lambda dtype: True)
        monkeypatch.setattr(linear, "WIDE", 1)
        convolved, product, seen = linear.linear, linear.one_row, []
        monkeypatch.setattr(linear, "linear", lambda *given: seen.append("convolution") or convolved(*given))
        monkeypatch.setattr(linear, "one_row", lambda *given: seen.append("row") or product(*given))
        sample.main(flags)
        assert capsys.readouterr().out == said and set(seen) == {"convolution"}
        seen.clear()
        sample.main([*flags, "--bf16=true"])
        assert set(seen) == {"row"}


@pytest.mark.parametrize("flags, message", [
    (["--image=missing.jpg"], "missing.jpg: no such image"),
    (["--image=out"], "out: not a readable image"),
    (["--image=out/tiny/model/config.json"], "config.json: not a readable image"),
    (["--temperature=-1"], "temperature is -1.0"),
    (["--prompt=<image> <image>"], "1 more <image> marks than pictures"),
    (["--prompt=\udcff"], "not UTF-8"),
    (["--image=none", "--prompt=<image>"], "1 more <image> marks than pictures"),
    (["--count=0"], "--count=0"),
    (["--seed=-1"], "--seed=-1"),
    (["--max_new_tokens=0"], "max_new_tokens is 0"),
    (["--max_new_tokens=5", "--out=out/picture.docx"], "picture.docx: the picture's name should end in .png"),
    (["--model=nowhere/at/all"], "nowhere/at/all: no such folder"),
    (["--device=abacus"], "--device=abacus: cannot be used"),
    (["--image=http://"], "cannot be downloaded"),
])
def test_bad_input_is_an_input_error_that_says_what_is_wrong(flags, message, model_folder):
    with pytest.raises(InputError) as caught:
        sample.main(flags)
    assert message in str(caught.value)


def test_without_a_model_the_command_ends_in_one_line_and_status_2(tmp_path):
    for command in ("sample.py", "eval.py"):
        ended = subprocess.run([sys.executable, ROOT / command], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr == ("error: no model under out/: train one first (python train.py), or name its folder "
                                "(--model=...)\n")
