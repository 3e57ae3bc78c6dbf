"""The model card: what was pruned and how, and how anybody can count it again.

:func:`model_card` writes the section, :func:`write_model_card` puts it into a folder's ``README.md``, from where
``push_to_hub`` takes it.
"""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..grouping import starred
from ..io.files import atomic_file
from ..optimizer import ADMMNxM
from ..report import ModelReport
from ..report.tensor_cores import hardware_pattern, implies
from ..selection import SelectedWeight, select_weights
from ..sparsity import SparsityReport, WeightReport

__all__ = ["model_card", "write_model_card"]

_BEGIN, _END = "<!-- admm_nxm: sparsity -->", "<!-- /admm_nxm: sparsity -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n?", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n.*?^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)

_PAPER = (
    "Holmes, Zhang, He, Wu, *NxMTransformer: Semi-Structured Sparsification for Natural Language Understanding via "
    "ADMM*, NeurIPS 2021, [arXiv 2110.15766](https://arxiv.org/abs/2110.15766)"
)
_MEANING = (
    "Of every group of consecutive weights along the input dimension only some are not zero. The zeros are stored as "
    "such: the model loads and runs like a dense one, and no faster by itself."
)
_SKIPPED_BY_HARDWARE = " In 16 bits, kernels for sparse tensor cores can skip them."
_HARDWARE = hardware_pattern(torch.bfloat16)
_FORMS = {
    "lazy": "the model is evaluated at the weights' proximal point, and pruned ones may come back until the freeze",
    "proximal": "the weights themselves are moved toward the pattern by a proximal step",
    "gradient": "the penalty is added to the gradient, as in the paper",
}


def model_card(
    report: SparsityReport | Iterable[WeightReport],
    *,
    optimizer: ADMMNxM | None = None,
    history: Iterable[Mapping[str, Any]] | None = None,
    residual: float | None = None,
    method: str | None = None,
    parameters: int | None = None,
) -> str:
    """Write the section of a model card that says how sparse a model is, how that came about, and how to check it.

    Args:
        report: the count of the weights that ship, as :func:`admm_nxm.verify`, ``optimizer.finalize()`` and
            :func:`admm_nxm.report.sparsity_report` return it.
        optimizer: the optimizer of the run; its schedule, penalty, residual and selection are told. Without it, and
            without a :class:`~admm_nxm.report.ModelReport`, the command to count again names each weight.
        history: Trainer's ``state.log_history``, or what a recorder of a live run holds: one mapping a record. It gives
            the residual and the mask churn where there is no optimizer to ask.
        residual: primal residual at the freeze, as a share of the weights' norm; overrides the other two.
        method: how the weights were pruned, in a sentence of Markdown. By default ADMM if there is an optimizer, a
            history or a residual, and nothing otherwise.
        parameters: number of all parameters of the model, for the share that is pruned; with an optimizer it is known.

    Returns:
        Markdown, with the heading ``## Sparsity``.

    Raises:
        TypeError: ``report`` is no report, or ``optimizer`` no ADMMNxM.
        ValueError: the report has no weight, or a residual is negative.

    >>> from admm_nxm import verify
    >>> report = verify({"layers.0.fc.weight": torch.tensor([[1.0, 0.0, 2.0, 0.0]])})
    >>> print(model_card(report, residual=0.001).splitlines()[0])
    ## Sparsity
    """
    weights = _weights_of(report)
    if optimizer is not None and not isinstance(optimizer, ADMMNxM):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; an ADMMNxM is needed, such as trainer.admm")
    if residual is not None and not residual >= 0:
        raise ValueError(f"residual={residual!r} must be at least 0: a share of the weights' norm")
    records = [dict(record) for record in history or ()]
    if method is None and (optimizer is not None or records or residual is not None):
        method = f"ADMM, with admm_nxm {__version__}, after {_PAPER}"
    rows = [("pattern", _patterns(weights)), ("pruned", _share(weights, optimizer, parameters))]
    if method is not None:
        rows.append(("method", method))
    if optimizer is not None:
        rows += _run(optimizer)
    rows += _convergence(optimizer, records, residual)
    rows.append(("verification", _verdict(weights)))
    dense = [s for s in getattr(report, "skipped", ()) if s.wanted]
    if dense:
        rows.append(("asked for and left dense", ", ".join(f"`{s.name}` ({s.reason})" for s in dense)))
    table = ["| | |", "|---|---|", *(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows)]
    return "\n".join(
        [
            "## Sparsity",
            "",
            _MEANING + (_SKIPPED_BY_HARDWARE if all(implies(w.pattern, _HARDWARE) for w in weights) else ""),
            "",
            *table,
            "",
            "To count again:",
            "",
            "```bash",
            'pip install "admm-nxm[cli]"',
            _command(weights, _others(report, optimizer)),
            "```",
            "",
            "<details><summary>Pruned weights</summary>",
            "",
            *_table_of(weights),
            "",
            "</details>",
            "",
        ]
    )


