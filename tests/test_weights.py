"""The prunable weights: cut into windows, found again by name, and set in every copy that the inner optimizer keeps."""

from __future__ import annotations

import copy
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from admm_nxm import keep_mask
from admm_nxm.selection import select_weights
from admm_nxm.weights import CONSENSUS, MASK, Weights, windows_of
from tests.cores import BYTES_A_WEIGHT, WEIGHTS, adamw, exact, is_feasible
from tests.helpers import Net, make_net, same_bits, train

UP = WEIGHTS[0]

# ---------------------------------------------------------------- windows


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 60))
def test_windows_are_runs_that_fit_and_cannot_be_joined(needs: list[int], memory: int) -> None:
    windows = windows_of(needs, memory)
    assert len(windows) == len(needs)
    runs = [
        (number, [need for _, need in run]) for number, run in groupby(zip(windows, needs, strict=True), lambda p: p[0])
    ]
    assert [number for number, _ in runs] == list(range(len(runs)))
    assert all(sum(run) <= memory or len(run) == 1 for _, run in runs)
    for (_, run), (_, following) in pairwise(runs):
        assert sum(run) + following[0] > memory


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc"), st.integers(0, 50)), max_size=30),
    st.integers(1, 90),
)
def test_windows_with_needs_of_one_block_at_a_time(rows: list[tuple[int, str, int]], memory: int) -> None:
    def taken(run: list[tuple[int, str, int]]) -> int:
        return sum(need for need, _, _ in run) + max(
            sum(brief for _, block, brief in run if block == name) for name in "abc"
        )

    windows = windows_of([need for need, _, _ in rows], memory, [(block, brief) for _, block, brief in rows])
    numbered = groupby(zip(windows, rows, strict=True), lambda pair: pair[0])
    runs = [[row for _, row in run] for _, run in numbered]
    assert windows == [number for number, run in enumerate(runs) for _ in run]
    assert all(taken(run) <= memory or len(run) == 1 for run in runs)
    assert all(taken([*run, following[0]]) > memory for run, following in pairwise(runs))


@pytest.mark.parametrize(
    ("memory", "windows"),
    [
        (1, [0, 1, 2, 3]),
        (2 * BYTES_A_WEIGHT - 1, [0, 1, 2, 3]),
        (2 * BYTES_A_WEIGHT, [0, 0, 1, 1]),
        (10**9, [0, 0, 0, 0]),
    ],
)
def test_weights_are_cut_by_the_bytes_of_their_statistics(memory: int, windows: list[int]) -> None:
    weights = weights_of_net(make_net())
    assert weights.assign_windows(memory) == windows[-1] + 1
    assert [weight.window for weight in weights] == windows
    assert [weight.name for weight in weights.of_window(0)] == [
        name for name, window in zip(WEIGHTS, windows, strict=True) if window == 0
    ]


def weights_of_net(net: nn.Module, **options: object) -> Weights:
    selection, params = select_weights(net, **options)  # type: ignore[arg-type]
    return Weights(selection, params, net)


def test_default_memory_is_four_bytes_a_weight_and_256_megabytes_in_any_case() -> None:
    assert weights_of_net(make_net()).assign_windows(None) == 1
    with torch.device("meta"):
        # 800 bytes of statistics for each 100 entries: what is above 256 MB takes two windows for 4 bytes an entry.
        large = nn.ModuleList([nn.Sequential(*(nn.Linear(10_000, 10_000) for _ in range(4)))])
        small = nn.ModuleList([nn.Sequential(*(nn.Linear(4_000, 4_000) for _ in range(4)))])
    assert weights_of_net(large).assign_windows(None) == 2
    assert weights_of_net(small).assign_windows(None) == 2


# ---------------------------------------------------------------- names


def test_a_weight_is_found_by_each_of_its_names() -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    weights = weights_of_net(net)
    assert weights["blocks.1.up.weight"] is weights[UP]
    assert weights[UP].modules == (net.blocks[0].up, net.blocks[1].up)
    with pytest.raises(KeyError, match=r"'up' is not a prunable weight; these are: blocks\.0\.up\.weight, "):
        weights["up"]


