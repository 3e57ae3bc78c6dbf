"""Run the accuracy study: many runs, resumable, one JSON line each.

    python examples/benchmarks/accuracy/prepare.py
    python examples/benchmarks/accuracy/study.py --plan full --workers 2
    python examples/benchmarks/accuracy/report.py

A run that is in the results already is not done again; to redo it, delete its line. Each worker has one thread unless
--threads says otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import plans
import records
import training
from bfloat16 import round_products, slow_products
from tasks import TaskError, default_cache, load_task, model_folder

ROOT = Path(__file__).resolve().parents[3]


def commit_of(root: Path, study: str = "accuracy") -> str:
    """Return the commit of a checkout, with ``-dirty`` if the package or the study was changed since."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        watched = ["admm_nxm", f"examples/benchmarks/{study}", "examples/benchmarks/sparsegpt.py"]
        status = [*git, "status", "--porcelain", "--", *watched]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed.strip() else "")


def device_name(device: str) -> str:
    """Return the processor's or the GPU's name."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"cpu, {names[0] if names else 'unknown'}"


def installed(package: str) -> bool:
    """Return whether a package is there."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when the study has ended, even by a signal that reached the study alone."""
    parent.join()
    os._exit(1)


def start_worker(threads: int) -> None:
    """Prepare a worker process."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    if slow_products():
        round_products()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file, whole, and make sure that it is on disk."""
    with file.open("ab") as handle:  # a line is shorter than the buffer, so it is written at once
        handle.write((json.dumps(line) + "\n").encode())
        handle.flush()
        os.fsync(handle.fileno())


def work(specs: list[plans.Spec], name: str, options: argparse.Namespace, provenance: tuple[Any, ...]) -> list[str]:
    """Do runs that begin alike, in a worker; write each line when it is there, and return what to tell of each."""
    layers = specs[0].stage == "layers"
    measured = (
        training.layers_alone(specs[0], options.cache, options.device)
        if layers
        else training.train(specs, options.cache, options.device)
    )
    lines = []
    told = []
    for spec, figures in measured:
        line = training.line_of(spec, figures, *provenance)
        lines.append(line)
        if not layers:  # those of one model are written together, or not at all
            append(options.results / f"{name}-{spec.stage}.jsonl", line)
            score = f"dev {line['dev']:.1f}" if line["test"] is None else f"test {line['test']:.1f}"
            what = f"{spec.stage} {spec.task} {spec.method} {spec.pattern or ''} seed {spec.seed} lr {spec.lr:g}"
            told.append(f"{what} {spec.setting} {score} ({line['seconds']:.0f} s)")
    if layers:
        for line in lines:
            append(options.results / f"{name}-layers.jsonl", line)
        told = [f"layers {specs[0].task} {specs[0].pattern} seed {specs[0].seed}: {len(lines)} weights"]
    return told


def pending(plan: plans.Plan, stage: str, results: Path, running: set[tuple[Any, ...]]) -> Iterator[list[plans.Spec]]:
    """Yield what neither is done nor runs; tuning makes more as its results come in."""
    lines = records.read(results)
    seen = {records.key_of(line) for line in lines} | running
    for specs in plans.STAGES[stage](plan, lines):
        left = [spec for spec in specs if spec_key(spec) not in seen]
        seen |= {spec_key(spec) for spec in left}
        if left:
            yield left


def spec_key(spec: plans.Spec) -> tuple[Any, ...]:
    """Return what tells the line of a run from others, see :func:`records.key_of`."""
    return records.key_of(training.line_of(spec, {}, "", "", {}))


def run_stage(name: str, stage: str, options: argparse.Namespace, executor: ProcessPoolExecutor) -> None:
    """Run what a stage lacks, telling how far it is."""
    plan = plans.PLANS[name]
    packages = {name: version(name) for name in ("torch", "transformers", "torchao", "admm-nxm") if installed(name)}
    rounded = ", products of bfloat16 by way of float32" if options.device == "cpu" and slow_products() else ""
    provenance = (device_name(options.device) + rounded, commit_of(ROOT), packages)
    began, done = time.monotonic(), 0
    running: dict[Future[list[str]], list[plans.Spec]] = {}
    while True:
        keys = {spec_key(spec) for specs in running.values() for spec in specs}
        waiting = list(pending(plan, stage, options.results, keys))
        while waiting and len(running) < options.workers:
            specs = waiting.pop(0)
            running[executor.submit(work, specs, name, options, provenance)] = specs
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            del running[future]
            done += 1
            left = len(waiting) + len(running)
            minutes = (time.monotonic() - began) / done * left / 60
            for told in future.result():
                print(told, flush=True)
            print(f"{stage}: {done} done, {left} known to be left, about {minutes:.0f} min", flush=True)


def main() -> int:
    """Run the stages asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(plans.PLANS), default="cpu")
    parser.add_argument("--stage", nargs="+", choices=list(plans.STAGES), default=["final"])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what prepare.py filled")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one run at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--list", action="store_true", help="say what is left to run, and stop")
    options = parser.parse_args()
    if options.workers < 1 or options.threads < 1:
        parser.error("--workers and --threads must be at least 1")
    try:
        return run(options)
    except (TaskError, records.InputError) as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Run the stages asked for, after a look at whether what they need is there."""
    options.results.mkdir(parents=True, exist_ok=True)
    if options.list:
        for stage in options.stage:
            for specs in pending(plans.PLANS[options.plan], stage, options.results, set()):
                print(f"{stage}: {', '.join(f'{s.method} {s.pattern} {s.setting}' for s in specs)}: {specs[0].trunk}")
        return 0
    model_folder(options.cache)
    for task in plans.PLANS[options.plan].tasks:
        load_task(task, options.cache)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker, (options.threads,)) as executor:
        for stage in options.stage:
            run_stage(options.plan, stage, options, executor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
