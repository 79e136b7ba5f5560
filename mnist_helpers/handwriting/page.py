"""What surrounds a digit: the table under its page, shadows, printed boxes and lines.

A page is `[height, width] float32`, 0 = black, 1 = white. A mask is `[height, width]
bool`, true where there is ink.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy import ndarray
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull

SMALLEST = 112  # pixels; smaller pages are enlarged: strokes must be many pixels wide
AROUND = np.ones((3, 3))  # pixels that touch at a corner belong together


class PictureError(ValueError):
    """No digit can be read in a picture; the message says why and what to do."""


def find_sheets(page: ndarray) -> Iterator[ndarray]:
    """Cut out what may be a sheet of paper on a table.

    Args:
        page: The picture.

    Yields:
        Smaller pages: what is a large rectangle, lighter or darker than all around it.
        Where the sheet ends, its paper goes on.
    """
    small = resize(page, 128 / max(page.shape))
    dark, light = np.quantile(small, (0.1, 0.9))
    if dark >= 0.88 * light:
        return
    for share in (0.6, 0.35):  # a shadow's edge may divide it at one
        is_light = small > dark + share * (light - dark)
        for part in (is_light, ~is_light):
            sheet = ndimage.binary_fill_holes(find_largest(part))
            inside = Image.fromarray(ndimage.binary_erosion(sheet, AROUND, 2))
            inside = np.asarray(inside.resize(page.shape[::-1]))
            is_large = inside.mean() > 0.1
            is_full = part[sheet].mean() >= 0.65  # but for the strokes
            if is_large and is_full and _is_sheet(sheet):
                box = find_box(inside)
                _, nearest = ndimage.distance_transform_edt(
                    ~inside[box], return_indices=True
                )
                yield page[box][tuple(nearest)]


def _is_sheet(mask):
    """Whether a shape is about a parallelogram inside the page.

    It is by its moments (an ellipse: 0.91), and it has no notches, as an 8 has.
    """
    spread = 144 * np.linalg.det(np.cov(np.argwhere(mask).T))
    has_four_sides = 0.96 * spread < mask.sum() ** 2 < 1.03 * spread
    at_border = mask.sum() - mask[1:-1, 1:-1].sum()  # the lit half of a page has much
    around = 2 * sum(mask[find_box(mask)].shape)
    return has_four_sides and at_border < 0.4 * around and _has_no_notch(mask)


def find_strokes(page: ndarray, darkness: float = 0.42, blur: float = 1.0) -> ndarray:
    """Find the strokes of the one digit on a page; a small one is seen from near.

    Args:
        page: The picture.
        darkness: How dark ink is at least, as a part of the darkest.
        blur: How much the page is smoothed, compared with what is usually best.

    Returns:
        A mask, cropped to the digit.

    Raises:
        PictureError: Nothing stands out, or only shadows do.
    """
    page = resize(page, math.ceil(SMALLEST / max(page.shape)))
    smooth = smooth_page(page, blur)
    ink = find_ink(smooth)
    low, paper = np.quantile(ink, (0.03, 0.15))  # both are paper, even in tight crops
    noise = paper - low  # 0.84 standard deviations of normal noise
    ink -= paper + 0.8 * noise
    visible = ink[ink > max(0.03, 9 * noise)]
    if visible.size < 16:
        raise PictureError(
            "nothing stands out from the paper: "
            "a blank page, or writing too faint or small"
        )
    contrast = np.average(visible, weights=visible**6)  # shadows hardly count
    mask = ink > darkness * contrast
    mask = drop_frames(mask) & drop_lines(mask)
    if not mask.any():
        raise PictureError("nothing but printed lines stands out from the paper")
    is_faint = contrast < 0.5 and _find_even_paper(page) is None
    mask = _drop_others(mask, ink**3, smooth, is_faint)
    box = find_box(mask)
    if max(mask[box].shape) < max(page.shape) / 4:
        # Smoothed less, as it is smaller.
        return find_strokes(page[_widen(box)], darkness, blur)
    return mask[box]


def smooth_page(page: ndarray, blur: float = 1.0) -> ndarray:
    """A page with less noise; where the ink is light, the negative of it.

    `blur` is that of `find_strokes`.
    """
    if _has_light_ink(page):
        page = 1 - page
    return ndimage.gaussian_filter(page, blur * max(page.shape) / 224)


def find_ink(page: ndarray) -> ndarray:
    """Measure how much darker than its paper each pixel is.

    The paper's brightness under the ink is found by a morphological closing: it fills
    dark lines narrower than its window, but follows a shadow's edge.

    Args:
        page: What `smooth_page` gives.

    Returns:
        `[height, width] float32`, a fraction: 0 = paper.
    """
    half = max(page.shape) // 6
    wide = np.pad(page, half, mode="edge")  # beyond the border, the paper goes on
    paper = ndimage.grey_closing(wide, 2 * half + 1)
    paper = paper[half:-half, half:-half]
    return 1 - page / np.maximum(paper, _find_even_paper(page) or 0.1)


def drop_frames(mask: ndarray) -> ndarray:
    """Remove a box or a circle around something, and all that is outside.

    Strokes may cross the lines of the box, and stay. An empty box goes, an empty
    circle is a 0.
    """
    near = max(mask.shape) // 40
    pieces, _ = ndimage.label(mask, AROUND)
    for number, box in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[box] == number
        if min(piece.shape) < max(mask.shape) / 4:
            continue
        closed = ndimage.binary_dilation(piece, AROUND, near)  # a circle's ends
        whole = piece, ndimage.binary_fill_holes(closed), 0
        printed = *_find_printed_box(piece, near), 0.01  # a roomy one may be empty
        for frame, room, share in (whole, printed):
            rest = mask[box] & ~frame
            inside = (rest & room).sum() + share * room.sum()
            if inside > 0.05 * frame.sum() and _has_no_notch(room):
                mask = np.zeros_like(mask)
                mask[box] = ndimage.binary_propagation(rest & room, AROUND, rest)
                break
    return mask


def _find_printed_box(piece, near):
    """The lines of a box that strokes may cross, and the room between them."""
    across, erasable = _find_lines(piece, 2 * near)
    down, also_erasable = _find_lines(piece.T, 2 * near)
    outline = (across + down.T) > 0
    filled = ndimage.binary_fill_holes(outline)
    filled = ndimage.binary_opening(filled, AROUND, 4 * near)  # no stroke sticks out
    filled &= filled.sum() > 1.5 * outline.sum()
    room = ndimage.binary_erosion(filled, AROUND, 3 * near)
    return (erasable | also_erasable.T) & ~room, room


def drop_lines(mask: ndarray) -> ndarray:
    """Remove printed lines, from border to border, and what hangs on them.

    The bar of a 7 and the stem of a 4 stay.
    """
    thin = max(mask.shape) // 20  # first what is thinner: more is left of the digit
    rest = mask
    for thick in (thin // 2, thin):
        rest = _drop_lines_across(rest, thick)
        rest = _drop_lines_across(rest.T, thick).T
    # What hangs on a line goes with it, unless the digit does.
    pieces, _ = ndimage.label(mask, AROUND)
    hanging = np.setdiff1d(pieces[mask & ~rest], pieces[find_largest(rest)])
    return rest & ~np.isin(pieces, hanging)


def _drop_lines_across(mask, thin):
    width = mask.shape[1]
    lines, erasable = _find_lines(mask, thin)
    others = mask & ~erasable
    if not (erasable.any() and others.any()):
        return mask
    size = max(mask[find_box(find_largest(others))].shape)
    reach = width // 25 + 1
    whole = []  # from border to border
    for number, (_, across) in enumerate(ndimage.find_objects(lines), 1):
        if across.start < reach and across.stop > width - reach:
            whole.append(number)
    _, columns = find_box(others)  # the digit may be in several pieces
    fills_page = min(columns.start, width - columns.stop) < size / 4
    if fills_page and len(whole) < 3:
        return mask  # two lines may be bars of the digit
    return mask & ~(erasable & np.isin(lines, whole))


def _find_lines(mask, thin):
    """The numbers of long lines across, without the strokes that cross them."""
    wide = ndimage.maximum_filter1d(mask, thin, axis=0)  # a line may be tilted a bit
    long = ndimage.grey_opening(wide, (1, mask.shape[1] // 2 + 1))
    if not long.any():  # the usual case, soon answered
        return long, long
    lines, _ = ndimage.label(long, AROUND)
    crossing = ndimage.grey_opening(mask, (thin + 1, 1))
    return lines, (lines > 0) & mask & ~crossing


def _drop_others(mask, weight, page, faint):
    """Keep the digit's own pieces: no shadow, no speck, no neighbour that is cut off.

    `weight` says how much each pixel counts; `faint` ink may be a shadow.
    """
    pieces, count = ndimage.label(mask, AROUND)
    numbers = np.arange(1, count + 1)
    weights = ndimage.sum_labels(weight, pieces, numbers)
    # Around ink all is lighter, at the edge of a shadow only one side. What lies beyond
    # the border (padded with 0, as black) counts as dark.
    margin = max(mask.shape) // 25
    page = np.pad(page, margin)
    inside = np.pad(pieces, margin)
    window = 2 * margin + 1
    edge = ndimage.maximum_filter(page * (inside > 0), window)
    around = ndimage.maximum_filter(inside, window)
    around[inside > 0] = 0
    size = ndimage.sum_labels(around > 0, around, numbers)
    dark = ndimage.sum_labels(page <= edge, around, numbers)
    shadow = dark > (0.15 if faint else 0.3) * size
    sides = np.hstack([pieces[:, :margin], pieces[:, -margin:]])
    cut = np.isin(numbers, sides)  # by the left or the right border
    others = np.where(shadow | cut, 0, weights)
    if others.max() > 0.1 * weights.max():
        weights = others
    if faint and shadow[weights.argmax()]:
        raise PictureError(
            "only shadows stand out from the paper: use a darker pen or more even light"
        )
    large = weights > 0.05 * weights.max()
    kept = np.isin(pieces, numbers[large])
    if weights.max() > weights.sum() / 2:  # what else belongs to the digit is near
        heaviest = ndimage.find_objects(pieces)[weights.argmax()]
        near = np.zeros_like(mask)
        near[_widen(heaviest)] = True
        kept &= near
    return kept


def _widen(box):
    """A box with its longer side added all around."""
    longer = max(side.stop - side.start for side in box)
    return tuple(slice(max(0, s.start - longer), s.stop + longer) for s in box)


def _find_even_paper(page, tolerance=0.1):
    """The brightness of the paper, if half of the border is about like the corners."""
    rim = np.append(page[[0, -1]], page[:, [0, -1]])
    corners = page[[0, -1]][:, [0, -1]]
    paper = np.median(corners)
    even = np.abs(rim - paper) < tolerance * np.ptp(page)
    return paper if even.mean() > 0.5 else None


def _has_light_ink(page):
    """Whether what stands out from the paper is brighter than it is.

    On even paper, that is what differs most from it. On uneven paper, strokes make the
    differences from the local mean lopsided; a shadow's edge does not, and the fifth
    power forgets what is faint and wide. In doubt, ink is dark.
    """
    paper = _find_even_paper(page, 0.03)
    page = resize(page, 128 / max(page.shape))
    if paper is not None:
        return page.max() - paper > paper - page.min()
    mean = ndimage.gaussian_filter(page, max(page.shape) / 10)
    away = (page - mean) ** 5
    return away.mean() > 0.3 * np.abs(away).mean()


def _has_no_notch(mask):
    """Whether a shape is convex, up to its pixels."""
    return mask.sum() > 0.98 * ConvexHull(np.argwhere(mask)).volume  # an area


def find_largest(mask: ndarray) -> ndarray:
    """The largest piece of a mask."""
    pieces, _ = ndimage.label(mask, AROUND)
    return pieces == np.bincount(pieces[mask]).argmax()


def find_box(mask: ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box with all of `mask`."""
    return ndimage.find_objects(mask.astype(int))[0]


def resize(page: ndarray, factor: float) -> ndarray:
    """Enlarge or reduce a page or a mask by a factor, to at least one pixel.

    The filter averages where it reduces, and does not overshoot.
    """
    height, width = (max(1, round(side * factor)) for side in page.shape)
    image = Image.fromarray(page.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.HAMMING))
