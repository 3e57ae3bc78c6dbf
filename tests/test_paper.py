"""The paper's form: its runs are the reference's, its schedules are the plan's, and z, u and rho can be looked at."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from admm_nxm import ADMMNxM, Constant, ConvergenceWarning, Every, Pattern, Ramp, Update, project
from admm_nxm.reference import ReferenceADMM
from admm_nxm.schedules import Plan
from tests.cores import WEIGHTS, adamw, paper
from tests.helpers import assert_same_weights, batches, loss_of, make_net, same_bits, train

UP = WEIGHTS[0]

# ---------------------------------------------------------------- against the reference


class OneWeight(nn.Module):
    """A single weight in a repeated block; its loss is a quadratic around a target."""

    def __init__(self, weight: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()
        rows, width = weight.shape
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, rows, bias=False, dtype=weight.dtype))])
        self.target = target
        with torch.no_grad():
            self.weight.copy_(weight)

    @property
    def weight(self) -> nn.Parameter:
        return self.blocks[0][0].weight

    def gradient(self) -> torch.Tensor:
        return (self.weight.detach() - self.target).div(2)


NAME = "blocks.0.0.weight"
LR = 0.25


class Both:
    """An optimizer and the reference, which take the same steps and are compared."""

    def __init__(self, module: OneWeight, pattern: Pattern, rho: Any, every: Any, prune_at: int) -> None:
        self.module = module
        inner = torch.optim.SGD(module.parameters(), lr=LR, foreach=False)
        self.optimizer = ADMMNxM.paper(inner, module, pattern=pattern, rho=rho, update_every=every, prune_at=prune_at)
        plan: Plan = self.optimizer._w_step.plan  # type: ignore[attr-defined]
        self.reference = ReferenceADMM(module.weight, pattern, plan, LR)

    def step(self) -> None:
        gradient = self.module.gradient()
        self.module.weight.grad = gradient.clone()
        self.reference.step([float(value) for value in gradient.flatten().tolist()])
        self.optimizer.step()

    def values(self, flat: list[float]) -> torch.Tensor:
        return torch.tensor(flat, dtype=torch.float64).to(self.module.weight.dtype).view_as(self.module.weight)

    def compare(self, rtol: float = 0.0) -> None:
        """W, z, u, rho and the mask; without a tolerance all bits, but for the sign of a zero."""
        found, reference = self.optimizer, self.reference
        close = {"rtol": rtol, "atol": rtol}
        torch.testing.assert_close(self.module.weight.detach(), self.values(reference.w), **close)
        assert (found.frozen, found.rho) == (reference.mask is not None, reference.rho)
        if reference.mask is None:
            torch.testing.assert_close(found.auxiliary(NAME), self.values(reference.z), **close)
            torch.testing.assert_close(found.dual(NAME), self.values(reference.u), **close)
        else:
            assert found.masks()[NAME].flatten().tolist() == reference.mask

    def finish(self, rtol: float = 0.0) -> None:
        if self.reference.mask is None:
            self.reference.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.optimizer.finalize().raise_if_violated()
        self.compare(rtol)


PATTERNS = st.sampled_from(["1:1", "1:2", "2:4", "1:4", "3:4", "4:4", "5:8"]).map(Pattern.parse)
UPDATES = st.builds(Every, st.integers(1, 5), st.integers(0, 6), st.none() | st.integers(0, 12))


@dataclass(frozen=True)
class Stairs:
    """A rho that rises at given steps, by powers of two."""

    values: tuple[float, ...]
    width: int

    def __call__(self, step: int) -> float:
        return self.values[min(step // self.width, len(self.values) - 1)]


STAIRS = st.builds(
    Stairs,
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4).map(sorted).map(tuple),
    st.integers(1, 6),
)


@given(pattern=PATTERNS, rho=STAIRS, every=UPDATES, prune_at=st.integers(1, 16), data=st.data())
@settings(max_examples=60)
def test_any_run_in_numbers_that_need_no_rounding_equals_the_reference_bit_for_bit(
    pattern: Pattern, rho: Stairs, every: Every, prune_at: int, data: st.DataObject
) -> None:
    """Sixteenths, and factors that are powers of two: 14 steps fit into the 53 bits of a double."""
    count = 2 * pattern.group
    sixteenths = st.lists(st.integers(-40, 40), min_size=2 * count, max_size=2 * count)
    numbers = torch.tensor(data.draw(sixteenths), dtype=torch.float64) / 16
    both = Both(OneWeight(numbers[:count].view(2, -1), numbers[count:].view(2, -1)), pattern, rho, every, prune_at)
    for _ in range(14):
        both.step()
        both.compare()
    both.finish()


@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    pattern=PATTERNS,
    low=st.floats(1e-3, 1),
    rise=st.floats(1, 20),
    every=UPDATES,
    prune_at=st.integers(1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_z_u_and_the_mask_of_given_weights_equal_the_reference_bit_for_bit(
    dtype: torch.dtype, pattern: Pattern, low: float, rise: float, every: Every, prune_at: int, seed: int
) -> None:
    """Only the w-step may round in another way: torch multiplies and adds at once where the processor can."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2 * pattern.group)
    weight = torch.randn(shape, generator=generator).to(dtype)
    both = Both(OneWeight(weight, weight), pattern, Ramp(low, low * rise, start=2, stop=9), every, prune_at)
    both.optimizer.param_groups[0]["lr"] = 0.0
    for step in range(1, min(prune_at, 12) + 1):
        weight = torch.randn(shape, generator=generator).to(dtype)
        with torch.no_grad():
            both.module.weight.copy_(weight)
        both.module.weight.grad = torch.ones_like(weight)
        if step == 1:  # v starts from the weights of the first step
            both.reference = ReferenceADMM(weight, pattern, both.reference.plan, LR)
        both.reference.w = [float(value) for value in weight.flatten().tolist()]
        both.reference.steps = step
        both.reference.update(both.reference.plan.updates(step))
        if step == prune_at:
            both.reference.freeze()
        both.optimizer.step()
        both.compare()
    both.finish()


