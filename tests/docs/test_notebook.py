"""docs/notebooks/first_student.ipynb runs from its first cell to its last."""

import pytest
from paths import ROOT

nbformat = pytest.importorskip("nbformat")
PATH = ROOT / "docs" / "notebooks" / "first_student.ipynb"


def test_it_holds_no_outputs():
    cells = nbformat.read(PATH, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.long
def test_it_runs_headless_on_small_input(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(PATH, as_version=4)
    (given,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    given.source += f"\nconfig, workdir = 'configs/smoke.py', {str(tmp_path / 'run')!r}"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": PATH.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [kind for output in outputs for kind in output.get("data", ())]
    assert shown.count("image/png") == 3 and shown.count("text/markdown") == 1
    (table,) = (o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", ()))
    assert "| student | 3 |" in table
