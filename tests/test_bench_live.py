"""The bench's command, with transformers and with this checkout as the other one."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("transformers")


def bench(*flags):
    """Return {(contender, value): number} and, of the ratios, {(value, peer): number}."""
    command = [sys.executable, "-m", "tools.bench", *flags, "--dtype=float32", "--device=cpu"]
    done = subprocess.run([*command, "--repeats=1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        for key, number in re.findall(r", (\w+) ([\d.e-]+)", line):
            found[line.partition(",")[0], key] = float(number)
    for key, ratio, peer in re.findall(r"(\w+): (\S+) times as fast as (\S+)", done.stdout):
        found[key, peer] = float(ratio)
    return found


def test_contenders_are_compared_and_train_from_the_same_loss():
    found = bench("decode", "--size=160m", f"--vs=transformers,{ROOT}")
    assert found["token", "transformers"] > 0 and found["first", str(ROOT)] > 0
    found = bench("train", "--vs=transformers", "--batch=1", "--stage=1")
    for name in ("ours_compiled", "transformers"):
        assert found[name, "loss"] == pytest.approx(found["ours", "loss"], rel=1e-4)
