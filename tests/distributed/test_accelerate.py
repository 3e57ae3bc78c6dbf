"""Accelerate and Trainer on two ranks (gloo), started by ``accelerate launch``; the checks are in launched.py."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# One launch serves many tests: they stay in one process of pytest-xdist.
pytestmark = pytest.mark.xdist_group("launched")

HERE = Path(__file__).parent
CHECKS = re.findall(r"^def check_(\w+)", (HERE / "launched.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
# Accelerate and Trainer configure themselves once per process: each kind has its own launch.
KINDS = ("ddp", "fsdp2", "trainer_ddp", "trainer_fsdp2")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What has been launched so far: kind -> name of a check -> what it said."""
    return {}


def launch(kind: str, folder: Path) -> dict[str, str]:
    names = [f"check_{name}" for name in CHECKS if name.startswith(f"{kind}_")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", str(free_port()), "-m", "tests.distributed.launched", str(folder)),
            *names,
        ],
        cwd=HERE.parents[1],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said: dict[str, str] = {}
    for file in folder.glob("said-*.jsonl"):
        for one in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            name = one["check"].removeprefix("check_")
            if said.get(name, "ok") == "ok":  # a failure of either rank stays
                said[name] = one["said"]
    if len(list(folder.glob("said-*.jsonl"))) != 2:
        said = {}
    said["launch"] = f"exit {done.returncode}\n{done.stderr[-3000:]}"
    return said


@pytest.mark.parametrize("name", CHECKS)
def test_c11_two_ranks(
    name: str, launched: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = next(kind for kind in KINDS if name.startswith(f"{kind}_"))
    if "fsdp2" in kind and not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("fully_shard is public since torch 2.6")
    if kind not in launched:
        launched[kind] = launch(kind, tmp_path_factory.mktemp(kind))
    said = launched[kind].get(name, f"did not run: {launched[kind]['launch']}")
    assert said == "ok", said
