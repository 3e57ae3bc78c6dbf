"""statistics.py against loops over tokens, with x and g as autograd itself hands them out."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from admm_nxm import statistics
from admm_nxm.statistics import Moments, Statistics, bytes_needed, can_be_observed, refuse_compiled

Pass = tuple[Tensor, Tensor]
Run = Callable[[nn.Module], None]

D_IN, D_OUT = 6, 4


# ------------------------------------------------------------------------------------------------------------ oracle


def watch(module: nn.Module) -> list[Pass]:
    """Return a list that fills with the x and g of a module's passes."""
    passes: list[Pass] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = (args[0] if args else kwargs["input"]).detach().clone()
        if output.requires_grad:
            output.register_hook(lambda g: passes.append((x, g.detach().clone())))
        return output * 1  # what is changed in place afterwards loses its hooks

    module.register_forward_hook(hook, with_kwargs=True)
    return passes


def by_hand(passes: list[Pass]) -> tuple[Tensor, Tensor, int]:
    """Return A, G and the number of tokens, token by token in float64."""
    d_in, d_out = passes[0][0].shape[-1], passes[0][1].shape[-1]
    a, g_sum, tokens = torch.zeros(d_in, d_in).double(), torch.zeros(d_out, d_out).double(), 0
    for xs, gs in passes:
        for x, g in zip(xs.reshape(-1, d_in).double(), gs.reshape(-1, d_out).double(), strict=True):
            if any(value != 0 for value in g.tolist()):
                a += torch.outer(x, x)
                g_sum += torch.outer(g, g)
                tokens += 1
    return a, g_sum, tokens


def agrees(moments: Moments, passes: list[Pass], rtol: float = 1e-5) -> None:
    a, g, tokens = by_hand(passes)
    assert tokens > 0
    assert moments.tokens.item() == tokens
    assert moments.passes.item() == len(passes)
    assert moments.dropped.item() == 0
    assert moments.outputs is not None
    for found, wanted in ((moments.inputs, a), (moments.outputs, g)):
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())


def gathered(model: nn.Module, run: Run, **options: Any) -> Statistics:
    """Run with the statistics of all modules that can be observed."""
    statistics_ = Statistics({n: m for n, m in model.named_modules() if can_be_observed(m)}, **options)
    statistics_.attach()
    try:
        run(model)
    finally:
        statistics_.detach()
    return statistics_


