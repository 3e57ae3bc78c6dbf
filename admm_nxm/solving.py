"""The layer problems of several weights: each is solved on one rank, from what was gathered of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .sharding import broadcast, full, rank_and_world
from .solver import INPUT_DAMPING, OUTPUT_DAMPING, Factor, Solved, factorise, model_error, solve
from .statistics import Moments
from .weights import Weight

__all__ = ["solutions"]

_DAMPING = {"inputs": INPUT_DAMPING, "outputs": OUTPUT_DAMPING}


def solutions(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
    """Solve the weights in turn, and yield whole tensors with the model error in the metric without damping.

    In several processes each solves a share, and all get the same bits; all of them have to come to the end.

    Args:
        weights: left as they are.
        moments: name -> what was gathered; a weight without is projected.
    """
    rank, world = rank_and_world()
    shared = _SharedFactors()
    if world == 1:
        for weight in weights:
            seen = moments.get(weight.name)
            # Where the moments are: an offloaded weight lies in main memory.
            whole = full(weight.param.detach()).to(weight.w.device if seen is None else seen.tokens.device)
            yield _solve_one(weight, whole, seen, shared)
        return
    wholes: list[Tensor] = []
    for index, weight in enumerate(weights):
        whole = full(weight.param.detach())  # a collective where the weight is sharded
        wholes.append(whole if index % world == rank else torch.empty_like(whole, device="meta"))
    mine = {
        index: _solve_one(weight, wholes[index], moments.get(weight.name), shared)
        for index, weight in enumerate(weights)
        if index % world == rank
    }
    for index, weight in enumerate(weights):
        yield _shared_result(mine.pop(index, None), weight, wholes[index], index % world)


def _shared_result(mine: Solved | None, weight: Weight, whole: Tensor, source: int) -> Solved:
    device = weight.w.device
    value = torch.empty(whole.shape, dtype=whole.dtype, device=device) if mine is None else mine.weight.contiguous()
    mask = torch.empty(whole.shape, dtype=torch.bool, device=device) if mine is None else mine.mask.contiguous()
    figures = torch.zeros(2, dtype=torch.float64, device=device)
    if mine is not None:
        figures.copy_(torch.tensor([mine.error, mine.rounds]))
    for t in (value, mask, figures):
        broadcast(t, source)
    error, rounds = figures.tolist()
    return Solved(value, mask, error, int(rounds))


class _SharedFactors:
    """The factorisation of the last matrix of each kind: neighbours with the same inputs and live tokens share it."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Tensor, Factor]] = {}

    def of(self, kind: str, moment: Tensor) -> Factor:
        last = self._last.get(kind)
        if last is None or last[0].shape != moment.shape or not torch.equal(last[0], moment):
            last = self._last[kind] = (moment, factorise(moment, _DAMPING[kind]))
        return last[1]


def _solve_one(weight: Weight, whole: Tensor, moments: Moments | None, shared: _SharedFactors) -> Solved:
    spec = weight.spec
    if moments is None:
        return solve(whole, spec.pattern, None, None, dim=spec.dim)
    raw = moments.inputs, moments.outputs
    inputs, outputs = (
        None if moment is None else shared.of(kind, moment) for kind, moment in zip(_DAMPING, raw, strict=True)
    )
    if weight.moment_along_group == "outputs":
        inputs, outputs, raw = outputs, inputs, (raw[1], raw[0])
    solved = solve(whole, spec.pattern, inputs, outputs, dim=spec.dim)
    # The solver has the damped moments alone.
    return replace(solved, error=model_error(whole, solved.weight, *raw, dim=spec.dim))
