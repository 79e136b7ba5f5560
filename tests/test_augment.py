"""Warps, seen through the places that pixels are copied from, and through what becomes of pictures."""

import math
import pickle

import pytest
import torch

from mnist_helpers.augment import RandomWarp

STILL = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "shift": 0.0, "elastic": 0.0}
INSIDE = slice(7, 21)  # the middle, which no small warp fills from beyond the edge
PLACE = torch.arange(28)


def origins(count: int, seed: int = 0, **knobs) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the middle pixels of `count` warped pictures come from: columns and rows, `[count, 14, 14]`."""
    places = RandomWarp(seed=seed, **(STILL | knobs)).draw_places(count, 28)
    pixels = ((places + 1) * 28 - 1) / 2  # from -1 at the left edge of the picture to 1 at the right
    return tuple(pixels[:, INSIDE, INSIDE].unbind(dim=3))


def affine_maps(count: int, **knobs) -> torch.Tensor:
    """The affine maps `[count, 2, 3]` that the warps are, about the middle; they fit exactly."""
    columns, rows = origins(count, **knobs)
    middle = (PLACE[INSIDE] - 13.5).float()
    x, y = middle.repeat(14, 1).flatten(), middle.repeat(14, 1).T.flatten()
    basis = torch.stack([x, y, torch.ones(196)], dim=1)
    targets = torch.stack([columns.flatten(1), rows.flatten(1)], dim=2) - 13.5
    maps = torch.linalg.lstsq(basis.expand(count, -1, -1), targets).solution
    torch.testing.assert_close(basis @ maps, targets, rtol=0, atol=1e-3)
    return maps.mT


def check_uniform(values: torch.Tensor, largest: float) -> None:
    """Drawn evenly from -largest to largest."""
    assert values.abs().max() <= largest * 1.001
    assert values.abs().max() > largest * 0.98
    assert values.mean().abs() < largest * 0.1
    assert values.std() == pytest.approx(largest / math.sqrt(3), rel=0.1)


def test_strength_zero_changes_nothing(toy):
    warped = RandomWarp(strength=0.0)(toy.images)
    torch.testing.assert_close(warped, toy.images / 255, rtol=0, atol=1e-5)


def test_shape_and_range(toy):
    before = toy.images.clone()
    warped = RandomWarp()(toy.images)
    assert warped.shape == toy.images.shape
    assert warped.dtype == torch.float32
    assert warped.min() >= 0
    assert warped.max() <= 1 + 1e-6
    assert torch.equal(toy.images, before)
    assert (warped - toy.images / 255).abs().mean() > 0.01
    assert RandomWarp()(toy.images[:1]).shape == (1, 28, 28)


def test_seeded_and_new_every_time(toy):
    first, second = RandomWarp(seed=5), RandomWarp(seed=5)
    before = torch.get_rng_state()
    draws = [first(toy.images) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(second(toy.images), draws[0])
    assert torch.equal(second(toy.images), draws[1])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(RandomWarp(seed=6)(toy.images), draws[0])


def test_every_picture_is_warped_in_its_own_way(toy):
    twice = RandomWarp()(toy.images[:1].repeat(2, 1, 1))
    assert (twice[0] - twice[1]).abs().mean() > 0.01


def test_rotation():
    """Turning alone: a rotation matrix about the middle, by at most 12 degrees."""
    maps = affine_maps(600, rotation=12.0)
    matrices = maps[:, :, :2]
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(2).expand(600, 2, 2), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(600), rtol=0, atol=1e-3)
    assert maps[:, :, 2].abs().max() < 1e-3
    check_uniform(torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])), 12.0)


def test_shift():
    """A pure translation by at most two pixels, in both directions on its own."""
    maps = affine_maps(600, shift=2.0)
    torch.testing.assert_close(maps[:, :, :2], torch.eye(2).expand(600, 2, 2), rtol=0, atol=1e-3)
    check_uniform(maps[:, 0, 2], 2.0)
    check_uniform(maps[:, 1, 2], 2.0)
    assert torch.corrcoef(maps[:, :, 2].T)[0, 1].abs() < 0.15


def test_scale():
    """Width and height on their own, by at most 12%."""
    maps = affine_maps(600, scale=0.12)
    assert maps[:, [0, 1, 0, 1], [1, 0, 2, 2]].abs().max() < 1e-3
    check_uniform(maps[:, 0, 0] - 1, 0.12)
    check_uniform(maps[:, 1, 1] - 1, 0.12)
    assert torch.corrcoef(torch.stack([maps[:, 0, 0], maps[:, 1, 1]]))[0, 1].abs() < 0.15


def test_shear():
    """Rows slide sideways, by at most a fifth of their distance from the middle."""
    maps = affine_maps(600, shear=0.2)
    others = maps - torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    check_uniform(others[:, 0, 1].clone(), 0.2)
    others[:, 0, 1] = 0
    assert others.abs().max() < 1e-3


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_scales_everything(strength):
    maps = affine_maps(600, strength=strength, shift=2.0)
    check_uniform(maps[:, 0, 2], 2.0 * strength)
    columns, _ = origins(400, strength=strength, elastic=2.0)
    moved = columns - PLACE[INSIDE]
    assert moved.std() == pytest.approx(strength, rel=0.1)


def test_elastic_displacements():
    """Mean zero, standard deviation half of `elastic`, the same everywhere, and smooth."""
    columns, rows = origins(500, elastic=2.0)
    across, down = columns - PLACE[INSIDE], rows - PLACE[INSIDE, None]
    for moved in (across, down):
        assert moved.mean().abs() < 0.1
        assert moved.std() == pytest.approx(1.0, rel=0.05)
        everywhere = moved.std(dim=0)
        assert everywhere.min() > 0.85
        assert everywhere.max() < 1.15
        steps = (moved[:, :, 1:] - moved[:, :, :-1]).std()  # from one pixel to the next
        assert 0.05 < steps < 0.35
    assert torch.corrcoef(torch.stack([across.flatten(), down.flatten()]))[0, 1].abs() < 0.1


def cubic(distance: float) -> float:
    """The weight of a pixel so far away: Keys 1981, with the parameter that PyTorch uses."""
    x, a = abs(distance), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_a_shifted_picture_by_hand():
    """One bright pixel: warped by a known shift it is shared among its neighbours, bicubically."""
    maps = affine_maps(1, seed=3, shift=2.0)
    right, down = maps[0, :, 2].tolist()
    picture = torch.zeros(1, 28, 28, dtype=torch.uint8)
    picture[0, 13, 13] = 255
    warped = RandomWarp(seed=3, **(STILL | {"shift": 2.0}))(picture)[0]
    wanted = torch.zeros(28, 28)
    for row in range(28):
        for column in range(28):
            wanted[row, column] = max(0.0, cubic(column + right - 13) * cubic(row + down - 13))
    torch.testing.assert_close(warped, wanted, rtol=0, atol=1e-3)


def test_what_comes_from_beyond_the_edge_is_paper():
    white = torch.full((50, 28, 28), 255, dtype=torch.uint8)
    warped = RandomWarp(**(STILL | {"shift": 5.0}))(white)
    assert warped.amin() == 0
    torch.testing.assert_close(warped[:, 13, 13], torch.ones(50))


def test_warp_can_be_described_copied_and_pickled(toy):
    warp = RandomWarp(strength=0.5, seed=4)
    warp(toy.images)
    copied = pickle.loads(pickle.dumps(warp))
    assert torch.equal(copied(toy.images), warp(toy.images))
    assert "strength=0.5" in repr(warp)


def test_strength_fades_evenly_over_the_steps(toy):
    """Each batch is warped as by a warp of so much less strength that draws the same numbers."""
    fading, full = RandomWarp(1.0, fade=0.5, steps=4, seed=3), RandomWarp(1.0, seed=3)
    for strength in (1.0, 0.875, 0.75, 0.625, 0.5, 0.5):
        full.strength = strength
        assert torch.equal(fading(toy.images), full(toy.images))
