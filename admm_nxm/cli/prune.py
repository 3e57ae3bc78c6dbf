"""``admm-nxm prune``: one-shot magnitude pruning, the baseline."""

from __future__ import annotations

from .console import Result
from .options import Json, Output, Overwrite, PatternText, Select, Source, rules_of
from .verify import as_dict

__all__ = ["prune"]

_BASELINE = "This is one-shot magnitude pruning, the baseline: nothing was fine-tuned, so expect to lose accuracy."


def prune(
    path: Source,
    output: Output,
    pattern: PatternText = None,
    select: Select = None,
    overwrite: Overwrite = False,
    json: Json = False,  # noqa: ARG001
) -> Result:
    """Prune once, without fine-tuning: the baseline.

    Zeros the smallest weights of each group in a saved model, leaves everything else as it is, and verifies.
    """
    from ..io.prune import prune as project_files

    parsed, rules = rules_of(pattern, select)
    report = project_files(path, output, parsed or "2:4", select=rules, overwrite=overwrite)
    payload = {"command": "prune", "path": str(path), "output": str(output), "note": _BASELINE, **as_dict(report)}
    text = f"{report}\nsaved to {output}. {_BASELINE}"
    return Result(payload, text, 0 if report.ok else 1)
