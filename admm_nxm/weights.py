"""The prunable weights of a run: one object each, known by its name in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import at_least
from .projection import keep_mask, zero_outside
from .selection import SelectedWeight, Selection, clean_name, is_conv1d
from .sharding import check_sharding, local, reduce_sums, wrap_like
from .statistics import bytes_needed, can_be_observed

__all__ = ["CONSENSUS", "MASK", "Weight", "Weights", "not_finite", "windows_of"]

MASK = "admm_mask"
"""Key of the mask in the inner optimizer's state of a weight: boolean, of the weight's shape, all True before the
weight is pruned."""

CONSENSUS = "admm_consensus"
"""Key of v = z - u, in the paper's form."""

WITHOUT_STATISTICS = "no module hook reaches it: pruned by magnitude"
"""The note in the selection's printout of a weight for which A and G cannot be gathered."""

_ONE_WINDOW_UP_TO = 256 * 10**6

_Link = tuple[dict[str, Any], str, Any]
"""A dictionary of a module, a key in it, and what it held there."""


@dataclass(eq=False)  # one object a weight, told by identity
class Weight:
    """A prunable weight, its present parameter object, and its state.

    Args:
        modules: the modules that compute with it and can be observed; empty if A and G cannot be gathered.
        moment_along_group: which second moment runs along the grouped dimension, that of the inputs as a rule.
        window: number of the window in which it is calibrated and solved; -1 for the first solve that comes.
        maximize: whether the inner optimizer ascends along its gradient.
        copy_flags: key in the inner optimizer's state -> whether it is a second set of this weight, on its device.
        copy_keys: the keys of those; None before the weight is pruned.
    """

    spec: SelectedWeight
    param: Tensor
    modules: tuple[nn.Module, ...] = ()
    moment_along_group: Literal["inputs", "outputs"] = "inputs"
    window: int = 0
    maximize: bool = False
    copy_flags: dict[str, Tensor | bool] = field(default_factory=dict)
    copy_keys: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.spec.name

    @property
    def w(self) -> Tensor:
        """This rank's part of the weight."""
        return local(self.param.detach())

    @property
    def gradient(self) -> Tensor | None:
        """This rank's part of the gradient."""
        return None if self.param.grad is None else local(self.param.grad)

    def stored(self, inner: Optimizer, key: str) -> Tensor | None:
        """Return this rank's part of a state tensor of ours; None before the weight's first step."""
        t = inner.state[self.param].get(key) if self.param in inner.state else None
        return None if t is None else local(t)

    def store(self, inner: Optimizer, key: str, part: Tensor) -> None:
        """Put a state tensor of ours beside the inner optimizer's own."""
        inner.state[self.param][key] = wrap_like(part, self.param)

    def mask(self, inner: Optimizer) -> Tensor:
        """Return this rank's part of the mask of a pruned weight."""
        stored = self.stored(inner, MASK)
        # A weight without a step of its own has not moved since it was pruned.
        return self.mask_in_value() if stored is None else stored

    def mask_in_value(self) -> Tensor:
        """Return this rank's part of the mask that can be read off a pruned weight, its value."""
        return keep_mask(self.w, self.spec.pattern, self.spec.dim)

    def look_for_copies(self, inner: Optimizer) -> None:
        """Note which state tensors are second sets of the weight, as schedule-free optimizers and their kin keep them.

        When such a tensor is created it lies within half the weight's norm of the weight, and momentum does not; later
        neither is sure. Nothing waits for the device.
        """
        w = self.w.float()
        for key, entry in _tensors(inner.state.get(self.param, {})):
            if key in self.copy_flags or key in (MASK, CONSENSUS):
                continue
            t = local(entry)
            if type(t) is Tensor and t.is_floating_point() and t.shape == w.shape and entry is not self.param:
                self.copy_flags[key] = (t.float() - w).norm() < 0.5 * w.norm()

    def copies(self, inner: Optimizer) -> list[Tensor]:
        """Return this rank's part of every second set of the weight; waits for the device the first time."""
        state = inner.state.get(self.param, {})
        if self.copy_keys is None and state:
            self.look_for_copies(inner)  # what was created since the weight's first step
            self.copy_keys = tuple(key for key, flag in self.copy_flags.items() if bool(flag))
        return [local(t) for key, t in _tensors(state) if key in self.copy_keys] if self.copy_keys else []

    def replace_value(self, inner: Optimizer, value: Tensor, mask: Tensor) -> None:
        """Set the weight and its mask; second sets of weights make the same move, and are masked."""
        w = self.w
        for t in self.copies(inner):
            t.add_((value - w).to(t.dtype))
            zero_outside(t, mask)
        w.copy_(value)
        stored = self.stored(inner, MASK)
        if stored is not None:
            stored.copy_(mask)


