"""A and G of the quadratic model: second moments of a layer's inputs and of the gradients at its outputs, gathered from
the ordinary forward and backward passes of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from .selection import is_conv1d
from .sharding import full, is_sharded

__all__ = ["MAX_TOKENS", "Moments", "Statistics", "bytes_needed", "can_be_observed", "refuse_compiled"]

MAX_TOKENS = 2048
"""Tokens of one pass through one module that count by default: cheap where float32 products are slow, and in 16 steps
ten times as many as most layers are wide."""

_GOLDEN = 2654435769  # 2**32 over the golden ratio

# Subclasses of nn.Linear with a forward of their own that is the linear map all the same: (package, class).
_LINEAR_MAPS = {
    ("torchao", "Float8Linear"),
    ("torchao", "Int8MixedPrecisionTrainingLinear"),
    ("transformers", "FalconLinear"),
}


@dataclass
class Moments:
    """Hold the statistics of one weight: sums over tokens, not means.

    Args:
        inputs: A, the sum of x x^T, (d_in, d_in), float32; float64 of float64 modules. None where only G is gathered.
        outputs: G, the sum of g g^T, (d_out, d_out), likewise; None where only A is gathered.
        tokens: how many tokens the sums are over, int64, 0-d.
        passes: how many passes there were, with those dropped, int64, 0-d; one step may have several.
        dropped: how many of them were left out because x or g was not finite, int64, 0-d.
    """

    inputs: Tensor | None
    outputs: Tensor | None
    tokens: Tensor
    passes: Tensor
    dropped: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of their fields."""
        return {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}


