"""Lines 9 and 10 of the contract: mixed precision, and what a loop does before ``step()``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from admm_nxm import ADMMNxM, verify
from tests.helpers import (
    CALIBRATION,
    DENSE,
    FROZEN,
    STEPS,
    TORCH_OPTIMIZERS,
    Build,
    Net,
    admm,
    assert_same_weights,
    batches,
    every_form,
    loss_of,
    make_net,
    same_bits,
    saved,
    train,
    weights_of,
)

# ---------------------------------------------------------------- 9: mixed precision


@pytest.mark.parametrize("skipped", [DENSE, CALIBRATION, FROZEN])
@pytest.mark.parametrize("inner", ["AdamW-fused", "SGD-single"])
@every_form
def test_c09_grad_scaler_unscales_before_and_skips_the_whole_step(build: Build, inner: str, skipped: int) -> None:
    def run(scaled: bool) -> nn.Module:
        net = make_net()
        optimizer = build(net, TORCH_OPTIMIZERS[inner])
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for step, x in enumerate(batches(STEPS)):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, x)).backward()
            if step == skipped:
                # An overflow in a parameter that is not prunable: the pass itself has counted in a calibration.
                before, state, figures = weights_of(net), saved(optimizer.state_dict()), optimizer.figures()
                if scaled:
                    net.head.weight.grad[0, 0] = float("inf")
                    scaler.step(optimizer)
                    scaler.update(2.0**10)
                assert_same_weights(net, before)
                assert optimizer.figures() == figures
                for key, entry in optimizer.state_dict()["state"].items():
                    assert all(same_bits(entry[k], state["state"][key][k]) for k in entry)
                optimizer.zero_grad()
                scaler.scale(loss_of(net, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.figures().step == STEPS
        assert optimizer.finalize().ok
        return net

    assert_same_weights(run(True), run(False))  # a scale of a power of two costs no bits


def test_c09_a_scaled_loss_leaves_the_masks() -> None:

    def run(scales: Callable[[int], float]) -> dict[str, Tensor]:
        net = make_net(dtype=torch.float64)
        optimizer = admm(net, calibration_steps=8)
        for step, x in enumerate(batches(STEPS, dtype=torch.float64)):
            optimizer.zero_grad()
            (loss_of(net, x).double() * scales(step)).backward()
            for p in net.parameters():
                p.grad /= scales(step)
            optimizer.step()
        return optimizer.masks()

    constant, other = run(lambda step: 1.0), run(lambda step: 2.0**16)
    assert all(torch.equal(mask, other[name]) for name, mask in constant.items())


@pytest.mark.parametrize("kind", ["bf16 autocast", "bf16 weights"])
@every_form
def test_c09_bfloat16_trains(build: Build, kind: str) -> None:
    autocast = kind == "bf16 autocast"
    net = make_net(dtype=torch.float32 if autocast else torch.bfloat16)
    optimizer = build(net)
    for x in batches(STEPS, dtype=next(net.parameters()).dtype):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        assert optimizer.phase != "frozen" or verify(net, "1:4").ok
    assert optimizer.finalize().ok
    if build is admm:
        errors = optimizer.figures().model_errors
        assert len(errors) == 4
        assert all(0 < error < 1 for error in errors.values())


# ---------------------------------------------------------------- 10: what a loop does before step()


def test_c10_penalty_is_not_clipped() -> None:
    net = make_net()
    lr, rho = 1e-3, 7.0
    optimizer = ADMMNxM.paper(torch.optim.SGD(net.parameters(), lr=lr), net, total_steps=200, rho=rho, update_every=99)
    w = net.blocks[0].up.weight
    start, z = w.detach().clone(), optimizer.auxiliary("blocks.0.up.weight")
    loss_of(net, next(batches(1))).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-6)
    optimizer.step()
    torch.testing.assert_close(w.detach(), start - lr * rho * (start - z), rtol=0, atol=1e-7)


def test_c10_clipping_does_not_change_the_solve() -> None:
    def masks(clip: bool) -> tuple[dict[str, Tensor], Any]:
        net = make_net()
        optimizer = admm(net, lambda net: torch.optim.SGD(net.parameters(), lr=0.0))
        for x in batches(STEPS):
            optimizer.zero_grad()
            loss_of(net, x).backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), 1e-4)
            optimizer.step()
        return optimizer.masks(), optimizer.figures()

    (clipped, figures), (free, same) = masks(True), masks(False)
    assert all(torch.equal(mask, free[name]) for name, mask in clipped.items())
    assert figures == same


def statistics_of(optimizer: ADMMNxM) -> dict[str, dict[str, Tensor]]:
    state = saved(optimizer.state_dict())["admm"]["statistics"]
    assert len(state) == 4
    return state


def assert_statistics_close(a: ADMMNxM, b: ADMMNxM) -> None:
    ours, theirs = statistics_of(a), statistics_of(b)
    for name, moments in ours.items():
        assert moments["tokens"] == theirs[name]["tokens"], name
        assert moments["dropped"] == 0
        torch.testing.assert_close(moments["inputs"], theirs[name]["inputs"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moments["outputs"], theirs[name]["outputs"], rtol=1e-9, atol=1e-12)


def runs_alike(step_of: Callable[[Net, ADMMNxM, Tensor], None], build: Build) -> None:
    """A loop of another shape is the plain loop, to rounding."""
    nets = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    one, two = (build(net, TORCH_OPTIMIZERS["SGD-single"]) for net in nets)
    for step, x in enumerate(batches(STEPS, dtype=torch.float64)):
        if step == 16:
            for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        step_of(nets[0], one, x)
        mean_loss(nets[1], x).backward()
        two.step()
        two.zero_grad()
        if one.phase == "calibration" and step >= 14:
            assert_statistics_close(one, two)
    assert one.figures().step == STEPS
    for name, mask in two.masks().items():
        assert torch.equal(one.masks()[name], mask)
    if build is admm:
        # The least squares of the solve stop at a tolerance of the loss, which leaves the weights themselves some room.
        assert one.figures().model_errors == pytest.approx(two.figures().model_errors, rel=0.1)
    else:
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert one.finalize().ok


def mean_loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.sum(-1, keepdim=True).sin()).square().mean()


@every_form
def test_c10_accumulation_is_the_big_batch(build: Build) -> None:
    def accumulate(net: Net, optimizer: ADMMNxM, x: Tensor) -> None:
        for part in x.chunk(4):
            (mean_loss(net, part) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    runs_alike(accumulate, build)


@pytest.mark.parametrize("reentrant", [False, True])
@every_form
def test_c10_checkpointed_activations_count_once(build: Build, reentrant: bool) -> None:
    def checkpointed(net: Net, optimizer: ADMMNxM, x: Tensor) -> None:
        y = x.clone().requires_grad_()  # without it, the reentrant kind gives the first block no gradients
        for block in net.blocks:
            y = checkpoint(block, y, use_reentrant=reentrant)
        (net.head(y) - x.sum(-1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    runs_alike(checkpointed, build)


@every_form
def test_c10_several_forwards_and_one_backward(build: Build) -> None:
    def two_forwards(net: Net, optimizer: ADMMNxM, x: Tensor) -> None:
        a, b = x.chunk(2)
        ((mean_loss(net, a) + mean_loss(net, b)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    runs_alike(two_forwards, build)


@every_form
def test_c10_evaluation_between_the_steps_does_not_count(build: Build) -> None:
    def with_evaluation(net: Net, optimizer: ADMMNxM, x: Tensor) -> None:
        net.eval()
        with torch.no_grad():
            net(7 * x)
        net.train()
        mean_loss(net, x).backward()
        with torch.inference_mode():
            net(9 * x)
        optimizer.step()
        optimizer.zero_grad()

    runs_alike(with_evaluation, build)


# torch warns of a cycle, which is broken after each step here.
creates_graphs = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")


@creates_graphs
@every_form
def test_c10_second_derivatives(build: Build) -> None:
    """As AdaHessian and its kin take them: the step changes nothing in place that a graph still needs."""

    def run(second: bool) -> nn.Module:
        net = make_net()
        optimizer = build(net)
        for x in batches(STEPS):
            optimizer.zero_grad()
            loss = loss_of(net, x)
            params = list(net.parameters())
            if second:
                loss.backward(create_graph=True)
                grads = [p.grad for p in params]
                noise = [torch.sign(torch.randn_like(p)) for p in params]
                curvature = torch.autograd.grad(grads, params, grad_outputs=noise, retain_graph=True)
                assert all(torch.isfinite(h).all() for h in curvature)
            else:
                loss.backward()
            optimizer.step()
            for p in params:
                p.grad = None
        assert optimizer.frozen
        return net

    assert_same_weights(run(True), run(False))


class Hessian(torch.optim.SGD):
    """AdaHessian's shape: it takes second derivatives within ``step()``, through the graph of the gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.enable_grad():
            noise = [torch.sign(torch.randn_like(p)) for p in params]
            curvature = torch.autograd.grad([p.grad for p in params], params, grad_outputs=noise, retain_graph=True)
        for p, n, h in zip(params, noise, curvature, strict=True):
            h.mul_(n).abs_()
            p.add_(p.grad.detach() / (1 + h), alpha=-1e-2)


