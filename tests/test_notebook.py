"""The notebook as it is committed; test_browser.py, test_readme.py and test_rerun.py run it."""

import re
import statistics
from pathlib import Path

import nbformat

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
    assert statistics.median(lines) <= 5
    assert sum(n <= 10 for n in lines) >= 0.8 * len(lines)
    assert max(lines) <= 25
    assert statistics.mean(introduced) >= 0.75


def test_every_link_leads_to_a_heading():
    headings = {line.lstrip("# ").replace(" ", "-") for line in re.findall(r"^#+ .*$", TEXT, re.M)}
    links = set(re.findall(r"\]\(#([^)]*(?:\([^)]*\)[^)]*)*)\)", TEXT))
    assert len(links) > 10
    assert not links - headings
