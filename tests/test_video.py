"""video.py: clips whose truth is in their pixels, questions that one frame cannot answer, scores by hand."""
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import video
import world
from dialogue import encode
from hub import InputError
from video import FRAMES, STEP, WAYS, draw, everything, moving, passing, touch, way_question, went
from world import COLOURS, SIDE, Object

COUNT = 120


@pytest.fixture(scope="module")
def clips():
    return {kind.__name__: [kind("test", index) for index in range(COUNT)] for kind in (passing, moving)}


def test_a_clip_is_a_function_of_split_and_index_alone(clips):
    for index in (0, 5, 77):
        np.random.seed(index)
        assert passing("test", index) == clips["passing"][index] != passing("train", index)
        assert moving("test", index) == clips["moving"][index] != moving("train", index)
        first, again = (draw(passing("test", index), "test", index) for _ in range(2))
        assert np.array_equal(first, again) and np.shape(first) == (FRAMES, SIDE, SIDE, 3)
    for kind in clips.values():
        assert len({str(clip) for clip in kind}) == COUNT


def test_the_objects_of_a_clip_are_a_held_out_scenes(clips):
    def is_test(objects):                                            # world.scene's rule, written out once more
        numbers = [world.SHAPES.index(o.shape) * 8 + list(COLOURS).index(o.colour) for o in objects]
        return sum(31 ** number % 997 for number in numbers) % 8 == 0
    assert all(is_test(everything(frames)) for frames in clips["passing"])
    assert all(is_test(frames[0]) for frames, _ in clips["moving"])


def test_in_a_passing_clip_every_object_is_seen_and_never_two_at_once(clips):
    for frames in clips["passing"]:
        assert len(frames) == FRAMES and all(len(objects) == 1 for objects in frames)
        shown = [objects[0].name for objects in frames]
        changes = sum(a != b for a, b in pairwise(shown))
        assert changes + 1 == len(set(shown)) == len(everything(frames)) >= 2      # none comes back
        assert max(Counter(shown).values()) - min(Counter(shown).values()) <= 1
    assert {len(everything(frames)) for frames in clips["passing"]} == {2, 3, 4, 5}


