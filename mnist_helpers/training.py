"""Teaching the network: the knobs, the training loop, and how good the result is."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from mnist_helpers.data import Digits, make_loader
from mnist_helpers.evaluation import Evaluation, evaluate
from mnist_helpers.model import ACTIVATIONS, MLP

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "one-cycle")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Config:
    """Every knob of one training; `ValueError` names a knob that makes no sense."""

    hidden: tuple[int, ...] = (512, 512)  # width of each hidden layer
    activation: str = "relu"
    batch_norm: bool = True
    dropout: float = 0.0  # fraction of hidden units silenced at each step
    optimizer: str = "adam"
    learning_rate: float = 1e-3  # the highest one, where a schedule moves it
    schedule: str = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    averaging: float = 0.0  # decay per step of the weights' moving average; 0 = the last weights
    batch_size: int = 64
    epochs: int = 5
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))
        wanted = {
            "hidden": (all(isinstance(n, int) and n > 0 for n in self.hidden), "positive whole numbers"),
            "activation": (self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            "averaging": (0 <= self.averaging < 1, "at least 0 and below 1"),
            "batch_size": (isinstance(self.batch_size, int) and self.batch_size > 1, "a whole number above 1"),
            "epochs": (isinstance(self.epochs, int) and self.epochs > 0, "a whole number above 0"),
        }
        for knob, (good, want) in wanted.items():
            if not good:
                raise ValueError(f"{knob} must be {want}, got {getattr(self, knob)!r}")


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


def choose_device() -> tuple[torch.device, str]:
    """The fastest device that can really train, and why that one."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if found is None:
        return torch.device("cpu"), "no GPU was found"
    try:
        model = MLP((8,)).to(found)
        model(torch.zeros(2, 784, device=found)).sum().backward()
        return torch.device(found), "a trial training step worked"
    except RuntimeError as error:
        return torch.device("cpu"), f"{found} was found but failed: {str(error).splitlines()[0]}"


def train_epoch(model, loader: DataLoader, loss_function, optimizer, device="cpu", after_step=None) -> float:
    """Show every batch to the model once and improve it after each; returns the mean loss per digit."""
    model.train()
    total = 0.0
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = loss_function(model(pixels), labels)
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step()
        total += loss.item() * len(labels)
    return total / len(loader.dataset)


def fit(config: Config, train: Digits, validation: Digits, device="cpu") -> Iterator[Epoch]:
    """Train a fresh `MLP`; yields a record after every epoch, so the loop over epochs stays with the caller.

    Model, optimizer and data order all come from `config` and its seed: the same call gives the same result.
    Raises `TrainingError` when the loss stops being a number; the records yielded before keep their model.
    """
    loader = make_loader(train, config.batch_size, shuffle=True, seed=config.seed)
    validation_loader = make_loader(validation, batch_size=1000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MLP(config.hidden, config.activation, config.batch_norm, config.dropout).to(device)
        finished = MLP(config.hidden, config.activation, config.batch_norm).to(device).eval()
    loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(config, model)
    after_step, averaged = make_after_step(config, model, optimizer, steps=config.epochs * len(loader))
    for number in range(1, config.epochs + 1):
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):  # dropout draws from here; nobody else's numbers move
            torch.manual_seed(config.seed * 1000 + number)
            train_loss = train_epoch(model, loader, loss_function, optimizer, device, after_step)
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became {train_loss} in epoch {number} (learning rate {config.learning_rate:g}, "
                f"batch size {config.batch_size}): try a learning rate ten times lower"
            )
        finished.load_state_dict(averaged.state_dict())
        result = evaluate(finished, validation_loader, device)
        rate = optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - start
        yield Epoch(number, train_loss, result.loss, result.accuracy, rate, seconds, finished)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names; weight decay acts on weight matrices only, not on biases."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.learning_rate, fused=True)


def make_after_step(config: Config, model: nn.Module, optimizer, steps: int):
    """What happens after every optimizer step, and the model that it leaves to be evaluated.

    The learning rate follows `config.schedule` over `steps` steps; with `config.averaging` the model to
    evaluate is the exponential moving average of the weights (Polyak and Juditsky 1992), else `model` itself.
    """
    scheduler = averaged = None
    if config.schedule == "one-cycle":  # Smith and Topin 2018: warm up, then anneal to almost nothing
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps)
    if config.averaging:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.averaging), use_buffers=True)

    def after_step():
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)

    return after_step, averaged.module if averaged is not None else model
