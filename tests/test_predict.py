"""From any picture to ten probabilities, measured on pictures that the tests draw.

`python -m tests.test_predict 150` prints the table for 150 pictures of each kind.
"""

import io
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mnist_helpers.augment import warp_digits
from mnist_helpers.data import PROJECT_ROOT, TRANSFORM, Digits, load_mnist
from mnist_helpers.handwriting import predict
from mnist_helpers.handwriting.picture import PictureError
from mnist_helpers.handwriting.predict import (
    VIEWS,
    main,
    predict_picture,
    predict_probabilities,
)
from mnist_helpers.model import MLP, load_model, write_safely

# --- What is drawn: digits, a random generator -> ink `[height, width]` in 0..1, label.


def from_mnist(digits, rng, labels=range(10)):
    while True:
        digit = digits[int(rng.integers(len(digits)))]
        if digit.labels in labels:
            return digit.images.numpy() / 255, int(digit.labels)


def arc(x, y, width, height, start=0.0, stop=360.0):
    """Part of an ellipse around (x, y); angles in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.stack([x + width * np.cos(angle), y + height * np.sin(angle)], axis=1)


STROKES = {  # each digit: its strokes, x to the right and y down, 1 = its height
    0: [arc(0.35, 0.5, 0.33, 0.5, -80, 300)],
    1: [[(0.3, 0), (0.3, 1)]],
    2: [[*arc(0.32, 0.28, 0.3, 0.28, 190, 390), (0.02, 1), (0.65, 0.98)]],
    3: [[*arc(0.3, 0.26, 0.27, 0.26, 210, 430), *arc(0.3, 0.74, 0.32, 0.26, -80, 150)]],
    4: [[(0.4, 0), (0, 0.62), (0.7, 0.62)], [(0.5, 0.35), (0.47, 1)]],
    5: [[(0.6, 0.02), (0.12, 0), (0.08, 0.42), *arc(0.3, 0.67, 0.32, 0.33, -120, 150)]],
    6: [[(0.5, 0), (0.12, 0.45), *arc(0.33, 0.72, 0.3, 0.28, 200, 560)]],
    7: [[(0, 0.02), (0.62, 0), (0.25, 1)]],
    8: [arc(0.33, 0.25, 0.27, 0.25, 90, -270), arc(0.33, 0.75, 0.33, 0.25, -90, 270)],
    9: [[*arc(0.33, 0.28, 0.28, 0.28, 0, -360), (0.6, 0.3), (0.5, 1)]],
}


def draw(strokes, pen, rng=None, height=100, gap=0.0):
    """The ink of strokes that are `height` pixels high, on a bit of paper.

    `pen` in pixels; with `rng` the hand is unsteady; `gap` makes dots, so far apart.
    """
    lines = []
    for stroke in strokes:
        corners = np.array(stroke) * height
        steps = np.hypot(*np.diff(corners, axis=0).T)
        length = np.append(0, steps.cumsum())
        even = np.linspace(0, length[-1], round(2 * length[-1]))
        lines.append(np.stack([np.interp(even, length, axis) for axis in corners.T]))
    if rng:
        turn, lean, stretch = rng.uniform((-0.1, -0.1, 0.85), (0.1, 0.15, 1.2))
        for line in lines:
            shake = rng.normal(0, 8.5, line.shape)
            line[:] = [[stretch, -lean - turn], [turn, 1]] @ line
            line += ndimage.gaussian_filter1d(shake, 24, axis=1)
    step = round(2 * (pen + gap)) if gap else 1
    points = np.concatenate([line[:, ::step] for line in lines], axis=1)
    points -= points.min(axis=1, keepdims=True) - pen / 2 - 10
    columns, rows = points.round().astype(int)
    margin = int(pen / 2 + 10)
    page = np.ones((rows.max() + margin, columns.max() + margin))
    page[rows, columns] = 0
    return np.clip(pen / 2 + 0.5 - ndimage.distance_transform_edt(page), 0, 1)


def sketch(digits, rng, pen=(3, 14), labels=range(10)):
    label = int(rng.choice(labels))
    return draw(STROKES[label], rng.uniform(*pen), rng), label


def dotted(digits, rng):
    label, pen = int(rng.integers(10)), rng.uniform(4, 8)
    return draw(STROKES[label], pen, rng, gap=0.7 * pen), label


def pieces(digits, rng):
    """A 4 or a 5 in two strokes that do not quite meet."""
    pen, belly = rng.uniform(6, 12), arc(0.3, 0.67, 0.32, 0.33, -120, 150)
    away = pen * rng.uniform(1.2, 1.8) / 100
    four = [[(0.1, 0), (0, 0.55), (0.5 - away, 0.55)], [(0.5, 0.1), (0.47, 1)]]
    five = [[(0.15 + away, 0), (0.65, 0)], [(0.1, 0), (0.08, 0.42), *belly]]
    label = int(rng.choice([4, 5]))
    return draw(four if label == 4 else five, pen, rng), label


def ones(digits, rng):
    """As most of the world writes it: with a flag, a base or both."""
    top, flag, down, left, right = rng.uniform(0.15, 0.4, 5)
    stem = [(top / 2, 0), (0, 1)]
    base = [(-left, 1), (right, 1)]
    flagged = [(top / 2 - flag, down), *stem]
    strokes = [[flagged], [stem, base], [flagged, base]][rng.integers(3)]
    return draw(strokes, rng.uniform(3, 14), rng), 1


def flagged_ones(digits, rng):
    """With a flag nearly as long as the stem."""
    length, lean, angle = rng.uniform((0.45, -2, 20), (0.9, 15, 45))
    lean, angle = np.radians([lean, lean + angle])
    flag = (np.sin(lean) - length * np.sin(angle), length * np.cos(angle))
    stroke = [flag, (np.sin(lean), 0), (0, np.cos(lean))]
    return draw([stroke], rng.uniform(3, 8)), 1


def straight_sevens(digits, rng):
    """Of a bar, an upright stem and a short bar across it."""
    side, width, low = rng.uniform((64, 0.5, 0.4), (260, 0.9, 0.6))
    slope, lean, tilt = rng.uniform(-0.02, 0.02, 3)
    bar = [(0, slope), (width, 0), (width + lean, 1)]
    cross = [(0.7 * width, low), (1.2 * width, low + tilt)]
    return draw([bar, cross], side * rng.uniform(0.012, 0.03), None, 0.8 * side), 7


def open_fours(digits, rng):
    """Of an L and an upright stem."""
    side, low, right = rng.uniform((64, 0.5, 0.55), (260, 0.65, 0.7))
    slope, lean, top = rng.uniform((-0.02, -0.02, 0), (0.02, 0.02, 0.2))
    corner = [(0, 0), (0, low), (0.9, low + slope)]
    stem = [(right, top), (right + lean, 1)]
    return draw([corner, stem], side * rng.uniform(0.012, 0.035), None, 0.8 * side), 4


def neighbours(digits, rng):
    """Between what is left of two other digits."""
    label, inks = None, []
    for share in rng.uniform(0.3, 0.7, 3):
        ink, label = from_mnist(digits, rng)
        ink = enlarge(ink, 3)
        ink = ink[:, ink.any(axis=0)]
        inks.append((ink, round(share * ink.shape[1])))
    (left, cut), (right, end), (whole, _) = inks
    before, after = (np.zeros((84, gap)) for gap in rng.integers(8, 17, 2))
    return np.hstack([left[:, cut:], before, whole, after, right[:, :end]]), label


# --- How it lies on the page: ink, a random generator -> something to read.


def enlarge(ink, factor):
    size = [max(1, round(side * factor)) for side in ink.shape[::-1]]
    method = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BOX
    image = Image.fromarray(ink.astype(np.float32))
    return np.asarray(image.resize(size, method)).clip(0, 1)


def place(ink, height, width, scale=1.5, middle=None):
    """The ink, enlarged by `scale`, around `middle` on a page of the given size."""
    digit = Image.fromarray(enlarge(ink, scale))
    down, right = middle or (height / 2, width / 2)
    page = Image.new("F", (width, height))
    page.paste(digit, (int(right - digit.width / 2), int(down - digit.height / 2)))
    return np.asarray(page)


def paint(ink, paper=0.95, pen=0.1):
    return paper + (pen - paper) * ink


def turn(page, degrees):
    image = Image.fromarray(page.astype(np.float32))
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC))


def crop(ink, margin=0):
    ink = np.pad(ink, margin)
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis=axis)) for axis in (1, 0))
    top, left = rows[0] - margin, columns[0] - margin
    return ink[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]


def to_bytes(grey):
    return (np.clip(grey, 0, 1) * 255).round().astype(np.uint8)


def as_file(page, quality):
    file = io.BytesIO()
    Image.fromarray(to_bytes(page)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def make_light(height, width, rng):
    """A lamp on one side, a shadow with a hard edge, corners darker than the middle."""
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    lamp, edge = rng.uniform(0, 2 * np.pi, 2)
    light = 1 - 0.5 * (x * np.cos(lamp) + y * np.sin(lamp) + 0.5)
    shadow = x * np.cos(edge) + y * np.sin(edge) > rng.uniform(-0.25, 0.25)
    shadow = ndimage.gaussian_filter(shadow.astype(float), height / 100)
    return light * (1 - rng.uniform(0.2, 0.4) * shadow) * (1 - 0.4 * (x * x + y * y))


def black(ink, rng):
    return 1 - ink


def white(ink, rng):
    return ink


def on_paper(ink, rng, paper=(0.9, 0.9), dark=(0.7, 0.9), light=0, noise=0, blur=0):
    """Ink that is by the fraction `dark` darker than its paper."""
    paper = rng.uniform(*paper)
    middle = tuple(rng.uniform(50, 70, 2))
    page = paint(
        place(ink, 120, 120, 3, middle), paper, paper * (1 - rng.uniform(*dark))
    )
    page = ndimage.gaussian_filter(page, rng.uniform(blur / 2, blur))
    return page * make_light(120, 120, rng) ** light + rng.normal(0, noise, page.shape)


def chalk(ink, rng):
    return 1 - on_paper(ink, rng, light=1)


def shifted(ink, rng):
    height, width = rng.integers(40, 120, 2)
    middle = tuple(rng.uniform(14, (height - 14, width - 14)))
    return 1 - place(ink, height, width, 1, middle)


def scaled(ink, rng):
    return 1 - enlarge(ink, 10 ** rng.uniform(-0.5, 0.5))


def noisy(ink, rng):
    page = paint(place(ink, 56, 56)) + rng.normal(0, rng.uniform(0.05, 0.2), (56, 56))
    page[rng.random(page.shape) < 0.01] = 0
    page[rng.random(page.shape) < 0.01] = 1
    return page


def transparent_margin(ink, rng):
    """Opaque, but for a black margin of a pixel or two."""
    layers = np.stack([1 - ink, 1 - ink, 1 - ink, np.ones_like(ink)], axis=2)
    right = int(rng.integers(1, 3))
    return np.pad(layers, ((0, right), (0, right), (0, 0)))


def coloured_paper(ink, rng):
    """Dark or light ink on paper of a strong colour, both about equally bright."""
    paper, pen = rng.uniform(0.2, 0.9, (2, 3))
    pen += (paper - pen).mean() + rng.choice([-0.25, 0.25])
    light = make_light(120, 120, rng)[..., None] ** 0.4
    page = paint(place(ink, 120, 120, 3)[..., None], paper, pen) * light
    return page + rng.normal(0, 0.01, page.shape)


def thin(ink, rng):
    depth = ndimage.distance_transform_edt(enlarge(ink, 4) > 0.43)
    return depth < 0.55 * np.quantile(depth[depth > 0], 0.9)


def measure_away(ink):
    """How far each pixel is from the ink, four times enlarged."""
    return ndimage.distance_transform_edt(np.pad(enlarge(ink, 4), 12) < 0.43)


def thick(ink, rng):
    return measure_away(ink) > rng.uniform(3, 5)


def thick_white(ink, rng):
    """Filling 28 pixels, but no hole is filled."""
    tall, grow = rng.uniform((20, 0.5), (26, 1.25)) * 8
    ink = crop(ink)
    mask = np.pad(enlarge(ink, tall / len(ink)) > 0.43, 12)
    away = ndimage.distance_transform_edt(~mask)
    holes, count = ndimage.label(~mask)
    deepest = ndimage.maximum(away, holes, np.arange(count + 1))[holes]
    thick = (away < grow) & ((holes < 2) | (away < deepest / 2))  # 1 is outside
    return enlarge(place(thick, 224, 224, 1), 1 / 8)


def hollow(ink, rng):
    """Only the outline, 2.6 pixels wide."""
    mask = np.pad(enlarge(ink, 4) > 0.43, 4)
    inside, outside = map(ndimage.distance_transform_edt, (mask, ~mask))
    return np.clip(inside + outside - 1.3, 0, 1)


def photograph(ink, rng, height=800, width=600):
    """A small digit on shadowed, grainy paper, a little out of focus."""
    middle = tuple(rng.uniform(0.35, 0.65, 2) * (height, width))
    page = paint(place(ink, height, width, rng.uniform(5, 14), middle), 0.85, 0.2)
    page = ndimage.gaussian_filter(page, 2) * make_light(height, width, rng)
    page += rng.normal(0, 0.03, page.shape)
    return as_file(page[..., None] * [1, 0.97, 0.9], quality=85)


def tiny(ink, rng):
    """Shrunk to 28 pixels, as most projects hand it to their network."""
    side = max(ink.shape)
    return 1 - enlarge(place(ink, side, side, 1), 28 / side)


def faint_file(ink, rng):
    return as_file(1 - ink * rng.uniform(0.04, 0.1), quality=75)


def tight(ink, rng):
    """Cropped to its strokes."""
    page = crop(enlarge(ink, 90 / max(ink.shape)))
    return paint(page, *rng.permutation([0.95, rng.uniform(0.05, 0.3)]))


def thick_tight(ink, rng):
    return tight(measure_away(ink) < rng.uniform(3, 6), rng)


def at_border(ink, rng):
    """Written up to one or two sides of the paper, a bit of it cut off."""
    page = crop(enlarge(ink, 3), 20)
    height, width = page.shape
    top, bottom, left, right = rng.integers(20, 24, 4) * (rng.random(4) < 0.4)
    page = page[top : height - bottom, left : width - right]
    return paint(page, rng.uniform(0.6, 1), 0.2)


def faint_at_border(ink, rng):
    """So faint that it might be a shadow."""
    page = at_border(ink, rng)
    return 0.8 - 0.8 * (1 - page / page.max()) * rng.uniform(0.15, 0.5)


def boxed(ink, rng):
    """In a printed box."""
    scale = rng.uniform(2, 3.5)
    height, width = (30 * scale * rng.uniform(1, 1.5, 2)).astype(int)
    thickness, grey = int(rng.integers(1, 5)), rng.uniform(0.6, 1)
    box = np.pad(np.zeros((height, width)), thickness, constant_values=grey)
    box = np.pad(box, rng.integers(6, 20))
    middle = tuple(np.divide(box.shape, 2) + rng.uniform(-5, 5, 2))
    page = np.maximum(box, place(ink, *box.shape, scale, middle))
    return paint(turn(page, rng.uniform(-2, 2)))


def cell(ink, rng):
    """Cut from a form, parts of the printed box still along the border."""
    page = place(ink, *rng.integers(90, 120, 2), rng.uniform(2, 3)).copy()
    for side in rng.permutation(4)[: rng.integers(1, 5)]:
        line = slice(rng.integers(0, 4), rng.integers(5, 8))
        np.rot90(page, side)[line] = rng.uniform(0.6, 1)
    return paint(turn(page, rng.uniform(-1, 1)))


def lined(ink, rng):
    """On a writing line, just above it or across."""
    scale = rng.uniform(2, 4)
    page = place(ink, int(40 * scale), int(rng.uniform(40, 80) * scale), scale)
    top = int(scale * rng.uniform(28, 34))
    line = np.zeros(page.shape)
    line[top : top + rng.integers(1, 5)] = rng.uniform(0.5, 1)
    return paint(np.maximum(page, turn(line, rng.uniform(-2, 2))))


def ruled(ink, rng, step=(14, 30), dark=(0.2, 0.4), crossed=0.5, degrees=4):
    """On ruled or squared paper."""
    step, lines = rng.integers(*step), np.zeros((260, 260))
    lines[::step] = lines[1::step] = 1
    if rng.random() < crossed:
        lines[:, ::step] = lines[:, 1::step] = 1
    lines = turn(lines, rng.uniform(-degrees, degrees))[30:230, 30:230]
    middle = tuple(rng.uniform(75, 125, 2))
    page = place(ink, 200, 200, rng.uniform(2.5, 4.5), middle)
    return paint(np.maximum(page, lines * rng.uniform(*dark)), 0.95, 0.15)


def lay(sheet, table, middle, degrees=0):
    """A sheet of paper on a table, both as pages."""
    there, sheet = (
        turn(place(layer, *table.shape, 1, middle), degrees)
        for layer in (np.ones(sheet.shape), sheet)
    )
    return np.where(there > 0.99, sheet, table)


def on_table(
    ink, rng, paper=(0.75, 0.95), table=(0.1, 0.55), turns=(-20, 20), light=0.5
):
    """A sheet of paper on a darker table, photographed from above."""
    size = rng.integers(180, 330, 2)
    sheet = place(ink, *size, rng.uniform(4, 6.5))
    sheet = paint(sheet, rng.uniform(*paper), rng.uniform(0.1, 0.25))
    side = int(rng.uniform(1.3, 2) * max(size))
    grain = ndimage.gaussian_filter(rng.normal(0, 10, (side, side)), (1.5, 18))
    table = rng.uniform(*table) + rng.uniform(0, 0.05) * grain * light
    middle = tuple(side / 2 + rng.uniform(-0.3, 0.3, 2) * (side - size))
    page = lay(sheet, table, middle, rng.uniform(*turns))
    page = page * make_light(side, side, rng) ** light
    return page + rng.normal(0, 0.01, page.shape)


def inset(ink, rng):
    """White on a black square, on a white page."""
    middle = tuple(rng.uniform(165, (315, 475)))
    return lay(enlarge(ink, 11), np.ones((480, 640)), middle)


# Every kind: what is drawn, how it lies on the page, and the share that must be right.
light_table = partial(
    on_table, paper=(0.91, 0.91), table=(0.745, 0.745), turns=(-8, 8), light=0
)
KINDS = {
    "black on white": (from_mnist, black, 0.98),
    "shifted": (from_mnist, shifted, 0.98),
    "any scale": (from_mnist, scaled, 0.97),
    "grey paper": (from_mnist, partial(on_paper, paper=(0.45, 0.85)), 0.97),
    "shaded paper": (from_mnist, partial(on_paper, light=1), 0.97),
    "chalk": (from_mnist, chalk, 0.97),
    "noise": (from_mnist, noisy, 0.97),
    "transparent margin": (from_mnist, transparent_margin, 0.98),
    "coloured paper": (from_mnist, coloured_paper, 0.92),
    "thinned": (from_mnist, thin, 0.93),
    "thickened": (from_mnist, thick, 0.96),
    "thick, white": (partial(from_mnist, labels=(0, 6, 8, 9)), thick_white, 0.97),
    "hollow": (from_mnist, hollow, 0.6),
    "photograph": (from_mnist, photograph, 0.96),
    "sheet on a table": (from_mnist, on_table, 0.95),
    "on a light table": (from_mnist, light_table, 0.95),
    "black inset": (from_mnist, inset, 0.8),
    "faint": (from_mnist, partial(on_paper, dark=(0.07, 0.15), noise=0.006), 0.97),
    "faint, 28 pixels": (from_mnist, faint_file, 0.92),
    "soft pencil, shadow": (
        from_mnist,
        partial(on_paper, paper=(0.6, 0.95), dark=(0.3, 0.5), light=1, noise=0.01),
        0.78,
    ),
    "blurred": (
        from_mnist,
        partial(on_paper, dark=(0.45, 0.8), noise=0.01, blur=6),
        0.8,
    ),
    "tight crop": (from_mnist, tight, 0.96),
    "bold, tight crop": (from_mnist, thick_tight, 0.88),
    "at the border": (from_mnist, at_border, 0.96),
    "faint, at the border": (from_mnist, faint_at_border, 0.8),
    "neighbours": (neighbours, black, 0.95),
    "in a box": (from_mnist, boxed, 0.95),
    "cut from a form": (from_mnist, cell, 0.95),
    "on a writing line": (from_mnist, lined, 0.95),
    "squared paper": (from_mnist, ruled, 0.9),
    "ruled paper": (
        from_mnist,
        partial(ruled, step=(34, 51), dark=(0.6, 0.6), crossed=0, degrees=2),
        0.97,
    ),
    "strokes": (sketch, black, 0.98),
    "strokes, 28 pixels": (sketch, tiny, 0.97),
    "thin strokes": (partial(sketch, pen=(1.5, 3)), black, 0.97),
    "thin, 28 pixels": (partial(sketch, pen=(1.5, 3)), tiny, 0.95),
    "bold strokes": (partial(sketch, pen=(14, 22)), black, 0.97),
    "bold, cropped": (partial(sketch, pen=(14, 22)), tight, 0.92),
    "dotted": (dotted, black, 0.85),
    "round eights": (partial(sketch, pen=(3, 9), labels=(8,)), black, 0.97),
    "several strokes": (pieces, black, 0.97),
    "straight sevens": (straight_sevens, black, 0.98),
    "open fours": (open_fours, black, 0.98),
    "ones": (ones, black, 0.87),
    "ones, 28 pixels": (ones, tiny, 0.87),
    "long flags": (flagged_ones, black, 0.93),
}


# --- Pictures of no digit: a random generator -> something to refuse.

FONTS = [
    "DejaVuSans",
    "DejaVuSerif-Italic",
    "DejaVuSans-BoldOblique",
    "cmmi10",
    "cmtt10",
]
UNLIKE_DIGITS = list("ACEFHKMNPRTUWXYadefhkmnprtuwxy")  # I, l, O, S and Z are twins


def write(text, rng):
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{rng.choice(FONTS)}.ttf", 60)
    left, top, right, bottom = font.getbbox(text)
    page = Image.new("L", (right - left + 30, bottom - top + 30), 255)
    ImageDraw.Draw(page).text((15 - left, 15 - top), text, font=font, fill=0)
    degrees = rng.uniform(-12, 12)
    return page.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=255)


def letter(rng):
    return write(rng.choice(UNLIKE_DIGITS), rng)


def word(rng):
    letters = [*UNLIKE_DIGITS, *"bcgijloqsvzBDGIJLOQSVZ"]
    return write("".join(rng.choice(letters, rng.integers(2, 7))), rng)


def cursive(rng):
    t, loops = np.linspace(0, 1, 300), 2 * np.pi * rng.uniform(2, 5)
    tall = rng.uniform(10, 25) * (1 + 0.4 * np.sin(17 * t + rng.uniform(0, 6)))
    x, y = t * 180 + 8 * np.sin(loops * t + 1), tall * np.sin(loops * t)
    return 1 - draw([np.stack([x, y], axis=1)], 4, height=1)


def tangle(rng):
    corners = rng.uniform(0, 100, (rng.integers(8, 25), 2)).repeat(12, axis=0)
    path = ndimage.gaussian_filter1d(corners, 5, axis=0)
    return 1 - draw([path], rng.uniform(2, 6), height=1)


def blank(rng):
    height, width = rng.integers(20, 200, 2)
    page = np.full((height, width), rng.uniform(0.3, 1))
    if rng.random() < 0.5:
        page *= make_light(height, width, rng)
    if rng.random() < 0.7:
        page += rng.normal(0, rng.uniform(0.005, 0.1), page.shape)
    return page


def texture(rng):
    side = int(rng.integers(28, 200))
    y, x = np.mgrid[:side, :side]
    period, noise = rng.integers(3, side // 4), rng.random((side, side))
    clouds = ndimage.gaussian_filter(noise, rng.uniform(1, side / 15))
    tiles = [
        noise,
        (clouds - 0.5) / clouds.std() / 4 + 0.5,
        (x // period + y // period) % 2.0,
        (x % period + rng.integers(2) * (y % period)) / period,
    ]
    return tiles[rng.integers(len(tiles))]


NO_DIGITS = {
    "blank": blank,
    "texture": texture,
    "word": word,
    "cursive": cursive,
    "tangle": tangle,
    "letter": letter,
}


# --- Measuring.


def ask(model, picture):
    """The answer, or None where the picture is refused."""
    if isinstance(picture, np.ndarray):
        picture = to_bytes(picture)
    try:
        return predict_picture(model, picture)
    except PictureError:
        return None


def measure(model, digits, name, count):
    """The shares right, refused, and wrong with 90% or more.

    Without digits: refused or answered with less than 60%, refused, 90% or more.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # other digits for each kind
    good, refused, sure = np.zeros((3, count), bool)
    for number in range(count):
        if name in KINDS:
            drawing, page, _ = KINDS[name]
            ink, label = drawing(digits, rng)
            picture = page(ink, rng)
        else:
            picture, label = NO_DIGITS[name](rng), None
        answer = ask(model, picture)
        refused[number] = answer is None
        if answer is None:
            good[number] = label is None
        elif label is None:
            good[number], sure[number] = (
                answer.confidence < 0.6,
                answer.confidence > 0.9,
            )
        else:
            good[number] = answer.digit == label
            sure[number] = answer.digit != label and answer.confidence > 0.9
    return good.mean(), refused.mean(), sure.mean()


