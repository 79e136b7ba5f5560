"""Which digit is in a picture.

In a terminal: `python -m mnist_helpers.handwriting.predict photo.png ...`
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from mnist_helpers.augment import warp_digits
from mnist_helpers.data import NUM_CLASSES, PROJECT_ROOT, TRANSFORM
from mnist_helpers.evaluation import evaluate
from mnist_helpers.handwriting.page import PictureError
from mnist_helpers.handwriting.picture import find_readings, open_picture
from mnist_helpers.model import ModelError, load_model
from mnist_helpers.plots import BLUE, ORANGE, NotebookFigure, make_axes

VIEWS = 16  # a digit is read the same from all views, a scribble is not
FLOOR = 1.2  # a soft lower limit of the logits: where all are low, none is sure
SURE = 0.5  # a probability; what is likelier than all else is not looked at again


@dataclass(frozen=True, eq=False)
class Prediction:
    """A model's answer to one picture; it draws itself as the last line of a cell.

    probabilities: `[10] float32`, of the digits 0 to 9; their sum is 1.
    pixels: `[28, 28] uint8`, what the model saw.
    picture: as given, but upright, and reduced if it was large.
    """

    probabilities: Tensor
    pixels: Tensor
    picture: Image.Image

    @property
    def digit(self) -> int:
        """The most probable digit."""
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        """The probability of `digit`, a fraction."""
        return self.probabilities.max().item()

    def __repr__(self) -> str:
        values, digits = self.probabilities.topk(2)
        second = f"{digits[1]} with {values[1]:.1%}"
        return f"{self.digit} with {self.confidence:.1%} (second guess: {second})"

    def show(self) -> NotebookFigure:
        """The picture, the 28x28 that the model saw, and the ten probabilities."""
        figure, (given, seen, bars) = make_axes(
            1, 3, (8, 2.6), width_ratios=[1, 1, 1.6]
        )
        given.imshow(self.picture)
        given.set_title("the picture")
        seen.imshow(self.pixels.numpy(), cmap="gray", vmin=0, vmax=255)
        seen.set_title("what the model sees")
        given.axis("off")
        seen.axis("off")
        drawn = bars.bar(range(NUM_CLASSES), self.probabilities.tolist(), color=BLUE)
        drawn[self.digit].set_color(ORANGE)
        bars.set(
            title=f"{self.digit} with {self.confidence:.1%}",
            xlabel="digit",
            xticks=range(NUM_CLASSES),
            ylabel="probability",
            ylim=(0, 1),
        )
        return figure

    def _repr_png_(self) -> bytes:
        return self.show()._repr_png_()


def predict_picture(model: nn.Module, source) -> Prediction:
    """Read the digit in any picture.

    While the answer is not sure, the picture is looked at in another way; the surest
    answer counts.

    Args:
        model: Any model of `[batch, 784] float32`; it is left as it is.
        source: A path, a PIL picture, an array and more: see `open_picture`.

    Raises:
        PictureError: There is nothing to read, or clearly no single digit.
    """
    picture = open_picture(source)
    answers = []
    try:
        for pixels in find_readings(picture):
            answer = Prediction(find_probabilities(model, pixels), pixels, picture)
            answers.append(answer)
            if answer.confidence > SURE:
                break
    except PictureError:
        if not answers:
            raise
    return max(answers, key=lambda answer: answer.confidence)


def find_probabilities(model: nn.Module, pixels: Tensor) -> Tensor:
    """The ten probabilities for an image `[28, 28] uint8`, `[10] float32`.

    They are means over `VIEWS` slightly warped views of it, always the same ones. Where
    the logits of all ten digits are small, little looks like any of them, and none is
    sure (compare Liu et al. 2020, "Energy-based out-of-distribution detection").
    """
    generator = torch.Generator().manual_seed(0)
    views = warp_digits(pixels.expand(VIEWS, -1, -1), 0.5, generator)
    batch = TRANSFORM(views), torch.zeros(VIEWS)  # there are no labels
    logits = evaluate(model, [batch]).logits  # [VIEWS, 10]
    floored = logits.logaddexp(torch.tensor(FLOOR))  # a soft maximum
    return floored.softmax(dim=1).mean(dim=0)


def main(arguments: list[str] | None = None) -> int:
    """Print the answer for each file.

    The exit status is 1 if any was refused, 2 without a model.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+", help="pictures of one digit each")
    parser.add_argument(
        "--model", default=PROJECT_ROOT / "model.pth", help="by default the project's"
    )
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # for letters the console lacks
    try:
        model = load_model(options.model)
    except ModelError as error:
        parser.error(str(error))
    status = 0
    for file in options.files:
        try:
            print(f"{file}: {predict_picture(model, file)}")
        except Exception as error:  # whatever it is, the other files are read
            print(f"{file}: refused: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
