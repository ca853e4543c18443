"""Labeled images of the letters of the fonts that matplotlib ships; no other files are read."""

import os
from collections.abc import Iterator
from string import ascii_letters
from typing import Any

import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.path import Path
from matplotlib.textpath import TextToPath

from nerve.data.batches import random_bits
from nerve.data.image_sets import ImageSet, LabeledImages

TRAIN_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("DejaVuSerif-BoldItalic", "cmr10", "cmb10", "cmss10", "cmmi10"),
)
TEST_FONTS = ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta", "cmtt10")
"""Fonts of other families than the training fonts, so that the test requires generalization."""

SIZE = 32  # pixels per side
_EM = 22.0  # pixels; a capital letter takes two thirds of it
_MAX_SHIFT = 5.0  # pixels in each direction
_MAX_TURN = np.pi / 5  # 36° in each direction: an n does not yet look like a u
_VARIANTS = {"train": 12, "test": 8}  # images per letter and font
_LINES = 4  # scan lines per pixel
_CURVE_POINTS = np.linspace(0, 1, 9)[1:]


def glyphs() -> ImageSet:
    """52 letters (A to Z, a to z) in 21 fonts at 32 × 32 pixels, shifted and rotated.

    9,984 training images in 16 fonts of DejaVu and Computer Modern; 2,080 test images in 5 other
    fonts. Outlines are drawn here, in double precision, so that the images do not depend on the
    machine, on matplotlib's rendering, or on a seed.
    """
    return ImageSet("glyphs", n_classes=len(ascii_letters), flips=False, read=_read_glyphs)


def _read_glyphs() -> tuple[LabeledImages, LabeledImages]:
    return (
        _split(TRAIN_FONTS, _VARIANTS["train"], key=0),
        _split(TEST_FONTS, _VARIANTS["test"], key=1),
    )


def _split(fonts: tuple[str, ...], n_variants: int, key: int) -> LabeledImages:
    images, labels = [], []
    for number, font in enumerate(fonts):
        for label, letter in enumerate(ascii_letters):
            bits = random_bits(3 * n_variants, key, number, label).reshape(3, n_variants)
            unit = (bits >> np.uint64(11)) / 2.0**52 - 1  # -1 to 1
            images.append(_drawn(_outline(font, letter), unit))
            labels += n_variants * [label]
    return LabeledImages(np.concatenate(images)[:, None], np.array(labels, dtype=np.int64))


def _outline(font: str, letter: str) -> np.ndarray:
    """The edges of a letter in pixels, centered at 0 with y pointing down, float64
    `[n_edges, 2, 2]`."""
    file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    n_units = FT2Font(file).units_per_EM
    drawing = TextToPath()
    drawing.FONT_SCALE = n_units  # the font's own grid; on others, FreeType versions differ
    points, codes = drawing.get_text_path(FontProperties(fname=file), letter)
    contours = _contours(Path(points, codes))
    edges = np.array([edge for contour in contours for edge in _edges(contour)])
    edges *= _EM / n_units
    lowest, highest = edges.min(axis=(0, 1)), edges.max(axis=(0, 1))
    return (edges - (lowest + highest) / 2) * np.array([1, -1])


def _contours(path: Path) -> Iterator[np.ndarray]:
    """The closed curves of a path as polygons, float64 `[n_points, 2]`."""
    points: list[np.ndarray] = []
    curves: Any = path.iter_bezier()  # matplotlib annotates a single item instead of an iterator
    for curve, code in curves:
        if code == path.MOVETO:
            if points:
                yield np.concatenate(points)
            points = [curve.control_points]
        elif len(curve.control_points) == 2:
            points.append(curve.control_points[1:])
        else:
            points.append(curve(_CURVE_POINTS))
    yield np.concatenate(points)


def _edges(contour: np.ndarray) -> np.ndarray:
    return np.stack([contour, np.roll(contour, -1, axis=0)], axis=1)


def _drawn(edges: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """A letter rotated and shifted, once for each column of `unit`, uint8 `[n, SIZE, SIZE]`.

    The value of a pixel is the share of it that the letter covers, computed exactly along `_LINES`
    scan lines per pixel. A downward edge enters the letter to its right, and an upward edge leaves
    it; the running sum along a line gives the covered share.
    """
    turn, across, down = unit * np.array([_MAX_TURN, _MAX_SHIFT, _MAX_SHIFT])[:, None]
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    moved = np.einsum("epx,xyn->nepy", edges, rotation) + SIZE / 2
    moved += np.stack([across, down], axis=-1)[:, None, None]
    (x0, y0), (x1, y1) = (moved[:, :, end].transpose(2, 0, 1)[..., None] for end in (0, 1))
    lines = (np.arange(SIZE * _LINES) + 0.5) / _LINES
    image, edge, line = np.nonzero((y0 <= lines) != (y1 <= lines))
    x0, y0, x1, y1 = (value[image, edge, 0] for value in (x0, y0, x1, y1))
    x = np.clip(x0 + (lines[line] - y0) * (x1 - x0) / (y1 - y0), 0, SIZE)
    pixel = x.astype(np.int64)
    sign = np.where(y1 > y0, 1.0, -1.0)
    row = (image * SIZE * _LINES + line) * (SIZE + 2) + pixel
    size = len(moved) * SIZE * _LINES * (SIZE + 2)
    change = np.bincount(row, sign * (pixel + 1 - x), size)
    change += np.bincount(row + 1, sign * (x - pixel), size)
    inside = np.abs(change.reshape(len(moved), SIZE, _LINES, SIZE + 2).cumsum(axis=-1))
    covered = np.minimum(inside[..., :SIZE], 1).mean(axis=2)
    return np.rint(255 * covered).astype(np.uint8)
