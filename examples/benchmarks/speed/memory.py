"""Bytes of state for each prunable weight, and the memory that a step takes for a while beside it.

    python examples/benchmarks/speed/memory.py --output docs/results/speed-cpu-memory.json

State is counted from the tensors that the optimizer holds beside those of AdamW. The peak is what a step has allocated
at most at one moment beyond what was there before: on CUDA by the allocator's own counter, on a CPU from every
allocation and release that the profiler records (not in it: what C code takes for itself, which is a block of fixed
size). Nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from admm_nxm import Pattern
from admm_nxm.kernels import available
from common import Column, Options, Table, count, main
from contestants import RIVALS, FormCase, Ours, Plain, bytes_per_weight, updates_at
from weights import BERT_BASE, DTYPES, Weights, shapes_of

COLUMNS = (
    Column("what", "what", "text"),
    Column("backend", "backend", "text"),
    Column("dtype", "weights", "text"),
    Column("state_dtype", "state", "text"),
    Column("state", "state, bytes a weight"),
    Column("frozen", "once frozen"),
    Column("peak", "peak of a step, bytes a weight"),
    Column("peak_update", "with the z/u update"),
    Column("peak_freeze", "at the freeze"),
    Column("peak_frozen", "once frozen"),
)
LIMIT = {"float32": 4.05, "bfloat16": 2.05}
"""Bytes of state a weight that the default may need at most, and ``MASK`` more where a mask is stored beside it."""
MASK = 0.13


def cases() -> Iterator[tuple[str, FormCase, str]]:
    """Yield every combination of form, dtype of the weights and dtype of the state, with the name of the latter. The
    default comes first; a dtype that it comes to is not repeated."""
    for name, dtype in DTYPES.items():
        for penalty in ("lazy", "proximal", "gradient"):
            default = torch.bool if penalty == "lazy" and dtype == torch.float32 else dtype
            yield name, FormCase(penalty, {"penalty": penalty}), "default"
            for state in (torch.bool, torch.float32, torch.bfloat16):
                if state != default and not (state == torch.bool and penalty != "lazy"):
                    asked = str(state).removeprefix("torch.")
                    yield name, FormCase(penalty, {"penalty": penalty, "state_dtype": state}), asked
            if penalty != "lazy" and dtype == torch.float32:
                options = {"penalty": penalty, "state_dtype": torch.bfloat16, "state_rounding": "stochastic"}
                yield name, FormCase(f"{penalty}, rounded at random", options), "bfloat16"


def measure(options: Options, device: torch.device) -> Table:
    """Count, one contestant after the other."""
    pattern, shapes = Pattern.parse(options.pattern), shapes_of(options.weights)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        plain = Plain(Weights(shapes, DTYPES[dtype], device, options.seed))
        plain.step()
        assert not plain.state(), "AdamW has state that contestants.OWN_KEYS does not know"
        peak = peak_of(plain.step, device) / plain.weights.count
        rows.append({"what": plain.name, "backend": "", "dtype": dtype, "state_dtype": "", "state": 0.0, "peak": peak})
    for dtype, case, asked in cases():
        for backend in reversed(available(device)):
            weights = Weights(shapes, DTYPES[dtype], device, options.seed)
            row = _ours(weights, pattern, case, backend, device)
            rows.append({"what": case.name, "backend": backend, "dtype": dtype, "asked": asked, **row})
    for dtype in DTYPES:
        for build in RIVALS:
            rival = build(Weights(shapes, DTYPES[dtype], device, options.seed), pattern)
            number, kept = rival.weights.count, rival.state()
            row = {"peak": peak_of(rival.step, device) / number}
            if rival.update is not None:
                row["peak_update"] = peak_of(torch.no_grad()(rival.update), device) / number
            names = sorted({str(t.dtype).removeprefix("torch.") for t in kept if t.numel() > 1})
            row |= {"state": bytes_per_weight(kept, number), "state_dtype": ", ".join(names)}
            rows.append({"what": rival.name, "backend": rival.backend, "dtype": dtype, **row})
    check(rows)
    return Table(
        f"Memory of {weights.count:,} prunable weights of BERT's shapes under a fused AdamW, {pattern}",
        COLUMNS,
        rows,
        [
            "State beside AdamW's own. Weights, gradients and AdamW's two moments take four times the weights' size.",
            "A peak is over the whole model: temporaries of one weight at a time count once.",
            "Rivals: the z/u update on its own.",
        ],
    )


def _ours(weights: Weights, pattern: Pattern, case: FormCase, backend: Any, device: torch.device) -> dict[str, Any]:
    """Go through a run of six steps: an ordinary one is the second, z moves after the third, the fifth freezes."""
    dual = case.options["penalty"] != "lazy"
    plan = {"rho": 1e-3, "update_every": updates_at(3, dual=dual), "freeze_at": 5}
    one = Ours(weights, pattern, case, backend, plan)
    number = weights.count
    one.step()
    row: dict[str, Any] = {"state": bytes_per_weight(one.state(), number)}
    row["state_dtype"] = str(one.state()[0].dtype).removeprefix("torch.")
    for step, key in ((2, "peak"), (3, "peak_update"), (4, ""), (5, "peak_freeze"), (6, "peak_frozen")):
        assert one.optimizer.phase == ("frozen" if step > 5 else "constrained")
        peak = peak_of(one.step, device) / number
        if key:
            row[key] = peak
    row["frozen"] = bytes_per_weight(one.state(), number)
    return row


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes more than before a call has allocated at its highest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    level = highest = 0
    # A stable sort keeps the order of events within one tick of the clock.
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        level += int(event["args"]["Bytes"])
        highest = max(highest, level)
    return highest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from announcing itself, which it does past Python's own stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with warnings.catch_warnings(), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            warnings.simplefilter("ignore")
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def limit_of(row: Mapping[str, Any]) -> float:
    """Return how many bytes a weight the default may store for weights of a row's dtype."""
    return LIMIT[row["dtype"]]


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Hold the counts to what the layout says they are.

    Raises:
        AssertionError: they are not.
    """
    for row in rows:
        if "asked" not in row:
            continue
        size = {"float32": 4.0, "bfloat16": 2.0, "uint8": 0.125, "bool": 1.0}[row["state_dtype"]]
        assert abs(row["state"] - size) < 0.01, f"{row['what']}: {row['state']} bytes a weight of {row['state_dtype']}"
        assert row["frozen"] <= 1.0, f"{row['what']}: {row['frozen']} bytes a weight once frozen"
        if row["asked"] == "default":
            assert row["state"] <= limit_of(row) + MASK, row["what"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=count, help=f"how many (default {BERT_BASE:,}: four layers of BERT-base)")
    parser.add_argument("--pattern", default="2:4", help="of all weights")


def run(arguments: Sequence[str] | None = None) -> int:
    sizes = {"weights": (BERT_BASE, 200_000), "rounds": (1, 1)}
    return main("memory", __doc__, measure, arguments, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
