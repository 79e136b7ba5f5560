"""Any picture of a digit -> the 28x28 that MNIST's makers would have made of it.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition", III.A:
black-and-white digits were scaled into a box of 20x20 pixels, keeping their proportions, which made them
grey at the edges, and put into 28x28 with their centre of mass in the middle. Before that, a picture from
elsewhere needs what NIST's scanners did: upright, dark or light ink told apart from paper, shadows removed.
"""

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from mnist_helpers.data import IMAGE_SIZE
from mnist_helpers.reading import PictureError, open_picture

BOX = 20  # pixels; the longer side of every digit in MNIST
CENTRE = IMAGE_SIZE // 2  # index of the pixel on which MNIST puts the centre of mass
SMALLEST = 112  # pixels; smaller pictures are enlarged, so that strokes are many pixels wide
FINE = 100  # pixels; the longer side of the digit while its strokes are measured
STROKE = (8, 20)  # pixels of FINE; thinner and thicker strokes than MNIST's are brought to these


def normalise_picture(source) -> Tensor:
    """The digit in `source` as MNIST would hold it: `[28, 28] uint8`, ink 255 on 0.

    `source` is whatever `open_picture` reads. A picture that already has MNIST's form comes back unchanged.
    Raises `PictureError` where there is nothing to read, or clearly something else than one digit.
    """
    grey = _to_grey(open_picture(source))
    if _is_normalised(grey):
        return torch.from_numpy((grey * 255).round().astype(np.uint8))
    if max(grey.shape) < SMALLEST:
        grey = _resize(grey, -(-SMALLEST // max(grey.shape)))
    try:
        strokes = pick_digit(find_ink(grey))
    except PictureError:  # shadows at the border may have hidden a digit that stands clear of it
        strokes = pick_digit(find_ink(grey, border="constant"))
    return fit_box(strokes)


def find_ink(grey: np.ndarray, border: str = "edge") -> np.ndarray:
    """How much darker than its paper each pixel is, `[height, width]`, 0 = paper; light ink counts as dark.

    The paper's brightness under the ink is found by a morphological closing: it fills dark lines narrower
    than its window but follows a shadow's edge. Beyond the border, the paper goes on (`border="edge"`,
    right for strokes that touch it) or there is none (`"constant"`, right for shadows that touch it).
    """
    if _has_light_ink(_resize(grey, min(1, 256 / max(grey.shape)), Image.Resampling.BOX)):
        grey = 1 - grey
    grey = ndimage.gaussian_filter(grey, max(grey.shape) / 224)
    window = max(grey.shape) // 6 * 2 + 1
    around = np.pad(grey, window // 2, mode=border)
    paper = ndimage.grey_closing(around, size=(window, window), mode="nearest")
    paper = paper[window // 2 : -(window // 2), window // 2 : -(window // 2)]
    return 1 - grey / np.maximum(paper, 0.1)


def pick_digit(ink: np.ndarray) -> np.ndarray:
    """A mask `[height, width] bool`, cropped to the strokes of the digit in `ink`; else `PictureError`."""
    low, paper = np.quantile(ink, (0.05, 0.4))  # both are paper, even in a tight crop
    noise = paper - low  # 1.4 standard deviations of normal noise
    ink = ink - paper
    visible = ink[ink > max(0.06, 4 * noise)]
    if visible.size < 16:
        raise PictureError("nothing stands out from the paper: the page is blank, or the ink too faint")
    contrast = (visible**4).sum() / (visible**3).sum()  # a mean in which faint shadows hardly count
    pieces, count = ndimage.label(ink > 0.45 * contrast, np.ones((3, 3)))
    weight = ndimage.sum_labels(ink**3, pieces, np.arange(count + 1)) * (np.arange(count + 1) > 0)
    inner = weight.copy()  # what touches the border is rather a shadow or the table than the digit
    inner[np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))] = 0
    if inner.max() > 0.02 * weight.max():
        weight = inner
    elif contrast < 0.45:
        raise PictureError("only shadows stand out from the paper: use a darker pen or more even light")
    mask = np.isin(pieces, np.flatnonzero(weight >= 0.05 * weight.max()))  # the rest is specks
    return mask[_find_box(mask)]


def fit_box(mask: np.ndarray) -> Tensor:
    """The strokes of `mask` in MNIST's size, thickness and place: `[28, 28] uint8`; else `PictureError`."""
    mask = np.pad(_resize(mask, FINE / max(mask.shape)) > 0.5, STROKE[0])
    gaps = ndimage.label(~mask)[0]
    mask |= np.bincount(gaps.ravel())[gaps] < 0.4 * FINE  # pinholes: noise, not the loop of a digit
    depth, away = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    edge = np.where(mask, depth - 0.5, 0.5 - away)  # distance to the strokes' edge, negative outside
    width = 4 * edge[mask].mean()  # a stroke's pixels lie a quarter of its width from its edge, on average
    _check_strokes(mask, width)
    ink = np.clip(edge + (np.clip(width, *STROKE) - width) / 2 + 0.5, 0, 1)
    ink = ink[_find_box(ink > 0)]
    ink = np.clip(_resize(ink, BOX / max(ink.shape), Image.Resampling.BOX), 0, 1)
    height, width = ink.shape
    top, left = (
        np.clip(round(CENTRE - middle), 0, IMAGE_SIZE - side)
        for middle, side in zip(ndimage.center_of_mass(ink), ink.shape, strict=True)
    )
    picture = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    picture[top : top + height, left : left + width] = ink
    return torch.from_numpy((picture * 255).round().astype(np.uint8))


def _has_light_ink(grey: np.ndarray) -> bool:
    """Whether what stands out from its surroundings is brighter than they are.

    Strokes make the differences from the local mean lopsided, a shadow's edge does not. Two sizes of
    surroundings: the wide one for a thick digit that fills the picture, the narrow one for a small digit.
    """
    skewness = 0.0
    for part in (4, 24):
        local = grey - ndimage.gaussian_filter(grey, max(grey.shape) / part, mode="nearest")
        skewness += (local**3).mean() / ((local**2).mean() ** 1.5 + 1e-9)
    return skewness > 0


def _check_strokes(mask: np.ndarray, width: float) -> None:
    """Refuse what hardly any digit of MNIST is; lengths are in units of the longer side."""
    pieces, holes = ndimage.label(mask, np.ones((3, 3)))[1], ndimage.label(~mask)[1] - 1
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    height, gaps = np.ptp(rows), np.diff(columns, append=columns[-1])
    sides = np.split(mask, [columns[gaps.argmax()] + 1], axis=1)  # left and right of the widest gap
    both_tall = min(side.any(axis=1).sum() for side in sides) > 0.4 * height
    if pieces > 3 or (both_tall and gaps.max() > FINE / 20):
        raise PictureError("several characters or pieces, not one digit: cut out one digit")
    if np.ptp(columns) > 2 * height:
        raise PictureError("what is written is too wide for one digit: cut out one digit")
    if holes > 2 or mask.sum() / width > 3.3 * FINE:
        raise PictureError("the lines are too tangled for a digit")
    if width > 0.6 * FINE:
        raise PictureError("a blot without strokes, not a digit")


def _to_grey(image: Image.Image) -> np.ndarray:
    """Brightness `[height, width] float32` in 0..1, or the colour channel in which the ink shows better."""
    channels = [np.asarray(channel, np.float32) / 255 for channel in (image.convert("L"), *image.split())]
    return max(channels, key=np.std)


def _is_normalised(grey: np.ndarray) -> bool:
    """Whether a picture already is what MNIST's makers made: 28x28, ink in a centred box of 20x20."""
    if grey.shape != (IMAGE_SIZE, IMAGE_SIZE) or grey.max() < 0.5:
        return False
    longer = max(part.stop - part.start for part in _find_box(grey > 0))
    return longer in (BOX - 1, BOX) and max(abs(m - CENTRE) for m in ndimage.center_of_mass(grey)) < 0.51


def _resize(values: np.ndarray, factor: float, how=Image.Resampling.BICUBIC) -> np.ndarray:
    height, width = (max(1, round(side * factor)) for side in values.shape)
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), how))


def _find_box(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box with all of `mask`."""
    return ndimage.find_objects(mask.astype(int))[0]
