"""The metrics of the paper's Table 4: judges by their registry names, and the scale in which that table prints them."""

from __future__ import annotations

from typing import NamedTuple

from img_gen_grpo_rewards import SCALES

DRAWBENCH = "data/drawbench/drawbench_test_1000.json"  # the prompts, where python -m dataset.fetch drawbench puts them


class Metric(NamedTuple):
    """A column of the table.

    Attributes:
        title: as printed.
        factor: printed value = factor x raw score of the judge.
        scale: the printed scale in words.
    """

    title: str
    factor: float
    scale: str


# CLIP and HPSv2 are rewards times 5 in training, but plain cosines in the table.
TABLE_METRICS = {
    "clip": Metric("CLIP", 1.0, "cosine"),
    "hpsv2": Metric("HPSv2", 1.0, "cosine"),
    "aesthetic": Metric("Aesthetic", 1.0, "1 to 10"),
    "deqa": Metric("DeQA", 1.0, "rating / 5: 0.2 to 1"),
    "image_reward": Metric("ImageReward", 1.0, "standardised: -2.3 to 2"),
    "pickscore": Metric("PickScore", SCALES["pickscore"], "logit / 26"),
    "unified_reward": Metric("UnifiedReward", SCALES["unified_reward"], "rating / 5: 0.2 to 1"),
}


def metric_of(name: str) -> Metric:
    """The column of a judge; one that the paper's table does not have is printed raw under its own name."""
    return TABLE_METRICS.get(name, Metric(name, 1.0, "raw score"))
