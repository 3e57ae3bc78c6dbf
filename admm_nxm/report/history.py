"""Record the measurements of a run as rows like those of Trainer's log history."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..io.files import atomic_file
from ..optimizer import ADMMNxM

__all__ = ["Recorder", "Row", "figures_row", "find_admm", "load_history"]

Row = dict[str, Any]


def find_admm(optimizer: Any) -> ADMMNxM | None:
    """Return the ADMMNxM in what Accelerate has put around it; None if there is none."""
    while optimizer is not None and not isinstance(optimizer, ADMMNxM):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def figures_row(optimizer: ADMMNxM) -> Row:
    """Return where a run stands, as :class:`admm_nxm.integrations.transformers.ADMMTrainer` logs it.

    In the paper's form the residuals are measured: that waits for the device and passes over all prunable weights, and
    is a collective where they are sharded.

    Returns:
        ``admm/phase``, ``admm/sparsity``, once they are known ``admm/model_error`` and ``admm/pruned_at``, and in the
        paper's form ``admm/primal_residual``, ``admm/dual_residual``, ``admm/mask_churn`` and ``admm/rho``.
    """
    now = optimizer.figures()
    row: Row = {name: getattr(now, name) for name in ("phase", "sparsity", "model_error", "pruned_at")}
    if optimizer.w_step == "optimizer":
        far = optimizer.residuals()
        row |= {"primal_residual": far.primal, "dual_residual": far.dual, "mask_churn": far.mask_churn, "rho": now.rho}
    # What is not known yet is None, or NaN.
    return {f"admm/{name}": value for name, value in row.items() if value is not None and value == value}


class Recorder:
    """Notes where a run stands, whenever the loop asks for it; :func:`admm_nxm.report.plots.plot_history` draws it.

    Args:
        optimizer: the ADMMNxM, or what Accelerate has made of it.
        rows: rows to go on from, such as :func:`load_history` returns when a run is resumed.

    Raises:
        TypeError: there is no ADMMNxM in ``optimizer``.
    """

    rows: list[Row]
    """A mapping for each reading: the step, the figures of :func:`figures_row`, and what the loop added."""

    def __init__(self, optimizer: Any, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        found = find_admm(optimizer)
        if found is None:
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}; an ADMMNxM, or what Accelerate has made of one, is needed"
            )
        self._optimizer = found
        self.rows = [dict(row) for row in rows]

    def record(self, loss: float | torch.Tensor | None = None, **more: Any) -> Row:
        """Append a row with the present figures.

        Args:
            loss: the loss of the step, a number or a tensor with one entry.
            more: further figures, such as ``eval_accuracy=0.9``; numbers, tensors with one entry, strings, booleans.

        Returns:
            The row.

        Raises:
            TypeError: a figure is of another kind, such as a tensor with more than one entry.
            ValueError: a name is one of those that the recorder fills in.
        """
        given = {name: _plain(name, value) for name, value in {"loss": loss, **more}.items() if value is not None}
        measured = figures_row(self._optimizer)
        if taken := given.keys() & {"step", *measured}:
            raise ValueError(f"{min(taken)!r} is filled in by the recorder; give the figure another name")
        self.rows.append({"step": self._optimizer.figures().step, **given, **measured})
        return self.rows[-1]

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the rows as JSON lines to a file, such as ``history.jsonl``, and return its path.

        What was there is replaced in one go, or left as it was if the file cannot be written. In a run of many
        processes one of them should write.
        """
        path = Path(path)
        # As in Trainer's own files, NaN and Infinity are spelled out: a run that blew up should show it.
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path


def load_history(path: str | PathLike[str]) -> list[Row]:
    """Read the history of a run from a file.

    Args:
        path: JSON lines, as :meth:`Recorder.save` writes them, or the ``trainer_state.json`` of a Trainer's checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else; the message names the line.
    """
    path = Path(path)
    place, rows = str(path), []
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [{**row} for row in json.loads(text)["log_history"]]
        for number, line in enumerate(text.split("\n"), 1):
            place = f"{path}, line {number}"
            if line.strip():
                rows.append({**json.loads(line)})
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # the last: brackets nested by the thousand
        raise ValueError(
            f"{place} is no history ({error!r}); a file of Recorder.save or Trainer's trainer_state.json is needed"
        ) from None
    return rows


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (bool, int, float, str)):
        return value
    try:  # numpy's scalars, and whatever else calls itself a number
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise TypeError(f"{name} is a {kind}; a number, a tensor with one entry or a string is needed") from None
