"""How good a model is on digits that it has not been trained on."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Evaluation:
    """What a model says about `N` images: logits `[N, 10] float32` beside the true labels `[N] int64`."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy over all images, in nats."""
        return F.cross_entropy(self.logits, self.labels).item()

    @cached_property
    def predictions(self) -> Tensor:
        """The digit of highest probability, `[N] int64`."""
        return self.logits.argmax(dim=1)

    @cached_property
    def correct(self) -> Tensor:
        """Whether each prediction is right, `[N] bool`."""
        return self.predictions == self.labels

    @cached_property
    def accuracy(self) -> float:
        """Fraction of images predicted right."""
        return self.correct.double().mean().item()

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, `[N, 10] float32`."""
        return self.logits.softmax(dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader) -> Evaluation:
    """The model's logits for every image of `loader`, on the CPU; the model is left in the mode it was in."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        answers = [(model(pixels.to(device)), labels) for pixels, labels in loader]
    finally:
        model.train(training)
    logits, labels = zip(*answers, strict=True)
    return Evaluation(torch.cat(logits).cpu(), torch.cat(labels).cpu())
