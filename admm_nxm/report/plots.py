"""Pictures of a run and of its result: curves, model errors, a map of the zeros, histograms of the weights.

They are drawn on matplotlib's figures alone, so that no display is needed and nothing global changes. All have a white
ground of their own, which reads well in light and dark pages, and tell things apart by more than colour.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from ..checks import missing
from ..grouping import starred, such_as
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
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "admm-nxm",  # ids of an SVG are random otherwise
    "svg.fonttype": "none",  # text as text: it can be searched, and the file is small
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
_METADATA: dict[str, dict[str, Any]] = {  # without times and versions
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
        from cycler import cycler
    except ImportError as error:
        raise ImportError(missing(f"pictures need matplotlib ({error})", "plots")) from error
    looks = cycler(color=_COLOURS * len(_DASHES), linestyle=_DASHES * len(_COLOURS))
    with matplotlib.style.context(["default", _STYLE, {"axes.prop_cycle": looks}]):
        yield


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a picture to a path that ends in ``.svg``, ``.png`` or ``.pdf``, which is returned.

    What was there is replaced in one go, or left as it was if the file cannot be written. The same picture gives the
    same bytes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another ending.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _METADATA:
        raise ValueError(f"{path} ends in {path.suffix!r}; a picture ends in .svg, .png or .pdf")
    with _drawing(), atomic_file(path, overwrite=True) as temporary:
        figure.savefig(temporary, format=kind, metadata=_METADATA[kind])
        if kind == "svg":  # matplotlib ends some lines with a blank, which editors and hooks would take away
            lines = temporary.read_bytes().splitlines()
            temporary.write_bytes(b"".join(line.rstrip() + b"\n" for line in lines))
    return path


def _new_figure(width: float, height: float, title: str | None) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height if title is None else height + 0.3))
    if title is not None:
        figure.suptitle(title, fontsize=11)
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


def _zoom(axes: Axes, values: Iterable[float]) -> None:
    """Take a logarithmic axis for what changes by orders of magnitude; within one, that has hardly a tick."""
    positive = [value for value in values if 0 < value < math.inf]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(bottom=0)


_PANELS = {
    "loss": "loss",
    "admm/sparsity": "share of zeros",
    "admm/primal_residual": "primal residual",
    "admm/dual_residual": "dual residual",
    "admm/mask_churn": "mask churn",
    "admm/rho": "penalty rho",
}
_PHASES: dict[Any, dict[str, Any]] = {
    "dense": {"facecolor": "#f7f7f7"},
    "admm": {"facecolor": "#f7f7f7"},
    "calibration": {"facecolor": "#fff3d6", "hatch": "\\\\"},
    "frozen": {"facecolor": "#e6eef6", "hatch": "//"},
}


def plot_history(history: History | Mapping[str, History], *, title: str | None = None) -> Figure:
    """Draw how a run came to its pattern: loss, share of zeros, and in the paper's form the residuals over the steps.

    The phases are shaded, and a line marks the step after which the last weights were pruned. Residuals are exactly
    zero from then on, for which a logarithmic axis has no place. Several runs are drawn over each other.

    Args:
        history: ``trainer.state.log_history`` of an :class:`~admm_nxm.integrations.transformers.ADMMTrainer`; a
            :class:`~admm_nxm.report.history.Recorder` or its rows; the path of a saved history; or a mapping from names
            to any of these.
        title: above all; none by default.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a history has no figures of ADMM, or a figure of it is no number.
        TypeError: a history is of another kind.
    """
    if history == {}:
        raise ValueError("history is an empty mapping; a run at least is needed")
    named = history if isinstance(history, Mapping) else {"": history}
    runs = {str(name): _rows(f"run {name!r}" if name else "the history", run) for name, run in named.items()}
    keys = [key for key in _PANELS if any(key in row for rows in runs.values() for row in rows)]
    mosaic: list[Any] = [keys[first : first + 2] for first in range(0, len(keys), 2)]
    mosaic[-1] *= 2 // len(mosaic[-1])  # the last one of an odd number is as wide as two
    with _drawing():
        figure = _new_figure(8.4, 1.75 * len(mosaic) + 0.7, title)
        panels = figure.subplot_mosaic(mosaic)
        for key, axes in panels.items():
            if key != keys[0]:
                axes.sharex(panels[keys[0]])
            _draw_panel(axes, key, runs)
            if key in mosaic[-1]:
                axes.set_xlabel("step")
        _add_legend(figure)
    return figure


def _rows(run: str, history: Any) -> list[Mapping[str, Any]]:
    if isinstance(history, Recorder):
        history = history.rows
    elif isinstance(history, (str, PathLike)):
        history = load_history(history)
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        kind = type(history).__name__
        raise TypeError(f"{run} is a {kind}; trainer.state.log_history, a Recorder, its rows or their file is needed")
    rows = [row for row in history if "step" in row]
    if not any("admm/phase" in row for row in rows):
        raise ValueError(
            f"{run} has {len(rows)} rows with a step and none with a figure of ADMM ('admm/phase'); ADMMTrainer logs "
            "them every logging_steps, a Recorder at each record()"
        )
    return rows


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps at which there is a figure, and the figures."""
    there = [row for row in rows if key in row]
    try:
        return [float(row["step"]) for row in there], [float(row[key]) for row in there]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the history has a {key!r} or a step that is no number: {error}") from None


