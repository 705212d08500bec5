"""The papers' benchmarks in small: how well a model answers about pictures that it has not seen.

    python eval.py                                      the newest model under out/, 200 questions a task
    python eval.py --model=out/tiny --count=1000 --json

On the embedded world's test split (world.py), each task with the scores of the benchmark that it stands for:

    caption    exact match; object F1: the objects named against those there          (COCO; F1 in place of CIDEr)
    presence   accuracy, precision, recall, F1, yes-ratio                             (POPE, arXiv 2305.10355)
    count      accuracy                                                               (VQAv2)
    rec        accuracy at IoU 0.5, mean IoU                                          (RefCOCO: text to box)
    reg        exact match                                                            (RefCOCOg: box to text)
    attribute, relation   accuracy                                                    (GQA)

An answer that cannot be read (neither yes nor no, no box) is wrong, and counted. Beside every score stands the **blind**
one: the same model, the same questions, each with another question's picture. What is left is what can be guessed from
the question alone; a model that only looks as if it saw has a blind score as high as the other.
"""
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

import cli
import world
from dialogue import MARK
from hub import InputError, newest_model
from images import parse_box
from mllm import MLLM

MAX_NEW_TOKENS = {"caption": 48, "presence": 4, "count": 4, "rec": 32, "reg": 12, "attribute": 6, "relation": 6}


@dataclass
class Config:
    model: str = ""                      # folder of a trained model; empty: the newest under out/
    count: int = 200                     # questions a task
    batch: int = 50                      # questions answered at once
    blind: bool = True                   # score with exchanged pictures, too (as much time again)
    json: bool = False                   # print one JSON object as the last line
    seed: int = 0                        # of the exchange of pictures
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps


# --- scores: pure functions of texts --------------------------------------------------------------------------------

def normalise(text):
    """What exact match compares: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


def share(values):
    values = list(values)
    return sum(values) / len(values)


def exact_match(answers, truths):
    return share(normalise(answer) == normalise(truth) for answer, truth in zip(answers, truths))


def named_objects(caption):
    """"a large red circle, a small blue cross and a ..." -> Counter of "large red circle", ..."""
    parts = re.split(r",|\band\b|\.", caption.lower())
    names = (re.sub(r"^(a|an|the)\s+", "", " ".join(part.split())) for part in parts)
    return Counter(name for name in names if name)


def object_f1(answer, truth):
    """Objects named right, against all named and all there; their order does not matter. 1 only if the sets are equal."""
    said, there = named_objects(answer), named_objects(truth)
    right = (said & there).total()
    return 2 * right / (said.total() + there.total()) if right else 0.0


def yes_or_no(answer):
    """The answer's first word if that is yes or no, else None."""
    first = re.match(r"\W*([a-z]+)", answer.lower())
    return first[1] if first and first[1] in ("yes", "no") else None


