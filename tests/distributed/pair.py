"""Two processes on gloo that run checks, one after the other.

To import everything takes longer than most checks: one process does that, and forks the ranks.

Usage: ``python -m tests.distributed.pair FOLDER MODULE...``. Of each module the functions ``check_*`` run on two ranks,
then ``second_*`` in one process, then ``third_*`` on two ranks again. Each rank writes one line of JSON for each.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

WORLD = 2
STAGES = {"check": WORLD, "second": 1, "third": WORLD}


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def alike_on_all_ranks(value: Any) -> None:
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, value)
    assert repr(everyone[0]) == repr(everyone[1]), everyone


def checks_of(modules: list[str]) -> dict[str, dict[str, Callable[[Path], None]]]:
    """The checks of each stage, by name, in the order in which they stand."""
    found = [vars(importlib.import_module(f"tests.distributed.{module}")) for module in modules]
    return {
        stage: {name: f for names in found for name, f in names.items() if name.startswith(f"{stage}_") and callable(f)}
        for stage in STAGES
    }


def run(folder: Path, rank: int, checks: dict[str, Callable[[Path], None]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name, check in checks.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        began = time.process_time()
        try:
            check(own)
            said = "ok"
        except BaseException:
            said = traceback.format_exc()
        line = {"check": name, "rank": rank, "said": said, "seconds": time.process_time() - began}
        with (folder / f"said-{rank}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if said != "ok":
            os._exit(1)  # the other rank would wait for ever
        if world > 1:
            dist.barrier()
    # Not through the interpreter's end: gloo's threads may still be about there, and torch then aborts the process.
    os._exit(0)


def fork(folder: Path, world: int, checks: dict[str, Callable[[Path], None]]) -> bool:
    """Run checks on so many ranks; return whether all went well."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            setting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ.update({key: str(value) for key, value in setting.items()})
            os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
            run(folder, rank, checks)
        ranks.append(pid)
    well = True
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        well = well and status == 0
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return well


if __name__ == "__main__":
    stages = checks_of(sys.argv[2:])
    all(fork(Path(sys.argv[1]), STAGES[stage], checks) for stage, checks in stages.items())
