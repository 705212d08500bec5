"""Score a model on held-out images of the toy world: the papers' benchmarks, made small.

    python eval.py                                    the newest model under out/
    python eval.py --model=out/dense/model --count=1000 --json

Each task has the scores of the benchmark that it stands for: caption COCO's (F1 instead of CIDEr),
presence POPE's (arXiv 2305.10355), count VQAv2's, rec RefCOCO's, reg RefCOCOg's, attribute and
relation GQA's.

An answer that cannot be read (neither yes nor no, no box) is wrong ("unparsable"). Every score is
also given **blind**: the same model and questions, each with the image of another question. What
is left of a score does not come from the image. For the public benchmarks: python -m benchmarks.
"""

import json
import re
from dataclasses import dataclass

import numpy as np

from common import cli
from common.cli import option
from common.errors import InputError
from common.images import iou, parse_box
from toy.scenes import normalize, object_f1, task_questions
from toy.world import TASKS

MAX_NEW_TOKENS = 48  # the longest caption needs fewer
LEGEND = """
caption    object F1: are the right objects named?
presence   is it there? yes-ratio: how often the answer is yes; about half is right
rec        find the box for a phrase: right if its IoU with the target is at least 0.5
reg        find the phrase for a box
blind      the same questions, each with the image of another question"""


@dataclass
class Config(cli.ModelConfig):  # --model, --device, --bf16, --fast
    count: int = option(200, "questions per task")
    batch: int = option(50, "questions answered at once")
    json: bool = option(False, "print one JSON object as the last line")


def mean(values):
    """Return the mean of any number of values, or 0 if there are none."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def yes_or_no(answer):
    """Return the answer's first word if it is yes or no, else None."""
    first = re.match(r"\W*(yes|no)(?![a-z])", answer.lower())
    return first[1] if first else None


def presence_scores(answers, targets):
    """Compute POPE's scores. "yes" is the positive class; what cannot be read is wrong."""
    answers = list(map(yes_or_no, answers))
    pairs = list(zip(answers, targets, strict=True))
    hits, yes, present = pairs.count(("yes", "yes")), answers.count("yes"), targets.count("yes")
    return {
        "accuracy": mean(answer == target for answer, target in pairs),
        "precision": hits / yes if yes else 0.0,
        "recall": hits / present if present else 0.0,
        "F1": 2 * hits / (yes + present) if hits else 0.0,
        "yes-ratio": yes / len(pairs),
        "unparsable": answers.count(None) / len(pairs),
    }


def rec_scores(pairs):
    """Compare the first box of each answer with the target.

    Boxes are normalized by the side of the padded image. Their IoU in original pixels is the same:
    padding moves both alike, and the scale cancels out.
    """
    boxes = [(parse_box(answer), parse_box(target)) for answer, target in pairs]
    ious = [iou(box, target) if box else 0.0 for box, target in boxes]
    return {
        "accuracy at IoU 0.5": mean([value >= 0.5 for value in ious]),
        "mean IoU": mean(ious),
        "unparsable": mean([box is None for box, _ in boxes]),
    }


def score(task, answers, targets):
    """Score the answers of a task -> {metric: value}, the share of right answers first."""
    pairs = list(zip(answers, targets, strict=True))
    if task == "presence":
        return presence_scores(answers, targets)
    if task == "rec":
        return rec_scores(pairs)
    exact = mean([normalize(answer) == normalize(target) for answer, target in pairs])
    if task == "caption":
        return {"exact match": exact, "object F1": mean([object_f1(*pair) for pair in pairs])}
    return {"exact match" if task == "reg" else "accuracy": exact}


def exchange(count):
    """Return a permutation of range(count) that moves everything: a random cycle."""
    cycle = np.random.default_rng(0).permutation(count)
    return np.roll(cycle, 1)[cycle.argsort()].tolist()


def answer(model, images, texts, batch):
    answers = []
    for i in range(0, len(texts), batch):
        some = slice(i, i + batch)
        answers += model.generate(images[some], texts[some], MAX_NEW_TOKENS)
    return answers


def evaluate(model, count, batch=50):
    """Score a model on all tasks; all values are from 0 to 1.

    -> {task: {"samples": count, "scores": {metric: value}, "blind": the same}}.
    """
    if count < 2 or batch < 1:
        raise InputError("count must be at least 2, and batch at least 1")
    results = {}
    for task in TASKS:
        images, texts, targets = task_questions(task, count)
        scores = score(task, answer(model, images, texts, batch), targets)
        images = [images[i] for i in exchange(count)]
        blind = score(task, answer(model, images, texts, batch), targets)
        results[task] = {"samples": count, "scores": scores, "blind": blind}
    return results


def table(results):
    """Write the results of `evaluate` as text, a line per metric, and explain the names."""
    lines = [f"{'task':10} {'samples':>7}  {'metric':20} {'score':>7} {'blind':>7}"]
    for task, result in results.items():
        first = f"{task:10} {result['samples']:7}"
        for metric, value in result["scores"].items():
            blind = result["blind"][metric]
            lines.append(f"{first:18}  {metric:20} {value:7.1%} {blind:7.1%}")
            first = ""
    return "\n".join([*lines, LEGEND])


def main(arguments):
    from interop.load import load_to_answer

    config = cli.parse(Config, arguments, __doc__)
    name, model = load_to_answer(config)
    print(f"{name}: {config.count} questions per task on held-out scenes\n")
    results = evaluate(model, config.count, config.batch)
    print(table(results))
    if config.json:
        print(json.dumps({"model": name, **results}))


if __name__ == "__main__":
    cli.run(main)
