"""The edge to torch's DTensor: the algorithm itself sees plain local tensors only."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "average",
    "broadcast",
    "check_sharding",
    "full",
    "is_sharded",
    "local",
    "part_of",
    "rank_and_world",
    "reduce_sums",
    "wrap_like",
]


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Return whether ``t`` is a DTensor."""
    # Importing DTensor costs a second; where nobody has imported it, no tensor is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return this rank's part of ``t``, sharing its memory."""
    return t.to_local() if is_sharded(t) else t


def wrap_like(part: Tensor, like: Tensor) -> Tensor:
    """Return ``part``, of the shape of ``local(like)``, as a tensor sharded as ``like`` is."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def full(t: Tensor) -> Tensor:
    """Return the whole of ``t``: a collective where it is sharded, and ``t`` itself where it is not."""
    return t.full_tensor() if is_sharded(t) else t


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor that all ranks hold whole, cut as ``like`` is; nothing is communicated."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements).to_local()


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and how many processes train together; 0 and 1 for one process."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def broadcast(t: Tensor, source: int) -> None:
    """Give all ranks what the rank ``source`` holds, in place."""
    # Gloo does not know booleans.
    dist.broadcast(t.view(torch.uint8) if t.dtype == torch.bool else t, source)


def average(part: Tensor, like: Tensor) -> None:
    """Give all ranks the mean of what they hold of a weight, in place: where each trains on its own for a while, as in
    local SGD, they must not come to masks of their own.

    Equal tensors keep their bits, because sums are taken in twice the precision. What is sharded stays as it is.
    """
    _, world = rank_and_world()
    if world == 1 or is_sharded(like):
        return
    wide = torch.float64 if part.element_size() > 2 else torch.float32
    total = part.to(wide, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    part.copy_(total / world)


def check_sharding(name: str, t: Tensor, dim: int, group: int) -> None:
    """Refuse a placement that would split a group between ranks.

    The check reads the placement and the global shape only, so that all ranks come to the same answer.
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
