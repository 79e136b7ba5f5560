"""Where the digits come from, how they are prepared and served; damaged files."""

import hashlib
import pickle
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from conftest import TOY_ARCHIVES, TOY_FILES, TOY_TEST, TOY_TRAIN
from PIL import Image
from torchvision import transforms
from torchvision.datasets import MNIST

from mnist_helpers import data
from mnist_helpers.data import (
    MNIST_MEAN,
    MNIST_STD,
    TRANSFORM,
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

# torchvision leaves the sockets of failed requests to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def numbered() -> Digits:
    """97 digits whose first pixel and label say which one each is."""
    images = torch.zeros(97, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(97)
    return Digits(images, torch.arange(97), "numbered")


def check_pairs(digits: Digits, wanted) -> None:
    """These are the digits `wanted`, and every image still has its own label."""
    assert digits.labels.tolist() == list(wanted)
    assert digits.images[:, 0, 0].tolist() == list(wanted)


# --- preprocessing and its inverse


def test_transform_agrees_with_the_classic_pipeline_for_every_kind_of_image(toy):
    classic = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.1307,), (0.3081,)),
            transforms.Lambda(torch.flatten),
        ]
    )
    images = toy.images[:28]  # as many images as rows: not to be taken for channels
    pictures = [Image.fromarray(image.numpy()) for image in images]
    wanted = torch.stack([classic(picture) for picture in pictures])
    for batch in (images, images.numpy()):
        torch.testing.assert_close(TRANSFORM(batch), wanted)
    for single in (images[3], pictures[3]):
        torch.testing.assert_close(TRANSFORM(single), wanted[3:4])


def test_inverse_gives_every_grey_value_back_and_limits_the_rest():
    images = (torch.arange(3 * 784) % 256).to(torch.uint8).reshape(3, 28, 28)
    assert torch.equal(invert_transform(TRANSFORM(images)), images)
    beyond = torch.tensor([[-99.0, 99.0]]).repeat(1, 392)
    assert invert_transform(beyond).unique().tolist() == [0, 255]


def test_mean_and_deviation_are_those_of_the_training_set(mnist):
    ink = mnist[0].images / 255
    assert round(ink.mean().item(), 4) == MNIST_MEAN
    assert round(ink.std().item(), 4) == MNIST_STD


# --- digits, their split, their loaders


def test_a_part_of_the_digits_keeps_images_labels_and_name_together(numbered):
    part = numbered[torch.tensor([5, 2])]
    check_pairs(part, [5, 2])
    assert len(part) == 2
    moved = part.to("meta")
    assert moved.images.is_meta
    assert moved.labels.is_meta
    assert moved.name == "numbered"


def test_split_is_fixed_and_holds_out_the_last_digits(numbered):
    train, validation = split_digits(numbered)
    check_pairs(train, range(89))
    check_pairs(validation, range(89, 97))
    _, validation = split_digits(numbered[:96], 0.5)
    check_pairs(validation, range(48, 96))


@pytest.mark.parametrize("fraction", [0, 1])
def test_split_with_an_empty_side_is_refused(numbered, fraction):
    with pytest.raises(ValueError, match=f"on both sides, got {fraction}"):
        split_digits(numbered, fraction)


def read_order(loader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


def test_loader_serves_whole_transformed_batches_in_order(toy):
    loader = make_loader(toy, 33)
    assert len(loader) == 4  # the last, of one digit, is served too
    assert loader.num_workers == 0  # worker processes hang in notebooks
    pixels, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(pixels), TRANSFORM(toy.images))
    assert torch.equal(torch.cat(labels), toy.labels)


def test_shuffled_loader_follows_the_seed_and_is_new_every_epoch(numbered):
    loader = make_loader(numbered, 30, shuffle=True, transform=None)
    torch.manual_seed(3)
    first, second = read_order(loader), read_order(loader)
    assert sorted(first) == list(range(97))
    assert first != second
    torch.manual_seed(3)
    assert read_order(loader) == first


@pytest.mark.parametrize("size", [48, 95, 96])
def test_training_never_meets_a_batch_of_one(numbered, size):
    order = read_order(make_loader(numbered, size, shuffle=True))
    assert len(order) == 97 - (97 % size == 1)


