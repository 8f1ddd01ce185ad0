"""The notebooks run from top to bottom, and are kept without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
SECONDS = 300  # for one cell; a notebook takes well under a minute on a free machine

every_notebook = pytest.mark.parametrize("name", ["quickstart", "how_it_works", "pinn", "paper_problems"])


def test_there_is_no_other_notebook():
    assert len(list(FOLDER.glob("*.ipynb"))) == 4


@every_notebook
def test_notebook_is_kept_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@every_notebook
@pytest.mark.filterwarnings("default")  # those of the Jupyter client are not ours
def test_notebook_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not any("Warning" in text for text in printed), printed
