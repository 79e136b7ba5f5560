"""The search for hyperparameters: reproducible, shared, honest about failures, and kept whatever happens."""

import inspect
import math
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest
import torch
from conftest import make_toy_digits
from optuna.trial import TrialState
from sqlalchemy.pool import NullPool

from mnist_helpers import tuning
from mnist_helpers.data import PROJECT_ROOT, Digits
from mnist_helpers.model import ACTIVATIONS, MLP
from mnist_helpers.training import OPTIMIZERS, Config, Epoch, TrainingError, fit
from mnist_helpers.tuning import (
    StudyError,
    best_config,
    fit_all,
    list_results,
    list_runs,
    open_study,
    record_run,
    run_study,
)

FIVE = Config(hidden=(8,), epochs=5)
DIGITS = make_toy_digits(80), make_toy_digits(40, seed=1)


def suggest_rate(trial) -> Config:
    """One hyperparameter, for made-up results."""
    return replace(FIVE, learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True))


def suggest_few(trial) -> Config:
    """Several, for real trainings of an epoch."""
    hidden = (trial.suggest_int("width", 2, 32, log=True),)
    size = trial.suggest_int("batch_size", 8, 64, log=True)
    return replace(suggest_rate(trial), hidden=hidden, batch_size=size, epochs=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
def project(folder, monkeypatch) -> Path:
    """An empty project, whose folder `runs` is not there yet."""
    monkeypatch.setattr(tuning, "PROJECT_ROOT", folder)
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """Call it with a function config -> accuracy, to stand for training; it may raise."""

    def install(get_accuracy):
        calls = []

        def make_epochs(config, *parts):
            calls.append(config)
            accuracy = get_accuracy(config)
            yield from make_history(accuracy, config.epochs)

        monkeypatch.setattr(tuning, "fit", make_epochs)
        return calls

    return install


def make_history(accuracy: float, epochs: int = 5, seconds: float = 1.0) -> list[Epoch]:
    """The records of a training that gets better by a point each epoch, up to `accuracy`."""
    gains = [accuracy - 0.01 * (epochs - number) for number in range(1, epochs + 1)]
    return [Epoch(n, 0.1, 0.1, gain, 1e-3, seconds, MLP((1,))) for n, gain in enumerate(gains, start=1)]


def search(n_trials: int, storage: str | None, digits=DIGITS, **options) -> optuna.Study:
    *_, study = run_study(open_study(*digits, storage, **options), *digits, n_trials)
    return study


def load(storage: str) -> optuna.Study:
    """The only study there, as any tool of Optuna's opens it."""
    database = optuna.storages.RDBStorage(storage, {"poolclass": NullPool})
    return optuna.load_study(study_name=None, storage=database)


def get_facts(study) -> list:
    return [(trial.params, trial.value, trial.user_attrs["config"]) for trial in list_results(study)]


def test_trials_repeat_and_a_resumed_study_goes_on_the_same_way(folder):
    options = {"suggest": suggest_few}
    whole = search(9, f"sqlite:///{folder}/whole.db", **options)  # after 6 draws the estimator takes over
    torch.rand(7)  # somebody else's random numbers
    search(4, f"sqlite:///{folder}/parts.db", **options)
    parts = search(9, f"sqlite:///{folder}/parts.db", **options)
    assert get_facts(whole) == get_facts(parts)
    assert len({trial.params["learning_rate"] for trial in whole.trials}) == 9  # no draw is repeated
    other = search(2, f"sqlite:///{folder}/whole.db", seed=1, **options)
    assert other.trials[0].params != whole.trials[0].params
    assert best_config(other).seed == 1  # the trainings' too

    *_, last = fit(best_config(whole), *DIGITS)
    assert last.validation_accuracy == whole.best_value > 0.2


def test_search_learns_where_it_is_better(scripted, project):
    """The last ten of 25 trials are better than the first six, which are drawn blindly."""

    def get_accuracy(config):
        rate, width = math.log10(config.learning_rate), math.log2(config.hidden[0])
        return 0.9 + 0.01 * config.epochs - 0.02 * abs(rate + 2.4) - 0.01 * abs(width - 8)

    scripted(get_accuracy)
    values = [trial.value for trial in search(25, None).trials]
    assert sum(values[-10:]) / 10 > sum(values[:6]) / 6 + 0.01


def test_finished_study_trains_nothing_and_a_larger_one_adds_the_missing(storage, scripted):
    calls = scripted(lambda config: 0.9)

    def count(n_trials):
        study = open_study(*DIGITS, storage, suggest_rate)
        return [len(study.trials) for study in run_study(study, *DIGITS, n_trials)]

    assert count(3) == [0, 1, 2, 3]  # it is handed on at the start and after each trial
    assert count(3) == [3]
    assert len(calls) == 3
    assert count(5) == [3, 4, 5]


def test_stopped_study_loses_only_the_trial_in_hand(storage, scripted):
    def stop(config):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.9

    calls = scripted(stop)
    with pytest.raises(KeyboardInterrupt):
        search(3, storage, suggest=suggest_rate)
    study = search(3, storage, suggest=suggest_rate)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert sorted(list_runs(study)["run"]) == ["trial 0", "trial 2", "trial 3"]


def test_round_of_trials_side_by_side(folder):
    def count(name):
        study = open_study(*DIGITS, f"sqlite:///{folder}/{name}.db", suggest_few)
        sizes = [len(study.trials) for study in run_study(study, *DIGITS, 5, at_once=4)]
        return sizes, get_facts(study)

    sizes, facts = count("first")
    assert sizes == [0, 4, 5]
    assert len({params["learning_rate"] for params, _, _ in facts}) == 5
    assert count("second") == (sizes, facts)


def test_stopped_round_leaves_no_trial_running(storage, monkeypatch):
    def stop(*parts):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "fit_all", stop)
    with pytest.raises(KeyboardInterrupt):
        list(run_study(open_study(*DIGITS, storage, suggest_few), *DIGITS, 5, at_once=3))
    study = open_study(*DIGITS, storage, suggest_few)
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * 3
    assert list_runs(study).empty


