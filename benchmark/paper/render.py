"""Tables and findings as Markdown, figures as PNG: our numbers, mean ± standard error over seeds, and printed ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml

from benchmark.archives import ImageArchive
from benchmark.clusters import Estimate, estimate
from benchmark.curves import GRID_COLOR, new_figure, png_of, scalar_curves
from benchmark.entropy import LINE_COLORS
from benchmark.geneval.evaluate import open_picture, pictures_of, prompt_folders
from benchmark.paper.costs import spent_in_words
from benchmark.paper.exhibits import CLAIMS, METRICS, Curves, Row, Samples, Table, columns_of, metrics_of
from benchmark.paper.plan import EXPERIMENTS, QUARTERS, TOY_CHANGES, Point, Unavailable, resolve
from benchmark.paper.results import (
    CONFIDENCE,
    HOLDS,
    LEANING,
    LEANS,
    LEANS_AWAY,
    NOISE,
    NOT_MEASURABLE,
    NOT_MEASURED,
    OPPOSITE,
    Finding,
    certain_from,
    find,
    jobs_of,
    measured_at,
    needs_of,
    over_seeds,
)
from benchmark.paper.run import Workspace, step_of
from dataset.labels import load_class_names
from llamagen.grids import labelled_grid, save_png

PRINTED = Path(__file__).with_name("printed.yaml")
NOT_AT_HAND = "not at hand"
READ_AT_ONCE = 256  # images of an archive
SHOWN_ROWS, SHOWN_SAMPLES = 6, 8  # conditions and samples of each in a figure of pictures


@dataclass(frozen=True)
class Printed:
    """Numbers of printed.yaml: table -> row's label -> metric -> number; and what the sources are called."""

    tables: dict[int, dict[str, dict[str, Any]]]
    sources: dict[str, str]

    def text(self, table: int, label: str, metric: str) -> str:
        """A printed number as it stands there, or that it is not at hand; nothing for what only the toy world has."""
        absent = "" if METRICS[metric].only == "toy" else NOT_AT_HAND
        return str(self.tables.get(table, {}).get(label, {}).get(metric, absent))


