"""The methods that the study compares, each behind the same two functions.

Every method gets the same AdamW, batches, learning rates and number of steps. Its ``setting`` holds what it may tune;
plans.py says which values are tried.
"""

from __future__ import annotations

import functools
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, ConvergenceWarning, Pattern, keep_mask, solve
from admm_nxm.solver import model_error
from admm_nxm.statistics import Moments, Statistics

sys.path.append(str(Path(__file__).resolve().parents[1]))
from sparsegpt import sparsegpt  # type: ignore[import-not-found,unused-ignore]

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a method is built from.

    Args:
        inner: AdamW over all trainable parameters.
        model: the model.
        modules: name of a weight to prune -> the module that has it; all are grouped along their inputs.
        pattern: None for the dense run.
        steps: length of the run.
        done: steps that were already done by ``inner`` alone.
        setting: the method's own hyperparameters.
    """

    inner: Optimizer
    model: nn.Module
    modules: Mapping[str, nn.Module]
    pattern: Pattern | None
    steps: int
    done: int
    setting: Setting

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to prune, by name."""
        return {name: weight_of(module) for name, module in self.modules.items()}

    @property
    def target(self) -> Pattern:
        """The pattern, of a method that prunes."""
        assert self.pattern is not None, "a method that prunes needs a pattern"
        return self.pattern


def weight_of(module: nn.Module) -> Tensor:
    """Return a module's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


class Method(Protocol):
    """One way to train and prune."""

    @property
    def optimizer(self) -> Optimizer:
        """Whose groups hold the learning rates."""

    def step(self, number: int) -> None:
        """Do step ``number``, counted from 1, with the gradients in place."""

    def finish(self) -> float | None:
        """Leave the weights sparse; return the mean model error over the weights, if the method has one."""


class Dense:
    """Fine-tuning without pruning."""

    def __init__(self, job: Job) -> None:
        self.optimizer: Optimizer = job.inner

    def step(self, number: int) -> None:
        self.optimizer.step()

    def finish(self) -> float | None:
        return None


class Masked(Dense):
    """A step under masks: no gradient reaches a pruned weight, and it stays zero."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.weights, self.pattern = job.weights, job.target
        self.masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def apply_masks(self) -> None:
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    @torch.no_grad()
    def step(self, number: int) -> None:
        for name, mask in self.masks.items():
            grad = self.weights[name].grad
            if grad is not None:
                grad.mul_(mask)
        self.optimizer.step()
        self.apply_masks()


