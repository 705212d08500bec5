"""Steps on a real GPU in bfloat16, compared with a CPU in float32. Skipped without a GPU.

DEVICE=cpu runs on a CPU in bfloat16 instead, to test this file.
"""

import os

import pytest
import torch
from conftest import records

import train

DEVICE = os.environ.get("DEVICE", "cuda")
FLAGS = "--steps1=1 --steps2=1 --log_every=1 --evaluate=false --activation_checkpointing".split()
# The last two are compiled, as by default on a GPU.
WAYS = ("--connector=comm --compile=false", "--connector=dense", "--memory_budget=0.3")
pytestmark = [
    pytest.mark.usefixtures("clean_run"),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_both_stages_are_those_of_a_cpu(way):
    """The toy world. bfloat16 has a relative error of 2 ** -8, so losses may differ by 2%."""
    flags = [*FLAGS, *way.split()]
    train.main([*flags, "--device=cpu", "--out=exact"])
    train.main([*flags, f"--device={DEVICE}", "--bf16", "--out=run"])
    for exact, ours in zip(records("exact"), records("run"), strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert ours["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)
