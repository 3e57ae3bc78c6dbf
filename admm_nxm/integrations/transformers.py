"""Sparse fine-tuning with Hugging Face's Trainer: another class name, one config, nothing else."""

from __future__ import annotations

import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..export.card import model_card, write_model_card
from ..io.selection_record import record_selection
from ..optimizer import ADMMNxM
from ..pattern import Pattern
from ..report.history import figures_row, find_admm
from ..schedules import Penalty
from ..sparsity import SparsityReport
from .ending import finish, what_to_do

__all__ = ["ADMMConfig", "ADMMTrainer", "ADMMTrainerMixin"]

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # what Trainer writes last into a checkpoint


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ADMMConfig:
    """Hold the arguments of :class:`admm_nxm.ADMMNxM` for :class:`ADMMTrainerMixin`; ``HfArgumentParser`` parses it.

    The fields are that class's arguments, which it checks when training begins, and some besides. What a command line
    cannot spell (schedules, callables) goes into :meth:`ADMMTrainerMixin.build_admm`.

    Args:
        pattern: ``"keep:group"``, such as ``"2:4"``. YAML needs the quotation marks.
        prune_at: as of :class:`admm_nxm.ADMMNxM`: a step, or below 1 a share of the run.
        calibration_steps: as of :class:`admm_nxm.ADMMNxM`.
        statistics_memory: likewise.
        select: regular expression -> pattern or null, first match wins: a mapping, or JSON of one.
        dims: regular expression -> grouped dimension: a mapping, or JSON of one.
        ineligible: ``"error"`` or ``"skip"``.
        paper: the paper's form, :meth:`admm_nxm.ADMMNxM.paper`.
        rho: its penalty.
        update_every: its steps between two z/u updates.

    Raises:
        TypeError, ValueError: unreadable, or ``rho`` without ``paper``.
    """

    pattern: str = _option("keep:group; 2:4 keeps 2 of every 4 weights", "2:4")
    prune_at: float | None = _option("step after which the weights are pruned, or a share of the run, by default 0.85")
    calibration_steps: int | None = _option("steps in which statistics are gathered")
    statistics_memory: int | None = _option("bytes that the statistics may take")
    select: dict[str, str | None] | str | None = field(
        default=None, metadata={"help": 'JSON: {"regular expression": "pattern" or null}, first match wins'}
    )
    dims: dict[str, int] | str | None = field(
        default=None, metadata={"help": 'JSON: {"regular expression": grouped dimension}'}
    )
    ineligible: str = _option("error or skip, for chosen weights that cannot be pruned", "error")
    paper: bool = _option("the form of the paper", False)
    rho: float | None = _option("penalty of the paper's form")
    update_every: int | None = _option("steps between two z/u updates, in that form")

    def __post_init__(self) -> None:
        _read_pattern("pattern", self.pattern)
        rules = self.select = _read_mapping("select", self.select)
        self.dims = _read_mapping("dims", self.dims)
        for expression, pattern in (rules or {}).items():
            if pattern is not None:
                _read_pattern(f"select[{expression!r}]", pattern)
        if not self.paper and (self.rho is not None or self.update_every is not None):
            raise ValueError(
                f"rho={self.rho!r} and update_every={self.update_every!r} belong to the paper's form: paper=True"
            )

    def options(self, total_steps: int) -> dict[str, Any]:
        """Return the keyword arguments of :class:`admm_nxm.ADMMNxM` for a run of that length."""
        names = ("pattern", "prune_at", "calibration_steps", "statistics_memory", "select", "dims", "ineligible")
        given = {name: getattr(self, name) for name in names}
        if isinstance(self.prune_at, float) and self.prune_at != 1 and self.prune_at.is_integer():
            given["prune_at"] = int(self.prune_at)  # a command line makes 40.0 of 40
        if self.paper:
            of_paper = {"rho": self.rho, "update_every": self.update_every}
            given["w_step"] = Penalty(**{name: value for name, value in of_paper.items() if value is not None})  # type: ignore[arg-type]
        return {"total_steps": total_steps, **given}


def _read_pattern(name: str, pattern: object) -> None:
    if type(pattern) is int:
        keep, group = divmod(pattern, 60)
        raise TypeError(
            f"{name}={pattern} is a number: YAML reads {keep}:{group} without quotation marks in base 60. "
            f'Write "{keep}:{group}"'
        )
    Pattern.parse(pattern)  # type: ignore[arg-type]


