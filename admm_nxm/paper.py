"""The w-step of the paper in the life of a run: the inner optimizer's own steps on the penalised loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from . import consensus as admm
from .diagnosis import PaperEnding, diagnose_paper
from .projection import keep_mask, project
from .residuals import ratio
from .run import Moving, Run, check_finite, check_pruned
from .schedules import Plan, Update, check_update, next_rho
from .sharding import average, reduce_sums
from .weights import CONSENSUS, MASK, Weight

__all__ = ["PenaltyStep"]


class PenaltyStep:
    """Adds ``rho (w - v)`` to the gradient, moves z and u when they are due, and projects at the end.

    Source: NxMTransformer (arXiv 2110.15766), algorithm 1.
    """

    name: Literal["optimizer"] = "optimizer"
    windows = 0

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def prune_at(self) -> int:
        """The step after which the mask freezes."""
        return self.plan.prune_at

    def phase(self, run: Run) -> str:
        """Return the name of the phase."""
        return "frozen" if run.progress.frozen else "admm"

    def begin(self, run: Run, statistics: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002 - it gathers none
        """Start a run, or go on with one that was loaded."""
        if self.plan.prune_at == 0 and not run.progress.frozen:
            check_pruned(run)
            self._freeze(run)
        if run.progress.step == 0 and not run.progress.frozen:
            run.progress.rho = next_rho(self.plan, 0, 0.0, False)

    def before(self, run: Run) -> Moving:
        """Add the penalty to the gradients; return the weights that have one, each with its v."""
        if run.progress.frozen:
            return []
        first = run.progress.step == 0  # weights may have been loaded since a trial step made v
        moving: Moving = []
        for weight in run.weights:
            if weight.gradient is not None:
                v = None if first else weight.stored(run.inner, CONSENSUS)
                moving.append((weight, _initial(weight) if v is None else v))
        rho = run.progress.rho
        for maximize in (False, True) if rho > 0 else ():
            alike = [(weight, v) for weight, v in moving if weight.maximize == maximize]
            admm.add_penalty(
                [weight.gradient for weight, _ in alike if weight.gradient is not None],
                [weight.w for weight, _ in alike],
                [v for _, v in alike],
                -rho if maximize else rho,
            )
        return moving

    def after(self, run: Run, moving: Moving) -> None:
        """Put v beside the state that the inner optimizer has created by now."""
        for weight, v in moving:
            if weight.stored(run.inner, CONSENSUS) is not v:
                weight.store(run.inner, CONSENSUS, v)

    def advance(self, run: Run, moving: Moving) -> None:
        """Do the z- and u-steps that are due, and freeze at the end."""
        progress = run.progress
        if progress.frozen:
            return
        update = self.plan.updates(progress.step)
        check_update(update, progress.step)
        if update is not Update.NONE:
            self._move(run, moving, update is Update.AUXILIARY_AND_DUAL)
        if progress.step >= self.plan.prune_at:
            for weight in run.weights:
                average(weight.w, weight.param)
                average(self._consensus(run, weight), weight.param)
            self._freeze(run)

    def finish(self, run: Run) -> str | None:
        """Project if the run has not; return what there is to say about the projection, once."""
        if not run.progress.frozen:
            self._freeze(run)
        return self._verdict(run, everywhere=True)

    def verdict(self, run: Run) -> str | None:
        """Return, once, what there is to say about the freeze on this rank."""
        return None if run.announced else self._verdict(run, everywhere=False)

    def _verdict(self, run: Run, *, everywhere: bool) -> str | None:
        if run.announced and run.freeze_sums is None:
            return None
        ending = self._ending(run, everywhere=everywhere)
        run.announced = ending is not None
        return None if ending is None else diagnose_paper(ending)

    def state(self, run: Run, weight: Weight) -> dict[str, Tensor]:
        """Return what is to lie beside the inner optimizer's state of a weight."""
        return {MASK: run.mask(weight), CONSENSUS: self._consensus(run, weight)}

    def check_resume(
        self,
        run: Run,  # noqa: ARG002
        counters: Mapping[str, int | float],
        statistics: Mapping[str, Any] | None,  # noqa: ARG002
    ) -> None:
        """Refuse a checkpoint whose rho would fall."""
        step, rho = int(counters["admm_step"]), counters["admm_rho"]
        if counters["admm_pruned_at"] < 0 and counters["admm_dual_in_use"] and self.plan.rho(step) < rho:
            raise ValueError(
                f"the checkpoint has rho = {rho:.4g} at step {step} with the dual in use, and the schedule built here "
                f"goes on from {self.plan.rho(step):.4g}; rho may not fall then. Build ADMMNxM with the rho schedule "
                "of the checkpoint's run"
            )

    def mask(self, run: Run, weight: Weight) -> Tensor:
        """Return the mask of z."""
        if run.progress.frozen:
            return weight.mask(run.inner)
        return keep_mask(self._consensus(run, weight), weight.spec.pattern, weight.spec.dim)

    def auxiliary(self, run: Run, weight: Weight) -> Tensor:
        """Return z."""
        if run.progress.frozen:
            return torch.where(weight.mask(run.inner), weight.w, torch.zeros_like(weight.w))
        return project(self._consensus(run, weight), weight.spec.pattern, weight.spec.dim)

    def target(self, run: Run, weight: Weight) -> Tensor:
        """Return P(w + u)."""
        return self.auxiliary(run, weight) if run.progress.frozen else self._target(run, weight)[0]

    def _target(self, run: Run, weight: Weight) -> tuple[Tensor, Tensor]:
        return admm.projected(weight.w, self._consensus(run, weight), weight.spec.pattern, weight.spec.dim)

    def dual(self, run: Run, weight: Weight) -> Tensor:
        """Return u."""
        if run.progress.frozen:
            return torch.zeros_like(weight.w)
        return admm.dual(self._consensus(run, weight), weight.spec.pattern, weight.spec.dim)

    def _consensus(self, run: Run, weight: Weight) -> Tensor:
        v = weight.stored(run.inner, CONSENSUS)
        # A weight that never had a gradient has not moved since the start.
        return _initial(weight) if v is None else v

    def _move(self, run: Run, moving: Moving, with_dual: bool) -> None:
        # Only weights that had their w-step: for one that stands still, u would grow by w at each update.
        progress = run.progress
        in_use = bool(progress.dual_in_use) or with_dual
        old = progress.rho
        new = next_rho(self.plan, progress.step, old, in_use)
        # The unscaled dual rho * u stays what it is when rho rises (Boyd et al. 2011, section 3.4.1).
        scale = old / new if old > 0 and new > 0 else 1.0
        moved = set()
        for weight, v in moving:
            moved.add(weight.name)
            run.movement[weight.name] = admm.advance(
                weight.w, v, weight.spec.pattern, weight.spec.dim, with_dual=with_dual, dual_scale=scale
            )
        for weight in run.weights if in_use and scale != 1.0 else ():
            still = weight.stored(run.inner, CONSENSUS)
            if weight.name not in moved and still is not None:
                admm.rescale(still, weight.spec.pattern, weight.spec.dim, scale)
        progress.rho, progress.dual_in_use = new, int(in_use)

    def _freeze(self, run: Run) -> None:
        """W = P(w + u); from now on the mask is in force."""
        check_finite(run, list(run.weights))
        sums = []
        for weight in run.weights:
            z, mask = self._target(run, weight)
            moved = run.movement.get(weight.name)
            churn = mask.new_zeros(2, dtype=torch.float32) if moved is None else moved[2:].to(mask.device)
            sums.append(torch.cat([admm.primal_sums(weight.w, z), churn]).to(run.weights.each[0].w.device))
            weight.replace_value(run.inner, z, mask)
        run.freeze_sums = torch.stack(sums)
        run.movement.clear()
        run.progress.pruned_at = run.progress.step

    def _ending(self, run: Run, *, everywhere: bool) -> PaperEnding | None:
        """Turn the sums of the freeze into numbers."""
        progress = run.progress
        far_share, worst_name = 0.0, None  # a checkpoint does not tell
        if run.freeze_sums is not None and self.plan.prune_at > 0:
            sums = run.freeze_sums
            if everywhere:
                sums = reduce_sums(list(sums), [weight.param for weight in run.weights])
                run.freeze_sums = None
            each = [ratio(difference, norm) for difference, norm, *_ in sums.tolist()]
            worst = max(range(len(each)), key=each.__getitem__)
            difference, norm, gained, kept = sums.sum(0).tolist()
            progress.residual, progress.worst_residual = ratio(difference, norm), each[worst]
            progress.churn = gained / kept if kept else 0.0
            far_share = sum(residual > 0.1 for residual in each) / len(each)
            worst_name = run.weights.each[worst].name
        if progress.residual < 0:
            return None
        return PaperEnding(
            progress.residual,
            progress.worst_residual,
            worst_name,
            far_share,
            progress.churn,
            bool(progress.dual_in_use),
            progress.rho,
            progress.pruned_at,
            self.plan.prune_at,
            type(run.inner).__name__,
        )


def _initial(weight: Weight) -> Tensor:
    return admm.initial(weight.w, weight.spec.pattern, weight.spec.dim)
