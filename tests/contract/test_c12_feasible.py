"""Line 12 of the contract: in the frozen phase the model is feasible after every step, whatever the inner optimizer
keeps beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, ConvergenceWarning, verify
from tests.helpers import (
    ALL_OPTIMIZERS,
    OUTSIDE_OPTIMIZERS,
    STEPS,
    TWO_WINDOWS,
    Build,
    Factory,
    admm,
    assert_same_weights,
    every_form,
    forms_and_inners,
    make_net,
    same_bits,
    saved,
    train,
    weights_of,
)


@forms_and_inners(ALL_OPTIMIZERS)
def test_c12_feasible_after_every_step(build: Build, factory: Factory) -> None:
    net = make_net()
    optimizer = build(net, factory)
    seen = 0
    for step in range(STEPS + 5):
        train(net, optimizer, 1, start=step)
        if optimizer.frozen:
            seen += 1
            verify(net, "1:4").raise_if_violated()
    assert seen >= 5 + 3
    before = weights_of(net)
    assert optimizer.finalize().ok
    assert_same_weights(net, before)
    assert all(torch.equal(mask, net.get_parameter(name) != 0) for name, mask in optimizer.masks().items())


def test_c12_feasible_window_by_window() -> None:
    net = make_net()
    optimizer = admm(net, statistics_memory=TWO_WINDOWS)
    for step in range(STEPS):
        train(net, optimizer, 1, start=step)
        solved = 0 if step + 1 < 14 else 2 if step + 1 < 17 else 4
        zeros = [bool((net.get_parameter(w.name) == 0).any()) for w in optimizer.selection]
        assert sum(zeros) == solved
        assert optimizer.figures().sparsity == pytest.approx(0.75 * solved / 4)
        assert [bool((~mask).any()) for mask in optimizer.masks().values()] == zeros
    assert verify(net, "1:4").ok


# ---------------------------------------------------------------- a second set of weights


class Lookahead(Optimizer):
    """Lookahead (Zhang et al., arXiv 1907.08610): slow weights that follow the fast ones every few steps."""

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9, every: int = 2, rate: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "every": every, "rate": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, slow=p.detach().clone(), momentum=torch.zeros_like(p))
                state["step"] += 1
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                p.add_(state["momentum"], alpha=-group["lr"])
                if state["step"] % group["every"] == 0:
                    state["slow"].lerp_(p, group["rate"])
                    p.copy_(state["slow"])


class Averaging(Optimizer):
    """The shape of schedule-free optimizers (Defazio et al., arXiv 2405.15682), here with momentum in the base: the
    model holds y in training and x, the average of z, in evaluation; z is kept inside."""

    def __init__(self, params: Any, lr: float = 1e-2, beta: float = 0.9, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "momentum": momentum})
        self.training = True

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self.state[p]

    def _exchange(self, weight: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if "z" in self._of(p):
                        p.lerp_(self._of(p)["z"], weight)

    def eval(self) -> None:
        if self.training:
            self._exchange(1 - 1 / self.param_groups[0]["beta"])
            self.training = False

    def train(self) -> None:
        if not self.training:
            self._exchange(1 - self.param_groups[0]["beta"])
            self.training = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.training
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._of(p)
                if not state:
                    state.update(step=0, z=p.detach().clone(), momentum=torch.zeros_like(p))
                state["step"] += 1
                z = state["z"]
                x = p.lerp(z, 1 - 1 / beta)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                z.sub_(state["momentum"], alpha=group["lr"])
                x.lerp_(z, 1 / state["step"])
                p.copy_(x.lerp_(z, 1 - beta))


class Nested(Averaging):
    """As heavyball has it: the state lies one level down, and a step uses the gradients up."""

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self.state[p].setdefault(0, {})

    def step(self, closure: Any = None) -> None:
        super().step()
        self.zero_grad()


SECOND_SETS = {
    "Lookahead": lambda net: Lookahead(net.parameters()),
    "averaging": lambda net: Averaging(net.parameters()),
    "averaging with momentum": lambda net: Averaging(net.parameters(), momentum=0.9),
    "averaging with nested state": lambda net: Nested(net.parameters()),
    **{name: make for name, make in OUTSIDE_OPTIMIZERS.items() if name.startswith("schedulefree")},
}
every_second_set = pytest.mark.parametrize("factory", SECOND_SETS.values(), ids=SECOND_SETS)


def evaluated(net: nn.Module, optimizer: Any) -> None:
    """What is evaluated, and what ships, is feasible too."""
    if hasattr(optimizer.inner, "eval"):
        optimizer.eval()
        verify(net, "1:4").raise_if_violated()
        optimizer.train()
    verify(net, "1:4").raise_if_violated()


@every_second_set
@every_form
def test_c12_a_second_set_of_weights_is_masked_too(build: Build, factory: Factory) -> None:
    net = make_net()
    optimizer = build(net, factory)
    train(net, optimizer, 17)
    assert optimizer.frozen
    evaluated(net, optimizer)
    for step in range(17, 30):
        train(net, optimizer, 1, start=step)
        evaluated(net, optimizer)
    assert optimizer.finalize().ok
    evaluated(net, optimizer)


@every_second_set
@every_form
def test_c12_a_second_set_of_weights_is_masked_after_a_resume(build: Build, factory: Factory) -> None:
    net, other_net = make_net(), make_net(seed=1)
    optimizer, other = build(net, factory), build(other_net, factory)
    train(net, optimizer, 18)
    other_net.load_state_dict(saved(net.state_dict()))
    other.load_state_dict(saved(optimizer.state_dict()))
    for step in range(18, 26):
        train(other_net, other, 1, start=step)
        train(net, optimizer, 1, start=step)
        evaluated(other_net, other)
        evaluated(net, optimizer)
        assert_same_weights(other_net, net)


@every_second_set
def test_c12_a_run_that_ends_early_ships_a_feasible_average(factory: Factory) -> None:
    net = make_net()
    optimizer = admm(net, factory)
    train(net, optimizer, 10)
    with pytest.warns(UserWarning, match=r"finalize\(\) came after 10 optimizer steps"):
        assert optimizer.finalize().ok
    evaluated(net, optimizer)
    train(net, optimizer, 3, start=10)
    evaluated(net, optimizer)


@every_second_set
def test_c12_weights_loaded_into_a_run_that_begins_frozen(factory: Factory) -> None:
    """The inner optimizer must not take its copy of them before they are pruned."""
    net = make_net()
    optimizer = admm(net, factory, prune_at=0)
    net.load_state_dict(make_net(seed=3).state_dict())
    for step in range(4):
        train(net, optimizer, 1, start=step)
        evaluated(net, optimizer)


@every_form
def test_c12_momentum_is_left_alone_by_the_solve(build: Build) -> None:
    """Its entries may stand in another basis; only copies of the weights are touched."""
    net = make_net()
    optimizer = build(net)
    last = (17 if build is admm else 14) - 1
    train(net, optimizer, last)
    held: dict[Tensor, tuple[Tensor, Tensor]] = {}

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            unwrapped = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)
            unwrapped(self)
            held.update({p: (s["exp_avg"].clone(), s["exp_avg_sq"].clone()) for p, s in self.state.items()})

    optimizer.inner.__class__ = Watched
    train(net, optimizer, 1, start=last)
    assert optimizer.frozen
    for p, state in optimizer.state.items():
        assert torch.equal(state["exp_avg"], held[p][0])
        assert torch.equal(state["exp_avg_sq"], held[p][1])


# ---------------------------------------------------------------- weights that are loaded in mid run


@every_form
def test_c12_weights_loaded_in_the_frozen_phase_are_projected_by_finalize(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, 18)
    net.load_state_dict(make_net(seed=4).state_dict())
    with pytest.warns(ConvergenceWarning, match="4 weights were no longer in the pattern"):
        report = optimizer.finalize()
    assert report.ok
    assert verify(net, "1:4").ok
    before = {name: net.get_parameter(name) != 0 for name in optimizer.masks()}
    train(net, optimizer, 2, start=18)
    for name, mask in before.items():
        assert torch.equal(net.get_parameter(name) != 0, mask)


def test_c12_plain_trainer_saves_feasible_checkpoints_from_the_solve_on(tmp_path: Path) -> None:
    """Nothing is swapped for evaluation: what it measures is what the model holds."""
    net = make_net()
    optimizer = admm(net)
    for step in range(STEPS):
        train(net, optimizer, 1, start=step)
        torch.save(net.state_dict(), tmp_path / f"{step + 1}.pt")
    for step in range(STEPS):
        tensors: dict[str, Tensor] = torch.load(tmp_path / f"{step + 1}.pt", weights_only=True)
        assert verify(tensors, "1:4").ok == (step + 1 >= 17)


def test_c12_weights_that_cannot_be_observed_are_pruned_by_magnitude() -> None:
    """A run of convolutions alone gathers nothing, and prunes when it is to."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Tanh(), nn.Conv1d(8, 4, 1))
    optimizer = admm(net, lambda net: torch.optim.SGD(net.parameters(), lr=0.1), select={r".*weight": "1:4"})
    assert "pruned by magnitude" in str(optimizer.selection)
    for step in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(2, 8, 5)).square().mean().backward()
        optimizer.step()
        assert optimizer.frozen == (step + 1 >= 17)
        assert verify(net, {r".*weight": "1:4"}).ok == (step + 1 >= 17)
    assert optimizer.finalize().ok
    assert optimizer.figures().model_error is None


