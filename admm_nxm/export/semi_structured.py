"""Linear weights as torch's semi-structured tensors, which sparse tensor cores multiply with.

Torch warns that these tensors are a prototype whose interface may change; to follow is the task of this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..grouping import grouped, joint_name, such_as
from ..report.tensor_cores import BACKENDS, Backend, hardware_pattern, obstacle
from ..selection import SelectedWeight, Selection, SkippedWeight, is_conv1d, unwrap_model
from ..sharding import is_sharded
from ..sparsity import check_weights
from ..table import format_table

__all__ = ["ConvertedWeight", "SemiStructured", "to_semi_structured"]

# Torch's own order since 2.6: cuSPARSELt first, where it is there.
_PREFERRED: tuple[Backend, ...] = ("cusparselt", "cutlass")


@dataclass(frozen=True)
class ConvertedWeight:
    """A weight that sparse tensor cores multiply with, by one backend; a tied one has further names, its aliases."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: Backend
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Place of a weight: an attribute of a module."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def param(self) -> nn.Parameter:
        param = self.module._parameters[self.attribute]
        assert param is not None
        return param

    @property
    def dim(self) -> int:
        """The dimension of the inputs, in a linear layer."""
        return 0 if is_conv1d(self.module) else 1

    @property
    def is_linear(self) -> bool:
        return self.attribute == "weight" and (isinstance(self.module, nn.Linear) or is_conv1d(self.module))


@dataclass(eq=False, repr=False)
class SemiStructured:
    """Describe what :func:`to_semi_structured` has done to a model; prints as tables.

    As a context manager it undoes it at the end of the block. It holds the dense weights for that: ``del`` frees them.

    Attributes:
        converted: the weights that sparse tensor cores multiply with now.
        left: the linear weights that stay dense, and why.
    """

    converted: tuple[ConvertedWeight, ...]
    left: tuple[SkippedWeight, ...]
    _dense: list[tuple[_Place, nn.Parameter]]
    _hooks: list[RemovableHandle]

    def undo(self) -> None:
        """Put the dense weights back, the very same parameters. A second call does nothing."""
        for place, param in self._dense:
            place.module._parameters[place.attribute] = param
        for hook in self._hooks:
            hook.remove()
        self._dense, self._hooks = [], []

    def __enter__(self) -> SemiStructured:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        swapped = []
        for group in grouped(self.converted, lambda w: (w.shape, w.dtype, w.backend)):
            shape, dtype = "x".join(map(str, group[0].shape)), str(group[0].dtype).removeprefix("torch.")
            swapped.append((joint_name([w.name for w in group]), len(group), shape, dtype, group[0].backend))
        parts = [
            f"{len(self.converted)} of {len(self.converted) + len(self.left)} linear weights are semi-structured",
            format_table(("weights", "number", "shape", "dtype", "backend"), swapped),
        ]
        if self.left:
            parts.append(format_table(("left dense", "number", "such as"), _by_reason(self.left)))
        return "\n\n".join(parts)


def _by_reason(left: Iterable[SkippedWeight]) -> list[tuple[str, int, str]]:
    groups = grouped(left, lambda weight: weight.reason)
    return [(group[0].reason, len(group), such_as([weight.name for weight in group])) for group in groups]


