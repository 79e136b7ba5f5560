"""The search for hyperparameters with Optuna: in a notebook, or as a command on many machines at once."""

import argparse
import hashlib
import inspect
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import optuna
import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed
from optuna import Study
from optuna.exceptions import OptunaError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from mnist_helpers import data
from mnist_helpers.data import PROJECT_ROOT, TRANSFORM, Digits
from mnist_helpers.training import Config, Epoch, TrainingError, choose_device, fit

BASE = Config(batch_norm=True, optimizer="adamw", one_cycle=True, weight_decay=0.2)  # what is not searched
optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # errors are raised all the same
COLUMNS = ["run", "accuracy", "seconds", "epochs", "batch_size", "learning_rate", "hidden"]


class StudyError(RuntimeError):
    """The study cannot be opened or continued; the message says why."""


def suggest_config(trial: Trial) -> Config:
    """The hyperparameters of one trial, `BASE` with those that the study searches."""
    width = trial.suggest_int("width", 64, 512, log=True)  # units in each hidden layer
    return replace(
        BASE,
        hidden=(width,) * trial.suggest_int("depth", 1, 3),
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 5e-3, log=True),
        batch_size=trial.suggest_int("batch_size", 128, 1024, log=True),
        epochs=trial.suggest_int("epochs", 1, 4),
    )


def fit_all(configs: Sequence[Config], train: Digits, validation: Digits, transform=TRANSFORM) -> list[tuple]:
    """Train a network for each config: its records of `fit` and an empty text, or none and why it failed."""
    # On the CPU side by side, in a process for each core, since small networks gain little from more threads;
    # four at most: each takes half a gigabyte. The last, which tends to be the largest, is begun first.
    several = len(configs) > 1 and train.images.device.type == "cpu"
    work = [delayed(try_fit)(config, train, validation, transform) for config in reversed(configs)]
    return Parallel(min(cpu_count(), 4) if several else 1)(work)[::-1]


def try_fit(config: Config, *parts) -> tuple[list[Epoch], str]:
    """A whole training; only what other hyperparameters may cure is a failure, other errors are raised."""
    try:
        return list(fit(config, *parts)), ""
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, TrainingError | MemoryError) and "allocate" not in str(error):
            raise
        return [], str(error)[:200] or "memory ran out"


def open_study(
    train: Digits, validation: Digits, storage: str | None = None, suggest=suggest_config, seed: int = 0
) -> Study:
    """The study of these digits, search space and seed of all trainings, with its trials so far."""
    # Kept in the database `storage` (a URL), else in `runs/study.db` under the project, or in memory where
    # that cannot be written. `suggest` draws a `Config` from an Optuna trial.
    digest = hashlib.sha256(f"{inspect.getsource(suggest)}{replace(BASE, seed=seed)}".encode())
    for part in (train.images, train.labels, validation.images, validation.labels):
        digest.update(part.cpu().numpy().tobytes())
    options = {"pool_pre_ping": True}  # servers drop idle connections
    if storage is None and os.access(PROJECT_ROOT, os.W_OK):
        (PROJECT_ROOT / "runs").mkdir(exist_ok=True)
        storage = URL.create("sqlite", database=str(PROJECT_ROOT / "runs" / "study.db")).render_as_string()
    if storage and storage.startswith("sqlite"):  # one process writes at a time, the others wait
        options = {"connect_args": {"timeout": 60}, "poolclass": NullPool}
    how = dict(study_name=f"{train.name} {digest.hexdigest()[:8]}", load_if_exists=True, direction="maximize")
    for attempt in range(3):
        try:
            study = optuna.create_study(storage=storage and RDBStorage(storage, options), **how)
            study.suggest, study.seed = suggest, seed
            return study
        except (SQLAlchemyError, OptunaError, ImportError, RuntimeError) as error:
            if attempt == 2:
                place = re.sub(":[^:@/]+@", ":***@", str(storage))  # without the password
                reason = re.split(r"\n|\. ", str(error.__cause__ or error))[0]
                raise StudyError(f"cannot open the study in {place}: {reason}") from error
            time.sleep(0.5)  # another worker was making the same tables


