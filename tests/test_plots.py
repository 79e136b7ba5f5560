"""The figures: what they say is what was given, whether or not there is a screen."""

import math
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import make_toy_digits
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from mnist_helpers import plots
from mnist_helpers.training import Epoch


def make_history(count: int, validated: bool = True) -> list[Epoch]:
    return [
        Epoch(
            number=number,
            train_loss=1 / number,
            validation_loss=1.5 / number if validated else math.nan,
            validation_accuracy=1 - 0.1 / number if validated else math.nan,
            learning_rate=1e-3,
            seconds=1.0,
            model=nn.Identity(),
        )
        for number in range(1, count + 1)
    ]


IMAGES = make_toy_digits(13).images
FIGURES = {  # every function once, with what the notebook gives it
    "plot_digits": lambda: plots.plot_digits(IMAGES, range(13), "T"),
    "plot_lines": lambda: plots.plot_lines([1, 2], {"a": [3, 4]}, "T", "x", "y"),
    "plot_history": lambda: plots.plot_history(make_history(3), 5, "T"),
}


def titles(figure: Figure) -> list[str]:
    """What stands above the figure and its panels."""
    texts = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    return [text for text in texts if text]


def line_of(ax, name: str) -> tuple[list, list]:
    (line,) = [line for line in ax.lines if line.get_label() == name]
    return list(line.get_xdata()), list(line.get_ydata())


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def labels_of(ax) -> list[str]:
    ax.figure.canvas.draw()
    return [label.get_text() for label in ax.yaxis.get_ticklabels(which="both")]


def test_every_function_of_the_module_is_tested_here():
    assert {name for name in vars(plots) if name.startswith("plot_")} == set(FIGURES)


@pytest.mark.parametrize("style", ["default", "dark_background"])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_in_its_own_style_beside_that_of_the_reader(name, style):
    with plt.style.context(style):
        before = dict(mpl.rcParams)
        figure = FIGURES[name]()
        picture, metadata = figure._repr_png_()
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []  # no window hangs on it
    assert isinstance(figure, Figure)
    assert picture.startswith(b"\x89PNG")
    assert "T" in metadata["alt"].split("; ")
    assert figure.get_facecolor() == (1, 1, 1, 1)
    for ax in figure.axes:
        legend = ax.get_legend().get_texts() if ax.get_legend() else []
        for text in (ax.title, ax.xaxis.label, *ax.get_xticklabels(), *figure.texts, *legend):
            assert sum(mpl.colors.to_rgb(text.get_color())) < 1.5  # dark on white
    assert figure.get_figwidth() <= 9.5  # fits the page


