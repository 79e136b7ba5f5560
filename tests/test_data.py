"""Where the digits come from, how they are prepared and served; damaged files."""

import pickle
import shutil
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from conftest import TOY_ARCHIVES, TOY_FILES, TOY_TEST, TOY_TRAIN
from PIL import Image
from torch import nn
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
def numbered():
    """97 digits whose pixels and label say which one each is."""
    labels = torch.arange(97)
    images = labels.byte().view(97, 1, 1).expand(97, 28, 28)
    return Digits(images, labels, "numbered")


def check_pairs(digits, wanted):
    """These are the digits `wanted`, and every image still has its own label."""
    assert digits.labels.tolist() == list(wanted)
    assert digits.images[:, 0, 0].tolist() == list(wanted)


# --- preprocessing and its inverse


def test_transform_by_hand_for_every_kind_of_image_and_its_inverse():
    # As many images as rows: not to be taken for channels
    images = (torch.arange(28 * 784) % 256).byte().view(28, 28, 28)
    wanted = (images.flatten(1) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(TRANSFORM(images), wanted)
    array = images[3].numpy()
    for single in (images[3], array, Image.fromarray(array)):
        torch.testing.assert_close(TRANSFORM(single), wanted[3:4])
    assert torch.equal(invert_transform(wanted), images)
    beyond = torch.tensor([[-99.0, 99.0]]).repeat(1, 392)
    assert invert_transform(beyond).unique().tolist() == [0, 255]


def test_real_mnist_has_the_stated_mean_and_deviation(mnist):
    ink = mnist[0].images / 255
    assert round(ink.mean().item(), 4) == MNIST_MEAN
    assert round(ink.std().item(), 4) == MNIST_STD
    for name, (size, _) in data.RAW_FILES.items():
        assert (find_root() / data.RAW / name).stat().st_size == size


# --- digits, their split, their loaders


def test_a_part_of_the_digits_keeps_images_labels_and_name_together(numbered):
    part = numbered[torch.tensor([5, 2])]
    check_pairs(part, [5, 2])
    moved = part.to("meta")
    assert moved.images.is_meta
    assert moved.labels.is_meta
    assert moved.name == "numbered"
    joined = part + Digits(numbered.images[7:], numbered.labels[7:], "others")
    check_pairs(joined, [5, 2, *range(7, 97)])
    assert joined.name == "numbered"


def test_split_is_fixed_and_holds_out_the_last_digits(numbered):
    train, validation = split_digits(numbered)
    check_pairs(train, range(89))
    check_pairs(validation, range(89, 97))
    _, validation = split_digits(numbered[:96], 0.5)
    check_pairs(validation, range(48, 96))


def read_order(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def test_loader_serves_whole_transformed_batches_in_order(toy):
    loader = make_loader(toy, 33)
    assert len(loader) == 4  # the last, of one digit, is served too
    assert loader.num_workers == 0  # worker processes hang in notebooks
    before = torch.get_rng_state()
    pixels, labels = zip(*pickle.loads(pickle.dumps(loader)), strict=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat(pixels), TRANSFORM(toy.images))
    assert torch.equal(torch.cat(labels), toy.labels)


def test_shuffled_loader_follows_the_seed_and_is_new_every_epoch(numbered):
    loader = make_loader(numbered, 30, shuffle=True, transform=nn.Identity())
    torch.manual_seed(3)
    first, second = read_order(loader), read_order(loader)
    assert sorted(first) == list(range(97))
    assert first != second
    torch.manual_seed(3)
    assert read_order(loader) == first


def test_training_never_meets_a_batch_of_one(numbered):
    for size, served in ((48, 96), (95, 97), (96, 96)):
        loader = make_loader(numbered, size, shuffle=True)
        assert len(read_order(loader)) == served


def test_offline_digits_are_the_bundled_ones():
    """In their order, and made small again, about as they were."""
    train, test = load_offline_digits()
    assert [len(train), len(test)] == [1438, 359]
    digits = train + test
    middle = digits.images[:, 4:24, 4:24]
    assert middle.sum() == digits.images.sum()  # a margin, as in MNIST
    small = torch.nn.functional.adaptive_avg_pool2d(middle.float(), 8)
    bundled = sklearn.datasets.load_digits()
    original = torch.tensor(bundled.images) * 255 / 16
    assert (small - original).abs().mean() < 23
    assert digits.labels.tolist() == bundled.target.tolist()
    assert train.name == test.name == "offline digits"


# --- files on disk


def check_loaded(root=None, download=False):
    """The toy MNIST is loaded, pixel by pixel."""
    loaded = load_mnist(root, download)
    for digits, wanted in zip(loaded, (TOY_TRAIN, TOY_TEST), strict=True):
        assert torch.equal(digits.images, wanted.images)
        assert torch.equal(digits.labels, wanted.labels)
        assert digits.labels.dtype == torch.int64
        assert digits.name == "MNIST"


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
    shutil.copytree(toy_mnist, project / "data" / data.RAW)
    assert find_root() == tmp_path  # both are whole
    (toy_mnist / "train-images-idx3-ubyte").unlink()
    check_loaded()  # the whole copy in data/ is found all the same
    monkeypatch.setenv("HOME", str(project))
    check_loaded("~/data")


@pytest.mark.parametrize("name", TOY_FILES)
def test_damaged_file_is_named_with_cause_and_cure(toy_mnist, name):
    content = TOY_FILES[name][:-1] + b"x"  # of the same size
    (toy_mnist / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_mnist(toy_mnist.parents[1])
    assert type(caught.value) is DataError  # not missing: no other digits instead
    size, md5 = data.RAW_FILES[name]
    assert str(caught.value).startswith(
        f"{toy_mnist / name} is damaged or another file: {size:,} bytes, "
        f"and {size:,} with md5 {md5} would be right. Delete"
    )


# --- downloads, from a server on this machine


@pytest.fixture
def folder(toy_mnist, monkeypatch):
    """A root without any MNIST file, no proxy, and little patience."""
    shutil.rmtree(toy_mnist)
    monkeypatch.setenv("no_proxy", "*")
    assert 5 <= data.DOWNLOAD_TIMEOUT <= 60
    monkeypatch.setattr(data, "DOWNLOAD_TIMEOUT", 0.3)
    return toy_mnist.parents[1]


def check_missing(folder, cause, *download):
    """One message: folder, cause, the four files and sizes, where to get them."""
    with pytest.raises(DataMissingError, match=cause) as caught:
        load_mnist(folder, *download)
    first, *_, second, a, b, c, d = str(caught.value).splitlines()
    assert first.startswith(f"MNIST is not complete in {folder / data.RAW}: ")
    assert MNIST.mirrors[0] in second
    assert [a, b, c, d] == [
        f"  {name} ({len(content):,} bytes)" for name, content in TOY_FILES.items()
    ]
    assert caught.value.__suppress_context__  # no page of traceback


def fill(folder, archives=TOY_ARCHIVES):
    folder.mkdir(exist_ok=True)
    for name, content in archives.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def server(folder):
    """The URL of what is in the folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_failed_downloads(folder, server, monkeypatch):
    fill(folder / "good")
    fill(folder / "portal", dict.fromkeys(TOY_ARCHIVES, b"<html>Please log in</html>"))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls, says nothing
        for mirror, cause in (
            (f"{server}absent/", "404"),
            (f"{server}portal/", "corrupted"),
            (f"http://127.0.0.1:{silent.getsockname()[1]}/", "timed out"),
        ):
            monkeypatch.setattr(MNIST, "mirrors", [mirror])
            check_missing(folder, cause)
    assert socket.getdefaulttimeout() is None  # the impatience ends with the download
    monkeypatch.setattr(MNIST, "mirrors", [f"{server}good/"])
    check_loaded(folder, True)  # what the others left is not in the way
    monkeypatch.setattr(MNIST, "mirrors", [])
    check_loaded(folder)  # the next time needs no server


def test_incomplete_folder_and_its_archives(folder):
    check_missing(folder, "download=True", False)
    fill(folder / data.RAW)
    check_loaded(folder, True)
