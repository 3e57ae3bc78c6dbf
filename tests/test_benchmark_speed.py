"""examples/benchmarks/speed: the harness against figures by hand, the report on made-up records, and tiny runs.

Times are never asserted.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from admm_nxm import Pattern, Solved, keep_mask

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "speed"
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


common, weights, contestants = map(load, ("common", "weights", "contestants"))
step, train, solve, inference = map(load, common.BENCHMARKS)
report, run = load("speed_report"), load("run")
Spread, Variant, Column, Table = common.Spread, common.Variant, common.Column, common.Table


# ------------------------------------------------------------------------------------------------------- harness


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    spread = Spread((4.0, 1.0, 3.0, 2.0))
    assert (spread.low, spread.median, spread.high) == (1.75, 2.5, 3.25)
    assert Spread((7.0,)).low == Spread((7.0,)).high == 7.0
    assert Spread((1.0, 2.0)).times(3.0).rounds == (3.0, 6.0)
    with pytest.raises(ValueError, match="one round"):
        Spread(())


def test_ratios_are_taken_round_by_round() -> None:
    timings = common.Timings({"slow": [4.0, None, 9.0], "base": [2.0, 5.0, 3.0]})
    assert timings.ratio("slow", "base").rounds == (2.0, 3.0)
    assert timings.spread("slow").rounds == (4.0, 9.0)


def record_calls(times: dict[str, float], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], Any]:
    """Time variants that take these many seconds each by a clock that says so."""
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in times]
    stopwatch = lambda call, count, device: ([call() for _ in range(count)], times[calls[-1]] * count)[1]  # noqa: E731
    monkeypatch.setattr(common, "stopwatch", stopwatch)
    return calls, common.interleave(variants, device=CPU, warmup=1, **options)


def test_every_round_times_every_variant_once_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"a": 0.01, "b": 0.02, "c": 0.03}
    calls, timings = record_calls(times, monkeypatch, rounds=12, seed=1)
    rounds = [calls[first : first + 3] for first in range(3, len(calls), 3)]  # after the warm-up
    assert len(rounds) == 12
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(map(tuple, rounds))) > 2
    again, _ = record_calls(times, monkeypatch, rounds=12, seed=1)
    assert again == calls
    assert timings.seconds == {name: [seconds] * 12 for name, seconds in times.items()}


def test_short_calls_are_repeated_and_long_ones_sit_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, timings = record_calls({"short": 0.001, "long": 4.0}, monkeypatch, rounds=10, seed=0)
    assert calls.count("short") == 1 + 10 * 5
    assert calls.count("long") == 1 + 5  # patience for 2 s a round
    assert [value is None for value in timings.seconds["long"]] == [False, True] * 5
    assert timings.seconds["short"] == [pytest.approx(0.001)] * 10
    _, timings = record_calls({"endless": 100.0}, monkeypatch, rounds=10, seed=0)
    assert sum(value is not None for value in timings.seconds["endless"]) == 3


def test_times_are_for_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "stopwatch", lambda call, count, device: 0.5 * count)
    timings = common.interleave([Variant("ten", lambda: None, 10)], rounds=1, device=CPU, seed=0)
    assert timings.seconds == {"ten": [0.05]}


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, "number", ""),
        ("word", "number", "word"),
        (0.12345, "number", "0.123"),
        (1.2345, "number", "1.23"),
        (12.345, "number", "12.3"),
        (123.45, "number", "123"),
        (-0.0, "number", "0.000"),
        (0.0123, "percent", "1.2 %"),
        (6.54, "factor", "6.54x"),
        (Spread((1.0, 2.0, 3.0)), "number", "2.00 [1.50, 2.50]"),
        (Spread((0.5, 0.5, 0.5)), "percent", "50.0 % [50.0, 50.0]"),
        (Spread((2.0,)), "factor", "2.00x"),
    ],
)
def test_cells(value: object, kind: str, text: str) -> None:
    assert common.cell(value, kind) == text


def test_markdown() -> None:
    columns = [Column("a", "name", "text"), Column("b", "value")]
    rows = [{"a": "x|y", "b": 1.0}, {"a": "long one"}]
    lines = ["| name | value |", "| --- | ---: |", "| x\\|y | 1.00 |", "| long one |  |"]
    assert common.markdown(columns, rows).splitlines() == lines
    aligned = common.markdown(columns, rows, aligned=True).splitlines()
    assert len({len(line) for line in aligned}) == 1


def options_of(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"tiny": False, "output": None, **values})


def a_table() -> Any:
    rows = [{"a": "x", "b": Spread((1.0, 2.0)), "c": 1 / 3}, {"a": "y", "b": None}]
    return Table("A title", [Column("a", "name", "text"), Column("b", "ratio")], rows, ["A note."], {"x": [0.1, None]})


def test_a_record_comes_back_from_json(tmp_path: Path) -> None:
    record = common.record_of("step", a_table(), CPU, options_of(dtype="float32"), "python step.py")
    path = tmp_path / "new" / "record.json"
    common.write_record(record, path)
    assert common.read_record(path) == record == json.loads(path.read_text(encoding="utf-8"))
    table = common.table_of(record)
    assert table.rows[0] == {"a": "x", "b": Spread((1.0, 2.0)), "c": pytest.approx(1 / 3, rel=1e-5)}
    assert table.seconds == {"x": [0.1, None]}
    assert record["device"]["kind"] == "cpu"
    assert record["device"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert "output" not in record["options"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmark": "step"}'])
def test_what_is_no_record_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(common.BenchmarkError, match=r"bad\.json is no record"):
        common.read_record(path)


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("28_000_000", 28_000_000), ("28M", 28_000_000), ("1e6", 1_000_000), ("1.5k", 1500)]
)
def test_numbers_on_the_command_line(text: str, number: int) -> None:
    assert common.count(text) == number
    assert common.counts(f"{text},2") == [number, 2]


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        common.count(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device abacus is no device"),
        (["--device", "meta"], "cpu and cuda only"),
        (["--threads", "100000"], "may use"),
    ],
)
def test_what_is_not_here_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.run(["--tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.run(["--tiny", "--device", "cuda"]) == 2
    assert "finds no CUDA device; give --device cpu" in capsys.readouterr().err


def test_threads_are_set_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "cores", lambda: 64)
    before = torch.get_num_threads()
    with common.threads_of(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def run_main(
    module: ModuleType, arguments: Sequence[str], path: Path, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Run a benchmark; what it prints must be the one table of its record."""
    assert module.run(["--tiny", *arguments, "--output", str(path)]) == 0
    record: dict[str, Any] = common.read_record(path)
    printed = capsys.readouterr().out
    table = common.table_of(record)
    rules = [line for line in printed.splitlines() if line.startswith("| ---")]
    assert len(rules) == (1 if table.rows else 0)
    assert all(note in printed for note in table.notes)
    assert record["tiny"] is True
    assert record["command"].endswith(" ".join([f"{record['benchmark']}.py --tiny", *arguments]))
    return record


