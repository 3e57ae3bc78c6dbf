"""Floating-point operations of a real forward pass by torch's counter, and which weight each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..memory import address
from ..sharding import is_sharded

__all__ = ["count_forward"]

_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.clone)


def count_forward(model: nn.Module, example: object) -> tuple[int, dict[int, int]]:
    """Count the FLOPs of one forward pass in evaluation mode, and those of them that each parameter takes part in."""
    # An operation belongs to the parameter whose memory it reads, be it through a view or a cast, so modules that run
    # twice, tied weights and weights that another module computes with are counted as they are used.
    for name, param in model.named_parameters():
        if is_sharded(param):
            raise ValueError(
                f"weight {name!r} is sharded: its FLOPs cannot be told apart; unshard the model, or give no example"
            )
    if not isinstance(example, (Tensor, Mapping, tuple, list)):
        kind = type(example).__name__
        raise TypeError(f"example is a {kind}; a dict of keyword arguments, a tuple of arguments or a tensor is needed")
    args = () if isinstance(example, Mapping) else (example,) if isinstance(example, Tensor) else tuple(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # see _evaluating
    counter = FlopCounterMode(display=False)
    by_weight = _ByWeight(counter, model)
    # As plain products: torch counts no fused attention of CPUs.
    with _evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, by_weight:
        try:
            model(*args, **kwargs)
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the forward pass on example= failed with {type(error).__name__}: {text}; give the arguments of "
                "the model's forward as a dict, a tuple or a tensor, on the model's device"
            ) from error
    return counter.get_total_flops(), by_weight.flops


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients and torch's fused Transformer layers."""
    # Those do a whole layer in one operation, which no FLOP counter can look into. On inputs of a module that require
    # gradients, as views of a parameter do even under no_grad, torch's counter sets a hook, which fails for those.
    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for param in model.parameters():
            if param.requires_grad and param.is_leaf:
                undo.callback(param.requires_grad_)
                param.requires_grad_(False)
        yield


class _ByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds what each operation cost to the parameter that it reads."""

    def __init__(self, counter: FlopCounterMode, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[int, int] = {}
        self._counter = counter
        self._spans: list[tuple[int, int, int]] = []  # first byte, byte after the last, id of the parameter
        self._copies: list[Tensor] = []  # alive, lest their memory be given to another tensor
        for param in model.parameters():
            self._add(param, id(param))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        spent = self._counter.get_total_flops() - before
        copied = getattr(func, "overloadpacket", None) in _COPIES
        if spent or copied:
            # The factors of a product are its last two matrices: before them may stand what is added, after them a
            # vector of biases. The weight is the last that is a parameter: the one before may be a learned query.
            factors = [t for t in args if torch.is_tensor(t) and (copied or t.ndim > 1)][-2:]
            owners = [owner for owner in map(self._owner, reversed(factors)) if owner is not None]
            for owner in owners[:1]:
                self.flops[owner] = self.flops.get(owner, 0) + spent
                if copied:
                    self._copies.append(out)
                    self._add(out, owner)
        return out

    def _add(self, t: Tensor, owner: int) -> None:
        if start := address(t):
            self._spans.append((start, start + t.numel() * t.element_size(), owner))

    def _owner(self, t: Tensor) -> int | None:
        at = address(t)
        return next((owner for start, stop, owner in self._spans if start <= at < stop), None)
