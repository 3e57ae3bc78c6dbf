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

    - ``"classification"`` (of sequences, tokens or next tokens): KL(teacher || student) of the class distributions
      softened by the temperature, times its square, so that its gradient keeps the size of the hard loss's.
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
    check_temperature(temperature)
    if student.ndim == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"the student's outputs have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: they must "
            "be the same. Give both the same batch, and use a teacher trained for the same labels, or with the same "
            "tokenizer and its logits cut or padded to one vocabulary size"
        )
    s, t = student.float(), teacher.detach().to(student.device).float()
    if head == "regression":
        return _averaged(mse_loss(s, t, reduction="none").mean(-1), mask, items)
    s, t = s / temperature, t / temperature
    if head == "classification":
        each = kl_div(log_softmax(s, -1), log_softmax(t, -1), reduction="none", log_target=True)
    elif head == "multi_label":
        soft = t.sigmoid()
        entropy = -(soft * logsigmoid(t) + (1 - soft) * logsigmoid(-t))
        each = binary_cross_entropy_with_logits(s, soft, reduction="none") - entropy
    else:
        raise ValueError(f'head={head!r} must be "classification", "multi_label" or "regression"')
    return _averaged(each.sum(-1) * temperature**2, mask, items)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0."""
    at_least("temperature", temperature, 0.0)
    if temperature == 0:
        raise ValueError("temperature=0 must be above 0; 1 leaves the distributions as they are, 2 softens them")


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of hidden states, averaged over the student's layers.

    A student with fewer layers is compared with evenly spaced layers of the teacher, the first and last included.

    Args:
        student: the embeddings' output and that of each layer, shape (batch, length, width).
        teacher: the same of the teacher, as wide.
        mask: boolean, shape (batch, length): which positions count; all by default.

    Returns:
        A float32 scalar on the student's device.

    Raises:
        ValueError: no layers, fewer layers in the teacher than in the student, or another width.

    Source: Jiao et al., TinyBERT (arXiv 1909.10351), equation 8, without its projection.
    """
    layers, known = len(student) - 1, len(teacher) - 1
    if layers < 1 or known < layers:
        raise ValueError(
            f"the student has {layers} layers, the teacher {known}: the student needs one, the teacher no fewer. "
            "Leave the hidden states out (a weight of 0)"
        )
    total = student[0].new_zeros((), dtype=torch.float32)
    for layer, s in enumerate(student):
        t = teacher[round(layer * known / layers)]
        if s.shape != t.shape:
            raise ValueError(
                f"hidden states of layer {layer} have shape {tuple(s.shape)} in the student and {tuple(t.shape)} in "
                "the teacher: they can be compared at the same width and batch only. Leave them out (a weight of 0)"
            )
        total = total + distillation_loss(s, t, head="regression", mask=mask)
    return total / len(student)


def _averaged(each: Tensor, mask: Tensor | None, items: Tensor | float | None) -> Tensor:
    mask = torch.ones_like(each, dtype=torch.bool) if mask is None else mask
    if mask.shape != each.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; {tuple(each.shape)} is needed")
    mask = mask.to(device=each.device, dtype=torch.bool)
    # A masked position may hold anything, an infinity included.
    total = torch.where(mask, each, torch.zeros_like(each)).sum()
    divisor = torch.as_tensor(mask.sum().clamp_min(1) if items is None else items)
    return total / divisor.to(each.device)
