"""Where the digits come from, what is done to them before a model sees them, and how they are served."""

import hashlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import v2

IMAGE_SIZE = 28
NUM_PIXELS = IMAGE_SIZE * IMAGE_SIZE
NUM_CLASSES = 10
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the 60,000 training images scaled to 0..1

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD_TIMEOUT = 20  # seconds without a byte from the server
RAW_FILES = {  # name: (bytes, md5) of the four files as their makers published them
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}

# [28, 28] or [batch, 28, 28] uint8 (or one PIL image) -> [1 or batch, 784] float32
TRANSFORM = v2.Compose(
    [
        v2.ToImage(),  # to a tensor
        v2.ToDtype(torch.float32, scale=True),  # bytes 0..255 to numbers in 0..1
        v2.Normalize([MNIST_MEAN], [MNIST_STD]),  # to mean 0 and standard deviation 1
        nn.Flatten(start_dim=-2),  # 28 rows of 28 pixels to one row of 784
    ]
)


class DataError(RuntimeError):
    """The digits cannot be had or cannot be trusted; the message says why and what to do."""


class DataMissingError(DataError):
    """MNIST is not there, or not all of it, and could not be downloaded."""


@dataclass(frozen=True)
class Digits:
    """Images `[N, 28, 28] uint8` (0 = paper, 255 = ink), labels `[N] int64`, and the data set's name."""

    images: Tensor
    labels: Tensor
    name: str = "MNIST"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Digits":
        return Digits(self.images[index], self.labels[index], self.name)

    def to(self, device) -> "Digits":
        """The same digits on another device; loaders, augmentation and training follow them there."""
        return Digits(self.images.to(device), self.labels.to(device), self.name)


def load_mnist(root: str | Path | None = None, download: bool = True) -> tuple[Digits, Digits]:
    """The 60,000 training and 10,000 test digits of MNIST, from `find_root(root)`, checked byte by byte.

    Missing files are downloaded, or `DataMissingError` is raised; `DataError` for a damaged one.
    """
    root = find_root(root)
    if not all((root / "MNIST" / "raw" / name).exists() for name in RAW_FILES):
        _download(root, download)
    if (root / "MNIST" / "processed").exists():  # torchvision would read that instead, unchecked
        raise DataError(f"{root / 'MNIST' / 'processed'} is of an old torchvision: delete that folder")
    try:
        for name in RAW_FILES:
            _check_file(root / "MNIST" / "raw" / name)
        splits = [MNIST(root, train=train) for train in (True, False)]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): mend or delete it") from None
    return tuple(Digits(split.data, split.targets) for split in splits)


def find_root(root: str | Path | None = None) -> Path:
    """The folder of MNIST: `root`, else the first with MNIST of `$MNIST_ROOT` and the project's `data/`."""
    named = [Path(place).expanduser() for place in (root, os.environ.get("MNIST_ROOT")) if place]
    places = named[:1] if root else [*named, PROJECT_ROOT / "data"]
    return next(filter(_holds_mnist, places), places[0])


def load_offline_digits() -> tuple[Digits, Digits]:
    """1,437 training and 360 test digits from scikit-learn's bundled 8x8 set, enlarged to 20x20 in 28x28."""
    from sklearn.datasets import load_digits as load_bundled  # imported here: seconds, and rarely needed

    images, labels = (torch.from_numpy(values) for values in load_bundled(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=20, mode="bicubic").clamp(0, 1)
    images = (F.pad(images.squeeze(1), (4, 4, 4, 4)) * 255).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    digits = Digits(images, labels.long(), "offline digits")
    return digits[order[360:]], digits[order[:360]]


def split_digits(digits: Digits, fraction: float = 1 / 12) -> tuple[Digits, Digits]:
    """The first digits to train on and the last, `fraction` of them, to validate on.

    Not drawn at random: neighbours in MNIST's files are by the same hand, and all writers would be known.
    """
    kept = len(digits) - round(len(digits) * fraction)
    if not 0 < kept < len(digits):
        raise ValueError(f"fraction must leave digits on both sides (1/12, say), got {fraction}")
    return digits[:kept], digits[kept:]


class BatchSampler(Sampler[Tensor]):
    """The order of one epoch in index tensors `[batch] int64`; with a `generator` shuffled anew each time."""

    drop_single = False  # True: leave out a last batch of one image, from which batch norm cannot learn

    def __init__(self, size: int, batch_size: int, generator: torch.Generator | None = None, device="cpu"):
        self.size, self.batch_size, self.generator, self.device = size, batch_size, generator, device

    def draw_order(self) -> Tensor:
        if self.generator is None:
            return torch.arange(self.size, device=self.device)
        return torch.randperm(self.size, generator=self.generator, device=self.device)

    def __len__(self) -> int:
        return math.ceil((self.size - self.drop_single) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.draw_order().split(self.batch_size)[: len(self)])


def make_loader(
    digits: Digits, batch_size: int, shuffle: bool = False, seed: int = 0, transform=TRANSFORM, sampler=None
) -> DataLoader:
    """A `DataLoader` of `(pixels [batch, 784] float32, labels [batch] int64)` on the device of `digits`.

    It reads and transforms a whole batch at a time (`batch_size=None`: "Loading batched data" in PyTorch's
    documentation), tens of times faster than one image after another. A `sampler` of batches sets the order.
    """
    dataset, device = TensorDataset(digits.images, digits.labels), digits.images.device
    if sampler is None:
        generator = torch.Generator(device).manual_seed(seed) if shuffle else None
        sampler = BatchSampler(len(digits), batch_size, generator, device)
    collate = partial(_transform_batch, transform)
    own = torch.Generator()  # a loader draws a number even where it needs none
    return DataLoader(dataset, sampler=sampler, batch_size=None, collate_fn=collate, generator=own)


def invert_transform(pixels: Tensor) -> Tensor:
    """The images `[batch, 28, 28] uint8` that `TRANSFORM` turned into `pixels [batch, 784] float32`."""
    scaled = pixels * MNIST_STD + MNIST_MEAN
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8).unflatten(-1, (IMAGE_SIZE, IMAGE_SIZE))


def _transform_batch(transform, batch):
    return (batch[0] if transform is None else transform(batch[0])), batch[1]


def _holds_mnist(root: Path) -> bool:
    raw = root / "MNIST" / "raw"
    return any((raw / f"{name}{ending}").exists() for name in RAW_FILES for ending in ("", ".gz"))


def _download(root: Path, allowed: bool) -> None:
    """Let torchvision unpack the archives that are there, and fetch those that are not."""
    cause, patience = "downloading was not asked for", socket.getdefaulttimeout()
    try:
        if allowed:
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # a stalled server ends in an error, not in waiting
            MNIST(root, download=True)
            return
    except Exception as error:  # a dozen kinds, from the socket to the archive
        cause = f"downloading failed: {' '.join(str(error).split()) or type(error).__name__}"
    finally:
        socket.setdefaulttimeout(patience)
    files = "".join(f"\n  {name} ({size:,} bytes)" for name, (size, _) in RAW_FILES.items())
    raise DataMissingError(
        f"MNIST is not complete in {root / 'MNIST' / 'raw'}, and {cause}\n"
        f"Copy these four files there, or their four archives from {MNIST.mirrors[0]}:{files}"
    )


def _check_file(path: Path) -> None:
    size, md5 = RAW_FILES[path.name]
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or another file: {len(content):,} bytes, beginning with {content[:16]!r}, "
            f"instead of {size:,} bytes with md5 {md5}. Delete it and load again to download it anew."
        )