def print_table(heading, table):
    table["mean"] = np.mean(list(table.values()), axis=0)
    print(f"{'kind':22}" + "".join(f"{word:>14}" for word in heading))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{value:14.1%}" for value in row), flush=True)


# --- The tests.


@pytest.fixture(scope="module")
def model():
    """The trained model that the notebook left."""
    path = PROJECT_ROOT / "model.pth"
    if not path.exists():
        pytest.skip("there is no model.pth yet: run the notebook")
    return load_model(path)


def test_digits_of_every_kind_are_right(model, mnist):
    count = 16
    table = {name: measure(model, mnist[1], name, count) for name in KINDS}
    for name, (right, _, _) in table.items():
        least = KINDS[name][2] - 1.5 / count  # one or two of so few may be chance
        assert right >= least, f"{name}: {right:.0%} right, {least:.0%} wanted"
    right, refused, wrong = np.mean(list(table.values()), axis=0)
    assert right > 0.945
    assert refused < 0.03
    assert wrong < 0.01


def test_what_is_no_digit_is_refused_or_doubted(model):
    table = {name: measure(model, None, name, 30) for name in NO_DIGITS}
    assert table.pop("letter")[2] < 0.15
    assert table["blank"][0] > 0.96
    assert np.mean(list(table.values()), axis=0)[0] > 0.92


