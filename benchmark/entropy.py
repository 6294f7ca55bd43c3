"""Token entropy of policies along their own samples: a curve over the checkpoints of runs, as PNG and JSON.

    python -m benchmark.entropy runs/c2i_B_256                          # where it started, every checkpoint, the end
    python -m benchmark.entropy base runs/A/checkpoint-* runs/B/final   # two runs in one picture
    python -m benchmark.entropy t2i_XL_256 --prompts data/drawbench/drawbench_test_1000.json

Every checkpoint draws the same conditions with the same seeds under guidance. Its codes are then replayed, and the
entropy of the distribution over the next code, -sum p log p in nats, is taken of the conditional and of the guided
policy: what the trainer logs as `entropy/conditional` and `entropy/guided`, after temperature and filters. A policy
that was measured with the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from benchmark import sample_captions, sample_classes
from benchmark.clusters import Estimate, estimate, estimate_text, paired_change
from benchmark.curves import GRID_COLOR, new_figure, png_of
from benchmark.files import write_bytes, write_json
from benchmark.models import BASE, CONFIG_NAME, FINAL, arguments_of_run, find_policy, fingerprint, load_policy
from benchmark.sampling import DrawSettings, draw_codes, sample_seed
from dataset.captions import load_captions
from llamagen import LlamaGenForCausalLM
from llamagen.devices import pick_device
from llamagen.text import CLEANING_VERSION, CaptionEncoder, encoder_identity
from llamagen.text_store import StoredTextEncoder, load_text_encoder

logger = logging.getLogger(__name__)

# Legend: B samples drawn at once, P condition positions, T codes, V codebook size

KINDS = ("conditional", "guided")
LINE_COLORS = ("#1f5fae", "#c2552d", "#2e8b57", "#7a4fa3", "#8a6d1d", "#555555")
MEASURED_FOLDER = "measured"  # below the output: one file per policy and settings

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A policy and its place in a curve.

    Attributes:
        path: its weights.
        run: folder of its run; None for a policy of no run.
        step: optimizer steps, 0 for a policy that a run started from; None where nothing tells.
    """

    path: Path
    run: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class Entropies:
    """Token entropies of one policy in nats, by kind: "conditional", and "guided" where guidance is on.

    Attributes:
        by_condition: condition (class id or caption, as text) -> mean over its samples and their T codes.
        by_position: mean over all samples of each of the T codes.
        vocab_size: V; log V is the entropy of a policy that knows nothing.
    """

    by_condition: dict[str, dict[str, float]]
    by_position: dict[str, list[float]]
    vocab_size: int


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: measure what is not measured yet, write JSON and PNG, print a table."""
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        result = measure_checkpoints(options)
        write_json(options.output / "entropy.json", result)
        write_bytes(options.output / "entropy.png", draw_curves(result["checkpoints"]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{format_table(result)}\n{options.output / 'entropy.json'}\n{options.output / 'entropy.png'}\n")


def measure_checkpoints(options: argparse.Namespace) -> dict[str, Any]:
    """What entropy.json holds: settings, and per checkpoint means, standard errors and entropies by position.

    Raises:
        FileNotFoundError, ValueError: for checkpoints or conditions that are not there, or policies of another task or
            other classes.
    """
    for name in ("num_conditions", "num_per_condition"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: it takes at least 1")
    base = options.base_policy or (sample_captions.DEFAULT_BASE if options.prompts else sample_classes.DEFAULT_BASE)
    checkpoints = find_checkpoints(options.checkpoints, base, options.runs)
    captions = _read_captions(options) if options.prompts else None
    meter = _Meter(options, captions)
    entries, first = [], None
    for number, checkpoint in enumerate(checkpoints, 1):
        logger.info("%d of %d: %s", number, len(checkpoints), checkpoint.path)
        found = meter.measure(checkpoint.path)
        first = first or found
        if found.by_condition["conditional"].keys() != first.by_condition["conditional"].keys():
            raise ValueError(f"{checkpoint.path} has other classes than {checkpoints[0].path}: name --labels of both")
        entries.append(
            {
                "policy": str(checkpoint.path),
                "run": checkpoint.run,
                "step": checkpoint.step,
                "log_v": math.log(found.vocab_size),
            }
            | {kind: estimate(found.by_condition[kind].values())._asdict() for kind in found.by_condition}
            | {
                "change_from_first": {
                    kind: paired_change(first.by_condition[kind], found.by_condition[kind])._asdict()
                    for kind in found.by_condition
                },
                "by_condition": found.by_condition,
                "by_position": found.by_position,
            }
        )
    return {
        "unit": "nats per code",
        "standard_error": "sample standard deviation of the conditions' means / sqrt(their number)",
        "settings": meter.settings,
        "checkpoints": entries,
    }


@torch.no_grad()
def measure_policy(
    policy: LlamaGenForCausalLM,
    conditions: Sequence[int] | Sequence[str],
    num_per_condition: int,
    seed: int,
    settings: DrawSettings,
    encoder: CaptionEncoder | None = None,
) -> Entropies:
    """Draw codes under guidance and take the entropies of both policies along them.

    Args:
        policy: in evaluation mode, on its device.
        conditions: distinct class ids or captions.
        num_per_condition: samples of each; sample k has the seed that image k of test.sh and test_t2i.sh has.
        seed: of all of them.
        settings: how to draw; entropies are those of the distribution that is drawn from.
        encoder: of captions; None for class ids.
    """
    kinds = {kind: settings.guidance_scale if kind == "guided" else 1.0 for kind in KINDS}
    if settings.guidance_scale <= 1:
        del kinds["guided"]
    rows = [(condition, index) for condition in conditions for index in range(num_per_condition)]
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    with tqdm(total=len(rows), desc="entropy", unit="sample") as progress:
        for start in range(0, len(rows), settings.batch_size):
            batch = rows[start : start + settings.batch_size]
            condition = _condition_of([condition for condition, _ in batch], encoder, policy.device)
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                seeds = [sample_seed(seed, *row) for row in batch]
                sequences = draw_codes(policy, seeds=seeds, settings=settings, **condition)  # [B, P + T]
                for kind, guidance_scale in kinds.items():
                    found[kind].append(token_entropies(policy, sequences, condition, guidance_scale, settings).cpu())
            progress.update(len(batch))
    by_row = {kind: torch.cat(parts).double() for kind, parts in found.items()}  # [rows, T] each
    names = [str(condition) for condition in conditions]
    return Entropies(
        by_condition={
            kind: dict(zip(names, values.view(len(names), -1).mean(dim=1).tolist())) for kind, values in by_row.items()
        },
        by_position={kind: values.mean(dim=0).tolist() for kind, values in by_row.items()},
        vocab_size=policy.config.vocab_size,
    )


def token_entropies(
    policy: LlamaGenForCausalLM,
    sequences: Tensor,
    condition: dict[str, Tensor],
    guidance_scale: float,
    settings: DrawSettings,
) -> Tensor:
    """Entropy [B, T] in nats of the distribution over each code of [condition ids | codes], int64 [B, P + T].

    With top-k or top-p the drawn code counts as kept, as in the update: along guided samples it may be one that the
    filter would take from the conditional policy.

    Args:
        condition: mask [B, P] and features [B, P, E] of captions by the policy's names; more keys are not read.
        guidance_scale: s of the policy whose entropy is wanted; 1 is the conditional one.
        settings: temperature, filters and guidance interval.
    """
    P = policy.config.cls_token_num
    labels = sequences.clone()
    labels[:, :P] = -100  # condition ids are not scored
    return policy(
        input_ids=sequences,
        attention_mask=condition.get("attention_mask"),
        caption_embeds=condition.get("caption_embeds"),
        guidance_scale=guidance_scale,
        guidance_interval=settings.guidance_interval,
        labels=labels,
        scored_with=(settings.temperature, settings.top_k, settings.top_p),
    ).entropy[:, P - 1 :]


def find_checkpoints(names: Sequence[str], base_policy: str | Path, runs: str | Path = "runs") -> list[Checkpoint]:
    """The policies of a command line, in its order.

    Args:
        names: each "base", a .pt file, a folder with weights (a run's checkpoint-N or final among them), or a run, by
            folder or by name in `runs`: what it started from if that is still there, its checkpoints by step, its end.
        base_policy: what "base" means.
        runs: folder of the runs.
    Raises:
        FileNotFoundError: for one that is not there.
    """
    found = []
    for name in names:
        run = next((path for path in (Path(name), Path(runs) / name) if name != BASE and _is_run(path)), None)
        if run is None:
            path = find_policy(name, "last", base_policy, runs)
            found.append(Checkpoint(path, step=0) if name == BASE else _place(path))
            continue
        start = arguments_of_run(run / FINAL, "ModelConfig").get("model_name_or_path")
        if start and Path(start).exists():
            found.append(Checkpoint(Path(start), str(run), 0))
        inside = [_place(path) for path in run.iterdir() if path.name == FINAL or _CHECKPOINT.fullmatch(path.name)]
        found += sorted(inside, key=lambda point: (point.step is None, point.step, point.path.name))
    return found


def draw_curves(entries: Sequence[dict[str, Any]]) -> bytes:
    """A PNG with a panel for each kind: a line per run over its steps with error bars of one standard error.

    A policy of no run with step 0 ("base") begins every run that does not know where it started; without any run
    policies stand side by side.
    """
    kinds = [kind for kind in KINDS if kind in entries[0]]
    figure = new_figure(4.6 * len(kinds), 3.2)
    lines, others = _lines(entries)
    for number, kind in enumerate(kinds, 1):
        axes = figure.add_subplot(1, len(kinds), number)
        for color, (run, points) in zip(LINE_COLORS * len(lines), lines.items()):
            _draw_points(axes, [point["step"] for point in points], points, kind, color, "-", Path(run).name)
        if lines:
            for entry in others:
                axes.axhline(entry[kind]["mean"], color=LINE_COLORS[-1], linestyle="--", label=_short_name(entry))
            axes.legend(fontsize=7, frameon=False)
        else:
            _draw_points(axes, range(len(others)), others, kind, LINE_COLORS[0], "", None)
            axes.set_xticks(range(len(others)), [_short_name(entry) for entry in others], rotation=20)
        axes.set_title(f"entropy/{kind}", fontsize=9, loc="left")
        axes.set_xlabel("step" if lines else "", fontsize=8)
        axes.set_ylabel("nats per code", fontsize=8)
        axes.tick_params(labelsize=7, length=2)
        axes.grid(color=GRID_COLOR, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return png_of(figure)


def format_table(result: dict[str, Any]) -> str:
    """Markdown: a row per policy; the change from the first one is paired, so its error is its own."""
    entries = result["checkpoints"]
    kinds = [kind for kind in KINDS if kind in entries[0]]
    header = ["policy", "step", *(text for kind in kinds for text in (kind, "change"))]
    lines = [header, ["---", *("---:" for _ in header[1:])]]
    for entry in entries:
        figures = [
            text
            for kind in kinds
            for text in (
                estimate_text(Estimate(**entry[kind])),
                estimate_text(Estimate(**entry["change_from_first"][kind]), "+"),
            )
        ]
        lines.append([entry["policy"], "-" if entry["step"] is None else str(entry["step"]), *figures])
    num_conditions = entries[0]["conditional"]["num_clusters"]
    note = f"nats per code, mean ± standard error over {num_conditions} conditions; uniform: {entries[0]['log_v']:.4f}"
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", note])


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    command = argparse.ArgumentParser(
        prog="python -m benchmark.entropy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoints", nargs="+", help="runs, their checkpoint-N or final, base, folders, .pt files")
    command.add_argument("--base_policy", help="what 'base' is; by default that of test.sh or test_t2i.sh")
    command.add_argument("--runs", default="runs", help="folder of the runs (runs)")
    command.add_argument("--policy_size", help="of a .pt file whose name does not say it: GPT-B, GPT-L, ...")
    command.add_argument("--image_size", type=int, help="of a .pt file whose name does not say it: 256, 384, 512")
    command.add_argument("--labels", type=int, nargs="+", help="class ids; by default --num_conditions, evenly spread")
    command.add_argument("--prompts", help="file or data set of captions, for text policies: its first distinct ones")
    command.add_argument("--caption_column", help="key or column that holds the captions")
    command.add_argument("--prompts_split", default="train", help="split of a data set (train)")
    command.add_argument("--num_conditions", type=int, default=100, help="classes or captions (100)")
    command.add_argument("--num_per_condition", type=int, default=4, help="samples of each (4)")
    sample_captions.add_text_arguments(command)
    sample_classes.add_draw_arguments(command)
    folder = Path("test_results/entropy")
    command.add_argument("--output", type=Path, default=folder, help=f"folder of the results ({folder})")
    return command


class _Meter:
    """Measures policies with the settings of a command line and keeps what it found.

    Args:
        options: the command line.
        captions: the conditions of text policies; None for classes.
    """

    def __init__(self, options: argparse.Namespace, captions: list[str] | None) -> None:
        self.options, self.captions = options, captions
        self.device = pick_device(options.device)
        self.draw_settings = sample_classes.read_draw_settings(options, self.device)
        conditions: Any = options.labels or options.num_conditions
        if captions is not None:
            conditions = {"number": len(captions), "sha256": hashlib.sha256(json.dumps(captions).encode()).hexdigest()}
        self.settings = {  # of every policy
            "task": "c2i" if captions is None else "t2i",
            "conditions": conditions,
            "num_per_condition": options.num_per_condition,
            "seed": options.seed,
            "device_type": self.device.type,
            **asdict(self.draw_settings),
        }
        self._encoder: tuple[dict, CaptionEncoder] | None = None  # the last one: T5 is slow to load

    def measure(self, path: Path) -> Entropies:
        """What is on disk for this policy and these settings, or a new measurement."""
        text = {} if self.captions is None else self._text_settings(path)
        settings = {**self.settings, **text, "policy_sha256": fingerprint(path), "image_size": self.options.image_size}
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        kept = self.options.output / MEASURED_FOLDER / f"{name}.json"
        if kept.is_file():
            content = json.loads(kept.read_text(encoding="utf-8"))
            logger.info("measured before: %s", kept)
            return Entropies(**content["entropies"])
        found = self._measure_anew(path)
        write_json(kept, {"policy": str(path), "settings": settings, "entropies": asdict(found)})
        return found

    def _measure_anew(self, path: Path) -> Entropies:
        options = self.options
        policy = load_policy(path, self.settings["task"], options.policy_size, options.image_size)
        if self.captions is None:
            num_classes = policy.config.num_classes
            number = min(options.num_conditions, num_classes)
            spread = [index * num_classes // number for index in range(number)]
            conditions, encoder = sample_classes.pick_classes(options.labels or spread, num_classes), None
        else:
            conditions, encoder = self.captions, self._load_encoder(path, policy)
        return measure_policy(
            policy.to(self.device), conditions, options.num_per_condition, options.seed, self.draw_settings, encoder
        )

    def _text_settings(self, path: Path) -> dict[str, Any]:
        arguments = sample_captions.text_arguments(self.options, path)
        return {
            "text_encoder": encoder_identity(arguments["name_or_path"]),
            "text_features_sha256": fingerprint(arguments["features"]) if arguments["features"] else None,
            "caption_padding": arguments["padding"],
            "cleaning": CLEANING_VERSION if arguments["clean"] else "off",
        }

    def _load_encoder(self, path: Path, policy: LlamaGenForCausalLM) -> CaptionEncoder:
        arguments = sample_captions.text_arguments(self.options, path)
        key = {**arguments, "length": policy.config.cls_token_num, "dim": policy.config.caption_dim}
        if self._encoder is None or self._encoder[0] != key:
            self._encoder = None  # free the old one first
            encoder = load_text_encoder(policy.config, **arguments, device=self.device)
            if isinstance(encoder, StoredTextEncoder):
                encoder.require(self.captions)
            self._encoder = key, encoder
        return self._encoder[1]


def _condition_of(
    conditions: Sequence[int] | Sequence[str], encoder: CaptionEncoder | None, device: torch.device
) -> dict[str, Tensor]:
    """What a policy is given for class ids or captions: `input_ids` [B, P], and for captions mask and features."""
    if encoder is None:
        return {"input_ids": torch.tensor(conditions, device=device)[:, None]}
    input_ids, mask = encoder.tokenize(list(conditions))  # [B, P] each
    embeds = encoder.encode_ids(input_ids, mask)  # [B, P, E]
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": mask.to(device),
        "caption_embeds": embeds.to(device),
    }


def _read_captions(options: argparse.Namespace) -> list[str]:
    captions = load_captions(options.prompts, options.caption_column, options.prompts_split)
    return list(dict.fromkeys(captions))[: options.num_conditions]


def _is_run(path: Path) -> bool:
    """Whether a folder holds checkpoints and is none itself."""
    if not path.is_dir() or (path / CONFIG_NAME).is_file():
        return False
    return any(entry.name == FINAL or _CHECKPOINT.fullmatch(entry.name) for entry in path.iterdir())


def _place(path: Path) -> Checkpoint:
    """A policy with the run and the step that its path says."""
    if match := _CHECKPOINT.fullmatch(path.name):
        return Checkpoint(path, str(path.parent), int(match[1]))
    state = path.parent / "trainer_state.json"
    if path.name == FINAL and state.is_file():
        return Checkpoint(path, str(path.parent), json.loads(state.read_text(encoding="utf-8"))["global_step"])
    return Checkpoint(path)


def _lines(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, list[dict]], list[dict]]:
    """The entries of each run by step, and those that belong to none."""
    runs: dict[str, list[dict]] = {}
    for entry in entries:
        if entry["run"] is not None:
            runs.setdefault(entry["run"], []).append(entry)
    others = [entry for entry in entries if entry["run"] is None]
    start = next((entry for entry in others if entry["step"] == 0), None)
    if runs and start is not None:
        others.remove(start)
        for points in runs.values():
            if all(point["step"] != 0 for point in points):
                points.append(start)
    return {run: sorted(points, key=lambda point: point["step"]) for run, points in runs.items()}, others


def _draw_points(axes, places, entries: Sequence[dict], kind: str, color: str, line: str, label: str | None) -> None:
    axes.errorbar(
        list(places),
        [entry[kind]["mean"] for entry in entries],
        [entry[kind]["standard_error"] or 0.0 for entry in entries],
        color=color,
        linestyle=line,
        marker="o",
        markersize=3,
        linewidth=1.8,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )


def _short_name(entry: dict[str, Any]) -> str:
    return Path(entry["policy"]).name.removesuffix(".pt")


if __name__ == "__main__":
    main()
