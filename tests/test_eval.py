"""Scores against values worked out by hand, awkward answers included; and what the blind score measures."""
import json
import math
import os

import pytest

import eval as benchmark                                             # not over the built-in function of that name
import world
from eval import (evaluate, exact_match, exchange, iou, named_objects, object_f1, presence_scores, questions, rec_scores, table,
                  yes_or_no)
from hub import InputError, newest_model


def test_iou_of_boxes_that_overlap_touch_contain_or_are_apart():
    assert iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)   # 1 of 4 + 4 - 1
    assert iou([0, 0, 2, 2], [0, 0, 2, 2]) == 1
    assert iou([0, 0, 4, 2], [0, 0, 1, 2]) == pytest.approx(1 / 4)
    assert iou([0, 0, 1, 1], [1, 0, 2, 1]) == 0
    assert iou([0, 0, 1, 1], [5, 5, 6, 6]) == 0


@pytest.mark.parametrize("flag", ("--data=boxes.jsonl", "--limit=3", "--out=scores", "--prompt=<question>", "--pool=1", "--limit=0", "--split=val"))
def test_options_of_a_benchmark_without_its_name_are_refused(flag):
    with pytest.raises(InputError, match=f"^{flag.split('=')[0]} belongs to a public benchmark: say which with --task="):
        benchmark.main([flag])


def test_iou_of_reversed_empty_and_infinite_boxes_is_zero():
    assert iou([2, 2, 0, 0], [0, 0, 2, 2]) == 0
    assert iou([2, 0, 0, 2], [0, 0, 2, 2]) == 0
    assert iou([1, 1, 1, 1], [1, 1, 1, 1]) == 0
    assert iou([0, 0, math.inf, 1], [0, 0, 1, 1]) == 0


@pytest.mark.parametrize("answer, read", [("yes", "yes"), ("Yes.", "yes"), (" NO, there is not", "no"), ('"no"', "no"), ("", None),
                                          ("...", None), ("yesterday", None), ("there is: yes", None), ("1", None)])
def test_yes_or_no_is_the_first_word_and_nothing_else(answer, read):
    assert yes_or_no(answer) == read


def test_presence_scores_are_popes():
    answers = ["Yes.", "yes", "yes", "no", "No, none", "maybe", ""]
    truths = ["yes", "yes", "no", "yes", "no", "yes", "no"]          # 2 hits, 1 false alarm, 1 miss, 1 right no, 2 unread
    assert presence_scores(answers, truths) == pytest.approx({
        "accuracy": 3 / 7, "precision": 2 / 3, "recall": 2 / 4, "F1": 4 / 7, "yes-ratio": 3 / 7, "unparsable": 2 / 7})


def test_presence_scores_without_any_yes_are_zero_not_an_error():
    assert presence_scores(["no", "no"], ["no", "no"]) == {
        "accuracy": 1, "precision": 0, "recall": 0, "F1": 0, "yes-ratio": 0, "unparsable": 0}


def test_exact_match_overlooks_case_and_final_punctuation_only():
    assert exact_match(["Small blue cross.", "small  blue cross", "blue small cross", ""], ["small blue cross"] * 4) == 0.5


def test_rec_takes_the_first_box_and_counts_what_it_cannot_read_as_wrong():
    truth = "[0.00,0.00,0.50,0.50]"
    answers = [truth,                                                # IoU 1
               "It is at [0.00, 0.00, 0.50, 0.25].",                 # 0.5: right, since RefCOCO asks for 0.5 or more
               "[0.00,0.00,0.50,0.20][0.00,0.00,0.50,0.50]",         # 0.4 by its first box
               "[0.50,0.50,0.00,0.00]",                              # reversed: a box, but it covers nothing
               "[0.00,0.00,0.50]", "[,,,]", "", "left"]              # no box
    assert rec_scores(answers, [truth] * 8) == pytest.approx({
        "accuracy at IoU 0.5": 2 / 8, "mean IoU": 1.9 / 8, "unparsable": 4 / 8})


def test_object_f1_counts_objects_and_overlooks_their_order():
    truth = "a large red circle, a small blue cross and a small white square."
    assert sorted(named_objects(truth)) == ["large red circle", "small blue cross", "small white square"]
    assert object_f1("a small white square, a large red circle and a small blue cross.", truth) == 1
    assert object_f1("a large red circle.", truth) == pytest.approx(2 * 1 / (1 + 3))
    assert object_f1("a large red circle and a large red circle.", truth) == pytest.approx(2 * 1 / (2 + 3))
    assert object_f1("", truth) == object_f1("., and", truth) == object_f1("a small red circle", truth) == 0


