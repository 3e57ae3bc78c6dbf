"""examples/benchmarks/accuracy/report.py on made-up results: figures against values by hand, and bad input."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("scipy")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "accuracy"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


records, summary, layout, figures, report = map(load, ("records", "summary", "layout", "figures", "report"))

Line = dict[str, Any]
# Differences by hand: task a 2, 2, 3; task b 2, 3, 1; seed by seed over both tasks 2, 2.5, 2.
ASP = {("a", 0): 80.0, ("a", 1): 81.0, ("a", 2): 82.0, ("b", 0): 60.0, ("b", 1): 61.0, ("b", 2): 62.0}
ADMM = {("a", 0): 82.0, ("a", 1): 83.0, ("a", 2): 85.0, ("b", 0): 62.0, ("b", 1): 64.0, ("b", 2): 63.0}


def run_line(method: str = "admm", task: str = "a", seed: int = 0, test: float | None = 80.0, **changes: Any) -> Line:
    is_admm = method.startswith("admm")
    return {
        "task": task,
        "model": "tiny",
        "pattern": None if method == "dense" else "2:4",
        "method": method,
        "seed": seed,
        "lr": 5e-5,
        "steps": 100,
        "dev": 70.0,
        "test": test,
        "primal_residual": 0.001 if is_admm else None,
        "projection_loss": 0.05 if is_admm else None,
        "seconds": 1.5,
        "device": "one device",
        "commit": "abc",
        "versions": {"torch": "2.5.1"},
        "setting": {},
        "stage": "final",
        **changes,
    }


def run_lines(method: str, scores: dict[tuple[str, int], float], **changes: Any) -> list[Line]:
    return [run_line(method, task, seed, score, **changes) for (task, seed), score in scores.items()]


def shifted(scores: dict[tuple[str, int], float], by: float) -> dict[tuple[str, int], float]:
    return {pair: score + by for pair, score in scores.items()}


def trace_line(**changes: Any) -> Line:
    trace = {"step": [10, 20, 30], "primal_residual": [0.5, 0.05, 0.0], "churn": [None, 0.2, 0.0]}
    line = {"task": "a", "model": "tiny", "pattern": "2:4", "method": "admm", "seed": 0, "lr": 5e-5, "steps": 100}
    return {**line, "trace": trace, **changes}


def dump(path: Path, lines: Iterable[Line]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    return folder


Document = Callable[..., str]


@pytest.fixture
def document(results: Path) -> Document:
    def make(lines: Iterable[Line]) -> str:
        dump(results / "runs.jsonl", lines)
        text: str = report.build(results, results.parent / "results.md")[0]
        return text

    return make


def row(text: str, *start: str) -> list[str]:
    """Cells of the one row that starts with these cells."""
    lines = [line for line in text.splitlines() if line.startswith("| " + " | ".join(start) + " |")]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[0])[1:-1]]


def section(text: str, title: str) -> str:
    """A section without those below it."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[2]


def verdict(text: str, target: str) -> list[str]:
    lines = [line for line in section(text, "Targets").splitlines() if target in line]
    assert len(lines) == 1, lines
    return [cell.strip() for cell in lines[0].split("|")[1:-1]]


# Statistics


def test_estimate_by_hand() -> None:
    # 1 and 3: mean 2, sd sqrt(2), standard error 1, and t(0.975; 1) = 12.7062.
    found = summary.estimate([1.0, 3.0])
    assert (found.mean, found.n) == (2.0, 2)
    assert found.sd == pytest.approx(2**0.5)
    assert found.interval == pytest.approx((2 - 12.7062047, 2 + 12.7062047))


def test_estimate_of_one_value_has_no_spread_and_of_none_is_nothing() -> None:
    assert summary.estimate([5.0]) == summary.Estimate(5.0, None, 1, None)
    assert summary.estimate([]) is None


@pytest.mark.parametrize(
    ("values", "reading"),
    [
        ([5.0], "one seed"),
        ([2.0, 3.0, 1.0], "not resolved"),
        ([2.0, 2.0, 3.0], "above"),
        ([-2.0, -2.0, -3.0], "below"),
        ([2.0, 2.0, 2.0], "not resolved"),  # no spread, no interval
        ([0.3 - 0.1, 0.2, 0.2], "not resolved"),  # nor from rounding
    ],
)
def test_reading(values: list[float], reading: str) -> None:
    assert summary.estimate(values).reading == reading


