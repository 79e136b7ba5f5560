"""Three workers on one PostgreSQL study, one of them killed: nothing is lost, nothing is done twice."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mnist_helpers.data import PROJECT_ROOT
from mnist_helpers.runs import is_finished

psycopg = pytest.importorskip("psycopg", reason="psycopg, which talks to PostgreSQL, is not installed")

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
N_TRIALS = 15


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


def start_worker(storage: str) -> subprocess.Popen:
    arguments = ["--data", "offline", "--trials", str(N_TRIALS), "--storage", storage, "--heartbeat", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "mnist_helpers.tuning", *arguments],
        cwd=PROJECT_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def open_study(storage: str) -> optuna.Study | None:
    """The only study there, if it is there already."""
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[0], storage=storage) if names else None


def kill_in_the_middle(worker: subprocess.Popen, study: optuna.Study) -> int:
    """Kill the worker while it trains; returns the number of its trial."""

    def find_trial():
        return next((trial for trial in study.get_trials() if is_in_the_hands_of(worker, trial)), None)

    def try_to_catch():
        if find_trial() is None:
            return None
        worker.send_signal(signal.SIGSTOP)  # look again while it cannot go on
        if caught := find_trial():
            worker.kill()
            return caught
        worker.send_signal(signal.SIGCONT)
        return None

    trial = wait_until(try_to_catch, "the worker was never seen with a trial")
    worker.wait(timeout=30)
    return trial.number


def is_in_the_hands_of(worker: subprocess.Popen, trial: optuna.trial.FrozenTrial) -> bool:
    owner = trial.user_attrs.get("worker", "")
    return trial.state == TrialState.RUNNING and owner.endswith(f":{worker.pid}")


def test_three_workers_share_a_study_and_one_is_killed(server):
    optuna.storages.RDBStorage(server)  # makes the tables
    workers = []
    try:
        with psycopg.connect(server.replace("+psycopg", "")) as door:
            door.execute("LOCK TABLE trials, studies, version_info")  # nobody gets in before all are there
            workers += [start_worker(server) for _ in range(3)]
            assert all("to train on" in worker.stdout.readline() for worker in workers)
        victim, *survivors = workers
        study = wait_until(lambda: open_study(server), "no worker has opened the study")
        lost = kill_in_the_middle(victim, study)
        outputs = [worker.communicate(timeout=300)[0] for worker in survivors]
    finally:
        for worker in workers:
            worker.kill()
            worker.stdout.close()
    assert [worker.returncode for worker in survivors] == [0, 0], outputs
    assert all(f"Done: {N_TRIALS} of {N_TRIALS} trials" in output for output in outputs)

    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)
    assert trials[lost].state == TrialState.FAIL  # given up, not counted, and made up for
    done = [trial for trial in trials if is_finished(trial)]
    assert lost not in [trial.number for trial in done]
    assert len(done) == N_TRIALS
    assert len({str(trial.params) for trial in done}) == N_TRIALS
    owners = {trial.user_attrs["worker"].split(":")[1] for trial in done}
    assert owners >= {str(worker.pid) for worker in survivors}
