"""How the weights are brought to the pattern: one class for each form of the penalty.

A form says what one state tensor per weight means, what is done around the inner optimizer's step, and how z, u, the
mask and the primal weight are read off. :class:`admm_nxm.ADMMNxM` knows nothing else about it; another form is another
class here, one line in :data:`FORMS`, and its name and default plan in :mod:`admm_nxm.schedules`.

Once frozen, a weight's state is its mask alone, and no form is asked any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from . import consensus as admm
from .factors import Factor
from .kernels import Backend, eager
from .masks import stored_as, unpack
from .pattern import Pattern
from .projection import keep_mask
from .schedules import Penalty

__all__ = ["FORMS", "Form", "divisor_of", "form_of", "fraction_of", "is_lean"]

_STRONGEST = 2.0**20
"""The rho above which a shrunken weight is shown no smaller: beyond a millionth, all that is left to lose is the
precision with which w comes back."""


def fraction_of(rho: float) -> float:
    """Return how far the proximal step goes: ``argmin_x rho/2 ||x - v||^2 + 1/2 ||x - w||^2`` lies at
    ``w + rho / (1 + rho) * (v - w)``."""
    return rho / (1.0 + rho)


def divisor_of(rho: float) -> float:
    """Return ``1 + rho``: the proximal point between w and 0 is ``w / (1 + rho)``."""
    return 1.0 + min(rho, _STRONGEST)


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

    def primal(self, weight: Tensor, state: Tensor, rho: float) -> Tensor:
        """Return w, given what the model holds under the penalty in force; it may share that one's memory."""

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        """Return z."""

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        """Return u."""

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Factor | None, rho: float
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
        factor: Factor | None,
        with_dual: bool,
        dual_scale: float,
        seed: int | None = None,
    ) -> Tensor:
        """Do the z-step, and the u-step if asked; return the figures of :func:`admm_nxm.kernels.eager.advance`.

        Args:
            backend: who does it.
            weight: w.
            state: its state, changed in place.
            pattern: the NxM pattern.
            dim: the grouped dimension.
            factor: what to rank by beside the magnitude; None for 1.
            with_dual: whether u moves.
            dual_scale: factor on u for a rho that has risen.
            seed: of the stochastic rounding to the state's dtype; None rounds to nearest.
        """

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        """Leave in the weights what the model is evaluated at next, under the rho of the coming step."""

    def follow(self, backend: Backend, weight: Tensor, state: Tensor, old: float, new: float) -> None:
        """Bring a weight that has no step into line with a rho that changes, from what the model holds under the old
        one to what the next step expects under the new one."""


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

    def follow(self, backend: Backend, weight: Tensor, state: Tensor, old: float, new: float) -> None:
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

    def primal(self, weight: Tensor, state: Tensor, rho: float) -> Tensor:
        return weight

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return admm.auxiliary(state, pattern, dim)

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return admm.dual(state, pattern, dim)

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Factor | None, rho: float
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
        factor: Factor | None,
        with_dual: bool,
        dual_scale: float,
        seed: int | None = None,
    ) -> Tensor:
        return backend.advance(weight, state, pattern, dim, with_dual=with_dual, dual_scale=dual_scale, seed=seed)


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