class OneShot(Masked):
    """ASP: one-shot magnitude pruning before the first step, then masked fine-tuning (Mishra et al. 2021)."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masks = {name: keep_mask(w.detach(), self.pattern, -1) for name, w in self.weights.items()}
        self.apply_masks()


class Gradual(Masked):
    """Gradual magnitude pruning (Zhu, Gupta 2017) toward the pattern, done at the share ``stop`` of the run.

    Of the entries that the pattern would prune now, the smallest go first; the share of all zeros follows the cubic
    schedule, moves every ten steps, and what is pruned stays so.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.start, self.stop = job.steps // 20, max(1, round(float(job.setting["stop"]) * job.steps))
        self.every = min(10, max(1, (self.stop - self.start) // 10))

    @torch.no_grad()
    def step(self, number: int) -> None:
        super().step(number)
        due = number == self.stop or (number - self.start) % self.every == 0
        if self.start <= number <= self.stop and due:
            progress = (number - self.start) / max(1, self.stop - self.start)
            share = self.pattern.sparsity * (1 - (1 - progress) ** 3)
            for name, w in self.weights.items():
                candidates = ~keep_mask(w, self.pattern, -1)
                count = candidates.sum() if number == self.stop else torch.as_tensor(round(share * w.numel()))
                rank = torch.where(candidates, w.abs(), float("inf")).flatten().argsort()
                self.masks[name].view(-1)[rank[: int(count)]] = False
            self.apply_masks()

    def finish(self) -> float | None:
        self.masks = {name: keep_mask(w.detach(), self.pattern, -1) for name, w in self.weights.items()}
        self.apply_masks()
        return None


class SRSTE(Dense):
    """SR-STE (Zhou et al. 2021): the model always runs on the projected weights, the gradient passes straight through
    to the dense ones, and those off the mask decay by ``decay`` times their value in the gradient."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.weights, self.pattern = list(job.weights.values()), job.target
        self.decay = float(job.setting["decay"])
        self.dense = [w.detach().clone() for w in self.weights]
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        self.masks = [keep_mask(dense, self.pattern, -1) for dense in self.dense]
        for w, dense, mask in zip(self.weights, self.dense, self.masks, strict=True):
            torch.mul(dense, mask, out=w)

    @torch.no_grad()
    def step(self, number: int) -> None:
        for w, dense, mask in zip(self.weights, self.dense, self.masks, strict=True):
            w.copy_(dense)
            if w.grad is not None:
                w.grad.add_(dense * ~mask, alpha=self.decay)
        self.optimizer.step()
        for w, dense in zip(self.weights, self.dense, strict=True):
            dense.copy_(w)
        self._project()


class PAT(Dense):
    """torchao's PruneOptimizer with its N:M constraint: the proximal map of the constraint after every step on a dense
    copy, a dense warm-up of 5 % and, from the share ``healing`` of the run, fine-tuning of what is left."""

    def __init__(self, job: Job) -> None:
        from torchao.prototype.pat.optim import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
            PruneOptimizer,
        )

        pruned = {id(w) for w in job.weights.values()}
        groups = []
        for group in job.inner.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            chosen = [p for p in group["params"] if id(p) in pruned]
            rest = [p for p in group["params"] if id(p) not in pruned]
            constraint = {
                "prox_type": "NMSparseConstraint",
                "group_type": "KElementGrouper",
                "k": job.target.group,
                "n_nonzero": job.target.keep,
            }
            groups += [{**options, "params": chosen, **constraint}] if chosen else []
            groups += [{**options, "params": rest}] if rest else []
        self.optimizer: Optimizer = torch.optim.AdamW(groups)
        self.pat = PruneOptimizer(
            self.optimizer,
            warmup_steps=max(1, job.steps // 20),
            healing_start_step=int(float(job.setting["healing"]) * job.steps),
        )

    def step(self, number: int) -> None:
        self.pat.step()


class Window(NamedTuple):
    """The steps whose batches calibrate a solve: after ``start``, up to ``prune_at``, after which the solve stands."""

    start: int
    prune_at: int
    pattern: Pattern


@functools.cache
def package_defaults(steps: int) -> tuple[int, int]:
    """Return ``prune_at`` and ``calibration_steps`` that ADMMNxM takes for a run of so many steps."""
    # No random number is drawn: the seed of a run is set by now.
    net: nn.Module = nn.utils.skip_init(nn.Linear, 4, 4)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs are warned of where they are trained
        optimizer = ADMMNxM(
            torch.optim.SGD(net.parameters(), lr=0.0), net, pattern="2:4", total_steps=steps, select=lambda *_: "2:4"
        )
    return optimizer.prune_at, optimizer.calibration_steps


def windows(pattern: Pattern, setting: Setting, steps: int) -> list[Window]:
    """Return when a method of the kind ``late`` calibrates and solves.

    Args:
        pattern: the pattern in the end.
        setting: may hold ``prune_at`` (share of the run), ``calibration_steps``, and ``by_way_of`` (a pattern that a
            first solve reaches 15 % of the run earlier).
        steps: length of the run.

    Returns:
        One window, or two.
    """
    prune_at, calibration = package_defaults(steps)
    prune_at = round(setting["prune_at"] * steps) if "prune_at" in setting else prune_at
    calibration = int(setting.get("calibration_steps", calibration))
    ends = [(prune_at, pattern)]
    if "by_way_of" in setting:
        ends.insert(0, (prune_at - round(0.15 * steps), Pattern.parse(setting["by_way_of"])))
    return [Window(max(0, at - calibration), at, to) for at, to in ends]


Prune = Callable[[Tensor, Pattern, Moments], tuple[Tensor, Tensor]]
"""(weight, pattern, moments) -> the pruned weight and its mask."""


class Late(Masked):
    """Dense training, one pruning of all weights from the moments of ordinary batches, then masked fine-tuning."""

    def __init__(self, job: Job, prune: Prune) -> None:
        super().__init__(job)
        self.modules, self.prune = job.modules, prune
        self.windows = windows(job.target, job.setting, job.steps)
        self.errors: list[float] = []
        self._observe_from(job.done)

    def _observe_from(self, number: int) -> None:
        if self.windows and number == self.windows[0].start:
            self.statistics = Statistics(self.modules)
            self.statistics.attach()

    def step(self, number: int) -> None:
        super().step(number)
        if self.windows and number == self.windows[0].prune_at:
            self.statistics.detach()
            self._prune(self.windows.pop(0).pattern)
        self._observe_from(number)

    @torch.no_grad()
    def _prune(self, pattern: Pattern) -> None:
        for name, w in self.weights.items():
            moments = self.statistics.moments[name]
            pruned, self.masks[name] = self.prune(w, pattern, moments)
            self.errors.append(model_error(w, pruned, moments.inputs, moments.outputs))
            w.copy_(pruned)

    def finish(self) -> float | None:
        return statistics.fmean(self.errors[-len(self.weights) :])


def magnitude(weight: Tensor, pattern: Pattern, moments: Moments) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Keep the largest."""
    mask = keep_mask(weight, pattern, -1)
    return weight * mask, mask


def by_sparsegpt(weight: Tensor, pattern: Pattern, moments: Moments) -> tuple[Tensor, Tensor]:
    """Apply SparseGPT's update."""
    assert moments.inputs is not None, "statistics gather A unless told not to"
    pruned, mask = sparsegpt(weight, moments.inputs, pattern)
    return pruned, mask


def by_solve(
    weight: Tensor, pattern: Pattern, moments: Moments, *, outputs: bool = True, **options: Any
) -> tuple[Tensor, Tensor]:
    """Solve the layer problem with A and, if ``outputs``, G."""
    solved = solve(weight, pattern, moments.inputs, moments.outputs if outputs else None, **options)
    return solved.weight, solved.mask


SOLVER_OPTIONS = {"input_damping", "output_damping"}
NOT_IN_THE_PACKAGE = {*SOLVER_OPTIONS, "by_way_of"}


class ADMM:
    """ADMMNxM with its defaults, or in the paper's form with ``rho`` from the setting."""

    def __init__(self, job: Job, *, paper: bool) -> None:
        left = job.steps - job.done
        arguments: dict[str, Any] = {
            "pattern": job.target,
            "total_steps": left,
            "select": lambda name, _: job.target if name in job.modules else None,
        }
        if paper:
            self.optimizer = ADMMNxM.paper(job.inner, job.model, rho=float(job.setting["rho"]), **arguments)
        else:
            (window,) = windows(job.target, job.setting, job.steps)
            self.optimizer = ADMMNxM(
                job.inner,
                job.model,
                prune_at=window.prune_at - job.done,
                calibration_steps=window.prune_at - window.start,
                **arguments,
            )

    def step(self, number: int) -> None:
        self.optimizer.step()

    def finish(self) -> float | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the paper's form does not converge in so few steps
            self.optimizer.finalize()
        return self.optimizer.figures().model_error


def admm(job: Job) -> Method:
    """Build ADMMNxM, or what does the same by hand where a setting asks for what the package has no argument for."""
    if NOT_IN_THE_PACKAGE & set(job.setting):
        options: dict[str, Any] = {key: value for key, value in job.setting.items() if key in SOLVER_OPTIONS}
        return Late(job, functools.partial(by_solve, **options))
    return ADMM(job, paper=False)


METHODS: dict[str, Callable[[Job], Method]] = {
    "dense": Dense,
    "asp": OneShot,
    "asp-late": lambda job: Late(job, magnitude),
    "sparsegpt-late": lambda job: Late(job, by_sparsegpt),
    "gradual": Gradual,
    "sr-ste": SRSTE,
    "pat": PAT,
    "admm-paper": lambda job: ADMM(job, paper=True),
    "admm-inputs": lambda job: Late(job, functools.partial(by_solve, outputs=False)),
    "admm": admm,
}
LATE = ("asp-late", "sparsegpt-late", "admm-inputs", "admm")


def dense_steps(method: str, pattern: Pattern | None, setting: Setting, steps: int) -> int:
    """Return how many steps of a run are those of the dense run, bit for bit.

    Args:
        method: a key of METHODS.
        pattern: None for dense.
        setting: the method's own hyperparameters.
        steps: length of the run.

    Returns:
        The number of steps; all of them for ``dense``.
    """
    if pattern is None:
        return steps
    return windows(pattern, setting, steps)[0].start if method in LATE else 0
