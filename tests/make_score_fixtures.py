"""Writes fixtures/scores.json: what the official scorers say of random and of awkward answers.

    pip install pycocoevalcap numpy && python tests/make_score_fixtures.py VQA POPE M4C

VQA: vqaEval.py of GT-Vision-Lab/VQA (Python 2; its prints are turned into comments), POPE: evaluate.py of AoiDragon/POPE, M4C:
m4c_evaluator.py of haotian-liu/LLaVA. pycocoevalcap's tokenizer needs Java.
"""
import contextlib
import io
import json
import random
import re
import sys
import tempfile
import types
from pathlib import Path

SENTENCES = """A man's bike, (red) isn't here.|Two dogs... playing -- with a U.S. flag!|
e.g. the t-shirt costs $5.50, 1,000 people; no: 50%|don't can't cannot gonna wanna it's they're we'll I'd
"quoted" text 'single' and `back`|a/b and/or [x] {y} a_b @home #1 & Mr. Smith's|black-and-white photo – with em—dash… end
Café naïve 3:30 p.m. in the St. street.|?!.,;:-|man.Another sentence.Next one|a dog's 90's style 'tis
half 1/2 and 3 1/2 cups, 10-year-old|the no. 5 bus and vs. others|mother-in-law x-ray 'em ain't
over-the-top 5-10 1990s '90s 6'2" 5ft|U.S.A. is big. A.M. or a.m.|a 12-oz. bottle, no. 7|it's 5'6" tall
the girl said, "hello there."|a man w/ a hat & tie|"unclosed quote|y'all o'clock|the dogs' bowls|TV's are on
100% $5.00 £10 €20|this is a test....|what?! really!!|well---then|12:30pm|1,000.50 1.5 .5 5.|rock'n'roll|AT&T R&B b&w
x=5 a+b 5*3|it’s curly “quotes” ‘single’|a  double   space|red,white and blue|10:30am 5pm 5 pm|IS it?Yes|plan b. then
vitamin c.|the children's toys;the man|No.5|a - b|5-year-old's|(a b) c)|'stop'|-|...|two lot., cars.|A. homeless man
<b>bold</b>|½ cup""".replace("\n", "|")
NOUNS = "man woman dog cat child group player horse train bus plane table kitchen street beach skateboard pizza laptop".split()
VERBS = "standing sitting riding eating holding playing walking looking jumping waiting".split()
PLACES = ["on a beach", "in the park", "next to a table", "at night", "in front of a building", "on top of a hill",
          "near a fence"]
DETAILS = ["red", "large", "young", "black-and-white", "two-story", "", "", ""]
AWKWARD = """|yes|Yes|YES.|no|none|None|zero|two|2|Two dogs|2 dogs|a dog|the dog|A  dog|dog.|dog, cat|dog,cat|1,000
1,000 people, here|3.5|.5|5.|its|it's|dont|don't|wont|well|well-known|t-shirt|t shirt|tshirt|10:30|10:30 am|$5|50%|yes, it is
yes?|yes!|no/yes|left / right|(left)|[left|\"left\"|u.s.|U.S.A.|a|an|the|the a|one hundred|ten|o'clock|oclock|12 oclock|mans
man's|ows'at|shes|she's|Im|I'm|id've|youre|yall|y'alld've|somebody'd|thered|black & white|black and white|unanswerable
unsuitable|new\nyork|new\tyork| new york |-|--|?|.|a.b.c|1.2.3|-5|5-6|@home|a@b|#1|cant|can't|couldnt've|theyre
wheres""".replace("\n", "|")
REPLIES = ["yes", "Yes", "no", "No", "Yes, there is.", "No, there is not.", "no.", "There is no dog. Yes.", "not", "nothing",
           "Not at all", "", ".", "There are none", "It is not clear", "yes and no", "Yes. No.", "no,", "NO",
           "The image shows a dog", "\nno", "yes no"]


def caption(rng):
    said = ["a", rng.choice(DETAILS), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(["with a", "by the"]), rng.choice(NOUNS),
            rng.choice(PLACES)]
    return " ".join(filter(None, said)) + rng.choice([".", "", " .", "!"])


def caption_sets(rng):
    """{name: [(answer, references)]}: plausible, awkward, one picture, nothing in common."""
    plausible = [(caption(rng), [caption(rng) for _ in range(rng.randint(1, 5))]) for _ in range(40)]
    plausible += [(references[0], references) for _, references in plausible[:3]]
    awkward = [("", ["a dog", "the dog runs"]), ("...", ["a dog."]), ("a dog", ["", "a dog"]), ("A DOG!", ["a dog"]),
               ("dog dog dog dog", ["a dog"]), ("(red) ball", ["a red ball", "red (ball)"]), ("isn't it", ["is it not"]),
               ("one two three four five six seven eight nine ten " * 3, ["one two three"])]
    one = [("a dog runs in the park", ["a dog runs", "the dog in a park"])]
    return {"plausible": plausible, "awkward": awkward, "one picture": one,
            "apart": [("a b c d", ["e f g h"]), ("i j", ["k l"])], "both": plausible[:10] + awkward}


