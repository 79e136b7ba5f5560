"""Where a study is kept, and how several workers share it."""

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mnist_helpers.config import Config
from mnist_helpers.data import PROJECT_ROOT, Digits
from mnist_helpers.runs import is_finished

HEARTBEAT = 10  # seconds between two signs of life of a worker
PATIENCE = 6  # heartbeats missed until it is taken for dead
KEPT = 75  # a trial goes on while, at the same epoch, it is among the best 75% of those that ran to their end


def open_study(storage: str | None, name: str, heartbeat: int = HEARTBEAT) -> optuna.Study:
    """The study `name` in the database `storage` (a URL; else `runs/study.db` under the project).

    It is made where there is none yet. A trial is pruned when it is behind three in four of those that ran to
    their end, at the same epoch: a question of accuracy alone, never of time.
    """
    with quiet_optuna():
        return optuna.create_study(
            study_name=name,
            storage=open_storage(storage, heartbeat),
            direction="maximize",
            pruner=optuna.pruners.PercentilePruner(KEPT, n_startup_trials=4),
            load_if_exists=True,
        )


def name_study(train: Digits, validation: Digits, space: Mapping, base: Config, seed: int) -> str:
    """A name that changes with everything that makes trials comparable: digits, search space, base, seed."""
    choices = {knob: distribution_to_json(choice) for knob, choice in space.items()}
    digest = hashlib.sha256(json.dumps([choices, asdict(base), seed], sort_keys=True).encode())
    for digits in (train, validation):
        digest.update(digits.images.numpy())
        digest.update(digits.labels.numpy())
    return f"{train.name} {digest.hexdigest()[:8]}"


def open_storage(url: str | None, heartbeat: int) -> optuna.storages.RDBStorage:
    """The database, its tables made where they are missing."""
    if url is None:
        url = f"sqlite:///{PROJECT_ROOT / 'runs' / 'study.db'}"
        (PROJECT_ROOT / "runs").mkdir(exist_ok=True)
    # SQLite lets one process write at a time; the others wait up to a minute for their turn.
    waiting = {"timeout": 60} if url.startswith("sqlite") else {}
    for attempt in range(1, 6):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs={"pool_pre_ping": True, "connect_args": waiting},
                heartbeat_interval=heartbeat,
                grace_period=PATIENCE * heartbeat,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
            if attempt == 5:
                raise
            time.sleep(0.3 * attempt)  # two workers were making the tables at the same moment


@contextmanager
def quiet_optuna():
    """No lines of Optuna's about each trial and about its own experimental parts, while inside."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def takes_place(trial: FrozenTrial) -> bool:
    """Whether the trial is one of those wanted: it has a result, or a worker is busy with it."""
    return is_finished(trial) or trial.state == TrialState.RUNNING


def count_trials(study: optuna.Study, condition, below: float = float("inf")) -> int:
    """How many trials numbered `below` fulfil the condition."""
    trials = study.get_trials(deepcopy=False)
    return sum(condition(trial) for trial in trials if trial.number < below)


def get_bar(study: optuna.Study, epoch: int) -> float:
    """The accuracy that a trial must have after `epoch` not to be pruned."""
    ended = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    reached = [trial.intermediate_values.get(epoch, np.nan) for trial in ended]
    return float(np.nanpercentile(reached, 100 - KEPT))


def wait_for_place(study: optuna.Study, n_trials: int, heartbeat: int = HEARTBEAT) -> bool:
    """Whether one more trial is needed for `n_trials` with a result.

    While the last ones are in the hands of other workers, it waits: one of these may turn out to be dead, and
    then its place is free again.
    """
    deadline = time.monotonic() + PATIENCE * heartbeat
    while count_trials(study, is_finished) < n_trials:
        if count_trials(study, takes_place) < n_trials:
            return True
        time.sleep(0.5)
        with quiet_optuna():
            optuna.storages.fail_stale_trials(study)
        if time.monotonic() > deadline:  # Optuna never finds those who died before their first heartbeat
            for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
                if "knobs" not in trial.user_attrs:
                    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return False
