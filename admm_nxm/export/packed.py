"""Packed safetensors: a sparse model stored without its zeros, and restored bit for bit.

What a packed file looks like is in :mod:`admm_nxm.packing`. In a folder packed files end in ``.packed.safetensors``:
a loader that does not know them finds no weights and says so, where it would otherwise start from random ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor, nn

from .._files import PACKED_SUFFIX, SUFFIX, Checkpoint, atomic_file, atomic_folder, open_checkpoint, read_index
from .._safetensors import CODE_OF, StreamWriter, bytes_of, plan
from .._sharding import is_sharded
from .._table import format_table
from ..packing import KEY, Layout, Packed, examine, pack_tensor, packed_layout
from ..pattern import Pattern
from ..selection import Select, SelectedWeight, Selection, SkippedWeight, unwrap_model
from ..sparsity import SparsityViolation, cover, stand_ins

__all__ = ["PackReport", "PackedWeight", "load_packed", "load_packed_model", "pack", "unpack"]

Place = Union[str, "os.PathLike[str]"]
Source = Union[nn.Module, Mapping[str, Tensor], str, "os.PathLike[str]"]


@dataclass(frozen=True)
class PackedWeight:
    """The size of one packed weight.

    Args:
        name: its name.
        shape: its shape.
        pattern: its pattern.
        dim: the grouped dimension.
        dtype: its dtype.
        bytes_before: its size as it was.
        bytes_after: its size packed.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    dim: int
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Packed size as a share of the size before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0


@dataclass(frozen=True)
class PackReport:
    """What packing a model saved; prints as a table.

    Args:
        weights: the packed weights.
        skipped: what the selection rules asked for but no pattern fits, and why; it is stored as it was.
        bytes_before: size of all tensors as they were (without the headers of files, some kilobytes).
        bytes_after: size of all tensors now.
    """

    weights: tuple[PackedWeight, ...]
    skipped: tuple[SkippedWeight, ...]
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Size of all tensors as a share of the size before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __iter__(self) -> Iterator[PackedWeight]:
        return iter(self.weights)

    def __str__(self) -> str:
        rows = [
            (
                w.name,
                "x".join(map(str, w.shape)),
                str(w.pattern),
                str(w.dtype).removeprefix("torch."),
                w.bytes_before,
                w.bytes_after,
                f"{w.ratio:.1%}",
            )
            for w in self.weights
        ]
        lines = [format_table(("weight", "shape", "pattern", "dtype", "bytes before", "bytes after", "ratio"), rows)]
        lines += [f"not packed: {skipped.name} ({skipped.reason})" for skipped in self.skipped]
        packed = sum(w.bytes_after for w in self.weights) / max(sum(w.bytes_before for w in self.weights), 1)
        lines.append(f"{len(self.weights)} weights packed to {packed:.1%} of their size")
        lines.append(f"all tensors: {self.bytes_before:,} bytes before, {self.bytes_after:,} after ({self.ratio:.1%})")
        return "\n".join(lines)


class _Item(NamedTuple):
    """A tensor of the source, and how its bytes are written unread."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    write: Callable[[StreamWriter], None]


# What a loader would take in a packed folder in place of the packed weights.
_TAKEN_INSTEAD = ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def pack(
    source: Source,
    output: Place,
    pattern: Pattern | str = "2:4",
    *,
    select: Select | Selection | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Store a sparse model without its zeros.

    The weights that :func:`admm_nxm.verify` counts are packed, the rest is stored as it is. Nothing is lost, see
    :func:`unpack`. One tensor is in memory at a time.

    Args:
        source: a model folder, whose other files (config, tokenizer, …) are copied; a .safetensors file; a module; or
            a state dict.
        output: the folder for a folder, the file for anything else.
        pattern: the pattern of the weights that :class:`admm_nxm.ADMMNxM` prunes by default.
        select: rules as for ``ADMMNxM``, or a :class:`admm_nxm.Selection` such as ``optimizer.selection``; they name
            the weights with their patterns, in place of ``pattern``.
        overwrite: whether to replace what is at ``output``.

    Returns:
        The sizes before and after.

    Raises:
        FileExistsError: something is at ``output``.
        FileNotFoundError: nothing is at ``source``, or there is no folder to write in.
        SparsityViolation: a weight violates its pattern; all that do are named, and nothing is written.
        TypeError: the source is of no known kind, or a state dict holds what is no tensor.
        ValueError: the source is damaged, packed already or holds no weight to pack, or a weight cannot be packed.
    """
    rules = pattern if select is None else select
    if isinstance(source, (nn.Module, Mapping)):
        return _pack_tensors(source, Path(output), rules, overwrite)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"cannot pack a {type(source).__name__}; a module, a state dict or a path is needed")
    with open_checkpoint(source, purpose="pack") as checkpoint:
        _refuse_index(checkpoint)
        if checkpoint.packed:
            raise ValueError(f"{next(iter(checkpoint.packed))} is packed already; unpack it first")
        tensors = stand_ins(checkpoint)
        selection, params = cover(tensors, rules)
        names = {id(t): name for name, t in tensors.items()}
        weights = {names[id(params[weight.name])]: weight for weight in selection}
        if checkpoint.path.is_dir():
            others = _others(checkpoint)
            for name in _TAKEN_INSTEAD:
                if Path(name) in others:
                    raise ValueError(
                        f"{checkpoint.path / name} would be taken for the weights of the packed folder, and they are "
                        f"in {checkpoint.files[0].name}; move it away first"
                    )
            with atomic_folder(output, overwrite=overwrite, source=source) as folder:
                layouts = _layouts(weights, checkpoint.get)
                _write_folder(checkpoint, others, folder, _packed_name, layouts)
        else:
            with atomic_file(output, overwrite=overwrite) as file:
                layouts = _layouts(weights, checkpoint.get)
                _write_packed(checkpoint, checkpoint.files[0], file, layouts)
        before = sum(stored.nbytes for header in checkpoint.headers.values() for stored in header.tensors)
    return _report(layouts, selection, before)


