"""ONNX: export a finalized model and prove that what is in the file is that model, still sparse.

TensorRT, and whatever else reads ONNX, looks for the pattern along the dimension that a matrix product sums over. That
is where :func:`verify_onnx` counts.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..io.files import atomic_file, refuse_existing
from ..io.selection_record import selection_to_json
from ..io.verify import verify
from ..pattern import Pattern
from ..selection import (
    Select,
    SelectedWeight,
    Selection,
    SkippedWeight,
    clean_name,
    named_tensors,
    select_weights,
    unwrap_model,
)
from ..sparsity import SparsityReport, SparsityViolation, check_weights, cover
from .onnx_graph import METADATA_KEY, GraphWeight, OnnxGraph, read_graph, require

__all__ = ["OnnxReport", "export_onnx", "verify_onnx"]

Rules = Union[Pattern, str, Select, Selection, None]  # noqa: UP007 - evaluated at run time
Example = Union[Tensor, Sequence[Tensor], Mapping[str, Tensor]]  # noqa: UP007
Axes = Mapping[str, Mapping[int, str]]

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_LIMIT = 1 << 31  # of a protobuf message
_KNOWN_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"# The axis name: .* will not be used",
    r".*TypedStorage is deprecated",
)


@dataclass(frozen=True)
class OnnxReport:
    """What an export came to; prints as a few lines.

    Args:
        path: the file.
        opset: version of the default operator set in it.
        inputs: input -> its sizes, a name where the axis is dynamic.
        outputs: names of the outputs.
        bytes: size on disk, external data included.
        max_abs_difference: largest difference between an output of onnxruntime and torch's; None if not compared.
        max_rel_difference: the same as a share of the output's largest absolute value.
        tolerance: what ``max_rel_difference`` was held to.
        compared: the sizes of the inputs that were compared, one entry a comparison.
        sparsity: the count of the weights in the file.
    """

    path: Path
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    bytes: int
    max_abs_difference: float | None
    max_rel_difference: float | None
    tolerance: float
    compared: tuple[Mapping[str, tuple[int, ...]], ...]
    sparsity: SparsityReport

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "inputs": {name: list(sizes) for name, sizes in self.inputs.items()},
            "outputs": list(self.outputs),
            "bytes": self.bytes,
            "max_abs_difference": self.max_abs_difference,
            "max_rel_difference": self.max_rel_difference,
            "tolerance": self.tolerance,
            "compared": [{name: list(sizes) for name, sizes in case.items()} for case in self.compared],
            "weights": len(self.sparsity.weights),
            "sparsity": self.sparsity.sparsity,
            "ok": self.sparsity.ok,
        }

    def __str__(self) -> str:
        inputs = ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in self.inputs.items())
        check = "not compared with torch"
        if self.max_abs_difference is not None:
            check = (
                f"onnxruntime differs from torch by {self.max_abs_difference:.1e} at most, "
                f"{self.max_rel_difference:.1e} of the largest output (tolerance {self.tolerance:.0e}; "
                f"{len(self.compared)} inputs compared)"
            )
        groups = sum(weight.groups for weight in self.sparsity)
        verdict, zeros = "ok" if self.sparsity.ok else "VIOLATED", f"{self.sparsity.sparsity:.2%}"
        lines = [
            f"{self.path}: {self.bytes:,} bytes, opset {self.opset}",
            f"inputs   {inputs}",
            f"outputs  {', '.join(self.outputs)}",
            f"check    {check}",
            f"pattern  {verdict}: {len(self.sparsity.weights)} weights, {groups:,} groups, {zeros} zeros",
        ]
        return "\n".join([*lines, *(f"not covered: {s.name} ({s.reason})" for s in self.sparsity.skipped)])


# ---------------------------------------------------------------------- verify


def verify_onnx(path: str | os.PathLike[str], pattern: Rules = None) -> SparsityReport:
    """Count the groups of the weights in an ONNX file, along the dimension that each matrix product sums over.

    The file is parsed and nothing in it is run; external data is read one weight at a time. A weight is a constant that
    a MatMul, Gemm or Conv multiplies by, directly or through Transpose, Reshape, Cast, Identity, Squeeze, Unsqueeze or
    DequantizeLinear. Its name is the torch name that :func:`export_onnx` notes in the file; in other files the
    initializer's, or, where that is made up (``val_12``), that of the module whose product it is, if the exporter left
    it in the graph. Its shape is as the product reads it.

    Args:
        path: the ``.onnx`` file.
        pattern: what the weights must satisfy, as for :func:`admm_nxm.verify`: a Pattern or its spelling for the
            weights that :class:`admm_nxm.ADMMNxM` prunes by default, or rules by name, or a Selection. None takes the
            selection noted in the file by :func:`export_onnx`, and in other files ``"2:4"``.

    Returns:
        The report. Constants that cannot be told by name, or not be counted, are in its ``skipped``.

    Raises:
        FileNotFoundError: no such file, or its external data is missing.
        ImportError: onnx is not installed.
        ValueError: the file is damaged, a weight that is asked for is not in it, or there is nothing to count.
    """
    return _count(Path(path), read_graph(Path(path)), pattern)


@dataclass(frozen=True)
class _Wanted:
    """A weight to count: its name in the report, the constants of that name in the file, and its pattern."""

    name: str
    constants: list[GraphWeight]
    pattern: Pattern


def _count(path: Path, graph: OnnxGraph, pattern: Rules) -> SparsityReport:
    # Names may stand for several constants (a weight used twice and copied by the exporter): count each.
    named: dict[str, list[GraphWeight]] = {}
    for weight in graph.weights:
        named.setdefault(clean_name(weight.name), []).append(weight)
    if isinstance(pattern, Selection):
        wanted, skipped = _of_selection(path, named, pattern)
    elif pattern is None and graph.recorded is not None and graph.recorded.weights:
        wanted = _of_record(path, named, graph.recorded)
        skipped = [entry for entry in graph.recorded.skipped if entry.wanted]
    else:
        wanted, skipped = _of_rules(path, named, pattern)
    keyed: dict[str, tuple[str, GraphWeight]] = {}
    selected = []
    for entry in wanted:
        for weight in entry.constants:
            if weight.problem is not None:
                skipped.append(SkippedWeight(entry.name, weight.shape, weight.problem, wanted=True))
            elif weight.shape[weight.dim] % entry.pattern.group:
                reason = f"its width is no multiple of {entry.pattern.group}"
                skipped.append(SkippedWeight(entry.name, weight.shape, reason, wanted=True))
            else:
                key = str(len(keyed))
                keyed[key] = (entry.name, weight)
                selected.append(SelectedWeight(key, weight.shape, entry.pattern, weight.dim))
    if not selected:
        raise ValueError(
            f"{path} holds no weight to count ({'; '.join(sorted({s.reason for s in skipped})) or 'no rule fits'}); "
            f"its matrix products read {', '.join(sorted(named)) or 'no constants'}: name them by rules"
        )
    counted = check_weights(Selection(tuple(selected), ()), lambda key: keyed[key][1].read())
    return SparsityReport(tuple(replace(w, name=keyed[w.name][0]) for w in counted), tuple(skipped))


def _of_record(path: Path, named: Mapping[str, list[GraphWeight]], recorded: Selection) -> list[_Wanted]:
    missing = [weight.name for weight in recorded if clean_name(weight.name) not in named]
    if missing:
        raise ValueError(
            f"{path} notes {', '.join(missing)} as pruned, and no matrix product in it reads a constant of that "
            "name: a tool has rewritten the file since. Name the weights by rules, or export it again"
        )
    patterns = {clean_name(weight.name): weight.pattern for weight in recorded}
    return [_Wanted(name, named[name], pattern) for name, pattern in patterns.items()]


def _of_selection(
    path: Path, named: Mapping[str, list[GraphWeight]], selection: Selection
) -> tuple[list[_Wanted], list[SkippedWeight]]:
    wanted = []
    for weight in selection:
        name = next((name for name in (weight.name, *weight.aliases) if name in named), None)
        shapes = [] if name is None else [w.shape for w in named[name] if w.problem is None]
        if name is None or any(sorted(shape) != sorted(weight.shape) for shape in shapes):
            raise ValueError(
                f"the selection names weight {weight.name!r} of shape {weight.shape}; {path} has "
                + ("no matrix product that reads it" if name is None else f"shape {shapes[0]}, transposed or not")
            )
        wanted.append(_Wanted(name, named[name], weight.pattern))
    if not wanted:
        raise ValueError("the selection names no weight: there is nothing to verify")
    return wanted, [skipped for skipped in selection.skipped if skipped.wanted]


def _of_rules(
    path: Path, named: Mapping[str, list[GraphWeight]], pattern: Pattern | str | Select | None
) -> tuple[list[_Wanted], list[SkippedWeight]]:
    tensors, dims = {}, {}
    for name, (weight, *_) in named.items():
        # One without a shape has a problem that is told when it is selected; until then it passes for a matrix.
        shape, dim = (weight.shape, weight.dim) if weight.problem is None else ((0, 0), 0)
        while len(shape) > 2 and shape[0] == 1 and dim > 0:
            shape, dim = shape[1:], dim - 1  # a matrix, for all that it was unsqueezed on the way
        tensors[name] = torch.empty(shape, device="meta")
        dims[id(tensors[name])] = dim
    if not tensors:
        raise ValueError(f"{path} has no MatMul, Gemm or Conv that reads a constant: there is nothing to verify")
    plain = pattern is None or isinstance(pattern, (str, Pattern))
    spelling = pattern if isinstance(pattern, (str, Pattern)) else "2:4"
    select = None if plain else pattern
    try:
        selection, chosen = select_weights(
            tensors,
            spelling,
            select,  # type: ignore[arg-type]
            # By the names that rules are held against: they lack what DistributedDataParallel puts before all.
            dims={re.escape(name): dims[id(t)] for name, t in named_tensors(tensors).items()},
            ineligible="skip",
            trainable=False,
        )
    except ValueError as error:
        if plain and any(weight.anonymous for weights in named.values() for weight in weights):
            made_up = [name for name, weights in named.items() if weights[0].anonymous]
            raise ValueError(
                f"{error}. {path} does not tell which weights {', '.join(made_up)} are: name them by rules, or export "
                "with export_onnx, which notes the names"
            ) from None
        raise
    skipped = [s for s in selection.skipped if s.wanted]
    if plain:
        skipped += [
            SkippedWeight(name, weights[0].shape, "nothing in the file says which weight it is", wanted=True)
            for name, weights in named.items()
            if weights[0].anonymous
        ]
    constants = {id(tensors[name]): weights for name, weights in named.items()}
    return [_Wanted(w.name, constants[id(chosen[w.name])], w.pattern) for w in selection], skipped


# ---------------------------------------------------------------------- export


def export_onnx(
    model: nn.Module,
    example: Example,
    path: str | os.PathLike[str],
    *,
    pattern: Rules = None,
    dynamic: bool | Axes = True,
    opset: int | None = None,
    overwrite: bool = False,
    external_data: bool | None = None,
    check: bool = True,
    tolerance: float | None = None,
) -> OnnxReport:
    """Export a finalized model to ONNX, and check the file before it stands at ``path``.

    Checked are the pattern, in the model before and in the file after, and the outputs of onnxruntime on the CPU
    against torch's, on the example and, with dynamic axes, on inputs of one more text and half the length. If a check
    fails nothing is left behind. The torch name of each weight and its pattern are noted in the file's metadata (key
    ``admm_nxm``), where :func:`verify_onnx` finds them.

    The model is exported in evaluation mode; one of transformers without its cache and with eager attention, which is
    plain matrix products. All of that is as it was when the call returns. An output has the name of its place among
    what the model returns (``logits``, ``hidden_states.0``), with ``_output`` after it if an input or a parameter has
    that name.

    Args:
        model: the module; ``optimizer.finalize()`` has been called.
        example: inputs to trace with: a tensor, a sequence of tensors, or a mapping of keyword arguments such as a
            tokenizer returns. Real texts check more than random numbers do.
        path: where to write; by convention it ends in ``.onnx``.
        pattern: as for :func:`admm_nxm.verify`; None is ``"2:4"``.
        dynamic: which axes may change size: input -> axis -> name of the axis; alike names have alike sizes. True makes
            axis 0 of every input ``batch``, and axis 1 of integer and boolean matrices (ids, masks) ``sequence``,
            or ``decoder_sequence`` where the input's name begins with ``decoder_``. False fixes all sizes.
        opset: version of the operator set; None leaves it to torch.
        overwrite: whether to replace a file that is there. Its ``<name>.data`` is replaced or deleted with it.
        external_data: whether to put the weights into a second file, ``<name>.data``; None does so above 2 GB, which a
            single file cannot hold.
        check: whether to compare outputs. Without, onnxruntime is not needed.
        tolerance: largest difference of an output, as a share of its largest absolute value; None is 1e-4 for float32,
            2e-2 for float16, 5e-2 for bfloat16 and 1e-6 for float64, by the model's narrowest floating dtype.

    Returns:
        The report.

    Raises:
        FileExistsError: there is a file at ``path`` and ``overwrite`` is False.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        RuntimeError: torch cannot export the model, or onnxruntime cannot run it.
        SparsityViolation: the weights do not satisfy the pattern.
        TypeError: an input is no tensor.
        ValueError: a bad argument, outputs beyond the tolerance, or a weight that the export has changed.
    """
    path = Path(path)
    for package in ("onnx", "onnxscript", *(("onnxruntime",) if check else ())):
        require(package)
    if not hasattr(getattr(torch.onnx, "ONNXProgram", None), "optimize"):
        raise RuntimeError(f"export_onnx needs torch 2.6 or newer; this is {torch.__version__}")
    refuse_existing(path, overwrite)
    model = unwrap_model(model)
    selection, _ = cover(model, pattern)
    _refuse_dense(model, selection)
    limit = _limit(model, tolerance)
    inputs = _inputs_of(model, example)
    axes = _axes_of(inputs, dynamic)
    # A size of 1 would be taken for a constant.
    inputs = {name: _resize(t, dict.fromkeys(axes[name], 2), grow_only=True) for name, t in inputs.items()}
    cases = [inputs, *([_other_sizes(inputs, axes)] if any(axes.values()) else [])] if check else []
    by_name = isinstance(example, Mapping)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    outside = size > 0.9 * _LIMIT if external_data is None else external_data
    data = path.with_name(f"{path.name}.data")
    stale = not outside and _reads(path, data.name)

    with ExitStack() as stack:
        target = stack.enter_context(atomic_file(path, overwrite=overwrite))
        # Stands before the file that needs it: the stack unwinds backwards.
        target_of_data = stack.enter_context(atomic_file(data, overwrite=overwrite)) if outside else None
        # The file has the name of its data in it, so that both are drafted under their own names.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)))
        draft = folder / path.name
        with _as_exported(model):
            expected = [_run_torch(model, case, by_name) for case in cases]
            outputs = tuple((expected or [_run_torch(model, inputs, by_name)])[0])
            program = _export(model, inputs, axes, outputs, by_name=by_name, opset=opset)
        kept = _note_names(program, model, selection)
        _name_ends(program, tuple(inputs), outputs)
        program.save(str(draft), external_data=outside)
        _check_ends(draft, tuple(inputs), outputs)
        graph = read_graph(draft)
        report = _count(path, graph, kept)
        if not report.ok:
            raise ValueError(f"the export has lost the pattern, and {path} is not written: {_violations(report)}")
        differences = [_compare(draft, case, want, limit) for case, want in zip(cases, expected, strict=True)]
        sizes = _sizes(draft)
        total = sum(file.stat().st_size for file in folder.iterdir())
        os.replace(draft, target)
        if target_of_data is not None:
            os.replace(folder / data.name, target_of_data)
    if stale:
        data.unlink(missing_ok=True)
    return OnnxReport(
        path=path,
        opset=graph.opset,
        inputs=sizes,
        outputs=outputs,
        bytes=total,
        max_abs_difference=max((absolute for absolute, _ in differences), default=None),
        max_rel_difference=max((relative for _, relative in differences), default=None),
        tolerance=limit,
        compared=tuple({name: tuple(t.shape) for name, t in case.items()} for case in cases),
        sparsity=report,
    )


def _refuse_dense(model: nn.Module, selection: Selection) -> None:
    report = verify(model, selection)
    if not report.ok:
        raise SparsityViolation(
            f"the model is not sparse: {_violations(report)}. Call optimizer.finalize() before the export, or name the "
            "pattern and the weights that were pruned (pattern=optimizer.selection)"
        )


def _violations(report: SparsityReport) -> str:
    first, *more = report.violations
    also = f", and {len(more)} more of {len(report.weights)} weights" if more else ""
    return f"{first.name}: {first.bad_groups} of {first.groups} groups exceed {first.pattern}{also}"


def _limit(model: nn.Module, tolerance: float | None) -> float:
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0:
            raise ValueError(
                f"tolerance={tolerance!r} must be above 0: a share of each output's largest absolute value"
            )
        return float(tolerance)
    return max((_TOLERANCES[p.dtype] for p in model.parameters() if p.dtype in _TOLERANCES), default=1e-4)


# ---------------------------------------------------------------------- inputs


def _inputs_of(model: nn.Module, example: Example) -> dict[str, Tensor]:
    given: dict[str, Any]
    if isinstance(example, Mapping):
        given = {name: value for name, value in example.items() if value is not None}
    else:
        values = [example] if isinstance(example, Tensor) else list(example)
        accepted = inspect.signature(model.forward).parameters.values()
        names = [p.name for p in accepted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(values) > len(names):
            raise ValueError(
                f"example has {len(values)} inputs, and {type(model).__name__}.forward names {len(names)}: "
                f"{', '.join(names) or 'none'}"
            )
        given = dict(zip(names, values, strict=False))
    if not given:
        raise ValueError("example has no inputs; pass what the model is called with, such as a tokenizer's output")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"input {name!r} is a {type(value).__name__}; a tensor is needed. Set what is fixed on model.config, "
                'and have a tokenizer return tensors with return_tensors="pt"'
            )
        if value.numel() == 0:
            raise ValueError(f"input {name!r} is empty, of shape {tuple(value.shape)}; nothing can be traced with it")
    return given


def _axes_of(inputs: Mapping[str, Tensor], dynamic: bool | Axes) -> dict[str, dict[int, str]]:
    """Return the dynamic axes of each input."""
    if isinstance(dynamic, bool):
        return {name: _default_axes(name, t) if dynamic else {} for name, t in inputs.items()}
    unknown = [name for name in dynamic if name not in inputs]
    if unknown:
        raise ValueError(f"dynamic names {', '.join(unknown)}, and the example has {', '.join(inputs)}")
    for name, axes in dynamic.items():
        for axis, label in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < inputs[name].ndim or not isinstance(label, str):
                raise ValueError(
                    f"dynamic[{name!r}] has {axis!r}: {label!r}; axes 0 to {inputs[name].ndim - 1} are there, each to "
                    'be given a name, such as {0: "batch"}'
                )
    return {name: dict(dynamic.get(name, {})) for name in inputs}


def _default_axes(name: str, t: Tensor) -> dict[int, str]:
    if t.ndim == 0:
        return {}
    axes = {0: "batch"}
    if t.ndim == 2 and not t.is_floating_point():
        axes[1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return axes


def _resize(t: Tensor, sizes: Mapping[int, int], *, grow_only: bool = False) -> Tensor:
    """Cut an input short or repeat what it begins with."""
    for axis, size in sizes.items():
        if size > t.shape[axis]:
            t = torch.cat([t] * -(-size // t.shape[axis]), dim=axis)
        elif grow_only:
            continue
        t = t.narrow(axis, 0, size)
    return t.contiguous()


def _other_sizes(inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> dict[str, Tensor]:
    """Return inputs of one more text, and of half the length: positions have an upper bound."""
    changed = {}
    for name, t in inputs.items():
        new = {
            axis: t.shape[axis] + 1 if label == "batch" else t.shape[axis] // 2 for axis, label in axes[name].items()
        }
        changed[name] = _resize(t, new)
        if new and name.endswith("attention_mask") and not t.is_floating_point():
            changed[name] = torch.ones_like(changed[name])  # what was cut off may have been all that a row attends to
    return changed


# ---------------------------------------------------------------------- torch's side


@contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no cache among the outputs, and attention as plain matrix products, for as long as it takes."""
    training = {module: module.training for module in model.modules()}
    configs = _configs_of(model)
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    attention = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        for config, was in attention:
            if was is not None:
                config._attn_implementation = "eager"
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config in caching:
            config.use_cache = True
        for config, was in attention:
            config._attn_implementation = was


