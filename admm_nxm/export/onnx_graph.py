"""The weights of an ONNX file: which constants its matrix products read, along which dimension, and by what name.

The file is parsed, never run. Weights are read one at a time, those in an external file too.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.selection_record import selection_from_json
from ..selection import Selection

__all__ = ["METADATA_KEY", "GraphWeight", "OnnxGraph", "read_graph", "require"]

METADATA_KEY = "admm_nxm"
"""Where an exported file records the torch names of its initializers and the selection of the prunable weights."""

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # module path of each node, as torch's exporter leaves it
_LONGEST_CHAIN = 64
# Names that exporters and optimizers make up: val_12, onnx::MatMul_345, _to_copy_3, 77.
_ANONYMOUS = re.compile(r"(onnx::)?[A-Za-z_]*\d+(_[a-z]+)?")


def require(package: str) -> Any:
    """Import a package of the ``onnx`` extra.

    Raises:
        ImportError: it is not installed; the message has the remedy.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{package} is needed for ONNX files: pip install "admm-nxm[onnx]" ({error})') from error


@dataclass(frozen=True)
class GraphWeight:
    """A constant that a MatMul, Gemm or Conv multiplies by.

    Args:
        name: its torch name if the file tells it, else the initializer's.
        initializer: its name in the file.
        shape: its shape as the product reads it, after transposes on the way.
        dim: the dimension that the product sums over.
        problem: why its entries cannot be counted; None if they can.
        read: reads the entries that are not zero, as a boolean tensor of that shape.
    """

    name: str
    initializer: str
    shape: tuple[int, ...]
    dim: int
    problem: str | None
    read: Callable[[], Tensor]

    @property
    def anonymous(self) -> bool:
        """Whether nothing in the file says which weight of the model it is."""
        return _ANONYMOUS.fullmatch(self.name) is not None


@dataclass(frozen=True)
class OnnxGraph:
    """What an ONNX file says of its weights.

    Args:
        weights: every constant operand of a MatMul, Gemm or Conv.
        recorded: the selection, as noted at the export; None in files of other makers.
        opset: version of the default operator set.
    """

    weights: tuple[GraphWeight, ...]
    recorded: Selection | None
    opset: int


def read_graph(path: Path) -> OnnxGraph:
    """Parse an ONNX file.

    Raises:
        FileNotFoundError: no file there, or its external data is missing.
        ImportError: onnx is not installed.
        ValueError: the file, its metadata or a weight in it is damaged.
    """
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
    names, recorded = _record(path, model)
    reader = _Reader(onnx, path, names)
    try:
        return OnnxGraph(tuple(reader.weights(model.graph, _Scope())), recorded, opset)
    except (IndexError, TypeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is not a readable ONNX file ({why}); export it again, for instance with export_onnx")


def _record(path: Path, model: Any) -> tuple[dict[str, list[str]], Selection | None]:
    """Return initializer -> torch names, and the selection, as export_onnx notes them."""
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    if text is None:
        return {}, None
    try:
        record = json.loads(text)
        names, selection = dict(record["names"].items()), selection_from_json(json.dumps(record["selection"]))
        if not all(
            isinstance(entry, list) and entry and all(isinstance(n, str) for n in entry) for entry in names.values()
        ):
            raise TypeError("names must map each constant to a list of weights")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"its metadata {METADATA_KEY!r} cannot be read: {error!r}") from error
    return names, selection


