"""Scores of text-to-image models by the metrics of the paper's Table 4, on DrawBench or on images that are there.

    bash test_t2i_rewards_drawbench.sh MODEL_NAME GPU_RANK STEP CFG       draws DrawBench's prompts, then scores them
    python test_t2i_rewards.py test_results/A test_results/B              scores folders that test_t2i.sh wrote
    python test_t2i_rewards.py test_results/A --metrics clip hpsv2        only these metrics

Stopped and started again it goes on, and a metric that is added later scores nothing twice. docs/drawbench.md explains
scales and standard errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

from benchmark import sample_captions
from benchmark.drawbench.metrics import DRAWBENCH, TABLE_METRICS
from benchmark.drawbench.scores import (
    ScoreFiles,
    check_scorers,
    count_images,
    find_images,
    format_tables,
    missing_scores,
    score_images,
    summarize,
    wait_until,
    write_summary,
)
from benchmark.models import find_policy
from benchmark.sample_classes import job_name
from benchmark.sampling import Share
from img_gen_grpo_rewards import RewardArguments
from llamagen.devices import pick_device
from reward_utils.arguments import ScorerArguments
from reward_utils.registry import SCORERS, build_scorers
from reward_utils.scorer import Scorer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: draw if a model was named, score this process's share; the first process writes and prints."""
    share = Share.from_environment()
    logging.basicConfig(level=logging.INFO if share.rank == 0 else logging.ERROR, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments, options = _parse(argv)
        summaries = evaluate(options, arguments, share)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    if share.rank == 0:
        sys.stdout.write(format_tables(summaries))


def evaluate(options: argparse.Namespace, arguments: RewardArguments, share: Share) -> dict[str, dict]:
    """Draw and score what is missing; on the first process, the summary of each folder, which is written there too.

    Everything that a metric needs is looked for before the first image is drawn or scored.

    Raises:
        ValueError: for unknown metrics, folders without images, prompts that are not there.
        FileNotFoundError, ConnectionError: with every file and server that is missing.
    """
    scorers = build_scorers(options.metrics, arguments)
    folders = list(options.images)
    if options.model is None:
        images = {folder: find_images(folder, options.caption_column, options.num_prompts) for folder in folders}
        missing = {folder: missing_scores(images[folder], ScoreFiles(folder, scorers)) for folder in folders}
        _check({metric for lacking in missing.values() for metric in lacking}, scorers, arguments)
    else:
        folders = [_draw(options, scorers, arguments, share)]
    return {str(folder): _score(folder, options, scorers, arguments, share) for folder in folders}


def _draw(options: argparse.Namespace, scorers: dict[str, Scorer], arguments: RewardArguments, share: Share) -> Path:
    """Draw the prompts' images that are missing, once it is certain that they can be scored; gives their folder."""
    if options.prompts == DRAWBENCH and not Path(DRAWBENCH).is_file():
        raise ValueError(f"there is no {DRAWBENCH}: fetch it with python -m dataset.fetch drawbench, or --prompts")
    if options.output is None:
        policy_path = find_policy(options.model, options.step, options.base_policy, options.runs)
        options.output = Path("test_results") / f"{job_name(options, policy_path)}-drawbench"
    options.num_prompts = len(sample_captions.read_prompts(options)[: options.num_prompts])
    num_images = options.num_prompts * options.num_per_prompt
    needed = set(scorers)
    if num_images and count_images(options.output, options.num_prompts) >= num_images:
        files = ScoreFiles(options.output, scorers)
        images = find_images(options.output, options.caption_column, options.num_prompts)
        needed = missing_scores(images, files).keys()
    _check(needed, scorers, arguments)
    folder = sample_captions.sample_captions(options, share)
    wait_until(lambda: count_images(folder, options.num_prompts), num_images, "images")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the policy, which is gone
    return folder


def _check(needed: set[str], scorers: dict[str, Scorer], arguments: RewardArguments) -> None:
    check_scorers({metric: scorer for metric, scorer in scorers.items() if metric in needed}, arguments)


def _score(
    folder: Path, options: argparse.Namespace, scorers: dict[str, Scorer], arguments: RewardArguments, share: Share
) -> dict | None:
    """Score this process's share of a folder; the first process waits for the others and writes the summary."""
    images = find_images(folder, options.caption_column, options.num_prompts)
    files = ScoreFiles(folder, scorers, share.rank)
    ours = images[share.rank :: share.world_size]  # of all: what is missing changes while the others work
    missing = missing_scores(ours, files)
    score_images(missing, scorers, files, arguments, options.images_at_once, show_progress=share.rank == 0)
    if share.rank > 0:
        return None
    total = len(images) * len(scorers)
    wait_until(lambda: sum(len(files.known(metric, images)) for metric in scorers), total, "scores")
    summary = summarize(images, files)
    logger.info("wrote %s", write_summary(folder, summary))
    return summary


def _parse(argv: Sequence[str] | None) -> tuple[RewardArguments, argparse.Namespace]:
    parser = HfArgumentParser(
        ScorerArguments,
        parents=[sample_captions.parser()],
        conflict_handler="resolve",  # -h
        prog="python test_t2i_rewards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(model=None, prompts=DRAWBENCH)
    metrics = parser.add_argument_group("scoring")
    metrics.add_argument("images", nargs="*", type=Path, help="folders to score; none: draw --prompts with --model")
    known = f"of {', '.join(SCORERS)} (default: {' '.join(TABLE_METRICS)})"
    metrics.add_argument("--metrics", nargs="+", metavar="NAME", default=list(TABLE_METRICS), help=known)
    metrics.add_argument("--images_at_once", type=int, default=64, help="images in memory while scoring (64)")
    scorer_arguments, options = parser.parse_args_into_dataclasses(argv)
    if bool(options.images) == (options.model is not None):
        parser.error("give either folders with images, or --model to draw them")
    if options.images_at_once < 1:
        parser.error(f"--images_at_once {options.images_at_once}: it takes at least 1")
    settings = dataclasses.asdict(scorer_arguments)
    settings["reward_device"] = scorer_arguments.reward_device or str(pick_device(options.device))
    return RewardArguments(**settings), options


if __name__ == "__main__":
    main()
