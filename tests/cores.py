"""Both forms around AdamW in runs of 40 steps with the default calibration, for the tests of the core."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, Pattern

from .helpers import begun

WEIGHTS = ("blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight", "blocks.1.down.weight")
"""The prunable weights of :class:`tests.helpers.Net`, in model order."""

BYTES_A_WEIGHT = 4 * (8 * 8 + 16 * 16)
"""What A and G of each of them take."""


def adamw(net: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.AdamW(net.parameters(), **{"lr": 1e-2, "foreach": False, **options})


def exact(net: nn.Module, **options: Any) -> ADMMNxM:
    """The default form around AdamW; unless a length is given 40 steps: 26 dense, 8 calibration, 6 frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the run is short")
        return ADMMNxM(adamw(net), begun(net, {"pattern": "2:4", **options}), **_with_length(options))


def paper(net: nn.Module, **options: Any) -> ADMMNxM:
    """The paper's form around AdamW; unless a length is given 40 steps, of which the last 12 are frozen."""
    return ADMMNxM.paper(adamw(net), begun(net, {"pattern": "2:4", **options}), **_with_length(options))


def _with_length(options: dict[str, Any]) -> dict[str, Any]:
    return options if {"total_steps", "prune_at"} & options.keys() else {"total_steps": 40, **options}


def is_feasible(w: Tensor, pattern: str = "2:4", dim: int = -1) -> bool:
    """Counted in plain words: at most ``keep`` of each group are not zero."""
    parsed = Pattern.parse(pattern)
    groups = w.detach().movedim(dim, -1).reshape(-1, parsed.group)
    return bool(((groups != 0).sum(1) <= parsed.keep).all())
