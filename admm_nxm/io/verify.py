"""Does a model satisfy the pattern? Modules, state dicts and saved models alike."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Union

import torch
from torch import Tensor, nn

from ..pattern import Pattern
from ..selection import Select, Selection
from ..sparsity import SparsityReport, check_weights, cover
from .files import open_checkpoint, stand_ins
from .selection_record import read_selection

__all__ = ["Target", "verify"]

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
        selection, params = cover(tensors, read_selection(checkpoint) if pattern is None else pattern)
        names = {id(t): name for name, t in tensors.items()}
        return check_weights(selection, lambda name: checkpoint.get(names[id(params[name])]))
