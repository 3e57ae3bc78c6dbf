"""The weights of an ONNX file: which constants its matrix products read, along which dimension, and by what name.

The graph is parsed and never run, and weights are read one at a time. What stands between a weight and its product is
worked out by onnx's own shape inference and reference evaluator.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import missing
from ..io.selection_record import selection_from_json
from ..selection import Selection

__all__ = ["METADATA_KEY", "GraphWeight", "OnnxGraph", "read_graph", "require"]

METADATA_KEY = "admm_nxm"
"""Key under which an exported file records the selection of the prunable weights."""

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # module path of each node, as torch's exporter leaves it
# Names that exporters and optimizers make up: val_12, onnx::MatMul_345, _to_copy_3, 77.
_ANONYMOUS = re.compile(r"(onnx::)?[A-Za-z_]*\d+(_[a-z]+)?")
_FOLLOWED = {"Cast", "CastLike", "DequantizeLinear", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def require(package: str) -> Any:
    """Import a package of the ``onnx`` extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(missing(f"{package} is needed for ONNX files ({error})", "onnx")) from error


@dataclass(frozen=True)
class GraphWeight:
    """A constant that a MatMul, Gemm or Conv multiplies by."""

    name: str  # its own or, where that is made up, that of the module whose product it is, if the file tells it
    shape: tuple[int, ...]  # as the product reads it, after transposes on the way
    dim: int  # that the product sums over
    problem: str | None  # why its entries cannot be counted; None if they can
    read: Callable[[], Tensor]  # reads which entries are not zero, as a boolean tensor of that shape

    @property
    def anonymous(self) -> bool:
        """Whether nothing in the file says which weight of the model it is."""
        return _ANONYMOUS.fullmatch(self.name) is not None


@dataclass(frozen=True)
class OnnxGraph:
    """Describe the weights of an ONNX file."""

    weights: tuple[GraphWeight, ...]  # every constant operand of a MatMul, Gemm or Conv
    recorded: Selection | None  # as noted at the export; None in files of other makers
    opset: int  # version of the default operator set


