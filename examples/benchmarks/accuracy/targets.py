"""The targets of the study, each judged as its README declares."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from layout import with_seeds
from summary import ROUNDING, Estimate
from tables import Table

Status = Literal["passed", "failed", "not resolved", "not measured"]
BOTH = ("2:4", "1:4")
OF_WORD: dict[str, Status] = {"better": "passed", "worse": "failed", "not resolved": "not resolved"}
"""What may be said of a difference -> what that says of "above"."""


@dataclass(frozen=True)
class Verdict:
    """A target and what the raw lines say of it.

    Args:
        target: what was asked for.
        status: the judgement.
        detail: the figures behind it.
    """

    target: str
    status: Status
    detail: str


def judge(found: Estimate | None, limit: float) -> Status:
    """Judge "at least ``limit``" by an interval."""
    if found is None or found.n < 2:
        return "not measured"
    if found.interval is None:  # seeds that agree to the last digit do not show how exact the mean is
        return "not resolved"
    low, high = found.interval
    if low >= limit - ROUNDING:
        return "passed"
    return "failed" if high < limit - ROUNDING else "not resolved"


def all_of(statuses: Iterable[Status]) -> Status:
    """Judge a target whose parts must all pass."""
    listed = list(statuses)
    if not listed:
        return "not measured"
    order: tuple[Status, ...] = ("failed", "not measured", "not resolved")
    return next((status for status in order if status in listed), "passed")


def any_of(statuses: Sequence[Status]) -> Status:
    """Judge a target of which one part must pass."""
    order: tuple[Status, ...] = ("passed", "not measured", "not resolved")
    return next((status for status in order if status in statuses), "failed")


def verdicts(usual: Table, tuned: Table) -> list[Verdict]:
    """Judge every target.

    Args:
        usual: the table in which nothing is tuned.
        tuned: the tuned table.

    Returns:
        The verdicts, in the order of the declaration.
    """
    return [
        _at_least(tuned, "admm", "asp", "1:4", 1.7),
        _near_dense(tuned),
        _above_all(tuned),
        _no_task_behind(tuned),
        _at_least(usual, "admm", "asp", "1:4", 8.0),
        _at_least(usual, "admm", "asp", "2:4", 3.0),
        *(_at_least(tuned, "admm+kd", second, pattern, 0.0) for second in ("admm", "asp+kd") for pattern in BOTH),
    ]


def _at_least(table: Table, first: str, second: str, pattern: str, limit: float) -> Verdict:
    found = table.difference(first, second, pattern)
    points = f"at least {limit:g} points above" if limit else "above"
    return Verdict(f"{table.name}, {pattern}: `{first}` {points} `{second}`", judge(found, limit), with_seeds(found))


def _near_dense(table: Table) -> Verdict:
    over_asp, over_dense = (table.difference("admm", other, "2:4") for other in ("asp", "dense"))
    return Verdict(
        f"{table.name}, 2:4: `admm` at least 1.7 points above `asp`, or at most 0.3 below `dense`",
        any_of([judge(over_asp, 1.7), judge(over_dense, -0.3)]),
        f"minus `asp` {with_seeds(over_asp)}; minus `dense` {with_seeds(over_dense)}",
    )


def _above_all(table: Table) -> Verdict:
    rivals = [m for m in table.plan.methods if m not in ("dense", "admm") and not m.endswith("+kd")]
    statuses: list[Status] = []
    ahead = 0
    others: dict[str, list[str]] = defaultdict(list)
    for pattern in BOTH:
        family = table.family(pattern) if pattern in table.plan.patterns else {}
        for rival in rivals:
            found = family.get(rival)
            if found is None or found.word == "not measured":
                statuses.append("not measured")
                continue
            statuses.append(OF_WORD[found.word])
            ahead += found.estimate.mean > 0
            if found.word != "better":
                others[found.word].append(f"{pattern} `{rival}` {with_seeds(found.estimate)}")
    details = [f"ahead of {ahead} of {len(statuses)}, better than {statuses.count('passed')}"]
    details += [f"{word}: {', '.join(named)}" for word, named in others.items()]
    missing = statuses.count("not measured")
    details += [f"{missing} not measured"] if missing else []
    return Verdict(
        f"{table.name}: `admm` above every other method in the mean, at 2:4 and at 1:4",
        all_of(statuses),
        "; ".join(details),
    )


def _no_task_behind(table: Table) -> Verdict:
    found = {
        f"{pattern} {task}": table.difference("admm", "asp", pattern, task)
        for pattern in BOTH
        for task in table.plan.tasks
    }
    statuses = {name: judge(each, -0.5) for name, each in found.items()}
    measured = {name: status for name, status in statuses.items() if status != "not measured"}
    details = [f"{name} {with_seeds(found[name])}" for name, status in measured.items() if status != "passed"]
    details += [f"{len(statuses) - len(measured)} not measured"] if len(measured) < len(statuses) else []
    return Verdict(
        f"{table.name}: no task more than 0.5 behind `asp`, at 2:4 and at 1:4",
        all_of(statuses.values()),
        "; ".join(details) or "every task",
    )
