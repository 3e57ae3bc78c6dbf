"""What is run and in which order: declared grids, and the choice that dev makes in them. No files, no training here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

Line = Mapping[str, Any]
Choice = tuple[float, dict[str, Any]]
"""A learning rate and a setting."""

DISTILLED = "+kd"

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "gradual": ({"stop": 0.5}, {"stop": 0.75}),
    "sr-ste": ({"decay": 2e-4}, {"decay": 2e-3}),
    "pat": ({"healing": 0.75}, {"healing": 0.9}),
    "admm-paper": ({"rho": 1e-2}, {"rho": 1e-3}),
}
"""What a method may tune besides the learning rate, the usual value first."""

WIDER = 3.0
"""By how much the grid of learning rates grows on a side where a choice lies on its edge."""

FIRST_SEEDS = 3
"""How many seeds of a method both tables get before the other seeds of either."""

EXPLORED_AT = 0.85
"""``prune_at`` of the runs that explore everything else."""


def model_name(layers: int) -> str:
    """Return the model as the raw lines name it."""
    return f"MiniLM-L6, first {layers} layers"


@dataclass(frozen=True)
class Spec:
    """Everything that decides a run's outcome.

    Args:
        task: one of tasks.TASKS.
        layers: encoder layers.
        pattern: spelling of the pattern, None for dense.
        method: a key of methods.METHODS, with ``+kd`` behind it for distillation from the dense run of the same seed.
        seed: of the head, the batches and dropout.
        lr: peak learning rate of the encoder.
        steps: optimizer steps.
        setting: JSON of the method's own hyperparameters; ``teacher_lr`` is the dense run's with distillation.
        stage: see records.py; "final" is scored on test, all others on dev.
    """

    task: str
    layers: int
    pattern: str | None
    method: str
    seed: int
    lr: float
    steps: int
    setting: str = "{}"
    stage: str = "final"

    @property
    def options(self) -> dict[str, Any]:
        """The setting as an object."""
        options: dict[str, Any] = json.loads(self.setting)
        return options

    @property
    def trunk(self) -> tuple[Any, ...]:
        """What runs have in common that share their first part."""
        return (self.task, self.layers, self.seed, self.lr, self.steps, self.options.get("teacher_lr"))


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        layers: encoder layers of the model.
        tasks: the tasks.
        patterns: pattern -> (its seeds, the pattern whose choice it takes).
        rounds: the methods in the order of their runs, those together that are run together.
        lrs: the grid of learning rates, rising.
        usual_lrs: those of the table in which nothing is tuned.
        middle: the learning rate at which a method's own settings are tried.
        seeds: seeds of the final runs.
        tuning_seeds: seeds of tuning and exploring.
        steps: length of a run.
        explore_tasks: tasks of the runs that explore.
        explore_lrs: learning rates of the runs that explore.
        explore_steps: other lengths of a run at which AT_OTHER_LENGTHS are explored too.
    """

    layers: int
    tasks: tuple[str, ...]
    patterns: Mapping[str, tuple[tuple[int, ...], str]]
    rounds: tuple[tuple[str, ...], ...]
    lrs: tuple[float, ...]
    usual_lrs: tuple[float, ...]
    middle: float
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    steps: int
    explore_tasks: tuple[str, ...] = ()
    explore_lrs: tuple[float, ...] = (3e-4, 9e-4)
    explore_steps: tuple[int, ...] = ()

    @property
    def model(self) -> str:
        """The model as the raw lines name it."""
        return model_name(self.layers)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of all rounds."""
        return tuple(method for methods in self.rounds for method in methods)

    def mine(self, line: Line) -> bool:
        """Say whether a line of raw results belongs to this study."""
        return bool(line["model"] == self.model and line["steps"] == self.steps and line["task"] in self.tasks)


_SEEDS = (0, 1, 2, 3, 4)
_FULL = Plan(
    layers=6,
    tasks=("supersense", "entailment", "polarity", "tweets", "topics"),
    patterns={"2:4": (_SEEDS, "2:4"), "1:4": (_SEEDS, "1:4"), "2:8": (_SEEDS[:3], "1:4")},
    rounds=(
        ("dense", "asp", "asp-late", "sparsegpt-late", "admm"),
        ("asp+kd", "admm+kd"),
        *(("gradual",), ("sr-ste",), ("pat",), ("admm-paper",), ("admm-inputs",)),
    ),
    lrs=(5e-5, 1.5e-4, 4.5e-4, 1.35e-3),
    usual_lrs=(5e-5, 1.5e-4),
    middle=4.5e-4,
    seeds=_SEEDS,
    tuning_seeds=(100, 101),
    steps=400,
    explore_tasks=("supersense", "entailment"),
)
PLANS: dict[str, Plan] = {
    "full": _FULL,
    "cpu": Plan(
        **{
            **_FULL.__dict__,
            "layers": 2,
            "steps": 200,
            "tasks": ("supersense", "entailment", "polarity"),
            "explore_steps": (400, 100, 1600),
        }
    ),
    "smoke": Plan(
        layers=1,
        tasks=("polarity",),
        patterns={"2:4": ((0,), "2:4")},
        rounds=(("asp", "admm"),),
        lrs=(3e-4,),
        usual_lrs=(3e-4,),
        middle=3e-4,
        seeds=(0,),
        tuning_seeds=(100,),
        steps=20,
    ),
}


def together(specs: Iterable[Spec]) -> list[list[Spec]]:
    """Group runs that begin alike, each run once, in the order in which the first of each comes."""
    groups: dict[tuple[Any, ...], list[Spec]] = defaultdict(list)
    for spec in dict.fromkeys(specs):
        groups[spec.trunk].append(spec)
    return list(groups.values())


# Tuning --------------------------------------------------------------------------------------------------------------


def settings_of(method: str) -> tuple[dict[str, Any], ...]:
    """Return the settings of its own that a method tries, the usual one first."""
    return SETTINGS.get(method.removesuffix(DISTILLED), ({},))


class Tuning:
    """What dev chooses, as far as the tuning runs go.

    Args:
        plan: the study.
        lines: raw results.
    """

    def __init__(self, plan: Plan, lines: Iterable[Line]) -> None:
        self.plan = plan
        found: dict[tuple[str, str | None], dict[Any, dict[tuple[str, int], float]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for line in lines:
            if line["stage"] == "tune" and plan.mine(line):
                key = line["lr"], json.dumps(line["setting"])
                found[line["method"], line["pattern"]][key][line["task"], line["seed"]] = line["dev"]
        wanted = {(task, seed) for task in plan.tasks for seed in plan.tuning_seeds}
        # (method, pattern) -> (learning rate, setting) -> the mean, for what has every task and seed.
        self._means = {
            cell: {key: mean(devs[pair] for pair in wanted) for key, devs in grid.items() if wanted <= devs.keys()}
            for cell, grid in found.items()
        }
        at = dict.fromkeys(source for _, source in plan.patterns.values())
        methods = [method for method in plan.methods if not method.endswith(DISTILLED)]
        self.cells = [(m, pattern) for m in methods for pattern in ((None,) if m == "dense" else at)]
        self.lrs = self._grid()

    def _grid(self) -> tuple[float, ...]:
        """Return the learning rates of every method: the plan's, and one more where a choice lies on an edge."""
        bests = [self._best(method, pattern, self.plan.lrs) for method, pattern in self.cells]
        edges = {best[0] for best in bests if best is not None}
        low, high = self.plan.lrs[0], self.plan.lrs[-1]
        if low == high:
            return self.plan.lrs
        below = (float(f"{low / WIDER:.3g}"),) if low in edges else ()
        return (*below, *self.plan.lrs, *((float(f"{high * WIDER:.3g}"),) if high in edges else ()))

    def mean_of(self, method: str, pattern: str | None, lr: float, setting: str) -> float | None:
        """Return the mean over the tasks' dev parts and the tuning seeds; None while a run of it is missing."""
        return self._means.get((method, pattern), {}).get((lr, setting))

    def best_setting(self, method: str, pattern: str | None) -> str | None:
        """Return the setting that is best at the middle learning rate; None while it is not known."""
        if len(settings_of(method)) == 1:
            return json.dumps(settings_of(method)[0])
        means = self._means.get((method, pattern), {})
        keys = [(self.plan.middle, json.dumps(setting)) for setting in settings_of(method)]
        return max(keys, key=means.__getitem__)[1] if set(keys) <= means.keys() else None

    def _best(self, method: str, pattern: str | None, lrs: Sequence[float]) -> tuple[float, str] | None:
        means, setting = self._means.get((method, pattern), {}), self.best_setting(method, pattern)
        if setting is None or not {(lr, setting) for lr in lrs} <= means.keys():
            return None
        return max(((lr, setting) for lr in lrs), key=means.__getitem__)

    def _settled(self, method: str, pattern: str | None) -> tuple[float, str] | None:
        """Return the best of the rates that have runs; None if one of the plan has none, or one beside the best."""
        means, setting = self._means.get((method, pattern), {}), self.best_setting(method, pattern)
        tried = [lr for lr in self.lrs if (lr, setting) in means]
        best = self._best(method, pattern, tried) if set(self.plan.lrs) <= set(tried) else None
        if best is None:
            return None
        place = self.lrs.index(best[0])
        return best if set(self.lrs[max(0, place - 1) : place + 2]) <= set(tried) else None

    @property
    def gaps(self) -> list[str]:
        """The methods that have every learning rate of the plan, and lack runs at one that was added."""
        cells = [(m, p) for m, p in self.cells if self._best(m, p, self.plan.lrs) and not self._best(m, p, self.lrs)]
        return list(dict.fromkeys(method for method, _ in cells))

    def choose(self, method: str, pattern: str | None) -> Choice | None:
        """Return the learning rate and the setting with the best mean over the tasks' dev parts and the tuning seeds.

        Args:
            method: the method; one with distillation has the choice of that without, and the dense model's teacher.
            pattern: the pattern of the final run.

        Returns:
            None while a run is missing that the choice needs.
        """
        source = None if pattern is None else self.plan.patterns[pattern][1]
        best = self._settled(method.removesuffix(DISTILLED), source)
        if best is None:
            return None
        lr, setting = best[0], json.loads(best[1])
        if method.endswith(DISTILLED):
            teacher = self.choose("dense", None)
            return None if teacher is None else (lr, {**setting, "teacher_lr": teacher[0]})
        return lr, setting

    def runs(self, methods: Sequence[str]) -> Iterator[Spec]:
        """Yield the tuning runs whose turn it is: a method's settings first, then learning rates with the best."""
        plan = self.plan
        cells: list[tuple[float, str, str | None, str]] = []
        for method, pattern in self.cells:
            if method in methods:
                cells += [(plan.middle, method, pattern, json.dumps(setting)) for setting in settings_of(method)]
                best = self.best_setting(method, pattern)
                cells += [(lr, method, pattern, best) for lr in self.lrs if best is not None]
        for seed in plan.tuning_seeds:
            for task in plan.tasks:
                for lr, method, pattern, setting in dict.fromkeys(cells):
                    yield Spec(task, plan.layers, pattern, method, seed, lr, plan.steps, setting, "tune")


