"""Reusable parts of the MNIST notebook: one module per stage, imported one by one."""

import os
import sys
from pathlib import Path

# How long torch's threads spin while they wait for each other: long enough to lose nothing alone, short
# enough to leave the cores to others (by default, two trainings at once take 20 to 90 times as long as one).
# It only counts before torch is loaded; a choice that the user has made stands.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP: torch on Linux
os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's: torch on macOS and Windows

try:
    __import__("torch"), __import__("torchvision")
except (ImportError, RuntimeError, OSError, ValueError, AttributeError) as error:
    # RuntimeError: "operator torchvision::nms does not exist", since the two come from different builds.
    needed = f'-r "{Path(__file__).resolve().parents[1] / "requirements.txt"}"'
    what = "--force-reinstall torch torchvision" if isinstance(error, RuntimeError) else needed
    raise ImportError(f'{error}\nTo mend it: "{sys.executable}" -m pip install {what}') from None
