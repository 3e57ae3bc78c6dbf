"""Fused Triton kernels for CUDA and ROCm: one pass over memory each, and one launch for all weights of a step.

What a function means is said in :mod:`admm_nxm.kernels.eager`. Tensors that the kernels do not take (float64, strides
with gaps, groups above 32) go there one by one, so that no result hangs on what has a kernel.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..factors import Factor, dense
from ..masks import PACKED, packed_shape
from ..pattern import Pattern
from . import eager

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

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.bool: "int8",
    PACKED: "uint8",
}
"""Triton's names; that of a mask says how it is stored."""

_LARGEST_GROUP = 32
_OLDEST_DEVICE = (8, 0)
"""Compute capability of the oldest of NVIDIA's devices that Triton supports with all three dtypes."""

_OLDEST_TRITON = (3, 6)
"""Triton flushes denormal quotients to zero before."""

_PLANS = 64
"""How many are kept; a step takes a handful."""

_OPTIONS = {"enable_fp_fusion": False}  # a fused multiply-add rounds once where torch rounds twice


def missing() -> str | None:
    """Return why the kernels cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if torch.version.hip is None:
        oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if oldest < _OLDEST_DEVICE:
            return f"a device has compute capability {oldest[0]}.{oldest[1]}; the kernels need 8.0 (Ampere) or above"
    try:
        triton = importlib.import_module("triton")
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
            return f"Triton {triton.__version__} is too old; the kernels need 3.6 or above"
        if _kernels().INTERPRETED:
            return "Triton is in interpreter mode (TRITON_INTERPRET)"
        triton.runtime.driver.active.utils  # noqa: B018 - is compiled, and what that takes may not be there
    except Exception as error:  # a broken installation raises anything
        return f"Triton does not run here ({type(error).__name__}: {error})"
    return None


def prepare(weight: Tensor, state: torch.dtype, pattern: Pattern) -> None:
    """Run what a weight will need on a few groups of zeros, see eager; does nothing the second time."""
    if weight.dtype in _FLOATS and _runs_on(weight.device):
        _warm(weight.device, weight.dtype, state, pattern)


@functools.cache
def _warm(device: torch.device, dtype: torch.dtype, state: torch.dtype, pattern: Pattern) -> None:
    width = 16 * pattern.group
    w, g = torch.zeros(2, 1, width, dtype=dtype, device=device)
    mask = torch.zeros(1, width, dtype=torch.bool, device=device)
    bits = torch.zeros(packed_shape(w.shape), dtype=PACKED, device=device)
    if state in _FLOATS:
        v = torch.zeros_like(w, dtype=state)
        add_penalty([g], [w], [v], 0.0)
        pull([w], [v], 0.0)
        reveal([w], [v])
        conceal([w], [v], 0.5)
        for seed in (None, 0):
            advance(w, v, pattern, -1, True, 1.0, seed)
        for factor in (None, w.float()):
            advance_hidden(w, v, pattern, -1, factor)
        keep_only([w], [mask])
        return
    stored = bits if state == PACKED else mask
    shrink([w], [stored], 1.0)
    restore([w], [stored], 1.0)
    keep_only([w], [stored])
    for factor in (None, w.float()):
        advance_mask(w, stored, pattern, -1, factor)


def add_penalty(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], consensus: Sequence[Tensor], rho: float
) -> None:
    """``g += rho * (w - v)``, see eager; rounded once, where eager rounds the difference too."""
    _each("add_penalty", eager.add_penalty, (gradients, weights, consensus), (rho,), (rho,))


def pull(weights: Sequence[Tensor], consensus: Sequence[Tensor], fraction: float) -> None:
    """``w += fraction * (v - w)``, see eager."""
    _each("pull", eager.pull, (weights, consensus), (fraction,), (fraction, 1.0 - fraction))


def reveal(weights: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
    """``w = hidden`` off the mask, see eager."""
    _each("reveal", eager.reveal, (weights, hidden), (), ())


def conceal(weights: Sequence[Tensor], hidden: Sequence[Tensor], fraction: float) -> None:
    """``hidden = w`` off the mask, then ``w = (1 - fraction) * w`` there, see eager."""
    _each("conceal", eager.conceal, (weights, hidden), (fraction,), (1.0 - fraction,))


def shrink(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """``w = w / divisor`` off the mask, see eager."""
    _each("scale", eager.shrink, (weights, masks), (divisor,), (divisor,), shrink=True)


def restore(weights: Sequence[Tensor], masks: Sequence[Tensor], divisor: float) -> None:
    """``w = w * divisor`` off the mask, see eager."""
    _each("scale", eager.restore, (weights, masks), (divisor,), (divisor,), shrink=False)


def keep_only(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """+0.0 off the mask, see eager."""
    _each("keep_only", eager.keep_only, (tensors, masks), (), ())


def advance(
    weight: Tensor,
    consensus: Tensor,
    pattern: Pattern,
    dim: int,
    with_dual: bool,
    dual_scale: float,
    seed: int | None = None,
) -> Tensor:
    """Do the z- and u-steps of one weight on its v, see eager; squares are summed in another order."""
    tiling = _tiling(pattern, dim, weight, consensus)
    stochastic = seed is not None and consensus.dtype == torch.bfloat16 and weight.dtype != torch.bfloat16
    # Eager counts places in the order of the indices, which is that in memory for contiguous weights alone.
    if tiling is None or (stochastic and not weight.is_contiguous()):
        return eager.advance(weight, consensus, pattern, dim, with_dual, dual_scale, seed)
    word = (seed or 0) & 0xFFFFFFFF
    numbers = (int(with_dual), -dual_scale, word - ((word >> 31) << 32))  # as the signed number of the same bits
    return _by_group("advance", tiling, (weight, consensus), numbers, stochastic=stochastic)


def advance_hidden(weight: Tensor, hidden: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """Do the z-step of one hidden state, see eager; squares are summed in another order."""
    scale = dense(factor)
    tiling = _tiling(pattern, dim, weight, hidden, scale)
    if tiling is None:
        return eager.advance_hidden(weight, hidden, pattern, dim, scale)
    tensors = (weight, hidden, weight if scale is None else scale)
    return _by_group("advance_hidden", tiling, tensors, (), weighted=scale is not None)


def advance_mask(weight: Tensor, mask: Tensor, pattern: Pattern, dim: int, factor: Factor | None) -> Tensor:
    """Do the z-step of one stored mask, see eager; squares are summed in another order."""
    scale = dense(factor)
    tiling = _tiling(pattern, dim, weight, mask, scale)
    if tiling is None:
        return eager.advance_mask(weight, mask, pattern, dim, scale)
    tensors = (weight, mask.view(torch.uint8), weight if scale is None else scale)
    return _by_group("advance_mask", tiling, tensors, (), packed=mask.dtype == PACKED, weighted=scale is not None)


# ---------------------------------------------------------------- launches


@functools.cache
def _kernels() -> ModuleType:
    """Triton takes its time to import, and need not be there."""
    return importlib.import_module("._triton", __package__)


def _runs_on(device: torch.device) -> bool:
    return device.type == ("cpu" if _kernels().INTERPRETED else "cuda")


def _launch(name: str, device: torch.device, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch one kernel; Triton launches on the current device."""
    where: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with where:
        getattr(_kernels(), name)[(programs,)](*arguments, **constants, **_OPTIONS)