PLANS: dict[str, tuple[Any, Any, int]] = {
    "textbook": (0.3, Every(3), 30),
    "rising rho": (Ramp(0.01, 2.0, start=2, stop=30), Every(2, start=2), 30),
    "no dual": (0.1, Every(2, dual_start=None), 25),
    "dual joins late": (0.7, Every(2, dual_start=11), 30),
    "rho comes late": (lambda step: 0.0 if step < 9 else 0.2 + step / 100, Every(3), 30),
    "rho falls before the dual": (lambda step: 0.5 if step < 9 else 0.2, Every(3, dual_start=12), 30),
    "every step": (Ramp(0.5, 0.6, start=0, stop=9), 1, 30),
    "never in force": (0.0, 4, 30),
}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize(("rho", "every", "prune_at"), PLANS.values(), ids=PLANS.keys())
def test_whole_run_is_the_reference(rho: Any, every: Any, prune_at: int, dtype: torch.dtype, rtol: float) -> None:
    generator = torch.Generator().manual_seed(7)
    weight, target = (torch.randn(3, 16, generator=generator).to(dtype) for _ in range(2))
    both = Both(OneWeight(weight, target), Pattern(3, 8), rho, every, prune_at)
    dual_seen = False
    for _ in range(34):
        both.step()
        both.compare(rtol)
        dual_seen = dual_seen or any(both.reference.u)
    both.finish(rtol)
    assert dual_seen == (every != Every(2, dual_start=None))


# ---------------------------------------------------------------- the plan


def test_defaults_are_a_constant_penalty_with_the_dual_and_a_freeze_at_70_percent() -> None:
    optimizer = paper(make_net(), total_steps=300)
    assert optimizer._w_step.plan == Plan(Constant(0.01), Every(20), 210)  # type: ignore[attr-defined]
    assert (optimizer.w_step, optimizer.phase, optimizer.prune_at, optimizer.rho) == ("optimizer", "admm", 210, 0.01)
    assert (optimizer.total_steps, optimizer.calibration_steps) == (300, 0)


def test_freeze_at_the_end_leaves_the_fine_tuning_out() -> None:
    net = make_net()
    optimizer = paper(net, total_steps=40, prune_at=40)
    train(net, optimizer, 39)
    assert optimizer.phase == "admm"
    train(net, optimizer, 1, start=39)
    assert optimizer.phase == "frozen"


def test_rho_and_the_phase_move_when_the_schedules_say_so() -> None:
    net = make_net()
    optimizer = paper(net, rho=Ramp(0.1, 1.0, start=5, stop=10), update_every=4, prune_at=12)
    rhos = []
    for step in range(13):
        train(net, optimizer, 1, start=step)
        rhos.append(optimizer.rho)
    at_8 = Ramp(0.1, 1.0, start=5, stop=10)(8)
    assert rhos == [0.0] * 7 + [at_8] * 4 + [1.0] * 2
    assert optimizer.frozen


def test_an_update_schedule_of_the_users_own_decides() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.5, update_every=lambda step: Update.AUXILIARY if step == 3 else Update.NONE)
    before = optimizer.auxiliary(UP)
    train(net, optimizer, 2)
    assert same_bits(optimizer.auxiliary(UP), before)
    train(net, optimizer, 1, start=2)
    assert same_bits(optimizer.auxiliary(UP), project(net.get_parameter(UP).detach(), "2:4"))


def test_named_parameters_give_the_same_run_as_the_module() -> None:
    net, other_net = make_net(), make_net()
    one = paper(net, rho=0.3)
    other = ADMMNxM.paper(adamw(other_net), other_net.named_parameters(), total_steps=40, rho=0.3)
    train(net, one, 40)
    train(other_net, other, 40)
    assert_same_weights(net, other_net)


def test_no_penalty_is_the_inner_optimizer_up_to_the_freeze() -> None:
    plain, net = make_net(), make_net()
    train(plain, adamw(plain), 27)
    optimizer = paper(net, rho=0.0)
    train(net, optimizer, 27)
    assert_same_weights(plain, net)


