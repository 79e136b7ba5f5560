"""What moves in the notebook while training runs, and what stays of it in the saved file."""

import base64
import inspect
import time
from collections.abc import Iterator, Sequence
from math import isnan

from IPython import get_ipython
from IPython.display import Markdown, display
from optuna import Study

from mnist_helpers.plots import plot_history, render_png
from mnist_helpers.runs import list_runs
from mnist_helpers.training import Epoch


def watch(epochs: Iterator[Epoch], total: int, title: str = "Training") -> Iterator[Epoch]:
    """Hand on every record of `fit`, drawing the curves so far; at most 3% of the time goes into drawing.

    The stop button ends the loop after the last complete epoch, whose record (and model) stays usable.
    """
    history, started, drawn, cost = [], time.perf_counter(), 0.0, 0.0
    handle = _open_display(_show_progress(history, total, title, 0))
    note = ""
    try:
        for epoch in epochs:
            history.append(epoch)
            now = time.perf_counter()
            if handle is not None and now - drawn > 35 * cost:
                handle.update(_show_progress(history, total, title, now - started), raw=True)
                drawn = time.perf_counter()
                cost = drawn - now
            yield epoch
    except KeyboardInterrupt:
        if not history:
            raise
        note = f", stopped: the model of epoch {len(history)} is kept"
    finally:
        if handle is not None and history:
            bundle = _show_result(history, title, time.perf_counter() - started, note)
            alternative = {"alt": bundle["text/plain"].splitlines()[0] + ": the losses after each epoch"}
            handle.update(bundle, raw=True, metadata={"image/png": alternative})


def watch_study(studies: Iterator[Study], total: int) -> Iterator[Study]:
    """Hand on the study after each trial of `run_study`, with a line on how far it is and the best so far."""
    started, before = time.perf_counter(), None
    handle = _open_display({"text/plain": "The study starts"})
    try:
        for study in studies:
            listed = list_runs(study)
            done = sum(run.name.startswith("trial") for run in listed)
            before = done if before is None else before
            seconds = time.perf_counter() - started
            left = f", {seconds / (done - before) * (total - done):.0f} s left" if done > before else ""
            best = (
                f"{listed[0].name}, {listed[0].accuracy:.2%}"
                if listed and listed[0].accuracies
                else "none yet"
            )
            line = (
                f"{done}/{total} trials in {seconds:.0f} s{left if done < total else ''}; best so far: {best}"
            )
            bar = f'<progress value="{done}" max="{total}"></progress> {line}'
            if handle is not None:
                handle.update({"text/html": bar, "text/plain": line}, raw=True)
            yield study
    except KeyboardInterrupt:
        if before is None:
            raise
        line += "; stopped: all finished trials are kept"
    finally:
        if handle is not None and before is not None:
            handle.update({"text/plain": line}, raw=True)


def describe_epoch(epoch: Epoch) -> str:
    """One line of numbers."""
    line = f"epoch {epoch.number:>3}   {epoch.seconds:.1f} s   training loss {epoch.train_loss:.4f}"
    if isnan(epoch.validation_loss):
        return line
    return f"{line}   validation loss {epoch.validation_loss:.4f}, accuracy {epoch.validation_accuracy:.2%}"


def show_source(*objects) -> Markdown:
    """The code of functions or classes of the package, as one coloured block."""
    return Markdown("```python\n" + "\n\n".join(inspect.getsource(item) for item in objects) + "```")


def show_table(heading: Sequence, *rows: Sequence) -> Markdown:
    """Rows of text and numbers as a Markdown table, which every viewer of notebooks can show."""
    lines = [heading, ["---"] * len(heading), *rows]
    return Markdown(
        "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
    )


def _open_display(bundle: dict):
    """A place in the notebook that can be updated, or None outside of one."""
    return display(bundle, raw=True, display_id=True) if get_ipython() else None


def _show_progress(history: list[Epoch], total: int, title: str, seconds: float) -> dict:
    done = len(history)
    left = f"{seconds / done * (total - done):.0f} s left" if done else "first epoch"
    line = describe_epoch(history[-1]) if history else "starting"
    image = base64.b64encode(render_png(plot_history(history, total, title))).decode()
    html = (
        f'<progress value="{done}" max="{total}"></progress> {done}/{total} epochs, {left}'
        f'<pre style="margin:4px 0">{line}</pre>'
        f'<img alt="training curves" src="data:image/png;base64,{image}">'
    )
    return {"text/html": html, "text/plain": f"{title}: {done}/{total} epochs, {left}"}


def _show_result(history: list[Epoch], title: str, seconds: float, note: str) -> dict:
    last, epochs = history[-1], f"{len(history)} epochs in {seconds:.0f} s{note}"
    if isnan(last.validation_accuracy):
        result = f"{title}: {epochs}"
    else:
        result = f"{title}: {last.validation_accuracy:.2%} of the validation digits right after {epochs}"
    figure = plot_history(history, len(history), result)
    table = "\n".join([result, *map(describe_epoch, history)])
    return {"image/png": base64.b64encode(render_png(figure)).decode(), "text/plain": table}
