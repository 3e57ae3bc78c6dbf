"""What the mask is ranked by: Curvature over every inner optimizer, rankings of the user's own, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Curvature, Pattern, keep_mask
from admm_nxm.factors import dense
from admm_nxm.reference import keep_list
from tests.helpers import (
    DEFAULT,
    PENALTIES,
    TORCH_OPTIMIZERS,
    admm,
    assert_same_weights,
    every,
    make_net,
    primal_of,
    same_bits,
    train,
    weights_of,
)

NAME = "blocks.0.up.weight"

# Where each optimizer of torch keeps a second moment of the weight's shape. The others (Adamax keeps a largest
# gradient, Adafactor factors its moment) have none.
SECOND_MOMENT = {
    "Adadelta": "square_avg",
    "Adagrad": "sum",
    "Adam": "exp_avg_sq",
    "AdamW": "exp_avg_sq",
    "NAdam": "exp_avg_sq",
    "RAdam": "exp_avg_sq",
    "RMSprop": "square_avg",
}
NONE = {"ASGD", "Adafactor", "Adamax", "Muon", "Rprop", "SGD"}


def primal_and_mask(optimizer: ADMMNxM, net: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    return primal_of(optimizer, net.get_parameter(name)), optimizer.masks()[name]


def test_every_optimizer_of_torch_is_accounted_for() -> None:
    assert {name.split("-")[0] for name in TORCH_OPTIMIZERS} <= SECOND_MOMENT.keys() | NONE


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_masks_follow_the_second_moment_where_the_inner_optimizer_has_one(name: str) -> None:
    key = SECOND_MOMENT.get(name.split("-")[0])
    net = make_net()
    optimizer = admm(net, TORCH_OPTIMIZERS[name], rho=0.5, update_every=every(1))
    assert optimizer.saliency == Curvature()
    apart = False
    for step in range(3):
        train(net, optimizer, 1, step)
        for weight in optimizer.selection:
            state = optimizer.state[net.get_parameter(weight.name)]
            factor = optimizer.saliency(state, torch.Size(weight.shape))
            w, mask = primal_and_mask(optimizer, net, weight.name)
            if key is None:
                assert factor is None
                scores = w
            else:
                h = state[key].clamp_min(1e-20)
                factor = factor.of(factor.base)
                assert same_bits(factor, h.sqrt().sqrt())  # roots, which every device rounds alike
                torch.testing.assert_close(factor, h.pow(0.25), rtol=1e-6, atol=0)
                scores = w * factor
            for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
                assert keep_list(row, Pattern(1, 4)) == kept
            apart = apart or not torch.equal(mask, keep_mask(w, "1:4"))
    assert apart == (key is not None)


@pytest.mark.parametrize("name", [name for name in TORCH_OPTIMIZERS if name.split("-")[0] in NONE])
def test_without_a_second_moment_the_run_is_the_one_by_magnitude(name: str) -> None:
    one, two = make_net(), make_net()
    for net, saliency in ((one, "curvature"), (two, "magnitude")):
        train(net, admm(net, TORCH_OPTIMIZERS[name], total_steps=20, saliency=saliency), 20)
    assert_same_weights(one, two)


def test_magnitude_is_the_absence_of_a_factor() -> None:
    assert admm(make_net(), saliency="magnitude").saliency is None
    net, same = make_net(), make_net()
    train(net, admm(net, total_steps=20, saliency="magnitude"), 20)
    train(same, admm(same, total_steps=20, saliency=lambda state, shape: None), 20)
    assert_same_weights(net, same)


@pytest.mark.parametrize("saliency", [None, "curvature", Curvature(), Curvature(0.25)])
def test_curvature_is_the_default_of_the_lazy_form(saliency: Any) -> None:
    assert admm(make_net(), saliency=saliency).saliency == Curvature(0.25)
    assert DEFAULT == "lazy"


@pytest.mark.parametrize("penalty", [name for name in PENALTIES if name != "lazy"])
def test_other_forms_know_magnitude_only(penalty: str) -> None:
    for saliency in (None, "magnitude"):
        assert admm(make_net(), penalty=penalty, saliency=saliency).saliency is None
    for saliency in ("curvature", Curvature(0.5), lambda state, shape: None):
        with pytest.raises(ValueError, match=r'needs penalty="lazy".*saliency="magnitude" or leave it out') as error:
            admm(make_net(), penalty=penalty, saliency=saliency)
        assert f'penalty="{penalty}"' in str(error.value)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("bad", ["fisher", "", 0.25, (), b"curvature"])
def test_what_is_no_saliency_is_refused_with_what_is_one(bad: Any, penalty: str) -> None:
    with pytest.raises(ValueError, match=r'must be "curvature", "magnitude", Curvature\(exponent\) or a callable'):
        admm(make_net(), penalty=penalty, saliency=bad)


# ---------------------------------------------------------------- Curvature as a value


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_exponent_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"exponent={bad!r} must be a finite number, at least 0"):
        Curvature(bad)


@pytest.mark.parametrize("bad", ["0.5", None, True, 1j])
def test_exponent_that_is_no_number_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"exponent=.* must be a finite number"):
        Curvature(bad)


def test_curvature_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(Curvature(0.5))) == Curvature(0.5) == copy.deepcopy(Curvature(0.5))
    assert hash(Curvature(0.5)) == hash(Curvature(0.5))
    assert Curvature(0.5) != Curvature()
    with pytest.raises(FrozenInstanceError):
        Curvature().exponent = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_ranking_survives_the_copy_of_the_optimizer(how: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, saliency=Curvature(0.5))
    train(net, optimizer, 6)
    pair = (net, optimizer)
    other_net, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.saliency == Curvature(0.5)
    train(net, optimizer, 14, start=6)
    train(other_net, other, 14, start=6)
    assert_same_weights(net, other_net)


def test_function_as_ranking_survives_a_deepcopy() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, saliency=lambda state, shape: torch.ones(shape))
    _, other = copy.deepcopy((net, optimizer))
    assert other.saliency is optimizer.saliency


def test_exponent_of_zero_is_magnitude() -> None:
    state = {"exp_avg_sq": torch.rand(4, 8)}
    assert Curvature(0.0)(state, torch.Size((4, 8))) is None
    one, two = make_net(), make_net()
    train(one, admm(one, total_steps=20, saliency=Curvature(0.0)), 20)
    train(two, admm(two, total_steps=20, saliency="magnitude"), 20)
    assert_same_weights(one, two)


def test_larger_exponent_trusts_the_second_moment_more() -> None:
    def masks(saliency: Any) -> Tensor:
        net = make_net()
        optimizer = admm(net, rho=0.5, update_every=every(1), saliency=saliency)
        train(net, optimizer, 3)
        return torch.cat([mask.flatten() for mask in optimizer.masks().values()])

    by_magnitude = masks("magnitude")
    apart = [int((masks(Curvature(exponent)) ^ by_magnitude).sum()) for exponent in (1e-6, 0.1, 0.25, 0.5)]
    assert apart[0] == 0
    assert apart == sorted(apart)
    assert apart[1] < apart[-1]


SHAPE = torch.Size((4, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_factor_is_the_power_in_float32_and_leaves_the_state_alone(exponent: float, dtype: torch.dtype) -> None:
    h = torch.rand(SHAPE).to(dtype)
    before = h.clone()
    factor = dense(Curvature(exponent)({"exp_avg_sq": h}, SHAPE))
    assert same_bits(h, before)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, before.float() ** exponent)


UNUSABLE: dict[str, Mapping[str, Any]] = {
    "no state": {},
    "first moment only": {"exp_avg": torch.ones(SHAPE), "momentum_buffer": torch.ones(SHAPE)},
    "factored": {"exp_avg_sq": torch.ones(4, 1)},
    "flattened": {"exp_avg_sq": torch.ones(32)},
    "8 bits": {"exp_avg_sq": torch.ones(SHAPE, dtype=torch.uint8)},
    "a number": {"sum": 3.0},
    "a count": {"sum": torch.tensor(3.0)},
}


@pytest.mark.parametrize("state", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_state_without_a_second_moment_of_the_weights_shape_gives_no_factor(state: Mapping[str, Any]) -> None:
    assert Curvature()(state, SHAPE) is None


def test_unusable_entry_does_not_hide_a_usable_one() -> None:
    state = {"exp_avg_sq": torch.ones(4, 1), "square_avg": torch.full(SHAPE, 16.0)}
    assert torch.equal(dense(Curvature(0.5)(state, SHAPE)), torch.full(SHAPE, 4.0))


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_second_moment_of_zero_does_not_tie_a_group(exponent: float) -> None:
    """A weight that never had a gradient but for some entries: those without are ranked by magnitude."""
    w = torch.randn(SHAPE)
    factor = dense(Curvature(exponent)({"exp_avg_sq": torch.zeros(SHAPE)}, SHAPE))
    assert (factor > 0).all()
    assert torch.equal(keep_mask(w * factor, "2:4"), keep_mask(w, "2:4"))
    h = torch.zeros(SHAPE)
    h[:, ::4] = 1.0
    kept = keep_mask(w * dense(Curvature(exponent)({"exp_avg_sq": h}, SHAPE)), "2:4")
    assert kept[:, ::4].all()
    alone = w.clone()
    alone[:, ::4] = 0.0
    assert torch.equal(kept[:, 1:4], keep_mask(alone, "1:4")[:, 1:4])


# ---------------------------------------------------------------- a ranking of the user's own


class Prefers:
    """Ranks one place of each group of four above the others, and notes what it was called with."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.calls: list[tuple[set[str], torch.Size]] = []

    def __call__(self, state: Mapping[str, Any], shape: torch.Size) -> Tensor:
        self.calls.append((set(state), shape))
        factor = torch.ones(shape)
        factor[:, self.place :: 4] = 1e6
        return factor


