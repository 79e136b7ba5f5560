"""Teaching the network: its hyperparameters, and the loop that trains it."""

import copy
import math
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn, optim
from torchvision.transforms import v2

from mnist_helpers.augment import warp_digits
from mnist_helpers.data import TRANSFORM, Digits, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import MLP


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(
    frozen=True, config={"strict": True, "extra": "forbid", "allow_inf_nan": False}
)
class Config:
    """The hyperparameters of one training; `ValueError` names one that makes no sense.

    `hidden`: units of each hidden layer. `dropout`: fraction of them silenced at each
    step. `learning_rate`: the highest one where `one_cycle` moves it, up from a 25th
    and down to almost nothing (Smith and Topin 2018). `augmentation`: strength of the
    random warps; `augmentation_fade`: the share of it that is lost, evenly, on the way
    from the first epoch to the end of the last.
    `hard_fraction`: fraction of the digits shown in each epoch, hard ones more often.
    `bfloat16`: multiply numbers of half the size, where `has_bfloat16`.
    """

    hidden: tuple[PositiveInt, ...] = Field((256, 128), strict=False)  # or a list
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    batch_norm: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    one_cycle: bool = False
    weight_decay: NonNegativeFloat = 0.0
    augmentation: NonNegativeFloat = 0.0
    augmentation_fade: float = Field(0.0, ge=0, le=1)
    hard_fraction: float = Field(1.0, gt=0, le=1)
    bfloat16: bool = False
    batch_size: int = Field(64, ge=2)
    epochs: PositiveInt = 5
    seed: int = Field(0, ge=0, lt=2**32)


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch; without validation digits, their numbers are NaN."""

    number: int
    train_loss: float  # mean cross-entropy in nats, measured while training
    validation_loss: float
    validation_accuracy: float  # a fraction


def choose_device() -> tuple[torch.device, str]:
    """The fastest device that can really train, and why that one."""
    if not torch.accelerator.is_available():
        return torch.device("cpu"), "no graphics card was found"
    device = torch.accelerator.current_accelerator()
    config = Config(batch_norm=True, dropout=0.1, augmentation=1, hard_fraction=0.5)
    try:
        digits = Digits(torch.zeros(10, 28, 28).byte(), torch.arange(10)).to(device)
        score_config(config, digits, digits)
    except Exception as error:  # whatever a driver may raise
        return torch.device("cpu"), f"{device} was found but failed: {error!r:.200}"
    return device, "a trial training worked"


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a processor that is fast at bfloat16: with AVX512-BF16, AMX.

    Such numbers have the range of float32, but 8 significant binary digits instead of
    24. Other processors imitate them, which is slower than float32. Some virtual
    machines announce AMX and stop whoever uses it, so another process tries it first.
    """
    if device.type != "cpu":
        return False
    # `dict` stands in where an older PyTorch has no such function.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("amx_bf16"):
        program = "import torch; x = torch.ones(1024, 1024).bfloat16(); x @ x"
        return subprocess.call([sys.executable, "-c", program]) == 0
    return capabilities.get("avx512_bf16", False)


def make_model(config: Config, device="cpu") -> MLP:
    """A fresh `MLP`; the same config gives the same weights to start from.

    Seeds torch's random numbers.
    """
    torch.manual_seed(config.seed)
    model = MLP(config.hidden, config.activation, config.batch_norm, config.dropout)
    return model.to(device)


def make_optimizer(model: MLP, config: Config) -> optim.Optimizer:
    """The optimizer of `config`, for the weights of `model`."""
    kind = {
        "adam": optim.Adam,
        "adamw": optim.AdamW,
        "sgd": partial(optim.SGD, momentum=0.9, nesterov=True),
    }[config.optimizer]
    return kind(
        model.parameters(),
        config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the weights instead of ten: faster
    )


