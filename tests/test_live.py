"""What moves while training runs: every record handed on, little time spent, the stop button, what stays."""

import base64
import io
import math
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import mistune
import pytest
from conftest import make_toy_digits
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown
from torch import nn

from mnist_helpers import augment, live
from mnist_helpers.evaluation import evaluate
from mnist_helpers.live import describe_epoch, show_source, show_table, watch
from mnist_helpers.training import Config, Epoch, fit

SMALL = Config(hidden=(8,), epochs=2, batch_size=50)


class Screen:
    """Stands for the notebook's output: keeps all that was shown, and its time where it is asked for."""

    def __init__(self):
        self.bundles, self.clock = [], 0.0

    def display(self, bundle, raw, metadata):
        assert self.bundles == []  # from then on, the same output is updated
        self.update(bundle, raw, metadata)

    def update(self, bundle, raw, metadata):
        assert raw
        self.bundles.append(bundle)
        self.metadata = metadata

    @property
    def last(self) -> dict:
        return self.bundles[-1]


@pytest.fixture
def screen(monkeypatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(live, "DisplayHandle", lambda: screen)
    monkeypatch.setattr(live, "get_ipython", lambda: "a notebook")
    return screen


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes no time where a test is about the rest."""
    monkeypatch.setattr(live, "plot_history", lambda history, total, title: None)
    monkeypatch.setattr(live, "render_png", lambda figure: b"picture")


@pytest.fixture
def clock(monkeypatch, screen) -> Screen:
    """The screen, whose `clock` is the only time there is."""
    monkeypatch.setattr(live, "time", SimpleNamespace(perf_counter=lambda: screen.clock))
    return screen


def make_epoch(number: int, validated: bool = True) -> Epoch:
    losses = (
        (0.5 / number, 0.6 / number, 1 - 0.1 / number) if validated else (0.5 / number, math.nan, math.nan)
    )
    return Epoch(number, *losses, 1e-3, 1.5, nn.Identity())


def train(count: int, then=None, screen: Screen | None = None, validated: bool = True):
    """`count` records of made-up training, a second each on the screen's clock; `then` is raised."""
    for number in range(1, count + 1):
        if screen is not None:
            screen.clock += 1
        yield make_epoch(number, validated)
    if then is not None:
        raise then


def is_png(picture: bytes) -> bool:
    image = plt.imread(io.BytesIO(picture))
    return (
        image.ndim == 3 and 0 < image[..., :3].min() + 0.5 < image[..., :3].max() + 0.5
    )  # not all one colour


def test_every_record_is_handed_on_in_order_and_at_once(screen, no_pictures):
    made = []

    def slow():
        for number in range(1, 6):
            made.append(make_epoch(number))
            yield made[-1]

    for count, epoch in enumerate(watch(slow(), 5), start=1):
        assert epoch is made[-1]
        assert len(made) == count  # training waits for the loop, not the loop for training
    assert count == 5


def test_nothing_is_trained_before_the_loop(screen, no_pictures):
    def never():
        raise AssertionError("trained without being asked")
        yield

    watch(never(), 5)
    assert screen.bundles == []


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, [1]),
        (12, list(range(1, 13))),
        (24, [1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]),
        (29, [1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29]),
        (300, [1, 2, 3, 25, 50, 75, 100, 125, 150, 175, 200, 225, 250, 275, 300]),
    ],
)
def test_final_text_has_a_line_for_each_epoch_or_a_dozen_of_many(screen, no_pictures, count, shown):
    list(watch(train(count), count, "Baseline"))
    heading, *lines = screen.last["text/plain"].splitlines()
    assert heading.startswith(
        f"Baseline: {1 - 0.1 / count:.2%} of the validation digits right after {count} epochs"
    )
    assert lines == [describe_epoch(make_epoch(number)) for number in shown]
    assert "stopped" not in heading


def test_final_output_without_validation_digits(screen, no_pictures):
    list(watch(train(3, validated=False), 3, "Final"))
    assert len(screen.last["text/plain"].splitlines()) == 4
    assert "nan" not in screen.last["text/plain"]


def test_output_is_saved_as_text_and_picture_alone(screen):
    list(watch(train(3), 3))
    assert set(screen.last) == {"text/plain", "image/png"}
    assert "validation digits right after 3 epochs" in screen.metadata["image/png"]["alt"]
    assert is_png(base64.b64decode(screen.last["image/png"]))
    assert plt.get_fignums() == []


def test_progress_is_shown_from_the_start(clock):
    watched = watch(train(4, screen=clock), 4, "Baseline")
    next(watched)
    first, second = clock.bundles
    assert first["text/plain"] == "Baseline: 0/4 epochs"
    assert second["text/plain"].splitlines()[0] == "Baseline: 1/4 epochs, 3 s left"
    assert all(is_png(base64.b64decode(bundle["image/png"])) for bundle in (first, second))


