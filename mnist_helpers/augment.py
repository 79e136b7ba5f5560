"""New handwriting from old: random warps of a batch of digits, and ones with a flag."""

import math
import random
from functools import cache

import torch
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, Digits

GRID = 7  # the elastic field is drawn on GRID x GRID points and smoothed
SMOOTHNESS = 4.0  # pixels; the sigma that Simard et al. found best
ROTATION = 12.0  # degrees; this and the next three are the largest deviations
SCALE = 0.12  # a fraction, for width and height separately
SHEAR = 0.2  # a fraction of the height
SHIFT = 2.0  # pixels, in both directions
ELASTIC = 2.0  # pixels, twice the standard deviation of a pixel's displacement
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


def add_flags(digits: Digits, share: float, seed: int = 0) -> Digits:
    """The digits with a flag, a base or both drawn on `share` (0 to 1) of the ones.

    MNIST's writers were American, and their 1 is a bare stroke. Much of the world
    writes it with a flag, some with a base. A one that has either already stays as it
    is. The same `seed` chooses and draws the same.
    """
    rng = random.Random(seed)
    images = digits.images.clone()
    for index in (digits.labels == 1).nonzero().flatten().tolist():
        if rng.random() < share:
            images[index] = _draw_flag(images[index].cpu(), rng)
    return Digits(images, digits.labels, digits.name)


def _draw_flag(image, rng):
    """A one `[28, 28] uint8` with a flag, a base or both, if it is a bare stroke."""
    ink = image.flatten() / 255 + 1e-6  # more than nothing, for an empty image
    (wide, slant), (_, tall) = torch.cov(PLACES, aweights=ink).tolist()
    slope = slant / tall  # of the stem: pixels to the right for each one down
    if wide - slope * slant > 0.1 * tall:  # ink lies far from the stem
        return image
    half = math.sqrt(3 * tall)  # of the height of an even stroke
    radius = ink.sum() / half / math.hypot(1, slope) / 4
    # An upright stem from -1 to 1 becomes this one: slanted, longer and moved.
    frame = (half - radius) * torch.tensor([[1, 0], [slope, 1]])
    dots = _plan_flag(rng) @ frame + PLACES @ ink / ink.sum()
    distance = torch.cdist(PLACES.T, dots).amin(1)
    ink = torch.maximum(ink, (radius + 0.5 - distance).clamp(0, 1))
    # MNIST's form again: centred, by whole pixels, since half of one would blur.
    shift = (0.5 - PLACES @ ink / ink.sum()).round().int().tolist()
    return (ink * 255).round().byte().view_as(image).roll(shift, (1, 0))


def _plan_flag(rng):
    """Where a pen goes for a flag, a base or both: `[dots, 2]`, right and down."""
    size = rng.uniform(0.15, 0.95)  # as part of the stem
    # A long flag keeps close to the stem, or it would make a 7.
    angle = math.pi / 2 * (rng.uniform(0.22, 0.85) - 0.3 * size)
    direction = torch.tensor([-math.sin(angle), math.cos(angle)])
    flag = torch.outer(torch.linspace(0, 2 * size, 40), direction)
    flag[:, 1] -= 1  # from the top of the stem
    across = rng.uniform(0.25, 1.0) * torch.linspace(-1, 1, 40)
    base = torch.stack([across, torch.ones(40)], 1)
    parts = rng.choice([[flag], [flag], [flag, base], [base]])
    return torch.cat(parts)
