"""Pictures of some captions on one sheet: python sample_t2i.py "a red bus" "two cats" --guidance_scale 2.0

One row per caption. For numbers there is test_t2i.sh, which draws every prompt of a benchmark.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmark.sample_captions import DEFAULT_BASE, DEFAULT_VQ, add_text_arguments, load_models
from benchmark.sample_classes import (
    add_draw_arguments,
    add_model_arguments,
    check_counts,
    check_png,
    read_draw_settings,
)
from benchmark.sampling import draw_captions
from llamagen.devices import pick_device
from llamagen.grids import labelled_grid, save_png
from llamagen.pixels import images_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: draw, write the sheet, print its path."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        path = draw_sheet(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{path}\n")


def draw_sheet(options: argparse.Namespace) -> Path:
    """Draw the captions that the options name and write the sheet.

    Image k of a caption is, up to rounding, image k of test_t2i.sh with the same seed and settings.

    Raises:
        FileNotFoundError, ValueError: for options outside their ranges, or models that are not there or do not belong
            together.
    """
    check_counts(options, "num_per_caption")
    check_png(options.output)
    device = pick_device(options.device)
    settings = read_draw_settings(options, device)
    models = load_models(options, device)
    images = [
        images_of(raw).cpu()
        for caption in options.captions
        for raw in draw_captions(
            models.policy,
            models.vq,
            models.encoder,
            [(caption, index) for index in range(options.num_per_caption)],
            options.seed,
            settings,
        )
    ]
    return save_png(labelled_grid(torch.cat(images), options.captions), options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", nargs="+", metavar="CAPTION", help='what to draw, each in quotes: "a red bus"')
    add_model_arguments(parser, DEFAULT_BASE, DEFAULT_VQ)
    add_text_arguments(parser)
    add_draw_arguments(parser)
    parser.add_argument("--num_per_caption", type=int, default=8, help="images in a row (8)")
    parser.add_argument("--output", type=Path, default=Path("samples_t2i.png"), help="the sheet (samples_t2i.png)")
    return parser


if __name__ == "__main__":
    main()
