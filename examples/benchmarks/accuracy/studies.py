"""The parts of the document around the final runs: tuning grids, other budgets, ablations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from figures import Figure, groups
from layout import NOT_MEASURED, basis, difference, plain, score, setting_text, table
from records import METHODS, PATTERNS, InputError, Pairs, Run, by_known, scores, scores_by_method
from sections import heading, select
from summary import ROUNDING, Comparison, compare, estimate, mean_over_tasks, of_task, tasks_of
from targets import SUBJECT

DEFAULTS = "default"
ALL_TASKS = "all tasks"
BUDGET_TEXT = """\
Test accuracy, mean ± standard deviation (n seeds), and the paired difference at the same steps and lr with its 95 %
interval. Only the runs made for this table are in it; a dash stands where there are none."""


def hyperparameters(run: Run) -> dict[str, Any]:
    """List the hyperparameters of a run.

    Args:
        run: the run.

    Returns:
        lr, steps and the setting.
    """
    return {"lr": run.lr, "steps": run.steps, **run.setting}


def varied(runs: Sequence[Run]) -> list[str]:
    """Find what a grid varies.

    Args:
        runs: the runs of the grid.

    Returns:
        The hyperparameters that take two values within a task. What differs only between tasks, such as the steps of
        an epoch, is no part of the grid.
    """
    values: dict[tuple[str, str], set[str]] = {}
    names = list(dict.fromkeys(name for run in runs for name in hyperparameters(run)))
    for run in runs:
        own = hyperparameters(run)
        for name in names:
            # A missing name is a value of its own.
            values.setdefault((run.task, name), set()).add(json.dumps(own[name], sort_keys=True) if name in own else "")
    return [name for name in names if any(len(values[run.task, name]) > 1 for run in runs)]


def _label(run: Run, names: Iterable[str]) -> str:
    own = hyperparameters(run)
    return setting_text({name: own[name] for name in names if name in own})


def _order(run: Run, names: Sequence[str]) -> tuple[tuple[bool, float, str], ...]:
    own = hyperparameters(run)
    values = [own.get(name) for name in names]
    return tuple(
        (False, float(value), "") if isinstance(value, (int, float)) else (True, 0.0, json.dumps(value))
        for value in values
    )


def _candidates(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Pairs]:
    ordered = sorted(runs, key=lambda run: _order(run, names))
    labels = list(dict.fromkeys(_label(run, names) for run in ordered))
    return {
        label: scores([run for run in ordered if _label(run, names) == label], lambda run: run.dev) for label in labels
    }


def _best(values: Mapping[str, float | None]) -> list[str]:
    top = max((value for value in values.values() if value is not None), default=None)
    return [name for name, value in values.items() if value is not None and top is not None and value >= top - ROUNDING]


def _used(final: Sequence[Run], names: Sequence[str], tasks: Sequence[str]) -> str:
    used = {
        task: " and ".join(dict.fromkeys(_label(run, names) for run in final if run.task == task)) or NOT_MEASURED
        for task in by_known([*tasks, *(run.task for run in final)], ())
    }
    if len(set(used.values())) == 1:
        return f"{next(iter(used.values()))} (every task)"
    return "; ".join(f"{task}: {value}" for task, value in used.items())


def _grid(method: str, runs: Sequence[Run], final: Sequence[Run]) -> str:
    names = varied(runs) or ["lr"]
    candidates = _candidates(runs, names)
    tasks = tasks_of((run.task, run.seed) for run in runs)
    columns: dict[str, dict[str, str]] = {}
    for task in tasks:
        found = {label: estimate(of_task(pairs, task)) for label, pairs in candidates.items()}
        best = _best({label: None if each is None else each.mean for label, each in found.items()})
        columns[task] = {
            label: f"**{score(each)}**" if label in best else ("—" if each is None else score(each))
            for label, each in found.items()
        }
    whole = {label: pairs if tasks_of(pairs) == tasks else {} for label, pairs in candidates.items()}
    means = {label: mean_over_tasks(pairs) for label, pairs in whole.items()}
    best = _best(means)
    overall = {
        label: "—" if mean is None else f"**{plain(mean)}**" if label in best else plain(mean)
        for label, mean in means.items()
    }
    if len(tasks) > 1:
        columns["mean over tasks"] = overall
    rows = [(label, *(column[label] for column in columns.values())) for label in candidates]
    note = f"`{method}`: best mean over tasks on dev {' and '.join(best) or NOT_MEASURED}; "
    note += f"final runs use {_used(final, names, tasks)}."
    return f"{note}\n\n" + table((", ".join(names), *columns), rows)


def tuning(runs: Sequence[Run], plots: Mapping[Figure, str]) -> str:
    """Tabulate the grids.

    Args:
        runs: runs of every stage.
        plots: every figure and its address.

    Returns:
        The section.
    """
    title = "## Tuning"
    tune = [run for run in runs if run.stage == "tune"]
    if not tune:
        return f"{title}\n\nTuning grids: {NOT_MEASURED}."
    parts = [title, "Accuracy on dev, mean ± standard deviation (n seeds); the best of each column is bold."]
    keys = {(run.model, run.pattern) for run in tune}
    for model in sorted({model for model, _ in keys}):
        found = by_known((p for name, p in keys if name == model and p is not None), PATTERNS)
        for pattern in [*([None] if (model, None) in keys else []), *found]:
            parts.append(f"### Tuning, {heading(pattern, model, runs)}")
            here = [run for run in tune if (run.model, run.pattern) == (model, pattern)]
            address = next(
                (a for f, a in plots.items() if (f.kind, f.model, f.pattern) == ("tuning", model, pattern)), ""
            )
            if address:
                parts.append(f"![Dev accuracy against the learning rate at {pattern}]({address})")
                parts.append("Each method with the best of its settings at that learning rate; one point is one run.")
            for method in by_known((run.method for run in here), METHODS):
                final = [run for run in select(runs, "final", model, pattern) if run.method == method]
                parts.append(_grid(method, [run for run in here if run.method == method], final))
    return "\n\n".join(parts)


def _budget_row(
    label: Sequence[str], scored: Mapping[str, Pairs], methods: Sequence[str], task: str | None
) -> list[str]:
    row = [*label]
    for method in methods:
        pairs = scored.get(method, {})
        if task is not None:
            found = estimate(of_task(pairs, task))
            row.append("—" if found is None else score(found))
        else:
            mean = mean_over_tasks(pairs)
            row.append("—" if mean is None else plain(mean))
    for other in (name for name in methods if name != SUBJECT and SUBJECT in methods):
        comparison = compare(scored.get(SUBJECT, {}), scored.get(other, {}))
        found = comparison.overall if task is None else comparison.per_task.get(task)
        row.append("—" if found is None else difference(found) + (f"; {basis(comparison)}" if task is None else ""))
    return row


def _budget_table(runs: Sequence[Run]) -> str:
    methods = by_known((run.method for run in runs), METHODS)
    tasks = tasks_of((run.task, run.seed) for run in runs)
    rows = []
    for steps, lr in sorted({(run.steps, run.lr) for run in runs}):
        here = [run for run in runs if (run.steps, run.lr) == (steps, lr)]
        scored = scores_by_method(here, lambda run: run.test)
        own = [task for task in tasks if any(run.task == task for run in here)]
        for task in [*own, *([None] if len(own) > 1 else [])]:
            label = (str(steps), f"{lr:g}", task or ALL_TASKS)
            rows.append(_budget_row(label, scored, methods, task))
    gaps = [f"`{SUBJECT}` - `{other}`" for other in methods if other != SUBJECT and SUBJECT in methods]
    return table(("steps", "lr", "task", *(f"`{method}`" for method in methods), *gaps), rows, left=3)


def budgets(runs: Sequence[Run]) -> str:
    """Tabulate the defaults on other budgets.

    Args:
        runs: runs of every stage.

    Returns:
        The section.
    """
    title = "## Other budgets and learning rates"
    budget = [run for run in runs if run.stage == "budget"]
    if not budget:
        return f"{title}\n\nOther budgets and learning rates: {NOT_MEASURED}."
    parts = [
        title,
        BUDGET_TEXT,
    ]
    for model, pattern in groups(budget):
        parts.append(f"### Budgets, {heading(pattern, model, runs)}")
        parts.append(_budget_table(select(runs, "budget", model, pattern)))
    if len(parts) == 2:
        parts.append(f"Sparse methods on other budgets: {NOT_MEASURED}.")
    return "\n\n".join(parts)


Cell = tuple[float, int]
"""lr and steps: two runs are compared only where these agree."""


def _variant(run: Run) -> str:
    name = str(run.setting["variant"])
    return name if run.method == SUBJECT else f"{run.method}: {name}"


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Rows of the table; where a variant has several settings, each is a row of its own."""
    rows: dict[str, list[Run]] = {}
    for variant in dict.fromkeys(map(_variant, runs)):
        own = [run for run in runs if _variant(run) == variant]
        names = varied(own)
        for run in sorted(own, key=lambda run: _order(run, names)):
            rows.setdefault(", ".join(filter(None, (variant, _label(run, names)))), []).append(run)
    return rows


