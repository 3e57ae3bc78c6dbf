"""Line 11 of the contract: DTensor, on two ranks (gloo).

Every check runs the same steps on plain tensors and on sharded ones, with the same gradients, and compares bits.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from admm_nxm.masks import PACKED, pack, unpack
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Partial

from admm_nxm import ADMMNxM, ConvergenceWarning, project, verify
from admm_nxm.sharding import check_sharding, local, reduce_sums, rows_divide_into_bytes, wrap_like
from tests.helpers import CASES, every_form, spelt_out

# Older torch warns of random numbers on a CPU mesh, which nothing here draws.
pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support:UserWarning")

WORLD = 2
SHAPES = {"even": (6, 16), "uneven": (5, 16), "one-row": (1, 16), "wide": (4, 32), "narrow": (4, 24)}


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


def set_gradients(model: nn.Module, step: int) -> None:
    for number, p in enumerate(model.parameters()):
        full = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
        p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def make(model: nn.Module, inner: str = "AdamW", **options: Any) -> ADMMNxM:
    optimizer = getattr(torch.optim, inner)(model.parameters(), lr=1e-2)
    defaults = {"pattern": "1:4", "total_steps": 20, "residual_tolerance": 99.0}
    return ADMMNxM(optimizer, model, **{**defaults, **spelt_out(options)})


def steps(model: nn.Module, optimizer: ADMMNxM, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(model, step)
        optimizer.step()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(full(p), full(q)), name


def by_rows(weight: Tensor) -> list[Placement]:
    return [Shard(0)]


def by_groups(weight: Tensor) -> list[Placement]:
    return [Shard(1)]  # 8, 16 or 12 of the grouped dimension on each rank


def replicated(weight: Tensor) -> list[Placement]:
    return [Replicate()]


def check_runs_alike(rank: int, mesh: Any, tmp: str) -> None:
    for placements in (by_rows, by_groups, replicated):
        for inner in ("AdamW", "SGD"):
            for penalty in CASES:
                plain, sharded = Stack(), Stack().shard(placements, mesh)
                one, two = make(plain, inner, penalty=penalty), make(sharded, inner, penalty=penalty)
                for first, last in ((0, 1), (1, 9), (9, 17), (17, 19)):
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
                    everyone: list[Any] = [None] * WORLD
                    dist.all_gather_object(everyone, theirs)
                    assert repr(everyone[0]) == repr(everyone[1])
                    with one.projected(), two.projected():
                        assert_equal(plain, sharded)
                        assert verify(sharded, "1:4").ok
                    assert_equal(plain, sharded)
                report, same = one.finalize(), two.finalize()
                assert report == same
                assert report.ok
                assert verify(sharded, "1:4") == verify(plain, "1:4")
                steps(plain, one, 19, 22)
                steps(sharded, two, 19, 22)
                assert_equal(plain, sharded)
                state = two.state[next(iter(sharded.parameters()))]["admm_consensus"]
                assert isinstance(state, DTensor)
                assert state.placements == next(iter(sharded.parameters())).placements


def check_masks_are_packed_where_every_rank_has_whole_bytes(rank: int, mesh: Any, tmp: str) -> None:
    for placements, stop in itertools.product((by_rows, by_groups, replicated), (7, 19)):
        sharded = Stack().shard(placements, mesh)
        optimizer = make(sharded)
        steps(sharded, optimizer, 0, stop)
        assert optimizer.frozen == (stop == 19)
        for shape, p in zip(SHAPES.values(), sharded.parameters(), strict=True):
            state = optimizer.state[p]["admm_consensus"]
            rows, width = shape
            packed = placements is not by_groups or width % 16 == 0
            assert isinstance(state, DTensor)
            assert state.placements == p.placements
            assert state.dtype == (PACKED if packed else torch.bool)
            assert state.shape == (rows, width // 8 if packed else width)
            assert state.stride() == (state.shape[1], 1)
            assert local(state).numel() == local(p).numel() // (8 if packed else 1)
            assert local(state).is_contiguous()


def check_step_communicates_nothing(rank: int, mesh: Any, tmp: str) -> None:
    for penalty in CASES:
        sharded = Stack().shard(by_rows, mesh)
        optimizer = make(sharded, penalty=penalty)
        for step in range(20):
            set_gradients(sharded, step)
            with CommDebugMode() as comm:
                optimizer.step()
            assert comm.get_total_counts() == 0, (step, comm.get_comm_counts())
    with CommDebugMode() as comm:
        optimizer.residuals()
    assert comm.get_total_counts() > 0


def check_splitting_a_group_is_refused_on_all_ranks(rank: int, mesh: Any, tmp: str) -> None:
    sharded = Stack().shard(by_groups, mesh)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.weight.*\(6, 16\).*Shard\(dim=1\).*parts of 8.*group=16"):
        make(sharded, pattern="4:16", ineligible="skip")  # the narrow weight
    partial = Stack()
    module = partial.blocks[0][0]
    module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), mesh, [Partial()], run_check=False))
    with pytest.raises(ValueError, match="must be sharded or replicated"):
        make(partial)


def check_failure_is_announced_and_bad_values_found_anywhere(rank: int, mesh: Any, tmp: str) -> None:
    sharded = Stack().shard(by_rows, mesh)
    optimizer = make(sharded, residual_tolerance=0.01, rho=1e-6)
    steps(sharded, optimizer, 0, 20)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["admm_freeze_residual"] > 0.01
    weight = sharded.blocks[0][0].weight
    with torch.no_grad():
        if rank == 1:
            local(weight)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.weight"):  # on rank 0 as well
        optimizer.finalize()
    with torch.no_grad():
        local(weight).nan_to_num_(0.0)
    with pytest.warns(ConvergenceWarning):
        optimizer.finalize()


def check_checkpoint_travels_between_plain_and_sharded(rank: int, mesh: Any, tmp: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def states(model: nn.Module, optimizer: ADMMNxM) -> dict[str, Any]:
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    for stop, penalty in itertools.product((7, 19), CASES):
        plain, sharded = Stack(), Stack().shard(by_rows, mesh)
        one, two = make(plain, penalty=penalty), make(sharded, penalty=penalty)
        steps(plain, one, 0, stop)
        steps(sharded, two, 0, stop)
        for source, target in (((plain, one), True), ((sharded, two), False)):
            path = os.path.join(tmp, f"{stop}-{penalty}-{target}")
            dcp.save(states(*source), checkpoint_id=path)
            resumed = Stack().shard(by_rows, mesh) if target else Stack()
            with torch.no_grad():
                for p in resumed.parameters():
                    local(p).zero_()
            optimizer = make(resumed, penalty=penalty)
            loaded = states(resumed, optimizer)
            dcp.load(loaded, checkpoint_id=path)
            set_model_state_dict(resumed, loaded["model"])
            set_optimizer_state_dict(resumed, optimizer, loaded["optimizer"])
            reference = Stack()
            whole = make(reference, penalty=penalty)
            steps(reference, whole, 0, 20)
            steps(resumed, optimizer, stop, 20)
            assert_equal(resumed, reference)


def check_whole_state_dict_travels_between_layouts(rank: int, mesh: Any, tmp: str) -> None:
    """Loaders that fill a state dict in place need the layout of the checkpoint; with whole tensors, masks are repacked
    where one of the two cannot pack them."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    whole = StateDictOptions(full_state_dict=True)
    for stop in (7, 19):
        sharded, plain, reference = Stack().shard(by_groups, mesh), Stack(), Stack()
        one, two, three = make(sharded), make(plain), make(reference)
        steps(sharded, one, 0, stop)
        weights = get_model_state_dict(sharded, options=whole)
        state = get_optimizer_state_dict(sharded, one, options=whole)
        narrow = f"blocks.{list(SHAPES).index('narrow')}.0.weight"
        assert state["state"][narrow]["admm_consensus"].dtype == torch.bool
        with torch.no_grad():
            for p in plain.parameters():
                p.zero_()
        set_model_state_dict(plain, weights)
        set_optimizer_state_dict(plain, two, state)
        assert two.state[plain.get_parameter(narrow)]["admm_consensus"].dtype == PACKED
        steps(plain, two, stop, 20)
        steps(reference, three, 0, 20)
        assert_equal(plain, reference)


