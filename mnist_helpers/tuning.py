"""The search for hyperparameters with Optuna; as a command, one worker of many."""

import argparse
import time
from contextlib import suppress
from dataclasses import asdict, replace
from warnings import catch_warnings

import optuna
import pandas as pd
import torch
from optuna.study import MaxTrialsCallback, Study
from optuna.trial import FixedTrial, Trial, TrialState, create_trial
from sqlalchemy import URL, make_url

from mnist_helpers import data, training
from mnist_helpers.training import Config, Epoch

# What all trials of the command share; the notebook's `STUDY` (1.2) is the same.
BASE = Config(batch_norm=True, optimizer="adamw", one_cycle=True, weight_decay=0.2)
SEARCHED = ["learning_rate", "batch_size", "epochs", "hidden"]
PATIENCE = 10  # seconds; other workers may be making the tables of a new database


class StudyError(RuntimeError):
    """The study cannot be opened; the message says why."""


def suggest_config(trial: Trial, base: Config) -> Config:
    """The hyperparameters of one trial: `base` with those that the study searches."""
    width = trial.suggest_int("width", 64, 256, log=True)
    depth = trial.suggest_int("depth", 1, 2)
    rate = trial.suggest_float("learning_rate", 1e-3, 3e-3, log=True)
    config = replace(
        base,
        learning_rate=round(rate, 4),
        batch_size=trial.suggest_categorical("batch_size", [256, 512]),
        epochs=trial.suggest_int("epochs", 2, 4),
        hidden=(width,) * depth,
    )
    trial.set_user_attr("config", asdict(config))
    return config


def find_storage() -> str | None:
    """The URL of `runs/study.db`; None (in memory) where it cannot be written."""
    path = data.PROJECT_ROOT / "runs/study.db"
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()  # for SQLite, an empty file is an empty database
    except OSError:
        print("runs/ cannot be written: runs are lost at the end.")
        return None
    return str(URL.create("sqlite", database=str(path)))


def open_study(
    train: data.Digits, base: Config, storage: str | None, seed: int | None = None
) -> Study:
    """The study of these digits and fixed hyperparameters, with its trials so far.

    `storage` is the URL of a database, None keeps the trials in memory. With a `seed`
    a new study draws the same trials again; several workers at once need different
    ones.
    After six random trials it proposes much as Bergstra et al. 2011 do ("Algorithms for
    Hyper-Parameter Optimization"). Raises `StudyError`.
    """
    # Else it prints a line for each trial, and a traceback for one that diverged.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name = f"{train.name}, {len(train)}, {describe_changes(asdict(base), Config())}"
    place = "the study"
    start = time.monotonic()
    while True:
        try:
            if storage:
                place = make_url(storage)  # shown without its password
            study = optuna.create_study(
                storage=storage,
                sampler=optuna.samplers.TPESampler(n_startup_trials=6, seed=seed),
                study_name=name,
                direction="maximize",
                load_if_exists=True,
            )
            if study.trials:  # the seed would draw the first of them once more
                study.sampler.reseed_rng()
            return study
        except Exception as error:  # a driver's, SQLAlchemy's or Optuna's
            cause = str(error.__cause__ or error).partition("\n")[0]
            if time.monotonic() - start > PATIENCE:
                raise StudyError(
                    f"cannot open {place}: {cause}. "
                    "If opening it was stopped before, restart the kernel."
                ) from None
            time.sleep(0.5)


def describe_changes(config: dict, base: Config) -> str:
    """How `config` differs from `base` in what the study does not search."""
    return ", ".join(
        f"{name}={value}"
        for name, value in config.items()
        if name not in SEARCHED and value != getattr(base, name, None)
    )


def record_run(study: Study, config: Config, history: list[Epoch]) -> None:
    """Keep your own training, the records of `fit`, among the trials.

    It counts and can be the best. Optuna learns from it if `suggest_config` could have
    drawn its values; after one outside of these ranges, Optuna proposes each
    hyperparameter by itself. `ValueError` if it had no validation digits.
    """
    config = replace(config, epochs=len(history))
    noted = asdict(config)
    shape = {"depth": len(config.hidden), "width": max(config.hidden, default=0)}
    drawn = FixedTrial(noted | shape)
    searched = {}
    with suppress(ValueError, Warning), catch_warnings(action="error"):
        if suggest_config(drawn, config) == config:  # all within the ranges
            searched = {"params": drawn.params, "distributions": drawn.distributions}
    trial = create_trial(
        value=history[-1].validation_accuracy,
        user_attrs={"run": "mine", "config": noted},
        **searched,
    )
    study.add_trial(trial)


def list_runs(study: Study, base: Config) -> pd.DataFrame:
    """All finished runs, the best first; `also` says what else differs from `base`."""
    rows = []
    for trial in study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL]):
        noted = trial.user_attrs
        config = noted.get("config", {})  # none in another program's trial
        row = {
            "run": f"{noted.get('run', 'trial')} {trial.number}",
            "accuracy": trial.value,
            "also": describe_changes(config, base),
        }
        rows.append(config | row)
    table = pd.DataFrame(rows, columns=["run", "accuracy", *SEARCHED, "also"])
    return table.sort_values(  # of equal runs, the first is the study's best
        "accuracy", ascending=False, kind="stable", ignore_index=True
    )


def count_missing(study: Study, wanted: int) -> int:
    """How many results are to come; a stopped or diverged trial has none."""
    return max(0, wanted - len(study.get_trials(states=[TrialState.COMPLETE])))


def main(arguments: list[str] | None = None) -> None:
    """One worker of a study: start one for each core, on as many machines as you like.

    They share the database and stop when it holds the wanted number of results, or
    after as many trials as were missing. Of a worker that is stopped, only one trial is
    lost.
    """
    parser = argparse.ArgumentParser("mnist_helpers.tuning", description=main.__doc__)
    parser.add_argument("--trials", type=int, default=20, help="results in all")
    parser.add_argument("--storage", help="URL of the database (runs/study.db)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the other cores have workers of their own

    def objective(trial):
        config = suggest_config(trial, BASE)
        return training.score_config(config, train, validation)

    try:
        device, _ = training.choose_device()
        digits, _ = data.load_mnist()
        train, validation = data.split_digits(digits.to(device))
        study = open_study(train, BASE, options.storage or find_storage())
        optuna.logging.set_verbosity(optuna.logging.INFO)  # a line for each trial
        study.optimize(
            objective,
            n_trials=count_missing(study, options.trials),
            catch=training.TrainingError,
            callbacks=[MaxTrialsCallback(options.trials)],
        )
        print(list_runs(study, BASE).to_string())
    except (data.DataError, StudyError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
