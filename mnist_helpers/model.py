"""The network, and keeping it in a file."""

import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mnist_helpers.data import NUM_CLASSES, NUM_PIXELS

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """A multilayer perceptron: pixels `[batch, 784]` -> logits `[batch, 10]`, float32.

    Arguments: the units of each hidden layer, the activation after each, whether the
    sums before it are normalised over the batch, and the fraction of its outputs that
    is silenced.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (256, 128),
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        layers = []
        inputs = NUM_PIXELS
        for outputs in hidden:
            layers.append(nn.Linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = outputs
        layers.append(nn.Linear(inputs, NUM_CLASSES))
        self.layers = nn.Sequential(*layers)
        self.activation = activation
        self.register_state_dict_post_hook(_note_activation)

    def forward(self, pixels: Tensor) -> Tensor:
        """The scores of the ten digits; `ValueError` for a wrong shape or type.

        Images `[batch, 28, 28] float32`, transformed but not flattened, are fine too.
        """
        _check_pixels(pixels)
        return self.layers(pixels.flatten(1))


def _check_pixels(pixels):
    """Say what was given and wanted, instead of an error from deep inside torch."""
    numbers = math.prod(pixels.shape[1:])
    if numbers != NUM_PIXELS or pixels.dtype != torch.float32:
        raise ValueError(
            "expected a tensor [batch, 784] or [batch, 28, 28] float32, got "
            f"{type(pixels).__name__} {list(pixels.shape)} {pixels.dtype}: "
            "pass images through TRANSFORM first"
        )


def _note_activation(model, state, prefix, metadata):
    """Keep the activation's name in a `state_dict`, beside its tensors."""
    state._metadata["activation"] = model.activation


class ModelError(RuntimeError):
    """A model file cannot be used; the message says why and what to do."""


def load_model(path: str | Path) -> MLP:
    """The `MLP` whose `state_dict` is in `path`, on the CPU, ready to evaluate.

    The sizes are read off the weights. Raises `ModelError` for a file that is no good.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # PyTorch does not look at the checksums
                raise ValueError("its content has changed")
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        sizes = [len(weight) for weight in state.values() if weight.ndim == 2]
        batch_norm = "running_mean" in " ".join(state)
        model = MLP(sizes[:-1], state._metadata["activation"], batch_norm)
        # In their order: dropout, `torch.compile` and `DataParallel` change the names.
        weights = zip(model.state_dict(), state.values(), strict=True)
        model.load_state_dict(dict(weights))
        return model.eval()
    except pickle.UnpicklingError:
        cause = "holds more than weights; its code was not run. Save `state_dict()`"
    except Exception as error:  # PyTorch reports damage and other contents in many ways
        cause = f"cannot be read, or holds no MLP of this project ({error!r:.200})"
    raise ModelError(f"{path} {cause}. Run the notebook again, or take an intact copy.")
