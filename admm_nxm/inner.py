"""Dealing with the inner optimizer: what can be wrapped, and how its step is called."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["check_inner", "has_no_effect", "is_capturing", "raw_step", "share_step_hooks"]


def check_inner(inner: object, wrapper: type[Optimizer]) -> None:
    """Refuse what cannot be wrapped.

    Args:
        inner: the optimizer that the user passed.
        wrapper: the wrapping class, which cannot be wrapped again.

    Raises:
        TypeError: not an optimizer instance, already wrapped, or in need of calling a closure itself.
        ValueError: ``differentiable=True``.
    """
    name = type(inner).__name__
    if isinstance(inner, type) and issubclass(inner, Optimizer):
        raise TypeError(f"optimizer is the class {inner.__name__}; pass an instance, {inner.__name__}(params, lr=...)")
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer is a {name}; a torch.optim.Optimizer is needed")
    if isinstance(inner, wrapper) or isinstance(getattr(inner, "optimizer", None), wrapper):
        raise TypeError(f"optimizer is a {name} that is already wrapped in ADMMNxM; wrap the plain optimizer once")
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
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if isinstance(inner, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise TypeError(
            f"{name} needs to call the closure itself; ADMMNxM evaluates it once, before the penalty. "
            "Use an optimizer whose step() works without a closure, such as AdamW"
        )
    if any(group.get("differentiable") for group in inner.param_groups):
        raise ValueError(f"{name} has differentiable=True; the penalty works in place, so pass differentiable=False")


def share_step_hooks(inner: Optimizer, wrapper: Optimizer) -> None:
    """Let both optimizers hold the same step hooks, so that a hook fires once, around the whole step, whichever of
    the two it was registered on."""
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(wrapper, name, inner.__dict__.setdefault(name, OrderedDict()))


def raw_step(inner: Optimizer) -> None:
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
    step(inner)


def has_no_effect(inner: Optimizer) -> bool:
    """Return whether a step would only create state: all learning rates and all gradients are zero.

    torch.distributed.checkpoint makes such a step before it loads. The gradients are read only if the learning rates
    are zero, so an ordinary step does not wait for the device.
    """
    rates = [group.get("lr") for group in inner.param_groups]
    if not all(rate is not None and float(rate) == 0.0 for rate in rates):
        return False
    gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
    return not any(bool(gradient.any()) for gradient in gradients)


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
