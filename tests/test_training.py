"""Training: hyperparameters, one epoch by hand, same seed same weights, hard digits, and what can stop it."""

import copy
import dataclasses
import math
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_toy_digits
from torch import nn
from torch.overrides import TorchFunctionMode

from mnist_helpers import plots, training
from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import TRANSFORM, Digits, make_loader
from mnist_helpers.evaluation import evaluate
from mnist_helpers.model import ACTIVATIONS, MLP
from mnist_helpers.training import (
    OPTIMIZERS,
    Config,
    HardDigits,
    TrainingError,
    choose_device,
    fit,
    make_training_loader,
    train_epoch,
)

TINY = Config(hidden=(16,), batch_size=32, epochs=2)
ALL_PARTS = Config(
    hidden=(16,),
    activation="gelu",
    batch_norm=True,
    dropout=0.1,
    optimizer="adamw",
    one_cycle=True,
    weight_decay=0.05,
    augmentation=0.5,
    augmentation_fade=0.5,
    hard_fraction=0.6,
    batch_size=32,
    epochs=3,
)
VALIDATION = make_toy_digits(50, seed=8)
PER_DIGIT = nn.CrossEntropyLoss(reduction="none")


def change(config: Config = TINY, **fields) -> Config:
    return dataclasses.replace(config, **fields)


def weights(model: nn.Module) -> torch.Tensor:
    """Everything that a model has learnt, in one row."""
    return torch.cat([value.detach().flatten().float() for value in (*model.parameters(), *model.buffers())])


def run(config: Config, train: Digits, between=lambda epoch: None, **options) -> list[torch.Tensor]:
    """For each epoch the figures of its record (times aside) and the model's weights, in one row."""
    rows = []
    for epoch in fit(config, train, VALIDATION, **options):
        figures = [epoch.number, epoch.train_loss, epoch.validation_loss, epoch.learning_rate]
        rows.append(torch.cat([torch.tensor(figures), weights(epoch.model)]))
        between(epoch)
    return rows


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- the hyperparameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "hidden": [(0,), (-5,), (16, 0), (1.5,), ("16",), "16", (math.nan,), 16, None, (10**10,)],
        "activation": ["sigmoid", "", "ReLU", None, 3, ["relu"]],
        "batch_norm": ["yes", None, 2, math.nan],
        "dropout": [-0.1, 1.0, 7, math.nan, "much", None],
        "optimizer": ["adagrad", "", None, ["sgd"]],
        "learning_rate": [0, -1e-3, math.nan, math.inf, -math.inf, "high", None],
        "one_cycle": ["yes", None, -1],
        "weight_decay": [-1e-9, math.nan, math.inf, "no"],
        "augmentation": [-0.1, math.nan, math.inf, "some"],
        "augmentation_fade": [-0.1, 1.01, math.nan],
        "hard_fraction": [0, -0.5, 1.01, math.nan],
        "batch_size": [0, 1, -64, 64.0, math.nan, "64", None, True],
        "epochs": [0, -1, 2.0, math.nan, "5", None],
        "seed": [-1, 2**32, 1.5, "0", None, math.nan],
    }.items(),
)
def test_nonsense_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be .+, got ") as caught:
            Config(**{name: value})
        assert str(caught.value).endswith(f"got {value!r}")
        assert len(str(caught.value)) < 120
        assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("hidden", map(int, ("32", "16")), (32, 16)),
        ("hidden", np.array([32, 16]), (32, 16)),
        ("hidden", [], ()),
        ("batch_norm", np.bool_(True), True),
        ("dropout", 0, 0.0),
        ("dropout", 0.99, 0.99),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", 1e-12, 1e-12),
        ("hard_fraction", 1e-6, 1e-6),
        ("batch_size", np.int64(2), 2),
        ("epochs", torch.tensor(1), 1),
        ("seed", 2**32 - 1, 2**32 - 1),
    ],
)
def test_sense_becomes_a_number_of_python(name, given, kept):
    value = getattr(Config(**{name: given}), name)
    assert (value, type(value)) == (kept, type(kept))
    assert all(type(number) is int for number in value) if name == "hidden" else True


