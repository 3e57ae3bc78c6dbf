"""Run the accuracy study: many runs, resumable, one JSON line each.

    python examples/benchmarks/accuracy/prepare.py
    python examples/benchmarks/accuracy/study.py --plan cpu --stage tune final
    python examples/benchmarks/accuracy/report.py

A run that is in the results already is not done again; to redo it, delete its line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import plans
import records
import training
from tasks import TaskError, default_cache, load_task, model_folder

ROOT = Path(__file__).resolve().parents[3]


def commit_of(root: Path) -> str:
    """Return the commit of a checkout, with ``-dirty`` if the package or the study was changed since."""
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        watched = ["admm_nxm", "examples/benchmarks/accuracy"]
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", *watched],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed.strip() else "")


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


def read_lines(results: Path) -> list[Mapping[str, Any]]:
    """Read the raw results that are there; traces apart."""
    files, _ = records.find_files(results)
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what :meth:`training.Spec.key` returns for the run of this line."""
    setting = json.dumps(line["setting"])
    return tuple(
        setting if name == "setting" else line[name]
        for name in ("task", "model", "pattern", "method", "seed", "lr", "steps", "setting", "stage")
    )


def start_worker(threads: int) -> None:
    """Prepare a worker process."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def work(spec: training.Spec, cache: Path, device: str) -> dict[str, Any]:
    """Do one run in a worker."""
    return training.train(spec, cache, device)[1]


def append(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a file and make sure that it is on disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def pending(plan: plans.Plan, stage: str, results: Path, running: set[tuple[Any, ...]]) -> Iterator[training.Spec]:
    """Yield the runs of a stage that are neither done nor running; tuning makes more as its results come in."""
    lines = read_lines(results)
    seen = {key_of(line) for line in lines} | running
    for spec in plans.STAGES[stage](plan, lines):
        if spec.key() not in seen:
            seen.add(spec.key())
            yield spec


def run_stage(name: str, stage: str, options: argparse.Namespace, executor: ProcessPoolExecutor) -> None:
    """Run what a stage lacks, telling how far it is."""
    plan, results = plans.PLANS[name], options.results
    provenance = (device_name(options.device), commit_of(ROOT))
    versions = {
        package: version(package) for package in ("torch", "transformers", "torchao", "admm-nxm") if installed(package)
    }
    began, done = time.monotonic(), 0
    running: dict[Future[dict[str, Any]], training.Spec] = {}
    while True:
        waiting = list(pending(plan, stage, results, {spec.key() for spec in running.values()}))
        while waiting and len(running) < options.workers:
            spec = waiting.pop(0)
            running[executor.submit(work, spec, options.cache, options.device)] = spec
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            spec = running.pop(future)
            measured = future.result()
            line = training.line_of(spec, measured, *provenance, versions)
            append(results / f"{name}-{stage}.jsonl", line)
            if measured["trace"]["step"] and stage == "final":
                kept = {key: line[key] for key in ("task", "model", "pattern", "method", "seed", "lr", "steps")}
                append(results / f"{records.TRACES}{name}.jsonl", {**kept, "trace": measured["trace"]})
            done += 1
            left = (time.monotonic() - began) / done * (len(waiting) + len(running))
            score = "" if line["test"] is None else f" test {line['test']:.1f}"
            print(
                f"{stage} {done}, {len(waiting) + len(running)} to go, {left / 60:.0f} min: {spec.task} {spec.method} "
                f"{spec.pattern or ''} seed {spec.seed} lr {spec.lr:g} {spec.setting} dev {line['dev']:.1f}{score} "
                f"({line['seconds']:.0f} s)",
                flush=True,
            )


def main() -> int:
    """Run the stages asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=sorted(plans.PLANS), default="cpu")
    parser.add_argument("--stage", nargs="+", choices=list(plans.STAGES), default=["tune", "final"])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what prepare.py filled")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one run at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    options = parser.parse_args()
    if options.workers < 1 or options.threads < 1:
        parser.error("--workers and --threads must be at least 1")
    try:
        return run(options)
    except TaskError as error:
        print(error, file=sys.stderr)
        return 2
    except plans.NotTunedError as error:
        print(error, file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """Run the stages asked for, after a look at whether what they need is there."""
    model_folder(options.cache)
    for task in plans.PLANS[options.plan].tasks:
        load_task(task, options.cache)
    options.results.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker, (options.threads,)) as executor:
        for stage in options.stage:
            run_stage(options.plan, stage, options, executor)
    return 0


if __name__ == "__main__":
    sys.exit(main())
