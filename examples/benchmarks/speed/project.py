"""The N:M mask and the fused z/u update, against other ways to find the mask.

    python examples/benchmarks/speed/project.py --output docs/results/speed-cpu-project.json

One matrix. The rivals compute a mask and nothing else; ``advance`` computes the mask of w + u, updates z and u and sums
up the residuals, ``advance_mask`` is what the default form does instead. Times are ratios to copying the matrix, in the
same round. All masks are compared on data without ties before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from admm_nxm import Pattern, keep_mask
from admm_nxm.forms import FORMS
from admm_nxm.kernels import available, backend_for
from admm_nxm.masks import PACKED, pack, unpack
from common import Column, Options, Spread, Table, Timings, Variant, count, interleave, main
from masking import Masking, argsorted, by_pattern_matmul, by_sorted_threshold, by_topk, by_torchao, pairwise
from weights import BERT_BASE, DTYPES, tie_free

PATTERNS = ("1:4", "2:4", "2:8", "4:16")
WIDTH = 3072
COPY, COMPILED, ADVANCE = "copy", "pairwise, torch.compile", "advance (z and u)"
RIVALS: dict[str, Callable[[Pattern], Masking | None]] = {
    "topk": by_topk,
    "argsort": argsorted,
    "sort, threshold": by_sorted_threshold,
    "pattern matmul (ASP)": by_pattern_matmul,
    "pairwise, eager": pairwise,
    "torchao PAT": by_torchao,
}
COLUMNS = (
    Column("what", "what", "text"),
    Column("backend", "backend", "text"),
    Column("dtype", "dtype", "text"),
    *(Column(f"over {pattern}", f"{pattern} / copy") for pattern in PATTERNS),
)


def ours(w: Tensor, pattern: Pattern) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """Return (what, backend) -> a call that returns the mask it has found, or, for the updates, their figures."""
    found: dict[tuple[str, str], Callable[[], Tensor]] = {("keep_mask", "eager"): lambda: keep_mask(w, pattern)}
    for name in reversed(available(w.device)):
        kernels = backend_for(w.device, name)
        v = FORMS["proximal"].initial(w, pattern, -1, w.dtype)
        mask = pack(keep_mask(w, pattern))
        for dtype in (w.dtype, PACKED):
            kernels.prepare(w, dtype, pattern)

        def advance(kernels: Any = kernels, v: Tensor = v) -> Tensor:
            figures: Tensor = kernels.advance(w, v, pattern, -1, with_dual=True, dual_scale=1.0)
            return figures

        def advance_mask(kernels: Any = kernels, mask: Tensor = mask) -> Tensor:
            figures: Tensor = kernels.advance_mask(w, mask, pattern, -1, None)
            return figures

        found[ADVANCE, name] = advance
        found["advance_mask (z, packed mask)", name] = advance_mask
    return found


def measure(options: Options, device: torch.device) -> Table:
    """Check all masks, then time them, one pattern and dtype after the other."""
    compiling = not options.tiny if options.compile is None else options.compile
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    seconds: dict[str, Sequence[float | None]] = {}
    notes, compile_seconds = [], []
    for dtype_name in options.dtypes.split(","):
        dtype = DTYPES[dtype_name]
        height = max(16, options.weights // WIDTH)
        w = torch.randn(height, WIDTH, generator=torch.Generator(device).manual_seed(options.seed), device=device)
        w = w.mul_(0.02).to(dtype)
        for spelled in PATTERNS:
            pattern = Pattern.parse(spelled)
            rivals = {name: masking for name, build in RIVALS.items() if (masking := build(pattern)) is not None}
            if compiling:
                compiled, took = compile_pairwise(pattern, w, options.seed)
                if isinstance(compiled, str):
                    notes.append(f"{COMPILED}, {spelled}, {dtype_name}: {compiled}")
                else:
                    rivals[COMPILED] = compiled
                    compile_seconds.append(took)
            check(rivals, pattern, dtype, device, options.seed)
            target = torch.empty_like(w)
            calls: dict[tuple[str, str], Callable[[], object]] = {
                (COPY, ""): partial(target.copy_, w),
                **{(name, "eager"): partial(masking, w) for name, masking in rivals.items()},
                **ours(w, pattern),
            }
            variants = [Variant(" ".join(key), torch.no_grad()(call)) for key, call in calls.items()]
            timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, patience=1.0)
            seconds |= {f"{name}, {spelled}, {dtype_name}": values for name, values in timings.seconds.items()}
            for key in calls:
                row = rows.setdefault(
                    (key[0], key[1], dtype_name), {"what": key[0], "backend": key[1], "dtype": dtype_name}
                )
                row[f"over {spelled}"] = _over_copy(timings, " ".join(key))
            for key in ours(w[:16], pattern):
                row = rows[key[0], key[1], dtype_name]
                best, gain = _gain(timings, rivals, " ".join(key))
                row[f"rival {spelled}"], row[f"gain {spelled}"] = best, gain
                row["default"] = key[1] == available(device)[0]
    if compile_seconds:
        notes.append(
            f"torch.compile took {min(compile_seconds):.1f} to {max(compile_seconds):.1f} s for a pattern and dtype "
            "before its first mask, which is in none of the figures."
        )
    table = [row for key, row in rows.items() if key[0] != COPY]
    return Table(
        f"The N:M mask and the z/u update of one matrix of {height} x {WIDTH} = {height * WIDTH:,} weights",
        COLUMNS,
        sorted(table, key=lambda row: options.dtypes.split(",").index(row["dtype"])),
        [
            *notes,
            *_gains(table),
            "Empty: the pattern has too many masks for a matrix of them, or the rival does not work here.",
            "Median over the rounds, quartiles in brackets.",
        ],
        seconds,
    )


def compile_pairwise(pattern: Pattern, w: Tensor, seed: int) -> tuple[Masking | str, float]:
    """Compile the comparison of pairs for one shape; return it, or why that failed, and the seconds it took."""
    distinct = tie_free(w.shape[0], w.shape[1], pattern.group, w.dtype, w.device, seed)
    torch.compiler.reset()  # or the patterns before would count toward the limit of recompilations
    compiled = torch.compile(pairwise(pattern), dynamic=False)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            mask = compiled(distinct)
    except Exception as error:  # a missing compiler shows in many ways
        return f"not run, {type(error).__name__}: {str(error).strip().splitlines()[0]}", 0.0
    took = time.perf_counter() - begin
    assert torch.equal(mask, keep_mask(distinct, pattern)), f"{COMPILED} disagrees with keep_mask at {pattern}"
    return compiled, took


def _over_copy(timings: Timings, name: str) -> Spread:
    return timings.ratio(name, f"{COPY} ")


def _gain(timings: Timings, rivals: dict[str, Masking], name: str) -> tuple[str, Spread]:
    """Return the fastest rival, and how many times faster than that one we are."""
    best = min(rivals, key=lambda rival: timings.spread(f"{rival} eager").median)
    return best, timings.ratio(f"{best} eager", name)


def _gains(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        if not row["what"].startswith("advance"):
            continue
        parts = [f"{p} {row[f'gain {p}'].median:.3g}x ({row[f'rival {p}']})" for p in PATTERNS if f"gain {p}" in row]
        notes.append(f"{row['what']}, {row['backend']}, {row['dtype']} against the fastest rival: {', '.join(parts)}.")
    return notes


def check(rivals: dict[str, Masking], pattern: Pattern, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Compare all masks, the updates' among them, where no two magnitudes are equal.

    Raises:
        AssertionError: two of them differ.
    """
    w = tie_free(64, 192, pattern.group, dtype, device, seed)
    # By hand: the magnitudes of a group are the numbers from 1 on.
    expected = w.abs() > pattern.group - pattern.keep
    assert torch.equal(keep_mask(w, pattern), expected), "keep_mask is wrong"
    for name, masking in rivals.items():
        if name != COMPILED:  # compiled for another shape, and compared there
            assert torch.equal(masking(w), expected), f"{name} disagrees with keep_mask at {pattern}, {dtype}"
    for backend in available(device):
        kernels = backend_for(device, backend)
        v = FORMS["proximal"].initial(torch.zeros_like(w), pattern, -1, dtype)
        mask = pack(~expected)
        kernels.advance(w, v, pattern, -1, with_dual=True, dual_scale=1.0)
        kernels.advance_mask(w, mask, pattern, -1, None)
        assert torch.equal(keep_mask(v, pattern), expected), f"advance ({backend}) is wrong at {pattern}, {dtype}"
        assert torch.equal(unpack(mask), expected), f"advance_mask ({backend}) is wrong at {pattern}, {dtype}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=count, help=f"how many (default {BERT_BASE:,}), in rows of {WIDTH}")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="which of float32 and bfloat16")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile as well (default: unless --tiny)"
    )


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"weights": (BERT_BASE, 50_000), "rounds": (10, 2)}
    return main("project", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