def write_model_card(
    folder: str | os.PathLike[str],
    section: str,
    *,
    tags: Sequence[str] = (),
    base_model: str | None = None,
    library_name: str | None = "transformers",
) -> Path:
    """Put the section into ``README.md`` of a model folder, and what the Hub sorts models by into its metadata.

    An earlier section is replaced where it stands, and everything else is kept: the user's text, and each entry of the
    metadata, to which only what is missing is added. Doing it again changes nothing.

    Args:
        folder: the model folder, as ``save_pretrained`` wrote it.
        section: what :func:`model_card` returns.
        tags: further tags beside ``sparsity``, ``admm_nxm`` and the patterns that the section names, such as ``2:4``.
        base_model: the model that was fine-tuned, as the Hub knows it; a path of this machine is no such name.
        library_name: what the model is loaded with; None adds nothing.

    Returns:
        The file.

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
        raise ValueError(
            f"{path} has {_BEGIN} without {_END}, or the reverse: put the missing one back, or delete both"
        )
    patterns = re.findall(r"\b\d+:\d+\b", next(iter(re.findall(r"^\| pattern \|.*$", section, re.MULTILINE)), ""))
    wanted: dict[str, Any] = {"tags": ["sparsity", "admm_nxm", *patterns, *tags]}
    if base_model is not None:
        wanted["base_model"] = base_model
    if library_name is not None:
        wanted["library_name"] = library_name
    head, body = _merge_metadata(path, text, wanted)
    marked = f"{_BEGIN}\n{section.strip()}\n{_END}\n"
    if _BEGIN in body:
        before, after = body[: body.index(_BEGIN)], _SECTION.sub("", body[body.index(_BEGIN) :])
        body = before + marked + after
    else:
        body = f"{body.rstrip()}\n\n{marked}" if body.strip() else f"\n{marked}"
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes((head + body).encode("utf-8"))
    return path


def _weights_of(report: object) -> list[WeightReport]:
    if not isinstance(report, Iterable):
        raise TypeError(f"report is a {type(report).__name__}; a SparsityReport is needed, as verify() returns it")
    weights = list(report)
    for weight in weights:
        if not isinstance(weight, WeightReport):
            raise TypeError(
                f"the report holds a {type(weight).__name__}; WeightReports are needed, as verify() makes them"
            )
    if not weights:
        raise ValueError("the report has no weight: there is nothing to say")
    return weights


# ---------------------------------------------------------------------- the rows


def _patterns(weights: Sequence[WeightReport]) -> str:
    counts: dict[str, int] = {}
    for weight in weights:
        counts[str(weight.pattern)] = counts.get(str(weight.pattern), 0) + 1
    if len(counts) == 1:
        pattern = weights[0].pattern
        return f"{pattern} (at most {pattern.keep} of every {pattern.group} weights are not zero)"
    return ", ".join(f"{spelling} ({count} weights)" for spelling, count in counts.items())


def _share(weights: Sequence[WeightReport], optimizer: ADMMNxM | None, parameters: int | None) -> str:
    entries = sum(weight.numel for weight in weights)
    zeros = sum(weight.zeros for weight in weights)
    if parameters is None and optimizer is not None:
        selection = optimizer.selection
        shapes = [*(w.shape for w in selection.weights), *(s.shape for s in selection.skipped)]
        parameters = sum(map(math.prod, shapes))
    of_all = f" of {parameters:,} parameters ({entries / parameters:.1%})" if parameters else " parameters"
    return f"{len(weights)} weights, {entries:,}{of_all}; {zeros / entries if entries else 0.0:.2%} of them are zero"


def _run(optimizer: ADMMNxM) -> list[tuple[str, str]]:
    state = optimizer.param_groups[0]
    inner = type(optimizer.inner).__name__
    steps, frozen_at = int(state.get("admm_step", 0)), int(state.get("admm_frozen_at", -1))
    rows = [("form", f'`penalty="{optimizer.penalty}"` around {inner}: {_FORMS[optimizer.penalty]}')]
    freeze = f"mask frozen after step {frozen_at}" if frozen_at >= 0 else "mask not frozen yet"
    planned = f" of {optimizer.total_steps:,}" if optimizer.total_steps not in (None, steps) else ""
    rows.append(("schedule", f"{steps:,}{planned} optimizer steps, {freeze}; rho {optimizer.rho:.4g} at the end"))
    return rows


def _convergence(
    optimizer: ADMMNxM | None, records: Sequence[Mapping[str, Any]], residual: float | None
) -> list[tuple[str, str]]:
    churn: float | None = None
    tolerance = ""
    logged = [float(r["admm/primal_residual"]) for r in records if "admm/primal_residual" in r]
    churns = [float(r["admm/mask_churn"]) for r in records if "admm/mask_churn" in r]
    where = "at the freeze"
    if optimizer is not None:
        state = optimizer.param_groups[0]
        tolerance = f" (tolerance {optimizer.residual_tolerance:.1%})"
        # Below 0 they have not been measured: nothing was projected yet.
        if residual is None and state.get("admm_freeze_residual", -1.0) >= 0:
            residual = float(state["admm_freeze_residual"])
        if state.get("admm_freeze_churn", -1.0) >= 0:
            churn = float(state["admm_freeze_churn"])
    if residual is None and logged:
        # Once the mask is frozen the logged residual is 0 by construction; what counts is the last before.
        residual, where = next((value for value in reversed(logged) if value > 0), 0.0), "last logged before the freeze"
    if churn is None and churns:
        churn = next((value for value in reversed(churns) if value > 0), 0.0)
    rows = []
    if residual is not None:
        rows.append(("primal residual", f"{residual:.1e} of the weights' norm, {where}{tolerance}"))
    if churn is not None:
        rows.append(("mask churn", f"{churn:.2%} of the kept places changed in the last update of the mask"))
    return rows


def _verdict(weights: Sequence[WeightReport]) -> str:
    groups, bad = sum(w.groups for w in weights), sum(w.bad_groups for w in weights)
    if not bad:
        return f"**ok**: {groups:,} groups counted, 0 violate the pattern"
    worst = [w.name for w in weights if not w.ok]
    return (
        f"**VIOLATED**: {bad:,} of {groups:,} groups, in {len(worst)} of {len(weights)} weights (`{worst[0]}`"
        f"{', …' if worst[1:] else ''})"
    )


# ---------------------------------------------------------------------- the weights


def _others(report: object, optimizer: ADMMNxM | None) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the model's other parameters, by name; None if nothing at hand tells them."""
    if optimizer is not None:
        selection = optimizer.selection
        return {w.name: w.shape for w in selection} | {s.name: s.shape for s in selection.skipped}
    return {w.name: w.shape for w in report.dense} if isinstance(report, ModelReport) else None


