"""Measure the distance of a run from its constraint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Residuals", "WeightResidual", "measure", "ratio"]


@dataclass(frozen=True)
class WeightResidual:
    """The residuals of one weight.

    Args:
        primal: ``||w - z|| / ||w||``.
        dual: ``||z_new - z_old|| / ||w||`` at the last z-step; NaN before the first one and after loading a state.
        mask_churn: share of kept places that the last z-step brought in; NaN as for ``dual``.

    Source: Boyd et al. 2011, section 3.3, relative to the weight's norm.
    """

    primal: float
    dual: float
    mask_churn: float


@dataclass(frozen=True, repr=False)
class Residuals:
    """The residuals over all prunable weights together, and of each; prints as a few lines, the worst weights last.

    Args:
        primal: ``||w - z|| / ||w||`` of all weights as one vector; what projecting now would change.
        dual: ``||z_new - z_old|| / ||w||`` likewise; NaN before the first z-step and after loading a state.
        mask_churn: share of all kept places that the last z-step brought in; NaN as for ``dual``.
        per_weight: name -> residuals of that weight.
    """

    primal: float
    dual: float
    mask_churn: float
    per_weight: Mapping[str, WeightResidual]

    def __str__(self) -> str:
        worst = sorted(self.per_weight.items(), key=lambda entry: -entry[1].primal)[:3]
        shown: list[tuple[str, WeightResidual | Residuals]] = [(f"all {len(self.per_weight)} weights", self)]
        shown += [(f"  {name}", weight) for name, weight in worst]
        return "\n".join(
            f"{label}: primal {found.primal:.2%} of the norm"
            + ("" if math.isnan(found.dual) else f", dual {found.dual:.2%}, {found.mask_churn:.2%} of the mask moved")
            for label, found in shown
        )

    __repr__ = __str__


def measure(rows: Mapping[str, Sequence[float]]) -> Residuals:
    """Make residuals of sums of squares.

    Args:
        rows: name -> ``||w - z||^2``, ``||w||^2``, then of the last z-step ``||z_new - z_old||^2``, ``||w||^2``, how
            many places the mask gained and how many it keeps; NaN where it is not known, which counts as standing still
            in the total.
    """

    def figures(row: Sequence[float]) -> tuple[float, float, float]:
        gap, norm, moved, norm_then, gained, kept = row
        return ratio(gap, norm), ratio(moved, norm_then), gained / kept if kept else 0.0

    known = any(not math.isnan(row[2]) for row in rows.values())
    columns = zip(*rows.values(), strict=True)
    total = [sum(0.0 if known and math.isnan(value) else value for value in column) for column in columns]
    return Residuals(*figures(total), {name: WeightResidual(*figures(row)) for name, row in rows.items()})


def ratio(numerator: float, denominator: float) -> float:
    """Return ``sqrt(numerator / denominator)`` of two sums of squares; 0 if both are 0."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return math.sqrt(numerator / denominator)
