"""world.py: scenes that keep their promises, questions whose answers follow from the objects, pictures that show them."""
import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

import world
from data import NothingToLearn
from images import parse_box
from eval import iou, named_objects
from world import COLOURS, SHAPES, SIDE, TASKS, World, draw, scene

COUNT = 1500


@pytest.fixture(scope="module")
def scenes():
    return {split: [scene(split, index) for index in range(COUNT)] for split in ("train", "test")}


def everything(scenes):
    return scenes["train"] + scenes["test"]


def kinds(objects):
    return {(o.colour, o.shape) for o in objects}


def asked(task, scenes):
    """Every question that a task asks about every object of the first scenes -> (objects, question, answer)."""
    for index, objects in enumerate(everything(scenes)[::3]):
        for about in range(len(objects)):
            turn = world.question(task, objects, np.random.default_rng([index, about]), about)
            if turn:
                yield objects, *turn


# --- scenes -----------------------------------------------------------------------------------------------------------

def test_a_scene_and_its_picture_are_functions_of_split_and_index_alone(scenes):
    for split, index in (("train", 7), ("test", 7), ("train", 1499), ("train", 1_000_007)):
        np.random.seed(index)                                        # no global state reaches them
        first = scene(split, index), draw(scene(split, index), split, index)
        again = scene(split, index), draw(scene(split, index), split, index)
        assert first[0] == again[0] and (first[1] == again[1]).all()
    assert scene("train", 7) == scenes["train"][7] != scenes["test"][7]
    assert len({str(objects) for objects in everything(scenes)}) == 2 * COUNT


def test_no_set_of_objects_is_in_both_splits(scenes):
    """By construction, since the side of a set follows from the set: the rule is written out here once more."""
    def is_test(objects):
        numbers = [SHAPES.index(o.shape) * 8 + list(COLOURS).index(o.colour) for o in objects]
        return sum(31 ** number % 997 for number in numbers) % 8 == 0
    assert not any(map(is_test, scenes["train"])) and all(map(is_test, scenes["test"]))
    sets = {split: {frozenset(kinds(objects)) for objects in scenes[split]} for split in scenes}
    assert not sets["train"] & sets["test"]
    assert len(sets["test"]) > 500                                   # and there is enough to ask about
    seen_alone = set().union(*map(kinds, scenes["train"]))
    assert seen_alone == {(colour, shape) for colour in COLOURS for shape in SHAPES}    # what is new is only the combination


def test_objects_lie_inside_and_apart_and_differ(scenes):
    for objects in everything(scenes):
        assert 1 <= len(objects) <= 5 and len(kinds(objects)) == len(objects)
        for o in objects:
            assert 0 <= o.x and o.x + o.side <= SIDE and 0 <= o.y and o.y + o.side <= SIDE
            assert world.SIZES[o.size][0] <= o.side <= world.SIZES[o.size][1]
            assert o.shape in SHAPES and o.colour in COLOURS
        for a, b in combinations(objects, 2):
            across = min(a.x + a.side, b.x + b.side) - max(a.x, b.x)
            down = min(a.y + a.side, b.y + b.side) - max(a.y, b.y)
            assert across <= 0 or down <= 0, f"{a} over {b}"


def test_one_to_five_objects_all_occur_and_share_colours_and_shapes(scenes):
    for split in scenes:
        numbers = Counter(map(len, scenes[split]))
        assert min(numbers[n] for n in (1, 2, 3, 4, 5)) > 0.08 * COUNT
        several = [objects for objects in scenes[split] if len(objects) > 2]
        alike = sum(max(Counter(o.colour for o in objects).values()) > 1 for objects in several) / len(several)
        assert alike > 0.5                                           # counts of 2 and more are no rarity


# --- pictures ---------------------------------------------------------------------------------------------------------

def test_the_picture_shows_the_scene():
    """Inside every shape its colour, shaded by up to 15%; around it none of that. The inner half of a box is wholly covered
    by a square or a circle; of a cross its two bars, of a triangle the foot."""
    for index in range(150):
        objects = scene("train", index)
        picture = draw(objects, "train", index).astype(float)
        assert picture.shape == (SIDE, SIDE, 3)
        background = np.ones((SIDE, SIDE), dtype=bool)
        for o in objects:
            background[max(0, int(o.y) - 1):int(o.y + o.side) + 2, max(0, int(o.x) - 1):int(o.x + o.side) + 2] = False
            parts = {"square": [(0.15, 0.15, 0.85, 0.85)], "circle": [(0.25, 0.25, 0.75, 0.75)],
                     "cross": [(0.15, 0.42, 0.85, 0.58), (0.42, 0.15, 0.58, 0.85)], "triangle": [(0.3, 0.75, 0.7, 0.9)]}
            for x1, y1, x2, y2 in parts[o.shape]:
                inside = picture[round(o.y + y1 * o.side):round(o.y + y2 * o.side), round(o.x + x1 * o.side):round(o.x + x2 * o.side)]
                seen, colour = inside.mean((0, 1)), np.array(COLOURS[o.colour])
                shade = (seen @ colour) / (colour @ colour)
                assert 0.82 < shade < 1.03 and np.abs(seen - shade * colour).max() < 12, f"scene {index}: {o} is {seen}"
                nearest = min(COLOURS, key=lambda name: np.abs(seen / seen.max() - np.array(COLOURS[name]) / max(COLOURS[name])).sum())
                assert nearest == o.colour
        if background.sum() > 500:
            assert 15 < picture[background].mean() < 140             # dim


