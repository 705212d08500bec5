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
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

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

# An arm per line: label, name, its --connector and further flags, the paper's REC average and POPE.
TABLES = {
    "main": """
CLIP, one layer | clip-mlp | mlp | –, 85.9
DINOv2, one layer | dinov2-mlp | mlp --vision=weights/dinov2 | –, –
Dense Connector | clip-dci | dci | –, 86.6
STI | clip-sti | sti | –, 85.8
SCI | clip-sci | sci | –, 86.1
Efficient, 16 tokens | clip-efficient | efficient | –, –
CLIP, merged | clip-merged | comm_clip | 70.0, 83.4
DINOv2, merged | dinov2-merged-mlp2 | comm_dino --connector.dino_depth=2 | 74.9, 84.4
COMM | comm | comm | 72.8, 83.6
""",
    "layers": """
CLIP hidden[0] | clip-layer0 | linear --connector.layer=0
CLIP hidden[1] | clip-layer1 | linear --connector.layer=1
CLIP hidden[2] | clip-layer2 | linear --connector.layer=2
CLIP hidden[3] | clip-layer3 | linear --connector.layer=3
CLIP hidden[4] | clip-layer4 | linear --connector.layer=4
CLIP hidden[5] | clip-layer5 | linear --connector.layer=5
CLIP hidden[6] | clip-layer6 | linear --connector.layer=6
DINOv2 hidden[0] | dinov2-layer0 | linear --connector.layer=0 --vision=weights/dinov2
DINOv2 hidden[1] | dinov2-layer1 | linear --connector.layer=1 --vision=weights/dinov2
DINOv2 hidden[2] | dinov2-layer2 | linear --connector.layer=2 --vision=weights/dinov2
DINOv2 hidden[3] | dinov2-layer3 | linear --connector.layer=3 --vision=weights/dinov2
DINOv2 hidden[4] | dinov2-layer4 | linear --connector.layer=4 --vision=weights/dinov2
DINOv2 hidden[5] | dinov2-layer5 | linear --connector.layer=5 --vision=weights/dinov2
DINOv2 hidden[6] | dinov2-layer6 | linear --connector.layer=6 --vision=weights/dinov2
""",
    "towers": """
CLIP, linear | clip-layer5 | linear --connector.layer=5 | 47.3, 82.3
DINOv2, linear | dinov2-layer5 | linear --connector.layer=5 --vision=weights/dinov2 | 54.8, 78.3
CLIP, merged | clip-merged | comm_clip | 70.0, 83.4
DINOv2, merged, two MLPs | dinov2-merged-mlp2 | comm_dino --connector.dino_depth=2 | 74.9, 84.4
COMM | comm | comm | 72.8, 83.6
DINOv2, merged, no MLP | dinov2-merged-mlp0 | comm_dino --connector.dino_depth=0 | 63.5, 79.5
DINOv2, merged, one MLP | dinov2-merged-mlp1 | comm_dino --connector.dino_depth=1 | 73.1, 83.3
DINOv2, merged, four MLPs | dinov2-merged-mlp4 | comm_dino --connector.dino_depth=4 | 50.3, 82.2
DINOv2, merged, eight MLPs | dinov2-merged-mlp8 | comm_dino --connector.dino_depth=8 | 9.8, 56.8
MAE, one layer | mae-layer5 | linear --connector.layer=5 --vision=weights/mae | 65.7, 72.2
DeiT, one layer | deit-layer5 | linear --connector.layer=5 --vision=weights/deit | 24.8, 72.7
""",
    "merging": """
mean over the second half | comm-mean_half | comm --connector.merge=mean_half | –, –
mean over all | comm-mean_all | comm --connector.merge=mean_all | –, –
layer scale | comm-layerscale | comm --connector.merge=layerscale | –, –
Conv + BatchNorm, layer scale | comm-conv | comm --connector.merge=conv | –, –
LN + Linear, layer scale | comm | comm | 72.8, 83.6
""",
    "video": """
MLP | video-mlp | mlp
DCI | video-dci | dci
Efficient | video-efficient | efficient
COMM | video-comm | comm
""",
}
# Scores of the best constant answer: one box, or always yes.
GUESS = {"rec": 8.5, "presence": 52.0}


@dataclass
class Config:
    table: list[str] = option(["layers", "towers", "merging", "video"], "tables to fill; or main")
    connectors: list[str] = option([], "compare these connectors instead")
    arms: list[str] = option([], "train only these arms of the tables")
    seeds: int = option(3, "runs per arm")
    steps1: int = option(60, "steps of stage 1")
    steps2: int = option(240, "steps of stage 2")
    count: int = option(200, "questions per task")
    jobs: int = option(min(8, os.cpu_count()), "parallel runs")
    out: str = option("out/findings", "folder of the results")

    def rows(self, table):
        """Return the rows of a table: [[label, arm, flags, paper's numbers], ...]."""
        if table == "connectors":
            return [[name, name, name] for name in self.connectors]
        return [line.split(" | ") for line in TABLES[table].strip().splitlines()]


# --- one run ------------------------------------------------------------------------------


@cache
def checksums():
    """Return {folder in weights/: checksum of its checkpoint}."""
    files = sorted(ROOT.glob("weights/*/model.safetensors"))
    return {file.parent.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}


def settings(config, flags):
    """Return what all runs of an arm share."""
    return {
        "flags": f"--connector={flags}",
        "budget": {"steps1": config.steps1, "steps2": config.steps2, "count": config.count},
        "weights": checksums(),
    }


