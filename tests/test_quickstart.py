"""The main job, end to end: the real scripts on the committed toy weights, cut short."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from toy import quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quickstart of two small steps, measured on one sample a class."""
    folder = tmp_path_factory.mktemp("quickstart")
    patch = pytest.MonkeyPatch()
    patch.setattr(quickstart, "SAMPLES_PER_CLASS", 2)
    patch.setattr(quickstart, "SHOWN_SAMPLES", 2)
    small = ["--max_steps", "2", "--samples_per_step", "16", "--per_device_train_batch_size", "16", "--use_cpu", "true"]
    arguments = ["--output_dir", str(folder), "--seconds_install", "7", "--save_steps", "1", "--image_grid_steps", "1"]
    patch.setattr(sys, "argv", ["toy.quickstart", *arguments, *small])
    quickstart.main()
    quickstart.main()  # a second time over the first
    patch.undo()
    return folder


def test_the_summary_has_the_numbers_that_are_promised(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds_install"] == 7 and summary["seconds_train"] > 0
    for quantity in ("reward", "truth", "entropy"):
        before, after = summary[f"{quantity}_before"], summary[f"{quantity}_after"]
        assert isinstance(before, float) and isinstance(after, float)
    assert 0 <= summary["truth_before"] <= 1
    assert 0 < summary["entropy_before"] < 6.3  # below the log of the codebook's size
    assert summary["kl"] >= 0


def test_pictures_and_report_are_there(finished):
    assert sorted(grid.name for grid in (finished / "samples").iterdir()) == [f"step-00000{n}.png" for n in range(3)]
    for name in ("curves.png", "before_after.png"):
        assert Image.open(finished / name).size[0] > 200
    report = (finished / "report.html").read_text()
    assert "truth" in report and "data:image/" in report


def test_the_last_line_says_what_happened():
    summary = {
        "steps": 150,
        "seconds_train": 120.0,
        "truth_before": 0.8,
        "truth_after": 0.89,
        "truth_samples": 768,
        "truth_standard_error": 0.018,
        "reward_before": 1.0,
        "reward_after": 1.25,
    }
    said = quickstart.in_words(summary, quickstart.Path("runs/x"))
    # 0.09 / 0.018 = 5 standard errors
    assert "80.0% of 768 fresh samples before and 89.0% after (+9.0 points, 5.0 standard errors" in said
    assert "runs/x/report.html" in said


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """`quick(*options)`: a quickstart whose training fails at once; gives what was measured before it."""
    measured = []
    monkeypatch.setattr(quickstart, "measure", lambda *arguments: measured.append(arguments))
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 3))

    def call(*options):
        config = ["--config", "configs/toy_c2i.yaml", "--output_dir", str(tmp_path / "run")]
        monkeypatch.setattr(sys, "argv", ["toy.quickstart", *config, *options])
        with pytest.raises(SystemExit) as stopped:
            quickstart.main()
        return measured, stopped.value.code

    return call


def test_what_is_measured_is_what_is_trained_whatever_options_say(quick):
    options = ["--model_name_or_path", "toy/weights/gpt_small", "--guidance_scale", "1.5", "--use_cpu", "true"]
    hpsv2 = ["--hpsv2_weights", "toy/weights/hpsv2/open_clip_model.safetensors", "--hpsv2_architecture"]
    options += ["--reward_funcs", "hpsv2", *hpsv2, "toy/weights/hpsv2"]
    (before,), code = quick(*options)
    policy, _, rewards, _, guidance_scale, when = before
    assert (policy.config.hidden_size, guidance_scale, when, code) == (192, 1.5, "before", 3)
    assert rewards.names == ["hpsv2"]


def test_a_quickstart_clears_only_what_one_has_made(quick, tmp_path):
    checkpoint = tmp_path / "run/checkpoint-5"
    checkpoint.mkdir(parents=True)
    measured, said = quick("--use_cpu", "true")
    assert "holds checkpoints of another run: choose another --output_dir" in said and checkpoint.is_dir()
    measured, said = quick("--resume_from_checkpoint", "last")
    assert "begins anew" in said and checkpoint.is_dir() and not measured
    (tmp_path / "run" / quickstart.MARK).write_text("")
    assert quick("--use_cpu", "true")[1] == 3 and not checkpoint.exists()
