"""Show the progress of a run on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState

from .console import note

_LINES = 10


def _bar() -> Progress:
    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


class WeightProgress:
    """Shows how many weights are pruned, within a ``with`` block; without a terminal about ten times in all."""

    def __init__(self) -> None:
        self._bar = _bar()
        self._task = self._bar.add_task("", total=None)
        self._shown = -1

    def __enter__(self) -> WeightProgress:
        if not self._bar.disable:  # older rich prints an empty line for none
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def show(self, done: int, total: int, text: str) -> None:
        """Show that so many weights of all are done."""
        self._bar.update(self._task, completed=done, total=total, description=text)
        if self._bar.disable and done * _LINES // total > self._shown:
            self._shown = done * _LINES // total
            note(f"weight {done:>{len(str(total))}}/{total}  {text}")


class StepProgress(TrainerCallback):
    """Shows the steps of a run, its loss and its phase; the bar is a context manager."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.bar = _bar()
        self._task = self.bar.add_task("", total=None)
        self._shown = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar if there is a terminal; older rich prints an empty line where there is none."""
        with suppress(OSError), self.bar if self.on_terminal else nullcontext():  # the terminal may go meanwhile
            yield

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note that a step is done."""
        with suppress(OSError):
            self.bar.update(self._task, completed=state.global_step, total=state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show where the run stands; without a terminal about ten times in all."""
        row: dict[str, Any] = state.log_history[-1]
        if "loss" not in row:
            return
        text = f"loss {row['loss']:.3f}  {row.get('admm/phase', '')}".rstrip()
        step, total = state.global_step, state.max_steps
        with suppress(OSError):
            self.bar.update(self._task, description=text)
        if not self.on_terminal and (step * _LINES // total > self._shown or step in (1, total)):
            self._shown = step * _LINES // total
            note(f"step {step:>{len(str(total))}}/{total}  {text}")
