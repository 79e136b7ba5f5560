"""Where the digits come from, how they are prepared and served; damaged files and failing downloads."""

import dataclasses
import gc
import hashlib
import pickle
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from conftest import TOY_ARCHIVES, TOY_FILES, TOY_TEST, TOY_TRAIN
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from mnist_helpers import data
from mnist_helpers.data import (
    MNIST_MEAN,
    MNIST_STD,
    TRANSFORM,
    BatchSampler,
    DataError,
    DataMissingError,
    Digits,
    find_root,
    invert_transform,
    load_mnist,
    load_offline_digits,
    make_loader,
    split_digits,
)

# The usual per-image pipeline of the first torchvision API, as an oracle for ours.
CLASSIC = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Normalize((MNIST_MEAN,), (MNIST_STD,)),
        transforms.Lambda(torch.flatten),
    ]
)
# torchvision leaves the sockets of failed requests to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


# --- preprocessing and its inverse ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "PIL image", "array", "batch"])
def test_transform_agrees_with_the_classic_pipeline(toy, kind):
    pictures = [Image.fromarray(image.numpy()) for image in toy.images[:5]]
    wanted = torch.stack([CLASSIC(picture) for picture in pictures])
    single = {"tensor": toy.images[0], "PIL image": pictures[0], "array": toy.images[0].numpy()}
    pixels = TRANSFORM(single.get(kind, toy.images[:5]))
    assert type(pixels) is torch.Tensor
    torch.testing.assert_close(pixels, wanted[:1] if kind in single else wanted, rtol=0, atol=1e-6)


def test_inverse_gives_every_grey_value_back_and_limits_the_rest():
    images = (torch.arange(3 * 784) % 256).to(torch.uint8).reshape(3, 28, 28)
    assert torch.equal(invert_transform(TRANSFORM(images)), images)
    assert torch.equal(invert_transform(TRANSFORM(images[1]))[0], images[1])
    assert invert_transform(torch.tensor([[-99.0, 99.0]]).repeat(1, 392)).unique().tolist() == [0, 255]


def test_mean_and_deviation_are_those_of_the_training_set(mnist):
    counts, ink = mnist[0].images.flatten().bincount(minlength=256).double(), torch.arange(256) / 255
    mean = (counts * ink).sum() / counts.sum()
    deviation = ((counts * (ink - mean) ** 2).sum() / counts.sum()).sqrt()
    assert (round(mean.item(), 4), round(deviation.item(), 4)) == (MNIST_MEAN, MNIST_STD)


# --- digits and their split -------------------------------------------------------------------------


