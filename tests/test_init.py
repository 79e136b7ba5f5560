"""What the import of the package does, tried with stand-ins for torch."""

import os
import subprocess
import sys

import pytest

from mnist_helpers.data import PROJECT_ROOT

SETTINGS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
SHOW = f"import os; print(*map(os.environ.get, {[*SETTINGS]}))"


def import_package(folder, torch="", torchvision=""):
    """Import the package where these lines are all there is to torch."""
    (folder / "torch.py").write_text(torch)
    (folder / "torchvision.py").write_text(torchvision)
    path = f"{folder}{os.pathsep}{PROJECT_ROOT}"
    return subprocess.run(
        [sys.executable, "-c", "import mnist_helpers"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("chosen", SETTINGS)
def test_settings_come_before_torch_and_spare_the_users(tmp_path, monkeypatch, chosen):
    for name in SETTINGS:
        monkeypatch.delenv(name)
    monkeypatch.setenv(chosen, "mine")
    found = import_package(tmp_path, SHOW).stdout.split()
    assert found == [*(SETTINGS | {chosen: "mine"}).values()]


def test_failing_import_says_what_mends_it(tmp_path):
    install = f'-r "{PROJECT_ROOT / "requirements.txt"}"'
    for error, cure in {
        "ImportError": install,
        "OSError": install,
        "RuntimeError": "--force-reinstall torch torchvision",  # different builds
    }.items():
        result = import_package(tmp_path, torchvision=f"raise {error}('reason')")
        assert result.stderr.splitlines()[-2:] == [
            "ImportError: reason",
            f'To mend it: "{sys.executable}" -m pip install {cure}',
        ]
        assert "During handling" not in result.stderr
