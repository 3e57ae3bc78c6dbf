"""A model's sparsity in full: every group counted, what sparse tensor cores can take, and the share of its FLOPs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..grouping import grouped, joint_name, starred, such_as
from ..io.verify import Target, open_target
from ..memory import address
from ..pattern import Pattern
from ..selection import Select, Selection, SkippedWeight, named_tensors, select_weights, unwrap_model
from ..sparsity import SparsityReport, WeightReport, check_weights
from ..table import format_table
from .tensor_cores import BACKENDS, Backend, obstacles

__all__ = ["DenseWeight", "ModelReport", "ModelWeight", "Share", "model_report"]


@dataclass(frozen=True)
class ModelWeight(WeightReport):
    """The count of one covered weight, what it costs and who can speed it up.

    Args:
        dtype: its dtype.
        flops: its part of the model's FLOPs; None if it was not counted.
        tensor_cores: backend of torch's semi-structured tensors -> why it cannot take the weight as it is, or None.
    """

    dtype: torch.dtype
    flops: int | None
    tensor_cores: Mapping[Backend, str | None]

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The backends that can take it as it is."""
        return tuple(backend for backend, reason in self.tensor_cores.items() if reason is None)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of :meth:`ModelReport.to_dict`."""
        return {
            **asdict(self),
            "shape": list(self.shape),
            "dtype": _dtype_name(self.dtype),
            "pattern": str(self.pattern),
            "sparsity": self.sparsity,
            "parameters": self.numel,
        }


@dataclass(frozen=True)
class DenseWeight(SkippedWeight):
    """A parameter that no pattern covers.

    Args:
        flops: its part of the model's FLOPs; None if it was not counted.
    """

    flops: int | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of :meth:`ModelReport.to_dict`."""
        return {**asdict(self), "shape": list(self.shape), "parameters": self.numel}


@dataclass(frozen=True)
class Share:
    """Part of a model.

    Args:
        weights: how many weights.
        parameters: how many parameters these have.
        parameter_share: share of all the model's parameters.
        flops: how many FLOPs these take; None if they were not counted.
        flop_share: share of all the model's FLOPs; None likewise.
    """

    weights: int
    parameters: int
    parameter_share: float
    flops: int | None
    flop_share: float | None

    def __str__(self) -> str:
        text = f"{self.weights} weights, {self.parameter_share:.2%} of the parameters"
        return text if self.flop_share is None else f"{text}, {self.flop_share:.2%} of the FLOPs"


