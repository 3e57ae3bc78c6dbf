"""The life of a run: phases, finalize, the frozen mask, residuals, and the whole against the reference."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from admm_nxm.masks import packed_shape
from torch import nn

from admm_nxm import (
    ADMMNxM,
    Constant,
    ConvergenceWarning,
    Every,
    Pattern,
    Ramp,
    Update,
    keep_mask,
    project,
    verify,
)
from admm_nxm.reference import ReferenceADMM
from admm_nxm.schedules import Plan
from tests.helpers import (
    CASES,
    FULL,
    PENALTIES,
    TORCH_OPTIMIZERS,
    WITH_DUAL,
    Factory,
    Net,
    admm,
    assert_same_weights,
    batches,
    every,
    every_form,
    every_form_with_a_dual,
    forms_and_inners,
    is_lean,
    loss_of,
    make_net,
    primal_of,
    restless,
    same_bits,
    tolerance,
    train,
    weights_of,
)


class OneWeight(nn.Module):
    """A single weight in a repeated block; its loss is a quadratic around a target."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, rows, bias=False, dtype=dtype))])
        self.target = torch.randn(rows, width, generator=generator).to(dtype)
        with torch.no_grad():
            self.weight.copy_(torch.randn(rows, width, generator=generator))

    @property
    def weight(self) -> nn.Parameter:
        return self.blocks[0][0].weight

    def gradient(self) -> torch.Tensor:
        return (self.weight.detach() - self.target).div(2)


PLANS = {
    "default": {"total_steps": 40},
    "textbook": {"rho": 0.3, "update_every": Every(3)},
    "rising-rho": {"rho": Ramp(0.01, 2.0, start=2, stop=30), "update_every": Every(2, start=2), "freeze_at": 30},
    "no-dual": {"rho": 0.1, "update_every": Every(2, dual_start=None), "freeze_at": 25},
    "dual-before-penalty": {"rho": lambda step: 0.0 if step < 9 else 0.2 + step / 100, "update_every": Every(3)},
    "every-step": {"rho": Ramp(0.5, 0.6, start=0, stop=9), "update_every": 1},
}


def without_dual(options: dict) -> dict:
    """The same plan for a form that has no dual."""
    updates = options.get("update_every")
    return {**options, "update_every": replace(updates, dual_start=None)} if isinstance(updates, Every) else options


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS.keys())
def test_whole_run_equals_reference(options: dict, dtype: torch.dtype, penalty: str) -> None:
    options = options if penalty in WITH_DUAL else without_dual(options)
    module, pattern = OneWeight(3, 16, dtype), Pattern(3, 8)
    optimizer = ADMMNxM(
        torch.optim.SGD(module.parameters(), lr=0.05),
        module,
        pattern=pattern,
        **options,
        **{**CASES[penalty], **({"state_dtype": dtype} if penalty == FULL else {})},
    )
    reference = ReferenceADMM(
        module.weight,
        pattern,
        optimizer.plan,
        lr=0.05,
        penalty=optimizer.penalty,
        state_dtype=torch.bool if is_lean(penalty) else None,
    )
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}

    def values(flat: list[float]) -> torch.Tensor:
        return torch.tensor(flat, dtype=torch.float64).to(dtype).view(3, 16)

    for _ in range(40):
        gradient = module.gradient()
        module.weight.grad = gradient.clone()
        reference.step([float(value) for value in gradient.flatten().tolist()])
        optimizer.step()
        torch.testing.assert_close(module.weight.detach(), values(reference.w), **close)
        assert optimizer.frozen == (reference.mask is not None)
        assert optimizer.rho == reference.rho
        name = optimizer.selection.weights[0].name
        if reference.mask is None:
            torch.testing.assert_close(optimizer.auxiliary(name), values(reference.z), **close)
            torch.testing.assert_close(optimizer.dual(name), values(reference.u), **close)
            assert ((optimizer.auxiliary(name) != 0) <= optimizer.masks()[name]).all()
        else:
            assert optimizer.masks()[name].flatten().tolist() == reference.mask
    if reference.mask is None:
        reference.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        optimizer.finalize()
    torch.testing.assert_close(module.weight.detach(), values(reference.w), **close)


@pytest.mark.parametrize("inner", ["AdamW-single", "AdamW-foreach", "AdamW-fused", "SGD-single-options"])
@pytest.mark.parametrize(
    ("penalty", "total_steps"),
    [("lazy", 20), ("lazy", 100), ("lazy", 400), (FULL, 100), ("proximal", 20), ("proximal", 100)],
)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_defaults_finish_the_job(penalty: str, inner: str, total_steps: int, pattern: str) -> None:
    net = make_net()
    optimizer = admm(net, TORCH_OPTIMIZERS[inner], pattern=pattern, total_steps=total_steps, penalty=penalty)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total_steps)
    for step in range(total_steps):
        train(net, optimizer, 1, step)
        rates.step()
    assert optimizer.phase == "frozen"
    report = optimizer.finalize()  # a ConvergenceWarning would be an error here
    assert report.ok
    assert optimizer.param_groups[0]["admm_freeze_residual"] < (0.01 if penalty in WITH_DUAL else 0.002)
    assert verify(net, pattern).ok
    assert report.sparsity == pytest.approx(Pattern.parse(pattern).sparsity)


@restless
@pytest.mark.parametrize("total_steps", [20, 100, 400])
@pytest.mark.parametrize("penalty", ["lazy", FULL, "proximal"])
def test_learning_rate_that_does_not_decay_leaves_nothing_to_project_either(penalty: str, total_steps: int) -> None:
    net = make_net()
    optimizer = admm(net, pattern="2:4", total_steps=total_steps, penalty=penalty)
    train(net, optimizer, total_steps)
    assert optimizer.finalize().ok
    assert optimizer.param_groups[0]["admm_freeze_residual"] < (0.01 if penalty in WITH_DUAL else 0.002)


@every_form
def test_phases_follow_each_other(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=100, penalty=penalty)
    phases, rhos = [], []
    for start in range(100):
        train(net, optimizer, 1, start)
        phases.append(optimizer.phase)
        rhos.append(optimizer.rho)
    order = ["dense", "constrained", "frozen"]
    assert sorted(phases, key=order.index) == phases
    assert set(phases) == set(order)
    assert phases.count("frozen") == 101 - optimizer.plan.freeze_at
    assert rhos == sorted(rhos)