def test_comparison_by_hand() -> None:
    found = summary.compare(ADMM, ASP)
    # Seed-wise means 2, 2.5, 2: sd = sqrt(1/12), standard error 1/6, t(0.975; 2) = 4.3026527.
    assert found.overall.mean == pytest.approx(13 / 6)
    assert found.overall.sd == pytest.approx((1 / 12) ** 0.5)
    assert found.overall.interval == pytest.approx((13 / 6 - 4.3026527 / 6, 13 / 6 + 4.3026527 / 6))
    assert found.per_task["a"].mean == pytest.approx(7 / 3)
    assert found.per_task["a"].interval == pytest.approx((7 / 3 - 4.3026527 / 3, 7 / 3 + 4.3026527 / 3))
    assert found.per_task["b"].mean == pytest.approx(2.0)
    assert found.per_task["b"].sd == pytest.approx(1.0)
    assert (found.count("above"), found.count("not resolved"), found.count("below")) == (1, 1, 0)
    assert (found.tasks, found.seeds, found.pairs, found.used) == (("a", "b"), (0, 1, 2), 6, 6)


def test_comparison_uses_only_what_both_methods_have() -> None:
    first = {**ADMM, ("c", 0): 99.0, ("a", 7): 99.0}
    second = {pair: score for pair, score in ASP.items() if pair != ("b", 1)} | {("d", 0): 1.0}
    found = summary.compare(first, second)
    assert found.tasks == ("a", "b")
    assert found.seeds == (0, 2)  # seed 1 lacks task b
    assert (found.pairs, found.used) == (5, 4)
    assert found.overall.mean == pytest.approx(2.0)  # seeds 0 and 2: 2 and 2
    assert found.per_task["a"].n == 3


def test_comparison_without_a_seed_that_has_every_task() -> None:
    found = summary.compare({("a", 0): 1.0, ("b", 1): 1.0}, {("a", 0): 0.0, ("b", 1): 0.0})
    assert found.overall is None
    assert layout.basis(found) == "no seed has all 2 shared tasks; 2 pairs"


def test_mean_over_tasks_weighs_tasks_alike() -> None:
    assert summary.mean_over_tasks({("a", 0): 80.0, ("a", 1): 90.0, ("b", 0): 60.0}) == pytest.approx(72.5)
    assert summary.mean_over_tasks({}) is None


def test_text_of_differences() -> None:
    assert layout.difference(None) == "not measured"
    assert layout.difference(summary.estimate([1.0])) == "+1.00 (one seed, no interval)"
    assert layout.difference(summary.estimate([1.0, 1.0])) == "+1.00 (2 equal seeds, no interval), not resolved"
    assert layout.difference(summary.estimate([2.0, 3.0, 1.0])) == "+2.00 [-0.48, +4.48], not resolved"
    assert layout.difference(summary.estimate([2.0, 2.0, 3.0])) == "+2.33 [+0.90, +3.77]"
    assert layout.signed(-0.001) == "+0.00"


# The document


def test_tables_hold_the_figures(document: Document) -> None:
    text = document([*run_lines("asp", ASP), *run_lines("admm", ADMM)])
    part = section(text, "2:4")
    accuracies, differences = part.split("Paired difference to `asp`", 1)
    assert row(accuracies, "`asp`")[1:] == ["81.00 ± 1.00 (3)", "61.00 ± 1.00 (3)", "71.00"]
    assert row(accuracies, "`admm`")[1:] == ["83.33 ± 1.53 (3)", "63.00 ± 1.00 (3)", "73.17"]
    to_asp, to_each = differences.split("Paired difference to each reference", 1)
    assert row(to_asp, "`admm`")[1:] == [
        "+2.33 [+0.90, +3.77]",
        "+2.00 [-0.48, +4.48], not resolved",
        "+2.17 [+1.45, +2.88]",
        "3 seeds × 2 tasks, 6 pairs",
    ]
    assert row(to_each, "`admm`", "`asp`")[4:] == ["1 / 1 / 0", "2 of 2"]


def test_methods_and_patterns_come_in_a_fixed_order_unknown_ones_last(document: Document) -> None:
    lines = [run_line(method) for method in ("zeta", "admm+kd", "alpha", "admm", "asp", "dense")]
    text = document([*lines, run_line(pattern="3:4"), run_line(pattern="1:4")])
    accuracies = section(text, "2:4").split("Paired", 1)[0]
    assert re.findall(r"^\| `(.*?)`", accuracies, flags=re.MULTILINE) == [
        *("dense", "asp", "admm", "admm+kd"),
        *("alpha", "zeta"),
    ]
    assert re.findall(r"^## (\d:\d)$", text, flags=re.MULTILINE) == ["2:4", "1:4", "2:8", "3:4"]


def test_a_method_without_all_tasks_says_so(document: Document) -> None:
    text = document([*run_lines("asp", ASP), run_line("admm", "a")])
    assert row(section(text, "2:4").split("Paired", 1)[0], "`admm`")[1:] == [
        "80.00 (1)",
        "not measured",
        "80.00 (1 of 2 tasks)",
    ]


