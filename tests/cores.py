"""A small model, deterministic training, bitwise comparison, and the two forms around AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, Pattern

WEIGHTS = ("blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight", "blocks.1.down.weight")
"""The prunable weights of :class:`Net`, in model order."""

BYTES_A_WEIGHT = 4 * (8 * 8 + 16 * 16)
"""What A and G of each of them take."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two repeated blocks (four prunable weights) and a head that stays dense."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batches(count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The same inputs for the same step number, whoever asks."""
    for step in range(start, start + count):
        yield torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x).float() - x.float().sum(-1, keepdim=True).sin()).square().mean()


def train(net: nn.Module, optimizer: Optimizer, count: int, start: int = 0) -> None:
    dtype = next(net.parameters()).dtype
    for x in batches(count, start, dtype):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()


def adamw(net: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.AdamW(net.parameters(), **{"lr": 1e-2, "foreach": False, **options})


def exact(net: nn.Module, **options: Any) -> ADMMNxM:
    """The default form around AdamW; 40 steps, of which 26 are dense, 8 calibration, 6 frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the run is short")
        return ADMMNxM(adamw(net), net, **({"total_steps": 40} if not _has_length(options) else {}), **options)


def paper(net: nn.Module, **options: Any) -> ADMMNxM:
    """The paper's form around AdamW; 40 steps, of which the last 12 are frozen."""
    return ADMMNxM.paper(adamw(net), net, **({"total_steps": 40} if not _has_length(options) else {}), **options)


def _has_length(options: Mapping[str, Any]) -> bool:
    return "total_steps" in options or "prune_at" in options


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals NaN, and the two zeros differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_weights(a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]) -> None:
    a = weights_of(a) if isinstance(a, nn.Module) else a
    b = weights_of(b) if isinstance(b, nn.Module) else b
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different, f"different bits in {different}"


def is_feasible(w: Tensor, pattern: str = "2:4", dim: int = -1) -> bool:
    """Counted in plain words: at most ``keep`` of each group are not zero."""
    parsed = Pattern.parse(pattern)
    groups = w.detach().movedim(dim, -1).reshape(-1, parsed.group)
    return bool(((groups != 0).sum(1) <= parsed.keep).all())
