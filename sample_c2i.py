"""Pictures of some classes on one sheet: python sample_c2i.py --classes 14 108 296 884 --guidance_scale 2.0

One row per class, its number and name above it. For numbers there is test.sh, which draws every class.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmark.sample_classes import (
    add_draw_arguments,
    add_model_arguments,
    check_counts,
    check_png,
    load_models,
    pick_classes,
    read_draw_settings,
)
from benchmark.sampling import draw_class
from dataset.labels import load_class_names
from llamagen.devices import pick_device
from llamagen.grids import labelled_grid, save_png
from llamagen.pixels import images_of

DEMO_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]  # of LlamaGen's own demo
MAX_DEFAULT_CLASSES = len(DEMO_CLASSES)


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
    """Draw the classes that the options name and write the sheet; the images are, up to rounding, those of test.sh.

    Raises:
        FileNotFoundError, ValueError: for options outside their ranges, models that are not there, or classes the
            policy does not have.
    """
    check_counts(options, "num_per_class")
    check_png(options.output)
    device = pick_device(options.device)
    settings = read_draw_settings(options, device)
    _, _, policy, vq = load_models(options, device)
    num_classes = policy.config.num_classes
    default = DEMO_CLASSES if num_classes > max(DEMO_CLASSES) else range(min(num_classes, MAX_DEFAULT_CLASSES))
    labels = pick_classes(options.classes or default, num_classes)
    titles = _titles(labels, options.class_names, num_classes)
    images = [
        images_of(raw).cpu()
        for label in labels
        for raw in draw_class(policy, vq, label, options.num_per_class, options.seed, settings)
    ]
    return save_png(labelled_grid(torch.cat(images), titles), options.output)


def _titles(labels: Sequence[int], class_names: str | None, num_classes: int) -> list[str]:
    """Number and name of each class; numbers alone if no names are given for classes that are not ImageNet's."""
    if class_names is None and num_classes != 1000:
        return [str(label) for label in labels]
    names = load_class_names(class_names or "imagenet")
    if len(names) != num_classes:
        raise ValueError(f"{class_names} has {len(names)} names, the policy {num_classes} classes: give one for each")
    return [f"{label} {names[label]}" for label in labels]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add_draw_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="class ids; by default those of LlamaGen's demo")
    parser.add_argument("--num_per_class", type=int, default=8, help="images in a row (8)")
    parser.add_argument("--class_names", help="file with one name per line; by default ImageNet's, for 1,000 classes")
    parser.add_argument("--output", type=Path, default=Path("samples_c2i.png"), help="the sheet (samples_c2i.png)")
    return parser


if __name__ == "__main__":
    main()
