"""How far a run is from its constraint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Residuals", "WeightResidual", "ratio"]


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


@dataclass(frozen=True)
class Residuals:
    """The residuals over all prunable weights together, and of each.

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


def ratio(numerator: float, denominator: float) -> float:
    """Return ``sqrt(numerator / denominator)`` of two sums of squares; 0 if both are 0."""
    if denominator == 0:
        return 0.0 if numerator == 0 else math.inf
    return math.sqrt(numerator / denominator)