def test_networks_trained_side_by_side_are_those_trained_alone():
    """In other processes: as many as there are cores, and in the order asked for."""
    good = [Config(hidden=(8,), epochs=2, seed=seed) for seed in range(3)]
    diverging = Config(hidden=(8, 8, 8), epochs=1, batch_size=2, learning_rate=1e9)
    *results, (nothing, reason) = fit_all([*good, diverging], *DIGITS)
    for config, (history, no_reason) in zip(good, results, strict=True):
        *_, alone = fit(config, *DIGITS)
        assert no_reason == ""
        assert [epoch.number for epoch in history] == [1, 2]
        for one, other in zip(history[-1].model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    assert nothing == []
    assert "learning rate 1e+09" in reason


def test_error_of_a_network_trained_beside_others_is_raised():
    def spoil(images):
        raise RuntimeError("a mistake in the transform")

    with pytest.raises(RuntimeError, match="a mistake in the transform"):
        fit_all([FIVE, FIVE], *DIGITS, spoil)


def test_trial_of_a_killed_worker_is_made_up_for_without_waiting(storage, scripted):
    scripted(lambda config: 0.9)
    killed = open_study(*DIGITS, storage, suggest_rate)
    suggest_rate(killed.ask())  # and never told
    study = search(2, storage, suggest=suggest_rate)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE", "COMPLETE"]
    assert len({trial.params["learning_rate"] for trial in study.trials}) == 3
    assert len(list_runs(study)) == 2


def test_whatever_changes_the_question_starts_its_own_study(storage):
    train, validation = DIGITS
    spoilt = Digits(train.images, (train.labels + 1) % 10, train.name)
    relabelled = Digits(validation.images, (validation.labels + 1) % 10, validation.name)

    def suggest_wider(trial):
        return replace(FIVE, learning_rate=trial.suggest_float("learning_rate", 1e-3, 0.2, log=True))

    def suggest_dropout(trial):
        return replace(suggest_rate(trial), dropout=0.1)

    questions = [
        (train, validation, storage, suggest_rate),
        (train, validation, storage, suggest_wider),
        (train, validation, storage, suggest_dropout),
        (train, validation, storage, suggest_rate, 1),
        (spoilt, validation, storage, suggest_rate),
        (train, relabelled, storage, suggest_rate),
        (train[::2], validation, storage, suggest_rate),  # not contiguous in memory
        (train[1::2], validation, storage, suggest_rate),
        (train, validation[::2], storage, suggest_rate),
        (train, Digits(255 - validation.images, validation.labels), storage, suggest_rate),
        (Digits(255 - train.images, train.labels, train.name), validation, storage, suggest_rate),
    ]
    names = [open_study(*question).study_name for question in questions]
    assert len(set(names)) == len(questions)
    copies = [Digits(digits.images.clone(), digits.labels.clone(), digits.name) for digits in DIGITS]
    assert open_study(*copies, storage, suggest_rate).study_name == names[0]


def test_study_on_every_second_digit_runs(storage):
    train, validation = DIGITS
    study = search(1, storage, (train[::2], validation[::2]), suggest=suggest_few)
    assert len(list_results(study)) == 1


@pytest.mark.parametrize("fate", ["poisoned", "absent"])
def test_choice_does_not_depend_on_test_digits(fate, folder, monkeypatch, capsys):
    test = make_toy_digits(50, seed=2)
    poisoned = Digits(test.images, (test.labels + 3) % 10) if fate == "poisoned" else None
    chosen = []
    for name, unseen in ("usual", test), (fate, poisoned):
        monkeypatch.setattr(tuning.data, "load_offline_digits", lambda unseen=unseen: (DIGITS[0], unseen))
        tuning.main(["--data", "offline", "--trials", "2", "--storage", f"sqlite:///{folder}/{name}.db"])
        chosen.append(capsys.readouterr().out.splitlines()[-1])
    assert chosen[0] == chosen[1]
    assert chosen[0].startswith("Config(")
    for function in open_study, run_study:
        assert not any("test" in name for name in inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingError("the loss is not a number"), "the loss is not a number"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "CUDA out of memory"),
        (MemoryError(), "memory"),
    ],
)
def test_what_other_hyperparameters_could_cure_is_a_failed_trial(storage, scripted, error, reason):
    def fail_at_first(config):
        if len(calls) == 1:
            raise error
        return 0.5

    calls = scripted(fail_at_first)
    study = search(2, storage, suggest=suggest_rate)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert reason in study.trials[0].user_attrs["reason"]
    worst = list_runs(study).iloc[-1]
    assert worst["run"] == "trial 0"
    assert math.isnan(worst["accuracy"])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("seed must be a whole number"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        TypeError("unexpected keyword"),
    ],
)
def test_any_other_error_ends_the_study_with_its_reason(storage, scripted, error):
    def fail(config):
        raise error

    calls = scripted(fail)
    with pytest.raises(type(error), match=str(error)):
        search(3, storage, suggest=suggest_rate)
    assert len(calls) == 1
    (trial,) = open_study(*DIGITS, storage, suggest_rate).trials
    assert trial.state == TrialState.FAIL  # not left as one that is still running


