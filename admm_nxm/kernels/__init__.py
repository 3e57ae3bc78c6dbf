"""The passes over memory, and the one place that chooses who does them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..factors import Factor
from ..pattern import Pattern

__all__ = ["Backend", "BackendName", "available", "backend_for", "check_backend"]

BackendName = Literal["eager", "native", "triton"]
"""``eager``: plain torch operations. ``native``: C, for CPUs, compiled once by the system's compiler. ``triton``: fused
kernels for CUDA and ROCm."""

_KINDS: dict[str, BackendName] = {"cpu": "native", "cuda": "triton"}
"""The fused backend of each kind of device."""


class Backend(Protocol):
    """What a backend provides. Masks, v and the lazy form's passes have the same bits in every backend;
    ``tests/test_kernels.py`` holds them to :mod:`admm_nxm.reference`. All functions work in place on plain local
    tensors, take any shape, strides and floating dtype, and never wait for the device. What each does is said in
    :mod:`admm_nxm.kernels.eager`. Stored masks are laid out as :mod:`admm_nxm.masks` says."""

    def prepare(self, weight: Tensor, state: torch.dtype, pattern: Pattern) -> None:
        """Compile what a weight will need, so that the first step does not wait for it; does nothing if it is there."""

    def add_penalty(
        self, gradients: Sequence[Tensor], weights: Sequence[Tensor], consensus: Sequence[Tensor], rho: float
    ) -> None:
        """``g += rho * (w - v)``."""

    def pull(self, weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
        """``w += fraction * (v - w)``."""

    def advance(
        self,
        weight: Tensor,
        consensus: Tensor,
        pattern: Pattern,
        dim: int,
        with_dual: bool,
        dual_scale: float,
        seed: int | None = None,
    ) -> Tensor:
        """The z/u update of one v; returns what :func:`admm_nxm.kernels.eager.advance` returns."""

    def reveal(self, weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        """``w = hidden`` off the mask."""

    def conceal(self, weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
        """``hidden = w`` off the mask, then ``w = (1 - fraction) * w`` there."""

    def shrink(self, weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
        """``w = w / divisor`` off the mask."""

    def restore(self, weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
        """``w = w * divisor`` off the mask."""

    def advance_hidden(
        self, weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Factor | None
    ) -> Tensor:
        """The z-step of one hidden state; returns what :func:`admm_nxm.kernels.eager.advance_hidden` returns."""

    def advance_mask(self, weight: Tensor, mask: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
        """The z-step of one stored mask; returns what :func:`admm_nxm.kernels.eager.advance_mask` returns."""

    def keep_only(self, tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Set to +0.0 whatever the mask does not keep."""


def backend_for(device: torch.device, name: BackendName | None = None) -> Backend:
    """Return the backend for tensors on ``device``.

    Args:
        device: where the tensors are.
        name: the backend that was asked for; None takes the fastest that works there.

    Returns:
        A backend for that device; tensors that it has no kernel for (float64, say) it hands to the eager one.

    Raises:
        RuntimeError: the backend that was asked for does not work there.
    """
    return _choose(device.type, name)


@functools.cache
def _choose(kind: str, name: BackendName | None) -> Backend:
    eager: Backend = _module("eager")
    if name == "eager":
        return eager
    fused = _KINDS.get(kind)
    if name is not None and name != fused:
        fitting = ", ".join(f'"{other}"' for other in ("eager", fused) if other)
        raise RuntimeError(f'backend="{name}" has no kernels for device {kind!r}; what it has are {fitting}')
    if fused is None:
        return eager
    module = _module(fused)
    missing = module.missing()
    if missing is None:
        backend: Backend = module
        return backend
    if name is not None:
        raise RuntimeError(f'backend="{name}" does not work here: {missing}; leave backend out to use what works')
    return eager


def available(device: torch.device) -> list[BackendName]:
    """Return the names of the backends that work on a device, the fastest first."""
    fused = _KINDS.get(device.type)
    return [fused, "eager"] if fused is not None and _module(fused).missing() is None else ["eager"]


def check_backend(name: object) -> BackendName | None:
    """Return the name if it is one; None stays None.

    Raises:
        ValueError: no backend has that name.
    """
    if name is None or name in get_args(BackendName):
        return name  # type: ignore[return-value]
    allowed = ", ".join(f'"{known}"' for known in get_args(BackendName))
    raise ValueError(f"backend={name!r} must be one of {allowed}, or None for the fastest that works on the device")


def _module(name: BackendName) -> Any:
    """Fused backends are imported where they are chosen: Triton takes its time."""
    return importlib.import_module(f".{'fused' if name == 'triton' else name}", __name__)
