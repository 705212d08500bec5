"""The benchmarks' scorers against recorded results of the official ones, and computed by hand.

make_score_fixtures.py recorded fixtures/scores.json.
"""

import json

import pytest
from conftest import ROOT

from benchmarks import scores
from benchmarks.captions import caption_scores, cider, words
from benchmarks.prompts import Item
from benchmarks.readers import BENCHMARKS

OFFICIAL = json.loads((ROOT / "tests/fixtures/scores.json").read_text(encoding="utf-8"))


def test_words_and_cider_are_those_of_the_official_scorer():
    for sentence, official in OFFICIAL["tokens"]:
        assert words(sentence) == official.split()
    for expected in OFFICIAL["captions"].values():
        answers, references = zip(*expected["pairs"], strict=True)
        score = caption_scores(answers, references)["CIDEr"]
        assert score == pytest.approx(expected["scores"]["CIDEr"], abs=1e-6)
        references = [[words(text) for text in texts] for texts in references]
        each = cider([words(answer) for answer in answers], references)
        assert each == pytest.approx(expected["CIDEr each"], abs=1e-6)


def test_answers_of_ten_people_agree_as_officially():
    for answer, people, accuracy in OFFICIAL["vqa"]:
        assert scores.vqa_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-7), answer
    for answer, people, accuracy in OFFICIAL["textvqa"]:
        assert scores.textvqa_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-7), answer
    for text, normalized in OFFICIAL["vqa normalized"]:
        assert scores.vqa_normalize(text) == normalized
    for text, normalized in OFFICIAL["textvqa normalized"]:
        assert scores.evalai_normalize(text) == normalized
    # The official scorer passes re.UNICODE (32) as the count.
    assert scores.vqa_normalize("x" + "." * 40) == "x" + "." * 8
    # Where all agree, it does not normalize.
    assert scores.vqa_accuracy("Two", ["two"] * 10) == 0
    assert scores.vizwiz_accuracy("Unanswerable.", ["unanswerable"] * 10) == 1
    assert scores.vizwiz_accuracy("2", ["two"] * 10) == 0
    for task, answer, target in (("gqa", "Yes.", "yes"), ("video", "A dog.", "Dog")):
        assert BENCHMARKS[task].score([answer, "cat"], [target] * 2) == {"accuracy": 0.5}


def test_pope_is_the_official_score():
    for expected in OFFICIAL["pope"]:
        found = scores.pope_scores(expected["answers"], expected["targets"])
        assert found == pytest.approx(expected["scores"], abs=1e-12)
    assert set(scores.pope_scores(["no"], ["no"]).values()) == {0, 1}


def test_boxes_are_compared_in_original_pixels():
    # The whole of a wide image, which is padded by 25 pixels above and below.
    answers = {
        "It is at [0.000,0.250,1.000,0.750].": 1,
        "[0.0,0.25,0.5,0.75]": 0.5,
        "[0,0.25,0.49,0.75]": 0.49,
        # forgets the padding
        "[0.0,0.0,1.0,0.5]": 1 / 3,
        "[0.000,0.250,1.000,0.750][0.1,0.1,0.2,0.2]": None,
        "[1.0,0.75,0.0,0.25]": 0,
        "left": None,
    }
    found = scores.box_scores(list(answers), [([0, 0, 100, 50], 100, 50)] * len(answers))
    overlaps = [overlap or 0 for overlap in answers.values()]
    assert found["mean IoU"] == pytest.approx(sum(overlaps) / 7)
    assert found["accuracy at IoU 0.5"] == 2 / 7


def test_mme_counts_questions_and_pairs():
    answers = {"Yes": "yes", "no.": "no", "Not": "no", "": None, "well, yes": None, "   no": None}
    assert {answer: scores.read_mme(answer) for answer in answers} == answers
    targets = [{"answer": answer, "image": i} for i in range(3) for answer in ("yes", "no")]
    answers = ["Yes", "No", "Yes", "Yes", "hm", "no"]
    found = scores.mme_scores(answers, [target | {"category": "OCR"} for target in targets])
    assert found == pytest.approx({"score": 1, "accuracy": 4 / 6, "accuracy+": 1 / 3})
    # The points of several categories are summed: 2, and 0.5 + 0.
    targets = [target | {"category": str(target["image"] > 0)} for target in targets]
    found = scores.mme_scores(answers, targets)
    assert found == pytest.approx({"score": 2.5, "accuracy": 3 / 4, "accuracy+": 1 / 2})


def test_mmbench_needs_every_rotation_right():
    target = {"letter": "A", "options": ["red", "blue"]}
    targets = [target | {"index": index} for index in (0, 1_000_000, 1, 1_000_001)]
    found = scores.mmbench_scores(["A", "A", "The answer is A.", "B"], targets)
    assert found == {"circular accuracy": 0.5, "accuracy": 1}


SCIENCEQA = "B > B; B. red > B; The answer is B. > B; So: The answer is C, since > C; B) > None"
SCIENCEQA += "; The answer is B. The answer is C. > None; F > None"
MMBENCH = "B > B; (B) > B; The answer is A. > A; The answer is (B) > B; a blue car > C"
MMBENCH += "; A or B, red > B; b > None; E > None; A or B > None; red or blue > None; Z red > None"
MMMU = "A > A; The answer is A. > A; First A, but rather (B). > B; A is wrong, so B > B"
MMMU += "; I think that it must be the blue one > C; the blue one > None; b > None"


def test_letters_are_read_by_the_rule_of_the_official_scorer():
    for cases, read, options in (
        (SCIENCEQA, scores.scienceqa_letter, []),
        (MMBENCH, scores.mmbench_letter, [["green", "red", "blue", "x1"]]),
        (MMMU, scores.mmmu_letter, [["green", "red", "blue", "x1"]]),
    ):
        assert read("", *options) is None
        for case in cases.split("; "):
            answer, letter = case.split(" > ")
            assert str(read(answer, *options)) == letter, case
    # where it reads none it guesses, always the same
    options = [{"options": list("wxyz")}] * 4
    assert scores.mmmu_parse(["?", "?", "(B)", "?"], options) == list("AABC")


def test_groups_are_scored_apart_and_items_without_an_answer_left_out():
    targets = {"a": "x", "b": "x", "c": None}
    items = [Item(name, [], "", targets[name], groups=["all"]) for name in targets]
    items[0].groups.append("odd")
    found = scores.score(BENCHMARKS["gqa"].score, items, {"a": "x", "b": "y"})
    assert found["all"] == {"samples": 2, "scores": {"accuracy": 0.5}}
    assert found["odd"] == {"samples": 1, "scores": {"accuracy": 1}}
