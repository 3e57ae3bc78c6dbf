"""The counters of a run and the plain figures that are made of them."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from admm_nxm import Figures
from admm_nxm.progress import COUNTERS, Progress, counters_of
from tests.cores import WEIGHTS, exact, paper
from tests.helpers import make_net, train


def two_groups() -> torch.optim.Optimizer:
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    return torch.optim.SGD([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}])


def test_counters_lie_in_every_group_and_are_read_where_they_lie_now() -> None:
    inner = two_groups()
    progress = Progress(inner)
    assert (progress.step, progress.pruned_at, progress.frozen, progress.rho) == (0, -1, False, 0.0)
    progress.step, progress.pruned_at = 7, 5
    assert [group["admm_step"] for group in inner.param_groups] == [7, 7]
    assert progress.frozen
    inner.load_state_dict(inner.state_dict())  # replaces the groups
    assert progress.step == 7
    progress.step += 1
    assert [group["admm_step"] for group in inner.param_groups] == [8, 8]


def test_announcing_writes_what_is_missing_and_clearing_takes_all_out() -> None:
    inner = two_groups()
    plain = [dict(group) for group in inner.param_groups]
    progress = Progress(inner)
    progress.step = 3
    progress.announce()
    for group in inner.param_groups:
        assert {key: group[key] for key in COUNTERS} == {**COUNTERS, "admm_step": 3}
    progress.clear()
    assert [dict(group) for group in inner.param_groups] == plain


def of(**counters: Any) -> dict[str, int | float]:
    return counters_of({"param_groups": [{"params": [], **{f"admm_{key}": v for key, v in counters.items()}}]})


def test_a_checkpoint_without_counters_is_at_the_start() -> None:
    assert of() == COUNTERS


@pytest.mark.parametrize(
    "value", [5, 5.0, torch.tensor(5), torch.tensor(5.0), torch.tensor(5, dtype=torch.bfloat16)], ids=repr
)
def test_loaders_may_have_made_another_kind_of_a_number(value: Any) -> None:
    step = of(step=value)["admm_step"]
    assert step == 5
    assert type(step) is int


@pytest.mark.parametrize(
    "value",
    [-1, 2.5, "5", None, [5], float("nan"), float("inf"), 10**400, 1j, torch.ones(2), torch.tensor(1j)],
    ids=repr,
)
def test_what_is_no_count_is_damage(value: Any) -> None:
    with pytest.raises(ValueError, match=r"admm_step is .*, which it cannot be: the checkpoint is damaged"):
        of(step=value)


def test_meta_tensors_are_damage() -> None:
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        of(step=torch.tensor(5, device="meta"))


@pytest.mark.parametrize(("key", "low"), [("pruned_at", -1), ("residual", -1), ("rho", 0), ("calibrated", 0)])
def test_each_counter_has_its_least_value(key: str, low: int) -> None:
    assert of(**{key: low})[f"admm_{key}"] == low
    with pytest.raises(ValueError, match=f"admm_{key} is {low - 1}"):
        of(**{key: low - 1})


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        ({"step": 4, "pruned_at": 5}, "at ADMM step 4 and its weights were pruned at step 5"),
        ({"step": 4, "windows": 1, "windows_solved": 1}, "has solved 1 of 1 windows, and its masks are not frozen"),
        ({"step": 4, "windows": 2, "windows_solved": 7}, "has solved 7 of 2 windows"),
    ],
)
def test_counters_that_contradict_each_other_are_damage(counters: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said) + ".*the checkpoint is damaged"):
        of(**counters)


ANYTHING = st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.booleans() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(sorted(COUNTERS)), ANYTHING))
def test_any_counters_are_taken_or_refused(counters: dict[str, Any]) -> None:
    try:
        found = counters_of({"param_groups": [{"params": [], **counters}]})
    except ValueError:
        return
    assert found.keys() == COUNTERS.keys()
    assert all(type(found[key]) is type(COUNTERS[key]) for key in COUNTERS)


# ---------------------------------------------------------------- figures


def test_figures_of_a_run_in_each_phase() -> None:
    net = make_net()
    optimizer = exact(net)
    start = Figures("dense", 0, 40, 34, 1, 0, 4, 512, 0.0, None, {}, 0.0)
    assert optimizer.figures() == start
    train(net, optimizer, 26)
    assert optimizer.figures() == dataclasses.replace(start, phase="calibration", step=26)
    train(net, optimizer, 8, start=26)
    found = optimizer.figures()
    errors = found.model_errors
    assert list(errors) == list(WEIGHTS)
    assert all(0 < error < 1 for error in errors.values())
    assert found.model_error == pytest.approx(sum(errors.values()) / 4)
    assert found == dataclasses.replace(
        start,
        phase="frozen",
        step=34,
        windows_solved=1,
        pruned_at=34,
        sparsity=0.5,
        model_error=found.model_error,
        model_errors=errors,
    )


def test_figures_count_the_windows_that_are_solved() -> None:
    net = make_net()
    optimizer = exact(net, statistics_memory=1, select={".*up.weight": "1:4", ".*down.weight": "2:4"})
    train(net, optimizer, 34 - 4)
    found = optimizer.figures()
    assert (found.phase, found.windows, found.windows_solved, list(found.model_errors)) == (
        "calibration",
        4,
        2,
        list(WEIGHTS[:2]),
    )
    assert found.sparsity == pytest.approx((0.75 + 0.5) / 4)


def test_figures_of_the_papers_form() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.3)
    train(net, optimizer, 3)
    assert optimizer.figures() == Figures("admm", 3, 40, 28, 0, 0, 4, 512, 0.0, None, {}, 0.3)


def test_figures_are_plain_values_and_copies() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 34)
    found = optimizer.figures()
    assert json.loads(json.dumps(dataclasses.asdict(found)))["step"] == 34
    found.model_errors.clear()  # type: ignore[attr-defined]
    assert optimizer.figures().model_errors


# ---------------------------------------------------------------- in print


def test_printed_optimizer_says_where_the_run_stands() -> None:
    net = make_net()
    optimizer = exact(net, select={".*up.weight": "1:4", ".*down.weight": "2:4"})
    assert str(optimizer).splitlines() == [
        "ADMMNxM(AdamW)",
        '  pattern 1:4, 2:4, w_step "exact"',
        "  phase dense, step 0 of 40",
        "  4 weights with 512 entries, to be pruned after step 34",
    ]
    train(net, optimizer, 34)
    lines = repr(optimizer).splitlines()
    assert lines[2:4] == ["  phase frozen, step 34 of 40", "  4 weights with 512 entries, 62.5% of them zero"]
    assert re.fullmatch(r"  model error [\d.e-]+, mean over weights", lines[4])
    assert "admm_" not in repr(optimizer)


def test_printed_optimizer_of_the_papers_form_without_a_length() -> None:
    assert str(paper(make_net(), prune_at=9)).splitlines()[1:] == [
        '  pattern 2:4, w_step "optimizer"',
        "  phase admm, step 0",
        "  4 weights with 512 entries, to be pruned after step 9",
    ]
