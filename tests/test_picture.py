"""Pictures of every kind come out as MNIST's makers would have made them, or are refused with a reason."""

import io
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes
from PIL import Image
from scipy import ndimage

from mnist_helpers.picture import normalise_picture, open_picture
from mnist_helpers.reading import PictureError


@pytest.fixture
def seven() -> np.ndarray:
    """A 7 of dark ink on white paper, `[80, 60] uint8`, drawn by the test."""
    page = np.full((80, 60), 255, np.uint8)
    page[20:26, 15:45] = 20
    for row in range(26, 65):
        middle = 42 - (row - 26) // 2
        page[row, middle - 3 : middle + 3] = 20
    return page


def as_floats(pixels) -> np.ndarray:
    return pixels.numpy().astype(float)


def assert_same_digit(first, second, tolerance=18.0):  # two different digits differ by about 40
    difference = np.abs(as_floats(first) - as_floats(second)).mean()
    assert difference < tolerance, f"mean difference {difference:.1f} of 255"


def save(image: Image.Image, kind: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def test_result_has_the_form_of_mnist(seven):
    pixels = normalise_picture(seven)
    assert (pixels.shape, pixels.dtype) == ((28, 28), torch.uint8)
    rows, columns = np.flatnonzero(pixels.numpy().any(1)), np.flatnonzero(pixels.numpy().any(0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert np.ptp(columns) + 1 == pytest.approx(20 * 30 / 45, abs=1.1)  # the proportions of the drawing
    assert np.abs(np.array(ndimage.center_of_mass(pixels.numpy())) - 14).max() <= 0.51
    assert pixels.max() >= 250
    assert pixels[0].max() == 0
    assert ((pixels > 30) & (pixels < 220)).any(), "edges are grey: scaled with antialiasing"


def test_mnist_digits_come_back_unchanged(mnist):
    for image in mnist[1].images[:300]:
        assert torch.equal(normalise_picture(image), image)
        assert torch.equal(normalise_picture(image.float() / 255), image)


def test_mnist_digits_drawn_on_paper_come_back_nearly_unchanged(mnist):
    errors = []
    for image in mnist[1].images[:60]:
        paper = Image.fromarray(255 - image.numpy()).resize((140, 140), Image.Resampling.BICUBIC)
        errors.append(np.abs(as_floats(normalise_picture(paper)) - as_floats(image)).mean())
    assert np.median(errors) < 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(seven, orientation):
    turned = Image.fromarray(seven)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation: PIL's Transpose that leads to it
    if orientation > 1:
        turned = turned.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = save(turned, "PNG", exif=exif)
    assert torch.equal(normalise_picture(tagged), normalise_picture(seven))


def test_every_depth_and_colour_gives_the_same_digit(seven):
    wanted = normalise_picture(seven)
    wide = seven.astype(np.uint16) * 257
    colours = np.stack([seven] * 3, axis=2)
    sources = {
        "inverted": 255 - seven,
        "bool": seven > 100,
        "16 bit": wide,
        "16-bit PNG": save(Image.fromarray(wide), "PNG"),
        "12 bit": wide // 16,
        "float": seven / 255,
        "normalised float": (seven / 255 - 0.1307) / 0.3081,
        "int64": seven.astype(np.int64),
        "list": seven.tolist(),
        "RGB": colours,
        "channels first": torch.from_numpy(colours).permute(2, 0, 1),
        "batch of one": torch.from_numpy(seven)[None, None],
        "bfloat16": torch.from_numpy(seven).bfloat16(),
        "palette": Image.fromarray(seven).convert("P"),
        "one bit": Image.fromarray(seven).convert("1", dither=Image.Dither.NONE),
        "CMYK": Image.fromarray(colours).convert("CMYK"),
        "needs gradient": torch.from_numpy(seven / 255).requires_grad_(),
    }
    for name, source in sources.items():
        difference = np.abs(as_floats(normalise_picture(source)) - as_floats(wanted)).mean()
        assert difference < 4, f"{name}: mean difference {difference:.1f} of 255"


@pytest.mark.parametrize("ink", [(0, 0, 0), (255, 255, 255), (200, 30, 30)])
def test_transparency_is_paper(seven, ink):
    layers = np.zeros((*seven.shape, 4), np.uint8)
    layers[..., :3] = ink
    layers[..., 3] = 255 - seven
    wanted = normalise_picture(seven)
    assert_same_digit(normalise_picture(save(Image.fromarray(layers), "PNG")), wanted, 4)


def test_faint_coloured_ink_is_seen(seven):
    paper = np.full((*seven.shape, 3), 180, np.uint8)
    paper[seven < 100] = (255, 142, 180)  # pink, exactly as bright as the paper
    assert_same_digit(normalise_picture(paper), normalise_picture(seven), 6)


def test_place_size_and_specks_do_not_matter(seven):
    wanted = normalise_picture(seven)
    page = np.full((300, 400), 255, np.uint8)
    page[180:260, 300:360] = seven
    page[30:32, 50:52] = 0
    page[270:272, 20:23] = 0
    assert_same_digit(normalise_picture(page), wanted)
    larger = Image.fromarray(seven).resize((180, 240), Image.Resampling.BICUBIC)
    assert_same_digit(normalise_picture(larger), wanted)


def test_shadow_and_uneven_light_are_removed(seven):
    wanted = normalise_picture(seven)
    page = np.full((160, 200), 255.0)
    page[40:120, 70:130] = seven
    page *= np.linspace(1, 0.6, 200)
    page[:, :95] *= 0.65  # a hard edge across the digit
    assert_same_digit(normalise_picture(page.astype(np.uint8)), wanted)


@pytest.mark.parametrize("height", [1, 2, 8, 18])
def test_stroke_thickness_is_brought_near_mnist(height):
    page = np.full((100, 100), 255, np.uint8)
    page[20 : 20 + height, 20:80] = 0
    page[20:80, 80 - height : 80] = 0
    pixels = as_floats(normalise_picture(page)) / 255
    thickness = pixels[14:22].sum(axis=1).mean()  # of the vertical stroke, in pixels
    assert 1.4 <= thickness <= 5


def make_blank(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:100, :100]
    return {
        "white": np.full((100, 100), 255.0),
        "black": np.zeros((100, 100)),
        "grain": 200 + rng.normal(0, 8, (100, 100)),
        "gradient": 100.0 + x,
        "shadow": np.where(x + y < 90, 140.0, 220.0),
    }[kind].astype(np.uint8)


@pytest.mark.parametrize("kind", ["white", "black", "grain", "gradient", "shadow"])
def test_blank_page_is_refused(kind):
    with pytest.raises(PictureError, match="stand"):
        normalise_picture(make_blank(kind))


def test_what_is_no_digit_is_refused_with_the_reason(seven):
    two = np.concatenate([seven, seven], axis=1)
    with pytest.raises(PictureError, match="several characters"):
        normalise_picture(two)
    grid = np.full((100, 100), 255, np.uint8)
    grid[20:80:15, 20:80] = grid[20:80, 20:80:15] = 0
    with pytest.raises(PictureError, match="tangled"):
        normalise_picture(grid)
    line = np.full((100, 200), 255, np.uint8)
    line[45:55, 20:180] = 0
    with pytest.raises(PictureError, match="too wide"):
        normalise_picture(line)
    blot = np.full((100, 100), 255, np.uint8)
    blot[35:65, 35:65] = 0
    with pytest.raises(PictureError, match="blot"):
        normalise_picture(blot)


def test_unreadable_files_are_refused_by_name(tmp_path, seven):
    with pytest.raises(PictureError, match=r"no file .*missing\.png"):
        open_picture(tmp_path / "missing.png")
    file = tmp_path / "seven.png"
    Image.fromarray(seven).save(file)
    content = file.read_bytes()
    for damaged in (b"", b"<html>", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(PictureError, match=r"seven\.png cannot be read .*save it anew"):
            open_picture(file)
    with pytest.raises(PictureError, match="cannot be read"):
        open_picture(tmp_path)


@pytest.mark.parametrize(
    "source", [None, 7, "\0", np.zeros(784), np.zeros((0, 5)), np.zeros((9, 9, 9, 9)), [[1, 2], [3]], [["a"]]]
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(PictureError):
        open_picture(source)


def test_values_that_are_not_finite_are_refused(seven):
    broken = seven / 255
    broken[3, 3] = np.nan
    with pytest.raises(PictureError, match="not finite"):
        open_picture(broken)


def test_twelve_megapixels_take_less_than_a_second(seven):
    large = Image.fromarray(seven).resize((3000, 4000)).convert("RGB")
    jpeg = io.BytesIO()
    large.save(jpeg, "JPEG")
    start = time.process_time()
    pixels = normalise_picture(Image.open(jpeg))
    assert time.process_time() - start < 1
    assert_same_digit(pixels, normalise_picture(seven))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_array_gives_a_picture_or_a_reason(data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=64))
    array = data.draw(arrays(data.draw(scalar_dtypes()), shape))
    try:
        pixels = normalise_picture(array)
    except PictureError:
        return
    assert (pixels.shape, pixels.dtype) == ((28, 28), torch.uint8)
    assert pixels.max() > 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 64),
    width=st.integers(1, 64),
    kind=st.sampled_from(["noise", "bits", "blobs", "sparse"]),
    seed=st.integers(0, 999),
)
def test_any_texture_gives_a_picture_or_a_reason(height, width, kind, seed):
    """Denser pictures than hypothesis draws by itself, so that all the steps are reached."""
    noise = np.random.default_rng(seed).random((height, width))
    blobs = ndimage.gaussian_filter(noise, 3)
    picture = {"noise": noise, "bits": noise > 0.5, "blobs": blobs > np.median(blobs), "sparse": noise > 0.98}
    try:
        pixels = normalise_picture(picture[kind])
    except PictureError:
        return
    assert (pixels.shape, pixels.dtype) == ((28, 28), torch.uint8)
    assert pixels.max() > 0