class Statistics:
    """Gathers A and G of modules from their ordinary passes, while it is attached.

    Both products are formed in the backward pass, in float32, without a wait for the device. A token counts if its
    gradient is not all zero: padding drops out by itself. Passes without gradients (evaluation, generation) do not
    count. Everything else adds up: accumulated gradients, a module that is called several times, modules that share a
    weight. Activations that are checkpointed are recomputed once and count once. Of ``backward(create_graph=True)`` the
    first pass counts, and the passes through its graph do not.

    The outputs and the gradients stay what they are, bit for bit. Copies of the model gather nothing. While anything is
    attached, code compiled with ``torch.compile`` runs eagerly, by the process-wide ``torch.compiler.set_stance``: a
    compiled module never calls a hook that it did not have when it was compiled.

    Args:
        modules: the modules of each weight, by its name; several that share the weight count as one.
        inputs: whether A is gathered. Without it nothing more is kept for the backward pass.
        outputs: whether G is gathered. Without it A is formed in the forward pass, with or without gradients, and every
            token counts, or those that ``counting`` names.
        max_tokens: of how many tokens of one pass through one module the products are formed; of more, so many are
            taken, evenly spread and the same ones in every run.

    Raises:
        ValueError: no modules, one that cannot be observed, sizes of one weight that differ, nothing to gather,
            ``max_tokens`` below 1.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module | Sequence[nn.Module]],
        *,
        inputs: bool = True,
        outputs: bool = True,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if not modules:
            raise ValueError("modules is empty: statistics need at least one module")
        if not (inputs or outputs):
            raise ValueError("inputs and outputs are both False: nothing would be gathered; set one of them")
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens}: it must be at least 1")
        self.inputs, self.outputs, self.max_tokens = inputs, outputs, max_tokens
        self.modules = {name: _observable(name, found) for name, found in modules.items()}
        self.counting: Callable[[str, Tensor], Tensor | None] | None = None
        """Without ``outputs``: a function of a weight's name and its inputs, (..., d_in), that returns which tokens
        count, boolean, (...); None if all do."""
        self.counted: Callable[[str, Tensor], object] | None = None
        """With ``outputs``: a function that is told the weight's name and which tokens of a pass have counted, boolean,
        (tokens,)."""
        self.moments: dict[str, Moments] = {}
        """The statistics so far, by weight name. A name appears with the first pass through one of its modules."""
        self._handles: list[RemovableHandle] = []
        self._stay_eager: weakref.finalize[Any, Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._equal = False  # whether all processes hold the same sums, over all of them

    @property
    def attached(self) -> bool:
        """Whether passes are counted now."""
        return bool(self._handles)

    def attach(self, group: dist.ProcessGroup | None = None) -> None:
        """Start to count passes, between two steps; nothing changes if it is attached.

        Args:
            group: the processes whose sums :meth:`reduce` adds up; None means all.
        """
        if self.attached:
            return
        self._group = group
        _EAGER.enter()
        # Also if nobody detaches, because a run was given up.
        self._stay_eager = weakref.finalize(self, _EAGER.leave)
        self._stay_eager.atexit = False
        for name, modules in self.modules.items():
            for module in modules:
                # Before other hooks: what tensor parallelism makes of the output is not the output.
                hook = _Hook(self, name)
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def detach(self) -> None:
        """Stop counting, and leave the modules and the compiler as they were. The moments stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._stay_eager is not None:
            self._stay_eager()
            self._stay_eager = None

    def reduce(self) -> None:
        """Add up what the processes of the group have gathered since the last call; all hold the same sums afterwards.

        A collective, once each step, before the moments are read or saved. Does nothing in a single process.
        """
        if _world_size(self._group) == 1:
            return
        self._make_partial()
        moments = [self._moments_of(name) for name in self.modules]
        counts = torch.stack([count for one in moments for count in (one.tokens, one.passes, one.dropped)])
        sums = [matrix for one in moments for matrix in (one.inputs, one.outputs) if matrix is not None]
        pending = [dist.all_reduce(tensor, group=self._group, async_op=True) for tensor in (counts, *sums)]
        for work in pending:
            work.wait()
        for one, row in zip(moments, counts.view(-1, 3), strict=True):
            for own, count in zip((one.tokens, one.passes, one.dropped), row, strict=True):
                own.copy_(count)
        self._equal = True

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the moments by weight name and field, not copied; the same in all processes after :meth:`reduce`."""
        return {name: one.tensors for name, one in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace the moments by copies of what :meth:`state_dict` returned, on the devices of the weights.

        Raises:
            ValueError: as in :meth:`check`; nothing is loaded.
        """
        self.check(state)
        loaded = {}
        for name, tensors in state.items():
            loaded[name] = self._new_moments(name)
            for key, tensor in loaded[name].tensors.items():
                tensor.copy_(tensors[key])
        self.moments = loaded
        self._equal = True

    def check(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Refuse what :meth:`load_state_dict` cannot load.

        Raises:
            ValueError: a name that is not among the modules, or tensors that do not fit the module.
        """
        for name, tensors in state.items():
            if name not in self.modules:
                raise ValueError(f"statistics of {name!r}: there is no such weight here, only {sorted(self.modules)}")
            d_in, d_out = _sizes(self.modules[name][0])
            expected: dict[str, tuple[int, ...]] = {"inputs": (d_in, d_in)} if self.inputs else {}
            if self.outputs:
                expected["outputs"] = (d_out, d_out)
            expected |= {"tokens": (), "passes": (), "dropped": ()}
            found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            if found != expected:
                raise ValueError(f"statistics of {name!r} have the shapes {found}; this model needs {expected}")

    def __getstate__(self) -> dict[str, Any]:
        # Copies keep the moments; their hooks are not attached.
        return {**self.__dict__, "_handles": [], "_stay_eager": None, "_group": None, "counting": None, "counted": None}

    @torch.no_grad()
    def _add(self, name: str, x: Tensor | None, gradient: Tensor | None) -> None:
        """Add one pass of one module: x of shape (..., d_in), the gradient of shape (..., d_out); one may be None."""
        rows = [None if t is None else self._thin(full(t)) for t in (x, gradient)]
        x, gradient = rows
        first = gradient if x is None else x
        if first is None or first.shape[0] == 0:
            return
        if self._equal:
            self._make_partial()
        moments = self._moments_of(name, first)
        peaks = [t.abs().amax(1) for t in rows if t is not None]
        alive = torch.ones_like(peaks[0], dtype=torch.bool) if gradient is None else peaks[-1] != 0
        # Also false if squares overflow. A flag on the device: to ask for it here would be to wait for the device.
        dtype = _dtype(self.modules[name][0])
        peak = torch.stack([torch.where(alive, each, 0).amax().to(dtype) for each in peaks]).amax()
        finite = torch.isfinite(peak.square() * first.shape[0])
        counted = alive & finite
        if self.counted is not None:
            self.counted(name, counted)
        # Chosen, not multiplied by 0: what stands at padding need not be finite.
        if moments.inputs is not None and x is not None:
            _add_products(moments.inputs, torch.where(counted[:, None], x, 0))
        if moments.outputs is not None and gradient is not None:
            _add_products(moments.outputs, torch.where(finite, gradient, 0))
        moments.tokens.add_(counted.sum().to(moments.tokens.device))
        moments.passes.add_(1)
        moments.dropped.add_((~finite).to(moments.dropped.device))

    def _thin(self, t: Tensor) -> Tensor:
        """Return the tokens of ``t`` as rows, at most ``max_tokens``. Twice is the same as once."""
        rows = t.reshape(-1, t.shape[-1])
        count, most = rows.shape[0], self.max_tokens
        if count <= most:
            return rows
        # One from each of as many equal parts, by multiples of the golden ratio: a fixed place would meet the same
        # positions in all sequences.
        part = torch.arange(most, device=rows.device)
        start = part * count // most
        size = (part + 1) * count // most - start
        return rows[start + (part * _GOLDEN % 2**32 * size >> 32)]

    def _moments_of(self, name: str, like: Tensor | None = None) -> Moments:
        if name not in self.moments:
            # One step, not two: replicas of nn.DataParallel run in several threads.
            self.moments.setdefault(name, self._new_moments(name, like))
        return self.moments[name]

    def _new_moments(self, name: str, like: Tensor | None = None) -> Moments:
        module = self.modules[name][0]
        device = _weight(module).device if like is None else like.device
        dtype = _dtype(module)
        d_in, d_out = _sizes(module)
        return Moments(
            torch.zeros(d_in, d_in, dtype=dtype, device=device) if self.inputs else None,
            torch.zeros(d_out, d_out, dtype=dtype, device=device) if self.outputs else None,
            *(torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)),
        )

    def _make_partial(self) -> None:
        """Let one process alone keep the sums that all hold: then adding up the processes is right, to the bit."""
        if self._equal and _world_size(self._group) > 1 and dist.get_rank(self._group) != 0:
            for one in self.moments.values():
                for tensor in one.tensors.values():
                    tensor.zero_()
        self._equal = False


def can_be_observed(module: nn.Module) -> bool:
    """Return whether A and G of a module can be gathered: it is called, and its output is x W^T + b of its input.

    These are ``nn.Linear``, transformers' ``Conv1D``, and subclasses with the same forward. Not among them:
    convolutions, fused experts, and the projections of ``nn.MultiheadAttention``, which are never called.
    """
    if is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__}
    return type(module).forward is nn.Linear.forward or bool(bases & _LINEAR_MAPS)


def bytes_needed(module: nn.Module) -> tuple[int, int]:
    """Return the bytes that A and that G of a module take."""
    d_in, d_out = _sizes(module)
    return _dtype(module).itemsize * d_in * d_in, _dtype(module).itemsize * d_out * d_out


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a compiled model where torch cannot run it eagerly for a while, which torch 2.6 and later can.

    Raises:
        ValueError: the model or a part of it is compiled, and torch is too old.
    """
    if hasattr(torch.compiler, "set_stance"):
        return
    for name, module in model.named_modules():
        # A compiled function around the model cannot be seen from here: its weights will have no statistics.
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{repr(name) if name else 'the model'} is compiled, and torch {torch.__version__} cannot run compiled "
                "code eagerly while statistics are gathered; use torch 2.6 or later, or train without torch.compile"
            )


