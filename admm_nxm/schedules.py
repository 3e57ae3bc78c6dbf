"""Schedules: the step at which a run prunes, and rho, z and u of the paper's form. All are picklable, step -> value.

``step`` counts finished optimizer steps.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Protocol

from .checks import at_least, is_count

__all__ = [
    "Constant",
    "Every",
    "Penalty",
    "Plan",
    "Ramp",
    "Schedule",
    "Timeline",
    "Update",
    "UpdateSchedule",
    "check_update",
    "make_plan",
    "make_timeline",
    "next_rho",
]

PRUNE_AT = 0.85  # the share of a run after which the solve stands
PAPER_PRUNE_AT = 0.7  # the same for the paper's form
CALIBRATION_STEPS = 16  # of one window, where the run is long enough
_FEW_CALIBRATION_STEPS = 8  # below this many, a default gets a warning


@dataclass(frozen=True)
class Timeline:
    """The phases of a run with the exact w-step.

    Args:
        total_steps: optimizer steps of the whole run; None if unknown.
        prune_at: the step after which the last window's solve stands.
        windows: how many windows of weights follow one another; 0 for a run that begins frozen.
        calibration_steps: steps of each window in which A and G are gathered.
    """

    total_steps: int | None
    prune_at: int
    windows: int
    calibration_steps: int

    @property
    def start(self) -> int:
        """The number of finished steps at which calibration begins."""
        return self.prune_at - self.windows * self.calibration_steps

    @property
    def few_calibration_steps(self) -> str | None:
        """A warning about a default that leaves too few calibration steps; None if there are enough."""
        if self.calibration_steps >= _FEW_CALIBRATION_STEPS:
            return None
        fits = self.prune_at >= self.windows * _FEW_CALIBRATION_STEPS
        return (
            f"the run is short: A and G are gathered in {self.calibration_steps} steps for each window of weights "
            f"({self.windows} in all), fewer than {_FEW_CALIBRATION_STEPS}. For a result that counts, train longer"
            + (f", or give calibration_steps={_FEW_CALIBRATION_STEPS}" if fits else "")
        )


def make_timeline(
    total_steps: int | None, prune_at: int | float | None, calibration_steps: int | None, windows: int
) -> Timeline:
    """Place the solve and the calibration steps in a run.

    Args:
        total_steps: optimizer steps of the whole run, or None.
        prune_at: the step after which the solve stands, or a share of the run, or None for 0.85; 0 begins frozen.
        calibration_steps: calibration steps of each window, or None for 16, or for a fifth of a short run.
        windows: how many windows of weights there are.

    Raises:
        TypeError, ValueError: neither length is given, a number is out of range, or the calibration does not fit.
    """
    prune_at = _check_lengths(total_steps, prune_at, PRUNE_AT)
    if calibration_steps is not None:
        is_count("calibration_steps", calibration_steps, 1)
    if prune_at == 0:
        return Timeline(total_steps, 0, 0, calibration_steps or CALIBRATION_STEPS)
    if windows > prune_at:
        raise ValueError(
            f"the statistics of the weights need {windows} windows of calibration, at least one step each, and "
            f"prune_at={prune_at} leaves fewer steps than that; give a larger statistics_memory (bytes), or train "
            "longer"
        )
    if calibration_steps is None:
        fifth = (total_steps or prune_at) // 5
        calibration_steps = min(CALIBRATION_STEPS, max(1, fifth // windows), prune_at // windows)
    elif windows * calibration_steps > prune_at:
        raise ValueError(
            f"calibration_steps={calibration_steps} for each of {windows} windows does not fit before "
            f"prune_at={prune_at}; it can be at most {prune_at // windows} here"
        )
    return Timeline(total_steps, prune_at, windows, calibration_steps)


def _check_lengths(total_steps: int | None, prune_at: int | float | None, default: float) -> int:
    """Return ``prune_at`` as a number of steps; ``default`` is a share of the run."""
    if total_steps is not None:
        is_count("total_steps", total_steps, 1)
    if total_steps is None and prune_at is None:
        raise ValueError(
            "neither total_steps nor prune_at is given, so nothing says when to prune; give total_steps=(the number of "
            "optimizer steps of the whole run), or prune_at=(the step after which the weights are pruned)"
        )
    share = default if prune_at is None else prune_at
    if isinstance(share, float):
        if not 0 < share < 1:
            raise ValueError(
                f"prune_at={share} must be a step, which is an int, or a share of the run between 0 and 1, such as 0.85"
            )
        if total_steps is None:
            raise ValueError(f"prune_at={share} is a share of the run, and total_steps is not given; give it as well")
        return max(1, math.floor(share * total_steps + 1e-9))  # 0.29 * 100 is a little less than 29
    is_count("prune_at", share, 0)
    if total_steps is not None and share > total_steps:
        raise ValueError(f"prune_at={share} lies beyond total_steps={total_steps}; it must be at most that")
    return share


# ---------------------------------------------------------------- the paper's form


class Update(enum.IntEnum):
    """Say which variables move after a step."""

    NONE = 0
    AUXILIARY = 1
    """z = P(w + u), and u = 0."""
    AUXILIARY_AND_DUAL = 2
    """z = P(w + u), then u = u + w - z."""


class Schedule(Protocol):
    """A penalty schedule: step -> rho from that step on, finite, at least 0."""

    def __call__(self, step: int, /) -> float: ...  # noqa: D102


class UpdateSchedule(Protocol):
    """An update schedule: step -> what moves once that many steps are done."""

    def __call__(self, step: int, /) -> Update: ...  # noqa: D102


@dataclass(frozen=True)
class Constant:
    """The same rho at every step.

    Args:
        value: rho, finite and at least 0.
    """

    value: float

    def __post_init__(self) -> None:
        at_least("rho", self.value, 0.0)

    def __call__(self, step: int, /) -> float:  # noqa: ARG002 - the same at every step
        """Return ``value``."""
        return self.value


@dataclass(frozen=True)
class Ramp:
    """Zero before ``start``, then a geometric rise from ``initial`` to ``final``, reached at ``stop`` and held.

    Args:
        initial: rho at ``start``, above 0.
        final: rho from ``stop`` on, at least ``initial``.
        start: first step with a penalty.
        stop: step at which ``final`` is reached, at least ``start``.

    >>> [Ramp(0.01, 1.0, start=10, stop=30)(step) for step in (9, 10, 20, 30, 99)]
    [0.0, 0.01, 0.1, 1.0, 1.0]
    """

    initial: float
    final: float
    start: int
    stop: int

    def __post_init__(self) -> None:
        at_least("initial", self.initial, 0.0)
        if self.initial == 0:
            raise ValueError("initial=0 cannot rise geometrically; choose a small positive rho such as 1e-3")
        at_least("final", self.final, self.initial)
        is_count("start", self.start, 0)
        is_count("stop", self.stop, self.start)

    def __call__(self, step: int, /) -> float:
        """Return rho at ``step``."""
        if step < self.start:
            return 0.0
        if step >= self.stop:
            return self.final
        share = (step - self.start) / (self.stop - self.start)
        return min(self.final, self.initial * math.pow(self.final / self.initial, share))


@dataclass(frozen=True)
class Every:
    """z moves every ``interval`` steps from ``start`` on; u moves with it from ``dual_start`` on.

    While the mask still moves, each dual step adds w to u on the pruned positions until these outrank the kept ones
    and the mask flips. ``dual_start`` lets the dual wait until the mask has settled.

    Args:
        interval: steps between two updates, at least 1.
        start: the first step after which z may move; 0 counts the interval from the beginning of the run.
        dual_start: the first step after which u moves as well; ``0`` is textbook ADMM, ``None`` leaves u at 0.
    """

    interval: int
    start: int = 0
    dual_start: int | None = 0

    def __post_init__(self) -> None:
        is_count("interval", self.interval, 1)
        is_count("start", self.start, 0)
        if self.dual_start is not None:
            is_count("dual_start", self.dual_start, 0)

    def __call__(self, step: int, /) -> Update:
        """Return what moves after step number ``step``."""
        if step < self.start or (step - self.start) % self.interval:
            return Update.NONE
        if self.dual_start is not None and step >= self.dual_start:
            return Update.AUXILIARY_AND_DUAL
        return Update.AUXILIARY


@dataclass(frozen=True)
class Penalty:
    """The w-step of the paper: the inner optimizer's own steps on ``f(w) + rho / 2 ||w - z + u||^2``.

    Args:
        rho: penalty, in units of the loss per squared weight, a number or a schedule (step -> rho, read whenever z
            moves); it wants tuning, by factors of 10.
        update_every: steps between two z/u updates, or a schedule (step -> :class:`Update`); by default a fifteenth of
            the run. A number moves z and u together.
    """

    rho: float | Schedule = 1e-2
    update_every: int | UpdateSchedule | None = None


@dataclass(frozen=True)
class Plan:
    """The schedules of one run of the paper's form, and the number of steps after which its mask freezes."""

    rho: Schedule
    updates: UpdateSchedule
    prune_at: int


