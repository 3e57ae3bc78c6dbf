"""What ADMMNxM adds to the inner optimizer's state dict, and taking it apart again.

Per weight: ``admm_consensus`` (v, w off the mask, or the mask, which it is for every form once frozen) and, while the
model holds the projected weights, ``admm_primal`` (the weights that training goes on from). Counters are
numbers in every parameter group, where torch.distributed.checkpoint looks for them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .consensus import is_mask_of
from .masks import PACKED, is_mask, packed_shape, unpack
from .selection import SelectedWeight
from .sharding import local

__all__ = ["CONSENSUS", "COUNTERS", "PRIMAL", "check_entry", "check_kind", "counters_of", "fingerprint", "split"]

CONSENSUS = "admm_consensus"
PRIMAL = "admm_primal"
COUNTERS: Mapping[str, int | float] = {
    "admm_step": 0,
    "admm_rho": 0.0,
    "admm_dual_in_use": 0,
    "admm_frozen_at": -1,
    "admm_freeze_residual": -1.0,
    "admm_freeze_churn": -1.0,
    "admm_far_weights": -1,
    "admm_worst_residual": -1.0,
    "admm_worst_weight": -1,
    "admm_selection": 0,
    "admm_finalized": 0,
    "admm_projected": 0,
}


def split(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]], dict[int, bool]]:
    """Take a state dict apart without changing it.

    Args:
        state_dict: as :meth:`admm_nxm.ADMMNxM.state_dict` returns it, or the inner optimizer's own.

    Returns:
        The state dict for the inner optimizer; position of a parameter -> what ADMMNxM stored for it; position ->
        whether the inner optimizer has stepped the parameter.

    Raises:
        ValueError: it is no state dict of an optimizer.
    """
    _check_structure(state_dict)
    order = {key: position for position, key in enumerate(chain(*(g["params"] for g in state_dict["param_groups"])))}
    inner_state: dict[Any, Any] = {}
    own: dict[int, dict[str, Tensor]] = {}
    stepped: dict[int, bool] = {}
    for key, entry in state_dict["state"].items():
        if key not in order or not isinstance(entry, dict):
            inner_state[key] = entry
            continue
        mine = {name: entry[name] for name in (CONSENSUS, PRIMAL) if name in entry}
        rest = {name: value for name, value in entry.items() if name not in mine}
        if mine:
            own[order[key]] = mine
        if rest or not mine:
            inner_state[key] = rest
        # Adagrad creates its state at construction, with a step of 0.
        stepped[order[key]] = bool(rest) and float(rest.get("step", 1)) > 0
    return {**state_dict, "state": inner_state}, own, stepped


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
            elif key not in keys and isinstance(entry, Mapping) and CONSENSUS in entry:
                problem = f"it has state of parameter {key!r}, which no group names"
            elif isinstance(entry, Mapping) and any(isinstance(t, Tensor) and t.is_meta for t in entry.values()):
                problem = f"its state of parameter {key!r} has no data"
            elif isinstance(entry, Mapping) and not _is_number(entry.get("step", 1)):
                problem = f"its step of parameter {key!r} is {entry['step']!r}"
    if problem is not None:
        raise ValueError(f"this is no whole state dict of an optimizer: {problem}; save the checkpoint again")


def counters_of(state_dict: Mapping[str, Any], weights: int) -> dict[str, int | float]:
    """Return the counters of a checkpoint; those that it lacks as they are at the start.

    Args:
        state_dict: as :func:`split` takes it.
        weights: how many weights are prunable.

    Raises:
        ValueError: a counter is no number that it can be.
    """
    found = {key: state_dict["param_groups"][0].get(key, value) for key, value in COUNTERS.items()}
    for key, value in found.items():
        # Loaders may have made a tensor of a number.
        number = value.item() if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta else value
        fits = isinstance(number, (int, float)) and (isinstance(COUNTERS[key], float) or float(number).is_integer())
        fits = fits and not (key in ("admm_step", "admm_rho") and not 0 <= number < math.inf)
        if not fits or (key == "admm_worst_weight" and not -1 <= number < weights):
            raise ValueError(f"the checkpoint's {key} is {value!r}, which it cannot be: the checkpoint is damaged")
    if found["admm_frozen_at"] > found["admm_step"]:
        raise ValueError(
            f"the checkpoint is at ADMM step {found['admm_step']} and its mask was frozen at step "
            f"{found['admm_frozen_at']}: the checkpoint is damaged"
        )
    return found


def fingerprint(selection: Iterable[SelectedWeight], places: Iterable[tuple[int, int]], stores: str) -> int:
    """Return a number that tells one selection from another: which parameters, with which pattern, along which
    dimension, and what is stored for each. The state means something else under another pattern, and its shape does
    not show it."""
    facts = [
        (place, w.shape, w.pattern.keep, w.pattern.group, w.dim) for w, place in zip(selection, places, strict=True)
    ]
    return zlib.crc32(f"{facts!r} {stores}".encode())


def check_entry(
    weight: SelectedWeight, entry: Mapping[str, Tensor], stepped: bool, counters: Mapping[str, int | float]
) -> None:
    """Refuse a checkpoint whose entry for a weight does not fit the optimizer.

    Args:
        weight: the prunable weight.
        entry: what the checkpoint holds for it.
        stepped: whether the inner optimizer had stepped it.
        counters: the checkpoint's counters.

    Raises:
        ValueError: an entry is missing, has another shape or kind, is not finite, or contradicts the counters.
    """
    for name, t in entry.items():
        _check_tensor(weight.name, name, t)
        # Packed or not, a mask can be read; it is repacked on loading.
        shape = packed_shape(weight.shape) if name == CONSENSUS and t.dtype == PACKED else weight.shape
        if tuple(t.shape) != shape:
            raise ValueError(
                f"the checkpoint's {name} for weight {weight.name!r} has shape {tuple(t.shape)}, the weight has "
                f"{weight.shape}: was it saved from another model, or with parameters in another order?"
            )
    consensus = entry.get(CONSENSUS)
    if consensus is None:
        if counters["admm_step"] > 0 and stepped:
            raise ValueError(
                f"the checkpoint has no {CONSENSUS} for weight {weight.name!r} at ADMM step {counters['admm_step']}; "
                "build ADMMNxM with the selection that the checkpoint was made with"
            )
    elif counters["admm_frozen_at"] >= 0:
        part = local(consensus)
        part = unpack(part) if is_mask(part) else part != 0
        if not bool(is_mask_of(part, weight.pattern, weight.dim)):
            raise ValueError(
                f"the checkpoint's frozen mask of weight {weight.name!r} does not have pattern {weight.pattern} along "
                f"dimension {weight.dim}; build ADMMNxM with the pattern that the checkpoint was made with"
            )
    if counters["admm_projected"] and PRIMAL not in entry and counters["admm_frozen_at"] < 0:
        raise ValueError(
            f"the checkpoint was saved while the model held its projected weights and lacks {PRIMAL} for weight "
            f"{weight.name!r}; call optimizer.train() before saving with torch.distributed.checkpoint"
        )


def _check_tensor(weight: str, name: str, t: object) -> None:
    """Refuse an entry that is no state of a weight, whatever its shape."""
    kind = f"a {type(t).__name__}" if not isinstance(t, Tensor) else f"{t.dtype} of layout {t.layout} on {t.device}"
    if (
        not isinstance(t, Tensor)
        or t.layout != torch.strided
        or t.is_meta
        or not (t.is_floating_point() or (name == CONSENSUS and is_mask(t)))
    ):
        raise ValueError(f"the checkpoint's {name} for weight {weight!r} is {kind}: the checkpoint is damaged")
    if t.is_floating_point() and not bool(torch.isfinite(local(t)).all()):
        raise ValueError(
            f"the checkpoint's {name} for weight {weight!r} has NaN or infinite entries: the checkpoint is damaged, or "
            "the run had diverged; resume from an earlier one"
        )


def check_kind(
    weight: SelectedWeight, entry: Mapping[str, Tensor], counters: Mapping[str, int | float], state_dtype: torch.dtype
) -> None:
    """Refuse a mask where there should be a buffer, and the other way round, in a checkpoint that is otherwise right.

    Args:
        weight: the prunable weight.
        entry: what the checkpoint holds for it.
        counters: the checkpoint's counters.
        state_dtype: dtype of the weight's state here.

    Raises:
        ValueError: the state is of the other kind.
    """
    consensus = entry.get(CONSENSUS)
    if consensus is None or counters["admm_frozen_at"] >= 0:
        return
    if is_mask(consensus) and state_dtype.is_floating_point:
        raise ValueError(
            f"the state of weight {weight.name!r} was cast to bool: a checkpoint from before the mask was frozen has "
            "been loaded in place into a frozen optimizer; build a new ADMMNxM and load into that"
        )
    if not is_mask(consensus) and not state_dtype.is_floating_point:
        raise ValueError(
            f"the checkpoint's state of weight {weight.name!r} is {consensus.dtype}, and here masks alone are stored; "
            f"build ADMMNxM with state_dtype={consensus.dtype}"
        )
