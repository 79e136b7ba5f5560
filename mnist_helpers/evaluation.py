"""How good a model is, and how sure one may be of that."""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnist_helpers.data import IMAGE_SIZE, NUM_CLASSES


@dataclass(frozen=True)
class Evaluation:
    """What a model says about `N` digits: logits `[N, 10] float32` beside the true labels `[N] int64`."""

    logits: Tensor
    labels: Tensor

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy over all digits, in nats."""
        return F.cross_entropy(self.logits, self.labels).item()

    @cached_property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, `[N, 10] float32`."""
        return self.logits.softmax(dim=1)

    @cached_property
    def predictions(self) -> Tensor:
        """The digit of highest probability, `[N] int64`."""
        return self.logits.argmax(dim=1)

    @cached_property
    def right(self) -> Tensor:
        """Whether each prediction is right, `[N] bool`."""
        return self.predictions == self.labels

    @cached_property
    def accuracy(self) -> float:
        """Fraction of digits predicted right."""
        return self.right.double().mean().item()

    @cached_property
    def accuracy_per_digit(self) -> Tensor:
        """Fraction predicted right among the pictures of each digit, `[10] float32`."""
        return torch.stack([self.right[self.labels == digit].float().mean() for digit in range(NUM_CLASSES)])

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the accuracy (Wilson 1927), for `N` digits drawn at random."""
        n, p, z = len(self.labels), self.accuracy, 1.96
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return center - half, center + half

    @cached_property
    def confidence(self) -> Tensor:
        """The probability that the model gives its own answer, `[N] float32`."""
        return self.probabilities.max(dim=1).values

    @cached_property
    def calibration(self) -> tuple[Tensor, Tensor]:
        """Mean confidence and fraction right of twenty groups of digits, the least sure first."""
        groups = self.confidence.argsort().tensor_split(20)
        stated = [self.confidence[group].mean() for group in groups if len(group)]
        right = [self.right[group].float().mean() for group in groups if len(group)]
        return torch.stack(stated), torch.stack(right)

    @cached_property
    def calibration_error(self) -> float:
        """How far stated and right are apart in `calibration`, on average (Naeini et al. 2015)."""
        stated, right = self.calibration
        return (stated - right).abs().mean().item()

    def accuracy_of_surest(self, refused: float) -> float:
        """The accuracy of the answers that are left when the least sure fraction `refused` is not given."""
        surest = self.confidence.argsort()[round(refused * len(self.labels)) :]
        return self.right[surest].double().mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device="cpu") -> Evaluation:
    """The model's answers for every digit of `loader`; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    answers = [(model(pixels.to(device)).cpu(), labels) for pixels, labels in loader]
    model.train(training)
    logits, labels = zip(*answers, strict=True)
    return Evaluation(torch.cat(logits), torch.cat(labels))


def compare_paired(first: Evaluation, second: Evaluation) -> tuple[int, int, float]:
    """How many digits only the first reads right, how many only the second, and the p-value of that.

    Digits that both read alike say nothing about which is better. Were the two equally good, each of the
    others would be a toss of a coin: the exact form of McNemar's test (1947).
    """
    only_first = int((first.right & ~second.right).sum())
    only_second = int((second.right & ~first.right).sum())
    differing = only_first + only_second
    p_value = binomtest(only_first, differing).pvalue if differing else 1.0
    return only_first, only_second, p_value


def find_evidence(model: nn.Module, pixels: Tensor) -> Tensor:
    """How much each pixel of `pixels [batch, 784]` spoke for the answer, below 0 against: `[batch, 28, 28]`.

    Gradient times input (Shrikumar et al. 2016): the ink of a pixel, times how strongly more ink there would
    lift the winning logit over the mean of all ten.
    """
    pixels = pixels.clone().requires_grad_()
    logits = model(pixels)
    lead = logits.max(dim=1).values - logits.mean(dim=1)
    (slope,) = torch.autograd.grad(lead.sum(), pixels)
    ink = pixels.detach() - pixels.detach().min()
    return (slope * ink).unflatten(1, (IMAGE_SIZE, IMAGE_SIZE))
