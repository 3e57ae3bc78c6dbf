"""Options that several commands share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pattern import Pattern
from .errors import InputError, blaming

Rules = dict[str, "str | None"]

Source = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        show_default=False,
        help="A .safetensors file, a folder with a sharded checkpoint, or a model folder; packed ones too.",
    ),
]
PatternText = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        metavar="K:G",
        help="Keep K of every G weights, such as 2:4 or 1:4.  [default: what is recorded with the model, or 2:4]",
    ),
]
Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select",
        metavar="'REGEX=K:G'",
        help="A pattern for the weights whose whole name matches, or REGEX=dense; may be repeated, the first match "
        "counts. Replaces the default choice of weights.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", show_default=False, help="Where to write; must not exist yet.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]


def _number(kind: type[float], low: float, high: float, described: str) -> Callable[[str], Any]:
    """Return what reads a number between two others and refuses the rest, with their value."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise typer.BadParameter(f"{text} is no {described}")
        return number

    return read


a_count = _number(int, 1, sys.maxsize, "whole number of at least 1")
a_rate = _number(float, sys.float_info.min, sys.float_info.max, "finite number above 0, such as 1e-4")
a_seed = _number(int, 0, 2**32 - 1, f"whole number from 0 to {2**32 - 1}")  # which torch and numpy take


def rules_of(pattern: str | None, select: list[str] | None) -> tuple[Pattern | None, Rules | None]:
    """Read ``--pattern`` and ``--select``; each is None if it was not given."""
    if select and pattern is not None:
        raise InputError(
            f"--pattern {pattern} and --select exclude each other, as each --select has a pattern of its own; "
            "leave --pattern out"
        )
    rules: Rules = {}
    for rule in select or ():
        expression, separator, value = rule.rpartition("=")
        if not separator or not expression:
            raise InputError(f"--select {rule} has no pattern; write 'REGEX=K:G', such as '.*attention.*weight=1:4'")
        if expression in rules:
            raise InputError(f"--select names {expression} twice; the first match counts, so leave one out")
        with blaming(f"--select {rule}", ValueError):
            rules[expression] = None if value == "dense" else str(Pattern.parse(value))
    with blaming("--pattern", ValueError):
        return None if pattern is None else Pattern.parse(pattern), rules or None
