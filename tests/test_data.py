"""data.py: LLaVA's and Shikra's formats, and the loader."""
import json
import math
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

import data
from data import LlavaData, Loader, Sample, ShikraData, collate, order
from dialogue import IGNORE, IMAGE, load_tokenizer
from hub import InputError
from images import ImageSpec, open_image, parse_box, unpad_box
from test_dialogue import small                                  # fixtures, these two
from test_images import rgb, saved


# --- formats ---

def write(path, records, lines=False):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_llava_json_and_jsonl_give_the_same_samples(tmp_path):
    records = [{"id": "one", "image": "sub/a.jpg", "conversations": talk("<image>\nq", "a", "q2", "a2")},
               {"id": 2, "image": ["a.jpg", "b.jpg"], "conversations": talk("<image> or <image>?", "the first")},
               {"conversations": talk("", "said before it was asked", "no picture", "none", "not answered")[1:]}]
    expected = [Sample([str(tmp_path / "sub" / "a.jpg")], [("<image>\nq", "a"), ("q2", "a2")], "one"),
                Sample([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], [("<image> or <image>?", "the first")], "2"),
                Sample([], [("no picture", "none")], "2")]
    for file in (write(tmp_path / "a.json", records), write(tmp_path / "a.jsonl", records, lines=True)):
        dataset = LlavaData(file, tmp_path)
        assert [dataset[i] for i in range(len(dataset))] == expected
        assert dataset.length(0) > dataset.length(2) and dataset.length(1) > dataset.length(0)
    assert len(LlavaData(write(tmp_path / "text.json", records[2:]), tmp_path / "no folder needed")) == 1


