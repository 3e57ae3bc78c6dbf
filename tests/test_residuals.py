"""Residuals: norms of sums of squares, over each weight and over all, and how they print."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admm_nxm import Residuals
from admm_nxm.residuals import measure, ratio

NAN = float("nan")


def test_figures_are_shares_of_the_norm() -> None:
    found = measure({"a": [1.0, 4.0, 9.0, 16.0, 2, 8], "b": [0.0, 12.0, 7.0, 0.0, 0, 8]})
    a, b = found.per_weight["a"], found.per_weight["b"]
    assert (a.primal, a.dual, a.mask_churn) == (0.5, 0.75, 0.25)
    assert (b.primal, b.dual, b.mask_churn) == (0.0, math.inf, 0.0)
    assert (found.primal, found.dual, found.mask_churn) == (0.25, 1.0, 0.125)


def test_a_weight_whose_z_has_not_moved_stands_still_beside_others() -> None:
    found = measure({"moved": [1.0, 4.0, 4.0, 4.0, 1, 4], "never": [1.0, 4.0, NAN, NAN, NAN, NAN]})
    assert (found.dual, found.mask_churn) == (1.0, 0.25)
    assert math.isnan(found.per_weight["never"].dual)
    alone = measure({"never": [1.0, 4.0, NAN, NAN, NAN, NAN]})
    assert alone.primal == 0.5
    assert math.isnan(alone.dual)
    assert math.isnan(alone.mask_churn)


@pytest.mark.parametrize(("above", "below", "expected"), [(0, 0, 0.0), (1, 0, math.inf), (9, 4, 1.5), (0, 4, 0.0)])
def test_ratio_of_two_norms(above: float, below: float, expected: float) -> None:
    assert ratio(above, below) == expected


@given(st.dictionaries(st.text(min_size=1), st.lists(st.floats(0, 1e6), min_size=6, max_size=6), min_size=1))
def test_overall_lies_between_the_least_and_the_largest(rows: dict[str, list[float]]) -> None:
    rows = {name: [row[0], row[1] + 1, row[2], row[3] + 1, row[4], row[5] + 1] for name, row in rows.items()}
    found = measure(rows)
    for figure in ("primal", "dual", "mask_churn"):
        each = [getattr(weight, figure) for weight in found.per_weight.values()]
        slack = 1e-9 * (1 + max(each))
        assert min(each) - slack <= getattr(found, figure) <= max(each) + slack


def test_prints_the_whole_and_the_three_worst_weights() -> None:
    found = measure({f"w{i}": [float(i), 100.0, 1.0, 100.0, 1, 10] for i in range(5)})
    assert str(found) == repr(found)
    lines = str(found).splitlines()
    assert lines[0] == "all 5 weights: primal 14.14% of the norm, dual 10.00%, 10.00% of the mask moved"
    assert [line.split(":")[0] for line in lines[1:]] == ["  w4", "  w3", "  w2"]
    assert lines[1] == "  w4: primal 20.00% of the norm, dual 10.00%, 10.00% of the mask moved"
    assert isinstance(found, Residuals)
