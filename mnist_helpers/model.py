"""The network, and keeping it in a file."""

import math
import os
import pickle
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_helpers.data import IMAGE_SIZE, NUM_CLASSES, NUM_PIXELS

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class ModelError(RuntimeError):
    """A model file cannot be used; the message says why and what to do."""


class MLP(nn.Module):
    """A multilayer perceptron: pixels `[batch, 784] float32` -> logits `[batch, 10] float32`."""

    def __init__(
        self,
        hidden: Sequence[int] = (512, 512),
        activation: str = "relu",
        batch_norm: bool = True,
        dropout: float = 0.0,
        receptive_field: float = 0.0,
    ):
        super().__init__()
        sizes = [NUM_PIXELS, *hidden]
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers.append(nn.Linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES))
        if receptive_field:  # pixels; 0 = every unit starts with the whole picture
            with torch.no_grad():
                self.layers[0].weight.copy_(draw_local_weights(self.layers[0].out_features, receptive_field))
        # Kept with the weights, so that a saved file alone tells which network it belongs to.
        self.register_buffer("activation", torch.tensor(float(list(ACTIVATIONS).index(activation))))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, the unnormalised scores of the ten digits; `ValueError` names a wrong shape or dtype."""
        if pixels.ndim < 2 or pixels.shape[1:].numel() != NUM_PIXELS or pixels.dtype != torch.float32:
            raise ValueError(
                f"expected [batch, 784] or [batch, 28, 28] float32, got {list(pixels.shape)} "
                f"{str(pixels.dtype).removeprefix('torch.')}: pass pictures through TRANSFORM first"
            )
        return self.layers(pixels.flatten(1))


def draw_local_weights(units: int, sigma: float) -> Tensor:
    """First-layer weights `[units, 784]` to start from: each unit looks at the surroundings of one place.

    A smooth random pattern of sum 0 under a Gaussian window of `sigma` pixels, in length like the weights of
    `nn.Linear`. What belongs together lies close together: a convolutional network has that built in, a fully
    connected one may start from it, free to leave (compare d'Ascoli et al. 2019, "Finding the Needle in the
    Haystack with Convolutions").
    """
    places = torch.arange(IMAGE_SIZE)
    centres = 4 + torch.rand(2, units, 1) * 20  # digits leave a margin of four pixels
    down, across = torch.exp(-((places - centres) ** 2) / (2 * sigma**2))
    window = down[:, :, None] * across[:, None, :]
    blur = torch.exp(-((places[:, None] - places) ** 2) / 2)
    patterns = (blur @ torch.randn(units, IMAGE_SIZE, IMAGE_SIZE) @ blur * window).flatten(1)
    window = window.flatten(1)
    patterns -= window * (patterns.sum(dim=1) / window.sum(dim=1))[:, None]
    return nn.functional.normalize(patterns) / math.sqrt(3)


def merge_models(models: Sequence[MLP]) -> MLP:
    """One wide `MLP` whose logits are the mean of those of `models`, on the CPU, ready to evaluate.

    Their hidden layers stand side by side, with weights of zero between units of different networks. Networks
    from different seeds are mistaken about different digits, so their mean is mistaken less often (Hansen and
    Salamon 1990, "Neural network ensembles"). They may differ in widths alone: `ValueError` otherwise.
    """
    kinds = {(tuple(model.state_dict()), float(model.activation)) for model in models}
    if len(kinds) != 1 or len(models[0].layers) == 1:
        raise ValueError(
            f"expected networks with equally many hidden layers, one at least, of the same activation, batch "
            f"norm and dropout, got {len(kinds)} kinds among {len(models)}: train them from one Config"
        )
    tensors = zip(*(model.state_dict().values() for model in models), strict=True)
    activations, first, *between, weights, biases = tensors

    def join(parts: Sequence[Tensor]) -> Tensor:
        if parts[0].ndim == 0:  # how many batches batch norm has seen
            return parts[0]
        return torch.cat(parts) if parts[0].ndim == 1 else torch.block_diag(*parts)

    merged = [activations[0], torch.cat(first), *map(join, between)]
    merged += [torch.cat(weights, dim=1) / len(models), torch.stack(biases).mean(dim=0)]
    return _build_model(dict(zip(models[0].state_dict(), merged, strict=True)))


def count_parameters(model: nn.Module) -> int:
    """How many numbers training may change."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: nn.Module, path: str | Path) -> None:
    """`torch.save(model.state_dict(), path)`, so that a crash leaves either the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(model.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_model(path: str | Path) -> MLP:
    """The `MLP` saved in `path`, on the CPU, ready to evaluate; its sizes are read off the weights.

    Only tensors are read, no code is run. Raises `ModelError` for a file that is missing, damaged or
    something else.
    """
    state = _read_state(Path(path))
    try:
        return _build_model(state)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} holds no MLP for digits as `save_model` writes it ({error!r:.200})"
        ) from None


def _build_model(state: dict[str, Tensor]) -> MLP:
    """The `MLP` that these weights belong to, its sizes read off them, ready to evaluate."""
    weights = [value for value in state.values() if value.ndim == 2]
    activation = list(ACTIVATIONS)[int(state["activation"])]
    batch_norm = any(key.endswith("running_mean") for key in state)
    model = MLP([len(weight) for weight in weights[:-1]], activation, batch_norm)
    names = model.state_dict()  # dropout has no weights: it changes their numbering, not their order
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in `path`, or a `ModelError` that says what is there instead."""
    cure = "Run the notebook again, or take an intact copy."
    try:
        head = path.read_bytes()[:64].lstrip()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}). {cure}") from None
    if not head:
        raise ModelError(f"{path} is empty: saving was interrupted. {cure}")
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is only a pointer to a file in Git LFS: fetch it with `git lfs pull`.")
    if head.startswith(b"<"):
        raise ModelError(f"{path} is a web page, not a model: download the file itself.")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not look at the checksums
            if archive.testzip() or any(entry.external_attr & 0x10 for entry in archive.infolist()):
                raise zipfile.BadZipFile  # 0x10 marks a folder, which PyTorch would take for zeros
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than weights; its code was not run. Save `model.state_dict()` instead of the "
            "model, and load only files whose origin you know."
        ) from None
    except Exception:  # zipfile and PyTorch report damage in a dozen ways
        known = head.startswith(b"PK")  # how every file by torch.save begins
        what = "is cut short, damaged or another kind of archive" if known else "is no model file"
        raise ModelError(f"{path} {what}. {cure}") from None
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, not the weights of a model. {cure}")
    return state
