"""Range checks that several modules share."""

from __future__ import annotations

import math
from numbers import Real

__all__ = ["at_least", "is_count", "missing"]


def at_least(name: str, value: float, low: float) -> None:
    """Refuse what is not a finite number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a finite number, at least {low}")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name}={value!r} must be a finite number, at least {low}")


def is_count(name: str, value: int, low: int) -> None:
    """Refuse what is not an int of at least ``low``; the message says that optimizer steps are meant."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int, at least {low}: it counts optimizer steps")
    if value < low:
        raise ValueError(f"{name}={value} must be at least {low}: it counts optimizer steps (not epochs, not batches)")


def missing(what: str, extra: str) -> str:
    """Return what to say of a package that is not installed: it comes with an extra."""
    return f'{what}; run in a checkout of the repository: pip install ".[{extra}]"'
