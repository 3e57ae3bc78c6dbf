"""``admm-nxm verify``: does every group keep to its pattern?"""

from __future__ import annotations

from typing import Any

from ..io.verify import verify as count
from ..sparsity import SparsityReport
from .console import Result
from .options import Json, PatternText, Select, Source, rules_of

__all__ = ["as_dict", "verify"]


def verify(path: Source, pattern: PatternText = None, select: Select = None, json: Json = False) -> Result:  # noqa: ARG001
    """Check that all groups keep to the pattern.

    Every group of every covered weight is counted, with one weight in memory at a time. The exit status is 1 if one
    violates its pattern.
    """
    parsed, rules = rules_of(pattern, select)
    report = count(path, parsed if rules is None else rules)
    return Result({"command": "verify", "path": str(path), **as_dict(report)}, str(report), 0 if report.ok else 1)


def as_dict(report: SparsityReport) -> dict[str, Any]:
    """Return a count as JSON has it."""
    return {
        "ok": report.ok,
        "sparsity": report.sparsity,
        "violations": len(report.violations),
        "weights": [
            {
                "name": weight.name,
                "shape": list(weight.shape),
                "pattern": str(weight.pattern),
                "dim": weight.dim,
                "groups": weight.groups,
                "bad_groups": weight.bad_groups,
                "zeros": weight.zeros,
            }
            for weight in report
        ],
        "skipped": [{"name": weight.name, "reason": weight.reason} for weight in report.skipped],
    }