def _command(weights: Sequence[WeightReport], others: Mapping[str, tuple[int, ...]] | None) -> str:
    """The command that counts just these weights."""
    spellings = {str(weight.pattern) for weight in weights}
    # --pattern counts what the default rules choose among all parameters, so that these have to be known.
    if others is not None and len(spellings) == 1 and _are_default(weights, others):
        return f"admm-nxm verify PATH --pattern {spellings.pop()}"
    lines = [f"  --select '{expression}={spelling}'" for expression, spelling in _rules(weights)]
    return " \\\n".join(["admm-nxm verify PATH", *lines])


def _are_default(weights: Sequence[WeightReport], others: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the default rules choose the same weights by name."""
    shapes = {**others, **{weight.name: weight.shape for weight in weights}}
    try:
        chosen, _ = select_weights(
            {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
            weights[0].pattern,
            ineligible="skip",
            trainable=False,
        )
    except ValueError:
        return False
    return _places(chosen) == _places(weights)


def _places(weights: Iterable[WeightReport | SelectedWeight]) -> set[tuple[str, int]]:
    return {(weight.name, weight.dim) for weight in weights}


def _rules(weights: Sequence[WeightReport]) -> list[tuple[str, str]]:
    """Regular expressions that match just these names, one for all blocks where that is exact."""
    families: dict[tuple[str, str], list[list[str]]] = {}
    for weight in weights:
        parts = weight.name.split(".")
        families.setdefault((starred(weight.name), str(weight.pattern)), []).append(parts)
    rules = []
    for (_, spelling), members in families.items():
        columns = [sorted(set(column), key=lambda part: (len(part), part)) for column in zip(*members, strict=True)]
        if math.prod(map(len, columns)) == len({tuple(member) for member in members}):
            pieces = [re.escape(c[0]) if len(c) == 1 else f"({'|'.join(map(re.escape, c))})" for c in columns]
            rules.append((r"\.".join(pieces), spelling))
        else:
            rules += [(re.escape(".".join(member)), spelling) for member in members]
    return rules


def _table_of(weights: Sequence[WeightReport]) -> list[str]:
    rows: dict[tuple[str, tuple[int, ...], str], int] = {}
    for weight in weights:
        key = (starred(weight.name), weight.shape, str(weight.pattern))
        rows[key] = rows.get(key, 0) + 1
    lines = ["| weight | shape | pattern | how many |", "|---|---|---|---:|"]
    return lines + [
        f"| `{name}` | {' × '.join(map(str, shape))} | {spelling} | {count} |"
        for (name, shape, spelling), count in rows.items()
    ]


# ---------------------------------------------------------------------- the metadata


def _merge_metadata(path: Path, text: str, wanted: Mapping[str, Any]) -> tuple[str, str]:
    """Return the front matter with what is missing added, and the rest of the text."""
    try:
        hub = importlib.import_module("huggingface_hub")
        dump = importlib.import_module("huggingface_hub.utils").yaml_dump
    except ImportError as error:
        raise ImportError(f'huggingface_hub is needed for model cards: pip install "admm-nxm[hf]" ({error})') from error
    found = _FRONT_MATTER.match(text)
    body = text[found.end() :] if found else text
    try:
        # RepoCard, not ModelCard: it leaves results of evaluations and all else as they are.
        # Its attributes, not to_dict(): that leaves out entries that are null.
        data = dict(vars(hub.RepoCard(found.group().lstrip("\ufeff").lstrip()).data)) if found else {}
    except Exception as error:  # YAML has error types of its own
        raise ValueError(f"the metadata of {path} cannot be read; mend it: {error}") from error
    merged = dict(data)
    for key, value in wanted.items():
        if key == "tags":
            given = data.get("tags") or []
            tags = [given] if isinstance(given, str) else list(given)
            merged["tags"] = [*tags, *(tag for tag in dict.fromkeys(value) if tag not in tags)]
        elif data.get(key) is None:
            merged[key] = value
    if found and merged == data:
        return found.group(), body  # as the user wrote it, comments and all
    return f"---\n{dump(merged, sort_keys=False).strip()}\n---\n", body
