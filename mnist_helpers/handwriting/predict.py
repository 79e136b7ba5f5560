"""Which digit is in a picture; in a terminal: `python -m mnist_helpers.handwriting.predict photo.png ...`"""

import argparse
import sys
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import NUM_CLASSES, PROJECT_ROOT, TRANSFORM
from mnist_helpers.handwriting.picture import PictureError, normalise_picture, open_picture
from mnist_helpers.model import ModelError, load_model
from mnist_helpers.plots import BLUE, ORANGE, make_axes, render_png, show_image

VIEWS = 16  # a digit is read the same from all views, a scribble is not


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
        given.axis("off")
        show_image(seen, self.pixels, cmap="gray", vmin=0, vmax=255)
        seen.set_title("what the model sees")
        colours = [ORANGE if digit == self.digit else BLUE for digit in range(NUM_CLASSES)]
        bars.bar(range(NUM_CLASSES), self.probabilities.tolist(), color=colours)
        title = f"{self.digit} with {self.confidence:.1%}"
        bars.set(xticks=range(NUM_CLASSES), ylim=(0, 1), xlabel="digit", ylabel="probability", title=title)
        return figure

    def _repr_png_(self) -> tuple[bytes, dict]:
        return render_png(self.show()), {"alt": f"the picture, what the model sees, and its answer: {self!r}"}


@torch.no_grad()
def predict_probabilities(model: nn.Module, images: Tensor, views: int = 1, strength: float = 1.0) -> Tensor:
    """Probabilities `[10]` or `[batch, 10]`, on the CPU, for images `[28, 28]` or `[batch, 28, 28] uint8`."""
    # The softmax of the model's logits; with `views` above 1 the mean over that many random warps of each
    # image, of the given strength (see `RandomWarp`). The model is left in the mode it was in.
    training, device = model.training, next(model.parameters()).device
    warp = RandomWarp(strength, device=device) if views > 1 else nn.Identity()
    model.eval()
    answers = []
    try:
        for part in images.reshape(-1, *images.shape[-2:]).split(500):
            seen = TRANSFORM(warp(part.to(device).repeat_interleave(views, dim=0)))
            answers.append(model(seen).softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1).cpu())
    finally:
        model.train(training)
    return torch.cat(answers).reshape(*images.shape[:-2], NUM_CLASSES)


def predict_picture(model: nn.Module, source) -> Prediction:
    """The digit in any picture: a path, a PIL picture, an array and more, as `open_picture` reads them."""
    # The digit is the model's for the image as it is, the doubt that of `VIEWS` views: no other digit is
    # given more than that one. `PictureError` where there is nothing to read, or clearly no single digit.
    picture = open_picture(source)
    pixels = normalise_picture(picture)
    digit = predict_probabilities(model, pixels).argmax()
    views = predict_probabilities(model, pixels, VIEWS)
    shares = views.clamp(max=views[digit] * 0.999)
    shares[digit] = views[digit]
    return Prediction(shares / shares.sum(), pixels, picture)


def main(arguments: list[str] | None = None) -> int:
    """Print the answer for each file; the exit status is 1 if any was refused, 2 without a model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("files", nargs="+", help="photographs, scans or drawings of one digit each")
    parser.add_argument("--model", default=PROJECT_ROOT / "model.pth", help="by default the project's")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: for letters that the console lacks
    status = 0
    try:
        model = load_model(options.model)
        for file in options.files:
            try:
                print(f"{file}: {predict_picture(model, file)}")
            except PictureError as error:
                print(f"{file}: refused: {error}", file=sys.stderr)
                status = 1
    except ModelError as error:
        parser.error(str(error))
    return status


if __name__ == "__main__":
    sys.exit(main())
