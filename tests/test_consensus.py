"""The state of one weight in one buffer says the same as w, z and u kept apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from admm_nxm import Pattern, keep_mask, project
from admm_nxm import consensus as admm
from tests.helpers import same_bits

PATTERN, DIM = Pattern(2, 4), 0
GROUPING = (PATTERN, DIM)


def state(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V after a z/u step, and the z and u that it stands for, made without it."""
    a = w + u
    kept = keep_mask(a, *GROUPING)
    z = torch.where(kept, a, 0.0)
    return z - (a - z), z, a - z


@pytest.fixture
def w() -> Tensor:
    return torch.randn(8, 6)


@pytest.fixture
def u() -> Tensor:
    return 0.3 * torch.randn(8, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_run_starts_from_the_projected_weight_and_a_dual_of_zero(dtype: torch.dtype, w: Tensor) -> None:
    w = w.to(dtype)
    before = w.clone()
    v = admm.initial(w, *GROUPING)
    assert same_bits(project(v, *GROUPING), project(w, *GROUPING))
    assert same_bits(admm.dual(v, *GROUPING), torch.zeros_like(w))  # +0.0: it is added to weights
    v.fill_(7.0)
    assert same_bits(w, before)


def test_the_first_state_lies_in_memory_as_the_weight_does(w: Tensor) -> None:
    for weight in (w, w.t().contiguous().t()):
        assert admm.initial(weight, *GROUPING).stride() == weight.stride()


def test_all_three_are_read_off_the_one_buffer(w: Tensor, u: Tensor) -> None:
    v, z, dual = state(w, u)
    assert torch.equal(keep_mask(v, *GROUPING), keep_mask(w + u, *GROUPING))
    assert torch.equal(project(v, *GROUPING), z)
    assert torch.equal(admm.dual(v, *GROUPING), dual)
    assert dual.any()


def test_what_is_projected_is_the_weight_of_now_plus_the_dual(w: Tensor, u: Tensor) -> None:
    v, _, dual = state(w, u)
    moved = w + 0.5 * torch.randn_like(w)
    weight, kept = admm.projected(moved, v, *GROUPING)
    torch.testing.assert_close(weight, project(moved + dual, *GROUPING))
    assert torch.equal(kept, keep_mask(moved + dual, *GROUPING))
    assert not torch.equal(kept, keep_mask(moved, *GROUPING))


def test_primal_sums_are_the_squared_distance_to_z_and_the_squared_norm() -> None:
    w, z = torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 2.0]])
    for dtype in (torch.float64, torch.bfloat16):
        sums = admm.primal_sums(w.to(dtype), z.to(dtype))
        assert sums.dtype == torch.float32
        assert sums.tolist() == [20.0, 13.0]
    assert w.tolist() == [[3.0, -2.0]]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_dual", [True, False])
def test_one_update_is_that_of_z_and_u_kept_apart(with_dual: bool, scale: float, w: Tensor, u: Tensor) -> None:
    v, old_z, dual = state(w, u)
    moved = w + 0.5 * torch.randn_like(w)
    figures = admm.advance(moved, v, *GROUPING, with_dual=with_dual, dual_scale=scale)
    a = moved + dual
    z = project(a, *GROUPING)
    assert torch.equal(project(v, *GROUPING), z)
    assert torch.equal(admm.dual(v, *GROUPING), scale * (a - z) if with_dual else torch.zeros_like(a))
    gained = int((keep_mask(a, *GROUPING) & (old_z == 0)).sum())
    assert gained > 0
    expected = torch.tensor([float((z - old_z).square().sum()), float(moved.square().sum()), gained, w.numel() / 2])
    torch.testing.assert_close(figures, expected)


def test_an_update_without_the_dual_leaves_a_dual_of_positive_zero(w: Tensor, u: Tensor) -> None:
    v, _, _ = state(w, u)
    admm.advance(w, v, *GROUPING, with_dual=False, dual_scale=1.0)
    assert same_bits(admm.dual(v, *GROUPING), torch.zeros_like(w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_penalty_is_added_to_the_gradient_and_nothing_where_w_is_v(dtype: torch.dtype, w: Tensor, u: Tensor) -> None:
    w, v = w.to(dtype), admm.initial(w.to(dtype), *GROUPING)
    gradient = u.to(dtype)
    expected = gradient + 0.3 * (w - v)
    kept = keep_mask(w, *GROUPING)
    before = gradient.clone()
    admm.add_penalty([gradient], [w], [v], 0.3)
    torch.testing.assert_close(gradient, expected)
    assert same_bits(gradient[kept], before[kept])
    admm.add_penalty([], [], [], 0.3)


def test_rescaling_scales_the_dual_and_leaves_z(w: Tensor, u: Tensor) -> None:
    v, z, dual = state(w, u)
    admm.rescale(v, *GROUPING, 0.25)
    assert torch.equal(project(v, *GROUPING), z)
    assert torch.equal(admm.dual(v, *GROUPING), 0.25 * dual)


def test_a_mask_of_the_pattern_keeps_as_many_as_it_says_in_every_group_along_its_dimension() -> None:
    kept = torch.tensor([True, True, False, False]).repeat(8, 2)
    assert admm.is_mask_of(kept, PATTERN, 1)
    assert not admm.is_mask_of(kept, PATTERN, 0)
    for all_or_none in (True, False):
        other = kept.clone()
        other[7, 4:] = all_or_none  # the last group
        assert not admm.is_mask_of(other, PATTERN, 1)
