"""Write docs/results.md, docs/results-log.md and their pictures from the raw files of the accuracy study.

    python examples/benchmarks/accuracy/report.py

Every figure comes from docs/results/*.jsonl. ``--check`` writes nothing and says whether the pages and the pictures are
what the raw files give. The exit status is 0, 1 if ``--check`` found a difference, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    from scipy import stats  # type: ignore[import-untyped]

    import plans
    import records
    import tables
    from layout import NOT_RUN, difference, number, plain, score, setting_text, signed, table, with_seeds
    from plans import PLANS, Line, Plan
    from plots import Bars, Cloud, Picture, Row, draw
    from tables import SIGNIFICANT, Table
    from targets import verdicts
except ImportError as error:
    print(f'report: error: cannot import {error.name}; run: pip install -e ".[study]"', file=sys.stderr)
    sys.exit(2)

DOCS = Path(__file__).resolve().parents[3] / "docs"
MARKS = ("<!-- study -->", "<!-- /study -->")
WRITTEN = (
    "<!-- Written by examples/benchmarks/accuracy/report.py from the raw files; changes by hand would be lost. -->"
)
PROTOCOL = "`examples/benchmarks/accuracy/README.md`"
CAPTION = (
    "Test accuracy ± standard deviation (seeds), mean over tasks; `admm` minus the method with its 95 % interval; its "
    "p-value, corrected by Holm for all methods of the study, whether they were run yet or not."
)
PATTERNS = ("2:4", "1:4")
METHODS = {
    "dense": "dense",
    "asp": "magnitude, before training (asp)",
    "asp-late": "magnitude, late (asp-late)",
    "sparsegpt-late": "SparseGPT, late (sparsegpt-late)",
    "admm": "admm: this package",
}
"""What a practitioner chooses between, on README and in the picture -> its words in the picture."""

UNLIKE = "†"
"""Stands behind a gain whose runs are not of one device and commit."""

TITLES = {"full": "The study", "cpu": "The quick study", "smoke": "A trial"}

_UNDER_WAY = "- **Accuracy:** the study is under way; no final figure is published yet ([results](docs/results.md))."
"""What the README says before the first final run."""

NO_RESULT = (
    "No final run was made yet, so this page has no result. Below stands what short runs of two seeds on the dev parts "
    "gave: they serve to choose defaults, and say nothing about how the method compares with others."
)


def model(plan: Plan) -> str:
    """Say what a study trains."""
    return f"MiniLM-L6, {'all six layers' if plan.layers == 6 else f'the first {plan.layers} of six layers'}"


def subject(plan: Plan) -> str:
    """Say what a study trains, and on what."""
    return f"{model(plan)}; {len(plan.tasks)} tasks ({', '.join(plan.tasks)}); {plan.steps} steps of 16"


# The first lines -----------------------------------------------------------------------------------------------------


def lead(plan: Plan, usual: Table, tuned: Table) -> str:
    """Say in some ten lines what a practitioner wants to know.

    Args:
        plan: the study.
        usual: the table in which nothing is tuned.
        tuned: the tuned table.

    Returns:
        Lists and a table in Markdown.
    """
    trained = f"All methods train the same model on the same texts: {subject(plan)}. No other model was tried."
    methods = (
        "`dense` prunes nothing. `asp` keeps the largest weights of each group, once, before training. "
        "`asp-late` does the same near the end of training, where `admm` prunes, and `sparsegpt-late` does "
        f"SparseGPT's update there. `admm` is the default of this package. {PROTOCOL} explains the other methods."
    )
    units = (
        "Figures are percent of test texts answered right, ± the standard deviation over the seeds of training, in "
        "brackets how many seeds. Differences are in points, with their 95 % intervals; the test texts are the same "
        f"for every seed. Better: the p-value is below {SIGNIFICANT:g} after Holm's correction for all "
        f"{len(plan.methods) - 1} differences of `admm`, those not measured yet among them. With few seeds it can be "
        "larger though the interval is above 0."
    )
    measured = [(which, p) for which in (usual, tuned) for p in plan.patterns if which.mean("admm", p) is not None]
    first = [*_answer(measured), f"{trained} {tuned_or_not(plan)}", methods, units, *_how_far(usual, tuned)]
    then = [said for which in (usual, tuned) if (said := _compared(which))]
    then += _without_one_task(measured)
    kd = [(p, d) for p in plan.patterns if (d := tuned.difference("admm+kd", "admm", p)) is not None]
    if kd:
        gains = "; ".join(f"{p} {with_seeds(d)}" for p, d in kd)
        then.append(f"With distillation, tuned, `admm+kd` minus `admm`: {gains}.")
    lists = ["\n".join(f"- {line}" for line in lines) for lines in (first, then)]
    return "\n\n".join(part for part in (lists[0], _costs(measured), lists[1]) if part)


def tuned_or_not(plan: Plan) -> str:
    """Say which learning rates each of the two tables has."""
    rates = " and ".join(map(number, plan.usual_lrs))
    return (
        f"Nothing tuned: the mean over the learning rates {rates}. Tuned: for each method and pattern the rate, and "
        "the method's own setting if it has one, that was best on dev texts. If the rate is one of these two, its runs "
        "are in both tables."
    )


def _answer(measured: Sequence[tuple[Table, str]]) -> list[str]:
    """Say what the patterns cost with ``admm`` and with what most people use, where both were run in both tables."""
    costs: dict[str, dict[str, list[float]]] = {"admm": defaultdict(list), "asp": defaultdict(list)}
    for (which, pattern), (method, found) in itertools.product(measured, costs.items()):
        if (cost := which.difference("dense", method, pattern)) is not None:
            found[pattern].append(cost.mean)
    patterns = [p for p, each in costs["admm"].items() if len(each) == len(costs["asp"][p]) == 2]

    def span(values: Iterable[float]) -> str:
        return " to ".join(dict.fromkeys(plain(value) for value in sorted(values)))

    said = [" and ".join(f"{span(found[p])} points at {p}" for p in patterns) for found in costs.values()]
    return [f"**Against `dense`, `admm` costs {said[0]}; `asp`, the usual way, costs {said[1]}.**"] if patterns else []


def _costs(measured: Sequence[tuple[Table, str]]) -> str:
    """Write what each method of METHODS loses against ``dense``."""
    found = {m: [which.difference(m, "dense", pattern) for which, pattern in measured] for m in METHODS if m != "dense"}
    rows = [
        [words, *("" if d is None else difference(d) for d in found[method])]
        for method, words in METHODS.items()
        if any(found.get(method, ()))
    ]
    names = [f"{which.name}, {pattern}" for which, pattern in measured]
    accuracies = [score(which.mean("dense", pattern)) for which, pattern in measured]
    return table(["points minus `dense`", *names], [["`dense`: accuracy", *accuracies], *rows]) if rows else ""


def _compared(which: Table) -> str:
    """Say which methods ``admm`` is better than at each pattern, without those of another loss."""
    parts: list[str] = []
    for pattern in which.plan.patterns:
        by_word: dict[str, list[str]] = defaultdict(list)
        for method, found in which.family(pattern).items():
            if method == "dense" or method.endswith(plans.DISTILLED) or found.word == "not measured":
                continue
            few = f", {found.estimate.n} seeds" if found.estimate.n < len(which.plan.seeds) else ""
            if found.word == "not resolved":
                word = f"{'ahead of' if found.estimate.mean > 0 else 'not ahead of'} these, but not resolved:"
                by_word[word].append(f"`{method}` ({difference(found.estimate)}{few})")
            else:
                by_word[f"{found.word} than"].append(f"`{method}` ({signed(found.estimate.mean)}{few})")
        if by_word:
            said = "; ".join(f"{word} {', '.join(methods)}" for word, methods in by_word.items())
            parts.append(f"{'At' if parts else 'at'} {pattern} `admm` is {said}.")
    return f"{which.name.capitalize()}, {' '.join(parts)}" if parts else ""


def _without_one_task(measured: Sequence[tuple[Table, str]]) -> list[str]:
    """Say what is left of the gain over ``asp`` without the task that gains most."""
    said: dict[str, list[str]] = defaultdict(list)
    for which, pattern in measured:
        if (most := _gains_most(which, pattern)) is not None:
            left = difference(_without(which, most).difference("admm", "asp", pattern))
            said[most].append(f"{which.name}, {pattern} {left}")
    each = [
        f"Without {task}, the task that gains most, `admm` minus `asp`: {'; '.join(parts)}."
        for task, parts in said.items()
    ]
    rest = "Tuned rates are those chosen with all tasks. The log has the other methods."
    return [" ".join([*each, rest])] if each else []


def _gains_most(which: Table, pattern: str) -> str | None:
    """Return the task in which ``admm`` gains most over ``asp``; None unless each of several tasks was run."""
    tasks = which.plan.tasks
    gains = {task: d.mean for task in tasks if (d := which.difference("admm", "asp", pattern, task)) is not None}
    return max(gains, key=gains.__getitem__) if len(gains) == len(tasks) > 1 else None


def _without(which: Table, task: str) -> Table:
    return replace(which, plan=replace(which.plan, tasks=tuple(other for other in which.plan.tasks if other != task)))


def _how_far(usual: Table, tuned: Table) -> list[str]:
    """Say how much of the study there is, as long as it is not the whole."""
    plan = usual.plan

    def whole(method: str, over: Iterable[str], *tables: Table) -> bool:
        """Say whether each of the tables has every seed of the method at each of these patterns."""
        means = [(which.mean(method, pattern), plan.patterns[pattern][0]) for which in tables for pattern in over]
        return all(found is not None and found.n >= len(seeds) for found, seeds in means)

    def named(methods: list[str]) -> str:
        return ", ".join(f"`{method}`" for method in methods) or "no methods"

    own, others = plans.by_choice(plan)
    done = [method for method in plan.methods if whole(method, own, usual, tuned)]
    half = [method for method in plan.methods if method not in done and whole(method, own, tuned)]
    missing = [p for p in others if not all(whole(method, (p,), usual, tuned) for method in plan.methods)]
    if len(done) == len(plan.methods) and not missing:
        return []
    known = f"{named(done)} have all runs at {' and '.join(own)}"
    known += f"; {named(half)} have all tuned runs there" if half else ""
    for pattern in missing:
        there = [method for method in plan.methods if method != "dense" and whole(method, (pattern,), tuned)]
        known += f"; at {pattern} {named(there)} have all tuned runs, and nothing else is complete"
    # No target needs more: those of the table with nothing tuned compare methods of the first round.
    judged = set(plan.rounds[0]) <= set(done) and len(done) + len(half) == len(plan.methods)
    rest = "No verdict waits for a run" if judged else "Figures and verdicts may change"
    return [f"**Not every declared run was made: {known}. {rest}.**"]


# Tables --------------------------------------------------------------------------------------------------------------


def _mean(which: Table, method: str, pattern: str) -> str:
    """Write the mean over tasks; a method whose runs have begun is not one that was not run."""
    mean = which.mean(method, pattern)
    return "not all tasks yet" if mean is None and which.of(method, pattern) else score(mean)


def _choice(which: Table, method: str, pattern: str) -> str:
    """Write the learning rate and the setting of a method that dev chose."""
    found = which.choices.get(tables.cell_of(method, pattern), ())
    return "; ".join(setting_text({"lr": lr, **{k: v for k, v in s.items() if k != "teacher_lr"}}) for lr, s in found)


def means(which: Table) -> str:
    """Write the means over tasks and the differences of ``admm`` to each method, as far as anything was run."""
    plan = which.plan
    patterns = [p for p in plan.patterns if any(which.of(m, p) for m in plan.methods if m != "dense")]
    chosen = ("chosen",) if which.name == "tuned" else ()
    header = ["method", *(cell for pattern in patterns for cell in (pattern, *chosen, "`admm` minus it", "Holm"))]
    rows = []
    for method in plan.methods:
        if not any(which.of(method, pattern) for pattern in patterns):
            continue
        row = [f"`{method}`"]
        for pattern in patterns:
            found = which.family(pattern).get(method)
            row += [
                _mean(which, method, pattern),
                *(_choice(which, method, pattern) for _ in chosen),
                "" if found is None else difference(found.estimate),
                "" if found is None or found.p is None else "<0.001" if found.p < 0.001 else f"{found.p:.3f}",
            ]
        rows.append(row)
    return table(header, rows)


def by_task(which: Table) -> str:
    """Write the means of each task, and how far ``admm`` is ahead of ``asp`` there."""
    parts = []
    for pattern in which.plan.patterns:
        rows = [
            [f"`{method}`", *(score(which.mean(method, pattern, task)) for task in which.plan.tasks)]
            for method in which.plan.methods
            if which.of(method, pattern)
        ]
        if len(rows) < 2:  # dense alone
            continue
        ahead = [difference(which.difference("admm", "asp", pattern, task)) for task in which.plan.tasks]
        rows.append(["`admm` minus `asp`", *ahead])
        parts.append(f"{pattern}:\n\n{table(['method', *which.plan.tasks], rows)}")
    return "\n\n".join(parts) or f"{NOT_RUN}."


def each_task(which: Table) -> str:
    """Write how far ``admm`` is ahead of each method in each task, and how many pairs had different devices."""
    parts = []
    for pattern in which.plan.patterns:
        columns: list[tuple[str, Table, str | None]] = [(task, which, task) for task in which.plan.tasks]
        if (most := _gains_most(which, pattern)) is not None:
            columns.append((f"all but {most}", _without(which, most), None))
        rows = []
        for method in which.family(pattern):
            found = [over.difference("admm", method, pattern, task) for _, over, task in columns]
            unlike, pairs = which.unlike("admm", method, pattern)
            rows.append([f"`{method}`", *map(difference, found), f"{unlike} of {pairs}"])
        header = [f"{which.name}, {pattern}: `admm` minus", *(words for words, _, _ in columns), "different devices"]
        parts += [table(header, rows)] if rows else []
    return "\n\n".join(parts)


def targets_table(usual: Table, tuned: Table) -> str:
    """Write the verdicts as a table."""
    rows = [[verdict.target, f"**{verdict.status}**", verdict.detail] for verdict in verdicts(usual, tuned)]
    return table(["target", "verdict", "figures"], rows)


def overview(usual: Table, tuned: Table) -> str:
    """Write what the repository's README shows: one small table and a sentence for each target."""
    plan = usual.plan
    patterns = [pattern for pattern in plan.patterns if pattern in PATTERNS]
    columns = [(which, p) for which in (usual, tuned) if any(which.scores.values()) for p in patterns]
    header = ["method", *(f"{which.name}, {pattern}" for which, pattern in columns)]
    rows = [
        [words, *(_mean(which, method, pattern) for which, pattern in columns)]
        for method, words in METHODS.items()
        if method in plan.methods
    ]
    sentences = [f"- {v.target}: **{v.status}** ({v.detail})." for v in verdicts(usual, tuned)]
    sentences += [f"- {line}" for line in _how_far(usual, tuned)]
    what = f"{subject(plan)}. Test accuracy in percent ± standard deviation (seeds), mean over tasks."
    pages = "[Results](docs/results.md) has every method, task and pattern."
    intro = (
        "Targets, declared before the first run. Passed: the whole 95 % interval meets the limit. Failed: no part of "
        "it does. Not resolved: the seeds are too few, or differ too much, to say. "
        "[What each method does](examples/benchmarks/accuracy/README.md#protocol)."
    )
    return "\n\n".join((f"{what} {tuned_or_not(plan)} {pages}", table(header, rows), intro, "\n".join(sentences)))


