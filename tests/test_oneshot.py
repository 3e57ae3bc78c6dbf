"""Pruning without training: against plain loops, at its limits, and what it leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import admm_nxm.oneshot
from admm_nxm import keep_mask, project, prune, solve
from admm_nxm.passes import Blocks
from admm_nxm.solver import Solved, model_error
from admm_nxm.solving import solutions
from admm_nxm.statistics import Moments, Statistics
from admm_nxm.weights import Weight

from .cores import BYTES_A_WEIGHT, WEIGHTS, is_feasible
from .helpers import (
    STEPS,
    Block,
    Net,
    admm,
    assert_same_weights,
    batches,
    loss_of,
    make_net,
    same_bits,
    saved,
    train,
    weights_of,
)

DOUBLE = torch.float64
BATCHES = list(batches(6, dtype=DOUBLE))


def labelled(net: nn.Module, x: Tensor) -> Tensor:
    """In the dtype of the weights, so that a plain loop comes to the same sums."""
    return (net(x) - x.sum(-1, keepdim=True).sin()).square().mean()


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Moments]:
    """Name -> the moments that a weight was solved from."""
    seen: dict[str, Moments] = {}

    def spy(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
        seen.update({weight.name: moments[weight.name] for weight in weights if weight.name in moments})
        return solutions(weights, moments)

    monkeypatch.setattr(admm_nxm.oneshot, "solutions", spy)
    return seen


def in_plain_loops(net: Net, name: str) -> tuple[Tensor, Tensor]:
    """A and G of one weight: every token of every batch on its own, by autograd's own gradients."""
    module: Any = net.get_submodule(name.removesuffix(".weight"))
    a = torch.zeros(module.in_features, module.in_features, dtype=DOUBLE)
    g = torch.zeros(module.out_features, module.out_features, dtype=DOUBLE)
    for batch in BATCHES:
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.extend((args[0].detach(), output))

        handle = module.register_forward_hook(keep)
        value = labelled(net, batch)
        handle.remove()
        value.backward()
        net.zero_grad()
        x, output = kept
        assert output.grad is not None
        for row, gradient in zip(x, output.grad, strict=True):
            a += torch.outer(row, row)
            g += torch.outer(gradient, gradient)
    return a, g


@pytest.mark.parametrize("with_loss", [False, True], ids=["A", "A and G"])
def test_each_weight_is_solved_from_the_moments_of_the_dense_model(
    with_loss: bool, gathered: dict[str, Moments]
) -> None:
    net, dense = make_net(dtype=DOUBLE), make_net(dtype=DOUBLE)
    report = prune(net, "2:4", BATCHES, loss=labelled if with_loss else None, sequential=False)
    assert report.ok
    assert [weight.name for weight in report] == list(WEIGHTS)
    for weight in report:
        found, w = net.get_parameter(weight.name).detach(), dense.get_parameter(weight.name).detach()
        a, g = in_plain_loops(dense, weight.name)
        seen = gathered[weight.name]
        torch.testing.assert_close(seen.inputs, a)
        if with_loss:
            torch.testing.assert_close(seen.outputs, g)
        moments = (a, g if with_loss else None)
        assert same_bits(found, solve(w, "2:4", seen.inputs, seen.outputs).weight)
        assert report.model_errors[weight.name] == pytest.approx(model_error(w, found, *moments))
    assert same_bits(net.head.weight, dense.head.weight)


@pytest.mark.parametrize("with_loss", [False, True], ids=["A", "A and G"])
def test_block_by_block_each_sees_the_pruned_ones_before_it(with_loss: bool, gathered: dict[str, Moments]) -> None:
    net, plain = make_net(dtype=DOUBLE), make_net(dtype=DOUBLE)
    prune(net, "2:4", BATCHES, loss=labelled if with_loss else None, sequential=True)
    outputs = {name: in_plain_loops(plain, name)[1] for name in WEIGHTS}
    for block in (WEIGHTS[:2], WEIGHTS[2:]):
        for name in block:
            torch.testing.assert_close(gathered[name].inputs, in_plain_loops(plain, name)[0])
            if with_loss:
                torch.testing.assert_close(gathered[name].outputs, outputs[name])
        for name in block:
            found = solve(plain.get_parameter(name), "2:4", gathered[name].inputs, gathered[name].outputs)
            assert same_bits(net.get_parameter(name).detach(), found.weight)
            plain.get_parameter(name).data.copy_(found.weight)