def _configs_of(model: nn.Module) -> list[Any]:
    """Return the configs of all modules and their parts, each once and after all that it is a part of.

    A config hands its attention down to its parts, so that theirs have to be restored after it.
    """
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        found.pop(id(config), None)
        found[id(config)] = config
        for key in getattr(config, "sub_configs", ()):
            if (part := getattr(config, key, None)) is not None:
                visit(part)

    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in found:
            visit(config)
    return list(found.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of itself at every call and nobody can do anything about."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # operators of packages not installed
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)


def _run_torch(model: nn.Module, inputs: Mapping[str, Tensor], by_name: bool) -> dict[str, Tensor]:
    """Return the model's outputs by name, in the order of the export; inputs and parameters have other names."""
    taken = {*inputs, *dict(model.named_parameters()), *dict(model.named_buffers())}
    outputs: dict[str, Tensor] = {}
    for name, t in _flatten(model(**inputs) if by_name else model(*inputs.values()), ""):
        spellings = itertools.chain([name, f"{name}_output"], (f"{name}_output_{i}" for i in itertools.count(2)))
        outputs[next(s for s in spellings if s not in taken and s not in outputs)] = t
    if not outputs:
        raise ValueError(f"{type(model).__name__} returns no tensor; there is nothing to export")
    return outputs


