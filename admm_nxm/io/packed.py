"""Packed safetensors (:mod:`admm_nxm.io.packing`): a sparse model without its zeros, restored bit for bit.

In a folder packed files end in ``.packed.safetensors``: a loader that does not know them says that it finds no weights.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..checks import missing
from ..grouping import grouped, joint_name, starred
from ..memory import address, is_plain, plain, takes_zeros
from ..pattern import Pattern
from ..selection import Select, SelectedWeight, Selection, SkippedWeight, named_tensors, unwrap_model
from ..sharding import is_sharded
from ..sparsity import SparsityViolation, cover
from ..table import format_table
from .files import PACKED_SUFFIX, SUFFIX, Checkpoint, Place, atomic_file, open_checkpoint, stand_ins, written_anew
from .packing import KEY, Layout, Packed, examine, pack_tensor, packed_layout
from .selection_record import read_selection, selection_metadata
from .tensor_files import CODE_OF, Stored, bytes_in, bytes_of, write_file

__all__ = ["PackReport", "PackedWeight", "load_packed", "load_packed_model", "pack", "unpack"]

Source = Union[nn.Module, Mapping[str, Tensor], str, "os.PathLike[str]"]


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight, and its size in bytes as it was and packed; ``dim`` is the grouped dimension."""

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
    """Sizes before and after packing, in bytes of all tensors without the headers of files; prints as a table."""

    weights: tuple[PackedWeight, ...]
    skipped: tuple[SkippedWeight, ...]
    """Weights that the selection rules asked for but no pattern fits, and why; they are stored as they were."""
    bytes_before: int
    bytes_after: int
    left_out: tuple[str, ...] = ()
    """Files of the folder that were not copied, since they hold the weights a second time, unpacked."""

    @property
    def ratio(self) -> float:
        """Size of all tensors as a share of the size before."""
        return self.bytes_after / self.bytes_before if self.bytes_before else 1.0

    def __iter__(self) -> Iterator[PackedWeight]:
        return iter(self.weights)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, *, per_weight: bool = False, width: int | None = None) -> str:
        """Return the sizes as a table, as :meth:`admm_nxm.sparsity.SparsityReport.to_text` does."""
        rows = []
        for alike in grouped(
            self.weights, lambda w: w.name if per_weight else (starred(w.name), w.shape, w.pattern, w.dtype)
        ):
            first, name = alike[0], joint_name([w.name for w in alike])
            shape, dtype = "x".join(map(str, first.shape)), str(first.dtype).removeprefix("torch.")
            sizes = (sum(w.bytes_before for w in alike), sum(w.bytes_after for w in alike))
            ratio = f"{sizes[1] / max(1, sizes[0]):.1%}"
            rows.append((name, len(alike), shape, str(first.pattern), dtype, *sizes, ratio))
        headers = ("weights", "number", "shape", "pattern", "dtype", "bytes", "packed", "ratio")
        lines = [format_table(headers, rows, width)]
        lines += [f"not packed: {skipped.name} ({skipped.reason})" for skipped in self.skipped]
        if self.left_out:
            lines.append(f"not copied, as they hold the weights a second time: {', '.join(self.left_out)}")
        packed = sum(w.bytes_after for w in self.weights) / max(sum(w.bytes_before for w in self.weights), 1)
        lines.append(f"{len(self.weights)} weights packed to {packed:.1%} of their size")
        lines.append(f"all tensors: {self.bytes_before:,} bytes before, {self.bytes_after:,} after ({self.ratio:.1%})")
        return "\n".join(lines)


