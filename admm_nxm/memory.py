"""Find the memory of a tensor, and whether zeros can be written into one that is no plain tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .sharding import local

__all__ = ["address", "is_plain", "offloaded", "plain", "takes_zeros"]

_REFUSALS = (NotImplementedError, RuntimeError, TypeError, AttributeError)  # as a tensor class likes to say it


def address(t: Tensor) -> int:
    """Return the address of the first byte of a tensor (this rank's part of it).

    It is 0 if there is none, as on meta and in torchao's training wrappers: tensors at 0 are not the same memory.
    """
    try:
        return local(t).data_ptr()
    except RuntimeError:  # sparse layouts and subclasses that are made of several tensors
        return 0


def is_plain(t: Tensor) -> bool:
    """Return whether a tensor (this rank's part of it) is torch's own and no wrapper around others."""
    # A subclass of Parameter alone, such as FSDP1's, is gone after detach().
    return type(local(t).detach()) is Tensor


def plain(t: Tensor) -> Tensor:
    """Return the values of a tensor (this rank's part): itself, detached, if it is plain, else a copy."""
    part = local(t).detach()
    if is_plain(part):
        return part
    try:
        return torch.empty(part.shape, dtype=part.dtype, device=part.device).copy_(part)
    except _REFUSALS as error:
        raise TypeError(f"a tensor of class {type(part).__name__} cannot be read as plain values: {error}") from error


def offloaded(module: nn.Module, key: str) -> Tensor | None:
    """Return the tensor in main memory from which accelerate loads a parameter before each pass; None if there is none.

    Args:
        module: which has the parameter, on the device "meta".
        key: its name there.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        values = getattr(one, "weights_map", None)
        if values is not None:
            first, second = values[key], values[key]
            # What is read from the disk is another tensor each time.
            return first if address(first) == address(second) else None
    return None


def takes_zeros(t: Tensor) -> bool:
    """Try on a copy whether a tensor takes zeros while the rest stays; torchao's int8 weights do not."""
    with torch.no_grad():
        copy = local(t).detach().clone()
        drop = torch.zeros(copy.shape, dtype=torch.bool, device=copy.device)
        drop[..., ::2] = True
        try:
            before = plain(copy).clone()
            copy.masked_fill_(drop, 0)
            copy.mul_(~drop)
            copy.copy_(plain(copy))
            after = plain(copy)
        except _REFUSALS:
            return False
        return copy.is_meta or torch.equal(after.nan_to_num(), before.masked_fill(drop, 0).nan_to_num())
