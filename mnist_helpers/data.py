"""Where the digits come from, how they are preprocessed, and how they are served."""

import os
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

IMAGE_SIZE = 28
NUM_PIXELS = 784  # 28 rows of 28
NUM_CLASSES = 10
MNIST_MEAN = 0.1307  # of the pixels of the 60,000 training images, scaled to 0..1
MNIST_STD = 0.3081

PROJECT_ROOT = Path(__file__).resolve().parents[1]
RAW = "MNIST/raw"  # where torchvision keeps the files below its root
RAW_FILES = {  # name: (bytes, md5) of the four files as their makers published them
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
DOWNLOAD_TIMEOUT = 20  # seconds without a byte from the server


class DataError(RuntimeError):
    """The digits cannot be had or trusted; the message says why and what to do."""


class DataMissingError(DataError):
    """MNIST is not there, or not all of it, and could not be downloaded."""


def make_transform() -> v2.Compose:
    """The preprocessing, for one image or a batch: -> `[batch, 784] float32`.

    Tensors must be bytes, or floats in 0..1.
    """
    return v2.Compose(
        [
            v2.ToImage(),  # an image to a tensor [1, 28, 28]; a batch is one already
            v2.ToDtype(torch.float32, scale=True),  # bytes 0..255 to numbers in 0..1
            v2.Normalize([MNIST_MEAN], [MNIST_STD]),  # to mean 0, standard deviation 1
            nn.Flatten(),  # 28 rows of 28 pixels to one row of 784
        ]
    )


TRANSFORM = make_transform()


def invert_transform(pixels: Tensor) -> Tensor:
    """The images `[batch, 28, 28] uint8` that gave `pixels [batch, 784] float32`."""
    scaled = pixels * MNIST_STD + MNIST_MEAN
    images = (scaled * 255).round().clamp(0, 255).byte()
    return images.unflatten(1, (IMAGE_SIZE, IMAGE_SIZE))


@dataclass(frozen=True)
class Digits:
    """Images `[N, 28, 28] uint8` (0 = paper, 255 = ink) and labels `[N] int64`."""

    images: Tensor
    labels: Tensor
    name: str = "MNIST"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Digits":
        return Digits(self.images[index], self.labels[index], self.name)

    __getitems__ = __getitem__  # by which a `DataLoader` asks for a whole batch

    def __add__(self, others: "Digits") -> "Digits":
        """These digits and others on the same device, under the name of these."""
        images = torch.cat([self.images, others.images])
        labels = torch.cat([self.labels, others.labels])
        return Digits(images, labels, self.name)

    def to(self, device) -> "Digits":
        """The same digits on another device; loaders and training follow them."""
        return Digits(self.images.to(device), self.labels.to(device), self.name)


def load_mnist(
    root: str | Path | None = None, download: bool = True
) -> tuple[Digits, Digits]:
    """The 60,000 training and 10,000 test digits, every file checked.

    They are in the folder `root`, or else `find_root()`; what is missing is downloaded,
    unless `download` is false. Raises `DataMissingError` for files that cannot be had,
    `DataError` for a damaged one.
    """
    root = Path(root or find_root()).expanduser()
    if not has_files(root):
        download_mnist(root, download)
    for name, (size, md5) in RAW_FILES.items():
        path = root / RAW / name
        if not check_integrity(path, md5):
            raise DataError(
                f"{path} is damaged or another file: {path.stat().st_size:,} bytes, "
                f"and {size:,} with md5 {md5} would be right. "
                "Delete it and load again to download it anew."
            )
    train = datasets.MNIST(root, train=True)
    test = datasets.MNIST(root, train=False)
    return Digits(train.data, train.targets), Digits(test.data, test.targets)


def find_root() -> Path:
    """The folder that holds MNIST, or that it will be downloaded into.

    That is the one that the environment variable `MNIST_ROOT` names, or the project's
    `data/` if the variable is not set, or if only `data/` has all the files.
    """
    default = PROJECT_ROOT / "data"
    named = Path(os.environ.get("MNIST_ROOT") or default).expanduser()
    if has_files(default) and not has_files(named):
        return default
    return named


def has_files(root: Path) -> bool:
    """Whether all four files are there, whatever they hold."""
    return all((root / RAW / name).exists() for name in RAW_FILES)


def download_mnist(root: Path, allowed: bool) -> None:
    """Let torchvision unpack the archives in `root` and fetch those that are not there.

    Raises `DataMissingError` if that is not `allowed` or fails.
    """
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # a stalled server is an error
        datasets.MNIST(root, download=allowed)
    except Exception as error:  # a dozen kinds, from the socket to the archive
        files = [f"  {name} ({size:,} bytes)" for name, (size, _) in RAW_FILES.items()]
        raise DataMissingError(
            f"MNIST is not complete in {root / RAW}: {error}\nCopy these four files "
            f"there, or their archives from {datasets.MNIST.mirrors[0]}:\n"
            + "\n".join(files)
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_offline_digits() -> tuple[Digits, Digits]:
    """1,438 training and 359 test digits that scikit-learn brings along.

    They are 8x8 images, enlarged to 20x20 and put into the middle of 28x28.
    """
    from sklearn.datasets import load_digits  # here, since it takes seconds

    bundled = load_digits()  # grey values from 0 to 16
    images = torch.from_numpy(bundled.images * 255 / 16).byte()
    images = v2.functional.resize(images, [20, 20])
    images = v2.functional.pad(images, 4)
    labels = torch.from_numpy(bundled.target).long()
    return split_digits(Digits(images, labels, "offline digits"), 0.2)


def split_digits(digits: Digits, fraction: float = 1 / 12) -> tuple[Digits, Digits]:
    """The first digits to train on, and the last `fraction` to validate on.

    Not drawn at random: digits close together in MNIST's files are often by one person,
    and the validation digits must come from people whom the network does not know.
    """
    size = round(len(digits) * (1 - fraction))
    return digits[:size], digits[size:]


def make_loader(
    digits: Digits, batch_size: int, shuffle: bool = False, transform=TRANSFORM
) -> DataLoader:
    """Batches of `(pixels [batch, 784] float32, labels [batch] int64)`.

    With `shuffle`, in a new order every time, drawn from torch's random numbers. The
    batches are on the device of the digits. `transform` makes pixels of images
    `[batch, 28, 28] uint8`; with `nn.Identity()`, the batches hold the images.
    """
    # A whole batch is read (`__getitems__`) and transformed at a time: several times
    # faster than one image after another.
    return DataLoader(
        digits,
        batch_size,
        shuffle,
        # Batch norm cannot learn from a single digit: no last batch of one.
        drop_last=shuffle and len(digits) % batch_size == 1,
        collate_fn=partial(transform_batch, transform),
        # Reading in order leaves torch's random numbers alone.
        generator=None if shuffle else torch.Generator(),
    )


def transform_batch(transform, batch: Digits) -> tuple[Tensor, Tensor]:
    """The images of a batch, transformed, and its labels."""
    return transform(batch.images), batch.labels