def test_single_seeds_are_counted_apart(document: Document) -> None:
    text = document([run_line("asp", test=70.0), run_line("admm", test=90.0)])
    assert row(text, "`admm`", "`asp`")[2:] == [
        "+20.00 (one seed, no interval)",
        "1 seed × 1 task, 1 pair",
        "0 / 0 / 0, 1 task with one seed",
        "0 of 0",
    ]


def test_provenance(document: Document) -> None:
    lines = [run_line(), run_line(seed=1, device="another", seconds=10), run_line("asp", versions={"numpy": "2.0"})]
    part = section(document([*lines, run_line(stage="tune", test=None)]), "Provenance")
    assert row(part, "runs")[1] == "4: 1 tune, 3 final, 0 budget, 0 ablation"
    assert row(part, "device")[1] == "another (1 run), one device (3 runs)"
    assert row(part, "commit")[1] == "abc"
    assert row(part, "torch")[1] == "2.5.1 (3 runs), not recorded (1 run)"
    assert row(part, "time")[1] == "14 seconds over all runs"  # 1.5 + 10 + 1.5 + 1.5 = 14.5, to even


def test_two_models_are_never_mixed(document: Document) -> None:
    text = document([*run_lines("asp", ASP), *run_lines("admm", ADMM, model="other")])
    assert "Paired difference to `asp`: not measured." in section(text, "2:4, other")
    assert "`admm`" not in section(text, "2:4, tiny").split("Paired")[0]


def test_without_any_data_every_part_says_not_measured(results: Path) -> None:
    text, files = report.build(results, results.parent / "results.md")
    assert files == {}
    assert "nothing was measured yet" in section(text, "Provenance")
    for title in ("2:4", "1:4", "2:8", "Tuning", "Other budgets and learning rates", "Ablations of `admm`"):
        assert "not measured." in section(text, title)
    for title in ("At the projection", "During training"):
        assert "not measured." in section(text, title)
    verdicts = re.findall(r"\*\*(.*?)\*\*", section(text, "Targets"))
    assert set(verdicts) == {"not measured"}
    assert len(verdicts) == 19  # three and two of distillation for each of three patterns, four of the projection


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        *((method, stage) for method in ("dense", "asp", "admm") for stage in ("tune", "final", "budget")),
        ("admm", "ablation"),
    ],
)
def test_any_single_run_makes_a_document(document: Document, method: str, stage: str) -> None:
    setting = {"variant": "x"} if stage == "ablation" else {}
    line = run_line(method, stage=stage, setting=setting, test=80.0 if stage in records.TESTED else None)
    assert "1 " + stage in section(document([line]), "Provenance")


# Targets


@pytest.mark.parametrize(
    ("over_asp", "under_dense", "expected"),
    [
        (1.7, 5.0, "**pass**"),
        (1.69, 5.0, "**fail**"),
        (0.5, 0.3, "**pass**"),
        (0.5, 0.31, "**fail**"),
        (-9.0, -1.0, "**pass**"),
    ],
)
def test_target_of_2_4(document: Document, over_asp: float, under_dense: float, expected: str) -> None:
    lines = [*run_lines("asp", shifted(ADMM, -over_asp)), *run_lines("dense", shifted(ADMM, under_dense))]
    found = verdict(document([*lines, *run_lines("admm", ADMM)]), "points below dense")
    assert found[2] == expected + ", not resolved"  # equal differences have no interval


@pytest.mark.parametrize(("over_asp", "expected"), [(1.8, "**pass**, not resolved"), (1.0, "**not measured**")])
def test_target_of_2_4_with_half_of_it_open(document: Document, over_asp: float, expected: str) -> None:
    text = document([*run_lines("asp", shifted(ADMM, -over_asp)), *run_lines("admm", ADMM)])
    assert verdict(text, "points below dense")[2] == expected


@pytest.mark.parametrize(
    ("pattern", "lead", "word", "expected"),
    [
        ("2:4", 0.0, "not behind", "**pass**"),
        ("2:4", -0.1, "not behind", "**fail**"),
        ("1:4", 0.0, "above", "**fail**"),
        ("1:4", 0.1, "above", "**pass**"),
        ("2:8", 0.0, "above", "**fail**"),
        ("2:8", 0.1, "above", "**pass**"),
    ],
)
@pytest.mark.parametrize("other", ["sr-ste", "pat"])
def test_targets_against_others(
    document: Document, pattern: str, lead: float, word: str, expected: str, other: str
) -> None:
    lines = [*run_lines(other, shifted(ADMM, -lead), pattern=pattern), *run_lines("admm", ADMM, pattern=pattern)]
    found = [cells for cells in section(document(lines), "Targets").splitlines() if f"| {pattern} |" in cells]
    (line,) = [cells for cells in found if f"admm {word} {other}," in cells]
    assert f"| {expected}" in line
    assert sum("**not measured**" in cells for cells in found) == len(found) - 1


