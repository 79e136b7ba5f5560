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
from matplotlib.ticker import FixedLocator, LogLocator
from PIL import Image
from scipy.special import expit, logit
from tabulate import tabulate
from torch import Tensor
from torchvision.utils import make_grid

from mnist_helpers.data import IMAGE_SIZE

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
    "lines.marker": "o",
    "lines.markersize": 3,
    "legend.frameon": False,
    "image.cmap": "gray_r",  # dark ink on light paper
    "image.interpolation": "nearest",
}
# Decorates each function that draws: the reader's own style changes nothing.
in_style = matplotlib.style.context(["default", STYLE])
# The pages that nbconvert writes would show code in a proportional font.
CODE_STYLE = "font: 12px/1.4 monospace; white-space: pre; overflow-x: auto"
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
    images: Tensor, captions: list = (), title: str = "", columns: int = 10, **options
) -> Figure:
    """Images `[N, 28, 28]` in rows, below their captions; `options` go to `imshow`."""
    gap = 7 if captions else 2  # pixels
    step = gap + IMAGE_SIZE
    rows = math.ceil(len(images) / columns) or 1
    figure, ax = make_axes(size=(9, 9 * rows / columns + 0.3))
    for index, caption in enumerate(captions[: len(images)]):
        row, column = divmod(index, columns)
        middle = column * step + gap + IMAGE_SIZE / 2
        ax.text(middle, row * step + gap - 1, caption, ha="center")
    if len(images):
        page = make_grid(images[:, None].float(), columns, gap)[0]  # of three channels
        ax.imshow(page.numpy(force=True), **options)
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
    figure, _ = make_axes(1, 1 + validated, (9, 3.1))
    left, *right = figure.axes
    if validated:
        losses["validation"] = table.validation_loss
        line = {"": table.validation_accuracy}
        plot_lines(table.number, line, "", "epoch", "validation accuracy", right[0])
        set_accuracy_scale(right[0])
    plot_lines(table.number, losses, "", "epoch", "mean loss (nats), log scale", left)
    set_loss_scale(left)
    for ax in figure.axes:
        ax.set_xlim(0, total + 0.5)
        ax.locator_params("x", integer=True)
    figure.suptitle(title, wrap=True)
    return figure


def set_loss_scale(ax) -> None:
    """A log scale with plain numbers at 1, 2 and 5 times the powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5), numticks=5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")


def set_accuracy_scale(ax) -> None:
    """Spread the y axis of what is drawn: 90%, 99% and 99.9% are about evenly spaced.

    The data stay fractions. The axis reaches from a tick below the lowest of them to
    the one at or above the highest.
    """

    def stretch(accuracy):  # matplotlib's own `logit` has no place for 0 and 1
        return logit(np.clip(accuracy, 0.04, 0.9998))

    panels = ax.get_shared_y_axes().get_siblings(ax)
    limits = np.clip([panel.dataLim.intervaly for panel in panels], 0.01, 1)
    first, last = np.searchsorted(ACCURACY_TICKS, [limits.min(), limits.max()])
    ticks = ACCURACY_TICKS[first - 1 : last + 1]
    ax.set_yscale("function", functions=(stretch, expit))
    ax.set_ylim(ticks[0], ticks[-1])
    ax.yaxis.set_major_locator(FixedLocator(ticks, 8))  # no room for more labels
    ax.yaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}%")


def show_source(*objects) -> None:
    """Show the coloured code of functions, classes or modules."""
    code = "\n\n".join(inspect.getsource(item) for item in objects)
    page = pygments.formatters.HtmlFormatter(prestyles=CODE_STYLE)
    html = pygments.highlight(code, pygments.lexers.PythonLexer(), page)
    display({"text/plain": code, "text/html": html}, raw=True)


def show_table(heading: list, *rows: list) -> None:
    """Show rows of text and numbers; a text may hold links, as Markdown writes them."""
    text = tabulate(rows, heading, "pipe", disable_numparse=True)
    display({"text/plain": text, "text/markdown": text}, raw=True)
