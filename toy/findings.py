"""Repeat the main experiments of COMM and the Dense Connector on the toy world.

    python -m toy.findings                    all arms, three seeds each: 90 minutes on two cores
    python -m toy.findings --quick            one seed, fewer arms and steps: at most 20 minutes
    python -m toy.findings --table=towers     one table: layers, towers, merging, dense or video
    python -m toy.findings --report           write the tables of docs/findings.md

An arm is a name and some flags of train.py. A run of an arm is train.py in its own process, with
these flags, the budget that all arms share, and a seed. The model then answers questions about
held-out scenes. out/findings/ARM-SEED.json gets what it scored:

    {arm, seed, command, flags, budget, weights, scores: {task: value}, tokens, flops, ...}

A finished run is not repeated, so the same command resumes after a stop. A file of a run with other
flags, another budget or other checkpoints is an error: tables compare only equal trainings. Several
runs share the CPU cores, since models this small do not need two.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import cli
from common.cli import option
from common.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
# Tasks of eval.py, with the headings of their columns.
TASKS = {"rec": "REC", "reg": "REG", "presence": "presence", "count": "count"}
# Trainings run in parallel, evaluations one after the other.
EVALUATION = threading.Lock()

# --- the arms -----------------------------------------------------------------------------


def make_arms():
    """Return {arm: flags of train.py}."""
    dino = " --vision=weights/dinov2"
    arms = {"clip-merged": "--connector=comm_clip", "comm": "--connector=comm"}
    for i in range(7):
        arms[f"clip-layer{i}"] = f"--connector=linear --connector.layer={i}"
        arms[f"dinov2-layer{i}"] = arms[f"clip-layer{i}"] + dino
    for tower in ("mae", "deit"):
        arms[f"{tower}-layer5"] = f"{arms['clip-layer5']} --vision=weights/{tower}"
    for depth in (0, 1, 2, 4, 8):
        arms[f"dinov2-merged-mlp{depth}"] = f"--connector=comm_dino --connector.dino_depth={depth}"
    for merge in ("mean_half", "mean_all", "layerscale"):
        arms[f"comm-{merge}"] = f"--connector=comm --connector.merge={merge}"
    for name in ("mlp", "sti", "sci", "dci", "efficient"):
        arms[f"clip-{name}"] = f"--connector={name}"
        arms[f"dinov2-{name}"] = arms[f"clip-{name}"] + dino
    arms["clip-dci3"] = "--connector=dci --connector.groups=3"
    arms["dinov2-dci3"] = arms["clip-dci3"] + dino
    for name in ("mlp", "dci", "efficient", "comm"):
        arms[f"video-{name}"] = f"--connector={name}"
    return arms


def make_layer_table():
    lines = ["paper"]
    for label, tower in (("CLIP", "clip"), ("DINOv2", "dinov2")):
        lines += [f"{label} hidden[{i}] | {tower}-layer{i} | –" for i in range(7)]
    return "\n".join(lines)


ARMS = make_arms()
QUICK = """clip-layer1 clip-layer3 clip-layer5 dinov2-layer1 dinov2-layer3 dinov2-layer5 mae-layer5
           deit-layer5 clip-merged dinov2-merged-mlp0 dinov2-merged-mlp2 comm comm-mean_all clip-mlp
           clip-sci clip-dci clip-efficient video-dci""".split()

# Heading of the paper's column, then a line per row: label, arm, the paper's numbers.
TABLES = {
    "layers": make_layer_table(),
    "towers": """paper: REC average, POPE
CLIP, linear | clip-layer5 | 47.3, 82.3
DINOv2, linear | dinov2-layer5 | 54.8, 78.3
CLIP, merged | clip-merged | 70.0, 83.4
DINOv2, merged, two MLPs | dinov2-merged-mlp2 | 74.9, 84.4
COMM | comm | 72.8, 83.6
DINOv2, merged, no MLP | dinov2-merged-mlp0 | 63.5, 79.5
DINOv2, merged, one MLP | dinov2-merged-mlp1 | 73.1, 83.3 (as "DINOv2 with merging": 72.8, 83.3)
DINOv2, merged, four MLPs | dinov2-merged-mlp4 | 50.3, 82.2
DINOv2, merged, eight MLPs | dinov2-merged-mlp8 | 9.8, 56.8
MAE, one layer | mae-layer5 | 65.7, 72.2
DeiT, one layer | deit-layer5 | 24.8, 72.7""",
    "merging": """paper: REC average, POPE
mean over the second half | comm-mean_half | –
mean over all | comm-mean_all | –
layer scale | comm-layerscale | –
LN + Linear, layer scale | comm | 72.8, 83.6""",
    "dense": """paper: GQA, POPE
CLIP, one layer, MLP | clip-mlp | 62.0, 85.9
CLIP, STI | clip-sti | 63.3, 85.8
CLIP, SCI | clip-sci | 63.7, 86.1
CLIP, DCI, 2 groups | clip-dci | 63.8, 86.6
CLIP, DCI, 3 groups | clip-dci3 | –
CLIP, Efficient | clip-efficient | 62.8, –
DINOv2, one layer, MLP | dinov2-mlp | –
DINOv2, STI | dinov2-sti | –
DINOv2, SCI | dinov2-sci | –
DINOv2, DCI, 2 groups | dinov2-dci | –
DINOv2, DCI, 3 groups | dinov2-dci3 | –
DINOv2, Efficient | dinov2-efficient | –""",
    "video": """
