"""The fast paths against the plain loops of the reference, bit for bit, and the backends against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_nxm import Pattern, keep_mask
from admm_nxm import consensus as admm
from admm_nxm.forms import form_of
from admm_nxm.kernels import Backend, eager, native
from admm_nxm.masks import PACKED, stored_as, unpack
from admm_nxm.reference import ReferenceADMM, keep_list, project_list, round_to
from admm_nxm.schedules import Constant, Every, Plan, Update
from tests.helpers import same_bits

# Weight and state; a state narrower than the weight rounds, overflows and underflows.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
]
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(5, 16), Pattern(4, 4), Pattern(3, 20)]

every_backend = pytest.mark.parametrize(
    "backend",
    [eager, pytest.param(native, marks=pytest.mark.skipif(native.missing() is not None, reason="no C compiler"))],
    ids=["eager", "native"],
)
# The native backend compiles each pair: all dtypes with one pattern, and all patterns with one pair of dtypes.
CASES = [(dtypes, PATTERNS[0]) for dtypes in DTYPES] + [(DTYPES[0], pattern) for pattern in PATTERNS[1:]]


def awkward(generator: torch.Generator, count: int, dtype: torch.dtype, infinities: bool, nans: bool = False) -> Tensor:
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
    if nans:
        rare = torch.randint(0, 12, (count,), generator=generator)
        values = torch.where(rare == 0, torch.full_like(values, float("nan")), values)
    return values.to(dtype)


def tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def run_both(
    backend: Backend,
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    pattern: Pattern,
    updates: int,
    infinities: bool,
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
        figures = backend.advance(w, v, pattern, 0, kind is Update.AUXILIARY_AND_DUAL, scale)

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
            least = count * torch.finfo(figures.dtype).tiny  # squares below what the figures' dtype holds are lost
            torch.testing.assert_close(figures[0].double(), moved, rtol=1e-5, atol=least)
            torch.testing.assert_close(figures[1].double(), w.double().square().sum(), rtol=1e-5, atol=least)


def case_id(case: tuple[tuple[torch.dtype, torch.dtype], Pattern]) -> str:
    (dtype, state_dtype), pattern = case
    return f"{dtype}-{state_dtype}-{pattern}".replace("torch.", "")


@every_backend
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_update_equals_two_buffer_reference_over_50_updates(
    case: tuple[tuple[torch.dtype, torch.dtype], Pattern], backend: Backend
) -> None:
    run_both(backend, 0, *case, updates=50, infinities=False)


@every_backend
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), case=st.sampled_from(CASES), inf=st.booleans())
def test_update_equals_reference_on_awkward_values(
    backend: Backend, seed: int, case: tuple[tuple[torch.dtype, torch.dtype], Pattern], inf: bool
) -> None:
    run_both(backend, seed, *case, updates=4, infinities=inf)


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_update_in_plain_torch_equals_reference_for_every_other_pair(
    dtypes: tuple[torch.dtype, torch.dtype], pattern: Pattern
) -> None:
    run_both(eager, 0, dtypes, pattern, updates=20, infinities=False)


# ---------------------------------------------------------------- the lazy form


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that a NaN equals any other."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5))


def values_of(t: Tensor) -> list[float]:
    return [float(value) for value in t.tolist()]


def times(value: float, factor: float, dtype: torch.dtype) -> float:
    """As torch multiplies by a Python number: in float32 for dtypes up to that, then rounded."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return round_to(dtype, round_to(compute, value * round_to(compute, factor)))


def hidden_list(w: list[float], kept: list[bool], dtype: torch.dtype) -> list[float]:
    """w off the mask, with zeros that say so, and +0.0 on it."""
    return [0.0 if k else round_to(dtype, value) or -0.0 for value, k in zip(w, kept, strict=True)]