def test_world_captions_name_their_objects():
    for index in range(50):
        objects = world.scene("test", index)
        assert named_objects(world.caption(objects)) == {o.name: 1 for o in objects}


@pytest.mark.parametrize("count", [2, 3, 50])
def test_exchange_leaves_no_picture_in_its_place(count):
    order = exchange(count, seed=1)
    assert sorted(order) == list(range(count)) and all(i != place for i, place in enumerate(order))
    assert order == exchange(count, seed=1)


def test_every_task_gets_as_many_questions_as_asked_for():
    for task in world.TASKS:                                         # some scenes give no attribute or relation question
        pictures, texts, truths = questions(task, 40)
        assert len(pictures) == len(texts) == len(truths) == 40 and all(truths)


class Stub:
    """In place of a model: what it answers is a function of the picture and the question."""
    training = True

    def __init__(self, reply):
        self.reply, self.sizes = reply, []

    def generate(self, pictures, prompts, max_new_tokens):
        self.sizes.append(len(prompts))
        assert all(prompt.startswith("<image>\n") for prompt in prompts)
        return [self.reply(picture.tobytes(), prompt.removeprefix("<image>\n")) for picture, prompt in zip(pictures, prompts)]

    def eval(self):
        self.train(False)

    def train(self, mode):
        self.training = mode


def all_questions(count):
    return [row for task in world.TASKS for row in zip(*questions(task, count))]


def test_a_model_that_sees_scores_full_marks_and_nearly_nothing_blind():
    known = {(picture.tobytes(), text): truth for picture, text, truth in all_questions(30)}
    model = Stub(lambda picture, text: known.get((picture, text), ""))
    results = evaluate(model, count=30, batch=7)
    assert model.sizes == [7, 7, 7, 7, 2] * 2 * len(world.TASKS)
    assert model.training                                            # as it was before
    for task, result in results.items():
        (metric, seeing), *_ = result["scores"].items()
        assert result["samples"] == 30 and seeing == 1, task
        if task != "caption":                                        # whose question is the same for all pictures
            assert result["blind"][metric] < 0.5, task


def test_a_model_that_does_not_look_scores_the_same_blind():
    known = {text: truth for _, text, truth in all_questions(30)}
    results = evaluate(Stub(lambda picture, text: known[text]), count=30)
    assert all(result["scores"] == result["blind"] for result in results.values())


def test_without_blind_every_question_is_asked_once():
    model = Stub(lambda picture, text: "no")
    results = evaluate(model, count=10, blind=False)
    assert sum(model.sizes) == 10 * len(world.TASKS) and results["presence"]["blind"] is None
    assert "–" in table(results)


def test_a_real_model_is_scored_the_same_twice_and_prints_json_last(tiny_model, model_folder, capsys):
    benchmark.main(["--count=4", "--batch=3", "--json", "--device=cpu"])
    printed = capsys.readouterr().out
    last = json.loads(printed.rstrip("\n").split("\n")[-1])
    assert last["model"] == "out/tiny/model"
    assert {task: last[task] for task in world.TASKS} == evaluate(tiny_model, count=4, batch=2)     # batches change nothing
    for task in world.TASKS:
        assert f"\n{task} " in printed


def test_newest_model_is_the_one_written_last_and_no_unfinished_one(tiny_model, model_folder):
    tiny_model.save("out/second")
    os.utime("out/second/config.json", (1, 1))                       # an old one
    os.makedirs("out/tiny/model.partial")
    (model_folder.parent / "model.partial" / "config.json").write_text('{"model_type": "mllm"}')
    os.makedirs("out/other")
    (model_folder.parent.parent / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert newest_model().resolve() == model_folder


def test_no_model_is_one_line_that_names_train_py(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="train.py"):
        benchmark.main([])


@pytest.mark.parametrize("flag", ["--count=1", "--batch=0", "--seed=-1"])
def test_impossible_numbers_are_input_errors(flag, model_folder):
    with pytest.raises(InputError, match=flag[2:].partition("=")[0]):
        benchmark.main([flag])


def test_world_skips_scenes_without_a_question_of_its_task():
    from data import NothingToLearn
    none = next(i for i in range(1000) if world.any_question("relation", world.scene("test", i), world.generator("test", i, 2)) is None)
    with pytest.raises(NothingToLearn, match=f"scene {none} gives no relation question"):
        world.World("test", 1000, "relation")[none]
