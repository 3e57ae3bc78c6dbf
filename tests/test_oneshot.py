"""Pruning without training: against plain loops, at its limits, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import admm_nxm.oneshot
from admm_nxm import prune, solve
from admm_nxm.solver import Solved, model_error
from admm_nxm.solving import solutions
from admm_nxm.statistics import Moments
from admm_nxm.weights import Weight

from .cores import WEIGHTS
from .helpers import Net, batches, make_net, same_bits

DOUBLE = torch.float64
BATCHES = list(batches(6, dtype=DOUBLE))


def labelled(net: nn.Module, x: Tensor) -> Tensor:
    """In the dtype of the weights, so that a plain loop comes to the same sums."""
    return (net(x) - x.sum(-1, keepdim=True).sin()).square().mean()


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Moments]:
    """Name -> the moments that a weight was solved from."""
    seen: dict[str, Moments] = {}

    def spy(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
        seen.update({weight.name: moments[weight.name] for weight in weights if weight.name in moments})
        return solutions(weights, moments)

    monkeypatch.setattr(admm_nxm.oneshot, "solutions", spy)
    return seen


def in_plain_loops(net: Net, name: str) -> tuple[Tensor, Tensor]:
    """A and G of one weight: every token of every batch on its own, by autograd's own gradients."""
    module: Any = net.get_submodule(name.removesuffix(".weight"))
    a = torch.zeros(module.in_features, module.in_features, dtype=DOUBLE)
    g = torch.zeros(module.out_features, module.out_features, dtype=DOUBLE)
    for batch in BATCHES:
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.extend((args[0].detach(), output))

        handle = module.register_forward_hook(keep)
        value = labelled(net, batch)
        handle.remove()
        value.backward()
        net.zero_grad()
        x, output = kept
        assert output.grad is not None
        for row, gradient in zip(x, output.grad, strict=True):
            a += torch.outer(row, row)
            g += torch.outer(gradient, gradient)
    return a, g


@pytest.mark.parametrize("with_loss", [False, True], ids=["A", "A and G"])
def test_each_weight_is_solved_from_the_moments_of_the_dense_model(
    with_loss: bool, gathered: dict[str, Moments]
) -> None:
    net, dense = make_net(dtype=DOUBLE), make_net(dtype=DOUBLE)
    report = prune(net, "2:4", BATCHES, loss=labelled if with_loss else None, sequential=False)
    assert report.ok
    assert [weight.name for weight in report] == list(WEIGHTS)
    for weight in report:
        found, w = net.get_parameter(weight.name).detach(), dense.get_parameter(weight.name).detach()
        a, g = in_plain_loops(dense, weight.name)
        seen = gathered[weight.name]
        torch.testing.assert_close(seen.inputs, a)
        if with_loss:
            torch.testing.assert_close(seen.outputs, g)
        moments = (a, g if with_loss else None)
        assert same_bits(found, solve(w, "2:4", seen.inputs, seen.outputs).weight)
        assert report.model_errors[weight.name] == pytest.approx(model_error(w, found, *moments))
    assert same_bits(net.head.weight, dense.head.weight)


@pytest.mark.parametrize("with_loss", [False, True], ids=["A", "A and G"])
def test_block_by_block_each_sees_the_pruned_ones_before_it(with_loss: bool, gathered: dict[str, Moments]) -> None:
    net, plain = make_net(dtype=DOUBLE), make_net(dtype=DOUBLE)
    prune(net, "2:4", BATCHES, loss=labelled if with_loss else None, sequential=True)
    outputs = {name: in_plain_loops(plain, name)[1] for name in WEIGHTS}
    for block in (WEIGHTS[:2], WEIGHTS[2:]):
        for name in block:
            torch.testing.assert_close(gathered[name].inputs, in_plain_loops(plain, name)[0])
            if with_loss:
                torch.testing.assert_close(gathered[name].outputs, outputs[name])
        for name in block:
            found = solve(plain.get_parameter(name), "2:4", gathered[name].inputs, gathered[name].outputs)
            assert same_bits(net.get_parameter(name).detach(), found.weight)
            plain.get_parameter(name).data.copy_(found.weight)
