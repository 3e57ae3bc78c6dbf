"""Line 5 of the contract: torch.distributed.checkpoint, in one process.

It calls ``step()`` with zero gradients and zero learning rates to learn the keys, then loads by keyword.
"""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext as nothing
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

from admm_nxm import ADMMNxM
from tests.helpers import (
    CALIBRATION,
    DENSE,
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
    train,
    unsettled,
    weights_of,
)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is .*unavailable or uninitialized:UserWarning",
        "ignore:TypedStorage is deprecated:UserWarning",
        "ignore::FutureWarning:torch.distributed",
    ),
]

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
ANNOUNCED = r"does not carry the statistics.*torch\.distributed\.checkpoint.*begins again"


def fresh(build: Build, factory: Factory, seed: int = 0, **options: Any) -> tuple[nn.Module, ADMMNxM]:
    net = make_net(seed)
    return net, build(net, factory, **options)


def states(net: nn.Module, optimizer: ADMMNxM, options: StateDictOptions | None = None) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=options or StateDictOptions()),
    }


def save(path: Path, net: nn.Module, optimizer: ADMMNxM, options: StateDictOptions | None = None) -> None:
    dcp.save(states(net, optimizer, options), checkpoint_id=os.fspath(path))


def load(path: Path, net: nn.Module, optimizer: ADMMNxM, options: StateDictOptions | None = None) -> None:
    """Load in place, as it is done where parameters are sharded."""
    options = options or StateDictOptions()
    loaded = states(net, optimizer, options)
    dcp.load(loaded, checkpoint_id=os.fspath(path))
    set_model_state_dict(net, loaded["model"])
    set_optimizer_state_dict(net, optimizer, loaded["optimizer"], options=options)


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c05_fake_step_creates_the_keys_and_nothing_else(build: Build, factory: Factory) -> None:
    net, optimizer = fresh(build, factory)
    before = weights_of(net)
    state = get_optimizer_state_dict(net, optimizer)
    assert_same_weights(net, before)
    for weight in optimizer.selection:
        entry = state["state"][weight.name]
        assert entry["admm_mask"].dtype == torch.bool
        assert entry["admm_mask"].all()
        for key in ["admm_mask"] if build is admm else ["admm_mask", "admm_consensus"]:
            assert entry[key].shape == weight.shape
    assert optimizer.figures().step == 0
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert not optimizer.frozen
    train(net, optimizer, 1)
    assert optimizer.figures().step == 1


@every_form
def test_c05_fake_step_of_a_run_that_begins_frozen_has_the_masks(build: Build) -> None:
    net, optimizer = fresh(build, TORCH_OPTIMIZERS["SGD-single"], prune_at=0)
    before = weights_of(net)
    state = get_optimizer_state_dict(net, optimizer)
    assert_same_weights(net, before)
    for weight in optimizer.selection:
        assert torch.equal(state["state"][weight.name]["admm_mask"], net.get_parameter(weight.name) != 0)
    assert optimizer.figures().step == 0


def test_c05_fake_step_is_no_calibration_step() -> None:
    net, optimizer = fresh(admm, TORCH_OPTIMIZERS["SGD-single"], prune_at=3)
    assert optimizer.phase == "calibration"
    get_optimizer_state_dict(net, optimizer)
    train(net, optimizer, 2)
    assert optimizer.phase == "calibration"
    train(net, optimizer, 1, start=2)
    assert optimizer.frozen


@pytest.mark.parametrize("options", [{}, {"prune_at": 0}])
@every_form
def test_c05_state_made_by_the_fake_step_follows_weights_loaded_after_it(build: Build, options: dict[str, Any]) -> None:
    """Loaded weights bring their own zeros along, as with prune_at=0 they have them."""
    net, optimizer = fresh(build, TORCH_OPTIMIZERS["SGD-single"], **options)
    other_net, other = fresh(build, TORCH_OPTIMIZERS["SGD-single"], seed=3, **options)
    get_optimizer_state_dict(net, optimizer)
    net.load_state_dict(other_net.state_dict())
    train(net, optimizer, STEPS)
    train(other_net, other, STEPS)
    assert_same_weights(net, other_net)


