"""The safetensors format at the level of bytes, and what else is read from files that anybody may have damaged.

Reading tensors is left to the safetensors library. What it lacks is here: the place of each tensor's bytes, so that
they can be copied unread, and a writer that never holds more than one tensor.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from ..memory import plain
from ..pattern import Pattern

# In the order in which the library lays tensors out in a file, so that files come out as it would have written them.
_ORDER = """
    BOOL=bool F4= F6_E2M3= F6_E3M2= U8=uint8 I8=int8 F8_E5M2=float8_e5m2 F8_E4M3=float8_e4m3fn F8_E8M0=float8_e8m0fnu
    F8_E4M3FNUZ=float8_e4m3fnuz F8_E5M2FNUZ=float8_e5m2fnuz I16=int16 U16=uint16 F16=float16 BF16=bfloat16 I32=int32
    U32=uint32 F32=float32 C64=complex64 F64=float64 I64=int64 U64=uint64
"""  # codes without a dtype are of less than a byte; torch has them in pairs only
_CODES = dict(entry.split("=") for entry in _ORDER.split())
_RANK = {code: rank for rank, code in enumerate(_CODES)}

DTYPES: Mapping[str, torch.dtype] = {c: getattr(torch, name) for c, name in _CODES.items() if hasattr(torch, name)}
"""The torch dtype of each safetensors code, where this torch has one of the same elements."""

CODE_OF: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
"""The safetensors code of each dtype."""

NO_ZERO = {getattr(torch, "float8_e8m0fnu", None)}
"""Dtypes in which no entry can be zero."""

_LONGEST_HEADER = 100_000_000  # the library reads none that is longer
_MOST_DIMENSIONS = 64  # of which torch can loop over the entries
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CHUNK = 1 << 22


# ---------------------------------------------------------------- safetensors


class Stored(NamedTuple):
    """A tensor in a file: name, dtype as safetensors spells it, shape, size, and where in the file its bytes begin."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    at: int = 0


class Header(NamedTuple):
    """The tensors of a file in the order of their bytes, and the entries of its ``__metadata__``, if it has any."""

    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file."""
    with refusing(f"{file} is not a readable safetensors file"):
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
                    f"its header would be {length:,} bytes long, and the file has {size:,}; it was cut short, or it is "
                    "no safetensors file: copy or save it again"
                )
            # The library checks everything else: the JSON, shapes against sizes, gaps and overlaps, the end of file.
            with safetensors.safe_open(str(file), framework="pt") as handle:
                names = set(handle.keys())
            fields = read_json(stream.read(length).decode("utf-8"))
        metadata = fields.pop("__metadata__", {})
        if set(fields) != names:
            raise ValueError("it changed while it was read")
        tensors = []
        for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), last - first, 8 + length + first))
            if not is_shape(tensors[-1].shape):
                raise ValueError(f"it gives {name!r} a shape that no tensor can have: {str(entry['shape'])[:80]}")
        return Header(tuple(tensors), metadata)


def is_shape(shape: tuple[int, ...]) -> bool:
    """Return whether torch can make a tensor of this shape; one without entries can claim any size for the rest."""
    return len(shape) <= _MOST_DIMENSIONS and min(shape, default=0) >= 0 and math.prod(s or 1 for s in shape) < 1 << 59


def bytes_in(file: Path, tensor: Stored) -> Iterator[bytes]:
    """Return the bytes of a tensor of a file, in pieces."""
    with file.open("rb") as stream:
        stream.seek(tensor.at)
        for done in range(0, tensor.nbytes, _CHUNK):
            yield stream.read(min(_CHUNK, tensor.nbytes - done))


def bytes_of(t: Tensor) -> Iterator[memoryview]:
    """Return the bytes of a tensor in memory order, of any dtype, shape, strides and device."""
    # Views that are conjugate or negated do so when they are read; their memory has other bits.
    flat = plain(t).cpu().resolve_conj().resolve_neg().contiguous()
    if flat.numel():
        # numpy, which knows neither bfloat16 nor 8-bit floats, is not needed for this.
        yield memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
        del flat  # its memory had to live until here


def write_file(
    path: Path,
    tensors: Iterable[Stored],
    metadata: Mapping[str, str],
    contents: Iterable[tuple[str, Iterable[bytes | memoryview]]],
) -> None:
    """Write a safetensors file one tensor at a time, laid out as the library does it: by dtype and name."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, code, shape, nbytes, _ in sorted(tensors, key=lambda t: (-_RANK.get(t.code, -1), t.name)):
        if name in fields or name == "__metadata__":
            raise ValueError(f"two tensors are called {name!r}; rename one")
        fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    if len(header) > _LONGEST_HEADER:
        raise ValueError(
            f"{path.name} would have a header of {len(header):,} bytes, and safetensors reads {_LONGEST_HEADER:,} "
            "at most; save the model in more shards"
        )
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, chunks in contents:
            first, last = fields[name]["data_offsets"]
            stream.seek(8 + len(header) + first)
            written = sum(stream.write(chunk) for chunk in chunks)
            if written != last - first:
                raise ValueError(f"{name!r} gave {written} bytes where {last - first} were planned")


# ---------------------------------------------------------------- text of unknown origin


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn every failure to read something into a ValueError that begins with these words and ends with the cause."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        text = str(error)  # a damaged file can hold any text in any place
        text = text if len(text) <= 600 else f"{text[:400]} … {text[-150:]}"
        raise ValueError(f"{what}: {text}") from error


def read_json(text: str) -> Any:
    """Read JSON that says everything once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"it has {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_record(text: str, name: str, version: int, parts: Iterable[str]) -> list[dict[str, Any]]:
    """Read a record of this package and return these parts of it, each an object."""
    fields = read_json(text)
    if not isinstance(fields, dict) or fields.get("format") != name:
        raise ValueError(f"it does not say format {name!r}")
    if type(fields.get("version")) is not int or fields["version"] != version:
        raise ValueError(
            f"it is of version {fields.get('version')!r}, and this admm_nxm reads version {version}; use the release "
            "of admm_nxm that wrote it"
        )
    if "weights" not in fields:
        raise ValueError("it names no weights")
    for part in parts:
        if not isinstance(fields.setdefault(part, {}), dict):
            raise ValueError(f"its {part} are no object")
    return [fields[part] for part in parts]


def read_shape(name: str, entry: object) -> tuple[int, ...]:
    """Read the shape that a record gives a weight."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not (isinstance(shape, list) and all(type(size) is int for size in shape) and is_shape(tuple(shape))):
        raise ValueError(f"the shape of {name!r} is {shape!r}, and no tensor can have it")
    return tuple(shape)


def read_weight(name: str, entry: Any) -> tuple[tuple[int, ...], Pattern, int]:
    """Read shape, pattern and grouped dimension that a record gives a weight."""
    shape, dim, spelling = read_shape(name, entry), entry.get("dim"), entry.get("pattern")
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise ValueError(f"the dim of {name!r} is {dim!r}, and its shape {list(shape)}")
    if not isinstance(spelling, str):
        raise ValueError(f"the pattern of {name!r} is {spelling!r}")
    return shape, Pattern.parse(spelling), dim
