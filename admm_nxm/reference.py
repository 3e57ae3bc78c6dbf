"""The whole algorithm on one tensor in plain loops: the oracle of the tests.

Two buffers (z and u), one weight after the other, every operation rounded to the buffers' dtype as the tensor
operations of torch round it. Slow, and independent of the fast paths: it sorts where they count, and keeps z and u
where they keep v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pattern import Pattern
from .schedules import Plan, Update

__all__ = ["ReferenceADMM", "keep_list", "project_list"]


def round_to(dtype: torch.dtype, value: float) -> float:
    """Round a double to ``dtype``: nearest, ties to even, overflow to infinity."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def keep_list(values: list[float], pattern: Pattern) -> list[bool]:
    """Mark the ``keep`` largest magnitudes of each group; ties to the lower index, NaN above everything."""
    kept = [False] * len(values)
    for first in range(0, len(values), pattern.group):
        places = range(first, first + pattern.group)
        ranked = sorted(places, key=lambda place: (not math.isnan(values[place]), -abs(_or_zero(values[place])), place))
        for place in ranked[: pattern.keep]:
            kept[place] = True
    return kept


def project_list(values: list[float], pattern: Pattern) -> list[float]:
    """Keep the marked values, zero the rest."""
    return [value if kept else 0.0 for value, kept in zip(values, keep_list(values, pattern), strict=True)]


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


@dataclass
class ReferenceADMM:
    """Scaled ADMM of the paper's form on one weight, with plain gradient descent as the w-step.

    Args:
        weight: of any shape, grouped along its last dimension. Read once; what the model holds is in :attr:`w`.
        pattern: the NxM pattern.
        plan: schedules, as :class:`admm_nxm.ADMMNxM` uses them.
        lr: step size of the gradient descent.

    Source: Boyd et al. 2011, section 3.1.1, with section 3.4.1 for a rho that changes; NxMTransformer, section 3.2.
    """

    weight: Tensor
    pattern: Pattern
    plan: Plan
    lr: float
    w: list[float] = field(init=False)
    z: list[float] = field(init=False)
    u: list[float] = field(init=False)
    mask: list[bool] | None = field(init=False, default=None)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.dtype = self.weight.dtype
        self.w = [float(value) for value in self.weight.detach().flatten().tolist()]
        self.z = project_list(self.w, self.pattern)
        self.u = [0.0] * len(self.w)
        self.rho = float(self.plan.rho(0))

    def step(self, gradient: list[float]) -> None:
        """Do one step of gradient descent and whatever the plan says comes after it."""
        gradient = list(gradient)
        for i in range(len(self.w)):
            if self.mask is not None and not self.mask[i]:
                gradient[i] = 0.0
            elif self.mask is None and self.rho > 0:
                # The penalty's gradient, rho (w - z + u).
                away = self._r(self.w[i] - (self.z[i] - self.u[i]))
                gradient[i] = self._plus_multiple(gradient[i], self.rho, away)
            self.w[i] = self._r(self.w[i] - self.lr * gradient[i])
            if self.mask is not None and not self.mask[i]:
                self.w[i] = 0.0
        self.steps += 1
        if self.mask is not None:
            return
        self.update(self.plan.updates(self.steps))
        if self.steps >= self.plan.prune_at:
            self.freeze()

    def update(self, kind: Update) -> None:
        """The z- and u-steps."""
        if kind is Update.NONE:
            return
        new_rho = float(self.plan.rho(self.steps))
        rescale = self.rho / new_rho if self.rho > 0 and new_rho > 0 else 1.0
        a = self._sum()
        kept = keep_list(a, self.pattern)
        for i in range(len(a)):
            self.z[i] = a[i] if kept[i] else 0.0
            # u = a - z, which is 0 where z = a; written out because inf - inf is not.
            self.u[i] = 0.0 if kept[i] or kind is Update.AUXILIARY else self._times(a[i], rescale)
        self.rho = new_rho

    def freeze(self) -> None:
        """W = P(w + u), and its mask from now on."""
        a = self._sum()
        self.mask = keep_list(a, self.pattern)
        self.w = [value if kept else 0.0 for value, kept in zip(a, self.mask, strict=True)]

    def _sum(self) -> list[float]:
        """W + u."""
        return [self._r(w + u) for w, u in zip(self.w, self.u, strict=True)]

    def _times(self, value: float, factor: float) -> float:
        """Multiply as torch does a tensor by a Python number: both in float32 for dtypes up to that."""
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self._r(round_to(compute, value * round_to(compute, factor)))

    def _plus_multiple(self, value: float, factor: float, other: float) -> float:
        """Add a multiple as torch does with ``alpha``."""
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self._r(round_to(compute, value + round_to(compute, round_to(compute, factor) * other)))

    def _r(self, value: float) -> float:
        return round_to(self.dtype, value)
