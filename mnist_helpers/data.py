"""Where the digits come from, what is done to them before a model sees them, and how they are served."""

import hashlib
import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.datasets.utils import extract_archive
from torchvision.transforms import v2

IMAGE_SIZE = 28
NUM_PIXELS = IMAGE_SIZE * IMAGE_SIZE
NUM_CLASSES = 10
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the 60,000 training pictures scaled to 0..1

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DOWNLOAD_TIMEOUT = 20  # seconds without a byte from the server
RAW_FILES = {  # name: (bytes, md5) of the four files as their makers published them
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
# Test digits whose label fewer than three of five people agreed with: mturk/mnist_mturk.json of Northcutt,
# Athalye and Mueller 2021, "Pervasive label errors in test sets destabilize machine learning benchmarks".
DOUBTFUL_LABELS = [947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729]

# uint8 [28, 28] or [batch, 28, 28] (or one PIL picture) -> float32 [1 or batch, 784]
TRANSFORM = v2.Compose(
    [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MNIST_MEAN], [MNIST_STD]),
        nn.Flatten(start_dim=-2),
    ]
)


class DataError(RuntimeError):
    """The digits cannot be had or cannot be trusted; the message says why and what to do."""


class DataMissingError(DataError):
    """No MNIST file was found and none could be downloaded."""


@dataclass(frozen=True)
class Digits:
    """Pictures `[N, 28, 28] uint8` (0 = paper, 255 = ink), their labels `[N] int64`, and their origin."""

    images: Tensor
    labels: Tensor
    name: str = "MNIST"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Digits":
        return Digits(self.images[index], self.labels[index], self.name)


def load_digits(root: str | Path | None = None, download: bool = True) -> tuple[Digits, Digits]:
    """Training and test digits: MNIST, or the small offline digits where MNIST cannot be had.

    Damaged MNIST files raise `DataError`; they never lead to the offline digits.
    """
    try:
        return load_mnist(root, download)
    except DataMissingError:
        return load_offline_digits()


def load_mnist(root: str | Path | None = None, download: bool = True) -> tuple[Digits, Digits]:
    """The 60,000 training and 10,000 test digits of MNIST (LeCun et al. 1998), checked byte by byte.

    Looks where `find_root` says, and downloads to there what is not found. Raises `DataError` for a damaged
    or missing file, `DataMissingError` when there is none at all.
    """
    root = find_root(root)
    if not _holds_mnist(root):
        _download(root, download)
    for name in RAW_FILES:
        _check_raw_file(root / "MNIST" / "raw" / name)
    old = root / "MNIST" / "processed"
    if (old / MNIST.training_file).exists():  # torchvision would read it instead of the checked files
        raise DataError(f"{old} holds copies that an old torchvision made: delete that folder.")
    splits = [MNIST(root, train=train) for train in (True, False)]
    return tuple(Digits(split.data, split.targets.long()) for split in splits)


def find_root(root: str | Path | None = None) -> Path:
    """The folder of MNIST: `root`, else the first with MNIST of `$MNIST_ROOT` and the project's `data/`.

    Where neither has any, the first of them that is named: the place to download to.
    """
    if root is not None:
        return Path(root).expanduser()
    named = os.environ.get("MNIST_ROOT")
    places = [*([Path(named).expanduser()] if named else []), PROJECT_ROOT / "data"]
    return next(filter(_holds_mnist, places), places[0])


def load_offline_digits() -> tuple[Digits, Digits]:
    """1,437 training and 360 test digits from scikit-learn's bundled 8x8 set, enlarged to 20x20 in 28x28."""
    from sklearn.datasets import load_digits as load_bundled  # imported here: seconds, and rarely needed

    bundled = load_bundled()
    pictures = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    pictures = nn.functional.interpolate(pictures, size=20, mode="bicubic").clamp(0, 1)
    pictures = nn.functional.pad(pictures, (4, 4, 4, 4)).squeeze(1)
    images = (pictures * 255).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    digits = Digits(images, torch.from_numpy(bundled.target).long(), "offline digits")
    return digits[order[360:]], digits[order[:360]]


def split_digits(digits: Digits, fraction: float = 1 / 12) -> tuple[Digits, Digits]:
    """The first digits and the last: the second part is `fraction` of them (5,000 of 60,000).

    Not drawn at random: digits that stand close together in MNIST were written by the same hand, and a
    network would be judged by writers that it has practised on.
    """
    kept = len(digits) - round(len(digits) * fraction)
    return digits[:kept], digits[kept:]


def remove_slant(digits: Digits) -> Digits:
    """The digits sheared until none leans: preprocessing of LeCun et al. 1998 ("deslanting").

    How far a digit leans is the slope of its ink across over its ink down, from the second moments; each
    row of pixels moves in proportion to its distance from the centre of mass.
    """
    upright = torch.cat([_shear_upright(images) for images in digits.images.split(5000)])
    return Digits(upright, digits.labels, f"upright {digits.name}")


