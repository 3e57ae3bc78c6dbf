"""What ADMM adds to a step against the number of weights, and against the number of processes they are sharded over.

    python examples/benchmarks/speed/scaling.py --output docs/results/speed-cpu-scaling.json

Against weights: the passes of the default form and its z-step on float32 matrices, and the straight line through the
origin that fits their times best. Against processes: FSDP2 shards one set of matrices, and each process times whole
steps of ADMMNxM and of AdamW alone on its part. On CUDA every process has a device of its own and nccl; on a CPU it has
one thread and gloo, and what is timed is the processor time that it takes, so that processes which outnumber the cores
do not wait for each other within the figure. No step communicates, which is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Curvature, Pattern, keep_mask
from admm_nxm.forms import FORMS
from admm_nxm.kernels import available, backend_for
from admm_nxm.masks import PACKED, pack
from common import (
    BenchmarkError,
    Column,
    Options,
    Spread,
    Table,
    Variant,
    cores,
    count,
    counts,
    interleave,
    main,
    stopwatch,
)
from contestants import INTERVAL, RHO

WIDTH = 4096
PATTERN = Pattern(2, 4)
BYTES = 4 + 4 + 4 + 0.125
"""Of a weight here: itself, its second moment, what it is copied to, its mask."""

SIZES = [1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000]
MOST_ON_CPU = 300_000_000
PARTS = {"passes": "added passes", "update": "z-step"}
COLUMNS = (
    Column("what", "what", "text"),
    Column("backend", "backend", "text"),
    Column("weights", "weights", "text"),
    Column("processes", "processes", "text"),
    Column("relative", "relative time"),
    Column("line", "off the line", "percent"),
    Column("over_copy", "/ copy"),
    Column("over_step", "/ AdamW's step"),
)


# ------------------------------------------------------------------------------------------------ against weights


class Sized:
    """The default form's state for a number of weights, cut out of buffers that all sizes share."""

    def __init__(self, buffers: dict[str, Tensor], weights: int, backend: Any) -> None:
        rows = max(1, weights // WIDTH)
        self.weights = rows * WIDTH
        self.kernels = backend_for(buffers["w"].device, backend)
        # Matrices of at most 16 M weights, as models have them.
        parts = {name: torch.split(buffer[:rows], 4096) for name, buffer in buffers.items()}
        self.w, self.h, self.target, self.masks = (parts[name] for name in ("w", "h", "target", "mask"))
        self.form = FORMS["lazy"]
        self.kernels.prepare(self.w[0], PACKED, PATTERN)

    def passes(self) -> None:
        self.form.before(self.kernels, self.w, self.w, self.masks, RHO, False)
        self.form.after(self.kernels, self.w, self.masks, RHO)
        self.form.show(self.kernels, self.w, self.masks, RHO)

    def update(self) -> None:
        curvature = Curvature()
        for w, h, mask in zip(self.w, self.h, self.masks, strict=True):
            factor = curvature({"exp_avg_sq": h}, w.shape)
            self.form.advance(self.kernels, w, mask, PATTERN, -1, factor, with_dual=False, dual_scale=1.0)

    def copy(self) -> None:
        for target, w in zip(self.target, self.w, strict=True):
            target.copy_(w)


def buffers_of(weights: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Return weights, second moments, a target to copy to, and packed masks."""
    rows = max(1, weights // WIDTH)
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.empty(rows, WIDTH, device=device).normal_(0.0, 0.02, generator=generator)
    h = torch.empty_like(w).uniform_(1e-8, 1e-6, generator=generator)
    masks = torch.cat([pack(keep_mask(part, PATTERN)) for part in torch.split(w, 4096)])
    return {"w": w, "h": h, "target": torch.empty_like(w), "mask": masks}


def that_fit(sizes: Sequence[int], device: torch.device) -> list[int]:
    """Return the sizes that leave half of the memory free."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * 2**30
    return [size for size in sizes if BYTES * size <= free / 2]


def against_weights(
    options: Options, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Sequence[float | None]]]:
    """Time every size in every backend, side by side."""
    sizes = that_fit(sorted(options.sizes), device)
    if not sizes:
        raise BenchmarkError("there is not memory enough for any of --sizes; give smaller ones")
    buffers = buffers_of(max(sizes), device, options.seed)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Sequence[float | None]] = {}
    for backend in reversed(available(device)):
        cases = [Sized(buffers, size, backend) for size in sizes]
        variants = [
            Variant(f"{part} {case.weights}", torch.no_grad()(getattr(case, part)))
            for case in cases
            for part in (*PARTS, "copy")
        ]
        timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, patience=4.0)
        seconds |= {f"{backend}, {name}": values for name, values in timings.seconds.items()}
        for part, name in PARTS.items():
            medians = {case.weights: timings.spread(f"{part} {case.weights}").median for case in cases}
            slope, residual = line_through_origin(list(medians), list(medians.values()))
            for case in cases:
                mine = f"{part} {case.weights}"
                rows.append(
                    {
                        "what": name,
                        "backend": backend,
                        "weights": f"{case.weights:,}",
                        "relative": timings.ratio(mine, f"{part} {cases[-1].weights}"),
                        "line": timings.spread(mine).median / (slope * case.weights) - 1,
                        "over_copy": timings.ratio(mine, f"copy {case.weights}"),
                        "residual": residual,
                        "slope": slope,
                    }
                )
    return rows, seconds


