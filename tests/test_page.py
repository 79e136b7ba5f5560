"""What surrounds a digit is found and taken away, and the digit stays as it is."""

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

CROSS = np.zeros((200, 160), bool)  # instead of a digit
CROSS[70:130, 76:84] = CROSS[96:104, 60:100] = True
PAGE = 0.9 - 0.6 * CROSS.astype(np.float32)


@pytest.mark.parametrize("degrees", [0, 8, 20])
@pytest.mark.parametrize("table", [0.1, 0.74])
def test_sheet_is_cut_out_of_its_table(table, degrees):
    around = Image.fromarray(np.pad(PAGE, 100, constant_values=table))
    photo = np.asarray(around.rotate(degrees, fillcolor=table))
    sheet = next(find_sheets(photo))
    assert sheet.shape < (280, 280)
    assert np.all(sheet[[0, -1]] > 0.85), "the paper goes on"
    assert np.mean(sheet < 0.5) == pytest.approx(CROSS.sum() / sheet.size, rel=0.1)
    dark, light = find_sheets(1 - photo), find_sheets(PAGE)
    assert np.all(next(dark)[[0, -1]] < 0.15)
    assert next(light, None) is None


def test_half_of_a_page_in_shadow_is_no_sheet():
    page = PAGE.copy()
    page[:, 70:] *= 0.6
    assert list(find_sheets(page)) == []


def test_ink_is_measured_against_its_paper():
    shade = np.linspace(1, 0.5, 160)
    for page in (PAGE * shade, 1 - PAGE * shade):
        ink = find_ink(page.astype(np.float32))
        assert np.abs(ink[~CROSS]).mean() < 0.03
    assert find_ink(PAGE)[CROSS].mean() == pytest.approx(0.6 / 0.9, abs=0.07)
    assert find_ink(1 - PAGE)[CROSS].mean() == pytest.approx(0.6 / 0.9, abs=0.07)


@pytest.mark.parametrize("thickness", [1, 8])
def test_frame_goes_with_all_outside(thickness):
    mask = CROSS.copy()
    mask[30:170, 30:130] = True
    mask[30 + thickness : 170 - thickness, 30 + thickness : 130 - thickness] = False
    mask |= CROSS
    mask[5:9, 5:9] = True
    np.testing.assert_array_equal(drop_frames(mask), CROSS)
    y, x = np.mgrid[-100:100, -80:80]
    loop = CROSS | (abs(np.hypot(x, y / 1.2) - 60) < 3)
    np.testing.assert_array_equal(drop_frames(loop), loop)


@pytest.mark.parametrize("row", [30, 128, 140])
def test_line_from_border_to_border_is_printed(row):
    for mask, line in (
        (CROSS, np.s_[row : row + 3]),
        (CROSS.T, np.s_[:, row : row + 3]),
    ):
        lined = mask.copy()
        lined[line] = True
        left = drop_lines(lined)
        assert np.mean(left != mask) < 0.002
        part = mask.copy()
        part[line] = True
        part[:12] = part[:, :12] = False
        np.testing.assert_array_equal(drop_lines(part), part)


def test_bar_of_a_digit_that_fills_the_page_is_no_line():
    seven = np.zeros((100, 80), bool)
    seven[3:8] = seven[:, 72:78] = True
    np.testing.assert_array_equal(drop_lines(seven), seven)


def test_only_the_digit_is_kept():
    page = PAGE.copy()
    page[60:130, :22] = page[60:130, 145:] = 0.2  # neighbours that are cut off
    page[10:12, 30:32] = page[150:153, 90:92] = 0.2  # specks
    assert find_strokes(page).shape == pytest.approx((60, 40), abs=3)
    page[60:130, 80:] = 0.2  # part of the digit reaches the border
    assert find_strokes(page).shape[1] > 95


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("white", "nothing"),
        ("black", "nothing"),
        ("grain", "nothing"),
        ("corner", "stand"),
    ],
)
def test_blank_page_is_refused(kind, reason):
    y, x = np.mgrid[:100, :100]
    page = {
        "white": np.ones((100, 100)),
        "black": np.zeros((100, 100)),
        "grain": np.random.default_rng(0).normal(0.8, 0.03, (100, 100)),
        "corner": np.where(x + y < 90, 0.55, 0.86),
    }[kind]
    with pytest.raises(PictureError, match=reason):
        find_strokes(page.astype(np.float32))
