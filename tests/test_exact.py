"""The exact w-step in a run: which passes it gathers, what it solves, and what it refuses."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, ConvergenceWarning, factorise, project, solve
from admm_nxm import solving as module
from admm_nxm.statistics import Statistics
from tests.cores import BYTES_A_WEIGHT, WEIGHTS, adamw, exact, is_feasible
from tests.helpers import Net, assert_same_weights, batches, loss_of, make_net, same_bits, train, weights_of

UP = WEIGHTS[0]
Moments = dict[str, tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- the solve, by hand


def plain_run(net: nn.Module, names: tuple[str, ...], steps: int, calibration: range) -> Moments:
    """Train without ADMM, and add up A and G of the modules in plain loops over tokens.

    Args:
        names: of the weights, or of several that are tied, joined by "=".
    """
    inner = adamw(net)
    found: Moments = {}
    for step, x in enumerate(batches(steps, dtype=next(net.parameters()).dtype)):
        seen: list[tuple[str, Tensor, Tensor]] = []
        handles = []
        for name in names if step in calibration else ():
            for one in name.split("="):

                def note(_: Any, args: tuple[Tensor], out: Tensor, name: str = name, seen: Any = seen) -> None:
                    out.retain_grad()
                    seen.append((name, args[0].detach().clone(), out))

                handles.append(net.get_submodule(one.removesuffix(".weight")).register_forward_hook(note))
        inner.zero_grad()
        loss_of(net, x).backward()
        for name, inputs, out in seen:
            assert out.grad is not None
            d_in, d_out = inputs.shape[-1], out.shape[-1]
            a, g = found.setdefault(name, (torch.zeros(d_in, d_in).double(), torch.zeros(d_out, d_out).double()))
            for token, gradient in zip(inputs.double(), out.grad.double(), strict=True):
                if gradient.any():
                    a += token[:, None] * token[None, :]
                    g += gradient[:, None] * gradient[None, :]
        for handle in handles:
            handle.remove()
        inner.step()
    return found


def gathering(optimizer: ADMMNxM) -> Statistics:
    """The statistics that are gathered now; they can still be read after the solve."""
    statistics = optimizer._run.statistics
    assert statistics is not None
    return statistics


def assert_solved(
    net: nn.Module, name: str, dense: Tensor, gathered: Statistics, plain: tuple[Tensor, Tensor], *, dim: int = 1
) -> None:
    """The moments are those of the plain loops, and the weight is bit for bit what solve() makes of them.

    Only so: the least-squares problem ends at a tolerance, and another rounding of A ends it elsewhere.
    """
    moments = gathered.moments[name.split("=")[0]]
    assert moments.outputs is not None
    for found, expected in zip((moments.inputs, moments.outputs), plain, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    a, g = factorise(moments.inputs, 0.01), factorise(moments.outputs, 0.1)
    along, across = (a, g) if len(moments.inputs) == dense.shape[dim] else (g, a)
    expected = solve(dense, "2:4", along, across, dim=dim).weight
    assert same_bits(net.get_parameter(name.split("=")[0]).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dense_steps_are_the_inner_optimizers_and_the_solve_is_the_one_by_hand(dtype: torch.dtype) -> None:
    plain, net = make_net(dtype=dtype), make_net(dtype=dtype)
    moments = plain_run(plain, WEIGHTS, 34, range(26, 34))
    optimizer = exact(net)
    train(net, optimizer, 33)
    gathered = gathering(optimizer)
    train(net, optimizer, 1, start=33)
    expected = weights_of(plain)
    for name, both in moments.items():
        assert_solved(net, name, expected.pop(name), gathered, both)
        assert torch.equal(optimizer.masks()[name], net.get_parameter(name) != 0)
    assert_same_weights(expected, {name: p for name, p in weights_of(net).items() if name in expected})


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "8:8"])
def test_every_pattern_is_feasible_after_the_solve(pattern: str) -> None:
    net = make_net()
    optimizer = exact(net, pattern=pattern)
    train(net, optimizer, 34)
    assert all(is_feasible(net.get_parameter(name), pattern) for name in WEIGHTS)
    assert optimizer.finalize().ok


def test_a_pattern_that_keeps_all_is_the_inner_optimizer_to_the_end() -> None:
    plain, net = make_net(), make_net()
    train(plain, adamw(plain), 40)
    optimizer = exact(net, pattern="4:4")
    train(net, optimizer, 40)
    assert optimizer.finalize().ok
    assert_same_weights(plain, net)
    assert optimizer.figures().model_error == 0.0


def test_groups_along_the_outputs_take_g_along_them() -> None:
    plain, net = make_net(), make_net()
    moments = plain_run(plain, WEIGHTS, 34, range(26, 34))
    optimizer = exact(net, dims={".*up.weight": 0})
    train(net, optimizer, 33)
    gathered = gathering(optimizer)
    train(net, optimizer, 1, start=33)
    assert_solved(net, UP, plain.get_parameter(UP).detach(), gathered, moments[UP], dim=0)
    assert is_feasible(net.get_parameter(UP), dim=0)
    assert not is_feasible(net.get_parameter(UP), dim=1)


def test_tied_modules_are_one_problem_with_the_passes_of_both() -> None:
    def tied() -> Net:
        net = make_net()
        net.blocks[1].up.weight = net.blocks[0].up.weight
        return net

    plain, net = tied(), tied()
    both = "blocks.0.up.weight=blocks.1.up.weight"
    moments = plain_run(plain, (both,), 34, range(26, 34))[both]
    optimizer = exact(net)
    train(net, optimizer, 33)
    gathered = gathering(optimizer)
    train(net, optimizer, 1, start=33)
    assert_solved(net, both, plain.get_parameter(UP).detach(), gathered, moments)
    assert len(optimizer.figures().model_errors) == 3
    assert optimizer.finalize().ok


def test_conv1d_of_transformers_is_solved_along_its_inputs() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    plain = make_net()
    for block in plain.blocks:
        block.up = conv1d(16, 8)
    net = copy.deepcopy(plain)
    moments = plain_run(plain, (UP,), 34, range(26, 34))[UP]
    assert [moment.shape[0] for moment in moments] == [8, 16]
    optimizer = exact(net)
    assert optimizer.selection[UP].dim == 0
    train(net, optimizer, 33)
    gathered = gathering(optimizer)
    train(net, optimizer, 1, start=33)
    assert_solved(net, UP, plain.get_parameter(UP).detach(), gathered, moments, dim=0)
    assert is_feasible(net.get_parameter(UP), dim=0)


def test_accumulated_passes_all_count() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 26)
    for x in batches(3):
        loss_of(net, x).backward()
    with torch.no_grad():
        net(torch.ones(4, 8))
    assert gathering(optimizer).moments[UP].tokens == 12


def test_weights_with_the_same_inputs_share_a_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.q(x)) * self.k(x) + self.v(x)

    torch.manual_seed(0)
    net = nn.Sequential(nn.ModuleList([Attention()])[0], nn.Linear(8, 1))
    factorised: list[Tensor] = []
    original = module.factorise
    monkeypatch.setattr(
        module, "factorise", lambda moment, damping: factorised.append(moment) or original(moment, damping)
    )
    optimizer = ADMMNxM(adamw(net), net, select={r"0\.[qkv]\.weight": "2:4"}, prune_at=8, calibration_steps=8)
    train(net, optimizer, 8)
    assert optimizer.frozen
    assert len(factorised) == 1 + 3  # A once, G of each


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(1, [28, 30, 32, 34]), (2 * BYTES_A_WEIGHT, [30, 30, 34, 34]), (3 * BYTES_A_WEIGHT, [30, 30, 30, 34])],
)
def test_each_weight_is_pruned_at_the_end_of_its_window_and_stays_feasible(memory: int, expected: list[int]) -> None:
    net = make_net()
    optimizer = exact(net, statistics_memory=memory)
    pruned_at = dict.fromkeys(WEIGHTS, 0)
    calibrated = 0
    for step in range(40):
        calibrated += optimizer.phase == "calibration"
        train(net, optimizer, 1, start=step)
        masks = optimizer.masks()
        for name in WEIGHTS:
            if is_feasible(net.get_parameter(name)):
                pruned_at[name] = pruned_at[name] or step + 1
                assert is_feasible(masks[name])
            else:
                assert pruned_at[name] == 0, f"{name} was feasible after step {pruned_at[name]}"
                assert masks[name].all()
    assert list(pruned_at.values()) == expected
    assert calibrated == 8  # as many steps in all, however many windows
    assert optimizer.calibration_steps * optimizer.figures().windows == 8
    assert optimizer.finalize().ok


def test_windows_hold_no_more_statistics_than_the_memory_allows() -> None:
    net = make_net()
    optimizer = exact(net, statistics_memory=2 * BYTES_A_WEIGHT)
    for step in range(40):
        train(net, optimizer, 1, start=step)
        statistics = optimizer._run.statistics
        moments = {} if statistics is None else statistics.moments
        held = sum(t.nbytes for one in moments.values() for t in (one.inputs, one.outputs) if t is not None)
        assert held <= 2 * BYTES_A_WEIGHT


def test_first_window_is_solved_as_alone_and_the_second_sees_it_pruned() -> None:
    plain, net = make_net(), make_net()
    moments = plain_run(plain, WEIGHTS[:2], 30, range(26, 30))
    optimizer = exact(net, statistics_memory=2 * BYTES_A_WEIGHT)
    train(net, optimizer, 29)
    gathered = gathering(optimizer)
    train(net, optimizer, 1, start=29)
    for name, both in moments.items():
        assert_solved(net, name, plain.get_parameter(name).detach(), gathered, both)
    assert same_bits(net.get_parameter(WEIGHTS[2]).detach(), plain.get_parameter(WEIGHTS[2]).detach())


def test_too_many_windows_are_refused_with_remedies_that_work() -> None:
    net = make_net()
    with pytest.raises(
        ValueError,
        match=r"need 4 windows of calibration, at least one step each, and prune_at=3 leaves fewer.*"
        r"larger statistics_memory \(bytes\), or train longer",
    ):
        exact(net, total_steps=4, prune_at=3, statistics_memory=1)
    for longer in ({"statistics_memory": 2 * BYTES_A_WEIGHT, "prune_at": 3}, {"statistics_memory": 1, "prune_at": 4}):
        net = make_net()
        optimizer = exact(net, total_steps=4, **longer)
        train(net, optimizer, 4)
        assert optimizer.frozen
        assert optimizer.finalize().ok


def test_calibration_that_does_not_fit_is_refused_with_the_most_that_does() -> None:
    with pytest.raises(ValueError, match=r"calibration_steps=9 for each of 4 windows does not fit before prune_at=34"):
        exact(make_net(), statistics_memory=1, calibration_steps=9)
    net = make_net()
    optimizer = exact(net, statistics_memory=1, calibration_steps=8)
    train(net, optimizer, 34)
    assert optimizer.frozen


# ---------------------------------------------------------------- what cannot be observed


class Mixed(nn.Module):
    """A Linear beside weights that no hook on a module reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.conv = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.linear(x))
        x = x + torch.einsum("bi,eoi->bo", x, self.experts)
        x = x + self.conv(x[..., None])[..., 0]
        return x + self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]


