"""Any file, picture or array -> an upright RGB picture of 8 bits on paper."""

import os

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

LARGEST = 512  # pixels; larger pictures are reduced to about this, which takes noise away and saves time
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)  # what the brightest value of an array may be


class PictureError(ValueError):
    """No digit can be read in a picture; the message says why and what to do."""


def open_picture(source) -> Image.Image:
    """`source` as an upright RGB picture of 8 bits: transparency becomes paper, large ones are reduced.

    `source` is a path, a PIL picture, or an array or tensor of any number type: `[height, width]`, or with
    1 to 4 channels (grey, grey + alpha, RGB, RGBA) last or first. `PictureError` for anything else.
    """
    name = source if isinstance(source, str | os.PathLike) else "the picture"
    try:
        if isinstance(source, str | os.PathLike):
            with Image.open(source) as file:
                file.draft("RGB", (LARGEST, LARGEST))  # JPEG is decoded at a fraction of its size
                file.load()
                source = file.copy()
        if not isinstance(source, Image.Image):
            source = _array_to_image(source)
        source.load()
        if source.mode in ("I", "F") or source.mode.startswith("I;16"):
            source = _array_to_image(np.asarray(source))
        image = source.convert("RGBA" if source.has_transparency_data else "RGB")
        image = ImageOps.exif_transpose(image.reduce(max(1, round(max(image.size) / LARGEST))))
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"there is no file {name}: check the path") from None
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PictureError(f"{name} cannot be read ({cause}): save it anew as PNG or JPEG") from None
    return _lay_on_paper(image) if image.mode == "RGBA" else image


def _array_to_image(source) -> Image.Image:
    """An array of any shape and number type as a picture of 8 bits; `PictureError` if it cannot be one."""
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = source.double() if source.is_floating_point() else source
    values = np.asarray(source)
    given = f"shape {list(values.shape)} {values.dtype}"
    while values.ndim > 2 and len(values) == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] > 4:
        values = np.moveaxis(values, 0, 2)
    if values.dtype == object:
        values = values.astype(float)
    shaped = values.size > 0 and (values.ndim == 2 or (values.ndim == 3 and values.shape[2] <= 4))
    if not shaped or values.dtype.kind not in "buif":  # bool, unsigned, int, float
        raise PictureError(f"expected numbers [height, width] or [height, width, 1..4 channels], got {given}")
    if values.dtype != np.uint8:
        low = min(float(values.min()), 0.0)
        span = float(values.max()) - low
        if not np.isfinite(span):
            raise PictureError(f"the array ({given}) holds values that are not finite: replace them first")
        full = next((scale for scale in FULL_SCALES if scale >= span), span)
        values = values.astype(np.float64)
        values -= low
        values *= 255 / full
        values += 0.5  # the conversion cuts fractions off
        values = values.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values.squeeze(2) if values.shape[2:] == (1,) else values))


def _lay_on_paper(image: Image.Image) -> Image.Image:
    """An RGBA picture on white, or on black where it would be invisible on white."""
    for paper in ("white", "black"):
        page = Image.new("RGBA", image.size, paper)
        page.alpha_composite(image)
        if np.ptp(np.asarray(page.convert("L"))) > 15:
            break
    return page.convert("RGB")
