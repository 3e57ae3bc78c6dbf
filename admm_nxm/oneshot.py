"""Pruning without training: the layer problems are solved from the statistics of some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any, Union

import torch
from torch import Tensor, nn

from .memory import is_plain, offloaded, takes_zeros
from .passes import Blocks, LossOf, Tokens, gather, loss_of, still
from .pattern import Pattern
from .selection import Ineligible, Select, select_weights, unwrap_model
from .sharding import is_sharded
from .solving import solutions
from .sparsity import SparsityReport, check_weights
from .statistics import Moments, refuse_compiled
from .weights import Weight, Weights, not_finite

__all__ = ["Progress", "prune"]

_ONE_WINDOW_UP_TO = 2 * 10**9  # there is no optimizer, and no gradient of a weight, beside the statistics

Progress = Union[bool, Callable[[int, int, str], None]]  # noqa: UP007 - read at run time


def prune(
    model: nn.Module,
    pattern: Pattern | str = "2:4",
    batches: Iterable[Any] | None = None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    select: Select | None = None,
    dims: Mapping[str, int] | None = None,
    ineligible: Ineligible = "error",
    statistics_memory: int | None = None,
    sequential: bool = True,
    progress: Progress | None = None,
) -> SparsityReport:
    r"""Prune a model in place, once and without training.

    Batches give second moments of each layer's inputs (A) and, if there is a loss, of the gradients at its outputs (G).
    The pruned weights lose least in their metric (:func:`admm_nxm.solve`), and those that are kept make up for the
    rest. Without batches the weights of largest magnitude stay as they are.

    The model is passed in evaluation mode, where and in the dtype that it is; statistics and solve are in float32, and
    the result is rounded once. Modes, gradients and ``requires_grad`` are left alone. An error or Ctrl-C leaves the
    weights as they were, bit for bit; for that a copy of them lies in main memory. In several processes, which all have
    to call it, each passes batches of its own.

    Args:
        model: any module.
        pattern: of the default selection rules, such as ``"2:4"``.
        batches: what the model is called with: a mapping gives keyword arguments, a tuple or list positional ones, and
            anything else is the one argument. Tensors are moved to the model. They are all held in memory; some ten
            thousand tokens are enough.
        loss: ``loss(model, batch)`` returns the loss, 0-d. Without it the loss in the model's output counts, as
            transformers' models have it of batches with ``labels``; and where there is none, A alone is gathered.
            Padding does not count where an ``attention_mask`` tells it.
        select: rules that replace the default selection, as for :class:`admm_nxm.ADMMNxM`.
        dims: likewise.
        ineligible: likewise; frozen weights can be pruned.
        statistics_memory: bytes that A and G may take at a time; by default 4 a prunable weight and at least 2 GB.
            With ``sequential`` these are A of one block and G of a whole window. More come in several windows of
            weights, and each takes a pass over the batches; with ``sequential`` over the model as pruned so far, for G
            as well.
        sequential: whether A of each block is that of the model whose earlier blocks are pruned already. It costs
            about two more passes in all, as finished blocks are not computed again where the model allows that, and
            one for weights before or behind the blocks.
        progress: called with the number of weights that are done, of all of them, and what is going on. True shows a
            bar of tqdm.

    Returns:
        The count of every group, with the model error of each weight and the selection.

    Raises:
        TypeError, ValueError: bad input, a weight that is not finite, or one that no batch has reached; the message
            says what to do, and nothing is changed.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> report = prune(model, "2:4", [torch.randn(32, 8)], select={r"0\.weight": "2:4"})
    >>> report.ok, report.sparsity
    (True, 0.5)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is needed")
    if batches is None and loss is not None:
        raise TypeError("a loss needs batches; give both, or neither for pruning by magnitude")
    if isinstance(batches, (str, Mapping, Tensor)):  # which would be taken apart
        raise TypeError(f"batches is a {type(batches).__name__}; a list or a loader of batches is needed, even of one")
    selection, params = select_weights(model, pattern, select, dims=dims, ineligible=ineligible, trainable=False)
    weights = Weights(selection, params, unwrap_model(model))
    for weight in weights:
        weight.param = _with_values(weight, unwrap_model(model))
    names = not_finite(weights.each)
    if names:
        raise ValueError(
            f"{len(names)} of {len(weights)} weights have NaN or infinite entries: {', '.join(names)}; nothing was "
            "changed. Load a sound model, or leave them dense by a select rule"
        )
    with _shown(progress) as show, torch.inference_mode(mode=False), torch.no_grad():
        job = _Job(weights, show)
        try:
            if batches is None:
                job.solve(weights.each, {}, "magnitude")
            else:
                refuse_compiled(model)
                with still(model):
                    _calibrate(job, model, list(batches), loss, statistics_memory, sequential)
            job.write()
        except BaseException:
            job.undo()
            raise
    return check_weights(weights.note_unobserved(selection), lambda name: weights[name].param, job.errors)


