"""Training: one epoch by hand, same config same weights, and what can stop it."""

import math
import sys
from dataclasses import FrozenInstanceError, replace
from unittest import mock

import pytest
import torch
from conftest import make_toy_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from mnist_helpers import training
from mnist_helpers.augment import warp_digits
from mnist_helpers.data import TRANSFORM, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import MLP
from mnist_helpers.training import (
    Config,
    TrainingError,
    choose_device,
    draw_digits,
    fit,
    has_bfloat16,
    make_model,
    make_optimizer,
    score_config,
    train_epoch,
)

TINY = Config(hidden=(4,), batch_size=50, epochs=2, learning_rate=0.02)
EVERYTHING = Config(  # nothing is as in TINY
    hidden=(8,),
    activation="gelu",
    batch_norm=True,
    dropout=0.2,
    optimizer="adamw",
    learning_rate=0.01,
    one_cycle=True,
    weight_decay=0.1,
    augmentation=0.5,
    augmentation_fade=0.5,
    hard_fraction=0.6,
    bfloat16=True,
    batch_size=32,
    epochs=3,
    seed=1,
)
VALIDATION = make_toy_digits(30, seed=8)
PER_DIGIT = nn.CrossEntropyLoss(reduction="none")


def flatten(model):
    """All that a model has learnt, in one row."""
    return nn.utils.parameters_to_vector(model.state_dict().values())


def train(config, digits):
    """The records of a training, one by one."""
    return fit(make_model(config), config, digits, VALIDATION)


# --- the hyperparameters


NONSENSE = {
    "hidden": [(0,), ("16",), "16"],
    "activation": ["sigmoid"],
    "batch_norm": [1],
    "dropout": [-0.1, 1.0],
    "optimizer": ["adagrad"],
    "learning_rate": [0, math.nan, math.inf, "0.01"],
    "weight_decay": [-1e-9],
    "augmentation": [-0.1],
    "augmentation_fade": [-0.1, 1.01],
    "hard_fraction": [0, 1.01],
    "batch_size": [1, 64.0],
    "epochs": [0],
    "seed": [-1, 2**32],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_name(name):
    for value in NONSENSE[name]:
        with pytest.raises(ValueError, match=name):
            Config(**{name: value})


def test_config():
    assert Config() == Config(
        (256, 128), "relu", False, 0, "adam", 1e-3, False, 0, 0, 0, 1, False, 64, 5, 0
    )
    assert Config(hidden=[3]).hidden == (3,)  # as a database gives it back
    assert Config(
        (), "tanh", True, 0.99, "sgd", 1, True, 9, 9, 1, 1e-9, True, 2, 1, 2**32 - 1
    )
    with pytest.raises(ValueError, match="learning_rat"):
        Config(learning_rat=0.1)
    with pytest.raises(FrozenInstanceError):
        Config().epochs = 3


# --- the model and its optimizer


def test_model_is_what_pytorch_makes_of_the_config():
    arguments = ((5, 4), "silu", True, 0.3)
    model = make_model(Config(*arguments), "meta")
    assert str(model) == str(MLP(*arguments))
    assert model.layers[0].weight.is_meta


def test_another_seed_another_model():
    other = make_model(replace(TINY, seed=1))
    assert not flatten(other).equal(flatten(make_model(TINY)))


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_optimizer_has_what_the_config_says(toy, name, kind, options):
    config = replace(TINY, optimizer=name, weight_decay=0.5)
    model = make_model(config)
    optimizer = make_optimizer(model, config)
    # Fused: a third faster
    wanted = kind(model.parameters(), 0.02, weight_decay=0.5, fused=True, **options)
    assert type(optimizer) is kind
    assert optimizer.param_groups == wanted.param_groups
    losses = train_epoch(model, make_loader(toy, 60), PER_DIGIT, optimizer)
    assert not losses.requires_grad


# --- fit


def test_fit_is_a_loop_of_a_few_lines(toy):
    """The very same weights and records by hand, from the same random numbers."""
    config = replace(EVERYTHING, one_cycle=False, optimizer="sgd")
    by_hand = make_model(config)
    optimizer = make_optimizer(by_hand, config)
    losses = torch.full([100], 3.0)
    short = has_bfloat16(losses.device)
    model = make_model(config).eval()
    for value in model.parameters():
        value.grad = torch.ones_like(value)  # of an earlier step: must not count
    for number, epoch in enumerate(fit(model, config, toy, VALIDATION)):
        torch.manual_seed(hash((config.seed, number)))
        shown = draw_digits(losses, 60)
        strength = 0.5 * (6 - number) / 6  # half of it fades in three epochs
        by_hand.train()
        for batch in shown.split(32):
            pixels = TRANSFORM(warp_digits(toy.images[batch], strength))
            with torch.autocast("cpu", torch.bfloat16, enabled=short):
                logits = by_hand(pixels)
            loss = PER_DIGIT(logits.float(), toy.labels[batch])
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses[batch] = loss.detach()
        torch.testing.assert_close(flatten(model), flatten(by_hand))
        result = evaluate(by_hand, make_loader(VALIDATION, 7))
        assert epoch.number == number + 1
        assert epoch.train_loss == pytest.approx(losses[shown].mean().item())
        assert epoch.validation_loss == pytest.approx(result.loss, rel=1e-4)
        assert epoch.validation_accuracy == pytest.approx(result.accuracy)


def test_same_config_same_weights_whoever_else_draws_random_numbers(toy):
    wanted = list(train(EVERYTHING, toy))
    other = train(replace(EVERYTHING, seed=2), toy)  # between the epochs
    records = [record for record, _ in zip(train(EVERYTHING, toy), other, strict=True)]
    assert records == wanted


def test_how_many_digits_an_epoch_shows(toy):
    """The learning rate's cycle is as long, with a first part of 15%."""
    for size, fraction, shown, batches in (
        (65, 1.0, 64, 2),  # a last batch of one is left out
        (66, 1.0, 66, 3),
        (4, 0.5, 2, 1),
    ):
        config = replace(EVERYTHING, hard_fraction=fraction)
        with mock.patch.object(training, "train_epoch", wraps=train_epoch) as train_it:
            *_, last = fit(make_model(config), config, toy[:size])
        _, loader, _, optimizer, scheduler, _ = train_it.call_args.args
        assert len(loader.dataset) == shown
        steps = 3 * batches
        wanted = OneCycleLR(optimizer, 0.01, steps, pct_start=0.15)
        for _ in range(steps):
            wanted.step()
        assert scheduler.state_dict() == wanted.state_dict()
        assert math.isnan(last.validation_loss)
        assert math.isnan(last.validation_accuracy)


def test_hard_digits_are_drawn_more_often():
    torch.manual_seed(0)
    for losses, share in (
        ([100.0, 2.5, 2.5], 0.5),  # as 5 to 2.5: mislabelled digits do not take over
        ([0.0, 0.04, 0.04], 0.2),  # as 0.02 to 0.04: easy ones come back
    ):
        drawn = torch.cat([draw_digits(torch.tensor(losses), 1) for _ in range(4000)])
        assert (drawn == 0).double().mean().item() == pytest.approx(share, abs=0.03)


def test_digits_come_in_random_order():
    torch.manual_seed(0)
    for count in (300, 1000):
        drawn = draw_digits(torch.tensor([2.0] * 500 + [0.02] * 500), count)
        assert drawn.unique().numel() == count
        hard = (drawn < 500).nonzero().double()
        assert hard.mean().item() == pytest.approx(count / 2, abs=count / 20)


def test_digits_are_learnt_by_heart(toy):
    config = replace(EVERYTHING, augmentation=0.0, dropout=0.0, epochs=30)
    *_, last = fit(make_model(config), config, toy, toy)
    assert last.validation_accuracy == 1
    *_, record = train(TINY, toy)
    assert score_config(TINY, toy, VALIDATION) == record.validation_accuracy < 1


# --- stopped and failing


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (training, "draw_digits"),
        (torch.Tensor, "backward"),
        (OneCycleLR, "step"),
        (training, "train_epoch"),
        (training, "evaluate"),
    ],
)
def test_after_a_stop_the_model_is_that_of_the_last_epoch(
    toy, monkeypatch, owner, name
):
    model = make_model(EVERYTHING)
    epochs = fit(model, EVERYTHING, toy, VALIDATION)
    next(epochs)
    complete = flatten(model)
    original = getattr(owner, name)

    def stop(*args, **options):
        original(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(KeyboardInterrupt):
        next(epochs)
    assert flatten(model).equal(complete)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("rate", "change"),
    [(1e38, lambda loss: 1e4 * loss), (0.01, lambda loss: loss + math.inf)],
)
def test_what_is_no_number_stops_training(toy, rate, change):
    """Weights after the last step, or a loss whose weights are numbers."""
    model = make_model(TINY)
    start = flatten(model)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    loader = make_loader(toy, 100)
    message = rf"batches of 100 .* learning rate of {rate:.2g}: .* pixels"
    with pytest.raises(TrainingError, match=message.replace("+", r"\+")):
        train_epoch(model, loader, lambda *pair: change(PER_DIGIT(*pair)), optimizer)
    assert flatten(model).equal(start)