def _flatten(output: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _flatten(value, f"{name or 'output'}.{i}")


def _export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    *,
    by_name: bool,
    opset: int | None,
) -> Any:
    shapes: Any = None
    if any(axes.values()):
        shapes = dict(axes) if by_name else tuple(axes.values())
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                () if by_name else tuple(inputs.values()),
                kwargs=dict(inputs) if by_name else None,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # done once the names are noted
                verbose=False,
            )
    except Exception as error:  # the exporter lets pass whatever a model or an operator raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = next(iter(str(cause).strip().splitlines()), "")
        raise RuntimeError(
            f"torch.onnx cannot export {type(model).__name__}: {type(cause).__name__}: {said}. If it is about a size, "
            "fix it with dynamic=False or name the axes that change; if it is about an operator, try a newer torch and "
            "opset"
        ) from error


def _name_ends(program: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs of a graph their names.

    The exporter has named them already, but a value that it returns twice, or an input that is an output as well, has
    the last of its names, and the copy that stands for the other has one that is made up.
    """
    graph = program.model.graph
    ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
    taken = {*inputs, *outputs}
    for value in (value for node in graph for value in node.outputs):
        if id(value) not in ends and value.name in taken:
            value.name = next(s for i in itertools.count(1) if (s := f"{value.name}_inner_{i}") not in taken)
            taken.add(value.name)
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=False):
            if value.name != name:
                value.name = name


def _check_ends(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Hold the names of the inputs and outputs in a file against those that it should have."""
    graph = require("onnx").load(str(path), load_external_data=False).graph
    found = [entry.name for entry in graph.input], [entry.name for entry in graph.output]
    if found != (list(inputs), list(outputs)):
        raise RuntimeError(
            f"torch.onnx wrote a graph from {', '.join(found[0])} to {', '.join(found[1])}; the model is one from "
            f"{', '.join(inputs)} to {', '.join(outputs)}. Let it use each input and return each tensor once, a "
            "further time as its .clone()"
        )


def _note_names(program: Any, model: nn.Module, selection: Selection) -> Selection:
    """Optimize the graph, and note in it which torch weight each of its constants is.

    Optimizing replaces a weight by its transpose under a made-up name. The bits tell which it was.

    Returns:
        The selection without the weights that the graph has no use for.
    """
    used = {clean_name(name) for name, value in program.model.graph.initializers.items() if value.uses()}
    with _quiet():
        program.optimize()
    torch_names: dict[object, list[str]] = {}
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2:
            bits = tensor.detach().cpu().contiguous()
            key = _digest(tuple(bits.shape), bits.view(torch.uint8).numpy())
            torch_names.setdefault(key, []).append(clean_name(name))
    alike: dict[object, list[str]] = {}
    for name, value in program.model.graph.initializers.items():
        array = value.const_value.numpy()
        for turned in (array, array.swapaxes(-1, -2)) if array.ndim >= 2 else ():
            key = _digest(turned.shape, turned.copy(order="C").view("uint8"))
            if key in torch_names:
                alike.setdefault(key, []).append(name)
                break
    names: dict[str, list[str]] = {}
    for key, initializers in alike.items():
        # Equal weights (freshly copied layers) go by their order. One constant may stand for several of them, and
        # several for one that is used more than once.
        candidates = torch_names[key]
        for i, initializer in enumerate(initializers):
            names[initializer] = candidates[i : i + 1] or candidates[-1:]
        names[initializers[-1]] += candidates[len(initializers) :]
    found = {name for entry in names.values() for name in entry}
    kept, skipped = [], list(selection.skipped)
    for weight in selection:
        if found.isdisjoint((weight.name, *weight.aliases)) and used.isdisjoint((weight.name, *weight.aliases)):
            skipped.append(SkippedWeight(weight.name, weight.shape, "the exported graph does not use it", wanted=True))
        else:
            kept.append(weight)
    noted = Selection(tuple(kept), tuple(skipped))
    own = {alias: weight.name for weight in kept for alias in weight.aliases}
    record = {
        "names": {initializer: [own.get(name, name) for name in entry] for initializer, entry in names.items()},
        "selection": json.loads(selection_to_json(noted)),
    }
    program.model.metadata_props[METADATA_KEY] = json.dumps(record)
    return noted


def _digest(shape: tuple[int, ...], data: Any) -> object:
    return shape, hashlib.blake2b(data, digest_size=16).digest()


# ---------------------------------------------------------------------- onnxruntime's side


def _compare(
    path: Path, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float
) -> tuple[float, float]:
    """Run the file on the CPU and return the largest difference, absolute and as a share of the largest output.

    Raises:
        RuntimeError: it does not run.
        ValueError: an output differs in shape, or by more than the limit.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        fed = {entry.name: inputs[entry.name].detach().cpu().numpy() for entry in session.get_inputs()}
        results = session.run(list(expected), fed)
    except Exception as error:  # its errors share no base class
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeError(
            f"onnxruntime cannot run the exported model: {said}. Export it in float32 or float16 (model.float()), or "
            "pass check=False to leave the comparison out"
        ) from error
    worst_absolute = worst_relative = 0.0
    for (name, want), array in zip(expected.items(), results, strict=True):
        want, got = want.detach().cpu().double(), torch.as_tensor(array).double()
        if got.shape != want.shape:
            raise ValueError(
                f"output {name!r} has shape {tuple(got.shape)} in onnxruntime, {tuple(want.shape)} in torch"
            )
        same = (got == want) | (got.isnan() & want.isnan())
        absolute = (
            torch.where(same, 0.0, (got - want).abs()).nan_to_num(nan=math.inf).max().item() if want.numel() else 0.0
        )
        scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
        relative = absolute / scale if scale else absolute
        if relative > limit:
            raise ValueError(
                f"output {name!r} of the exported model differs from torch's by {absolute:.3g}, {relative:.1e} of its "
                f"largest value (tolerance {limit:.0e}), on inputs of shapes "
                f"{', '.join(f'{n} {tuple(t.shape)}' for n, t in inputs.items())}; raise the tolerance if that is "
                "close enough, else export in a wider dtype"
            )
        worst_absolute, worst_relative = max(worst_absolute, absolute), max(worst_relative, relative)
    return worst_absolute, worst_relative


def _reads(path: Path, location: str) -> bool:
    """Whether the ONNX file at ``path``, if there is one, has weights in the second file of that name."""
    if not path.is_file():
        return False
    try:
        graph = require("onnx").load(str(path), load_external_data=False).graph
    except Exception:  # no ONNX file, so that nothing tells whose the other one is; protobuf has errors of its own
        return False
    return any(
        entry.key == "location" and entry.value == location for t in graph.initializer for entry in t.external_data
    )


def _sizes(path: Path) -> dict[str, tuple[int | str, ...]]:
    model = require("onnx").load(str(path), load_external_data=False)
    return {
        entry.name: tuple(size.dim_param or int(size.dim_value) for size in entry.type.tensor_type.shape.dim)
        for entry in model.graph.input
    }
