"""Dealing with the inner optimizer: what can be wrapped, and how its step is called."""

from __future__ import annotations

import inspect
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["check_inner", "has_no_effect", "is_capturing", "load_or_restore", "raw_step", "share_step_hooks"]


def check_inner(inner: object, wrapper: type[Optimizer]) -> None:
    """Refuse what cannot be wrapped, the wrapper itself included."""
    name = type(inner).__name__
    if isinstance(inner, type) and issubclass(inner, Optimizer):
        raise TypeError(f"optimizer is the class {inner.__name__}; pass an instance, {inner.__name__}(params, lr=...)")
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer is a {name}; a torch.optim.Optimizer is needed")
    nested = [getattr(inner, attribute, None) for attribute in ("optimizer", "base_optimizer", "_base_optimizer")]
    if any(isinstance(part, wrapper) for part in (inner, *nested)):
        raise TypeError(f"optimizer is a {name} that is already wrapped in ADMMNxM; wrap the plain optimizer once")
    if not hasattr(inner, "param_groups"):
        raise TypeError(f"{name} has no param_groups; use an optimizer that has them, such as the one inside it")
    problem = _shortcoming(inner)
    if problem is not None:
        raise TypeError(
            f"{name} {problem}; wrap the optimizer inside it in ADMMNxM, and put {name} around that, if it takes any "
            "optimizer"
        )
    # What steps in the backward pass never comes to step(): LOMO, and layer-wise GaLore and APOLLO of transformers.
    if hasattr(inner, "fused_backward") or hasattr(inner, "optimizer_dict"):
        raise TypeError(
            f"{name} updates the weights during the backward pass, where ADMM cannot take part; use an optimizer that "
            "updates them in step(), such as AdamW"
        )
    if any(key.startswith("admm_") for group in inner.param_groups for key in group):
        raise ValueError(
            f"this {name} was wrapped in ADMMNxM before, and its groups hold the counters of that run; call unwrap() "
            "on that wrapper first, or build the inner optimizer again"
        )
    if hasattr(inner, "step_was_skipped"):
        raise TypeError(
            f"optimizer is a {name}, which decides by itself whether a step happens; wrap the plain optimizer in "
            "ADMMNxM first, then pass that to Accelerator.prepare"
        )
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(inner).__mro__):
        raise TypeError(
            f"optimizer is a {name}, which keeps each parameter's state on one rank only; shard with FSDP2 "
            "(torch.distributed.fsdp.fully_shard) instead, and wrap a plain optimizer"
        )
    # SAM and its kin step twice, with an evaluation between, whatever the default of their closure.
    if callable(getattr(inner, "first_step", None)) and callable(getattr(inner, "second_step", None)):
        raise TypeError(
            f"{name} evaluates the closure itself, between two half-steps; let it drive ADMMNxM instead of the other "
            f"way round: give {name} ADMMNxM(AdamW(...), model, ...) as its base optimizer"
        )
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if isinstance(inner, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise TypeError(
            f"{name} needs to call the closure itself; ADMMNxM evaluates it once, first. "
            "Use an optimizer whose step() works without a closure, such as AdamW"
        )
    if any(group.get("differentiable") for group in inner.param_groups):
        raise ValueError(f"{name} has differentiable=True; masks work in place, so pass differentiable=False")


def _shortcoming(inner: Optimizer) -> str | None:
    """Return what an optimizer lacks to be resumed, as some that wrap another one do."""
    try:
        saved = inner.state_dict()
    except Exception as error:
        return f"cannot save its state ({error!r})"
    if isinstance(saved, Mapping) and isinstance(saved.get("state"), Mapping) and saved.get("param_groups"):
        return None
    return "saves no 'state' and 'param_groups', so a run could not be resumed"


def share_step_hooks(inner: Optimizer, wrapper: Optimizer) -> None:
    """Let both optimizers hold the same step hooks, so that a hook fires once, around the whole step, whichever of
    the two it was registered on."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(wrapper, name, inner.__dict__.setdefault(name, OrderedDict()))


def raw_step(inner: Optimizer, *, first: bool = False) -> None:
    """Call the inner optimizer's ``step`` without the wrapping that fires step hooks: the outer step fires them."""
    patched = inner.__dict__.get("step")
    if patched is not None and not hasattr(patched, "_wrapped_by_lr_sched"):
        patched()  # somebody has put a step of their own on the instance
        return
    step: Any = type(inner).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    # What an LR scheduler that was built on the inner optimizer looks at.
    inner._opt_called = True  # type: ignore[attr-defined]
    try:
        step(inner)
    except Exception as error:  # some packages have classes of their own for it
        if not first or isinstance(error, torch.OutOfMemoryError) or not _asks_for_closure(inner, error):
            raise
        raise TypeError(
            f"{type(inner).__name__} failed in its first step ({error}), which ADMMNxM calls without a closure, "
            "because it has evaluated that already. If it cannot step without one, give it ADMMNxM(AdamW(...), model, "
            "...) as its base optimizer, or use an optimizer whose step() works without a closure"
        ) from error


def load_or_restore(inner: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict into the inner optimizer; what fails half-way leaves it as it was."""
    before: dict[str, Any] = {key: vars(inner)[key] for key in ("state", "param_groups") if key in vars(inner)}
    try:
        inner.load_state_dict(state_dict)
    except Exception as error:
        vars(inner).update(before)  # loading makes new ones
        raise ValueError(
            f"the inner {type(inner).__name__} cannot load its part of the checkpoint ({error!r}), and nothing was "
            "loaded: the checkpoint is damaged, or of another optimizer or other parameter groups"
        ) from error


def _asks_for_closure(inner: Optimizer, error: BaseException) -> bool:
    """Whether a failed step took a closure and failed in its own code, not in what it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_locals.get("self") is inner and "closure" in inspect.signature(type(inner).step).parameters


def has_no_effect(inner: Optimizer) -> bool:
    """Return whether a step would only create state: all learning rates and all gradients are zero.

    torch.distributed.checkpoint makes such a step before it loads. The gradients are read only if the learning rates
    are zero, so an ordinary step does not wait for the device.
    """
    if any(group.get("lr") is None or float(group["lr"]) != 0.0 for group in inner.param_groups):
        return False
    return not any(p.grad is not None and p.grad.any() for group in inner.param_groups for p in group["params"])


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