def unpack(source: Place, output: Place, *, overwrite: bool = False) -> None:
    """Undo :func:`pack`: the same tensors bit for bit, under the same names, in the same files, with the same metadata.

    Args:
        source: a packed file or folder.
        output: the folder for a folder, the file for a file.
        overwrite: whether to replace what is at ``output``.

    Raises:
        FileExistsError: something is at ``output``.
        FileNotFoundError: nothing is at ``source``, or there is no folder to write in.
        ValueError: the source is damaged, or holds no packed weight; nothing is written then.
    """
    with open_checkpoint(source, purpose="unpack") as checkpoint:
        _refuse_index(checkpoint)
        _needs_packed(checkpoint)
        if checkpoint.path.is_dir():
            with atomic_folder(output, overwrite=overwrite, source=source) as folder:
                _write_folder(checkpoint, _others(checkpoint), folder, _dense_name, None)
        else:
            with atomic_file(output, overwrite=overwrite) as file:
                _write_dense(checkpoint, checkpoint.files[0], file)


def load_packed(path: Place) -> dict[str, Tensor]:
    """Read a packed model into a state dict; :func:`load_packed_model` makes a transformers model of one.

    Args:
        path: a packed file or folder.

    Returns:
        All tensors by name, the packed weights unpacked.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: it is damaged, or holds no packed weight.
    """
    with open_checkpoint(path, purpose="load") as checkpoint:
        _needs_packed(checkpoint)
        tensors = {name: checkpoint.get(name) for name, info in checkpoint.tensors.items() if info.alias_of is None}
        return {name: tensors[info.alias_of or name] for name, info in checkpoint.tensors.items()}


