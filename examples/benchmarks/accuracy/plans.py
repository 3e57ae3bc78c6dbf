"""What is run: declared grids, and the choice that dev makes in them. No file of results, no training here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from training import DISTILLED, Spec

Line = Mapping[str, Any]
TUNING_SEED = 100  # no final run has it


@dataclass(frozen=True)
class Grid:
    """What a method may tune: the learning rate for all, and settings of its own; the first setting is the usual one.

    Settings are tried at the middle learning rate, then learning rates with the best setting.
    """

    settings: tuple[dict[str, Any], ...] = ({},)


GRIDS: dict[str, Grid] = {
    "dense": Grid(),
    "asp": Grid(),
    "gradual": Grid(),
    "sr-ste": Grid(({"decay": 2e-4}, {"decay": 2e-3})),
    "pat": Grid(({"healing": 0.75}, {"healing": 0.9})),
    "admm-paper": Grid(tuple({"rho": rho} for rho in (1e-1, 1e-3, 1e-2, 1.0, 10.0))),
    "admm": Grid(),
}


@dataclass(frozen=True)
class Plan:
    """A study.

    Args:
        layers: encoder layers of the model.
        tasks: tasks of the final runs.
        tuning_tasks: tasks on whose dev parts learning rates and settings are chosen.
        patterns: patterns of the final runs.
        tuned_at: pattern -> the pattern at which it is tuned.
        methods: methods of the final runs, those with ``+kd`` included.
        distilled_at: patterns at which those with ``+kd`` are run.
        lrs: learning rates, the middle one first tried.
        seeds: seeds of the final runs.
        steps: length of tuning and final runs.
        budgets: (steps, lr) of the budget runs.
        budget_tasks: tasks of the budget runs.
        budget_seeds: seeds of the budget runs.
        variants: name -> setting of ADMMNxM, for the ablation.
        ablation_seeds: seeds of the ablation.
    """

    layers: int
    tasks: tuple[str, ...]
    tuning_tasks: tuple[str, ...]
    patterns: tuple[str, ...]
    tuned_at: Mapping[str, str]
    methods: tuple[str, ...]
    distilled_at: tuple[str, ...]
    lrs: tuple[float, float, float]
    seeds: tuple[int, ...]
    steps: int
    budgets: tuple[tuple[int, float], ...] = ()
    budget_tasks: tuple[str, ...] = ()
    budget_seeds: tuple[int, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ablation_seeds: tuple[int, ...] = ()


_CPU = Plan(
    layers=2,
    tasks=("supersense", "entailment", "polarity"),
    tuning_tasks=("supersense", "entailment"),
    patterns=("2:4", "1:4", "2:8"),
    tuned_at={"2:4": "2:4", "1:4": "1:4", "2:8": "1:4"},
    methods=("dense", "asp", "gradual", "sr-ste", "pat", "admm-paper", "admm", "admm-paper+kd", "admm+kd"),
    distilled_at=("1:4", "2:4"),
    lrs=(3e-4, 9e-4, 2.7e-3),
    seeds=(0, 1, 2, 3, 4),
    steps=200,
    budgets=tuple((steps, lr) for steps in (100, 400, 1600) for lr in (2e-5, 8e-5, 3e-4)),
    budget_tasks=("supersense",),
    budget_seeds=(0, 1),
    variants={
        "default": {},
        "magnitude only": {"saliency": "magnitude"},
        "freeze at 70 %": {"freeze_at": 140},
        "no masked phase": {"freeze_at": 200},
        "z every step": {"update_every": 1},
        "proximal": {"penalty": "proximal"},
        "gradient": {"penalty": "gradient"},
        "w stored, float32": {"state_dtype": "float32"},
        "w stored, bfloat16": {"state_dtype": "bfloat16"},
        "proximal, bfloat16": {"penalty": "proximal", "state_dtype": "bfloat16"},
        "proximal, bfloat16 at random": {
            "penalty": "proximal",
            "state_dtype": "bfloat16",
            "state_rounding": "stochastic",
        },
        "proximal, as int8": {"penalty": "proximal", "emulated_state": "int8"},
        "proximal, as float8": {"penalty": "proximal", "emulated_state": "float8"},
    },
    ablation_seeds=(0, 1, 2),
)

PLANS: dict[str, Plan] = {
    "cpu": _CPU,
    "full": Plan(
        **{
            **_CPU.__dict__,
            "layers": 6,
            "distilled_at": _CPU.patterns,
            "tasks": ("polarity", "tweets", "topics", "supersense", "entailment"),
            "steps": 400,
            "budget_tasks": ("supersense", "entailment"),
            "budget_seeds": (0, 1, 2),
            "variants": {**_CPU.variants, "freeze at 70 %": {"freeze_at": 280}, "no masked phase": {"freeze_at": 400}},
        }
    ),
    "smoke": Plan(
        layers=1,
        tasks=("polarity",),
        tuning_tasks=("polarity",),
        patterns=("2:4",),
        tuned_at={"2:4": "2:4"},
        methods=("asp", "admm"),
        distilled_at=(),
        lrs=(1e-4, 3e-4, 9e-4),
        seeds=(0,),
        steps=20,
    ),
}


def tuning(plan: Plan, lines: Iterable[Line]) -> Iterator[Spec]:
    """Yield the tuning runs whose turn it is, given what has been run: settings first, then learning rates."""
    done = list(lines)
    for method in (m for m in plan.methods if not m.endswith(DISTILLED)):
        for pattern in (None,) if method == "dense" else sorted(set(plan.tuned_at.values()), reverse=True):
            settings, middle = GRIDS[method].settings, plan.lrs[1]
            tried = [_tuning_specs(plan, method, pattern, middle, setting) for setting in settings]
            yield from (spec for specs in tried for spec in specs)
            best = choose(plan, done, method, pattern, only_lr=middle)
            if best is not None:
                for lr in plan.lrs:
                    yield from _tuning_specs(plan, method, pattern, lr, best[1])


def _tuning_specs(plan: Plan, method: str, pattern: str | None, lr: float, setting: Mapping[str, Any]) -> list[Spec]:
    return [
        Spec(task, plan.layers, pattern, method, TUNING_SEED, lr, plan.steps, json.dumps(setting), "tune")
        for task in plan.tuning_tasks
    ]


def choose(
    plan: Plan, lines: Iterable[Line], method: str, pattern: str | None, only_lr: float | None = None
) -> tuple[float, dict[str, Any]] | None:
    """Return the learning rate and setting with the best mean over the tuning tasks' dev parts.

    Args:
        plan: the study.
        lines: raw results.
        method: the method, without ``+kd``.
        pattern: at which it was tuned.
        only_lr: look at this learning rate only.

    Returns:
        None while a task lacks a run of the grid that ``only_lr`` leaves.
    """
    found: dict[tuple[float, str], dict[str, float]] = defaultdict(dict)
    for line in lines:
        mine = (line["stage"], line["method"], line["pattern"], line["steps"]) == ("tune", method, pattern, plan.steps)
        if mine and line["seed"] == TUNING_SEED and only_lr in (None, line["lr"]) and line["task"] in plan.tuning_tasks:
            found[line["lr"], json.dumps(line["setting"])][line["task"]] = line["dev"]
    grid = {(plan.lrs[1], json.dumps(setting)) for setting in GRIDS[method].settings}
    complete = {key: mean(devs.values()) for key, devs in found.items() if len(devs) == len(plan.tuning_tasks)}
    if not grid <= complete.keys():
        return None
    if only_lr is None:
        _, at_middle = max(grid, key=complete.__getitem__)
        grid |= {(lr, at_middle) for lr in plan.lrs}
        if not grid <= complete.keys():
            return None
    lr, setting = max(sorted(grid), key=complete.__getitem__)
    return lr, json.loads(setting)


class NotTunedError(Exception):
    """A final run needs a choice that the tuning runs do not yet give."""


def _chosen(plan: Plan, lines: list[Line], method: str, pattern: str | None) -> tuple[float, dict[str, Any]]:
    at = None if pattern is None else plan.tuned_at[pattern]
    choice = choose(plan, lines, method.removesuffix(DISTILLED), at)
    if choice is None:
        raise NotTunedError(f"{method} at {pattern}: its tuning runs are not complete; run the stage tune first")
    return choice


def _patterns(plan: Plan, method: str) -> tuple[str | None, ...]:
    if method == "dense":
        return (None,)
    return plan.distilled_at if method.endswith(DISTILLED) else plan.patterns


def final(plan: Plan, lines: list[Line]) -> Iterator[Spec]:
    """Yield the final runs, seed by seed, so that whatever has been run can be compared."""
    teacher_lr, _ = _chosen(plan, lines, "dense", None) if "dense" in plan.methods else (None, {})
    for seed in plan.seeds:
        for method in plan.methods:
            for pattern in _patterns(plan, method):
                lr, setting = _chosen(plan, lines, method, pattern)
                for task in plan.tasks:
                    yield Spec(
                        task,
                        plan.layers,
                        pattern,
                        method,
                        seed,
                        lr,
                        plan.steps,
                        json.dumps(setting),
                        "final",
                        teacher_lr if method.endswith(DISTILLED) else None,
                    )


def budget(plan: Plan, lines: list[Line]) -> Iterator[Spec]:  # noqa: ARG001 - nothing is chosen here
    """Yield ASP's and ADMMNxM's runs at other lengths and learning rates, nothing tuned."""
    for seed in plan.budget_seeds:
        for steps, lr in plan.budgets:
            for pattern in ("1:4",):
                for task in plan.budget_tasks:
                    for method in ("asp", "admm"):
                        yield Spec(task, plan.layers, pattern, method, seed, lr, steps, stage="budget")


def ablation(plan: Plan, lines: list[Line]) -> Iterator[Spec]:
    """Yield ADMMNxM with one thing changed, on dev."""
    for seed in plan.ablation_seeds:
        for name, setting in plan.variants.items():
            for task in plan.tuning_tasks:
                lr, _ = _chosen(plan, lines, "admm", "1:4")
                setting_ = json.dumps({**setting, "variant": name})
                yield Spec(task, plan.layers, "1:4", "admm", seed, lr, plan.steps, setting_, "ablation")


STAGES = {"tune": tuning, "final": final, "budget": budget, "ablation": ablation}
