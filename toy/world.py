"""A drawn world of coloured shapes: scenes from a seed, anti-aliased pictures from scenes.

A scene is a background and a list of objects (shape, colour, centre, size, angle). A class-to-image picture is a scene
with one object; a text-to-image picture is a scene with several. Everything is a pure function of a
`numpy.random.Generator`, so a seed fixes every pixel.

Units: lengths are fractions of the image side, x runs right and y runs down, angles are radians.
"""

# Legend: B scenes, S image side in pixels, N points

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 32

# The six chromatic colours of GenEval's list that keep their hue apart after a coarse tokenizer.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.96, 0.90, 0.12),
    "green": (0.10, 0.68, 0.22),
    "blue": (0.12, 0.30, 0.90),
    "purple": (0.60, 0.16, 0.76),
}
MARGIN = 0.03  # between an object's circumscribed circle and the picture's edge


@dataclass(frozen=True)
class Variety:
    """How much the pictures of one class differ.

    Attributes:
        size: smallest and largest size of the object.
        tilt: largest turn of the object from upright, in radians; pi is any.
        colour_jitter: half width of the uniform noise on each channel of the object's colour.
        grey: darkest and lightest background.
        tint: half width of the uniform noise on each channel of the background.
        gradient: largest change of the background from one edge of the picture to the other.
    """

    size: tuple[float, float]
    tilt: float
    colour_jitter: float
    grey: tuple[float, float]
    tint: float
    gradient: float


# Class pictures, and a wider range on which the tokenizer learns first.
CLASS_VARIETY = Variety((0.20, 0.28), 0.35, colour_jitter=0.015, grey=(0.1, 0.9), tint=0.01, gradient=0.04)
WIDE_VARIETY = Variety((0.165, 0.25), math.pi, colour_jitter=0.04, grey=(0.1, 0.9), tint=0.04, gradient=0.10)


@dataclass(frozen=True)
class SceneObject:
    """One flat shape.

    `size` is the radius of the disc with the same area, whatever the shape: area = pi size^2. `rgb` is the exact
    colour drawn, in [0, 1]; None draws the palette's.
    """

    shape: str
    colour: str
    centre: tuple[float, float]
    size: float
    angle: float = 0.0
    rgb: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Background:
    """A nearly grey plane: colour at (x, y) is rgb + gradient * ((x - 0.5) cos(angle) + (y - 0.5) sin(angle))."""

    rgb: tuple[float, float, float]
    gradient: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """What a picture shows; later objects lie on top of earlier ones."""

    objects: tuple[SceneObject, ...]
    background: Background


def render(scenes: Sequence[Scene], image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw scenes with anti-aliased edges: a pixel's coverage is 1/2 minus its signed distance in pixels, clipped.

    Args:
        scenes: B scenes, with any number of objects each.
        image_size: side S in pixels.
    Returns:
        float32 [B, 3, S, S] in [0, 1].
    Raises:
        ValueError: if an object names an unknown shape or colour.
    """
    xs, ys = pixel_grid(image_size)  # [S, S] each
    images = np.stack([_paint_background(scene.background, xs, ys) for scene in scenes])  # [B, 3, S, S]
    for layer in range(max((len(scene.objects) for scene in scenes), default=0)):
        by_shape: dict[str, list[int]] = {}
        for index, scene in enumerate(scenes):
            if layer < len(scene.objects):
                by_shape.setdefault(scene.objects[layer].shape, []).append(index)
        for shape, indices in by_shape.items():
            objects = [scenes[index].objects[layer] for index in indices]
            alpha = coverage(
                shape,
                np.array([o.centre for o in objects]),
                np.array([o.size for o in objects]),
                np.array([o.angle for o in objects]),
                image_size,
            )[:, None]  # [n, 1, S, S]
            rgb = np.array([_object_rgb(o) for o in objects], np.float32)[:, :, None, None]  # [n, 3, 1, 1]
            images[indices] += alpha * (rgb - images[indices])
    return np.clip(images, 0.0, 1.0)


def coverage(
    shape: str,
    centres: np.ndarray,
    sizes: np.ndarray,
    angles: np.ndarray,
    image_size: int,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> np.ndarray:
    """Share of each pixel that lies inside a shape, float32 [n, S, S], or the rows and columns of `window` alone.

    Args:
        shape: a key of SHAPES.
        centres: [n, 2], (x, y).
        sizes: [n], radius of the disc with the same area.
        angles: [n].
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    xs, ys = (axis[window] for axis in pixel_grid(image_size))
    sizes = np.asarray(sizes, np.float32)[:, None, None]
    cos, sin = np.cos(angles, dtype=np.float32)[:, None, None], np.sin(angles, dtype=np.float32)[:, None, None]
    centres = np.asarray(centres, np.float32)
    dx = (xs - centres[:, 0, None, None]) / sizes  # [n, S, S], in units of the size
    dy = (ys - centres[:, 1, None, None]) / sizes
    distance = SHAPES[shape].distance(dx * cos + dy * sin, dy * cos - dx * sin) * sizes * image_size  # pixels
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def bounding_box(obj: SceneObject) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an object's outline, fractions of the image side."""
    x, y = obj.centre
    cos, sin = math.cos(obj.angle) * obj.size, math.sin(obj.angle) * obj.size
    corners = SHAPES[obj.shape].corners
    if not corners:
        return x - obj.size, y - obj.size, x + obj.size, y + obj.size
    xs = [x + u * cos - v * sin for u, v in corners]
    ys = [y + v * cos + u * sin for u, v in corners]
    return min(xs), min(ys), max(xs), max(ys)


def pixel_grid(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel's centre, float32 [S, S] each, in (0, 1)."""
    middle = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    return np.broadcast_to(middle[None, :], (image_size,) * 2), np.broadcast_to(middle[:, None], (image_size,) * 2)


@dataclass(frozen=True)
class Shape:
    """Geometry of a shape of area pi.

    Attributes:
        distance: (x [N], y [N]) -> signed distance [N] to the outline, negative inside.
        reach: radius of the circumscribed circle around the centroid, which is the origin.
        symmetry: number of rotations that leave the shape as it is; 0 for a circle.
        corners: [(x, y), ...] of a polygon; none for a circle.
    """

    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    reach: float
    symmetry: int
    corners: tuple[tuple[float, float], ...] = ()


def _circle_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _polygon(corners: Sequence[tuple[float, float]], symmetry: int) -> Shape:
    """A polygon [(x, y), ...] with its centroid at the origin, scaled to area pi."""
    points = np.array(corners, np.float64)
    following = np.roll(points, -1, axis=0)
    area = abs((points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0]).sum()) / 2
    points = (points * math.sqrt(math.pi / area)).astype(np.float32)
    following = np.roll(points, -1, axis=0)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest = np.full(x.shape, np.inf, np.float32)
        inside = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(points, following):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2, out=nearest)
            if ay != by:  # even-odd rule: does a ray to the right cross this edge?
                inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
        return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)

    return Shape(distance, float(np.hypot(*points.T).max()), symmetry, tuple(map(tuple, points.tolist())))


