"""The distillation losses against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import mse_loss

from admm_nxm.distillation import distillation_loss, hidden_state_loss

sizes = st.integers(1, 5)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 10.0])


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the losses


@given(rows=sizes, classes=sizes, temperature=temperatures)
def test_classification_is_the_divergence_written_out(rows: int, classes: int, temperature: float) -> None:
    s, t = logits(rows, classes), logits(rows, classes, seed=1)
    p, q = (t / temperature).softmax(-1).double(), (s / temperature).softmax(-1).double()
    expected = temperature**2 * (p * (p.log() - q.log())).sum() / rows
    assert float(distillation_loss(s, t, temperature=temperature)) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@given(rows=sizes, labels=sizes, temperature=temperatures)
def test_multi_label_is_a_two_class_divergence_per_label(rows: int, labels: int, temperature: float) -> None:
    s, t = logits(rows, labels), logits(rows, labels, seed=1)
    pair = [torch.stack([x, torch.zeros_like(x)], -1) for x in (s, t)]
    expected = labels * distillation_loss(*pair, temperature=temperature)
    actual = distillation_loss(s, t, head="multi_label", temperature=temperature)
    assert float(actual) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_regression_is_the_squared_difference() -> None:
    s, t = logits(6, 2), logits(6, 2, seed=1)
    assert torch.equal(
        distillation_loss(s, t, head="regression", temperature=9.0), mse_loss(s, t, reduction="none").mean(-1).mean()
    )


@pytest.mark.parametrize("head", ["classification", "multi_label", "regression"])
def test_the_loss_is_zero_at_the_teacher_and_nowhere_below(head: Any) -> None:
    s, t = logits(8, 4).requires_grad_(), logits(8, 4, seed=1)
    assert float(distillation_loss(s.detach(), t, head=head)) > 0.01
    assert float(distillation_loss(t, t, head=head)) == pytest.approx(0, abs=1e-6)
    at = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(at, t, head=head), at)
    assert gradient.abs().max() < 1e-6


def test_no_gradient_reaches_the_teacher() -> None:
    s, t = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    distillation_loss(s, t).backward()
    hidden_state_loss([s[None], s[None]], [t[None], t[None]]).backward()
    assert t.grad is None
    assert s.grad is not None


def test_a_high_temperature_keeps_the_size_of_the_gradient() -> None:
    # Hinton et al.: at high temperature the gradient tends to the centred difference of the logits over their number.
    s, t = logits(1, 5).requires_grad_(), logits(1, 5, seed=1)
    (gradient,) = torch.autograd.grad(distillation_loss(s, t, temperature=1e3), s)
    difference = (s - t).detach()
    torch.testing.assert_close(gradient, (difference - difference.mean()) / 5, rtol=2e-2, atol=1e-3)


def test_masked_positions_play_no_part_whatever_they_hold() -> None:
    s, t = logits(2, 3, 4), logits(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    expected = distillation_loss(s[mask], t[mask])
    s[~mask], t[~mask] = math.inf, math.nan
    assert torch.allclose(distillation_loss(s, t, mask=mask), expected)
    assert float(distillation_loss(s, t, mask=torch.zeros(2, 3, dtype=torch.bool))) == 0


def test_no_gradient_comes_from_a_masked_position() -> None:
    s, t = logits(2, 4).requires_grad_(), logits(2, 4, seed=1)
    distillation_loss(s, t, mask=torch.tensor([True, False])).backward()
    assert s.grad is not None
    assert s.grad[0].abs().sum() > 0
    assert s.grad[1].abs().sum() == 0


def test_items_replace_the_number_of_positions() -> None:
    s, t = logits(4, 3), logits(4, 3, seed=1)
    halves = [distillation_loss(s[i : i + 2], t[i : i + 2], items=4) for i in (0, 2)]
    assert torch.allclose(sum(halves), distillation_loss(s, t))
    assert torch.allclose(distillation_loss(s, t, items=torch.tensor(8)), distillation_loss(s, t) / 2)


def test_half_precision_is_computed_in_float32() -> None:
    s, t = logits(4, 3), logits(4, 3, seed=1)
    loss = distillation_loss(s.bfloat16(), t.bfloat16())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(s.bfloat16().float(), t.bfloat16().float()))


def test_hidden_states_are_averaged_over_layers() -> None:
    student = [logits(2, 3, 4, seed=i) for i in range(3)]
    teacher = [logits(2, 3, 4, seed=10 + i) for i in range(3)]
    expected = torch.stack([mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
    assert torch.allclose(hidden_state_loss(student, teacher), expected)


def test_a_shallower_student_is_compared_with_evenly_spaced_layers() -> None:
    teacher = [logits(2, 3, 4, seed=i) for i in range(7)]
    assert float(hidden_state_loss([teacher[0], teacher[3], teacher[6]], teacher)) == 0
    assert float(hidden_state_loss([teacher[0], teacher[2], teacher[6]], teacher)) > 0


@pytest.mark.parametrize(
    ("student", "teacher", "options", "said"),
    [
        ((2, 3), (2, 4), {}, "trained for the same labels"),
        ((2, 3), (3, 3), {}, "Give both the same batch"),
        ((2, 5, 3), (2, 4, 3), {}, "Give both the same batch"),
        ((2, 3), (2, 3), {"temperature": 0.0}, "temperature=0 must be above 0"),
        ((2, 3), (2, 3), {"temperature": -1.0}, "temperature=-1.0 must be"),
        ((2, 3), (2, 3), {"head": "ranking"}, "head='ranking' must be"),
        ((2, 3), (2, 3), {"mask": torch.ones(3, dtype=torch.bool)}, r"the mask has shape \(3,\); \(2,\) is needed"),
    ],
)
def test_bad_input_of_the_loss(student: Any, teacher: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        distillation_loss(logits(*student), logits(*teacher), **options)


def test_bad_input_of_the_hidden_states() -> None:
    states = [logits(2, 3, 4)] * 3
    with pytest.raises(ValueError, match="the student has 2 layers, the teacher 1"):
        hidden_state_loss(states, states[:2])
    with pytest.raises(ValueError, match="the student has 0 layers"):
        hidden_state_loss(states[:1], states)
    with pytest.raises(ValueError, match=r"layer 0 have shape \(2, 3, 4\) .* \(2, 3, 8\)"):
        hidden_state_loss(states, [logits(2, 3, 8)] * 3)