# ---------------------------------------------------------------------------------------------------- the scripts


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    record = run_main(step, ["--weights", "50000"], tmp_path / "step.json", capsys)
    rows = {row["what"]: row for row in common.table_of(record).rows}
    state = {what: row["state"] for what, row in rows.items() if what != "torchao PAT"}
    assert state == {
        "AdamW (fused)": 0.0,
        "AdamW again": 0.0,
        "dense phase": 1.0,  # the mask, which is all true until the solve
        "frozen phase": 1.0,
        "the paper's form": 5.0,  # the consensus and the mask
        "two buffers, naive": 8.0,
        "ASP-style mask": 1.0,
        "ELSA-style": 9.0,
    }
    for row in rows.values():
        assert all(value > 0 for value in (row["step"].rounds if isinstance(row["step"], Spread) else [row["step"]]))


def test_step_sees_a_form_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants.TwoBuffers, "update", lambda self: None)
    with pytest.raises(AssertionError, match="two buffers disagree"):
        step.check(CPU, Pattern(2, 4), 0)


def test_step_sees_a_group_with_too_many() -> None:
    one = contestants.MaskedStep(weights.Weights([(8, 16)], torch.float32, CPU, 0), Pattern(2, 4))
    one.step()
    step.check_pattern(one, Pattern(2, 4))
    one.w[0].fill_(1.0)
    with pytest.raises(AssertionError, match="ASP-style mask: a group has more than 2"):
        step.check_pattern(one, Pattern(2, 4))