# Exploring -----------------------------------------------------------------------------------------------------------


def explored(plan: Plan, lines: Sequence[Line]) -> str:
    """Write what the runs that explore gave, against ``prune_at`` at its usual place."""
    cells: dict[Any, dict[tuple[str, int], Line]] = defaultdict(dict)
    rows_of: dict[int, dict[str, None]] = defaultdict(dict)
    for spec in itertools.chain.from_iterable(plans.explore(plan, lines)):
        rows_of[spec.steps][json.dumps(spec.options, sort_keys=True)] = None
    for line in lines:
        if line["stage"] == "explore" and line["model"] == plan.model:
            setting = json.dumps(line["setting"], sort_keys=True)
            rows_of[line["steps"]][setting] = None
            cells[line["steps"], setting, line["pattern"], line["lr"]][line["task"], line["seed"]] = line
    columns = [(pattern, lr) for pattern in ("1:4", "2:4") for lr in plan.explore_lrs]
    header = ["setting", *(f"{pattern}, lr {number(lr)}" for pattern, lr in columns)]
    wanted = len(plan.explore_tasks) * len(plan.tuning_seeds)
    parts = []
    base = json.dumps(plans.BASE, sort_keys=True)
    for steps in sorted(rows_of if cells else (), key=lambda steps: (steps != plan.steps, steps)):
        rows = []
        for setting in rows_of[steps]:
            options = json.loads(setting)
            compared = [
                "does not apply"
                if options.get("by_way_of") == p
                else _explored_cell(
                    cells[steps, setting, p, lr], None if setting == base else cells[steps, base, p, lr], wanted
                )
                for p, lr in columns
            ]
            rows.append([setting_text(options), *compared])
        parts.append(f"{steps} steps:\n\n{table(header, rows)}")
    if any(UNLIKE in part for part in parts):
        parts.append(f"{UNLIKE} Some of these runs and those they are compared with differ in device or commit.")
    return "\n\n".join(parts)