@pytest.mark.parametrize("pattern", ["1:4", "2:8"])
def test_being_near_dense_is_not_enough_at_higher_sparsity(document: Document, pattern: str) -> None:
    lines = [*run_lines("asp", shifted(ADMM, -1.0), pattern=pattern), *run_lines("dense", ADMM)]
    text = document([*lines, *run_lines("admm", ADMM, pattern=pattern)])
    (line,) = [
        line
        for line in section(text, "Targets").splitlines()
        if line.startswith(f"| {pattern}") and "above asp" in line
    ]
    assert "**fail**" in line


def test_a_verdict_says_whether_its_limit_is_in_the_interval(document: Document) -> None:
    # +2.17 [+1.45, +2.88] includes 1.7; two points more exclude it.
    near = document([*run_lines("asp", ASP), *run_lines("admm", ADMM)])
    assert verdict(near, "points below dense")[2] == "**pass**, not resolved"
    assert "the interval includes +1.7" in verdict(near, "points below dense")[3]
    far = document([*run_lines("asp", shifted(ASP, -2.0)), *run_lines("admm", ADMM)])
    assert verdict(far, "points below dense")[2] == "**pass**"
    assert "the interval excludes +1.7" in verdict(far, "points below dense")[3]


def test_a_single_seed_is_no_verdict(document: Document) -> None:
    found = verdict(document([run_line("asp", test=10.0), run_line("admm", test=90.0)]), "points below dense")
    assert found[2] == "**not measured**"
    assert "one seed, no interval" in found[3]


@pytest.mark.parametrize("method", ["admm", "admm-paper"])
@pytest.mark.parametrize(("gain", "expected"), [(0.1, "**pass**"), (0.0, "**fail**"), (-0.1, "**fail**")])
def test_distillation(document: Document, method: str, gain: float, expected: str) -> None:
    text = document([*run_lines(method, ADMM), *run_lines(f"{method}+kd", shifted(ADMM, gain))])
    assert verdict(text, f"| 2:4 | {method}+kd above {method},")[2].startswith(expected)
    other = "admm" if method == "admm-paper" else "admm-paper"
    assert verdict(text, f"| 2:4 | {other}+kd above {other},")[2] == "**not measured**"
    assert verdict(text, f"| 2:8 | {method}+kd above {method},")[2] == "**not measured**"


def budget_lines(gap: float, seeds: Iterable[int] = (0, 1)) -> list[Line]:
    return [
        run_line(method, pattern="1:4", stage="budget", steps=steps, lr=lr, seed=seed, test=60.0 + seed + extra)
        for steps in (100, 400, 1600)
        for lr in (2e-5, 8e-5, 3e-4)
        for seed in seeds
        for method, extra in (("asp", 0.0), ("admm", gap + seed * 0.5 if (steps, lr) == (400, 8e-5) else 5.0))
    ]


@pytest.mark.parametrize(("gap", "expected"), [(0.1, "**pass**, not resolved"), (-0.5, "**fail**, not resolved")])
def test_budgets_are_judged_by_their_worst_cell(document: Document, gap: float, expected: str) -> None:
    found = verdict(document(budget_lines(gap)), "not behind asp at every length")
    assert (found[0], found[2]) == ("1:4", expected)
    assert found[3].startswith("least in 9: 400 steps at lr 8e-05, ")


def test_budgets_with_gaps_or_one_seed_are_not_measured(document: Document) -> None:
    for lines in (budget_lines(1.0, [0]), [line for line in budget_lines(1.0) if line["steps"] != 1600]):
        assert verdict(document(lines), "not behind asp at every length")[2] == "**not measured**"


def test_the_lead_is_shown_without_each_task(document: Document) -> None:
    tests = {"a": {"asp": 70.0, "admm": 76.0}, "b": {"asp": 60.0, "admm": 61.0}, "c": {"asp": 50.0, "admm": 50.0}}
    lines = [
        run_line(method, task=task, seed=seed, test=value + seed)
        for task, found in tests.items()
        for method, value in found.items()
        for seed in (0, 1)
    ]
    text = section(document(lines), "Overview")
    assert row(text, "`admm`", "a")[2].startswith("+0.50 ")
    assert row(text, "`admm`", "c")[2].startswith("+3.50 ")