class _Hook:
    """A forward hook of one module. It does not keep the statistics alive; its copies, in copied models, do nothing."""

    def __init__(self, statistics: Statistics, name: str) -> None:
        self._statistics, self._name = weakref.ref(statistics), name

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        statistics = self._statistics()
        if statistics is None:
            return None
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not statistics.outputs:
            count = None if statistics.counting is None else statistics.counting(self._name, x)
            statistics._add(self._name, x if count is None else x[count], None)
        transformed = torch._C._functorch.is_gradtrackingtensor(output) or forward_ad._current_level >= 0
        ordinary = torch.is_grad_enabled() and output.requires_grad and not transformed
        if not (statistics.outputs and ordinary):
            return None
        if not statistics.inputs:
            return _Tap.apply(output, None, self)  # type: ignore[no-untyped-call,unused-ignore]
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            # What the module has made of x is out of reach, and x itself may be changed in place by now.
            x = x if is_sharded(x) else statistics._thin(x)
            x = x.to(torch.get_autocast_dtype(kind))
        return _Tap.apply(output, x, self)  # type: ignore[no-untyped-call,unused-ignore]

    def add(self, x: Tensor | None, gradient: Tensor) -> None:
        """Count a pass that has come back."""
        statistics = self._statistics()
        if statistics is not None and statistics.attached:
            statistics._add(self._name, x, gradient)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    """Stand for the hook in a copy of the model."""

    def __call__(self, *args: Any) -> None: ...


