"""C on a CPU: each pass reads and writes memory once, on as many threads as torch uses.

The source beside this module is compiled by the system's C compiler, for each pair of dtypes and each pattern, when an
optimizer is built: one or two seconds, once on a machine, because the libraries are kept. What it has no code for
(float64, strides with gaps, groups above 1024) goes to the eager backend, which gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..factors import Factor, Root, dense, stored
from ..masks import PACKED, packed_shape
from ..pattern import Pattern
from . import eager
from ._build import NO_COMPILER, CompileError, compiler, load

__all__ = [
    "add_penalty",
    "advance",
    "advance_hidden",
    "advance_mask",
    "conceal",
    "keep_only",
    "missing",
    "prepare",
    "pull",
    "restore",
    "reveal",
    "shrink",
]

_log = logging.getLogger("admm_nxm")
_SOURCE = Path(__file__).with_name("native.c")
_KINDS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 15}
_WIDEST_GROUP = 1024  # a chunk of eight groups must fit on the caller's stack
_PER_THREAD = 1 << 16  # entries below which another thread costs more than it saves


class _Job(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("packed", ctypes.c_int64),
    ]


class _Option(ctypes.Structure):
    _fields_ = [
        ("scalar", ctypes.c_double),
        ("figures", ctypes.c_void_p),
        ("with_dual", ctypes.c_int64),
        ("seeded", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("roots", ctypes.c_int64),
    ]


def missing() -> str | None:
    """Return why this backend does not work here, or None if it does."""
    if compiler() is None:
        return NO_COMPILER
    return _trial()


@functools.cache
def _trial() -> str | None:
    try:
        load(_SOURCE, ["WEIGHT=32", "STATE=32"])
    except CompileError as error:
        # There is a compiler, so it was to be expected that it works.
        warnings.warn(
            f"the native kernels could not be built, so the slower eager ones are used: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return str(error)
    return None


def prepare(weight: Tensor, state: torch.dtype, pattern: Pattern) -> None:
    """Compile what a weight will need."""
    state = state if state in _KINDS else weight.dtype
    if weight.dtype in _KINDS:
        _passes(weight.dtype, state)
        if pattern.group <= _WIDEST_GROUP:
            _grouped(weight.dtype, state, pattern.group, pattern.keep)


def add_penalty(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], consensus: Sequence[Tensor], rho: float
) -> None:
    """See :func:`admm_nxm.kernels.eager.add_penalty`; rounds once, at the end."""
    left = _run("add_penalty", zip(gradients, weights, consensus, strict=True), rho)
    for g, w, v in left:
        eager.add_penalty([g], [w], [v], rho)


def pull(weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
    """See :func:`admm_nxm.kernels.eager.pull`, which is one pass over memory already where the dtypes are equal."""
    pairs = list(zip(weights, consensus, strict=True))
    eager.pull(*_unzipped([(w, v) for w, v in pairs if w.dtype == v.dtype]), fraction)
    left = _run("pull", [(w, v) for w, v in pairs if w.dtype != v.dtype], fraction)
    eager.pull(*_unzipped(left), fraction)


def reveal(weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
    """See :func:`admm_nxm.kernels.eager.reveal`."""
    for w, h in _run("reveal", zip(weights, hidden, strict=True)):
        eager.reveal([w], [h])


def conceal(weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
    """See :func:`admm_nxm.kernels.eager.conceal`."""
    for w, h in _run("conceal", zip(weights, hidden, strict=True), fraction):
        eager.conceal([w], [h], fraction)


def shrink(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """See :func:`admm_nxm.kernels.eager.shrink`."""
    for w, mask in _run("shrink", zip(weights, masks, strict=True), divisor):
        eager.shrink([w], [mask], divisor)


def restore(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """See :func:`admm_nxm.kernels.eager.restore`."""
    for w, mask in _run("restore", zip(weights, masks, strict=True), divisor):
        eager.restore([w], [mask], divisor)


def keep_only(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """See :func:`admm_nxm.kernels.eager.keep_only`."""
    for t, mask in _run("keep_only", zip(tensors, masks, strict=True)):
        eager.keep_only([t], [mask])


def advance(
    weight: Tensor,
    consensus: Tensor,
    pattern: Pattern,
    dim: int,
    with_dual: bool,
    dual_scale: float,
    seed: int | None = None,
) -> Tensor:
    """See :func:`admm_nxm.kernels.eager.advance`."""
    # The noise goes by the place in the tensor, which is that in memory only if rows follow each other.
    if seed is None or weight.is_contiguous():
        option = _Option(dual_scale, None, with_dual, seed is not None, seed or 0)
        figures = _run_grouped("advance", weight, consensus, None, pattern, dim, option)
        if figures is not None:
            return figures
    return eager.advance(weight, consensus, pattern, dim, with_dual, dual_scale, seed)


def advance_hidden(weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """See :func:`admm_nxm.kernels.eager.advance_hidden`."""
    factor, option = _read(factor)
    figures = _run_grouped("advance_hidden", weight, hidden, stored(factor), pattern, dim, option)
    return eager.advance_hidden(weight, hidden, pattern, dim, factor) if figures is None else figures


def advance_mask(weight: Tensor, mask: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """See :func:`admm_nxm.kernels.eager.advance_mask`."""
    factor, option = _read(factor)
    figures = _run_grouped("advance_mask", weight, mask, stored(factor), pattern, dim, option)
    return eager.advance_mask(weight, mask, pattern, dim, factor) if figures is None else figures


def _unzipped(pairs: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _read(factor: Factor | None) -> tuple[Factor | None, _Option]:
    """Return the factor in a form that C can read, and what it must know of it."""
    if isinstance(factor, Root):
        if factor.roots and factor.base.dtype == torch.float32:
            return factor, _Option(roots=factor.roots)
        factor = dense(factor)
    return factor, _Option()


# ------------------------------------------------------------------ calling C


@functools.cache
def _passes(weight: torch.dtype, state: torch.dtype) -> ctypes.CDLL | None:
    return _load([f"WEIGHT={_KINDS[weight]}", f"STATE={_KINDS[state]}"])


@functools.cache
def _grouped(weight: torch.dtype, state: torch.dtype, group: int, keep: int) -> ctypes.CDLL | None:
    return _load([f"WEIGHT={_KINDS[weight]}", f"STATE={_KINDS[state]}", f"GROUP={group}", f"KEEP={keep}"])


def _load(definitions: list[str]) -> ctypes.CDLL | None:
    """None where the compiler lacks a dtype (float16 in older ones): the eager backend does it then."""
    try:
        return load(_SOURCE, definitions)
    except CompileError as error:
        _log.warning("no native kernels for %s, the eager ones are used: %s", ", ".join(definitions), error)
        return None


def _run(name: str, tuples: Iterable[tuple[Tensor, ...]], scalar: float = 0.0) -> list[tuple[Tensor, ...]]:
    """Do a pass without groups on all weights at once; return those that it cannot do."""
    left, alike = [], {}  # type: ignore[var-annotated]
    for tensors in tuples:
        dtypes = _dtypes_of(tensors)
        library = None if dtypes is None else _passes(*dtypes)
        if library is None:
            left.append(tensors)
        elif tensors[0].numel():
            alike.setdefault(dtypes, (library, []))[1].append(tensors)
    for library, group in alike.values():
        block = int(library.block_size())
        jobs, starts = (_Job * len(group))(), (ctypes.c_int64 * (len(group) + 1))()
        for i, tensors in enumerate(group):
            count = tensors[0].numel()
            pointers = [t.data_ptr() for t in tensors] + [None] * (3 - len(tensors))
            jobs[i] = _Job(*pointers, count, 1, 1, tensors[1].dtype == PACKED)
            blocks = (count + block - 1) // block
            starts[i + 1] = starts[i] + blocks
        entries = sum(tensors[0].numel() for tensors in group)
        call = getattr(library, f"run_{name}")
        option = _Option(scalar)
        call(jobs, starts, ctypes.c_int64(len(group)), ctypes.byref(option), ctypes.c_int64(_threads(entries)))
        for tensors in group:
            # Autograd must notice that what it saved has changed, as after any operation of torch.
            torch.autograd.graph.increment_version(tensors[0])
    return left


def _dtypes_of(tensors: tuple[Tensor, ...]) -> tuple[torch.dtype, torch.dtype] | None:
    """Dtypes of weight and state (the weight's own where that is a mask); None if this backend cannot pass over them.

    The order of entries is that of memory, so all must have the same one, without gaps.
    """
    weight, state = tensors[0], tensors[-1]
    if any(t.device.type != "cpu" or t.layout != torch.strided for t in tensors):
        return None  # eager says what is wrong; an address would be taken for one of this memory
    if weight.dtype not in _KINDS or any(t.dtype != weight.dtype for t in tensors[:-1]):
        return None
    if state.dtype == PACKED:
        fits = weight.ndim > 0 and weight.shape[-1] % 8 == 0 and state.shape == packed_shape(weight.shape)
        return (weight.dtype, weight.dtype) if fits and weight.is_contiguous() and state.is_contiguous() else None
    if any(not _laid_out_alike(weight, t) for t in tensors) or _memory(weight, 0) is None:
        return None
    if state.dtype == torch.bool:
        return weight.dtype, weight.dtype
    return (weight.dtype, state.dtype) if state.dtype in _KINDS else None


def _run_grouped(
    name: str, weight: Tensor, state: Tensor, factor: Tensor | None, pattern: Pattern, dim: int, option: _Option
) -> Tensor | None:
    """Do a pass with groups on one weight; None if it cannot be done."""
    dtypes = _dtypes_of((weight, state))
    sizes = _memory(weight, dim)
    if weight.shape[dim] % pattern.group:
        return None  # eager says what is wrong
    if dtypes is None or sizes is None or pattern.group > _WIDEST_GROUP or not weight.numel():
        return None
    if factor is not None and (factor.dtype != torch.float32 or not _laid_out_alike(weight, factor)):
        return None
    library = _grouped(*dtypes, pattern.group, pattern.keep)
    if library is None:
        return None
    job = _Job(weight.data_ptr(), state.data_ptr(), None if factor is None else factor.data_ptr(), *sizes)
    job.packed = state.dtype == PACKED
    figures = (ctypes.c_double * 4)()
    threads = ctypes.c_int64(_threads(weight.numel()))
    if getattr(library, f"run_{name}")(ctypes.byref(job), ctypes.byref(option), threads, figures):
        raise MemoryError(f"no memory for the sums over a weight of shape {tuple(weight.shape)}")
    return torch.tensor(list(figures), dtype=torch.float32)


def _laid_out_alike(t: Tensor, other: Tensor) -> bool:
    """Whether entries of the same index lie at the same place in memory; dimensions of size 1 may have any stride."""
    if t.shape != other.shape or t.device != other.device:
        return False
    sizes = zip(t.shape, t.stride(), other.stride(), strict=True)
    return all(mine == theirs for size, mine, theirs in sizes if size != 1)


def _memory(t: Tensor, dim: int) -> tuple[int, int, int] | None:
    """Sizes outside of, along and inside of a dimension in the order of memory; None if that has gaps or repeats."""
    order = sorted(range(t.ndim), key=lambda d: (t.stride(d), -d), reverse=True)
    expected = 1
    for d in reversed(order):
        if t.shape[d] != 1 and t.stride(d) != expected:
            return None
        expected *= t.shape[d]
    place = order.index(dim % t.ndim)
    outer = inner = 1
    for d in order[:place]:
        outer *= t.shape[d]
    for d in order[place + 1 :]:
        inner *= t.shape[d]
    return outer, t.shape[dim], inner


def _threads(entries: int) -> int:
    return max(1, min(torch.get_num_threads(), entries // _PER_THREAD))
