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
    before = w.clone()
    v = admm.initial(w, *GROUPING, dtype)
    rounded = w.to(dtype)
    assert same_bits(admm.auxiliary(v, *GROUPING), project(rounded, *GROUPING))
    assert same_bits(admm.dual(v, *GROUPING), torch.zeros_like(rounded))  # +0.0: it is added to weights
    assert torch.equal(admm.mask(v, *GROUPING), keep_mask(rounded, *GROUPING))
    v.fill_(7.0)
    assert same_bits(w, before)


def test_the_first_state_lies_in_memory_as_the_weight_does(w: Tensor) -> None:
    for weight in (w, w.t().contiguous().t()):
        assert admm.initial(weight, *GROUPING, torch.bfloat16).stride() == weight.stride()


def test_all_three_are_read_off_the_one_buffer(w: Tensor, u: Tensor) -> None:
    v, z, dual = state(w, u)
    assert torch.equal(admm.mask(v, *GROUPING), keep_mask(w + u, *GROUPING))
    assert torch.equal(admm.auxiliary(v, *GROUPING), z)
    assert torch.equal(admm.dual(v, *GROUPING), dual)
    assert dual.any()


def test_what_is_projected_is_the_weight_of_now_plus_the_dual(w: Tensor, u: Tensor) -> None:
    v, _, dual = state(w, u)
    moved = w + 0.5 * torch.randn_like(w)
    weight, kept = admm.projected(moved, v, *GROUPING)
    torch.testing.assert_close(weight, project(moved + dual, *GROUPING))
    assert torch.equal(kept, keep_mask(moved + dual, *GROUPING))
    assert not torch.equal(kept, keep_mask(moved, *GROUPING))


def test_the_mask_of_a_projection_is_that_of_the_rounded_sum() -> None:
    w = torch.tensor([1.0, 1.001, 1.002, 1.003])  # one number in bfloat16: ties go to the lower index
    v = admm.initial(torch.zeros(4), *GROUPING, torch.bfloat16)
    weight, kept = admm.projected(w, v, *GROUPING)
    assert kept.tolist() == [True, True, False, False]
    assert same_bits(weight, torch.where(kept, w, 0.0))


def test_primal_sums_are_the_squared_distance_to_z_and_the_squared_norm() -> None:
    w, z = torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 2.0]])
    for dtype in (torch.float64, torch.bfloat16):
        sums = admm.primal_sums(w.to(dtype), z.to(dtype))
        assert sums.dtype == torch.float32
        assert sums.tolist() == [20.0, 13.0]
    assert w.tolist() == [[3.0, -2.0]]


def test_rounding_to_another_dtype_swaps_no_kept_place_with_a_pruned_one() -> None:
    v = torch.tensor([-1.001, 1.002, 3.0, -0.5])  # z = (0, 1.002, 3, 0), u = (1.001, 0, 0, 0.5)
    narrow = admm.recast(v, *GROUPING, torch.bfloat16)
    # The sum w + u was (1.001, 1.002, 3, 0.5); rounded, the first two tie, and the first is kept with its own sign.
    assert narrow.dtype == torch.bfloat16
    assert admm.auxiliary(narrow, *GROUPING).tolist() == [1.0, 0.0, 3.0, 0.0]
    assert admm.dual(narrow, *GROUPING).tolist() == [0.0, 1.0, 0.0, 0.5]


def test_a_wider_dtype_changes_nothing(w: Tensor, u: Tensor) -> None:
    v, z, dual = state(w, u)
    wide = admm.recast(v, *GROUPING, torch.float64)
    assert torch.equal(admm.auxiliary(wide, *GROUPING), z.double())
    assert torch.equal(admm.dual(wide, *GROUPING), dual.double())


def test_rescaling_scales_the_dual_and_leaves_z(w: Tensor, u: Tensor) -> None:
    v, z, dual = state(w, u)
    admm.rescale(v, *GROUPING, 0.25)
    assert torch.equal(admm.auxiliary(v, *GROUPING), z)
    assert torch.equal(admm.dual(v, *GROUPING), 0.25 * dual)


def test_a_mask_of_the_pattern_keeps_as_many_as_it_says_in_every_group_along_its_dimension() -> None:
    kept = torch.tensor([True, True, False, False]).repeat(8, 2)
    assert admm.is_mask_of(kept, PATTERN, 1)
    assert not admm.is_mask_of(kept, PATTERN, 0)
    for all_or_none in (True, False):
        other = kept.clone()
        other[7, 4:] = all_or_none  # the last group
        assert not admm.is_mask_of(other, PATTERN, 1)
