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
    keep = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.zeros_like(w[:, first:last])
        for column in range(first, last):
            if column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                saliency = w[:, group].square() / inverse.diagonal()[group].square()
                keep[:, group].scatter_(1, saliency.topk(pattern.keep, dim=1).indices, True)
            error = torch.where(keep[:, column], 0, w[:, column]) / inverse[column, column]
            w[:, column:last] -= error[:, None] * inverse[column, column:last]
            errors[:, column - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return torch.where(keep, w, 0).to(weight.dtype), keep
