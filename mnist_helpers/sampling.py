"""Which digits an epoch shows: the ones that the model still finds hard, more often than the others."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class HardDigits(Sampler[int]):
    """Draws `fraction` of `size` digits each epoch, without repeats, in proportion to their latest losses.

    After a few epochs most digits have nothing left to teach, and a pass over all of them is mostly wasted.
    Sampling in proportion to the loss is the importance sampling of Katharopoulos and Fleuret 2018 ("Not all
    samples are created equal"), with losses that cost nothing as they come from training itself.
    """

    def __init__(self, size: int, fraction: float, generator: torch.Generator):
        self.losses = torch.full((size,), 3.0)  # digits not yet seen count as hard
        self.count = round(size * fraction)
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        weights = self.losses.clamp(
            0.02, 2.0
        )  # easy ones come back at times, mislabelled ones do not take over
        self.order = torch.multinomial(weights, self.count, generator=self.generator)
        return iter(self.order.tolist())

    def update(self, losses: Tensor) -> None:
        """Take over the losses `[count]` of the digits drawn last, in the order drawn."""
        self.losses[self.order[: len(losses)]] = losses  # the loader leaves out a last batch of one digit
