"""The notebook as it is committed, and as it runs: on MNIST, and without network on the offline digits."""

import os
import re
import shutil
import statistics
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
BOOK = nbformat.read(ROOT / "notebook.ipynb", as_version=nbformat.NO_CONVERT)
CODE = [cell for cell in BOOK.cells if cell.cell_type == "code"]
TEXT = "\n".join(cell.source for cell in BOOK.cells if cell.cell_type == "markdown")
OUTPUTS = [output for cell in CODE for output in cell.outputs]


def test_it_was_executed_once_from_top_to_bottom():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))


def test_its_outputs_are_clean():
    assert not [
        output for output in OUTPUTS if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert "application/vnd.jupyter.widget-view+json" not in str(OUTPUTS)
    assert "widgets" not in BOOK.metadata
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt)/", str(BOOK))
    assert not re.search(r"<progress", str(OUTPUTS)), "a half-drawn progress bar was saved"


def test_its_form():
    assert (BOOK.nbformat, BOOK.nbformat_minor) >= (4, 5)
    assert BOOK.metadata.kernelspec.name == "python3"
    assert (ROOT / "notebook.ipynb").stat().st_size < 1_000_000


def test_its_cells_are_short_and_introduced():
    lines = [len(cell.source.splitlines()) for cell in CODE]
    introduced = [
        before.cell_type == "markdown"
        for before, cell in zip(BOOK.cells, BOOK.cells[1:], strict=False)
        if cell.cell_type == "code"
    ]
    assert statistics.median(lines) <= 6
    assert sum(n <= 10 for n in lines) >= 0.8 * len(lines)
    assert max(lines) <= 25
    assert statistics.mean(introduced) >= 0.85


def test_every_link_leads_to_a_heading():
    headings = {line.lstrip("# ").replace(" ", "-") for line in re.findall(r"^#+ .*$", TEXT, re.M)}
    links = set(re.findall(r"\]\(#([^)]*(?:\([^)]*\)[^)]*)*)\)", TEXT))
    assert len(links) > 10
    assert not links - headings


def run_notebook(project: Path, **environment) -> nbformat.NotebookNode:
    """The quick form of the notebook, executed in a copy of the project, started from another folder."""
    shutil.copytree(ROOT / "mnist_helpers", project / "mnist_helpers")
    shutil.copy(ROOT / "model.pth", project)
    elsewhere = project / "some" / "folder"
    elsewhere.mkdir(parents=True)
    book = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(elsewhere)}})
    client.execute(env={**os.environ, "QUICK": "1", **environment})
    return book


def show_text(book: nbformat.NotebookNode) -> str:
    """Everything that the notebook has printed."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.usefixtures("mnist")
def test_it_runs_on_mnist(tmp_path):
    places = {"MNIST_ROOT": os.environ.get("MNIST_ROOT", str(ROOT / "data"))}
    text = show_text(run_notebook(tmp_path, **places))
    assert "MNIST: 60,000 training and 10,000 test digits" in text
    accuracy = float(re.search(r"MNIST: (\d+\.\d+)% of 10,000 test digits right", text).group(1))
    assert 97 < accuracy < 100
    assert (tmp_path / "model.pth").read_bytes() == (ROOT / "model.pth").read_bytes()