def against_loops(model: nn.Module, run: Run, rtol: float = 1e-5) -> Statistics:
    """Gather the statistics of a run and hold each module's against the loops of an equal run."""
    other = copy.deepcopy(model)
    passes = {n: watch(m) for n, m in other.named_modules() if can_be_observed(m)}
    torch.manual_seed(1)
    run(other)
    torch.manual_seed(1)
    found = gathered(model, run)
    assert passes
    for name, its in passes.items():
        agrees(found.moments[name], its, rtol)
    # What the run itself computes is untouched.
    for mine, its_own in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (its_own.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, its_own.grad)
    return found


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(D_IN, 8)
        self.act = activation or nn.Tanh()
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(8, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


def text(batch: int = 3, length: int = 5, width: int = D_IN, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, x: Tensor | None = None) -> None:
    model(text() if x is None else x).square().sum().backward()


def same_bits(a: Statistics, b: Statistics) -> None:
    assert a.moments.keys() == b.moments.keys()
    for name, one in a.moments.items():
        for key, tensor in one.tensors.items():
            assert torch.equal(tensor, b.moments[name].tensors[key]), (name, key)


needs_stance = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6 and later")


def stance() -> str:
    now = torch.compiler.set_stance("default")
    now.__exit__(None, None, None)
    return now.prev.stance


# ---------------------------------------------------------------------------------------------------- the two products


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    d_in=st.integers(1, 7),
    d_out=st.integers(1, 7),
    bias=st.booleans(),
    padding=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_sums_over_tokens(shape: list[int], d_in: int, d_out: int, bias: bool, padding: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(d_in, d_out, bias=bias)
    x = torch.randn(*shape, d_in, generator=generator)
    weights = torch.randn(*shape, d_out, generator=generator)
    weights *= torch.rand(*shape, 1, generator=generator) >= padding  # these tokens have no gradient
    passes = watch(module)
    found = gathered(module, lambda m: (m(x) * weights).sum().backward())
    assert len(passes) == 1
    if (weights != 0).any():
        agrees(found.moments[""], passes)
    else:
        assert found.moments[""].tokens.item() == 0
        assert not found.moments[""].inputs.any()


def test_padding_may_be_anything_at_all() -> None:
    module = nn.Linear(D_IN, D_OUT)
    x = text()
    x[:, 3:] = math.inf
    found = gathered(module, lambda m: m(x)[:, :3].sum().backward())
    wanted = gathered(module, lambda m: m(x[:, :3].contiguous()).sum().backward())
    same_bits(found, wanted)
    assert found.moments[""].tokens.item() == 9


def test_conv1d_is_a_linear_layer() -> None:
    conv, linear = Conv1D(D_OUT, D_IN), nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    found, wanted = gathered(conv, backward).moments[""], gathered(linear, backward).moments[""]
    assert found.inputs.shape == (D_IN, D_IN)
    assert found.outputs is not None
    assert wanted.outputs is not None
    torch.testing.assert_close(found.inputs, wanted.inputs)
    torch.testing.assert_close(found.outputs, wanted.outputs)


@pytest.mark.parametrize("transpose", [False, True])
def test_inputs_and_gradients_of_any_layout(transpose: bool) -> None:
    x = text(3, D_IN, 5).transpose(1, 2) if transpose else text()[::2]
    against_loops(Mlp(), lambda m: m(x).transpose(0, 1).square().sum().backward())
    against_loops(Mlp(), lambda m: m(x).sum().backward())  # the gradient is expanded from one number


def test_the_input_by_keyword() -> None:
    module = nn.Linear(D_IN, D_OUT)
    passes = watch(module)
    agrees(gathered(module, lambda m: m(input=text()).sum().backward()).moments[""], passes)


# ----------------------------------------------------------------------------------------- everything that is one step


def test_accumulated_gradients() -> None:
    def run(model: nn.Module) -> None:
        for seed in range(4):
            backward(model, text(seed=seed))

    against_loops(Mlp(), run)


def test_a_module_called_several_times() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(D_IN, D_IN)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return x

    found = against_loops(Recurrent(), backward)
    assert found.moments["cell"].tokens.item() == 3 * 15


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_tied_modules_count_once_each_into_one(shared: str) -> None:
    first = nn.Linear(D_IN, D_IN)
    second = first if shared == "module" else nn.Linear(D_IN, D_IN)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    passes = [watch(m) for m in {id(m): m for m in (first, second)}.values()]
    found = Statistics({"0.weight": [first, second]})
    found.attach()
    backward(model)
    agrees(found.moments["0.weight"], [one for its in passes for one in its])


def test_dropout() -> None:
    against_loops(Mlp(dropout=0.5), backward)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_count_once(reentrant: bool) -> None:
    def run(model: nn.Module) -> None:
        out = checkpoint(model, text().requires_grad_(), use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        out.square().sum().backward()

    model = Mlp(dropout=0.5)
    found = against_loops(model, run)
    assert found.moments["up"].tokens.item() == 15


def test_checkpointing_keeps_no_inputs() -> None:
    """What is recomputed is not held: the statistics save x by autograd's own means."""

    def held(attach: bool) -> int:
        model = Mlp()
        found = Statistics({"down": model.down})
        if attach:
            found.attach()
        kept: list[Tensor] = []
        pack = lambda t: (kept.append(t), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = checkpoint(model, text().requires_grad_(), use_reentrant=False)
        assert isinstance(out, Tensor)
        out.sum().backward()
        found.detach()
        return len({t.untyped_storage().data_ptr() for t in kept})

    assert held(attach=True) == held(attach=False)


def test_x_is_not_copied() -> None:
    model, kept = Mlp(), list[Tensor]()
    found = Statistics({"up": model.up, "down": model.down})

    def storages() -> set[int]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            model(x).sum().backward()
        return {t.untyped_storage().data_ptr() for t in kept}

    x = text()
    plain = len(storages())
    found.attach()
    assert len(storages()) == plain


def test_passes_without_gradients_do_not_count() -> None:
    model = Mlp()
    found = Statistics({"up": model.up, "down": model.down})
    found.attach()
    with torch.no_grad():
        model(text())
    with torch.inference_mode():
        model(text())
    model(text())  # never differentiated
    with torch.no_grad():
        model.eval()(text())
    assert not found.moments
    backward(model)
    assert found.moments["up"].tokens.item() == 15


def test_a_frozen_module_with_nothing_to_differentiate_is_ignored() -> None:
    model = Mlp()
    model.up.requires_grad_(False)
    found = gathered(model, backward)
    assert found.moments.keys() == {"down"}


def test_a_frozen_module_on_the_way_of_gradients_counts() -> None:
    model = Mlp()
    model.up.requires_grad_(False)
    against_loops(model, lambda m: backward(m, text().requires_grad_()))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Hardtanh(inplace=True)]
)
def test_activations_in_place(activation: nn.Module) -> None:
    against_loops(Mlp(activation), backward)


def test_other_changes_of_the_output_in_place() -> None:
    def run(model: nn.Module) -> None:
        out = model(text())
        out += 1
        out[:, 0] = 0
        out.view(-1).mul_(2)
        out.square().sum().backward()

    against_loops(nn.Linear(D_IN, D_OUT), run)


def test_a_changed_input_is_still_an_error() -> None:
    """In place, after the module: autograd refuses it without the statistics too."""

    def run(model: nn.Module) -> None:
        x = text() * 1
        out = model(x)
        x += 1
        out.sum().backward()

    for attempt in (run, lambda m: gathered(m, run)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            attempt(nn.Linear(D_IN, D_OUT))


# --------------------------------------------------------------------------------------------------- second derivatives


def hessian_step(model: nn.Module) -> None:
    """What AdaHessian and SophiaH do: a gradient that can be differentiated, and a product with the Hessian."""
    loss = model(text().double()).square().sum()
    loss.backward(create_graph=True)
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    signs = [torch.ones_like(g) for g in gradients]
    products = torch.autograd.grad(gradients, parameters, grad_outputs=signs, retain_graph=False)
    for p, product in zip(parameters, products, strict=True):
        p.grad = product.detach()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_second_derivatives_are_right_and_do_not_count() -> None:
    model = Mlp().double()
    passes, plain = watch(model.down), copy.deepcopy(model)
    backward(model, text().double())
    model.down._forward_hooks.clear()
    model.zero_grad()
    found = gathered(model, hessian_step)
    agrees(found.moments["down"], passes, rtol=1e-12)
    hessian_step(plain)
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert torch.equal(mine.grad, its.grad)


def test_gradients_of_gradients_by_finite_differences() -> None:
    module = nn.Linear(3, 2).double()
    found = Statistics({"": module})
    found.attach()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: module(v).pow(3), (x,))


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_in_float32_at_least(dtype: torch.dtype) -> None:
    model = Mlp().to(dtype)
    found = against_loops(model, lambda m: backward(m, text().to(dtype)))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for one in found.moments.values():
        assert one.outputs is not None
        assert one.inputs.dtype == one.outputs.dtype == wanted
        assert one.tokens.dtype == one.dropped.dtype == torch.int64


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    """x is what the module makes of it, a bfloat16 tensor; sums are in float32, also with backward() under autocast."""
    module = nn.Linear(64, 8)
    x = text(width=64)
    seen: list[Tensor] = []

    def run(m: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
            out.register_hook(lambda g: seen.append(g.detach().clone()))
            loss = out.float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()

    found = gathered(module, run).moments[""]
    assert seen[0].dtype == torch.bfloat16
    agrees(found, [(x.bfloat16(), seen[0])])


def test_under_autocast_the_input_may_change_afterwards() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(D_IN, D_IN)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x += self.fc(x)  # legal under autocast, where the module keeps a cast copy
            return x

    def run(m: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(text())
        out.square().sum().backward()

    found = gathered(Residual(), run).moments["fc"]
    rows = text().bfloat16().float().reshape(-1, D_IN)
    torch.testing.assert_close(found.inputs, rows.T @ rows)


@pytest.mark.parametrize("power", [0, 3, 16])
def test_scaled_losses_scale_g_alone(power: int) -> None:
    model = Mlp()
    plain = gathered(model, lambda m: m(text()).sum().backward())
    scaled = gathered(model, lambda m: (m(text()).sum() * 2.0**power).backward())
    for name, one in plain.moments.items():
        other = scaled.moments[name]
        assert one.outputs is not None
        assert other.outputs is not None
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.outputs * 4.0**power, other.outputs)


def test_a_step_that_the_grad_scaler_skips_is_dropped() -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    before = copy.deepcopy(model.state_dict())

    def run(m: nn.Module) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(m(text()).square().sum() * 100).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = not torch.equal(m.get_parameter("up.weight"), before["up.weight"])
            steps.append(changed)

    steps: list[bool] = []
    one = gathered(model, run).moments["up"]
    assert steps == [False, True]
    assert (one.passes.item(), one.dropped.item(), one.tokens.item()) == (2, 1, 15)
    assert all(tensor.isfinite().all() for tensor in one.tensors.values())


# --------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("where", ["x", "g"])
def test_a_pass_that_is_not_finite_is_dropped_and_counted(where: str, value: float) -> None:
    """1e30 is finite; its square is not."""
    module = nn.Linear(D_IN, D_OUT)
    module.weight.data[:, 2] = 0  # so that a large x gives finite outputs
    good, bad = text(), text(seed=1)
    factor = torch.ones(3, 5, D_OUT)
    if where == "x":
        bad[1, 2, 2] = value
    else:
        factor[2, 4, 1] = value

    def run(m: nn.Module) -> None:
        m(good).sum().backward()
        (m(bad) * factor).sum().backward()

    found = gathered(module, run).moments[""]
    wanted = gathered(module, lambda m: m(good).sum().backward()).moments[""]
    assert (found.passes.item(), found.dropped.item()) == (2, 1)
    assert (wanted.passes.item(), wanted.dropped.item()) == (1, 0)
    for key in ("inputs", "outputs", "tokens"):
        assert torch.equal(found.tensors[key], wanted.tensors[key]), key


def test_experts_with_no_token_and_with_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D_IN, D_OUT) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, D_IN)
            # All but one token go to the last, none to the first.
            routed = (rows[:0], rows[:1], rows[1:])
            return torch.cat([expert(part) for expert, part in zip(self.experts, routed, strict=True)])

    model = Experts()
    found = gathered(model, backward)
    assert found.moments.keys() == {"experts.1", "experts.2"}
    assert found.moments["experts.1"].tokens.item() == 1
    assert torch.linalg.matrix_rank(found.moments["experts.1"].inputs) == 1
    assert found.moments["experts.2"].tokens.item() == 14


# ------------------------------------------------------------------------------------------------------------- the cap


def taken(count: int, most: int) -> Tensor:
    """Return the numbers of the tokens that count."""
    found = Statistics({"": nn.Linear(1, 1)}, max_tokens=most)
    rows = found._thin(torch.arange(count).double()[:, None])
    assert torch.equal(found._thin(rows), rows)
    return rows.flatten().long()


@settings(max_examples=100)
@given(count=st.integers(1, 5000), most=st.integers(1, 2500))
def test_thinned_evenly(count: int, most: int) -> None:
    """One token of each of ``most`` equal parts."""
    numbers, parts = taken(count, most), min(count, most)
    starts = torch.arange(parts + 1) * count // parts
    assert len(numbers) == parts
    assert ((starts[:-1] <= numbers) & (numbers < starts[1:])).all()


@pytest.mark.parametrize(("batch", "length"), [(64, 128), (128, 64), (16, 512), (96, 100), (4, 4096)])
def test_thinned_at_all_positions_of_the_sequences(batch: int, length: int) -> None:
    """Also where a sequence has a whole number of equal parts."""
    most = 2048
    found = torch.bincount(taken(batch * length, most) % length, minlength=length)
    alike = most / length
    assert found.min() >= 0.5 * alike - 1
    assert found.max() <= 1.5 * alike + 1


def test_at_most_max_tokens_of_a_pass_count() -> None:
    model = Mlp()
    found = gathered(model, lambda m: [backward(m, text(8, 16, seed=seed)) for seed in range(2)], max_tokens=10)
    passes = watch(model.up)
    for seed in range(2):
        backward(model, text(8, 16, seed=seed))
    rows = taken(8 * 16, 10)
    agrees(found.moments["up"], [(x.reshape(-1, D_IN)[rows], g.reshape(-1, 8)[rows]) for x, g in passes])
    assert found.moments["up"].tokens.item() == 20


def test_thinned_under_autocast_and_checkpointing() -> None:
    def run(m: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(m, text(8, 16).requires_grad_(), use_reentrant=False)
        assert isinstance(out, Tensor)
        out.float().square().sum().backward()

    found = gathered(Mlp(), run, max_tokens=10)
    assert found.moments["up"].tokens.item() == 10
    rows = text(8, 16).reshape(-1, D_IN)[taken(8 * 16, 10)].bfloat16().float()
    torch.testing.assert_close(found.moments["up"].inputs, rows.T @ rows)


# ----------------------------------------------------------------------------------- inputs alone, and gradients alone


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "recomputed"])
def test_gradients_alone_are_those_beside_the_inputs(checkpointed: bool) -> None:
    model, x = Mlp(), text()
    x[0, 0] = 0.5

    def passes(m: Any) -> None:
        value = checkpoint(m, x, use_reentrant=False) if checkpointed else m(x)
        (value.square() * torch.tensor([0.0, 1, 2, 3, 4])[:, None]).sum().backward()  # the first token's is zero

    both, alone = gathered(model, passes).moments, gathered(model, passes, inputs=False).moments
    assert list(alone) == list(both)
    for name, found in alone.items():
        assert found.inputs is None
        assert found.outputs is not None
        assert torch.equal(found.outputs, both[name].outputs)
        assert [int(n) for n in (found.tokens, found.passes, found.dropped)] == [12, 1, 0]


