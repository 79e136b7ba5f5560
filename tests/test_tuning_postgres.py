"""Three workers on one PostgreSQL study, one of them killed: nothing is lost, nothing is done twice."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mnist_helpers.tuning import list_results, main

psycopg = pytest.importorskip("psycopg", reason="psycopg, which talks to PostgreSQL, is not installed")

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
N_TRIALS = 6


@pytest.fixture
def server():
    """The URL of an empty database of a server of its own, which is gone after the test."""
    if not SERVERS:
        pytest.skip("the PostgreSQL server (Debian's package postgresql) is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="study-"))  # not tmp_path, which only its owner may enter
    user = []
    if os.geteuid() == 0:  # the server refuses to be run by root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    programs, cluster = SERVERS[-1].parent, folder / "cluster"
    options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    initdb = [programs / "initdb", "-D", cluster, "-U", "tuner", "--auth=trust", "--no-sync"]
    subprocess.run([*user, *initdb], check=True, capture_output=True, cwd=folder)
    log = (folder / "log").open("w")
    process = subprocess.Popen([*user, SERVERS[-1], "-D", cluster, *options], stderr=log, cwd=folder)
    try:
        wait_until(lambda: answers(port), f"the server does not answer, see {folder}/log")
        yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGQUIT)  # at once, without waiting for clients
        process.wait(timeout=30)
        log.close()
        shutil.rmtree(folder)


def answers(port: int) -> bool:
    with suppress(psycopg.OperationalError):
        psycopg.connect(f"host=127.0.0.1 port={port} user=tuner dbname=postgres").close()
        return True
    return False


def wait_until(condition, complaint: str, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)
    return found


def open_study(storage: str) -> optuna.Study | None:
    """The only study there, if it is there already."""
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[0], storage=storage) if names else None


def list_running(study: optuna.Study) -> list[int]:
    return [trial.number for trial in study.get_trials(states=[TrialState.RUNNING])]


def kill_in_the_middle(worker, study: optuna.Study) -> None:
    """Kill one of three workers while it trains: three trials are running, one in the hands of each."""

    def try_to_catch():
        if len(list_running(study)) < 3:
            return False
        os.kill(worker.pid, signal.SIGSTOP)  # look again while it cannot go on
        if len(list_running(study)) == 3:
            worker.kill()
            return True
        os.kill(worker.pid, signal.SIGCONT)
        return False

    wait_until(try_to_catch, "there were never three trials at once")
    worker.join(timeout=30)


def test_three_workers_share_a_study_and_one_is_killed(server):
    optuna.storages.RDBStorage(server)  # makes the tables
    context = multiprocessing.get_context("forkserver")  # loads torch once, not three times
    context.set_forkserver_preload(["mnist_helpers.tuning", "sklearn.datasets"])
    arguments = ["--data", "offline", "--trials", str(N_TRIALS), "--storage", server]
    workers = [context.Process(target=main, args=(arguments,)) for _ in range(3)]
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    try:
        with psycopg.connect(server.replace("+psycopg", "")) as door:
            door.execute("LOCK TABLE trials, studies, version_info")  # nobody gets in before all are there
            for worker in workers:
                worker.start()
            wait_until(lambda: door.execute(waiting).fetchone()[0] == 3, "the workers never came")
        victim, *survivors = workers
        study = wait_until(lambda: open_study(server), "no worker has opened the study")
        kill_in_the_middle(victim, study)
        for worker in survivors:
            worker.join(timeout=300)
        assert [worker.exitcode for worker in survivors] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()

    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len(list_running(study)) == 1  # that of the killed worker: it is not counted, but made up for
    results = list_results(study)
    assert len(results) in (N_TRIALS, N_TRIALS + 1)  # both may have been at the last one
    assert len(results) == len(trials) - 1
    assert len({str(trial.params) for trial in trials}) == len(trials)  # nothing was done twice
