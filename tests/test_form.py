"""The form of knobs: what it offers, and what becomes of a training that is started from it."""

import os
import signal
from dataclasses import fields, replace

import pytest
from IPython.display import display

from mnist_helpers import form
from mnist_helpers.config import Config
from mnist_helpers.form import PLACES, KnobsForm, describe_config, make_knobs, show_form

WIDGET = "application/vnd.jupyter.widget-view+json"
UNUSUAL = Config(
    hidden=(77, 5), learning_rate=0.00123, batch_size=50, epochs=11, dropout=0.15, activation="tanh"
)


def make_form(train, config=None):
    knobs = KnobsForm(config or Config(), train)
    knobs.show()
    return knobs


def read_places(outputs):
    """What each place shows in the end, in the order in which they were made."""
    places = {}
    for output in outputs:
        if name := (output["transient"] or {}).get("display_id"):
            assert (name in places) == output["update"], "a widget may update outputs, never make new ones"
            places[name] = output["data"].get("text/plain", "")
    return list(places.values())


@pytest.mark.parametrize("config", [Config(), UNUSUAL, Config(hidden=(), optimizer="sgd", seed=3)])
def test_line_to_copy_makes_the_same_config(config):
    assert eval(describe_config(config)) == config


def test_line_to_copy_names_only_what_was_changed():
    assert describe_config(Config(epochs=7)) == "Config(epochs=7)"


def test_knobs_start_from_the_config_even_where_it_is_unusual():
    knobs = make_knobs(UNUSUAL)
    assert set(knobs) <= {field.name for field in fields(Config)}
    for name, knob in knobs.items():
        assert knob.value == getattr(UNUSUAL, name), name


def test_every_value_on_offer_is_valid():
    for name, knob in make_knobs(Config()).items():
        for _, value in knob.options:
            replace(Config(), **{name: value})  # raises for a value that makes no sense


def test_moving_a_knob_rewrites_the_line(shown):
    knobs = make_form(print)
    knobs.knobs["hidden"].value = (128,)
    knobs.knobs["epochs"].value = 9
    assert knobs.config == Config(hidden=(128,), epochs=9)
    assert read_places(shown)[0] == "Config(hidden=(128,), epochs=9)"


def test_knobs_without_a_widget_keep_their_values(shown):
    knobs = make_form(print, Config(seed=5, weight_decay=0.25))
    knobs.knobs["epochs"].value = 9
    assert knobs.config == Config(seed=5, weight_decay=0.25, epochs=9)


def test_training_gets_the_knobs_while_the_button_is_off(shown):
    calls = []
    knobs = make_form(lambda config: calls.append((config, knobs.button.disabled)), Config(epochs=2))
    assert not knobs.button.disabled
    knobs.run()
    assert calls == [(Config(epochs=2), True)]
    assert not knobs.button.disabled


def test_clicks_during_a_training_start_no_second_one(shown, monkeypatch):
    calls = []
    knobs = make_form(calls.append)
    knobs.run()
    knobs.run()  # was waiting in the queue
    assert len(calls) == 1
    monkeypatch.setattr(form, "PATIENCE", 0)
    knobs.run()
    assert len(calls) == 2


def test_displays_of_a_training_go_to_the_places_below_the_form(shown):
    def train(_config):
        curve = display({"text/plain": "empty curve"}, raw=True, display_id=True)
        display({"text/plain": "table"}, raw=True)
        curve.update({"text/plain": "full curve"}, raw=True)
        print("one line")

    make_form(train).run()
    line, note, *places = read_places(shown)
    assert line == "Config()"
    assert note == "one line\n"
    assert places == ["full curve", "table", *[""] * (PLACES - 2)]


def test_more_displays_than_places_lose_none_of_the_first(shown):
    def train(_config):
        for number in range(PLACES + 3):
            display({"text/plain": str(number)}, raw=True)

    make_form(train).run()
    assert read_places(shown)[2:] == [*map(str, range(PLACES - 1)), str(PLACES + 2)]


def test_displays_are_normal_again_after_a_training(shown):
    make_form(lambda _: display("inside")).run()
    display({"text/plain": "outside"}, raw=True)
    assert shown[-1]["data"] == {"text/plain": "outside"}
    assert shown[-1]["update"] is False


def test_error_of_a_training_is_shown_and_the_button_comes_back(shown):
    def train(_config):
        raise ValueError("learning rate much too high")

    knobs = make_form(train)
    knobs.run()
    assert read_places(shown)[1] == "ValueError: learning rate much too high"
    assert not knobs.button.disabled


def test_stop_button_ends_a_training_although_the_kernel_ignores_it_when_idle(shown):
    def train(_config):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1_000_000):
            pass
        raise AssertionError("went on")

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        knobs = make_form(train)
        knobs.run()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_places(shown)[1] == "stopped"
    assert not knobs.button.disabled


def test_nobody_there_leaves_one_line_of_text(shown):
    show_form(Config(), print)
    [output] = shown
    assert set(output["data"]) == {"text/plain"}


def test_somebody_there_gets_the_form_with_words_beside_it(shown, monkeypatch):
    monkeypatch.setattr(form, "is_live", lambda: True)
    show_form(Config(), print)
    assert WIDGET in shown[0]["data"]
    assert "form" in shown[0]["data"]["text/plain"]
    assert "(children=" not in shown[0]["data"]["text/plain"]
