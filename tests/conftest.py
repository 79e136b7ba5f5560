"""What all tests share: toy digits, MNIST where it is found, and no network."""

import gzip
import hashlib
import socket
import struct

import mnist_helpers  # noqa: F401  (before torch: it sets how torch's threads wait)

# isort: split
import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from torchvision.datasets import MNIST

from mnist_helpers import data
from mnist_helpers.data import DataMissingError, Digits, load_mnist

THIS_MACHINE = (None, "", "localhost", "127.0.0.1", "::1")


@pytest.fixture(scope="session", autouse=True)
def loopback_only():
    """A test that turns to the network fails, whatever the code does about errors."""
    real_resolve = socket.getaddrinfo

    def resolve(host, *args, **options):
        if host not in THIS_MACHINE:
            pytest.fail(f"a test tried to reach {host}: tests use no network")
        return real_resolve(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        yield


@pytest.fixture(scope="session")
def mnist():
    """The real MNIST; tests that need it are skipped where it is not found."""
    try:
        return load_mnist(download=False)
    except DataMissingError as error:
        pytest.skip(str(error))


def make_toy_digits(count, seed=0):
    """Ten kinds of noisy bars that are easy to tell apart by the bar's place."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % 10
    images = torch.randint(0, 100, (count, 28, 28), generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6, 4:24] = 255
    return Digits(images.to(torch.uint8), labels, "toy digits")


@pytest.fixture
def toy():
    """100 toy digits, ten of each kind."""
    return make_toy_digits(100)


def pack(numbers):
    """MNIST's file format: a magic number, the sizes, then one byte per number."""
    header = struct.pack(f">{1 + numbers.ndim}i", 0x800 + numbers.ndim, *numbers.shape)
    return header + numbers.to(torch.uint8).numpy().tobytes()


TOY_TRAIN = make_toy_digits(40, seed=1)
TOY_TEST = make_toy_digits(20, seed=2)
TOY_FILES = {
    "train-images-idx3-ubyte": pack(TOY_TRAIN.images),
    "train-labels-idx1-ubyte": pack(TOY_TRAIN.labels),
    "t10k-images-idx3-ubyte": pack(TOY_TEST.images),
    "t10k-labels-idx1-ubyte": pack(TOY_TEST.labels),
}
TOY_ARCHIVES = {
    f"{name}.gz": gzip.compress(content, mtime=0) for name, content in TOY_FILES.items()
}


@pytest.fixture
def toy_mnist(tmp_path, monkeypatch):
    """The `raw` folder of a tiny MNIST, whose checksums count as the right ones."""
    raw = tmp_path / data.RAW
    raw.mkdir(parents=True)
    for name, content in TOY_FILES.items():
        (raw / name).write_bytes(content)
        stated = (len(content), hashlib.md5(content).hexdigest())
        monkeypatch.setitem(data.RAW_FILES, name, stated)
    archives = [
        (name, hashlib.md5(content).hexdigest())
        for name, content in TOY_ARCHIVES.items()
    ]
    monkeypatch.setattr(MNIST, "resources", archives)
    return raw


@pytest.fixture
def shown():
    """What is displayed, as the list that a shell without a kernel would publish."""
    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher()
    yield shell.display_pub.outputs
    InteractiveShell.clear_instance()