@pytest.mark.parametrize(
    ("change", "target", "expected"),
    [
        ({"primal_residual": 0.0099}, "primal residual", "**pass**"),
        ({"primal_residual": 0.01}, "primal residual", "**fail**"),
        ({"primal_residual": None}, "primal residual", "**not measured**"),
        ({"projection_loss": 0.19}, "accuracy changed", "**pass**"),
        ({"projection_loss": -0.2}, "accuracy changed", "**fail**"),
        ({"projection_loss": 81.2 - 81.0}, "accuracy changed", "**fail**"),
        ({"projection_loss": None}, "accuracy changed", "**not measured**"),
    ],
)
def test_targets_at_the_projection(document: Document, change: Line, target: str, expected: str) -> None:
    text = document([run_line("asp", primal_residual=0.9), run_line(), run_line("admm+kd", **change)])
    lines = [line for line in section(text, "Targets").splitlines() if target in line]
    assert len(lines) == 2
    assert all(f"| {expected} |" in line for line in lines)


def test_the_projection_of_tuning_runs_is_judged_apart(document: Document) -> None:
    text = document([run_line(primal_residual=0.002), run_line(stage="tune", test=None, primal_residual=0.5, seed=3)])
    tested = verdict(text, "primal residual < 1 % in every default run of the stages final and budget")
    every = verdict(text, "primal residual < 1 % in every ADMM run of any stage")
    assert (tested[2], every[2]) == ("**pass**", "**fail**")
    assert tested[3] == "max 0.200 % in 1 run (admm, 2:4, a, seed 0, final); 0 at or over the limit"
    assert every[3] == "max 50.000 % in 2 runs (admm, 2:4, a, seed 3, tune); 1 at or over the limit"


def test_the_projection_of_the_papers_form_is_no_target(document: Document) -> None:
    text = document([run_line(primal_residual=0.002), run_line("admm-paper", primal_residual=0.5)])
    tested = verdict(text, "primal residual < 1 % in every default run of the stages final and budget")
    every = verdict(text, "primal residual < 1 % in every ADMM run of any stage")
    assert (tested[2], every[2]) == ("**pass**", "**fail**")


def test_range_at_the_projection(document: Document) -> None:
    residuals, losses = (0.001, 0.002, 0.009), (-0.1, 0.0, 0.3)
    lines = [
        run_line(seed=seed, primal_residual=residual, projection_loss=loss)
        for seed, (residual, loss) in enumerate(zip(residuals, losses, strict=True))
    ]
    cells = row(section(document(lines), "At the projection"), "2:4", "`admm`", "final")
    assert cells[3:] == ["3", "0.100", "0.200", "0.900", "-0.100", "0.000", "0.300"]


# Tuning, budgets, ablations


def test_tuning_marks_the_best_and_says_what_was_used(document: Document) -> None:
    grid = [(1e-5, 0.01, 70.0, 50.0), (1e-5, 0.1, 71.0, 60.0), (2e-5, 0.01, 72.0, 55.0)]
    lines = [
        run_line(task=task, stage="tune", test=None, lr=lr, steps=steps, setting={"rho": rho, "beta": 1}, dev=dev)
        for lr, rho, first, second in grid
        for task, steps, dev in (("a", 100, first), ("b", 200, second))
    ]
    final = [run_line(task=task, lr=2e-5, setting={"rho": 0.01, "beta": 1}) for task in "ab"]
    part = section(document([*lines, *final]), "Tuning, 2:4")
    # Steps differ between tasks only and beta nowhere: neither is part of the grid.
    assert row(part, "lr, rho") == ["lr, rho", "a", "b", "mean over tasks"]
    assert row(part, "lr 1e-05, rho 0.01")[1:] == ["70.00 (1)", "50.00 (1)", "60.00"]
    assert row(part, "lr 1e-05, rho 0.1")[1:] == ["71.00 (1)", "**60.00 (1)**", "**65.50**"]
    assert row(part, "lr 2e-05, rho 0.01")[1:] == ["**72.00 (1)**", "55.00 (1)", "63.50"]
    assert "on dev lr 1e-05, rho 0.1; final runs use lr 2e-05, rho 0.01 (every task)." in part


def test_tuning_of_dense_stands_apart_and_unused_grids_say_so(document: Document) -> None:
    part = section(document([run_line("dense", stage="tune", test=None)]), "Tuning, dense")
    assert "final runs use not measured" in part


def test_a_candidate_without_every_task_has_no_mean(document: Document) -> None:
    lines = [run_line(task=task, stage="tune", test=None, lr=1e-5, dev=50.0) for task in "ab"]
    lines.append(run_line(stage="tune", test=None, lr=2e-5, dev=99.0))
    part = section(document(lines), "Tuning, 2:4")
    assert row(part, "lr 2e-05")[1:] == ["**99.00 (1)**", "—", "—"]
    assert row(part, "lr 1e-05")[3] == "**50.00**"


