"""GenEval's rules: which detections count, whether they are what the prompt asked for, and the summary over tasks.

Pure functions on boxes; no model. A detection is a row [x1, y1, x2, y2, score] in pixels, x to the right, y down.
Source: the scorer published with GenEval (arXiv:2310.11513); `tests/golden/geneval` holds its answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # in the order of the tables
RELATIONS = ("above", "below", "left of", "right of")
NUM_PROMPTS, IMAGES_PER_PROMPT = 553, 4  # of the whole benchmark

Boxes = Mapping[str, Any]  # class name -> rows [N, 5] of x1, y1, x2, y2, score; lists or arrays
BoxColors = Mapping[str, Sequence[str | None]]  # class name -> colour of each of these rows; None if nobody asked


@dataclass(frozen=True)
class ScoringOptions:
    """The benchmark's thresholds; its published numbers use these defaults."""

    threshold: float = 0.3  # a box counts if its score is above
    counting_threshold: float = 0.9  # the same for the counting task
    max_objects: int = 16  # boxes kept per class
    max_overlap: float = 1.0  # a box with at least this IoU with a better one of its class is dropped; 1.0 is off
    position_threshold: float = 0.1  # offset that does not count, as a share of the summed box sizes


def judge_image(
    metadata: Mapping[str, Any],
    detections: Boxes,
    colors: BoxColors | None = None,
    **options: float,
) -> tuple[bool, str]:
    """Whether an image shows what its prompt asked for, and if not why.

    Args:
        metadata: the prompt's line of the benchmark: `tag`, and clauses under `include` and `exclude`.
        detections: class name -> rows [N, 5] of x1, y1, x2, y2, score; unsorted, as the detector gave them.
        colors: class name -> the colour of each of these rows; needed where `box_colors_needed` says so.
        options: fields of `ScoringOptions` that differ from the benchmark's.
    Returns:
        (correct, reason): one line per unmet clause. Two relations are named in alphabetical order; the published
        scorer names them in the order of a Python set, which varies between runs.
    Raises:
        ValueError: if a needed colour is missing, rows have another shape, or a position points to no earlier clause.
    """
    demands = _demands(metadata, detections, colors, ScoringOptions(**options))
    reasons = [demand.reason for demand in demands if demand.reason]
    return not reasons, "\n".join(reasons)


def partial_credit(
    metadata: Mapping[str, Any],
    detections: Boxes,
    colors: BoxColors | None = None,
    **options: float,
) -> float:
    """How much of what the prompt asked for is there, in [0, 1]; 1.0 exactly if `judge_image` says correct.

    Mean over the prompt's demands of the share that is met: boxes found of those wanted, boxes of the right colour,
    pairs in the wanted relation. A box too many (`exclude`) costs as much as one too few: 1 - |found - count| / count,
    not below 0. A colour or a position of objects that are missing is met by 0. Not a number of the benchmark.
    """
    demands = _demands(metadata, detections, colors, ScoringOptions(**options))
    shares = [demand.share for demand in demands if demand.share is not None]
    return float(np.mean(shares)) if shares else 1.0


def box_colors_needed(metadata: Mapping[str, Any], detections: Boxes, **options: float) -> dict[str, list[int]]:
    """The rows whose colour decides: class name -> indices into its raw rows, best score first."""
    kept = select_detections(metadata, detections, **options)
    needed: dict[str, list[int]] = {}
    for clause in metadata.get("include") or []:
        rows = kept.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(rows) == clause["count"]:
            known = needed.setdefault(clause["class"], [])
            known += [row for row in rows if row not in known]
    return needed


def select_detections(metadata: Mapping[str, Any], detections: Boxes, **options: float) -> dict[str, list[int]]:
    """The rows that count, best score first: class name -> indices into its raw rows; classes without any are absent.

    Scores are compared in float32, as the detector gives them: a score equal to the threshold does not count.
    """
    chosen = ScoringOptions(**options)
    threshold = chosen.counting_threshold if metadata.get("tag") == "counting" else chosen.threshold
    kept = {}
    for name, raw in detections.items():
        rows = _rows(name, raw)
        order = np.argsort(-rows[:, 4], kind="stable")
        order = order[rows[order, 4] > np.float32(threshold)][: chosen.max_objects]
        best: list[int] = []
        for index in order.tolist():
            if chosen.max_overlap == 1 or all(
                box_overlap(rows[better], rows[index]) < chosen.max_overlap for better in best
            ):
                best.append(index)
        if best:
            kept[name] = best
    return kept


