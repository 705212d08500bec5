"""What every test shares: the project's root on the path, two threads, and where the real inputs lie (if they do)."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                                   # no test needs the network, none may use it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")                 # on shared cores, spinning threads slow each other down
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real():
    """The folder of real photographs, dialogues and tokenizers, which is not part of this repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}")
    return folder


def relative_error(ours, reference):
    """‖a−b‖ / ‖b‖ in float64; NaN never passes a comparison with it."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()


def recorded(variant):
    """tests/fixtures/<variant>: (checkpoint folder, {name: tensor} that transformers computed with it)."""
    folder = ROOT / "tests" / "fixtures" / variant
    return folder, load_file(folder / "expected.safetensors")
