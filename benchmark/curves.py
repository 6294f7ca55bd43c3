"""Curves of the scalars that a trainer logged: read, smoothed, drawn as inline SVG or as one small PNG."""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark.files import write_bytes

Curve = list[tuple[float, float]]  # (step, value) in step order; a value that is missing or not finite is nan

SMOOTHING = 40  # the dark line averages n // SMOOTHING entries to either side: about 5 % of the run
MAX_POINTS = 400  # drawn per SVG curve: lowest and highest of each bucket, so no spike is lost
PNG_COLORS = 48  # of the palette: a few lines and their antialiasing need no more

TRUTH = re.compile(r"(^|[/_])truth([/_]|$)")
REWARD = re.compile(r"^(eval_)?(reward|rewards/.+/mean)$")
POLICY = re.compile(r"^(eval_)?(kl|entropy)\b")

WIDTH, HEIGHT = 340, 170  # of an SVG chart; a unit is about a CSS pixel
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 24
RAW_COLOR, MEAN_COLOR, GRID_COLOR = "#9dbfe8", "#1f5fae", "#ecebe6"  # of the PNG; the page has them in its style sheet


def scalar_curves(log_history: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Every scalar of a log by name; `epoch` is left out.

    A value of None stays, as nan, and so does one that is not finite. An entry without `step` counts as its position
    in the list. A number written as text is read as a number.
    """
    curves: dict[str, Curve] = {}
    for position, entry in enumerate(log_history):
        step = to_number(entry.get("step", position))
        for name, raw in entry.items():
            value = math.nan if raw is None else to_number(raw)
            if name not in ("step", "epoch") and value is not None and step is not None:
                curves.setdefault(name, []).append((step, value if math.isfinite(value) else math.nan))
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items()}


def is_drawn(curve: Curve) -> bool:
    """Whether a curve has finite values at two steps or more."""
    return len({step for step, value in curve if not math.isnan(value)}) >= 2


def main_order(name: str) -> tuple[int, str]:
    """Sorting key: total reward, then each reward, truth, KL, entropy, then the rest by name."""
    if TRUTH.search(name):
        return 2, name
    if REWARD.match(name):
        return (0 if name == "reward" else 1), name
    return (3 if name.startswith("kl") else 4 if name.startswith("entropy") else 5), name


def plot_curves(log_history: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw rewards, truth, KL and entropy as small multiples into one PNG and return its path.

    Args:
        log_history: a trainer's log entries: dicts with `step` and scalars.
        path: the PNG to write, under 200 KB.
    Raises:
        ValueError: if no reward, truth, KL or entropy was logged at two steps.
        ImportError: without matplotlib.
    """
    curves = scalar_curves(log_history)
    patterns = (REWARD, TRUTH, POLICY)
    names = [n for n in sorted(curves, key=main_order) if is_drawn(curves[n]) and any(p.search(n) for p in patterns)]
    if not names:
        raise ValueError(
            f"nothing to draw in {len(log_history)} log entries: expected scalars like 'reward', 'rewards/clip/mean', "
            "'kl' or 'entropy' at two steps or more; train longer or log more often (--logging_steps 1)"
        )
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(3.6 * columns, 2.3 * rows)
    for position, name in enumerate(names, start=1):
        steps, values = zip(*curves[name])
        axes = figure.add_subplot(rows, columns, position)
        if len(values) >= SMOOTHING:
            axes.plot(steps, values, color=RAW_COLOR, linewidth=0.8)
        axes.plot(steps, centred_mean(values), color=MEAN_COLOR, linewidth=1.8)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=7, length=2)
        axes.grid(color=GRID_COLOR, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=8)
    return write_bytes(path, png_of(figure))


