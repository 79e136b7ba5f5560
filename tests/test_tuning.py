"""The study: reproducible, shared, honest about failures, kept whatever happens."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import optuna
import pytest
import torch
from conftest import make_toy_digits
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from mnist_helpers import data, training, tuning
from mnist_helpers.training import Config, Epoch, TrainingError
from mnist_helpers.tuning import (
    BASE,
    StudyError,
    count_missing,
    find_storage,
    list_runs,
    open_study,
    record_run,
    suggest_config,
)

TOY = make_toy_digits(24)
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
WORKER = """
import sys, time, torch
from mnist_helpers import data, training, tuning

def score(*arguments):
    print("training", flush=True)
    time.sleep(float(sys.argv[1]))
    return 0.5

digits = data.Digits(torch.zeros(24, 28, 28).byte(), torch.zeros(24).long())
data.load_mnist = lambda: (digits, digits)
training.choose_device = lambda: ("cpu", "")
training.score_config = score
print("ready", flush=True)
sys.stdin.read()  # until the gate is opened
tuning.main(sys.argv[2:])
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project in a folder of an odd name, and toy digits for MNIST."""
    folder = tmp_path / "a%20b {c}#d?e=四&f@g:h"
    folder.mkdir()
    monkeypatch.setattr(data, "PROJECT_ROOT", folder)
    monkeypatch.setattr(data, "load_mnist", lambda: (TOY, TOY))
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def score():
    """Stands in for trainings: its `side_effect` is what they give or raise."""
    with mock.patch.object(training, "score_config") as score:
        yield score


def make_history(accuracy, epochs=2):
    return [Epoch(1, 0.1, 0.1, accuracy)] * epochs


def test_search_space():
    """What 4.2 tells, within these bounds; all else is the base's."""
    study = optuna.create_study()
    base = Config(dropout=0.1, seed=5)
    for _ in range(3):
        trial = study.ask()
        config = suggest_config(trial, base)
        found = trial.params
        hidden = (found.pop("width"),) * found.pop("depth")
        found["learning_rate"] = round(found["learning_rate"], 4)  # easy to read
        assert config == replace(base, hidden=hidden, **found)
    assert trial.distributions == {
        "width": IntDistribution(64, 256, log=True),
        "depth": IntDistribution(1, 2),
        "learning_rate": FloatDistribution(1e-3, 3e-3, log=True),
        "batch_size": CategoricalDistribution([256, 512]),
        "epochs": IntDistribution(2, 4),
    }


def search(seed, count=9):
    study = open_study(TOY, BASE, None, seed)

    def objective(trial):
        suggest_config(trial, BASE)
        return trial.params["learning_rate"]

    study.optimize(objective, count)
    # It prints nothing, not even of a trial that fails.
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    return study


def test_a_seed_repeats_the_search():
    study = search(0)
    rates = [trial.value for trial in study.trials]
    assert [trial.value for trial in search(0).trials] == rates
    assert search(1).trials[0].value != rates[0]
    other = search(None, 1)  # a worker among others: they try different things
    assert other.trials[0].value != search(None, 1).trials[0].value
    assert other.sampler._constant_liar
    assert study.best_value == max(rates)
    assert study.sampler._n_startup_trials == 6  # as the notebook says


def test_a_study_that_goes_on_draws_new_trials(project):
    for _ in range(2):
        study = open_study(TOY, BASE, find_storage(), seed=0)
        study.optimize(lambda trial: suggest_config(trial, BASE).learning_rate, 2)
    assert len({str(trial.params) for trial in study.trials}) == 4


def test_digits_number_and_fixed_hyperparameters_make_a_study(project):
    storage = find_storage()
    searched = replace(BASE, hidden=(), learning_rate=1.0, batch_size=2, epochs=9)
    kinds = [
        (TOY, BASE),
        (TOY, searched),
        (TOY, replace(BASE, dropout=0.5)),
        (TOY[:20], BASE),
        (replace(TOY, name="others"), BASE),
    ]
    names = [open_study(*kind, storage).study_name for kind in kinds]
    fixed = "batch_norm=True, optimizer=adamw, one_cycle=True, weight_decay=0.2"
    assert names[:2] == [f"toy digits, 24, {fixed}"] * 2
    assert len(set(names)) == len(optuna.get_all_study_names(storage)) == 4
    assert (project / "runs/study.db").exists()


def test_own_foreign_and_failed_runs_are_rows(project):
    study = open_study(TOY, BASE, find_storage())

    def objective(trial):
        suggest_config(trial, BASE)
        raise TrainingError

    study.optimize(objective, 1, catch=TrainingError)
    foreign = {"config": {"x": 1}, "width": "big"}
    study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs=foreign))
    mine = Config((300, 7), epochs=9, dropout=0.25, seed=3)
    record_run(study, mine, make_history(0.1234))
    record_run(study, replace(BASE, hidden=()), make_history(0.2, epochs=1))
    study.ask()  # still running
    assert (count_missing(study, 5), count_missing(study, 2)) == (2, 0)

    runs = list_runs(study, BASE)
    assert list(runs["run"]) == ["trial 1", "mine 3", "mine 2", "trial 0"]
    assert list(runs["accuracy"].dropna()) == [0.5, 0.2, 0.1234]
    assert list(runs.loc[2])[2:] == [
        1e-3,
        64,
        2,
        [300, 7],
        "batch_norm=False, dropout=0.25, optimizer=adam, one_cycle=False, "
        "weight_decay=0.0, seed=3",
    ]
    assert list(runs.loc[1])[5:] == [[], ""]
    assert runs["also"][0] == "x=1"
    own = study.trials[3]
    assert Config(**own.user_attrs["config"]) == replace(BASE, hidden=(), epochs=1)
    with pytest.raises(ValueError, match="NaN"):
        record_run(study, mine, make_history(float("nan")))


