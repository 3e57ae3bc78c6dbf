"""The plots as SVG: the same data give the same bytes."""

from __future__ import annotations

import io
import math
import statistics
from typing import TYPE_CHECKING, Any

from figures import TITLES, Figure, Line, Panel
from records import METHODS, by_known

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
# Colours that remain apart for colour-blind readers; a distilled form has the colour of its method, drawn hollow.
COLOURS = {
    "dense": "#222222",
    "asp": "#888888",
    "gradual": "#9c6b30",
    "sr-ste": "#0072b2",
    "pat": "#009e73",
    "admm-paper": "#cc79a7",
    "admm": "#d55e00",
}
OTHERS = ("#56b4e9", "#b8860b", "#7b5ea7")
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


def _colour(method: str, unknown: list[str]) -> str:
    base = method.removesuffix("+kd")
    if base in COLOURS:
        return COLOURS[base]
    return OTHERS[unknown.index(method) % len(OTHERS)]


def _is_hollow(method: str) -> bool:
    return method.endswith("+kd")


def _methods(figure: Figure) -> tuple[list[str], list[str]]:
    listed = by_known((line.method for panel in figure.panels for line in panel.lines), METHODS)
    return listed, [method for method in listed if method.removesuffix("+kd") not in COLOURS]


def _spread(count: int) -> list[float]:
    """Heights of the points of one method, so that equal scores do not hide each other."""
    return [0.0] if count == 1 else [0.36 * (i / (count - 1) - 0.5) for i in range(count)]


def _draw_scores(axes: Axes, panel: Panel, methods: list[str], unknown: list[str]) -> None:
    for line in panel.lines:
        row, colour = methods.index(line.method), _colour(line.method, unknown)
        values = [value for value in line.y if value is not None]
        heights = [row + shift for shift in _spread(len(values))]
        face = "white" if _is_hollow(line.method) else colour
        axes.scatter(values, heights, s=14, facecolors=face, edgecolors=colour, linewidths=0.9, zorder=2)
        mean = statistics.fmean(values)
        axes.plot([mean, mean], [row - 0.38, row + 0.38], color=colour, linewidth=2.2, zorder=3)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)


def _draw_trace(axes: Axes, line: Line, colour: str, first: bool) -> None:
    values = [math.nan if value is None else value for value in line.y]
    axes.plot(
        *(line.x, values),
        color=colour,
        linewidth=0.9,
        linestyle="--" if _is_hollow(line.method) else "-",
        label=line.method if first else None,
    )


def _draw_traces(axes: Axes, panel: Panel, unknown: list[str], logarithmic: bool) -> None:
    seen: set[str] = set()
    for line in panel.lines:
        _draw_trace(axes, line, _colour(line.method, unknown), line.method not in seen)
        seen.add(line.method)
    # On a logarithmic axis zero has no place: a residual of exactly zero is a gap.
    if logarithmic and any(value for line in panel.lines for value in line.y):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=7)


def _draw_grid(axes: Axes, panel: Panel, unknown: list[str]) -> None:
    for line in panel.lines:
        colour = _colour(line.method, unknown)
        values = [math.nan if value is None else value for value in line.y]
        axes.plot(line.x, values, color=colour, linewidth=0.9, marker="o", markersize=3, label=line.method)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=7)


def draw(figure: Figure) -> bytes:
    """Draw a figure.

    Args:
        figure: the data.

    Returns:
        The bytes of an SVG that carries the digest of the data and no date.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    methods, unknown = _methods(figure)
    scores = figure.kind == "accuracy"
    columns = min(COLUMNS, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    height = 0.7 + 0.2 * len(methods) if scores else 3.2 if figure.kind == "tuning" else 2.2
    with rc_context(STYLE):
        canvas = Canvas(figsize=(3.2 * columns + 0.4, rows * height + 0.5), layout="constrained")
        canvas.suptitle(f"{TITLES[figure.kind]}, {figure.pattern}, {figure.model}", fontsize=10)
        grid = canvas.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number >= len(figure.panels):
                axes.remove()
                continue
            panel = figure.panels[number]
            axes.set_title(panel.title)
            if scores:
                _draw_scores(axes, panel, methods, unknown)
                axes.tick_params(labelleft=number % columns == 0)
            elif figure.kind == "tuning":
                _draw_grid(axes, panel, unknown)
            else:
                _draw_traces(axes, panel, unknown, logarithmic=figure.kind == "residual")
                axes.set_xlabel("step")
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Description": f"data {figure.digest}"}
        canvas.savefig(buffer, format="svg", metadata=metadata)
    # Matplotlib ends some lines with a blank, which editors and hooks would take away.
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())
