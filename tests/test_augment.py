"""Warps, seen through the places that pixels are copied from, and through what becomes of images."""

import math
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from mnist_helpers.augment import RandomWarp

STILL = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "elastic": 0.0}
INSIDE = slice(7, 21)  # the middle, which no small warp fills from beyond the edge
PLACE = torch.arange(28)
EYE = torch.eye(2)


def origins(count: int, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the middle pixels of `count` warped images come from: columns and rows, `[count, 14, 14]`."""
    with mock.patch.object(F, "grid_sample", side_effect=lambda pictures, places, **_: pictures) as sample:
        RandomWarp(seed=seed, **(STILL | options))(torch.zeros(count, 28, 28, dtype=torch.uint8))
    pixels = ((sample.call_args.args[1] + 1) * 28 - 1) / 2  # from -1 at the left edge to 1 at the right
    return tuple(pixels[:, INSIDE, INSIDE].unbind(dim=3))


def affine_maps(count: int, **options) -> torch.Tensor:
    """The affine maps `[count, 2, 3]` that the warps are, about the middle; they fit exactly."""
    columns, rows = origins(count, **options)
    middle = (PLACE[INSIDE] - 13.5).float()
    x, y = middle.repeat(14, 1).flatten(), middle.repeat(14, 1).T.flatten()
    basis = torch.stack([x, y, torch.ones(196)], dim=1)
    targets = torch.stack([columns.flatten(1), rows.flatten(1)], dim=2) - 13.5
    maps = torch.linalg.lstsq(basis.expand(count, -1, -1), targets).solution
    torch.testing.assert_close(basis @ maps, targets, rtol=0, atol=1e-3)
    return maps.mT


def check_uniform(values: torch.Tensor, largest: float) -> None:
    """Drawn evenly from -largest to largest."""
    assert largest * 0.98 < values.abs().max() <= largest * 1.001
    assert values.mean().abs() < largest * 0.1
    assert values.std() == pytest.approx(largest / math.sqrt(3), rel=0.1)


def check_apart(first: torch.Tensor, second: torch.Tensor) -> None:
    """Drawn on their own."""
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.15


def test_shape_and_range(toy):
    before = toy.images.clone()
    warped = RandomWarp()(toy.images)
    assert (warped.shape, warped.dtype) == (toy.images.shape, torch.float32)
    assert warped.min() == 0
    assert warped.max() == 1  # bicubic sampling overshoots; that is cut off
    assert torch.equal(toy.images, before)
    assert (warped - toy.images / 255).abs().mean() > 0.01
    assert RandomWarp()(toy.images[:1]).shape == (1, 28, 28)
    assert RandomWarp() == RandomWarp(1, 12, 0.12, 0.2, 2, 2, 0, 1, 0, "cpu")  # what was measured
    still = RandomWarp(strength=0.0)(toy.images)
    torch.testing.assert_close(still, toy.images / 255, rtol=0, atol=1e-5)


def test_seeded_and_new_every_time(toy):
    first, second = RandomWarp(seed=5), RandomWarp(seed=5)
    before = torch.get_rng_state()
    draws = [first(toy.images) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert all(torch.equal(second(toy.images), draw) for draw in draws)
    assert not torch.equal(*draws)
    assert not torch.equal(RandomWarp(seed=6)(toy.images), draws[0])


def test_every_image_is_warped_in_its_own_way(toy):
    twice = RandomWarp()(toy.images[:1].repeat(2, 1, 1))
    assert (twice[0] - twice[1]).abs().mean() > 0.01


def test_rotation():
    """Turning alone: a rotation matrix about the middle, by at most 12 degrees."""
    maps = affine_maps(600, rotation=12.0)
    matrices = maps[:, :, :2]
    torch.testing.assert_close(matrices @ matrices.mT, EYE.expand(600, 2, 2), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(600), rtol=0, atol=1e-3)
    assert maps[:, :, 2].abs().max() < 1e-3
    check_uniform(torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])), 12.0)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_shift_scales_with_the_strength(strength):
    """A pure translation by at most two pixels, in both directions on its own."""
    maps = affine_maps(600, shift=2.0, strength=strength)
    torch.testing.assert_close(maps[:, :, :2], EYE.expand(600, 2, 2), rtol=0, atol=1e-3)
    check_uniform(maps[:, 0, 2], 2.0 * strength)
    check_uniform(maps[:, 1, 2], 2.0 * strength)
    check_apart(maps[:, 0, 2], maps[:, 1, 2])


def test_scale():
    """Width and height on their own, by at most 12%."""
    maps = affine_maps(600, scale=0.12)
    assert maps[:, [0, 1, 0, 1], [1, 0, 2, 2]].abs().max() < 1e-3
    check_uniform(maps[:, 0, 0] - 1, 0.12)
    check_uniform(maps[:, 1, 1] - 1, 0.12)
    check_apart(maps[:, 0, 0], maps[:, 1, 1])


def test_shear():
    """Rows slide sideways, by at most a fifth of their distance from the middle."""
    others = affine_maps(600, shear=0.2) - torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    check_uniform(others[:, 0, 1].clone(), 0.2)
    others[:, 0, 1] = 0
    assert others.abs().max() < 1e-3


def test_all_affine_parts_together():
    """Scaled in width and height, then sheared, then turned: the matrix is the product of the three."""
    columns, rows = origins(1, rotation=12.0, scale=0.12, shear=0.2, shift=2.0, seed=3)
    generator = torch.Generator().manual_seed(3)
    angle, width, height, shear, right, down = (torch.rand(6, generator=generator) * 2 - 1).tolist()
    angle, width, height = math.radians(12 * angle), 1 + 0.12 * width, 1 + 0.12 * height
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ torch.tensor([[1, 0.2 * shear], [0, 1]]) @ torch.tensor([[width, 0], [0, height]])
    y, x = torch.meshgrid(PLACE[INSIDE] - 13.5, PLACE[INSIDE] - 13.5, indexing="ij")
    wanted = matrix @ torch.stack([x, y]).flatten(1) + torch.tensor([[2 * right], [2 * down]]) + 13.5
    torch.testing.assert_close(torch.stack([columns[0], rows[0]]).flatten(1), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_elastic_displacements(strength):
    """Mean zero, standard deviation half of `elastic`, the same everywhere, and smooth."""
    columns, rows = origins(500, elastic=2.0, strength=strength)
    across, down = columns - PLACE[INSIDE], rows - PLACE[INSIDE, None]
    for moved in (across / strength, down / strength):
        assert moved.mean().abs() < 0.1
        assert moved.std() == pytest.approx(1.0, rel=0.05)
        everywhere = moved.std(dim=0)
        assert 0.85 < everywhere.min() < everywhere.max() < 1.15
        steps = (moved[:, :, 1:] - moved[:, :, :-1]).std()  # from one pixel to the next
        # Noise smoothed by a Gaussian of 4 pixels: about 1 / (4 * sqrt(2)) of its deviation.
        assert 0.12 < steps < 0.22
    check_apart(across, down)


def cubic(distance: float) -> float:
    """The weight of a pixel so far away: Keys 1981, with the parameter that PyTorch uses."""
    x, a = abs(distance), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_a_shifted_image_by_hand():
    """One bright pixel: warped by a known shift it is shared among its neighbours, bicubically."""
    right, down = affine_maps(1, seed=3, shift=2.0)[0, :, 2].tolist()
    picture = torch.zeros(1, 28, 28, dtype=torch.uint8)
    picture[0, 13, 13] = 255
    warped = RandomWarp(seed=3, **(STILL | {"shift": 2.0}))(picture)[0]
    across = torch.tensor([cubic(column + right - 13) for column in range(28)])
    along = torch.tensor([cubic(row + down - 13) for row in range(28)])
    torch.testing.assert_close(warped, torch.outer(along, across).clamp(0), rtol=0, atol=1e-3)


def test_what_comes_from_beyond_the_edge_is_paper():
    ink = torch.full((50, 28, 28), 255, dtype=torch.uint8)
    warped = RandomWarp(**(STILL | {"shift": 5.0}))(ink)
    assert warped.amin() == 0
    torch.testing.assert_close(warped[:, 13, 13], torch.ones(50))


def test_warp_can_be_described_and_pickled(toy):
    warp = RandomWarp(strength=0.5, seed=4)
    warp(toy.images)
    assert torch.equal(pickle.loads(pickle.dumps(warp))(toy.images), warp(toy.images))
    assert "strength=0.5" in repr(warp)


def test_strength_fades_evenly_over_the_steps(toy):
    """Each batch is warped as by a warp of so much less strength that draws the same numbers."""
    fading, full = RandomWarp(1.0, fade=0.5, steps=4, seed=3), RandomWarp(1.0, seed=3)
    for strength in (1.0, 0.875, 0.75, 0.625, 0.5, 0.5):
        full.strength = strength
        assert torch.equal(fading(toy.images), full(toy.images))
