"""Figures as text, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from summary import Estimate

NOT_RUN = "not run"


def plain(value: float, digits: int = 1) -> str:
    """Write a number, zero without a sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """Write a difference, zero with a plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def score(estimate: Estimate | None) -> str:
    """Write mean, spread and number of seeds, such as ``81.2 ± 0.3 (5)``."""
    if estimate is None:
        return NOT_RUN
    spread = "" if estimate.sd is None else f" ± {plain(estimate.sd)}"
    return f"{plain(estimate.mean)}{spread} ({estimate.n})"


def difference(estimate: Estimate | None, digits: int = 1) -> str:
    """Write a difference with its interval, such as ``+0.4 [-0.1, +0.9]``."""
    if estimate is None:
        return NOT_RUN
    if estimate.interval is None:
        return f"{signed(estimate.mean, digits)} ({'one seed' if estimate.n < 2 else 'equal seeds'}, no interval)"
    low, high = estimate.interval
    return f"{signed(estimate.mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"


def with_seeds(estimate: Estimate | None) -> str:
    """Write a difference with its interval and the number of seeds, such as ``+0.4 [-0.1, +0.9], 5 seeds``."""
    count = "" if estimate is None or estimate.interval is None else f", {estimate.n} seeds"
    return f"{difference(estimate)}{count}"


def number(value: float) -> str:
    """Write a setting, a small one by its power of ten, such as ``0.85`` or ``1.5e-4``."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def setting_text(setting: Mapping[str, Any]) -> str:
    """Write hyperparameters, such as ``lr 5e-5, rho 0.01``."""
    return ", ".join(
        f"{name} {number(value)}" if isinstance(value, float) else f"{name} {value}" for name, value in setting.items()
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown; the first column is text, to the left, the others go to the right.

    Args:
        header: the headings.
        rows: as many cells as headings in each.

    Returns:
        The table, without a newline at the end.

    Raises:
        ValueError: a row has too few or too many cells.
    """
    if wrong := [row for row in rows if len(row) != len(header)]:
        raise ValueError(f"{len(header)} headings but {len(wrong[0])} cells in {wrong[0]}")
    rule = ["---" if column < 1 else "---:" for column in range(len(header))]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
