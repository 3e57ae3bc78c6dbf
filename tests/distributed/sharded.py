"""DTensor on two ranks.

Where bits are compared, every run makes the same steps on plain tensors and on sharded ones, with the same gradients.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Partial

from admm_nxm import ADMMNxM, ConvergenceWarning, prune, verify
from admm_nxm.sharding import local
from tests.distributed.pair import WORLD, alike_on_all_ranks, full
from tests.helpers import CALIBRATION, DENSE, FORMS, FROZEN, STEPS, Net

SHAPES = {"even": (6, 16), "uneven": (5, 16), "one-row": (1, 16), "wide": (4, 32), "narrow": (4, 24)}
CALIBRATED = set(range(14, 17))
"""Steps of a run with the exact w-step in which ranks may talk to one another: the last of them solves."""


class Stack(nn.Module):
    """One prunable weight a block, of the shapes above."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rows, bias=False)) for rows, width in SHAPES.values()
        )
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def shard(self, placements_of: Callable[[Tensor], list[Placement]], mesh: Any) -> Stack:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach()
                module.weight = nn.Parameter(distribute_tensor(weight, mesh, placements_of(weight)))
        return self


def pass_through(model: nn.Module, step: int) -> None:
    """Forward and backward passes with inputs and output gradients that are the same bits however weights lie, and then
    gradients that are."""
    for number, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + number)
        x = torch.randn(40, p.shape[1], generator=generator)
        c = torch.randn(40, p.shape[0], generator=generator)
        gradient = torch.randn(p.shape, generator=generator)
        if isinstance(p, DTensor):
            x, c = (distribute_tensor(t, p.device_mesh, [Replicate()]) for t in (x, c))
            gradient = distribute_tensor(gradient, p.device_mesh, p.placements)
        p.grad = None
        (model.blocks[number](x) * c).sum().backward()
        p.grad = gradient


def make(model: nn.Module, form: str = "exact", inner: str = "AdamW", **options: Any) -> ADMMNxM:
    optimizer = getattr(torch.optim, inner)(model.parameters(), lr=1e-2)
    return FORMS[form](model, lambda _: optimizer, **options)


def steps(model: nn.Module, optimizer: ADMMNxM, first: int, last: int) -> None:
    for step in range(first, last):
        pass_through(model, step)
        optimizer.step()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(full(p), full(q)), name


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (WORLD,))


def by_rows(weight: Tensor) -> list[Placement]:
    return [Shard(0)]


def by_groups(weight: Tensor) -> list[Placement]:
    return [Shard(1)]  # 8, 16 or 12 of the grouped dimension on each rank


def replicated(weight: Tensor) -> list[Placement]:
    return [Replicate()]


def check_runs_alike(folder: Path) -> None:
    cases = ((by_rows, "AdamW"), (by_groups, "SGD"), (replicated, "AdamW"))
    for (placements, inner), form in itertools.product(cases, FORMS):
        plain, sharded = Stack(), Stack().shard(placements, mesh())
        one, two = make(plain, form, inner), make(sharded, form, inner)
        for first, last in ((0, DENSE), (DENSE, 17), (17, FROZEN)):
            steps(plain, one, first, last)
            steps(sharded, two, first, last)
            assert_equal(plain, sharded)
            for name, mask in one.masks().items():
                assert torch.equal(mask, full(two.masks()[name]))
                assert torch.equal(one.auxiliary(name), full(two.auxiliary(name)))
                assert torch.equal(one.dual(name), full(two.dual(name)))
            ours, theirs = one.residuals(), two.residuals()
            for name, residual in ours.per_weight.items():
                for field in ("primal", "dual", "mask_churn"):
                    a, b = getattr(residual, field), getattr(theirs.per_weight[name], field)
                    assert a == pytest.approx(b, rel=1e-5, nan_ok=True), (name, field)
            alike_on_all_ranks(theirs)
            with one.projected(), two.projected():
                assert_equal(plain, sharded)
                assert verify(sharded, "1:4").ok
            assert_equal(plain, sharded)
        assert one.figures() == two.figures()
        report = one.finalize()
        assert report == two.finalize()
        assert report.ok
        assert verify(sharded, "1:4") == verify(plain, "1:4")
        steps(plain, one, FROZEN, 22)
        steps(sharded, two, FROZEN, 22)
        assert_equal(plain, sharded)
        for p in sharded.parameters():
            mask = two.state[p]["admm_mask"]
            assert isinstance(mask, DTensor)
            assert mask.placements == p.placements
            assert mask.shape == p.shape


def check_a_run_that_ends_early_is_the_same_on_all_ranks(folder: Path) -> None:
    for stop in (DENSE, CALIBRATION):
        plain, sharded = Stack(), Stack().shard(by_rows, mesh())
        one, two = make(plain), make(sharded)
        steps(plain, one, 0, stop)
        steps(sharded, two, 0, stop)
        with pytest.warns(ConvergenceWarning):
            report = one.finalize()
        with pytest.warns(ConvergenceWarning):
            assert two.finalize() == report
        assert_equal(plain, sharded)


