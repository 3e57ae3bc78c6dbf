"""The accuracy study's methods, runs, batches and plans, on a model of two matrices; nothing is downloaded."""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import operator
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from admm_nxm import ADMMNxM, Pattern, keep_mask
from admm_nxm.solver import model_error

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "accuracy"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


batches, methods, training, plans, records, study = map(
    load, ("batches", "methods", "training", "plans", "records", "study")
)

STEPS = 40
SETTINGS = {name: settings[0] for name, settings in plans.SETTINGS.items()}
short_run = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
pytestmark = short_run


class Toy(nn.Module):
    """Two layers to prune, with dropout, and the parts of the study's model that training.py relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])})
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, batch: Any) -> torch.Tensor:
        x = torch.nn.functional.one_hot(batch.ids % 8, 8).float().mean(1)
        up, down = self.encoder["layer"]
        return self.head(self.dropout(x + down(torch.tanh(up(x)))))


def encoded(count: int) -> Any:
    split = object.__new__(batches.Encoded)
    split.ids = [[101 + row % 5] * (1 + row % 7) + [row % 11] for row in range(count)]
    split.types = [[0] * len(ids) for ids in split.ids]
    split.labels = [row % 3 for row in range(count)]
    split.device = "cpu"
    return split


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Task:
        labels = ("a", "b", "c")

    def classifier(*_: Any) -> Toy:
        return Toy()

    monkeypatch.setattr(training, "load_task", lambda *_: Task)
    monkeypatch.setattr(training, "model_folder", lambda _: None)
    monkeypatch.setattr(training, "Classifier", classifier)
    monkeypatch.setattr(training, "encoded", lambda *_: encoded(60))


def spec(method: str, pattern: str | None, stage: str = "tune", **setting: Any) -> Any:
    setting = {**SETTINGS.get(method.removesuffix("+kd"), {}), **setting}
    return plans.Spec("topics", 6, pattern, method, 7, 1e-2, STEPS, json.dumps(setting), stage)


def run(one: Any, tmp_path: Path) -> tuple[list[dict[str, torch.Tensor]], dict[str, Any]]:
    """Train one run; return the weights after each of its steps and at its end, and its figures."""
    if one.method == "pat":
        pytest.importorskip("torchao")
    held: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = training.Run.measure
        built = training.Run.method

        def weights(self: Any) -> dict[str, torch.Tensor]:
            return {name: module.weight.detach().clone() for name, module in self.modules.items()}

        def method(self: Any, *arguments: Any) -> Any:
            made = built(self, *arguments)
            step = made.step

            def recorded(number: int) -> None:
                step(number)
                held.append(weights(self))

            made.step = recorded
            return made

        def measured(self: Any, spec: Any) -> Any:
            held.append(weights(self))
            return measure(self, spec)

        patch.setattr(training.Run, "measure", measured)
        patch.setattr(training.Run, "method", method)
        ((_, figures),) = training.train([one], tmp_path, "cpu")
    return held, figures


# Methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "dense"])
def test_every_method_ends_in_the_pattern_and_has_trained(method: str, pattern: str, tmp_path: Path) -> None:
    held, figures = run(spec(method, pattern), tmp_path)
    torch.manual_seed(7)
    start = {name: p.detach() for name, p in Toy().named_parameters()}
    for name, weight in held[-1].items():
        assert not torch.equal(weight, start[name] * (weight != 0)), name
        assert torch.equal(weight != 0, keep_mask(weight, pattern, -1) & (weight != 0))
    assert 0 <= figures["dev"] <= 100
    assert figures["test"] is None
    assert (figures["model_error"] is not None) == (method in methods.LATE)
    assert (figures["from_step"] > 0) == (method in methods.LATE)


def test_asp_keeps_its_first_mask_throughout(tmp_path: Path) -> None:
    held, _ = run(spec("asp", "1:4"), tmp_path)
    torch.manual_seed(7)
    for name, p in Toy().named_parameters():
        if name in held[0]:
            mask = keep_mask(p.detach(), "1:4", -1)
            assert all(torch.equal(step[name] != 0, mask) for step in held)


@pytest.mark.parametrize("stop", [0.5, 0.75])
def test_gradual_pruning_never_brings_a_weight_back_and_is_done_in_time(stop: float, tmp_path: Path) -> None:
    held, _ = run(spec("gradual", "1:4", stop=stop), tmp_path)
    shares = []
    for before, after in itertools.pairwise(held):
        for name in after:
            assert not ((before[name] == 0) & (after[name] != 0)).any()
        shares.append(sum((w == 0).sum().item() for w in after.values()) / sum(w.numel() for w in after.values()))
    assert shares[0] < 0.2
    assert len({round(share, 2) for share in shares}) > 4  # not in one jump
    last = round(stop * STEPS)
    assert shares[last // 2] < 0.74 < 0.75 == pytest.approx(shares[last - 2])


def test_sr_ste_shows_the_projection_and_may_bring_a_weight_back(tmp_path: Path) -> None:
    held, _ = run(spec("sr-ste", "1:4"), tmp_path)
    for step in held:
        assert all(torch.equal(w != 0, keep_mask(w, "1:4", -1)) for w in step.values())
    first, last = held[0], held[-1]
    assert any(((first[name] == 0) & (last[name] != 0)).any() for name in first)


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_first_run_of_a_process_is_like_the_later_ones(method: str, tmp_path: Path) -> None:
    methods.package_defaults.cache_clear()
    one = spec(method, None if method == "dense" else "2:4")
    (first, figures), (second, figures_again) = run(one, tmp_path), run(one, tmp_path)
    assert {**figures, "seconds": 0} == {**figures_again, "seconds": 0}
    for before, after in zip(first, second, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_late_methods_share_the_step_and_the_batches_and_differ_in_the_weights(tmp_path: Path) -> None:
    found = {method: run(spec(method, "1:4"), tmp_path) for method in methods.LATE}
    (window,) = methods.windows(Pattern(1, 4), {}, STEPS)
    for _, figures in found.values():
        assert figures["from_step"] == window.start
    after = {method: held[window.prune_at - window.start - 1] for method, (held, _) in found.items()}
    before = {method: held[window.prune_at - window.start - 2] for method, (held, _) in found.items()}
    for first, second in itertools.combinations(methods.LATE, 2):
        for name in after[first]:
            assert torch.equal(before[first][name], before[second][name])
            assert (before[first][name] != 0).all()
            assert not torch.equal(after[first][name], after[second][name])
            assert (after[first][name] == 0).float().mean() == 0.75
    errors = {method: figures["model_error"] for method, (_, figures) in found.items()}
    assert errors["admm"] < min(errors["asp-late"], errors["sparsegpt-late"], errors["admm-inputs"])


def test_what_is_done_by_hand_is_what_the_package_does(tmp_path: Path) -> None:
    package, _ = run(spec("admm", "2:4"), tmp_path)
    by_hand, _ = run(spec("admm", "2:4", input_damping=0.01, output_damping=0.1), tmp_path)
    other, _ = run(spec("admm", "2:4", input_damping=0.5), tmp_path)
    assert all(torch.equal(package[-1][name], by_hand[-1][name]) for name in package[-1])
    assert not all(torch.equal(package[-1][name], other[-1][name]) for name in package[-1])


def test_two_solves_reach_the_first_pattern_first(tmp_path: Path) -> None:
    one = spec("admm", "1:4", prune_at=0.8, calibration_steps=4, by_way_of="2:4")
    first, second = methods.windows(Pattern(1, 4), one.options, STEPS)
    assert (first, second) == ((22, 26, Pattern(2, 4)), (28, 32, Pattern(1, 4)))
    assert training.dense_steps_of(one) == 22
    held, _ = run(one, tmp_path)
    shares = [float(torch.cat([(w == 0).float().flatten() for w in step.values()]).mean()) for step in held]
    assert shares == [0.0] * 3 + [0.5] * 6 + [0.75] * (len(shares) - 9)


def test_a_run_is_the_same_whether_its_first_part_is_shared_or_not(tmp_path: Path) -> None:
    specs = [
        spec("dense", None),
        spec("admm", "1:4"),
        spec("asp", "2:4"),
        spec("asp-late", "2:4", prune_at=0.5),
        spec("admm", "2:4"),
    ]
    shared = dict(training.train(specs, tmp_path, "cpu"))
    assert [training.dense_steps_of(one) for one in shared] == sorted(map(training.dense_steps_of, specs))
    for one in specs:
        ((_, alone),) = training.train([one], tmp_path, "cpu")
        assert {**alone, "seconds": 0} == {**shared[one], "seconds": 0}


def test_a_continued_run_has_the_bits_of_one_from_the_start(tmp_path: Path) -> None:
    # The package's optimizer around the whole run, and around what is left of it after the dense steps.
    continued, _ = run(spec("admm", "2:4"), tmp_path)
    whole = training.Run(spec("admm", "2:4"), tmp_path, "cpu")
    optimizer = ADMMNxM(
        whole.inner(), whole.model, pattern="2:4", total_steps=STEPS, select={r"encoder\..*weight": "2:4"}
    )

    class Whole:
        def __init__(self) -> None:
            self.optimizer = optimizer

        def step(self, number: int) -> None:
            optimizer.step()

    whole.advance(Whole(), 0, STEPS)
    optimizer.finalize()
    for name, module in whole.modules.items():
        assert torch.equal(module.weight, continued[-1][name])


def test_a_run_that_does_not_end_in_its_pattern_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "asp", methods.Dense)
    with pytest.raises(RuntimeError, match="did not end in its pattern"):
        run(spec("asp", "2:4"), tmp_path)


def test_runs_that_begin_differently_are_refused(tmp_path: Path) -> None:
    other = plans.Spec("topics", 6, "2:4", "asp", 8, 1e-2, STEPS)
    with pytest.raises(ValueError, match="begin alike"):
        list(training.train([spec("asp", "2:4"), other], tmp_path, "cpu"))


def test_distilled_runs_learn_from_the_dense_run_of_the_same_seed(tmp_path: Path) -> None:
    held, _ = run(spec("asp+kd", "2:4", teacher_lr=1e-2), tmp_path)
    plain, _ = run(spec("asp", "2:4"), tmp_path)
    assert not torch.equal(next(iter(held[-1].values())), next(iter(plain[-1].values())))
    (file,) = (tmp_path / "teachers" / "cpu").iterdir()
    logits = torch.load(file, weights_only=True)
    model = training.Run(spec("dense", None), tmp_path, "cpu")
    seen = torch.cat([batch.rows for batch in model.batches]).unique()
    assert logits.shape == (60, 3)
    assert torch.isfinite(logits[seen]).all()


def test_each_layer_alone(tmp_path: Path) -> None:
    found = [figures for _, figures in training.layers_alone(spec("admm", "1:4", "layers"), tmp_path, "cpu")]
    assert [each["weight"] for each in found] == ["encoder.layer.0.weight", "encoder.layer.1.weight"]
    assert all(0 < each["model_error"] < 1 and each["predicted"] > 0 for each in found)


def test_distillation_is_zero_only_for_equal_distributions() -> None:
    logits = torch.randn(5, 3)
    assert training.distillation(logits, logits + 7.0).item() == pytest.approx(0.0, abs=1e-6)
    assert training.distillation(logits, -logits).item() > 0


def test_learning_rates() -> None:
    factors = [training.lr_factor(number, 100) for number in range(1, 101)]
    assert factors.index(max(factors)) == 9
    assert max(factors) == 1
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 90)
    again = [training.lr_factor(number, 100, (60, 0.5)) for number in range(1, 101)]
    assert again[:60] == factors[:60]
    assert max(again[60:]) == 0.5 == again[69]
    assert again[-1] == pytest.approx(0.5 / 30)


# SparseGPT -----------------------------------------------------------------------------------------------------------


def moment(width: int, seed: int, tokens: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return x.T @ x


@given(st.integers(0, 10_000), st.sampled_from(["2:4", "1:4", "2:8"]), st.sampled_from([8, 16, 256]))
def test_sparsegpt_is_feasible(seed: int, spelled: str, block: int) -> None:
    pattern, inputs = Pattern.parse(spelled), moment(32, seed, tokens=10)  # a moment without full rank
    inputs[:, 3] = inputs[3] = 0  # and an input that is never used
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    pruned, mask = methods.sparsegpt(weight, inputs, pattern, block=block)
    assert (mask.view(16, -1, pattern.group).sum(-1) == pattern.keep).all()
    assert pruned.isfinite().all()
    assert not (pruned[~mask] != 0).any()
    assert not pruned[:, 3].any()


@pytest.mark.parametrize("spelled", ["2:4", "1:4"])
def test_sparsegpt_loses_less_than_magnitude(spelled: str) -> None:
    ratios = []
    for seed in range(20):
        inputs, weight = moment(32, seed), torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
        pruned, _ = methods.sparsegpt(weight, inputs, Pattern.parse(spelled))
        by_magnitude = weight * keep_mask(weight, spelled, -1)
        ratios.append(model_error(weight, pruned, inputs) / model_error(weight, by_magnitude, inputs))
    assert sorted(ratios)[len(ratios) // 2] < 0.8


def test_sparsegpt_does_not_depend_on_the_block_and_is_magnitude_without_correlation() -> None:
    pattern, inputs, weight = (
        Pattern(2, 4),
        moment(32, 1),
        torch.randn(16, 32, generator=torch.Generator().manual_seed(1)),
    )
    first, second = (methods.sparsegpt(weight, inputs, pattern, block=block)[0] for block in (4, 32))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    plain, mask = methods.sparsegpt(weight, torch.eye(32), pattern)
    assert torch.equal(mask, keep_mask(weight, pattern, -1))
    torch.testing.assert_close(plain, weight * mask)
    with pytest.raises(ValueError, match="multiple"):
        methods.sparsegpt(weight, inputs, pattern, block=6)


def test_sparsegpt_prunes_by_the_weight_that_earlier_columns_have_changed() -> None:
    # Two columns that carry the same input: what is pruned in the first is made up for in the second.
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    weight = torch.tensor([[0.9, 1.0, 0.5, 0.01]])
    pruned, mask = methods.sparsegpt(weight, x.T @ x, Pattern(2, 4), damping=1e-6)
    assert mask.tolist() == [[False, True, True, False]]
    assert pruned[0, 1].item() == pytest.approx(1.9, abs=0.05)


# Batches -------------------------------------------------------------------------------------------------------------


def test_batches_are_decided_by_the_seed_alone_and_visit_every_row() -> None:
    first = [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=1)]
    assert first == [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=1)]
    assert first != [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=2)]
    counts = torch.tensor(functools.reduce(operator.iadd, first, [])).bincount(minlength=100)
    assert counts.sum() == 200
    assert counts.min() >= 1


def test_batch_is_padded_to_its_longest_row_and_masked() -> None:
    batch = encoded(10).batch([0, 3])
    assert batch.ids.tolist() == [[101, 0, 0, 0, 0], [104] * 4 + [3]]
    assert batch.attention.tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert batch.labels.tolist() == [0, 0]


def test_rows_come_once_and_sorted_by_length() -> None:
    rows = torch.cat([batch.rows for batch in encoded(70).all(size=8)])
    assert sorted(rows.tolist()) == list(range(70))
    lengths = [row % 7 for row in rows.tolist()]
    assert lengths == sorted(lengths)
    assert sorted(torch.cat([batch.rows for batch in encoded(70).some([5, 60, 9], size=2)]).tolist()) == [5, 9, 60]


# Plans ---------------------------------------------------------------------------------------------------------------

PLAN = plans.PLANS["full"]


def line_of(one: Any, score: float) -> dict[str, Any]:
    final = one.stage == "final"
    figures = {"dev": None if final else score, "test": score if final else None, "model_error": None}
    return training.line_of(one, {**figures, "from_step": 0, "seconds": 1.0}, "device", "commit", {"torch": "2"})


def simulate(plan: Any, score: Any, stop: int | None = None) -> list[dict[str, Any]]:
    """Run the whole schedule, one group after the other, as study.py does."""
    lines: list[dict[str, Any]] = []
    seen: set[Any] = set()
    while stop is None or len(lines) < stop:
        group = next(pending(plan, lines, seen), None)
        if group is None:
            break
        for one in group:
            seen.add(study.spec_key(one))
            lines.append(line_of(one, score(one)))
    return lines


def pending(plan: Any, lines: list[dict[str, Any]], seen: set[Any]) -> Iterator[list[Any]]:
    for group in plans.final(plan, lines):
        left = [one for one in group if study.spec_key(one) not in seen]
        if left:
            yield left


def best_at(lr: float) -> Any:
    return lambda one: 80.0 - abs(torch.tensor(one.lr / lr).log().item())


SMALL = plans.Plan(**{**PLAN.__dict__, "tasks": ("topics",), "tuning_seeds": (100,), "seeds": (0, 1)})


def test_tuning_tries_settings_first_and_then_learning_rates_with_the_best() -> None:
    first = [one for one in plans.Tuning(SMALL, []).runs(["sr-ste"]) if one.pattern == "1:4"]
    assert {(one.lr, one.setting) for one in first} == {
        (SMALL.middle, json.dumps(setting)) for setting in plans.SETTINGS["sr-ste"]
    }
    better = json.dumps(plans.SETTINGS["sr-ste"][1])
    lines = [line_of(one, 60.0 if one.setting == better else 50.0) for one in first]
    then = [one for one in plans.Tuning(SMALL, lines).runs(["sr-ste"]) if one.pattern == "1:4"]
    assert {one.lr for one in then if one.setting == better} == set(SMALL.lrs)
    assert all(one.seed in SMALL.tuning_seeds and one.stage == "tune" for one in then)


def test_choice_is_the_best_mean_and_waits_for_the_whole_grid() -> None:
    lines = [line_of(one, best_at(1.5e-4)(one)) for one in plans.Tuning(PLAN, []).runs(["asp"])]
    assert plans.Tuning(PLAN, lines).choose("asp", "1:4") == (1.5e-4, {})
    assert plans.Tuning(PLAN, lines).choose("asp", "2:8") == (1.5e-4, {})  # that of 1:4
    assert plans.Tuning(PLAN, [one for one in lines if one["seed"] != 101]).choose("asp", "1:4") is None
    assert plans.Tuning(PLAN, lines[:-1]).choose("asp", "1:4") is None
    assert plans.Tuning(PLAN, [{**line, "stage": "final"} for line in lines]).choose("asp", "1:4") is None


@pytest.mark.parametrize(
    ("best", "rates"), [(1.5e-4, PLAN.lrs), (1e-6, (1.67e-5, *PLAN.lrs)), (1.0, (*PLAN.lrs, 4.05e-3))]
)
def test_a_choice_on_an_edge_widens_the_grid_of_every_method_once(best: float, rates: tuple[float, ...]) -> None:
    lines = simulate(SMALL, lambda one: best_at(best if one.method == "asp" else 1.5e-4)(one))
    tried = {(line["method"], line["lr"]) for line in lines if line["stage"] == "tune"}
    tuned = [method for method in SMALL.methods if not method.endswith("+kd")]
    assert tried == {(method, lr) for method in tuned for lr in rates}
    chosen = {line["lr"] for line in lines if line["stage"] == "final" and line["method"] == "asp"}
    assert chosen == {*SMALL.usual_lrs, min(rates, key=lambda lr: abs(torch.tensor(lr / best).log()))}


@pytest.mark.parametrize("best", [1.5e-4, 4.5e-4])  # a rate of both tables, a rate of one
def test_the_schedule_ends_and_has_every_run_once(best: float) -> None:
    keys = [records.key_of(line) for line in simulate(SMALL, best_at(best))]
    assert len(set(keys)) == len(keys)


def test_the_schedule_has_the_declared_order() -> None:
    lines = simulate(SMALL, best_at(4.5e-4))
    final = [line for line in lines if line["stage"] == "final"]
    assert {line["seed"] for line in final}.isdisjoint(SMALL.tuning_seeds)
    first = [(line["method"], line["pattern"]) for line in final]
    early = {(m, p) for m in SMALL.rounds[0] for p in ((None,) if m == "dense" else ("2:4", "1:4"))}
    assert set(first[: len(early) * 3 * 2]) == early  # three learning rates, two seeds
    order = list(dict.fromkeys(method for method, pattern in first if pattern == "1:4"))
    distilled = ["asp+kd", "admm+kd"]
    assert order[4:] == [*distilled, *(method for method in SMALL.methods[5:] if method not in distilled)]
    assert {line["setting"]["teacher_lr"] for line in final if line["method"] == "admm+kd"} == {5e-5, 1.5e-4, 4.5e-4}


def test_three_seeds_come_in_both_tables_before_the_other_seeds_of_either() -> None:
    both = ("asp", "admm")
    few = {**SMALL.__dict__, "rounds": (both,), "patterns": {"2:4": ((0, 1, 2, 3, 4), "2:4")}}
    lines = simulate(plans.Plan(**{**few, "seeds": (0, 1, 2, 3, 4)}), best_at(4.5e-4))
    came = list(dict.fromkeys((line["stage"], line["lr"] == 4.5e-4, line["seed"] > 2) for line in lines))
    assert came == [
        ("final", False, False),
        ("tune", True, True),
        ("tune", False, True),
        ("final", True, False),
        ("final", True, True),
        ("final", False, True),
    ]


def test_tuned_runs_of_all_methods_come_before_those_with_nothing_tuned_of_later_ones() -> None:
    seeds = (0, 1, 2, 3)
    rounds = (("dense", "admm"), ("admm+kd",), ("gradual",))
    patterns = {"1:4": (seeds, "1:4"), "2:8": ((0,), "1:4")}
    small = plans.Plan(**{**SMALL.__dict__, "seeds": seeds, "rounds": rounds, "patterns": patterns})
    lines = [line for line in simulate(small, best_at(4.5e-4)) if line["stage"] == "final"]
    came = [(line["method"], line["pattern"], line["lr"], line["seed"]) for line in lines]
    later = [one for one in came if one[0] not in rounds[0] or one[1] == "2:8"]
    assert later[:9] == [
        *((method, "1:4", 4.5e-4, seed) for method in ("admm+kd", "gradual") for seed in (0, 1, 2)),
        *((method, "1:4", 4.5e-4, 3) for method in ("gradual", "admm+kd")),
        ("admm", "2:8", 4.5e-4, 0),
    ]
    patterns_of_the_rest = [pattern for _, pattern, _, _ in later[9:]]
    assert patterns_of_the_rest == sorted(patterns_of_the_rest)  # 1:4, then the rest of 2:8
    rates = (5e-5, 1.5e-4, 4.5e-4)
    wanted = set(itertools.product(("dense",), (None,), rates, seeds))
    for pattern, (its, _) in patterns.items():
        wanted |= set(itertools.product(("admm", "admm+kd", "gradual"), (pattern,), rates, its))
    assert sorted(came, key=str) == sorted(wanted, key=str)


def test_seeds_of_a_pattern() -> None:
    specs = [one for group in plans.final(PLAN, []) for one in group]
    assert {one.seed for one in specs if one.pattern == "2:8"} == {0, 1, 2}
    assert {one.seed for one in specs if one.pattern == "1:4" and one.stage == "final"} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("stage", ["explore", "layers"])
@pytest.mark.parametrize("plan", ["full", "cpu"])
def test_other_stages_have_no_run_twice_and_no_final_seed(plan: str, stage: str) -> None:
    groups = list(plans.STAGES[stage](plans.PLANS[plan], []))
    specs = [one for group in groups for one in group]
    assert specs
    assert len(set(specs)) == len(specs)
    assert {one.stage for one in specs} == {stage}
    assert {one.seed for one in specs} == {100, 101}
    assert all(len({one.trunk for one in group}) == 1 for group in groups)


def test_a_finished_run_is_not_pending_and_neither_is_a_running_one(tmp_path: Path) -> None:
    before = list(study.pending(SMALL, "final", tmp_path, set()))
    study.append(tmp_path / "full-final.jsonl", line_of(before[0][0], 50.0))
    running = {study.spec_key(one) for one in before[1]}
    after = list(study.pending(SMALL, "final", tmp_path, running))
    assert after == [before[0][1:], *before[2:]]
    assert len(records.read(tmp_path)) == 1


def test_a_torn_line_is_named_with_its_remedy_and_the_remedy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *rest = next(iter(study.pending(SMALL, "final", tmp_path, set())))
    for spec in (first, *rest[:1]):
        study.append(tmp_path / "smoke-final.jsonl", line_of(spec, 50.0))
    whole = (tmp_path / "smoke-final.jsonl").read_bytes()
    (tmp_path / "smoke-final.jsonl").write_bytes(whole[:-9])
    monkeypatch.setattr(sys, "argv", ["study.py", "--plan", "smoke", "--list", "--results", str(tmp_path)])
    assert study.main() == 2
    assert re.match(r"smoke-final\.jsonl:2: not JSON: .*; delete this line: the study makes", capsys.readouterr().err)
    (tmp_path / "smoke-final.jsonl").write_bytes(whole.splitlines(keepends=True)[0])
    assert study.main() == 0
    assert rest[0] in next(iter(study.pending(SMALL, "final", tmp_path, set())))


def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import study\n"
        "if __name__ == '__main__':\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        "    with ProcessPoolExecutor(1, spawn, study.start_worker, (1,)) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        try:
            process.communicate(timeout=60)  # the worker has the same output: it is at its end once both are gone
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise


def test_rounded_products_are_those_of_torch_and_leave_other_dtypes_alone(tmp_path: Path) -> None:
    script = tmp_path / "products.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import torch, warnings, bfloat16\n"
        "torch.manual_seed(0)\n"
        "x, w, bias, q, k = (torch.randn(size, dtype=torch.float64) for size in\n"
        "                    ((6, 40), (40, 10), (10,), (3, 5, 40), (3, 40, 7)))\n"
        "products = {'mm': lambda x, w, c, q, k: x @ w, 'bmm': lambda x, w, c, q, k: q @ k,\n"
        "            'addmm': lambda x, w, c, q, k: torch.addmm(c, x, w, beta=0.5, alpha=2.0)}\n"
        "calls = []\n"
        "original = torch.Tensor.float\n"
        "torch.Tensor.float = lambda self: calls.append(self.dtype) or original(self)\n"
        "def results(name, dtype):\n"
        "    calls.clear()\n"
        "    given = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, bias, q, k)]\n"
        "    value = products[name](*given)\n"
        "    through = len(calls)\n"
        "    value.pow(2).sum().backward()\n"
        "    return [value, *(t.grad for t in given if t.grad is not None)], through\n"
        "cases = [(name, dtype) for name in products for dtype in (torch.bfloat16, torch.float32, torch.float64)]\n"
        "before = [results(*case) for case in cases]\n"
        "with warnings.catch_warnings():\n"
        "    warnings.simplefilter('error')\n"
        "    bfloat16.round_products()\n"
        "    bfloat16.round_products()\n"
        "for (name, dtype), (old, without) in zip(cases, before):\n"
        "    new, through = results(name, dtype)\n"
        "    expected = {'mm': 2, 'bmm': 2, 'addmm': 3}[name] if dtype == torch.bfloat16 else 0\n"
        "    assert (without, through) == (0, expected), (name, dtype, through)\n"
        "    for one, other in zip(old, new, strict=True):\n"
        "        assert one.dtype == other.dtype == dtype\n"
        "        rtol = 2 * torch.finfo(dtype).eps\n"
        "        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * one.abs().max().item())\n",
        encoding="utf-8",
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("slow", [False, True])
def test_products_are_rounded_and_the_lines_say_so_where_torch_is_slow(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, told = [], []
    monkeypatch.setattr(study, "slow_products", lambda: slow)
    monkeypatch.setattr(study, "round_products", lambda: called.append(True))
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(transformers.utils.logging, name, lambda: None)
    study.start_worker(torch.get_num_threads())
    assert bool(called) == slow

    class Executor:
        def submit(self, work: Any, specs: Any, name: str, options: Any, provenance: tuple[Any, ...]) -> Any:
            told.append(provenance[0])
            raise InterruptedError

    options = argparse.Namespace(device="cpu", results=tmp_path, workers=1)
    with pytest.raises(InterruptedError):
        study.run_stage("smoke", "final", options, Executor())
    assert told == [study.device_name("cpu") + ", products of bfloat16 by way of float32" * slow]
