"""What only a GPU can show. ``examples/benchmarks/gpu_check.py`` runs the tests of this mark, beside its benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, keep_mask, prune, solve
from admm_nxm.export.semi_structured import to_semi_structured
from admm_nxm.projection import project
from admm_nxm.statistics import Statistics
from tests.cores import is_feasible
from tests.helpers import (
    CALIBRATION,
    DENSE,
    STEPS,
    Build,
    admm,
    assert_same_weights,
    batches,
    every_form,
    loss_of,
    make_net,
    paper,
    saved,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
GPU = torch.device("cuda")


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(net, x).backward()
    optimizer.step()


def inputs(count: int, start: int = 0) -> list[Tensor]:
    return [x.to(GPU) for x in batches(count, start)]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "8:32"])
def test_masks_are_those_of_the_cpu(dtype: torch.dtype, pattern: str) -> None:
    w = torch.randn(64, 96).mul(4).round().to(dtype)  # with ties
    w[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(keep_mask(w.to(GPU), pattern).cpu(), keep_mask(w, pattern))


def test_the_solve_is_as_good_as_on_the_cpu() -> None:
    weight, x, g = torch.randn(64, 96), torch.randn(300, 96) @ torch.randn(96, 96), torch.randn(300, 64)
    a, b = x.T @ x, g.T @ g
    there, here = solve(weight.to(GPU), "2:4", a.to(GPU), b.to(GPU)), solve(weight, "2:4", a, b)
    assert is_feasible(there.weight.cpu())
    assert there.error == pytest.approx(here.error, rel=0.05)


def test_pruning_without_training_is_as_good_as_on_the_cpu() -> None:
    net = make_net()
    other = copy.deepcopy(net).to(GPU)
    here, there = (prune(model, "2:4", batches(8), loss=loss_of) for model in (net, other))
    assert there.ok
    assert there.model_errors == pytest.approx(here.model_errors, rel=0.1, abs=1e-3)


def test_statistics_are_those_of_the_cpu() -> None:
    net = make_net()
    other = copy.deepcopy(net).to(GPU)
    found = []
    for model, device in ((net, torch.device("cpu")), (other, GPU)):
        statistics = Statistics({"up": model.blocks[0].up})
        statistics.attach()
        for x in batches(3):
            loss_of(model, x.to(device)).backward()
        found.append(statistics.moments["up"])
    for name, value in found[0].tensors.items():
        torch.testing.assert_close(found[1].tensors[name].cpu(), value, rtol=1e-4, atol=1e-6)


@every_form
@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_a_step_does_not_wait_for_the_device_outside_of_the_solve(build: Build, how: dict[str, Any]) -> None:
    net = make_net().to(GPU)
    optimizer = build(net, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, **how))
    for x in inputs(STEPS):
        if optimizer.figures().step == optimizer.prune_at - 1:
            step(net, optimizer, x)
            continue
        with no_waiting():
            step(net, optimizer, x)
    assert optimizer.finalize().ok


def test_waiting_is_noticed() -> None:
    one = torch.ones((), device=GPU)
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        one.item()


def test_a_frozen_step_can_be_captured_in_a_graph() -> None:
    net = make_net().to(GPU)
    optimizer = admm(net, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True))
    for x in inputs(STEPS):
        step(net, optimizer, x)
    assert optimizer.frozen
    plain_net, plain = copy.deepcopy((net, optimizer))
    (x,) = inputs(1)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # torch asks for a warm-up on another stream
        for _ in range(3):
            step(net, optimizer, x)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss_of(net, x).backward()
        optimizer.step()
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        step(plain_net, plain, x)
    for one, other in zip(net.parameters(), plain_net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert optimizer.finalize().ok


def test_a_dense_step_is_not_captured() -> None:
    net = make_net().to(GPU)
    optimizer = admm(net, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True))
    for x in inputs(DENSE):
        step(net, optimizer, x)
    graph, one = torch.cuda.CUDAGraph(), torch.zeros((), device=GPU)
    with torch.cuda.graph(graph):
        one.add_(1)
        with pytest.raises(RuntimeError, match="was to be captured"):
            optimizer.step()
    assert optimizer.figures().step == DENSE


@pytest.mark.parametrize("build", [admm, paper])
@pytest.mark.filterwarnings("ignore::admm_nxm.ConvergenceWarning")
def test_autocast_with_a_scaler_that_skips_a_step(build: Build) -> None:
    net = make_net().to(GPU)
    optimizer = build(net)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for number, x in enumerate(inputs(STEPS + 1)):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_of(net, x)
        scaler.scale(loss).backward()
        if number == DENSE:
            net.blocks[0].up.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.figures().step == STEPS
    assert optimizer.finalize().ok


def test_a_run_that_was_stopped_in_its_calibration_gives_the_same_bits() -> None:
    xs = inputs(STEPS)
    net = make_net().to(GPU)
    optimizer = admm(net)
    for x in xs[:CALIBRATION]:
        step(net, optimizer, x)
    again = make_net(1).to(GPU)
    resumed = admm(again)
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    for x in xs[CALIBRATION:]:
        step(net, optimizer, x)
        step(again, resumed, x)
    assert_same_weights(net, again)
    assert all(is_feasible(weight, "1:4") for weight in (b.up.weight for b in net.blocks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_layers_compute_the_same(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("sparse tensor cores come with compute capability 8.0")
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(GPU, dtype).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(project(layer.weight, "2:4"))
        x = torch.randn(3, 40, 256, device=GPU, dtype=dtype)
        dense = model(x)
        with to_semi_structured(model) as swapped:
            assert len(swapped.converted) == 2
            sparse = model(x)
        assert float((sparse.float() - dense.float()).norm() / dense.float().norm()) < 1e-2
        assert torch.equal(model(x), dense)


def test_a_run_of_two_windows_in_bfloat16_ends_feasible() -> None:
    net = make_net(dtype=torch.bfloat16).to(GPU)
    optimizer = ADMMNxM(
        torch.optim.AdamW(net.parameters(), lr=1e-2),
        net,
        total_steps=STEPS,
        calibration_steps=3,
        statistics_memory=4 * (8**2 + 16**2) * 2,
    )
    for x in inputs(STEPS):
        step(net, optimizer, x.to(torch.bfloat16))
    assert optimizer.figures().windows == 2
    assert optimizer.finalize().ok
