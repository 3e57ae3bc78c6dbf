"""Line 11 of the contract, and averages, on two ranks (gloo). The checks are in the modules beside this one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# One launch serves all tests: they stay in one process of pytest-xdist.
pytestmark = pytest.mark.xdist_group("two ranks")

HERE = Path(__file__).parent
NEEDS = {"sharded": (), "averaged": ("accelerate",), "accelerated": ("accelerate", "transformers")}
"""Module -> the packages without which it is left out."""
MODULES = [
    module for module, needs in NEEDS.items() if all(importlib.util.find_spec(package) is not None for package in needs)
]
CHECKS = {
    name: module
    for module in NEEDS
    for name in re.findall(
        r"^def ((?:check|second|third)_\w+)", (HERE / f"{module}.py").read_text(encoding="utf-8"), re.M
    )
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """Name of a check -> rank -> what it said."""
    folder = tmp_path_factory.mktemp("two-ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.pair", str(folder), *MODULES],
        cwd=HERE.parents[1],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found: dict[str, dict[int, str]] = {"launch": {0: f"exit {done.returncode}\n{done.stderr[-3000:]}"}}
    for file in folder.glob("said-*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            found.setdefault(line["check"], {})[line["rank"]] = line["said"]
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_c11_two_ranks(name: str, said: dict[str, dict[int, str]]) -> None:
    if CHECKS[name] not in MODULES:
        pytest.skip(f"needs {' and '.join(NEEDS[CHECKS[name]])}")
    results = said.get(name)
    assert results is not None, f"did not run, because one before it failed: {said['launch'][0]}"
    assert set(results.values()) == {"ok"}, "\n".join(results.values())
    assert len(results) == (1 if name.startswith("second") else 2)
