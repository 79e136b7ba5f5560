"""Every command that the README names is run here, and everything it points to exists."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from mnist_helpers import data

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
COMMANDS = {
    command.strip().removeprefix(INSTALL)
    for block in re.findall(r"```bash\n(.*?)```|`((?:python|jupyter|papermill) [^`]+)`", README, re.S)
    for command in "".join(block).splitlines()
}
NOWHERE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}  # where nothing answers


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project without MNIST and without network."""
    for folder in ("mnist_helpers", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("notebook.ipynb", "model.pth", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def run(command: str, project: Path, **environment) -> str:
    """What the command prints, in a shell that finds this Python first; it must not fail."""
    assert command in COMMANDS, f"the README does not name {command}"
    for changed, instead in environment.pop("changes", {}).items():
        assert changed in command
        command = command.replace(changed, instead)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"MNIST_ROOT": str(project / "empty"), "no_proxy": "127.0.0.1,localhost", "PATH": path}
    environment = os.environ | variables | NOWHERE | environment
    done = subprocess.run(command, shell=True, cwd=project, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_command_is_left_out():
    tested = set(re.findall(r'(?:run\(|command = )"([^"]+)"', Path(__file__).read_text(encoding="utf-8")))
    elsewhere = {
        "jupyter notebook notebook.ipynb",  # tests/test_browser.py opens it in a browser
        "python -m pytest",  # this very run
        *(command for command in COMMANDS if "benchmark.py" in command),  # tests/test_benchmark.py
    }
    assert COMMANDS - elsewhere == tested


def test_installation_lacks_nothing(project):
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", "requirements.txt"]
    done = subprocess.run(command, cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert README.count(INSTALL) == 2


def test_run_of_the_notebook_without_network(project):
    run("papermill notebook.ipynb executed.ipynb", project, QUICK="1")
    book = nbformat.read(project / "executed.ipynb", as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "NO MNIST HERE" in text
    accuracy = float(re.search(r"final +(\d+\.\d+)% of 360 test digits right", text).group(1))
    assert 80 < accuracy <= 100  # a few steps on 1,437 digits
    assert not re.search(r"^MNIST: ", text, re.M)
    assert (project / "model.pth").read_bytes() == (ROOT / "model.pth").read_bytes()


def test_reading_a_photo(project):
    page = Image.new("L", (90, 120), 220)
    page.paste(30, (40, 20, 48, 100))  # a stroke of a pen: a one
    page.save(project / "photo.png")
    assert run("python -m mnist_helpers.handwriting.predict photo.png", project).startswith(
        "photo.png: 1 with "
    )


def test_table_of_pictures(project, mnist):
    places = {"MNIST_ROOT": str(data.find_root())}
    table = run("python -m tests.test_predict 150", project, changes={"150": "2"}, **places)
    assert table.startswith("kind ")
    assert "photograph" in table


def test_search_on_several_machines(project):
    command = "python -m mnist_helpers.tuning --trials 100 --storage postgresql+psycopg://user@server/mnist"
    changes = {"100": "2 --data offline", "postgresql+psycopg://user@server/mnist": "sqlite:///shared.db"}
    printed = run(command, project, changes=changes)
    assert "2 of 2 trials" in printed
    assert (project / "shared.db").exists()


def test_map_names_every_module():
    named = set(re.findall(r"(\w+\.py)`", README))
    assert {file.name for file in (ROOT / "mnist_helpers").rglob("[!_]*.py")} <= named


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
