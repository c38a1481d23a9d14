"""The notebooks: stripped in git, and each runs from the first cell to the last on simulated scenes."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_they_are_there_in_order():
    assert [book.name[:2] for book in BOOKS] == [f"{n:02d}" for n in range(1, len(BOOKS) + 1)]
    assert len(BOOKS) >= 2


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_git_holds_no_outputs_and_each_says_what_to_change_for_real_data(book):
    cells = json.loads(book.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert cells[0]["source"][0].startswith("# ")
    assert any(cell["source"][0].strip() == "## With real data" for cell in cells if cell["cell_type"] == "markdown")
    text = "".join("".join(cell["source"]) for cell in code)
    assert "from pipeline." not in text  # only public names
    assert "import pipeline." not in text


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_it_runs(book, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    made = nbformat.read(book, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(made, timeout=900, startup_timeout=300, resources=where).execute()
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
