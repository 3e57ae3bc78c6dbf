"""ONNX: export a finalized model and prove that what is in the file is that model, still sparse.

TensorRT, and whatever else reads ONNX, looks for the pattern along the dimension that a matrix product sums over. That
is where :func:`verify_onnx` counts.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..io.files import atomic_file, refuse_existing
from ..io.selection_record import selection_to_json
from ..io.verify import verify
from ..pattern import Pattern
from ..selection import Select, SelectedWeight, Selection, SkippedWeight, clean_name, select_weights, unwrap_model
from ..sparsity import SparsityReport, SparsityViolation, WeightReport, check_weights, cover
from .onnx_graph import METADATA_KEY, GraphWeight, OnnxGraph, read_graph, require

__all__ = ["OnnxReport", "export_onnx", "verify_onnx"]

Rules = Union[Pattern, str, Select, Selection, None]  # noqa: UP007 - evaluated at run time
Example = Union[Tensor, Sequence[Tensor], Mapping[str, Tensor]]  # noqa: UP007
Axes = Mapping[str, Mapping[int, str]]

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class OnnxReport:
    """Describe an export; prints as a few lines.

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
            **vars(self),
            "path": str(self.path),
            "inputs": {name: list(sizes) for name, sizes in self.inputs.items()},
            "outputs": list(self.outputs),
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
            *(f"not covered: {s.name} ({s.reason})" for s in self.sparsity.skipped),
        ]
        return "\n".join(lines)


def verify_onnx(path: str | os.PathLike[str], pattern: Rules = None) -> SparsityReport:
    """Count the groups of the weights in an ONNX file, along the dimension that each matrix product sums over.

    The file is parsed and nothing in it is run; external data is read one weight at a time. A weight is a constant that
    a MatMul, Gemm or Conv multiplies by, directly or through Transpose, Reshape, Cast, Identity, Squeeze, Unsqueeze or
    DequantizeLinear, in the shape that the product reads. Its name is the initializer's; where an exporter made that up
    (``val_12``), that of the module whose product it is, if the graph tells it.

    Args:
        path: the ``.onnx`` file.
        pattern: what the weights must satisfy, as for :func:`admm_nxm.verify`; None takes the selection noted in the
            file by :func:`export_onnx`, and in other files ``"2:4"``.

    Returns:
        The report, with constants that cannot be told by name, or not be counted, in its ``skipped``.

    Raises:
        FileNotFoundError: no such file, or its external data is missing.
        ImportError: onnx is not installed.
        ValueError: the file is damaged, a weight that is asked for is not in it, or there is nothing to count.
    """
    return _count(Path(path), read_graph(Path(path)), pattern)


# For each weight the name in the report, the constants of that name in the file, and the pattern; and what is skipped.
_Chosen = tuple[list[tuple[str, list[GraphWeight], Pattern]], list[SkippedWeight]]


def _count(path: Path, graph: OnnxGraph, pattern: Rules) -> SparsityReport:
    named: dict[str, list[GraphWeight]] = {}
    for weight in graph.weights:
        named.setdefault(clean_name(weight.name), []).append(weight)
    if pattern is None and graph.recorded is not None and graph.recorded.weights:
        pattern = graph.recorded
    choose: Any = _of_selection if isinstance(pattern, Selection) else _of_rules
    wanted, skipped = choose(path, named, pattern)
    counted: list[WeightReport] = []
    for name, constants, of_weight in wanted:
        for weight in constants:
            if weight.problem is not None:
                skipped.append(SkippedWeight(name, weight.shape, weight.problem, wanted=True))
            elif weight.shape[weight.dim] % of_weight.group:
                reason = f"its width is no multiple of {of_weight.group}"
                skipped.append(SkippedWeight(name, weight.shape, reason, wanted=True))
            else:
                selected = Selection((SelectedWeight(name, weight.shape, of_weight, weight.dim),), ())
                counted += check_weights(selected, lambda _, read=weight.read: read())  # type: ignore[misc]
    if not counted:
        raise ValueError(
            f"{path} holds no weight to count ({'; '.join(sorted({s.reason for s in skipped})) or 'no rule fits'}); "
            f"its matrix products read {', '.join(sorted(named)) or 'no constants'}: name them by rules"
        )
    return SparsityReport(tuple(counted), tuple(skipped))


