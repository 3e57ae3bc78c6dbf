"""examples/benchmarks/accuracy/report.py on made-up results: figures against values by hand, and bad input."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "accuracy"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


records, summary, layout, plans, tables, targets, plots, report = map(
    load, ("records", "summary", "layout", "plans", "tables", "targets", "plots", "report")
)

Line = dict[str, Any]
PLAN = plans.PLANS["cpu"]
SEEDS = (0, 1, 2, 3, 4)
NOISE = (0.0, 0.2, -0.1, 0.1, -0.2)
"""What differs from seed to seed, alike for all methods but for a hundredth of it."""


def run_line(method: str, task: str, seed: int, score: float, **changes: Any) -> Line:
    line = {
        "task": task,
        "model": PLAN.model,
        "pattern": None if method == "dense" else "2:4",
        "method": method,
        "seed": seed,
        "lr": 5e-5,
        "steps": PLAN.steps,
        "setting": plans.settings_of(method)[0],
        "stage": "final",
        "dev": None,
        "test": score,
        "model_error": None,
        "from_step": 0,
        "seconds": 1.5,
        "device": "one device",
        "commit": "abc",
        "versions": {"torch": "2.5.1"},
        **changes,
    }
    if line["stage"] != "final":
        line["dev"], line["test"] = line["test"], None
    return line


def final(
    method: str,
    score: float,
    pattern: str = "2:4",
    lrs: Iterable[float] = PLAN.usual_lrs,
    seeds: Iterable[int] = SEEDS,
    tasks: Iterable[str] = PLAN.tasks,
    spread: float = 0.01,
) -> list[Line]:
    """Final runs of a method around a score; the differences to other methods have a small spread."""
    found, rng = [], random.Random(f"{method} {pattern}")
    for lr, seed, task in itertools.product(lrs, seeds, tasks):
        one = score + NOISE[seed % 5] + rng.gauss(0.0, spread)
        setting = dict(plans.settings_of(method)[0]) | ({"teacher_lr": lr} if method.endswith("+kd") else {})
        where = {"pattern": None if method == "dense" else pattern, "lr": lr, "setting": setting}
        found.append(run_line(method, task, seed, round(one, 3), **where))
    return found


def tuning(method: str, pattern: str | None, best: float) -> list[Line]:
    """A complete grid, best at one learning rate, with the first setting."""
    lines = []
    for task, seed in itertools.product(PLAN.tasks, PLAN.tuning_seeds):
        for lr in PLAN.lrs:
            dev = 90.0 if lr == best else 50.0
            lines.append(run_line(method, task, seed, dev, pattern=pattern, lr=lr, stage="tune"))
        for setting in plans.settings_of(method)[1:]:
            where = {"pattern": pattern, "lr": PLAN.middle, "setting": setting, "stage": "tune"}
            lines.append(run_line(method, task, seed, 40.0, **where))
    return lines


def tables_of(lines: list[Line]) -> tuple[Any, Any]:
    return tables.usual(PLAN, lines), tables.tuned(PLAN, lines)


def dump(path: Path, lines: Iterable[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


# Statistics ----------------------------------------------------------------------------------------------------------


def test_estimate_by_hand() -> None:
    found = summary.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    half = 4.302652729911275 / 3**0.5  # the t quantile for two degrees of freedom
    assert found.interval == pytest.approx((2.0 - half, 2.0 + half))
    assert found.p == pytest.approx(0.07417990)  # t = 2 * sqrt(3)
    assert summary.estimate([]) is None
    assert summary.estimate([5.0]) == summary.Estimate(5.0, None, 1, None, None)
    assert summary.estimate([5.0, 5.0]) == summary.Estimate(5.0, 0.0, 2, None, None)


def test_holm_by_hand() -> None:
    assert summary.holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert summary.holm([0.04, 0.01], 4) == pytest.approx([0.12, 0.04])  # as [0.04, 0.01, 1, 1]
    assert summary.holm([], 4) == []


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(0, 3))
def test_holm_lies_between_the_p_value_and_bonferroni_and_keeps_the_order(values: list[float], unknown: int) -> None:
    size = len(values) + unknown
    corrected = summary.holm(values, size)
    assert corrected == summary.holm([*values, *[1.0] * unknown], size)[: len(values)]
    for before, after in zip(values, corrected, strict=True):
        assert before <= after <= min(1.0, size * before) + 1e-12
    ranked = sorted(zip(values, corrected, strict=True))
    assert [after for _, after in ranked] == sorted(corrected)


def test_means_over_tasks_take_only_seeds_with_every_task() -> None:
    scores = {("a", 0): 1.0, ("b", 0): 3.0, ("a", 1): 5.0}
    assert summary.over_tasks(scores, ("a", "b")) == {0: 2.0}
    assert summary.over_tasks(scores, ("a",)) == {0: 1.0, 1: 5.0}
    assert summary.over_tasks(scores, ()) == {}
    assert summary.paired(scores, {("a", 0): 0.5, ("c", 0): 1.0}) == {("a", 0): 0.5}


# Tables --------------------------------------------------------------------------------------------------------------


def test_nothing_tuned_is_the_mean_over_the_usual_learning_rates_where_both_were_run() -> None:
    lines = [
        run_line("asp", task, seed, 70.0 + seed + (2 if lr == 1.5e-4 else 0), lr=lr)
        for lr in (5e-5, 1.5e-4, 4.5e-4)
        for seed in (0, 1, 2)
        for task in PLAN.tasks
        if (lr, seed) != (1.5e-4, 2)
    ]
    usual, tuned = tables_of(lines)
    assert usual.of("asp", "2:4") == {(task, seed): 71.0 + seed for task in PLAN.tasks for seed in (0, 1)}
    assert usual.mean("asp", "2:4").mean == 71.5
    assert tuned.of("asp", "2:4") == {}


def test_tuned_is_the_choice_of_dev_and_not_the_best_on_test() -> None:
    lines = tuning("asp", "2:4", 1.5e-4) + final("asp", 90.0, lrs=[5e-5]) + final("asp", 60.0, lrs=[1.5e-4])
    _, tuned = tables_of(lines)
    assert tuned.choices["asp", "2:4"] == [(1.5e-4, {})]
    assert tuned.mean("asp", "2:4").mean == pytest.approx(60.0, abs=0.1)


def test_a_method_with_settings_has_the_first_in_one_table_and_the_chosen_in_the_other() -> None:
    lines = tuning("sr-ste", "2:4", 4.5e-4)
    lines = [{**line, "dev": 95.0} if line["setting"] == {"decay": 2e-3} else line for line in lines]
    lines += [
        {**line, "lr": lr, "setting": {"decay": 2e-3}, "dev": 50.0}
        for line in lines
        if line["setting"] == {"decay": 2e-3}
        for lr in (5e-5, 1.5e-4, 1.35e-3)
    ]
    usual, tuned = tables_of(lines)
    assert tuned.choices["sr-ste", "2:4"] == [(4.5e-4, {"decay": 2e-3})]
    assert usual.choices["sr-ste", "2:4"] == [(lr, {"decay": 2e-4}) for lr in PLAN.usual_lrs]


def test_the_family_is_corrected_for_all_methods_run_or_not_and_words_follow_it() -> None:
    lines = final("admm", 75.0) + final("asp", 70.0) + final("gradual", 76.0) + final("pat", 75.0, spread=2.0)
    usual, _ = tables_of(lines)
    family = usual.family("2:4")
    assert {method: found.word for method, found in family.items()} == {
        "asp": "better",
        "gradual": "worse",
        "pat": "not resolved",
    }
    raw = [found.estimate.p for found in family.values()]
    assert [found.p for found in family.values()] == pytest.approx(summary.holm(raw, len(PLAN.methods) - 1))


# Targets -------------------------------------------------------------------------------------------------------------


def estimated(low: float, high: float) -> Any:
    return summary.Estimate((low + high) / 2, 1.0, 5, (low, high), 0.01)


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(1.7, 2.0, "passed"), (1.6, 2.0, "not resolved"), (1.0, 1.7, "not resolved"), (1.0, 1.6, "failed")],
)
def test_a_limit_is_judged_by_the_whole_interval(low: float, high: float, status: str) -> None:
    assert targets.judge(estimated(low, high), 1.7) == status
    assert targets.judge(None, 1.7) == "not measured"
    assert targets.judge(summary.estimate([9.0]), 1.7) == "not measured"
    assert targets.judge(summary.estimate([9.0, 9.0]), 1.7) == "not resolved"  # no interval


def test_parts_of_a_target() -> None:
    assert targets.all_of(["passed", "not resolved"]) == "not resolved"
    assert targets.all_of(["passed", "not measured", "failed"]) == "failed"
    assert targets.all_of(["passed", "passed"]) == "passed"
    assert targets.all_of([]) == "not measured"
    assert targets.any_of(["failed", "passed"]) == "passed"
    assert targets.any_of(["failed", "not resolved"]) == "not resolved"
    assert targets.any_of(["failed", "failed"]) == "failed"


GAINS = {"asp": 0.0, "dense": 6.0, "asp-late": 1.0, "sparsegpt-late": 3.0, "gradual": 1.0, "sr-ste": 1.0, "pat": 1.0}
GAINS |= {"admm-paper": -2.0, "admm-inputs": 4.0, "admm": 5.0, "asp+kd": 1.0, "admm+kd": 5.5}


def complete(gains: dict[str, float], best: float = 1.5e-4) -> list[Line]:
    """Everything but 2:8, all methods best at the same learning rate, which is one of the usual ones."""
    lines = []
    for method, gain in gains.items():
        for pattern in ("2:4", "1:4") if method != "dense" else ("2:4",):
            where = None if method == "dense" else pattern
            if not method.endswith("+kd"):
                lines += tuning(method, where, best)
            lines += final(method, 70.0 + gain - (4.0 if where == "1:4" else 0.0), pattern)
    return lines


def statuses(lines: list[Line]) -> list[str]:
    return [verdict.status for verdict in targets.verdicts(*tables_of(lines))]


def test_verdicts_of_a_complete_study() -> None:
    assert statuses(complete(GAINS)) == [
        *("passed", "passed", "passed", "passed"),  # tuned: 1:4, 2:4, above all, no task behind
        *("failed", "passed"),  # nothing tuned: 8 points at 1:4, 3 points at 2:4
        *("passed",) * 4,
    ]


@pytest.mark.parametrize(
    ("change", "target", "status"),
    [
        ({"asp": 4.0}, 0, "failed"),
        ({"asp": 4.0, "dense": 5.1}, 1, "passed"),  # near dense
        ({"asp": 4.0}, 1, "failed"),
        ({"pat": 6.0}, 2, "failed"),
        ({"asp": 6.0}, 3, "failed"),
        ({"admm+kd": 4.0}, 6, "failed"),
        ({"asp+kd": 7.0}, 8, "failed"),
    ],
)
def test_each_target_can_fail(change: dict[str, float], target: int, status: str) -> None:
    assert statuses(complete({**GAINS, **change}))[target] == status


def test_targets_of_a_partial_study() -> None:
    assert set(statuses([])) == {"not measured"}
    partial = [line for line in complete(GAINS) if line["method"] in ("dense", "asp", "admm")]
    found = statuses(partial)
    assert found[:2] == ["passed", "passed"]
    assert found[2] == "not measured"
    assert found[3] == "passed"
    one_task = [line for line in partial if line["task"] == PLAN.tasks[0]]
    assert set(statuses(one_task)) == {"not measured"}


# Text ----------------------------------------------------------------------------------------------------------------


def test_text_of_figures() -> None:
    assert layout.difference(None) == layout.NOT_RUN
    assert layout.difference(estimated(-0.04, 1.0)) == "+0.5 [+0.0, +1.0]"
    assert layout.difference(summary.estimate([1.0])) == "+1.0 (one seed, no interval)"
    assert layout.score(summary.estimate([1.0, 3.0])) == "2.0 ± 1.4 (2)"
    assert layout.setting_text({"lr": 5e-5, "by_way_of": "2:4"}) == "lr 5e-5, by_way_of 2:4"
    assert [layout.number(value) for value in (0.85, 1.35e-3, 1.5e-4, 0.0)] == ["0.85", "1.35e-3", "1.5e-4", "0"]
    assert layout.with_seeds(estimated(-0.04, 1.0)) == "+0.5 [+0.0, +1.0], 5 seeds"
    assert layout.table(["a", "b"], [["x|y", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]
    with pytest.raises(ValueError, match="2 headings but 1 cells"):
        layout.table(["a", "b"], [["x"]])


def explore_line(task: str, seed: int, dev: float, setting: Line, lr: float = 3e-4, pattern: str = "1:4") -> Line:
    return run_line("admm", task, seed, dev, stage="explore", setting=setting, lr=lr, pattern=pattern)


def layer_line(seed: int, number: int, **changes: Any) -> Line:
    line = run_line("admm", PLAN.tasks[0], seed, 0.0, stage="layers", setting={}, lr=3e-4)
    kept = {key: value for key, value in line.items() if key not in ("dev", "test", "from_step")}
    own = {"weight": f"w{number}", "model_error": 0.1 / (number + 1), "predicted": number + 1.0}
    return {**kept, **own, "loss": 0.1 * number, "dev": -1.0 * number, **changes}


def everything() -> list[Line]:
    base = {"prune_at": 0.85}
    explored = [explore_line(task, seed, 70.0, base) for task in PLAN.explore_tasks for seed in (100, 101)]
    explored += [
        explore_line(task, seed, 70.0 + gain, {"prune_at": 0.6})
        for task in PLAN.explore_tasks
        for seed, gain in ((100, 1.0), (101, -0.5))
    ]
    return complete(GAINS) + explored + [layer_line(seed, number) for seed in (100, 101) for number in range(4)]


def arguments(results: Path) -> list[str]:
    return ["--results", str(results), "--output", str(results.parent / "results.md")]


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    dump(tmp_path / "docs" / "results" / "cpu.jsonl", everything())
    return tmp_path / "docs" / "results"


def test_the_page(results: Path) -> None:
    pages, pictures, _ = report.build(results, results.parent / "results.md")
    page, log = pages.values()
    first = page.split("##")[0]
    assert 8 <= sum(line.startswith("- ") for line in first.splitlines()) <= 10
    assert row(first, "`dense`: accuracy")[1:] == ["76.0 ± 0.2 (5)"] * 4
    assert [cell.split()[0] for cell in row(first, report.METHODS["admm"])[1:]] == ["-1.0", "-5.0", "-1.0", "-5.0"]
    assert "**Against `dense`, `admm` costs 1.0 points at 2:4 and 5.0 points at 1:4; `asp`" in first
    assert "At 1:4 `admm` is better than `asp` (+5.0), `asp-late` (+4.0)" in first
    assert "the task that gains most, `admm` minus `asp`: " in first
    assert "`admm+kd` minus `admm`: 2:4 +0.5 [+0.5, +0.5], 5 seeds" in first
    assert (
        row(page.split("### Nothing tuned")[1].split("###")[0].split("Each task")[0], "`admm`")[1] == "75.0 ± 0.2 (5)"
    )
    explored = page.split("200 steps:")[1].split("100 steps:")[0]
    assert row(explored, "prune_at 0.6")[1:3] == ["+0.2 (+1.0, -0.5)", layout.NOT_RUN]
    assert row(explored, "prune_at 0.85")[1] == "70.0"
    assert page.count("| prune_at 0.9 | not run | not run | not run | not run |") == 4
    assert report.UNLIKE not in page
    assert re.search(r"model error \| rise of dev loss \| -1\.00, -1\.00", page)
    assert re.search(r"cost by the quadratic model \| rise of dev loss \| 1\.00, 1\.00", page)
    assert row(page, "`asp`, nothing tuned")[-1] == "18 of 18 runs"
    assert "No final run" not in page
    each_rate = row(log.split("`admm` minus")[0], "`dense`")
    assert each_rate[1] == each_rate[3] == "76.0 ± 0.2 (5)"
    assert "`asp`, 2:4 | lr 1.5e-4 | 90.0 | chosen" in log
    assert row(page.split("### Tuned")[1].split("Each task")[0], "`gradual`")[2] == "lr 1.5e-4, stop 0.5"
    assert [picture.name for picture in pictures] == ["accuracy-cpu.svg", "layers-cpu.svg"]


def test_every_partial_study_makes_a_page(results: Path) -> None:
    lines = everything()
    for count in (0, 1, 5, 40, 200, 600, len(lines)):
        dump(results / "cpu.jsonl", lines[:count])
        pages, _, shown = report.build(results, results.parent / "results.md")
        assert len(pages) == 2
        assert shown
    dump(results / "cpu.jsonl", [])
    pages, pictures, shown = report.build(results, results.parent / "results.md")
    assert "No final run was made yet" in next(iter(pages.values()))
    assert pictures == {}
    assert "the study is under way" in shown


def test_the_page_says_how_far_the_study_is() -> None:
    def said(seeds: Iterable[int] = (), rates: Iterable[float] = PLAN.usual_lrs, methods: Iterable[str] = GAINS) -> str:
        """Without the final runs that have such a method, rate and seed; every method has chosen 1.5e-4."""
        without = set(itertools.product(methods, rates, seeds))
        lines = [x for x in complete(GAINS) if x["stage"] == "tune" or (x["method"], x["lr"], x["seed"]) not in without]
        return str(report._how_far(*tables_of(lines))[0])

    none = "at 2:8 no methods have all tuned runs, and nothing else is complete"
    assert f"was made: no methods have all runs at 2:4 and 1:4; {none}. Figures and" in said(seeds=(3, 4))
    assert "`admm`, `asp+kd`, `admm+kd`, `gradual`, `sr-ste`" in said()
    assert f"have all runs at 2:4 and 1:4; {none}. No verdict waits for a run" in said()
    assert "Figures and verdicts may change" in said(seeds=(4,), rates=(5e-5,), methods=("asp",))
    for rate, half, end in (
        (5e-5, "; `gradual`, `pat` have all tuned runs there", "No verdict waits for a run"),
        (1.5e-4, "", "Figures and verdicts may change"),
    ):
        late = said(seeds=(4,), rates=(rate,), methods=("pat", "gradual"))
        assert f"have all runs at 2:4 and 1:4{half}; {none}. {end}." in late
        whole, _, _ = late.partition(" have all runs")
        assert "`sr-ste`" in whole
        assert "`pat`" not in whole
        assert "`gradual`" not in whole
    some = [*complete(GAINS), *(line for m in ("asp", "admm") for line in final(m, 70.0, "2:8", lrs=(1.5e-4,)))]
    assert "at 2:8 `asp`, `admm` have all tuned runs, and" in report._how_far(*tables_of(some))[0]
    all_of_them = [*complete(GAINS), *(line for m in GAINS if m != "dense" for line in final(m, 70.0, "2:8"))]
    assert report._how_far(*tables_of(all_of_them)) == []


def test_the_lead_compares_with_no_method_that_has_one_seed() -> None:
    for seeds, shown in ((range(5), True), ((0, 1), True), ((0,), False)):
        lines = [x for x in complete(GAINS) if x["method"] != "pat" or x["stage"] == "tune" or x["seed"] in seeds]
        said = report._compared(tables_of(lines)[1])
        assert said.startswith("Tuned, at 2:4 `admm` is better than")
        assert ("`pat`" in said.split(" At 1:4 ")[1]) is shown


def test_the_lead_says_how_many_seeds_there_are_where_they_are_fewer_than_the_plan_has() -> None:
    """2:8 has three seeds by declaration; the dense model is then that of the same seeds."""
    lines = complete(GAINS) + final("asp", 70.0, "2:8", seeds=(0, 1, 2)) + final("admm", 70.5, "2:8", seeds=(0, 1, 2))
    usual, _ = tables_of(lines)
    assert "At 2:8 `admm` is better than `asp` (+0.5, 3 seeds)." in report._compared(usual)
    assert [cell[-3:] for cell in row(report._costs([(usual, "2:4"), (usual, "2:8")]), "`dense`: accuracy")[1:]] == [
        "(5)",
        "(3)",
    ]
    few = complete(GAINS) + final("asp", 70.0, "2:8", seeds=(0, 1), spread=1.0)
    said = report._compared(tables_of(few + final("admm", 70.9, "2:8", seeds=(0, 1), spread=1.0))[0])
    assert re.search(r"At 2:8 `admm` is ahead of these, but not resolved: `asp` \(\+\d\.\d \[.*\], 2 seeds\)\.$", said)


def test_the_log_counts_pairs_with_different_devices() -> None:
    lines = final("asp", 70.0) + final("admm", 71.0)
    lines = [{**x, "device": "other"} if (x["method"], x["seed"]) == ("asp", 1) else x for x in lines]
    found = row(report.each_task(tables_of(lines)[0]), "`asp`")
    assert found[-1] == f"{len(PLAN.tasks)} of {len(PLAN.tasks) * len(SEEDS)}"
    assert all(cell.startswith("+1.0 [") for cell in found[1:-1])
    assert len(found) == len(PLAN.tasks) + 3  # one column without the task that gains most


def test_the_gain_without_one_task() -> None:
    """The task is the one that gains most, and an average over the others is left."""
    lines = final("asp", 70.0) + final("admm", 71.0)
    lines = [{**x, "test": x["test"] + 9} if (x["method"], x["task"]) == ("admm", "polarity") else x for x in lines]
    usual, tuned = tables_of(lines)
    (said,) = report._without_one_task([(usual, "2:4"), (tuned, "2:4")])
    assert said.startswith("Without polarity, the task that gains most, `admm` minus `asp`: nothing tuned, 2:4 +1.0 [")


def at_200(lines: list[Line]) -> str:
    return str(report.explored(PLAN, lines).split("100 steps:")[0])


def test_means_over_different_exploring_runs_are_not_compared() -> None:
    base = [explore_line(task, seed, 70.0, plans.BASE) for task in PLAN.explore_tasks for seed in (100, 101)]
    other = [explore_line(task, 100, 71.0, {"prune_at": 0.6}) for task in PLAN.explore_tasks]
    assert row(at_200(base + other), "prune_at 0.6")[1] == "2 of 4 runs"
    assert row(at_200(base[:3] + other), "prune_at 0.85")[1] == "3 of 4 runs"
    whole = [*other, *(explore_line(task, 101, 70.5, {"prune_at": 0.6}) for task in PLAN.explore_tasks)]
    assert row(at_200(base[:3] + whole), "prune_at 0.6")[1] == "base: 3 of 4 runs"
    assert row(at_200(whole), "prune_at 0.6")[1] == "base: 0 of 4 runs"
    assert row(at_200(base + whole), "prune_at 0.6")[1] == "+0.8 (+1.0, +0.5)"


@pytest.mark.parametrize("key", ["device", "commit"])
def test_a_gain_over_runs_of_another_device_or_commit_is_marked(key: str) -> None:
    base = [explore_line(task, seed, 70.0, plans.BASE) for task in PLAN.explore_tasks for seed in (100, 101)]
    other = [{**line, "setting": {"prune_at": 0.6}, "dev": 71.0} for line in base]
    assert report.UNLIKE not in report.explored(PLAN, base + other)
    found = report.explored(PLAN, [*base, *other[:-1], {**other[-1], key: "another"}])
    assert row(found.split("100 steps:")[0], "prune_at 0.6")[1] == f"+1.0 (+1.0, +1.0){report.UNLIKE}"
    assert found.endswith(
        f"{report.UNLIKE} Some of these runs and those they are compared with differ in device or commit."
    )


def test_a_grid_that_widens_late_leaves_the_other_choices_as_they_are() -> None:
    """A rate is added for one method; the others keep what dev chose until they have runs there too."""
    lines = complete({method: gain for method, gain in GAINS.items() if method != "pat"})
    before = tables_of(lines)[1]
    lines += tuning("pat", "2:4", PLAN.lrs[0])
    after = tables_of(lines)[1]
    assert after.choices == before.choices
    assert plans.Tuning(PLAN, lines).choose("pat", "2:4") is None
    said = report.missing(PLAN, lines)
    assert "so 1.67e-5 joins the learning rates. Not tried there yet: `dense`, `asp`" in said
    assert "`pat`" in said.split("Not tried")[1]
    where = {"pattern": "2:4", "lr": 1.67e-5, "stage": "tune"}
    lines += [run_line("pat", task, seed, 95.0, **where) for task in PLAN.tasks for seed in PLAN.tuning_seeds]
    assert plans.Tuning(PLAN, lines).choose("pat", "2:4") == (1.67e-5, {"healing": 0.75})
    lines += tuning("sr-ste", "1:4", PLAN.lrs[-1])  # later lines stand for earlier ones
    twice = plans.Tuning(PLAN, lines)
    assert twice.lrs == (1.67e-5, *PLAN.lrs, 4.05e-3)
    assert twice.choose("pat", "2:4") == (1.67e-5, {"healing": 0.75})
    assert twice.choose("sr-ste", "1:4") is None


def test_a_method_that_has_begun_is_not_called_not_run() -> None:
    lines = [x for x in complete(GAINS) if x["method"] != "asp-late" or x["stage"] == "tune" or x["task"] != "polarity"]
    usual, tuned = tables_of(lines)
    first = report.METHODS["asp-late"]
    assert row(report.overview(usual, tuned), first)[1:] == ["not all tasks yet"] * 4
    assert row(report.means(tuned), "`asp-late`")[1] == "not all tasks yet"


def test_the_larger_study_leads(results: Path) -> None:
    full = plans.PLANS["full"]
    lines = [
        run_line(method, task, seed, score, model=full.model, steps=full.steps, lr=lr)
        for method, score in (("dense", 80.0), ("asp", 60.0), ("admm", 79.0))
        for task in full.tasks
        for seed in (0, 1)
        for lr in full.usual_lrs
    ]
    dump(results / "full.jsonl", lines)
    pages, _, shown = report.build(results, results.parent / "results.md")
    page = next(iter(pages.values()))
    untouched = ", ".join(f"`{method}`" for method in full.methods if method not in ("dense", "asp", "admm"))
    assert f"No final run, nothing tuned: {untouched}." in page
    assert page.index(report.subject(full)) < page.index(report.subject(PLAN))
    assert report.subject(full) in shown
    assert report.subject(PLAN) not in shown


def test_two_runs_give_the_same_bytes_and_links_lead_to_the_pictures(results: Path) -> None:
    pytest.importorskip("matplotlib")
    seen = []
    for elsewhere in (True, False):
        if elsewhere:
            command = [sys.executable, str(FOLDER / "report.py"), *arguments(results)]
            subprocess.run(command, check=True, capture_output=True)
        else:
            assert report.main(arguments(results)) == 0
        seen.append({path.name: path.read_bytes() for path in [*results.glob("*.svg"), *results.parent.glob("*.md")]})
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"accuracy-cpu.svg", "layers-cpu.svg", "results.md", "results-log.md"}
    for name, data in seen[0].items():
        assert not re.search(rb"[ \t]$", data, flags=re.MULTILINE), name
        assert str(results).encode() not in data
    links = re.findall(r"\]\((.*?)\)", seen[0]["results.md"].decode())
    assert len(links) == 3
    assert all((results.parent / link).is_file() for link in links)


def test_check(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = [*arguments(results), "--check"]
    assert report.main(command) == 1
    assert not (results.parent / "results.md").exists()
    assert report.main(arguments(results)) == 0
    assert report.main(command) == 0
    capsys.readouterr()

    lines = everything()
    dump(results / "cpu.jsonl", [{**line, "test": 1.0} if line is lines[-100] else line for line in lines[:-8]])
    (results / "accuracy-cpu.svg").unlink()
    assert report.main(command) == 1
    shown = capsys.readouterr().out
    assert "accuracy-cpu.svg: missing" in shown
    dump(results / "cpu.jsonl", [*lines[:-1], layer_line(101, 3, loss=9.0)])
    assert report.main(command) == 1
    assert "layers-cpu.svg: not drawn from these data" in capsys.readouterr().out


def test_the_readme_holds_the_overview_between_its_marks(results: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = results.parent / "README.md"
    command = [*arguments(results), "--readme", str(readme)]
    readme.write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    assert report.main(command) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- study -->\n")
    assert text.endswith("<!-- /study -->\nafter\n")
    assert "old" not in text
    assert row(text, "admm: this package")[1] == "75.0 ± 0.2 (5)"
    assert text.count("**passed**") == 9
    assert text.count("**failed**") == 1
    assert report.main([*command, "--check"]) == 0
    readme.write_text(text.replace("| admm: this", "| ours: this"))
    assert report.main([*command, "--check"]) == 1
    readme.write_text("no marks")
    assert report.main(command) == 0
    assert readme.read_text() == "no marks"


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed=-1 must be an int, at least 0"),
        ({"seed": True}, "seed=true must be an int"),
        ({"test": 101.0}, "test=101.0 must be a number from 0 to 100, or null"),
        ({"test": float("nan")}, "test=NaN must be"),
        ({"lr": "fast"}, 'lr="fast" must be a finite number'),
        ({"pattern": ""}, 'pattern="" must be a text of one line, or null'),
        ({"pattern": None}, "the pattern is null for dense runs"),
        ({"stage": "other"}, "must be one of tune, final, explore, layers"),
        ({"stage": "tune"}, "final runs have a score on test alone"),
        ({"dev": 50.0}, "final runs have a score on test alone"),
        ({"test": None}, "final runs have a score on test alone"),
        ({"versions": {"torch": 2}}, "must be an object of texts"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_wrong_line_is_named(change: Line, message: str, tmp_path: Path) -> None:
    line = run_line("asp", "topics", 0, 50.0)
    dump(tmp_path / "x.jsonl", [line, {**line, "seed": 1, **change}])
    with pytest.raises(records.InputError, match=re.escape(message)) as caught:
        records.read(tmp_path)
    assert str(caught.value).startswith("x.jsonl:2: ")
    assert str(caught.value).endswith("; delete this line: the study makes its run again")


def test_missing_keys_and_repeats_are_named(tmp_path: Path) -> None:
    line = run_line("asp", "topics", 0, 50.0)
    for key in line:
        if key != "stage":
            dump(tmp_path / "x.jsonl", [{name: value for name, value in line.items() if name != key}])
            with pytest.raises(records.InputError, match=f"x.jsonl:1: no key '{key}'"):
                records.read(tmp_path)
    dump(tmp_path / "x.jsonl", [line])
    dump(tmp_path / "y.jsonl", [{**line, "test": 60.0}])
    with pytest.raises(records.InputError, match=r"y\.jsonl:1: the same run as x\.jsonl:1"):
        records.read(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{\n", "x.jsonl:1: not JSON"), ("[1]\n", "must be a JSON object")])
def test_bad_input_ends_with_one_line_and_status_2(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    assert report.main(["--results", str(tmp_path), "--output", str(tmp_path / "results.md")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results.md").exists()
    assert report.main(["--results", str(tmp_path / "nowhere"), "--output", str(tmp_path / "results.md")]) == 2
    assert "no such folder of results" in capsys.readouterr().err
