"""Plain-text tables for reports."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Return a table with aligned columns, numbers to the right; names in the first lose their beginning to fit."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    if width is not None and rows:
        widths[0] = min(widths[0], max(width - sum(widths[1:]) - 2 * len(widths[1:]), len(headers[0]), 8))
        for row in cells:
            row[0] = row[0] if len(row[0]) <= widths[0] else f"…{row[0][1 - widths[0] :]}"
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])
