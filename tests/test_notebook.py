"""The notebook: its form as committed, and runs that change what it invites to."""

import builtins
import os
import re
import shutil
import statistics
import subprocess
import symtable
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from mnist_helpers import data, evaluation, plots, training, tuning  # noqa: F401
from mnist_helpers.model import MLP, load_model

ROOT = data.PROJECT_ROOT
BOOK = nbformat.read(ROOT / "notebook.ipynb", as_version=nbformat.NO_CONVERT)
CODE = {cell.id: cell for cell in BOOK.cells if cell.cell_type == "code"}
OUTPUTS = [output for cell in CODE.values() for output in cell.outputs]
# The ends of the ranges that 1.2 invites, small networks with many steps and back.
VARIANTS = {
    "low": {
        "hidden=(256, 128)": "hidden=(32,)",
        'activation="relu"': 'activation="tanh"',
        "dropout=0.0": "dropout=0.5",
        "learning_rate=1e-3": "learning_rate=1e-4",
        "batch_size=128": "batch_size=16",
        "epochs=2 if QUICK else 5": "epochs=20",
        'optimizer="adamw"': 'optimizer="sgd"',
        "weight_decay=0.2": "weight_decay=0.0",
        "TRIALS = 4": "TRIALS = 1",
        "FEW = 1_500": "FEW = 1_000",
        "WIDE = 384": "WIDE = 256",
        "DRAWN = 600": "DRAWN = 0",
        "0.6 if QUICK": "0.0 if QUICK",
        "16 if QUICK": "1 if QUICK",
        "MINE = replace(STUDY, hidden=(256, 256)": (
            "MINE = replace(replace(STUDY, learning_rate=1.0), hidden=()"
        ),
    },
    "high": {
        "hidden=(256, 128)": "hidden=(2048, 2048, 2048, 2048)",
        'activation="relu"': 'activation="silu"',
        "batch_norm=False": "batch_norm=True",
        'optimizer="adam"': 'optimizer="sgd"',
        "learning_rate=1e-3": "learning_rate=1e-2",
        "weight_decay=0.0": "weight_decay=0.5",
        "batch_size=128": "batch_size=1024",
        "epochs=2 if QUICK else 5": "epochs=1",
        "seed=0": "seed=7",
        "one_cycle=True": "one_cycle=False",
        "TRIALS = 4": "TRIALS = 1",
        "STEPS = {": "STEPS = {} if QUICK else {",
        "WIDE = 384": "WIDE = 2048",
        "DRAWN = 600": "DRAWN = 10_000",
        "GROWTH = 1": "GROWTH = 8",
        "0.6 if QUICK": "2.0 if QUICK",
        "16 if QUICK": "1 if QUICK",
    },
}


def run_notebook(project, changes, again=False):
    """The quick notebook on stand-in digits; if `again`, each cell a second time."""
    shutil.copytree(ROOT / "mnist_helpers", project / "mnist_helpers")
    book = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in book.cells)
    for old in changes:
        assert old in text
    for cell in book.cells:
        for old, new in changes.items():
            if cell.id in ("hyper", "hyper-study", "mine"):
                cell.source = cell.source.replace(old, new)
    place = {"metadata": {"path": str(project)}}
    client = NotebookClient(book, timeout=600, resources=place, coalesce_streams=True)
    settings = {
        "QUICK": "1",
        "MNIST_ROOT": str(project / "empty"),
        "http_proxy": "http://127.0.0.1:9",  # where nobody answers
        "https_proxy": "http://127.0.0.1:9",
    }
    with client.setup_kernel(env=os.environ | settings):
        for index, cell in enumerate(book.cells):
            client.execute_cell(cell, index)
        first = {cell.id: list_texts(cell) for cell in book.cells}
        if again:
            for index, cell in reversed(list(enumerate(book.cells))):
                client.execute_cell(cell, index)
    return {cell.id: cell for cell in book.cells}, first