def test_defaults_are_those_that_the_notebook_explains():
    assert Config() == Config((256, 128), "relu", False, 0, "adam", 1e-3, False, 0, 0, 0, 1, 64, 5, 0)


def test_config_is_fixed_and_knows_no_other_names():
    with pytest.raises(TypeError, match="learning_rat"):
        Config(learning_rat=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


@pytest.mark.parametrize(
    "extreme",
    [
        {"hidden": ()},
        {"hard_fraction": 1e-6, "batch_norm": True},
        {"batch_size": 2},
        {"batch_size": 10**9, "hidden": (1,)},
        {"augmentation": 1e9},
        {"dropout": 0.99},
        {"learning_rate": 1e-12, "weight_decay": 1e9},
        {"seed": 2**32 - 1},
    ],
)
def test_whatever_config_accepts_trains(toy, extreme):
    (epoch,) = fit(change(**{"epochs": 1, "one_cycle": True} | extreme), toy, VALIDATION)
    assert math.isfinite(epoch.train_loss)


CHANGES = {  # every field, switched; and in which surroundings it counts
    "hidden": (16, 16),
    "activation": "tanh",
    "batch_norm": True,
    "dropout": 0.5,
    "optimizer": "sgd",
    "learning_rate": 1e-2,
    "one_cycle": True,
    "weight_decay": 0.1,
    "augmentation": 1.0,
    "augmentation_fade": 1.0,
    "hard_fraction": 0.5,
    "batch_size": 10,
    "epochs": 4,
    "seed": 1,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_every_hyperparameter_changes_what_is_learnt(toy, name):
    before = change(augmentation=1.0) if name == "augmentation_fade" else TINY
    assert getattr(before, name) != CHANGES[name]
    first, second = run(before, toy), run(change(before, **{name: CHANGES[name]}), toy)
    assert not same([first[-1][1:3]], [second[-1][1:3]])  # another training and validation loss


# --- one epoch --------------------------------------------------------------------------------------


def test_one_step_by_hand(toy):
    """Plain gradient descent on the mean loss of one batch: weights minus rate times gradient."""
    model = MLP((8,))
    by_hand = copy.deepcopy(model)
    loss = F.cross_entropy(by_hand(TRANSFORM(toy.images)), toy.labels)
    gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
    wanted = [value - 0.5 * gradient for value, gradient in zip(by_hand.parameters(), gradients, strict=True)]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)  # of a former step: must not count
    losses = train_epoch(model, make_loader(toy, len(toy)), PER_DIGIT, optimizer)
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=1e-6)


def test_losses_are_those_of_the_digits_in_order(toy):
    model = MLP((8,))
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = train_epoch(model, make_loader(toy, 64), PER_DIGIT, frozen)  # 64 and 36 digits
    wanted = F.cross_entropy(model(TRANSFORM(toy.images)), toy.labels, reduction="none")
    torch.testing.assert_close(losses, wanted.detach())
    assert not losses.requires_grad


def test_training_mode_is_switched_on_and_the_scheduler_moves_with_every_batch(toy):
    model = MLP((8,), batch_norm=True).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train_epoch(model, make_loader(toy, 40), PER_DIGIT, optimizer, scheduler)
    assert model.training
    assert [int(module.num_batches_tracked) for module in model.layers if hasattr(module, "running_var")] == [
        3
    ]
    assert optimizer.param_groups[0]["lr"] == 1 / 8


