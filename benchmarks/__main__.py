"""Run a model on one of the papers' benchmarks, and score it as the official scorer does.

    python -m benchmarks pope --model=FOLDER --data=coco_pope_random.json --image_dir=val2014
    python -m benchmarks mm_vet --data=mm-vet.json --judged=GRADES.json
    torchrun --nproc_per_node=8 -m benchmarks rec --model=FOLDER --data=REC_refcoco_unc_testA.jsonl

The first word is the benchmark: rec, reg, caption, pope, vqav2, okvqa, vizwiz, textvqa, gqa,
scienceqa, mmbench, mmbench_cn, mme, mmmu, mathvista, mm_vet, llava_bench, video or
video_chatgpt. Its data are the files as they are published; leave out --data to see which. Several
processes share the questions.

--out gets answers.jsonl, scores.json and, where a server or a judge scores, the submission. A run
that was stopped resumes: questions that have an answer are not asked again. --judged reads what the
judge's own script wrote and prints the score, without a model.
"""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from benchmarks import judged, readers
from benchmarks.answers import merge, read_answers, write_lines
from benchmarks.prompts import find_images, open_question
from benchmarks.scores import score
from common import cli
from common.cli import option
from common.errors import InputError, printable
from common.images import BadImage
from common.pretrained import locate, read_json
from common.save import write_json
from interop.load import load_to_answer, newest_model


@dataclass
class Task:
    task: str = option("", "the benchmark; the first word of the command")


@dataclass
class Config(cli.ModelConfig, Task):  # --task, --model, --device, --bf16, --fast
    data: list[str] = option([], "the benchmark's file, or several: its splits")
    annotations: str = option("", "file with the answers, if it is another one (mme: a folder)")
    image_dir: str = option(".", "folder of the images or videos")
    out: str = option("", "folder for answers and scores; default: out/eval/MODEL/TASK")
    judged: str = option("", "file of the judge's script: print its score instead of running")
    limit: int | None = option(None, "number of questions per file; default: all")
    batch: int = option(50, "questions answered at once")
    prompt: str = option("", "other prompt, with <question> in it; default: the paper's")
    max_new_tokens: int | None = option(None, "length of the longest answer; default: the paper's")
    frames: int = option(8, "video: number of frames to show")
    pool: str = option("", "fewer tokens an image: grid (a quarter) or pairs (half, for video)")


def main(arguments):
    """Read, answer, merge and score. Every process answers its share, the first one scores."""
    config = cli.parse(Config, arguments, __doc__)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        # Only for barriers: the fastest process may wait long for the slowest.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    items, task = readers.read(config), readers.BENCHMARKS[config.task]
    if config.judged:
        return report_judged(config, task, items)
    config.max_new_tokens = config.max_new_tokens or task.max_new_tokens
    config.model = config.model or str(newest_model())
    items, missing = find_images(items, config.image_dir)
    total = len(items) + len(missing)
    if not items:
        raise InputError(
            f"{config.data[0]}: no question, or none with an image in "
            f"--image_dir={config.image_dir}, such as {missing[:1]}"
        )
    if missing and rank == 0:
        print(
            f"{len(missing):,} of {total:,} questions have no image in --image_dir, such as "
            f"{printable(missing[0])}"
        )
    name = config.model.strip("/").replace("/", "-")
    folder = Path(config.out or f"out/eval/{name}/{config.task}")
    check_same_run(config, folder, rank)
    known = read_answers(folder)
    # All processes have read before one writes.
    barrier()
    share = [item for item in items if item.id not in known][rank::size]
    if share:
        answer_all(config, folder, share, rank)
    barrier()
    if rank == 0:
        report(config, task, folder, items, merge(folder, items), total)


def answer_all(config, folder, items, rank):
    """Answer these questions, and append the answers to this process's file after every batch.

    A question with an image that cannot be read is named and skipped.
    """
    # With --pool eight frames of 576 tokens fit into the context of most LLMs.
    _, model = load_to_answer(config, config.pool)
    frames = config.frames if config.task.startswith("video") else 0
    # A new file, since that of a killed run may end in half a line.
    path = folder / f"answers.rank{rank}-{time.time():.0f}.jsonl"
    for i in range(0, len(items), config.batch):
        opened = []
        for item in items[i : i + config.batch]:
            try:
                opened.append((item, *open_question(item, frames)))
            except BadImage as error:
                print(f"skipped: question {printable(item.id)}: {error}")
        if not opened:
            continue
        batch, images, prompts = zip(*opened, strict=True)
        answers = model.generate(images, prompts, config.max_new_tokens)
        lines = [
            {"id": item.id, "prompt": item.prompt, "answer": answer, "target": item.target}
            for item, answer in zip(batch, answers, strict=True)
        ]
        write_lines(path, lines)
        if rank == 0:
            print(f"{i + len(lines):,} of {len(items):,} questions", flush=True)


def check_same_run(config, folder, rank):
    """Refuse a folder with answers of another model, data or options, recorded in run.json."""
    options = ("image_dir", "prompt", "max_new_tokens", "frames", "pool")
    run = {key: getattr(config, key) for key in options}
    for file in [*config.data, *locate(config.model).glob("*.safetensors")]:
        run[str(file)] = Path(file).stat().st_mtime_ns
    path = folder / "run.json"
    if rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
    barrier()
    if read_json(path) != run:
        raise InputError(
            f"{path}: this folder has answers of another model, data or options; "
            "choose another --out or remove the folder"
        )


def report(config, task, folder, items, answers, total):
    """Print the scores, and write them and the file for the server."""
    items = [item for item in items if item.id in answers]
    results = {}
    if task.score:
        results = score(task.score, [item for item in items if item.target], answers)
    summary = {"task": config.task, "model": config.model, "lower bound": bool(task.judge)}
    write_json(folder / "scores.json", summary | {"results": results})
    print(f"{config.model}: {config.task}, {len(items):,} of {total:,} questions answered\n")
    print_scores(results)
    if task.judge:
        print("A score without the judge's file (--judged=FILE) is only a lower bound.")
    print(f"\n{folder}: answers.jsonl, scores.json, and a submission if a server or a judge scores")
    if task.submit:
        task.submit(folder, items, answers)


def report_judged(config, task, items):
    """Print the scores by the judge's file. Raises InputError."""
    try:
        verdicts = judged.read_verdicts(config.judged, task.verdict)
        results = score(task.judge, items, verdicts)
    except Exception as error:  # a file of another kind raises many
        raise InputError(f"{config.judged}: not from {config.task}'s judge ({error!r})") from error
    if not results:
        raise InputError(f"{config.judged}: judges none of the questions in --data")
    print_scores(results)


def print_scores(results):
    for group, result in results.items():
        for metric, value in result["scores"].items():
            value = value if metric == judged.POINTS else 100 * value
            print(f"{group[:40]:40} {result['samples']:7,}  {metric:20} {value:8.2f}")


def barrier():
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    cli.run(main)