def test_gradients_alone_keep_no_inputs() -> None:
    kept: list[Tensor] = []
    model, x = nn.Linear(D_IN, D_OUT).requires_grad_(False), text().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gathered(model, lambda m: m(x).sum().backward(), inputs=False)
    assert not [t for t in kept if t.shape == x.shape]


def test_gradients_alone_that_are_not_finite_are_dropped() -> None:
    x = text()
    model = nn.Linear(D_IN, D_OUT)
    found = gathered(model, lambda m: (m(x) * math.inf).sum().backward(), inputs=False).moments[""]
    assert (found.tokens.item(), found.passes.item(), found.dropped.item()) == (0, 1, 1)
    assert found.outputs is not None
    assert not found.outputs.any()


def test_inputs_alone_need_no_backward_pass() -> None:
    model, x = Mlp(), text()
    with torch.no_grad():
        found = gathered(model, lambda m: m(x), outputs=False)
        hidden = torch.tanh(model.up(x))
    for name, seen in (("up", x), ("down", hidden)):
        rows = seen.reshape(-1, seen.shape[-1])
        torch.testing.assert_close(found.moments[name].inputs, rows.T @ rows)
        assert found.moments[name].outputs is None
        assert found.moments[name].tokens.item() == 15


def test_inputs_alone_that_are_not_finite_are_dropped() -> None:
    x = text()
    x[0, 0, 0] = math.nan
    found = gathered(nn.Linear(D_IN, D_OUT), lambda m: m(x), outputs=False).moments[""]
    assert (found.tokens.item(), found.dropped.item()) == (0, 1)
    assert not found.inputs.any()


