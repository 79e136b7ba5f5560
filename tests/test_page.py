"""What surrounds a digit is found and taken away, and the digit stays as it is.

Most tests change one size step by step, and say where the answer changes.
"""

import numpy as np
import pytest
from PIL import Image

from mnist_helpers.handwriting.page import (
    PictureError,
    drop_frames,
    drop_lines,
    find_ink,
    find_sheets,
    find_strokes,
)

SIDE = 200


def fill(*boxes):
    """A mask of filled boxes, each `top, bottom, left, right`."""
    mask = np.zeros((SIDE, SIDE), bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def paint(mask, pen=0.3, paper=0.9):
    return np.where(mask, pen, paper).astype(np.float32)


def first(found, start, stop=SIDE, step=1):
    """The first whole number for which something is found."""
    return next(number for number in range(start, stop, step) if found(number))


DIGIT = (70, 130, 80, 120)  # stands for one
MASK = fill(DIGIT)
BAR = (80, 84, 100, 120)
LINE = (150, 153, 0, SIDE)
SHADE = np.linspace(1, 0.5, SIDE, dtype=np.float32)


@pytest.mark.parametrize("degrees", [0, 8, 20])
@pytest.mark.parametrize("table", [0.1, 0.74])
def test_sheet_is_cut_out_of_its_table(table, degrees):
    around = Image.fromarray(np.pad(paint(MASK), 100, constant_values=table))
    photo = np.asarray(around.rotate(degrees, fillcolor=table))
    for sheet in (next(find_sheets(photo)), 1 - next(find_sheets(1 - photo))):
        assert sheet.shape < (290, 290)
        assert np.all(sheet[[0, -1]] > 0.85), "the paper goes on"
        assert np.sum(sheet < 0.5) == pytest.approx(MASK.sum(), rel=0.03)


def has_sheet(*box, table=0.5, hole=0):
    middle = fill((100 - hole, 100 + hole, 100 - hole, 100 + hole))
    return any(True for _ in find_sheets(paint(fill(box) & ~middle, 0.9, table)))


def test_what_counts_as_a_sheet():
    square = (40, 160, 40, 160)
    assert first(lambda end: has_sheet(40, end, 40, end), 41) == 103, "a tenth"
    assert first(lambda top: has_sheet(top, 200 - top, top, 200 - top), 1) == 6
    assert first(lambda grey: not has_sheet(*square, table=grey / 100), 60) == 80
    assert first(lambda hole: not has_sheet(*square, hole=hole), 5) == 27
    assert not has_sheet(0, 120, 0, 120), "two sides are those of the page: a shadow"
    assert has_sheet(0, 120, 40, 160)
    y, x = np.mgrid[-100:100, -100:100]
    assert not any(True for _ in find_sheets(paint(np.hypot(x, y) < 70, 0.9, 0.5)))


@pytest.mark.parametrize("light", [1, SHADE, SHADE[:, None] ** 2])
@pytest.mark.parametrize("half", [5, 20, 30])
def test_ink_is_measured_against_its_paper(light, half):
    """Dark ink or light ink, in even light or a shadow, thin or bold."""
    mask = fill((60, 140, 100 - half, 100 + half))
    page = paint(mask) * light
    for ink in (find_ink(page), find_ink(0.95 - page)):
        assert ink[~mask].mean() < 0.1 * ink[mask].mean()
    assert find_ink(page)[mask].mean() == pytest.approx(0.6 / 0.9, abs=0.08)


def test_what_is_wider_than_a_third_of_the_page_is_paper():
    def is_paper(half):
        page = paint(fill((0, SIDE, 100 - half, 100 + half))) * SHADE
        return find_ink(page)[100, 100] < 0.1

    assert first(is_paper, 25) == 36


def test_page_is_smoothed_by_a_gaussian_as_wide_as_its_side_over_224():
    page = np.ones((224, 448), np.float32)
    page[110, 220] = 0
    assert find_ink(page).max() == pytest.approx(1 / (2 * np.pi * 2**2), rel=0.02)


@pytest.mark.parametrize(("pixels", "is_dark"), [(1, True), (8, False)])
def test_light_grain_counts_as_at_128_pixels_a_side(pixels, is_dark):
    page = paint(MASK).repeat(4, axis=0).repeat(4, axis=1) * SHADE.repeat(4)
    grain = np.random.default_rng(0).random((800 // pixels, 800 // pixels)) < 0.02
    page += 0.7 * grain.repeat(pixels, axis=0).repeat(pixels, axis=1)
    assert (find_ink(page)[400, 400] > 0.2) == is_dark


def test_printed_frame_goes_with_all_outside():
    def left_in(frame, width, height):
        inside = fill((20, 20 + height, 20, 30))
        outer, inner = (
            fill((15 - rim, 15 + frame + rim, 15 - rim, 15 + frame + rim))
            for rim in (width, 0)
        )
        mask = (outer & ~inner) | inside | fill((195, 199, 195, 199))
        return np.array_equal(drop_frames(mask), inside)

    assert first(lambda frame: left_in(frame, 1, 10), 30) == SIDE / 4 - 2
    assert first(lambda frame: left_in(frame, 8, 10), 30) == SIDE / 4 - 16
    assert first(lambda height: left_in(120, 3, height), 1) == 5, "3% of the frame"
    y, x = np.mgrid[-100:100, -100:100]
    loop = MASK | (abs(np.hypot(x, y / 1.2) - 60) < 3)
    np.testing.assert_array_equal(drop_frames(loop), loop)


def leaves(line, digit=MASK):
    """Whether a line stays on the page, as the digit always does."""
    left = drop_lines(digit | line)
    np.testing.assert_array_equal(left, drop_lines((digit | line).T).T)
    assert (left & digit).sum() >= 0.98 * digit.sum()
    return (left & ~digit).sum() > 80


def test_line_is_printed_from_border_to_border_thin_and_nearly_straight():
    assert not any(leaves(fill((top, top + 3, 0, SIDE))) for top in (30, 128, 140))
    assert first(lambda end: leaves(fill((150, end, 0, SIDE))), 151) == 161
    assert first(lambda left: leaves(fill((150, 153, left, SIDE))), 1) == 9
    assert leaves(fill((150, 153, 0, 97), (150, 153, 103, SIDE))), "with a gap"

    def leaves_tilted(rise):
        tops = [150 + rise * x // SIDE for x in range(SIDE)]
        return leaves(fill(*[(y, y + 2, x, x + 1) for x, y in enumerate(tops)]))

    assert first(leaves_tilted, 2) == 22


def test_bar_of_a_digit_is_no_line():
    stem = (40, 140, 132, 140)

    def stays(end):
        bar = fill((40, 43, 0, SIDE), (40, end, 60, 140), stem)
        return drop_lines(bar)[41, 100]

    assert first(stays, 41) == 40 + SIDE // 40 + 1, "on a line"

    def drops(left):
        return not leaves(fill(LINE), fill((40, 100, left, left + 60)))

    near = [drops(left) for left in (14, 15, 125, 126)]
    assert near == [False, True, True, False], "else the digit fills the page"
    seven = fill((3, 8, 0, SIDE), (3, 195, 180, 195))
    np.testing.assert_array_equal(drop_lines(seven), seven)


def keeps(other, digit=DIGIT, pen=0.3, light=1):
    """Whether what is found is more than the digit, to a pixel or two."""
    top, bottom, left, right = digit
    page = paint(fill(digit, other), pen) * light
    size = np.subtract(find_strokes(page).shape, (bottom - top, right - left))
    return abs(size).max() > 2


def test_only_the_digit_is_kept():
    assert first(lambda end: keeps((20, end, 30, end + 10)), 22) == 33, "5% of it"
    assert first(lambda end: keeps((0, end, 30, 40)), 40) == 67, "25%, at the rim"
    assert first(lambda top: keeps((top, top + 40, 30, 40)), 1) == SIDE // 25


def test_what_lies_along_the_border_is_a_shadow():
    assert first(lambda end: keeps((0, end, 30, 40), BAR), 20) == 29
    edge = (0, 100, 30, 40)
    assert not keeps(edge, BAR, 0.6, SHADE), "less will do for faint ink"
    assert keeps(edge, BAR, 0.6), "but not on even paper"
    assert keeps(edge, BAR, 0.3, SHADE)
    band = (0, 12, 0, SIDE)
    assert first(lambda end: not keeps(band, (70, end, 100, 104)), 72) == 77
    with pytest.raises(PictureError, match="only shadows"):
        keeps(band, (70, 76, 100, 104), 0.6, SHADE[:, None])


def test_neighbour_that_is_cut_off_goes():
    cut = (70, 130, 0, 70)
    assert first(lambda end: not keeps(cut, (70, 130, 100, end)), 102) == 116
    below = [(90, 150, 0, end) for end in range(SIDE)]
    assert first(lambda end: keeps(below[end], (30, 80, 70, 130)), 60) == 88
    assert not keeps((60, 130, 150, SIDE))


def test_ink_is_darker_than_noise_and_half_as_dark_as_most():
    def is_ink(percent):
        page = paint(MASK) - 0.006 * percent * fill((130, 160, 80, 120))
        return len(find_strokes(page.astype(np.float32))) > 80

    assert first(is_ink, 30) == 44

    def is_read(pen, *box, noise=0.0):
        grain = np.random.default_rng(0).normal(0, noise, (SIDE, SIDE))
        try:
            return find_strokes(paint(fill(box), pen) + grain.astype(np.float32)).any()
        except PictureError:
            return False

    assert first(lambda less: is_read(0.9 - less / 500, *DIGIT), 1) == 14, "3%"
    assert first(lambda end: is_read(0.3, 50, end, 50, end), 51) == 52
    least = first(lambda less: is_read(0.9 - less / 100, *DIGIT, noise=0.05), 1)
    assert least == 10


def test_blank_page_is_refused():
    y, x = np.mgrid[:100, :100]
    for page in (
        0 * x,
        0 * x + 1,
        np.random.default_rng(0).normal(0.8, 0.03, (99, 99)),
    ):
        with pytest.raises(PictureError, match="nothing"):
            find_strokes(page.astype(np.float32))
    with pytest.raises(PictureError, match="stand"):
        find_strokes(np.where(x + y < 90, 0.55, 0.86).astype(np.float32))
