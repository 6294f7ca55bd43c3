"""What only the toy world can tell about samples: whether they show what was asked for, and what its judges think.

python -m benchmark.paper.toy_metrics SAMPLES.npz --config CONFIG.yaml --json OUT [--qwen_url URL]     classes
python -m benchmark.paper.toy_metrics IMAGES --json OUT                  captions: GenEval's tasks by the checker
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import yaml
from PIL import Image

from benchmark.archives import ImageArchive
from benchmark.files import write_json
from benchmark.geneval.evaluate import find_samples
from dataset.labels import class_caption
from img_gen_grpo_rewards import RewardArguments, build_rewards
from toy import checker, world

BATCH = 128


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: measure, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.paper.toy_metrics", description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="an .npz of test.sh, or a folder of test_t2i.sh")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--config", type=Path, help="of classes: a training configuration; its judges score")
    parser.add_argument("--qwen_url", help="address of the judge server, if not the configuration's")
    options = parser.parse_args(argv)
    try:
        if options.samples.is_dir():
            numbers = task_scores(options.samples)
        elif options.config is None:
            raise ValueError("--config is missing: it names the judges of class pictures")
        else:
            settings = yaml.safe_load(options.config.read_text(encoding="utf-8"))
            if options.qwen_url:
                settings["qwen_url"] = options.qwen_url
            numbers = class_scores(options.samples, settings)
        write_json(options.json, numbers)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def class_scores(archive: Path, settings: dict) -> dict[str, float]:
    """`truth` (share of right pictures), `reward` (mean total) and `judge_NAME` (mean raw score) of class samples.

    Args:
        archive: .npz with `arr_0`, uint8 [N, H, W, 3], and `arr_1`, the class of each.
        settings: of a training configuration; what is not about rewards is not read.
    """
    with np.load(archive) as content:
        labels = content["arr_1"]
    rewards = build_rewards(weights=settings.get("reward_weights"), arguments=RewardArguments.of_config(settings))
    right: list[bool] = []
    raw: dict[str, list[float]] = {}
    for images in ImageArchive(archive).batches(BATCH):
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # [B, 3, H, W]
        rows = labels[len(right) : len(right) + len(images)]
        right += checker.check_class(pictures.numpy(), rows).tolist()
        for name, scores in rewards.score(pictures, [class_caption(world.CLASS_NAMES[row]) for row in rows]).items():
            raw.setdefault(name, []).extend(scores)
    return {"truth": fmean(right), "reward": fmean(rewards.totals(raw))} | {
        f"judge_{name}": fmean(score for score in scores if score is not None) for name, scores in raw.items()
    }


def task_scores(folder: Path) -> dict[str, float]:
    """`geneval_overall` and `geneval_TASK` of caption samples in GenEval's layout, by the checker's detections."""
    from toy.geneval import score_pictures

    samples = find_samples(folder)
    images = []
    for sample in samples:
        with Image.open(sample.path) as picture:
            images.append(np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 255)
    summary = score_pictures([sample.metadata for sample in samples], np.stack(images))
    return {"geneval_overall": summary.overall} | {
        f"geneval_{task}": score for task, score in summary.task_scores.items()
    }


if __name__ == "__main__":
    main()