MLP | video-mlp | –
DCI | video-dci | –
Efficient | video-efficient | –
COMM | video-comm | –""",
}
# The video table has three parts: tasks, and how a clip is shown (see toy/video.py).
ALONE = "same answer backwards; from two boxes"
CLIP = "eight frames; one image; that eight times; with seven empty"
VIDEO = [
    ("presence count", f"best guess; another clip; one frame; {CLIP}"),
    ("presence count", CLIP.replace(";", ", unpooled;") + ", unpooled"),
    ("direction", f"another clip; eight frames; eight frames, unpooled; {ALONE}"),
]


def rows_of(table):
    """Return the rows of a table: [[label, arm, the paper's numbers], ...]."""
    return [line.split(" | ") for line in TABLES[table].splitlines()[1:]]


@dataclass
class Config:
    table: list[str] = option([], "layers, towers, merging, dense, video; default: all")
    quick: bool = option(False, "one seed, fewer arms, a smaller budget")
    report: bool = option(False, "train nothing, write the page from finished runs")
    seeds: int = option(0, "runs per arm; 0: 3, with --quick 1")
    steps1: int = option(60, "steps of stage 1")
    steps2: int = option(0, "steps of stage 2; 0: 240, with --quick 200")
    count: int = option(0, "questions per task; 0: 200, with --quick 100")
    jobs: int = option(min(8, os.cpu_count()), "parallel runs")
    out: str = option("", "folder of the results; default: out/findings, or out/findings-quick")
    page: str = option(str(ROOT / "docs" / "findings.md"), "page that --report writes")

    def __post_init__(self):
        self.seeds = self.seeds or (1 if self.quick else 3)
        self.steps2 = self.steps2 or (200 if self.quick else 240)
        self.count = self.count or (100 if self.quick else 200)
        self.out = self.out or ("out/findings-quick" if self.quick else "out/findings")
        self.table = self.table or list(TABLES)
        for name in self.table:
            if name not in TABLES:
                raise InputError(f"--table={name}: there are {', '.join(TABLES)}")

    @property
    def budget(self):
        return {"steps1": self.steps1, "steps2": self.steps2, "count": self.count}


# --- one run ------------------------------------------------------------------------------


def checksums():
    """Return {folder in weights/: checksum of its checkpoint}."""
    files = sorted(ROOT.glob("weights/*/model.safetensors"))
    return {file.parent.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in files}


def run_arm(config, run):
    """Train an arm with a seed, evaluate it, and write OUT/ARM-SEED.json."""
    arm, seed = run
    path = Path(config.out, f"{arm}-{seed}.json").resolve()
    folder, budget = path.with_suffix(".run"), config.budget
    # A run that was stopped starts again.
    shutil.rmtree(folder, ignore_errors=True)
    steps = f"--steps1={budget['steps1']} --steps2={budget['steps2']}"
    command = f"python train.py {ARMS[arm]} {steps} --bf16=true --evaluate=false --seed={seed}"
    arguments = [sys.executable, *command.split()[1:], f"--out={folder}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{command}: failed with status {done.returncode}: {done.stderr[-300:]}")
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    result = {
        "arm": arm,
        "seed": seed,
        "command": command,
        "flags": ARMS[arm],
        "budget": budget,
        "weights": checksums(),
        "seconds_per_step": last["seconds"] / (last["step"] + 1),
    }
    with EVALUATION:
        result |= evaluate(folder / "model", budget["count"], arm)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    shutil.rmtree(folder)
    return result


def evaluate(folder, count, arm):
    """Return the main score of every task, the tokens of an image, and the FLOPs to read one."""
    # Imported here: --help and --report do not need torch.
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import eval as world_eval
    from mllm import MLLM
    from toy import video
    from toy.scenes import task_questions

    model = MLLM.from_pretrained(folder, device=cli.pick_device("auto"))
    if arm.startswith("video-"):
        scores = video.evaluate(model, max(1, count // 2))
        return {"scores": scores, "tokens": model.tokens_per_image}
    scores = {}
    for task in TASKS:
        images, texts, targets = task_questions(task, count)
        answers = world_eval.answer(model, images, texts, 50)
        scores[task], *_ = world_eval.score(task, answers, targets).values()
    # The counter sees the matmuls of this kernel only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(images[:1], texts[:1], 1)
    return {"scores": scores, "tokens": model.tokens_per_image, "flops": counter.get_total_flops()}


def read_run(config, arm, seed):
    """Read a finished run, or return None. Raises InputError if it is another training."""
    path = Path(config.out, f"{arm}-{seed}.json")
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same_weights = result["weights"].items() <= checksums().items()
    if (result["flags"], result["budget"]) != (ARMS[arm], config.budget) or not same_weights:
        raise InputError(f"{path}: other flags, budget or checkpoints; choose another --out")
    return result


def run_all(config):
    """Run the arms of the tables that are not finished, seed by seed."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    wanted = [arm for name in config.table for _, arm, _ in rows_of(name)]
    arms = [arm for arm in ARMS if arm in wanted and (arm in QUICK or not config.quick)]
    runs = [(arm, seed) for seed in range(config.seeds) for arm in arms]
    missing = [run for run in runs if not read_run(config, *run)]
    finished = len(runs) - len(missing)
    print(f"{len(runs)} runs of {len(arms)} arms, {finished} finished before", flush=True)
    # For each train.py.
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // config.jobs))
    with ThreadPoolExecutor(config.jobs) as pool:
        # An error or Ctrl-C cancels the runs that have not started.
        for result in pool.map(partial(run_arm, config), missing):
            finished += 1
            scores = [f"{task} {value:.1%}" for task, value in result["scores"].items()]
            name = f"{finished} of {len(runs)}, {result['arm']}-{result['seed']}"
            print(f"{name}: {', '.join(scores)}", flush=True)
    print(f"\nnext: python -m toy.findings --report --out={config.out}")


# --- the report ---------------------------------------------------------------------------


def read_results(config):
    """Read all finished runs -> {arm: runs, by seed}."""
    results = {}
    for arm in ARMS:
        runs = [read_run(config, arm, seed) for seed in range(config.seeds)]
        results[arm] = [run for run in runs if run]
    return results


def percent(runs, key):
    """Write a score's mean, and its sample standard deviation over several seeds."""
    if key not in runs[0]["scores"]:
        return "–"
    values = [100 * run["scores"][key] for run in runs]
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(runs) > 1 else mean


def markdown(columns, rows):
    """Write a table -> lines."""
    lines = [f"| {' | '.join(cells)} |" for cells in (["", *columns], *rows)]
    lines.insert(1, "|" + "---|" * (len(columns) + 1))
    return lines


def finished_rows(name, results):
    """Return (label, runs, their seeds, the paper's numbers) of each row that has runs."""
    rows = []
    for label, arm, paper in rows_of(name):
        if results[arm]:
            seeds = ", ".join(str(run["seed"]) for run in results[arm])
            rows.append((label, results[arm], seeds, paper))
    return rows


def task_table(name, results):
    """Write an arm per row: scores, cost of an image, the paper's numbers."""
    rows = []
    for label, runs, seeds, paper in finished_rows(name, results):
        # The median: a busy moment of the machine is not the arm's cost.
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        cost = f"{runs[0]['tokens']}", f"{runs[0]['flops'] / 1e6:.0f}", f"{seconds:.3f}"
        rows.append([label, *(percent(runs, task) for task in TASKS), *cost, seeds, paper])
    paper = TABLES[name].splitlines()[0]
    return markdown([*TASKS.values(), "tokens", "MFLOPs", "s a step", "seeds", paper], rows)


def video_table(name, results):
    """Write a question and an arm per row, a way to show the clip per column."""
    lines = []
    for tasks, columns in VIDEO:
        columns, rows = columns.split("; "), []
        for task in tasks.split():
            for label, runs, seeds, _ in finished_rows(name, results):
                cells = [percent(runs, f"{task}, {column}") for column in columns]
                rows.append([f"{task}, {label}", *cells, seeds])
        lines += ["", *markdown([*columns, "seeds"], rows)]
    return lines[1:]


def section(name, results):
    """Write a table of the page as text, with what its runs share."""
    runs = [run for _, runs, *_ in finished_rows(name, results) for run in runs]
    budget, weights = runs[0]["budget"], {}
    for run in runs:
        weights |= run["weights"]
    if name == "video":
        asked, table = f"{max(1, budget['count'] // 2)} clips", video_table(name, results)
    else:
        asked, table = f"{budget['count']} questions a task", task_table(name, results)
    checkpoints = ", ".join(f"{name} {weights[name]}" for name in sorted(weights))
    steps = f"{budget['steps1']} + {budget['steps2']} steps"
    first = "Percent, mean ± sample standard deviation over the seeds; "
    return "\n".join([f"{first}{steps}, {asked}; checkpoints {checkpoints}.", "", *table])


def report(config):
    """Put every table between its two marks in the page. The rest is written by hand."""
    results, page = read_results(config), Path(config.page)
    text = page.read_text(encoding="utf-8")
    if not any(results.values()):
        raise InputError(f"{config.out}: no finished run; the page has --out=runs/findings")
    for name in config.table:
        if not finished_rows(name, results):
            print(f"{name}: not run; its table stays as it is")
            continue
        start, end = f"<!-- {name}: toy.findings --report -->\n", f"\n<!-- {name}: end -->"
        if start not in text or end not in text:
            raise InputError(f"{page}: needs the lines {start.strip()} and {end.strip()}")
        body = section(name, results)
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{body}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {sum(map(len, results.values()))} runs")


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    if config.report:
        report(config)
    else:
        run_all(config)


if __name__ == "__main__":
    cli.run(main)
