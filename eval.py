"""How well a model answers about pictures that it has not seen: the papers' benchmarks in small, and the benchmarks themselves.

    python eval.py                                      the newest model under out/, 200 questions a task
    python eval.py --model=out/dense/model --count=1000 --json
    python eval.py --model=FOLDER --task=pope --data=coco_pope_random.json --image_dir=val2014
    torchrun --nproc_per_node=8 eval.py --model=FOLDER --task=rec --data=REC_refcoco_unc_testA.jsonl --image_dir=train2014

Without --task: on the embedded world's test split (world.py), each task with the scores of the benchmark that it stands for:

    caption    exact match; object F1: the objects named against those there          (COCO; F1 in place of CIDEr)
    presence   accuracy, precision, recall, F1, yes-ratio                             (POPE, arXiv 2305.10355)
    count      accuracy                                                               (VQAv2)
    rec        accuracy at IoU 0.5, mean IoU                                          (RefCOCO: text to box)
    reg        exact match                                                            (RefCOCOg: box to text)
    attribute, relation   accuracy                                                    (GQA)

An answer that cannot be read (neither yes nor no, no box) is wrong, and counted. Beside every score stands the **blind**
one: the same model, the same questions, each with another question's picture. What is left does not come from the picture; a
model that only looks as if it saw has a blind score as high as the other. It is not the best that guessing can do: who
looks believes the wrong picture.

With --task: a public benchmark, from its own files (benchmarks.py says which), scored as its official scorer does (scores.py).
Under --out lie then answers.jsonl, scores.json and, where a server scores, its submission. The run goes on where it was stopped:
questions that have an answer there are not asked again.
"""
import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import benchmarks
import cli
import world
from answers import append_answers, merge, read_answers, submission
from connector import half_side, halve_grid
from dialogue import MARK
from hub import InputError, dtype_to_answer, locate, newest_model
from images import parse_box
from linear import pack
from mllm import MLLM
from questions import pictures, read_object
from scores import iou, score as score_benchmark, share

MAX_NEW_TOKENS = {"caption": 48, "presence": 4, "count": 4, "rec": 32, "reg": 12, "attribute": 6, "relation": 6}


@dataclass
class Config:
    model: str = ""                      # folder of a trained model; empty: the newest under out/
    count: int = 200                     # questions a task
    batch: int = 50                      # questions answered at once
    json: bool = False                   # print one JSON object as the last line
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps
    bf16: bool | None = None             # bfloat16; none: on CUDA, and where the checkpoint has 16 bits a number itself

    # on the embedded world
    blind: bool = True                   # score with exchanged pictures, too (as much time again)
    seed: int = 0                        # of the exchange of pictures

    # on a public benchmark
    task: str = ""                       # rec, reg, caption, pope, vqav2, gqa, mmbench, ...: a name in benchmarks.READERS
    data: list[str] = field(default_factory=lambda: [])  # the benchmark's file, or several (its splits)
    annotations: str = ""                # the answers, where they are in a file of their own (for mme: a folder)
    image_dir: str = "."                 # folder of the pictures, or of the videos
    out: str = ""                        # folder for answers and scores; empty: out/eval/MODEL/TASK
    limit: int | None = None             # only the first so many questions
    prompt: str = ""                     # another way to ask, with <question>, <expr> or <boxes>; empty: the papers'
    max_new_tokens: int = 128            # longest answer
    split: str = "test"                  # caption: which of Karpathy's splits
    circular: bool = True                # mmbench: ask once for each rotation of the options
    frames: int = 8                      # video: so many frames are shown
    pool: int = 0                        # halve the side of every picture's grid of tokens so many times


# --- scores: pure functions of texts --------------------------------------------------------------------------------

