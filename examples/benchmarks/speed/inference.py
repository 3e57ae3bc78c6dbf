"""Dense against 2:4 sparse matrix products on sparse tensor cores, for the layers of BERT-base and of a 7B model.

    python examples/benchmarks/speed/inference.py --output docs/results/speed-cuda-inference.json

A layer with a projected weight is swapped by ``to_semi_structured``, which takes cuSPARSELt where it works and else
CUTLASS, and meets activations in bfloat16. Needs CUDA and compute capability 8.0 (Ampere) or higher; elsewhere it says
so, writes that down, and is done.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from admm_nxm import project
from admm_nxm.export import to_semi_structured
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
    Column("backend", "backend", "text"),
    Column("tokens", "tokens", "text"),
    Column("speedup", "dense time / sparse time", "factor"),
    Column("graph", "the same in a graph", "factor"),
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
    notes = [
        f"Outputs agree to {TOLERANCE:.0%} of their norm. In a graph: captured in a CUDA graph, without Python's part.",
        "Neither: 1 lies between the quartiles. Median over the rounds, quartiles in brackets.",
    ]
    torch.manual_seed(options.seed)
    with torch.inference_mode():
        for what in TINY if options.tiny else SHAPES:
            height, width = SHAPES[what]
            dense = nn.Linear(width, height, bias=False, device=device, dtype=torch.bfloat16).eval()
            dense.weight.copy_(project(dense.weight, "2:4"))
            sparse = copy.deepcopy(dense)
            (converted,) = to_semi_structured(sparse).converted
            for tokens in options.tokens:
                x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
                check(dense(x), sparse(x), f"{what}, {tokens} tokens")
                calls: dict[str, Callable[[], object]] = {"dense": partial(dense, x), "sparse": partial(sparse, x)}
                try:
                    calls |= {f"{name}, in a graph": captured(call) for name, call in calls.items()}
                except RuntimeError as error:
                    notes.append(f"{what}, {tokens} tokens: no graph could be captured ({str(error).splitlines()[0]}).")
                variants = [Variant(name, call) for name, call in calls.items()]
                timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, warmup=5)
                gain = timings.ratio("dense", "sparse")
                in_graph = timings.ratio("dense, in a graph", "sparse, in a graph") if len(calls) == 4 else None
                judged = in_graph or gain
                rows.append(
                    {
                        "what": what,
                        "shape": f"{height} x {width}",
                        "backend": converted.backend,
                        "tokens": f"{tokens:,}",
                        "speedup": gain,
                        "graph": in_graph,
                        "verdict": "faster" if judged.low > 1 else "slower" if judged.high < 1 else "neither",
                    }
                )
                seconds |= {f"{what}, {tokens} tokens, {name}": times for name, times in timings.seconds.items()}
    return Table(TITLE, COLUMNS, rows, notes, seconds)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Return a function that repeats a call from a CUDA graph."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
