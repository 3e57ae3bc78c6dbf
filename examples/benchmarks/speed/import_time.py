"""What `import admm_nxm` costs beside `import torch`, in processes of their own.

    python examples/benchmarks/speed/import_time.py

Prints one table. In every round a process imports torch alone and another torch and then admm_nxm, in turn the one or
the other first. What counts is the time of the second import within its process: the difference between two whole
processes would drown in what torch's own import varies by. Byte code is written first, as an installation does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from common import Spread, count

_PROBE = """
import json, time
seconds = []
for name in {names!r}:
    begin = time.perf_counter()
    __import__(name)
    seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds))
"""
ALONE, WITH = ("torch",), ("torch", "admm_nxm")


def seconds_of(names: Sequence[str]) -> list[float]:
    """Return the seconds that each import takes, one after the other in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE.format(names=tuple(names))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(value) for value in json.loads(done.stdout)]


def measure(rounds: int) -> dict[str, Spread]:
    """Return what is imported -> its seconds in every round; one round more warms the caches up."""
    seconds: dict[str, list[float]] = {"torch": [], "torch, before admm_nxm": [], "admm_nxm, after torch": []}
    for number in range(rounds + 1):
        pair: dict[tuple[str, ...], list[float]] = {}
        for names in (ALONE, WITH) if number % 2 else (WITH, ALONE):
            pair[names] = seconds_of(names)
        if number:
            for key, value in zip(seconds, pair[ALONE] + pair[WITH], strict=True):
                seconds[key].append(value)
    return {key: Spread(tuple(values)) for key, values in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="import_time.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=count, default=15, help="fresh processes of each kind")
    options = parser.parse_args(arguments)
    print(f"| import | median, ms | quartiles, ms | least and most, ms, of {options.rounds} |")
    print("| --- | ---: | ---: | ---: |")
    for name, spread in measure(options.rounds).items():
        ms = spread.times(1000)
        print(
            f"| {name} | {ms.median:.1f} | {ms.low:.1f} to {ms.high:.1f} | "
            f"{min(ms.rounds):.1f} to {max(ms.rounds):.1f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
