"""One-shot magnitude pruning of saved models: the baseline that fine-tuning has to beat."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from .._files import Checkpoint, atomic_file, atomic_folder, open_checkpoint
from .._safetensors import StreamWriter, bytes_of
from ..pattern import Pattern
from ..projection import project
from ..selection import Select, SelectedWeight, select_weights
from ..sparsity import SparsityReport, stand_ins, verify
from .packed import _others

__all__ = ["prune"]


def prune(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pattern: Pattern | str,
    *,
    select: Select | None = None,
    overwrite: bool = False,
) -> SparsityReport:
    """Project the weights of a saved model onto their pattern, once and without any fine-tuning.

    Of each group the ``keep`` weights of largest magnitude stay, with the bits that they had. The files keep their
    layout; everything else in a folder is copied. One tensor is in memory at a time, and no model code is needed.

    Args:
        source: a model folder, a folder with a sharded checkpoint, or a .safetensors file; not packed.
        output: the folder for a folder, the file for a file.
        pattern: the pattern of the weights that :class:`admm_nxm.ADMMNxM` prunes by default.
        select: regular expression -> pattern or None, as for ``ADMMNxM``; it names the weights with their patterns, in
            place of ``pattern``.
        overwrite: whether to replace what is at ``output``.

    Returns:
        The count of every group in the files that were written.

    Raises:
        FileExistsError: something is at ``output``.
        FileNotFoundError: nothing is at ``source``, or there is no folder to write in.
        ValueError: the source is damaged, packed or holds no weight to prune; or a weight cannot be pruned or has NaN
            or infinite entries. Nothing is written then.

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
        selection, _ = select_weights(stand_ins(checkpoint), pattern, select, trainable=False)
        chosen = {name: weight for weight in selection for name in (weight.name, *weight.aliases)}
        if checkpoint.path.is_dir():
            root = stack.enter_context(atomic_folder(output, overwrite=overwrite, source=source))
            others = _others(checkpoint)
            if checkpoint.index is not None:
                others.append(checkpoint.index.relative_to(checkpoint.path))
            for other in others:
                (root / other).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(checkpoint.path / other, root / other)
            targets = {file: root / file.relative_to(checkpoint.path) for file in checkpoint.files}
        elif checkpoint.index is not None:
            raise ValueError(f"{source} is an index alone; give the folder {checkpoint.path.parent}")
        else:
            if Path(output).resolve() == Path(source).resolve():
                raise ValueError(f"{output} is what is read; write to another file")
            targets = {checkpoint.files[0]: stack.enter_context(atomic_file(output, overwrite=overwrite))}
        for file, target in targets.items():
            _write(checkpoint, file, target, chosen)
    rules = pattern if select is None else select
    return verify(output, rules)


def _write(checkpoint: Checkpoint, file: Path, target: Path, chosen: dict[str, SelectedWeight]) -> None:
    """Write a file anew with the chosen weights projected; the bytes of all others stay unread."""
    header = checkpoint.headers[file]
    target.parent.mkdir(parents=True, exist_ok=True)
    with StreamWriter(target, header.tensors, header.metadata) as writer:
        for stored in header.tensors:
            weight = chosen.get(stored.name)
            if weight is None:
                writer.copy(stored.name, file, header.data + stored.start)
                continue
            tensor = checkpoint.get(stored.name)
            if not bool(tensor.to(torch.float32 if tensor.element_size() == 1 else tensor.dtype).isfinite().all()):
                raise ValueError(
                    f"{file}: weight {stored.name!r} has NaN or infinite entries, which cannot be ranked; "
                    "leave it dense by a select rule, or save a sound model"
                )
            writer.put(stored.name, bytes_of(project(tensor, weight.pattern, weight.dim)))
