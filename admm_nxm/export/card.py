"""The model card: what was pruned and how, and how anybody can count it again; ``push_to_hub`` takes it along."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..checks import missing
from ..grouping import starred, such_as
from ..io.files import atomic_file
from ..optimizer import ADMMNxM
from ..report.tensor_cores import hardware_pattern, implies
from ..sparsity import SparsityReport, WeightReport

__all__ = ["model_card", "write_model_card"]

_BEGIN, _END = "<!-- admm_nxm: sparsity -->", "<!-- /admm_nxm: sparsity -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)

_PAPER = (
    "Holmes, Zhang, He, Wu, *NxMTransformer: Semi-Structured Sparsification for Natural Language Understanding via "
    "ADMM*, NeurIPS 2021, [arXiv 2110.15766](https://arxiv.org/abs/2110.15766)"
)
_SKIPPED_BY_HARDWARE = " In 16 bits, kernels for sparse tensor cores can skip them."
_HARDWARE = hardware_pattern(torch.bfloat16)
_TOLD_LAST = {
    "admm/model_error": ("model error", "{:.2g}: the loss by its quadratic model, as a share of that at zero weights"),
    "admm/primal_residual": ("primal residual", "{:.1e} of the weights' norm, last logged before the freeze"),
    "admm/mask_churn": ("mask churn", "{:.2%} of the kept places changed in the last update of the mask"),
}
_SECTION_TEXT = """## Sparsity

Of every group of consecutive weights along the input dimension only some are not zero. The zeros are stored as such: \
the model loads and runs like a dense one, and no faster by itself.{more}

| | |
|---|---|
{table}

To count again:

```bash
pip install ".[cli]"  # in a checkout of admm_nxm
admm-nxm verify PATH
```

<details><summary>Pruned weights</summary>

| weight | shape | pattern | how many |
|---|---|---|---:|
{pruned}

</details>
"""


def model_card(
    report: SparsityReport | Iterable[WeightReport],
    *,
    optimizer: ADMMNxM | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    method: str | None = None,
    parameters: int | None = None,
) -> str:
    """Write the section of a model card that says how sparse a model is, how that came about, and how to check it.

    Args:
        report: the count of the weights that ship, such as :func:`admm_nxm.verify` or ``finalize()`` returns.
        optimizer: the optimizer of the run; its inner class, its schedule and its model error are told.
        history: Trainer's ``state.log_history``, or the rows of a recorder; they give the model error where the
            optimizer does not know it, and the residual of the paper's form before its freeze.
        method: how the weights were pruned, in Markdown; None is ADMM if there is an optimizer or a history.
        parameters: number of all parameters of the model, for the share that is pruned; with an optimizer it is known.

    Returns:
        Markdown, with the heading ``## Sparsity``. The command in it counts the weights that
        :func:`admm_nxm.io.selection_record.record_selection` recorded, as Trainer and the command line do.

    Raises:
        TypeError: ``report`` is no report, or ``optimizer`` no ADMMNxM.
        ValueError: the report has no weight.

    >>> import torch
    >>> from admm_nxm import verify
    >>> report = verify({"layers.0.fc.weight": torch.tensor([[1.0, 0.0, 2.0, 0.0]])})
    >>> print(model_card(report).splitlines()[0])
    ## Sparsity
    """
    weights = _weights_of(report)
    if optimizer is not None and not isinstance(optimizer, ADMMNxM):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; an ADMMNxM is needed, such as trainer.admm")
    records = [dict(record) for record in history or ()]
    if method is None and (optimizer is not None or records):
        method = f"ADMM, with admm_nxm {__version__}, after {_PAPER}"
    dense = [f"`{s.name}` ({s.reason})" for s in getattr(report, "skipped", ()) if s.wanted]
    rows = {
        "pattern": _patterns(weights),
        "pruned": _share(weights, optimizer, parameters),
        "method": method,
        **(_run(optimizer) if optimizer is not None else {}),
        **_convergence(optimizer, records),
        "verification": _verdict(weights),
        "asked for and left dense": ", ".join(dense),
    }
    table = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items() if value]
    alike = Counter((starred(w.name), " × ".join(map(str, w.shape)), str(w.pattern)) for w in weights)
    pruned = [f"| `{name}` | {shape} | {pattern} | {count} |" for (name, shape, pattern), count in alike.items()]
    more = _SKIPPED_BY_HARDWARE if all(implies(w.pattern, _HARDWARE) for w in weights) else ""
    return _SECTION_TEXT.format(more=more, table="\n".join(table), pruned="\n".join(pruned))


def write_model_card(
    folder: str | os.PathLike[str],
    section: str,
    *,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    library_name: str | None = "transformers",
) -> Path:
    """Put the section into ``README.md`` of a model folder, with metadata for the Hub, and return that file's path.

    An earlier section is replaced where it stands, and everything else is kept: the user's text, and each entry of the
    metadata, to which only what is missing is added. Doing it again changes nothing.

    Args:
        folder: the model folder, as ``save_pretrained`` wrote it.
        section: what :func:`model_card` returns.
        tags: further tags beside ``sparsity``, ``admm_nxm`` and the patterns that the section names, such as ``2:4``.
        base_model: the model that was fine-tuned, as the Hub knows it; a path of this machine is no such name.
        library_name: what the model is loaded with; None adds nothing.

    Raises:
        ImportError: huggingface_hub is not installed.
        NotADirectoryError: there is no such folder.
        ValueError: the metadata of the file cannot be read, or the file has the beginning of a section and no end.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; save the model first, with save_pretrained")
    if _BEGIN in section or _END in section:
        raise ValueError(f"the section has the marks that it is put between, {_BEGIN} and {_END}; leave them out")
    path = folder / "README.md"
    try:
        text = path.read_bytes().decode("utf-8") if path.is_file() else ""  # bytes: line ends stay as they are
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; save it as such: {error}") from error
    if text.count(_BEGIN) != len(_SECTION.findall(text)) or text.count(_END) != text.count(_BEGIN):
        raise ValueError(f"{path} has {_BEGIN} without {_END}, or the reverse: add the missing one, or delete both")
    patterns = re.findall(r"\b\d+:\d+\b", next(iter(re.findall(r"^\| pattern \|.*$", section, re.MULTILINE)), ""))
    wanted = {"base_model": base_model, "library_name": library_name}
    marked = f"{_BEGIN}\n{section.strip()}\n{_END}\n"
    if _BEGIN in text:
        before, after = text[: text.index(_BEGIN)], _SECTION.sub("", text[text.index(_BEGIN) :])
        text = before + marked + after
    else:
        text = f"{text.rstrip()}\n\n{marked}" if text.strip() else f"\n{marked}"
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
        try:
            _merge_metadata(temporary, ["sparsity", "admm_nxm", *patterns, *tags], wanted)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return path


