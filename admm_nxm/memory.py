"""Where a tensor lies."""

from __future__ import annotations

from torch import Tensor

from .sharding import local

__all__ = ["address"]


def address(t: Tensor) -> int:
    """Return the address of a tensor's first byte (of this rank's part); 0 if it has none of its own, as on meta."""
    try:
        return local(t).data_ptr()
    except RuntimeError:  # sparse layouts and subclasses that are made of several tensors
        return 0