def check_fsdp2_by_hand_equals_one_process(rank: int, mesh: Any, tmp: str) -> None:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        return  # torch before 2.6 has it under a private name

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
            self.head = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    for penalty in CASES:
        plain, sharded = Chain(), Chain()
        one, two = make(plain, penalty=penalty), make(sharded, penalty=penalty)
        before = list(sharded.parameters())
        fully_shard(sharded, mesh=mesh)
        # What Accelerate does with an optimizer that was built before sharding.
        exchanged = dict(zip(before, sharded.parameters(), strict=True))
        for group in two.param_groups:
            group["params"] = [exchanged[p] for p in group["params"]]
        for step in range(20):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            for model, optimizer in ((plain, one), (sharded, two)):
                optimizer.zero_grad()
                model(x).square().mean().backward()  # the same batch on both ranks: their mean is that of one process
                optimizer.step()
        assert two.param_groups[0]["admm_step"] == 20
        for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(full(q), p, rtol=1e-4, atol=1e-6, msg=name)
        assert all(torch.equal(mask, full(two.masks()[name])) for name, mask in one.masks().items())
        assert two.finalize().ok


CHECKS = {name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")}
del CHECKS["sharding"]  # the function under test


def worker(rank: int, tmp: str, name: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{tmp}/store", rank=rank, world_size=WORLD)
    CHECKS[name](rank, init_device_mesh("cpu", (WORLD,)), tmp)
    dist.barrier()
    # Not through the interpreter's end: gloo's threads may still be about there, and torch then aborts the process.
    os._exit(0)


@pytest.mark.parametrize("name", CHECKS)
def test_c11_two_ranks(name: str, tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path), name), nprocs=WORLD)


