"""Pictures of a run and of its result: curves, model errors, a map of the zeros, histograms of the weights.

They are drawn on matplotlib's figures alone, so that no display is needed and nothing global changes. All have a white
ground of their own, which reads well in light and dark pages, and tell things apart by more than colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from ..io.files import atomic_file
from ..sparsity import SparsityReport
from .histogram import Chosen, Counts, Weights, count_pairs
from .history import Recorder, load_history
from .model import ModelReport, ModelWeight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_history", "plot_model_error", "plot_sparsity", "plot_weights", "save_figure"]

History = Union[Recorder, Sequence[Mapping[str, Any]], str, "PathLike[str]"]

# Colours that remain apart for colour-blind readers, and as many line styles as make each pair differ in both.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#222222", "#b8860b", "#56b4e9")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_BEFORE, _AFTER = "#9a9a9a", "#0072b2"
_BAD, _PLAIN, _GRID = "#d55e00", "#f4f4f4", "#dddddd"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "admm-nxm",  # ids of an SVG are random otherwise
    "svg.fonttype": "none",  # text as text: it can be searched, and the file is small
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 150,
}
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@contextmanager
def _drawing() -> Iterator[None]:
    """The same look whatever matplotlib has been set to, which is as before afterwards."""
    try:
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise ImportError(f'pictures need matplotlib ({error}); run: pip install "admm-nxm[plots]"') from error
    with matplotlib.style.context(["default", _STYLE]):
        yield


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a picture; what was there is replaced in one go. The same picture gives the same bytes.

    Args:
        figure: the picture.
        path: a file that ends in ``.svg``, ``.png`` or ``.pdf``.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another ending.
        OSError: the file cannot be written; what was there is left as it was.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _METADATA:
        raise ValueError(f"{path} ends in {path.suffix!r}; a picture ends in .svg, .png or .pdf")
    buffer = io.BytesIO()
    with _drawing():
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
    content = buffer.getvalue()
    if kind == "svg":  # matplotlib ends some lines with a blank, which editors and hooks would take away
        content = b"".join(line.rstrip() + b"\n" for line in content.splitlines())
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_bytes(content)
    return path


def _new_figure(width: float, height: float, title: str | None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


# ---------------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Panel:
    """One figure of a run over its steps."""

    key: str
    title: str
    scale: Literal["log", "share", "plain"]


_PANELS = (
    _Panel("loss", "loss", "plain"),
    _Panel("admm/sparsity", "share of zeros", "share"),
    _Panel("admm/primal_residual", "primal residual", "log"),
    _Panel("admm/dual_residual", "dual residual", "log"),
    _Panel("admm/mask_churn", "mask churn", "share"),
    _Panel("admm/rho", "penalty rho", "log"),
)

# Ground and hatching of each phase.
_PHASES = {
    "dense": ("#f7f7f7", None),
    "admm": ("#f7f7f7", None),
    "calibration": ("#fff3d6", "\\\\"),
    "frozen": ("#e6eef6", "//"),
}


def plot_history(history: History | Mapping[str, History], *, title: str | None = None) -> Figure:
    """Draw how a run came to its pattern: loss, share of zeros, and in the paper's form the residuals over the steps.

    The phases are shaded, and a line marks the step after which the last weights were pruned. Once the mask is frozen
    the residuals are exactly zero, for which a logarithmic axis has no place; what stays within one order of magnitude
    has a plain axis. Several runs are drawn over each other, each with a line of its own.

    Args:
        history: ``trainer.state.log_history`` of an :class:`~admm_nxm.integrations.transformers.ADMMTrainer`; a
            :class:`~admm_nxm.report.history.Recorder` or its rows; the path of a saved history; or a mapping from names
            to any of these.
        title: above all; none by default.

    Returns:
        A matplotlib figure; see :func:`save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a history has no figures of ADMM, or a figure of it is no number.
        TypeError: a history is of another kind.
    """
    runs = {name: _rows(name, rows) for name, rows in _named(history).items()}
    panels = [panel for panel in _PANELS if any(_series(rows, panel.key)[0] for rows in runs.values())]
    with _drawing():
        rows_of_panels = math.ceil(len(panels) / 2)
        figure = _new_figure(8.4, 1.75 * rows_of_panels + 0.7 + 0.3 * (title is not None), title)
        grid = figure.add_gridspec(rows_of_panels, 2)
        first: Axes | None = None
        for number, panel in enumerate(panels):
            # The last one of an odd number is as wide as two.
            alone = number == len(panels) - 1 and number % 2 == 0
            place = grid[number // 2, :] if alone else grid[number // 2, number % 2]
            axes = figure.add_subplot(place, sharex=first)
            first = first or axes
            _draw_panel(axes, panel, runs)
            if number >= len(panels) - (1 if len(panels) % 2 else 2):
                axes.set_xlabel("step")
        _add_legend(figure)
    return figure


def _named(history: History | Mapping[str, History]) -> dict[str, History]:
    if not isinstance(history, Mapping):
        return {"": history}
    if not history:
        raise ValueError("history is an empty mapping; a run at least is needed")
    return {str(name): run for name, run in history.items()}


def _rows(name: str, history: Any) -> list[Mapping[str, Any]]:
    run = f"run {name!r}" if name else "the history"
    if isinstance(history, Recorder):
        history = history.rows
    elif isinstance(history, (str, PathLike)):
        history = load_history(history)
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        raise TypeError(
            f"{run} is a {type(history).__name__}; trainer.state.log_history, a Recorder, its rows or the path of a "
            "saved history is needed"
        )
    rows = [row for row in history if "step" in row]
    if not any("admm/phase" in row for row in rows):
        raise ValueError(
            f"{run} has {len(rows)} rows with a step and none with a figure of ADMM, such as "
            "'admm/phase'; ADMMTrainer logs them every logging_steps, a Recorder at each record()"
        )
    return rows


def _series(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    steps, values = [], []
    for row in rows:
        if key not in row:
            continue
        try:
            steps.append(float(row["step"]))
            values.append(float(row[key]))
        except (TypeError, ValueError):
            raise ValueError(
                f"the row of step {row['step']!r} has {key!r} = {row[key]!r}; a number is needed"
            ) from None
    return steps, values


def _draw_panel(axes: Axes, panel: _Panel, runs: Mapping[str, list[Mapping[str, Any]]]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    every: list[float] = []
    for number, (name, rows) in enumerate(runs.items()):
        colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        steps, values = _series(rows, panel.key)
        every += values
        look = {"color": colour, "linestyle": dashes, "linewidth": 1.3, "markersize": 4}
        axes.plot(steps, values, marker="." if len(steps) <= 30 else "", label=_visible(name) or "_run", **look)
        if panel.key == "loss" and (evaluated := _series(rows, "eval_loss"))[0]:
            look |= {"linestyle": "", "marker": "D", "markerfacecolor": "white"}
            axes.plot(*evaluated, label=_visible(f"{name}, evaluation".removeprefix(", ")), **look)
        if len(runs) == 1:
            _shade_phases(axes, rows)
        elif (frozen := _freeze(rows)) is not None:
            axes.axvline(frozen, color=colour, linestyle=dashes, linewidth=0.8, alpha=0.7, label="_freeze")
    if len(runs) > 1 and any(_freeze(rows) is not None for rows in runs.values()):
        # Nothing but its entry in the legend.
        axes.plot([], [], color="#444444", linestyle="", marker="|", markersize=12, label="weights pruned")
    axes.set_title(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    positive = [value for value in every if 0 < value < math.inf]
    # What changes by orders of magnitude would be a flat line and a cliff; within one, such an axis has hardly a tick.
    if positive and panel.scale == "log" and max(positive) > 10 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    elif panel.scale == "share":
        axes.set_ylim(0, max(1.1 * max(positive, default=0.0), 0.01))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.scale == "log":
        axes.set_ylim(0, 1.1 * max(positive, default=1.0))


def _freeze(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the step after which the last weights were pruned."""
    return next((float(row["admm/frozen_at"]) for row in rows if "admm/frozen_at" in row), None)


def _shade_phases(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    begins: dict[str, float] = {}
    for row in rows:
        if row.get("admm/phase") in _PHASES:
            begins.setdefault(row["admm/phase"], float(row["step"]))
    frozen = _freeze(rows)
    if frozen is not None:
        begins["frozen"] = frozen
        errors = [row["admm/model_error"] for row in rows if "admm/model_error" in row]
        said = f", model error {float(errors[-1]):.4f}" if errors else ""
        label = f"weights pruned after step {frozen:g}{said}"
        axes.axvline(frozen, color="#444444", linestyle="--", linewidth=0.9, label=label)
    ends = [*list(begins.values())[1:], max(float(row["step"]) for row in rows)]
    for (phase, begin), end in zip(begins.items(), ends, strict=True):
        ground, hatch = _PHASES[phase]
        axes.axvspan(begin, end, facecolor=ground, edgecolor="#bbbbbb", hatch=hatch, linewidth=0, label=phase, zorder=0)


def plot_model_error(errors: Mapping[str, float], *, title: str | None = None) -> Figure:
    """Draw the model error of each weight over the blocks: a line for each kind of weight.

    It shows which weights the pattern costs most. Weights of one kind that a block has several times (experts) are
    averaged; what stands outside of the blocks has a flat line.

    Args:
        errors: name -> model error, such as ``optimizer.figures().model_errors``.
        title: above all; none by default.

    Returns:
        A matplotlib figure; see :func:`save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no errors: nothing was solved yet, or the checkpoint did not carry them.
    """
    if not errors:
        raise ValueError("errors is empty: no weight was solved yet, or the checkpoint did not carry the errors")
    lines: dict[tuple[str, str], dict[int, list[float]]] = {}
    for name, error in errors.items():
        (stack, block), kind = _place(name)
        lines.setdefault((stack, kind), {}).setdefault(block, []).append(float(error))
    stacks = {stack for stack, kind in lines if kind != _WHOLE}
    with _drawing():
        from matplotlib.ticker import MaxNLocator

        figure = _new_figure(8.4, 3.6 + 0.3 * (title is not None), title)
        axes = figure.add_subplot()
        for number, ((stack, kind), blocks) in enumerate(lines.items()):
            look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)]}
            means = {block: sum(values) / len(values) for block, values in sorted(blocks.items())}
            if kind == _WHOLE:
                axes.axhline(means[-1], label=_visible(stack), linewidth=1.0, **look)
            else:
                label = kind if len(stacks) == 1 else f"{stack}: {kind}"
                axes.plot(list(means), list(means.values()), marker=".", label=_visible(label), linewidth=1.3, **look)
        positive = [error for error in errors.values() if 0 < error < math.inf]
        if positive and max(positive) > 10 * min(positive):
            axes.set_yscale("log", nonpositive="mask")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("model error")
        _add_legend(figure)
    return figure


def _visible(label: str) -> str:
    """Return a label that stands in the legend: matplotlib leaves out those that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