def check_step_communicates_nothing_outside_calibration(folder: Path) -> None:
    for form, placements in (("exact", by_rows), ("paper", by_groups)):
        sharded = Stack().shard(placements, mesh())
        optimizer = make(sharded, form)
        talked = set()
        for step in range(STEPS):
            pass_through(sharded, step)
            with CommDebugMode() as comm:
                optimizer.step()
            if comm.get_total_counts():
                talked.add(step)
        # The paper's form asks once, before it projects, whether all weights are finite.
        assert talked <= (CALIBRATED if form == "exact" else {13}), talked
        assert optimizer.frozen
    with CommDebugMode() as comm:
        optimizer.residuals()
    assert comm.get_total_counts() > 0


def check_splitting_a_group_is_refused_on_all_ranks(folder: Path) -> None:
    sharded = Stack().shard(by_groups, mesh())
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.weight.*\(6, 16\).*Shard\(dim=1\).*parts of 8.*group=16"):
        make(sharded, pattern="4:16", ineligible="skip")  # the narrow weight
    partial = Stack()
    module = partial.blocks[0][0]
    module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), mesh(), [Partial()], run_check=False))
    with pytest.raises(ValueError, match="must be sharded or replicated"):
        make(partial)


def check_bad_values_are_found_anywhere(folder: Path) -> None:
    for stop in (16, FROZEN):  # before the step that solves, and in finalize()
        sharded = Stack().shard(by_rows, mesh())
        optimizer = make(sharded, inner="SGD")
        steps(sharded, optimizer, 0, stop)
        weight = sharded.blocks[0][0].weight
        if stop == 16:
            pass_through(sharded, stop)
        before = full(sharded.blocks[3][0].weight).clone()
        with torch.no_grad():
            if dist.get_rank() == 1:
                local(weight)[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"NaN or infinite entries.*blocks\.0\.0\.weight"):  # on rank 0 as well
            optimizer.step() if stop == 16 else optimizer.finalize()
        assert optimizer.frozen == (stop == FROZEN)
        assert stop == 16 or torch.equal(full(sharded.blocks[3][0].weight), before)
        with torch.no_grad():
            local(weight).nan_to_num_(0.0)
        if stop == 16:
            steps(sharded, optimizer, 17, 18)  # it gathers on, and tries again
            assert optimizer.frozen
        assert optimizer.finalize().ok


def check_state_dict_of_its_own_resumes_with_the_same_bits(folder: Path) -> None:
    """As Trainer and Accelerate save it under DDP; inside calibration the statistics are in it."""
    for form, stop in itertools.product(FORMS, (DENSE, CALIBRATION, FROZEN)):
        whole = Stack().shard(by_rows, mesh())
        optimizer = make(whole, form)
        steps(whole, optimizer, 0, stop)
        path = folder / f"{form}-{stop}-{dist.get_rank()}.pt"
        torch.save((whole.state_dict(), optimizer.state_dict()), path)
        again = Stack().shard(by_rows, mesh())
        second = make(again, form)
        weights, state = torch.load(path, weights_only=False)  # DTensors are no plain values
        again.load_state_dict(weights)
        second.load_state_dict(state)
        steps(whole, optimizer, stop, STEPS)
        steps(again, second, stop, STEPS)
        assert_equal(whole, again)
        assert second.figures() == optimizer.figures()


