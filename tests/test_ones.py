"""Flags and bases drawn on ones."""

import pytest
import torch
from scipy import ndimage

from mnist_helpers.data import Digits
from mnist_helpers.handwriting.ones import add_flags, draw_flags


def make_stems(count: int) -> torch.Tensor:
    """Upright strokes, 20 pixels long and 3 wide, centred."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 13:16] = 255
    return images


def draw(count: int = 300) -> torch.Tensor:
    return draw_flags(make_stems(count), torch.Generator().manual_seed(0))


def test_only_that_share_of_the_ones_changes():
    labels = torch.arange(1000) % 5
    digits = Digits(make_stems(1000), labels, "stems")
    flagged = add_flags(digits, share=0.3)
    changed = (flagged.images != digits.images).flatten(1).any(dim=1)
    assert set(labels[changed].tolist()) == {1}
    assert 40 <= changed.sum() <= 80  # of 200 ones
    assert torch.equal(flagged.labels, labels)
    assert flagged.name == "stems"
    assert torch.equal(digits.images, make_stems(1000))  # the originals stay
    assert torch.equal(add_flags(digits, share=0.0).images, digits.images)


def test_the_seed_decides():
    digits = Digits(make_stems(50), torch.ones(50, dtype=torch.int64))
    assert torch.equal(add_flags(digits, seed=1).images, add_flags(digits, seed=1).images)
    assert not torch.equal(add_flags(digits, seed=1).images, add_flags(digits, seed=2).images)


def test_flag_base_and_both_occur_where_they_belong():
    ink = draw().float() / 255
    kinds = set()
    for image in ink:
        columns = image.amax(dim=1) > 0.5
        top, bottom = columns.nonzero()[0].item(), columns.nonzero()[-1].item()
        stem = (image[(top + bottom) // 2 + 1] > 0.5).nonzero()  # below any flag, above any base
        left, right = stem[0].item(), stem[-1].item()
        flag = (image[top : top + 9, : left - 1] > 0.5).any().item()
        base = (image[bottom - 4 :, right + 2 :] > 0.5).any().item()
        assert not (image[: bottom - 8, right + 2 :] > 0.5).any(), "ink to the right of the stem, but no base"
        kinds.add((flag, base))
    assert kinds >= {(True, False), (False, True), (True, True)}


def test_what_is_drawn_has_the_form_of_mnist():
    for image in draw().numpy():
        rows, columns = ndimage.find_objects((image > 64).astype(int))[0]
        assert max(rows.stop - rows.start, columns.stop - columns.start) <= 24  # a base is half its thickness
        assert ndimage.center_of_mass(image) == pytest.approx((14, 14), abs=0.8)


def test_a_one_that_has_its_flag_and_base_stays_as_it_is():
    drawn = make_stems(20)
    drawn[:, 21:24, 7:22] = 255  # a base
    drawn[:, 4:7, 8:13] = 255  # a flag, so short that the centre of mass is nearly where it was
    again = draw_flags(drawn, torch.Generator().manual_seed(0))
    shifts = {(down, across) for down in range(-4, 5) for across in range(-2, 3)}
    assert any(torch.equal(again.roll(shift, dims=(1, 2)), drawn) for shift in shifts)  # but centred