# --------------------------------------------------------------------------------------------- attached and taken along


def test_detached_the_module_is_as_it_was() -> None:
    model = Mlp()
    found = Statistics({"up": model.up})
    for _ in range(2):
        found.attach()
        found.attach()
        assert found.attached
        found.detach()
        found.detach()
        assert not found.attached
        assert not model.up._forward_hooks
    backward(model)
    assert not found.moments


@needs_stance
def test_statistics_that_are_given_up_leave_the_compiler_as_it_was() -> None:
    model = Mlp()
    found = Statistics({"up": model.up})
    found.attach()
    assert stance() == "force_eager"
    del found
    assert stance() == "default"
    backward(model)


def test_a_pass_that_ends_after_detaching_does_not_count() -> None:
    module = nn.Linear(D_IN, D_OUT)
    found = Statistics({"": module})
    found.attach()
    loss = module(text()).sum()
    found.detach()
    loss.backward()
    assert not found.moments


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved_by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_by_torch])
def test_copies_of_the_model_gather_nothing(copied: Callable[[Any], Any]) -> None:
    model = Mlp()
    found = Statistics({"up": model.up, "down": model.down})
    found.attach()
    backward(model)
    before = copy.deepcopy(found)
    teacher = copied(model)
    out = teacher(text())
    out.square().sum().backward()
    assert "Tap" not in type(out.grad_fn).__name__
    same_bits(found, before)
    size = len(pickle.dumps(model)) - len(pickle.dumps(Mlp()))
    assert size < 500  # a pickle of the model holds no moments
    backward(model)
    assert found.moments["up"].tokens.item() == 30


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_the_statistics_go_along_with_their_modules(copied: Callable[[Any], Any]) -> None:
    model = Mlp()
    found = Statistics({"up": model.up, "down": model.down})
    found.attach()
    backward(model)
    its_model, its = copied((model, found))
    same_bits(found, its)
    assert not its.attached
    assert its.modules["up"] == (its_model.up,)
    its.attach()
    backward(its_model, text(seed=1))
    assert its.moments["up"].tokens.item() == 30
    assert found.moments["up"].tokens.item() == 15
    backward(model, text(seed=1))
    same_bits(found, its)
    its.detach()
    found.detach()


