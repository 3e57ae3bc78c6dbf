r"""The selection of a run, recorded with what is saved, so that a file is counted by what was pruned.

The record, version 1, is JSON::

    {"format": "admm-nxm-selection", "version": 1,
     "weights": {NAME: {"pattern": "2:4", "shape": [64, 32], "dim": 1}},
     "aliases": {OTHER_NAME: NAME},
     "left_dense": {NAME: {"shape": [64, 30], "reason": "its width 30 along dim 1 is no multiple of 4",
                           "wanted": true}}}

``pattern`` is keep:group and ``dim`` counts from the front, as in :mod:`admm_nxm.io.packing`. ``aliases`` are further
names of tied weights, ``left_dense`` are the other parameters, ``wanted`` those that the rules asked for and that could
not be pruned; all three may be missing. The names are those of the model. In a folder the record is the file
``admm_nxm.json``, in a single safetensors file the entry ``admm_nxm_selection`` of the ``__metadata__``, in an ONNX
file a part of the entry ``admm_nxm``. A packed file without a record says itself which weights are packed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..selection import SelectedWeight, Selection, SkippedWeight, named_tensors, select_weights
from .files import Checkpoint, atomic_file, stand_ins
from .tensor_files import read_record, read_shape, read_weight, refusing

__all__ = [
    "RECORD_FILE",
    "RECORD_KEY",
    "read_selection",
    "record_selection",
    "selection_from_json",
    "selection_metadata",
    "selection_to_json",
]

RECORD_FILE = "admm_nxm.json"
"""Name of the record in a folder."""

RECORD_KEY = "admm_nxm_selection"
"""Key of the record in the metadata of a safetensors file."""

FORMAT = "admm-nxm-selection"
VERSION = 1


def record_selection(folder: str | os.PathLike[str], selection: Selection) -> Path:
    """Record in a folder which of the weights saved there were pruned, and how.

    ``verify``, ``model_report`` and ``pack`` read it. Call it after ``model.save_pretrained(folder)``.

    Args:
        folder: where the weights were saved.
        selection: such as ``optimizer.selection``.

    Returns:
        The file; an earlier one is replaced.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; save the model first, with save_pretrained")
    path = folder / RECORD_FILE
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(selection_to_json(selection, indent=2) + "\n", encoding="utf-8")
    return path


def selection_metadata(selection: Selection) -> dict[str, str]:
    """Return the metadata that records a selection in a single file.

    Args:
        selection: such as ``optimizer.selection``.

    Returns:
        What to pass to ``safetensors.torch.save_file(..., metadata=...)``: the record, and ``"format": "pt"``, which
        transformers wants to see in a file with metadata.
    """
    return {"format": "pt", RECORD_KEY: selection_to_json(selection)}


def read_selection(checkpoint: Checkpoint) -> Selection | None:
    """Return the selection that is recorded with a checkpoint, by the names of its files; None if there is none."""
    tensors = stand_ins(checkpoint)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(tensors).items()}
    found = [
        _read(f"the metadata {RECORD_KEY!r} of {file}", header.metadata[RECORD_KEY])
        for file, header in checkpoint.headers.items()
        if RECORD_KEY in header.metadata
    ]
    if found:
        weights = {weight.name: weight for selection in found for weight in selection.weights}
        skipped = {entry.name: entry for selection in found for entry in selection.skipped}
        recorded = Selection(tuple(weights.values()), tuple(skipped.values()))
        return _in_names_of(shapes, recorded, f"the metadata of {checkpoint.files[0]}")
    whole = checkpoint.path.is_dir() or checkpoint.path == checkpoint.index
    path = (checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent) / RECORD_FILE
    if path.is_file():
        recorded = _read(str(path), path)
        if whole:
            return _in_names_of(shapes, recorded, str(path))
        here = tuple(w for w in recorded if any(shapes.get(name) == w.shape for name in (w.name, *w.aliases)))
        if here:
            return Selection(here, tuple(entry for entry in recorded.skipped if entry.name in shapes))
    return _of_packed(checkpoint, tensors)


def selection_to_json(selection: Selection, *, indent: int | None = None) -> str:
    """Return the text of a record."""
    weights = {w.name: {"pattern": str(w.pattern), "shape": list(w.shape), "dim": w.dim} for w in selection}
    aliases = {alias: weight.name for weight in selection for alias in weight.aliases}
    dense = {
        entry.name: {"shape": list(entry.shape), "reason": entry.reason, **({"wanted": True} if entry.wanted else {})}
        for entry in selection.skipped
    }
    fields: dict[str, Any] = {"format": FORMAT, "version": VERSION, "weights": weights}
    fields |= {key: value for key, value in (("aliases", aliases), ("left_dense", dense)) if value}
    return json.dumps(fields, ensure_ascii=False, indent=indent, separators=(",", ":") if indent is None else None)


