"""The figures: what they say is what was given, whether or not there is a screen."""

import io
import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import nn

from mnist_helpers import plots
from mnist_helpers.evaluation import Evaluation
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


def make_answers(count: int = 2000) -> Evaluation:
    """Of a model that is right exactly as often as it says."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.2 + 0.8 * torch.rand(count, generator=generator)
    probabilities = ((1 - confidence) / 9)[:, None].repeat(1, 10)
    probabilities[torch.arange(count), torch.arange(count) % 10] = confidence
    return judge(probabilities, torch.rand(count, generator=generator) < confidence)


def judge(probabilities: torch.Tensor, right: torch.Tensor) -> Evaluation:
    """The evaluation of a model that says this, and is right where it is said."""
    answers = probabilities.argmax(dim=1)
    return Evaluation(probabilities.log(), torch.where(right, answers, (answers + 1) % 10))


PICTURES = torch.arange(13 * 784, dtype=torch.float32).view(13, 28, 28)
SIGNED = (PICTURES - PICTURES.mean()) * torch.arange(1, 14)[:, None, None]
MATRIX = np.diag(np.arange(90, 100)) + np.eye(10, k=1, dtype=int) * 7
MATRIX[9, 4] = 3
ACCURACIES = (np.diag(MATRIX) / MATRIX.sum(axis=1)).tolist()
PIXELS = {"raw": torch.arange(256, dtype=torch.uint8), "scaled": torch.arange(256) / 255}
FIGURES = {  # every function once, with what the notebook gives it
    "plot_digits": lambda: plots.plot_digits(PICTURES, range(13), "T"),
    "plot_signed": lambda: plots.plot_signed(SIGNED[:10], None, "T"),
    "plot_classes": lambda: plots.plot_classes([1000 + digit for digit in range(10)], PICTURES[:10], "T"),
    "plot_pixels": lambda: plots.plot_pixels(PIXELS, "T"),
    "plot_lines": lambda: plots.plot_lines([1, 2], {"a": [3, 4]}, "T", "x", "y"),
    "plot_history": lambda: plots.plot_history(make_history(3), 5, "T"),
    "plot_confusion": lambda: plots.plot_confusion(MATRIX, ACCURACIES, "T"),
    "plot_calibration": lambda: plots.plot_calibration(make_answers(), "T"),
}


def shown(figure: Figure) -> list[np.ndarray]:
    """The pictures in the figure, in the order drawn."""
    return [image.get_array() for ax in figure.axes for image in ax.images]


def titles(figure: Figure) -> list[str]:
    """What stands above the figure and its panels."""
    texts = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    return [text for text in texts if text]


def legend_of(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line_of(ax, name: str) -> tuple[list, list]:
    (line,) = [line for line in ax.lines if line.get_label() == name]
    return list(line.get_xdata()), list(line.get_ydata())


@pytest.mark.parametrize("name", FIGURES)
def test_returns_a_figure_that_draws_and_opens_none(name):
    before = {key: plt.rcParams[key] for key in plots.STYLE}
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    figure.canvas.draw()  # with warnings being errors: no empty legend, no bad scale, no text that fails
    assert plt.get_fignums() == []
    assert {key: plt.rcParams[key] for key in before} == before  # the reader's own figures keep their style
    assert "T" in titles(figure)
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert figure.get_figwidth() <= 9.5  # fits the page


def test_every_function_of_the_module_is_tested_here():
    assert {name for name in vars(plots) if name.startswith("plot_")} == set(FIGURES)


def test_needs_no_display(monkeypatch):
    """No window hangs on the figure, and where no display is to be had it is saved all the same."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now fails
    figure = plots.plot_digits(PICTURES[:2])
    assert figure.canvas.manager is None
    assert figure.canvas.required_interactive_framework is None
    figure.savefig(file := io.BytesIO())
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(("count", "columns", "cells"), [(13, 10, 20), (4, 2, 4), (1, 10, 10), (10, 10, 10)])
def test_plot_digits(count, columns, cells):
    figure = plots.plot_digits(PICTURES[:count], [f"no. {n}" for n in range(count)], "Digits", columns)
    assert len(figure.axes) == cells
    assert np.array_equal(shown(figure), PICTURES[:count].numpy())
    assert titles(figure) == ["Digits", *(f"no. {n}" for n in range(count))]
    assert not any(ax.axison for ax in figure.axes)  # no frames, neither around the places left over
    for ax in figure.axes[:count]:
        (image,) = ax.images
        ink, paper = image.to_rgba(image.get_array())[-1, -1], image.to_rgba(image.get_array())[0, 0]
        assert ink[:3].sum() < paper[:3].sum()  # much ink is dark
        assert image.get_interpolation() == "nearest"