def test_five_failures_in_a_row_end_the_study_with_their_reason(storage, scripted):
    def fail(config):
        if len(calls) != 5:  # the fifth works, and the count starts anew
            raise TrainingError(f"not a number, call {len(calls)}")
        return 0.5

    calls = scripted(fail)
    with pytest.raises(StudyError, match=r"5 trials in a row failed, .* not a number, call 10"):
        search(3, storage, suggest=suggest_rate)
    assert len(calls) == 4 + 1 + 5


def test_no_validation_digits_end_the_study(storage):
    with pytest.raises(ValueError, match="nan"):
        search(2, storage, (DIGITS[0], DIGITS[1][:0]), suggest=suggest_few)


def test_diverging_training_never_wins(storage):
    def suggest(trial):
        rate = trial.suggest_categorical("learning_rate", [1e-3, 1e9])
        return Config(hidden=(16, 16, 16), batch_size=8, epochs=1, learning_rate=rate)

    study = search(3, storage, suggest=suggest)
    runs = list_runs(study)
    for trial in study.trials:
        assert (trial.state == TrialState.FAIL) == (trial.params["learning_rate"] == 1e9)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "FAIL"}
    assert best_config(study).learning_rate == 1e-3
    assert list(runs["accuracy"].isna()) == sorted(runs["accuracy"].isna())  # they come last


