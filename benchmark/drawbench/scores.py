"""A folder of images -> scores/METRIC-RANK.jsonl -> rewards.json and a table; a stopped job goes on.

Layout of the images, as test_t2i.sh writes it: IMAGES/00042/metadata.jsonl (the prompt's row) and
IMAGES/00042/samples/0000.png, 0001.png, ... A score belongs to a file's content, its prompt and a judge; when one of
them changes it is not used any more. Raw scores are kept, scales are applied when they are read.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmark.clusters import Estimate, cluster_means, estimate, estimate_text, paired_change
from benchmark.drawbench.metrics import metric_of
from benchmark.files import write_bytes, write_json
from benchmark.geneval.detections import file_digest, read_json_lines
from benchmark.geneval.evaluate import check_picture, pictures_of, prompt_folders
from benchmark.sample_captions import METADATA_NAME, RECORD_NAME
from benchmark.sampling import PATIENCE_S, POLL_S
from dataset.captions import TEXT_COLUMNS
from img_gen_grpo_rewards import RewardArguments, RewardSuite
from reward_utils.scorer import Scorer

logger = logging.getLogger(__name__)

SCORES_FOLDER = "scores"
RESULT_NAME = "rewards.json"

Scores = dict[str, float | None]  # file name -> raw score; None where the judge gave no answer


@dataclass(frozen=True)
class PromptedImage:
    """An image and what it was asked to show.

    Attributes:
        filename: below the images' folder, with slashes.
        path: where the file is.
        prompt: the caption that judges read.
        metadata: the prompt's whole row, for task rewards.
        sha256: first 16 digits, of the file.
    """

    filename: str
    path: Path
    prompt: str
    metadata: dict[str, Any]
    sha256: str


def find_images(folder: Path, caption_column: str | None = None, num_prompts: int | None = None) -> list[PromptedImage]:
    """Every image of a folder in GenEval's layout, in order.

    Args:
        folder: holds 00000/metadata.jsonl, 00000/samples/0000.png and so on.
        caption_column: key of the caption in metadata.jsonl; None takes the first of `TEXT_COLUMNS`.
        num_prompts: only of the first so many prompts; by default of all that are there.
    Raises:
        ValueError: if there is none, or a prompt's folder has no readable metadata.jsonl.
    """
    found = []
    for place in _first_folders(folder, num_prompts):
        if pictures := pictures_of(place):
            row = _read_row(place / METADATA_NAME)
            prompt = _caption_of(row, place / METADATA_NAME, caption_column)
            for path in pictures:
                found.append(PromptedImage(path.relative_to(folder).as_posix(), path, prompt, row, file_digest(path)))
    if not found:
        raise ValueError(f"no image under {folder}: expected {folder}/00000/samples/0000.png and so on (test_t2i.sh)")
    return found


def count_images(folder: Path, num_prompts: int | None = None) -> int:
    """How many images of finished prompts are there, without reading them; metadata.jsonl is a prompt's last file."""
    places = _first_folders(folder, num_prompts)
    return sum(len(pictures_of(place)) for place in places if (place / METADATA_NAME).is_file())


def _first_folders(folder: Path, num_prompts: int | None) -> list[Path]:
    return [place for place in prompt_folders(folder) if num_prompts is None or int(place.name) < num_prompts]


class ScoreFiles:
    """Raw scores on disk: a JSON line per image in scores/METRIC-RANK.jsonl, appended batch by batch.

    Args:
        images: folder of the images.
        scorers: judges by metric; none is loaded for this.
        rank: of this process, which appends to files of its own and reads those of all.
    """

    def __init__(self, images: Path, scorers: dict[str, Scorer], rank: int = 0) -> None:
        self.folder, self.rank = images / SCORES_FOLDER, rank
        self.judges = {metric: judge_of(scorer) for metric, scorer in scorers.items()}

    def known(self, metric: str, images: Sequence[PromptedImage]) -> Scores:
        """The scores of this metric that are there for these images, as they are now, by its present judge."""
        wanted = {(image.filename, image.sha256, image.prompt, self.judges[metric]) for image in images}
        found: Scores = {}
        for path in sorted(self.folder.glob(f"{metric}-*.jsonl")):
            for line in read_json_lines(path):
                if (line["filename"], line.get("sha256"), line.get("prompt"), line.get("judge")) in wanted:
                    found[line["filename"]] = line["score"]
        return found

    def append(self, metric: str, images: Sequence[PromptedImage], scores: Sequence[float | None]) -> None:
        """Keep the raw scores of some images; a line is torn only if the process dies while it writes."""
        path = self._own_file(metric)
        lines = [
            {
                "filename": image.filename,
                "score": score,
                "prompt": image.prompt,
                "sha256": image.sha256,
                "judge": self.judges[metric],
            }
            for image, score in zip(images, scores, strict=True)
        ]
        with path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))

    def mend(self, metric: str) -> None:
        """Cut off what a killed process left unfinished, so that the next line stands alone."""
        path = self._own_file(metric)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
            write_bytes(path, content[: content.rfind(b"\n") + 1])

    def _own_file(self, metric: str) -> Path:
        return self.folder / f"{metric}-{self.rank}.jsonl"


