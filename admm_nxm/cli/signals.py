"""Requests to end, which clean up as Ctrl-C does: nothing half written is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Ended(BaseException):
    """Somebody asked the process to end; no Exception, so that nothing takes it for a failure to be handled."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"ended by {self.signal.name}")


@contextmanager
def ending() -> Iterator[None]:
    """Raise :class:`Ended` in the block where a signal would end the process without any clean-up."""
    first: list[Ended] = []

    def raise_once(number: int, _: FrameType | None) -> None:
        if not first:  # a terminal that closes sends more than one, and the clean-up must not be cut short
            first.append(Ended(number))
            raise first[0]

    ours: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other can have handlers
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not ignored, as under nohup
                ours[number] = signal.signal(number, raise_once)
    try:
        yield
    except Exception as error:
        if first:
            raise first[0] from error
        raise
    finally:
        for number, usual in ours.items():
            signal.signal(number, usual)
