"""The ADMM state of one weight of the paper's form in one buffer, v = z - u.

After a z/u step z and u have disjoint support: with a = w + u, z is a on the mask and u is a off it. So v is a with
its sign turned off the mask, |v| = |a| (or less off the mask), and the mask is again that of the ``keep`` largest
|v|. z, u and the mask are read off v, in the dtype of the weight. This holds for a projection by magnitude, a rho that
never falls while u is in use, and unrelaxed steps; anything else must store the mask beside v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import Pattern
from .projection import by_group, keep_mask

__all__ = [
    "add_penalty",
    "advance",
    "dual",
    "initial",
    "is_mask_of",
    "primal_sums",
    "projected",
    "rescale",
]


def initial(weight: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Return the v that a run starts from, ``v = z = P(w)`` with ``u = 0``, in the memory layout of the weight."""
    return torch.empty_like(weight).copy_(torch.where(keep_mask(weight, pattern, dim), weight, -0.0))


def add_penalty(gradients: list[Tensor], weights: list[Tensor], consensus: list[Tensor], rho: float) -> None:
    """Add the gradient of ``rho / 2 * ||w - v||^2``, in place: ``g += rho * (w - v)``; rho is negative to maximise."""
    if gradients:
        # The difference first: nothing is added where w = v, and nothing cancels in 16-bit gradients.
        torch._foreach_add_(gradients, torch._foreach_sub(weights, consensus), alpha=rho)


def advance(
    weight: Tensor, consensus: Tensor, pattern: Pattern, dim: int, *, with_dual: bool, dual_scale: float
) -> Tensor:
    """Do the z- and u-steps of one weight on its single buffer: ``v = a on mask(a), -scale * a (or 0) off it``.

    Args:
        weight: w.
        consensus: v, changed in place.
        pattern: the NxM pattern.
        dim: the grouped dimension.
        with_dual: whether u moves; else it becomes 0.
        dual_scale: factor on u for a rho that has risen, ``rho_old / rho_new``, at most 1.

    Returns:
        float32, (4,): ``||z_new - z_old||^2``, ``||w||^2``, how many places the mask gained, how many it keeps.

    Source: Boyd et al. 2011, section 3.1.1, with section 3.4.1 for a rho that changes.
    """
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    old_mask = keep_mask(consensus, pattern, dim)
    old_auxiliary = torch.where(old_mask, consensus, zero)
    a = weight + dual(consensus, pattern, dim)
    mask = keep_mask(a, pattern, dim)
    moved = (torch.where(mask, a, zero).float() - old_auxiliary.float()).square_().sum()
    # A dual of zero is stored as -0.0: only then is u, read as -v, the +0.0 that it is.
    u = (a if dual_scale == 1.0 else a * dual_scale) if with_dual else torch.zeros_like(a)
    consensus.copy_(torch.where(mask, a, -u))
    gained = (mask & ~old_mask).sum()
    return torch.stack([moved, weight.float().square().sum(), gained.float(), mask.sum().float()])


def dual(consensus: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Read the scaled dual u off v: 0 on the mask, -v elsewhere."""
    kept = keep_mask(consensus, pattern, dim)
    return torch.where(kept, torch.zeros_like(consensus), -consensus)


def projected(weight: Tensor, consensus: Tensor, pattern: Pattern, dim: int) -> tuple[Tensor, Tensor]:
    """Return ``P(w + u)`` and its mask."""
    a = weight + dual(consensus, pattern, dim)
    kept = keep_mask(a, pattern, dim)
    return torch.where(kept, a, torch.zeros_like(a)), kept


def primal_sums(weight: Tensor, auxiliary: Tensor) -> Tensor:
    """Return ``||w - z||^2`` and ``||w||^2`` as a float32 tensor of 2, on the weight's device."""
    w = weight.float()
    return torch.stack([(w - auxiliary.float()).square_().sum(), w.square().sum()])


def rescale(consensus: Tensor, pattern: Pattern, dim: int, factor: float) -> None:
    """Multiply u by a factor of at most 1, in place."""
    consensus.copy_(torch.where(keep_mask(consensus, pattern, dim), consensus, consensus * factor))


def is_mask_of(mask: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Return a boolean scalar tensor: whether each group of the mask keeps exactly ``keep`` places."""
    return (by_group(mask, pattern.group, dim).sum(-1) == pattern.keep).all()
