"""The README's commands are run here, and what it points to exists."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import optuna
import pytest
from PIL import Image

from mnist_helpers.data import PROJECT_ROOT, find_root

README = (PROJECT_ROOT / "README.md").read_text("utf-8")
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements"
QUICK = "papermill -p QUICK True notebook.ipynb executed.ipynb"
PHOTO = "python -m mnist_helpers.handwriting.predict photo.png"
TABLE = "python -m tests.test_predict 150"
STORAGE = "100 --storage postgresql+psycopg://user@server/mnist"
SEARCH = f"python -m mnist_helpers.tuning --trials {STORAGE}"
TESTS = "python -m pytest"
ELSEWHERE = {
    "papermill notebook.ipynb executed.ipynb",  # the same as QUICK, but for minutes
    "jupyter notebook notebook.ipynb",  # in test_browser.py
    "python tests/benchmark.py",  # in test_benchmark.py
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project."""
    monkeypatch.setenv("MNIST_ROOT", str(find_root()))
    unwanted = shutil.ignore_patterns(".*", "data", "runs", "__pycache__")
    return shutil.copytree(PROJECT_ROOT, tmp_path / "project", ignore=unwanted)


def run(command, folder):
    """What a command prints that finds this Python first; it must not fail."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_command_is_left_out():
    pattern = r"(?:^|`|&& )((?:python|jupyter|papermill) [^`\n]+)"
    commands = re.findall(pattern, README, re.M)
    assert set(commands) == ELSEWHERE | {QUICK, PHOTO, TABLE, SEARCH, TESTS}
    assert README.count(INSTALL) == 2


def test_quick_run_without_network(project, monkeypatch):
    monkeypatch.setenv("MNIST_ROOT", "nowhere")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing answers
    run(QUICK, project)
    executed = (project / "executed.ipynb").read_text("utf-8")
    assert "NO MNIST HERE" in executed
    assert '"QUICK = True' in executed
    model = (project / "model.pth").read_bytes()
    assert model == (PROJECT_ROOT / "model.pth").read_bytes()


def test_reading_a_photo(project):
    page = Image.new("L", (90, 120), 220)
    page.paste(30, (40, 20, 48, 100))  # a stroke of a pen: a one
    page.save(project / "photo.png")
    assert run(PHOTO, project).startswith("photo.png: 1 with ")


def test_table_of_pictures(project, mnist):
    assert "photograph" in run(TABLE.replace("150", "2"), project)


def test_search_on_several_machines(project, mnist):
    run(SEARCH.replace(STORAGE, "1 --storage sqlite:///shared.db"), project)
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{project}/shared.db")
    assert study.n_trials == 1


def test_warnings_of_others_fail_no_test(project):
    lines = [
        "import warnings",
        "def test_others():",
        "    open(__file__)",  # a ResourceWarning without a module
        "    warnings.warn('deprecated', DeprecationWarning)",
    ]
    (project / "test_others.py").write_text("\n".join(lines))
    assert "1 passed" in run(f"{TESTS} -n 0 test_others.py", project)


def test_imports_are_declared():
    declared = (PROJECT_ROOT / "requirements.txt").read_text("utf-8")
    packages = packages_distributions()
    for file in PROJECT_ROOT.glob("[mt]*/**/*.py"):
        text = file.read_text("utf-8")
        for name in re.findall(r"^ *(?:import|from) (\w+)", text, re.M):
            for package in packages.get(name, []):
                assert re.search(f"^{package}[>[]", declared, re.M | re.I), (file, name)


def test_map_names_every_module():
    modules = {file.name for file in PROJECT_ROOT.glob("mnist_helpers/**/[!_]*.py")}
    assert set(re.findall(r"(\w+\.py)`", README)) == modules | {"benchmark.py"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (PROJECT_ROOT / target).exists(), target
