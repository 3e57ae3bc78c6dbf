"""Print the tables of docs/language-models.md: memory and floating-point operations of models of 1B, 7B and 70B.

    python examples/benchmarks/oneshot/sizes.py

Nothing is measured and no weight is made: shapes are from the published configurations, windows from the package.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from admm_nxm.selection import select_weights
from admm_nxm.weights import Weights

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from layout import plain, table

TOKENS = 128 * 2048
ROUNDS, ITERATIONS = 12, 20
"""Rounds of ADMM and iterations of least squares: what SmolLM2's weights take, rounded."""
HALF, SINGLE, EIGEN = 200e12, 15e12, 1e12
"""Operations a second that are assumed of one GPU: bfloat16 and float32 products, and eigendecompositions."""


@dataclass(frozen=True)
class Shape:
    """A Llama.

    Args:
        name: what it is called here.
        hidden: width.
        layers: blocks.
        inner: width within the MLP.
        heads: of queries.
        shared: of keys and values.
        words: tokens known.
        tied: whether the output layer is the embedding.
    """

    name: str
    hidden: int
    layers: int
    inner: int
    heads: int
    shared: int
    words: int
    tied: bool = False


SHAPES = (
    Shape("1B (Llama 3.2)", 2048, 16, 8192, 32, 8, 128256, tied=True),
    Shape("7B (Llama 2)", 4096, 32, 11008, 32, 32, 32000),
    Shape("70B (Llama 3.1)", 8192, 80, 28672, 64, 8, 128256),
)


def weights_of(shape: Shape) -> tuple[int, Weights]:
    """Return the number of parameters and the prunable weights of a model without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.shared,
        tie_word_embeddings=shape.tied,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    selection, params = select_weights(model, "2:4", None, trainable=False)
    return sum(p.numel() for p in model.parameters()), Weights(selection, params, model)


def windows_of(weights: Weights) -> int:
    """Return how many windows ``prune`` takes with a loss, in the memory that it takes by default."""
    return weights.assign_windows(None, block_of=lambda weight: weight.name.rpartition(".layers.")[2].partition(".")[0])


def memory() -> str:
    """Write the table of memory in gigabytes."""
    rows = []
    for shape in SHAPES:
        count, weights = weights_of(shape)
        sizes = [weight.param.shape for weight in weights]
        prunable = sum(m * n for m, n in sizes)
        both = [4 * (m * m + n * n) for m, n in sizes]
        inputs, outputs = (sum(4 * size[place] ** 2 for size in sizes) for place in (1, 0))
        one_block = inputs // shape.layers
        figures = [2 * count, one_block, outputs + one_block, inputs + outputs, 4 * prunable]
        figures += [max(both), 16 * count + prunable]
        cells = [plain(figure / 1e9) for figure in figures]
        rows.append([shape.name, *cells[:5], str(windows_of(weights)), *cells[5:]])
    header = [
        "",
        "weights in bfloat16",
        "A alone",
        "A and G",
        "A and G with `sequential=False`",
        "`statistics_memory` by default",
        "windows",
        "A and G of the largest weight",
        "fine-tuning with AdamW in float32, and masks",
    ]
    return table(header, rows)


def operations() -> str:
    """Write the table of floating-point operations and of the time that they might take."""
    rows = []
    for shape in SHAPES:
        count, weights = weights_of(shape)
        sizes = [weight.param.shape for weight in weights]
        windows = windows_of(weights)
        # Forward 2 and backward 2 a parameter: no gradient of a weight is formed. A takes two forward passes in all.
        passes = 4.0 * count * TOKENS * (windows + 1)
        moments = sum(2.0 * (m * m + n * n) for m, n in sizes) * TOKENS
        solves = sum((4.0 * ROUNDS + 2.0 * ITERATIONS) * m * n * (m + n) for m, n in sizes)
        eigen = sum(10.0 * (m**3 + n**3) for m, n in sizes)
        hours = (passes / HALF + (moments + solves) / SINGLE + eigen / EIGEN) / 3600
        rows.append([shape.name, *(f"{x / 1e15:,.1f}" for x in (passes, moments, solves, eigen)), plain(hours)])
    header = ["", "passes", "A and G", "products of the solve", "eigendecompositions", "hours on one GPU, estimated"]
    return table(header, rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"Memory, in gigabytes (10^9 bytes):\n\n{memory()}\n")
    print(f"Operations, in units of 10^15:\n\n{operations()}")


if __name__ == "__main__":
    main()
