"""Repeat the main experiments of COMM and the Dense Connector on the toy world.

    python -m toy.findings runs/main.toml     nine arms as long as python train.py: four hours
    python -m toy.findings                    short runs for the other tables: about two hours
    python -m toy.findings runs/quick.toml    one seed, fewer arms and steps: at most 20 minutes
    python -m toy.findings --table=towers     one table: layers, towers, merging or video
    python -m toy.findings --connectors=mlp,dense,gated             compare these connectors
    python -m toy.findings runs/main.toml --out=runs/findings/main      go on with the runs in runs/

An arm is a name and some flags of train.py. A run of an arm is train.py in its own process, with
these flags, the budget that all arms share, and a seed. The model then answers questions about
held-out scenes. out/findings/ARM-SEED.json gets what it scored:

    {command, flags, budget, weights, tokens, scores: {task: value}}

A finished run is not repeated, so the same command resumes after a stop. A file of a run with other
flags, another budget or other checkpoints is an error: tables compare only equal trainings. Each
run uses one core.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from common import cli
from common.cli import option
from common.errors import InputError
from common.save import write_json
from connector import CONNECTORS
from eval import answer, score
from mllm import MLLM
from toy import video
from toy.scenes import task_questions

ROOT = Path(__file__).resolve().parents[1]
# Tasks of eval.py, with the headings of their columns.
TASKS = {"rec": "REC", "reg": "REG", "presence": "presence", "count": "count"}

# --- the arms -----------------------------------------------------------------------------

# An arm a line: its name and its flags of train.py.
ARMS = """
clip-layer0        --connector=linear --connector.layer=0
clip-layer1        --connector=linear --connector.layer=1
clip-layer2        --connector=linear --connector.layer=2
clip-layer3        --connector=linear --connector.layer=3
clip-layer4        --connector=linear --connector.layer=4
clip-layer5        --connector=linear --connector.layer=5
clip-layer6        --connector=linear --connector.layer=6
dinov2-layer0      --connector=linear --connector.layer=0 --vision=weights/dinov2
dinov2-layer1      --connector=linear --connector.layer=1 --vision=weights/dinov2
dinov2-layer2      --connector=linear --connector.layer=2 --vision=weights/dinov2
dinov2-layer3      --connector=linear --connector.layer=3 --vision=weights/dinov2
dinov2-layer4      --connector=linear --connector.layer=4 --vision=weights/dinov2
dinov2-layer5      --connector=linear --connector.layer=5 --vision=weights/dinov2
dinov2-layer6      --connector=linear --connector.layer=6 --vision=weights/dinov2
mae-layer5         --connector=linear --connector.layer=5 --vision=weights/mae
deit-layer5        --connector=linear --connector.layer=5 --vision=weights/deit
clip-merged        --connector=comm_clip
dinov2-merged-mlp0 --connector=comm_dino --connector.dino_depth=0
dinov2-merged-mlp1 --connector=comm_dino --connector.dino_depth=1
dinov2-merged-mlp2 --connector=comm_dino --connector.dino_depth=2
dinov2-merged-mlp4 --connector=comm_dino --connector.dino_depth=4
dinov2-merged-mlp8 --connector=comm_dino --connector.dino_depth=8
comm               --connector=comm
comm-mean_half     --connector=comm --connector.merge=mean_half
comm-mean_all      --connector=comm --connector.merge=mean_all
comm-layerscale    --connector=comm --connector.merge=layerscale
comm-conv          --connector=comm --connector.merge=conv
clip-mlp           --connector=mlp
clip-sti           --connector=sti
clip-sci           --connector=sci
clip-dci           --connector=dci
clip-efficient     --connector=efficient
dinov2-mlp         --connector=mlp --vision=weights/dinov2
video-mlp          --connector=mlp
video-dci          --connector=dci
video-efficient    --connector=efficient
video-comm         --connector=comm
"""
ARMS = dict(line.split(maxsplit=1) for line in ARMS.strip().splitlines())

# A line per row: label, arm, the paper's numbers.
TABLES = {
    "main": """label | arm | paper: REC average, POPE
CLIP, one layer | clip-mlp | –, 85.9
DINOv2, one layer | dinov2-mlp | –, –
Dense Connector | clip-dci | –, 86.6
STI | clip-sti | –, 85.8
SCI | clip-sci | –, 86.1
Efficient, 16 tokens | clip-efficient | –, –
CLIP, merged | clip-merged | 70.0, 83.4
DINOv2, merged | dinov2-merged-mlp2 | 74.9, 84.4
COMM | comm | 72.8, 83.6""",
    "layers": """label | arm
CLIP hidden[0] | clip-layer0
CLIP hidden[1] | clip-layer1
CLIP hidden[2] | clip-layer2
CLIP hidden[3] | clip-layer3
CLIP hidden[4] | clip-layer4
CLIP hidden[5] | clip-layer5
CLIP hidden[6] | clip-layer6
DINOv2 hidden[0] | dinov2-layer0
DINOv2 hidden[1] | dinov2-layer1
DINOv2 hidden[2] | dinov2-layer2
DINOv2 hidden[3] | dinov2-layer3
DINOv2 hidden[4] | dinov2-layer4
DINOv2 hidden[5] | dinov2-layer5
DINOv2 hidden[6] | dinov2-layer6""",
    "towers": """label | arm | paper: REC average, POPE
