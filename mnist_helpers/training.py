"""Teaching the network: the training loop, and what it is made of."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from mnist_helpers.augment import RandomWarp
from mnist_helpers.config import Config
from mnist_helpers.data import NUM_CLASSES, TRANSFORM, Digits, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import MLP
from mnist_helpers.sampling import HardDigits


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


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


def train_epoch(
    model, loader, loss_function, optimizer, device="cpu", scheduler=None, average=None
) -> Tensor:
    """Show the model every batch of `loader` once and improve it after each.

    `loss_function` gives one loss per digit (`reduction="none"`); they are returned, `[N] float32`, in the
    order of the loader. After every step `scheduler` sets the next learning rate and `average` takes in the
    new weights, where they are given.
    """
    model.train()
    losses = []
    for pixels, labels in loader:
        loss = loss_function(model(pixels.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach())
        if scheduler is not None:
            scheduler.step()
        if average is not None:
            average.update_parameters(model)
    return torch.cat(losses).cpu()


def fit(
    config: Config, train: Digits, validation: Digits | None, device="cpu", transform=TRANSFORM, shuffle=True
) -> Iterator[Epoch]:
    """Train a fresh `MLP`; yields a record after every epoch, so the loop over epochs stays with the caller.

    Model, optimizer and data order all come from `config` and its seed: the same call gives the same result.
    Raises `TrainingError` when the loss stops being a number; the records yielded before keep their model.
    """
    loader = make_training_loader(config, train, transform, shuffle)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MLP(
            config.hidden, config.activation, config.batch_norm, config.dropout, config.receptive_field
        ).to(device)
    finished = copy.deepcopy(model).eval()
    loss_function = nn.CrossEntropyLoss(reduction="none", label_smoothing=config.label_smoothing)
    optimizer = make_optimizer(config, model)
    scheduler = make_scheduler(config, optimizer, steps=config.epochs * len(loader))
    average = make_average(config, model, steps=config.epochs * len(loader))
    for number in range(1, config.epochs + 1):
        start = time.perf_counter()
        # A stop in the middle of PyTorch's own switching would leave gradients off for the whole session.
        with torch.enable_grad():
            with torch.random.fork_rng(devices=[]):  # dropout draws from here; nobody else's numbers move
                torch.manual_seed(config.seed * 1000 + number)
                losses = train_epoch(model, loader, loss_function, optimizer, device, scheduler, average)
            if not all(numbers.isfinite().all() for numbers in (losses, *model.parameters())):
                raise TrainingError(
                    f"the loss or the weights stopped being numbers in epoch {number} with learning rate "
                    f"{config.learning_rate:g} and batch size {config.batch_size}: try a rate ten times lower"
                )
            if config.practice < 1:
                loader.sampler.sampler.update(losses)
            candidate = average.module if average else model
            result = evaluate(candidate, make_loader(validation, 1000), device) if validation else None
        finished.load_state_dict(candidate.state_dict())  # last of all: a stop before leaves the old one
        yield Epoch(
            number=number,
            train_loss=losses.mean().item(),
            validation_loss=result.loss if result else math.nan,
            validation_accuracy=result.accuracy if result else math.nan,
            learning_rate=optimizer.param_groups[0]["lr"],
            seconds=time.perf_counter() - start,
            model=finished,
        )


def final_accuracy(config: Config, train: Digits, validation: Digits, device="cpu", **how) -> float:
    """Validation accuracy after the last epoch of a `fit`, or that of a blind guess where training failed."""
    try:
        *_, last = fit(config, train, validation, device, **how)
        return last.validation_accuracy
    except TrainingError:
        return 1 / NUM_CLASSES


def make_training_loader(
    config: Config, train: Digits, transform=TRANSFORM, shuffle: bool = True
) -> DataLoader:
    """The loader that `fit` trains from: digits warped, and hard ones more often, where `config` says so."""
    if config.warp:
        steps = config.epochs * math.ceil(len(train) * config.practice / config.batch_size)
        warp = RandomWarp(config.warp, fade=config.warp_fade, steps=steps, seed=config.seed)
        transform = v2.Compose([warp, transform])
    order = None
    if config.practice < 1:
        order = HardDigits(len(train), config.practice, torch.Generator().manual_seed(config.seed))
    return make_loader(train, config.batch_size, shuffle, config.seed, transform, order)


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


def make_scheduler(config: Config, optimizer, steps: int):
    """What moves the learning rate after each of `steps` steps, or None where it is constant."""
    if config.schedule == "one-cycle":  # Smith and Topin 2018: warm up, then anneal to almost nothing
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps)
    return None


def make_average(config: Config, model: nn.Module, steps: int) -> AveragedModel | None:
    """The moving average of the weights (Polyak and Juditsky 1992), or None where it is not wanted.

    It looks back over `config.averaging` of all `steps`, and over less at the start of the training.
    """
    if not config.averaging:
        return None

    def blend(averaged: list[Tensor], current: list[Tensor], count: Tensor):
        weight = min(1.0, max(1 / (config.averaging * steps), 1 / (1 + count / 10)))
        for kept, new in zip(averaged, current, strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, float(weight))

    return AveragedModel(model, multi_avg_fn=blend, use_buffers=True)
