"""One self-contained HTML page about a training run: curves, grids over time, before and after, settings, versions.

    python -m benchmark.report RUN [--out FILE] [--curves FILE]

Reads what a run folder holds and says on the page what it does not hold:

    trainer_state.json              Hugging Face `log_history`; that of the newest checkpoint-*/ if it reaches further
    samples/step-000050.png         grids of the run's fixed prompts, one a saved step
    before_after.png                the same prompts before and after training; the first and the last grid without it
    summary.json                    numbers of the run: reward_before, reward_after, truth_before, ..., seconds_train;
                                    without it the numbers on top are those of the log
    settings.json                   the arguments of the run; under "versions", if present, what it ran on

The page needs no server, no network and no other file.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.metadata
import io
import json
import logging
import math
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from benchmark.curves import (
    POLICY,
    REWARD,
    SMOOTHING,
    TRUTH,
    Curve,
    is_drawn,
    main_order,
    number_text,
    plot_curves,
    scalar_curves,
    svg_chart,
    to_number,
)
from benchmark.files import write_bytes

__all__ = ["Run", "main", "plot_curves", "read_run", "write_report"]

logger = logging.getLogger(__name__)

MAX_GRIDS = 60  # on the slider; more of them are thinned evenly, the first and the last stay
MAX_IMAGE_BYTES = 400_000  # a heavier picture is embedded as a JPEG at most MAX_IMAGE_WIDTH wide
MAX_IMAGE_WIDTH = 1600
VERSIONED = ("torch", "torchvision", "transformers", "trl", "accelerate", "open_clip_torch", "safetensors", "numpy")
SECRET = re.compile(r"(api_?key|secret|password|hub_token)$", re.IGNORECASE)
BEFORE_AFTER = re.compile(r"(.+)_(before|after)")

Pair = tuple[str, float | None, float | None]  # name, before, after


@dataclass
class Run:
    """What a run folder holds, and in `missing` one sentence for each thing it does not hold."""

    folder: Path
    log_history: list[dict[str, Any]] = field(default_factory=list)
    log_file: Path | None = None
    grids: list[tuple[int, Path]] = field(default_factory=list)  # (step, picture), by step
    before_after: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # part of the page -> sentence


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of one run and return its path.

    Args:
        run_dir: the run folder (what `output_dir` was).
        out: the file to write; RUN/report.html if None.
    Raises:
        ValueError: if `run_dir` is no folder, or holds none of the files that the page is made of.
    """
    run = read_run(run_dir)
    curves = scalar_curves(run.log_history)
    title = f"AR-GRPO run: {run.folder.resolve().name}"
    sections = [
        _header(title, run, curves),
        _before_after(run),
        _grids(run),
        _curves(run, curves),
        _numbers(run, curves),
        _settings(run),
        _versions(run),
    ]
    template = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(title=_escape(title), body="\n".join(sections))
    path = write_bytes(out if out is not None else run.folder / "report.html", page.encode("utf-8"))
    logger.info("wrote %s: %.1f MB", path, path.stat().st_size / 1e6)
    return path


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder; whatever it lacks is named in `missing`.

    Raises:
        ValueError: if it is no folder, or holds none of the files that the page is made of.
    """
    run = Run(Path(run_dir))
    if not run.folder.is_dir():
        raise ValueError(f"{run_dir} is no folder: expected the --output_dir of a training run")
    run.log_history, run.log_file = _read_log(run)
    if (path := run.folder / "summary.json").exists():  # of a quickstart; an ordinary run never has one
        run.summary = _read_json(run, "summary", path)
    run.settings = _read_json(run, "settings", run.folder / "settings.json")
    for picture in (run.folder / "samples").glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)\.(png|jpe?g|webp)", picture.name):
            run.grids.append((int(match[1]), picture))
    run.grids.sort()
    if not run.grids:
        run.missing["grids"] = "No grids: the folder has no samples/step-000000.png or the like."
    if (picture := run.folder / "before_after.png").is_file():
        run.before_after = picture
    elif len(run.grids) < 2:
        run.missing["before_after"] = (
            "No picture of before and after: the folder has no before_after.png and no two grids in samples/."
        )
    if not (run.log_history or run.grids or run.before_after or run.summary or run.settings):
        raise ValueError(
            f"{run_dir} is no run folder: nothing to read in trainer_state.json (or checkpoint-*/), "
            "samples/step-*.png, before_after.png, summary.json or settings.json; "
            "give the --output_dir of a training run"
        )
    return run


def _header(title: str, run: Run, curves: dict[str, Curve]) -> str:
    facts = "No training log"
    if run.log_file is not None and curves:
        source = run.log_file.relative_to(run.folder).as_posix()
        facts = f"{len(curves)} scalars up to step {number_text(_last_step(curves))}, from {source}"
    pairs, singles, note = _summary_numbers(run) if run.summary else _log_numbers(curves)
    tiles = []
    for name, before, after in pairs:
        tone = ""
        if before is not None and after is not None and name.startswith(("reward", "truth")):
            tone = ' class="up"' if after > before else ' class="down"' if after < before else ""
        tiles.append(
            f'<div class="tile"><span>{_breakable(name)}</span><b>{number_text(before)} → {number_text(after)}</b>'
            f"<span{tone}>{_change(before, after)}</span></div>"
        )
    for name, value in singles:
        label, shown = _label(name, value)
        tiles.append(f'<div class="tile"><span>{_breakable(label)}</span><b>{_escape(shown)}</b></div>')
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<header><h1>{_escape(title)}</h1><p class="soft">{_escape(facts)}. Page written {written}.</p></header>'
        f'{_missing(run, "summary")}<div class="tiles">{"".join(tiles)}</div>{note}'
    )


def _summary_numbers(run: Run) -> tuple[list[Pair], list[tuple[str, Any]], str]:
    """What the tiles show of a summary: pairs, single numbers, and the sentence below them."""
    singles = [item for item in run.summary.items() if not BEFORE_AFTER.fullmatch(item[0])]
    return _pairs(run.summary), [item for item in singles if to_number(item[1]) is not None], ""


def _log_numbers(curves: dict[str, Curve]) -> tuple[list[Pair], list[tuple[str, Any]], str]:
    """The same of a log: rewards, KL and entropy from their first entry to the mean of their last tenth."""
    if not curves:
        return [], [], ""
    pairs: list[Pair] = []
    for name in sorted(curves, key=main_order):
        if is_drawn(curves[name]) and (REWARD.match(name) or name in ("kl", "entropy")):
            values = _finite(curves[name])
            pairs.append((name, values[0], _mean_of_last_tenth(values)))
    singles: list[tuple[str, Any]] = [("steps", _last_step(curves))]
    if runtimes := _finite(curves.get("train_runtime", [])):
        singles.append(("seconds_train", runtimes[-1]))
    what = '<p class="soft">Numbers of the training log: first entry → mean of the last tenth of the entries.</p>'
    return pairs, singles, what if pairs else ""


def _before_after(run: Run) -> str:
    body = _missing(run, "before_after")
    if run.before_after is not None:
        picture = _picture(run.before_after, "The same prompts before and after training")
        body = f'<div class="panel">{_scroll(picture, "Before and after", "shots")}</div>'
    elif len(run.grids) >= 2:
        figures = [
            f"<figure><figcaption>step {step:,}</figcaption>"
            f"{_picture(path, f'The fixed prompts at step {step:,}')}</figure>"
            for step, path in (run.grids[0], run.grids[-1])
        ]
        body = (
            '<p class="soft">The first and the last grid: the same prompts and the same noise, each row from the best '
            "sample to the worst. Both are larger below, under Samples over time.</p>"
            f'<div class="panel">{_scroll("".join(figures), "First and last grid", "shots pair")}</div>'
        )
    return f"<section><h2>Before and after</h2>{body}</section>"


def _grids(run: Run) -> str:
    if not run.grids:
        return f"<section><h2>Samples over time</h2>{_missing(run, 'grids')}</section>"
    kept, note = run.grids, "The fixed prompts of the run, as they were drawn at each saved step."
    if len(kept) > MAX_GRIDS:
        picks = sorted({round(i * (len(kept) - 1) / (MAX_GRIDS - 1)) for i in range(MAX_GRIDS)})
        kept = [kept[i] for i in picks]
        note += f" {len(kept)} of {len(run.grids)} grids are on this page."
    figures = [
        f'<figure data-label="step {step:,}">{_picture(path, f"Grid of samples at step {step:,}")}'
        f"<figcaption>step {step:,}</figcaption></figure>"
        for step, path in kept
    ]
    last = len(figures) - 1
    return (
        f'<section><h2>Samples over time</h2><p class="soft">{note}</p><div class="panel frames">'
        '<div class="slider" hidden><label for="grid-step">Step</label>'
        f'<input id="grid-step" type="range" min="0" max="{last}" value="{last}" step="1">'
        f'<output for="grid-step"></output></div>{_scroll("".join(figures), "Grids", "shots")}</div></section>'
    )


def _curves(run: Run, curves: dict[str, Curve]) -> str:
    drawn = sorted((name for name, curve in curves.items() if is_drawn(curve)), key=main_order)
    truth = [name for name in drawn if TRUTH.search(name)]
    rewards = [name for name in drawn if REWARD.match(name) and name not in truth]
    policy = [name for name in drawn if POLICY.match(name) and name not in truth]
    others = [name for name in drawn if name not in {*truth, *rewards, *policy}]

    def charts(names: list[str]) -> str:
        return f'<div class="charts">{"".join(svg_chart(name, curves[name]) for name in names)}</div>'

    parts = [_missing(run, "log")]
    if drawn:
        parts.append(
            '<p class="soft">Horizontal axis: step. Pale line: every logged value. Dark line: its mean over the '
            f"nearest {200 // SMOOTHING} % of the entries (below {SMOOTHING} entries, the values themselves). "
            "The point under the pointer or finger is spelled out above its curve.</p>"
        )
        parts.append("<h2>Rewards</h2>" + (charts(rewards) or '<p class="missing">None was logged.</p>'))
        if truth:
            parts.append(f"<h2>Truth: measured, not trained on</h2>{charts(truth)}")
        parts.append("<h2>KL and entropy</h2>" + _absent({"kl", "entropy"} - set(policy)) + charts(policy))
    elif run.log_history:
        parts.append('<p class="missing">No scalar was logged at two steps: there is no curve to draw.</p>')
    if others:
        parts.append(f"<details><summary>{len(others)} more curves</summary>{charts(others)}</details>")
    return f"<section><h2>Curves</h2>{''.join(parts)}</section>"


def _numbers(run: Run, curves: dict[str, Curve]) -> str:
    parts = []
    if pairs := _pairs(run.summary):
        head = '<tr><th>measured</th><th class="n">before</th><th class="n">after</th><th class="n">change</th></tr>'
        rows = [_cells(name, number_text(a), number_text(b), _change(a, b)) for name, a, b in pairs]
        parts.append(_table(rows, "Before and after", head))
    rest = [item for item in run.summary.items() if not BEFORE_AFTER.fullmatch(item[0]) or to_number(item[1]) is None]
    if rest:
        parts.append(_table([_row(*_label(name, value)) for name, value in rest], "Numbers of the run"))
    if curves:
        head = (
            '<tr><th>scalar</th><th class="n">last</th><th class="n">first</th><th class="n">lowest</th>'
            '<th class="n">highest</th><th class="n">mean, last tenth</th><th class="n">entries</th></tr>'
        )
        table = _table([_scalar_row(name, curves[name]) for name in sorted(curves, key=main_order)], "Scalars", head)
        parts.append(f"<details open><summary>Every logged scalar</summary>{table}</details>")
    return f"<section><h2>Numbers</h2>{''.join(parts)}</section>" if parts else ""


def _scalar_row(name: str, curve: Curve) -> str:
    values = _finite(curve)
    numbers: list[float | None] = [None] * 5
    if values:
        numbers = [values[-1], values[0], min(values), max(values), _mean_of_last_tenth(values)]
    gaps = len(curve) - len(values)
    count = f"{len(curve):,}" + (f" ({gaps} not finite)" if gaps else "")
    return _cells(name, *map(number_text, numbers), count)


def _finite(curve: Curve) -> list[float]:
    return [value for _, value in curve if not math.isnan(value)]


def _mean_of_last_tenth(values: list[float]) -> float:
    tail = values[-math.ceil(len(values) / 10) :]
    return sum(tail) / len(tail)


def _last_step(curves: dict[str, Curve]) -> float:
    return max(curve[-1][0] for curve in curves.values())


def _settings(run: Run) -> str:
    flat = _flatten({key: value for key, value in run.settings.items() if key != "versions"})
    if isinstance(command := run.settings.get("command"), list):
        flat["command"] = shlex.join(map(str, command))
    rows = [
        _row(name, "(hidden)" if SECRET.search(name) and value != "None" else value) for name, value in flat.items()
    ]
    body = f"<details><summary>{len(rows)} settings</summary>{_table(rows, 'Settings')}</details>" if rows else ""
    return f"<section><h2>Settings</h2>{_missing(run, 'settings')}{body}</section>"


def _versions(run: Run) -> str:
    versions, note = run.settings.get("versions"), "As the run wrote them down."
    if not isinstance(versions, dict) or not versions:
        versions, note = _installed_versions(), "Read when this page was written: the run wrote none down."
    rows = [_row(name, value) for name, value in _flatten(versions).items()]
    return f'<section><h2>Versions</h2><p class="soft">{note}</p>{_table(rows, "Versions")}</section>'


def _installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _read_log(run: Run) -> tuple[list[dict[str, Any]], Path | None]:
    """The log that reaches furthest: the run folder's own, or the newest checkpoint's while training still goes on."""
    checkpoints = [path for path in run.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    checkpoints.sort(key=lambda path: int(path.name.partition("-")[2]))
    logs = []
    for folder in (run.folder, *checkpoints[-1:]):
        if (path := folder / "trainer_state.json").is_file():
            state = _read_json(run, "log", path)
            log = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
            logs.append((to_number(state.get("global_step")) or 0.0, len(log), log, path))
    if not logs:
        run.missing["log"] = "No curves: neither the folder nor a checkpoint-*/ in it has a trainer_state.json."
        return [], None
    _, _, log, path = max(logs, key=lambda entry: entry[:2])
    if not log:
        run.missing.setdefault("log", f"No curves: the log_history in {path.name} is empty.")
    return log, path


def _read_json(run: Run, part: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        run.missing[part] = f"The folder has no {path.name}."
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        run.missing[part] = f"{path.name} cannot be read: {error}."
        return {}
    if not isinstance(content, dict):
        run.missing[part] = f"{path.name} holds a {type(content).__name__}, expected names and values."
        return {}
    return content


def _pairs(summary: dict[str, Any]) -> list[Pair]:
    """Each number that the summary holds as NAME_before or NAME_after."""
    names = dict.fromkeys(match[1] for key in summary if (match := BEFORE_AFTER.fullmatch(key)))
    pairs = [
        (name, to_number(summary.get(f"{name}_before")), to_number(summary.get(f"{name}_after"))) for name in names
    ]
    return [pair for pair in pairs if pair[1] is not None or pair[2] is not None]


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.3g}"


def _label(name: str, value: Any) -> tuple[str, str]:
    """Name and value for a reader: ("seconds_train", 252.0) -> ("time, train", "4 min 12 s")."""
    number = to_number(value)
    if number is None:
        return name, _plain(value)
    if not name.startswith("seconds_") or not math.isfinite(number):
        return name, number_text(number)
    hours, rest = divmod(round(number), 3600)
    minutes, seconds = divmod(rest, 60)
    shown = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{number:.3g} s"
    return f"time, {name.removeprefix('seconds_')}", shown


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _picture(path: Path, alt: str) -> str:
    """An <img> that holds its picture, a heavy one as a smaller JPEG; a sentence if it cannot be read."""
    from PIL import Image

    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height, kind = image.width, image.height, image.get_format_mimetype()
            if len(data) > MAX_IMAGE_BYTES:
                small = image.convert("RGB")
                small.thumbnail((MAX_IMAGE_WIDTH, 4 * MAX_IMAGE_WIDTH))
                buffer = io.BytesIO()
                small.save(buffer, format="JPEG", quality=88)
                data, kind = buffer.getvalue(), "image/jpeg"
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        return f'<p class="missing">{_escape(path.name)} cannot be read: {_escape(error)}</p>'
    style = ' class="small"' if width < 640 else ""
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img{style} alt="{_escape(alt)}" width="{width}" height="{height}" src="data:{kind};base64,{encoded}">'


def _missing(run: Run, part: str) -> str:
    return f'<p class="missing">{_escape(run.missing[part])}</p>' if part in run.missing else ""


def _absent(names: set[str]) -> str:
    return f'<p class="missing">Not logged: {", ".join(sorted(names))}.</p>' if names else ""


def _table(rows: list[str], label: str, head: str = "") -> str:
    head = f"<thead>{head}</thead>" if head else ""
    return _scroll(f"<table>{head}<tbody>{''.join(rows)}</tbody></table>", label)


def _scroll(body: str, label: str, kind: str = "") -> str:
    """A box as wide as the page that scrolls sideways where its body is wider."""
    inner = f'<div class="{kind}">{body}</div>' if kind else body
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_escape(label)}">{inner}</div>'


def _row(name: str, value: Any) -> str:
    return f'<tr><th scope="row">{_breakable(name)}</th><td class="text">{_escape(value)}</td></tr>'


def _cells(name: str, *numbers: str) -> str:
    cells = "".join(f'<td class="n">{_escape(number)}</td>' for number in numbers)
    return f'<tr><th scope="row">{_breakable(name)}</th>{cells}</tr>'


def _breakable(name: str) -> str:
    """A name that a narrow column breaks after a slash, an underscore or a dot."""
    return re.sub(r"(?<=[/_.])", "<wbr>", _escape(name))


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmark.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder: what --output_dir was")
    parser.add_argument("--out", type=Path, help="the page to write; RUN/report.html by default")
    parser.add_argument("--curves", type=Path, help="also draw the main curves into this PNG, as for a README")
    args = parser.parse_args(argv)
    for option, path, name in (("--out", args.out, "report.html"), ("--curves", args.curves, "curves.png")):
        if path is not None and path.is_dir():
            parser.error(f"{option} {path} is a folder: give the file to write, like {path / name}")
    try:
        written = [write_report(args.run, args.out)]
        if args.curves is not None:
            written.append(plot_curves(read_run(args.run).log_history, args.curves))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error}: --out and --curves take a file in a folder that can be written")
    sys.stdout.writelines(f"{path}\n" for path in written)


if __name__ == "__main__":
    main()