@pytest.mark.parametrize("inner", ["SGD-single", "Adagrad-single"])  # Adagrad has state before its first step
@every_form
def test_c05_weight_without_a_gradient_after_the_fake_step_keeps_its_value(build: Build, inner: str) -> None:
    options = {"prune_at": 19, **({"update_every": 2} if build is paper else {})}
    net, optimizer = fresh(build, TORCH_OPTIMIZERS[inner], **options)
    optimizer.state_dict() if inner == "Adagrad-single" else get_optimizer_state_dict(net, optimizer)
    still = net.blocks[0].up.weight
    assert "admm_mask" in optimizer.state[still]
    start = still.detach().clone()
    for x in batches(9):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        still.grad = None
        optimizer.step()
    assert torch.equal(still, start)
    resumed_net, resumed = fresh(build, TORCH_OPTIMIZERS[inner], **options)
    resumed_net.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, 5, start=9)
    train(resumed_net, resumed, 5, start=9)
    assert_same_weights(net, resumed_net)
    assert not torch.equal(still, start)
    assert still.norm() < 2 * start.norm()


@pytest.mark.parametrize("lr_zero_step", [0, 3])
def test_c05_ordinary_step_with_zero_learning_rate_counts(lr_zero_step: int) -> None:
    """A warm-up often begins at 0: its gradients tell it from the fake step."""
    net, optimizer = fresh(admm, TORCH_OPTIMIZERS["SGD-single"])
    train(net, optimizer, lr_zero_step)
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, 1, start=lr_zero_step)
    assert optimizer.figures().step == lr_zero_step + 1


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c05_saved_and_loaded_equals_uninterrupted(build: Build, factory: Factory, tmp_path: Path) -> None:
    check_resume(build, factory, StateDictOptions(), tmp_path)


@pytest.mark.parametrize("name", ["AdamW-single", "SGD-foreach-options", "SGD-single", "Adagrad-single"])
@every_form
def test_c05_saved_and_loaded_flat_equals_uninterrupted(build: Build, name: str, tmp_path: Path) -> None:
    check_resume(build, TORCH_OPTIMIZERS[name], FLAT, tmp_path)


def check_resume(build: Build, factory: Factory, options: StateDictOptions, path: Path) -> None:
    net, optimizer = fresh(build, factory)
    masks = {}
    for start, stop in ((0, DENSE), (DENSE, FROZEN), (FROZEN, STEPS)):
        train(net, optimizer, stop - start, start=start)
        save(path / str(stop), net, optimizer, options)
        masks[stop] = optimizer.masks()
    report = optimizer.finalize()
    for stop in (DENSE, FROZEN):
        again_net, again = fresh(build, factory, seed=1)
        load(path / str(stop), again_net, again, options)
        assert again.frozen == (stop == FROZEN)
        for name, mask in masks[stop].items():
            assert torch.equal(again.masks()[name], mask)
        train(again_net, again, STEPS - stop, start=stop)
        assert_same_weights(again_net, net)
        assert again.finalize() == report
        assert_same_weights(again_net, net)


@pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["nested", "flat"])
def test_c05_inside_calibration_the_window_begins_again_and_says_so(options: StateDictOptions, tmp_path: Path) -> None:
    net, optimizer = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"])
    train(net, optimizer, CALIBRATION)
    assert optimizer.phase == "calibration"
    save(tmp_path, net, optimizer, options)
    again_net, again = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"], seed=1)
    with pytest.warns(UserWarning, match=ANNOUNCED):
        load(tmp_path, again_net, again, options)
    assert again.phase == "calibration"
    assert again.figures().step == CALIBRATION
    train(again_net, again, 2, start=CALIBRATION)
    assert not again.frozen
    train(again_net, again, 1, start=CALIBRATION + 2)  # three steps of calibration from there
    assert again.frozen
    train(again_net, again, 3, start=CALIBRATION + 3)
    assert again.finalize().ok


def test_c05_between_two_windows_the_first_keeps_its_masks(tmp_path: Path) -> None:
    net, optimizer = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"], statistics_memory=TWO_WINDOWS)
    train(net, optimizer, 14)  # the first window is solved, and the second has not begun to gather
    assert optimizer.figures().windows_solved == 1
    save(tmp_path, net, optimizer)
    again_net, again = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"], seed=1, statistics_memory=TWO_WINDOWS)
    load(tmp_path, again_net, again)
    train(net, optimizer, 6, start=14)
    train(again_net, again, 6, start=14)
    assert_same_weights(net, again_net)
    assert again.frozen


