"""Show the result of a command: results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import torch


@dataclass(frozen=True)
class Result:
    """The outcome of a command."""

    payload: Mapping[str, Any]
    text: str
    status: int = 0


def note(text: str) -> None:
    """Tell the user something that is no result; if the terminal is gone, the work goes on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise


@contextmanager
def silence() -> Iterator[None]:
    """Keep what libraries warn of and log, short of errors, from standing between the lines of this program."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def width() -> int | None:
    """Return the columns of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(result: Result, stream: TextIO, *, as_json: bool) -> None:
    """Print a result: as one JSON object, or as text, in which a terminal gets the verdicts in colour."""
    encoding = stream.encoding or "utf-8"
    try:
        result.text.encode(encoding, stream.errors or "strict")
        text = result.text
    except UnicodeEncodeError:  # as in names under LC_ALL=C
        text = result.text.encode(encoding, "backslashreplace").decode(encoding)
    if as_json:
        print(json.dumps(plain(result.payload), indent=2, allow_nan=False), file=stream)
    elif stream.isatty():
        from rich.console import Console
        from rich.text import Text

        coloured = Text(text)
        coloured.highlight_regex(r"\bok\b", "bold green")
        coloured.highlight_regex(r"\b(VIOLATED|FAILED)\b[^\n]*", "bold red")
        Console(file=stream).print(coloured, soft_wrap=True)
    else:
        print(text, file=stream)
    stream.flush()


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite become null, what it does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
