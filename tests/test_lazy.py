"""The lazy form over whole runs: against the reference, what moves and what stays, and how the run ends."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Pattern, Ramp, Update
from admm_nxm.kernels import eager
from admm_nxm.masks import unpack
from admm_nxm.reference import ReferenceADMM
from tests.helpers import (
    FULL,
    TORCH_OPTIMIZERS,
    admm,
    assert_same_weights,
    batches,
    every,
    loss_of,
    make_net,
    primal_of,
    same_bits,
    spelt_out,
    train,
    weights_of,
)

UP = "blocks.0.up.weight"


class Lone(nn.Module):
    """One prunable weight in a repeated block."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, width = weight.shape
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, rows, bias=False, dtype=weight.dtype))])
        with torch.no_grad():
            self.weight.copy_(weight)

    @property
    def weight(self) -> nn.Parameter:
        return self.blocks[0][0].weight


NAME = "blocks.0.0.weight"


def hidden(optimizer: ADMMNxM, p: Tensor) -> Tensor:
    return optimizer.state[p]["admm_consensus"]


# With its mask alone, as it is by default, and with w in a state of the weight's size.
both = pytest.mark.parametrize("form", ["lazy", FULL])


def a_rounding_apart(form: str, mine: Tensor, w: Tensor, times: int = 1) -> bool:
    """Whether what came back is w: to the last bit, or, where masks alone are stored, to within so many roundings."""
    if form == FULL:
        return torch.equal(mine, w)
    return bool(((mine - w).abs() <= times * torch.finfo(w.dtype).eps * w.abs()).all())


# ---------------------------------------------------------------- against the reference

PLANS: dict[str, dict[str, Any]] = {
    "default": {"total_steps": 40},
    "constant": {"rho": 0.75, "update_every": every(3)},
    "rising": {"rho": Ramp(0.01, 200.0, start=2, stop=30), "update_every": Every(2, start=2, dual_start=None)},
    "falling": {"rho": lambda step: 8.0 / (1 + step), "update_every": every(4), "freeze_at": 35},
    "on and off": {"rho": lambda step: float(step // 8 % 2), "update_every": every(8), "freeze_at": 37},
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, None),
    (torch.float64, None),
    (torch.float32, torch.bool),
    (torch.bfloat16, torch.bool),
    (torch.float16, torch.bool),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS.keys())
def test_whole_run_equals_the_reference_bit_for_bit(
    options: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype | None]
) -> None:
    """A learning rate that is a power of two leaves one rounding a step, which both make alike."""
    dtype, state_dtype = dtypes
    lean = state_dtype in (None, torch.bool)
    generator, pattern = torch.Generator().manual_seed(7), Pattern(3, 8)
    start, target = (torch.randn(3, 16, generator=generator).to(dtype) for _ in range(2))
    module = Lone(start)
    inner = torch.optim.SGD(module.parameters(), lr=0.125, foreach=False)
    optimizer = ADMMNxM(inner, module, pattern=pattern, state_dtype=state_dtype, **options)
    reference = ReferenceADMM(
        module.weight,
        pattern,
        optimizer.plan,
        lr=0.125,
        penalty="lazy",
        state_dtype=torch.bool if lean else state_dtype,
    )
    w = module.weight

    def same(mine: Tensor, values: list[float]) -> bool:
        return same_bits(mine.detach().flatten(), torch.tensor(values, dtype=torch.float64).to(mine.dtype))

    # The run begins in its first step; the reference shows at once what a penalty from the start makes of w.
    assert same_bits(w.detach(), start)
    begins = optimizer.plan.rho(0) > 0 and lean
    assert same(w, reference.w) != begins
    for step in range(40):
        noise = torch.randn(3, 16, generator=generator).to(dtype)
        w.grad = w.detach() - target + noise  # at what the model is shown
        reference.step([float(value) for value in w.grad.flatten().tolist()])
        optimizer.step()
        assert same(w, reference.w), step
        assert optimizer.rho == reference.rho
        assert optimizer.frozen == (reference.mask is not None)
        assert optimizer.masks()[NAME].flatten().tolist() == (reference.mask or reference.kept)
        if not optimizer.frozen:
            kept = optimizer.masks()[NAME].flatten()
            if lean:
                assert torch.equal(unpack(hidden(optimizer, w)).flatten(), kept)
            else:
                stored = [0.0 if k else h for k, h in zip(kept, reference.hidden, strict=True)]
                assert same(hidden(optimizer, w), stored)
            assert same(optimizer.auxiliary(NAME), [x if k else 0.0 for k, x in zip(kept, reference.w, strict=True)])
    if reference.mask is None:
        reference.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert optimizer.finalize().ok
    assert torch.equal(w.detach().flatten(), torch.tensor(reference.w, dtype=torch.float64).to(dtype))