def _of_selection(path: Path, named: Mapping[str, list[GraphWeight]], selection: Selection) -> _Chosen:
    wanted = []
    for weight in selection:
        name = next((name for name in (weight.name, *weight.aliases) if name in named), None)
        shapes = [w.shape for w in named.get(name or "", []) if w.problem is None]
        if name is None or any(sorted(shape) != sorted(weight.shape) for shape in shapes):
            raise ValueError(
                f"the selection names weight {weight.name!r} of shape {weight.shape}; {path} has "
                + ("no matrix product that reads it" if name is None else f"shape {shapes[0]}, transposed or not")
                + ". If a tool has rewritten the file, name its weights by rules; else export it again"
            )
        wanted.append((weight.name, named[name], weight.pattern))
    if not wanted:
        raise ValueError("the selection names no weight: there is nothing to verify")
    return wanted, [skipped for skipped in selection.skipped if skipped.wanted]


def _of_rules(path: Path, named: Mapping[str, list[GraphWeight]], pattern: Pattern | str | Select | None) -> _Chosen:
    if not named:
        raise ValueError(f"{path} has no MatMul, Gemm or Conv that reads a constant: there is nothing to verify")
    # Stand-ins that have their inputs along the last dimension, as most weights in torch.
    tensors = {}
    for name, (weight, *_) in named.items():
        # One without a shape has a problem that is told when it is selected; until then it passes for a matrix.
        sizes = list(weight.shape) if weight.problem is None else [0, 0]
        width = sizes.pop(weight.dim if weight.problem is None else 0)
        while len(sizes) > 1 and sizes[0] == 1:  # a matrix, for all that it was unsqueezed on the way
            del sizes[0]
        tensors[name] = torch.empty(*sizes, width, device="meta")
    plain = pattern is None or isinstance(pattern, (str, Pattern))
    anonymous = [name for name, weights in named.items() if weights[0].anonymous] if plain else []
    try:
        selection, chosen = select_weights(
            tensors,
            pattern if isinstance(pattern, (str, Pattern)) else "2:4",
            None if plain else pattern,  # type: ignore[arg-type]
            dims={".*": -1},
            ineligible="skip",
            trainable=False,
        )
    except ValueError as error:
        if not anonymous:
            raise
        raise ValueError(
            f"{error}. {path} does not tell which weights {', '.join(anonymous)} are: name them by rules, or export "
            "with export_onnx, which keeps the names"
        ) from None
    skipped = [s for s in selection.skipped if s.wanted]
    reason = "nothing in the file says which weight it is"
    skipped += [SkippedWeight(name, named[name][0].shape, reason, wanted=True) for name in anonymous]
    constants = {id(tensors[name]): weights for name, weights in named.items()}
    return [(w.name, constants[id(chosen[w.name])], w.pattern) for w in selection], skipped


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
    fails nothing is left behind. The weights keep their torch names in the file; the selection is noted in its metadata
    (key ``admm_nxm``), where :func:`verify_onnx` finds it.

    The model is exported in evaluation mode; one of transformers without its cache and with eager attention. All of
    that is as it was when the call returns. An output has the name of its place among what the model returns
    (``logits``, ``hidden_states.0``), with ``_output`` after it if an input or a parameter has that name.

    Args:
        model: the module; ``optimizer.finalize()`` has been called.
        example: inputs to trace with: a tensor, a sequence of tensors, or a mapping such as a tokenizer returns.
        path: where to write; by convention it ends in ``.onnx``.
        pattern: as for :func:`admm_nxm.verify`; None is ``"2:4"``.
        dynamic: which axes may change size: input -> axis -> name of the axis; alike names have alike sizes. True makes
            axis 0 of every input ``batch``, and axis 1 of integer and boolean matrices (ids, masks) ``sequence``,
            or ``decoder_sequence`` where the input's name begins with ``decoder_``. False fixes all sizes.
        opset: version of the operator set; None leaves it to torch.
        overwrite: whether to replace a file that is there. Its ``<name>.data`` is replaced or deleted with it.
        external_data: whether to put the weights into a second file, ``<name>.data``; above 1.5 GB torch always does.
        check: whether to compare outputs. Without, onnxruntime is not needed.
        tolerance: largest difference of an output, as a share of its largest absolute value; None is 1e-4 for float32,
            2e-2 for float16, 5e-2 for bfloat16 and 1e-6 for float64, by the model's narrowest floating dtype.

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
    try:
        verify(model, selection).raise_if_violated()
    except SparsityViolation as error:
        raise SparsityViolation(
            f"the model is not sparse: {error}. Call optimizer.finalize() before the export, or name the pattern and "
            "the weights that were pruned (pattern=optimizer.selection)"
        ) from None
    limit = _limit(model, tolerance)
    inputs = _inputs_of(model, example)
    axes = _axes_of(inputs, dynamic)
    # A size of 1 would be taken for a constant.
    inputs = {name: _resized(t, {axis: max(2, t.shape[axis]) for axis in axes[name]}) for name, t in inputs.items()}
    cases = [inputs, *([_other_sizes(inputs, axes)] if any(axes.values()) else [])] if check else []
    by_name = isinstance(example, Mapping)
    data = path.with_name(f"{path.name}.data")
    replaces_data = _reads(path, data.name)

    with ExitStack() as stack:
        target = stack.enter_context(atomic_file(path, overwrite=overwrite))
        # The file has the name of its data in it, so that both are drafted under their own names.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)))
        draft, draft_of_data = folder / path.name, folder / data.name
        with _as_exported(model):
            expected = [_run_torch(model, case, by_name) for case in cases]
            outputs = tuple((expected or [_run_torch(model, inputs, by_name)])[0])
            program = _export(model, inputs, axes, outputs, by_name, opset)
        selection = _optimize(program, model, selection)
        program.model.metadata_props[METADATA_KEY] = selection_to_json(selection)
        _name_ends(program.model.graph, tuple(inputs), outputs)
        program.save(str(draft), external_data=external_data)
        graph = read_graph(draft)
        report = _count(path, graph, selection)
        report.raise_if_violated()
        differences = [
            d for case, want in zip(cases, expected, strict=True) for d in _compare(draft, case, want, limit)
        ]
        total = sum(file.stat().st_size for file in folder.iterdir())
        if draft_of_data.is_file():
            # Stands before the file that needs it: the stack unwinds backwards.
            os.replace(draft_of_data, stack.enter_context(atomic_file(data, overwrite=overwrite)))
            replaces_data = False
        os.replace(draft, target)
    if replaces_data:
        data.unlink(missing_ok=True)
    return OnnxReport(
        path=path,
        opset=graph.opset,
        inputs={
            v.name: tuple(n if isinstance(n, int) else str(n) for n in v.shape) for v in program.model.graph.inputs
        },
        outputs=outputs,
        bytes=total,
        max_abs_difference=max((absolute for absolute, _ in differences), default=None),
        max_rel_difference=max((relative for _, relative in differences), default=None),
        tolerance=limit,
        compared=tuple({name: tuple(t.shape) for name, t in case.items()} for case in cases),
        sparsity=report,
    )


