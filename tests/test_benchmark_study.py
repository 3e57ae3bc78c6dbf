"""The accuracy study's methods, batches and plans, on a model of two matrices; no network, no pretrained model."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import operator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from admm_nxm import ADMMNxM, Pattern, keep_mask
from tests.helpers import loss_of, make_net, same_bits

pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "accuracy"


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


batches, methods, training, plans, study = map(load, ("batches", "methods", "training", "plans", "study"))

STEPS = 40
SETTINGS: dict[str, dict[str, Any]] = {"sr-ste": {"decay": 2e-4}, "pat": {"healing": 0.75}, "admm-paper": {"rho": 0.1}}


def run(method: str, pattern: str | None, **setting: Any) -> tuple[nn.Module, Any, list[dict[str, torch.Tensor]]]:
    """Train a small net; return it, the method's figures, and what the model held after each step."""
    if method == "pat":
        pytest.importorskip("torchao")
    net = make_net()
    named = {name: p for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    inner = torch.optim.AdamW([{"params": net.blocks.parameters()}, {"params": net.head.parameters()}], lr=1e-2)
    target = None if pattern is None else Pattern.parse(pattern)
    built = methods.METHODS[method](methods.Job(inner, named, target, STEPS, {**SETTINGS.get(method, {}), **setting}))
    generator = torch.Generator().manual_seed(5)
    held = []
    for number in range(1, STEPS + 1):
        built.optimizer.zero_grad()
        loss_of(net, torch.randn(4, 8, generator=generator)).backward()
        built.step(number)
        held.append({name: p.detach().clone() for name, p in named.items()})
    return net, built.finish(), held


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "dense"])
def test_every_method_ends_in_the_pattern_and_has_trained(method: str, pattern: str) -> None:
    net, _, _ = run(method, pattern)
    start = dict(make_net().named_parameters())
    for name, p in net.named_parameters():
        assert not same_bits(p.detach(), start[name].detach()), name
        if name.startswith("blocks.") and p.ndim == 2:
            assert torch.equal(p != 0, keep_mask(p.detach(), pattern, -1) & (p != 0))


def test_dense_is_the_inner_optimizer_alone() -> None:
    net, figures, _ = run("dense", None)
    assert all((p != 0).all() for p in net.parameters())
    assert figures.primal_residual is None


def test_asp_keeps_its_first_mask_throughout() -> None:
    _, _, held = run("asp", "1:4")
    for name, p in make_net().named_parameters():
        if name in held[0]:
            mask = keep_mask(p.detach(), "1:4", -1)
            assert all(torch.equal(step[name] != 0, mask) for step in held)


def test_gradual_pruning_never_brings_a_weight_back_and_is_done_at_half_of_the_run() -> None:
    _, _, held = run("gradual", "1:4")
    shares = []
    for before, after in itertools.pairwise(held):
        for name in after:
            assert not ((before[name] == 0) & (after[name] != 0)).any()
        shares.append(sum((w == 0).sum().item() for w in after.values()) / sum(w.numel() for w in after.values()))
    assert shares[0] < 0.2
    assert len({round(share, 2) for share in shares}) > 4  # not in one jump
    assert shares[STEPS // 2] == pytest.approx(0.75)


def test_sr_ste_shows_the_projection_and_may_bring_a_weight_back() -> None:
    _, _, held = run("sr-ste", "1:4")
    for step in held:
        assert all(torch.equal(w != 0, keep_mask(w, "1:4", -1)) for w in step.values())
    first, last = held[0], held[-1]
    assert any(((first[name] == 0) & (last[name] != 0)).any() for name in first)


def test_admm_methods_are_the_package_and_record_their_traces() -> None:
    net = make_net()
    named = {name: p for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    job = methods.Job(torch.optim.AdamW(net.parameters()), named, Pattern(1, 4), STEPS, {"rho": 0.1})
    paper = methods.METHODS["admm-paper"](job)
    assert isinstance(paper.optimizer, ADMMNxM)
    assert (paper.optimizer.penalty, paper.optimizer.plan.rho(0)) == ("gradient", 0.1)
    _, figures, _ = run("admm", "1:4", variant="any name")
    assert 0 <= figures.primal_residual < 0.01
    assert figures.trace["step"] == sorted(set(figures.trace["step"]))
    assert len(figures.trace["churn"]) == len(figures.trace["primal_residual"]) == len(figures.trace["step"]) > 20
    assert figures.trace["primal_residual"][0] > 0.3 > figures.trace["primal_residual"][-1]


def encoded(count: int) -> Any:
    split = object.__new__(batches.Encoded)
    split.ids = [[101] * (1 + row % 7) for row in range(count)]
    split.types = [[0] * len(ids) for ids in split.ids]
    split.labels = [row % 3 for row in range(count)]
    split.device = "cpu"
    return split


def test_batches_are_decided_by_the_seed_alone_and_visit_every_row() -> None:
    first = [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=1)]
    assert first == [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=1)]
    assert first != [batch.rows.tolist() for batch in encoded(100).train(4, 50, seed=2)]
    counts = torch.tensor(functools.reduce(operator.iadd, first, [])).bincount(minlength=100)
    assert counts.sum() == 200
    assert counts.min() >= 1


def test_batch_is_padded_to_its_longest_row_and_masked() -> None:
    batch = encoded(10).batch([0, 3])
    assert batch.ids.tolist() == [[101, 0, 0, 0], [101] * 4]
    assert batch.attention.tolist() == [[1, 0, 0, 0], [1] * 4]
    assert batch.labels.tolist() == [0, 0]


