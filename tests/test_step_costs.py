"""What a step must not do: allocate with the model, be traced anew, or be captured with a schedule in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from admm_nxm import ADMMNxM, ConvergenceWarning
from admm_nxm import optimizer as module
from admm_nxm.kernels import eager, native
from tests.helpers import batches, every_form, loss_of, make_net, same_bits, spelt_out

ROWS, WIDTH, LAYERS = 512, 1024, 4
WEIGHT_BYTES = 4 * ROWS * WIDTH


class Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for t in _tensors(result):
            if t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def wide_net() -> nn.Module:
    layers = [nn.Linear(WIDTH, ROWS, bias=False) for _ in range(LAYERS)]
    net = nn.Module()
    net.layers = nn.ModuleList(layers)
    return net


def allocations_by_step(penalty: str, backend: str) -> dict[str, list[int]]:
    """Bytes that ADMMNxM's own part of a step allocates, by what happens in that step."""
    net = wide_net()
    inner = torch.optim.SGD(net.parameters(), lr=1e-3, foreach=False)
    given = {"penalty": penalty, "rho": 0.5, "freeze_at": 4, "backend": backend}
    given["update_every"] = lambda step: module.Update.AUXILIARY if step == 2 else module.Update.NONE
    optimizer = ADMMNxM(inner, net, select={r"layers\.\d\.weight": "2:4"}, **spelt_out(given))
    seen = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in ("first", "z-step", "w-step", "freeze", "frozen"):
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            with Allocations() as allocations:
                optimizer.step()
            seen[name] = allocations.sizes
    assert optimizer.frozen
    return seen


@pytest.mark.skipif(native.missing() is not None, reason="no C compiler")
@every_form
def test_ordinary_step_of_the_native_backend_allocates_nothing(penalty: str) -> None:
    seen = allocations_by_step(penalty, "native")
    assert max(seen["w-step"], default=0) <= 64
    assert max(seen["frozen"], default=0) <= 64
    # Where z moves: sums alone.
    assert max(seen["z-step"], default=0) <= 64
    assert max(seen["first"]) >= WEIGHT_BYTES / 32  # the state itself: the recorder works


@every_form
def test_step_in_plain_torch_allocates_no_more_than_blocks(penalty: str) -> None:
    seen = allocations_by_step(penalty, "eager")
    block = 8 * eager._BLOCK  # int64 words of unpacked bits are the widest of it
    assert block < WEIGHT_BYTES
    for step in ("w-step", "z-step", "frozen"):
        assert max(seen[step], default=0) <= block, step
    assert max(seen["z-step"]) > block / 64


@pytest.mark.skipif(native.missing() is not None, reason="no C compiler")
def test_curvature_allocates_nothing() -> None:
    net = wide_net()
    optimizer = ADMMNxM(
        torch.optim.Adam(net.parameters(), lr=1e-3, foreach=False),
        net,
        select={r"layers\.\d\.weight": "2:4"},
        rho=0.5,
        update_every=2,
    )
    for step in range(4):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        with Allocations() as allocations:
            optimizer._move_consensus(optimizer._active(), module.Update.AUXILIARY, 2) if step == 3 else None
        if step < 3:
            optimizer.step()
    assert max(allocations.sizes, default=0) <= 64


# ---------------------------------------------------------------- compiled and captured


def run(step_through: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]], penalty: str) -> list[Tensor]:
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer = ADMMNxM(inner, net, **spelt_out({"total_steps": 30, "penalty": penalty}))

    def step(x: Tensor) -> Tensor:
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    stepper = step_through(step)
    losses = [stepper(x) for x in batches(30)]
    assert optimizer.frozen
    assert optimizer.state_dict()["param_groups"][0]["admm_step"] == 30
    return [*losses, *(p.detach() for p in net.parameters())]


@pytest.mark.filterwarnings("ignore")  # what torch.compile has to say about itself
@every_form
def test_compiled_training_step_has_the_same_bits_and_is_not_traced_again_as_counters_move(penalty: str) -> None:
    torch._dynamo.reset()
    plain = run(lambda step: step, penalty)
    counts = CompileCounter()
    compiled = run(lambda step: torch.compile(step, backend=counts), penalty)
    assert all(map(same_bits, plain, compiled))
    assert 0 < counts.frame_count <= 4
    torch._dynamo.reset()


def test_capture_is_refused_until_the_mask_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-2), net, total_steps=20)

    def step(x: Tensor) -> None:
        loss_of(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = list(batches(20))
    step(inputs[0])
    before = [p.detach().clone() for p in net.parameters()]
    monkeypatch.setattr(module, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"step 2 was to be captured.*make_graphed_callables.*outside"):
        step(inputs[1])
    assert all(map(same_bits, before, (p.detach() for p in net.parameters())))
    monkeypatch.undo()
    for x in inputs[1:]:
        step(x)
    assert optimizer.frozen
    monkeypatch.setattr(module, "is_capturing", lambda device: True)
    step(inputs[0])
