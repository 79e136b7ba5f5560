"""Single cells of the notebook: set-up in strange places, the test digits, saving a bad model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from mnist_helpers.model import MLP, load_model, write_safely

ROOT = Path(__file__).resolve().parents[1]
BOOK = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
CODE = {cell.id: cell.source for cell in BOOK.cells if cell.cell_type == "code"}


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder that the first cell takes for the project, since the package lies in it."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "mnist_helpers", folder / "mnist_helpers")
    return folder


def test_setup_from_another_folder(project, tmp_path):
    """Jupyter names the open notebook; where the kernel was started does not matter."""
    named = {"JPY_SESSION_NAME": str(project / "notebook.ipynb"), "MNIST_ROOT": str(tmp_path / "digits")}
    script = f"{CODE['setup']}\n{CODE['versions']}\nprint(data.__file__)"
    command = [sys.executable, "-c", script]
    text = subprocess.check_output(command, cwd=tmp_path, env=os.environ | named, text=True)
    packages, device, digits, package = text.splitlines()
    assert re.match(rf"Python {sys.version.split()[0]} in .+, torch \d+\.\d+", packages)
    assert re.match(r"training on \w+ \(.+\), \d+ threads", device)
    assert digits == "digits in the folder that MNIST_ROOT names"
    assert package == str(project / "mnist_helpers" / "data.py")


def test_test_digits_stay_in_their_drawer_until_all_is_chosen():
    before = list(CODE)[: list(CODE).index("test")]
    users = {cell for cell in before if re.search(r"\btest(_loader)?\b", CODE[cell])}
    assert users == {"load", "loaders"}  # read and counted, wrapped


@pytest.mark.parametrize(
    ("name", "quick", "accuracy", "written"),
    [
        ("MNIST", False, 0.99, "model.pth"),
        ("MNIST", False, 0.1, "runs/quick.pth"),
        ("MNIST", True, 0.99, "runs/quick.pth"),
        ("offline digits", False, 0.99, "runs/quick.pth"),
    ],
)
def test_only_a_good_model_replaces_the_saved_one(tmp_path, capsys, name, quick, accuracy, written):
    (tmp_path / "runs").mkdir()
    torch.save(MLP((3,)).state_dict(), tmp_path / "model.pth")
    old = (tmp_path / "model.pth").read_bytes()
    results = {"test": SimpleNamespace(name=name), "result": SimpleNamespace(accuracy=accuracy)}
    new = {"OUT": tmp_path, "QUICK": quick, "final": MLP((5,)), "write_safely": write_safely, "torch": torch}
    exec(CODE["save"], results | new)
    assert load_model(tmp_path / written).layers[0].out_features == 5
    assert ((tmp_path / "model.pth").read_bytes() == old) == (written != "model.pth")
    assert f"{Path(written).name} written" in capsys.readouterr().out