def judge_of(scorer: Scorer) -> str:
    """What a score depends on beside image and prompt: model and precision; a server's address is none of it."""
    precisions = sorted({network.dtype for network in scorer.networks} - {"float32"})
    return " ".join([re.sub(r"https?://\S+", "server", scorer.model), *precisions])


def missing_scores(images: Sequence[PromptedImage], files: ScoreFiles) -> dict[str, list[PromptedImage]]:
    """The images that each metric still has to score; metrics with none are left out."""
    missing = {}
    for metric in files.judges:
        known = files.known(metric, images)
        if rest := [image for image in images if image.filename not in known]:
            missing[metric] = rest
    return missing


def check_scorers(scorers: dict[str, Scorer], arguments: RewardArguments) -> None:
    """Look for every file and ask every server for a sign of life.

    Raises:
        FileNotFoundError | ConnectionError: with everything that is missing.
    """
    _suite(scorers, arguments).check()


def score_images(
    missing: dict[str, list[PromptedImage]],
    scorers: dict[str, Scorer],
    files: ScoreFiles,
    arguments: RewardArguments,
    images_at_once: int = 64,
    show_progress: bool = True,
) -> None:
    """Score what is missing and keep it batch by batch; servers are asked beside the local judges.

    Args:
        missing: images by metric, as `missing_scores` gives them.
        scorers: judges by metric.
        files: where scores go.
        arguments: of the judges.
        images_at_once: images in memory; each batch has one size and lacks the same metrics.
        show_progress: draw a bar.
    Raises:
        ValueError: if a picture is damaged, before any is scored; or from a judge.
        ConnectionError: from a judge; what was scored before is kept.
    """
    for path in sorted({image.path for images in missing.values() for image in images}):
        check_picture(path)
    total = sum(map(len, missing.values()))
    for metric in missing:
        files.mend(metric)
    with tqdm(total=total, desc="scoring", unit="score", disable=not show_progress) as progress:
        for metrics, images in _alike(missing).items():
            suite = _suite({metric: scorers[metric] for metric in metrics}, arguments)
            for start in range(0, len(images), images_at_once):
                for batch in _same_size(images[start : start + images_at_once]):
                    pixels = torch.stack([_load(image.path) for image in batch])  # [B, 3, H, W]
                    prompts, metadata = [i.prompt for i in batch], [i.metadata for i in batch]
                    for metric, scores in suite.score(pixels, prompts, metadata).items():
                        files.append(metric, batch, scores)
                    progress.update(len(batch) * len(metrics))


def wait_until(count: Callable[[], int], total: int, what: str, patience_s: float = PATIENCE_S) -> None:
    """Return when `count()` has reached `total`; other processes do the work.

    Raises:
        TimeoutError: if it did not grow for `patience_s` seconds.
    """
    there, since = count(), time.monotonic()
    while there < total:
        if time.monotonic() - since > patience_s:
            raise TimeoutError(
                f"{total - there} of {total} {what} are missing and none came for {patience_s:.0f} s: did a process "
                "die? Start the job again, it goes on from here"
            )
        time.sleep(POLL_S)
        if (now := count()) > there:
            there, since = now, time.monotonic()


def summarize(images: Sequence[PromptedImage], files: ScoreFiles) -> dict[str, Any]:
    """Mean and standard error of every metric in its table's scale, from the scores on disk.

    Images of one prompt resemble each other, so a prompt counts once: the mean is that over prompts of the mean over
    a prompt's images, the standard error that of these prompt means. While every prompt has equally many scores the
    mean is the plain mean over images. An image without a score counts nowhere but in `num_failed`.

    Raises:
        ValueError: if an image was not scored yet.
    """
    metrics = {}
    for name, judge in files.judges.items():
        metric, known = metric_of(name), files.known(name, images)
        if absent := [image.filename for image in images if image.filename not in known]:
            raise ValueError(f"{name}: {len(absent)} images were not scored, the first is {absent[0]}")
        scored = [(i.prompt, metric.factor * known[i.filename]) for i in images if known[i.filename] is not None]
        prompt_means = cluster_means(scored)
        metrics[name] = {
            "title": metric.title,
            "judge": judge,
            "scale": metric.scale,
            "factor_on_raw_score": metric.factor,
            **estimate(prompt_means.values())._asdict(),
            "num_scored": len(scored),
            "num_failed": len(images) - len(scored),
            "mean_failed_as_0": _mean_failed_as_0(images, known, metric.factor),
            "prompt_means": prompt_means,
        }
    return {
        "num_images": len(images),
        "num_prompts": len({image.prompt for image in images}),
        "standard_error": "sample standard deviation of the prompt means / sqrt(their number)",
        "metrics": metrics,
    }