def official_captions(pairs):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    answers = {i: [tokenized] for i, tokenized in enumerate(tokens([answer for answer, _ in pairs]))}
    references = {i: tokens(texts) for i, (_, texts) in enumerate(pairs)}
    scores, each = Cider().compute_score(references, answers)
    bleus = Bleu(4).compute_score(references, answers, verbose=0)[0]
    return ({"CIDEr": scores, **{f"BLEU-{n}": value for n, value in enumerate(bleus, start=1)},
             "ROUGE-L": Rouge().compute_score(references, answers)[0]}, each.tolist())


def tokens(sentences):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    with contextlib.redirect_stderr(io.StringIO()):
        made = PTBTokenizer().tokenize({0: [{"caption": sentence} for sentence in sentences]})
    return made.get(0, [""])


def run_vqa(path, rows):
    """vqaEval.py on [(answer, ten people's)] -> accuracies, rounded by it to 8 digits; its two normalising steps on AWKWARD."""
    module = {}
    exec(re.sub(r"(?m)^(\s*)print .*$", r"\1pass", Path(path).read_text()), module)
    questions = types.SimpleNamespace(getQuesIds=lambda: list(range(len(rows))), qa={
        i: {"question_type": "q", "answer_type": "a",
            "answers": [{"answer": text, "answer_id": j} for j, text in enumerate(people)]}
        for i, (_, people) in enumerate(rows)})
    results = types.SimpleNamespace(qa={i: {"answer": answer} for i, (answer, _) in enumerate(rows)})
    scorer = module["VQAEval"](questions, results, n=8)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()

    def normalise(text):
        return scorer.processDigitArticle(scorer.processPunctuation(text.replace("\n", " ").replace("\t", " ").strip()))
    return ([[*row, scorer.evalQA[i] / 100] for i, row in enumerate(rows)],
            [[text, normalise(text)] for text in AWKWARD.split("|")])


def run_m4c(path, rows):
    module = {}
    exec(Path(path).read_text().replace("from tqdm import tqdm", "tqdm = list"), module)
    scorer = module["TextVQAAccuracyEvaluator"]()
    return ([[*row, scorer.eval_pred_list([{"pred_answer": row[0], "gt_answers": row[1]}])] for row in rows],
            [[text, scorer.answer_processor(text)] for text in AWKWARD.split("|")])


def run_pope(path, answers, truths):
    with tempfile.TemporaryDirectory() as folder:
        for name, key, values in (("answers", "answer", answers), ("labels", "label", truths)):
            Path(folder, name).write_text("".join(json.dumps({key: value}) + "\n" for value in values))
        source = Path(path).read_text().replace("ans_file = ''", f"ans_file = '{folder}/answers'")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(source.replace("label_file = ''", f"label_file = '{folder}/labels'"), {})
    values = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
    names = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "F1": "F1 score", "yes-ratio": "Yes ratio"}
    return {"answers": answers, "truths": truths, "scores": {ours: float(values[theirs]) for ours, theirs in names.items()}}


if __name__ == "__main__":
    vqa, pope, m4c = sys.argv[1:]
    rng = random.Random(0)
    sentences = [sentence for sentence in SENTENCES.split("|")] + [caption(rng) for _ in range(20)]
    words = AWKWARD.split("|")
    rows = [(rng.choice(words), [rng.choice(few) for _ in range(10)]) for few in
            [rng.sample(words, rng.randint(1, 4)) for _ in range(150)]]
    rows = [(rng.choice(people) if rng.random() < 0.7 else answer, people) for answer, people in rows]
    fixtures = {"tokens": list(zip(sentences, tokens(sentences))), "captions": {}}
    for name, pairs in caption_sets(rng).items():
        scores, each = official_captions(pairs)
        fixtures["captions"][name] = {"pairs": pairs, "scores": scores, "CIDEr each": each}
    fixtures["vqa"], fixtures["vqa normalised"] = run_vqa(vqa, rows)
    fixtures["textvqa"], fixtures["textvqa normalised"] = run_m4c(m4c, rows)
    fixtures["pope"] = [run_pope(pope, replies, [rng.choice(["yes", "no"]) for _ in replies])
                        for replies in (REPLIES, [rng.choice(REPLIES) for _ in range(200)])]
    path = Path(__file__).parent / "fixtures" / "scores.json"
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in fixtures.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
