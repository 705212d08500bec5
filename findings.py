"""The central experiments of COMM and the Dense Connector once more, small: on the embedded world, with the tiny checkpoints.

    python findings.py                      every arm, three seeds each: planned for an hour and a half on two CPU cores
    python findings.py --quick              one seed, fewer arms, fewer steps: at most twenty minutes
    python findings.py --table=towers       one table's arms (layers, towers, merging, dense, video)
    python findings.py --report             what has been run -> the tables and figures of docs/findings.md

An arm is a name and the flags of `train.py` that make it what it is. Every run of an arm is `train.py` with these flags, the
budget that all arms share, and a seed, in a process of its own; the model is then asked about held-out scenes, and what it
scored lies in out/findings/ARM-SEED.json beside the command:

    {arm, seed, command, flags, budget, weights, scores: {task: value}, tokens a picture, FLOPs, seconds a step}

A run that has such a file is not run again, so the same command goes on after a stop. A file that holds something else (other
flags, another budget, other checkpoints) is an error: tables compare only what was trained alike. Several runs go on side by
side, each on its own share of the CPU cores: models this small do not fill two.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import cli
from hub import InputError

HERE = Path(__file__).resolve().parent
TASKS = {"rec": "REC", "reg": "REG", "presence": "presence", "count": "count"}     # of eval.py, with a column's heading
ASKING = threading.Lock()                                            # train.py runs side by side, questions one after the other
VIDEO = [(("presence", "count"), ("best guess", "another clip", "one frame", "eight frames", "one picture", "that eight times",
                                  "with seven empty")),               # of video.py: what is asked, and how a clip is shown
         (("presence", "count"), ("eight frames, unpooled", "one picture, unpooled", "that eight times, unpooled",
                                  "with seven empty, unpooled")),
         (("direction",), ("another clip", "eight frames", "eight frames, unpooled", "same answer backwards", "from two boxes"))]
DEPTH = 6                                                            # blocks of each tiny tower
DINO = " --vision=weights/dinov2"                                    # else train.py takes weights/clip

# --- the arms ---------------------------------------------------------------------------------------------------------

ARMS = [(f"clip-layer{i}", f"--connector=linear --layer={i}") for i in range(DEPTH + 1)]
ARMS += [(f"dinov2-layer{i}", f"--connector=linear --layer={i}" + DINO) for i in range(DEPTH + 1)]
ARMS += [("clip-merged", "--connector=comm_clip")]
ARMS += [(f"dinov2-merged-mlp{depth}", f"--connector=comm_dino --dino_depth={depth}") for depth in (0, 1, 2, 4, 8)]
ARMS += [("comm", "--connector=comm")]
ARMS += [(f"comm-{merge}", f"--connector=comm --merge={merge}") for merge in ("mean_half", "mean_all", "layerscale")]
for tower, vision in (("clip", ""), ("dinov2", DINO)):
    ARMS += [(f"{tower}-{kind}", f"--connector={kind}" + vision) for kind in ("mlp", "sti", "sci", "dci", "efficient")]
    ARMS += [(f"{tower}-dci3", "--connector=dci --groups=3" + vision)]
ARMS += [(f"video-{kind}", f"--connector={kind}") for kind in ("mlp", "dci", "efficient", "comm")]      # other questions
ARMS += [(f"{tower}-layer5", f"--connector=linear --layer=5 --vision=weights/{tower}") for tower in ("mae", "deit")]

QUICK = ["clip-layer1", "clip-layer3", "clip-layer5", "dinov2-layer1", "dinov2-layer3", "dinov2-layer5", "mae-layer5",
         "deit-layer5", "clip-merged", "dinov2-merged-mlp0", "dinov2-merged-mlp2", "comm", "comm-mean_all", "clip-mlp",
         "clip-sci", "clip-dci", "clip-efficient", "video-dci"]

# A table: what the paper's column holds, then rows of (what the reader sees, arm, the paper's numbers).
TABLES = {
    "layers": ("paper", [(f"CLIP hidden[{i}]", f"clip-layer{i}", "–") for i in range(DEPTH + 1)]
               + [(f"DINOv2 hidden[{i}]", f"dinov2-layer{i}", "–") for i in range(DEPTH + 1)]),
    "towers": ("paper: REC average, POPE", [
        ("CLIP, linear", "clip-layer5", "47.3, 82.3"),
        ("DINOv2, linear", "dinov2-layer5", "54.8, 78.3"),
        ("CLIP, merged", "clip-merged", "70.0, 83.4"),
        ("DINOv2, merged, two MLPs", "dinov2-merged-mlp2", "74.9, 84.4"),
        ("COMM", "comm", "72.8, 83.6"),
        ("DINOv2, merged, no MLP", "dinov2-merged-mlp0", "63.5, 79.5"),
        ("DINOv2, merged, one MLP", "dinov2-merged-mlp1", "73.1, 83.3 (as \"DINOv2 with merging\": 72.8, 83.3)"),
        ("DINOv2, merged, four MLPs", "dinov2-merged-mlp4", "50.3, 82.2"),
        ("DINOv2, merged, eight MLPs", "dinov2-merged-mlp8", "9.8, 56.8"),
        ("MAE, one layer", "mae-layer5", "65.7, 72.2"),
        ("DeiT, one layer", "deit-layer5", "24.8, 72.7")]),
    "merging": ("paper: REC average, POPE", [
        ("mean over the second half", "comm-mean_half", "–"),
        ("mean over all", "comm-mean_all", "–"),
        ("layer scale", "comm-layerscale", "–"),
        ("LN + Linear, layer scale", "comm", "72.8, 83.6")]),
    "dense": ("paper: GQA, POPE", [
        ("CLIP, one layer, MLP", "clip-mlp", "62.0, 85.9"),
        ("CLIP, STI", "clip-sti", "63.3, 85.8"),
        ("CLIP, SCI", "clip-sci", "63.7, 86.1"),
        ("CLIP, DCI, 2 groups", "clip-dci", "63.8, 86.6"),
        ("CLIP, DCI, 3 groups", "clip-dci3", "–"),
        ("CLIP, Efficient", "clip-efficient", "62.8, –"),
        ("DINOv2, one layer, MLP", "dinov2-mlp", "–"),
        ("DINOv2, STI", "dinov2-sti", "–"),
        ("DINOv2, SCI", "dinov2-sci", "–"),
        ("DINOv2, DCI, 2 groups", "dinov2-dci", "–"),
        ("DINOv2, DCI, 3 groups", "dinov2-dci3", "–"),
        ("DINOv2, Efficient", "dinov2-efficient", "–")]),
    "video": ("", [
        ("MLP", "video-mlp", ""),
        ("DCI", "video-dci", ""),
        ("Efficient", "video-efficient", ""),
        ("COMM", "video-comm", "")])}


@dataclass
class Config:
    table: list[str] = field(default_factory=lambda: [])  # layers, towers, merging, dense, video; empty: all of them
    quick: bool = False                  # one seed, fewer arms, a smaller budget
    report: bool = False                 # train nothing, write the page (or its --table) from what has been run
    seeds: int = 0                       # runs of each arm, seeds 0, 1, ...; 0: 3, with --quick 1
    steps1: int = 0                      # of every arm's stage 1; 0: 60
    steps2: int = 0                      # of every arm's stage 2; 0: 240, with --quick 200
    count: int = 0                       # questions a task; 0: 200, with --quick 100
    jobs: int = 0                        # runs side by side; 0: one a CPU core, up to 8
    out: str = ""                        # folder of the results; empty: out/findings, with --quick out/findings-quick
    page: str = ""                       # what --report writes into, figures beside it; empty: docs/findings.md

    def __post_init__(self):
        for key in ("seeds", "steps1", "steps2", "count", "jobs"):
            if getattr(self, key) < 0:
                raise InputError(f"--{key}={getattr(self, key)}: should be 1 or more")
        for name in self.table:
            if name not in TABLES:
                raise InputError(f"--table={name}: there are {', '.join(TABLES)}")
        self.seeds = self.seeds or (1 if self.quick else 3)
        self.steps1 = self.steps1 or 60
        self.steps2 = self.steps2 or (200 if self.quick else 240)
        self.count = self.count or (100 if self.quick else 200)
        self.jobs = self.jobs or min(8, os.cpu_count())
        self.out = self.out or f"out/findings{'-quick' if self.quick else ''}"
        self.page = self.page or str(HERE / "docs" / "findings.md")


# --- one run ----------------------------------------------------------------------------------------------------------

def budget_of(config):
    """What all arms share."""
    return {"steps1": config.steps1, "steps2": config.steps2, "count": config.count}


def weights_of(flags):
    """{folder of weights/ that an arm starts from: its checksum}: someone may train one anew in between."""
    from train import TINY                                           # imported here, as torch is: --help and --report are quick
    kind = re.search(r"--connector=(\w+)", flags)[1]
    towers = re.findall(r"--vision=weights/(\w+)", flags) or TINY.get(kind, ("clip",))
    files = {name: HERE / "weights" / name / "model.safetensors" for name in (*towers, "llama")}
    return {name: f"{zlib.crc32(file.read_bytes()):08x}" for name, file in files.items()}


def command_of(flags, budget, seed):
    return (f"python train.py {flags} --steps1={budget['steps1']} --steps2={budget['steps2']} --bf16=true --evaluate=false "
            f"--seed={seed}")


def read_result(path):
    """A finished run, or None: no file, or a torn one, which is then as good as none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"flags", "budget", "weights", "scores", "command", "seed"} <= set(result) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def run_arm(arm, flags, seed, budget, out):
    """Train, ask, and write out/ARM-SEED.json, which appears whole or not at all."""
    folder = out / f"{arm}-{seed}.run"
    shutil.rmtree(folder, ignore_errors=True)                        # of a run that was stopped: an arm starts from its beginning
    command = command_of(flags, budget, seed)
    done = subprocess.run([sys.executable, *command.split()[1:], f"--out={folder}"], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise InputError(f"{command}: ended with status {done.returncode}, and said: {said}")
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    with ASKING:
        found = ask(folder / "model", budget["count"], arm)
    result = {"arm": arm, "seed": seed, "command": command, "flags": flags, "budget": budget, "weights": weights_of(flags),
              "seconds_per_step": last["seconds"] / (last["step"] + 1), **found}
    partial = out / f"{arm}-{seed}.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / f"{arm}-{seed}.json")
    shutil.rmtree(folder)                                            # the scores are what is kept
    return result


def ask(folder, count, arm):
    """Every task's first score on `count` held-out questions, of a video arm video.py's scores, and what one picture costs: its
    tokens, and the FLOPs of reading it with a question once."""
    from torch.nn.attention import SDPBackend, sdpa_kernel           # imported here: --help and --report do not wait for torch
    from torch.utils.flop_counter import FlopCounterMode

    import eval as evaluation
    import video
    from mllm import MLLM
    model, scores = MLLM.from_pretrained(folder, device=cli.pick_device("auto")), {}
    if arm.startswith("video-"):
        return {"scores": video.evaluate(model, max(1, count // 2)), "tokens": model.tokens_per_image}
    for task in TASKS:
        pictures, texts, truths = evaluation.questions(task, count)
        said = evaluation.answer(model, pictures, texts, evaluation.MAX_NEW_TOKENS[task], 50)
        scores[task] = next(iter(evaluation.score(task, said, truths).values()))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # the one kernel whose products it sees
        model.generate(pictures[:1], texts[:1], 1)
    return {"scores": scores, "tokens": model.tokens_per_image, "flops": counter.get_total_flops()}


def run_all(config):
    """The arms of the tables that were asked for, seed by seed: after the first round every arm has been seen once."""
    out, budget = Path(config.out).resolve(), budget_of(config)
    wanted = {arm for name in config.table or TABLES for _, arm, _ in TABLES[name][1]}
    arms = [(arm, flags) for arm, flags in ARMS if arm in wanted and (arm in QUICK or not config.quick)]
    runs = [(arm, flags, seed) for seed in range(config.seeds) for arm, flags in arms]
    out.mkdir(parents=True, exist_ok=True)
    open_runs = []
    for arm, flags, seed in runs:
        path = out / f"{arm}-{seed}.json"
        former = read_result(path)
        if former is None:
            open_runs.append((arm, flags, seed))
        elif (former["flags"], former["budget"], former["weights"]) != (flags, budget, weights_of(flags)):
            raise InputError(f"{path}: holds a run of {former['flags']} with {former['budget']} from {former['weights']}, now "
                             f"it is {flags} with {budget} from {weights_of(flags)}: name another --out, or remove that file")
    print(f"{len(runs)} runs of {len(arms)} arms, {len(runs) - len(open_runs)} of them finished before", flush=True)
    began = time.time()
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // config.jobs))           # of each train.py below
    with ThreadPoolExecutor(config.jobs) as pool:                    # a thread waits for one train.py after the other
        try:
            done = [pool.submit(run_arm, *run, budget, out) for run in open_runs]
            for i, run in enumerate(as_completed(done), 1):
                result = run.result()
                left = (time.time() - began) / i * (len(open_runs) - i)
                scores = ", ".join(f"{TASKS.get(task, task)} {value:.1%}" for task, value in result["scores"].items())
                print(f"{result['arm']}-{result['seed']}: {scores}   {left / 60:.0f} minutes left", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)           # else it would first run all that are left
            raise
    print(f"\nnext: python findings.py --report --out={config.out}")


# --- the report -------------------------------------------------------------------------------------------------------

def read_results(out):
    """-> {arm: its runs in the order of their seeds}. All of them must have had the same budget."""
    flags, found, first = dict(ARMS), {}, {}
    for path in sorted(Path(out).glob("*.json")):
        result = read_result(path)
        if result is None or result["arm"] not in flags:
            print(f"{path}: not a finished run of an arm, left out", file=sys.stderr)
            continue
        own = {"flags": result["flags"], "budget": result["budget"], **result["weights"]}
        first = {"budget": result["budget"]} | first | {"flags": flags[result["arm"]]}       # a checkpoint's: of its first run
        first = result["weights"] | first
        for key, value in own.items():
            if value != first[key]:
                raise InputError(f"{path}: was run with {key} {value}; {'the arm has' if key == 'flags' else 'other runs had'} "
                                 f"{first[key]}: runs that differ are not compared")
        found.setdefault(result["arm"], []).append(result)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def mean_and_spread(values):
    """The mean, and the sample standard deviation; that of a single run is None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(values):
    mean, spread = mean_and_spread(values)
    return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def section(name, results):
    """A table of the page as text: its numbers, then the command of every row."""
    heading, rows = TABLES[name]
    runs = [run for _, arm, _ in rows for run in results.get(arm, [])]
    budget, weights = runs[0]["budget"], {}
    for run in runs:
        weights |= run["weights"]
    checksums = ", ".join(f"{name} {weights[name]}" for name in sorted(weights))
    table = video_rows(rows, results) if name == "video" else task_rows(rows, results, heading)
    asked = f"{max(1, budget['count'] // 2)} clips" if name == "video" else f"{budget['count']} questions a task"
    lines = [f"Percent, mean ± sample standard deviation over the seeds; {budget['steps1']} + {budget['steps2']} steps, "
             f"{asked}; checkpoints {checksums}.", "", *table]
    commands = {arm: results[arm] for _, arm, _ in rows if arm in results}
    lines += ["", "Commands (then with the other seeds):", "", "```sh", *(own[0]["command"] for own in commands.values()), "```"]
    return "\n".join(lines)


def task_rows(rows, results, heading):
    """Markdown lines, an arm a row: what it scored in TASKS, what a picture costs, the paper's numbers."""
    lines = [f"| | {' | '.join(TASKS.values())} | tokens | MFLOPs | s a step | seeds | {heading} |",
             "|" + "---|" * (len(TASKS) + 6)]
    for label, arm, paper in rows:
        cells = ["not run"] + [""] * (len(TASKS) + 3)
        if own := results.get(arm):
            cells = [percent([run["scores"][task] for run in own]) for task in TASKS]
            seconds = statistics.median(run["seconds_per_step"] for run in own)      # a machine's busy moment is no arm's cost
            cells += [f"{own[0]['tokens']}", f"{own[0]['flops'] / 1e6:.0f}", f"{seconds:.3f}"]
            cells += [", ".join(str(run["seed"]) for run in own)]
        lines.append(f"| {label} | {' | '.join(cells)} | {paper} |")
    return lines


def video_rows(rows, results):
    """Markdown lines, two tables: an arm a row for each question, a way of showing the clip a column."""
    lines = []
    for tasks, shown in VIDEO:
        lines += [f"| | {' | '.join(shown)} | seeds |", "|" + "---|" * (len(shown) + 2)]
        for task in tasks:
            for label, arm, _ in rows:
                cells = ["not run"] + [""] * len(shown)
                if own := results.get(arm):
                    keys = [f"{task}, {key}" for key in shown]
                    cells = [percent([run["scores"][key] for run in own]) if key in own[0]["scores"] else "–" for key in keys]
                    cells += [", ".join(str(run["seed"]) for run in own)]
                lines.append(f"| {task}, {label} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def draw(name, results, path):
    """The table as a picture: layers as curves over depth, the others as bars of REC and REG. Needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    def point(arm, task):                                            # -> the score in percent, and half an error bar
        mean, spread = mean_and_spread([100 * run["scores"][task] for run in results[arm]])
        return mean, spread or 0

    if name == "layers":
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
        for panel, tower in zip(panels, ("clip", "dinov2")):
            depths = [i for i in range(DEPTH + 1) if f"{tower}-layer{i}" in results]
            for task in ("rec", "reg", "presence"):
                means, spreads = zip(*(point(f"{tower}-layer{i}", task) for i in depths)) if depths else ((), ())
                panel.errorbar(depths, means, spreads, marker="o", capsize=3, label=TASKS[task])
            panel.set(title={"clip": "CLIP", "dinov2": "DINOv2"}[tower], xlabel="hidden state")
            panel.set(xlim=(-0.3, DEPTH + 0.3), ylim=(0, 100))
        panels[0].set_ylabel("%")
        panels[1].legend(loc="upper right", ncols=3)
    elif name == "video":
        import video
        video.strip(path.with_name("findings-video-frames.png"))
        rows = [(label, arm) for label, arm, _ in TABLES[name][1] if arm in results]
        figure, panels = plt.subplots(1, 3, figsize=(9, 1.6 + 0.5 * len(rows)), sharey=True)
        shown = "another clip", "one frame", "eight frames", "one picture"
        bars = {"presence": shown, "count": shown, "direction": ("another clip", "eight frames", "from two boxes")}
        for panel, task in zip(panels, bars):
            for k, key in enumerate(bars[task]):
                means, spreads = zip(*(point(arm, f"{task}, {key}") for _, arm in rows))
                panel.barh([i + 0.2 * k for i in range(len(rows))], means, 0.19, xerr=spreads, label=key)
            panel.set(xlabel="%", xlim=(0, 100))
            panel.legend(title=task, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        panels[0].set_yticks([i + 0.3 for i in range(len(rows))], [label for label, _ in rows])
        panels[0].invert_yaxis()
    else:
        rows = [(label, arm) for label, arm, _ in TABLES[name][1] if arm in results]
        figure, panel = plt.subplots(figsize=(8, 0.6 + 0.45 * len(rows)))
        for k, task in enumerate(("rec", "reg")):
            means, spreads = zip(*(point(arm, task) for _, arm in rows))
            panel.barh([i + 0.38 * k for i in range(len(rows))], means, 0.36, xerr=spreads, label=TASKS[task])
        panel.set_yticks([i + 0.19 for i in range(len(rows))], [label for label, _ in rows])
        panel.invert_yaxis()
        panel.set(xlabel="%", xlim=(0, 100))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def report(config):
    """Put every table between its two marks in the page: all else there is written by hand."""
    results, page = read_results(config.out), Path(config.page)
    text = page.read_text(encoding="utf-8")
    if not results:
        raise InputError(f"{config.out}: no finished run; those of the page are in runs/findings (--out=runs/findings)")
    for name in config.table or TABLES:
        if not any(arm in results for _, arm, _ in TABLES[name][1]):
            print(f"{name}: not run; its table stays as it is")
            continue
        body, start, end = section(name, results), f"<!-- {name}: findings.py --report -->\n", f"\n<!-- {name}: end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise InputError(f"{page}: should have the lines {start.strip()} and {end.strip()}, once each, where the table goes")
        try:
            draw(name, results, page.with_name(f"findings-{name}.png"))
            body += f"\n\n![{name}: the table as a figure](findings-{name}.png)"
        except ImportError:
            body += "\n\nNo figure: matplotlib is not installed (`pip install -r requirements-extra.txt`)."
        text = text[:text.index(start) + len(start)] + "\n" + body + "\n" + text[text.index(end):]
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {len(results)} of {len(ARMS)} arms, {sum(map(len, results.values()))} runs")


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    (report if config.report else run_all)(config)


if __name__ == "__main__":
    cli.run(main)
