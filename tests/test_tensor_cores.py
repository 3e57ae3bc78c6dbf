"""What sparse tensor cores take: against the installed torch, and patterns against all weights that satisfy them."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from admm_nxm import Pattern, project
from admm_nxm.report.tensor_cores import (
    BACKENDS,
    Backend,
    hardware_pattern,
    implies,
    obstacle,
    obstacles,
    shape_multiples,
)

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_is_that_of_the_installed_torch(backend: Backend) -> None:
    kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend.upper()}")
    installed = {
        dtype: (rule.sparse_min_rows, rule.sparse_min_cols) for dtype, rule in kind._DTYPE_SHAPE_CONSTRAINTS.items()
    }
    # Older torches know fewer dtypes; what they know is in the table.
    assert {dtype: shape_multiples(backend)[dtype] for dtype in installed} == installed


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='cublas' is unknown; choose one of 'cutlass', 'cusparselt'"):
        shape_multiples("cublas")  # type: ignore[arg-type]


# ---------------------------------------------------------------- patterns

patterns = st.sampled_from([1, 2, 3, 4, 6]).flatmap(
    lambda group: st.builds(Pattern, st.integers(1, group), st.just(group))
)


@cache
def satisfying(pattern: Pattern, length: int) -> frozenset[tuple[int, ...]]:
    groups = [bits for bits in itertools.product((0, 1), repeat=pattern.group) if sum(bits) <= pattern.keep]
    return frozenset(
        tuple(itertools.chain(*chosen)) for chosen in itertools.product(groups, repeat=length // pattern.group)
    )


@given(patterns, patterns)
def test_a_pattern_implies_another_if_all_weights_that_satisfy_it_do(pattern: Pattern, required: Pattern) -> None:
    length = math.lcm(pattern.group, required.group)
    assert implies(pattern, required) == (satisfying(pattern, length) <= satisfying(required, length))


@pytest.mark.parametrize(
    ("pattern", "of_2_4", "of_1_2"),
    [
        ("2:4", True, False),
        ("1:4", True, True),
        ("1:2", True, True),
        ("2:8", True, False),
        ("1:8", True, True),
        ("4:8", False, False),
        ("4:16", False, False),
        ("3:4", False, False),
        ("1:3", True, False),
        ("1:1", False, False),
    ],
)
def test_the_patterns_that_people_use(pattern: str, of_2_4: bool, of_1_2: bool) -> None:
    assert implies(Pattern.parse(pattern), Pattern(2, 4)) == of_2_4
    assert implies(Pattern.parse(pattern), Pattern(1, 2)) == of_1_2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.int8])
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "2:8", "4:8"])
def test_torch_keeps_all_of_a_weight_exactly_if_the_hardware_pattern_holds(pattern: str, dtype: torch.dtype) -> None:
    """In float32 torch drops the second non-zero of a pair without a word."""
    weight = project(torch.randn(64, 256), pattern)
    weight = (weight * 100).to(dtype) if dtype == torch.int8 else weight.to(dtype)
    packed, _ = sparse_semi_structured_from_dense_cutlass(weight)
    whole = torch.equal(packed[packed != 0], weight[weight != 0])
    assert whole == implies(Pattern.parse(pattern), hardware_pattern(dtype))
    assert whole == (obstacle("cutlass", weight.shape, dtype, pattern) is None)


# ---------------------------------------------------------------- shapes, dtypes, dimensions


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("shape", "cutlass", "cusparselt"),
    [
        ((32, 64), True, True),
        ((64, 32), False, True),
        ((16, 64), False, True),
        ((16, 16), False, True),
        ((8, 64), False, False),
        ((40, 128), False, False),
        ((768, 3072), True, True),
        ((30522, 384), False, False),
        ((0, 64), False, False),
        ((32, 0), False, False),
    ],
)
def test_shapes_in_16_bits(shape: tuple[int, int], cutlass: bool, cusparselt: bool, dtype: torch.dtype) -> None:
    reasons = obstacles(shape, dtype, "2:4")
    assert {backend: reason is None for backend, reason in reasons.items()} == {
        "cutlass": cutlass,
        "cusparselt": cusparselt,
    }
    # Stored the other way round and grouped along the first dimension, the transpose is what counts.
    assert obstacles(shape[::-1], dtype, "2:4", 0) == reasons


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "pattern", "reason"),
    [
        ("cusparselt", (32, 64), torch.float32, "1:2", "float32: cast to bfloat16 or float16"),
        ("cutlass", (32, 32), torch.float32, "1:2", None),
        ("cutlass", (32, 48), torch.float32, "1:2", "32 x 48 is no multiple of 32 x 32: pad the layer"),
        (
            "cutlass",
            (32, 32),
            torch.float32,
            "2:8",
            "float32 needs 1:2, which 2:8 does not imply: cast to bfloat16 or float16",
        ),
        ("cutlass", (32, 32), torch.float32, "4:8", "4:8 does not imply 2:4: prune to 2:4"),
        ("cutlass", (16, 128), torch.int8, "2:4", None),
        ("cutlass", (32, 64), torch.int8, "2:4", "32 x 64 is no multiple of 16 x 128: pad the layer"),
        ("cusparselt", (32, 32), torch.int8, "2:4", None),
        ("cutlass", (32, 64), torch.float64, "2:4", "float64: cast to bfloat16 or float16"),
        ("cutlass", (2, 32, 64), torch.bfloat16, "2:4", "3 dimensions: only matrices are taken"),
        ("cusparselt", (64,), torch.bfloat16, "2:4", "1 dimensions: only matrices are taken"),
        ("cusparselt", (32, 64), torch.bfloat16, "3:4", "3:4 does not imply 2:4: prune to 2:4"),
    ],
)
def test_reasons(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, pattern: str, reason: str) -> None:
    assert obstacle(backend, shape, dtype, pattern) == reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_8_bit_floats_are_for_scaled_products_only(backend: Backend) -> None:
    reason = obstacle(backend, (32, 64), torch.float8_e4m3fn, "2:4")
    assert reason is not None
    assert reason.startswith("float8_e4m3fn")
    assert reason.endswith("cast to bfloat16 or float16")


def test_the_grouped_dimension_must_be_the_one_that_the_layer_sums_over() -> None:
    assert obstacle("cutlass", (64, 64), torch.bfloat16, "2:4", 1, -1) is None
    assert (
        obstacle("cutlass", (64, 64), torch.bfloat16, "2:4", 0, 1)
        == "grouped along dim 0, but the layer sums over dim 1: prune along that one"
    )