UNOBSERVED = ("0.experts", "0.conv.weight", "0.attention.in_proj_weight", "0.attention.out_proj.weight")
BY_HAND = {r"0\.(linear\.weight|experts|conv\.weight|attention\.(in_proj_weight|out_proj\.weight))": "2:4"}


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mixed(), nn.Linear(8, 1))


def test_weights_that_no_hook_reaches_are_named_and_projected() -> None:
    plain, net = mixed(), mixed()
    train(plain, adamw(plain), 34)
    optimizer = exact(net, select=BY_HAND)
    note = "no module hook reaches it: pruned by magnitude: 4 weights (0.experts, "
    assert note in str(optimizer.selection)
    assert [w.name for w in optimizer.selection if w.note] == list(UNOBSERVED)
    train(net, optimizer, 34)
    for name in UNOBSERVED:
        dim = optimizer.selection[name].dim
        assert same_bits(net.get_parameter(name).detach(), project(plain.get_parameter(name).detach(), "2:4", dim))
    assert list(optimizer.figures().model_errors) == ["0.linear.weight"]
    train(net, optimizer, 6, start=34)
    assert optimizer.finalize().ok


@pytest.mark.parametrize("stop", [10, 40])
def test_a_run_in_which_nothing_can_be_observed_is_magnitude_pruning_at_its_step(stop: int) -> None:
    plain, net = mixed(), mixed()
    train(plain, adamw(plain), min(stop, 34))
    optimizer = exact(net, select={r"0\.(experts|conv\.weight)": "2:4"})
    train(net, optimizer, min(stop, 34))
    assert optimizer.phase == ("frozen" if stop == 40 else "dense")
    if stop == 10:
        assert optimizer.finalize().ok  # what was announced at construction needs no warning
    assert same_bits(net.get_parameter("0.experts").detach(), project(plain.get_parameter("0.experts").detach(), "2:4"))
    train(net, optimizer, 2, start=34)
    assert optimizer.finalize().ok
    assert optimizer.figures().model_error is None


