"""Captions of the drawn world in GenEval's six tasks, and scenes that show them: what the toy text policy learns from.

A prompt is a line in the form of GenEval's `evaluation_metadata.jsonl`: `tag`, clauses under `include` (class, count,
and where the task asks for it a colour or a position) and `exclude`, `prompt`. Its classes are the world's four
shapes, its colours the world's six, its sentences GenEval's own, so every script that reads the benchmark's prompts
reads these.

Of the 360 prompts of the task `color_attr` every sixth is held out: no policy is trained on it, and the prompts
that are measured are taken from those.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.files import write_bytes
from benchmark.geneval.scoring import RELATIONS, TASKS, relative_position
from toy.world import (
    COLOURS,
    MARGIN,
    SHAPES,
    Scene,
    SceneObject,
    Variety,
    bounding_box,
    jitter_colour,
    random_background,
)

Metadata = Mapping[str, Any]  # one line of GenEval's file

NUMBERS = {2: "two", 3: "three", 4: "four"}  # what the task `counting` asks for
HELD_OUT = 6  # one in so many prompts of `color_attr`

# Less variety than in class pictures in what no caption names: the codes are few, and small objects need them.
_SHADE = {"colour_jitter": 0.015, "grey": (0.35, 0.65), "tint": 0.005, "gradient": 0.02}
VARIETIES = {  # by number of objects, as large as 32 pixels allow
    1: Variety((0.18, 0.26), 0.2, **_SHADE),
    2: Variety((0.15, 0.17), 0.2, **_SHADE),
    3: Variety((0.135, 0.15), 0.2, **_SHADE),
    4: Variety((0.135, 0.15), 0.2, **_SHADE),
}
GAP = 0.05  # between the boxes of two objects: more than a pixel and a half
SLANT = math.tan(math.radians(30))  # of the line between two objects in a relation: clearly left of, not left and above


def all_prompts(task: str) -> list[dict]:
    """Every prompt of a task, in a fixed order: 4, 12, 12, 24, 48 and 360 of GenEval's six in turn.

    Raises:
        ValueError: for another task.
    """
    pairs = list(itertools.permutations(SHAPES, 2))
    if task == "single_object":
        return [_line(task, [_clause(shape)], _noun(shape)) for shape in SHAPES]
    if task == "two_object":
        return [_line(task, [_clause(a), _clause(b)], f"{_noun(a)} and {_noun(b)}") for a, b in pairs]
    if task == "counting":
        return [
            {
                "tag": task,
                "include": [_clause(shape, count)],
                "exclude": [_clause(shape, count + 1)],
                "prompt": f"a photo of {word} {shape}s",
            }
            for shape in SHAPES
            for count, word in NUMBERS.items()
        ]
    if task == "colors":
        return [_line(task, [_clause(s, color=c)], _noun(s, c)) for s in SHAPES for c in COLOURS]
    if task == "position":
        return [
            _line(task, [_clause(b), {**_clause(a), "position": [relation, 0]}], f"{_noun(a)} {relation} {_noun(b)}")
            for a, b in pairs
            for relation in RELATIONS
        ]
    if task == "color_attr":
        return [
            _line(task, [_clause(a, color=c), _clause(b, color=d)], f"{_noun(a, c)} and {_noun(b, d)}")
            for a, b in pairs
            for c, d in itertools.permutations(COLOURS, 2)
        ]
    raise ValueError(f"no task is called {task!r}: choose one of {', '.join(TASKS)}")


def training_prompts(task: str) -> list[dict]:
    """The prompts of a task that a policy may be trained on."""
    prompts = all_prompts(task)
    return [p for index, p in enumerate(prompts) if index % HELD_OUT] if task == "color_attr" else prompts


def measured_prompts(task: str) -> list[dict]:
    """The prompts of a task that a policy is measured on: for `color_attr` those held out, else all."""
    return all_prompts(task)[::HELD_OUT] if task == "color_attr" else all_prompts(task)


def prompt_rows(prompts: Mapping[str, Sequence[dict]], seed: int, rows_per_task: int) -> list[dict]:
    """As many rows for every task: its prompts in random order, pass after pass where there are too few of them.

    Args:
        prompts: by task, e.g. `{task: measured_prompts(task) for task in TASKS}`.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for choices in prompts.values():
        passes = [rng.permutation(len(choices)) for _ in range(-(-rows_per_task // len(choices)))]
        rows += [choices[index] for index in np.concatenate(passes)[:rows_per_task]]
    return rows


def write_prompts(path: Path, rows: Sequence[dict]) -> None:
    """Write prompts as GenEval publishes its own: a JSON object on every line."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def random_prompts(count: int, rng: np.random.Generator) -> list[dict]:
    """What the policy is pretrained on: tasks equally often, and within a task its training prompts."""
    choices = {task: training_prompts(task) for task in TASKS}
    tasks = rng.integers(len(TASKS), size=count)
    return [choices[TASKS[task]][rng.integers(len(choices[TASKS[task]]))] for task in tasks]


def prompt_scenes(prompts: Sequence[Metadata], rng: np.random.Generator) -> list[Scene]:
    """A scene for each prompt that shows what it asks for and nothing else; what it leaves open is drawn at random.

    Objects of one clause share their colour up to its shade. Objects neither touch each other nor the picture's edge.

    Raises:
        ValueError: if a prompt asks for more objects than fit.
    """
    return [_scene(prompt, rng) for prompt in prompts]


def _clause(shape: str, count: int = 1, color: str | None = None) -> dict:
    return {"class": shape, "count": count, **({"color": color} if color else {})}


def _line(task: str, include: list[dict], wording: str) -> dict:
    return {"tag": task, "include": include, "prompt": f"a photo of {wording}"}


def _noun(shape: str, colour: str = "") -> str:
    words = f"{colour} {shape}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _scene(prompt: Metadata, rng: np.random.Generator) -> Scene:
    wanted = []  # (shape, colour) of each object
    for clause in prompt["include"]:
        colour = clause.get("color") or list(COLOURS)[rng.integers(len(COLOURS))]
        wanted += [(clause["class"], colour)] * clause["count"]
    relation = next((clause["position"][0] for clause in prompt["include"] if "position" in clause), None)
    if len(wanted) not in VARIETIES:
        raise ValueError(f"{prompt['prompt']!r} asks for {len(wanted)} objects: a picture holds 1 to {len(VARIETIES)}")
    variety = VARIETIES[len(wanted)]
    while True:  # with these sizes some 5 attempts
        cells = _halves(relation) if relation else _quarters(rng) if len(wanted) > 2 else [_WHOLE] * len(wanted)
        objects = [
            _place(shape, colour, cell, variety, rng) for (shape, colour), cell in zip(wanted, cells, strict=False)
        ]
        boxes = [bounding_box(obj) for obj in objects]
        inside = all(min(box) >= MARGIN - 1e-6 and max(box) <= 1 - MARGIN + 1e-6 for box in boxes)
        apart = all(_apart(a, b) for a, b in itertools.combinations(boxes, 2))
        if inside and apart and (relation is None or _clearly(relation, objects[1], objects[0])):
            order = rng.permutation(len(objects))
            return Scene(tuple(objects[index] for index in order), random_background(rng, variety))


_WHOLE = (MARGIN, MARGIN, 1 - MARGIN, 1 - MARGIN)  # of the picture: left, top, right, bottom


def _halves(relation: str) -> list[tuple[float, float, float, float]]:
    """Where most scenes of "a RELATION b" have b, and where a."""
    low, high = (MARGIN, 0.5 - GAP / 2), (0.5 + GAP / 2, 1 - MARGIN)
    if relation in ("above", "left of"):
        low, high = high, low  # of b, of a
    if relation in ("left of", "right of"):
        return [(low[0], MARGIN, low[1], 1 - MARGIN), (high[0], MARGIN, high[1], 1 - MARGIN)]
    return [(MARGIN, low[0], 1 - MARGIN, low[1]), (MARGIN, high[0], 1 - MARGIN, high[1])]


def _quarters(rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """The four quarters of the picture in random order, so that four objects always fit."""
    halves = (MARGIN, 0.5 - GAP / 2), (0.5 + GAP / 2, 1 - MARGIN)
    cells = [(left, top, right, bottom) for left, right in halves for top, bottom in halves]
    return [cells[index] for index in rng.permutation(4)]


def _place(
    shape: str, colour: str, cell: tuple[float, float, float, float], variety: Variety, rng: np.random.Generator
) -> SceneObject:
    """An object somewhere in a part of the picture; one too large for it sticks out to the right or below."""
    size, angle = rng.uniform(*variety.size), rng.uniform(-variety.tilt, variety.tilt)
    left, top, right, bottom = bounding_box(SceneObject(shape, colour, (0.0, 0.0), size, angle))
    x = rng.uniform(cell[0] - left, max(cell[0] - left, cell[2] - right))
    y = rng.uniform(cell[1] - top, max(cell[1] - top, cell[3] - bottom))
    return SceneObject(shape, colour, (x, y), size, angle, jitter_colour(colour, rng, variety))


def _apart(a: Sequence[float], b: Sequence[float]) -> bool:
    return any(a[low] - b[low + 2] >= GAP or b[low] - a[low + 2] >= GAP for low in (0, 1))


def _clearly(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Whether a is in that relation to b and in no other."""
    dx, dy = (abs(p - q) for p, q in zip(a.centre, b.centre))
    return min(dx, dy) <= SLANT * max(dx, dy) and relative_position(bounding_box(a), bounding_box(b)) == [relation]
