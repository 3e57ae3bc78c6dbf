"""Does a model satisfy the pattern? Every group of every covered weight is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Union

import safetensors
import torch
from torch import Tensor, nn

from ._sharding import is_sharded, local, reduce_sums
from ._table import format_table
from .pattern import Pattern
from .projection import by_group
from .selection import Select, Selection, SkippedWeight, named_tensors, select_weights

__all__ = ["SparsityReport", "SparsityViolation", "WeightReport", "check_weights", "verify"]

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
        target: a module; a state dict; a path to a ``.safetensors`` file, or to a folder that holds one or a sharded
            set with its index. Files are read one weight at a time.
        pattern: what the weights must satisfy. A Pattern or its spelling holds for the weights that
            :class:`admm_nxm.ADMMNxM` prunes by default; rules as for its ``select`` and a :class:`Selection` (such as
            ``optimizer.selection``) name their own weights. None means ``"2:4"``.

    Returns:
        The report.

    Raises:
        FileNotFoundError: nothing at that path.
        TypeError: the target is of no known kind.
        ValueError: the target holds no weight to count, a Selection's weight is missing, a file is no valid
            safetensors file, or two files hold the same weight.

    >>> weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    >>> verify({"layers.0.fc.weight": weight}).weights[0].bad_groups
    1
    """
    with ExitStack() as stack:
        if isinstance(target, nn.Module):
            selection, params = _cover(target, pattern)
            return check_weights(selection, params.__getitem__)
        if isinstance(target, Mapping):
            tensors = {name: t for name, t in target.items() if torch.is_tensor(t)}
            get = tensors.__getitem__
        elif isinstance(target, (str, PathLike)):
            tensors, get = _open_files(Path(target), stack)
        else:
            raise TypeError(f"cannot verify a {type(target).__name__}; a module, a state dict or a path is needed")
        selection, params = _cover(tensors, pattern)
        names = {id(t): name for name, t in tensors.items()}
        return check_weights(selection, lambda name: get(names[id(params[name])]))


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
        counts.append(_count(local(t), weight.pattern, weight.dim))
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


def _count(t: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """Return an int64 tensor: groups, bad groups, zeros."""
    if t.element_size() == 1:
        t = t.to(torch.float32)  # not every operation knows 8-bit floats
    per_group = by_group(t != 0, pattern.group, dim).sum(-1)
    bad = (per_group > pattern.keep).sum()
    groups = torch.full_like(bad, per_group.numel())
    return torch.stack([groups, bad, t.numel() - per_group.sum()])


def _cover(
    named: nn.Module | dict[str, Tensor], pattern: Pattern | str | Select | Selection | None
) -> tuple[Selection, dict[str, Tensor]]:
    """Return which weights of the target to count, and those tensors."""
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


def _open_files(path: Path, stack: ExitStack) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Return shapes of all tensors at a path (as meta tensors), and a function that reads one of them."""
    files: dict[str, Path] = {}
    shapes: dict[str, Tensor] = {}
    handles = {}
    for file in _safetensors_files(path):
        try:
            handle = stack.enter_context(safetensors.safe_open(str(file), framework="pt"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
        handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
            if name in files:
                raise ValueError(f"{files[name]} and {file} both hold {name!r}; name the file to verify")
            files[name] = file
            view = handle.get_slice(name)
            floating = str(view.get_dtype()).startswith(("F", "BF"))
            dtype = torch.float32 if floating else torch.int8
            shapes[name] = torch.empty(view.get_shape(), dtype=dtype, device="meta")

    def get(name: str) -> Tensor:
        tensor = handles[files[name]].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    return shapes, get


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"nothing to verify at {path}")
    # In the order of transformers' from_pretrained, which leaves the index of an earlier save unread.
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sorted({path / file for file in weight_map.values()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not a readable index of safetensors files: {error!r}") from error
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{path} holds no .safetensors file; save the model with save_pretrained(..., safe_serialization=True) "
            "or pass a state dict"
        )
    return files
