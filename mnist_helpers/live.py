"""Progress while a network trains in the notebook, and what stays of it in the file."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
from IPython import get_ipython
from IPython.display import DisplayHandle

from mnist_helpers.plots import plot_history
from mnist_helpers.training import Epoch


def watch(epochs: Iterator[Epoch], total: int, title: str = "Training") -> list[Epoch]:
    """Train to the end of `epochs` while the curves of loss and accuracy grow.

    Returns the records. A stop keeps those of the complete epochs; before there is one,
    it raises `KeyboardInterrupt`.
    """
    history = []
    view = DisplayHandle()
    view.display({"text/plain": title}, raw=True)

    def draw(text: str) -> None:
        picture = plot_history(history, total, text)._repr_png_()
        table = pd.DataFrame(history).dropna(axis=1)
        report = f"{text}\n{table}"
        view.update({"image/png": picture, "text/plain": report}, raw=True)
        write_to_terminal(text)

    start = time.perf_counter()
    due = 0.0
    try:
        for epoch in epochs:
            history.append(epoch)
            now = time.perf_counter()
            if now > due:
                done = len(history)
                left = (now - start) / done * (total - done)
                draw(f"{title}: {done} of {total} epochs, {left:.0f} s left")
                # So drawing takes about 3% of the time.
                due = now + 30 * (time.perf_counter() - now)
        seconds = time.perf_counter() - start
        draw(f"{title}: {len(history)} of {total} epochs in {seconds:.0f} s")
    except KeyboardInterrupt:
        if not history:
            raise
        with suppress(KeyboardInterrupt):  # a second one, while this is drawn
            draw(
                f"{title}: stopped after {len(history)} of {total} epochs; "
                "the network of the last complete epoch is kept"
            )
    return history


def write_to_terminal(text: str) -> None:
    """Overwrite a line of the terminal that papermill or Jupyter runs in, if any."""
    # The kernel has no terminal of its own, and what it prints belongs to a cell.
    with suppress(Exception):  # no such line is worth an error
        path = psutil.Process().parent().terminal()
        Path(path).write_text(f"\r{text:<79}")


def shorten_stops() -> None:
    """From now on a stopped cell ends in one line instead of a traceback."""

    def print_line(*details, **options) -> None:
        print("Stopped: run this cell again before you go on.")

    get_ipython().set_custom_exc((KeyboardInterrupt,), print_line)
