"""What the projection ranks weights by, beside their magnitude.

A saliency gives each weight a factor, and the projection keeps the ``keep`` largest ``|w| * factor`` of each group. It
is read off the inner optimizer's own state when the mask moves, so it costs no memory and survives a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import at_least
from .factors import Factor, Root

__all__ = ["Curvature", "Saliency"]

_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""Where torch's optimizers keep a mean (Adam and its kin; RMSprop, Adadelta) or sum (Adagrad) of squared gradients."""


class Saliency(Protocol):
    """Inner state of one weight -> its factor."""

    def __call__(self, state: Mapping[str, Any], shape: torch.Size, /) -> Factor | None:
        """Return the factor of each entry, at least 0: a float32 tensor, or a :class:`admm_nxm.factors.Root`, which
        costs no memory; or None to rank by magnitude alone.

        Args:
            state: what the inner optimizer holds for the weight; this rank's part where sharded.
            shape: the weight's shape.
        """


@dataclass(frozen=True)
class Curvature:
    """Squared gradients to a power: ``|w| * h ** exponent``, with h the inner optimizer's second moment.

    An exponent of 0.5 is the diagonal Fisher estimate of the loss that pruning a weight costs, ``h * w**2``; a smaller
    one trusts the magnitude more, because h is noisy. Where the inner optimizer has no second moment of the weight's
    shape (SGD, Adafactor, 8-bit states), weights are ranked by magnitude.

    Args:
        exponent: from 0, which is magnitude, to 1.

    Source: LeCun, Denker, Solla, Optimal Brain Damage (NeurIPS 1989), with Adam's estimate of the diagonal.
    """

    exponent: float = 0.25

    def __post_init__(self) -> None:
        at_least("exponent", self.exponent, 0.0)
        if self.exponent > 1:
            raise ValueError(f"exponent={self.exponent!r} must be at most 1; 0.5 is the diagonal Fisher estimate")

    def __call__(self, state: Mapping[str, Any], shape: torch.Size, /) -> Root | None:
        """Return ``h ** exponent``, or None."""
        for key in _SECOND_MOMENTS:
            h = state.get(key)
            # Quantised states are tensors of classes of their own, and what these can compute differs.
            if h is None or type(h) not in (Tensor, torch.nn.Parameter):
                continue
            if h.is_floating_point() and h.shape == shape and self.exponent > 0:
                return Root(h, self.exponent)
        return None
