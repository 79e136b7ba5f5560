"""What happens when the package is imported, tried in processes of their own with stand-ins for torch."""

import os
import subprocess
import sys
import tomllib

import pytest

from mnist_helpers.data import PROJECT_ROOT

WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def import_package(folder, torch="", torchvision="", **environment) -> subprocess.CompletedProcess:
    """`import mnist_helpers` from another folder, where these lines are all there is to torch."""
    (folder / "torch.py").write_text(torch)
    (folder / "torchvision.py").write_text(torchvision)
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT_ROOT)])}
    command = [sys.executable, "-c", "import mnist_helpers"]
    return subprocess.run(command, env=kept | paths | environment, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "77", "KMP_BLOCKTIME": "infinite"}])
def test_how_threads_wait_is_set_before_torch_is_loaded_and_never_over_the_users_choice(tmp_path, chosen):
    result = import_package(tmp_path, torch=f"import os; print(*map(os.environ.get, {WAITING}))", **chosen)
    assert result.stderr == ""
    assert result.stdout.split() == ([*chosen.values()] or ["1000", "0"])


@pytest.mark.parametrize("error", ["ImportError", "OSError", "ValueError", "AttributeError", "RuntimeError"])
@pytest.mark.parametrize("part", ["torch", "torchvision"])
def test_failing_import_says_what_mends_it(tmp_path, part, error):
    """RuntimeError comes from torch and torchvision of different builds, the others from missing parts."""
    result = import_package(tmp_path, **{part: f"raise {error}('operator torchvision::nms')"})
    needed = PROJECT_ROOT / "requirements.txt"
    assert needed.exists()
    cure = "--force-reinstall torch torchvision" if error == "RuntimeError" else f'-r "{needed}"'
    *_, cause, advice = result.stderr.strip().splitlines()
    assert cause == "ImportError: operator torchvision::nms"
    assert advice == f'To mend it: "{sys.executable}" -m pip install {cure}'
    assert "During handling" not in result.stderr


def test_installation_names_its_packages():
    """Left to search, setuptools refuses a project in which data/ and runs/ stand beside the package."""
    settings = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    files = PROJECT_ROOT.glob("mnist_helpers/**/__init__.py")
    folders = {".".join(file.parent.relative_to(PROJECT_ROOT).parts) for file in files}
    assert set(settings["packages"]) == folders
    for file in settings["package-data"]["mnist_helpers.handwriting"]:
        assert (PROJECT_ROOT / "mnist_helpers" / "handwriting" / file).exists()