def _read_mapping(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            example = '\'{".*attention.*": "2:4", ".*": null}\'' if name == "select" else "'{\".*conv.*\": 1}'"
            raise ValueError(f"{name}={value!r} is no JSON ({error}); an object such as {example} is needed") from None
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"{name}={value!r} must map regular expressions to {'patterns' if name == 'select' else 'dimensions'}"
        )
    return value


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ADMMTrainerMixin(_Base):
    """Puts :class:`admm_nxm.ADMMNxM` around whatever optimizer a Trainer makes; mix it in before the Trainer class.

    - The length of the run comes from Trainer; warm-up, schedules, accumulation, clipping and precision stay Trainer's.
    - The training log has ``admm/phase``, ``admm/sparsity`` and, once they are known, ``admm/model_error`` and
      ``admm/pruned_at``; in the paper's form also the residuals and rho.
    - The model is evaluated and saved as it is: dense before the solve, sparse after it. The choice of the best model
      (``load_best_model_at_end``, ``save_strategy="best"``) and early stopping count from the solve on.
    - A resumed run gives the same weights, bit for bit, as a run without a stop. ``resume_from_checkpoint=True`` passes
      over a checkpoint whose writing was interrupted.
    - When training ends the weights are finalized, and ``sparsity_report`` has the count. A run that ends before its
      solve is pruned as it stands, with a :class:`admm_nxm.ConvergenceWarning`. Further training keeps the masks.
    - The selection is recorded beside each sparse model that is saved, where :func:`admm_nxm.verify` reads it.

    Args:
        args: as for the Trainer.
        admm_config: 2:4 with all defaults if left out.
        kwargs: as for the Trainer.

    Raises:
        TypeError, ValueError: no ADMMConfig, DeepSpeed, FSDP1; in :meth:`train`, a config beside an ADMMNxM of one's
            own, or what :class:`admm_nxm.ADMMNxM` refuses.

    >>> from transformers import Seq2SeqTrainer
    >>> class ADMMSeq2SeqTrainer(ADMMTrainerMixin, Seq2SeqTrainer): ...
    """

    def __init__(self, *args: Any, admm_config: ADMMConfig | None = None, **kwargs: Any) -> None:
        if admm_config is not None and not isinstance(admm_config, ADMMConfig):
            raise TypeError(f"admm_config={admm_config!r} must be an ADMMConfig, such as ADMMConfig(pattern='2:4')")
        self._configured = admm_config is not None
        self.admm_config = ADMMConfig() if admm_config is None else admm_config
        self.sparsity_report: SparsityReport | None = None
        self._built: ADMMNxM | None = None
        self._announced_steps = 0
        super().__init__(*args, **kwargs)
        _check_parallelism(self)
        # Around whichever class overrides it, above this one or below.
        self.create_optimizer = partial(self._create_and_wrap, self.create_optimizer)  # type: ignore[method-assign]
        # First of all, so that the others see the model that ships.
        self.callback_handler.callbacks.insert(0, _Watch(self))

    @property
    def admm(self) -> ADMMNxM | None:
        """The ADMM optimizer, within whatever Accelerate has put around it; None before training."""
        return find_admm(self.optimizer)

    def build_admm(self, optimizer: Optimizer, total_steps: int) -> ADMMNxM:
        """Wrap the optimizer that Trainer has made; override it for what ``ADMMConfig`` cannot express.

        Args:
            optimizer: over the parameters of ``self.model``.
            total_steps: of the whole run.
        """
        model: Any = self.model
        return ADMMNxM(optimizer, model, **self.admm_config.options(total_steps))

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Note the length of the run: transformers before 5 makes the optimizer before its state has it."""
        self._announced_steps = num_training_steps
        try:
            super().create_optimizer_and_scheduler(num_training_steps)
        finally:
            self._announced_steps = 0

    def _create_and_wrap(self, create: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let Trainer, or whoever overrides it, make the optimizer, and wrap it once the length is known."""
        made: Any = create(*args, **kwargs)
        made = self.optimizer if made is None else made
        total_steps = int(self._announced_steps or self.state.max_steps)
        if total_steps < 1:
            return made  # asked for outside train(), which asks again
        admm = find_admm(made)
        if admm is None:
            made = self._built = self.build_admm(made, total_steps)
        elif admm is not self._built and self._configured:
            raise ValueError(
                f"the optimizer is an ADMMNxM of your own, and there is {self.admm_config} beside it; leave one out"
            )
        elif admm is self._built and not admm.finalized:
            # auto_find_batch_size has Trainer try again, from wherever the weights are now.
            made = self._built = self.build_admm(admm.unwrap(), total_steps)
        self.optimizer = made
        return made

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as Trainer does; ``resume_from_checkpoint=True`` takes the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(str(self.args.output_dir), int(self.args.world_size))
        admm = self.admm
        if admm is not None and admm is self._built and not admm.finalized:
            # An earlier call did not come to its end; this one has a plan, and perhaps a checkpoint, of its own.
            self.optimizer, self._built = admm.unwrap(), None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            if self._is_dense():
                logger.warning("training was cut short before its solve: %s", self._what_to_do())
            raise

    def finalize_admm(self) -> SparsityReport | None:
        """Make the weights satisfy the pattern, as is done when training ends, and return the ``sparsity_report``."""
        admm = self.admm
        if admm is not None:
            self.sparsity_report = finish(admm)
        return self.sparsity_report

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add where the run stands to the training log; in the paper's form a collective where weights are sharded."""
        admm = self.admm
        if admm is not None and "loss" in logs:
            logs = {**logs, **figures_row(admm)}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what the model holds, and beside a sparse model the selection; of a dense one the log says so."""
        if self._is_dense() and not _internal_call:
            logger.warning("what is saved is dense: %s", self._what_to_do())
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        admm = self.admm
        if admm is not None and admm.frozen and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            record_selection(folder, admm.selection)  # before the rest, which may be pushed to the hub
        super().save_model(output_dir, _internal_call)

    def _is_dense(self) -> bool:
        return self.admm is not None and not self.admm.frozen

    def _what_to_do(self) -> str:
        assert self.admm is not None
        return what_to_do(self.admm, "train(resume_from_checkpoint=True)", "finalize_admm()")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Draft the model card, as Trainer does, with a section on sparsity once the weights are final."""
        super().create_model_card(*args, **kwargs)
        if self.sparsity_report is not None and self.is_world_process_zero():
            section = model_card(self.sparsity_report, optimizer=self.admm, history=self.state.log_history)
            write_model_card(str(self.args.output_dir), section)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        # A dense model would win, and early stopping would end the run before its solve.
        return False if self._is_dense() else super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / _STATE).unlink(missing_ok=True)  # it marks a checkpoint as complete, see last_complete
        super()._save_checkpoint(model, trial)