def run_lazy(
    backend: Backend,
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    pattern: Pattern,
    updates: int,
    wild: bool,
    weighted: bool,
) -> None:
    """Conceal, reveal and advance by turns, with w moved at random in between, against lists."""
    dtype, state_dtype = dtypes
    generator = torch.Generator().manual_seed(seed)
    count = pattern.group * 4

    def draw() -> Tensor:
        return awkward(generator, count, dtype, infinities=wild, nans=wild)

    def moved(w: Tensor) -> Tensor:
        return torch.where(torch.rand(count, generator=generator) < 0.5, w, draw())

    w, bystander = draw(), draw()
    kept = keep_list(values_of(w), pattern)
    h = form_of("lazy", full=True).initial(w, pattern, 0, state_dtype)
    beside = form_of("lazy", full=True).initial(bystander, pattern, 0, state_dtype)
    assert alike(h, tensor(hidden_list(values_of(w), kept, state_dtype), state_dtype))
    for fraction in [0.0, 0.03, 0.5, 1000 / 1001, 1.0][:updates] + [0.7] * (updates - 5):
        # w is kept aside, and the model is shown a smaller one.
        expected, hidden = values_of(w), hidden_list(values_of(w), kept, state_dtype)
        shown = [x if k or not fraction else times(x, 1 - fraction, dtype) for x, k in zip(expected, kept, strict=True)]
        backend.conceal([bystander, w], [beside, h], fraction)
        assert alike(w, tensor(shown, dtype))
        assert alike(h, tensor(hidden, state_dtype))
        # Whatever becomes of the shown one, w comes back off the mask; on it, the model holds w itself.
        held = moved(w)
        revealed = [x if k else round_to(dtype, y) for x, y, k in zip(values_of(held), hidden, kept, strict=True)]
        w.copy_(held)
        backend.reveal([bystander, w], [beside, h])
        assert alike(w, tensor(revealed, dtype))
        assert eager.hidden_mask(h).tolist() == kept
        # The mask becomes that of the scores.
        w = moved(w)
        factor = awkward(generator, count, torch.float32, infinities=False).abs() if weighted else None
        w[w.isnan()] = float("nan")  # NaNs of several makes have an order of their own
        if factor is not None:
            factor.masked_fill_(w.isinf() & (factor == 0), 1.0)
        scores = values_of(w)
        if factor is not None:
            scores = [
                round_to(torch.float32, round_to(torch.float32, x) * f)
                for x, f in zip(scores, values_of(factor), strict=True)
            ]
        before, old = w.clone(), kept
        kept = keep_list(scores, pattern)
        figures = backend.advance_hidden(w, h, pattern, 0, factor)
        assert same_bits(w.nan_to_num(nan=0.5), before.nan_to_num(nan=0.5))
        assert eager.hidden_mask(h).tolist() == kept
        assert alike(h, tensor(hidden_list(values_of(w), kept, state_dtype), state_dtype))
        assert figures[2:].tolist() == [sum(k and not o for k, o in zip(kept, old, strict=True)), sum(kept)]
        if not wild:
            changed = torch.tensor([k != o for k, o in zip(kept, old, strict=True)])
            sums = torch.stack([w.double()[changed].square().sum(), w.double().square().sum()])
            torch.testing.assert_close(figures[:2].double(), sums, rtol=1e-5, atol=1e-37)


LAZY_DTYPES = [*DTYPES, (torch.float32, torch.float16), (torch.float64, torch.float64)]


LAZY_CASES = [(dtypes, PATTERNS[0]) for dtypes in LAZY_DTYPES] + CASES[len(DTYPES) :]


@every_backend
@pytest.mark.parametrize("weighted", [False, True], ids=["magnitude", "weighted"])
@pytest.mark.parametrize("case", LAZY_CASES, ids=case_id)
def test_lazy_passes_equal_lists_over_15_updates(
    case: tuple[tuple[torch.dtype, torch.dtype], Pattern], weighted: bool, backend: Backend
) -> None:
    run_lazy(backend, 1, *case, updates=15, wild=False, weighted=weighted)