@dataclass(frozen=True)
class ModelReport(SparsityReport):
    """A :class:`SparsityReport` with everything else that a model's sparsity is judged by; prints as tables.

    Args:
        weights: the covered weights.
        skipped: what the selection rules asked for but no pattern fits, and why.
        dense: every parameter that is not covered, those of ``skipped`` among them, and why.
        flops: FLOPs of a forward pass on the example; a multiplication and an addition are two. None without one.
        notes: what of the FLOPs belongs to no parameter.
    """

    weights: tuple[ModelWeight, ...]
    dense: tuple[DenseWeight, ...] = ()
    flops: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, tied ones once."""
        return sum(weight.numel for weight in self.weights) + sum(weight.numel for weight in self.dense)

    @property
    def covered(self) -> Share:
        """The weights that a pattern was asked of, whether they hold it or not."""
        return self._share(self.weights)

    @property
    def holding(self) -> Share:
        """The weights that hold their pattern in every group."""
        return self._share(weight for weight in self.weights if weight.ok)

    def tensor_cores(self, backend: Backend | None = None) -> Share:
        """Return the weights that sparse tensor cores can take as they are, through one backend or any (None)."""
        return self._share(w for w in self.weights if (w.backends if backend is None else backend in w.backends))

    def _share(self, weights: Iterable[ModelWeight]) -> Share:
        chosen = list(weights)
        parameters = sum(weight.numel for weight in chosen)
        flops = flop_share = None
        if self.flops is not None:
            flops = sum(weight.flops or 0 for weight in chosen)
            flop_share = flops / max(1, self.flops)
        return Share(len(chosen), parameters, parameters / max(1, self.parameters), flops, flop_share)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, under keys that later versions keep.

        - ``ok``: whether every covered weight holds its pattern; ``sparsity``: share of zeros over the covered weights.
        - ``parameters``, ``flops``, ``notes``: those of the whole model, as they are here.
        - ``totals``: ``covered``, ``holding``, ``tensor_cores`` (by any backend), ``cutlass`` and ``cusparselt``, each
          with ``weights``, ``parameters``, ``parameter_share``, ``flops`` and ``flop_share``.
        - ``weights``: a list with ``name``, ``shape``, ``dtype``, ``pattern``, ``dim``, ``groups``, ``bad_groups``,
          ``zeros``, ``sparsity``, ``parameters``, ``flops`` (null: not counted) and ``tensor_cores`` (backend ->
          reason, or null if it can take the weight).
        - ``dense``: a list with ``name``, ``shape``, ``reason``, ``wanted`` (the rules asked for it and no pattern
          fits), ``parameters`` and ``flops``.
        """
        totals = {"covered": self.covered, "holding": self.holding, "tensor_cores": self.tensor_cores()}
        totals |= {backend: self.tensor_cores(backend) for backend in BACKENDS}
        return {
            **{name: getattr(self, name) for name in ("ok", "sparsity", "parameters", "flops")},
            "totals": {name: asdict(share) for name, share in totals.items()},
            "weights": [weight.to_dict() for weight in self.weights],
            "dense": [weight.to_dict() for weight in self.dense],
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_text(self, *, per_weight: bool = False, width: int | None = None) -> str:
        """Return the report as tables, as :meth:`SparsityReport.to_text`."""
        verdict = "ok" if self.ok else f"VIOLATED by {len(self.violations)} of {len(self.weights)} weights"
        summary = [
            f"model: {self.parameters:,} parameters"
            + ("" if self.flops is None else f", {self.flops:,} FLOPs a forward pass"),
            f"pattern {verdict}: covers {self.covered}; {self.sparsity:.2%} zeros in them",
            f"sparse tensor cores take {self.tensor_cores()}",
        ]
        headers = ["weights", "number", "shape", "dtype", "pattern", "zeros", "bad", "tensor cores"]
        if self.flops is not None:
            headers.append("FLOPs")
        alike = grouped(
            self.weights,
            lambda w: w.name if per_weight else (starred(w.name), w.shape, w.dtype, w.pattern, w.dim, w.ok, w.backends),
        )
        covered = format_table(headers, [self._row(group)[: len(headers)] for group in alike], width)
        refused = [
            f"{backend} cannot take {len(group)}: {group[0].tensor_cores[backend]} ({such_as([w.name for w in group])})"
            for backend in BACKENDS
            for group in grouped(self.weights, lambda w, backend=backend: w.tensor_cores[backend])  # type: ignore[misc]
            if group[0].tensor_cores[backend] is not None
        ]
        left = [
            (g[0].reason, len(g), sum(w.numel for w in g), such_as([w.name for w in g]))
            for g in grouped(self.dense, lambda weight: weight.reason)
        ]
        dense = format_table(("left dense", "tensors", "parameters", "such as"), left, width) if left else ""
        parts = ("\n".join(summary), covered, "\n".join(refused), dense, "\n".join(self.notes))
        return "\n\n".join(filter(None, parts))

    def _row(self, group: Sequence[ModelWeight]) -> Sequence[object]:
        first = group[0]
        return (
            joint_name([weight.name for weight in group]),
            len(group),
            "x".join(map(str, first.shape)),
            _dtype_name(first.dtype),
            str(first.pattern),
            f"{sum(w.zeros for w in group) / max(1, sum(w.numel for w in group)):.2%}",
            sum(w.bad_groups for w in group),
            "both" if len(first.backends) == len(BACKENDS) else ", ".join(first.backends) or "no",
            self._flop_share(group),
        )

    def _flop_share(self, group: Sequence[ModelWeight]) -> str:
        return f"{sum(weight.flops or 0 for weight in group) / max(1, self.flops or 0):.2%}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def model_report(
    target: Target, pattern: Pattern | str | Select | Selection | None = None, *, example: object = None
) -> ModelReport:
    """Count every group of every covered weight, the FLOPs, and what sparse tensor cores can take.

    Args:
        target: a module, a state dict or a path, as for :func:`admm_nxm.verify`.
        pattern: what the weights must satisfy, as for :func:`admm_nxm.verify`.
        example: an input of the module, to count the FLOPs of a forward pass in evaluation mode with torch's
            FlopCounterMode: a dict of keyword arguments, a tuple of arguments or a tensor. Without it none are counted.

    Raises:
        FileNotFoundError: nothing at that path.
        TypeError: the target or the example is of no known kind.
        ValueError: as for :func:`admm_nxm.verify`; an example without a module, or one that the module does not take.

    >>> weight = torch.tensor([[1.0, 0.0, 2.0, 0.0]]).repeat(32, 16)
    >>> state = {"layers.0.fc.weight": weight.bfloat16(), "bias": torch.zeros(32)}
    >>> report = model_report(state)
    >>> report.ok, report.weights[0].backends
    (True, ('cutlass', 'cusparselt'))
    """
    if example is not None and not isinstance(target, nn.Module):
        raise ValueError("an example needs a module to run; without a module leave it out")
    with open_target(target, "report on") as opened:
        named = opened.named
        selection, params = opened.cover(pattern)
        counts = check_weights(selection, lambda name: opened.read(params[name]))
    costs = _count_flops(named, example)
    sums_over = _reduction_dims(named, selection)
    weights = []
    for count in counts:
        key, dtype = _identity(params[count.name]), params[count.name].dtype
        reasons = obstacles(count.shape, dtype, count.pattern, count.dim, sums_over.get(key))
        if not count.ok:
            bad = f"{count.bad_groups} of {count.groups} groups exceed {count.pattern}: finalize or project it first"
            reasons = {backend: reason or bad for backend, reason in reasons.items()}
        weights.append(
            ModelWeight(**vars(count), dtype=dtype, flops=costs.of(params[count.name]), tensor_cores=reasons)
        )
    dense = _dense(named, selection, {_identity(t) for t in params.values()}, costs)
    notes = () if costs.note is None else (costs.note,)
    return ModelReport(tuple(weights), counts.skipped, dense=dense, flops=costs.total, notes=notes)


