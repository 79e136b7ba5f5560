"""The drawing pad: write a digit with mouse, pen or finger, and the ten probabilities move along."""

from collections.abc import Callable
from pathlib import Path

import anywidget
import numpy as np
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from torch import Tensor, nn

from mnist_helpers.handwriting.picture import PictureError
from mnist_helpers.handwriting.predict import Prediction, predict_picture

SIDE = 56  # pixels of the picture that the browser sends
MARGIN = 8  # pixels of paper added around it: a stroke at its edge must not be taken for a shadow


class DrawingPad(anywidget.AnyWidget):
    """A sheet of paper whose drawing `model` reads; `keep` gets the `Prediction` when a stroke ends."""

    # The ink stays in the browser (pad.js). It sends 56x56 grey bytes and a number, never a second
    # time before the answer: the 28x28 that the model sees, the ten probabilities, and the same number.

    _esm = Path(__file__).with_name("pad.js")
    _css = Path(__file__).with_name("pad.css")

    def __init__(self, model: nn.Module, keep: Callable[[Prediction], None]):
        super().__init__()
        self.model, self.keep = model, keep
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        return "The drawing pad: run this cell in a live notebook to draw."

    def _answer(self, _pad, question: dict, buffers: list) -> None:
        number = question["sequence"]
        try:
            ink = np.frombuffer(buffers[0], np.uint8).reshape(SIDE, SIDE)
            prediction = predict_picture(self.model, 255 - np.pad(ink, MARGIN))  # dark ink on white paper
            answer = {"sequence": number, "probabilities": prediction.probabilities.tolist()}
            self.send(answer, [prediction.pixels.numpy().tobytes()])
            if question["finished"]:
                self.keep(prediction)
        except PictureError as refusal:
            self.send({"sequence": number, "problem": str(refusal)})
        except Exception as error:  # Jupyter shows errors of widgets nowhere: the pad has to
            self.send({"sequence": number, "problem": f"{type(error).__name__}: {error}"})


def is_live() -> bool:
    """Whether a person sits at the notebook: programs that run notebooks take no input from a keyboard."""
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def show_pad(model: nn.Module, example: Tensor) -> None:
    """The drawing pad, and below it a card that stays in the saved notebook."""
    # The card shows the latest drawing, the 28x28 that the model saw of it and the ten probabilities;
    # before any drawing, those of `example [28, 28] uint8`. Where nobody can draw, there is only the card.
    card = DisplayHandle()  # made in the cell: what a widget displays by itself goes nowhere
    if is_live():
        display(DrawingPad(model, card.update))
    card.display(predict_picture(model, example))
