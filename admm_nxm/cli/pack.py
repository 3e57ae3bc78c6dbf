"""``admm-nxm pack`` and ``unpack``: a sparse model stored without its zeros, and back."""

from __future__ import annotations

from shlex import quote

from ..sparsity import SparsityViolation
from .console import Result
from .options import Json, Output, Overwrite, PatternText, Select, Source, rules_of

__all__ = ["pack", "unpack"]


def pack(
    path: Source,
    output: Output,
    pattern: PatternText = None,
    select: Select = None,
    overwrite: Overwrite = False,
    json: Json = False,  # noqa: ARG001
) -> Result:
    """Store a sparse model without its zeros.

    Nothing is lost: `unpack` gives every bit back. The exit status is 1, and nothing is written, if a weight violates
    its pattern.
    """
    from ..io.packed import pack as pack_files

    parsed, rules = rules_of(pattern, select)
    payload = {"command": "pack", "path": str(path), "output": str(output)}
    try:
        report = pack_files(path, output, parsed, select=rules, overwrite=overwrite)
    except SparsityViolation as violation:
        text = f"VIOLATED: {violation}\nnothing is written; `verify` with the same rules counts every weight"
        return Result({**payload, "ok": False, "violation": str(violation)}, text, 1)
    return Result(
        {
            **payload,
            "ok": True,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "ratio": report.ratio,
            "weights": [
                {
                    "name": weight.name,
                    "shape": list(weight.shape),
                    "pattern": str(weight.pattern),
                    "dim": weight.dim,
                    "dtype": str(weight.dtype).removeprefix("torch."),
                    "bytes_before": weight.bytes_before,
                    "bytes_after": weight.bytes_after,
                }
                for weight in report
            ],
            "skipped": [{"name": weight.name, "reason": weight.reason} for weight in report.skipped],
        },
        f"{report}\nsaved to {output}; `admm-nxm unpack {quote(str(output))} -o ...` gives it back bit for bit",
    )


def unpack(path: Source, output: Output, overwrite: Overwrite = False, json: Json = False) -> Result:  # noqa: ARG001
    """Give a packed model back, bit for bit."""
    from ..io.packed import unpack as unpack_files

    unpack_files(path, output, overwrite=overwrite)
    payload = {"command": "unpack", "ok": True, "path": str(path), "output": str(output)}
    return Result(payload, f"saved to {output}")