@every_backend
@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), case=st.sampled_from(LAZY_CASES), wild=st.booleans(), weighted=st.booleans())
@example(seed=5301078, case=LAZY_CASES[0], wild=False, weighted=False)  # denormals move alone
def test_lazy_passes_equal_lists_on_awkward_values(
    backend: Backend,
    seed: int,
    case: tuple[tuple[torch.dtype, torch.dtype], Pattern],
    wild: bool,
    weighted: bool,
) -> None:
    run_lazy(backend, seed, *case, updates=5, wild=wild, weighted=weighted)


def run_lean(
    backend: Backend, seed: int, dtype: torch.dtype, pattern: Pattern, packed: bool, wild: bool, weighted: bool
) -> None:
    """Shrink, restore and advance by turns where the mask is all that is stored, against lists."""
    generator = torch.Generator().manual_seed(seed)
    count = pattern.group * 8
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> Tensor:
        return awkward(generator, count, dtype, infinities=wild, nans=wild)

    w, bystander = draw(), draw()
    kept = keep_list(values_of(w), pattern)
    stored = stored_as(keep_mask(w, pattern, 0), PACKED if packed else torch.bool)
    beside = stored_as(keep_mask(bystander, pattern, 0), stored.dtype)
    for divisor in [1.0, 1.03, 2.0, 3.7, 1001.0, 2.0**20 + 1]:
        d = round_to(compute, divisor)
        shown = [x if k else round_to(dtype, round_to(compute, x / d)) for x, k in zip(values_of(w), kept, strict=True)]
        backend.shrink([bystander, w], [beside, stored], divisor)
        assert alike(w, tensor(shown, dtype))
        restored = [x if k else times(x, d, dtype) for x, k in zip(shown, kept, strict=True)]
        backend.restore([bystander, w], [beside, stored], divisor)
        assert alike(w, tensor(restored, dtype))
        w = torch.where(torch.rand(count, generator=generator) < 0.5, w, draw())
        w[w.isnan()] = float("nan")  # NaNs of several makes have an order of their own
        factor = awkward(generator, count, torch.float32, infinities=False).abs() if weighted else None
        scores = values_of(w)
        if factor is not None:
            factor.masked_fill_(w.isinf() & (factor == 0), 1.0)
            scores = [
                round_to(torch.float32, round_to(torch.float32, x) * f)
                for x, f in zip(scores, values_of(factor), strict=True)
            ]
        old, before = kept, w.clone()
        kept = keep_list(scores, pattern)
        figures = backend.advance_mask(w, stored, pattern, 0, factor)
        assert alike(w, before)
        assert unpack(stored).tolist() == kept
        assert figures[2:].tolist() == [sum(k and not o for k, o in zip(kept, old, strict=True)), sum(kept)]
        if not wild:
            changed = torch.tensor([k != o for k, o in zip(kept, old, strict=True)])
            sums = torch.stack([w.double()[changed].square().sum(), w.double().square().sum()])
            torch.testing.assert_close(figures[:2].double(), sums, rtol=1e-5, atol=1e-37)
        only = w.clone()
        backend.keep_only([only, bystander], [stored, beside])
        assert alike(only, tensor([x if k else 0.0 for x, k in zip(values_of(w), kept, strict=True)], dtype))
        bystander = draw()


LEAN_CASES = [
    *[(dtype, PATTERNS[0]) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)],
    *[(torch.float32, pattern) for pattern in PATTERNS[1:]],
]


@every_backend
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "boolean"])
@pytest.mark.parametrize("case", LEAN_CASES, ids=lambda case: f"{case[0]}-{case[1]}".removeprefix("torch."))
def test_passes_on_the_mask_alone_equal_lists(
    case: tuple[torch.dtype, Pattern], packed: bool, backend: Backend
) -> None:
    for weighted in (False, True):
        run_lean(backend, 3, *case, packed=packed, wild=False, weighted=weighted)


