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

from mnist_helpers.data import TRANSFORM
from mnist_helpers.handwriting.picture import PictureError, find_sheet, normalise_picture, open_picture


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


def assert_same_digit(first, second, tolerance=18.0, name=""):  # two different digits differ by about 40
    difference = np.abs(as_floats(first) - as_floats(second)).mean()
    assert difference < tolerance, f"{name} mean difference {difference:.1f} of 255"


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
    with pytest.raises(PictureError, match=r"tangled|several"):
        normalise_picture(grid)
    line = np.full((100, 200), 255, np.uint8)
    line[45:55, 20:180] = 0
    with pytest.raises(PictureError, match="or too wide"):
        normalise_picture(line)
    blot = np.full((100, 100), 255, np.uint8)
    blot[35:65, 35:65] = 0
    with pytest.raises(PictureError, match="blot"):
        normalise_picture(blot)


def draw_page(digit, height=300, width=240, paper=230.0):
    """A page with `digit` (dark on white, uint8) in its middle, as floats."""
    page = np.full((height, width), paper)
    top, left = (height - digit.shape[0]) // 2, (width - digit.shape[1]) // 2
    page[top : top + digit.shape[0], left : left + digit.shape[1]] *= digit / 255
    return page


def turn(page, degrees, fill):
    image = Image.fromarray(page.astype(np.uint8))
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)).astype(float)


@pytest.mark.parametrize("degrees", [0, 2, 8])
@pytest.mark.parametrize("thickness", [2, 12])
def test_box_around_the_digit_is_removed(seven, degrees, thickness):
    page = np.full((300, 260), 230.0)
    page[40:260, 40:220] = 40
    page[40 + thickness : 260 - thickness, 40 + thickness : 220 - thickness] = 230
    digit = draw_page(seven, 300, 260)
    boxed = np.minimum(turn(page, degrees, 230), digit)
    assert_same_digit(normalise_picture(boxed), normalise_picture(digit), 10)


@pytest.mark.parametrize("below", [-8, -1, 12])  # across the foot of the digit, touching it, apart
def test_writing_line_is_removed(seven, below):
    page = draw_page(seven)
    wanted, foot = normalise_picture(page), np.flatnonzero((page < 100).any(axis=1))[-1]
    page[foot + below : foot + below + 4] = 40
    assert_same_digit(normalise_picture(page), wanted, 30)  # it may lie a pixel higher


@pytest.mark.parametrize("digit", ["7", "2", "4"])
def test_bars_of_a_digit_are_no_printed_lines(digit):
    """Long, straight and thin, too, but they do not stick out of the digit on both sides."""
    page = np.full((140, 120), 255, np.uint8)
    strokes = {
        "7": [(20, 20, 24, 100)],
        "2": [(20, 30, 24, 100), (116, 30, 120, 104)],
        "4": [(80, 20, 84, 104), (20, 78, 120, 82)],
    }[digit]
    for top, left, bottom, right in strokes:
        page[top:bottom, left:right] = 0
    slope = {"7": (20, 100, 120, 60), "2": (20, 100, 120, 30), "4": (20, 60, 84, 20)}[digit]
    for step in np.linspace(0, 1, 300):
        row, column = np.add(slope[:2], step * np.subtract(slope[2:], slope[:2])).round().astype(int)
        page[row : row + 4, column - 2 : column + 2] = 0
    pixels = as_floats(normalise_picture(page)) / 255
    for top, left, bottom, right in strokes:
        scale, wide = 20 / 100, right - left > bottom - top
        length = (right - left if wide else bottom - top) * scale
        assert pixels.sum(axis=int(wide)).max() > 0.6 * length, "a bar is gone"


@pytest.mark.parametrize("degrees", [0, 15])
@pytest.mark.parametrize("table", [60, 140])
def test_sheet_on_a_table_is_found(seven, degrees, table):
    page = draw_page(seven)
    paper, inside = np.full((2, 520, 480), float(table))
    paper[110:410, 120:360], inside[110:410, 120:360] = page, 255
    picture = np.where(turn(inside, degrees, 0) > 250, turn(paper, degrees, table), table)
    wanted = normalise_picture(turn(page, degrees, 230))
    assert_same_digit(normalise_picture(picture), wanted, 8)