@every_form
def test_frozen_weights_stay_exactly_zero_under_momentum_and_weight_decay(penalty: str) -> None:
    net = make_net()
    optimizer = admm(
        net,
        TORCH_OPTIMIZERS["SGD-single-options"],
        total_steps=20,
        penalty=penalty,
        residual_tolerance=tolerance(penalty),
    )
    train(net, optimizer, 20)
    optimizer.finalize()
    masks = optimizer.masks()
    before = weights_of(net)
    train(net, optimizer, 10, start=20)
    for name, mask in masks.items():
        w = net.get_parameter(name)
        assert same_bits(w.detach()[~mask], torch.zeros(int((~mask).sum())))
        assert not torch.equal(w[mask], before[name][mask])
        assert not optimizer.state[w]["momentum_buffer"][~mask].any()
    assert all(torch.equal(mask, optimizer.masks()[name]) for name, mask in masks.items())


@restless
@forms_and_inners(TORCH_OPTIMIZERS)
def test_every_inner_optimizer_ends_feasible_and_stays_so(penalty: str, factory: Factory) -> None:
    net = make_net()
    optimizer = admm(net, factory, total_steps=20, penalty=penalty)
    train(net, optimizer, 20)
    with warnings.catch_warnings():
        if (
            penalty in WITH_DUAL
        ):  # the lazy form's residual at the freeze does not depend on the strides of the inner optimizer
            warnings.simplefilter("ignore", ConvergenceWarning)
        assert optimizer.finalize().ok
    train(net, optimizer, 5, start=20)
    verify(net, optimizer.selection).raise_if_violated()
    assert all(p.isfinite().all() for p in net.parameters())


@every_form
def test_finalize_is_idempotent(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, 20)
    first = optimizer.finalize()
    before = weights_of(net)
    assert optimizer.finalized
    assert optimizer.finalize() == first
    assert_same_weights(net, before)


@every_form_with_a_dual
def test_finalize_projects_weight_plus_dual(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=0.2, update_every=Every(2), penalty=penalty)
    train(net, optimizer, 9)
    name = "blocks.0.up.weight"
    expected = project(net.get_parameter(name).detach() + optimizer.dual(name), "1:4")
    assert optimizer.dual(name).any()
    with pytest.warns(ConvergenceWarning):
        optimizer.finalize()
    assert torch.equal(net.get_parameter(name), expected)


@every_form
def test_finalize_frees_the_state_to_one_byte_a_weight_or_leaves_it_at_one_bit(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 5)
    w = net.blocks[0].up.weight

    def bytes_a_weight() -> float:
        state = optimizer.state[w]["admm_consensus"]
        return state.numel() * state.element_size() / w.numel()

    assert bytes_a_weight() == (0.125 if is_lean(penalty) else 4)
    with pytest.warns(ConvergenceWarning, match="after 5 steps"):
        optimizer.finalize()
    assert bytes_a_weight() == (0.125 if is_lean(penalty) else 1)
    assert optimizer.state[w]["admm_consensus"].dtype == (torch.uint8 if is_lean(penalty) else torch.bool)
    assert torch.equal(optimizer.auxiliary("blocks.0.up.weight"), w)
    assert not optimizer.dual("blocks.0.up.weight").any()


@pytest.mark.parametrize("steps", [0, 3, 18])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_form
def test_finalize_refuses_non_finite_weights_and_changes_nothing(penalty: str, bad: float, steps: int) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, steps)
    with torch.no_grad():
        net.blocks[1].down.weight[0, 3] = bad
    before, state = weights_of(net), optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight") as error:
        optimizer.finalize()
    assert "blocks.0" not in str(error.value)
    assert_same_weights(net, before)
    assert optimizer.state_dict()["param_groups"] == state


@every_form
def test_a_failed_run_says_so_at_the_line_of_the_caller(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-6, total_steps=20, penalty=penalty)
    train(net, optimizer, 20)
    with pytest.warns(ConvergenceWarning, match=r"changed them by \d+\.\d% .*rho = 1e-06.*Remedy") as caught:
        optimizer.finalize()
    assert caught[0].filename == __file__


NO_PENALTY = (
    r"no penalty was in force \(rho = 0\), so this is one-shot magnitude pruning. Remedy: leave rho at its default "
)
TOO_EARLY = (
    r"finalize\(\) came after 20 steps, and the penalty was to rise until step 140. Remedy: train to the end, or give "
)
WEAK = (
    r"the pull toward the pattern was weak \(rho = 0.0001 after 20 steps\). Remedy: leave rho at its default and give "
)
GRADIENT = (
    r"the penalty in the gradient \(rho = 10\) has not brought the pruned weights to zero in 14 steps of AdamW; a step "
    "moves a weight by no more than about the learning rate under Adam and its kin, and by learning rate "
    r"\* rho \* distance under SGD. Remedy: leave penalty at its default, or "
)
CAUSES: dict[str, tuple[dict, str]] = {
    "no penalty": ({"rho": 0.0, "total_steps": 20}, NO_PENALTY + r"and give total_steps\.$"),
    "too early": (
        {"total_steps": 200, "freeze_at": 140},
        TOO_EARLY + r"the true number of optimizer steps as total_steps\.$",
    ),
    "too early, proximal form": ({"penalty": "proximal", "total_steps": 200}, TOO_EARLY),
    "gradient form, short run": (
        {"penalty": "gradient", "total_steps": 20},
        GRADIENT + r"use a larger rho, a longer run, or a larger learning rate\.$",
    ),
    "weak pull": ({"rho": 1e-4}, WEAK + r"total_steps, so that rho rises far enough, or a larger rho\.$"),
    "weak pull, proximal form": ({"penalty": "proximal", "rho": 1e-4}, WEAK),
}


@pytest.mark.parametrize(("options", "cause"), CAUSES.values(), ids=CAUSES.keys())
def test_warning_names_the_likely_cause_and_the_remedy(options: dict, cause: str) -> None:
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-5)
    optimizer = ADMMNxM(inner, net, pattern="1:4", **options)
    train(net, optimizer, 20)
    with pytest.warns(ConvergenceWarning, match=f"Likely cause: {cause}"):
        optimizer.finalize()


@every_form
def test_warning_says_how_far_the_weights_were_from_the_pattern(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-4, residual_tolerance=0.031, penalty=penalty)
    train(net, optimizer, 5)
    before = weights_of(net)
    with pytest.warns(ConvergenceWarning) as caught:
        optimizer.finalize()
    gaps = {name: before[name] - net.get_parameter(name).detach() for name in optimizer.masks()}
    shares = {name: float(gap.norm() / before[name].norm()) for name, gap in gaps.items()}
    worst = max(shares, key=shares.__getitem__)
    norm = torch.stack([before[name].norm() for name in gaps]).norm()
    overall = float(torch.stack([gap.norm() for gap in gaps.values()]).norm() / norm)
    assert str(caught[0].message).startswith(
        f"the run has not reached its pattern: projecting the weights changed them by {overall:.1%} of their norm "
        f"(tolerance 3.1%), most of all '{worst}', by {shares[worst]:.1%}, so accuracy measured before does not hold. "
    )


