"""The kernel's half of the drawing pad; test_browser.py tries the whole of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mnist_helpers.handwriting import pad as pad_module
from mnist_helpers.handwriting.pad import MARGIN, SIDE, DrawingPad, is_live, show_pad
from mnist_helpers.handwriting.predict import predict_picture
from mnist_helpers.model import MLP

ANNOUNCED = "The drawing pad appears when this cell is run in a live notebook."
FIVE = np.zeros((SIDE, SIDE), np.uint8)  # ink, the way the browser sends it
FIVE[8:30, :5] = FIVE[25:48, 20:25] = FIVE[25:30, :24] = FIVE[44:48, :24] = 255
FIVE[4:7, 9:28] = 255  # its roof, apart
EXAMPLE = torch.from_numpy(np.roll(FIVE, 14, axis=1)[::2, ::2])


def ask(pad, ink, finished=False):
    """What the pad sends back when the browser has sent `ink`."""
    sent = []
    pad.send = lambda message, buffers=None: sent.append((message, buffers))
    question = {"sequence": 7, "finished": finished}
    pad._handle_custom_msg(question, [memoryview(ink.tobytes())])
    return sent


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MLP((16,)).eval()


def test_answer_is_what_predict_picture_says(model):
    kept = []
    pad = DrawingPad(model, kept.append)
    [(message, [pixels])] = ask(pad, FIVE)
    expected = predict_picture(model, 255 - np.pad(FIVE, MARGIN))
    assert message["sequence"] == 7
    assert message["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert pixels == expected.pixels.numpy().tobytes()
    assert kept == [], "kept before the stroke has ended"
    ask(pad, FIVE, finished=True)
    assert kept[0].pixels.numpy().tobytes() == pixels


def test_strokes_at_the_edge_of_the_paper_are_read_too(model):
    pad = DrawingPad(model, print)
    [(_, [pixels])] = ask(pad, FIVE)
    [(_, [expected])] = ask(pad, np.roll(FIVE, 12, axis=1))
    assert pixels == expected


def test_problems_are_sent_to_the_browser_with_their_question(model):
    def fail(*_):
        raise OSError("disk on fire")

    pad = DrawingPad(model, fail)
    [(refusal, _)] = ask(pad, np.zeros_like(FIVE), finished=True)
    assert refusal.keys() == {"sequence", "problem"}
    assert refusal["sequence"] == 7, "the browser would wait for ever"
    assert "Error" not in refusal["problem"], "a reason, and no name of a class"
    _, (problem, _) = ask(pad, FIVE, finished=True)
    assert problem == {"sequence": 7, "problem": "OSError: disk on fire"}
    pad.model = None
    [(problem, _)] = ask(pad, FIVE)
    assert "Error" in problem["problem"]


def test_is_live_where_somebody_could_type(monkeypatch):
    kernel = SimpleNamespace(_allow_stdin=False)  # a program runs the notebook
    for shell in (None, SimpleNamespace(kernel=kernel)):
        monkeypatch.setattr(pad_module, "get_ipython", lambda shell=shell: shell)
        assert is_live() is False
    kernel._allow_stdin = True
    assert is_live() is True


def test_where_nobody_can_draw_a_line_and_the_card_are_left(model, shown):
    show_pad(model, EXAMPLE)
    announcement, card = shown
    assert announcement["data"] == {"text/plain": ANNOUNCED}
    assert "image/png" in card["data"]


def test_card_below_the_pad_follows_the_drawing(model, shown, monkeypatch):
    pads = []
    monkeypatch.setattr(pad_module, "is_live", lambda: True)
    monkeypatch.setattr(pad_module, "display", pads.append)
    show_pad(model, EXAMPLE)
    [pad], [card] = pads, shown
    bundle, _ = pad._repr_mimebundle_()
    assert bundle["text/plain"] == ANNOUNCED, "all that a static page shows"
    ask(pad, FIVE, finished=True)
    update = shown[1]
    assert update["update"] is True, "a new output would go nowhere from a widget"
    assert update["transient"] == card["transient"]
    assert update["data"]["image/png"] != card["data"]["image/png"]
