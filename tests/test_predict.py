"""From any picture to ten probabilities, measured on pictures that the tests make.

`python -m tests.test_predict 200` prints the table for 200 pictures of each kind.
"""

import io
import math
import sys
import time
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mnist_helpers.augment import RandomWarp
from mnist_helpers.data import PROJECT_ROOT, TRANSFORM, load_mnist
from mnist_helpers.model import MLP, load_model, save_model
from mnist_helpers.predict import PictureError, main, predict_picture, predict_probabilities

# --- Pictures of a digit: `ink [28, 28]` in 0..1 and a random generator -> something to read.


def to_bytes(grey) -> np.ndarray:
    return (np.clip(grey, 0, 1) * 255).round().astype(np.uint8)


def place(ink, height, width, scale=1.5, middle=None) -> np.ndarray:
    """The ink, enlarged by `scale`, around `middle` on a page of the given size."""
    side = max(4, round(28 * scale))
    how = Image.Resampling.BICUBIC if scale >= 1 else Image.Resampling.BOX
    down, right = middle or (height / 2, width / 2)
    page = Image.new("L", (width, height))
    page.paste(
        Image.fromarray(to_bytes(ink)).resize((side, side), how),
        (int(right - side / 2), int(down - side / 2)),
    )
    return np.asarray(page) / 255


def paint(ink, paper=0.9, pen=0.15):
    return paper + (pen - paper) * ink


def make_light(height, width, rng) -> np.ndarray:
    """A lamp on one side, a shadow with a hard edge, corners darker than the middle."""
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    lamp, edge = rng.uniform(0, 2 * np.pi, 2)
    light = 1 - 0.5 * (x * np.cos(lamp) + y * np.sin(lamp) + 0.5)
    inside = x * np.cos(edge) + y * np.sin(edge) > rng.uniform(-0.25, 0.25)
    light *= 1 - rng.uniform(0.2, 0.4) * ndimage.gaussian_filter(inside.astype(float), height / 100)
    return light * (1 - 0.4 * (x * x + y * y))


def black_on_white(ink, rng):
    return to_bytes(1 - ink)


def shifted(ink, rng):
    height, width = rng.integers(40, 120, 2)
    return to_bytes(1 - place(ink, height, width, 1, tuple(rng.uniform(14, (height - 14, width - 14)))))


def scaled(ink, rng):
    scale = math.exp(rng.uniform(math.log(0.3), math.log(3)))
    side = max(9, round(28 * scale))
    return to_bytes(1 - place(ink, side, side, scale))


def exif_rotated(ink, rng):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation: PIL's Transpose that leads to it
    orientation = int(rng.integers(2, 9))
    picture = Image.fromarray(to_bytes(1 - place(ink, 90, 60, 2))).transpose(undo[orientation])
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, "JPEG", exif=exif, quality=90)
    return Image.open(file)


def grey_paper(ink, rng):
    return to_bytes(paint(place(ink, 60, 60), rng.uniform(0.45, 0.85), rng.uniform(0.1, 0.3)))


def shaded_paper(ink, rng):
    page = paint(place(ink, 120, 160, 2.5, tuple(rng.uniform(40, 80, 2))), 0.9, rng.uniform(0.1, 0.3))
    return to_bytes(page * make_light(120, 160, rng))


def chalk(ink, rng):
    return 255 - shaded_paper(ink, rng)


def noisy(ink, rng):
    page = paint(place(ink, 56, 56)) + rng.normal(0, rng.uniform(0.05, 0.2), (56, 56))
    specks = rng.random(page.shape)
    return to_bytes(np.where(specks < 0.01, 0, np.where(specks > 0.99, 1, page)))


def transparent(ink, rng):
    layers = np.zeros((56, 56, 4), np.uint8)
    layers[..., :3] = rng.integers(0, 120, 3)
    layers[..., 3] = to_bytes(place(ink, 56, 56))
    return Image.fromarray(layers)


def sixteen_bit(ink, rng):
    return (paint(place(ink, 56, 56)) * rng.choice([65535, 30000, 4095])).astype(np.uint16)


