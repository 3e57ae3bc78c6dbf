"""The ADMM state of one weight in one buffer, v = z - u.

After a z/u step z and u have disjoint support: with a = w + u, z is a on the mask and u is a off it. So v is a with
its sign turned off the mask, |v| = |a| (or less off the mask), and the mask is again that of the ``keep`` largest
|v|. z, u and the mask are read off v; nothing else is stored. This holds for a projection by magnitude, a rho that
never falls while u is in use, and unrelaxed steps; anything else must store the mask beside v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import eager
from .pattern import Pattern
from .projection import by_group, keep_mask, project

__all__ = ["auxiliary", "dual", "initial", "is_mask_of", "mask", "primal_sums", "projected", "recast", "rescale"]


def initial(weight: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the v that a run starts from, ``v = z = P(w)`` with ``u = 0``.

    Args:
        weight: w.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        dtype: dtype of the state.

    Returns:
        A new tensor of the weight's shape and memory layout.
    """
    a = weight.to(dtype)
    return torch.empty_like(a).copy_(torch.where(keep_mask(a, pattern, dim), a, -torch.zeros_like(a)))


def mask(consensus: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Read the mask off v."""
    return keep_mask(consensus, pattern, dim)


def auxiliary(consensus: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Read z off v: v on the mask, 0 elsewhere."""
    return project(consensus, pattern, dim)


def dual(consensus: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Read the scaled dual u off v: 0 on the mask, -v elsewhere."""
    kept = keep_mask(consensus, pattern, dim)
    return torch.where(kept, torch.zeros_like(consensus), -consensus)


def projected(weight: Tensor, consensus: Tensor, pattern: Pattern, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``P(w + u)`` and its mask.

    The mask is that of w + u rounded to the dtype of v, as in the z-step.

    Args:
        weight: w.
        consensus: v.
        pattern: the NxM pattern.
        dim: the grouped dimension.

    Returns:
        The projected weight in the weight's dtype, and the boolean mask.
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    a = eager.target(weight, consensus, keep_mask(consensus, pattern, dim))
    kept = keep_mask(a.to(consensus.dtype), pattern, dim)
    return torch.where(kept, a.to(weight.dtype), zero), kept


def primal_sums(weight: Tensor, auxiliary: Tensor) -> Tensor:
    """Return ``||w - z||^2`` and ``||w||^2`` as a float32 tensor of 2, on the weight's device."""
    w = weight.float()
    return torch.stack([(w - auxiliary.float()).square_().sum(), w.square().sum()])


def recast(consensus: Tensor, pattern: Pattern, dim: int, dtype: torch.dtype) -> Tensor:
    """Return v in another dtype with the same meaning.

    Rounding v itself could tie a kept and a pruned place and so swap z with -u; a is rounded and split anew.

    Args:
        consensus: v in its present dtype.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        dtype: the new dtype.

    Returns:
        A new tensor.
    """
    kept = keep_mask(consensus, pattern, dim)
    a = torch.where(kept, consensus, -consensus).to(dtype)
    return torch.where(keep_mask(a, pattern, dim), a, -a)


def rescale(consensus: Tensor, pattern: Pattern, dim: int, factor: float) -> None:
    """Multiply u by a factor of at most 1, in place."""
    consensus.copy_(torch.where(keep_mask(consensus, pattern, dim), consensus, consensus * factor))


def is_mask_of(mask: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Return a boolean scalar tensor: whether each group of the mask keeps exactly ``keep`` places."""
    return (by_group(mask, pattern.group, dim).sum(-1) == pattern.keep).all()
