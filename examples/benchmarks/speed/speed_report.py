"""Write docs/performance.md from the raw records of the speed benchmarks.

    python examples/benchmarks/speed/speed_report.py

Every figure comes from docs/results/speed-DEVICE-BENCHMARK.json. ``--check`` writes nothing and says whether the page
is what the records give. The exit status is 0, 1 if ``--check`` found a difference, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    BENCHMARKS,
    FOLDER,
    ROOT,
    BenchmarkError,
    Column,
    Record,
    Spread,
    Table,
    cell,
    markdown,
    place,
    read_record,
    table_of,
)

DOCS = ROOT / "docs"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
NOT_TIMED = "not yet timed"
PATTERNS = ("1:4", "2:4", "2:8", "4:16")
INTRODUCTION = f"""\
# Speed and memory: results

<!-- Written by {FOLDER}/speed_report.py from the raw records; changes by hand would be lost. -->

Everything on this page is computed from the raw records by `python {FOLDER}/speed_report.py`.
What is measured how, and how to read it, is in `{FOLDER}/README.md`. Times are ratios within one
run, as median and, in brackets, quartiles over its rounds."""

ON_TARGETS = """\
The z/u update must read w and v and write v, 12 bytes a float32 weight, which is one and a half copies. A comparison of
pairs that is written place by place and compiled by `torch.compile` computes a mask in little more than two copies, so
nothing that updates v could be five times faster than that one; the rivals' own masks are told apart from it.

CPU offload of the state is not built: the default's state is an eighth of a byte a weight."""

RIVALS = ("topk", "argsort", "sort, threshold", "pattern matmul (ASP)", "pairwise, eager", "torchao PAT")
"""How other tools find the mask; what torch.compile makes of a comparison of pairs is in none of them."""

Records = Mapping[tuple[str, str], Record]
"""Kind of device, benchmark -> record."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Found:
    """What a target is held against.

    Args:
        value: the figure.
        kind: how it is written.
        detail: which row it is from.
    """

    value: Spread | float
    kind: str
    detail: str


@dataclass(frozen=True)
class Target:
    """Something to reach.

    Args:
        name: what.
        limits: kind of device -> the limit.
        find: the figure on a kind of device; None where its record or row is missing.
        at_least: whether the figure must be at least the limit; at most, otherwise.
        kinds: kind of device -> how the limit is written.
    """

    name: str
    limits: Mapping[str, float]
    find: Callable[[Records, str], Found | None]
    at_least: Mapping[str, bool]
    kinds: Mapping[str, str]


# ------------------------------------------------------------------------------------------------------- figures


def rows_of(records: Records, kind: str, benchmark: str) -> Rows:
    """Return the rows of a record, none where there is none."""
    record = records.get((kind, benchmark))
    return [] if record is None else table_of(record).rows


def of_default(rows: Rows, key: str) -> Mapping[str, Any] | None:
    """Return the row that has a figure in the backend that is taken by default."""
    return next((row for row in rows if row.get("default") and isinstance(row.get(key), Spread)), None)


def penalty(form: str) -> Callable[[Records, str], Found | None]:
    """Return what finds the passes of a form, over AdamW's step."""

    def find(records: Records, kind: str) -> Found | None:
        row = of_default([row for row in rows_of(records, kind, "step") if row["what"] == form], "passes")
        return None if row is None else Found(row["passes"], "number", row["backend"])

    return find


def update(records: Records, kind: str) -> Found | None:
    """Find the z/u update: on a CPU against the fastest rival, the worst of all patterns and dtypes; on a GPU against
    copying."""
    if kind == "cuda":
        row = of_default([row for row in rows_of(records, kind, "step") if row["what"] == "proximal"], "update_share")
        return None if row is None else Found(row["update_share"], "percent", row["backend"])
    rows = [row for row in rows_of(records, kind, "project") if row["what"] == "advance (z and u)"]
    worst: Found | None = None
    for dtype in sorted({row["dtype"] for row in rows}):
        for pattern in PATTERNS:
            key = f"gain {pattern}"
            row = of_default([row for row in rows if row["dtype"] == dtype], key)
            if row is None:
                continue
            against = f"{pattern}, {dtype}, {row['backend']} against {row[f'rival {pattern}']}"
            if worst is None or row[key].median < _median(worst.value):
                worst = Found(row[key], "factor", against)
    return worst


