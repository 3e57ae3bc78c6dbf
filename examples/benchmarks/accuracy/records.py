"""The raw files of the accuracy study: one run a line, every line checked before any figure is made of it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = ("dense", "asp", "gradual", "sr-ste", "pat", "admm-paper", "admm", "admm-paper+kd", "admm+kd")
PATTERNS = ("2:4", "1:4", "2:8")
STAGES = ("tune", "final", "budget", "ablation")
TESTED = ("final", "budget")  # the other stages choose by dev, and must not have seen the test set
TRACES = "traces-"

Pairs = dict[tuple[str, int], float]
"""One figure for each (task, seed)."""


class InputError(Exception):
    """A raw file says something it may not; the message names file and line."""


@dataclass(frozen=True)
class Run:
    """One line of a file of runs; accuracies in percent.

    Args:
        where: file and line.
        primal_residual: a fraction, at finalize.
        projection_loss: points of accuracy that the projection cost.
        setting: the hyperparameters besides lr and steps.
    """

    where: str
    task: str
    model: str
    pattern: str | None
    method: str
    seed: int
    lr: float
    steps: int
    dev: float
    test: float | None
    primal_residual: float | None
    projection_loss: float | None
    seconds: float
    device: str
    commit: str
    versions: Mapping[str, str]
    setting: Mapping[str, Any]
    stage: str


@dataclass(frozen=True)
class Trace:
    """One line of a file of traces.

    Args:
        where: file and line.
        trace: the lists ``step``, ``primal_residual`` and ``churn``, equally long; null where nothing was read.
    """

    where: str
    task: str
    model: str
    pattern: str | None
    method: str
    seed: int
    lr: float
    steps: int
    trace: Mapping[str, list[Any]]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and _is_number(value) and value >= 0


def _is_percent(value: object) -> bool:
    return isinstance(value, (int, float)) and _is_number(value) and 0 <= value <= 100


def _or_null(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _is_versions(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value)) and all(map(_is_text, value.values()))


def _is_setting(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value))


def _is_trace(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"step", "primal_residual", "churn"}:
        return False
    lists = list(value.values())
    if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists}) != 1:
        return False
    steps = value["step"]
    if not all(map(_is_count, steps)) or any(a >= b for a, b in itertools.pairwise(steps)):
        return False
    return all(map(_or_null(_is_amount), [*value["primal_residual"], *value["churn"]]))


Check = tuple[Callable[[object], bool], str]

_SHARED: dict[str, Check] = {
    "task": (_is_text, "a text of one line"),
    "model": (_is_text, "a text of one line"),
    "pattern": (_or_null(_is_text), 'a text such as "2:4", or null'),
    "method": (_is_text, "a text of one line"),
    "seed": (_is_count, "an int, at least 0"),
    "lr": (_is_amount, "a finite number, at least 0"),
    "steps": (_is_count, "an int, at least 0"),
}
_RUN: dict[str, Check] = {
    **_SHARED,
    "dev": (_is_percent, "a number from 0 to 100"),
    "test": (_or_null(_is_percent), "a number from 0 to 100, or null"),
    "primal_residual": (_or_null(_is_amount), "a finite number, at least 0, or null"),
    "projection_loss": (_or_null(_is_number), "a finite number, or null"),
    "seconds": (_is_amount, "a finite number, at least 0"),
    "device": (_is_text, "a text of one line"),
    "commit": (_is_text, "a text of one line"),
    "versions": (_is_versions, "an object of texts"),
    "setting": (_is_setting, "an object"),
    "stage": (lambda value: value in STAGES, f"one of {', '.join(STAGES)}"),
}
_TRACE: dict[str, Check] = {
    **_SHARED,
    "trace": (
        _is_trace,
        "an object of equally long lists: step (rising ints), primal_residual and churn (numbers at least 0, or null)",
    ),
}


def _shorten(value: object, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _check_keys(line: object, checks: Mapping[str, Check], where: str) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise InputError(f"{where}: must be a JSON object, not {_shorten(line)}")
    if unknown := sorted(set(line) - set(checks)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(checks)}")
    if missing := [key for key in checks if key not in line]:
        raise InputError(f"{where}: no key {missing[0]!r}")
    for key, (check, wanted) in checks.items():
        if not check(line[key]):
            raise InputError(f"{where}: {key}={_shorten(line[key])} must be {wanted}")
    if (line["pattern"] is None) != is_dense(line["method"]):
        raise InputError(
            f"{where}: method {line['method']!r} with pattern {_shorten(line['pattern'])}: "
            "the pattern is null for dense runs and for no others"
        )
    return line


def _check_stage(run: Run) -> Run:
    if (run.test is not None) != (run.stage in TESTED):
        raise InputError(
            f"{run.where}: test={_shorten(run.test)} at stage {run.stage!r}: "
            f"test is a number at {' and '.join(TESTED)}, and null elsewhere"
        )
    if run.stage == "ablation" and not _is_text(run.setting.get("variant")):
        raise InputError(f'{run.where}: an ablation needs its name in setting["variant"]')
    return run


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name}: cannot be read: {error}") from error
    # Not splitlines(), which also cuts at separators that JSON allows inside a text.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{path.name}:{number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON: {error}") from error


def _refuse_repeats(keys: Iterable[tuple[str, tuple[object, ...]]], what: str) -> None:
    seen: dict[tuple[object, ...], str] = {}
    for where, key in keys:
        if key in seen:
            raise InputError(f"{where}: the same {what} as {seen[key]}")
        seen[key] = where


def is_dense(method: str) -> bool:
    """Say whether a method leaves the weights dense: ``dense`` itself, or ``dense+`` something.

    Args:
        method: its name.

    Returns:
        Whether its runs have no pattern.
    """
    return method.split("+")[0] == "dense"


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Find the raw files.

    Args:
        folder: where they lie.

    Returns:
        The files of runs and the files of traces, each by name.

    Raises:
        InputError: ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of results")
    files = sorted(folder.glob("*.jsonl"))
    traces = [path for path in files if path.name.startswith(TRACES)]
    return [path for path in files if path not in traces], traces


def read_runs(files: Iterable[Path]) -> list[Run]:
    """Read every run.

    Args:
        files: files of runs.

    Returns:
        The runs, in the order of files and lines.

    Raises:
        InputError: a line is malformed, or two lines are the same run.
    """
    runs = [
        _check_stage(Run(where=where, **_check_keys(line, _RUN, where)))
        for path in files
        for where, line in _lines(path)
    ]
    _refuse_repeats(
        (
            (
                run.where,
                (
                    *(run.task, run.model, run.pattern, run.method, run.seed, run.lr, run.steps),
                    *(json.dumps(run.setting, sort_keys=True), run.stage),
                ),
            )
            for run in runs
        ),
        "run",
    )
    return runs


def read_traces(files: Iterable[Path]) -> list[Trace]:
    """Read every trace.

    Args:
        files: files of traces.

    Returns:
        The traces, in the order of files and lines.

    Raises:
        InputError: a line is malformed, or two lines trace the same run.
    """
    traces = [Trace(where=where, **_check_keys(line, _TRACE, where)) for path in files for where, line in _lines(path)]
    _refuse_repeats(
        ((t.where, (t.task, t.model, t.pattern, t.method, t.seed, t.lr, t.steps)) for t in traces), "traced run"
    )
    return traces


def by_known(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Order names as the document shows them.

    Args:
        names: any names, repeats allowed.
        known: those that come first, in this order.

    Returns:
        Each name once, the unknown ones last, by alphabet.
    """
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def scores(runs: Iterable[Run], figure: Callable[[Run], float | None]) -> Pairs:
    """Take one figure of each run.

    Args:
        runs: runs of one method in one setting.
        figure: what to take; null is left out.

    Returns:
        The figure of each (task, seed).

    Raises:
        InputError: two runs compete for one (task, seed), so that there is no telling which one to compare.
    """
    taken: Pairs = {}
    sources: dict[tuple[str, int], str] = {}
    for run in runs:
        key = (run.task, run.seed)
        if key in sources:
            raise InputError(
                f"{run.where}: {run.stage} run of {run.method} on {run.task} with seed {run.seed} and other "
                f"hyperparameters than at {sources[key]}: a comparison needs one run for each task and seed"
            )
        sources[key] = run.where
        if (value := figure(run)) is not None:
            taken[key] = value
    return taken


def scores_by_method(runs: Iterable[Run], figure: Callable[[Run], float | None]) -> dict[str, Pairs]:
    """Take one figure of each run, method by method.

    Args:
        runs: runs of one stage, model and pattern.
        figure: what to take; null is left out.

    Returns:
        method -> the figure of each (task, seed), methods in the order of the document.

    Raises:
        InputError: two runs of a method compete for one (task, seed).
    """
    listed = list(runs)
    methods = by_known((run.method for run in listed), METHODS)
    return {method: scores((run for run in listed if run.method == method), figure) for method in methods}