def _tensors(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walk through the tensors in the state of a parameter; some optimizers nest it."""
    for key, entry in state.items():
        if isinstance(entry, Tensor):
            yield f"{prefix}{key}", entry
        elif isinstance(entry, Mapping):
            yield from _tensors(entry, f"{prefix}{key}.")


class Weights:
    """The prunable weights, found again by name whatever happens to the model.

    Args:
        selection: what is pruned.
        params: name -> parameter.
        model: the module that holds them, without its wrappers; None if only names and tensors are known.
    """

    def __init__(self, selection: Selection, params: Mapping[str, Tensor], model: nn.Module | None) -> None:
        self.model = model
        self.each = [Weight(spec, params[spec.name]) for spec in selection]
        self._links: list[_Link] = []
        if model is not None:
            self._locate()

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, name: str) -> Weight:
        """Return the weight called ``name`` (or one of whose other names it is)."""
        for weight in self.each:
            if weight.spec.name_in((name,)):
                return weight
        raise KeyError(f"{name!r} is not a prunable weight; these are: {', '.join(w.name for w in self.each)}")

    def _locate(self) -> None:
        """Find each weight's parameter in the model by its name, and remember the way there."""
        assert self.model is not None
        found: dict[str, tuple[Tensor, nn.Module, list[_Link]]] = {}
        for name, param, owner, way in _places(self.model, "", []):
            found.setdefault(name, (param, owner, way))
        links: dict[tuple[int, str], _Link] = {}
        for weight in self.each:
            names = (weight.name, *weight.spec.aliases)
            missing = [name for name in names if name not in found]
            if missing:
                raise ValueError(
                    f"weight {missing[0]!r} is no longer in the model: its layer was replaced or removed. Build "
                    "ADMMNxM again around the inner optimizer with the model as it is now"
                )
            if len({id(found[name][0]) for name in names}) > 1:
                raise ValueError(
                    f"weights {' = '.join(names)} were one tensor at construction and are no longer; tie them again, "
                    "or build ADMMNxM again with the model as it is now"
                )
            weight.param = found[weight.name][0]
            observers, along = _observers([found[name][1] for name in names], weight.spec.dim)
            if observers:  # what could be observed and no longer can is noticed at the solve
                weight.modules, weight.moment_along_group = observers, along
            for name in names:
                links.update({(id(d), key): (d, key, value) for d, key, value in found[name][2]})
        self._links = list(links.values())

    def rebind(self, inner: Optimizer) -> None:
        """Look up each weight's parameter as it is now, and check that the inner optimizer still holds it.

        Parameter objects may be exchanged (FSDP2 through Accelerate does it before the first step); what was flattened,
        replaced or taken out of the groups is noticed here.
        """
        if any(d.get(key) is not value for d, key, value in self._links):
            self._locate()
        groups = {id(p): group for group in inner.param_groups for p in group["params"]}
        for weight in self.each:
            group = groups.get(id(weight.param))
            if group is None:
                raise ValueError(
                    f"the inner {type(inner).__name__} no longer holds prunable weight {weight.name!r}: it was taken "
                    "out of param_groups, or the model was given another tensor (load_state_dict with assign=True, a "
                    "replaced layer, sharding after the optimizer was built). Put the model's present parameter back "
                    "into the inner optimizer, or build both optimizers again"
                    + (
                        ""
                        if self.model is not None
                        else "; with names and tensors alone, pass the model itself instead"
                    )
                )
            weight.maximize = bool(group.get("maximize", False))
            if tuple(weight.param.shape) != weight.spec.shape:
                raise ValueError(
                    f"weight {weight.name!r} had shape {weight.spec.shape} at construction and now has "
                    f"{tuple(weight.param.shape)}: it was flattened or partitioned, and its groups are torn apart. "
                    "Shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
                )
            if weight.param.grad is not None and weight.param.grad.layout != torch.strided:
                raise ValueError(
                    f"weight {weight.name!r} has a {weight.param.grad.layout} gradient, to which no mask can be "
                    "applied; let its layer make dense gradients (sparse=False), or leave it dense by a select rule"
                )

    def check_placement(self) -> None:
        """Refuse a weight whose groups lie on several ranks."""
        for weight in self.each:
            check_sharding(weight.name, weight.param, weight.spec.dim, weight.spec.pattern.group)

    def assign_windows(
        self,
        memory: int | None,
        *,
        outputs: bool = True,
        block_of: Callable[[Weight], str] | None = None,
        least: int = _ONE_WINDOW_UP_TO,
    ) -> int:
        """Cut the observed weights into windows whose statistics fit the memory; return how many there are.

        Args:
            memory: bytes; by default 4 a weight, and ``least`` in any case.
            outputs: whether there is G.
            block_of: names the block of a weight, where A is held for one block at a time; None if A of a whole window
                is.
            least: bytes.
        """
        if memory is None:
            memory = max(least, 4 * sum(weight.param.numel() for weight in self.each))
        at_least("statistics_memory", memory, 1)
        observed = [weight for weight in self.each if weight.modules]
        sizes = [bytes_needed(weight.modules[0]) for weight in observed]
        of_outputs = [of_g if outputs else 0 for _, of_g in sizes]
        if block_of is None:
            windows = windows_of([of_a + of_g for (of_a, _), of_g in zip(sizes, of_outputs, strict=True)], memory)
        else:
            brief = [(block_of(weight), of_a) for weight, (of_a, _) in zip(observed, sizes, strict=True)]
            windows = windows_of(of_outputs, memory, brief)
        for weight in self.each:
            weight.window = -1
        for weight, window in zip(observed, windows, strict=True):
            weight.window = window
        return max(windows, default=0) + 1

    def of_window(self, window: int) -> list[Weight]:
        """Return the weights that one window's solve prunes: those that need no statistics come first."""
        return [w for w in self.each if w.window == window or (window == 0 and w.window < 0)]

    def note_unobserved(self, selection: Selection) -> Selection:
        """Return the selection with a note on each weight that is solved without statistics."""
        unobserved = {weight.name for weight in self.each if not weight.modules}
        return replace(
            selection,
            weights=tuple(
                replace(spec, note=WITHOUT_STATISTICS) if spec.name in unobserved else spec
                for spec in selection.weights
            ),
        )


def not_finite(weights: Sequence[Weight]) -> list[str]:
    """Return the names of the weights with NaN or infinite entries, on every rank alike."""
    if not weights:
        return []
    device = weights[0].w.device
    counts = [(~weight.w.isfinite()).sum().reshape(1).to(device) for weight in weights]
    totals = reduce_sums(counts, [weight.param for weight in weights]).flatten().tolist()
    return [weight.name for weight, count in zip(weights, totals, strict=True) if count]


def windows_of(needs: Sequence[int], memory: float, brief: Sequence[tuple[str, int]] = ()) -> list[int]:
    """Cut a sequence of weights into runs whose needs add up to at most ``memory``; one that needs more is alone.

    Args:
        needs: what each weight takes all the time.
        memory: the most that a run may take at a time.
        brief: block and what else each weight takes, while its block is worked on.

    >>> windows_of([3, 3, 3, 9, 1], memory=6)
    [0, 0, 1, 2, 3]
    >>> brief = [("a", 2), ("a", 2), ("b", 2), ("b", 2)]
    >>> windows_of([1, 1, 1, 1], 6, brief), windows_of([0, 0, 0, 0], 4, brief)
    ([0, 0, 1, 1], [0, 0, 0, 0])
    """
    windows: list[int] = []
    current, held, passing = 0, 0, Counter[str]()
    for need, (block, extra) in zip(needs, brief or [("", 0)] * len(needs), strict=True):
        held += need
        passing[block] += extra
        if held + max(passing.values()) > memory and current in windows[-1:]:
            current, held, passing = current + 1, need, Counter({block: extra})
        windows.append(current)
    return windows


def _places(module: nn.Module, prefix: str, links: list[_Link]) -> Iterator[tuple[str, Tensor, nn.Module, list[_Link]]]:
    """Walk through a model: clean name, parameter, owner, and the way to it."""
    for key, param in module._parameters.items():
        if param is not None:
            yield clean_name(prefix + key), param, module, [*links, (module._parameters, key, param)]
    for key, child in module._modules.items():
        if child is not None:
            yield from _places(child, f"{prefix}{key}.", [*links, (module._modules, key, child)])


def _observers(owners: list[nn.Module], dim: int) -> tuple[tuple[nn.Module, ...], Literal["inputs", "outputs"]]:
    """Return the modules whose passes give A and G, and which of the two runs along the grouped dimension."""
    observed = tuple(dict.fromkeys(owner for owner in owners if can_be_observed(owner)))
    if not observed:
        return (), "inputs"
    input_dim = 0 if is_conv1d(observed[0]) else 1
    return observed, "inputs" if dim == input_dim else "outputs"
