"""The scores of the papers' benchmarks, each by the rule of its official scorer.

    Shikra's REC      boxes in pixels          accuracy at IoU 0.5
    POPE, MME         yes or no                accuracy, F1, ...; pairs
    VQAv2 and others  ten people's answers     how many of them agree with the model
    multiple choice   a letter                 MMBench: right in every rotation of the options

All are pure functions of answers and targets. Values are from 0 to 1; papers print them times 100.
Captions are in captions.py, and what another model judges is in judged.py. The code is our own, and
tests/test_scores.py compares it with recorded results of the official scorers.
"""

import random
import re
from collections import defaultdict

from common.images import iou, parse_boxes, unpad_box
from eval import mean, presence_scores

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def accuracy(match):
    """Return a scorer: the average of match(answer, target)."""

    def score(answers, targets):
        return {"accuracy": mean(map(match, answers, targets))}

    return score


def exact(read):
    """Return a scorer: the share of answers that, once both are read, are equal to their target."""
    return accuracy(lambda answer, target: read(answer) == read(target))


# --- boxes: RefCOCO, RefCOCO+, RefCOCOg ---------------------------------------------------


def box_scores(answers, targets):
    """Score texts against (box in pixels, width, height) each.

    An answer without a box, or with more than one, is wrong (Shikra's rule, arXiv 2306.15195).
    """
    overlaps = []
    for answer, (target, width, height) in zip(answers, targets, strict=True):
        boxes = [unpad_box(box, width, height) for box in parse_boxes(answer)]
        overlaps.append(iou(boxes[0], target) if len(boxes) == 1 else 0.0)
    hits = mean(overlap >= 0.5 for overlap in overlaps)
    return {"accuracy at IoU 0.5": hits, "mean IoU": mean(overlaps)}


# --- yes or no: POPE, MME -----------------------------------------------------------------

# The categories of MME's first number; the others are those of its second, cognition.
MME_PERCEPTION = (
    "existence count position color posters celebrity scene landmark artwork OCR".split()
)


def read_pope(answer):
    """Read "no" if the first sentence has the word No, no or not, else "yes" (arXiv 2305.10355)."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(answers, targets):
    """Score "yes" or "no". "yes" is the positive class, and 0 / 0 is 0."""
    scores = presence_scores(map(read_pope, answers), targets)
    del scores["unparsable"]
    return scores


def read_mme(answer):
    """Read "yes" or "no" from the first four characters, else None (MME, arXiv 2306.13394)."""
    start = answer.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


def mme_scores(answers, targets):
    """Score MME: two questions per image, of which one is to be answered yes.

    "accuracy+" is the share of images with both right. Both are averaged over the categories.
    "score" is their sum over the categories; times 100 it is in points. targets: {"answer",
    "image", "category"} each.
    """
    categories = {}
    for answer, target in zip(answers, targets, strict=True):
        images = categories.setdefault(target["category"], {})
        correct = read_mme(answer) == target["answer"]
        images.setdefault(target["image"], []).append(correct)
    single = [mean(sum(images.values(), [])) for images in categories.values()]
    pairs = [mean(map(all, images.values())) for images in categories.values()]
    return {"score": sum(single + pairs), "accuracy": mean(single), "accuracy+": mean(pairs)}


# --- ten people's answers: VQAv2, OK-VQA, VizWiz, TextVQA ---------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Number words, and the official list of words without their apostrophe, with its own slips.
WORDS = """
    none=0 zero=0 one=1 two=2 three=3 four=4 five=5 six=6 seven=7 eight=8 nine=9 ten=10
    'ow'sat='ow's'at 'ows'at='ow's'at aint=ain't arent=aren't cant=can't couldn'tve=couldn't've
    couldnt've=couldn't've couldnt=couldn't couldve=could've didnt=didn't doesnt=doesn't
    dont=don't hadn'tve=hadn't've hadnt've=hadn't've hadnt=hadn't hasnt=hasn't havent=haven't
    he'dve=he'd've hed've=he'd've hed=he'd hes=he's howd=how'd howll=how'll hows=how's
    I'dve=I'd've Id've=I'd've Im=I'm isnt=isn't it'dve=it'd've itd've=it'd've itd=it'd itll=it'll
    Ive=I've let's=let's maam=ma'am mightn'tve=mightn't've mightnt've=mightn't've mightnt=mightn't
    mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock
    oughtnt=oughtn't ow's'at='ow's'at shant=shan't she'dve=she'd've she's=she's shed've=she'd've
    shouldn'tve=shouldn't've shouldnt've=shouldn't've shouldnt=shouldn't shouldve=should've
    somebody'd=somebodyd somebody'dve=somebody'd've somebodyd've=somebody'd've
    somebodyll=somebody'll somebodys=somebody's someone'dve=someone'd've someoned've=someone'd've
    someoned=someone'd someonell=someone'll someones=someone's something'dve=something'd've
    somethingd've=something'd've somethingd=something'd somethingll=something'll thats=that's
    there'dve=there'd've thered've=there'd've thered=there'd therere=there're theres=there's
    they'dve=they'd've theyd've=they'd've theyd=they'd theyll=they'll theyre=they're
    theyve=they've twas='twas wasnt=wasn't we'dve=we'd've wed've=we'd've werent=weren't weve=we've
    whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd
    wheres=where's whereve=where've who'dve=who'd've whod've=who'd've whod=who'd wholl=who'll
    whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldn'tve=wouldn't've
    wouldnt've=wouldn't've wouldnt=wouldn't wouldve=would've y'all'dve=y'all'd've
    y'alld've=y'all'd've y'allll=y'all'll yall'd've=y'all'd've yall'll=y'all'll yall=y'all
    you'dve=you'd've youd've=you'd've youd=you'd youll=you'll youre=you're youve=you've