# ---------------------------------------------------------------- one weight


@dataclass(frozen=True)
class _Tiling:
    """How the groups of one weight are dealt to programs."""

    groups: int
    inner: int
    tiles: int
    constants: dict[str, Any]


def _tiling(pattern: Pattern, dim: int, weight: Tensor, state: Tensor, factor: Tensor | None = None) -> _Tiling | None:
    """Deal the groups of a weight to programs; None where no kernel takes it."""
    if not 2 <= pattern.group <= _LARGEST_GROUP or not _fits(weight, state):
        return None
    if factor is not None and (factor.dtype != torch.float32 or not _alike(weight, factor)):
        return None
    if not -weight.ndim <= dim < weight.ndim or weight.shape[dim] % pattern.group:
        return None  # eager says what is wrong
    kernels = _kernels()
    groups, inner = weight.numel() // pattern.group, weight.stride(dim)
    width = 1 << (pattern.group - 1).bit_length()
    # Side by side, groups are loaded in vectors that span several of them.
    rows = max(kernels.TILE * (1 if inner == 1 else 2) // width, 8)  # eight groups fill whole bytes of a packed mask
    constants = {
        "keep": pattern.keep,
        "group": pattern.group,
        "width": width,
        "rows": rows,
        "step": 0 if inner == 1 else math.gcd(inner, 4),
    }
    return _Tiling(groups, inner, -(-groups // rows), constants)


def _by_group(
    name: str, tiling: _Tiling, tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any
) -> Tensor:
    """Launch a kernel on one weight and return its figures."""
    device = tensors[0].device
    programs = min(tiling.tiles, _kernels().PROGRAMS)
    figures = torch.empty(programs, 4, dtype=torch.float32, device=device)
    sizes = (tiling.groups, tiling.inner, tiling.tiles)
    _launch(name, device, programs, *tensors, figures, *sizes, *numbers, **constants, **tiling.constants)
    return figures.sum(0, dtype=torch.float64).float()  # sums of counts stay exact


# ---------------------------------------------------------------- many weights


@dataclass(frozen=True)
class _Batch:
    """The weights of one launch."""

    table: Tensor
    host: Tensor  # a graph that has captured the copy reads it whenever it is replayed
    stream: torch.cuda.Stream | None
    copied: torch.cuda.Event | None
    count: int
    blocks: int
    types: tuple[torch.dtype, ...]
    aligned: bool

    def wait(self) -> None:
        """Let the current stream wait for a table that another one has copied."""
        if self.stream is None or self.copied is None or torch.cuda.is_current_stream_capturing():
            return  # what is not captured is over before a capture begins
        current = torch.cuda.current_stream(self.table.device)
        if current != self.stream:
            current.wait_event(self.copied)
            self.table.record_stream(current)


@dataclass(frozen=True)
class _Plan:
    """Which weights of some lists share launches, and which are left to eager."""

    batches: list[_Batch]
    others: list[int]


_plans: dict[tuple[Any, ...], _Plan] = {}
_captured: dict[int, _Plan] = {}
"""What graphs read whenever they are replayed, which nobody can tell to be over."""


def _each(
    kernel: str,
    fallback: Callable[..., None],
    lists: Sequence[Sequence[Tensor]],
    arguments: Sequence[float],
    numbers: Sequence[float],
    **constants: Any,
) -> None:
    """Launch a kernel on all weights that it takes, and hand the others to eager.

    Args:
        kernel: its name.
        fallback: eager's function.
        lists: the lists that it takes; the tensors of the first one are changed.
        arguments: what it takes beside them.
        numbers: what the kernel takes beside the table.
        constants: what the kernel is compiled for.
    """
    items = list(zip(*lists, strict=True))
    plan = _plan(items)
    for batch in plan.batches:
        batch.wait()
        types = (getattr(_kernels().tl, _TYPES[dtype]) for dtype in batch.types)
        where = (kernel, batch.table.device, batch.blocks, batch.table, batch.count)
        _launch(*where, *numbers, *types, batch.aligned, _kernels().BLOCK, **constants)
    for index in plan.others:
        fallback(*([tensor] for tensor in items[index]), *arguments)
    if plan.batches:
        for tensor in lists[0]:
            # Autograd must notice that what it saved has changed, as after any operation of torch.
            torch.autograd.graph.increment_version(tensor)


def _plan(items: list[tuple[Tensor, ...]]) -> _Plan:
    """Return the plan for some weights: the one of the last time, if they have not moved."""
    key = (len(items), *[_identity(tensor) for item in items for tensor in item])
    capturing = bool(items) and items[0][0].is_cuda and torch.cuda.is_current_stream_capturing()
    plan = _plans.get(key)
    if plan is None:
        plan = _new_plan(items)
        if not capturing:  # or others would read a table that is not there before the graph is replayed
            if len(_plans) >= _PLANS:
                del _plans[next(iter(_plans))]
            _plans[key] = plan
    if capturing:
        _captured[id(plan)] = plan
    return plan


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a plan hangs on."""
    if tensor.layout != torch.strided:
        return (tensor.layout,)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _new_plan(items: list[tuple[Tensor, ...]]) -> _Plan:
    alike: dict[tuple[torch.device, tuple[torch.dtype, ...], bool], list[tuple[Tensor, ...]]] = {}
    others = []
    for index, item in enumerate(items):
        if all(_fits(item[0], other) for other in item[1:]):
            types = tuple(tensor.dtype for tensor in item)
            aligned = item[0].numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in item)
            alike.setdefault((item[0].device, types, aligned), []).append(item)
        else:
            others.append(index)
    return _Plan([_new_batch(*key, group) for key, group in alike.items()], others)


def _new_batch(
    device: torch.device, types: tuple[torch.dtype, ...], aligned: bool, items: list[tuple[Tensor, ...]]
) -> _Batch:
    sizes = [item[0].numel() for item in items]
    ends = list(itertools.accumulate(-(-size // _kernels().BLOCK) for size in sizes))
    rows = [[0, *ends[:-1]], sizes, *([tensor.data_ptr() for tensor in row] for row in zip(*items, strict=True))]
    on_device = device.type == "cuda"
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=on_device)
    table = host.to(device, non_blocking=True)
    stream = torch.cuda.current_stream(device) if on_device else None
    copied = None if stream is None else stream.record_event()
    return _Batch(table, host, stream, copied, len(items), ends[-1], types, aligned)


# ---------------------------------------------------------------- what kernels take


def _fits(weight: Tensor, state: Tensor) -> bool:
    """Whether kernels take a weight and what belongs to it: a float of its strides, or a stored mask."""
    if weight.layout != torch.strided or weight.dtype not in _FLOATS or not weight.numel():
        return False
    if not _runs_on(weight.device) or not _dense(weight):
        return False
    if state.dtype == PACKED:
        return (
            weight.ndim > 0
            and state.device == weight.device
            and state.shape == packed_shape(weight.shape)
            and state.is_contiguous()
            and weight.is_contiguous()
        )
    return (state.dtype in _FLOATS or state.dtype == torch.bool) and _alike(weight, state)


def _alike(weight: Tensor, other: Tensor) -> bool:
    """Whether places that are one in memory order are one in both."""
    return (
        other.layout == torch.strided
        and other.device == weight.device
        and other.shape == weight.shape
        and (other.stride() == weight.stride() or (other.is_contiguous() and weight.is_contiguous()))
    )


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, be it permuted."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
