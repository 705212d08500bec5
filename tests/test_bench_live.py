"""The bench's command, with transformers and with this checkout as the other one."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("transformers")


def bench(*flags):
    """Return {(contender, value): number} and the ratios, {(value, peer): number}."""
    command = [sys.executable, "-m", "tools.bench", *flags, "--repeats=1", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    values = {}
    for line in done.stdout.splitlines():
        contender = line.partition(",")[0]
        for key, number in re.findall(r", (\w+) ([\d.e-]+)", line):
            values[contender, key] = float(number)
    ratios = re.findall(r"(?m)^(\w+): ([\d.]+) times as fast as (\S+)$", done.stdout)
    return values, {(key, peer): float(number) for key, number, peer in ratios}


def test_decoding_is_compared():
    flags = ["--size=160m", "--dtype=float32", f"--vs=transformers,{ROOT}"]
    found, ratios = bench("decode", *flags)
    for name in ("ours", "ours_packed", "transformers", "transformers_static", f"ours of {ROOT}"):
        assert 0 < found[name, "token"] < found[name, "first"]
    assert ratios["token", "transformers"] > 0 and ratios["first", str(ROOT)] > 0


def test_all_contenders_train_the_same_model():
    """Their first losses are equal: the same weights and dialogues."""
    flags = ["--vs=transformers", "--batch=1", "--stage=1", "--dtype=float32"]
    found, _ = bench("train", *flags)
    ours = found["ours", "loss"]
    assert found["ours_compiled", "loss"] == pytest.approx(ours, rel=1e-4)
    assert found["transformers", "loss"] == pytest.approx(ours, rel=1e-4)
