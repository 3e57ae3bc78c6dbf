"""Runs that go wrong announce it, each with its own cause and a remedy that helps; runs that go well are silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Ramp
from tests.helpers import loss_of, make_net

STEPS = 60
UNUSED = "blocks.0.up.weight"


def noisy(net: nn.Module, optimizer: ADMMNxM, unused: str = "") -> None:
    """Train on inputs that differ from step to step, so that the ranking keeps moving a little."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, torch.randn(4, 8, generator=generator)).backward()
        for name, p in net.named_parameters():
            if name == unused:
                p.grad = None
        optimizer.step()


def run(unused: str = "", inner_class: Any = torch.optim.AdamW, lr: float = 1e-3, **options: Any) -> ADMMNxM:
    net = make_net()
    inner = inner_class(net.parameters(), lr=lr)
    optimizer = ADMMNxM.paper(inner, net, **{"pattern": "1:4", "total_steps": STEPS, **options})
    noisy(net, optimizer, unused)
    return optimizer


STRONG: dict[str, Any] = {
    "inner_class": torch.optim.SGD,
    "lr": 0.02,
    "rho": 30.0,
    "update_every": Every(4, dual_start=None),
}
FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "weak penalty": (
        {"rho": 1e-3, "update_every": Every(4, dual_start=None)},
        r"the penalty in the gradient \(rho = 0\.001\) has not brought the pruned weights to zero in 42 steps of Adam",
    ),
    "mask flips": (
        {"rho": Ramp(1e-2, 0.3, start=3, stop=42), "update_every": Every(1)},
        r"the last z-step still replaced \d\d% of the kept places: the dual was at work while the mask moved",
    ),
    "ends early": (
        {"total_steps": 4 * STEPS},
        r"finalize\(\) came after 60 steps, and the mask was to freeze after step 168\. Remedy: train to the end",
    ),
    "no penalty": ({"rho": 0.0}, r"no penalty was in force \(rho = 0\), so this is one-shot magnitude pruning"),
    "one left behind": (
        {**STRONG, "unused": UNUSED},
        r"this weight had no gradient for long, or its learning rate is far from the others'\. Remedy: train it",
    ),
}


@pytest.mark.parametrize(("options", "cause"), FAILURES.values(), ids=FAILURES.keys())
def test_failure_of_the_papers_form_is_announced_with_its_cause(options: dict[str, Any], cause: str) -> None:
    optimizer = run(**options)
    with pytest.warns(ConvergenceWarning, match=f"Likely cause: {cause}") as caught:
        assert optimizer.finalize().ok
    assert caught[0].filename == __file__
    if "unused" in options:
        assert f"most of all '{UNUSED}'" in str(caught[0].message)


def test_numbers_of_the_warning_are_those_of_the_projection() -> None:
    net = make_net()
    optimizer = ADMMNxM.paper(torch.optim.AdamW(net.parameters(), lr=1e-3), net, total_steps=2 * STEPS)
    noisy(net, optimizer)
    names = list(optimizer.masks())
    before = {name: net.get_parameter(name).detach().clone() for name in names}
    with pytest.warns(ConvergenceWarning) as caught:
        optimizer.finalize()
    gaps = {name: before[name] - net.get_parameter(name).detach() for name in names}
    shares = {name: float(gap.norm() / before[name].norm()) for name, gap in gaps.items()}
    worst = max(shares, key=shares.__getitem__)
    norm = torch.stack([w.norm() for w in before.values()]).norm()
    overall = float(torch.stack([gap.norm() for gap in gaps.values()]).norm() / norm)
    assert str(caught[0].message).startswith(
        f"the run has not reached its pattern: projecting the weights changed them by {overall:.1%} of their norm "
        f"(tolerance 2.0%), most of all '{worst}', by {shares[worst]:.1%}, so accuracy measured before does not hold. "
    )


def silent(finish: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finish().ok


def test_a_strong_penalty_without_the_dual_is_silent() -> None:
    """What the first two warnings advise: a larger rho and steps that reach, and no dual."""
    silent(run(**STRONG).finalize)


def test_the_exact_form_is_silent_on_the_same_task() -> None:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-3), net, pattern="1:4", total_steps=STEPS)
    noisy(net, optimizer)
    silent(optimizer.finalize)


def test_a_mask_that_moves_up_to_the_freeze_is_announced_although_nothing_is_left_to_project() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.0)
    every = Every(1, dual_start=None)
    optimizer = ADMMNxM.paper(inner, net, pattern="1:4", total_steps=20, rho=1.0, update_every=every)
    for step in range(20):
        with torch.no_grad():  # feasible at every step, with the kept place going round
            for weight in optimizer.selection:
                w = net.get_parameter(weight.name)
                w.copy_(((step + torch.arange(w.numel())) % 4 == 0).view_as(w))
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        net.head.weight.grad.fill_(1.0)
        if optimizer.frozen:
            break
        optimizer.step()
    with pytest.warns(
        ConvergenceWarning,
        match=r"^the mask had not settled: the last z-step before the freeze replaced 100% of the kept places \(more "
        r"than 10%\).*Likely cause: the learning rate is high up to the freeze\. Remedy: let the learning rate decay b",
    ):
        optimizer.state_dict()