def test_a_module_that_stands_in_the_model_twice_is_one() -> None:
    net = make_net()
    net.blocks.append(net.blocks[0])
    assert weights_of_net(net)[UP].modules == (net.blocks[0].up,)


# ---------------------------------------------------------------- found again


def replace_parameters(net: Net) -> list[tuple[Tensor, Tensor]]:
    """What FSDP2 does: every parameter object becomes another."""
    pairs = []
    for module in net.modules():
        for key, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[key] = nn.Parameter(p.detach().clone())
                pairs.append((p, module._parameters[key]))
    return pairs


def test_exchanged_parameters_are_found_once_the_inner_optimizer_has_them() -> None:
    net = make_net()
    inner = adamw(net)
    weights = weights_of_net(net)
    weights.rebind(inner)
    pairs = dict(replace_parameters(net))
    with pytest.raises(ValueError, match=r"AdamW no longer holds prunable weight 'blocks\.0\.up\.weight'.*assign=True"):
        weights.rebind(inner)
    for group in inner.param_groups:
        group["params"] = [pairs[p] for p in group["params"]]
    weights.rebind(inner)
    assert all(weight.param is net.get_parameter(weight.name) for weight in weights)


def test_wrappers_that_change_the_path_do_not_change_the_name() -> None:
    net = make_net()
    inner = adamw(net)
    weights = weights_of_net(net)
    linear = net.blocks[0].up
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")  # type: ignore[assignment]
    weights.rebind(inner)
    assert weights[UP].param is linear.weight
    assert weights[UP].modules == (linear,)


def test_weights_that_moved_to_another_dtype_in_place_are_found() -> None:
    net = make_net()
    inner = adamw(net)
    weights = weights_of_net(net)
    net.to(torch.float64)
    weights.rebind(inner)
    assert weights[UP].w.dtype == torch.float64


def test_a_layer_that_is_gone_is_named_with_the_way_out() -> None:
    net = make_net()
    weights = weights_of_net(net)
    net.blocks[0].up = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'blocks\.0\.up\.weight' is no longer in the model.*Build ADMMNxM again"):
        weights.rebind(adamw(net))


def test_a_tie_that_is_undone_is_named() -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    weights = weights_of_net(net)
    net.blocks[1].up.weight = nn.Parameter(net.blocks[0].up.weight.detach().clone())
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up\.weight = blocks\.1\.up\.weight were one tensor.*tie them again"
    ):
        weights.rebind(adamw(net))


def test_a_flattened_weight_is_refused_with_the_way_to_shard() -> None:
    net = make_net()
    inner = adamw(net)
    weights = weights_of_net(net)
    net.blocks[0].up.weight.data = net.blocks[0].up.weight.data.flatten()
    with pytest.raises(ValueError, match=r"had shape \(16, 8\) at construction and now has \(128,\).*fully_shard"):
        weights.rebind(inner)


def test_names_and_tensors_alone_cannot_be_found_again() -> None:
    net = make_net()
    selection, params = select_weights(net.named_parameters())
    weights = Weights(selection, params, None)
    assert not any(weight.modules for weight in weights)
    inner = adamw(net)
    weights.rebind(inner)
    inner.param_groups[0]["params"] = [p for p in inner.param_groups[0]["params"] if p is not net.blocks[0].up.weight]
    with pytest.raises(ValueError, match=r"no longer holds.*with names and tensors alone, pass the model"):
        weights.rebind(inner)


def test_direction_of_the_group_is_read_at_each_rebind() -> None:
    net = make_net()
    inner = adamw(net)
    weights = weights_of_net(net)
    weights.rebind(inner)
    assert not weights[UP].maximize
    inner.param_groups[0]["maximize"] = True
    weights.rebind(inner)
    assert weights[UP].maximize