def relative_position(a: Sequence[float], b: Sequence[float], position_threshold: float = 0.1) -> list[str]:
    """Where box a lies relative to box b: none, one or two of RELATIONS, in alphabetical order.

    With o the offset of the centres and s the summed sizes, per axis: |o| is reduced by position_threshold * s, not
    below 0, and divided by the length of the unreduced o; a relation holds beyond 0.5. A diagonal can have two.

    Args:
        a: box [x1, y1, x2, y2, ...]; b: likewise.
    """
    first, second = (np.asarray(box)[:4].reshape(2, 2) for box in (a, b))  # corners [2, 2]
    offset = first.mean(axis=0) - second.mean(axis=0)  # [2], x and y
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])  # [2]
    reduced = np.maximum(np.abs(offset) - position_threshold * sizes, 0) * np.sign(offset)
    if (np.abs(reduced) < 1e-3).all():
        return []
    x, y = reduced / np.linalg.norm(offset)
    holds = {"above": y < -0.5, "below": y > 0.5, "left of": x < -0.5, "right of": x > 0.5}
    return [relation for relation in RELATIONS if holds[relation]]


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2, ...] whose corners are pixels: sides are x2 - x1 + 1."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


@dataclass
class Summary:
    """Scores of a whole run, each in [0, 1]."""

    num_images: int
    num_prompts: int
    correct_images: float  # share of all images
    correct_prompts: float  # share of the prompts with at least one correct image
    task_scores: dict[str, float] = field(default_factory=dict)  # share of correct images per task
    overall: float = 0.0  # unweighted mean over the tasks
    credit: float | None = None  # mean partial credit, if it was recorded


def summarize(results: Iterable[Mapping[str, Any]]) -> Summary:
    """Summary of results, one mapping per image with `tag`, `correct` and `metadata` (the prompt's line as text).

    Raises:
        ValueError: if there is no result.
    """
    rows = list(results)
    if not rows:
        raise ValueError("no result to summarize: expected one per image, each with 'tag', 'correct' and 'metadata'")
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for row in rows:
        metadata = row["metadata"] if isinstance(row["metadata"], str) else json.dumps(row["metadata"])
        by_task.setdefault(row["tag"], []).append(bool(row["correct"]))
        by_prompt.setdefault(metadata, []).append(bool(row["correct"]))
    task_scores = {tag: float(np.mean(correct)) for tag, correct in by_task.items()}
    credits = [row["credit"] for row in rows if row.get("credit") is not None]
    return Summary(
        num_images=len(rows),
        num_prompts=len(by_prompt),
        correct_images=float(np.mean([bool(row["correct"]) for row in rows])),
        correct_prompts=float(np.mean([any(correct) for correct in by_prompt.values()])),
        task_scores=task_scores,
        overall=float(np.mean(list(task_scores.values()))),
        credit=float(np.mean(credits)) if credits else None,
    )


def format_summary(summary: Summary) -> str:
    """The summary as the published program prints it."""
    lines = [
        "Summary",
        "=======",
        f"Total images: {summary.num_images}",
        f"Total prompts: {summary.num_prompts}",
        f"% correct images: {summary.correct_images:.2%}",
        f"% correct prompts: {summary.correct_prompts:.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{tag},{score}" for tag, score in summary.task_scores.items()),
        f"Overall score,{summary.overall}",
        "",
    ]
    return "\n".join(lines)


def summary_table(summary: Summary) -> str:
    """A Markdown table of one row, columns in the order of the papers: overall, then the six tasks."""
    tasks = [*TASKS, *(tag for tag in summary.task_scores if tag not in TASKS)]
    scores = [f"{summary.task_scores[tag]:.2f}" if tag in summary.task_scores else "-" for tag in tasks]
    return "\n".join(
        [
            f"| Overall | {' | '.join(tag.replace('_', ' ') for tag in tasks)} |",
            f"| {' | '.join(['---'] * (len(tasks) + 1))} |",
            f"| {summary.overall:.2f} | {' | '.join(scores)} |",
        ]
    )


