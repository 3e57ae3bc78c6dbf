"""The life of a run, as a user sees it: phases, the frozen masks, finalize, and the views."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admm_nxm import ADMMNxM, ConvergenceWarning, Penalty, keep_mask, project, prune, verify
from tests.cores import BYTES_A_WEIGHT, WEIGHTS, adamw, exact, is_feasible, paper
from tests.helpers import assert_same_weights, batches, loss_of, make_net, same_bits, train, weights_of

UP = WEIGHTS[0]
Build = Callable[..., ADMMNxM]
both_forms = pytest.mark.parametrize("build", [exact, paper])
# The toy runs of the paper's form are too short to come near their pattern.
unsettled = pytest.mark.filterwarnings("ignore::admm_nxm.ConvergenceWarning")


def quiet_finalize(optimizer: ADMMNxM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        optimizer.finalize().raise_if_violated()


# ---------------------------------------------------------------- phases


def test_phases_follow_each_other_at_their_steps() -> None:
    net = make_net()
    optimizer = exact(net)
    phases = [optimizer.phase]
    for step in range(40):
        train(net, optimizer, 1, start=step)
        phases.append(optimizer.phase)
    assert phases == ["dense"] * 26 + ["calibration"] * 8 + ["frozen"] * 7
    assert (optimizer.prune_at, optimizer.calibration_steps, optimizer.total_steps) == (34, 8, 40)
    assert (optimizer.w_step, optimizer.rho, optimizer.frozen, optimizer.finalized) == ("exact", 0.0, True, False)
    assert optimizer.finalize().ok  # silent
    assert optimizer.finalized
    assert verify(net).ok


@given(
    total_steps=st.integers(1, 60),
    windows=st.sampled_from([1, 2, 4]),
    share=st.none() | st.floats(0, 1),
    pattern=st.sampled_from(["2:4", "1:4", "3:8"]),
)
@settings(max_examples=15)
def test_any_run_ends_feasible_in_silence(total_steps: int, windows: int, share: float | None, pattern: str) -> None:
    net = make_net()
    options: dict[str, Any] = {"total_steps": total_steps, "pattern": pattern}
    if share is not None:
        options["prune_at"] = round(share * total_steps)
    options["statistics_memory"] = BYTES_A_WEIGHT * 4 // windows
    prune_at = options.get("prune_at", max(1, total_steps * 85 // 100))
    if windows > prune_at > 0:
        with pytest.raises(ValueError, match="larger statistics_memory"):
            exact(net, **options)
        return
    optimizer = exact(net, **options)
    train(net, optimizer, total_steps)
    assert optimizer.frozen
    assert optimizer.finalize().ok
    assert all(is_feasible(net.get_parameter(name), pattern) for name in WEIGHTS)


@pytest.mark.parametrize("total_steps", range(1, 11))
def test_a_trial_of_a_few_steps_works_and_says_that_it_is_short(total_steps: int) -> None:
    net = make_net()
    steps = max(1, total_steps // 5)
    with pytest.warns(UserWarning, match=f"the run is short: A and G are gathered in {steps} steps for") as said:
        optimizer = ADMMNxM(adamw(net), net, total_steps=total_steps)
    assert said[0].filename == __file__
    # A remedy that is named works when it is followed: no option is named that a run of that length cannot have.
    named = re.search(r"calibration_steps=(\d+)", str(said[0].message))
    assert (named is None) == (total_steps * 85 // 100 < 8)
    if named:
        other = make_net()
        ADMMNxM(adamw(other), other, total_steps=total_steps, calibration_steps=int(named[1]))
    train(net, optimizer, total_steps)
    assert optimizer.finalize().ok
    assert optimizer.figures().model_error is not None


@pytest.mark.parametrize(
    "options", [{"total_steps": 40}, {"total_steps": 10, "calibration_steps": 1}, {"prune_at": 500}]
)
def test_enough_calibration_or_one_that_was_asked_for_is_no_warning(options: dict[str, int]) -> None:
    net = make_net()
    ADMMNxM(adamw(net), net, **options)  # type: ignore[arg-type]


def test_a_run_without_a_length_prunes_where_it_was_told_to() -> None:
    net = make_net()
    optimizer = exact(net, prune_at=12, calibration_steps=3)
    train(net, optimizer, 11)
    assert (optimizer.phase, optimizer.figures().total_steps) == ("calibration", None)
    train(net, optimizer, 1, start=11)
    assert optimizer.phase == "frozen"


def test_the_solve_may_be_the_last_step_of_the_run() -> None:
    net = make_net()
    optimizer = exact(net, total_steps=40, prune_at=40)
    train(net, optimizer, 39)
    assert optimizer.phase == "calibration"
    train(net, optimizer, 1, start=39)
    assert optimizer.finalize().ok


@pytest.mark.parametrize("form", [ADMMNxM, ADMMNxM.paper])
def test_a_run_that_begins_frozen_wants_pruned_weights(form: Any) -> None:
    net = make_net()
    prune(net, "2:4", select={r"blocks\.0\..*weight": "2:4"})
    before = weights_of(net)
    inner = adamw(net)
    with pytest.raises(
        ValueError,
        match=r"prune_at=0 begins with pruned weights, and 2 of 4 violate their pattern: blocks\.1\.up\.weight "
        r"\(\d+ of 32 groups exceed 2:4\), …\. Prune the model first, with admm_nxm\.prune\(model, \.\.\.\)",
    ):
        form(inner, net, total_steps=40, prune_at=0)
    assert_same_weights(net, before)
    prune(net, "2:4")
    assert form(inner, net, total_steps=40, prune_at=0).frozen


@both_forms
def test_a_run_that_begins_frozen_keeps_the_zeros(build: Build) -> None:
    net = make_net()
    dense = weights_of(net)
    optimizer = build(net, total_steps=40, prune_at=0)
    assert optimizer.phase == "frozen"
    train(net, optimizer, 5)
    for name in WEIGHTS:
        assert torch.equal(optimizer.masks()[name], keep_mask(dense[name], "2:4"))
        assert is_feasible(net.get_parameter(name))
    assert optimizer.finalize().ok


def test_a_run_that_begins_frozen_keeps_zeros_that_are_not_the_smallest() -> None:
    net = make_net()
    places = torch.tensor([True, False, False, True]).repeat(16, 2)
    with torch.no_grad():
        net.get_parameter(UP)[~places] = 0.0  # by no means the largest
    before = net.get_parameter(UP).detach().clone()
    optimizer = exact(net, total_steps=40, prune_at=0)
    assert same_bits(net.get_parameter(UP).detach(), before)
    train(net, optimizer, 5)
    assert torch.equal(net.get_parameter(UP) != 0, places)


@pytest.mark.parametrize("w_step", ["optimizer", Penalty(rho=0.3, update_every=4)])
def test_the_papers_form_may_be_asked_for_by_its_w_step(w_step: Any) -> None:
    net, other_net = make_net(), make_net()
    penalty = {} if w_step == "optimizer" else {"rho": 0.3, "update_every": 4}
    one = ADMMNxM(adamw(net), net, total_steps=40, prune_at=28, w_step=w_step)
    other = paper(other_net, **penalty)
    train(net, one, 40)
    train(other_net, other, 40)
    assert_same_weights(net, other_net)
    assert one.w_step == other.w_step == "optimizer"


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"amsgrad": True}, {"maximize": True}])
def test_pruned_entries_are_positive_zeros_after_every_step_and_the_rest_trains(options: dict[str, Any]) -> None:
    net = make_net()
    optimizer = ADMMNxM(adamw(net, **options), net, total_steps=40)
    train(net, optimizer, 34)
    masks = optimizer.masks()
    for step in range(34, 40):
        before = weights_of(net)
        train(net, optimizer, 1, start=step)
        for name, mask in masks.items():
            w = net.get_parameter(name).detach()
            assert same_bits(w[~mask], torch.zeros(int((~mask).sum())))
            assert not torch.equal(w[mask], before[name][mask])
    assert all(torch.equal(mask, optimizer.masks()[name]) for name, mask in masks.items())


def test_state_of_the_inner_optimizer_is_left_alone_by_the_solve() -> None:
    plain, net = make_net(), make_net()
    inner = adamw(plain)
    train(plain, inner, 34)
    optimizer = exact(net)
    train(net, optimizer, 34)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        for key, t in inner.state[p].items():
            assert same_bits(optimizer.state[q][key], t)


def test_a_weight_without_gradients_is_pruned_and_stays() -> None:
    net = make_net()
    optimizer = exact(net, total_steps=40, prune_at=0)
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        net.get_parameter(UP).grad = None
        optimizer.step()
    assert UP not in {name for name in WEIGHTS if net.get_parameter(name) in optimizer.state}
    assert torch.equal(optimizer.masks()[UP], net.get_parameter(UP) != 0)
    train(net, optimizer, 5, start=5)
    assert is_feasible(net.get_parameter(UP))


# ---------------------------------------------------------------- finalize


@both_forms
@pytest.mark.parametrize("stop", [0, 10, 29, 40])
@unsettled
def test_finalize_twice_changes_nothing(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    first = optimizer.finalize()
    assert first.ok
    before, figures = weights_of(net), optimizer.figures()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.finalize() == first
    assert_same_weights(net, before)
    assert optimizer.figures() == figures
    train(net, optimizer, 3, start=stop)
    assert all(is_feasible(net.get_parameter(name)) for name in WEIGHTS)


@pytest.mark.parametrize("stop", [0, 10, 26])
def test_finalize_in_the_dense_phase_prunes_by_magnitude_and_warns_at_the_line_of_the_caller(stop: int) -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, stop)
    dense = weights_of(net)
    said = (
        rf"^finalize\(\) came after {stop} optimizer steps, and the weights were to be pruned after step 34: 4 weights "
        r"were pruned by magnitude, without statistics, and no step has trained what was kept\. Accuracy measured "
        r"before does not hold\. Remedy: train to the end, or give the true number of optimizer steps as total_steps, "
        r"or an earlier prune_at$"
    )
    with pytest.warns(ConvergenceWarning, match=said) as caught:
        assert optimizer.finalize().ok
    assert caught[0].filename == __file__
    for name in WEIGHTS:
        assert same_bits(net.get_parameter(name).detach(), project(dense[name], "2:4"))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("remedy", [{"total_steps": 10}, {"total_steps": 40, "prune_at": 8}])
def test_remedies_for_a_run_that_ends_early_work(remedy: dict[str, int]) -> None:
    net = make_net()
    optimizer = exact(net, **remedy)
    train(net, optimizer, 10)
    assert optimizer.finalize().ok  # silent


@both_forms
@pytest.mark.parametrize("stop", [0, 10, 29, 36])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@unsettled
def test_finalize_refuses_weights_that_are_not_finite_and_changes_nothing(build: Build, stop: int, bad: float) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    with torch.no_grad():
        net.get_parameter(WEIGHTS[3])[0, 3] = bad
    before, figures = weights_of(net), optimizer.figures()
    said = rf"^1 of 4 weights have NaN or infinite entries after step {stop}: {WEIGHTS[3]}; nothing was changed\. Load"
    with pytest.raises(ValueError, match=said):
        optimizer.finalize()
    assert_same_weights(net, before)
    assert optimizer.figures() == figures
    assert not optimizer.finalized


@both_forms
@unsettled
def test_dense_weights_loaded_after_the_masks_were_set_are_pruned_by_finalize(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, 40)
    net.load_state_dict(make_net(seed=7).state_dict())
    dense = weights_of(net)
    assert optimizer.finalize().ok
    for name in WEIGHTS:
        assert same_bits(net.get_parameter(name).detach(), project(dense[name], "2:4"))
        assert torch.equal(optimizer.masks()[name], keep_mask(dense[name], "2:4"))


def test_report_lists_what_the_rules_wanted_and_could_not_have() -> None:
    net = make_net()
    net.get_parameter(UP).requires_grad_(False)
    optimizer = exact(net, ineligible="skip")
    train(net, optimizer, 40)
    assert f"not covered: {UP} (it is frozen (requires_grad=False))" in str(optimizer.finalize())


# ---------------------------------------------------------------- looking at a run


def test_views_of_the_exact_form_before_and_after_the_solve() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 5)
    w = net.get_parameter(UP).detach()
    assert optimizer.masks()[UP].all()
    assert same_bits(optimizer.auxiliary(UP), project(w, "2:4"))
    assert same_bits(optimizer.dual(UP), torch.zeros_like(w))
    gaps = {name: net.get_parameter(name).detach() - optimizer.auxiliary(name) for name in WEIGHTS}
    found = optimizer.residuals()
    for name, gap in gaps.items():
        expected = float(gap.norm() / net.get_parameter(name).detach().norm())
        assert found.per_weight[name].primal == pytest.approx(expected, rel=1e-5)
    assert found.dual != found.dual  # not known: z has not moved
    train(net, optimizer, 29, start=5)
    assert torch.equal(optimizer.auxiliary(UP), net.get_parameter(UP))
    found = optimizer.residuals()
    assert (found.primal, found.dual, found.mask_churn) == (0.0, 0.0, 0.0)


@both_forms
@unsettled
def test_views_are_copies(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, 36)
    before = weights_of(net)
    for view in (optimizer.masks()[UP], optimizer.auxiliary(UP), optimizer.dual(UP)):
        view.zero_()
    assert_same_weights(net, before)
    assert optimizer.masks()[UP].any()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    optimizer = exact(make_net())
    for look in (optimizer.auxiliary, optimizer.dual):
        with pytest.raises(KeyError, match=r"'up' is not a prunable weight; these are: blocks\.0\.up\.weight, blocks"):
            look("up")


@both_forms
@pytest.mark.parametrize("stop", [0, 10, 27])
def test_projected_weights_are_lent_and_come_back_bit_for_bit(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    before = weights_of(net)
    expected = {name: project(before[name] + optimizer.dual(name), "2:4") for name in WEIGHTS}
    with optimizer.projected():
        for name in WEIGHTS:
            assert torch.equal(net.get_parameter(name), expected[name])
        with optimizer.projected():  # once is enough
            pass
        assert is_feasible(net.get_parameter(UP))
        for refused in (optimizer.step, optimizer.finalize):
            with pytest.raises(RuntimeError, match=r"holds its projected weights; leave the projected\(\) block first"):
                refused()
    assert_same_weights(net, before)
    with pytest.raises(KeyError), optimizer.projected():
        raise KeyError
    assert_same_weights(net, before)
    train(net, optimizer, 40 - stop, start=stop)
    quiet_finalize(optimizer)


@both_forms
@unsettled
def test_projected_changes_nothing_once_the_masks_are_frozen(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, 40)
    before = weights_of(net)
    with optimizer.projected():
        assert_same_weights(net, before)
    assert_same_weights(net, before)


@both_forms
@pytest.mark.parametrize("stop", [0, 10, 29, 36])
@unsettled
def test_unwrap_leaves_the_weights_and_nothing_of_admm(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    plain = [dict(group) for group in adamw(make_net()).param_groups]
    train(net, optimizer, stop)
    before = weights_of(net)
    inner = optimizer.unwrap()
    assert_same_weights(net, before)
    assert [group.keys() for group in inner.param_groups] == [group.keys() for group in plain]
    assert not any(key.startswith("admm") for state in inner.state.values() for key in state)
    assert not any(module._forward_hooks for module in net.modules())
    for refused in (optimizer.step, optimizer.finalize):
        with pytest.raises(RuntimeError, match=r"ADMM was taken off with unwrap\(\); step the inner optimizer, or"):
            refused()
    again = exact(net)
    assert (again.phase, again.figures().step) == ("dense", 0)
    train(net, inner, 1, start=stop)
