"""Histograms of weights, counted exactly and a part at a time, so that a large model needs no second copy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Union

import torch
from torch import Tensor

from ..grouping import grouped
from ..io.verify import OpenTarget, Target, open_target
from ..selection import Selection, named_tensors, select_weights
from ..sharding import is_sharded

__all__ = ["Chosen", "Counts", "Weights", "count_pairs"]

Weights = Union[Target, Tensor]  # noqa: UP007 - evaluated at run time
Chosen = Union[Selection, str, Collection[str], None]  # noqa: UP007 - evaluated at run time

_PART = 1 << 22  # entries counted at a time: 32 MiB in float64


@dataclass
class Counts:
    """Two models' weights of one picture, counted into the same bins; pairs are before and after."""

    names: tuple[str, ...]
    edges: Tensor  # ascending, float64; each bin holds its lower bound, the last its upper one as well
    counts: Tensor  # of non-zero entries in each bin, shape (2, bins), int64
    total: int
    zeros: list[int] = field(default_factory=lambda: [0, 0])
    beyond: list[int] = field(default_factory=lambda: [0, 0])  # outside of all bins


@dataclass(frozen=True)
class _Side:
    """One of the two models; its tensors have shapes only, where they are read from a file."""

    name: str
    tensors: Mapping[str, Tensor]
    opened: OpenTarget

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the entries of a weight, some at a time, as float64 on the CPU."""
        tensor = self.opened.read(self.tensors[name]).detach()
        if is_sharded(tensor):
            raise ValueError(f"weight {name!r} is sharded; pass full tensors, or the path of a saved full state dict")
        if tensor.is_meta:
            raise ValueError(f"weight {name!r} is on the meta device and has no entries; load the weights first")
        # A view if it can be: parts of a flattened copy would hold a second copy of the largest weight.
        for part in torch.split(tensor.reshape(-1), _PART):
            if part.numel():
                yield part.cpu().to(torch.float64)


def count_pairs(
    before: Weights, after: Weights, select: Chosen, label: Callable[[str], str], bins: int
) -> dict[str, Counts]:
    """Return picture -> its counts, as :func:`admm_nxm.report.plots.plot_weights`; ``label`` names a picture."""
    with _open(before, "before") as old, _open(after, "after") as new:
        # What was pruned stands with the model after.
        names = _choose(old.tensors, new.opened.recorded() if select is None else select)
        for name in names:
            shape, there = tuple(old.tensors[name].shape), new.tensors.get(name)
            if there is None:
                raise ValueError(f"weight {name!r} is in before and not in after; two states of one model are needed")
            if tuple(there.shape) != shape:
                raise ValueError(f"weight {name!r} has shape {shape} before and {tuple(there.shape)} after")
        return {label(members[0]): _count(members, (old, new), bins) for members in grouped(names, label)}


def _count(names: list[str], sides: tuple[_Side, _Side], bins: int) -> Counts:
    # Two passes: the bins depend on all weights of the picture, and these need not fit into memory.
    spread = largest = 0.0
    for side in sides:
        squares, count = 0.0, 0
        for name in names:
            for part in side.parts(name):
                if not part.isfinite().all():
                    raise ValueError(
                        f"weight {name!r} has NaN or infinite entries {side.name}; choose others by select="
                    )
                squares, count = squares + float(part.square().sum()), count + int(part.count_nonzero())
                largest = max(largest, float(part.abs().max()))
        spread = max(spread, 4 * math.sqrt(squares / max(count, 1)))
    limit = min(spread, largest) or 1.0  # nothing but zeros: any range will do
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64)
    edges[-1] = limit
    total = sum(math.prod(sides[0].tensors[name].shape) for name in names)
    found = Counts(tuple(names), edges, torch.zeros(2, bins, dtype=torch.int64), total)
    for number, side in enumerate(sides):
        for name in names:
            for part in side.parts(name):
                values = part[part != 0]
                counted = torch.histogram(values, edges).hist.to(torch.int64)
                found.counts[number].add_(counted)
                found.zeros[number] += part.numel() - values.numel()
                found.beyond[number] += values.numel() - int(counted.sum())
    return found


@contextmanager
def _open(target: Weights, name: str) -> Iterator[_Side]:
    with open_target({"weight": target} if isinstance(target, Tensor) else target, "plot") as opened:
        # Files may have the names of torch.compile or of DistributedDataParallel, which selections have not.
        yield _Side(name, named_tensors(opened.named), opened)


def _choose(tensors: Mapping[str, Tensor], select: Chosen) -> list[str]:
    if select is None:
        if set(tensors) == {"weight"}:
            return ["weight"]
        select, _ = select_weights(tensors, "1:1", ineligible="skip", trainable=False)
    if isinstance(select, Selection):
        wanted = [weight.name_in(tensors) or weight.name for weight in select]
    elif isinstance(select, str):
        try:
            wanted = [name for name, t in tensors.items() if t.is_floating_point() and re.fullmatch(select, name)]
        except re.error as error:
            raise ValueError(f"select={select!r} is no regular expression: {error}") from None
    elif isinstance(select, Collection):
        wanted = list(select)
    else:
        raise TypeError(f"select={select!r} must be a regular expression, names, or a Selection")
    if not wanted:
        raise ValueError(f"select={select!r} matches none of the {len(tensors)} weights, such as {[*tensors][:1]}")
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"select names weight {missing[0]!r}, and before has no such weight")
    return wanted
