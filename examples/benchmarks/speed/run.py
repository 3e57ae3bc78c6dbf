"""Run every speed benchmark on one device, each in a process of its own, then write the report.

    python examples/benchmarks/speed/run.py

Writes docs/results/speed-DEVICE-BENCHMARK.json and docs/performance.md. The exit status is 0, 1 if a benchmark failed,
or 2 on bad input.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import BENCHMARKS, FOLDER, ROOT, BenchmarkError, count, device_of


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default cuda where there is one")
    parser.add_argument("--threads", type=count, help="torch's threads on a CPU")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME", help="which")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes; needs --results")
    parser.add_argument("--results", type=Path, help="folder of the raw records (by default docs/results)")
    options = parser.parse_args(arguments)
    if options.tiny and options.results is None:
        print("run: error: --tiny needs --results: its figures must not replace real ones", file=sys.stderr)
        return 2
    try:
        device = device_of(options.device)
    except BenchmarkError as error:
        print(f"run: error: {error}", file=sys.stderr)
        return 2
    results = (options.results or ROOT / "docs" / "results").resolve()
    common = ["--tiny"] if options.tiny else []
    common += ["--device", options.device] if options.device else []
    common += ["--threads", str(options.threads)] if options.threads else []
    failed = []
    for name in options.only:
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        output = results / f"speed-{device.type}-{name}.json"
        command = [sys.executable, f"{FOLDER}/{name}.py", *common, "--output", str(output)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - begin:.0f} s\n", flush=True)
    page = ["--output", str(results / "performance.md")] if options.results else []
    command = [sys.executable, f"{FOLDER}/speed_report.py", "--results", str(results), *page]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        failed.append("speed_report")
    if failed:
        print(f"run: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run())
