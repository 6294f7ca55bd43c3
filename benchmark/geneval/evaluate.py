"""A folder of generated images -> detections.jsonl -> results.jsonl and summary.json; a stopped run goes on.

Layout of the images, as the benchmark has it: IMAGES/00042/metadata.jsonl (the prompt's line) and
IMAGES/00042/samples/0000.png, 0001.png, ...
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from benchmark.files import write_bytes, write_json
from benchmark.geneval.detections import Detections, file_digest, from_record, read_json_lines, to_record
from benchmark.geneval.scoring import (
    IMAGES_PER_PROMPT,
    NUM_PROMPTS,
    ScoringOptions,
    Summary,
    box_colors_needed,
    judge_image,
    partial_credit,
    select_detections,
    summarize,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One generated image and what its prompt asks for."""

    filename: str  # below the images' folder, with slashes
    path: Path
    metadata: dict[str, Any]


Detector = Callable[[Sequence[Sample], Sequence[Image.Image]], list[Detections]]  # samples and their pictures
Classifier = Callable[[Image.Image, np.ndarray, Sequence[Any], str], list[str]]  # picture, boxes, masks, object name


def find_samples(images: Path) -> list[Sample]:
    """Every image of a folder in the benchmark's layout, in order.

    Raises:
        ValueError: if there is none, or a prompt's folder has no readable metadata.jsonl.
    """
    samples = []
    for folder in prompt_folders(images):
        metadata = _read_metadata(folder / "metadata.jsonl")
        for path in pictures_of(folder):
            samples.append(Sample(path.relative_to(images).as_posix(), path, metadata))
    if not samples:
        raise ValueError(f"no image under {images}: expected {images}/00000/samples/0000.png and so on")
    return samples