@dataclass(frozen=True)
class _Scope:
    """The values of a graph and of those around it."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    producers: Mapping[str, Any] = field(default_factory=dict)
    known: dict[str, bool] = field(default_factory=dict)

    def inside(self, graph: Any) -> _Scope:
        constants, producers = dict(self.constants), dict(self.producers)
        for tensor in graph.initializer:
            constants[tensor.name] = tensor
        for node in graph.node:
            for output in node.output:
                producers[output] = node
            value = _attribute(node, "value") if node.op_type == "Constant" else None
            if value is not None:
                constants[node.output[0]] = value.t
        return _Scope(constants, producers)

    def is_constant(self, value: str, depth: int = 0) -> bool:
        """Whether a value is made of constants alone."""
        if value in self.constants or not value:
            return True
        if value not in self.known:
            node = self.producers.get(value)
            self.known[value] = False  # until shown otherwise: a damaged file may run in circles
            self.known[value] = (
                node is not None
                and depth <= _LONGEST_CHAIN
                and bool(node.input)
                and all(self.is_constant(name, depth + 1) for name in node.input)
            )
        return self.known[value]


def _attribute(node: Any, name: str) -> Any:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


class _Reader:
    def __init__(self, onnx: Any, path: Path, names: Mapping[str, list[str]]) -> None:
        self.onnx, self.path, self.names = onnx, path, names
        self.numpy = require("numpy")
        types = onnx.TensorProto
        wide = {types.DOUBLE: 8, types.FLOAT: 4, types.FLOAT16: 2, types.BFLOAT16: 2}
        self.floating = wide | {t: 1 for name, t in types.DataType.items() if name.startswith("FLOAT8")}
        self.integer = {types.INT8: 1, types.UINT8: 1, types.INT32: 4, types.INT64: 8}

    def weights(self, graph: Any, around: _Scope) -> Iterator[GraphWeight]:
        scope = around.inside(graph)
        seen: set[tuple[str, int, tuple[int, ...]]] = set()
        for node in graph.node:
            for attribute in node.attribute:
                for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from self.weights(body, scope)
            for weight in self._of_product(node, scope):
                key = (weight.initializer, weight.dim, weight.shape)
                if key not in seen:  # a weight that is used twice is one weight
                    seen.add(key)
                    for name in self.names.get(weight.initializer, [weight.name]):
                        yield replace(weight, name=name)

    def _of_product(self, node: Any, scope: _Scope) -> Iterator[GraphWeight]:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.input) < 2:
            return
        if node.op_type == "Conv":
            if scope.is_constant(node.input[1]):
                yield replace(self._weight(node, node.input[1], scope), dim=1)
            return
        transposed = [False, False]
        if node.op_type == "Gemm":
            transposed = [bool(a is not None and a.i) for a in (_attribute(node, "transA"), _attribute(node, "transB"))]
        # The right operand first: that is where exporters put weights.
        for side in (1, 0):
            if not scope.is_constant(node.input[side]):
                continue
            weight = self._weight(node, node.input[side], scope)
            ndim = len(weight.shape)
            if ndim < 2 and weight.problem is None:
                return  # a vector has no groups that a matrix product could skip
            first = ndim - 2 if (side == 1) != transposed[side] else ndim - 1
            yield replace(weight, dim=max(first, 0))
            return

    def _weight(self, node: Any, value: str, scope: _Scope) -> GraphWeight:
        steps: list[Any] = []
        origin = value
        while origin not in scope.constants and len(steps) <= _LONGEST_CHAIN:
            producer = scope.producers[origin]
            steps.append(producer)
            if producer.op_type not in _FOLLOWED:
                return self._opaque(node, origin, producer.op_type)
            origin = producer.input[0]
        if len(steps) > _LONGEST_CHAIN:
            return self._opaque(node, value, "a long chain of operations")
        tensor = scope.constants[origin]
        name = self._name(node, origin)
        stored = tuple(tensor.dims)
        dequantised = any(step.op_type == "DequantizeLinear" for step in steps)
        if tensor.data_type not in (self.integer if dequantised else self.floating):
            kind = self.onnx.TensorProto.DataType.Name(tensor.data_type)
            return GraphWeight(name, origin, stored, 0, f"its dtype is {kind} (quantised)", _unread)
        self._check_size(tensor, origin)

        def read() -> Any:
            array = self._array(tensor, origin)
            for step in reversed(steps):
                array = _FOLLOWED[step.op_type](self, step, array, scope)
            return array

        # Nothing on the way but a reshape needs the entries to tell the shape.
        shape = self._shape(stored, steps, scope, origin)
        return GraphWeight(name, origin, shape, 0, None, lambda: torch.from_numpy(self.numpy.asarray(read() != 0)))

    def _opaque(self, node: Any, value: str, made_by: str) -> GraphWeight:
        reason = f"the graph computes it by {made_by}"
        return GraphWeight(self._name(node, value), value, (), 0, reason, _unread)

    def _shape(self, stored: tuple[int, ...], steps: list[Any], scope: _Scope, name: str) -> tuple[int, ...]:
        ghost = self.numpy.broadcast_to(self.numpy.zeros((), dtype=bool), stored)
        try:
            for step in reversed(steps):
                if step.op_type in _SHAPING:
                    ghost = _FOLLOWED[step.op_type](self, step, ghost, scope)
        except ValueError as error:
            raise _damaged(self.path, f"the shape of weight {name!r} does not fit: {error}") from error
        return tuple(ghost.shape)

    def _name(self, node: Any, initializer: str) -> str:
        """The torch name: as recorded, or the initializer's own, or that of the module whose product it is."""
        if initializer in self.names:
            return self.names[initializer][0]
        if not _ANONYMOUS.fullmatch(initializer):
            return initializer
        module = _module_of(node)
        return f"{module}.weight" if module else initializer

    # ------------------------------------------------------------------ entries

    def _check_size(self, tensor: Any, name: str) -> None:
        """Hold the shape that is claimed against the bytes that are there, before anything of that shape is made."""
        if any(size < 0 for size in tensor.dims):
            raise _damaged(self.path, f"weight {name!r} has shape {tuple(tensor.dims)}")
        count = math.prod(tensor.dims)
        needed = count * (self.floating | self.integer)[tensor.data_type]
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            file, offset, length = self._external(tensor, name)
            there = min(length if length is not None else needed, max(0, file.stat().st_size - offset))
        elif tensor.HasField("raw_data"):
            there = len(tensor.raw_data)
        else:
            filled = max(
                len(tensor.float_data), len(tensor.int32_data), len(tensor.int64_data), len(tensor.double_data)
            )
            there, needed = filled, count
        if there != needed:
            raise _damaged(self.path, f"weight {name!r} of shape {tuple(tensor.dims)} has {there} of {needed} bytes")

    def _external(self, tensor: Any, name: str) -> tuple[Path, int, int | None]:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        folder = self.path.resolve().parent
        try:
            file = (folder / entries["location"]).resolve()
            offset = int(entries.get("offset", 0))
            length = int(entries["length"]) if "length" in entries else None
        except (KeyError, ValueError) as error:
            raise _damaged(self.path, f"where weight {name!r} is kept cannot be read: {error!r}") from error
        link = next((link for link in (self.path, folder / entries["location"]) if link.is_symlink()), None)
        if link is not None and (not file.is_file() or not file.is_relative_to(folder)):
            raise FileNotFoundError(
                f"{self.path} keeps weight {name!r} in {entries['location']!r}, and {link} is a symbolic link to "
                f"{link.resolve()}: links are not followed from one to the other. Put both files themselves into one "
                "folder (cp -L; from the Hugging Face Hub: download with local_dir=)"
            )
        if not file.is_relative_to(folder) or offset < 0 or (length is not None and length < 0):
            raise _damaged(
                self.path, f"weight {name!r} is kept at {entries['location']!r}, outside of the file's folder"
            )
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} keeps weight {name!r} in {file.name}, which is not beside it")
        return file, offset, length

    def _array(self, tensor: Any, name: str) -> Any:
        held = tensor
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            file, offset, _ = self._external(tensor, name)
            count = math.prod(tensor.dims) * (self.floating | self.integer)[tensor.data_type]
            with file.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(count)
            held = self.onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
        try:
            return self.onnx.numpy_helper.to_array(held)
        except (ValueError, TypeError) as error:
            raise _damaged(self.path, f"weight {name!r}: {error}") from error

    # ------------------------------------------------------------------ what stands between a weight and its product

    def same(self, _: Any, array: Any, __: _Scope) -> Any:
        return array

    def transpose(self, node: Any, array: Any, _: _Scope) -> Any:
        perm = _attribute(node, "perm")
        return array.transpose(None if perm is None else list(perm.ints))

    def reshape(self, node: Any, array: Any, scope: _Scope) -> Any:
        sizes = self._integers(node, 1, scope)
        zero_is_zero = _attribute(node, "allowzero")
        if zero_is_zero is None or not zero_is_zero.i:
            sizes = [array.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
        return array.reshape(sizes)

    def squeeze(self, node: Any, array: Any, scope: _Scope) -> Any:
        axes = self._integers(node, 1, scope) if len(node.input) > 1 else None
        return array.squeeze(None if axes is None else tuple(axes))

    def unsqueeze(self, node: Any, array: Any, scope: _Scope) -> Any:
        return self.numpy.expand_dims(array, tuple(self._integers(node, 1, scope)))

    def dequantise(self, node: Any, array: Any, scope: _Scope) -> Any:
        """Only which entries are zero matters: those at the zero point."""
        if len(node.input) < 3 or not node.input[2]:
            return array
        name = node.input[2]
        if name not in scope.constants:
            raise _damaged(self.path, f"the zero point {name!r} is no constant")
        zero_point = self._array(scope.constants[name], name).astype(self.numpy.int64)
        axis, block = _attribute(node, "axis"), _attribute(node, "block_size")
        at = 1 if axis is None else axis.i
        try:
            if block is not None and block.i:
                blocks, width = zero_point.shape[at], array.shape[at]
                if blocks != -(-width // block.i):  # before anything of that size is made
                    raise ValueError(f"{blocks} blocks of {block.i} are not {width} entries")
                zero_point = zero_point.repeat(min(block.i, width), at).take(range(width), at)  # the last may be short
            elif zero_point.ndim == 1 and zero_point.size > 1:
                sizes = [1] * array.ndim
                sizes[at] = -1
                zero_point = zero_point.reshape(sizes)
            zero_point = self.numpy.broadcast_to(zero_point, array.shape)
        except (ValueError, IndexError) as error:
            raise _damaged(self.path, f"the zero point {name!r} does not fit its weight: {error}") from error
        return array.astype(self.numpy.int64) - zero_point

    def _integers(self, node: Any, at: int, scope: _Scope) -> list[int]:
        tensor = scope.constants.get(node.input[at])
        if tensor is None:
            raise ValueError(f"the shape that {node.op_type} takes is no constant")
        self._check_size(tensor, node.input[at])
        return [int(size) for size in self._array(tensor, node.input[at]).flatten()]


_FOLLOWED: Mapping[str, Callable[[_Reader, Any, Any, _Scope], Any]] = {
    "Cast": _Reader.same,
    "CastLike": _Reader.same,
    "DequantizeLinear": _Reader.dequantise,
    "Identity": _Reader.same,
    "Reshape": _Reader.reshape,
    "Squeeze": _Reader.squeeze,
    "Transpose": _Reader.transpose,
    "Unsqueeze": _Reader.unsqueeze,
}
_SHAPING = ("Reshape", "Squeeze", "Transpose", "Unsqueeze")


def _unread() -> Tensor:
    raise AssertionError("a weight with a problem is not read")


def _module_of(node: Any) -> str:
    """The module path of a node, as torch's exporters leave it in the metadata or in the node's name."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _NAME_SCOPES), "")
    modules = re.findall(r"'([^']*)'", scopes)[:-1]  # the last is the operation's own
    if modules:
        return str(modules[-1])
    parts = [part for part in node.name.split("/")[1:-1] if part]
    # A container that is called itself stands before its member: /blocks/blocks.0/up/MatMul
    kept = [part for i, part in enumerate(parts) if not any(p.startswith(f"{part}.") for p in parts[i + 1 : i + 2])]
    return ".".join(kept)
