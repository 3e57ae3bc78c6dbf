"""How the weights are brought to the pattern: one class for each form of the penalty.

A form says what one state tensor per weight means, what is done around the inner optimizer's step, and how z, u, the
mask and the primal weight are read off. :class:`admm_nxm.ADMMNxM` knows nothing else about it; another form is another
class here, one line in :data:`FORMS`, and its name and default plan in :mod:`admm_nxm.schedules`.

Once frozen, every form's state is the boolean mask alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from . import consensus as admm
from .kernels import Backend, eager
from .pattern import Pattern
from .projection import keep_mask
from .schedules import Penalty

__all__ = ["FORMS", "Form", "fraction_of"]


def fraction_of(rho: float) -> float:
    """Return how far the proximal step goes: ``argmin_x rho/2 ||x - v||^2 + 1/2 ||x - w||^2`` lies at
    ``w + rho / (1 + rho) * (v - w)``."""
    return rho / (1.0 + rho)


class Form(Protocol):
    """What the optimizer asks of a form. Weights, gradients and states are plain local tensors."""

    stores: ClassVar[str]
    """What the state is, for checkpoints: forms that store the same can load each other's."""

    takes_dual: ClassVar[bool]
    """Whether u may move."""

    freezes_what_was_shown: ClassVar[bool]
    """Whether the mask that freezes is the one that the model was evaluated with, so that z must not move just then."""

    takes_saliency: ClassVar[bool]
    """Whether the projection may rank by something else than magnitude: the state must tell its mask without it."""

    def initial(self, weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the state that a run starts from: ``z = P(w)``, ``u = 0``."""

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        """Return the mask, a boolean tensor; it may share the state's memory."""

    def primal(self, weight: Tensor, state: Tensor) -> Tensor:
        """Return w, given what the model holds; it may share that one's memory."""

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        """Return z."""

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        """Return u."""

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Tensor | None, rho: float
    ) -> tuple[Tensor, Tensor]:
        """Return ``P(w + u)`` in the weight's dtype, and its mask.

        Args:
            weight: what the model holds.
            state: its state.
            pattern: the NxM pattern.
            dim: the grouped dimension.
            factor: what to rank by beside the magnitude; None for 1.
            rho: the penalty in force; at 0 the model has seen nothing of z yet.
        """

    def recast(self, state: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the state in another dtype with the same meaning, as a new tensor."""

    def rescale(self, state: Tensor, pattern: Pattern, dim: int, factor: float) -> None:
        """Multiply u by a factor of at most 1, in place."""

    def before(
        self,
        backend: Backend,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        states: Sequence[Tensor],
        rho: float,
        maximize: bool,
    ) -> None:
        """Do what comes before the inner optimizer's step."""

    def after(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        """Do what comes after it."""

    def advance(
        self,
        backend: Backend,
        weight: Tensor,
        state: Tensor,
        pattern: Pattern,
        dim: int,
        factor: Tensor | None,
        with_dual: bool,
        dual_scale: float,
    ) -> Tensor:
        """Do the z-step, and the u-step if asked; return the figures of :func:`admm_nxm.kernels.eager.advance`."""

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        """Leave in the weights what the model is evaluated at next, under the rho of the coming step."""

    def release(self, backend: Backend, weight: Tensor, state: Tensor) -> None:
        """Leave w itself in a weight that had no step while rho fell to zero: from then on nothing is put back."""


class _Quiet:
    """What a form does where it has nothing to do."""

    def rescale(self, state: Tensor, pattern: Pattern, dim: int, factor: float) -> None:
        pass

    def before(
        self,
        backend: Backend,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        states: Sequence[Tensor],
        rho: float,
        maximize: bool,
    ) -> None:
        pass

    def after(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        pass

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        pass

    def release(self, backend: Backend, weight: Tensor, state: Tensor) -> None:
        pass


class _Consensus(_Quiet):
    """State v = z - u, and the weights hold w itself."""

    stores: ClassVar[str] = "v"
    takes_dual: ClassVar[bool] = True
    freezes_what_was_shown: ClassVar[bool] = False
    takes_saliency: ClassVar[bool] = False

    def initial(self, weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return admm.initial(weight, pattern, dim, dtype)

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return admm.mask(state, pattern, dim)

    def primal(self, weight: Tensor, state: Tensor) -> Tensor:
        return weight

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return (
            admm.projected(weight, state, pattern, dim)[0] if _is_mask(state) else admm.auxiliary(state, pattern, dim)
        )

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return admm.dual(state, pattern, dim)

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Tensor | None, rho: float
    ) -> tuple[Tensor, Tensor]:
        return admm.projected(weight, state, pattern, dim)

    def recast(self, state: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return admm.recast(state, pattern, dim, dtype)

    def rescale(self, state: Tensor, pattern: Pattern, dim: int, factor: float) -> None:
        admm.rescale(state, pattern, dim, factor)

    def advance(
        self,
        backend: Backend,
        weight: Tensor,
        state: Tensor,
        pattern: Pattern,
        dim: int,
        factor: Tensor | None,
        with_dual: bool,
        dual_scale: float,
    ) -> Tensor:
        return backend.advance(weight, state, pattern, dim, with_dual=with_dual, dual_scale=dual_scale)


class GradientForm(_Consensus):
    """``rho * (w - v)`` is added to the gradient."""

    def before(
        self,
        backend: Backend,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        states: Sequence[Tensor],
        rho: float,
        maximize: bool,
    ) -> None:
        if rho > 0:
            backend.add_penalty(gradients, weights, states, -rho if maximize else rho)


class ProximalForm(_Consensus):
    """After the inner step w itself makes the proximal step toward v."""

    def after(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        if rho > 0:
            backend.pull(weights, states, fraction_of(rho))


class LazyForm(_Quiet):
    """The model is evaluated at the proximal point between w and z = P(w), and w itself is left alone.

    z follows w on the mask, which moves with the z-step; so the proximal point is w on the mask and
    ``w / (1 + rho)`` off it. The weights hold that point, and the state holds what it lacks: w off the mask. On the
    mask the state is +0.0, and nowhere else, so it tells the mask as well. There is no dual: w is never moved toward
    z, and u would grow without end.
    """

    stores: ClassVar[str] = "w off the mask"
    takes_dual: ClassVar[bool] = False
    freezes_what_was_shown: ClassVar[bool] = True
    takes_saliency: ClassVar[bool] = True

    def initial(self, weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(weight, dtype=dtype).copy_(eager.hide(weight, keep_mask(weight, pattern, dim), dtype))

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        if _is_mask(state):
            return state
        return eager.hidden_mask(state)

    def primal(self, weight: Tensor, state: Tensor) -> Tensor:
        if _is_mask(state):
            return weight
        w = weight.clone()
        eager.reveal([w], [state])
        return w

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return torch.where(self.mask(state, pattern, dim), weight, torch.zeros_like(weight))

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return torch.zeros_like(state)

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Tensor | None, rho: float
    ) -> tuple[Tensor, Tensor]:
        if _is_mask(state):
            return torch.where(state, weight, torch.zeros_like(weight)), state
        # Without a penalty the model holds w itself, and the state may have rounded it.
        w = self.primal(weight, state) if rho > 0 else weight
        # The model has learned to do with the mask that it was shown; one that it never saw would cost accuracy.
        kept = self.mask(state, pattern, dim) if rho > 0 else keep_mask(eager.ranked(w, factor), pattern, dim)
        return torch.where(kept, w, torch.zeros_like(w)), kept

    def recast(self, state: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return eager.hide(state, eager.hidden_mask(state), dtype)

    def before(
        self,
        backend: Backend,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        states: Sequence[Tensor],
        rho: float,
        maximize: bool,
    ) -> None:
        if rho > 0:
            backend.reveal(weights, states)

    def advance(
        self,
        backend: Backend,
        weight: Tensor,
        state: Tensor,
        pattern: Pattern,
        dim: int,
        factor: Tensor | None,
        with_dual: bool,
        dual_scale: float,
    ) -> Tensor:
        return backend.advance_hidden(weight, state, pattern, dim, factor)

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        backend.conceal(weights, states, fraction_of(rho))

    def release(self, backend: Backend, weight: Tensor, state: Tensor) -> None:
        backend.reveal([weight], [state])


def _is_mask(state: Tensor) -> bool:
    return state.dtype == torch.bool


FORMS: Mapping[Penalty, Form] = {"lazy": LazyForm(), "proximal": ProximalForm(), "gradient": GradientForm()}
