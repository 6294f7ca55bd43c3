"""Score pictures from the command line.

    python -m reward_utils.score --rewards clip hpsv2 samples/ --prompts prompts.txt --json scores.json
    python -m reward_utils.score --rewards maniqa samples.npz

Pictures are image files, folders of them (in the order of their names), or .npz files with bytes `arr_0` [N, H, W, 3].
Prompts are the lines of a text file, or a .json / .jsonl list of texts or of objects with `prompt` or `caption`, and
`metadata` for the judges that need it (else the object itself, as in GenEval's file): one per picture, or a single one
for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reward_utils.arguments import ScorerArguments
from reward_utils.registry import SCORERS, build_scorers
from reward_utils.remote import parse_remote
from reward_utils.scorer import Scorer

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_ROWS = 20  # more pictures than this are only summarised in the table


def main(argv: list[str] | None = None) -> None:
    arguments, options = _parse(argv)
    try:
        _run(arguments, options)
    except (ValueError, OSError) as error:  # what a user can put right
        sys.exit(f"error: {error}")


@dataclass(frozen=True)
class Picture:
    """One picture: a file, or a row of an .npz."""

    path: Path
    row: int | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}[{self.row}]"


def list_pictures(path: Path) -> list[Picture]:
    """The pictures at a path: itself, those in a folder, or the rows of an .npz.

    Raises:
        ValueError: if there are none.
    """
    if path.is_dir():
        found = [Picture(file) for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES]
    elif path.suffix == ".npz" and path.is_file():
        found = [Picture(path, row) for row in range(len(_rows(path)))]
    else:
        found = [Picture(path)] if path.is_file() else []
    if not found:
        raise ValueError(f"no picture at {path}: give image files, a folder of them, or an .npz with arr_0")
    return found


def score_pictures(
    scorers: dict[str, Scorer],
    pictures: list[Picture],
    prompts: list[str],
    metadata: list[dict | None],
    images_at_once: int = 64,
    device: str | None = None,
) -> dict[str, list[float | None]]:
    """Raw scores by judge, one per picture in order; a progress bar on a terminal.

    Raises:
        ValueError: if `images_at_once` is below 1.
    """
    if images_at_once < 1:
        raise ValueError(f"images_at_once is {images_at_once}: at least one picture is in memory")
    scores: dict[str, list[float | None]] = {name: [] for name in scorers}
    with tqdm(total=len(pictures), desc="scoring", unit="image", disable=None) as progress:
        for rows, images in _batches(pictures, images_at_once):
            placed = images.to(device or "cpu")
            for name, scorer in scorers.items():
                scores[name] += scorer(placed, prompts[rows], metadata[rows])
            progress.update(len(images))
    return scores


def format_table(scores: dict[str, list[float | None]], names: list[str]) -> str:
    """Mean, spread and extremes per judge, after one line per picture if they are few."""
    lines = []
    if len(names) <= MAX_ROWS:
        lines.append("  ".join([*(f"{judge:>14}" for judge in scores), "picture"]))
        for row, name in enumerate(names):
            cells = ["-" if values[row] is None else f"{values[row]:.5f}" for values in scores.values()]
            lines.append("  ".join([*(f"{cell:>14}" for cell in cells), name]))
        lines.append("")
    columns = ("mean", "std", "lowest", "highest")
    lines.append(f"{'judge':<16}" + "".join(f"{column:>12}" for column in columns) + f"{'scored':>12}")
    for judge, values in scores.items():
        figures = summarise(values)
        cells = ["-" if figures[column] is None else f"{figures[column]:.5f}" for column in columns]
        lines.append(f"{judge:<16}" + "".join(f"{cell:>12}" for cell in cells) + f"{figures['scored']:>12}")
    return "\n".join(lines) + "\n"


def summarise(values: list[float | None]) -> dict:
    """Mean, population standard deviation, extremes and number of the scores that exist."""
    present = [value for value in values if value is not None]
    if not present:
        return {"mean": None, "std": None, "lowest": None, "highest": None, "scored": 0}
    return {
        "mean": statistics.fmean(present),
        "std": statistics.pstdev(present),
        "lowest": min(present),
        "highest": max(present),
        "scored": len(present),
    }


def _run(arguments: ScorerArguments, options: argparse.Namespace) -> None:
    pictures = [picture for path in options.images for picture in list_pictures(Path(path))]
    scorers = build_scorers(options.rewards, arguments)
    prompts, metadata = _read_prompts(options.prompts, len(pictures), scorers)
    for scorer in scorers.values():
        scorer.check()
    scores = score_pictures(scorers, pictures, prompts, metadata, options.images_at_once, arguments.reward_device)
    sys.stdout.write(format_table(scores, [picture.name for picture in pictures]))
    if options.json:
        _write_json(Path(options.json), scorers, scores, pictures, prompts)


def _parse(argv: list[str] | None) -> tuple[ScorerArguments, argparse.Namespace]:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(ScorerArguments, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rewards", nargs="+", required=True, help=f"judges: {', '.join(SCORERS)}")
    parser.add_argument("images", nargs="*", help="image files, folders, .npz files")
    parser.add_argument("--prompts", help="text or JSON file; not needed by judges that read no text")
    parser.add_argument("--json", help="write scores and summary here")
    parser.add_argument("--images_at_once", type=int, default=64, help="pictures in memory")
    arguments, options = parser.parse_args_into_dataclasses(argv)
    known = {*SCORERS, *parse_remote(arguments.remote_rewards)}
    paths = [word for word in options.rewards if word not in known and Path(word).exists()]  # --rewards clip folder/
    options.rewards = [word for word in options.rewards if word not in paths]
    options.images = [*paths, *options.images]
    if not options.images:
        parser.error("no pictures given: name image files, a folder, or an .npz")
    return arguments, options


def _batches(pictures: list[Picture], size: int) -> Iterator[tuple[slice, Tensor]]:
    """Neighbours of one size together, float32 [B, 3, H, W] in [0, 1]."""
    opened: dict[Path, np.ndarray] = {}
    start, batch = 0, []
    for index, picture in enumerate(pictures):
        pixels = _load(picture, opened)
        if batch and (len(batch) == size or pixels.shape != batch[0].shape):
            yield slice(start, index), torch.stack(batch).float() / 255
            start, batch = index, []
        batch.append(pixels)
    yield slice(start, len(pictures)), torch.stack(batch).float() / 255


def _load(picture: Picture, opened: dict[Path, np.ndarray]) -> Tensor:
    """Bytes [3, H, W]."""
    if picture.row is None:
        with Image.open(picture.path) as file:
            pixels = np.array(file.convert("RGB"))
    else:
        if picture.path not in opened:
            opened[picture.path] = _rows(picture.path)
        pixels = opened[picture.path][picture.row]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _rows(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        rows = file.get("arr_0")
    if rows is None or rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[-1] != 3:
        found = "no arr_0" if rows is None else f"arr_0 {rows.dtype} {list(rows.shape)}"
        raise ValueError(f"{path} has {found}, expected arr_0 with bytes [N, H, W, 3]")
    return rows


def _read_prompts(path: str | None, count: int, scorers: dict[str, Scorer]) -> tuple[list[str], list[dict | None]]:
    if path is None:
        readers = [name for name, scorer in scorers.items() if scorer.reads_text]
        if readers:
            raise ValueError(f"{', '.join(readers)} compare the pictures with prompts: give --prompts FILE")
        return [""] * count, [None] * count
    text = Path(path).read_text(encoding="utf-8")
    if path.endswith(".json"):
        entries = json.loads(text)
    elif path.endswith(".jsonl"):
        entries = [json.loads(line) for line in text.split("\n") if line.strip()]  # a text may hold other line ends
    else:
        entries = text.splitlines()
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}, expected a list of texts or objects")
    if len(entries) == 1:
        entries = entries * count
    if len(entries) != count:
        raise ValueError(f"{len(entries)} prompts in {path} for {count} pictures: give one each, or a single one")
    prompts, metadata = [], []
    for entry in entries:
        details = entry if isinstance(entry, dict) else {}
        prompts.append(details.get("prompt", details.get("caption")) if details else entry)
        metadata.append(
            details.get("metadata", details if len(details) > 1 else None)
        )  # GenEval's rows are metadata themselves
    return prompts, metadata


def _write_json(
    path: Path, scorers: dict[str, Scorer], scores: dict[str, list], pictures: list[Picture], prompts: list[str]
) -> None:
    content = {
        "pictures": [picture.name for picture in pictures],
        "prompts": prompts,
        "rewards": {
            name: {"model": scorers[name].model, "summary": summarise(values), "scores": values}
            for name, values in scores.items()
        },
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
