"""Put the ADMM state into the inner optimizer's state dict, and take it apart again.

In the state of each parameter: the mask, and v in the paper's form. In each group: the counters. Beside ``state`` and
``param_groups``, under ``"admm"``: the name of each prunable weight's key, the statistics of a calibration that is
under way, and the model errors. torch.distributed.checkpoint drops that part, and knows parameters by name itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .consensus import is_mask_of
from .progress import counters_of
from .run import Run
from .selection import SelectedWeight
from .sharding import local
from .weights import CONSENSUS, MASK, Weight

__all__ = ["Loaded", "check", "join"]

_EXTRA = "admm"
"""Key of what is neither state nor a counter: ``names``, ``statistics``, ``model_errors`` and ``copies``."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that fits.

    Args:
        inner: the state dict for the inner optimizer.
        counters: the counters of the run.
        own: name of a weight -> what ADMMNxM stored for it.
        statistics: of the window that was under calibration; None if there are none.
        model_errors: name -> model error; empty if the checkpoint does not carry them.
        copies: name -> key in the inner optimizer's state -> whether it is a second set of the weight; likewise.
    """

    inner: dict[str, Any]
    counters: Mapping[str, int | float]
    own: Mapping[str, Mapping[str, Tensor]]
    statistics: Mapping[str, Any] | None
    model_errors: Mapping[str, float]
    copies: Mapping[str, Mapping[str, bool]]


def join(run: Run, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the state dict of a run."""
    order = _positions(run.inner)
    state = dict(state_dict["state"])
    for weight in run.weights:
        own = {key: t for key, t in run.inner.state.get(weight.param, {}).items() if key in (MASK, CONSENSUS)}
        key = order[id(weight.param)]
        if own and not own.keys() <= state.get(key, {}).keys():
            state[key] = {**state.get(key, {}), **own}
    extra: dict[str, Any] = {
        "names": {weight.name: order[id(weight.param)] for weight in run.weights},
        "model_errors": dict(run.model_errors),
        "copies": {w.name: {key: bool(flag) for key, flag in w.copy_flags.items()} for w in run.weights},
    }
    if run.statistics is not None:
        extra["statistics"] = run.statistics.state_dict()
    return {**state_dict, "state": state, _EXTRA: extra}


def check(run: Run, state_dict: dict[str, Any], *, paper: bool) -> Loaded:
    """Take a checkpoint apart, and see that it fits."""
    parts = _split(state_dict)
    counters = counters_of(state_dict)
    order = _positions(run.inner)
    _check_names(parts.extra, order, run.weights)
    number = selection_number(run, paper=paper)
    own = {}
    for weight in run.weights:
        position = order[id(weight.param)]
        entry = own[weight.name] = parts.own.pop(position, {})
        stepped = counters["admm_step"] > 0 and position in parts.stepped
        under_way = counters["admm_step"] > 0 and counters["admm_pruned_at"] < 0
        if paper and under_way and not (entry or parts.extra or weight.param.requires_grad):
            raise ValueError(
                f"the checkpoint comes without ADMM state of weight {weight.name!r}, which is frozen "
                "(requires_grad=False): torch.distributed.checkpoint loads state of trainable parameters alone. Load "
                "first, and freeze it then"
            )
        _check_entry(weight.spec, entry, stepped=stepped, pruned=_is_pruned(run, weight, counters), paper=paper)
    if parts.own:
        raise ValueError(
            f"the checkpoint has ADMM state for {len(parts.own)} parameters that are not selected here (positions "
            f"{sorted(parts.own)} in the optimizer); build ADMMNxM with the selection that the checkpoint was made with"
        )
    if counters["admm_step"] > 0 and counters["admm_selection"] not in (0, number):
        raise ValueError(
            "the checkpoint was made with another selection, pattern, grouped dimension or w_step, under which its "
            "ADMM state means something else; build ADMMNxM as it was built then"
        )
    statistics, errors = parts.extra.get("statistics"), parts.extra.get("model_errors", {})
    if statistics is not None:
        _check_statistics(statistics)
    if not isinstance(errors, Mapping) or not all(isinstance(error, (int, float)) for error in errors.values()):
        raise ValueError("the checkpoint's model errors are no mapping to numbers: the checkpoint is damaged")
    copies = parts.extra.get("copies", {})
    try:
        told = [flag for flags in copies.values() for flag in flags.values()]
    except (AttributeError, TypeError, RuntimeError):
        told = [None]
    if not all(isinstance(flag, bool) for flag in told):
        raise ValueError(
            "the checkpoint's second sets of weights are no mappings to booleans: the checkpoint is damaged"
        )
    return Loaded(parts.inner, {**counters, "admm_selection": number}, own, statistics, dict(errors), copies)