FEW, ALL = "this weight had no gradient for long", r"the pull toward the pattern was weak \(rho = 1e\+03 after"


@pytest.mark.parametrize(("idle", "cause"), [(1, FEW), (2, FEW), (3, ALL), (4, ALL)])
def test_cause_is_sought_in_single_weights_if_no_more_than_half_are_far_from_the_pattern(idle: int, cause: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    names = [weight.name for weight in optimizer.selection]
    for x in batches(20):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        for name in names[:idle]:
            net.get_parameter(name).grad = None
        optimizer.step()
    with pytest.warns(ConvergenceWarning, match=f"Likely cause: {cause}"):
        optimizer.finalize()


def test_weights_that_are_all_a_little_far_from_the_pattern_are_announced_too() -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-4, residual_tolerance=0.3)  # and no single one is above 5 times that
    train(net, optimizer, 20)
    with pytest.warns(ConvergenceWarning, match=r"Likely cause: the pull toward the pattern was weak \(rho = 0.0001"):
        optimizer.finalize()
    assert optimizer.param_groups[0]["admm_far_weights"] == 0


@every_form
def test_warning_survives_a_resume_in_the_frozen_phase(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-6, total_steps=20, penalty=penalty)
    train(net, optimizer, 19)
    resumed_net = make_net()
    resumed = admm(resumed_net, rho=1e-6, total_steps=20, penalty=penalty)
    resumed_net.load_state_dict(net.state_dict())
    with pytest.warns(ConvergenceWarning) as caught:  # a run may end without finalize(): saving says so, once
        state = optimizer.state_dict()
    assert [warning.filename for warning in caught] == [__file__]
    optimizer.state_dict()
    resumed.load_state_dict(state)
    resumed.state_dict()
    with pytest.warns(ConvergenceWarning):
        resumed.finalize()


def test_tolerance_decides_about_the_warning() -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-6, total_steps=20, residual_tolerance=9.0)
    train(net, optimizer, 20)
    assert optimizer.finalize().ok


@every_form_with_a_dual
def test_residuals_are_the_norms_they_say(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=0.1, update_every=Every(4), penalty=penalty)
    train(net, optimizer, 4)
    old_z = {name: optimizer.auxiliary(name) for name in optimizer.masks()}
    old_masks = optimizer.masks()
    train(net, optimizer, 4, start=4)
    residuals = optimizer.residuals()
    gaps, moves, norms, gained, kept = [], [], [], 0, 0
    for name, mask in optimizer.masks().items():
        w, z = net.get_parameter(name).detach(), optimizer.auxiliary(name)
        gaps.append((w - z).norm())
        moves.append((z - old_z[name]).norm())
        norms.append(w.norm())
        gained += int((mask & ~old_masks[name]).sum())
        kept += int(mask.sum())
        one = residuals.per_weight[name]
        assert one.primal == pytest.approx(float(gaps[-1] / norms[-1]), rel=1e-5)
        assert one.dual == pytest.approx(float(moves[-1] / norms[-1]), rel=1e-5)
    norm = torch.stack(norms).norm()
    assert residuals.primal == pytest.approx(float(torch.stack(gaps).norm() / norm), rel=1e-5)
    assert residuals.dual == pytest.approx(float(torch.stack(moves).norm() / norm), rel=1e-5)
    assert residuals.mask_churn == pytest.approx(gained / kept)
    assert gained > 0


