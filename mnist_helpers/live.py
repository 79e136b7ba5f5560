"""Progress while a network trains in the notebook, and what stays of it in the file."""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
from IPython import get_ipython
from IPython.display import DisplayHandle

from mnist_helpers.plots import plot_history
from mnist_helpers.training import Epoch, TrainingError


def watch(epochs: Iterator[Epoch], total: int, title: str = "Training") -> list[Epoch]:
    """Train to the end of `epochs` while the curves of loss and accuracy grow.

    Returns the records. A stop keeps those of the complete epochs; before there is one,
    it raises `KeyboardInterrupt`. `TrainingError` is shown and raised.
    Outside a notebook nothing is shown.
    """
    history = []
    view = DisplayHandle()
    if get_ipython():
        view.display({"text/plain": title}, raw=True)

    def draw(text: str) -> None:
        if get_ipython():
            picture = plot_history(history, total, text)._repr_png_()
            report = text
            step = len(history) // 13 + 1  # a dozen lines of a long training
            for epoch in reversed(history[::-step]):
                about = f"epoch {epoch.number:>3}   {epoch.seconds:.1f} s"
                report += f"\n{about}   {describe_losses(epoch)}"
            bundle = {"image/png": picture, "text/plain": report}
            view.update(bundle, raw=True)
            write_to_terminal(text)

    start = time.perf_counter()
    due = 0.0
    try:
        draw(f"{title}: 0 of {total} epochs")
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
        text = f"{title}: {len(history)} epochs in {seconds:.0f} s; "
        draw(text + describe_losses(history[-1]))
    except TrainingError as error:
        draw(f"{title}, epoch {len(history) + 1}: {error}")
        raise
    except KeyboardInterrupt:
        if not history:
            raise
        with suppress(KeyboardInterrupt):  # a second one, while this is drawn
            draw(
                f"{title}: stopped after {len(history)} of {total} epochs; "
                "the network of the last complete epoch is kept"
            )
    return history


def describe_losses(epoch: Epoch) -> str:
    """The numbers of an epoch, without those of validation where there are none."""
    text = f"training loss {epoch.train_loss:.4f}"
    if math.isnan(epoch.validation_loss):
        return text
    text += f", validation loss {epoch.validation_loss:.4f}"
    return f"{text}, accuracy {epoch.validation_accuracy:.2%}"


def write_to_terminal(text: str) -> None:
    """Overwrite a line of the terminal that papermill or Jupyter runs in, if any."""
    # The kernel has no terminal of its own, and what it prints belongs to a cell.
    with suppress(OSError, TypeError, AttributeError, psutil.Error):
        path = psutil.Process().parent().terminal()
        Path(path).write_text(f"\r{text:<79}")


def shorten_stops() -> None:
    """From now on a stopped cell ends in one line instead of a traceback."""

    def print_line(*details, **options) -> None:
        print("Stopped: complete epochs and trials are kept.")

    get_ipython().set_custom_exc((KeyboardInterrupt,), print_line)
