"""What the speed benchmarks share: variants timed side by side, one table, and its raw record as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "examples/benchmarks/speed"
BENCHMARKS = ("step", "train", "solve", "inference")
"""Every benchmark, in the order of the report. Each is a script of that name."""

PACKAGES = ("torch", "admm-nxm", "torchao", "transformers")

Record = dict[str, Any]
Options = argparse.Namespace
Sizes = Mapping[str, tuple[Any, Any]]
"""Name of an option -> its value in a real run, and with --tiny."""


class BenchmarkError(Exception):
    """What the user asked for cannot be measured here; the message says why and what can."""


# ---------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Args:
        name: unique among those it is compared with.
        call: what is timed.
        units: how many of the thing one call does; times are for one of them.
    """

    name: str
    call: Callable[[], object]
    units: int = 1


@dataclass(frozen=True)
class Spread:
    """One figure of every round: its median, and the quartiles as its spread."""

    rounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise ValueError("a spread needs the figures of one round at least")

    @property
    def median(self) -> float:
        return self._quantile(0.5)

    @property
    def low(self) -> float:
        return self._quantile(0.25)

    @property
    def high(self) -> float:
        return self._quantile(0.75)

    def times(self, factor: float) -> Spread:
        return Spread(tuple(factor * value for value in self.rounds))

    def _quantile(self, share: float) -> float:
        ordered = sorted(self.rounds)
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Timings:
    """Seconds of each variant in each round; None where a slow variant sat a round out."""

    seconds: Mapping[str, Sequence[float | None]]

    def spread(self, name: str) -> Spread:
        """Return the seconds of one variant."""
        return Spread(tuple(value for value in self.seconds[name] if value is not None))

    def ratio(self, name: str, base: str) -> Spread:
        """Return one variant's time over another's, round by round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Spread(tuple(a / b for a, b in pairs if a is not None and b is not None))


def interleave(
    variants: Sequence[Variant],
    *,
    rounds: int,
    device: torch.device,
    seed: int,
    warmup: int = 2,
    shortest: float = 0.005,
    patience: float = 2.0,
) -> Timings:
    """Time variants side by side: in every round each of them once, in random order, so that whatever else the
    machine does meets all alike.

    Args:
        variants: what to time.
        rounds: how many times each.
        device: what to wait for.
        seed: of the order.
        warmup: calls of each before the first round.
        shortest: a faster call is repeated until it takes this many seconds.
        patience: a slower call is made in fewer rounds, three at least, evenly spread.

    Returns:
        Seconds for one unit of each variant in each round.
    """
    repeats, attended = {}, {}
    for variant in variants:
        for _ in range(warmup):
            elapsed = stopwatch(variant.call, 1, device)
        repeats[variant.name] = min(1000, max(1, math.ceil(shortest / max(elapsed, 1e-9))))
        often = rounds if elapsed <= patience else max(3, int(rounds * patience / elapsed))
        attended[variant.name] = min(rounds, often)
    order = random.Random(seed)
    seconds: dict[str, list[float | None]] = {variant.name: [None] * rounds for variant in variants}
    for number in range(rounds):
        for variant in order.sample(list(variants), len(variants)):
            share = attended[variant.name]
            # Evenly spread, the first round among them.
            if number * share // rounds == (number - 1) * share // rounds:
                continue
            count = repeats[variant.name]
            seconds[variant.name][number] = stopwatch(variant.call, count, device) / (count * variant.units)
    return Timings(seconds)


def stopwatch(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the seconds that ``count`` calls take on the device, waiting included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = event()
        for _ in range(count):
            call()
        end = event()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin


def event() -> Any:
    """Return a CUDA event that is recorded now."""
    recorded = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
    recorded.record()  # type: ignore[no-untyped-call,unused-ignore]
    return recorded


# ---------------------------------------------------------------------------------------------------- where it ran


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: torch.device) -> dict[str, Any]:
    """Say what a device is."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
        }
    return {"kind": device.type, "name": _processor(), "cores": cores(), "threads": torch.get_num_threads()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that play a part here, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """Return the commit of the checkout; ``+`` if files of the package differ from it; None outside of a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "admm_nxm", FOLDER]
        changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


# ---------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: of the cells in the rows.
        heading: above them.
        kind: how they are written: ``text``, ``number``, ``percent`` (of 1) or ``factor`` (with an x).
    """

    key: str
    heading: str
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    """What a benchmark found.

    Args:
        title: what is measured, in a sentence.
        columns: its columns.
        rows: key -> text, number, Spread or None; keys without a column are for the report.
        notes: sentences below the table.
        seconds: raw times: variant -> one of each round.
        ran: False where this device cannot do it; the notes say why.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    seconds: Mapping[str, Sequence[float | None]] | None = None
    ran: bool = True


def cell(value: Any, kind: str) -> str:
    """Write one cell: a spread as its median and, in brackets, its quartiles."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Spread):
        if len(value.rounds) == 1:
            return cell(value.median, kind)
        low, high = (_plain(end, kind) for end in (value.low, value.high))
        return f"{cell(value.median, kind)} [{low}, {high}]"
    return _plain(value, kind) + {"percent": " %", "factor": "x"}.get(kind, "")


def _plain(value: float, kind: str) -> str:
    value = 100 * value if kind == "percent" else value
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 or kind == "percent" else 2 if size >= 1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"


def markdown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, aligned: bool = False) -> str:
    """Write a table in Markdown.

    Args:
        columns: its columns.
        rows: its rows.
        aligned: whether cells are padded, for reading as it is.

    Returns:
        The lines, without a newline at the end.
    """
    texts = [[column.heading for column in columns]]
    texts += [[cell(row.get(column.key), column.kind) for column in columns] for row in rows]
    texts = [[text.replace("|", "\\|") for text in line] for line in texts]
    widths = [max(len(line[i]) for line in texts) if aligned else 0 for i in range(len(columns))]
    left = [column.kind == "text" for column in columns]
    padded = [
        [
            text.ljust(width) if to_left else text.rjust(width)
            for text, width, to_left in zip(line, widths, left, strict=True)
        ]
        for line in texts
    ]
    rule = [
        "-" * max(3, width) if to_left else "-" * max(3, width - 1) + ":"
        for width, to_left in zip(widths, left, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


# --------------------------------------------------------------------------------------------------------- records


def record_of(name: str, table: Table, device: torch.device, options: Options, command: str) -> Record:
    """Put a table and where it comes from into plain values."""
    return {
        "benchmark": name,
        "ran": table.ran,
        "tiny": bool(options.tiny),
        "command": command,
        "date": date.today().isoformat(),
        "commit": commit(),
        "device": describe(device),
        "versions": versions(),
        "options": {key: _encode(value) for key, value in sorted(vars(options).items()) if key != "output"},
        "title": table.title,
        "columns": [[column.key, column.heading, column.kind] for column in table.columns],
        "rows": [{key: _encode(value) for key, value in row.items()} for row in table.rows],
        "notes": list(table.notes),
        "seconds": {key: _encode(list(values)) for key, values in (table.seconds or {}).items()},
    }


def table_of(record: Record) -> Table:
    """Read the table back."""
    return Table(
        record["title"],
        [Column(*column) for column in record["columns"]],
        [{key: _decode(value) for key, value in row.items()} for row in record["rows"]],
        record["notes"],
        record["seconds"],
        record["ran"],
    )


def _encode(value: Any) -> Any:
    if isinstance(value, Spread):
        parts = {"median": value.median, "low": value.low, "high": value.high, "rounds": list(value.rounds)}
        return {key: _encode(part) for key, part in parts.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _decode(value: Any) -> Any:
    return Spread(tuple(value["rounds"])) if isinstance(value, dict) else value


def write_record(record: Record, path: Path) -> None:
    """Write a record as JSON, a row and a list of times to a line."""

    def lines(values: Sequence[str], brackets: str) -> str:
        return f"{brackets[0]}\n  " + ",\n  ".join(values) + f"\n {brackets[1]}" if values else brackets

    parts = {
        **{key: json.dumps(value) for key, value in record.items()},
        "rows": lines([json.dumps(row) for row in record["rows"]], "[]"),
        "seconds": lines([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record["seconds"].items()], "{}"),
    }
    text = ",\n ".join(f"{json.dumps(key)}: {value}" for key, value in parts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + text + "}\n", encoding="utf-8", newline="\n")


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        BenchmarkError: it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"benchmark", "ran", "tiny", "command", "device", "versions", "columns", "rows"} - record.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        table_of(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path.name} is no record of a benchmark: {error}") from error
    found: Record = record
    return found


# ----------------------------------------------------------------------------------------------- the command line


def count(text: str) -> int:
    """Read a positive number, with or without separators: 28_000_000, 28M, 1e6."""
    spelled = text.replace(",", "").replace("_", "").upper()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(spelled[-1:], 1)
    value = float(spelled[:-1] if scale != 1 else spelled) * scale
    if not (value >= 1 and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)


def counts(text: str) -> list[int]:
    """Read several, separated by commas."""
    return [count(part) for part in text.split(",")]


def device_of(name: str | None) -> torch.device:
    """Return the device of that name, by default the fastest kind here.

    Raises:
        BenchmarkError: there is none, or it is of a kind that the benchmarks do not know.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BenchmarkError(f"--device {name} is no device; give cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise BenchmarkError(f"--device {name}: these benchmarks know how to time cpu and cuda only")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError(f"--device {name}: torch {torch.__version__} finds no CUDA device; give --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchmarkError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


@contextlib.contextmanager
def threads_of(number: int | None) -> Iterator[None]:
    """Let torch use that many threads for a while; None leaves them as they are.

    Raises:
        BenchmarkError: there are fewer cores than that.
    """
    if number is not None and number > cores():
        raise BenchmarkError(f"--threads {number}: this process may use {cores()} cores; give at most that many")
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(
    name: str,
    doc: str | None,
    measure: Callable[[Options, torch.device], Table],
    arguments: Sequence[str] | None,
    *,
    sizes: Sizes,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda _parser: None,
) -> int:
    """Run one benchmark as a command.

    Args:
        name: of the benchmark.
        doc: its description, the first paragraph of which is shown by --help.
        measure: does it.
        arguments: the command line, by default that of the process.
        sizes: what the options that are left out come to.
        add_options: adds options of its own.

    Returns:
        The exit status: 0, or 2 if it cannot be measured here.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default cuda where there is one")
    parser.add_argument("--threads", type=count, help="torch's threads on a CPU; by default what torch chooses")
    parser.add_argument("--rounds", type=count, help="how many times each variant is timed")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order within a round")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; its times mean nothing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the raw record as JSON")
    add_options(parser)
    options = parser.parse_args(arguments)
    command = _command(name, sys.argv[1:] if arguments is None else arguments)
    for key, (real, tiny) in sizes.items():
        if getattr(options, key) is None:
            setattr(options, key, tiny if options.tiny else real)
    try:
        device = device_of(options.device)
        with threads_of(options.threads):
            table = measure(options, device)
            record = record_of(name, table, device, options, command)
    except BenchmarkError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    print(f"{table.title}\n{place(record)}" + ("; --tiny, so times mean nothing" if options.tiny else ""))
    if table.rows:
        print("", markdown(table.columns, table.rows, aligned=True), sep="\n")
    print("", *table.notes, sep="\n")
    if options.output is not None:
        write_record(record, options.output)
    return 0


def _command(name: str, arguments: Sequence[str]) -> str:
    """Spell the command as anyone would give it in a checkout, without where the record went."""
    kept, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--output":
            rest = rest[1:]
        elif not word.startswith("--output="):
            kept.append(word)
    return shlex.join(["python", f"{FOLDER}/{name}.py", *kept])


def place(record: Record) -> str:
    """Say which device and which versions a record is of."""
    device = record["device"]
    if device["kind"] == "cuda":
        where = f"{device['name']} ({device['memory_gib']} GiB, CUDA {device['cuda']})"
    else:
        numbers = ", ".join(f"{device[key]} {key[:-1] if device[key] == 1 else key}" for key in ("cores", "threads"))
        where = f"{device['name']}, {numbers}"
    return f"{where}; " + ", ".join(f"{package} {version}" for package, version in record["versions"].items())
