"""The layout: which file may import which, how large files are, and how many `train.py` runs."""

import ast
import inspect
import sys
from pathlib import Path

from conftest import ROOT, in_process
from count import count
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train

ROOMS = ("common", "toy", "benchmarks", "interop", "tools")
# Modules of a group import only those of the groups before it, and of the same group downwards.
LAYERS = [
    ["common"],
    ["vit", "dinov2", "clip", "llama", "connector", "dialogue", "interop.phi"],
    ["mllm"],
    ["data"],
    ["toy.world", "toy.scenes", "interop.load", "interop.llava"],
    ["train", "sample", "eval"],
    ["benchmarks", "tools", "toy", "interop"],
]
# lines after `ruff format`
BUDGETS = {
    "vit": 260,
    "dinov2": 175,
    "clip": 220,
    "llama": 450,
    "connector": 330,
    "mllm": 270,
    "dialogue": 240,
    "data": 400,
    "train": 380,
    "sample": 170,
    "eval": 180,
}


def modules():
    """Return {dotted name: its imports} of all our modules, lazy imports counted."""
    paths = [*ROOT.glob("*.py")]
    for room in ROOMS:
        paths += (ROOT / room).rglob("*.py")
    found = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                found[name].add(node.module)
                found[name].update(f"{node.module}.{alias.name}" for alias in node.names)
    for name, imports in found.items():
        found[name] = {imported for imported in imports if imported in found} - set(ROOMS)
    return found


def layer_of(name):
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    room = name.partition(".")[0]
    return next(level for level, names in enumerate(LAYERS) if room in names)


def test_imports_point_one_way_and_never_from_room_to_room():
    shared = ("common", "toy.world", "toy.scenes", "interop.load", "interop.llava")
    for name, imports in modules().items():
        room = name.partition(".")[0]
        for imported in imports:
            target = imported.partition(".")[0]
            assert layer_of(imported) <= layer_of(name), f"{name} imports {imported}"
            if target in ROOMS and room in ROOMS and target != room:
                assert imported.startswith(shared), f"{name} imports {imported}"


def test_no_imports_in_a_circle():
    graph, done = modules(), set()

    def visit(name, path):
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_lecture_fits_its_budgets():
    lectures = {path.stem: count(path) for path in ROOT.glob("*.py")}
    assert lectures.keys() == BUDGETS.keys()
    over = {name: lines for name, (lines, _) in lectures.items() if lines > BUDGETS[name]}
    assert not over
    assert sum(lines for lines, _ in lectures.values()) <= 2900
    assert sum(tokens for _, tokens in lectures.values()) <= 17_000


def test_the_house_fits_its_budget():
    paths = [*ROOT.glob("*.py")]
    for room in ROOMS:
        paths += (ROOT / room).rglob("*.py")
    lines, tokens = map(sum, zip(*map(count, paths), strict=True))
    assert lines <= 11_500 and tokens <= 70_000


def traced(arguments):
    """Train to the first optimizer step. Print the files whose functions run."""
    run = set()

    def trace(frame, event, argument):
        # Functions are optimized code; module and class bodies are not.
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            run.add(frame.f_code.co_filename)

    def stop(optimizer, arguments, keywords):
        sys.setprofile(None)
        print(*run, sep="\n")
        sys.exit()

    register_optimizer_step_pre_hook(stop)
    sys.setprofile(trace)
    train.main(arguments)


def test_train_runs_few_modules_and_none_of_the_other_rooms(clean_run):
    done = in_process(traced, ["--out=run"])
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines() if line.startswith(str(ROOT))]
    names = {str(file.relative_to(ROOT)) for file in files if file.parent.name != "tests"}
    assert "train.py" in names
    assert not [name for name in names if name.startswith(("interop", "benchmarks", "tools"))]
    assert len(names) <= 14, sorted(names)