def test_the_rivals_do_what_their_equations_say() -> None:
    pattern, shapes = Pattern(2, 4), [(8, 16)]
    elsa = contestants.ElsaStyle(weights.Weights(shapes, torch.float32, CPU, 0), pattern)
    naive = contestants.TwoBuffers(weights.Weights(shapes, torch.float32, CPU, 0), pattern)
    for one in (elsa, naive):
        one.step()  # which makes AdamW's second moment
    with torch.no_grad():
        for one in (elsa, naive):
            one.u[0].normal_(0.0, 0.01)
            w, u, z, g = one.w[0].clone(), one.u[0].clone(), one.z[0].clone(), one.g[0].clone()
            one.add_penalty()
            torch.testing.assert_close(one.g[0], g + contestants.RHO * (w - z + u))
            one.update()
            a = w + u
            second = one.weights.inner.state[one.weights.params[0]]["exp_avg_sq"]
            mask = keep_mask(a.square() * second if one is elsa else a, pattern)
            torch.testing.assert_close(one.z[0], a * mask)
            torch.testing.assert_close(one.u[0], a - a * mask)
        masked = contestants.MaskedStep(weights.Weights(shapes, torch.float32, CPU, 0), pattern)
        masked.step()
        assert bool((masked.w[0][~masked.masks[0]] == 0).all())
        assert bool((masked.g[0][~masked.masks[0]] == 0).all())


def test_shapes_of_bert() -> None:
    assert sum(a * b for a, b in weights.shapes_of(weights.BERT_BASE)) == weights.BERT_BASE
    assert weights.shapes_of(weights.BERT_BASE)[:6] == [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    assert len(weights.shapes_of(1)) == 24


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    record = run_main(train, ["--rounds", "1"], tmp_path / "train.json", capsys)
    assert [row["phase"] for row in record["rows"]] == ["dense", "calibration", "frozen"]
    assert "the one step with the solve" in record["notes"][0]
    assert train.run(["--tiny", "--models", "gpt"]) == 2
    assert "--models gpt: choose from" in capsys.readouterr().err


def test_overhead_is_that_of_ten_steps_together() -> None:
    took = {"adamw": [(1.0, 0.1)] * 12, "admm": [(1.0, 0.1)] * 2 + [(1.0, 0.1)] * 9 + [(2.0, 0.6)]}
    found = train.figures(took, 2, 1)
    assert found["overhead"].rounds == (pytest.approx(0.1),)
    assert found["by_step"].rounds == (pytest.approx(0.05),)
    assert found["adamw"].rounds == (pytest.approx(0.1),)


def test_solve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_main(solve, ["--steps", "10"], tmp_path / "solve.json", capsys)
    (row,) = common.table_of(record).rows
    assert row["matrices"] == "6 in 2 blocks"
    for i in range(2):
        own = row["factorise"].rounds[i] + row["solve"].rounds[i]
        assert row["share"].rounds[i] == pytest.approx(own / (own + 10 * row["step"].rounds[i]), rel=1e-4)
    assert solve.run(["--tiny", "--models", "gpt"]) == 2
    assert "--models gpt: choose from" in capsys.readouterr().err


def test_blocks_have_the_sizes_of_the_models() -> None:
    sizes = {
        name: shape.blocks * sum(width * height for width, heights in shape.families for height in heights)
        for name, shape in solve.MODELS.items()
    }
    assert sizes["bert-base"] == 3 * weights.BERT_BASE
    assert sizes["llama-1b"] == 16 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 2048 * 8192)


def test_solve_sees_a_weight_that_is_not_sparse() -> None:
    result = Solved(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool), 0.5, 1)
    with pytest.raises(AssertionError, match="more than 2 of 4"):
        solve.check(result)


def test_inference_says_why_it_did_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run_main(inference, ["--device", "cpu"], tmp_path / "inference.json", capsys)
    assert record["ran"] is False
    assert record["rows"] == []
    assert "the device is cpu" in record["notes"][0]


