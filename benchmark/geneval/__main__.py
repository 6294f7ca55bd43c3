"""GenEval scores of a folder of images: python -m benchmark.geneval IMAGES. See docs/geneval.md."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmark.geneval.detect import COLOR_MODEL, COLOR_WEIGHTS, DETECTOR, ColorClassifier, InstanceDetector
from benchmark.geneval.detections import file_digest, read_object_names
from benchmark.geneval.evaluate import Detector, ExportedDetections, detect_all, find_samples, score_all
from benchmark.geneval.scoring import ScoringOptions, format_summary, summary_table
from llamagen.devices import pick_device

OBJECT_NAMES = Path(__file__).parents[2] / "data/geneval/object_names.txt"
MIN_SCORE = 0.05  # of the rows that are kept on disk; every threshold must be above


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = ScoringOptions(**{field.name: getattr(args, field.name) for field in fields(ScoringOptions)})
    out = args.out or args.images / "geneval"
    try:
        if min(options.threshold, options.counting_threshold) < MIN_SCORE:
            raise ValueError(f"thresholds below {MIN_SCORE} are not possible: weaker boxes are not kept")
        samples = find_samples(args.images)
        load_detector, settings = _detector(args)
        found = detect_all(
            samples,
            out,
            load_detector,
            lambda: ColorClassifier(args.color_model, args.color_weights, device=pick_device(args.device)),
            settings=settings | {"color_model": args.color_model, "color_weights": args.color_weights},
            options=options,
            batch_size=args.batch_size,
        )
        summary = score_all(samples, found, out, options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    sys.stdout.write(f"{format_summary(summary)}\n{summary_table(summary)}\n\n{out / 'results.jsonl'}\n")


def _detector(args: argparse.Namespace) -> tuple[Callable[[], Detector], dict[str, Any]]:
    """What gives the source of detections, and the settings that they depend on."""
    if args.detections is not None:
        if not args.detections.is_file():
            raise ValueError(f"{args.detections} is no file: expected what benchmark/geneval/export_mmdet.py writes")
        names = read_object_names(args.object_names) if args.object_names.is_file() else ()
        return lambda: ExportedDetections(args.detections, names), {"detections": file_digest(args.detections)}
    names = read_object_names(args.object_names)

    def load() -> Detector:
        model = InstanceDetector(names, args.detector, device=pick_device(args.device), min_score=MIN_SCORE)
        return lambda samples, pictures: model(pictures)

    return load, {"detector": args.detector, "object_names": file_digest(args.object_names)}


def _spelled(name: str) -> list[str]:
    """An option as the benchmark spells its own, and as the other commands of this project do."""
    return [f"--{spelling}" for spelling in dict.fromkeys((name, name.replace("-", "_")))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.geneval", description=__doc__)
    parser.add_argument("images", type=Path, help="folder with 00000/metadata.jsonl, 00000/samples/0000.png, ...")
    parser.add_argument("--out", type=Path, help="folder of the results; IMAGES/geneval by default")
    parser.add_argument("--detector", default=DETECTOR, help="a Mask2Former: folder or hub name (%(default)s)")
    parser.add_argument("--detections", type=Path, help="use these detections instead: a file of export_mmdet.py")
    parser.add_argument(
        *_spelled("object-names"),
        type=Path,
        default=OBJECT_NAMES,
        help="the benchmark's object names in the order of the detector's classes (%(default)s)",
    )
    parser.add_argument(*_spelled("color-model"), default=COLOR_MODEL, help="open_clip architecture (%(default)s)")
    parser.add_argument(
        *_spelled("color-weights"), default=COLOR_WEIGHTS, help="its weights, a tag or a file (%(default)s)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; a GPU if there is one, by default")
    parser.add_argument(
        *_spelled("batch-size"), type=int, default=4, help="images a pass of the detector (%(default)s)"
    )
    for field in fields(ScoringOptions):
        kind = int if field.name == "max_objects" else float
        flags = _spelled(field.name.replace("_", "-"))
        parser.add_argument(*flags, type=kind, default=field.default, help="benchmark's rule: %(default)s")
    return parser


if __name__ == "__main__":
    main()