def test_pictures_take_milliseconds(model, mnist):
    """15 or so on two idle cores, and 100 for a photograph of twelve megapixels."""
    rng, digit = np.random.default_rng(1), mnist[1][0]
    ink, large = digit.images.numpy() / 255, io.BytesIO()
    photo = Image.open(io.BytesIO(photograph(ink, rng)))
    photo.resize((3000, 4000)).save(large, "JPEG")
    pictures = [large.getvalue(), *(to_bytes(on_paper(ink, rng)) for _ in range(9))]
    times = []
    for picture in pictures:
        start = time.process_time()
        assert predict_picture(model, picture).digit == digit.labels
        times.append(time.process_time() - start)
    assert np.median(times) < 0.15  # on busy cores
    assert times[0] < 1


class Counter(torch.nn.Module):
    """The more ink, the surer it is of a 1."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, pixels):
        assert not self.training
        return F.pad((pixels.sum(dim=1) * self.scale)[:, None], (1, 8))


def test_probabilities_are_the_mean_softmax_over_warped_views(toy):
    counter, images = Counter().train(), toy.images[:4]
    for views, strength in ((1, 1), (3, 1), (3, 0.5)):
        copies = images.repeat_interleave(views, dim=0)
        if views > 1:
            copies = warp_digits(copies, strength, torch.Generator().manual_seed(0))
        logits = TRANSFORM(copies).sum(dim=1) * 0.01
        wanted = (
            F.pad(logits[:, None], (1, 8)).softmax(dim=1).view(4, views, 10).mean(1)
        )
        answer = predict_probabilities(counter, images, views, strength)
        torch.testing.assert_close(answer, wanted)
        assert counter.training
    one = predict_probabilities(counter, images[2])
    torch.testing.assert_close(one, predict_probabilities(counter, images)[2])
    many = predict_probabilities(counter, images.repeat(150, 1, 1))  # in two parts
    torch.testing.assert_close(many[-1], many[3])
    assert len(many) == 600


def test_model_keeps_its_mode_even_when_stopped(toy):
    class Stopped(Counter):
        def forward(self, pixels):
            raise KeyboardInterrupt

    model = Stopped().train()
    with pytest.raises(KeyboardInterrupt):
        predict_probabilities(model, toy.images[:2])
    assert model.training


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_images_go_to_where_the_model_is(toy, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")

    class Watched(Counter):
        def forward(self, pixels):
            assert pixels.device.type == device
            return torch.zeros(len(pixels), 10)

    model = Watched().to(device)
    assert predict_probabilities(model, toy.images[:2]).device.type == "cpu"


class Divided(Counter):
    """It answers `plain` to a picture as it is, `warped` to warped views of it."""

    def __init__(self, plain, warped):
        super().__init__()
        self.plain, self.warped = torch.tensor(plain).log(), torch.tensor(warped).log()

    def forward(self, pixels):
        return (self.warped if len(pixels) == VIEWS else self.plain).expand(
            len(pixels), 10
        )


STROKE = np.pad(np.zeros((40, 5), np.uint8), ((10, 10), (18, 17)), constant_values=255)
FOUR = [0.0125] * 4 + [0.7] + [0.0125] * 4 + [0.2]
SEVEN = [0.02] * 7 + [0.82] + [0.02] * 2


def test_digit_comes_from_the_picture_and_doubt_from_the_views():
    agreed = predict_picture(Divided(SEVEN, FOUR[5:] + FOUR[:5]), STROKE)
    assert agreed.digit == 7
    agreed = predict_picture(Divided(FOUR, FOUR), STROKE)
    assert (agreed.digit, agreed.confidence) == (4, pytest.approx(0.7, abs=1e-3))
    impossible = [0.0] * 7 + [1.0] + [0.0] * 2
    for views in (SEVEN, impossible):
        divided = predict_picture(Divided(FOUR, views), STROKE)
        assert divided.digit == 4
        assert divided.confidence < 0.51
        assert divided.probabilities.sum() == pytest.approx(1)


def test_digit_of_the_project_is_a_picture():
    images = torch.zeros(5, 28, 28, dtype=torch.uint8)
    images[4, 2:20, 9:13] = 255
    digits = Digits(images, torch.arange(5))
    answer = predict_picture(Counter(), digits[4])
    assert torch.equal(answer.pixels, predict_picture(Counter(), images[4]).pixels)
    for wrong, reason in ((digits, "a batch of 5"), (digits[:0], "expected numbers")):
        with pytest.raises(PictureError, match=reason):
            predict_picture(Counter(), wrong)


def test_prediction_shows_itself():
    prediction = predict_picture(Divided(FOUR, FOUR), STROKE)
    assert prediction.picture.size == (40, 60)
    assert repr(prediction) == "4 with 70.0% (second guess: 9 with 20.0%)"
    given, seen, bars = prediction.show().axes
    assert given.images[0].get_array().shape == (60, 40, 3)
    np.testing.assert_array_equal(seen.images[0].get_array(), prediction.pixels)
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, prediction.probabilities)
    colours = [bar.get_facecolor() for bar in bars.patches]
    assert [colour != colours[0] for colour in colours] == [n == 4 for n in range(10)]
    drawn, metadata = prediction._repr_png_()
    assert Image.open(io.BytesIO(drawn)).width > 400
    assert "4 with 70.0%" in metadata["alt"]
    with matplotlib.style.context("dark_background"):
        assert prediction._repr_png_()[0] == drawn


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with pictures, where the model at hand is sure of a 4."""
    monkeypatch.chdir(tmp_path)
    model = MLP((8,))
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.layers[-1].bias.copy_(torch.tensor(FOUR).log())
    with write_safely(tmp_path / "model.pth") as file:
        torch.save(model.state_dict(), file)
    monkeypatch.setattr(predict, "PROJECT_ROOT", tmp_path)
    Image.fromarray(STROKE).save("good.png")
    Image.fromarray(STROKE).save("四.png")
    Image.fromarray(np.full_like(STROKE, 255)).save("blank.png")