"""
WORDS = dict(pair.split("=") for pair in WORDS.split())


def one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_normalize(text):
    """Normalize an answer as VQAv2's scorer does (visualqa.org/evaluation.html).

    Lower case, no punctuation, no articles, number words as digits, contractions with apostrophe.
    """
    text = one_line(text)
    thousands = re.search(r"\d,\d", text)
    stripped = text
    for sign in PUNCTUATION:
        # A sign between letters separates words, any other vanishes.
        vanishes = thousands or sign + " " in text or " " + sign in text
        stripped = stripped.replace(sign, "" if vanishes else " ")
    # The official scorer passes a flag, re.UNICODE = 32, as the count.
    stripped = re.sub(r"\.(?!\d)", "", stripped, count=32)
    words = [word for word in stripped.lower().split() if word not in ("a", "an", "the")]
    return " ".join(WORDS.get(word, word) for word in words)


def evalai_normalize(text):
    """Normalize as EvalAI's server for TextVQA does, and LLaVA for every answer it submits."""
    return vqa_normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def agreement(answer, people):
    """Average min(1, agreeing people / 3) over leaving out one person (arXiv 1505.00468)."""
    agreeing = people.count(answer)
    return mean(min(1.0, (agreeing - (person == answer)) / 3) for person in people)


def vqa_accuracy(answer, people):
    """Score one answer of VQAv2 or OK-VQA. Where all people agree, nothing is normalized."""
    answer, people = one_line(answer), [one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, people = vqa_normalize(answer), [vqa_normalize(person) for person in people]
    return agreement(answer, people)


def submitted_vqa_accuracy(answer, people):
    """Score the answer as LLaVA submits it to VQAv2's server."""
    return vqa_accuracy(evalai_normalize(answer), people)


def vizwiz_accuracy(answer, people):
    """Score one answer of VizWiz as it is submitted. People's answers are not normalized."""
    return agreement(vqa_normalize(evalai_normalize(answer)), people)


def textvqa_accuracy(answer, people):
    """Score one answer of TextVQA. All answers are normalized as EvalAI does."""
    return agreement(evalai_normalize(answer), [evalai_normalize(person) for person in people])


# --- one right answer: GQA, ScienceQA, MMBench, MMMU -------------------------------------


def gqa_normalize(answer):
    """Normalize as LLaVA does before GQA's exact match."""
    return answer.rstrip(".").lower()


def scienceqa_letter(answer):
    """Read "B", "B. ..." or a single "The answer is B." by LLaVA's rule, else None."""
    found = re.findall(r"^([A-E])(?:\. |\Z)", answer)
    found = found or re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 and found[0] in "ABCDE" else None


def mmbench_letter(answer, options):
    """Read an answer by VLMEvalKit's exact matching, without a judge: a letter or None.

    It is the one option letter that appears as a word, else the one option whose text appears.
    options: the texts of A, B, ...
    """
    letters = LETTERS[: len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1:
        return found[0]
    if not found and "Z" in words:
        return None
    texts = zip(letters, options, strict=True)
    named = [letter for letter, text in texts if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def mmmu_letter(answer, options):
    """Read an answer by MMMU's rule (arXiv 2311.16502): a letter or None.

    It looks for "(A)", then for the word A, then, in answers of more than five words, for an
    option's text. Of several, the last one counts.
    """
    letters = LETTERS[: len(options)]
    for sign in ",.!?;:'":
        answer = answer.strip(sign)
    answer = f" {answer} "
    searches = [
        (answer, [f"({letter})" for letter in letters]),
        (answer, [f" {letter} " for letter in letters]),
    ]
    if len(answer.split()) > 5:
        searches.append((answer.lower(), [text.lower() for text in options]))
    for text, parts in searches:
        positions = [text.rfind(part) for part in parts]
        last = max(positions)
        if last >= 0:
            return letters[positions.index(last)]
    return None


def mmmu_parse(answers, questions):
    """Read the letters of multiple choice. Where there is none, guess as the official scorer."""
    guess, parsed = random.Random(42), []
    for answer, question in zip(answers, questions, strict=True):
        options = question["options"]
        if options:
            answer = mmmu_letter(answer, options) or guess.choice(LETTERS[: len(options)])
        parsed.append(answer)
    return parsed


def mmmu_scores(answers, targets):
    return exact(str)(mmmu_parse(answers, targets), [target["letter"] for target in targets])


def mmbench_scores(answers, targets):
    """Score MMBench (arXiv 2307.06281): circular accuracy needs all rotations of a question right.

    targets: {"letter", "options", "index"} each; questions are equal modulo a million. The first of
    a question's rotations counts for the plain accuracy.
    """
    rotations = {}
    for answer, target in zip(answers, targets, strict=True):
        correct = mmbench_letter(answer, target["options"]) == target["letter"]
        rotations.setdefault(target["index"] % 1_000_000, []).append(correct)
    circular = mean(map(all, rotations.values()))
    return {"circular accuracy": circular, "accuracy": mean(r[0] for r in rotations.values())}


# --- a whole benchmark --------------------------------------------------------------------


def score(scorer, items, answers):
    """Score {id: answer} -> {group: {"samples", "scores": {metric: value}}}.

    Items without an answer are left out. The first metric of a group is the main one.
    """
    groups, results = defaultdict(list), {}
    for item in items:
        if item.id in answers:
            for group in item.groups:
                groups[group].append((answers[item.id], item.target))
    for group, pairs in groups.items():
        scores = scorer(*zip(*pairs, strict=True))
        results[group] = {"samples": len(pairs), "scores": scores}
    return results