def load_printed(path: Path = PRINTED) -> Printed:
    """Read printed.yaml.

    Raises:
        ValueError: for a row without a known source, or a metric that there is not.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for number, rows in content["tables"].items():
        for label, row in rows.items():
            if row.get("source") not in content["sources"]:
                raise ValueError(f"{path}: table {number}, {label!r} needs a source of {sorted(content['sources'])}")
            if strangers := row.keys() - METRICS.keys() - {"source"}:
                raise ValueError(f"{path}: table {number}, {label!r} has {sorted(strangers)}, no metric of ours")
    return Printed(content["tables"], content["sources"])


def table_markdown(
    workspace: Workspace, number: int, table: Table, seeds: Sequence[int], printed: Printed, command: str
) -> str:
    """A table: a line of ours for each row, and below it one of the printed numbers if there are any."""
    columns = columns_of(table, workspace.scale.name)
    lines = [
        f"# Table {number}: {table.title}",
        "",
        _about(workspace, seeds, command),
        "",
        _row(["", "", *(METRICS[name].title for name in columns)]),
        _row(["---", "---", *("---:" for _ in columns)]),
    ]
    notes: list[str] = []
    for row in table.rows:
        cells = _our_cells(workspace, table, row, columns, seeds, notes)
        lines.append(_row([row.label, "ours", *cells]))
        if row.label in printed.tables.get(number, {}):
            lines.append(_row(["", "printed", *(printed.text(number, row.label, name) for name in columns)]))
    sources = sorted({row["source"] for row in printed.tables.get(number, {}).values()})
    lines += ["", *(f"- {note}" for note in dict.fromkeys(notes))]
    lines += [f"- printed: {printed.sources[source].strip()}" for source in sources]
    lines += [
        f"- printed numbers that are {NOT_AT_HAND}, of whole rows or single ones, go into benchmark/paper/printed.yaml"
    ]
    jobs, _ = jobs_of(needs_of(table, workspace.scale.name), workspace.scale.name, seeds)
    lines += [f"- took {spent_in_words(workspace, jobs)}"]
    return "\n".join(lines) + "\n"


def findings_markdown(workspace: Workspace, seeds: Sequence[int], command: str) -> str:
    """docs/findings.md: every claim beside its numbers, with a verdict by one rule."""
    lines = [
        "# What the toy world says about the paper's findings",
        "",
        f"Written by `{command}`; do not edit. Claims are in `benchmark/paper/exhibits.py`, experiments in "
        "`benchmark/paper/plan.py`.",
        "",
        _about(workspace, seeds, command),
        "",
        "**Rule.** Each seed gives one difference between the two policies that a claim compares, with the same "
        "sampling noise for both. The claim holds, or the opposite was measured, if Student's t interval of "
        f"{CONFIDENCE:.0%} over seeds leaves zero out ({certain_from(len(seeds)):.1f} standard errors for {len(seeds)} "
        f"seeds). Otherwise it is not measurable with these seeds: a difference of more than {LEANING:g} standard "
        "errors leans one way, a smaller one is within the noise. "
        "Among so many claims one or two cross a border by chance: read the numbers, not only the verdict.",
        "",
        "FID, sFID, Inception Score, precision and recall are computed on the features of the toy CLIP, which is one "
        "of the rewards, and so not independent of training. Truth is the share of samples in which a checker without "
        "learned parts, which no reward uses, finds what was asked for.",
        "",
        "The paper's own wording was not at hand: its findings stand here as questions that the toy world can answer.",
    ]
    findings = {section: [find(workspace, claim, seeds) for claim in claims] for section, claims in CLAIMS.items()}
    lines += ["", _in_short([finding for several in findings.values() for finding in several])]
    for section in CLAIMS:
        lines += [
            "",
            f"## {section}",
            "",
            _row(["claim", "number", "this policy", "the other", "difference", "verdict"]),
            _row(["---", "---", "---:", "---:", "---:", "---"]),
        ]
        lines += [_finding_row(found, len(seeds)) for found in findings[section]]
    compared = {point.experiment for claims in CLAIMS.values() for one in claims for point in (one.point, one.other)}
    notes = [f"- {name}: {one.toy_note}" for name, one in EXPERIMENTS.items() if one.toy_note and name in compared]
    return "\n".join([*lines, "", "Experiments that need a word:", "", *notes]) + "\n"


def figure_png(workspace: Workspace, figure: Curves, seeds: Sequence[int]) -> tuple[bytes, dict[str, Any]]:
    """Curves with a band of one standard error over seeds, and the same as data: panel -> line -> points.

    Raises:
        ValueError: if nothing of it was measured yet.
    """
    data: dict[str, Any] = {}
    for label, name in figure.experiments:
        for panel, points in _lines_of(workspace, figure, name, seeds).items():
            if points:
                data.setdefault(panel, {})[label] = points
    if not data:
        raise ValueError("nothing of this figure was measured yet")
    return _draw(data), data


def curves_markdown(data: dict[str, Any]) -> str:
    """What `figure_png` gives as tables: a panel each, its lines at the ends and the quarters of the run."""
    lines = []
    for panel, by_label in data.items():
        last = max(step for points in by_label.values() for step, _, _ in points)
        steps = sorted({step for points in by_label.values() for step in _nearest_quarters(points, last)})
        lines += [
            f"**{panel}**",
            "",
            _row(["", *(f"step {step:g}" for step in steps)]),
            _row(["---", *("---:" for _ in steps)]),
        ]
        for label, points in by_label.items():
            found = {step: f"{mean:.3f} ± {error:.3f}" for step, mean, error in points}
            lines.append(_row([label, *(found.get(step, "") for step in steps)]))
        lines.append("")
    return "\n".join([*lines, f"The printed curves' numbers are {NOT_AT_HAND}.\n"])


def samples_png(workspace: Workspace, figure: Samples, seed: int, out: Path) -> Path:
    """Write a figure of pictures: for each of some conditions a row for each policy, the same noise in a column.

    Raises:
        FileNotFoundError: if samples are missing.
        Unavailable: if this scale has no such run.
    """
    by_label = {}
    for label, point in figure.points:
        run = resolve(point.experiment, workspace.scale.name, seed)
        path = workspace.samples_path(run, Point(run.name, point.quarter, point.guidance))
        by_label[label] = _pictures(path, run.settings.get("class_names"))
    rows, titles = [], []
    for condition in next(iter(by_label.values())):
        for label, pictures in by_label.items():
            rows.append(pictures[condition])
            titles.append(f"{condition}, {label}")
    shown = min(len(row) for row in rows)
    images = torch.from_numpy(np.concatenate([row[:shown] for row in rows])).permute(0, 3, 1, 2).float() / 255
    save_png(labelled_grid(images, titles, [""] * len(images)), out)
    return out


def number_text(found: Estimate, digits: int, num_seeds: int | None = None, sign: str = "") -> str:
    """Mean ± standard error; with the number of seeds if they are not all there."""
    if found.mean is None:
        return ""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    few = f" (n = {found.num_clusters})" if num_seeds not in (None, found.num_clusters) else ""
    return f"{found.mean:{sign}.{digits}f}{error}{few}"


def _about(workspace: Workspace, seeds: Sequence[int], command: str) -> str:
    scale = {
        "toy": "Toy world: nano policies on drawn shapes, CLIP features in Inception's place, "
        f"{TOY_CHANGES['max_steps']} steps of 64 samples at a rate of {TOY_CHANGES['learning_rate']:g}. Not comparable "
        "with printed numbers; the directions are.",
        "full": "Full scale, by the paper's configurations.",
    }[workspace.scale.name]
    return f"{scale} Mean ± standard error over seeds {', '.join(map(str, seeds))}. Command: `{command}`"


def _our_cells(
    workspace: Workspace, table: Table, row: Row, columns: list[str], seeds: Sequence[int], notes: list[str]
) -> list[str]:
    experiment = EXPERIMENTS[row.point.experiment]
    if workspace.scale.name == "toy" and experiment.toy_note:
        notes.append(f"{row.point.experiment}: {experiment.toy_note}")
    measured = metrics_of(table, row, workspace.scale.name)
    cells = []
    for name in columns:
        try:
            values = over_seeds(workspace, row.point, name, seeds) if name in measured else {}
        except Unavailable as reason:
            notes.append(f"{row.label}: {reason}")
            return ["-" for _ in columns]
        empty = "" if name not in measured else "not yet"
        if empty and METRICS[name].group == "log" and _is_trained(workspace, row.point, seeds):
            empty = "not logged"  # TRL computes no KL where it has no weight
        cells.append(number_text(estimate(values.values()), METRICS[name].digits, len(seeds)) or empty)
    return cells


def _is_trained(workspace: Workspace, point: Point, seeds: Sequence[int]) -> bool:
    return all(workspace.is_trained(resolve(point.experiment, workspace.scale.name, seed)) for seed in seeds)


def _in_short(findings: Sequence[Finding]) -> str:
    """One sentence that counts the verdicts."""

    def count(verdict: str) -> int:
        return sum(finding.verdict == verdict for finding in findings)

    noisy = [count(verdict) for verdict in (LEANS, LEANS_AWAY, NOISE)]
    short = (
        f"In short, of {len(findings)} claims: holds {count(HOLDS)}; does not hold, the opposite was measured "
        f"{count(OPPOSITE)}; not measurable with these seeds {sum(noisy)}, of which {noisy[0]} lean that way, "
        f"{noisy[1]} the other way and {noisy[2]} are within the noise; not measurable in the toy world "
        f"{count(NOT_MEASURABLE)}"
    )
    return f"{short}; not measured yet {count(NOT_MEASURED)}." if count(NOT_MEASURED) else f"{short}."


def _finding_row(found: Finding, num_seeds: int) -> str:
    digits = METRICS[found.claim.metric].digits
    reason = f": {found.reason}" if found.verdict == NOT_MEASURABLE else ""
    estimates = [number_text(one, digits) for one in (found.point, found.other)]
    difference = number_text(found.difference, digits, num_seeds, sign="+")
    verdict = f"{found.verdict}{reason}"
    return _row([found.claim.text, METRICS[found.claim.metric].title, *estimates, difference, verdict])


def _lines_of(
    workspace: Workspace, figure: Curves, name: str, seeds: Sequence[int]
) -> dict[str, list[tuple[float, float, float]]]:
    """Panel -> points (step, mean, standard error) of an experiment."""
    try:
        runs = [resolve(name, workspace.scale.name, seed) for seed in seeds]
    except Unavailable:
        return {}
    lines = {}
    logs = [scalar_curves(workspace.log(run)) for run in runs] if figure.logged else []
    for scalar in figure.logged:
        steps: dict[float, list[float]] = {}
        for curves in logs:
            for step, value in curves.get(scalar, []):
                if not math.isnan(value):
                    steps.setdefault(step, []).append(value)
        lines[scalar] = [(step, fmean(values), _error(values)) for step, values in sorted(steps.items())]
    for metric in measured_at(figure, workspace.scale.name):
        points = []
        for quarter in range(QUARTERS + 1):
            values = [*over_seeds(workspace, Point(name, quarter), metric, seeds).values()]
            if values:
                points.append((float(step_of(runs[0], Point(name, quarter))), fmean(values), _error(values)))
        lines[METRICS[metric].title] = points
    return lines


def _nearest_quarters(points: Sequence[tuple[float, float, float]], last: float) -> list[float]:
    """The steps of a line that lie nearest to 0, 1/4 ... 1 of `last`."""
    steps = [step for step, _, _ in points]
    return [min(steps, key=lambda step: abs(step - last * quarter / QUARTERS)) for quarter in range(QUARTERS + 1)]


def _error(values: Sequence[float]) -> float:
    return estimate(values).standard_error or 0.0


def _draw(data: dict[str, dict[str, list]]) -> bytes:
    width = min(3, len(data))
    figure = new_figure(3.8 * width, 2.7 * math.ceil(len(data) / width))
    for number, (panel, lines) in enumerate(data.items(), 1):
        axes = figure.add_subplot(math.ceil(len(data) / width), width, number)
        for color, (label, points) in zip(LINE_COLORS * len(lines), lines.items()):
            steps, means, errors = (np.array(column) for column in zip(*points))
            axes.plot(steps, means, color=color, linewidth=1.6, marker="o" if len(steps) < 9 else None, label=label)
            axes.fill_between(steps, means - errors, means + errors, color=color, alpha=0.2, linewidth=0)
        axes.set_title(panel, fontsize=9, loc="left")
        axes.tick_params(labelsize=7, length=2)
        axes.grid(color=GRID_COLOR, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1 and len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    figure.supxlabel("step", fontsize=8)
    return png_of(figure)


def _pictures(path: Path, class_names: str | None) -> dict[str, np.ndarray]:
    """Some conditions, evenly spread -> images uint8 [n, H, W, 3], in the order of their noise."""
    if not path.exists():
        raise FileNotFoundError(f"no samples {path}: run the figure without --dry-run first")
    if path.is_file():
        return _class_pictures(path, load_class_names(class_names or "imagenet"))
    found = {}
    for folder in _spread(prompt_folders(path)):
        caption = json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))["prompt"]
        found[caption] = np.stack([np.asarray(open_picture(one)) for one in pictures_of(folder)[:SHOWN_SAMPLES]])
    return found


def _class_pictures(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The same of an archive of test.sh, which may be larger than the memory."""
    with np.load(path) as content:
        labels = content["arr_1"]
    found: dict[int, list[np.ndarray]] = {int(label): [] for label in _spread([*np.unique(labels)])}
    rows = iter(labels.tolist())
    for batch in ImageArchive(path).batches(READ_AT_ONCE):
        for image, label in zip(batch, rows):
            if label in found and len(found[label]) < SHOWN_SAMPLES:
                found[label].append(image.copy())
    return {names[label]: np.stack(images) for label, images in found.items()}


def _spread(conditions: Sequence) -> Sequence:
    return conditions[:: max(1, len(conditions) // SHOWN_ROWS)][:SHOWN_ROWS]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
