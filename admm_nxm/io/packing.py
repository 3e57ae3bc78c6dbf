r"""Packed weights: the kept values of a weight that satisfies a pattern, and where they stand. Lossless bit for bit.

The format, version 1. Let ``w`` be a weight of any shape, with pattern ``keep:group`` along dimension ``dim``. Move
``dim`` to the end and cut it into groups: in row-major order this gives G groups of ``group`` entries. Three tensors
stand for the weight called ``NAME``:

``NAME.packed_values``
    dtype of the weight, shape (G, keep). The kept entries of each group in ascending order of their place. Every entry
    that is not zero is kept; a group with fewer of them keeps its first zeros (the lowest places) as well.
``NAME.packed_places``
    uint8, one dimension. A string of bits, the first one the lowest bit of the first byte; the last byte is filled up
    with zeros. Group after group it has, as ``places`` in the metadata says,

    - ``"bitmask"``: ``group`` bits, 1 where the entry is kept; or
    - ``"indices"``: for each kept entry its place in the group, 0 to group - 1, as a number of
      ``(group - 1).bit_length()`` bits, the lowest first.

    The one with fewer bits is written, the bitmask if both are alike (2:4: both have 4 bits a group).
``NAME.packed_signs``
    uint8, one dimension; there only if an entry that is not kept is -0.0 (``signs`` in the metadata). Likewise a string
    of bits: group after group, ``group - keep`` bits, one for each entry that is not kept in ascending order of place;
    1 for -0.0 and 0 for +0.0.

An entry is zero if it compares equal to 0. So NaN is not zero, and what is not kept is +0.0 or -0.0 (or 0).

A safetensors file with packed weights has the key ``admm_nxm`` in its ``__metadata__``, with JSON::

    {"format": "admm-nxm-packed", "version": 1,
     "weights": {NAME: {"pattern": "2:4", "shape": [64, 32], "dim": 1, "dtype": "BF16", "places": "bitmask",
                        "signs": false}},
     "aliases": {OTHER_NAME: NAME}}

``pattern`` is keep:group, ``dim`` counts from the front, ``dtype`` is safetensors' own code. ``aliases`` are further
names of tensors in the file, packed or not; it may be missing. All other tensors and entries are as without packing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..pattern import Pattern
from ..projection import INTEGER_OF_SIZE
from .tensor_files import CODE_OF, DTYPES, NO_ZERO, read_record, read_weight, refusing

__all__ = [
    "KEY",
    "LONGEST_GROUP",
    "Layout",
    "Packed",
    "PackedTensor",
    "examine",
    "pack_tensor",
    "packed_layout",
    "unpack_tensor",
]

KEY = "admm_nxm"
"""Key of the metadata entry that describes packed weights."""

FORMAT = "admm-nxm-packed"
VERSION = 1

VALUES, PLACES, SIGNS = ".packed_values", ".packed_places", ".packed_signs"

LONGEST_GROUP = 4096
"""Longest group that is packed: it bounds what a small file can become when it is unpacked."""

_SIGNED_ZERO = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}

_ENTRIES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Describe how one weight is packed.

    Args:
        shape: shape of the weight.
        pattern: its pattern.
        dim: the grouped dimension, counted from the front.
        dtype: its dtype.
        places: ``"bitmask"`` or ``"indices"``.
        signs: whether signs of zeros are stored.

    Raises:
        ValueError: these do not go together.
    """

    shape: tuple[int, ...]
    pattern: Pattern
    dim: int
    dtype: torch.dtype
    places: str
    signs: bool

    def __post_init__(self) -> None:
        if self.dtype not in CODE_OF or self.dtype.is_complex:
            raise ValueError(f"a weight of dtype {self.dtype} cannot be packed; leave it out by a select rule")
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"dim={self.dim} is out of range for shape {self.shape}")
        if self.shape[self.dim] % self.pattern.group:
            raise ValueError(
                f"width {self.shape[self.dim]} (dim {self.dim} of shape {self.shape}) is no multiple of "
                f"group={self.pattern.group}"
            )
        if self.pattern.group > LONGEST_GROUP:
            raise ValueError(f"group={self.pattern.group} is too long to pack; {LONGEST_GROUP} is the longest")
        if self.places not in ("bitmask", "indices"):
            raise ValueError(f'places={self.places!r} must be "bitmask" or "indices"')
        if self.signs and self.dtype not in _SIGNED_ZERO:
            raise ValueError(f"signs=true, and {self.dtype} has no negative zero")

    @property
    def groups(self) -> int:
        """Number of groups."""
        return math.prod(self.shape) // self.pattern.group

    @property
    def place_bits(self) -> int:
        """Bits that tell the places of one group."""
        return self.pattern.group if self.places == "bitmask" else self.pattern.keep * _width(self.pattern)

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Ending of the name -> dtype and shape, of each tensor that stands for the weight."""
        parts = {  # -(-bits // 8) is the number of bytes, rounded up
            VALUES: (self.dtype, (self.groups, self.pattern.keep)),
            PLACES: (torch.uint8, (-(-self.groups * self.place_bits // 8),)),
        }
        if self.signs:
            parts[SIGNS] = (torch.uint8, (-(-self.groups * (self.pattern.group - self.pattern.keep) // 8),))
        return parts

    @property
    def nbytes(self) -> int:
        """Size of the packed weight in bytes."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts.values())

    @property
    def dense_nbytes(self) -> int:
        """Size of the weight in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the metadata."""
        return {
            "pattern": str(self.pattern),
            "shape": list(self.shape),
            "dim": self.dim,
            "dtype": CODE_OF[self.dtype],
            "places": self.places,
            "signs": self.signs,
        }

    @classmethod
    def from_json(cls, name: str, entry: Any) -> Layout:
        """Read the entry of the weight of this name; a damaged one raises a ValueError."""
        with refusing(f"the packed weight {name!r} is damaged"):
            shape, pattern, dim = read_weight(name, entry)
            dtype, places, signs = (entry.get(key) for key in ("dtype", "places", "signs"))
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"its dtype is {dtype!r}, which this torch does not have")
            if type(signs) is not bool:
                raise ValueError(f"its signs is {signs!r}")
            return cls(shape, pattern, dim, DTYPES[dtype], places, signs)


