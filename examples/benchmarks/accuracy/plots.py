"""The pictures as SVG: the same data give the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that remain apart for colour-blind readers.
OURS, OTHERS, DENSE = "#d55e00", "#777777", "#222222"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE: Any = {
    "svg.hashsalt": "admm-nxm",
    "svg.fonttype": "none",  # text as text: a tenth of the bytes, and it can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Row:
    """One method in a panel of accuracies: its mean and the ends of its interval."""

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """One pair of axes of accuracies."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Cloud:
    """One pair of axes of points: name of a series -> (x, y)."""

    title: str
    x: str
    y: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]


class Curves(Cloud):
    """The same with each series as a line."""


@dataclass(frozen=True)
class Picture:
    """One file, known by the digest of its data without drawing.

    Args:
        name: its name.
        title: its title.
        panels: its axes.
    """

    name: str
    title: str
    panels: tuple[Bars | Cloud, ...]

    @property
    def digest(self) -> str:
        """A hash of the data, which the file carries: the bytes of a drawing differ between versions of matplotlib."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _draw_bars(axes: Axes, panel: Bars) -> None:
    for number, row in enumerate(panel.rows):
        colour = DENSE if row.name == "dense" else OURS if row.name.startswith("admm") else OTHERS
        axes.plot([row.low, row.high], [number, number], color=colour, linewidth=1.2)
        axes.scatter([row.mean], [number], s=22, color=colour, zorder=3)
        if row.name == "dense":
            axes.axvline(row.mean, color=DENSE, linewidth=0.6, linestyle=":")
    axes.set_yticks(range(len(panel.rows)), [row.name for row in panel.rows])
    axes.set_ylim(len(panel.rows) - 0.5, -0.5)
    axes.set_xlabel("accuracy (%)")


def _draw_cloud(axes: Axes, panel: Cloud) -> None:
    for (name, points), colour in zip(panel.series, PALETTE * len(panel.series), strict=False):
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=10, color=colour, label=name, linewidths=0)
    axes.set_xscale("log")
    axes.axhline(0, color=OTHERS, linewidth=0.6)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.legend(frameon=False, fontsize=7)


def _draw_curves(axes: Axes, panel: Curves) -> None:
    for (name, points), colour in zip(panel.series, PALETTE * len(panel.series), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, label=name, linewidth=1.2, marker="o", markersize=3)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.legend(frameon=False, fontsize=7)


def draw(picture: Picture, columns: int = 2) -> bytes:
    """Draw a picture.

    Args:
        picture: the data.
        columns: axes beside each other.

    Returns:
        The bytes of an SVG that carries the digest of the data and no date.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = min(columns, len(picture.panels))
    rows = -(-len(picture.panels) // columns)
    longest = max(len(panel.rows) if isinstance(panel, Bars) else 10 for panel in picture.panels)
    with rc_context(STYLE):
        canvas = Figure(figsize=(3.6 * columns + 0.4, rows * (0.8 + 0.2 * longest) + 0.4), layout="constrained")
        canvas.suptitle(picture.title, fontsize=10)
        grid: Sequence[Axes] = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for axes in grid[len(picture.panels) :]:
            axes.remove()
        for axes, panel in zip(grid, picture.panels, strict=False):
            axes.set_title(panel.title)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            if isinstance(panel, Bars):
                _draw_bars(axes, panel)
            elif isinstance(panel, Curves):
                _draw_curves(axes, panel)
            else:
                _draw_cloud(axes, panel)
        buffer = io.BytesIO()
        canvas.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": f"data {picture.digest}"}
        )
    # Matplotlib ends some lines with a blank, which editors and hooks would take away.
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())