def _draw_panel(axes: Axes, key: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    every: list[float] = []
    for name, rows in runs.items():
        steps, values = _series(rows, key)
        every += values
        marker = "." if len(steps) <= 30 else ""
        (line,) = axes.plot(steps, values, marker=marker, markersize=4, linewidth=1.3, label=_visible(name) or "_run")
        if key == "loss" and any("eval_loss" in row for row in rows):
            label = _visible(f"{name}, evaluation".removeprefix(", "))
            look: dict[str, Any] = {"color": line.get_color(), "linestyle": "", "marker": "D", "markersize": 4}
            axes.plot(*_series(rows, "eval_loss"), label=label, markerfacecolor="white", **look)
        if len(runs) == 1:
            _shade_phases(axes, rows)
        elif (frozen := _freeze(rows)) is not None:
            axes.axvline(frozen, color=line.get_color(), linestyle=line.get_linestyle(), linewidth=0.8, label="_freeze")
    if len(runs) > 1 and any(_freeze(rows) is not None for rows in runs.values()):
        # Nothing but its entry in the legend.
        axes.plot([], [], color="#444444", linestyle="", marker="|", markersize=12, label="weights pruned")
    axes.set_title(_PANELS[key])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if key in ("admm/sparsity", "admm/mask_churn"):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif key != "loss":
        _zoom(axes, every)


def _freeze(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the step after which the last weights were pruned."""
    return next((float(row["admm/pruned_at"]) for row in rows if "admm/pruned_at" in row), None)


def _shade_phases(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    begins: dict[str, float] = {}
    for row in rows:
        if row.get("admm/phase") in _PHASES:
            begins.setdefault(row["admm/phase"], float(row["step"]))
    if (frozen := _freeze(rows)) is not None:
        begins["frozen"] = frozen
        errors = [f", model error {float(row['admm/model_error']):.2g}" for row in rows if "admm/model_error" in row]
        label = f"weights pruned after step {frozen:g}{''.join(errors[-1:])}"
        axes.axvline(frozen, color="#444444", linestyle="--", linewidth=0.9, label=label)
    ends = [*list(begins.values())[1:], max(float(row["step"]) for row in rows)]
    for (phase, begin), end in zip(begins.items(), ends, strict=True):
        axes.axvspan(begin, end, edgecolor="#bbbbbb", linewidth=0, label=phase, zorder=0, **_PHASES[phase])


def plot_model_error(errors: Mapping[str, float], *, title: str | None = None) -> Figure:
    """Draw the model error of each weight over the blocks: a line for each kind of weight.

    Each error is a share of the weight's own loss at zero, so a large one need not cost the model much. Weights of one
    kind that a block has several times (experts) are averaged; what stands outside of the blocks has a flat line.

    Args:
        errors: name -> model error, such as ``optimizer.figures().model_errors``.
        title: above all; none by default.

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

        figure = _new_figure(8.4, 3.6, title)
        axes = figure.add_subplot(xlabel="block", ylabel="model error")
        for (stack, kind), blocks in lines.items():
            means = {block: sum(values) / len(values) for block, values in sorted(blocks.items())}
            if kind == _WHOLE:  # as axhline, with a look of its own
                axes.plot([0, 1], [means[-1]] * 2, transform=axes.get_yaxis_transform(), label=_visible(stack))
            else:
                label = kind if len(stacks) == 1 else f"{stack}: {kind}"
                axes.plot(list(means), list(means.values()), marker=".", label=_visible(label))
        _zoom(axes, errors.values())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _add_legend(figure)
    return figure


_ROWS = 40  # of one column of the map: more stand beside it
_WHOLE = "whole"  # the kind of what stands outside of all blocks
_DENSE_LOOK: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "#999999", "hatch": "///", "linewidth": 0.6}
_BAD_LOOK: dict[str, Any] = {"fill": False, "edgecolor": "#d55e00", "linewidth": 2.0}
_NO_LOOK: dict[str, Any] = {"facecolor": "none", "edgecolor": "none"}

Row = tuple[str, int]  # a stack of blocks, and the number in it; -1 outside of the blocks


@dataclass
class _Cell:
    """Describe the weights of one kind in one block."""

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

    A thick frame and a cross mark weights that violate their pattern; weights that stayed dense say so. Weights of one
    kind that a block has several times (experts) share a cell. From 41 blocks on the map stands in several columns.

    Args:
        report: from :func:`admm_nxm.verify` or ``finalize()``, which know of dense weights only those that the rules
            asked for; or from :func:`admm_nxm.report.model_report`, which knows all, and marks what sparse tensor
            cores cannot take. Biases and norms are left out; dense weights outside of the blocks are counted below.
        title: above all; none by default.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: not a report.
        ValueError: the report has no weight.
    """
    every = _cells(report)
    # Embeddings and heads that no pattern covers would be rows with nothing in them: they are named below instead.
    cells = {place: cell for place, cell in every.items() if place[1] != _WHOLE or cell.entries} or every
    apart = [row[0] for row, kind in every if (row, kind) not in cells]
    stacks = list(dict.fromkeys(stack for (stack, _), _ in cells))
    # Stacks as they come, blocks by number (checkpoints may list 10 before 2), the rest last.
    rows = sorted({row for row, _ in cells}, key=lambda row: (row[1] < 0, stacks.index(row[0]), row[1]))
    kinds = sorted(dict.fromkeys(kind for _, kind in cells), key=lambda kind: kind == _WHOLE)
    alone = stacks[0] if len(stacks) == 1 and rows[0][1] >= 0 else None
    names = [str(index) if alone else stack if index < 0 else f"{stack}.{index}" for stack, index in rows]
    columns = math.ceil(len(rows) / _ROWS)
    height = math.ceil(len(rows) / columns)
    with _drawing():
        width = columns * (0.66 * len(kinds) + 0.075 * max(map(len, names)) + 0.5) + 0.3
        figure = _new_figure(max(width, 4.2), 0.27 * height + 2.2, title)
        grid = figure.subplots(1, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            part = slice(number * height, (number + 1) * height)
            _draw_map(axes, rows[part], kinds, cells)
            axes.set_yticks(range(len(rows[part])), names[part])
            axes.set_ylim(height - 0.5, -0.5)  # a shorter last column has blocks of the same height
        if alone:
            grid[0, 0].set_title(alone, fontsize=9)
        _add_map_legend(figure, list(cells.values()), apart)
    return figure


def _cells(report: Any) -> dict[tuple[Row, str], _Cell]:
    """Return (row, kind) -> cell, in the order of the report."""
    if not isinstance(report, SparsityReport):
        raise TypeError(f"report is a {type(report).__name__}; what admm_nxm.verify or finalize() returns is needed")
    cells: dict[tuple[Row, str], _Cell] = {}
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


def _place(name: str) -> tuple[Row, str]:
    """Return where a weight stands: its block, and which of the block's weights it is."""
    # "bert.encoder.layer.0.output.dense.weight" is "output.dense" of block 0 of "bert.encoder.layer".
    name = name.removesuffix(".weight")
    match = re.match(r"(?:(.+?)\.)?(\d+)\.(.+)", name)
    if match is None:
        return (name, -1), _WHOLE
    return (match[1] or "block", int(match[2])), starred(match[3])


def _draw_map(axes: Axes, rows: Sequence[Row], kinds: Sequence[str], cells: Mapping[tuple[Row, str], _Cell]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shades = colormaps["Blues"]
    for (row, kind), cell in cells.items():
        if row not in rows:
            continue
        x, y = kinds.index(kind), rows.index(row)
        share = cell.zeros / cell.entries if cell.entries else 0.0
        # Up to 0.75 of the map's range, which gets too dark to tell apart after that.
        shade: dict[str, Any] = {"facecolor": shades(0.08 + 0.7 * share), "edgecolor": "white", "linewidth": 1.5}
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **(shade if cell.entries else _DENSE_LOOK)))
        if cell.bad:
            axes.add_patch(Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, **_BAD_LOOK))
        ink = "white" if share > 0.6 else "black"
        box = None if cell.entries else {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.text(x, y, cell.text, ha="center", va="center_baseline", fontsize=7.5, color=ink, bbox=box)
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _add_map_legend(figure: Figure, cells: Sequence[_Cell], apart: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    entries: list[tuple[int, str, dict[str, Any]]] = [
        (1, "share of zeros", {"facecolor": "#86bcdc"}),
        (sum(cell.bad > 0 for cell in cells), "× violates its pattern ({})", _BAD_LOOK),
        (sum(not cell.entries for cell in cells), "left dense ({})", _DENSE_LOOK),
        (sum(cell.dense > 0 and cell.entries > 0 for cell in cells), "* some of them left dense", _NO_LOOK),
        (sum(cell.unfit > 0 for cell in cells), "† not for sparse tensor cores ({})", _NO_LOOK),
    ]
    handles = [Patch(label=label.format(count), **look) for count, label, look in entries if count]
    if apart:
        label = f"left dense outside of the blocks: {len(apart)} ({such_as(apart)})"
        handles.append(Patch(label=label, **_NO_LOOK))
    figure.legend(handles=handles, loc="outside lower left", fontsize=8)


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
    share is written beside it, and each bin shows the other weights as a share of all. Weights are read one after the
    other, twice each, so that a checkpoint needs no more memory than its largest weight.

    Args:
        before: one tensor, or what :func:`admm_nxm.verify` takes: a module, a state dict, or the path of a checkpoint.
        after: the same model later, of any of these kinds.
        select: which weights: a :class:`~admm_nxm.Selection` (such as ``optimizer.selection``), names, or a regular
            expression that is matched against the whole name. None takes those that :class:`~admm_nxm.ADMMNxM` prunes
            by default.
        by: one panel for ``"all"`` weights, for each ``"kind"`` (over all blocks), or for each ``"weight"``.
        bins: number of bins between -4 and 4 times the root mean square of a panel's non-zero weights. A share beyond
            them is written into the panel.
        labels: names of the two.
        title: above all; none by default.

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
        few = f'at most {_PANELS_AT_MOST}; choose fewer weights by select=, or by="kind"'
        raise ValueError(f"{len(found)} panels are too many to read ({few})")
    with _drawing():
        columns = min(3, len(found))
        rows = math.ceil(len(found) / columns)
        width, height = (7.2, 3.6) if len(found) == 1 else (3.3 * columns, 2.3 * rows)
        figure = _new_figure(width, height + 0.4, title)
        for number, (name, counts) in enumerate(found.items(), 1):
            axes = figure.add_subplot(rows, columns, number)
            _draw_histogram(axes, counts, labels)
            size = f"{len(counts.names)} weights, {counts.total:,} entries"
            axes.set_title(size if by == "all" else f"{name}\n{size}" if by == "kind" else name, fontsize=9)
        figure.supylabel("share of all weights, per bin", fontsize="medium")
        _add_legend(figure)
    return figure


def _draw_histogram(axes: Axes, counts: Counts, labels: tuple[str, str]) -> None:
    from matplotlib.ticker import PercentFormatter

    total = max(1, counts.total)
    edges = counts.edges.tolist()
    before, after = (counts.counts.double() / total).tolist()
    axes.stairs(before, edges, fill=True, facecolor="#cfcfcf", edgecolor="#9a9a9a", label=_visible(labels[0]))
    axes.stairs(after, edges, color="#0072b2", linewidth=1.4, label=_visible(labels[1]))
    axes.set_ylim(0, 1.35 * (max(before + after) or 1.0))  # room for what is written about the zeros
    axes.set_xlim(edges[0], edges[-1])
    lines = []
    for label, zeros, beyond in zip(labels, counts.zeros, counts.beyond, strict=True):
        if zeros:
            lines.append(f"{label}: {_percent(zeros / total)} zero")
        if beyond:
            lines.append(f"{label}: {_percent(beyond / total)} beyond the axis")
    if any(counts.zeros):
        axes.axvline(0, color="#222222", linestyle="--", linewidth=1.3, label="exactly zero, in no bin")
    axes.annotate("\n".join(lines), (0.015, 0.975), xycoords="axes fraction", va="top", fontsize=7.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.locator_params(axis="x", nbins=7)


def _percent(share: float) -> str:
    """Return a share above 0 in percent, so that what is little does not read as nothing, nor nearly all as all."""
    if share == 1:
        return "100%"
    texts = (f"{share:.{digits}%}" for digits in itertools.count(1))
    return next(text for text in texts if float(text[:-1]) not in (0, 100))