def test_shapes_fill_their_boxes_as_geometry_says():
    """On a black ground without noise, covered area against box area: 1, π/4, 1/2, and 5/9 for the cross."""
    for shape, share in (("square", 1), ("circle", np.pi / 4), ("triangle", 1 / 2), ("cross", 5 / 9)):
        o = world.Object(shape, "white", "large", 20.3, 17.6, 24.0)
        bright = draw([o], "train", 0).astype(float).mean(2) - draw([], "train", 0).astype(float).mean(2)
        covered = np.clip(bright / bright[28:31, 31:34].mean(), 0, 1)[15:45, 18:48].sum()
        assert abs(covered / 24 ** 2 - share) < 0.06                 # soft edges and noise
        rows, columns = np.where(bright > 70)
        assert abs(rows.min() - o.y) < 2.6 and abs(rows.max() + 1 - o.y - o.side) < 1.6      # a triangle's tip is faint
        assert abs(columns.min() - o.x) < 1.6 and abs(columns.max() + 1 - o.x - o.side) < 1.6


# --- questions and answers --------------------------------------------------------------------------------------------

def test_captions_name_every_object_once_from_left_to_right(scenes):
    for objects in everything(scenes):
        text = world.caption(objects)
        assert named_objects(text) == Counter(o.name for o in objects)
        centres = [next(o.x + o.side / 2 for o in objects if o.name == name)
                   for name in re.findall(r"a ((?:small|large) \w+ \w+)", text)]
        assert centres == sorted(centres) and text.endswith(".") and "," not in text.split(" and ")[-1]


def test_presence_is_true_and_balanced_and_its_noes_are_near_misses(scenes):
    answers, near = Counter(), 0
    for objects, question, answer in asked("presence", scenes):
        colour, shape = re.fullmatch(r"Is there an? (\w+) (\w+)\?", question).groups()
        assert (answer == "yes") == ((colour, shape) in kinds(objects))
        assert question.startswith("Is there an ") == (colour[0] in "aeiou")
        answers[answer] += 1
        near += answer == "no" and (colour in {o.colour for o in objects} or shape in {o.shape for o in objects})
    # of about 2900 answers half are yes: six standard deviations are 0.055
    assert set(answers) == {"yes", "no"} and abs(answers["yes"] / answers.total() - 0.5) < 0.055
    assert near > 0.5 * answers["no"]


def test_counts_are_counted(scenes):
    answers = Counter()
    for objects, question, answer in asked("count", scenes):
        word, = re.fullmatch(r"How many (\w+)(?: shapes)? are there\?", question).groups()
        there = [o for o in objects if word == "shapes" or word in (o.colour, o.shape + "s", o.shape + "es")]
        assert answer == str(len(there))
        answers[answer] += 1
    assert set(answers) == set("012345") and max(answers.values()) < 0.6 * answers.total()


def test_boxes_and_names_point_at_each_other(scenes):
    for objects, question, answer in asked("rec", scenes):
        name, = re.fullmatch(r"Where is the (.+)\?", question).groups()
        meant, = [o for o in objects if o.name == name]              # one and only one
        box = parse_box(answer)
        for value, pixels in zip(box, (meant.x, meant.y, meant.x + meant.side, meant.y + meant.side)):
            assert abs(value * SIDE - pixels) <= 0.025 * SIDE + 1e-9     # in steps of 0.05
        assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    for objects, question, answer in asked("reg", scenes):
        text, = re.fullmatch(r"What is at (\[.+\])\?", question).groups()
        x1, y1, x2, y2 = (value * SIDE for value in parse_box(text))
        meant = [o for o in objects if x1 < o.x + o.side / 2 < x2 and y1 < o.y + o.side / 2 < y2]
        assert [o.name for o in meant] == [answer]


