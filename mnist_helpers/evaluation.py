"""How good a model is on digits that it has not been trained on."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Logits `[N, 10] float32` of a model beside the true labels `[N] int64`."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy over all images, in nats."""
        return nn.functional.cross_entropy(self.logits, self.labels).item()

    @property
    def predictions(self) -> Tensor:
        """The digit of highest probability, `[N] int64`."""
        return self.logits.argmax(dim=1)

    @property
    def accuracy(self) -> float:
        """Fraction of images predicted right."""
        return (self.predictions == self.labels).double().mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, loader: torch.utils.data.DataLoader) -> Evaluation:
    """The model's logits for every image of `loader`, brought to the CPU.

    A copy of the model computes them on the model's device, with batch norm and dropout
    as in use; the model itself stays as it is. `ValueError` if there are no digits.
    """
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    logits = []
    labels = []
    for pixels, digits in loader:
        logits.append(model(pixels.to(device)))
        labels.append(digits)
    if not logits:
        raise ValueError("the loader has no digits to evaluate the model on")
    return Evaluation(torch.cat(logits).cpu(), torch.cat(labels).cpu())
