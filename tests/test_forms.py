"""Each form of the penalty by itself: what its state says of z, u, the mask and the primal weight agrees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from admm_nxm import Pattern, keep_mask, project
from admm_nxm.consensus import is_mask_of
from admm_nxm.forms import FORMS, FullLazyForm, LazyForm, divisor_of, form_of, fraction_of
from admm_nxm.forms import is_lean as stores_masks_alone
from admm_nxm.kernels import eager
from admm_nxm.masks import PACKED, is_mask
from admm_nxm.schedules import Penalty
from tests.helpers import (
    CASES,
    DEFAULT,
    FULL,
    PENALTIES,
    WITH_DUAL,
    every_form,
    every_form_with_a_dual,
    is_lean,
    same_bits,
)

PATTERN = Pattern(2, 8)
DIM = 0
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
]
MASKED_PAIRS = [(torch.float32, PACKED), (torch.float32, torch.bool), (torch.float64, PACKED), (torch.bfloat16, PACKED)]
FORM = {case: form_of(options["penalty"], full="state_dtype" in options) for case, options in CASES.items()}
LAZY = [case for case in CASES if case not in WITH_DUAL]


def named(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in pair)


every_form_and_pair = pytest.mark.parametrize(
    ("penalty", "dtypes"),
    [
        pytest.param(case, pair, id=f"{case}-{named(pair)}")
        for case in CASES
        for pair in (MASKED_PAIRS if is_lean(case) else PAIRS)
    ],
)


def own_dtype(penalty: str, floating: torch.dtype = torch.float32) -> torch.dtype:
    """A dtype that the state can have: that one, where it is of the weight's size."""
    return PACKED if is_lean(penalty) else floating


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    """Two groups a column, with a tie and both zeros among the entries; its memory is not in the usual order."""
    w = torch.randn(8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    w[0, 0], w[0, 1], w[1, 2], w[1, 3], w[1, 4] = 0.0, -0.0, 0.5, -0.5, 0.5
    return w.t()


def states_on_the_way(penalty: str, w: Tensor, state_dtype: torch.dtype, rho: float) -> Iterator[Tensor]:
    """A few whole steps of w at random: the state after each, while ``w`` is what the model then holds."""
    form, generator = FORM[penalty], torch.Generator().manual_seed(2)
    state = form.initial(w, PATTERN, DIM, state_dtype)
    form.follow(eager, w, state, 0.0, rho)
    for step in range(4):
        gradient = torch.randn(w.shape, generator=generator).to(w.dtype)
        form.before(eager, [gradient], [w], [state], rho, False)
        w.sub_(gradient * 0.5)
        form.after(eager, [w], [state], rho)
        form.advance(eager, w, state, PATTERN, DIM, None, with_dual=form.takes_dual and step > 0, dual_scale=1.0)
        form.show(eager, [w], [state], rho)
        yield state


def test_forms_are_the_ones_that_may_be_asked_for() -> None:
    assert get_args(Penalty) == PENALTIES
    assert DEFAULT in PENALTIES


def test_forms_that_store_the_same_say_so() -> None:
    assert FORM["proximal"].stores == FORM["gradient"].stores
    assert len({FORM[penalty].stores for penalty in ("proximal", "lazy", FULL)}) == 3


@pytest.mark.parametrize("penalty", PENALTIES)
def test_form_with_a_state_of_the_weights_size_is_another_for_the_lazy_one_alone(penalty: Penalty) -> None:
    lean, full = form_of(penalty, full=False), form_of(penalty, full=True)
    assert lean is FORMS[penalty]
    assert stores_masks_alone(lean) == (penalty == "lazy")
    assert not stores_masks_alone(full)
    if penalty == "lazy":
        assert (type(lean), type(full)) == (LazyForm, FullLazyForm)
    else:
        assert full is lean
    for said in ("takes_dual", "freezes_what_was_shown", "takes_saliency"):
        assert getattr(lean, said) == getattr(full, said)


@pytest.mark.parametrize(("rho", "divisor"), [(0.0, 1.0), (0.5, 1.5), (1000.0, 1001.0), (1e30, 1.0 + 2.0**20)])
def test_divisor_is_that_of_the_proximal_step_up_to_where_it_would_only_cost_precision(
    rho: float, divisor: float
) -> None:
    assert divisor_of(rho) == divisor
    if rho <= 2**20:
        assert 1 / divisor == pytest.approx(1 - fraction_of(rho))


@pytest.mark.parametrize(("rho", "fraction"), [(0.0, 0.0), (1.0, 0.5), (999.0, 0.999), (1e30, 1.0)])
def test_fraction_is_that_of_the_proximal_step(rho: float, fraction: float) -> None:
    assert fraction_of(rho) == pytest.approx(fraction)
    w, v = 3.0, 1.0
    x = w + fraction_of(rho) * (v - w)
    assert rho * (x - v) + (x - w) == pytest.approx(0.0, abs=1e-6 * max(1.0, rho))  # the gradient of its objective


@every_form_and_pair
def test_run_starts_from_the_projection_with_no_dual(penalty: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, state_dtype = dtypes
    form, w = FORM[penalty], weight(dtype)
    before = w.clone()
    state = form.initial(w, PATTERN, DIM, state_dtype)
    assert state.dtype == state_dtype
    if is_mask(state):
        assert state.numel() == w.numel() // (8 if state_dtype == PACKED else 1)
    else:
        assert state.stride() == w.stride()
    assert same_bits(w, before)
    mask = form.mask(state, PATTERN, DIM)
    assert bool(is_mask_of(mask, PATTERN, DIM))
    assert torch.equal(form.primal(w, state, 0.0), w)
    # Off the mask, the lazy form gives back what the state could hold of w, or makes it of what is shown.
    held = w
    if penalty == FULL:
        held = torch.where(mask, w, w.to(state_dtype).to(dtype))
    elif penalty not in WITH_DUAL:
        held = torch.where(mask, w, w * 1.5)
    assert torch.equal(form.primal(w, state, 0.5), held)
    assert same_bits(form.primal(w, state, 0.5)[mask], w[mask])
    z = form.auxiliary(w, state, PATTERN, DIM)
    assert torch.equal(z.double(), torch.where(mask, w, torch.zeros_like(w)).to(z.dtype).double())
    assert not form.dual(state, PATTERN, DIM).any()
    if dtype == state_dtype or is_mask(state):
        assert torch.equal(mask, keep_mask(w, PATTERN, DIM))
        assert same_bits(z, project(w, PATTERN, DIM))
    projected, kept = form.projected(w, state, PATTERN, DIM, None, 0.0)
    assert projected.dtype == dtype
    assert torch.equal(projected, torch.where(kept, w, torch.zeros_like(w)))
    assert same_bits(w, before)


@every_form_and_pair
def test_views_agree_after_every_step(penalty: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, state_dtype = dtypes
    form, w = FORM[penalty], weight(dtype)
    for state in states_on_the_way(penalty, w, state_dtype, rho=0.5):
        before, held = state.clone(), w.clone()
        mask = form.mask(state, PATTERN, DIM).clone()
        z, u = form.auxiliary(w, state, PATTERN, DIM), form.dual(state, PATTERN, DIM)
        primal = form.primal(w, state, 0.5)
        projected, kept = form.projected(w, state, PATTERN, DIM, None, 0.5)
        assert bool(is_mask_of(mask, PATTERN, DIM))
        assert bool(is_mask_of(kept, PATTERN, DIM))
        assert not z[~mask].any()
        assert u.shape == w.shape
        assert not u[mask].any()
        assert same_bits(projected[~kept], torch.zeros_like(projected[~kept]))
        assert same_bits(primal[mask], w[mask])
        if penalty in WITH_DUAL:
            assert primal is w
            wide = torch.promote_types(dtype, state_dtype)
            a = (w.to(wide) + u.to(wide)).to(state_dtype)
            assert torch.equal(kept, keep_mask(a, PATTERN, DIM))
        else:
            assert torch.equal(kept, mask)
            assert same_bits(projected[kept], primal[kept])
            if penalty == FULL:
                assert torch.equal(primal[~mask].to(state_dtype), state[~mask])
            else:
                assert torch.equal(primal[~mask], w[~mask] * 1.5)
        # Looking changes nothing.
        assert same_bits(state, before)
        assert same_bits(w, held)


@pytest.mark.parametrize("penalty", LAZY)
def test_model_of_the_lazy_form_is_the_proximal_point_between_the_primal_weight_and_z(penalty: str) -> None:
    lazy = FORM[penalty]
    for rho in (0.03, 1.0, 1000.0):
        w = weight(torch.float64)
        for state in states_on_the_way(penalty, w, own_dtype(penalty, torch.float64), rho):
            primal, z = lazy.primal(w, state, rho), lazy.auxiliary(w, state, PATTERN, DIM)
            torch.testing.assert_close(w, primal + fraction_of(rho) * (z - primal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", LAZY)
def test_lazy_form_ships_the_mask_it_has_shown_and_the_best_one_where_it_has_shown_none(penalty: str) -> None:
    lazy, w = FORM[penalty], weight()
    *_, state = states_on_the_way(penalty, w, own_dtype(penalty), rho=0.0)
    w.add_(torch.randn(w.shape) * 3)
    shown = lazy.mask(state, PATTERN, DIM)
    # Without a penalty the model has not seen the mask, and the state off it is as old as the last step.
    lazy.show(eager, [w], [state], 0.0)
    factor = torch.rand(w.shape) + 0.5
    for with_factor in (None, factor):
        projected, kept = lazy.projected(w, state, PATTERN, DIM, with_factor, 0.0)
        scores = w if with_factor is None else w * with_factor
        assert torch.equal(kept, keep_mask(scores, PATTERN, DIM))
        assert torch.equal(projected, w * kept)
        assert torch.equal(lazy.projected(w, state, PATTERN, DIM, with_factor, 0.1)[1], shown)
    assert not torch.equal(keep_mask(w, PATTERN, DIM), shown)


def test_boolean_state_is_the_mask_itself_and_a_packed_one_is_not() -> None:
    form, w = FORM["lazy"], weight()
    state = form.initial(w, PATTERN, DIM, torch.bool)
    packed = form.initial(w, PATTERN, DIM, PACKED)
    assert form.mask(state, PATTERN, DIM) is state
    assert torch.equal(form.mask(packed, PATTERN, DIM), state)
    assert packed.shape == (16, 1)


@pytest.mark.parametrize("new", [PACKED, torch.bool])
@pytest.mark.parametrize("old", [PACKED, torch.bool])
def test_mask_is_repacked_into_a_new_tensor(old: torch.dtype, new: torch.dtype) -> None:
    form, w = FORM["lazy"], weight()
    *_, state = states_on_the_way("lazy", w, old, rho=0.5)
    before = state.clone()
    recast = form.recast(state, PATTERN, DIM, new)
    assert recast.dtype == new
    assert recast.data_ptr() != state.data_ptr()
    assert same_bits(state, before)
    assert torch.equal(form.mask(recast, PATTERN, DIM), form.mask(state, PATTERN, DIM))


@pytest.mark.parametrize("new", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", [case for case in CASES if not is_lean(case)])
def test_recast_is_a_new_tensor_that_means_the_same(penalty: str, old: torch.dtype, new: torch.dtype) -> None:
    form, w = FORM[penalty], weight()
    *_, state = states_on_the_way(penalty, w, old, rho=0.5)
    before = state.clone()
    recast = form.recast(state, PATTERN, DIM, new)
    assert recast.dtype == new
    assert recast.data_ptr() != state.data_ptr()
    assert same_bits(state, before)
    assert torch.equal(form.mask(recast, PATTERN, DIM), form.mask(state, PATTERN, DIM))
    close = {"rtol": 1e-2, "atol": 0}
    torch.testing.assert_close(
        form.dual(recast, PATTERN, DIM).double(), form.dual(state, PATTERN, DIM).double(), **close
    )
    ours, theirs = (form.auxiliary(w, s, PATTERN, DIM).double() for s in (recast, state))
    torch.testing.assert_close(ours, theirs, **close)
    torch.testing.assert_close(form.primal(w, recast, 0.5), form.primal(w, state, 0.5), **close)


def test_recast_of_the_hidden_state_keeps_the_mask_where_values_underflow_or_overflow() -> None:
    w = torch.tensor(
        [3.0, 1e-30, -1e-30, 0.0, -0.0, 1e-12, 2.0, -1e-12, *[1e30, 1e29, -1e20, 1e-40, -1e-40, 0.0, 1.0, 1e30]]
    )
    lazy = FORM[FULL]
    state = lazy.initial(w, PATTERN, 0, torch.float32)
    mask = keep_mask(w, PATTERN, 0)
    for new in (torch.float16, torch.bfloat16, torch.float64):
        recast = lazy.recast(state, PATTERN, 0, new)
        assert torch.equal(lazy.mask(recast, PATTERN, 0), mask)
        assert torch.equal(recast[~mask], w[~mask].to(new))
        again = lazy.recast(recast, PATTERN, 0, torch.float32)
        assert torch.equal(lazy.mask(again, PATTERN, 0), mask)


@pytest.mark.parametrize(("old", "new"), [(0.0, 0.0), (0.5, 0.5), (0.5, 0.0), (0.0, 0.7), (0.5, 3.0), (3.0, 0.5)])
@every_form
def test_weight_that_stands_still_follows_rho(penalty: str, old: float, new: float) -> None:
    form, w = FORM[penalty], weight()
    *_, state = states_on_the_way(penalty, w, own_dtype(penalty), rho=old)
    before, held, primal = state.clone(), w.clone(), form.primal(w, state, old).clone()
    mask = form.mask(state, PATTERN, DIM)
    form.follow(eager, w, state, old, new)
    assert same_bits(state, before)
    assert same_bits(w[mask], held[mask])
    if new == 0 and (old > 0 or penalty not in WITH_DUAL):
        assert same_bits(w, primal)  # as if there never had been a penalty
    if penalty in WITH_DUAL or old == new:
        assert same_bits(w, held)
    elif is_lean(penalty):
        # What the model is shown is the proximal point of the new rho, and w comes back to within a rounding.
        torch.testing.assert_close(w[~mask], primal[~mask] / (1 + new), rtol=1e-6, atol=0)
        torch.testing.assert_close(form.primal(w, state, new), primal, rtol=1e-6, atol=0)
    else:
        assert new == 0 or same_bits(w, held)  # the next step finds w in the state
        if old > 0:
            assert same_bits(form.primal(w, state, new), primal)


@every_form_with_a_dual
def test_rescaling_touches_the_dual_alone(penalty: str) -> None:
    form, w = FORM[penalty], weight()
    *_, state = states_on_the_way(penalty, w, torch.float32, rho=0.5)
    mask, z, u = (
        form.mask(state, PATTERN, DIM),
        form.auxiliary(w, state, PATTERN, DIM),
        form.dual(state, PATTERN, DIM),
    )
    assert u.any()
    form.rescale(state, PATTERN, DIM, 0.25)
    assert torch.equal(form.mask(state, PATTERN, DIM), mask)
    assert torch.equal(form.auxiliary(w, state, PATTERN, DIM), z)
    assert torch.equal(form.dual(state, PATTERN, DIM), u * 0.25)


@pytest.mark.parametrize("penalty", LAZY)
def test_form_without_a_dual_has_nothing_to_rescale(penalty: str) -> None:
    form, w = FORM[penalty], weight()
    *_, state = states_on_the_way(penalty, w, own_dtype(penalty), rho=0.5)
    before = state.clone()
    form.rescale(state, PATTERN, DIM, 0.25)
    assert same_bits(state, before)
    assert not form.dual(state, PATTERN, DIM).any()


@pytest.mark.parametrize("maximize", [False, True])
@every_form
def test_nothing_happens_around_a_step_without_a_penalty(penalty: str, maximize: bool) -> None:
    form, w = FORM[penalty], weight()
    state = form.initial(
        w, PATTERN, DIM, own_dtype(penalty, torch.bfloat16)
    )  # narrower than the weight, which must not be rounded
    gradient = torch.randn(w.shape)
    before = w.clone(), gradient.clone()
    form.before(eager, [gradient], [w], [state], 0.0, maximize)
    form.after(eager, [w], [state], 0.0)
    form.show(eager, [w], [state], 0.0)
    assert same_bits(w, before[0])
    assert same_bits(gradient, before[1])


def test_penalty_in_the_gradient_follows_the_direction_of_the_optimizer() -> None:
    form, w = FORM["gradient"], weight()
    state = form.initial(w, PATTERN, DIM, torch.float32)
    down, up = torch.zeros_like(w), torch.zeros_like(w)
    form.before(eager, [down], [w], [state], 2.0, False)
    form.before(eager, [up], [w], [state], 2.0, True)
    assert torch.equal(down, 2.0 * (w - project(w, PATTERN, DIM)))
    assert torch.equal(up, -down)