# --- the optimizers, by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_by_hand(toy, optimizer, decay):
    """Two steps: Adam's moments, AdamW's decay of its own, SGD's momentum that looks ahead (Nesterov)."""
    rate = 0.01
    config = change(hidden=(4,), batch_size=100, optimizer=optimizer, learning_rate=rate, weight_decay=decay)
    steps = [weights(epoch.model) for epoch in fit(config, toy, shuffle=False)]
    with torch.random.fork_rng():
        torch.manual_seed(TINY.seed)
        by_hand = MLP((4,))
    states = {name: [0.0, 0.0] for name, _ in by_hand.named_parameters()}
    for number in (1, 2):
        loss = F.cross_entropy(by_hand(TRANSFORM(toy.images)), toy.labels)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        for (name, value), gradient in zip(by_hand.named_parameters(), gradients, strict=True):
            state = states[name]
            with torch.no_grad():
                if optimizer == "adamw":
                    value *= 1 - rate * decay
                else:
                    gradient = gradient + decay * value
                if optimizer == "sgd":
                    state[0] = 0.9 * state[0] + gradient
                    value -= rate * (gradient + 0.9 * state[0])
                else:
                    state[0] = 0.9 * state[0] + 0.1 * gradient
                    state[1] = 0.999 * state[1] + 0.001 * gradient**2
                    mean, square = state[0] / (1 - 0.9**number), state[1] / (1 - 0.999**number)
                    value -= rate * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(steps[number - 1], weights(by_hand), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"optimizer": name, "batch_norm": norm} for name in OPTIMIZERS for norm in (False, True)]
    + [{"activation": name} for name in ACTIVATIONS],
)
def test_one_tiny_batch_is_learnt_by_heart(toy, fields):
    config = change(hidden=(32,), learning_rate=0.01, epochs=40, batch_size=20)
    *_, last = fit(change(config, **fields), toy[:20], toy[:20])
    assert last.train_loss < 0.1
    assert last.validation_accuracy == 1.0


