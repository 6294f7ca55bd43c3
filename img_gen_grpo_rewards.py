"""Rewards as training sees them: judges by name, scaled or quantised, failures masked, all scored once per batch."""

from __future__ import annotations

import bisect
import dataclasses
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamagen.devices import whole_weights
from reward_utils.arguments import ScorerArguments
from reward_utils.images import ImageMemo, check_images
from reward_utils.registry import SCORERS, build_scorers, unknown_name
from reward_utils.remote import parse_remote
from reward_utils.scorer import Scorer, check_all, check_prompts, read_metadata

logger = logging.getLogger(__name__)

QUANTIZED = "_quantized"  # suffix of a reward that sees only the step its raw score falls into
PAPER_REWARDS = (
    "clip",
    "clip_quantized",
    "hpsv2",
    "hpsv2_quantized",
    "maniqa",
    "qwen_label",
    "qwen_fake",
    "qwen_weird",
)
# Factors on the raw score. Source: AR-GRPO, appendix D. Rewards not named here have 1.
SCALES = {"clip": 5.0, "hpsv2": 5.0, "maniqa": 2.0, "qwen_label": 0.25, "qwen_fake": 0.25, "qwen_weird": 0.25}
SCALES |= {"pickscore": 1 / 26, "unified_reward": 1 / 5}  # as their tables report them
FAILURE_WINDOW = 64  # failures are judged over at least this many answers: the paper's step


