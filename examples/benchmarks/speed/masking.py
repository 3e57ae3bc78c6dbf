"""Ways to find the N:M mask of a matrix: those that the package is compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from admm_nxm import Pattern
from contestants import mask_by_topk

Masking = Callable[[Tensor], Tensor]
"""Matrix -> boolean mask, grouped along the last dimension."""

MOST_PATTERNS = 256
"""Beyond it the product of the pattern matrix outgrows the weights by far: 4:16 has 1,820 masks a group."""


def argsorted(pattern: Pattern) -> Masking:
    def mask(w: Tensor) -> Tensor:
        grouped = _grouped(w, pattern)
        kept = grouped.argsort(dim=-1, descending=True)[..., : pattern.keep]
        return torch.zeros(grouped.shape, dtype=torch.bool, device=w.device).scatter_(-1, kept, True).view(w.shape)

    return mask


def by_sorted_threshold(pattern: Pattern) -> Masking:
    """Everything that reaches the ``keep``-th largest: more than ``keep`` where magnitudes are tied."""

    def mask(w: Tensor) -> Tensor:
        grouped = _grouped(w, pattern)
        lowest = grouped.sort(dim=-1, descending=True).values[..., pattern.keep - 1 : pattern.keep]
        return (grouped >= lowest).view(w.shape)

    return mask


def by_topk(pattern: Pattern) -> Masking:
    return lambda w: mask_by_topk(w, pattern)


def by_pattern_matmul(pattern: Pattern) -> Masking | None:
    """Every mask of a group as a column, ``|w| @ masks``, and the best column's mask: the way of NVIDIA's ASP.

    Sums are float32, or they would tie in 16 bits. None where there are too many masks.
    """
    if math.comb(pattern.group, pattern.keep) > MOST_PATTERNS:
        return None
    rows = [
        [index in kept for index in range(pattern.group)]
        for kept in itertools.combinations(range(pattern.group), pattern.keep)
    ]
    masks = torch.tensor(rows)

    def mask(w: Tensor) -> Tensor:
        table = masks.to(w.device)
        best = (_grouped(w, pattern).float() @ table.float().T).argmax(-1)
        return table[best].view(w.shape)

    return mask


def pairwise(pattern: Pattern) -> Masking:
    """An entry stays if fewer than ``keep`` others of its group are larger; place by place, which torch.compile makes
    most of."""

    def mask(w: Tensor) -> Tensor:
        places = _grouped(w, pattern).unbind(-1)
        kept = []
        for place in places:
            larger = torch.zeros_like(place, dtype=torch.int8)
            for other in places:
                larger = larger + (other > place)
            kept.append(larger < pattern.keep)
        return torch.stack(kept, dim=-1).view(w.shape)

    return mask


def by_torchao(pattern: Pattern) -> Masking | None:
    """The N:M constraint of torchao's PAT, applied as its optimizer does. It projects, and what is left is the mask;
    None where torchao is not installed."""
    try:
        from torchao.prototype.pat.group import KElementGrouper  # type: ignore[import-untyped,unused-ignore]
        from torchao.prototype.pat.optim import NMSparseConstraint  # type: ignore[import-untyped,unused-ignore]
        from torchao.prototype.pat.optim.prox_executor import (  # type: ignore[import-untyped,unused-ignore]
            apply_prox_to_param,
        )
    except ImportError:
        return None
    constraint = NMSparseConstraint(0.0, n_nonzero=pattern.keep)
    settings = {
        "gamma": 1.0,
        "gamma_index_slope": 0.0,
        "disable_vmap": False,
        "is_svd_grouper": False,
        "zero_elts_are_counts": True,
    }

    def mask(w: Tensor) -> Tensor:
        projected = w.clone()
        apply_prox_to_param(projected, constraint, KElementGrouper, {"k": pattern.group}, settings)
        return projected != 0

    return mask


def _grouped(w: Tensor, pattern: Pattern) -> Tensor:
    return w.abs().view(*w.shape[:-1], -1, pattern.group)