def test_own_ranking_decides_whenever_z_moves() -> None:
    net = make_net()
    prefers = Prefers(2)
    optimizer = admm(net, rho=0.5, update_every=every(2), saliency=prefers)
    train(net, optimizer, 1)
    assert not prefers.calls
    assert torch.equal(optimizer.masks()[NAME], keep_mask(make_net().get_parameter(NAME).detach(), "1:4"))
    train(net, optimizer, 1, start=1)
    assert len(prefers.calls) == len(optimizer.selection)
    for (keys, shape), weight in zip(prefers.calls, optimizer.selection, strict=True):
        assert {"exp_avg", "exp_avg_sq", "step"} <= keys
        assert shape == weight.shape
    for mask in optimizer.masks().values():
        assert mask[:, 2::4].all()
        assert int(mask.sum()) == mask.numel() // 4
    prefers.place = 1
    train(net, optimizer, 1, start=2)
    assert optimizer.masks()[NAME][:, 2::4].all()  # z has not moved
    train(net, optimizer, 1, start=3)
    assert optimizer.masks()[NAME][:, 1::4].all()


def test_own_ranking_is_not_asked_once_the_mask_is_frozen() -> None:
    net = make_net()
    prefers = Prefers(3)
    optimizer = admm(net, total_steps=20, saliency=prefers)
    train(net, optimizer, 20)
    calls = len(prefers.calls)
    assert optimizer.finalize().ok
    train(net, optimizer, 3, start=20)
    assert len(prefers.calls) == calls
    assert all(mask[:, 3::4].all() for mask in optimizer.masks().values())


def test_own_ranking_decides_about_one_shot_pruning_too() -> None:
    net = make_net()
    optimizer = admm(net, rho=0.0, saliency=Prefers(1), residual_tolerance=9.0)
    train(net, optimizer, 3)
    before = weights_of(net)
    with optimizer.projected():
        assert torch.equal(net.get_parameter(NAME)[:, 1::4], before[NAME][:, 1::4])
    assert optimizer.finalize().ok
    assert torch.equal(net.get_parameter(NAME)[:, 1::4], before[NAME][:, 1::4])


def test_error_in_a_ranking_of_ones_own_reaches_the_caller() -> None:
    def broken(state: Mapping[str, Any], shape: torch.Size) -> Tensor:
        return state["no such key"]

    net = make_net()
    with pytest.raises(KeyError, match="no such key"):
        train(net, admm(net, rho=0.5, update_every=every(1), saliency=broken), 1)


def test_exponent_beyond_one_is_refused() -> None:
    assert Curvature(1.0).exponent == 1.0
    with pytest.raises(ValueError, match=r"exponent=1.5 must be at most 1; 0.5 is the diagonal Fisher estimate"):
        Curvature(1.5)
