"""How the toy judge reads a prompt, and how far what it sees agrees with it: rules on words, a best matching of blobs.

A prompt names groups of objects ("three red circles", "an orange star") and perhaps how the first lies to the second
("a circle left of a square"). Other words are passed over, so free wording is read, too.
"""

# Legend: W wanted objects, N views

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from toy.judge_eye import View
from toy.world import COLOURS, SHAPES

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
# Words for where the first object lies from the second, as a direction with x to the right and y down.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1)}
# Share of the distance between two objects that lies in the direction: none of the credit up to the first, all from
# the second on (cosines of 60 and 30 degrees).
ALONG = (0.5, 0.87)


@dataclass(frozen=True)
class Wanted:
    """One object of a prompt; None where the prompt leaves it open."""

    shape: str
    colour: str | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: objects in its order, and the direction of the first from the second, if it says one."""

    objects: tuple[Wanted, ...]
    direction: tuple[int, int] | None = None


def read_request(prompt: str) -> Request:
    """Read a prompt; one that names no shape asks for nothing."""
    objects: list[Wanted] = []
    count, colour, direction = 1, None, None
    for word in re.findall(r"[a-z]+", prompt.lower()):
        shape = word if word in SHAPES else word.removesuffix("s")
        if word in NUMBERS:
            count, colour = NUMBERS[word], None
        elif word in COLOURS:
            colour = word
        elif word in DIRECTIONS and objects:
            direction = direction or DIRECTIONS[word]
        elif shape in SHAPES:
            objects += [Wanted(shape, colour)] * count
            count, colour = 1, None
    return Request(tuple(objects), direction if len(objects) > 1 else None)


def agreement(request: Request, views: list[View]) -> float:
    """How well what is seen is what was asked for, in [0, 1].

    The mean over the wanted objects of how well each is the view that it is matched with (0 for a missing one),
    times the smaller over the larger of the two numbers of objects, times half and half again as far as the first
    object lies from the second as it should.
    """
    if not request.objects or not views:
        return 0.0
    values = np.array([[_likeness(wanted, view) for view in views] for wanted in request.objects])  # [W, N]
    rows, columns = linear_sum_assignment(values, maximize=True)
    share = values[rows, columns].sum() / len(request.objects)
    number = min(len(views), len(request.objects)) / max(len(views), len(request.objects))
    placed = 1.0
    if request.direction is not None:
        matched = dict(zip(rows.tolist(), columns.tolist()))
        placed = 0.0
        if 0 in matched and 1 in matched:
            placed = _along(views[matched[0]].centre, views[matched[1]].centre, request.direction)
    return float(share * number * (1 + placed) / 2)


def _likeness(wanted: Wanted, view: View) -> float:
    shape = view.shapes[wanted.shape]
    return shape if wanted.colour is None else (shape + view.colours[wanted.colour]) / 2


def _along(a: tuple[float, float], b: tuple[float, float], direction: tuple[int, int]) -> float:
    dx, dy = a[0] - b[0], a[1] - b[1]
    low, high = ALONG
    share = (dx * direction[0] + dy * direction[1]) / max(math.hypot(dx, dy), 1e-6)
    return float(np.clip((share - low) / (high - low), 0.0, 1.0))