def test_resumed_equals_not_stopped_bit_for_bit() -> None:
    model = Mlp()
    whole = Statistics({"up": model.up, "down": model.down})
    whole.attach()
    for seed in range(4):
        backward(model, text(seed=seed))
        if seed == 1:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
    whole.detach()
    file.seek(0)
    resumed = Statistics({"up": model.up, "down": model.down})
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    state["up"]["inputs"].zero_()  # copied
    resumed.attach()
    for seed in range(2, 4):
        backward(model, text(seed=seed))
    resumed.detach()
    same_bits(whole, resumed)


def test_a_state_that_does_not_fit_loads_nothing() -> None:
    model = Mlp()
    state = gathered(model, backward).state_dict()
    found = Statistics({"up": model.up})
    with pytest.raises(ValueError, match="statistics of 'down': there is no such weight here, only \\['up'\\]"):
        found.load_state_dict(state)
    with pytest.raises(ValueError, match="statistics of 'up' have the shapes"):
        found.load_state_dict({"up": state["down"]})
    with pytest.raises(ValueError, match="statistics of 'up' have the shapes"):
        Statistics({"up": model.up}, outputs=False).load_state_dict({"up": state["up"]})
    assert not found.moments


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    assert stance() == "default"
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.compiled = 0
        self.ran = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph(*args)

        return run