def train_epoch(
    model: MLP,
    loader: Iterable,
    loss_function,
    optimizer,
    scheduler=None,
    bfloat16: bool = False,
) -> Tensor:
    """Show the model every batch of `loader` once and improve it after each.

    `loss_function` gives one loss per image (`reduction="none"`). They are returned,
    `[N] float32`. With `bfloat16`, the model's matrix products are in that format; all
    else stays float32. Raises `TrainingError` when a loss or a weight is no finite
    number any more. After an error or a stop, the model has the weights from before
    the epoch.
    """
    model.train()
    losses = []
    with undo_if_stopped(model):
        for pixels, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bfloat16):
                logits = model(pixels)  # [batch, 10]
            loss = loss_function(logits.float(), labels)  # [batch]
            loss.mean().backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            losses.append(loss.detach())
        if not all(value.isfinite().all() for value in (*losses, *model.parameters())):
            raise TrainingError(
                "the loss stopped being a number, with batches of "
                f"{len(losses[0])} and a learning rate of "
                f"{optimizer.defaults['lr']:.2g}: try a tenth of that rate, "
                "or look for bad pixels"
            )
    return torch.cat(losses)


def fit(
    model: MLP, config: Config, train: Digits, validation: Digits | None = None
) -> Iterator[Epoch]:
    """Train `model` as `config` says, on the device of the digits.

    Yields a record after every epoch. A fresh model, the same config and digits give
    the same result: every epoch seeds torch's random numbers anew. Raises
    `TrainingError` when the loss stops being a number; after that or a stop, the model
    has the weights of the last complete epoch.
    """
    count = round(len(train) * config.hard_fraction)  # digits shown in an epoch
    if count % config.batch_size == 1:
        count -= 1  # batch norm refuses a batch of one
    optimizer = make_optimizer(model, config)
    scheduler = None
    # Up for 15% of the steps, then down to nothing. PyTorch lowers the momentum
    # (Adam's first beta) while the rate is high.
    if config.one_cycle:
        scheduler = optim.lr_scheduler.OneCycleLR(
            optimizer,
            config.learning_rate,
            config.epochs * math.ceil(count / config.batch_size),
            pct_start=0.15,
        )
    loss_function = nn.CrossEntropyLoss(reduction="none")
    bfloat16 = config.bfloat16 and has_bfloat16(train.labels.device)
    losses = torch.full_like(train.labels, 3.0, dtype=torch.float32)  # unseen: hard
    for epoch in range(config.epochs):
        strength = 1 - config.augmentation_fade * epoch / config.epochs
        warp = partial(warp_digits, strength=config.augmentation * strength)
        validation_loss = accuracy = math.nan
        # What draws between the epochs changes nothing. (Pairs of whole numbers have
        # the same hash everywhere.)
        torch.manual_seed(hash((config.seed, epoch)))
        with undo_if_stopped(model):
            shown = draw_digits(losses, count)  # [count] places in `train`
            loader = make_loader(
                train[shown], config.batch_size, transform=v2.Compose([warp, TRANSFORM])
            )
            new_losses = train_epoch(
                model, loader, loss_function, optimizer, scheduler, bfloat16
            )
            if validation:
                result = evaluate(model, make_loader(validation, 1000))
                validation_loss, accuracy = result.loss, result.accuracy
        losses[shown] = new_losses
        yield Epoch(epoch + 1, new_losses.mean().item(), validation_loss, accuracy)


def draw_digits(losses: Tensor, count: int) -> Tensor:
    """`count` digits to show next, `[count] int64`, in random order without repeats.

    Hard ones, whose latest loss was large, are drawn more often: most soon have nothing
    left to teach (compare Katharopoulos and Fleuret 2018, "Not all samples are created
    equal"). The limits let easy ones come back and keep mislabelled ones from ruling.
    """
    drawn = torch.multinomial(losses.clamp(0.02, 5.0), count)
    return drawn[torch.randperm(count, device=drawn.device)]  # else hard ones go first


def score_config(config: Config, train: Digits, validation: Digits) -> float:
    """The validation accuracy of a fresh network after a whole training, a fraction."""
    model = make_model(config, train.labels.device)
    list(fit(model, config, train))  # judged once, at the end
    return evaluate(model, make_loader(validation, 1000)).accuracy


@contextmanager
def undo_if_stopped(model: MLP):
    """After an error or a stop in the block, the model is as it was before."""
    before = copy.deepcopy(model.state_dict())
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        raise
