"""Run the one-shot study: many runs in one process, resumable, one JSON line each.

    python examples/benchmarks/oneshot/corpus.py
    python examples/benchmarks/oneshot/oneshot.py
    python examples/benchmarks/oneshot/oneshot_report.py

A run that is in the results already is not done again; to redo it, delete its line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from admm_nxm import Pattern, project
from pruners import METHODS, Clock, prune_with
from subjects import SUBJECTS, Subject

sys.path += [str(Path(__file__).resolve().parents[1] / sibling) for sibling in ("accuracy", "solver")]
from records import InputError, lines_of
from speed import peak_of
from study import append, commit_of, device_name, installed
from tasks import TaskError, default_cache

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs" / "results" / "oneshot"
Line = Mapping[str, Any]
KEY = ("model", "pattern", "method", "seed")
SEEDS = range(5)
PATTERNS = ("2:4", "1:4", "4:8")


@dataclass(frozen=True)
class Spec:
    """One run.

    Args:
        model: of SUBJECTS.
        pattern: None for ``dense``.
        method: of METHODS, or ``dense``.
        seed: None for methods that look at no text.
    """

    model: str
    pattern: str | None
    method: str
    seed: int | None


def key_of(line: Line) -> tuple[Any, ...]:
    """Return what tells one run from another."""
    return tuple(line[name] for name in KEY)


def plan() -> Iterator[Spec]:
    """Yield the runs in the order of their use."""
    ours = [name for name in METHODS if not name.endswith("-dense")]
    order = [("smollm2", "2:4", seed, ours) for seed in SEEDS]
    order += [("smollm2", "2:4", seed, [name for name in METHODS if name.endswith("-dense")]) for seed in SEEDS[:2]]
    order += [("minilm", pattern, seed, ours) for pattern in PATTERNS for seed in SEEDS]
    order += [("smollm2", pattern, seed, ours) for seed in SEEDS for pattern in PATTERNS[1:]]
    told: set[Spec] = set()
    for model, pattern, seed, methods in order:
        fixed = [Spec(model, None, "dense", None)]
        specs = [Spec(model, pattern, name, seed if METHODS[name]().inputs else None) for name in methods]
        for spec in fixed + specs:
            if spec not in told:
                told.add(spec)
                yield spec


def read_lines(results: Path) -> list[Line]:
    """Read the raw results that are there; what else is wrong with a line is the report's to say."""
    return [line for _, line in lines_of(sorted(results.glob("*.jsonl")))]


def measure(spec: Spec, subject: Subject) -> dict[str, Any]:
    """Do a run; return its figures."""
    clock, began = Clock(), time.perf_counter()
    grown: int | None = 0
    subject.restore()
    if spec.method != "dense":
        pattern = Pattern.parse(spec.pattern or "")
        method, task = METHODS[spec.method](), subject.task(spec.seed or 0)

        def work() -> None:
            prune_with(method, task, pattern, clock)

        grown = peak_of(work)
        wrong = [n for n, m in task.weights.items() if not torch.equal(m.weight, project(m.weight, pattern))]
        if wrong:
            raise RuntimeError(f"{spec.method} left weights that are not {pattern}: {wrong}")
    wall = time.perf_counter() - began
    return {"scores": subject.score(), "seconds": dict(clock.seconds), "wall": wall, "grown": grown}


def line_of(spec: Spec, figures: Mapping[str, Any], subject: Subject, device: str) -> dict[str, Any]:
    """Return the raw line of a run."""
    return {**asdict(spec), **figures, "sizes": subject.sizes, **source_of(device)}


def source_of(device: str) -> dict[str, Any]:
    """Return where a line comes from."""
    packages = ("torch", "transformers", "admm-nxm", "llmcompressor")
    return {
        "device": device_name(device),
        "date": date.today().isoformat(),
        "commit": commit_of(ROOT, "oneshot"),
        "versions": {name: version(name) for name in packages if installed(name)},
    }


def run(options: argparse.Namespace, load: Callable[[str], Subject]) -> None:
    """Do what is left of the plan, in order."""
    options.results.mkdir(parents=True, exist_ok=True)
    subjects: dict[str, Subject] = {}
    while True:
        done = {key_of(line) for line in read_lines(options.results)}
        left = [spec for spec in plan() if key_of(asdict(spec)) not in done and spec.model in options.models]
        if not left:
            return
        spec = left[0]
        if spec.model not in subjects:
            subjects = {spec.model: load(spec.model)}
        subject = subjects[spec.model]
        line = line_of(spec, measure(spec, subject), subject, options.device)
        append(options.results / f"{spec.model}.jsonl", line)
        scores = ", ".join(f"{name} {value:.2f}" for name, value in line["scores"].items())
        spent = ", ".join(f"{name} {value:.0f} s" for name, value in line["seconds"].items())
        print(f"{len(left) - 1} left  {' '.join(map(str, key_of(line)))}: {scores}; {spent}", flush=True)


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="what corpus.py filled")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--list", action="store_true", help="say what is left to run, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        if options.list:
            done = {key_of(line) for line in read_lines(options.results)}
            print("\n".join(str(spec) for spec in plan() if key_of(asdict(spec)) not in done))
            return 0
        run(options, lambda name: SUBJECTS[name](options.cache, options.device))
    except (TaskError, InputError) as error:
        print(f"oneshot: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
