"""New handwriting from old: random warps of a whole batch of digits at once."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE

GRID = 7  # the elastic field is drawn on GRID x GRID points and smoothed
SMOOTHNESS = 4.0  # pixels; the sigma that Simard et al. found best


@dataclass
class RandomWarp:
    """A transform that draws every digit of a batch anew, as another hand might have written it.

    Affine and elastic deformation after Simard, Steinkraus and Platt 2003, "Best practices for convolutional
    neural networks applied to visual document analysis". Each value is the largest deviation, drawn evenly.
    """

    strength: float = 1.0  # scales all of them; 0 changes nothing
    rotation: float = 12.0  # degrees
    scale: float = 0.12  # fraction, for width and height on their own
    shear: float = 0.2  # fraction of the height
    shift: float = 2.0  # pixels, in both directions
    elastic: float = 2.0  # pixels; twice the standard deviation of the displacement
    fade: float = 0.0  # share of the strength that is gone after `steps` batches, falling evenly
    steps: int = 1
    seed: int = 0
    device: torch.device | str = "cpu"  # where the images are

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.calls = 0
        turn, shift = math.radians(self.rotation), self.shift * 2 / IMAGE_SIZE
        largest = [turn, self.scale, self.scale, self.shear, shift, shift]
        self.largest = torch.tensor(largest, device=self.device)[:, None]
        pixels, points = torch.arange(IMAGE_SIZE), torch.linspace(0, IMAGE_SIZE - 1, GRID)[:, None]
        bumps = torch.exp(-((pixels - points) ** 2) / (2 * SMOOTHNESS**2))
        bumps /= bumps.square().sum(dim=0).sqrt()  # noise of variance 1 displaces with variance 1
        place = ((2 * pixels + 1) / IMAGE_SIZE - 1).expand(IMAGE_SIZE, IMAGE_SIZE)
        plane = torch.stack([place, place.T, torch.ones_like(place)]).flatten(1)
        # What a warp is a weighted sum of: across, down, one, and a bump at each point of the coarse grid.
        self.fields = torch.cat([plane, torch.kron(bumps, bumps)]).to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """`[batch, 28, 28] uint8` -> `[batch, 28, 28] float32` in 0..1."""
        strength = self.strength * (1 - self.fade * min(1.0, self.calls / self.steps))
        self.calls += 1
        affine = self._draw_affine(len(images), strength)
        noise = torch.randn(len(images), 2, GRID * GRID, generator=self.generator, device=self.device)
        weights = torch.cat([affine, noise * (self.elastic * strength / IMAGE_SIZE)], dim=2)
        places = weights.flatten(0, 1) @ self.fields  # one matrix product, faster than its parts
        places = places.view(-1, 2, IMAGE_SIZE, IMAGE_SIZE).permute(0, 2, 3, 1)
        # Bilinear would blur: the network would train on softer digits than it is tested on.
        pictures = images[:, None].float() / 255
        return F.grid_sample(pictures, places, mode="bicubic", align_corners=False).squeeze(1).clamp(0, 1)

    def _draw_affine(self, batch: int, strength: float) -> Tensor:
        """Matrices `[batch, 2, 3]` that map a place in the new image to the place it is copied from."""
        draws = torch.rand(6, batch, generator=self.generator, device=self.device) * 2 - 1
        angle, width, height, shear, right, down = draws * self.largest * strength
        cos, sin, width, height = angle.cos(), angle.sin(), 1 + width, 1 + height
        across = torch.stack([cos * width, (cos * shear - sin) * height, right], dim=1)
        along = torch.stack([sin * width, (sin * shear + cos) * height, down], dim=1)
        return torch.stack([across, along], dim=1)