@dataclass(frozen=True)
class _Costs:
    """Hold the cost of a forward pass; nothing where none was made."""

    total: int | None = None
    by_weight: Mapping[object, int] | None = None  # by the identity of the weight
    note: str | None = None

    def of(self, t: Tensor) -> int | None:
        return None if self.by_weight is None else self.by_weight.get(_identity(t), 0)


_Named = Union[nn.Module, dict[str, Tensor]]  # noqa: UP007


def _identity(t: Tensor) -> object:
    """Return what tells a weight from others: its memory, which tied weights share even in a state dict."""
    return (start, tuple(t.shape)) if (start := address(t)) else id(t)


def _is_weight(t: Tensor) -> bool:
    """Return whether a tensor of a state dict counts as parameters: no counters and positions."""
    return t.is_floating_point() or t.is_complex() or (t.element_size() == 1 and t.dtype != torch.bool)


def _dense(named: _Named, selection: Selection, covered: set[object], costs: _Costs) -> tuple[DenseWeight, ...]:
    """Return all weights that are not covered, tied ones once."""
    tensors = named_tensors(named)
    known = {_identity(tensors[entry.name]): entry for entry in selection.skipped if entry.name in tensors}
    dense: dict[object, DenseWeight] = {}
    for name, t in tensors.items():
        key, shape = _identity(t), tuple(t.shape)
        if _is_weight(t) and key not in covered and key not in dense:
            why = known.get(key, SkippedWeight(name, shape, "not named by the selection"))
            dense[key] = DenseWeight(name, shape, why.reason, why.wanted, costs.of(t))
    return tuple(dense.values())


def _reduction_dims(named: _Named, selection: Selection) -> dict[object, int]:
    """Return the dimension that the layer of each covered weight sums over, whatever dimension it is grouped along."""
    wanted = {name for weight in selection for name in (weight.name, *weight.aliases)}
    try:
        usual, tensors = select_weights(
            named, select=lambda name, _: "1:1" if name in wanted else None, ineligible="skip", trainable=False
        )
    except ValueError:  # a tied weight that has no one such dimension: the selection was told which to take
        return {}
    return {_identity(tensors[weight.name]): weight.dim for weight in usual}


def _count_flops(named: _Named, example: object) -> _Costs:
    if example is None or not isinstance(named, nn.Module):
        return _Costs()
    from .flops import count_forward  # costs an import that reports without an example do without

    model = unwrap_model(named)
    total, by_id = count_forward(model, example)
    by_weight = {_identity(param): by_id.get(id(param), 0) for param in model.parameters()}
    share = 1 - sum(by_id.values()) / total if total else 0.0
    note = f"{share:.2%} of the FLOPs belong to no parameter: products of activations, as in attention"
    return _Costs(total, by_weight, note)
