"""Lines 1 to 4 of the contract: what the wrapper is, whose groups and state it shows, and when it adds to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from admm_nxm import ADMMNxM
from tests.helpers import (
    ALL_OPTIMIZERS,
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
    train,
)

# ---------------------------------------------------------------- 1: a torch optimizer by isinstance


@pytest.mark.parametrize("factory", ALL_OPTIMIZERS.values(), ids=ALL_OPTIMIZERS)
def test_c01_is_a_torch_optimizer(factory: Factory) -> None:
    assert isinstance(admm(make_net(), factory), Optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=25),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False),
}


# Older SequentialLR calls its parts in a way that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_c01_lr_schedulers_drive_it_as_they_drive_the_inner_optimizer(make: Any, on: str) -> None:
    """A scheduler that was built on the inner optimizer warns, and so fails here, if it does not see it step."""

    def rates(wrapped: bool) -> list[float]:
        net = make_net()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        optimizer: Optimizer = inner
        if on == "inner":
            scheduler = make(inner)
        if wrapped:
            optimizer = admm(net, lambda _: inner)
        if on == "wrapper":
            scheduler = make(optimizer)
        seen = []
        for step in range(STEPS):
            train(net, optimizer, 1, step)
            scheduler.step()
            seen.append(inner.param_groups[0]["lr"])
        if wrapped:
            assert optimizer.frozen
        return seen

    assert rates(True) == rates(False)


def test_c01_plateau_scheduler_accepts_it() -> None:
    optimizer = admm(make_net())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(2.5e-3)


# ---------------------------------------------------------------- 2: live views of the inner optimizer


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c02_groups_state_and_defaults_are_the_inner_optimizers_own(build: Build, factory: Factory) -> None:
    net = make_net()
    optimizer = build(net, factory)
    inner = optimizer.inner

    def check() -> None:
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert optimizer.defaults is inner.defaults

    check()
    train(net, optimizer, 1)
    check()
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the inner optimizer's lists
    check()
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5


def test_c02_assignment_reaches_the_inner_optimizer() -> None:
    optimizer = admm(make_net())
    groups, state, defaults = list(optimizer.param_groups), optimizer.state.copy(), dict(optimizer.defaults)
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    assert optimizer.inner.param_groups is groups
    assert optimizer.inner.state is state
    assert optimizer.inner.defaults is defaults


def test_c02_attributes_that_it_lacks_are_the_inner_optimizers() -> None:
    class Moody(torch.optim.SGD):
        mood = "calm"

        def eval(self) -> None:
            self.mood = "quiet"

    optimizer = admm(make_net(), lambda net: Moody(net.parameters(), lr=1e-2))
    optimizer.eval()
    assert optimizer.mood == optimizer.inner.mood == "quiet"
    assert not hasattr(admm(make_net()), "eval")


@every_form
def test_c02_accelerate_prepare_keeps_the_lr_schedule_connected(build: Build) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = make_net()
    optimizer = build(net)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_net, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for step, x in enumerate(batches(STEPS)):
        accelerator.backward(loss_of(prepared_net, x))
        accelerator.clip_grad_norm_(prepared_net.parameters(), 1.0)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - (step + 1) / STEPS))
    assert optimizer.figures().step == STEPS
    assert optimizer.finalize().ok


# ---------------------------------------------------------------- 3: nothing in the state before the inner step


@forms_and_inners(ALL_OPTIMIZERS)
def test_c03_inner_optimizer_finds_its_state_as_it_left_it(build: Build, factory: Factory) -> None:
    net = make_net()
    optimizer = build(net, factory)
    state_before_step: list[set[str]] = []
    unwrapped = getattr(type(optimizer.inner).step, "__wrapped__", type(optimizer.inner).step)

    def spy(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        state_before_step.append({key for entry in self.state.values() for key in entry})
        return unwrapped(self, *args, **kwargs)

    optimizer.inner.__class__ = type("Spied", (type(optimizer.inner),), {"step": spy})
    train(net, optimizer, 2)
    assert not any(key.startswith("admm") for key in state_before_step[0])
    ours = {key for key in state_before_step[1] if key.startswith("admm")}
    assert ours == ({"admm_mask"} if build is admm else {"admm_mask", "admm_consensus"})


@pytest.mark.parametrize("frozen_from_the_start", [False, True])
@every_form
def test_c03_state_of_a_weight_waits_for_the_weights_own_first_step(build: Build, frozen_from_the_start: bool) -> None:
    net = make_net()
    optimizer = build(net, prune_at=0) if frozen_from_the_start else build(net)
    late = net.blocks[0].down.weight
    for step, x in enumerate(batches(3)):
        loss_of(net, x).backward()
        if step < 2:
            late.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert (late in optimizer.state) == (step == 2)
    ours = {"admm_mask"} if build is admm or frozen_from_the_start else {"admm_mask", "admm_consensus"}
    assert set(optimizer.state[late]) == {"exp_avg", "exp_avg_sq", "step", *ours}


def test_c03_a_weight_that_comes_late_to_the_run_is_pruned_with_the_others() -> None:
    net = make_net()
    optimizer = admm(net)
    late = net.blocks[0].down.weight
    for step, x in enumerate(batches(STEPS)):
        loss_of(net, x).backward()
        if step < 15:
            late.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.frozen
    assert optimizer.finalize().ok
    assert torch.equal(optimizer.state[late]["admm_mask"], optimizer.masks()["blocks.0.down.weight"])


# ---------------------------------------------------------------- 4: no identity cached across a swap


def exchange(net: nn.Module, optimizer: ADMMNxM) -> None:
    """As Accelerate does for FSDP2: new objects in the module and, at the same places, in the groups."""
    fresh = {}
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                fresh[p] = nn.Parameter(p.detach().clone())
                module._parameters[name] = fresh[p]
    for group in optimizer.param_groups:
        group["params"] = [fresh[p] for p in group["params"]]


@pytest.mark.parametrize("options", [{}, {"prune_at": 0}, {"prune_at": 3}, {"statistics_memory": TWO_WINDOWS}])
@every_form
def test_c04_parameter_objects_may_be_exchanged_before_the_first_step(build: Build, options: dict[str, Any]) -> None:
    """With prune_at=3, the hooks are on the modules already when that happens."""
    if build is not admm:
        options = {key: value for key, value in options.items() if key != "statistics_memory"}

    def run(exchanging: bool) -> nn.Module:
        net = make_net()
        optimizer = build(net, **{"update_every": 1, **options} if build is not admm else options)
        if exchanging:
            exchange(net, optimizer)
        train(net, optimizer, STEPS)
        assert optimizer.finalize().ok
        return net

    assert_same_weights(run(True), run(False))


@every_form
def test_c04_exchange_for_a_flattened_parameter_is_refused(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    group = optimizer.param_groups[0]["params"]
    place = next(i for i, p in enumerate(group) if p is net.blocks[0].up.weight)
    net.blocks[0].up.weight = nn.Parameter(group[place].detach().flatten())
    group[place] = net.blocks[0].up.weight
    group[place].grad = torch.ones_like(group[place])
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight.*flattened.*FSDP2"):
        optimizer.step()


@pytest.mark.parametrize("where", ["module", "groups"])
@every_form
def test_c04_exchange_at_one_of_the_two_places_is_noticed(build: Build, where: str) -> None:
    net = make_net()
    optimizer = build(net)
    old = list(optimizer.param_groups[0]["params"])
    owner = net.blocks[1].down
    weight = owner.weight
    exchange(net, optimizer)
    if where == "module":
        optimizer.param_groups[0]["params"] = old
    else:
        owner.weight = weight
    loss_of(net, next(batches(1))).backward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"AdamW no longer holds prunable weight 'blocks\.\d\.\w+\.weight'.*Put the"):
        optimizer.step()
    assert_same_weights(net, before)