@every_form
def test_residuals_before_the_first_step_and_when_frozen(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    fresh = optimizer.residuals()
    assert 0.2 < fresh.primal < 1.0
    assert math.isnan(fresh.dual)
    assert math.isnan(fresh.mask_churn)
    train(net, optimizer, 20)
    frozen = optimizer.residuals()
    assert (frozen.primal, frozen.dual, frozen.mask_churn) == (0.0, 0.0, 0.0)


@every_form
def test_zero_weight_has_zero_residual(penalty: str) -> None:
    net = make_net()
    with torch.no_grad():
        net.blocks[0].up.weight.zero_()
    assert admm(net, penalty=penalty).residuals().per_weight["blocks.0.up.weight"].primal == 0.0


@every_form
def test_views_before_the_first_step_are_what_it_would_start_from(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, penalty=penalty)
    name, w = "blocks.0.down.weight", net.blocks[0].down.weight.detach()
    assert torch.equal(optimizer.masks()[name], keep_mask(w, "1:4"))
    assert torch.equal(optimizer.auxiliary(name), project(w, "1:4"))
    assert not optimizer.dual(name).any()
    assert not optimizer.state


def test_unknown_weight_name_lists_the_known_ones() -> None:
    optimizer = admm(make_net())
    for view in (optimizer.auxiliary, optimizer.dual):
        with pytest.raises(KeyError, match=r"head\.weight.*blocks\.0\.up\.weight"):
            view("head.weight")


STATE_DTYPES = [None, torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("penalty", "state_dtype"),
    [(penalty, dtype) for penalty in PENALTIES for dtype in STATE_DTYPES] + [("lazy", torch.bool)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_is_one_buffer_a_weight_of_the_asked_dtype_or_its_mask(
    penalty: str, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    net = make_net(dtype=dtype)
    optimizer = admm(
        net,
        TORCH_OPTIMIZERS["SGD-single"],
        total_steps=60,
        state_dtype=state_dtype,
        penalty=penalty,
        residual_tolerance=tolerance(penalty),
    )
    train(net, optimizer, 2)
    # By default the lazy form stores the mask alone, except for weights too narrow for w to be made of what is shown.
    lean = state_dtype == torch.bool or (penalty == "lazy" and state_dtype is None and dtype != torch.bfloat16)
    for weight in optimizer.selection:
        p = net.get_parameter(weight.name)
        state = optimizer.state[p]
        assert set(state) == {"admm_consensus", *(["momentum_buffer"] if "momentum_buffer" in state else [])}
        assert state["admm_consensus"].dtype == (torch.uint8 if lean else state_dtype or dtype)
        assert state["admm_consensus"].shape == (packed_shape(p.shape) if lean else p.shape)
    assert not any("admm_consensus" in optimizer.state[p] for p in net.head.parameters() if p in optimizer.state)
    train(net, optimizer, 58, start=2)
    assert optimizer.finalize().ok


def test_one_weight_of_16_bits_among_others_gives_all_a_state_of_their_size() -> None:
    net = make_net()
    net.blocks[0].up.to(torch.bfloat16)
    optimizer = admm(net, rho=0.5)
    for name in ("blocks.0.up.weight", "blocks.1.up.weight"):
        net.get_parameter(name).grad = torch.zeros_like(net.get_parameter(name))
    optimizer.step()
    dtypes = {
        name: optimizer.state[net.get_parameter(name)]["admm_consensus"].dtype
        for name in ("blocks.0.up.weight", "blocks.1.up.weight")
    }
    assert dtypes == {"blocks.0.up.weight": torch.bfloat16, "blocks.1.up.weight": torch.float32}


@every_form
def test_weight_that_gets_its_first_gradient_late(penalty: str) -> None:
    """Its state starts with its own first step, also if that is in the frozen phase."""
    for first in (7, 18):
        net = make_net()
        optimizer = admm(net, total_steps=20, penalty=penalty)
        late = net.blocks[1].up.weight
        for step, x in enumerate(batches(20)):
            loss_of(net, x).backward()
            if step < first:
                late.grad = None
            optimizer.step()
            optimizer.zero_grad()
            if step < first:
                assert late not in optimizer.state
        kinds = {optimizer.state[w]["admm_consensus"].dtype for w in (late, net.blocks[0].up.weight)}
        assert len(kinds) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            assert optimizer.finalize().ok


@every_form
def test_weight_without_any_gradient_is_still_projected(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=1.0)
    for x in batches(20):
        loss_of(net, x).backward()
        net.blocks[0].up.weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.finalize().ok
    assert torch.equal(net.blocks[0].up.weight, project(make_net().blocks[0].up.weight, "1:4"))


@pytest.mark.parametrize("penalty", ["lazy", "gradient"])
def test_keep_equal_to_group_changes_nothing(penalty: str) -> None:
    plain, net = make_net(), make_net()
    inner = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, inner, 20)
    optimizer = admm(net, pattern="4:4", penalty=penalty, rho=0.3, update_every=every(1, penalty), freeze_at=15)
    # z is w itself after each update, so the penalty pulls nowhere.
    train(net, optimizer, 20)
    assert optimizer.finalize().ok
    assert_same_weights(net, plain)


def test_maximizing_inner_optimizer_is_pulled_toward_the_pattern_too() -> None:
    def primal(maximize: bool) -> float:
        net = make_net()
        inner = torch.optim.SGD(net.parameters(), lr=1e-2, maximize=maximize)
        optimizer = ADMMNxM(inner, net, penalty="gradient", rho=5.0, update_every=Every(5, dual_start=None))
        for x in batches(40):
            (loss_of(net, x) * (-1 if maximize else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.residuals().primal

    assert primal(True) == pytest.approx(primal(False), rel=1e-5)
    assert primal(True) < 0.2


def test_rho_is_constant_between_updates() -> None:
    net = make_net()
    optimizer = admm(net, rho=lambda step: 0.01 * (step + 1), update_every=Every(4, dual_start=None))
    seen = []
    for start in range(9):
        train(net, optimizer, 1, start)
        seen.append(round(optimizer.rho, 10))
    assert seen == [0.01] * 3 + [0.05] * 4 + [0.09] * 2


def test_custom_update_schedule_decides() -> None:
    calls: list[int] = []

    def updates(step: int) -> Update:
        calls.append(step)
        return Update.AUXILIARY if step == 3 else Update.NONE

    net = make_net()
    optimizer = admm(net, rho=0.1, update_every=updates)
    train(net, optimizer, 2)
    z = optimizer.auxiliary("blocks.0.up.weight")
    train(net, optimizer, 1, start=2)
    assert not torch.equal(z, optimizer.auxiliary("blocks.0.up.weight"))
    assert calls[-3:] == [1, 2, 3]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_schedule_that_goes_bad_without_a_known_end_is_named_with_its_step(value: float) -> None:
    net = make_net()
    optimizer = admm(net, rho=lambda step: 0.1 if step < 3 else value, update_every=1)
    train(net, optimizer, 2)
    with pytest.raises(ValueError, match="at step 3"):
        train(net, optimizer, 1, start=2)


@every_form_with_a_dual
def test_rho_may_not_fall_while_the_dual_is_in_use(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=lambda step: 1.0 / (step + 1), update_every=Every(2), penalty=penalty)
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match=re.escape("rho falls") + ".*" + re.escape("dual_start=None")):
        train(net, optimizer, 1, start=1)


@every_form
def test_rho_may_fall_without_a_dual(penalty: str) -> None:
    net = make_net()
    updates = Every(2, dual_start=None)
    optimizer = admm(net, rho=lambda step: 1.0 / (step + 1), update_every=updates, penalty=penalty)
    train(net, optimizer, 5)
    assert optimizer.rho == 1 / 5


def test_named_parameters_give_the_same_run_as_the_module() -> None:
    def run(model: Callable[[Net], object]) -> Net:
        net = make_net()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        optimizer = ADMMNxM(inner, model(net), total_steps=20)  # type: ignore[arg-type]
        train(net, optimizer, 20)
        optimizer.finalize()
        return net

    assert_same_weights(run(lambda net: net), run(lambda net: net.named_parameters()))


@every_form
def test_several_parameter_groups_and_constant_schedule(penalty: str) -> None:
    net = make_net()
    groups = [{"params": net.head.parameters(), "lr": 1e-3}, {"params": net.blocks.parameters(), "weight_decay": 0.1}]
    inner = torch.optim.AdamW(groups, lr=2e-3)
    options = {"rho": Constant(99.0), "residual_tolerance": tolerance(penalty), **CASES[penalty]}
    optimizer = ADMMNxM(inner, net, **options)
    train(net, optimizer, 30)
    assert [group["admm_step"] for group in optimizer.param_groups] == [30, 30]
    assert optimizer.finalize().ok


@every_form
def test_plan_is_the_one_that_was_asked_for(penalty: str) -> None:
    rho, updates = Constant(0.5), every(7, penalty)
    made = admm(make_net(), rho=rho, update_every=updates, freeze_at=9, penalty=penalty)
    assert made.plan == Plan(rho, updates, 9)


# ---------------------------------------------------------------- weights that come from elsewhere, or stand still


@every_form
def test_defaults_finish_the_job_in_every_form_where_there_is_time(penalty: str) -> None:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-3), net, total_steps=600, **CASES[penalty])
    train(net, optimizer, 600)
    assert optimizer.finalize().ok  # a ConvergenceWarning would be an error here


@every_form
def test_weights_loaded_while_projected_stay_and_start_anew(penalty: str) -> None:
    """Trainer loads its best model after an evaluation: finalize must ship that one."""
    net, best = make_net(), make_net(seed=5)
    with torch.no_grad():
        for w in (m.weight for m in best.blocks.modules() if isinstance(m, nn.Linear)):
            w.copy_(project(w, "1:4"))
    optimizer = admm(net, rho=0.1, update_every=every(3, penalty), penalty=penalty)
    train(net, optimizer, 10)
    optimizer.eval()
    net.load_state_dict(best.state_dict())
    optimizer.train()
    assert_same_weights(net, best)
    assert not optimizer.dual("blocks.0.up.weight").any()
    optimizer.finalize()  # nothing is left to project, and so nothing to warn of
    assert_same_weights(net, best)


@every_form
def test_weights_loaded_before_the_first_step_while_projected_are_where_the_run_starts(penalty: str) -> None:
    net, plain = make_net(), make_net(seed=5)
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    with optimizer.projected():
        net.load_state_dict(plain.state_dict())
    assert_same_weights(net, plain)
    train(net, optimizer, 20)
    train(plain, admm(plain, total_steps=20, penalty=penalty), 20)
    assert_same_weights(net, plain)


@every_form
def test_only_the_weights_that_were_changed_while_projected_stay(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=0.1, update_every=every(3, penalty), penalty=penalty)
    train(net, optimizer, 10)
    before = weights_of(net)
    loaded = torch.full((16, 8), 2.0)
    with optimizer.projected(), torch.no_grad():
        net.blocks[0].up.weight.copy_(loaded)
    now, mask = net.blocks[0].up.weight, optimizer.masks()["blocks.0.up.weight"]
    assert torch.equal(mask, keep_mask(loaded, "1:4"))
    torch.testing.assert_close(primal_of(optimizer, now), loaded, rtol=1e-6, atol=0)
    # Where w is made of what is shown, it is shown at once; elsewhere from the next step on.
    shown = torch.where(mask, loaded, loaded / 1.1) if is_lean(penalty) else loaded
    torch.testing.assert_close(now.detach(), shown, rtol=1e-6, atol=0)
    assert is_lean(penalty) or torch.equal(now, loaded)
    before.pop("blocks.0.up.weight")
    assert_same_weights({name: w for name, w in weights_of(net).items() if name in before}, before)


@every_form
def test_dense_weights_loaded_after_the_freeze_are_projected_and_announced(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 20)
    dense = make_net(seed=5)
    net.load_state_dict(dense.state_dict())
    with pytest.warns(ConvergenceWarning):
        assert optimizer.finalize().ok
    for name, mask in optimizer.masks().items():
        assert torch.equal(net.get_parameter(name), project(dense.get_parameter(name), "1:4"))
        assert torch.equal(mask, keep_mask(dense.get_parameter(name), "1:4"))
    train(net, optimizer, 2)
    assert optimizer.finalize().ok


def test_feasible_weights_loaded_after_the_freeze_bring_their_mask() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 20)
    best = make_net(seed=5)
    with torch.no_grad():
        for name in optimizer.masks():
            best.get_parameter(name).copy_(project(best.get_parameter(name), "1:4"))
    net.load_state_dict(best.state_dict())
    assert optimizer.finalize().ok
    assert_same_weights(net, best)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, best.get_parameter(name) != 0)


