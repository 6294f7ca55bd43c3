"""Text rendering: the share formula worked by hand, and the way from a picture to its lines."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_judges import pictures, save_ocr

from reward_utils.arguments import ScorerArguments
from reward_utils.images import to_bytes
from reward_utils.ocr import _cut_line, edits_to_best_stretch, in_reading_order, requested_texts, share_read_back
from reward_utils.registry import build_scorers


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = save_ocr(tmp_path_factory.mktemp("ocr"))
    arguments = ScorerArguments(ocr_detector=str(folder / "detector"), ocr_recognizer=str(folder / "recognizer"))
    return build_scorers(["ocr"], arguments)["ocr"]


@pytest.mark.parametrize(
    ("requested", "read", "share"),
    [
        (["HELLO"], "hello", 1.0),
        (["HELLO"], "", 0.0),
        (["HELLO"], "HELO WORLD", 1 - 1 / 5),  # one letter to insert
        (["HELLO"], "xxHEXLOxx", 1 - 1 / 5),  # one to replace, the rest costs nothing
        (["HELLO"], "HEL LO", 1.0),  # white space does not count
        (["Hello, World!"], "hello\nworld", 1.0),
        (["CAT", "DOG"], "CAT", 3 / 6),
        (["ab"], "ba", 1 - 1 / 2),  # "b" or "a" is a stretch
        (["Straße ①"], "STRASSE 1", 1.0),  # case folding and Unicode forms
        (["abc"], "xyz", 0.0),
    ],
)
def test_share_read_back(requested, read, share):
    assert share_read_back(requested, read) == pytest.approx(share)


def test_best_stretch_is_found_by_trying_all():
    def levenshtein(a, b):
        table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = min(table[i, j] + (x != y), table[i, j + 1] + 1, table[i + 1, j] + 1)
        return table[len(a), len(b)]

    generator = np.random.default_rng(0)
    for _ in range(30):
        text, read = ("".join(generator.choice(list("abc"), size=generator.integers(1, 7))) for _ in range(2))
        stretches = {read[i:j] for i in range(len(read) + 1) for j in range(i, len(read) + 1)}
        assert edits_to_best_stretch(text, read) == min(levenshtein(text, stretch) for stretch in stretches)


def test_requested_text_is_in_quotes_or_in_the_metadata():
    assert requested_texts('a sign "OPEN" and “24 h”', None, 0) == ["OPEN", "24 h"]
    assert requested_texts("a sign", {"text": "OPEN"}, 0) == ["OPEN"]
    for prompt in ("a sign without text", 'a sign "!!"'):
        with pytest.raises(ValueError, match=r"ocr: prompt 3 .*requests no text: put it in double quotes"):
            requested_texts(prompt, None, 3)


def test_lines_are_read_from_the_top_down_and_from_left_to_right():
    def box(left, top, right, bottom):
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])

    second, first, below = box(50, 12, 90, 30), box(5, 10, 45, 28), box(0, 40, 90, 60)
    ordered = in_reading_order(np.stack([below, second, first]))
    assert [line.tolist() for line in ordered] == [line.tolist() for line in (first, second, below)]
    assert in_reading_order(np.zeros((0, 4, 2))) == []


def test_a_line_is_cut_out_straightened_and_laid_flat():
    picture = np.zeros((60, 80, 3), dtype=np.uint8)
    picture[20:30, 10:50] = 200
    flat = np.array([[10, 20], [49, 20], [49, 29], [10, 29]])
    line = _cut_line(picture, flat)
    assert line.shape == (9, 39, 3)
    assert line.min() == 200
    upright = np.array([[10, 0], [19, 0], [19, 39], [10, 39]])  # four times higher than wide
    assert _cut_line(picture, upright).shape == (9, 39, 3)


def test_boxes_come_from_the_detectors_map(judge, monkeypatch):
    judge.load()
    heat = torch.zeros(2, 1, 64, 96)
    heat[0, 0, 20:36, 16:80] = 0.9
    answer = SimpleNamespace(last_hidden_state=heat)
    monkeypatch.setattr(judge.network.module["detector"], "forward", lambda pixel_values: answer)
    found = judge.network._find(pictures(2, 64, 96))
    assert [boxes.shape for boxes in found] == [(1, 4, 2), (0, 4, 2)]
    left, top = found[0][0].min(axis=0)
    right, bottom = found[0][0].max(axis=0)
    assert 0 <= left <= 16 and 80 <= right <= 96  # grown around the text
    assert 5 <= top <= 20 and 36 <= bottom <= 51


def test_a_score_depends_on_its_own_picture_alone(judge, monkeypatch):
    boxes = {
        40: np.array([[[0, 0], [39, 0], [39, 9], [0, 9]], [[0, 20], [29, 20], [29, 30], [0, 30]]]),
        0: np.zeros((0, 4, 2), dtype=np.int16),
    }
    monkeypatch.setattr(
        judge.network, "_find", lambda images: [boxes[40] if image.max() > 0.5 else boxes[0] for image in images]
    )
    images = pictures(4, 48, 64)
    images[2] *= 0.4  # nothing is found in it
    read = judge.network.read(images)
    assert [len(lines) for lines in read] == [2, 2, 0, 2]
    assert any(any(lines) for lines in read)
    for index in range(4):
        assert judge.network.read(images[index : index + 1]) == [read[index]]
    prompts = [f'"{"".join(lines) or "x"}"' for lines in read]  # ask for exactly what is read
    expected = [float(bool(lines) and any(c.isalnum() for c in "".join(lines))) for lines in read]
    assert judge(images, [prompt if any(c.isalnum() for c in prompt) else '"x"' for prompt in prompts]) == expected


def test_the_real_parts_run_together(judge):
    images = pictures(2, 64)
    assert to_bytes(images).shape == (2, 3, 64, 64)
    scores = judge(images, ['a sign "OPEN"', 'a sign "24"'])
    assert all(0 <= score <= 1 for score in scores)
