"""Training: the knobs, one epoch by hand, same seed same weights, and everything that can stop it."""

import copy
import dataclasses
import math
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_toy_digits
from torch import nn

from mnist_helpers import training
from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import NUM_CLASSES, TRANSFORM, Digits, make_loader
from mnist_helpers.evaluation import Evaluation, evaluate
from mnist_helpers.model import MLP
from mnist_helpers.training import (
    Config,
    TrainingError,
    choose_device,
    final_accuracy,
    fit,
    make_optimizer,
    make_training_loader,
    train_epoch,
)

TINY = Config(hidden=(16,), batch_size=32, epochs=3)
VALIDATION = make_toy_digits(50, seed=8)
PER_DIGIT = nn.CrossEntropyLoss(reduction="none")


def change(**knobs) -> Config:
    return dataclasses.replace(TINY, **knobs)


def weights(model: nn.Module) -> torch.Tensor:
    """Everything that a model holds, in one row."""
    return torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])


def history(config: Config, train: Digits, between=lambda record: None) -> list[torch.Tensor]:
    """For each epoch the figures of its record (times aside) and the model's weights, in one row."""
    rows = []
    for record in fit(config, train, VALIDATION):
        figures = [record.number, record.train_loss, record.validation_loss, record.learning_rate]
        rows.append(torch.cat([torch.tensor(figures), weights(record.model)]))
        between(record)
    return rows


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- the knobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knob", "values"),
    {
        "hidden": [(0,), (-5,), (16, 0), (1.5,), ("16",), (math.nan,), 16, None],
        "activation": ["sigmoid", "", "ReLU", None, 3, ["relu"]],
        "dropout": [-0.1, 1.0, 7, math.nan, "0.5", None],
        "receptive_field": [-1, 0.1, math.nan, math.inf, "3", None],
        "optimizer": ["adagrad", "", None, ["sgd"]],
        "learning_rate": [0, -1e-3, math.nan, math.inf, -math.inf, "0.1", None],
        "schedule": ["cosine", "", None],
        "weight_decay": [-1e-9, math.nan, math.inf, "0"],
        "label_smoothing": [-0.1, 1.0, math.nan, "0"],
        "averaging": [-0.1, 1.0, math.nan, "0"],
        "warp": [-0.1, math.nan, math.inf, "1"],
        "warp_fade": [-0.1, 1.01, math.nan, "1"],
        "practice": [0, -0.5, 1.01, math.nan, "1"],
        "batch_size": [0, 1, -64, 64.0, math.nan, "64", None, True],
        "epochs": [0, -1, 2.0, math.nan, "5", None],
        "seed": [1.5, "0", None, math.nan, False],
    }.items(),
)
def test_nonsense_is_refused_with_one_clear_message(knob, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{knob} must be .+, got ") as caught:
            Config(**{knob: value})
        assert str(caught.value).endswith(f"got {value!r}")
        assert len(str(caught.value)) < 120


def test_sense_is_accepted():
    Config(hidden=(), dropout=0.99, learning_rate=1e-9, batch_size=2, epochs=1, averaging=0.999, seed=12345)
    assert Config(hidden=[32, 16]) == Config(hidden=(32, 16))
    with pytest.raises(TypeError, match="learning_rat"):
        Config(learning_rat=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().epochs = 3


# --- one epoch --------------------------------------------------------------------------------------


def test_one_step_by_hand(toy):
    """Plain gradient descent on the mean loss of one batch: weights minus rate times gradient."""
    model = MLP((8,), batch_norm=False)
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
    model = MLP((8,), batch_norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = train_epoch(model, make_loader(toy, 64), PER_DIGIT, optimizer)  # 64 and 36 digits
    wanted = F.cross_entropy(model(TRANSFORM(toy.images)), toy.labels, reduction="none")
    torch.testing.assert_close(losses, wanted.detach())
    assert not losses.requires_grad


def test_mean_loss_counts_every_digit_alike_when_the_last_batch_is_short(toy):
    config = change(batch_size=64, epochs=1, learning_rate=1e-12, optimizer="sgd", batch_norm=False)
    (record,) = fit(config, toy, VALIDATION)
    wanted = F.cross_entropy(record.model(TRANSFORM(toy.images)), toy.labels).item()
    assert record.train_loss == pytest.approx(wanted, abs=1e-6)


def test_training_mode_is_switched_on(toy):
    model = MLP((8,)).eval()
    train_epoch(model, make_loader(toy, 50), PER_DIGIT, torch.optim.SGD(model.parameters(), lr=0.1))
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    assert model.training
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_tiny_batch_is_learnt_by_heart(toy, optimizer, batch_norm):
    config = change(
        hidden=(32,), optimizer=optimizer, batch_norm=batch_norm, learning_rate=0.01, epochs=60, batch_size=20
    )
    *_, last = fit(config, toy[:20], toy[:20])
    assert last.train_loss < 0.05
    assert last.validation_accuracy == 1.0


def test_every_parameter_is_optimized_and_only_matrices_decay():
    model = MLP((8, 4))
    optimizer = make_optimizer(change(optimizer="adamw", weight_decay=0.3), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): 0.3 if p.ndim == 2 else 0.0 for p in model.parameters()}


# --- evaluation -------------------------------------------------------------------------------------


def test_evaluation_sums_over_examples(toy):
    model = MLP((16,)).eval()
    result = evaluate(model, make_loader(toy, 64))  # the last batch is short
    logits = model(TRANSFORM(toy.images)).detach()
    torch.testing.assert_close(result.logits, logits)
    assert torch.equal(result.labels, toy.labels)
    assert result.loss == pytest.approx(F.cross_entropy(logits, toy.labels).item(), abs=1e-6)
    assert result.accuracy == pytest.approx(np.mean(logits.argmax(1).numpy() == toy.labels.numpy()))
    assert not result.logits.requires_grad


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1], [5, 0, 0]])
    result = Evaluation(logits, torch.tensor([1, 0, 2, 2]))
    assert result.predictions.tolist() == [1, 0, 2, 0]
    assert result.accuracy == 0.75


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_model_as_it_was_and_repeats(toy, mode):
    model = MLP((16,), dropout=0.5).train(mode)
    before, numbers = weights(model), torch.get_rng_state()
    first, second = evaluate(model, make_loader(toy, 30)), evaluate(model, make_loader(toy, 70))
    torch.testing.assert_close(first.logits, second.logits)
    assert model.training is mode
    assert torch.equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), numbers)


