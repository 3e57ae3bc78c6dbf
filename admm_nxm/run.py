"""The state of a run: one object, changed in place and never replaced.

Frameworks make proxies of an optimizer that share its attributes as they were at one moment (Lightning, Fabric). What
changes during a run therefore lies in an object that all of them hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from .grouping import such_as
from .progress import Progress
from .selection import Selection
from .sparsity import check_weights
from .statistics import Statistics
from .weights import MASK, Weight, Weights, not_finite

__all__ = ["Moving", "Run", "check_finite", "check_pruned"]


@dataclass
class Run:
    """The state of a run that is not in the inner optimizer.

    Args:
        statistics: A and G of the window under calibration; None outside of it.
        model_errors: name -> model error of each solved weight.
        movement: paper's form: name -> the figures of the last z-step.
        freeze_sums: paper's form: the figures of the freeze, until somebody reads them.
        announced: whether a warning about the freeze was given.
        refusal: why ``step()`` and ``finalize()`` are refused at the moment; None if it is not.
    """

    inner: Optimizer
    selection: Selection
    weights: Weights
    progress: Progress
    statistics: Statistics | None = None
    model_errors: dict[str, float] = field(default_factory=dict)
    movement: dict[str, Tensor] = field(default_factory=dict)
    freeze_sums: Tensor | None = None
    announced: bool = False
    refusal: str | None = None

    def is_pruned(self, weight: Weight) -> bool:
        """Return whether a weight's mask is in force."""
        progress = self.progress
        return progress.frozen or (progress.windows_solved > 0 and weight.window < progress.windows_solved)

    def pruned(self) -> list[Weight]:
        """Return the weights whose masks are in force."""
        return [weight for weight in self.weights if self.is_pruned(weight)]

    def mask(self, weight: Weight) -> Tensor:
        """Return this rank's part of a weight's mask, which keeps all before the weight is pruned."""
        return weight.mask(self.inner) if self.is_pruned(weight) else torch.ones_like(weight.w, dtype=torch.bool)

    def stop_gathering(self) -> None:
        """Take the hooks off, and drop the statistics."""
        if self.statistics is not None:
            self.statistics.detach()
            self.statistics = None

    def forget(self) -> None:
        """Drop everything that is not in the inner optimizer, for a run that begins again or that is loaded."""
        self.stop_gathering()
        self.model_errors.clear()
        self.movement.clear()
        self.freeze_sums = None
        self.announced = False
        for weight in self.weights:
            weight.copy_keys = None  # the flags stay: a trial step may have set what a checkpoint does not tell

    def store_masks(self, masks: Mapping[str, Tensor], stepped: Collection[Tensor]) -> None:
        """Put masks beside the inner optimizer's own state, after the step in which that was created.

        A weight that is not pruned gets a mask that keeps all: loaders that fill a state dict in place must find the
        key in every phase.
        """
        first = self.progress.step == 0
        for weight in self.weights:
            if weight.param in stepped and (first or weight.stored(self.inner, MASK) is None):
                mask = masks.get(weight.name)
                weight.store(self.inner, MASK, self.mask(weight) if mask is None else mask)
                weight.look_for_copies(self.inner)
        if first:
            # torch.distributed.checkpoint wants an entry for all parameters or for none; a stateless inner optimizer
            # has none of its own.
            for p in stepped:
                self.inner.state.setdefault(p, {})


Moving = list[tuple[Weight, Tensor]]
"""The weights that take part in a step of the paper's form, each with its v."""


def check_finite(run: Run, weights: Sequence[Weight]) -> None:
    """Refuse weights with NaN or infinite entries, on every rank alike."""
    names = not_finite(weights)
    if names:
        raise ValueError(
            f"{len(names)} of {len(weights)} weights have NaN or infinite entries after step {run.progress.step}: "
            f"{', '.join(names)}; nothing was changed. Load an earlier checkpoint, lower the learning rate, or clip "
            "the gradients"
        )


def check_pruned(run: Run) -> None:
    """Refuse to begin frozen with weights that are not finite, or not pruned."""
    check_finite(run, list(run.weights))
    bad = check_weights(run.selection, lambda name: run.weights[name].param).violations
    if bad:
        named = [
            f"{weight.name} ({weight.bad_groups} of {weight.groups} groups exceed {weight.pattern})" for weight in bad
        ]
        raise ValueError(
            f"prune_at=0 begins with pruned weights, and {len(bad)} of {len(run.weights)} violate their pattern: "
            f"{such_as(named)}. Prune the model first, with admm_nxm.prune(model, ...), or give a later prune_at"
        )