def test_masks_are_copies() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 20)
    for mask in optimizer.masks().values():
        mask.fill_(True)
    train(net, optimizer, 2)
    assert optimizer.finalize().ok


@every_form
def test_finalize_refused_in_evaluation_mode_changes_nothing(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=0.1, penalty=penalty)
    train(net, optimizer, 5)
    with torch.no_grad():
        net.blocks[0].up.weight[0, 0] = float("nan")
    optimizer.eval()
    before = weights_of(net)
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight"):
        optimizer.finalize()
    assert_same_weights(net, before)


def test_nan_that_appears_after_finalize_is_named_by_the_next() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 20)
    optimizer.finalize()
    with torch.no_grad():
        net.blocks[1].up.weight[optimizer.masks()["blocks.1.up.weight"]] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.weight"):
        optimizer.finalize()


@every_form_with_a_dual
def test_state_of_a_weight_that_stands_still_moves_only_with_rho(penalty: str) -> None:
    net = make_net()
    still = net.blocks[0].up.weight
    optimizer = admm(net, rho=lambda step: 0.01 * (1 + step), update_every=Every(2), penalty=penalty)
    train(net, optimizer, 8)
    z, u, rho = optimizer.auxiliary("blocks.0.up.weight"), optimizer.dual("blocks.0.up.weight"), optimizer.rho
    mask = optimizer.masks()["blocks.0.up.weight"]
    assert u.any()
    for x in batches(10, 8):
        loss_of(net, x).backward()
        still.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.rho > rho
    assert torch.equal(optimizer.auxiliary("blocks.0.up.weight"), z)
    assert torch.equal(optimizer.masks()["blocks.0.up.weight"], mask)
    torch.testing.assert_close(optimizer.dual("blocks.0.up.weight") * optimizer.rho, u * rho)


def test_one_failed_weight_among_many_is_announced_by_name() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList(nn.Sequential(nn.Linear(64, 64, bias=False)) for _ in range(80))
    net.append(nn.Sequential(nn.Linear(4, 4, bias=False)))
    optimizer = ADMMNxM(torch.optim.SGD(net.parameters(), lr=0.1), net, total_steps=40)
    for _ in range(40):
        for w in list(net.parameters())[:-1]:
            w.grad = torch.zeros_like(w)
        optimizer.step()
    with pytest.warns(ConvergenceWarning, match=r"by [01]\.\d% of.*'80\.0\.weight', by [3-6]\d\.\d%.*no gradient"):
        assert optimizer.finalize().ok
    assert optimizer.param_groups[0]["admm_freeze_residual"] < 0.02


@every_form
def test_hyperparameters_of_the_constrained_phase_fit_a_given_freeze(penalty: str) -> None:
    net = make_net()
    optimizer = admm(
        net, total_steps=100, freeze_at=30, update_every=7, penalty=penalty, residual_tolerance=tolerance(penalty)
    )
    train(net, optimizer, 100)
    assert optimizer.param_groups[0]["admm_frozen_at"] == 30
    assert optimizer.rho == optimizer.plan.rho(100) >= 10
    assert optimizer.finalize().ok


def test_patched_step_of_the_inner_optimizer_is_called() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    calls, original = [], optimizer.inner.step
    optimizer.inner.step = lambda: calls.append(original())  # type: ignore[method-assign]
    train(net, optimizer, 3)
    assert len(calls) == 3