def selection_number(run: Run, *, paper: bool) -> int:
    """Return a number that tells one selection and w-step from another: names, shapes, patterns, dimensions."""
    facts = sorted((w.name, w.spec.shape, str(w.spec.pattern), w.spec.dim) for w in run.weights)
    return zlib.crc32(repr((paper, facts)).encode())


@dataclass
class _Parts:
    """A state dict taken apart: what the inner optimizer loads, position of a parameter -> what ADMMNxM stored for it,
    positions of parameters that the inner optimizer had stepped, and what lay under :data:`_EXTRA`."""

    inner: dict[str, Any]
    own: dict[int, dict[str, Tensor]]
    stepped: set[int]
    extra: Mapping[str, Any]


def _positions(inner: Optimizer) -> dict[int, int]:
    """Return id of a parameter -> its position over all groups, its key in a state dict."""
    params = chain.from_iterable(group["params"] for group in inner.param_groups)
    return {id(p): position for position, p in enumerate(params)}


def _split(state_dict: dict[str, Any]) -> _Parts:
    """Take a state dict apart without changing it."""
    _check_structure(state_dict)
    order = {key: position for position, key in enumerate(chain(*(g["params"] for g in state_dict["param_groups"])))}
    inner_state: dict[Any, Any] = {}
    own: dict[int, dict[str, Tensor]] = {}
    stepped: set[int] = set()
    for key, entry in state_dict["state"].items():
        if key not in order or not isinstance(entry, dict):
            inner_state[key] = entry
            continue
        mine = {name: entry[name] for name in (MASK, CONSENSUS) if name in entry}
        rest = {name: value for name, value in entry.items() if name not in mine}
        if mine:
            own[order[key]] = mine
        if rest or not mine:
            inner_state[key] = rest
        # Adagrad creates its state at construction, with a step of 0.
        if rest and float(rest.get("step", 1)) > 0:
            stepped.add(order[key])
    inner = {**state_dict, "state": inner_state}
    extra = inner.pop(_EXTRA, {})
    if not isinstance(extra, Mapping):
        raise ValueError(f"the checkpoint's {_EXTRA!r} is {type(extra).__name__}: the checkpoint is damaged")
    return _Parts(inner, own, stepped, extra)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.layout == torch.strided
    )


def _check_structure(state_dict: object) -> None:
    """Refuse what is no state dict of an optimizer, before anything is loaded."""
    problem = None
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping):
        problem = "it has no 'state'"
    elif not (isinstance(groups, (list, tuple)) and groups):
        problem = "it has no 'param_groups'"
    elif not all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        problem = "a parameter group has no 'params'"
    else:
        keys: set[object] = set()
        try:
            keys.update(chain(*(group["params"] for group in groups)))
        except TypeError:
            problem = "a parameter in its groups is neither a number nor a name"
        if problem is None and len(keys) < sum(len(group["params"]) for group in groups):
            problem = "its groups name a parameter twice"
        for key, entry in state.items() if problem is None else ():
            if key in keys and not isinstance(entry, Mapping):
                problem = f"its state of parameter {key!r} is {type(entry).__name__}"
            elif key not in keys and isinstance(entry, Mapping) and MASK in entry:
                problem = f"it has state of parameter {key!r}, which no group names"
            elif isinstance(entry, Mapping) and any(isinstance(t, Tensor) and t.is_meta for t in entry.values()):
                problem = f"its state of parameter {key!r} has no data"
            elif isinstance(entry, Mapping) and not _is_number(entry.get("step", 1)):
                problem = f"its step of parameter {key!r} is {entry['step']!r}"
    if problem is not None:
        raise ValueError(f"this is no whole state dict of an optimizer: {problem}; save the checkpoint again")