# ---------------------------------------------------------------- what fails at the solve


def without(net: Net, block: int) -> Callable[[Tensor], Tensor]:
    """The model's forward pass without one of its blocks."""

    def forward(x: Tensor) -> Tensor:
        return net.head(net.blocks[1 - block](x))

    return forward


def train_without(net: Net, optimizer: ADMMNxM, block: int, count: int, start: int = 0) -> None:
    forward = without(net, block)
    for x in batches(count, start):
        optimizer.zero_grad()
        (forward(x) - x.sum(-1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()


def test_a_weight_that_was_never_seen_is_named_and_the_run_goes_on_once_it_is() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 26)
    train_without(net, optimizer, 1, 7, start=26)
    plain = copy.deepcopy(net)
    inner = adamw(plain)
    inner.load_state_dict(copy.deepcopy(optimizer.inner.state_dict()))
    said = (
        r"weight 'blocks\.1\.up\.weight' has no usable statistics at the solve: its module saw no token with a "
        r"gradient in 8 calibration steps; let it take part in training .*or call finalize\(\): it prunes it by "
        r"magnitude\. Nothing was changed, and the next step\(\) gathers on and tries again$"
    )
    with pytest.raises(ValueError, match=said):
        train_without(net, optimizer, 1, 1, start=33)
    train_without(plain, inner, 1, 1, start=33)  # type: ignore[arg-type]
    assert_same_weights(plain, net)
    assert (optimizer.phase, optimizer.figures().step, optimizer.figures().model_errors) == ("calibration", 34, {})
    with pytest.raises(ValueError, match="in 9 calibration steps"):
        train_without(net, optimizer, 1, 1, start=34)
    train(net, optimizer, 1, start=35)
    assert (optimizer.phase, optimizer.figures().step) == ("frozen", 36)
    assert optimizer.finalize().ok


def test_finalize_ends_a_run_with_a_weight_that_is_never_seen() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 26)
    train_without(net, optimizer, 1, 7, start=26)
    with pytest.raises(ValueError, match="no usable statistics"):
        train_without(net, optimizer, 1, 1, start=33)
    with pytest.warns(ConvergenceWarning, match="2 weights were pruned by magnitude.*the error that step"):
        assert optimizer.finalize().ok
    train_without(net, optimizer, 1, 3, start=34)
    assert optimizer.finalize().ok


