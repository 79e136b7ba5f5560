"""The search for knobs: reproducible, resumable, shared, honest about failures, blind to test digits."""

import inspect
import os
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from mnist_helpers import runs, studies, tuning
from mnist_helpers.config import Config
from mnist_helpers.data import PROJECT_ROOT, Digits, load_offline_digits, split_digits
from mnist_helpers.model import MLP
from mnist_helpers.runs import Run, describe_progress, describe_run, list_runs, record_run
from mnist_helpers.training import Epoch, fit
from mnist_helpers.tuning_plots import (
    RunsTable,
    plot_importance,
    plot_knobs,
    plot_runs,
    plot_seconds,
    runs_table,
)

RATE = {"learning_rate": FloatDistribution(1e-3, 1e-1, log=True)}  # one knob, for made-up results
WIDER = {"learning_rate": FloatDistribution(1e-3, 0.2, log=True)}
FIVE = Config(hidden=(8,), epochs=5)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    """240 digits to train on, 60 to judge by."""
    return split_digits(load_offline_digits()[0][:300], fraction=1 / 5)


@pytest.fixture
def folder(tmp_path):
    """A folder in memory where there is one: a database waits for the disk at every step."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def storage(folder) -> str:
    return f"sqlite:///{folder}/study.db"


@pytest.fixture
def scripted(monkeypatch):
    """Call it with a function (config, epoch number) -> accuracy, to stand for training; it may raise."""

    def install(accuracy):
        calls = []

        def make_epochs(config, train, validation, device):
            for number in range(1, config.epochs + 1):
                calls.append((config, number))
                yield make_epoch(number, accuracy(config, number))

        monkeypatch.setattr(tuning, "fit", make_epochs)
        return calls

    return install


def make_epoch(number: int, accuracy: float, seconds: float = 1.0) -> Epoch:
    return Epoch(number, 0.1, 0.1, accuracy, 1e-3, seconds, MLP((1,)))


def search(digits, n_trials, storage, **options) -> optuna.Study:
    *_, study = tuning.run_study(*digits, n_trials, storage, **options)
    return study


def get_facts(study) -> list:
    return [(trial.params, trial.state, trial.intermediate_values) for trial in study.trials]


def test_seeded_studies_repeat_and_a_resumed_one_goes_on_the_same_way(digits, folder):
    whole = search(digits, 12, f"sqlite:///{folder}/whole.db")  # the sampler's model takes over after 8
    torch.rand(7)  # somebody else's random numbers
    search(digits, 5, f"sqlite:///{folder}/parts.db")
    parts = search(digits, 12, f"sqlite:///{folder}/parts.db")
    assert get_facts(whole) == get_facts(parts)
    assert len({trial.params["learning_rate"] for trial in whole.trials}) == 12  # no draw is repeated
    other = search(digits, 2, f"sqlite:///{folder}/whole.db", seed=1)
    assert get_facts(other)[:2] != get_facts(whole)[:2]

    best = list_runs(whole)[0]  # its accuracy is that of a training with its knobs
    *_, last = fit(best.config, *digits)
    assert best.accuracy == last.validation_accuracy == whole.best_value


def test_finished_study_is_shown_at_once_and_a_larger_one_adds_the_missing(digits, storage, scripted):
    calls = scripted(lambda config, number: 0.9)
    states = [len(study.trials) for study in tuning.run_study(*digits, 3, storage, base=FIVE)]
    assert states == [0, 1, 2, 3]  # it is handed on at the start and after each trial
    trained = len(calls)
    states = [len(study.trials) for study in tuning.run_study(*digits, 3, storage, base=FIVE)]
    assert states == [3]
    assert len(calls) == trained
    assert [len(study.trials) for study in tuning.run_study(*digits, 5, storage, base=FIVE)] == [3, 4, 5]


def test_interrupted_study_loses_only_the_trial_in_hand(digits, storage, scripted, monkeypatch):
    def interrupt(config, number):
        if len(calls) == 8:  # in the middle of the second trial
            raise KeyboardInterrupt
        return 0.9

    calls = scripted(interrupt)
    options = {"space": RATE, "base": FIVE}
    with pytest.raises(KeyboardInterrupt):
        search(digits, 3, storage, **options)
    study = search(digits, 1, storage, **options)
    assert [run.name for run in list_runs(study)] == ["trial 0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.ask()  # as a worker leaves it that is killed before its first sign of life
    monkeypatch.setattr(studies, "PATIENCE", 1)
    study = search(digits, 3, storage, heartbeat=1, **options)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert sorted(run.name for run in list_runs(study)) == ["trial 0", "trial 3", "trial 4"]


def test_whatever_changes_the_question_starts_its_own_study(digits, storage, scripted):
    scripted(lambda config, number: 0.9)
    train, validation = digits
    spoilt = Digits(train.images.clone(), (train.labels + 1) % 10, train.name)
    usual = {"space": RATE, "base": FIVE}
    found = [
        search(digits, 1, storage, **usual),
        search(digits, 1, storage, **usual | {"space": WIDER}),
        search(digits, 1, storage, **usual | {"base": replace(FIVE, dropout=0.1)}),
        search(digits, 1, storage, seed=1, **usual),
        search((spoilt, validation), 1, storage, **usual),
        search((train, spoilt), 1, storage, **usual),
    ]
    assert len({study.study_name for study in found}) == 6
    assert all(len(study.trials) == 1 for study in found)
    again = search((train[:], validation[:]), 1, storage, **usual)  # equal digits, other objects
    assert again.study_name == found[0].study_name


@pytest.mark.parametrize("fate", ["poisoned", "absent"])
def test_choice_does_not_depend_on_test_digits(fate, storage, folder, monkeypatch):
    train, test = load_offline_digits()
    train = train[:300]
    poisoned = Digits(test.images, (test.labels + 3) % 10) if fate == "poisoned" else None
    chosen = []
    for name, unseen in ("usual", test), (fate, poisoned):
        monkeypatch.setattr(tuning, "load_offline_digits", lambda unseen=unseen: (train, unseen))
        storage = f"sqlite:///{folder}/{name}.db"
        tuning.main(["--data", "offline", "--trials", "4", "--storage", storage])
        chosen.append(list_runs(search(split_digits(train), 4, storage))[0].config)
    assert chosen[0] == chosen[1]
    assert not any("test" in name for name in inspect.signature(tuning.run_study).parameters)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (MemoryError(), "memory"),
        (ValueError("a knob makes no sense"), "a knob makes no sense"),
    ],
)
def test_bad_trials_are_recorded_and_the_study_goes_on(digits, storage, scripted, error, reason):
    def fail_at_first(config, number):
        if len(calls) <= 1:
            raise error
        return 0.5

    calls = scripted(fail_at_first)
    study = search(digits, 3, storage, space=RATE, base=FIVE)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    worst = list_runs(study)[-1]
    assert (worst.name, worst.state) == ("trial 0", "fail")
    assert worst.reason.startswith("failed: ")
    assert reason in worst.reason
    assert worst.reason in repr(runs_table(study))


def test_diverging_training_never_wins(digits, storage):
    space = {"learning_rate": CategoricalDistribution([1e-3, 1e30])}
    base = Config(hidden=(16,), batch_norm=False, optimizer="sgd", epochs=1)
    runs = list_runs(search(digits, 6, storage, space=space, base=base))
    assert {run.state for run in runs} == {"complete", "fail"}
    for run in runs:
        assert (run.state == "fail") == (run.knobs["learning_rate"] == 1e30)
    assert "stopped being numbers in epoch 1" in runs[-1].reason


def test_poor_trials_are_pruned_by_their_accuracy_alone(digits, storage, scripted):
    calls = scripted(lambda config, number: 0.9 if len({c.learning_rate for c, _ in calls}) <= 4 else 0.2)
    study = search(digits, 5, storage, space=RATE, base=FIVE)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4 + ["PRUNED"]
    assert len(calls) == 4 * 5 + 1  # the last one was stopped after its first epoch
    pruned = list_runs(study)[-1]
    assert pruned.reason == "pruned after 1 of 5 epochs: 90.00% was wanted"
    assert pruned.accuracies == (0.2,)


def test_every_knob_of_the_search_reaches_the_training(digits, storage, scripted):
    calls = scripted(lambda config, number: 0.9)
    study = search(digits, 10, storage)
    used = {config for config, _ in calls}
    sought = tuning.SEARCH_SPACE.keys() - {"depth", "width", "taper"} | {"hidden"}
    assert sought >= {"learning_rate", "batch_size", "epochs", "hidden"}
    for knob in sought:
        assert len({getattr(config, knob) for config in used}) > 1, knob
    panels = {ax.get_xlabel() for ax in plot_knobs(study).axes if ax.axison}
    assert panels >= {"learning rate", "batch size", "epochs", "hidden layers", "first width", "optimizer"}
    for trial in study.trials:
        values = trial.params
        config = next(c for c in used if c.learning_rate == values["learning_rate"])
        assert len(config.hidden) == values["depth"]
        assert config.hidden[0] == values["width"]
        assert all(b == a * values["taper"] for a, b in zip(config.hidden, config.hidden[1:], strict=False))


def test_knobs_that_are_not_sought_stay_as_in_the_base():
    base = Config(hidden=(512, 128), dropout=0.3)
    assert Config(**tuning.make_knobs({"epochs": 2}, base)) == replace(base, epochs=2)
    assert tuning.make_knobs({"depth": 3}, base)["hidden"] == [512, 512, 512]
    assert tuning.make_knobs({"depth": 3, "width": 100, "taper": 0.5}, base)["hidden"] == [100, 50, 25]


def test_workers_that_race_for_the_last_place_run_no_trial_too_many(digits, storage, scripted, monkeypatch):
    calls = scripted(lambda config, number: 0.9)
    monkeypatch.setattr(tuning, "wait_for_place", lambda *_: len(study.trials) < 4)  # both saw a free place
    for study in tuning.run_study(*digits, 2, storage, space=RATE, base=FIVE):  # noqa: B007
        pass
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert len(calls) == 2 * 5
    assert len(list_runs(study)) == 2


def test_worker_that_was_taken_for_dead_does_not_disturb(digits, storage, scripted):
    def give_away(config, number):
        if len(calls) == 3:  # the machine slept; meanwhile another worker has given up on its trial
            study.tell(study.trials[-1].number, state=TrialState.FAIL)
        return 0.9

    calls = scripted(give_away)
    for study in tuning.run_study(*digits, 2, storage, space=RATE, base=FIVE):  # noqa: B007
        pass
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [run.name for run in list_runs(study)] == ["trial 1", "trial 2"]


def test_nothing_is_printed_nor_warned_of(digits, storage, scripted, capfd):
    scripted(lambda config, number: 1 / 0 if config.dropout > 1 else 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = search(digits, 2, storage, space=RATE, base=FIVE)
        plot_importance(study)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trials": 0}, "at least 1, got 0"),
        ({"space": {"lr": FloatDistribution(0, 1)}}, "unknown knob lr .* choose from .*learning_rate"),
        ({"space": {"hidden": IntDistribution(1, 2)}}, "unknown knob hidden .* choose from .*width"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(digits, storage, options, message):
    with pytest.raises(ValueError, match=message):
        search(digits, **{"n_trials": 1, "storage": storage} | options)


@pytest.fixture
def study(digits, storage, scripted) -> optuna.Study:
    """Five trials, 90% to 94% right after as many epochs as seconds, the first the worst."""
    scripted(lambda config, number: 0.9 + 0.01 * len(study.trials[1:]) - 0.001 * (5 - number))
    base = replace(FIVE, hidden=(8, 4))
    for study in tuning.run_study(*digits, 5, storage, space=RATE, base=base):  # noqa: B007
        pass
    return study


def test_own_runs_are_ranked_among_all_and_survive_a_restart(study, storage):
    config = replace(FIVE, hidden=(8, 4), learning_rate=0.25)
    first = record_run(study, config, [make_epoch(n, 0.925, seconds=3.0) for n in range(1, 6)])
    text = describe_run(study, first)
    assert text.startswith("mine 1: 92.50%, rank 3 of 6; the best, trial 4 with 94.00%, has learning_rate")
    second = record_run(study, config, [make_epoch(n, 0.9262, seconds=1.5) for n in range(1, 6)])
    text = describe_run(study, second)
    assert text.startswith("mine 2: 92.62%, rank 3 of 7, +0.12 points over your last one, 7.5 s faster; the")
    best = list_runs(study)[0].knobs["learning_rate"]
    assert text.endswith(f"has learning_rate {best:.3g} instead of 0.25")  # all other knobs are equal

    reopened = optuna.load_study(study_name=study.study_name, storage=storage)
    assert list_runs(reopened) == list_runs(study)
    third = record_run(reopened, config, [make_epoch(1, 0.99)])
    assert third.name == "mine 3"
    assert third.reason == "stopped after 1 of 5 epochs"
    assert "rank 1 of 8" in describe_run(reopened, third)
    assert list_runs(reopened)[0] == third
    assert third.config == config
    again = record_run(study, config, [make_epoch(1, 0.98)])
    assert describe_run(study, again).endswith("has the same knobs")
    with pytest.raises(ValueError, match="history is empty"):
        record_run(study, config, [])


def test_runs_kept_with_other_knobs_than_today_are_still_read(study):
    """A study is older than the code that reads it: a knob has gone since, another has been added."""
    record_run(study, FIVE, [make_epoch(1, 0.99)])
    (key,) = (key for key in study.user_attrs if key.startswith(runs.BY_HAND))
    record = study.user_attrs[key]
    older = {knob: value for knob, value in record["knobs"].items() if knob != "dropout"} | {"momentum": 0.9}
    study.set_user_attr(key, record | {"knobs": older})
    assert list_runs(study)[0].config == FIVE
    now = record_run(study, FIVE, [make_epoch(1, 0.98)])
    assert describe_run(study, now).endswith("has the same knobs")


def test_own_runs_leave_the_search_as_it_is(digits, folder, scripted):
    scripted(lambda config, number: 1 - config.learning_rate)
    alone = search(digits, 10, f"sqlite:///{folder}/alone.db")
    study = search(digits, 4, f"sqlite:///{folder}/study.db")
    record_run(study, Config(), [make_epoch(1, 0.999)])
    study = search(digits, 10, f"sqlite:///{folder}/study.db")
    assert get_facts(study) == get_facts(alone)
    assert len(list_runs(study)) == 11


def test_progress_tells_what_is_left_and_the_best(study):
    assert describe_progress(study, 5) == "5 of 5 trials, best 94.00% (trial 4)"
    runs = [run.seconds for run in list_runs(study)]
    record_run(study, FIVE, [make_epoch(1, 0.5, seconds=1000)])  # no trial: it must not count
    left = f"{sum(runs) / 5 * 15:.0f}"
    assert describe_progress(study, 20) == f"5 of 20 trials, about {left} s left, best 94.00% (trial 4)"


def test_table_shows_all_runs_best_first_in_plain_html():
    knobs = {"hidden": [512, 256], "learning_rate": 0.00123456, "epochs": 3}
    runs = [
        Run("trial 1", knobs, (0.9, 0.9712), 12.34, "complete"),
        Run("mine 1", knobs | {"learning_rate": 0.1}, (0.8,), 1.0, "complete", "stopped after 1 of 3 epochs"),
        Run("trial 0", knobs | {"learning_rate": 5.0}, (), 0.0, "fail", "failed: loss <nan>"),
    ]
    page, text = RunsTable(runs)._repr_html_(), repr(RunsTable(runs))
    rows = page.split("<tr>")[1:]
    assert len(rows) == 4
    assert "".join(rows[1].split("</tr>")[0]) == "".join(
        f"<td><b>{cell}</b></td>" for cell in ["1", "trial 1", "97.12%", "12.3", "0.00123", ""]
    )
    assert page.count("<b>") == 6
    assert "failed: loss &lt;nan&gt;" in rows[3]
    assert "<style" not in page
    assert "The same in all: hidden 512-256, epochs 3." in page
    lines = text.splitlines()
    assert " ".join(lines[2].split()) == "2 mine 1 80.00% 1.0 0.1 stopped after 1 of 3 epochs"
    assert " ".join(lines[3].split()) == "3 trial 0 - 0.0 5 failed: loss <nan>"
    assert "trial" not in repr(RunsTable([]))  # an empty one is no error


def test_figures_show_the_numbers(study):
    record_run(study, replace(FIVE, hidden=(8, 4), learning_rate=0.25), [make_epoch(1, 0.925, seconds=3.0)])
    runs = list_runs(study)
    curves = plot_runs(study).axes[0]
    assert [list(line.get_ydata()) for line in curves.get_lines()] == [
        pytest.approx([1 - accuracy for accuracy in run.accuracies]) for run in runs
    ]
    assert curves.get_lines()[0].get_linewidth() > curves.get_lines()[1].get_linewidth()
    assert curves.get_lines()[0].get_color() != curves.get_lines()[1].get_color()
    bottom, top = curves.get_ylim()
    assert bottom > top  # few errors are on top
    assert curves.yaxis.get_major_formatter()(0.02, 0) == "98%"

    shown = [ax for ax in plot_knobs(study).axes if ax.axison]
    assert [ax.get_xlabel() for ax in shown] == ["learning rate"]  # nothing else was varied
    points = [tuple(point) for dots in shown[0].collections for point in dots.get_offsets()]
    assert sorted(points) == sorted((run.knobs["learning_rate"], 1 - run.accuracy) for run in runs)

    costs = plot_seconds(study).axes[0].collections
    points = {tuple(point) for dots in costs for point in dots.get_offsets()}
    assert points == {(run.seconds, 1 - run.accuracy) for run in runs}
    assert plt.get_fignums() == []


def test_importance_finds_the_knob_that_matters(digits, storage, scripted):
    scripted(lambda config, number: 0.5 + config.dropout)
    space = RATE | {"dropout": FloatDistribution(0, 0.4), "weight_decay": FloatDistribution(0, 0.01)}
    study = search(digits, 12, storage, space=space, base=replace(FIVE, epochs=1))
    names, shares = [], []
    for _ in range(2):
        ax = plot_importance(study).axes[0]
        names.append([label.get_text() for label in ax.get_yticklabels()])
        shares.append([bar.get_width() for bar in ax.patches])
    assert names[0][0] == "dropout"
    assert shares[0][0] > 0.8
    assert sum(shares[0]) == pytest.approx(1)
    assert shares[0] == shares[1]


def test_figures_of_a_study_that_has_just_begun(digits, storage, scripted):
    calls = scripted(lambda config, number: 0.9 if len(calls) > 1 else 1.0)
    for study in tuning.run_study(*digits, 1, storage, space=RATE, base=replace(FIVE, epochs=2)):
        for plot in plot_runs, plot_knobs, plot_seconds, plot_importance:
            plot(study).canvas.draw()
        assert len(runs_table(study).runs) == len(study.trials)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "0"], "must be at least 1, got 0"),
        (["--trials", "many"], "invalid int value: 'many'"),
        (["--storage", "nonsense"], "Could not parse SQLAlchemy URL"),
        (["--storage", "sqlite:////nowhere/at/all/study.db"], "unable to open database file"),
        (["--storage", "cobol://host/study"], "cobol"),
        (["--heartbeat", "0"], "positive integer"),
    ],
)
def test_bad_command_line_gets_one_clear_line(arguments, message, storage, capsys, monkeypatch):
    monkeypatch.setattr(studies.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ending:
        tuning.main(["--data", "offline", "--storage", storage, *arguments])
    assert ending.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_stopped_command_says_how_to_go_on(storage, scripted):
    def interrupt(config, number):
        raise KeyboardInterrupt

    scripted(interrupt)
    with pytest.raises(SystemExit, match="Start again to go on"):
        tuning.main(["--data", "offline", "--storage", storage])


def start_worker(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mnist_helpers.tuning", "--data", "offline", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, **pipes)


def test_two_processes_share_one_sqlite_study(storage, folder):
    door = sqlite3.connect(folder / "study.db", isolation_level=None)
    door.execute("BEGIN EXCLUSIVE")  # nobody gets in before both are there
    workers = [start_worker("--trials", "8", "--storage", storage) for _ in range(2)]
    assert all("to train on" in worker.stdout.readline() for worker in workers)
    door.close()
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert all("Done: 8 of 8 trials" in output for output in outputs)
    name = optuna.get_all_study_names(storage)
    assert len(name) == 1
    trials = optuna.load_study(study_name=name[0], storage=storage).trials
    done = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(done) == 8
    assert len({str(trial.params) for trial in done}) == 8  # none was done twice
    assert len({trial.user_attrs["worker"] for trial in done}) == 2
