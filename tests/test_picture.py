"""Pictures of every kind come out as MNIST's makers would have made them, or not."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image, ImageDraw
from scipy import ndimage

from mnist_helpers.data import TRANSFORM, Digits
from mnist_helpers.handwriting.page import PictureError, find_box
from mnist_helpers.handwriting.picture import (
    fit_box,
    normalise_picture,
    open_picture,
)

SEVEN = np.full((80, 60), 255, np.uint8)  # dark ink on white paper
SEVEN[20:26, 15:45] = 20
for row in range(26, 65):
    SEVEN[row, 39 - (row - 26) // 2 : 45 - (row - 26) // 2] = 20


def assert_same_digit(source, wanted, tolerance=6.0):
    """The pictures look alike to the model; two different digits differ by about 40."""
    first, second = (normalise_picture(part).float() for part in (source, wanted))
    difference = (first - second).abs().mean()
    assert difference < tolerance, f"mean difference {difference:.1f} of 255"


def save(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def test_result_has_the_form_of_mnist():
    pixels = normalise_picture(SEVEN)
    assert (pixels.shape, pixels.dtype) == ((28, 28), torch.uint8)
    rows, columns = (pixels.any(dim=dim).nonzero() for dim in (1, 0))
    assert len(rows) == 20
    assert len(columns) == pytest.approx(20 * 30 / 45, abs=1.1)  # as it was drawn
    assert np.abs(np.subtract(ndimage.center_of_mass(pixels.numpy()), 14)).max() < 0.51
    assert pixels.max() >= 250
    assert ((pixels > 30) & (pixels < 220)).any(), "edges are grey"


def test_mnist_digits_come_back_unchanged(mnist):
    errors = []
    for image in mnist[1].images[:100]:
        assert torch.equal(normalise_picture(image), image)
        spread = image * (255 / image.max())
        assert torch.equal(normalise_picture(image / 255), spread.round().byte())
        paper = Image.fromarray(255 - image.numpy()).resize((140, 140))
        errors.append((normalise_picture(paper).float() - image).abs().mean())
    assert np.median(errors) < 10


def test_exif_orientation_is_undone():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = Image.fromarray(np.rot90(SEVEN))
    file = save(turned, "PNG", exif=exif)
    assert torch.equal(normalise_picture(file), normalise_picture(SEVEN))


GREY = SEVEN / 255
WIDE = SEVEN.astype(np.uint16) * 257
COLOURS = np.stack([SEVEN] * 3, axis=2)
PINK = np.where(COLOURS < 100, [255, 142, 180], 180).astype(np.uint8)  # as bright
LAYERS = np.zeros((80, 60, 4), np.uint8)
LAYERS[..., 3] = 255 - SEVEN
RED = LAYERS + np.array([200, 30, 30, 0], np.uint8)
DIGIT = normalise_picture(SEVEN)
SOURCES = {
    "one digit": Digits(DIGIT, torch.tensor(7)),
    "transformed": TRANSFORM(DIGIT),
    "inverted": 255 - SEVEN,
    "bool": SEVEN > 100,
    "mask": (SEVEN > 100).astype(np.int64),
    "16 bit": WIDE,
    "16-bit PNG": save(Image.fromarray(WIDE), "PNG"),
    "12 bit": WIDE // 16,
    "float": GREY,
    "a hair above 1": GREY * 1.0000002,
    "overshoots": GREY * 1.08 - 0.04,
    "-1..1": GREY * 2 - 1,
    "normalised": (GREY - 0.1307) / 0.3081,
    "list": SEVEN.tolist(),
    "RGB": COLOURS,
    "channels first": torch.from_numpy(COLOURS).permute(2, 0, 1),
    "batch of one": torch.from_numpy(SEVEN)[None, None],
    "bfloat16": torch.from_numpy(SEVEN).bfloat16(),
    "needs gradient": torch.from_numpy(GREY).requires_grad_(),
    "palette": Image.fromarray(SEVEN).convert("P"),
    "one bit": Image.fromarray(SEVEN).convert("1", dither=Image.Dither.NONE),
    "CMYK": Image.fromarray(COLOURS).convert("CMYK"),
    "as bright as the paper": PINK,
    "black, transparent": save(Image.fromarray(LAYERS), "PNG"),
    "white, transparent": LAYERS + np.array([255, 255, 255, 0], np.uint8),
    "red, transparent": RED,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_depth_and_colour_gives_the_same_digit(name):
    assert_same_digit(SOURCES[name], SEVEN)


def test_opaque_picture_may_have_a_transparent_margin():
    for page, paper in ((SEVEN, 255), (255 - SEVEN, 0)):
        layers = np.stack([page, page, page, np.full_like(page, 255)], axis=2)
        margin = np.pad(layers, ((0, 9), (9, 0), (0, 0)))  # transparent black
        opened = np.asarray(open_picture(margin))
        assert (opened[-9:] == paper).all()
        assert_same_digit(margin, SEVEN)


def test_place_size_light_and_specks_do_not_matter():
    page = np.full((300, 400), 255)
    page[180:260, 300:360] = SEVEN
    page[30:32, 50:52] = page[270:272, 20:23] = 0
    assert_same_digit(page, SEVEN, 18)
    larger = Image.fromarray(SEVEN).resize((180, 240), Image.Resampling.BICUBIC)
    assert_same_digit(larger, SEVEN, 18)
    shaded = np.pad(SEVEN, ((40, 40), (70, 70)), mode="edge") * np.linspace(1, 0.6, 200)
    shaded[:, :95] *= 0.65  # a hard edge across the digit
    assert_same_digit(shaded.astype(np.uint8), SEVEN, 18)


def thin_or_thick(pen):
    """The mean thickness of the upright stroke of a 7, in pixels of MNIST."""
    mask = np.zeros((60, 60), bool)
    mask[:pen] = mask[:, 60 - pen :] = True
    return fit_box(mask)[14:20].sum(dim=1).float().mean().item() / 255


def test_stroke_thickness_is_brought_near_mnist():
    assert thin_or_thick(1) == pytest.approx(1.5, abs=0.05)
    assert thin_or_thick(8) == pytest.approx(8 / 60 * 20, abs=0.1), "as it was"
    assert thin_or_thick(18) == pytest.approx(4.7, abs=0.1)


def count_pieces(pixels):
    return ndimage.label(pixels.numpy() > 60, np.ones((3, 3)))[1]


def test_gaps_narrower_than_a_stroke_are_bridged():
    broken = SEVEN.copy()
    broken[40:43] = broken[52:55] = 255
    pixels, whole = normalise_picture(broken), normalise_picture(SEVEN)
    assert count_pieces(pixels) == 1
    assert pixels.sum().item() == pytest.approx(whole.sum().item(), rel=0.2)
    dots = np.full((130, 90), 255, np.uint8)
    for share in np.linspace(0, 1, 10):
        for y, x in ((12, 10 + 58 * share), (12 + 96 * share, 68 - 40 * share)):
            dots[int(y) : int(y) + 6, int(x) : int(x) + 6] = 0
    assert count_pieces(normalise_picture(dots)) == 1


def test_hollow_strokes_are_filled_and_loops_are_not():
    y, x = np.mgrid[:120, :120] - 59.5
    ring = np.hypot(x / 0.8, y)
    for outline in (abs(ring - 40) < 10, abs(abs(ring - 40) - 8) < 2):
        pixels = normalise_picture(~outline)
        assert pixels[14, 14] < 100
        assert (pixels[14] > 150).sum() > 4
    one = np.maximum(abs(x) - 10, abs(y) - 45)  # the outline of a stem
    assert normalise_picture(abs(one) > 1.5)[14, 14] > 200


def refuses(reason, *boxes):
    """Whether that is why filled boxes, `top, bottom, left, right`, are no digit."""
    mask = np.zeros((100, 100), bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    try:
        fit_box(mask[find_box(mask)])
    except PictureError as error:
        return reason in str(error)
    return False


def first(found, *numbers):
    return next(number for number in range(*numbers) if found(number))


def test_what_is_no_digit_is_refused_with_the_reason():
    left = (0, 100, 0, 10)
    assert first(lambda x: refuses("several", left, (0, 100, x, x + 10)), 11, 50) == 21
    assert first(lambda y: not refuses("several", left, (y, 100, 50, 60)), 1, 99) == 62
    assert first(lambda y: not refuses("too wide", (0, y, 0, 100)), 20, 90) == 51
    assert first(lambda x: refuses("a blot", (0, 100, 0, x)), 5, 99) == 83
    bars = [(y, y + 5, 20, 60) for y in range(0, 100, 25)]
    assert (refuses("pieces", *bars[:3]), refuses("pieces", *bars)) == (False, True)
    ladder = [(0, 100, 0, 6), (0, 100, 54, 60)]
    ladder += [(y, y + 6, 0, 60) for y in (0, 24, 48, 72)]
    assert (refuses("tangled", *ladder[:5]), refuses("tangled", *ladder)) == (
        False,
        True,
    )
    comb = [(0, 100, 0, 4), *[(y, y + 4, 0, 100) for y in (0, 32, 64, 96)]]
    assert (refuses("tangled", *comb[:4]), refuses("tangled", *comb)) == (False, True)


def test_unreadable_files_are_refused_by_name(tmp_path):
    with pytest.raises(
        PictureError, match=r"missing\.png cannot be read \(No such file"
    ):
        open_picture(tmp_path / "missing.png")
    file = tmp_path / "seven.png"
    Image.fromarray(SEVEN).save(file)
    content = file.read_bytes()
    for damaged in (b"", b"<html>", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(
            PictureError, match=r"seven\.png cannot .*is it a PNG or JPEG"
        ):
            open_picture(file)
        with pytest.raises(PictureError, match=r"the picture cannot be read"):
            open_picture(damaged)


def test_content_of_a_file_is_read_like_the_file(tmp_path):
    path = tmp_path / "seven.png"
    Image.fromarray(SEVEN).save(path)
    content, wanted = path.read_bytes(), normalise_picture(SEVEN)
    with path.open("rb") as opened:
        for source in (path, str(path), content, bytearray(content), opened):
            assert torch.equal(normalise_picture(source), wanted)


def test_huge_pictures_are_read_or_refused_for_their_size(monkeypatch):
    """Pillow warns of more than 89 megapixels and refuses twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert open_picture(save(Image.fromarray(SEVEN), "PNG")).size == (60, 80)
    larger = save(Image.fromarray(SEVEN).resize((120, 160)), "PNG")
    with pytest.raises(PictureError, match=r"Image size .*not huge"):
        open_picture(larger)
    assert open_picture(Image.new("L", (4000, 3000))).size == (500, 375)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "expected numbers"),
        ("\0", "cannot be read"),
        (np.zeros(700), "expected numbers"),
        (np.zeros((0, 5)), "expected numbers"),
        (np.zeros((9, 9, 5)), "expected numbers"),
        (np.zeros((9, 9), complex), "expected numbers"),
        ([[1, 2], [3]], "cannot be read"),
        (np.where(SEVEN > 99, 1, np.nan), "finite numbers"),
        (np.eye(56).reshape(4, 28, 28), "a batch of 4"),
        (np.eye(56).reshape(4, 1, 28, 28)[:3], "a batch of 3"),
        (Digits(torch.eye(56).view(4, 28, 28), torch.arange(4)), "a batch of 4"),
    ],
)
def test_what_is_no_picture_is_refused(source, reason):
    with pytest.raises(PictureError, match=reason):
        open_picture(source)