def pack(
    source: Source,
    output: Place,
    pattern: Pattern | str | None = None,
    *,
    select: Select | Selection | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Store a sparse model without its zeros.

    The weights that :func:`admm_nxm.verify` counts are packed, the rest is stored as it is. Nothing is lost, see
    :func:`unpack`. One tensor is in memory at a time.

    Args:
        source: a model folder, whose other files (config, tokenizer, …) are copied, but for further copies of the
            weights, which the report names; a .safetensors file; a module; or a state dict.
        output: the folder for a folder, the file for anything else.
        pattern: the pattern of the weights that :class:`admm_nxm.ADMMNxM` prunes by default. None takes the selection
            that is recorded with a path, and else means ``"2:4"``.
        select: rules as for ``ADMMNxM``, or a :class:`admm_nxm.Selection` such as ``optimizer.selection``; they name
            the weights with their patterns, in place of ``pattern``.
        overwrite: whether to replace what is at ``output``.

    Returns:
        The sizes before and after.

    Raises:
        FileExistsError, FileNotFoundError: something is at ``output``, nothing at ``source``, or no folder to write in.
        SparsityViolation: a weight violates its pattern; all that do are named, and nothing is written.
        TypeError: the source is of no known kind, or a state dict holds what is no tensor.
        ValueError: the source is damaged, packed already or holds no weight to pack; a weight cannot be packed; or the
            output is the source.
    """
    rules = pattern if select is None else select
    if isinstance(source, (nn.Module, Mapping)):
        return _pack_tensors(source, Path(output), rules, overwrite)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"cannot pack a {type(source).__name__}; a module, a state dict or a path is needed")
    with open_checkpoint(source, purpose="pack") as checkpoint:
        if checkpoint.packed:
            raise ValueError(f"{next(iter(checkpoint.packed))} is packed already; unpack it first")
        tensors = stand_ins(checkpoint)
        selection, params = cover(tensors, read_selection(checkpoint) if rules is None else rules)
        names = {id(t): name for name, t in tensors.items()}
        weights = {names[id(params[weight.name])]: weight for weight in selection}
        copies = checkpoint.copies() if checkpoint.path.is_dir() else []
        if not checkpoint.path.is_dir():
            _refuse_ordinary_name(Path(output))
        ending = (SUFFIX, PACKED_SUFFIX)
        with written_anew(checkpoint, output, overwrite=overwrite, ending=ending, without=copies) as (place, targets):
            layouts = _layouts(weights, checkpoint.get)
            _mark_card(place)
            for file, target in targets.items():
                stored = checkpoint.headers[file].tensors
                if any(tensor.name in layouts for tensor in stored):
                    metadata = checkpoint.headers[file].metadata
                    _write(target, stored, partial(bytes_in, file), metadata, layouts, {}, checkpoint.get)
                else:
                    shutil.copyfile(file, target)
        before = sum(stored.nbytes for header in checkpoint.headers.values() for stored in header.tensors)
    return _report(layouts, selection, before, copies)


def unpack(source: Place, output: Place, *, overwrite: bool = False) -> None:
    """Undo :func:`pack`: the same tensors bit for bit, under the same names, in the same files, with the same metadata.

    Args:
        source: a packed file or folder.
        output: the folder for a folder, the file for a file.
        overwrite: whether to replace what is at ``output``.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as for :func:`pack`; or the source holds no packed weight.
    """
    with open_checkpoint(source, purpose="unpack") as checkpoint:
        _needs_packed(checkpoint)
        ending = (PACKED_SUFFIX, SUFFIX)
        with written_anew(checkpoint, output, overwrite=overwrite, ending=ending) as (place, targets):
            _unmark_card(place)
            for file, target in targets.items():
                if file in checkpoint.packed:
                    _write_dense(checkpoint, file, target)
                else:
                    shutil.copyfile(file, target)


_FRONT_MATTER = re.compile(rb"\A\s*---[ \t]*\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_MARK = re.compile(rb"\n?<!-- admm_nxm: packed -->.*?<!-- /admm_nxm: packed -->\n\n", re.DOTALL)
_PACKED_CARD = b"""
<!-- admm_nxm: packed -->
**The weights in this folder are packed: `from_pretrained` cannot read them.** Load them with admm_nxm:

```python
from admm_nxm.io.packed import load_packed_model
from transformers import AutoModel  # or the class for the task

model = load_packed_model("this folder", AutoModel)
```

or write an ordinary folder with `admm-nxm unpack`. What the card says below is true of the unpacked model.
<!-- /admm_nxm: packed -->

"""


def _mark_card(folder: Path) -> None:
    """Say in a model card, if there is one, how packed weights are loaded."""
    if (card := folder / "README.md").is_file():
        text = card.read_bytes()
        found = _FRONT_MATTER.match(text)
        end = found.end() if found else 0
        card.write_bytes(text[:end] + _PACKED_CARD + text[end:])


def _unmark_card(folder: Path) -> None:
    if (card := folder / "README.md").is_file():
        card.write_bytes(_MARK.sub(b"", card.read_bytes(), count=1))


def load_packed(path: Place) -> dict[str, Tensor]:
    """Read a packed model into a state dict; :func:`load_packed_model` makes a transformers model of one.

    Args:
        path: a packed file or folder.

    Returns:
        All tensors by name, the packed weights unpacked.

    Raises:
        FileNotFoundError, ValueError: nothing is there; it is damaged, or holds no packed weight.
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
        options: as for its ``from_pretrained``: entries of the config to override, ``config``, ``dtype`` (the one of
            the folder, ``"auto"``, by default), ``trust_remote_code``, ``output_loading_info``, ``device_map``, …

    Returns:
        The model, as ``from_pretrained`` would return it for the folder before packing; with
        ``output_loading_info=True`` the model and that information.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_packed`; or there is no config.
        TypeError: an option says where the weights are, and they are in the packed folder.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, GenerationConfig, PretrainedConfig
    except ImportError as error:
        raise ImportError(missing("transformers is needed for this", "hf")) from error
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder (it has no config.json); use load_packed for its tensors")
    for name in _ELSEWHERE & options.keys():
        raise TypeError(f"{name}={options[name]!r} says where the weights are, and they are those of {folder}; drop it")
    state_dict = load_packed(folder)
    config = folder if options.get("config") is None else options["config"]
    if hasattr(model_class, "from_config"):
        # An Auto class loads from a name only; which class it would choose shows on an empty model.
        trust = {"trust_remote_code": options.get("trust_remote_code")}
        known = config if isinstance(config, PretrainedConfig) else AutoConfig.from_pretrained(config, **trust)
        with torch.device("meta"):
            model_class = type(model_class.from_config(copy.deepcopy(known), **trust))
        if known is config and not isinstance(config, model_class.config_class):
            config = config.get_text_config()  # they take a part of a model so
    if options.get("dtype") is None and options.get("torch_dtype") is None:
        options["dtype"] = "auto"
    loaded = model_class.from_pretrained(None, state_dict=state_dict, **{**options, "config": config})
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for module in model.modules():
        named: Any
        for named in (module, getattr(module, "config", None)):
            if getattr(named, "name_or_path", "") in (None, "None"):  # from_pretrained noted what it was given, None
                named.name_or_path = os.fspath(path)
    generates = model.can_generate() and options.get("generation_config") is None
    if generates and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


_ELSEWHERE = {"state_dict", "subfolder", "variant", "gguf_file"}


def _pack_tensors(
    source: nn.Module | Mapping[str, Tensor],
    output: Path,
    rules: Pattern | str | Select | Selection | None,
    overwrite: bool,
) -> PackReport:
    named = unwrap_model(source).state_dict(keep_vars=True) if isinstance(source, nn.Module) else source
    for name, t in named.items():
        _check_storable(name, t)
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, t in named.items():
        # The entries of a state dict are new objects, also where two names stand for one tensor.
        # Without an address of its own (an empty tensor, torchao's training wrappers) it is told by the object.
        start = address(t)
        one = (start, t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg()) if start else id(t)
        if first.setdefault(one, name) != name:
            aliases[name] = first[one]
    tensors = {name: t for name, t in named.items() if name not in aliases}
    one_object_each = {name: named[aliases.get(name, name)] for name in named}
    selection, params = cover(source if isinstance(source, nn.Module) else one_object_each, rules)
    names = {id(t): name for name, t in named.items()}
    # A state dict hook may have made other tensors than the module has.
    by_name = params if names.keys() >= {id(t) for t in params.values()} else named_tensors(named)
    weights: dict[str, SelectedWeight] = {}
    for weight in selection:
        found = [by_name[name] for name in (weight.name, *weight.aliases) if name in by_name]
        if not found or any(tuple(t.shape) != weight.shape for t in found):
            raise ValueError(
                f"weight {weight.name!r} of shape {weight.shape} is not in the module's state dict under this name and "
                "with this shape, as a state dict hook changes it; pack the state dict that is to be stored, with "
                "select rules for its names"
            )
        weights.update({aliases.get(names[id(t)], names[id(t)]): weight for t in found})

    stored = [
        Stored(name, CODE_OF[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()
    ]

    def get(name: str) -> Tensor:
        return plain(tensors[name])

    _refuse_ordinary_name(output)
    with atomic_file(output, overwrite=overwrite) as file:
        layouts = _layouts(weights, get)
        record = selection_metadata(selection)
        _write(file, stored, lambda one: bytes_of(get(one.name)), record, layouts, aliases, get)
    return _report(layouts, selection, sum(one.nbytes for one in stored))


def _check_storable(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name!r} is a {type(t).__name__}, and a safetensors file holds tensors only; leave it out")
    if not is_sharded(t) and not is_plain(t) and not takes_zeros(t):
        raise TypeError(
            f"{name!r} is a {type(t).__name__}, whose values a safetensors file cannot hold as they are; store what it "
            "stands for: turn it into a plain tensor first"
        )
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


def _report(
    layouts: Mapping[str, Layout], selection: Selection, before: int, copies: Iterable[Path] = ()
) -> PackReport:
    weights = tuple(
        PackedWeight(name, lay.shape, lay.pattern, lay.dim, lay.dtype, lay.dense_nbytes, lay.nbytes)
        for name, lay in layouts.items()
    )
    saved = sum(w.bytes_before - w.bytes_after for w in weights)
    skipped = tuple(s for s in selection.skipped if s.wanted)
    return PackReport(weights, skipped, before, before - saved, tuple(map(str, copies)))


def _write(
    file: Path,
    stored: Iterable[Stored],
    read: Callable[[Stored], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str],
    layouts: Mapping[str, Layout],
    aliases: Mapping[str, str],
    get: Callable[[str], Tensor],
) -> None:
    """Write a file in which the tensors that have a layout are packed; the bytes of the others are ``read``."""
    here = {tensor.name: layouts[tensor.name] for tensor in stored if tensor.name in layouts}
    tensors = [tensor for tensor in stored if tensor.name not in here]
    for name, layout in here.items():
        for ending, (dtype, shape) in layout.parts.items():
            tensors.append(Stored(name + ending, CODE_OF[dtype], shape, math.prod(shape) * dtype.itemsize))

    def contents() -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
        for tensor in stored:
            if tensor.name not in here:
                yield tensor.name, read(tensor)
                continue
            layout = here[tensor.name]
            packed = pack_tensor(get(tensor.name), layout.pattern, layout.dim, name=tensor.name)
            if packed.layout != layout:
                raise ValueError(
                    f"{tensor.name!r} changed while it was packed; pack the model when nothing writes to it"
                )
            for ending, part in packed.parts.items():
                yield tensor.name + ending, bytes_of(part)

    write_file(file, tensors, {**metadata, KEY: Packed(here, aliases).to_json()}, contents())


def _write_dense(checkpoint: Checkpoint, source: Path, file: Path) -> None:
    """Write one file of a packed checkpoint as it was before."""
    header = checkpoint.headers[source]
    stored = {tensor.name: tensor for tensor in header.tensors}
    infos = [info for info in checkpoint.tensors.values() if info.file == source]
    dense = {
        info.name: Stored(info.name, CODE_OF[info.dtype], info.shape, info.layout.dense_nbytes)
        if info.layout is not None
        else stored[info.alias_of or info.name]._replace(name=info.name)
        for info in infos
    }
    contents = (
        (info.name, bytes_in(source, dense[info.name]) if info.layout is None else bytes_of(checkpoint.get(info.name)))
        for info in infos
    )
    metadata = {key: value for key, value in header.metadata.items() if key != KEY}
    write_file(file, dense.values(), metadata, contents)


def _refuse_ordinary_name(output: Path) -> None:
    """Refuse a name under which a loader of the model folder would take packed weights for ordinary ones."""
    if (output.parent / "config.json").is_file() and not output.name.endswith(PACKED_SUFFIX):
        raise ValueError(
            f"{output} stands in a model folder, where a loader would look for ordinary weights in it and start from "
            f"random ones; name it {output.stem}{PACKED_SUFFIX}, or write it to another folder"
        )


def _needs_packed(checkpoint: Checkpoint) -> None:
    if not checkpoint.packed:
        raise ValueError(f"{checkpoint.path} holds no packed weight; it can be loaded as it is")
