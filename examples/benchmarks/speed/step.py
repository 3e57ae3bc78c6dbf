"""What a step of ADMMNxM costs, against the fused AdamW inside and against other ways to do it.

    python examples/benchmarks/speed/step.py --output docs/results/speed-cpu-step.json

Each contestant has matrices of BERT's shapes, their gradients and a fused AdamW of its own. Timed are whole steps, as
ratios to AdamW's step in the same round; beside them is what is stored for each weight. The calibration needs a model
that computes, and is in ``train.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from admm_nxm import Pattern, keep_mask
from common import Column, Options, Table, Timings, Variant, count, interleave, main
from contestants import INTERVAL, RIVALS, Contestant, Plain, TwoBuffers, bytes_per_weight, ours, papers_form
from weights import BERT_BASE, DTYPES, Weights, shapes_of

COLUMNS = (
    Column("what", "what", "text"),
    Column("step", "whole step / AdamW"),
    Column("state", "state, bytes a weight"),
)
SLOW = ("torchao PAT",)
"""Timed a step at a time, which is slow enough; all others in runs of ``INTERVAL`` steps."""


def measure(options: Options, device: torch.device) -> Table:
    """Time everything side by side."""
    dtype, pattern = DTYPES[options.dtype], Pattern.parse(options.pattern)
    check(device, pattern, options.seed)
    fresh = partial(Weights, shapes_of(options.weights), dtype, device, options.seed)
    plain = Plain(fresh())
    rivals: list[Contestant] = [rival(fresh(), pattern) for rival in RIVALS]
    every: list[Contestant] = [plain, Plain(fresh(), "AdamW again"), *ours(fresh, pattern), *rivals]
    timings = interleave(
        [variant_of(one) for one in every], rounds=options.rounds, device=device, seed=options.seed, patience=1.0
    )
    for one in every:
        check_pattern(one, pattern)
    return Table(
        f"A whole optimizer step: {plain.weights.count:,} weights of BERT's shapes, {options.dtype}, {pattern}",
        COLUMNS,
        [_row(one, plain, timings) for one in every],
        [
            f"AdamW's fused step: {1e3 * timings.spread(plain.name).median:.3g} ms.",
            f"A whole step is the mean over {INTERVAL} steps, with one z/u update among them where there is any.",
            "State is beside AdamW's own.",
            'Median over the rounds, quartiles in brackets. "AdamW again" shows what chance does.',
        ],
        timings.seconds,
    )


def variant_of(contestant: Contestant) -> Variant:
    """Return what is timed of one contestant."""

    def run() -> None:
        for _ in range(INTERVAL):
            contestant.step()

    slow = contestant.name in SLOW
    return Variant(contestant.name, contestant.step if slow else run, 1 if slow else INTERVAL)


def _row(one: Contestant, plain: Plain, timings: Timings) -> dict[str, Any]:
    ratio = 1.0 if one is plain else timings.ratio(one.name, plain.name)
    return {"what": one.name, "step": ratio, "state": bytes_per_weight(one.state(), one.weights.count)}


# ---------------------------------------------------------------------------------------------------- correctness


def check(device: torch.device, pattern: Pattern, seed: int) -> None:
    """Hold the paper's form to the two buffers over some steps, on a few float32 weights.

    Raises:
        AssertionError: they disagree.
    """
    shapes = [(64, 256), (48, 128)]
    mine = papers_form(Weights(shapes, torch.float32, device, seed), pattern)
    naive = TwoBuffers(Weights(shapes, torch.float32, device, seed), pattern)
    given = [g.clone() for g in naive.weights.gradients]
    for _ in range(2 * INTERVAL + 3):
        for one in (mine, naive):
            for g, value in zip(one.weights.gradients, given, strict=True):
                g.copy_(value)
            one.step()
    for w, other in zip(mine.weights.values, naive.weights.values, strict=True):
        assert torch.allclose(w, other, rtol=1e-4, atol=1e-6), "the paper's form and the two buffers disagree"


def check_pattern(one: Contestant, pattern: Pattern) -> None:
    """Count what a contestant ends with, where it is to be sparse by then.

    Raises:
        AssertionError: a group has too many weights that are not zero.
    """
    if one.name in ("frozen phase", "ASP-style mask", "torchao PAT"):
        for w in one.weights.values:
            assert bool((w[~keep_mask(w, pattern)] == 0).all()), f"{one.name}: a group has more than {pattern.keep}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=count, help=f"how many (default {BERT_BASE:,}: four layers of BERT-base)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of weights and gradients")
    parser.add_argument("--pattern", default="2:4", help="of all weights")


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"weights": (BERT_BASE, 200_000), "rounds": (30, 2)}
    return main("step", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