def update_of_rivals(records: Records, kind: str) -> Found | None:
    """Find the z/u update against what rivals run, the worst of all patterns and dtypes."""
    rows = rows_of(records, kind, "project")
    worst: Found | None = None
    for dtype in sorted({row["dtype"] for row in rows}):
        for pattern in PATTERNS:
            key = f"over {pattern}"
            here = [row for row in rows if row["dtype"] == dtype and isinstance(row.get(key), Spread)]
            mine = of_default([row for row in here if row["what"] == "advance (z and u)"], key)
            theirs = [(row[key].median, row["what"]) for row in here if row["what"] in RIVALS]
            if mine is None or not theirs:
                continue
            best, name = min(theirs)
            gain = best / mine[key].median
            if worst is None or gain < _median(worst.value):
                worst = Found(gain, "factor", f"{pattern}, {dtype}, {mine['backend']} against {name}")
    return worst


def training(records: Records, kind: str) -> Found | None:
    """Find the overhead of the constrained phase, the dearest, for BERT-base."""
    for row in rows_of(records, kind, "train"):
        if row["model"] == "BERT-base shape" and row["phase"] == "constrained":
            return Found(row["overhead"], "percent", "constrained phase")
    return None


def state(dtype: str) -> Callable[[Records, str], Found | None]:
    """Return what finds the bytes of state a weight, for the form with the most, at its default."""

    def find(records: Records, kind: str) -> Found | None:
        rows = [
            row for row in rows_of(records, kind, "memory") if row.get("asked") == "default" and row["dtype"] == dtype
        ]
        if not rows:
            return None
        most = max(rows, key=lambda row: float(row["state"]))
        lazy = min(float(row["state"]) for row in rows)
        return Found(float(most["state"]), "number", f"{most['what']}; default form {cell(lazy, 'number')}")

    return find


def _at_most(limit: float, on_gpu: float | None = None) -> Mapping[str, float]:
    return {"cpu": limit, "cuda": limit if on_gpu is None else on_gpu}


_NEVER, _ALWAYS = {"cpu": False, "cuda": False}, {"cpu": True, "cuda": True}
_NUMBER, _PERCENT = {"cpu": "number", "cuda": "number"}, {"cpu": "percent", "cuda": "percent"}

TARGETS = (
    Target("proximal penalty / fused AdamW step", _at_most(0.6, 0.45), penalty("proximal"), _NEVER, _NUMBER),
    Target("gradient penalty / fused AdamW step", _at_most(1.0, 0.6), penalty("gradient"), _NEVER, _NUMBER),
    Target(
        "z/u update: faster than the best rival's mask alone (CPU), of copy speed (GPU)",
        _at_most(5.0, 0.8),
        update,
        _ALWAYS,
        {"cpu": "factor", "cuda": "percent"},
    ),
    Target(
        "the same, against what rivals run, without code compiled for this comparison",
        {"cpu": 5.0},
        update_of_rivals,
        _ALWAYS,
        {"cpu": "factor"},
    ),
    Target("whole training step, BERT-base, over AdamW alone", _at_most(0.02), training, _NEVER, _PERCENT),
    Target("state, bytes a float32 weight", _at_most(4.05), state("float32"), _NEVER, _NUMBER),
    Target("state, bytes a bfloat16 weight", _at_most(2.05), state("bfloat16"), _NEVER, _NUMBER),
)


def _median(value: Spread | float) -> float:
    return value.median if isinstance(value, Spread) else value


def verdict(target: Target, found: Found | None, kind: str) -> str:
    """Say whether a target is met, by the median, and whether the limit lies between the quartiles."""
    if found is None:
        return NOT_TIMED
    limit, value = target.limits[kind], found.value
    middle = _median(value)
    met = middle >= limit if target.at_least[kind] else middle <= limit
    close = isinstance(value, Spread) and len(value.rounds) > 1 and value.low <= limit <= value.high
    return ("met" if met else "**missed**") + (", within the spread" if close else "")


# ---------------------------------------------------------------------------------------------------------- page


