"""The bench's command, with transformers and with this checkout as the other one."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("transformers")


def bench(*flags):
    command = [sys.executable, "-m", "tools.bench", *flags, "--repeats=1", "--device=cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_decoding_is_compared():
    result = bench("decode", "--layers=1", "--vs=transformers", f"--against={ROOT}")
    for name in ("ours", "ours_packed", "transformers", "transformers_static", "before"):
        assert 0 < result[name]["token"] < result[name]["first"]
    assert result["token_times_transformers"] > 0 and result["first_times_before"] > 0


def test_all_contenders_train_the_same_model():
    """Their first losses are equal: the same weights and dialogues."""
    flags = ["--vs=transformers", "--batch=1", "--stage=1", "--dtype=float32"]
    found = bench("train", *flags)["stage1"]
    ours = found["ours"]["loss"]
    assert found["ours_compiled"]["loss"] == pytest.approx(ours, rel=1e-4)
    assert found["transformers"]["loss"] == pytest.approx(ours, rel=1e-4)