def test_budgets_compare_at_the_same_steps_and_lr(document: Document) -> None:
    lines = [*run_lines("asp", ASP, stage="budget", steps=50), *run_lines("admm", ADMM, stage="budget", steps=50)]
    lines += run_lines("asp", ASP, stage="budget", steps=60)
    lines += run_lines("admm", shifted(ADMM, 9.0), stage="budget", steps=60, lr=1e-4)
    part = section(document([*lines, *run_lines("admm", shifted(ADMM, 9.0), steps=60)]), "Budgets, 2:4")
    assert row(part, "50", "5e-05", "all tasks")[3:] == [
        "71.00",
        "73.17",
        "+2.17 [+1.45, +2.88]; 3 seeds × 2 tasks, 6 pairs",
    ]
    assert row(part, "50", "5e-05", "a")[5] == "+2.33 [+0.90, +3.77]"
    assert row(part, "60", "5e-05", "a")[3:] == ["81.00 ± 1.00 (3)", "—", "—"]
    assert row(part, "60", "0.0001", "a")[3:] == ["—", "92.33 ± 1.53 (3)", "—"]


def ablation(variant: str, dev: float, seed: int = 0, **changes: Any) -> Line:
    setting = {"variant": variant, **changes.pop("setting", {})}
    return run_line(seed=seed, stage="ablation", test=None, dev=dev, setting=setting, **changes)


def test_ablations_compare_with_the_default_variant(document: Document) -> None:
    lines = [ablation("no dual", 60.0), ablation("no dual", 63.0, seed=1)]
    lines += [ablation("default", 61.0), ablation("default", 62.0, seed=1), run_line(dev=99.0)]
    part = section(document(lines), "Ablations, 2:4")
    assert row(part, "default")[1:] == ["61.50 ± 0.71 (2)", "—", "—"]
    # Differences -1 and +1: mean 0, standard error 1.
    assert row(part, "no dual")[1:] == [
        "61.50 ± 2.12 (2)",
        "+0.00 [-12.71, +12.71], not resolved",
        "2 seeds × 1 task, 2 pairs",
    ]


def test_ablations_compare_with_final_runs_of_the_same_budget(document: Document) -> None:
    lines = [
        ablation("no dual", 60.0),
        run_line(dev=61.0),
        run_line(dev=99.0, seed=1, steps=7),
        ablation("no dual", 60.0, seed=1),
    ]
    part = section(document(lines), "Ablations, 2:4")
    assert "the final runs of `admm`" in part
    assert row(part, "no dual")[2:] == ["-1.00 (one seed, no interval)", "1 seed × 1 task, 1 pair"]


def test_settings_of_one_variant_are_rows_of_their_own(document: Document) -> None:
    part = section(
        document([ablation("every", 60.0 + n, setting={"update_every": n, "rho": 0.1}) for n in (10, 1)]),
        "Ablations, 2:4",
    )
    assert row(part, "every, update_every 1")[1] == "61.00 (1)"
    assert row(part, "every, update_every 10")[1] == "70.00 (1)"


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"dev": None}, "dev=null must be a number from 0 to 100"),
        ({"dev": 101}, "dev=101 must be"),
        ({"dev": True}, "dev=true must be"),
        ({"test": float("nan")}, "test=NaN must be"),
        ({"test": None}, "test=null at stage 'final'"),
        ({"stage": "tune"}, "test=80.0 at stage 'tune'"),
        ({"stage": "ablation", "setting": {"variant": "x"}}, "test=80.0 at stage 'ablation'"),
        ({"stage": "ablation", "test": None}, 'its name in setting["variant"]'),
        ({"stage": "other"}, 'stage="other" must be one of tune, final, budget, ablation'),
        ({"pattern": None}, "the pattern is null for dense runs"),
        ({"method": "dense"}, "the pattern is null for dense runs"),
        ({"seed": 1.0}, "seed=1.0 must be an int"),
        ({"lr": "1e-5"}, 'lr="1e-5" must be a finite number'),
        ({"lr": float("inf")}, "lr=Infinity must be a finite number"),
        ({"primal_residual": -1}, "primal_residual=-1 must be"),
        ({"versions": {"torch": 2}}, "versions="),
        ({"setting": []}, "setting="),
        ({"task": ""}, 'task="" must be'),
        ({"task": "a\nb"}, "task="),
    ],
)
def test_a_wrong_line_is_named(document: Document, change: Line, message: str) -> None:
    with pytest.raises(records.InputError) as error:
        document([run_line("asp"), {**run_line(seed=1), **change}])
    assert str(error.value).startswith("runs.jsonl:2: ")
    assert message in str(error.value)


@pytest.mark.parametrize("key", list(run_line()))
def test_a_missing_key_is_named(document: Document, key: str) -> None:
    line = run_line()
    del line[key]
    with pytest.raises(records.InputError, match=f"^runs.jsonl:1: no key '{key}'"):
        document([line])