def run_arm(config, run):
    """Train an arm with a seed, evaluate it, and write OUT/ARM-SEED.json."""
    arm, flags, seed = run
    options = f"--connector={flags} --steps1={config.steps1} --steps2={config.steps2}"
    command = f"python train.py {options} --evaluate=false --seed={seed}"
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = [sys.executable, *command.split()[1:], f"--out={folder}/run"]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{command}: status {done.returncode}: {done.stderr[-300:]}")
        model = MLLM.from_pretrained(f"{folder}/run/model", device=cli.pick_device("auto"))
    result = {"command": command, **settings(config, flags), "tokens": model.tokens_per_image}
    scores = result["scores"] = {}
    if arm.startswith("video-"):
        scores |= video.evaluate(model, config.count // 2)
    else:
        for task in TASKS:
            images, texts, targets = task_questions(task, config.count)
            scores[task], *_ = score(task, answer(model, images, texts, 50), targets).values()
    unfinished = Path(config.out, f"{arm}-{seed}.partial")
    write_json(unfinished, result)
    unfinished.replace(unfinished.with_suffix(".json"))
    print(f"{command}: {scores}", flush=True)


def finished_runs(config, arm, flags):
    """Read the finished runs of an arm -> {seed: result}.

    Raises InputError if one is another training.
    """
    runs = {}
    for seed in range(config.seeds):
        path = Path(config.out, f"{arm}-{seed}.json")
        if path.exists():
            result = runs[seed] = json.loads(path.read_text(encoding="utf-8"))
            if not settings(config, flags).items() <= result.items():
                raise InputError(f"{path}: other flags, budget or weights; choose another --out")
    return runs


def run_all(config):
    """Run the arms that are not finished, seed by seed."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    arms = {row[1]: row[2] for table in config.table for row in config.rows(table)}
    if config.arms:
        arms = {arm: cli.find_class(arms, arm, "--arms") for arm in config.arms}
    missing = []
    for seed in range(config.seeds):
        for arm, flags in arms.items():
            if seed not in finished_runs(config, arm, flags):
                missing.append((arm, flags, seed))
    print(f"{len(missing)} runs to do", flush=True)
    # For each train.py: models this small gain little by a second thread.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(config.jobs) as pool:
        # An error or Ctrl-C cancels the runs that have not started.
        list(pool.map(partial(run_arm, config), missing))


# --- the tables and figures ---------------------------------------------------------------


def results(config, name):
    """List the arms of a table that have runs: (label, runs, the paper's numbers)."""
    found = []
    for label, arm, flags, *paper in config.rows(name):
        runs = list(finished_runs(config, arm, flags).values())
        if runs:
            found.append((label, runs, paper))
    return found


def mean_and_error(runs, key, scale=100):
    """Return a score's mean and standard error (0 for one run) over the seeds, times `scale`."""
    values = [scale * run["scores"][key] for run in runs]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return statistics.mean(values), error


def markdown(config, name):
    """Write a table: what its runs share, then a row per arm that has runs."""
    arms = results(config, name)
    _, [first, *_], paper = arms[0]
    headings = [TASKS.get(key, key) for key in first["scores"]]
    rows = [["", *headings, "tokens", "seeds", *["paper: REC average, POPE"] * len(paper)]]
    for label, runs, paper in arms:
        cells = []
        for key in first["scores"]:
            mean, error = mean_and_error(runs, key)
            cells.append(f"{mean:.1f} ± {error:.1f}" if len(runs) > 1 else f"{mean:.1f}")
        rows.append([label, *cells, str(runs[0]["tokens"]), str(len(runs)), *paper])
    asked = f"{config.count // 2} clips" if name == "video" else f"{config.count} questions a task"
    checkpoints = ", ".join(f"{name} {checksum}" for name, checksum in checksums().items())
    shared = f"{config.steps1} + {config.steps2} steps, {asked}; checkpoints {checkpoints}."
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join([f"Percent, mean ± standard error over the seeds; {shared}", "", *lines])


def chart(config, name):
    """Draw a table's REC and presence as SVG: a bar, its error, a ring for the paper's number.

    A dashed line shows the score of the best constant answer.
    """
    arms = results(config, name)
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
        for row, (_, runs, paper) in enumerate(arms):
            y = 24 * row + 44
            mean, error = mean_and_error(runs, task, scale=250)
            shapes += [
                f'<rect x="{left}" y="{y - 9}" width="{mean:.1f}" height="18" fill="#90caf9"/>',
                f'<path d="M{left + mean - error:.1f} {y}h{2 * error:.1f}" stroke="black"/>',
            ]
            for numbers in paper:
                number = numbers.split(", ")[panel]
                if number != "–":
                    x = left + 2.5 * float(number)
                    shapes.append(f'<circle cx="{x}" cy="{y}" r="5" fill="none" stroke="red"/>')
        x = left + 2.5 * guess
        shapes.append(f'<path d="M{x} 30V{bottom}" stroke="black" stroke-dasharray="4"/>')
    size = f'width="800" height="{bottom + 24}" font-family="sans-serif" font-size="13"'
    text = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shapes, "</svg>\n"])
    Path(config.out, f"{name}.svg").write_text(text, encoding="utf-8")


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    for name in config.table:
        cli.find_class(TABLES, name, "--table")
    for name in config.connectors:
        cli.find_class(CONNECTORS, name, "--connectors")
        config.table = ["connectors"]
    run_all(config)
    for name in config.table:
        if results(config, name):
            print(f"\n{name}\n\n{markdown(config, name)}")
            if name != "video":
                chart(config, name)


if __name__ == "__main__":
    cli.run(main)
