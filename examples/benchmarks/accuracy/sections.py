"""The parts of the document on final runs: provenance, verdicts, accuracies, paired differences, projection."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from figures import TITLES, Figure, groups
from layout import NOT_MEASURED, basis, difference, plain, quantity, score, table
from records import METHODS, PATTERNS, STAGES, Pairs, Run, Trace, by_known, is_dense, scores_by_method
from summary import compare, estimate, mean_over_tasks, of_task, tasks_of
from targets import SUBJECT, Verdict, judge_budgets, judge_distillation, judge_pattern, judge_projection

REFERENCES = ("asp", "sr-ste", "pat", "dense")
BASELINES = ("dense", "asp", "gradual", "sr-ste", "pat")
ANCHOR = "asp"

METHOD_OF_STATISTICS = """\
Accuracies are on the test set, in percent; n is the number of seeds, ± the sample standard deviation over them (n - 1).
The mean over tasks is the mean of the means of the tasks, so every task counts the same.

Differences are paired: one method minus the other at the same task and seed, and only where both have a run. Per task,
the figure is the mean of these differences over seeds. Over all tasks, each seed that has every shared task gives one
value, the mean of its differences over those tasks; the figure is the mean of these values over seeds, so it can differ
from the difference of two means in a table of accuracies when runs are missing. The brackets are the 95 % interval of
Student's t for that mean with (number of seeds - 1) degrees of freedom: it covers the scatter between seeds on these
tasks, not the choice of tasks nor the sampling of test rows (all seeds are scored on the same ones), and it is not
corrected for the number of comparisons.

