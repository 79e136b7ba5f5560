"""What surrounds a digit is found and taken away, and the digit stays as it is.

Most tables hold two sizes for a limit, just below and just above it. A box is `top,
bottom, left, right`.
"""

import numpy as np
import pytest
from PIL import Image

from mnist_helpers.handwriting.page import (
    PictureError,
    drop_frames,
    drop_lines,
    find_box,
    find_ink,
    find_sheets,
    find_strokes,
    smooth_page,
)

SIDE = 200
Y, X = np.mgrid[-100:100, -100:100]


def fill(*boxes):
    """A mask of filled boxes."""
    mask = np.zeros((SIDE, SIDE), bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def paint(mask, pen=0.3, paper=0.9):
    return np.where(mask, pen, paper).astype(np.float32)


DIGIT = (70, 130, 80, 120)  # stands for one
MASK = fill(DIGIT)
SHADE = np.linspace(1, 0.5, SIDE)


def test_sheet_is_cut_out_of_its_table():
    for table, degrees in ((0.1, 20), (0.79, 8)):
        around = Image.fromarray(np.pad(paint(MASK), 100, constant_values=table))
        photo = np.asarray(around.rotate(degrees, fillcolor=table))
        for sheet in (next(find_sheets(photo)), 1 - next(find_sheets(1 - photo))):
            assert sheet.shape < (290, 290)
            assert np.all(sheet[[0, -1]] > 0.85), "the paper goes on"
            assert np.sum(sheet < 0.5) == pytest.approx(MASK.sum(), rel=0.03)


SQUARE = fill((40, 160, 40, 160))


@pytest.mark.parametrize(
    ("mask", "table", "is_sheet"),
    [  # what is lighter than its table, the table, whether it is a sheet of paper
        (fill((5, 195, 5, 195)), 0.5, False),  # hardly any table
        (fill((0, 44, 10, 190)), 0.5, False),  # 40% of its edge is the picture's
        (fill((0, 46, 10, 190)), 0.5, True),
        (fill((60, 128, 60, 128)), 0.5, False),  # small
        (fill((60, 132, 60, 132)), 0.5, True),
        (SQUARE, 0.8, False),  # hardly lighter
        (SQUARE & ~fill((63, 137, 63, 137)), 0.5, False),  # a frame
        (SQUARE & ~fill((64, 136, 64, 136)), 0.5, True),
        (SQUARE & ~fill((60, 140, 60, 140)) | fill((65, 135, 65, 135)), 0.5, True),  # 0
        (np.hypot(X, Y) < 70, 0.5, False),
        (fill((40, 100, 40, 130), (100, 160, 48, 138)), 0.5, True),
        (fill((40, 100, 40, 130), (100, 160, 50, 140)), 0.5, False),  # notches: an 8?
    ],
)
def test_what_counts_as_a_sheet(mask, table, is_sheet):
    assert bool(list(find_sheets(paint(mask, 0.9, table)))) == is_sheet


def test_sheet_is_found_whatever_else_is_light_or_dark():
    half_lit = paint(SQUARE, 0.9, 0.1) * np.where(X < 0, 0.5, 1)
    black_edge = paint(SQUARE, 0.9, 0.5) * (Y > -70)
    for page in (half_lit, black_edge):
        assert max(sheet.size for sheet in find_sheets(page)) > 13000


def measure_ink(page, blur=1.0):
    return find_ink(smooth_page(page, blur))


@pytest.mark.parametrize("light", [1, SHADE[:, None] ** 2])
def test_ink_is_measured_against_its_paper(light):
    """Dark ink or light ink, in even light or a shadow, thin or bold."""
    for mask in (fill((60, 140, 95, 105)), fill((60, 140, 68, 132))):
        page = paint(mask) * light
        for ink in (measure_ink(page), measure_ink(0.95 - page)):
            assert ink[~mask].mean() < 0.1 * ink[mask].mean()
        assert measure_ink(page)[mask].mean() == pytest.approx(0.6 / 0.9, abs=0.08)


def test_light_middle_of_a_page_is_not_ink():
    page = paint(fill((80, 120, 98, 103)), 0.5) * (1 - 5e-6 * np.hypot(X, Y) ** 2)
    assert measure_ink(page)[100, 100] > 0.4


def test_ink_is_farther_from_even_paper_and_dark_in_doubt():
    dark = fill((70, 130, 60, 80))
    for shade, below, above in ((1, 0.29, 0.31), (SHADE[:, None], 0.33, 0.35)):
        for brighter in (below, above):
            page = (0.5 - 0.3 * dark + brighter * dark[:, ::-1]) * shade
            assert (measure_ink(page)[100, 70] > 0.3) == (brighter == below)


def test_what_is_wider_than_a_third_of_the_page_is_paper():
    page = paint(fill((0, SIDE, 65, 135))) * SHADE
    assert measure_ink(page)[100, 100] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("end", "height", "is_printed"),
    [  # the end of a frame, the height of what is inside, whether it is printed
        (54, 10, False),
        (55, 10, True),  # a quarter of the page
        (55, 0, False),  # a small 0?
        (138, 0, True),  # an empty box
    ],
)
def test_printed_frame_goes_with_all_outside(end, height, is_printed):
    frame = fill((5, end, 5, end)) & ~fill((8, end - 3, 8, end - 3))
    inside = fill((20, 20 + height, 20, 30))
    mask = frame | inside | fill((195, 199, 195, 199))
    wanted = inside if is_printed else mask
    np.testing.assert_array_equal(drop_frames(mask), wanted)