def test_inference_compares_outputs() -> None:
    inference.check(torch.ones(2, 2), torch.ones(2, 2) * 1.001, "alike")
    with pytest.raises(AssertionError, match=r"one layer: .* differ by 10\.0%"):
        inference.check(torch.ones(2, 2), torch.ones(2, 2) * 1.1, "one layer")


# ---------------------------------------------------------------------------------------------------- the report


def made_up(benchmark: str, rows: list[dict[str, Any]], kind: str = "cpu", **changes: Any) -> dict[str, Any]:
    columns = [Column("what", "what", "text"), Column("step", "whole step / AdamW")]
    table = Table(f"The {benchmark} table", columns, rows, [f"A note on {benchmark}."])
    record = common.record_of(benchmark, table, CPU, options_of(), f"python {benchmark}.py --threads 2")
    device = {"kind": "cpu", "name": "A processor", "cores": 2, "threads": 2}
    if kind == "cuda":
        device = {"kind": "cuda", "name": "A GPU", "memory_gib": 140.0, "cuda": "13.0"}
    return {**record, "device": device, "versions": {"torch": "2.13.0"}, "commit": "abc", **changes}


def put(records: Sequence[dict[str, Any]], folder: Path) -> None:
    for record in records:
        name = f"speed-{record['device']['kind']}-{record['benchmark']}.json"
        common.write_record(record, folder / name)


ROWS = [{"what": "frozen phase", "step": Spread((0.9, 0.99, 1.1))}]


def test_the_page_has_commands_devices_and_what_is_missing(tmp_path: Path) -> None:
    put([made_up("step", ROWS), made_up("train", [], tiny=True)], tmp_path / "results")
    page = report.build(tmp_path / "results", tmp_path / "page.md")
    assert "`python step.py --threads 2`" in page
    assert "A processor, 2 cores, 2 threads; torch 2.13.0. [Raw record](results/speed-cpu-step.json)" in page
    assert "- A note on step." in page
    assert page.count("A tiny run") == 1
    assert page.count("Not yet timed. On a machine with a GPU: `python examples/benchmarks/speed/run.py`") == 1
    assert page.count("Not yet timed. On a machine with a CPU") == len(common.BENCHMARKS) - 2


def test_check_sees_a_page_that_is_not_what_the_records_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    arguments = ["--results", str(tmp_path), "--output", str(page)]
    put([made_up("step", ROWS)], tmp_path)
    assert report.run([*arguments, "--check"]) == 1  # there is no page yet
    assert report.run(arguments) == 0
    assert report.run([*arguments, "--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("0.990", "0.900"), encoding="utf-8")
    capsys.readouterr()
    assert report.run([*arguments, "--check"]) == 1
    shown = capsys.readouterr().out
    assert "-| frozen phase | 0.900" in shown
    assert "0.900" in page.read_text(encoding="utf-8")  # nothing was written


def test_records_that_do_not_belong_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common.write_record(made_up("train", []), tmp_path / "speed-cpu-step.json")
    assert report.run(["--results", str(tmp_path), "--output", str(tmp_path / "page.md")]) == 2
    assert "its name says otherwise" in capsys.readouterr().err
    put([made_up("step", [], tiny=True)], tmp_path)
    assert report.run(["--results", str(tmp_path), "--check"]) == 2
    assert "a tiny run; it does not belong in docs" in capsys.readouterr().err


def test_the_repository_has_the_page_that_its_records_give() -> None:
    if not (report.DOCS / "performance.md").is_file():
        pytest.skip("nothing has been timed yet")
    assert report.run(["--check"]) == 0


def test_everything_in_one_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []

    class Done:
        def __init__(self, command: list[str]) -> None:
            started.append(command[1:])
            self.returncode = int(command[1].endswith("train.py"))

    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: Done(command))
    assert run.run(["--device", "cpu", "--results", str(tmp_path), "--tiny"]) == 1  # one of them failed
    names = [Path(command[0]).stem for command in started]
    assert names == [*common.BENCHMARKS, "speed_report"]
    assert started[0][1:] == ["--tiny", "--device", "cpu", "--output", str(tmp_path / "speed-cpu-step.json")]
    assert run.run(["--tiny"]) == 2  # it would write over real figures
    assert run.run(["--device", "abacus"]) == 2
