"""Run a lesson's notebook in Jupyter. Skipped without requirements-dev.txt."""

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_notebooks_are_valid_and_the_first_one_runs_in_its_own_folder(tmp_path):
    import nbformat

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
    nbclient.NotebookClient(first, resources={"metadata": {"path": str(folder)}}).execute()
    assert (tmp_path / "out" / "patches.png").is_file()
    assert "large yellow square" in str(first.cells)