def test_remedy_for_a_weight_that_is_never_seen_works() -> None:
    net = make_net()
    optimizer = exact(net, select={r"blocks\.1\..*": None, r"blocks\..*weight": "2:4"})
    train_without(net, optimizer, 1, 40)
    assert optimizer.finalize().ok


def test_finalize_after_a_failed_solve_prunes_by_magnitude_and_points_to_the_error() -> None:
    net = make_net()
    optimizer = exact(net)
    train_without(net, optimizer, 1, 33)
    with pytest.raises(ValueError, match="no usable statistics"):
        train_without(net, optimizer, 1, 1, start=33)
    said = (
        r"after step 34, but the solve had failed: 2 weights were pruned by magnitude, without statistics and 2 "
        r"weights were solved from 8 of 8 calibration steps.*Remedy: follow the error that step\(\) raised after step"
    )
    with pytest.warns(ConvergenceWarning, match=said):
        assert optimizer.finalize().ok


def test_a_run_that_was_resumed_with_its_solve_behind_it_says_so_and_the_remedy_works() -> None:
    net = make_net()
    first = exact(net)
    train(net, first, 20)
    shorter, longer = exact(net, total_steps=15, calibration_steps=3), exact(net, total_steps=23, calibration_steps=3)
    state = first.state_dict()
    longer.load_state_dict(state)
    train(net, longer, 3, start=20)
    assert longer.frozen
    shorter.load_state_dict(state)
    said = r"after step 12, which was behind it when it was resumed.*Remedy: give a longer total_steps: at least 3 more"
    with pytest.warns(ConvergenceWarning, match=said):
        assert shorter.finalize().ok