def test_all_rows_come_once_and_sorted_by_length() -> None:
    rows = torch.cat([batch.rows for batch in encoded(70).all(size=8)])
    assert sorted(rows.tolist()) == list(range(70))
    lengths = [1 + row % 7 for row in rows.tolist()]
    assert lengths == sorted(lengths)


PLAN = plans.PLANS["cpu"]


def tuned(method: str, pattern: str | None, lr: float, dev: float, task: str, **setting: Any) -> dict[str, Any]:
    return {
        "stage": "tune",
        "method": method,
        "pattern": pattern,
        "steps": PLAN.steps,
        "seed": plans.TUNING_SEED,
        "lr": lr,
        "setting": setting,
        "task": task,
        "dev": dev,
        "model": f"MiniLM-L6, first {PLAN.layers} layers",
    }


def lines_of(method: str, pattern: str | None, best: float) -> list[dict[str, Any]]:
    """A complete grid of one method, best at one learning rate."""
    settings, middle = plans.GRIDS[method].settings, PLAN.lrs[1]
    pairs = [(middle, s) for s in settings] + [(lr, settings[0]) for lr in PLAN.lrs if lr != middle]
    return [
        tuned(method, pattern, lr, 90.0 if lr == best and s == settings[0] else 50.0, task, **s)
        for lr, s in pairs
        for task in PLAN.tuning_tasks
    ]


def all_lines() -> list[dict[str, Any]]:
    lines = lines_of("dense", None, PLAN.lrs[0])
    for method in plans.GRIDS:
        for pattern in ("2:4", "1:4") if method != "dense" else ():
            lines += lines_of(method, pattern, PLAN.lrs[2] if method == "asp" else PLAN.lrs[1])
    return lines


def test_tuning_tries_settings_first_and_then_learning_rates_with_the_best() -> None:
    first = [s for s in plans.tuning(PLAN, []) if (s.method, s.pattern) == ("sr-ste", "1:4")]
    assert {(s.lr, s.setting) for s in first} == {
        (PLAN.lrs[1], json.dumps(setting)) for setting in plans.GRIDS["sr-ste"].settings
    }
    better = plans.GRIDS["sr-ste"].settings[1]
    lines = [
        tuned("sr-ste", "1:4", PLAN.lrs[1], 60.0 if setting == better else 50.0, task, **setting)
        for setting in plans.GRIDS["sr-ste"].settings
        for task in PLAN.tuning_tasks
    ]
    then = [s for s in plans.tuning(PLAN, lines) if (s.method, s.pattern) == ("sr-ste", "1:4")]
    assert {s.lr for s in then if s.setting == json.dumps(better)} == set(PLAN.lrs)
    assert all(s.stage == "tune" and s.seed == plans.TUNING_SEED for s in then)


def test_choice_is_the_best_mean_over_the_tuning_tasks_and_waits_for_the_whole_grid() -> None:
    lines = lines_of("asp", "1:4", PLAN.lrs[2])
    assert plans.choose(PLAN, lines, "asp", "1:4") == (PLAN.lrs[2], {})
    assert plans.choose(PLAN, lines[:-1], "asp", "1:4") is None
    assert plans.choose(PLAN, lines, "asp", "2:4") is None
    other_seed = [{**line, "seed": 3} for line in lines]
    assert plans.choose(PLAN, other_seed, "asp", "1:4") is None


def test_final_runs_use_the_choice_and_have_no_run_twice() -> None:
    with pytest.raises(plans.NotTunedError, match="dense"):
        list(plans.final(PLAN, []))
    specs = list(plans.final(PLAN, all_lines()))
    assert len({spec.key() for spec in specs}) == len(specs)
    assert {spec.seed for spec in specs}.isdisjoint({plans.TUNING_SEED})
    assert {spec.lr for spec in specs if spec.method == "asp"} == {PLAN.lrs[2]}
    assert {spec.teacher_lr for spec in specs if spec.method == "admm+kd"} == {PLAN.lrs[0]}
    assert {spec.pattern for spec in specs if spec.method == "admm+kd"} == set(PLAN.distilled_at)
    seeds = [spec.seed for spec in specs]
    assert seeds == sorted(seeds)  # seed by seed: a study that is stopped can still be compared


@pytest.mark.parametrize("stage", ["budget", "ablation"])
def test_other_stages_have_no_run_twice(stage: str) -> None:
    specs = list(plans.STAGES[stage](PLAN, all_lines()))
    assert specs
    assert len({spec.key() for spec in specs}) == len(specs)
    assert {spec.stage for spec in specs} == {stage}


def test_a_finished_run_is_not_pending_and_neither_is_a_running_one(tmp_path: Path) -> None:
    before = list(study.pending(PLAN, "tune", tmp_path, set()))
    measured = {"dev": 1.0, "test": None, "primal_residual": None, "projection_loss": None, "seconds": 1.0, "trace": {}}
    line = training.line_of(before[0], measured, "device", "commit", {"torch": "2"})
    study.append(tmp_path / "cpu-tune.jsonl", line)
    after = list(study.pending(PLAN, "tune", tmp_path, {before[1].key()}))
    assert after == before[2:]
    assert study.key_of(line) == before[0].key()


def test_distillation_is_zero_only_for_equal_distributions() -> None:
    logits = torch.randn(5, 3)
    assert training.distillation(logits, logits + 7.0).item() == pytest.approx(0.0, abs=1e-6)
    assert training.distillation(logits, -logits).item() > 0