@dataclass
class RewardArguments(ScorerArguments):
    """Which rewards train the policy, and how their raw scores become rewards; weights are TRL's `reward_weights`."""

    reward_funcs: list[str] = field(
        default_factory=lambda: list(PAPER_REWARDS),
        metadata={"help": f"Rewards by name: {', '.join(SCORERS)}; with {QUANTIZED} behind it the quantised variant."},
    )
    reward_scales: dict | str | None = field(
        default=None,
        metadata={"help": 'Factors on raw scores that replace the paper\'s, JSON: {"clip": 2.5}.'},
    )
    reward_steps: dict | str | None = field(
        default=None,
        metadata={
            "help": "Steps of quantised variants that replace the paper's, JSON: "
            '{"hpsv2": {"thresholds": [0.15, 0.2], "values": [0.5, 1, 1.5]}}.'
        },
    )
    reward_offload: bool = field(
        default=False, metadata={"help": "Keep the local judges in host memory except while they score."}
    )
    max_failed_share: float = field(
        default=0.05,
        metadata={
            "help": f"Stop when a judge gave no answer to more than this share of its last {FAILURE_WINDOW} images."
        },
    )

    def __post_init__(self):
        self.reward_scales = _read_json(self.reward_scales, "reward_scales")
        self.reward_steps = _read_json(self.reward_steps, "reward_steps")
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share is {self.max_failed_share}: it is a share, from 0 to 1")

    @classmethod
    def of_config(cls, settings: dict[str, Any]) -> RewardArguments:
        """Those of a training configuration (a file of configs/), whose other settings are not read."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})


@dataclass(frozen=True)
class Steps:
    """A staircase: a score below thresholds[0] becomes values[0], from thresholds[k-1] on values[k].

    The default is the released code's, on the raw cosine; the paper names only the three positive values. That code
    fails at a score of 1 or more; here the last value goes on.
    """

    thresholds: tuple[float, ...] = (0.0, 0.3, 0.6)
    values: tuple[float, ...] = (-1.0, 0.5, 1.0, 1.5)

    def __post_init__(self):
        if len(self.values) != len(self.thresholds) + 1 or list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(
                f"thresholds {list(self.thresholds)} with values {list(self.values)}: thresholds must rise, and there "
                "is one value more than thresholds"
            )

    def __call__(self, score: float) -> float:
        return self.values[bisect.bisect_right(self.thresholds, score)]


def build_rewards(
    names: list[str] | None = None,
    weights: list[float] | None = None,
    device: str | torch.device | None = None,
    arguments: RewardArguments | None = None,
    **options,
) -> RewardSuite:
    """Build and check the rewards of a run; what is checked is that files and servers are there. Loads nothing.

    Args:
        names: rewards by name, None takes `arguments.reward_funcs`.
        weights: TRL's `reward_weights`, None is 1 each; TRL applies them, they are checked and shown here.
        device: of the policy; `reward_device` overrules it for the judges.
        arguments: settings; `options` replace single fields of them.
    Returns:
        The list of reward functions to hand to the trainer.
    Raises:
        ValueError: for unknown names or options and for weights of the wrong number.
        FileNotFoundError: for missing weights, with the command that fetches them.
        ConnectionError: for a server that does not answer, with the command that starts it.
    """
    arguments = _with_options(arguments or RewardArguments(), options)
    arguments = dataclasses.replace(arguments, reward_device=str(arguments.reward_device or device or "cpu"))
    names = list(arguments.reward_funcs if names is None else names)
    if not names:
        raise ValueError(f"no reward named: choose some of {', '.join(SCORERS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"a reward is named twice in {names}: raise its weight instead")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"{len(weights)} reward_weights for {len(names)} rewards ({', '.join(names)}): give one each")
    known = [*SCORERS, *parse_remote(arguments.remote_rewards)]
    for name in names:
        if base_name(name) not in known:
            raise unknown_name(name, [*known, *(base + QUANTIZED for base in ("clip", "hpsv2", "maniqa"))])
    for key in [*(arguments.reward_scales or {}), *(arguments.reward_steps or {})]:
        if key != base_name(key):
            raise ValueError(f"{key!r} in reward_scales or reward_steps: they name judges, write {base_name(key)!r}")
        if key not in known:
            raise unknown_name(key, known, what="judge")
    scorers = build_scorers([base_name(name) for name in names], arguments)
    suite = RewardSuite(names, scorers, list(weights or [1.0] * len(names)), arguments)
    suite.check()
    return suite


def fill_missing(rewards_per_func: Tensor, num_generations: int) -> Tensor:
    """Replace each missing reward by the mean of its group, so that it moves no advantage; whole groups missing are 0.

    The group mean of that reward is then the mean over the samples that have it.

    Args:
        rewards_per_func: [N, R], NaN where a judge gave no answer; groups are `num_generations` rows in a row.
        num_generations: G, rollouts per prompt; N is a multiple of it.
    Returns:
        [N, R] without NaN.
    """
    groups = rewards_per_func.unflatten(0, (-1, num_generations))  # [N / G, G, R]
    means = groups.nanmean(dim=1, keepdim=True).nan_to_num(nan=0.0)  # [N / G, 1, R]
    return torch.where(groups.isnan(), means, groups).flatten(0, 1)


def base_name(name: str) -> str:
    """The judge behind a reward: `clip` of `clip_quantized`."""
    return name.removesuffix(QUANTIZED)


class RewardSuite(list):
    """The reward functions of a run, in order; a plain list for TRL.

    The first function that is called with new images has every judge score them: servers in threads, local judges
    meanwhile one after another. The others find their scores ready.
    """

    def __init__(self, names: list[str], scorers: dict[str, Scorer], weights: list[float], arguments: RewardArguments):
        self.scorers = scorers
        self.weights = weights
        self.arguments = arguments
        self.seconds: dict[str, float] = {}
        self._memo = ImageMemo()
        self._pool = ThreadPoolExecutor(max(1, len(scorers)), thread_name_prefix="judge")
        super().__init__()
        for name in names:
            self.append(_build_function(name, self, arguments))

    @property
    def names(self) -> list[str]:
        return [function.__name__ for function in self]

    def check(self) -> None:
        """Look for every file and ask every server for a sign of life.

        Raises:
            FileNotFoundError | ConnectionError: with everything that is missing, not only the first.
        """
        check_all(self.scorers.values())

    def check_rows(self, prompts: list[str], metadata: list | None = None) -> None:
        """See that every prompt comes with what the judges have to know beside it.

        Args:
            prompts: texts that the judges read.
            metadata: a dict or JSON text for each, or None.
        Raises:
            ValueError: for the first that does not; names judge and prompt.
        """
        for scorer in self.scorers.values():
            scorer.check_rows(prompts, read_metadata(metadata, len(prompts), scorer.name))

    def load(self) -> None:
        """Load all weights, to host memory with `reward_offload`, else to their device."""
        if self.arguments.reward_offload:
            self.offload()
        with whole_weights():
            for scorer in self.scorers.values():
                scorer.load()

    def offload(self) -> None:
        """Move the local judges to host memory."""
        for scorer in self.scorers.values():
            scorer.to("cpu")

    def onload(self) -> None:
        """Move the local judges to their device."""
        for scorer in self.scorers.values():
            scorer.to(self.arguments.reward_device)

    def describe(self) -> str:
        """A table: what judges, what its raw score is multiplied with or mapped to, and what to expect."""
        rows = [("reward", "model", "raw score", "becomes", "weight", "contributes")]
        for function, weight in zip(self, self.weights, strict=True):
            low, high = function.scorer.expected_range
            ends = [function.transform(low), function.transform(high)]
            rows.append(
                (
                    function.__name__,
                    function.scorer.model,
                    f"{low:g} to {high:g}",
                    function.rule,
                    f"{weight:g}",
                    f"{weight * min(ends):.3g} to {weight * max(ends):.3g}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def score(self, images: Tensor, prompts: list[str], metadata: list | None = None) -> dict[str, list[float | None]]:
        """Raw scores of every judge, by its name; the same images are scored once.

        Raises:
            ValueError: if the images are not [B, 3, H, W] in [0, 1] or the prompts do not fit.
        """
        check_images(images, "rewards")
        return self._memo.get(images, _batch_key(prompts, metadata), lambda: self._score(images, prompts, metadata))

    def totals(self, raw: dict[str, list[float | None]]) -> list[float]:
        """Weighted sum of the rewards of each image, from what `score` gave.

        Where a judge gave no answer its reward counts as its mean over the others, as in training; a judge without any
        answer adds nothing.
        """
        columns = []
        for function, weight in zip(self, self.weights, strict=True):
            rewards = [math.nan if score is None else function.transform(score) for score in raw[function.scorer.name]]
            columns.append(weight * fill_missing(torch.tensor(rewards, dtype=torch.float64)[:, None], len(rewards)))
        return torch.cat(columns, dim=1).sum(dim=1).tolist()

    def prefetch(self, images: Tensor, prompts: list[str], metadata: list | None = None) -> None:
        """Start the judges that wait for servers, and return; `score` then collects their answers."""
        check_images(images, "rewards")
        self._requests(images, prompts, metadata)

    def _requests(self, images: Tensor, prompts: list[str], metadata: list | None) -> dict[str, Future]:
        def start() -> dict[str, Future]:
            remote = [name for name, scorer in self.scorers.items() if scorer.remote]
            return {name: self._pool.submit(self._timed, name, images, prompts, metadata) for name in remote}

        return self._memo.get(images, ("requests", *_batch_key(prompts, metadata)), start)

    def _score(self, images: Tensor, prompts: list[str], metadata: list | None) -> dict[str, list[float | None]]:
        requests = self._requests(images, prompts, metadata)
        local = [name for name in self.scorers if name not in requests]
        scores = {}
        if local:
            placed = images.to(self.arguments.reward_device)
            if self.arguments.reward_offload:
                self.onload()
            scores = {name: self._timed(name, placed, prompts, metadata) for name in local}
            if self.arguments.reward_offload:
                self.offload()
        return scores | {name: request.result() for name, request in requests.items()}

    def _timed(self, name: str, images: Tensor, prompts: list[str], metadata: list | None) -> list[float | None]:
        start = time.perf_counter()
        scores = self.scorers[name](images, prompts, metadata)  # a list: the device has finished
        self.seconds[name] = time.perf_counter() - start
        return scores


class RewardFunction:
    """One reward in TRL's calling convention.

    Args:
        name: as logged.
        scorer: the judge.
        transform: raw score -> reward.
        rule: the transform in words.
        suite: where the raw scores come from.
        leads: the first function on its judge, which logs what belongs to the judge.
        max_failed_share: more failures than this among the last answers stop the run.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        transform: Callable[[float], float],
        rule: str,
        suite: RewardSuite,
        leads: bool,
        max_failed_share: float,
    ):
        self.__name__ = name
        self.scorer = scorer
        self.transform = transform
        self.rule = rule
        self.suite = suite
        self.leads = leads
        self.max_failed_share = max_failed_share
        self._recent_failures: deque[bool] = deque(maxlen=FAILURE_WINDOW)

    def __call__(
        self,
        prompts: list[str],
        completions: Tensor,
        completion_ids: object = None,
        log_metric: Callable[[str, float], None] | None = None,
        caption: list[str] | None = None,
        metadata: list | None = None,
        **columns,
    ) -> list[float | None]:
        """Rewards of a batch.

        Args:
            prompts: B prompts as the policy saw them; the judges read `caption` instead where the data set has it.
            completions: images [B, 3, H, W], floating point in [0, 1].
            completion_ids: not read; like `columns`, part of TRL's call.
            log_metric: TRL's scalar log.
            caption: B texts that describe what was asked for.
            metadata: B dicts or JSON texts for task rewards (GenEval's objects, the text to render).
        Returns:
            B rewards, scaled or quantised; None where the judge gave no answer.
        Raises:
            RuntimeError: if the judge fails too often; the message holds its last answer.
        """
        texts = list(prompts if caption is None else caption)
        check_prompts(texts, len(completions), self.__name__)
        raw = self.suite.score(completions, texts, metadata)[self.scorer.name]
        if log_metric is not None:
            self._log(raw, log_metric)
        self._count_failures(raw)
        return [None if score is None else self.transform(score) for score in raw]

    def _log(self, raw: list[float | None], log_metric: Callable[[str, float], None]) -> None:
        present = [score for score in raw if score is not None]
        if self.scorer.can_fail:
            log_metric(f"rewards/{self.__name__}/failed", 1 - len(present) / len(raw))
        if self.leads:
            log_metric(f"speed/reward_{self.scorer.name}_s", self.suite.seconds[self.scorer.name])
            for figure, value in self.scorer.health.items():
                log_metric(f"rewards/{self.__name__}/{figure}", value)
            if present:
                log_metric(f"rewards_raw/{self.scorer.name}", sum(present) / len(present))
        if isinstance(self.transform, Steps) and present:
            rewards = [self.transform(score) for score in present]
            for value in self.transform.values:
                log_metric(f"rewards/{self.__name__}/share_of_{value:g}", rewards.count(value) / len(rewards))

    def _count_failures(self, raw: list[float | None]) -> None:
        window = max(FAILURE_WINDOW, len(raw))
        if window != self._recent_failures.maxlen:
            self._recent_failures = deque(self._recent_failures, maxlen=window)
        self._recent_failures.extend(score is None for score in raw)
        failed = sum(self._recent_failures)
        if failed > self.max_failed_share * window:
            raise RuntimeError(
                f"reward {self.__name__}: {failed} of the last {len(self._recent_failures)} images got no score, more "
                f"than max_failed_share = {self.max_failed_share:g} of {window} allows. Last answer of "
                f"{self.scorer.model}: {self.scorer.last_failure!r}"
            )


