"""Run the official scorers on the inputs in fixtures/scores.json and write their results there.

    pip install pycocoevalcap numpy && python tests/make_score_fixtures.py VQA POPE M4C

VQA: vqaEval.py of GT-Vision-Lab/VQA (Python 2; its prints are removed). POPE: evaluate.py of
AoiDragon/POPE. M4C: m4c_evaluator.py of haotian-liu/LLaVA. pycocoevalcap's tokenizer needs Java.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import types
from pathlib import Path


def tokens(sentences):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {0: [{"caption": sentence} for sentence in sentences]}
    with contextlib.redirect_stderr(io.StringIO()):
        return PTBTokenizer().tokenize(captions).get(0, [""])


def official_cider(pairs):
    from pycocoevalcap.cider.cider import Cider

    texts = tokens([answer for answer, _ in pairs])
    answers = {i: [text] for i, text in enumerate(texts)}
    references = {i: tokens(texts) for i, (_, texts) in enumerate(pairs)}
    score, each = Cider().compute_score(references, answers)
    return {"pairs": pairs, "scores": {"CIDEr": score}, "CIDEr each": each.tolist()}


def official_vqa(path, rows, texts):
    """Run vqaEval.py on [[answer, ten people's, ...]], and its two normalizing steps on texts."""
    module = {}
    exec(re.sub(r"(?m)^(\s*)print .*$", r"\1pass", Path(path).read_text()), module)
    annotations = {}
    for i, (_, people, _) in enumerate(rows):
        answers = [{"answer": text, "answer_id": j} for j, text in enumerate(people)]
        annotations[i] = {"question_type": "q", "answer_type": "a", "answers": answers}
    questions = types.SimpleNamespace(getQuesIds=lambda: list(annotations), qa=annotations)
    predictions = {i: {"answer": row[0]} for i, row in enumerate(rows)}
    scorer = module["VQAEval"](questions, types.SimpleNamespace(qa=predictions), n=8)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.evaluate()
    normalized = []
    for text in texts:
        line = text.replace("\n", " ").replace("\t", " ").strip()
        normalized.append([text, scorer.processDigitArticle(scorer.processPunctuation(line))])
    return [[*row[:2], scorer.evalQA[i] / 100] for i, row in enumerate(rows)], normalized


def official_textvqa(path, rows, texts):
    module = {}
    exec(Path(path).read_text().replace("from tqdm import tqdm", "tqdm = list"), module)
    scorer, scored = module["TextVQAAccuracyEvaluator"](), []
    for answer, people, _ in rows:
        pair = {"pred_answer": answer, "gt_answers": people}
        scored.append([answer, people, scorer.eval_pred_list([pair])])
    return scored, [[text, scorer.answer_processor(text)] for text in texts]


def official_pope(path, answers, targets):
    source = Path(path).read_text()
    with tempfile.TemporaryDirectory() as folder:
        for name, key, values in (("ans", "answer", answers), ("label", "label", targets)):
            lines = [json.dumps({key: value}) + "\n" for value in values]
            Path(folder, name).write_text("".join(lines))
            source = source.replace(f"{name}_file = ''", f"{name}_file = '{folder}/{name}'")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(source, {})
    values = dict(line.split(": ") for line in printed.getvalue().splitlines() if ": " in line)
    keys = ("Accuracy", "Precision", "Recall", "F1 score", "Yes ratio")
    ours = ("accuracy", "precision", "recall", "F1", "yes-ratio")
    scores = {name: float(values[key]) for name, key in zip(ours, keys, strict=True)}
    return {"answers": answers, "targets": targets, "scores": scores}


if __name__ == "__main__":
    vqa, pope, m4c = sys.argv[1:]
    path = Path(__file__).parent / "fixtures" / "scores.json"
    fixtures = json.loads(path.read_text(encoding="utf-8"))
    sentences = [sentence for sentence, _ in fixtures["tokens"]]
    texts = [text for text, _ in fixtures["vqa normalized"]]
    fixtures["tokens"] = list(zip(sentences, tokens(sentences), strict=True))
    for name, case in fixtures["captions"].items():
        fixtures["captions"][name] = official_cider(case["pairs"])
    for name, run, file in (("vqa", official_vqa, vqa), ("textvqa", official_textvqa, m4c)):
        fixtures[name], fixtures[f"{name} normalized"] = run(file, fixtures[name], texts)
    cases = [(case["answers"], case["targets"]) for case in fixtures["pope"]]
    fixtures["pope"] = [official_pope(pope, *case) for case in cases]
    path.write_text(json.dumps(fixtures, ensure_ascii=False) + "\n", encoding="utf-8")
