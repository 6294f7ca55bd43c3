"""`quickstart.sh --task t2i`, end to end: the real scripts on the committed toy weights, cut short."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.geneval.scoring import TASKS
from toy import captions, quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quickstart of two small steps, measured on one prompt of every task."""
    folder = tmp_path_factory.mktemp("quickstart")
    prompts = folder / "prompts.jsonl"
    captions.write_prompts(prompts, [captions.measured_prompts(task)[0] for task in TASKS])
    patch = pytest.MonkeyPatch()
    patch.setattr(quickstart, "SAMPLES_PER_PROMPT", 2)
    patch.setattr(quickstart, "GENEVAL_PROMPTS", prompts)
    small = ["--max_steps", "2", "--samples_per_step", "8", "--per_device_train_batch_size", "8", "--use_cpu", "true"]
    arguments = ["--task", "t2i", "--output_dir", str(folder / "run"), "--image_grid_steps", "1"]
    patch.setattr(sys, "argv", ["toy.quickstart", *arguments, *small])
    quickstart.main()
    patch.undo()
    return folder / "run"


def test_the_summary_has_the_six_scores_before_and_after(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["task"] == "t2i" and summary["steps"] == 2 and summary["truth_samples"] == 12
    for when in ("before", "after"):
        scores = summary[f"geneval_{when}"]
        assert set(scores) == {*TASKS, "overall"}
        assert scores["overall"] == pytest.approx(np.mean([scores[task] for task in TASKS]))
        assert summary[f"truth_{when}"] == scores["overall"]
    assert 0 < summary["entropy_before"] < math.log(512) and summary["reward_before"] > 0


def test_pictures_and_report_are_there(finished):
    for name in ("curves.png", "before_after.png"):
        assert Image.open(finished / name).size[0] > 100
    assert "truth" in (finished / "report.html").read_text()


def test_truth_is_the_mean_of_the_kinds_with_its_error_by_hand():
    # two kinds of 4 samples each: 3 of 4 and 2 of 4 right. Variances 3/16 and 4/16 over 4 samples, the mean of two:
    # sqrt(3/64 + 4/64) / 2
    right = np.array([True, True, True, False, True, True, False, False])
    measured = quickstart.Measurement(1.0, right, {"a": 0.75, "b": 0.5}, 1.0, torch.zeros(8, 3, 4, 4))
    assert measured.truth == pytest.approx(0.625)
    assert measured.truth_error == pytest.approx(math.sqrt(7 / 64) / 2)