def test_plot_digits_without_captions():
    assert titles(plots.plot_digits(PICTURES, title="Only this")) == ["Only this"]


def test_numbers_are_fine_as_captions():
    assert titles(plots.plot_digits(PICTURES[:3], torch.tensor([7, 0, 4]).tolist())) == ["7", "0", "4"]


def test_plot_signed():
    figure = plots.plot_signed(SIGNED[[0, 7, 12, 3]], ["a", "b", "c", "d"], "Signed", columns=2)
    assert np.array_equal(shown(figure), SIGNED[[0, 7, 12, 3]].numpy())
    assert titles(figure) == ["Signed", "a", "b", "c", "d"]
    for ax in figure.axes:
        (image,) = ax.images
        largest = np.abs(image.get_array()).max()
        assert image.get_clim() == pytest.approx((-largest, largest))  # zero is white, each on its own scale
        red, _, blue, _ = image.to_rgba(np.array([[largest, -largest]]))[0].T
        assert red[0] > blue[0]
        assert blue[1] > red[1]
        assert image.to_rgba(np.array([[0.0]])).min() > 0.95


def test_plot_classes():
    counts = [5000 + 100 * digit for digit in range(10)]
    figure = plots.plot_classes(counts, PICTURES[:10], "Classes")
    bars = next(ax for ax in figure.axes if ax.containers)
    assert [bar.get_height() for bar in bars.patches] == counts
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars.patches] == pytest.approx(list(range(10)))
    assert [text.get_text() for text in bars.texts] == [f"{count:,}" for count in counts]
    assert bars.get_title() == "Classes"
    assert bars.get_ylabel() == "pictures"
    assert bars.get_ylim()[0] == 0  # bars that do not start at zero mislead
    assert np.array_equal(shown(figure), PICTURES[:10].numpy())


def test_plot_pixels():
    figure = plots.plot_pixels(PIXELS, "Pixels")
    assert titles(figure) == ["Pixels", "raw", "scaled"]
    for ax, pixels in zip(figure.axes, PIXELS.values(), strict=True):
        assert sum(bar.get_height() for bar in ax.patches) == 256
        assert ax.patches[0].get_x() == pytest.approx(pixels.min().item())
        assert ax.patches[-1].get_x() + ax.patches[-1].get_width() == pytest.approx(pixels.max().item())
        assert line_of(ax, "mean")[0] == pytest.approx([pixels.float().mean().item()] * 2)
        assert ax.get_yscale() == "log"
        assert ax.get_xlabel() == "pixel value"
    assert legend_of(figure.axes[-1]) == ["mean"]


