"""Runs that can be stopped and gone on with: checkpoints in a folder beside the output, and a record of whose."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ..integrations.transformers import ADMMTrainer, last_complete
from .console import note
from .errors import InputError, reason_of
from .signals import Ended

_RECORD = "run.json"


class Run:
    """The folder ``OUT.run``: made with the first checkpoint, and deleted when the output is complete.

    Args:
        output: the folder that the run is to write.
        settings: what makes the run the same one, plain values; keys are names of options.
        resume: whether to go on with what is there.
        overwrite: whether to delete what is there.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.folder = output.with_name(f"{output.name}.run")
        self.settings = dict(settings)
        self.found: dict[str, Any] = {}
        """Finished parts of an earlier call, by name."""
        record = self.folder / _RECORD
        if resume:
            self._take_up(record)
        elif self.folder.exists() and not (overwrite and record.is_file()):
            way_on = "go on with it by --resume, or begin again by --overwrite" if record.is_file() else "move it away"
            raise InputError(f"{self.folder} is there, where this run would keep its checkpoints; {way_on}")
        elif self.folder.exists():
            shutil.rmtree(self.folder)

    def _take_up(self, record: Path) -> None:
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
            before, self.found = known["settings"], known["found"]
        except FileNotFoundError:
            raise InputError(
                f"--resume: no run was stopped at {self.folder}; leave --resume out to begin one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--resume: {record} cannot be read ({reason_of(error)}); begin again by --overwrite"
            ) from None
        changed = [key for key in self.settings if before.get(key) != self.settings[key]]
        if changed:
            option, old, new = changed[0].replace("_", "-"), before.get(changed[0]), self.settings[changed[0]]
            raise InputError(
                f"--resume: the run at {self.folder} was begun with another --{option} ({old}, and now {new}); give "
                "the same options, or begin again by --overwrite"
            )

    def record(self) -> None:
        """Write down whose run it is, and what of it is finished."""
        text = json.dumps({"settings": self.settings, "found": self.found}, indent=2)
        (self.folder / _RECORD).write_text(f"{text}\n", encoding="utf-8")

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Delete the folder at the end, unless the run did not come to it and has a checkpoint."""
        try:
            yield
        except BaseException:
            if not (self.folder / _RECORD).is_file():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)


class _Stop(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear Ctrl-C, SIGTERM and SIGHUP; a second one ends at once, as they do elsewhere."""
        usual: dict[int, Any] = {}

        def hear(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                usual[number](number, frame)
            self.signal = signal.Signals(number)
            note("stop    after this step, with a checkpoint; a second time stops at once")

        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and callable(signal.getsignal(number)):  # not ignored, as under nohup
                    usual[number] = signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if self.signal is not None:
            control.should_training_stop = True


class _Resumable(Trainer):
    """A Trainer that keeps a checkpoint when it is asked to end, and goes on from it."""

    run: Run
    stop: _Stop

    def train_on(self) -> None:
        """Train from the last checkpoint, or from the beginning."""
        self.stop = _Stop()
        self.add_callback(self.stop)
        try:
            last = last_complete(str(self.args.output_dir), 1)
        except ValueError:  # there is none
            last = None
        else:
            note(f"resume  from {last}")
        with self.stop.listening():
            self.train(resume_from_checkpoint=last)
        if self.stop.signal is not None:
            self._save_checkpoint(self.model, None)
            raise KeyboardInterrupt if self.stop.signal == signal.SIGINT else Ended(self.stop.signal)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep a checkpoint if what comes after the training is stopped."""
        try:
            yield
        except (KeyboardInterrupt, Ended):
            self._save_checkpoint(self.model, None)
            raise

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
            self.run.record()
        except Exception as error:  # a full disk has a different error for each kind of file, and must not end the run
            shutil.rmtree(Path(self._get_output_dir(trial), f"checkpoint-{step}"), ignore_errors=True)
            note(f"note    no checkpoint of step {step} could be written: {reason_of(error)}")
        else:
            note(f"kept    step {step} of {self.state.max_steps} in {self.run.folder}; --resume goes on from there")


class DenseTrainer(_Resumable):
    """Trains as it is: the baseline."""


class SparseTrainer(_Resumable, ADMMTrainer):
    """Trains into the pattern."""

    def finalize_admm(self) -> Any:
        """Leave the weights alone where the run is going to go on."""
        return None if self.stop.signal is not None else super().finalize_admm()
