"""The bench with transformers and a notebook in Jupyter. They need requirements-dev.txt."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT


def bench(*flags):
    """Return {(contender, value): number}."""
    command = [sys.executable, "-m", "tools.bench", *flags, "--dtype=float32", "--device=cpu"]
    done = subprocess.run([*command, "--repeats=1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        for key, number in re.findall(r", (\w+) ([\d.e-]+)", line):
            found[line.partition(",")[0], key] = float(number)
    return found


def test_contenders_are_compared_and_train_from_the_same_loss():
    pytest.importorskip("transformers")
    found = bench("decode", "--size=160m", f"--vs=transformers,{ROOT}")
    assert found["transformers static", "token"] > 0 and found[f"{ROOT} ours", "first"] > 0
    found = bench("train", "--vs=transformers", "--batch=1", "--stage=1")
    for name in ("ours_compiled", "transformers padded"):
        assert found[name, "loss"] == pytest.approx(found["ours", "loss"], rel=1e-4)


def test_notebooks_are_valid_and_the_first_one_runs_in_its_own_folder(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebooks = sorted((ROOT / "docs" / "notebooks").iterdir())
    first, *others = [nbformat.read(path, as_version=4) for path in notebooks]
    for content in [first, *others]:
        nbformat.validate(content)
    # It writes out/patches.png.
    for path in ROOT.iterdir():
        if path.name not in ("docs", "out"):
            (tmp_path / path.name).symlink_to(path)
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    is_changed = False
    for cell in first.cells:
        if cell.cell_type == "markdown":
            is_changed = "```diff" in cell.source or (is_changed and "### " not in cell.source)
        elif is_changed:
            # Without the change of a file its snippet fails.
            cell.metadata["tags"] = ["raises-exception"]
    nbclient.NotebookClient(first, resources={"metadata": {"path": str(folder)}}).execute()
    assert (tmp_path / "out" / "patches.png").is_file()
    assert "large yellow square" in str(first.cells)
