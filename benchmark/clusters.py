"""Means over clusters: images of one prompt or class resemble each other, so their mean counts as one value."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

Cluster = TypeVar("Cluster", bound=Hashable)


class Estimate(NamedTuple):
    """A mean over clusters and its standard error, both in the values' own unit.

    Attributes:
        mean: plain mean of the cluster means, or None without clusters.
        standard_error: sample standard deviation (divisor K - 1) of the K cluster means / sqrt(K); None below 2.
        num_clusters: K.
    """

    mean: float | None
    standard_error: float | None
    num_clusters: int


def cluster_means(values: Iterable[tuple[Cluster, float]]) -> dict[Cluster, float]:
    """Mean of each cluster from pairs (cluster, value), in the order in which clusters first appear."""
    members: dict[Cluster, list[float]] = defaultdict(list)
    for cluster, value in values:
        members[cluster].append(value)
    return {cluster: statistics.fmean(members[cluster]) for cluster in members}


def estimate(means: Iterable[float]) -> Estimate:
    """Mean and standard error over the means of clusters, which are independent of each other."""
    means = list(means)
    if not means:
        return Estimate(None, None, 0)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Estimate(statistics.fmean(means), error, len(means))


def paired_change(before: Mapping[Cluster, float], after: Mapping[Cluster, float]) -> Estimate:
    """After minus before over the clusters that both have.

    The same prompt is hard for every model; taking differences removes that, so the error is smaller than the two
    errors of the means suggest.
    """
    return estimate(after[cluster] - before[cluster] for cluster in before if cluster in after)


def estimate_text(found: Estimate, sign: str = "") -> str:
    """As tables print it, 0.1234 ± 0.0012; `sign` "+" shows that of a change."""
    if found.mean is None:
        return "-"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.4f}"
    return f"{found.mean:{sign}.4f}{error}"
