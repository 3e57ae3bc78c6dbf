"""What is compared: ADMMNxM in every form, and its rivals, all behind the same functions.

Each has weights, gradients and a fused AdamW of its own. ``passes`` is what it adds to a step of AdamW, ``update`` the
z/u update, ``step`` the whole step as a user calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from admm_nxm import ADMMNxM, Curvature, Pattern, Update, keep_mask
from admm_nxm.forms import form_of
from admm_nxm.kernels import BackendName, available, backend_for
from common import BenchmarkError
from weights import Weights

INTERVAL = 10
"""Steps between two z/u updates, the default of longer runs."""

RHO = 1e-3
"""Small, so that weights which are pulled again and again do not sink into denormal numbers, which are slow."""

OWN_KEYS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps by itself."""


@dataclass(frozen=True)
class FormCase:
    """One way to run ADMMNxM.

    Args:
        name: of the row.
        options: of ADMMNxM.
        frozen: whether the mask is fixed.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    frozen: bool = False


def form_cases(dtype: torch.dtype) -> list[FormCase]:
    """Return the forms for weights of a dtype, the default first."""
    short = dtype.itemsize < 4
    other = FormCase("lazy, mask alone", {"state_dtype": torch.bool}) if short else None
    other = other or FormCase("lazy, full state", {"state_dtype": dtype})
    return [
        FormCase("lazy (default)"),
        other,
        FormCase("proximal", {"penalty": "proximal"}),
        FormCase("gradient", {"penalty": "gradient"}),
        FormCase("frozen", frozen=True),
    ]


class Contestant(Protocol):
    """What the benchmarks ask of each."""

    name: str
    backend: str
    weights: Weights

    def step(self) -> None:
        """Do a whole optimizer step, the updates that are due included."""

    def state(self) -> list[Tensor]:
        """Return the tensors that it keeps beside those of AdamW."""

    @property
    def passes(self) -> Callable[[], None] | None:
        """What it adds to a step, on its own; None if that cannot be had without the step."""

    @property
    def update(self) -> Callable[[], None] | None:
        """The z/u update; None if it has none."""

    @property
    def traffic(self) -> tuple[float, float]:
        """Bytes a weight that ``passes`` and ``update`` must read and write at least, each in one go."""


def extra_state(optimizer: Any, params: Iterable[Tensor]) -> list[Tensor]:
    """Return what an optimizer's state has of each parameter beside AdamW's own."""
    states = [optimizer.state[p] for p in params]
    return [value for state in states for key, value in state.items() if key not in OWN_KEYS and torch.is_tensor(value)]


class Plain:
    """AdamW alone."""

    backend = ""
    passes: Callable[[], None] | None = None
    update: Callable[[], None] | None = None
    traffic = (0.0, 0.0)

    def __init__(self, weights: Weights, name: str = "AdamW (fused)") -> None:
        self.weights, self.name = weights, name

    def step(self) -> None:
        self.weights.inner.step()

    def state(self) -> list[Tensor]:
        return extra_state(self.weights.inner, self.weights.params)


class Ours:
    """ADMMNxM, past its first step, with a constant rho.

    Args:
        weights: its own.
        pattern: of all of them.
        case: which form.
        backend: None takes the fastest.
        plan: options that replace those for a constant rho; no step is done then.
    """

    def __init__(
        self,
        weights: Weights,
        pattern: Pattern,
        case: FormCase,
        backend: BackendName | None = None,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        self.weights, self.pattern, self.name = weights, pattern, case.name
        device = weights.params[0].device
        chosen = backend or available(device)[0]
        self.backend: str = chosen
        self.kernels = backend_for(device, chosen)
        schedule = {"rho": RHO, "update_every": INTERVAL, **({"freeze_at": 1} if case.frozen else {})}
        self.optimizer = ADMMNxM(
            weights.inner,
            weights.named.items(),
            select=lambda _name, _module: pattern,
            backend=chosen,
            **(schedule if plan is None else dict(plan)),
            **case.options,
        )
        self.frozen = case.frozen
        if plan is None:
            self.optimizer.step()
            self._look()

    def _look(self) -> None:
        self.states = [self.optimizer.state[p]["admm_consensus"] for p in self.weights.params]
        self.form = form_of(self.optimizer.penalty, full=self.states[0].is_floating_point())
        self.curvature = Curvature() if self.form.takes_saliency else None

    def step(self) -> None:
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        return extra_state(self.optimizer, self.weights.params)

    @property
    def passes(self) -> Callable[[], None]:
        weights, gradients, states = self.weights.values, self.weights.gradients, self.states
        kernels, form = self.kernels, self.form
        if self.frozen:

            def masked() -> None:
                kernels.keep_only(gradients, states)
                kernels.keep_only(weights, states)

            return masked

        def around() -> None:
            form.before(kernels, gradients, weights, states, RHO, False)
            form.after(kernels, weights, states, RHO)
            form.show(kernels, weights, states, RHO)

        return around

    @property
    def update(self) -> Callable[[], None] | None:
        if self.frozen:
            return None
        params, weights, states = self.weights.params, self.weights.values, self.states

        def move() -> None:
            for p, w, state in zip(params, weights, states, strict=True):
                factor = self.curvature(self.optimizer.state[p], w.shape) if self.curvature is not None else None
                dual = self.form.takes_dual
                self.form.advance(self.kernels, w, state, self.pattern, -1, factor, with_dual=dual, dual_scale=1.0)

        return move

    @property
    def traffic(self) -> tuple[float, float]:
        w = self.weights.params[0].element_size()
        s = bytes_per_weight(self.states, self.weights.count)
        if self.frozen:
            return 4 * w + 2 * s, 0.0  # gradient and weight, read and written
        once = {
            "the mask": 4 * w + 2 * s,  # restore, shrink
            "w off the mask": 4 * w + 3 * s,  # reveal, conceal
            "v": (3 if self.optimizer.penalty == "gradient" else 2) * w + s,
        }
        return once[self.form.stores], w + 2 * s + (w if self.curvature is not None else 0)


def bytes_per_weight(tensors: Sequence[Tensor], count: int) -> float:
    """Return the bytes of some tensors for each of ``count`` weights."""
    return sum(t.numel() * t.element_size() for t in tensors) / count


class Rival:
    """What the rivals have in common: their own tensors beside the weights."""

    backend = "eager"
    update: Callable[[], None] | None = None

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        self.weights, self.pattern, self.steps = weights, pattern, 0
        self.w, self.g = weights.values, weights.gradients
        self.weights.inner.step()


class TwoBuffers(Rival):
    """ADMM as it is written down: z and u beside w, in its dtype, and ``rho * (w - z + u)`` added to the gradient."""

    name = "two buffers, naive"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        super().__init__(weights, pattern)
        self.z = [w * keep_mask(w, pattern) for w in self.w]
        self.u = [torch.zeros_like(w) for w in self.w]

    def passes(self) -> None:
        for g, w, z, u in zip(self.g, self.w, self.z, self.u, strict=True):
            g.add_(RHO * (w - z + u))

    def update(self) -> None:
        for w, z, u in zip(self.w, self.z, self.u, strict=True):
            a = w + u
            z.copy_(a * mask_by_topk(a, self.pattern))
            u.add_(w - z)

    def step(self) -> None:
        self.passes()
        self.weights.inner.step()
        self.steps += 1
        if self.steps % INTERVAL == 0:
            self.update()

    def state(self) -> list[Tensor]:
        return [*self.z, *self.u]

    @property
    def traffic(self) -> tuple[float, float]:
        w = self.w[0].element_size()
        return 5.0 * w, 4.0 * w


class MaskedStep(Rival):
    """ASP-style masked training: gradient and weight are multiplied by a stored boolean mask in every step.

    After Mishra et al. 2021 (arXiv 2104.08378), section 3; an implementation of our own.
    """

    name = "ASP-style mask"

    def __init__(self, weights: Weights, pattern: Pattern) -> None:
        super().__init__(weights, pattern)
        self.masks = [keep_mask(w, pattern) for w in self.w]

    def passes(self) -> None:
        for g, w, mask in zip(self.g, self.w, self.masks, strict=True):
            g.mul_(mask)
            w.mul_(mask)

    def step(self) -> None:
        for g, mask in zip(self.g, self.masks, strict=True):
            g.mul_(mask)
        self.weights.inner.step()
        for w, mask in zip(self.w, self.masks, strict=True):
            w.mul_(mask)

    def state(self) -> list[Tensor]:
        return self.masks

    @property
    def traffic(self) -> tuple[float, float]:
        return 4.0 * self.w[0].element_size() + 2, 0.0


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

    def passes(self) -> None:
        for g, w, z, u in zip(self.g, self.w, self.z, self.u, strict=True):
            g.add_((w - z + u).to(g.dtype), alpha=RHO)

    def update(self) -> None:
        state = self.weights.inner.state
        for p, w, z, u, mask in zip(self.weights.params, self.w, self.z, self.u, self.masks, strict=True):
            a = w + u
            mask.copy_(mask_by_topk(a.square() * state[p]["exp_avg_sq"], self.pattern))
            torch.mul(a, mask, out=z)
            u.add_(w - z)

    def step(self) -> None:
        self.passes()
        self.weights.inner.step()
        self.steps += 1
        if self.steps % INTERVAL == 0:
            self.update()

    def state(self) -> list[Tensor]:
        return [*self.z, *self.u, *self.masks]

    @property
    def traffic(self) -> tuple[float, float]:
        w = self.w[0].element_size()
        return 3.0 * w + 8, 2.0 * w + 13


class PruneOptimizer:
    """torchao's PAT with its N:M constraint, from its second pruning step on: the proximal map after every step."""

    backend = "eager"
    name = "torchao PAT"
    passes: Callable[[], None] | None = None
    update: Callable[[], None] | None = None
    traffic = (0.0, 0.0)

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


def updates_at(*steps: int, dual: bool) -> Callable[[int], Update]:
    """Return an update schedule in which z (and u) move after these steps and no others."""
    return _At(steps, Update.AUXILIARY_AND_DUAL if dual else Update.AUXILIARY)


@dataclass(frozen=True)
class _At:
    steps: tuple[int, ...]
    update: Update

    def __call__(self, step: int, /) -> Update:
        """Return what moves after a step."""
        return self.update if step in self.steps else Update.NONE
