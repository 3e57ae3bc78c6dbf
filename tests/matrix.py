"""Write docs/matrix.md, what was tested with what, from the tests themselves: ``python -m tests.matrix [--check]``.

A row is a test function: its name as a sentence, and the cases that it is run with.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "matrix.md"
SECTIONS = {
    "Trainer": ["tests/test_trainer.py", "tests/test_trainer_killed.py"],
    "Distillation": ["tests/test_distillation.py", "tests/test_distillation_trainer.py"],
    "Accelerate and Trainer on two processes": ["tests/distributed/test_accelerate.py"],
    "torch.distributed, two processes": ["tests/distributed/test_sharding.py"],
    "The contract with torch.optim, every optimizer": ["tests/contract"],
}
SHOWN = 30
"""Cases named in a row; the rest are counted."""
LONGEST = 45
"""Characters of a name worth showing; where one is longer, cases are counted."""
VERSIONS = ("torch", "transformers", "accelerate", "safetensors", "peft", "schedulefree", "bitsandbytes")


class Collected:
    """Takes down what pytest has collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect(paths: Iterable[str]) -> list[pytest.Item]:
    """Return the tests in these files and folders."""
    taker, said = Collected(), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *paths], plugins=[taker])
    if status != 0 or not taker.items:
        raise SystemExit(f"pytest could not collect {list(paths)}:\n{said.getvalue()}")
    return taker.items


def sentence(name: str) -> str:
    """test_c06_a_run_goes_on -> a run goes on."""
    return re.sub(r"^(test_)?(c\d\d_)?", "", name).replace("_", " ").strip() or name


def row(name: str, file: str, cases: list[str]) -> list[str]:
    """Return the lines of one test function in the table."""
    where = f"`{file}::{name}`"
    if file.endswith("test_accelerate.py"):  # each case is a check of its own
        return [f"| {sentence(case)} | | {where}`[{case}]` |" for case in cases]
    if any(len(case) > LONGEST for case in cases):
        return [f"| {sentence(name)} | {len(cases)} | {where} |"]
    shown = ", ".join(case.replace("|", "/") for case in cases[:SHOWN])
    more = f", and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
    return [f"| {sentence(name)} | {shown}{more} | {where} |"]


def page() -> str:
    """Return the page."""
    pins = dict(
        line.split(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#") and "<" not in line.partition(";")[2]
    )
    versions = ", ".join(f"{name} {pins[name]}" for name in VERSIONS if name in pins)
    lines = [
        "# What was tested with what",
        "",
        "<!-- Written by `python -m tests.matrix`; changes by hand would be lost. -->",
        "",
        "Each row is a test that runs with every change, on a CPU: what holds, and in which cases it is tried. The",
        f"test says what exactly is compared. Newest versions tried: {versions}.",
    ]
    for title, paths in SECTIONS.items():
        lines += ["", f"## {title}", "", "| what holds | cases | test |", "| --- | --- | --- |"]
        functions: dict[tuple[str, str], list[str]] = {}
        for item in collect(paths):
            file = item.path.relative_to(ROOT).as_posix()
            name = getattr(item, "originalname", None) or item.name
            case = item.name[len(name) :].strip("[]")
            functions.setdefault((file, name), []).extend([case] if case else [])
        for (file, name), cases in functions.items():
            lines += row(name, file, cases)
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with ``--check`` say whether it is what the tests give."""
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/matrix.md is not what the tests give; run: python -m tests.matrix", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