def new_figure(width: float, height: float):
    """An empty matplotlib figure of these inches at 100 pixels an inch; no window system is asked for.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the curves are drawn by matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def png_of(figure) -> bytes:
    """A figure as a PNG of few colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(PNG_COLORS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def svg_chart(name: str, curve: Curve) -> str:
    """One scalar as an HTML figure: name, last value, inline SVG, and its points for the page's pointer script."""
    finite = [(step, value) for step, value in curve if not math.isnan(value)]
    values = [value for _, value in finite]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    first, last = curve[0][0], curve[-1][0]
    floor = HEIGHT - BOTTOM

    def x(step: float) -> float:
        return round(LEFT + (step - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(floor - (value - low) / (high - low) * (floor - TOP), 1)

    lines = []
    for tick in nice_ticks(low, high) if min(values) < max(values) else values[:1]:
        lines.append(f'<line class="gridline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{_tick_text(tick)}</text>')
    for tick in nice_ticks(first, last):
        lines.append(f'<text x="{x(tick)}" y="{HEIGHT - 8}" text-anchor="middle">{_tick_text(tick)}</text>')
    lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    raw = _thin(curve)
    mean = _thin([(step, value) for (step, _), value in zip(curve, centred_mean([value for _, value in curve]))])
    if len(curve) >= SMOOTHING:
        lines.append(f'<path class="raw" d="{_svg_path(raw, x, y)}"/>')
    else:
        lines += [f'<circle class="dot" cx="{x(step)}" cy="{y(value)}" r="2.2"/>' for step, value in finite]
    lines.append(f'<path class="mean" d="{_svg_path(mean, x, y)}"/>')
    lines.append(
        f'<g class="cursor-group" visibility="hidden"><line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{floor}"/>'
        '<circle class="cursor-dot" cx="0" r="4"/></g>'
    )
    ends = [f"{number_text(value)} at step {number_text(step)}" for step, value in (finite[0], finite[-1])]
    points = [
        [x(step), y(value), f"step {number_text(step)}: {number_text(value)}"]
        for step, value in raw
        if not math.isnan(value)
    ]
    spoken = html.escape(f"{name}: {ends[0]}, {ends[1]}")
    gaps = len(curve) - len(finite)
    note = f'<p class="note">{gaps} of {len(curve)} values are missing or not finite.</p>' if gaps else ""
    return (
        f'<figure class="chart" data-points="{html.escape(json.dumps(points, ensure_ascii=False))}"><figcaption>'
        f'<span class="name">{html.escape(name)}</span><span class="value">{number_text(values[-1])}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">'
        f"{''.join(lines)}</svg>{note}</figure>"
    )


def centred_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each entry, n // SMOOTHING entries to either side, cut off at the ends; nan is skipped.

    Below SMOOTHING entries the window is one entry: the values themselves.
    """
    half = len(values) // SMOOTHING
    means = []
    for center in range(len(values)):
        window = [v for v in values[max(0, center - half) : center + half + 1] if not math.isnan(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them, at 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    spacing = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    digits = max(0, 1 - math.floor(math.log10(spacing)))
    return [round(i * spacing, digits) for i in range(math.ceil(low / spacing), math.floor(high / spacing + 1e-9) + 1)]


def to_number(value: Any) -> float | None:
    """A number, or text that is one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def number_text(value: float | None) -> str:
    """A number for a reader: four digits, or all of an integer; a dash if there is none."""
    if value is None or math.isnan(value):
        return "–"  # noqa: RUF001
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == round(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _tick_text(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"
    return text.replace("e-0", "e-")  # 2.5e-5 fits beside the axis


def _thin(curve: Curve) -> Curve:
    """About MAX_POINTS points at most: the lowest and the highest of each bucket, in step order."""
    if len(curve) <= MAX_POINTS:
        return curve
    size = math.ceil(2 * len(curve) / MAX_POINTS)
    kept: Curve = []
    for start in range(0, len(curve), size):
        bucket = [point for point in curve[start : start + size] if not math.isnan(point[1])]
        if bucket:
            kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
        else:
            kept.append(curve[start])
    return kept


def _svg_path(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """The `d` of a path; a nan lifts the pen."""
    commands, pen = [], "M"
    for step, value in curve:
        if math.isnan(value):
            pen = "M"
        else:
            commands.append(f"{pen}{x(step)} {y(value)}")
            pen = "L"
    return "".join(commands)
