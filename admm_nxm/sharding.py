"""The edge to torch's DTensor: the algorithm itself sees plain local tensors only."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .masks import PACKED, packed_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["check_sharding", "is_sharded", "local", "reduce_sums", "rows_divide_into_bytes", "wrap_like"]


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Return whether ``t`` is a DTensor."""
    # Importing DTensor costs a second; where nobody has imported it, no tensor is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return this rank's part of ``t``, sharing its memory."""
    return t.to_local() if is_sharded(t) else t


def wrap_like(part: Tensor, like: Tensor) -> Tensor:
    """Return ``part`` as a tensor sharded as ``like`` is; ``part`` has the shape of ``local(like)``, or is the packed
    mask of such a tensor."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    if part.dtype == PACKED:
        shape = torch.Size(packed_shape(shape))
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def rows_divide_into_bytes(t: Tensor) -> bool:
    """Return whether the last dimension of a weight packs into bytes, on every rank alike."""
    shards = 1
    if is_sharded(t):
        for size, placement in zip(t.device_mesh.shape, t.placements, strict=True):
            shards *= size if placement.is_shard(t.ndim - 1) else 1
    return bool(t.shape[-1] % (8 * shards) == 0)


def check_sharding(name: str, t: Tensor, dim: int, group: int) -> None:
    """Refuse a placement that would split a group between ranks.

    The check reads the placement and the global shape only, so that all ranks come to the same answer.

    Args:
        name: the weight's name, for the message.
        t: the weight.
        dim: the grouped dimension.
        group: the size of a group.

    Raises:
        ValueError: the placement is partial, or a rank's part of the grouped dimension is no multiple of ``group``.
    """
    if not is_sharded(t):
        return
    width = t.shape[dim]
    for size, placement in zip(t.device_mesh.shape, t.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"weight {name!r} has placement {placement}: a weight must be sharded or replicated")
        if not placement.is_shard(dim % t.ndim):
            continue
        width = math.ceil(width / size)
        if width % group:
            raise ValueError(
                f"weight {name!r} of shape {tuple(t.shape)} with placements {tuple(t.placements)} is sharded along "
                f"its grouped dimension {dim} into parts of {width}, which is no multiple of group={group}; "
                f"shard another dimension, use fewer ranks, or leave this weight dense"
            )


def reduce_sums(sums: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Add up per-weight sums over the ranks that hold different parts of each weight.

    A collective for sharded weights: all their ranks must call it. Nothing is communicated for plain tensors.

    Args:
        sums: one tensor of shape (k,) a weight, each over this rank's part.
        like: the weights.

    Returns:
        Tensor of shape (weights, k), equal on all ranks.
    """
    stacked = torch.stack(list(sums))
    layouts: dict[tuple[DeviceMesh, tuple[bool, ...]], list[int]] = {}
    for index, t in enumerate(like):
        if is_sharded(t):
            shards = tuple(placement.is_shard() for placement in t.placements)
            layouts.setdefault((t.device_mesh, shards), []).append(index)
    for (mesh, shards), indices in layouts.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial() if sharded else Replicate() for sharded in shards]
        part = DTensor.from_local(stacked[indices], mesh, placements, run_check=False)
        stacked[indices] = part.full_tensor()
    return stacked