def coloured(ink, rng):
    inks = [((1, 1, 0.9), (0.1, 0.2, 0.8)), ((1, 1, 1), (0.9, 0.1, 0.1)), ((1, 1, 1), (1, 0.8, 0))]
    paper, pen = rng.permutation(inks)[0]
    return to_bytes(paint(place(ink, 56, 56)[..., None], paper, pen))


def enlarge(ink) -> np.ndarray:
    return np.asarray(Image.fromarray(to_bytes(ink)).resize((112, 112), Image.Resampling.BICUBIC)) > 110


def thinned(ink, rng):
    strokes = enlarge(ink)
    depth = ndimage.distance_transform_edt(strokes)
    return to_bytes(1 - (depth > 0.55 * np.quantile(depth[strokes], 0.9)))


def thickened(ink, rng):
    return to_bytes(1 - (ndimage.distance_transform_edt(~np.pad(enlarge(ink), 8)) < rng.uniform(3, 5)))


def photograph(ink, rng, height=800, width=600):
    """A small digit somewhere on shadowed, grainy paper, a little out of focus, saved as JPEG."""
    middle = height * rng.uniform(0.35, 0.65), width * rng.uniform(0.35, 0.65)
    page = ndimage.gaussian_filter(paint(place(ink, height, width, rng.uniform(5, 14), middle), 0.85, 0.2), 2)
    page = page * make_light(height, width, rng) + rng.normal(0, 0.03, (height, width))
    file = io.BytesIO()
    Image.fromarray(to_bytes(page[..., None] * [1, 0.97, 0.9])).save(file, "JPEG", quality=85)
    return Image.open(file)


DIGITS = [black_on_white, shifted, scaled, exif_rotated, grey_paper, shaded_paper, chalk, noisy, transparent]
DIGITS += [sixteen_bit, coloured, thinned, thickened, photograph]

# --- Pictures of no digit: a random generator -> something to refuse.

FONTS = ["DejaVuSans", "DejaVuSerif-Italic", "DejaVuSans-BoldOblique", "cmmi10", "cmtt10", "DejaVuSansMono"]
UNLIKE_DIGITS = list(
    "ACEFHKMNPRTUWXYadefhkmnprtuwxy"
)  # without those that are a digit's twin: I l O S Z b g q ...


def write(text, rng) -> np.ndarray:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{rng.choice(FONTS)}.ttf", 60)
    left, top, right, bottom = font.getbbox(text)
    page = Image.new("L", (right - left + 30, bottom - top + 30), 255)
    ImageDraw.Draw(page).text((15 - left, 15 - top), text, font=font, fill=0)
    turned = page.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True, fillcolor=255)
    return np.asarray(turned)


def draw(points, width, height, thickness) -> np.ndarray:
    page = Image.new("L", (width, height), 255)
    ImageDraw.Draw(page).line([tuple(point) for point in points], fill=0, width=thickness)
    return np.asarray(page)


def word(rng):
    letters = [*UNLIKE_DIGITS, *"bcgijloqsvzBDGIJLOQSVZ"]
    return write("".join(rng.choice(letters, rng.integers(2, 7))), rng)


def cursive(rng):
    t, loops = np.linspace(0, 1, 300), 2 * np.pi * rng.uniform(2, 5)
    tall = rng.uniform(10, 25) * (1 + 0.4 * np.sin(17 * t + rng.uniform(0, 6)))
    points = np.stack([10 + t * 180 + 8 * np.sin(loops * t + 1), 45 + tall * np.sin(loops * t)], axis=1)
    return draw(points, 220, 90, 4)


def tangle(rng):
    corners = rng.uniform(10, 110, (rng.integers(8, 25), 2))
    return draw(
        ndimage.gaussian_filter1d(corners.repeat(12, 0), 5, axis=0), 120, 120, int(rng.integers(2, 6))
    )


def blank(rng):
    height, width = rng.integers(20, 200, 2)
    page = np.full((height, width), rng.uniform(0.3, 1))
    if rng.random() < 0.5:
        page = page * make_light(height, width, rng)
    if rng.random() < 0.7:
        page = page + rng.normal(0, rng.uniform(0.005, 0.1), page.shape)
    return to_bytes(page)


