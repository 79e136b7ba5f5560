"""From any picture to ten probabilities, measured on pictures that the tests draw.

`python -m tests.test_predict 150` prints the table for 150 pictures of each kind.
"""

import io
import math
import sys
import time
import zlib
from functools import cache, partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.ndimage import distance_transform_edt, gaussian_filter
from sklearn.datasets import load_digits
from torch import nn

from mnist_helpers.augment import warp_digits
from mnist_helpers.data import PROJECT_ROOT, TRANSFORM, load_mnist
from mnist_helpers.handwriting import predict
from mnist_helpers.handwriting.page import PictureError, find_box
from mnist_helpers.handwriting.predict import (
    FLOOR,
    VIEWS,
    find_probabilities,
    main,
    predict_picture,
)
from mnist_helpers.model import MLP, load_model

load_bundled = cache(load_digits)

# --- What is drawn: digits, a random generator -> ink `[height, width]` in 0..1, label.


def from_mnist(digits, rng, labels=range(10)):
    while True:
        digit = digits[int(rng.integers(len(digits)))]
        if digit.labels in labels:
            return digit.images.numpy() / 255, int(digit.labels)


def arc(x, y, width, height, start, stop):
    """Part of an ellipse around (x, y); angles in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, stop, 40))
    return np.transpose([x + width * np.cos(angle), y + height * np.sin(angle)])


BELLY = arc(0.3, 0.67, 0.32, 0.33, -120, 150)  # of a 5
STROKES = [  # of each digit, 0 to 9, x to the right and y down, 1 = its height
    [arc(0.35, 0.5, 0.33, 0.5, -80, 300)],
    [[(0.3, 0), (0.3, 1)]],
    [[*arc(0.32, 0.28, 0.3, 0.28, 190, 390), (0.02, 1), (0.65, 0.98)]],
    [[*arc(0.3, 0.26, 0.27, 0.26, 210, 430), *arc(0.3, 0.74, 0.32, 0.26, -80, 150)]],
    [[(0.4, 0), (0, 0.62), (0.7, 0.62)], [(0.5, 0.35), (0.47, 1)]],
    [[(0.6, 0.02), (0.12, 0), (0.08, 0.42), *BELLY]],
    [[(0.5, 0), (0.12, 0.45), *arc(0.33, 0.72, 0.3, 0.28, 200, 560)]],
    [[(0, 0.02), (0.62, 0), (0.25, 1)]],
    [arc(0.33, 0.25, 0.27, 0.25, 90, -270), arc(0.33, 0.75, 0.33, 0.25, -90, 270)],
    [[*arc(0.33, 0.28, 0.28, 0.28, 0, -360), (0.6, 0.3), (0.5, 1)]],
]


def draw(strokes, pen, rng=None, height=100, step=1):
    """The ink of strokes that are `height` pixels high, on a bit of paper.

    `pen` in pixels; with `rng` the hand is unsteady; a large `step` makes dots.
    """
    if rng:
        turn, lean, stretch = rng.uniform((-0.1, -0.1, 0.85), (0.1, 0.15, 1.2))
    lines = []
    for stroke in strokes:
        corners = np.transpose(stroke) * height  # [x and y, corners]
        length = np.append(0, np.hypot(*np.diff(corners)).cumsum())
        even = np.linspace(0, length[-1], round(2 * length[-1]))
        line = np.array([np.interp(even, length, axis) for axis in corners])
        if rng:
            line = [[stretch, -lean - turn], [turn, 1]] @ line
            line += ndimage.gaussian_filter1d(rng.normal(0, 8.5, line.shape), 24)
        lines.append(line[::-1, ::step])
    points = np.concatenate(lines, axis=1)  # [y and x, points]
    margin = pen / 2 + 10
    points -= points.min(axis=1, keepdims=True) - margin
    points = points.round().astype(int)
    page = np.ones(points.max(axis=1) + int(margin))
    page[tuple(points)] = 0
    return (pen / 2 + 0.5 - distance_transform_edt(page)).clip(0, 1)


def sketch(digits, rng, pen=(3, 14), labels=range(10), apart=0):
    """Or its dots, so many widths of the pen `apart`."""
    label = rng.choice(labels)
    pen = rng.uniform(*pen)
    step = max(1, round(2 * pen * apart))
    return draw(STROKES[label], pen, rng, step=step), label


def pieces(digits, rng):
    """A 4 or a 5 in two strokes that do not quite meet."""
    pen = rng.uniform(6, 12)
    away = pen * rng.uniform(1.2, 1.8) / 100
    strokes = {
        4: [[(0.1, 0), (0, 0.55), (0.5 - away, 0.55)], [(0.5, 0.1), (0.47, 1)]],
        5: [[(0.15 + away, 0), (0.65, 0)], [(0.1, 0), (0.08, 0.42), *BELLY]],
    }
    label = rng.choice([4, 5])
    return draw(strokes[label], pen, rng), label


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
    flag = (-length * np.sin(angle), length * np.cos(angle))
    stroke = [flag, (0, 0), (-np.sin(lean), np.cos(lean))]
    return draw([stroke], rng.uniform(3, 8)), 1


def elsewhere(digits, rng):
    """Of 8x8 pixels, enlarged: scikit-learn's, which 13 other people have written."""
    bundled = load_bundled()
    index = rng.integers(len(bundled.target))
    ink = ndimage.zoom(bundled.images[index] / 16, 12).clip(0, 1)
    return ink, int(bundled.target[index])


