"""The knobs of a training, and what makes sense for each."""

import math
from dataclasses import dataclass

from mnist_helpers.model import ACTIVATIONS

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "one-cycle")


def _is_whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


FRACTION = (lambda value: 0 <= value < 1, "at least 0 and below 1")
KNOBS = {  # name: (what makes sense, in words)
    "hidden": (lambda widths: all(_is_whole(width, 1) for width in widths), "positive whole numbers"),
    "activation": (lambda name: name in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "batch_norm": (lambda choice: isinstance(choice, bool), "True or False"),
    "dropout": FRACTION,
    "receptive_field": (lambda sigma: sigma == 0 or 0.5 <= sigma < math.inf, "0, or at least 0.5"),
    "optimizer": (lambda name: name in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
    "learning_rate": (lambda rate: 0 < rate < math.inf, "above 0"),
    "schedule": (lambda name: name in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "weight_decay": (lambda decay: 0 <= decay < math.inf, "at least 0"),
    "label_smoothing": FRACTION,
    "averaging": FRACTION,
    "warp": (lambda strength: 0 <= strength < math.inf, "at least 0"),
    "warp_fade": (lambda share: 0 <= share <= 1, "from 0 to 1"),
    "practice": (lambda share: 0 < share <= 1, "above 0 and at most 1"),
    "batch_size": (lambda size: _is_whole(size, 2), "a whole number above 1"),
    "epochs": (lambda count: _is_whole(count, 1), "a whole number above 0"),
    "seed": (lambda seed: _is_whole(seed, 0) and seed < 2**32, "a whole number from 0 to 4,294,967,295"),
}


@dataclass(frozen=True)
class Config:
    """Every knob of one training; `ValueError` names a knob that makes no sense."""

    hidden: tuple[int, ...] = (512, 512)  # width of each hidden layer
    activation: str = "relu"
    batch_norm: bool = True
    dropout: float = 0.0  # fraction of hidden units silenced at each step
    receptive_field: float = 0.0  # pixels around its place that a first-layer unit starts from; 0 = all
    optimizer: str = "adam"
    learning_rate: float = 1e-3  # the highest one, where a schedule moves it
    schedule: str = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    averaging: float = 0.0  # share of the steps that the weights are averaged over; 0 = the last weights
    warp: float = 0.0  # strength of the random warps; 1 = what suits a long training
    warp_fade: float = 0.0  # share of that strength that is gone at the end of the training
    practice: float = 1.0  # fraction of the digits shown each epoch; below 1, hard ones more often
    batch_size: int = 64
    epochs: int = 5
    seed: int = 0

    def __post_init__(self):
        for knob, (makes_sense, wanted) in KNOBS.items():
            value = getattr(self, knob)
            try:
                good = makes_sense(value)
            except TypeError:  # a text where a number belongs, say
                good = False
            if not good:
                raise ValueError(f"{knob} must be {wanted}, got {value!r}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
