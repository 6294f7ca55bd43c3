"""How the toy judge looks at a picture: blobs, their hue, the symmetry of their outlines, their edges, their noise.

Cruder than the checker and apart from it: nothing is fitted and no decision is shared, so a reward made from this
leaves the checker a measure that no reward has seen. What the two have in common is the world's own definition of
its colours and shapes.
"""

# Legend: S image side in pixels, F features of an outline

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from toy.world import COLOURS, IMAGE_SIZE, SHAPES, coverage

MIN_CONTRAST = 0.2  # distance in RGB from the background at which something is seen; objects have 0.4 and more
MIN_AREA = 0.02  # of the picture; less is a speck and no object
USUAL_AREA = (0.09, 0.28)  # of the picture, what the world draws and a little more
USUAL_AREA_OF_SEVERAL = (0.045, 0.22)  # of each where there are several
CLASS_SIZE = 0.24  # of the ideal shapes that the object of a class picture is compared with
# Each quality is 1 up to the first number and falls to 0 at the second.
HUE_GAP = (math.radians(5), math.radians(25))  # orange and yellow are 25 degrees apart
PALE = (0.10, 0.45)  # distance in RGB of the blob's mean colour from the palette's nearest
OUTLINE_GAP = (0.10, 0.45)  # distance in features from the nearest ideal shape; a tokenizer's own is about 0.1
EDGE_WIDTH = (1.3, 3.4)  # pixels; the tokenizer makes about 2 of a drawing's 1
NOISE = (0.012, 0.06)  # standard deviation of what a 3 x 3 median removes
PATCHES = (0.04, 0.20)  # standard deviation of the colour within the blob
STRAY = (0.02, 0.30)  # of all that is seen, the share outside the blob, or in holes of it
FEATURE_SCALE = 0.1  # distance in features at which one shape is e^0.5 times less likely than another


@dataclass(frozen=True)
class View:
    """What the judge saw; every quality lies in [0, 1], 1 is best.

    Attributes:
        area: of the blob, as a share of the picture; 0 if nothing was seen, and then every quality is 0.
        colours: how well the blob's hue agrees with each colour of the palette.
        shapes: how likely the outline is each shape; they sum to 1.
        centre: (x, y) of the blob, fractions of the image side.
        regular: the outline is that of one of the shapes, whichever.
        alone: nothing else is in the picture and the blob has no hole.
        sized: the blob is as large as objects are, and the picture's edge does not cut it.
        even: the blob has one colour.
        vivid: that colour is as strong as the palette's.
        sharp: the outline is a step and not a slope.
        clean: neither blob nor background is noisy.
    """

    area: float
    colours: dict[str, float]
    shapes: dict[str, float]
    centre: tuple[float, float] = (0.5, 0.5)
    regular: float = 0.0
    alone: float = 0.0
    sized: float = 0.0
    even: float = 0.0
    vivid: float = 0.0
    sharp: float = 0.0
    clean: float = 0.0

    @property
    def colour(self) -> str | None:
        """The palette's colour that the blob comes nearest to, None where it comes near none."""
        best = max(self.colours, key=self.colours.get)
        return best if self.colours[best] > 0 else None

    @property
    def shape(self) -> str | None:
        """The likeliest shape, None if nothing was seen."""
        return max(self.shapes, key=self.shapes.get) if self.area else None


def look(image: np.ndarray) -> View:
    """Look at a picture of one object, float [3, S, S] in [0, 1]; whatever else is in it is stray."""
    seen, strength = _foreground(image)  # [S, S] each
    blobs = _blobs(seen)
    if not blobs:
        return View(0.0, dict.fromkeys(COLOURS, 0.0), dict.fromkeys(SHAPES, 0.0))
    return _view(image, blobs[0], seen, blobs[0], strength, CLASS_SIZE, USUAL_AREA)


def look_around(image: np.ndarray) -> list[View]:
    """Look at a picture of several objects, float [3, S, S] in [0, 1]: a view of each, the largest first.

    Here another object is no stray, and neither are its edges noise.
    """
    seen, strength = _foreground(image)
    blobs = _blobs(seen)
    together = np.logical_or.reduce(blobs) if blobs else seen  # [S, S]
    return [
        _view(image, blob, seen & ~(together & ~blob), together, strength, _size_of(blob), USUAL_AREA_OF_SEVERAL)
        for blob in blobs
    ]


def _view(
    image: np.ndarray,
    blob: np.ndarray,
    seen: np.ndarray,
    together: np.ndarray,
    strength: np.ndarray,
    usual_size: float,
    usual_area: tuple[float, float],
) -> View:
    """One blob [S, S]; `seen` holds it and what is stray beside it, `together` all whose edges are no noise."""
    rows, columns = np.nonzero(blob)
    inside = ndimage.binary_erosion(blob)
    inside = inside if inside.any() else blob
    colour = image[:, inside].mean(axis=1)  # [3]
    outline = strength * ndimage.binary_dilation(blob)
    features = _features(outline)
    gaps = {name: float(np.hypot.reduce(features - ideal)) for name, ideal in _ideals(usual_size).items()}
    weights = {name: math.exp(-((gap / FEATURE_SCALE) ** 2) / 2) for name, gap in gaps.items()}
    area = float(blob.mean())
    return View(
        area=area,
        colours={name: _fall(_hue_gap(colour, np.array(rgb)), HUE_GAP) for name, rgb in COLOURS.items()},
        shapes={name: weight / max(sum(weights.values()), 1e-30) for name, weight in weights.items()},
        centre=(float(columns.mean() + 0.5) / blob.shape[1], float(rows.mean() + 0.5) / blob.shape[0]),
        regular=_fall(min(gaps.values()), OUTLINE_GAP),
        alone=_fall(_stray(seen, blob), STRAY),
        sized=_plausible_size(area, blob, usual_area),
        even=_fall(float(image[:, inside].std(axis=1).max()), PATCHES),
        vivid=_fall(min(float(np.linalg.norm(colour - rgb)) for rgb in COLOURS.values()), PALE),
        sharp=_fall(_edge_width(outline, blob), EDGE_WIDTH),
        clean=_fall(_noise(image, together), NOISE),
    )


