"""The algorithms on one tensor in plain loops: the oracle of the tests.

Every operation is rounded as the tensor operations of torch round it. Slow, and independent of the fast paths: it sorts
where they count, and keeps z and u where they keep v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pattern import Pattern
from .schedules import Plan, Update

__all__ = ["ReferenceADMM", "keep_list", "project_list", "solve_by_loops"]


def round_to(dtype: torch.dtype, value: float) -> float:
    """Round a double to ``dtype``: nearest, ties to even, overflow to infinity."""
    return float(torch.tensor(value, dtype=torch.float64).to(dtype).item())


def keep_list(values: list[float], pattern: Pattern) -> list[bool]:
    """Mark the ``keep`` largest magnitudes of each group; ties to the lower index, NaN above everything."""
    rank = [(True, 0.0) if math.isnan(value) else (False, abs(value)) for value in values]
    kept: set[int] = set()
    for first in range(0, len(values), pattern.group):
        ranked = sorted(
            range(first, first + pattern.group), key=rank.__getitem__, reverse=True
        )  # equals keep their order
        kept.update(ranked[: pattern.keep])
    return [place in kept for place in range(len(values))]


def project_list(values: list[float], pattern: Pattern) -> list[float]:
    """Keep the marked values, zero the rest."""
    return [value if kept else 0.0 for value, kept in zip(values, keep_list(values, pattern), strict=True)]


@dataclass
class ReferenceADMM:
    """Scaled ADMM of the paper's form on one weight, with plain gradient descent as the w-step.

    Args:
        weight: of any shape, grouped along its last dimension; only read.
        pattern: the NxM pattern.
        plan: schedules, as :class:`admm_nxm.ADMMNxM` uses them.
        lr: of the gradient descent.

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
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32  # in which torch multiplies scalars
        self.w = [float(value) for value in self.weight.detach().flatten().tolist()]
        self.z = project_list(self.w, self.pattern)
        self.u = [0.0] * len(self.w)
        self.rho = float(self.plan.rho(0))

    def step(self, gradient: list[float]) -> None:
        """Do one step of gradient descent and whatever the plan says comes after it."""
        for i, g in enumerate(gradient):
            if self.mask is None and self.rho > 0:
                # The penalty's gradient, rho (w - z + u).
                away = self._r(self.w[i] - (self.z[i] - self.u[i]))
                g = self._plus_multiple(g, self.rho, away)
            pruned = self.mask is not None and not self.mask[i]
            self.w[i] = 0.0 if pruned else self._r(self.w[i] - self.lr * g)
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
        self.z = project_list(a, self.pattern)
        for i in range(len(a)):
            # u = a - z, which is 0 where z = a; written out because inf - inf is not.
            self.u[i] = 0.0 if kept[i] or kind is Update.AUXILIARY else self._times(a[i], rescale)
        self.rho = new_rho

    def freeze(self) -> None:
        """W = P(w + u), and its mask from now on."""
        a = self._sum()
        self.mask = keep_list(a, self.pattern)
        self.w = project_list(a, self.pattern)

    def _sum(self) -> list[float]:
        return [self._r(w + u) for w, u in zip(self.w, self.u, strict=True)]

    def _times(self, value: float, factor: float) -> float:
        """Multiply as torch does a tensor by a Python number."""
        return self._r(round_to(self.wide, value * round_to(self.wide, factor)))

    def _plus_multiple(self, value: float, factor: float, other: float) -> float:
        """Add a multiple as torch does with ``alpha``."""
        return self._r(round_to(self.wide, value + round_to(self.wide, round_to(self.wide, factor) * other)))

    def _r(self, value: float) -> float:
        return round_to(self.dtype, value)