def test_patch_of_light_is_no_sheet(seven):
    """The digit lies in the shade, beside a brighter rectangle that might be a sheet on a table."""
    page = draw_page(np.kron(seven, np.ones((2, 2))), 300, 400) * 0.72
    wanted = normalise_picture(page)
    page[60:240, 10:120] /= 0.72
    assert find_sheet((page / 255).astype(np.float32)) is not None
    assert_same_digit(normalise_picture(page), wanted, 5)


@pytest.mark.parametrize("hole", [8, 18])
def test_hole_of_a_bold_digit_is_no_ink(hole):
    """A bold 0, dark or light, with paper around and cropped: nor is it a sheet of paper."""
    y, x = np.mgrid[:120, :120] - 59.5
    ring = (np.hypot(x / 0.8, y) < 50) & (np.hypot(x / 0.8, y) > hole)
    for picture in (ring, ~ring, ring[10:110, 20:100], ~ring[10:110, 20:100]):
        pixels = normalise_picture(picture)
        assert pixels[14, 14] < 128, "the hole was read"
        assert (pixels[14] > 128).sum() > 5


@pytest.mark.parametrize("contrast", [0.2, 0.8])
@pytest.mark.parametrize("side", range(4))
def test_strokes_that_touch_the_border_are_kept(seven, side, contrast):
    rows, columns = (np.flatnonzero((seven < 100).any(axis=axis)) for axis in (1, 0))
    margins = np.full(4, 15)
    margins[side] = 0
    page = np.pad(seven[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 15, constant_values=255)
    top, bottom, left, right = 15 - margins
    page = page[top : page.shape[0] - bottom, left : page.shape[1] - right]
    page = 240 * (1 - contrast * (255 - page.astype(float)) / 235)
    assert_same_digit(normalise_picture(page), normalise_picture(seven), 5)


def test_neighbour_cut_off_by_the_border_is_dropped(seven):
    page = draw_page(seven, 120, 100)
    wanted = normalise_picture(page)
    page[50:55, 80:] = 40
    assert_same_digit(normalise_picture(page), wanted, 5)


def test_two_digits_of_which_one_touches_the_border_are_refused(seven):
    page = np.concatenate([draw_page(seven, 120, 80), draw_page(seven, 120, 80)[:, :45]], axis=1)
    with pytest.raises(PictureError, match="cut out one digit"):
        normalise_picture(page)


def test_gaps_narrower_than_a_stroke_are_bridged(seven):
    broken = seven.copy()
    broken[40:43] = broken[52:55] = 255
    whole, pixels = normalise_picture(seven), normalise_picture(broken)
    assert ndimage.label(pixels > 60, np.ones((3, 3)))[1] == 1
    assert as_floats(pixels).sum() == pytest.approx(as_floats(whole).sum(), rel=0.2)


def test_dotted_line_is_one_stroke():
    page = np.full((130, 90), 255, np.uint8)
    for place in np.linspace(0, 1, 10):
        for row, column in ((12, 10 + 58 * place), (12 + 96 * place, 68 - 40 * place)):
            page[int(row) : int(row) + 6, int(column) : int(column) + 6] = 0
    pixels = normalise_picture(page)
    assert ndimage.label(pixels > 60, np.ones((3, 3)))[1] == 1


def test_eight_may_be_long_and_round():
    """Two thin circles, one above the other: no tangle."""
    y, x = np.mgrid[:200, :200] - 100.0
    rings = [np.abs(np.hypot(x / 1.5, y - middle) - 40) < 2.5 for middle in (-40, 40)]
    assert normalise_picture(~np.any(rings, axis=0)).max() > 200


def test_page_full_of_digits_is_refused_for_what_it_is(mnist):
    small = 255 - mnist[1].images[:800].view(20, 40, 28, 28).permute(0, 2, 1, 3).reshape(560, 1120)
    with pytest.raises(PictureError, match=r"several|too faint or small"):
        normalise_picture(Image.fromarray(small.numpy()).resize((4480, 2240)))


def test_unreadable_files_are_refused_by_name(tmp_path, seven):
    with pytest.raises(PictureError, match=r"missing\.png cannot be read \(No such file or directory\)"):
        open_picture(tmp_path / "missing.png")
    file = tmp_path / "seven.png"
    Image.fromarray(seven).save(file)
    content = file.read_bytes()
    for damaged in (b"", b"<html>", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(PictureError, match=r"seven\.png cannot be read .*is it a PNG or JPEG"):
            open_picture(file)
    with pytest.raises(PictureError, match="cannot be read"):
        open_picture(tmp_path)


@pytest.mark.parametrize(
    "source", [None, 7, "\0", np.zeros(700), np.zeros((0, 5)), np.zeros((9, 9, 9, 9)), [[1, 2], [3]], [["a"]]]
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(PictureError):
        open_picture(source)


def test_values_that_are_not_finite_are_refused(seven):
    broken = seven / 255
    broken[3, 3] = np.nan
    with pytest.raises(PictureError, match="finite numbers"):
        open_picture(broken)


def test_floats_of_every_usual_scale_are_read(mnist):
    """A digit as `TRANSFORM` gives it, floats a hair above 1, bicubic results that overshoot, and masks."""
    digit = mnist[1].images[7]
    grey = digit.float() / 255
    enlarged = Image.fromarray(digit.numpy()).resize((140, 140), Image.Resampling.NEAREST)
    smooth = np.asarray(Image.fromarray(grey.numpy()).resize((140, 140), Image.Resampling.BICUBIC))
    assert smooth.min() < 0
    assert smooth.max() > 1
    mask = (np.asarray(enlarged) > 100).astype(np.uint8)
    sources = {
        "TRANSFORM [1, 784]": TRANSFORM(digit),
        "TRANSFORM [784]": TRANSFORM(digit)[0],
        "TRANSFORM [28, 28]": TRANSFORM(digit).view(28, 28),
        "above 1": grey * 1.0000002,
        "overshoots": smooth,
        "overshoots, 0..255": smooth * 255,
        "-1..1": grey * 2 - 1,
        "mask of 0 and 1": mask,
        "mask of 0 and 1, int64": mask.astype(np.int64),
    }
    for name, source in sources.items():
        assert_same_digit(normalise_picture(source), digit, 20, name)
    assert open_picture(smooth).getextrema()[0] == (0, 255), "overshoot was taken for another scale"


def test_batch_is_refused_by_name(mnist):
    images = mnist[1].images
    for batch in (images[3:6], images[3:7], images[3:9], images[3:6, None], images[3:6].float() / 255):
        with pytest.raises(PictureError, match=f"batch of {len(batch)}"):
            normalise_picture(batch)
    colours = images[3].expand(3, 28, 28)  # but the same thing three times is grey in colours
    assert torch.equal(normalise_picture(colours), images[3])
    assert torch.equal(normalise_picture(images[3:4]), images[3])


def test_content_of_a_file_is_read_like_the_file(seven, tmp_path):
    path = tmp_path / "seven.png"
    Image.fromarray(seven).save(path)
    content, wanted = path.read_bytes(), normalise_picture(seven)
    with path.open("rb") as opened:
        for source in (path, str(path), content, bytearray(content), io.BytesIO(content), opened):
            assert torch.equal(normalise_picture(source), wanted)
    with pytest.raises(PictureError, match=r"the picture cannot be read .*is it a PNG or JPEG"):
        normalise_picture(content[:50])


def test_huge_pictures_are_read_or_refused_for_their_size(seven, tmp_path, monkeypatch):
    """Pillow warns of more than 89 megapixels and refuses twice as many: here, 3,000 and 6,000 pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    path = tmp_path / "huge.png"
    Image.fromarray(seven).save(path)
    assert torch.equal(normalise_picture(path), normalise_picture(seven))
    Image.fromarray(np.pad(seven, 20, mode="edge")).save(path)
    with pytest.raises(PictureError, match=r"huge\.png cannot be read \(Image size .*not huge"):
        normalise_picture(path)


def test_twelve_megapixels_take_less_than_a_second(seven):
    large = Image.fromarray(seven).resize((3000, 4000)).convert("RGB")
    jpeg = io.BytesIO()
    large.save(jpeg, "JPEG")
    start = time.process_time()
    pixels = normalise_picture(Image.open(jpeg))
    assert time.process_time() - start < 1
    assert_same_digit(pixels, normalise_picture(seven))


@settings(max_examples=100, deadline=None, derandomize=True)
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


@settings(max_examples=100, deadline=None, derandomize=True)
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