@dataclass(frozen=True)
class _Demand:
    """One thing that a prompt asks for: the share of it that is there, and a line to say if that is not all."""

    share: float | None  # None: contained in another demand's share
    reason: str = ""


def _demands(
    metadata: Mapping[str, Any], detections: Boxes, colors: BoxColors | None, options: ScoringOptions
) -> list[_Demand]:
    rows = {name: _rows(name, raw) for name, raw in detections.items()}
    kept = select_detections(metadata, rows, **vars(options))
    demands: list[_Demand] = []
    counted: dict[str, int] = {}  # class name -> place of the demand for its number
    groups: list[np.ndarray | None] = []  # per include clause: its boxes [count, 5], or None if it is not met
    for clause in metadata.get("include") or []:
        name, count = clause["class"], clause["count"]
        found = kept.get(name, [])[:count]
        counted.setdefault(name, len(demands))
        own = [_count_demand(name, count, len(found))]
        if "color" in clause:
            own.append(_Demand(0.0) if own[0].reason else _color_demand(clause, found, colors))
        met = not any(demand.reason for demand in own)
        boxes = rows[name][found] if found else np.zeros((0, 5), np.float32)
        if "position" in clause:
            own.append(_position_demand(clause, boxes, groups, options) if met else _Demand(0.0))
            met = met and not own[-1].reason
        demands += own
        groups.append(boxes if met else None)
    for clause in metadata.get("exclude") or []:
        name, count, found = clause["class"], clause["count"], len(kept.get(clause["class"], []))
        too_many = max(0, found - (count - 1))
        reason = f"expected {name}<{count}, found {found}" if too_many else ""
        lost = min(1.0, too_many / max(1, count - 1))
        if name in counted:  # wanted, but not too often: one demand
            counts = demands[counted[name]]
            demands[counted[name]] = replace(counts, share=max(0.0, counts.share - lost))
            demands.append(_Demand(None, reason))
        else:
            demands.append(_Demand(1 - lost, reason))
    return demands


def _count_demand(name: str, count: int, found: int) -> _Demand:
    if found >= count:
        return _Demand(1.0)
    return _Demand(found / count, f"expected {name}>={count}, found {found}")


def _color_demand(clause: Mapping[str, Any], found: list[int], colors: BoxColors | None) -> _Demand:
    name, count, wanted = clause["class"], clause["count"], clause["color"]
    given = list((colors or {}).get(name, []))
    seen = [given[row] if row < len(given) else None for row in found]
    if None in seen:
        raise ValueError(
            f"no colour for row {found[seen.index(None)]} of {name!r}, of which the prompt wants {count} {wanted}: "
            f"give colors[{name!r}] one entry per row (box_colors_needed names the rows that matter)"
        )
    right = seen.count(wanted)
    if right >= count:
        return _Demand(1.0)
    others = ", ".join(f"{seen.count(color)} {color}" for color in COLORS if color in seen)
    return _Demand(right / count, f"expected {wanted} {name}>={count}, found {right} {wanted}; and {others}")


def _position_demand(
    clause: Mapping[str, Any], boxes: np.ndarray, groups: list[np.ndarray | None], options: ScoringOptions
) -> _Demand:
    name = clause["class"]
    wanted, target = clause["position"]
    if not 0 <= target < len(groups):
        raise ValueError(
            f"position {clause['position']} of {name!r} points to no earlier clause: {len(groups)} precede"
        )
    targets = groups[target]
    if targets is None:
        return _Demand(0.0, f"no target for {name} to be {wanted}")
    pairs = [relative_position(box, other, options.position_threshold) for box in boxes for other in targets]
    wrong = [relations for relations in pairs if wanted not in relations]
    if not wrong:
        return _Demand(1.0)
    reason = f"expected {name} {wanted} target, found {' and '.join(wrong[0])} target"
    return _Demand(1 - len(wrong) / len(pairs), reason)


def _rows(name: str, raw: Any) -> np.ndarray:
    rows = np.asarray(raw, dtype=np.float32)
    if rows.size == 0:
        return np.zeros((0, 5), np.float32)
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(
            f"detections of {name!r} have shape {list(rows.shape)}, expected [N, 5]: x1, y1, x2, y2, score"
        )
    return rows
