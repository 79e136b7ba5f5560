"""The network, and keeping it in a file."""

import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_helpers.data import NUM_CLASSES, NUM_PIXELS

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class ModelError(RuntimeError):
    """A model file cannot be used; the message says why and what to do."""


class MLP(nn.Module):
    """A multilayer perceptron: pixels `[batch, 784] float32` -> logits `[batch, 10] float32`."""

    def __init__(self, hidden: Sequence[int] = (256, 128), activation="relu", batch_norm=False, dropout=0.0):
        super().__init__()
        layers, sizes = [], [NUM_PIXELS, *map(int, hidden)]
        self.options = dict(hidden=tuple(sizes[1:]), activation=activation)
        self.options |= dict(batch_norm=bool(batch_norm), dropout=float(dropout))
        for inputs, outputs in pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, the unnormalised scores of the ten digits; `ValueError` names a wrong shape or dtype."""
        if pixels.ndim < 2 or pixels.shape[1:].numel() != NUM_PIXELS or pixels.dtype != torch.float32:
            given = f"{list(pixels.shape)} {str(pixels.dtype).removeprefix('torch.')}"
            wanted = "[batch, 784] or [batch, 28, 28] float32"
            raise ValueError(f"expected {wanted}, got {given}: pass images through TRANSFORM first")
        return self.layers(pixels.flatten(1))

    def get_extra_state(self) -> dict:
        """What PyTorch keeps in the `state_dict` besides the weights, so that a file alone can be loaded."""
        return self.options

    def set_extra_state(self, state: dict) -> None:
        """`ValueError` where the weights belong to another network; `load_model` builds the right one."""
        if state != self.options:
            raise ValueError(f"the weights belong to MLP(**{state}), this is MLP(**{self.options})")


@contextmanager
def write_safely(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to: a crash leaves the old `path` or the new one, never half a file."""
    path = Path(path).resolve()  # a link stays a link
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path: str | Path) -> MLP:
    """The `MLP` saved in `path`, on the CPU, ready to evaluate; `ModelError` for a file that is no good."""
    try:
        head = Path(path).read_bytes()[:40]
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not look at the checksums
            # 0x10 marks a folder, which PyTorch takes for zeros.
            if archive.testzip() or any(file.external_attr & 0x10 for file in archive.infolist()):
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        model = MLP(**state["_extra_state"])
        model.load_state_dict(state)
        return model.eval()
    except OSError as error:
        cause = f"cannot be read ({error.strerror})"
    except pickle.UnpicklingError:
        cause = "holds more than weights; its code was not run. Save `model.state_dict()`, not the model"
    except zipfile.BadZipFile:
        cause = f"is damaged, cut short or no model file: it begins with {head!r}" if head else "is empty"
    except Exception as error:  # an archive of something else; PyTorch reports that in a dozen ways
        cause = f"holds no MLP of this project ({error!r:.200})"
    raise ModelError(f"{path} {cause}. Run the notebook again, or take an intact copy.")