def list_texts(cell):
    """What a cell shows, as text without the seconds that it took."""
    texts = []
    for output in cell.get("outputs", []):
        text = output.get("text") or output.data.get("text/plain", "")
        texts.append(re.sub(r"[\d.]+ s\b", "", text))
    return texts


@pytest.mark.parametrize("name", VARIANTS)
def test_every_value_that_is_invited_runs_to_the_end(tmp_path, name):
    cells, _ = run_notebook(tmp_path, VARIANTS[name])
    runs = cells["study"].outputs[-1].data["text/html"].count("<tr>")
    assert runs == 1
    assert cells["mine"].outputs[-1].data["text/html"].count("mine") == 1


def test_every_run_of_the_study_is_drawn():
    runs = pd.DataFrame(
        {
            "run": ["trial 0", "mine 1"],
            "accuracy": [0.98, 0.1],
            "learning_rate": [1e-3, 1.0],
            "batch_size": [256, 16],
            "epochs": [4, 1],
            "hidden": [[64, 64], []],
        }
    )
    names = {
        "plots": plots,
        "study": None,
        "STUDY": None,
        "tuning": SimpleNamespace(list_runs=lambda *_: runs),
    }
    exec(CODE["study-plot"].source, names)
    for ax in names["figure"].axes:
        points = ax.transData.transform(ax.collections[0].get_offsets())
        places = ax.transAxes.inverted().transform(np.ma.filled(points, np.nan))
        assert ((places > -0.01) & (places < 1.01)).all()


def test_any_cell_can_be_run_again(tmp_path):
    cells, first = run_notebook(tmp_path, {}, again=True)
    changing = {"mine", "study", "study-plot", "choice", "checklist"}
    for name, cell in cells.items():
        assert list_texts(cell) == first[name] or name in changing, name
    assert not (tmp_path / "model.pth").exists()  # stand-in digits, and quick
    assert load_model(tmp_path / "runs/other.pth").layers[0].in_features == 784


def give_accuracy(accuracy):
    """In the place of the module `evaluation`: every network is as accurate."""
    return SimpleNamespace(evaluate=lambda *_: SimpleNamespace(accuracy=accuracy))


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, "model.pth"),
        ({"final_history": [1]}, "other.pth"),  # stopped after one of two epochs
        ({"evaluation": give_accuracy(0.1)}, "other.pth"),
        ({"QUICK": True}, "other.pth"),
        ({"test": SimpleNamespace(name="offline digits")}, "other.pth"),
    ],
)
def test_only_a_complete_training_replaces_the_network(tmp_path, changes, written):
    names = {
        "torch": torch,
        "OUT": tmp_path,
        "QUICK": False,
        "test": SimpleNamespace(name="MNIST"),
        "final": MLP(),
        "final_history": [1, 2],
        "FINAL": training.Config(epochs=2),
        "evaluation": give_accuracy(0.99),
        "test_loader": [],
    }
    exec(CODE["save"].source, names | changes)
    (path,) = tmp_path.rglob("*.*")
    assert path.name == written
    old = path.read_bytes()

    def fail(state, file):
        file.write_bytes(b"half a file")
        raise OSError("the disk is full")

    names["torch"] = MagicMock(**{"save.side_effect": fail})
    with pytest.raises(OSError, match="full"):
        exec(CODE["save"].source, names | changes)
    assert path.read_bytes() == old


def test_a_final_training_stopped_at_once_is_not_complete():
    names = defaultdict(MagicMock, final_history=[1, 2])  # of an earlier training
    names["live"].watch.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        exec(CODE["final"].source, {}, names)
    assert names["final_history"] == []


def test_setup_from_another_folder(tmp_path):
    """Jupyter names the open notebook; where the kernel was started does not matter."""
    script = CODE["setup"].source + "\nprint(data.__file__)"
    variables = os.environ | {"JPY_SESSION_NAME": str(ROOT / "notebook.ipynb")}
    command = [sys.executable, "-c", script]
    printed = subprocess.check_output(command, cwd=tmp_path, env=variables, text=True)
    assert printed.strip() == data.__file__


