"""The search for hyperparameters with Optuna: in a notebook, or as a command on many machines at once."""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import optuna
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.distributions import distribution_to_json as to_json
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from mnist_helpers.data import PROJECT_ROOT, DataError, Digits, load_mnist, load_offline_digits, split_digits
from mnist_helpers.plots import BLUE, ORANGE, make_axes, spread_accuracies
from mnist_helpers.training import Config, Epoch, TrainingError, choose_device, fit

SEARCH_SPACE = {
    "learning_rate": FloatDistribution(1e-3, 5e-3, log=True),
    "batch_size": IntDistribution(128, 1024, log=True),
    "epochs": IntDistribution(1, 4),
    "depth": IntDistribution(1, 3),  # hidden layers
    "width": IntDistribution(64, 512, log=True),  # units in each of them
    "augmentation": FloatDistribution(0, 1),
}
# What the search space leaves open
BASE = Config(batch_norm=True, optimizer="adamw", one_cycle=True, weight_decay=0.2)
COLUMNS = ["run", "accuracy", "seconds", "epochs", "batch_size", "learning_rate", "hidden", "augmentation"]


class StudyError(RuntimeError):
    """The study cannot be opened, continued or added to; the message says why."""


@contextmanager
def explain_errors(task: str, *others):
    """Optuna without its log; errors of the database become a `StudyError` of one line."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, *others) as error:
        reason = re.split(r"\n|\. ", str(error.__cause__ or error))[0]
        raise StudyError(f"{task}: {reason}") from error


def open_study(
    train: Digits, validation: Digits, storage: str | None = None, space=SEARCH_SPACE, base=BASE, seed=0
) -> Study:
    """The study of these digits, search space, base and seed, with all its trials so far."""
    # Kept in the database `storage` (a URL), else in `runs/study.db` under the project, or in memory where
    # that cannot be written. The seed is that of every training too.
    base, options = replace(base, seed=seed), {"pool_pre_ping": True}  # servers drop idle connections
    choices = [(name, to_json(choice)) for name, choice in space.items()]
    digest = hashlib.sha256(json.dumps([choices, asdict(base)]).encode())
    for part in (train.images, train.labels, validation.images, validation.labels):
        digest.update(part.cpu().numpy().tobytes())
    if storage is None and os.access(PROJECT_ROOT, os.W_OK):
        (PROJECT_ROOT / "runs").mkdir(exist_ok=True)
        storage = URL.create("sqlite", database=str(PROJECT_ROOT / "runs" / "study.db")).render_as_string()
    if storage and storage.startswith("sqlite"):  # one process writes at a time, the others wait
        options = {"connect_args": {"timeout": 60}, "poolclass": NullPool}
    how = {
        "study_name": f"{train.name} {digest.hexdigest()[:8]}",
        "direction": "maximize",
        "load_if_exists": True,
    }
    with explain_errors(
        f"cannot open the study in {re.sub(':[^:@/]+@', ':***@', str(storage))}", RuntimeError
    ):
        for attempt in range(3):
            try:
                study = optuna.create_study(storage=storage and RDBStorage(storage, options), **how)
                study.space, study.base = space, base
                return study
            except (SQLAlchemyError, optuna.exceptions.OptunaError):
                if attempt == 2:
                    raise
                time.sleep(0.5)  # another worker was making the same tables


def run_study(study: Study, train: Digits, validation: Digits, n_trials: int) -> Iterator[Study]:
    """Search until the tuner has `n_trials` results in all; yields the study first and after each trial."""
    # Processes that run it at the same time share the work; one alone always runs the same trials. A trial
    # fails, and does not count, where other hyperparameters may do better (loss not a number, out of memory).
    # Five of these in a row, or any other error, end the study.
    yield study
    failures = 0
    while len(list_results(study)) < n_trials:
        with explain_errors("the study cannot go on"):
            trial, state, accuracy = study.ask(), TrialState.FAIL, None
            # Own random numbers for each trial: other workers and a study that goes on draw others.
            place = sum("own" not in earlier.user_attrs for earlier in list_trials(study)[: trial.number])
            seed = int(np.random.SeedSequence([study.base.seed, place]).generate_state(1)[0])
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=6)  # Bergstra et al. 2011
            for name, choice in study.space.items():
                if isinstance(choice, CategoricalDistribution):
                    trial.suggest_categorical(name, choice.choices)
                else:
                    draw = trial.suggest_int if isinstance(choice, IntDistribution) else trial.suggest_float
                    draw(name, choice.low, choice.high, log=choice.log)
            try:
                config = make_config(trial.params, study.base)
                trial.set_user_attr("config", asdict(config))
                history = list(fit(config, train, validation))
                trial.set_user_attr("seconds", sum(epoch.seconds for epoch in history))
                state, accuracy, failures = TrialState.COMPLETE, history[-1].validation_accuracy, 0
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, TrainingError | MemoryError) or "allocate" in str(error)):
                    raise
                failures, reason = failures + 1, str(error)[:200] or "memory ran out"
                trial.set_user_attr("reason", reason)
            finally:  # also where it was stopped
                study.tell(trial, accuracy, state)
        if failures == 5:
            raise StudyError(f"5 trials in a row failed, the last one because {reason}")
        yield study


def make_config(values: dict, base: Config) -> Config:
    """`base` with these values; `depth` and `width` together make `hidden`."""
    if "width" in values:
        values = values | {"hidden": (values["width"],) * values.get("depth", len(base.hidden))}
    return replace(base, **{name: value for name, value in values.items() if name not in ("depth", "width")})


def list_trials(study: Study) -> list[FrozenTrial]:
    """All trials in the order of their start, the reader's own runs among them."""
    with explain_errors("the study cannot be read: open it again"):
        return study.get_trials(deepcopy=False)