def test_c05_with_the_statistics_memory_of_another_run_nothing_is_loaded(tmp_path: Path) -> None:
    net, optimizer = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"], statistics_memory=TWO_WINDOWS)
    train(net, optimizer, 14)
    save(tmp_path, net, optimizer)
    again_net, again = fresh(admm, TORCH_OPTIMIZERS["AdamW-single"], seed=1)
    with pytest.raises(ValueError, match=r"with 2 windows, and here are 1; .*statistics_memory"):
        load(tmp_path, again_net, again)
    assert again.figures().step == 0


@every_form
def test_c05_an_early_checkpoint_fits_a_frozen_optimizer(build: Build, tmp_path: Path) -> None:
    factory = TORCH_OPTIMIZERS["AdamW-single"]
    early_net, early = fresh(build, factory)
    train(early_net, early, DENSE)
    save(tmp_path, early_net, early)
    late_net, late = fresh(build, factory, seed=1)
    train(late_net, late, FROZEN)
    load(tmp_path, late_net, late)
    assert not late.frozen
    train(early_net, early, STEPS - DENSE, start=DENSE)
    train(late_net, late, STEPS - DENSE, start=DENSE)
    assert late.frozen
    assert_same_weights(early_net, late_net)


@every_form
def test_c05_a_late_checkpoint_fits_an_early_optimizer(build: Build, tmp_path: Path) -> None:
    factory = TORCH_OPTIMIZERS["AdamW-single"]
    late_net, late = fresh(build, factory)
    train(late_net, late, FROZEN)
    save(tmp_path, late_net, late)
    early_net, early = fresh(build, factory, seed=1)
    train(early_net, early, DENSE if build is paper else CALIBRATION)
    load(tmp_path, early_net, early)
    assert early.frozen
    for name, mask in late.masks().items():
        assert torch.equal(early.masks()[name], mask)
    train(early_net, early, 4, start=FROZEN)
    train(late_net, late, 4, start=FROZEN)
    assert_same_weights(early_net, late_net)


@unsettled
def test_c05_a_checkpoint_of_the_other_w_step_is_refused(tmp_path: Path) -> None:
    factory = TORCH_OPTIMIZERS["AdamW-single"]
    net, optimizer = fresh(paper, factory)
    train(net, optimizer, DENSE)
    save(tmp_path, net, optimizer)
    other_net, other = fresh(admm, factory)
    with pytest.raises(ValueError, match=r"another selection.*w_step"):
        load(tmp_path, other_net, other)


def hold(net: nn.Module) -> None:
    for p in net.blocks[0].down.parameters():
        p.requires_grad_(False)


@pytest.mark.parametrize("stop", [DENSE, FROZEN])
@every_form
def test_c05_layers_that_were_frozen_on_the_way_are_exact_or_refused(build: Build, stop: int, tmp_path: Path) -> None:
    """torch.distributed.checkpoint loads the state of trainable parameters alone, and v is a state."""

    def fresh_half(seed: int) -> tuple[nn.Module, ADMMNxM]:
        return fresh(build, TORCH_OPTIMIZERS["AdamW-single"], seed=seed)

    net, optimizer = fresh_half(0)
    train(net, optimizer, 3)
    hold(net)
    train(net, optimizer, stop - 3, start=3)
    save(tmp_path, net, optimizer)
    train(net, optimizer, STEPS - stop, start=stop)
    held_net, held = fresh_half(1)
    hold(held_net)
    refused = build is paper and stop == DENSE
    message = r"'blocks\.0\.down\.weight'.*Load first, and freeze it then"
    with pytest.raises(ValueError, match=message) if refused else nothing():
        load(tmp_path, held_net, held)
    late_net, late = fresh_half(1)
    load(tmp_path, late_net, late)
    hold(late_net)
    for again_net, again in [(late_net, late)] + ([] if refused else [(held_net, held)]):
        train(again_net, again, STEPS - stop, start=stop)
        assert_same_weights(again_net, net)
