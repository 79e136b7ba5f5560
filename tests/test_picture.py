"""Pictures of every kind come out as MNIST's makers would have made them, or not."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image, ImageDraw
from scipy.ndimage import center_of_mass

from mnist_helpers.data import TRANSFORM, Digits
from mnist_helpers.handwriting.page import PictureError, find_box
from mnist_helpers.handwriting.picture import (
    LOOKS,
    find_readings,
    fit_box,
    open_picture,
)

PAPER = Image.new("L", (60, 80), 255)
ImageDraw.Draw(PAPER).line([(16, 23), (42, 23), (22, 64)], fill=20, width=6)
SEVEN = np.asarray(PAPER)


def save(page, **options):
    file = io.BytesIO()
    Image.fromarray(page).save(file, "PNG", **options)
    return file


def normalise(source):
    """The likeliest reading."""
    return next(find_readings(open_picture(source)))


def test_result_has_the_form_of_mnist():
    pixels = normalise(SEVEN).numpy()
    assert (pixels.shape, pixels.dtype) == ((28, 28), np.uint8)
    height, width = pixels[find_box(pixels > 0)].shape
    assert height == 20
    assert width == pytest.approx(20 * 32 / 48, abs=1)  # as it was drawn
    assert center_of_mass(pixels) == pytest.approx((14, 14), abs=0.51)
    assert pixels.max() >= 250
    assert ((pixels > 30) & (pixels < 220)).any(), "edges are grey"


def test_mnist_digits_come_back_unchanged(mnist):
    errors = []
    for image in mnist[1].images[[*range(50), 4530]]:  # the last is 19 pixels high
        assert torch.equal(normalise(image), image)
        moved = image.roll(2, 1)
        assert not torch.equal(normalise(moved), moved)  # it is centred
        paper = Image.fromarray(255 - image.numpy()).resize((140, 140))
        errors.append((normalise(paper).float() - image).abs().mean())
    assert np.median(errors) < 10


GREY = SEVEN / 255
WIDE = SEVEN.astype(np.uint16) * 257
COLOURS = np.dstack([SEVEN] * 3)
PINK = np.where(COLOURS < 100, [255, 142, 180], 180).astype(np.uint8)  # as bright
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned clockwise
DIGIT = normalise(SEVEN)


def ink_alone(colour):
    layers = np.full((80, 60, 4), [*colour, 0], np.uint8)
    layers[..., 3] = 255 - SEVEN
    return layers


SOURCES = {
    "one digit": Digits(DIGIT, torch.tensor(7)),
    "transformed": TRANSFORM(DIGIT),
    "inverted": 255 - SEVEN,
    "bool": SEVEN > 100,
    "mask": (SEVEN > 100).astype(np.uint8),
    "turned": save(np.rot90(SEVEN), exif=EXIF),
    "16-bit PNG": save(WIDE),
    "overshoots": GREY * 1.08 - 0.04,
    "-1..1": GREY * 2 - 1,
    "channels first": torch.from_numpy(COLOURS).permute(2, 0, 1)[None],
    "bfloat16 with gradient": torch.tensor(GREY).bfloat16().requires_grad_(),
    "palette": PAPER.convert("P"),
    "as bright as the paper": PINK,
    "black, transparent": save(ink_alone([0, 0, 0])).getvalue(),
    "white, transparent": ink_alone([255, 255, 255]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_depth_and_colour_gives_the_same_digit(name):
    """Two different digits differ by about 40."""
    pixels = normalise(SOURCES[name]).float()
    assert (pixels - DIGIT).abs().mean() < 6


def read_all(source):
    """All readings of a picture, and why it has no more."""
    readings = []
    try:
        for pixels in find_readings(open_picture(source)):
            readings.append(pixels)
    except PictureError as error:
        return readings, str(error)
    return readings, ""


def test_other_looks_follow_the_likeliest():
    readings, reason = read_all(SEVEN)
    assert torch.equal(readings[0], DIGIT)
    assert (len(readings), reason) == (len(LOOKS), "")
    assert len(read_all(DIGIT)[0]) == 1  # it has the form of MNIST
    photo = np.pad(np.pad(SEVEN, 60, constant_values=255), 60)  # a sheet on a table
    assert len(read_all(photo)[0]) > len(LOOKS)  # the whole photo, too


def test_refused_shape_is_looked_at_again():
    pieces = np.full((100, 60), 255, np.uint8)
    pieces[10:90, 25:33] = 160
    for top in range(10, 90, 24):
        pieces[top : top + 8, 25:33] = 0
    readings, reason = read_all(pieces)
    assert 0 < len(readings) < len(LOOKS)
    assert "several" in reason


def test_opaque_picture_may_have_a_transparent_margin():
    for page, paper in ((SEVEN, 255), (255 - SEVEN, 0)):
        opaque = Image.fromarray(page).convert("RGBA")
        opened = open_picture(np.pad(opaque, ((0, 9), (9, 0), (0, 0))))
        assert (np.asarray(opened)[-9:] == paper).all()


def fill(boxes):
    """A mask of filled boxes, `top, bottom, left, right`."""
    mask = np.zeros((100, 100), bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask[find_box(mask)]


def test_stroke_thickness_is_brought_near_mnist():
    for pen, thickness in ((1, 1.5), (8, 2.7), (18, 4.7)):
        pixels = fit_box(fill([(0, pen, 0, 60), (0, 60, 60 - pen, 60)]))
        stem = pixels[14:20].sum(dim=1) / 255
        assert stem.mean() == pytest.approx(thickness, abs=0.1)


def test_gaps_narrower_than_a_stroke_are_bridged():
    stroke = [(0, 60, 50, 60), (66, 100, 50, 60)]
    dots = [(y, y + 6, 50, 56) for y in range(0, 100, 12)]
    for boxes in (stroke, dots):
        assert fit_box(fill(boxes))[5:23, 14].min() > 100


@pytest.mark.parametrize(
    ("width", "top", "left", "is_filled"),
    [  # the width of a stroke, how far inside its hole begins, is it filled
        (30, 2, 2, True),
        (32, 2, 2, False),  # a 0
        (20, 6, 6, True),
        (20, 7, 7, False),  # between thick lines
    ],
)
def test_hollow_strokes_are_filled_and_loops_are_not(width, top, left, is_filled):
    mask = np.ones((100, width), bool)
    mask[top:-top, left:-left] = False
    assert (fit_box(mask)[14, 14] > 200) == is_filled


LEFT = (0, 100, 0, 10)
STEM = (0, 100, 54, 60)
THIN = (0, 100, 0, 4)
BARS = [(y, y + 5, 20, 60) for y in range(0, 100, 25)]
RUNGS = [(y, y + 6, 0, 60) for y in range(0, 73, 24)]
TEETH = [(y, y + 4, 0, 100) for y in range(0, 97, 32)]


@pytest.mark.parametrize(
    "boxes",
    [
        [LEFT, (0, 100, 20, 30)],
        [(0, 51, 0, 100)],
        BARS[:3],
        [LEFT, STEM, *RUNGS[:3]],
        [THIN, *TEETH[:3]],
    ],
)
def test_one_digit_is_not_refused(boxes):
    assert fit_box(fill(boxes)).max() > 200


@pytest.mark.parametrize(
    ("reason", "boxes"),
    [
        ("several", [LEFT, (0, 100, 21, 31)]),
        ("several", [LEFT, (62, 100, 50, 60)]),
        ("too wide", [(0, 50, 0, 100)]),
        ("pieces", BARS),
        ("tangled", [LEFT, STEM, *RUNGS]),
        ("tangled", [THIN, *TEETH]),
    ],
)
def test_what_is_no_digit_is_refused_with_the_reason(reason, boxes):
    with pytest.raises(PictureError, match=reason):
        fit_box(fill(boxes))


def test_thin_lines_do_not_vanish_at_the_size_of_a_digit():
    assert fit_box(np.eye(300) > 0).max() > 200


def test_unreadable_files_are_refused_by_name(tmp_path):
    file = tmp_path / "seven.png"
    with pytest.raises(PictureError, match=r"read .*seven\.png as .*No such file"):
        open_picture(file)
    content = save(SEVEN).getvalue()
    for damaged in (b"", b"<html>", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(PictureError, match=r"seven\.png as a PNG"):
            open_picture(file)
        with pytest.raises(PictureError, match="cannot read the picture"):
            open_picture(damaged)


def test_huge_pictures_are_read_or_refused_for_their_size(monkeypatch):
    """Pillow warns of more than 89 megapixels and refuses twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert open_picture(save(SEVEN)).size == (60, 80)
    larger = save(np.kron(SEVEN, np.ones((2, 2), np.uint8)))
    with pytest.raises(PictureError, match="Image size"):
        open_picture(larger)
    assert open_picture(Image.new("L", (4000, 3000))).size == (500, 375)


