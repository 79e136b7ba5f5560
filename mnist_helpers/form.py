"""The knobs as a form: sliders and choices beside the plain config cell, and a button that trains."""

import io
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, replace
from signal import SIGINT, default_int_handler, signal

import ipywidgets as widgets
from IPython import get_ipython
from IPython.core.displaypub import DisplayPublisher
from IPython.display import DisplayHandle, display

from mnist_helpers.config import OPTIMIZERS, SCHEDULES, Config
from mnist_helpers.draw import is_live
from mnist_helpers.model import ACTIVATIONS
from mnist_helpers.runs import format_knob

SLIDERS = {
    "learning_rate": [float(f"{digit}e-{power}") for power in (4, 3, 2, 1) for digit in (1, 2, 5)],
    "batch_size": [16, 32, 64, 128, 256, 512, 1024],
    "epochs": [*range(1, 11), 12, 15, 20, 30, 50, 100, 200],
    "dropout": [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
    "warp": [0.0, 0.25, 0.5, 0.75, 1.0, 1.25],
    "warp_fade": [0.0, 0.25, 0.5, 0.75, 1.0],
    "practice": [0.1, 0.25, 0.5, 0.75, 1.0],
}
MENUS = {
    "hidden": [(128,), (512,), (128, 64), (256, 128), (512, 512), (1024, 1024), (512, 512, 512)],
    "activation": list(ACTIVATIONS),
    "optimizer": list(OPTIMIZERS),
    "schedule": list(SCHEDULES),
}
PLACES = 4  # how many things a training can show below the form
PATIENCE = 0.5  # seconds after a training in which clicks are those made during it


class KnobsForm(widgets.VBox):
    """A slider or menu for each knob, and a button that calls `train(config)`; `config` follows the knobs."""

    def __init__(self, config: Config, train: Callable[[Config], object]):
        self.config, self.train, self.finished = config, train, -math.inf
        self.line, self.note, *self.places = [DisplayHandle() for _ in range(2 + PLACES)]
        self.knobs = make_knobs(config)
        self.button = widgets.Button(description="Train", button_style="primary")
        columns = widgets.Layout(grid_template_columns="repeat(2, 330px)")
        super().__init__([widgets.GridBox(list(self.knobs.values()), layout=columns), self.button])
        for knob in self.knobs.values():
            knob.observe(self._read_knobs, "value")
        # The main thread: newer Jupyters answer widgets in another, where the stop button does not reach.
        self.button.on_click(lambda _: get_ipython().kernel.io_loop.add_callback(self.run))

    def __repr__(self) -> str:
        return "The knobs as a form: run this cell in a live notebook to use it."

    def show(self) -> None:
        """Display the form, and empty places below it: outputs that a widget made by itself go nowhere."""
        display(self)
        for place in (self.line, self.note, *self.places):
            place.display({"text/plain": ""}, raw=True)
        self._read_knobs()

    def run(self) -> None:
        """Call `train` with the knobs as they stand; what it displays, prints or raises appears below."""
        if time.monotonic() - self.finished < PATIENCE:
            return
        self.button.disabled, self.button.description = True, "Training …"
        before, printed, problem = signal(SIGINT, default_int_handler), io.StringIO(), ""
        try:
            with redirect_stdout(printed), display_in(self.places):
                self.train(self.config)
        except KeyboardInterrupt:
            problem = "stopped"
        except Exception as error:  # Jupyter shows errors of widgets nowhere
            problem = f"{type(error).__name__}: {error}"
        finally:
            signal(SIGINT, before)
            _write(self.note, printed.getvalue() + problem)
            self.button.disabled, self.button.description = False, "Train"
            self.finished = time.monotonic()

    def _read_knobs(self, _change=None) -> None:
        self.config = replace(self.config, **{name: knob.value for name, knob in self.knobs.items()})
        _write(self.line, describe_config(self.config))


def show_form(config: Config, train: Callable[[Config], object]) -> None:
    """A form that starts from `config`; its button calls `train(config)` and shows its displays below.

    Nothing needs it: where a program runs the notebook, one line of text stands in its place.
    """
    if is_live():
        KnobsForm(config, train).show()
    else:
        display({"text/plain": "In a live notebook, a form with these knobs appears here."}, raw=True)


def describe_config(config: Config) -> str:
    """The line of Python that makes `config`, naming the knobs that differ from their defaults."""
    knobs = [(field.name, getattr(config, field.name), field.default) for field in fields(config)]
    return f"Config({', '.join(f'{name}={value!r}' for name, value, default in knobs if value != default)})"


def make_knobs(config: Config) -> dict[str, widgets.Widget]:
    """A widget for each knob, set to the value in `config`, which is offered even where it is unusual."""
    knobs = {}
    for name, usual in (SLIDERS | MENUS).items():
        value, label = getattr(config, name), name.replace("_", " ")
        values = sorted({*usual, value}) if name in SLIDERS else dict.fromkeys([*usual, value])
        options = [(format_knob(value), value) for value in values]
        kind = widgets.SelectionSlider if name in SLIDERS else widgets.Dropdown
        style = {"description_width": "110px"}
        knobs[name] = kind(options=options, value=value, description=label, style=style)
    return knobs


@contextmanager
def display_in(places: list[DisplayHandle]):
    """Send what is displayed meanwhile to `places` that a cell has made before."""
    shell = get_ipython()
    before, shell.display_pub = shell.display_pub, _Redirect(places, shell.display_pub)
    try:
        yield
    finally:
        shell.display_pub = before


class _Redirect(DisplayPublisher):
    """Turns every new display into an update of the next place; the last one takes the rest."""

    def __init__(self, places: list[DisplayHandle], publisher: DisplayPublisher):
        super().__init__()
        self.places, self.publisher, self.shown = places, publisher, {}

    def publish(self, data, metadata=None, *, transient=None, update=False, **options):
        name = (transient or {}).get("display_id", len(self.shown))
        if not update:
            self.shown[name] = self.places[min(len(self.shown), len(self.places) - 1)].display_id
        target = {"display_id": self.shown.get(name, name)}
        self.publisher.publish(data, metadata, transient=target, update=True, **options)


def _write(place: DisplayHandle, text: str) -> None:
    place.update({"text/plain": text}, raw=True)