def solve_by_loops(
    weight: Tensor,
    pattern: Pattern,
    inputs: Tensor,
    outputs: Tensor,
    *,
    input_damping: float,
    output_damping: float,
    rho: float,
    growth: float,
    rounds: int,
    relaxation: float,
    telling: float,
) -> tuple[list[list[float]], list[list[bool]], float, int]:
    """Solve the layer problem in plain loops, with the Kronecker matrix of both moments written out.

    Everything is in double precision.

    Args:
        weight: W0, 2-D and small (up to some 6 x 8), grouped along its columns.
        pattern: the NxM pattern.
        inputs: A.
        outputs: G.
        input_damping: as of :func:`admm_nxm.solver.solve`, like all that follow.
        output_damping: of G.
        rho: the first penalty.
        growth: of rho.
        rounds: at most.
        relaxation: over-relaxation of the w-step.
        telling: a mask that stands still ends the rounds from this rho on.

    Returns:
        The weight, its mask, the model error in the damped metric, and the rounds that ADMM took.
    """
    height, width = weight.shape
    a, s = _damped(inputs.tolist(), input_damping)
    g, t = _damped(outputs.tolist(), output_damping)
    places = [(i, j) for i in range(height) for j in range(width)]
    metric = [[g[i][k] * a[j][m] for k, m in places] for i, j in places]
    w0 = [float(weight[i, j]) * t[i] * s[j] for i, j in places]
    size = range(len(places))
    pull = [sum(metric[p][q] * w0[q] for q in size) for p in size]

    z = project_list(w0, pattern)
    mask, u, done = keep_list(w0, pattern), [0.0] * len(w0), 0
    while done < rounds:
        system = [[metric[p][q] + (rho if p == q else 0.0) for q in size] for p in size]
        w = _eliminate(system, [pull[p] + rho * (z[p] - u[p]) for p in size])
        relaxed = [relaxation * w[p] + (1.0 - relaxation) * z[p] for p in size]
        target = [relaxed[p] + u[p] for p in size]
        before, mask = mask, keep_list(target, pattern)
        z = [target[p] if mask[p] else 0.0 for p in size]
        u = [(target[p] - z[p]) / growth for p in size]
        done += 1
        if mask == before and rho >= telling:
            break
        rho *= growth

    def refitted(kept: list[bool]) -> list[float]:
        on = [p for p in size if kept[p]]
        found = iter(_eliminate([[metric[p][q] for q in on] for p in on], [pull[p] for p in on]))
        return [next(found) if kept[p] else 0.0 for p in size]

    def loss(x: list[float]) -> float:
        away = [x[p] - w0[p] for p in size]
        return sum(away[p] * metric[p][q] * away[q] for p in size for q in size)

    masks = [mask, keep_list([float(weight[i, j]) for i, j in places], pattern), keep_list(w0, pattern)]
    x, kept = min(((refitted(kept), kept) for kept in masks), key=lambda solution: loss(solution[0]))
    rows = range(height)
    return (
        [[x[i * width + j] / (t[i] * s[j]) for j in range(width)] for i in rows],
        [kept[i * width : (i + 1) * width] for i in rows],
        loss(x) / loss([0.0] * len(w0)),
        done,
    )


def _damped(moment: list[list[float]], damping: float) -> tuple[list[list[float]], list[float]]:
    """Add the damping, and scale to a unit diagonal. Returns the matrix and the roots of its diagonal."""
    size = range(len(moment))
    added = damping * sum(moment[i][i] for i in size) / len(moment)
    roots = [math.sqrt(moment[i][i] + added) for i in size]
    scaled = [[(moment[i][j] + (added if i == j else 0.0)) / (roots[i] * roots[j]) for j in size] for i in size]
    return scaled, roots


def _eliminate(system: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive definite system by Gaussian elimination."""
    rows = [[*row, value] for row, value in zip(system, right, strict=True)]
    for p, pivot in enumerate(rows):
        for row in rows[p + 1 :]:
            factor = row[p] / pivot[p]
            for q in range(p, len(pivot)):
                row[q] -= factor * pivot[q]
    found = [0.0] * len(rows)
    for p in reversed(range(len(rows))):
        known = sum(rows[p][q] * found[q] for q in range(p + 1, len(rows)))
        found[p] = (rows[p][-1] - known) / rows[p][p]
    return found
