"""SparseGPT's update for one linear layer, written from its paper (Frantar, Alistarh 2023, arXiv 2301.00774)."""

from __future__ import annotations

import torch
from torch import Tensor

from admm_nxm import Pattern


@torch.no_grad()
def sparsegpt(
    weight: Tensor, inputs: Tensor, pattern: Pattern, *, damping: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune a weight, column by column; each column's error is made up for in the columns behind it.

    Args:
        weight: of shape (outputs, inputs), grouped along its inputs.
        inputs: the second moment of the layer's inputs, of shape (inputs, inputs), up to a factor.
        pattern: the pattern.
        damping: what is added to the diagonal, as a share of its mean (the paper's 0.01).
        block: columns that are updated together; a multiple of the group.

    Returns:
        The pruned weight and its mask (True = kept), in the weight's dtype and in bool.

    Raises:
        ValueError: ``block`` is no multiple of the group.
    """
    if block % pattern.group:
        raise ValueError(f"block={block} must be a multiple of the group of {pattern}; use {pattern.group * 32}")
    w, hessian = weight.float().clone(), inputs.float().clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    w[:, unused] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    # The rows of the upper Cholesky factor of the inverse are the inverses of what is left after each column.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        # Transposed, so that each column is contiguous.
        part, factor = w[:, first:last].T.contiguous(), inverse[first:last, first:last]
        errors = torch.empty_like(part)
        for i in range(last - first):
            if i % pattern.group == 0:
                group = slice(i, i + pattern.group)
                saliency = (part[group] / factor.diagonal()[group, None]).square()
                low = saliency.topk(pattern.group - pattern.keep, dim=0, largest=False).indices
                pruned = torch.zeros_like(saliency, dtype=torch.bool).scatter_(0, low, True)
                keep[:, first + i : first + i + pattern.group] = ~pruned.T
            kept = part[i].masked_fill(pruned[i % pattern.group], 0.0)
            errors[i] = (part[i] - kept) / factor[i, i]
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1.0)
            part[i] = kept
        w[:, first:last] = part.T
        w[:, last:].addmm_(errors.T, inverse[first:last, last:], alpha=-1.0)
    return torch.where(keep, w, 0).to(weight.dtype), keep
