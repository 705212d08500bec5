"""Run a lesson's notebook in Jupyter. Skipped without requirements-dev.txt."""

import pytest
from conftest import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_notebooks_are_valid_and_the_first_one_runs_in_its_own_folder():
    import nbformat

    folder = ROOT / "docs" / "notebooks"
    first, *others = [nbformat.read(path, as_version=4) for path in sorted(folder.iterdir())]
    for content in [first, *others]:
        nbformat.validate(content)
    nbclient.NotebookClient(first, resources={"metadata": {"path": str(folder)}}).execute()
    assert "large yellow square" in str(first.cells)