def texture(rng):
    side = int(rng.integers(28, 200))
    y, x = np.mgrid[:side, :side]
    period = rng.integers(3, side // 4)
    angle = rng.uniform(0, 3)
    clouds = ndimage.gaussian_filter(rng.normal(0, 1, (side, side)), rng.uniform(1, side / 15))
    grain = ndimage.gaussian_filter(rng.normal(0, 1, (side, side)), (1, side / 8))
    kinds = [
        rng.random((side, side)),
        0.5 + clouds / clouds.std() / 4,
        0.5 + grain / grain.std() / 5,
        (x // period + y // period) % 2,
        (x % period < period / 5) | (y % period < period / 5),
        0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period),
    ]
    return to_bytes(kinds[rng.integers(len(kinds))])


def single_letter(rng):
    return write(rng.choice(UNLIKE_DIGITS), rng)


NO_DIGITS = [blank, texture, word, cursive, tangle]


# --- Measuring.


def make_generator(kind) -> np.random.Generator:
    """Other digits for every kind, so that one strange digit does not count fourteen times."""
    return np.random.default_rng(zlib.crc32(kind.__name__.encode()))


def ask(model, picture):
    """The `Prediction`, or None where the picture is refused."""
    try:
        return predict_picture(model, picture)
    except PictureError:
        return None


def measure_digits(model, digits, kinds, count) -> dict[str, tuple[float, float]]:
    """For each kind: the fraction answered right, and the fraction refused."""
    table = {}
    for kind in kinds:
        rng = make_generator(kind)
        chosen = rng.choice(len(digits), count, replace=False)
        answers = [ask(model, kind(digits.images[i].numpy() / 255, rng)) for i in chosen]
        right = [
            a is not None and a.digit == label
            for a, label in zip(answers, digits.labels[chosen], strict=True)
        ]
        table[kind.__name__] = np.mean(right).item(), np.mean([a is None for a in answers]).item()
    return table


def measure_no_digits(model, kinds, count) -> dict[str, tuple[float, float]]:
    """For each kind: the fraction refused or answered with less than 60%, and the fraction refused."""
    table = {}
    for kind in kinds:
        rng = make_generator(kind)
        answers = [ask(model, kind(rng)) for _ in range(count)]
        doubted = [a is None or a.confidence < 0.6 for a in answers]
        table[kind.__name__] = np.mean(doubted).item(), np.mean([a is None for a in answers]).item()
    return table


def format_table(head: str, table: dict[str, tuple[float, float]]) -> str:
    rows = [f"{kind:16}{good:8.1%}{refused:10.1%}" for kind, (good, refused) in table.items()]
    good, refused = np.mean(list(table.values()), axis=0)
    return "\n".join([f"{'kind':16}{head:>8}{'refused':>10}", *rows, f"{'all':16}{good:8.1%}{refused:10.1%}"])


# --- The tests.


@pytest.fixture(scope="module")
def model():
    """The trained model that the notebook left."""
    path = PROJECT_ROOT / "model.pth"
    if not path.exists():
        pytest.skip("there is no model.pth yet: run the notebook")
    return load_model(path)


def test_97_of_100_digits_on_any_paper_are_right(model, mnist):
    table = measure_digits(model, mnist[1], DIGITS, 30)
    print(format_table("right", table))
    right, refused = np.mean(list(table.values()), axis=0)
    assert right >= 0.97, format_table("right", table)
    assert refused <= 0.01, format_table("right", table)
    assert min(right for right, _ in table.values()) >= 0.9, format_table("right", table)


def test_95_of_100_pictures_of_no_digit_are_refused_or_doubted(model):
    table = measure_no_digits(model, NO_DIGITS, 40)
    print(format_table("doubted", table))
    assert np.mean(list(table.values()), axis=0)[0] >= 0.95, format_table("doubted", table)


def test_photograph_of_twelve_megapixels(model, mnist):
    digit = mnist[1][0]
    photo = photograph(digit.images.numpy() / 255, np.random.default_rng(1)).resize((3000, 4000))
    file = io.BytesIO()
    photo.save(file, "JPEG")
    start = time.process_time()
    prediction = predict_picture(model, Image.open(file))
    assert time.process_time() - start < 1
    assert prediction.digit == digit.labels


def test_probabilities_are_the_softmax_of_the_logits():
    model = MLP((16,), dropout=0.5)
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        wanted = F.softmax(model.eval()(TRANSFORM(images)), dim=1)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(predict_probabilities(model, images), wanted)
        torch.testing.assert_close(predict_probabilities(model, images[2]), wanted[2])
        assert model.training is training


@pytest.fixture
def stroke() -> np.ndarray:
    page = np.full((60, 40), 255, np.uint8)
    page[10:50, 18:23] = 0
    return page


@pytest.fixture
def sure_of_four() -> MLP:
    """A model that answers 4 with 70%, then 9 with 20%, whatever it sees."""
    model = MLP((8,)).eval()
    probabilities = torch.full((10,), 0.1 / 8)
    probabilities[4], probabilities[9] = 0.7, 0.2
    with torch.no_grad():
        model.layers[-1].weight.zero_()
        model.layers[-1].bias.copy_(probabilities.log())
    return model


def test_prediction_shows_itself(sure_of_four, stroke):
    prediction = predict_picture(sure_of_four, stroke)
    assert (prediction.digit, prediction.picture.size) == (4, (40, 60))
    assert prediction.confidence == pytest.approx(0.7)
    assert repr(prediction) == "4 with 70.0% (second guess: 9 with 20.0%)"
    figure = prediction.show()
    assert isinstance(figure, Figure)
    given, seen, bars = figure.axes
    assert given.images[0].get_array().shape == (60, 40, 3)
    np.testing.assert_array_equal(seen.images[0].get_array(), prediction.pixels)
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, prediction.probabilities)
    drawn, metadata = prediction._repr_png_()
    assert Image.open(io.BytesIO(drawn)).width > 400
    assert "4 with 70.0%" in metadata["alt"]