def _fall(value: float, limits: tuple[float, float]) -> float:
    """1 up to the first limit, 0 from the second on, linear between."""
    low, high = limits
    return float(np.clip((high - value) / (high - low), 0.0, 1.0))


def _foreground(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What differs from the rim of the picture: bool [S, S], and by how much of the usual difference, [S, S]."""
    rim = np.concatenate([image[:, :2].reshape(3, -1), image[:, -2:].reshape(3, -1)], axis=1)
    rim = np.concatenate([rim, image[:, :, :2].reshape(3, -1), image[:, :, -2:].reshape(3, -1)], axis=1)
    background = np.median(rim, axis=1)  # [3]
    difference = np.linalg.norm(image - background[:, None, None], axis=0)  # [S, S]
    strong = difference[difference > MIN_CONTRAST]
    contrast = np.median(strong) if strong.size else 1.0
    strength = np.clip(difference / contrast, 0.0, 1.0)
    return strength > 0.5, strength


def _blobs(seen: np.ndarray) -> list[np.ndarray]:
    """The connected parts of seen [S, S] that are no specks, the largest first."""
    parts, count = ndimage.label(seen)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    return [parts == 1 + part for part in np.argsort(-sizes, kind="stable") if sizes[part] >= MIN_AREA * seen.size]


def _size_of(blob: np.ndarray) -> float:
    """Radius of the disc of its area as a share of the side, in steps of 0.02, since `_ideals` are kept."""
    return max(0.08, round(math.sqrt(blob.mean() / math.pi) / 0.02) * 0.02)


def _stray(seen: np.ndarray, blob: np.ndarray) -> float:
    holes = ndimage.binary_fill_holes(blob) & ~blob
    return float(((seen & ~blob).sum() + holes.sum()) / seen.sum())


def _features(strength: np.ndarray) -> np.ndarray:
    """Outline of a soft blob [S, S], whatever its place, size and angle: [F].

    Its spread (mean r^2 in units of area / pi: 1/2 for a disc) and, for n = 2 to 5, how much of it repeats n times
    around its middle: |sum r^3 exp(i n phi)| / sum r^3. Squares repeat 4 times, triangles 3 times, stars 5 times.
    """
    rows, columns = np.indices(strength.shape)
    total = strength.sum()
    x = columns - (strength * columns).sum() / total
    y = rows - (strength * rows).sum() / total
    r, phi = np.hypot(x, y) / math.sqrt(total / math.pi), np.arctan2(y, x)
    weight = strength * r**3
    turns = [abs((weight * np.exp(1j * n * phi)).sum()) / weight.sum() for n in (2, 3, 4, 5)]
    return np.array([(strength * r**2).sum() / total, *turns])


@functools.cache
def _ideals(size: float) -> dict[str, np.ndarray]:
    """Features of the world's shapes, drawn in the middle at that size."""
    drawn = {name: coverage(name, np.array([[0.5, 0.5]]), [size], [0.1], IMAGE_SIZE)[0] for name in SHAPES}
    return {name: _features(strength) for name, strength in drawn.items()}


def _hue_gap(colour: np.ndarray, other: np.ndarray) -> float:
    """Angle between two RGB colours seen along the grey axis, in [0, pi]; pi if the first is grey."""
    if np.ptp(colour) < MIN_CONTRAST / 2:
        return math.pi
    gap = abs(_hue(colour) - _hue(other)) % math.tau
    return min(gap, math.tau - gap)


def _hue(colour: np.ndarray) -> float:
    red, green, blue = (float(channel) for channel in colour)
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _plausible_size(area: float, blob: np.ndarray, usual_area: tuple[float, float]) -> float:
    smallest, largest = usual_area
    fits = min(1.0, area / smallest, largest / area)
    rim = np.concatenate([blob[0], blob[-1], blob[:, 0], blob[:, -1]])
    return fits * (1.0 - min(1.0, 4.0 * float(rim.mean())))


def _edge_width(outline: np.ndarray, blob: np.ndarray) -> float:
    """Mean width of the slope at the outline, in pixels.

    The integral of 6 a (1 - a) across a straight ramp from 0 to 1 is the ramp's width; the outline's length is
    pi / 4 times its steps along rows and columns (Crofton).
    """
    steps = (blob[1:] != blob[:-1]).sum() + (blob[:, 1:] != blob[:, :-1]).sum()
    return float((6 * outline * (1 - outline)).sum() / (math.pi / 4 * max(steps, 1)))


def _noise(image: np.ndarray, blob: np.ndarray) -> float:
    """Standard deviation of what a 3 x 3 median removes, away from the outlines."""
    steps = max(1, round(2 * blob.shape[0] / IMAGE_SIZE))
    near = ndimage.binary_dilation(blob, iterations=steps) & ~ndimage.binary_erosion(blob, iterations=steps)
    if near.all():
        return math.inf
    rough = image - ndimage.median_filter(image, size=(1, 3, 3))
    return float(rough[:, ~near].std())
