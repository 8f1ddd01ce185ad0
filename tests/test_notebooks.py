"""The notebooks run from top to bottom, are kept without outputs, and their pages are of these cells."""

import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
SECONDS = 300  # for one cell; a notebook takes well under a minute on a free machine
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@every_notebook
def test_notebook_is_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@every_notebook
def test_the_page_is_that_of_the_notebook(name):
    """Made by the command in CONTRIBUTING.md: after a change of a notebook it is to be made again."""
    page = (ROOT / "docs" / "notebooks" / f"{name}.md").read_text()
    for cell in read(name).cells:
        assert cell.source in page


@every_notebook
@pytest.mark.filterwarnings("default")  # those of the Jupyter client are not ours
def test_notebook_runs(name):
    notebook = read(name)
    for cell in notebook.cells:  # train for a moment
        cell.source = re.sub(r"epochs=\d+", "epochs=1", cell.source)
        cell.source = re.sub(r"^(\S*.*\bSECONDS\b.* = .*)$", r"\1\nSECONDS = 0.2", cell.source, flags=re.M)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()
    printed = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not any("Warning" in text for text in printed), printed