def _star_corners(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star, tip up; `inner` is the notch radius over the tip radius (1 would be a regular polygon)."""
    radii = [1.0, inner] * points
    turns = [math.pi * k / points - math.pi / 2 for k in range(2 * points)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns)]


SHAPES: dict[str, Shape] = {
    "circle": Shape(_circle_distance, 1.0, 0),
    "square": _polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)], 4),
    "triangle": _polygon([(math.sin(k * math.tau / 3), -math.cos(k * math.tau / 3)) for k in range(3)], 3),
    "star": _polygon(_star_corners(5, 0.45), 5),
}

# Class index -> name; shapes vary slowest: 0 is "red circle", 23 is "purple star".
CLASSES: tuple[tuple[str, str], ...] = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
CLASS_NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for shape, colour in CLASSES)


def class_index(shape: str, colour: str) -> int:
    """Class of a shape and colour, in [0, 24)."""
    return CLASSES.index((shape, colour))


def class_scenes(
    labels: Sequence[int] | np.ndarray, rng: np.random.Generator, variety: Variety = CLASS_VARIETY
) -> list[Scene]:
    """One scene with one object for each label, everything else varied.

    Args:
        labels: [B], in [0, 24).
    """
    scenes = []
    for label in labels:
        shape, colour = CLASSES[int(label)]
        size = rng.uniform(*variety.size)
        room = size * SHAPES[shape].reach + MARGIN
        obj = SceneObject(
            shape=shape,
            colour=colour,
            centre=tuple(rng.uniform(room, 1.0 - room, 2)),
            size=size,
            angle=rng.uniform(-variety.tilt, variety.tilt),
            rgb=jitter_colour(colour, rng, variety),
        )
        scenes.append(Scene((obj,), random_background(rng, variety)))
    return scenes


def draw_classes(
    labels: Sequence[int] | np.ndarray,
    rng: np.random.Generator,
    variety: Variety = CLASS_VARIETY,
    image_size: int = IMAGE_SIZE,
) -> np.ndarray:
    """Pictures of classes: labels [B] -> float32 [B, 3, image_size, image_size] in [0, 1]."""
    return render(class_scenes(labels, rng, variety), image_size)


def draw_random_classes(
    count: int, rng: np.random.Generator, variety: Variety = CLASS_VARIETY, image_size: int = IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of uniformly drawn classes: images as `draw_classes` [count, 3, ...], labels int64 [count]."""
    labels = rng.integers(0, len(CLASSES), count)
    return draw_classes(labels, rng, variety, image_size), labels


def random_background(rng: np.random.Generator, variety: Variety = CLASS_VARIETY) -> Background:
    """A grey of any lightness with a slight tint and a slight gradient."""
    rgb = rng.uniform(*variety.grey) + rng.uniform(-variety.tint, variety.tint, 3)
    return Background(tuple(rgb), rng.uniform(0.0, variety.gradient), rng.uniform(0.0, math.tau))


def jitter_colour(
    colour: str, rng: np.random.Generator, variety: Variety = CLASS_VARIETY
) -> tuple[float, float, float]:
    """A shade of a palette colour, in [0, 1]."""
    jitter = rng.uniform(-variety.colour_jitter, variety.colour_jitter, 3)
    return tuple(np.clip(_palette(colour) + jitter, 0.0, 1.0))


def _paint_background(background: Background, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    slope = background.gradient * ((xs - 0.5) * math.cos(background.angle) + (ys - 0.5) * math.sin(background.angle))
    return np.array(background.rgb, np.float32)[:, None, None] + slope.astype(np.float32)[None]  # [3, S, S]


def _object_rgb(obj: SceneObject) -> np.ndarray:
    return np.array(obj.rgb if obj.rgb is not None else _palette(obj.colour), np.float32)


def _palette(colour: str) -> np.ndarray:
    if colour not in COLOURS:
        raise ValueError(f"unknown colour {colour!r}: choose one of {', '.join(COLOURS)}")
    return np.array(COLOURS[colour])
