"""The paper's tables and figures and the claims of docs/findings.md, in terms of measured points of experiments.

A table has a row for each subject of its ablation, as configs/ has a file for each; the paper's own labels of rows are
not reproduced. Printed numbers are in printed.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmark.geneval.scoring import TASKS
from benchmark.paper.plan import QUARTERS, Point


@dataclass(frozen=True)
class Metric:
    """A number of a point.

    Args:
        title: in a table's head.
        group: of measurements it comes from, see `benchmark.paper.run`.
        digits: behind the point.
        only: "toy" or "full" if the other scale has no such number.
    """

    title: str
    group: str
    digits: int = 3
    only: str | None = None


METRICS: dict[str, Metric] = {
    "fid": Metric("FID", "fid", 2),
    "sfid": Metric("sFID", "fid", 2),
    "inception_score": Metric("IS", "fid", 2),
    "precision": Metric("precision", "fid"),
    "recall": Metric("recall", "fid"),
    "entropy_conditional": Metric("entropy, conditional [nats]", "entropy"),
    "entropy_guided": Metric("entropy, guided [nats]", "entropy"),
    "truth": Metric("truth", "toy", only="toy"),
    "reward": Metric("reward", "toy", only="toy"),
    "judge_clip": Metric("CLIP", "toy", only="toy"),
    "judge_hpsv2": Metric("HPSv2", "toy", only="toy"),
    "judge_qwen_label": Metric("judge: label", "toy", only="toy"),
    "judge_qwen_fake": Metric("judge: real", "toy", only="toy"),
    "judge_qwen_weird": Metric("judge: natural", "toy", only="toy"),
    "kl": Metric("KL [nats a code]", "log"),
    "train_reward": Metric("reward in training", "log"),
    "geneval_overall": Metric("GenEval", "geneval"),
    **{f"geneval_{task}": Metric(task.replace("_", " "), "geneval") for task in TASKS},
    "drawbench_clip": Metric("CLIP", "drawbench"),
    "drawbench_hpsv2": Metric("HPSv2", "drawbench"),
    "drawbench_image_reward": Metric("ImageReward", "drawbench", only="full"),
    "drawbench_pickscore": Metric("PickScore", "drawbench", only="full"),
    "drawbench_aesthetic": Metric("aesthetic", "drawbench", only="full"),
    "drawbench_deqa": Metric("DeQA", "drawbench", only="full"),
    "drawbench_unified_reward": Metric("UnifiedReward", "drawbench", only="full"),
    "drawbench_qwen_label": Metric("judge: label", "drawbench", only="toy"),
}


@dataclass(frozen=True)
class Row:
    """A line of a table. `label` is also its key in printed.yaml."""

    label: str
    point: Point
    metrics: tuple[str, ...] | None = None  # measured for this row; None: all of the table's


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Curves:
    """A figure of numbers over training steps: a panel for each quantity, a line for each experiment.

    Args:
        logged: scalars of the training log, read at every step.
        measured: metrics, measured at the run's quarters.
    """

    title: str
    experiments: tuple[tuple[str, str], ...]  # (label, name)
    logged: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """A figure of pictures: the same conditions and noise under several policies."""

    title: str
    points: tuple[tuple[str, Point], ...]


QUALITY_COLUMNS = ("fid", "sfid", "inception_score", "precision", "recall")
POLICY_COLUMNS = ("entropy_guided", "truth", "reward", "kl")
GENEVAL_COLUMNS = (*(f"geneval_{task}" for task in TASKS), "geneval_overall")
T2I_COLUMNS = ("geneval_overall", "drawbench_clip", "drawbench_hpsv2", "drawbench_qwen_label", "kl")
DRAWBENCH_COLUMNS = tuple(name for name, metric in METRICS.items() if metric.group == "drawbench")


def _before_after(label: str, experiment: str) -> tuple[Row, Row]:
    return Row(label, Point(experiment, 0)), Row(f"{label} + RL", Point(experiment))


def _rewards(task: str, main: str) -> tuple[Row, ...]:
    return (
        Row("before", Point(main, 0)),
        Row("all rewards", Point(main)),
        Row("without alignment (CLIP, HPSv2)", Point(f"{task}_no_alignment")),
        Row("without quality (MANIQA)", Point(f"{task}_no_quality")),
        Row("without realism (the judge)", Point(f"{task}_no_realism")),
        Row("alignment alone", Point(f"{task}_alignment")),
        Row("quality alone", Point(f"{task}_quality")),
        Row("realism alone", Point(f"{task}_realism")),
    )


def _strengths(task: str, main: str, scales: tuple[str, ...]) -> tuple[Row, ...]:
    middle = Row("beta 0.1, trained with guidance 2", Point(main))
    return (
        Row("before", Point(main, 0)),
        Row("beta 0", Point(f"{task}_beta_0")),
        Row("beta 0.01", Point(f"{task}_beta_0.01")),
        middle,
        Row("beta 1", Point(f"{task}_beta_1")),
        *(Row(f"trained with guidance {scale}", Point(f"{task}_guidance_{scale}")) for scale in scales),
    )


TABLES: dict[int, Table] = {
    2: Table(
        "Class-to-image on ImageNet",
        (*QUALITY_COLUMNS, *POLICY_COLUMNS),
        (
            *_before_after("LlamaGen-B, 256 px", "c2i_B_256"),
            *_before_after("LlamaGen-B, 384 px", "c2i_B_384"),
            *_before_after("LlamaGen-L, 384 px", "c2i_L_384"),
            *_before_after("LlamaGen-XL, 384 px", "c2i_XL_384"),
        ),
    ),
    3: Table("Text-to-image: GenEval", GENEVAL_COLUMNS, _before_after("LlamaGen-XL, 256 px", "t2i_XL_256")),
    4: Table("Text-to-image: DrawBench prompts", DRAWBENCH_COLUMNS, _before_after("LlamaGen-XL, 256 px", "t2i_XL_256")),
    5: Table(
        "Class-to-image: which rewards",
        (*QUALITY_COLUMNS, *POLICY_COLUMNS),
        (
            *_rewards("c2i", "c2i_B_256"),
            Row("CLIP alone", Point("c2i_clip")),
            Row("HPSv2 alone", Point("c2i_hpsv2")),
        ),
    ),
    6: Table(
        "Class-to-image: weight of the KL, guidance in training and in sampling",
        (*QUALITY_COLUMNS, *POLICY_COLUMNS),
        (
            *_strengths("c2i", "c2i_B_256", ("1", "1.5", "4")),
            *(
                Row(f"{when}, sampled with guidance {scale:g}", Point("c2i_B_256", quarter, scale), QUALITY_COLUMNS)
                for quarter, when in ((0, "before"), (QUARTERS, "after"))
                for scale in (1.0, 4.0)
            ),
        ),
    ),
    7: Table("Text-to-image: which rewards", T2I_COLUMNS, _rewards("t2i", "t2i_all")),
    8: Table(
        "Text-to-image: weight of the KL, guidance in training and in sampling",
        T2I_COLUMNS,
        (
            *_strengths("t2i", "t2i_XL_256", ("1", "4", "7.5")),
            *(
                Row(
                    f"{when}, sampled with guidance {scale:g}",
                    Point("t2i_XL_256", quarter, scale),
                    ("geneval_overall", "drawbench_clip", "drawbench_hpsv2", "drawbench_qwen_label"),
                )
                for quarter, when in ((0, "before"), (QUARTERS, "after"))
                for scale in (1.0, 4.0)
            ),
        ),
    ),
}

_ENTROPIES = ("entropy_conditional", "entropy_guided")
_KL_WEIGHTS = (("beta 0", "beta_0"), ("beta 1", "beta_1"))

FIGURES: dict[int, Curves | Samples] = {
    3: Curves(
        "Policy entropy in class-to-image training",
        (("beta 0.1", "c2i_B_256"), *((label, f"c2i_{name}") for label, name in _KL_WEIGHTS)),
        measured=_ENTROPIES,
    ),
    4: Curves(
        "Policy entropy in text-to-image training",
        (("beta 0.1", "t2i_XL_256"), *((label, f"t2i_{name}") for label, name in _KL_WEIGHTS)),
        measured=_ENTROPIES,
    ),
    5: Curves(
        "Rewards in class-to-image training",
        (("all rewards", "c2i_B_256"),),
        logged=(
            "reward",
            *(f"rewards/{name}/mean" for name in ("clip", "hpsv2", "maniqa", "qwen_label", "qwen_fake", "qwen_weird")),
        ),
    ),
    6: Curves(
        "Class-to-image training that goes on: reward and quality",
        (("four times as long", "c2i_long"),),
        logged=("reward", "kl"),
        measured=("truth", "fid", "recall", "entropy_guided"),
    ),
    14: Samples(
        "Class-to-image samples before and after",
        (("before", Point("c2i_B_256", 0)), ("after", Point("c2i_B_256"))),
    ),
    15: Samples(
        "Text-to-image samples before and after",
        (("before", Point("t2i_XL_256", 0)), ("after", Point("t2i_XL_256"))),
    ),
}


@dataclass(frozen=True)
class Claim:
    """`metric` is higher (`direction` 1) or lower (-1) at `point` than at `other`, seed by seed."""

    text: str
    metric: str
    direction: int
    point: Point
    other: Point


_MAIN, _START = Point("c2i_B_256"), Point("c2i_B_256", 0)
_TEXT, _TEXT_START = Point("t2i_all"), Point("t2i_all", 0)
_LABEL = Point("t2i_XL_256")  # in the toy world trained with the judge's label question alone
_NO_KL = Point("t2i_beta_0")
_L, _L_START = Point("c2i_L_384"), Point("c2i_L_384", 0)
_XL, _XL_START = Point("c2i_XL_384"), Point("c2i_XL_384", 0)
_SECOND, _SECOND_START = Point("c2i_B_384"), Point("c2i_B_384", 0)
_LATE, _USUAL = Point("c2i_long"), Point("c2i_long", 1)

CLAIMS: dict[str, tuple[Claim, ...]] = {
    "The paper's findings": (
        Claim("RL raises the Inception Score", "inception_score", 1, _MAIN, _START),
        Claim("RL raises precision", "precision", 1, _MAIN, _START),
        Claim("RL lowers recall", "recall", -1, _MAIN, _START),
        Claim("RL makes FID slightly worse (higher)", "fid", 1, _MAIN, _START),
        Claim("RL makes sFID worse (higher)", "sfid", 1, _MAIN, _START),
        Claim("Pictures get better: more of them show what was asked for", "truth", 1, _MAIN, _START),
        Claim("Entropy of the policy falls, conditional", "entropy_conditional", -1, _MAIN, _START),
        Claim("Entropy of the policy falls, guided", "entropy_guided", -1, _MAIN, _START),
        Claim("Without KL entropy falls further", "entropy_guided", -1, Point("c2i_beta_0"), _MAIN),
        Claim("Without KL recall falls further", "recall", -1, Point("c2i_beta_0"), _MAIN),
        Claim("A strong KL (beta 1) holds the reward back", "reward", -1, Point("c2i_beta_1"), _MAIN),
        Claim("CLIP's score needs CLIP and HPSv2 among the rewards", "judge_clip", -1, Point("c2i_realism"), _MAIN),
        Claim("HPSv2's score needs CLIP and HPSv2 among the rewards", "judge_hpsv2", -1, Point("c2i_realism"), _MAIN),
        Claim(
            "The judge's label score needs the judge among the rewards",
            "judge_qwen_label",
            -1,
            Point("c2i_alignment"),
            _MAIN,
        ),
        Claim(
            "The judge's score for real pictures needs the judge among the rewards",
            "judge_qwen_fake",
            -1,
            Point("c2i_alignment"),
            _MAIN,
        ),
        Claim(
            "The judge's score for natural objects needs the judge among the rewards",
            "judge_qwen_weird",
            -1,
            Point("c2i_alignment"),
            _MAIN,
        ),
        Claim("CLIP alone raises HPSv2's score, too", "judge_hpsv2", 1, Point("c2i_clip"), _START),
        Claim("HPSv2 alone raises CLIP's score, too", "judge_clip", 1, Point("c2i_hpsv2"), _START),
        Claim("CLIP alone makes more pictures right", "truth", 1, Point("c2i_clip"), _START),
        Claim("HPSv2 alone makes more pictures right", "truth", 1, Point("c2i_hpsv2"), _START),
        Claim("The judge's rewards keep pictures right (truth)", "truth", -1, Point("c2i_alignment"), _MAIN),
        Claim("The quality reward (MANIQA) has a role of its own", "fid", 1, Point("c2i_no_quality"), _MAIN),
        Claim("Training with guidance is better than without (truth)", "truth", -1, Point("c2i_guidance_1"), _MAIN),
        Claim("Strong guidance in training costs recall", "recall", -1, Point("c2i_guidance_4"), _MAIN),
        Claim(
            "After RL, guidance in sampling still raises the Inception Score",
            "inception_score",
            -1,
            Point("c2i_B_256", QUARTERS, 1.0),
            _MAIN,
        ),
        Claim("Too strong guidance in sampling costs FID", "fid", 1, Point("c2i_B_256", QUARTERS, 4.0), _MAIN),
        Claim("Late training: the reward still rises", "reward", 1, _LATE, _USUAL),
        Claim("Late training: fewer pictures are right", "truth", -1, _LATE, _USUAL),
        Claim("Late training: FID gets worse", "fid", 1, _LATE, _USUAL),
        Claim("Late training: sFID gets worse", "sfid", 1, _LATE, _USUAL),
        Claim("Late training: recall falls", "recall", -1, _LATE, _USUAL),
        Claim("Late training: recall is lower than before training", "recall", -1, _LATE, _START),
        Claim("Late training: entropy is lower than before training", "entropy_guided", -1, _LATE, _START),
        Claim("A larger policy (L) gains, too: Inception Score", "inception_score", 1, _L, _L_START),
        Claim("A larger policy (L) gains, too: truth", "truth", 1, _L, _L_START),
        Claim("The largest policy (XL) gains, too: Inception Score", "inception_score", 1, _XL, _XL_START),
        Claim("The largest policy (XL) gains, too: truth", "truth", 1, _XL, _XL_START),
        Claim("A second resolution gains, too: Inception Score", "inception_score", 1, _SECOND, _SECOND_START),
        Claim("A second resolution gains, too: truth", "truth", 1, _SECOND, _SECOND_START),
        Claim("A larger policy (L) loses recall, too", "recall", -1, _L, _L_START),
        Claim("The largest policy (XL) loses recall, too", "recall", -1, _XL, _XL_START),
        Claim("A second resolution loses recall, too", "recall", -1, _SECOND, _SECOND_START),
        Claim("A larger policy (L): sFID gets worse, too", "sfid", 1, _L, _L_START),
        Claim("The largest policy (XL): sFID gets worse, too", "sfid", 1, _XL, _XL_START),
        Claim("A second resolution: sFID gets worse, too", "sfid", 1, _SECOND, _SECOND_START),
        Claim("Text-to-image: GenEval rises", "geneval_overall", 1, _TEXT, _TEXT_START),
        Claim("Text-to-image: CLIP rises", "drawbench_clip", 1, _TEXT, _TEXT_START),
        Claim("Text-to-image: HPSv2 rises", "drawbench_hpsv2", 1, _TEXT, _TEXT_START),
        Claim("Text-to-image: entropy falls", "entropy_guided", -1, _TEXT, _TEXT_START),
        Claim("Text-to-image, the judge alone: GenEval rises", "geneval_overall", 1, _LABEL, _TEXT_START),
        Claim("Text-to-image, the judge alone: CLIP rises", "drawbench_clip", 1, _LABEL, _TEXT_START),
        Claim("Text-to-image, the judge alone: HPSv2 rises", "drawbench_hpsv2", 1, _LABEL, _TEXT_START),
        Claim("Text-to-image, the judge alone: entropy falls", "entropy_guided", -1, _LABEL, _TEXT_START),
        Claim("Text-to-image, the judge alone: without KL entropy falls", "entropy_guided", -1, _NO_KL, _TEXT_START),
        Claim("Text-to-image, the judge alone: without KL it falls further", "entropy_guided", -1, _NO_KL, _LABEL),
        Claim("Text-to-image: GenEval needs the judge", "geneval_overall", -1, Point("t2i_alignment"), _TEXT),
    ),
    "Questions that it leaves open": (
        Claim(
            "Guided log-probs: more pictures right than with conditional ones", "truth", 1, Point("c2i_guided"), _MAIN
        ),
        Claim("Guided log-probs: higher reward", "reward", 1, Point("c2i_guided"), _MAIN),
        Claim("Guided log-probs: better (lower) FID", "fid", -1, Point("c2i_guided"), _MAIN),
        Claim("Guided log-probs: more recall", "recall", 1, Point("c2i_guided"), _MAIN),
        Claim("Adaptive entropy keeps recall", "recall", 1, Point("c2i_adaptive_entropy"), _MAIN),
        Claim("Adaptive entropy keeps entropy", "entropy_guided", 1, Point("c2i_adaptive_entropy"), _MAIN),
        Claim(
            "epsilon_high 0.28 keeps recall (two passes over a rollout, as the other)",
            "recall",
            1,
            Point("c2i_epsilon_high"),
            Point("c2i_two_passes"),
        ),
        Claim("top_entropy_quantile 0.2 keeps recall", "recall", 1, Point("c2i_top_entropy"), _MAIN),
        Claim("Guided log-probs in text-to-image: higher GenEval", "geneval_overall", 1, Point("t2i_guided"), _LABEL),
        Claim("The task reward raises GenEval", "geneval_overall", 1, Point("t2i_task_reward"), _TEXT_START),
        Claim("... and more than the paper's rewards do", "geneval_overall", 1, Point("t2i_task_reward"), _TEXT),
        Claim("... and more than the judge alone does", "geneval_overall", 1, Point("t2i_task_reward"), _LABEL),
        Claim("... at the cost of CLIP's score", "drawbench_clip", -1, Point("t2i_task_reward"), _TEXT),
    ),
}


def metrics_of(table: Table, row: Row, scale: str) -> list[str]:
    """Metrics that a row of a table is measured by at a scale, in the order of its columns."""
    wanted = table.metrics if row.metrics is None else row.metrics
    return [name for name in wanted if METRICS[name].only in (None, scale) and not _is_before_training(row, name)]


def columns_of(table: Table, scale: str) -> list[str]:
    """Columns of a table at a scale."""
    return [name for name in table.metrics if METRICS[name].only in (None, scale)]


def _is_before_training(row: Row, metric: str) -> bool:
    return row.point.quarter == 0 and METRICS[metric].group == "log"
