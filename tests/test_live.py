"""Progress: every record kept, little time spent, stops that end well, what stays."""

import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import nbclient
import nbformat
import pytest

from mnist_helpers import live
from mnist_helpers.data import PROJECT_ROOT
from mnist_helpers.live import watch
from mnist_helpers.training import Epoch


class Screen:
    """A notebook's output, and the only clock there is: an epoch takes a second."""

    def __init__(self, shown):
        self.shown = shown
        self.lines = []
        self.clock, self.drawing = 100.0, 0.0

    @property
    def texts(self):
        return [output["data"]["text/plain"] for output in self.shown]

    def plot(self, history, total, title):
        self.clock += self.drawing
        return SimpleNamespace(_repr_png_=lambda: title.encode())

    def train(self, count, end=None):
        for number in range(1, count + 1):
            self.clock += 1
            yield Epoch(number, number / 4, 0.25, 0.9)
        if end:
            raise end


@pytest.fixture
def screen(shown, monkeypatch):
    screen = Screen(shown)
    clock = SimpleNamespace(perf_counter=lambda: screen.clock)
    monkeypatch.setattr(live, "time", clock)
    monkeypatch.setattr(live, "plot_history", screen.plot)
    monkeypatch.setattr(live, "write_to_terminal", screen.lines.append)
    return screen


def test_progress_and_summary(screen):
    assert watch(screen.train(3), 3, "Mine") == list(screen.train(3))
    headings = [text.split("\n")[0] for text in screen.texts]
    assert headings == [
        "Mine",
        "Mine: 1 of 3 epochs, 2 s left",
        "Mine: 2 of 3 epochs, 1 s left",
        "Mine: 3 of 3 epochs, 0 s left",
        "Mine: 3 of 3 epochs in 3 s",
    ]
    assert screen.lines == headings[1:]
    for update, heading in zip(screen.shown[1:], screen.lines, strict=True):
        assert update["update"]
        assert update["data"]["image/png"] == heading.encode()
    _, names, _, second, _ = screen.texts[-1].split("\n")
    fields = "number train_loss validation_loss validation_accuracy"
    assert names.split() == fields.split()
    assert [float(word) for word in second.split()] == [1, 2, 0.5, 0.25, 0.9]


def test_a_dozen_lines_stay_of_a_long_training(screen):
    watch(screen.train(220), 220)
    assert len(screen.texts[-1].split("\n")) < 16
    assert screen.texts[0] == "Training"


def test_drawing_takes_a_few_percent_of_the_time(screen):
    screen.drawing = 0.5
    watch(screen.train(1000), 1000)
    drawn = 0.5 * len(screen.texts)
    assert 0.025 * screen.clock < drawn < 0.04 * screen.clock


def test_a_stop_keeps_the_complete_epochs(screen):
    assert len(watch(screen.train(23, KeyboardInterrupt()), 170, "Final")) == 23
    assert screen.texts[-1].startswith(
        "Final: stopped after 23 of 170 epochs; "
        "the network of the last complete epoch is kept\n"
    )
    with pytest.raises(KeyboardInterrupt):
        watch(screen.train(0, KeyboardInterrupt()), 170)


def test_a_stop_while_the_curve_is_drawn_loses_no_record(screen, monkeypatch):
    figure = screen.plot([], 5, "Mine")
    for last in (figure, KeyboardInterrupt):
        draw = mock.Mock(side_effect=[figure, KeyboardInterrupt, last])
        monkeypatch.setattr(live, "plot_history", draw)
        assert len(watch(screen.train(5), 5)) == 2
        assert draw.call_count == 3  # the last is tried once more


def test_outside_a_notebook_the_text_is_printed():
    lines = [
        "from mnist_helpers.live import *",
        "watch(iter([Epoch(1, 0.5, 0.2, 0.9)]), 1, 'Mine')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    printed = subprocess.check_output(command, cwd=PROJECT_ROOT, text=True)
    assert "Mine: 1 of 1 epochs in" in printed


def test_the_line_in_the_terminal(monkeypatch, tmp_path):
    terminal = tmp_path / "tty"
    process = mock.Mock()
    monkeypatch.setattr(live.psutil, "Process", process)
    parent = process.return_value.parent
    ways = [terminal, None, tmp_path, live.psutil.NoSuchProcess(1)]
    parent.return_value.terminal.side_effect = ways
    for _ in ways:
        live.write_to_terminal("Mine: 1 of 3 epochs")
    assert terminal.read_bytes() == b"\rMine: 1 of 3 epochs".ljust(80)
    parent.return_value = None
    live.write_to_terminal("x")


def test_stops_in_a_real_kernel():
    """One line, and an error for "Run All"; the cells after it run as usual."""
    sources = [
        "import os, time\nfrom mnist_helpers.live import *\nshorten_stops()",
        f"os.kill(os.getpid(), {int(signal.SIGINT)}); time.sleep(9)",
        "watch(iter([Epoch(1, 0.5, 0.2, 0.9)]), 1, 'Mine')[0]",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder = {"metadata": {"path": PROJECT_ROOT}}
    client = nbclient.NotebookClient(notebook, resources=folder)
    with client.setup_kernel():
        client.execute_cell(cells[0], 0)
        with pytest.raises(nbclient.exceptions.CellExecutionError):
            client.execute_cell(cells[1], 1)
        client.execute_cell(cells[2], 2)
    (line,) = cells[1].outputs
    assert line.text == "Stopped: run this cell again before you go on.\n"
    picture, result = cells[2].outputs
    assert picture.data["text/plain"].startswith("Mine: 1 of 1 epochs in")
    assert picture.data["image/png"].startswith("iVBOR")
    assert result.data["text/plain"].startswith("Epoch(number=1, train_loss=0.5")