def _limit(model: nn.Module, tolerance: float | None) -> float:
    if tolerance is None:
        return max((_TOLERANCES[p.dtype] for p in model.parameters() if p.dtype in _TOLERANCES), default=1e-4)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0:
        raise ValueError(f"tolerance={tolerance!r} must be above 0: a share of each output's largest absolute value")
    return float(tolerance)


def _inputs_of(model: nn.Module, example: Example) -> dict[str, Tensor]:
    if isinstance(example, Mapping):
        given: dict[str, Any] = {name: value for name, value in example.items() if value is not None}
    else:
        values = [example] if isinstance(example, Tensor) else list(example)
        try:
            given = dict(inspect.signature(model.forward).bind_partial(*values).arguments)
        except TypeError as error:
            raise ValueError(f"{type(model).__name__}.forward does not take {len(values)} inputs: {error}") from error
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


def _axes_of(inputs: Mapping[str, Tensor], dynamic: bool | Axes) -> Axes:
    """Return the dynamic axes of each input."""
    if isinstance(dynamic, bool):
        found: dict[str, dict[int, str]] = {
            name: {0: "batch"} if dynamic and t.ndim else {} for name, t in inputs.items()
        }
        for name, t in inputs.items():
            if dynamic and t.ndim == 2 and not t.is_floating_point():
                found[name][1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        return found
    for name, axes in dynamic.items():
        if name not in inputs:
            raise ValueError(f"dynamic names {name}, and the example has {', '.join(inputs)}")
        for axis, label in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < inputs[name].ndim or not isinstance(label, str):
                raise ValueError(
                    f"dynamic[{name!r}] has {axis!r}: {label!r}; axes 0 to {inputs[name].ndim - 1} are there, each to "
                    'be given a name, such as {0: "batch"}'
                )
    return {name: dynamic.get(name, {}) for name in inputs}


def _resized(t: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Return an input cut short, or with what it begins with repeated."""
    for axis, size in sizes.items():
        t = t.index_select(axis, torch.arange(size, device=t.device) % t.shape[axis])
    return t


def _other_sizes(inputs: Mapping[str, Tensor], axes: Axes) -> dict[str, Tensor]:
    """Return inputs of one more text, and of half the length: positions have an upper bound."""
    changed = {}
    for name, t in inputs.items():
        new = {at: t.shape[at] + 1 if label == "batch" else t.shape[at] // 2 for at, label in axes[name].items()}
        changed[name] = _resized(t, new)
        if new and name.endswith("attention_mask") and not t.is_floating_point():
            changed[name] = torch.ones_like(changed[name])  # what was cut off may have been all that a row attends to
    return changed


@contextmanager
def _as_exported(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no cache among the outputs, and attention as plain matrix products, for as long as it takes."""
    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        configs = _configs_of(model)
        for config in configs:
            # All that they say, and not what is changed alone: a config hands its attention down to the configs that
            # are a part of it, so that one after the other cannot be set back. The last to be noted is done first.
            undo.callback(vars(config).update, dict(vars(config)))
            undo.callback(vars(config).clear)
        model.eval()
        for config in configs:
            if getattr(config, "use_cache", False):
                config.use_cache = False
            if getattr(config, "_attn_implementation", None) is not None:
                config._attn_implementation = "eager"
        yield


def _configs_of(model: nn.Module) -> list[Any]:
    """Return the configs of all modules, and those that are a part of these, each once."""
    found: dict[int, Any] = {}
    pending: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if hasattr(config, "__dict__") and id(config) not in found:
            found[id(config)] = config
            pending += [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    return list(found.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of itself at every call; what the model has to say was said when it ran."""
    with ExitStack() as stack:
        for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir", "onnxscript")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


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
    model: nn.Module, inputs: Mapping[str, Tensor], axes: Axes, outputs: Sequence[str], by_name: bool, opset: int | None
) -> Any:
    shapes: Any = dict(axes) if by_name else tuple(axes.values())
    try:
        with _quiet():
            return torch.onnx.export(
                model,
                () if by_name else tuple(inputs.values()),
                kwargs=dict(inputs) if by_name else None,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes if any(axes.values()) else None,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # see _optimize
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


def _optimize(program: Any, model: nn.Module, selection: Selection) -> Selection:
    """Optimize the graph, keep the weights' names, and return the selection without what the graph does not use."""
    # The optimizer gives what it computes from a weight a made-up name and merges weights that are equal. So it sees
    # none of their entries, and what it is needed for, to store them as their products read them, is done here.
    constants = program.model.graph.initializers
    used = {clean_name(name) for name, value in constants.items() if value.uses()}
    weights = {name for name, param in model.named_parameters(remove_duplicate=False) if param.ndim > 1}
    hidden = [(value, value.const_value) for name, value in constants.items() if name in weights]
    for value, _ in hidden:
        value.const_value = None
    with _quiet():
        program.optimize()
    for value, entries in hidden:
        value.const_value = entries
        readers = [node for node, _ in value.uses()]
        transposed = all(n.op_type == "Transpose" and not n.outputs[0].is_graph_output() for n in readers)
        if transposed and len(value.shape) == 2:
            value.const_value = require("onnx_ir").tensor(entries.numpy().T)
            value.shape = value.const_value.shape
            for node in readers:
                for reader, at in tuple(node.outputs[0].uses()):
                    reader.replace_input_with(at, value)
                node.graph.remove(node, safe=True)
    kept = [weight for weight in selection if not used.isdisjoint((weight.name, *weight.aliases))]
    reason = "the exported graph does not use it"
    lost = [SkippedWeight(weight.name, weight.shape, reason, wanted=True) for weight in selection if weight not in kept]
    return Selection(tuple(kept), (*selection.skipped, *lost))


def _name_ends(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs of a graph their names."""
    # The exporter has named them already, but a value that it returns twice, or an input that is an output as well, has
    # the last of its names, and the copy that stands for the other has one that is made up.
    values = [*graph.inputs, *graph.outputs]
    if len(graph.inputs) != len(inputs) or len({*values}) != len(inputs) + len(outputs):
        raise RuntimeError(
            f"torch.onnx made a graph from {', '.join(v.name for v in graph.inputs)} to "
            f"{', '.join(v.name for v in graph.outputs)}; the model is one from {', '.join(inputs)} to "
            f"{', '.join(outputs)}. Let it use each input and return each tensor once, a further time as its .clone()"
        )
    ends = dict(zip(values, (*inputs, *outputs), strict=True))
    inner = [value for node in graph for value in node.outputs if value not in ends]
    taken = {*ends.values(), *(value.name for value in inner)}
    for value in inner:
        if value.name in ends.values():
            while value.name in taken:
                value.name += "_inner"
            taken.add(value.name)
    for value, name in ends.items():
        if value.name != name:
            value.name = name


def _compare(path: Path, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> list[Any]:
    """Run the file on the CPU and return the differences, absolute and as a share of the output's largest value."""
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
    differences = []
    for (name, want), array in zip(expected.items(), results, strict=True):
        want, got = want.detach().cpu().double(), torch.as_tensor(array).double()
        finite = want[want.isfinite()]
        scale = finite.abs().max().item() if finite.numel() else 0.0
        try:
            torch.testing.assert_close(got, want, rtol=0, atol=limit * (scale or 1.0), equal_nan=True)
        except AssertionError as error:
            raise ValueError(
                f"output {name!r} of the exported model differs from torch's beyond {limit:.0e} of its largest value "
                f"({scale:.3g}) on inputs of shapes {', '.join(f'{n} {tuple(t.shape)}' for n, t in inputs.items())}. "
                f"{error} Raise the tolerance if that is close enough, else export in a wider dtype"
            ) from error
        absolute = (got[want.isfinite()] - finite).abs().max().item() if finite.numel() else 0.0
        differences.append((absolute, absolute / (scale or 1.0)))
    return differences


def _reads(path: Path, location: str) -> bool:
    """Whether the ONNX file at ``path``, if there is one, has weights in the second file of that name."""
    try:
        graph = require("onnx").load(str(path), load_external_data=False).graph
    except Exception:  # no ONNX file, so that nothing tells whose the other one is; protobuf has errors of its own
        return False
    return any(e.key == "location" and e.value == location for t in graph.initializer for e in t.external_data)