def numbered(count: int) -> Digits:
    """Digits whose first two pixels and labels say which one each is."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 0, 0], images[:, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return Digits(images, torch.arange(count), "numbered")


def check_pairs(digits: Digits) -> None:
    """Every image still has its own label."""
    assert torch.equal(digits.images[:, 0, 0] + 256 * digits.images[:, 0, 1].long(), digits.labels)


@pytest.mark.parametrize("index", [slice(3, 9), torch.tensor([5, 2]), torch.arange(20) > 17])
def test_a_part_of_the_digits_keeps_images_labels_and_name_together(index):
    part = numbered(20)[index]
    assert part.labels.tolist() == torch.arange(20)[index].tolist()
    assert (len(part), part.name) == (len(part.labels), "numbered")
    check_pairs(part)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.labels = part.labels + 1


def test_digits_move_to_another_device():
    moved = numbered(4).to("meta")
    assert (moved.images.device.type, moved.labels.device.type, moved.name) == ("meta", "meta", "numbered")


def test_split_is_fixed_disjoint_complete_and_holds_out_the_last_digits():
    for _ in range(2):  # the same every time
        train, validation = split_digits(numbered(600))
        assert train.labels.tolist() == list(range(550))
        assert validation.labels.tolist() == list(range(550, 600))
        check_pairs(train)
        check_pairs(validation)
    assert [len(part) for part in split_digits(numbered(600), 0.5)] == [300, 300]


@pytest.mark.parametrize("fraction", [0, 1, 5000, -1 / 12, 0.0001])
def test_split_with_an_empty_side_is_refused(fraction):
    with pytest.raises(ValueError, match=f"digits on both sides .* got {fraction}"):
        split_digits(numbered(600), fraction)


# --- loaders ----------------------------------------------------------------------------------------


def orders(loader: DataLoader, epochs: int = 2) -> list[list[int]]:
    return [torch.cat([labels for _, labels in loader]).tolist() for _ in range(epochs)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_shows_every_digit_once_per_epoch(shuffle):
    loader = make_loader(numbered(97), 32, shuffle, transform=None)
    assert isinstance(loader, DataLoader)
    assert loader.num_workers == 0  # worker processes hang in notebooks
    assert len(loader) == 4
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [32, 32, 32, 1]
    for images, labels in batches:
        check_pairs(Digits(images, labels))
    assert all(sorted(order) == list(range(97)) for order in orders(loader))


def test_order_follows_the_seed_and_is_new_every_epoch():
    assert orders(make_loader(numbered(50), 8)) == [list(range(50))] * 2
    first, second = orders(make_loader(numbered(50), 8, shuffle=True, seed=3))
    assert first != second
    assert orders(make_loader(numbered(50), 8, shuffle=True, seed=3)) == [first, second]
    assert orders(make_loader(numbered(50), 8, shuffle=True))[0] not in (first, list(range(50)))


def test_loader_serves_transformed_batches(toy):
    for start, (pixels, labels) in zip((0, 64), make_loader(toy, 64), strict=True):
        assert torch.equal(pixels, TRANSFORM(toy.images[start : start + 64]))
        assert torch.equal(labels, toy.labels[start : start + 64])


def test_own_sampler_sets_the_order():
    sampler = [torch.tensor([4, 1]), torch.tensor([0])]
    assert orders(make_loader(numbered(5), 2, sampler=sampler)) == [[4, 1, 0]] * 2


@pytest.mark.parametrize(("size", "batches"), [(65, 1), (64, 1), (66, 2), (2, 1), (129, 2)])
def test_a_last_batch_of_one_image_can_be_left_out(size, batches):
    sampler = BatchSampler(size, 64)
    sampler.drop_single = True
    assert len(list(sampler)) == len(sampler) == batches


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_pickles_and_leaves_the_global_random_numbers_alone(toy, shuffle):
    before = torch.get_rng_state()
    loader = make_loader(toy, 32, shuffle)
    copied = pickle.loads(pickle.dumps(loader))
    for (pixels, labels), (copied_pixels, copied_labels) in zip(loader, copied, strict=True):
        assert torch.equal(pixels, copied_pixels)
        assert torch.equal(labels, copied_labels)
    assert torch.equal(torch.get_rng_state(), before)


# --- offline digits ---------------------------------------------------------------------------------


def test_offline_digits():
    train, test = load_offline_digits()
    assert [len(train), len(test)] == [1437, 360]
    for digits in (train, test):
        assert (digits.images.dtype, digits.labels.dtype) == (torch.uint8, torch.int64)
        assert (digits.images.flatten(1).max(dim=1).values > 100).all()  # every digit has ink
        assert digits.images[:, :4].max() == digits.images[:, :, -4:].max() == 0  # and a margin, as MNIST
        assert digits.labels.unique().tolist() == list(range(10))
        assert digits.name == "offline digits"
    assert torch.equal(load_offline_digits()[1].images, test.images)
    assert len({image.numpy().tobytes() for image in (*train.images, *test.images)}) == 1797  # disjoint


def test_offline_digits_are_the_bundled_ones():
    """Made small again, each is nearest to a bundled image of the same digit."""
    bundled, (train, _) = sklearn.datasets.load_digits(), load_offline_digits()
    small = F.interpolate(train.images[:100, None, 4:24, 4:24].float(), size=8, mode="area")
    distances = torch.cdist(small.flatten(1) / 255 * 16, torch.tensor(bundled.data).float())
    assert distances.min(dim=1).values.max() < 0.4 * distances.mean()
    assert torch.equal(torch.tensor(bundled.target)[distances.argmin(dim=1)], train.labels[:100])


# --- files on disk ----------------------------------------------------------------------------------


def test_loads_what_is_in_the_files(toy_mnist):
    loaded = load_mnist(toy_mnist.parents[1])
    for digits, wanted in zip(loaded, (TOY_TRAIN, TOY_TEST), strict=True):
        assert torch.equal(digits.images, wanted.images)
        assert torch.equal(digits.labels, wanted.labels)
        assert (digits.images.dtype, digits.labels.dtype, digits.name) == (torch.uint8, torch.int64, "MNIST")


def test_real_files(mnist):
    train, test = mnist
    assert [*train.images.shape, *test.images.shape] == [60_000, 28, 28, 10_000, 28, 28]
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    for name, (size, _) in data.RAW_FILES.items():
        assert (find_root() / "MNIST" / "raw" / name).stat().st_size == size
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # LeCun et al. 1998
    assert train.labels.bincount().tolist() == counts
    assert [len(part) for part in split_digits(train)] == [55_000, 5_000]


@pytest.mark.parametrize("named_by", ["argument", "environment", "project"])
def test_finds_the_files_from_any_working_folder(toy_mnist, tmp_path_factory, monkeypatch, named_by):
    root, empty = toy_mnist.parents[1], tmp_path_factory.mktemp("elsewhere %20 {x} #?")
    monkeypatch.chdir(empty)
    monkeypatch.setenv("MNIST_ROOT", str(root if named_by == "environment" else empty))
    if named_by == "project":  # helps out where the named folder is empty
        (root / "data").mkdir()
        (root / "MNIST").rename(root / "data" / "MNIST")
        monkeypatch.setattr(data, "PROJECT_ROOT", root)
    train, _ = load_mnist(root if named_by == "argument" else None, download=False)
    assert torch.equal(train.images, TOY_TRAIN.images)
    assert list(empty.iterdir()) == []


def test_folder_to_download_to(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("MNIST_ROOT", "~/digits")
    assert find_root() == Path("~/digits").expanduser()
    assert find_root(tmp_path / "named") == tmp_path / "named"
    monkeypatch.delenv("MNIST_ROOT")
    assert find_root() == tmp_path / "data"


def test_project_root_is_where_the_project_is():
    assert Path(__file__).resolve().parents[1] == data.PROJECT_ROOT


# What can be in place of a file: content made from the right one. The checksum sees them all.
DAMAGE = {
    "truncated": lambda right: right[: len(right) // 2],
    "empty": lambda right: b"",
    "HTML": lambda right: b"<!DOCTYPE html><html>Log in to this network</html>",
    "of the other split": lambda right: TOY_FILES["train-labels-idx1-ubyte"],
    "of the other split, cut": lambda right: right[:8] + TOY_FILES["train-labels-idx1-ubyte"][8:28],
    "wrong magic number": lambda right: b"\0\0\x08\x03" + right[4:],
    "one flipped bit": lambda right: right[:-1] + bytes([right[-1] ^ 1]),
    "all black": lambda right: right[:8] + bytes(len(right) - 8),
}


@pytest.mark.parametrize("name", TOY_FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_with_cause_and_cure(toy_mnist, name, damage):
    content = DAMAGE[damage](TOY_FILES[name])
    if content == TOY_FILES[name]:
        content += b"\0"
    (toy_mnist / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_mnist(toy_mnist.parents[1])
    right = TOY_FILES[name]
    assert not isinstance(caught.value, DataMissingError)  # never replaced by other digits
    for word in (
        f"{toy_mnist / name} is damaged",
        f"{len(content):,} bytes, beginning with {content[:16]!r}",
        f"instead of {len(right):,} bytes with md5 {hashlib.md5(right).hexdigest()}",
        "Delete it",
    ):
        assert word in str(caught.value)


def test_images_and_labels_swapped(toy_mnist):
    images, labels = toy_mnist / "t10k-images-idx3-ubyte", toy_mnist / "t10k-labels-idx1-ubyte"
    images.rename(toy_mnist / "swap")
    labels.rename(images)
    (toy_mnist / "swap").rename(labels)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is damaged or another file: 28 bytes"):
        load_mnist(toy_mnist.parents[1])


def test_checksums_work_where_md5_is_no_security(toy_mnist, monkeypatch):
    """FIPS machines refuse md5 unless told that it protects nobody's secrets."""
    md5 = hashlib.md5

    def fips(content=b"", *, usedforsecurity=True):
        if usedforsecurity:
            raise ValueError("[digital envelope routines] unsupported")
        return md5(content)

    monkeypatch.setattr(hashlib, "md5", fips)
    assert len(load_mnist(toy_mnist.parents[1])[0]) == 40


