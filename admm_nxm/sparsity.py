"""Does a model satisfy the pattern? Every group of every covered weight is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .grouping import grouped, joint_name, starred
from .memory import plain
from .pattern import Pattern
from .projection import by_group
from .selection import Select, SelectedWeight, Selection, SkippedWeight, named_tensors, select_weights
from .sharding import is_sharded, reduce_sums
from .table import format_table

__all__ = ["SparsityReport", "SparsityViolation", "WeightReport", "check_weights", "cover"]

_ENTRIES_AT_ONCE = 1 << 20
_UNCOUNTABLE = {getattr(torch, "float4_e2m1fn_x2", None)}  # a pair of entries is one element


class SparsityViolation(ValueError):  # noqa: N818 - a finding, and the name says which
    """A weight has groups with more non-zeros than its pattern allows."""


@dataclass(frozen=True)
class WeightReport:
    """The count of one weight.

    Args:
        name: of the weight.
        shape: of the weight.
        pattern: it was held to.
        dim: the grouped dimension.
        groups: how many.
        bad_groups: how many have more than ``keep`` non-zeros (NaN and infinity count as non-zero).
        zeros: how many entries are zero.
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
        left_out: files that were not copied with the pruned ones, since they hold the weights from before.
        selection: by which it was counted, to be recorded (:func:`admm_nxm.io.selection_record.record_selection`).
        model_errors: name -> what pruning cost by the quadratic model of the loss, as far as that was measured.
    """

    weights: tuple[WeightReport, ...]
    skipped: tuple[SkippedWeight, ...] = ()
    left_out: tuple[str, ...] = ()
    selection: Selection | None = field(default=None, repr=False, compare=False, kw_only=True)
    model_errors: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

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
        """Raise SparsityViolation, which names each violating weight with its number of bad groups, if there is any."""
        if not self.ok:
            bad = [f"{w.name}: {w.bad_groups} of {w.groups} groups exceed {w.pattern}" for w in self.violations]
            raise SparsityViolation(f"{len(bad)} of {len(self.weights)} weights violate the pattern: {'; '.join(bad)}")

    def __iter__(self) -> Iterator[WeightReport]:
        return iter(self.weights)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, per_weight: bool = False, width: int | None = None) -> str:
        """Return the count as a table.

        Args:
            per_weight: a line for each weight, in place of one for each kind of weight over all blocks.
            width: columns that the table may take; None if there is no limit.
        """
        rows = []
        for alike in grouped(
            self.weights, lambda w: w.name if per_weight else (starred(w.name), w.shape, w.pattern, w.ok)
        ):
            zeros = sum(w.zeros for w in alike) / max(1, sum(w.numel for w in alike))
            shape, name = "x".join(map(str, alike[0].shape)), joint_name([w.name for w in alike])
            counts = (sum(w.groups for w in alike), sum(w.bad_groups for w in alike))
            row = [name, len(alike), shape, str(alike[0].pattern), f"{zeros:.2%}", *counts]
            if self.model_errors:
                errors = [self.model_errors[w.name] for w in alike if w.name in self.model_errors]
                row.append(f"{max(errors):.2g}" if errors else "")
            rows.append(row)
        headers = ["weights", "number", "shape", "pattern", "zeros", "groups", "bad groups"]
        if self.model_errors:
            headers.append("model error" if per_weight else "worst model error")
        lines = [format_table(headers, rows, width)]
        lines += [f"not covered: {skipped.name} ({skipped.reason})" for skipped in self.skipped]
        if self.left_out:
            lines.append(f"not copied, as they hold the weights from before: {', '.join(self.left_out)}")
        verdict = "ok" if self.ok else f"VIOLATED by {len(self.violations)} of {len(self.weights)} weights"
        lines.append(f"{len(self.weights)} weights, {self.sparsity:.2%} zeros, pattern {verdict}")
        return "\n".join(lines)


def check_weights(
    selection: Selection, get: Callable[[str], Tensor], model_errors: Mapping[str, float] | None = None
) -> SparsityReport:
    """Count the groups of each selected weight, got by name one after the other; a collective if they are sharded."""
    likes, counts = [], []
    for weight in selection:
        t = get(weight.name).detach()
        _check_countable(weight, t)
        counts.append(_count(plain(t), weight.pattern, weight.dim))
        # Only a sharded weight is needed again, to add up its parts; weights read from a file must not pile up.
        likes.append(t if is_sharded(t) else counts[-1])
    device = counts[0].device
    totals = reduce_sums([count.to(device) for count in counts], likes).tolist()
    reports = (
        WeightReport(w.name, w.shape, w.pattern, w.dim, *count) for w, count in zip(selection, totals, strict=True)
    )
    skipped = tuple(skipped for skipped in selection.skipped if skipped.wanted)
    return SparsityReport(tuple(reports), skipped, selection=selection, model_errors={**(model_errors or {})})


def _check_countable(weight: SelectedWeight, t: Tensor) -> None:
    """Refuse a weight whose groups cannot be counted, as a selection made by hand may name one."""
    if not -t.ndim <= weight.dim < t.ndim:
        problem = f"it has no dimension {weight.dim}"
    elif t.shape[weight.dim] % weight.pattern.group:
        problem = f"its width {t.shape[weight.dim]} along dim {weight.dim} is no multiple of {weight.pattern.group}"
    elif t.layout != torch.strided or t.is_quantized or t.is_meta or t.dtype in _UNCOUNTABLE:
        problem = f"it is {t.dtype} of layout {t.layout} on {t.device}"
    else:
        return
    raise ValueError(
        f"weight {weight.name!r} of shape {tuple(t.shape)} cannot be counted: {problem}; leave it out of the selection"
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
    """Choose the weights to count, and the tensor of each by name, by the ``pattern`` of :func:`admm_nxm.verify`.

    Raises:
        TypeError, ValueError: as there.
    """
    if isinstance(pattern, Selection):
        if not pattern.weights:
            raise ValueError("the selection names no weight: there is nothing to verify")
        tensors = named_tensors(named)
        found = {}
        for weight in pattern:
            name = weight.name_in(tensors)
            there = "no such weight" if name is None else f"shape {tuple(tensors[name].shape)}"
            if name is None or tuple(tensors[name].shape) != weight.shape:
                raise ValueError(
                    f"the selection names weight {weight.name!r} of shape {weight.shape}; the target has {there}"
                )
            found[weight.name] = tensors[name]
        return pattern, found
    if pattern is None or isinstance(pattern, (str, Pattern)):
        pattern = "2:4" if pattern is None else pattern
        return select_weights(named, pattern, ineligible="skip", trainable=False, adapters="skip")
    return select_weights(named, select=pattern, ineligible="skip", trainable=False)
