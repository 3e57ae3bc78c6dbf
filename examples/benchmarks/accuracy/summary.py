"""Means, paired differences and t intervals, free of files and of formatting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats  # type: ignore[import-untyped]

from records import Pairs

LEVEL = 0.95
ROUNDING = 1e-9
"""Differences of decimal accuracies are off by less than this in binary, and no true difference is as small."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its spread.

    Args:
        mean: the mean.
        sd: the sample standard deviation (n - 1), None for a single value.
        n: how many values.
        interval: the t interval of the mean, None for a single value or for values without spread.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None

    @property
    def reading(self) -> Literal["above", "below", "not resolved", "one seed"]:
        """What the interval says about the sign of the mean."""
        if self.n < 2:
            return "one seed"
        if self.includes(0.0):
            return "not resolved"
        return "above" if self.mean > 0 else "below"

    def includes(self, value: float) -> bool:
        """Say whether the interval leaves a value possible.

        Args:
            value: the value.

        Returns:
            Whether it is in the interval; True without one, which excludes nothing.
        """
        if self.interval is None:
            return True
        return self.interval[0] - ROUNDING <= value <= self.interval[1] + ROUNDING


@dataclass(frozen=True)
class Comparison:
    """Paired differences between two methods, the first minus the second.

    Args:
        per_task: task -> the differences of that task over its seeds.
        overall: over the seed-wise means over tasks, None where no seed has every shared task.
        tasks: the tasks that both methods have.
        seeds: the seeds that have all of these tasks; ``overall`` is over these.
        pairs: how many (task, seed) both methods have.
    """

    per_task: dict[str, Estimate]
    overall: Estimate | None
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    pairs: int

    @property
    def used(self) -> int:
        """How many pairs are in ``overall``."""
        return len(self.tasks) * len(self.seeds)

    def count(self, reading: str) -> int:
        """Count tasks.

        Args:
            reading: as of ``Estimate.reading``.

        Returns:
            How many tasks read so.
        """
        return sum(estimate.reading == reading for estimate in self.per_task.values())


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
        return Estimate(mean, None, 1, None)
    sd = statistics.stdev(listed)
    if sd <= ROUNDING:
        # Seeds that agree to the last digit say that the score is coarse, not that the mean is exact.
        return Estimate(mean, 0.0, len(listed), None)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(listed) - 1)) * sd / math.sqrt(len(listed))
    return Estimate(mean, sd, len(listed), (mean - half, mean + half))


def tasks_of(pairs: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    """List tasks.

    Args:
        pairs: (task, seed), any number of each.

    Returns:
        Each task once, by alphabet.
    """
    return tuple(sorted({task for task, _ in pairs}))


def complete_seeds(pairs: Pairs, tasks: Sequence[str]) -> tuple[int, ...]:
    """List the seeds that have every task.

    Args:
        pairs: the figures.
        tasks: the tasks.

    Returns:
        The seeds, rising; none without tasks.
    """
    seeds = sorted({seed for _, seed in pairs})
    return tuple(seed for seed in seeds if tasks and all((task, seed) in pairs for task in tasks))


def seed_means(pairs: Pairs, tasks: Sequence[str]) -> dict[int, float]:
    """Average over tasks, seed by seed.

    Args:
        pairs: the figures.
        tasks: the tasks to average over.

    Returns:
        seed -> mean over tasks, for the seeds that have every task.
    """
    return {seed: statistics.fmean(pairs[task, seed] for task in tasks) for seed in complete_seeds(pairs, tasks)}


def of_task(pairs: Pairs, task: str) -> list[float]:
    """Take the figures of a task.

    Args:
        pairs: the figures.
        task: the task.

    Returns:
        Its figures, by seed.
    """
    return [value for (name, _), value in sorted(pairs.items()) if name == task]


def mean_over_tasks(pairs: Pairs) -> float | None:
    """Average the means of the tasks.

    Args:
        pairs: the figures.

    Returns:
        The mean in which every task counts the same, whatever its number of seeds; None without figures.
    """
    if not pairs:
        return None
    return statistics.fmean(statistics.fmean(of_task(pairs, task)) for task in tasks_of(pairs))


def compare(first: Pairs, second: Pairs) -> Comparison:
    """Compare two methods on what both have.

    Args:
        first: the figures of one method.
        second: the figures of the other.

    Returns:
        The differences, first minus second.
    """
    differences = {pair: first[pair] - second[pair] for pair in sorted(first.keys() & second.keys())}
    tasks = tasks_of(differences)
    means = seed_means(differences, tasks)
    per_task = {task: found for task in tasks if (found := estimate(of_task(differences, task))) is not None}
    return Comparison(per_task, estimate(means.values()), tasks, tuple(means), len(differences))
