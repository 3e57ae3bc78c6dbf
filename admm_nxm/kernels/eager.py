"""Plain torch operations: every device, every dtype, no toolchain. What the other backends are measured by.

Temporaries never grow with the model: on a CPU they are those of a block that stays in the cache, on other devices
those of one weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..factors import Factor, dense, stored, value
from ..masks import stored_as, unpack
from ..pattern import Pattern
from ..projection import INTEGER_OF_SIZE, keep_mask

__all__ = [
    "add_penalty",
    "advance",
    "advance_hidden",
    "advance_mask",
    "conceal",
    "hidden_mask",
    "hide",
    "keep_only",
    "prepare",
    "pull",
    "ranked",
    "restore",
    "reveal",
    "round_stochastically",
    "shrink",
    "target",
]

_BLOCK = 1 << 17
"""Entries of a block on a CPU: a handful of temporaries of this size fit into a core's own cache."""


def prepare(weight: Tensor, state: torch.dtype, pattern: Pattern) -> None:
    """Do nothing: there is nothing to compile."""


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
    for whole in zip(gradients, weights, consensus, strict=True):
        for g, w, v in _pieces(*whole):
            g.add_((w - v).to(g.dtype), alpha=rho)


def pull(weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
    """Move w toward v: ``w += fraction * (v - w)``.

    Args:
        weights: w, changed in place.
        consensus: v, of the weights' shapes.
        fraction: how far, from 0 (stay) to 1 (arrive).
    """
    pairs = list(zip(weights, consensus, strict=True))
    for (dtype, other), alike in groupby(pairs, key=lambda pair: (pair[0].dtype, pair[1].dtype)):
        if dtype == other:
            ws, vs = zip(*alike, strict=True)
            torch._foreach_lerp_(ws, vs, fraction)
            continue
        wide = torch.promote_types(dtype, other)
        for whole in alike:
            for w, v in _pieces(*whole):
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
    weight: Tensor,
    consensus: Tensor,
    pattern: Pattern,
    dim: int,
    with_dual: bool,
    dual_scale: float,
    seed: int | None = None,
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
        seed: rounds a to a bfloat16 v by :func:`round_stochastically` with this seed; None rounds to nearest.

    Returns:
        float32 tensor of 4: ``||z_new - z_old||^2``, ``||w||^2``, how many places the mask gained, and how many it
        keeps.
    """
    figures, first = [], 0
    for w, v, axis in _grouped_pieces(pattern, dim, weight, consensus):
        old_mask = keep_mask(v, pattern, axis)
        old_auxiliary = _choose(old_mask, v, None)
        a = target(w, v, old_mask)
        a = a.to(v.dtype) if seed is None else round_stochastically(a, v.dtype, seed, first)
        mask = keep_mask(a, pattern, axis)
        moved = _choose(mask, a, None).float().sub_(old_auxiliary).square_().sum()
        dual = (a if dual_scale == 1.0 else a * dual_scale) if with_dual else torch.zeros_like(a)
        # A dual of zero is stored as -0.0: only then is u, read as -v, the +0.0 that it is.
        v.copy_(_choose(mask, a, -dual))
        figures.append(_figures(moved, w, old_mask, mask))
        first += w.numel()
    return _total(figures, weight)


def round_stochastically(a: Tensor, dtype: torch.dtype, seed: int, first: int = 0) -> Tensor:
    """Round to bfloat16 up or down at random, so that on average nothing is lost.

    The random bits are a hash of the seed and of each entry's place, alike on every backend and after a resume.
    Non-finite values, and dtypes that need no rounding, pass as they are.

    Args:
        a: float32 or narrower.
        dtype: bfloat16; any other dtype is converted to as usual.
        seed: 32-bit number.
        first: place of the first entry.

    Returns:
        A tensor in ``dtype``.

    Source: Gupta et al., Deep learning with limited numerical precision (ICML 2015), section 3; the hash is the
    finaliser of MurmurHash3 (Appleby).
    """
    if dtype != torch.bfloat16 or a.dtype != torch.float32:
        return a.to(dtype)
    word = 0xFFFFFFFF
    h = torch.arange(first, first + a.numel(), device=a.device).view(a.shape)
    h = (h * 0x9E3779B1 + seed) & word
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & word
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & word
    noise = (h ^ (h >> 16)) & 0xFFFF
    bits = a.contiguous().view(torch.int32).long()
    # The carry of the noise moves the kept half one place away from zero.
    rounded = (((bits & word) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(a.isfinite(), rounded, a.to(dtype))


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
    for whole in zip(weights, hidden, strict=True):
        for w, h in _pieces(*whole):
            w.copy_(_choose(hidden_mask(h), w, h.to(w.dtype)))


def conceal(weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
    """Store the primal weight off the mask, and leave the proximal point there: ``w = (1 - fraction) * w``.

    Args:
        weights: w, changed in place off the mask.
        hidden: the hidden state of each, changed in place; its mask stays.
        fraction: how far toward the pattern, from 0 (show w) to 1 (show its projection).
    """
    for whole in zip(weights, hidden, strict=True):
        for w, h in _pieces(*whole):
            mask = hidden_mask(h)
            h.copy_(hide(w, mask, h.dtype))
            if fraction:
                w.copy_(_choose(mask, w, w * (1.0 - fraction)))


def shrink(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """Leave the proximal point where the mask does not keep: ``w = w / divisor``.

    Args:
        weights: w, changed in place off the mask.
        masks: the stored mask of each.
        divisor: ``1 + rho``, rounded to float32 for weights up to that.
    """
    for whole in zip(weights, masks, strict=True):
        for w, mask in _pieces(*whole):
            wide = _wide(w)
            # A tensor, because torch divides by a number as it pleases: on CUDA by way of the reciprocal.
            smaller = wide / torch.full((), divisor, dtype=wide.dtype, device=w.device)
            w.copy_(_choose(unpack(mask), w, smaller.to(w.dtype)))


def restore(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """Undo :func:`shrink` to within a rounding: ``w = w * divisor`` where the mask does not keep.

    A weight that is shrunk and restored again and again by the same divisor stays the same from the second time on,
    because both operations round to nearest.

    Args:
        weights: changed in place off the mask.
        masks: the stored mask of each.
        divisor: as it was for :func:`shrink`.
    """
    for whole in zip(weights, masks, strict=True):
        for w, mask in _pieces(*whole):
            wide = _wide(w)
            larger = wide * torch.full((), divisor, dtype=wide.dtype, device=w.device)
            w.copy_(_choose(unpack(mask), w, larger.to(w.dtype)))


def advance_hidden(weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """Do the z-step of one weight that is brought to the pattern lazily: the mask becomes that of
    ``|w| * factor``.

    Args:
        weight: the primal weight w, revealed.
        hidden: its hidden state, changed in place.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        factor: at least 0, of the weight's shape: float32, or a :class:`admm_nxm.factors.Root`; None for 1.

    Returns:
        float32 tensor of 4, as :func:`advance` returns it; z moves where the mask does.
    """
    figures = []
    for w, h, f, axis in _grouped_pieces(pattern, dim, weight, hidden, stored(factor)):
        old_mask = hidden_mask(h)
        mask = keep_mask(ranked(w, value(factor, f)), pattern, axis)
        figures.append(_figures_of_masks(w, old_mask, mask))
        h.copy_(hide(w, mask, h.dtype))
    return _total(figures, weight)


def advance_mask(weight: Tensor, mask: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """Do the same z-step where the mask is all that is stored.

    Args:
        weight: the primal weight w, restored.
        mask: its stored mask, changed in place.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        factor: at least 0, of the weight's shape: float32, or a :class:`admm_nxm.factors.Root`; None for 1.

    Returns:
        float32 tensor of 4, as :func:`advance` returns it; z moves where the mask does.
    """
    figures = []
    for w, m, f, axis in _grouped_pieces(pattern, dim, weight, mask, stored(factor)):
        new = keep_mask(ranked(w, value(factor, f)), pattern, axis)
        figures.append(_figures_of_masks(w, unpack(m), new))
        m.copy_(stored_as(new, m.dtype))
    return _total(figures, weight)


def ranked(weight: Tensor, factor: Factor | None) -> Tensor:
    """Return what the mask ranks: ``weight * factor``, or the weight itself."""
    scale = dense(factor)
    return weight if scale is None else weight.float() * scale


def keep_only(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set to +0.0 whatever the mask does not keep, be it NaN.

    Args:
        tensors: changed in place.
        masks: the stored mask of each.
    """
    for whole in zip(tensors, masks, strict=True):
        for t, mask in _pieces(*whole):
            t.copy_(_choose(unpack(mask), t, None))


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


def _wide(weight: Tensor) -> Tensor:
    """The weight in the dtype that torch computes in."""
    return weight if weight.element_size() >= 4 else weight.float()


def _figures(moved: Tensor, weight: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """What an update returns; it may overwrite the old mask."""
    gained = old.logical_not().logical_and_(new).sum()
    return torch.stack([moved, weight.float().square().sum(), gained.float(), new.sum().float()])


def _figures_of_masks(weight: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The same where z is w on the mask."""
    return _figures(_choose(new ^ old, weight, None).float().square_().sum(), weight, old, new)


def _total(figures: list[Tensor], weight: Tensor) -> Tensor:
    if len(figures) == 1:
        return figures[0]
    return torch.stack(figures).sum(0) if figures else weight.new_zeros(4, dtype=torch.float32)


def _pieces(*tensors: Tensor, unit: int = 8) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one weight into flat blocks at the same places, where that needs no copy and saves memory.

    A packed mask is cut at an eighth of the places, so blocks are multiples of 8.
    """
    count = tensors[0].numel()
    if tensors[0].device.type != "cpu" or count <= _BLOCK or not all(t.is_contiguous() for t in tensors):
        yield tensors
        return
    step = max(_BLOCK // unit, 1) * unit
    flat = [(t.view(-1), count // t.numel()) for t in tensors]
    for first in range(0, count, step):
        last = min(first + step, count)
        yield tuple(t[first // share : last // share] for t, share in flat)


def _grouped_pieces(pattern: Pattern, dim: int, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same where groups must stay whole; each piece comes with its grouped dimension, and None stays None."""
    first = tensors[0]
    assert first is not None
    present = [t for t in tensors if t is not None]
    if dim % first.ndim != first.ndim - 1:
        yield (*tensors, dim)
        return
    for piece in _pieces(*present, unit=math.lcm(8, pattern.group)):
        parts = iter(piece)
        yield (*(None if t is None else next(parts) for t in tensors), -1)
