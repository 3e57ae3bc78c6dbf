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
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import (
    BENCHMARKS,
    FOLDER,
    ROOT,
    BenchmarkError,
    Record,
    Table,
    markdown,
    place,
    read_record,
    table_of,
)

DOCS = ROOT / "docs"
KINDS = {"cpu": "CPU", "cuda": "GPU"}
NOT_TIMED = "not yet timed"
INTRODUCTION = f"""\
# Speed and memory: results

<!-- Written by {FOLDER}/speed_report.py from the raw records; changes by hand would be lost. -->

- **Before calibration** a step is your optimizer's own, bit for bit. Nothing is added.
- **A calibration step** takes 1.86 times as long as an ordinary one at BERT-base (quartiles 1.49 to 2.04 over 9 rounds;
  8 x 128 tokens, float32, one thread of a busy Intel Xeon, 2026-11-28; the target was 2.5 times). A run has 16 of them.
  Command: `python {FOLDER}/calibration.py`. With MiniLM under bfloat16 autocast it takes 2.2
  times as long (3 rounds; `--model minilm --autocast --rounds 3`).
- **The solve** is one step. With A alone it takes 4.9 times (MiniLM) and 6.7 times (BERT-base) the processor time of
  SparseGPT's update, and has 0.59 and 0.45 of its error. With G it takes 8.2 and 11.6 times as long
  ([how that was measured](algorithm.md#how-fast-it-is)).
- **Memory** during calibration: A and G of BERT-base take 1,189 MB in one window. `statistics_memory` makes it less.
  Afterwards a boolean mask stays, one byte a weight.
"""

METHOD = f"""\
The tables below are computed from the raw records by `python {FOLDER}/speed_report.py`. The
file `{FOLDER}/README.md` says what is measured and how. Times are ratios within one run, as median
and, in brackets, quartiles over its rounds."""

Records = Mapping[tuple[str, str], Record]
"""Kind of device, benchmark -> record."""

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


def summary(records: Records) -> str:
    """Say on which kinds of device the tables were measured."""
    said = []
    for kind, name in KINDS.items():
        found = [records[kind, benchmark] for benchmark in BENCHMARKS if (kind, benchmark) in records]
        where = sorted({f"{place(record)}, {record['date']}" for record in found})
        said.append(f"- **On a {name}:** {'; '.join(where) if where else NOT_TIMED}.")
    return "\n".join(said)


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
    return "\n\n".join([INTRODUCTION + summary(records), METHOD, *sections]) + "\n"


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
