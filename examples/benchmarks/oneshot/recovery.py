"""Fine-tune SmolLM2 after one-shot pruning, and beside it ADMMNxM's own run from the dense model.

    python examples/benchmarks/oneshot/recovery.py --seeds 0
    python examples/benchmarks/oneshot/oneshot_report.py

One JSON line for each start and seed in docs/results/recovery/; what is there is not done again. The protocol is in
README.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from admm_nxm import ADMMNxM, Pattern
from oneshot import RESULTS, read_lines, source_of
from pruners import METHODS, Clock, prune_with
from subjects import LanguageModel, smollm2

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from records import InputError
from study import append
from tasks import TaskError, default_cache

STARTS = ("admm-ag", "sparsegpt", "admm-a", "wanda", "magnitude", "admm")
"""One-shot methods whose mask is kept; ``admm`` is the run of ADMMNxM from the dense model."""
PATTERN = Pattern(2, 4)
ROWS, TOKENS, LR, WARMUP = 4, 128, 3e-4, 0.1
MEASUREMENTS = 4
"""How often the perplexity is measured, besides at the start."""


def training_rows(subject: LanguageModel, seed: int, count: int) -> list[list[int]]:
    """Return windows of articles that are not held out."""
    source = random.Random(f"recovery {seed}")
    rows = []
    for _ in range(count):
        ids = source.choice(subject.corpus.rest)
        start = source.randint(0, len(ids) - TOKENS)
        rows.append(ids[start : start + TOKENS])
    return rows


def recover(subject: LanguageModel, start: str, seed: int, steps: int) -> dict[str, float]:
    """Train from a start; return step -> perplexity on the held-out articles."""
    subject.restore()
    if start != "admm":
        prune_with(METHODS[start](), subject.task(seed), PATTERN, Clock())
    model: Any = subject.model
    measured = {"0": subject.score()["articles"]}
    rows = training_rows(subject, seed, steps * ROWS)
    model.requires_grad_(True).train()
    inner = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    begins = {"total_steps": steps} if start == "admm" else {"prune_at": 0}
    optimizer = ADMMNxM(inner, model, pattern=PATTERN, **begins)  # type: ignore[arg-type]
    warmup = max(1, round(WARMUP * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    for step in range(1, steps + 1):
        batch = {"input_ids": subject.tensor(rows[(step - 1) * ROWS : step * ROWS])}
        with subject.autocast():
            loss = subject.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == steps:
            optimizer.finalize()
        if step % max(1, steps // MEASUREMENTS) == 0 or step == steps:
            model.eval()
            measured[str(step)] = subject.score()["articles"]
            model.train()
    model.eval().requires_grad_(False)
    return measured


def run(subject: LanguageModel, options: argparse.Namespace) -> None:
    """Do the runs that are not there yet."""
    options.results.mkdir(parents=True, exist_ok=True)
    done = {(line["start"], line["seed"], line["steps"]) for line in read_lines(options.results)}
    for seed in options.seeds:
        for start in options.starts:
            if (start, seed, options.steps) in done:
                continue
            began = time.process_time()
            measured = recover(subject, start, seed, options.steps)
            line = {
                "start": start,
                "seed": seed,
                "steps": options.steps,
                "perplexity": measured,
                "setting": {"rows": ROWS, "tokens": TOKENS, "lr": LR},
                "seconds": time.process_time() - began,
                **source_of(options.device),
            }
            append(options.results / "smollm2.jsonl", line)
            print(f"seed {seed} {start}: {', '.join(f'{k} {v:.1f}' for k, v in measured.items())}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--results", type=Path, default=RESULTS.parent / "recovery")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        run(smollm2(options.cache, options.device), options)
    except (TaskError, InputError) as error:
        print(f"recovery: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
