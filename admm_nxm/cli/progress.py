"""How far a run is: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .console import note

__all__ = ["StepProgress"]

_LINES = 10


class StepProgress:
    """Shows a number of steps; a context manager."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._step = 0
        self._shown = 0
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, status="")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Note that so many steps are done."""
        self._step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def status(self, text: str) -> None:
        """Show where the run stands; without a terminal about ten times in all."""
        if self._bar is not None:
            self._bar.update(self._task, status=text)
        elif self._step * _LINES // self.total > self._shown or self._step in (1, self.total):
            self._shown = self._step * _LINES // self.total
            note(f"step {self._step:>{len(str(self.total))}}/{self.total}  {text}")
