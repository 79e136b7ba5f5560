"""Any picture of a digit -> the 28x28 that MNIST's makers would have made of it."""
# They scaled black-and-white digits into a box of 20x20 pixels, which made them grey at the edges, and put
# them into 28x28 with their centre of mass in the middle (LeCun, Bottou, Bengio and Haffner 1998,
# "Gradient-based learning applied to document recognition", III.A). What NIST's scanners had done before
# is done here, too.

import io
import os
import warnings
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.cluster.vq import kmeans
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE, NUM_PIXELS

LARGEST = 512  # pixels; larger pictures are reduced to about this, which takes noise away and saves time
SMALLEST = 112  # pixels; smaller pictures are enlarged, so that strokes are many pixels wide
FINE = 100  # pixels; the longer side of the digit while its strokes are measured
STROKE = (8, 20)  # pixels of FINE; thinner and thicker strokes than MNIST's are brought to these
BOX = 20  # pixels; the longer side of every digit in MNIST
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)  # what white may be in an array
AROUND = np.ones((3, 3))  # pixels that touch at a corner belong together


class PictureError(ValueError):
    """No digit can be read in a picture; the message says why and what to do."""


def open_picture(source) -> Image.Image:
    """`source` as an upright RGB picture of 8 bits: transparency becomes paper, large ones are reduced."""
    # `source` is a path, a file's content, an open file, a PIL picture, or an array or tensor of numbers:
    # `[height, width]`, or with 1 to 4 channels (grey, grey + alpha, RGB, RGBA) last or first, or one
    # digit as `TRANSFORM` gives it. `PictureError` for anything else.
    name = source if isinstance(source, str | os.PathLike) else "the picture"
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        if isinstance(source, str | os.PathLike | io.IOBase):
            with warnings.catch_warnings():  # about 90 megapixels, which scanners do deliver
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(source) as file:
                    file.draft("RGB", (LARGEST, LARGEST))  # JPEG is decoded at a fraction of its size
                    file.load()
                    source = file.copy()
        if not isinstance(source, Image.Image) or source.mode[0] in "IF":  # I;16, I, F: beyond 8 bits
            source = _array_to_image(source)
        source.load()
        image = source.convert("RGBA" if source.has_transparency_data else "RGB")
        image = ImageOps.exif_transpose(image.reduce(max(1, round(max(image.size) / LARGEST))))
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"{name} cannot be read ({cause:.99}): is it a PNG or JPEG, not huge?") from None
    if image.mode == "RGBA":
        papers = (Image.new("RGBA", image.size, colour) for colour in ("white", "black"))
        pages = [Image.alpha_composite(paper, image).convert("RGB") for paper in papers]
        image = max(pages, key=np.std)  # white ink is invisible on white
    return image


def _array_to_image(source) -> Image.Image:
    """An array of any shape and number type as a picture of 8 bits; `PictureError` if it cannot be one."""
    values = np.asarray(source.detach().cpu().double() if isinstance(source, Tensor) else source)
    given = f"got {list(values.shape)} {values.dtype}"
    while values.ndim > 2 and len(values) == 1:
        values = values[0]
    if values.shape in ((NUM_PIXELS,), (1, NUM_PIXELS)):
        values = values.reshape(IMAGE_SIZE, IMAGE_SIZE)
    if values.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE) and values.ndim > 2 and (values != values[0]).any():
        raise PictureError(f"expected one picture, {given}, a batch of {len(values)}: take one of them")
    if values.ndim == 3 and values.shape[2] > 4:
        values = np.moveaxis(values, 0, 2)
    shaped = values.size > 0 and (values.ndim == 2 or (values.ndim == 3 and values.shape[2] <= 4))
    if not shaped or values.dtype.kind not in "buif":  # bool, unsigned, int, float
        raise PictureError(f"expected numbers [height, width] or [height, width, 1..4 channels], {given}")
    low, high = min(float(values.min()), 0.0), float(values.max())
    if not np.isfinite(high - low):
        raise PictureError(f"expected finite numbers, {given} with others: replace them first")
    white = next((scale for scale in FULL_SCALES if scale >= high), high)
    usual = low >= -0.1 * white and high >= white / 8  # else its own darkest and lightest count
    low, white = (0, white) if usual else (low, high - low or 1)
    values = ((values.astype(np.float64) - low) * (255 / white)).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.shape[2:] == (1,) else values))


