"""The time of the solve over all matrices of a model, and its share of a run.

    python examples/benchmarks/speed/solve.py --output docs/results/speed-cuda-solve.json

Weights are random, and A and G are those of random tokens in which directions differ in strength. The blocks of a model
are alike, so one is solved, and its times are multiplied by their number. The run beside it is the least one: products
of the prunable weights alone, forward and backward. What a real run does besides makes the share smaller.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from admm_nxm.solver import INPUT_DAMPING, OUTPUT_DAMPING, Factor, Solved, factorise, solve
from common import BenchmarkError, Column, Options, Spread, Table, count, main, stopwatch


@dataclass(frozen=True)
class Shape:
    """The prunable weights of a model.

    Args:
        title: its name.
        blocks: how many equal ones.
        families: weights of a block that share an input: its features, and the outputs of each weight.
    """

    title: str
    blocks: int
    families: tuple[tuple[int, tuple[int, ...]], ...]


MODELS = {
    "bert-base": Shape("BERT-base", 12, ((768, (768,) * 3), (768, (768,)), (768, (3072,)), (3072, (768,)))),
    "llama-1b": Shape(
        "Llama 3.2 1B", 16, ((2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,)))
    ),
    "tiny": Shape("tiny", 2, ((16, (16, 8)), (16, (32,)))),
}
COLUMNS = (
    Column("model", "model", "text"),
    Column("matrices", "matrices", "text"),
    Column("factorise", "A and G made ready, s"),
    Column("solve", "solves, s"),
    Column("step", "training step at least, s"),
    Column("share", "share of the run at most", "percent"),
)


def measure(options: Options, device: torch.device) -> Table:
    """Solve one block of each model."""
    names = (options.models or ("bert-base,llama-1b" if device.type == "cuda" else "bert-base")).split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise BenchmarkError(f"--models {unknown[0]}: choose from {', '.join(MODELS)}")
    torch.manual_seed(options.seed)
    factorise(moment(64, device), INPUT_DAMPING)  # the libraries of the device are loaded on first use
    rows = [_row(MODELS[name], options, device) for name in names]
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    notes = [
        "Times are of one block, times the number of blocks. Weights that share an input share its factor of A.",
        f"The training step is of the products with these weights alone, forward and backward, in {dtype}.",
        "Median over the rounds, quartiles in brackets.",
    ]
    if device.type == "cuda":
        notes.append(f"Memory at its peak: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB.")
    title = (
        f"The solve over all matrices of a model, 2:4, in a run of {options.steps:,} steps of {options.tokens:,} tokens"
    )
    return Table(title, COLUMNS, rows, notes)


def _row(shape: Shape, options: Options, device: torch.device) -> dict[str, Any]:
    rounds = [block(shape, options.tokens, device) for _ in range(options.rounds)]
    made_ready, solved, step = (Spread(tuple(one[i] for one in rounds)).times(shape.blocks) for i in range(3))
    parts = zip(made_ready.rounds, solved.rounds, step.rounds, strict=True)
    return {
        "model": shape.title,
        "matrices": f"{shape.blocks * sum(len(heights) for _, heights in shape.families)} in {shape.blocks} blocks",
        "factorise": made_ready,
        "solve": solved,
        "step": step,
        "share": Spread(tuple((a + b) / (a + b + options.steps * c) for a, b, c in parts)),
    }


def block(shape: Shape, tokens: int, device: torch.device) -> tuple[float, float, float]:
    """Return the seconds of one block: factorisations, solves, and a training step."""
    made_ready = solved = step = 0.0
    for width, heights in shape.families:
        spent, a = timed(partial(factorise, moment(width, device), INPUT_DAMPING), device)
        made_ready += spent
        for height in heights:
            spent, g = timed(partial(factorise, moment(height, device), OUTPUT_DAMPING), device)
            made_ready += spent
            weight = torch.randn(height, width, device=device) * 0.02
            spent, result = timed(partial(solve, weight, "2:4", a, g), device)
            solved += spent
            check(result)
            step += training_step(weight, tokens, device)
    return made_ready, solved, step


def moment(size: int, device: torch.device) -> Tensor:
    """Return the second moment of random tokens: an eighth of the directions stand out."""
    tokens = torch.randn(2 * size, size, device=device)
    tokens += torch.randn(2 * size, size // 8, device=device) @ torch.randn(size // 8, size, device=device)
    return tokens.T @ tokens


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of one call, and its result."""
    results: list[Factor | Solved] = []
    return stopwatch(lambda: results.append(call()), 1, device), results[0]


def training_step(weight: Tensor, tokens: int, device: torch.device) -> float:
    """Return the seconds of one weight's products in a training step: the output and both gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    w = weight.to(dtype).requires_grad_()
    x = torch.randn(tokens, weight.shape[1], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, weight.shape[0], device=device, dtype=dtype)

    def products() -> None:
        functional.linear(x, w).backward(gradient)  # type: ignore[no-untyped-call,unused-ignore]

    stopwatch(products, 2, device)
    return stopwatch(products, 5, device) / 5


def check(result: Solved) -> None:
    """Count what the solve has returned.

    Raises:
        AssertionError: it is no 2:4 weight, or it loses more than all.
    """
    groups = result.weight.reshape(-1, 4)
    assert bool(((groups != 0).sum(-1) <= 2).all()), "the solve returned more than 2 of 4"
    assert 0 <= result.error < 1, f"the solve loses {result.error:.2f} of all"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", help=f"which of {', '.join(MODELS)} (default bert-base, on CUDA llama-1b too)")
    parser.add_argument("--tokens", type=count, help="of a training step (default 4,096)")
    parser.add_argument("--steps", type=count, default=1000, help="of the run (default 1,000)")


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"models": (None, "tiny"), "tokens": (4096, 32), "rounds": (2, 2)}
    return main("solve", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