def test_every_hyperparameter_of_the_search_reaches_the_training(storage, scripted):
    calls = scripted(lambda config: 0.9)
    study = search(8, storage)
    for name in ("learning_rate", "batch_size", "epochs", "hidden"):
        assert len({getattr(config, name) for config in calls}) > 1, name
    for trial, config in zip(study.trials, calls, strict=True):
        width, depth = trial.params["width"], trial.params["depth"]
        assert config.hidden == (width,) * depth
        for name in trial.params.keys() - {"depth", "width"}:
            assert getattr(config, name) == trial.params[name]
        assert (config.batch_norm, config.optimizer, config.one_cycle) == (True, "adamw", True)


def test_study_without_hidden_layers_runs(storage, scripted):
    scripted(lambda config: 0.9)

    def suggest(trial):
        return replace(suggest_rate(trial), hidden=())

    study = search(2, storage, suggest=suggest)
    assert list(list_runs(study)["hidden"]) == ["none", "none"]


def test_seed_that_makes_no_sense_is_refused_at_once():
    with pytest.raises(ValueError, match=r"seed must be .* got -1"):
        open_study(*DIGITS, seed=-1)


def test_own_runs_do_not_count_and_are_never_the_choice(folder, scripted):
    scripted(lambda config: 1 - config.learning_rate)
    alone = search(10, f"sqlite:///{folder}/alone.db")
    study = search(4, f"sqlite:///{folder}/study.db")
    record_run(study, Config(), make_history(0.9999))
    study = search(8, f"sqlite:///{folder}/study.db")
    record_run(study, Config(hidden=(3, 2)), make_history(0.9999))
    study = search(10, f"sqlite:///{folder}/study.db")
    assert get_facts(study)[:4] == get_facts(alone)[:4]
    assert len(list_runs(study)) == 12
    assert best_config(study).learning_rate < 0.01  # the tuner's own choice, never the reader's


def make_extremes() -> list[Config]:
    """What `Config` accepts of the very small, the very large, every choice, and the odd shapes."""
    numbers = [0, 1e-12, 1e-6, 0.5, 0.99, 1, 2, 7, 10**6, 10**9, 2**32 - 1, False, True]
    values = [*numbers, *ACTIVATIONS, *OPTIMIZERS, (), (1,), (300, 7, 40), (1000,) * 8, [5]]
    configs = []
    for field in fields(Config):
        for value in values:
            with suppress(ValueError):
                configs.append(Config(**{field.name: value}))
    return list(dict.fromkeys(configs))


@pytest.mark.parametrize("kept", ["file", "memory"])
def test_whatever_config_accepts_is_kept_listed_ranked_and_drawn(kept, folder, scripted):
    scripted(lambda config: 0.9)
    storage = f"sqlite:///{folder}/study.db" if kept == "file" else None
    study = optuna.create_study(direction="maximize") if kept == "memory" else search(2, storage)
    extremes = make_extremes()
    assert len(extremes) > 50
    for place, config in enumerate(extremes):
        record_run(
            study, config, make_history(0.5 + place / 1000, epochs=1, seconds=10.0**place if place < 9 else 0)
        )
        assert f"mine {len(study.trials) - 1}" in set(list_runs(study)["run"])
    if storage:
        study = search(3, storage)  # another session goes on
        assert best_config(study).batch_norm
    runs = list_runs(study)
    assert len(runs) == len(extremes) + (3 if storage else 0)
    own = [trial.user_attrs["config"] for trial in study.trials if "own" in trial.user_attrs]
    assert [Config(**config) for config in own] == extremes
    assert "none" in set(runs["hidden"])
    assert "300-7-40" in runs.to_string()
    assert "300-7-40" in runs._repr_html_()