def straight_sevens(digits, rng):
    """Of a bar, an upright stem and a short bar across it."""
    side, width, low = rng.uniform((64, 0.5, 0.4), (260, 0.9, 0.6))
    slope, lean, tilt = rng.uniform(-0.02, 0.02, 3)
    bar = [(0, slope), (width, 0), (width + lean, 1)]
    cross = [(0.7 * width, low), (1.2 * width, low + tilt)]
    pen = side * rng.uniform(0.012, 0.03)
    return draw([bar, cross], pen, height=0.8 * side), 7


def open_fours(digits, rng):
    """Of an L and an upright stem."""
    side, low, right = rng.uniform((64, 0.5, 0.55), (260, 0.65, 0.7))
    slope, lean, top = rng.uniform((-0.02, -0.02, 0), (0.02, 0.02, 0.2))
    corner = [(0, 0), (0, low), (0.9, low + slope)]
    stem = [(right, top), (right + lean, 1)]
    pen = side * rng.uniform(0.012, 0.035)
    return draw([corner, stem], pen, height=0.8 * side), 4


def neighbours(digits, rng):
    """Between what is left of two other digits."""
    inks = []
    for share in rng.uniform(0.3, 0.7, 3):
        ink, label = from_mnist(digits, rng)
        ink = enlarge(ink, 3)
        ink = ink[:, ink.any(axis=0)]
        inks.append(np.hsplit(ink, [round(share * ink.shape[1])]))
    (_, left), (right, _), whole = inks
    before, after = (np.zeros((84, gap)) for gap in rng.integers(8, 17, 2))
    return np.hstack([left, before, *whole, after, right]), label


# --- How it lies on the page: ink, a random generator -> something to read.

SQUARE = (120, 120)


def enlarge(ink, factor):
    method = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.BOX
    size = np.round(np.multiply(ink.shape[::-1], factor)).astype(int).clip(1)
    image = Image.fromarray(ink.astype(np.float32)).resize(size, method)
    return np.asarray(image).clip(0, 1)


def place(ink, size, scale=1.5, shift=0):
    """The ink, enlarged by `scale`, `shift` pixels away from the middle of a page."""
    digit = enlarge(ink, scale)
    top, left = (np.subtract(size, digit.shape) / 2 + shift).astype(int)
    page = Image.new("F", tuple(size)[::-1])
    page.paste(Image.fromarray(digit), (left, top))
    return np.array(page)


def paint(ink, paper=0.95, pen=0.1):
    return paper + (pen - paper) * ink


def add_noise(page, rng, noise):
    return page + rng.normal(0, noise, page.shape)


def turn(page, degrees):
    image = Image.fromarray(page.astype(np.float32))
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC))


def crop(ink, margin=0):
    ink = np.pad(ink, margin)
    around = ndimage.maximum_filter(ink, 2 * margin + 1)
    return ink[find_box(around > 0.3)]


def to_bytes(grey):
    return (np.clip(grey, 0, 1) * 255).round().astype(np.uint8)


