"""Averages over processes: local SGD and DiLoCo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from admm_nxm import ADMMNxM, verify
from tests.distributed.pair import WORLD, alike_on_all_ranks
from tests.helpers import FORMS, STEPS, Build, loss_of, make_net

EVERY = 4
"""Steps between two averages: the solve, after step 17, finds weights that differ."""


def batch(step: int) -> Tensor:
    """Each rank has its own."""
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def average(tensors: Any) -> None:
    for t in tensors:
        dist.all_reduce(t)
        t /= WORLD


def run(build: Build, after: Callable[[nn.Module, int], None], around: Any = None) -> nn.Module:
    """Train on batches of this rank's own, and see that the ranks agree on what is pruned."""
    net = make_net()
    optimizer = build(net, pattern="2:4")
    outer = optimizer if around is None else around(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, batch(step)).backward()
        outer.step()
        if optimizer.frozen:
            alike_on_all_ranks({name: mask.tolist() for name, mask in optimizer.masks().items()})
        after(net, step)
    every_step(net, STEPS)
    assert optimizer.finalize().ok
    alike_on_all_ranks([p.tolist() for p in net.parameters()])
    return net


def bare(after: Callable[[nn.Module, int], None]) -> nn.Module:
    """The same without ADMM."""
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, batch(step)).backward()
        optimizer.step()
        after(net, step)
    return net


def of_usual_size(net: nn.Module, bare: nn.Module) -> None:
    """What is kept makes up for the rest, and may be a few times as large."""
    for (name, p), q in zip(net.named_parameters(), bare.parameters(), strict=True):
        assert p.abs().max() < 4 * q.abs().max(), name


def every_step(net: nn.Module, step: int) -> None:
    with torch.no_grad():
        average(net.parameters())


def now_and_then(net: nn.Module, step: int) -> None:
    if (step + 1) % EVERY == 0:
        every_step(net, step)
        assert step < 17 or verify(net, "2:4").ok


def check_local_sgd_by_hand_has_the_same_masks_on_all_ranks(folder: Path) -> None:
    for build in FORMS.values():
        of_usual_size(run(build, now_and_then), bare(every_step))


def check_local_sgd_of_accelerate(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net = make_net()
    optimizer = FORMS["exact"](net, pattern="2:4")
    model, wrapped = accelerator.prepare(net, optimizer)
    with LocalSGD(accelerator, model, local_sgd_steps=EVERY) as local_sgd:
        for step in range(STEPS):
            accelerator.backward(loss_of(model, batch(step)))
            wrapped.step()
            wrapped.zero_grad()
            local_sgd.step()
    alike_on_all_ranks([p.tolist() for p in net.parameters()])
    assert verify(net, "2:4").ok
    of_usual_size(net, bare(every_step))
    assert optimizer.finalize().ok


def check_post_local_sgd_outside_and_inside(folder: Path) -> None:
    def averaging(optimizer: torch.optim.Optimizer) -> PostLocalSGDOptimizer:
        return PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=EVERY, warmup_steps=2))

    def nothing(net: nn.Module, step: int) -> None: ...

    def inside(net: nn.Module, **options: Any) -> ADMMNxM:
        return FORMS["exact"](net, lambda net: averaging(torch.optim.AdamW(net.parameters(), lr=1e-2)), **options)

    of_usual_size(run(FORMS["exact"], nothing, averaging), bare(every_step))
    of_usual_size(run(inside, nothing), bare(every_step))


def check_diloco(folder: Path) -> None:
    """Douillard et al., arXiv 2311.08105: Nesterov momentum on the mean of what the ranks have moved."""

    class Outer:
        def __init__(self) -> None:
            self.params: list[nn.Parameter] = []

        def __call__(self, net: nn.Module, step: int) -> None:
            if not self.params:
                self.params = [nn.Parameter(p.detach().clone()) for p in make_net().parameters()]
                self.optimizer = torch.optim.SGD(self.params, lr=0.7, momentum=0.9, nesterov=True)
            if (step + 1) % EVERY:
                return
            with torch.no_grad():
                for outer, p in zip(self.params, net.parameters(), strict=True):
                    outer.grad = outer - p
                average([outer.grad for outer in self.params])
                self.optimizer.step()
                for outer, p in zip(self.params, net.parameters(), strict=True):
                    p.copy_(outer)

    for build in FORMS.values():
        of_usual_size(run(build, Outer()), bare(Outer()))