def _build_function(name: str, suite: RewardSuite, arguments: RewardArguments) -> RewardFunction:
    base = base_name(name)
    if name.endswith(QUANTIZED):
        given = (arguments.reward_steps or {}).get(base, dataclasses.asdict(Steps()))
        if not isinstance(given, dict) or set(given) != {"thresholds", "values"}:
            raise ValueError(f"reward_steps of {base} is {given!r}: expected an object with thresholds and values")
        transform = Steps(**{key: _numbers(numbers, f"reward_steps of {base}") for key, numbers in given.items()})
        stairs = [f"{value:g} from {start:g}" for start, value in zip(transform.thresholds, transform.values[1:])]
        rule = f"{transform.values[0]:g}, " + ", ".join(stairs)
    else:
        (scale,) = _numbers([(arguments.reward_scales or {}).get(base, SCALES.get(base, 1.0))], f"scale of {base}")
        transform = _Scale(scale)
        rule = f"x {scale:g}"
    leads = all(function.scorer.name != base for function in suite)
    return RewardFunction(name, suite.scorers[base], transform, rule, suite, leads, arguments.max_failed_share)


@dataclass(frozen=True)
class _Scale:
    factor: float

    def __call__(self, score: float) -> float:
        return self.factor * score


def _numbers(values: object, what: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what}: found {values!r}, expected finite numbers")
    return numbers


def _batch_key(prompts: list[str], metadata: list | None) -> tuple:
    return tuple(prompts), json.dumps(metadata, sort_keys=True)


def _with_options(arguments: RewardArguments, options: dict) -> RewardArguments:
    known = [item.name for item in dataclasses.fields(arguments)]
    for name in options:
        if name not in known:
            raise unknown_name(name, known, what="reward option")
    return dataclasses.replace(arguments, **options)


def _read_json(value: dict | str | None, name: str) -> dict | None:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}): {value!r}") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}: expected a JSON object with rewards as keys")
    return value