def check_whole_state_dict_travels_between_layouts(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    for form, stop in itertools.product(FORMS, (DENSE, FROZEN)):
        sharded, plain, reference = Stack().shard(by_groups, mesh()), Stack(), Stack()
        one, two, three = make(sharded, form), make(plain, form), make(reference, form)
        steps(sharded, one, 0, stop)
        weights = get_model_state_dict(sharded, options=whole)
        state = get_optimizer_state_dict(sharded, one, options=whole)
        with torch.no_grad():
            for p in plain.parameters():
                p.zero_()
        set_model_state_dict(plain, weights)
        set_optimizer_state_dict(plain, two, state)
        steps(plain, two, stop, STEPS)
        steps(reference, three, 0, STEPS)
        assert_equal(plain, reference)


def rows_of(step: int) -> Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(model: nn.Module, optimizer: ADMMNxM, rank: int | None) -> dict[str, Tensor]:
    """Steps of whole batches, of which each rank sees its part; return the weights as they were before the solve."""
    before = {}
    for step in range(STEPS):
        x = rows_of(step) if rank is None else rows_of(step).chunk(WORLD)[rank]
        optimizer.zero_grad()
        (model(x) - x.sum(-1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        if step == 12:
            before = {name.removeprefix("module."): full(p.detach()).clone() for name, p in model.named_parameters()}
    return before


def small_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def same_as_one_process(model: nn.Module, optimizer: ADMMNxM, form: str, before: dict[str, Tensor]) -> None:
    """The same weights to rounding up to the solve, and the same masks; on all ranks the same bits."""
    alone = small_net()
    its = make(alone, form, "SGD")
    for name, w in train(alone, its, None).items():
        torch.testing.assert_close(before[name], w, rtol=1e-9, atol=1e-11)
    for name, mask in its.masks().items():
        assert torch.equal(full(optimizer.masks()[name]), mask), name
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        # The least squares of the solve stop at a tolerance of the loss, which leaves the weights some room.
        assert (full(p.detach()) - q.detach()).norm() < (0.02 if form == "exact" else 1e-9) * q.norm()
        alike_on_all_ranks(full(p.detach()).tolist())
    assert optimizer.figures().model_errors == pytest.approx(its.figures().model_errors, rel=1e-2)
    alike_on_all_ranks(optimizer.figures())
    assert optimizer.finalize().ok


def check_ddp_by_hand_equals_one_process(folder: Path) -> None:
    for form in FORMS:
        net = small_net()
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = make(model, form, "SGD")
        before = train(model, optimizer, dist.get_rank())
        same_as_one_process(net, optimizer, form, before)


def check_fsdp2_by_hand_equals_one_process(folder: Path) -> None:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return  # torch before 2.6 has it under a private name
    for form, exchange in (("exact", False), ("exact", True), ("paper", True)):
        net = small_net()
        whole = list(net.parameters())
        optimizer = make(net, form, "SGD") if exchange else None
        for block in net.blocks:
            fully_shard(block, mesh=mesh())
        fully_shard(net, mesh=mesh())
        if optimizer is None:
            optimizer = make(net, form, "SGD")
        else:
            # What Accelerate does with an optimizer that was built before sharding.
            exchanged = dict(zip(whole, net.parameters(), strict=True))
            for group in optimizer.param_groups:
                group["params"] = [exchanged[p] for p in group["params"]]
        before = train(net, optimizer, dist.get_rank())
        same_as_one_process(net, optimizer, form, before)


def check_pruning_without_training_adds_up_the_batches(folder: Path) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) - x.sum(-1, keepdim=True).sin()).square().mean()

    data = [rows_of(number) for number in range(WORLD)]
    for sequential in (False, True):
        mine, everyones = small_net(), small_net()
        prune(mine, "1:4", data[dist.get_rank() :][:1], loss=loss, sequential=sequential)
        # Twice the sums make no difference.
        report = prune(everyones, "1:4", data, loss=loss, sequential=sequential)
        for weight in report:
            p, q = mine.get_parameter(weight.name), everyones.get_parameter(weight.name)
            assert (p - q).norm() < 0.02 * q.norm()
            assert torch.equal(p != 0, q != 0)
            alike_on_all_ranks(p.tolist())
    with pytest.raises(ValueError, match=r"'blocks\.0\.0\.weight' is sharded .*prune the model before it is sharded"):
        prune(Stack().shard(by_rows, mesh()))


# ---------------------------------------------------------------- from two ranks to one and back

CROSSINGS = [
    *itertools.product(FORMS, (DENSE, CALIBRATION, FROZEN), (by_rows,)),
    ("exact", FROZEN, by_groups),
    ("paper", DENSE, by_groups),
]


def crossing_run(folder: Path, mesh: Any, crossing: Any, save: bool) -> Stack:
    """Save a run, sharded over the mesh if there is one, or load it and train to the end."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    form, stop, placements = crossing
    model = Stack() if mesh is None else Stack().shard(placements, mesh)
    optimizer = make(model, form)
    path = str(folder / f"{form}-{stop}-{placements.__name__}")
    if save:
        steps(model, optimizer, 0, stop)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
        return model
    with torch.no_grad():
        for p in model.parameters():
            local(p).zero_()
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=path)
    begins_again = form == "exact" and stop == CALIBRATION
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert begins_again == any("calibration of this window begins again" in str(w.message) for w in said)
    steps(model, optimizer, stop, STEPS)
    assert optimizer.frozen
    return model


def assert_as_without_a_checkpoint(model: Stack, crossing: Any) -> None:
    """Where the calibration began again, as a run in which it began later."""
    form, stop, _ = crossing
    reference = Stack()
    late = {"prune_at": stop + 3} if form == "exact" and stop == CALIBRATION else {}
    steps(reference, make(reference, form, **late), 0, STEPS)
    if form == "exact" and stop == FROZEN:
        # Two ranks and one add up their statistics in another order.
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(full(p) != 0, q != 0)
            torch.testing.assert_close(full(p), q, rtol=1e-4, atol=1e-5)
    else:
        assert_equal(model, reference)


def check_crossings_are_saved_by_two(folder: Path) -> None:
    for crossing in CROSSINGS:
        crossing_run(folder.parent / "two", mesh(), crossing, save=True)


def second_one_reads_what_two_saved(folder: Path) -> None:
    for crossing in CROSSINGS:
        model = crossing_run(folder.parent / "two", None, crossing, save=False)
        assert_as_without_a_checkpoint(model, crossing)
        crossing_run(folder.parent / "one", None, crossing, save=True)


def third_two_read_what_one_saved(folder: Path) -> None:
    for crossing in CROSSINGS:
        assert_as_without_a_checkpoint(crossing_run(folder.parent / "one", mesh(), crossing, save=False), crossing)