@creates_graphs
@every_form
def test_c10_an_inner_optimizer_that_takes_second_derivatives_in_its_step(build: Build) -> None:
    net = make_net()
    optimizer = build(net, lambda net: Hessian(net.parameters(), lr=1e-2))
    for x in batches(STEPS):
        loss_of(net, x).backward(create_graph=True)
        optimizer.step()
        for p in net.parameters():
            p.grad = None
    assert optimizer.frozen
    assert optimizer.finalize().ok
    assert verify(net, "1:4").ok


@every_form
def test_c10_a_backward_pass_without_gradients_for_some(build: Build) -> None:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, 10)
    for x in batches(STEPS - 10, start=10):
        optimizer.zero_grad(set_to_none=True)
        loss_of(net, x).backward()
        net.blocks[1].up.weight.grad = None
        optimizer.step()
    assert optimizer.frozen
    assert optimizer.finalize().ok


@pytest.mark.parametrize(
    ("unseen", "step", "message"),
    [
        (("up", "down"), 15, "calibration step 1 has gathered nothing"),
        (("down",), 17, r"'blocks\.0\.down\.weight' has no usable statistics.*no token with a gradient in 3"),
    ],
)
def test_c10_a_weight_that_calibration_never_sees_is_named(unseen: tuple[str, ...], step: int, message: str) -> None:
    """Its module is by-passed: the weight is used, and the module never called."""
    net = make_net()
    optimizer = admm(net, select={r"blocks\.0\..*weight": "1:4"})
    for name in unseen:
        module = net.blocks[0].get_submodule(name)
        net.blocks[0].__dict__[name] = functools.partial(bypass, module)
    for done, x in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        if done + 1 == step:
            before = weights_of(net)
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            assert not optimizer.frozen
            assert not torch.equal(net.head.weight, before["head.weight"])  # the inner step itself is done
            break
        optimizer.step()


def bypass(module: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)
