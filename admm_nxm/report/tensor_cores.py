"""Can sparse tensor cores take a weight through torch's semi-structured tensors, and if not, why not.

Torch's two backends compress a matrix of shape (output, input) along its inputs, each for some dtypes and for multiples
of some shape only. Here everything is read off the weight; :mod:`admm_nxm.export.semi_structured` looks at the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ..pattern import Pattern

__all__ = ["BACKENDS", "Backend", "hardware_pattern", "implies", "obstacle", "obstacles", "shape_multiples"]

Backend = Literal["cutlass", "cusparselt"]

BACKENDS: tuple[Backend, ...] = ("cutlass", "cusparselt")
"""The backends of torch's semi-structured tensors."""

_TWO_OF_FOUR, _ONE_OF_TWO = Pattern(2, 4), Pattern(1, 2)

# Multiples that a weight of shape (output, input) needs, as torch has them up to 2.13, in a private attribute.
_MULTIPLES: Mapping[Backend, Mapping[torch.dtype, tuple[int, int]]] = {
    "cutlass": {
        torch.int8: (16, 128),
        **dict.fromkeys((torch.float16, torch.bfloat16), (32, 64)),
        torch.float32: (32, 32),
    },
    "cusparselt": {
        **dict.fromkeys((torch.float8_e4m3fn, torch.int8), (32, 32)),
        **dict.fromkeys((torch.float16, torch.bfloat16), (16, 16)),
    },
}


def shape_multiples(backend: Backend) -> dict[torch.dtype, tuple[int, int]]:
    """Return dtype -> (multiple of the outputs, multiple of the inputs) for each dtype that a backend takes.

    Raises:
        ValueError: no such backend.

    >>> [shape_multiples(backend)[torch.bfloat16] for backend in BACKENDS]
    [(32, 64), (16, 16)]
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    return dict(_MULTIPLES[backend])


def hardware_pattern(dtype: torch.dtype) -> Pattern:
    """Return the pattern that sparse tensor cores compute with in a dtype: 1:2 in float32 and 2:4 in narrower ones.

    >>> str(hardware_pattern(torch.float16)), str(hardware_pattern(torch.float32))
    ('2:4', '1:2')
    """
    # In float32, torch packs pairs and drops the second of two non-zeros without a word.
    return _ONE_OF_TWO if dtype == torch.float32 else _TWO_OF_FOUR


def implies(pattern: Pattern, required: Pattern) -> bool:
    """Return whether every weight that satisfies one pattern satisfies the one required.

    The groups of both start where the weight does; of ``required``, each has at most its ``keep`` non-zeros, however
    those of ``pattern`` lie.

    >>> two_of_four = Pattern(2, 4)
    >>> patterns = ("2:4", "1:4", "1:2", "2:8", "4:8", "4:16")
    >>> [p for p in patterns if implies(Pattern.parse(p), two_of_four)]
    ['2:4', '1:4', '1:2', '2:8']
    """
    # The two grids repeat after their least common multiple.
    for start in range(0, math.lcm(pattern.group, required.group), required.group):
        stop = start + required.group
        groups = range(start // pattern.group * pattern.group, stop, pattern.group)
        overlaps = (min(stop, first + pattern.group) - max(start, first) for first in groups)
        if sum(min(pattern.keep, overlap) for overlap in overlaps) > required.keep:
            return False
    return True


def obstacle(
    backend: Backend,
    shape: Sequence[int],
    dtype: torch.dtype,
    pattern: Pattern | str,
    dim: int = -1,
    reduction_dim: int | None = None,
) -> str | None:
    """Return why a backend cannot take a weight, with the remedy; None if it can.

    Whether the weight really holds the pattern is another question: :func:`admm_nxm.verify` counts that.

    Args:
        backend: ``"cutlass"`` or ``"cusparselt"``.
        shape: shape of the weight as it is stored.
        dtype: its dtype.
        pattern: the pattern that it holds, or its spelling.
        dim: the grouped dimension; where it is the first, the transpose is what would be compressed.
        reduction_dim: the dimension that its layer sums over; None if that is the grouped one.

    Raises:
        ValueError: no such backend, or an unknown pattern.

    >>> obstacle("cutlass", (384, 1536), torch.bfloat16, "2:4") is None
    True
    >>> obstacle("cutlass", (384, 1536), torch.float32, "2:4")
    'float32 needs 1:2, which 2:4 does not imply: cast to bfloat16 or float16'
    >>> obstacle("cutlass", (384, 48), torch.bfloat16, "2:4")
    '384 x 48 is no multiple of 32 x 64: pad the layer'
    """
    multiples = shape_multiples(backend)
    pattern = Pattern.parse(pattern)
    if len(shape) != 2:
        return f"{len(shape)} dimensions: only matrices are taken"
    if reduction_dim is not None and reduction_dim % 2 != dim % 2:
        return f"grouped along dim {dim % 2}, but the layer sums over dim {reduction_dim % 2}: prune along that one"
    name = str(dtype).removeprefix("torch.")
    if dtype not in multiples:
        return f"{name}: cast to bfloat16 or float16"
    if dtype.is_floating_point and dtype.itemsize == 1:
        return f"{name}: torch takes it in torch._scaled_mm only, not in a layer; cast to bfloat16 or float16"
    required = hardware_pattern(dtype)
    if not implies(pattern, required):
        if dtype == torch.float32 and implies(pattern, _TWO_OF_FOUR):
            return f"{name} needs {required}, which {pattern} does not imply: cast to bfloat16 or float16"
        return f"{pattern} does not imply {_TWO_OF_FOUR}: prune to {_TWO_OF_FOUR}"
    inputs, outputs = shape[dim % 2], shape[1 - dim % 2]
    of_outputs, of_inputs = multiples[dtype]
    if outputs % of_outputs or inputs % of_inputs or not outputs or not inputs:
        return f"{outputs} x {inputs} is no multiple of {of_outputs} x {of_inputs}: pad the layer"
    return None


def obstacles(
    shape: Sequence[int], dtype: torch.dtype, pattern: Pattern | str, dim: int = -1, reduction_dim: int | None = None
) -> dict[Backend, str | None]:
    """Return for each backend why it cannot take a weight, None where it can; arguments as for :func:`obstacle`.

    >>> obstacles((48, 16), torch.float16, "2:4")
    {'cutlass': '48 x 16 is no multiple of 32 x 64: pad the layer', 'cusparselt': None}
    """
    return {backend: obstacle(backend, shape, dtype, pattern, dim, reduction_dim) for backend in BACKENDS}
