"""The methods that the study compares, each behind the same four functions.

Every method gets the same AdamW, batches, learning-rate schedule and number of steps. Its ``setting`` holds what it may
tune; plans.py says which values were tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, ConvergenceWarning, Pattern, keep_mask

Setting = Mapping[str, Any]


@dataclass
class Figures:
    """What a method says of its run; None where it has no such figure."""

    primal_residual: float | None = None
    trace: dict[str, list[Any]] = field(default_factory=lambda: {"step": [], "primal_residual": [], "churn": []})


class Method(Protocol):
    """One way to train and prune."""

    @property
    def optimizer(self) -> Optimizer:
        """What an LR scheduler is built on."""

    def step(self, number: int) -> None:
        """Do step ``number``, counted from 1, with the gradients in place."""

    def at_projection(self, number: int) -> Callable[[], Any] | None:
        """Return a context manager that lets the model hold what a projection after step ``number`` would leave, if
        that is when the method projects for good; None otherwise."""

    def finish(self) -> Figures:
        """Leave the weights sparse."""


@dataclass(frozen=True)
class Job:
    """What a method is built from.

    Args:
        inner: AdamW over all trainable parameters.
        named: the weights to prune, name -> parameter, all grouped along their last dimension.
        pattern: None for the dense run.
        steps: length of the run.
        setting: the method's own hyperparameters.
        traced: whether residual and churn are recorded on the way, which takes time.
    """

    inner: Optimizer
    named: dict[str, Tensor]
    pattern: Pattern | None
    steps: int
    setting: Setting
    traced: bool = True

    @property
    def weights(self) -> list[Tensor]:
        return list(self.named.values())

    @property
    def target(self) -> Pattern:
        assert self.pattern is not None, "a method that prunes needs a pattern"
        return self.pattern


class Dense:
    """Fine-tuning without pruning."""

    def __init__(self, job: Job) -> None:
        self.optimizer: Optimizer = job.inner

    def step(self, number: int) -> None:
        self.optimizer.step()

    def at_projection(self, number: int) -> Callable[[], Any] | None:
        return None

    def finish(self) -> Figures:
        return Figures()


class Masked(Dense):
    """A step under masks: no gradient reaches a pruned weight, and it stays zero."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.weights, self.pattern = job.weights, job.target
        self.masks = [torch.ones_like(w, dtype=torch.bool) for w in self.weights]

    @torch.no_grad()
    def apply_masks(self) -> None:
        for w, mask in zip(self.weights, self.masks, strict=True):
            w.mul_(mask)

    @torch.no_grad()
    def step(self, number: int) -> None:
        for w, mask in zip(self.weights, self.masks, strict=True):
            if w.grad is not None:
                w.grad.mul_(mask)
        self.optimizer.step()
        self.apply_masks()