def as_file(page, quality=85):
    file = io.BytesIO()
    Image.fromarray(to_bytes(page)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def make_light(size, rng):
    """A lamp on one side, a shadow with a hard edge, corners darker than the middle."""
    y, x = (np.linspace(-0.5, 0.5, side) for side in size)
    y = y[:, None]
    angles = rng.uniform(0, 2 * np.pi, 2)
    lamp, edge = (x * np.cos(angle) + y * np.sin(angle) for angle in angles)
    light = 1 - 0.5 * (lamp + 0.5)
    shadow = (edge > rng.uniform(-0.25, 0.25)).astype(float)
    light *= 1 - rng.uniform(0.2, 0.4) * gaussian_filter(shadow, size[0] / 100)
    return light * (1 - 0.4 * (x * x + y * y))


def black(ink, rng):
    return 1 - ink


def on_paper(ink, rng, paper=(0.9, 0.9), dark=(0.7, 0.9), light=0, noise=0, blur=0):
    """Ink that is by the fraction `dark` darker than its paper."""
    paper = rng.uniform(*paper)
    page = place(ink, SQUARE, 3, rng.uniform(-10, 10, 2))
    page = paint(page, paper, paper * (1 - rng.uniform(*dark)))
    page = gaussian_filter(page, rng.uniform(blur / 2, blur))
    return add_noise(page * make_light(SQUARE, rng) ** light, rng, noise)


def chalk(ink, rng):
    return 1 - on_paper(ink, rng, light=1)


def noisy(ink, rng):
    page = paint(place(ink, (56, 56)))
    page = add_noise(page, rng, rng.uniform(0.05, 0.2))
    for grain in (0, 1):
        page[rng.random(page.shape) < 0.01] = grain
    return page


def transparent_margin(ink, rng):
    """Opaque, but for a black margin of a pixel or two."""
    layers = np.dstack([1 - ink] * 3 + [np.ones_like(ink)])
    margin = (0, rng.integers(1, 3))
    return np.pad(layers, (margin, margin, (0, 0)))


def coloured_paper(ink, rng):
    """Dark or light ink on paper of a strong colour, both about equally bright."""
    paper, pen = rng.uniform(0.2, 0.9, (2, 3))
    pen += (paper - pen).mean() + rng.choice([-0.25, 0.25])
    light = make_light(SQUARE, rng)[..., None] ** 0.4
    page = paint(place(ink, SQUARE, 3)[..., None], paper, pen) * light
    return add_noise(page, rng, 0.01)


def thin(ink, rng):
    depth = distance_transform_edt(enlarge(ink, 4) > 0.43)
    return depth < 0.55 * np.quantile(depth[depth > 0], 0.9)


def measure_away(ink):
    """How far each pixel is from the ink, four times enlarged."""
    return distance_transform_edt(np.pad(enlarge(ink, 4), 12) < 0.43)


def thick_white(ink, rng):
    """Filling 28 pixels, but no hole is filled."""
    tall, grow = rng.uniform((20, 0.5), (26, 1.25)) * 8
    ink = crop(ink)
    paper = np.pad(enlarge(ink, tall / len(ink)), 12) <= 0.43
    away = distance_transform_edt(paper)
    holes, _ = ndimage.label(paper)
    deepest = ndimage.maximum(away, holes, holes)
    outside = holes < 2
    bold = (away < grow) & (outside | (away < deepest / 2))
    return enlarge(place(bold, (224, 224), 1), 1 / 8)


def hollow(ink, rng):
    """Only the outline, 2.6 pixels wide."""
    mask = np.pad(enlarge(ink, 4) > 0.43, 4)
    from_edge = distance_transform_edt(mask) + distance_transform_edt(~mask)
    return (from_edge - 1.3).clip(0, 1)


def photograph(ink, rng, scale=(5, 14), shift=0.15):
    """A small digit on shadowed, grainy paper, a little out of focus."""
    size = (800, 600)
    shift = rng.uniform(-shift, shift, 2) * size
    page = paint(place(ink, size, rng.uniform(*scale), shift), 0.85, 0.2)
    page = gaussian_filter(page, 2) * make_light(size, rng)
    page = add_noise(page, rng, 0.03)
    return as_file(page[..., None] * [1, 0.97, 0.9])


def any_size(ink, rng):
    """8 to 400 pixels high, thin to bold: a bold 8 might be taken for a sheet."""
    strokes = measure_away(ink) < rng.uniform(0, 4)
    return 1 - enlarge(strokes, 10 ** rng.uniform(-1, 0.7)) * rng.uniform(0.4, 1)


def tiny(ink, rng):
    """Shrunk to 28 pixels, as most projects hand it to their network."""
    side = max(ink.shape)
    return 1 - enlarge(place(ink, (side, side), 1), 28 / side)


def faint_file(ink, rng):
    return as_file(1 - ink * rng.uniform(0.04, 0.1), quality=75)


def tight(ink, rng):
    """Cropped to its strokes."""
    page = crop(enlarge(ink, 90 / max(ink.shape)))
    dark = rng.uniform(0.05, 0.3)
    return paint(page, *rng.permutation([0.95, dark]))


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
    """In a printed box, or across its lines."""
    scale = rng.uniform(2, 3.5)
    page = np.zeros((30 * scale * rng.uniform(1, 1.5, 2)).astype(int))
    page = np.pad(page, rng.integers(1, 5), constant_values=rng.uniform(0.6, 1))
    page = np.pad(page, rng.integers(6, 20))
    digit = place(ink, page.shape, scale, rng.uniform(-20, 20, 2))
    return paint(turn(np.maximum(page, digit), rng.uniform(-2, 2)))


def cell(ink, rng):
    """Cut from a form, parts of the printed box still along the border."""
    page = place(ink, rng.integers(90, 120, 2), rng.uniform(2, 3))
    for side in rng.permutation(4)[: rng.integers(1, 5)]:
        line = slice(rng.integers(0, 4), rng.integers(5, 8))
        np.rot90(page, side)[line] = rng.uniform(0.6, 1)
    return paint(turn(page, rng.uniform(-1, 1)))


def lined(ink, rng):
    """On a writing line, just above it or across."""
    scale = rng.uniform(2, 4)
    size = (int(40 * scale), int(rng.uniform(40, 80) * scale))
    top = int(scale * rng.uniform(28, 34))
    line = np.zeros(size)
    line[top : top + rng.integers(1, 5)] = rng.uniform(0.5, 1)
    line = turn(line, rng.uniform(-2, 2))
    return paint(np.maximum(line, place(ink, size, scale)))


def ruled(ink, rng, step=(14, 30), dark=(0.2, 1), crossed=0.5, degrees=4):
    """On ruled or squared paper."""
    line = np.arange(260) % rng.integers(*step) < 2
    lines = line[:, None] | line & (rng.random() < crossed)
    lines = turn(lines, rng.uniform(-degrees, degrees))[30:230, 30:230]
    shift = rng.uniform(-25, 25, 2)
    page = place(ink, lines.shape, rng.uniform(2.5, 4.5), shift)
    return paint(np.maximum(page, lines * rng.uniform(*dark)), 0.95, 0.15)


def lay(sheet, table, shift, degrees=0):
    """A sheet of paper on a table, both as pages."""
    there, sheet = (
        turn(place(layer, table.shape, 1, shift), degrees)
        for layer in (np.ones_like(sheet), sheet)
    )
    return np.where(there > 0.99, sheet, table)


def on_table(
    ink, rng, paper=(0.75, 0.95), table=(0.1, 0.55), turns=(-20, 20), light=0.5
):
    """A sheet of paper on a darker table, photographed from above."""
    size = rng.integers(180, 330, 2)
    sheet = place(ink, size, rng.uniform(4, 6.5))
    sheet = paint(sheet, rng.uniform(*paper), rng.uniform(0.1, 0.25))
    side = int(rng.uniform(1.3, 2) * max(size))
    grain = gaussian_filter(rng.normal(0, 10, (side, side)), (1.5, 18))
    table = rng.uniform(*table) + rng.uniform(0, 0.05) * grain * light
    shift = rng.uniform(-0.3, 0.3, 2) * (side - size)
    page = lay(sheet, table, shift, rng.uniform(*turns))
    return add_noise(page * make_light(page.shape, rng) ** light, rng, 0.01)


def inset(ink, rng):
    """White on a black square, on a white page."""
    shift = rng.uniform((-75, -155), (75, 155))
    return lay(enlarge(ink, 11), np.ones((480, 640)), shift)


# Every kind: what is drawn (MNIST's digits, if nothing is said), how it lies on the
# page, and the share that must be right.
THIN = partial(sketch, pen=(1.5, 3))
BOLD = partial(sketch, pen=(14, 22))
KINDS = {
    "black on white": (black, 0.98),
    "grey paper": (partial(on_paper, paper=(0.45, 0.85)), 0.97),
    "shaded paper": (partial(on_paper, light=1), 0.97),
    "chalk": (chalk, 0.97),
    "noise": (noisy, 0.97),
    "transparent margin": (transparent_margin, 0.98),
    "coloured paper": (coloured_paper, 0.92),
    "thinned": (thin, 0.93),
    "thick, white": (partial(from_mnist, labels=(0, 6, 8, 9)), thick_white, 0.97),
    "hollow": (hollow, 0.85),
    "any size": (any_size, 0.97),
    "photograph": (photograph, 0.96),
    "far away": (partial(photograph, scale=(2, 4), shift=0.4), 0.88),
    "sheet on a table": (on_table, 0.95),
    "on a light table": (
        partial(
            on_table, paper=(0.91, 0.91), table=(0.745, 0.745), turns=(-8, 8), light=0
        ),
        0.95,
    ),
    "in a strong shadow": (partial(on_table, table=(0.05, 0.35), light=1.3), 0.8),
    "black inset": (inset, 0.9),
    "faint": (partial(on_paper, dark=(0.07, 0.15), noise=0.006), 0.97),
    "faint, 28 pixels": (faint_file, 0.92),
    "soft pencil, shadow": (
        partial(on_paper, paper=(0.6, 0.95), dark=(0.3, 0.5), light=1, noise=0.01),
        0.78,
    ),
    "blurred": (partial(on_paper, dark=(0.45, 0.8), noise=0.01, blur=6), 0.8),
    "tight crop": (tight, 0.96),
    "bold, tight crop": (thick_tight, 0.88),
    "pieces, tight crop": (pieces, tight, 0.9),
    "at the border": (at_border, 0.96),
    "faint, at the border": (faint_at_border, 0.8),
    "neighbours": (neighbours, black, 0.95),
    "in a box": (boxed, 0.95),
    "cut from a form": (cell, 0.95),
    "on a writing line": (lined, 0.95),
    "squared paper": (ruled, 0.93),
    "ruled paper": (
        partial(ruled, step=(34, 51), dark=(0.6, 0.6), crossed=0, degrees=2),
        0.97,
    ),
    "strokes": (sketch, black, 0.98),
    "thin strokes": (THIN, black, 0.97),
    "thin, 28 pixels": (THIN, tiny, 0.95),
    "bold strokes": (BOLD, black, 0.97),
    "bold, cropped": (BOLD, tight, 0.92),
    "dotted": (partial(sketch, pen=(4, 8), apart=1.7), black, 0.85),
    "round eights": (partial(sketch, pen=(3, 9), labels=(8,)), black, 0.97),
    "several strokes": (pieces, black, 0.97),
    "straight sevens": (straight_sevens, black, 0.98),
    "open fours": (open_fours, black, 0.98),
    "open fours, tight crop": (open_fours, tight, 0.95),
    "ones": (ones, black, 0.87),
    "ones, 28 pixels": (ones, tiny, 0.87),
    "long flags": (flagged_ones, black, 0.93),
    "other writers, enlarged": (elsewhere, black, 0.93),
}


# --- Pictures of no digit: a random generator -> something to refuse.

FONTS = [
    "DejaVuSans",
    "DejaVuSerif-Italic",
    "DejaVuSans-BoldOblique",
    "cmmi10",
    "cmtt10",
]
UNLIKE_DIGITS = "ACEFHKMNPRTUWXYadefhkmnprtuwxy"  # I, l, O, S and Z are twins


def write(text, rng):
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{rng.choice(FONTS)}.ttf"
    font = ImageFont.truetype(path, 60)
    left, top, right, bottom = font.getbbox(text)
    page = Image.new("L", (right - left + 30, bottom - top + 30), 255)
    ImageDraw.Draw(page).text((15 - left, 15 - top), text, font=font, fill=0)
    degrees = rng.uniform(-12, 12)
    return page.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=255)


