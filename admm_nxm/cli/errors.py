"""Errors that the user can put right, each in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Report something that the user can put right; the message is one line that says how."""


@contextmanager
def blaming(cause: str, *kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into an InputError of one line."""
    try:
        yield
    except kinds as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(": ".join(filter(None, (cause, reason))) + remedy) from error


def reason_of(error: BaseException) -> str:
    """Return what an exception says, in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