def test_c12_average_far_from_the_weights_is_masked_too() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    net = make_net()
    inner = schedulefree.AdamWScheduleFree(net.parameters(), lr=0.1)
    inner.train()
    optimizer = ADMMNxM(inner, net, total_steps=60, calibration_steps=3)
    train(net, optimizer, 50)
    away = [(inner.state[p]["z"] - p).norm() / p.norm() for p in (net.get_parameter(n) for n in optimizer.masks())]
    assert max(away) > 0.5  # no longer to be told from momentum
    train(net, optimizer, 10, start=50)
    optimizer.eval()
    assert verify(net, "2:4").ok
    optimizer.train()
    assert optimizer.finalize().ok


def test_c12_momentum_near_the_weight_is_left_alone() -> None:
    """Under weight decay momentum comes to the weight itself: at a decay of 0.1 and a momentum of 0.9 to all of it."""

    def momentum(wrapped: bool) -> list[Tensor]:
        net = make_net()
        inner = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
        optimizer = ADMMNxM(inner, net, total_steps=80, calibration_steps=3) if wrapped else inner
        train(net, optimizer, 67)
        near = [(inner.state[p]["momentum_buffer"] - p).norm() < 0.5 * p.norm() for p in net.blocks.parameters()]
        assert any(near)
        train(net, optimizer, 1, start=67)  # with the solve
        return [inner.state[p]["momentum_buffer"] for p in net.blocks.parameters()]

    for mine, plain in zip(momentum(True), momentum(False), strict=True):
        assert same_bits(mine, plain)
