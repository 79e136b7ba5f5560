"""Reusable parts of the MNIST notebook: one module per stage, imported one by one."""

import os
import sys
from pathlib import Path

# How long torch's threads spin while they wait for each other: long enough to lose
# nothing alone, short enough to leave the cores to others (by default, two trainings at
# once can take over 20 times as long as one). It only counts before torch is loaded; a
# choice that the user has made stands.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP: Linux
os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's: macOS and Windows

try:
    import torch  # noqa: F401
    import torchvision  # noqa: F401
except Exception as error:  # what a broken installation may raise
    packages = f'-r "{Path(__file__).resolve().parents[1] / "requirements.txt"}"'
    if isinstance(error, RuntimeError):  # "operator torchvision::nms does not exist"
        packages = "--force-reinstall torch torchvision"  # two different builds
    command = f'"{sys.executable}" -m pip install {packages}'
    raise ImportError(f"{error}\nTo mend it: {command}") from None
