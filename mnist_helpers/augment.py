"""New handwriting: random warps of a batch of digits, and digits drawn by a pen."""

import math
from functools import cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, Digits

GRID = 7  # the elastic field is drawn on GRID x GRID points and smoothed
SMOOTHNESS = 4.0  # pixels; the sigma that Simard et al. found best
ROTATION = 0.2  # radians; this and the next three are the largest deviations
SCALE = 0.12  # a fraction, for width and height separately
SHEAR = 0.2  # a fraction of the height
SHIFT = 2.0  # pixels, in both directions
ELASTIC = 1.0  # pixels, the standard deviation of a pixel's displacement
# Of digits that MNIST's writers seldom wrote: the corners (right, down) of each stroke,
# in a box of 20 x 20, and how far the pen strays from them at each.
STYLES = {
    4: (
        [[(12, 0), (2, 13), (14, 14)], [(13, 8), (11, 20)]],
        1.5,
    ),
    9: (
        [[(14, 5), (9, 0), (4, 5), (8, 10), (14, 6), (15, 14), (12, 20), (2, 19)]],
        1,
    ),
}
# How far each pixel lies to the right of the middle of the image and below it: [2, 784]
STEPS = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
PLACES = torch.stack(torch.meshgrid(STEPS, STEPS, indexing="xy")).flatten(1)


def warp_digits(
    images: Tensor, strength: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw every digit of a batch anew, as another hand might have.

    `[batch, 28, 28] uint8` -> `[batch, 28, 28] float32` in 0..1. `strength` scales all
    deviations; 0 changes nothing. The random numbers come from `generator`, on the
    device of the images; without one, from PyTorch's own.
    Affine and elastic deformation after Simard, Steinkraus and Platt 2003, "Best
    practices for convolutional neural networks applied to visual document analysis".
    """
    if not strength:
        return images / 255
    source = {"generator": generator, "device": images.device}
    draws = torch.rand(6, len(images), **source)
    affine = _make_affine(strength * (2 * draws - 1))
    noise = torch.randn(len(images), 2, GRID * GRID, **source)
    noise *= strength * ELASTIC
    weights = torch.cat([affine, noise], dim=2)
    weights /= IMAGE_SIZE / 2  # sampling counts from -1 to 1
    places = weights @ _make_fields(images.device)  # [batch, 2, 784]
    # Bilinear would blur: the network would train on softer digits than it reads.
    warped = torch.nn.functional.grid_sample(
        images[:, None] / 255,
        places.mT[:, None],  # as if the image were one long row
        "bicubic",
        align_corners=False,
    )
    return warped.view_as(images).clamp_(0, 1)  # bicubic sampling overshoots


@cache  # they stay on the device
def _make_fields(device):
    """What a warp is a weighted sum of: right, down, ones and bumps, `[3 + 49, 784]`.

    The bumps are smooth, one at each point of the coarse grid: noise of variance 1 as
    their weights moves every pixel with variance 1.
    """
    points = torch.linspace(STEPS[0], STEPS[-1], GRID)[:, None]
    bumps = torch.exp(-((STEPS - points) ** 2) / (2 * SMOOTHNESS**2))
    bumps /= bumps.norm(dim=0)
    ones = torch.ones_like(PLACES[:1])
    return torch.cat([PLACES, ones, torch.kron(bumps, bumps)]).to(device)


def _make_affine(draws):
    """Maps `[batch, 2, 3]`, in pixels, from numbers `[6, batch]` in -1..1."""
    turn = ROTATION * draws[0]  # so small that it stands for its sine
    width, height = 1 + SCALE * draws[1:3]
    shear = SHEAR * draws[3]
    right, down = SHIFT * draws[4:]
    entries = width, shear - turn, right, turn, height, down
    return torch.stack(entries, 1).view(-1, 2, 3)


def draw_styles(digits: Digits, count: int, seed: int = 0) -> Digits:
    """Digits as much of the world writes them, and MNIST's American writers seldom did.

    Half of the `count` are ones of `digits` with a flag added, a third of these with a
    base too; a quarter each are drawn fours with a short second stroke and nines with a
    bent tail. The same `seed` draws the same. `digits` must have a one.
    """
    rng = np.random.default_rng(seed)
    ones = digits.images[digits.labels == 1].cpu()
    images = torch.zeros(count, IMAGE_SIZE, IMAGE_SIZE).byte()
    labels = torch.tensor([1, 4, 1, 9]).repeat(count)[:count]
    for index, label in enumerate(labels.tolist()):
        if label == 1:
            ink = _add_flag(ones[rng.integers(len(ones))], rng)
        else:
            ink = _write(*STYLES[label], rng)
        # Centred by whole pixels, since half of one would blur.
        shift = (0.5 - PLACES @ ink / ink.sum()).round().int().tolist()
        image = (ink * 255).round().byte().view(IMAGE_SIZE, -1)
        images[index] = image.roll(shift, (1, 0))
    return Digits(images, labels, "drawn digits")


def _add_flag(image, rng):
    """The ink `[784]` of a one with a flag, and sometimes a base, added."""
    ink = image.flatten() / 255
    places = PLACES.T[ink > 0.5].numpy()  # from the top down
    top, bottom = places[0], places[-1]
    right, down = bottom - top
    share, before, behind = rng.uniform((0.15, 0, 0), (0.95, 10, 10))
    # A long flag keeps close to the stem, or it would make a 7.
    angle = rng.uniform(0.35, 1.3) - 0.45 * share
    cos, sin = share * math.cos(angle), share * math.sin(angle)
    flag = np.add(top, (cos * right - sin * down, cos * down))
    base = np.add(bottom, [(-before, 0), (behind, 0)])
    strokes = [[flag, top], base][: rng.choice([1, 1, 2])]
    radius = ink.sum() / math.hypot(right, down) / 2
    return ink.maximum(_draw_dots(_move_pen(strokes, 0.5, rng), radius))


def _write(strokes, straying, rng):
    """The ink `[784]` of a digit of these strokes, in a box of 20 pixels."""
    radius = rng.uniform(0.6, 2.0)
    dots = _move_pen(strokes, straying, rng)
    dots -= (dots.max(axis=0) + dots.min(axis=0)) / 2
    dots *= (10 - radius) / dots.max()
    return _draw_dots(dots, radius)


def _move_pen(strokes, straying, rng):
    """Dots of a pen that moves through the corners, or nearly: `[dots, 2]`."""
    lines = []
    for corners in strokes:
        corners = rng.normal(corners, straying)
        # The pen waits at each corner and jumps to the next; smoothed, that is a line.
        waiting = np.repeat(corners, 40, axis=0)
        lines.append(gaussian_filter1d(waiting, 14, axis=0))
    return np.concatenate(lines)


def _draw_dots(dots, radius):
    """The ink `[784]` of dots of a pen."""
    distance = torch.cdist(PLACES.T, torch.tensor(dots).float()).amin(1)
    return (radius + 0.5 - distance).clamp(0, 1)
