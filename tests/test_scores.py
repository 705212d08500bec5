"""Scores against what the official scorers said of the same answers (make_score_fixtures.py), and against hand-computed
values."""
import json
import random
from pathlib import Path

import pytest

from captions import bleu, caption_scores, cider, common_subsequence, rouge_l, words
from make_score_fixtures import caption, caption_sets
from scores import (agreement, box_scores, circular_accuracy, evalai_normalise, gqa_match, mme_reads, mme_scores, only_box,
                    option_letter, pope_reads, pope_scores, scienceqa_letter, textvqa_accuracy, video_match, vizwiz_accuracy,
                    vqa_accuracy, vqa_normalise)

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "scores.json").read_text(encoding="utf-8"))


# --- captions -----------------------------------------------------------------------------------------------------------

def test_words_are_those_of_the_official_tokenizer():
    """Plain captions and awkward ones: quotes, brackets, abbreviations, contractions, numbers, currencies, HTML, nothing at
    all."""
    differing = [(sentence, " ".join(words(sentence)), official) for sentence, official in OFFICIAL["tokens"]
                 if " ".join(words(sentence)) != " ".join(official.split())]
    assert not differing


@pytest.mark.parametrize("name", OFFICIAL["captions"])
def test_caption_scores_are_the_official_ones(name):
    expected = OFFICIAL["captions"][name]
    assert caption_scores(expected["pairs"]) == pytest.approx(expected["scores"], abs=1e-6)
    each = cider([words(answer) for answer, _ in expected["pairs"]], [list(map(words, texts)) for _, texts in expected["pairs"]])
    assert each == pytest.approx(expected["CIDEr each"], abs=1e-6)


def test_caption_scores_by_hand():
    answer, references = "a b c d".split(), ["a b c e".split(), "a b".split()]
    assert bleu([answer], [references])[:2] == pytest.approx([3 / 4, (3 / 4 * 2 / 3) ** 0.5])
    assert bleu(["a b".split()], [["a b c d".split()]])[0] == pytest.approx(2.718281828 ** (1 - 4 / 2))     # 2 of 4 words
    assert common_subsequence("axbyc", "abc") == 3 and common_subsequence("", "abc") == 0
    precision, recall = 3 / 4, 2 / 2                                 # the best of either, of different references
    assert rouge_l(answer, references) == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))
    same = [["a dog".split()], ["the cat".split()]]                  # no 3-grams: half of the four parts are 0
    assert cider([["a", "dog"], ["the", "cat"]], same) == pytest.approx([5, 5])
    assert cider([["the", "cat"], []], same) == [0, 0]


def test_caption_scores_live_against_pycocoevalcap():
    pytest.importorskip("pycocoevalcap", reason="pip install pycocoevalcap compares with the official scorer live")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    for seed in range(3):
        for pairs in caption_sets(random.Random(100 + seed)).values():
            answers = {i: [" ".join(words(answer))] for i, (answer, _) in enumerate(pairs)}
            references = {i: [" ".join(words(text)) for text in texts] for i, (_, texts) in enumerate(pairs)}
            ours = caption_scores(pairs)
            assert ours["CIDEr"] == pytest.approx(Cider().compute_score(references, answers)[0], abs=1e-6)
            assert ours["ROUGE-L"] == pytest.approx(Rouge().compute_score(references, answers)[0], abs=1e-6)
            official = Bleu(4).compute_score(references, answers, verbose=0)[0]
            assert [ours[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx(official, abs=1e-6)


def test_words_live_against_pycocoevalcap():
    import shutil
    from make_score_fixtures import tokens
    pytest.importorskip("pycocoevalcap", reason="pip install pycocoevalcap compares with the official tokenizer live")
    if not shutil.which("java"):
        pytest.skip("no Java: the official tokenizer is a Java program")
    rng = random.Random(7)
    sentences = [caption(rng) for _ in range(200)]
    assert [" ".join(words(sentence)) for sentence in sentences] == tokens(sentences)


# --- boxes --------------------------------------------------------------------------------------------------------------

def test_boxes_are_compared_in_original_pixels():
    truth = ([0, 0, 100, 50], 100, 50)                               # the whole of a wide picture: padded by 25 above and below
    assert only_box("It is at [0.000,0.250,1.000,0.750].", 100, 50) == [0, 0, 100, 50]
    answers = ["[0.000,0.250,1.000,0.750]",                          # IoU 1
               "[0.0,0.25,0.5,0.75]",                                # 1/2: counts
               "[0,0.25,0.49,0.75]",                                 # just less
               "[0.0,0.0,1.0,0.5]",                                  # forgets the padding: 25 of 75 rows
               "[0.000,0.250,1.000,0.750][0.1,0.1,0.2,0.2]",         # two boxes
               "[1.0,0.75,0.0,0.25]", "[0,0,1]", "", "left"]         # reversed, three numbers, none
    assert box_scores(answers, [truth] * 9) == pytest.approx({
        "accuracy at IoU 0.5": 2 / 9, "mean IoU": (1 + 0.5 + 0.49 + 1 / 3) / 9, "no single box": 4 / 9})


# --- yes or no ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("expected", OFFICIAL["pope"], ids=["each", "random"])
def test_pope_is_the_official_score(expected):
    assert pope_scores(expected["answers"], expected["truths"]) == pytest.approx(expected["scores"], abs=1e-12)


@pytest.mark.parametrize("answer, read", [("", "yes"), ("maybe", "yes"), ("No", "no"), ("NO", "yes"), ("no.", "no"),
                                          ("Yes, not", "no"),
                                          ("Yes. There is no dog", "yes"), ("nothing", "yes"), (", no", "no"), ("\nno", "yes")])
def test_pope_reads_the_first_sentence(answer, read):
    assert pope_reads(answer) == read


def test_pope_without_any_yes_is_zero_not_an_error():
    assert pope_scores(["no"], ["no"]) == {"accuracy": 1, "precision": 0, "recall": 0, "F1": 0, "yes-ratio": 0}


@pytest.mark.parametrize("answer, read", [("Yes", "yes"), ("no.", "no"), ("Not", "no"), ("a no", "no"), ("", None),
                                          ("well, yes", None),
                                          ("yes no", "yes"), (" yes", "yes"), ("NO", "no"), ("  no", "no"), ("   no", None)])
def test_mme_reads_four_characters(answer, read):
    assert mme_reads(answer) == read


def test_mme_counts_questions_and_pairs():
    scores = mme_scores(["Yes", "No", "Yes", "Yes", "hm", "no"], ["yes", "no"] * 3, [1, 1, 2, 2, 3, 3])
    assert scores == pytest.approx({"score": 4 / 6 + 1 / 3, "accuracy": 4 / 6, "accuracy+": 1 / 3, "unparsable": 1 / 6})


# --- ten people's answers ---------------------------------------------------------------------------------------------------

def test_vqa_accuracy_is_the_official_one():
    for answer, people, accuracy in OFFICIAL["vqa"]:
        assert vqa_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-7), (answer, people)


def test_textvqa_accuracy_is_the_official_one():
    for answer, people, accuracy in OFFICIAL["textvqa"]:
        assert textvqa_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-7), (answer, people)