def test_a_moving_clip_has_one_object_on_a_straight_line_within_the_picture_touching_none(clips):
    for frames, way in clips["moving"]:
        assert len(frames) == FRAMES and len(frames[0]) in (1, 2, 3)
        for before, after in pairwise(frames):
            assert after[1:] == before[1:]
            step = after[0].x - before[0].x, after[0].y - before[0].y
            assert step == pytest.approx([STEP * part for part in WAYS[way]]) and STEP == 0.05 * SIDE
        for first, *others in frames:
            assert min(first.box) >= 0 and max(first.box) <= 1
            (across, down), half = (first.x + first.side / 2, first.y + first.side / 2), first.side / 2
            for o in others:                                         # centres further apart than the half sides along one axis
                apart = max(abs(across - o.x - o.side / 2), abs(down - o.y - o.side / 2))
                assert apart >= half + o.side / 2 - 1e-9 and not touch(first, o)
    assert Counter(way for _, way in clips["moving"]) == {way: COUNT // 4 for way in WAYS}


def test_in_the_pixels_the_mover_goes_that_way_and_everything_else_stays(clips):
    """Where the first and the last frame differ is the mover: its colour leaves the one place and comes to the other."""
    for index, (frames, way) in enumerate(clips["moving"][:40]):
        pictures = np.stack(draw(frames, "test", index)).astype(int)
        changed = np.argwhere(abs(pictures[-1] - pictures[0]).sum(-1) > 60)[:, ::-1]       # x, y of every pixel
        ends = [frames[i][0].box for i in (0, -1)]
        low, high = np.minimum(*ends)[:2] * SIDE, np.maximum(*ends)[2:] * SIDE
        assert (changed >= low - 1).all() and (changed <= high + 1).all()
        colour = np.array(COLOURS[frames[0][0].colour]) * 0.92
        near = [changed[abs(picture[changed[:, 1], changed[:, 0]] - colour).sum(-1) < 90] for picture in pictures[[0, -1]]]
        moved = near[1].mean(0) - near[0].mean(0)                    # of what changed, the middle of its colour before and after
        assert len(near[0]) > 10 and len(near[1]) > 10 and moved @ WAYS[way] > 10 and abs(moved @ WAYS[way][::-1]) < 4


def test_touching_squares_by_hand():
    def at(x, y, side):
        return Object("circle", "red", "small", x, y, side)
    assert touch(at(0, 0, 10), at(9, 9, 10)) and touch(at(0, 0, 20), at(5, 5, 2))
    assert not touch(at(0, 0, 10), at(10, 0, 10)) and not touch(at(0, 0, 10), at(3, 30, 10))
    assert not touch(at(30, 3, 10), at(0, 0, 10))


def test_questions_are_about_the_whole_clip_and_need_more_than_a_frame():
    clips, wholes, texts, truths = video.questions("presence", COUNT)
    assert 0.35 < truths.count("yes") / COUNT < 0.65 and set(truths) == {"yes", "no"}
    for index, (text, truth) in enumerate(zip(texts, truths)):
        objects = everything(passing("test", index))
        assert (truth == "yes") == any(f" {o.colour} {o.shape}?" in text for o in objects)
        assert (wholes[index] == world.draw(objects, "test", video.OWN * index)).all() and len(clips[index]) == FRAMES
    hidden = sum(truth == "yes" and not any(f" {o.colour} {o.shape}?" in text for o in passing("test", index)[FRAMES // 2])
                 for index, (text, truth) in enumerate(zip(texts, truths)))
    assert hidden > truths.count("yes") / 3                          # the one frame does not show it
    _, _, texts, truths = video.questions("count", COUNT)
    for index, (text, truth) in enumerate(zip(texts, truths)):
        objects = everything(passing("test", index))
        word = text.split()[2]                                       # "shapes", "circles", "crosses", "red"
        number = sum(word in ("shapes", o.colour, o.shape + "s", o.shape + "es") for o in objects)
        assert truth == str(number), text
    assert max(Counter(truths).values()) < 0.6 * COUNT


def test_a_way_is_asked_for_along_its_axis():
    o = Object("cross", "blue", "large", 0, 0, 20)
    assert way_question(o, "left") == way_question(o, "right") == "Is the blue cross left or right of the blue cross?"
    assert way_question(o, "above") == way_question(o, "below") == "Is the blue cross above or below the blue cross?"


@pytest.mark.parametrize("first, last, way, expected", [
    ([0.1, 0.1, 0.3, 0.3], [0.4, 0.0, 0.6, 0.2], "right", True),     # the middle from 0.2 to 0.5 across, 0.2 to 0.1 down
    ([0.1, 0.1, 0.3, 0.3], [0.4, 0.0, 0.6, 0.2], "left", False),
    ([0.1, 0.1, 0.3, 0.3], [0.4, 0.0, 0.6, 0.2], "above", True),
    ([0.1, 0.1, 0.3, 0.3], [0.4, 0.0, 0.6, 0.2], "below", False),
    ([0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 0.4, 0.4], "right", False),    # larger, but its middle stays
    (None, [0.4, 0.0, 0.6, 0.2], "right", False), ([0.1, 0.1, 0.3, 0.3], None, "right", False)])
def test_which_way_two_boxes_went(first, last, way, expected):
    assert went(first, last, way) is expected


class Eye:
    """Answers as one who sees all pictures, knows them by their bytes, and is asked in the prompt's words."""
    def __init__(self, tokens, sees=lambda pictures: pictures):
        self.tokens_per_image, self.connector, self.sees, self.calls = tokens, None, sees, []
        self.llm = type("", (), {"config": type("", (), {"max_position_embeddings": 512})()})()
        self.objects = {}
        for index in range(8):
            for frames in (passing("test", index), moving("test", index)[0], [everything(passing("test", index))], [[]]):
                self.objects |= {picture.tobytes(): objects for picture, objects in zip(draw(frames, "test", index), frames)}

    def generate(self, clips, prompts, max_new_tokens):
        self.calls += [(len(clip), self.tokens_per_image) for clip in clips]
        assert all(prompt.count("<image>") == len(clip) for clip, prompt in zip(clips, prompts))
        return [self.answer([self.objects[picture.tobytes()] for picture in self.sees(clip)], prompt.split("\n")[1])
                for clip, prompt in zip(clips, prompts)]

    def answer(self, seen, text):
        objects = list({o.name: o for frame in seen for o in frame}.values())
        if text.startswith("Where"):
            return next(o.box_text for o in seen[0] if o.name in text)
        if text.startswith("How many"):
            word = text.split()[2]
            return str(sum(word in ("shapes", o.colour, o.shape + "s", o.shape + "es") for o in objects))
        if " or " not in text:
            return "yes" if any(f" {o.colour} {o.shape}?" in text for o in objects) else "no"
        a, b = (next((o for o in frame if f" {o.colour} {o.shape} " in text), None) for frame in (seen[0], seen[-1]))
        if a is None or b is None:
            return "no"
        return ("left" if b.x < a.x else "right") if "left" in text else "above" if b.y < a.y else "below"


def test_who_sees_all_frames_is_always_right_and_who_sees_one_is_not(monkeypatch):
    whole = Eye(16)
    scores = video.evaluate(whole, 8)
    right = {key for key, value in scores.items() if value == 1}
    shown = "eight frames", "one picture", "that eight times", "with seven empty"
    assert {f"{task}, {key}" for task in ("presence", "count") for key in shown} <= right
    assert {"direction, eight frames", "direction, from two boxes"} <= right
    assert scores["direction, same answer backwards"] == 0           # turned round, it goes the other way
    assert scores["count, one frame"] < 1 and scores["count, another clip"] < 1
    assert scores["direction, another clip"] < 0.5 and not any("unpooled" in key for key in scores)
    assert scores["presence, best guess"] >= 0.5 and set(whole.calls) == {(1, 16), (8, 16)}

    first = video.evaluate(Eye(16, sees=lambda pictures: pictures[:1] * len(pictures)), 8)     # who looks at the first frame only
    assert first["count, eight frames"] < 1 and first["count, one picture"] == 1
    assert first["direction, same answer backwards"] == 1 and first["direction, eight frames"] == 0.5      # "right", "below"


def test_many_tokens_are_asked_about_whole_and_then_pooled():
    eye = Eye(64)
    scores = video.evaluate(eye, 4)
    assert Counter(eye.calls)[8, 64] == 4 * 7 and (8, 16) in eye.calls       # presence, count: three times each; direction
    assert eye.tokens_per_image == 16 and eye.llm.config.max_position_embeddings == 576
    assert {"presence, eight frames, unpooled", "count, that eight times, unpooled",
            "direction, eight frames, unpooled"} <= set(scores)


def test_a_real_model_reads_eight_pictures_and_needs_the_longer_context(tiny_model, monkeypatch):
    model, longest = tiny_model, tiny_model.llm.config.max_position_embeddings
    monkeypatch.setattr(model.llm.config, "max_position_embeddings", 130)
    with pytest.raises(InputError, match="context of 130"):
        video.ask(model, [video.questions("count", 1)[0][0]], ["How many shapes are there?"], 4)
    scores = video.evaluate(model, 2)
    assert model.llm.config.max_position_embeddings == 8 * 16 + 64 < longest
    assert all(0 <= value <= 1 for value in scores.values()) and scores == video.evaluate(model, 2)


def test_eight_pooled_frames_are_no_longer_than_what_is_trained_on_and_eight_whole_ones_are(world_tokenizer):
    """64 tokens of a picture and its dialogue: what docs/findings.md calls about 160 positions."""
    def length(text):
        return len(encode(world_tokenizer, text, "tiny")[0])
    longest = max(63 + length([("<image>\n" + first, answer), *rest]) for (first, answer), *rest in (
        world.dialogue(world.scene("train", index), world.generator("train", index, 2)) for index in range(400)))
    asked = max(length([(video.MARK + "\n" + text, None)]) for text in video.questions("count", 40)[2])
    assert 140 < longest < 180 and FRAMES * 16 - 1 + asked <= longest < FRAMES * 64 / 2


def test_the_strip_shows_eight_frames_of_two_clips_in_a_small_file(tmp_path):
    video.strip(tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.size == (FRAMES * 66, 2 * 66)
    assert (tmp_path / "strip.png").stat().st_size < 60_000