def letter(rng):
    return write(rng.choice(list(UNLIKE_DIGITS)), rng)


def word(rng):
    letters = list(UNLIKE_DIGITS + "bcgijloqsvzBDGIJLOQSVZ")
    return write("".join(rng.choice(letters, rng.integers(2, 7))), rng)


def tangle(rng):
    corners = rng.uniform(0, 100, (rng.integers(8, 25), 2)).repeat(12, axis=0)
    path = ndimage.gaussian_filter1d(corners, 5, axis=0)
    return 1 - draw([path], rng.uniform(2, 6), height=1)


def blank(rng):
    size = rng.integers(20, 200, 2)
    page = np.full(size, rng.uniform(0.3, 1))
    if rng.random() < 0.5:
        page *= make_light(size, rng)
    if rng.random() < 0.7:
        page = add_noise(page, rng, rng.uniform(0.005, 0.1))
    return page


def texture(rng):
    side = rng.integers(28, 200)
    y, x = np.mgrid[:side, :side]
    period = rng.integers(3, side // 4)
    noise = rng.random((side, side))
    clouds = gaussian_filter(noise, rng.uniform(1, side / 15))
    tiles = [
        noise,
        (clouds - 0.5) / clouds.std() / 4 + 0.5,
        (x % period + rng.integers(2) * (y % period)) / period,
    ]
    return rng.choice(tiles)


NO_DIGITS = {
    "blank": blank,
    "texture": texture,
    "word": word,
    "tangle": tangle,
    "letter": letter,
}


# --- Measuring.


def make_picture(name, digits, rng):
    """A picture of that kind, and its label: None for no digit."""
    if name in NO_DIGITS:
        return NO_DIGITS[name](rng), None
    drawing, page, _ = (from_mnist, *KINDS[name])[-3:]
    ink, label = drawing(digits, rng)
    return page(ink, rng), label


def judge(model, picture, label):
    """Whether the answer is right, refused, and wrong with 90% or more.

    Without a label: refused or less than 60%, refused, 90% or more.
    """
    if isinstance(picture, np.ndarray):
        picture = to_bytes(picture)
    try:
        answer = predict_picture(model, picture)
    except PictureError:
        return label is None, True, False
    good = answer.confidence < 0.6 if label is None else answer.digit == label
    return good, False, not good and answer.confidence > 0.9


def measure(model, digits, names, count):
    """What `judge` says: a row of shares for each kind of picture."""
    table = {}
    for name in names:
        rng = np.random.default_rng(zlib.crc32(name.encode()))  # for each kind another
        rows = [judge(model, *make_picture(name, digits, rng)) for _ in range(count)]
        table[name] = np.mean(rows, axis=0)
    return pd.DataFrame(table, ["right", "refused", "surely wrong"]).T


@cache
def load_trained():
    """The network that the notebook left."""
    return load_model(PROJECT_ROOT / "model.pth")


# --- The tests.


def test_digits_of_every_kind_are_right(mnist):
    table = measure(load_trained(), mnist[1], KINDS, 16)
    for name, right in table["right"].items():
        least = KINDS[name][-1] - 1.5 / 16  # one or two of so few may be chance
        assert right >= least, f"{name}: {right:.0%} right, {least:.0%} wanted"
    right, refused, wrong = table.mean()
    assert right > 0.945
    assert refused < 0.03
    assert wrong < 0.01


def test_what_is_no_digit_is_refused_or_doubted():
    table = measure(load_trained(), None, NO_DIGITS, 30)
    assert table["surely wrong"]["letter"] < 0.1
    assert table["right"]["blank"] > 0.96
    assert table["right"].mean() > 0.87


def test_pictures_take_milliseconds(mnist):
    """15 or so on two idle cores, and 100 for a photograph of twelve megapixels."""
    ink = mnist[1].images[0].numpy() / 255
    page = on_paper(ink, np.random.default_rng(1))
    large = as_file(np.kron(page, np.ones((30, 30))))
    for picture, most in ((large, 1), (to_bytes(page), 0.15)):
        start = time.process_time()
        assert predict_picture(load_trained(), picture).digit == mnist[1].labels[0]
        assert time.process_time() - start < most  # seconds, on busy cores


STROKE = np.zeros((60, 40), np.uint8)
STROKE[10:50, 18:23] = 255
FOUR = [0.0125] * 4 + [0.7] + [0.0125] * 4 + [0.2]


def test_probabilities_are_the_mean_softmax_of_warped_views():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(), nn.Linear(784, 10))
    pixels = predict_picture(model, STROKE).pixels
    found = find_probabilities(model, pixels)
    assert model.training  # it is left as it was
    generator = torch.Generator().manual_seed(0)
    views = warp_digits(pixels.expand(VIEWS, 28, 28), 0.5, generator)
    odds = model.eval()(TRANSFORM(views)).exp() + math.exp(FLOOR)
    wanted = (odds / odds.sum(dim=1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(found, wanted)


def test_images_go_to_where_the_model_is():
    with pytest.raises(NotImplementedError, match="meta"):  # nothing comes back
        predict_picture(nn.Linear(784, 10, device="meta"), STROKE)


@pytest.mark.parametrize(
    ("answers", "best"),
    [  # the probability of each look's answer, None where no more can be read
        ([0.51, 0.9], 0),  # sure: nobody looks again
        ([0.49, 0.52, 0.9], 1),
        ([0.4, 0.3, 0.45], 2),
        ([0.4, 0.3, None], 0),
        ([None, 0.9], None),
    ],
)
def test_unsure_answer_is_looked_for_in_other_ways(answers, best, monkeypatch):
    def find_readings(picture):
        for number, answer in enumerate(answers):
            if answer is None:
                raise PictureError("nothing")
            yield torch.full((28, 28), number)

    def find_probabilities(model, pixels):
        return torch.tensor([answers[pixels[0, 0]], 0.1])

    monkeypatch.setattr(predict, "find_readings", find_readings)
    monkeypatch.setattr(predict, "find_probabilities", find_probabilities)
    if best is None:
        with pytest.raises(PictureError):
            predict_picture(None, STROKE)
    else:
        assert predict_picture(None, STROKE).pixels[0, 0] == best


def test_prediction_shows_itself():
    model = nn.Linear(784, 10)
    model.register_forward_hook(lambda *_: torch.tensor([FOUR] * VIEWS).log() + 20)
    prediction = predict_picture(model, STROKE)
    assert repr(prediction) == "4 with 70.0% (second guess: 9 with 20.0%)"
    given, seen, bars = prediction.show().axes
    assert given.images[0].get_array().shape == (60, 40, 3)
    np.testing.assert_array_equal(seen.images[0].get_array(), prediction.pixels)
    np.testing.assert_allclose(bars.containers[0].datavalues, prediction.probabilities)
    colours = [bar.get_facecolor() for bar in bars.patches]
    assert colours.count(colours[4]) == 1
    assert bars.get_title().startswith("4 with 70.0%")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with pictures, where the model at hand is sure of a 4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "PROJECT_ROOT", tmp_path)
    weights = MLP(()).state_dict()
    weights["layers.0.weight"].zero_()
    weights["layers.0.bias"] = torch.tensor(FOUR).log() + 20
    torch.save(weights, "model.pth")
    for name, page in (("good", STROKE), ("四", STROKE), ("blank", 0 * STROKE)):
        Image.fromarray(page).save(f"{name}.png")


GOOD = "good.png: 4 with 70.0% (second guess: 9 with 20.0%)\n"


def test_command_answers_and_refuses(files, capsys, monkeypatch):
    assert main(["good.png"]) == 0
    assert capsys.readouterr() == (GOOD, "")
    assert main(["blank.png", "none.png", "good.png"]) == 1
    out, err = capsys.readouterr()
    assert out == GOOD
    blank, missing = err.splitlines()
    assert blank.startswith("blank.png: refused: nothing stands out")
    assert "No such file" in missing
    with pytest.raises(SystemExit, match="2"):
        main(["good.png", "--model", "none.pth"])
    assert "none.pth cannot be read" in capsys.readouterr().err
    monkeypatch.delattr(predict, "predict_picture")  # a bug
    assert main(["good.png", "good.png"]) == 1
    assert capsys.readouterr().err.count("good.png: refused: ") == 2


def test_names_that_the_console_cannot_show_stop_nothing(files, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["四.png"]) == 0
    out.flush()
    assert out.buffer.getvalue().startswith(rb"\u56db.png: 4 with")


if __name__ == "__main__":
    count = int([*sys.argv, 100][1])
    _, test = load_mnist(download=False)
    for names in (KINDS, NO_DIGITS):
        table = measure(load_trained(), test, names, count)
        table.loc["mean"] = table.mean()
        print(table.to_string(float_format="{:.1%}".format))