# Final runs ----------------------------------------------------------------------------------------------------------


def usual(plan: Plan, method: str) -> list[Choice]:
    """Return the (learning rate, setting) of a method in the table in which nothing is tuned."""
    setting = settings_of(method)[0]
    return [(lr, {**setting, "teacher_lr": lr} if method.endswith(DISTILLED) else setting) for lr in plan.usual_lrs]


def by_choice(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the patterns with tuning of their own, and those that take the choice of another."""
    own = tuple(pattern for pattern in plan.patterns if pattern == plan.patterns[pattern][1])
    return own, tuple(pattern for pattern in plan.patterns if pattern not in own)


def final(plan: Plan, lines: Sequence[Line]) -> Iterator[list[Spec]]:
    """Yield tuning and final runs, those that begin alike together, the most useful first; some come a second time."""
    tuning = Tuning(plan, lines)
    first, rest = plan.seeds[:FIRST_SEEDS], plan.seeds[FIRST_SEEDS:]
    own, others = by_choice(plan)
    leading, *later = plan.rounds
    yield from _runs(tuning, leading, own, (first, rest))
    # The targets that wait for the other methods compare tuned runs, and can be judged with the first seeds.
    for methods in later:
        yield from _runs(tuning, methods, own, (first,), untuned=False)
    for methods in sorted(later, key=lambda methods: methods[0].endswith(DISTILLED)):
        yield from _runs(tuning, methods, own, (rest,), untuned=False)
    yield from _runs(tuning, leading, others, (plan.seeds,), untuned=False)
    for methods in later:
        yield from _runs(tuning, methods, own, (first, rest))
    yield from _runs(tuning, plan.methods, others, (plan.seeds,))


def _runs(
    tuning: Tuning,
    methods: Sequence[str],
    patterns: Sequence[str],
    parts: Iterable[Sequence[int]],
    untuned: bool = True,
) -> Iterator[list[Spec]]:
    """Yield tuning and final runs, part by part of the seeds; without ``untuned`` those of the tuned table alone."""
    plan = tuning.plan
    cells = [(m, p) for m in methods for p in ((None,) if m == "dense" else patterns)]
    plain = [(m, p, choice) for m, p in cells for choice in usual(plan, m)] if untuned else []
    chosen = [(m, p, choice) for m, p in cells if (choice := tuning.choose(m, p)) is not None]
    for seeds in parts:
        # One call, so that tables asked for together share the first part of their runs. Nothing is chosen before the
        # tuning.
        yield from together([*_final_specs(plan, seeds, chosen), *_final_specs(plan, seeds, plain)])
        yield from together(tuning.runs(methods))


def _final_specs(plan: Plan, seeds: Sequence[int], cells: Sequence[tuple[str, str | None, Choice]]) -> Iterator[Spec]:
    """Seed by seed, so that whatever has been run can be compared; tasks innermost, for they share no teacher."""
    for seed in seeds:
        for method, pattern, (lr, setting) in cells:
            for task in plan.tasks:
                if pattern is None or seed in plan.patterns[pattern][0]:
                    yield Spec(task, plan.layers, pattern, method, seed, lr, plan.steps, json.dumps(setting), "final")


# Exploring -----------------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"prune_at": EXPLORED_AT}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "prune_at": tuple({"prune_at": share} for share in (0.6, 0.75, 0.85, 0.9)),
    "calibration": tuple({**BASE, "calibration_steps": steps} for steps in (8, 32)),
    "damping": (
        *({**BASE, "input_damping": damping} for damping in (0.001, 0.1)),
        *({**BASE, "output_damping": damping} for damping in (0.01, 1.0)),
    ),
    "rewarm": tuple({**BASE, "rewarm": share} for share in (0.3, 0.6)),
    "by way of": ({**BASE, "by_way_of": "2:4"},),
}
AT_OTHER_LENGTHS = ("prune_at", "calibration", "damping")


def explore(plan: Plan, lines: Sequence[Line]) -> Iterator[list[Spec]]:  # noqa: ARG001 - nothing is chosen here
    """Yield the runs that explore, on dev: ``prune_at`` first, then the rest, then other lengths."""
    rest = tuple(name for name in VARIANTS if name != "prune_at")
    others = [(steps, AT_OTHER_LENGTHS) for steps in plan.explore_steps]
    for steps, names in [(plan.steps, ("prune_at",)), (plan.steps, rest), *others]:
        for seed in plan.tuning_seeds:
            for lr in plan.explore_lrs:
                for task in plan.explore_tasks:
                    yield [
                        Spec(task, plan.layers, pattern, "admm", seed, lr, steps, json.dumps(setting), "explore")
                        for name in names
                        for setting in VARIANTS[name]
                        for pattern in ("1:4", "2:4")
                        if setting.get("by_way_of") != pattern
                    ]


def layers(plan: Plan, lines: Sequence[Line]) -> Iterator[list[Spec]]:  # noqa: ARG001 - nothing is chosen here
    """Yield the runs that prune one weight at a time."""
    for pattern in ("1:4", "2:4"):
        for task in plan.explore_tasks:
            for seed in plan.tuning_seeds:
                yield [Spec(task, plan.layers, pattern, "admm", seed, plan.explore_lrs[0], plan.steps, stage="layers")]


STAGES = {"final": final, "explore": explore, "layers": layers}