def presence_scores(answers, truths):
    """POPE's scores, where "yes" is the positive class. An answer that is neither counts as wrong, and not as a yes."""
    said = [yes_or_no(answer) for answer in answers]
    hits = sum(answer == truth == "yes" for answer, truth in zip(said, truths))
    yes, there = said.count("yes"), truths.count("yes")
    return {"accuracy": share(answer == truth for answer, truth in zip(said, truths)),
            "precision": hits / yes if yes else 0.0, "recall": hits / there if there else 0.0,
            "F1": 2 * hits / (yes + there) if hits else 0.0, "yes-ratio": yes / len(said),
            "unparsable": said.count(None) / len(said)}


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2). A reversed box covers nothing: 0."""
    def area(x1, y1, x2, y2):
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both) if both > 0 else 0.0


def rec_scores(answers, truths):
    """The first box of every answer against the true one. Boxes are by the side of the padded picture; their IoU in
    original pixels is the same, since padding moves both alike and the scale cancels out."""
    boxes = [parse_box(answer) for answer in answers]
    overlaps = [iou(box, parse_box(truth)) if box else 0.0 for box, truth in zip(boxes, truths)]
    return {"accuracy at IoU 0.5": share(overlap >= 0.5 for overlap in overlaps), "mean IoU": share(overlaps),
            "unparsable": boxes.count(None) / len(boxes)}


def score(task, answers, truths):
    """{metric: value}, the one that counts first."""
    if task == "caption":
        return {"exact match": exact_match(answers, truths), "object F1": share(map(object_f1, answers, truths))}
    if task == "presence":
        return presence_scores(answers, truths)
    if task == "rec":
        return rec_scores(answers, truths)
    return {"exact match" if task == "reg" else "accuracy": exact_match(answers, truths)}


# --- questions and answers ------------------------------------------------------------------------------------------

@lru_cache(maxsize=4096)                                             # all tasks ask about the same scenes
def test_scene(index):
    objects = world.scene("test", index)
    return objects, world.draw(objects, "test", index)


def questions(task, count):
    """The first `count` test scenes that give a question of this task -> pictures, questions, answers."""
    found, index = [], 0
    while len(found) < count:
        objects, picture = test_scene(index)
        turn = world.any_question(task, objects, world.generator("test", index, 2))
        if turn:
            found.append((picture, *turn))
        index += 1
    return zip(*found)


def exchange(count, seed):
    """A permutation of range(count) that leaves nothing in its place: a random cycle through all."""
    cycle = np.random.default_rng(seed).permutation(count)
    places = np.empty(count, dtype=int)
    places[cycle] = np.roll(cycle, 1)
    return places.tolist()


def answer(model, pictures, texts, max_new_tokens, batch):
    said = []
    for i in range(0, len(texts), batch):
        prompts = [f"{MARK}\n{text}" for text in texts[i:i + batch]]
        said += model.generate(pictures[i:i + batch], prompts, max_new_tokens)
    return said


def evaluate(model, count=200, batch=50, blind=True, seed=0):
    """-> {task: {"samples": count, "scores": {metric: value}, "blind": the same, or None}}; all values from 0 to 1."""
    if count < 2 or batch < 1 or seed < 0:
        raise InputError(f"count {count}, batch {batch}, seed {seed}: should be 2 or more (the blind score exchanges pictures), "
                         "1 or more, and 0 or more")
    was_training, results = model.training, {}
    model.eval()
    for task in world.TASKS:
        pictures, texts, truths = questions(task, count)
        shuffled = [pictures[i] for i in exchange(count, seed)]
        seeing, unseeing = (score(task, answer(model, seen, texts, MAX_NEW_TOKENS[task], batch), truths) if seen else None
                            for seen in (pictures, shuffled if blind else None))
        results[task] = {"samples": count, "scores": seeing, "blind": unseeing}
    model.train(was_training)
    return results


def table(results):
    """The results of `evaluate` as text: a line a metric."""
    lines = [f"{'task':10} {'samples':>7}  {'metric':20} {'score':>7} {'blind':>7}"]
    for task, result in results.items():
        first = f"{task:10} {result['samples']:7}"
        for metric, value in result["scores"].items():
            blind = f"{result['blind'][metric]:7.1%}" if result["blind"] else "      –"
            lines.append(f"{first:18}  {metric:20} {value:7.1%} {blind}")
            first = ""
    return "\n".join(lines)


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    device = cli.pick_device(config.device)
    folder = config.model or newest_model()
    model = MLLM.from_pretrained(folder, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    start = time.time()
    results = evaluate(model, config.count, config.batch, config.blind, config.seed)
    print(f"{folder}: {config.count} questions a task on held-out scenes, {time.time() - start:.0f} s\n\n{table(results)}")
    if config.json:
        print(json.dumps({"model": str(folder), "seed": config.seed, **results}))


if __name__ == "__main__":
    cli.run(main)
