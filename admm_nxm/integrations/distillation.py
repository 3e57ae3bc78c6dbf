"""Distillation with Hugging Face's Trainer: another base class and a teacher."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checks import at_least
from ..distillation import Head, check_temperature, distillation_loss, hidden_state_loss
from ..selection import unwrap_model

__all__ = ["DistillationConfig", "DistillationTrainer", "DistillationTrainerMixin"]

_IGNORED = -100  # the label that the losses of transformers pass over


@dataclass
class DistillationConfig:
    """Set the teacher's part in the loss; ``HfArgumentParser`` parses it.

    The loss is ``(1 - weight) * own loss + weight * distillation_loss + hidden_weight * hidden_state_loss``.

    Args:
        distillation_weight: from 0 to 1.
        temperature: by which both distributions are softened, above 0.
        hidden_weight: at least 0.
        teacher_device: by default that of the student.
        head: ``"classification"``, ``"multi_label"`` or ``"regression"``; by default as the model's configuration says.
            Needed where the loss is a function of one's own.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    distillation_weight: float = field(default=0.5, metadata={"help": "share of the soft targets in the loss, 0 to 1"})
    temperature: float = field(default=2.0, metadata={"help": "by which both distributions are softened"})
    hidden_weight: float = field(default=0.0, metadata={"help": "weight of the hidden states' squared difference"})
    teacher_device: str | None = field(default=None, metadata={"help": "where the teacher runs, such as cuda:1"})
    head: str | None = field(default=None, metadata={"help": "classification, multi_label or regression"})

    def __post_init__(self) -> None:
        at_least("distillation_weight", self.distillation_weight, 0.0)
        if self.distillation_weight > 1:
            raise ValueError(f"distillation_weight={self.distillation_weight!r} must be at most 1: it is a share")
        check_temperature(self.temperature)
        at_least("hidden_weight", self.hidden_weight, 0.0)
        if self.head not in (None, *get_args(Head)):
            raise ValueError(f"head={self.head!r} must be one of {', '.join(map(repr, get_args(Head)))}")


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DistillationTrainerMixin(_Base):
    """Adds a teacher's outputs to the training loss; mix it in before the Trainer class.

    Sequence, token, multi-label, regression, question answering and language-model heads are told apart by the model's
    configuration and the outputs' shape. Evaluation reports the model's own loss.

    Args:
        args: as for the Trainer.
        teacher: a model for the same task: same labels or vocabulary, same inputs.
        distillation_config: weights and temperature; the defaults if left out.
        kwargs: as for the Trainer.

    Raises:
        TypeError, ValueError: no teacher, or the student itself as its teacher.

    Source: Hinton, Vinyals, Dean (arXiv 1503.02531); used with ADMM by Holmes et al. (arXiv 2110.15766).
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        distillation_config: DistillationConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher={teacher!r} must be a model: the dense one, trained for the same task")
        self.distillation_config = DistillationConfig() if distillation_config is None else distillation_config
        super().__init__(*args, **kwargs)
        if teacher is self.model:
            raise ValueError("the teacher is the model that is trained; pass a model of its own, trained before")
        if not (getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)):
            teacher.to(self.distillation_config.teacher_device or self.args.device)
        self.teacher = teacher.eval()
        self._teacher_takes = _parameters_of(teacher)
        self._heeds: bool | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the mixed loss in training, the model's own in evaluation."""
        kwargs["num_items_in_batch"] = num_items_in_batch
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        wanted, share = self.distillation_config, self.distillation_config.distillation_weight
        if self._heeds is None and num_items_in_batch is not None:
            self._heeds = self._own_loss_heeds(unwrap_model(model), inputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True} if wanted.hidden_weight else dict(inputs)
        own, outputs = super().compute_loss(model, asked, return_outputs=True, **kwargs)
        taught = self._ask_teacher(inputs)
        pairs = _logits(outputs, taught)
        items, soft_factor, hidden_factor = self._scale(inputs, pairs[0][0], num_items_in_batch)
        options: dict[str, Any] = {"temperature": wanted.temperature, "items": items}
        loss = (1 - share) * own
        for logits in pairs:
            student, teacher, options["mask"] = _positions(model, *logits, inputs)
            options["head"] = wanted.head or _head_of(model, student)
            loss = loss + share * soft_factor / len(pairs) * distillation_loss(student, teacher, **options)
        if wanted.hidden_weight:
            loss = loss + wanted.hidden_weight * hidden_factor * _hidden(outputs, taught, inputs)
        return (loss, outputs) if return_outputs else loss

    def _ask_teacher(self, inputs: Mapping[str, Any]) -> Any:
        given = {key: value for key, value in inputs.items() if key not in self.label_names}
        if getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False):
            given = dict(inputs)  # the decoder's inputs are made of the labels
        if self._teacher_takes is not None:
            given = {key: value for key, value in given.items() if key in self._teacher_takes}
        if self.distillation_config.hidden_weight:
            given["output_hidden_states"] = True
        device = next(self.teacher.parameters()).device
        given = {key: value.to(device) if torch.is_tensor(value) else value for key, value in given.items()}
        self.teacher.eval()
        with torch.no_grad():
            return self.teacher(**given)

    def _scale(
        self, inputs: Mapping[str, Any], logits: Tensor, num_items: Tensor | int | None
    ) -> tuple[Tensor | None, float, float]:
        """Return the divisor of the soft loss (None: its positions), and factors of both losses, as Trainer scales."""
        each = 1 / max(1, int(getattr(self, "current_gradient_accumulation_steps", 1)))
        by_items = bool(self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        usual = (by_items and num_items is not None) or self.compute_loss_func is not None
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if not (usual if said is None else said):
            return None, 1.0, 1.0  # Trainer divides by the number of accumulated batches
        if num_items is None:
            return None, each, each
        n_gpu = max(1, int(self.args.n_gpu))
        ranks = self.accelerator.num_processes // getattr(self, "get_tp_size", lambda: 1)()
        averaged = bool(self.args.average_tokens_across_devices and by_items)
        factor = float((ranks if n_gpu == 1 else n_gpu) if averaged else 1)
        if not self._heeds:
            # A mean over each batch, which Trainer takes for a share of the whole: what it does to that, do likewise.
            return None, factor, factor
        items = torch.as_tensor(num_items).flatten()[0]
        labels = inputs.get("labels")
        if logits.ndim == 2 and torch.is_tensor(labels) and labels.ndim == 2:
            items = items * labels.shape[0] / labels.numel()  # Trainer has counted each label of a row
        if n_gpu > 1:
            # DataParallel: the logits come from all devices already, and the loss is averaged over them.
            return items if averaged else items * n_gpu, 1.0, each
        return items, factor, each

    @torch.no_grad()
    def _own_loss_heeds(self, model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int) -> bool:
        """Whether the model's own loss is divided by the number of items that it is told: some models ignore it."""
        model.eval()  # no dropout, so that no random number is drawn
        try:
            losses = []
            for number in (num_items, num_items * 2):
                own: Any = super().compute_loss(model, dict(inputs), num_items_in_batch=number)
                losses.append(abs(float(own.mean())))
        finally:
            model.train()
        return losses[1] < 0.75 * losses[0]


class DistillationTrainer(DistillationTrainerMixin, Trainer):
    """Hugging Face's Trainer with a teacher; see :class:`DistillationTrainerMixin`."""


def _parameters_of(model: nn.Module) -> set[str] | None:
    """Names that forward takes; None if it takes any."""
    model = unwrap_model(model)
    parameters = inspect.signature(model.forward).parameters.values()
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if anything and not isinstance(model, PreTrainedModel):  # those name what they take, and hand the rest down
        return None
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _logits(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    named = [outputs if isinstance(outputs, Mapping) else {} for outputs in (student, teacher)]
    for keys in (("logits",), ("start_logits", "end_logits")):
        if all(torch.is_tensor(outputs.get(key)) for key in keys for outputs in named):
            return [(student[key], teacher[key]) for key in keys]
    raise ValueError(
        f"nothing to distil: the student returns {_keys(student)}, the teacher {_keys(teacher)}; both must return "
        "logits (or start_logits and end_logits), by name: leave return_dict at True"
    )


def _keys(outputs: Any) -> str:
    return ", ".join(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"


def _positions(
    model: nn.Module, student: Tensor, teacher: Tensor, inputs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Leave out the positions that the model's own loss does not count."""
    if student.ndim > 3:
        raise ValueError(
            f"logits of shape {tuple(student.shape)} are not (batch, classes) or (batch, length, classes); write a "
            "compute_loss with admm_nxm.distillation.distillation_loss"
        )
    labels, attended = inputs.get("labels"), inputs.get("attention_mask")
    positions = student.shape[:2] if student.ndim == 3 else None
    if torch.is_tensor(labels) and labels.shape == positions:
        names = {cls.__name__ for cls in type(unwrap_model(model)).__mro__}
        if names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            # Each position is scored on the next token.
            return student[:, :-1], teacher[:, :-1], labels[:, 1:] != _IGNORED
        return student, teacher, labels != _IGNORED
    if torch.is_tensor(attended) and attended.shape == positions:
        return student, teacher, attended.bool()
    return student, teacher, None


def _head_of(model: nn.Module, student: Tensor) -> Head:
    problem = getattr(getattr(unwrap_model(model), "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        return "multi_label"
    return "regression" if problem == "regression" or (problem is None and student.shape[-1] == 1) else "classification"


def _hidden(student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
    masks = {"hidden_states": "attention_mask", "encoder_hidden_states": "attention_mask", "decoder_hidden_states": ""}
    losses = []
    for key, mask_name in masks.items():
        if student.get(key) and teacher.get(key):
            mask = inputs.get(mask_name)
            fits = isinstance(mask, Tensor) and mask.shape == student[key][0].shape[:2]
            losses.append(hidden_state_loss(student[key], teacher[key], mask=mask if fits else None))
    if not losses:
        raise ValueError(
            f"hidden_weight is set, but the student returns {_keys(student)} and the teacher {_keys(teacher)}: both "
            "must return hidden_states. Set hidden_weight=0"
        )
    return torch.stack(losses).sum()
