"""Range checks that several modules share."""

from __future__ import annotations

import math
from numbers import Real

__all__ = ["at_least"]


def at_least(name: str, value: float, low: float) -> None:
    """Refuse what is not a finite number of at least ``low``.

    Raises:
        TypeError: not a real number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a finite number, at least {low}")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}={value!r} must be a finite number, at least {low}")