def test_a_data_file_takes_its_own_size_in_memory_and_little_more(tmp_path):
    """As Python's objects these samples take 2.4 times their file."""
    records = [{"id": f"s{i}", "image": f"{i}.jpg", "conversations": talk("<image>\nWhat is it?", "A circle. " * 9, "And that?", "é")}
               for i in range(4000)]
    file = write(tmp_path / "a.json", records)
    tracemalloc.start()
    dataset = LlavaData(file, tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset[3999].turns[1] == dataset[-1].turns[1] == ("And that?", "é") and dataset.length(0) == 2119
    assert held < 1.1 * os.path.getsize(file)
    for missing in (4000, -4001):
        with pytest.raises(IndexError):
            dataset[missing]


def test_real_dialogues_and_their_boxes(real):
    dataset = LlavaData(real / "llava_instruct.json", real / "images")
    boxes = {(sample.images[0], re.sub(r".*?is the |\?", "", question, flags=re.S)): answer
             for sample in dataset.samples for question, answer in sample.turns if "Where" in question}
    shikra = ShikraData(real / "shikra_rec.jsonl", real / "images")
    found = 0
    for i, line in enumerate((real / "shikra_rec.jsonl").read_text().splitlines()):
        record, sample = json.loads(line), shikra[i]
        assert record["expression"] in sample.turns[0][0] or "box" in sample.turns[0][0]
        restored = unpad_box(parse_box(sample.turns[0][1]), record["width"], record["height"])
        rounding = 0.0005 * max(record["width"], record["height"])   # three decimals of the side
        assert np.allclose(restored, record["bbox"], atol=rounding + 1e-6)
        theirs = boxes.get((sample.images[0], record["expression"].removeprefix("the ")))
        if theirs:                                                   # the dialogues have the same object
            assert np.allclose(parse_box(sample.turns[0][1]), parse_box(theirs), atol=0.001)
            found += 1
    assert len(shikra) == 113 and found > 20


def test_shikra_asks_for_the_box_or_gives_it(tmp_path):
    records = [{"img_path": "a.jpg", "expression": f"the cat {i}", "bbox": [10, 0, 30, 50], "height": 50, "width": 100}
               for i in range(8)]
    file = write(tmp_path / "s.jsonl", records, lines=True)
    box = "[0.100,0.250,0.300,0.750]"                                # 25 rows of padding above
    rec, reg = ShikraData(file, tmp_path, "rec"), ShikraData(file, tmp_path, "reg")
    for i in range(8):
        (asked, answer), = rec[i].turns
        assert asked.startswith("<image>\n") and f"the cat {i}" in asked and answer == box
        (asked, answer), = reg[i].turns
        assert asked.startswith("<image>\n") and box in asked and answer == f"the cat {i}"
    assert len({rec[i].turns[0][0].replace(str(i), "") for i in range(8)}) == 4
    assert [sample for sample in ShikraData(file, tmp_path, "rec")] == [rec[i] for i in range(8)]
    with pytest.raises(InputError, match="no task 'find'"):
        ShikraData(file, tmp_path, "find")


GOOD = {"id": "good", "image": "a.jpg", "conversations": talk("<image>\nq", "a")}
BOX = {"img_path": "a.jpg", "expression": "it", "bbox": [1, 1, 2, 2], "height": 9, "width": 9}
BROKEN = {
    "role": ({"id": "x7", "conversations": [{"value": "q"}]}, "sample 1 (id x7): every message needs a role"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "q"}]}, "sample 1: every message needs a role"),
    "no text": ({"conversations": [{"from": "human"}]}, 'needs a text, "value"'),
    "no conversations": ({"id": 3}, "(id 3): no conversations"),
    "empty conversations": ({"conversations": []}, "no conversations"),
    "two questions in a row": ({"conversations": talk("q")[:1] * 2}, "should take turns"),
    "a mark too many": (GOOD | {"conversations": talk("<image><image>q", "a")}, "2 <image> marks but 1 images"),
    "no mark": (GOOD | {"conversations": talk("q", "a")}, "0 <image> marks but 1 images"),
    "no image": ({"conversations": talk("<image>q", "a")}, "1 <image> marks but 0 images"),
    "no image, mark last": ({"conversations": talk("q\n<image> ", "a")}, "1 <image> marks but 0 images"),
    "image is a number": (GOOD | {"image": 3}, "image should be a file name"),
    "image above": (GOOD | {"image": "../a.jpg"}, "leaves the image folder"),
    "image above, hidden": (GOOD | {"image": "sub/../../a.jpg"}, "leaves the image folder"),
    "image beside": (GOOD | {"image": "../images2/a.jpg"}, "leaves the image folder"),
    "image elsewhere": (GOOD | {"image": "/etc/passwd"}, "leaves the image folder"),
    "image with a zero": (GOOD | {"image": "a\0.jpg"}, "image should be a file name"),
    "not an object": ([1], "should be an object, is a list"),
}


@pytest.mark.parametrize("record, message", BROKEN.values(), ids=BROKEN)
def test_a_bad_record_is_named_in_one_line(record, message, tmp_path):
    (tmp_path / "images").mkdir()
    file = write(tmp_path / "bad.json", [GOOD, record])
    with pytest.raises(InputError, match=re.escape(message)) as error:
        LlavaData(file, tmp_path / "images")
    assert str(error.value).startswith(f"{file}, sample 1") and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    {"bbox": [1, 2, 3]}, {"bbox": None}, {"bbox": [1, 1, "2", 2]}, {"bbox": [3, 1, 2, 2]}, {"bbox": [1, 10, 2, 99]}, {"bbox": [-4, 1, -1, 2]},
    {"bbox": [1, 1, 2, math.inf]}, {"width": 0}, {"height": None}, {"expression": None}, {"img_path": None},
    {"img_path": "../a.jpg"}])
def test_a_bad_box_is_named_in_one_line(change, tmp_path):
    file = write(tmp_path / "bad.jsonl", [BOX, BOX | change], lines=True)
    with pytest.raises(InputError, match=re.escape(f"{file}, line 2: ")) as error:
        ShikraData(file, tmp_path)
    assert "\n" not in str(error.value)


def test_boxes_in_shares_of_the_picture_are_not_taken_for_pixels(tmp_path):
    file = write(tmp_path / "shares.jsonl", [BOX, BOX | {"bbox": [0, 0, 1, 1]}, BOX | {"bbox": [0.1, 0.2, 0.3, 1]}], lines=True)
    with pytest.raises(InputError, match=r"line 3: bbox \[0.1, 0.2, 0.3, 1\] is in shares of the picture; Shikra's are in pixels"):
        ShikraData(file, tmp_path)


