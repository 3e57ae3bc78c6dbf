"""Does a model satisfy the pattern? Every group of every covered weight is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Union

import torch
from torch import Tensor, nn

from ._files import Checkpoint, open_checkpoint
from ._memory import plain
from ._sharding import is_sharded, reduce_sums
from ._table import format_table
from .pattern import Pattern
from .projection import by_group
from .selection import Select, SelectedWeight, Selection, SkippedWeight, named_tensors, select_weights

__all__ = ["SparsityReport", "SparsityViolation", "WeightReport", "check_weights", "cover", "stand_ins", "verify"]

_ENTRIES_AT_ONCE = 1 << 20

_UNCOUNTABLE = {getattr(torch, "float4_e2m1fn_x2", None)}  # a pair of entries is one element

Target = Union[nn.Module, Mapping[str, Tensor], str, "PathLike[str]"]


class SparsityViolation(ValueError):  # noqa: N818 - a finding, and the name says which
    """A weight has groups with more non-zeros than its pattern allows."""


@dataclass(frozen=True)
class WeightReport:
    """The count of one weight.

    Args:
        name: its name.
        shape: its shape.
        pattern: the pattern it was held to.
        dim: the grouped dimension.
        groups: how many groups it has.
        bad_groups: how many of them have more than ``keep`` non-zeros (NaN and infinity count as non-zero).
        zeros: how many of its entries are zero.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    dim: int
    groups: int
    bad_groups: int
    zeros: int

    @property
    def ok(self) -> bool:
        """Whether no group violates the pattern."""
        return self.bad_groups == 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.groups * self.pattern.group

    @property
    def sparsity(self) -> float:
        """Share of entries that are zero."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """The count of all covered weights; prints as a table.

    Args:
        weights: one report a weight.
        skipped: what the selection rules asked for but no pattern fits, and why.
    """

    weights: tuple[WeightReport, ...]
    skipped: tuple[SkippedWeight, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no weight violates its pattern."""
        return all(weight.ok for weight in self.weights)

    @property
    def violations(self) -> tuple[WeightReport, ...]:
        """The weights that violate their pattern."""
        return tuple(weight for weight in self.weights if not weight.ok)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all covered weights."""
        total = sum(weight.numel for weight in self.weights)
        return sum(weight.zeros for weight in self.weights) / total if total else 0.0

    def raise_if_violated(self) -> None:
        """Raise if any weight violates its pattern.

        Raises:
            SparsityViolation: names each violating weight with its number of bad groups.
        """
        if not self.ok:
            bad = "; ".join(
                f"{w.name}: {w.bad_groups} of {w.groups} groups exceed {w.pattern}" for w in self.violations
            )
            raise SparsityViolation(f"{len(self.violations)} of {len(self.weights)} weights violate the pattern: {bad}")

    def __iter__(self) -> Iterator[WeightReport]:
        return iter(self.weights)

    def __str__(self) -> str:
        rows = [
            (w.name, "x".join(map(str, w.shape)), str(w.pattern), f"{w.sparsity:.2%}", w.groups, w.bad_groups)
            for w in self.weights
        ]
        lines = [format_table(("weight", "shape", "pattern", "zeros", "groups", "bad groups"), rows)]
        lines += [f"not covered: {skipped.name} ({skipped.reason})" for skipped in self.skipped]
        verdict = "ok" if self.ok else f"VIOLATED by {len(self.violations)} of {len(self.weights)} weights"
        lines.append(f"{len(self.weights)} weights, {self.sparsity:.2%} zeros, pattern {verdict}")
        return "\n".join(lines)


def verify(target: Target, pattern: Pattern | str | Select | Selection | None = None) -> SparsityReport:
    """Count every group of every covered weight.

    Args:
        target: a module; a state dict; a path to a ``.safetensors`` file, to the index of a sharded set, or to a folder
            that holds either, packed (:func:`admm_nxm.export.packed.pack`) or not. Files are read one weight at a time.
        pattern: what the weights must satisfy. A Pattern or its spelling holds for the weights that
            :class:`admm_nxm.ADMMNxM` prunes by default; rules as for its ``select`` and a :class:`Selection` (such as
            ``optimizer.selection``) name their own weights. None means ``"2:4"``.

    Returns:
        The report.

    Raises:
        FileNotFoundError: nothing at that path.
        TypeError: the target is of no known kind.
        ValueError: the target holds no weight to count, a Selection's weight is missing, a file is no valid
            safetensors file, two files hold the same weight, or a weight's groups cannot be counted.

    >>> weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    >>> verify({"layers.0.fc.weight": weight}).weights[0].bad_groups
    1
    """
    if isinstance(target, nn.Module):
        selection, params = cover(target, pattern)
        return check_weights(selection, params.__getitem__)
    if isinstance(target, Mapping):
        selection, params = cover({name: t for name, t in target.items() if torch.is_tensor(t)}, pattern)
        return check_weights(selection, params.__getitem__)
    if not isinstance(target, (str, PathLike)):
        raise TypeError(f"cannot verify a {type(target).__name__}; a module, a state dict or a path is needed")
    with open_checkpoint(target, purpose="verify") as checkpoint:
        tensors = stand_ins(checkpoint)
        selection, params = cover(tensors, pattern)
        names = {id(t): name for name, t in tensors.items()}
        return check_weights(selection, lambda name: checkpoint.get(names[id(params[name])]))


def check_weights(selection: Selection, get: Callable[[str], Tensor]) -> SparsityReport:
    """Count the groups of each selected weight; a collective where weights are sharded.

    Args:
        selection: what to count, and by which pattern.
        get: name -> tensor; called for one weight after the other.

    Returns:
        The report.
    """
    likes: list[Tensor] = []
    counts: list[Tensor] = []
    for weight in selection:
        t = get(weight.name).detach()
        _check_countable(weight, t)
        counts.append(_count(plain(t), weight.pattern, weight.dim))
        # Only a sharded weight is needed again, to add up its parts; weights read from a file must not pile up.
        likes.append(t if is_sharded(t) else counts[-1])
    device = counts[0].device
    totals = reduce_sums([count.to(device) for count in counts], likes).tolist()
    return SparsityReport(
        tuple(
            WeightReport(weight.name, weight.shape, weight.pattern, weight.dim, groups, bad, zeros)
            for weight, (groups, bad, zeros) in zip(selection, totals, strict=True)
        ),
        tuple(skipped for skipped in selection.skipped if skipped.wanted),
    )


def _check_countable(weight: SelectedWeight, t: Tensor) -> None:
    """Refuse a weight whose groups cannot be counted, as a selection made by hand may name one."""
    problem = None
    if not -t.ndim <= weight.dim < t.ndim:
        problem = f"it has no dimension {weight.dim}"
    elif t.shape[weight.dim] % weight.pattern.group:
        problem = f"its width {t.shape[weight.dim]} along dim {weight.dim} is no multiple of {weight.pattern.group}"
    elif t.layout != torch.strided or t.is_quantized or t.is_meta or t.dtype in _UNCOUNTABLE:
        problem = f"it is {t.dtype} of layout {t.layout} on {t.device}"
    if problem is not None:
        raise ValueError(
            f"weight {weight.name!r} of shape {tuple(t.shape)} cannot be counted: {problem}; leave it out of the "
            "selection"
        )


def _count(t: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Return an int64 tensor: groups, bad groups, zeros."""
    groups = by_group(t, pattern.group, dim)
    totals = torch.tensor([groups.numel() // pattern.group, 0, groups.numel()], device=t.device)
    # In pieces: the counts of a whole weight, 64 bits an entry on the way, would outweigh the weight.
    axis = max(range(groups.ndim - 1), key=groups.shape.__getitem__)
    rows = max(_ENTRIES_AT_ONCE * groups.shape[axis] // max(groups.numel(), 1), 1)
    for piece in torch.split(groups, rows, axis):
        # Not every operation knows 8-bit floats.
        per_group = ((piece.to(torch.float32) if piece.element_size() == 1 else piece) != 0).sum(-1)
        totals[1] += (per_group > pattern.keep).sum()
        totals[2] -= per_group.sum()
    return totals


def cover(
    named: nn.Module | dict[str, Tensor], pattern: Pattern | str | Select | Selection | None
) -> tuple[Selection, dict[str, Tensor]]:
    """Choose the weights to count.

    Args:
        named: a module, or tensors by name (meta tensors will do).
        pattern: as for :func:`verify`.

    Returns:
        The weights, and the tensor of each by name.

    Raises:
        TypeError, ValueError: as in :func:`verify`.
    """
    if isinstance(pattern, Selection):
        if not pattern.weights:
            raise ValueError("the selection names no weight: there is nothing to verify")
        tensors = named_tensors(named)
        found = {}
        for weight in pattern:
            name = next((name for name in (weight.name, *weight.aliases) if name in tensors), None)
            if name is None or tuple(tensors[name].shape) != weight.shape:
                shape = None if name is None else tuple(tensors[name].shape)
                raise ValueError(
                    f"the selection names weight {weight.name!r} of shape {weight.shape}; the target has "
                    f"{'no such weight' if shape is None else f'shape {shape}'}"
                )
            found[weight.name] = tensors[name]
        return pattern, found
    if pattern is None or isinstance(pattern, (str, Pattern)):
        return select_weights(named, "2:4" if pattern is None else pattern, ineligible="skip", trainable=False)
    return select_weights(named, select=pattern, ineligible="skip", trainable=False)


def stand_ins(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return a tensor without data for each tensor of a checkpoint, one for all names of a tensor.

    Args:
        checkpoint: where to look; nothing is read.

    Returns:
        Name -> meta tensor of its shape and dtype.
    """
    found: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.items():
        if info.alias_of is None:
            found[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    for name, info in checkpoint.tensors.items():
        if info.alias_of is not None:
            found[name] = found[info.alias_of]
    return found
