"""Knowledge distillation: losses between a student's and a teacher's outputs, for any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax, logsigmoid, mse_loss

from .checks import at_least

__all__ = ["Head", "distillation_loss", "hidden_state_loss"]

Head = Literal["classification", "multi_label", "regression"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    head: Head = "classification",
    temperature: float = 2.0,
    mask: Tensor | None = None,
    items: Tensor | float | None = None,
) -> Tensor:
    """Return how far the student's outputs are from the teacher's.

    - ``"classification"`` (of sequences, tokens or next tokens): the divergence KL(teacher || student) of the class
      distributions softened by the temperature, times its square, so that its gradient keeps the size of the hard
      loss's.
    - ``"multi_label"``: the same for one yes-or-no distribution per label, summed over the labels.
    - ``"regression"``: the squared difference, averaged over the outputs; the temperature plays no part.

    Args:
        student: logits or predictions, shape (..., classes), any floating dtype.
        teacher: the same shape, on any device; no gradient flows into it.
        head: what the last dimension is.
        temperature: above 0.
        mask: boolean, shape (...): which positions count; all by default.
        items: what the sum over positions is divided by; by default their number.

    Returns:
        A float32 scalar on the student's device; 0 if no position counts.

    Raises:
        TypeError, ValueError: shapes that do not match, an unknown head, or a temperature that is not above 0.

    Source: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.
    """
    at_least("temperature", temperature, 0.0)
    if temperature == 0:
        raise ValueError("temperature=0 must be above 0; 1 leaves the distributions as they are, 2 softens them")
    if student.ndim == 0 or student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student's outputs have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: the last "
            "dimension, labels or vocabulary, must be the same. Use a teacher that was trained for the same labels in "
            "the same order, or one with the same tokenizer, its logits cut or padded to one vocabulary size"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's outputs have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: both must "
            "see the same batch, in the same order and padding"
        )
    s = student.float()
    t = teacher.detach().to(s.device).float()
    if head == "classification":
        each = (
            kl_div(
                log_softmax(s / temperature, -1), log_softmax(t / temperature, -1), reduction="none", log_target=True
            ).sum(-1)
            * temperature**2
        )
    elif head == "multi_label":
        soft = (t / temperature).sigmoid()
        entropy = -(soft * logsigmoid(t / temperature) + (1 - soft) * logsigmoid(-t / temperature))
        cross = binary_cross_entropy_with_logits(s / temperature, soft, reduction="none")
        each = (cross - entropy).sum(-1) * temperature**2
    elif head == "regression":
        each = mse_loss(s, t, reduction="none").mean(-1)
    else:
        raise ValueError(f'head={head!r} must be "classification", "multi_label" or "regression"')
    return _averaged(each, mask, items)


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean squared difference of hidden states, averaged over the student's layers.

    A student with fewer layers is compared with evenly spaced layers of the teacher, the first and last included.

    Args:
        student: the embeddings' output and that of each layer, shape (batch, length, width).
        teacher: the same of the teacher; its width must be the student's.
        mask: boolean, shape (batch, length): which positions count; all by default.

    Returns:
        A float32 scalar on the student's device.

    Raises:
        ValueError: no layers, fewer layers in the teacher than in the student, or another width.

    Source: Jiao et al., TinyBERT (arXiv 1909.10351), equation 8, without its projection.
    """
    if len(student) < 2 or len(teacher) < len(student):
        raise ValueError(
            f"the student has {len(student) - 1} layers, the teacher {len(teacher) - 1}: the student needs one at "
            "least, and the teacher no fewer than that. Leave the hidden states out (a weight of 0)"
        )
    last_student, last_teacher = len(student) - 1, len(teacher) - 1
    total = student[0].new_zeros((), dtype=torch.float32)
    for layer, s in enumerate(student):
        t = teacher[round(layer * last_teacher / last_student)]
        if s.shape != t.shape:
            raise ValueError(
                f"hidden states of layer {layer} have shape {tuple(s.shape)} in the student and {tuple(t.shape)} in "
                "the teacher: they can be compared at the same width and batch only. Leave the hidden states out (a "
                "weight of 0)"
            )
        each = mse_loss(s.float(), t.detach().to(s.device).float(), reduction="none").mean(-1)
        total = total + _averaged(each, mask, None)
    return total / len(student)


def _averaged(each: Tensor, mask: Tensor | None, items: Tensor | float | None) -> Tensor:
    if mask is not None:
        if mask.shape != each.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}; {tuple(each.shape)} is needed")
        kept = mask.to(device=each.device, dtype=torch.bool)
        # A masked position may hold anything, an infinity included.
        each = torch.where(kept, each, torch.zeros_like(each))
        count: Tensor | float = kept.sum().clamp_min(1)
    else:
        count = max(1, each.numel())
    divisor = count if items is None else items
    return each.sum() / (divisor.to(each.device) if isinstance(divisor, Tensor) else divisor)
