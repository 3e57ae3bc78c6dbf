"""``admm-nxm report``: what is sparse, what could run on sparse tensor cores, and what that is of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.files import refuse_existing
from .console import Result, note
from .errors import InputError
from .options import Json, PatternText, Select, Source, rules_of

__all__ = ["report"]

_PICTURES = (".svg", ".png", ".pdf")


def report(
    path: Source,
    pattern: PatternText = None,
    select: Select = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the map of the weights: .svg, .png or .pdf.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture that is there.")] = False,
    json: Json = False,  # noqa: ARG001
) -> Result:
    """Show what is sparse and what could be faster.

    Per weight: zeros, violations, and whether sparse tensor cores can take it; for the model: the share of its weights
    and FLOPs that is covered. The exit status is 1 if a weight violates its pattern.
    """
    from ..report import sparsity_report

    parsed, rules = rules_of(pattern, select)
    if plot is not None:
        _check_picture(plot, overwrite=overwrite)
    found = sparsity_report(path, parsed if rules is None else rules)
    if plot is not None:
        from ..report.plots import plot_sparsity, save_figure

        save_figure(plot_sparsity(found), plot)
        note(f"picture {plot}")
    payload = {"command": "report", "path": str(path), "plot": None if plot is None else str(plot), **found.to_dict()}
    return Result(payload, str(found), 0 if found.ok else 1)


def _check_picture(file: Path, *, overwrite: bool) -> None:
    """Find out before all weights are counted that the picture cannot be drawn."""
    import matplotlib as _  # noqa: F401

    if file.suffix.lower() not in _PICTURES:
        kinds = f"{', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}"
        raise InputError(f"--plot {file} ends in {file.suffix or 'nothing'}; a picture ends in {kinds}")
    if file.is_dir():
        raise InputError(f"--plot {file} is a folder; name a file")
    refuse_existing(file, overwrite)