def load_packed_model(path: Place, model_class: Any, **options: Any) -> Any:
    """Load a packed folder into a transformers model, without unpacking it on disk.

    Args:
        path: a packed folder with the model's config.
        model_class: a class of transformers such as ``AutoModelForSequenceClassification`` or ``LlamaForCausalLM``.
        options: passed to its ``from_pretrained``.

    Returns:
        The model, as ``from_pretrained`` would return it for the folder before packing.

    Raises:
        FileNotFoundError: nothing there, or no config.
        ValueError: it is damaged, or holds no packed weight.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, GenerationConfig
    except ImportError as error:
        raise ImportError('transformers is needed for this; run: pip install "admm-nxm[hf]"') from error
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder (it has no config.json); use load_packed for its tensors")
    state_dict = load_packed(folder)
    config = options.pop("config", None) or AutoConfig.from_pretrained(folder)
    if hasattr(model_class, "from_config"):
        # The Auto classes load from a name only; which class they would choose shows on an empty model.
        with torch.device("meta"):
            model_class = type(model_class.from_config(config))
    options = {"dtype": "auto", **options}
    model = model_class.from_pretrained(None, config=config, state_dict=state_dict, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _pack_tensors(
    source: nn.Module | Mapping[str, Tensor],
    output: Path,
    rules: Pattern | str | Select | Selection,
    overwrite: bool,
) -> PackReport:
    named = unwrap_model(source).state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    for name, t in named.items():
        _check_storable(name, t)
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, t in named.items():
        # The entries of a state dict are new objects, also where two names stand for one tensor.
        one = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) if t.numel() else name
        if first.setdefault(one, name) != name:
            aliases[name] = first[one]
    tensors = {name: t for name, t in named.items() if name not in aliases}
    one_object_each = {name: named[aliases.get(name, name)] for name in named}
    selection, params = cover(source if isinstance(source, nn.Module) else one_object_each, rules)
    names = {id(t): aliases.get(name, name) for name, t in named.items()}
    weights = {names[id(params[weight.name])]: weight for weight in selection}

    def item(name: str, t: Tensor) -> _Item:
        size = t.numel() * t.element_size()
        return _Item(name, CODE_OF[t.dtype], tuple(t.shape), size, lambda writer: writer.put(name, bytes_of(t)))

    items = [item(name, t) for name, t in tensors.items()]
    with atomic_file(output, overwrite=overwrite) as file:
        layouts = _layouts(weights, tensors.__getitem__)
        _write(file, items, {"format": "pt"}, layouts, aliases, tensors.__getitem__)
    return _report(layouts, selection, sum(i.nbytes for i in items))


def _check_storable(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name!r} is a {type(t).__name__}, and a safetensors file holds tensors only; leave it out")
    if is_sharded(t) or t.is_meta or t.layout != torch.strided or t.dtype not in CODE_OF:
        kind = "spread over several ranks" if is_sharded(t) else f"{t.dtype} of layout {t.layout} on {t.device}"
        raise TypeError(
            f"{name!r} is {kind}, and cannot be stored so; gather, materialise or convert it, or save the model with "
            "save_pretrained and pack the folder"
        )


def _layouts(weights: Mapping[str, SelectedWeight], get: Callable[[str], Tensor]) -> dict[str, Layout]:
    """Return how each weight is to be packed, or name all that cannot be."""
    layouts: dict[str, Layout] = {}
    violations = []
    for name, weight in weights.items():
        t = get(name)
        try:
            bad, signs = examine(t, weight.pattern, weight.dim)
            layouts[name] = packed_layout(weight.shape, weight.pattern, weight.dim, t.dtype, signs)
        except ValueError as error:
            raise ValueError(f"weight {name!r} cannot be packed: {error}") from None
        if bad:
            violations.append(f"{name}: {bad} of {layouts[name].groups} groups exceed {weight.pattern}")
    if violations:
        raise SparsityViolation(
            f"{len(violations)} of {len(weights)} weights violate the pattern, and packing would lose what they hold; "
            f"prune them first, or choose the weights by select: {'; '.join(violations)}"
        )
    return layouts


def _report(layouts: Mapping[str, Layout], selection: Selection, before: int) -> PackReport:
    weights = tuple(
        PackedWeight(name, lay.shape, lay.pattern, lay.dim, lay.dtype, lay.dense_nbytes, lay.nbytes)
        for name, lay in layouts.items()
    )
    saved = sum(w.bytes_before - w.bytes_after for w in weights)
    return PackReport(weights, tuple(s for s in selection.skipped if s.wanted), before, before - saved)


def _write(
    file: Path,
    items: Iterable[_Item],
    metadata: Mapping[str, str] | None,
    layouts: Mapping[str, Layout],
    aliases: Mapping[str, str],
    get: Callable[[str], Tensor],
) -> None:
    """Write a file with packed weights."""
    items = list(items)
    parts = []
    for item in items:
        if item.name in layouts:
            for ending, (dtype, shape) in layouts[item.name].parts.items():
                size = torch.empty(shape, dtype=dtype, device="meta").nbytes
                parts.append((item.name + ending, CODE_OF[dtype], shape, size))
        else:
            parts.append((item.name, item.code, item.shape, item.nbytes))
    packed = Packed({item.name: layouts[item.name] for item in items if item.name in layouts}, aliases)
    with StreamWriter(file, plan(parts), {**(metadata or {}), KEY: packed.to_json()}) as writer:
        for item in items:
            layout = layouts.get(item.name)
            if layout is None:
                item.write(writer)
                continue
            one = pack_tensor(get(item.name), layout.pattern, layout.dim, name=item.name)
            if one.layout != layout:
                raise ValueError(f"{item.name!r} changed while it was packed; pack the model when nothing writes to it")
            for ending, part in one.parts.items():
                writer.put(item.name + ending, bytes_of(part))


def _write_packed(checkpoint: Checkpoint, source: Path, file: Path, layouts: Mapping[str, Layout]) -> None:
    """Write the packed form of one file of a checkpoint."""
    header = checkpoint.headers[source]
    if not any(stored.name in layouts for stored in header.tensors):
        shutil.copyfile(source, file)
        return
    items = [
        _Item(
            stored.name,
            stored.code,
            stored.shape,
            stored.nbytes,
            lambda writer, stored=stored: writer.copy(stored.name, source, header.data + stored.start),  # type: ignore[misc]
        )
        for stored in header.tensors
    ]
    _write(file, items, header.metadata, layouts, {}, checkpoint.get)


def _write_dense(checkpoint: Checkpoint, source: Path, file: Path) -> None:
    """Write one file of a packed checkpoint as it was before."""
    if source not in checkpoint.packed:
        shutil.copyfile(source, file)
        return
    header = checkpoint.headers[source]
    stored = {tensor.name: tensor for tensor in header.tensors}
    infos = [info for info in checkpoint.tensors.values() if info.file == source]
    tensors = []
    for info in infos:
        if info.layout is not None:
            tensors.append((info.name, CODE_OF[info.dtype], info.shape, info.layout.dense_nbytes))
        else:
            like = stored[info.alias_of or info.name]
            tensors.append((info.name, like.code, like.shape, like.nbytes))
    with StreamWriter(file, plan(tensors), checkpoint.metadata(source) or None) as writer:
        for info in infos:
            if info.layout is not None:
                writer.put(info.name, bytes_of(checkpoint.get(info.name)))
            else:
                writer.copy(info.name, source, header.data + stored[info.alias_of or info.name].start)


def _write_folder(
    checkpoint: Checkpoint,
    others: Iterable[Path],
    folder: Path,
    rename: Callable[[str], str],
    layouts: Mapping[str, Layout] | None,
) -> None:
    """Write a checkpoint's folder anew: packed by the layouts, or as it was before if there are none."""
    targets = {file: Path(rename(str(file.relative_to(checkpoint.path)))) for file in checkpoint.files}
    index = checkpoint.index
    taken = [*others, *targets.values(), *([] if index is None else [Path(rename(index.name))])]
    twice = sorted({str(place) for place in taken if taken.count(place) > 1})
    if twice:
        raise ValueError(f"{checkpoint.path} holds both {twice[0]} and a file that would be called so; move one away")
    for other in others:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint.path / other, folder / other)
    for file, target in targets.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if layouts is None:
            _write_dense(checkpoint, file, folder / target)
        else:
            _write_packed(checkpoint, file, folder / target, layouts)
    if index is not None:
        fields = read_index(index)
        fields["weight_map"] = {
            name: rename(file)
            for tensor, file in fields["weight_map"].items()
            for name in _names_after(checkpoint, index.parent / file, tensor, layouts)
        }
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (folder / rename(index.name)).write_text(text, encoding="utf-8")


