"""The figures of the notebook: each function takes numbers or images and returns a `Figure`."""

import io
from collections.abc import Sequence

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

# Colours by Okabe and Ito: safe for colour-blind eyes
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
ERROR_TICKS = [0.9, 0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.007, 0.005, 0.002, 0.001]
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000"]),
    "legend.frameon": False,
    "figure.facecolor": "white",  # legible on a dark page too
}
in_style = matplotlib.style.context(["default", STYLE])  # whatever style the reader has chosen elsewhere


class NotebookFigure(Figure):
    """A figure that shows itself as the last line of a notebook's cell."""

    def _repr_png_(self) -> tuple[bytes, dict]:
        return render_png(self), {"alt": describe_figure(self)}


@in_style
def render_png(figure: Figure) -> bytes:
    """The figure as a PNG of 128 colours: it looks the same, and keeps notebooks a third of the size."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def describe_figure(figure: Figure) -> str:
    """Alternative text for those who do not see the figure: its titles, and what its axes show."""
    parts = [figure.get_suptitle()]
    for ax in figure.axes:
        if ax.axison:
            parts += [ax.get_title(), " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))


@in_style
def make_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.4), **options):
    """An empty figure in the notebook's style, and its axes (an array where there are several)."""
    figure = NotebookFigure(figsize=size, dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def show_image(ax, image: Tensor, **options) -> None:
    """One image `[28, 28]`, its pixels unsmoothed, dark ink on light paper, without axes."""
    ax.imshow(np.asarray(image.cpu()), **{"cmap": "gray_r", "interpolation": "nearest"} | options)
    ax.axis("off")


@in_style
def plot_digits(images: Tensor, captions=None, title="", columns=10, **options) -> Figure:
    """Images `[N, 28, 28]` in rows, each with its caption above; `options` go to `imshow`."""
    rows = max(1, -(-len(images) // columns))
    height = 1.0 if captions is None else 1.22
    figure, axes = make_axes(rows, columns, (9, rows * height + 0.4), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for place, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        show_image(ax, image, **options)
        if captions is not None:
            ax.set_title(captions[place], fontsize=10, pad=3)
    figure.suptitle(title, fontsize=12)
    return figure


@in_style
def plot_lines(x: Sequence, lines: dict, title: str, xlabel: str, ylabel: str, ax=None, **axis) -> Figure:
    """Named lines over common `x`, on `ax` if given; accuracies are spread, and `axis` goes to `ax.set`."""
    ax = make_axes()[1] if ax is None else ax
    accuracies = "accuracy" in ylabel
    for name, y in lines.items():
        ax.plot(x, np.subtract(1, y) if accuracies else y, "o-", label=name, markersize=4)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis)
    if accuracies:
        spread_accuracies(ax, [accuracy for y in lines.values() for accuracy in y])
    elif ax.get_yscale() == "log":
        label_losses(ax)
    if len(lines) > 1:
        ax.legend()
    return ax.figure


@in_style
def plot_history(history: Sequence, total: int, title: str) -> Figure:
    """Loss and, where there is a validation split, accuracy after each of `total` epochs of `fit`."""
    numbers = [epoch.number for epoch in history]
    losses = {"training": [epoch.train_loss for epoch in history]}
    validated = not history or history[0].validation_loss == history[0].validation_loss  # not nan
    figure, axes = make_axes(1, 1 + validated, (9, 3.1), squeeze=False)
    if validated:
        losses = {"validation": [epoch.validation_loss for epoch in history]} | losses
        accuracies = {"": [epoch.validation_accuracy for epoch in history]}
        plot_lines(numbers, accuracies, "", "epoch", "validation accuracy", axes[0, 1])
    plot_lines(numbers, losses, "", "epoch", "mean loss (nats)", axes[0, 0], yscale="log")
    for ax in axes[0]:
        ax.set_xlim(0.5, max(total, 2) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=12)
    return figure


def label_losses(ax) -> None:
    """Plain numbers on a log scale, at 1, 2 and 5 times the powers of ten: 0.05, not 5 x 10^-2."""
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter(lambda loss, _: f"{loss:g}" if f"{loss:.0e}"[0] in "125" else "")


def spread_accuracies(ax, accuracies: Sequence[float]) -> None:
    """Turn an axis of errors into one of accuracies, best on top, on which 98% and 99% are far apart."""
    errors = [max(1 - accuracy, 0.001) for accuracy in accuracies] or [0.5, 0.01]
    ax.set_ylim(max(errors) * 1.2, min(errors) / 1.2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator(ERROR_TICKS))
    ax.yaxis.set_major_formatter(lambda error, _: f"{100 - 100 * error:.4g}%")
    ax.yaxis.set_minor_locator(NullLocator())