def run_study(study: Study, train: Digits, validation: Digits, n_trials: int, at_once=1) -> Iterator[Study]:
    """Search until the tuner has `n_trials` results in all; yields the study first and after each round."""
    # A round trains `at_once` networks side by side. Processes that run this at the same time share the work;
    # one alone always runs the same trials. A trial that fails does not count; five in a row end the study.
    yield study
    failures = 0
    while (missing := n_trials - len(list_results(study))) > 0:
        trials = [ask_trial(study) for _ in range(min(at_once, missing))]
        outcomes = [([], "")] * len(trials)
        try:
            outcomes = fit_all([Config(**trial.user_attrs["config"]) for trial in trials], train, validation)
        finally:  # also where it was stopped
            for trial, (history, reason) in zip(trials, outcomes, strict=True):
                failures = failures + 1 if reason else 0
                trial.set_user_attr("reason", reason)
                trial.set_user_attr("seconds", sum(epoch.seconds for epoch in history))
                accuracy = history[-1].validation_accuracy if history else None
                study.tell(trial, accuracy, TrialState.COMPLETE if history else TrialState.FAIL)
        if failures >= 5:
            raise StudyError(f"5 trials in a row failed, the last one because {reason}")
        yield study


def ask_trial(study: Study) -> Trial:
    """A new trial, with hyperparameters proposed by the estimator of Bergstra et al. 2011."""
    # Own random numbers for each trial: other workers and a study that goes on draw others.
    trial = study.ask()
    seed = int(np.random.SeedSequence([study.seed, trial.number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=6)
    trial.set_user_attr("config", asdict(replace(study.suggest(trial), seed=study.seed)))
    return trial


def list_results(study: Study) -> list[FrozenTrial]:
    """The tuner's trials that have an accuracy, without the reader's own runs."""
    return [trial for trial in study.trials if trial.values and "own" not in trial.user_attrs]


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
    study.add_trial(trial)


def list_runs(study: Study, columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """All runs, the tuner's and your own, best first; last those that failed, without an accuracy."""
    rows = []
    for trial in study.trials:
        if trial.values or trial.user_attrs.get("reason"):
            facts = trial.user_attrs["config"] | trial.user_attrs | {"accuracy": trial.value}
            shape = {"depth": len(facts["hidden"]), "width": max(facts["hidden"], default=math.nan)}
            shape["run"] = f"{'mine' if 'own' in facts else 'trial'} {trial.number}"
            rows.append(facts | shape | {"hidden": "-".join(map(str, facts["hidden"])) or "none"})
    table = pd.DataFrame(rows, columns=columns).sort_values("accuracy", ascending=False, kind="stable")
    table = table.round({"accuracy": 4, "seconds": 1})
    return table.set_index(pd.RangeIndex(1, len(table) + 1))


def main(arguments: list[str] | None = None) -> None:
    """One worker of a study: start one for each CPU core, on as many machines as you like."""
    parser = argparse.ArgumentParser(prog="python -m mnist_helpers.tuning", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=20, help="how many results all workers together want")
    parser.add_argument("--storage", help="URL of the database (default: the SQLite file runs/study.db)")
    parser.add_argument("--data", choices=["mnist", "offline"], default="mnist", help="which digits")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another study")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # workers of one core each share a machine best
    try:
        digits, _ = (data.load_offline_digits if options.data == "offline" else data.load_mnist)()
        device, reason = choose_device()
        print(f"{digits.name} on {device}: {reason}", flush=True)
        parts = [part.to(device) for part in data.split_digits(digits)]
        study = open_study(*parts, options.storage, seed=options.seed)
        for _ in run_study(study, *parts, options.trials):
            done = [trial.value for trial in list_results(study)]
            print(f"{len(done)} of {options.trials} trials, best {max(done, default=0):.2%}", flush=True)
        print(best_config(study))
    except KeyboardInterrupt:
        sys.exit("Stopped. Start again to go on: only the trial in hand is lost.")
    except (ValueError, data.DataError, StudyError, SQLAlchemyError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
