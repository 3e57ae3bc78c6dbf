"""Line 15 of the contract: a weight is known by its name, and what happens to the model is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, ConvergenceWarning, verify
from tests.helpers import (
    CALIBRATION,
    DENSE,
    FROZEN,
    STEPS,
    Build,
    Net,
    admm,
    assert_same_weights,
    batches,
    every_form,
    loss_of,
    make_net,
    paper,
    saved,
    train,
    weights_of,
)

at_any_time = pytest.mark.parametrize("stop", [0, DENSE, CALIBRATION, FROZEN])


def layer_by_layer(net: nn.Module) -> Optimizer:
    """A group for each block, as layer-wise learning rates make them."""
    parts = [*net.blocks, net.head]
    return torch.optim.AdamW([{"params": list(part.parameters())} for part in parts], lr=1e-2)


def next_step(net: nn.Module, optimizer: ADMMNxM) -> None:
    optimizer.zero_grad()
    loss_of(net, next(batches(1, 40))).backward()
    optimizer.step()


def refused(net: nn.Module, optimizer: ADMMNxM, message: str) -> None:
    """By the next step, which changes nothing, by finalize, and by what would be saved."""
    before, figures = weights_of(net), optimizer.figures()
    for call in (lambda: next_step(net, optimizer), optimizer.finalize, optimizer.state_dict, optimizer.masks):
        with pytest.raises(ValueError, match=message):
            call()
    assert_same_weights(net, before)
    assert optimizer.figures() == figures


GONE = r"no longer holds prunable weight 'blocks\.0\.up\.weight'"


@at_any_time
@every_form
def test_c15_a_group_removed_in_mid_run_is_noticed(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net, layer_by_layer)
    train(net, optimizer, stop)
    del optimizer.param_groups[0]
    refused(net, optimizer, rf"{GONE}.*taken out of param_groups")


@at_any_time
@every_form
def test_c15_a_parameter_filtered_out_of_a_group_is_noticed(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not net.blocks[0].up.weight]
    refused(net, optimizer, rf"{GONE}.*taken out of param_groups")


@at_any_time
@every_form
def test_c15_groups_that_change_their_order_keep_their_masks(build: Build, stop: int) -> None:
    net, plain_net = make_net(), make_net()
    optimizer, plain = build(net, layer_by_layer), build(plain_net, layer_by_layer)
    train(net, optimizer, stop)
    train(plain_net, plain, stop)
    optimizer.param_groups.reverse()
    train(net, optimizer, STEPS - stop, start=stop)
    train(plain_net, plain, STEPS - stop, start=stop)
    assert_same_weights(net, plain_net)
    assert optimizer.finalize() == plain.finalize()


@at_any_time
@every_form
def test_c15_a_dense_parameter_may_go(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net, layer_by_layer)
    train(net, optimizer, stop)
    del optimizer.param_groups[2]  # the head
    before = net.head.weight.detach().clone()
    train(net, optimizer, STEPS - stop, start=stop)
    assert torch.equal(net.head.weight, before)
    assert optimizer.finalize().ok
    assert verify(net, "1:4").ok


@at_any_time
@every_form
def test_c15_weights_loaded_by_assignment_are_noticed(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    net.load_state_dict({name: p.clone() for name, p in net.state_dict().items()}, assign=True)
    refused(net, optimizer, rf"{GONE}.*assign=True")


@at_any_time
@every_form
def test_c15_a_replaced_layer_is_noticed(build: Build, stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, stop)
    net.blocks[0].up = nn.Linear(8, 16)
    refused(net, optimizer, GONE)
    net.blocks[0].up = nn.Identity()
    with pytest.raises(ValueError, match=r"'blocks\.0\.up\.weight' is no longer in the model.*Build ADMMNxM again"):
        optimizer.finalize()


def test_c15_a_layer_that_is_wrapped_since_then_is_gone_by_its_name() -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, DENSE)
    net.blocks[0].up = nn.Sequential(net.blocks[0].up)
    with pytest.raises(ValueError, match=r"'blocks\.0\.up\.weight' is no longer in the model"):
        next_step(net, optimizer)


def test_c15_ties_that_come_apart_are_noticed() -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    optimizer = admm(net)
    assert len(optimizer.selection) == 3
    train(net, optimizer, DENSE)
    net.blocks[1].up.weight = nn.Parameter(net.blocks[0].up.weight.detach().clone())
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight = blocks\.1\.up\.weight were one tensor"):
        next_step(net, optimizer)


@every_form
def test_c15_finalize_counts_what_the_model_holds(build: Build) -> None:
    """Not what the masks say: somebody may have written into the weights."""
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, STEPS)
    report = optimizer.finalize()
    masks = optimizer.masks()
    with torch.no_grad():
        net.blocks[1].down.weight.copy_(torch.ones(8, 16))
    assert not verify(net, "1:4").ok
    with pytest.warns(ConvergenceWarning, match="given other weights after the solve"):
        assert optimizer.finalize() == report
    assert verify(net, "1:4").ok
    assert not torch.equal(optimizer.masks()["blocks.1.down.weight"], masks["blocks.1.down.weight"])
    with torch.no_grad():
        net.blocks[0].up.weight.zero_()
    assert {w.name: w.zeros for w in optimizer.finalize().weights}["blocks.0.up.weight"] == 128


# ---------------------------------------------------------------- checkpoints in another order


def in_reverse(net: nn.Module) -> Optimizer:
    return torch.optim.AdamW(reversed(list(net.parameters())), lr=1e-2)


def second_block_first(net: nn.Module) -> Optimizer:
    """All shapes at each position are what they were."""
    return torch.optim.AdamW(
        [*net.blocks[1].parameters(), *net.blocks[0].parameters(), *net.head.parameters()], lr=1e-2
    )


@pytest.mark.parametrize("stop", [DENSE, CALIBRATION, FROZEN])
@pytest.mark.parametrize("order", [in_reverse, second_block_first])
@every_form
def test_c15_a_checkpoint_in_another_order_is_refused(
    build: Build, order: Callable[[nn.Module], Optimizer], stop: int
) -> None:
    net, other_net = make_net(), make_net()
    optimizer, other = build(net), build(other_net, order)
    train(net, optimizer, stop)
    with pytest.raises(ValueError, match=r"'blocks\.\d\..*' is parameter \d+ of the optimizer, and was parameter \d+"):
        other.load_state_dict(saved(optimizer.state_dict()))
    assert not other.state
    assert other.figures().step == 0


@pytest.mark.parametrize("build_kind", [admm, paper], ids=["exact", "paper"])
def test_c15_a_model_whose_modules_are_defined_in_another_order_is_refused(build_kind: Build) -> None:
    class Turned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({"1": self.blocks[1], "0": self.blocks[0]})

        def forward(self, x: Any) -> Any:
            for name in ("0", "1"):
                x = self.blocks[name](x)
            return self.head(x)

    net, other_net = make_net(), Turned()
    optimizer = build_kind(net)
    other = build_kind(other_net, select={r"blocks\..*\.weight": "1:4"})
    train(net, optimizer, DENSE)
    with pytest.raises(ValueError, match="in another order"):
        other.load_state_dict(saved(optimizer.state_dict()))


# ---------------------------------------------------------------- names that wrappers change


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def data_parallel(net: nn.Module) -> nn.Module:
    return nn.DataParallel(net)


WRAPPERS = {"compiled": compiled, "DataParallel": data_parallel}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@every_form
def test_c15_wrappers_leave_the_names_alone(build: Build, wrap: Callable[[nn.Module], nn.Module], before: bool) -> None:
    """A wrapper around the model, before ADMMNxM is built or after; the checkpoint fits the bare model."""
    plain_net, net = make_net(), make_net()
    plain = build(plain_net)
    trained = wrap(net) if before else net
    optimizer = build(trained)
    if not before:
        trained = wrap(net)
    assert optimizer.selection == plain.selection
    train(trained, optimizer, CALIBRATION)
    train(plain_net, plain, CALIBRATION)
    assert_same_weights(net, plain_net)
    again_net = make_net(seed=1)
    again = build(again_net)
    again_net.load_state_dict(net.state_dict())
    again.load_state_dict(saved(optimizer.state_dict()))
    for n, o in ((again_net, again), (plain_net, plain), (trained, optimizer)):
        train(n, o, STEPS - CALIBRATION, start=CALIBRATION)
    assert_same_weights(net, plain_net)
    assert_same_weights(again_net, plain_net)
    assert plain.figures() == again.figures()


@every_form
def test_c15_ddp_of_one_process(build: Build, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain_net, net = make_net(), make_net()
        plain = build(plain_net)
        trained = DistributedDataParallel(net)
        optimizer = build(trained)
        assert optimizer.selection == plain.selection
        train(trained, optimizer, STEPS)
        train(plain_net, plain, STEPS)
        assert_same_weights(net, plain_net)
    finally:
        torch.distributed.destroy_process_group()
