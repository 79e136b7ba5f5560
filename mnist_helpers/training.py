"""Teaching the network: its hyperparameters, the training loop, and which digits an epoch shows."""

import math
import operator
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import IMAGE_SIZE, TRANSFORM, BatchSampler, Digits, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import ACTIVATIONS, MLP

OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
ONE_CYCLE = partial(OneCycleLR, pct_start=0.15)  # half of PyTorch's warm-up: more of the steps are small ones
CHOICES = {"activation": [*ACTIVATIONS], "optimizer": [*OPTIMIZERS], bool: [False, True]}
# What a number may be at least (otherwise 0) and at most (otherwise 1e9)
LOWEST = {"hidden": 1, "learning_rate": 1e-12, "hard_fraction": 1e-6, "batch_size": 2, "epochs": 1}
HIGHEST = {"dropout": 0.99, "augmentation_fade": 1, "hard_fraction": 1, "seed": 2**32 - 1}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Config:
    """The hyperparameters of one training; `ValueError` names one that makes no sense."""

    hidden: tuple[int, ...] = (256, 128)  # units of each hidden layer
    activation: str = "relu"
    batch_norm: bool = False
    dropout: float = 0.0  # fraction of hidden units silenced at each step
    optimizer: str = "adam"
    learning_rate: float = 1e-3  # the highest one, where one_cycle moves it
    one_cycle: bool = False  # warm up, then anneal to almost nothing (Smith and Topin 2018)
    weight_decay: float = 0.0
    augmentation: float = 0.0  # strength of the random warps; 1 suits a training of many epochs
    augmentation_fade: float = 0.0  # share of that strength that is gone at the end of the training
    hard_fraction: float = 1.0  # fraction of the digits shown each epoch; below 1, hard ones more often
    batch_size: int = 64
    epochs: int = 5
    seed: int = 0

    def __post_init__(self):
        for field in fields(self):
            name, kind, given = field.name, field.type, getattr(self, field.name)
            low, high = LOWEST.get(name, 0), HIGHEST.get(name, 1e9)
            choices = CHOICES.get(name) or CHOICES.get(kind)
            wanted = f"one of {choices}" if choices else f"from {low:g} to {high:g}"
            try:  # NumPy's numbers become Python's own
                if choices:
                    value = choices[choices.index(given)]
                elif kind in (int, float):
                    value = operator.index(given) if kind is int else float(given)
                else:
                    wanted = "whole numbers above 0, as in (256, 128)"
                    value = tuple(map(operator.index, given))
                if not choices and not all(low <= number <= high for number in np.atleast_1d(value)):
                    raise ValueError
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be {wanted}, got {given!r}") from None
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch; `model` is the network after the latest complete epoch, ready to evaluate."""

    number: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    model: nn.Module


class HardDigits(BatchSampler):
    """Draws a fraction of the digits each epoch, without repeats, in proportion to their latest losses.

    Most soon have nothing left to teach: importance sampling after Katharopoulos and Fleuret 2018 ("Not all
    samples are created equal"), with losses that cost nothing, since they come from training itself.
    """

    def __init__(self, digits: int, fraction: float, batch_size: int, generator: torch.Generator):
        super().__init__(max(2, round(digits * fraction)), batch_size, generator)
        self.losses = torch.full((digits,), 3.0, device=generator.device)  # not yet seen: hard

    def draw_order(self) -> Tensor:
        # Easy ones come back at times, and mislabelled ones do not take over.
        self.order = torch.multinomial(self.losses.clamp(0.02, 2.0), self.size, generator=self.generator)
        return self.order

    def update(self, losses: Tensor) -> None:
        """Take over the losses `[size]` of the digits drawn last, in the order drawn."""
        self.losses[self.order[: len(losses)]] = losses


def choose_device() -> tuple[torch.device, str]:
    """The fastest device that can really train, and why that one."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    images, labels = torch.zeros(16, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8), torch.arange(16) % 10
    parts = dict(batch_norm=True, dropout=0.1, one_cycle=True, augmentation=1, hard_fraction=0.5)
    try:
        digits = Digits(images, labels).to(found or "cpu")
        list(fit(Config((8,), epochs=1, batch_size=4, **parts), digits, digits))
    except Exception as error:
        cause = (str(error) or repr(error)).splitlines()[0]
        return torch.device("cpu"), f"{found} was found but failed: {cause}"
    return torch.device(found or "cpu"), "a trial training worked" if found else "no graphics card was found"


def train_epoch(model, loader, loss_function, optimizer, scheduler=None) -> Tensor:
    """Show the model every batch of `loader` once and improve it after each.

    `loss_function` gives one loss per image (`reduction="none"`); they are returned, `[N] float32`.
    """
    model.train()
    losses = []
    for pixels, labels in loader:
        optimizer.zero_grad()
        logits = model(pixels)
        loss = loss_function(logits, labels)
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
        if scheduler is not None:
            scheduler.step()
    return torch.cat(losses)


def fit(
    config: Config, train: Digits, validation: Digits | None = None, transform=TRANSFORM, shuffle: bool = True
) -> Iterator[Epoch]:
    """Train a fresh `MLP` on the device of the digits; yields a record after every epoch.

    Model, optimizer and data order all come from `config` and its seed: the same call gives the same result.
    Raises `TrainingError` when the loss stops being a number; the records yielded before keep their model.
    """
    device = train.images.device
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards), torch.inference_mode(False):
        torch.manual_seed(config.seed)
        model = MLP(config.hidden, config.activation, config.batch_norm, config.dropout).to(device)
        finished = MLP(**model.options).to(device).eval()
        loader = make_training_loader(config, train, transform, shuffle)
    loss_function = nn.CrossEntropyLoss(reduction="none")
    make_optimizer = OPTIMIZERS[config.optimizer]
    optimizer = make_optimizer(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * len(loader)
    scheduler = ONE_CYCLE(optimizer, config.learning_rate, steps) if config.one_cycle else None
    for number in range(1, config.epochs + 1):
        start = time.perf_counter()
        # Dropout draws from torch's common generators: they are seeded here, and nobody else's numbers move.
        # Gradients are on in here, and afterwards as before, even if a stop hits PyTorch's own switching.
        with torch.random.fork_rng(cards), torch.inference_mode(False):
            torch.manual_seed(config.seed * 1000 + number)
            losses = train_epoch(model, loader, loss_function, optimizer, scheduler)
        if not all(numbers.isfinite().all() for numbers in (losses, *model.parameters())):
            where = f"epoch {number} (learning rate {config.learning_rate:g}, batch size {config.batch_size})"
            raise TrainingError(f"loss or weights stopped being numbers in {where}: try a tenth of the rate")
        if config.hard_fraction < 1:
            loader.sampler.update(losses)
        result = evaluate(model, make_loader(validation, 1000, transform=transform)) if validation else None
        finished.load_state_dict(model.state_dict())  # last of all: a stop before leaves the old one
        rate, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - start
        loss, accuracy = (result.loss, result.accuracy) if result else (math.nan, math.nan)
        yield Epoch(number, losses.mean().item(), loss, accuracy, rate, seconds, finished)


def make_training_loader(config: Config, train: Digits, transform=TRANSFORM, shuffle=True) -> DataLoader:
    """The loader that `fit` trains from: digits warped, and hard ones more often, where `config` says so."""
    device = train.images.device
    generator = torch.Generator(device).manual_seed(config.seed)
    sampler = BatchSampler(len(train), config.batch_size, generator if shuffle else None, device)
    if config.hard_fraction < 1:
        sampler = HardDigits(len(train), config.hard_fraction, config.batch_size, generator)
    sampler.drop_single = True
    if config.augmentation:
        fading = {"fade": config.augmentation_fade, "steps": config.epochs * len(sampler)}
        warp = RandomWarp(config.augmentation, seed=config.seed, device=device, **fading)
        transform = v2.Compose([warp, transform])
    return make_loader(train, config.batch_size, transform=transform, sampler=sampler)
