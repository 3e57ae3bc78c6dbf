"""Line 7 of the contract: step hooks, copies, the bound method, and the proxies that frameworks make."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
    saved,
    train,
    weights_of,
)


@pytest.fixture
def global_hooks() -> Iterator[list[tuple[str, Any]]]:
    fired: list[tuple[str, Any]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: fired.append(("global-pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: fired.append(("global-post", o))),
    ]
    yield fired
    for handle in handles:
        handle.remove()


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c07_step_hooks_fire_once_around_the_whole_step(build: Build, factory: Factory, global_hooks: list) -> None:
    net = make_net()
    optimizer = build(net, factory, prune_at=0)
    train(net, optimizer, 1)
    global_hooks.clear()
    w = net.blocks[0].up.weight
    seen: dict[str, Tensor] = {}
    inner_pre = optimizer.inner.register_step_pre_hook(lambda o, *_: global_hooks.append(("inner-pre", o)))
    optimizer.register_step_pre_hook(lambda o, *_: seen.update(grad=w.grad.clone(), w=w.detach().clone()))
    optimizer.inner.register_step_post_hook(lambda o, *_: seen.update(after=w.detach().clone()))
    loss_of(net, next(batches(1, 1))).backward()
    plain_gradient = w.grad.clone()
    optimizer.step()
    assert [kind for kind, _ in global_hooks] == ["global-pre", "inner-pre", "global-post"]
    assert all(o is optimizer for _, o in global_hooks)
    assert torch.equal(seen["grad"], plain_gradient)  # before it is masked
    assert torch.equal(seen["after"], w.detach())  # after everything
    assert not seen["after"][~optimizer.masks()["blocks.0.up.weight"]].any()
    inner_pre.remove()


def test_c07_a_hook_after_the_step_of_the_solve_sees_the_pruned_weights() -> None:
    net = make_net()
    optimizer = admm(net)
    zeros: list[int] = []
    optimizer.register_step_post_hook(lambda *_: zeros.append(int((net.blocks[0].up.weight == 0).sum())))
    train(net, optimizer, 17)
    assert zeros == [0] * 16 + [96]


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("stop", [0, DENSE, 14, CALIBRATION, 17, FROZEN])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_form
def test_c07_copies_train_on_alike(build: Build, how: str, stop: int) -> None:
    check_copy(build, how, stop)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_c07_copies_between_two_windows_too(how: str) -> None:
    check_copy(admm, how, 15, statistics_memory=TWO_WINDOWS)


def check_copy(build: Build, how: str, stop: int, **options: Any) -> None:
    net = make_net()
    optimizer = build(net, **options)
    train(net, optimizer, stop)
    pair = (net, optimizer)
    other_net, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.figures() == optimizer.figures()
    assert other.selection == optimizer.selection
    assert other.inner is not optimizer.inner
    assert other.param_groups is other.inner.param_groups
    train(net, optimizer, STEPS - stop, start=stop)
    assert not torch.equal(other_net.head.weight, net.head.weight)
    train(other_net, other, STEPS - stop, start=stop)
    assert_same_weights(net, other_net)
    assert other.finalize() == optimizer.finalize()
    fired = []
    other.register_step_pre_hook(lambda *_: fired.append(1))
    train(other_net, other, 1)
    train(net, optimizer, 1)
    assert fired == [1]


def test_c07_a_copy_of_the_model_alone_gathers_nothing() -> None:
    """Copies for evaluation and averaging are made in mid run."""
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, CALIBRATION)
    other_net = copy.deepcopy(net)
    before = saved(optimizer.state_dict())["admm"]["statistics"]
    loss_of(other_net, next(batches(1, 50))).backward()
    after = optimizer.state_dict()["admm"]["statistics"]
    assert all(torch.equal(before[name][key], after[name][key]) for name in before for key in before[name])
    loss_of(net, next(batches(1, 50))).backward()
    after = optimizer.state_dict()["admm"]["statistics"]
    assert not any(torch.equal(before[name]["inputs"], after[name]["inputs"]) for name in before)


def test_c07_copy_under_an_lr_scheduler_steps_itself_not_the_original() -> None:
    net = make_net()
    optimizer = admm(net)
    lr_scheduler.StepLR(optimizer, 1)  # puts its own wrapping on the instance's step
    other_net, other = copy.deepcopy((net, optimizer))
    before = weights_of(net)
    train(other_net, other, 3)
    assert_same_weights(net, before)
    assert other.figures().step == 3
    assert optimizer.figures().step == 0
    assert "step" not in other.__dict__


def test_c07_step_is_a_bound_method() -> None:
    optimizer = admm(make_net())
    assert optimizer.step.__self__ is optimizer
    assert optimizer.step.__func__ is ADMMNxM.step


@every_form
def test_c07_zero_grad_and_add_param_group_delegate(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    loss_of(net, next(batches(1))).backward()
    optimizer.zero_grad(set_to_none=False)
    assert not net.head.weight.grad.any()
    optimizer.zero_grad()
    assert net.head.weight.grad is None
    train(net, optimizer, 3)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.inner.param_groups[1]["params"][0] is extra
    assert optimizer.inner.param_groups[1]["admm_step"] == 3
    extra.grad = torch.ones(3)
    train(net, optimizer, 17, start=3)
    assert optimizer.finalize().ok
    assert optimizer.load_state_dict(optimizer.state_dict()) is None
    assert "step 20 of 20" in repr(optimizer)
    assert "admm_" not in repr(optimizer)


@every_form
def test_c07_weights_of_groups_added_later_stay_dense_and_the_report_says_so(build: Build) -> None:
    net = make_net()
    late = net.blocks[1]

    def first_block(net: nn.Module) -> Optimizer:
        return torch.optim.AdamW([*net.blocks[0].parameters(), *net.head.parameters()], lr=1e-2)

    optimizer = build(net, first_block, ineligible="skip")
    assert {weight.name for weight in optimizer.selection} == {"blocks.0.up.weight", "blocks.0.down.weight"}
    train(net, optimizer, 3)
    optimizer.add_param_group({"params": list(late.parameters())})
    before = late.up.weight.detach().clone()
    train(net, optimizer, 17, start=3)
    assert not torch.equal(late.up.weight, before)
    assert (late.up.weight != 0).all()
    report = optimizer.finalize()
    assert report.ok
    assert "blocks.1.up.weight" in str(report)
    assert "added to the optimizer after construction" in str(report)


# ---------------------------------------------------------------- proxies


def sharing(optimizer: Optimizer) -> Any:
    """The shape of Fabric's proxy, and of Lightning's up to 2.1: a subclass with a copy of ``__dict__``."""

    class Proxy:
        def __init__(self, optimizer: Optimizer) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step", "__del__")}
            self.__class__ = type("Proxy" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
            self._optimizer = optimizer

        @property
        def optimizer(self) -> Optimizer:
            return self._optimizer

        def state_dict(self) -> dict[str, Any]:
            return self.optimizer.state_dict()

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    return Proxy(optimizer)


def forwarding(optimizer: Optimizer) -> Any:
    """The shape of Lightning's proxy today: a subclass with nothing of its own, which looks everything up."""

    class Proxy:
        def __init__(self, optimizer: Optimizer) -> None:
            self._optimizer = optimizer
            self.__class__ = type("Proxy" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

        def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            return self._optimizer.step(closure or (lambda: None), **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._optimizer, name)

    return Proxy(optimizer)


def plain_subclass(optimizer: Optimizer) -> Any:
    """A subclass whose ``step`` is the wrapper's own, on the proxy itself."""
    cls = type("Proxy" + type(optimizer).__name__, (type(optimizer),), {})
    proxy = cls.__new__(cls)
    proxy.__dict__.update(optimizer.__dict__)
    return proxy


every_proxy = pytest.mark.parametrize("proxy_of", [sharing, forwarding, plain_subclass])


@every_proxy
@every_form
def test_c07_a_proxy_and_the_optimizer_see_one_run(build: Build, proxy_of: Callable[[Optimizer], Any]) -> None:
    net, plain_net = make_net(), make_net()
    optimizer, plain = build(net), build(plain_net)
    proxy = proxy_of(optimizer)
    assert isinstance(proxy, ADMMNxM)
    for step in range(STEPS):
        # In turn: what either of them does, the other sees.
        train(net, (proxy, optimizer)[step % 2], 1, start=step)
        train(plain_net, plain, 1, start=step)
        assert proxy.figures() == optimizer.figures() == plain.figures()
        assert proxy.phase == optimizer.phase
        assert proxy.frozen == optimizer.frozen
        assert proxy.param_groups is optimizer.param_groups
        assert repr(proxy) == repr(optimizer)
    for name, mask in plain.masks().items():
        assert torch.equal(proxy.masks()[name], mask)
    assert proxy.finalize() == plain.finalize()
    assert optimizer.finalized
    assert_same_weights(net, plain_net)


@pytest.mark.parametrize("stop", [DENSE, CALIBRATION, FROZEN])
@every_proxy
@every_form
def test_c07_a_checkpoint_goes_through_proxies(build: Build, proxy_of: Callable[[Optimizer], Any], stop: int) -> None:
    net = make_net()
    optimizer = build(net)
    proxy = proxy_of(optimizer)
    train(net, proxy, stop)
    again_net = make_net(seed=1)
    again = build(again_net)
    again_proxy = proxy_of(again)
    again_net.load_state_dict(saved(net.state_dict()))
    again_proxy.load_state_dict(saved(proxy.state_dict()))
    assert again.figures() == optimizer.figures()
    train(net, optimizer, STEPS - stop, start=stop)
    train(again_net, again_proxy, STEPS - stop, start=stop)
    assert_same_weights(net, again_net)


@every_proxy
@every_form
def test_c07_projected_through_a_proxy_is_seen_by_the_optimizer(
    build: Build, proxy_of: Callable[[Optimizer], Any]
) -> None:
    net = make_net()
    optimizer = build(net)
    proxy = proxy_of(optimizer)
    train(net, proxy, DENSE)
    with proxy.projected(), pytest.raises(RuntimeError, match=r"projected\(\) block"):
        optimizer.step()
    before = weights_of(net)
    with optimizer.projected(), pytest.raises(RuntimeError, match=r"projected\(\) block"):
        proxy.step()
    assert_same_weights(net, before)