class _Lazy(_Quiet):
    """The model is evaluated at the proximal point between w and z = P(w), and w itself is left alone.

    z follows w on the mask, which moves with the z-step; so the proximal point is w on the mask and
    ``w / (1 + rho)`` off it. The weights hold that point, and the state makes w of it again; it tells the mask as well,
    whatever that ranks by. There is no dual: w is never moved toward z, and u would grow without end.
    """

    takes_dual: ClassVar[bool] = False
    freezes_what_was_shown: ClassVar[bool] = True
    takes_saliency: ClassVar[bool] = True

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        raise NotImplementedError

    def primal(self, weight: Tensor, state: Tensor, rho: float) -> Tensor:
        raise NotImplementedError

    def auxiliary(self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return torch.where(self.mask(state, pattern, dim), weight, torch.zeros_like(weight))

    def dual(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        dtype = state.dtype if state.is_floating_point() else torch.float32
        return torch.zeros_like(self.mask(state, pattern, dim), dtype=dtype)

    def projected(
        self, weight: Tensor, state: Tensor, pattern: Pattern, dim: int, factor: Factor | None, rho: float
    ) -> tuple[Tensor, Tensor]:
        # The model has learned to do with the mask that it was shown; one that it never saw would cost accuracy.
        # Without a penalty it was shown none, and the state may be older than the weight.
        kept = self.mask(state, pattern, dim) if rho > 0 else keep_mask(eager.ranked(weight, factor), pattern, dim)
        return torch.where(kept, weight, torch.zeros_like(weight)), kept


class LazyForm(_Lazy):
    """The state is the mask, and w off it is what the model holds times ``1 + rho``.

    Good to a rounding of the weight's dtype each time rho changes, see :func:`admm_nxm.kernels.eager.restore`.
    """

    stores: ClassVar[str] = "the mask"

    def initial(self, weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return stored_as(keep_mask(weight, pattern, dim), dtype)

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return unpack(state)

    def primal(self, weight: Tensor, state: Tensor, rho: float) -> Tensor:
        w = weight.clone()
        if rho > 0:
            eager.restore([w], [state], divisor_of(rho))
        return w

    def recast(self, state: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return stored_as(unpack(state), dtype).clone()

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
            backend.restore(weights, states, divisor_of(rho))

    def advance(
        self,
        backend: Backend,
        weight: Tensor,
        state: Tensor,
        pattern: Pattern,
        dim: int,
        factor: Factor | None,
        with_dual: bool,
        dual_scale: float,
        seed: int | None = None,
    ) -> Tensor:
        return backend.advance_mask(weight, state, pattern, dim, factor)

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        if rho > 0:
            backend.shrink(weights, states, divisor_of(rho))

    def follow(self, backend: Backend, weight: Tensor, state: Tensor, old: float, new: float) -> None:
        if old == new:
            return
        if old > 0:
            backend.restore([weight], [state], divisor_of(old))
        self.show(backend, [weight], [state], new)


class FullLazyForm(_Lazy):
    """The state is w off the mask, to the last bit that its dtype can hold, and +0.0 on it and nowhere else."""

    stores: ClassVar[str] = "w off the mask"

    def initial(self, weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(weight, dtype=dtype).copy_(eager.hide(weight, keep_mask(weight, pattern, dim), dtype))

    def mask(self, state: Tensor, pattern: Pattern, dim: int) -> Tensor:
        return eager.hidden_mask(state)

    def primal(self, weight: Tensor, state: Tensor, rho: float) -> Tensor:
        w = weight.clone()
        # Without a penalty the model holds w itself, and the state may have rounded it.
        if rho > 0:
            eager.reveal([w], [state])
        return w

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
        factor: Factor | None,
        with_dual: bool,
        dual_scale: float,
        seed: int | None = None,
    ) -> Tensor:
        return backend.advance_hidden(weight, state, pattern, dim, factor)

    def show(self, backend: Backend, weights: Sequence[Tensor], states: Sequence[Tensor], rho: float) -> None:
        backend.conceal(weights, states, fraction_of(rho))

    def follow(self, backend: Backend, weight: Tensor, state: Tensor, old: float, new: float) -> None:
        # Under any other rho the next step finds w in the state; once there is no penalty it takes the weight for w.
        if old > 0 and new == 0:
            backend.reveal([weight], [state])


FORMS: Mapping[Penalty, Form] = {"lazy": LazyForm(), "proximal": ProximalForm(), "gradient": GradientForm()}
"""The form of each penalty."""

_FULL: Mapping[Penalty, Form] = {"lazy": FullLazyForm()}
"""The forms of the penalties whose usual form stores the mask alone, with a state of the weight's size."""


def is_lean(form: Form) -> bool:
    """Return whether the form stores nothing but the mask."""
    return isinstance(form, LazyForm)


def form_of(penalty: Penalty, *, full: bool) -> Form:
    """Return the form of a penalty.

    Args:
        penalty: its name.
        full: whether the state is a floating-point tensor of the weight's size.
    """
    return _FULL.get(penalty, FORMS[penalty]) if full else FORMS[penalty]