# --- Whatever the picture, there is a digit or a `PictureError`.


def read(source):
    try:
        pixels = normalise_picture(source)
    except PictureError as error:
        assert len(error.args[0]) > 20  # noqa: PT017
        return
    assert pixels.shape == (28, 28)
    assert pixels.max() > 100


any_array = scalar_dtypes().flatmap(
    lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=4, max_side=30))
)


@settings(deadline=None, derandomize=True, max_examples=100, database=None)
@given(any_array)
def test_any_array_gives_a_digit_or_a_reason(source):
    read(source)


@settings(deadline=None, derandomize=True, max_examples=100, database=None)
@given(st.integers(1, 800), st.integers(1, 800), st.integers(0, 10**6))
def test_any_lines_give_a_digit_or_a_reason(width, height, seed):
    rng = np.random.default_rng(seed)
    page = Image.new("L", (width, height), int(rng.integers(256)))
    pencil = ImageDraw.Draw(page)
    for draw in rng.choice([pencil.line, pencil.rectangle], rng.integers(7)):
        left, right = sorted(rng.integers(-20, width + 20, 2).tolist())
        ends = sorted(rng.integers(-20, height + 20, 2).tolist())
        tone, pen = rng.integers((0, 1), (256, 3 + min(width, height) // 4)).tolist()
        draw([left, ends[0], right, ends[1]], tone, width=pen)
    read(np.asarray(page) + rng.normal(0, rng.uniform(0, 9), (height, width)))


def test_light_stroke_in_a_tall_dark_picture():
    page = Image.new("L", (60, 400), 60)
    ImageDraw.Draw(page).line([(50, 24), (12, 376)], fill=230, width=12)
    assert normalise_picture(page)[4:24].any(dim=1).all()
