"""The toy judge on pictures of several objects: how it reads a prompt, what it sees, what it answers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.geneval.scoring import TASKS
from reward_utils.images import png_bytes
from toy import captions, judge_eye, judge_reading, judge_server, world
from toy.judge_reading import Request, Wanted, agreement, read_request

GREY = world.Background((0.5, 0.5, 0.5))


def draw(*objects: tuple[str, str, tuple[float, float]]) -> np.ndarray:
    """A picture [3, 32, 32] of (shape, colour, centre) at a usual size."""
    return world.render([world.Scene(tuple(world.SceneObject(*obj, 0.15) for obj in objects), GREY)])[0]


def label(prompt: str, image: np.ndarray) -> float:
    (png,) = png_bytes(torch.from_numpy(image[None]).float())
    return judge_server.judge("label", prompt, png)["score"]


# --- reading ---


@pytest.mark.parametrize(
    ("prompt", "objects", "direction"),
    [
        ("a photo of a star", [("star", None)], None),
        ("a photo of an orange square", [("square", "orange")], None),
        ("a photo of three triangles", [("triangle", None)] * 3, None),
        ("a photo of a red circle and a blue star", [("circle", "red"), ("star", "blue")], None),
        ("a photo of a star left of a circle", [("star", None), ("circle", None)], (-1, 0)),
        ("two green stars, above one square!", [("star", "green")] * 2 + [("square", None)], (0, -1)),
        ("a red bus", [], None),
        ("the left circle", [("circle", None)], None),
    ],
)
def test_prompts_are_read_by_rule(prompt, objects, direction):
    assert read_request(prompt) == Request(tuple(Wanted(*obj) for obj in objects), direction)


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_is_read_as_its_metadata_says(task):
    away = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for prompt in captions.all_prompts(task):
        clauses = prompt["include"]
        request = read_request(prompt["prompt"])
        wanted = [(c["class"], c.get("color")) for c in clauses for _ in range(c["count"])]
        assert sorted(map(str, wanted)) == sorted(str((obj.shape, obj.colour)) for obj in request.objects)
        if task == "position":
            assert request.objects[0].shape == clauses[1]["class"]  # the one that lies somewhere is named first
            assert request.direction == away[clauses[1]["position"][0]]


# --- seeing ---


def test_the_eye_sees_each_object_with_its_place():
    image = draw(("circle", "red", (0.25, 0.3)), ("square", "blue", (0.7, 0.72)))
    views = judge_eye.look_around(image)
    assert {(view.shape, view.colour) for view in views} == {("circle", "red"), ("square", "blue")}
    for view in views:
        assert view.centre == pytest.approx((0.25, 0.3) if view.shape == "circle" else (0.7, 0.72), abs=0.01)
        # neither the other object nor its edge is held against it
        assert min(view.alone, view.clean, view.sharp, view.even, view.vivid, view.regular, view.sized) > 0.9


def test_one_object_looks_the_same_alone_and_in_a_class_picture():
    image = world.draw_classes([9], np.random.default_rng(1))[0]
    (around,), alone = judge_eye.look_around(image), judge_eye.look(image)
    assert (around.shape, around.colour, around.area) == (alone.shape, alone.colour, alone.area)


# --- agreeing ---


def view(shape: str, colour: str, centre: tuple[float, float]) -> judge_eye.View:
    """A sure view."""
    colours = dict.fromkeys(world.COLOURS, 0.0) | {colour: 1.0}
    return judge_eye.View(0.1, colours, dict.fromkeys(world.SHAPES, 0.0) | {shape: 1.0}, centre)


LEFT, RIGHT = (0.2, 0.5), (0.8, 0.5)


@pytest.mark.parametrize(
    ("prompt", "views", "expected"),
    [
        ("a red circle and a blue star", [view("circle", "red", LEFT), view("star", "blue", RIGHT)], 1),
        # colours swapped: each object is half right
        ("a red circle and a blue star", [view("circle", "blue", LEFT), view("star", "red", RIGHT)], 1 / 2),
        # one of two is there, and 1 object instead of 2: 1/2 * 1/2
        ("a red circle and a blue star", [view("circle", "red", LEFT)], 1 / 4),
        # all are there and one more: 2/3
        ("two circles", [view("circle", "red", (x, 0.5)) for x in (0.2, 0.5, 0.8)], 2 / 3),
        # 3 of 4: 3/4 * 3/4
        ("four circles", [view("circle", "red", (x, 0.5)) for x in (0.2, 0.5, 0.8)], 9 / 16),
        ("a circle left of a star", [view("star", "red", RIGHT), view("circle", "red", LEFT)], 1),
        # right objects in the wrong order keep half
        ("a circle left of a star", [view("star", "red", LEFT), view("circle", "red", RIGHT)], 1 / 2),
        ("a circle above a star", [view("circle", "red", (0.5, 0.2)), view("star", "red", (0.5, 0.8))], 1),
        ("a circle and a star", [], 0),
        ("a bus", [view("circle", "red", LEFT)], 0),
    ],
)
def test_agreement_by_hand(prompt, views, expected):
    assert agreement(read_request(prompt), views) == pytest.approx(expected)


def test_credit_for_a_direction_rises_between_60_and_30_degrees():
    request = read_request("a circle right of a star")
    values = []
    for degrees in (80, 50, 40, 10):
        turn = np.radians(degrees)
        there = (0.5 + 0.4 * np.cos(turn), 0.5 + 0.4 * np.sin(turn))
        values.append(agreement(request, [view("circle", "red", there), view("star", "red", (0.5, 0.5))]))
    assert values[0] == pytest.approx(0.5) and values[-1] == pytest.approx(1.0)
    assert 0.5 < values[1] < values[2] < 1.0


# --- answering ---


@pytest.mark.parametrize("task", TASKS)
def test_a_right_picture_is_preferred_to_one_of_another_prompt(task):
    rng = np.random.default_rng(4)
    prompts = captions.prompt_rows({task: captions.all_prompts(task)}, 0, 24)
    images = world.render(captions.prompt_scenes(prompts, rng))
    right = [label(prompt["prompt"], image) for prompt, image in zip(prompts, images)]
    assert min(right) > 4.8  # of 5
    requests = [read_request(prompt["prompt"]) for prompt in prompts]
    for index, image in enumerate(np.roll(images, 1, axis=0)):
        other = requests[index - 1]
        same = sorted(map(str, requests[index].objects)) == sorted(map(str, other.objects))
        if not same or requests[index].direction != other.direction:
            assert label(prompts[index]["prompt"], image) < right[index] - 0.2


def test_a_plain_background_gets_nothing():
    assert label("a photo of two stars", np.full((3, 32, 32), 0.4)) == 0.0


def test_the_two_questions_without_a_prompt_still_expect_one_object():
    two = draw(("circle", "red", LEFT), ("square", "blue", RIGHT))
    (png,) = png_bytes(torch.from_numpy(two[None]).float())
    assert judge_server.judge("weird", "", png) == {"score": 0}


def test_the_reading_never_asks_the_checker():
    text = Path(judge_reading.__file__).read_text()
    assert not re.search(r"^\s*(from|import) .*(checker|geneval)", text, re.MULTILINE)
