"""Sparse fine-tuning with Hugging Face's Trainer: another class name, one config, nothing else.

Trainer makes its optimizer as it always does; the mixin wraps that in :class:`admm_nxm.ADMMNxM`, gives it the length of
the run, logs where the run stands, saves checkpoints that hold the sparse model, and finalizes when training ends.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checks import at_least, is_count
from ..export.card import model_card, write_model_card
from ..forms import FORMS
from ..io.verify import verify
from ..optimizer import ADMMNxM
from ..pattern import Pattern
from ..sparsity import SparsityReport

__all__ = ["ADMMConfig", "ADMMTrainer", "ADMMTrainerMixin"]

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # what Trainer writes last into a checkpoint


@dataclass
class ADMMConfig:
    """What :class:`ADMMTrainerMixin` gives to :class:`admm_nxm.ADMMNxM`; ``HfArgumentParser`` parses it.

    What a command line cannot spell (schedules, callables) goes into :meth:`ADMMTrainerMixin.build_admm`.

    Args:
        pattern: ``"keep:group"``, such as ``"2:4"``.
        penalty: ``"lazy"``, ``"proximal"`` or ``"gradient"``.
        rho: constant penalty; by default it rises.
        saliency: ``"curvature"`` or ``"magnitude"``; by default that of the penalty's form.
        update_every: optimizer steps between two z-updates; by default at most 10.
        freeze_ratio: share of the run after which the mask freezes, above 0 and at most 1; by default 0.9 (0.7 unless
            lazy).
        select: regular expression -> pattern or null, first match wins: a mapping, or JSON of one.
        ineligible: ``"error"`` or ``"skip"``, for weights that the rules ask for and that cannot be pruned.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"bool"`` for the mask alone; by default the mask
            alone in the lazy form on weights of 32 bits, else each weight's own.
        state_rounding: ``"nearest"`` or ``"stochastic"``.
        residual_tolerance: primal residual above which the projection warns, as a share of the weights' norm.
        paper: the paper's form, ``ADMMNxM.paper``; ``rho`` is then 0.01 unless given, and ``penalty`` and ``saliency``
            stay as they are.

    Raises:
        TypeError, ValueError: a value out of range; the message says it, what is allowed and the remedy.
    """

    pattern: str = field(default="2:4", metadata={"help": "keep:group; 2:4 keeps 2 of every 4 weights"})
    penalty: str = field(default="lazy", metadata={"help": "form of the penalty: lazy, proximal or gradient"})
    rho: float | None = field(default=None, metadata={"help": "constant penalty; it rises by default"})
    saliency: str | None = field(default=None, metadata={"help": "what the mask ranks by: curvature or magnitude"})
    update_every: int | None = field(default=None, metadata={"help": "optimizer steps between two updates of the mask"})
    freeze_ratio: float | None = field(
        default=None, metadata={"help": "share of the run after which the mask freezes (0.9 by default)"}
    )
    select: dict[str, str | None] | str | None = field(
        default=None, metadata={"help": 'JSON: {"regular expression": "pattern" or null}, first match wins'}
    )
    ineligible: str = field(
        default="error", metadata={"help": "error or skip, for chosen weights that cannot be pruned"}
    )
    state_dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16, float16, or bool (the mask)"})
    state_rounding: str = field(default="nearest", metadata={"help": "nearest or stochastic"})
    residual_tolerance: float = field(default=0.02, metadata={"help": "primal residual above which to warn"})
    paper: bool = field(default=False, metadata={"help": "the form of the paper"})

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        _one_of("penalty", self.penalty, FORMS)
        _one_of("saliency", self.saliency, (None, "curvature", "magnitude"))
        _one_of("ineligible", self.ineligible, ("error", "skip"))
        _one_of("state_dtype", self.state_dtype, (None, "float32", "bfloat16", "float16", "bool"))
        _one_of("state_rounding", self.state_rounding, ("nearest", "stochastic"))
        if self.rho is not None:
            at_least("rho", self.rho, 0.0)
        if self.update_every is not None:
            is_count("update_every", self.update_every, 1)
        at_least("residual_tolerance", self.residual_tolerance, 0.0)
        if self.freeze_ratio is not None and not 0 < self.freeze_ratio <= 1:
            raise ValueError(
                f"freeze_ratio={self.freeze_ratio!r} must be above 0 and at most 1: it is a share of the run"
            )
        if isinstance(self.select, str):
            try:
                self.select = json.loads(self.select)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"select={self.select!r} is no JSON ({error}); an object such as "
                    '\'{".*attention.*": "2:4", ".*": null}\' is needed'
                ) from None
        if self.select is not None and not isinstance(self.select, Mapping):
            raise ValueError(f"select={self.select!r} must map regular expressions to patterns")
        if self.paper and (self.penalty != "lazy" or self.saliency is not None):
            raise ValueError(
                f"paper=True fixes the form: leave penalty={self.penalty!r} and saliency={self.saliency!r} alone"
            )

    def options(self, total_steps: int) -> dict[str, Any]:
        """Return the keyword arguments of :class:`admm_nxm.ADMMNxM` (or its ``paper``) for a run of that length."""
        given = {
            "penalty": self.penalty,
            "rho": self.rho,
            "saliency": self.saliency,
            "update_every": self.update_every,
            "select": self.select,
            "state_dtype": None if self.state_dtype is None else getattr(torch, self.state_dtype),
            "state_rounding": self.state_rounding,
        }
        if self.paper:
            del given["penalty"]
        if self.freeze_ratio is not None:
            given["freeze_at"] = max(1, round(self.freeze_ratio * total_steps))
        return {
            "pattern": self.pattern,
            "total_steps": total_steps,
            "ineligible": self.ineligible,
            "residual_tolerance": self.residual_tolerance,
            **{key: value for key, value in given.items() if value is not None},
        }


def _one_of(name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ADMMTrainerMixin(_Base):
    """Puts :class:`admm_nxm.ADMMNxM` around whatever optimizer a Trainer makes; mix it in before the Trainer class.

    - The length of the run comes from Trainer; warm-up, schedules, accumulation, clipping and precision stay Trainer's.
    - Evaluation and prediction measure the projected model, and checkpoints hold it (FSDP's beside the sharded weights
      that training goes on from, if it gathers full state dicts). What training goes on from lies in the checkpoint's
      optimizer state, and a resumed run gives the bits of one that was not stopped.
    - The training log has ``admm/primal_residual``, ``admm/dual_residual``, ``admm/mask_churn``, ``admm/rho`` and
      ``admm/sparsity``.
    - When training ends the weights are finalized, ``sparsity_report`` has the count, and a
      :class:`admm_nxm.ConvergenceWarning` says so if the run had not reached its pattern. Further training keeps the
      mask.
    - ``resume_from_checkpoint=True`` passes over a checkpoint whose writing was interrupted.

    Args:
        args: as for the Trainer.
        admm_config: the pattern and the rest; 2:4 with all defaults if left out.
        kwargs: as for the Trainer.

    Raises:
        TypeError: ``admm_config`` is no ADMMConfig.
        ValueError: DeepSpeed or FSDP with flat parameters; in :meth:`train`, a PEFT model, an optimizer that steps in
            the backward pass, or a config beside an ADMMNxM of one's own.

    >>> from transformers import Seq2SeqTrainer
    >>> class ADMMSeq2SeqTrainer(ADMMTrainerMixin, Seq2SeqTrainer): ...
    """

    sparsity_report: SparsityReport | None
    _built: ADMMNxM | None
    _configured: bool
    _announced_steps: int
    _attempts: int

    def __init__(self, *args: Any, admm_config: ADMMConfig | None = None, **kwargs: Any) -> None:
        if admm_config is not None and not isinstance(admm_config, ADMMConfig):
            raise TypeError(f"admm_config={admm_config!r} must be an ADMMConfig, such as ADMMConfig(pattern='2:4')")
        self._configured = admm_config is not None
        self.admm_config = ADMMConfig() if admm_config is None else admm_config
        self.sparsity_report = None
        self._built = None
        self._announced_steps = self._attempts = 0
        super().__init__(*args, **kwargs)
        _check_parallelism(self)
        # First of all, so that the others see the model that ships.
        self.callback_handler.callbacks.insert(0, _Finalize(self))

    # ------------------------------------------------------------------ the optimizer

    @property
    def admm(self) -> ADMMNxM | None:
        """The ADMM optimizer, within whatever Accelerate has put around it; None before training."""
        optimizer = self.optimizer
        while optimizer is not None and not isinstance(optimizer, ADMMNxM):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def build_admm(self, optimizer: Optimizer, total_steps: int) -> ADMMNxM:
        """Wrap the optimizer that Trainer has made; override it for what ``ADMMConfig`` cannot express.

        Args:
            optimizer: over the parameters of ``self.model``.
            total_steps: optimizer steps of the whole run.

        Returns:
            The wrapped optimizer.
        """
        build: Callable[..., ADMMNxM] = ADMMNxM.paper if self.admm_config.paper else ADMMNxM
        return build(optimizer, self.model, **self.admm_config.options(total_steps))

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Note the length of the run: transformers before 5 makes the optimizer before its state has it."""
        self._announced_steps = num_training_steps
        try:
            super().create_optimizer_and_scheduler(num_training_steps)
        finally:
            self._announced_steps = 0

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Let Trainer make its optimizer, and wrap it once the length of the run is known."""
        made: Optimizer = super().create_optimizer(*args, **kwargs)
        total_steps = int(self._announced_steps or self.state.max_steps)
        if total_steps < 1:
            return made  # asked for outside train(), which asks again
        admm = self.admm
        if admm is None:
            _check_optimizer(made)
            _check_model(self.model)
            made = self._built = self.build_admm(made, total_steps)
        elif admm is not self._built and self._configured:
            raise ValueError(
                f"the optimizer is an ADMMNxM of your own, and there is {self.admm_config} beside it; pass the plain "
                "optimizer, or leave admm_config out"
            )
        elif admm is self._built and not admm.finalized and self._attempts > 0:
            # auto_find_batch_size has Trainer try again, from wherever the weights are now.
            made = self._built = self.build_admm(admm.unwrap(), total_steps)
        self._attempts += 1
        self.optimizer = made
        return made

    def finalize_admm(self) -> SparsityReport | None:
        """Make the weights satisfy the pattern; done by itself when training ends.

        Returns:
            The count of every group, kept in ``sparsity_report``; None if there was no training.
        """
        admm = self.admm
        if admm is not None:
            admm.eval()  # an inner optimizer that averages weights ships the averaged ones
            self.sparsity_report = admm.finalize()
            logger.info("%s", self.sparsity_report)
        return self.sparsity_report

    # ------------------------------------------------------------------ what is logged and saved

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add where the run stands to the training log. A collective where weights are sharded."""
        admm = self.admm
        if admm is not None and "loss" in logs:
            logs = {**logs, **_figures(admm, self.model)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the projected model, whatever training goes on from. FSDP keeps that in files of its own."""
        admm = self.admm
        with nullcontext() if admm is None else admm.projected():
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Draft the model card, as Trainer does (``push_to_hub`` asks for it), with a section on sparsity once the
        weights are final."""
        super().create_model_card(*args, **kwargs)
        if self.sparsity_report is not None and self.is_world_process_zero():
            section = model_card(self.sparsity_report, optimizer=self.admm, history=self.state.log_history)
            write_model_card(str(self.args.output_dir), section)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Measure the projected model."""
        return self._then_train(super().evaluate(*args, **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the projected model."""
        return self._then_train(super().predict(*args, **kwargs))

    def _then_train(self, result: Any) -> Any:
        # Trainer itself goes back to training with the next batch, which is too late for a callback that evaluates
        # between a backward pass and its step.
        admm = self.admm
        if admm is not None and self.is_in_train:
            admm.train()
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / _STATE).unlink(missing_ok=True)  # it marks a checkpoint as complete, see _last_complete
        admm = self.admm
        if admm is not None:
            # torch.distributed.checkpoint cannot take the weights that training goes on from beside the projected ones.
            admm.train() if self.is_fsdp_enabled else admm.eval()
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does; ``resume_from_checkpoint=True`` takes the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete(str(self.args.output_dir), int(self.args.world_size))
        admm = self.admm
        if admm is not None and admm is self._built and not admm.finalized:
            # An earlier call did not come to its end; this one has a plan, and perhaps a checkpoint, of its own.
            self.optimizer, self._built = admm.unwrap(), None
        self._attempts = 0
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        admm = self.admm
        if admm is None:
            super()._load_best_model()
        elif not self.is_fsdp_enabled:
            admm.eval()  # what is loaded now is final, and ADMM state does not belong to it
            super()._load_best_model()
        else:
            # Sharded checkpoints hold the weights that training went on from: finalize them with their own state.
            admm.unwrap()
            super()._load_best_model()
            self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)