# --- fit: reproducible ------------------------------------------------------------------------------

RECIPES = {
    "plain": TINY,
    "dropout": change(dropout=0.5),
    "no batch norm": change(batch_norm=False, activation="tanh"),
    "momentum": change(optimizer="sgd", learning_rate=0.05),
    "everything": change(
        optimizer="adamw",
        schedule="one-cycle",
        weight_decay=0.05,
        label_smoothing=0.1,
        averaging=0.3,
        warp=0.5,
        practice=0.6,
        dropout=0.1,
        receptive_field=3.0,
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_seed_same_weights(toy, recipe):
    config = RECIPES[recipe]
    first = history(config, toy)
    torch.manual_seed(99)  # whatever the caller does with the global numbers
    assert same(history(config, toy), first)
    assert not same(history(dataclasses.replace(config, seed=1), toy), first)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_happens_between_epochs_does_not_change_the_training(toy, recipe):
    def disturb(record):
        torch.rand(5), np.random.rand(), random.random()  # noqa: NPY002
        torch.manual_seed(record.number)
        evaluate(record.model, make_loader(VALIDATION, 16))
        next(iter(make_loader(toy, 8, shuffle=True)))

    assert same(history(RECIPES[recipe], toy, disturb), history(RECIPES[recipe], toy))


def test_drawing_figures_between_epochs_does_not_change_the_training(toy):
    from matplotlib.figure import Figure

    def draw(record):
        figure = Figure()
        figure.subplots().imshow(toy.images[record.number].numpy())
        figure.canvas.draw()

    config = change(dropout=0.5)
    assert same(history(config, toy, draw), history(config, toy))


def test_fit_leaves_the_global_random_numbers_alone(toy):
    before = torch.get_rng_state()
    for _ in fit(RECIPES["everything"], toy, VALIDATION):
        assert torch.equal(torch.get_rng_state(), before)


def test_two_trainings_at_once_do_not_meet(toy):
    configs = [change(dropout=0.5), change(dropout=0.5, seed=1)]
    alone = [weights(list(fit(config, toy, VALIDATION))[-1].model) for config in configs]
    together = list(zip(*[fit(config, toy, VALIDATION) for config in configs], strict=True))[-1]
    assert same([weights(record.model) for record in together], alone)


def test_one_and_two_threads_agree():
    """Sums in another order differ in the last bits; three epochs later the losses agree to 0.1%."""
    train, before = make_toy_digits(512), torch.get_num_threads()
    config = change(hidden=(256, 256), batch_size=128, learning_rate=1e-4, dropout=0.2)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([[r.train_loss, r.validation_loss] for r in fit(config, train, VALIDATION)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*map(torch.tensor, results), rtol=1e-3, atol=0)


def test_training_loader_can_be_pickled(toy):
    """Warps and hard digits too, and no worker processes: these hang in notebooks."""
    loader = make_training_loader(RECIPES["everything"], toy)
    copied = pickle.loads(pickle.dumps(loader))
    assert loader.num_workers == 0
    for (pixels, labels), (copied_pixels, copied_labels) in zip(loader, copied, strict=True):
        assert torch.equal(pixels, copied_pixels)
        assert torch.equal(labels, copied_labels)


# --- fit: what its records say ----------------------------------------------------------------------


def test_record_of_every_epoch(toy):
    for number, record in enumerate(fit(TINY, toy, VALIDATION), start=1):
        result = evaluate(record.model, make_loader(VALIDATION, 7))
        assert record.number == number
        assert record.validation_loss == pytest.approx(result.loss, abs=1e-5)
        assert record.validation_accuracy == pytest.approx(result.accuracy)
        assert record.learning_rate == TINY.learning_rate
        assert 0 < record.seconds < 60
        assert not record.model.training
    assert number == TINY.epochs


def test_network_is_the_one_that_the_config_names(toy):
    record = next(
        fit(change(hidden=(7, 5), activation="silu", batch_norm=False, dropout=0.3), toy, VALIDATION)
    )
    kinds = [type(module).__name__ for module in record.model.modules()]
    assert [len(p) for p in record.model.parameters() if p.ndim == 2] == [7, 5, 10]
    assert kinds.count("SiLU") == 2
    assert "BatchNorm1d" not in kinds


def test_without_validation_digits(toy):
    record = next(fit(TINY, toy, None))
    assert math.isnan(record.validation_loss)
    assert math.isnan(record.validation_accuracy)
    assert record.train_loss == next(fit(TINY, toy, VALIDATION)).train_loss


def test_one_cycle_rises_and_falls(toy):
    config = change(schedule="one-cycle", learning_rate=0.01, epochs=20, batch_size=20)  # five steps an epoch
    rates = [record.learning_rate for record in fit(config, toy, VALIDATION)]
    peak = rates.index(max(rates))
    assert 3 <= peak <= 7  # after three tenths of the way
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[-1] < 0.01 / 1000


def test_averaged_weights_by_hand(toy):
    """With one step an epoch the records of a training without averaging show the weights of every step."""
    config = change(hidden=(8,), epochs=40, batch_size=100, learning_rate=0.01)
    steps = [weights(record.model) for record in fit(config, toy, None)]
    averages = [
        weights(record.model) for record in fit(dataclasses.replace(config, averaging=0.1), toy, None)
    ]
    wanted = steps[0]
    floats = [
        torch.full((value.numel(),), value.is_floating_point()) for value in MLP((8,)).state_dict().values()
    ]
    floats = torch.cat(floats)  # the counter of batches is no weight
    for count, (step, average) in enumerate(zip(steps, averages, strict=True)):
        if count > 0:
            weight = max(1 / (0.1 * 40), 1 / (1 + count / 10))
            wanted = (1 - weight) * wanted + weight * step
        torch.testing.assert_close(average[floats], wanted[floats], rtol=1e-4, atol=1e-5)
    assert (averages[-1] - steps[-1]).abs().max() > 0.01


def test_averaging_over_less_than_one_step_is_no_averaging(toy):
    config = change(hidden=(8,), averaging=0.01)  # of 12 steps
    *_, averaged = fit(config, toy, None)
    *_, last = fit(dataclasses.replace(config, averaging=0.0), toy, None)
    for one, other in zip(averaged.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("practice", [1.0, 0.65])
def test_a_last_batch_of_one_digit_is_no_problem(toy, practice):
    """Batch normalisation has no deviation of a single digit: 100 = 3 x 33 + 1, and 65 = 2 x 32 + 1."""
    config = change(batch_size=33 if practice == 1 else 32, practice=practice)
    *_, last = fit(config, toy, VALIDATION)
    assert math.isfinite(last.train_loss)


def test_learns_real_digits(mnist):
    config = Config(hidden=(128,), epochs=1, batch_size=128, learning_rate=3e-3)
    (record,) = fit(config, mnist[0][:12_000], mnist[1][:2_000])
    assert 0.88 < record.validation_accuracy < 0.99


# --- fit: stopped and failing -----------------------------------------------------------------------


class Trouble:
    """A transform that works for the first `good` batches; then it does what `then` says."""

    def __init__(self, good: int, then):
        self.left, self.then = good, then

    def __call__(self, images):
        self.left -= 1
        return TRANSFORM(images) if self.left >= 0 else self.then(TRANSFORM(images))


def collect(epochs, records: list) -> None:
    """The notebook's loop: what it has got when something stops it."""
    for record in epochs:
        records.append(record)


def interrupt(pixels):
    raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", RECIPES)
def test_stop_button_keeps_the_last_complete_epoch(toy, recipe):
    config = RECIPES[recipe]
    complete = [weights(record.model) for record in fit(config, toy, VALIDATION)]
    batches = math.ceil(round(len(toy) * config.practice) / config.batch_size)
    before, records = torch.get_rng_state(), []
    with pytest.raises(KeyboardInterrupt):
        collect(fit(config, toy, VALIDATION, transform=Trouble(2 * batches + 1, interrupt)), records)
    assert [record.number for record in records] == [1, 2]
    assert torch.equal(weights(records[-1].model), complete[1])
    assert not records[-1].model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        weights(list(fit(config, toy, VALIDATION))[-1].model), complete[-1]
    )  # as if never stopped


def leave_gradients_off(*_):
    torch.set_grad_enabled(False)
    raise KeyboardInterrupt  # as it reaches Python between two lines of `torch.no_grad`


@pytest.mark.parametrize("place", ["evaluate", "train_epoch"])
def test_stop_in_the_middle_of_switching_gradients(toy, monkeypatch, place):
    with monkeypatch.context() as patch:
        patch.setattr(training, place, leave_gradients_off)
        with pytest.raises(KeyboardInterrupt):
            next(fit(TINY, toy, VALIDATION))
    assert torch.is_grad_enabled()


def test_trains_where_gradients_were_left_off(toy):
    with torch.no_grad():
        record = next(fit(TINY, toy, VALIDATION))
        assert not torch.is_grad_enabled()
    assert torch.equal(weights(record.model), weights(next(fit(TINY, toy, VALIDATION)).model))


def test_training_sees_the_warps_that_its_config_names(toy):
    config = change(warp=0.8, seed=4)
    pixels, _ = next(iter(make_training_loader(config, toy, shuffle=False)))
    by_hand = RandomWarp(0.8, seed=4)
    torch.testing.assert_close(pixels, TRANSFORM(by_hand(toy.images[:32])), rtol=0, atol=1e-4)


def test_a_loop_left_early_keeps_its_model(toy):
    complete = [weights(record.model) for record in fit(TINY, toy, VALIDATION)]
    records = fit(TINY, toy, VALIDATION)
    record = next(records)
    records.close()
    assert torch.equal(weights(record.model), complete[0])
    assert list(records) == []


def test_loss_that_is_no_number(toy):
    first = weights(next(fit(TINY, toy, VALIDATION)).model)
    records = []
    with pytest.raises(TrainingError) as caught:
        collect(fit(TINY, toy, VALIDATION, transform=Trouble(5, lambda pixels: pixels * math.nan)), records)
    for word in ("epoch 2", "0.001", "batch size 32", "lower"):
        assert word in str(caught.value)
    assert len(str(caught.value)) < 200
    assert len(records) == 1
    assert torch.equal(weights(records[0].model), first)  # the good weights are still there


def test_learning_rate_far_too_high(toy):
    config = change(learning_rate=1e30, optimizer="sgd", batch_norm=False)
    with pytest.raises(TrainingError, match="learning rate 1e\\+30"):
        list(fit(config, toy, VALIDATION))
    assert final_accuracy(config, toy, VALIDATION) == 1 / NUM_CLASSES  # never wins a comparison


def test_weights_that_stop_being_numbers_after_the_last_step(toy):
    """One step an epoch: the loss of the first epoch is still fine, what the step leaves is not."""
    config = change(learning_rate=1e38, optimizer="sgd", batch_norm=False, batch_size=100)
    with pytest.raises(TrainingError, match="epoch 1"):
        next(fit(config, toy, VALIDATION, transform=Trouble(0, lambda pixels: pixels * 1e4)))


# --- the device -------------------------------------------------------------------------------------


@pytest.fixture
def broken_gpu(monkeypatch):
    """A GPU that is seen, but whose first use fails where the test says."""

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nand a long explanation")

    def break_at(step: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(MLP, "to", lambda self, device: self)  # it stays on the CPU: the rest works
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
        if step != "nowhere":
            owner = torch.Tensor if step == "backward" else MLP
            monkeypatch.setattr(owner, step, fail)

    return break_at


@pytest.mark.parametrize("step", ["to", "forward", "backward"])
def test_gpu_that_cannot_train_is_not_chosen(broken_gpu, step):
    broken_gpu(step)
    device, reason = choose_device()
    assert device == torch.device("cpu")
    assert reason == "cuda was found but failed: no kernel image is available"


def test_gpu_that_can_train_is_chosen(broken_gpu):
    broken_gpu("nowhere")
    assert choose_device()[0] == torch.device("cuda")


def test_computer_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == (torch.device("cpu"), "no GPU was found")


def test_chosen_device_trains(toy):
    device, reason = choose_device()
    assert reason
    assert next(fit(TINY, toy, VALIDATION, device)).train_loss < 5


def test_everything_is_computed_in_float32(toy):
    """bfloat16 kills the process on some virtual CPUs (RELIABILITY), so no autocast may be at work."""
    seen = []

    class Spy:
        def __call__(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return TRANSFORM(images)

    record = next(fit(TINY, toy, VALIDATION, transform=Spy()))
    assert not any(seen)
    assert {p.dtype for p in record.model.parameters()} == {torch.float32}
    assert evaluate(record.model, make_loader(VALIDATION, 10)).logits.dtype == torch.float32
