"""The run behind ``admm-nxm prune --data``: a saved model, some texts, the solve, and the files written again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig

from ..io.prune import prune_files
from ..oneshot import prune
from ..pattern import Pattern
from ..selection import select_weights
from ..sparsity import SparsityReport
from .classifier import class_numbers, find_device, length_limit, load_tokenizer, of_an_argument, quiet
from .console import note
from .errors import InputError, blaming
from .options import Rules
from .progress import WeightProgress
from .texts import FILE_KINDS, Columns, Row, check_kind, check_texts, read_file

_TEXTS, _PIECES = 128, 64
_LENGTH, _PIECE_LENGTH = 128, 256
_FEW_TOKENS = 1000  # in a thousand dimensions the model error of fewer is near zero, whatever the model has lost

Kind = Literal["classifier", "language model", "encoder"]
_ENDINGS: dict[str, Kind] = {
    "ForSequenceClassification": "classifier",
    "ForCausalLM": "language model",
    "LMHeadModel": "language model",
}


@dataclass(frozen=True)
class Settings:
    """Hold the options of the user; None where the run chooses."""

    path: Path
    output: Path
    pattern: Pattern | str
    select: Rules | None
    data: Path
    text_columns: tuple[str, ...] | None
    label_column: str | None
    on_bad_row: str | None
    samples: int | None
    max_length: int | None
    seed: int
    device: str
    overwrite: bool


def calibrate(settings: Settings) -> tuple[SparsityReport, dict[str, Any]]:
    """Prune a saved model by what texts tell, write it, and return the count and what there is to tell of the texts."""
    device = find_device(settings.device)
    tokenizer = _tokenizer(settings.path)
    model, kind = _load(settings.path, device)
    batches, told = _batches(settings, kind, model, tokenizer)
    note(f"model   {type(model).__name__}, on {device}")
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    gathered = "A and G" if "labels" in batches[0] else "A alone: there are no labels"
    few = "; these are few: give some ten thousand" if tokens < _FEW_TOKENS else ""
    note(f"data    {told}, {tokens:,} tokens ({gathered}){few}")
    selection, _ = select_weights(model, settings.pattern, settings.select, trainable=False)
    done: list[SparsityReport] = []

    def values() -> Mapping[str, Tensor]:
        bar = WeightProgress()
        with bar, blaming("", torch.OutOfMemoryError, remedy="; give a smaller --max-length, or --device cpu"):
            done.append(prune(model, settings.pattern, batches, select=settings.select, progress=bar.show))
        return dict(model.named_parameters())

    written = prune_files(settings.path, settings.output, select=selection, values=values, overwrite=settings.overwrite)
    facts = {
        "data": settings.data.name,
        "kind": kind,
        "texts": len(batches),
        "tokens": tokens,
        "labels": "labels" in batches[0],
        "seed": settings.seed,
        "device": str(device),
    }
    return replace(written, model_errors=done[0].model_errors), facts


def _tokenizer(path: Path) -> Any:
    if not path.is_dir():
        raise InputError(f"{path} is no model folder, which --data needs for its model and tokenizer")
    with of_an_argument():
        return load_tokenizer(str(path))


def _load(path: Path, device: torch.device) -> tuple[Any, Kind]:
    """Load a model by the class that its configuration names."""
    with blaming(f"{path}: its config.json cannot be read", OSError, ValueError, KeyError), quiet():
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    name = next(iter(config.architectures or ()), "nothing")
    cls = getattr(transformers, name, None)
    kind: Kind = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), "encoder")
    if cls is None or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{path}: its config.json names {name}, which is no classifier, language model or encoder of transformers; "
            "prune it in Python: admm_nxm.prune(model, pattern, batches)"
        )
    # On a CPU half precision is slow; what is written has the dtypes of the files.
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    with blaming(str(path), OSError, ValueError, SafetensorError, remedy="; save the model again"), quiet():
        model, info = cls.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, dtype=dtype, output_loading_info=True
        )
    missing = [key for key in info["missing_keys"] if "pooler" not in key]  # which is not pruned, and changes nothing
    if missing:
        raise InputError(
            f"{path}: {len(missing)} weights of {name} are not in the files ({min(missing)}, ...); save the model with "
            "them"
        )
    model.config.use_cache = False
    return model.to(device), kind


def _batches(settings: Settings, kind: Kind, model: Any, tokenizer: Any) -> tuple[list[dict[str, Tensor]], str]:
    """Return batches of one text each, so that nothing is padding, and what to say of them."""
    limit = length_limit(model, tokenizer)
    usual = _PIECE_LENGTH if kind == "language model" else _LENGTH
    length = settings.max_length or int(min(usual, limit))
    if length > limit:
        raise InputError(f"--max-length {length} is more than {settings.path} takes; give at most {limit:.0f}")
    source = random.Random(settings.seed)
    if kind == "language model":
        pieces, whole = _pieces([row[0] for row in _rows(settings, kind)[0]], tokenizer, length)
        chosen = source.sample(pieces, min(settings.samples or _PIECES, len(pieces)))
        batches = [{"input_ids": torch.tensor([piece]), "labels": torch.tensor([piece])} for piece in chosen]
        return batches, f"{len(chosen)} of {len(pieces)} pieces of {whole} tokens"
    rows, labelled = _rows(settings, kind, labelled=kind == "classifier" and _has_classes(model.config))
    labels = class_numbers([row[-1] for row in rows], model.config) if labelled else ()
    chosen_rows = source.sample(range(len(rows)), min(settings.samples or _TEXTS, len(rows)))
    batches = []
    for i in chosen_rows:
        batch = dict(tokenizer(*rows[i][:-1], truncation=True, max_length=length, return_tensors="pt"))
        batches.append({**batch, "labels": torch.tensor([labels[i]])} if labelled else batch)
    return batches, f"{len(batches)} of {len(rows)} texts"


def _rows(settings: Settings, kind: Kind, *, labelled: bool = False) -> tuple[list[Row], bool]:
    """Return the texts, and whether they have labels, which are read from tables where they are wanted."""
    plain = check_kind(settings.data, kinds=(*FILE_KINDS, ".txt")) == ".txt"
    labelled = labelled and not plain
    if settings.label_column is not None and not labelled:
        raise InputError(
            f"--label-column {settings.label_column}: labels are read from a table, for a classifier that gives one of "
            "several; leave it out"
        )

    def say(text: str) -> None:
        note(f"note    --data: {text}")

    if plain:
        if settings.text_columns is not None:
            raise InputError(f"--text-column {settings.text_columns[0]}: a .txt file has no columns; leave it out")
        if settings.on_bad_row is not None:
            raise InputError(f"--on-bad-row {settings.on_bad_row}: no row of a .txt file is bad; leave it out")
        with blaming(f"--data {settings.data}", OSError, UnicodeDecodeError, remedy="; a file in UTF-8 is needed"):
            lines = settings.data.read_text(encoding="utf-8-sig").splitlines()
        rows: list[Row] = [(line, "") for line in lines if line.strip()]
        if not rows:
            raise InputError(f"--data {settings.data} has no texts; give some hundred")
        return rows, False
    columns = settings.text_columns or ("text",)
    if kind == "language model" and len(columns) > 1:
        raise InputError(
            f"--text-column is given {len(columns)} times; a language model takes one text, so put all into one column"
        )
    check_texts(columns)
    hint = "; name another with --text-column"
    if labelled:
        hint = "; name others with --text-column and --label-column"
        hint += "; a .txt file (a text a line) serves without labels" if len(columns) == 1 else ""
    elif kind == "classifier":
        say("labels are not read, as the model does not give one of several")
    label = (settings.label_column or "label") if labelled else None
    return read_file(settings.data, Columns(columns, label, hint, settings.on_bad_row or "error"), tell=say), labelled


def _pieces(texts: Sequence[str], tokenizer: Any, length: int) -> tuple[list[list[int]], int]:
    """Return the texts as one stream of tokens, cut into pieces of so many, and how many that is."""
    with quiet():
        encoded = tokenizer("\n".join(texts) if len(texts) > 1 else texts[0])["input_ids"]
    length = min(length, len(encoded))
    return [encoded[start : start + length] for start in range(0, len(encoded) - length + 1, length)], length


def _has_classes(config: Any) -> bool:
    """Say whether a classifier gives one label of several."""
    return config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