def test_the_best_of_equal_runs_is_the_first():
    study = open_study(TOY, BASE, None)
    for number in range(30):
        record_run(study, BASE, make_history(number % 2))
    best = [f"mine {number}" for number in range(1, 30, 2)]
    assert list(list_runs(study, BASE)["run"])[:15] == best


def test_own_runs_within_the_ranges_teach_optuna():
    study = search(0)
    values = {"learning_rate": 0.002, "batch_size": 512, "epochs": 3}
    inside = replace(BASE, hidden=(99, 99), **values)
    record_run(study, inside, make_history(0.7, epochs=3))
    own = study.trials[-1]
    assert own.params == values | {"width": 99, "depth": 2}
    assert own.distributions == study.trials[0].distributions
    for change in ({"hidden": (99, 98)}, {"batch_size": 300}, {"learning_rate": 0.01}):
        record_run(study, replace(inside, **change), make_history(0.7, epochs=3))
        assert study.trials[-1].params == {}


def test_folder_that_cannot_be_written(project, score, capsys):
    score.return_value = 0.5
    with mock.patch.object(Path, "touch", side_effect=PermissionError):
        assert find_storage() is None
        tuning.main(["--trials", "1"])
    assert "runs are lost" in capsys.readouterr().out
    (project / "runs").rmdir()
    (project / "runs").write_text("a file")
    assert find_storage() is None


def test_locked_file_is_named_soon(project):
    storage = find_storage()
    file = project / "runs/study.db"
    start = time.monotonic()
    with sqlite3.connect(file, isolation_level=None) as door:
        door.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StudyError, match=r"/runs/study.db: .* is locked"):
            open_study(TOY, BASE, storage)
    door.close()
    assert time.monotonic() - start < 20
    assert open_study(TOY, BASE, storage).trials == []


def test_database_in_the_making_is_waited_for():
    study = optuna.create_study()
    answers = [OSError, OSError, OSError, study]
    with mock.patch.object(optuna, "create_study", side_effect=answers):
        assert open_study(TOY, BASE, None) is study


def test_storage_that_cannot_be_opened_gets_one_line(project, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "PATIENCE", 0)
    for storage, words in (
        ("nonsense:secret@host", "the study: Could not parse"),
        ("sqlite:////nowhere/study.db", "/nowhere/study.db: unable to open"),
        ("postgresql+psycopg://me:se/c:secret@127.0.0.1:1/db", "me:***@127.0.0.1:1/db"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tuning.main(["--storage", storage])
        *_, line = capsys.readouterr().err.splitlines()
        assert words in line
        assert "secret" not in line


def test_worker_counts_results_and_lives_through_failures(project, score, capsys):
    study = open_study(TOY[:22], BASE, find_storage())
    record_run(study, BASE, make_history(0.4))
    score.side_effect = [0.1, TrainingError, 0.3, 0.2]
    for _ in range(3):  # the second time makes up for the failure, the third is idle
        tuning.main(["--trials", "3"])
    assert capsys.readouterr().out.count("trial 1 ") == 3  # the table of all runs
    assert [trial.value for trial in study.trials] == [0.4, 0.1, None, 0.3]
    score.side_effect = TrainingError
    tuning.main(["--trials", "5"])
    assert len(study.trials) == 6  # it gives up
    _, train, validation = score.call_args.args
    assert (len(train), len(validation)) == (22, 2)
    assert torch.get_num_threads() == 1  # a worker for each core


def test_other_errors_end_the_study(project, score):
    for error in (RuntimeError, KeyboardInterrupt):
        score.side_effect = error
        with pytest.raises(error):
            tuning.main(["--trials", "9"])


@pytest.fixture
def server():
    """The URL of an empty PostgreSQL database, which is gone after the test."""
    pytest.importorskip("psycopg")
    if not SERVERS:
        pytest.skip("the PostgreSQL server is not installed")
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which only its owner may enter
    user = []
    if os.geteuid() == 0:  # the server refuses to be run by root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    control = [*user, SERVERS[-1], "--silent", "-D", folder / "cluster"]

    def run(*command):
        subprocess.run([*control, *command], check=True, cwd=folder)

    run("init", "-o", "-U me -A trust")
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    run("start", "-l", folder / "log", "-o", options)
    yield f"postgresql+psycopg://me@/postgres?host={folder}"
    run("stop", "-m", "immediate")
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["a file", "a server"])
def test_workers_share_a_study_and_one_is_killed(kind, tmp_path, request):
    """All find the database empty; what the killed one had in hand is made up for."""
    storage = f"sqlite:///{tmp_path}/study.db"
    if kind == "a server":
        storage = request.getfixturevalue("server")
    options = ["--trials", "6", "--storage", storage]
    waiting, gate = os.pipe()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, pause, *options],
            stdin=waiting,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(tuning.__file__).parents[1],
        )
        for pause in ("600", "0.2", "0.2")
    ]
    try:
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        os.close(gate)
        victim, *others = workers
        assert victim.stdout.readline() == "training\n"
        victim.kill()
        for worker in others:
            _, errors = worker.communicate(timeout=200)
            assert worker.returncode == 0, errors
            assert "finished with value: 0.5 and" in errors
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    trials = open_study(replace(TOY[:22], name="MNIST"), BASE, storage).trials
    states = [trial.state.name for trial in trials]
    assert states.count("RUNNING") == 1
    assert states.count("COMPLETE") == len(states) - 1
    assert len(states) in (7, 8)  # both may have been at the last one
    assert len({str(trial.params) for trial in trials}) == len(trials)
