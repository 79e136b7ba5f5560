"""The 1 as most of the world writes it: MNIST's writers were American, and their 1 is a bare stroke."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, Digits

SIDE = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
PLACES = SIDE + 1j * SIDE[:, None]  # complex numbers: pixels across + 1j * down, from the middle of the image


def add_flags(digits: Digits, share: float = 0.35, seed: int = 0) -> Digits:
    """The digits with a flag, a base or both drawn on that share of the ones; all others as they are."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (digits.labels.cpu() == 1) & (torch.rand(len(digits), generator=generator) < share)
    images = digits.images.cpu().clone()
    images[chosen] = draw_flags(images[chosen], generator)
    return Digits(images.to(digits.images.device), digits.labels, digits.name)


def draw_flags(images: Tensor, generator: torch.Generator) -> Tensor:
    """Ones `[N, 28, 28] uint8` with a flag, a base or both: copies of the stem itself, shorter and turned."""
    ink = images.float() / 255

    def draw(low: float, high: float) -> Tensor:  # [N, 1, 1]
        return low + (high - low) * torch.rand(len(ink), 1, 1, generator=generator)

    def mean(values: Tensor) -> Tensor:
        return (ink * values).sum(dim=(1, 2), keepdim=True) / ink.sum(dim=(1, 2), keepdim=True)

    def copy(places: Tensor) -> Tensor:
        """Images `[N, 28, 28]` with the ink that `ink` has at these places."""
        grid = torch.view_as_real(places / (IMAGE_SIZE / 2))
        return F.grid_sample(ink[:, None], grid, mode="bicubic", align_corners=False).squeeze(1).clamp(0, 1)

    middle = mean(PLACES)
    squares, spread = mean((PLACES - middle) ** 2), mean((PLACES - middle).abs() ** 2)
    angle = squares.angle() / 2 % math.pi  # of the stem, downwards; upright: pi / 2
    down = torch.polar(torch.ones_like(angle), angle)
    half = (3 * spread).sqrt()  # from the middle of an even stroke to its end
    length, kind = draw(0.15, 0.55), draw(0, 1)
    # Between the stem's direction and left; a long flag keeps closer to the stem, or it would make a 7.
    turn = draw(0.25, 0.85) - 0.25 * length
    flag = torch.polar(length, angle + (math.pi - angle) * turn)
    base = torch.polar(draw(0.25, 0.7), draw(-0.12, 0.06))
    parts = [ink]
    bare = squares.abs() > 0.85 * spread  # else there is a flag or a base already
    for part, joint, start, used in ((flag, -half, -half, kind < 0.85), (base, half, 0, kind > 0.55)):
        offset = (PLACES - middle - joint * down) / torch.sgn(part)  # along and across the new stroke
        offset = torch.complex(offset.real / part.abs(), offset.imag)  # it is shorter, and as thick
        parts.append(copy(middle + (start + offset) * down) * (used & bare))
    ink = torch.stack(parts).amax(dim=0)
    # MNIST's form again: the centre of mass in the middle, by whole pixels, since half of one would blur.
    middle = mean(PLACES) - (0.5 + 0.5j)
    middle = torch.complex(middle.real.round(), middle.imag.round())
    return (copy(middle + PLACES) * 255).round().to(torch.uint8)
