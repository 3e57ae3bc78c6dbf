"""Line 8 of the contract: closures, and optimizers that call them by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, verify
from tests.helpers import (
    FEW_OF_EACH_KIND,
    STEPS,
    Build,
    Factory,
    admm,
    assert_same_weights,
    batches,
    every_form,
    forms_and_inners,
    loss_of,
    make_net,
    weights_of,
)


@forms_and_inners(FEW_OF_EACH_KIND)
def test_c08_closure_runs_once_and_first_with_gradients_enabled(build: Build, factory: Factory) -> None:
    def run(with_closure: bool) -> tuple[nn.Module, int]:
        net = make_net()
        optimizer = build(net, factory)
        calls = 0
        for x in batches(STEPS):

            def closure(x: Tensor = x) -> Tensor:
                nonlocal calls
                calls += 1
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = loss_of(net, x)
                loss.backward()
                return loss

            if with_closure:
                with torch.no_grad():
                    loss = optimizer.step(closure)
                assert loss is not None
                assert loss.requires_grad
            else:
                closure()
                assert optimizer.step() is None
        assert optimizer.frozen
        return net, calls

    (with_net, calls), (without_net, _) = run(True), run(False)
    assert calls == STEPS
    assert_same_weights(with_net, without_net)


class SAM(Optimizer):
    """Sharpness-aware minimisation (Foret et al., arXiv 2010.01412), in the usual shape: it climbs by ``rho`` along the
    gradient, and lets its base optimizer step from where it was with the gradient from there."""

    def __init__(self, params: Any, base_optimizer: Callable[..., Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def _each(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self._each()]).norm()
        for p in self._each():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self._each():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is not None, "SAM requires a closure"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def test_c08_optimizers_that_need_the_closure_are_refused() -> None:
    net = make_net()
    with pytest.raises(TypeError, match=r"LBFGS needs to call the closure.*AdamW"):
        admm(net, lambda net: torch.optim.LBFGS(net.parameters()))

    class NeedsClosure(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    with pytest.raises(TypeError, match=r"NeedsClosure needs to call the closure"):
        admm(net, lambda net: NeedsClosure(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"SAM evaluates the closure itself.*ADMMNxM\(AdamW.*as its base optimizer"):
        admm(net, lambda net: SAM(net.parameters(), torch.optim.SGD, lr=0.1))


class Asserts(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "a closure, please"
        return super().step(closure)


class Calls(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step()


class NoClosureError(Exception):
    pass


class Raises(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        if closure is None:
            raise NoClosureError("a closure, please")
        return super().step(closure)


@pytest.mark.parametrize("cls", [Asserts, Calls, Raises])
@every_form
def test_c08_a_closure_that_is_optional_in_name_only_is_noticed_at_the_first_step(
    build: Build, cls: type[Optimizer]
) -> None:
    net = make_net()
    optimizer = build(net, lambda net: cls(net.parameters(), lr=0.1))
    loss_of(net, next(batches(1))).backward()
    before = weights_of(net)
    with pytest.raises(TypeError, match=rf"(?s){cls.__name__} failed in its first step.*as its base optimizer"):
        optimizer.step()
    assert_same_weights(net, before)
    assert optimizer.figures().step == 0


def test_c08_other_failures_of_the_first_step_are_left_as_they_are() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return helper()

    def helper() -> None:
        raise ValueError("nothing to do with closures")

    net = make_net()
    optimizer = admm(net, lambda net: Broken(net.parameters(), lr=0.1))
    loss_of(net, next(batches(1))).backward()
    with pytest.raises(ValueError, match="nothing to do with closures"):
        optimizer.step()


@every_form
def test_c08_the_way_round_works(build: Build) -> None:
    net = make_net()
    made: list[ADMMNxM] = []

    def base(groups: Any, **options: Any) -> Optimizer:
        made.append(build(net, lambda _: torch.optim.AdamW(groups, **options)))
        return made[0]

    sam = SAM(net.parameters(), base, lr=1e-2)
    for x in batches(STEPS):

        def closure(x: Tensor = x) -> Tensor:
            loss = loss_of(net, x)
            loss.backward()
            return loss

        closure()
        sam.step(closure)
        sam.zero_grad()
        assert made[0].phase != "frozen" or verify(net, "1:4").ok
    assert made[0].frozen
    assert made[0].figures().step == STEPS
    assert made[0].finalize().ok
    assert build is not admm or made[0].figures().model_error is not None
