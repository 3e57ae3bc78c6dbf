"""How near the solver comes to the best of all masks, on problems small enough to try every mask.

    python examples/benchmarks/solver/quality.py

Each problem is a 2 x 8 weight at 2:4 with correlated A and G: 1,296 masks, each with its exact optimum.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from torch import Tensor

from admm_nxm.projection import keep_mask
from admm_nxm.solver import INPUT_DAMPING, OUTPUT_DAMPING, Factor, factorise, solve

KEEP, GROUP, ROWS, COLUMNS = 2, 4, 2, 8


def sparsegpt(
    weight: Tensor, moment: Tensor, keep: int, group: int, damping: float = INPUT_DAMPING, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune with SparseGPT's update, written from algorithm 1 of arXiv 2301.00774 (N:M form, block size 128).

    The block is held transposed, so that each column is contiguous.

    Args:
        weight: the dense weight, rows x columns.
        moment: A, columns x columns.
        keep: kept entries of a group.
        group: entries of a group.
        damping: share of the mean diagonal that is added, as in the paper's code.
        block: columns that are updated lazily together.

    Returns:
        The pruned weight and its mask.
    """
    columns = weight.shape[1]
    w, h = weight.clone(), moment.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part, factor = w[:, first:last].T.contiguous(), upper[first:last, first:last]
        errors = torch.empty_like(part)
        for i in range(last - first):
            if i % group == 0:
                saliency = (part[i : i + group] / factor.diagonal()[i : i + group, None]).square()
                low = saliency.topk(group - keep, dim=0, largest=False).indices
                pruned = torch.zeros_like(saliency, dtype=torch.bool).scatter_(0, low, True)
                mask[:, first + i : first + i + group] = ~pruned.T
            kept = part[i].masked_fill(pruned[i % group], 0.0)
            errors[i] = (part[i] - kept) / factor[i, i]
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1.0)
            part[i] = kept
        w[:, first:last] = part.T
        w[:, last:].addmm_(errors.T, upper[first:last, last:], alpha=-1.0)
    return w, mask


def random_moment(size: int, generator: torch.Generator) -> Tensor:
    """Make a second moment of correlated values whose scales differ."""
    mixing = torch.randn(size, size, generator=generator) / math.sqrt(size) + torch.eye(size)
    samples = torch.randn(2 * size, size, generator=generator) @ mixing
    samples *= torch.randn(size, generator=generator).exp()
    return samples.T @ samples


def kronecker(a: Factor, g: Factor) -> Tensor:
    return torch.kron(
        *(f.matrix.double() if f.matrix is not None else torch.eye(len(f.scale)).double() for f in (g, a))
    )


def ratios(seed: int) -> dict[str, float]:
    """Return each method's loss on one problem, as a multiple of the loss of the best mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    a, g = random_moment(COLUMNS, generator), random_moment(ROWS, generator)
    fa, fg = factorise(a, INPUT_DAMPING), factorise(g, OUTPUT_DAMPING)
    metric = kronecker(fa, fg)
    scale = fa.scale * fg.scale[:, None]
    dense = (weight * scale).double().flatten()
    pull = metric @ dense

    def loss(pruned: Tensor) -> float:
        change = (pruned * scale).double().flatten() - dense
        return float(change @ metric @ change)

    def least(masks: Tensor) -> float:
        on = masks.flatten(1).nonzero()[:, 1].view(len(masks), -1)
        x = torch.linalg.solve(metric[on[:, :, None], on[:, None, :]], pull[on])
        return float(dense @ pull) - float((x * pull[on]).sum(dim=1).max())

    choices = [[i in kept for i in range(GROUP)] for kept in itertools.combinations(range(GROUP), KEEP)]
    groups = ROWS * COLUMNS // GROUP
    every = torch.tensor([[k for group in one for k in group] for one in itertools.product(choices, repeat=groups)])
    updated, its_mask = sparsegpt(weight, a, KEEP, GROUP)
    pattern = f"{KEEP}:{GROUP}"
    by_magnitude, by_scaled = keep_mask(weight, pattern), keep_mask(weight * fa.scale, pattern)
    best = least(every)
    return {
        "ours": loss(solve(weight, pattern, fa, fg).weight) / best,
        "magnitude": loss(weight * by_magnitude) / best,
        "magnitude, refitted": least(by_magnitude[None]) / best,
        "scaled magnitude, refitted": least(by_scaled[None]) / best,
        "SparseGPT": loss(updated) / best,
        "SparseGPT's mask, refitted": least(its_mask[None]) / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    count = parser.parse_args().problems
    rows = [ratios(seed) for seed in range(count)]
    print(f"Loss as a multiple of the best mask's, {count} problems, seeds 0 to {count - 1}\n")
    print("| method | median | 90 % | worst |\n|---|---|---|---|")
    for method in rows[0]:
        values = torch.tensor([row[method] for row in rows])
        print(f"| {method} | {values.median():.3f} | {values.quantile(0.9):.3f} | {values.max():.3f} |")


if __name__ == "__main__":
    main()
