"""The two tables of the study as figures: tuned, and with nothing tuned."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plans
from plans import Choice, Line, Plan
from summary import Estimate, Scores, estimate, holm, over_tasks, paired

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Compared:
    """A difference within a family.

    Args:
        estimate: of the difference.
        p: corrected by Holm; None without an interval.
    """

    estimate: Estimate
    p: float | None

    @property
    def word(self) -> str:
        """What may be said of it; one seed says nothing."""
        if self.estimate.n < 2:
            return "not measured"
        if self.p is None or self.p >= SIGNIFICANT:
            return "not resolved"
        return "better" if self.estimate.mean > 0 else "worse"


@dataclass(frozen=True)
class Table:
    """Test accuracies of all methods.

    Args:
        name: "tuned" or "nothing tuned".
        plan: the study.
        choices: (method, pattern) -> the learning rates and settings that its scores are the mean of.
        scores: (method, pattern) -> the scores; ``dense`` has the pattern None.
        devices: (method, pattern) -> (task, seed) -> what each of the scores' runs was made on.
    """

    name: str
    plan: Plan
    choices: Mapping[tuple[str, str | None], Sequence[Choice]]
    scores: Mapping[tuple[str, str | None], Scores]
    devices: Mapping[tuple[str, str | None], Mapping[tuple[str, int], Sequence[str]]]

    def of(self, method: str, pattern: str) -> Scores:
        """Return the scores of a method; those of ``dense`` stand beside every pattern, with the seeds of it."""
        found = self.scores.get(cell_of(method, pattern), {})
        seeds, _ = self.plan.patterns.get(pattern, ((), pattern))
        return {pair: score for pair, score in found.items() if pair[1] in seeds}

    def unlike(self, first: str, second: str, pattern: str) -> tuple[int, int]:
        """Return how many of the compared pairs were made on different devices, and how many pairs there are."""
        on = [self.devices.get(cell_of(method, pattern), {}) for method in (first, second)]
        pairs = paired(self.of(first, pattern), self.of(second, pattern))
        return sum(on[0][pair] != on[1][pair] for pair in pairs), len(pairs)

    def mean(self, method: str, pattern: str, task: str | None = None) -> Estimate | None:
        """Return the mean over seeds of one task, or of the mean over all tasks."""
        return self._estimate(self.of(method, pattern), task)

    def difference(self, first: str, second: str, pattern: str, task: str | None = None) -> Estimate | None:
        """Return the mean over seeds of the paired difference, of one task or of the mean over all tasks."""
        return self._estimate(paired(self.of(first, pattern), self.of(second, pattern)), task)

    def _estimate(self, scores: Scores, task: str | None) -> Estimate | None:
        if task is not None:
            return estimate(score for (name, _), score in sorted(scores.items()) if name == task)
        return estimate(over_tasks(scores, self.plan.tasks).values())

    def family(self, pattern: str) -> dict[str, Compared]:
        """Return ``admm`` minus each other method, with p-values corrected for all of them, measured or not."""
        others = [method for method in self.plan.methods if method != "admm"]
        found = {method: d for method in others if (d := self.difference("admm", method, pattern)) is not None}
        tested = [method for method, difference in found.items() if difference.p is not None]
        corrected = dict(zip(tested, holm([found[method].p or 0.0 for method in tested], len(others)), strict=True))
        return {method: Compared(difference, corrected.get(method)) for method, difference in found.items()}


def cell_of(method: str, pattern: str) -> tuple[str, str | None]:
    """Return where a table has what stands beside a pattern; ``dense`` has none of its own."""
    return method, None if method == "dense" else pattern


def tuned(plan: Plan, lines: Sequence[Line]) -> Table:
    """Build the table in which every method has the choice that dev made."""
    tuning = plans.Tuning(plan, lines)
    found = {cell: tuning.choose(*cell) for cell in _cells(plan)}
    return _table("tuned", plan, lines, {cell: [choice] for cell, choice in found.items() if choice is not None})


def usual(plan: Plan, lines: Sequence[Line]) -> Table:
    """Build the table in which nothing is tuned: the mean over the usual learning rates."""
    return _table("nothing tuned", plan, lines, {cell: plans.usual(plan, cell[0]) for cell in _cells(plan)})


def _cells(plan: Plan) -> list[tuple[str, str | None]]:
    return [(m, p) for m in plan.methods for p in ((None,) if m == "dense" else tuple(plan.patterns))]


def _table(name: str, plan: Plan, lines: Sequence[Line], choices: dict[tuple[str, str | None], list[Choice]]) -> Table:
    final: dict[Any, dict[tuple[str, int], Line]] = defaultdict(dict)
    for line in lines:
        if line["stage"] == "final" and plan.mine(line):
            setting = tuple(sorted(line["setting"].items()))
            final[line["method"], line["pattern"], line["lr"], setting][line["task"], line["seed"]] = line
    scores, devices = {}, {}
    for (method, pattern), chosen in choices.items():
        parts = [final.get((method, pattern, lr, tuple(sorted(s.items()))), {}) for lr, s in chosen]
        pairs = set.intersection(*(set(part) for part in parts))
        scores[method, pattern] = {pair: statistics.fmean(part[pair]["test"] for part in parts) for pair in pairs}
        devices[method, pattern] = {pair: [part[pair]["device"] for part in parts] for pair in pairs}
    return Table(name, plan, choices, scores, devices)