@pytest.mark.parametrize("name", ("", "."))
def test_a_picture_without_a_name_is_named_by_its_sample(name, tmp_path):
    with pytest.raises(InputError, match="line 1: .* is no picture's name"):
        ShikraData(write(tmp_path / "none.jsonl", [BOX | {"img_path": name}], lines=True), tmp_path)


@pytest.mark.parametrize("text, message", [
    ('[{"id": 1},\n {"id": 2}\n {"id": 3}]', "not JSON, line 3"), ('{"id": 1}\n{"id": \n', "not JSON, line 2"),
    ('[]', "holds no samples"), ('', "holds no samples"), ('\n\n', "holds no samples"),
    ('{\n "images": [],\n "annotations": []\n}', "is one JSON object; a list of samples is read"),
    ('[{"id": 1}', "not JSON, line 1"), (b"\xff\xfe\x00", "cannot be read")])
def test_a_file_that_is_not_json_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as error:
        LlavaData(tmp_path / "bad.json", tmp_path)
    assert str(tmp_path / "bad.json") in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_missing_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="none.json: cannot be read"):
        LlavaData(tmp_path / "none.json", tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        LlavaData(write(tmp_path / "a.json", [GOOD]), tmp_path / "nowhere")


# --- the loader ---

class Listed:
    """A dataset of samples in memory: sample i has a picture full of i and an answer whose length depends on i."""

    def __init__(self, n, length=lambda i: 1 + i * 7 % 40, bad=(), empty=()):
        self.n, self.lengths, self.bad, self.empty = n, length, set(bad), set(empty)

    def __len__(self):
        return self.n

    def length(self, i):
        return self.lengths(i)

    def __getitem__(self, i):
        picture = "missing.jpg" if i in self.bad else np.full((8, 8, 3), i % 256, np.uint8)
        return Sample([picture], [("<image>\nq", "" if i in self.empty else "x" * self.lengths(i))], f"n{i}")


def loader(dataset, tokenizer, global_batch=8, micro_batch=3, **options):
    return Loader(dataset, tokenizer, "tiny", ImageSpec(8), 4, 200, global_batch, micro_batch, **options)


def take(loader, steps):
    iterator = iter(loader)
    return [next(iterator) for _ in range(steps)]


def names(steps):
    """Of every step the names of its samples."""
    return [[name for batch in step for name in batch.ids] for step in steps]


def same(a, b):
    return all(torch.equal(x.tokens, y.tokens) and torch.equal(x.labels, y.labels) and torch.equal(x.pixels, y.pixels)
               and x.ids == y.ids for x, y in zip(sum(a, []), sum(b, []), strict=True))


def rows(batch):
    """Its dialogues apart again: [(tokens, labels), ...]."""
    return [*zip(batch.tokens[0].split(batch.lengths), batch.labels[0].split(batch.lengths), strict=True)]


def test_a_batch_has_its_pictures_tokens_and_labels_and_no_padding(small):
    class Mixed(Listed):
        def __getitem__(self, i):
            black, white = np.zeros((8, 8, 3), np.uint8), Image.new("RGB", (4, 2), "white")
            return [super().__getitem__(7), Sample([], [("no picture", "ok")], "text"),
                    Sample([black, white], [("<image><image>", "two")], "two")][i]

    (batch, ), = take(loader(Mixed(3), small, global_batch=3), 1)
    assert sorted(batch.ids) == ["n7", "text", "two"] and batch.skipped == []
    assert batch.pixels.shape == (3, 3, 8, 8) and batch.pixels.dtype == torch.uint8 and batch.shown.tolist() == [0, 1, 2]
    assert batch.tokens.shape == batch.labels.shape == (1, sum(batch.lengths)) and batch.tokens.dtype == torch.long
    for (tokens, labels), name in zip(rows(batch), batch.ids):
        marks = {"n7": 1, "text": 0, "two": 2}[name]
        assert (tokens == IMAGE).sum() == 4 * marks
        supervised = labels != IGNORE
        assert torch.equal(labels[supervised], tokens[supervised])
        assert supervised[-1] and not supervised[0]                  # the end token is the last; none predicts the first
    row_of_picture = [name for name in batch.ids for _ in range({"n7": 1, "text": 0, "two": 2}[name])]
    assert batch.pixels[row_of_picture.index("n7")].unique().tolist() == [7]


def test_the_first_token_of_a_dialogue_is_never_supervised_by_the_one_before_it():
    batch = collate([("a", [5, 6], [5, 6], []), ("b", [7, 8, 9], [7, IGNORE, 9], [])], [], 8)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]] and batch.lengths == [2, 3]
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, IGNORE, 9]]