def test_circle_is_a_frame_unless_it_has_notches():
    for apart, gap, height, is_frame in (
        (35, 5, 60, True),
        (38, 5, 60, False),
        (0, 6, 60, False),
        (0, 5, 3, True),  # 5% of it are inside
        (0, 5, 2, False),  # a 0
    ):
        inside = fill((70, 70 + height, 80, 120))
        circle = abs(np.hypot(X, abs(Y) - apart) - 46) < 3  # or two
        mask = inside | circle & ((abs(X) >= gap) | (Y < 0))
        wanted = inside if is_frame else mask
        np.testing.assert_array_equal(drop_frames(mask), wanted)


@pytest.mark.parametrize("stroke", [(100, 180, 60, 130), (20, 190, 90, 101)])
def test_strokes_may_cross_the_lines_of_a_box(stroke):
    stroke = fill(stroke)
    lines = SQUARE & ~fill((43, 157, 43, 157)) & ~stroke
    left = drop_frames(lines | stroke)
    assert left[stroke].all()
    assert left[lines].mean() < 0.04  # but for the corners


def test_nothing_is_left_of_a_tilted_box():
    stroke = fill((100, 160, 90, 101))
    lines = fill((40, 160, 40, 160)) & ~fill((46, 154, 46, 154))
    left = drop_frames(np.asarray(Image.fromarray(lines | stroke).rotate(1)))
    assert left.sum() == pytest.approx(stroke.sum(), rel=0.02)


STEM = (40, 140, 132, 140)
LINE = (150, 153, 0, SIDE)
CROSSED = (42, 45, 0, SIDE)


@pytest.mark.parametrize(
    ("stays", "digit", "line"),
    [  # whether it stays, a digit, the boxes of a line
        (False, DIGIT, [(150, 160, 0, SIDE)]),
        (True, DIGIT, [(150, 161, 0, SIDE)]),  # too thick
        (False, DIGIT, [(72, 75, 8, SIDE)]),
        (True, DIGIT, [(72, 75, 9, SIDE)]),  # from no border
        (True, DIGIT, [(150, 153, 0, 97), (150, 153, 103, SIDE)]),
        (False, DIGIT, [(150, 152, 0, 120), (161, 163, 120, SIDE)]),
        (True, DIGIT, [(150, 152, 0, 120), (162, 164, 120, SIDE)]),  # too tilted
        (True, STEM, [(40, 43, 0, SIDE), (40, 46, 60, 140)]),  # the bar of a 7
        (True, (40, 100, 14, 74), [CROSSED]),  # the digit fills the page
        (False, (40, 100, 15, 75), [CROSSED]),
        (False, (40, 100, 125, 185), [CROSSED]),
        (True, (40, 100, 126, 186), [CROSSED]),
        (True, (3, 99, 3, 99), [(20, 23, 0, SIDE), (80, 83, 0, SIDE)]),
        (False, (3, 99, 3, 99), [(y, y + 3, 0, SIDE) for y in (20, 50, 80)]),
        (False, DIGIT, [LINE, (95, 150, 30, 37), (95, 150, 160, 167)]),  # a comb
    ],
)
def test_line_is_printed_from_border_to_border_thin_and_nearly_straight(
    stays, digit, line
):
    digit = fill(digit)
    line = fill(*line) & ~digit
    left = drop_lines(digit | line)
    np.testing.assert_array_equal(left, drop_lines((digit | line).T).T)
    assert left[digit].mean() >= 0.98
    assert (left[line].mean() > 0.5) == stays


