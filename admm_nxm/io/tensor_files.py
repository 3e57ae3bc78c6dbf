"""The safetensors format at the level of bytes: where each tensor lies in a file, and writing one tensor at a time.

Reading tensors is left to the safetensors library. What it lacks is here: the place of each tensor's bytes, so that
they can be copied unread, and a writer that never holds more than one tensor.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from torch import Tensor

__all__ = [
    "CODE_OF",
    "DTYPES",
    "Header",
    "Stored",
    "StreamWriter",
    "brief",
    "bytes_of",
    "is_shape",
    "plan",
    "read_header",
    "unique_keys",
]

# In the order in which the library lays tensors out in a file, so that files come out as it would have written them.
_CODES = {
    "BOOL": "bool",
    "F4": "",  # torch has it in pairs only
    "F6_E2M3": "",
    "F6_E3M2": "",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_RANK = {code: rank for rank, code in enumerate(_CODES)}

DTYPES: Mapping[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _CODES.items() if hasattr(torch, name)
}
"""The torch dtype of each safetensors code, where this torch has one of the same elements."""

CODE_OF: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
"""The safetensors code of each dtype."""

_LONGEST_HEADER = 100_000_000  # the library reads none that is longer
_MOST_DIMENSIONS = 64  # of which torch can loop over the entries
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        name: its name.
        code: its dtype, as safetensors spells it.
        shape: its shape.
        start: where its bytes begin, counted from the end of the header.
        end: where they end.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        tensors: the tensors in the order of their bytes.
        metadata: the entries of ``__metadata__``, or None where there is none.
        data: where the header ends and the tensors begin.
    """

    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str] | None
    data: int


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        file: the file.

    Raises:
        ValueError: the file is missing, damaged, or no safetensors file; the message names it and the cause.
    """
    try:
        return _read_header(file)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {brief(error)}") from error


def _read_header(file: Path) -> Header:
    if file.is_dir():
        raise ValueError("it is a folder; name the file, or the folder that the model was saved in")
    if file.exists() and not file.is_file():
        raise ValueError("it is a device or a pipe, and no file")
    with file.open("rb") as stream:
        size = file.stat().st_size
        start = stream.read(8)
        if not start:
            raise ValueError("it is empty; copy or save it again")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8 or length > _LONGEST_HEADER:
            if start.startswith(_PICKLED):  # some headers are so long that their length begins alike
                raise ValueError(
                    "it is a pickled checkpoint, and those can run code when they are read; save the model with "
                    "save_pretrained(..., safe_serialization=True)"
                )
            raise ValueError(
                f"its header would be {length:,} bytes long, and the file has {size:,}; it was cut short, or it is no "
                "safetensors file: copy or save it again"
            )
        # The library checks everything else: the JSON, shapes against sizes, gaps and overlaps, the end of the file.
        with safetensors.safe_open(str(file), framework="pt") as handle:
            names = set(handle.keys())
        fields = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
    metadata = fields.pop("__metadata__", None)
    if set(fields) != names:
        raise ValueError("it changed while it was read")
    tensors = (
        Stored(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in fields.items()
    )
    header = Header(tuple(sorted(tensors, key=lambda t: (t.start, t.end))), metadata, 8 + length)
    for tensor in header.tensors:
        if not is_shape(tensor.shape):
            raise ValueError(f"it gives {tensor.name!r} a shape that no tensor can have: {str(tensor.shape)[:80]}")
    return header


def is_shape(shape: tuple[int, ...]) -> bool:
    """Return whether torch can make a tensor of this shape; one without entries can claim any size for the rest."""
    return len(shape) <= _MOST_DIMENSIONS and min(shape, default=0) >= 0 and math.prod(s or 1 for s in shape) < 1 << 59


def brief(error: Exception) -> str:
    """Return an error's text without the middle of a long one: a damaged file can hold any text in any place."""
    text = str(error)
    return text if len(text) <= 600 else f"{text[:400]} … {text[-150:]}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of the pairs of a JSON object; for ``object_pairs_hook``.

    Raises:
        ValueError: a key stands there twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {key!r} twice")
        found[key] = value
    return found


def plan(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> tuple[Stored, ...]:
    """Lay tensors out in a file as the library does: by dtype, the widest first, then by name.

    Args:
        tensors: name, code of the dtype, shape and size in bytes of each.

    Raises:
        ValueError: two have one name.
    """
    names = set()
    laid_out = []
    at = 0
    for name, code, shape, nbytes in sorted(tensors, key=lambda t: (-_RANK.get(t[1], -1), t[0])):
        if name in names or name == "__metadata__":
            raise ValueError(f"two tensors are called {name!r}; rename one")
        names.add(name)
        laid_out.append(Stored(name, code, shape, at, at + nbytes))
        at += nbytes
    return tuple(laid_out)


def bytes_of(t: Tensor) -> Iterator[memoryview]:
    """Return the bytes of a tensor in memory order.

    Args:
        t: any dtype, shape, layout in memory and device; strided. Conjugate and negated views are resolved.
    """
    # Views that are conjugate or negated do so when they are read; their memory has other bits.
    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if flat.numel():
        # numpy, which knows neither bfloat16 nor 8-bit floats, is not needed for this.
        buffer = (ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr())
        view = memoryview(buffer)
        for at in range(0, len(view), _CHUNK):
            yield view[at : at + _CHUNK]
        del flat  # its memory had to live until here


class StreamWriter:
    """Writes a safetensors file one tensor at a time, in any order; a context manager.

    Args:
        path: the file; made anew.
        tensors: from :func:`plan`.
        metadata: entries of ``__metadata__``; None leaves it out.

    Raises:
        ValueError: the header is longer than the library reads.
    """

    def __init__(self, path: Path, tensors: Iterable[Stored], metadata: Mapping[str, str] | None) -> None:
        self._missing = {t.name: t for t in tensors}
        fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        for t in self._missing.values():
            fields[t.name] = {"dtype": t.code, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
        header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        header += b" " * (-len(header) % 8)
        if len(header) > _LONGEST_HEADER:
            raise ValueError(
                f"{path.name} would have a header of {len(header):,} bytes, and safetensors reads {_LONGEST_HEADER:,} "
                "at most; save the model in more shards"
            )
        self._data = 8 + len(header)
        self._stream = path.open("wb")
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def put(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a tensor.

        Args:
            name: its name; each is written once.
            chunks: its bytes.

        Raises:
            ValueError: the bytes are more or fewer than planned.
        """
        stored = self._missing.pop(name)
        self._stream.seek(self._data + stored.start)
        written = sum(self._stream.write(chunk) for chunk in chunks)
        if written != stored.nbytes:
            raise ValueError(f"{name!r} gave {written} bytes where {stored.nbytes} were planned")

    def copy(self, name: str, source: Path, at: int) -> None:
        """Write a tensor with bytes of another file, unread.

        Args:
            name: its name.
            source: the other file.
            at: where its bytes begin there.
        """
        left = self._missing[name].nbytes
        with source.open("rb") as stream:
            stream.seek(at)
            self.put(name, (stream.read(min(_CHUNK, left - done)) for done in range(0, left, _CHUNK)))

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._missing:
            raise ValueError(f"{len(self._missing)} planned tensors were not written, such as {min(self._missing)!r}")