CLIP, linear | clip-layer5 | 47.3, 82.3
DINOv2, linear | dinov2-layer5 | 54.8, 78.3
CLIP, merged | clip-merged | 70.0, 83.4
DINOv2, merged, two MLPs | dinov2-merged-mlp2 | 74.9, 84.4
COMM | comm | 72.8, 83.6
DINOv2, merged, no MLP | dinov2-merged-mlp0 | 63.5, 79.5
DINOv2, merged, one MLP | dinov2-merged-mlp1 | 73.1, 83.3
DINOv2, merged, four MLPs | dinov2-merged-mlp4 | 50.3, 82.2
DINOv2, merged, eight MLPs | dinov2-merged-mlp8 | 9.8, 56.8
MAE, one layer | mae-layer5 | 65.7, 72.2
DeiT, one layer | deit-layer5 | 24.8, 72.7""",
    "merging": """label | arm | paper: REC average, POPE
mean over the second half | comm-mean_half | –, –
mean over all | comm-mean_all | –, –
layer scale | comm-layerscale | –, –
Conv + BatchNorm, layer scale | comm-conv | –, –
LN + Linear, layer scale | comm | 72.8, 83.6""",
    "video": """label | arm
MLP | video-mlp
DCI | video-dci
Efficient | video-efficient
COMM | video-comm""",
}
# Scores of the best constant answer: one box, or always yes.
GUESS = {"rec": 8.5, "presence": 52.0}
# A clip is shown in several ways (toy/video.py).
WAYS = ("best guess", "one frame", "eight frames", "one image")
VIDEO = [f"{task}, {way}" for task in ("presence", "count") for way in WAYS]


@dataclass
class Config:
    table: list[str] = option(["layers", "towers", "merging", "video"], "tables to fill; or main")
    connectors: list[str] = option([], "compare these connectors instead")
    arms: list[str] = option([], "arms to train; default: those of the tables")
    seeds: int = option(3, "runs per arm")
    steps1: int = option(60, "steps of stage 1")
    steps2: int = option(240, "steps of stage 2")
    count: int = option(200, "questions per task")
    jobs: int = option(min(8, os.cpu_count()), "parallel runs")
    out: str = option("out/findings", "folder of the results")

    @property
    def budget(self):
        return {"steps1": self.steps1, "steps2": self.steps2, "count": self.count}

    def rows(self, table):
        """Return the lines of a table, its header first: [[label, arm, numbers], ...]."""
        if table == "connectors":
            return [["label", "arm"], *([name, name] for name in self.connectors)]
        return [line.split(" | ") for line in TABLES[table].splitlines()]


def flags_of(arm):
    """Return the flags of an arm, which may be the name of a connector."""
    return ARMS.get(arm, f"--connector={arm}")


# --- one run ------------------------------------------------------------------------------


@cache
def checksums():
    """Return {folder in weights/: checksum of its checkpoint}."""
    files = sorted(ROOT.glob("weights/*/model.safetensors"))
    return {file.parent.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}


def run_arm(config, run):
    """Train an arm with a seed, evaluate it, and write OUT/ARM-SEED.json."""
    arm, seed = run
    path = Path(config.out, f"{arm}-{seed}.json").resolve()
    folder = path.with_suffix(".run")
    # A run that was stopped starts again.
    shutil.rmtree(folder, ignore_errors=True)
    steps = f"--steps1={config.steps1} --steps2={config.steps2}"
    command = f"python train.py {flags_of(arm)} {steps} --evaluate=false --seed={seed}"
    arguments = [sys.executable, *command.split()[1:], f"--out={folder}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{command}: failed with status {done.returncode}: {done.stderr[-300:]}")
    result = {
        "command": command,
        "flags": flags_of(arm),
        "budget": config.budget,
        "weights": checksums(),
        **evaluate(folder / "model", config.count, arm),
    }
    unfinished = path.with_suffix(".partial")
    write_json(unfinished, result)
    os.replace(unfinished, path)
    shutil.rmtree(folder)
    return result


def evaluate(folder, count, arm):
    """Return the tokens of an image and the main score of every task."""
    model = MLLM.from_pretrained(folder, device=cli.pick_device("auto"))
    tokens, scores = model.tokens_per_image, {}
    if arm.startswith("video-"):
        scores = video.evaluate(model, max(1, count // 2))
    else:
        for task in TASKS:
            images, texts, targets = task_questions(task, count)
            answers = answer(model, images, texts, 50)
            scores[task], *_ = score(task, answers, targets).values()
    return {"tokens": tokens, "scores": scores}


def read_run(config, arm, seed):
    """Read a finished run, or return None. Raises InputError if it is another training."""
    path = Path(config.out, f"{arm}-{seed}.json")
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same_weights = result["weights"].items() <= checksums().items()
    if (result["flags"], result["budget"]) != (flags_of(arm), config.budget) or not same_weights:
        raise InputError(f"{path}: other flags, budget or checkpoints; choose another --out")
    return result


def run_all(config):
    """Run the arms that are not finished, seed by seed."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    arms = config.arms or [row[1] for name in config.table for row in config.rows(name)[1:]]
    runs = [(arm, seed) for seed in range(config.seeds) for arm in dict.fromkeys(arms)]
    missing = [run for run in runs if not read_run(config, *run)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} finished before", flush=True)
    # For each train.py: models this small gain little by a second thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(config.jobs) as pool:
        # An error or Ctrl-C cancels the runs that have not started.
        for result in pool.map(partial(run_arm, config), missing):
            scores = [f"{task} {value:.1%}" for task, value in result["scores"].items()]
            print(f"{result['command']}: {', '.join(scores)}", flush=True)