@needs_stance
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["torch.compile", "Module.compile", "step", "inner"])
def test_models_compiled_before_are_observed(how: str) -> None:
    model, backend = Mlp(), Counting()
    if how == "torch.compile":
        run = torch.compile(model, backend=backend)
    elif how == "Module.compile":
        model.compile(backend=backend)
        run = model
    elif how == "inner":
        model.compile(backend=backend)
        run = nn.Sequential(nn.Identity(), model)
    else:
        run = torch.compile(lambda x: model(x), backend=backend)

    for _ in range(2):
        backward(run)
    compiled, ran = backend.compiled, backend.ran
    assert compiled > 0
    assert ran >= 2
    model.zero_grad()
    passes = [watch(m) for m in (model.up, model.down)]
    found = Statistics({"up": model.up, "down": model.down})
    found.attach()
    assert stance() == "force_eager"
    for seed in range(2):
        backward(run, text(seed=seed))
    assert backend.ran == ran
    found.detach()
    for m in (model.up, model.down):
        m._forward_hooks.clear()
    agrees(found.moments["up"], passes[0])
    agrees(found.moments["down"], passes[1])
    backward(run)
    assert backend.compiled == compiled  # nothing is compiled again
    assert backend.ran > ran


@needs_stance
@pytest.mark.usefixtures("_fresh_compiler")
def test_attached_from_inside_a_compiled_training_step() -> None:
    """An optimizer's step() that is called by a compiled step, as torch's own are: out of dynamo's sight."""
    model, backend = Mlp(), Counting()
    found = Statistics({"up": model.up})
    calls = 0

    @torch._disable_dynamo
    def optimizer_step() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            found.attach()
        if calls == 4:
            found.detach()

    @torch.compile(backend=backend)
    def train_step(x: Tensor) -> None:
        loss = model(x).square().sum()
        loss.backward()
        optimizer_step()

    for seed in range(6):
        train_step(text(seed=seed))
    assert calls == 6
    assert found.moments["up"].tokens.item() == 2 * 15
    assert backend.ran >= 3


