"""Warps against PyTorch's own affine grids; flags by where their ink lies."""

import math
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import center_of_mass

from mnist_helpers import augment
from mnist_helpers.augment import add_flags, warp_digits
from mnist_helpers.data import Digits

DEVIATIONS = ("ROTATION", "SCALE", "SHEAR", "SHIFT", "ELASTIC")


def seed(number):
    return torch.Generator().manual_seed(number)


def set_deviations(monkeypatch, *values):
    for name, value in zip(DEVIATIONS, values, strict=True):
        monkeypatch.setattr(augment, name, value)


def test_affine_part(toy, monkeypatch):
    """Scaled, sheared, turned, then shifted, each by a number drawn evenly."""
    set_deviations(monkeypatch, 30, 0.4, 0.6, 7, 0)
    draws = torch.rand(6, 100, generator=seed(3)) - 0.5
    maps = []
    for draw in draws.T:
        scaled = torch.diag(1 + 0.4 * draw[1:3])
        sheared = torch.tensor([[1, 0.6 * draw[3]], [0, 1]])
        quarter = torch.tensor([[0.0, -1], [1, 0]])
        turned = torch.matrix_exp(torch.deg2rad(30 * draw[0]) * quarter)
        shifted = draw[4:, None] / 2  # 7 of 14 pixels
        maps.append(torch.cat([turned @ sheared @ scaled, shifted], dim=1))
    pictures = toy.images[:, None] / 255
    grid = F.affine_grid(torch.stack(maps), pictures.shape, align_corners=False)
    expected = F.grid_sample(pictures, grid, mode="bicubic", align_corners=False)
    warped = warp_digits(toy.images, 0.5, seed(3))
    torch.testing.assert_close(warped, expected[:, 0].clamp(0, 1), atol=1e-4, rtol=0)


def test_elastic_part(monkeypatch):
    """The deviation asked for, the same everywhere, smooth, from 7 x 7 points."""
    images = torch.zeros(2000, 28, 28)
    set_deviations(monkeypatch, 0, 0, 0, 0, 4.0)
    with mock.patch.object(F, "grid_sample", return_value=images) as sample:
        warp_digits(images, 0.5, seed(0))
    moved = sample.call_args.args[1].view(2000, 28, 28, 2) * 14
    moved -= moved.mean(dim=0)
    assert (moved.std(dim=0) - 1).abs().max() < 0.07
    # What a Gaussian of 4 pixels leaves in common 4 pixels away: exp(-1 / 4)
    common = moved[:, 14, 14] * moved[:, 14, 10]
    assert common.mean() == pytest.approx(0.78, abs=0.04)
    assert torch.linalg.matrix_rank(moved[..., 0].flatten(1), rtol=1e-4) == 49
    bumps = augment._make_fields(images.device)[3:]
    torch.testing.assert_close(bumps, bumps.flip(0, 1))  # as strong on each side


def test_defaults_and_random_numbers(toy):
    assert [getattr(augment, name) for name in DEVIATIONS] == [12, 0.12, 0.2, 2, 2]
    generator = seed(5)
    warped = warp_digits(toy.images, generator=generator)
    assert not torch.equal(warp_digits(toy.images, 1.0, generator), warped)
    torch.manual_seed(5)
    assert torch.equal(warp_digits(toy.images), warped)
    still = warp_digits(toy.images, strength=0.0)
    assert (still - toy.images / 255).abs().max() < 1e-5


def draw_stems(count, slope=0.0):
    """Strokes 20 pixels high and 3 wide."""
    steps = torch.arange(28) - 13.5
    distance = (steps - slope * steps[:, None]).abs()
    distance /= math.hypot(1, slope)
    ink = (2 - distance).clamp(0, 1)
    ink[steps.abs() > 10] = 0
    images = (ink * 255).byte().repeat(count, 1, 1)
    return Digits(images, torch.ones(count), "stems")


def test_share_of_the_ones():
    digits = draw_stems(2000)
    digits.labels[::2] = 7
    before = digits.images.clone()
    flagged = add_flags(digits, 0.3)
    changed = (flagged.images != before).any(dim=(1, 2))
    assert not changed[::2].any()
    assert 250 < changed.sum() < 350
    assert flagged.name == "stems"
    assert torch.equal(digits.images, before)
    for image in flagged.images[changed][:25]:  # in the middle, by whole pixels
        assert center_of_mass(image.numpy()) == pytest.approx((14, 14), abs=0.51)
    assert add_flags(digits, 0.3).images.equal(flagged.images)
    assert not add_flags(digits, 0.3, seed=1).images.equal(flagged.images)


def test_plan():
    """Lengths, angles and kinds, as they were measured to be read best."""
    sizes = []
    turns = []
    sides = []
    rng = random.Random(0)
    for _ in range(1500):
        dots = augment._plan_flag(rng)
        if dots[-1, 1] == 1:  # a base
            assert -dots[-40, 0] == dots[-1, 0] == dots[-40:, 0].abs().max()
            sides.append(dots[-1, 0])
        if dots[0, 1] == -1:
            left, up = dots[0] - dots[39]
            sizes.append(torch.hypot(left, up) / 2)
            angle = torch.atan2(left, -up)
            turns.append(angle / math.pi * 2 + 0.3 * sizes[-1])
    bounds = {(0.15, 0.95): sizes, (0.22, 0.85): turns, (0.25, 1.0): sides}
    for expected, values in bounds.items():
        assert (min(values), max(values)) == pytest.approx(expected, abs=0.01)
    assert len(sides) == pytest.approx(750, abs=70)
    assert len(sizes) == pytest.approx(1125, abs=60)


def test_pen():
    """A dot as wide as the stem, half a stem to the right of its foot."""
    stem = draw_stems(1, slope=-0.5)
    moved = Digits(stem.images.roll((-3, 2), (1, 2)), stem.labels)
    dot = torch.tensor([[1.0, 1.0]])
    with mock.patch.object(augment, "_plan_flag", return_value=dot):
        drawn = add_flags(moved, 1.0).images[0]
    added = (drawn.int() - stem.images[0]).numpy()  # centred again
    assert added.min() == 0
    assert center_of_mass(added) == pytest.approx((22, 17.75), abs=0.3)
    assert added.sum() / 255 == pytest.approx(math.pi * 1.5**2, rel=0.1)


def test_what_is_no_bare_stroke_stays():
    digits = draw_stems(2)
    digits.images[0, 20:23, 7:22] = 255  # a base
    digits.images[1] = 0
    assert torch.equal(add_flags(digits, 1.0).images, digits.images)
