"""Processes that take turns, and what each one measures."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

from common.errors import InputError
from common.speed import speed_up

ROOT = Path(__file__).resolve().parents[2]


def list_contenders(config, ours, transformers):
    """Return the names of all contenders that the options ask for."""
    contenders = [*ours]
    if config.vs:
        contenders += transformers
    if config.against:
        contenders += [name.replace("ours", "before") for name in ours]
    return contenders


def take_turns(config, contenders, **options):
    """Run all contenders in turns -> {name: medians, "limits": the machine's}."""
    turns = {name: [] for name in contenders}
    for _ in range(config.repeats):
        for name in contenders:
            turns[name].append(turn(config, name, **options))
    result = {name: medians(found) for name, found in turns.items()}
    every_turn = [one for found in turns.values() for one in found]
    limits = result["limits"] = medians(every_turn)
    flops, read = spread(limits, "limit_flops", 1e-9), spread(limits, "limit_read", 1e-9)
    print(f"limits: {flops} GFLOP/s in {config.dtype}, {read} GB/s read on {config.device}")
    return result


def medians(turns):
    """Merge [{key: number}] into {key: the median, key_range: [smallest, largest]}."""
    found = {}
    for key in turns[0]:
        values = [one[key] for one in turns]
        found[key] = statistics.median(values)
        found[f"{key}_range"] = [min(values), max(values)]
    return found


def turn(config, contender, **options):
    """Run a turn of a contender in its own process and return what it prints.

    "before..." is "ours..." in the checkout of --against.
    """
    folder = ROOT
    if contender.startswith("before"):
        folder, contender = Path(config.against), contender.replace("before", "ours")
    options = {"contender": contender, "device": config.device, "dtype": config.dtype} | options
    flags = [f"--{key}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "tools.bench", config.what, *flags]
    child = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if child.returncode:
        raise InputError(f"{contender} failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def spread(one, key, scale=1):
    """Write a median and its range."""
    smallest, largest = one[f"{key}_range"]
    return f"{one[key] * scale:.4g} ({smallest * scale:.4g} to {largest * scale:.4g})"


def ratios(result, contenders, key):
    """Compare the fastest form of ours with the fastest form of each peer."""
    ours = min(result[name][key] for name in contenders if name.startswith("ours"))
    for peer in ("transformers", "before"):
        theirs = [result[name][key] for name in contenders if name.startswith(peer)]
        if theirs:
            result[f"{key}_times_{peer}"] = min(theirs) / ours
            print(f"{key}: ours is {min(theirs) / ours:.2f} times as fast as {peer}")


def limits(config):
    """Measure the machine's best FLOP/s (a matmul) and bytes/s (a sum).

    Every process does it after its own work: the rates of a shared machine change within minutes.
    """
    dtype, device = getattr(torch, config.dtype), config.device
    # A GPU's matmul is over in a millisecond.
    side, repeats = (8192, 20) if device.startswith("cuda") else (4096, 1)
    layer = nn.Sequential(nn.Linear(side, side, bias=False, device=device, dtype=dtype))
    x = torch.randn(side, side, device=device).to(dtype)
    large = torch.ones(2**28, device=device)  # 1 GiB

    @torch.no_grad()
    def best(work, *arguments):
        times = []
        for _ in range(6):
            start = wait(device)
            for _ in range(repeats):
                work(*arguments)
            times.append((wait(device) - start) / repeats)
        return min(times)

    speed_up(layer, "batch")
    return {
        "limit_flops": 2 * side**3 / best(layer, x),
        "limit_read": large.numel() * 4 / best(large.sum),
    }


def wait(device):
    """Return the time when the device has finished its work."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Return the peak bytes of the GPU, or of this process (0 without /proc)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