# --- fit: reproducible ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [TINY, change(dropout=0.5), ALL_PARTS], ids=["plain", "dropout", "all parts"]
)
def test_same_call_same_weights_whatever_happens_between(toy, config):
    """Evaluating, drawing and everybody's global random numbers do not move those of the training."""

    def disturb(epoch):
        torch.rand(5), np.random.rand(), random.random()  # noqa: NPY002
        torch.manual_seed(epoch.number)
        evaluate(epoch.model, make_loader(VALIDATION, 16))
        next(iter(make_loader(toy, 8, shuffle=True)))
        plots.render_png(plots.plot_history([epoch], 3, "so far"))
        for value in epoch.model.parameters():
            value.data.zero_()  # not even spoiling the model that was handed out

    first = run(config, toy)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(run(config, toy), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(run(config, toy, disturb), first)
    assert not same(run(change(config, seed=1), toy), first)


def test_two_trainings_at_once_do_not_meet(toy):
    configs = [change(ALL_PARTS, dropout=0.5), change(ALL_PARTS, dropout=0.5, seed=1)]
    alone = [weights(list(fit(config, toy, VALIDATION))[-1].model) for config in configs]
    together = list(zip(*[fit(config, toy, VALIDATION) for config in configs], strict=True))[-1]
    assert same([weights(epoch.model) for epoch in together], alone)


def test_one_and_two_threads_agree():
    """Sums in another order differ in the last bits; two epochs later the losses agree to 0.1%."""
    train, before, results = make_toy_digits(512), torch.get_num_threads(), []
    config = change(hidden=(256, 256), batch_size=128, learning_rate=1e-4, dropout=0.2)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([[r.train_loss, r.validation_loss] for r in fit(config, train, VALIDATION)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*map(torch.tensor, results), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("config", [TINY, ALL_PARTS], ids=["plain", "all parts"])
def test_trains_where_gradients_are_off(toy, mode, config):
    with mode():
        inside = run(config, toy)
        assert not torch.is_grad_enabled()
    assert same(inside, run(config, toy))


def test_training_loader_can_be_pickled(toy):
    """Warps and hard digits too, and no worker processes: these hang in notebooks."""
    loader = make_training_loader(ALL_PARTS, toy)
    copied = pickle.loads(pickle.dumps(loader))
    assert loader.num_workers == 0
    for (pixels, labels), (copied_pixels, copied_labels) in zip(loader, copied, strict=True):
        assert torch.equal(pixels, copied_pixels)
        assert torch.equal(labels, copied_labels)


def test_dropout_draws_other_numbers_in_every_epoch_and_for_every_seed(toy):
    seen = set()

    def spy(images):
        seen.add(torch.initial_seed())
        return TRANSFORM(images)

    for seed in (0, 1):
        list(fit(change(seed=seed), toy, transform=spy))
    assert len(seen) == 4


# --- fit: what its records say, and what it trains on -------------------------------------------------


def test_record_of_every_epoch(toy):
    for number, epoch in enumerate(fit(TINY, toy, VALIDATION), start=1):
        result = evaluate(epoch.model, make_loader(VALIDATION, 7))
        assert epoch.number == number
        assert epoch.validation_loss == pytest.approx(result.loss, abs=1e-5)
        assert epoch.validation_accuracy == pytest.approx(result.accuracy)
        assert epoch.learning_rate == TINY.learning_rate
        assert 0 < epoch.seconds < 60
        assert not epoch.model.training
        assert epoch.model.options == MLP((16,)).options
    assert number == TINY.epochs
    with pytest.raises(dataclasses.FrozenInstanceError):
        epoch.number = 3


def test_network_starts_as_pytorch_starts_it_from_the_seed(toy):
    config = change(hidden=(5,), learning_rate=1e-12, seed=3)
    (*_, last), _ = fit(config, toy), torch.manual_seed(3)
    torch.testing.assert_close(weights(last.model), weights(MLP((5,))))


def test_mean_loss_counts_every_digit_alike_when_the_last_batch_is_short(toy):
    (epoch,) = fit(change(batch_size=64, epochs=1, learning_rate=1e-12), toy, VALIDATION)
    wanted = F.cross_entropy(epoch.model(TRANSFORM(toy.images)), toy.labels).item()
    assert epoch.train_loss == pytest.approx(wanted, abs=1e-6)


def test_without_validation_digits(toy):
    for none in (None, toy[:0]):
        epoch = next(fit(TINY, toy, none))
        assert math.isnan(epoch.validation_loss)
        assert math.isnan(epoch.validation_accuracy)
        assert epoch.train_loss == next(fit(TINY, toy, VALIDATION)).train_loss


def test_one_cycle_rises_and_falls(toy):
    config = change(one_cycle=True, learning_rate=0.01, epochs=20, batch_size=20)  # five steps an epoch
    rates = [epoch.learning_rate for epoch in fit(config, toy)]
    peak = rates.index(max(rates))
    assert 1 <= peak <= 4  # after three twentieths of the way
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[-1] < 0.01 / 1000


@pytest.mark.parametrize("steps", range(1, 21))  # with a warm-up of 0.1, PyTorch divides by zero in ten steps
def test_one_cycle_of_any_length(toy, steps):
    *_, last = fit(change(one_cycle=True, epochs=steps, batch_size=len(toy)), toy)
    assert 0 <= last.learning_rate < TINY.learning_rate


def pixels_of(config: Config, digits: Digits, epochs: int = 1, **options) -> list[torch.Tensor]:
    loader = make_training_loader(config, digits, **options)
    return [pixels for _ in range(epochs) for pixels, _ in loader]


def test_training_sees_the_warps_that_its_config_names(toy):
    """Of the named strength and seed, fading over all batches of all epochs."""
    config = change(augmentation=0.8, augmentation_fade=0.5, batch_size=50, seed=4)
    by_hand = RandomWarp(0.8, fade=0.5, steps=4, seed=4)
    for number, pixels in enumerate(pixels_of(config, toy, epochs=2, shuffle=False)):
        batch = toy.images[:50] if number % 2 == 0 else toy.images[50:]
        torch.testing.assert_close(pixels, TRANSFORM(by_hand(batch)), rtol=0, atol=1e-5)


def test_same_transform_for_training_and_validation(toy):
    """An experiment on preprocessing must not validate on what the network has never seen."""

    def negative(images):
        return -TRANSFORM(images)

    (epoch,) = fit(change(epochs=1), toy, VALIDATION, transform=negative)
    assert torch.equal(pixels_of(TINY, toy, transform=negative, shuffle=False)[0], negative(toy.images[:32]))
    wanted = F.cross_entropy(epoch.model(negative(VALIDATION.images)), VALIDATION.labels).item()
    assert epoch.validation_loss == pytest.approx(wanted, abs=1e-5)


def test_order_is_shuffled_from_the_seed_unless_it_should_not_be(toy):
    def order(**options):
        return torch.cat([labels for _, labels in make_training_loader(change(seed=7), toy, **options)])

    assert torch.equal(order(shuffle=False), toy.labels)
    permutation = torch.randperm(100, generator=torch.Generator().manual_seed(7))
    assert torch.equal(order(), toy.labels[permutation])


@pytest.mark.parametrize("fields", [{}, {"hard_fraction": 0.65}])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_last_batch_of_one_image_is_left_out(toy, fields, shuffle):
    """Batch norm has no deviation of a single image."""
    config, digits = change(ALL_PARTS, batch_size=64, **{"hard_fraction": 1} | fields), toy[:65]
    if fields:
        config, digits = change(config, hard_fraction=0.65), toy  # 65 of 100
    *_, last = fit(config, digits, VALIDATION, shuffle=shuffle)
    assert math.isfinite(last.train_loss)
    assert [len(pixels) for pixels in pixels_of(config, digits, shuffle=shuffle)] == [64]


def test_learns_real_digits(mnist):
    config = Config(hidden=(128,), epochs=2, batch_size=128, learning_rate=2e-3)
    *_, last = fit(config, mnist[0][:20_000], mnist[0][50_000:])
    assert 0.95 < last.validation_accuracy < 1
    assert 0.94 < evaluate(last.model, make_loader(mnist[1], 1000)).accuracy < 1


def test_everything_is_computed_in_float32(toy):
    """bfloat16 kills the process on some virtual CPUs, so no autocast may be at work."""
    seen = set()

    def spy(images):
        seen.add(torch.is_autocast_enabled("cpu"))
        return TRANSFORM(images)

    epoch = next(fit(TINY, toy, VALIDATION, transform=spy))
    assert seen == {False}
    assert {p.dtype for p in epoch.model.parameters()} == {torch.float32}


# --- hard digits ------------------------------------------------------------------------------------


def make_sampler(size: int, fraction: float, seed: int = 0, losses=None, batch_size: int = 8) -> HardDigits:
    sampler = HardDigits(size, fraction, batch_size, torch.Generator().manual_seed(seed))
    if losses is not None:
        sampler.losses = torch.as_tensor(losses, dtype=torch.float32)
    return sampler


def draw(sampler: HardDigits) -> list[int]:
    return torch.cat(list(sampler)).tolist()


def share_of_first_half(losses: tuple[float, float]) -> float:
    """How much of what is drawn comes from the first 1,000 digits, whose loss is the first of the two."""
    sampler = make_sampler(2000, 0.01, losses=torch.tensor(losses).repeat_interleave(1000))
    return np.mean([index < 1000 for _ in range(300) for index in draw(sampler)])


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(100, 0.25, 25), (1000, 0.5, 500), (7, 0.5, 4), (40, 1.0, 40), (50, 1e-6, 2)],
)
def test_an_epoch_has_its_count_without_repeats(size, fraction, count):
    for losses in (torch.rand(size), torch.zeros(size)):
        sampler = make_sampler(size, fraction, losses=losses)
        for _ in range(3):
            drawn = draw(sampler)
            assert len(drawn) == len(set(drawn)) == count
            assert len(sampler) == math.ceil(count / 8)


def test_seed_decides_and_every_epoch_is_another_draw():
    def epochs(seed: int) -> list[list[int]]:
        sampler = make_sampler(200, 0.25, seed)
        return [draw(sampler) for _ in range(3)]

    state = torch.get_rng_state()
    first = epochs(seed=5)
    assert epochs(seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert epochs(seed=6) != first
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ((1.6, 0.4), 0.8),  # in proportion
        ((0.9, 0.1), 0.9),
        ((1.0, 1.0), 0.5),
        ((100.0, 2.0), 0.5),  # mislabelled digits do not take over
        ((3.0, 2.0), 0.5),  # not yet seen: as hard as can be
        ((0.0, 0.02), 0.5),  # easy ones come back
    ],
)
def test_drawn_in_proportion_to_the_loss_within_limits(losses, share):
    assert share_of_first_half(losses) == pytest.approx(share, abs=0.02)