# ---------------------------------------------------------------- what moves and what stays


@both
def test_model_is_evaluated_at_the_proximal_point_and_w_itself_is_stepped(form: str) -> None:
    start = torch.tensor([[4.0, -2.0, 1.0, 0.5]])
    module = Lone(start)
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = ADMMNxM(inner, module, pattern="2:4", rho=3.0, update_every=99, **spelt_out({"penalty": form}))
    w = module.weight
    for step in range(1, 4):
        w.grad = torch.full_like(w, 0.25)
        optimizer.step()
        now = start - 0.25 * step  # plain gradient descent, whatever the penalty
        assert torch.equal(primal_of(optimizer, w), now)
        assert torch.equal(w.detach(), now * torch.tensor([[1.0, 1.0, 0.25, 0.25]]))
        if form == FULL:
            assert torch.equal(hidden(optimizer, w), now * torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
        # In the second step a pruned weight passes through zero.
        assert optimizer.masks()[NAME].tolist() == [[True, True, False, False]]


@both
def test_pruned_weight_comes_back_with_all_that_it_has_learned(form: str) -> None:
    module = Lone(torch.tensor([[1.0, 0.75, 0.125, 0.0625]]))
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    optimizer = ADMMNxM(inner, module, pattern="1:4", rho=1000.0, update_every=every(4), **spelt_out({"penalty": form}))
    w = module.weight
    seen = []
    for _ in range(8):
        w.grad = torch.tensor([[0.0, -0.125, 0.0, 0.0]])
        optimizer.step()
        seen.append((optimizer.masks()[NAME].flatten().tolist().index(True), w.detach().clone()))
    assert [place for place, _ in seen] == [0, 0, 0, 1, 1, 1, 1, 1]
    # Three steps in which the model hardly saw it, and its own weight rose all the same.
    assert seen[2][1][0, 0] == 1.0
    assert seen[2][1][0, 1] == pytest.approx(1.125 / 1001)
    assert a_rounding_apart(form, seen[3][1][0, 1], torch.tensor(1.25), times=4)
    assert seen[3][1][0, 0] == pytest.approx(1.0 / 1001)
    assert a_rounding_apart(form, seen[7][1][0, 1], torch.tensor(1.75), times=4)
    assert optimizer.residuals().mask_churn == 0.0
    assert a_rounding_apart(form, primal_of(optimizer, w), torch.tensor([[1.0, 1.75, 0.125, 0.0625]]), times=4)


@both
def test_masks_move_in_an_ordinary_run_and_weights_come_back(form: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=100, penalty=form)
    pruned_once: dict[str, Tensor] = {}
    back = 0
    for step in range(100):
        train(net, optimizer, 1, step)
        for name, mask in optimizer.masks().items():
            pruned = pruned_once.setdefault(name, torch.zeros_like(mask))
            back += int((pruned & mask).sum())
            pruned |= ~mask
    assert back > 0


@both
def test_gradient_of_the_loss_is_all_that_moves_w(form: str) -> None:
    """Two runs that are fed the same gradients have the same w, whatever the penalty."""
    nets = make_net(), make_net()
    optimizers = [
        admm(net, rho=rho, update_every=every(3), penalty=form) for net, rho in zip(nets, (0.0, 50.0), strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    for _ in range(10):
        for plain, other in zip(*(net.parameters() for net in nets), strict=True):
            plain.grad = torch.randn(plain.shape, generator=generator)
            other.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # The default inner optimizer decays weights, and so must see w itself, not what the model is shown.
    for name in optimizers[0].masks():
        plain, other = (net.get_parameter(name) for net in nets)
        whole = primal_of(optimizers[1], other)
        if form == FULL:
            assert torch.equal(whole, plain)
        else:  # ten steps, each from a w that has come back to within a rounding of what it was
            largest = float(plain.detach().abs().max())
            torch.testing.assert_close(whole, plain.detach(), rtol=0, atol=10 * largest * torch.finfo(plain.dtype).eps)
        assert not torch.equal(other, plain)
    assert same_bits(nets[0].head.weight.detach(), nets[1].head.weight.detach())


@both
def test_weight_that_stands_still_is_left_alone(form: str) -> None:
    net = make_net()
    still = net.blocks[0].up.weight
    optimizer = admm(net, rho=lambda step: 0.1 * (1 + step), update_every=every(2), penalty=form)
    train(net, optimizer, 8)
    before, state, w, rho = still.detach().clone(), hidden(optimizer, still).clone(), primal_of(optimizer, still), 0.9
    assert optimizer.rho == pytest.approx(rho)
    mask = optimizer.masks()[UP]
    for x in batches(10, 8):
        loss_of(net, x).backward()
        still.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert same_bits(hidden(optimizer, still), state)
        assert same_bits(still.detach()[mask], before[mask])
        if form == FULL:
            assert same_bits(still.detach(), before)
            continue
        # It is shown as rho has it now.
        assert a_rounding_apart(form, still.detach()[~mask], w[~mask] / (1 + optimizer.rho), times=6)
    assert optimizer.rho == pytest.approx(1.9)
    # With its next gradient it goes on from w itself, not from the little that the model was shown.
    assert a_rounding_apart(form, primal_of(optimizer, still), w, times=6)
    still.grad = torch.zeros_like(still)
    optimizer.inner.param_groups[0]["weight_decay"] = 0.0
    optimizer.state[still]["exp_avg"].zero_()
    optimizer.step()
    assert torch.equal(primal_of(optimizer, still)[mask & optimizer.masks()[UP]], w[mask & optimizer.masks()[UP]])
    assert a_rounding_apart(form, primal_of(optimizer, still), w, times=7)


@both
def test_weight_that_stands_still_while_rho_falls_to_zero_goes_on_from_w(form: str) -> None:
    start = torch.tensor([[4.0, 2.0, 1.0, 0.3]])
    module = Lone(start)
    other = nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([module.weight, other], lr=1.0)
    optimizer = ADMMNxM(
        inner,
        module,
        pattern="2:4",
        rho=lambda step: 0.7 * (step < 2),
        update_every=every(1),
        **spelt_out({"penalty": form}),
    )
    for step in range(4):
        module.weight.grad = None if step in (1, 2) else torch.zeros_like(module.weight)
        other.grad = torch.zeros_like(other)
        optimizer.step()
    assert optimizer.rho == 0.0
    assert a_rounding_apart(form, module.weight.detach(), start)


@both
def test_weight_that_stands_still_from_the_first_step_on_is_shown_once_it_moves(form: str) -> None:
    """Its state begins with its own first step, before which the model holds w itself whatever rho is."""
    start = torch.tensor([[4.0, 2.0, 1.0, 0.3]])
    module = Lone(start)
    other = nn.Parameter(torch.ones(1))
    inner = torch.optim.SGD([module.weight, other], lr=1.0)
    optimizer = ADMMNxM(
        inner,
        module,
        pattern="2:4",
        rho=lambda step: 0.7 * (1 + step),
        update_every=every(1),
        **spelt_out({"penalty": form}),
    )
    for step in range(6):
        module.weight.grad = None if step < 4 else torch.zeros_like(module.weight)
        other.grad = torch.zeros_like(other)
        assert step > 4 or same_bits(module.weight.detach(), start)
        optimizer.step()
    assert optimizer.rho == pytest.approx(0.7 * 7)
    assert a_rounding_apart(form, primal_of(optimizer, module.weight), start, times=3)
    shown = start / torch.tensor([[1.0, 1.0, 5.9, 5.9]])
    torch.testing.assert_close(module.weight.detach(), shown, rtol=1e-6, atol=0)


@both
def test_residuals_are_those_of_what_the_model_holds(form: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=4.0, update_every=every(4), penalty=form)
    train(net, optimizer, 4)
    old_masks = optimizer.masks()
    train(net, optimizer, 4, start=4)
    residuals = optimizer.residuals()
    gaps, moves, norms, primal_norms, gained, kept = [], [], [], [], 0, 0
    for name, mask in optimizer.masks().items():
        p = net.get_parameter(name)
        w, whole = p.detach(), primal_of(optimizer, p)
        gaps.append(w[~mask].norm())
        moves.append(whole[mask ^ old_masks[name]].norm())
        norms.append(w.norm())
        primal_norms.append(whole.norm())
        gained += int((mask & ~old_masks[name]).sum())
        kept += int(mask.sum())
        one = residuals.per_weight[name]
        assert one.primal == pytest.approx(float(gaps[-1] / norms[-1]), rel=1e-5)
        assert one.dual == pytest.approx(float(moves[-1] / primal_norms[-1]), rel=1e-5)
    gap, move, norm, primal_norm = (torch.stack(each).norm() for each in (gaps, moves, norms, primal_norms))
    assert residuals.primal == pytest.approx(float(gap / norm), rel=1e-5)
    assert residuals.dual == pytest.approx(float(move / primal_norm), rel=1e-5)
    assert residuals.mask_churn == pytest.approx(gained / kept)
    assert gained > 0


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_narrow_state_costs_w_no_more_than_its_rounding_off_the_mask(state_dtype: torch.dtype) -> None:
    nets = make_net(), make_net()
    options = {"rho": lambda step: float(step > 0), "update_every": every(1)}
    wide, narrow = (
        admm(net, state_dtype=dtype, **options) for net, dtype in zip(nets, (torch.float32, state_dtype), strict=True)
    )
    train(nets[0], wide, 1)
    train(nets[1], narrow, 1)
    for name, mask in wide.masks().items():
        a, b = (net.get_parameter(name) for net in nets)
        assert same_bits(a.detach(), b.detach())  # what is shown is computed from w before that is rounded
        assert not torch.equal(a.detach()[~mask], primal_of(wide, a)[~mask])
        assert torch.equal(hidden(narrow, b)[~mask], hidden(wide, a)[~mask].to(state_dtype))


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("inner", ["AdamW-single", "SGD-single-options", "Adagrad-single", "Rprop-single"])
@pytest.mark.parametrize("total_steps", [100, 190])
@both
def test_freeze_changes_the_model_by_next_to_nothing_and_keeps_the_mask_it_was_shown(
    form: str, total_steps: int, inner: str
) -> None:
    net = make_net()
    optimizer = admm(net, TORCH_OPTIMIZERS[inner], total_steps=total_steps, penalty=form)
    freeze_at = optimizer.plan.freeze_at
    train(net, optimizer, freeze_at - 1)
    assert optimizer.phase == "constrained"
    shown, masks = weights_of(net), optimizer.masks()
    train(net, optimizer, 1, start=freeze_at - 1)
    assert optimizer.phase == "frozen"
    assert optimizer.rho == optimizer.plan.rho(freeze_at)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
        # Next to nothing was shown off the mask, so nothing was lost.
        assert shown[name][~mask].norm() < 0.002 * shown[name].norm()
    train(net, optimizer, total_steps - freeze_at, start=freeze_at)
    assert optimizer.finalize().ok
    assert 0 < optimizer.param_groups[0]["admm_freeze_residual"] < 0.002
    assert optimizer.param_groups[0]["admm_worst_residual"] < 0.002


@both
def test_mask_does_not_move_in_the_step_that_freezes_it(form: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=400, penalty=form)
    freeze_at = optimizer.plan.freeze_at
    assert optimizer.plan.updates(freeze_at)
    train(net, optimizer, freeze_at - 1)
    masks = optimizer.masks()
    train(net, optimizer, 1, start=freeze_at - 1)
    assert all(torch.equal(mask, masks[name]) for name, mask in optimizer.masks().items())


@pytest.mark.parametrize("steps", [3, 7, 11])
@both
def test_finalize_in_mid_run_ships_the_mask_that_was_shown(form: str, steps: int) -> None:
    net = make_net()
    optimizer = admm(net, rho=1.0, update_every=every(5), residual_tolerance=9.0, penalty=form)
    train(net, optimizer, steps)
    shown, masks = weights_of(net), optimizer.masks()
    with optimizer.projected():
        evaluated = weights_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert optimizer.finalize().ok
    assert_same_weights(net, evaluated)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
        assert same_bits(net.get_parameter(name).detach()[mask], shown[name][mask])


@both
def test_momentum_off_the_mask_ends_with_the_freeze(form: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=form)
    train(net, optimizer, 17)
    assert all(optimizer.state[net.get_parameter(n)]["exp_avg"][~m].any() for n, m in optimizer.masks().items())
    train(net, optimizer, 1, start=17)
    assert optimizer.frozen
    for name, mask in optimizer.masks().items():
        state = optimizer.state[net.get_parameter(name)]
        for key in ("exp_avg", "exp_avg_sq"):
            assert not state[key][~mask].any()
        assert eager.hidden_mask(state["exp_avg"])[~mask].all()


@both
def test_penalty_too_strong_for_floating_point_shows_the_projection_itself(form: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1e30, update_every=every(2), penalty=form)
    train(net, optimizer, 5)
    # Where w is made of what is shown, a millionth of it has to stay.
    assert optimizer.residuals().primal <= (0.0 if form == FULL else 2.0**-19)
    for name, mask in optimizer.masks().items():
        p = net.get_parameter(name)
        assert form != FULL or not p[~mask].any()
        assert primal_of(optimizer, p)[~mask].all()  # and w lives on
        assert 0.01 < float(primal_of(optimizer, p)[~mask].abs().max()) < 1.0


# ---------------------------------------------------------------- refused


def test_dual_asked_for_without_a_known_length_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r'at step 8, and penalty="lazy" has no dual.*dual_start=None.*"proximal"'):
        admm(make_net(), rho=0.1, update_every=Every(3, start=2, dual_start=7))


def test_dual_that_a_schedule_asks_for_later_is_refused_when_it_comes() -> None:
    net = make_net()
    late = lambda step: Update.AUXILIARY_AND_DUAL if step == 3 else Update.NONE  # noqa: E731
    optimizer = admm(net, rho=0.1, update_every=late)
    train(net, optimizer, 2)
    with pytest.raises(ValueError, match=r'at step 3, and penalty="lazy" has no dual.*dual_start=None.*"proximal"'):
        train(net, optimizer, 1, start=2)


def test_without_a_penalty_a_narrow_state_rounds_nothing_that_is_evaluated_or_shipped() -> None:
    nets = make_net(), make_net(), make_net()
    for net, dtype in zip(nets, (torch.float32, torch.bfloat16, None), strict=True):
        optimizer = admm(net, rho=0.0, update_every=every(4), state_dtype=dtype, saliency="magnitude")
        train(net, optimizer, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            assert optimizer.finalize().ok
    assert_same_weights(nets[0], nets[1])
    assert_same_weights(nets[0], nets[2])