class _Job:
    """The weights on their way from dense to pruned."""

    def __init__(self, weights: Weights, show: _Show) -> None:
        self.weights, self._show = weights, show
        self.errors: dict[str, float] = {}
        self._done = 0
        self._solved: list[tuple[Weight, Tensor]] = []
        self._before: list[tuple[Weight, Tensor]] = []

    def show(self, text: str) -> None:
        """Tell how far it is."""
        self._show(self._done, len(self.weights), text)

    def passing(self, text: str, count: int) -> Callable[[int], None]:
        """Return what tells which of so many batches is done."""
        self.show(f"{text}: batch 0 of {count}")
        return lambda number: self.show(f"{text}: batch {number} of {count}")

    def solve(self, weights: Sequence[Weight], moments: Mapping[str, Moments], text: str) -> None:
        """Solve some weights, which stay as they are until :meth:`write`."""
        if weights:
            self.show(f"{text}: solving {weights[0].name}")
        for index, (weight, solved) in enumerate(zip(weights, solutions(weights, moments), strict=True)):
            self._solved.append((weight, solved.weight.cpu()))
            if weight.name in moments:
                self.errors[weight.name] = solved.error
            self._done += 1
            self.show(f"{text}: solving {weights[min(index + 1, len(weights) - 1)].name}")

    def write(self) -> None:
        """Let the model hold what was solved."""
        while self._solved:
            weight, value = self._solved[0]
            self._before.append((weight, weight.w.to("cpu", copy=True)))
            weight.w.copy_(value)
            del self._solved[0]

    def undo(self) -> None:
        """Let the model hold what it held."""
        for weight, value in self._before:
            weight.w.copy_(value)


def _calibrate(
    job: _Job, model: nn.Module, batches: list[Any], loss: LossOf | None, memory: int | None, sequential: bool
) -> None:
    """Gather statistics and solve, window by window."""
    if not batches:
        raise ValueError("batches is empty; give at least one batch, some ten thousand tokens in all")
    if loss is None and loss_of(model, batches[0]) is not None:
        loss = loss_of
    blocks = Blocks(model, batches[0]) if sequential else None
    block_of = None if blocks is None else blocks.block_of
    windows = job.weights.assign_windows(memory, outputs=loss is not None, block_of=block_of, least=_ONE_WINDOW_UP_TO)
    job.solve([weight for weight in job.weights if not weight.modules], {}, "magnitude")
    for window in range(windows):
        weights = [weight for weight in job.weights if weight.window == window]
        text, count = f"window {window + 1} of {windows}", len(batches)
        groups = [("", weights)]
        if blocks is not None:
            groups = [(block, list(group)) for block, group in groupby(weights, blocks.block_of)]
        at_once = blocks is None or (loss is not None and len(groups) == 1)  # then one pass gives A and G
        moments: dict[str, Moments] = {}
        tokens = Tokens()
        if loss is not None or at_once:
            moments = gather(model, weights, batches, loss, tokens, job.passing(text, count), inputs=at_once)
            _check_usable(weights, moments)
        for block, group in groups:
            if blocks is not None and not at_once:
                show = job.passing(f"{text}, {block.rstrip('.') or 'the rest'}", count)
                _add_inputs(moments, group, blocks.gather(block, group, batches, tokens, show))
            job.solve(group, {weight.name: moments.pop(weight.name) for weight in group}, text)
            if blocks is not None:
                job.write()


def _add_inputs(moments: dict[str, Moments], weights: Sequence[Weight], inputs: Mapping[str, Moments]) -> None:
    """Add A to what was gathered of some weights. The caller keeps none of it, so that it goes with the solve."""
    _check_usable(weights, inputs)
    for name, seen in inputs.items():
        moments[name] = replace(seen, outputs=moments[name].outputs) if name in moments else seen


def _check_usable(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> None:
    for weight in weights:
        seen = moments.get(weight.name)
        if seen is not None and 2 * int(seen.dropped) > int(seen.passes):
            raise ValueError(
                f"weight {weight.name!r} has no usable statistics: {int(seen.dropped)} of {int(seen.passes)} passes "
                "through its module had infinite or NaN values. Nothing was changed; correct the batches, or load the "
                "model in bfloat16 or float32 instead of float16"
            )
        if seen is None or int(seen.tokens) == 0:
            raise ValueError(
                f"weight {weight.name!r} has no statistics: no token of the batches has reached its module, with a "
                "gradient where there is a loss. Nothing was changed; give more or other batches (an expert needs "
                "tokens that are routed to it), or leave it dense by a select rule"
            )


def _with_values(weight: Weight, model: nn.Module) -> Tensor:
    """Return the tensor that holds the values of a weight, which accelerate may have offloaded; refuse one into which
    nothing can be written."""
    param = weight.param
    if is_sharded(param):
        raise ValueError(
            f"weight {weight.name!r} is sharded ({tuple(param.placements)}); prune the model before it is sharded, or "
            'spread it over the devices with device_map="auto" (accelerate)'
        )
    if param.is_meta:
        path, _, key = weight.name.rpartition(".")
        found = offloaded(model.get_submodule(path), key)
        if found is None:
            raise ValueError(
                f"weight {weight.name!r} has no values in memory: it is offloaded to the disk (device_map of "
                "accelerate), or not loaded. Load the model with more memory for 'cpu' (max_memory), in bfloat16 if "
                "memory is short"
            )
        return found
    if not is_plain(param) and not takes_zeros(param):
        raise ValueError(
            f"weight {weight.name!r} is a {type(param).__name__}, into which zeros cannot be written; prune the model "
            "before it is converted to that"
        )
    return param


_Show = Callable[[int, int, str], None]


def _nothing(done: int, total: int, text: str) -> None: ...


@contextmanager
def _shown(progress: Progress | None) -> Iterator[_Show]:
    """Yield what shows the progress."""
    if callable(progress):
        yield progress
    elif not progress:
        yield _nothing
    else:
        try:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("progress=True needs tqdm; pip install tqdm, or pass a function") from None
        with tqdm(unit="weight") as bar:

            def show(done: int, total: int, text: str) -> None:
                bar.total, bar.n = total, done
                bar.set_description(text)

            yield show
