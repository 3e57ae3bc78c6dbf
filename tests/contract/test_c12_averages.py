"""Line 12 of the contract: what averages the weights of a run, around the wrapped optimizer or beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from admm_nxm import ADMMNxM, ConvergenceWarning, verify
from tests.helpers import STEPS, Build, batches, every_form, loss_of, make_net, train

Step = Callable[[], None]


def plain(net: nn.Module, optimizer: ADMMNxM) -> tuple[Step, Step]:
    return optimizer.step, lambda: None


def lookahead(net: nn.Module, optimizer: ADMMNxM) -> tuple[Step, Step]:
    """Slow weights around ADMMNxM (Zhang et al., arXiv 1907.08610)."""
    slow = [p.detach().clone() for p in net.parameters()]
    done = iter(range(1, STEPS + 1))

    def step() -> None:
        optimizer.step()
        if next(done) % 5 == 0:
            with torch.no_grad():
                for s, p in zip(slow, net.parameters(), strict=True):
                    p.copy_(s.lerp_(p, 0.5))

    return step, lambda: None


def ema(net: nn.Module, optimizer: ADMMNxM, *, every: int = STEPS, sparse_only: bool = False) -> tuple[Step, Step]:
    """A moving average, which the model takes over every so many steps and at the end."""
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    done = iter(range(1, STEPS + 1))

    def take() -> None:
        net.load_state_dict(averaged.module.state_dict())

    def step() -> None:
        optimizer.step()
        if optimizer.frozen or not sparse_only:
            averaged.update_parameters(net)
        if next(done) % every == 0:
            take()

    return step, take


def ema_with_switching(net: nn.Module, optimizer: ADMMNxM) -> tuple[Step, Step]:
    return ema(net, optimizer, every=4)


def ema_from_the_solve(net: nn.Module, optimizer: ADMMNxM) -> tuple[Step, Step]:
    return ema(net, optimizer, sparse_only=True)


def run(build: Build, average: Callable[..., tuple[Step, Step]], dense: bool) -> nn.Module:
    net = make_net()
    optimizer = build(net, pattern="2:4")
    step, take = average(net, optimizer)
    for x in batches(STEPS):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        step()
    take()
    assert verify(net, "2:4").ok == (not dense)
    with pytest.warns(ConvergenceWarning, match="no longer in the pattern") if dense else contextlib.nullcontext():
        assert optimizer.finalize().ok
    assert verify(net, "2:4").ok
    train(net, optimizer, 2)
    assert verify(net, "2:4").ok
    return net


@pytest.mark.parametrize(
    ("average", "dense"), [(lookahead, True), (ema, True), (ema_with_switching, True), (ema_from_the_solve, False)]
)
@every_form
def test_c12_averaged_weights_stay_small_and_come_out_sparse(build: Build, average: Any, dense: bool) -> None:
    """In finalize(), which says so, where the average goes back to dense weights."""
    net, bare = run(build, average, dense), run(build, plain, dense=False)
    for (name, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
        assert p.abs().max() < 2 * q.abs().max(), name
