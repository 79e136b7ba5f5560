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
ROTATION = 12.0  # degrees; this and the next three are the largest deviations
SCALE = 0.12  # a fraction, for width and height separately
SHEAR = 0.2  # a fraction of the height
SHIFT = 2.0  # pixels, in both directions
ELASTIC = 2.0  # pixels, twice the standard deviation of a pixel's displacement
# A one with a flag, in three forms: corners (right, down) in a box of 20 x 20. The
# longest flag is close to the stem, or it would make a 7.
FLAGS = [
    [(7, 1), (10, 0), (10, 20)],
    [(0, 9), (10, 0), (10, 20)],
    [(12, 18), (14, 0), (5, 20)],
]
BASES = [  # below each of these
    [(0, 20), (20, 20)],
    [(6, 20), (14, 20)],
    [(3, 20), (7, 20)],
]
# What MNIST's writers seldom wrote: a label, and for each stroke the forms to be mixed.
STYLES = [
    (1, FLAGS),
    (1, FLAGS, BASES),
    (4, [[(12, 0), (2, 13), (14, 14)]], [[(13, 8), (11, 20)]]),
    (9, [[(14, 5), (9, 0), (4, 5), (8, 10), (14, 6), (15, 14), (12, 20), (2, 19)]]),
]
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
    noise *= strength * ELASTIC / 2
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
    angle = math.radians(ROTATION) * draws[0]
    cos, sin = angle.cos(), angle.sin()
    width, height = 1 + SCALE * draws[1:3]
    shear = SHEAR * draws[3]
    right, down = SHIFT * draws[4:]
    # Scaled in width and height, then sheared, then turned, then shifted
    entries = (
        cos * width,
        (cos * shear - sin) * height,
        right,
        sin * width,
        (sin * shear + cos) * height,
        down,
    )
    return torch.stack(entries, 1).view(-1, 2, 3)


def draw_styles(count: int, seed: int = 0) -> Digits:
    """Digits as much of the world writes them, and MNIST's American writers seldom did.

    Half of the `count` are ones with a flag, every second one with a base too; a
    quarter each are fours with a short second stroke and nines with a bent tail. The
    same `seed` draws the same.
    """
    rng = np.random.default_rng(seed)
    images = torch.zeros(count, IMAGE_SIZE, IMAGE_SIZE).byte()
    labels = torch.zeros(count).long()
    for index in range(count):
        labels[index], *strokes = STYLES[index % len(STYLES)]
        images[index] = _draw_dots(_mix_forms(strokes, rng), rng.uniform(0.6, 2.0))
    return Digits(images, labels, "drawn digits")


def _mix_forms(strokes, rng):
    """Where the pen goes for a random mixture of the forms: `[dots, 2]`."""
    weights = rng.dirichlet([0.5] * len(strokes[0]))
    softness = rng.uniform(10, 18)  # of the corners
    lines = []
    for forms in strokes:
        corners = np.tensordot(weights, forms, 1)
        corners += rng.normal(0, 1, corners.shape)  # an unsteady hand
        # The pen waits at each corner and jumps to the next; smoothed, that is a line.
        waiting = np.repeat(corners, 40, axis=0)
        lines.append(gaussian_filter1d(waiting, softness, axis=0))
    return np.concatenate(lines)


def _draw_dots(dots, radius):
    """Dots of a pen as an image `[28, 28] uint8` in MNIST's form."""
    dots = dots - (dots.max(axis=0) + dots.min(axis=0)) / 2
    dots *= (10 - radius) / dots.max()  # in a box of 20 pixels
    distance = torch.cdist(PLACES.T, torch.tensor(dots).float()).amin(1)
    ink = (radius + 0.5 - distance).clamp(0, 1)
    # Centred by whole pixels, since half of one would blur.
    shift = (0.5 - PLACES @ ink / ink.sum()).round().int().tolist()
    return (ink * 255).round().byte().view(IMAGE_SIZE, -1).roll(shift, (1, 0))
