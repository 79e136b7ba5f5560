"""The drawing pad: write a digit, and see at once what the model reads.

It works with the stored network from section 1 on, in any cell of the notebook:

    from mnist_helpers.handwriting.pad import show_pad
    from mnist_helpers.model import load_model
    show_pad(load_model(data.PROJECT_ROOT / "model.pth"), test.images[0])
"""

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
MARGIN = 8  # white pixels added around it, or ink at the edge would count as a shadow
NO_PAD = "The drawing pad appears when this cell is run in a live notebook."


class DrawingPad(anywidget.AnyWidget):
    """A sheet of paper in the browser, whose drawing the model reads.

    The ink stays in the browser (pad.js). A question is 56x56 grey bytes and a number;
    its answer holds the same number, the ten probabilities, and the 28x28 bytes that
    the model saw. The next question is sent after the answer to the one before.

    Args:
        model: what reads the drawing.
        keep: called with the `Prediction` whenever a stroke has ended.
    """

    _esm = Path(__file__).with_name("pad.js")
    _css = Path(__file__).with_name("pad.css")

    def __init__(self, model: nn.Module, keep: Callable[[Prediction], None]):
        super().__init__()
        self.model = model
        self.keep = keep
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        return NO_PAD  # all that is left of the pad where no kernel runs

    def _answer(self, _widget, question: dict, buffers: list) -> None:
        number = question["sequence"]
        try:
            ink = np.frombuffer(buffers[0], np.uint8).reshape(SIDE, SIDE)
            drawing = 255 - np.pad(ink, MARGIN)  # dark ink on white paper
            prediction = predict_picture(self.model, drawing)
            probabilities = prediction.probabilities.tolist()
            answer = {"sequence": number, "probabilities": probabilities}
            self.send(answer, [prediction.pixels.numpy().tobytes()])
            if question["finished"]:
                self.keep(prediction)
        except PictureError as refusal:
            self.send({"sequence": number, "problem": str(refusal)})
        except Exception as error:  # Jupyter shows errors of widgets nowhere
            problem = f"{type(error).__name__}: {error}"
            self.send({"sequence": number, "problem": problem})


def is_live() -> bool:
    """Whether a person sits at the notebook and could draw.

    Programs that run a notebook from end to end offer no input from a keyboard.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return getattr(kernel, "_allow_stdin", False)


def show_pad(model: nn.Module, example: Tensor) -> None:
    """Show the drawing pad, and below it a card that stays in the saved notebook.

    The card holds the latest drawing, the 28x28 that the model saw of it, and the ten
    probabilities. Where nobody can draw, a line stands in the place of the pad.

    Args:
        model: what reads the drawing.
        example: `[28, 28] uint8`, what the card shows before any drawing.
    """
    card = DisplayHandle()  # made here: what a callback displays by itself goes nowhere
    if is_live():
        display(DrawingPad(model, card.update))
    else:
        display({"text/plain": NO_PAD}, raw=True)
    card.display(predict_picture(model, example))
