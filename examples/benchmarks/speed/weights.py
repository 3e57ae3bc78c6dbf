"""The weights that the optimizers work on: matrices of BERT's shapes with gradients, under a fused AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BERT_BASE = 28_311_552
"""Weights of the matrices in four layers of BERT-base."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = 4


def shapes_of(weights: int) -> list[tuple[int, int]]:
    """Return the shapes of the matrices of four layers of a BERT of about so many weights in them.

    Args:
        weights: 28,311,552 is BERT-base; other numbers make it wider or narrower.

    Returns:
        Query, key, value, output, and the two of the feed-forward network, layer by layer.
    """
    hidden = max(64, round((weights / (12 * LAYERS)) ** 0.5 / 64) * 64)
    layer = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    return layer * LAYERS


class Weights:
    """Linear layers of one contestant, the gradients of their weights, and its AdamW.

    Args:
        shapes: of the weights.
        dtype: of the weights.
        device: where they are.
        seed: of their values; equal seeds give equal values.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(shape: torch.Size, scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        self.model = nn.ModuleList(
            nn.Linear(width, height, bias=False, device=device, dtype=dtype) for height, width in shapes
        )
        for parameter in self.params:
            parameter.data.copy_(random(parameter.shape, 0.02))
            parameter.grad = random(parameter.shape, 1e-3)
        self.inner = torch.optim.AdamW(self.params, lr=1e-5, fused=True)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def values(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.params]

    @property
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.params if parameter.grad is not None]

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.params)
