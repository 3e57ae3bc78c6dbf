"""The Euclidean projection onto the NxM set, as pure functions on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import Pattern

__all__ = ["INTEGER_OF_SIZE", "by_group", "keep_mask", "project", "zero_outside"]

# Ranking by pairwise comparison costs (group - 1) / 2 comparisons a weight and a sort costs about the same for any
# group; on a CPU the two meet near groups of 32.
_PAIRWISE_UP_TO = 16

# One above the bits of infinity.
_NAN_KEY = {
    torch.float16: 0x7C01,
    torch.bfloat16: 0x7F81,
    torch.float32: 0x7F800001,
    torch.float64: 0x7FF0000000000001,
}

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(w: Tensor, pattern: Pattern | str, dim: int = -1) -> Tensor:
    """Mark the ``keep`` entries of largest magnitude in each group.

    Ties go to the lower index. Magnitudes are compared as bit patterns without the sign, so denormals keep their
    order, both zeros are equal, and NaNs, all alike, rank above infinity: they are never pruned unseen.

    Args:
        w: any floating dtype, shape and memory layout.
        pattern: a Pattern or its spelling.
        dim: the grouped dimension, a multiple of ``pattern.group`` wide.

    Returns:
        Boolean tensor like ``w``, exactly ``keep`` True in each group.

    Raises:
        TypeError: ``w`` is not a dense floating-point tensor.
        IndexError: ``dim`` is out of range.
        ValueError: the width is no multiple of the group.

    Source: NxMTransformer (arXiv 2110.15766), section 3.2, the mask of equation (6).

    >>> keep_mask(torch.tensor([3.0, -4.0, 1.0, 4.0]), "2:4").tolist()
    [False, True, False, True]
    >>> keep_mask(torch.tensor([1.0, -1.0, 1.0, 1.0]), "2:4").tolist()
    [True, True, False, False]
    """
    pattern = Pattern.parse(pattern)
    dim = _check(w, pattern, dim)
    if pattern.keep == pattern.group:
        return torch.ones(w.shape, dtype=torch.bool, device=w.device)
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    grouped = by_group(mask, pattern.group, dim)
    key = by_group(_magnitude_key(w.detach()), pattern.group, dim)
    if pattern.group <= _PAIRWISE_UP_TO:
        for index, rank in enumerate(_pairwise_ranks(key)):
            torch.lt(rank, pattern.keep, out=grouped[..., index])
    else:
        order = torch.sort(key, dim=-1, descending=True, stable=True).indices
        grouped.scatter_(-1, order[..., : pattern.keep], True)
    return mask


def project(w: Tensor, pattern: Pattern | str, dim: int = -1) -> Tensor:
    """Return the nearest point of the NxM set, ``argmin_z ||z - w||  s.t.  z`` has at most ``keep`` non-zeros a group.

    Args:
        w: as in :func:`keep_mask`, like the rest; never modified.
        pattern: a Pattern or its spelling.
        dim: the grouped dimension.

    Returns:
        A new tensor: the entries marked by :func:`keep_mask`, in which it is differentiable, and +0.0 elsewhere.

    Raises:
        TypeError, IndexError, ValueError: as in :func:`keep_mask`.

    Source: NxMTransformer (arXiv 2110.15766), section 3.2, equation (6).

    >>> project(torch.tensor([3.0, -4.0, 1.0, 4.0]), "2:4").tolist()
    [0.0, -4.0, 0.0, 4.0]
    """
    return torch.where(keep_mask(w, pattern, dim), w, torch.zeros((), dtype=w.dtype, device=w.device))


def zero_outside(t: Tensor, mask: Tensor) -> None:
    """Set to +0.0, in place, what a boolean mask does not keep, be it NaN or infinite."""
    # On the bits as integers: a product of floats would leave NaN where NaN was, and torch.where is slow on a CPU.
    t.view(INTEGER_OF_SIZE[t.element_size()]).mul_(mask)


def _check(w: Tensor, pattern: Pattern, dim: int) -> int:
    """Return ``dim`` counted from the front, or raise what :func:`keep_mask` documents."""
    if not isinstance(w, Tensor) or not w.is_floating_point():
        kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"cannot project {kind}: a floating-point tensor is needed")
    if w.layout != torch.strided:
        raise TypeError(f"cannot project a tensor of layout {w.layout}: convert it with .to_dense()")
    if not -w.ndim <= dim < w.ndim:
        raise IndexError(f"dim={dim} is out of range for a tensor of shape {tuple(w.shape)}")
    dim %= w.ndim
    if w.shape[dim] % pattern.group:
        raise ValueError(
            f"width {w.shape[dim]} (dim {dim} of shape {tuple(w.shape)}) is no multiple of group={pattern.group}; "
            "choose another pattern or dimension, or leave this weight dense"
        )
    return dim


def by_group(t: Tensor, group: int, dim: int) -> Tensor:
    """View ``t`` as (..., groups, group) with the grouped dimension last; never copies."""
    moved = t.movedim(dim, -1)
    grouped: Tensor = torch.unflatten(moved, -1, (moved.shape[-1] // group, group))
    return grouped


def _magnitude_key(w: Tensor) -> Tensor:
    """Return integers in the order of ``|w|``: its bits without the sign (so orders IEEE 754), all NaNs as one."""
    if w.element_size() == 1:
        w = w.to(torch.float32)  # 8-bit floats disagree on what NaN and zero look like; float32 holds them all
    dtype = INTEGER_OF_SIZE[w.element_size()]
    return w.view(dtype).bitwise_and(torch.iinfo(dtype).max).clamp_max_(_NAN_KEY[w.dtype])


def _pairwise_ranks(key: Tensor) -> list[Tensor]:
    """Rank each position of the last dimension by descending key, ties to the lower index."""
    columns = [key[..., index].contiguous() for index in range(key.shape[-1])]
    ranks = [torch.zeros(column.shape, dtype=torch.int8, device=key.device) for column in columns]
    for low in range(len(columns)):
        for high in range(low + 1, len(columns)):
            overtaken = columns[high] > columns[low]
            ranks[low] += overtaken
            ranks[high] += overtaken.logical_not_()
    return ranks
