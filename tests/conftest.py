"""What all tests share: toy digits, the real MNIST where it is found, and no way out to the network."""

import gzip
import hashlib
import ipaddress
import socket
import struct
from pathlib import Path

import mnist_helpers  # noqa: F401  (before torch: it sets how torch's threads wait)

# isort: split
import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from torchvision.datasets import MNIST

from mnist_helpers import data
from mnist_helpers.data import DataMissingError, Digits, load_mnist


@pytest.fixture(scope="session", autouse=True)
def loopback_only():
    """A test that turns to the network fails at once, whatever the code under test does about errors."""

    def check(host):
        host = host.decode() if isinstance(host, bytes) else host
        if host in (None, "", "localhost"):
            return
        try:
            allowed = ipaddress.ip_address(host).is_loopback
        except ValueError:
            allowed = False
        if not allowed:
            pytest.fail(f"a test tried to reach {host}: tests use no network")

    def guard(original):
        def connect(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return connect

    def resolve(host, *args, original=socket.getaddrinfo, **kwargs):
        check(host)
        return original(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", resolve)
        yield


@pytest.fixture(scope="session")
def mnist() -> tuple[Digits, Digits]:
    """The real MNIST from `MNIST_ROOT` or data/; tests that need it are skipped where there is none."""
    try:
        return load_mnist(download=False)
    except DataMissingError as error:
        pytest.skip(str(error).splitlines()[0])


def make_toy_digits(count: int, seed: int = 0) -> Digits:
    """Ten kinds of noisy bars that are easy to tell apart: the label is the bar's place."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 100, (count, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6, 4:24] = 255
    order = torch.randperm(count, generator=generator)
    return Digits(images[order], labels[order], "toy digits")


@pytest.fixture
def toy() -> Digits:
    """100 toy digits, ten of each kind."""
    return make_toy_digits(100)


def pack(numbers: torch.Tensor) -> bytes:
    """The file format of MNIST: magic number, sizes, then one byte per number."""
    header = struct.pack(f">{1 + numbers.ndim}i", 0x800 + numbers.ndim, *numbers.shape)
    return header + numbers.to(torch.uint8).numpy().tobytes()


TOY_TRAIN, TOY_TEST = make_toy_digits(40, seed=1), make_toy_digits(20, seed=2)
TOY_FILES = {
    "train-images-idx3-ubyte": pack(TOY_TRAIN.images),
    "train-labels-idx1-ubyte": pack(TOY_TRAIN.labels),
    "t10k-images-idx3-ubyte": pack(TOY_TEST.images),
    "t10k-labels-idx1-ubyte": pack(TOY_TEST.labels),
}
TOY_ARCHIVES = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in TOY_FILES.items()}


@pytest.fixture
def toy_mnist(tmp_path, monkeypatch) -> Path:
    """The `raw` folder of a tiny MNIST, whose checksums count as the right ones."""
    checksums = {
        name: (len(content), hashlib.md5(content).hexdigest()) for name, content in TOY_FILES.items()
    }
    archives = [(name, hashlib.md5(content).hexdigest()) for name, content in TOY_ARCHIVES.items()]
    monkeypatch.setattr(data, "RAW_FILES", checksums)
    monkeypatch.setattr(MNIST, "resources", archives)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in TOY_FILES.items():
        (raw / name).write_bytes(content)
    return raw


@pytest.fixture
def shown():
    """What is displayed, as the list that a shell without a kernel would publish."""
    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher()
    yield shell.display_pub.outputs
    InteractiveShell.clear_instance()
