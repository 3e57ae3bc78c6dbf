"""The fast paths against the plain loops of the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_nxm import Pattern
from admm_nxm import consensus as admm
from admm_nxm.kernels import backend_for, eager
from admm_nxm.reference import ReferenceADMM, keep_list, project_list, round_to
from admm_nxm.schedules import Constant, Every, Plan, Update
from tests.helpers import same_bits

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(5, 16), Pattern(4, 4), Pattern(3, 20)]


def awkward(generator: torch.Generator, count: int, dtype: torch.dtype, infinities: bool) -> Tensor:
    """Values with many ties, both zeros, denormals and huge numbers among them."""
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 8, (count,), generator=generator)
    grid = torch.randint(-3, 4, (count,), generator=generator).double() / 2
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.where(kind == 0, grid, values)
    values = torch.where(kind == 1, grid.sign() * 1.0, values)
    values = torch.where(kind == 2, torch.zeros_like(values), values)
    values = torch.where(kind == 3, -torch.zeros_like(values), values)
    values = torch.where(kind == 4, grid * tiny / 8, values)
    if infinities:
        rare = torch.randint(0, 12, (count,), generator=generator)
        values = torch.where(rare == 0, values.sign() * float("inf"), values)
        values = torch.where(values.isnan(), torch.zeros_like(values), values)
    return values.to(dtype)


def tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def run_both(
    seed: int, dtypes: tuple[torch.dtype, torch.dtype], pattern: Pattern, updates: int, infinities: bool
) -> None:
    """Move w at random between updates, and compare z, u, mask and the projected weight after each."""
    dtype, state_dtype = dtypes
    generator = torch.Generator().manual_seed(seed)
    count = pattern.group * 4
    w = awkward(generator, count, dtype, infinities)
    reference = ReferenceADMM(w, pattern, Plan(Constant(1.0), Every(1), None), lr=0.0, state_dtype=state_dtype)
    v = admm.initial(w, pattern, 0, state_dtype)
    for _ in range(updates):
        w = torch.where(torch.rand(count, generator=generator) < 0.5, w, awkward(generator, count, dtype, infinities))
        reference.w = [float(value) for value in w.tolist()]
        kind = Update.AUXILIARY if torch.rand((), generator=generator) < 0.2 else Update.AUXILIARY_AND_DUAL
        old_z, old_mask = admm.auxiliary(v, pattern, 0), admm.mask(v, pattern, 0)
        scale = 1.0 if torch.rand((), generator=generator) < 0.5 else 0.7
        reference.rho, reference.plan = scale, Plan(Constant(1.0), Every(1), None)
        reference.update(kind)
        figures = backend_for(w.device).advance(w, v, pattern, 0, kind is Update.AUXILIARY_AND_DUAL, scale)

        assert same_bits(admm.auxiliary(v, pattern, 0), tensor(reference.z, state_dtype))
        assert same_bits(admm.dual(v, pattern, 0), tensor(reference.u, state_dtype))
        mask = admm.mask(v, pattern, 0)
        held = [z != 0 for z in reference.z]
        assert all(kept or not nonzero for kept, nonzero in zip(mask.tolist(), held, strict=True))
        assert int(mask.sum()) == pattern.keep * 4
        wide, kept = admm.projected(w, v, pattern, 0)
        expected = ReferenceADMM(w, pattern, reference.plan, lr=0.0, state_dtype=state_dtype)
        expected.z, expected.u = reference.z, reference.u
        expected.freeze()
        assert kept.tolist() == expected.mask
        assert same_bits(wide, tensor(expected.w, dtype))
        gained = int((mask & ~old_mask).sum())
        assert figures[2:].tolist() == [gained, int(mask.sum())]
        if not infinities:
            moved = (admm.auxiliary(v, pattern, 0).double() - old_z.double()).square().sum()
            torch.testing.assert_close(figures[0].double(), moved, rtol=1e-5, atol=0)
            torch.testing.assert_close(figures[1].double(), w.double().square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_update_equals_two_buffer_reference_over_50_updates(
    dtypes: tuple[torch.dtype, torch.dtype], pattern: Pattern
) -> None:
    run_both(0, dtypes, pattern, updates=50, infinities=False)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), dtypes=st.sampled_from(DTYPES), pattern=st.sampled_from(PATTERNS), inf=st.booleans())
def test_update_equals_reference_on_awkward_values(
    seed: int, dtypes: tuple[torch.dtype, torch.dtype], pattern: Pattern, inf: bool
) -> None:
    run_both(seed, dtypes, pattern, updates=4, infinities=inf)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_update_works_along_any_dimension_without_copying_the_weight(dim: int) -> None:
    pattern = Pattern(1, 4)
    base = torch.randn(4, 8, 12)
    w = base.transpose(0, 2).contiguous().transpose(0, 2)  # same values, other strides
    v = admm.initial(w, pattern, dim, torch.float32)
    assert v.stride() == w.stride()
    flat_w = w.movedim(dim, -1).reshape(-1)
    flat_v = admm.initial(flat_w, pattern, 0, torch.float32)
    for _ in range(3):
        change = torch.randn_like(base)
        w = w + change
        flat_w = w.movedim(dim, -1).reshape(-1)
        eager.advance(w, v, pattern, dim, True, 1.0)
        eager.advance(flat_w, flat_v, pattern, 0, True, 1.0)
        assert same_bits(v.movedim(dim, -1).reshape(-1), flat_v)


@pytest.mark.parametrize("dtypes", [*DTYPES[:4], (torch.float64, torch.float64)])
def test_penalty_is_within_two_roundings_of_exact(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, state_dtype = dtypes
    g, w = torch.randn(3, 64, dtype=dtype), torch.randn(3, 64, dtype=dtype)
    v = torch.randn(3, 64).to(state_dtype)
    exact = g.double() + 0.37 * (w.double() - v.double())
    bound = 2 * torch.finfo(dtype).eps * (g.double().abs() + 0.37 * (w.double().abs() + v.double().abs()))
    eager.add_penalty([g], [w], [v], 0.37)
    assert ((g.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtypes", DTYPES[:4])
def test_pull_is_within_two_roundings_of_exact(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, state_dtype = dtypes
    for fraction in (0.001, 0.3, 0.7, 1.0):
        w, v = torch.randn(3, 64, dtype=dtype), torch.randn(3, 64).to(state_dtype)
        exact = w.double() + fraction * (v.double() - w.double())
        bound = 2 * torch.finfo(dtype).eps * (w.double().abs() + v.double().abs())
        eager.pull([w], [v], fraction)
        assert ((w.double() - exact).abs() <= bound).all()


def test_penalty_adds_nothing_where_weight_and_consensus_agree() -> None:
    g = torch.randn(64).bfloat16()
    before, w = g.clone(), torch.randn(64).bfloat16() * 1000
    eager.add_penalty([g], [w], [w.clone()], 123.0)
    assert same_bits(g, before)


def test_keep_only_writes_positive_zeros_over_anything() -> None:
    t = torch.tensor([float("nan"), -1.0, float("inf"), -0.0])
    eager.keep_only(t, torch.tensor([False, True, False, False]))
    assert same_bits(t, torch.tensor([0.0, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_recast_keeps_meaning_when_rounding_makes_ties(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(3)
    w = 1 + torch.rand(pattern.group * 50, generator=generator) / 100  # many ties in bfloat16
    v = admm.initial(w, pattern, 0, torch.float32)
    for _ in range(3):
        eager.advance(w + torch.randn(w.shape, generator=generator) / 1000, v, pattern, 0, True, 1.0)
    narrow = admm.recast(v, pattern, 0, torch.bfloat16)
    a = (admm.auxiliary(v, pattern, 0) + admm.dual(v, pattern, 0)).bfloat16()
    assert same_bits(admm.auxiliary(narrow, pattern, 0) + admm.dual(narrow, pattern, 0), a)
    kept = keep_list([float(value) for value in a.tolist()], pattern)
    assert admm.mask(narrow, pattern, 0).tolist() == kept


def test_initial_state_is_the_projection_with_zero_dual() -> None:
    w = torch.randn(6, 16)
    v = admm.initial(w, Pattern(2, 8), 1, torch.float32)
    flat = [value for row in w.tolist() for value in project_list(row, Pattern(2, 8))]
    assert v.flatten().tolist() == flat
    assert not admm.dual(v, Pattern(2, 8), 1).any()


def test_mask_is_a_consensus_with_that_mask() -> None:
    mask = admm.mask(torch.randn(4, 16), Pattern(3, 8), 1)
    assert admm.mask(mask, Pattern(3, 8), 1) is mask
    assert torch.equal(admm.mask(mask.float(), Pattern(3, 8), 1), mask)
    assert bool(admm.is_mask_of(mask, Pattern(3, 8), 1))
    assert not bool(admm.is_mask_of(mask, Pattern(2, 8), 1))


def test_rounding_of_the_reference_is_that_of_torch() -> None:
    assert round_to(torch.bfloat16, 1 + 2**-9) == 1.0
    assert round_to(torch.float16, 1e9) == float("inf")
    assert round_to(torch.float32, 0.1) == float(torch.tensor(0.1))
