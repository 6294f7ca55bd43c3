"""What a detector saw in an image, and its form on disk: one JSON line per image, the same for every detector.

    {"filename": "00042/samples/0001.png",                  below the images' folder
     "sha256": "9f2c...",                                    first 16 digits, of the image file; optional
     "detections": {"dog": [[x1, y1, x2, y2, score], ...]},  pixels, x2 and y2 exclusive; any order; names as GenEval's
     "masks": {"dog": [{"size": [H, W], "counts": [...]}, null, ...]},   optional, one entry per row
     "colors": {"dog": ["red", null, ...]}}                              optional, one entry per row

A mask is COCO's uncompressed run-length code: column by column, lengths of runs, starting with one of zeros. Without
colours they are read from the masked boxes, without masks from the plain boxes. Needs numpy alone and runs on Python
3.8, because the official detector's environment imports it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Detections:
    """Rows per class name; the three parts list the same rows in the same order."""

    boxes: dict[str, np.ndarray]  # [N, 5] float32: x1, y1, x2, y2, score
    masks: dict[str, list[np.ndarray | None]] = field(default_factory=dict)  # bool [H, W] each
    colors: dict[str, list[str | None]] = field(default_factory=dict)


def read_object_names(path: Path) -> list[str]:
    """The benchmark's object names, a line each, in the order of the detector's classes.

    Raises:
        FileNotFoundError: if the file is not there; says how to get it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file: expected the benchmark's 80 object names, a line each; "
            "fetch them with python -m dataset.fetch geneval, or name a file"
        )
    names = path.read_text(encoding="utf-8").split("\n")
    return [name.strip() for name in names if name.strip()]


def to_record(filename: str, sha256: str, found: Detections) -> dict[str, Any]:
    """The JSON line of one image; numbers have nine digits, which bring back every float32."""
    record: dict[str, Any] = {
        "filename": filename,
        "sha256": sha256,
        "detections": {
            name: [[float(f"{value:.9g}") for value in row] for row in rows.tolist()]
            for name, rows in found.boxes.items()
        },
    }
    if found.masks:
        record["masks"] = {
            name: [None if mask is None else encode_mask(mask) for mask in masks] for name, masks in found.masks.items()
        }
    if found.colors:
        record["colors"] = found.colors
    return record


def from_record(record: dict[str, Any]) -> Detections:
    """What a JSON line says; a class may have no rows.

    Raises:
        ValueError: if `detections` are missing, rows are no boxes with scores, or masks or colours do not list the
            same rows or are none; names the image.
    """
    filename = record.get("filename")
    if not isinstance(record.get("detections"), dict):
        raise ValueError(
            f"{filename}: 'detections' is {str(record.get('detections'))[:60]}, expected an object name -> rows; "
            "{} where nothing was found"
        )
    boxes = {name: _read_rows(rows, f"{filename}: {name!r}") for name, rows in record["detections"].items()}
    for part in ("masks", "colors"):
        entries_of = record.get(part) or {}
        if not isinstance(entries_of, dict):
            raise ValueError(f"{filename}: {part!r} is {str(entries_of)[:60]}, expected an object name -> entries")
        for name, entries in entries_of.items():
            if not isinstance(entries, list) or len(entries) != len(boxes.get(name, ())):
                given = len(entries) if isinstance(entries, list) else f"no list of {part} but {str(entries)[:40]}"
                raise ValueError(
                    f"{filename}: {given} {part} for {len(boxes.get(name, ()))} rows of {name!r}; "
                    "write one entry per row, null where there is none"
                )
    try:
        masks = {
            name: [None if code is None else decode_mask(code) for code in codes]
            for name, codes in (record.get("masks") or {}).items()
        }
    except ValueError as error:
        raise ValueError(f"{filename}: {error}") from error
    return Detections(boxes, masks, dict(record.get("colors") or {}))


def _read_rows(rows: Any, whose: str) -> np.ndarray:
    """Boxes and scores [N, 5], float32."""
    try:
        found = np.asarray(rows, dtype=np.float32)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if isinstance(rows, list) and not rows:
        return np.zeros((0, 5), np.float32)
    if found.ndim != 2 or found.shape[1] != 5 or not np.isfinite(found).all():
        raise ValueError(f"{whose} has rows {str(rows)[:80]}, expected finite numbers [x1, y1, x2, y2, score] each")
    return found


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run-length code of a mask [H, W]."""
    pixels = np.asarray(mask, dtype=bool).flatten(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    edges = np.concatenate([[0], changes, [pixels.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": ([0, *counts] if pixels.size and pixels[0] else counts)}


def decode_mask(code: dict[str, Any]) -> np.ndarray:
    """The mask [H, W], bool, of a run-length code.

    Raises:
        ValueError: if it is none, the runs do not add up to the size, or `counts` is COCO's compressed text.
    """
    try:
        (height, width), counts = code["size"], code["counts"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"a mask is {str(code)[:60]}, expected 'size': [H, W] and 'counts': [...]") from None
    if isinstance(counts, str):
        raise ValueError("a mask holds COCO's compressed text, expected a list of run lengths: use encode_mask")
    if sum(counts) != height * width:
        raise ValueError(f"the runs of a mask add up to {sum(counts)} pixels, expected {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def file_digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a torn last line, as a stopped run leaves it, is left out.

    Raises:
        ValueError: if any other line is no JSON object with a `filename`.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "filename" not in record:
                raise ValueError("no object with a 'filename'")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: {error}; expected the format of benchmark/geneval/detections.py"
            ) from error
        records.append(record)
    return records
