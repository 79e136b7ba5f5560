"""Where the digits come from, what is done to them, how they are served, and damaged files."""

import pickle
import shutil
import struct
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
    DataError,
    DataMissingError,
    Digits,
    invert_transform,
    load_digits,
    load_mnist,
    load_offline_digits,
    make_loader,
    split_digits,
)

# The usual per-picture pipeline of the first torchvision API, as an oracle for ours.
CLASSIC = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Normalize((MNIST_MEAN,), (MNIST_STD,)),
        transforms.Lambda(lambda pixels: pixels.flatten()),
    ]
)


# --- preprocessing and its inverse ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one tensor", "one PIL picture", "one array", "a batch of tensors"])
def test_transform_agrees_with_the_classic_pipeline(toy, kind):
    pictures = [Image.fromarray(image.numpy()) for image in toy.images[:5]]
    wanted = torch.stack([CLASSIC(picture) for picture in pictures])
    single = {"one tensor": toy.images[0], "one PIL picture": pictures[0], "one array": toy.images[0].numpy()}
    pixels = TRANSFORM(single.get(kind, toy.images[:5]))
    assert pixels.dtype == torch.float32
    assert type(pixels) is torch.Tensor
    torch.testing.assert_close(pixels, wanted[:1] if kind in single else wanted, rtol=0, atol=1e-6)