def test_a_file_that_several_dialogues_are_about_is_decoded_and_held_once(small, rgb, tmp_path, monkeypatch):
    saved(rgb, tmp_path / "a.png"), saved(rgb.rotate(180), tmp_path / "b.png")
    shown = ["a.png", "b.png", "a.png", "a.png"]
    records = [{"id": f"n{i}", "image": name, "conversations": talk("<image>q", "a")} for i, name in enumerate(shown)]
    decoded = []
    monkeypatch.setattr(data, "open_image", lambda path: decoded.append(path) or open_image(path))
    (batch, ), = take(loader(LlavaData(write(tmp_path / "a.json", records), tmp_path), small, global_batch=4, micro_batch=4), 1)
    assert len(decoded) == len(batch.pixels) == 2
    assert [Path(decoded[place]).name for place in batch.shown] == [shown[int(name[1:])] for name in batch.ids]


def test_a_batch_of_text_has_an_empty_pixel_tensor(small):
    class Text(Listed):
        def __getitem__(self, i):
            return Sample([], [("q", "a")], f"t{i}")

    (batch, ), = take(loader(ConcatDataset([Text(1), Text(2)]), small, global_batch=3), 1)
    assert batch.pixels.shape == (0, 3, 8, 8) and len(batch.ids) == 3


def test_order_is_a_pure_function_of_seed_and_epoch():
    lengths = [i * 7 % 40 for i in range(100)]
    torch.manual_seed(1)
    first = order(100, seed=3, epoch=2, lengths=lengths, global_batch=8)
    torch.manual_seed(2), np.random.seed(5)
    assert first == order(100, seed=3, epoch=2, lengths=lengths, global_batch=8)
    assert sorted(first) == sorted(order(100, 3, 2)) == list(range(100))
    others = [order(100, seed, epoch, lengths, 8) for seed, epoch in ((3, 1), (4, 2), (2, 3))]
    assert all(first != other for other in others)


def test_steps_of_later_epochs_hold_samples_of_like_length_too():
    """101 samples in steps of 8: every epoch begins within a step."""
    stream = [index for epoch in range(3) for index in order(101, 0, epoch, list(range(101)), 8)]
    assert sorted(stream) == sorted([*range(101)] * 3)
    steps = [stream[i:i + 8] for i in range(0, len(stream) - 7, 8)]
    spreads = [max(step) - min(step) for step in steps]
    within = [spread for i, spread in enumerate(spreads) if not any(i * 8 < epoch * 101 < i * 8 + 8 for epoch in (1, 2))]
    assert len(within) == len(steps) - 2 and max(within) < 16        # of 128 sorted ones; by chance it would be about 80


def test_boxes_of_a_picture_that_exif_turns_are_not_taken_for_those_of_the_upright_one(tmp_path):
    from images import BadImage
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # the file is 40 x 20, and shown 20 x 40
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "plain.jpg")
    of = lambda name, width, height: {"img_path": name, "expression": "a dog", "bbox": [1, 2, 9, 8], "width": width, "height": height}
    rows = [of("plain.jpg", 40, 20), of("plain.jpg", 400, 199), of("turned.jpg", 20, 40), of("turned.jpg", 40, 20), of("gone.jpg", 40, 20)]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ShikraData(tmp_path / "boxes.jsonl", tmp_path)
    assert [data[i].id for i in (0, 1, 2, 4)]                        # a smaller copy of the picture will do
    with pytest.raises(BadImage, match="turned.jpg: is 20x40 upright, its boxes are of 40x20"):
        data[3]