def test_remedy_for_a_replaced_layer_works_to_the_end_of_the_run() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 5)
    old = net.blocks[0].up
    net.blocks[0].up = copy.deepcopy(old)
    with pytest.raises(ValueError, match=r"no longer holds.*Put the model's present parameter back into the inner"):
        train(net, optimizer, 1, start=5)
    replaced = {id(old.weight): net.blocks[0].up.weight, id(old.bias): net.blocks[0].up.bias}
    group = optimizer.inner.param_groups[0]
    group["params"] = [replaced.get(id(p), p) for p in group["params"]]
    train(net, optimizer, 35, start=5)
    assert optimizer.frozen
    assert optimizer.figures().model_errors[UP] > 0
    assert optimizer.finalize().ok
    assert is_feasible(net.blocks[0].up.weight)


# ---------------------------------------------------------------- values


def test_second_sets_of_weights_move_along_and_other_state_is_left_alone() -> None:
    net = make_net()
    inner = adamw(net)
    weight = weights_of_net(net)[UP]
    p = weight.param
    before = p.detach().clone()
    near = before + 0.02 * torch.randn_like(p)
    state = {
        "average": near.clone(),
        "lookahead": near.double(),
        "zero": torch.zeros_like(p),
        "gradient-like": 0.01 * torch.randn_like(p),
        "step": torch.tensor(3.0),
        "rows": near[:, 0].clone(),
        "codes": torch.ones_like(p, dtype=torch.uint8),
        MASK: torch.ones_like(p, dtype=torch.bool),
        CONSENSUS: near.clone(),
    }
    inner.state[p] = {key: t.clone() for key, t in state.items()}
    mask = keep_mask(before, "2:4")
    value = torch.where(mask, 1.1 * before, 0.0)
    weight.replace_value(inner, value, mask)
    assert same_bits(p.detach(), value)
    found = inner.state[p]
    moved = torch.where(mask, near + (value - before), 0.0)
    torch.testing.assert_close(found["average"], moved)
    torch.testing.assert_close(found["lookahead"], moved.double())
    assert is_feasible(found["average"])
    assert torch.equal(found[MASK], mask)
    for key in ("zero", "gradient-like", "step", "rows", "codes", CONSENSUS):
        assert same_bits(found[key], state[key]), key


def test_schedule_free_averages_are_feasible_as_well() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    from admm_nxm import ADMMNxM

    net = make_net()
    inner = schedulefree.AdamWScheduleFree(net.parameters(), lr=1e-2, foreach=False)
    inner.train()
    optimizer = ADMMNxM(inner, net, total_steps=40)
    train(net, optimizer, 40)
    assert optimizer.finalize().ok
    inner.eval()
    assert all(is_feasible(net.get_parameter(name)) for name in WEIGHTS)


def test_a_weight_of_zeros_is_no_copy_of_its_own_momentum() -> None:
    net = make_net()
    with torch.no_grad():
        net.blocks[0].up.weight.zero_()
    inner = adamw(net)
    weight = weights_of_net(net)[UP]
    momentum = torch.randn_like(weight.param)
    inner.state[weight.param] = {"exp_avg": momentum.clone()}
    weight.replace_value(inner, torch.zeros_like(weight.w), keep_mask(weight.w, "2:4"))
    assert same_bits(inner.state[weight.param]["exp_avg"], momentum)


def test_mask_of_a_weight_without_state_is_read_off_it() -> None:
    net = make_net()
    inner = adamw(net)
    weight = weights_of_net(net)[UP]
    assert torch.equal(weight.mask(inner), keep_mask(weight.w, "2:4"))
    weight.store(inner, MASK, torch.zeros_like(weight.w, dtype=torch.bool))
    assert not weight.mask(inner).any()


def test_unobserved_weights_are_noted_and_belong_to_the_first_solve() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)
            self.linear = nn.Linear(4, 4)

    model = nn.Sequential(Mixed())
    weights = weights_of_net(model, select={".*weight": "2:4"})
    selection, _ = select_weights(model, select={".*weight": "2:4"})
    assert weights.assign_windows(10**6) == 1
    assert [weight.window for weight in weights] == [-1, 0]
    assert [weight.name for weight in weights.of_window(0)] == ["0.conv.weight", "0.linear.weight"]
    assert [bool(spec.note) for spec in weights.note_unobserved(selection)] == [True, False]
    assert "no module hook reaches it: pruned by magnitude: 1 weights (0.conv.weight)" in str(
        weights.note_unobserved(selection)
    )