# ---------------------------------------------------------------- limits


def test_a_pattern_that_keeps_all_changes_nothing() -> None:
    net, dense = make_net(), make_net()
    report = prune(net, "4:4", batches(2), loss=loss_of)
    assert report.ok
    assert set(report.model_errors.values()) == {0.0}
    assert_same_weights(net, dense)


def test_without_batches_the_largest_magnitudes_stay_with_their_bits() -> None:
    net, dense = make_net(), make_net()
    report = prune(net, "1:4")
    assert report.ok
    assert not report.model_errors
    assert report.selection is not None
    for name in WEIGHTS:
        assert same_bits(net.get_parameter(name).detach(), project(dense.get_parameter(name).detach(), "1:4"))


@pytest.mark.parametrize("loss", [None, loss_of], ids=["A", "A and G"])
def test_windows_change_no_bit(loss: Any) -> None:
    passed: list[int] = []
    nets = [make_net(), make_net()]
    for net, memory in zip(nets, (None, BYTES_A_WEIGHT), strict=True):
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        with net.register_forward_hook(count):
            prune(net, "2:4", batches(2), loss=loss, statistics_memory=memory, sequential=False)
        passed.append(calls)
    assert_same_weights(*nets)
    # Two batches for each window; without a loss function one call looks for a loss. A alone needs fewer windows.
    assert passed == ([3, 5] if loss is None else [2, 8])