class OneShot(Masked):
    """ASP: one-shot magnitude pruning before the first step, then masked fine-tuning (Mishra et al. 2021)."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masks = [keep_mask(w.detach(), self.pattern, -1) for w in self.weights]
        self.apply_masks()


class Gradual(Masked):
    """Gradual magnitude pruning (Zhu, Gupta 2017) toward the pattern.

    Of the entries that the pattern would prune now, the smallest go first; the share of all zeros follows the cubic
    schedule until half of the run, moves every ten steps, and what is pruned stays so.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.start, self.stop = job.steps // 20, max(1, job.steps // 2)
        self.every = min(10, max(1, (self.stop - self.start) // 10))

    @torch.no_grad()
    def step(self, number: int) -> None:
        super().step(number)
        due = number == self.stop or (number - self.start) % self.every == 0
        if self.start <= number <= self.stop and due:
            progress = (number - self.start) / max(1, self.stop - self.start)
            share = self.pattern.sparsity * (1 - (1 - progress) ** 3)
            for w, mask in zip(self.weights, self.masks, strict=True):
                candidates = ~keep_mask(w, self.pattern, -1)
                count = candidates.sum() if number == self.stop else torch.as_tensor(round(share * w.numel()))
                rank = torch.where(candidates, w.abs(), float("inf")).flatten().argsort()
                mask.view(-1)[rank[: int(count)]] = False
            self.apply_masks()

    def finish(self) -> Figures:
        self.masks = [keep_mask(w.detach(), self.pattern, -1) for w in self.weights]
        self.apply_masks()
        return Figures()


class SRSTE(Dense):
    """SR-STE (Zhou et al. 2021): the model always runs on the projected weights, the gradient passes straight through
    to the dense ones, and those off the mask decay by ``decay`` times their value in the gradient."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.weights, self.pattern, self.decay = job.weights, job.target, float(job.setting["decay"])
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

        pruned = {id(w) for w in job.weights}
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
        # LR schedulers refuse PAT's class unless it is given the base optimizer's groups, which it shares.
        self.optimizer: Optimizer = torch.optim.AdamW(groups)
        self.pat = PruneOptimizer(
            self.optimizer,
            warmup_steps=max(1, job.steps // 20),
            healing_start_step=int(float(job.setting["healing"]) * job.steps),
        )

    def step(self, number: int) -> None:
        self.pat.step()


class ADMM:
    """ADMMNxM with its defaults, or in the paper's form with ``rho`` from the setting."""

    def __init__(self, job: Job, *, paper: bool) -> None:
        self.named = job.named
        build: Callable[..., ADMMNxM] = ADMMNxM.paper if paper else ADMMNxM
        self.optimizer: ADMMNxM = build(
            job.inner,
            job.named.items(),
            select=lambda name, _: job.target if name in job.named else None,
            total_steps=job.steps,
            **_arguments(job.setting),
        )
        self.narrow = NARROW.get(job.setting.get("emulated_state"))
        self.figures = Figures()
        self.every = max(1, job.steps // 40) if job.traced else 0

    def step(self, number: int) -> None:
        self.optimizer.step()
        if self.narrow is not None and not self.optimizer.frozen:
            self._narrow_states(self.narrow)
        if self.every and number % self.every == 0 and not self.optimizer.frozen:
            now = self.optimizer.residuals()
            churn = now.mask_churn if now.mask_churn == now.mask_churn else None
            for key, value in (("step", number), ("primal_residual", now.primal), ("churn", churn)):
                self.figures.trace[key].append(value)

    @torch.no_grad()
    def _narrow_states(self, narrow: Callable[[Tensor], Tensor]) -> None:
        """Round every v as a narrower dtype would hold it: a first, then its mask."""
        for weight in self.optimizer.selection:
            v = self.optimizer.state[self.named[weight.name]]["admm_consensus"]
            a = narrow(torch.where(keep_mask(v, weight.pattern, weight.dim), v, -v))
            v.copy_(torch.where(keep_mask(a, weight.pattern, weight.dim), a, -a))

    def at_projection(self, number: int) -> Callable[[], Any] | None:
        freeze_at = self.optimizer.plan.freeze_at
        return self.optimizer.projected if freeze_at is not None and number == freeze_at - 1 else None

    def finish(self) -> Figures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the study records the figures of every run
            self.optimizer.finalize()
        self.figures.primal_residual = float(self.optimizer.param_groups[0]["admm_freeze_residual"])
        return self.figures


def _arguments(setting: Setting) -> dict[str, Any]:
    """Arguments of ADMMNxM from what a line of raw results can hold."""
    given = {key: value for key, value in setting.items() if key not in ("variant", "emulated_state")}
    if "state_dtype" in given:
        given["state_dtype"] = getattr(torch, given["state_dtype"])
    return given


def _as_int8(a: Tensor) -> Tensor:
    """Round as int8 holds it, with a float32 scale for 64 entries of a row."""
    blocks = a.view(-1, 64)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((blocks / scale).round().clamp(-127, 127) * scale).view(a.shape)


def _as_float8(a: Tensor) -> Tensor:
    """Round as float8 (e4m3) holds it, with a float32 scale for 64 entries of a row."""
    blocks = a.view(-1, 64)
    scale = (blocks.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
    return ((blocks / scale).to(torch.float8_e4m3fn).to(a.dtype) * scale).view(a.shape)


NARROW: dict[Any, Callable[[Tensor], Tensor]] = {"int8": _as_int8, "float8": _as_float8}
"""Dtypes that ADMMNxM does not offer for its state, as they would round it."""


METHODS: dict[str, Callable[[Job], Method]] = {
    "dense": Dense,
    "asp": OneShot,
    "gradual": Gradual,
    "sr-ste": SRSTE,
    "pat": PAT,
    "admm-paper": lambda job: ADMM(job, paper=True),
    "admm": lambda job: ADMM(job, paper=False),
}
