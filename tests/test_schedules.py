"""Schedules: when a run prunes, their values, and their errors."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from admm_nxm import Constant, Every, Penalty, Ramp, Update
from admm_nxm.schedules import Plan, Timeline, check_update, make_plan, make_timeline, next_rho

SCHEDULES = [
    Constant(0.1),
    Ramp(0.01, 1.0, start=10, stop=30),
    Every(10),
    Every(5, start=3, dual_start=20),
    Every(5, dual_start=None),
]


def plan(rho: Any = 0.5, update_every: Any = 5, total_steps: int | None = 100, prune_at: int | None = None) -> Plan:
    return make_plan(Penalty(rho, update_every), total_steps, prune_at)


def updates(schedule: Callable[[int], Update], until: int) -> dict[int, Update]:
    """What moves at which step, up to ``until``."""
    return {step: schedule(step) for step in range(1, until + 1) if schedule(step) is not Update.NONE}


# ---------------------------------------------------------------- the exact w-step


@pytest.mark.parametrize(
    ("total_steps", "prune_at", "windows", "expected"),
    [
        (1000, None, 1, Timeline(1000, 850, 1, 16)),
        (1000, None, 4, Timeline(1000, 850, 4, 16)),
        (80, None, 1, Timeline(80, 68, 1, 16)),
        (40, None, 1, Timeline(40, 34, 1, 8)),
        (40, None, 4, Timeline(40, 34, 4, 2)),
        (40, 3, 1, Timeline(40, 3, 1, 3)),
        (None, 500, 1, Timeline(None, 500, 1, 16)),
        (40, 40, 1, Timeline(40, 40, 1, 8)),
        (40, 0, 1, Timeline(40, 0, 0, 16)),
        (1, None, 1, Timeline(1, 1, 1, 1)),
    ],
)
def test_default_timeline(total_steps: int | None, prune_at: int | None, windows: int, expected: Timeline) -> None:
    assert make_timeline(total_steps, prune_at, None, windows) == expected


@given(st.integers(1, 5000), st.integers(1, 40))
def test_calibration_fits_before_the_solve_and_takes_at_most_a_fifth(total_steps: int, windows: int) -> None:
    try:
        found = make_timeline(total_steps, None, None, windows)
    except ValueError:
        assert windows > max(1, total_steps * 85 // 100)
        return
    assert 1 <= found.calibration_steps <= 16
    assert 0 <= found.start < found.prune_at <= total_steps
    assert windows * found.calibration_steps <= max(windows, total_steps // 5)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 10))
def test_a_given_calibration_is_taken_or_refused_with_the_most_there_can_be(
    prune_at: int, calibration_steps: int, windows: int
) -> None:
    try:
        found = make_timeline(None, prune_at, calibration_steps, windows)
    except ValueError as error:
        limit = re.search(r"it can be at most (\d+) here", str(error))
        if limit is None:
            assert windows > prune_at
            return
        assert int(limit[1]) < calibration_steps
        assert make_timeline(None, prune_at, int(limit[1]), windows).start >= 0
        with pytest.raises(ValueError, match="does not fit"):
            make_timeline(None, prune_at, int(limit[1]) + 1, windows)
    else:
        assert found == Timeline(None, prune_at, windows, calibration_steps)


NO_LENGTH: dict[str, int | None] = {"total_steps": None, "prune_at": None}
LENGTHS = [
    pytest.param(
        lambda **given: make_timeline(**{**NO_LENGTH, **given}, calibration_steps=None, windows=1), id="exact"
    ),
    pytest.param(lambda **given: plan(**{**NO_LENGTH, **given}), id="paper"),
]


@pytest.mark.parametrize("make", LENGTHS)
def test_neither_length_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(
        ValueError, match=r"neither total_steps nor prune_at is given.*give total_steps=\(the number of"
    ):
        make()


@pytest.mark.parametrize("make", LENGTHS)
def test_pruning_after_the_run_is_refused(make: Callable[..., Any]) -> None:
    assert make(total_steps=100, prune_at=100).prune_at == 100
    with pytest.raises(ValueError, match="prune_at=101 lies beyond total_steps=100; it must be at most that"):
        make(total_steps=100, prune_at=101)


@pytest.mark.parametrize("make", LENGTHS)
@pytest.mark.parametrize(
    ("share", "total_steps", "expected"),
    [(0.5, 40, 20), (0.29, 100, 29), (0.85, 41, 34), (0.999, 40, 39)],
)
def test_a_float_is_a_share_of_the_run(make: Callable[..., Any], share: float, total_steps: int, expected: int) -> None:
    assert make(total_steps=total_steps, prune_at=share).prune_at == expected


@pytest.mark.parametrize("make", LENGTHS)
@pytest.mark.parametrize("bad", [0.0, 1.0, 40.0, -0.5, math.inf, math.nan])
def test_a_share_out_of_range_or_of_nothing_is_refused(make: Callable[..., Any], bad: float) -> None:
    with pytest.raises(ValueError, match=rf"prune_at={bad} must be a step, .* between 0 and 1"):
        make(total_steps=100, prune_at=bad)
    with pytest.raises(ValueError, match=r"prune_at=0\.5 is a share of the run, and total_steps is not given"):
        make(prune_at=0.5)


@pytest.mark.parametrize("make", LENGTHS)
@pytest.mark.parametrize(
    ("name", "low", "bad"),
    [("total_steps", 1, bad) for bad in (10.0, "10", True, math.inf, -1)]
    + [("prune_at", 0, bad) for bad in ("10", True, -1)],
)
def test_a_number_of_steps_out_of_range_is_refused_by_name(
    make: Callable[..., Any], name: str, low: int, bad: object
) -> None:
    error = ValueError if type(bad) is int else TypeError
    with pytest.raises(error, match=rf"{name}={bad!r} must be .*at least {low}: it counts optimizer steps"):
        make(**{name: bad})


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_calibration_steps_out_of_range_are_refused(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"calibration_steps={bad!r} must be .*at least 1: it counts optimizer steps"):
        make_timeline(100, None, bad, 1)


# ---------------------------------------------------------------- penalty schedules


@pytest.mark.parametrize("step", [0, 1, 10**9])
def test_constant_is_the_same_at_every_step(step: int) -> None:
    assert Constant(0.25)(step) == 0.25


def test_ramp_is_zero_then_geometric_then_held() -> None:
    ramp = Ramp(0.01, 100.0, start=10, stop=50)
    assert [ramp(step) for step in (0, 9)] == [0.0, 0.0]
    assert [ramp(step) for step in (10, 20, 30, 40)] == pytest.approx([0.01, 0.1, 1.0, 10.0])
    assert [ramp(step) for step in (50, 51, 10**9)] == [100.0, 100.0, 100.0]


@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e6), st.integers(0, 50), st.integers(0, 50))
@example(0.2936753607312919, 0.2936753607312921, 0, 10)  # rounding would overshoot the end
def test_ramp_never_falls_and_stays_between_its_ends(initial: float, final: float, start: int, length: int) -> None:
    ramp = Ramp(initial, final, start=start, stop=start + length)
    values = [ramp(step) for step in range(start + length + 2)]
    assert all(earlier <= later for earlier, later in pairwise(values))
    assert all(initial <= value <= final for value in values[start:])
    assert values[-1] == final


def test_a_ramp_of_no_length_jumps() -> None:
    ramp = Ramp(0.01, 2.0, start=5, stop=5)
    assert (ramp(4), ramp(5)) == (0.0, 2.0)


@pytest.mark.parametrize("bad", [-1e-9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Constant, "rho"),
        (lambda value: Ramp(value, 1.0, start=0, stop=1), "initial"),
        (lambda value: Ramp(0.5, value, start=0, stop=1), "final"),
    ],
    ids=["Constant", "Ramp initial", "Ramp final"],
)
def test_a_penalty_out_of_range_is_refused_by_name(make: Callable, name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={bad!r} must be a finite number, at least 0"):
        make(bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, 1j])
@pytest.mark.parametrize("make", [Constant, lambda value: Ramp(value, 1.0, start=0, stop=1)])
def test_a_penalty_that_is_no_number_is_refused(make: Callable, bad: object) -> None:
    with pytest.raises(TypeError, match=rf"={bad!r} must be a finite number"):
        make(bad)


def test_a_ramp_cannot_begin_at_zero() -> None:
    with pytest.raises(ValueError, match="initial=0 cannot rise geometrically; choose a small positive rho"):
        Ramp(0.0, 1.0, start=0, stop=10)


def test_a_ramp_cannot_fall() -> None:
    with pytest.raises(ValueError, match=r"final=0.5 must be a finite number, at least 1.0"):
        Ramp(1.0, 0.5, start=0, stop=10)


@pytest.mark.parametrize(
    ("start", "stop", "error", "named"),
    [
        (-1, 10, ValueError, "start=-1 must be at least 0"),
        (0.05, 10, TypeError, "start=0.05 must be an int, at least 0"),
        (0, 0.7, TypeError, "stop=0.7 must be an int, at least 0"),
        (True, 10, TypeError, "start=True must be an int, at least 0"),
        (10, 9, ValueError, "stop=9 must be at least 10"),
    ],
)
def test_the_ends_of_a_ramp_count_steps(start: int, stop: int, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named + ".*it counts optimizer steps"):
        Ramp(0.1, 1.0, start=start, stop=stop)


# ---------------------------------------------------------------- update schedules


def test_every_moves_z_and_u_at_each_interval() -> None:
    assert updates(Every(10), 35) == dict.fromkeys([10, 20, 30], Update.AUXILIARY_AND_DUAL)


def test_the_interval_counts_from_the_start() -> None:
    assert list(updates(Every(10, start=7), 35)) == [7, 17, 27]


def test_the_dual_joins_at_its_start() -> None:
    moved = updates(Every(5, start=5, dual_start=15), 20)
    assert moved == {
        5: Update.AUXILIARY,
        10: Update.AUXILIARY,
        15: Update.AUXILIARY_AND_DUAL,
        20: Update.AUXILIARY_AND_DUAL,
    }


def test_the_dual_may_stay_out() -> None:
    assert set(updates(Every(5, dual_start=None), 10**3).values()) == {Update.AUXILIARY}


@pytest.mark.parametrize("bad", [-1, 2.5, "3", True, math.inf])
@pytest.mark.parametrize(("name", "low"), [("interval", 1), ("start", 0), ("dual_start", 0)])
def test_steps_of_an_update_schedule_out_of_range_are_refused_by_name(name: str, low: int, bad: object) -> None:
    error = ValueError if type(bad) is int else TypeError
    with pytest.raises(error, match=rf"{name}={bad!r} must be .*at least {low}: it counts optimizer steps"):
        Every(**{"interval": 1, name: bad})  # type: ignore[arg-type]


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="interval=0 must be at least 1"):
        Every(0)


# ---------------------------------------------------------------- as values


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_values(schedule) -> None:
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied == schedule
    assert hash(copied) == hash(schedule)
    assert [copied(step) for step in range(50)] == [schedule(step) for step in range(50)]
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, next(iter(vars(schedule))), 1)


def test_different_schedules_differ() -> None:
    assert len(set(SCHEDULES)) == len(SCHEDULES)


# ---------------------------------------------------------------- the plan of the paper's form


@pytest.mark.parametrize(
    ("total_steps", "interval", "prune_at"),
    [(1, 1, 1), (14, 1, 9), (15, 1, 10), (30, 2, 21), (300, 20, 210), (3000, 200, 2100)],
)
def test_z_moves_every_fifteenth_of_the_run_and_the_mask_freezes_at_70_percent(
    total_steps: int, interval: int, prune_at: int
) -> None:
    assert plan(3, None, total_steps) == Plan(Constant(3.0), Every(interval), prune_at)


def test_without_a_length_the_interval_is_a_share_of_what_there_is_to_the_freeze() -> None:
    assert plan(0.5, None, None, 60) == Plan(Constant(0.5), Every(4), 60)


def test_the_default_is_a_constant_penalty() -> None:
    assert make_plan(Penalty(), 300, None) == Plan(Constant(0.01), Every(20), 210)


@pytest.mark.parametrize("rho", [Ramp(0.1, 1.0, start=0, stop=9), lambda step: 0.1])
def test_schedules_are_taken_as_they_are(rho: Any) -> None:
    every = Every(7, start=3, dual_start=None)
    assert plan(rho, every, prune_at=60) == Plan(rho, every, 60)


@pytest.mark.parametrize("total_steps", [100, None])
@pytest.mark.parametrize("bad", ["0.1", [0.1], True, (0, 1), None])
def test_a_rho_that_is_neither_number_nor_schedule_is_refused(bad: object, total_steps: int | None) -> None:
    with pytest.raises(TypeError, match=r"rho=.* must be a number or a schedule \(step -> number\)"):
        plan(bad, total_steps=total_steps, prune_at=60)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_rho_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"rho={bad!r} must be a finite number, at least 0"):
        plan(bad)


@pytest.mark.parametrize("bad", [2.5, "10", [10]])
def test_updates_that_are_neither_interval_nor_schedule_are_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=r"update_every=.* must be an int or a schedule \(step -> Update\)"):
        plan(update_every=bad)


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (False, TypeError)])
def test_an_interval_out_of_range_is_refused(bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"update_every={bad!r} must be .*at least 1: it counts optimizer steps"):
        plan(update_every=bad)


def test_an_interval_longer_than_the_run_up_to_the_freeze_is_refused() -> None:
    assert list(updates(plan(update_every=70).updates, 100)) == [70]
    with pytest.raises(
        ValueError, match=r"update_every=71 is longer than the run up to prune_at=70: z would never move"
    ):
        plan(update_every=71)


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_a_custom_schedule_that_goes_wrong_is_refused_with_the_step(bad: float) -> None:
    with pytest.raises(
        ValueError, match=rf"schedule returns {bad} at step 42; let it return a finite number, at least 0"
    ):
        plan(lambda step: bad if step == 42 else 0.5, Every(6, dual_start=None))


@pytest.mark.parametrize("bad", [None, "a lot", [1.0]])
def test_a_custom_schedule_that_returns_no_number_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=r"the rho schedule returns .* at step 0; let it return a number"):
        plan(lambda step: bad)


@pytest.mark.parametrize("bad", [True, False, 1, None, "auxiliary"])
def test_a_custom_update_schedule_that_returns_no_update_is_refused(bad: object) -> None:
    with pytest.raises(TypeError, match=rf"returns {bad!r} at step 1; return Update.NONE, Update.AUXILIARY or"):
        plan(update_every=lambda step: bad)


@pytest.mark.parametrize("update", list(Update))
def test_every_update_may_be_asked_for(update: Update) -> None:
    check_update(update, 3)


def falling(step: int) -> float:
    return 2.0 if step < 50 else 1.0


@pytest.mark.parametrize("every", [Every(10), Every(10, dual_start=50)])
def test_a_falling_rho_is_refused_while_the_dual_is_in_use(every: Every) -> None:
    with pytest.raises(
        ValueError, match=r"rho falls from 2.0 to 1.0 at step 50 while the dual is in use.*dual_start=None"
    ):
        plan(falling, every)


@pytest.mark.parametrize("dual_start", [None, 60])
def test_rho_may_fall_before_the_dual_is_in_use(dual_start: int | None) -> None:
    assert plan(falling, Every(10, dual_start=dual_start)).rho is falling


def test_what_a_schedule_does_after_the_freeze_does_not_matter() -> None:
    assert plan(falling, Every(10), prune_at=49).prune_at == 49


def test_reading_rho_allows_it_to_rise_or_stay_with_the_dual_in_use() -> None:
    constant = Plan(Constant(1.0), Every(1), 9)
    assert next_rho(constant, 3, current=1.0, dual_in_use=True) == 1.0
    assert next_rho(constant, 3, current=0.5, dual_in_use=True) == 1.0
    with pytest.raises(ValueError, match=r"rho falls from 1.5 to 1.0 at step 3"):
        next_rho(constant, 3, current=1.5, dual_in_use=True)


@pytest.mark.parametrize(
    ("every", "expected"),
    [(Every(10, dual_start=None), [10, 20, 30]), (Every(10, start=7, dual_start=None), [7, 17, 27, 37])],
)
def test_a_plan_is_checked_wherever_it_moves_and_only_there(every: Every, expected: list[int]) -> None:
    seen = []

    def rho(step: int) -> float:
        seen.append(step)
        return 1.0

    assert plan(rho, every, total_steps=39, prune_at=39).updates == every
    assert seen == [0, *expected]
