"""On a convex problem with a known answer: least squares over the NxM set, all masks enumerated."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Every, Pattern, Ramp, keep_mask

PATTERN = Pattern(2, 4)
WIDTH = 12  # three groups of six masks each: 216 masks


class LeastSquares(nn.Module):
    """``||X w - y||^2`` with correlated columns, so that the largest weights are not the best to keep."""

    def __init__(self, seed: int, mixing: float, noise: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64) @ (torch.eye(WIDTH) + mixing * mix)
        self.x /= self.x.norm(dim=0)
        self.y = self.x @ torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        self.y += noise * torch.randn(60, generator=generator, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64))])
        with torch.no_grad():  # the dense solution is where fine-tuning begins
            self.weight.copy_(torch.linalg.lstsq(self.x, self.y).solution.unsqueeze(0))

    @property
    def weight(self) -> nn.Parameter:
        return self.blocks[0][0].weight

    def forward(self) -> Tensor:
        return (self.blocks[0](self.x).squeeze(1) - self.y).square().sum()

    def best_on(self, mask: Tensor) -> float:
        """The least objective with the given places free."""
        solution = torch.linalg.lstsq(self.x[:, mask], self.y).solution
        return float((self.x[:, mask] @ solution - self.y).square().sum())

    def best(self) -> float:
        """The least objective over all masks of the pattern."""
        choices = list(itertools.combinations(range(PATTERN.group), PATTERN.keep))
        return min(
            self.best_on(torch.tensor([4 * group + i for group, picked in enumerate(masks) for i in picked]))
            for masks in itertools.product(choices, repeat=WIDTH // PATTERN.group)
        )


def finished(optimizer: ADMMNxM, problem: LeastSquares, steps: int) -> float:
    """The objective right after finalize, with no fine-tuning of what was kept."""
    for _ in range(steps):
        optimizer.zero_grad()
        problem().backward()
        optimizer.step()
    optimizer.finalize().raise_if_violated()  # a ConvergenceWarning would be an error here
    return float(problem().detach())


def exact_objective(problem: LeastSquares) -> float:
    inner = torch.optim.SGD(problem.parameters(), lr=0.0)
    optimizer = ADMMNxM(inner, problem, pattern=PATTERN, total_steps=1, prune_at=1, calibration_steps=1)
    return finished(optimizer, problem, 1)


def paper_objective(problem: LeastSquares) -> float:
    inner = torch.optim.SGD(problem.parameters(), lr=0.05, foreach=False)
    rho = Ramp(0.01, 5.0, start=0, stop=1600)
    optimizer = ADMMNxM.paper(
        inner, problem, rho=rho, update_every=Every(20), pattern=PATTERN, total_steps=2000, prune_at=2000
    )
    return finished(optimizer, problem, 2000)


def one_shot(problem: LeastSquares) -> tuple[float, float]:
    """The objective of the largest weights, as they are and solved for anew."""
    mask = keep_mask(problem.weight.detach(), PATTERN).squeeze(0)
    dense = problem.weight.detach().clone()
    with torch.no_grad():
        problem.weight.mul_(mask)
        projected = float(problem())
        problem.weight.copy_(dense)
    return projected, problem.best_on(mask)


@pytest.mark.xfail(strict=True, reason="the solver's rounds end as soon as one of them leaves the mask alone")
def test_exact_form_is_near_the_best_mask_in_one_step() -> None:
    """Measured over the 12 seeds, once the rounds go on: 1.0 to 1.6 (median 1.0), one-shot projection with the kept
    weights solved for anew 1.0 to 7.8 (median 1.7)."""
    exact, refitted = [], []
    for seed in range(12):
        # Without noise no gradient would be left at the dense solution, and every token would count as padding.
        problem = LeastSquares(seed, mixing=0.3, noise=0.01)
        best = problem.best()
        refitted.append(one_shot(problem)[1] / best)
        exact.append(exact_objective(problem) / best)
    assert min(exact) > 1 - 1e-9, "better than the best of all masks: the enumeration is wrong"
    assert statistics.median(exact) < 1.05 < 1.5 < statistics.median(refitted)
    assert max(exact) < 2


def test_papers_form_is_within_a_factor_of_five_of_the_best_mask_and_one_shot_is_not() -> None:
    """Measured over the 6 seeds: the paper's form 1.0 to 3.2 (five of them below 1.001), one-shot projection 4.0 to 86,
    one-shot projection with the kept weights solved for anew 1.3 to 44."""
    paper, projected, refitted = [], [], []
    for seed in range(6):
        problem = LeastSquares(seed, mixing=0.6, noise=0.0)
        best = problem.best()
        as_it_is, anew = one_shot(problem)
        projected.append(as_it_is / best)
        refitted.append(anew / best)
        paper.append(paper_objective(problem) / best)
    assert min(paper) > 1 - 1e-9, "better than the best of all masks: the enumeration is wrong"
    assert max(paper) < 5
    assert all(a <= r * 1.001 for a, r in zip(paper, refitted, strict=True))
    assert sum(ratio > 5 for ratio in projected) >= 3