def _weights_of(report: object) -> list[WeightReport]:
    if not isinstance(report, Iterable):
        raise TypeError(f"report is a {type(report).__name__}; a SparsityReport is needed, as verify() returns it")
    weights = list(report)
    if kinds := {type(weight).__name__ for weight in weights if not isinstance(weight, WeightReport)}:
        raise TypeError(f"the report holds a {min(kinds)}; WeightReports are needed, as verify() makes them")
    if not weights:
        raise ValueError("the report has no weight: there is nothing to say")
    return weights


def _patterns(weights: Sequence[WeightReport]) -> str:
    counts, first = Counter(weight.pattern for weight in weights), weights[0].pattern
    if len(counts) == 1:
        return f"{first} (at most {first.keep} of every {first.group} weights are not zero)"
    return ", ".join(f"{pattern} ({count} weights)" for pattern, count in counts.items())


def _share(weights: Sequence[WeightReport], optimizer: ADMMNxM | None, parameters: int | None) -> str:
    entries, zeros = sum(weight.numel for weight in weights), sum(weight.zeros for weight in weights)
    if parameters is None and optimizer is not None:
        shapes = [w.shape for w in optimizer.selection.weights] + [s.shape for s in optimizer.selection.skipped]
        parameters = sum(map(math.prod, shapes))
    of_all = f" of {parameters:,} parameters ({entries / parameters:.1%})" if parameters else " parameters"
    return f"{len(weights)} weights, {entries:,}{of_all}; {zeros / entries if entries else 0.0:.2%} of them are zero"


def _run(optimizer: ADMMNxM) -> dict[str, str]:
    now = optimizer.figures()
    planned = f" of {now.total_steps:,}" if now.total_steps not in (None, now.step) else ""
    pruned = f"pruned after step {now.pruned_at}" if now.pruned_at is not None else "not pruned yet"
    w_step = "in closed form" if optimizer.w_step == "exact" else f"by the optimizer, rho {now.rho:.4g} at the end"
    return {
        "optimizer": f"{type(optimizer.inner).__name__}; w-step {w_step}",
        "schedule": f"{now.step:,}{planned} optimizer steps, {pruned}",
    }


def _convergence(optimizer: ADMMNxM | None, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    # Once the mask is frozen the residual is 0 by construction; what counts is the last before.
    last = {key: float(value) for row in records for key, value in row.items() if key in _TOLD_LAST and value > 0}
    if optimizer is not None and (error := optimizer.figures().model_error) is not None:
        last["admm/model_error"] = error
    return {name: text.format(last[key]) for key, (name, text) in _TOLD_LAST.items() if key in last}


def _verdict(weights: Sequence[WeightReport]) -> str:
    groups, bad = sum(w.groups for w in weights), sum(w.bad_groups for w in weights)
    if not bad:
        return f"**ok**: {groups:,} groups counted, 0 violate the pattern"
    worst = [f"`{w.name}`" for w in weights if not w.ok]
    return f"**VIOLATED**: {bad:,} of {groups:,} groups, in {len(worst)} of {len(weights)} weights ({such_as(worst)})"


def _merge_metadata(path: Path, tags: Sequence[str], wanted: Mapping[str, Any]) -> None:
    """Add to the metadata of a file what is missing there."""
    try:
        from huggingface_hub import metadata_load, metadata_save
    except ImportError as error:
        raise ImportError(missing(f"model cards need huggingface_hub ({error})", "hf")) from error
    try:
        data = metadata_load(path) or {}
    except Exception as error:  # YAML has error types of its own
        raise ValueError(f"the metadata cannot be read; correct it: {error}") from error
    given = data.get("tags") or []
    given = [given] if isinstance(given, str) else list(given)
    merged = {**data, "tags": [*given, *(tag for tag in dict.fromkeys(tags) if tag not in given)]}
    merged |= {key: value for key, value in wanted.items() if value is not None and data.get(key) is None}
    if merged != data:  # else it stays as the user wrote it, comments and all
        metadata_save(path, merged)