@pytest.mark.parametrize("kind, normalise", [("vqa", vqa_normalise), ("textvqa", evalai_normalise)])
def test_answers_are_normalised_as_officially(kind, normalise):
    assert [[text, normalise(text)] for text, _ in OFFICIAL[f"{kind} normalised"]] == OFFICIAL[f"{kind} normalised"]


def test_dots_are_taken_out_as_often_as_officially():
    """The official scorer hands re.UNICODE (32) to re.sub as its count."""
    assert vqa_normalise("x" + "." * 40) == "x" + "." * 8


def test_agreement_by_hand():
    people = ["two"] * 3 + ["2"] + ["three"] * 6
    assert agreement("x", people) == 0
    assert vqa_accuracy("2", people) == 1                            # four say 2: three of the others at least
    assert agreement("two", people) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert agreement("2", people) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)
    assert vqa_accuracy("Two", ["two"] * 10) == 0                    # all agree: the official scorer compares as it stands
    assert textvqa_accuracy("Two", ["two"] * 10) == 1
    assert vizwiz_accuracy("Unanswerable.", ["unanswerable"] * 10) == 1
    assert vizwiz_accuracy("2", ["two"] * 10) == 0                   # people's answers are not normalised there


# --- one right answer, and choices ----------------------------------------------------------------------------------------------

def test_exact_matches():
    assert gqa_match("Yes.", "yes") and gqa_match("left", "left")
    assert not gqa_match("the left", "left") and not gqa_match("", "left")
    assert video_match("A dog.", "dog") and video_match("two", "2") and not video_match("dogs", "dog")


@pytest.mark.parametrize("answer, letter", [("B", "B"), ("B. red", "B"), ("The answer is B.", "B"), ("b", None), ("B)", None),
                                            ("The answer is B. The answer is C.", None), ("F", None), ("The answer is Z.", None),
                                            ("", None), ("AB", None),
                                            ("So: The answer is C, since", "C"), ("B.", None), ("The answer is B", None)])
def test_scienceqa_letters_are_read_as_llava_reads_them(answer, letter):
    assert scienceqa_letter(answer) == letter


@pytest.mark.parametrize("answer, letter", [("B", "B"), ("B.", "B"), ("(B)", "B"), ("The answer is (B)", "B"), ("b", None),
                                            ("", None), ("A", "A"), ("A red bus", "A"), ("A very large red bus", "B"),
                                            ("a blue car", "C"), ("E", None), ("A or B", None), ("A or B, red", "B"),
                                            ("red or blue", None), ("Z", None), ("Z red", None)])
def test_option_letters_are_read_as_vlmevalkit_reads_them(answer, letter):
    assert option_letter(answer, ["green", "red", "blue", "black"]) == letter


def test_circular_accuracy_wants_every_rotation_right():
    assert circular_accuracy([True, True, True, False, True], [1, 1, 2, 2, 3]) == pytest.approx(2 / 3)
