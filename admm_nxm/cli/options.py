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


def one_of(*words: str) -> Callable[[str], str]:
    """Return what reads one of these words."""

    def read(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text} is none of {', '.join(words)}")
        return text

    return read


def _a_path(what: str) -> Any:
    return typer.Argument(metavar="PATH", show_default=False, help=what)


def _a_pattern(default: str) -> Any:
    text = f"Keep K of every G weights, such as 2:4 or 1:4.  [default: {default}]"
    return typer.Option("--pattern", metavar="K:G", help=text)


_KINDS = "A .safetensors file, a folder with a sharded checkpoint, or a model folder"
Source = Annotated[Path, _a_path(f"{_KINDS}; not packed.")]
AnySource = Annotated[Path, _a_path(f"{_KINDS}; packed ones too.")]
PackedSource = Annotated[Path, _a_path("A packed file or folder.")]
PatternText = Annotated[str | None, _a_pattern("2:4")]
RecordedPattern = Annotated[str | None, _a_pattern("what is recorded with the model, or 2:4")]
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
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", show_default=False, help="Where to write; what is there needs --overwrite."
    ),
]
PerWeight = Annotated[bool, typer.Option("--per-weight", help="A line for each weight, not for each kind.")]
TextColumns = Annotated[
    list[str] | None,
    typer.Option("--text-column", metavar="NAME", help="Column of the text; give it twice for pairs.  [default: text]"),
]
OnBadRow = Annotated[
    str,
    typer.Option(
        parser=one_of("error", "skip"), metavar="error|skip", help="What to do with rows without a text or a label."
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]


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
