"""The pictures: what is drawn is what was given, in files that appear whole and always with the same bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from admm_nxm import ADMMNxM, Pattern, project, verify
from admm_nxm.io import verify as verifying
from admm_nxm.report import histogram, model_report
from admm_nxm.report.history import Recorder
from admm_nxm.report.plots import plot_history, plot_model_error, plot_sparsity, plot_weights, save_figure
from admm_nxm.selection import SkippedWeight, select_weights
from admm_nxm.sparsity import SparsityReport, WeightReport
from tests.helpers import make_net

np = pytest.importorskip("numpy")
matplotlib = pytest.importorskip("matplotlib")

PRIMAL, DUAL, CHURN, RHO = "admm/primal_residual", "admm/dual_residual", "admm/mask_churn", "admm/rho"


def log_history(steps=10, pruned_at=8, paper=True):
    """Rows as Trainer has them, with evaluations between, and a last one with times."""
    rows = []
    for step in range(1, steps + 1):
        frozen = step >= pruned_at
        row = {"step": step, "epoch": step / 5, "loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
        early = "admm" if paper else "dense" if step < pruned_at - 2 else "calibration"
        row |= {"admm/phase": "frozen" if frozen else early, "admm/sparsity": 0.5 * frozen}
        if frozen:
            row["admm/pruned_at"] = pruned_at
        if frozen and not paper:
            row["admm/model_error"] = 0.0123
        if paper:
            row |= {PRIMAL: 0.0 if frozen else 0.5**step, RHO: 0.0 if step == 1 else 10.0 ** (step - 5)}
        if paper and step > 2:
            row |= {DUAL: 0.0 if frozen else 0.1 / step, CHURN: 0.0 if frozen else 0.2 / step}
        rows.append(row)
        if step % 5 == 0:
            rows.append({"step": step, "epoch": step / 5, "eval_loss": 4 / step, "eval_runtime": 1.0})
    rows.append({"step": steps, "epoch": steps / 5, "train_runtime": 3.0, "train_loss": 1.0})
    return rows


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def data(line):
    return [tuple(map(float, point)) for point in zip(*line.get_data(), strict=True)]


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


# ---------------------------------------------------------------------- curves


def test_lines_are_the_history():
    rows = log_history()
    drawn = panels(plot_history(rows))
    assert list(drawn) == ["loss", "share of zeros", "primal residual", "dual residual", "mask churn", "penalty rho"]
    for axes, key in zip(drawn.values(), ("loss", "admm/sparsity", PRIMAL, DUAL, CHURN, RHO), strict=True):
        assert data(line(axes, "_run")) == [(row["step"], row[key]) for row in rows if key in row]
    assert data(line(drawn["loss"], "evaluation")) == [(5, 0.8), (10, 0.4)]
    scales = [axes.get_yscale() for axes in drawn.values()]
    assert scales == ["linear", "linear", "log", "linear", "linear", "log"]
    assert [axes.get_xlabel() for axes in drawn.values()] == ["", "", "", "", "step", "step"]


def spans(axes):
    # A span is a rectangle in data coordinates along x.
    return {p.get_label(): (p.get_x(), p.get_x() + p.get_width()) for p in axes.patches}


def test_phases_and_the_solve():
    rows = log_history(paper=False)
    figure = plot_history(rows)
    assert list(panels(figure)) == ["loss", "share of zeros"]
    for axes in figure.axes:
        assert spans(axes) == {"dense": (1, 6), "calibration": (6, 8), "frozen": (8, 10)}
        assert list(line(axes, "weights pruned after step 8, model error 0.012").get_xdata()) == [8, 8]
    assert {"dense", "calibration", "frozen"} < set(legend(figure))
    # The step of the solve is exact, however seldom somebody read.
    seldom = plot_history([row for row in rows if row["step"] in (1, 10)])
    assert spans(seldom.axes[0]) == {"dense": (1, 8), "frozen": (8, 10)}


def test_steps_are_whole_numbers_and_a_run_may_be_short_and_dense():
    figure = plot_history(log_history(steps=2, pruned_at=9, paper=False))
    assert spans(figure.axes[0]) == {"dense": (1, 2)}
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())
    assert not any("pruned" in text for text in legend(figure))


def test_several_runs_differ_in_colour_and_dashes():
    runs = {f"run {i}": log_history(pruned_at=4 + i) for i in range(6)}
    runs["never frozen"] = [row for row in log_history(pruned_at=99) if row["step"] < 3]
    figure = plot_history(runs, title="all of them")
    assert figure.get_suptitle() == "all of them"
    axes = panels(figure)["primal residual"]
    looks = set()
    for name, rows in runs.items():
        drawn = line(axes, name)
        assert data(drawn) == [(row["step"], row[PRIMAL]) for row in rows if PRIMAL in row]
        looks.add((drawn.get_color(), drawn._unscaled_dash_pattern[1] and tuple(drawn._unscaled_dash_pattern[1])))
    assert len(looks) == len(runs)
    freezes = [next(iter(line.get_xdata())) for line in axes.lines if line.get_label() == "_freeze"]
    assert freezes == [4, 5, 6, 7, 8, 9]
    assert {*runs, "weights pruned"} <= set(legend(figure))


def test_names_that_begin_with_an_underscore_are_in_the_legend():
    runs = {"_first": log_history(), "second": log_history()}
    assert {" _first", " _first, evaluation", "second"} <= set(legend(plot_history(runs)))
    net = make_net()
    assert legend(plot_weights(net, net, labels=("_a", "b"))) == [" _a", "b"]


def test_live_run_saved_run_and_checkpoint_give_the_same_picture(tmp_path):
    net = make_net()
    recorder = Recorder(ADMMNxM(torch.optim.SGD(net.parameters()), net, total_steps=40), log_history())
    saved = recorder.save(tmp_path / "h.jsonl")
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": recorder.rows}))
    pictures = [recorder, recorder.rows, saved, str(state), tuple(recorder.rows)]
    drawn = [[repr(data(axes.lines[0])) for axes in plot_history(history).axes] for history in pictures]
    assert drawn == drawn[:1] * len(pictures)
    assert all(len(axes.lines[0].get_xdata()) > 5 for axes in plot_history(saved).axes)


def test_nan_and_infinity_are_gaps_and_no_error(tmp_path):
    rows = log_history()
    rows[3]["loss"], rows[4]["loss"], rows[2][PRIMAL] = math.nan, math.inf, math.nan
    figure = plot_history(rows)
    drawn = data(line(panels(figure)["loss"], "_run"))
    assert math.isnan(drawn[3][1])
    assert drawn[4][1] == math.inf
    assert save_figure(figure, tmp_path / "h.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("history", "kind", "said"),
    [
        ([], ValueError, "the history has 0 rows with a step"),
        ([{"step": 1, "loss": 1.0}], ValueError, "has 1 rows with a step and none with a figure of ADMM"),
        ([{"admm/phase": "dense"}], ValueError, "0 rows with a step"),
        (
            [{"step": 1, "admm/phase": "admm", PRIMAL: "big"}],
            ValueError,
            "'admm/primal_residual' or a step that is no number: .*'big'",
        ),
        ({}, ValueError, "a run at least is needed"),
        ({"a": [1]}, TypeError, "run 'a' is a list; trainer.state.log_history"),
        (7, TypeError, "the history is a int"),
        ([log_history()], TypeError, "the history is a list"),
    ],
)
def test_bad_history(history, kind, said):
    with pytest.raises(kind, match=said):
        plot_history(history)


def test_history_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_history(tmp_path / "absent.jsonl")


# ---------------------------------------------------------------------- model errors


def test_model_errors_have_a_line_for_each_kind_of_weight():
    errors = {f"layer.{block}.{kind}.weight": 0.01 * (block + 1) for block in range(3) for kind in ("up", "down")}
    errors |= {"layer.1.experts.0.w": 0.2, "layer.1.experts.1.w": 0.4, "pooler.dense.weight": 2.0}
    figure = plot_model_error(errors, title="which")
    (axes,) = figure.axes
    assert data(line(axes, "up")) == data(line(axes, "down")) == [(0, 0.01), (1, 0.02), (2, 0.03)]
    assert data(line(axes, "experts.*.w")) == [(1, pytest.approx(0.3))]
    assert set(line(axes, "pooler.dense").get_ydata()) == {2.0}
    assert axes.get_yscale() == "log"
    assert len(legend(figure)) == 4
    both = plot_model_error({"encoder.0.w.weight": 0.1, "decoder.0.w.weight": 0.2})
    assert legend(both) == ["encoder: w", "decoder: w"]
    with pytest.raises(ValueError, match="no weight was solved yet"):
        plot_model_error({})


# ---------------------------------------------------------------------- map of the zeros

KINDS = ["attention.self.query", "output.dense"]


def weight(name, zeros=32, bad=0):
    return WeightReport(name, (4, 16), Pattern(2, 4), 1, 16, bad, zeros)


def cells(figure):
    """(row label, kind) -> text, of all columns of the map."""
    found = {}
    for axes in figure.axes:
        rows = [label.get_text() for label in axes.get_yticklabels()]
        kinds = [label.get_text() for label in axes.get_xticklabels()]
        for text in axes.texts:
            x, y = text.get_position()
            found[rows[round(y)], kinds[round(x)]] = text.get_text()
    return found


def test_cells_hold_the_shares_in_the_order_of_the_blocks():
    names = [f"bert.encoder.layer.{i}.{kind}.weight" for i in (0, 1, 10, 11, 2) for kind in KINDS]
    report = SparsityReport(tuple(weight(name, zeros=i) for i, name in enumerate(names)))
    figure = plot_sparsity(report, title="map")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "bert.encoder.layer"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "10", "11"]
    assert [label.get_text() for label in axes.get_xticklabels()] == KINDS
    expected = {}
    for i, name in enumerate(names):
        expected[name.split(".")[3], KINDS[i % 2]] = f"{i / 64:.0%}"
    assert cells(figure) == expected
    assert figure.get_suptitle() == "map"
    assert legend(figure) == ["share of zeros"]


def test_violations_and_dense_weights_are_marked():
    report = SparsityReport(
        (weight("h.0.a.weight"), weight("h.0.b.weight", zeros=30, bad=1), weight("h.1.a.weight")),
        (SkippedWeight("h.1.b.weight", (4, 6), "6 is no multiple of 4", wanted=True),),
    )
    figure = plot_sparsity(report)
    assert cells(figure) == {("0", "a"): "50%", ("0", "b"): "47% ×", ("1", "a"): "50%", ("1", "b"): "dense"}
    (axes,) = figure.axes
    frames = [p for p in axes.patches if not p.get_fill()]
    hatched = [p for p in axes.patches if p.get_hatch()]
    assert [tuple(p.get_center().round()) for p in frames] == [(1, 0)]
    assert [tuple(p.get_center().round()) for p in hatched] == [(1, 1)]
    assert legend(figure) == ["share of zeros", "× violates its pattern (1)", "left dense (1)"]


def test_experts_share_a_cell():
    names = [f"layers.{i}.experts.{e}.w1.weight" for i in (0, 1) for e in range(3)]
    report = SparsityReport(
        tuple(weight(name, zeros=16 * (i % 3 + 1), bad=int(i == 4)) for i, name in enumerate(names)),
        (SkippedWeight("layers.0.experts.3.w1.weight", (4, 6), "no", wanted=True),),
    )
    kind = "experts.*.w1"
    figure = plot_sparsity(report)
    assert cells(figure) == {("0", kind): "50% *", ("1", kind): "50% ×"}
    assert "* some of them left dense" in legend(figure)


def test_stacks_and_weights_outside_of_blocks_have_rows_of_their_own():
    names = ["shared.weight", "encoder.block.0.q.weight", "decoder.block.0.q.weight", "decoder.block.1.q.weight"]
    figure = plot_sparsity(SparsityReport(tuple(map(weight, names))))
    (axes,) = figure.axes
    rows = ["encoder.block.0", "decoder.block.0", "decoder.block.1", "shared"]
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    assert cells(figure) == {**{(row, "q"): "50%" for row in rows[:3]}, ("shared", "whole"): "50%"}


def test_blocks_of_a_sequential():
    figure = plot_sparsity(SparsityReport((weight("0.fc.weight"), weight("1.fc.weight"))))
    assert cells(figure) == {("0", "fc"): "50%", ("1", "fc"): "50%"}


@pytest.mark.parametrize(("blocks", "columns"), [(6, 1), (40, 1), (41, 2), (80, 2), (126, 4)])
def test_many_blocks_stand_side_by_side(blocks, columns):
    report = SparsityReport(
        tuple(weight(f"layers.{i}.{kind}.weight", zeros=i % 64) for i in range(blocks) for kind in KINDS)
    )
    figure = plot_sparsity(report)
    assert len(figure.axes) == columns
    found = cells(figure)
    assert found == {(str(i), kind): f"{i % 64 / 64:.0%}" for i in range(blocks) for kind in KINDS}
    width, height = figure.get_size_inches()
    assert max(width, height) < 16
    # No text is wider than its cell, nor higher.
    figure.draw_without_rendering()
    axes = figure.axes[0]
    (x0, y0), (x1, y1) = axes.transData.transform([(0, 1), (1, 0)])
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.width < x1 - x0
        assert box.height < y1 - y0


def test_report_of_a_whole_model():
    net = make_net()
    with torch.no_grad():
        net.blocks[0].up.weight.copy_(project(net.blocks[0].up.weight, "2:4"))
    figure = plot_sparsity(model_report(net, "2:4"))
    found = cells(figure)
    assert found.keys() == {(str(i), kind) for i in (0, 1) for kind in ("up", "down")}
    assert found["0", "up"] == "50% †"
    assert "×" in found["1", "up"]
    # 8 wide: no sparse tensor core takes it.
    assert all("†" in text for text in found.values())
    assert "† not for sparse tensor cores (4)" in legend(figure)
    assert "left dense outside of the blocks: 1 (head)" in legend(figure)


def test_nothing_but_dense_weights_outside_of_blocks():
    skipped = tuple(SkippedWeight(f"{name}.weight", (4, 6), "no", wanted=True) for name in ("a", "b"))
    assert cells(plot_sparsity(SparsityReport((), skipped))) == {("a", "whole"): "dense", ("b", "whole"): "dense"}


def test_weights_that_sparse_tensor_cores_take_have_no_dagger():
    weight = project(torch.randn(32, 64), "2:4").bfloat16()
    figure = plot_sparsity(model_report({"h.0.fc.weight": weight}))
    assert cells(figure) == {("0", "fc"): "50%"}


@pytest.mark.parametrize(
    ("report", "kind", "said"),
    [
        (SparsityReport(()), ValueError, "the report has no weight"),
        ({"a": 1}, TypeError, "report is a dict; what admm_nxm.verify or finalize"),
    ],
)
def test_bad_report(report, kind, said):
    with pytest.raises(kind, match=said):
        plot_sparsity(report)


# ---------------------------------------------------------------------- histograms


def stairs(axes, label):
    (found,) = [p for p in axes.patches if p.get_label() == label]
    values, edges, _ = found.get_data()
    return np.asarray(values), np.asarray(edges)


def pruned(net):
    sparse = make_net()
    sparse.load_state_dict(net.state_dict())
    with torch.no_grad():
        for block in sparse.blocks:
            for layer in (block.up, block.down):
                layer.weight.copy_(project(layer.weight, "2:4"))
    return sparse


def flat(net, names=None):
    chosen = names or [w.name for w in verify(net, "2:4")]
    params = dict(net.named_parameters())
    return np.concatenate([params[name].detach().numpy().ravel().astype(np.float64) for name in chosen])


def test_counts_are_those_of_numpy_and_zeros_stand_apart():
    before, after = make_net(), pruned(make_net())
    figure = plot_weights(before, after, bins=31)
    (axes,) = figure.axes
    for label, net in (("before", before), ("after", after)):
        values = flat(net)
        shares, edges = stairs(axes, label)
        counts, _ = np.histogram(values[values != 0], edges)
        assert np.array_equal(np.rint(shares * values.size), counts)
        assert counts.sum() == np.count_nonzero(values)
    assert len(edges) == 32
    assert edges[0] == -edges[-1]
    assert [text.get_text() for text in axes.texts] == ["after: 50.0% zero"]
    assert list(line(axes, "exactly zero, in no bin").get_xdata()) == [0, 0]
    assert axes.get_title(loc="left") == f"4 weights, {flat(before).size:,} entries"
    assert axes.get_ylim()[1] < 1.5 * max(stairs(axes, "before")[0].max(), stairs(axes, "after")[0].max())


def test_bins_hold_their_lower_bound_and_the_last_its_upper_one():
    t = torch.tensor([[-4.0, -2.0, 0.0, 2.0, 4.0, 4.0, -0.0, 1.0]])
    figure = plot_weights(t, t, bins=4, select=["weight"])
    shares, edges = stairs(figure.axes[0], "before")
    assert list(edges) == [-4, -2, 0, 2, 4]
    assert list(shares * 8) == [1, 1, 1, 3]
    assert figure.axes[0].texts[0].get_text() == "before: 25.0% zero\nafter: 25.0% zero"


def test_what_lies_beyond_the_bins_is_written_into_the_picture():
    t = torch.full((1000,), 0.01)
    t[:2] = torch.tensor([5.0, -7.0])
    (axes,) = plot_weights(t, torch.ones(1000), bins=10).axes
    assert axes.texts[0].get_text() == "before: 0.2% beyond the axis"
    shares, edges = stairs(axes, "before")
    assert edges[-1] == 4.0  # 4 times the root mean square of the ones
    assert round(shares.sum() * 1000) == 998


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_every_dtype_is_counted(dtype):
    t = torch.randn(40, 8).to(dtype)
    (axes,) = plot_weights(t, t, bins=20).axes
    values = t.double().numpy().ravel()
    shares, edges = stairs(axes, "after")
    inside = values[(values != 0) & (np.abs(values) <= edges[-1])]
    assert np.array_equal(np.rint(shares * values.size), np.histogram(inside, edges)[0])


def test_parts_give_the_counts_of_the_whole(monkeypatch):
    before, after = make_net(), pruned(make_net())
    whole = [stairs(plot_weights(before, after).axes[0], label) for label in ("before", "after")]
    monkeypatch.setattr(histogram, "_PART", 7)
    parts = [stairs(plot_weights(before, after).axes[0], label) for label in ("before", "after")]
    for (values, edges), (others, other_edges) in zip(whole, parts, strict=True):
        assert np.allclose(edges, other_edges, rtol=1e-12)
        assert np.array_equal(values, others)


def test_modules_state_dicts_and_files_give_the_same_picture(tmp_path):
    before, after = make_net(), pruned(make_net())
    save_file({k: v.contiguous() for k, v in before.state_dict().items()}, tmp_path / "before.safetensors")
    (tmp_path / "after").mkdir()
    save_file({k: v.contiguous() for k, v in after.state_dict().items()}, tmp_path / "after" / "model.safetensors")
    sides = [
        (before, after),
        (before.state_dict(), after),
        (tmp_path / "before.safetensors", str(tmp_path / "after")),
        (before, after.state_dict()),
    ]
    written = {save_figure(plot_weights(*pair), tmp_path / "w.svg").read_bytes() for pair in sides}
    assert len(written) == 1


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
    ],
)
def test_files_with_the_names_of_wrappers_are_read(tmp_path, rename):
    net = make_net()
    save_file({rename(k): v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "m.safetensors")
    file = tmp_path / "m.safetensors"
    written = {save_figure(plot_weights(side, net), tmp_path / "w.svg").read_bytes() for side in (net, file)}
    assert len(written) == 1
    assert set(panels(plot_weights(file, file, by="weight"))) == set(panels(plot_weights(net, net, by="weight")))


def test_files_are_read_one_weight_at_a_time(tmp_path, monkeypatch):
    net = make_net()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "m.safetensors")
    read = []
    opened = verifying.open_checkpoint

    def watch(path, **options):
        checkpoint = opened(path, **options)
        get = checkpoint.get
        monkeypatch.setattr(checkpoint, "get", lambda name: (read.append(name), get(name))[1], raising=False)
        return checkpoint

    monkeypatch.setattr(verifying, "open_checkpoint", watch)
    plot_weights(tmp_path / "m.safetensors", tmp_path / "m.safetensors", select=r"blocks\.0\.up\.weight")
    assert read == ["blocks.0.up.weight"] * 4  # two sides, twice each; nothing else


def test_panels_by_kind_and_by_weight():
    before, after = make_net(), pruned(make_net())
    names = [w.name for w in verify(before, "2:4")]
    by_kind = panels(plot_weights(before, after, by="kind", bins=16))
    assert list(by_kind) == ["up\n2 weights, 256 entries", "down\n2 weights, 256 entries"]
    by_weight = plot_weights(before, after, by="weight", bins=16)
    assert list(panels(by_weight)) == names
    assert len(by_weight.axes) == 4  # of the six places of the grid
    for kind, axes in zip(("up", "down"), by_kind.values(), strict=True):
        values = flat(before, [name for name in names if f".{kind}." in name])
        shares, edges = stairs(axes, "before")
        inside = values[np.abs(values) <= edges[-1]]
        assert np.array_equal(np.rint(shares * values.size), np.histogram(inside, edges)[0])


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (r"blocks\.1\..*", ["blocks.1.up.weight", "blocks.1.up.bias", "blocks.1.down.weight", "blocks.1.down.bias"]),
        (["head.weight"], ["head.weight"]),
        (None, [f"blocks.{i}.{kind}.weight" for i in (0, 1) for kind in ("up", "down")]),
    ],
)
def test_selection(select, names):
    net = make_net()
    assert set(panels(plot_weights(net, net, select=select, by="weight"))) == set(names)


def test_selection_of_an_optimizer():
    net = make_net()
    selection, _ = select_weights(net, select={r"blocks\.0\.up\.weight": "2:4"})
    assert list(panels(plot_weights(net, net, select=selection, by="weight"))) == ["blocks.0.up.weight"]


def test_labels():
    figure = plot_weights(make_net(), pruned(make_net()), labels=("dense", "2:4"), title="both")
    assert legend(figure) == ["dense", "2:4", "exactly zero, in no bin"]
    assert figure.get_suptitle() == "both"


@pytest.mark.parametrize(
    ("zeros", "said"), [(1, "0.1% zero"), (999, "99.9% zero"), (1000, "100% zero"), (500, "50.0% zero")]
)
def test_shares_of_zeros_are_not_rounded_to_none_or_all(zeros, said):
    t = torch.ones(1000)
    t[:zeros] = 0
    (axes,) = plot_weights(torch.ones(1000), t).axes
    assert axes.texts[0].get_text() == f"after: {said}"


def test_few_zeros_of_many():
    t = torch.ones(1_000_000)
    t[:3] = 0
    (axes,) = plot_weights(t, torch.ones(1_000_000)).axes
    assert axes.texts[0].get_text() == "before: 0.0003% zero"


def test_nothing_but_zeros(tmp_path):
    figure = plot_weights(torch.zeros(8), torch.zeros(8))
    assert figure.axes[0].texts[0].get_text() == "before: 100% zero\nafter: 100% zero"
    assert save_figure(figure, tmp_path / "z.svg").is_file()


def bad_weights():
    net = make_net()
    infinite = make_net()
    infinite.blocks[1].up.weight.data[3, 2] = math.inf
    lacking = {k: v for k, v in net.state_dict().items() if "down" not in k}
    wide = net.state_dict() | {"blocks.0.up.weight": torch.zeros(3, 4)}
    meta = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Tanh())])
    many = {f"layers.{i}.fc.weight": torch.zeros(2, 4) for i in range(49)}
    return [
        (net, infinite, {}, ValueError, "'blocks.1.up.weight' has NaN or infinite entries after"),
        (infinite, net, {}, ValueError, "'blocks.1.up.weight' has NaN or infinite entries before"),
        (net, lacking, {}, ValueError, "'blocks.0.down.weight' is in before and not in after"),
        (net, wide, {}, ValueError, r"'blocks.0.up.weight' has shape \(16, 8\) before and \(3, 4\) after"),
        (net, 3, {}, TypeError, "cannot plot a int; a module, a state dict or a path is needed"),
        (meta, meta, {}, ValueError, "is on the meta device and has no entries"),
        (net, net, {"select": "nothing"}, ValueError, "select='nothing' matches none"),
        (net, net, {"select": "("}, ValueError, "is no regular expression"),
        (net, net, {"select": ["absent"]}, ValueError, "select names weight 'absent', and before has no such"),
        (net, net, {"select": []}, ValueError, r"select=\[\] matches none"),
        (net, net, {"select": 3}, TypeError, "select=3 must be a regular expression, names, or a Selection"),
        (net, net, {"by": "layer"}, ValueError, "by='layer' must be one of 'all', 'kind', 'weight'"),
        (net, net, {"bins": 1}, ValueError, "bins=1 must be a whole number from 2"),
        (net, net, {"bins": 2.5}, ValueError, "bins=2.5 must be a whole number"),
        (many, many, {"by": "weight"}, ValueError, "49 panels are too many to read"),
    ]


@pytest.mark.parametrize("number", range(len(bad_weights())))
def test_bad_weights(number):
    before, after, options, kind, said = bad_weights()[number]
    with pytest.raises(kind, match=said):
        plot_weights(before, after, **options)


def test_damaged_and_absent_checkpoints(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        plot_weights(tmp_path / "cut.safetensors", make_net())
    with pytest.raises(FileNotFoundError):
        plot_weights(tmp_path / "absent", make_net())


# ---------------------------------------------------------------------- files


def every_picture():
    net = make_net()
    return {
        "history": lambda: plot_history(log_history()),
        "model_error": lambda: plot_model_error({"layer.0.w": 0.1}),
        "sparsity": lambda: plot_sparsity(verify(pruned(net), "2:4")),
        "weights": lambda: plot_weights(net, pruned(net)),
    }


@pytest.mark.parametrize(
    ("picture", "kind"),
    [("history", "svg"), ("sparsity", "svg"), ("weights", "svg"), ("weights", "png"), ("weights", "pdf")],
)
def test_the_same_picture_gives_the_same_bytes(tmp_path, picture, kind):
    draw = every_picture()[picture]
    figure = draw()
    first = save_figure(figure, tmp_path / f"a.{kind}").read_bytes()
    assert save_figure(figure, tmp_path / f"b.{kind}").read_bytes() == first
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "black", "svg.hashsalt": "x", "savefig.dpi": 30}):
        assert save_figure(draw(), tmp_path / f"c.{kind}").read_bytes() == first
    assert first.startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[kind])
    assert b"<dc:date>" not in first
    assert len(list(tmp_path.iterdir())) == 3


def test_svg_lines_end_without_blanks_and_text_is_text(tmp_path):
    text = save_figure(every_picture()["sparsity"](), tmp_path / "s.svg").read_text()
    assert all(row == row.rstrip() for row in text.splitlines())
    assert ">50%</text>" in text


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '\.gif'; a picture ends in \.svg, \.png or \.pdf"):
        save_figure(every_picture()["history"](), tmp_path / "h.gif")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_picture_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "h.svg"
    path.write_text("old")
    figure = every_picture()["history"]()

    def fail(*args, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        save_figure(figure, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("h.svg", "old")]


GLOBAL = """
import sys
import admm_nxm
from admm_nxm.report.plots import plot_history, save_figure
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()  # reading its backend would look for a display
rows = [{"step": i, "admm/phase": "admm", "admm/rho": 1.0 * i} for i in range(5)]
save_figure(plot_history(rows), sys.argv[1])
assert dict.items(matplotlib.rcParams) == dict.items(before)
assert "matplotlib.pyplot" not in sys.modules
"""


def test_nothing_global_changes_and_no_display_is_needed(tmp_path):
    command = [sys.executable, "-W", "error", "-c", GLOBAL, str(tmp_path / "h.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "h.svg").is_file()


@pytest.mark.parametrize("call", ["plot_history", "plot_model_error", "plot_sparsity", "plot_weights", "save_figure"])
def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch, call):
    figure = every_picture()["history"]()
    calls = {
        **{f"plot_{name}": draw for name, draw in every_picture().items()},
        "save_figure": lambda: save_figure(figure, tmp_path / "h.svg"),
    }
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r'repository: pip install "\.\[plots\]"') as caught:
        calls[call]()
    assert "\n" not in str(caught.value)
