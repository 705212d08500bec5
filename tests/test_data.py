"""data.py: formats, batches, and the order of the data."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, losses, refused
from PIL import Image
from torch.utils.data import ConcatDataset

import train
from common.images import BadImage, ImageSpec
from common.records import check_images
from data import DATASETS, LlavaData, Loader, Sample, collate, order
from dialogue import IGNORE, IMAGE

# --- formats ---


# dialogues; good records, of COMM's mix about an image of 100 x 50 pixels, the turns that they
# become; bad records
FORMATS = json.loads((ROOT / "tests" / "fixtures" / "formats.json").read_text())
GOOD, MIX = FORMATS["good"].pop("llava"), FORMATS["good"]
NAME = MIX["rec"]["img_path"]
CAPTION = {"img_path": NAME, "caption": "a cat"}


def write(path, records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text)
    return path


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_llava_json_and_jsonl_and_openai_messages_give_the_same_samples(tmp_path):
    # an answer that comes first and a question that comes last are dropped
    records = FORMATS["dialogues"]
    (tmp_path / "sub").mkdir()
    a, b = str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")
    expected = [
        Sample([str(tmp_path / "sub" / "a.jpg")], [["<image>\nq", "a"], ["q2", "a2"]], "one"),
        Sample([a, b], [["<image><image>?", "first"]], "2"),
        Sample([], [["no image", "none"]], "2", "Be brief."),
        Sample([], [["no image", "none"]], "3", "Be brief."),
    ]
    for lines in (False, True):
        dataset = LlavaData(write(tmp_path / "data", records, lines), tmp_path)
        assert list(dataset) == expected
        assert dataset.num_with_images == 2
        assert dataset.length(2) < dataset.length(0) < dataset.length(1)


def test_a_bad_record_or_file_is_named_in_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    file = tmp_path / "bad.json"
    for kind, records in FORMATS["bad"].items():
        good = {"llava": GOOD, "caption": CAPTION}.get(kind) or MIX[kind]
        for why, record in records.items():
            with refused() as error:
                DATASETS[kind](write(file, [good, record]), tmp_path / "images")
            assert str(error.value).startswith(f"{file}, sample 1"), why
    for text, part in [
        (b'[{"id": 1},\n {"id": 2}\n {"id": 3}]', "line 3"),
        (b'{"id": 1}\n{"id": \n', "line 2"),
        (b"[" * 100_000, "bad.json"),
        (b"[]", "bad.json"),
        (b"\xff", "bad.json"),
    ]:
        file.write_bytes(text)
        with refused() as error:
            LlavaData(file, tmp_path / "nowhere")
        assert str(file) in str(error.value) and part in str(error.value)


@pytest.fixture
def mix(tmp_path):
    """Write a file of each format, and its image -> {kind: the file, or vqa's two}."""
    Image.new("RGB", (100, 50)).save(tmp_path / NAME)
    files = {kind: write(tmp_path / f"{kind}.json", content) for kind, content in MIX.items()}
    return files | {"vqa": f"{files['vqa']},{files['caption']}"}


def test_a_format_of_the_mix_gives_image_question_answer_and_boxes(mix, loader, tmp_path):
    assert {"llava", *MIX} == DATASETS.keys()
    # 25 rows of padding above; what is outside the image is cut off
    for kind, (question, answer) in FORMATS["turns"].items():
        dataset = DATASETS[kind](mix[kind])
        assert list(map(tuple, dataset[0].turns)) == [(f"<image>\n{question}", answer)]
        ((batch,),) = take(loader(dataset, 1, 1, max_length=500), 1)
        assert batch.ids == [f"{NAME}#0"] and len(batch.image_index) == 4
    # Shikra's captions are lines
    dataset = DATASETS["caption"](write(tmp_path / "c.jsonl", [CAPTION] * 2, lines=True))
    assert dataset[1].turns == DATASETS["caption"](mix["caption"])[0].turns
    with refused("vqa:QUESTIONS,ANNOTATIONS"):
        DATASETS["vqa"](mix["caption"])
    # boxes of another shape than the image's, and outside of it
    Image.new("RGB", (20, 40)).save(tmp_path / NAME)
    for kind in ("rec", "reg", "v7w", "rd"):
        loading = loader(DATASETS[kind](mix[kind]), 1, 1)
        take(loading, 1)
        ((name, error),) = loading.skipped.values()
        assert NAME in f"{name} {error}" and isinstance(error, BadImage) and "20" in str(error)


def test_the_index_chooses_the_words_of_the_question_also_from_a_file(tmp_path):
    records = write(tmp_path / "rec.jsonl", [MIX["rec"]] * 8, lines=True)
    templates, box = tmp_path / "t.json", FORMATS["turns"]["rec"][1]
    for kind, place, text in (("rec", "<expr>", "it"), ("reg", "<objs>", box)):
        questions = [sample.turns[0][0] for sample in DATASETS[kind](records)]
        assert questions[:4] == questions[4:] and len(set(questions)) == 4
        words = [f"In <image>, {place}?", f"{place} <image>"]
        path = f"{records}@{write(templates, words)}"
        questions = [sample.turns[0][0] for sample in DATASETS[kind](path)]
        assert questions == [f"In <image>, {text}?", f"{text} <image>"] * 4
        for bad in ([], {}, [3], ["<image> no place"], [words[0] * 2]):
            write(templates, bad)
            with refused("t.json"):
                DATASETS[kind](path)


def test_the_mix_trains_and_boxes_need_padding(mix, flags, clean_run):
    names = [f"{kind}:{path}" for kind, path in mix.items()]
    options = dict(template1="tiny", train1="connector,llm", stage=1, batch1=6)
    train.main(flags(data1=",".join(names), **options))
    assert [*losses()] == [(1, 0), (1, 1)] and all(map(math.isfinite, losses().values()))
    train.main(flags(data1=",".join(names[:2]), image_mode="crop", out="crop", **options))
    for name in names[2:]:
        with refused("pad"):
            train.main(flags(data1=name, image_mode="crop", out="no", **options))


# --- the loader ---


class Listed(list):
    def length(self, i):
        return len(self[i].turns[0][1])


def listed(n, bad=(), empty=()):
    """Make samples in memory. Images of `bad` are missing, answers of `empty` are empty."""
    samples = Listed()
    for i in range(n):
        image = "missing.jpg" if i in bad else np.full((8, 8, 3), i % 256, np.uint8)
        answer = "" if i in empty else "x" * (1 + i * 7 % 40)
        samples.append(Sample([image], [("<image>\nq", answer)], f"n{i}"))
    return samples


@pytest.fixture
def loader(world_tokenizer):
    def make(dataset, global_batch=8, micro_batch=3, max_length=200, **options):
        spec, numbers = ImageSpec(8), (4, max_length, global_batch, micro_batch)
        return Loader(dataset, world_tokenizer, "tiny", spec, *numbers, **options)

    return make


def take(loader, steps):
    iterator = iter(loader)
    return [next(iterator) for _ in range(steps)]


def names(steps):
    """Return the names of the samples of every step. Its last micro-batch comes first."""
    return [[name for batch in reversed(step) for name in batch.ids] for step in steps]


def assert_same(steps, others):
    for a, b in zip(sum(steps, []), sum(others, []), strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        assert torch.equal(a.pixels, b.pixels) and a.ids == b.ids


def test_a_batch_packs_dialogues_with_their_images_and_no_padding(loader, tmp_path):
    black, shared = np.zeros((8, 8, 3), np.uint8), tmp_path / "shared.png"
    Image.new("RGB", (8, 8), (7, 7, 7)).save(shared)
    shared = str(shared)
    samples = [
        Sample([shared], [("<image>q", "one")], "one"),
        Sample([], [("no image", "ok")], "text"),
        Sample([black, Image.new("RGB", (4, 4), "white")], [("<image><image>", "two")], "two"),
        # the second turn is far too long, so its image goes, too
        Sample([shared, black], [("<image>q", "a"), ("<image>q", "a b " * 100_000)], "cut"),
        Sample([black], [("<image>q", "a" * 300)], "too long"),
    ]
    ((batch,),) = take(loader(Listed(samples), 5, 5), 1)
    colors = {"one": [7], "text": [], "two": [0, 255], "cut": [7]}
    assert sorted(batch.ids) == sorted(colors)
    assert [name for _, name, _ in batch.skipped] == ["too long"]
    # a file that two dialogues share is in the batch once
    assert batch.pixels.shape == (3, 3, 8, 8) and batch.pixels.dtype == torch.uint8
    assert batch.tokens.shape == batch.labels.shape == (1, sum(batch.lengths))
    tokens, labels = batch.tokens[0].split(batch.lengths), batch.labels[0].split(batch.lengths)
    for name, its_tokens, its_labels in zip(batch.ids, tokens, labels, strict=True):
        assert (its_tokens == IMAGE).sum() == 4 * len(colors[name])
        supervised = its_labels != IGNORE
        assert torch.equal(its_labels[supervised], its_tokens[supervised])
        assert supervised[-1] and not supervised[0]
    found = batch.pixels.flatten(1).float().mean(1)[batch.image_index[::4] // 4]
    assert found.tolist() == [color for name in batch.ids for color in colors[name]]
    # the first token of a dialogue is not predicted from the dialogue before it
    a, b = np.array([[5, 6], [5, 6]]), np.array([[7, 8, 9], [7, IGNORE, 9]])
    batch = collate([("a", a, []), ("b", b, [])], [], {}, ImageSpec(8), 2)
    assert batch.labels.tolist() == [[IGNORE, 6, IGNORE, IGNORE, 9]]


def test_order_is_a_pure_function_that_groups_similar_lengths():
    lengths = [i * 7 % 40 for i in range(101)]
    first = order(lengths, 3, 2, 8)
    assert first == order(lengths, 3, 2, 8) and sorted(first) == list(range(101))
    assert first not in [order(lengths, seed, epoch, 8) for seed, epoch in ((3, 1), (4, 2))]
    # 101 samples in steps of 8: each epoch begins within a step, and the others stay whole
    stream = [i for epoch in range(3) for i in order(range(101), 0, epoch, 8)]
    steps = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    spreads = [max(step) - min(step) for i, step in enumerate(steps) if i not in (12, 25)]
    assert max(spreads) < 16


def test_the_stream_goes_through_the_epochs_and_continues_at_any_sample(loader):
    dataset = listed(30)
    lengths = [dataset.length(i) for i in range(30)]
    expected = sum((order(lengths, 0, epoch, 8) for epoch in range(3)), [])
    steps = take(loader(dataset), 11)
    stream = sum(names(steps), [])
    assert stream == [f"n{i}" for i in expected[:88]]
    for done in (1, 3, 4, 8):
        assert_same(take(loader(dataset, start=done * 8), 3), steps[done : done + 3])
    assert names(take(loader(dataset, start=13), 2)) == [stream[13:21], stream[21:29]]


def test_ranks_share_each_step_and_workers_change_nothing(loader):
    # steps of 3 leave a rank of 4 without a sample: its forward pass adds nothing
    for global_batch, size in ((10, 2), (10, 3), (3, 4)):
        whole = names(take(loader(listed(50), global_batch), 7))
        for rank in range(size):
            steps = take(loader(listed(50), global_batch, rank=rank, world_size=size), 7)
            assert names(steps) == [ids[rank::size] for ids in whole]
            assert {len(step) for step in steps} == {math.ceil(global_batch / size / 3)}
    (batch,) = steps[0]
    assert batch.tokens.shape == (1, 2) and batch.labels.tolist() == [[IGNORE, IGNORE]]
    assert batch.lengths == [2] and batch.pixels.shape == (2, 3, 8, 8)
    options = dict(rank=1, world_size=2, start=5)
    dataset = listed(60, bad=[3, 11], empty=[4])
    alone, helped = loader(dataset, **options), loader(dataset, workers=2, **options)
    state = torch.get_rng_state()
    assert_same(take(alone, 8), take(helped, 8))
    assert alone.seen == helped.seen and [*alone.skipped] == [*helped.skipped] != []
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_that_cannot_be_used_is_skipped_counted_and_named(loader, tmp_path):
    records = [GOOD | {"id": f"n{i}", "image": f"{i}.png"} for i in range(8)]
    records[6]["conversations"] = talk("<image>q", "")
    # without images "<image>" within a message is text
    records[7] = {"id": "n7", "conversations": talk("What is <image> in RSS?", "An <image> tag.")}
    # a linked folder, as data sets often are
    records[0]["image"] = "linked/0.png"
    (tmp_path / "linked").symlink_to(tmp_path)
    for i in (0, 1, 2, 3, 4, 6):
        Image.new("RGB", (12, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"damaged")
    loading = loader(LlavaData(write(tmp_path / "a.json", records), tmp_path))
    (step,) = take(loading, 1)
    assert sorted(names([step])[0]) == ["n0", "n1", "n3", "n4", "n7"] and loading.seen == 8
    assert sum((batch.tokens == IMAGE).sum() for batch in step) == 4 * 4
    assert sorted(loading.skipped) == [2, 5, 6]
    for index, (name, error) in loading.skipped.items():
        assert name == f"n{index}"
        assert index == 6 or isinstance(error, BadImage) and f"{index}.png" in str(error)
    # two bad images are few, and twice as many are found before a run
    check_images(loading.dataset)
    with refused("[25].png"):
        check_images(ConcatDataset([loading.dataset] * 2))
    # what a file says is printed in part, and without control characters
    records[0] |= {"id": "\ud83d\x1b[2J\n" + "x" * 1_000_000}
    (name,) = {sample.id for sample in LlavaData(write(tmp_path / "a.json", records[:1]), tmp_path)}
    assert name.isprintable() and len(name) == 80


def test_too_many_bad_images_stop_the_run(loader):
    # three are forgiven, and so are 0.5%; four of 40 and 2% of 2000 are not
    take(loader(listed(40, bad=[5, 6, 7]), 10, 10), 8)
    take(loader(listed(2000, bad=range(0, 2000, 200)), 10, 10), 200)
    for bad, n in (([5, 6, 7, 8], 40), (range(0, 2000, 50), 2000)):
        loading = loader(listed(n, bad=bad), 10, 10)
        with refused("missing.jpg"):
            take(loading, 150)
        assert loading.seen <= 0.75 * n + 10