"Not resolved" means that the interval includes zero, or that every seed gave the same difference, so that there is no
spread to make an interval of. A single seed has no interval and is never counted as won or lost."""


def select(runs: Iterable[Run], stage: str, model: str, pattern: str | None) -> list[Run]:
    """Take the runs of one stage that belong into one comparison.

    Args:
        runs: runs of every stage.
        stage: the stage.
        model: the model.
        pattern: the pattern; dense runs belong to every pattern.

    Returns:
        The runs.
    """
    return [run for run in runs if run.stage == stage and run.model == model and run.pattern in (pattern, None)]


def heading(pattern: str | None, model: str, runs: Sequence[Run] | Sequence[Trace]) -> str:
    """Name a pattern, and the model where there are several.

    Args:
        pattern: the pattern, None for dense.
        model: the model.
        runs: all there is.

    Returns:
        The name.
    """
    return f"{pattern or 'dense'}" + (f", {model}" if len({run.model for run in runs}) > 1 else "")


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({quantity(count, 'run')})" for value, count in sorted(counts.items()))


def provenance(runs: Sequence[Run], traces: Sequence[Trace], files: Sequence[Path]) -> str:
    """Say where the figures come from.

    Args:
        runs: runs of every stage.
        traces: every trace.
        files: the raw files.

    Returns:
        The section.
    """
    if not runs:
        return "## Provenance\n\nNo runs: nothing was measured yet."
    stages = Counter(run.stage for run in runs)
    names = sorted({name for run in runs for name in run.versions})
    rows = [
        ("raw files", ", ".join(f"`{path.name}`" for path in files)),
        ("runs", f"{len(runs)}: " + ", ".join(f"{stages[stage]} {stage}" for stage in STAGES)),
        ("traces", str(len(traces))),
        ("models", _counted(run.model for run in runs)),
        ("tasks", ", ".join(tasks_of((run.task, run.seed) for run in runs))),
        ("device", _counted(run.device for run in runs)),
        ("commit", _counted(run.commit for run in runs)),
        *((name, _counted(run.versions.get(name, "not recorded") for run in runs)) for name in names),
        ("time", f"{sum(run.seconds for run in runs):.0f} seconds over all runs"),
    ]
    return "## Provenance\n\n" + table(("what", "value"), rows, left=2)


def _judge_all(runs: Sequence[Run]) -> list[tuple[str, Verdict]]:
    models = sorted({run.model for run in runs}) or [""]
    found: list[tuple[str, Verdict]] = []
    distilled: list[tuple[str, Verdict]] = []
    for model in models:
        for pattern in PATTERNS:
            scores = scores_by_method(select(runs, "final", model, pattern), lambda run: run.test)
            name = heading(pattern, model, runs)
            found += [(name, verdict) for verdict in judge_pattern(pattern, scores)]
            distilled += [(name, verdict) for verdict in judge_distillation(scores)]
    budgets = [(name, judge_budgets(select(runs, "budget", model, name))) for model in models for name in PATTERNS]
    told = [(name, verdict) for name, verdict in budgets if verdict is not None]
    return [*found, *distilled, *told, *(("all", verdict) for verdict in judge_projection(runs))]


def verdicts(runs: Sequence[Run]) -> str:
    """Judge every target.

    Args:
        runs: runs of every stage.

    Returns:
        The section.
    """
    rows = [
        (name, v.target, f"**{v.status}**" + ("" if v.resolved else ", not resolved"), v.detail)
        for name, v in _judge_all(runs)
    ]
    text = (
        f"Each line is computed from the raw files. Pass and fail are by the mean, of `{SUBJECT}` unless a line names "
        'another method; "not resolved" stands where the 95 % interval includes the limit, so other seeds may well '
        f"turn the verdict. With a single seed a target counts as {NOT_MEASURED}."
    )
    return f"## Targets\n\n{text}\n\n" + table(("pattern", "target", "verdict", "figures"), rows, left=4)


def overview(runs: Sequence[Run]) -> str:
    """Tabulate the mean over tasks of every method, one pattern beside the other.

    Args:
        runs: runs of every stage.

    Returns:
        Paragraphs and a table for each model, without a heading.
    """
    final = [run for run in runs if run.stage == "final" and run.test is not None]
    parts = []
    for model in sorted({run.model for run in final}):
        here = [run for run in final if run.model == model]
        shown = by_known({run.pattern for run in here if run.pattern is not None}, PATTERNS)
        scores = {p: scores_by_method(select(here, "final", model, p), lambda run: run.test) for p in shown}
        tasks = tasks_of((run.task, run.seed) for run in here)
        seeds = {run.seed for run in here}
        rows = []
        for method in by_known({run.method for run in here}, METHODS):
            cells: list[str] = []
            for p in shown:
                mean = mean_over_tasks(scores[p].get(method, {}))
                known = mean is not None and method != ANCHOR and ANCHOR in scores[p]
                gain = difference(compare(scores[p][method], scores[p][ANCHOR]).overall) if known else ""
                cells += [NOT_MEASURED if mean is None else plain(mean), gain]
            rows.append((f"`{method}`", *cells))
        steps = sorted({run.steps for run in here})
        named = ", ".join(map(str, steps))
        parts.append(
            f"{model}; {quantity(len(tasks), 'task')} ({', '.join(tasks)}), {quantity(len(seeds), 'seed')}, {named} "
            f"steps: test accuracy in percent, mean over tasks, and the paired difference to `{ANCHOR}` with its 95 % "
            "interval."
        )
        header = [title for p in shown for title in (p, f"minus `{ANCHOR}`")]
        parts.append(table(("method", *header), rows))
    return "\n\n".join(parts) or f"Test accuracy: {NOT_MEASURED}."


def without_each_task(runs: Sequence[Run]) -> str:
    """Tabulate the lead over the anchor with each task left out in turn: whether it hangs on one of them.

    Args:
        runs: runs of every stage.

    Returns:
        A paragraph and a table for each model; empty with fewer than three tasks.
    """
    final = [run for run in runs if run.stage == "final" and run.test is not None]
    parts = []
    for model in sorted({run.model for run in final}):
        here = [run for run in final if run.model == model]
        tasks = tasks_of((run.task, run.seed) for run in here)
        shown = by_known({run.pattern for run in here if run.pattern is not None}, PATTERNS)
        rows = []
        for method in by_known(
            {run.method for run in here if not is_dense(run.method) and run.method != ANCHOR}, METHODS
        ):
            for left_out in tasks if len(tasks) > 2 else ():
                cells = []
                for p in shown:
                    rest = [run for run in select(here, "final", model, p) if run.task != left_out]
                    scores = scores_by_method(rest, lambda run: run.test)
                    known = method in scores and ANCHOR in scores
                    cells.append(difference(compare(scores[method], scores[ANCHOR]).overall) if known else NOT_MEASURED)
                rows.append((f"`{method}`", left_out, *cells))
        if rows:
            parts.append(f"The difference to `{ANCHOR}` without one of the tasks, {model}:")
            parts.append(table(("method", "without", *shown), rows, left=2))
    return "\n\n".join(parts)


def _accuracy_table(scores: Mapping[str, Pairs], tasks: Sequence[str]) -> str:
    rows = []
    for method, pairs in scores.items():
        mean, own = mean_over_tasks(pairs), tasks_of(pairs)
        text = NOT_MEASURED if mean is None else plain(mean)
        partly = f" ({len(own)} of {quantity(len(tasks), 'task')})" if len(own) < len(tasks) else ""
        rows.append((f"`{method}`", *(score(estimate(of_task(pairs, task))) for task in tasks), text + partly))
    return table(("method", *tasks, "mean over tasks"), rows)


def _anchor_table(scores: Mapping[str, Pairs], tasks: Sequence[str]) -> str:
    rows = []
    for method, pairs in scores.items():
        if method == ANCHOR:
            continue
        found = compare(pairs, scores[ANCHOR])
        cells = [difference(found.per_task.get(task)) for task in tasks]
        rows.append((f"`{method}`", *cells, difference(found.overall), basis(found)))
    return table(("method", *tasks, "over all tasks", "on"), rows)


def _reference_rows(scores: Mapping[str, Pairs]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for method in (method for method in scores if method not in BASELINES and not is_dense(method)):
        for reference in (name for name in REFERENCES if name in scores):
            found = compare(scores[method], scores[reference])
            resolved = sum(found.count(reading) for reading in ("above", "below", "not resolved"))
            counts = f"{found.count('above')} / {found.count('not resolved')} / {found.count('below')}"
            single = found.count("one seed")
            higher = sum(each.mean > 0 for each in found.per_task.values() if each.n > 1)
            rows.append(
                (
                    *(f"`{method}`", f"`{reference}`", difference(found.overall), basis(found)),
                    counts + (f", {quantity(single, 'task')} with one seed" if single else ""),
                    f"{higher} of {resolved}",
                )
            )
    return rows


def _pattern_section(runs: Sequence[Run], model: str, pattern: str, plot: str | None) -> str:
    name = heading(pattern, model, runs)
    scores = scores_by_method(select(runs, "final", model, pattern), lambda run: run.test)
    if all(map(is_dense, scores)):
        return f"## {name}\n\nTest accuracy at {pattern}: {NOT_MEASURED}."
    tasks = tasks_of(pair for pairs in scores.values() for pair in pairs)
    parts = [f"## {name}", "Test accuracy, mean ± standard deviation (n seeds):", _accuracy_table(scores, tasks)]
    if plot is not None:
        parts.append(f"![Test accuracy by method at {name}]({plot})")
        parts.append("A point is a seed, a bar the mean over seeds; the axes do not start at zero.")
    if ANCHOR in scores:
        parts.append(f"Paired difference to `{ANCHOR}` in points of accuracy, with its 95 % interval:")
        parts.append(_anchor_table(scores, tasks))
    else:
        parts.append(f"Paired difference to `{ANCHOR}`: {NOT_MEASURED}.")
    if rows := _reference_rows(scores):
        parts.append("Paired difference to each reference, over all tasks, and how the tasks fall:")
        header = ("method", "minus", "difference", "on", "tasks won / tied (not resolved) / lost", "higher mean in")
        parts.append(table(header, rows, left=2))
        parts.append(
            "A task is won or lost where its interval excludes zero. The last column counts the tasks with two seeds "
            "or more in which the mean is higher, resolved or not."
        )
    return "\n\n".join(parts)


def patterns(runs: Sequence[Run], plots: Mapping[Figure, str]) -> str:
    """Tabulate the final runs, pattern by pattern.

    Args:
        runs: runs of every stage.
        plots: every figure and its address.

    Returns:
        The sections.
    """
    present = groups([run for run in runs if run.stage == "final"])
    models = sorted({run.model for run in runs}) or [""]
    addresses = {(f.model, f.pattern): address for f, address in plots.items() if f.kind == "accuracy"}
    sections = [f"## How the figures are computed\n\n{METHOD_OF_STATISTICS}"]
    for model in models:
        found = [pattern for name, pattern in present if name == model]
        sections += [
            _pattern_section(runs, model, pattern, addresses.get((model, pattern)))
            for pattern in by_known([*PATTERNS, *found], PATTERNS)
        ]
    return "\n\n".join(sections)


def _range(runs: Sequence[Run], figure: Callable[[Run], float | None], factor: float) -> tuple[str, ...]:
    values = [value * factor for run in runs if (value := figure(run)) is not None]
    if not values:
        return "—", "—", "—"
    return tuple(plain(value, 3) for value in (min(values), statistics.median(values), max(values)))


def projection(runs: Sequence[Run]) -> str:
    """Tabulate residuals and what the projection cost.

    Args:
        runs: runs of every stage.

    Returns:
        The section.
    """
    title = "## At the projection"
    read = [run for run in runs if run.primal_residual is not None or run.projection_loss is not None]
    if not read:
        return f"{title}\n\nPrimal residual and loss at the projection: {NOT_MEASURED}."
    rows = []
    for model, pattern in groups(read):
        here = [run for run in read if (run.model, run.pattern) == (model, pattern)]
        for method in by_known((run.method for run in here), METHODS):
            for stage in STAGES:
                if chosen := [run for run in here if (run.method, run.stage) == (method, stage)]:
                    residual = _range(chosen, lambda run: run.primal_residual, 100.0)
                    loss = _range(chosen, lambda run: run.projection_loss, 1.0)
                    name = heading(pattern, model, runs)
                    rows.append((name, f"`{method}`", stage, str(len(chosen)), *residual, *loss))
    text = (
        "Primal residual when the run was finalized, in percent of the norm of the weights, and points of accuracy "
        "that the projection cost (before minus after, negative where it gained):"
    )
    figures = ("residual min", "median", "max", "loss min", "median", "max")
    return f"{title}\n\n{text}\n\n" + table(("pattern", "method", "stage", "runs", *figures), rows, left=3)


def traces(items: Sequence[Trace], plots: Mapping[Figure, str]) -> str:
    """Show the plots over steps.

    Args:
        items: every trace.
        plots: every figure and its address.

    Returns:
        The section.
    """
    title = "## During training"
    shown = [(figure, address) for figure, address in plots.items() if figure.kind in ("residual", "churn")]
    if not shown:
        return f"{title}\n\nPrimal residual and mask churn over steps: {NOT_MEASURED}."
    text = (
        "One line is one run. The churn is the share of kept places that the last z-step brought in. "
        "A residual of exactly zero is a gap: the axis is logarithmic."
    )
    images = [
        f"![{TITLES[figure.kind]} against step at {heading(figure.pattern, figure.model, items)}]({address})"
        for figure, address in shown
    ]
    return "\n\n".join([title, text, *images])
