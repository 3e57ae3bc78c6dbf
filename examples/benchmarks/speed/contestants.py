"""What is compared: ADMMNxM in the phases that need no model, and its rivals, all behind the same functions.

Each has weights, gradients and a fused AdamW of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from admm_nxm import ADMMNxM, Pattern, keep_mask, prune
from common import BenchmarkError
from weights import Weights

INTERVAL = 10
"""Steps between two z/u updates, of ADMMNxM and of its rivals."""

RHO = 1e-3
"""Small, so that weights which are pulled again and again do not sink into denormal numbers, which are slow."""

LONG = 1_000_000
"""Steps of a run that stays in its first phase for as long as it is timed."""

OWN_KEYS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps by itself."""


class Contestant(Protocol):
    """What the benchmarks ask of each."""

    name: str
    weights: Weights

    def step(self) -> None:
        """Do a whole optimizer step, the updates that are due included."""

    def state(self) -> list[Tensor]:
        """Return the tensors that it keeps beside those of AdamW."""


def extra_state(optimizer: Any, params: Iterable[Tensor]) -> list[Tensor]:
    """Return what an optimizer's state has of each parameter beside AdamW's own."""
    states = [optimizer.state[p] for p in params]
    return [value for state in states for key, value in state.items() if key not in OWN_KEYS and torch.is_tensor(value)]


def bytes_per_weight(tensors: Sequence[Tensor], count: int) -> float:
    """Return the bytes of some tensors for each of ``count`` weights."""
    return sum(t.numel() * t.element_size() for t in tensors) / count


class Plain:
    """AdamW alone."""

    def __init__(self, weights: Weights, name: str = "AdamW (fused)") -> None:
        self.weights, self.name = weights, name

    def step(self) -> None:
        self.weights.inner.step()

    def state(self) -> list[Tensor]:
        return extra_state(self.weights.inner, self.weights.params)


class Ours:
    """ADMMNxM in one phase.

    Args:
        weights: its own.
        name: of the row.
        build: ``ADMMNxM`` or ``ADMMNxM.paper``.
        pattern: of all weights.
        options: further arguments of ``build``.
    """

    def __init__(
        self, weights: Weights, name: str, build: Callable[..., ADMMNxM], pattern: Pattern, **options: Any
    ) -> None:
        self.weights, self.name = weights, name
        self.optimizer = build(weights.inner, weights.model, select=lambda _name, _module: pattern, **options)

    def step(self) -> None:
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return extra_state(self.optimizer, self.weights.params)


def ours(fresh: Callable[[], Weights], pattern: Pattern) -> list[Ours]:
    """Return ADMMNxM in each phase that can be timed without a model; the calibration is in ``train.py``."""
    pruned = fresh()
    prune(pruned.model, select=lambda _name, _module: pattern)
    return [
        Ours(fresh(), "dense phase", ADMMNxM, pattern, total_steps=LONG),
        Ours(pruned, "frozen phase", ADMMNxM, pattern, prune_at=0),
        papers_form(fresh(), pattern),
    ]


def papers_form(weights: Weights, pattern: Pattern) -> Ours:
    """Return the paper's form before its mask is frozen."""
    plan = {"total_steps": LONG, "rho": RHO, "update_every": INTERVAL}
    return Ours(weights, "the paper's form", ADMMNxM.paper, pattern, **plan)


class Rival:
    """What the rivals have in common: their own tensors beside the weights, and an update every so many steps."""

    name: str

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        self.weights, self.pattern, self.steps = weights, pattern, 0
        self.w, self.g = weights.values, weights.gradients

    def add_penalty(self) -> None:
        """Change the gradients before AdamW's step."""

    def update(self) -> None:
        """Move z and u."""

    @torch.no_grad()
    def step(self) -> None:
        self.add_penalty()
        self.weights.inner.step()
        self.steps += 1
        if self.steps % INTERVAL == 0:
            self.update()


