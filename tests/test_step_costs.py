"""What a step must not do: be traced anew, or be captured with a schedule in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from admm_nxm import ADMMNxM
from admm_nxm import optimizer as module
from tests.helpers import batches, loss_of, make_net, same_bits

Step = Callable[[Tensor], Tensor]


def run(step_through: Callable[[Step], Step], build: Callable[..., ADMMNxM]) -> list[Tensor]:
    net = make_net()
    optimizer = build(torch.optim.AdamW(net.parameters(), lr=1e-2), net, total_steps=40)

    def step(x: Tensor) -> Tensor:
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    stepper = step_through(step)
    losses = [stepper(x) for x in batches(40)]
    assert optimizer.frozen
    assert optimizer.figures().step == 40
    return [*losses, *(p.detach() for p in net.parameters())]


@pytest.mark.filterwarnings("ignore")  # what torch.compile has to say about itself
@pytest.mark.parametrize("build", [ADMMNxM, ADMMNxM.paper], ids=["exact", "paper"])
def test_compiled_training_step_has_the_same_bits_and_is_not_traced_again_as_counters_move(
    build: Callable[..., ADMMNxM],
) -> None:
    torch._dynamo.reset()
    plain = run(lambda step: step, build)
    counts = CompileCounter()
    compiled = run(lambda step: torch.compile(step, backend=counts), build)
    assert all(map(same_bits, plain, compiled))
    assert 0 < counts.frame_count <= 4
    torch._dynamo.reset()


def test_capture_is_refused_until_the_mask_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-2), net, total_steps=40)

    def step(x: Tensor) -> None:
        loss_of(net, x).backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs = list(batches(40))
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