def test_digits_not_yet_seen_count_as_hard():
    sampler = make_sampler(2000, 0.5)
    drawn = draw(sampler)
    sampler.update(torch.full((1000,), 0.1))  # those drawn were easy
    assert len(set(draw(sampler)) - set(drawn)) > 850  # in equal shares it would be 500


@pytest.mark.parametrize("left_out", [0, 1])
def test_update_maps_the_losses_to_the_digits_drawn(left_out):
    sampler = make_sampler(60, 0.5)
    drawn = draw(sampler)
    losses = torch.arange(30 - left_out) / 100
    sampler.update(losses)
    assert sampler.losses[drawn[: len(losses)]].tolist() == losses.tolist()
    assert (sampler.losses == 3.0).sum() == 30 + left_out


def test_losses_of_training_arrive_at_their_digits(toy, monkeypatch):
    """Through loader and training: each digit drawn ends with the loss of its own image."""
    samplers, make = [], training.make_loader
    monkeypatch.setattr(
        training,
        "make_loader",
        lambda *args, **kw: (samplers.append(kw.get("sampler")), make(*args, **kw))[1],
    )
    config = change(hard_fraction=0.4, batch_size=16, epochs=1, learning_rate=1e-12)
    (epoch,) = fit(config, toy)
    (sampler,) = samplers
    wanted = F.cross_entropy(epoch.model(TRANSFORM(toy.images)), toy.labels, reduction="none").detach()
    assert sampler.order.unique().numel() == 40
    torch.testing.assert_close(sampler.losses[sampler.order], wanted[sampler.order])
    assert (sampler.losses == 3.0).sum() == 60


