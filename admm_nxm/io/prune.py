"""One-shot magnitude pruning of saved models: the baseline that fine-tuning has to beat."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..pattern import Pattern
from ..projection import INTEGER_OF_SIZE, keep_mask
from ..selection import Select, SelectedWeight, Selection, named_tensors, select_weights
from ..sparsity import SparsityReport, cover
from .files import Checkpoint, atomic_file, atomic_folder, copy_files, open_checkpoint, refuse_source, stand_ins
from .selection_record import RECORD_KEY, record_selection, selection_metadata
from .tensor_files import StreamWriter, bytes_of
from .verify import verify

__all__ = ["prune"]


def prune(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pattern: Pattern | str = "2:4",
    *,
    select: Select | Selection | None = None,
    overwrite: bool = False,
) -> SparsityReport:
    """Project the weights of a saved model onto their pattern, once and without any fine-tuning.

    Of each group the ``keep`` weights of largest magnitude stay, with the bits that they had. The files keep their
    layout; everything else in a folder is copied, and the selection is recorded
    (:mod:`admm_nxm.io.selection_record`). One tensor is in memory at a time, and no model code is needed.

    Args:
        source: a model folder, a folder with a sharded checkpoint, or a .safetensors file; not packed.
        output: the folder for a folder, the file for a file.
        pattern: the pattern of the weights that :class:`admm_nxm.ADMMNxM` prunes by default.
        select: rules as for ``ADMMNxM``, or a :class:`admm_nxm.Selection` such as ``optimizer.selection``; they name
            the weights with their patterns, in place of ``pattern``.
        overwrite: whether to replace what is at ``output``.

    Returns:
        The count of every group in the files that were written.

    Raises:
        FileExistsError: something is at ``output``.
        FileNotFoundError: nothing is at ``source``, or there is no folder to write in.
        ValueError: the source is damaged, packed or holds no weight to prune; a weight cannot be pruned or has NaN or
            infinite entries; or the output is the source. Nothing is written then.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"layers.0.fc.weight": torch.arange(8.0).reshape(2, 4)}, folder / "dense.safetensors")
    >>> prune(folder / "dense.safetensors", folder / "sparse.safetensors", "2:4").ok
    True
    """
    with open_checkpoint(source, purpose="prune") as checkpoint, ExitStack() as stack:
        if checkpoint.packed:
            raise ValueError(f"{next(iter(checkpoint.packed))} is packed; unpack it first")
        chosen, selection = _choose(checkpoint, pattern, select)
        record = selection_metadata(selection)
        if checkpoint.path.is_dir():
            root = stack.enter_context(atomic_folder(output, overwrite=overwrite, source=source))
            index = [] if checkpoint.index is None else [checkpoint.index.relative_to(checkpoint.path)]
            copy_files([*checkpoint.others(), *index], checkpoint.path, root)
            record_selection(root, selection)
            record = {}
            targets = {file: root / file.relative_to(checkpoint.path) for file in checkpoint.files}
        elif checkpoint.index is not None:
            raise ValueError(f"{source} is an index alone; give the folder {checkpoint.path.parent}")
        else:
            refuse_source(output, source)
            targets = {checkpoint.files[0]: stack.enter_context(atomic_file(output, overwrite=overwrite))}
        for file, target in targets.items():
            _write(checkpoint, file, target, chosen, record)
    return verify(output, pattern if select is None else select)


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


def _write(
    checkpoint: Checkpoint, file: Path, target: Path, chosen: dict[str, SelectedWeight], record: dict[str, str]
) -> None:
    """Write a file anew with the chosen weights projected; the bytes of all others stay unread."""
    header = checkpoint.headers[file]
    kept = {key: value for key, value in (header.metadata or {}).items() if key != RECORD_KEY}
    metadata = {**record, **kept} if record or header.metadata is not None else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(target, header.tensors, metadata) as writer:
        for stored in header.tensors:
            weight = chosen.get(stored.name)
            if weight is None:
                writer.copy(stored.name, file, header.data + stored.start)
                continue
            tensor = checkpoint.get(stored.name)
            if not bool((tensor.to(torch.float32) if tensor.element_size() == 1 else tensor).isfinite().all()):
                raise ValueError(
                    f"{file}: weight {stored.name!r} has NaN or infinite entries, which cannot be ranked; "
                    "leave it dense by a select rule, or save a sound model"
                )
            try:
                sparse = _project(tensor, weight)
            except (TypeError, IndexError, ValueError) as error:
                raise ValueError(
                    f"{file}: weight {stored.name!r} of shape {stored.shape} cannot be pruned to {weight.pattern}: "
                    f"{error}"
                ) from error
            writer.put(stored.name, bytes_of(sparse))


def _project(t: Tensor, weight: SelectedWeight) -> Tensor:
    """Return the bits of a projected weight, as integers: not every torch can choose among 8-bit floats."""
    if t.dtype in _NO_ZERO:
        raise ValueError(f"{t.dtype} has no zero; leave it dense by a select rule")
    if tuple(t.shape) != weight.shape:
        raise ValueError(f"the selection gives it the shape {weight.shape}")
    # All bits 0 are +0.0 in each of the others.
    return t.view(INTEGER_OF_SIZE[t.element_size()]).masked_fill(~keep_mask(t, weight.pattern, weight.dim), 0)


_NO_ZERO = {getattr(torch, "float8_e8m0fnu", None)}