@every_form
def test_weight_without_a_gradient_does_not_hide_how_the_others_move(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, penalty=penalty, rho=0.5, update_every=every(2))
    for x in batches(4):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.get_parameter("blocks.0.up.weight").grad = None
        optimizer.step()
    residuals = optimizer.residuals()
    assert math.isnan(residuals.per_weight["blocks.0.up.weight"].mask_churn)
    others = [r.mask_churn for name, r in residuals.per_weight.items() if name != "blocks.0.up.weight"]
    assert residuals.mask_churn == pytest.approx(sum(others) / len(others))  # weights of equal size
    assert residuals.dual > 0


@pytest.mark.parametrize("steps", [0, 5, 12, 19])
@every_form
def test_unwrap_leaves_w_and_nothing_of_admm(penalty: str, steps: int) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, steps)
    held = weights_of(net)
    with torch.no_grad():
        form = optimizer._form
        expected = {
            bound.spec.name: bound.w.clone()
            if optimizer.frozen or not optimizer.rho
            else form.primal(bound.w, optimizer._consensus_or_initial(bound), optimizer.rho).clone()
            for bound in optimizer._bound()
        }
    optimizer.eval()
    inner = optimizer.unwrap()
    assert inner is optimizer.inner
    assert not any(key.startswith("admm") for group in inner.param_groups for key in group)
    assert not any(key.startswith("admm") for state in inner.state.values() for key in state)
    assert_same_weights(weights_of(net), {**held, **expected})
    if penalty not in WITH_DUAL and steps == 12:
        assert any(not torch.equal(held[name], w) for name, w in expected.items())
    again = ADMMNxM(inner, net, total_steps=10, residual_tolerance=99.0, **CASES[penalty])
    train(net, again, 10)
    assert again.param_groups[0]["admm_step"] == 10
    assert again.finalize().ok


# ---------------------------------------------------------------- at the edges of a run


@every_form
def test_finalize_before_the_first_step_is_one_shot_pruning_and_the_mask_holds(penalty: str) -> None:
    net, dense = make_net(), make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    with pytest.warns(ConvergenceWarning, match="one-shot magnitude pruning"):
        assert optimizer.finalize().ok
    assert (optimizer.frozen, optimizer.phase, optimizer.finalized) == (True, "frozen", True)
    masks = optimizer.masks()
    for name, mask in masks.items():
        assert torch.equal(net.get_parameter(name), project(dense.get_parameter(name), "1:4"))
        assert torch.equal(mask, keep_mask(dense.get_parameter(name), "1:4"))
    train(net, optimizer, 3)
    verify(net, optimizer.selection).raise_if_violated()
    assert all(torch.equal(mask, masks[name]) for name, mask in optimizer.masks().items())


@every_form_with_a_dual
def test_dual_that_was_in_use_once_forbids_a_falling_rho_for_good(penalty: str) -> None:
    updates = {2: Update.AUXILIARY_AND_DUAL, 4: Update.AUXILIARY}
    net = make_net()
    optimizer = admm(
        net,
        rho=lambda step: 0.5 if step < 4 else 0.4,
        update_every=lambda step: updates.get(step, Update.NONE),
        penalty=penalty,
    )
    train(net, optimizer, 3)
    with pytest.raises(ValueError, match=r"rho falls from 0\.5 to 0\.4 at step 4"):
        train(net, optimizer, 1, start=3)


@every_form
def test_weight_that_stands_still_does_not_keep_the_others_from_moving(penalty: str) -> None:
    net = make_net()
    first, last = "blocks.0.up.weight", "blocks.1.down.weight"
    optimizer = admm(net, rho=0.3, update_every=every(2, penalty), penalty=penalty)
    train(net, optimizer, 4)
    held = {name: optimizer.auxiliary(name) for name in (first, last)}
    for x in batches(2, 4):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.get_parameter(first).grad = None
        optimizer.step()
    figures = optimizer.residuals().per_weight
    assert torch.equal(optimizer.auxiliary(first), held[first])
    assert not torch.equal(optimizer.auxiliary(last), held[last])
    z, w = optimizer.auxiliary(last), net.get_parameter(last).detach()
    if penalty in WITH_DUAL:
        assert figures[last].dual == pytest.approx(float((z - held[last]).norm() / w.norm()), rel=1e-4)


def test_step_that_is_to_be_captured_is_refused_until_the_mask_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 2)
    before = weights_of(net)
    with monkeypatch.context() as capturing:
        capturing.setattr("admm_nxm.optimizer.is_capturing", lambda device: device.type == "cpu")
        with pytest.raises(
            RuntimeError,
            match=r"^step 3 was to be captured in a CUDA graph, which cannot follow the schedules: capture the forward "
            r"and backward pass alone \(torch\.cuda\.make_graphed_callables\) and call optimizer\.step\(\) outside of "
            r"the graph; once the mask is frozen, step\(\) may be captured$",
        ):
            train(net, optimizer, 1, start=2)
        assert_same_weights(net, before)
    train(net, optimizer, 16, start=2)
    assert optimizer.frozen
    with monkeypatch.context() as capturing:
        capturing.setattr("admm_nxm.optimizer.is_capturing", lambda device: True)
        train(net, optimizer, 2, start=18)
    assert optimizer.finalize().ok


@every_form
def test_error_in_the_first_step_costs_no_weight_whose_state_was_announced_to_a_loader(penalty: str) -> None:
    net = make_net()
    # Adagrad has a state before the first step, and with it a saved state dict announces ours.
    optimizer = admm(net, TORCH_OPTIMIZERS["Adagrad-single"], rho=0.5, update_every=2, penalty=penalty)
    assert "admm_consensus" in optimizer.state_dict()["state"][0]
    before = weights_of(net)
    loss_of(net, next(batches(1))).backward()

    def out_of_memory() -> None:
        raise RuntimeError("out of memory")

    optimizer.inner.step = out_of_memory  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    for name, w in weights_of(net).items():
        torch.testing.assert_close(w, before[name])


@every_form
def test_checkpoint_of_a_run_in_which_a_weight_stood_still_is_taken_up(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, TORCH_OPTIMIZERS["SGD-single"], total_steps=20, penalty=penalty)
    for x in batches(3):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.blocks[0].up.weight.grad = None
        optimizer.step()
    other = admm(make_net(), TORCH_OPTIMIZERS["SGD-single"], total_steps=20, penalty=penalty)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["admm_step"] == 3


def test_step_hooks_stay_behind_when_the_optimizer_is_pickled() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))  # a lambda could not be pickled
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    train(net, optimizer, 1)
    assert fired == ["before", "after"]
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.step()
    assert fired == ["before", "after"]