class _Tap(torch.autograd.Function):
    """Returns a tensor as it is, and hands its gradient to a hook on the way back."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor | None, hook: _Hook) -> Tensor:
        ctx.set_materialize_grads(False)
        # The tensor that autograd keeps for the weight's gradient. Saved by autograd's own means, it is not kept but
        # recomputed where activations are checkpointed.
        ctx.save_for_backward(x)
        ctx.hook, ctx.done = hook, False
        # Not a view, because a view that a function returns cannot be changed in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is not None and not ctx.done:
            ctx.hook.add(*ctx.saved_tensors, gradient.detach())
            # With create_graph=True, later passes come for second derivatives.
            ctx.done = torch.is_grad_enabled()
        return gradient, None, None


class _Eager:
    """Makes compiled code run eagerly while anybody needs it, and keeps out of the way of other users of the stance."""

    def __init__(self) -> None:
        self._users = 0
        self._ours: Any = None

    def enter(self) -> None:
        if self._users == 0 and hasattr(torch.compiler, "set_stance"):
            self._ours = torch.compiler.set_stance("force_eager")
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0 and self._ours is not None:
            now = torch.compiler.set_stance("default")
            # Whoever has set another stance since then keeps it.
            (self._ours if now.prev is self._ours.stance else now).__exit__(None, None, None)
            self._ours = None


_EAGER = _Eager()


def _add_products(total: Tensor, rows: Tensor) -> None:
    """Add the sum of r r^T over the rows to the total, in its dtype: autocast leaves products in place alone."""
    rows = rows.to(device=total.device, dtype=total.dtype)
    total.addmm_(rows.T, rows)


def _observable(name: str, modules: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Return the distinct modules of a weight; refuse those that cannot be observed."""
    modules = (modules,) if isinstance(modules, nn.Module) else modules
    if not modules:
        raise ValueError(f"weight {name!r} has no module to gather statistics of")
    for module in modules:
        if not can_be_observed(module):
            raise ValueError(
                f"statistics of {name!r} cannot be gathered: {type(module).__name__} is neither nn.Linear nor "
                "transformers' Conv1D with its own forward; leave it out"
            )
    sizes = {_sizes(module) for module in modules}
    if len(sizes) > 1:
        raise ValueError(f"the modules of weight {name!r} differ in their (inputs, outputs): {sorted(sizes)}")
    return tuple({id(module): module for module in modules}.values())


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and of outputs of a module that can be observed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    d_in, d_out = _weight(module).shape
    return d_in, d_out


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the sums."""
    return torch.float64 if _weight(module).dtype == torch.float64 else torch.float32


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