def test_hooks_that_never_fire_are_an_error_at_the_first_calibration_step() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 26)
    trained = copy.deepcopy(net)  # what is trained is a copy, whose gradients are carried over
    x = next(batches(1))
    loss_of(trained, x).backward()
    for p, q in zip(net.parameters(), trained.parameters(), strict=True):
        p.grad = q.grad
    with pytest.raises(
        ValueError,
        match=r"calibration step 1 has gathered nothing: no selected module saw a training pass.*is a copy of",
    ):
        optimizer.step()
    train(net, optimizer, 8, start=27)  # the remedy: train the model itself
    assert optimizer.frozen
    assert optimizer.finalize().ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_at_the_solve_are_all_named_and_nothing_is_changed(bad: float) -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 33)
    x = next(batches(1, 33))
    optimizer.zero_grad()
    loss_of(net, x).backward()
    with torch.no_grad():
        net.get_parameter(WEIGHTS[1])[0, 0] = bad
        net.get_parameter(WEIGHTS[3])[1, 2] = bad
    names = re.escape(f"{WEIGHTS[1]}, {WEIGHTS[3]}")
    with pytest.raises(
        ValueError,
        match=rf"2 of 4 weights have NaN or infinite entries after step 34: {names}; nothing was changed\. Load an",
    ):
        optimizer.step()
    assert optimizer.phase == "calibration"
    assert all(mask.all() for mask in optimizer.masks().values())
    with torch.no_grad():  # the remedy
        net.get_parameter(WEIGHTS[1])[0, 0] = 0.1
        net.get_parameter(WEIGHTS[3])[1, 2] = 0.1
    train(net, optimizer, 1, start=34)
    assert optimizer.frozen


def test_passes_that_are_not_finite_are_left_out_and_too_many_of_them_are_an_error() -> None:
    def run(overflows: int) -> ADMMNxM:
        net = make_net()
        optimizer = exact(net)
        train(net, optimizer, 26)
        for step, x in enumerate(batches(8, 26)):
            optimizer.zero_grad()
            (loss_of(net, x) * (float("inf") if step < overflows else 1.0)).backward()
            if step < overflows:
                optimizer.zero_grad(set_to_none=False)  # as a scaler does that skips the step's effect
                for p in net.parameters():
                    p.grad = torch.zeros_like(p)
            optimizer.step()
        return optimizer

    assert run(4).frozen
    with pytest.raises(
        ValueError,
        match=r"5 of 8 passes through its module had infinite or NaN values; lower the learning rate",
    ):
        run(5)


# ---------------------------------------------------------------- finalize before the solve


def test_finalize_inside_calibration_solves_with_what_there_is() -> None:
    plain, net = make_net(), make_net()
    moments = plain_run(plain, WEIGHTS, 29, range(26, 29))
    optimizer = exact(net)
    train(net, optimizer, 29)
    gathered = gathering(optimizer)
    said = (
        r"finalize\(\) came after 29 optimizer steps, and the weights were to be pruned after step 34: 4 weights were "
        r"solved from 3 of 8 calibration steps, and no step has trained what was kept\..*an earlier prune_at$"
    )
    with pytest.warns(ConvergenceWarning, match=said):
        assert optimizer.finalize().ok
    for name, both in moments.items():
        assert_solved(net, name, plain.get_parameter(name).detach(), gathered, both)


def test_finalize_between_two_windows_solves_the_rest_by_magnitude() -> None:
    net = make_net()
    optimizer = exact(net, statistics_memory=2 * BYTES_A_WEIGHT)
    train(net, optimizer, 30)
    dense = weights_of(net)
    with pytest.warns(ConvergenceWarning, match="2 weights were pruned by magnitude, without statistics, and no step"):
        assert optimizer.finalize().ok
    assert (optimizer.phase, optimizer.figures().windows_solved) == ("frozen", 2)
    for name in WEIGHTS[:2]:
        assert same_bits(net.get_parameter(name).detach(), dense[name])
    for name in WEIGHTS[2:]:
        assert same_bits(net.get_parameter(name).detach(), project(dense[name], "2:4"))


def test_finalize_where_all_that_was_seen_is_padding_prunes_by_magnitude() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 26)
    (net(torch.ones(4, 8)).sum() * 0.0).backward()
    optimizer.step()
    with pytest.warns(ConvergenceWarning, match="4 weights were pruned by magnitude"):
        assert optimizer.finalize().ok


def test_hooks_are_gone_and_the_compiler_is_free_after_the_solve_and_after_finalize(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached: list[Statistics] = []
    attach = Statistics.attach

    def noted(self: Statistics, *args: Any) -> None:
        attached.append(self)
        attach(self, *args)

    monkeypatch.setattr(Statistics, "attach", noted)
    for steps in (34, 29):
        net = make_net()
        optimizer = exact(net)
        train(net, optimizer, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            optimizer.finalize()
        assert not any(each._forward_hooks for each in net.modules())
    assert len(attached) == 2
    assert not any(statistics.attached for statistics in attached)