def make_loader(
    digits: Digits, batch_size: int, shuffle: bool = False, seed: int = 0, transform=TRANSFORM, order=None
) -> DataLoader:
    """A `DataLoader` of `(pictures [batch, 784] float32, labels [batch] int64)`; the last batch may be short.

    It reads and transforms a whole batch at a time (`batch_size=None` and a `BatchSampler`: "Loading batched
    data" in the documentation of torch.utils.data), which makes it tens of times faster than one picture
    after another. `shuffle` draws a new order every epoch, from the loader's own generator; a sampler in
    `order` decides the order instead.
    """
    dataset = TensorDataset(digits.images, digits.labels)
    generator = torch.Generator().manual_seed(seed)
    if order is None:
        order = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
    lonely = shuffle and len(order) % batch_size == 1  # batch normalisation cannot learn from one digit
    batches = BatchSampler(order, batch_size, drop_last=lonely)
    collate = partial(_transform_batch, transform)
    return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=collate, generator=generator)


def invert_transform(pixels: Tensor) -> Tensor:
    """The pictures `[batch, 28, 28] uint8` that `TRANSFORM` turned into `pixels [batch, 784] float32`."""
    scaled = pixels * MNIST_STD + MNIST_MEAN
    return (scaled * 255).round().clamp(0, 255).to(torch.uint8).unflatten(-1, (IMAGE_SIZE, IMAGE_SIZE))


def _shear_upright(images: Tensor) -> Tensor:
    pictures, size = images.float() / 255, images.shape[-1]
    place = (2 * torch.arange(size) + 1) / size - 1  # of each row and column, in units of half a picture
    ink = pictures.sum(dim=(1, 2)).clamp(min=1e-6)[:, None]
    down = place - (pictures.sum(dim=2) * place).sum(dim=1, keepdim=True) / ink
    across = place - (pictures.sum(dim=1) * place).sum(dim=1, keepdim=True) / ink
    covariance = torch.einsum("nyx,ny,nx->n", pictures, down, across)
    variance = torch.einsum("nyx,ny->n", pictures, down**2).clamp(min=1e-6)
    slope = (covariance / variance).clamp(-1, 1)
    columns = place + (slope[:, None] * down)[:, :, None]
    grid = torch.stack([columns, place[:, None].expand_as(columns)], dim=-1)
    sheared = nn.functional.grid_sample(pictures[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    return (sheared.clamp(0, 1) * 255).round().to(torch.uint8)


def _holds_mnist(root: Path) -> bool:
    raw = root / "MNIST" / "raw"
    return any((raw / name).exists() or (raw / f"{name}.gz").exists() for name in RAW_FILES)


def _transform_batch(transform, batch):
    images, labels = batch
    return (images if transform is None else transform(images)), labels


def _check_raw_file(path: Path) -> None:
    size, md5 = RAW_FILES[path.name]
    archive = path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes() if path.exists() else None
        if content is not None and hashlib.md5(content).hexdigest() == md5:
            return
        packed = archive.read_bytes() if archive.exists() else b""
        if hashlib.md5(packed).hexdigest() == dict(MNIST.resources)[archive.name]:
            extract_archive(archive, path.parent)
            return
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read or written ({error.strerror}).") from None
    if content is None:
        cause = f"is missing, and {archive.name} is damaged" if packed else "is missing"
    elif content.lstrip()[:1] == b"<":
        cause = "is a web page, not a data file"
    elif len(content) != size:
        cause = f"has {len(content):,} bytes instead of {size:,}"
    else:
        cause = f"has the right size but other contents (md5 is not {md5})"
    raise DataError(
        f"{path} {cause}. Delete the folder {path.parent} and load again to download it anew, "
        f"or put an intact {path.name} or {archive.name} there."
    )


def _download(root: Path, allowed: bool) -> None:
    raw, cause = root / "MNIST" / "raw", "downloading was not asked for"
    if allowed:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with _socket_timeout(DOWNLOAD_TIMEOUT), TemporaryDirectory(dir=root) as unfinished:
                for file in Path(MNIST(unfinished, download=True).raw_folder).iterdir():
                    os.replace(file, raw / file.name)  # only here, so that no half a file is ever left behind
            return
        except (OSError, RuntimeError, HTTPException) as error:  # torchvision's own error is a RuntimeError
            cause = f"downloading failed: {' '.join(str(error).split()) or type(error).__name__}"
    files = "".join(f"\n  {name}.gz or {name} ({size:,} bytes)" for name, (size, _) in RAW_FILES.items())
    raise DataMissingError(
        f"No MNIST in {raw}, and {cause}\n"
        f"Copy these four files there, from {MNIST.mirrors[0]} or from a machine that has them:{files}"
    )


@contextmanager
def _socket_timeout(seconds: float):
    """A stalled server ends in an error, not in waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