@pytest.mark.parametrize("text", ["{", "", "[1]", "null", '{"task": "a"} {}'])
def test_a_malformed_line_is_named(results: Path, text: str) -> None:
    (results / "x.jsonl").write_text(json.dumps(run_line()) + "\n" + text + "\n", encoding="utf-8")
    with pytest.raises(records.InputError, match=r"^x\.jsonl:2: (not JSON|must be a JSON object|no key)"):
        report.build(results, results / "out.md")


def test_the_same_run_twice_is_an_error_across_files(results: Path) -> None:
    dump(results / "x.jsonl", [run_line("asp"), run_line(setting={"a": 1, "b": 2})])
    dump(results / "y.jsonl", [run_line(setting={"b": 2, "a": 1}, dev=1.0)])
    with pytest.raises(records.InputError, match=r"^y\.jsonl:1: the same run as x\.jsonl:2$"):
        report.build(results, results / "out.md")


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"steps": 7}, {"setting": {"rho": 1}}])
def test_two_final_runs_that_compete_for_a_pair_are_an_error(document: Document, change: Line) -> None:
    with pytest.raises(
        records.InputError, match=r"^runs\.jsonl:2: final run of admm on a with seed 0 .* runs\.jsonl:1"
    ):
        document([run_line(), run_line(**change)])


def test_an_ablation_of_dense_is_an_error(document: Document) -> None:
    with pytest.raises(records.InputError, match=r"^runs\.jsonl:1: an ablation of dense"):
        document([run_line("dense", stage="ablation", test=None, setting={"variant": "x"})])


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "final"},
        {"trace": {"step": [1], "churn": [0.1]}},
        {"trace": {"step": [1, 2], "primal_residual": [0.1], "churn": [0.1, 0.1]}},
        {"trace": {"step": [2, 1], "primal_residual": [0.1, 0.1], "churn": [0.1, 0.1]}},
        {"trace": {"step": [1], "primal_residual": ["x"], "churn": [0.1]}},
        {"trace": {"step": [1], "primal_residual": [-0.1], "churn": [0.1]}},
        {"seed": 0},
    ],
)
def test_a_wrong_trace_is_named(results: Path, change: Line) -> None:
    dump(results / "traces-x.jsonl", [trace_line(), {**trace_line(seed=1), **change}])
    with pytest.raises(records.InputError, match=r"^traces-x\.jsonl:2: "):
        report.build(results, results / "out.md")


# Plots and the command


def test_plots_hold_the_runs_and_traces(results: Path) -> None:
    dump(results / "runs.jsonl", [*run_lines("asp", ASP), *run_lines("admm", ADMM), *run_lines("dense", ASP)])
    dump(results / "traces-x.jsonl", [trace_line()])
    text, files = report.build(results, results.parent / "results.md")
    found = {figure.name: figure for figure in files}
    assert list(found) == ["accuracy-2-4.svg", "residual-2-4.svg", "churn-2-4.svg"]
    panels = found["accuracy-2-4.svg"].panels
    assert [panel.title for panel in panels] == ["mean over 2 tasks", "a", "b"]
    assert [(line.method, line.y) for line in panels[0].lines][1:] == [
        ("asp", (70.0, 71.0, 72.0)),
        ("admm", (72.0, 73.5, 74.0)),
    ]
    assert found["churn-2-4.svg"].panels[0].lines == (figures.Line("admm", (10, 20, 30), (None, 0.2, 0.0)),)
    for name in found:
        assert f"](results/{name})" in text


def write_all(results: Path) -> None:
    dump(results / "runs.jsonl", [*run_lines("asp", ASP), *run_lines("admm+kd", ADMM), *run_lines("new", ADMM)])
    dump(results / "traces-x.jsonl", [trace_line(), trace_line(seed=1), trace_line(method="new", seed=2)])


def arguments(results: Path) -> list[str]:
    return ["--results", str(results), "--output", str(results.parent / "results.md")]


def test_two_runs_give_the_same_bytes(results: Path) -> None:
    pytest.importorskip("matplotlib")
    write_all(results)
    seen = []
    for _ in range(2):
        subprocess.run(
            [sys.executable, str(FOLDER / "report.py"), *arguments(results)], check=True, capture_output=True
        )
        seen.append({path.name: path.read_bytes() for path in [*results.glob("*.svg"), results.parent / "results.md"]})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4
    for name, data in seen[0].items():
        assert not re.search(rb"[ \t]$", data, flags=re.MULTILINE), name
        assert b"dc:date" not in data
        assert str(results).encode() not in data


def test_links_lead_to_the_plots(results: Path) -> None:
    pytest.importorskip("matplotlib")
    write_all(results)
    assert report.main(arguments(results)) == 0
    output = results.parent / "results.md"
    links = re.findall(r"\]\((.*?)\)", output.read_text(encoding="utf-8"))
    assert len(links) == 3
    assert all((output.parent / link).is_file() for link in links)


