"""Warps against PyTorch's own affine grids; drawn digits by where their ink lies."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import center_of_mass

from mnist_helpers import augment
from mnist_helpers.augment import draw_styles, warp_digits

DEVIATIONS = ("ROTATION", "SCALE", "SHEAR", "SHIFT", "ELASTIC")


def seed(number):
    return torch.Generator().manual_seed(number)


def set_deviations(monkeypatch, *values):
    for name, value in zip(DEVIATIONS, values, strict=True):
        monkeypatch.setattr(augment, name, value)


def test_affine_part(toy, monkeypatch):
    """Scaled, sheared, turned and shifted, each by a number drawn evenly."""
    set_deviations(monkeypatch, 0.5, 0.4, 0.6, 7, 0)
    turn, wide, high, shear, right, down = torch.rand(6, 100, generator=seed(3)) - 0.5
    across = 1 + 0.4 * wide, 0.6 * shear - 0.5 * turn, right / 2  # 7 of 14 pixels
    along = 0.5 * turn, 1 + 0.4 * high, down / 2
    maps = torch.stack([*across, *along], dim=1).view(100, 2, 3)
    pictures = toy.images[:, None] / 255
    grid = F.affine_grid(maps, pictures.shape, align_corners=False)
    expected = F.grid_sample(pictures, grid, mode="bicubic", align_corners=False)
    warped = warp_digits(toy.images, 0.5, seed(3))
    torch.testing.assert_close(warped, expected[:, 0].clamp(0, 1), atol=1e-4, rtol=0)


def test_elastic_part(monkeypatch):
    """The deviation asked for, the same everywhere, smooth, from 7 x 7 points."""
    images = torch.zeros(2000, 28, 28)
    set_deviations(monkeypatch, 0, 0, 0, 0, 2.0)
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
    assert [getattr(augment, name) for name in DEVIATIONS] == [0.2, 0.12, 0.2, 2, 1]
    generator = seed(5)
    warped = warp_digits(toy.images, 1.0, generator)
    assert not torch.equal(warp_digits(toy.images, generator=generator), warped)
    torch.manual_seed(5)
    assert torch.equal(warp_digits(toy.images), warped)
    still = warp_digits(toy.images, strength=0.0)
    assert (still - toy.images / 255).abs().max() < 1e-5


def test_styles(mnist):
    drawn = draw_styles(mnist[1], 400)
    assert drawn.labels.bincount().tolist() == [0, 200, 0, 0, 100, 0, 0, 0, 0, 100]
    for image, label in zip(drawn.images.numpy(), drawn.labels, strict=True):
        assert center_of_mass(image) == pytest.approx((14, 14), abs=0.51)
        if label != 1:
            assert np.ptp(np.argwhere(image), axis=0).max() in (18, 19, 20)
    assert draw_styles(mnist[1], 400).images.equal(drawn.images)
    assert not draw_styles(mnist[1], 400, seed=1).images.equal(drawn.images)
    # The mean ink of each quarter: any other length, width, angle or share shows here.
    for label, wanted in {
        1: [0.0860, 0.1755, 0.1311, 0.1394],
        4: [0.0830, 0.1051, 0.1053, 0.1612],
        9: [0.1536, 0.1732, 0.1154, 0.1634],
    }.items():
        mean = drawn.images[drawn.labels == label].double().mean(dim=0) / 255
        quarters = F.adaptive_avg_pool2d(mean[None], 2).flatten()
        assert quarters.tolist() == pytest.approx(wanted, abs=3e-4)