def list_results(study: Study, own: bool = False) -> list[FrozenTrial]:
    """The trials that have an accuracy: the tuner's, or the reader's own."""
    return [trial for trial in list_trials(study) if trial.values and ("own" in trial.user_attrs) == own]


def best_config(study: Study) -> Config:
    """The hyperparameters of the tuner's best trial; `ValueError` where it has no result yet."""
    if not (results := list_results(study)):
        raise ValueError("the tuner has no result yet: let run_study finish one trial first")
    return Config(**max(results, key=lambda trial: trial.value).user_attrs["config"])


def record_run(study: Study, config: Config, history: Sequence[Epoch]) -> None:
    """Keep your own training, the records of `fit`, as a trial that the tuner does not learn from."""
    accuracy = history[-1].validation_accuracy if history else math.nan
    if math.isnan(accuracy):
        raise ValueError("nothing to record: it takes one complete epoch at least, and validation digits")
    facts = {"seconds": sum(epoch.seconds for epoch in history), "epochs": len(history)}
    trial = optuna.create_trial(value=accuracy, user_attrs={"own": True, "config": asdict(config), **facts})
    with explain_errors("the run was not recorded; open the study again, then record it"):
        study.add_trial(trial)


def list_runs(study: Study, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """All runs, the tuner's and your own, best first; last those that failed, without an accuracy."""
    rows = []
    for trial in list_trials(study):
        if trial.values or "reason" in trial.user_attrs:
            facts = trial.user_attrs["config"] | trial.user_attrs | {"accuracy": trial.value}
            facts["run"] = f"{'mine' if 'own' in facts else 'trial'} {trial.number}"
            shape = {"depth": len(facts["hidden"]), "width": max(facts["hidden"], default=math.nan)}
            rows.append(facts | shape | {"hidden": "-".join(map(str, facts["hidden"])) or "none"})
    table = pd.DataFrame(rows, columns=columns).sort_values("accuracy", ascending=False, kind="stable")
    table = table.round({"accuracy": 4, "seconds": 1, "augmentation": 2})
    return table.set_index(pd.RangeIndex(1, len(table) + 1))


def plot_hyperparameters(study: Study) -> Figure:
    """Validation accuracy of all runs against each hyperparameter of the search."""
    space = study.space
    runs = list_runs(study, ["run", "accuracy", *space]).dropna(subset="accuracy")
    colours = [ORANGE if run.startswith("mine") else BLUE for run in runs["run"]]
    rows, columns = math.ceil(len(space) / 3), min(3, len(space))
    figure, axes = make_axes(rows, columns, (9, 1 + 2 * rows), sharey=True, squeeze=False)
    for ax, (name, choice) in zip(axes.flat, space.items(), strict=False):
        ax.scatter(runs[name], np.maximum(0.001, 1 - runs["accuracy"].astype(float)), c=colours)
        spread_accuracies(ax, runs["accuracy"])
        ax.set(xlabel=name.replace("_", " "), xscale="log" if getattr(choice, "log", False) else "linear")
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=not isinstance(choice, FloatDistribution)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")
    figure.suptitle("Validation accuracy of all runs; your own are orange")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """One worker of a study: start one for each CPU core, on as many machines as you like."""
    parser = argparse.ArgumentParser(prog="python -m mnist_helpers.tuning", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=20, help="how many results all workers together want")
    parser.add_argument("--storage", help="URL of the database (default: the SQLite file runs/study.db)")
    parser.add_argument("--data", choices=["mnist", "offline"], default="mnist", help="which digits")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another study")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores that this worker may use")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)  # workers of one core each share a machine best
    try:
        digits, _ = load_offline_digits() if options.data == "offline" else load_mnist()
        device, reason = choose_device()
        train, validation = (part.to(device) for part in split_digits(digits))
        print(f"{digits.name} on {device}: {reason}", flush=True)
        study = open_study(train, validation, options.storage, seed=options.seed)
        for _ in run_study(study, train, validation, options.trials):
            done = [trial.value for trial in list_results(study)]
            print(f"{len(done)} of {options.trials} trials, best {max(done, default=0):.2%}", flush=True)
        print(best_config(study))
    except KeyboardInterrupt:
        sys.exit("Stopped. Start again to go on: only the trial in hand is lost.")
    except (ValueError, DataError, StudyError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
