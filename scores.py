"""The scores of the papers' benchmarks: pure functions of answers and truths, each by the rule of its official scorer.

    Shikra's REC      boxes in pixels          accuracy at IoU 0.5
    POPE, MME         yes or no                accuracy, F1, ...; pairs
    VQAv2 and kin     ten people's answers     how many of them agree with the model's
    multiple choice   a letter                 MMBench: right in every rotation of the options

    score(task, items, {id: answer})  ->  {group: {"samples", "scores": {metric: value}}}

Values run from 0 to 1 (papers print them times 100). Captions' scores are in captions.py. No line of the scorers is taken over;
tests/test_scores.py holds what they give on random and on awkward answers.
"""
import re
from collections import Counter

from captions import caption_scores
from images import parse_boxes, unpad_box


def share(values):
    """The mean; of nothing, 0."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# --- boxes: RefCOCO, RefCOCO+, RefCOCOg -------------------------------------------------------------------------------

def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2). A reversed box covers nothing: 0."""
    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both) if both > 0 else 0.0


def only_box(text, width, height):
    """The box that an answer holds, by the side of the padded square -> pixels of the picture. None if it holds no box, or
    several (Shikra's rule: which of them would be meant?)."""
    boxes = parse_boxes(text)
    return unpad_box(boxes[0], width, height) if len(boxes) == 1 else None


def box_scores(answers, truths):
    """answers: texts; truths: (box in pixels, width, height) each. No box, or several, is wrong."""
    boxes = [only_box(answer, width, height) for answer, (_, width, height) in zip(answers, truths)]
    overlaps = [iou(box, truth[0]) if box else 0.0 for box, truth in zip(boxes, truths)]
    return {"accuracy at IoU 0.5": share(overlap >= 0.5 for overlap in overlaps), "mean IoU": share(overlaps),
            "no single box": share(box is None for box in boxes)}


# --- yes or no: POPE, MME ---------------------------------------------------------------------------------------------

def pope_reads(answer):
    """POPE's rule (arXiv 2305.10355): "no" if the first sentence has the word No, no or not, else "yes"; an empty answer,
    too."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_scores(answers, truths):
    """truths: "yes" or "no" each; "yes" is the positive class. Where the official scorer divides by 0, a 0."""
    said = [pope_reads(answer) for answer in answers]
    hits = sum(answer == truth == "yes" for answer, truth in zip(said, truths))
    yes, there = said.count("yes"), list(truths).count("yes")
    return {"accuracy": share(answer == truth for answer, truth in zip(said, truths)), "precision": hits / yes if yes else 0.0,
            "recall": hits / there if there else 0.0, "F1": 2 * hits / (yes + there) if hits else 0.0,
            "yes-ratio": yes / len(said)}


def mme_reads(answer):
    """MME's rule (arXiv 2306.13394): "yes" or "no" if the first four characters have it; else None."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_scores(answers, truths, pictures):
    """One category: two questions a picture, one to be answered yes and one no. "accuracy+": pictures with both right. "score":
    the sum of the two, times 100 the points (at most 200) that are added up over categories."""
    right = [mme_reads(answer) == truth for answer, truth in zip(answers, truths)]
    both = {picture: True for picture in pictures}
    for picture, correct in zip(pictures, right):
        both[picture] &= correct
    accuracy, plus = share(right), share(both.values())
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy+": plus,
            "unparsable": share(mme_reads(answer) is None for answer in answers)}


# --- ten people's answers: VQAv2, OK-VQA, VizWiz, TextVQA ----------------------------------------------------------------

NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that people write without their apostrophe. Where "n't", "'ve" or "'d" follow each other, either may have been left out.
NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would".split()
WHOLE = """couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
           something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've""".split()
ENDINGS = """could've might've must've should've would've they've we've what've where've who've you've I've not've
             he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd how'll it'll somebody'll
             someone'll something'll they'll what'll who'll why'll you'll there're they're what're why're you're he's how's
             somebody's someone's that's there's what's when's where's who's why's I'm ma'am o'clock 'twas y'all""".split()


def make_contractions():
    """{as people write it: as it is scored}. The official list is not a rule but a list, and has gaps and slips of its own,
    which count, too ("somebody'd" loses its apostrophe; "she'd" and "mightnt've" are as they are)."""
    found = {word.replace("'", ""): word for word in [verb + "n't" for verb in NOT] + ENDINGS}
    for word in WHOLE:
        head, tail = word.rsplit("'", 1)
        found |= {head.replace("'", "") + "'" + tail: word, head + tail: word}
    found |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd", "yall'll": "y'all'll", "y'allll": "y'all'll"}
    found |= {spelt: "y'all'd've" for spelt in ("yall'd've", "y'alld've", "y'all'dve")}
    return found | {spelt: "'ow's'at" for spelt in ("ow's'at", "'ows'at", "'ow'sat")}


CONTRACTIONS = make_contractions()


