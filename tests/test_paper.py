"""ADMMNxM.paper: the form of the paper by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from admm_nxm import ADMMNxM, Constant, Every, Ramp, Update
from admm_nxm.schedules import Plan
from tests.helpers import TORCH_OPTIMIZERS, Net, assert_same_weights, make_net, same_bits, train


def paper(net: Net, **options: Any) -> ADMMNxM:
    inner = TORCH_OPTIMIZERS["AdamW-single"](net)
    return ADMMNxM.paper(inner, net, **{"pattern": "1:4", "total_steps": 60, "residual_tolerance": 9.0, **options})


def test_plan_is_a_constant_penalty_with_the_dual_from_the_start_and_a_freeze_at_70_percent() -> None:
    optimizer = paper(make_net(), total_steps=300)
    assert optimizer.penalty == "gradient"
    assert optimizer.saliency is None
    assert optimizer.plan == Plan(Constant(0.01), Every(20), freeze_at=210)
    assert optimizer.plan.updates(20) is Update.AUXILIARY_AND_DUAL
    assert optimizer.total_steps == 300


@pytest.mark.parametrize(("total_steps", "interval"), [(1, 1), (14, 1), (15, 1), (29, 1), (30, 2), (3000, 200)])
def test_z_moves_every_fifteenth_of_the_run(total_steps: int, interval: int) -> None:
    assert paper(make_net(), total_steps=total_steps).plan.updates == Every(interval)


def test_what_the_user_sets_is_taken() -> None:
    rho, updates = Ramp(0.1, 1.0, start=0, stop=30), Every(7, start=3, dual_start=None)
    assert paper(make_net(), rho=rho, update_every=updates, freeze_at=60).plan == Plan(rho, updates, 60)
    assert paper(make_net(), rho=3, update_every=4).plan == Plan(Constant(3.0), Every(4), 42)
    other = paper(make_net(), pattern="2:4", state_dtype=torch.bfloat16, select={r".*up\.weight": "1:8"})
    assert [str(weight.pattern) for weight in other.selection] == ["1:8", "1:8"]
    assert other.state_dtype == torch.bfloat16


@pytest.mark.parametrize("update_every", [None, 5])
@pytest.mark.parametrize("inner", ["AdamW-single", "SGD-foreach-options"])
def test_run_is_the_one_built_by_hand_bit_for_bit(inner: str, update_every: int | None) -> None:
    factory = TORCH_OPTIMIZERS[inner]
    named, by_hand = make_net(), make_net()
    options: dict[str, Any] = {"pattern": "1:4", "total_steps": 60, "residual_tolerance": 9.0}
    one = ADMMNxM.paper(factory(named), named, rho=0.5, update_every=update_every, **options)
    interval = 4 if update_every is None else update_every
    two = ADMMNxM(factory(by_hand), by_hand, penalty="gradient", rho=0.5, update_every=Every(interval), **options)
    assert one.plan == two.plan
    train(named, one, 30)
    train(by_hand, two, 30)
    assert any(one.dual(name).any() for name in one.masks())
    for name in one.masks():
        states = (o.state[net.get_parameter(name)]["admm_consensus"] for o, net in ((one, named), (two, by_hand)))
        assert same_bits(*states)
    train(named, one, 30, start=30)
    train(by_hand, two, 30, start=30)
    assert one.phase == two.phase == "frozen"
    assert one.param_groups[0]["admm_frozen_at"] == 42
    assert_same_weights(named, by_hand)


def test_freeze_at_the_end_leaves_the_fine_tuning_out() -> None:
    net = make_net()
    optimizer = paper(net, freeze_at=60)
    train(net, optimizer, 59)
    assert optimizer.phase == "constrained"
    train(net, optimizer, 1, start=59)
    assert optimizer.phase == "frozen"


@pytest.mark.parametrize("option", [{"penalty": "lazy"}, {"penalty": "gradient"}, {"saliency": "magnitude"}])
def test_what_makes_it_the_papers_form_cannot_be_set(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"{next(iter(option))} cannot be set in the paper's form; call ADMMNxM"):
        paper(make_net(), **option)


def test_all_that_cannot_be_set_is_named() -> None:
    with pytest.raises(TypeError, match="penalty, saliency cannot be set"):
        paper(make_net(), saliency="curvature", penalty="lazy")


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"total_steps": "60"}, TypeError, "total_steps='60' must be an int"),
        ({"total_steps": 60.0}, TypeError, "total_steps=60.0 must be an int"),
        ({"total_steps": 0}, ValueError, "total_steps=0 must be at least 1"),
        ({"total_steps": True}, TypeError, "total_steps=True must be an int"),
        ({"update_every": 0}, ValueError, "update_every=0 must be at least 1"),
        ({"update_every": -3}, ValueError, "update_every=-3 must be at least 1"),
        ({"update_every": True}, TypeError, "update_every=True must be an int"),
        ({"update_every": 2.5}, TypeError, "update_every=2.5 must be an int or a schedule"),
        ({"rho": -1.0}, ValueError, "rho=-1.0 must be a finite number"),
        ({"rho": math.nan}, ValueError, "rho=nan must be a finite number"),
        ({"rho": lambda step: 1 / (1 + step)}, ValueError, "rho falls .* while the dual is in use"),
        ({"freeze_at": 61}, ValueError, "freeze_at=61 lies beyond total_steps=60"),
        ({"pattern": "4:2"}, ValueError, "'4:2'"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_bad_option_is_refused_as_elsewhere(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paper(make_net(), **option)


def test_length_of_the_run_must_be_given() -> None:
    net = make_net()
    with pytest.raises(TypeError, match="total_steps"):
        ADMMNxM.paper(torch.optim.AdamW(net.parameters()), net)  # type: ignore[call-arg]