def test_command_answers_and_refuses(files, capsys, monkeypatch):
    assert main(["good.png"]) == 0
    line = "good.png: 4 with 70.0% (second guess: 9 with 20.0%)\n"
    assert capsys.readouterr() == (line, "")
    assert main(["blank.png", "none.png", "good.png"]) == 1
    out, err = capsys.readouterr()
    assert out == line
    blank, missing = err.splitlines()
    assert blank.startswith("blank.png: refused: nothing stands out")
    assert "No such file" in missing
    with pytest.raises(SystemExit, match="2"):
        main(["good.png", "--model", "none.pth"])
    assert "none.pth cannot be read" in capsys.readouterr().err
    answers = [RuntimeError("a bug"), "an answer"]
    monkeypatch.setattr(predict, "predict_picture", lambda *_: take(answers.pop(0)))
    assert main(["good.png", "good.png"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("good.png: an answer\n", "good.png: refused: a bug\n")


def take(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.mark.parametrize("coding", ["cp1252", "ascii"])
def test_names_that_the_console_cannot_show_stop_nothing(files, monkeypatch, coding):
    out = io.TextIOWrapper(io.BytesIO(), coding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["四.png", "good.png"]) == 0
    out.flush()
    first, second = out.buffer.getvalue().decode(coding).splitlines()
    assert first.startswith(r"\u56db.png: 4 with")
    assert second.startswith("good.png: 4 with")


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    trained, (_, test) = (
        load_model(PROJECT_ROOT / "model.pth"),
        load_mnist(download=False),
    )
    for heading, names in (
        (["right", "refused", "surely wrong"], KINDS),
        (["doubted", "refused", "sure"], NO_DIGITS),
    ):
        print_table(
            heading, {name: measure(trained, test, name, count) for name in names}
        )