@every_backend
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    case=st.sampled_from(LEAN_CASES),
    packed=st.booleans(),
    wild=st.booleans(),
    weighted=st.booleans(),
)
def test_passes_on_the_mask_alone_equal_lists_on_awkward_values(
    backend: Backend, seed: int, case: tuple[torch.dtype, Pattern], packed: bool, wild: bool, weighted: bool
) -> None:
    run_lean(backend, seed, *case, packed=packed, wild=wild, weighted=weighted)


def test_infinite_weight_of_no_consequence_is_kept_to_be_seen() -> None:
    w, h = torch.tensor([float("inf"), 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    eager.advance_hidden(w, h, Pattern(1, 4), 0, torch.tensor([0.0, 1.0, 1.0, 1.0]))  # inf * 0 is NaN
    assert eager.hidden_mask(h).tolist() == [True, False, False, False]


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 1.0]


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hidden_state_tells_its_mask_whatever_the_values(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    w = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype).repeat(2)
    mask = torch.arange(len(w)) < len(SPECIAL)
    h = eager.hide(w, mask, state_dtype)
    assert h.dtype == state_dtype
    assert torch.equal(eager.hidden_mask(h), mask)
    assert same_bits(h[mask], torch.zeros(len(SPECIAL), dtype=state_dtype))
    pruned = w[~mask].to(state_dtype)
    assert torch.equal(h[~mask].nan_to_num(nan=0.5), pruned.nan_to_num(nan=0.5))
    assert h[~mask][pruned == 0].signbit().all()


@pytest.mark.parametrize("dtypes", LAZY_DTYPES)
def test_concealing_nothing_leaves_the_weight_to_the_last_bit(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, state_dtype = dtypes
    w = awkward(torch.Generator().manual_seed(2), 64, dtype, infinities=True)
    before = w.clone()
    h = form_of("lazy", full=True).initial(w, Pattern(2, 4), 0, state_dtype)
    eager.conceal([w], [h], 0.0)
    assert same_bits(w, before)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_lazy_passes_work_along_any_dimension_without_copying_the_weight(dim: int, weighted: bool) -> None:
    pattern, lazy = Pattern(1, 4), form_of("lazy", full=True)
    w = torch.randn(4, 8, 12).transpose(0, 2).contiguous().transpose(0, 2)  # same values, other strides
    h = lazy.initial(w, pattern, dim, torch.float32)
    assert h.stride() == w.stride()
    strides = w.stride()

    def flat(t: Tensor) -> Tensor:
        return t.movedim(dim, -1).reshape(-1).clone()

    flat_w, flat_h = flat(w), lazy.initial(flat(w), pattern, 0, torch.float32)
    for _ in range(3):
        change, factor = torch.randn(4, 8, 12), torch.rand(4, 8, 12) if weighted else None
        for a, b, dimension, to in ((w, h, dim, lambda t: t), (flat_w, flat_h, 0, flat)):
            eager.conceal([a], [b], 0.3)
            eager.reveal([a], [b])
            a.add_(to(change))
            eager.advance_hidden(a, b, pattern, dimension, None if factor is None else to(factor))
        assert same_bits(flat(w), flat_w)
        assert same_bits(flat(h), flat_h)
    assert (w.stride(), h.stride()) == (strides, strides)


# ---------------------------------------------------------------- either


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
    eager.keep_only([t], [torch.tensor([False, True, False, False])])
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


def test_mask_is_told_from_what_is_none() -> None:
    mask = admm.mask(torch.randn(4, 16), Pattern(3, 8), 1)
    assert bool(admm.is_mask_of(mask, Pattern(3, 8), 1))
    assert not bool(admm.is_mask_of(mask, Pattern(2, 8), 1))


def test_rounding_of_the_reference_is_that_of_torch() -> None:
    assert round_to(torch.bfloat16, 1 + 2**-9) == 1.0
    assert round_to(torch.float16, 1e9) == float("inf")
    assert round_to(torch.float32, 0.1) == float(torch.tensor(0.1))