def to_semi_structured(model: nn.Module, *, backend: Backend | None = None) -> SemiStructured:
    """Swap the linear weights that hold 2:4 (1:2 in float32) for torch's semi-structured tensors, on a CUDA GPU.

    The model computes the same as before, within the rounding of its dtype, and takes gradients no longer: it is for
    inference. It can be neither saved nor moved nor cast until the change is undone. These are swapped: weights of
    ``nn.Linear`` and of transformers' ``Conv1D``, wherever they stand in the model, tied ones in all their places.

    Args:
        model: a model in evaluation mode, finalized, on a CUDA GPU of compute capability 8.0 or above, and in bfloat16
            or float16 (in float32, sparse tensor cores want 1:2 and CUTLASS).
        backend: ``"cutlass"`` or ``"cusparselt"``; None takes for each weight cuSPARSELt if it can, else CUTLASS.

    Raises:
        RuntimeError: no CUDA GPU, or one that is too old; a weight could not be compressed.
        TypeError: ``model`` is no module.
        ValueError: an unknown backend, a module in training mode, or no weight that can be swapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{f'module {name!r}' if name else 'the model'} is in training mode, and semi-structured weights are "
                "for inference; call model.eval() first"
            )
    model = unwrap_model(model)
    _require_gpu({param.device for param in model.parameters()})
    backends = _PREFERRED if backend is None else (backend,)
    fused = _read_by_fused_kernels(model)
    works = cache(_problem_here)
    left = _without_a_weight(model)
    swaps: list[tuple[_Place, nn.Parameter]] = []
    converted: list[ConvertedWeight] = []
    # All are compressed before the first is swapped: if one fails, the model is as it was.
    for places in _linear_weights(model):
        first = next(place for place in places if place.is_linear)
        shape = tuple(first.param.shape)
        obstructed = _problem(places, fused)
        chosen, problem = (None, obstructed) if obstructed else _choose(first, backends, works)
        if chosen is None:
            left.append(SkippedWeight(first.name, shape, problem))
            continue
        aliases = tuple(place.name for place in places if place is not first)
        converted.append(ConvertedWeight(first.name, shape, first.param.dtype, chosen, aliases))
        param = _compressed(first, chosen)
        swaps += [(place, param) for place in places]
    if not converted:
        reasons = "; ".join(f"{reason} ({names})" for reason, _, names in _by_reason(left))
        raise ValueError(f"no linear weight of the model can be converted: {reasons or 'it has none'}")
    dense = [(place, place.param) for place, _ in swaps]
    for place, param in swaps:
        place.module._parameters[place.attribute] = param
    layers = dict.fromkeys(place.module for place, _ in swaps)
    hooks = [layer.register_forward_pre_hook(_contiguous) for layer in layers]
    return SemiStructured(tuple(converted), tuple(left), dense, hooks)


def _contiguous(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lay out a layer's input row by row: of others with three dimensions or more, torch finds no product."""
    return tuple(t.contiguous() if torch.is_tensor(t) else t for t in args)


