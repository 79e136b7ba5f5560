"""The search for good knobs: an Optuna study, in a notebook or as a command on many machines at once."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from functools import partial

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy.exc import SQLAlchemyError

from mnist_helpers.config import OPTIMIZERS, SCHEDULES, Config
from mnist_helpers.data import DataError, Digits, load_digits, load_offline_digits, split_digits
from mnist_helpers.runs import describe_progress, list_runs
from mnist_helpers.studies import (
    HEARTBEAT,
    count_trials,
    get_bar,
    name_study,
    open_study,
    quiet_optuna,
    takes_place,
    wait_for_place,
)
from mnist_helpers.training import choose_device, fit

SEARCH_SPACE = {
    "learning_rate": FloatDistribution(5e-4, 5e-2, log=True),
    "batch_size": CategoricalDistribution([256, 512, 1024]),
    "epochs": IntDistribution(2, 5),
    "depth": IntDistribution(1, 3),  # hidden layers
    "width": CategoricalDistribution([64, 128, 256]),  # of the first one
    "taper": CategoricalDistribution([1.0, 0.5]),  # of each further one, as a share of the one before
    "activation": CategoricalDistribution(["relu", "gelu", "silu"]),
    "dropout": FloatDistribution(0.0, 0.3),
    "optimizer": CategoricalDistribution(OPTIMIZERS),
    "schedule": CategoricalDistribution(SCHEDULES),
    "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
    "averaging": FloatDistribution(0.05, 0.3),
}
BASELINE = Config()  # what the search space leaves open
FAILURES = (RuntimeError, MemoryError, ValueError)  # what bad knobs cause: a loss of nan, no memory, nonsense


def run_study(
    train: Digits,
    validation: Digits,
    n_trials: int,
    storage: str | None = None,
    seed: int = 0,
    space: Mapping = SEARCH_SPACE,
    base: Config = BASELINE,
    device="cpu",
    heartbeat: int = HEARTBEAT,
) -> Iterator[optuna.Study]:
    """Search until the study has `n_trials` trials with a result; yields it first and after each trial.

    Sought are the knobs in `space` that give the highest accuracy on the validation digits after the last
    epoch; the others are as in `base`. Every trial is kept in the database `storage` (a URL; else
    `runs/study.db` under the project): a later call goes on from there, and calls at the same time share the
    work. With other digits, space, base or seed it is another study. On fresh storage one process alone
    always runs the same trials. Method: tree-structured Parzen estimator (Bergstra et al. 2011).
    """
    check_study(n_trials, space)
    study = open_study(storage, name_study(train, validation, space, base, seed), heartbeat)
    yield study
    task = dict(n_trials=n_trials, seed=seed, space=space, base=base, device=device)
    objective = partial(run_trial, train=train, validation=validation, **task)
    while wait_for_place(study, n_trials, heartbeat):
        with quiet_optuna():
            try:
                study.optimize(objective, n_trials=1, catch=FAILURES)
            except ValueError as error:  # the machine slept and the trial was given to another worker
                if "Cannot tell" not in str(error):
                    raise
        yield study


def check_study(n_trials: int, space: Mapping) -> None:
    """`ValueError` for a study that makes no sense."""
    known = {field.name for field in fields(Config)} - {"hidden"} | {"depth", "width", "taper"}
    if unknown := space.keys() - known:
        raise ValueError(
            f"unknown knob {', '.join(unknown)} in the space: choose from {', '.join(sorted(known))}"
        )
    if n_trials < 1:
        raise ValueError(f"the number of trials must be at least 1, got {n_trials}")


def run_trial(
    trial: optuna.Trial,
    train: Digits,
    validation: Digits,
    n_trials: int,
    seed: int,
    space: Mapping,
    base: Config,
    device,
) -> float:
    """Train with the knobs that the sampler suggests; returns the accuracy on the validation digits.

    A trial that has gone wrong, or has fallen behind others after the same epoch, ends with its reason noted.
    """
    study = trial.study
    if count_trials(study, takes_place, below=trial.number) >= n_trials:
        raise RuntimeError("another worker took the last place")  # no reason is noted: it does not count
    # Own random numbers for each trial: a study that goes on must not repeat its first draws.
    own_seed = int(np.random.SeedSequence([seed, trial.number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=own_seed, multivariate=False, n_startup_trials=6)
    knobs = make_knobs({knob: suggest(trial, knob, choice) for knob, choice in space.items()}, base)
    trial.set_user_attr("knobs", knobs)
    trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
    start = time.perf_counter()
    try:
        for epoch in fit(Config(**knobs), train, validation, device):
            trial.report(epoch.validation_accuracy, epoch.number)
            if epoch.number < knobs["epochs"] and trial.should_prune():
                bar = get_bar(study, epoch.number)
                reason = f"pruned after {epoch.number} of {knobs['epochs']} epochs: {bar:.2%} was wanted"
                trial.set_user_attr("reason", reason)
                raise optuna.TrialPruned
    except FAILURES as error:
        trial.set_user_attr("reason", f"failed: {error!s:.200}" if str(error) else "failed: out of memory")
        raise
    finally:
        trial.set_user_attr("seconds", time.perf_counter() - start)
    return epoch.validation_accuracy


def suggest(trial: optuna.Trial, knob: str, choice):
    """A value for one knob of the search space."""
    if isinstance(choice, CategoricalDistribution):
        return trial.suggest_categorical(knob, choice.choices)
    draw = trial.suggest_int if isinstance(choice, IntDistribution) else trial.suggest_float
    return draw(knob, choice.low, choice.high, step=choice.step, log=choice.log)


def make_knobs(values: Mapping, base: Config) -> dict:
    """All fields of a `Config`: those suggested, `hidden` made of its three parts, the rest from `base`."""
    knobs = {"depth": len(base.hidden), "width": base.hidden[0], "taper": 1.0} | asdict(base) | dict(values)
    depth, width, taper = (knobs.pop(part) for part in ("depth", "width", "taper"))
    if values.keys() & {"depth", "width", "taper"}:
        knobs["hidden"] = [max(1, round(width * taper**layer)) for layer in range(depth)]
    return knobs


def main(arguments: list[str] | None = None) -> None:
    """One worker: start as many as you like, on as many machines, with the same storage."""
    parser = argparse.ArgumentParser(prog="python -m mnist_helpers.tuning", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=20, help="how many are wanted, by all workers together")
    parser.add_argument("--storage", help="URL of the database (default: a SQLite file in the folder runs)")
    parser.add_argument("--data", choices=["mnist", "offline"], default="mnist", help="which digits")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another study")
    parser.add_argument("--heartbeat", type=int, default=HEARTBEAT, help="seconds between signs of life")
    options = parser.parse_args(arguments)
    try:
        digits, _ = load_offline_digits() if options.data == "offline" else load_digits()
        train, validation = split_digits(digits)
        device, _ = choose_device()
        print(f"{digits.name}: {len(train)} to train on, {len(validation)} to judge by, {device}", flush=True)
        rest = {"device": device, "heartbeat": options.heartbeat}
        for study in run_study(train, validation, options.trials, options.storage, options.seed, **rest):
            print(f"{study.study_name}: {describe_progress(study, options.trials)}", flush=True)
        print(f"Done: {describe_progress(study, options.trials)}: {list_runs(study)[0].config}")
    except KeyboardInterrupt:
        sys.exit("Stopped. Start again to go on: only the trial in hand is lost.")
    except (ValueError, DataError, ImportError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