class TwoBuffers(Rival):
    """ADMM as it is written down: z and u beside w, in its dtype, and ``rho * (w - z + u)`` added to the gradient."""

    name = "two buffers, naive"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        super().__init__(weights, pattern)
        self.z = [w * keep_mask(w, pattern) for w in self.w]
        self.u = [torch.zeros_like(w) for w in self.w]

    def add_penalty(self) -> None:
        for g, w, z, u in zip(self.g, self.w, self.z, self.u, strict=True):
            g.add_(RHO * (w - z + u))

    def update(self) -> None:
        for w, z, u in zip(self.w, self.z, self.u, strict=True):
            a = w + u
            z.copy_(a * mask_by_topk(a, self.pattern))
            u.add_(w - z)

    def state(self) -> list[Tensor]:
        return [*self.z, *self.u]


class MaskedStep(Rival):
    """ASP-style masked training: gradient and weight are multiplied by a stored boolean mask in every step.

    After Mishra et al. 2021 (arXiv 2104.08378), section 3; an implementation of our own.
    """

    name = "ASP-style mask"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        super().__init__(weights, pattern)
        self.masks = [keep_mask(w, pattern) for w in self.w]

    @torch.no_grad()
    def step(self) -> None:
        for g, mask in zip(self.g, self.masks, strict=True):
            g.mul_(mask)
        self.weights.inner.step()
        for w, mask in zip(self.w, self.masks, strict=True):
            w.mul_(mask)

    def state(self) -> list[Tensor]:
        return self.masks


class ElsaStyle(Rival):
    """ADMM in the way of ELSA (Lee et al., arXiv 2510.01650), with this package's patterns.

    Written from the paper's equations, not its code: in every step the gradient of ``lambda/2 ||w - z + u||^2`` joins
    that of the loss before Adam's; every few steps z becomes the projection of w + u that weighs squares by Adam's
    second moment, and ``u += w - z``. z and u are float32, and the mask of z is kept as booleans.
    """

    name = "ELSA-style"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        super().__init__(weights, pattern)
        self.masks = [keep_mask(w, pattern) for w in self.w]
        self.z = [w.float() * mask for w, mask in zip(self.w, self.masks, strict=True)]
        self.u = [torch.zeros_like(z) for z in self.z]

    def add_penalty(self) -> None:
        for g, w, z, u in zip(self.g, self.w, self.z, self.u, strict=True):
            g.add_((w - z + u).to(g.dtype), alpha=RHO)

    def update(self) -> None:
        state = self.weights.inner.state
        for p, w, z, u, mask in zip(self.weights.params, self.w, self.z, self.u, self.masks, strict=True):
            a = w + u
            mask.copy_(mask_by_topk(a.square() * state[p]["exp_avg_sq"], self.pattern))
            torch.mul(a, mask, out=z)
            u.add_(w - z)

    def state(self) -> list[Tensor]:
        return [*self.z, *self.u, *self.masks]


class PruneOptimizer:
    """torchao's PAT with its N:M constraint, from its second pruning step on: the proximal map after every step."""

    name = "torchao PAT"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        try:
            from torchao.prototype.pat.optim import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
                PruneOptimizer as Pat,
            )
        except ImportError as error:
            raise BenchmarkError('torchao is not installed; run: pip install -e ".[study]"') from error
        self.weights = weights
        constraint = {
            "prox_type": "NMSparseConstraint",
            "group_type": "KElementGrouper",
            "k": pattern.group,
            "n_nonzero": pattern.keep,
        }
        weights.inner = torch.optim.AdamW([{"params": weights.params, **constraint}], lr=1e-5, fused=True)
        self.optimizer = Pat(weights.inner, warmup_steps=0)
        self.step()

    def step(self) -> None:
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return extra_state(self.weights.inner, self.weights.params)


RIVALS = (TwoBuffers, MaskedStep, ElsaStyle, PruneOptimizer)


def mask_by_topk(scores: Tensor, pattern: Pattern) -> Tensor:
    """Mark the largest magnitudes of each group along the last dimension, with torch.topk."""
    grouped = scores.abs().view(*scores.shape[:-1], -1, pattern.group)
    kept = grouped.topk(pattern.keep, dim=-1).indices
    mask = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, kept, True).view(scores.shape)