# --- fit: stopped and failing -----------------------------------------------------------------------


class Trouble:
    """A transform that works for the first `good` training batches; then it does what `then` says."""

    def __init__(self, good: int, then):
        self.left, self.then = good, then

    def __call__(self, images):
        self.left -= torch.is_grad_enabled()  # evaluation does not count
        return TRANSFORM(images) if self.left >= 0 else self.then(TRANSFORM(images))


def collect(epochs, seen: list) -> None:
    """The notebook's loop: what it has got when something stops it."""
    for epoch in epochs:
        seen.append(epoch)


def interrupt(pixels):
    raise KeyboardInterrupt


@pytest.mark.parametrize("config", [TINY, ALL_PARTS], ids=["plain", "all parts"])
def test_stop_button_keeps_the_last_complete_epoch(toy, config):
    complete = run(config, toy)
    batches, before, seen = len(make_training_loader(config, toy)), torch.get_rng_state(), []
    with pytest.raises(KeyboardInterrupt):
        collect(fit(config, toy, VALIDATION, transform=Trouble(batches + 1, interrupt)), seen)
    assert [epoch.number for epoch in seen] == [1]
    assert torch.equal(weights(seen[-1].model), complete[0][4:])
    assert not seen[-1].model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert same(run(config, toy), complete)  # as if never stopped


def leave_gradients_off(*_):
    torch.set_grad_enabled(False)
    raise KeyboardInterrupt  # as it reaches Python between two lines of `torch.no_grad`


