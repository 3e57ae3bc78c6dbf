"""Dense against 2:4 sparse matrix products on sparse tensor cores, for the layers of BERT-base and of a 7B model.

    python examples/benchmarks/speed/inference.py --output docs/results/speed-cuda-inference.json

A projected weight is compressed by ``torch.sparse.to_sparse_semi_structured`` and multiplied with activations, all in
bfloat16. Needs CUDA and compute capability 8.0 (Ampere) or higher; elsewhere it says so, writes that down, and is done.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from admm_nxm import project
from common import Column, Options, Table, Variant, counts, interleave, main

SHAPES = {
    "BERT-base attention": (768, 768),
    "BERT-base feed-forward, up": (3072, 768),
    "BERT-base feed-forward, down": (768, 3072),
    "7B attention": (4096, 4096),
    "7B feed-forward, up": (11008, 4096),
    "7B feed-forward, down": (4096, 11008),
}
TINY = ("BERT-base attention",)
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
TOLERANCE = 1e-2
"""Of the norm of the output: bfloat16 has 8 bits."""

COLUMNS = (
    Column("what", "weight", "text"),
    Column("shape", "out x in", "text"),
    Column("tokens", "tokens", "text"),
    Column("speedup", "dense time / sparse time", "factor"),
    Column("verdict", "sparse is", "text"),
)
TITLE = "Dense against 2:4 sparse weights in matrix products, bfloat16"


def why_not(device: torch.device) -> str | None:
    """Return why a device cannot do it."""
    if device.type != "cuda":
        return f"Not run: sparse tensor cores are a matter of NVIDIA GPUs, and the device is {device.type}."
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or major < 8:
        return f"Not run: compute capability {major}.{minor}, and sparse tensor cores come with 8.0 (Ampere)."
    return None


def measure(options: Options, device: torch.device) -> Table:
    """Time every shape and number of tokens."""
    reason = why_not(device)
    if reason is not None:
        return Table(TITLE, COLUMNS, [], [reason], ran=False)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Sequence[float | None]] = {}
    kinds = set()
    generator = torch.Generator(device).manual_seed(options.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the feature a beta
        for what in TINY if options.tiny else SHAPES:
            shape = SHAPES[what]
            dense = project(random(*shape) * 0.02, "2:4")
            sparse = torch.sparse.to_sparse_semi_structured(dense)
            kinds.add(type(sparse).__name__)
            for tokens in options.tokens:
                x = random(tokens, shape[1])
                check(functional.linear(x, dense), functional.linear(x, sparse), f"{what}, {tokens} tokens")
                variants = [
                    Variant("dense", partial(functional.linear, x, dense)),
                    Variant("sparse", partial(functional.linear, x, sparse)),
                ]
                timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, warmup=5)
                gain = timings.ratio("dense", "sparse")
                verdict = "faster" if gain.low > 1 else "slower" if gain.high < 1 else "neither"
                size = f"{shape[0]} x {shape[1]}"
                rows.append({"what": what, "shape": size, "tokens": f"{tokens:,}", "speedup": gain, "verdict": verdict})
                seconds |= {f"{what}, {tokens} tokens, {name}": times for name, times in timings.seconds.items()}
    return Table(
        TITLE,
        COLUMNS,
        rows,
        [
            f"Compressed as {', '.join(sorted(kinds))}; outputs agree to {TOLERANCE:.0%} of their norm.",
            "Neither: 1 lies between the quartiles. Median over the rounds, quartiles in brackets.",
        ],
        seconds,
    )


def check(dense: Tensor, sparse: Tensor, what: str) -> None:
    """Compare two outputs.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    difference = (dense.float() - sparse.float()).norm() / dense.float().norm()
    assert float(difference) <= TOLERANCE, f"{what}: sparse and dense outputs differ by {float(difference):.1%}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=counts, metavar="N,N", help="rows of the activations (default 1 to 16,384)")


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"tokens": (TOKENS, [64]), "rounds": (30, 2)}
    return main("inference", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
