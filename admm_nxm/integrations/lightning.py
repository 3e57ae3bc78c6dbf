"""Sparse fine-tuning with Lightning: a wrapped optimizer from ``configure_optimizers``, and one callback."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..optimizer import ADMMNxM
from ..report.history import figures_row, find_admm
from ..sparsity import SparsityReport
from .ending import finish, what_to_do

__all__ = ["ADMMCallback"]

logger = logging.getLogger(__name__)

_PHASES = {"dense": 0.0, "admm": 1.0, "calibration": 1.0, "frozen": 2.0}
"""The phases as numbers, because Lightning logs nothing else."""


class ADMMCallback(Callback):
    """Does for an :class:`admm_nxm.ADMMNxM` run what Lightning's Trainer does not know to do.

    ``configure_optimizers`` returns the wrapped optimizer, with ``self.trainer.estimated_stepping_batches`` as
    ``total_steps``. Clipping, accumulation, precision, schedulers and checkpoints stay Lightning's.

    - The best model is chosen among sparse ones: at the solve, what a ModelCheckpoint with ``monitor`` has saved before
      gets the worst score, and is the first to be replaced. EarlyStopping waits for the solve.
    - The log has ``admm/phase`` (0 dense, 1 calibration, 2 frozen), ``admm/sparsity`` and, once they are known,
      ``admm/model_error`` and ``admm/pruned_at``; in the paper's form also the residuals and rho.
    - When training ends the weights are finalized, and ``sparsity_report`` has the count. A run that ends before its
      solve is pruned as it stands, with a :class:`admm_nxm.ConvergenceWarning`. One that is cut short by an error or
      by Ctrl-C stays dense, and the log says what to do.

    Raises:
        ValueError: when training begins: FSDP1, DeepSpeed, or not exactly one ADMMNxM among the optimizers.
    """

    sparsity_report: SparsityReport | None = None
    """The count of every group of every prunable weight, once training has ended."""

    admm: ADMMNxM | None = None
    """The optimizer of the run; None before training."""

    _sparse = False  # whether the best model is chosen among sparse ones by now

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse what tears groups apart, and go behind what changes weights when training ends, such as averaging."""
        name = type(trainer.strategy).__name__
        if name in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"strategy is {name}, which flattens parameters and so tears the groups of the pattern apart; use "
                '"ddp", or ModelParallelStrategy with fully_shard in configure_model (FSDP2)'
            )
        others: list[Any] = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        savers = [callback for callback in others if _is_a(callback, "Checkpoint")]
        trainer.callbacks = [*(c for c in others if c not in savers), self, *savers]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Find the optimizer."""
        found = [admm for optimizer in trainer.optimizers if (admm := find_admm(optimizer)) is not None]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} of the {len(trainer.optimizers)} optimizers of configure_optimizers are ADMMNxM, and "
                "this callback serves one; return ADMMNxM(AdamW(...), self, "
                "total_steps=self.trainer.estimated_stepping_batches). Of several, finalize() each by yourself"
            )
        self.admm = found[0]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Let EarlyStopping wait, whatever was loaded."""
        assert self.admm is not None
        self._sparse = self.admm.frozen
        if trainer.global_step > 0 and self.admm.figures().step == 0:
            warnings.warn(
                f"the checkpoint has no ADMM state: ADMM begins at step {trainer.global_step} with a plan for all "
                f"{self.admm.total_steps}. To go on from a dense model, load it and start without ckpt_path",
                stacklevel=2,
            )
        for callback in _named(trainer, "EarlyStopping"):
            for hook in _STOPPING_HOOKS:
                setattr(callback, hook, partial(self._once_sparse, getattr(callback, hook)))

    def _once_sparse(self, hook: Callable[..., None], *args: Any) -> None:
        if self._sparse:
            hook(*args)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log where the run stands, and begin the choice of the best model anew at the solve."""
        assert self.admm is not None
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            row = figures_row(self.admm)
            pl_module.log_dict({**row, "admm/phase": _PHASES[row["admm/phase"]]})
        if self._sparse or not self.admm.frozen:
            return
        self._sparse = True
        for callback in _named(trainer, "ModelCheckpoint"):
            if callback.monitor is None:
                continue
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.kth_value = worst
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
            logger.warning(
                "the weights are pruned after step %d: the best %s is chosen among sparse models from here on",
                trainer.global_step,
                callback.monitor,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Finalize the weights."""
        assert self.admm is not None
        self._release(trainer)
        self.sparsity_report = finish(self.admm)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Say what to do about a run that was cut short before its solve."""
        self._release(trainer)
        if self.admm is not None and not self.admm.frozen:
            todo = what_to_do(self.admm, "trainer.fit(..., ckpt_path=...)", "callback.admm.finalize()")
            logger.warning("training was cut short before its solve: %s", todo)

    def _release(self, trainer: Trainer) -> None:
        for callback in _named(trainer, "EarlyStopping"):
            for hook in _STOPPING_HOOKS:
                vars(callback).pop(hook, None)


_STOPPING_HOOKS = ("on_validation_end", "on_train_epoch_end")


def _named(trainer: Trainer, name: str) -> list[Any]:
    return [callback for callback in trainer.callbacks if _is_a(callback, name)]  # type: ignore[attr-defined]


def _is_a(callback: object, name: str) -> bool:
    # By name: the package exists twice, as lightning and as pytorch_lightning.
    return any(cls.__name__ == name for cls in type(callback).__mro__)