def test_refusal_of_non_finite_weights_names_them_all_and_the_ways_out() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 3)
    with torch.no_grad():
        net.blocks[0].down.weight[0, 0] = math.inf
        net.blocks[1].up.weight[0, 0] = math.nan
    with pytest.raises(
        ValueError,
        match=r"^2 weights have NaN or infinite entries after step 3: blocks\.0\.down\.weight, blocks\.1\.up\.weight; "
        "nothing was changed. Load an earlier checkpoint, lower the learning rate, or clip the gradients$",
    ):
        optimizer.finalize()


def test_step_under_the_projected_weights_is_refused_with_the_remedy() -> None:
    optimizer = admm(make_net(), total_steps=20)
    optimizer.eval()
    with pytest.raises(
        RuntimeError, match=r"^the model holds its projected weights; call optimizer\.train\(\) before step\(\)$"
    ):
        optimizer.step()


def test_inner_optimizer_that_knows_no_direction_is_taken_to_minimise() -> None:
    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    def run(inner: Factory) -> Net:
        net = make_net()
        train(net, admm(net, inner, penalty="gradient", rho=5.0, update_every=Every(5, dual_start=None)), 20)
        return net

    assert_same_weights(
        run(lambda net: Plain(net.parameters())),
        run(lambda net: torch.optim.SGD(net.parameters(), lr=1e-2, foreach=False)),
    )


# ---------------------------------------------------------------- taking ADMM off


@every_form
def test_unwrap_passes_over_a_weight_that_never_had_a_gradient_and_may_be_repeated(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.blocks[0].up.weight.grad = None
        optimizer.step()
    for _ in range(2):
        inner = optimizer.unwrap()
        assert not any("admm_consensus" in state for state in inner.state.values())
        assert not any(key.startswith("admm") for group in inner.param_groups for key in group)


def test_unwrap_without_a_penalty_leaves_the_weights_as_they_are() -> None:
    net = make_net()
    optimizer = admm(net, rho=0.0, update_every=2, state_dtype=torch.bfloat16)  # too narrow for the weights
    train(net, optimizer, 5)
    before = weights_of(net)
    optimizer.unwrap()
    assert_same_weights(net, before)


def test_run_that_begins_again_after_unwrap_announces_its_own_failure() -> None:
    net = make_net()
    optimizer = admm(net, rho=1e-6, total_steps=20)
    train(net, optimizer, 20)
    with pytest.warns(ConvergenceWarning):
        optimizer.state_dict()
    optimizer.unwrap()
    optimizer.state_dict()
    train(net, optimizer, 17)
    optimizer.unwrap()  # frozen never, and nothing to announce
    with torch.no_grad():
        for p in net.blocks.parameters():
            p.add_(0.1)  # what was pruned is far from zero again
    train(net, optimizer, 18)
    assert optimizer.frozen
    with pytest.warns(ConvergenceWarning):
        optimizer.state_dict()
    optimizer.unwrap()
    optimizer.state_dict()


# ---------------------------------------------------------------- while the model holds the projected weights


def test_inner_optimizer_that_has_modes_of_its_own_changes_them_while_the_model_holds_the_training_weights() -> None:
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []

    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            seen.append(("eval", weights_of(net)))

        def train(self) -> None:
            seen.append(("train", weights_of(net)))

    net = make_net()
    optimizer = admm(net, lambda net: Averaging(net.parameters(), lr=1e-2), rho=0.5, update_every=2)
    train(net, optimizer, 3)
    before = weights_of(net)
    optimizer.eval()
    assert verify(net, optimizer.selection).ok
    optimizer.train()
    assert [mode for mode, _ in seen] == ["eval", "train"]
    for _, weights in seen:
        assert_same_weights(weights, before)


@every_form
def test_weight_that_was_loaded_broken_while_projected_is_not_hidden_by_the_training_weight(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=0.1, update_every=every(3, penalty), penalty=penalty)
    train(net, optimizer, 4)
    with optimizer.projected(), torch.no_grad():
        kept = optimizer.masks()["blocks.0.up.weight"].nonzero()[0].tolist()
        net.blocks[0].up.weight[tuple(kept)] = math.nan
    assert net.blocks[0].up.weight[tuple(kept)].isnan()
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight"):
        optimizer.finalize()


@every_form
def test_weights_may_be_loaded_while_projected_before_z_has_moved(penalty: str) -> None:
    net, best = make_net(), make_net(seed=5)
    optimizer = admm(net, rho=0.1, update_every=every(3, penalty), penalty=penalty)
    train(net, optimizer, 1)
    with optimizer.projected():
        net.load_state_dict(best.state_dict())
    for name in optimizer.masks():
        w = best.get_parameter(name).detach()
        assert torch.equal(optimizer.masks()[name], keep_mask(w, "1:4"))
        torch.testing.assert_close(primal_of(optimizer, net.get_parameter(name)), w)


@every_form
def test_checkpoint_that_is_saved_after_an_evaluation_goes_on_at_once(penalty: str) -> None:
    net, other_net = make_net(), make_net()
    optimizer, other = (admm(n, total_steps=20, penalty=penalty) for n in (net, other_net))
    train(net, optimizer, 6)
    optimizer.eval()
    optimizer.train()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_net.load_state_dict(net.state_dict())
    train(net, optimizer, 2, start=6)
    train(other_net, other, 2, start=6)
    assert_same_weights(other_net, net)


@every_form
def test_evaluation_once_frozen_needs_no_copy_of_the_weights(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, 19)
    before = weights_of(net)
    optimizer.eval()
    assert not any("admm_primal" in entry for entry in optimizer.state_dict()["state"].values())
    assert_same_weights(net, before)
    optimizer.train()
    assert_same_weights(net, before)


# ---------------------------------------------------------------- what is saved


def test_hooks_on_the_state_dict_are_given_the_optimizer_and_may_return_nothing() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 2)
    plain = optimizer.state_dict()
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda *given: seen.append(given))
    optimizer.register_state_dict_post_hook(lambda *given: seen.append(given))
    optimizer.register_load_state_dict_pre_hook(lambda *given: seen.append(given))
    optimizer.register_load_state_dict_post_hook(lambda *given: seen.append(given))
    saved = optimizer.state_dict()
    assert saved["param_groups"] == plain["param_groups"]
    assert saved["state"].keys() == plain["state"].keys()
    optimizer.load_state_dict(saved)
    assert [len(given) for given in seen] == [1, 2, 2, 1]
    assert all(given[0] is optimizer for given in seen)
    assert seen[1][1]["param_groups"] == seen[2][1]["param_groups"] == plain["param_groups"]


