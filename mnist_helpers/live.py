"""Progress while a network trains in the notebook, and what stays of it in the saved file."""

import base64
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from math import isnan

from IPython import get_ipython
from IPython.display import DisplayHandle, Markdown

from mnist_helpers.plots import plot_history, render_png
from mnist_helpers.training import Epoch


def watch(epochs: Iterator[Epoch], total: int, title: str = "Training") -> Iterator[Epoch]:
    """Hand on every record of `fit`, drawing the curves; the stop button keeps the last complete epoch."""
    # Drawing takes about 3% of the time. Outside a notebook nothing is displayed.
    history, start, shown, cost, ending = [], time.perf_counter(), 0.0, 0.0, ""
    place = DisplayHandle() if get_ipython() else None

    def draw(length: int, text: str, show: Callable) -> None:
        picture = base64.b64encode(render_png(plot_history(history, length, text))).decode()
        step = -(-len(history) // 12)  # of a long training a dozen lines are kept
        kept = (1, 2, 3, len(history))
        lines = [describe_epoch(e) for e in history if e.number in kept or e.number % step == 0]
        page = {"image/png": picture, "text/plain": "\n".join([text, *lines])}
        show(page, raw=True, metadata={"image/png": {"alt": text}})

    if place:
        draw(total, f"{title}: 0/{total} epochs", place.display)
    try:
        for epoch in epochs:
            history.append(epoch)
            now, done = time.perf_counter(), len(history)
            if place and now - shown > 35 * cost:
                left = (now - start) / done * (total - done)
                draw(total, f"{title}: {done}/{total} epochs, {left:.0f} s left", place.update)
                shown = time.perf_counter()
                cost = shown - now
            yield epoch
    except KeyboardInterrupt:
        if not history:
            raise
        ending = ", stopped: the model of the last complete epoch is kept"
    finally:
        if place and history:
            done, accuracy = len(history), history[-1].validation_accuracy
            right = "" if isnan(accuracy) else f"{accuracy:.2%} of the validation digits right after "
            seconds = time.perf_counter() - start
            draw(done, f"{title}: {right}{done} epochs in {seconds:.0f} s{ending}", place.update)


def describe_epoch(epoch: Epoch) -> str:
    """One line of numbers."""
    line = f"epoch {epoch.number:>3}   {epoch.seconds:.1f} s   training loss {epoch.train_loss:.4f}"
    validation = f"   validation loss {epoch.validation_loss:.4f}, accuracy {epoch.validation_accuracy:.2%}"
    return line if isnan(epoch.validation_loss) else line + validation


def show_source(*objects) -> Markdown:
    """The code of functions or classes of the package, as one coloured block."""
    return Markdown("```python\n" + "\n\n".join(inspect.getsource(item) for item in objects) + "```")


def show_table(heading: Sequence, *rows: Sequence) -> Markdown:
    """Rows of text and numbers as a Markdown table, which every viewer of notebooks can show."""
    lines = [heading, ["---"] * len(heading), *rows]
    cells = [[str(cell).replace("|", "&#124;") for cell in line] for line in lines]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in cells))