def prompt_folders(images: Path) -> list[Path]:
    """The folders 00000, 00001 ... of the benchmark's layout, in order of their numbers."""
    found = [path for path in images.iterdir() if path.is_dir() and path.name.isdigit()] if images.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def pictures_of(folder: Path) -> list[Path]:
    """samples/0000.png, 0001.png ... of one prompt's folder, in order of their numbers."""
    found = [path for path in (folder / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", path.name)]
    return sorted(found, key=lambda path: int(path.stem))


def detect_all(
    samples: Sequence[Sample],
    out: Path,
    load_detector: Callable[[], Detector],
    load_classifier: Callable[[], Classifier],
    *,
    settings: dict[str, Any],
    options: ScoringOptions | None = None,
    batch_size: int = 4,
) -> dict[str, Detections]:
    """What is in each image, colours included where they decide; everything found is kept in OUT/detections.jsonl.

    An image that is already there, unchanged, is not looked at again. What can go wrong does so before the first image
    is looked at and before anything is written: broken pictures, missing models.

    Args:
        samples: the images.
        out: folder of the results.
        load_detector: gives the detector; called once if any image is new.
        load_classifier: gives a `ColorClassifier` or the like; called once if any colour may be asked for.
        settings: what the detections depend on; kept in OUT/settings.json beside the first detections.
        options: thresholds; they say which boxes need a colour.
        batch_size: images a call of the detector.
    Returns:
        filename -> detections, without masks.
    Raises:
        ValueError: if OUT holds detections that were made with other settings, or a picture cannot be read.
    """
    options = options or ScoringOptions()
    log, settings_file = out / "detections.jsonl", out / "settings.json"
    records = {record["filename"]: record for record in read_json_lines(log)} if log.exists() else {}
    if records and settings_file.exists():  # settings of a run that found nothing bind nobody
        _check_settings(settings_file, settings)
    known = {
        sample.filename: records[sample.filename]
        for sample in samples
        if sample.filename in records and records[sample.filename].get("sha256") == file_digest(sample.path)
    }
    fresh = [sample for sample in samples if sample.filename not in known]
    for sample in fresh:
        check_picture(sample.path)
    detector = load_detector() if fresh else None
    asks = (_may_ask_color(sample, known.get(sample.filename), detector, options) for sample in samples)
    classifier = load_classifier() if any(asks) else None
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings_file, settings)
    write_bytes(log, "".join(map(_line, records.values())).encode())  # without a torn last line
    found: dict[str, Detections] = {}
    with log.open("a", encoding="utf-8") as stream, tqdm(total=len(samples), desc="geneval", unit="image") as progress:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            digests = [file_digest(sample.path) for sample in batch]
            seen = {
                sample.filename: from_record(known[sample.filename]) for sample in batch if sample.filename in known
            }
            new = [sample for sample in batch if sample.filename not in known]
            if new:
                seen |= _detect(new, detector)
            for sample, digest in zip(batch, digests):
                detections = seen[sample.filename]
                picture = functools.partial(open_picture, sample.path)
                if add_colors(sample.metadata, detections, classifier, picture, options) or sample in new:
                    stream.write(_line(to_record(sample.filename, digest, detections)))
                found[sample.filename] = Detections(detections.boxes, colors=detections.colors)
            stream.flush()
            progress.update(len(batch))
    return found


def score_all(
    samples: Sequence[Sample], found: dict[str, Detections], out: Path, options: ScoringOptions | None = None
) -> Summary:
    """Judge every image, write OUT/results.jsonl and OUT/summary.json, and return the summary."""
    chosen = vars(options or ScoringOptions())
    results = []
    for sample in samples:
        detections = found[sample.filename]
        kept = select_detections(sample.metadata, detections.boxes, **chosen)
        correct, reason = judge_image(sample.metadata, detections.boxes, detections.colors, **chosen)
        results.append(
            {
                "filename": sample.filename,
                "tag": sample.metadata["tag"],
                "prompt": sample.metadata["prompt"],
                "correct": correct,
                "reason": reason,
                "credit": partial_credit(sample.metadata, detections.boxes, detections.colors, **chosen),
                "metadata": json.dumps(sample.metadata),
                "details": json.dumps({name: detections.boxes[name][rows].tolist() for name, rows in kept.items()}),
            }
        )
    summary = summarize(results)
    if summary.num_images != NUM_PROMPTS * IMAGES_PER_PROMPT:
        logger.warning(
            "%d images: the benchmark's numbers are over %d, %d of each of its %d prompts",
            summary.num_images,
            NUM_PROMPTS * IMAGES_PER_PROMPT,
            IMAGES_PER_PROMPT,
            NUM_PROMPTS,
        )
    write_bytes(out / "results.jsonl", "".join(_line(result) for result in results).encode())
    write_json(out / "summary.json", dataclasses.asdict(summary) | {"options": chosen})
    return summary


def add_colors(
    metadata: dict[str, Any],
    detections: Detections,
    classifier: Classifier,
    picture: Callable[[], Image.Image],
    options: ScoringOptions,
) -> bool:
    """Fill in the colours that decide; whether one was missing. `picture` is asked for the image only if so."""
    missing = missing_colors(metadata, detections, options)
    for name, rows in missing.items():
        boxes = detections.boxes[name]
        colors = detections.colors.setdefault(name, [None] * len(boxes))
        masks = detections.masks.get(name, [None] * len(boxes))
        told = classifier(picture(), boxes[rows], [masks[row] for row in rows], name)
        for row, color in zip(rows, told, strict=True):
            colors[row] = color
    return bool(missing)


def missing_colors(metadata: dict[str, Any], detections: Detections, options: ScoringOptions) -> dict[str, list[int]]:
    """The rows whose colour decides and is not known: class name -> indices into its rows, best score first."""
    missing = {}
    for name, rows in box_colors_needed(metadata, detections.boxes, **vars(options)).items():
        colors = detections.colors.get(name)
        unknown = [row for row in rows if colors is None or colors[row] is None]
        if unknown:
            missing[name] = unknown
    return missing


class ExportedDetections:
    """A detector that looks up what another one found.

    Args:
        path: file in the format of `benchmark.geneval.detections`.
        object_names: the benchmark's; others in the file are named in a warning, since no prompt asks for them.
    Raises:
        ValueError: if the file lacks an image or has it twice, was made from another version of it, or a line is not
            in the format.
    """

    def __init__(self, path: Path, object_names: Sequence[str] = ()) -> None:
        self.path = path
        self._records: dict[str, dict] = {}
        strangers: set[str] = set()
        for record in read_json_lines(path):
            if record["filename"] in self._records:
                raise ValueError(f"{path} has two lines for {record['filename']}: remove the one that does not count")
            self._records[record["filename"]] = record
            strangers |= from_record({**record, "masks": None}).boxes.keys() - {*object_names}
        if object_names and strangers:
            listed = ", ".join(sorted(strangers)[:5])
            logger.warning(
                "%s names %d kinds of objects that are none of GenEval's (%s): their boxes count for nothing",
                *(path, len(strangers), listed),
            )

    def __call__(self, samples: Sequence[Sample], pictures: Sequence[Image.Image]) -> list[Detections]:
        found = []
        for sample in samples:
            record = self._records.get(sample.filename)
            if record is None:
                raise ValueError(
                    f"{self.path} has no line for {sample.filename}, but for {list(self._records)[:2]} and others: "
                    "file names are those below the images' folder"
                )
            if record.get("sha256") not in (None, file_digest(sample.path)):
                raise ValueError(f"{sample.filename} has changed since {self.path} was made: run the detector again")
            found.append(from_record(record))
        for sample, detections, picture in zip(samples, found, pictures):
            for mask in (mask for masks in detections.masks.values() for mask in masks if mask is not None):
                if mask.shape != (picture.height, picture.width):
                    raise ValueError(
                        f"{self.path}: a mask of {sample.filename} is {mask.shape[0]} x {mask.shape[1]} pixels, the "
                        f"picture {picture.height} x {picture.width}: detect in pictures of their own size"
                    )
        return found


def _read_metadata(path: Path) -> dict[str, Any]:
    expected = "expected the prompt's one line of evaluation_metadata.jsonl, with 'tag' and 'prompt'"
    clause_form = "expected {'class': NAME, 'count': NUMBER}, 'position' as [RELATION, number of an earlier clause]"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {expected}") from error
    if not isinstance(metadata, dict) or not {"tag", "prompt"} <= metadata.keys():
        raise ValueError(f"{path} holds {str(metadata)[:80]}; {expected}")
    for part in ("include", "exclude"):
        clauses = metadata.get(part) or []
        if not isinstance(clauses, list):
            raise ValueError(f"{path}: '{part}' is {str(clauses)[:80]}, expected a list of clauses; {clause_form}")
        for number, clause in enumerate(clauses):
            if not _is_clause(clause, number):
                raise ValueError(f"{path}: clause {number} of '{part}' is {str(clause)[:80]}; {clause_form}")
    return metadata


def _is_clause(clause: Any, number: int) -> bool:
    match clause:
        case {"class": str(), "count": int(), "position": [str(), int(target)]}:
            return 0 <= target < number
        case {"class": str(), "count": int()}:
            return "position" not in clause
    return False


def _may_ask_color(
    sample: Sample, record: dict[str, Any] | None, detector: Detector | None, options: ScoringOptions
) -> bool:
    """Whether a colour has to be told for an image: exactly if its boxes are known, else if its prompt names one."""
    if record is None and not isinstance(detector, ExportedDetections):
        return any("color" in clause for clause in sample.metadata.get("include") or [])
    if record is None:
        (found,) = detector([sample], [])
    else:
        found = from_record({**record, "masks": None})  # decoding them takes time and tells nothing here
    return bool(missing_colors(sample.metadata, found, options))


def _detect(samples: Sequence[Sample], detector: Detector) -> dict[str, Detections]:
    """Run the detector; masks are kept only of objects whose colour the prompt names."""
    found = detector(samples, [open_picture(sample.path) for sample in samples])
    for sample, detections in zip(samples, found, strict=True):
        colored = {clause["class"] for clause in sample.metadata.get("include") or [] if "color" in clause}
        detections.masks = {name: masks for name, masks in detections.masks.items() if name in colored}
    return {sample.filename: detections for sample, detections in zip(samples, found)}


def open_picture(path: Path) -> Image.Image:
    """A picture's pixels, as RGB; raises ValueError with its path if it is damaged."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise _broken(path) from error


def check_picture(path: Path) -> None:
    """Read a picture's chunks and their checksums, without the pixels; raises ValueError if it is damaged."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise _broken(path) from error


def _broken(path: Path) -> ValueError:
    return ValueError(f"{path} cannot be read as a picture ({path.stat().st_size} bytes): remove it and sample again")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    if changed:
        raise ValueError(
            f"{path.parent} holds detections made with {_short(before, changed)}, now it is "
            f"{_short(settings, changed)}: choose another --out, or delete that folder"
        )


def _short(settings: dict[str, Any], names: list[str]) -> str:
    """Some settings as a message shows them: what is set, long values cut."""
    shown = [f"{name} {str(settings[name])[:48]!r}" for name in names if settings.get(name) is not None]
    return ", ".join(shown) or "none"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