# --- the device


def install_card(monkeypatch):
    """Pretend that there is a card."""
    # Only the first who asks hears of it: PyTorch itself must not believe it.
    answers = {"is_available": True, "current_accelerator": torch.device("cpu:0")}
    for name, answer in answers.items():
        answer_once = mock.Mock(side_effect=[answer] + [None] * 99)
        monkeypatch.setattr(torch.accelerator, name, answer_once)


@pytest.mark.parametrize("works", [True, False])
def test_bfloat16_where_the_processor_is_fast_at_it(monkeypatch, works):
    monkeypatch.setattr(sys, "executable", sys.executable if works else "false")
    ask = has_bfloat16.__wrapped__  # without its cache
    for announced, amx in ((True, True), (True, False), (False, False)):
        tell = {"avx512_bf16": announced, "amx_bf16": amx}.copy
        monkeypatch.setattr(torch.cpu, "get_capabilities", tell, raising=False)
        assert ask(torch.device("cpu")) == (announced and (works or not amx))
        assert not ask(torch.device("meta"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older PyTorch
    assert not ask(torch.device("cpu"))


def test_without_a_card_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(training, "score_config", None)
    assert choose_device() == (torch.device("cpu"), "no graphics card was found")


def test_card_that_works_is_chosen(monkeypatch):
    install_card(monkeypatch)
    assert choose_device() == (torch.device("cpu:0"), "a trial training worked")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.Tensor, "backward"),
        (nn.functional, "dropout"),
        (nn.functional, "batch_norm"),
        (nn.functional, "grid_sample"),
        (torch, "multinomial"),
    ],
)
def test_the_trial_is_a_whole_training(monkeypatch, owner, name):
    """Some cards fail in one of its steps only."""
    install_card(monkeypatch)
    fail = mock.Mock(side_effect=NotImplementedError("no such kernel " * 99))
    monkeypatch.setattr(owner, name, fail)
    device, reason = choose_device()
    assert device == torch.device("cpu")
    assert reason.startswith("cpu:0 was found but failed: NotImplementedError('no such")
    assert len(reason) < 250
