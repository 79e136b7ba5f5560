"""The figures and tables of the notebook."""

import inspect
import io
import math

import matplotlib.style
import numpy as np
import pandas as pd
import pygments.formatters
import pygments.lexers
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from PIL import Image
from scipy.special import expit, logit
from tabulate import tabulate
from torch import Tensor

# Colours by Okabe and Ito: safe for colour-blind eyes.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PINK, GREY]),
    "lines.markersize": 3,
    "legend.frameon": False,
    "image.cmap": "gray_r",  # dark ink on light paper
    "image.interpolation": "nearest",
}
# Decorates each function that draws: the reader's own style changes nothing.
in_style = matplotlib.style.context(["default", STYLE])
ACCURACY_TICKS = [0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1]


class NotebookFigure(Figure):
    """A figure that a notebook shows as a small PNG."""

    @in_style
    def _repr_png_(self) -> bytes:
        drawn, packed = io.BytesIO(), io.BytesIO()
        self.savefig(drawn)
        # With 128 colours it looks the same, at a third of the size.
        Image.open(drawn).convert("RGB").quantize(128).save(packed, "PNG")
        return packed.getvalue()


@in_style
def make_axes(
    rows: int = 1, columns: int = 1, size: tuple = (9, 3.4), **options
) -> tuple:
    """An empty figure in the notebook's style, and its axes.

    `size` is in inches of 100 pixels; `options` go to `Figure.subplots`.
    Several rows or columns give an array of axes.
    """
    figure = NotebookFigure(figsize=size)
    return figure, figure.subplots(rows, columns, **options)


@in_style
def plot_digits(
    images: Tensor, captions: list = (), title: str = "", **options
) -> Figure:
    """Images `[N, 28, 28]` in rows of ten, below their captions, if there are any.

    `options` go to `imshow`. Without `vmin` and `vmax`, each image has its own greys.
    """
    rows = math.ceil(len(images) / 10) or 1
    figure, ax = make_axes(size=(9, 0.9 * rows + 0.4))
    for index, image in enumerate(images.numpy(force=True)):
        row, column = divmod(index, 10)
        ax.imshow(image, extent=(column, column + 0.9, row + 0.9, row), **options)
        if captions:
            ax.text(column + 0.45, row, captions[index], ha="center", va="center")
    ax.set(xlim=(0, 10), ylim=(rows, -0.2))
    ax.axis("off")
    figure.suptitle(title)
    return figure


@in_style
def plot_lines(
    x,
    lines: dict,
    title: str,
    xlabel: str,
    ylabel: str,
    ax=None,
    **options,
) -> Figure:
    """Named lines over common `x`, in a new figure or on `ax`.

    `options` go to `ax.set`, as in `xscale="log"`.
    """
    if ax is None:
        _, ax = make_axes()
    for name, y in lines.items():
        ax.plot(x, y, marker="o" if len(x) < 60 else "", label=name)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **options)
    if len(lines) > 1:
        ax.legend()
    return ax.figure


@in_style
def plot_history(history: list, total: int, title: str) -> Figure:
    """Losses and validation accuracies of one to `total` epochs of `training.fit`.

    Without validation digits (NaN) the training loss alone is drawn.
    """
    table = pd.DataFrame(history)
    losses = {"training": table.train_loss}
    validated = not table.validation_loss.hasnans
    figure, _ = make_axes(1, 1 + validated, (9, 3.1), sharex=True)
    left, *right = figure.axes
    if validated:
        losses["validation"] = table.validation_loss
        line = {"": table.validation_accuracy}
        plot_lines(table.number, line, "", "epoch", "validation accuracy", right[0])
        set_accuracy_scale(right[0])
    plot_lines(table.number, losses, "", "epoch", "mean loss (nats), log scale", left)
    set_loss_scale(left)
    left.set_xlim(0, total + 0.5)
    left.locator_params("x", integer=True)
    figure.suptitle(title, wrap=True)
    return figure


def set_loss_scale(ax) -> None:
    """A log scale with plain numbers at 1, 2 and 5 times the powers of ten."""
    ax.set_yscale("log", subs=(2, 5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")


def set_accuracy_scale(ax) -> None:
    """Spread the y axis of what is drawn: 90%, 99% and 99.9% are about evenly spaced.

    The data stay fractions. The axis reaches from a tick below the lowest of them to
    the one at or above the highest; around a single value, somewhat further.
    """

    def stretch(accuracy):  # matplotlib's own `logit` has no place for 0 and 1
        return logit(np.clip(accuracy, 0.04, 0.9998))

    ax.margins(y=0)
    limits = np.clip(ax.get_ylim(), 0.01, 1)  # of all panels that share the axis
    first, last = np.searchsorted(ACCURACY_TICKS, limits)
    ticks = ACCURACY_TICKS[first - 1 : last + 1]
    ax.set_yscale("function", functions=(stretch, expit))
    ax.set_ylim(ticks[0], ticks[-1])
    ax.yaxis.set_major_locator(FixedLocator(ticks, 8))  # no room for more labels
    ax.yaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}%")


def show_source(*objects) -> None:
    """Show the coloured code of functions, classes or modules."""
    code = "\n\n".join(inspect.getsource(item) for item in objects)
    # Else the pages that nbconvert writes would show it in a proportional font.
    page = pygments.formatters.HtmlFormatter(
        prestyles="font: 12px/1.4 monospace; white-space: pre; overflow-x: auto"
    )
    html = pygments.highlight(code, pygments.lexers.PythonLexer(), page)
    display({"text/plain": code, "text/html": html}, raw=True)


def show_table(heading: list, *rows: list) -> None:
    """Show rows of text and numbers; a text may hold links, as Markdown writes them."""
    text = tabulate(rows, heading, "pipe", disable_numparse=True)
    display({"text/plain": text, "text/markdown": text}, raw=True)
