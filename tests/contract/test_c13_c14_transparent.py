"""Lines 13 and 14 of the contract: the dense phase is the inner optimizer itself, and no step waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from admm_nxm import ADMMNxM, Pattern, keep_mask, project
from tests.helpers import (
    A_FEW,
    ALL_OPTIMIZERS,
    STEPS,
    TORCH_OPTIMIZERS,
    TWO_WINDOWS,
    Build,
    Factory,
    admm,
    assert_same_weights,
    batches,
    forms_and_inners,
    loss_of,
    make_net,
    paper,
    same_bits,
    train,
    unsettled,
)

# ---------------------------------------------------------------- 13: bit for bit


def assert_same_state(plain: torch.optim.Optimizer, optimizer: ADMMNxM) -> None:
    for p, q in zip(plain.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        ours = {key: value for key, value in optimizer.state[q].items() if not key.startswith("admm")}
        theirs = plain.state[p]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert same_bits(ours[key], value) if torch.is_tensor(value) else ours[key] == value, key


@pytest.mark.parametrize("name", A_FEW)
def test_c13_dense_phase_and_calibration_are_the_inner_optimizer(name: str) -> None:
    factory = TORCH_OPTIMIZERS[name]
    plain_net, net = make_net(), make_net()
    plain, optimizer = factory(plain_net), admm(net, factory)
    train(plain_net, plain, 16)
    train(net, optimizer, 16)
    assert optimizer.phase == "calibration"
    assert_same_weights(net, plain_net)
    assert_same_state(plain, optimizer)


@pytest.mark.parametrize("factory", ALL_OPTIMIZERS.values(), ids=ALL_OPTIMIZERS)
def test_c13_a_pattern_that_keeps_all_is_the_inner_optimizer(factory: Factory) -> None:
    plain_net, net = make_net(), make_net()
    plain, optimizer = factory(plain_net), admm(net, factory, pattern=Pattern(4, 4))
    train(plain_net, plain, STEPS)
    train(net, optimizer, STEPS)
    assert optimizer.frozen
    assert optimizer.figures().model_error == 0
    assert_same_weights(net, plain_net)
    assert_same_state(plain, optimizer)
    assert optimizer.finalize().ok
    assert_same_weights(net, plain_net)


@unsettled
@pytest.mark.parametrize("name", A_FEW)
def test_c13_zero_rho_is_the_inner_optimizer_until_the_freeze(name: str) -> None:
    plain_net, net = make_net(), make_net()
    factory = TORCH_OPTIMIZERS[name]
    plain, optimizer = factory(plain_net), paper(net, factory, rho=0.0, update_every=2)
    train(plain_net, plain, 13)
    train(net, optimizer, 13)
    assert optimizer.phase == "admm"
    assert_same_weights(net, plain_net)
    assert_same_state(plain, optimizer)


@pytest.mark.parametrize("factory", ALL_OPTIMIZERS.values(), ids=ALL_OPTIMIZERS)
def test_c13_frozen_from_the_start_is_training_with_masks_put_by_hand(factory: Factory) -> None:
    check_masks_by_hand(factory, already_sparse=True)


@pytest.mark.parametrize("name", A_FEW)
def test_c13_frozen_from_the_start_prunes_by_magnitude_first(name: str) -> None:
    check_masks_by_hand(TORCH_OPTIMIZERS[name], already_sparse=False)


def check_masks_by_hand(factory: Factory, already_sparse: bool) -> None:
    """A model that has the pattern already keeps its zeros."""
    net, plain_net = make_net(), make_net()
    names = [weight.name for weight in admm(make_net()).selection]
    masks = {}
    with torch.no_grad():
        for name in names:
            w, v = net.get_parameter(name), plain_net.get_parameter(name)
            if already_sparse:
                # Not where magnitude would put them: to be kept, they must be read off.
                chosen = keep_mask(torch.randn_like(w), "1:4")
                w.mul_(chosen)
                v.mul_(chosen)
            masks[name] = keep_mask(v, "1:4")
            v.copy_(project(v, "1:4"))
    optimizer, plain = admm(net, factory, prune_at=0), factory(plain_net)
    assert optimizer.frozen
    assert_same_weights(net, plain_net)
    for x in batches(10):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(plain_net, x).backward()
        with torch.no_grad():
            for name, mask in masks.items():
                plain_net.get_parameter(name).grad.masked_fill_(~mask, 0)
            plain.step()
            for name, mask in masks.items():
                plain_net.get_parameter(name).masked_fill_(~mask, 0)
    assert_same_weights(net, plain_net)
    for name, mask in optimizer.masks().items():
        assert torch.equal(mask, masks[name])
    assert optimizer.finalize().ok


# ---------------------------------------------------------------- 14: no waiting for the device


class Reads(TorchDispatchMode):
    """Counts what brings a value from the device to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):  # these reach no dispatcher on a CPU
            original = getattr(Tensor, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                self.count += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(Tensor, name, counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.masked_select.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


def reads(net: nn.Module, optimizer: Any, monkeypatch: pytest.MonkeyPatch, steps: int = STEPS) -> list[int]:
    """Reads of each step, its forward and backward passes included."""
    counts = []
    for x in batches(steps):
        with monkeypatch.context() as patch, Reads(patch) as mode:
            optimizer.zero_grad()
            loss_of(net, x).backward()
            optimizer.step()
        counts.append(mode.count)
    return counts


@forms_and_inners({name: TORCH_OPTIMIZERS[name] for name in (*A_FEW, "ASGD-single", "Muon", "SGD-single")})
def test_c14_step_reads_no_more_from_the_device_than_the_inner_optimizer(
    build: Build, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_net, net = make_net(), make_net()
    expected = reads(plain_net, factory(plain_net), monkeypatch)
    found = reads(net, build(net, factory), monkeypatch)
    solve = 16 if build is admm else 13
    assert found[solve] > expected[solve]
    assert [*found[:solve], *found[solve + 1 :]] == [*expected[:solve], *expected[solve + 1 :]]


@pytest.mark.parametrize("options", [{"prune_at": 0}, {"statistics_memory": TWO_WINDOWS}])
def test_c14_in_other_lives_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    solves = {13, 16} if "statistics_memory" in options else set()
    found = reads(net, admm(net, TORCH_OPTIMIZERS["SGD-single"], **options), monkeypatch)
    assert {step for step, count in enumerate(found) if count} == solves


def test_c14_figures_and_their_kin_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, 18)
    with Reads(monkeypatch) as mode:
        optimizer.figures()
        repr(optimizer)
        optimizer.masks()
        assert mode.count == 0


def test_c14_the_counter_of_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = admm(make_net())
    with Reads(monkeypatch) as mode:
        optimizer.residuals()
        count = mode.count
        assert count > 0
        float(torch.ones(()))
        assert mode.count == count + 1
