"""Saved models written again with pruned weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..pattern import Pattern
from ..projection import INTEGER_OF_SIZE, keep_mask
from ..selection import Select, SelectedWeight, Selection, named_tensors, select_weights
from ..sparsity import SparsityReport, cover
from .files import Checkpoint, open_checkpoint, stand_ins, written_anew
from .selection_record import RECORD_KEY, record_selection, selection_metadata
from .tensor_files import NO_ZERO, Stored, bytes_in, bytes_of, write_file
from .verify import verify

__all__ = ["prune_files"]


def prune_files(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pattern: Pattern | str = "2:4",
    *,
    select: Select | Selection | None = None,
    values: Callable[[], Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
) -> SparsityReport:
    """Write a saved model again with pruned weights.

    By default the ``keep`` weights of largest magnitude in each group stay, with the bits that they had. The files keep
    their layout; everything else in a folder is copied, but for further copies of the weights (other formats and
    precisions, earlier shards), which the report names. The selection is recorded
    (:mod:`admm_nxm.io.selection_record`). One tensor of the files is in memory at a time, and no model code is needed.

    Args:
        source: a model folder, a folder with a sharded checkpoint, or a .safetensors file; not packed.
        output: the folder for a folder, the file for a file.
        pattern: the pattern of the weights that :class:`admm_nxm.ADMMNxM` prunes by default.
        select: rules as for ``ADMMNxM``, or a :class:`admm_nxm.Selection` such as ``optimizer.selection``; they name
            the weights with their patterns, in place of ``pattern``.
        values: called when nothing stands in the way of writing; returns name -> the pruned weight, such as the
            parameters of a model after :func:`admm_nxm.prune`. They are stored in the dtypes of the files.
        overwrite: whether to replace what is at ``output``.

    Returns:
        The count of every group in the files that were written, with the files that were left out.

    Raises:
        FileExistsError, FileNotFoundError: something is at ``output``, nothing at ``source``, or no folder to write in.
        ValueError: the source is damaged, packed or holds no weight to prune; a weight cannot be pruned or has NaN or
            infinite entries; or the output is the source. Nothing is written then.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> dense, sparse = folder / "dense.safetensors", folder / "sparse.safetensors"
    >>> save_file({"layers.0.fc.weight": torch.arange(8.0).reshape(2, 4)}, dense)
    >>> prune_files(dense, sparse, "2:4").ok
    True
    """
    with open_checkpoint(source, purpose="prune") as checkpoint:
        if checkpoint.packed:
            raise ValueError(f"{next(iter(checkpoint.packed))} is packed; unpack it first")
        chosen, selection = _choose(checkpoint, pattern, select)
        # Next to sparse weights a dense copy of them waits to be loaded in their place.
        copies = checkpoint.copies() if checkpoint.path.is_dir() else []
        with written_anew(checkpoint, output, overwrite=overwrite, without=copies) as (place, targets):
            record = {} if place.is_dir() else selection_metadata(selection)
            if place.is_dir():
                record_selection(place, selection)
            pruned = None if values is None else values()
            for file, target in targets.items():
                header = checkpoint.headers[file]
                kept = {key: value for key, value in header.metadata.items() if key != RECORD_KEY}
                sparse = partial(_sparse, checkpoint, file, chosen, pruned)
                write_file(target, header.tensors, {**record, **kept}, map(sparse, header.tensors))
    return replace(verify(output, pattern if select is None else select), left_out=tuple(map(str, copies)))


def _choose(
    checkpoint: Checkpoint, pattern: Pattern | str, select: Select | Selection | None
) -> tuple[dict[str, SelectedWeight], Selection]:
    """Return the weights to prune by the names that the files give them, which may be those of a wrapped model."""
    tensors = stand_ins(checkpoint)
    try:
        if isinstance(select, Selection):
            selection, _ = cover(tensors, select)
        else:
            selection, _ = select_weights(tensors, pattern, select, trainable=False)
    except ValueError as error:
        # What is advised to callers of ADMMNxM is no option here.
        raise ValueError(str(error).replace(', or all such weights with ineligible="skip"', "")) from None
    by_name = named_tensors(tensors)
    stored = {id(t): name for name, t in tensors.items()}
    # Tied weights may be stored under each name; a model is loaded from any of them.
    chosen = {
        stored[id(by_name[name])]: weight
        for weight in selection
        for name in (weight.name, *weight.aliases)
        if name in by_name
    }
    return chosen, selection


def _sparse(
    checkpoint: Checkpoint,
    file: Path,
    chosen: dict[str, SelectedWeight],
    pruned: Mapping[str, Tensor] | None,
    stored: Stored,
) -> tuple[str, Iterator[bytes | memoryview]]:
    """Return name and bytes of a tensor: pruned or projected if it is chosen, else as they are and unread."""
    weight = chosen.get(stored.name)
    if weight is None:
        return stored.name, bytes_in(file, stored)
    if pruned is None:
        t = checkpoint.get(stored.name)
    else:
        t = pruned[weight.name].detach().to("cpu", checkpoint.tensors[stored.name].dtype).contiguous()
    try:
        if tuple(t.shape) != weight.shape:
            raise ValueError(f"the selection gives it the shape {weight.shape}")
        if t.dtype in NO_ZERO:
            raise ValueError(f"{t.dtype} has no zero; leave it dense by a select rule")
        if not bool((t.to(torch.float32) if t.element_size() == 1 else t).isfinite().all()):
            raise ValueError(
                "it has NaN or infinite entries, which cannot be ranked; leave it dense by a select rule, or save a "
                "sound model"
            )
        kept = keep_mask(t, weight.pattern, weight.dim)
    except (TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file}: weight {stored.name!r} of shape {stored.shape} cannot be pruned to {weight.pattern}: {error}"
        ) from error
    # As integers, because not every torch can multiply 8-bit floats; all bits 0 are +0.0 in each of them.
    sparse = t.view(INTEGER_OF_SIZE[t.element_size()]) * kept
    return stored.name, bytes_of(sparse)