def test_a_maximising_optimizer_is_pulled_toward_the_pattern_too() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1, maximize=True)
    optimizer = ADMMNxM.paper(
        inner, net, rho=1.0, update_every=Every(5, dual_start=None), total_steps=200, prune_at=200
    )
    before = optimizer.residuals().primal
    for x in batches(100):
        optimizer.zero_grad()
        (0.0 * loss_of(net, x)).backward()
        optimizer.step()
    assert optimizer.residuals().primal < 1e-3 * before


# ---------------------------------------------------------------- z, u and the residuals


def test_views_before_the_first_step_are_what_it_starts_from() -> None:
    net = make_net()
    optimizer = paper(net)
    w = net.get_parameter(UP).detach()
    assert same_bits(optimizer.auxiliary(UP), project(w, "2:4"))
    assert same_bits(optimizer.dual(UP), torch.zeros_like(w))
    assert torch.equal(optimizer.masks()[UP], project(w, "2:4") != 0)


def test_weights_loaded_before_the_first_step_are_where_the_run_starts() -> None:
    net = make_net(seed=3)
    optimizer = paper(net, rho=0.3)
    net.load_state_dict(make_net().state_dict())
    plain_net = make_net()
    plain = paper(plain_net, rho=0.3)
    train(net, optimizer, 20)
    train(plain_net, plain, 20)
    assert_same_weights(net, plain_net)


def test_residuals_are_the_norms_they_say() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.2, update_every=4)
    train(net, optimizer, 7)
    old = {name: optimizer.auxiliary(name) for name in WEIGHTS}
    assert math.isfinite(optimizer.residuals().dual)
    train(net, optimizer, 1, start=7)
    found = optimizer.residuals()
    gap = moved = norm = gained = kept = 0.0
    for name in WEIGHTS:
        w, z = net.get_parameter(name).detach(), optimizer.auxiliary(name)
        one = found.per_weight[name]
        assert one.primal == pytest.approx(float((w - z).norm() / w.norm()), rel=1e-4)
        assert one.dual == pytest.approx(float((z - old[name]).norm() / w.norm()), rel=1e-4)
        new = int(((z != 0) & (old[name] == 0)).sum())
        assert one.mask_churn == pytest.approx(new / (w.numel() / 2), rel=1e-4)
        gap += float((w - z).square().sum())
        moved += float((z - old[name]).square().sum())
        norm += float(w.square().sum())
        gained, kept = gained + new, kept + w.numel() / 2
    assert found.primal == pytest.approx(math.sqrt(gap / norm), rel=1e-4)
    assert found.dual == pytest.approx(math.sqrt(moved / norm), rel=1e-4)
    assert found.mask_churn == pytest.approx(gained / kept, rel=1e-4)
    assert str(found).startswith("all 4 weights: primal ")


def test_residuals_before_z_has_moved_and_when_frozen() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.2, update_every=4)
    train(net, optimizer, 3)
    found = optimizer.residuals()
    assert found.primal > 0
    assert math.isnan(found.dual)
    assert math.isnan(found.mask_churn)
    train(net, optimizer, 37, start=3)
    assert (optimizer.residuals().primal, optimizer.residuals().dual) == (0.0, 0.0)


def test_a_weight_that_stands_still_keeps_its_dual_and_the_others_move() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.2, update_every=2)
    train(net, optimizer, 6)
    held, free = optimizer.dual(UP), optimizer.dual(WEIGHTS[1])
    assert held.any()
    for x in batches(4, 6):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.get_parameter(UP).grad = None
        optimizer.step()
    assert same_bits(optimizer.dual(UP), held)
    assert not torch.equal(optimizer.dual(WEIGHTS[1]), free)


def test_the_dual_of_a_weight_that_stands_still_shrinks_with_a_rising_rho() -> None:
    net = make_net()
    optimizer = paper(net, rho=lambda step: 0.2 if step < 8 else 0.4, update_every=2)
    train(net, optimizer, 6)
    held = optimizer.dual(UP)
    for x in batches(2, 6):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.get_parameter(UP).grad = None
        optimizer.step()
    assert optimizer.rho == 0.4
    torch.testing.assert_close(optimizer.dual(UP), held / 2)


def test_rho_may_not_fall_while_the_dual_is_in_use_also_where_the_schedule_hides_it() -> None:
    calls = []

    def fickle(step: int) -> float:
        calls.append(step)
        return 0.5 if len(calls) < 12 else 0.1

    net = make_net()
    optimizer = paper(net, rho=fickle, update_every=4)
    with pytest.raises(ValueError, match=r"rho falls from 0\.5 to 0\.1 at step \d+ while the dual is in use; keep rho"):
        train(net, optimizer, 28)


def test_warning_of_a_frozen_run_comes_once_with_the_checkpoint_or_with_finalize() -> None:
    net = make_net()
    optimizer = paper(net, rho=1e-4)
    train(net, optimizer, 28)
    with pytest.warns(ConvergenceWarning, match="has not reached its pattern") as caught:
        optimizer.state_dict()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