@needs_stance
@pytest.mark.usefixtures("_fresh_compiler")
def test_the_stance_of_others_is_respected() -> None:
    model = Mlp()
    first, second = Statistics({"up": model.up}), Statistics({"down": model.down})
    with torch.compiler.set_stance("eager_on_recompile"):
        first.attach()
        second.attach()
        assert stance() == "force_eager"
        with torch.compiler.set_stance("fail_on_recompile"):
            assert stance() == "fail_on_recompile"
        first.detach()
        assert stance() == "force_eager"
        second.detach()
        assert stance() == "eager_on_recompile"
        first.attach()
    assert stance() == "default"
    first.detach()  # whoever has set another stance meanwhile keeps it
    assert stance() == "default"


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models_are_refused_where_torch_cannot_run_them_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, inner, outer = Mlp(), Mlp(), torch.compile(Mlp(), backend="eager")
    inner.down.compile(backend="eager")
    for model in (plain, inner, outer):
        refuse_compiled(model)
    monkeypatch.delattr(torch.compiler, "set_stance")
    refuse_compiled(plain)
    with pytest.raises(ValueError, match=r"'down' is compiled, and torch .* use torch 2\.6"):
        refuse_compiled(inner)
    with pytest.raises(ValueError, match="the model is compiled"):
        refuse_compiled(outer)
    found = Statistics({"up": plain.up})
    found.attach()
    backward(plain)
    found.detach()
    assert found.moments["up"].tokens.item() == 15
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------------- which modules


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * F.linear(input, self.weight, self.bias)


class Initialised(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def test_which_modules_can_be_observed() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    attention = nn.MultiheadAttention(8, 2)
    for module in (nn.Linear(2, 3), Conv1D(3, 2), Initialised(2, 3), FalconLinear(2, 3)):
        assert can_be_observed(module), module
    for module in (attention, attention.out_proj, nn.Conv1d(2, 3, 1), nn.Bilinear(2, 2, 2), Scaled(2, 3), Mlp()):
        assert not can_be_observed(module), module
    # Shown: whoever observes them would wait in vain.
    passes = watch(attention.out_proj)
    x = torch.randn(4, 1, 8)
    attention(x, x, x)[0].sum().backward()
    assert not passes


def test_falcon_linear_is_the_linear_map() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    against_loops(FalconLinear(D_IN, D_OUT), backward)


def test_bytes() -> None:
    assert bytes_needed(nn.Linear(10, 3)) == bytes_needed(Conv1D(3, 10)) == (4 * 100, 4 * 9)
    assert bytes_needed(nn.Linear(10, 3).double()) == (8 * 100, 8 * 9)
    found = gathered(nn.Linear(10, 3).bfloat16(), lambda m: m(torch.ones(1, 10).bfloat16()).sum().backward())
    tensors = found.moments[""].tensors
    assert tuple(tensors[key].nbytes for key in ("inputs", "outputs")) == bytes_needed(nn.Linear(10, 3))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="modules is empty"):
        Statistics({})
    with pytest.raises(ValueError, match="inputs and outputs are both False"):
        Statistics({"w": nn.Linear(2, 2)}, inputs=False, outputs=False)
    with pytest.raises(ValueError, match="max_tokens=0: it must be at least 1"):
        Statistics({"w": nn.Linear(2, 2)}, max_tokens=0)
    with pytest.raises(ValueError, match="statistics of 'w' cannot be gathered: Conv1d is neither"):
        Statistics({"w": nn.Conv1d(2, 2, 1)})
    with pytest.raises(ValueError, match="weight 'w' has no module"):
        Statistics({"w": []})
    with pytest.raises(ValueError, match=r"modules of weight 'w' differ .* \[\(2, 3\), \(3, 2\)\]"):
        Statistics({"w": [nn.Linear(2, 3), nn.Linear(3, 2)]})


