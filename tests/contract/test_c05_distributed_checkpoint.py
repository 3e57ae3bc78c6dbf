"""Line 5 of the contract: torch.distributed.checkpoint, in one process.

It calls ``step()`` with zero gradients and zero learning rates to learn the keys, then loads by keyword.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from admm_nxm import ADMMNxM, Ramp
from admm_nxm.masks import packed_shape
from tests.helpers import (
    FULL,
    TORCH_OPTIMIZERS,
    Factory,
    admm,
    assert_same_weights,
    batches,
    every,
    every_form,
    forms_and_inners,
    is_lean,
    loss_of,
    make_net,
    primal_of,
    restless,
    train,
    weights_of,
)

pytestmark = [
    restless,
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is .*unavailable or uninitialized:UserWarning",
        "ignore:TypedStorage is deprecated:UserWarning",
        "ignore::FutureWarning:torch.distributed",
    ),
]

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def fresh(factory: Factory, seed: int = 0, **options: Any) -> tuple[nn.Module, ADMMNxM]:
    net = make_net(seed)
    return net, admm(net, factory, **{"total_steps": 20, "residual_tolerance": 99.0, **options})


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c05_fake_step_creates_the_keys_and_nothing_else(penalty: str, factory: Factory) -> None:
    net, optimizer = fresh(factory, penalty=penalty)
    before = weights_of(net)
    state = get_optimizer_state_dict(net, optimizer)
    assert_same_weights(net, before)
    for weight in optimizer.selection:
        shape = packed_shape(weight.shape) if is_lean(penalty) else weight.shape
        assert state["state"][weight.name]["admm_consensus"].shape == shape
    assert optimizer.param_groups[0]["admm_step"] == 0
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert not optimizer.frozen
    train(net, optimizer, 1)
    assert optimizer.param_groups[0]["admm_step"] == 1


@every_form
def test_c05_state_made_by_the_fake_step_follows_weights_loaded_after_it(penalty: str) -> None:
    net, optimizer = fresh(TORCH_OPTIMIZERS["SGD-single"], penalty=penalty)
    get_optimizer_state_dict(net, optimizer)
    other_net, other = fresh(TORCH_OPTIMIZERS["SGD-single"], seed=3, penalty=penalty)
    net.load_state_dict(other_net.state_dict())
    train(net, optimizer, 20)
    train(other_net, other, 20)
    assert_same_weights(net, other_net)


@pytest.mark.parametrize("rho", [7.0, Ramp(0.5, 100.0, start=3, stop=9)], ids=["from the start", "later"])
@pytest.mark.parametrize("inner", ["SGD-single", "Adagrad-single"])  # Adagrad has state before its first step
@every_form
def test_c05_weight_without_a_gradient_after_the_fake_step_keeps_its_value(
    penalty: str, inner: str, rho: float | Ramp
) -> None:
    net, optimizer = fresh(TORCH_OPTIMIZERS[inner], penalty=penalty, rho=rho, freeze_at=20, update_every=every(2))
    optimizer.state_dict() if inner == "Adagrad-single" else get_optimizer_state_dict(net, optimizer)
    still = net.blocks[0].up.weight
    assert "admm_consensus" in optimizer.state[still]
    start = still.detach().clone()
    for x in batches(9):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        still.grad = None
        optimizer.step()
    torch.testing.assert_close(primal_of(optimizer, still), start, rtol=1e-6, atol=0)
    resumed_net, resumed = fresh(TORCH_OPTIMIZERS[inner], penalty=penalty, rho=rho, freeze_at=20, update_every=every(2))
    resumed_net.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 5, start=9)
    train(resumed_net, resumed, 5, start=9)
    assert_same_weights(net, resumed_net)
    assert not torch.equal(primal_of(optimizer, still), start)
    assert primal_of(optimizer, still).norm() < 2 * start.norm()


@pytest.mark.parametrize("lr_zero_step", [0, 3])
def test_c05_ordinary_step_with_zero_learning_rate_counts(lr_zero_step: int) -> None:
    """A warm-up often begins at 0: its gradients tell it from the fake step."""
    net, optimizer = fresh(TORCH_OPTIMIZERS["SGD-single"])
    train(net, optimizer, lr_zero_step)
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, 1, start=lr_zero_step)
    assert optimizer.param_groups[0]["admm_step"] == lr_zero_step + 1


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("stop", [6, 19], ids=["constrained", "frozen"])
@forms_and_inners(TORCH_OPTIMIZERS)
def test_c05_saved_and_loaded_equals_uninterrupted(
    penalty: str, factory: Factory, stop: int, flat: bool, tmp_path: Path
) -> None:
    options = FLAT if flat else StateDictOptions()
    first_net, first = fresh(factory, penalty=penalty)
    train(first_net, first, stop)
    if flat and not all(
        isinstance(value, (int, float, torch.Tensor))
        for e in first.inner.state_dict()["state"].values()
        for value in e.values()
    ):
        pytest.skip(f"{type(first.inner).__name__} keeps state that torch cannot flatten")

    def states(net: nn.Module, optimizer: ADMMNxM) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(net),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
        }

    path = os.fspath(tmp_path / "checkpoint")
    dcp.save(states(first_net, first), checkpoint_id=path)
    second_net, second = fresh(factory, seed=1, penalty=penalty)
    loaded = states(second_net, second)
    dcp.load(loaded, checkpoint_id=path)
    set_model_state_dict(second_net, loaded["model"])
    set_optimizer_state_dict(second_net, second, loaded["optimizer"], options=options)
    assert second.frozen == (stop == 19)
    train(first_net, first, 20 - stop, start=stop)
    train(second_net, second, 20 - stop, start=stop)
    assert_same_weights(first_net, second_net)
    first.finalize()
    second.finalize()
    assert_same_weights(first_net, second_net)


def loaded_in_place(net: nn.Module, optimizer: ADMMNxM, path: Path) -> dict[str, Any]:
    state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=os.fspath(path))
    return state


@every_form
def test_c05_checkpoint_of_a_constrained_run_fits_a_frozen_optimizer_where_both_store_masks(
    penalty: str, tmp_path: Path
) -> None:
    factory = TORCH_OPTIMIZERS["AdamW-single"]
    early_net, early = fresh(factory, penalty=penalty)
    train(early_net, early, 6)
    late_net, late = fresh(factory, penalty=penalty)
    train(late_net, late, 19)
    path = tmp_path / "checkpoint"
    dcp.save(
        {"model": get_model_state_dict(early_net), "optimizer": get_optimizer_state_dict(early_net, early)},
        checkpoint_id=os.fspath(path),
    )
    loaded = loaded_in_place(late_net, late, path)
    if not is_lean(penalty):
        with pytest.raises(ValueError, match="build a new ADMMNxM"):
            set_optimizer_state_dict(late_net, late, loaded["optimizer"])
        return
    set_model_state_dict(late_net, loaded["model"])
    set_optimizer_state_dict(late_net, late, loaded["optimizer"])
    assert not late.frozen
    train(early_net, early, 14, start=6)
    train(late_net, late, 14, start=6)
    assert_same_weights(early_net, late_net)


@every_form
def test_c05_checkpoint_of_a_frozen_run_is_loaded_into_one_that_is_not(penalty: str, tmp_path: Path) -> None:
    factory = TORCH_OPTIMIZERS["AdamW-single"]
    late_net, late = fresh(factory, penalty=penalty)
    train(late_net, late, 19)
    early_net, early = fresh(factory, seed=1, penalty=penalty)
    train(early_net, early, 6)
    path = tmp_path / "checkpoint"
    dcp.save(
        {"model": get_model_state_dict(late_net), "optimizer": get_optimizer_state_dict(late_net, late)},
        checkpoint_id=os.fspath(path),
    )
    loaded = loaded_in_place(early_net, early, path)
    set_model_state_dict(early_net, loaded["model"])
    set_optimizer_state_dict(early_net, early, loaded["optimizer"])
    assert early.frozen
    for name, mask in late.masks().items():
        assert torch.equal(early.masks()[name], mask)
    train(early_net, early, 4, start=19)
    train(late_net, late, 4, start=19)
    assert_same_weights(early_net, late_net)


@pytest.mark.parametrize("stop", [6, 19])
def test_c05_full_state_does_not_fit_into_a_mask_nor_a_mask_into_a_full_state(stop: int, tmp_path: Path) -> None:
    """The loader itself finds that the shapes differ."""
    factory = TORCH_OPTIMIZERS["SGD-single"]
    for source, target in (("lazy", FULL), (FULL, "lazy")):
        net, optimizer = fresh(factory, penalty=source)
        train(net, optimizer, stop)
        path = tmp_path / f"checkpoint of {source}"
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.save(state, checkpoint_id=os.fspath(path))
        other_net, other = fresh(factory, penalty=target)
        with pytest.raises(
            dcp.api.CheckpointException, match=r"Size mismatch.*admm_consensus|admm_consensus.*mismatch"
        ):
            loaded_in_place(other_net, other, path)
