"""Training: one epoch by hand, same config same weights, and what can stop it."""

import copy
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_toy_digits
from torch import nn

from mnist_helpers import training
from mnist_helpers.augment import RandomWarp
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


def flatten(model) -> torch.Tensor:
    """All that a model has learnt, in one row."""
    values = model.state_dict().values()
    return torch.cat([value.flatten().float() for value in values])


def train(config, digits, validation=VALIDATION):
    """The records of a training, times aside, and the weights after each epoch."""
    model = make_model(config)
    rows = []
    for epoch in fit(model, config, digits, validation):
        rows.append((replace(epoch, seconds=0.0), flatten(model).tolist()))
    return rows


# --- the hyperparameters


NONSENSE = {
    "hidden": [(0,), ("16",), "16"],
    "activation": ["sigmoid"],
    "batch_norm": [1],
    "dropout": [-0.1, 1.0],
    "optimizer": ["adagrad"],
    "learning_rate": [0, math.nan, math.inf, "0.01"],
    "one_cycle": ["yes"],
    "weight_decay": [-1e-9],
    "augmentation": [-0.1],
    "augmentation_fade": [-0.1, 1.01],
    "hard_fraction": [0, 1.01],
    "bfloat16": [1],
    "batch_size": [1, 64.0],
    "epochs": [0],
    "seed": [-1],
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
        (), "tanh", True, 0.99, "sgd", 1, True, 9, 9, 1, 1e-9, True, 2, 1, 2**70
    )
    with pytest.raises(ValueError, match="learning_rat"):
        Config(learning_rat=0.1)
    with pytest.raises(FrozenInstanceError):
        Config().epochs = 3


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_every_hyperparameter_changes_what_is_learnt(toy, name):
    config = replace(TINY, augmentation=1.0, weight_decay=1.0)
    changed = replace(config, **{name: getattr(EVERYTHING, name)})
    assert train(config, toy)[-1][1] != train(changed, toy)[-1][1]


# --- the model and its optimizer


def test_model_is_what_pytorch_makes_of_the_config():
    options = {"batch_norm": True, "dropout": 0.3}
    model = make_model(Config((5, 4), "silu", **options), "meta")
    assert str(model) == str(MLP((5, 4), "silu", **options))
    assert model.layers[0].weight.is_meta


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_optimizer_is_the_one_of_textbooks(toy, name, kind, options):
    """Two steps as PyTorch's plain loop over the weights takes them."""
    config = replace(TINY, optimizer=name, weight_decay=0.5)
    model = make_model(config)
    by_hand = copy.deepcopy(model)
    weights = by_hand.parameters()
    reference = kind(weights, 0.02, weight_decay=0.5, foreach=False, **options)
    optimizer = make_optimizer(model, config)
    for _ in range(2):
        train_epoch(model, make_loader(toy, 100), PER_DIGIT, optimizer)
        reference.zero_grad()
        F.cross_entropy(by_hand(TRANSFORM(toy.images)), toy.labels).backward()
        reference.step()
    torch.testing.assert_close(flatten(model), flatten(by_hand))
    assert optimizer.defaults["fused"]  # a third faster


# --- one epoch


def test_one_step_by_hand(toy):
    """Gradient descent: the weights minus rate times gradient of the mean loss."""
    model = MLP((8,)).eval()
    by_hand = copy.deepcopy(model)
    wanted = F.cross_entropy(
        by_hand(TRANSFORM(toy.images)), toy.labels, reduction="none"
    )
    wanted.mean().backward()
    for value in model.parameters():
        value.grad = torch.ones_like(value)  # of an earlier step: must not count

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.no_grad():
        losses = train_epoch(model, make_loader(toy, 100), PER_DIGIT, optimizer)
    torch.testing.assert_close(losses, wanted.detach())
    assert not losses.requires_grad
    assert model.training
    for value, old in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(value, old - 0.5 * old.grad)


# --- fit