def test_drawing_takes_at_most_a_few_percent_of_the_time(clock, no_pictures, monkeypatch):
    drawing = []

    def slow_render(figure):
        clock.clock += 1.0
        drawing.append(clock.clock)
        return b"picture"

    monkeypatch.setattr(live, "render_png", slow_render)
    list(watch(train(1000, screen=clock), 1000))
    assert 1.0 * len(drawing) < 0.035 * clock.clock
    assert len(drawing) > 20  # yet it does move


def test_quick_drawing_shows_every_epoch(clock, no_pictures, monkeypatch):
    def quick_render(figure):
        clock.clock += 0.01
        return b"picture"

    monkeypatch.setattr(live, "render_png", quick_render)
    list(watch(train(30, screen=clock), 30))
    assert len(clock.bundles) == 1 + 30 + 1  # the start, each epoch, the result


@pytest.mark.parametrize("complete", [1, 3])
def test_stop_button_ends_the_loop_and_keeps_the_epochs(screen, no_pictures, complete):
    seen = []
    for epoch in watch(train(complete, KeyboardInterrupt()), 10, "Mine"):
        seen.append(epoch.number)
    assert seen == list(range(1, complete + 1))
    heading, *lines = screen.last["text/plain"].splitlines()
    assert f"{complete} epochs in " in heading
    assert heading.endswith("stopped: the model of the last complete epoch is kept")
    assert len(lines) == complete


def test_stop_button_before_the_first_epoch_is_complete(screen, no_pictures):
    with pytest.raises(KeyboardInterrupt):
        list(watch(train(0, KeyboardInterrupt()), 10))


def test_stop_button_in_a_real_training(screen, no_pictures, monkeypatch):
    """Stopped in the middle of the second epoch: record and model of the first are whole."""
    import mnist_helpers.training as training

    digits, original, calls = make_toy_digits(100), training.train_epoch, []

    def stop_in_second(*args):
        calls.append(args)
        losses = original(*args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses

    monkeypatch.setattr(training, "train_epoch", stop_in_second)
    (epoch,) = watch(fit(SMALL, digits, digits), SMALL.epochs)
    loader = training.make_loader(digits, 100)
    assert epoch.number == 1
    assert evaluate(epoch.model, loader).accuracy == epoch.validation_accuracy


def test_failure_of_training_is_not_swallowed(screen, no_pictures):
    with pytest.raises(RuntimeError, match="not a number"):
        list(watch(train(2, RuntimeError("not a number")), 10))
    assert len(screen.last["text/plain"].splitlines()) == 3  # what there was until then is shown


def test_loop_left_early_shows_what_there_is(screen, no_pictures):
    for epoch in (watched := watch(train(5), 5)):
        if epoch.number == 2:
            break
    watched.close()
    assert len(screen.last["text/plain"].splitlines()) == 3


def test_works_without_ipython(monkeypatch, capsys):
    monkeypatch.setattr(InteractiveShell, "initialized", lambda: False)
    assert [epoch.number for epoch in watch(train(3), 3)] == [1, 2, 3]
    assert [epoch.number for epoch in watch(train(2, KeyboardInterrupt()), 3)] == [1, 2]


def test_description_of_an_epoch():
    line = describe_epoch(make_epoch(2))
    assert re.findall(r"\d+\.?\d*%?", line) == ["2", "1.5", "0.2500", "0.3000", "95.00%"]
    assert re.findall(r"\d+\.?\d*%?", describe_epoch(make_epoch(2, validated=False))) == [
        "2",
        "1.5",
        "0.2500",
    ]


def read_table(table: Markdown) -> list[list[str]]:
    """The cells as a Markdown reader finds them."""
    (parsed,) = mistune.create_markdown(renderer=None, plugins=["table"])(table.data)
    assert parsed["type"] == "table"
    head, *body = parsed["children"]
    rows = [head["children"], *(row["children"] for part in body for row in part["children"])]
    return [["".join(text.get("raw", "") for text in cell["children"]) for cell in row] for row in rows]


def test_table_is_read_as_one():
    table = show_table(["network", "accuracy", "epochs"], ("linear", "88.0%", 5), ["final", 0.99, 200])
    assert isinstance(table, Markdown)
    expected = [["network", "accuracy", "epochs"], ["linear", "88.0%", "5"], ["final", "0.99", "200"]]
    assert read_table(table) == expected


def test_source_is_shown_as_one_block_of_python():
    def read(*objects) -> str:
        shown = show_source(*objects)
        assert isinstance(shown, Markdown)
        (block,) = mistune.create_markdown(renderer=None)(shown.data)
        assert (block["type"], block["attrs"]["info"]) == ("block_code", "python")
        return block["raw"]

    both = read(describe_epoch, Config)
    assert both.startswith("def describe_epoch(")
    assert "\n\n\n@dataclass(frozen=True)\nclass Config:" in both
    assert both.rstrip().endswith("object.__setattr__(self, name, value)")
    code = compile(read(describe_epoch), "shown", "exec")  # what is shown is code that runs
    names = {"Epoch": Epoch, "isnan": math.isnan}
    exec(code, names)
    assert names["describe_epoch"](make_epoch(3)) == describe_epoch(make_epoch(3))
    assert "class RandomWarp" in read(augment)  # a whole module can be shown too