def make_plan(penalty: Penalty, total_steps: int | None, prune_at: int | float | None) -> Plan:
    """Fill in the defaults of the paper's form, and walk through its schedules once.

    Args:
        penalty: rho and the update schedule.
        total_steps: optimizer steps of the whole run, or None.
        prune_at: the step after which the mask freezes, or a share of the run, or None for 0.7.

    Raises:
        TypeError, ValueError: a value out of range; the message names it, the range and the remedy.
    """
    prune_at = _check_lengths(total_steps, prune_at, PAPER_PRUNE_AT)
    rho, every = penalty.rho, penalty.update_every
    if isinstance(rho, (int, float)) and not isinstance(rho, bool):
        rho = Constant(float(rho))
    elif not callable(rho):
        raise TypeError(f"rho={rho!r} must be a number or a schedule (step -> number)")
    if every is None:
        every = Every(max(1, (total_steps or prune_at) // 15))
    elif isinstance(every, int):
        is_count("update_every", every, 1)
        if every > prune_at > 0:
            raise ValueError(
                f"update_every={every} is longer than the run up to prune_at={prune_at}: z would never move; choose a "
                "shorter interval or a longer run"
            )
        every = Every(every)
    elif not callable(every):
        raise TypeError(f"update_every={every!r} must be an int or a schedule (step -> Update)")
    plan = Plan(rho, every, prune_at)
    _rehearse(plan)
    return plan


def next_rho(plan: Plan, step: int, current: float, dual_in_use: bool) -> float:
    """Read the penalty schedule for the w-step that begins after ``step`` steps.

    Args:
        plan: the schedules.
        step: number of finished steps.
        current: rho of the w-step that ends here.
        dual_in_use: whether u may be non-zero.

    Raises:
        TypeError: the schedule returns no number.
        ValueError: the schedule's value is negative or not finite, or it falls while the dual is in use. The scaled
            dual would then have to grow by ``current / new`` and outgrow the kept weights, and the single consensus
            buffer could no longer tell the two apart.
    """
    returned = plan.rho(step)
    try:
        value = float(returned)
    except (TypeError, ValueError):
        raise TypeError(f"the rho schedule returns {returned!r} at step {step}; let it return a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"the rho schedule returns {value} at step {step}; let it return a finite number, at least 0")
    if dual_in_use and value < current:
        raise ValueError(
            f"rho falls from {current} to {value} at step {step} while the dual is in use; keep rho constant or "
            "rising, or leave the dual out with update_every=Every(interval, dual_start=None)"
        )
    return value


def check_update(update: Update, step: int) -> None:
    """Refuse, with a TypeError, what an update schedule cannot ask for."""
    if not isinstance(update, Update):
        raise TypeError(
            f"the update schedule returns {update!r} at step {step}; return Update.NONE, Update.AUXILIARY or "
            "Update.AUXILIARY_AND_DUAL"
        )


def _rehearse(plan: Plan) -> None:
    """Walk through the schedules of a whole run, so that a bad value is found before training starts."""
    rho, dual_in_use = next_rho(plan, 0, 0.0, False), False
    for step in range(1, plan.prune_at + 1):
        update = plan.updates(step)
        check_update(update, step)
        if update is not Update.NONE:
            dual_in_use = dual_in_use or update is Update.AUXILIARY_AND_DUAL
            rho = next_rho(plan, step, rho, dual_in_use)