def _explored_cell(
    scores: Mapping[tuple[str, int], Line], base: Mapping[tuple[str, int], Line] | None, wanted: int
) -> str:
    """Write a mean, or the mean of the gains over a base; nothing but a count while runs of either are missing."""
    if not scores:
        return NOT_RUN
    for name, runs in (("", scores), ("base: ", scores if base is None else base)):
        if len(runs) < wanted:
            return f"{name}{len(runs)} of {wanted} runs"
    if base is None:
        return plain(statistics.fmean(line["dev"] for line in scores.values()))
    gains: dict[int, list[float]] = defaultdict(list)
    for (task, seed), line in scores.items():
        gains[seed].append(line["dev"] - base[task, seed]["dev"])
    each = [signed(statistics.fmean(values)) for _, values in sorted(gains.items())]
    total = [value for values in gains.values() for value in values]
    mark = (
        UNLIKE if any(line[k] != base[pair][k] for pair, line in scores.items() for k in ("device", "commit")) else ""
    )
    return f"{signed(statistics.fmean(total))} ({', '.join(each)}){mark}"


def layer_pictures(plan: Plan, lines: Sequence[Line], name: str) -> tuple[str, list[Picture]]:
    """Say and draw whether the model error of a layer predicts what pruning it alone costs."""
    clouds, rows = [], []
    ranks: dict[tuple[str, str], list[float]] = defaultdict(list)
    groups: dict[tuple[str, str], dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["stage"] == "layers" and plan.mine(line):
            groups[line["pattern"], line["task"]][line["seed"]].append(line)
    for (pattern, task), seeds in sorted(groups.items()):
        for x, words in (("model_error", "model error"), ("predicted", "cost by the quadratic model")):
            for y, cost in (("loss", "rise of dev loss"), ("dev", "loss of dev accuracy")):
                rank = [
                    float(stats.spearmanr([e[x] for e in each], [e[y] * (1 if y == "loss" else -1) for e in each])[0])
                    for each in seeds.values()
                ]
                rows.append([f"{task}, {pattern}", words, cost, ", ".join(plain(r, 2) for r in rank)])
                ranks[words, cost] += rank
        for x, words, y, cost, sign in (
            ("model_error", "model error", "dev", "loss of dev accuracy (points)", -1),
            ("predicted", "cost by the quadratic model", "loss", "rise of dev loss", 1),
        ):
            series = tuple(
                (f"seed {seed}", tuple((e[x], sign * e[y]) for e in each)) for seed, each in sorted(seeds.items())
            )
            clouds.append(Cloud(f"{task}, {pattern}", words, cost, series))
    if not clouds:
        return "", []
    header = ["runs", "predictor", "cost of pruning one weight", "Spearman's rank correlation, each seed"]
    picture = Picture(f"layers-{name}.svg", "Each weight pruned alone", tuple(clouds))
    answer = [
        "Rank correlation in the groups of runs below; 1 is the same order of the weights, 0 no relation:\n",
        *(f"- {x} and {y}: {plain(min(r), 2)} to {plain(max(r), 2)}" for (x, y), r in ranks.items()),
    ]
    return "\n".join([*answer, "", table(header, rows)]), [picture]


# The pages -----------------------------------------------------------------------------------------------------------


def accuracy_picture(usual: Table, tuned: Table, name: str) -> list[Picture]:
    """Draw the means over tasks of the methods that a practitioner chooses between, for both tables."""
    panels = []
    for pattern in PATTERNS:
        for which in (usual, tuned):
            rows = []
            for method, words_of_it in METHODS.items():
                found = which.mean(method, pattern)
                if found is not None:
                    low, high = found.interval or (found.mean, found.mean)
                    rows.append(Row(words_of_it, round(found.mean, 6), round(low, 6), round(high, 6)))
            if len(rows) > 1:  # not dense alone
                panels.append(Bars(f"{pattern}, {which.name}", tuple(rows)))
    title = f"What a pattern costs: test accuracy, mean over {len(usual.plan.tasks)} tasks"
    return [Picture(f"accuracy-{name}.svg", title, tuple(panels))] if panels else []


def missing(plan: Plan, lines: Sequence[Line]) -> str:
    """Say which of the final runs that the protocol declares the raw files lack: how many where a method was begun."""
    done, tuning, rows = {records.key_of(line) for line in lines}, plans.Tuning(plan, lines), []
    sentences = []
    for which in ("nothing tuned", "tuned"):
        untouched = []
        for method in plan.methods:
            cells, wanted_of_all, left_of_all = dict.fromkeys(("dense", *plan.patterns), ""), 0, 0
            for pattern in (None,) if method == "dense" else tuple(plan.patterns):
                seeds = plan.seeds if pattern is None else plan.patterns[pattern][0]
                tuned = tuning.choose(method, pattern)
                chosen = plans.usual(plan, method) if which == "nothing tuned" else [tuned] if tuned else []
                wanted = [
                    (lr, json.dumps(s, sort_keys=True), t, n) for lr, s in chosen for t in plan.tasks for n in seeds
                ]
                left = sum(
                    (task, plan.model, pattern, method, seed, lr, plan.steps, "final", setting) not in done
                    for lr, setting, task, seed in wanted
                )
                wanted_of_all, left_of_all = wanted_of_all + len(wanted), left_of_all + left
                share = f"{left} of {len(wanted)} runs" if left else ""
                cells[pattern or "dense"] = share if chosen else "not tuned"
            if left_of_all == wanted_of_all:
                untouched.append(f"`{method}`")
            elif any(cells.values()):
                rows.append([f"`{method}`, {which}", *cells.values()])
        sentences += [f"No final run, {which}: {', '.join(untouched)}."] if untouched else []
    if tuning.gaps:
        added = " and ".join(number(lr) for lr in tuning.lrs if lr not in plan.lrs)
        untried = ", ".join(f"`{method}`" for method in tuning.gaps)
        sentences.append(
            f"A choice lay on an edge, so {added} joins the learning rates. Not tried there yet: {untried}."
        )
    parts = [table(["missing", "dense", *plan.patterns], rows)] if rows else []
    return "\n\n".join([*parts, *sentences]) or "Every final run that was declared was made."


def section(
    name: str, usual: Table, tuned: Table, lines: Sequence[Line], links: Mapping[str, str]
) -> tuple[list[str], list[Picture]]:
    """Write the part of docs/results.md that belongs to a plan, and lay out its pictures."""
    plan = usual.plan
    pictures = accuracy_picture(usual, tuned, name)
    begun = any(usual.scores.values()) or any(tuned.scores.values())
    parts = [f"## {TITLES[name]}: {subject(plan) if begun else model(plan)}"]
    if begun:
        parts += ["### Targets", f"Declared before the first run in {PROTOCOL}.", targets_table(usual, tuned)]
        for title, which in (("Nothing tuned", usual), ("Tuned", tuned)):
            found_any = any(which.scores.values())
            shown = [CAPTION, means(which), "Each task:", by_task(which)] if found_any else [f"{NOT_RUN.capitalize()}."]
            parts += [f"### {title}", *shown]
    if found := explored(plan, lines):
        what = f"`admm`, mean over {' and '.join(plan.explore_tasks)} and over seeds {_seeds(plan)}"
        words = "points gained over that row, in brackets each seed"
        caption = f"Accuracy on dev of {what}. In the rows other than `{setting_text(plans.BASE)}`: {words}."
        parts += ["### What was explored on dev", caption, found]
    text, clouds = layer_pictures(plan, lines, name)
    if clouds:
        when = "at the step of the solve, and not trained after"
        caption = (
            f"Each weight was pruned alone, {when}; learning rate {number(plan.explore_lrs[0])}, seeds {_seeds(plan)}."
        )
        parts += ["### Does the model error predict the loss?", caption, text]
        parts += [f"![{picture.title}]({links[picture.name]})" for picture in clouds]
    if begun:
        parts += ["### What was not run", missing(plan, lines)]
    return parts, [*pictures, *clouds]


def _seeds(plan: Plan) -> str:
    return ", ".join(map(str, plan.tuning_seeds))


def log(lines: Sequence[Line], both: Mapping[str, tuple[Table, Table]]) -> str:
    """Write docs/results-log.md: provenance, differences in each task, grids and choices.

    Args:
        lines: the raw lines.
        both: the two tables of each plan that has lines.

    Returns:
        The page.
    """
    parts = [
        "# Accuracy study: log",
        WRITTEN,
        "Provenance, differences in each task, tuning grids and choices of the [results](results.md).",
    ]
    for name, of_plan in both.items():
        plan = PLANS[name]
        mine = [line for line in lines if line["model"] == plan.model]
        counts = Counter(line["stage"] for line in mine)
        rows = [
            ["runs", ", ".join(f"{count} {stage}" for stage, count in sorted(counts.items()))],
            [
                "hours, without the first parts that runs share",
                plain(sum(line["seconds"] for line in mine if line["stage"] != "layers") / 3600),
            ],
            *([key, _counted(line[key] for line in mine)] for key in ("device", "commit")),
            ["versions", _counted(setting_text(line["versions"]) for line in mine)],
            ["learning rates", ", ".join(map(number, plans.Tuning(plan, lines).lrs))],
        ]
        parts += [f"## {TITLES[name]}: {subject(plan)}", table(["what", "value"], rows), _each_rate(plan, lines)]
        parts += [each_task(which) for which in of_plan]
        parts += [_tuning(plan, lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _counted(values: Iterable[str]) -> str:
    return "; ".join(f"{value} ({count})" for value, count in sorted(Counter(values).items()))


def _each_rate(plan: Plan, lines: Sequence[Line]) -> str:
    """Write test accuracies with nothing tuned, one usual learning rate at a time."""
    rates = [tables.usual(replace(plan, usual_lrs=(lr,)), lines) for lr in plan.usual_lrs]
    pruning = [method for method in plan.methods if method != "dense"]
    patterns = [p for p in plan.patterns if any(which.of(m, p) for which in rates for m in pruning)]
    columns = [(lr, which, p) for p in patterns for lr, which in zip(plan.usual_lrs, rates, strict=True)]
    rows = [
        [f"`{method}`", *(score(which.mean(method, pattern)) for _, which, pattern in columns)]
        for method in plan.methods
        if any(which.of(method, pattern) for _, which, pattern in columns)
    ]
    header = ["test, nothing tuned", *(f"{pattern}, lr {number(lr)}" for lr, _, pattern in columns)]
    return table(header, rows) if rows else "No method that prunes was run at a usual learning rate."


def _tuning(plan: Plan, lines: Sequence[Line]) -> str:
    grids: dict[tuple[str, str | None], dict[tuple[float, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["stage"] == "tune" and plan.mine(line):
            setting = json.dumps(line["setting"])
            grids[line["method"], line["pattern"]][line["lr"], setting].append(line["dev"])
    rows, tuning = [], plans.Tuning(plan, lines)
    wanted = len(plan.tasks) * len(plan.tuning_seeds)
    for (method, pattern), grid in sorted(grids.items(), key=str):
        choice = tuning.choose(method, pattern)
        for (lr, setting), devs in sorted(grid.items()):
            chosen = choice is not None and choice == (lr, json.loads(setting))
            text = setting_text({"lr": lr, **json.loads(setting)})
            # Means over different tasks cannot be compared, so there is none before all are there.
            mean = tuning.mean_of(method, pattern, lr, setting)
            told = f"{len(devs)} of {wanted} runs" if mean is None else plain(mean)
            rows.append([f"`{method}`, {pattern or 'dense'}", text, told, "chosen" if chosen else ""])
    header = ["method", "setting", "dev, mean over tasks and seeds", ""]
    return table(header, rows) if rows else "Nothing was tuned."


def build(results: Path, output: Path) -> tuple[dict[Path, str], dict[Picture, Path], str]:
    """Compute both pages.

    Args:
        results: the folder of raw files.
        output: where docs/results.md will lie; the log lies beside it.

    Returns:
        Each page's text, each picture's file, and what README shows.

    Raises:
        InputError: a raw file is malformed.
    """
    lines = records.read(results)
    start = output.resolve().parent

    def link(name: str) -> str:
        return Path(os.path.relpath((results / name).resolve(), start)).as_posix()

    links = {name: link(name) for plan in PLANS for name in (f"layers-{plan}.svg", f"accuracy-{plan}.svg")}
    body: list[str] = []
    pictures: list[Picture] = []
    first, shown = NO_RESULT, ""
    models = {line["model"] for line in lines}
    both = {
        name: (tables.usual(plan, lines), tables.tuned(plan, lines))
        for name, plan in PLANS.items()
        if plan.model in models
    }
    for name, (usual, tuned) in both.items():
        parts, drawn = section(name, usual, tuned, lines, links)
        body += parts
        pictures += drawn
        if not shown and any(usual.scores.values()):
            shown = overview(usual, tuned)
            images = [f"![{picture.title}]({links[picture.name]})" for picture in accuracy_picture(usual, tuned, name)]
            first = "\n\n".join((lead(usual.plan, usual, tuned), *images))
    where = (
        f"How the runs were made is in {PROTOCOL}; differences in each task, tuning grids, choices and provenance are "
        f"in the [log]({output.stem}-log.md); everything is computed from the raw files by "
        "`python examples/benchmarks/accuracy/report.py`."
    )
    opening = ["# Accuracy study: results", WRITTEN, first, where]
    pages = {output: "\n\n".join([*opening, *body]) + "\n", output.with_name(f"{output.stem}-log.md"): log(lines, both)}
    return pages, {picture: results / picture.name for picture in pictures}, shown or _UNDER_WAY


def with_overview(readme: Path, shown: str) -> str | None:
    """Put the overview between the marks of a page; None if the page has no marks.

    Args:
        readme: the page.
        shown: the overview.

    Returns:
        Its new text.
    """
    before, opening, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    return f"{before}{opening}\n\n{shown}\n\n{closing}{after}" if opening and closing else None


def differences(pages: Mapping[Path, str], pictures: Mapping[Picture, Path]) -> list[str]:
    """Compare what lies there with what the raw files give.

    Args:
        pages: each page and what it must say.
        pictures: each picture and its file, compared by the digest of its data, not by its drawing.

    Returns:
        The lines of unified diffs, and one for each picture that is missing or of other data; none if all is well.
    """
    found: list[str] = []
    for path, text in pages.items():
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        diff = difflib.unified_diff(old.splitlines(), text.splitlines(), path.name, "from the raw files", lineterm="")
        found += diff
    for picture, path in pictures.items():
        if not path.is_file():
            found.append(f"{path.name}: missing")
        elif picture.digest not in path.read_text(encoding="utf-8"):
            found.append(f"{path.name}: not drawn from these data")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line, by default that of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=DOCS / "results", help="folder of the raw files and pictures")
    parser.add_argument("--output", type=Path, default=DOCS / "results.md", help="the page; its log lies beside it")
    parser.add_argument("--readme", type=Path, help="page that repeats the overview (by default the repository's own)")
    parser.add_argument("--check", action="store_true", help="write nothing; show what would change")
    options = parser.parse_args(arguments)
    own = options.output.resolve() == (DOCS / "results.md").resolve()
    readme = options.readme or (DOCS.parent / "README.md" if own else None)
    try:
        pages, pictures, shown = build(options.results, options.output)
        if readme is not None and (page := with_overview(readme, shown)) is not None:
            pages[readme] = page
        if options.check:
            found = differences(pages, pictures)
            print("\n".join(found) or f"{options.output.name} is what the raw files give")
            return 1 if found else 0
        drawn = {path: draw(picture) for picture, path in pictures.items()}
        for path, data in drawn.items():
            path.write_bytes(data)
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8", newline="\n")
    except ImportError as error:
        print(f'report: error: cannot import {error.name}; run: pip install -e ".[study]"', file=sys.stderr)
        return 2
    except (records.InputError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(path.name for path in pages)} and {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
