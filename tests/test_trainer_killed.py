"""A Trainer run that is killed and resumed ends with the same bits as one that is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

KILLS = 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_between_and_during_checkpoints(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_and_resume", str(tmp_path), "0", str(KILLS)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= KILLS
    assert 2 <= said["within a checkpoint"] < said["kills"]
