"""The 1 as most of the world writes it: MNIST's writers were American, and their 1 is a bare stroke."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, Digits

MARGIN, BOX = 6, 20  # pixels


def add_flags(digits: Digits, share: float = 0.25, seed: int = 0) -> Digits:
    """The digits with a flag, a base or both drawn on that share of the ones; all others as they are."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (digits.labels.cpu() == 1) & (torch.rand(len(digits), generator=generator) < share)
    images = digits.images.cpu().clone()
    images[chosen] = draw_flags(images[chosen], generator)
    return Digits(images.to(digits.images.device), digits.labels, digits.name)


def draw_flags(images: Tensor, generator: torch.Generator) -> Tensor:
    """Ones `[N, 28, 28] uint8` with flag, base or both, each as thick as its stem, again in MNIST's form."""
    ink = F.pad(images.float() / 255, [MARGIN] * 4)
    place = torch.arange(ink.shape[-1])
    where = place + 1j * place[:, None]  # places are complex numbers: across + 1j * down

    def draw(low: float, high: float) -> Tensor:  # [N, 1]
        return low + (high - low) * torch.rand(len(ink), 1, generator=generator)

    rows, ends = (ink.amax(dim=2) > 0.4).float(), []
    for row in (rows.argmax(dim=1), len(place) - 1 - rows.flip(1).argmax(dim=1)):  # highest, lowest
        line = ink[torch.arange(len(ink)), row]
        ends.append(((line * place).sum(dim=1) / line.sum(dim=1) + 1j * row)[:, None])
    top, bottom = ends
    down, length = (bottom - top).angle(), (bottom - top).abs()  # upright: pi / 2
    width = (ink.sum(dim=(1, 2))[:, None] / length).clamp(1.5, 5)
    inset, along = torch.polar(width / 2, down), torch.linspace(0, 1, 16)
    size, kind = draw(0, 1), draw(0, 1) * (down < 2)  # nobody puts a base under a stroke that lies
    # Between the stem's direction and left; a long flag keeps closer to the stem, or it would make a 7.
    turn = draw(0.3, 0.55) + draw(0, 0.2) * (1 - size)
    reach = (3 + 6 * size + (width - 2).clamp(min=0)) * (kind < 0.85)  # 0 leaves a dot within the stem
    angle = down + (math.pi - down) * turn + draw(-0.4, 0.2) * (along - 0.5)
    left, right = ((draw(2, 6) + width / 2) * (kind > 0.55) for _ in range(2))
    base = bottom - inset + ((left + right) * along - left) * (1 + 1j * draw(-0.12, 0.06))
    strokes = torch.cat([top + inset + torch.polar(reach * along, angle), base], dim=1)
    away = torch.cdist(torch.view_as_real(strokes), torch.view_as_real(where.flatten())).amin(dim=1)
    drawn = (0.45 * width[:, :, None] - away.view(ink.shape) + 0.5).clamp(0, 1)
    ink = torch.maximum(ink, drawn * ink.amax(dim=(1, 2), keepdim=True))
    # No side longer than 20 pixels, and the centre of mass in the middle; half a pixel of shift would blur.
    sides = torch.stack([(ink.amax(dim=dim) > 0.1).sum(dim=1) for dim in (1, 2)])
    shrink = (sides.amax(dim=0) / BOX).clamp(min=1)[:, None, None]
    middle = (ink * where).sum(dim=(1, 2), keepdim=True) / ink.sum(dim=(1, 2), keepdim=True)
    middle = torch.where(shrink > 1, middle, torch.complex(middle.real.round(), middle.imag.round()))
    places = middle + shrink * (where[:IMAGE_SIZE, :IMAGE_SIZE] - IMAGE_SIZE // 2 * (1 + 1j))
    places = torch.view_as_real((2 * places + 1 + 1j) / len(where) - (1 + 1j))
    fitted = F.grid_sample(ink[:, None], places, mode="bicubic", align_corners=False).squeeze(1)
    return (fitted.clamp(0, 1) * 255).round().to(torch.uint8)
