"""The one-shot methods, on any model whose blocks run one after the other."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admm_nxm import Pattern, factorise, keep_mask, project, solve
from admm_nxm.solver import INPUT_DAMPING, Factor
from admm_nxm.statistics import Statistics

sys.path.append(str(Path(__file__).resolve().parents[1]))
from sparsegpt import sparsegpt

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model to prune, and what to learn about it from.

    Args:
        model: it is called as ``model(**batch)``.
        blocks: its repeated blocks, in the order in which they run; no weight of the model wants a gradient.
        batches: of calibration, without padding.
        loss: of a batch; one number.
        autocast: makes the context that passes run in.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    batches: Sequence[Batch]
    loss: Callable[[Batch], Tensor]
    autocast: Callable[[], Any]

    @property
    def weights(self) -> dict[str, nn.Linear]:
        """The modules whose weights are pruned, by name."""
        return {name: module for block in range(len(self.blocks)) for name, module in self.of_block(block).items()}

    def of_block(self, block: int) -> dict[str, nn.Linear]:
        """Return those of one block."""
        modules = self.blocks[block].named_modules()
        return {f"{block}.{name}": module for name, module in modules if isinstance(module, nn.Linear)}


@dataclass
class Clock:
    """Processor seconds of this process, by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time inside."""
        began = time.process_time()
        yield
        self.seconds[what] += time.process_time() - began


class Method:
    """Prunes one weight; subclasses say what they need to know.

    Args:
        sequential: whether the inputs of a block come from the blocks before it, already pruned.
    """

    inputs = True
    outputs = False

    def __init__(self, *, sequential: bool = True) -> None:
        self.sequential = sequential

    def prune(self, weight: Tensor, pattern: Pattern, a: Tensor, g: Tensor | None) -> Tensor:
        """Return the pruned weight.

        Args:
            weight: (outputs, inputs).
            pattern: the pattern.
            a: the second moment of the inputs, a sum over tokens; empty if not wanted.
            g: that of the gradients, likewise, if wanted.
        """
        raise NotImplementedError


class Magnitude(Method):
    """Keeps the largest weights."""

    inputs = False

    def prune(self, weight: Tensor, pattern: Pattern, a: Tensor, g: Tensor | None) -> Tensor:  # noqa: ARG002
        return project(weight, pattern)


class Wanda(Method):
    """Keeps the largest products of a weight's size and the norm of its input (Sun et al. 2023, equation 1)."""

    def prune(self, weight: Tensor, pattern: Pattern, a: Tensor, g: Tensor | None) -> Tensor:  # noqa: ARG002
        return weight * keep_mask(weight * a.diagonal().sqrt(), pattern)


class SparseGPT(Method):
    """Makes up for each column's error in the columns behind it."""

    def prune(self, weight: Tensor, pattern: Pattern, a: Tensor, g: Tensor | None) -> Tensor:  # noqa: ARG002
        pruned: Tensor = sparsegpt(weight, a, pattern)[0]
        return pruned


class Admm(Method):
    """The package's solver. Weights that share their input share its factorisation."""

    def __init__(self, *, outputs: bool, sequential: bool = True) -> None:
        super().__init__(sequential=sequential)
        self.outputs = outputs
        self._last: tuple[Tensor, Factor] | None = None

    def prune(self, weight: Tensor, pattern: Pattern, a: Tensor, g: Tensor | None) -> Tensor:
        if self._last is None or self._last[0].shape != a.shape or not torch.equal(self._last[0], a):
            self._last = a, factorise(a, INPUT_DAMPING)
        return solve(weight, pattern, self._last[1], g).weight


METHODS: dict[str, Callable[[], Method]] = {
    "magnitude": Magnitude,
    "sparsegpt": SparseGPT,
    "admm-ag": lambda: Admm(outputs=True),
    "admm-ag-dense": lambda: Admm(outputs=True, sequential=False),
    "admm-a": lambda: Admm(outputs=False),
    "admm-a-dense": lambda: Admm(outputs=False, sequential=False),
    "wanda": Wanda,
}
"""In the order in which they are run."""


def prune_with(method: Method, task: Task, pattern: Pattern, clock: Clock) -> None:
    """Prune the weights of a model in place.

    Args:
        method: how.
        task: the model, and the batches to calibrate on.
        pattern: the pattern.
        clock: is told the seconds of "passes" and "solves".
    """
    gradients: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    if method.outputs:
        with clock.on("passes"):
            statistics = whole_passes(task, inputs=not method.sequential, outputs=True)
        gradients = {name: m.outputs for name, m in statistics.moments.items() if m.outputs is not None}
        inputs = inputs_of(statistics)
        del statistics
    elif method.inputs and not method.sequential:
        with clock.on("passes"):
            inputs = inputs_of(whole_passes(task, inputs=True, outputs=False))
    calls: list[Call] = []
    if method.inputs and method.sequential:
        with clock.on("passes"):
            calls = first_calls(task)
    for number, block in enumerate(task.blocks):
        if calls:
            with clock.on("passes"):
                statistics = Statistics(task.of_block(number), outputs=False)
                run_block(block, calls, task, statistics)
            inputs = inputs_of(statistics)
        with clock.on("solves"), torch.no_grad():
            for name, module in task.of_block(number).items():
                a = inputs.pop(name) if method.inputs else torch.empty(0)
                module.weight.copy_(method.prune(module.weight.detach(), pattern, a, gradients.pop(name, None)))
        if calls:
            with clock.on("passes"):
                calls = run_block(block, calls, task)


def inputs_of(statistics: Statistics) -> dict[str, Tensor]:
    """Return A of each weight, as far as it was gathered."""
    return {name: moments.inputs for name, moments in statistics.moments.items() if moments.inputs is not None}


def whole_passes(task: Task, *, inputs: bool, outputs: bool) -> Statistics:
    """Gather A of all weights, or G, or both, in passes through the dense model."""
    statistics = Statistics(task.weights, inputs=inputs, outputs=outputs)
    statistics.attach()
    # Gradients of weights are not wanted, but those at the outputs are, which start here.
    handle = task.blocks[0].register_forward_pre_hook(_ask_for_gradient)
    try:
        for batch in task.batches:
            with torch.set_grad_enabled(outputs), task.autocast():
                loss = task.loss(batch)
            if outputs:
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        handle.remove()
        statistics.detach()
    return statistics


def _ask_for_gradient(_: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled():
        args[0].requires_grad_()


@dataclass(frozen=True)
class Call:
    """What a block is called with: the hidden states, the other positional arguments and the named ones."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class _FirstBlockReached(Exception):  # noqa: N818 - no error
    """Ends a pass before the first block."""


@torch.no_grad()
def first_calls(task: Task) -> list[Call]:
    """Return what the first block is called with, for each batch."""
    calls: list[Call] = []

    def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(Call(args[0], args[1:], named))
        raise _FirstBlockReached

    handle = task.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in task.batches:
            with suppress(_FirstBlockReached), task.autocast():
                task.model(**batch)
    finally:
        handle.remove()
    return calls


@torch.no_grad()
def run_block(block: nn.Module, calls: list[Call], task: Task, statistics: Statistics | None = None) -> list[Call]:
    """Call a block, with statistics of its inputs or without; return what the next block is called with."""
    if statistics is not None:
        statistics.attach()
    try:
        after = []
        for call in calls:
            with task.autocast():
                output = block(call.hidden, *call.rest, **call.named)
            after.append(Call(output[0] if isinstance(output, tuple) else output, call.rest, call.named))
    finally:
        if statistics is not None:
            statistics.detach()
    return after
