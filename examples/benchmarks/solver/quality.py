"""How near the solver comes to the best of all masks, on problems small enough to try every mask.

    python examples/benchmarks/solver/quality.py

Each problem is a 2 x 8 weight at 2:4 with correlated A and G: 1,296 masks, each with its exact optimum.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from admm_nxm.pattern import Pattern
from admm_nxm.projection import keep_mask
from admm_nxm.solver import INPUT_DAMPING, OUTPUT_DAMPING, Factor, factorise, solve

sys.path.append(str(Path(__file__).resolve().parents[1]))
from sparsegpt import sparsegpt  # type: ignore[import-not-found,unused-ignore]

KEEP, GROUP, ROWS, COLUMNS = 2, 4, 2, 8


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
    updated, its_mask = sparsegpt(weight, a, Pattern(KEEP, GROUP))
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
    parser.add_argument("--first", type=int, default=0, help="the seed of the first problem")
    args = parser.parse_args()
    first, count = args.first, args.problems
    rows = [ratios(seed) for seed in range(first, first + count)]
    print(f"Loss as a multiple of the best mask's, {count} problems, seeds {first} to {first + count - 1}\n")
    print("| method | median | 90 % | worst |\n|---|---|---|---|")
    for method in rows[0]:
        values = torch.tensor([row[method] for row in rows])
        print(f"| {method} | {values.median():.3f} | {values.quantile(0.9):.3f} | {values.max():.3f} |")


if __name__ == "__main__":
    main()
