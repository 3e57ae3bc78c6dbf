"""Does a model satisfy the pattern? Modules, state dicts and saved models alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Union

import torch
from torch import Tensor, nn

from ..pattern import Pattern
from ..selection import Select, Selection
from ..sparsity import SparsityReport, check_weights, cover
from .files import Checkpoint, open_checkpoint, stand_ins
from .selection_record import read_selection

__all__ = ["OpenTarget", "Target", "open_target", "verify"]

Target = Union[nn.Module, Mapping[str, Tensor], str, "PathLike[str]"]


def verify(target: Target, pattern: Pattern | str | Select | Selection | None = None) -> SparsityReport:
    """Count every group of every covered weight.

    Args:
        target: a module; a state dict; a path to a ``.safetensors`` file, to the index of a sharded set, or to a folder
            that holds either, packed (:func:`admm_nxm.io.packed.pack`) or not. Files are read one weight at a time.
        pattern: what the weights must satisfy. A Pattern or its spelling holds for the weights that
            :class:`admm_nxm.ADMMNxM` prunes by default; rules as for its ``select`` and a :class:`Selection` (such as
            ``optimizer.selection``) name their own weights. None takes the selection that is recorded with a path
            (:func:`admm_nxm.io.selection_record.record_selection`), and else means ``"2:4"``.

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
    with open_target(target, "verify") as opened:
        selection, params = opened.cover(pattern)
        return check_weights(selection, lambda name: opened.read(params[name]))


@dataclass(frozen=True)
class OpenTarget:
    """A model of any kind, open: its tensors, which have no data where they are in a file, and what reads one."""

    named: nn.Module | dict[str, Tensor]
    read: Callable[[Tensor], Tensor] = lambda t: t
    checkpoint: Checkpoint | None = None

    def cover(self, pattern: Pattern | str | Select | Selection | None) -> tuple[Selection, dict[str, Tensor]]:
        """Choose the weights to count, as :func:`admm_nxm.sparsity.cover`; None takes a selection that is recorded."""
        return cover(self.named, self.recorded() if pattern is None else pattern)

    def recorded(self) -> Selection | None:
        """Return the selection that is recorded with a file; None if there is none."""
        return None if self.checkpoint is None else read_selection(self.checkpoint)


@contextmanager
def open_target(target: Target, purpose: str) -> Iterator[OpenTarget]:
    """Open a model of any kind, for what the purpose names in errors; a file is closed when the block ends."""
    if isinstance(target, nn.Module):
        yield OpenTarget(target)
    elif isinstance(target, Mapping):
        yield OpenTarget({name: t for name, t in target.items() if torch.is_tensor(t)})
    elif isinstance(target, (str, PathLike)):
        with open_checkpoint(target, purpose=purpose) as checkpoint:
            tensors = stand_ins(checkpoint)
            names = {id(t): name for name, t in tensors.items()}
            yield OpenTarget(tensors, lambda t: checkpoint.get(names[id(t)]), checkpoint)
    else:
        raise TypeError(f"cannot {purpose} a {type(target).__name__}; a module, a state dict or a path is needed")