def test_loader_pickles_and_reading_leaves_the_random_numbers_alone(toy):
    before = torch.get_rng_state()
    loader = make_loader(toy, 32)
    assert read_order(pickle.loads(pickle.dumps(loader))) == read_order(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_offline_digits_are_the_bundled_ones():
    """Made small again, each is nearest to one bundled image, of the same digit."""
    train, test = load_offline_digits()
    assert [len(train), len(test)] == [1437, 360]
    images = torch.cat([train.images, test.images])
    labels = torch.cat([train.labels, test.labels])
    assert images[:, 4:24, 4:24].sum() == images.sum()  # a margin, as in MNIST
    small = torch.nn.functional.adaptive_avg_pool2d(images[:, 4:24, 4:24].float(), 8)
    bundled = sklearn.datasets.load_digits()
    original = torch.tensor(bundled.data).float() * 255 / 16
    distances = torch.cdist(small.flatten(1), original)
    nearest = distances.argmin(dim=1)
    assert nearest.unique().numel() > 1750  # no digit is in both parts
    assert distances.amin(dim=1).mean() < 0.3 * distances.mean()
    assert torch.equal(torch.tensor(bundled.target)[nearest], labels)
    assert nearest[:1437].max() > 1700  # mixed, not the first in the file
    assert train.name == test.name == "offline digits"


# --- files on disk


def check_loaded(root=None, download=False) -> None:
    """The toy MNIST is loaded, pixel by pixel."""
    loaded = load_mnist(root, download)
    for digits, wanted in zip(loaded, (TOY_TRAIN, TOY_TEST), strict=True):
        assert torch.equal(digits.images, wanted.images)
        assert torch.equal(digits.labels, wanted.labels)
        assert digits.labels.dtype == torch.int64
        assert digits.name == "MNIST"


def test_real_files(mnist):
    train, test = mnist
    assert [len(train), len(test)] == [60_000, 10_000]
    for name, (size, _) in data.RAW_FILES.items():
        assert (find_root() / data.RAW / name).stat().st_size == size


def test_places_are_searched_in_order(toy_mnist, tmp_path, monkeypatch):
    assert Path(__file__).resolve().parents[1] == data.PROJECT_ROOT
    project = tmp_path / "project %20 {x} #?"
    monkeypatch.setattr(data, "PROJECT_ROOT", project)
    monkeypatch.chdir(toy_mnist)
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    assert find_root() == project / "data"
    monkeypatch.setenv("MNIST_ROOT", "~/digits")
    assert find_root() == Path("~/digits").expanduser()
    monkeypatch.setenv("MNIST_ROOT", str(tmp_path))
    check_loaded()
    shutil.copytree(toy_mnist, project / "data" / "MNIST" / "raw")
    assert find_root() == tmp_path  # both are whole
    (toy_mnist / "train-images-idx3-ubyte").unlink()
    check_loaded()  # the whole copy in data/ is found all the same
    assert find_root("~/named") == Path("~/named").expanduser()


@pytest.mark.parametrize("name", TOY_FILES)
def test_damaged_file_is_named_with_cause_and_cure(toy_mnist, name):
    right = TOY_FILES[name]
    content = right[:-1] + bytes([right[-1] ^ 1])  # one flipped bit
    (toy_mnist / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_mnist(toy_mnist.parents[1])
    assert type(caught.value) is DataError  # not missing: no other digits instead
    message = str(caught.value)
    assert message.startswith(f"{toy_mnist / name} is damaged or another file: ")
    assert f" {len(content):,} bytes, beginning with {content[:16]!r}, " in message
    md5 = hashlib.md5(right).hexdigest()
    assert f"of {len(right):,} bytes with md5 {md5}" in message


def test_file_that_cannot_be_read(toy_mnist):
    path = toy_mnist / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"ubyte cannot be read \(Is a directory\)"):
        load_mnist(toy_mnist.parents[1])


def test_copies_of_an_old_torchvision_are_refused_and_an_empty_folder_is_not(toy_mnist):
    """torchvision reads such copies in place of the files that were checked."""
    processed = toy_mnist.parent / "processed"
    processed.mkdir()
    check_loaded(toy_mnist.parents[1])
    (processed / "training.pt").touch()
    with pytest.raises(DataError, match=f"{processed} is of an old torchvision"):
        load_mnist(toy_mnist.parents[1])


# --- downloads, from a server on this machine


class Server(BaseHTTPRequestHandler):
    """`GET /<kind>/<file>` answers in the way that `kind` says."""

    def do_GET(self):
        _, kind, name = self.path.split("/")
        content = TOY_ARCHIVES[name]
        if kind == "stall":
            self.server.released.wait(20)
        if kind == "portal":
            content = b"<html>Please log in</html>"
        self.send_response(503 if kind == "busy" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Nothing is printed."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.handle_error = lambda *args: None  # a client that hangs up
        server.released = threading.Event()
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.released.set()
        server.shutdown()


@pytest.fixture
def folder(toy_mnist, monkeypatch):
    """A root without any MNIST file, no proxy, and little patience."""
    for name in TOY_FILES:
        (toy_mnist / name).unlink()
    monkeypatch.setenv("no_proxy", "*")
    assert 5 <= data.DOWNLOAD_TIMEOUT <= 60
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    return toy_mnist.parents[1]


def check_missing(folder: Path, cause: str, download: bool = True) -> None:
    """One message: folder, cause, the four files and sizes, where to get them."""
    with pytest.raises(DataMissingError, match=cause) as caught:
        load_mnist(folder, download)
    first, second, *files = str(caught.value).splitlines()
    assert first.startswith(f"MNIST is not complete in {folder / 'MNIST' / 'raw'}: ")
    assert MNIST.mirrors[0] in second
    assert files == [
        f"  {name} ({len(content):,} bytes)" for name, content in TOY_FILES.items()
    ]
    assert caught.value.__suppress_context__  # no page of traceback


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("busy", "503"), ("portal", "corrupted"), ("stall", "timed out")],
)
def test_failed_download(server, folder, monkeypatch, kind, cause):
    monkeypatch.setattr(MNIST, "mirrors", [f"{server}/{kind}/"])
    socket.setdefaulttimeout(77)
    try:
        check_missing(folder, cause)
        assert socket.getdefaulttimeout() == 77  # the impatience ends with the download
    finally:
        socket.setdefaulttimeout(None)
    monkeypatch.setattr(MNIST, "mirrors", [f"{server}/good/"])
    check_loaded(folder, download=True)  # what the first try left is not in the way
    monkeypatch.setattr(MNIST, "mirrors", [])
    check_loaded(folder)  # the next time needs no server


def test_incomplete_folder_and_its_archives(folder):
    check_missing(folder, "downloading was not asked for", download=False)
    for name, content in TOY_ARCHIVES.items():
        (folder / "MNIST" / "raw" / name).write_bytes(content)
    check_loaded(folder, download=True)