def vqa_normalise(text):
    """An answer as VQA compares it: without punctuation and articles, number words as digits, contractions with apostrophe,
    lower case. The order, and when a sign leaves a space behind, are the official scorer's
    (visualqa.org/evaluation.html)."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text)
    stripped = text
    for sign in PUNCTUATION:                                         # a sign between letters separates words, another vanishes
        alone = sign + " " in text or " " + sign in text or thousands
        stripped = stripped.replace(sign, "" if alone else " ")
    stripped = re.sub(r"\.(?!\d)", "", stripped, count=32)           # 32 by a slip (a flag in the place of a count): kept
    found = [NUMBERS.get(word, word) for word in stripped.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ("a", "an", "the"))


def evalai_normalise(text):
    """As EvalAI's server for TextVQA does, and as LLaVA prepares every answer that it sends to a server."""
    return vqa_normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def agreement(answer, people):
    """min(1, agreeing people / 3), averaged over leaving out one of the people at a time (arXiv 1505.00468)."""
    agreeing = people.count(answer)
    return sum(min(1.0, (agreeing - (person == answer)) / 3) for person in people) / len(people)


def vqa_accuracy(answer, people):
    """VQAv2's and OK-VQA's score of one answer. Where all ten agree, the official scorer compares texts as they are."""
    answer, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *people))
    if len(set(people)) > 1:
        answer, *people = map(vqa_normalise, (answer, *people))
    return agreement(answer, people)


def vizwiz_accuracy(answer, people):
    """VizWiz's: the answer is normalised, the people's are taken as they are."""
    return agreement(vqa_normalise(answer), list(people))


def textvqa_accuracy(answer, people):
    """TextVQA's: all of them normalised as EvalAI does."""
    return agreement(evalai_normalise(answer), [evalai_normalise(person) for person in people])


# --- one right answer: GQA, video ------------------------------------------------------------------------------------------

def gqa_match(answer, truth):
    """LLaVA's preparation (lower case, no full stops at the end), then GQA's exact match."""
    return answer.rstrip(".").lower() == truth


def video_match(answer, truth):
    """Exact match after VQA's normalisation of both."""
    return evalai_normalise(answer) == evalai_normalise(truth)


# --- multiple choice: ScienceQA, MMBench, MMMU -----------------------------------------------------------------------------

def scienceqa_letter(answer, options="ABCDE"):
    """LLaVA's rule: "B", "B. ..." or "The answer is B." (once) -> "B", else None."""
    if answer in options and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in options and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 and found[0] in options else None


def option_letter(answer, options):
    """VLMEvalKit's exact matching, without a judge: the one letter of an option that stands alone in the answer, or the one
    option whose text is in it; else None. options: texts, for A, B, C, ... An "A" in more than three words is read as an
    article."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(options)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    said = [letter for letter, text in zip(letters, options) if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 and (found or "Z" not in words) else None


def circular_accuracy(right, questions):
    """MMBench (arXiv 2307.06281): right, True or False for every answer; questions: which question it belongs to. A
    question counts if it was answered right in all rotations of its options."""
    missed = Counter(question for correct, question in zip(right, questions) if not correct)
    return share(missed[question] == 0 for question in dict.fromkeys(questions))


# --- a whole task -----------------------------------------------------------------------------------------------------------

MME = {"perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
       "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()}


def score_group(task, answers, truths):
    """Answers and truths of one group -> {metric: value}, the one that counts first."""
    pairs = list(zip(answers, truths))
    if task in ("reg", "caption"):
        return caption_scores(pairs)
    if task == "rec":
        return box_scores(answers, truths)
    if task == "pope":
        return pope_scores(answers, truths)
    if task == "mme":
        return mme_scores(answers, [truth["answer"] for truth in truths], [truth["picture"] for truth in truths])
    if task in ("mmbench", "choice"):
        right = [option_letter(answer, truth["options"]) == truth["letter"] for answer, truth in pairs]
        if task == "choice":
            return {"accuracy": share(right)}
        once = {"accuracy": share(correct for correct, truth in zip(right, truths) if truth["first"])}
        if all(truth["first"] for truth in truths):                  # asked without rotations
            return once
        return {"circular accuracy": circular_accuracy(right, [truth["question"] for truth in truths]), **once}
    match = {"vqav2": vqa_accuracy, "okvqa": vqa_accuracy, "vizwiz": vizwiz_accuracy,
             "textvqa": textvqa_accuracy, "gqa": gqa_match, "video": video_match,
             "scienceqa": lambda answer, truth: scienceqa_letter(answer) == truth}[task]
    if task in ("vqav2", "okvqa", "vizwiz"):                         # scored is what a server would be sent
        pairs = [(evalai_normalise(answer), truth) for answer, truth in pairs]
    return {"accuracy": share(match(answer, truth) for answer, truth in pairs)}


def score(task, items, said):
    """said: {id: answer} -> {group: {"samples": count, "scores": {metric: value}}}. Items without truth are left out."""
    groups = {}
    for item in items:
        for group in item.groups if item.truth is not None else ():
            groups.setdefault(group, []).append(item)
    results = {}
    for group, some in groups.items():
        answers, truths = [said[item.id] for item in some], [item.truth for item in some]
        results[group] = {"samples": len(some), "scores": score_group(task, answers, truths)}
    for total, categories in MME.items() if task == "mme" else ():   # MME's two numbers: points summed over categories
        parts = [results[category] for category in categories if category in results]
        if parts:
            results[total] = {"samples": sum(part["samples"] for part in parts),
                              "scores": {"score": sum(part["scores"]["score"] for part in parts)}}
    return results
