"""The projection: nearest feasible point, the reference's ties, any layout, nothing modified."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_nxm import Pattern, keep_mask, project, projection
from admm_nxm.reference import keep_list, project_list
from tests.helpers import same_bits

WIDTHS = {torch.float16: 16, torch.bfloat16: 32, torch.float32: 32, torch.float64: 64}
DTYPES = list(WIDTHS)
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
PATTERNS = [Pattern(1, 1), Pattern(1, 2), Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(4, 4), Pattern(2, 8)]
PATTERNS += [Pattern(5, 16), Pattern(16, 16), Pattern(3, 17), Pattern(8, 32), Pattern(63, 64), Pattern(7, 130)]

patterns = st.sampled_from(PATTERNS)
small_patterns = st.integers(1, 6).flatmap(lambda group: st.builds(Pattern, st.integers(1, group), st.just(group)))


def awkward(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Numbers that ``dtype`` holds, with ties, both zeros, denormals, infinities and NaN."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps
    few = [0.0, 1.0, 1.5, 2.0, info.max, info.smallest_normal, denormal, 2 * denormal, math.inf, math.nan]
    rare = st.floats(allow_nan=False, width=WIDTHS.get(dtype, 16))
    return st.sampled_from([*few, *(-value for value in few)]) | rare


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype, pattern: Pattern) -> Tensor:
    count = pattern.group * draw(st.integers(1, max(1, 32 // pattern.group)))
    values = draw(st.lists(awkward(dtype), min_size=count, max_size=count))
    return to(dtype, values)


@st.composite
def finite_case(draw: st.DrawFn, patterns: st.SearchStrategy[Pattern] = patterns) -> tuple[Tensor, Pattern]:
    pattern = draw(patterns)
    return draw(weights(torch.float32, pattern)).nan_to_num(nan=1.0, posinf=2.0, neginf=-2.0), pattern


def to(dtype: torch.dtype, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def listed(t: Tensor) -> list[float]:
    return t.to(torch.float64).flatten().tolist()


def groups_of(values: list, group: int) -> list[list]:
    return [values[first : first + group] for first in range(0, len(values), group)]


# ---------------------------------------------------------------- what a projection is


@given(finite_case())
def test_the_result_is_feasible(case: tuple[Tensor, Pattern]) -> None:
    w, pattern = case
    for group in groups_of(listed(project(w, pattern)), pattern.group):
        assert sum(value != 0 for value in group) <= pattern.keep


@given(st.sampled_from(DTYPES), patterns, st.data())
def test_projecting_twice_changes_no_bit(dtype: torch.dtype, pattern: Pattern, data: st.DataObject) -> None:
    once = project(data.draw(weights(dtype, pattern)), pattern)
    assert same_bits(project(once, pattern), once)


@given(finite_case(small_patterns))
def test_no_feasible_point_is_nearer(case: tuple[Tensor, Pattern]) -> None:
    w, pattern = case
    z = listed(project(w, pattern))
    for before, after in zip(groups_of(listed(w), pattern.group), groups_of(z, pattern.group), strict=True):
        distance = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(before, after, strict=True))
        # The best point of each support keeps w there: its distance is what the dropped entries weigh.
        squares = [Fraction(value) ** 2 for value in before]
        assert distance == min(sum(squares) - sum(support) for support in itertools.combinations(squares, pattern.keep))


@given(st.sampled_from(DTYPES), patterns, st.data())
@settings(max_examples=300)
def test_mask_and_projection_equal_the_reference_bit_for_bit(
    dtype: torch.dtype, pattern: Pattern, data: st.DataObject
) -> None:
    w = data.draw(weights(dtype, pattern))
    assert keep_mask(w, pattern).tolist() == keep_list(listed(w), pattern)
    assert same_bits(project(w, pattern), to(dtype, project_list(listed(w), pattern)))


@given(st.sampled_from(FLOAT8), patterns, st.data())
def test_eight_bit_floats_equal_the_reference(dtype: torch.dtype, pattern: Pattern, data: st.DataObject) -> None:
    w = data.draw(weights(dtype, pattern))
    assert keep_mask(w, pattern).tolist() == keep_list(listed(w), pattern)
    assert same_bits(project(w, pattern), to(dtype, project_list(listed(w), pattern)))


@given(st.integers(1, 100), st.data())
def test_both_ranking_algorithms_agree(group: int, data: st.DataObject) -> None:
    pattern = Pattern(data.draw(st.integers(1, group)), group)
    w = data.draw(weights(torch.float32, pattern))
    masks = []
    for limit in (0, 100):
        with mock.patch.object(projection, "_PAIRWISE_UP_TO", limit):
            masks.append(keep_mask(w, pattern).tolist())
    assert masks[0] == masks[1]


@given(st.sampled_from(DTYPES + FLOAT8), patterns, st.data())
def test_each_group_keeps_exactly_as_many_as_the_pattern_says(
    dtype: torch.dtype, pattern: Pattern, data: st.DataObject
) -> None:
    mask = keep_mask(data.draw(weights(dtype, pattern)), pattern)
    assert mask.dtype == torch.bool
    assert [sum(group) for group in groups_of(mask.tolist(), pattern.group)] == [pattern.keep] * (
        mask.numel() // pattern.group
    )


@pytest.mark.parametrize("group", [4, 16, 17, 64])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, math.inf, math.nan, 1e-45])
def test_among_equals_the_lower_index_is_kept(group: int, value: float) -> None:
    w = torch.full((3, group), value)
    w[1] *= torch.where(torch.arange(group) % 2 == 0, 1.0, -1.0)  # the sign breaks no tie
    keep = group // 2
    assert torch.equal(keep_mask(w, Pattern(keep, group)), (torch.arange(group) < keep).expand(3, -1))


@pytest.mark.parametrize("group", [4, 32])
def test_a_nan_outranks_infinity(group: int) -> None:
    w = torch.full((group,), math.inf)
    w[group - 1] = -math.nan
    assert keep_mask(w, Pattern(1, group)).nonzero().flatten().tolist() == [group - 1]
    assert project(w, Pattern(1, group))[group - 1].isnan()


def test_denormals_keep_their_order_where_the_processor_flushes_them() -> None:
    w = torch.tensor([1e-45, 3e-45, 2e-40, 1e-40])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no denormals")
    try:
        mask = keep_mask(w, "2:4")
    finally:
        torch.set_flush_denormal(False)
    assert mask.tolist() == [False, False, True, True]


@given(st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=16, max_size=16), st.data())
def test_a_power_of_two_scales_the_projection_exactly(values: list[float], data: st.DataObject) -> None:
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=16, max_size=16))
    scale = 2.0 ** data.draw(st.integers(-40, 40)) * data.draw(st.sampled_from([-1, 1]))
    w = torch.tensor(values) * torch.tensor(signs)
    for pattern in ("1:4", "2:4", "3:8"):
        assert torch.equal(keep_mask(w * scale, pattern), keep_mask(w, pattern))
        assert torch.equal(project(w * scale, pattern), project(w, pattern) * scale)


@pytest.mark.parametrize("pattern", ["1:1", "4:4", "16:16", "32:32"])
def test_keeping_all_changes_no_bit(pattern: str) -> None:
    w = torch.tensor([-0.0, math.nan, math.inf, -1e-45] * 8)
    assert keep_mask(w, pattern).all()
    assert same_bits(project(w, pattern), w)


@pytest.mark.parametrize("pattern", ["2:4", "4x2", Pattern(2, 4)])
def test_a_pattern_may_be_spelled_out(pattern: str | Pattern) -> None:
    assert project(torch.tensor([1.0, 4.0, -3.0, 2.0]), pattern).tolist() == [0.0, 4.0, -3.0, 0.0]


# ---------------------------------------------------------------- any dimension and memory layout

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "reversed strides": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "every second": lambda w: w.repeat_interleave(2, dim=3)[..., 1::2],
    "part of a larger one": lambda w: torch.nn.functional.pad(w, (3, 1, 1, 2))[:, :, 1:-2, 3:-1],
    "expanded": lambda w: w[:1, :, :, :1].expand(w.shape),
}


def fibres(t: Tensor, dim: int) -> list[list]:
    return t.movedim(dim, -1).reshape(-1, t.shape[dim]).tolist()


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(2, 4), Pattern(5, 20)])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimension_and_memory_layout_do_not_matter(layout: str, dim: int, pattern: Pattern) -> None:
    shape = [2, 3, 2, 3]
    shape[dim] = 20
    w = LAYOUTS[layout](torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(dim)).float())
    mask = keep_mask(w, pattern, dim)
    expected = keep_mask(w.movedim(dim, -1).contiguous(), pattern).movedim(-1, dim)
    assert mask.shape == w.shape
    assert torch.equal(mask, expected)
    assert torch.equal(keep_mask(w, pattern, dim - 4), expected)
    assert torch.equal(project(w, pattern, dim), torch.where(expected, w, 0.0))
    assert fibres(mask, dim) == [keep_list(values, pattern) for values in fibres(w, dim)]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), patterns, st.data())
def test_rearranging_other_dimensions_rearranges_the_mask(
    shape: list[int], pattern: Pattern, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= pattern.group
    w = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).half()
    order = data.draw(st.permutations(range(len(shape))))
    rearranged = keep_mask(w.permute(order), pattern, order.index(dim))
    assert torch.equal(rearranged, keep_mask(w, pattern, dim).permute(order))
    for other in set(range(len(shape))) - {dim}:
        assert torch.equal(keep_mask(w.flip(other), pattern, dim), keep_mask(w, pattern, dim).flip(other))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("pattern", ["2:4", "4:4", "5:20"])
def test_an_empty_tensor_stays_empty(shape: tuple[int, ...], pattern: str) -> None:
    dim = shape.index(0)
    w = torch.empty(shape, dtype=torch.bfloat16)
    mask, z = keep_mask(w, pattern, dim), project(w, pattern, dim)
    assert (mask.shape, mask.dtype) == (w.shape, torch.bool)
    assert (z.shape, z.dtype) == (w.shape, w.dtype)


# ---------------------------------------------------------------- no surprise


@pytest.mark.parametrize("pattern", ["2:4", "4:4", "5:20", "20:20"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_is_neither_modified_nor_shared(pattern: str, dtype: torch.dtype) -> None:
    w = torch.randn(20, 20).to(dtype)
    before = w.clone()
    for result in (project(w, pattern), keep_mask(w, pattern)):
        assert same_bits(w, before)
        result.zero_()
        assert same_bits(w, before)
    assert w._version == 0


@pytest.mark.parametrize("pattern", ["2:4", "4:4", "5:20"])
def test_mask_and_projection_are_made_on_the_device_of_the_weight(pattern: str) -> None:
    w = torch.empty(3, 20, dtype=torch.bfloat16, device="meta")
    assert keep_mask(w, pattern).device == project(w, pattern).device == w.device


@pytest.mark.parametrize("pattern", ["2:4", "4:4", "5:20"])
def test_gradients_flow_through_kept_entries_only(pattern: str) -> None:
    w = torch.randn(3, 20, requires_grad=True)
    mask = keep_mask(w, pattern)
    assert not mask.requires_grad
    upstream = torch.randn(3, 20)
    (project(w, pattern) * upstream).sum().backward()
    assert torch.equal(w.grad, torch.where(mask, upstream, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_entries_are_positive_zeros_of_the_same_dtype(dtype: torch.dtype) -> None:
    z = project(torch.tensor([-3.0, -2.0, -1.0, -0.5]).to(dtype), "2:4")
    assert z.dtype == dtype
    assert z.signbit().tolist() == [True, True, False, False]


# ---------------------------------------------------------------- bad input

both = pytest.mark.parametrize("function", [keep_mask, project])


@both
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (torch.ones(4, dtype=torch.int8), "torch.int8"),
        (torch.ones(4, dtype=torch.bool), "torch.bool"),
        (torch.ones(4, dtype=torch.complex64), "torch.complex64"),
        ([1.0, 2.0, 3.0, 4.0], "list"),
        (None, "NoneType"),
    ],
    ids=["int8", "bool", "complex", "list", "None"],
)
def test_what_is_no_floating_point_tensor_is_refused(function: Callable, bad: object, named: str) -> None:
    with pytest.raises(TypeError, match=f"cannot project {named}: a floating-point tensor is needed"):
        function(bad, "2:4")


@both
def test_a_sparse_tensor_is_refused_with_the_remedy(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo: convert it with .to_dense\(\)"):
        function(torch.eye(4).to_sparse(), "2:4")


@both
@pytest.mark.parametrize(("shape", "dim"), [((4, 4), 2), ((4, 4), -3), ((), 0), ((), -1)])
def test_a_dimension_out_of_range_is_refused(function: Callable, shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(
        IndexError, match=rf"dim={dim} is out of range for a tensor of shape \({', '.join('4' * len(shape))}\)"
    ):
        function(torch.ones(shape), "2:4", dim)


@both
@pytest.mark.parametrize(("dim", "width", "counted"), [(-1, 6, 1), (1, 6, 1), (0, 5, 0), (-2, 5, 0)])
def test_a_width_that_is_no_multiple_of_the_group_is_refused(
    function: Callable, dim: int, width: int, counted: int
) -> None:
    with pytest.raises(
        ValueError,
        match=rf"width {width} \(dim {counted} of shape \(5, 6\)\) is no multiple of group=4; choose another pattern .*"
        "leave this weight dense$",
    ):
        function(torch.ones(5, 6), "2:4", dim)


@both
def test_a_width_is_refused_even_where_all_would_be_kept(function: Callable) -> None:
    with pytest.raises(ValueError, match="no multiple of group=4"):
        function(torch.ones(6), "4:4")


@both
def test_a_bad_pattern_is_refused(function: Callable) -> None:
    with pytest.raises(ValueError, match='write "2:4"'):
        function(torch.ones(4), "4:2")
    with pytest.raises(TypeError, match="a Pattern or a string"):
        function(torch.ones(4), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nans_of_every_make_are_one_and_go_by_their_place(dtype: torch.dtype) -> None:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    infinity = torch.tensor(float("inf"), dtype=dtype).view(integer).item()
    largest = torch.iinfo(integer).max
    makes = torch.tensor([infinity + 1, largest, infinity, largest, -1, infinity + 2], dtype=integer).view(dtype)
    assert makes.isnan().tolist() == [True, True, False, True, True, True]
    assert keep_mask(makes, "2:6").tolist() == [True, True, False, False, False, False]
    assert keep_mask(makes[2:], "3:4").tolist() == [False, True, True, True]