def _matched(runs: Sequence[Run], reference: Sequence[Run]) -> Comparison:
    cells: dict[tuple[str, int], Cell] = {(run.task, run.seed): (run.lr, run.steps) for run in runs}
    same = [run for run in reference if cells.get((run.task, run.seed)) == (run.lr, run.steps)]
    return compare(scores(runs, lambda run: run.dev), scores(same, lambda run: run.dev))


def _ablation_table(runs: Sequence[Run], final: Sequence[Run]) -> str:
    rows_of = _by_variant(runs)
    own = [run for run in runs if _variant(run) == DEFAULTS]
    reference = own or [run for run in final if run.method == SUBJECT]
    source = f"the variant `{DEFAULTS}`" if own else f"the final runs of `{SUBJECT}`"
    tasks = tasks_of((run.task, run.seed) for run in runs)
    names = [DEFAULTS] if DEFAULTS in rows_of else []
    rows = []
    for name in [*names, *(name for name in rows_of if name not in names)]:
        pairs = scores(rows_of[name], lambda run: run.dev)
        means = [estimate(of_task(pairs, task)) for task in tasks]
        comparison = _matched(rows_of[name], reference)
        is_reference = rows_of[name][0] in own
        gaps = ("—", "—") if is_reference else (difference(comparison.overall), basis(comparison))
        rows.append((name, *("—" if mean is None else score(mean) for mean in means), *gaps))
    text = f"Accuracy on dev, and the paired difference to {source} at the same task, seed, lr and steps:"
    return f"{text}\n\n" + table(("variant", *tasks, "difference over all tasks", "on"), rows)


def ablations(runs: Sequence[Run]) -> str:
    """Tabulate the variants.

    Args:
        runs: runs of every stage.

    Returns:
        The section.

    Raises:
        InputError: an ablation without a pattern.
    """
    title = f"## Ablations of `{SUBJECT}`"
    ablation = [run for run in runs if run.stage == "ablation"]
    if not ablation:
        return f"{title}\n\nAblations: {NOT_MEASURED}."
    if dense := [run for run in ablation if run.pattern is None]:
        raise InputError(f"{dense[0].where}: an ablation of {dense[0].method}, which has no pattern to ablate")
    parts = [title]
    keys = {(run.model, run.pattern) for run in ablation}
    for model in sorted({model for model, _ in keys}):
        for pattern in by_known((p for name, p in keys if name == model and p is not None), PATTERNS):
            parts.append(f"### Ablations, {heading(pattern, model, runs)}")
            here = [run for run in ablation if (run.model, run.pattern) == (model, pattern)]
            parts.append(_ablation_table(here, select(runs, "final", model, pattern)))
    return "\n\n".join(parts)