def test_what_of_a_box_is_outside_its_picture_is_cut_off(tmp_path):
    rows = [BOX | {"bbox": [-2, 1, 5, 12]}, BOX | {"bbox": [0, 1, 5, 9]}, BOX | {"bbox": [0, 0, 0, 9]}]
    data = ShikraData(write(tmp_path / "a.jsonl", rows, lines=True), tmp_path)
    assert data.samples[0].turns[0][1] == data.samples[1].turns[0][1]


@pytest.mark.parametrize("text, message", [
    ('[{"conversations": [{"from": "human", "value": "What \\ud83d?"}, {"from": "gpt", "value": "a"}]}]', "half of a character"),
    ("[" * 100_000, "cannot be read as JSON|not JSON"), ('[{"id": ' + "9" * 5000 + "}]", "cannot be read as JSON")], ids=("surrogate", "deep", "long"))
def test_what_json_can_hold_and_no_text_can_is_one_line(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        LlavaData(tmp_path / "a.json", tmp_path)
    assert "\n" not in str(error.value)


def test_grouping_by_length_gives_ranks_and_micro_batches_alike_work(small):
    class Blind(Listed):
        def length(self, i):
            return 0

    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist()

    def unevenness(cls):
        steps = take(loader(cls(200, lengths.__getitem__), small, global_batch=16, micro_batch=4), 12)
        totals = [[sum(batch.lengths) for batch in step] for step in steps]
        return np.mean([max(total) / np.mean(total) - 1 for total in totals])
    assert unevenness(Listed) < 0.5 * unevenness(Blind)


def test_ranks_share_a_global_batch_without_repeats(small):
    whole = names(take(loader(Listed(50), small, global_batch=10), 7))
    for world_size in (2, 3, 4):
        ranks = [take(loader(Listed(50), small, global_batch=10, rank=rank, world_size=world_size), 7)
                 for rank in range(world_size)]
        assert len({tuple(len(step) for step in rank) for rank in ranks}) == 1   # as many forwards each
        assert all(len(batch.ids) <= 3 for rank in ranks for step in rank for batch in step)
        for k in range(7):
            parts = [names(rank)[k] for rank in ranks]
            assert sorted(sum(parts, [])) == sorted(whole[k]) and len(set(sum(parts, []))) == 10
            assert parts[1] == whole[k][1::world_size]


def test_the_stream_is_one_epoch_after_another_from_any_sample(small):
    dataset = Listed(30)
    whole = sum(names(take(loader(dataset, small, global_batch=1), 100)), [])
    expected = sum((order(30, 0, epoch, [dataset.length(i) for i in range(30)], 1) for epoch in range(4)), [])
    assert whole == [f"n{i}" for i in expected[:100]]
    uninterrupted = take(loader(dataset, small), 11)
    for done in (1, 3, 4, 8):                                        # 24 samples: in the first epoch; 32: in the second
        assert same(take(loader(dataset, small, start=done * 8), 3), uninterrupted[done:done + 3])
    stream = sum(names(uninterrupted), [])
    assert names(take(loader(dataset, small, start=13), 2)) == [stream[13:21], stream[21:29]]


def test_workers_change_nothing(small):
    options = dict(rank=1, world_size=2, start=5)
    dataset = Listed(60, bad=[3, 11], empty=[4])
    alone, helped = loader(dataset, small, **options), loader(dataset, small, workers=2, **options)
    state = torch.get_rng_state()
    assert same(take(alone, 8), take(helped, 8))
    assert alone.seen == helped.seen and list(alone.skipped) == list(helped.skipped) != []
    assert torch.equal(state, torch.get_rng_state())                 # and the run's random state is its own


def test_a_bad_picture_is_skipped_counted_and_named(small, rgb, tmp_path):
    for i in range(8):
        saved(rgb, tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:100])
    (tmp_path / "5.png").unlink()
    records = [{"id": f"n{i}", "image": f"{i}.png", "conversations": talk("<image>q", "" if i == 6 else "a")}
               for i in range(8)]
    loading = loader(LlavaData(write(tmp_path / "a.json", records), tmp_path), small)
    step, = take(loading, 1)
    assert sorted(names([step])[0]) == ["n0", "n1", "n3", "n4", "n7"] and loading.seen == 8
    assert sorted(loading.skipped) == sorted(index for batch in step for index, _, _ in batch.skipped) == [2, 5, 6]
    assert all(loading.skipped[i][0] == f"n{i}" for i in (2, 5, 6))
    assert "2.png: not a readable image" in str(loading.skipped[2][1])
    assert "5.png: no such image" in str(loading.skipped[5][1])
    assert "no supervised token: its answers are empty" in str(loading.skipped[6][1])


