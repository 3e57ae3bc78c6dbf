"""examples/benchmarks/gpu_check.py on made-up commands; ``.ci/run`` runs it with its own on a CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks"

RECORD = {
    "tiny": True,
    "command": "",
    "device": {},
    "versions": {},
    "columns": [],
    "rows": [],
    "title": "",
    "seconds": {},
}
SUITE = '<testsuites><testsuite><testcase name="a"/><testcase name="b">{}</testcase></testsuite></testsuites>'


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu_check")


def writes(path: Path, text: str, then: str = "") -> list[str]:
    return [
        sys.executable,
        "-S",
        "-c",
        f"import pathlib, sys, time; pathlib.Path({str(path)!r}).write_text({text!r}); {then}",
    ]


def record(benchmark: str, *, ran: bool) -> str:
    return json.dumps({**RECORD, "benchmark": benchmark, "ran": ran, "notes": ["Not run: no such device."]})


def run(check: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, **scripts: Any) -> tuple[int, dict[str, Any]]:
    """Run parts whose commands are made of these texts and scripts."""
    names = {part: f"{part}.{'xml' if part == 'tests' else 'json'}" for part in scripts}
    monkeypatch.setattr(check, "command_of", lambda part, folder, **_: writes(folder / names[part], *scripts[part]))
    status = check.run(["--device", "cpu", "--tiny", "--output", str(output), "--only", *scripts])
    return status, json.loads(output.read_text(encoding="utf-8"))


def test_what_fails_is_recorded_and_the_others_go_on(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(check.LIMITS, "train", 0.5)
    status, found = run(
        check,
        monkeypatch,
        tmp_path / "gpu.json",
        tests=(SUITE.format('<failure message="wrong"/>'), "sys.exit(1)"),
        train=("", "print('begun', flush=True); time.sleep(60)"),
        solve=(record("solve", ran=True), "sys.exit('the device is gone')"),
        inference=("{}", ""),
    )
    assert status == 1
    parts = found["parts"]
    assert {part: one["status"] for part, one in parts.items()} == {
        "tests": "failed",
        "train": "out of time",
        "solve": "failed",
        "inference": "failed",
    }
    assert parts["tests"]["tests"] == {"a": "passed", "b": "failure: wrong"}
    assert parts["train"]["reason"] == "stopped after 0.5 s"
    assert parts["train"]["printed"] == "begun\n"
    assert "the device is gone" in parts["solve"]["printed"]
    assert parts["inference"]["reason"] == "exit status 0, and no result"
    assert found["device"]["kind"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__


def test_what_this_device_cannot_do_is_not_run(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skipped = SUITE.format('<skipped message="there is no CUDA GPU"/>').replace('<testcase name="a"/>', "")
    status, found = run(
        check,
        monkeypatch,
        tmp_path / "gpu.json",
        tests=(skipped,),
        solve=(record("solve", ran=True),),
        inference=(record("inference", ran=False), "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''"),
    )
    assert status == 0
    parts = found["parts"]
    assert (parts["tests"]["status"], parts["tests"]["reason"]) == ("not run", "there is no CUDA GPU")
    assert (parts["inference"]["status"], parts["inference"]["reason"]) == ("not run", "Not run: no such device.")
    assert (parts["solve"]["status"], parts["solve"]["record"]["benchmark"]) == ("ran", "solve")


def test_the_commands_are_of_files_that_are_there(check: ModuleType, tmp_path: Path) -> None:
    for part in check.LIMITS:
        command = check.command_of(part, tmp_path, device="cuda", tiny=False)
        files = command[-1:] if part == "tests" else command[1:2]
        assert all((check.ROOT / file).is_file() for file in files)
    assert str(check.ROOT / "tests" / "test_cuda.py") in check.command_of("tests", tmp_path, device="cuda", tiny=False)


def test_the_parts_take_less_than_eight_minutes_together(check: ModuleType) -> None:
    assert sum(check.LIMITS.values()) <= 480 - 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_gpu_is_named(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run(["--output", str(tmp_path / "gpu.json")]) == 2
    assert "finds no CUDA device; give --device cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
