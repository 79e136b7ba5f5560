"""Every figure of the notebook: each function takes numbers or pictures and returns a `Figure`."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from torch import Tensor

BLUE, ORANGE, GREEN, PINK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
)  # Okabe and Ito: safe for colour-blind eyes
GREY = "#999999"
ERROR_TICKS = [0.9, 0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.007, 0.005, 0.002, 0.001]
COLOURS = [BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "legend.frameon": False,
    "figure.facecolor": "white",  # legible on a dark page too
}


class NotebookFigure(Figure):
    """A figure that shows itself as the last line of a notebook's cell."""

    def _repr_png_(self) -> tuple[bytes, dict]:
        return render_png(self), {"alt": describe_figure(self)}


def render_png(figure: Figure) -> bytes:
    """The figure as a PNG of 128 colours: it looks the same, and keeps notebooks a third of the size."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def describe_figure(figure: Figure) -> str:
    """Alternative text for those who do not see the figure: its titles, and what its axes show."""
    parts, pictures = [figure.get_suptitle()], 0
    for ax in figure.axes:
        if ax.axison:
            parts += [ax.get_title(), " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
        pictures += not ax.axison and bool(ax.images)
    parts.append(f"{pictures} pictures" if pictures else "")
    return "; ".join(dict.fromkeys(" ".join(part.split()) for part in parts if part))


def make_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 3.4), **options):
    """An empty figure in the notebook's style, and its axes (an array where there are several)."""
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=size, dpi=100, layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def plot_digits(
    images: Tensor, captions: Sequence | None = None, title: str = "", columns: int = 10
) -> Figure:
    """Pictures `[N, 28, 28]` in rows, dark ink on light paper, each with its caption above."""
    rows = max(1, -(-len(images) // columns))
    height = 1.0 if captions is None else 1.22
    figure, axes = make_axes(rows, columns, (9, rows * height + 0.4), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for place, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        show_picture(ax, image)
        if captions is not None:
            ax.set_title(captions[place], fontsize=10, loc="center", pad=3)
    figure.suptitle(title, fontsize=12)
    return figure


def show_picture(ax, image: Tensor, **options) -> None:
    """One picture `[28, 28]`, its pixels unsmoothed, without axes."""
    ax.imshow(np.asarray(image), cmap="gray_r", interpolation="nearest", **options)
    ax.axis("off")


def plot_signed(values: Tensor, captions: Sequence | None, title: str, columns: int = 10) -> Figure:
    """Pictures `[N, 28, 28]` of values above zero (red) and below (blue), each on its own scale."""
    rows = max(1, -(-len(values) // columns))
    height = 0.95 if captions is None else 1.2
    figure, axes = make_axes(rows, columns, (9, rows * height + 0.4), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for place, (ax, value) in enumerate(zip(axes.flat, np.asarray(values), strict=False)):
        largest = np.abs(value).max()
        ax.imshow(value, cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        if captions is not None:
            ax.set_title(captions[place], fontsize=10, pad=3)
    figure.suptitle(title, fontsize=12)
    return figure


def plot_classes(counts: Sequence[int], means: Tensor, title: str) -> Figure:
    """How many pictures `[10]` there are of each digit, above the mean picture `[10, 28, 28]` of each."""
    figure, axes = make_axes(2, 10, (9, 3.6), height_ratios=[2, 1])
    for ax in axes[0]:
        ax.remove()
    ax = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    ax.bar(range(10), counts, color=BLUE)
    ax.bar_label(ax.containers[0], fmt="{:,.0f}", fontsize=9)
    ax.set(title=title, xticks=range(10), ylabel="pictures", xlim=(-0.5, 9.5), ylim=(0, 1.12 * max(counts)))
    ax.grid(axis="x", visible=False)
    for ax, mean in zip(axes[1], means, strict=True):
        show_picture(ax, mean)
    return figure


def plot_pixels(values: Mapping[str, Tensor], title: str) -> Figure:
    """Histograms of pixel values, one panel for each stage of the preprocessing."""
    figure, axes = make_axes(1, len(values), (9, 2.9), sharey=True, squeeze=False)
    for ax, (name, pixels) in zip(axes[0], values.items(), strict=True):
        ax.hist(np.asarray(pixels).ravel(), bins=50, color=BLUE, log=True)
        ax.axvline(float(pixels.float().mean()), color=ORANGE, label="mean")
        ax.set(title=name, xlabel="pixel value")
    axes[0, 0].set_ylabel("pixels (log scale)")
    axes[0, -1].legend()
    figure.suptitle(title, fontsize=12)
    return figure


def plot_lines(
    x: Sequence, lines: Mapping[str, Sequence], title: str, xlabel: str, ylabel: str, spread=False, **axis
) -> Figure:
    """Named lines over common `x`; `axis` goes to `ax.set` (scales, limits).

    With `spread`, accuracies stand on an axis that shows 98% and 99% far apart.
    """
    figure, ax = make_axes()
    for name, y in lines.items():
        ax.plot(x, np.subtract(1, y) if spread else y, "o-", label=name, markersize=4)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, **axis)
    if spread:
        spread_accuracies(ax, [accuracy for y in lines.values() for accuracy in y])
    elif "accuracy" in ylabel:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    elif ax.get_yscale() == "log":
        label_losses(ax)
    if len(lines) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_history(history: Sequence, total: int, title: str) -> Figure:
    """Loss and, where there is a validation split, accuracy after each of `total` epochs of `fit`."""
    validated = not history or history[0].validation_loss == history[0].validation_loss  # not nan
    figure, axes = make_axes(1, 2 if validated else 1, (9, 3.1), squeeze=False)
    numbers, left, right = [epoch.number for epoch in history], axes[0, 0], axes[0, -1]
    left.plot(numbers, [epoch.train_loss for epoch in history], ".-", label="training", color=ORANGE)
    if validated:
        left.plot(numbers, [epoch.validation_loss for epoch in history], ".-", label="validation", color=BLUE)
        accuracies = [epoch.validation_accuracy for epoch in history]
        right.plot(numbers, [1 - accuracy for accuracy in accuracies], ".-", color=BLUE)
        right.set_ylabel("validation accuracy")
        spread_accuracies(right, accuracies)
    left.set(ylabel="mean loss (nats)", yscale="log")
    label_losses(left)
    left.legend()
    for ax in axes[0]:
        ax.set(xlabel="epoch", xlim=(0.5, max(total, 2) + 0.5))
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


def plot_confusion(matrix: np.ndarray, accuracies: Sequence[float], title: str) -> Figure:
    """Counts `[10, 10]` of true (row) against predicted digit, and the accuracy `[10]` of each true digit."""
    figure, (left, right) = make_axes(1, 2, (9, 4.2), width_ratios=[1.25, 1])
    errors = matrix - np.diag(np.diag(matrix))
    left.imshow(errors, cmap="Oranges")
    for row, column in np.argwhere(matrix):
        diagonal = row == column
        left.text(
            column,
            row,
            matrix[row, column],
            ha="center",
            va="center",
            fontsize=9,
            color=GREY if diagonal else "k",
        )
    left.set(title=title, xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    left.grid(visible=False)
    right.barh(range(10), accuracies, color=BLUE)
    right.bar_label(
        right.containers[0], fmt="{:.2%}", label_type="edge", padding=-44, color="white", fontsize=9
    )
    right.set(title="accuracy per digit", yticks=range(10), xlim=(min(accuracies) - 0.02, 1))
    right.invert_yaxis()
    right.xaxis.set_major_locator(MaxNLocator(4))
    right.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_calibration(result, title: str) -> Figure:
    """Is it right as often as it says? And how sure is it when right, and when wrong? (an `Evaluation`)"""
    figure, (left, right) = make_axes(1, 2, (9, 3.2))
    stated, true = (part.tolist() for part in result.calibration)
    left.plot([0, 1], [0, 1], color=GREY, label="perfectly calibrated")
    left.plot(stated, true, "o", color=BLUE, label="a twentieth of the digits each")
    low = min(*stated, *true) - 0.02
    left.set(title=title, xlabel="stated probability", ylabel="fraction right", xlim=(low, 1.01))
    left.set_ylim(low, 1.01)
    left.legend()
    answers = [result.confidence[result.right].numpy(), result.confidence[~result.right].numpy()]
    right.hist(answers, bins=20, log=True, label=["right", "wrong"], color=[BLUE, ORANGE])
    right.set(title="how sure it is, right and wrong", xlabel="stated probability")
    right.set_ylabel("digits (log scale)")
    right.legend()
    return figure