def test_transform_of_every_grey_value_by_hand():
    image = (torch.arange(784) % 256).to(torch.uint8).reshape(28, 28)
    wanted = ((torch.arange(784) % 256).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(TRANSFORM(image)[0].double(), wanted, rtol=0, atol=1e-6)


def test_inverse_gives_every_grey_value_back_exactly():
    images = (torch.arange(3 * 784) % 256).to(torch.uint8).reshape(3, 28, 28)
    assert torch.equal(invert_transform(TRANSFORM(images)), images)
    assert torch.equal(invert_transform(TRANSFORM(images[1]))[0], images[1])


def test_inverse_limits_what_no_picture_can_hold():
    pixels = torch.tensor([-99.0, 99.0]).repeat(392)[None]
    assert invert_transform(pixels).unique().tolist() == [0, 255]


def test_mean_and_deviation_are_those_of_the_training_set(mnist):
    counts = mnist[0].images.flatten().bincount(minlength=256).double()
    ink = torch.arange(256) / 255
    mean = (counts * ink).sum() / counts.sum()
    deviation = ((counts * (ink - mean) ** 2).sum() / counts.sum()).sqrt()
    assert round(mean.item(), 4) == MNIST_MEAN
    assert round(deviation.item(), 4) == MNIST_STD


# --- the split ------------------------------------------------------------------------------------


def numbered(count: int) -> Digits:
    """Digits whose first two pixels and labels say which one each is."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 0, 0], images[:, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return Digits(images, torch.arange(count))


def test_split_is_disjoint_complete_and_keeps_pictures_with_their_labels():
    parts = split_digits(numbered(600))
    assert [len(part) for part in parts] == [550, 50]
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(600))
    for part in parts:
        assert torch.equal(part.images[:, 0, 0] + 256 * part.images[:, 0, 1].long(), part.labels)


def test_split_holds_out_the_last_digits_and_so_other_writers():
    assert split_digits(numbered(600))[1].labels.tolist() == list(range(550, 600))


def test_real_split_sizes(mnist):
    train, validation = split_digits(mnist[0])
    assert (len(train), len(validation), train.name) == (55_000, 5_000, "MNIST")


# --- loaders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_shows_every_digit_once_per_epoch(shuffle):
    loader = make_loader(numbered(100), batch_size=32, shuffle=shuffle)
    assert isinstance(loader, DataLoader)
    for _ in range(2):
        batches = [labels for _, labels in loader]
        assert [len(batch) for batch in batches] == [32, 32, 32, 4]
        assert sorted(torch.cat(batches).tolist()) == list(range(100))


def test_shuffled_order_is_reproducible_and_new_every_epoch():
    def orders(seed):
        loader = make_loader(numbered(100), 32, shuffle=True, seed=seed)
        return [torch.cat([labels for _, labels in loader]).tolist() for _ in range(2)]

    first, second = orders(seed=3)
    assert first != second
    assert orders(seed=3) == [first, second]
    assert orders(seed=4)[0] != first


def test_unshuffled_loader_keeps_the_order(toy):
    assert torch.equal(torch.cat([labels for _, labels in make_loader(toy, 7)]), toy.labels)


def test_loader_without_transform_serves_the_pictures_themselves(toy):
    images, labels = next(iter(make_loader(toy, 10, transform=None)))
    assert torch.equal(images, toy.images[:10])
    assert torch.equal(labels, toy.labels[:10])


def test_loader_serves_what_the_classic_pipeline_serves(mnist, monkeypatch):
    digits = mnist[1][:300]
    per_picture = [CLASSIC(Image.fromarray(image.numpy())) for image in digits.images]
    batches = list(make_loader(digits, 128))
    torch.testing.assert_close(
        torch.cat([pixels for pixels, _ in batches]), torch.stack(per_picture), rtol=0, atol=1e-6
    )
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.labels)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_leaves_the_global_random_numbers_alone(toy, shuffle):
    before = torch.get_rng_state()
    list(make_loader(toy, 32, shuffle))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_and_transform_can_be_pickled(toy):
    loader = make_loader(toy, 32, shuffle=True)
    copy = pickle.loads(pickle.dumps(loader))
    for (pixels, labels), (copied_pixels, copied_labels) in zip(loader, copy, strict=True):
        assert torch.equal(pixels, copied_pixels)
        assert torch.equal(labels, copied_labels)
    assert loader.num_workers == 0


def test_a_training_loader_never_ends_with_a_single_digit(toy):
    assert [len(labels) for _, labels in make_loader(toy, 33, shuffle=True)] == [33, 33, 33]
    assert [len(labels) for _, labels in make_loader(toy, 33)] == [33, 33, 33, 1]  # evaluation sees them all


# --- offline digits -------------------------------------------------------------------------------


def test_offline_digits():
    train, test = load_offline_digits()
    assert [len(train), len(test)] == [1437, 360]
    for digits in (train, test):
        assert digits.images.shape == (len(digits), 28, 28)
        assert (digits.images.dtype, digits.labels.dtype) == (torch.uint8, torch.int64)
        assert digits.images.max() == 255
        assert (digits.images.flatten(1).max(dim=1).values > 100).all()  # every digit has ink
        assert digits.images[:, :4].max() == digits.images[:, :, -4:].max() == 0  # and a margin, as MNIST
        assert digits.labels.unique().tolist() == list(range(10))
        assert digits.name == "offline digits"
    again = load_offline_digits()
    assert torch.equal(again[0].images, train.images)
    assert torch.equal(again[1].labels, test.labels)
    assert not {image.numpy().tobytes() for image in train.images} & {
        image.numpy().tobytes() for image in test.images
    }


def test_offline_digits_are_the_bundled_ones():
    """Made small again, each is nearest to a bundled picture of the same digit."""
    bundled = sklearn.datasets.load_digits()
    originals = torch.tensor(bundled.data).float()
    train, _ = load_offline_digits()
    small = F.interpolate(train.images[:100, None, 4:24, 4:24].float(), size=8, mode="area")
    distances = torch.cdist(small.flatten(1) / 255 * 16, originals)
    assert distances.min(dim=1).values.max() < 0.4 * distances.mean()
    assert torch.equal(torch.tensor(bundled.target)[distances.argmin(dim=1)], train.labels[:100])


# --- files on disk --------------------------------------------------------------------------------


@pytest.fixture
def real_mnist(tmp_path, mnist) -> Path:
    """A folder with links to the real files, so that a test can put something else in the place of one."""
    source = data.find_root() / "MNIST" / "raw"
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data.RAW_FILES:
        try:
            (raw / name).symlink_to((source / name).resolve())
        except OSError:  # Windows without the right to make links
            shutil.copy(source / name, raw / name)
    return raw


@pytest.fixture(params=["toy_mnist", "real_mnist"])
def raw(request) -> Path:
    """The folder of the four files, for the toy and the real MNIST."""
    return request.getfixturevalue(request.param)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_loads_what_is_in_the_files(toy_mnist):
    train, test = load_mnist(toy_mnist.parents[1])
    assert (train.images.dtype, train.labels.dtype, train.name) == (torch.uint8, torch.int64, "MNIST")
    for digits, wanted in ((train, TOY_TRAIN), (test, TOY_TEST)):
        assert torch.equal(digits.images, wanted.images)
        assert torch.equal(digits.labels, wanted.labels)


def test_real_files(mnist):
    train, test = mnist
    assert train.images.shape == (60_000, 28, 28)
    assert test.images.shape == (10_000, 28, 28)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # LeCun et al. 1998
    assert train.labels.bincount().tolist() == counts


@pytest.mark.parametrize("named_by", ["argument", "environment", "project"])
def test_finds_the_files_from_any_working_folder(toy_mnist, tmp_path_factory, monkeypatch, named_by):
    root = toy_mnist.parents[1]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.delenv("MNIST_ROOT", raising=False)
    if named_by == "environment":
        monkeypatch.setenv("MNIST_ROOT", str(root))
    if named_by == "project":
        (root / "data").mkdir()
        (root / "MNIST").rename(root / "data" / "MNIST")
        monkeypatch.setattr(data, "PROJECT_ROOT", root)
    train, _ = load_mnist(root if named_by == "argument" else None, download=False)
    assert torch.equal(train.images, TOY_TRAIN.images)
    assert list(Path.cwd().iterdir()) == []


def test_project_folder_helps_out_where_the_named_one_is_empty(toy_mnist, tmp_path_factory, monkeypatch):
    root, empty = toy_mnist.parents[1], tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("MNIST_ROOT", str(empty))
    monkeypatch.setattr(data, "PROJECT_ROOT", root.parent)
    root.rename(root.parent / "data")
    assert torch.equal(load_mnist(download=False)[0].images, TOY_TRAIN.images)
    (root.parent / "data").rename(root)
    assert data.find_root() == empty  # nothing anywhere: the place to download to
    assert data.find_root(root) == root


def test_project_root_is_where_the_project_is():
    assert data.PROJECT_ROOT.is_absolute()
    assert Path(__file__).resolve().parents[1] == data.PROJECT_ROOT


# What can be in place of the labels of the test set: content made from the right one -> words of the message.
# The labels are the small file; the same check looks at all four.
DAMAGE = {
    "truncated": (lambda right: right[: len(right) // 2], "bytes instead of"),
    "one byte short": (lambda right: right[:-1], "bytes instead of"),
    "one byte long": (lambda right: right + b"\0", "bytes instead of"),
    "empty": (lambda right: b"", "has 0 bytes instead of"),
    "header only": (lambda right: right[:8], "has 8 bytes instead of"),
    "HTML": (lambda right: b"\n<!DOCTYPE html><html>Log in to this network</html>", "web page"),
    "wrong magic number": (lambda right: b"\0\0\x08\x03" + right[4:], "other contents"),
    "one label short": (
        lambda right: struct.pack(">ii", 0x801, len(right) - 9) + right[8:-1],
        "bytes instead of",
    ),
    "one flipped bit": (lambda right: right[:-1] + bytes([right[-1] ^ 1]), "other contents"),
    "a label 11": (lambda right: right[:-1] + bytes([11]), "other contents"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_labels(raw, damage):
    path = raw / "t10k-labels-idx1-ubyte"
    make, cause = DAMAGE[damage]
    replace(path, make(path.read_bytes()))
    check_refused(path, cause)


def test_labels_of_the_other_split(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    other = (raw / "train-labels-idx1-ubyte").read_bytes()
    right = path.read_bytes()
    replace(path, other)
    check_refused(path, "bytes instead of")
    replace(path, right[:8] + other[8 : len(right)])  # cut to the right length
    check_refused(path, "other contents")


def test_images_and_labels_swapped(raw):
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    images.rename(raw / "swap")
    labels.rename(images)
    (raw / "swap").rename(labels)
    check_refused(images, "bytes instead of")


def test_all_black_images(raw):
    path = raw / "t10k-images-idx3-ubyte"
    right = path.read_bytes()
    replace(path, right[:16] + bytes(len(right) - 16))
    check_refused(path, "other contents")


@pytest.mark.parametrize("name", TOY_FILES)
def test_each_of_the_four_files_is_checked(toy_mnist, name):
    replace(toy_mnist / name, TOY_FILES[name][:-1] + bytes([TOY_FILES[name][-1] ^ 1]))
    check_refused(toy_mnist / name, "other contents")


@pytest.mark.parametrize("missing", TOY_FILES)
def test_incomplete_folder(toy_mnist, missing):
    (toy_mnist / missing).unlink()
    check_refused(toy_mnist / missing, "is missing")


def test_file_that_cannot_be_read(toy_mnist):
    path = toy_mnist / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_digits(toy_mnist.parents[1])
    assert str(path) in str(caught.value)


def test_copies_of_an_old_torchvision_are_not_preferred(toy_mnist):
    """torchvision reads MNIST/processed/*.pt, where it is, in place of the files that were checked."""
    processed = toy_mnist.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3).long()), processed / name)
    with pytest.raises(DataError, match="delete that folder"):
        load_digits(toy_mnist.parents[1])


def check_refused(path: Path, cause: str) -> None:
    """The data is refused with file, cause and cure, and nothing else is loaded in its place."""
    with pytest.raises(DataError) as caught:
        load_digits(path.parents[2])
    message = str(caught.value)
    assert not isinstance(caught.value, DataMissingError)
    assert str(path) in message
    assert cause in message
    assert "Delete the folder" in message
    assert len(message) < 400 + 4 * len(str(path))


@pytest.mark.parametrize("damage", ["missing", "truncated", "HTML"])
def test_a_good_archive_serves_in_place_of_a_damaged_file(toy_mnist, damage):
    path = toy_mnist / "train-images-idx3-ubyte"
    path.unlink()
    if damage != "missing":
        path.write_bytes(DAMAGE[damage][0](TOY_FILES[path.name]))
    (toy_mnist / f"{path.name}.gz").write_bytes(TOY_ARCHIVES[f"{path.name}.gz"])
    train, _ = load_mnist(toy_mnist.parents[1], download=False)
    assert torch.equal(train.images, TOY_TRAIN.images)


def test_archives_alone_are_enough(toy_mnist):
    for name in TOY_FILES:
        (toy_mnist / name).unlink()
        (toy_mnist / f"{name}.gz").write_bytes(TOY_ARCHIVES[f"{name}.gz"])
    assert torch.equal(load_mnist(toy_mnist.parents[1], download=False)[1].labels, TOY_TEST.labels)


def test_a_damaged_archive_does_not_serve(toy_mnist):
    path = toy_mnist / "train-labels-idx1-ubyte"
    path.unlink()
    (toy_mnist / f"{path.name}.gz").write_bytes(TOY_ARCHIVES[f"{path.name}.gz"][:-5])
    check_refused(path, f"is missing, and {path.name}.gz is damaged")


def test_archive_in_a_folder_that_cannot_be_written(toy_mnist, monkeypatch):
    path = toy_mnist / "t10k-labels-idx1-ubyte"
    path.unlink()
    (toy_mnist / f"{path.name}.gz").write_bytes(TOY_ARCHIVES[f"{path.name}.gz"])

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "extract_archive", refuse)  # root may write everywhere, so chmod proves nothing
    with pytest.raises(DataError, match="cannot be read or written"):
        load_digits(toy_mnist.parents[1])


def test_without_any_file_and_without_download(tmp_path):
    with pytest.raises(DataMissingError) as caught:
        load_mnist(tmp_path, download=False)
    for word in [str(tmp_path / "MNIST" / "raw"), *data.RAW_FILES, "47,040,016 bytes", MNIST.mirrors[0]]:
        assert word in str(caught.value)
    assert load_digits(tmp_path, download=False)[0].name == "offline digits"
    assert list(tmp_path.iterdir()) == []  # nothing that a later load could take for MNIST


# --- slant -------------------------------------------------------------------------------------------


def draw_line(slope: float) -> torch.Tensor:
    """A stroke of two pixels' width, `slope` pixels to the side for each row."""
    rows, columns = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    ink = (1.5 - (columns - slope * rows).abs()).clamp(0, 1) * (rows.abs() < 9)
    return (ink * 255).to(torch.uint8)


@pytest.mark.parametrize("slope", [-0.6, -0.2, 0.0, 0.3, 0.7])
def test_a_leaning_stroke_stands_upright(slope):
    leaning = Digits(draw_line(slope)[None], torch.tensor([1]))
    upright = data.remove_slant(leaning)
    rows = upright.images[0, 6:22].float()  # where the stroke is
    centres = (rows * torch.arange(28)).sum(dim=1) / rows.sum(dim=1)
    assert (centres - 13.5).abs().max() < 0.2  # pixels
    # Nearly as sharp as if drawn upright: bilinear shearing is off by 6 of 255, overshoots that wrap by 20.
    assert (rows - draw_line(0.0)[6:22].float()).abs().mean() < 5
    assert (upright.images.dtype, upright.labels.tolist()) == (torch.uint8, [1])
    assert upright.name == "upright MNIST"


def test_slant_of_blank_and_upright_pictures_stays(toy):
    blank = Digits(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(data.remove_slant(blank).images, blank.images)
    once = data.remove_slant(toy)
    assert torch.equal(once.labels, toy.labels)
    before = toy.images.clone()
    data.remove_slant(toy)
    assert torch.equal(toy.images, before)


def test_doubtful_labels_are_test_digits(mnist):
    """Those of the paper: given label 8 where people see a 9, and so on."""
    _, test = mnist
    labels = test.labels[data.DOUBTFUL_LABELS].tolist()
    assert labels == [8, 0, 9, 4, 2, 5, 6, 6, 5, 5, 0, 1, 4, 6, 5]
