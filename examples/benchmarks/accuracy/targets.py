"""What the study set out to reach, each target judged from the figures alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from layout import basis, difference, plain, quantity, signed
from records import PATTERNS, TESTED, Pairs, Run, scores_by_method
from summary import ROUNDING, Estimate, compare

SUBJECT = "admm"
"""The method that the targets are about: the package with its defaults."""
DISTILLED = ("admm-paper", "admm")
WITH_DEFAULTS = ("admm", "admm+kd")  # ADMMNxM as it comes; tuning and ablation runs of these may differ
RIVAL_OF_BUDGETS = "asp"
BUDGET_STEPS, BUDGET_LRS = (100, 400, 1600), (2e-5, 8e-5, 3e-4)
OVER_ASP = 1.7
NEAR_DENSE = 0.3
RESIDUAL = 0.01
PROJECTION_LOSS = 0.2

Status = Literal["pass", "fail", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """One target and what the data say of it.

    Args:
        target: what was to be reached.
        status: whether it was; "not measured" also where a single seed is all there is.
        detail: the figures behind it.
        resolved: False where the interval includes the limit.
    """

    target: str
    status: Status
    detail: str
    resolved: bool = True


@dataclass(frozen=True)
class _Part:
    """One difference held against one limit."""

    status: Status
    resolved: bool
    detail: str


def _status(overall: Estimate | None, low: float, strict: bool) -> Status:
    if overall is None or overall.n < 2:
        return "not measured"
    reached = overall.mean > low + ROUNDING if strict else overall.mean >= low - ROUNDING
    return "pass" if reached else "fail"


def _part(scores: Mapping[str, Pairs], first: str, second: str, low: float, strict: bool = False) -> _Part:
    comparison = compare(scores.get(first, {}), scores.get(second, {}))
    overall = comparison.overall
    detail = f"{first} - {second}: {difference(overall)} ({basis(comparison)})"
    if overall is None or overall.n < 2:
        return _Part("not measured", True, detail)
    # Without spread between seeds there is no interval, and nothing is resolved.
    includes = overall.includes(low)
    if low and overall.interval is not None:
        detail += f"; the interval {'includes' if includes else 'excludes'} {signed(low, 1)}"
    return _Part(_status(overall, low, strict), not includes, detail)


def _one(target: str, scores: Mapping[str, Pairs], first: str, second: str, low: float, strict: bool) -> Verdict:
    part = _part(scores, first, second, low, strict)
    return Verdict(target, part.status, part.detail, part.resolved)


def _either(target: str, parts: Sequence[_Part]) -> Verdict:
    found = [part.status for part in parts]
    # A failed half decides nothing as long as the other half is open.
    status: Status = "pass" if "pass" in found else "not measured" if "not measured" in found else "fail"
    resolved = [part.resolved for part in parts if part.status == status]
    return Verdict(
        target, status, "; ".join(part.detail for part in parts), any(resolved) if status == "pass" else all(resolved)
    )


def _asp_or_dense(target: str, scores: Mapping[str, Pairs]) -> Verdict:
    return _either(target, [_part(scores, SUBJECT, "asp", OVER_ASP), _part(scores, SUBJECT, "dense", -NEAR_DENSE)])


def judge_pattern(pattern: str, scores: Mapping[str, Pairs]) -> list[Verdict]:
    """Judge the targets of accuracy.

    Args:
        pattern: the pattern.
        scores: method -> test accuracy of each (task, seed), in final runs.

    Returns:
        A verdict for each target of this pattern; none for a pattern without targets.
    """
    if pattern not in PATTERNS:
        return []
    gain = f"{SUBJECT} at least {OVER_ASP} points above asp"
    if pattern == "2:4":
        verdicts = [_asp_or_dense(f"{gain}, or at most {NEAR_DENSE} points below dense, mean over tasks", scores)]
    else:
        verdicts = [_one(f"{gain}, mean over tasks", scores, SUBJECT, "asp", OVER_ASP, False)]
    strict = pattern != "2:4"
    for other in ("sr-ste", "pat"):
        target = f"{SUBJECT} {'above' if strict else 'not behind'} {other}, mean over tasks"
        verdicts.append(_one(target, scores, SUBJECT, other, 0.0, strict))
    return verdicts


def judge_distillation(scores: Mapping[str, Pairs]) -> list[Verdict]:
    """Judge whether distillation adds accuracy.

    Args:
        scores: method -> test accuracy of each (task, seed), in final runs of one pattern.

    Returns:
        A verdict for each method that has a distilled form.
    """
    return [
        _one(f"{method}+kd above {method}, mean over tasks", scores, f"{method}+kd", method, 0.0, True)
        for method in DISTILLED
    ]


def judge_budgets(runs: Sequence[Run]) -> Verdict | None:
    """Judge whether the defaults hold at other lengths and learning rates, nothing tuned.

    Args:
        runs: budget runs of one model and pattern.

    Returns:
        The verdict: pass where the mean is not behind ASP's at any length and learning rate; None without runs.
    """
    if not runs:
        return None
    target = f"{SUBJECT} not behind {RIVAL_OF_BUDGETS} at every length and learning rate of the budget runs"
    cells = {}
    for steps, lr in sorted({(run.steps, run.lr) for run in runs}):
        scores = scores_by_method([r for r in runs if (r.steps, r.lr) == (steps, lr)], lambda run: run.test)
        overall = compare(scores.get(SUBJECT, {}), scores.get(RIVAL_OF_BUDGETS, {})).overall
        if overall is not None:
            cells[steps, lr] = overall
    wanted = {(steps, lr) for steps in BUDGET_STEPS for lr in BUDGET_LRS}
    missing = sorted(key for key in wanted if key not in cells or cells[key].n < 2)
    if missing:
        steps, lr = missing[0]
        return Verdict(
            target, "not measured", f"{len(missing)} of {len(wanted)} lack two seeds, as {steps} steps at {lr:g}"
        )
    steps, lr = min(cells, key=lambda key: cells[key].mean)
    worst = cells[steps, lr]
    return Verdict(
        target,
        "pass" if worst.mean >= -ROUNDING else "fail",
        f"least in {len(cells)}: {steps} steps at lr {lr:g}, {difference(worst)}",
        not worst.includes(0.0),
    )


def is_admm(method: str) -> bool:
    """Say whether a method is a form of ADMM.

    Args:
        method: its name.

    Returns:
        Whether it is.
    """
    return method.startswith("admm")


def _largest(runs: Sequence[Run], figure: Callable[[Run], float | None]) -> tuple[float, Run] | None:
    values = [(abs(value), run) for run in runs if (value := figure(run)) is not None]
    return max(values, key=lambda pair: pair[0], default=None)


def _bounded(
    target: str, runs: Sequence[Run], figure: Callable[[Run], float | None], limit: float, unit: str
) -> Verdict:
    largest = _largest(runs, figure)
    if largest is None:
        return Verdict(
            target, "not measured", "no such runs" if not runs else f"in none of {quantity(len(runs), 'run')}"
        )
    value, run = largest
    missing = sum(figure(each) is None for each in runs)
    status: Status = "fail" if value >= limit - ROUNDING else "not measured" if missing else "pass"
    reach = sum(abs(found) >= limit - ROUNDING for each in runs if (found := figure(each)) is not None)
    shown = plain(value * 100, 3) + " %" if unit == "%" else f"{plain(value, 3)} points"
    detail = (
        f"max {shown} in {quantity(len(runs) - missing, 'run')} "
        f"({run.method}, {run.pattern}, {run.task}, seed {run.seed}, {run.stage}); {reach} at or over the limit"
    )
    return Verdict(target, status, detail + (f"; {missing} more without the figure" if missing else ""))


def judge_projection(runs: Sequence[Run]) -> list[Verdict]:
    """Judge how far the weights were from the pattern when they were projected, and what that cost.

    Args:
        runs: runs of every stage.

    Returns:
        Two verdicts on the runs with the defaults whose test accuracy counts, which are the targets; and two on every
        run, the paper's form, tuning and ablations included, for comparison.
    """
    every = [run for run in runs if is_admm(run.method)]
    defaults = [run for run in every if run.method in WITH_DEFAULTS]
    groups = {
        f"every default run of the stages {' and '.join(TESTED)}": [run for run in defaults if run.stage in TESTED],
        "every ADMM run of any stage, the paper's form, tuning grids and ablations included (for comparison)": every,
    }
    verdicts = []
    for name, group in groups.items():
        verdicts.append(
            _bounded(
                f"primal residual < {RESIDUAL * 100:g} % in {name}", group, lambda r: r.primal_residual, RESIDUAL, "%"
            )
        )
        verdicts.append(
            _bounded(
                f"accuracy changed by < {PROJECTION_LOSS} points at the projection in {name}",
                *(group, lambda r: r.projection_loss, PROJECTION_LOSS, "points"),
            )
        )
    return verdicts
