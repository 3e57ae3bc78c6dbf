"""The raw files of the accuracy study: one run a line, every line checked before any figure is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("tune", "final", "explore", "layers")
KEY = ("task", "model", "pattern", "method", "seed", "lr", "steps", "stage")


class InputError(Exception):
    """A raw file says something it may not; the message names file and line."""


def bad_line(where: str, what: str) -> InputError:
    """Return the error that names a line and what to do about it.

    Args:
        where: file and line.
        what: what is wrong.
    """
    return InputError(f"{where}: {what}; delete this line: the study makes its run again")


@dataclass(frozen=True)
class Check:
    """What a value must be: a test of it, and the words for it."""

    holds: Callable[[Any], bool]
    wanted: str


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Check(_is_text, "a text of one line")
COUNT = Check(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "an int, at least 0")
NUMBER = Check(_is_number, "a finite number")
AMOUNT = Check(lambda v: _is_number(v) and v >= 0, "a finite number, at least 0")
PERCENT = Check(lambda v: _is_number(v) and 0 <= v <= 100, "a number from 0 to 100")
OBJECT = Check(lambda v: isinstance(v, dict) and all(map(_is_text, v)), "an object")


def or_null(check: Check) -> Check:
    """Allow null as well."""
    return Check(lambda value: value is None or check.holds(value), f"{check.wanted}, or null")


SHARED: dict[str, Check] = {
    "task": TEXT,
    "model": TEXT,
    "pattern": or_null(TEXT),
    "method": TEXT,
    "seed": COUNT,
    "lr": AMOUNT,
    "steps": COUNT,
    "stage": Check(lambda value: value in STAGES, f"one of {', '.join(STAGES)}"),
    "setting": OBJECT,
    "seconds": AMOUNT,
    "device": TEXT,
    "commit": TEXT,
    "versions": Check(lambda v: isinstance(v, dict) and all(map(_is_text, (*v, *v.values()))), "an object of texts"),
}
RUN: dict[str, Check] = {
    **SHARED,
    "dev": or_null(PERCENT),
    "test": or_null(PERCENT),
    "model_error": or_null(AMOUNT),
    "from_step": COUNT,
}
LAYER: dict[str, Check] = {
    **SHARED,
    "weight": TEXT,
    "model_error": AMOUNT,
    "predicted": AMOUNT,
    "loss": NUMBER,
    "dev": NUMBER,
}


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells one run from another.

    Args:
        line: a line of raw results.

    Returns:
        Its values at KEY, and its setting as text.
    """
    return (*(line[name] for name in KEY), json.dumps(line["setting"], sort_keys=True))


def read(folder: Path) -> list[dict[str, Any]]:
    """Read and check every line.

    Args:
        folder: where the raw files lie.

    Returns:
        The lines, in the order of files and of lines.

    Raises:
        InputError: ``folder`` is not a folder, a line is malformed, or two lines are the same run.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of results")
    lines = []
    seen: dict[tuple[Any, ...], str] = {}
    for where, value in lines_of(sorted(folder.glob("*.jsonl"))):
        line = _checked(value, where)
        key = (*key_of(line), line.get("weight"))
        if key in seen:
            raise bad_line(where, f"the same run as {seen[key]}")
        seen[key] = where
        lines.append(line)
    return lines


def lines_of(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line stands, and the JSON object that it is."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path.name}: cannot be read: {error}") from error
        # Not splitlines(), which also cuts at separators that JSON allows inside a text.
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
            yield (where := f"{path.name}:{number}"), _parsed(line, where)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise bad_line(where, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad_line(where, f"must be a JSON object, not {_shorten(value)}")
    return value


def checked(line: dict[str, Any], where: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return a line that has the keys of ``checks`` and no others, with the values that they allow."""
    if unknown := sorted(set(line) - set(checks)):
        raise bad_line(where, f"unknown key {unknown[0]!r}, known are {', '.join(checks)}")
    if missing := [key for key in checks if key not in line]:
        raise bad_line(where, f"no key {missing[0]!r}")
    for key, check in checks.items():
        if not check.holds(line[key]):
            raise bad_line(where, f"{key}={_shorten(line[key])} must be {check.wanted}")
    return line


def _checked(value: dict[str, Any], where: str) -> dict[str, Any]:
    checks = LAYER if value.get("stage") == "layers" else RUN
    line = checked(value, where, checks)
    if (line["pattern"] is None) != (line["method"] == "dense"):
        raise bad_line(where, "the pattern is null for dense runs and for no others")
    if checks is RUN and (
        (line["test"] is None) != (line["stage"] != "final") or (line["dev"] is None) == (line["test"] is None)
    ):
        raise bad_line(where, "final runs have a score on test alone, all others on dev alone")
    return line


def _shorten(value: object, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "…"
