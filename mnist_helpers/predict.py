"""Which digit is in a picture, and how sure the model is.

In a terminal: `python -m mnist_helpers.predict photo.png ...`
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import NUM_CLASSES, PROJECT_ROOT, TRANSFORM
from mnist_helpers.model import ModelError, load_model
from mnist_helpers.picture import PictureError, normalise_picture, open_picture
from mnist_helpers.plots import BLUE, ORANGE, make_axes, render_png

VIEWS, VIEW_STRENGTH = 16, 0.8  # a digit is read the same from all views, a scribble is not


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The model's answer to one picture; as the last line of a notebook's cell it draws itself."""

    probabilities: Tensor  # [10] float32, sum 1
    pixels: Tensor  # [28, 28] uint8: what the model saw
    picture: Image.Image  # as given, but upright, and reduced if it was large

    @property
    def digit(self) -> int:
        """The most probable digit."""
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        """The probability of `digit`, a fraction."""
        return self.probabilities.max().item()

    def __repr__(self) -> str:
        (first, second), digits = (part.tolist() for part in self.probabilities.topk(2))
        return f"{digits[0]} with {first:.1%} (second guess: {digits[1]} with {second:.1%})"

    def show(self) -> Figure:
        """The picture as given, the 28x28 that the model saw, and the ten probabilities as bars."""
        figure, (given, seen, bars) = make_axes(1, 3, (8, 2.6), width_ratios=[1, 1, 1.6])
        given.imshow(self.picture)
        given.set_title("the picture")
        seen.imshow(self.pixels.numpy(), cmap="gray", vmin=0, vmax=255)
        seen.set_title("what the model sees")
        colours = [ORANGE if digit == self.digit else BLUE for digit in range(NUM_CLASSES)]
        bars.bar(range(NUM_CLASSES), self.probabilities.tolist(), color=colours)
        bars.set(xticks=range(NUM_CLASSES), ylim=(0, 1), xlabel="digit", ylabel="probability")
        bars.set_title(f"{self.digit} with {self.confidence:.1%}")
        for axes in (given, seen):
            axes.axis("off")
        return figure

    def _repr_png_(self) -> tuple[bytes, dict]:
        return render_png(self.show()), {"alt": f"the picture, what the model sees, and its answer: {self!r}"}


@torch.no_grad()
def predict_probabilities(
    model: nn.Module, pixels: Tensor, views: int = 1, strength: float = VIEW_STRENGTH, **deviations: float
) -> Tensor:
    """Probabilities `[10]` or `[batch, 10]` for `[28, 28]` or `[batch, 28, 28] uint8` in MNIST's form.

    The softmax of the model's logits; with `views` above 1 the mean over that many random warps of each
    picture, of the given strength and largest deviations (see `RandomWarp`). The model is left in the mode it
    was in.
    """
    training, device = model.training, next(model.parameters()).device
    batch = pixels if pixels.ndim > 2 else pixels[None]
    warp = RandomWarp(strength, **deviations) if views > 1 else nn.Identity()
    model.eval()
    answers = []
    for part in batch.split(500):
        seen = TRANSFORM(warp(part.repeat_interleave(views, dim=0))).to(device)
        answers.append(model(seen).softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1).cpu())
    model.train(training)
    probabilities = torch.cat(answers)
    return probabilities if pixels.ndim > 2 else probabilities[0]


def predict_picture(model: nn.Module, source) -> Prediction:
    """The digit in any picture: a path, a PIL picture, or an array or tensor, as `open_picture` reads them.

    Raises `PictureError` where there is nothing to read, or clearly something else than one digit.
    """
    picture = open_picture(source)
    pixels = normalise_picture(picture)
    return Prediction(predict_probabilities(model, pixels, VIEWS), pixels, picture)


def main(arguments: list[str] | None = None) -> int:
    """Print the answer for each file; the exit status is 1 if any was refused."""
    parser = argparse.ArgumentParser(prog="python -m mnist_helpers.predict", description=main.__doc__)
    parser.add_argument("files", nargs="+", help="photographs, scans or drawings of one digit each")
    parser.add_argument(
        "--model", default=PROJECT_ROOT / "model.pth", help="default: the project's model.pth"
    )
    options = parser.parse_args(arguments)
    try:
        model = load_model(options.model)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    status = 0
    for file in options.files:
        try:
            print(f"{file}: {predict_picture(model, file)}")
        except PictureError as error:
            print(f"{file}: refused: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
