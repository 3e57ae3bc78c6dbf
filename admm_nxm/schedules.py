"""When rho rises, when z and u move and when the mask freezes: picklable values, step -> value.

``step`` counts finished optimizer steps. A penalty schedule is read whenever z moves, so that rho is constant within
one w-step, and the subproblem that the inner optimizer works on does not change under it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from .checks import at_least, is_count

__all__ = [
    "Constant",
    "Every",
    "Penalty",
    "Plan",
    "Ramp",
    "Rise",
    "Schedule",
    "Update",
    "UpdateSchedule",
    "check_update",
    "make_plan",
]

Penalty = Literal["lazy", "proximal", "gradient"]


class Update(enum.IntEnum):
    """What moves after a step."""

    NONE = 0
    AUXILIARY = 1
    """z = P(w + u), and u = 0."""
    AUXILIARY_AND_DUAL = 2
    """z = P(w + u), then u = u + w - z."""


class Schedule(Protocol):
    """A penalty schedule: step -> rho, finite, at least 0."""

    def __call__(self, step: int, /) -> float:
        """Return rho from ``step`` on."""


class UpdateSchedule(Protocol):
    """An update schedule: step -> what moves once that many steps are done."""

    def __call__(self, step: int, /) -> Update:
        """Return what moves after step number ``step``."""


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
class Rise:
    """A linear rise without end, for runs of unknown length.

    Args:
        rate: how much rho rises a step, at least 0; rho is ``rate`` in the first step.
    """

    rate: float

    def __post_init__(self) -> None:
        at_least("rate", self.rate, 0.0)

    def __call__(self, step: int, /) -> float:
        """Return ``rate * (step + 1)``."""
        return self.rate * (step + 1)


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
class Plan:
    """The schedules of one run.

    Args:
        rho: penalty schedule.
        updates: update schedule.
        freeze_at: number of steps after which the mask freezes by itself; None waits for ``finalize()``.
    """

    rho: Schedule
    updates: UpdateSchedule
    freeze_at: int | None


def default_plan(
    penalty: Penalty, total_steps: int | None, freeze_at: int | None = None, interval: int | None = None
) -> Plan:
    """Return the schedules that need no tuning.

    With a known length: a short dense start (5 % of the run), then rho rises geometrically until the mask freezes, and
    the rest of the run fine-tunes the kept weights under it.

    - lazy: rho from 0.03 to 1000 until 90 % of the run. What the model is shown goes from w to z and arrives before
      the freeze whatever the learning rate, so nothing is left to project.
    - proximal: rho from 0.001 to 100 until 70 %. The pull is so strong at the end that pruned weights are held at zero
      whatever the learning rate. The dual joins for the last fifth of the rise, when the mask has settled.
    - gradient: rho from 0.001 to 10 until 70 %. Nothing guarantees that w has come near z by then, and a dual would
      only inflate what is to be projected: it stays at zero.

    Without a known length rho rises for ever, and the dual stays at zero.

    Args:
        penalty: the form of the penalty, which sets the unit of rho.
        total_steps: number of optimizer steps of the whole run, or None if unknown.
        freeze_at: number of steps after which the mask freezes, or None for the form's own share of the run.
        interval: steps between two updates, or None for at most 10.

    Returns:
        The plan.

    Raises:
        ValueError: ``interval`` is longer than the constrained phase.
    """
    default = _DEFAULTS[penalty]
    if freeze_at is not None:
        stop = freeze_at
    elif total_steps is not None:
        stop = max(1, (total_steps * default.constrained) // 100)
    else:
        return Plan(Rise(default.rise), Every(10 if interval is None else interval, dual_start=None), None)
    start = stop * 5 // default.constrained
    longest = max(1, stop - start)
    if interval is None:
        interval = min(10, max(1, longest // 20))
    elif interval > longest:
        raise ValueError(
            f"update_every={interval} is longer than the constrained phase, {longest} steps from step {start} to the "
            f"freeze after step {stop}: z would never move; choose a shorter interval or a longer run"
        )
    settled = stop - longest // 5 if default.late_dual else None
    return Plan(
        # rho is read only when z moves: the ramp ends early enough for its last value to be in force before the freeze.
        Ramp(default.initial, default.final, start=start, stop=max(start, stop - 2 * interval)),
        Every(interval, start=start, dual_start=settled),
        stop,
    )


@dataclass(frozen=True)
class _Default:
    """The default plan of one form: rho at both ends, its rise per step where the length is unknown, the share of the
    run (in percent) until the freeze, and whether the dual joins at the end."""

    initial: float
    final: float
    rise: float
    constrained: int
    late_dual: bool


_DEFAULTS: dict[Penalty, _Default] = {
    "lazy": _Default(initial=0.03, final=1000.0, rise=0.1, constrained=90, late_dual=False),
    "proximal": _Default(initial=1e-3, final=100.0, rise=1e-3, constrained=70, late_dual=True),
    "gradient": _Default(initial=1e-3, final=10.0, rise=1e-3, constrained=70, late_dual=False),
}


def make_plan(
    penalty: Penalty,
    total_steps: int | None,
    rho: float | Schedule | None,
    update_every: int | UpdateSchedule | None,
    freeze_at: int | None,
    takes_dual: bool,
) -> Plan:
    """Fill in the default plan with what the user set, and check it.

    Args:
        penalty: the form of the penalty.
        total_steps: number of optimizer steps of the whole run, or None.
        rho: a number, a schedule or None for the default.
        update_every: an interval in steps, a schedule or None for the default.
        freeze_at: number of steps after which the mask freezes, or None for the default.
        takes_dual: whether the form of the penalty has a dual; a schedule that moves it is refused otherwise.

    Returns:
        The plan.

    Raises:
        TypeError, ValueError: a value out of range; the message names it, the range and the remedy.
    """
    if total_steps is not None:
        is_count("total_steps", total_steps, 1)
    if freeze_at is not None:
        is_count("freeze_at", freeze_at, 1)
        if total_steps is not None and freeze_at > total_steps:
            raise ValueError(f"freeze_at={freeze_at} lies beyond total_steps={total_steps}; it must be at most that")
    interval = None
    if isinstance(update_every, int):
        is_count("update_every", update_every, 1)
        interval, update_every = update_every, None
    # The default ramp needs room for the interval; with a rho of the user's own, the interval is the user's affair.
    plan = default_plan(penalty, total_steps, freeze_at, interval if rho is None else None)
    if rho is not None:
        if isinstance(rho, (int, float)) and not isinstance(rho, bool):
            rho = Constant(float(rho))
        elif not callable(rho):
            raise TypeError(f"rho={rho!r} must be a number or a schedule (step -> number)")
        # Whether the mask settles under a rho of the user's own is not known: the dual joins when the user says so.
        assert isinstance(plan.updates, Every)
        plan = replace(plan, rho=rho, updates=replace(plan.updates, dual_start=None))
    if interval is not None:
        assert isinstance(plan.updates, Every)
        plan = replace(plan, updates=replace(plan.updates, interval=interval))
    elif update_every is not None:
        if not callable(update_every):
            raise TypeError(f"update_every={update_every!r} must be an int or a schedule (step -> Update)")
        plan = replace(plan, updates=update_every)
    every = plan.updates
    unknown = total_steps is None and plan.freeze_at is None
    if not takes_dual and unknown and isinstance(every, Every) and every.dual_start is not None:
        first = max(1, every.start, every.dual_start)
        for step in range(first, first + every.interval):
            check_update(every(step), False, step)
    # Without a known length the first step still tells a schedule from something else.
    highest = _rehearse(plan, total_steps or plan.freeze_at or 1, takes_dual)
    if highest == 0 and freeze_at is None and total_steps is not None:
        # Without a penalty the run is the inner optimizer's own, bit for bit, until finalize() is called.
        plan = replace(plan, freeze_at=None)
    return plan


def next_rho(plan: Plan, step: int, current: float, dual_in_use: bool) -> float:
    """Read the penalty schedule for the w-step that begins after ``step`` steps.

    Args:
        plan: the schedules.
        step: number of finished steps.
        current: rho of the w-step that ends here.
        dual_in_use: whether u may be non-zero.

    Returns:
        The new rho.

    Raises:
        TypeError: the schedule returns no number.
        ValueError: the schedule's value is negative or not finite, or it falls while the dual is in use. The scaled
            dual would then have to grow by ``current / new`` and outgrow the kept weights, and the single consensus
            buffer could no longer tell the two apart.
    """
    value = plan.rho(step)
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"rho is {value!r} at step {step}; a number is needed: mend the schedule") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"rho is {value} at step {step}; it must be finite and at least 0: mend the schedule")
    if dual_in_use and value < current:
        raise ValueError(
            f"rho falls from {current} to {value} at step {step} while the dual is in use; keep rho constant or "
            "rising, or leave the dual out with update_every=Every(interval, dual_start=None)"
        )
    return value


def check_update(update: Update, takes_dual: bool, step: int) -> None:
    """Refuse what an update schedule cannot ask for.

    Args:
        update: what the schedule returned.
        takes_dual: whether the form of the penalty has a dual.
        step: number of finished steps, for the message.

    Raises:
        TypeError: not an Update.
        ValueError: a dual step where the form of the penalty has no dual.
    """
    if not isinstance(update, Update):
        raise TypeError(
            f"the update schedule returns {update!r} at step {step}; return Update.NONE, Update.AUXILIARY or "
            "Update.AUXILIARY_AND_DUAL"
        )
    if update is Update.AUXILIARY_AND_DUAL and not takes_dual:
        raise ValueError(
            f'the update schedule asks for a dual step at step {step}, and penalty="lazy" has no dual: w is not moved '
            "toward z, and u would grow without end. Leave the dual out with Every(interval, dual_start=None), or use "
            'penalty="proximal" or penalty="gradient"'
        )


def _rehearse(plan: Plan, total_steps: int, takes_dual: bool) -> float:
    """Walk through the schedules of a whole run, so that a bad value is found before training starts, and return the
    highest rho."""
    highest = rho = next_rho(plan, 0, 0.0, False)
    dual_in_use = False
    end = total_steps if plan.freeze_at is None else min(total_steps, plan.freeze_at)
    every = plan.updates
    # What moves nothing needs no look: a long run is not walked step by step where its interval is known.
    first, interval = (every.start or every.interval, every.interval) if type(every) is Every else (1, 1)
    for step in range(first, end + 1, interval):
        update = every(step)
        check_update(update, takes_dual, step)
        if update is not Update.NONE:
            dual_in_use = dual_in_use or update is Update.AUXILIARY_AND_DUAL
            rho = next_rho(plan, step, rho, dual_in_use)
            highest = max(highest, rho)
    return highest
