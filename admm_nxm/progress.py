"""The counters of a run: a typed view of numbers that lie in every parameter group.

They lie there because torch.distributed.checkpoint carries nothing else of a run than the groups and the state of each
parameter. Nobody else reads or writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["COUNTERS", "Figures", "Progress", "counters_of"]

_Number = TypeVar("_Number", int, float)


class _Counter(Generic[_Number]):
    """One number, read from the first group and written to all."""

    def __init__(self, initial: _Number) -> None:
        self.initial: _Number = initial

    def __set_name__(self, owner: type[object], name: str) -> None:
        self.key = f"admm_{name}"
        COUNTERS[self.key] = self.initial

    def __get__(self, progress: Progress, owner: type[Progress]) -> _Number:
        value: _Number = progress.inner.param_groups[0].get(self.key, self.initial)
        return value

    def __set__(self, progress: Progress, value: _Number) -> None:
        for group in progress.inner.param_groups:
            group[self.key] = value


COUNTERS: dict[str, int | float] = {}
"""Key in the parameter groups -> its value before the first step."""


class Progress:
    """Read and write the counters of a run.

    Args:
        inner: the optimizer whose parameter groups hold the counters; they are looked up again each time, because
            loading a state dict replaces them.
    """

    step = _Counter(0)  # finished optimizer steps
    windows_solved = _Counter(0)  # exact w-step: windows whose weights are pruned
    windows = _Counter(0)  # exact w-step: how many windows there are
    calibrated = _Counter(0)  # exact w-step: calibration steps of the present window
    pruned_at = _Counter(-1)  # the step after which the last mask was set; -1 before
    finalized = _Counter(0)  # whether ``finalize()`` was called
    selection = _Counter(0)  # a number that tells one selection from another
    rho = _Counter(0.0)  # paper's form: the penalty in force
    dual_in_use = _Counter(0)  # paper's form: whether u may be non-zero
    residual = _Counter(-1.0)  # paper's form: the primal residual at the freeze; -1 before
    worst_residual = _Counter(-1.0)  # paper's form: that of the worst weight
    churn = _Counter(-1.0)  # paper's form: the share of kept places that the last z-step before the freeze replaced

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def frozen(self) -> bool:
        """Whether all masks are set."""
        return self.pruned_at >= 0

    def announce(self) -> None:
        """Write every counter into every group, as loaders look for the keys there."""
        self.load({key: self.inner.param_groups[0].get(key, value) for key, value in COUNTERS.items()})

    def load(self, counters: Mapping[str, int | float]) -> None:
        """Set all counters."""
        for group in self.inner.param_groups:
            group.update(counters)

    def clear(self) -> None:
        """Take the counters out of the groups."""
        for group in self.inner.param_groups:
            for key in COUNTERS:
                group.pop(key, None)


def counters_of(state_dict: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the counters of a checkpoint; those that it lacks as they are at the start."""
    found = {key: state_dict["param_groups"][0].get(key, value) for key, value in COUNTERS.items()}
    for key, value in found.items():
        # Loaders may have made a tensor of a number.
        number = value.item() if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta else value
        fits = isinstance(number, (int, float)) and min(0, COUNTERS[key]) <= number < 2**63
        if not fits or (isinstance(COUNTERS[key], int) and number != int(number)):
            raise ValueError(f"the checkpoint's {key} is {value!r}, which it cannot be: the checkpoint is damaged")
        found[key] = type(COUNTERS[key])(number)
    if found["admm_pruned_at"] > found["admm_step"]:
        raise ValueError(
            f"the checkpoint is at ADMM step {found['admm_step']} and its weights were pruned at step "
            f"{found['admm_pruned_at']}: the checkpoint is damaged"
        )
    if found["admm_windows_solved"] >= max(found["admm_windows"], 1) and found["admm_pruned_at"] < 0:
        raise ValueError(
            f"the checkpoint has solved {found['admm_windows_solved']} of {found['admm_windows']} windows, and its "
            "masks are not frozen: the checkpoint is damaged"
        )
    return found


@dataclass(frozen=True)
class Figures:
    """Describe the state of a run in plain numbers.

    Args:
        phase: ``"dense"``, ``"calibration"`` or ``"frozen"``; the paper's form has ``"admm"`` and ``"frozen"``.
        step: finished optimizer steps.
        total_steps: optimizer steps of the whole run; None if unknown.
        prune_at: the step after which the weights are pruned.
        windows: how many windows of weights are solved one after the other; 0 in the paper's form.
        windows_solved: how many of them are pruned.
        weights: how many weights are prunable.
        entries: how many entries they have.
        sparsity: share of these entries that the masks in force hold at zero.
        model_error: mean over the solved weights of the quadratic model's loss at the pruned weight, as a share of
            that at zero; None before the solve, and where a checkpoint did not carry it.
        model_errors: the same for each solved weight, by name.
        rho: penalty in force in the paper's form; 0 otherwise.
        pruned_at: the step after which the last mask was set; None before.
    """

    phase: str
    step: int
    total_steps: int | None
    prune_at: int
    windows: int
    windows_solved: int
    weights: int
    entries: int
    sparsity: float
    model_error: float | None
    model_errors: Mapping[str, float] = field(default_factory=dict)
    rho: float = 0.0
    pruned_at: int | None = None