def test_final_network_follows_the_studys_choice():
    """Batches grow by `GROWTH`, the learning rate by its root."""
    for depth in (1, 3):
        chosen = training.Config((300,) * depth, learning_rate=1e-3, batch_size=1024)
        names = {
            "chosen": chosen,
            "steps": {"": chosen},
            "WIDE": 1024,
            "LONG": {},
            "GROWTH": 4,
            "replace": replace,
        }
        exec(CODE["final"].source.split("rows = []")[0], names)
        assert names["FINAL"] == training.Config(
            (1024,) * depth, learning_rate=2e-3, batch_size=4096
        )


def test_command_searches_the_study_of_the_notebook():
    names = {
        "training": training,
        "replace": replace,
        "QUICK": False,
        "device": torch.device("cpu"),
    }
    exec(CODE["hyper"].source + "\n" + CODE["hyper-study"].source, names)
    assert tuning.describe_changes(asdict(names["STUDY"]), tuning.BASE) == ""


def find_names(source):
    """The names that a cell sets, and those that it reads and does not set."""
    tables = [symtable.symtable(source, "cell", "exec")]
    stored, used = set(), set()
    while tables:
        table = tables.pop()
        tables += table.get_children()  # of functions and the like
        for symbol in table.get_symbols():
            if symbol.is_global():
                used.add(symbol.get_name())
                if symbol.is_assigned() or symbol.is_imported():
                    stored.add(symbol.get_name())
    return stored, used - stored - set(dir(builtins)) - {"display"}


def test_what_a_cell_reads_is_set_by_exactly_one_other_cell():
    names = {name: find_names(cell.source) for name, cell in CODE.items()}
    for cell, (_, loaded) in names.items():
        for name in loaded:
            setters = [other for other, (stored, _) in names.items() if name in stored]
            assert len(setters) == 1, f"{cell} reads {name}, which {setters} set"
            assert list(CODE).index(setters[0]) < list(CODE).index(cell)


def test_test_digits_wait_until_all_is_chosen():
    before = list(CODE)[: list(CODE).index("test")]
    users = [name for name in before if re.search(r"\btest\b|test_", CODE[name].source)]
    assert users == ["load", "loaders"]  # read and counted, wrapped


def test_it_was_executed_once_from_top_to_bottom():
    counts = [cell.execution_count for cell in CODE.values()]
    assert counts == list(range(1, len(CODE) + 1))


def test_its_outputs_are_clean():
    for output in OUTPUTS:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert "widget" not in str(OUTPUTS)
    assert r"\r" not in str(OUTPUTS)  # streams in one piece
    assert "widgets" not in BOOK.metadata
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt)/", str(BOOK))


def test_the_code_that_it_shows_is_todays():
    shown = 0
    for cell in CODE.values():
        texts = [output.get("data", {}).get("text/plain") for output in cell.outputs]
        for objects in re.findall(r"show_source\(([\w., ]+)\)", cell.source):
            with patch.object(plots, "display") as display:
                eval(f"plots.show_source({objects})")
            assert display.call_args.args[0]["text/plain"] in texts
            shown += 1
    assert shown > 5


def test_its_form():
    assert BOOK.nbformat_minor >= 5
    assert BOOK.metadata.kernelspec.name == "python3"
    assert BOOK.metadata.language_info.file_extension == ".py"
    assert (ROOT / "notebook.ipynb").stat().st_size < 1_000_000
    assert len(BOOK.cells) <= 100
    lines = [len(cell.source.splitlines()) for cell in CODE.values()]
    assert statistics.median(lines) <= 10
    assert max(lines) <= 25
    assert CODE["parameters"].metadata.tags == ["parameters"]


def test_every_link_leads_to_a_heading():
    text = "\n".join(c.source for c in BOOK.cells if c.cell_type == "markdown")
    lines = re.findall(r"^#+ (.*)$", text, re.M)
    headings = {line.replace(" ", "-") for line in lines}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert len(links) > 15
    assert links <= headings