def test_fit_is_a_loop_of_a_few_lines(toy):
    """The very same weights and records by hand, from the same random numbers."""
    config = replace(EVERYTHING, one_cycle=False, optimizer="sgd")
    by_hand = make_model(config)
    optimizer = make_optimizer(by_hand, config)
    losses = torch.full([100], 3.0)
    model = make_model(config)
    for number, epoch in enumerate(fit(model, config, toy, VALIDATION)):
        with training.random_numbers("cpu", config.seed, number):
            shown = draw_digits(losses, 60)
            warp = RandomWarp([0.5, 0.5 * 5 / 6, 0.5 * 4 / 6][number])
            by_hand.train()
            for batch in shown.split(32):
                pixels = TRANSFORM(warp(toy.images[batch]))
                with torch.autocast("cpu", torch.bfloat16):
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
        assert epoch.learning_rate == 0.01
        assert 0 < epoch.seconds < 60


def test_same_config_same_weights_and_nobody_elses_random_numbers(toy):
    wanted = train(EVERYTHING, toy)
    other = replace(EVERYTHING, seed=2)
    together = zip(
        fit(make_model(EVERYTHING), EVERYTHING, toy, VALIDATION),
        fit(make_model(other), other, toy, VALIDATION),
        strict=True,
    )
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for (epoch, _), (record, _) in zip(together, wanted, strict=True):
        assert torch.equal(torch.get_rng_state(), before)
        assert replace(epoch, seconds=0.0) == record
        torch.manual_seed(98)  # what others do between two epochs
        before = torch.get_rng_state()


def cycle(step, steps):
    """The rate of a step of Smith and Topin's cycle up to 0.01."""
    top = 0.15 * steps - 1
    low, part = 0.01 / 25, step / top
    if step > top:
        low, part = 0.01 / 25e4, (steps - 1 - step) / (steps - 1 - top)
    return low + (0.01 - low) * (1 - math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("steps", range(1, 21))
def test_one_cycle(steps, toy):
    config = replace(EVERYTHING, hard_fraction=1.0, batch_size=100, epochs=steps)
    rates = [epoch.learning_rate for epoch in fit(make_model(config), config, toy)]
    assert rates == pytest.approx([cycle(step, steps) for step in range(steps)])


@pytest.fixture
def draws(monkeypatch):
    """What `fit` draws from, and draws: pairs of all losses and the places shown."""
    drawn = []

    def spy(losses, count):
        before = losses.clone()
        drawn.append((before, draw_digits(losses, count)))
        return drawn[-1][1]

    monkeypatch.setattr(training, "draw_digits", spy)
    return drawn


@pytest.mark.parametrize(
    ("size", "fraction", "shown", "batches"),
    [
        (65, 1.0, 64, 2),  # a last batch of one is left out
        (66, 1.0, 66, 3),
        (4, 0.5, 2, 1),
    ],
)
def test_how_many_digits_an_epoch_shows(toy, draws, size, fraction, shown, batches):
    config = replace(EVERYTHING, hard_fraction=fraction)
    *_, last = fit(make_model(config), config, toy[:size])
    assert [len(places.unique()) for _, places in draws] == [shown] * 3
    assert last.learning_rate == pytest.approx(cycle(2 * batches, 3 * batches))
    assert math.isnan(last.validation_loss)
    assert math.isnan(last.validation_accuracy)


@pytest.mark.parametrize("size", [0, 1])
def test_too_few_digits_are_refused(toy, size):
    with pytest.raises(ValueError, match="two digits"):
        next(fit(make_model(TINY), TINY, toy[:size]))


def test_an_epoch_draws_from_the_latest_losses(toy, draws):
    config = replace(TINY, hard_fraction=0.4, learning_rate=1e-12, batch_size=16)
    model = make_model(config)
    list(fit(model, config, toy))
    (first, shown), (second, _) = draws
    losses = F.cross_entropy(model(TRANSFORM(toy.images)), toy.labels, reduction="none")
    assert first.tolist() == [3.0] * 100
    first[shown] = losses.detach()[shown]
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((100.0, 1.0, 1.0), 0.5),  # as 2 to 1: mislabelled digits do not take over
        ((0.0, 0.04, 0.04), 0.2),  # as 0.02 to 0.04: easy ones come back
    ],
)
def test_hard_digits_are_drawn_more_often(losses, share):
    torch.manual_seed(0)
    drawn = torch.cat([draw_digits(torch.tensor(losses), 1) for _ in range(4000)])
    assert (drawn == 0).double().mean().item() == pytest.approx(share, abs=0.03)