def test_stop_in_the_middle_of_switching_gradients(toy, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", leave_gradients_off)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(fit(TINY, toy, VALIDATION))
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_stop_during_validation_keeps_the_epoch_before(toy, monkeypatch):
    seen, calls = [], []

    def stop(*args):
        calls.append(args)
        return evaluate(*args) if len(calls) < 2 else interrupt(None)

    complete = run(TINY, toy)
    monkeypatch.setattr(training, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(fit(TINY, toy, VALIDATION), seen)
    assert torch.equal(weights(seen[-1].model), complete[0][4:])


def test_a_loop_left_early_keeps_its_model(toy):
    epochs = fit(TINY, toy, VALIDATION)
    epoch = next(epochs)
    epochs.close()
    assert torch.equal(weights(epoch.model), run(TINY, toy)[0][4:])
    assert list(epochs) == []


def test_loss_that_is_no_number(toy):
    first, seen = run(TINY, toy)[0][4:], []
    with pytest.raises(TrainingError) as caught:
        collect(fit(TINY, toy, VALIDATION, transform=Trouble(5, lambda pixels: pixels * math.nan)), seen)
    for word in ("epoch 2", "learning rate 0.001", "batch size 32", "a tenth of the rate"):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 200
    assert len(seen) == 1
    assert torch.equal(weights(seen[0].model), first)  # the good weights are still there


def test_learning_rate_far_too_high(toy):
    with pytest.raises(TrainingError, match=r"learning rate 1e\+09"):
        list(fit(change(learning_rate=1e9, optimizer="sgd", epochs=9), toy, VALIDATION))


def test_weights_that_stop_being_numbers_after_the_last_step(toy):
    """One step an epoch: the loss of the first epoch is still fine, what the step leaves is not."""
    config = change(learning_rate=1e9, optimizer="sgd", batch_size=100)
    with pytest.raises(TrainingError, match="epoch 1"):
        next(fit(config, toy, transform=lambda images: TRANSFORM(images) * 1e30))


# --- the device -------------------------------------------------------------------------------------


class MetaGenerator(torch.Generator):
    """Says that it belongs to another device, and is good for PyTorch's `meta` device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.where = torch.device(device)

    device = property(lambda self: self.where)


class MetaNumbers(TorchFunctionMode):
    """Tensors on `meta` have shapes but no numbers: questions for one get an answer all the same.

    PyTorch itself refuses most operations of such a tensor with one on the CPU, as a graphics card does.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor) and value.ndim]
        moving = function is torch._has_compatible_shallow_copy_type  # what `model.to(device)` asks
        assert moving or len({tensor.device.type for tensor in tensors}) < 2, f"{function} across devices"
        answers = {torch.Tensor.item: 1.0, torch.Tensor.__bool__: True, torch.Tensor.cpu: args and args[0]}
        return answers[function] if function in answers else function(*args, **kwargs or {})


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_everything_follows_the_device_of_the_digits(toy, monkeypatch, fraction):
    """Model, loaders, order, warps, losses and evaluation, tried on PyTorch's device without numbers."""
    monkeypatch.setattr(torch, "Generator", MetaGenerator)
    digits = toy.to("meta")
    config = change(ALL_PARTS, optimizer="sgd", hard_fraction=fraction)
    with MetaNumbers():
        epochs = list(fit(config, digits, digits))
        batches = list(make_loader(digits, 32, shuffle=True)) + list(make_training_loader(config, digits))
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    tensors = [*epochs[-1].model.parameters(), *(tensor for batch in batches for tensor in batch)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    for order in (
        make_loader(digits, 32, shuffle=True).sampler,
        make_training_loader(config, digits).sampler,
    ):
        assert next(iter(order)).device.type == "meta"  # no copy of the order at every batch


@pytest.fixture
def pretend(monkeypatch):
    """Computers with other hardware: the digits stay on the CPU whatever is found."""

    def computer(cuda=False, mps=False, failure=None):
        def move(self, device):
            if failure and device != "cpu":
                raise failure
            return self

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(Digits, "to", move)

    return computer


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_card_that_works_is_chosen(pretend, monkeypatch, name):
    pretend(**{name: True})
    if name == "cuda":  # its optimizers ask the card itself
        monkeypatch.setattr(training, "fit", lambda *args: [])
    assert choose_device() == (torch.device(name), "a trial training worked")


@pytest.mark.parametrize(
    "failure", [RuntimeError("no kernel image\nand a long explanation"), AssertionError()]
)
def test_card_that_cannot_train_is_not_chosen(pretend, failure):
    pretend(cuda=True, failure=failure)
    cause = "no kernel image" if str(failure) else "AssertionError()"
    assert choose_device() == (torch.device("cpu"), f"cuda was found but failed: {cause}")


@pytest.mark.parametrize(
    "step", ["forward", "backward", "dropout", "batch_norm", "grid_sample", "multinomial"]
)
def test_the_trial_is_a_whole_training(pretend, monkeypatch, step):
    """Both passes, dropout, batch norm, warps, draws: some cards fail in one of them only."""
    pretend(mps=True)
    owner = {"forward": MLP, "backward": torch.Tensor, "multinomial": torch}.get(step, F)
    monkeypatch.setattr(owner, step, lambda *args, **kwargs: 1 / 0)
    assert choose_device() == (torch.device("cpu"), "mps was found but failed: division by zero")


def test_computer_without_a_card(pretend):
    pretend()
    assert choose_device() == (torch.device("cpu"), "no graphics card was found")


def test_chosen_device_trains_without_a_warning(toy):
    with warnings.catch_warnings(action="error"):
        digits = toy.to(choose_device()[0])
        assert next(fit(TINY, digits, digits)).train_loss < 5