BAR = (80, 84, 100, 150)
LEFT = (0, 190, 0, 12)
CUT = (70, 130, 130, SIDE)


def is_kept(digit, other, pen=0.3, light=1):
    """Whether what is found is more than the digit, to a pixel or two."""
    found = find_strokes(paint(fill(digit, other), pen) * light)
    alone = fill(digit)
    size = np.subtract(found.shape, alone[find_box(alone)].shape)
    return abs(size).max() > 2


@pytest.mark.parametrize(
    ("digit", "other", "kept"),
    [  # a digit, what else is dark, whether it is kept
        (DIGIT, (20, 32, 30, 42), False),
        (DIGIT, (20, 33, 30, 43), True),  # 5% of the digit
        ((130, 180, 140, 180), (59, 79, 140, 160), False),  # too far away
        (BAR, (0, 17, 30, 40), False),
        ((3, 99, 3, 99), LINE, False),  # it reaches both borders
        (BAR, (0, 18, 30, 40), True),  # 30% around it beyond the border, else a shadow
        ((70, 120, 100, 105), LEFT, True),
        ((70, 120, 100, 106), LEFT, False),  # a shadow, if there is more
        ((70, 130, 92, 100), CUT, True),
        ((70, 130, 91, 100), CUT, False),  # a neighbour, if there is more
        ((70, 130, 7, 17), CUT, True),  # near the border, too: a tight crop
    ],
)
def test_only_the_digit_is_kept(digit, other, kept):
    assert is_kept(digit, other) == kept


def test_faint_ink_at_the_border_is_a_shadow_in_uneven_light():
    edge = (0, 62, 30, 42)
    assert not is_kept(BAR, edge, 0.6, SHADE)
    assert is_kept(BAR, edge, 0.6)
    assert is_kept(BAR, edge, 0.3, SHADE)


GRAIN = np.random.default_rng(0).normal(0, 0.05, (SIDE, SIDE))
LIGHTER = fill((130, 160, 80, 120))  # a part of the digit


def test_faint_and_small_ink_is_read():
    for page, height in (
        (paint(MASK) - 0.6 * 0.41 * LIGHTER, 60),
        (paint(MASK) - 0.6 * 0.42 * LIGHTER, 90),
        (paint(MASK, 0.872), 60),
        (0.8 * (paint(MASK, 0.8) + GRAIN), 60),
        (paint(fill((50, 52, 50, 52))), 40),  # seen from near
    ):
        assert len(find_strokes(page)) == pytest.approx(height, abs=2)


def test_another_look_wants_darker_ink_or_smooths_more():
    page = paint(MASK) - 0.6 * 0.6 * LIGHTER
    for darkness, height in ((0.58, 90), (0.62, 60)):
        assert len(find_strokes(page, darkness)) == pytest.approx(height, abs=2)
    page = paint(MASK, 0.8) + GRAIN
    assert measure_ink(page, 2)[~MASK].std() < 0.6 * measure_ink(page)[~MASK].std()


EMPTY_BOX = fill((13, 110, 3, 195)) & ~fill((14, 109, 4, 194))
LINES = fill((29, 30, 100, 200), (37, 38, 8, 144))  # one leaves the box


@pytest.mark.parametrize(
    ("page", "reason"),
    [  # a page, why nothing is read
        (paint(EMPTY_BOX | LINES), "nothing but printed lines"),
        (paint(MASK, 0.874), "nothing"),
        (0.8 * (paint(MASK, 0.81) + GRAIN), "nothing"),
        (paint(fill((0, 60, 30, 42), (70, 74, 100, 104)), 0.6) * SHADE, "only shadows"),
        (paint(Y > 0.3 * X, 0.7) * SHADE, "only shadows"),  # its edge
    ],
)
def test_blank_page_is_refused(page, reason):
    with pytest.raises(PictureError, match=reason):
        find_strokes(page)