# ---------------------------------------------------------------------------------------------------- several processes

WORLD = 3


def whole_numbers(seed: int) -> Tensor:
    """Small whole numbers: their sums are exact in any order."""
    return torch.randint(-3, 4, (2, 4, D_IN), generator=torch.Generator().manual_seed(seed)).float()


def exact_step(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    (model(whole_numbers(seed)) * 2).sum().backward()


class Routed(nn.Module):
    """Two layers; tokens reach the second only where the seed is even."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.second(x) if int(x.abs().sum()) % 2 == 0 else 0)


def in_each_process(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    model = Routed()
    found = Statistics({"first": model.first, "second": model.second})
    found.attach()
    for step in range(3):
        if step == 2:  # resumed from what the first process has saved
            state = [found.state_dict() if rank == 0 else None]
            dist.broadcast_object_list(state)
            found.detach()
            found = Statistics({"first": model.first, "second": model.second})
            assert state[0] is not None
            found.load_state_dict(state[0])
            found.attach()
        for turn in range(2):
            exact_step(model, 100 * step + 10 * turn + rank)
        found.reduce()
    found.reduce()  # nothing new: nothing changes
    found.detach()
    torch.save(found.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_several_processes_hold_what_one_would(tmp_path: Path) -> None:
    mp.start_processes(in_each_process, (str(tmp_path),), nprocs=WORLD, start_method="fork")
    torch.manual_seed(0)
    model = Routed()

    def run(m: nn.Module) -> None:
        for step in range(3):
            for turn in range(2):
                for rank in range(WORLD):
                    exact_step(m, 100 * step + 10 * turn + rank)

    wanted = gathered(model, run)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, one in wanted.moments.items():
            for key, tensor in one.tensors.items():
                assert torch.equal(found[name][key], tensor), (rank, name, key)


def test_one_process_reduces_nothing() -> None:
    model = Mlp()
    found = gathered(model, backward)
    before = copy.deepcopy(found)
    found.reduce()
    same_bits(found, before)


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support:UserWarning")
def test_tensor_parallel_modules(tmp_path: Path) -> None:
    mp.start_processes(tensor_parallel, (str(tmp_path),), nprocs=2, start_method="fork")
    model = equal_model()
    wanted = gathered(model, backward)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, one in wanted.moments.items():
            assert found[name]["tokens"] == one.tokens
            for key in ("inputs", "outputs"):
                torch.testing.assert_close(found[name][key], one.tensors[key])


def equal_model() -> nn.Module:
    torch.manual_seed(3)
    return Mlp()


def tensor_parallel(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(equal_model(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    found = gathered(model, backward)
    torch.save(found.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_of_a_calibration_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "speed"))
        calibration = importlib.import_module("calibration")
    assert calibration.run(["--tiny", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["max_tokens"] == statistics.MAX_TOKENS == Statistics({"w": nn.Linear(2, 2)}).max_tokens
    assert found["layers"] == 2 * 6
    # q, k, v, output: 64 and 64; up and down: 64 and 256
    assert found["bytes"]["statistics"] == 2 * 4 * (4 * (64**2 + 64**2) + 2 * (64**2 + 256**2))
    kept = found["bytes"]["kept for the backward pass"]
    assert kept["ordinary"] == kept["calibration"] > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's forward mode
def test_passes_of_function_transforms_and_forward_mode_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    x = torch.randn(4, 8)
    statistics = Statistics({"first": net[0]})
    statistics.attach()
    params = dict(net.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().mean())(params)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(net(dual)).tangent is not None
    assert not statistics.moments
    net(x).square().mean().backward()
    statistics.detach()
    assert set(statistics.moments) == {"first"}
    torch.testing.assert_close(gradients["0.weight"], net[0].weight.grad)