# --- the tables and figures ---------------------------------------------------------------


def runs_of(config, arm):
    """Return the finished runs of an arm, one per seed."""
    runs = [read_run(config, arm, seed) for seed in range(config.seeds)]
    return [run for run in runs if run]


def mean_and_error(values):
    """Return the mean and its standard error (0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return statistics.mean(values), error


def percent(runs, key):
    """Write a score's mean and standard error over the seeds."""
    mean, error = mean_and_error([100 * run["scores"][key] for run in runs])
    return f"{mean:.1f} ± {error:.1f}" if len(runs) > 1 else f"{mean:.1f}"


def markdown(config, name):
    """Write a table: what its runs share, then a row per arm that has runs."""
    (_, _, *paper), *arms = config.rows(name)
    columns, asked = TASKS, f"{config.count} questions a task"
    if name == "video":
        columns, asked = {key: key for key in VIDEO}, f"{config.count // 2} clips"
    rows = [["", *columns.values(), "tokens", "seeds", *paper]]
    for label, arm, *paper in arms:
        runs = runs_of(config, arm)
        if runs:
            cells = [percent(runs, key) for key in columns]
            rows.append([label, *cells, str(runs[0]["tokens"]), str(len(runs)), *paper])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    checkpoints = ", ".join(f"{name} {checksum}" for name, checksum in checksums().items())
    shared = f"{config.steps1} + {config.steps2} steps, {asked}; checkpoints {checkpoints}."
    return "\n".join([f"Percent, mean ± standard error over the seeds; {shared}", "", *lines])


def chart(config, name):
    """Draw a table's REC and presence as SVG: a bar, its error, a ring for the paper's number.

    A dashed line shows the score of the best constant answer.
    """
    arms = [row for row in config.rows(name)[1:] if runs_of(config, row[1])]
    bottom = 24 * len(arms) + 40
    shapes = ['<rect width="100%" height="100%" fill="white"/>']
    for row, (label, *_) in enumerate(arms):
        shapes.append(f'<text x="10" y="{24 * row + 48}">{label}</text>')
    for panel, (task, guess) in enumerate(GUESS.items()):
        # 100% are 250 pixels.
        left = 220 + 300 * panel
        shapes.append(f'<text x="{left}" y="20">{TASKS[task]}</text>')
        for value in range(0, 101, 25):
            x = left + 2.5 * value
            shapes.append(f'<path d="M{x} 30V{bottom}" stroke="lightgray"/>')
            shapes.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{value}%</text>')
        for row, (_, arm, *papers) in enumerate(arms):
            y = 24 * row + 44
            scores = [250 * run["scores"][task] for run in runs_of(config, arm)]
            mean, error = mean_and_error(scores)
            shapes += [
                f'<rect x="{left}" y="{y - 9}" width="{mean:.1f}" height="18" fill="#90caf9"/>',
                f'<path d="M{left + mean - error:.1f} {y}h{2 * error:.1f}" stroke="black"/>',
            ]
            for numbers in papers:
                number = numbers.split(", ")[panel]
                if number != "–":
                    x = left + 2.5 * float(number)
                    shapes.append(f'<circle cx="{x}" cy="{y}" r="5" fill="none" stroke="red"/>')
        line = f'd="M{left + 2.5 * guess} 30V{bottom}"'
        shapes.append(f'<path {line} stroke="black" stroke-dasharray="4"/>')
    size = f'width="800" height="{bottom + 24}" font-family="sans-serif" font-size="13"'
    text = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shapes, "</svg>\n"])
    Path(config.out, f"{name}.svg").write_text(text, encoding="utf-8")


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    for name in config.table:
        cli.find_class(TABLES, name, "--table")
    for arm in config.arms:
        cli.find_class(ARMS, arm, "--arms")
    if config.connectors:
        config.table = ["connectors"]
        for name in config.connectors:
            cli.find_class(CONNECTORS, name, "--connectors")
    run_all(config)
    for name in config.table:
        print(f"\n{name}\n\n{markdown(config, name)}")
        if name != "video":
            chart(config, name)


if __name__ == "__main__":
    cli.run(main)
