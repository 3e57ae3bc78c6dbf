"""Damaged copies of checkpoint files, and what may happen when they are read; shared by the tests and a longer run.

``python -m tests.fuzz_files SECONDS [SEED]`` makes and reads damaged files for that long and prints what came of them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from admm_nxm import Pattern, SelectedWeight, Selection, project, verify
from admm_nxm.io.packed import load_packed, pack, unpack

KEY = "admm_nxm"
NUMBERS: list[Any] = [*range(-1, 9), 15, 16, 64, 255, *(2**power for power in (16, 31, 32, 40, 62, 63, 64)), 1e300]
TEXTS = ["", "x", "1:4", "4:4", "2:8", "1:4096", "F32", "BF16", "U8", "indices"]
OTHERS: list[Any] = [None, True, *TEXTS, [], [4], {}, 1.5]


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and not t.is_meta:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


def tensors() -> tuple[dict[str, Tensor], Selection]:
    """Small weights of several patterns, dtypes and dimensions, and others beside them."""
    cases = {
        "layers.0.a.weight": ((8, 16), "2:4", 1, torch.float32),
        "layers.0.b.weight": ((8, 6), "1:4", 0, torch.bfloat16),
        "layers.1.a.weight": ((3, 10, 2), "3:5", 1, torch.float16),
        "layers.1.b.weight": ((4, 32), "2:16", 1, torch.float8_e4m3fn),
        "layers.1.c.weight": ((2, 0), "2:4", 1, torch.float64),
    }
    made = {
        name: (project(torch.randn(shape), pattern, dim) * (-1 if name.endswith("a.weight") else 1)).to(dtype)
        for name, (shape, pattern, dim, dtype) in cases.items()
    }
    weights = tuple(
        SelectedWeight(name, shape, Pattern.parse(pattern), dim) for name, (shape, pattern, dim, _) in cases.items()
    )
    return {**made, "embed": torch.randn(5, 3), "count": torch.tensor(3)}, Selection(weights, ())


def originals(folder: Path) -> dict[str, Path]:
    """A dense and a packed file, and a dense and a packed sharded folder."""
    torch.manual_seed(0)
    made, selection = tensors()
    places = {name: folder / name for name in ("dense", "packed", "dense folder", "packed folder")}
    save_file(made, places["dense"], metadata={"format": "pt"})
    pack(places["dense"], places["packed"], select=selection)
    places["dense folder"].mkdir()
    names = list(made)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number}.safetensors"
        save_file({name: made[name] for name in part}, places["dense folder"] / file)
        weight_map.update(dict.fromkeys(part, file))
    index = places["dense folder"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2), encoding="utf-8")
    (places["dense folder"] / "config.json").write_text("{}", encoding="utf-8")
    pack(places["dense folder"], places["packed folder"], select=selection)
    return places


# ---------------------------------------------------------------- damage


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(inner, (*path, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """Change, drop, double or rename one thing in a JSON value."""
    value = json.loads(json.dumps(value))
    path = rng.choice(list(leaves(value)) or [()])
    if not path:
        return rng.choice(OTHERS)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    action = rng.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice([str(key) + "x", "", "layers.0.a.weight", "embed", "__metadata__"])] = holder.pop(key)
    elif action == 2 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), rng.choice(NUMBERS))
    elif isinstance(old, (int, float)) and action == 3:
        holder[key] = old + rng.choice([-8, -4, -1, 1, 4, 8])
    else:
        holder[key] = rng.choice([*NUMBERS, *OTHERS])
    return value


def cut(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    place = rng.choice(
        [0, 7, 8, 9, 8 + length - 1, 8 + length, 8 + length + 1, len(data) - 1, rng.randrange(len(data))]
    )
    return data[:place]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_in_data(data: bytes, rng: random.Random) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + flip(data[start:], rng)


def wrong_length(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    new = rng.choice([0, 1, length - 1, length + 1, len(data) - 8, len(data), 2**20, 10**8, 10**9, 2**63, 2**64 - 1])
    return new.to_bytes(8, "little") + data[8:]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    header, rest = parts_of(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        header = mutated(header, rng)
    return joined(header, rest)


def edit_packed(data: bytes, rng: random.Random) -> bytes:
    """Change what the file says of its packed weights, which the library does not look at."""
    header, rest = parts_of(data)
    if KEY not in header.get("__metadata__", {}):
        return edit_header(data, rng)
    described = json.loads(header["__metadata__"][KEY])
    if rng.random() < 0.2:
        text = header["__metadata__"][KEY]
        at = rng.randrange(len(text))
        header["__metadata__"][KEY] = (
            text[:at] + rng.choice(["", "{", "[" * 5000, "9" * 5000, '"', "\\u0000"]) + text[at:]
        )
        return joined(header, rest)
    for _ in range(rng.choice([1, 1, 2, 3])):
        described = mutated(described, rng)
    header["__metadata__"][KEY] = json.dumps(described)
    return joined(header, rest)


def swap_tensors(data: bytes, rng: random.Random) -> bytes:
    header, rest = parts_of(data)
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.choice(names), rng.choice(names)
    header[a], header[b] = header[b], header[a]
    return joined(header, rest)


def garbage(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", rng.randbytes(rng.randrange(1, 200)), b"PK\3\4" + data, data + rng.randbytes(8), data * 2])


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": cut,
    "flip": flip,
    "flip in data": flip_in_data,
    "wrong length": wrong_length,
    "edited header": edit_header,
    "edited packed metadata": edit_packed,
    "swapped tensors": swap_tensors,
    "garbage": garbage,
}


def damage_index(file: Path, rng: random.Random) -> None:
    text = file.read_text(encoding="utf-8")
    if rng.random() < 0.5:
        fields = json.loads(text)
        key = rng.choice(list(fields["weight_map"]))
        fields["weight_map"][key] = rng.choice(
            ["../model-0.safetensors", "/etc/passwd", "", ".", "absent.safetensors", 3, None, [], "config.json", "a\0b"]
        )
        file.write_text(json.dumps(mutated(fields, rng) if rng.random() < 0.3 else fields), encoding="utf-8")
    else:
        file.write_bytes(flip(text.encode(), rng) if rng.random() < 0.5 else text.encode()[: rng.randrange(len(text))])


def damaged_copy(original: Path, place: Path, kind: str, rng: random.Random) -> None:
    """Copy a file or folder, and damage one file of it."""
    if original.is_file():
        place.write_bytes(DAMAGE[kind](original.read_bytes(), rng))
        return
    shutil.copytree(original, place)
    files = sorted(place.glob("*.safetensors"))
    index = sorted(place.glob("*.index.json"))
    if rng.random() < 0.25:
        damage_index(index[0], rng)
        return
    file = rng.choice(files)
    action = rng.random()
    if action < 0.1:
        file.unlink()
    elif action < 0.2:
        file.write_bytes(rng.choice([files[0].read_bytes(), b""]))
    else:
        file.write_bytes(DAMAGE[kind](file.read_bytes(), rng))


# ---------------------------------------------------------------- reading


def size_of(place: Path) -> int:
    return sum(file.stat().st_size for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file())


def read(place: Path, selection: Selection) -> Counter[str]:
    """Read a damaged checkpoint in every way; count what came of it.

    Raises:
        AssertionError: something else than a clear error or a result happened.
    """
    outcomes: Counter[str] = Counter()
    beside = place.parent
    before = sorted(path.name for path in beside.iterdir())
    # 2:16 of 8 bits: two values and a byte of places become sixteen. Counts have 64 bits a group, constants some bytes.
    limit = 64 * size_of(place) + 65536
    ways: dict[str, Callable[[], Any]] = {
        "verify": lambda: verify(place, selection),
        "verify by rules": lambda: verify(place),
        "unpack": lambda: unpack(place, beside / "out"),
        "load_packed": lambda: load_packed(place),
        "pack": lambda: pack(place, beside / "out", select=selection),
    }
    for way, function in ways.items():
        largest = Largest()
        try:
            with largest:
                function()
        except (ValueError, OSError) as error:
            text = str(error)
            assert len(text) < 4000, f"{way}: an error of {len(text)} characters"
            assert text, f"{way}: an error without a word"
            after = sorted(path.name for path in beside.iterdir())
            assert after == before, f"{way}: left behind {set(after) - set(before)}"
            outcomes[f"{way}: refused"] += 1
        else:
            outcomes[f"{way}: read"] += 1
            written = beside / "out"
            if written.is_dir():
                shutil.rmtree(written)
            elif written.exists():
                written.unlink()
            after = sorted(path.name for path in beside.iterdir())
            assert after == before, f"{way}: left behind {set(after) - set(before)}"
        assert largest.bytes <= limit, f"{way}: a tensor of {largest.bytes} bytes from {size_of(place)} bytes"
    return outcomes


def run(seconds: float, seed: int, most: int | None = None) -> tuple[int, Counter[str]]:
    """Damage and read until the time is over or ``most`` files are read."""
    rng = random.Random(seed)
    totals: Counter[str] = Counter()
    count, end = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as root:
        places = originals(Path(root))
        selection = tensors()[1]
        work = Path(root, "work")
        while time.monotonic() < end and (most is None or count < most):
            work.mkdir()
            state = rng.getstate()
            # Most of what can go wrong is in packed files.
            original, kind = places[rng.choice([*places, "packed", "packed folder"])], rng.choice(list(DAMAGE))
            place = work / original.name
            try:
                damaged_copy(original, place, kind, rng)
                totals += read(place, selection)
            except Exception as error:
                rng.setstate(state)
                kept = Path(tempfile.mkdtemp(), "work")
                shutil.copytree(work, kept)
                raise AssertionError(
                    f"file {count} of seed {seed} ({original.name}, {kind}), kept in {kept}"
                ) from error
            totals[f"damage: {kind}"] += 1
            count += 1
            shutil.rmtree(work)
    return count, totals


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, found = run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{number} damaged files")
    for key, value in sorted(found.items()):
        print(f"{value:8}  {key}")