class ADMMTrainer(ADMMTrainerMixin, Trainer):
    """Hugging Face's Trainer, and the model comes out sparse; see :class:`ADMMTrainerMixin`."""


class _Finalize(TrainerCallback):
    """Makes sure that training begins with ADMM, and finalizes before any other callback sees its end."""

    def __init__(self, trainer: ADMMTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        admm = self.trainer.admm
        if admm is not None and state.global_step > 0 and admm.param_groups[0].get("admm_step", 0) == 0:
            warnings.warn(
                f"the checkpoint has no ADMM state: ADMM begins at step {state.global_step} with a plan for all "
                f"{state.max_steps}, and training may end before it does. To go on from a dense model, load it as the "
                "model and start without resume_from_checkpoint",
                stacklevel=2,
            )
        if admm is None:
            raise RuntimeError(
                f"{type(self.trainer).__name__} has made an optimizer without ADMM, and the model would stay dense; a "
                "create_optimizer of your own has to call super().create_optimizer(), or to return an ADMMNxM"
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer.finalize_admm()


def _figures(admm: ADMMNxM, model: Any) -> dict[str, float]:
    now = admm.residuals()
    figures = {
        "admm/primal_residual": now.primal,
        "admm/dual_residual": now.dual,
        "admm/mask_churn": now.mask_churn,
        "admm/rho": admm.rho,
        "admm/sparsity": verify(model, admm.selection).sparsity,
    }
    return {key: value for key, value in figures.items() if value == value}  # NaN: z has not moved yet


def _last_complete(output_dir: str, ranks: int) -> str:
    """Return the last checkpoint that was written to its end, by each of so many ranks.

    Raises:
        ValueError: there is none.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if folder.is_dir() and step.isdigit():
            found.append((int(step), folder))
    broken = []
    for _, folder in sorted(found, reverse=True):
        if not _is_complete(folder, ranks):
            broken.append(folder.name)
            continue
        if broken:
            logger.warning("passing over %s: the writing was interrupted", ", ".join(broken))
        return os.fspath(folder)
    said = f"; {', '.join(broken)}: the writing was interrupted" if broken else ""
    raise ValueError(f"no complete checkpoint in {output_dir}{said}. Start without resume_from_checkpoint")


def _is_complete(folder: Path, ranks: int) -> bool:
    try:
        TrainerState.load_from_json(os.fspath(folder / _STATE))
    except (OSError, ValueError, TypeError):
        return False
    # The first rank does not wait for what the others write.
    written = [folder / f"rng_state_{rank}.pth" for rank in range(ranks)]
    return not written[0].exists() or ranks == 1 or all(map(zipfile.is_zipfile, written))


def _check_parallelism(trainer: ADMMTrainerMixin) -> None:
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed partitions flattened parameters, which tears the groups of the pattern apart, and has an "
            "optimizer of its own; use FSDP2 (fsdp_version: 2) or DDP"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP1 flattens parameters, which tears the groups of the pattern apart; use FSDP2, "
            "fsdp_config={'fsdp_version': 2, ...}"
        )


def _check_optimizer(optimizer: Any) -> None:
    # What steps in the backward pass never comes to step(): nothing would be projected, and nothing would say so.
    if hasattr(optimizer, "fused_backward") or hasattr(optimizer, "optimizer_dict"):
        raise ValueError(
            f"{type(optimizer).__name__} updates the weights during the backward pass, where ADMM cannot take part; "
            "choose an optim= that updates them in step(), such as adamw_torch_fused"
        )


def _check_model(model: Any) -> None:
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters: pruning them leaves the merged weights dense, and the base weights are "
            "frozen. Merge the adapters first (model.merge_and_unload()) and fine-tune the whole model"
        )