def test_plot_lines():
    lines = {"slow": [0.91, 0.92, 0.93], "fast": torch.tensor([0.95, 0.97, 0.98])}
    figure = plots.plot_lines(
        [1, 10, 100], lines, "Lines", "rate", "validation accuracy", xscale="log", ylim=(0, 1)
    )
    (ax,) = figure.axes
    for name, y in lines.items():
        assert line_of(ax, name) == ([1, 10, 100], pytest.approx([float(value) for value in y]))
    assert legend_of(ax) == ["slow", "fast"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("Lines", "rate", "validation accuracy")
    assert (ax.get_xscale(), ax.get_ylim()) == ("log", (0, 1))
    assert ax.yaxis.get_major_formatter()(0.5, 0).startswith("50")  # a share is shown in percent
    assert len({line.get_color() for line in ax.lines}) == 2


def test_a_single_line_needs_no_legend_and_a_loss_no_percent():
    (ax,) = plots.plot_lines([1, 2], {"one": [3.0, 4.0]}, "T", "step", "loss").axes
    assert ax.get_legend() is None
    ax.figure.canvas.draw()
    assert not any("%" in label.get_text() for label in ax.get_yticklabels())


def test_plot_history():
    figure = plots.plot_history(make_history(4), 6, "History")
    left, right = figure.axes
    epochs = [1, 2, 3, 4]
    assert line_of(left, "training") == (epochs, pytest.approx([1, 1 / 2, 1 / 3, 1 / 4]))
    assert line_of(left, "validation") == (epochs, pytest.approx([1.5, 1.5 / 2, 1.5 / 3, 1.5 / 4]))
    assert legend_of(left) == ["training", "validation"]
    assert list(right.lines[0].get_xdata()) == epochs
    assert list(right.lines[0].get_ydata()) == pytest.approx([0.1, 0.1 / 2, 0.1 / 3, 0.1 / 4])
    assert titles(figure) == ["History"]
    assert "loss" in left.get_ylabel()
    assert "accuracy" in right.get_ylabel()
    for ax in figure.axes:
        assert ax.get_xlabel() == "epoch"
        assert ax.get_xlim()[1] >= 6  # room for all that is to come
        assert all(tick == round(tick) for tick in ax.get_xticks())


def test_accuracies_stand_where_they_belong():
    """The axis is one of errors in disguise: its labels must name accuracies, the best on top."""
    right = plots.plot_history(make_history(10), 10, "T").axes[1]
    right.figure.canvas.draw()
    bottom, top = right.get_ylim()
    assert bottom > 0.1  # the worst, 90%, is in sight, and so is the best
    assert 0 < top < 0.01
    name = right.yaxis.get_major_formatter()
    assert [name(error, 0) for error in (0.02, 0.015, 0.1)] == ["98%", "98.5%", "90%"]
    heights = [right.transData.transform((1, error))[1] for error in (0.02, 0.01)]
    assert heights[1] > heights[0]
    visible = [tick for tick in right.get_yticks() if top <= tick <= bottom]
    assert len(visible) >= 3


def test_plot_history_without_validation_digits():
    figure = plots.plot_history(make_history(2, validated=False), 2, "T")
    (ax,) = figure.axes
    assert [line.get_label() for line in ax.lines] == ["training"]
    figure.canvas.draw()


@pytest.mark.parametrize("history", [[], make_history(1)])
def test_plot_history_of_a_training_that_has_just_begun(history):
    plots.plot_history(history, 1, "T").canvas.draw()


def test_plot_history_of_a_perfect_training():
    """No error at all has no place on a logarithmic axis, and is drawn all the same."""
    perfect = [Epoch(1, 1e-9, 1e-9, 1.0, 1e-3, 1.0, nn.Identity())]
    figure = plots.plot_history(perfect, 1, "T")
    figure.canvas.draw()
    assert all(0 < limit < 1 for limit in figure.axes[1].get_ylim())


def test_plot_confusion():
    figure = plots.plot_confusion(MATRIX, ACCURACIES, "Confusion")
    left, right = figure.axes
    written = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in left.texts}
    assert written == {(row, column): MATRIX[row, column] for row, column in np.argwhere(MATRIX)}
    drawn = left.images[0].get_array()
    assert np.array_equal(drawn, MATRIX * (1 - np.eye(10)))  # mistakes alone have colour
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        "Confusion",
        "predicted digit",
        "true digit",
    )
    assert list(left.get_xticks()) == list(left.get_yticks()) == list(range(10))
    assert [bar.get_width() for bar in right.patches] == pytest.approx(ACCURACIES)
    assert [text.get_text() for text in right.texts] == [f"{accuracy:.2%}" for accuracy in ACCURACIES]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # both count the true digits downwards
    assert right.get_ylim()[0] > right.get_ylim()[1]
    assert right.get_xlim()[0] < min(ACCURACIES)