def test_samples_that_share_an_id_are_counted_each(small, tmp_path):
    """In public files a picture's id stands at all of its dialogues."""
    records = [{"id": "same", "image": "gone.png", "conversations": talk("<image>q", "a")} for _ in range(20)]
    with pytest.raises(InputError, match="samples with bad images, more than 1%"):
        take(loader(LlavaData(write(tmp_path / "a.json", records), tmp_path), small), 2)


def test_more_than_one_percent_of_bad_pictures_stop_the_run(small):
    def seen_before_the_end(bad, n, steps, length=lambda i: 1 + i * 7 % 40):
        loading = loader(Listed(n, length, bad=bad), small, global_batch=10, micro_batch=10)
        try:
            take(loading, steps)
        except InputError as error:
            assert "\n" not in str(error) and "more than 1%" in str(error)
            assert "missing.jpg: no such image" in str(error)
            return loading.seen
    assert seen_before_the_end([5, 6, 7], 40, 40) is None            # three are forgiven, in ten epochs
    assert seen_before_the_end([5, 6, 7, 8], 40, 40) <= 40           # four of 40 are more than 1%
    assert seen_before_the_end(range(0, 2000, 200), 2000, 200) is None       # ten of 2000: 0.5%
    assert seen_before_the_end(range(0, 2000, 50), 2000, 200) < 1500         # 2%: 21 of the first 1050 or so
    bad = order(20_000, 0, 0, [1] * 20_000, 10)[:40]                 # they come in clumps: all of the first 40, but 0.2% of the set
    assert seen_before_the_end(bad, 20_000, 20, lambda i: 1) is None


def test_a_dialogue_without_an_answer_is_skipped_and_no_fault_of_the_file(small, rgb, tmp_path):
    saved(rgb, tmp_path / "a.jpg", format="PNG")
    alone, shown = {"id": "alone", "conversations": talk("q")}, GOOD | {"id": "shown", "conversations": talk("<image>q")}
    loading = loader(LlavaData(write(tmp_path / "a.json", [GOOD, alone, shown]), tmp_path), small, global_batch=3, micro_batch=3)
    assert names(take(loading, 1)) == [["good"]]
    assert {name: str(error) for name, error in loading.skipped.values()} == dict.fromkeys(
        ("alone", "shown"), "no supervised token: its answers are empty")


def test_a_mark_within_a_text_without_pictures_is_text(small, tmp_path):
    """Dialogues about code hold it. At a message's start or end it asks for a picture, which is missing."""
    code = {"id": "code", "conversations": talk("What does <image> mean in RSS?", "An <image> element names a logo.")}
    batch, = take(loader(LlavaData(write(tmp_path / "a.json", [code]), tmp_path), small, global_batch=1), 1)[0]
    assert batch.ids == ["code"] and len(batch.pixels) == 0 and IMAGE not in batch.tokens
    text = small.decode(batch.labels[batch.labels >= 0].tolist())
    assert "<image>" in text.replace(" ", "") and "logo" in text.replace(" ", "")


def test_samples_with_nothing_to_learn_are_skipped_and_do_not_stop_the_run(small):
    loading = loader(Listed(40, empty=range(20)), small)
    take(loading, 5)
    assert loading.seen == 40 and sorted(loading.skipped) == list(range(20))
    short = Loader(Listed(8, lambda i: 300 if i == 3 else 3), small, "tiny", ImageSpec(8), 4, 100, 8, 8)
    take(short, 1)
    name, error = short.skipped[3]
    assert name == "n3" and "not even the first turn fits into 100 tokens" in str(error)


