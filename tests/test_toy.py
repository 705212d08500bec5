"""toy/: scenes depend on the seed only, splits are disjoint, answers are true; smoke tests."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer

import train
from clip import CLIP
from common import cli
from common.images import ImageSpec, iou, parse_box
from dialogue import find_template
from dinov2 import DINOv2
from llama import Llama
from toy import findings, pretrain, video, world
from toy.world import COLORS, SHAPES, SIDE, World, draw, scene
from vit import ViT

NAMES = {"clip": CLIP, "dinov2": DINOv2, "mae": ViT, "deit": ViT, "llama": Llama}
COUNT = 800


@pytest.fixture(scope="module")
def scenes():
    return {split: [scene(split, index) for index in range(COUNT)] for split in ("train", "test")}


def kinds(objects):
    return {(o.color, o.shape) for o in objects}


def asked(task, scenes):
    """Ask about every object of the scenes -> (objects, question, answer)."""
    for index, objects in enumerate(scenes["train"] + scenes["test"]):
        for about in range(len(objects)):
            turn = world.question(task, objects, np.random.default_rng([index, about]), about)
            if turn:
                yield objects, *turn


def test_a_scene_and_its_image_depend_on_split_and_index_only(scenes):
    for split, index in (("train", 7), ("test", 7), ("train", 1_000_007)):
        np.random.seed(index)
        first, again = scene(split, index), scene(split, index)
        assert first == again and (draw(first, split, index) == draw(again, split, index)).all()
    assert scene("train", 7) == scenes["train"][7] != scenes["test"][7]
    assert World("test", 12)[5].turns == World("test", 12)[5].turns


def test_no_set_of_objects_is_in_both_splits(scenes):
    sets = {split: {frozenset(kinds(objects)) for objects in scenes[split]} for split in scenes}
    assert not sets["train"] & sets["test"] and len(sets["test"]) > 300
    assert set().union(*sets["train"]) == {(color, shape) for color in COLORS for shape in SHAPES}


def test_answers_about_presence_and_number_are_true_and_balanced(scenes):
    answers = Counter()
    for objects, question, answer in asked("presence", scenes):
        color, shape = re.fullmatch(r"Is there an? (\w+) (\w+)\?", question).groups()
        assert (answer == "yes") == ((color, shape) in kinds(objects))
        answers[answer] += 1
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.055
    for objects, question, answer in asked("count", scenes):
        (word,) = re.fullmatch(r"How many (\w+)(?: shapes)? are there\?", question).groups()
        found = [o for o in objects if word in ("shapes", o.color, o.shape + "s", o.shape + "es")]
        assert answer == str(len(found))


def test_answers_about_places_and_attributes_are_true_and_unique(scenes):
    for objects, question, answer in asked("rec", scenes):
        (name,) = re.fullmatch(r"Where is the (.+)\?", question).groups()
        (meant,) = [o for o in objects if o.name == name]
        box = parse_box(answer)
        assert max(abs(a - b) for a, b in zip(box, meant.box, strict=True)) <= 0.025 + 1e-9
    for objects, question, answer in asked("reg", scenes):
        box = parse_box(question)
        assert max(objects, key=lambda o: iou(o.box, box)).name == answer
    for objects, question, answer in asked("attribute", scenes):
        asked_for, known = re.fullmatch(r"What (\w+) is the (\w+).*\?", question).groups()
        found = [o.color if asked_for == "colour" else o.shape for o in objects if known in o.name]
        assert found == [answer]
    pattern = r"Is the (\w+ \w+) (left|above) or \w+(?: of)? the (\w+ \w+)\?"
    for objects, question, answer in asked("relation", scenes):
        first, way, second = re.fullmatch(pattern, question).groups()
        a, b = (next(o for o in objects if o.name.endswith(name)) for name in (first, second))
        gap = a.center[way == "above"] - b.center[way == "above"]
        other = {"left": "right", "above": "below"}[way]
        assert abs(gap) > SIDE / 5 and answer == (way if gap < 0 else other)


@pytest.mark.parametrize("name", NAMES)
def test_a_pretraining_writes_a_checkpoint_like_that_in_weights(name, tmp_path, monkeypatch):
    recipe, _, defaults = pretrain.RECIPES[name]
    # Scores of 1,000 scenes take longer than the training.
    monkeypatch.setitem(pretrain.RECIPES, name, (recipe, type, defaults))
    pretrain.main([name, f"--out={tmp_path}", "--steps=1", "--batch=4"])
    model = NAMES[name].from_pretrained(tmp_path)
    saved = NAMES[name].from_pretrained(ROOT / "weights" / name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in saved.state_dict().items()}
    if name in ("llama", "clip"):
        file = Path(name, "tokenizer_config.json")
        written = json.loads((tmp_path / file.name).read_text())
        assert written == json.loads((ROOT / "weights" / file).read_text())
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        saved = Tokenizer.from_file(str(ROOT / "weights" / name / "tokenizer.json"))
        assert tokenizer.get_vocab() == saved.get_vocab()
    if name == "llama":
        assert find_template(tmp_path) == "tiny"
    else:
        spec = ImageSpec.from_folder(tmp_path)
        assert spec.size == 64 and spec.mean == pytest.approx(pretrain.MEAN)


def test_the_tables_of_the_pages_are_those_of_the_finished_runs():
    folder = ROOT / "runs" / "findings"
    pages = {
        "findings.md": [str(ROOT / "runs" / "main.toml"), f"--out={folder / 'main'}"],
        "ablations.md": [f"--out={folder / 'short'}"],
    }
    for page, flags in pages.items():
        config = cli.parse(findings.Config, flags)
        lines = (ROOT / "docs" / page).read_text().splitlines()
        for name in config.table:
            table = [line for line in findings.markdown(config, name).splitlines() if line]
            assert len(table) > 5 and set(table) <= set(lines)


def test_every_arm_has_one_set_of_flags_and_these_are_those_of_train():
    arms = {}
    for name in findings.TABLES:
        for _, arm, connector, *_ in findings.Config().rows(name):
            assert arms.setdefault(arm, connector) == connector
            cli.parse(train.Config, f"--connector={connector}".split())
    quick = cli.parse(findings.Config, [str(ROOT / "runs" / "quick.toml")])
    assert set(quick.arms) <= set(arms) and quick.seeds == 1


def test_pretraining_sees_no_held_out_scene():
    for _, objects in pretrain.scenes_of(pretrain.Config(batch=50, steps=10), 3, 0.2, 0.4):
        assert len(objects) <= 2 and not world.in_test_split({o.kind for o in objects})


def test_a_model_is_scored_on_clips(tiny_model):
    scores = video.evaluate(tiny_model, 4)
    assert scores and all(0 <= value <= 1 for value in scores.values())
