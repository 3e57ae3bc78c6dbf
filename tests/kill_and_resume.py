"""Kill a Trainer run again and again, between and during checkpoints, and see that it ends as if nothing had happened.

Run by test_trainer_killed.py in a process of its own: it imports once and forks a child for each life of the run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from tests.test_trainer import trainer

EVERY = 4  # steps between two checkpoints
FINAL = "final.pt"


def live(folder: Path) -> None:
    """Train until the end, from the last complete checkpoint if there is one; what each child does."""
    transformers.utils.logging.set_verbosity_error()
    made = trainer(
        folder, save_strategy="steps", save_steps=EVERY, eval_strategy="steps", eval_steps=2 * EVERY, save_total_limit=3
    )
    made.remove_callback(transformers.PrinterCallback)
    try:
        made.train(resume_from_checkpoint=True)
    except ValueError as error:
        if "no complete checkpoint" not in str(error):
            raise
        made.train()
    assert made.sparsity_report.ok
    weights = {name: p.detach() for name, p in made.model.named_parameters()}
    torch.save(weights, folder / "unfinished")
    (folder / "unfinished").rename(folder / FINAL)


def fork(folder: Path) -> int:
    """Start a life; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        live(folder)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def ended(pid: int) -> int | None:
    """Exit status of a child; None while it lives."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def being_written(folder: Path) -> bool:
    """Whether the newest checkpoint lacks what is written last."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
    return newest is not None and not (newest / "trainer_state.json").exists()


def kill(folder: Path, pid: int, during: bool, wait: float, dice: random.Random) -> bool | None:
    """Kill a life at a random point; return whether that was within a checkpoint, None if it ended before."""
    began, skip = time.monotonic(), dice.randrange(3)
    was_written = False
    while (status := ended(pid)) is None:
        written = being_written(folder)
        if during and written and not was_written:
            if not skip:
                time.sleep(dice.random() * 0.004)
                break
            skip -= 1
        if not during and time.monotonic() - began > wait:
            break
        was_written = written
        time.sleep(0.0002)
    if status is not None:
        if status:
            raise RuntimeError(f"a life ended with status {status}")
        return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return being_written(folder)


def main(root: Path, seed: int, wanted: int) -> None:
    dice = random.Random(seed)
    whole = root / "whole"
    began = time.monotonic()
    pid = fork(whole)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("the run that is not killed has failed")
    length = time.monotonic() - began
    expected = torch.load(whole / FINAL, weights_only=True)
    kills: list[bool] = []
    runs = 0
    while len(kills) < wanted or sum(kills) < wanted // 3 or all(kills):
        runs += 1
        if runs > 4 * wanted:
            raise RuntimeError(f"{runs} runs and only these kills: {kills}")
        folder = root / f"run-{runs}"
        for _ in range(4):
            where = kill(folder, fork(folder), dice.random() < 0.6, dice.random() * length, dice)
            if where is None:
                break
            kills.append(where)
        if not (folder / FINAL).exists():
            _, status = os.waitpid(fork(folder), 0)
            if status:
                raise RuntimeError(f"run {runs} could not be resumed after {len(kills)} kills")
        found = torch.load(folder / FINAL, weights_only=True)
        different = [
            name for name, w in expected.items() if not torch.equal(w.view(torch.int32), found[name].view(torch.int32))
        ]
        if different:
            raise RuntimeError(f"run {runs} ended with other bits in {different}")
    print(json.dumps({"runs": runs, "kills": len(kills), "within a checkpoint": sum(kills)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