def test_a_dataset_of_which_nothing_is_left_stops_the_run(small):
    with pytest.raises(InputError, match="no sample of the dataset can be learnt from; the last one: n"):
        take(loader(Listed(5, empty=range(5)), small), 9)


def test_turns_that_are_cut_off_take_their_pictures_along(small):
    class Long(Listed):
        def __getitem__(self, i):
            black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
            return Sample([black, white], [("<image>q", "a"), ("<image>q", "a" * 300)], f"n{i}")

    (batch, ), = take(loader(Long(1), small, global_batch=1), 1)
    assert batch.pixels.shape == (1, 3, 8, 8) and batch.pixels.max() == 0 and (batch.tokens == IMAGE).sum() == 4


def test_a_rank_with_nothing_left_still_makes_its_forwards(small):
    empty, three = Listed(5, empty=range(4)), Listed(3)
    ranks = [take(loader(empty, small, global_batch=5, micro_batch=2, rank=rank, world_size=2), 2) for rank in (0, 1)]
    ranks.append(take(loader(three, small, global_batch=3, micro_batch=1, rank=1, world_size=2), 2))
    for steps in ranks:
        for step in steps:
            assert len(step) == 2
            for batch in step:
                if not batch.ids:
                    assert batch.tokens.shape == (1, 1) and batch.labels.tolist() == [[IGNORE]] and batch.lengths == [1]
                    assert batch.pixels.shape == (0, 3, 8, 8)
    assert not ranks[2][0][1].ids                                    # three samples on two ranks: one, and a stand-in


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_links_out_of_the_image_folder_is_skipped_and_a_folder_that_does_is_one_line(workers, small, rgb, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    os.symlink(saved(rgb, tmp_path / "secret.png"), images / "a.jpg")
    dataset = LlavaData(write(tmp_path / "a.json", [GOOD]), images)
    with pytest.raises(InputError, match=r"no sample .*good: .*images/a.jpg is a link out of the image folder .*images\)$"):
        take(loader(dataset, small, workers=workers), 1)
    saved(rgb, images / "b.jpg", format="PNG")
    dataset = LlavaData(write(tmp_path / "both.json", [GOOD, GOOD | {"id": "b", "image": "b.jpg"}]), images)
    assert names(take(loading := loader(dataset, small, workers=workers, global_batch=2), 1)) == [["b"]]
    assert list(loading.skipped) == [0]
    (images / "b.jpg").unlink()
    (tmp_path / "elsewhere").mkdir()
    (images / "coco").symlink_to(tmp_path / "elsewhere")
    linked = write(tmp_path / "b.json", [GOOD, GOOD | {"image": "coco/b.jpg"}])
    with pytest.raises(InputError, match="images/coco: is a link out of the image folder .*images, .* move the pictures"):
        LlavaData(linked, images)                                    # at once, not at that sample
    (tmp_path / "link").symlink_to(images)                           # a link to the folder itself is fine
    (images / "a.jpg").unlink()
    saved(rgb, images / "a.jpg", format="PNG")
    dataset = LlavaData(tmp_path / "a.json", tmp_path / "link")
    assert names(take(loader(dataset, small, global_batch=1), 1)) == [["good"]]


def test_real_photographs_become_batches(real):
    tokenizer = load_tokenizer(real / "tokenizers" / "llama2")
    dataset = ConcatDataset([LlavaData(real / "llava_instruct.json", real / "images"),
                             ShikraData(real / "shikra_rec.jsonl", real / "images")])
    loading = Loader(dataset, tokenizer, "vicuna_v1", ImageSpec(112), 16, 2048, 16, 8)
    for step in take(loading, 4):
        for batch in step:
            assert (batch.tokens == IMAGE).sum() == 16 * len(batch.shown) and batch.pixels.float().std() > 20
    assert loading.seen == 64 and not loading.skipped
