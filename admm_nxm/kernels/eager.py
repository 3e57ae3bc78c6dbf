"""Plain torch operations: every device, every dtype, no toolchain.

Temporaries are those of one weight at a time, never of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pattern import Pattern
from ..projection import INTEGER_OF_SIZE, keep_mask

__all__ = [
    "add_penalty",
    "advance",
    "advance_hidden",
    "conceal",
    "hidden_mask",
    "hide",
    "keep_only",
    "pull",
    "ranked",
    "reveal",
    "target",
]


def add_penalty(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], consensus: Sequence[Tensor], rho: float
) -> None:
    """Add the gradient of ``rho / 2 * ||w - v||^2``: ``g += rho * (w - v)``.

    The difference is taken first, so that nothing is added where w = v and nothing cancels in 16-bit gradients.

    Args:
        gradients: one tensor a weight, changed in place.
        weights: w.
        consensus: v, of the weights' shapes.
        rho: penalty, in units of the loss per squared weight; negative to maximise.
    """
    for g, w, v in zip(gradients, weights, consensus, strict=True):
        g.add_((w - v).to(g.dtype), alpha=rho)


def pull(weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
    """Move w toward v: ``w += fraction * (v - w)``.

    Args:
        weights: w, changed in place.
        consensus: v, of the weights' shapes.
        fraction: how far, from 0 (stay) to 1 (arrive).
    """
    for w, v in zip(weights, consensus, strict=True):
        if w.dtype == v.dtype:
            w.lerp_(v, fraction)
        else:
            wide = torch.promote_types(w.dtype, v.dtype)
            w.copy_(torch.lerp(w.to(wide), v.to(wide), fraction))


def target(weight: Tensor, consensus: Tensor, mask: Tensor) -> Tensor:
    """Return ``a = w + u``: u is 0 where the mask keeps, and -v where it does not.

    Args:
        weight: w.
        consensus: v.
        mask: the mask of v.

    Returns:
        a, in the wider of the two dtypes.
    """
    return weight + _choose(mask, None, -consensus)


def advance(
    weight: Tensor, consensus: Tensor, pattern: Pattern, dim: int, with_dual: bool, dual_scale: float
) -> Tensor:
    """Do the z- and u-steps of one weight on its single buffer: ``v = a on mask(a), -scale * a (or 0) off it``.

    a is rounded to the dtype of v before its mask is taken, or the mask of a and that of v could disagree.

    Args:
        weight: w.
        consensus: v, changed in place.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        with_dual: whether u moves; else it becomes 0.
        dual_scale: factor on u for a rho that has risen, ``rho_old / rho_new``, at most 1.

    Returns:
        float32 tensor of 4: ``||z_new - z_old||^2``, ``||w||^2``, how many places the mask gained, and how many it
        keeps.
    """
    old_mask = keep_mask(consensus, pattern, dim)
    old_auxiliary = _choose(old_mask, consensus, None)
    a = target(weight, consensus, old_mask).to(consensus.dtype)
    mask = keep_mask(a, pattern, dim)
    moved = _choose(mask, a, None).float().sub_(old_auxiliary).square_().sum()
    gained = old_mask.logical_not_().logical_and_(mask).sum()
    dual = (a if dual_scale == 1.0 else a * dual_scale) if with_dual else torch.zeros_like(a)
    # A dual of zero is stored as -0.0: only then is u, read as -v, the +0.0 that it is.
    consensus.copy_(_choose(mask, a, -dual))
    return torch.stack([moved, weight.float().square().sum(), gained.float(), mask.sum().float()])


def hidden_mask(hidden: Tensor) -> Tensor:
    """Read the mask off a hidden state: kept places hold +0.0, and nothing else does.

    Args:
        hidden: the primal weight off the mask, as :func:`hide` stores it.

    Returns:
        Boolean tensor of the same shape, True = kept.
    """
    return hidden.view(INTEGER_OF_SIZE[hidden.element_size()]) == 0


def hide(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return w off the mask and +0.0 on it, in ``dtype``.

    A zero off the mask becomes -0.0, or it would pass for a kept place.

    Args:
        weight: w.
        mask: boolean, True = kept.
        dtype: dtype of the state.

    Returns:
        A new tensor.
    """
    integer = INTEGER_OF_SIZE[dtype.itemsize]
    bits = weight.to(dtype, copy=True).view(integer)
    bits |= (bits == 0).to(integer).mul_(torch.iinfo(integer).min)  # +0.0 becomes -0.0
    return _choose(mask, None, bits.view(dtype))


def reveal(weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
    """Put the primal weight back where the model was shown a smaller one: ``w = hidden`` off the mask.

    Args:
        weights: what the model was evaluated at, changed in place.
        hidden: the hidden state of each.
    """
    for w, h in zip(weights, hidden, strict=True):
        w.copy_(_choose(hidden_mask(h), w, h.to(w.dtype)))


def conceal(weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
    """Store the primal weight off the mask, and leave the proximal point there: ``w = (1 - fraction) * w``.

    Args:
        weights: w, changed in place off the mask.
        hidden: the hidden state of each, changed in place; its mask stays.
        fraction: how far toward the pattern, from 0 (show w) to 1 (show its projection).
    """
    for w, h in zip(weights, hidden, strict=True):
        mask = hidden_mask(h)
        h.copy_(hide(w, mask, h.dtype))
        if fraction:
            w.copy_(_choose(mask, w, w * (1.0 - fraction)))


def advance_hidden(weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Tensor | None) -> Tensor:
    """Do the z-step of one weight that is brought to the pattern lazily: the mask becomes that of
    ``|w| * factor``.

    Args:
        weight: the primal weight w, revealed.
        hidden: its hidden state, changed in place.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        factor: float32, at least 0, of the weight's shape; None for 1.

    Returns:
        float32 tensor of 4, as :func:`advance` returns it; z moves where the mask does.
    """
    old_mask = hidden_mask(hidden)
    mask = keep_mask(ranked(weight, factor), pattern, dim)
    moved = _choose(mask ^ old_mask, weight, None).float().square_().sum()
    gained = old_mask.logical_not_().logical_and_(mask).sum()
    hidden.copy_(hide(weight, mask, hidden.dtype))
    return torch.stack([moved, weight.float().square().sum(), gained.float(), mask.sum().float()])


def ranked(weight: Tensor, factor: Tensor | None) -> Tensor:
    """Return what the mask ranks: ``weight * factor``, or the weight itself."""
    return weight if factor is None else weight.float() * factor


def _choose(mask: Tensor, kept: Tensor | None, other: Tensor | None) -> Tensor:
    """``where(mask, kept, other)`` with None for +0.0, on the bits: torch.where is many times slower on a CPU."""
    some = kept if kept is not None else other
    assert some is not None
    integer = INTEGER_OF_SIZE[some.element_size()]
    ones = mask.to(integer).neg_()  # all bits set where the mask keeps
    if kept is None:
        bits = some.view(integer) & ones.bitwise_not_()
    elif other is None:
        bits = some.view(integer) & ones
    else:
        bits = (kept.view(integer) & ones).bitwise_or_(other.view(integer) & ones.bitwise_not())
    return bits.view(some.dtype)


def keep_only(tensor: Tensor, mask: Tensor) -> None:
    """Set to +0.0 whatever the mask does not keep, be it NaN.

    Args:
        tensor: changed in place.
        mask: boolean, of the tensor's shape, True = kept.
    """
    tensor.masked_fill_(mask.logical_not(), 0.0)