def _mean_failed_as_0(images: Sequence[PromptedImage], known: Scores, factor: float) -> float:
    """Mean over prompts where an image without a score counts as 0, as in the published program for UnifiedReward."""
    return fmean(cluster_means([(i.prompt, factor * (known[i.filename] or 0.0)) for i in images]).values())


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Write FOLDER/rewards.json: the summary and, where test_t2i.sh left its record, where the images come from."""
    origin = folder / RECORD_NAME
    record = json.loads(origin.read_text(encoding="utf-8")) if origin.is_file() else None
    write_json(folder / RESULT_NAME, {"images": str(folder), **summary, "samples": record})
    return folder / RESULT_NAME


def format_tables(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per folder, a column per metric; below it the changes from the first folder to each other one."""
    first = next(iter(summaries))
    names = list(summaries[first]["metrics"])
    header = _row(["images", *(metric_of(name).title for name in names)])
    rule = _row(["---", *("---:" for _ in names)])
    lines = [header, rule]
    for folder, summary in summaries.items():
        cells = [estimate_text(_estimate_of(summary["metrics"][name])) for name in names]
        lines.append(_row([folder, *cells]))
    lines += [_row(["scale", *(metric_of(name).scale for name in names)]), ""]
    for folder, summary in summaries.items():
        lines.append(
            f"{folder}: {summary['num_images']} images of {summary['num_prompts']} prompts; mean ± standard error over "
            "prompt means"
        )
        failed = {name: figures["num_failed"] for name, figures in summary["metrics"].items() if figures["num_failed"]}
        for name, number in failed.items():
            title = metric_of(name).title
            lines.append(f"{folder}: {number} of {summary['num_images']} images have no {title}, they are left out")
    others = [folder for folder in summaries if folder != first]
    if others:
        lines += ["", f"Change from {first}, paired over the prompts that both have:", "", header, rule]
    for folder in others:
        cells = []
        for name in names:
            before, after = (summaries[f]["metrics"][name]["prompt_means"] for f in (first, folder))
            cells.append(estimate_text(paired_change(before, after), sign="+"))
        lines.append(_row([folder, *cells]))
    return "\n".join(lines) + "\n"


def _suite(scorers: dict[str, Scorer], arguments: RewardArguments) -> RewardSuite:
    """The judges as training runs them: servers in threads, local ones meanwhile one after another."""
    return RewardSuite(list(scorers), scorers, [1.0] * len(scorers), arguments)


def _alike(missing: dict[str, list[PromptedImage]]) -> dict[tuple[str, ...], list[PromptedImage]]:
    """The images by the metrics that they lack, so that a batch is shown to each of its judges, and to no other."""
    lacking: dict[str, list[str]] = defaultdict(list)
    by_name: dict[str, PromptedImage] = {}
    for metric, images in missing.items():
        for image in images:
            lacking[image.filename].append(metric)
            by_name[image.filename] = image
    groups: dict[tuple[str, ...], list[PromptedImage]] = defaultdict(list)
    for filename in sorted(by_name):
        groups[tuple(lacking[filename])].append(by_name[filename])
    return groups


def _same_size(images: Sequence[PromptedImage]) -> list[list[PromptedImage]]:
    groups: dict[tuple[int, int], list[PromptedImage]] = defaultdict(list)
    for image in images:
        with Image.open(image.path) as picture:
            groups[picture.size].append(image)
    return list(groups.values())


def _load(path: Path) -> Tensor:
    """Pixels float32 [3, H, W] in [0, 1]."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # [H, W, 3]
    return pixels.permute(2, 0, 1).float() / 255


def _read_row(path: Path) -> dict[str, Any]:
    expected = 'expected one line such as {"prompt": "a red bus"}'
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; {expected}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds {str(row)[:80]}; {expected}")
    return row


def _caption_of(row: dict[str, Any], path: Path, column: str | None) -> str:
    columns = TEXT_COLUMNS if column is None else (column,)
    caption = next((row[name] for name in columns if isinstance(row.get(name), str)), None)
    if caption is None:
        raise ValueError(f"{path} has no text under {' or '.join(columns)}, only {sorted(row)}: name --caption_column")
    return caption


def _estimate_of(figures: dict[str, Any]) -> Estimate:
    return Estimate(*(figures[name] for name in Estimate._fields))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
