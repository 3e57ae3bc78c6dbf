"""Means, paired differences, t intervals and Holm's correction; free of files and of formatting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.95
ROUNDING = 1e-9
"""Differences of decimal accuracies are off by less than this in binary, and no true difference is as small."""

Scores = Mapping[tuple[str, int], float]
"""One figure for each (task, seed)."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its spread.

    Args:
        mean: the mean.
        sd: the sample standard deviation (n - 1), None for a single value.
        n: how many values.
        interval: the 95 % t interval of the mean, None for a single value or for values without spread.
        p: two-sided p-value of the mean against 0, None without an interval.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None
    p: float | None


def estimate(values: Iterable[float]) -> Estimate | None:
    """Summarise values.

    Args:
        values: one for each seed.

    Returns:
        Mean, spread and interval; None without values.
    """
    listed = list(values)
    if not listed:
        return None
    mean = statistics.fmean(listed)
    if len(listed) < 2:
        return Estimate(mean, None, 1, None, None)
    sd = statistics.stdev(listed)
    if sd <= ROUNDING:
        # Seeds that agree to the last digit say that the score is coarse, not that the mean is exact.
        return Estimate(mean, 0.0, len(listed), None, None)
    error = sd / math.sqrt(len(listed))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(listed) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(listed) - 1))
    return Estimate(mean, sd, len(listed), (mean - half, mean + half), p)


def holm(values: Sequence[float], size: int) -> list[float]:
    """Correct the p-values of one family by Holm's step-down method.

    Args:
        values: the p-values that are known.
        size: how many tests the family has; one whose p-value is not known yet counts as 1.

    Returns:
        The corrected ones, in the same order.
    """
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (size - rank) * values[index]))
        corrected[index] = largest
    return corrected


def over_tasks(scores: Scores, tasks: Sequence[str]) -> dict[int, float]:
    """Average over tasks, seed by seed.

    Args:
        scores: the figures.
        tasks: the tasks to average over.

    Returns:
        seed -> mean over tasks, for the seeds that have every task.
    """
    seeds = sorted({seed for _, seed in scores})
    complete = [seed for seed in seeds if tasks and all((task, seed) in scores for task in tasks)]
    return {seed: statistics.fmean(scores[task, seed] for task in tasks) for seed in complete}


def paired(first: Scores, second: Scores) -> dict[tuple[str, int], float]:
    """Subtract what both have.

    Args:
        first: the figures of one method.
        second: the figures of the other.

    Returns:
        first - second for each (task, seed) of both.
    """
    return {pair: first[pair] - second[pair] for pair in sorted(first.keys() & second.keys())}