def test_what_is_no_picture_is_refused():
    for source, reason in (
        (None, "cannot read"),
        ("\0", "cannot read"),
        (np.zeros((0, 5)), "cannot read"),
        (Image.new("RGBA", (5, 0)), "cannot read"),
        (np.zeros(9), r"expected .* got \[9\]"),
        (np.zeros((9, 9, 5)), r"expected .* got \[9, 9, 5\]"),
        (np.where(SEVEN > 99, 1, np.nan), "expected .* finite numbers"),
        (SEVEN * 1j, "expected .* finite numbers"),
        (Digits(torch.eye(56).view(4, 28, 28), torch.arange(4)), "one picture"),
    ):
        with pytest.raises(PictureError, match=reason):
            open_picture(source)


def draw(height, width, boxes):
    page = np.full((height, width), 255, np.uint8)
    for top, bottom, left, right, grey in boxes:
        page[top:bottom, left:right] = grey
    return page


sides = st.integers(1, 300)
boxes = st.lists(st.tuples(*[st.integers(0, 255)] * 5), max_size=6)
shapes = array_shapes(min_dims=0, max_dims=4, max_side=30)
any_array = scalar_dtypes().flatmap(lambda kind: arrays(kind, shapes))


@settings(deadline=None, derandomize=True, max_examples=200, database=None)
@given(any_array | st.builds(draw, sides, sides, boxes))
def test_any_picture_gives_a_digit_or_a_reason(source):
    with suppress(PictureError):
        for pixels in find_readings(open_picture(source)):
            assert pixels.max() > 100