def test_file_that_cannot_be_read(toy_mnist):
    path = toy_mnist / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\): mend or delete it") as caught:
        load_mnist(toy_mnist.parents[1])
    assert str(path) in str(caught.value)


def test_copies_of_an_old_torchvision_are_not_preferred(toy_mnist):
    """torchvision reads MNIST/processed/*.pt, where it is, in place of the files that were checked."""
    processed = toy_mnist.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3).long()), processed / name)
    with pytest.raises(DataError, match="delete that folder") as caught:
        load_mnist(toy_mnist.parents[1])
    assert str(processed) in str(caught.value)


def test_archives_are_unpacked(toy_mnist):
    for name in TOY_FILES:
        (toy_mnist / name).unlink()
        (toy_mnist / f"{name}.gz").write_bytes(TOY_ARCHIVES[f"{name}.gz"])
    train, test = load_mnist(toy_mnist.parents[1])
    assert torch.equal(train.images, TOY_TRAIN.images)
    assert torch.equal(test.labels, TOY_TEST.labels)


# --- downloads, from a loopback server that misbehaves in every way seen in the wild ------------------


class Misbehaving(BaseHTTPRequestHandler):
    """`GET /<kind>/<file>` answers in the way that `kind` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        _, kind, name = self.path.split("/")
        content = TOY_ARCHIVES[name]
        self.close_connection = True
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif kind == "garbage":
            self.wfile.write(b"this is not HTTP\r\n\r\n")
        elif kind == "stall":
            self.server.released.wait(30)
        else:
            missing = kind == "last-one-missing" and name.startswith("t10k-labels")
            self.send_response(
                int(kind) if kind.isdigit() else 404 if missing else 302 if kind == "loop" else 200
            )
            self.send_header("Location", self.path)
            self.send_header("Content-Length", str(0 if kind == "loop" else len(content)))
            self.end_headers()
            half = content[: len(content) // 2]
            portal = b"<html>Please log in</html>".ljust(len(content))
            self.wfile.write({"cut": half, "portal": portal, "loop": b""}.get(kind, content))

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *args):
        """A client that hangs up in the middle is part of the tests."""


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Misbehaving) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.released.set()
        server.shutdown()
        thread.join()
    gc.collect()  # here, where the warnings of unclosed sockets are expected


@pytest.fixture
def folder(toy_mnist, monkeypatch):
    """A root without any MNIST file, downloads straight from the loopback, and little patience."""
    for name in TOY_FILES:
        (toy_mnist / name).unlink()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    return toy_mnist.parents[1]


FAILURES = {  # how the server misbehaves: the cause that is named
    "403": "403",
    "503": "503",
    "portal": "corrupted",
    "cut": "corrupted|IncompleteRead",
    "reset": "reset|closed",
    "garbage": "this is not HTTP",
    "stall": "timed out",
    "loop": "redirect",
    "last-one-missing": "404",
}


def check_missing(folder: Path, cause: str, download: bool = True) -> None:
    """One short message: cause, folder, the four files with their sizes, where to get them."""
    with pytest.raises(DataMissingError, match=f"(?i){cause}") as caught:
        load_mnist(folder, download)
    message = str(caught.value)
    files = [f"{name} ({size:,} bytes)" for name, (size, _) in data.RAW_FILES.items()]
    for word in (str(folder / "MNIST" / "raw"), MNIST.mirrors[0], *files):
        assert word in message
    assert len(files) == 4
    assert len(message.splitlines()) == 6
    assert not re.search("verify *= *False|unverified|insecure|Traceback", message)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_download(server, folder, monkeypatch, kind):
    monkeypatch.setattr(MNIST, "mirrors", [f"{server}/{kind}/"])
    for _ in range(2):  # what the first try leaves behind does not hide the cause from the second
        check_missing(folder, FAILURES[kind])
    assert socket.getdefaulttimeout() is None  # the impatience ends with the download
    monkeypatch.setattr(MNIST, "mirrors", [f"{server}/503/", f"{server}/good/"])  # a second mirror helps out
    assert torch.equal(load_mnist(folder)[0].images, TOY_TRAIN.images)
    monkeypatch.setattr(MNIST, "mirrors", [])  # the next time needs no server
    assert torch.equal(load_mnist(folder)[1].labels, TOY_TEST.labels)


def test_nobody_answers_or_nobody_was_asked(folder, monkeypatch):
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{unused.getsockname()[1]}/"])
        check_missing(folder, "refused|timed out")
    check_missing(folder, "downloading was not asked for", download=False)


@pytest.mark.parametrize("name", TOY_FILES)
def test_incomplete_folder(toy_mnist, name):
    (toy_mnist / name).unlink()
    check_missing(toy_mnist.parents[1], "MNIST is not complete", download=False)


def test_no_encryption_where_it_was_wanted(server, folder, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [f"{server.replace('http', 'https')}/good/"])
    check_missing(folder, "SSL")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    check_missing(tmp_path / "file", "Not a directory|exists")


def test_tests_cannot_reach_the_network():
    """The guard in conftest.py works, so that a passing suite proves that nothing needs the network."""
    with pytest.raises(pytest.fail.Exception, match="tests use no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(pytest.fail.Exception, match="tests use no network"):
        socket.getaddrinfo("example.org", 80)
