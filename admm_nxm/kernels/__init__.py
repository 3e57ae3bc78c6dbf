"""The passes over memory, and the one place that chooses who does them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..pattern import Pattern
from . import eager

__all__ = ["Backend", "backend_for"]


class Backend(Protocol):
    """What a backend provides. Masks and v have the same bits in every backend; ``tests/test_kernels.py`` holds them
    to :mod:`admm_nxm.reference`. All functions work in place on plain local tensors and never wait for the device."""

    def add_penalty(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], consensus: Sequence[Tensor], rho: float
    ) -> None:
        """``g += rho * (w - v)``."""

    def pull(self, weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
        """``w += fraction * (v - w)``."""

    def advance(
        self, weight: Tensor, consensus: Tensor, pattern: Pattern, dim: int, with_dual: bool, dual_scale: float
    ) -> Tensor:
        """The z/u update of one v; returns what :func:`admm_nxm.kernels.eager.advance` returns."""

    def reveal(self, weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        """``w = hidden`` off the mask."""

    def conceal(self, weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
        """``hidden = w`` off the mask, then ``w = (1 - fraction) * w`` there."""

    def advance_hidden(
        self, weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Tensor | None
    ) -> Tensor:
        """The z-step of one hidden state; returns what :func:`admm_nxm.kernels.eager.advance_hidden` returns."""

    def keep_only(self, tensor: Tensor, mask: Tensor) -> None:
        """Set to +0.0 whatever the mask does not keep."""


def backend_for(device: torch.device) -> Backend:  # noqa: ARG001 - fused backends will look at it
    """Return the backend for tensors on ``device``."""
    return eager
