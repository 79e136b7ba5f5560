"""New handwriting from old: random warps of a whole batch of digits at once."""

import math
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 7  # the elastic field is drawn on GRID x GRID points and smoothed
SMOOTHNESS = 4.0  # pixels; the sigma that Simard et al. found best


@dataclass
class RandomWarp:
    """A transform that draws every digit of a batch differently, as another hand might have written it.

    Affine (rotation, scale, shear, shift) and elastic deformation after Simard, Steinkraus and Platt 2003,
    "Best practices for convolutional neural networks applied to visual document analysis". Each value is
    the largest deviation, drawn uniformly; `elastic` is the standard deviation of the displacement times two.
    """

    strength: float = 1.0  # scales all of them; 0 changes nothing
    rotation: float = 12.0  # degrees
    scale: float = 0.12  # fraction, for width and height on their own
    shear: float = 0.2  # fraction of the height
    shift: float = 2.0  # pixels, in both directions
    elastic: float = 2.0  # pixels
    fade: float = 0.0  # share of the strength that is gone after `steps` batches, falling evenly
    steps: int = 1
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)
    calls: int = field(init=False, default=0, repr=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, images: Tensor) -> Tensor:
        """`[batch, 28, 28] uint8` -> `[batch, 28, 28] float32` in 0..1."""
        pictures = images.unsqueeze(1).float() / 255
        places = self.draw_places(len(images), images.shape[-1])
        # Bilinear would blur: the network would practise on softer digits than it is tested on.
        warped = F.grid_sample(pictures, places, mode="bicubic", align_corners=False)
        return warped.squeeze(1).clamp(0, 1)

    def draw_places(self, batch: int, size: int) -> Tensor:
        """Where each pixel is copied from, across and down, `[batch, size, size, 2]` in -1..1."""
        strength = self.strength * (1 - self.fade * min(1.0, self.calls / self.steps))
        self.calls += 1
        parts = [self._draw_affine(batch, size, strength), self._draw_elastic(batch, size, strength)]
        weights = torch.cat(parts, dim=2)
        places = weights.flatten(0, 1) @ make_fields(size)  # one matrix product for the whole batch
        return places.view(batch, 2, size, size).permute(0, 2, 3, 1)

    def _draw_affine(self, batch: int, size: int, strength: float) -> Tensor:
        """Matrices `[batch, 2, 3]` that map a place in the new picture to the place it is copied from."""
        draws = torch.rand(6, batch, generator=self.generator) * 2 - 1
        largest = [
            math.radians(self.rotation),
            self.scale,
            self.scale,
            self.shear,
            *[self.shift * 2 / size] * 2,
        ]
        angle, width, height, shear, right, down = draws * torch.tensor(largest)[:, None] * strength
        cos, sin, width, height = angle.cos(), angle.sin(), 1 + width, 1 + height
        across = torch.stack([cos * width, (cos * shear - sin) * height, right], dim=1)
        along = torch.stack([sin * width, (sin * shear + cos) * height, down], dim=1)
        return torch.stack([across, along], dim=1)

    def _draw_elastic(self, batch: int, size: int, strength: float) -> Tensor:
        """How far each point of the coarse grid is displaced, `[batch, 2, GRID * GRID]`."""
        noise = torch.randn(batch, 2, GRID * GRID, generator=self.generator)
        return noise * (self.elastic * strength / size)


@cache
def make_fields(size: int) -> Tensor:
    """What a warp is a weighted sum of, `[3 + GRID * GRID, size * size]`, in units of half a picture.

    The place across, the place down, one; and for each point of the coarse grid a Gaussian bump, scaled so
    that noise of variance 1 on the grid gives displacements of variance 1.
    """
    pixels = torch.arange(size)
    bumps = torch.exp(-((torch.linspace(0, size - 1, GRID)[:, None] - pixels) ** 2) / (2 * SMOOTHNESS**2))
    bumps = bumps / bumps.square().sum(dim=0).sqrt()
    place = (2 * pixels + 1) / size - 1
    plane = [place.expand(size, size), place[:, None].expand(size, size), torch.ones(size, size)]
    return torch.cat([torch.stack(plane).flatten(1), torch.kron(bumps, bumps)])