@pytest.mark.parametrize("history", [[], make_history(math.nan)])
def test_run_without_an_accuracy_is_not_recorded(history, storage):
    study = open_study(*DIGITS, storage, suggest_rate)
    with pytest.raises(ValueError, match=r"nothing to record: .* validation"):
        record_run(study, FIVE, history)
    assert study.trials == []


def test_real_training_without_validation_digits_is_not_recorded(storage):
    study = open_study(*DIGITS, storage, suggest_rate)
    with pytest.raises(ValueError, match="validation"):
        record_run(study, FIVE, list(fit(replace(FIVE, epochs=1), DIGITS[0])))


@pytest.fixture
def study(storage, scripted) -> optuna.Study:
    """Five trials with 90%, 91%, ... 94%, and one between that failed."""

    def train(config):
        if len(calls) == 4:
            raise TrainingError("not a number")
        return 0.895 + 0.01 * len(calls) - (0.01 if len(calls) > 4 else 0)

    calls = scripted(train)
    return search(5, storage, suggest=suggest_rate)


def test_own_runs_are_ranked_among_all_and_survive_a_restart(study, storage):
    config = replace(FIVE, hidden=(8, 4), learning_rate=0.25)
    record_run(study, config, make_history(0.92))
    assert list(list_runs(study)["run"]).index("mine 6") == 3  # the fourth
    reopened = open_study(*DIGITS, storage, suggest_rate)
    assert list_runs(reopened).equals(list_runs(study))
    record_run(reopened, config, make_history(0.99))
    assert list_runs(study)["run"][1] == "mine 7"
    assert list_runs(study).iloc[0]["run"] == "mine 7"
    record_run(study, replace(config, epochs=300), make_history(0.99, epochs=3))  # stopped early
    assert dict(zip(list_runs(study)["run"], list_runs(study)["epochs"], strict=True))["mine 8"] == 3


def test_table_is_short_and_best_first(study, storage):
    record_run(study, Config(learning_rate=0.00123456), make_history(0.931, seconds=2.04))
    runs = list_runs(study)
    assert list(runs["accuracy"])[:-1] == [0.945, 0.935, 0.931, 0.925, 0.915, 0.905]
    assert math.isnan(runs["accuracy"].iloc[-1])
    assert list(runs.index) == [1, 2, 3, 4, 5, 6, 7]
    mine = ["mine 6", 0.931, 10.2, 5, 64, 0.00123456, "256-128"]
    assert list(runs.loc[3]) == mine
    lines = runs.to_string().splitlines()
    assert lines[0].split() == tuning.COLUMNS
    assert lines[3].split() == [
        "3",
        "mine",
        "6",
        "0.931",
        "10.2",
        "5",
        "64",
        "0.001235",
        "256-128",
    ]
    assert max(map(len, lines)) < 80
    assert list_runs(open_study(*DIGITS, storage, suggest_few)).empty


def test_study_that_has_just_begun(storage):
    study = open_study(*DIGITS, storage)
    with pytest.raises(ValueError, match="no result yet"):
        best_config(study)


@pytest.mark.parametrize(
    "name", ["Deep%20Learning", "{course}", "what?", "my course", "c#", "四", "a+b&c=d;@:"]
)
def test_folders_of_any_name(name, project, scripted, monkeypatch):
    scripted(lambda config: 0.9)
    folder = project / name
    folder.mkdir()
    monkeypatch.setattr(tuning, "PROJECT_ROOT", folder)
    search(1, None, suggest=suggest_rate)
    assert len(search(2, None, suggest=suggest_rate).trials) == 2
    assert [path.name for path in folder.rglob("*.db")] == ["study.db"]
    assert list(project.iterdir()) == [folder]  # nothing elsewhere


