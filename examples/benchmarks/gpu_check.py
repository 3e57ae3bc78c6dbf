"""Check on a GPU all that needs one, in under 8 minutes, and write one JSON file.

    python examples/benchmarks/gpu_check.py --output gpu.json

The parts: the tests marked ``cuda`` (masks, statistics and solve against the CPU; no wait for the device within a step;
autocast, GradScaler, CUDA graphs, semi-structured layers), the time of the solve over a BERT-base and a 1B Llama, the
training step in each phase, and semi-structured layers against dense ones. Each part is a process with a time limit of
its own; one that fails is recorded, and the others go on. ``--device cpu --tiny`` runs the parts that a CPU can do.

The exit status is 0, 1 if a part failed or ran out of time, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent / "speed"))
from common import (
    FOLDER,
    ROOT,
    BenchmarkError,
    commit,
    describe,
    device_of,
    read_record,
    versions,
)

LIMITS = {"tests": 150.0, "solve": 140.0, "train": 110.0, "inference": 70.0}
"""Seconds of each part at most."""

OPTIONS = {"inference": ["--tokens", "1,16,64,256,1024,4096"]}

Found = dict[str, Any]
"""``status``: ``ran``, ``not run``, ``failed`` or ``out of time``; ``reason`` unless it ran; and what was found."""


def command_of(part: str, folder: Path, *, device: str, tiny: bool) -> list[str]:
    """Return the command of a part, which writes its result into the folder."""
    if part == "tests":
        marked = [
            str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")
        ]
        options = ["-m", "cuda", "-q", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={folder / 'tests.xml'}"]
        return [sys.executable, "-m", "pytest", *options, *marked]
    options = ["--tiny"] if tiny else OPTIONS.get(part, [])
    output = str(folder / f"{part}.json")
    return [sys.executable, f"{FOLDER}/{part}.py", *options, "--device", device, "--output", output]


def execute(command: Sequence[str], limit: float, *, hide_gpus: bool) -> tuple[int | None, str]:
    """Run a command in the root of the repository.

    Returns:
        Its exit status, None if it was stopped at the limit; and the end of what it printed.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if hide_gpus else None
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **streams) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            return None, printed[-2000:]
    return process.returncode, printed[-2000:]


def read(part: str, folder: Path) -> Found:
    """Read what a part that ended by itself has written."""
    if part != "tests":
        record = read_record(folder / f"{part}.json")
        return (
            {"status": "ran", "record": record}
            if record["ran"]
            else {"status": "not run", "reason": record["notes"][0]}
        )
    outcomes = {}
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        children = {child.tag: child.get("message", "") for child in case}
        outcome = next((tag for tag in ("failure", "error", "skipped") if tag in children), "passed")
        outcomes[case.get("name", "")] = outcome if outcome == "passed" else f"{outcome}: {children[outcome]}"
    reasons = {text.partition(": ")[2] for text in outcomes.values() if text.startswith("skipped")}
    if reasons and all(text.startswith("skipped") for text in outcomes.values()):
        return {"status": "not run", "reason": "; ".join(sorted(reasons)), "tests": outcomes}
    failed = [name for name, text in outcomes.items() if text.startswith(("failure", "error"))]
    if failed:
        return {"status": "failed", "reason": f"{len(failed)} of {len(outcomes)} tests failed", "tests": outcomes}
    return {"status": "ran", "tests": outcomes}


def run_part(part: str, folder: Path, *, device: str, tiny: bool) -> Found:
    """Run a part, whatever comes of it."""
    begin = time.monotonic()
    command = command_of(part, folder, device=device, tiny=tiny)
    status, printed = execute(command, LIMITS[part], hide_gpus=device == "cpu")
    if status is None:
        found: Found = {"status": "out of time", "reason": f"stopped after {LIMITS[part]:g} s", "printed": printed}
    else:
        try:
            found = read(part, folder)
        except (BenchmarkError, OSError, ElementTree.ParseError):
            found = {"status": "failed", "reason": f"exit status {status}, and no result"}
        if status != 0 and found["status"] in ("ran", "not run"):
            found |= {"status": "failed", "reason": f"exit status {status}"}
        if found["status"] == "failed":
            found["printed"] = printed
    return {"seconds": round(time.monotonic() - begin, 1), **found}


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; the times mean nothing")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART", help="which parts")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), metavar="FILE", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        device = device_of(options.device)
    except BenchmarkError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    found: Found = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "tiny": options.tiny,
        "device": {**describe(device), "cusparselt": torch.backends.cusparselt.version()},
        "versions": versions(),
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for part in options.only:
            one = found["parts"][part] = run_part(part, Path(folder), device=options.device, tiny=options.tiny)
            print(
                f"{part}: {one['status']}, {one['seconds']} s{': ' + one['reason'] if 'reason' in one else ''}",
                flush=True,
            )
            if "printed" in one:
                print(one["printed"])
            found["seconds"] = round(time.monotonic() - begin, 1)
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")
    return int(any(one["status"] in ("failed", "out of time") for one in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(run())
