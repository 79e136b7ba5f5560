"""Any picture of a digit -> the 28x28 that MNIST's makers would have made of it.

They scaled black-and-white digits into a box of 20x20 pixels, which made them grey at
the edges, and put them into 28x28 with their centre of mass in the middle (LeCun,
Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document
recognition", III.A). What NIST's scanners had done before is done here, too.
"""

import io
import os
import warnings
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, NUM_PIXELS, Digits
from mnist_helpers.handwriting.page import (
    AROUND,
    PictureError,
    find_box,
    find_sheets,
    find_strokes,
    resize,
)

LARGEST = 512  # pixels; larger pictures are reduced to about this: less noise and time
# How dark ink is at least and how much a page is smoothed, as `find_strokes` takes it:
# as usual; for blurred or shaded digits whose strokes run together; for broken strokes.
LOOKS = [(), (0.7,), (0.3, 2)]
FINE = 100  # pixels; the longer side of the digit while its strokes are measured
THINNEST, THICKEST = 8, 20  # pixels of FINE; other strokes are brought to these
BOX = 20  # pixels; the longer side of every digit in MNIST


def open_picture(source) -> Image.Image:
    """Open any picture, upright, in RGB, with paper where it is transparent.

    Args:
        source: A path, a file's content, an open file, a PIL picture, one digit of
            `Digits`, or an array or tensor of numbers: `[height, width]`, or with 1 to
            4 channels (grey, grey + alpha, RGB, RGBA) last or first, or one digit as
            `TRANSFORM` gives it.

    Returns:
        The picture; a large one is reduced to about 512 pixels.

    Raises:
        PictureError: The file cannot be read, or the numbers are no picture.
    """
    name = source if isinstance(source, str | os.PathLike) else "the picture"
    try:
        image = _read_image(source).convert("RGBA")
        image = image.reduce(max(1, round(max(image.size) / LARGEST)))
        return _lay_on_paper(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise PictureError(
            f"cannot read {name} as a PNG, a JPEG or the like: {error!r:.99}"
        ) from None


def _read_image(source):
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        # Ignored: the warning above 90 megapixels, which scanners reach.
        with warnings.catch_warnings(action="ignore"), Image.open(source) as file:
            file.draft("RGB", (LARGEST, LARGEST))  # decodes a fraction of a JPEG
            source = file.copy()
    if isinstance(source, Image.Image) and source.mode[0] not in "IF":
        return source
    return _make_image(source)  # I;16, I and F have more than 8 bits


def _make_image(source):
    """An array of any shape and number type as a picture of 8 bits.

    Numbers on another scale than 0 to 255 are spread out, from black for the lowest to
    white for the highest.
    """
    if isinstance(source, Digits):
        source = source.images
    if isinstance(source, Tensor):
        source = source.detach().cpu().double()
    values = np.asarray(source).squeeze()
    shape = list(values.shape)
    if shape == [NUM_PIXELS]:
        values = values.reshape(IMAGE_SIZE, IMAGE_SIZE)
    is_batch = shape[1:] == [IMAGE_SIZE, IMAGE_SIZE] and (values != values[0]).any()
    if len(shape) == 3 and shape[2] > 4:
        values = np.moveaxis(values, 0, 2)
    low, high = float(values.min()), float(values.max())
    is_shaped = values.ndim > 1 and values.shape[2:] in [(), (2,), (3,), (4,)]
    is_real = np.isrealobj(values) and np.isfinite(high - low)
    if is_batch or not is_shaped or not is_real:
        raise PictureError(
            "expected one picture of finite numbers, [height, width] or "
            f"[height, width, 1..4 channels], got {shape}"
        )
    if low < 0 or not 32 <= high < 256:  # no usual scale, or a mask of 0 and 1
        values = (values.astype(float) - low) * 255 / (high - low or 1)
    return Image.fromarray(values.round().astype(np.uint8))


def _lay_on_paper(image):
    """Put an RGBA picture on paper like its own, or else unlike its ink."""
    brightness, opacity = np.asarray(image.convert("LA")).T
    opaque = brightness[opacity == opacity.max()]
    has_paper = opaque.size > opacity.size / 2
    is_light = np.median(opaque) > 127  # most of the paper, or else the ink
    paper = Image.new("RGBA", image.size, "white" if is_light == has_paper else "black")
    return Image.alpha_composite(paper, image).convert("RGB")


def find_readings(image: Image.Image) -> Iterator[Tensor]:
    """Bring the digit in a picture into the form of MNIST's, in several ways.

    Args:
        image: The picture, as `open_picture` gives it. One that already has MNIST's
            form comes back unchanged.

    Yields:
        `[28, 28] uint8`, ink 255 on 0; the likeliest first.

    Raises:
        PictureError: There is nothing to read, or clearly something else than a digit;
            after readings, there are no others.
    """
    layers = [image.convert("L"), *image.split()]  # brightness and three colours
    page = np.asarray(max(layers, key=np.std))  # where ink shows best
    if _is_normalised(page):
        yield torch.tensor(page)
        return
    page = page.astype(np.float32) / 255
    refusal = None
    for part in chain(find_sheets(page), [page]):  # a sheet may be a patch of light
        for look in LOOKS:
            try:
                yield fit_box(find_strokes(part, *look))
            except PictureError as error:
                refusal = refusal or error
    if refusal:
        raise refusal


def fit_box(mask: np.ndarray) -> Tensor:
    """Bring strokes to MNIST's size, thickness and place.

    Args:
        mask: `[height, width] bool`, cropped to the strokes.

    Returns:
        `[28, 28] uint8`, ink 255 on 0.

    Raises:
        PictureError: Hardly any digit of MNIST looks like that.
    """
    share = resize(mask, FINE / max(mask.shape))
    mask = np.pad(share > share.max() / 2, THINNEST)
    mask, width = _mend_strokes(mask)
    _check_strokes(mask, width)
    change = np.clip(width, THINNEST, THICKEST) - width
    ink = (_measure_edge(mask) + change / 2 + 0.5).clip(0, 1)
    ink = ink[find_box(ink > 0)]
    ink = resize(ink, BOX / max(ink.shape))
    room = np.subtract(IMAGE_SIZE, ink.shape)
    corner = np.subtract(IMAGE_SIZE // 2, ndimage.center_of_mass(ink))
    corner = corner.round().astype(int).clip(0, room)
    ink = np.pad(ink, np.transpose([corner, room - corner]))
    return torch.from_numpy((ink * 255).round().astype(np.uint8))


def _mend_strokes(mask):
    """Fill hollow strokes and bridge gaps; also the mean width of the strokes."""
    holes, _ = ndimage.label(~mask)
    sizes = np.bincount(holes.ravel())
    edge = _measure_edge(mask)
    depths = ndimage.maximum(-edge, holes, np.arange(sizes.size))
    hollow = sizes > 15 * depths**2  # long and narrow, between thin lines
    hollow &= depths > 2 * edge[mask].mean()
    hollow[holes[0, 0]] = False
    mask = mask | hollow[holes]
    edge = _measure_edge(mask)
    width = 4 * edge[mask].mean()  # the mean pixel is a quarter of it from the edge
    pieces = ndimage.label(mask, AROUND)[1]
    if pieces > 1:  # gaps narrower than a stroke; between dots, somewhat wider ones
        reach = width * (0.5 if pieces <= 3 else 1)
        mask = mask | (ndimage.distance_transform_edt(edge >= -reach) > reach)
    return mask, width


def _check_strokes(mask, width):
    """Refuse what hardly any digit is; the longer side of the mask is `FINE`."""
    pieces = ndimage.label(mask, AROUND)[1]
    rooms = ndimage.label(~mask)[1]  # an 8 has two, and what is around it
    height, breadth = np.ptp(np.argwhere(mask), axis=0)
    gap = breadth + 1 - mask.any(axis=0).sum()  # columns between two characters
    if pieces > 3 or gap > FINE / 20 or breadth > 2 * height:
        raise PictureError(
            "several characters or pieces, or too wide, not one digit: "
            "cut out one digit"
        )
    if rooms > 3 or mask.sum() / width > 4.1 * FINE:
        raise PictureError("the lines are too tangled for a digit")


def _is_normalised(page):
    """Whether a page is in MNIST's form: 28x28, ink in a centred box of 20x20."""
    if page.shape != (IMAGE_SIZE, IMAGE_SIZE) or page.max() < 128:
        return False
    longer = max(page[find_box(page > 0)].shape)
    off_centre = np.subtract(ndimage.center_of_mass(page), IMAGE_SIZE // 2)
    return longer in (BOX - 1, BOX) and np.abs(off_centre).max() < 0.51


def _measure_edge(mask):
    """How far each pixel is from the edge of the strokes, negative outside."""
    inside = ndimage.distance_transform_edt(mask)
    outside = ndimage.distance_transform_edt(~mask)
    return np.where(mask, inside - 0.5, 0.5 - outside)
