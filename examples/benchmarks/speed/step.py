"""What ADMM adds to an optimizer step, against the fused AdamW inside and against other ways to do it.

    python examples/benchmarks/speed/step.py --output docs/results/speed-cpu-step.json

Each contestant has matrices of BERT's shapes, their gradients and a fused AdamW of its own. Timed are the passes that
it adds to a step, its z/u update, and whole steps, all as ratios to AdamW's step in the same round; "of copy speed" is
the bytes that a pass must touch at least, over its time, as a share of what copying the weights reaches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from admm_nxm import Pattern, keep_mask
from admm_nxm.kernels import available
from common import Column, Options, Spread, Table, Timings, Variant, count, interleave, main
from contestants import INTERVAL, RIVALS, Contestant, FormCase, Ours, Plain, TwoBuffers, form_cases
from weights import BERT_BASE, DTYPES, Weights, shapes_of

COLUMNS = (
    Column("what", "what", "text"),
    Column("backend", "backend", "text"),
    Column("passes", "added passes / AdamW"),
    Column("passes_bytes", "bytes a weight"),
    Column("passes_share", "of copy speed", "percent"),
    Column("update", "z/u update, once / AdamW"),
    Column("update_bytes", "bytes a weight"),
    Column("update_share", "of copy speed", "percent"),
    Column("amortised", f"z/u a step, every {INTERVAL} / AdamW"),
    Column("step", "whole step / AdamW"),
)
COPY, BASE = "copy of the weights", "AdamW (fused)"


def contestants(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, pattern: Pattern, seed: int
) -> list[Contestant]:
    """Build everything that is compared, plain AdamW first."""

    def fresh() -> Weights:
        return Weights(shapes, dtype, device, seed)

    ours: list[Contestant] = [
        Ours(fresh(), pattern, case, backend) for case in form_cases(dtype) for backend in reversed(available(device))
    ]
    rivals: list[Contestant] = [rival(fresh(), pattern) for rival in RIVALS]
    return [Plain(fresh()), Plain(fresh(), "AdamW again"), *ours, *rivals]


def name_of(contestant: Contestant, part: str) -> str:
    return f"{contestant.name}, {contestant.backend}, {part}" if contestant.backend else f"{contestant.name}, {part}"


def variants_of(contestant: Contestant) -> list[Variant]:
    """Return what is timed of one contestant, whole steps as runs that have one z/u update each."""

    def run() -> None:
        for _ in range(INTERVAL):
            contestant.step()

    slow = contestant.passes is None and not isinstance(contestant, Plain)
    found = [Variant(name_of(contestant, "step"), contestant.step if slow else run, 1 if slow else INTERVAL)]
    if contestant.passes is not None:
        found.append(Variant(name_of(contestant, "passes"), contestant.passes))
    if contestant.update is not None:
        found.append(Variant(name_of(contestant, "update"), contestant.update))
    return [Variant(one.name, _without_gradients(one.call), one.units) for one in found]


def _without_gradients(call: Any) -> Any:
    return torch.no_grad()(call)


def measure(options: Options, device: torch.device) -> Table:
    """Time everything side by side."""
    dtype, pattern = DTYPES[options.dtype], Pattern.parse(options.pattern)
    check(dtype, device, pattern, options.seed)
    every = contestants(shapes_of(options.weights), dtype, device, pattern, options.seed)
    values = every[0].weights.values
    copies = [torch.empty_like(w) for w in values]

    def copy() -> None:
        for target, source in zip(copies, values, strict=True):
            target.copy_(source)

    variants = [Variant(COPY, copy), *(variant for one in every for variant in variants_of(one))]
    timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, patience=1.0)
    for one in every:
        check_pattern(one, pattern)
    weights = every[0].weights.count
    step, moved = timings.spread(name_of(every[0], "step")).median, 2 * values[0].element_size() * weights
    copied = moved / timings.spread(COPY).median
    return Table(
        f"ADMM overhead per optimizer step: {weights:,} weights of BERT's shapes, {options.dtype}, {pattern}",
        COLUMNS,
        [_row(one, every[0], timings) for one in every],
        [
            f"AdamW's fused step: {1e3 * step:.3g} ms. Copying the weights: {copied / 1e9:.3g} GB/s, read and written.",
            "Added passes: what a step has beside AdamW's own; of torchao PAT, the whole step less AdamW's.",
            "Bytes: what must be read and written if it is done in one go, whatever the implementation does.",
            f"Whole step: the mean over {INTERVAL} steps with one z/u update among them.",
            'Median over the rounds, quartiles in brackets. "AdamW again" shows what chance does.',
        ],
        timings.seconds,
    )


def _row(one: Contestant, plain: Contestant, timings: Timings) -> dict[str, Any]:
    base = name_of(plain, "step")
    whole = timings.ratio(name_of(one, "step"), base)
    row: dict[str, Any] = {"what": one.name, "backend": one.backend, "step": 1.0 if one is plain else whole}
    size = one.weights.params[0].element_size()
    for part, bytes_moved in zip(("passes", "update"), one.traffic, strict=True):
        if getattr(one, part) is None:
            continue
        name = name_of(one, part)
        row[part] = timings.ratio(name, base)
        row[f"{part}_share"] = timings.ratio(COPY, name).times(bytes_moved / (2 * size))
        row[f"{part}_bytes"] = bytes_moved
    # What users get who leave backend out; the targets are held against it.
    row["default"] = isinstance(one, Ours) and one.backend == available(one.weights.params[0].device)[0]
    if "update" in row:
        row["amortised"] = row["update"].times(1 / INTERVAL)
    if one.passes is None and not isinstance(one, Plain):
        row["passes"] = Spread(tuple(ratio - 1 for ratio in whole.rounds))
    return row


# ---------------------------------------------------------------------------------------------------- correctness


def check(dtype: torch.dtype, device: torch.device, pattern: Pattern, seed: int) -> None:
    """Hold every backend to the eager one, and the gradient form to the two buffers, on a few weights.

    Raises:
        AssertionError: they disagree.
    """
    shapes = [(64, 256), (48, 128)]
    for case in form_cases(dtype):
        results = {}
        for backend in available(device):
            one = Ours(Weights(shapes, dtype, device, seed), pattern, case, backend)
            with torch.no_grad():
                for call in (one.passes, one.update, one.passes):
                    if call is not None:
                        call()
            results[backend] = [*one.weights.values, *one.weights.gradients, *one.states]
        for backend, tensors in results.items():
            for mine, eager in zip(tensors, results["eager"], strict=True):
                _agree(mine, eager, f"{case.name}: {backend} and eager disagree")
    ours = Ours(Weights(shapes, dtype, device, seed), pattern, FormCase("gradient", {"penalty": "gradient"}))
    naive = TwoBuffers(Weights(shapes, dtype, device, seed), pattern)
    with torch.no_grad():
        assert ours.update is not None
        ours.update()
        z = [ours.optimizer.auxiliary(name) for name in ours.weights.named]
        u = [ours.optimizer.dual(name) for name in ours.weights.named]
        for mine, theirs in (
            (ours.weights.values, naive.w),
            (ours.weights.gradients, naive.g),
            (z, naive.z),
            (u, naive.u),
        ):
            for source, target in zip(mine, theirs, strict=True):
                target.copy_(source)
        ours.passes()
        naive.passes()
    for source, target in zip(ours.weights.gradients, naive.g, strict=True):
        _agree(source, target, "the gradient form and the two buffers disagree")


def _agree(mine: Tensor, other: Tensor, what: str) -> None:
    short = mine.dtype == torch.bfloat16
    assert torch.allclose(mine.float(), other.float(), rtol=2e-2 if short else 1e-5, atol=1e-4 if short else 1e-7), what


def check_pattern(one: Contestant, pattern: Pattern) -> None:
    """Count the masks that a contestant ends with."""
    if isinstance(one, Ours):
        masks = list(one.optimizer.masks().values())
        if one.frozen:
            kept = zip(one.weights.values, masks, strict=True)
            assert all(bool((w[~mask] == 0).all()) for w, mask in kept), one.name
    elif isinstance(one, Plain):
        return
    elif one.name == "torchao PAT":
        masks = [keep_mask(w, pattern) for w in one.weights.values]
        pairs = zip(one.weights.values, masks, strict=True)
        assert all(bool((w[~mask] == 0).all()) for w, mask in pairs), one.name
    else:
        masks = getattr(one, "masks", [])
    for mask in masks:
        counts = mask.view(-1, pattern.group).sum(-1)
        assert bool((counts == pattern.keep).all()), f"{one.name}: a group does not keep {pattern.keep}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=count, help=f"how many (default {BERT_BASE:,}: four layers of BERT-base)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of weights and gradients")
    parser.add_argument("--pattern", default="2:4", help="of all weights")


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"weights": (BERT_BASE, 200_000), "rounds": (30, 2)}
    return main("step", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
