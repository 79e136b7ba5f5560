"""New handwriting from old: random warps of a whole batch of digits at once."""

import math
from dataclasses import dataclass, field

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
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, images: Tensor) -> Tensor:
        """`[batch, 28, 28] uint8` -> `[batch, 28, 28] float32` in 0..1."""
        batch, size = len(images), images.shape[-1]
        grid = F.affine_grid(self._draw_affine(batch, size), [batch, 1, size, size], align_corners=False)
        if self.elastic:
            grid = grid + self._draw_elastic(batch, size)
        pictures = images.unsqueeze(1).float() / 255
        return F.grid_sample(pictures, grid, align_corners=False).squeeze(1)

    def _draw_affine(self, batch: int, size: int) -> Tensor:
        """Matrices `[batch, 2, 3]` that map a place in the new picture to the place it is copied from."""
        draws = torch.rand(6, batch, generator=self.generator) * 2 - 1
        largest = [
            math.radians(self.rotation),
            self.scale,
            self.scale,
            self.shear,
            *[self.shift * 2 / size] * 2,
        ]
        angle, width, height, shear, right, down = draws * torch.tensor(largest)[:, None] * self.strength
        cos, sin, width, height = angle.cos(), angle.sin(), 1 + width, 1 + height
        rows = [
            torch.stack([cos * width, (cos * shear - sin) * height, right], dim=1),
            torch.stack([sin * width, (sin * shear + cos) * height, down], dim=1),
        ]
        return torch.stack(rows, dim=1)

    def _draw_elastic(self, batch: int, size: int) -> Tensor:
        """Smooth displacements `[batch, size, size, 2]`: noise on a coarse grid, blurred by a Gaussian."""
        pixels, points = torch.arange(size), torch.linspace(0, size - 1, GRID)
        blur = torch.exp(-((pixels[:, None] - points) ** 2) / (2 * SMOOTHNESS**2))
        blur = blur / blur.square().sum(dim=1, keepdim=True).sqrt()  # noise of variance 1 stays of variance 1
        noise = torch.randn(batch, 2, GRID, GRID, generator=self.generator)
        return (blur @ noise @ blur.T).permute(0, 2, 3, 1) * (self.elastic * self.strength / size)
