"""The exact w-step in the life of a run: calibration window by window, the solve, and frozen masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .diagnosis import Ending, diagnose
from .projection import keep_mask
from .run import Moving, Run, check_finite, check_pruned
from .schedules import Timeline
from .sharding import average, part_of, rank_and_world
from .solving import solutions
from .statistics import Statistics
from .weights import MASK, Weight

__all__ = ["ExactStep"]


class ExactStep:
    """Solves the layer problems in closed form, once."""

    name: Literal["exact"] = "exact"

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    @property
    def prune_at(self) -> int:
        """The step after which the last solve stands."""
        return self.timeline.prune_at

    @property
    def windows(self) -> int:
        """Number of windows of weights, which are solved one after the other."""
        return self.timeline.windows

    def phase(self, run: Run) -> str:
        """Return the name of the phase."""
        if run.progress.frozen:
            return "frozen"
        return "dense" if run.progress.step < self.timeline.start else "calibration"

    def begin(self, run: Run, statistics: Mapping[str, Any] | None = None) -> None:
        """Start a run, or go on with one that was loaded: put the hooks on if calibration is due."""
        progress = run.progress
        if self.windows == 0 and not progress.frozen:
            check_pruned(run)
            self._prune_by_magnitude(run, list(run.weights))  # for zeros without a sign, and in second sets too
            progress.pruned_at = progress.step
        progress.windows = self.windows
        if progress.step < self.timeline.start:
            progress.calibrated = 0  # the run was made longer: its calibration comes later
        if progress.calibrated and statistics is None:
            warnings.warn(
                f"the checkpoint was made inside a calibration, after {progress.calibrated} of its steps, and does not "
                "carry the statistics (torch.distributed.checkpoint leaves them out): the calibration of this window "
                "begins again, and the solve comes that much later",
                stacklevel=3,
            )
            progress.calibrated = 0
        self._gather_if_due(run)
        if run.statistics is not None and statistics is not None:
            run.statistics.load_state_dict(statistics)

    def before(self, run: Run) -> Moving:  # noqa: ARG002
        """Do nothing: until the solve, a step is the inner optimizer's own."""
        return []

    def after(self, run: Run, moving: Moving) -> None:
        """Do nothing."""

    def advance(self, run: Run, moving: Moving) -> None:  # noqa: ARG002 - all weights are calibrated alike
        """Count a calibration step, and solve when a window is full."""
        progress = run.progress
        if progress.frozen:
            return
        if progress.step > self.timeline.start:
            progress.calibrated += 1
            if run.statistics is not None:
                run.statistics.reduce()
                self._check_hooks_fire(run)
            if progress.calibrated >= self.timeline.calibration_steps:
                self._solve(run, run.weights.of_window(progress.windows_solved))
                self._close_window(run)
        self._gather_if_due(run)

    def finish(self, run: Run) -> str | None:
        """Prune what the run has not pruned; return what there is to say about it."""
        progress = run.progress
        if progress.frozen:
            return None
        waiting = [weight for weight in run.weights if not run.is_pruned(weight)]
        if run.statistics is not None:
            run.statistics.reduce()
        solvable = [weight for weight in waiting if weight.modules and self._unusable(run, weight) is None]
        rest = [weight for weight in waiting if weight not in solvable]
        ending = Ending(
            progress.step,
            self.timeline.prune_at,
            progress.calibrated,
            self.timeline.calibration_steps,
            by_magnitude=sum(bool(weight.modules) for weight in rest),
            solved=len(solvable),
        )
        if solvable:
            self._solve(run, solvable)
        self._prune_by_magnitude(run, rest)
        run.stop_gathering()
        progress.windows_solved = self.timeline.windows
        progress.pruned_at = progress.step
        return diagnose(ending)

    def verdict(self, run: Run) -> str | None:  # noqa: ARG002
        """Return None: a run that has not come to its solve is dense, and nobody takes it for more."""
        return None

    def state(self, run: Run, weight: Weight) -> dict[str, Tensor]:
        """Return what is to lie beside the inner optimizer's state of a weight."""
        return {MASK: run.mask(weight)}

    def check_resume(self, run: Run, counters: Mapping[str, int | float], statistics: Mapping[str, Any] | None) -> None:
        """Refuse a checkpoint with windows that are cut otherwise, with statistics that do not fit, or without pruned
        weights where this run begins with them."""
        if counters["admm_pruned_at"] >= 0:
            return
        under_way = counters["admm_calibrated"] or counters["admm_windows_solved"]
        if under_way and counters["admm_windows"] != self.windows:
            raise ValueError(
                f"the checkpoint was made inside a calibration with {counters['admm_windows']} windows, and here are "
                f"{self.windows}; build ADMMNxM with the statistics_memory of the checkpoint's run"
            )
        if self.windows == 0 and counters["admm_step"] > 0:
            raise ValueError(
                f"the checkpoint is from step {counters['admm_step']} of a run that had not pruned yet, and prune_at=0 "
                "begins with pruned weights; give the prune_at of the checkpoint's run"
            )
        gatherer = self._gatherer(run, int(counters["admm_windows_solved"]))
        if statistics is not None and gatherer is not None:
            gatherer.check(statistics)

    def mask(self, run: Run, weight: Weight) -> Tensor:
        """Return the mask in force."""
        return run.mask(weight)

    def auxiliary(self, run: Run, weight: Weight) -> Tensor:
        """Return z: the pruned weight, or before the solve its projection."""
        return self._projected(run, weight)[0]

    target = auxiliary  # without statistics, pruning is by magnitude

    def dual(self, run: Run, weight: Weight) -> Tensor:  # noqa: ARG002
        """Return zeros: u lives within the solve."""
        return torch.zeros_like(weight.w)

    def _projected(self, run: Run, weight: Weight) -> tuple[Tensor, Tensor]:
        w = weight.w
        mask = weight.mask(run.inner) if run.is_pruned(weight) else keep_mask(w, weight.spec.pattern, weight.spec.dim)
        return torch.where(mask, w, torch.zeros_like(w)), mask

    def _gather_if_due(self, run: Run) -> None:
        progress = run.progress
        if progress.frozen or run.statistics is not None or progress.step < self.timeline.start:
            return
        run.statistics = self._gatherer(run, progress.windows_solved)
        if run.statistics is not None:
            run.statistics.attach()

    def _gatherer(self, run: Run, window: int) -> Statistics | None:
        modules = {weight.name: weight.modules for weight in run.weights.of_window(window) if weight.modules}
        return Statistics(modules) if modules else None

    def _check_hooks_fire(self, run: Run) -> None:
        assert run.statistics is not None
        moments = run.statistics.moments
        # Several processes have added up by now, which makes a zero of what nobody has seen.
        several = rank_and_world()[1] > 1 and run.progress.calibrated == 1
        if not moments or (several and not any(int(one.tokens) for one in moments.values())):
            raise ValueError(
                f"calibration step {run.progress.calibrated} has gathered nothing: no selected module saw a training "
                "pass through its own forward() and backward(). Likely cause: what is trained is a copy of the model, "
                "a graph of it that was recorded earlier (torch.export, CUDA graphs), or reentrant checkpointing of "
                "inputs without gradients. Give ADMMNxM the model that "
                "is trained, and record no graph before prune_at, or use ADMMNxM.paper(...)"
            )

    def _close_window(self, run: Run) -> None:
        run.stop_gathering()
        run.progress.calibrated = 0
        run.progress.windows_solved += 1
        if run.progress.windows_solved == self.timeline.windows:
            run.progress.pruned_at = run.progress.step

    def _solve(self, run: Run, weights: Sequence[Weight]) -> None:
        """Solve the layer problems of some weights; all or none."""
        for weight in weights:
            problem = self._unusable(run, weight) if weight.modules else None
            if problem is not None:
                raise ValueError(
                    f"weight {weight.name!r} has no usable statistics at the solve: {problem}. Nothing was changed, "
                    "and the next step() gathers on and tries again"
                )
        for weight in weights:
            average(weight.w, weight.param)
        check_finite(run, weights)
        moments = {} if run.statistics is None else run.statistics.moments
        solved = list(solutions(weights, moments))
        for weight, each in zip(weights, solved, strict=True):
            weight.replace_value(run.inner, part_of(each.weight, weight.param), part_of(each.mask, weight.param))
            if weight.modules:
                run.model_errors[weight.name] = each.error

    def _prune_by_magnitude(self, run: Run, weights: Sequence[Weight]) -> None:
        check_finite(run, weights)
        for weight in weights:
            z, mask = self._projected(run, weight)
            weight.replace_value(run.inner, z, mask)

    def _unusable(self, run: Run, weight: Weight) -> str | None:
        """Return why a weight cannot be solved with what was gathered, and what to do about it; None if it can."""
        steps = run.progress.calibrated
        seen = None if run.statistics is None else run.statistics.moments.get(weight.name)
        if seen is not None and 2 * int(seen.dropped) > int(seen.passes):
            return (
                f"{int(seen.dropped)} of {int(seen.passes)} passes through its module had infinite or NaN values; "
                "lower the learning rate, or train in bfloat16 instead of float16"
            )
        if seen is None or int(seen.tokens) == 0:
            return (
                f"its module saw no token with a gradient in {steps} calibration steps; let it take part in training "
                "(an expert without tokens needs more calibration_steps), or call finalize(): it prunes it by magnitude"
            )
        return None
