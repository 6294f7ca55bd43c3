"""From a plan to numbers over seeds: which runs an exhibit needs, what was measured, means and standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

from benchmark.clusters import Estimate, estimate, paired_change
from benchmark.paper.exhibits import CLAIMS, METRICS, Claim, Curves, Samples, Table, metrics_of
from benchmark.paper.plan import QUARTERS, Point, Unavailable, resolve
from benchmark.paper.run import Job, Workspace

CONFIDENCE = 0.95  # of Student's t interval, which has to lie on one side of zero
LEANING = 2.0  # standard errors from which on a difference is said to lean one way

HOLDS, OPPOSITE = "holds", "does not hold: the opposite was measured"
NOT_MEASURABLE = "not measurable in the toy world"
_TOO_NOISY = "not measurable with these seeds"
LEANS, LEANS_AWAY = f"{_TOO_NOISY}: leans that way", f"{_TOO_NOISY}: leans the other way"
NOISE = f"{_TOO_NOISY}: within the noise"
NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Finding:
    """A claim beside what was measured.

    Attributes:
        difference: of the claim's point over its other point, paired by seed.
        reason: why it could not be measured, if it could not.
    """

    claim: Claim
    point: Estimate
    other: Estimate
    difference: Estimate
    verdict: str
    reason: str = ""


def judge(difference: Estimate, direction: int) -> str:
    """The verdict on a claim about the sign of a difference.

    Each seed is one paired difference. A difference counts if Student's t interval of `CONFIDENCE` over seeds leaves
    zero out (4.3 standard errors for 3 seeds), and leans one way from `LEANING` standard errors on.

    Args:
        difference: mean over seeds and its standard error.
        direction: 1 or -1, the sign that is claimed.
    """
    if difference.mean is None or difference.standard_error is None:
        return NOT_MEASURED
    size, as_claimed = abs(difference.mean), difference.mean * direction > 0
    if size == 0 or size <= LEANING * difference.standard_error:
        return NOISE
    if size <= certain_from(difference.num_clusters) * difference.standard_error:
        return LEANS if as_claimed else LEANS_AWAY
    return HOLDS if as_claimed else OPPOSITE


def certain_from(num_seeds: int) -> float:
    """Half the width of Student's t interval of `CONFIDENCE`, in standard errors."""
    return float(student_t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1))


def needs_of(exhibit: Table | Curves | Samples, scale: str) -> dict[Point, set[str]]:
    """Points of an exhibit and the groups of numbers that it shows of each; scalars of the log need no group."""
    needs: dict[Point, set[str]] = {}
    if isinstance(exhibit, Table):
        for row in exhibit.rows:
            add_needs(needs, row.point, metrics_of(exhibit, row, scale))
    elif isinstance(exhibit, Samples):
        for _, point in exhibit.points:
            needs.setdefault(point, set()).add("samples")
    else:
        for _, experiment in exhibit.experiments:
            add_needs(needs, Point(experiment), [])
            if measured := measured_at(exhibit, scale):
                for quarter in range(QUARTERS + 1):
                    add_needs(needs, Point(experiment, quarter), measured)
    return needs


def needs_of_findings() -> dict[Point, set[str]]:
    """The same of all claims of docs/findings.md."""
    needs: dict[Point, set[str]] = {}
    for claims in CLAIMS.values():
        for claim in claims:
            for point in (claim.point, claim.other):
                add_needs(needs, point, [claim.metric])
    return needs


def add_needs(needs: dict[Point, set[str]], point: Point, metrics: Iterable[str]) -> None:
    """Note that metrics of a point are wanted."""
    needs.setdefault(point, set()).update(METRICS[name].group for name in metrics if METRICS[name].group != "log")


def measured_at(figure: Curves, scale: str) -> list[str]:
    """Metrics of a figure that exist at a scale."""
    return [name for name in figure.measured if METRICS[name].only in (None, scale)]


def jobs_of(needs: Mapping[Point, set[str]], scale: str, seeds: Sequence[int]) -> tuple[list[Job], dict[str, str]]:
    """What has to be done, a job for each run and for each policy before training; and the experiments left out.

    Returns:
        Jobs run by run, all seeds of each before the next, so that a session that ends early leaves whole comparisons;
        experiment -> reason for those that this scale has not.
    """
    jobs: dict[tuple, Job] = {}
    without: dict[str, str] = {}
    for point, groups in needs.items():
        for seed in seeds:
            try:
                run = resolve(point.experiment, scale, seed)
            except Unavailable as reason:
                without[point.experiment] = str(reason)
                continue
            trained = point.quarter > 0
            key = (run.name if trained else run.policy, seed, trained)
            shared = Point(run.name, point.quarter, point.guidance)
            job = jobs.setdefault(key, Job(run, trained))
            same = next((known for known in job.needs if _same_place(known, shared)), shared)
            job.needs.setdefault(same, set()).update(groups)
    return [*jobs.values()], without


def over_seeds(workspace: Workspace, point: Point, metric: str, seeds: Sequence[int]) -> dict[int, float]:
    """A number of a point for each seed that has it.

    Raises:
        Unavailable: if this scale has no such run.
    """
    found = {}
    for seed in seeds:
        run = resolve(point.experiment, workspace.scale.name, seed)
        value = workspace.numbers(run, Point(run.name, point.quarter, point.guidance)).get(metric)
        if value is not None:
            found[seed] = value
    return found


def find(workspace: Workspace, claim: Claim, seeds: Sequence[int]) -> Finding:
    """Measure a claim on what is there."""
    nothing = Estimate(None, None, 0)
    try:
        point, other = (over_seeds(workspace, one, claim.metric, seeds) for one in (claim.point, claim.other))
    except Unavailable as reason:
        return Finding(claim, nothing, nothing, nothing, NOT_MEASURABLE, str(reason))
    difference = paired_change(other, point)
    verdict = judge(difference, claim.direction)
    return Finding(claim, estimate(point.values()), estimate(other.values()), difference, verdict)


def _same_place(a: Point, b: Point) -> bool:
    """Whether two points of one job are the same policy and guidance; before training all experiments are one."""
    return (a.quarter, a.guidance) == (b.quarter, b.guidance)