def test_all_digits_come_in_random_order():
    torch.manual_seed(0)
    drawn = draw_digits(torch.tensor([2.0] * 500 + [0.02] * 500), 1000)
    assert sorted(drawn.tolist()) == list(range(1000))
    assert (drawn < 500).nonzero().double().mean().item() == pytest.approx(500, abs=50)


def test_digits_are_learnt_by_heart(toy):
    config = replace(EVERYTHING, augmentation=0.0, dropout=0.0, epochs=30)
    *_, last = fit(make_model(config), config, toy, toy)
    assert last.validation_accuracy == 1
    record, _ = train(TINY, toy)[-1]
    assert score_config(TINY, toy, VALIDATION) == record.validation_accuracy < 1


# --- stopped and failing


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (training, "draw_digits"),
        (torch.Tensor, "backward"),
        (training.OneCycleLR, "step"),
        (training, "train_epoch"),
        (training, "evaluate"),
    ],
)
def test_after_a_stop_the_model_is_that_of_the_last_epoch(
    toy, monkeypatch, owner, name
):
    before = torch.get_rng_state()
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
    assert torch.get_rng_state().equal(before)


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
    message = rf"batches of 100, .* learning rate \({rate:.2g}\), .* pixels"
    with pytest.raises(TrainingError, match=message.replace("+", r"\+")):
        train_epoch(model, loader, lambda *pair: change(PER_DIGIT(*pair)), optimizer)
    assert flatten(model).equal(start)


# --- the device


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a card: call it with its name."""

    def install(name):
        # One answer each: PyTorch itself must not believe it.
        found, devices = iter([True]), iter([torch.device(name)])
        answers = {
            "is_available": lambda: next(found, False),
            "current_accelerator": lambda **_: next(devices, None),
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.accelerator, function, answer)

    return install


def test_bfloat16_multiplies_rounded_numbers(toy):
    """One step: as precise as 8 binary digits, and all that is kept is float32."""
    losses, weights = [], []
    for bfloat16 in (False, True):
        model = make_model(TINY)
        optimizer = make_optimizer(model, replace(TINY, optimizer="sgd"))
        loader = make_loader(toy, len(toy))
        losses.append(train_epoch(model, loader, PER_DIGIT, optimizer, None, bfloat16))
        weights.append(flatten(model))
        assert {value.dtype for value in model.parameters()} == {torch.float32}
    for exact, rounded in (losses, weights):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).abs().max() < 0.03


@pytest.mark.parametrize("announced", [True, False])
def test_bfloat16_where_the_processor_announces_it(monkeypatch, announced):
    tell = {"avx512_bf16": announced, "amx_bf16": True}.copy
    monkeypatch.setattr(torch.cpu, "get_capabilities", tell, raising=False)
    assert has_bfloat16(torch.device("cpu")) == announced
    assert not has_bfloat16(torch.device("meta"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older PyTorch
    assert not has_bfloat16(torch.device("cpu"))


def test_without_a_card_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(training, "score_config", None)
    assert choose_device() == (torch.device("cpu"), "no graphics card was found")


def test_card_that_works_is_chosen(card):
    card("cpu:0")
    assert choose_device() == (torch.device("cpu:0"), "a trial training worked")


def test_card_that_fails_is_named(card):
    card("meta")
    device, reason = choose_device()
    assert device == torch.device("cpu")
    assert reason.startswith("meta was found but failed: ")
    assert len(reason) < 250


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.Tensor, "backward"),
        (F, "dropout"),
        (F, "batch_norm"),
        (F, "grid_sample"),
        (torch, "multinomial"),
    ],
)
def test_the_trial_is_a_whole_training(card, monkeypatch, owner, name):
    """Some cards fail in one of its steps only."""
    card("cpu:0")
    monkeypatch.setattr(owner, name, lambda *args, **options: 1 / 0)
    reason = "cpu:0 was found but failed: ZeroDivisionError('division by zero')"
    assert choose_device() == (torch.device("cpu"), reason)