class ADMMTrainer(ADMMTrainerMixin, Trainer):
    """Hugging Face's Trainer, and the model comes out sparse; see :class:`ADMMTrainerMixin`."""


class _Watch(TrainerCallback):
    """Checks that training begins with ADMM, starts the choice of the best model again at the solve, and finalizes."""

    def __init__(self, trainer: ADMMTrainerMixin) -> None:
        self.trainer = trainer
        self.sparse = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        admm = self.trainer.admm
        if admm is None:
            raise RuntimeError(
                f"{type(self.trainer).__name__} has made an optimizer without ADMM, and the model would stay dense; a "
                "create_optimizer_and_scheduler of your own has to call super().create_optimizer_and_scheduler(...)"
            )
        self.sparse = admm.frozen
        if state.global_step > 0 and admm.figures().step == 0:
            self.sparse = False
            warnings.warn(
                f"the checkpoint has no ADMM state: ADMM begins at step {state.global_step} with a plan for all "
                f"{state.max_steps}. To go on from a dense model, load it and start without resume_from_checkpoint",
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.sparse or self.trainer._is_dense():
            return
        self.sparse = True
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if args.metric_for_best_model is not None:
            logger.warning(
                "the weights are pruned after step %d: the best model is chosen among the sparse ones from here on",
                state.global_step,
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer.finalize_admm()


def last_complete(output_dir: str, ranks: int) -> str:
    """Return the last checkpoint that was written to its end, by each of so many ranks."""
    steps = {
        int(step): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit() and folder.is_dir()
    }
    for _, folder in sorted(steps.items(), reverse=True):
        if _is_complete(folder, ranks):
            return os.fspath(folder)
        logger.warning("passing over %s: the writing was interrupted", folder.name)
    said = "".join(f"; {folder.name}: the writing was interrupted" for folder in steps.values())
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
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    old_fsdp = trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2
    if trainer.is_deepspeed_enabled or old_fsdp:
        raise ValueError(
            f"{'FSDP1' if old_fsdp else 'DeepSpeed'} flattens parameters, which tears the groups of the pattern apart; "
            "use DDP or FSDP2, fsdp_config={'fsdp_version': 2, ...}"
        )
