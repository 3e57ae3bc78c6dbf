"""Say in words, from the figures of a run, why it went wrong and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Ending", "PaperEnding", "diagnose", "diagnose_loaded", "diagnose_paper"]

RESIDUAL_TOLERANCE = 0.02
"""The primal residual above which the paper's form has not reached its pattern, as a share of the weights' norm."""

RESTLESS = 0.1
"""Mask churn at the last z-step above which the frozen mask is called arbitrary."""

_WHY_RESTLESS = "the dual was at work while the mask moved, and u grows by w until pruned weights out-rank kept ones"

_LEAVE_OUT = "leave the dual out (update_every=Every(interval, dual_start=None)) or let it wait"


@dataclass(frozen=True)
class Ending:
    """Describe how a run with the exact w-step got its masks in ``finalize()``: its steps and calibration steps beside
    the planned ones, how many weights were solved with what there was, and how many had no statistics."""

    step: int
    prune_at: int
    calibrated: int
    calibration_steps: int
    by_magnitude: int
    solved: int


def diagnose(ending: Ending) -> str | None:
    """Return what to say about a run that ended before its solve; None if nothing was left to do."""
    if not ending.by_magnitude and not ending.solved:
        return None
    done = []
    if ending.by_magnitude:
        done.append(f"{_weights(ending.by_magnitude)} pruned by magnitude, without statistics")
    if ending.solved:
        done.append(
            f"{_weights(ending.solved)} solved from {ending.calibrated} of {ending.calibration_steps} calibration steps"
        )
    what, remedy = (
        "",
        "train to the end, or give the true number of optimizer steps as total_steps, or an earlier prune_at",
    )
    missing = ending.calibration_steps - ending.calibrated
    if ending.step >= ending.prune_at and missing > 0:
        what = ", which was behind it when it was resumed with this length"
        remedy = f"give a longer total_steps: at least {missing} more steps calibrate, and the solve follows"
    elif ending.step >= ending.prune_at:
        what = ", but the solve had failed"
        remedy = f"follow the error that step() raised after step {ending.prune_at}"
    return (
        f"finalize() came after {ending.step} optimizer steps, and the weights were to be pruned after step "
        f"{ending.prune_at}{what}: {' and '.join(done)}, and no step has "
        f"trained what was kept. Accuracy measured before does not hold. Remedy: {remedy}"
    )


def diagnose_loaded(count: int) -> str | None:
    """Return what to say about weights without the pattern that the model was given after the solve."""
    if not count:
        return None
    return (
        f"{_weights(count)} no longer in the pattern when finalize() came, because the model was given other weights "
        "after the solve, and pruned by magnitude, without statistics. Likely cause: an average over the dense part of "
        "the run. Remedy: let the average begin once optimizer.frozen is true, or load weights that are sparse"
    )


def _weights(count: int) -> str:
    return "1 weight was" if count == 1 else f"{count} weights were"


@dataclass(frozen=True)
class PaperEnding:
    """Describe how a run of the paper's form got its masks: the residual and the mask churn at the freeze (shares of
    the norm of the weights and of the kept places), what is known of the worst weight, and the step beside the planned
    one.
    """

    residual: float
    worst: float
    worst_name: str | None
    far_share: float
    churn: float
    dual_in_use: bool
    rho: float
    step: int
    prune_at: int
    inner: str


def diagnose_paper(ending: PaperEnding) -> str | None:
    """Return what to say about a run of the paper's form; None if it has reached its pattern."""
    far = ending.residual > RESIDUAL_TOLERANCE or ending.worst > 5 * RESIDUAL_TOLERANCE
    if not far and ending.churn <= RESTLESS:
        return None
    if not far:
        why, first = "the learning rate is high up to the freeze", ""
        if ending.dual_in_use:
            why, first = _WHY_RESTLESS, f"{_LEAVE_OUT}, "
        return (
            f"the mask had not settled: the last z-step before the freeze replaced {ending.churn:.0%} of the kept "
            f"places (more than {RESTLESS:.0%}), so the frozen mask is the one that happened to be there. Likely "
            f"cause: {why}. Remedy: {first}let the learning rate decay before prune_at, or use the exact w-step, "
            "ADMMNxM(...)"
        )
    if ending.rho == 0:
        cause = "no penalty was in force (rho = 0), so this is one-shot magnitude pruning"
        remedy = "give a rho above 0, or use the exact w-step, ADMMNxM(...)"
    elif ending.step < ending.prune_at:
        cause = f"finalize() came after {ending.step} steps, and the mask was to freeze after step {ending.prune_at}"
        remedy = "train to the end, or give the true number of optimizer steps as total_steps"
    elif 0 < ending.far_share <= 0.5:
        cause = "this weight had no gradient for long, or its learning rate is far from the others'"
        remedy = "train it, or leave it dense by a select rule"
    elif ending.churn > RESTLESS and ending.dual_in_use:
        cause = f"the last z-step still replaced {ending.churn:.0%} of the kept places: {_WHY_RESTLESS}"
        remedy = f"{_LEAVE_OUT} until the mask has settled, or use the exact w-step, ADMMNxM(...)"
    else:
        cause = (
            f"the penalty in the gradient (rho = {ending.rho:.3g}) has not brought the pruned weights to zero in "
            f"{ending.step} steps of {ending.inner}; a step moves a weight by no more than about the learning rate "
            "under Adam and its kin, and by learning rate * rho * distance under SGD"
        )
        remedy = "use a larger rho, a longer run or a larger learning rate, or use the exact w-step, ADMMNxM(...)"
    which = f"{ending.worst_name!r}, by" if ending.worst_name else "one weight, by"
    return (
        f"the run has not reached its pattern: projecting the weights changed them by {ending.residual:.1%} of their "
        f"norm (tolerance {RESIDUAL_TOLERANCE:.1%}), most of all {which} {ending.worst:.1%}, so accuracy "
        f"measured before does not hold. Likely cause: {cause}. Remedy: {remedy}"
    )