def _add_legend(figure: Figure) -> None:
    """Put one legend below all panels, with each label once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found)))


# ---------------------------------------------------------------------- map of the zeros

_ROWS = 40  # of one column of the map: more stand beside it
_WHOLE = "whole"  # the kind of what stands outside of all blocks


@dataclass
class _Cell:
    """What is known of the weights of one kind in one block."""

    zeros: int = 0
    entries: int = 0
    bad: int = 0
    dense: int = 0
    unfit: int = 0

    @property
    def text(self) -> str:
        if not self.entries:
            return "dense"
        marks = ("×" if self.bad else "") + ("*" if self.dense else "") + ("†" if self.unfit else "")
        return f"{self.zeros / self.entries:.0%} {marks}".rstrip()


def plot_sparsity(report: SparsityReport, *, title: str | None = None) -> Figure:
    """Draw which share of each weight is zero: a row for each block, a column for each kind of weight.

    A cell shows its share as a number and as a shade. A thick frame and a cross mark weights that violate their
    pattern; weights that stayed dense say so. Weights of one kind that a block has several times (experts) share a
    cell. From 41 blocks on the map stands in several columns side by side.

    Args:
        report: from :func:`admm_nxm.verify` or ``finalize()``, which know of dense weights only those that the rules
            asked for; or from :func:`admm_nxm.report.sparsity_report`, which knows all, and marks what sparse tensor
            cores cannot take. Biases and norms are left out; dense weights outside of the blocks are
            counted below the map.
        title: above all; none by default.

    Returns:
        A matplotlib figure; see :func:`save_figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: not a report.
        ValueError: the report has no weight.
    """
    cells = _cells(report)
    # Embeddings and heads that no pattern covers would be rows with nothing in them: they are named below instead.
    apart = [row[0] for (row, kind), cell in cells.items() if kind == _WHOLE and not cell.entries]
    if len(apart) < len(cells):
        cells = {(row, kind): cell for (row, kind), cell in cells.items() if kind != _WHOLE or cell.entries}
    else:
        apart = []
    rows = _ordered([row for row, _ in cells])
    kinds = [kind for kind in dict.fromkeys(kind for _, kind in cells) if kind != _WHOLE]
    kinds += [_WHOLE] * any(kind == _WHOLE for _, kind in cells)
    stacks = {stack for stack, _ in rows}
    alone = next(iter(stacks)) if len(stacks) == 1 and rows[0][1] >= 0 else None
    names = [str(index) if alone else stack if index < 0 else f"{stack}.{index}" for stack, index in rows]
    columns = math.ceil(len(rows) / _ROWS)
    per_column = math.ceil(len(rows) / columns)
    with _drawing():
        width = columns * (0.66 * len(kinds) + 0.075 * max(map(len, names)) + 0.5) + 0.3
        height = 0.27 * per_column + 2.2 + 0.3 * (title is not None)
        figure = _new_figure(max(width, 4.2), height, title)
        grid = figure.subplots(1, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            part = slice(number * per_column, (number + 1) * per_column)
            _draw_map(axes, rows[part], kinds, cells, per_column)
            axes.set_yticks(range(len(rows[part])), names[part])
        if alone:
            grid[0, 0].set_title(alone, fontsize=9)
        _add_map_legend(figure, cells.values(), apart)
    return figure


def _cells(report: Any) -> dict[tuple[tuple[str, int], str], _Cell]:
    """Return (row, kind) -> cell, in the order of the report; a row is (stack of blocks, number in it)."""
    if not isinstance(report, SparsityReport):
        raise TypeError(f"report is a {type(report).__name__}; what admm_nxm.verify or finalize() returns is needed")
    cells: dict[tuple[tuple[str, int], str], _Cell] = {}
    for weight in report.weights:
        cell = cells.setdefault(_place(weight.name), _Cell())
        cell.zeros += weight.zeros
        cell.entries += weight.numel
        cell.bad += weight.bad_groups
        cell.unfit += isinstance(weight, ModelWeight) and not weight.backends
    for skipped in report.dense if isinstance(report, ModelReport) else report.skipped:
        if len(skipped.shape) > 1:
            cells.setdefault(_place(skipped.name), _Cell()).dense += 1
    if not cells:
        raise ValueError("the report has no weight: there is nothing to draw")
    return cells


def _place(name: str) -> tuple[tuple[str, int], str]:
    """Return where a weight stands: its block, and which of the block's weights it is."""
    # "bert.encoder.layer.0.output.dense.weight" is "output.dense" of block 0 of "bert.encoder.layer".
    match = re.match(r"(?:(.+?)\.)?(\d+)\.(.+)", name)
    if match is None:
        return (name.removesuffix(".weight"), -1), _WHOLE
    stack, index, kind = match[1] or "block", int(match[2]), match[3].removesuffix(".weight")
    return (stack, index), re.sub(r"(?<![^.])\d+(?![^.])", "*", kind)


def _ordered(rows: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return each row once: stacks as they come, blocks by number (checkpoints may list 10 before 2), the rest last."""
    stacks = list(dict.fromkeys(stack for stack, _ in rows))
    return sorted(set(rows), key=lambda row: (row[1] < 0, stacks.index(row[0]), row[1]))


def _draw_map(
    axes: Axes,
    rows: Sequence[tuple[str, int]],
    kinds: Sequence[str],
    cells: Mapping[tuple[tuple[str, int], str], _Cell],
    height: int,
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shades = colormaps["Blues"]
    for (row, kind), cell in cells.items():
        if row not in rows:
            continue
        x, y = kinds.index(kind) - 0.5, rows.index(row) - 0.5
        share = cell.zeros / cell.entries if cell.entries else 0.0
        # Up to 0.75 of the map's range, which gets too dark to tell apart after that.
        shade = shades(0.08 + 0.7 * share) if cell.entries else "white"
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=1.5))
        if not cell.entries:
            axes.add_patch(_dense_patch(Rectangle, (x + 0.04, y + 0.06), 0.92, 0.88))
        if cell.bad:
            axes.add_patch(_bad_patch(Rectangle, (x + 0.05, y + 0.08), 0.9, 0.84))
        ink = "white" if share > 0.6 else "black"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8} if not cell.entries else None
        axes.text(x + 0.5, y + 0.5, cell.text, ha="center", va="center_baseline", fontsize=7.5, color=ink, bbox=box)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_ylim(height - 0.5, -0.5)  # a shorter last column has blocks of the same height
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _dense_patch(make: Any, corner: tuple[float, float], width: float, height: float) -> Any:
    return make(corner, width, height, facecolor=_PLAIN, edgecolor="#999999", hatch="///", linewidth=0.6)


def _bad_patch(make: Any, corner: tuple[float, float], width: float, height: float) -> Any:
    return make(corner, width, height, fill=False, edgecolor=_BAD, linewidth=2.0)


def _add_map_legend(figure: Figure, cells: Iterable[_Cell], apart: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cells = list(cells)
    handles: list[Any] = [Patch(facecolor="#86bcdc", label="share of zeros")]
    if bad := sum(cell.bad > 0 for cell in cells):
        handles.append(Patch(fill=False, edgecolor=_BAD, linewidth=2.0, label=f"× violates its pattern ({bad})"))
    if dense := sum(not cell.entries for cell in cells):
        label = f"left dense ({dense})"
        handles.append(Patch(facecolor=_PLAIN, edgecolor="#999999", hatch="///", linewidth=0.6, label=label))
    if any(cell.dense and cell.entries for cell in cells):
        handles.append(Line2D([], [], linestyle="", label="* some of them left dense"))
    if unfit := sum(cell.unfit > 0 for cell in cells):
        handles.append(Line2D([], [], linestyle="", label=f"† not for sparse tensor cores ({unfit})"))
    if apart:
        names = f"{apart[0]}, …" if apart[1:] else apart[0]
        handles.append(Line2D([], [], linestyle="", label=f"left dense outside of the blocks: {len(apart)} ({names})"))
    figure.legend(handles=handles, loc="outside lower left", fontsize=8)


# ---------------------------------------------------------------------- histograms

_PANELS_AT_MOST = 48


def plot_weights(
    before: Weights,
    after: Weights,
    *,
    select: Chosen = None,
    by: Literal["all", "kind", "weight"] = "all",
    bins: int = 120,
    labels: tuple[str, str] = ("before", "after"),
    title: str | None = None,
) -> Figure:
    """Draw the distribution of a model's weights before and after.

    Zeros are counted apart: half of the weights in one bin would flatten all others. A line at zero marks them, their
    share is written beside it, and each bin shows the other weights as a share of all. Weights are read and counted
    one after the other, in parts, so that a checkpoint needs no more memory than its largest weight. Each is read
    twice.

    Args:
        before: a module, a state dict, one tensor, or the path of a checkpoint: a ``.safetensors`` file, packed or
            not, or a folder that holds one or a sharded set.
        after: the same model later, of any of these kinds.
        select: which weights: a :class:`~admm_nxm.Selection` (such as ``optimizer.selection``), names, or a regular
            expression that is matched against the whole name. None takes those that
            :class:`~admm_nxm.ADMMNxM` prunes by default.
        by: one panel for ``"all"`` weights, for each ``"kind"`` (over all blocks), or for each ``"weight"``.
        bins: number of bins between -4 and 4 times the root mean square of a panel's non-zero weights. A share beyond
            them is written into the panel.
        labels: names of the two.
        title: above all; none by default.

    Returns:
        A matplotlib figure; see :func:`save_figure`.

    Raises:
        FileNotFoundError: nothing at a path.
        ImportError: matplotlib is not installed.
        TypeError: an argument is of another kind.
        ValueError: no weight is chosen, the two do not match, a weight is sharded over processes, has no entries in
            memory, or has NaN or infinite ones, a file is damaged, or there are too many panels to read.
    """
    kinds = {"all": lambda _: "all", "kind": lambda name: _place(name)[1], "weight": lambda name: name}
    if by not in kinds:
        raise ValueError(f"by={by!r} must be one of {', '.join(map(repr, kinds))}")
    if isinstance(bins, bool) or not isinstance(bins, int) or not 2 <= bins <= 10_000:
        raise ValueError(f"bins={bins!r} must be a whole number from 2 to 10000")
    found = count_pairs(before, after, select, kinds[by], bins)
    if len(found) > _PANELS_AT_MOST:
        raise ValueError(
            f"{len(found)} panels are too many to read (at most {_PANELS_AT_MOST}); choose fewer weights by select=, "
            'or by="kind"'
        )
    with _drawing():
        columns = min(3, len(found))
        rows = math.ceil(len(found) / columns)
        width, height = (7.2, 3.6) if len(found) == 1 else (3.3 * columns, 2.3 * rows)
        figure = _new_figure(width, height + 0.4 + 0.3 * (title is not None), title)
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number >= len(found):
                axes.remove()
        for axes, (name, counts) in zip(grid.flat, found.items(), strict=False):
            _draw_histogram(axes, counts, labels)
            size = f"{len(counts.names)} weights, {counts.total:,} entries"
            axes.set_title(size if by == "all" else f"{name}\n{size}" if by == "kind" else name, fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel("share of all weights, per bin")
        _add_legend(figure)
    return figure


def _draw_histogram(axes: Axes, counts: Counts, labels: tuple[str, str]) -> None:
    from matplotlib.ticker import PercentFormatter

    total = max(1, counts.total)
    edges = counts.edges.tolist()
    shares = [(side.double() / total).tolist() for side in counts.counts]
    axes.stairs(shares[0], edges, fill=True, color="#cfcfcf", label=_visible(labels[0]))
    axes.stairs(shares[0], edges, color=_BEFORE, linewidth=0.8, label="_outline")
    axes.stairs(shares[1], edges, color=_AFTER, linewidth=1.4, label=_visible(labels[1]))
    highest = max(map(max, shares)) or 1.0
    axes.set_ylim(0, 1.35 * highest)  # room for what is written about the zeros
    axes.set_xlim(edges[0], edges[-1])
    lines = []
    for label, zeros, beyond in zip(labels, counts.zeros, counts.beyond, strict=True):
        if zeros:
            lines.append(f"{label}: {_percent(zeros / total)} zero")
        if beyond:
            lines.append(f"{label}: {_percent(beyond / total)} beyond the axis")
    if any(counts.zeros):
        axes.axvline(0, color="#222222", linestyle="--", linewidth=1.3, label="exactly zero, in no bin")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    said = "\n".join(lines)
    axes.text(0.015, 0.975, said, transform=axes.transAxes, ha="left", va="top", fontsize=7.5, bbox=box)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.locator_params(axis="x", nbins=7)


def _percent(share: float) -> str:
    """Return a share in percent, so that what is little does not read as nothing, nor nearly all as all."""
    for digits in range(1, 6):
        if 10.0**-digits <= 100 * share <= 100 - 10.0**-digits or share == 1:
            return f"{share:.{digits}%}" if share != 1 else "100%"
    return "<0.00001%" if share < 0.5 else ">99.99999%"