def _check_names(extra: Mapping[str, Any], order: Mapping[int, int], weights: Iterable[Weight]) -> None:
    """Refuse a checkpoint whose parameters stand in another order."""
    names = extra.get("names")
    if names is None:
        return
    here = {weight.name: order[id(weight.param)] for weight in weights}
    if not isinstance(names, Mapping) or not all(isinstance(position, int) for position in names.values()):
        raise ValueError("the checkpoint's names of weights are no mapping to positions: the checkpoint is damaged")
    for name, position in here.items():
        if names.get(name, position) != position:
            raise ValueError(
                f"weight {name!r} is parameter {position} of the optimizer, and was parameter {names[name]} in the "
                "checkpoint: the parameters stand in another order, and all state would go to the wrong ones. Build "
                "the model and the inner optimizer with the parameters in the checkpoint's order"
            )


def _is_pruned(run: Run, weight: Weight, counters: Mapping[str, int | float]) -> bool:
    """Whether the mask of a weight was in force, as far as that can be told here."""
    solved = counters["admm_windows_solved"] if counters["admm_windows"] == run.progress.windows else 0
    return counters["admm_pruned_at"] >= 0 or (solved > 0 and weight.window < solved)


def _check_statistics(statistics: object) -> None:
    """Refuse statistics that are damaged; whether they fit, the w-step looks at."""
    entries = statistics.items() if isinstance(statistics, Mapping) else [("the weights", None)]
    for name, moments in entries:
        problem = None
        if not isinstance(moments, Mapping) or not all(isinstance(t, Tensor) for t in moments.values()):
            problem = "are no mapping to tensors: the checkpoint is damaged"
        elif any(t.is_meta or t.layout != torch.strided or t.is_complex() for t in moments.values()):
            problem = "have no data: the checkpoint is damaged"
        elif not all(bool(t.isfinite().all()) for t in moments.values()):
            problem = "have NaN or infinite entries: the checkpoint is damaged; resume from an earlier one"
        if problem is not None:
            raise ValueError(f"the checkpoint's statistics of {name!r} {problem}")


def _check_entry(
    weight: SelectedWeight, entry: Mapping[str, Tensor], *, stepped: bool, pruned: bool, paper: bool
) -> None:
    """Refuse a checkpoint whose entry for a weight is missing, has another shape or kind, is not finite, or contradicts
    the counters."""
    for key, t in entry.items():
        _check_tensor(weight, key, t)
    needed = (MASK, CONSENSUS) if paper else (MASK,)
    missing = [key for key in needed if key not in entry]
    if stepped and missing:
        raise ValueError(
            f"the checkpoint has no {missing[0]} for weight {weight.name!r}, which it has stepped; build ADMMNxM with "
            "the selection and the w_step that the checkpoint was made with"
        )
    if pruned and MASK in entry and not bool(is_mask_of(local(entry[MASK]) != 0, weight.pattern, weight.dim)):
        raise ValueError(
            f"the checkpoint's mask of weight {weight.name!r} does not have pattern {weight.pattern} along dimension "
            f"{weight.dim}; build ADMMNxM with the pattern and the statistics_memory that the checkpoint was made with"
        )


def _check_tensor(weight: SelectedWeight, key: str, t: object) -> None:
    """Refuse an entry that is no state of the weight."""
    kind = f"a {type(t).__name__}" if not isinstance(t, Tensor) else f"{t.dtype} of layout {t.layout} on {t.device}"
    if (
        not isinstance(t, Tensor)
        or t.layout != torch.strided
        or t.is_meta
        or not (t.is_floating_point() or (key == MASK and t.dtype in (torch.bool, torch.uint8)))
    ):
        raise ValueError(f"the checkpoint's {key} for weight {weight.name!r} is {kind}: the checkpoint is damaged")
    if tuple(t.shape) != weight.shape:
        raise ValueError(
            f"the checkpoint's {key} for weight {weight.name!r} has shape {tuple(t.shape)}, the weight has "
            f"{weight.shape}: was it saved from another model, or with parameters in another order?"
        )
    if t.is_floating_point() and not bool(torch.isfinite(local(t)).all()):
        raise ValueError(
            f"the checkpoint's {key} for weight {weight.name!r} has NaN or infinite entries: the checkpoint is "
            "damaged, or the run had diverged; resume from an earlier one"
        )
