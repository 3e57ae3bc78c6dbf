"""The reference itself, against values worked out by hand and against the projection of torch."""

from __future__ import annotations

import math

import pytest
import torch

from admm_nxm import Constant, Every, Pattern, Ramp, Update
from admm_nxm.reference import ReferenceADMM, keep_list, project_list, round_to
from admm_nxm.schedules import Plan

PATTERN = Pattern(1, 2)


def reference(plan: Plan, weight: list[float], lr: float = 0.5) -> ReferenceADMM:
    return ReferenceADMM(torch.tensor([weight], dtype=torch.float64), PATTERN, plan, lr)


def test_ties_go_to_the_lower_index_and_nan_is_above_everything() -> None:
    assert keep_list([1.0, -1.0, 0.0, -0.0], PATTERN) == [True, False, True, False]
    assert keep_list([math.inf, math.nan, math.nan, math.nan], PATTERN) == [False, True, True, False]
    assert project_list([1.0, -2.0, 0.5, 0.25], PATTERN) == [0.0, -2.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.bfloat16, 1.005, 1.0078125),
        (torch.bfloat16, 1.00390625, 1.0),  # half way: to the even one
        (torch.float32, 1e39, math.inf),
        (torch.float64, 0.1, 0.1),
    ],
)
def test_rounding_is_to_the_nearest(dtype: torch.dtype, value: float, expected: float) -> None:
    assert round_to(dtype, value) == expected


def test_two_steps_by_hand() -> None:
    """W = (4, 2), z = (4, 0), u = 0, rho = 1, lr = 1/2, gradient (0, 0)."""
    run = reference(Plan(Constant(1.0), Every(1), prune_at=2), [4.0, 2.0])
    assert (run.w, run.z, run.u) == ([4.0, 2.0], [4.0, 0.0], [0.0, 0.0])
    run.step([0.0, 0.0])
    # w - lr rho (w - z + u) = (4, 1); a = w + u = (4, 1); z = (4, 0); u = a - z = (0, 1)
    assert (run.w, run.z, run.u, run.mask) == ([4.0, 1.0], [4.0, 0.0], [0.0, 1.0], None)
    run.step([0.0, 0.0])
    # w = (4, 1 - (1 - 0 + 1) / 2) = (4, 0); a = (4, 1); u = (0, 1); then w = P(w + u) = (4, 0), frozen
    assert (run.w, run.u, run.mask) == ([4.0, 0.0], [0.0, 1.0], [True, False])
    run.step([2.0, 2.0])
    assert run.w == [3.0, 0.0]


def test_a_rising_rho_shrinks_the_dual_by_as_much() -> None:
    run = reference(Plan(Ramp(1.0, 4.0, start=0, stop=1), Every(1), prune_at=9), [4.0, 2.0])
    run.step([0.0, 0.0])
    assert (run.rho, run.u) == (4.0, [0.0, 0.25])


def test_an_update_without_the_dual_resets_it() -> None:
    run = reference(Plan(Constant(1.0), Every(1), prune_at=9), [4.0, 2.0])
    run.step([0.0, 0.0])
    run.update(Update.AUXILIARY)
    assert run.u == [0.0, 0.0]
