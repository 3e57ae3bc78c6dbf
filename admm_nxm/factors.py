"""What the mask may rank by beside the magnitude: a tensor, or a root of one that is taken where it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

__all__ = ["LEAST", "Factor", "Root", "dense", "stored", "value"]

LEAST = 1e-20
"""What a root is taken of at least: a gradient that was always zero must not tie all of a group at zero."""


@dataclass(frozen=True)
class Root:
    """``max(base, 1e-20) ** exponent`` in float32, without a tensor for it: some backends work it out entry by entry.

    Exponents of 0.5 and 0.25 are one and two square roots, which every device rounds alike.

    Args:
        base: any floating dtype, of the weight's shape; read when the mask moves.
        exponent: above 0, at most 1.
    """

    base: Tensor
    exponent: float

    @property
    def roots(self) -> int:
        """How many square roots it is; 0 if it is something else."""
        return {0.5: 1, 0.25: 2}.get(self.exponent, 0)

    def of(self, part: Tensor) -> Tensor:
        """Return the power of a part of the base, as a new tensor."""
        power = part.to(torch.float32, copy=True).clamp_min_(LEAST)
        if self.roots == 0:
            return power.pow_(self.exponent)
        for _ in range(self.roots):
            power.sqrt_()
        return power


Factor = Union[Tensor, Root]  # noqa: UP007 - a value at run time


def stored(factor: Factor | None) -> Tensor | None:
    """Return the tensor that a factor is read from."""
    return factor.base if isinstance(factor, Root) else factor


def value(factor: Factor | None, part: Tensor | None) -> Tensor | None:
    """Return the factor of the entries of which ``part`` is what :func:`stored` has."""
    return factor.of(part) if isinstance(factor, Root) and part is not None else part


def dense(factor: Factor | None) -> Tensor | None:
    """Return the whole factor."""
    return value(factor, stored(factor))