def find_records(results: Path) -> dict[tuple[str, str], Record]:
    """Read every record in a folder.

    Raises:
        BenchmarkError: one is malformed, or is not of what its name says.
    """
    records = {}
    for kind in KINDS:
        for benchmark in BENCHMARKS:
            path = results / f"speed-{kind}-{benchmark}.json"
            if not path.is_file():
                continue
            record = read_record(path)
            if (record["device"]["kind"], record["benchmark"]) != (kind, benchmark):
                raise BenchmarkError(
                    f"{path.name} holds benchmark {record['benchmark']} on {record['device']['kind']}; its name says "
                    "otherwise"
                )
            records[kind, benchmark] = record
    return records


def targets(records: Records) -> str:
    """Write the table of targets."""
    columns = [
        Column(key, heading, "text")
        for key, heading in (
            ("target", "target"),
            ("device", "on"),
            ("limit", "limit"),
            ("found", "found"),
            ("verdict", "verdict"),
            ("detail", "of"),
        )
    ]
    rows = []
    for target in TARGETS:
        for kind, name in KINDS.items():
            if kind not in target.limits:
                continue
            found = target.find(records, kind)
            limit = cell(target.limits[kind], target.kinds[kind])
            rows.append(
                {
                    "target": target.name,
                    "device": name,
                    "limit": f"{'at least' if target.at_least[kind] else 'at most'} {limit}",
                    "found": "" if found is None else cell(found.value, found.kind),
                    "verdict": verdict(target, found, kind),
                    "detail": "" if found is None else found.detail,
                }
            )
    return f"## Targets\n\n{markdown(columns, rows)}\n\n{ON_TARGETS}"


def section(records: Records, kind: str, results: Path, start: Path) -> str:
    """Write what was found on one kind of device."""
    parts = [f"## On a {KINDS[kind]}"]
    if not any((kind, benchmark) in records for benchmark in BENCHMARKS):
        return f"{parts[0]}\n\n{NOT_TIMED.capitalize()}. On a machine with a {KINDS[kind]}: `python {FOLDER}/run.py`"
    for benchmark in BENCHMARKS:
        record = records.get((kind, benchmark))
        if record is None:
            command = (
                f"python {FOLDER}/{benchmark}.py --device {kind} --output docs/results/speed-{kind}-{benchmark}.json"
            )
            parts += [f"### {benchmark}", f"{NOT_TIMED.capitalize()}. On a machine with a {KINDS[kind]}: `{command}`"]
            continue
        table: Table = table_of(record)
        raw = (results / f"speed-{kind}-{benchmark}.json").resolve()
        link = Path(os.path.relpath(raw, start)).as_posix()
        at = f" at commit {record['commit']}" if record.get("commit") else ""
        parts += [f"### {benchmark}", f"{table.title}."]
        if record["tiny"]:
            parts.append("**A tiny run: its times mean nothing.**")
        if table.rows:
            parts.append(markdown(table.columns, table.rows))
        parts += ["\n".join(f"- {note}" for note in table.notes)] if table.notes else []
        parts.append(f"`{record['command']}`, {record['date']}{at}, {place(record)}. [Raw record]({link})")
    return "\n\n".join(parts)


def build(results: Path, output: Path) -> str:
    """Compute the page.

    Args:
        results: the folder of raw records.
        output: where the page will lie, which its links start from.

    Returns:
        Its text.

    Raises:
        BenchmarkError: a record is malformed, or a tiny one would get onto the repository's own page.
    """
    records = find_records(results)
    if output.resolve() == (DOCS / "performance.md").resolve():
        for record in records.values():
            if record["tiny"]:
                raise BenchmarkError(f"the record of {record['benchmark']} is a tiny run; it does not belong in docs")
    start = output.resolve().parent
    sections = [section(records, kind, results, start) for kind in KINDS]
    return "\n\n".join([INTRODUCTION, targets(records), *sections]) + "\n"


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="speed_report.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results", help="folder of the raw records")
    parser.add_argument("--output", type=Path, default=DOCS / "performance.md", help="the page")
    parser.add_argument("--check", action="store_true", help="write nothing; show what would change")
    options = parser.parse_args(arguments)
    try:
        text = build(options.results, options.output)
        if options.check:
            old = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
            name = options.output.name
            lines = difflib.unified_diff(old.splitlines(), text.splitlines(), name, "from the records", lineterm="")
            found = list(lines)
            print("\n".join(found) or f"{name} is what the records give")
            return 1 if found else 0
        options.output.write_text(text, encoding="utf-8", newline="\n")
    except (BenchmarkError, OSError) as error:
        print(f"speed_report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