def test_needs_no_display(monkeypatch):
    """Without pyplot, which looks for one."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now fails
    monkeypatch.delattr(mpl, "pyplot")
    assert plots.render_png(plots.plot_digits(IMAGES[:2])).startswith(b"\x89PNG")


def test_png_looks_the_same_in_few_colours(tmp_path):
    figure = FIGURES["plot_lines"]()
    (tmp_path / "ours.png").write_bytes(plots.render_png(figure))
    with plt.style.context(["default", plots.STYLE]):
        figure.savefig(tmp_path / "plain.png")
    with Image.open(tmp_path / "ours.png") as ours, Image.open(tmp_path / "plain.png") as plain:
        assert (ours.mode, ours.size) == ("P", plain.size)
        difference = np.subtract(ours.convert("RGB"), plain.convert("RGB"), dtype=float)
    assert np.abs(difference).mean() < 1
    assert (tmp_path / "ours.png").stat().st_size < 0.7 * (tmp_path / "plain.png").stat().st_size


@pytest.mark.parametrize(("count", "columns", "cells"), [(13, 10, 20), (4, 2, 4), (1, 10, 10), (0, 10, 10)])
def test_plot_digits(count, columns, cells):
    figure = plots.plot_digits(IMAGES[:count], [f"no. {n}" for n in range(count)], "Digits", columns)
    assert len(figure.axes) == cells
    drawn = [image.get_array() for ax in figure.axes for image in ax.images]
    assert len(drawn) == count
    assert all(np.array_equal(*pair) for pair in zip(drawn, IMAGES.numpy(), strict=False))
    assert titles(figure) == ["Digits", *(f"no. {n}" for n in range(count))]
    assert not any(ax.axison for ax in figure.axes)  # no frames, neither around the places left over
    for ax in figure.axes[:count]:
        (image,) = ax.images
        assert image.to_rgba(np.array([[0.0, 255.0]]))[0, :, 0].tolist() == [1, 0]  # dark ink, light paper
        assert image.get_interpolation() == "nearest"


def test_captions_and_options_of_images():
    assert titles(plots.plot_digits(IMAGES, title="Only this")) == ["Only this"]
    assert titles(plots.plot_digits(IMAGES[:3], torch.tensor([7, 0, 4]).tolist())) == ["7", "0", "4"]
    (image,) = plots.plot_digits(IMAGES[:1], cmap="coolwarm", vmin=-1).axes[0].images
    assert (image.get_cmap().name, image.get_clim()[0]) == ("coolwarm", -1)


def test_plot_lines():
    lines = {"slow": [3, 2, 1], "fast": torch.tensor([2.5, 1.5, 0.5])}
    figure = plots.plot_lines([1, 10, 100], lines, "Lines", "rate", "loss", xscale="log", ylim=(0, 4))
    (ax,) = figure.axes
    for name, y in lines.items():
        assert line_of(ax, name) == ([1, 10, 100], pytest.approx([float(value) for value in y]))
    assert legend_of(ax) == ["slow", "fast"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Lines", "rate", "loss")
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylim()) == ("log", "linear", (0, 4))
    assert len({line.get_color() for line in ax.lines}) == 2


def test_plot_lines_on_an_axis_that_is_there():
    figure, (left, right) = plots.make_axes(1, 2)
    assert plots.plot_lines([1, 2], {"one": [3.0, 4.0]}, "T", "step", "loss", ax=right) is figure
    assert (len(left.lines), len(right.lines)) == (0, 1)
    assert right.get_legend() is None  # a single line needs none
    assert not any("%" in label for label in labels_of(right))


def test_losses_are_labelled_with_plain_numbers():
    labels = labels_of(plots.plot_lines([1, 2], {"a": [2.0, 0.05]}, "T", "x", "loss", yscale="log").axes[0])
    assert {"0.05", "0.1", "0.2", "0.5", "1", "2"} <= set(labels)
    assert not {"0.3", "0.07"} & set(labels)


def test_accuracies_stand_where_they_belong_and_far_apart():
    """The axis is one of errors in disguise: its labels must name accuracies, the best on top."""
    lines = {"a": [0.9, 0.99, 0.999]}
    (ax,) = plots.plot_lines([1, 2, 3], lines, "T", "x", "validation accuracy").axes
    assert line_of(ax, "a")[1] == pytest.approx([0.1, 0.01, 0.001])
    labels = labels_of(ax)
    for accuracy, name in [(0.9, "90%"), (0.99, "99%"), (0.999, "99.9%")]:
        assert ax.get_yticks()[labels.index(name)] == pytest.approx(1 - accuracy)
        assert ax.get_ylim()[1] < 1 - accuracy < ax.get_ylim()[0]  # within sight
    heights = ax.transData.transform([(1, 0.1), (2, 0.01), (3, 0.001)])[:, 1]
    assert np.diff(heights) == pytest.approx(np.diff(heights)[0])  # ten times fewer errors: an equal step up
    assert heights[0] < heights[2]
    assert ax.get_yaxis().get_major_formatter()(0.015, 0) == "98.5%"
    assert "" not in labels  # no minor ticks without a name


def test_plot_history():
    figure = plots.plot_history(make_history(4), 6, "History")
    left, right = figure.axes
    epochs = [1, 2, 3, 4]
    assert line_of(left, "training") == (epochs, pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]))
    assert line_of(left, "validation") == (epochs, pytest.approx([1.5, 1.5 / 2, 1.5 / 3, 1.5 / 4]))
    assert legend_of(left) == ["validation", "training"]
    (line,) = right.lines
    assert list(line.get_xdata()) == epochs
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4])
    assert right.get_ylim()[0] > right.get_ylim()[1]  # small errors on top
    assert right.get_yscale() == left.get_yscale() == "log"
    assert "5e-01" not in labels_of(left)
    assert "0.5" in labels_of(left)
    assert titles(figure) == ["History"]
    assert "loss" in left.get_ylabel()
    assert "accuracy" in right.get_ylabel()
    for ax in figure.axes:
        assert ax.get_xlabel() == "epoch"
        assert ax.get_xlim() == (0.5, 6.5)  # room for all that is to come
        assert all(tick == round(tick) for tick in ax.get_xticks())


def test_plot_history_without_validation_digits():
    (ax,) = plots.plot_history(make_history(2, validated=False), 2, "T").axes
    assert [line.get_label() for line in ax.lines] == ["training"]
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    "history", [[], make_history(1), [Epoch(1, 1e-9, 1e-9, 1.0, 1e-3, 1.0, nn.Identity())]]
)
def test_plot_history_of_a_training_just_begun_or_perfect(history):
    """No error at all has no place on a logarithmic axis, and is drawn all the same."""
    figure = plots.plot_history(history, 1, "T")
    figure.canvas.draw()  # with warnings being errors
    assert all(0 < limit <= 1.2 for limit in figure.axes[1].get_ylim())
    assert figure.axes[0].get_xlim() == (0.5, 2.5)


def test_alternative_text_names_titles_and_axes_once():
    figure, axes = plots.make_axes(1, 3)
    figure.suptitle("Three panels")
    axes[2].axis("off")
    for ax in axes:
        ax.set(title="Left\nand right", xlabel="epoch", ylabel="loss")
    axes[0].set_ylabel("")
    assert plots.describe_figure(figure) == "Three panels; Left and right; epoch; loss against epoch"
