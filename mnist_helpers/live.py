"""Progress while something trains in the notebook, and what stays of it in the saved file."""

import base64
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from math import isnan

from IPython import get_ipython
from IPython.display import Markdown, display
from optuna import Study

from mnist_helpers.plots import plot_history, render_png
from mnist_helpers.training import Epoch
from mnist_helpers.tuning import list_results


def watch(epochs: Iterator[Epoch], total: int, title: str = "Training") -> Iterator[Epoch]:
    """Hand on every record of `fit`, drawing the curves; the stop button keeps the last complete epoch."""

    def show(history: list[Epoch], seconds: float, ending: str | None) -> dict:
        done, length, text = len(history), total, f"{title}: {len(history)}/{total} epochs"
        if history and ending is None:
            text += f", {seconds / done * (total - done):.0f} s left"
        elif history:
            accuracy, length = history[-1].validation_accuracy, done
            right = "" if isnan(accuracy) else f"{accuracy:.2%} of the validation digits right after "
            text = f"{title}: {right}{done} epochs in {seconds:.0f} s{ending}"
        picture = base64.b64encode(render_png(plot_history(history, length, text))).decode()
        if ending is None:
            page = f'<progress value="{done}" max="{total}"></progress><br>'
            return {"text/html": f'{page}<img src="data:image/png;base64,{picture}">', "text/plain": text}
        step = -(-done // 12)  # a long training is saved as a dozen lines
        rows = [epoch for epoch in history if epoch.number in (1, 2, 3, done) or epoch.number % step == 0]
        return {"image/png": picture, "text/plain": "\n".join([text, *map(describe_epoch, rows)])}

    return follow(epochs, show, "the model of the last complete epoch is kept")


def watch_study(studies: Iterator[Study], total: int) -> Iterator[Study]:
    """Hand on the study after each trial of `run_study`, with a line on how far it is and the best so far."""

    def show(seen: list[Study], seconds: float, ending: str | None) -> dict:
        results = list_results(seen[-1]) if seen else []
        text = f"{len(results)}/{total} trials in {seconds:.0f} s{ending or ''}"
        if ending is None and len(seen) > 1:  # the first comes before any trial
            text += f", {seconds / (len(seen) - 1) * (total - len(results)):.0f} s left"
        if results:
            best = max(results, key=lambda trial: trial.value)
            text += f"; the best so far: trial {best.number} with {best.value:.2%}"
        bar = f'<progress value="{len(results)}" max="{total}"></progress> {text}'
        return {"text/plain": text} | ({"text/html": bar} if ending is None else {})

    return follow(studies, show, "all finished trials are kept")


def follow(items: Iterator, show: Callable, kept: str) -> Iterator:
    """Hand on the items, and display `show(items so far, seconds, ending)`, for about 3% of the time."""
    # `ending` is None until the end. Outside a notebook nothing is displayed.
    seen, ending, start, shown, cost = [], "", time.perf_counter(), 0.0, 0.0
    place = display(show(seen, 0, None), raw=True, display_id=True) if get_ipython() else None
    try:
        for item in items:
            seen.append(item)
            now = time.perf_counter()
            if place and now - shown > 35 * cost:
                place.update(show(seen, now - start, None), raw=True)
                shown = time.perf_counter()
                cost = shown - now
            yield item
    except KeyboardInterrupt:
        if not seen:
            raise
        ending = f", stopped: {kept}"
    finally:
        if place and seen:
            bundle = show(seen, time.perf_counter() - start, ending)
            alternative = {"alt": bundle["text/plain"].splitlines()[0]}
            place.update(bundle, raw=True, metadata={"image/png": alternative})


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
