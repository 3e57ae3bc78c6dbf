"""Write docs/results.md and its plots from the raw files of the accuracy study, by one command.

    python examples/benchmarks/accuracy/report.py

Every figure comes from docs/results/*.jsonl. ``--check`` writes nothing and says whether document and plots are what
the raw files give. The exit status is 0, 1 if ``--check`` found a difference, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    from figures import Figure, accuracy_figures, trace_figures, tuning_figures
    from plots import draw
    from records import InputError, find_files, read_runs, read_traces
    from sections import overview, patterns, projection, provenance, traces, verdicts, without_each_task
    from studies import ablations, budgets, tuning
except ImportError as error:
    print(f'report: error: cannot import {error.name}; run: pip install -e ".[study]"', file=sys.stderr)
    sys.exit(2)

DOCS = Path(__file__).resolve().parents[3] / "docs"
MARKS = ("<!-- study -->", "<!-- /study -->")
INTRODUCTION = """\
# Accuracy study: results

<!-- Written by examples/benchmarks/accuracy/report.py from the raw files; changes by hand would be lost. -->

Everything on this page is computed from the raw files by `python examples/benchmarks/accuracy/report.py`. How the runs
were made, what was tuned on what, and what was not run, is in `examples/benchmarks/accuracy/README.md`."""


def build(results: Path, output: Path) -> tuple[str, dict[Figure, Path]]:
    """Compute the document.

    Args:
        results: the folder of raw files.
        output: where the document will lie, which its links start from.

    Returns:
        The text, and each figure with the file it belongs into.

    Raises:
        InputError: a raw file is malformed.
    """
    run_files, trace_files = find_files(results)
    runs, traced = read_runs(run_files), read_traces(trace_files)
    figures = (*accuracy_figures(runs), *tuning_figures(runs), *trace_figures(traced))
    files = {figure: results / figure.name for figure in figures}
    start = output.resolve().parent
    links = {figure: Path(os.path.relpath(path.resolve(), start)).as_posix() for figure, path in files.items()}
    parts = [
        INTRODUCTION,
        "\n\n".join(filter(None, ("## Overview", overview(runs), without_each_task(runs)))),
        provenance(runs, traced, [*run_files, *trace_files]),
        verdicts(runs),
        patterns(runs, links),
        tuning(runs, links),
        budgets(runs),
        ablations(runs),
        projection(runs),
        traces(traced, links),
    ]
    return "\n\n".join(parts) + "\n", files


def with_overview(readme: Path, results: Path) -> str:
    """Put the overview between the marks of a page.

    Args:
        readme: the page.
        results: the folder of raw files.

    Returns:
        Its new text.

    Raises:
        InputError: the page lacks its marks, or a raw file is malformed.
    """
    old = readme.read_text(encoding="utf-8")
    before, opening, rest = old.partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not (opening and closing):
        raise InputError(f"{readme} has no {MARKS[0]} with a {MARKS[1]} behind it; the overview belongs between them")
    return f"{before}{opening}\n\n{overview(read_runs(find_files(results)[0]))}\n\n{closing}{after}"


def write(output: Path, text: str, files: Mapping[Figure, Path]) -> None:
    """Write document and plots.

    Args:
        output: the document.
        text: its text.
        files: each figure and its file.
    """
    drawn = {path: draw(figure) for figure, path in files.items()}
    for path, data in drawn.items():
        path.write_bytes(data)
    output.write_text(text, encoding="utf-8", newline="\n")


def differences(output: Path, text: str, files: Mapping[Figure, Path]) -> list[str]:
    """Compare what lies there with what the raw files give.

    Args:
        output: the document.
        text: what it must say.
        files: each figure and its file; a plot is compared by the digest of its data, not by its drawing.

    Returns:
        The lines of a unified diff, and one for each plot that is missing or of other data; none if all is well.
    """
    old = output.read_text(encoding="utf-8") if output.is_file() else ""
    found = list(
        difflib.unified_diff(old.splitlines(), text.splitlines(), output.name, "from the raw files", lineterm="")
    )
    for figure, path in files.items():
        if not path.is_file():
            found.append(f"{path.name}: missing")
        elif figure.digest not in path.read_text(encoding="utf-8"):
            found.append(f"{path.name}: not drawn from these data")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line, by default that of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results", help="folder of the raw files and plots")
    parser.add_argument("--output", type=Path, default=DOCS / "results.md", help="the document")
    parser.add_argument("--readme", type=Path, help="page that repeats the overview (by default the repository's own)")
    parser.add_argument("--check", action="store_true", help="write nothing; show what would change")
    options = parser.parse_args(arguments)
    own = options.output.resolve() == (DOCS / "results.md").resolve()
    readme = options.readme or (DOCS.parent / "README.md" if own else None)
    try:
        text, files = build(options.results, options.output)
        page = None if readme is None else with_overview(readme, options.results)
        if options.check:
            found = differences(options.output, text, files)
            if readme is not None and page is not None:
                found += differences(readme, page, {})
            print("\n".join(found) or f"{options.output.name} is what the raw files give")
            return 1 if found else 0
        write(options.output, text, files)
        if readme is not None and page is not None:
            write(readme, page, {})
    except ImportError as error:
        print(f'report: error: cannot import {error.name}; run: pip install -e ".[study]"', file=sys.stderr)
        return 2
    except (InputError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output.name} and {len(files)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