def test_read_only_project_keeps_the_runs_in_memory(project, scripted, monkeypatch):
    scripted(lambda config: 0.9)
    monkeypatch.setattr(tuning.os, "access", lambda path, mode: False)
    study = search(2, None, suggest=suggest_rate)
    record_run(study, FIVE, make_history(0.95))
    assert len(list_runs(study)) == 3
    assert not (project / "runs").exists()


def damage(file: Path) -> None:
    file.write_bytes(b"no database" * 100)


def make_older(file: Path) -> None:
    """As a version of Optuna leaves it that this one cannot read."""
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    database.close()


@pytest.mark.parametrize(("harm", "reason"), [(damage, "not a database"), (make_older, "version")])
def test_study_file_that_cannot_be_read_is_named(harm, reason, project, capsys, monkeypatch):
    monkeypatch.setattr(tuning.time, "sleep", lambda seconds: None)
    file = project / "runs" / "study.db"
    open_study(*DIGITS)
    harm(file)
    with pytest.raises(StudyError, match=f"{file}: .*{reason}") as raised:
        open_study(*DIGITS)
    assert "\n" not in str(raised.value)
    assert "$" not in str(raised.value)
    with pytest.raises(SystemExit):
        tuning.main(["--data", "offline"])
    assert str(file) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("nonsense", ["nonsense", "parse"]),
        ("sqlite:////nowhere/at/all/study.db", ["/nowhere/at/all/study.db", "unable to open"]),
        ("cobol://host/study", ["cobol://host/study"]),
        ("postgresql+psycopg://tuner:secret@127.0.0.1:1/mnist", ["tuner:***@127.0.0.1", "refused"]),
        ("postgresql+psycopg://tuner@127.0.0.1:1/mnist", ["//tuner@127.0.0.1:1/mnist", "refused"]),
    ],
)
def test_storage_that_cannot_be_opened_gets_one_line(storage, words, capsys, monkeypatch):
    monkeypatch.setattr(tuning.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ending:
        tuning.main(["--data", "offline", "--storage", storage])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "secret" not in error
    for word in words:
        assert word in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed must be"),
        (["--trials", "0"], "no result yet"),
        (["--trials", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_command_line_gets_one_line(arguments, message, storage, capsys):
    with pytest.raises(SystemExit) as ending:
        tuning.main(["--data", "offline", "--storage", storage, *arguments])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_command_tells_how_far_it_is(storage, scripted, capfd):
    scripted(lambda config: 0.8 + config.learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.main(["--data", "offline", "--storage", storage, "--trials", "2"])
    assert torch.get_num_threads() == 1  # the other cores are for other workers
    out, error = capfd.readouterr()
    device, *progress, choice = out.splitlines()
    assert device.startswith("offline digits on cpu: ")
    assert [line.split(" trials")[0] for line in progress] == ["0 of 2", "1 of 2", "2 of 2"]
    best = load(storage).best_trial
    assert progress[-1].endswith(f"best {best.value:.2%}")
    assert choice == str(Config(**best.user_attrs["config"]))
    assert error == ""  # nothing of Optuna's


def test_stopped_command_says_how_to_go_on(storage, scripted):
    def stop(config):
        raise KeyboardInterrupt

    scripted(stop)
    with pytest.raises(SystemExit, match="Start again to go on"):
        tuning.main(["--data", "offline", "--storage", storage])


def test_two_processes_share_one_sqlite_study(storage, folder):
    door = sqlite3.connect(folder / "study.db", isolation_level=None, check_same_thread=False)
    door.execute("BEGIN EXCLUSIVE")
    arguments = ["--data", "offline", "--trials", "5", "--storage", storage]
    command = [sys.executable, "-m", "mnist_helpers.tuning", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=PROJECT_ROOT, **pipes) as worker:
        assert "offline digits on" in worker.stdout.readline()
        opening = threading.Timer(1, door.close)  # both make the tables at the same moment
        opening.start()
        tuning.main(arguments)
        opening.join()
        output, _ = worker.communicate(timeout=300)
    assert worker.returncode == 0, output
    results = list_results(load(storage))
    assert len(results) in (5, 6)  # both may have been at the last one
    assert len({str(trial.params) for trial in results}) == len(results)  # none was done twice
