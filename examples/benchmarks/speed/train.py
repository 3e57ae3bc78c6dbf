"""The whole training step of a BERT with ADMMNxM's defaults, against the same step with AdamW alone.

    python examples/benchmarks/speed/train.py --output docs/results/speed-cpu-train.json

Forward, backward, ``optimizer.step()`` and ``zero_grad()`` of two equal models, randomly initialised, step by step in
random order, through the dense phase, the calibration, the solve and the frozen phase. A figure is that of ten steps.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM
from common import BenchmarkError, Column, Options, Spread, Table, count, event, main

MODELS = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256},
}
TITLES = {"minilm": "MiniLM-L6 shape", "bert-base": "BERT-base shape", "tiny": "tiny BERT"}
INTERVAL = 10
"""Steps of a block that makes one figure."""

COLUMNS = (
    Column("model", "model", "text"),
    Column("phase", "phase", "text"),
    Column("overhead", "whole step, over AdamW alone", "percent"),
    Column("by_step", "of that in optimizer.step()", "percent"),
    Column("adamw", "AdamW's share of its step", "percent"),
)
WARMUP = 2
ONE_WINDOW = 1 << 40
"""Bytes allowed for the statistics: all weights are calibrated together."""

Parts = tuple[float, float]
"""Seconds of a whole training step, and of ``optimizer.step()`` in it."""


class Trained:
    """A model and its optimizer.

    Args:
        shape: of the model.
        options: of the command.
        device: where it is.
        plan: of ADMMNxM; None for AdamW alone.
    """

    def __init__(
        self, shape: dict[str, int], options: Options, device: torch.device, plan: dict[str, Any] | None
    ) -> None:
        try:
            from transformers import BertConfig, BertForSequenceClassification
        except ImportError as error:
            raise BenchmarkError('transformers is not installed; run: pip install -e ".[hf]"') from error
        torch.manual_seed(options.seed)
        vocabulary = 1000 if options.tiny else 30522
        build: Any = BertConfig  # its arguments are a dataclass's, of which type checkers know one half
        model: nn.Module = BertForSequenceClassification(build(**shape, vocab_size=vocabulary, num_labels=2))
        self.model = model.to(device).train()
        self.optimizer: Optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)
        self.admm: ADMMNxM | None = None
        if plan is not None:
            self.optimizer = self.admm = ADMMNxM(self.optimizer, self.model, pattern="2:4", **plan)
        self.device, self.autocast = device, options.precision == "bfloat16"

    def step(self, ids: Tensor, labels: Tensor, seed: int) -> Parts:
        torch.manual_seed(seed)  # equal dropout in both models
        stamps = [self._stamp()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=ids, labels=labels).loss
        loss.backward()
        stamps.append(self._stamp())
        self.optimizer.step()
        stamps.append(self._stamp())
        self.optimizer.zero_grad()
        stamps.append(self._stamp())
        if self.device.type == "cuda":
            stamps[-1].synchronize()
            return stamps[0].elapsed_time(stamps[3]) / 1e3, stamps[1].elapsed_time(stamps[2]) / 1e3
        return stamps[3] - stamps[0], stamps[2] - stamps[1]

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        return event()


def measure(options: Options, device: torch.device) -> Table:
    """Train pairs of models."""
    if options.precision is None:
        options.precision = "bfloat16" if device.type == "cuda" else "float32"
    names = options.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise BenchmarkError(f"--models {unknown[0]}: choose from {', '.join(MODELS)}")
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Sequence[float | None]] = {}
    notes = []
    for name in names:
        found, times, note = train(name, options, device)
        rows += found
        seconds |= times
        notes.append(note)
    precision = "bfloat16 autocast" if options.precision == "bfloat16" else "float32"
    return Table(
        f"Whole training step with ADMMNxM's defaults over AdamW alone: batches of {options.batch} x {options.length} "
        f"tokens, {precision}, 2:4",
        COLUMNS,
        rows,
        [
            *notes,
            f"A figure is over {INTERVAL} steps. The calibration is as long as the other phases; by default 16 steps.",
            "Median over the rounds, quartiles in brackets.",
        ],
        seconds,
    )


def train(
    name: str, options: Options, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, list[float | None]], str]:
    """Take two models of one shape through all phases, side by side."""
    length = options.rounds * INTERVAL
    prune_at = WARMUP + 2 * length + 2
    plan = {
        "total_steps": prune_at + length + 1,
        "prune_at": prune_at,
        "calibration_steps": length,
        "statistics_memory": ONE_WINDOW,
    }
    pair = {"adamw": Trained(MODELS[name], options, device, None), "admm": Trained(MODELS[name], options, device, plan)}
    admm = pair["admm"].admm
    assert admm is not None
    generator = torch.Generator().manual_seed(options.seed)
    order = random.Random(options.seed)
    vocabulary = 1000 if options.tiny else 30522
    took: dict[str, list[Parts]] = {key: [] for key in pair}
    phases: list[str] = []
    for step in range(1, plan["total_steps"] + 1):
        ids = torch.randint(0, vocabulary, (options.batch, options.length), generator=generator).to(device)
        labels = torch.randint(0, 2, (options.batch,), generator=generator).to(device)
        phase, solved = admm.phase, admm.figures().windows_solved
        if phase == "calibration" and "calibration" not in phases:
            check_alike(pair["adamw"].model, pair["admm"].model)
        for key in order.sample(sorted(pair), len(pair)):
            took[key].append(pair[key].step(ids, labels, step))
        phases.append("solve" if admm.figures().windows_solved > solved else phase)
    assert admm.finalize().ok
    begins = {"dense": WARMUP, "calibration": phases.index("calibration"), "frozen": phases.index("frozen")}
    rows: list[dict[str, Any]] = []
    for phase, begin in begins.items():
        assert phases[begin] == phases[begin + length - INTERVAL] == phase, phases
        rows.append({"model": TITLES[name], "phase": phase, **figures(took, begin, options.rounds)})
    usual = Spread(tuple(whole for whole, _ in took["adamw"])).median
    solve = took["admm"][phases.index("solve")][0]
    note = (
        f"{TITLES[name]}: a training step with AdamW takes {1e3 * usual:.3g} ms; the one step with the solve "
        f"{solve:.3g} s, that is {solve / usual:.3g} of them."
    )
    seconds: dict[str, list[float | None]] = {}
    for key, parts in took.items():
        seconds[f"{name}, {key}, whole step"] = [whole for whole, _ in parts]
        seconds[f"{name}, {key}, optimizer.step()"] = [own for _, own in parts]
    return rows, seconds, note


def figures(took: dict[str, list[Parts]], begin: int, rounds: int) -> dict[str, Spread]:
    """Compare blocks of ten steps, from one step on."""
    overhead, by_step, share = [], [], []
    for first in range(begin, begin + rounds * INTERVAL, INTERVAL):
        block = {key: parts[first : first + INTERVAL] for key, parts in took.items()}
        whole = {key: sum(one for one, _ in parts) for key, parts in block.items()}
        own = {key: sum(one for _, one in parts) for key, parts in block.items()}
        overhead.append(whole["admm"] / whole["adamw"] - 1)
        by_step.append((own["admm"] - own["adamw"]) / whole["adamw"])
        share.append(own["adamw"] / whole["adamw"])
    return {"overhead": Spread(tuple(overhead)), "by_step": Spread(tuple(by_step)), "adamw": Spread(tuple(share))}


def check_alike(plain: nn.Module, wrapped: nn.Module) -> None:
    """Compare the models at the end of the dense phase, in which ADMMNxM is AdamW, bit for bit on a CPU.

    Raises:
        AssertionError: they differ.
    """
    for (name, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        if p.device.type == "cpu":
            assert torch.equal(p, q), f"{name} differs after the dense phase"
        else:  # some backward kernels add up in any order
            assert torch.allclose(p, q, atol=1e-3), f"{name} differs after the dense phase"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", help=f"which of {', '.join(MODELS)} (default minilm,bert-base)")
    parser.add_argument("--batch", type=count, help="texts in a batch (default 8)")
    parser.add_argument("--length", type=count, help="tokens of each (default 128)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="bfloat16 is autocast (default on CUDA, not on a CPU)"
    )


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {
        "models": ("minilm,bert-base", "tiny"),
        "batch": (8, 2),
        "length": (128, 16),
        "rounds": (5, 2),
    }
    return main("train", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