def line_through_origin(numbers: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Fit ``time = slope * number`` by least squares.

    Returns:
        The slope, and the norm of what is left as a share of the norm of the times.
    """
    slope = sum(n * t for n, t in zip(numbers, times, strict=True)) / sum(n * n for n in numbers)
    left = sum((t - slope * n) ** 2 for n, t in zip(numbers, times, strict=True))
    return slope, (left / sum(t * t for t in times)) ** 0.5


# ---------------------------------------------------------------------------------------------- against processes


def against_processes(
    options: Options, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Sequence[float | None]], list[str]]:
    """Start each number of processes in turn and gather what they found."""
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Sequence[float | None]] = {}
    notes: list[str] = []
    alone: Spread | None = None
    for world in options.ranks:
        if device.type == "cuda" and world > torch.cuda.device_count():
            notes.append(f"{world} processes: not run, there are {torch.cuda.device_count()} CUDA devices.")
            continue
        if device.type == "cpu" and world > cores():
            notes.append(f"{world} processes share {cores()} cores, and each its caches with others.")
        found = launch(world, options, device)
        added = [Spread(tuple(a - b for a, b in zip(one["admm"], one["adamw"], strict=True))) for one in found]
        slowest = max(added, key=lambda one: one.median)
        base = Spread(tuple(found[added.index(slowest)]["adamw"]))
        alone = alone or slowest
        ratios = zip(slowest.rounds, base.rounds, strict=True)
        rows.append(
            {
                "what": "step() less AdamW's, slowest process",
                "backend": found[0]["backend"],
                "weights": f"{found[0]['weights']:,} each",
                "processes": str(world),
                "relative": slowest.times(1 / alone.median),
                "over_step": Spread(tuple(a / b for a, b in ratios)),
            }
        )
        for rank, one in enumerate(found):
            seconds |= {f"{world} processes, rank {rank}, {name}": one[name] for name in ("admm", "adamw")}
    return rows, seconds, notes


def launch(world: int, options: Options, device: torch.device) -> list[dict[str, Any]]:
    """Run this script once a rank and read what each has written."""
    with tempfile.TemporaryDirectory() as folder:
        threads = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}
        job = {
            "world": world,
            "folder": folder,
            "device": device.type,
            "weights": options.rank_weights,
            "rounds": options.rounds,
            "seed": options.seed,
        }
        started = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps({**job, "rank": rank})],
                env={**os.environ, **threads},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            ends = [one.communicate(timeout=1800)[1] for one in started]
        finally:
            for one in started:
                one.kill()
                one.wait()
        for rank, (one, errors) in enumerate(zip(started, ends, strict=True)):
            if one.returncode:
                last = errors.strip().splitlines()[-1:] or ["no message"]
                raise BenchmarkError(f"rank {rank} of {world} ended with status {one.returncode}: {last[0]}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def work(job: dict[str, Any]) -> None:
    """Time one rank's steps."""
    from torch.distributed import FileStore  # type: ignore[attr-defined,unused-ignore]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    try:
        from torch.distributed.fsdp import fully_shard  # type: ignore[attr-defined,unused-ignore]
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard  # type: ignore[attr-defined,unused-ignore]

    rank, world, folder = job["rank"], job["world"], Path(job["folder"])
    on_cuda = job["device"] == "cuda"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
    )
    try:
        torch.manual_seed(job["seed"])
        hidden = max(64, round((job["weights"] / 8) ** 0.5 / 64) * 64)

        def sharded() -> nn.Module:
            layers = [nn.Linear(hidden, hidden, bias=False, device=device) for _ in range(8)]
            model = nn.Sequential(*layers)
            mesh = init_device_mesh(job["device"], (world,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            for p in model.parameters():
                p.grad = 1e-3 * p.detach()
            return model

        plain, wrapped = sharded(), sharded()
        adamw = torch.optim.AdamW(plain.parameters(), lr=1e-5, fused=True)
        admm = ADMMNxM(
            torch.optim.AdamW(wrapped.parameters(), lr=1e-5, fused=True),
            wrapped.named_parameters(),
            select=lambda _name, _module: PATTERN,
            rho=RHO,
            update_every=INTERVAL,
        )
        with CommDebugMode() as traffic:  # type: ignore[no-untyped-call,unused-ignore]
            for _ in range(INTERVAL):
                admm.step()
        assert traffic.get_total_counts() == 0, f"{traffic.get_total_counts()} collectives in a step"
        calls = {"adamw": adamw.step, "admm": admm.step}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(job["rounds"] + 1):
            dist.barrier()
            # All ranks in the same order, which changes from round to round.
            for name in sorted(calls, reverse=bool(number % 2)):
                took = _busy_seconds(calls[name], INTERVAL, device) / INTERVAL
                if number:  # the first round warms up
                    seconds[name].append(took)
        own = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in wrapped.parameters()]
        result = {**seconds, "weights": sum(own), "backend": available(device)[0]}
        for name, mask in admm.masks().items():
            part = mask.to_local() if isinstance(mask, DTensor) else mask
            assert bool((part.view(-1, PATTERN.group).sum(-1) == PATTERN.keep).all()), name
        (folder / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _busy_seconds(call: Any, times: int, device: torch.device) -> float:
    """On a CPU the time that this process was at work, whatever else ran meanwhile."""
    if device.type == "cuda":
        return stopwatch(call, times, device)
    begin = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - begin


# ------------------------------------------------------------------------------------------------------ the whole


def measure(options: Options, device: torch.device) -> Table:
    """Do both."""
    if options.sizes is None:
        most = MOST_ON_CPU if device.type == "cpu" else SIZES[-1]
        options.sizes = [50_000, 100_000, 200_000] if options.tiny else [size for size in SIZES if size <= most]
    rows, seconds = against_weights(options, device)
    fits = {(row["what"], row["backend"]): row for row in rows}
    notes = [
        f"{what}, {backend}: {1e9 * row['slope']:.3g} ns a weight; off the line through the origin by "
        f"{100 * row['residual']:.2g} % of the times' norm."
        for (what, backend), row in fits.items()
    ]
    if dist.is_available():
        more, times, remarks = against_processes(options, device)
        rows, seconds, notes = rows + more, {**seconds, **times}, notes + remarks
    return Table(
        f"Cost of the default form against the number of weights and of processes, float32, {PATTERN}",
        COLUMNS,
        rows,
        [
            *notes,
            "Relative time: to that of the most weights, and to that of one process; equal parts would be the ideal.",
            "Off the line: how much longer than the line says. Small sizes fit into caches, which hold large ones not.",
            "Median over the rounds, quartiles in brackets.",
        ],
        seconds,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=counts, metavar="N,N", help="numbers of weights (default 1M to what fits)")
    parser.add_argument("--ranks", type=counts, metavar="N,N", help="numbers of processes (default 1,2,4)")
    parser.add_argument("--rank-weights", type=count, metavar="N", help="weights that processes share (default 64M)")


def run(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--worker"]:
        work(json.loads(words[1]))
        return 0
    sizes = {"rounds": (15, 2), "ranks": ([1, 2, 4], [1, 2]), "rank_weights": (67_108_864, 100_000)}
    return main("scaling", __doc__, measure, words, sizes=sizes, add_options=add_options)


if __name__ == "__main__":
    sys.exit(run())