def _linear_weights(model: nn.Module) -> list[list[_Place]]:
    """Return all places of each distinct weight that stands in a linear layer."""
    places: dict[int, list[_Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, param in module._parameters.items():
            if param is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(param), []).append(_Place(name, module, attribute))
    return [found for found in places.values() if any(place.is_linear for place in found)]


def _without_a_weight(model: nn.Module) -> list[SkippedWeight]:
    """Return the linear weights that are no plain parameter of a linear layer."""
    found = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
            reason = "it is computed, not stored: remove the parametrization first"
            found.append(SkippedWeight(f"{prefix}weight", (module.out_features, module.in_features), reason))
        if isinstance(module, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention cuts it up itself"
            matrices = [(key, t) for key, t in module._parameters.items() if t is not None and t.ndim == 2]
            found += [SkippedWeight(prefix + key, tuple(t.shape), reason) for key, t in matrices]
    return found


def _read_by_fused_kernels(model: nn.Module) -> set[int]:
    """Return the ids of linear layers whose weights torch's own Transformer layers hand to one fused kernel."""
    if not torch.backends.mha.get_fastpath_enabled():
        return set()
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    heads = [id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {*heads, *(id(layer) for encoder in encoders for layer in (encoder.linear1, encoder.linear2))}


def _problem(places: list[_Place], fused: set[int]) -> str | None:
    """Return why a weight cannot be swapped where it stands, on whatever machine."""
    for place in places:
        module = place.module
        if not place.is_linear:
            return f"it is tied to {place.name} ({type(module).__name__}), which needs it dense"
        usual = nn.Linear.forward if isinstance(module, nn.Linear) else None
        forward = type(module).forward
        if (forward is not usual if usual else forward.__qualname__ != "Conv1D.forward") or "forward" in vars(module):
            return f"its layer ({type(module).__name__}) has a forward of its own"
        if id(module) in fused:
            return "torch's fused Transformer layer reads it: call torch.backends.mha.set_fastpath_enabled(False) first"
        bias = module._parameters.get("bias")
        if bias is not None and bias.dtype != place.param.dtype:
            return f"its bias is {bias.dtype} and it is {place.param.dtype}: cast both to one dtype"
    if len({place.dim for place in places}) > 1:
        return "it is tied between an nn.Linear and a Conv1D, which hold it transposed: untie it"
    if is_sharded(places[0].param):
        return "it is sharded: gather it first"
    return _misplaced(places[0].param)


def _misplaced(weight: Tensor) -> str | None:
    return None if weight.is_cuda else f"it is on {weight.device}: move the model to a CUDA GPU first"


def _choose(
    place: _Place, backends: tuple[Backend, ...], works: Callable[[Backend, torch.dtype, torch.device], str | None]
) -> tuple[Backend | None, str]:
    """Return the first backend that takes a weight, or None and why none does."""
    weight, pattern = place.param, hardware_pattern(place.param.dtype)
    refused = []
    for backend in backends:
        problem = obstacle(backend, weight.shape, weight.dtype, pattern, place.dim)
        problem = problem or works(backend, weight.dtype, weight.device)
        if problem is None:
            break
        refused.append(f"{backend}: {problem}")
    else:
        return None, "; ".join(refused)
    selected = SelectedWeight(place.name, tuple(weight.shape), pattern, place.dim)
    (count,) = check_weights(Selection((selected,), ()), lambda _: weight)
    if not count.ok:
        return None, f"it does not hold {pattern}: {count.bad_groups} of {count.groups} groups exceed it"
    return backend, ""


def _compressed(place: _Place, backend: Backend) -> nn.Parameter:
    """Return a weight as the parameter that takes its place."""
    weight = place.param.detach()
    try:
        with torch.no_grad():
            # Compressed along the inputs, as (output, input). A Conv1D multiplies by its weight as it is, which has to
            # be the transpose of that: torch transposes such tensors without touching them.
            matrix = _compress((weight if place.dim == 1 else weight.t()).contiguous(), backend)
            return nn.Parameter(matrix if place.dim == 1 else matrix.t(), requires_grad=False)
    except Exception as error:  # torch and its libraries raise what they like
        raise RuntimeError(f"weight {place.name!r} could not be compressed by {backend}: {error}") from error


def _compress(matrix: Tensor, backend: Backend) -> Tensor:
    """Return a contiguous matrix of shape (output, input) as a semi-structured tensor."""
    # The classes themselves, and not to_sparse_semi_structured: that chooses by a global flag.
    kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{backend.upper()}")
    with torch.cuda.device_of(matrix), warnings.catch_warnings():  # type: ignore[no-untyped-call]
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        tensor: Tensor = kind.from_dense(matrix)
    return tensor


def _require_gpu(devices: Iterable[torch.device]) -> None:
    """Refuse to go on without a GPU that has sparse tensor cores."""
    where = "sparse tensor cores are in NVIDIA GPUs of compute capability 8.0 (Ampere) and above"
    if not torch.cuda.is_available():
        raise RuntimeError(f"no CUDA GPU is available, and {where}; run this on one, with a CUDA build of torch")
    for device in {device for device in devices if device.type == "cuda"} or {torch.device("cuda")}:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            name = torch.cuda.get_device_name(device)
            raise RuntimeError(f"{name} has compute capability {major}.{minor}, and {where}")


def _problem_here(backend: Backend, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a backend does not work in a dtype on a device, found by trying it; None if it does."""
    # It depends on the versions of torch and its libraries: CUTLASS compresses on a Hopper and then cannot multiply.
    matrix = torch.tensor([1, 0], dtype=dtype, device=device).repeat(64, 64)
    ones = torch.ones(16, 128, dtype=dtype, device=device)
    try:
        with torch.no_grad():
            product = nn.functional.linear(ones, _compress(matrix, backend))
    except Exception as error:  # torch and its libraries raise what they like
        return f"it does not work on this machine ({str(error).strip().partition(chr(10))[0]})"
    return None if bool((product == 64).all()) else "its products are wrong on this machine"
