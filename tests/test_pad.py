"""The kernel's half of the drawing pad; test_browser.py tries the whole of it."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mnist_helpers.handwriting import pad as pad_module
from mnist_helpers.handwriting.pad import MARGIN, SIDE, DrawingPad, is_live, show_pad
from mnist_helpers.handwriting.predict import predict_picture
from mnist_helpers.model import MLP

WIDGET = "application/vnd.jupyter.widget-view+json"


def draw_one(slant=0):
    """A straight stroke of ink, the way the browser sends it."""
    ink = np.zeros((SIDE, SIDE), np.uint8)
    for row in range(10, 46):
        start = 26 + slant * (28 - row) // 36
        ink[row, start : start + 5] = 255
    return ink


def ask(pad, ink, sequence=1, finished=False):
    """What the pad sends back when the browser has sent `ink`: messages with their buffers."""
    sent = []
    pad.send = lambda message, buffers=None: sent.append((message, buffers))
    pad._answer(pad, {"sequence": sequence, "finished": finished}, [memoryview(ink.tobytes())])
    return sent


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MLP((16,)).eval()


def test_answer_is_what_predict_picture_says(model):
    kept = []
    pad = DrawingPad(model, kept.append)
    ink = draw_one(slant=12)
    [(message, [pixels])] = ask(pad, ink, sequence=7)
    expected = predict_picture(model, np.pad(ink, MARGIN))
    assert message["sequence"] == 7
    assert message["probabilities"] == pytest.approx(expected.probabilities.tolist(), abs=1e-6)
    assert pixels == expected.pixels.numpy().tobytes()
    assert len(pixels) == 28 * 28
    assert kept == [], "kept before the stroke has ended"


def test_strokes_at_the_edge_of_the_paper_are_read_too(model):
    inside, edge = np.zeros((2, SIDE, SIDE), np.uint8)
    for ink, left in ((inside, 12), (edge, 0)):  # a 5 of straight strokes, its roof apart
        ink[8:30, left : left + 5] = ink[25:48, left + 20 : left + 25] = 255
        ink[25:30, left : left + 24] = ink[44:48, left : left + 24] = ink[4:7, left + 9 : left + 28] = 255
    [(_, [expected])] = ask(DrawingPad(model, print), inside)
    [(_, [pixels])] = ask(DrawingPad(model, print), edge)
    assert pixels == expected


def test_picture_is_kept_when_a_stroke_ends(model):
    kept = []
    ask(DrawingPad(model, kept.append), draw_one(), finished=True)
    assert len(kept) == 1
    assert kept[0].pixels.sum() > 0


def test_refused_drawing_is_answered_with_the_reason(model):
    kept = []
    [(message, _)] = ask(DrawingPad(model, kept.append), np.zeros((SIDE, SIDE), np.uint8), 3, finished=True)
    assert message["sequence"] == 3, "without the number the browser would wait for ever"
    assert message["problem"]
    assert "probabilities" not in message
    assert kept == []


def test_errors_of_model_and_card_reach_the_browser(model):
    def fail(*_):
        raise OSError("disk on fire")

    broken = MLP((16,))
    broken.forward = fail
    [(message, _)] = ask(DrawingPad(broken, print), draw_one(), 5)
    assert message == {"sequence": 5, "problem": "OSError: disk on fire"}
    answer, problem = ask(DrawingPad(model, fail), draw_one(), 6, finished=True)
    assert "probabilities" in answer[0]
    assert problem[0] == {"sequence": 6, "problem": "OSError: disk on fire"}


def test_picture_of_wrong_size_is_an_error_and_not_a_silence(model):
    [(message, _)] = ask(DrawingPad(model, print), np.zeros(10, np.uint8))
    assert "Error" in message["problem"]


def test_saved_pad_has_words_for_readers_without_a_kernel(model):
    data, _ = DrawingPad(model, print)._repr_mimebundle_()
    assert "drawing pad" in data["text/plain"]
    assert "object at 0x" not in data["text/plain"]


@pytest.mark.parametrize(
    ("shell", "live"),
    [
        (None, False),
        (SimpleNamespace(), False),  # IPython in a terminal
        (SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=False)), False),  # nbclient, nbconvert
        (SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True)), True),  # Notebook, JupyterLab, VS Code
    ],
)
def test_is_live_where_somebody_could_type(monkeypatch, shell, live):
    monkeypatch.setattr(pad_module, "get_ipython", lambda: shell)
    assert is_live() is live


def test_nobody_there_leaves_only_the_card(model, shown):
    show_pad(model, torch.from_numpy(draw_one()[14:42, 14:42]))
    [card] = shown
    assert WIDGET not in card["data"]
    assert "image/png" in card["data"]
    assert "text/plain" in card["data"]


def test_card_below_the_pad_follows_the_drawing(model, shown, monkeypatch):
    pads = []
    monkeypatch.setattr(pad_module, "is_live", lambda: True)
    monkeypatch.setattr(pad_module, "DrawingPad", lambda *given: pads.append(DrawingPad(*given)) or pads[0])
    show_pad(model, torch.from_numpy(draw_one()[14:42, 14:42]))
    pad, card = shown
    assert WIDGET in pad["data"]
    assert WIDGET not in card["data"]
    ask(pads[0], draw_one(slant=18), finished=True)
    update = shown[2]
    assert update["update"] is True, "a new output would go nowhere from a widget"
    assert update["transient"] == card["transient"]
    assert as_bytes(update["data"]["image/png"]).startswith(b"\x89PNG")
    assert update["data"]["image/png"] != card["data"]["image/png"]


def as_bytes(png):
    return png if isinstance(png, bytes) else base64.b64decode(png)
