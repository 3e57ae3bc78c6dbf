"""How a stored mask is laid out: one bit a weight where rows divide into bytes, one byte a weight elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PACKED", "is_mask", "pack", "packed_shape", "stored_as", "unpack"]

PACKED = torch.uint8
"""Dtype of a packed mask; one that is not packed is boolean, of the weight's shape."""

# Eight booleans are one 64-bit word. Multiplied by the first number, byte k of it ends in bit 56 + k, and no two terms
# of the product meet; the second copies a byte to all eight places, of which the third leaves bit k in place k.
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))
_COPY = sum(1 << (8 * k) for k in range(8))
_PICK = sum(1 << (9 * k) for k in range(8)) - (1 << 64)  # as a signed number


def is_mask(state: Tensor) -> bool:
    """Return whether a state tensor is a stored mask."""
    return state.dtype in (PACKED, torch.bool)


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the packed mask of a weight; its last dimension must be a multiple of 8."""
    return (*shape[:-1], shape[-1] // 8)


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean mask along its last dimension: bit k of byte i is place 8 i + k.

    Args:
        mask: boolean, the last dimension a multiple of 8.

    Returns:
        uint8 tensor of an eighth of the entries, contiguous.
    """
    flat = mask.reshape(-1).contiguous()
    if flat.storage_offset() % 8:  # words must begin where a word of the memory does
        flat = flat.clone()
    words = flat.view(torch.int64)
    # The shift brings copies of the sign along; the conversion to a byte drops them.
    return (words * _GATHER).bitwise_right_shift_(56).to(PACKED).view(packed_shape(mask.shape))


def unpack(stored: Tensor) -> Tensor:
    """Return the boolean mask of a stored one.

    Args:
        stored: as :func:`pack` returns it, or boolean already.

    Returns:
        The boolean mask; the argument itself if it is one.
    """
    if stored.dtype == torch.bool:
        return stored
    words = stored.reshape(-1).to(torch.int64).mul_(_COPY).bitwise_and_(_PICK)
    return (words.view(PACKED) != 0).view(*stored.shape[:-1], 8 * stored.shape[-1])


def stored_as(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask in the layout that ``dtype`` stands for.

    Args:
        mask: boolean.
        dtype: :data:`PACKED`, or torch.bool.
    """
    return pack(mask) if dtype == PACKED else mask
