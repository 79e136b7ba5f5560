"""Cells and sections that are run again, as readers do: each shows what it showed the first time."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
BOOK = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
CELLS = [cell.id for cell in BOOK.cells if cell.cell_type == "code"]
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}  # where nothing answers

FROZEN_CLOCK = "\nimport time\ntime.perf_counter = lambda: 1.0"  # so that no output tells seconds

# Whenever section 4 is run again, these show one more run of the reader's own, which 4.3 has recorded.
GROWING = {"runs", "study-plot", "mine", "checklist"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, list]:
    """What each cell shows: twice in a row in one pass, then whenever its section is run again."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "mnist_helpers", project / "mnist_helpers")
    book = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    sections = find_sections(book)
    book.cells[sections[1][0]].source += FROZEN_CLOCK
    place = {"metadata": {"path": str(project)}}
    client = NotebookClient(book, timeout=300, resources=place, allow_errors=True, coalesce_streams=True)
    results = {cell: [] for cell in CELLS}

    def run(index):
        cell = client.execute_cell(book.cells[index], index)
        results[cell.id].append([describe_output(output) for output in cell.outputs])

    environment = {**os.environ, **OFFLINE, "no_proxy": "127.0.0.1,localhost", "QUICK": "1"}
    with client.setup_kernel(env=environment | {"MNIST_ROOT": str(project / "empty")}):
        for index in [index for number in range(1, 6) for index in sections[number]]:
            run(index)
            run(index)
        for number in (3, 4, 2, 5):  # 4 and 5 use what 3 has trained
            for index in sections[1] + sections[number]:
                run(index)
    return results


def find_sections(book: nbformat.NotebookNode) -> dict[int, list[int]]:
    """Where the code cells of each section are: `## 1.` to `## 5.`"""
    sections = {}
    for index, cell in enumerate(book.cells):
        if heading := re.match(r"## (\d)\. ", cell.source):
            sections[int(heading[1])] = []
        elif cell.cell_type == "code":
            sections[max(sections)].append(index)
    return sections


def describe_output(output: nbformat.NotebookNode) -> str:
    """Its kind and its text, and a picture's checksum."""
    data = output.get("data") or {"text": output.get("text") or output.get("evalue")}
    picture = data.get("image/png", "")
    words = [data[kind] for kind in sorted(data) if kind.startswith("text")]
    return "\n".join([output.output_type, hashlib.md5(picture.encode()).hexdigest(), *words])


@pytest.mark.parametrize("cell", CELLS)
def test_cell_run_twice_in_a_row(shown, cell):
    first, second, *_ = shown[cell]
    assert "error" not in [output.split()[0] for output in first]
    assert second == first or cell in GROWING


@pytest.mark.parametrize("cell", CELLS)
def test_section_run_again(shown, cell):
    first, _, *later = shown[cell]
    assert later
    for again in later:
        assert "error" not in [output.split()[0] for output in again], again
        assert again == first or cell in GROWING
