"""The figures and tables: what they say is what was given."""

import io
import math
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import mistune
import numpy as np
import pytest
import torch
from conftest import make_toy_digits
from PIL import Image

from mnist_helpers import plots
from mnist_helpers.training import Epoch

NAN = math.nan
IMAGES = make_toy_digits(13).images
HISTORY = [Epoch(1, 2.0, 1.0, 0.9), Epoch(2, 0.4, 0.3, 0.96)]


def draw_everything():
    figure, ax = plots.make_axes()
    ax.plot([1, 2])
    return [
        plots.plot_digits(IMAGES, list(range(13)), "T"),
        plots.plot_lines([1, 2], {"a": [3, 4], "b": [1, 2]}, "T", "x", "y"),
        plots.plot_history(HISTORY, 5, "T"),
        figure,
    ]


def read_ticks(axis):
    """The labels in sight, upwards or to the right."""
    axis.figure.draw_without_rendering()
    ticks = sorted(axis._update_ticks(), key=lambda tick: tick.get_loc())
    return [tick.label1.get_text() for tick in ticks]


def points_of(line):
    return line.get_xydata().tolist()


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_readers_own_style_changes_nothing():
    expected = [figure._repr_png_() for figure in draw_everything()]
    with plt.style.context(["dark_background", {"image.cmap": "hot"}]):
        before = dict(mpl.rcParams)
        assert [figure._repr_png_() for figure in draw_everything()] == expected
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []  # nothing hangs on pyplot


def test_png_has_few_colours():
    png = draw_everything()[1]._repr_png_()
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size) == ("PNG", "P", (900, 340))
    colours = [colour for _, colour in image.convert("RGB").getcolors()]
    assert 100 < len(colours) <= 128
    assert {(255, 255, 255), (0, 0, 0), (0, 114, 178)} <= set(colours)


def test_digits_stand_in_rows_below_their_captions():
    figure = plots.plot_digits(IMAGES, list(range(99)), "Digits", vmin=-255)
    (ax,) = figure.axes
    figure.draw_without_rendering()
    assert len(ax.images) == len(ax.texts) == 13
    assert not ax.axison
    for index, (drawn, caption) in enumerate(zip(ax.images, ax.texts, strict=True)):
        assert drawn.to_rgba(np.array([-255.0, 255.0]))[:, 0].tolist() == [1, 0]
        assert drawn.get_interpolation() == "nearest"
        assert np.array_equal(drawn.get_array(), IMAGES[index])
        row, column = divmod(index, 10)
        place = drawn.get_window_extent()
        left, bottom = ax.transData.transform((column, row + 0.9))
        assert (place.x0, place.y0) == pytest.approx((left, bottom))
        assert place.width == pytest.approx(place.height)
        words = caption.get_window_extent()
        assert place.x0 < words.x0 < words.x1 < place.x1
        assert abs(words.y0 + words.y1 - 2 * place.y1) < 4
        assert caption.get_text() == str(index)
    assert figure.get_suptitle() == "Digits"
    assert plots.plot_digits(IMAGES[:4]).axes[0].get_xlim() == (0, 10)
    assert plots.plot_digits(IMAGES[:0])._repr_png_()


def test_lines_hold_what_was_given():
    lines = {"slow": [3, 2, 1], "fast": torch.tensor([2.5, 1.5, 0.5])}
    _, (_, right) = plots.make_axes(1, 2)
    plots.plot_lines([1, 10, 100], lines, "T", "rate", "gain", right, xscale="log")
    slow, fast = right.lines
    assert points_of(slow) == [[1, 3], [10, 2], [100, 1]]
    assert points_of(fast) == [[1, 2.5], [10, 1.5], [100, 0.5]]
    assert legend_of(right) == ["slow", "fast"]
    assert (slow.get_color(), slow.get_marker()) == ("#0072B2", "o")
    texts = right.get_title(), right.get_xlabel(), right.get_ylabel()
    assert texts == ("T", "rate", "gain")
    assert right.get_xscale() == "log"
    (ax,) = plots.plot_lines([1, 2], {"one": [3, 4]}, "T", "x", "y").axes
    assert ax.get_legend() is None  # a single line needs none


def test_panels_with_one_accuracy_axis_show_all_points():
    _, (left, right) = plots.make_axes(1, 2, sharey=True)
    left.plot([0.6])
    right.plot([0.985])
    plots.set_accuracy_scale(left)
    assert left.get_ylim() == right.get_ylim() == (0.5, 0.99)