@every_form
def test_weight_that_never_had_a_gradient_is_saved_without_a_state(penalty: str) -> None:
    net = make_net()
    # Adagrad has a state for every parameter from the beginning.
    optimizer = admm(net, TORCH_OPTIMIZERS["Adagrad-single"], total_steps=20, penalty=penalty)
    for x in batches(2):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.blocks[0].up.weight.grad = None
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert "admm_consensus" not in state[0]
    assert "admm_consensus" in state[2]


# ---------------------------------------------------------------- what a refusal says


def saved_after(steps: int, **options: Any) -> dict[str, Any]:
    """The state dict of a run of so many steps."""
    net = make_net()
    optimizer = admm(net, **{"total_steps": 20, **options})
    train(net, optimizer, steps)
    return optimizer.state_dict()


def why_refused(state: dict[str, Any], **options: Any) -> str:
    """What an optimizer of these options says to a state dict."""
    optimizer = admm(make_net(), **{"total_steps": 20, **options})
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole by the caller
        optimizer.load_state_dict(state)
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize("steps", [1, 6])
def test_checkpoint_of_another_pattern_is_refused_with_the_remedy(steps: int) -> None:
    assert why_refused(saved_after(steps), pattern="2:4") == (
        "the checkpoint was made with another selection, pattern, grouped dimension or form of the penalty, under "
        "which its ADMM state means something else; build ADMMNxM as it was built then"
    )


def test_checkpoint_from_before_the_first_step_fits_any_pattern() -> None:
    optimizer = admm(make_net(), total_steps=20, pattern="2:4")
    optimizer.load_state_dict(saved_after(0))
    assert optimizer.param_groups[0]["admm_step"] == 0


def test_checkpoint_without_a_note_of_its_selection_gets_one() -> None:
    state = saved_after(6)
    noted = [group.pop("admm_selection") for group in state["param_groups"]]
    optimizer = admm(make_net(), total_steps=20)
    optimizer.load_state_dict(state)
    assert [group["admm_selection"] for group in optimizer.state_dict()["param_groups"]] == noted
    assert noted[0] != 0


def test_checkpoint_of_more_weights_is_refused_with_their_positions() -> None:
    assert why_refused(saved_after(6), select={r"blocks\.0\..*weight": "1:4"}) == (
        "the checkpoint has ADMM state for 2 parameters that are not selected here (positions [4, 6] in the "
        "optimizer); build ADMMNxM with the selection that the checkpoint was made with"
    )


def test_checkpoint_of_another_kind_of_state_is_refused_with_the_dtype_to_ask_for() -> None:
    text = "the checkpoint's run stored {}, and what is stored here is {}; build ADMMNxM with state_dtype={}"
    mask, w = "the mask", "w off the mask"
    assert why_refused(saved_after(6), **CASES[FULL]) == text.format(mask, w, "torch.bool")
    assert why_refused(saved_after(6, **CASES[FULL])) == text.format(w, mask, "torch.float32")
    mixed = saved_after(6, **CASES[FULL])
    entries = [entry for entry in mixed["state"].values() if "admm_consensus" in entry]
    entries[0]["admm_consensus"] = entries[0]["admm_consensus"].bfloat16()
    assert why_refused(mixed) == text.format(w, mask, "torch.bfloat16 or torch.float32")
    frozen = saved_after(19, **CASES[FULL])
    assert why_refused(frozen) == text.format(w, mask, "the floating-point dtype of that run")


def test_checkpoint_that_would_let_rho_fall_under_a_dual_is_refused_with_the_way_to_train_longer() -> None:
    options = {"penalty": "proximal", "update_every": Every(2, dual_start=0)}
    state = saved_after(12, rho=lambda step: 0.1 + step / 16, **options)
    assert why_refused(state, rho=lambda step: 0.06 + step / 50, total_steps=40, **options) == (
        "the checkpoint has rho = 0.85 at step 12 with the dual in use, and the schedule built here "
        "(total_steps=40) goes on from 0.3; rho may not fall then. Build ADMMNxM with the schedule of the "
        "checkpoint's run; to train longer, extend the frozen phase by giving freeze_at"
    )


def test_checkpoint_with_a_dual_fits_a_schedule_that_stays_where_it_is() -> None:
    options = {"penalty": "proximal", "update_every": Every(2, dual_start=0), "rho": 0.3, "residual_tolerance": 9.0}
    state = saved_after(12, **options)
    other = admm(make_net(), total_steps=40, **options)
    other.load_state_dict(state)
    assert other.param_groups[0]["admm_dual_in_use"] == 1
    assert other.rho == 0.3


def test_checkpoint_of_the_frozen_phase_fits_any_schedule() -> None:
    options = {"penalty": "proximal", "update_every": Every(2, dual_start=0), "residual_tolerance": 9.0}
    state = saved_after(19, rho=lambda step: 0.1 + step / 16, **options)
    other = admm(make_net(), rho=0.01, total_steps=40, **options)
    other.load_state_dict(state)
    assert other.phase == "frozen"


SHARD = "and {} groups are torn apart. Shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"


def why_the_step_is_refused(optimizer: ADMMNxM) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole by the caller
        optimizer.step()
    return str(caught.value)


def test_weight_that_was_flattened_is_refused_with_the_way_to_shard() -> None:
    optimizer = admm(make_net(), total_steps=20)
    params = optimizer.param_groups[0]["params"]
    params[0] = nn.Parameter(params[0].detach().reshape(-1))
    params[0].grad = torch.zeros_like(params[0])
    assert why_the_step_is_refused(optimizer) == (
        "weight 'blocks.0.up.weight' had shape (16, 8) at construction and now has (128,): it was flattened or "
        "partitioned, " + SHARD.format("its")
    )


def test_parameters_that_were_joined_are_refused_with_the_way_to_shard() -> None:
    optimizer = admm(make_net(), total_steps=20)
    del optimizer.param_groups[0]["params"][4:]
    assert why_the_step_is_refused(optimizer) == (
        "weight 'blocks.1.up.weight' was parameter 4 of group 0 at construction, and the group now has 4: parameters "
        "were joined or partitioned (ZeRO, flat FSDP1), " + SHARD.format("their")
    )


def test_gradient_that_is_not_dense_is_refused_by_its_layout() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    net.blocks[0].up.weight.grad = torch.eye(16, 8).to_sparse()
    with pytest.raises(
        ValueError, match=r"^weight 'blocks\.0\.up\.weight' has a torch\.sparse_coo gradient; dense is needed$"
    ):
        optimizer.step()