def test_attributes_are_asked_only_where_they_are_unique(scenes):
    asks = Counter()
    for objects, question, answer in asked("attribute", scenes):
        if found := re.fullmatch(r"What colour is the (\w+)\?", question):
            assert [o.colour for o in objects if o.shape == found[1]] == [answer]
        else:
            found = re.fullmatch(r"What shape is the (\w+) one\?", question)
            assert [o.shape for o in objects if o.colour == found[1]] == [answer]
        asks[question.split()[1]] += 1
    assert min(asks["colour"], asks["shape"]) > 200


def test_relations_are_those_of_the_centres_and_clear(scenes):
    answers = Counter()
    for objects, question, answer in asked("relation", scenes):
        first, second = re.fullmatch(r"Is the (\w+ \w+) (?:left or right of|above or below) the (\w+ \w+)\?", question).groups()
        a, b = (next(o for o in objects if f"{o.colour} {o.shape}" == name) for name in (first, second))
        dx, dy = a.x + a.side / 2 - b.x - b.side / 2, a.y + a.side / 2 - b.y - b.side / 2
        gap = dx if "left" in question else dy
        assert abs(gap) > SIDE / 5 and abs(gap) == max(abs(dx), abs(dy))
        assert answer == (("left" if dx < 0 else "right") if "left" in question else ("above" if dy < 0 else "below"))
        answers[answer] += 1
    assert set(answers) == {"left", "right", "above", "below"} and max(answers.values()) < 0.35 * answers.total()


def test_dialogues_ask_true_things_about_each_object_once(scenes):
    whole, seen = Counter(), Counter()
    for index, objects in enumerate(scenes["train"][:600]):
        turns = world.dialogue(objects, np.random.default_rng(index))
        assert 1 <= len(turns) <= len(objects) + 1                   # a count, and at most one question an object
        questions = [question for question, _ in turns]
        if questions[0] in ("Describe the picture.", "List the shapes."):
            whole[questions[0]] += 1
            assert len(turns) == 1                                   # it would give all other answers away
        for question, answer in turns:
            if question.startswith("Where is the "):
                assert answer == next(o.box_text for o in objects if o.name == question[13:-1])
            if question.startswith("What is at "):
                assert answer == next(o.name for o in objects if o.box_text == question[11:-1])
        found = {o.name for o in objects if f"Where is the {o.name}?" in questions}
        named = {o.name for o in objects if f"What is at {o.box_text}?" in questions}
        assert not found & named
        seen.update(" ".join(question.split()[:2]) for question in questions)
    assert 0.04 < whole["Describe the picture."] / 600 < 0.16        # a tenth; five standard deviations
    assert 0.08 < whole["List the shapes."] / 600 < 0.22             # 15 of 100
    assert {"Is there", "Is the", "How many", "Where is", "What is", "What colour", "Describe the", "List the"} <= set(seen)


def test_a_listing_tells_the_scene_in_words(scenes):
    objects = scenes["train"][3]
    assert world.listing(objects).split("; ") == [f"{o.name} {o.box_text}" for o in objects]


def test_a_box_in_words_is_the_box_to_a_fortieth(scenes):
    """In steps of 0.05 a number is at most 0.025 off; the box in words still covers most of the object, and little else."""
    for objects in scenes["test"][:100]:
        for o in objects:
            said = json.loads(o.box_text)
            assert max(abs(a - b) for a, b in zip(said, o.box)) <= 0.025 + 1e-9 and iou(said, o.box) > 0.55


def test_a_scene_of_few_objects_is_one_when_few_are_asked_for():
    assert {len(world.scene("train", i, most=1)) for i in range(20)} == {1}
    assert {len(world.scene("train", i, most=2)) for i in range(40)} == {1, 2}


# --- the dataset ------------------------------------------------------------------------------------------------------

def test_the_world_is_a_dataset_of_samples_with_one_picture():
    for style in ("caption", "dialogue", "presence", "rec"):
        data = World("test", 12, style)
        images, turns, name = data[5]
        assert len(data) == 12 and images[0].dtype == np.uint8 and name == "test scene 5"
        assert turns[0][0].startswith("<image>\n") and sum(text.count("<image>") for turn in turns for text in turn) == 1
        again = data[5]
        assert again.turns == turns and (again.images[0] == images[0]).all()
        assert style == "dialogue" or len(turns) == 1


def test_a_scene_without_such_a_question_is_nothing_to_learn():
    alone = next(index for index in range(100) if len(scene("train", index)) == 1)
    with pytest.raises(NothingToLearn, match=f"train scene {alone} gives no relation question"):
        World("train", 100, "relation")[alone]


def test_every_task_finds_a_question_in_most_scenes(scenes):
    for task in TASKS:
        found = sum(world.any_question(task, objects, np.random.default_rng(0)) is not None for objects in scenes["test"][:300])
        assert found > (150 if task == "relation" else 290), task