def test_losses_are_labelled_with_plain_numbers():
    shown = []
    for losses in ([0.045, 2.1], [0.061, 0.079], [1e-4, 2.1]):
        _, ax = plots.make_axes()
        ax.plot(losses)
        plots.set_loss_scale(ax)
        shown.append(read_ticks(ax.yaxis))
    assert shown[0] == ["0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert {"0.065", "0.07", "0.075"} < set(shown[1])
    assert "0.001" in shown[2]
    assert len(shown[2]) < 15  # they do not run into each other


def test_accuracies_are_labelled_in_percent():
    for accuracies, labels in (
        ([0.96, NAN, 0.985], "95% 97% 98% 99%"),
        ([0.6, 0.992], "50% 80% 90% 95% 97% 98% 99% 99.5%"),
        ([0.0, 0.3, 1.0], "0% 80% 95% 98% 99.5% 100%"),
        ([1.0], "90% 95% 97% 98% 99% 99.5% 99.9% 100%"),  # what is about as good, too
        ([NAN], "0% 50%"),
    ):
        _, ax = plots.make_axes()
        ax.plot(accuracies)
        plots.set_accuracy_scale(ax)
        assert read_ticks(ax.yaxis) == labels.split()


def test_a_tenth_of_the_mistakes_is_one_step_up():
    _, ax = plots.make_axes()
    accuracies = [0.9, 0.99, 0.999]
    ax.scatter(accuracies, accuracies)
    plots.set_accuracy_scale(ax)
    heights = ax.transData.transform(np.stack([accuracies] * 2, axis=1))
    first, second = np.diff(heights[:, 1])
    assert 0 < first == pytest.approx(second, rel=0.05)
    assert ax.transData.inverted().transform(heights)[1, 1] == pytest.approx(0.99)
    assert np.isfinite(ax.transData.transform([(0, 0), (1, 1)])).all()


@pytest.mark.parametrize("count", [1, 2])
def test_history_shows_losses_and_accuracies(count):
    left, right = plots.plot_history(HISTORY[:count], 2, "T").axes
    training, validation = left.lines
    assert points_of(training) == [[1, 2.0], [2, 0.4]][:count]
    assert points_of(validation) == [[1, 1.0], [2, 0.3]][:count]
    assert points_of(right.lines[0]) == [[1, 0.9], [2, 0.96]][:count]
    assert legend_of(left) == ["training", "validation"]
    assert left.get_yscale() == "log"
    assert all(label.endswith("%") for label in read_ticks(right.yaxis))
    for ax in (left, right):
        assert read_ticks(ax.xaxis) == ["0", "1", "2"]
        assert ax.get_xlim()[1] > 2  # the last point is whole
        assert ax.get_xlabel() == "epoch"
    assert left.get_ylabel() == "mean loss (nats), log scale"
    assert right.get_ylabel() == "validation accuracy"
    assert left.figure.get_suptitle() == "T"


def test_history_without_validation_digits():
    figure = plots.plot_history([Epoch(1, 0.5, NAN, NAN)], 30, "a long reason " * 12)
    (ax,) = figure.axes
    assert points_of(ax.lines[0]) == [[1, 0.5]]
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().width < 900  # the title is wrapped


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, each in its several forms."""
    shown = []
    monkeypatch.setattr(
        plots, "display", lambda forms, raw: raw and shown.append(forms)
    )
    return shown


def test_code_is_coloured_and_monospaced(shown):
    plots.show_source(Epoch, points_of)
    (forms,) = shown
    assert set(forms) == {"text/plain", "text/html"}
    assert forms["text/plain"].startswith("@dataclass(frozen=True)\nclass Epoch:")
    assert "\n\n\ndef points_of(line)" in forms["text/plain"]
    assert '<pre style="font: 12px/1.4 monospace; ' in forms["text/html"]
    assert '<span class="k">return</span>' in forms["text/html"]


def test_table_is_read_as_one(shown):
    plots.show_table(["network", "loss"], ("[MLP](#a)", "0.880"), ["b", "0.5"])
    (forms,) = shown
    text = forms["text/plain"]
    assert forms == {"text/plain": text, "text/markdown": text}
    assert text.startswith("| network   | loss")  # in columns
    html = mistune.create_markdown(escape=False, plugins=["table"])(text)
    cells = re.findall("<t[hd].*?>(.*)</t[hd]>", html)
    link = '<a href="#a">MLP</a>'
    assert cells == ["network", "loss", link, "0.880", "b", "0.5"]