class InkCounter(torch.nn.Module):
    """The more ink, the surer it is of a 1: a model whose answers to warped views differ."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, pixels):
        return torch.nn.functional.pad((pixels.sum(dim=1) * self.scale)[:, None], (1, 8))


def test_averaged_views_are_the_mean_over_warps(toy):
    counter, images, knobs = InkCounter(), toy.images[:4], {"strength": 0.5, "shift": 4.0, "elastic": 0.0}
    warp = RandomWarp(**knobs)
    expected = counter(TRANSFORM(warp(images.repeat_interleave(3, 0)))).softmax(dim=1)
    averaged = predict_probabilities(counter, images, views=3, **knobs)
    torch.testing.assert_close(averaged, expected.detach().view(4, 3, 10).mean(dim=1))
    assert (averaged - predict_probabilities(counter, images)).abs().max() > 1e-4
    assert torch.equal(averaged, predict_probabilities(counter, images, views=3, **knobs))


def test_command_line_prints_answers_and_refusals(sure_of_four, stroke, tmp_path, capsys):
    model, good, blank_page = (str(tmp_path / name) for name in ("model.pth", "good.png", "blank.png"))
    save_model(sure_of_four, model)
    Image.fromarray(stroke).save(good)
    Image.fromarray(np.full_like(stroke, 255)).save(blank_page)
    assert main([good, "--model", model]) == 0
    assert capsys.readouterr() == (f"{good}: 4 with 70.0% (second guess: 9 with 20.0%)\n", "")
    assert main([blank_page, good, "--model", model]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: 4")
    assert err.startswith(f"{blank_page}: refused: nothing stands out")
    assert err.count("\n") == 1
    assert main([good, "--model", str(tmp_path / "none.pth")]) == 2
    assert "none.pth cannot be read" in capsys.readouterr().err


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    trained, (_, test) = load_model(PROJECT_ROOT / "model.pth"), load_mnist(download=False)
    print(format_table("right", measure_digits(trained, test, DIGITS, count)), end="\n\n")
    print(format_table("doubted", measure_no_digits(trained, [*NO_DIGITS, single_letter], count)))