def normalise(text):
    """What exact match compares: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")


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
def scene_and_array(index):
    objects = world.scene("test", index)
    return objects, world.draw(objects, "test", index)


def questions(task, count):
    """The first `count` test scenes that give a question of this task -> pictures, questions, answers."""
    found, index = [], 0
    while len(found) < count:
        objects, picture = scene_and_array(index)
        turn = world.any_question(task, objects, world.generator("test", index, 2))
        if turn and task == "rec":                                   # held against the box itself, not its rounded text
            box = next(o.box for o in objects if o.name in turn[0])
            turn = turn[0], "[" + ",".join(f"{value:.4f}" for value in box) + "]"
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


# --- public benchmarks ------------------------------------------------------------------------------------------------

class Pooled(nn.Module):
    """A connector whose grid of tokens is halved `times` times: (I, N, C) -> (I, N / 4^times, C). Video needs it: eight
    frames of 576 tokens are more than most LLMs were trained to read. (As the Dense Connector's "efficient", without any
    training.)"""

    def __init__(self, connector, times):
        super().__init__()
        self.connector, self.times = connector, times

    def forward(self, hidden):
        tokens = self.connector(hidden)
        for _ in range(self.times):
            tokens = halve_grid(tokens)
        return tokens


def pool(model, times):
    for _ in range(times):
        model.tokens_per_image = half_side(model.tokens_per_image) ** 2        # InputError where there is no even grid
    model.connector = Pooled(model.connector, times)


def benchmark(config, rank, size):
    """Read, answer, merge, score; every process (rank of size) answers its share, the first one does the rest."""
    limit = 1 if config.limit is None else config.limit
    if min(config.batch, config.frames, config.max_new_tokens, limit) < 1 or config.pool < 0:
        raise InputError(f"--batch={config.batch} --frames={config.frames} --max_new_tokens={config.max_new_tokens} "
                         f"--limit={config.limit} --pool={config.pool}: should be 1 or more, and pool 0 or more")
    items = benchmarks.read(config.task, config)[:config.limit]
    name = config.model or str(newest_model())
    folder = Path(config.out or Path("out", "eval", re.sub(r"[^\w.-]+", "-", name).strip("-."), config.task))
    check_same_run(config, name, folder, rank, size)
    known = read_answers(folder, items)
    barrier(size)                                                    # all have read before one writes
    open_items = [item for item in items if item.id not in known]
    mine, began, told = open_items[rank::size], time.time(), time.time()
    if mine:
        device = cli.pick_device(config.device)
        model = MLLM.from_pretrained(name, dtype_to_answer(name, device, config.bf16), device)
        if size == 1:                                                # several processes share the mapped file instead
            pack(model)
        if config.pool:
            pool(model, config.pool)
    for i in range(0, len(mine), config.batch):
        some = mine[i:i + config.batch]
        said = answers_of(model, some, config.max_new_tokens)
        append_answers(folder / f"answers.rank{rank}.jsonl", [
            {"id": item.id, "prompt": item.prompt, "answer": answer, "truth": item.truth} for item, answer in zip(some, said)])
        if rank == 0 and time.time() - told > 10:
            told, done = time.time(), i + len(some)
            left = (told - began) * (len(mine) - done) / done
            print(f"{done:,} of {len(mine):,} questions, {left / 60:.0f} minutes left", flush=True)
    barrier(size)                                                    # all answers are written
    if rank == 0:
        known = read_answers(folder, items)
        merge(folder, items, known)
        said = {item.id: known[item.id]["answer"] for item in items}
        report(config, name, folder, items, said, score_benchmark(config.task, items, said), len(open_items))
    barrier(size)


def check_same_run(config, name, folder, rank, size):
    """folder/run.json holds what the answers there depend on, beside their prompts; a run with anything else may not go on
    with them."""
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(locate(name).glob("*.safetensors"))]
    files = [[Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path in config.data]
    run = {"task": config.task, "model": name, "weights": weights, "data": config.data, "files": files, "image_dir": config.image_dir,
           "max_new_tokens": config.max_new_tokens, "frames": config.frames, "pool": config.pool}
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "run.json").exists():
                (folder / "run.json.partial").write_text(json.dumps(run) + "\n")
                os.replace(folder / "run.json.partial", folder / "run.json")
        except OSError as error:
            raise InputError(f"--out={folder}: cannot be written ({error})") from None
    barrier(size)
    former = {"files": files} | (read_object(folder / "run.json") or {})    # older ones do not say of them
    for key, value in run.items():
        if former.get(key) != value:
            raise InputError(f"{folder}: holds answers of a run with other {key} ({str(former.get(key))[:80]}, now "
                             f"{str(value)[:80]}): name another --out, or remove that folder")


def answers_of(model, items, max_new_tokens):
    """One batch. An error names a question: of what cannot be read, or of the first that may be too long."""
    shown, name = [], items[0].id
    try:
        for item in items:
            name = item.id
            shown.append(pictures(item))
        name = max(items, key=lambda item: (len(shown[items.index(item)]), len(item.prompt))).id
        return model.generate(shown, [item.prompt for item in items], max_new_tokens)
    except InputError as error:
        hint = " (--max_new_tokens, --frames and --pool=1 make it shorter)" if "context" in str(error) else ""
        raise InputError(f"question {name}: {error}{hint}") from None


def report(config, name, folder, items, said, results, asked):
    """Scores as a table, as a file, and as JSON; the server's file where there is one."""
    found = {"task": config.task, "model": name, "results": results}
    (folder / "scores.json").write_text(json.dumps(found, indent=2) + "\n")
    sent = submission(config.task, items, said)
    if sent:
        (folder / sent[0]).write_bytes(sent[1])
    print(f"{name}: {config.task}, {len(items):,} questions ({asked:,} of them asked now)\n")
    for group, result in results.items():
        first = f"{group[:40]:40} {result['samples']:7,}"
        for metric, value in result["scores"].items():
            print(f"{first:48}  {metric:20} {100 * value:8.2f}")
            first = ""
    if not results:
        print("no answers to compare with in these files, so no score: the server has them")
    print(f"\n{folder}: answers.jsonl, scores.json" + (f", {sent[0]} for the server" if sent else ""))
    if config.json:
        print(json.dumps(found))


def barrier(size):
    if size > 1:
        dist.barrier()


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.task:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))       # only to wait for the slowest
        benchmark(config, rank, size)
        if size > 1:
            dist.destroy_process_group()
        return
    for key in ("data", "annotations", "image_dir", "out", "limit", "prompt", "max_new_tokens", "split", "circular", "frames", "pool"):
        if getattr(config, key) != getattr(Config(), key):
            raise InputError(f"--{key} belongs to a public benchmark: say which with --task=")
    device = cli.pick_device(config.device)
    folder = config.model or newest_model()
    model = MLLM.from_pretrained(folder, dtype_to_answer(folder, device, config.bf16), device)
    pack(model)
    start = time.time()
    results = evaluate(model, config.count, config.batch, config.blind, config.seed)
    print(f"{folder}: {config.count} questions a task on held-out scenes, {time.time() - start:.0f} s\n\n{table(results)}")
    if config.json:
        print(json.dumps({"model": str(folder), "seed": config.seed, **results}))


if __name__ == "__main__":
    cli.run(main)
