"""What the plots show, as plain data: drawn by plots.py, and known by its digest without drawing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from records import METHODS, PATTERNS, Run, Trace, by_known, scores_by_method
from summary import of_task, seed_means, tasks_of

Kind = Literal["accuracy", "residual", "churn", "tuning"]
TITLES: dict[Kind, str] = {
    "accuracy": "Test accuracy (%)",
    "residual": "Primal residual",
    "churn": "Mask churn",
    "tuning": "Dev accuracy (%) against learning rate",
}


@dataclass(frozen=True)
class Line:
    """One line of a plot, or the points of one method.

    Args:
        method: the method.
        x: steps or learning rates; for accuracies the numbers of the points.
        y: the values; None is a gap.
    """

    method: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: its title.
        lines: what is drawn.
    """

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Figure:
    """One file.

    Args:
        name: its name.
        kind: what it shows.
        pattern: the pattern.
        model: the model.
        panels: its axes.
    """

    name: str
    kind: Kind
    pattern: str
    model: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        """A hash of the data, which the file carries: the bytes of a drawing differ between versions of matplotlib."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def groups(items: Sequence[Run] | Sequence[Trace]) -> list[tuple[str, str]]:
    """List what belongs into one table or plot.

    Args:
        items: runs or traces.

    Returns:
        Each (model, pattern) that has any, the patterns in the order of the document.
    """
    found = {(item.model, item.pattern) for item in items if item.pattern is not None}
    return [(model, p) for model in sorted({m for m, _ in found}) for p in patterns_of(found, model)]


def patterns_of(found: set[tuple[str, str]], model: str) -> list[str]:
    """List the patterns of a model.

    Args:
        found: (model, pattern) of all.
        model: the model.

    Returns:
        Its patterns, in the order of the document.
    """
    return by_known((pattern for name, pattern in found if name == model), PATTERNS)


def _name(kind: Kind, model: str, pattern: str, several: bool) -> str:
    parts = [kind, *([model] if several else []), pattern]
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in parts) + ".svg"


def _points(method: str, values: Sequence[float]) -> Line:
    return Line(method, tuple(range(len(values))), tuple(values))


def accuracy_figures(runs: Sequence[Run]) -> list[Figure]:
    """Lay out the accuracies of final runs.

    Args:
        runs: runs of every stage.

    Returns:
        A figure for each model and pattern: the seed-wise means over tasks, then each task.
    """
    final = [run for run in runs if run.stage == "final"]
    several = len({run.model for run in runs}) > 1
    figures = []
    for model, pattern in groups(final):
        chosen = [run for run in final if run.model == model and run.pattern in (pattern, None)]
        scores = scores_by_method(chosen, lambda run: run.test)
        tasks = tasks_of(pair for pairs in scores.values() for pair in pairs)
        panels = [
            Panel(task, tuple(_points(m, values) for m, pairs in scores.items() if (values := of_task(pairs, task))))
            for task in tasks
        ]
        means = {method: list(seed_means(pairs, tasks).values()) for method, pairs in scores.items()}
        lines = tuple(_points(method, values) for method, values in means.items() if values)
        if len(tasks) > 1 and lines:
            panels.insert(0, Panel(f"mean over {len(tasks)} tasks", lines))
        figures.append(Figure(_name("accuracy", model, pattern, several), "accuracy", pattern, model, tuple(panels)))
    return figures


def _best_setting(runs: Sequence[Run]) -> Line:
    """One method on one task: at each learning rate the best of its settings."""
    best: dict[float, float] = {}
    for run in runs:
        best[run.lr] = max(best.get(run.lr, run.dev), run.dev)
    return Line(runs[0].method, tuple(sorted(best)), tuple(best[lr] for lr in sorted(best)))


def tuning_figures(runs: Sequence[Run]) -> list[Figure]:
    """Lay out the tuning grids.

    Args:
        runs: runs of every stage.

    Returns:
        A figure for each model and pattern with a panel for each task: dev accuracy over the learning rate, each method
        with the best of its settings; dense runs stand in every figure.
    """
    tune = [run for run in runs if run.stage == "tune"]
    several = len({run.model for run in runs}) > 1
    figures = []
    for model, pattern in groups(tune):
        chosen = [run for run in tune if run.model == model and run.pattern in (pattern, None)]
        methods = by_known((run.method for run in chosen), METHODS)
        panels = []
        for task in sorted({run.task for run in chosen}):
            by_method = {m: [run for run in chosen if (run.method, run.task) == (m, task)] for m in methods}
            panels.append(Panel(task, tuple(_best_setting(found) for found in by_method.values() if found)))
        figures.append(Figure(_name("tuning", model, pattern, several), "tuning", pattern, model, tuple(panels)))
    return figures


def _trace_line(trace: Trace, key: str) -> Line:
    return Line(trace.method, tuple(trace.trace["step"]), tuple(trace.trace[key]))


def trace_figures(traces: Sequence[Trace]) -> list[Figure]:
    """Lay out the traces.

    Args:
        traces: every trace.

    Returns:
        For each model and pattern a figure of the primal residual and one of the churn, a panel for each task; none
        where no value was read.
    """
    several = len({trace.model for trace in traces}) > 1
    figures = []
    kinds: tuple[tuple[Kind, str], ...] = (("residual", "primal_residual"), ("churn", "churn"))
    for model, pattern in groups(traces):
        chosen = [trace for trace in traces if (trace.model, trace.pattern) == (model, pattern)]
        for kind, key in kinds:
            read = [trace for trace in chosen if any(value is not None for value in trace.trace[key])]
            methods = by_known((trace.method for trace in read), METHODS)
            read.sort(key=lambda t: (methods.index(t.method), t.seed, t.lr, t.steps))
            tasks = sorted({trace.task for trace in read})
            panels = tuple(
                Panel(task, tuple(_trace_line(trace, key) for trace in read if trace.task == task)) for task in tasks
            )
            if panels:
                figures.append(Figure(_name(kind, model, pattern, several), kind, pattern, model, panels))
    return figures
