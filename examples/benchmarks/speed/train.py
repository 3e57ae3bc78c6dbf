"""The whole training step of a BERT with ADMMNxM's defaults, against the same step with AdamW alone.

    python examples/benchmarks/speed/train.py --output docs/results/speed-cpu-train.json

Forward, backward, ``optimizer.step()`` and ``zero_grad()`` of two equal models, randomly initialised, step by step in
random order. ADMMNxM goes through its phases, with the default schedule in a shorter form: rho rises from 0.03 to 1000,
z moves every ten steps. A figure is that of ten steps, one z-step among them in the constrained phase.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Ramp
from common import BenchmarkError, Column, Options, Spread, Table, count, event, main
from contestants import INTERVAL

MODELS = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256},
}
TITLES = {"minilm": "MiniLM-L6 shape", "bert-base": "BERT-base shape", "tiny": "tiny BERT"}
SHARES = {"dense": 0.05, "constrained": 0.85, "frozen": 0.10}
"""Of a run with the default plan."""

COLUMNS = (
    Column("model", "model", "text"),
    Column("phase", "phase", "text"),
    Column("overhead", "whole step, over AdamW alone", "percent"),
    Column("by_step", "of that in optimizer.step()", "percent"),
    Column("adamw", "AdamW's share of its step", "percent"),
)
WARMUP = 2
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
            f"A figure is over {INTERVAL} steps. Whole run: the phases at the default plan's shares, 5, 85 and 10 %.",
            "Median over the rounds, quartiles in brackets.",
        ],
        seconds,
    )


def train(
    name: str, options: Options, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, list[float | None]], str]:
    """Take two models of one shape through all phases, side by side."""
    length = options.rounds * INTERVAL
    start = WARMUP + length + 1
    freeze_at = start + length + 1
    plan = {
        # What the default plan comes to in a run of this length; it would have a dense start of two or three steps.
        "rho": Ramp(0.03, 1000.0, start=start, stop=max(start, freeze_at - 1 - INTERVAL)),
        "update_every": Every(INTERVAL, start=start, dual_start=None),
        "freeze_at": freeze_at,
    }
    pair = {"adamw": Trained(MODELS[name], options, device, None), "admm": Trained(MODELS[name], options, device, plan)}
    admm = pair["admm"].admm
    assert admm is not None
    generator = torch.Generator().manual_seed(options.seed)
    order = random.Random(options.seed)
    vocabulary = 1000 if options.tiny else 30522
    took: dict[str, list[Parts]] = {key: [] for key in pair}
    for step in range(1, freeze_at + length + 1):
        ids = torch.randint(0, vocabulary, (options.batch, options.length), generator=generator).to(device)
        labels = torch.randint(0, 2, (options.batch,), generator=generator).to(device)
        for key in order.sample(sorted(pair), len(pair)):
            took[key].append(pair[key].step(ids, labels, step))
        if step == start - 1:
            check_alike(pair["adamw"].model, pair["admm"].model)
        assert admm.phase == _phase(step, start, freeze_at), f"{admm.phase} after step {step}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so short a run need not have arrived
        assert admm.finalize().ok
    begins = {"dense": WARMUP, "constrained": start, "frozen": freeze_at}
    found = {phase: figures(took, begin, options.rounds) for phase, begin in begins.items()}
    found["whole run"] = {
        key: Spread(
            tuple(
                sum(share * found[phase][key].rounds[number] for phase, share in SHARES.items())
                for number in range(options.rounds)
            )
        )
        for key in ("overhead", "by_step", "adamw")
    }
    rows: list[dict[str, Any]] = [
        {"model": TITLES[name], "phase": phase, **spreads} for phase, spreads in found.items()
    ]
    usual = Spread(tuple(whole for whole, _ in took["adamw"])).median
    freezing = took["admm"][freeze_at - 1][0] / usual - 1
    note = (
        f"{TITLES[name]}: a training step with AdamW takes {1e3 * usual:.3g} ms; the one step that freezes the mask "
        f"{100 * freezing:+.1f} %."
    )
    seconds: dict[str, list[float | None]] = {}
    for key, parts in took.items():
        seconds[f"{name}, {key}, whole step"] = [whole for whole, _ in parts]
        seconds[f"{name}, {key}, optimizer.step()"] = [own for _, own in parts]
    return rows, seconds, note


def _phase(step: int, start: int, freeze_at: int) -> str:
    return "dense" if step < start else "constrained" if step < freeze_at else "frozen"


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