def test_check(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_all(results)
    output, command = results.parent / "results.md", [*arguments(results), "--check"]
    assert report.main(command) == 1
    assert not output.exists()
    assert not list(results.glob("*.svg"))
    assert report.main(arguments(results)) == 0
    assert report.main(command) == 0
    capsys.readouterr()

    output.write_text(output.read_text(encoding="utf-8").replace("71.00", "72.00"), encoding="utf-8")
    assert report.main(command) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^-.*72\.00", shown, flags=re.MULTILINE)
    assert re.search(r"^\+.*71\.00", shown, flags=re.MULTILINE)

    assert report.main(arguments(results)) == 0
    (results / "churn-2-4.svg").unlink()
    assert report.main(command) == 1
    assert "churn-2-4.svg: missing" in capsys.readouterr().out


def test_check_notices_a_plot_of_other_data(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_all(results)
    assert report.main(arguments(results)) == 0
    trace = {"step": [10, 20, 30], "primal_residual": [0.5, 0.05, 0.0], "churn": [None, 0.3, 0.0]}
    dump(results / "traces-x.jsonl", [trace_line(trace=trace), trace_line(seed=1), trace_line(method="new", seed=2)])
    assert report.main([*arguments(results), "--check"]) == 1
    shown = capsys.readouterr().out
    assert "churn-2-4.svg: not drawn from these data" in shown
    assert "residual-2-4.svg" not in shown


def test_bad_input_ends_with_one_line_and_status_2(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "x.jsonl").write_text("{\n", encoding="utf-8")
    assert report.main(arguments(results)) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: error: x.jsonl:1: not JSON")
    assert error.count("\n") == 1
    assert not (results.parent / "results.md").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(arguments(tmp_path / "nowhere")) == 2
    assert "no such folder of results" in capsys.readouterr().err


# The overview, here and in the README


def test_the_overview_has_each_pattern_beside_the_others(document: Document) -> None:
    lines = [
        run_line(method, pattern=pattern, task=task, seed=seed, test=70.0 + gain + seed + (3 if task == "b" else 0))
        for pattern, gain_of in (("2:4", {"asp": 0.0, "admm": 1.0}), ("1:4", {"asp": -4.0, "admm": -2.0}))
        for method, gain in gain_of.items()
        for task in ("a", "b")
        for seed in (0, 1)
    ]
    text = section(document(lines), "Overview")
    assert row(text, "`asp`") == ["`asp`", "72.00", "", "68.00", ""]
    assert row(text, "`admm`") == [
        "`admm`",
        "73.00",
        "+1.00 (2 equal seeds, no interval), not resolved",
        "70.00",
        "+2.00 (2 equal seeds, no interval), not resolved",
    ]
    assert "2 tasks (a, b), 2 seeds" in text


def test_the_readme_holds_the_overview_between_its_marks(tmp_path: Path) -> None:
    results, output, readme = tmp_path / "results", tmp_path / "results.md", tmp_path / "README.md"
    results.mkdir()
    lines = [run_line(method, seed=seed) for method in ("asp", "admm") for seed in (0, 1)]
    (results / "cpu-final.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--results", str(results), "--output", str(output), "--readme", str(readme)]
    readme.write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    assert report.main(command) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- study -->\n")
    assert text.endswith("<!-- /study -->\nafter\n")
    assert "old" not in text
    assert "| `admm` |" in text
    assert report.main([*command, "--check"]) == 0
    readme.write_text(text.replace("| `admm` |", "| `ours` |"))
    assert report.main([*command, "--check"]) == 1
    readme.write_text("no marks")
    assert report.main(command) == 2


def test_the_tuning_plot_has_the_best_setting_at_each_learning_rate() -> None:
    settings = {1e-4: [({"rho": 1.0}, 50.0), ({"rho": 2.0}, 60.0)], 1e-3: [({"rho": 1.0}, 55.0)]}
    lines = [
        run_line("admm-paper", stage="tune", test=None, seed=100, lr=lr, setting=setting, dev=dev)
        for lr, tried in settings.items()
        for setting, dev in tried
    ]
    lines.append(run_line("dense", pattern=None, stage="tune", test=None, seed=100, lr=1e-4, dev=70.0))
    runs = [records.Run(where="here", **line) for line in lines]
    (figure,) = figures.tuning_figures(runs)
    assert (figure.name, figure.kind, figure.pattern) == ("tuning-2-4.svg", "tuning", "2:4")
    (panel,) = figure.panels
    assert panel.lines == (
        figures.Line("dense", (1e-4,), (70.0,)),
        figures.Line("admm-paper", (1e-4, 1e-3), (60.0, 55.0)),
    )
    pytest.importorskip("matplotlib")
    assert b"admm-paper" in load("plots").draw(figure)