def normalise_picture(source) -> Tensor:
    """The digit in `source` as MNIST would hold it: `[28, 28] uint8`, ink 255 on 0."""
    # `source` is whatever `open_picture` reads. A picture that already has MNIST's form comes back unchanged.
    # Raises `PictureError` where there is nothing to read, or clearly something else than one digit.
    image = open_picture(source)
    channels = [np.asarray(channel, np.float32) / 255 for channel in (image.convert("L"), *image.split())]
    grey = max(channels, key=np.std)  # brightness, or the colour in which the ink shows better
    if _is_normalised(grey):
        return torch.from_numpy((grey * 255).round().astype(np.uint8))
    if max(grey.shape) < SMALLEST:
        grey = _resize(grey, -(-SMALLEST // max(grey.shape))).clip(0, 1)
    sheet = find_sheet(grey)
    with suppress(PictureError):  # it may be a patch of light, and the digit elsewhere
        if sheet is not None:
            return fit_box(pick_digit(sheet))
    return fit_box(pick_digit(grey))


def find_sheet(grey: np.ndarray) -> np.ndarray | None:
    """The sheet of paper that lies on something darker, cut out; None where there is no such thing."""
    small = _resize(grey, 128 / max(grey.shape), Image.Resampling.BOX)
    means, _ = kmeans(small.ravel(), np.quantile(small, (0.1, 0.9)))  # of what is dark and what is light
    if means.min() >= 0.75 * means.max():
        return None
    patch = _find_largest(small > means.mean())
    sheet = ndimage.binary_fill_holes(patch)
    outline = sheet & ~ndimage.binary_erosion(sheet)
    at_border = 1 - outline[1:-1, 1:-1].sum() / outline.sum()  # more for a page half of which is in shadow
    mostly_paper = patch.sum() > 0.8 * sheet.sum() > 0.08 * sheet.size
    if not mostly_paper or not _has_four_sides(sheet) or at_border > 0.4:
        return None
    inside = Image.fromarray(ndimage.binary_erosion(sheet, AROUND, 2)).resize(grey.shape[::-1])
    inside = np.asarray(inside)[box := _find_box(np.asarray(inside))]
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return grey[box][tuple(nearest)]  # around it, the paper goes on


def find_ink(grey: np.ndarray, even: float | None = None) -> np.ndarray:
    """How much darker than its paper each pixel is, `[height, width]`, 0 = paper; light ink counts too."""
    # The paper's brightness under the ink is found by a morphological closing: it fills dark lines narrower
    # than its window but follows a shadow's edge. Paper of brightness `even` all around is nowhere darker.
    if _has_light_ink(grey, even):
        grey, even = 1 - grey, None if even is None else 1 - even
    grey = ndimage.gaussian_filter(grey, max(grey.shape) / 224)
    window = max(grey.shape) // 6 * 2 + 1
    around = np.pad(grey, window // 2, mode="edge")  # beyond the border, the paper goes on
    paper = ndimage.grey_closing(around, size=(window, window), mode="nearest")
    paper = paper[window // 2 : -(window // 2), window // 2 : -(window // 2)]
    return 1 - grey / np.maximum(paper, max(even or 0, 0.1))


def pick_digit(grey: np.ndarray) -> np.ndarray:
    """A mask `[height, width] bool`, cropped to the strokes of the digit in `grey`; else `PictureError`."""
    even = _find_even_paper(grey)
    ink = find_ink(grey, even)
    low, paper = np.quantile(ink, (0.03, 0.15))  # both are paper, even in a tight crop of a bold digit
    noise = paper - low  # 0.84 standard deviations of normal noise
    ink -= paper + 0.8 * noise
    visible = ink[ink > max(0.06, 6.5 * noise)]
    if visible.size < 16:
        raise PictureError("nothing stands out from the paper: a blank page, or writing too faint or small")
    contrast = (visible**4).sum() / (visible**3).sum()  # a mean in which faint shadows hardly count
    mask = drop_lines(drop_frames(ink > 0.45 * contrast))
    pieces, count = ndimage.label(mask, AROUND)
    every = np.arange(1, count + 1)
    edge = mask & ~ndimage.binary_erosion(mask)
    rim = np.ones_like(mask)
    rim[(inner := slice(max(mask.shape) // 25, -(max(mask.shape) // 25))), inner] = False
    length, touching = (ndimage.sum_labels(part, pieces, every) for part in (edge, edge & rim))
    weight = ndimage.sum_labels(ink**3, pieces, every)
    faint = even is None and contrast < 0.5
    shadow = touching > length * (0.05 if faint else 0.33)  # lies along the border, a stroke only ends there
    if weight[~shadow].max(initial=0) > weight.max() * (0.02 if faint else 0.1):
        weight[shadow] = 0
    elif faint:
        raise PictureError("only shadows stand out from the paper: use a darker pen or more even light")
    kept = weight >= np.where(touching, 0.25, 0.05) * weight.max()  # not specks, nor a neighbour's end
    mask = np.isin(pieces, every[kept])
    return mask[_find_box(mask)]


def drop_frames(mask: np.ndarray) -> np.ndarray:
    """What is inside of a printed box, where there is one around something; else all of `mask`."""
    pieces, _ = ndimage.label(mask, AROUND)
    for number, box in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[box] == number
        if min(piece.shape) > max(mask.shape) / 4:
            filled = ndimage.binary_fill_holes(piece)
            inside = mask[box] & filled & ~piece
            if inside.sum() > 0.03 * piece.sum() and _has_four_sides(filled):
                mask = np.zeros_like(mask)
                mask[box] = inside
    return mask


def drop_lines(mask: np.ndarray) -> np.ndarray:
    """Without printed lines: long, straight, thin, and sticking out on both sides of everything else."""
    # So do writing lines and the four sides of a box, but neither the bar of a 7 nor the base of a 2.
    lines, thin = [], max(mask.shape) // 20
    for turned in (mask, mask.T):  # across, then down: the pixels of each line by number
        wide = ndimage.maximum_filter1d(turned, thin, axis=0)  # a line may be tilted a bit
        long = ndimage.label(ndimage.grey_opening(wide, (1, turned.shape[1] // 2)), AROUND)[0]
        across = ndimage.grey_opening(turned, (thin + 1, 1))  # a stroke across the line stays
        lines.append(np.where(turned & ~across, long, 0))
    others = mask & (lines[0] == 0) & (lines[1].T == 0)
    if not others.any():
        return mask
    rest = _find_box(_find_largest(others))
    margin = 0.25 * max(part.stop - part.start for part in rest)
    printed = np.zeros_like(mask)
    for numbers, box, target in zip(lines, rest[::-1], (printed, printed.T), strict=True):
        for number, place in enumerate(ndimage.find_objects(numbers), 1):
            if place and place[1].start < box.start - margin and place[1].stop > box.stop + margin:
                target[numbers == number] = True
    return mask & ~printed


def fit_box(mask: np.ndarray) -> Tensor:
    """The strokes of `mask` in MNIST's size, thickness and place: `[28, 28] uint8`; else `PictureError`."""
    mask = np.pad(_resize(mask, FINE / max(mask.shape)) > 0.5, STROKE[0])
    gaps = ndimage.label(~mask)[0]
    mask |= np.bincount(gaps.ravel())[gaps] < 0.4 * FINE  # pinholes: noise, not the loop of a digit
    edge = _measure_edge(mask)
    width = 4 * edge[mask].mean()  # a stroke's pixels lie a quarter of its width from its edge, on average
    pieces = ndimage.label(mask, AROUND)[1]
    if pieces > 1:  # bridge gaps narrower than a stroke, between dots somewhat wider ones
        reach = width * (0.5 if pieces <= 3 else 1)
        mask |= ndimage.distance_transform_edt(edge >= -reach) > reach
        edge = _measure_edge(mask)
    _check_strokes(mask, width)
    ink = np.clip(edge + (np.clip(width, *STROKE) - width) / 2 + 0.5, 0, 1)
    ink = ink[_find_box(ink > 0)]
    ink = _resize(ink, BOX / max(ink.shape), Image.Resampling.BOX).clip(0, 1)
    corner = np.round(IMAGE_SIZE // 2 - np.array(ndimage.center_of_mass(ink))).astype(int)
    room = np.subtract(IMAGE_SIZE, ink.shape)
    corner = corner.clip(0, room)
    ink = np.pad(ink, np.stack([corner, room - corner], axis=1))
    return torch.from_numpy((ink * 255).round().astype(np.uint8))


def _find_even_paper(grey: np.ndarray) -> float | None:
    """The brightness of most of the border, where the border has one or two; else None."""
    rim = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    paper, reach = np.median(rim), 0.1 * np.ptp(grey)
    even = np.abs(rim - paper) < reach
    two_tone = np.minimum(rim - grey.min(), grey.max() - rim) < reach
    return paper if even.mean() > 0.8 or two_tone.mean() > 0.9 else None


def _has_light_ink(grey: np.ndarray, even: float | None) -> bool:
    """Whether what stands out from `even` paper, or from its surroundings, is brighter than they are."""
    # Strokes make the differences from the local mean lopsided, a shadow's edge does not. Of two sizes of
    # surroundings, the wide one is for a thick digit that fills the picture (yet wider, and shadows would
    # decide), the narrow one for a small digit.
    grey = _resize(grey, min(1, 256 / max(grey.shape)), Image.Resampling.BOX)
    if even is not None:
        return ((grey - even) ** 3).mean() > 0
    skewness = 0.0
    for part in (5, 24):
        local = grey - ndimage.gaussian_filter(grey, max(grey.shape) / part, mode="nearest")
        skewness += (local**3).mean() / ((local**2).mean() ** 1.5 + 1e-9)
    return skewness > 0


def _check_strokes(mask: np.ndarray, width: float) -> None:
    """Refuse what hardly any digit of MNIST is; lengths are in units of the longer side."""
    pieces, holes = ndimage.label(mask, AROUND)[1], ndimage.label(~mask)[1] - 1
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, gaps = np.ptp(rows), np.diff(columns, append=columns[-1])
    sides = np.split(mask, [columns[gaps.argmax()] + 1], axis=1)  # left and right of the widest gap
    both_tall = min(side.any(axis=1).sum() for side in sides) > 0.4 * height
    if pieces > 3 or (both_tall and gaps.max() > FINE / 20) or np.ptp(columns) > 2 * height:
        raise PictureError("several characters or pieces, or too wide, not one digit: cut out one digit")
    if holes > 2 or mask.sum() / width > 4.1 * FINE:
        raise PictureError("the lines are too tangled for a digit")
    if width > 0.6 * FINE:
        raise PictureError("a blot without strokes, not a digit")


def _is_normalised(grey: np.ndarray) -> bool:
    """Whether a picture already is what MNIST's makers made: 28x28, ink in a centred box of 20x20."""
    if grey.shape != (IMAGE_SIZE, IMAGE_SIZE) or grey.max() < 0.5:
        return False
    longer = max(part.stop - part.start for part in _find_box(grey > 0))
    off_centre = np.subtract(ndimage.center_of_mass(grey), IMAGE_SIZE // 2)
    return longer in (BOX - 1, BOX) and np.abs(off_centre).max() < 0.51


def _has_four_sides(mask: np.ndarray) -> bool:
    """Whether a shape without holes is about a parallelogram, by its moments: it gives 1, an ellipse 1.1."""
    return 0.9 < mask.sum() ** 2 / 144 / np.linalg.det(np.cov(np.argwhere(mask).T)) < 1.05


def _measure_edge(mask: np.ndarray) -> np.ndarray:
    """How far each pixel is from the edge of the strokes, negative outside."""
    depth, away = (ndimage.distance_transform_edt(part) for part in (mask, ~mask))
    return np.where(mask, depth - 0.5, 0.5 - away)


def _find_largest(mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask."""
    pieces, _ = ndimage.label(mask, AROUND)
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])


def _find_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box with all of `mask`."""
    return ndimage.find_objects(mask.astype(int))[0]


def _resize(values: np.ndarray, factor: float, how=Image.Resampling.BICUBIC) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in values.shape)
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), how))
