"""Figures as text, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from summary import Comparison, Estimate

NOT_MEASURED = "not measured"


def plain(value: float, digits: int = 2) -> str:
    """Write a number without a sign of zero.

    Args:
        value: the number.
        digits: decimals.

    Returns:
        Its text.
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """Write a difference, zero with a plus.

    Args:
        value: the number.
        digits: decimals.

    Returns:
        Its text.
    """
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def score(estimate: Estimate | None) -> str:
    """Write mean, spread and number of seeds.

    Args:
        estimate: of an accuracy.

    Returns:
        Such as ``81.20 ± 0.31 (3)``.
    """
    if estimate is None:
        return NOT_MEASURED
    spread = "" if estimate.sd is None else f" ± {plain(estimate.sd)}"
    return f"{plain(estimate.mean)}{spread} ({estimate.n})"


def difference(estimate: Estimate | None) -> str:
    """Write a difference and what can be said about its sign.

    Args:
        estimate: of a difference.

    Returns:
        Such as ``+0.40 [-0.10, +0.90], not resolved``.
    """
    if estimate is None:
        return NOT_MEASURED
    mean = signed(estimate.mean)
    if estimate.n < 2:
        return f"{mean} (one seed, no interval)"
    if estimate.interval is None:
        return f"{mean} ({estimate.n} equal seeds, no interval), not resolved"
    low, high = map(signed, estimate.interval)
    return f"{mean} [{low}, {high}]" + (", not resolved" if estimate.reading == "not resolved" else "")


def quantity(number: int, noun: str) -> str:
    """Write a number of things.

    Args:
        number: how many.
        noun: the singular.

    Returns:
        Such as ``1 seed`` or ``3 seeds``.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def basis(comparison: Comparison) -> str:
    """Write what an overall difference stands on.

    Args:
        comparison: the comparison.

    Returns:
        Such as ``3 seeds × 2 tasks, 6 of 7 pairs``.
    """
    if not comparison.pairs:
        return "no pairs"
    if comparison.overall is None:
        return f"no seed has all {quantity(len(comparison.tasks), 'shared task')}; {quantity(comparison.pairs, 'pair')}"
    used = "" if comparison.used == comparison.pairs else f"{comparison.used} of "
    seeds, tasks = quantity(len(comparison.seeds), "seed"), quantity(len(comparison.tasks), "task")
    return f"{seeds} × {tasks}, {used}{quantity(comparison.pairs, 'pair')}"


def setting_text(setting: Mapping[str, Any]) -> str:
    """Write hyperparameters.

    Args:
        setting: name -> value.

    Returns:
        Such as ``lr 5e-05, rho 0.01``.
    """
    return ", ".join(f"{name} {value_text(value)}" for name, value in setting.items())


def value_text(value: object) -> str:
    """Write one hyperparameter.

    Args:
        value: anything that JSON holds.

    Returns:
        Its text, floats as short as they go.
    """
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "{" + setting_text(value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write a table.

    Args:
        header: the headings.
        rows: as many cells as headings in each.
        left: how many leading columns are text, to the left; the others go to the right.

    Returns:
        Markdown, without a newline at the end.

    Raises:
        ValueError: a row has too few or too many cells.
    """
    if wrong := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"{len(header)} headings but {len(wrong[0])} cells in {wrong[0]}")
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