def read_graph(path: Path) -> OnnxGraph:
    """Parse an ONNX file."""
    onnx = require("onnx")
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    try:
        model = onnx.load(str(path), load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # protobuf has error types of its own, which differ between its versions
        raise _damaged(path, error) from error
    if not model.graph.node:
        raise _damaged(path, "it has no graph")
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    try:
        recorded = selection_from_json(texts[0]) if texts else None
    except ValueError as error:
        raise _damaged(path, f"its metadata {METADATA_KEY!r} cannot be read: {error!r}") from error
    weights: dict[tuple[str, int, tuple[int, ...]], GraphWeight] = {}
    try:
        for origin, weight in _Reader(onnx, path, opset).weights(model.graph, {}, {}):
            weights.setdefault((origin, weight.dim, weight.shape), weight)  # one that is used twice is one weight
    except (LookupError, TypeError, OverflowError) as error:
        raise _damaged(path, error) from error
    return OnnxGraph(tuple(weights.values()), recorded, opset)


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is not a readable ONNX file ({why}); export it again, for instance with export_onnx")


def _integer(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


class _Reader:
    def __init__(self, onnx: Any, path: Path, opset: int) -> None:
        self.onnx, self.path, self.opset = onnx, path, opset

    def weights(
        self, graph: Any, tensors: Mapping[str, Any], producers: Mapping[str, Any]
    ) -> Iterator[tuple[str, GraphWeight]]:
        """Yield the weights of a graph and of the graphs in it, each with the name of its constant."""
        tensors = {**tensors, **{tensor.name: tensor for tensor in graph.initializer}}
        producers = dict(producers)
        for node in graph.node:  # in the order of computation, so that what a node reads is known when its turn comes
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    yield from self.weights(body, tensors, producers)
            yield from self._of_product(node, tensors, producers)
            values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
            if node.op_type == "Constant" and values:
                tensors[node.output[0]] = values[0]
            elif node.input and all(name in tensors or name in producers or not name for name in node.input):
                for output in node.output:
                    producers.setdefault(output, node)

    def _of_product(
        self, node: Any, tensors: Mapping[str, Any], producers: Mapping[str, Any]
    ) -> Iterator[tuple[str, GraphWeight]]:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            return
        # The right operand first: that is where exporters put weights.
        for side in (1,) if node.op_type == "Conv" else (1, 0):
            if len(node.input) <= side or not (node.input[side] in tensors or node.input[side] in producers):
                continue
            origin, shape, problem, read = self._operand(node.input[side], tensors, producers)
            if len(shape) < 2 and problem is None:
                return  # a vector has no groups that a matrix product could skip
            transposed = node.op_type == "Gemm" and _integer(node, ("transA", "transB")[side], 0) != 0
            dim = len(shape) - (2 if (side == 1) != transposed else 1)
            module = _module_of(node) if _ANONYMOUS.fullmatch(origin) else ""
            name = f"{module}.weight" if module else origin
            yield origin, GraphWeight(name, shape, 1 if node.op_type == "Conv" else max(dim, 0), problem, read)
            return

    def _operand(
        self, value: str, tensors: Mapping[str, Any], producers: Mapping[str, Any]
    ) -> tuple[str, tuple[int, ...], str | None, Callable[[], Tensor]]:
        """Return the constant that a value starts from, its shape, why it cannot be counted, and how it is read."""
        steps: list[Any] = []
        origin = value
        while origin not in tensors:
            step = producers[origin]
            if step.op_type not in _FOLLOWED or any(name and name not in tensors for name in step.input[1:]):
                return origin, (), f"the graph computes it by {step.op_type}", _unread
            steps.insert(0, step)
            origin = step.input[0]
        tensor, stored = tensors[origin], tuple(tensors[origin].dims)
        kind = self.onnx.TensorProto.DataType.Name(tensor.data_type)
        dequantised = any(step.op_type == "DequantizeLinear" for step in steps)
        if not dequantised and not kind.startswith(("FLOAT", "DOUBLE", "BFLOAT")):
            return origin, stored, f"its dtype is {kind} (quantised)", _unread
        if any(size < 0 for size in stored) or math.prod(stored) >= 1 << 62:
            raise _damaged(self.path, f"weight {origin!r} has shape {stored}")
        shape, model = stored, None
        if steps:
            extras = [self._loaded(tensors[name], name) for step in steps for name in step.input[1:] if name]
            model, shape = self._model_of(steps, tensor, origin, value, extras)

        def read() -> Tensor:
            loaded = self._loaded(tensor, origin)
            try:
                array = self.onnx.numpy_helper.to_array(loaded)
                if model is not None:
                    (array,) = require("onnx.reference").ReferenceEvaluator(model).run(None, {origin: array})
            except Exception as error:  # whatever numpy and the evaluator make of it
                raise _damaged(self.path, f"weight {origin!r}: {error}") from error
            return torch.as_tensor(array != 0)

        return origin, shape, None, read

    def _model_of(
        self, steps: list[Any], tensor: Any, origin: str, value: str, extras: list[Any]
    ) -> tuple[Any, tuple[int, ...]]:
        """Return a model of the steps from a constant to its product, and the shape that comes out."""
        helper = self.onnx.helper
        start = helper.make_tensor_value_info(origin, tensor.data_type, tuple(tensor.dims))
        end = helper.make_empty_tensor_value_info(value)
        graph = helper.make_graph(steps, "weight", [start], [end], list({t.name: t for t in extras}.values()))
        # The evaluator has no DequantizeLinear of before opset 19; that of 21 takes all that the older ones do.
        opset = max(self.opset, 21) if any(step.op_type == "DequantizeLinear" for step in steps) else self.opset
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        try:
            inferred = self.onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        except Exception as error:  # of a class of its own
            raise _damaged(self.path, f"the shape of weight {origin!r} does not fit: {error}") from error
        known = (*inferred.input, *inferred.value_info, *inferred.output)
        shapes = {entry.name: tuple(size.dim_value for size in entry.type.tensor_type.shape.dim) for entry in known}
        if math.prod(shapes[value]) != math.prod(tensor.dims):
            raise _damaged(self.path, f"weight {origin!r} of shape {tuple(tensor.dims)} does not fit {shapes[value]}")
        for step in steps:
            if step.op_type == "DequantizeLinear":
                self._check_scales(step, shapes[step.input[0]], extras)
        return model, shapes[value]

    def _check_scales(self, step: Any, shape: tuple[int, ...], extras: list[Any]) -> None:
        """Hold scales and zero points against their weight: the evaluator makes whatever sizes they ask for."""
        axis, block = _integer(step, "axis", 1), _integer(step, "block_size", 0)
        for extra in extras:
            sizes = tuple(extra.dims)
            if extra.name not in step.input[1:] or math.prod(sizes) == 1:
                continue
            width, blocks = shape[axis], list(shape)
            if block:
                blocks[axis] = -(-width // block)
            if sizes != (tuple(blocks) if block else (width,)) or block > width:
                raise _damaged(self.path, f"{extra.name!r} of shape {sizes} does not fit its weight of shape {shape}")

    def _loaded(self, tensor: Any, name: str) -> Any:
        """Return a constant under its name and with its entries, from the second file if they are there."""
        loaded = self.onnx.TensorProto()
        loaded.CopyFrom(tensor)
        loaded.name = name
        if tensor.data_location != self.onnx.TensorProto.EXTERNAL:
            return loaded
        folder = self.path.parent
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        for link in (self.path, folder / location):
            if link.is_symlink() and link.resolve().parent != folder.resolve():
                raise FileNotFoundError(
                    f"{self.path} keeps weight {name!r} in {location!r}, and {link} is a symbolic link to "
                    f"{link.resolve()}, which is not followed: put both files themselves into one folder (cp -L; from "
                    "the Hugging Face Hub: download with local_dir=)"
                )
        try:
            self.onnx.external_data_helper.load_external_data_for_tensor(loaded, str(folder))
        except Exception as error:  # of several classes, which differ between its versions
            beside = (folder / location).resolve()
            if location and beside.is_relative_to(folder.resolve()) and not beside.exists():
                text = f"{self.path} keeps weight {name!r} in {location}, which is not beside it"
                raise FileNotFoundError(text) from error
            raise _damaged(self.path, f"weight {name!r} cannot be read from {location!r}: {error}") from error
        return loaded


def _unread() -> Tensor:
    raise AssertionError("a weight with a problem is not read")


def _module_of(node: Any) -> str:
    """Return the module path of a node, as torch's exporters leave it in the metadata or in the node's name."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _NAME_SCOPES), "")
    modules = re.findall(r"'([^']*)'", scopes)[:-1]  # the last is the operation's own
    if modules:
        return str(modules[-1])
    parts = [part for part in node.name.split("/")[1:-1] if part]
    # A container that is called itself stands before its member: /blocks/blocks.0/up/MatMul
    kept = [part for i, part in enumerate(parts) if not any(p.startswith(f"{part}.") for p in parts[i + 1 : i + 2])]
    return ".".join(kept)
