"""Booleans as bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

# Eight booleans are one 64-bit word. Multiplied by the first number, byte k of it ends in bit 56 + k, and no two terms
# of the product meet; the second copies a byte to all eight places, of which the third leaves bit k in place k.
_GATHER = sum(1 << (56 - 7 * k) for k in range(8))
_COPY = sum(1 << (8 * k) for k in range(8))
_PICK = sum(1 << (9 * k) for k in range(8)) - (1 << 64)  # as a signed number


def pack(flags: Tensor) -> Tensor:
    """Pack booleans into bytes: bit k of byte i is place 8 i + k.

    Args:
        flags: boolean, 1-D, a multiple of 8 long.

    Returns:
        uint8 tensor of an eighth of the length.
    """
    flat = flags.contiguous()
    if flat.storage_offset() % 8:  # words must begin where a word of the memory does
        flat = flat.clone()
    words = flat.view(torch.int64)
    # The shift brings copies of the sign along; the conversion to a byte drops them.
    return (words * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return the booleans that :func:`pack` has packed.

    Args:
        packed: uint8, 1-D.
    """
    words = packed.to(torch.int64).mul_(_COPY).bitwise_and_(_PICK)
    return words.view(torch.uint8) != 0