def test_plot_confusion_takes_what_the_notebook_has():
    """Tensors through scikit-learn: rows are the true digits."""
    labels, answers = torch.arange(10).repeat(3), torch.arange(10).repeat(3)
    answers[0] = 8  # one zero is taken for an eight
    matrix = confusion_matrix(labels, answers)
    figure = plots.plot_confusion(matrix, torch.tensor([2 / 3] + [1.0] * 9).tolist(), "T")
    figure.canvas.draw()
    written = {text.get_position()[::-1]: text.get_text() for text in figure.axes[0].texts}
    assert (written[0, 0], written[0, 8]) == ("2", "1")


def test_losses_are_labelled_with_plain_numbers():
    figure = plots.plot_lines([1, 2], {"a": [2.0, 0.05]}, "T", "x", "loss", yscale="log")
    figure.canvas.draw()
    ticks = figure.axes[0].yaxis.get_ticklabels(which="both")
    assert {"0.05", "0.1", "0.2", "0.5", "1", "2"} <= {label.get_text() for label in ticks}
    assert not {"0.3", "0.07"} & {label.get_text() for label in ticks}


def test_plot_lines_spreads_high_accuracies():
    figure = plots.plot_lines([1, 2, 3], {"a": [0.9, 0.99, 0.999]}, "T", "x", "accuracy", spread=True)
    figure.canvas.draw()
    ax = figure.axes[0]
    heights = ax.transData.transform(np.column_stack([[1, 2, 3], ax.lines[0].get_ydata()]))[:, 1]
    assert np.diff(heights) == pytest.approx(np.diff(heights)[0])  # each ten times fewer errors: equal steps
    assert heights[0] < heights[2]
    assert {"90%", "99%", "99.9%"} <= {label.get_text() for label in ax.get_yticklabels()}


def test_plot_calibration():
    answers = make_answers(4000)
    left, middle = plots.plot_calibration(answers, "Calibration").axes
    assert line_of(left, "perfectly calibrated") == ([0, 1], [0, 1])
    stated, true = line_of(left, "a twentieth of the digits each")
    assert (stated, true) == tuple(pytest.approx(part.tolist()) for part in answers.calibration)
    assert np.abs(np.subtract(stated, true)).max() < 0.12  # these answers are calibrated
    assert left.get_title() == "Calibration"
    assert left.get_xlim()[0] <= min(*stated, *true)
    counts = {bars[0].get_facecolor(): sum(bar.get_height() for bar in bars) for bars in middle.containers}
    named = [handle.get_facecolor() for handle in middle.get_legend().get_patches()]
    assert legend_of(middle) == ["right", "wrong"]
    assert [counts[colour] for colour in named] == [answers.right.sum(), (~answers.right).sum()]


@pytest.mark.parametrize("everything", [True, False])
def test_plot_calibration_of_a_model_always_right_or_always_wrong(everything):
    answers = judge(make_answers(40).probabilities, torch.full((40,), everything))
    figure = plots.plot_calibration(answers, "T")
    figure.canvas.draw()
    assert set(line_of(figure.axes[0], "a twentieth of the digits each")[1]) == {float(everything)}


def test_plot_calibration_of_a_model_without_doubts():
    certain = torch.eye(10).repeat(4, 1) * 1000
    figure = plots.plot_calibration(Evaluation(certain, (torch.arange(40) % 10).flip(0)), "T")
    figure.canvas.draw()
    assert set(line_of(figure.axes[0], "a twentieth of the digits each")[0]) == {1.0}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_carries_its_alternative_text(name):
    picture, metadata = FIGURES[name]()._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert "T" in metadata["alt"].split("; ")


def test_alternative_text_names_titles_and_axes_once():
    figure, axes = plots.make_axes(1, 2)
    figure.suptitle("Two panels")
    for ax in axes:
        ax.set(title="Left\nand right", xlabel="epoch", ylabel="loss")
    assert plots.describe_figure(figure) == "Two panels; Left and right; loss against epoch"


def test_alternative_text_counts_pictures():
    alternative = plots.describe_figure(plots.plot_digits(PICTURES, range(13), "Thirteen digits"))
    assert alternative == "Thirteen digits; 13 pictures"