# Along the last dimension, masks are laid out as on one process where every rank has whole bytes of them.
ALIKE = rf"blocks\.[0-{list(SHAPES).index('narrow') - 1}]\..*"
CROSSINGS = {"rows": (by_rows, {}), "groups": (by_groups, {"select": {ALIKE: "1:4"}})}


def crossing_run(folder: str, mesh: Any, penalty: str, stop: int, way: str, save: bool) -> Stack:
    """Save a run at ``stop``, sharded over the mesh if there is one, or load it and train to the end."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    placements, options = CROSSINGS[way]
    model = Stack() if mesh is None else Stack().shard(placements, mesh)
    optimizer = make(model, penalty=penalty, **options)
    path = os.path.join(folder, f"{penalty}-{stop}-{way}")
    if save:
        steps(model, optimizer, 0, stop)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
        return model
    with torch.no_grad():
        for p in model.parameters():
            local(p).zero_()
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    steps(model, optimizer, stop, 20)
    return model


def crossing_reference(penalty: str, way: str) -> Stack:
    reference = Stack()
    steps(reference, make(reference, penalty=penalty, **CROSSINGS[way][1]), 0, 20)
    return reference


def crossing_worker(rank: int, tmp: str, save: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{tmp}/store-{save}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for penalty, stop, way in itertools.product(CASES, (7, 19), CROSSINGS):
        model = crossing_run(f"{tmp}/{'two' if save else 'one'}", mesh, penalty, stop, way, save)
        if not save:
            assert_equal(model, crossing_reference(penalty, way))
    dist.barrier()
    os._exit(0)


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.checkpoint, that there is one process only
def test_c11_a_checkpoint_of_two_ranks_is_read_by_one_and_the_other_way_round(tmp_path: Path) -> None:
    mp.spawn(crossing_worker, args=(str(tmp_path), True), nprocs=WORLD)
    for penalty, stop, way in itertools.product(CASES, (7, 19), CROSSINGS):
        model = crossing_run(f"{tmp_path}/two", None, penalty, stop, way, save=False)
        assert_equal(model, crossing_reference(penalty, way))
        crossing_run(f"{tmp_path}/one", None, penalty, stop, way, save=True)
    mp.spawn(crossing_worker, args=(str(tmp_path), False), nprocs=WORLD)


@pytest.fixture
def lone_mesh(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
@every_form
def test_c11_one_rank_is_the_plain_run(penalty: str, lone_mesh: Any, placement: Placement) -> None:
    plain, sharded = Stack(), Stack().shard(lambda weight: [placement], lone_mesh)
    one, two = make(plain, penalty=penalty), make(sharded, penalty=penalty)
    steps(plain, one, 0, 20)
    steps(sharded, two, 0, 20)
    assert_equal(plain, sharded)
    assert one.finalize() == two.finalize()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 8), (8,)])
def test_c11_packed_masks_are_wrapped_like_the_weight(
    shape: tuple[int, ...], placement: Placement, lone_mesh: Any
) -> None:
    if placement.is_shard() and placement.dim >= len(shape):
        placement = Shard(0)
    weight = distribute_tensor(torch.randn(shape), lone_mesh, [placement])
    mask = local(weight) > 0
    wrapped = wrap_like(pack(mask), weight)
    assert isinstance(wrapped, DTensor)
    assert wrapped.placements == weight.placements
    assert wrapped.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack(local(wrapped)), mask)
    assert rows_divide_into_bytes(weight)
    assert not rows_divide_into_bytes(distribute_tensor(torch.randn(4, 12), lone_mesh, [placement]))


def test_c11_parts_are_wrapped_like_the_whole(lone_mesh: Any) -> None:
    whole = distribute_tensor(torch.randn(5, 8), lone_mesh, [Shard(0)])
    wrapped = wrap_like(local(whole).clone(), whole)
    assert isinstance(wrapped, DTensor)
    assert wrapped.shape == whole.shape
    assert torch.equal(reduce_sums([torch.ones(2)], [whole]), torch.ones(1, 2))
    check_sharding("w", whole, 1, 3)
    with pytest.raises(ValueError, match="parts of 8"):
        check_sharding("w", distribute_tensor(torch.randn(5, 8), lone_mesh, [Shard(1)]), 1, 3)
    assert verify(
        {"layers.0.fc.weight": distribute_tensor(project(torch.randn(8, 8), "2:4"), lone_mesh, [Shard(0)])}
    ).ok
