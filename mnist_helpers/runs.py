"""The runs of a study, the tuner's and the reader's own: kept in its database, ranked, compared."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from mnist_helpers.config import Config
from mnist_helpers.training import Epoch

BY_HAND = "run by hand "  # how the names of the study's attributes begin that keep the reader's own runs


@dataclass(frozen=True)
class Run:
    """One training: its knobs, and how far it got with them."""

    name: str  # "trial 7" is the tuner's, "mine 2" the reader's own
    knobs: dict  # the fields of `Config`
    accuracies: tuple[float, ...]  # on the validation digits, after each epoch
    seconds: float
    state: str  # "complete", "pruned" or "fail"
    reason: str = ""  # why it ended early

    @property
    def accuracy(self) -> float:
        """Fraction of the validation digits that were right at the end; nan if no epoch was completed."""
        return self.accuracies[-1] if self.accuracies else math.nan

    @property
    def config(self) -> Config:
        """The knobs, ready for `fit`."""
        return Config(**self.knobs)


def list_runs(study: Study) -> list[Run]:
    """All runs, best first: those that ran to their end by accuracy, then the pruned, then the failed."""
    runs = [read_trial(trial) for trial in study.get_trials(deepcopy=False) if is_finished(trial)]
    runs += list_own_runs(study)
    states = ["complete", "pruned", "fail"]
    return sorted(runs, key=lambda run: (states.index(run.state), -run.accuracy if run.accuracies else 0))


def list_own_runs(study: Study) -> list[Run]:
    """The reader's own runs, in the order they were made."""
    records = sorted((key, value) for key, value in study.user_attrs.items() if key.startswith(BY_HAND))
    return [
        Run(
            f"mine {n}",
            **record | {"knobs": update_knobs(record["knobs"]), "accuracies": tuple(record["accuracies"])},
        )
        for n, (_, record) in enumerate(records, start=1)
    ]


def update_knobs(stored: dict) -> dict:
    """The knobs of a run that an older or newer version of `Config` may have kept, in terms of this one."""
    return {knob: stored.get(knob, default) for knob, default in asdict(Config()).items()}


def is_finished(trial: FrozenTrial) -> bool:
    """Whether the trial has a result; one interrupted or killed has none, nor a reason for its failure."""
    if trial.state == TrialState.FAIL:
        return "reason" in trial.user_attrs
    return trial.state.is_finished()


def read_trial(trial: FrozenTrial) -> Run:
    """What `tuning.run_trial` has noted of a finished trial."""
    accuracies = tuple(value for _, value in sorted(trial.intermediate_values.items()))
    note = trial.user_attrs
    seconds, reason = note.get("seconds", 0.0), note.get("reason", "")
    knobs = update_knobs(note["knobs"])
    return Run(f"trial {trial.number}", knobs, accuracies, seconds, trial.state.name.lower(), reason)


def record_run(study: Study, config: Config, history: Sequence[Epoch]) -> Run:
    """Keep a training of your own, `history` being the records of `fit`, in the study's database.

    The tuner does not learn from it: its trials stay the same whatever is tried by hand.
    """
    if not history:
        raise ValueError("the history is empty: a run can be recorded after its first complete epoch")
    done, wanted = len(history), config.epochs
    record = {
        "knobs": asdict(config),
        "accuracies": [epoch.validation_accuracy for epoch in history],
        "seconds": sum(epoch.seconds for epoch in history),
        "state": "complete",
        "reason": f"stopped after {done} of {wanted} epochs" if done < wanted else "",
    }
    study.set_user_attr(f"{BY_HAND}{time.time_ns()}", record)
    return list_own_runs(study)[-1]


def describe_run(study: Study, run: Run) -> str:
    """Where `run` stands, how it compares with your last one, and what the best does differently."""
    runs = list_runs(study)
    best = runs[0]
    rank = 1 + sum(other.state == "complete" and other.accuracy > run.accuracy for other in runs)
    parts = [f"{run.name}: {run.accuracy:.2%}, rank {rank} of {len(runs)}"]
    for before, this in pairwise(list_own_runs(study)):
        if this == run:
            parts += [f"{100 * (run.accuracy - before.accuracy):+.2f} points over your last one"]
            gained = before.seconds - run.seconds
            parts += [f"{abs(gained):.1f} s {'faster' if gained > 0 else 'slower'}"]
    if rank == 1:
        return ", ".join(parts) + "; no run is better"
    changes = [
        f"{knob} {format_knob(best.knobs[knob])} instead of {format_knob(value)}"
        for knob, value in run.knobs.items()
        if value != best.knobs[knob]
    ]
    changes = ", ".join(changes) or "the same knobs"
    return ", ".join(parts) + f"; the best, {best.name} with {best.accuracy:.2%}, has {changes}"


def format_knob(value) -> str:
    """A knob's value, short: 0.00123, 512-256, adam."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def describe_progress(study: Study, n_trials: int) -> str:
    """How far the tuner is, how long it will still take alone, and the best run so far."""
    runs = list_runs(study)
    trials = [run for run in runs if run.name.startswith("trial")]
    parts = [f"{len(trials)} of {n_trials} trials"]
    if trials and len(trials) < n_trials:
        seconds = sum(run.seconds for run in trials) / len(trials) * (n_trials - len(trials))
        parts.append(f"about {seconds:.0f} s left")
    if runs and runs[0].state == "complete":
        parts.append(f"best {runs[0].accuracy:.2%} ({runs[0].name})")
    return ", ".join(parts)
