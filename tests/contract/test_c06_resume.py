"""Line 6 of the contract: the state is complete, plain, and goes on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM
from tests.helpers import (
    A_FEW,
    ALL_OPTIMIZERS,
    CALIBRATION,
    DENSE,
    FEW_OF_EACH_KIND,
    FROZEN,
    STEPS,
    TORCH_OPTIMIZERS,
    TWO_WINDOWS,
    Build,
    Factory,
    admm,
    assert_same_weights,
    batches,
    every_form,
    forms_and_inners,
    loss_of,
    make_net,
    paper,
    same_bits,
    saved,
    train,
    unsettled,
    weights_of,
)


def check_resume(build: Build, factory: Factory, stops: Sequence[int], **options: Any) -> None:
    def fresh() -> tuple[nn.Module, ADMMNxM]:
        net = make_net()
        return net, build(net, factory, **options)

    whole_net, whole = fresh()
    taken = {}
    for step in range(STEPS + 1):
        if step in stops:
            taken[step] = saved((whole_net.state_dict(), whole.state_dict())), whole.figures()
        if step < STEPS:
            train(whole_net, whole, 1, start=step)
    end, at_the_end = weights_of(whole_net), whole.figures()
    report = whole.finalize()
    final = weights_of(whole_net)
    train(whole_net, whole, 2, start=STEPS)
    for stop, ((weights, state), figures) in taken.items():
        net, optimizer = fresh()
        net.load_state_dict(weights)
        optimizer.load_state_dict(state_dict=state)
        assert optimizer.figures() == figures
        train(net, optimizer, STEPS - stop, start=stop)
        assert_same_weights(weights_of(net), end)
        assert optimizer.figures() == at_the_end
        assert optimizer.finalize() == report
        assert_same_weights(weights_of(net), final)
        train(net, optimizer, 2, start=STEPS)
        assert_same_weights(net, whole_net)


@forms_and_inners(ALL_OPTIMIZERS)
def test_c06_interrupted_and_resumed_equals_uninterrupted(build: Build, factory: Factory) -> None:
    check_resume(build, factory, [DENSE, CALIBRATION, FROZEN])


@pytest.mark.parametrize("name", A_FEW)
@every_form
def test_c06_interrupted_anywhere_and_resumed_equals_uninterrupted(build: Build, name: str) -> None:
    """Before the first step and after it; before the first calibration step, and around the solve; at the end."""
    check_resume(build, TORCH_OPTIMIZERS[name], [0, 1, 13, 14, 16, 17, STEPS])


@pytest.mark.parametrize("name", ["AdamW-fused", "SGD-single"])
def test_c06_with_several_windows_too(name: str) -> None:
    """Inside the first window, between the two, and inside the second."""
    check_resume(admm, TORCH_OPTIMIZERS[name], [11, 12, 14, 15, 17], statistics_memory=TWO_WINDOWS)


@pytest.mark.parametrize("options", [{"prune_at": 0}, {"prune_at": STEPS}, {"prune_at": 1, "calibration_steps": 1}])
def test_c06_wherever_the_solve_stands(options: dict[str, Any]) -> None:
    check_resume(admm, TORCH_OPTIMIZERS["AdamW-single"], [0, 1, 18], **options)


@pytest.mark.parametrize("stop", [14, 15])
def test_c06_resumed_inside_calibration_with_accumulated_gradients(stop: int) -> None:
    def fresh() -> tuple[nn.Module, ADMMNxM]:
        net = make_net()
        return net, admm(net)

    def accumulate(net: nn.Module, optimizer: ADMMNxM, count: int, start: int = 0) -> None:
        for x in batches(count, start):
            for part in x.chunk(2):
                (loss_of(net, part) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole_net, whole = fresh()
    accumulate(whole_net, whole, STEPS)
    first_net, first = fresh()
    accumulate(first_net, first, stop)
    second_net, second = fresh()
    second_net.load_state_dict(saved(first_net.state_dict()))
    second.load_state_dict(saved(first.state_dict()))
    accumulate(second_net, second, STEPS - stop, start=stop)
    assert_same_weights(second_net, whole_net)
    assert second.figures().model_errors == whole.figures().model_errors


@pytest.mark.parametrize("resumed_at", [DENSE, CALIBRATION, FROZEN])
@pytest.mark.parametrize("stop", [DENSE, CALIBRATION, FROZEN])
@every_form
def test_c06_a_running_optimizer_goes_on_from_the_checkpoint_of_another_phase(
    build: Build, stop: int, resumed_at: int
) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    other_net = make_net(seed=1)
    other = build(other_net)
    train(other_net, other, resumed_at)
    other_net.load_state_dict(saved(net.state_dict()))
    other.load_state_dict(saved(optimizer.state_dict()))
    train(net, optimizer, STEPS - stop, start=stop)
    train(other_net, other, STEPS - stop, start=stop)
    assert_same_weights(net, other_net)
    assert other.finalize() == optimizer.finalize()


@forms_and_inners(FEW_OF_EACH_KIND)
def test_c06_round_trip_before_the_first_step_is_a_no_op(build: Build, factory: Factory) -> None:
    plain_net, net = make_net(), make_net()
    plain, optimizer = build(plain_net, factory), build(net, factory)
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    with torch.no_grad():  # loading weights after that must not leave a v of the old ones behind
        for n in (plain_net, net):
            for p in n.parameters():
                p.mul_(-0.7)
    train(plain_net, plain, STEPS)
    train(net, optimizer, STEPS)
    assert_same_weights(net, plain_net)


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            assert type(key) in (str, int)
            assert_plain(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            assert_plain(entry)
    else:
        assert value is None or type(value) in (int, float, bool, str, Tensor), type(value)


@pytest.mark.parametrize("stop", [DENSE, CALIBRATION, FROZEN])
@every_form
def test_c06_state_dict_holds_only_tensors_and_plain_values(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    state = optimizer.state_dict()
    assert_plain(state)
    for group in state["param_groups"]:
        assert group["admm_step"] == stop
        assert all(isinstance(value, (int, float)) for key, value in group.items() if key.startswith("admm"))


@every_form
def test_c06_loading_a_state_dict_of_the_inner_optimizer_alone_starts_admm_anew(build: Build) -> None:
    net = make_net()
    dense = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, dense, 5)
    optimizer = build(net)
    train(net, optimizer, FROZEN)
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.figures().step == 0
    assert not optimizer.frozen
    assert float(optimizer.state[net.head.weight]["step"]) == 5
    train(net, optimizer, STEPS)
    assert optimizer.finalize().ok


@every_form
def test_c06_unwrap_leaves_the_inner_optimizer_as_if_alone(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, FROZEN)
    inner = optimizer.unwrap()
    assert inner is optimizer.inner
    assert {key for entry in inner.state.values() for key in entry} == {"exp_avg", "exp_avg_sq", "step"}
    assert not [key for group in inner.param_groups for key in group if key.startswith("admm")]
    with pytest.raises(RuntimeError, match=r"taken off with unwrap\(\)"):
        optimizer.step()
    plain_net = make_net(seed=1)
    plain = torch.optim.AdamW(plain_net.parameters(), lr=1e-2)
    plain_net.load_state_dict(net.state_dict())
    plain.load_state_dict(saved(inner.state_dict()))
    train(net, inner, 2)
    train(plain_net, plain, 2)
    assert_same_weights(net, plain_net)


def test_c06_unwrap_inside_calibration_takes_the_hooks_off() -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, CALIBRATION)
    assert any(module._forward_hooks for module in net.modules())
    optimizer.unwrap()
    assert not any(module._forward_hooks for module in net.modules())


def test_c06_state_of_the_inner_optimizer_that_belongs_to_no_parameter_travels_along() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state["all"] = {"count": self.state.get("all", {"count": 0})["count"] + 1}
            return super().step(closure)

    nets = make_net(), make_net()
    first, second = (admm(net, lambda net: Counting(net.parameters(), lr=1e-2)) for net in nets)
    train(nets[0], first, 6)
    second.load_state_dict(saved(first.state_dict()))
    assert second.state["all"] == {"count": 6}


@pytest.mark.parametrize("stop", [CALIBRATION, FROZEN])
def test_c06_loading_does_not_change_or_share_what_was_passed(stop: int) -> None:
    net, other_net = make_net(), make_net()
    optimizer, other = admm(net), admm(other_net)
    train(net, optimizer, stop)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    other_net.load_state_dict(net.state_dict())
    mask = other.state[other_net.blocks[0].up.weight]["admm_mask"]
    assert mask.data_ptr() != state["state"][0]["admm_mask"].data_ptr()
    train(other_net, other, 1, start=stop)

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
        return same_bits(a, b) if isinstance(a, Tensor) else bool(a == b)

    # The inner optimizer may share its own tensors with what it loads.
    for entry, old in zip(state["state"].values(), before["state"].values(), strict=True):
        assert entry.keys() == old.keys()
        assert all(same_bits(entry[key], old[key]) for key in entry if key.startswith("admm"))
    assert state["param_groups"] == before["param_groups"]
    assert alike(state["admm"], before["admm"])


BROKEN_CHECKPOINTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "other pattern, dense": ({"pattern": "2:4"}, DENSE, "another selection, pattern, grouped dimension or w_step"),
    "other pattern, frozen": ({"pattern": "1:8"}, FROZEN, "pattern 1:8"),
    "another selection": ({"select": {r"blocks\.0\..*weight": "1:4"}}, DENSE, "2 parameters that are not selected"),
    "more selected": ({"select": {r".*\.weight": "1:4"}}, DENSE, "no admm_mask for weight 'head.weight'"),
    "other windows": ({"statistics_memory": TWO_WINDOWS}, CALIBRATION, r"with 1 windows, and here are 2"),
    "pruned from the start": ({"prune_at": 0}, DENSE, r"had not pruned yet, and prune_at=0"),
}


def assert_refused(optimizer: ADMMNxM, state: dict[str, Any], message: str) -> None:
    """Nothing may have been loaded."""
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    assert optimizer.figures().step == 0


@pytest.mark.parametrize(("options", "steps", "message"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS.keys())
def test_c06_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(
    options: dict[str, Any], steps: int, message: str
) -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, steps)
    assert_refused(admm(make_net(), **options), saved(optimizer.state_dict()), message)


@unsettled
@pytest.mark.parametrize("source", [admm, paper])
@pytest.mark.parametrize("stop", [DENSE, FROZEN])
def test_c06_checkpoint_of_the_other_w_step_is_refused(source: Build, stop: int) -> None:
    net = make_net()
    optimizer = source(net)
    train(net, optimizer, stop)
    target = paper if source is admm else admm
    message = "no admm_consensus|w_step" if source is admm else "another selection.*w_step"
    assert_refused(target(make_net()), saved(optimizer.state_dict()), message)


@every_form
def test_c06_more_selected_weights_are_noticed_without_inner_state(build: Build) -> None:
    sgd = TORCH_OPTIMIZERS["SGD-single"]
    net = make_net()
    optimizer = build(net, sgd)
    train(net, optimizer, DENSE)
    other = build(make_net(), sgd, select={r".*\.weight": "1:4"})
    assert_refused(other, optimizer.state_dict(), "another selection")


@every_form
def test_c06_state_of_another_shape_is_refused(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, DENSE)
    state = saved(optimizer.state_dict())
    state["state"][0]["admm_mask"] = state["state"][0]["admm_mask"][:1]
    assert_refused(build(make_net()), state, r"admm_mask for weight 'blocks\.0\.up\.weight' has shape \(1, 8\)")


def test_c06_statistics_of_another_shape_are_refused() -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, CALIBRATION)
    state = saved(optimizer.state_dict())
    moments = state["admm"]["statistics"]["blocks.0.up.weight"]
    moments["inputs"] = moments["inputs"][:4, :4]
    assert_refused(admm(make_net()), state, r"statistics of 'blocks\.0\.up\.weight'")


def test_c06_state_dict_hooks_fire_once_and_may_replace() -> None:
    net = make_net()
    optimizer = admm(net)
    fired: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: fired.append("save-pre") if o is optimizer else None)
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "note": fired.append("save-post") or 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: fired.append("load-pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: fired.append("load-post"))
    optimizer.inner.register_state_dict_pre_hook(lambda o: fired.append("inner"))
    state = optimizer.state_dict()
    assert state.pop("note") == 1
    optimizer.load_state_dict(state)
    assert fired == ["save-pre", "inner", "save-post", "load-pre", "load-post"]
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: {"param_groups": [], "state": {}})
    with pytest.raises(ValueError, match="no 'param_groups'"):
        optimizer.load_state_dict(state)