def selection_from_json(text: str) -> Selection:
    """Read the text of a record."""
    weights, aliases, dense = read_record(text, FORMAT, VERSION, ("weights", "aliases", "left_dense"))
    names: dict[str, list[str]] = {name: [] for name in weights}
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in names or alias in names:
            raise ValueError(f"it calls {alias!r} another name of {name!r}")
        names[name].append(alias)
    selected = [
        SelectedWeight(name, *read_weight(name, weights[name]), tuple(others)) for name, others in names.items()
    ]
    skipped = []
    for name, entry in dense.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise ValueError(f"it gives no reason why {name!r} is dense")
        wanted = entry.get("wanted", False)
        if type(wanted) is not bool:
            raise ValueError(f"it says wanted={wanted!r} of {name!r}")
        skipped.append(SkippedWeight(name, read_shape(name, entry), entry["reason"], wanted))
    return Selection(tuple(selected), tuple(skipped))


def _read(place: str, text: str | Path) -> Selection:
    with refusing(f"{place} is no readable record of a selection, and has to be corrected or deleted"):
        return selection_from_json(text if isinstance(text, str) else text.read_text(encoding="utf-8"))


def _of_packed(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Selection | None:
    """Return what a packed checkpoint says by itself; why the rest is dense is told by the default rules."""
    aliases = [pair for packed in checkpoint.packed.values() for pair in packed.aliases.items()]
    layouts = {name: layout for packed in checkpoint.packed.values() for name, layout in packed.weights.items()}
    if not layouts:
        return None
    clean = {id(t): name for name, t in reversed(named_tensors(tensors).items())}
    selected = tuple(
        SelectedWeight(
            clean[id(tensors[name])], lay.shape, lay.pattern, lay.dim, tuple(a for a, n in aliases if n == name)
        )
        for name, lay in layouts.items()
    )
    names = {weight.name for weight in selected}
    try:
        usual, _ = select_weights(tensors, selected[0].pattern, ineligible="skip", trainable=False)
    except ValueError:  # none of its names is one of the usual ones
        return Selection(selected, ())
    others = [SkippedWeight(w.name, w.shape, "stored as it was") for w in usual if w.name not in names]
    return Selection(selected, (*(entry for entry in usual.skipped if entry.name not in names), *others))


def _in_names_of(shapes: Mapping[str, tuple[int, ...]], selection: Selection, place: str) -> Selection:
    """Return a selection by the names that the files give its weights: saving may rename the beginning of some.

    It is taken for that if all weights with that beginning are found so, each with its shape, in one way only.
    """
    weights: list[SelectedWeight] = []
    renamed: dict[str, str] = {}
    for weight in selection:
        name = weight.name_in(shapes)
        if name is None:
            old = next((old for old in renamed if weight.name.startswith(old)), None)
            if old is None:
                missing = [w for w in selection if w.name_in(shapes) is None]
                found = _new_beginning(weight, missing, shapes)
                if found is None:
                    raise ValueError(
                        f"{place} records that {weight.name!r} was pruned, and the checkpoint has no such weight: it "
                        "was renamed or removed since. Give a pattern or rules, which are used in place of the record"
                    )
                old, new = found
                renamed[old] = new
            name = renamed[old] + weight.name.removeprefix(old)
            weight = SelectedWeight(name, weight.shape, weight.pattern, weight.dim)
        weights.append(weight)
    return Selection(tuple(weights), selection.skipped)


def _new_beginning(
    weight: SelectedWeight, missing: list[SelectedWeight], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """Return the beginning of names that was replaced, and by what; None if that cannot be told."""
    parts = weight.name.split(".")
    for cut in range(len(parts) - 1):
        old, rest = "".join(f"{part}." for part in parts[:cut]), ".".join(parts[cut:])
        moved = [w for w in missing if w.name.startswith(old)]
        fits = [
            new
            for new in (n.removesuffix(rest) for n in shapes if n == rest or n.endswith(f".{rest}"))
            if all(shapes.get(new + w.name.removeprefix(old)) == w.shape for w in moved)
        ]
        if fits:
            return (old, fits[0]) if len(fits) == 1 else None
    return None
