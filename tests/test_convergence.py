"""On a convex problem with a known answer: least squares over the NxM set, all masks enumerated."""

from __future__ import annotations

import itertools
import statistics

import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Every, Pattern, Ramp, keep_mask

PATTERN = Pattern(2, 4)
WIDTH = 12  # three groups of six masks each: 216 masks


class LeastSquares(nn.Module):
    """``||X w - y||^2 / n`` with correlated columns, so that the largest weights are not the best to keep."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.x = torch.randn(60, WIDTH, generator=generator, dtype=torch.float64) @ (torch.eye(WIDTH) + 0.6 * mix)
        self.x /= self.x.norm(dim=0)
        self.y = self.x @ torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 1, bias=False, dtype=torch.float64))])
        with torch.no_grad():  # the dense solution is where fine-tuning begins
            self.weight.copy_(torch.linalg.lstsq(self.x, self.y).solution.unsqueeze(0))

    @property
    def weight(self) -> nn.Parameter:
        return self.blocks[0][0].weight

    def forward(self) -> Tensor:
        return (self.x @ self.weight.squeeze(0) - self.y).square().sum()

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


def admm_objective(problem: LeastSquares) -> float:
    """The objective right after finalize, with no fine-tuning of what was kept."""
    inner = torch.optim.SGD(problem.parameters(), lr=0.05)
    rho = Ramp(0.01, 5.0, start=0, stop=1600)
    optimizer = ADMMNxM(inner, problem, penalty="gradient", rho=rho, update_every=Every(20), pattern=PATTERN)
    for _ in range(2000):
        optimizer.zero_grad()
        problem().backward()
        optimizer.step()
    optimizer.finalize().raise_if_violated()  # a ConvergenceWarning would be an error here
    return float(problem().detach())


def test_admm_is_within_a_factor_of_five_of_the_best_mask_and_one_shot_is_not() -> None:
    """Measured over the 12 seeds: ADMM 1.0 to 4.6 (median 1.1), one-shot projection 2.4 to 86 (median 6.6), one-shot
    projection with the kept weights solved for anew 1.2 to 44 (median 2.9)."""
    admm, one_shot, refitted = [], [], []
    for seed in range(12):
        problem = LeastSquares(seed)
        best = problem.best()
        mask = keep_mask(problem.weight.detach(), PATTERN).squeeze(0)
        refitted.append(problem.best_on(mask) / best)
        dense = problem.weight.detach().clone()
        with torch.no_grad():
            problem.weight.mul_(mask)
            one_shot.append(float(problem()) / best)
            problem.weight.copy_(dense)
        admm.append(admm_objective(problem) / best)
    assert min(admm) > 1 - 1e-9, "better than the best of all masks: the enumeration is wrong"
    assert max(admm) < 5
    assert sum(ratio > 5 for ratio in one_shot) >= 6
    assert all(a <= r * 1.001 for a, r in zip(admm, refitted, strict=True))
    assert statistics.median(admm) < 1.2 < 2 < statistics.median(refitted)
