"""The lazy form's default state, the mask alone: how it is packed, how w comes back, and that nothing gets lost."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Curvature, Ramp, keep_mask, project, verify
from admm_nxm.kernels import available, backend_for, eager
from admm_nxm.masks import PACKED, is_mask, pack, packed_shape, stored_as, unpack
from tests.helpers import (
    FULL,
    TORCH_OPTIMIZERS,
    WITH_DUAL,
    Net,
    admm,
    assert_same_weights,
    batches,
    every,
    every_form,
    is_lean,
    loss_of,
    make_net,
    primal_of,
    restless,
    same_bits,
    spelt_out,
    tolerance,
    train,
    weights_of,
)

UP = "blocks.0.up.weight"

# ---------------------------------------------------------------- the layout

shapes = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9)).map(lambda s: (*s[0], 8 * s[1]))


def random_mask(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(shapes, st.integers(0, 2**32))
def test_unpacking_undoes_packing(shape: tuple[int, ...], seed: int) -> None:
    mask = random_mask(shape, seed)
    before = mask.clone()
    packed = pack(mask)
    assert packed.dtype == PACKED == torch.uint8
    assert packed.shape == packed_shape(shape) == (*shape[:-1], shape[-1] // 8)
    assert packed.is_contiguous()
    back = unpack(packed)
    assert back.dtype == torch.bool
    assert back.shape == shape
    assert torch.equal(back, mask)
    assert torch.equal(mask, before)
    # Bytes that are neither 0 nor 1 would be True for some operations and False for others.
    assert torch.equal(back.view(torch.uint8), mask.view(torch.uint8))


@given(shapes, st.integers(0, 2**32))
def test_packing_undoes_unpacking(shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, packed_shape(shape), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed)), packed)


def test_bit_k_of_a_byte_is_place_k_of_eight() -> None:
    for place in range(24):
        mask = torch.zeros(3, 24, dtype=torch.bool)
        mask[1, place] = True
        expected = torch.zeros(3, 3, dtype=torch.uint8)
        expected[1, place // 8] = 1 << place % 8
        assert torch.equal(pack(mask), expected)
        assert torch.equal(unpack(expected), mask)


def test_every_byte_is_its_bits() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(256, 1)
    bits = torch.tensor([[bool(byte >> k & 1) for k in range(8)] for byte in range(256)])
    assert torch.equal(unpack(packed), bits)
    assert torch.equal(pack(bits), packed)


VIEWS = {
    "transposed": lambda t: t.t(),
    "every other row": lambda t: t[::2],
    "every other column": lambda t: t[:, ::2],
    "columns from the middle": lambda t: t[:, 4:12],
    "one row from the middle of a word": lambda t: t[:1, 3:19],
    "repeated": lambda t: t[:1].expand(5, -1),
    "three dimensions": lambda t: t.view(16, 4, 8).transpose(0, 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_masks_of_any_strides_are_packed(view: Any) -> None:
    mask = view(random_mask((16, 32), 1))
    assert torch.equal(pack(mask), pack(mask.contiguous().clone()))
    assert torch.equal(unpack(pack(mask)), mask)
    packed = view(torch.randint(0, 256, (16, 32), dtype=torch.uint8))
    assert torch.equal(unpack(packed), unpack(packed.contiguous().clone()))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (0, 0), (2, 0, 16)])
def test_empty_masks_are_packed_too(shape: tuple[int, ...]) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.bool))
    assert packed.shape == packed_shape(shape)
    assert unpack(packed).shape == shape


def test_layout_is_told_by_the_dtype() -> None:
    mask = random_mask((4, 16), 2)
    assert stored_as(mask, torch.bool) is mask
    assert torch.equal(stored_as(mask, PACKED), pack(mask))
    assert unpack(mask) is mask
    assert is_mask(mask)
    assert is_mask(pack(mask))
    assert not any(is_mask(mask.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64))


# ---------------------------------------------------------------- w and what is shown of it

DIVISORS = [1.0, 1.001, 1.03, 1.1, 1.5, 1.75, 2.0 - 2.0**-20, 2.0, 3.0, 8.3, 101.0, 1001.0, 1.0 + 2.0**20]
BACKENDS = available(torch.device("cpu"))


def awkward(dtype: torch.dtype) -> Tensor:
    """All numbers of 16 bits; of wider dtypes random bits, small integers, and the ends of the range."""
    if dtype.itemsize == 2:
        w = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    else:
        integer = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
        info, generator = torch.iinfo(integer), torch.Generator().manual_seed(4)
        bits = torch.randint(info.min, info.max, (60000,), generator=generator, dtype=integer).view(dtype)
        ordinary = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
        f = torch.finfo(dtype)
        ends = torch.tensor([f.max, f.min, f.tiny, -f.tiny, f.tiny / 2, f.smallest_normal, f.eps, 0.0, -0.0])
        w = torch.cat([bits, ordinary, torch.arange(-99, 100).to(dtype), ends.to(dtype)])
    infinities = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype)
    w = torch.cat([w[w.isfinite()], infinities])
    return torch.cat([w, w.new_zeros(-w.numel() % 8)]).view(-1, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weight_that_is_shrunk_and_restored_again_and_again_stays_what_it_became(
    dtype: torch.dtype, divisor: float, backend: Any
) -> None:
    kernels = backend_for(torch.device("cpu"), backend)
    w = awkward(dtype)
    mask = pack(random_mask(tuple(w.shape), 5))
    kept = unpack(mask)

    def there_and_back(before: Tensor) -> tuple[Tensor, Tensor]:
        shown = before.clone()
        kernels.shrink([shown], [mask], divisor)
        back = shown.clone()
        kernels.restore([back], [mask], divisor)
        return shown, back

    shown, first = there_and_back(w)
    assert same_bits(shown[kept], w[kept])
    assert same_bits(first[kept], w[kept])
    for _ in range(3):
        _, again = there_and_back(first)
        assert same_bits(again, first)
    # And that is w to within a rounding, where neither end of the range is near.
    f = torch.finfo(dtype)
    inside = (w.abs() < f.max / 4) & (w.abs().double() > f.tiny * divisor * 4) & ~kept
    assert inside.any()
    error = (first.double() - w.double()).abs() / w.double().abs()
    assert float(error[inside].max()) <= f.eps * 1.01
    ratio = shown.double() * divisor / w.double()
    assert float((ratio[inside] - 1).abs().max()) <= f.eps
    if divisor in (1.0, 2.0):
        assert same_bits(first[inside], w[inside])


@pytest.mark.parametrize("state_dtype", [torch.bool, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_not_moved_come_through_a_whole_rise_of_rho(
    dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    """A rounding for each rho at most, whatever the number of steps."""
    net = make_net(dtype=dtype)
    inner = TORCH_OPTIMIZERS["SGD-single"]
    rho = Ramp(0.03, 1000.0, start=0, stop=60)
    optimizer = admm(net, inner, rho=rho, update_every=every(6), state_dtype=state_dtype)
    start = weights_of(net)
    for _ in range(61):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.rho == 1000.0
    for name, mask in optimizer.masks().items():
        p = net.get_parameter(name)
        assert same_bits(p.detach()[mask], start[name][mask])
        error = (primal_of(optimizer, p) - start[name]).abs() / start[name].abs()
        assert 0 < float(error.max()) <= 11 * torch.finfo(dtype).eps
        assert torch.equal(mask, keep_mask(start[name], "1:4"))


# ---------------------------------------------------------------- what it costs


def admm_bytes(optimizer: ADMMNxM) -> int:
    states = [state["admm_consensus"] for state in optimizer.state.values() if "admm_consensus" in state]
    return sum(state.numel() * state.element_size() for state in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_run_stores_one_bit_a_prunable_weight(dtype: torch.dtype) -> None:
    net = make_net(dtype=dtype)
    optimizer = admm(net, total_steps=20)
    prunable = sum(net.get_parameter(weight.name).numel() for weight in optimizer.selection)
    for step in range(20):
        train(net, optimizer, 1, step)
        assert admm_bytes(optimizer) == 0.125 * prunable
    assert optimizer.frozen
    assert optimizer.finalize().ok
    train(net, optimizer, 2, start=20)
    assert admm_bytes(optimizer) == 0.125 * prunable
    for weight in optimizer.selection:
        state = optimizer.state[net.get_parameter(weight.name)]["admm_consensus"]
        assert torch.equal(unpack(state), optimizer.masks()[weight.name])


@restless
@pytest.mark.parametrize("total_steps", [20, None])
@every_form
def test_frozen_mask_is_packed_where_no_state_of_the_weights_size_was(penalty: str, total_steps: int | None) -> None:
    """Loaders that fill a state dict in place find a frozen state in the shape of the one before it."""
    net = make_net()
    optimizer = admm(net, penalty=penalty, total_steps=total_steps, residual_tolerance=99.0)
    train(net, optimizer, 6)
    shapes = {w.name: optimizer.state[net.get_parameter(w.name)]["admm_consensus"].shape for w in optimizer.selection}
    train(net, optimizer, 14, start=6)
    optimizer.finalize()
    for name, mask in optimizer.masks().items():
        state = optimizer.state[net.get_parameter(name)]["admm_consensus"]
        assert state.dtype == (PACKED if is_lean(penalty) else torch.bool)
        assert state.shape == shapes[name]
        assert torch.equal(unpack(state), mask)


class Odd(nn.Module):
    """Weights whose last dimension does and does not divide into bytes, one of them grouped along its first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        sizes = [(16, 24), (8, 12), (12, 4), (16, 20)]
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, rows, bias=False)) for rows, width in sizes)

    def gradients(self, step: int) -> None:
        for number, p in enumerate(self.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            p.grad = torch.randn(p.shape, generator=generator)


ALONG_ROWS = {r"blocks\.3\..*": 0}


def odd_run(options: Mapping[str, Any], first: int = 0, last: int = 20, state: Any = None) -> tuple[Odd, ADMMNxM]:
    net = Odd()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    defaults = {"pattern": "2:4", "total_steps": 20, "residual_tolerance": 99.0, "dims": ALONG_ROWS}
    optimizer = ADMMNxM(inner, net, **{**defaults, **spelt_out(options)})
    if state is not None:
        net.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for step in range(first, last):
        net.gradients(step)
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("stop", [7, 19])
def test_rows_that_do_not_divide_into_bytes_are_masked_by_a_byte_a_weight(stop: int) -> None:
    net, optimizer = odd_run({}, last=stop)
    for number, expected in enumerate([PACKED, torch.bool, torch.bool, torch.bool]):
        w = net.blocks[number][0].weight
        state = optimizer.state[w]["admm_consensus"]
        assert state.dtype == expected
        assert state.shape == (packed_shape(w.shape) if expected == PACKED else w.shape)
    whole, its = odd_run({})
    resumed, again = odd_run({}, stop, 20, saved((net, optimizer)))
    assert_same_weights(resumed, whole)
    assert verify(resumed, again.selection).ok
    assert again.finalize() == its.finalize()


def saved(pair: tuple[nn.Module, ADMMNxM]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of model and optimizer, through a file."""
    buffer = io.BytesIO()
    torch.save([pair[0].state_dict(), pair[1].state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    return states[0], states[1]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_mask_serves_weights_in_any_order_of_memory(dim: int, backend: Any) -> None:
    """The mask is packed along the last dimension, whatever is grouped and however the weight lies in memory."""

    def run(transposed: bool) -> tuple[nn.Module, ADMMNxM]:
        torch.manual_seed(1)
        net = nn.Module()
        net.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 24, bias=False))])
        linear = net.blocks[0][0]
        if transposed:
            linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
        assert linear.weight.is_contiguous() != transposed
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        options = {"rho": Ramp(0.1, 50.0, start=2, stop=15), "update_every": every(2), "freeze_at": 16}
        optimizer = ADMMNxM(inner, net, pattern="1:8", dims={".*": dim}, backend=backend, **options)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            linear.weight.grad = torch.empty_like(linear.weight).copy_(torch.randn(24, 16, generator=generator))
            optimizer.step()
        assert optimizer.state[linear.weight]["admm_consensus"].shape == (24, 2)
        return net, optimizer

    (plain, one), (transposed, two) = run(False), run(True)
    assert_same_weights(plain, transposed)
    name = "blocks.0.0.weight"
    assert torch.equal(one.masks()[name], two.masks()[name])
    assert torch.equal(project(plain.get_parameter(name).detach(), "1:8", dim=dim), plain.get_parameter(name))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stop", [7, 19])
def test_mask_of_either_layout_is_read_and_stored_as_here(stop: int) -> None:
    """Ranks whose rows do not divide into bytes store a byte a weight, and their checkpoints are read elsewhere."""
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, stop)
    weights, state = saved((net, optimizer))
    for entry in state["state"].values():
        if "admm_consensus" in entry:
            entry["admm_consensus"] = unpack(entry["admm_consensus"])
    other_net = make_net(seed=1)
    other = admm(other_net, total_steps=20)
    other_net.load_state_dict(weights)
    other.load_state_dict(state)
    for name in optimizer.masks():
        mine, its = optimizer.state[net.get_parameter(name)], other.state[other_net.get_parameter(name)]
        assert same_bits(mine["admm_consensus"], its["admm_consensus"])
    train(net, optimizer, 20 - stop, start=stop)
    train(other_net, other, 20 - stop, start=stop)
    assert_same_weights(net, other_net)


@pytest.mark.parametrize("stop", [7, 19])
def test_packed_mask_of_another_width_is_refused(stop: int) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, stop)
    _, state = saved((net, optimizer))
    entry = next(entry for entry in state["state"].values() if "admm_consensus" in entry)
    entry["admm_consensus"] = torch.cat([entry["admm_consensus"]] * 2, dim=-1)
    with pytest.raises(ValueError, match=r"admm_consensus for weight 'blocks\.0\.up\.weight' has shape \(16, 2\)"):
        admm(make_net(), total_steps=20).load_state_dict(state)


REFUSED = {
    ("lazy", FULL, 7): r"stored the mask, and what is stored here is w off the mask; build .* state_dtype=torch\.bool",
    ("lazy", FULL, 19): r"stored the mask, and what is stored here is w off the mask; build .* state_dtype=torch\.bool",
    (FULL, "lazy", 7): r"stored w off the mask, and what is .* the mask; build ADMMNxM with state_dtype=torch\.float32",
    (FULL, "lazy", 19): r"stored w off the mask, and what is .* with state_dtype=the floating-point dtype of that run",
}


@pytest.mark.parametrize(("source", "target", "stop"), REFUSED)
def test_checkpoint_of_the_other_state_is_refused_with_the_dtype_to_ask_for(
    source: str, target: str, stop: int
) -> None:
    net, other_net = make_net(), make_net(seed=1)
    optimizer = admm(net, total_steps=20, penalty=source)
    train(net, optimizer, stop)
    other = admm(other_net, total_steps=20, penalty=target)
    train(other_net, other, 3)
    before, held = copy.deepcopy(other.state_dict()), weights_of(other_net)
    with pytest.raises(ValueError, match=REFUSED[source, target, stop]):
        other.load_state_dict(saved((net, optimizer))[1])
    assert_same_weights(other_net, held)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert same_bits(after["state"][key]["exp_avg"], entry["exp_avg"])
        if "admm_consensus" in entry:
            assert same_bits(after["state"][key]["admm_consensus"], entry["admm_consensus"])


def test_checkpoint_from_before_the_selection_was_noted_is_refused_by_the_kind_of_its_state() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=FULL)
    train(net, optimizer, 7)
    _, state = saved((net, optimizer))
    for group in state["param_groups"]:
        del group["admm_selection"]
    lean = admm(make_net(), total_steps=20)
    with pytest.raises(ValueError, match=r"is torch\.float32, and here masks alone .* with state_dtype=torch\.float32"):
        lean.load_state_dict(state)
    assert not lean.state
    admm(make_net(), total_steps=20, penalty=FULL).load_state_dict(state)


@pytest.mark.parametrize("stop", [7, 12, 19])
def test_run_in_bfloat16_with_the_mask_alone_resumes_bit_for_bit(stop: int) -> None:
    def fresh(seed: int = 0) -> tuple[Net, ADMMNxM]:
        net = make_net(seed, dtype=torch.bfloat16)
        return net, admm(net, total_steps=20, state_dtype=torch.bool)

    whole, first, second = fresh(), fresh(), fresh(seed=1)
    train(*whole, 20)
    train(*first, stop)
    weights, state = saved(first)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    for name in first[1].masks():
        assert second[1].state[second[0].get_parameter(name)]["admm_consensus"].dtype == PACKED
    train(*second, 20 - stop, start=stop)
    assert_same_weights(second[0], whole[0])
    assert second[1].finalize() == whole[1].finalize()


def test_mask_alone_brings_w_back_to_the_8_bits_of_bfloat16() -> None:
    """Which is why weights of 16 bits have a state of their size unless this one is asked for."""
    net = make_net(dtype=torch.bfloat16)
    optimizer = admm(net, TORCH_OPTIMIZERS["SGD-single"], rho=0.7, update_every=every(99), state_dtype=torch.bool)
    start = weights_of(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, mask in optimizer.masks().items():
        back = primal_of(optimizer, net.get_parameter(name))
        assert same_bits(back[mask], start[name][mask])
        error = ((back.float() - start[name].float()) / start[name].float()).abs()
        assert 0 < float(error.max()) <= torch.finfo(torch.bfloat16).eps


# ---------------------------------------------------------------- weights that come from elsewhere


@pytest.mark.parametrize("how", ["eval", "projected"])
@every_form
def test_dense_weights_loaded_while_projected_are_the_w_that_training_goes_on_from(penalty: str, how: str) -> None:
    net, best = make_net(), make_net(seed=5)
    optimizer = admm(net, TORCH_OPTIMIZERS["SGD-single"], rho=3.0, update_every=every(3, penalty), penalty=penalty)
    train(net, optimizer, 10)
    if how == "eval":
        optimizer.eval()
        net.load_state_dict(best.state_dict())
        optimizer.train()
    else:
        with optimizer.projected():
            net.load_state_dict(best.state_dict())
    for name, mask in optimizer.masks().items():
        loaded = best.get_parameter(name).detach()
        assert torch.equal(mask, keep_mask(loaded, "1:4"))
        torch.testing.assert_close(primal_of(optimizer, net.get_parameter(name)), loaded, rtol=1e-6, atol=0)
    # A step in which nothing moves leaves them where they are.
    if penalty not in WITH_DUAL:
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, mask in optimizer.masks().items():
            loaded, p = best.get_parameter(name).detach(), net.get_parameter(name)
            torch.testing.assert_close(primal_of(optimizer, p), loaded, rtol=1e-6, atol=0)
            torch.testing.assert_close(p.detach()[~mask], loaded[~mask] / 4, rtol=1e-6, atol=0)
    # And what is evaluated is what their mask keeps of them.
    with optimizer.projected():
        for name in optimizer.masks():
            assert verify({name: net.get_parameter(name).detach()}, "1:4").ok


@pytest.mark.parametrize("inner", ["AdamW-single", "SGD-foreach-options"])
@every_form
def test_weight_whose_first_gradient_comes_in_mid_run_starts_from_w(penalty: str, inner: str) -> None:
    net = make_net()
    optimizer = admm(net, TORCH_OPTIMIZERS[inner], rho=9.0, update_every=every(2, penalty), penalty=penalty)
    late = net.get_parameter(UP)
    start = late.detach().clone()
    for x in batches(5):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        late.grad = None
        optimizer.step()
    assert same_bits(late.detach(), start)
    assert "admm_consensus" not in optimizer.state.get(late, {})
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if penalty in WITH_DUAL:
        return
    torch.testing.assert_close(primal_of(optimizer, late), start, rtol=1e-6, atol=0)
    mask = optimizer.masks()[UP]
    torch.testing.assert_close(late.detach(), torch.where(mask, start, start / 10), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- errors in mid-step


class Fails:
    """A ranking, and a step of the inner optimizer, that fail when told to."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, state: Mapping[str, Any], shape: torch.Size) -> None:
        self.check()

    def check(self) -> None:
        if self.now:
            self.now = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("fails_at", [0, 1, 4, 5])
@pytest.mark.parametrize("where", ["inner step", "after the inner step", "ranking"])
@pytest.mark.parametrize("form", ["lazy", FULL])
def test_error_in_mid_step_does_not_cost_w(form: str, where: str, fails_at: int) -> None:
    """The next step takes what the model holds for what it was shown, so that must be what it holds."""
    net, fails = make_net(), Fails()

    class Inner(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if where == "inner step":
                fails.check()
            done = super().step(closure)
            if where == "after the inner step":
                fails.check()
            return done

    optimizer = admm(
        net,
        lambda net: Inner(net.parameters(), lr=0.1),
        rho=lambda step: 7.0 + step,
        update_every=every(1),
        saliency=fails,
        penalty=form,
    )
    start = weights_of(net)
    late, still = "blocks.0.up.weight", "blocks.1.down.weight"
    for step in range(8):
        for name, p in net.named_parameters():
            p.grad = torch.zeros_like(p)
            if (name == late and step < 4) or (name == still and step >= 3):
                p.grad = None
        if step == fails_at:
            fails.now = True
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        optimizer.step()
    assert not fails.now
    for name, mask in optimizer.masks().items():
        p = net.get_parameter(name)
        torch.testing.assert_close(primal_of(optimizer, p), start[name], rtol=2e-6, atol=0)
        if name != still or form == "lazy":
            shown = torch.where(mask, start[name], start[name] / (1 + optimizer.rho))
            torch.testing.assert_close(p.detach(), shown, rtol=2e-6, atol=0)
        assert torch.equal(mask, keep_mask(start[name], "1:4"))


# ---------------------------------------------------------------- stochastic rounding of the other forms' state


def stochastic(penalty: str, seed: int = 0, **options: Any) -> tuple[Net, ADMMNxM]:
    net = make_net(seed)
    defaults = {
        "rho": 0.1,
        "update_every": every(2, penalty),
        "state_dtype": torch.bfloat16,
        "state_rounding": "stochastic",
        "residual_tolerance": 99.0,
    }
    return net, admm(net, penalty=penalty, **{**defaults, **options})


def states_of(net: nn.Module, optimizer: ADMMNxM) -> dict[str, Tensor]:
    return {name: optimizer.state[net.get_parameter(name)]["admm_consensus"].clone() for name in optimizer.masks()}


@pytest.mark.parametrize("penalty", WITH_DUAL)
def test_stochastic_rounding_is_repeatable_and_differs_from_rounding_to_nearest(penalty: str) -> None:
    one, two, nearest = stochastic(penalty), stochastic(penalty), stochastic(penalty, state_rounding="nearest")
    for pair in (one, two, nearest):
        train(*pair, 8)
    assert_same_weights(one[0], two[0])
    for name, state in states_of(*one).items():
        assert state.dtype == torch.bfloat16
        assert same_bits(state, states_of(*two)[name])
        other = states_of(*nearest)[name]
        assert not torch.equal(state, other)
        torch.testing.assert_close(state, other, rtol=2**-5, atol=1e-2)


@pytest.mark.parametrize("penalty", WITH_DUAL)
def test_stochastic_rounding_gives_every_weight_and_every_step_bits_of_its_own(penalty: str) -> None:
    def roundings(name: str, step: int) -> Tensor:
        _, optimizer = stochastic(penalty)
        bound = optimizer._find(name)
        a = torch.full((16, 8), 1.0 + 2.0**-9)
        return eager.round_stochastically(a, torch.bfloat16, optimizer._seed(bound, step)).flatten()

    drawn = [roundings(name, step) for name in (UP, "blocks.1.up.weight") for step in (2, 4)]
    assert all(set(bits.tolist()) == {1.0, 1.0 + 2.0**-7} for bits in drawn)
    assert len({tuple(bits.tolist()) for bits in drawn}) == 4
    assert same_bits(drawn[0], roundings(UP, 2))


@restless
@pytest.mark.parametrize("stop", [5, 6, 13])
@pytest.mark.parametrize("penalty", WITH_DUAL)
def test_stochastic_rounding_is_the_same_after_a_resume(penalty: str, stop: int) -> None:
    whole, first, second = (stochastic(penalty, seed, freeze_at=12) for seed in (0, 0, 1))
    train(*whole, 16)
    train(*first, stop)
    weights, state = saved(first)
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    train(*second, 16 - stop, start=stop)
    assert_same_weights(whole[0], second[0])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("penalty", WITH_DUAL)
def test_stochastic_rounding_survives_a_copy(penalty: str, how: str) -> None:
    pair = stochastic(penalty)
    train(*pair, 5)
    other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other[1].state_rounding == "stochastic"
    train(*pair, 7, start=5)
    train(*other, 7, start=5)
    assert_same_weights(pair[0], other[0])
    for name, state in states_of(*pair).items():
        assert same_bits(state, states_of(*other)[name])


@pytest.mark.parametrize("penalty", WITH_DUAL)
def test_stochastic_rounding_ends_feasible_under_the_defaults(penalty: str) -> None:
    pair = stochastic(penalty, rho=None, update_every=None, total_steps=60, residual_tolerance=tolerance(penalty))
    train(*pair, 60)
    assert pair[1].finalize().ok


# ---------------------------------------------------------------- the choice of a backend


@pytest.mark.parametrize("backend", BACKENDS)
@every_form
def test_backend_that_is_asked_for_does_the_same_run(penalty: str, backend: Any) -> None:
    nets = make_net(), make_net()
    options = {"total_steps": 20, "penalty": penalty, "residual_tolerance": 99.0}
    named, default = admm(nets[0], backend=backend, **options), admm(nets[1], **options)
    assert named.backend == backend
    assert default.backend is None
    assert named.saliency == default.saliency == (None if penalty in WITH_DUAL else Curvature())
    train(nets[0], named, 20)
    train(nets[1], default, 20)
    if penalty not in WITH_DUAL:
        assert_same_weights(*nets)
    for name, w in weights_of(nets[0]).items():
        torch.testing.assert_close(w, nets[1].get_parameter(name).detach(), rtol=1e-4, atol=1e-6)
    assert named.finalize() == default.finalize()
    copied = copy.deepcopy((nets[0], named))[1]
    assert copied.backend == backend