@pytest.mark.parametrize(
    ("memory", "windows"),
    # In one block A of both weights takes as much as G of both: as much as A and G of one.
    [
        (BYTES_A_WEIGHT, 4),
        (2 * BYTES_A_WEIGHT - 1, 3),
        (2 * BYTES_A_WEIGHT, 2),
        (3 * BYTES_A_WEIGHT - 1, 2),
        (3 * BYTES_A_WEIGHT, 1),
    ],
)
def test_block_by_block_a_window_holds_g_of_all_its_weights_and_a_of_one_block(
    memory: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    live = bytes_of_statistics(monkeypatch)
    prune(
        make_net(), "2:4", batches(2), loss=loss_of, statistics_memory=memory, progress=lambda *now: told.append(now[2])
    )
    assert {text.partition(",")[0].partition(":")[0] for text in told} == {
        f"window {number + 1} of {windows}" for number in range(windows)
    }
    assert 0 < max(live) <= memory


@pytest.mark.parametrize("memory", [BYTES_A_WEIGHT, 4 * (8 * 8 + 16 * 16)])
def test_block_by_block_a_alone_is_held_of_one_block(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    live = bytes_of_statistics(monkeypatch)
    prune(make_net(), "2:4", batches(2), statistics_memory=memory)
    assert max(live) == memory


def bytes_of_statistics(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the bytes of all statistics that are held, with an entry for each that is made."""
    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    totals: list[int] = []
    make = Statistics._new_moments

    def spy(self: Statistics, *args: Any) -> Moments:
        made = make(self, *args)
        held.update(t for t in made.tensors.values() if t.ndim == 2)
        totals.append(sum(t.nbytes for t in held))
        return made

    monkeypatch.setattr(Statistics, "_new_moments", spy)
    return totals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_in_float32_and_rounded_once(dtype: torch.dtype, gathered: dict[str, Moments]) -> None:
    net, dense = make_net(dtype=dtype), make_net(dtype=dtype)
    assert prune(net, "2:4", batches(2, dtype=dtype), loss=loss_of).ok
    for name in WEIGHTS:
        seen = gathered[name]
        assert seen.inputs.dtype == torch.float32
        assert int(seen.dropped) == 0
        whole = solve(dense.get_parameter(name).detach().float(), "2:4", seen.inputs, seen.outputs).weight
        assert same_bits(net.get_parameter(name).detach(), whole.to(dtype))
        assert is_feasible(net.get_parameter(name))


@pytest.mark.parametrize("loss", [None, loss_of], ids=["A", "A and G"])
def test_tied_weights_are_pruned_once_from_all_their_inputs(loss: Any, gathered: dict[str, Moments]) -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    report = prune(net, "2:4", batches(2), loss=loss)
    assert [weight.name for weight in report] == [WEIGHTS[0], WEIGHTS[1], WEIGHTS[3]]
    assert net.blocks[1].up.weight is net.blocks[0].up.weight
    assert int(gathered[WEIGHTS[0]].passes) == 4
    assert int(gathered[WEIGHTS[1]].passes) == 2


class Scored(nn.Module):
    """A model whose output has a loss where it is given targets, as those of transformers have."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        y = self.net(x)
        return {"loss": None if labels is None else (y - labels).square().mean(), "logits": y}


def test_the_loss_in_the_output_counts_as_a_loss_function_does() -> None:
    data = [{"x": x, "labels": x.sum(-1, keepdim=True).sin()} for x in batches(2)]
    models = [Scored(make_net()) for _ in range(3)]
    assert prune(models[0], "2:4", data).ok
    assert prune(models[1], "2:4", list(batches(2)), loss=lambda model, x: loss_of(model.net, x)).ok
    assert prune(models[2], "2:4", [{"x": one["x"]} for one in data]).ok
    assert_same_weights(models[0], models[1])
    assert not same_bits(models[0].net.blocks[0].up.weight, models[2].net.blocks[0].up.weight)


# ---------------------------------------------------------------- block by block


class Chain(nn.Module):
    """A weight before all blocks, and blocks whose inputs are changed in place; an earlier output may be needed again,
    and a block called twice."""

    def __init__(self, skip: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early = nn.Linear(8, 8, bias=False)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.skip, self.twice = skip, twice

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.early(x))
        outputs: list[Tensor] = []
        for block in (*self.blocks, *(self.blocks if self.twice else ())):
            outputs.append(block(x.mul_(1.5)))
            x = outputs[-1] + outputs[0] if self.skip else outputs[-1]
        return x


@pytest.mark.parametrize("shape", [{}, {"skip": True}, {"twice": True}], ids=["chain", "skip", "twice"])
def test_finished_blocks_are_left_out_only_where_that_changes_nothing(
    shape: dict[str, bool], gathered: dict[str, Moments], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, seen, calls = [Chain(**shape), Chain(**shape)], [], []
    for model in models:
        with model.blocks[0].up.register_forward_hook(lambda *_: calls.append(1)):
            assert prune(model, "2:4", batches(2), select={r".*(up|down|early)\.weight": "2:4"}, sequential=True).ok
        seen.append((dict(gathered), len(calls)))
        calls.clear()
        gathered.clear()
        monkeypatch.setattr(Blocks, "_try_out", lambda *_: False)
    assert_same_weights(*models)
    (moments, passes), (its, whole_passes) = seen
    assert len(moments) == 7
    for name in moments:
        assert same_bits(moments[name].inputs, its[name].inputs)
    assert passes < whole_passes or shape


class Shared(nn.Module):
    """Blocks in two lists that stand the other way round than they run, one block in two places, or a weight that also
    stands before or behind all blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early = nn.Linear(8, 16, bias=False)
        self.second = nn.ModuleList(Block(8) for _ in range(2)) if kind == "order" else nn.ModuleList()
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.late = nn.Linear(8, 16, bias=False)
        if kind == "one block":
            self.blocks[1] = self.blocks[0]
        elif kind != "order":
            self.get_submodule(kind).weight = self.blocks[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.early(x))[..., :8]
        for block in (*self.blocks, *self.second):
            x = block(x)
        return self.late(x)


@pytest.mark.parametrize("memory", [None, BYTES_A_WEIGHT])
@pytest.mark.parametrize("loss", [None, loss_of], ids=["A", "A and G"])
@pytest.mark.parametrize("kind", ["order", "one block", "early", "late"])
def test_each_module_of_a_weight_counts_wherever_it_stands(
    kind: str, loss: Any, memory: int | None, gathered: dict[str, Moments]
) -> None:
    model = Shared(kind)
    rules = {r"(blocks|second)\..*(up|down)\.weight": "2:4"}
    report = prune(model, "2:4", batches(2), loss=loss, select=rules, statistics_memory=memory)
    assert len(list(report)) == len(gathered) == {"order": 8, "one block": 2}.get(kind, 4)
    tied = {"early": ["early.weight"], "late": ["blocks.0.up.weight"], "one block": list(gathered)}.get(kind, [])
    assert {name: int(seen.passes) for name, seen in gathered.items()} == {
        name: 4 if name in tied else 2 for name in gathered
    }


def test_a_window_of_one_block_takes_one_pass_and_the_tokens_of_the_loss(gathered: dict[str, Moments]) -> None:
    """The block runs twice, and the loss depends on half of its tokens."""
    model = Chain(twice=True)
    model.blocks = model.blocks[:1]
    calls: list[int] = []
    model.early.register_forward_hook(lambda *_: calls.append(1))
    prune(model, "2:4", batches(2), loss=lambda model, x: model(x)[:2].square().sum())
    assert {int(seen.tokens) for seen in gathered.values()} == {2 * 2 * 2}
    assert len(calls) == 2 + 1  # each batch, and the trial whether blocks can be left out


# ---------------------------------------------------------------- what is left alone


def projections(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
    """In place of the solve, where it does not matter what comes out."""
    for weight in weights:
        mask = keep_mask(weight.w, "2:4")
        yield Solved(project(weight.w, "2:4"), mask, 0.5, 0)


@pytest.mark.parametrize("sequential", [False, True])
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(
    sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admm_nxm.oneshot, "solutions", projections)
    told: list[tuple[int, int, str]] = []
    prune(make_net(), "2:4", batches(2), loss=loss_of, sequential=sequential, progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {total for _, total, _ in told} == {len(WEIGHTS)}
    assert told[-1][0] == len(WEIGHTS)
    for moment in range(len(told)):
        net = make_net()
        net.blocks[0].train()
        net.blocks[1].up.weight.requires_grad_(False)
        loss_of(net, next(batches(1))).backward()
        before, grads = weights_of(net), {name: p.grad for name, p in net.named_parameters()}
        left = iter(range(moment))

        def interrupt(*_: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(net, "2:4", batches(2), loss=loss_of, sequential=sequential, progress=interrupt)
        assert_same_weights(net, before)
        assert all(p.grad is grads[name] for name, p in net.named_parameters())
        assert [p.requires_grad for p in net.parameters()].count(False) == 1
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_failure_while_weights_are_written_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def solved(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
        for number, one in enumerate(projections(weights, moments)):
            yield one if number < 2 else Solved(torch.ones(3, 3), one.mask, 0.0, 0)

    monkeypatch.setattr(admm_nxm.oneshot, "solutions", solved)
    net, dense = make_net(), make_net()
    with pytest.raises(RuntimeError, match="size"):
        prune(net, "2:4", batches(1), sequential=False)
    assert_same_weights(net, dense)


def test_modes_gradients_and_what_asks_for_them_stay_and_frozen_weights_are_pruned() -> None:
    net = make_net()
    net.train()
    net.blocks[1].eval()
    net.blocks[0].up.weight.requires_grad_(False)
    loss_of(net, next(batches(1))).backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    copies = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    seen: list[bool] = []
    with net.blocks[0].register_forward_hook(lambda module, *_: seen.append(module.training)), torch.inference_mode():
        assert prune(net, "2:4", batches(2), loss=loss_of, sequential=False).ok
    assert seen == [False, False]
    assert [net.training, net.blocks[0].training, net.blocks[1].training] == [True, True, False]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [WEIGHTS[0]]
    for name, p in net.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or same_bits(p.grad, copies[name])
    assert is_feasible(net.blocks[0].up.weight)


@pytest.mark.parametrize("sequential", [False, True])
def test_weights_that_accelerate_keeps_in_main_memory(sequential: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, net = make_net(), make_net()
    accelerate.cpu_offload(net, execution_device="cpu")
    assert net.blocks[0].up.weight.is_meta
    prune(plain, "2:4", batches(2), loss=loss_of, sequential=sequential)
    assert prune(net, "2:4", batches(2), loss=loss_of, sequential=sequential).ok
    assert net.blocks[0].up.weight.is_meta
    x = next(batches(1))
    assert same_bits(net(x).detach(), plain(x).detach())


def test_weights_on_the_disk_are_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = make_net()
    accelerate.disk_offload(net, tmp_path, execution_device="cpu")
    with pytest.raises(
        ValueError, match=r"'blocks\.0\.up\.weight' has no values in memory: it is offloaded to the disk"
    ):
        prune(net, "2:4", batches(1))


# ---------------------------------------------------------------- bad input


def nan_batches() -> list[Tensor]:
    return [torch.full((4, 8), float("nan"))]


class Half(nn.Module):
    """The second block is not on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.net.blocks[0](x))


BAD = {
    "not a module": (lambda: {"w": torch.ones(4, 4)}, {}, TypeError, "model is a dict; a torch.nn.Module is needed"),
    "loss alone": (make_net, {"loss": loss_of}, TypeError, "a loss needs batches"),
    "one batch": (make_net, {"batches": torch.ones(4, 8)}, TypeError, "batches is a Tensor; a list or a loader"),
    "no batches": (make_net, {"batches": iter(())}, ValueError, "batches is empty; give at least one batch"),
    "no loss": (
        make_net,
        {"batches": batches(1), "loss": lambda m, x: m(x)},
        ValueError,
        r"loss of batch 1 is a .*\(4, 1\)",
    ),
    "dead loss": (
        make_net,
        {"batches": batches(1), "loss": lambda m, x: loss_of(m, x).detach()},
        ValueError,
        "does not depend on the weights to prune",
    ),
    "labels now and then": (
        lambda: Scored(make_net()),
        {"batches": [{"x": torch.ones(1, 8), "labels": torch.ones(1, 1)}, {"x": torch.ones(1, 8)}]},
        ValueError,
        "the loss of batch 2 is None; one floating-point number is needed: give labels in every batch or in none",
    ),
    "nothing finite": (
        make_net,
        {"batches": nan_batches()},
        ValueError,
        "1 of 1 passes through its module had infinite",
    ),
    "not on the way": (
        Half,
        {"batches": batches(1)},
        ValueError,
        r"'net\.blocks\.1\.up\.weight' has no statistics: no token of the batches has reached its module",
    ),
    "memory": (make_net, {"batches": batches(1), "statistics_memory": 0}, ValueError, "statistics_memory=0"),
    "meta": (lambda: make_net().to("meta"), {}, ValueError, "has no values in memory"),
}


@pytest.mark.parametrize(("make", "options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input(make: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = make()
    before = weights_of(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind, match=message):
        prune(model, "2:4", **options)
    if before and not any(w.is_meta for w in before.values()):
        assert_same_weights(model, before)


def test_weights_that_are_not_finite_are_named() -> None:
    net = make_net()
    with torch.no_grad():
        net.blocks[1].down.weight[0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"1 of 4 weights have NaN or infinite entries: blocks\.1\.down\.weight; nothing"
    ):
        prune(net, "2:4", batches(1))


# ---------------------------------------------------------------- around it


def test_a_weight_that_no_hook_reaches_is_pruned_by_magnitude() -> None:
    net = make_net()
    net.blocks[0].experts = nn.Parameter(torch.randn(2, 8, 8))
    dense = net.blocks[0].experts.detach().clone()
    report = prune(net, batches=batches(1), select={r".*(experts|up\.weight)": "2:4"})
    assert report.model_errors.keys() == {WEIGHTS[0], WEIGHTS[2]}
    assert same_bits(net.blocks[0].experts.detach(), project(dense, "2:4"))
    assert report.selection is not None
    assert "no module hook reaches it" in str(report.selection)
    lines = str(report).splitlines()
    assert lines[0].endswith("worst model error")
    without, with_one = (
        next(line for line in lines if line.startswith(name)) for name in ("blocks.0.exp", "blocks.*.up")
    )
    assert float(with_one.split()[-1]) == pytest.approx(max(report.model_errors.values()), rel=0.1)
    assert without.split()[-1] == "0"  # bad groups, and nothing behind them


def test_a_bar_of_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    prune(make_net(), "2:4", batches(1), progress=True, select={r"blocks\.1\.up\.weight": "2:4"})
    assert "solving blocks.1.up.weight: 100%" in capsys.readouterr().err


def test_training_goes_on_from_a_pruned_model_and_resumes_with_the_same_bits() -> None:
    prune(start := make_net(), "1:4", batches(2), loss=loss_of)
    start_weights, nets = weights_of(start), [make_net(), make_net()]
    optimizers = []
    for net in nets:
        net.load_state_dict(start.state_dict())
        optimizers.append(admm(net, prune_at=0))
    train(nets[0], optimizers[0], 6)
    train(nets[1], optimizers[1], 3)
    other = make_net()
    other.load_state_dict(start.state_dict())
    resumed = admm(other, prune_at=0)
    other.load_state_dict(saved(nets[1].state_dict()))
    resumed.load_state_dict(saved(optimizers[1].state_dict()))
    train(other, resumed, 3, start=3)
    assert_same_weights(other, nets[0])
    for name in WEIGHTS:
        w = nets[0].get_parameter(name)
        assert torch.equal(w != 0, start_weights[name] != 0)
        assert not torch.equal(w, start_weights[name])
    assert optimizers[0].finalize().ok


def test_the_report_of_a_run_has_the_model_errors() -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, STEPS)
    report = optimizer.finalize()
    assert report.model_errors == optimizer.figures().model_errors
    assert report.model_errors.keys() == set(WEIGHTS)


class Pooled(nn.Module):
    """Only the first token of each text gets through the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net(dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.net.blocks
        return self.net.head(last(first(x).cumsum(1))[:, 0])


@pytest.mark.parametrize("sequential", [False, True])
def test_tokens_on_which_the_loss_does_not_depend_do_not_count(sequential: bool, gathered: dict[str, Moments]) -> None:
    data = [torch.randn(2, 3, 8, dtype=DOUBLE) for _ in range(2)]
    prune(model := Pooled(), "2:4", data, loss=lambda net, x: net(x).square().mean(), sequential=sequential)
    tokens = {name: int(seen.tokens) for name, seen in gathered.items()}
    assert tokens == {f"net.{name}": 4 for name in WEIGHTS}
    first = torch.cat(data)[:, 0]
    if sequential:  # the last block gets what the pruned first one makes of the first tokens
        with torch.no_grad():
            first = model.net.blocks[0](first)
        torch.testing.assert_close(gathered[f"net.{WEIGHTS[2]}"].inputs, first.T @ first)


class Masked(nn.Module):
    """Takes an attention mask, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("sequential", [False, True])
def test_padding_does_not_count(sequential: bool, gathered: dict[str, Moments]) -> None:
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = x.masked_fill(mask[:, :, None] == 0, 100.0)
    rule = {r".*up\.weight": "2:4"}
    prune(Masked(), batches=[{"x": padded, "attention_mask": mask}], select=rule, sequential=sequential)
    with_padding = dict(gathered)
    texts = [{"x": x[:1, :3], "attention_mask": mask[:1, :3]}, {"x": x[1:], "attention_mask": mask[1:]}]
    prune(Masked(), batches=texts, select=rule, sequential=sequential)
    for name, seen in gathered.items():
        assert int(with_padding[name].tokens) == int(seen.tokens) == 8
        torch.testing.assert_close(with_padding[name].inputs, seen.inputs)
