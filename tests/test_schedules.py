"""Schedules: their values, their errors, and a default plan that finishes the job."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from admm_nxm import Constant, Every, Ramp, Rise, Update
from admm_nxm.schedules import Plan, check_update, default_plan, make_plan, next_rho
from tests.helpers import PENALTIES, WITH_DUAL, every_penalty

SCHEDULES = [
    Constant(0.1),
    Ramp(0.01, 1.0, start=10, stop=30),
    Rise(0.001),
    Every(10),
    Every(5, start=3, dual_start=20),
    Every(5, dual_start=None),
]


def plan(**given_by_user) -> Plan:
    """make_plan with nothing said but what is given."""
    return make_plan(
        **{
            "penalty": "proximal",
            "total_steps": 100,
            "rho": None,
            "update_every": None,
            "freeze_at": None,
            "takes_dual": given_by_user.get("penalty") != "lazy",
            **given_by_user,
        }
    )


def updates(schedule: Callable[[int], Update], until: int) -> dict[int, Update]:
    """What moves at which step, up to ``until``."""
    return {step: schedule(step) for step in range(1, until + 1) if schedule(step) is not Update.NONE}


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


def test_rise_is_linear_without_end() -> None:
    assert [Rise(0.5)(step) for step in (0, 1, 9, 999)] == [0.5, 1.0, 5.0, 500.0]


@pytest.mark.parametrize("bad", [-1e-9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Constant, "rho"),
        (Rise, "rate"),
        (lambda value: Ramp(value, 1.0, start=0, stop=1), "initial"),
        (lambda value: Ramp(0.5, value, start=0, stop=1), "final"),
    ],
    ids=["Constant", "Rise", "Ramp initial", "Ramp final"],
)
def test_a_penalty_out_of_range_is_refused_by_name(make: Callable, name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={bad!r} must be a finite number, at least 0"):
        make(bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, 1j])
@pytest.mark.parametrize("make", [Constant, Rise, lambda value: Ramp(value, 1.0, start=0, stop=1)])
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


@every_penalty
@pytest.mark.parametrize("total_steps", [None, 100])
def test_a_default_plan_can_be_pickled(penalty: str, total_steps: int | None) -> None:
    made = plan(penalty=penalty, total_steps=total_steps)
    assert pickle.loads(pickle.dumps(made)) == made


# ---------------------------------------------------------------- the default plan

any_length = given(st.sampled_from(PENALTIES), st.integers(1, 2000))


@any_length
@example("lazy", 1)
@example("lazy", 2)
@example("proximal", 1)
@example("proximal", 2)
@settings(deadline=None)
def test_the_mask_freezes_within_the_run(penalty: str, total_steps: int) -> None:
    freeze_at = plan(penalty=penalty, total_steps=total_steps).freeze_at
    assert freeze_at is not None
    assert 1 <= freeze_at <= total_steps


@any_length
@settings(deadline=None)
def test_rho_never_falls_over_the_whole_run(penalty: str, total_steps: int) -> None:
    made = plan(penalty=penalty, total_steps=total_steps)
    values = [made.rho(step) for step in range(total_steps + 1)]
    assert all(0 <= value < math.inf for value in values)
    assert all(earlier <= later for earlier, later in pairwise(values))


@given(st.sampled_from(PENALTIES), st.integers(40, 2000), st.data())
@settings(deadline=None)
def test_the_last_rho_is_in_force_before_the_freeze(penalty: str, total_steps: int, data: st.DataObject) -> None:
    options: dict[str, int] = {}
    if data.draw(st.booleans()):
        options["freeze_at"] = data.draw(st.integers(10, total_steps))
    if data.draw(st.booleans()):
        options["update_every"] = data.draw(st.integers(1, options.get("freeze_at", total_steps) // 2))
    made = plan(penalty=penalty, total_steps=total_steps, **options)
    assert made.freeze_at is not None
    final = made.rho(10 * total_steps)
    assert final >= 10.0
    # rho is read when z moves: such a step has to come while a w-step is still ahead of the freeze.
    assert [step for step in updates(made.updates, made.freeze_at - 1) if made.rho(step) == final]


@given(st.sampled_from(PENALTIES), st.integers(40, 2000))
@example("lazy", 40)
@example("proximal", 40)
@settings(deadline=None)
def test_z_moves_first_and_the_dual_joins_the_proximal_form_later(penalty: str, total_steps: int) -> None:
    made = plan(penalty=penalty, total_steps=total_steps)
    assert made.freeze_at is not None
    moved = updates(made.updates, made.freeze_at)
    kinds = list(moved.values())
    assert kinds == sorted(kinds)
    assert kinds[0] is Update.AUXILIARY
    assert kinds[-1] is (Update.AUXILIARY_AND_DUAL if penalty == "proximal" else Update.AUXILIARY)
    assert made.rho(min(moved)) > 0


DOCUMENTED = {  # rho at both ends, the freeze of a run of 1000 steps, rho in the first step of one of unknown length
    "lazy": (0.03, 1000.0, 900, 0.1),
    "proximal": (0.001, 100.0, 700, 0.001),
    "gradient": (0.001, 10.0, 700, 0.001),
}


@every_penalty
def test_the_default_plan_has_the_documented_phases(penalty: str) -> None:
    initial, final, freeze_at, _ = DOCUMENTED[penalty]
    made = plan(penalty=penalty, total_steps=1000)
    moved = updates(made.updates, 1000)
    with_dual = [step for step, kind in moved.items() if kind is Update.AUXILIARY_AND_DUAL]
    assert made.freeze_at == freeze_at
    assert list(moved) == list(range(50, 1001, 10))  # a dense start of 5 %, then every ten steps
    assert with_dual == (list(range(570, 1001, 10)) if penalty == "proximal" else [])  # the last fifth of the rise
    assert made.rho(49) == 0.0
    assert made.rho(50) == initial
    assert made.rho(freeze_at - 21) < made.rho(freeze_at - 20) == final  # two updates before the freeze


@every_penalty
def test_the_phases_end_where_the_user_freezes(penalty: str) -> None:
    whole = plan(penalty=penalty, total_steps=1000)
    for total_steps in (5000, None):
        assert plan(penalty=penalty, total_steps=total_steps, freeze_at=whole.freeze_at) == whole


@pytest.mark.parametrize(("total_steps", "interval"), [(1, 1), (40, 1), (100, 3), (310, 10), (10**5, 10)])
def test_a_short_run_updates_more_often(total_steps: int, interval: int) -> None:
    assert plan(total_steps=total_steps).updates.interval == interval


@every_penalty
def test_without_a_length_rho_rises_for_ever_and_the_dual_stays_out(penalty: str) -> None:
    made = plan(penalty=penalty, total_steps=None)
    assert made.freeze_at is None
    first = DOCUMENTED[penalty][-1]
    assert [made.rho(step) for step in (0, 9, 99_999)] == pytest.approx([first, 10 * first, 100_000 * first])
    assert list(updates(made.updates, 30)) == [10, 20, 30]
    assert set(updates(made.updates, 100).values()) == {Update.AUXILIARY}


# ---------------------------------------------------------------- what the user sets


def test_nothing_set_is_the_default_plan() -> None:
    assert plan(penalty="gradient", total_steps=77) == default_plan("gradient", 77)


@pytest.mark.parametrize("rho", [2, 2.0])
def test_a_number_is_a_constant_penalty(rho: float) -> None:
    assert plan(rho=rho).rho == Constant(2.0)


def test_a_schedule_is_taken_as_it_is() -> None:
    rho, moves = Ramp(0.1, 1.0, start=0, stop=50), Every(3)
    made = plan(rho=rho, update_every=moves)
    assert made.rho is rho
    assert made.updates is moves


def test_a_function_is_a_schedule() -> None:
    made = plan(rho=lambda step: 0.5 + step, update_every=lambda step: Update.AUXILIARY if step == 7 else Update.NONE)
    assert made.rho(2) == 2.5
    assert updates(made.updates, 100) == {7: Update.AUXILIARY}


@pytest.mark.parametrize("total_steps", [100, None])
def test_an_interval_alone_changes_nothing_else_of_the_updates(total_steps: int | None) -> None:
    default = plan(total_steps=total_steps).updates
    assert plan(total_steps=total_steps, update_every=13).updates == Every(
        13, start=default.start, dual_start=default.dual_start
    )


@pytest.mark.parametrize("rho", [1.0, Ramp(0.1, 1.0, start=0, stop=50)])
@pytest.mark.parametrize("update_every", [None, 3, 90])
def test_with_a_rho_of_the_users_own_the_dual_joins_when_the_user_says_so(
    rho: object, update_every: int | None
) -> None:
    made = plan(rho=rho, update_every=update_every)
    assert made.updates == Every(update_every or 3, start=plan().updates.start, dual_start=None)


@pytest.mark.parametrize("freeze_at", [1, 90, 100])
@pytest.mark.parametrize("total_steps", [None, 100])
def test_the_freeze_can_be_moved(total_steps: int | None, freeze_at: int) -> None:
    assert plan(total_steps=total_steps, freeze_at=freeze_at).freeze_at == freeze_at


@pytest.mark.parametrize("rho", [0, 0.0, Constant(0.0), Rise(0.0), lambda step: 0])
def test_no_penalty_disables_the_automatic_freeze(rho: object) -> None:
    assert plan(rho=rho).freeze_at is None


def test_a_penalty_that_comes_late_freezes_all_the_same() -> None:
    assert plan(rho=lambda step: float(step >= 60), update_every=10).freeze_at == 70


def test_no_penalty_with_a_freeze_asked_for_freezes() -> None:
    assert plan(rho=0, freeze_at=5).freeze_at == 5


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("total_steps", [100, None])
@pytest.mark.parametrize("bad", ["0.1", [0.1], True, (0, 1)])
def test_a_rho_that_is_neither_number_nor_schedule_is_refused(bad: object, total_steps: int | None) -> None:
    with pytest.raises(TypeError, match=r"must be a number or a schedule \(step -> number\)"):
        plan(rho=bad, total_steps=total_steps)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_a_rho_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"rho={bad!r} must be a finite number, at least 0"):
        plan(rho=bad)


@pytest.mark.parametrize("total_steps", [100, None])
@pytest.mark.parametrize("bad", [2.5, "10", [10]])
def test_updates_that_are_neither_interval_nor_schedule_are_refused(bad: object, total_steps: int | None) -> None:
    with pytest.raises(TypeError, match=r"update_every=.* must be an int or a schedule \(step -> Update\)"):
        plan(update_every=bad, total_steps=total_steps)


def test_an_interval_longer_than_the_constrained_phase_is_refused() -> None:
    assert updates(plan(update_every=65).updates, 70) == {5: Update.AUXILIARY, 70: Update.AUXILIARY_AND_DUAL}
    with pytest.raises(ValueError, match=r"update_every=66 is longer than the constrained phase, 65 steps from step 5"):
        plan(update_every=66)


def test_a_freeze_after_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="freeze_at=101 lies beyond total_steps=100; it must be at most that"):
        plan(freeze_at=101)


@pytest.mark.parametrize("bad", [math.inf, math.nan, -1.0])
def test_a_custom_schedule_that_goes_wrong_is_refused_with_the_step(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"rho is {bad} at step 42; it must be finite and at least 0"):
        plan(rho=lambda step: bad if step == 42 else 0.5, update_every=Every(6, dual_start=None))


@pytest.mark.parametrize("total_steps", [100, None])
@pytest.mark.parametrize("bad", [None, "a lot", [1.0]])
def test_a_custom_schedule_that_returns_no_number_is_refused(bad: object, total_steps: int | None) -> None:
    with pytest.raises(TypeError, match=r"rho is .* at step 0; a number is needed"):
        plan(rho=lambda step: bad, total_steps=total_steps)


@pytest.mark.parametrize("total_steps", [100, None])
@pytest.mark.parametrize("bad", [True, False, 1, None, "auxiliary"])
def test_a_custom_update_schedule_that_returns_no_update_is_refused(bad: object, total_steps: int | None) -> None:
    with pytest.raises(TypeError, match=rf"returns {bad!r} at step 1; return Update.NONE, Update.AUXILIARY or"):
        plan(update_every=lambda step: bad, total_steps=total_steps)


def falling(step: int) -> float:
    return 2.0 if step < 50 else 1.0


def test_a_falling_rho_is_refused_while_the_dual_is_in_use() -> None:
    with pytest.raises(
        ValueError, match=r"rho falls from 2.0 to 1.0 at step 50 while the dual is in use.*dual_start=None"
    ):
        plan(rho=falling, update_every=Every(10))


def test_a_rho_that_falls_with_the_first_dual_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rho falls from 2.0 to 1.0 at step 50"):
        plan(rho=falling, update_every=Every(10, dual_start=50))


@pytest.mark.parametrize("dual_start", [None, 60])
def test_rho_may_fall_before_the_dual_is_in_use(dual_start: int | None) -> None:
    assert plan(rho=falling, update_every=Every(10, dual_start=dual_start)).rho is falling


@pytest.mark.parametrize("total_steps", [100, None])
def test_a_dual_asked_of_the_lazy_form_is_refused_with_the_remedy(total_steps: int | None) -> None:
    with pytest.raises(
        ValueError, match=r'dual step at step 1, and penalty="lazy" has no dual.*dual_start=None.*penalty="proximal"'
    ):
        plan(penalty="lazy", total_steps=total_steps, update_every=Every(1))
    for penalty in WITH_DUAL:
        assert plan(penalty=penalty, total_steps=total_steps, update_every=Every(1)).updates == Every(1)


def test_a_dual_that_would_come_after_the_freeze_of_the_lazy_form_does_not_matter() -> None:
    late = Every(10, dual_start=60)
    assert plan(penalty="lazy", update_every=late, freeze_at=59).updates is late
    with pytest.raises(ValueError, match="dual step at step 60"):
        plan(penalty="lazy", update_every=late, freeze_at=60)


@pytest.mark.parametrize("update", list(Update))
def test_what_may_move_depends_on_whether_there_is_a_dual(update: Update) -> None:
    check_update(update, True, 3)
    if update is Update.AUXILIARY_AND_DUAL:
        with pytest.raises(ValueError, match="at step 3"):
            check_update(update, False, 3)
    else:
        check_update(update, False, 3)


def test_what_a_schedule_does_after_the_freeze_does_not_matter() -> None:
    assert plan(rho=falling, update_every=Every(10), freeze_at=49).freeze_at == 49


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in ("total_steps", "freeze_at") for bad in (10.0, "10", True, math.inf)]
    + [("update_every", True), ("update_every", False)],
)
def test_a_number_of_steps_that_is_no_int_is_refused_by_name(name: str, bad: object) -> None:
    with pytest.raises(TypeError, match=rf"{name}={bad!r} must be an int, at least 1: it counts optimizer steps"):
        plan(**{name: bad})


@pytest.mark.parametrize("name", ["total_steps", "freeze_at", "update_every"])
@pytest.mark.parametrize("bad", [0, -1])
def test_a_number_of_steps_below_one_is_refused_by_name(name: str, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}={bad} must be at least 1: it counts optimizer steps"):
        plan(**{name: bad})


def test_reading_rho_allows_it_to_rise_or_stay_with_the_dual_in_use() -> None:
    constant = Plan(Constant(1.0), Every(1), None)
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

    assert plan(rho=rho, update_every=every, total_steps=39, freeze_at=39).updates == every
    assert seen == [0, *expected]
