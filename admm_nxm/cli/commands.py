"""The commands on saved models: ``verify``, ``report``, ``pack`` and ``unpack``."""

# ruff: noqa: ARG001 - ``json`` is read from the command line as a whole, see app.py

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from ..io.files import refuse_existing
from ..io.packed import PackReport
from ..io.verify import verify as count
from ..sparsity import SparsityReport, SparsityViolation
from .console import Result, note, width
from .errors import InputError
from .options import (
    AnySource,
    Json,
    Output,
    Overwrite,
    PackedSource,
    PerWeight,
    RecordedPattern,
    Select,
    Source,
    rules_of,
)


def verify(
    path: AnySource,
    pattern: RecordedPattern = None,
    select: Select = None,
    per_weight: PerWeight = False,
    json: Json = False,
) -> Result:
    """Check that all groups keep to the pattern.

    Every group of every covered weight is counted, with one weight in memory at a time. The exit status is 1 if one
    violates its pattern.
    """
    parsed, rules = rules_of(pattern, select)
    report = count(path, parsed if rules is None else rules)
    return Result(
        {"command": "verify", "path": str(path), **as_dict(report)}, as_text(report, per_weight), 0 if report.ok else 1
    )


def as_text(report: SparsityReport | PackReport, per_weight: bool) -> str:
    """Return a report as tables that fit the terminal."""
    return report.to_text(per_weight=per_weight, width=width())


def as_dict(report: SparsityReport) -> dict[str, Any]:
    """Return a count as JSON has it."""
    return {
        "ok": report.ok,
        "sparsity": report.sparsity,
        "violations": len(report.violations),
        "weights": _fields(report, "name", "shape", "pattern", "dim", "groups", "bad_groups", "zeros"),
        "skipped": _fields(report.skipped, "name", "reason"),
    }


def _fields(records: Iterable[object], *names: str) -> list[dict[str, Any]]:
    return [{name: getattr(record, name) for name in names} for record in records]


def report(
    path: AnySource,
    pattern: RecordedPattern = None,
    select: Select = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the map of the weights: .svg, .png or .pdf.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture that is there.")] = False,
    per_weight: PerWeight = False,
    json: Json = False,
) -> Result:
    """Show what is sparse and what could be faster.

    Per weight: zeros, violations, and whether sparse tensor cores can take it; for the model: the share of its
    parameters that is covered. The exit status is 1 if a weight violates its pattern.
    """
    from ..report import model_report

    parsed, rules = rules_of(pattern, select)
    if plot is not None:
        _check_picture(plot, overwrite=overwrite)
    found = model_report(path, parsed if rules is None else rules)
    if plot is not None:
        from ..report.plots import plot_sparsity, save_figure

        save_figure(plot_sparsity(found), plot)
        note(f"picture {plot}")
    payload = {"command": "report", "path": str(path), "plot": None if plot is None else str(plot), **found.to_dict()}
    return Result(payload, as_text(found, per_weight), 0 if found.ok else 1)


def _check_picture(file: Path, *, overwrite: bool) -> None:
    """Find out before all weights are counted that the picture cannot be drawn."""
    import matplotlib as _  # noqa: F401

    if file.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise InputError(f"--plot {file} ends in {file.suffix or 'nothing'}; a picture ends in .svg, .png or .pdf")
    if file.is_dir():
        raise InputError(f"--plot {file} is a folder; name a file")
    refuse_existing(file, overwrite)


def pack(
    path: Source,
    output: Output,
    pattern: RecordedPattern = None,
    select: Select = None,
    overwrite: Overwrite = False,
    per_weight: PerWeight = False,
    json: Json = False,
) -> Result:
    """Store a sparse model without its zeros.

    Nothing is lost: `unpack` gives every bit back. The exit status is 1, and nothing is written, if a weight violates
    its pattern.
    """
    from ..io.packed import pack as pack_files

    parsed, rules = rules_of(pattern, select)
    payload: dict[str, Any] = {"command": "pack", "path": str(path), "output": str(output), "ok": True}
    try:
        report = pack_files(path, output, parsed, select=rules, overwrite=overwrite)
    except SparsityViolation as violation:
        text = f"VIOLATED: {violation}\nnothing is written; `verify` with the same rules counts every weight"
        return Result({**payload, "ok": False, "violation": str(violation)}, text, 1)
    sizes = ("bytes_before", "bytes_after")
    payload |= {name: getattr(report, name) for name in (*sizes, "ratio")}
    payload["weights"] = _fields(report, "name", "shape", "pattern", "dim", *sizes, "dtype")
    payload |= {"skipped": _fields(report.skipped, "name", "reason"), "left_out": report.left_out}
    saved = f"saved to {output}; `admm-nxm unpack {quote(str(output))} -o ...` gives it back bit for bit"
    return Result(payload, f"{as_text(report, per_weight)}\n{saved}")


def unpack(path: PackedSource, output: Output, overwrite: Overwrite = False, json: Json = False) -> Result:
    """Give a packed model back, bit for bit."""
    from ..io.packed import unpack as unpack_files

    unpack_files(path, output, overwrite=overwrite)
    payload = {"command": "unpack", "ok": True, "path": str(path), "output": str(output)}
    return Result(payload, f"saved to {output}")