def _names_after(
    checkpoint: Checkpoint, file: Path, tensor: str, layouts: Mapping[str, Layout] | None
) -> tuple[str, ...]:
    """Return the names under which the new index has what the old one has under a name."""
    if layouts is not None:
        return tuple(tensor + ending for ending in layouts[tensor].parts) if tensor in layouts else (tensor,)
    packed = checkpoint.packed.get(file, Packed())
    for name, layout in packed.weights.items():
        if any(tensor == name + ending for ending in layout.parts):
            return (name,)
    return (tensor,)


def _others(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint's folder that hold none of its weights, relative to it."""
    root = checkpoint.path
    own = {*checkpoint.files, checkpoint.index}
    found = []
    for inner, folders, files in os.walk(root):
        for name in folders:
            if Path(inner, name).is_symlink():
                raise ValueError(f"{Path(inner, name)} is a link to a folder, and is not followed; move it away")
        for name in files:
            file = Path(inner, name)
            if not file.is_file():
                raise ValueError(f"{file} is a dangling link or no file, and cannot be copied; move it away")
            if file not in own:
                found.append(file.relative_to(root))
    return sorted(found)


def _packed_name(name: str) -> str:
    return PACKED_SUFFIX.join(name.rsplit(SUFFIX, 1))


def _dense_name(name: str) -> str:
    return SUFFIX.join(name.rsplit(PACKED_SUFFIX, 1))


def _refuse_index(checkpoint: Checkpoint) -> None:
    if checkpoint.path == checkpoint.index:
        raise ValueError(f"{checkpoint.path} is an index; name its folder, {checkpoint.path.parent}")


def _needs_packed(checkpoint: Checkpoint) -> None:
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.path} holds no packed weight; it can be loaded as it is")
