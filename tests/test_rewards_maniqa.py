"""MANIQA on pyiqa's network, against pyiqa's own forward pass."""

from dataclasses import replace

import pytest
import torch
from tiny_judges import pictures, pyiqa_maniqa, save_maniqa, shrink_maniqa

from reward_utils.arguments import ScorerArguments
from reward_utils.images import to_bytes
from reward_utils.maniqa import CROP, corner_positions, grid_positions
from reward_utils.registry import build_scorers


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink_maniqa(monkeypatch)
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, small):
    path = save_maniqa(tmp_path_factory.mktemp("maniqa") / "ckpt.pt")
    return ScorerArguments(maniqa_weights=str(path))


@pytest.fixture(scope="module")
def judge(arguments):
    return build_scorers(["maniqa"], arguments)["maniqa"]


@pytest.fixture(scope="module")
def official(arguments):
    module = pyiqa_maniqa()
    module.load_state_dict(torch.load(arguments.maniqa_weights, weights_only=True))
    return module


@pytest.mark.parametrize(("height", "width"), [(256, 256), (224, 224), (230, 300), (64, 80)])
def test_grid_score_is_pyiqas(judge, official, height, width):
    images = pictures(2, height, width)
    with torch.no_grad():
        expected = official(to_bytes(images).float() / 255).squeeze(1)
    assert (expected[0] - expected[1]).abs() > 1e-2 * expected[0]
    assert judge(images, ["", ""]) == pytest.approx(expected.tolist(), rel=1e-5)


def test_grid_positions_at_256_and_384_pixels():
    # measured with pyiqa 0.1.16: rows 0 8 16 24 and columns 0 8 16 24 32; at 384 in steps of 40
    assert grid_positions(256, 256, 20) == [(8 * row, 8 * column) for row in range(4) for column in range(5)]
    assert grid_positions(384, 384, 20)[-1] == (120, 160)
    assert corner_positions(256, 300) == [(16, 38), (0, 0), (0, 76), (32, 0), (32, 76)]


def test_random_crops_are_the_official_mean_and_new_on_every_call(arguments, judge, official, monkeypatch):
    noisy = build_scorers(["maniqa"], replace(arguments, maniqa_crop_rule="random", maniqa_num_crops=3))["maniqa"]
    drawn = []
    positions = noisy._positions
    monkeypatch.setattr(noisy, "_positions", lambda *sides: drawn.append(positions(*sides)) or drawn[-1])
    images = pictures(1, 256)
    first = noisy(images, [""])
    pixels = to_bytes(images).float() / 255
    official.test_sample = 1
    crop_scores = []
    for top, left in drawn[0]:
        assert 0 <= min(top, left) <= max(top, left) <= 256 - CROP - 1
        crop = torch.zeros(1, 3, CROP + 1, CROP + 1)  # one pixel more, or pyiqa would enlarge it
        crop[:, :, :CROP, :CROP] = pixels[:, :, top : top + CROP, left : left + CROP]
        with torch.no_grad():
            crop_scores.append(official(crop).item())
    official.test_sample = 20
    assert first == pytest.approx([sum(crop_scores) / 3], rel=1e-4)
    state = torch.random.get_rng_state()
    assert noisy(images.clone(), [""]) != first
    assert torch.equal(torch.random.get_rng_state(), state)  # the policy's random numbers are untouched


def test_a_score_depends_on_its_own_picture_alone(judge, arguments):
    images = pictures(3, 240)
    batched = judge(images, [""] * 3)
    assert [judge(images[i : i + 1].clone(), [""])[0] for i in range(3)] == pytest.approx(batched, abs=1e-4)
    assert judge(images[[2, 0, 1]], [""] * 3) == pytest.approx([batched[i] for i in (2, 0, 1)], abs=1e-4)
    assert judge(images.clone(), [""] * 3) == batched
    in_small_steps = build_scorers(["maniqa"], replace(arguments, maniqa_batch_size=7))["maniqa"]
    assert in_small_steps(images, [""] * 3) == pytest.approx(batched, abs=1e-4)


def test_corners_take_a_quarter_of_the_crops(arguments, monkeypatch):
    cheap = build_scorers(["maniqa"], replace(arguments, maniqa_crop_rule="corners", maniqa_num_crops=5))["maniqa"]
    rated = []
    rate = cheap.network.rate
    monkeypatch.setattr(cheap.network, "rate", lambda crops: rated.append(len(crops)) or rate(crops))
    scores = cheap(pictures(2, 256), ["", ""])
    assert sum(rated) == 10
    assert all(score >= 0 for score in scores)


def test_no_backbone_is_fetched_and_unused_blocks_are_gone(judge, monkeypatch):
    import timm

    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k.get("pretrained")) or create(*a, **k))
    module = judge.network.build()
    assert asked == [False]
    assert len(module.vit.blocks) == 10


def test_missing_weights_name_file_and_command(arguments, tmp_path):
    judge = build_scorers(["maniqa"], replace(arguments, maniqa_weights=str(tmp_path / "none.pt")))["maniqa"]
    with pytest.raises(FileNotFoundError, match=r"none\.pt(?s:.*)hf download chaofengc/IQA-PyTorch-Weights"):
        judge.check()


@pytest.mark.parametrize(("count", "rule"), [(0, "grid"), (6, "corners"), (5, "spiral")])
def test_impossible_crops_are_refused(arguments, count, rule):
    with pytest.raises(ValueError, match=f"{count} MANIQA crops by rule '{rule}'"):
        build_scorers(["maniqa"], replace(arguments, maniqa_num_crops=count, maniqa_crop_rule=rule))