@dataclass(frozen=True)
class Packed:
    """The metadata entry of a file with packed weights.

    Args:
        weights: name -> layout.
        aliases: further name -> name of the tensor that it stands for.
    """

    weights: Mapping[str, Layout] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the entry's text."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "weights": {name: layout.to_json() for name, layout in self.weights.items()},
        }
        if self.aliases:
            fields["aliases"] = dict(self.aliases)
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Packed:
        """Read the entry; a damaged one, or one of another version, raises a ValueError."""
        with refusing(f"its metadata entry {KEY!r} cannot be read"):
            weights, aliases = read_record(text, FORMAT, VERSION, ("weights", "aliases"))
            if not all(isinstance(name, str) for name in aliases.values()):
                raise ValueError("its aliases are no names")
        return cls({name: Layout.from_json(name, entry) for name, entry in weights.items()}, aliases)


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight: its layout, and the tensors by ending of the name, as ``layout.parts`` says."""

    layout: Layout
    parts: Mapping[str, Tensor]


def packed_layout(shape: tuple[int, ...], pattern: Pattern, dim: int, dtype: torch.dtype, signs: bool) -> Layout:
    """Return the layout with the places told in the fewest bits; the arguments are those of :class:`Layout`.

    Raises:
        ValueError: such a weight cannot be packed.
    """
    dim = dim + len(shape) if dim < 0 else dim
    indices = pattern.keep * _width(pattern) < pattern.group
    return Layout(shape, pattern, dim, dtype, "indices" if indices else "bitmask", signs)


def examine(t: Tensor, pattern: Pattern | str, dim: int = -1) -> tuple[int, bool]:
    """Look at a weight before it is packed; the arguments are those of :func:`pack_tensor`.

    Returns:
        How many groups have more than ``keep`` entries that are not zero; whether an entry that would not be kept is
        -0.0, so that signs have to be stored.

    Raises:
        ValueError: such a weight cannot be packed.
    """
    layout = packed_layout(tuple(t.shape), Pattern.parse(pattern), dim, t.dtype, signs=False)
    bad, signs = 0, False
    for rows, _ in _pieces(layout, _rows(t, layout)):
        nonzero = _nonzero(rows, layout.dtype)
        counts = nonzero.sum(-1)
        bad += int((counts > layout.pattern.keep).sum())
        if not signs and layout.dtype in _SIGNED_ZERO:
            dropped = ~_fill_up(nonzero, counts, layout.pattern)
            signs = bool((dropped & (rows != 0) & ~nonzero).any())
    return bad, signs


def pack_tensor(t: Tensor, pattern: Pattern | str, dim: int = -1, *, name: str = "the tensor") -> PackedTensor:
    """Pack one weight.

    Args:
        t: the weight, any dtype that safetensors has but complex ones, any shape and layout in memory.
        pattern: a Pattern or its spelling.
        dim: the grouped dimension.
        name: what errors call it.

    Returns:
        The packed weight, on the CPU.

    Raises:
        ValueError: the weight violates the pattern, or cannot be packed.

    >>> packed = pack_tensor(torch.tensor([[0.0, 5.0, 0.0, 7.0]]), "2:4")
    >>> [part.tolist() for part in packed.parts.values()]  # 10 = 0b1010
    [[[5.0, 7.0]], [10]]
    >>> unpack_tensor(packed).tolist()
    [[0.0, 5.0, 0.0, 7.0]]
    """
    pattern = Pattern.parse(pattern)
    t = t.detach().cpu()
    bad, signs = examine(t, pattern, dim)
    if bad:
        raise ValueError(
            f"{name} violates {pattern}: {bad} of {t.numel() // pattern.group} groups have more than {pattern.keep} "
            "entries that are not zero; prune it first"
        )
    layout = packed_layout(tuple(t.shape), pattern, dim, t.dtype, signs)
    parts = {ending: torch.empty(shape, dtype=dtype) for ending, (dtype, shape) in layout.parts.items()}
    for rows, piece in _pieces(layout, _rows(t, layout), parts):
        nonzero = _nonzero(rows, layout.dtype)
        kept = _fill_up(nonzero, nonzero.sum(-1), pattern)
        piece[VALUES].view(rows.dtype).copy_(rows.masked_select(kept).view(len(rows), pattern.keep))
        if layout.places == "bitmask":
            piece[PLACES].copy_(_to_bytes(kept))
        else:
            index = kept.nonzero()[:, 1:]
            piece[PLACES].copy_(_to_bytes(index.bitwise_right_shift(torch.arange(_width(pattern))) & 1 == 1))
        if signs:
            piece[SIGNS].copy_(_to_bytes(rows.masked_select(~kept) != 0))
    return PackedTensor(layout, parts)


def unpack_tensor(packed: PackedTensor) -> Tensor:
    """Restore a weight.

    Args:
        packed: as :func:`pack_tensor` returns it.

    Returns:
        The weight, contiguous, with the bits it had.

    Raises:
        ValueError: the parts do not fit the layout, or the places are none that the pattern allows.
    """
    layout = packed.layout
    pattern = layout.pattern
    found = {ending: (part.dtype, tuple(part.shape)) for ending, part in packed.parts.items()}
    if found != layout.parts:
        raise ValueError(f"its parts are {found}, and by its pattern and shape they should be {layout.parts}")
    moved = (*layout.shape[: layout.dim], *layout.shape[layout.dim + 1 :], layout.shape[layout.dim])
    flat = torch.zeros(moved, dtype=INTEGER_OF_SIZE[layout.dtype.itemsize])
    parts = {ending: part.contiguous() for ending, part in packed.parts.items()}
    for rows, piece in _pieces(layout, flat.view(layout.groups, pattern.group), parts):
        kept = _kept(_to_bits(piece[PLACES], len(rows) * layout.place_bits), len(rows), layout)
        rows.masked_scatter_(kept, piece[VALUES].view(flat.dtype))
        if layout.signs:
            negative = _to_bits(piece[SIGNS], len(rows) * (pattern.group - pattern.keep))
            rows.masked_scatter_(~kept, negative.to(flat.dtype) * torch.iinfo(flat.dtype).min)
    return flat.movedim(-1, layout.dim).contiguous().view(layout.dtype)


def _kept(bits: Tensor, groups: int, layout: Layout) -> Tensor:
    """Return the mask of kept entries, (groups, group), that the bits of the places tell."""
    pattern = layout.pattern
    if layout.places == "bitmask":
        kept = bits.view(groups, pattern.group)
        if bool((kept.sum(-1) != pattern.keep).any()):
            raise ValueError(f"its places name more or fewer than {pattern.keep} entries in a group of {pattern.group}")
        return kept
    width = _width(pattern)
    index = (bits.view(groups, pattern.keep, width).long() << torch.arange(width)).sum(-1)
    if bool((index >= pattern.group).any()) or bool((index.diff(dim=-1) <= 0).any()):
        raise ValueError(f"its places are not {pattern.keep} ascending numbers below {pattern.group} in every group")
    return torch.zeros(groups, pattern.group, dtype=torch.bool).scatter_(-1, index, True)


def _width(pattern: Pattern) -> int:
    """Bits that tell a place in a group."""
    return (pattern.group - 1).bit_length()


def _rows(t: Tensor, layout: Layout) -> Tensor:
    """Return the bits of a weight as integers, (groups, group)."""
    moved = t.detach().resolve_neg().movedim(layout.dim, -1)  # a negated view has other bits in memory
    return moved.reshape(layout.groups, layout.pattern.group).view(INTEGER_OF_SIZE[layout.dtype.itemsize])


def _pieces(
    layout: Layout, rows: Tensor, parts: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Cut rows into pieces of a limited size, whose bits end with a byte, each with what stands for it in the parts."""
    bits = {PLACES: layout.place_bits, SIGNS: layout.pattern.group - layout.pattern.keep}
    length = max(_ENTRIES_AT_ONCE // layout.pattern.group // 8, 1) * 8
    for at in range(0, len(rows), length):
        cuts = {ending: slice(at * each // 8, (at + length) * each // 8) for ending, each in bits.items()}
        cuts[VALUES] = slice(at, at + length)
        yield rows[cuts[VALUES]], {ending: part[cuts[ending]] for ending, part in (parts or {}).items()}


def _nonzero(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which entries, given by their bits, are not zero."""
    if dtype in NO_ZERO:
        return torch.ones_like(rows, dtype=torch.bool)
    if dtype in _SIGNED_ZERO:
        # By bits, because a processor may be set to take subnormal numbers for zeros.
        return (rows & torch.iinfo(rows.dtype).max) != 0
    return rows != 0


def _fill_up(nonzero: Tensor, counts: Tensor, pattern: Pattern) -> Tensor:
    """Return which entries are kept: those that are not zero, and the first zeros up to ``keep``."""
    missing = (pattern.keep - counts).unsqueeze(-1)
    return nonzero | ((~nonzero).cumsum(-1) <= missing) if bool((missing > 0).any()) else nonzero


_POWERS = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device="cpu")
"""The values of the eight bits of a byte, the lowest first."""


def _to_bytes(bits: Tensor) -> Tensor:
    flat = nn.functional.pad(bits.reshape(-1), (0, -bits.numel() % 8))
    return (flat.view(-1, 8) * _POWERS).sum(-1, dtype=torch.uint8)


def _to_bits(source: Tensor, count: int) -> Tensor:
    bits = (source.unsqueeze(-1) & _POWERS).ne(0).reshape(-1)
    if bool(bits[count:].any()):
        raise ValueError("bits are set beyond its last group")
    return bits[:count]
