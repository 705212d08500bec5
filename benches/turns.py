"""What the sections share: contenders take turns in processes of their own, and what a turn measures there: time, memory, and the
machine's limits.
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from hub import InputError

COMMAND = Path(__file__).parents[1] / "bench.py"


def take_turns(config, contenders, **options):
    """Turns of all contenders -> {name: the medians of what its turns say}, and beside each figure `figure_range`, the least and the
    most. Memory: the most. "limits": those of all turns."""
    turns = {name: [] for name in contenders}
    for _ in range(config.repeats):
        for name in turns:
            turns[name].append(turn(config, name, **options))
    result = {}
    for name, all_of_it in turns.items():
        result[name] = medians(all_of_it)
        if "memory" in result[name]:
            result[name]["memory"] = max(one["memory"] for one in all_of_it)
    every = [one for all_of_it in turns.values() for one in all_of_it]
    if "limit_flops" in every[0]:
        found = result["limits"] = medians([{"flops": one["limit_flops"], "read": one["limit_read"]} for one in every])
        print(f"limits: {spread(found, 'flops', 1e-9, 'GFLOP/s')} in {config.dtype}, {spread(found, 'read', 1e-9, 'GB/s')} read, "
              f"on {config.device}", flush=True)
    return result


def medians(turns):
    """What each turn says, [{key: number}] -> {key: its median, f"{key}_range": [the least, the most]}."""
    found = {key: statistics.median(one[key] for one in turns) for key in turns[0]}
    return found | {f"{key}_range": [f(one[key] for one in turns) for f in (min, max)] for key in turns[0]}


def turn(config, contender, **options):
    """One turn of a contender in a process of its own -> the dict that it prints."""
    options = {"contender": contender, "device": config.device, "dtype": config.dtype} | options
    child = subprocess.run([sys.executable, COMMAND, config.what, *(f"--{key}={value}" for key, value in options.items())],
                           capture_output=True, text=True)
    if child.returncode:
        raise InputError(f"{contender} failed: {child.stderr.strip()[-300:]}")
    return json.loads(child.stdout.splitlines()[-1])


def spread(one, key="seconds", scale=1, unit="s"):
    """A median and its range as text."""
    least, most = one[f"{key}_range"]
    return f"{one[key] * scale:.3g} {unit} ({least * scale:.3g} to {most * scale:.3g})"


def fastest(result, side, key="seconds"):
    return min(one[key] for name, one in result.items() if name.startswith(side))


def limits(config):
    """What the machine can do at best -> {"limit_flops": FLOP/s of a large matrix product in the dtype, "limit_read": bytes/s of a
    sum}. Every contender's process measures it, right after its own work: a machine's rates may halve for minutes."""
    dtype = getattr(torch, config.dtype)
    from cli import keep_freed_memory
    from linear import PackedLinear, gains
    keep_freed_memory()                                              # or a product's time is that of fresh memory, too
    side, often = (8192, 20) if config.device.startswith("cuda") else (4096, 1)     # a GPU's product is over in a millisecond
    a, b = (torch.randn(side, side, device=config.device).to(dtype) for _ in range(2))
    product = PackedLinear(b) if gains(b) else lambda x: x @ b       # the faster one
    large = torch.ones(2 ** 28, device=config.device)                # 1 GiB

    def best(work):
        work()
        times = []
        for _ in range(5):
            start = wait(config.device)
            for _ in range(often):
                work()
            times.append((wait(config.device) - start) / often)
        return min(times)
    return {"limit_flops": 2 * side ** 3 / best(lambda: product(a)), "limit_read": large.numel() * 4 / best(large.sum)}


def wait(device):
    """The time when the device has done what it was given."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes at the highest: of the GPU, or of this process with its libraries (0 where the system does not say)."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else told_by_system("VmHWM")


def anonymous_memory():
    """Bytes of this process that no file backs; 0 where the system does not say."""
    return told_by_system("RssAnon")


def told_by_system(key):
    """Bytes that /proc/self/status has under `key`, 0 where there is no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def watch(highest, ended):
    while not ended.wait(0.01):
        highest.append(anonymous_memory())
