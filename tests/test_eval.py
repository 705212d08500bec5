"""eval.py: scores against values worked out by hand, and what the blind score measures."""

import json

import pytest
from conftest import refused

import eval as evaluation
from eval import evaluate, exchange, score
from toy import world
from toy.scenes import object_f1, task_questions


def test_scores_are_those_worked_out_by_hand():
    answers = ["Yes.", "yes", "yes", "no", '"No", none', "yesterday", ""]
    # 2 hits, 1 false alarm, 1 miss, 1 correct no, 2 that cannot be read
    targets = ["yes", "yes", "no", "yes", "no", "yes", "no"]
    expected = [3 / 7, 2 / 3, 2 / 4, 4 / 7, 3 / 7, 2 / 7]
    assert [*score("presence", answers, targets).values()] == pytest.approx(expected)
    assert [*score("presence", ["no"], ["no"]).values()] == [1, 0, 0, 0, 0, 0]
    target = "[0.00,0.00,0.50,0.50]"
    # IoU 1, 0.5, 0.4, 0, and two without a box
    answers = [target, "It is at [0.00, 0.00, 0.50, 0.25].", "[0.00,0.00,0.50,0.20]" + target]
    answers += ["[0.50,0.50,0.00,0.00]", "[0.00,0.00,0.50]", "left"]
    scores = score("rec", answers, [target] * 6)
    assert [*scores.values()] == pytest.approx([2 / 6, 1.9 / 6, 2 / 6])
    answers = ["Small blue cross.", "small  blue cross", "blue small cross", ""]
    assert score("reg", answers, ["small blue cross"] * 4) == {"exact match": 0.5}
    target = "a large red circle, a small blue cross and a small white square."
    other_order = "a small white square, a large red circle and a small blue cross."
    assert object_f1("a large red circle and a large red circle.", target) == 2 / 5
    assert object_f1("a small red circle", target) == object_f1("., and", target) == 0
    assert score("caption", [other_order], [target]) == {"exact match": 0, "object F1": 1}


class Stub:
    """In place of a model: its answer is a function of the image and the question."""

    def __init__(self, reply):
        self.reply = reply

    def generate(self, images, prompts, max_new_tokens):
        return [self.reply(*pair) for pair in zip(images, prompts, strict=True)]


def test_only_a_model_that_looks_loses_its_score_blind():
    turns = [turn for task in world.TASKS for turn in zip(*task_questions(task, 30), strict=True)]
    by_image = {(image.tobytes(), text): target for image, text, target in turns}
    by_text = {text: target for _, text, target in turns}
    for count in (2, 3, 50):
        places = exchange(count)
        assert sorted(places) == list(range(count))
        assert all(i != place for i, place in enumerate(places))
    sees = Stub(lambda image, text: by_image.get((image.tobytes(), text), ""))
    for task, result in evaluate(sees, count=30, batch=7).items():
        (metric, value), *_ = result["scores"].items()
        assert result["samples"] == 30 and value == 1
        # all captions have the same question
        assert task == "caption" or result["blind"][metric] < 0.5
    results = evaluate(Stub(lambda image, text: by_text[text]), count=30)
    assert all(result["scores"] == result["blind"] for result in results.values())


def test_a_real_model_is_scored_the_same_twice_and_prints_json_last(
    tiny_model, model_folder, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 6)
    evaluation.main(["--count=4", "--batch=3", "--json", "--device=cpu"])
    printed = capsys.readouterr().out
    last = json.loads(printed.rstrip("\n").split("\n")[-1])
    assert last["model"] == "out/tiny/model"
    # the size of a batch changes nothing
    images, texts, _ = task_questions("count", 4)
    answers = [evaluation.answer(tiny_model, images, texts, batch) for batch in (2, 3)]
    assert answers[0] == answers[1]
    assert {task: last[task] for task in world.TASKS} == evaluate(tiny_model, count=4, batch=2)
    for flag in ("--count=1", "--batch=0", "--seed=-1"):
        with refused(flag[2:].partition("=")[0]):
            evaluation.main([flag])
