"""Warps against PyTorch's own affine grids; drawn digits by where their ink lies."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import center_of_mass

from mnist_helpers import augment
from mnist_helpers.augment import draw_styles, warp_digits
from mnist_helpers.data import PROJECT_ROOT, TRANSFORM
from mnist_helpers.model import load_model

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


def test_drawn_digits():
    drawn = draw_styles(400)
    assert drawn.labels.bincount().tolist() == [0, 200, 0, 0, 100, 0, 0, 0, 0, 100]
    for image in drawn.images.numpy():  # in MNIST's form
        assert np.ptp(np.argwhere(image), axis=0).max() in (18, 19, 20)
        assert center_of_mass(image) == pytest.approx((14, 14), abs=0.51)
    assert draw_styles(400).images.equal(drawn.images)
    assert not draw_styles(400, seed=1).images.equal(drawn.images)


def test_each_style_has_its_label():
    """A network that has learnt from others of the kind reads them."""
    model = load_model(PROJECT_ROOT / "model.pth")
    drawn = draw_styles(400, 2)
    logits = model(TRANSFORM(drawn.images))
    assert (logits.argmax(1) == drawn.labels).sum() > 388


def test_forms_are_mixed():
    """Between its forms, up to a hand's unsteadiness, lies each corner of a digit."""
    rng = np.random.default_rng(0)
    ends = []
    for _ in range(2000):
        dots = augment._mix_forms([[[(0, 0), (10, 0)], [(0, 20), (10, 20)]]], rng)
        ends.append([*dots[0], *dots[-1]])
        assert np.abs(np.diff(dots, axis=0)).max() < 0.6  # no gaps
    assert np.mean(ends, axis=0) == pytest.approx([0, 10, 10, 10], abs=0.5)
    # Downwards they are often near one of the forms.
    assert np.std(ends, axis=0) == pytest.approx([0.95, 7.1, 0.95, 7.1], abs=0.4)


def test_strokes_are_smooth():
    """A corner is rounded, its ends stay; the pen is lifted between two strokes."""
    rng = mock.Mock()
    rng.dirichlet.return_value = [1.0]
    rng.normal.return_value = 0.0
    for softness, distance in ((10, 0.46), (18, 2.67)):
        rng.uniform.return_value = softness
        corner = [[(0, 0), (10, 10), (0, 20)]]
        dots = augment._mix_forms([corner, [[(30, 0), (30, 20)]]], rng)
        assert dots[:120, 0].max() == pytest.approx(10 - distance, abs=0.1)
        assert dots[:120, 0].min() == pytest.approx(0, abs=0.3)
        assert dots[120:, 0] == pytest.approx(30)
    assert rng.uniform.call_args == mock.call(10, 18)


def test_pen():
    """An upright stroke: as long as the box, twice the radius wide, centred."""
    dots = np.stack([np.full(50, 3.0), np.linspace(2, 9, 50)], axis=1)
    for radius in (0.6, 2.0):
        image = augment._draw_dots(dots, radius) / 255
        area = 2 * radius * (20 - 2 * radius) + math.pi * radius**2
        assert image.sum() == pytest.approx(area, rel=0.1)
        assert image.any(dim=1).sum() == 20
