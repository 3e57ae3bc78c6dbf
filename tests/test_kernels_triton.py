"""The Triton kernels against eager, bit for bit: in Triton's interpreter on a CPU, and compiled where CUDA is."""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_nxm import Pattern
from admm_nxm.kernels import eager, fused
from admm_nxm.masks import pack
from admm_nxm.projection import keep_mask
from tests.helpers import same_bits
from tests.test_kernels import alike, awkward

np = pytest.importorskip("numpy")  # which the interpreter computes with
triton = pytest.importorskip("triton", minversion="3.6")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(weight, state) for weight in FLOATS for state in FLOATS]
PATTERNS = [Pattern.parse(text) for text in ("2:4", "1:4", "2:8", "5:16", "3:20", "4:32", "4:4", "3:5")]
QUICK = PATTERNS[0]

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


def load_kernels(name: str) -> ModuleType:
    """The module of the kernels once more, beside the one that the package imports."""
    path = Path(fused.__file__).with_name("_triton.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[ModuleType]:
    """Whether a kernel is interpreted is decided where it is defined, whoever has imported Triton before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0" if DEVICE == "cuda" else "1")
        module = load_kernels("interpreted_kernels")
    assert (DEVICE == "cpu") == module.INTERPRETED
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(fused, "_kernels", lambda: module)
        patch.setattr(fused, "_plans", {})
        fused._warm.cache_clear()
        yield module
    fused._warm.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is launched: names, and all that a kernel is compiled for."""
    seen: list[tuple[Any, ...]] = []
    launch = fused._launch

    def spy(name: str, device: torch.device, programs: int, *arguments: Any, **constants: Any) -> None:
        kinds = [a.dtype if torch.is_tensor(a) else a if isinstance(a, (bool, str)) else type(a) for a in arguments]
        seen.append((name, *map(str, kinds), *constants.items()))
        launch(name, device, programs, *arguments, **constants)

    monkeypatch.setattr(fused, "_launch", spy)
    return seen


class Source:
    """Draws tensors on the device."""

    def __init__(self, seed: int = 0, infinities: bool = True, nans: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kinds = (infinities, nans)

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        flat = awkward(self.generator, math.prod(shape), dtype, *self.kinds)
        return flat.view(*shape).to(DEVICE)


def twin(t: Tensor) -> Tensor:
    """A copy with the same strides, and memory of its own."""
    storage = t.untyped_storage().clone()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, t.storage_offset(), t.shape, t.stride())


def same(ours: Tensor, theirs: Tensor) -> bool:
    return alike(ours, theirs) if ours.is_floating_point() else torch.equal(ours, theirs)


def assert_same_as_eager(name: str, lists: Sequence[Sequence[Tensor]], *arguments: float) -> None:
    ours, theirs = ([[twin(t) for t in tensors] for tensors in lists] for _ in range(2))
    getattr(fused, name)(*ours, *arguments)
    getattr(eager, name)(*theirs, *arguments)
    for mine, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert same(mine, other)


def assert_same_advance(name: str, weight: Tensor, state: Tensor, *arguments: Any) -> None:
    """Compare one update; it changes the state."""
    w, other = twin(weight), twin(state)
    figures = getattr(fused, name)(weight, state, *arguments)
    expected = getattr(eager, name)(w, other, *arguments)
    assert same(state, other)
    assert same_bits(weight, w)
    assert (figures.dtype, figures.shape) == (torch.float32, (4,))
    assert figures[2:].tolist() == expected[2:].tolist()
    finite = expected.isfinite()
    torch.testing.assert_close(figures[finite], expected[finite], rtol=1e-5, atol=1e-37)


def shapes(kernels: ModuleType) -> list[tuple[int, ...]]:
    """None, one, and many; within a block, at its end, and across several."""
    block = kernels.BLOCK
    return [(3, 5), (0,), (1,), (block,), (2, block // 2 + 8), (1, 8), (3, 0, 4), (7, block // 4 - 1), (2, 3, 16)]


def with_gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


# ---------------------------------------------------------------- lists


def pairs(kernels: ModuleType, draw: Source, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[list[Tensor], ...]:
    """Weights and states of many shapes and layouts, with some others among them."""
    weight, state = dtypes
    ws = [draw(shape, weight) for shape in shapes(kernels)]
    vs = [draw(shape, state) for shape in shapes(kernels)]
    ws += [draw((5, 12), weight).t(), with_gaps(draw((4, 8), weight)), draw((2, 6), weight), draw((9,), torch.float64)]
    vs += [draw((5, 12), state).t(), with_gaps(draw((4, 8), state)), draw((6, 2), state).t(), draw((9,), torch.float64)]
    ws += [draw((4, 4), torch.float32), draw((40,), weight)[3:]]
    vs += [draw((4, 4), torch.float32), draw((40,), state)[3:]]
    return ws, vs


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_reveal_and_conceal_have_the_bits_of_eager(
    kernels: ModuleType, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    ws, vs = pairs(kernels, Source(), dtypes)
    assert_same_as_eager("reveal", (ws, vs))
    for fraction in (0.0, 0.3):
        assert_same_as_eager("conceal", (ws, vs), fraction)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_passes_with_a_stored_mask_have_the_bits_of_eager(kernels: ModuleType, dtype: torch.dtype) -> None:
    draw = Source()
    ws, masks = pairs(kernels, draw, (dtype, torch.float32))
    masks = [mask > 0 for mask in masks]
    for shape in ((8,), (3, 8 * kernels.BLOCK // 16), (2, 3, 16), (0, 8), (8, 16)):
        ws += [draw(shape, dtype)]
        masks += [pack(draw(shape, torch.float32) > 0)]
    ws += [draw((16, 8), dtype).t()]  # a packed mask beside a weight in another order
    masks += [pack(draw((8, 16), torch.float32) > 0)]
    for divisor in (1.0009999275207520, 1e30):
        assert_same_as_eager("shrink", (ws, masks), divisor)
        assert_same_as_eager("restore", (ws, masks), divisor)
    assert_same_as_eager("keep_only", (ws, masks))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_penalty_and_pull_are_within_two_roundings_of_exact(
    kernels: ModuleType, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    weight, state = dtypes
    sizes = [(3, 64), (kernels.BLOCK + 5,), (1,)]
    gs, ws = ([torch.randn(size, device=DEVICE).to(weight) for size in sizes] for _ in range(2))
    vs = [torch.randn(size, device=DEVICE).to(state) for size in sizes]
    eps = 2 * torch.finfo(weight).eps
    before = [g.clone() for g in gs]
    fused.add_penalty(gs, ws, vs, 0.37)
    for g, old, w, v in zip(gs, before, ws, vs, strict=True):
        exact = old.double() + 0.37 * (w.double() - v.double())
        assert ((g - exact).abs() <= eps * (old.abs() + 0.37 * (w.double().abs() + v.abs()))).all()
    for fraction in (0.001, 0.3, 0.7, 1.0):
        moved = [w.clone() for w in ws]
        fused.pull(moved, vs, fraction)
        for new, w, v in zip(moved, ws, vs, strict=True):
            exact = w.double() + fraction * (v.double() - w.double())
            assert ((new - exact).abs() <= eps * (w.double().abs() + v.abs())).all()
    fused.pull(ws, vs, 1.0)
    assert all(same_bits(w, v.to(weight)) for w, v in zip(ws, vs, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_penalty_adds_nothing_where_weight_and_consensus_agree(dtype: torch.dtype) -> None:
    g, w = torch.randn(64, device=DEVICE).to(dtype), (torch.randn(64, device=DEVICE) * 1000).to(dtype)
    before = g.clone()
    fused.add_penalty([g], [w], [w.clone()], 123.0)
    assert same_bits(g, before)


@pytest.mark.parametrize("name", ["add_penalty", "pull"])
def test_tensors_without_a_kernel_go_to_eager(kernels: ModuleType, name: str) -> None:
    ws, vs = pairs(kernels, Source(infinities=False, nans=False), (torch.float64, torch.float64))
    ws, vs = ([t for t in tensors if t.dtype == torch.float64] for tensors in (ws, vs))
    assert_same_as_eager(name, ([ws, ws, vs] if name == "add_penalty" else [ws, vs]), 0.3)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtypes=st.sampled_from(PAIRS),
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    fraction=st.floats(0, 1),
)
def test_what_is_concealed_is_revealed_again(
    seed: int, dtypes: tuple[torch.dtype, torch.dtype], sizes: list[int], fraction: float
) -> None:
    draw = Source(seed)
    ws = [draw((size,), dtypes[0]) for size in sizes]
    hs = [eager.hide(w, draw(w.shape, torch.float32) > 0, dtypes[1]) for w in ws]
    old = [w.clone() for w in ws]
    fused.conceal(ws, hs, fraction)
    fused.reveal(ws, hs)
    for w, before, h in zip(ws, old, hs, strict=True):
        kept = eager.hidden_mask(h)
        through = before.to(dtypes[1]).to(dtypes[0])
        assert alike(w[kept], before[kept])
        assert torch.equal(w[~kept].nan_to_num(nan=0.5), through[~kept].nan_to_num(nan=0.5))


# ---------------------------------------------------------------- updates


# NaNs of several makes have an order, and which make comes out of a conversion or a difference of infinities is the
# processor's affair, even from one entry to the next: no group gets more than one that is not there from the start.
tame = functools.partial(Source, 9, infinities=False, nans=False)


def with_a_nan(t: Tensor) -> Tensor:
    t[(0,) * t.ndim] = float("nan")
    return t


def rows(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((3, group * (64 // group)), dtype), -1


def columns(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((2 * group, 40 if group < 6 else 12), dtype), 0


def odd_columns(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((2 * group, 7), dtype), -2


def middle(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((3, group, 1, 6), dtype), 1


def transposed(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((2 * group, 9), dtype).t(), 1


def transposed_rows(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return draw((5, 3 * group), dtype).t(), 0


def gaps(draw: Callable[..., Tensor], group: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return with_gaps(draw((3, group), dtype)), 1


Layout = Callable[[Callable[..., Tensor], int, torch.dtype], tuple[Tensor, int]]
LAYOUTS: list[Layout] = [rows, columns, odd_columns, middle, transposed, transposed_rows, gaps]
EVERY = [
    (pattern, layout)
    for pattern in PATTERNS
    for layout in LAYOUTS
    if layout in (rows, columns) or pattern == QUICK or str(pattern) == "3:5"
]
every_pattern_and_layout = pytest.mark.parametrize(
    ("pattern", "layout"), EVERY, ids=lambda value: getattr(value, "__name__", str(value))
)


def chosen(pattern: Pattern, layout: Layout) -> list[tuple[torch.dtype, torch.dtype]]:
    """All pairs of dtypes for one pattern and layout, and each for some of the others: the interpreter is slow."""
    if pattern == QUICK and layout is rows:
        return PAIRS
    index = EVERY.index((pattern, layout))
    return [PAIRS[2 * index % len(PAIRS)]]


@every_pattern_and_layout
def test_advance_has_the_bits_of_eager(pattern: Pattern, layout: Layout) -> None:
    for weight, state in chosen(pattern, layout):
        w, dim = layout(Source(nans=False), pattern.group, weight)
        v = layout(tame(), pattern.group, state)[0]
        assert_same_advance("advance", w, v, pattern, dim, True, 0.7)
        assert_same_advance("advance", w, v, pattern, dim, weight == torch.float32, 1.0)


@pytest.mark.parametrize("seed", [12345, 2**31 + 7])
@pytest.mark.parametrize("layout", [rows, columns, transposed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtypes", [PAIRS[1], PAIRS[7], PAIRS[4]], ids=str)
def test_stochastic_rounding_has_the_bits_of_eager(
    dtypes: tuple[torch.dtype, torch.dtype], layout: Layout, seed: int
) -> None:
    w, dim = layout(Source(nans=False), QUICK.group, dtypes[0])
    v = layout(tame(), QUICK.group, dtypes[1])[0]
    assert_same_advance("advance", w, v, QUICK, dim, True, 1.0, seed)


def factor_for(layout: Layout, draw: Source, group: int) -> Tensor:
    return layout(draw, group, torch.float32)[0].abs().nan_to_num(nan=1.0, posinf=1.0)


@pytest.mark.parametrize("weighted", [False, True], ids=["magnitude", "weighted"])
@every_pattern_and_layout
def test_advance_hidden_has_the_bits_of_eager(pattern: Pattern, layout: Layout, weighted: bool) -> None:
    draw = Source(1)
    for weight, state in chosen(pattern, layout):
        w, dim = layout(tame() if weighted else draw, pattern.group, weight)
        h = layout(draw, pattern.group, state)[0]
        h.copy_(eager.hide(h, keep_mask(h, pattern, dim), state))
        factor = factor_for(layout, draw, pattern.group) if weighted else None
        assert_same_advance("advance_hidden", with_a_nan(w), h, pattern, dim, factor)


@pytest.mark.parametrize("weighted", [False, True], ids=["magnitude", "weighted"])
@every_pattern_and_layout
def test_advance_mask_has_the_bits_of_eager(pattern: Pattern, layout: Layout, weighted: bool) -> None:
    draw = Source(2)
    for weight, _ in chosen(pattern, layout)[::3]:
        w, dim = layout(tame() if weighted else draw, pattern.group, weight)
        mask = keep_mask(layout(draw, pattern.group, torch.float32)[0], pattern, dim)
        stored = torch.empty_like(w, dtype=torch.bool).copy_(mask)
        factor = factor_for(layout, draw, pattern.group) if weighted else None
        assert_same_advance("advance_mask", with_a_nan(w), stored, pattern, dim, factor)


@pytest.mark.parametrize("shape", ["last", "first", "middle", "one byte", "permuted"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packed_masks_have_the_bits_of_eager(pattern: Pattern, shape: str) -> None:
    draw, group = Source(3), pattern.group
    size, dim = {
        "last": ((3, group * 24), -1),
        "first": ((2 * group, 24), 0),
        "middle": ((2, group, 8), 1),
        "one byte": ((1, math.lcm(group, 8)), 1),
        "permuted": ((8, group), 1),
    }[shape]
    dtype = FLOATS[(group + len(shape)) % 3]
    w, old = with_a_nan(tame()(size, dtype)), draw(size, dtype)
    if shape == "permuted":
        w, old, dim = w.t(), old.t(), 0
    stored = pack(keep_mask(old, pattern, dim).contiguous())
    assert_same_advance("advance_mask", w, stored, pattern, dim, None)
    if shape == "last":
        assert_same_advance("advance_mask", w, stored, pattern, dim, draw(size, torch.float32).abs().nan_to_num(1.0))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.sampled_from(PAIRS),
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 2), Pattern(2, 3), Pattern(3, 5)]),
    groups=st.integers(1, 50),
    scale=st.sampled_from([1.0, 0.5, 0.123]),
    stochastic=st.booleans(),
)
def test_advance_has_the_bits_of_eager_on_awkward_values(
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    pattern: Pattern,
    groups: int,
    scale: float,
    stochastic: bool,
) -> None:
    draw = Source(seed, infinities=False, nans=False)
    w = with_a_nan(Source(seed, nans=False)((groups, pattern.group), dtypes[0]))
    v = draw(w.shape, dtypes[1])
    for with_dual in (True, False, True):
        assert_same_advance("advance", w, v, pattern, 1, with_dual, scale, seed if stochastic else None)
        w = torch.where(torch.rand(w.shape, device=DEVICE) < 0.5, w, draw(w.shape, dtypes[0]))


@pytest.mark.parametrize("name", ["advance", "advance_hidden", "advance_mask"])
def test_updates_without_a_kernel_go_to_eager(launches: list[Any], name: str) -> None:
    draw = Source(infinities=False, nans=False)

    def check(w: Tensor, v: Tensor, pattern: Pattern, dim: int = -1, factor: Tensor | None = None) -> None:
        state = v if name == "advance" else eager.hide(v, keep_mask(v, pattern, dim), v.dtype)
        if name == "advance_mask":
            state = torch.empty_like(v, dtype=torch.bool).copy_(keep_mask(v, pattern, dim))
        assert_same_advance(name, w, state, pattern, dim, *((True, 0.5) if name == "advance" else (factor,)))
        assert not launches

    for group in (1, 33, 64):
        check(draw((2, 2 * group), torch.float32), draw((2, 2 * group), torch.float32), Pattern(1, group))
    check(draw((2, 8), torch.float64), draw((2, 8), torch.float64), QUICK)
    check(draw((0, 8), torch.float32), draw((0, 8), torch.float32), QUICK)
    check(draw((4, 8), torch.float32), draw((8, 4), torch.float32).t(), QUICK)
    check(with_gaps(draw((4, 8), torch.float32)), with_gaps(draw((4, 8), torch.float32)), QUICK)
    if name != "advance":
        check(*(draw((4, 8), torch.float32) for _ in range(2)), QUICK, factor=draw((1, 8), torch.float32).abs())
        check(*(draw((4, 8), torch.float32) for _ in range(2)), QUICK, factor=draw((8, 4), torch.float32).abs().t())


@pytest.mark.parametrize("name", ["advance", "advance_hidden", "advance_mask"])
def test_errors_are_those_of_eager(name: str) -> None:
    w = torch.randn(2, 6, device=DEVICE)
    state = w > 0 if name == "advance_mask" else w.clone()
    arguments = (True, 1.0) if name == "advance" else (None,)
    with pytest.raises(ValueError, match="no multiple of group"):
        getattr(fused, name)(w, state, QUICK, 1, *arguments)
    with pytest.raises(IndexError):
        getattr(fused, name)(w, state, QUICK, 2, *arguments)


# ---------------------------------------------------------------- launches


def call_everything(ws: list[Tensor], pattern: Pattern = QUICK, state: torch.dtype | None = None) -> None:
    """All that a training of either kind of form launches."""
    gs, masks = [torch.ones_like(w) for w in ws], [keep_mask(w, pattern) for w in ws]
    if state in (None, torch.uint8):
        for stored in ([pack(mask) for mask in masks], masks):
            fused.shrink(ws, stored, 1.5)
            fused.restore(ws, stored, 1.5)
            fused.keep_only(ws, stored)
            if state is not None:
                return
    vs = [eager.hide(w, mask, state or torch.float32) for w, mask in zip(ws, masks, strict=True)]
    fused.reveal(ws, vs)
    fused.conceal(ws, vs, 0.25)
    fused.add_penalty(gs, ws, vs, 0.5)
    fused.pull(ws, vs, 0.75)
    fused.keep_only(ws, masks)


def test_launches_do_not_grow_with_the_weights(launches: list[Any]) -> None:
    draw = Source(nans=False)
    call_everything([draw((3, 32), torch.bfloat16)])
    few = len(launches)
    call_everything([draw((index % 3 + 1, 32), torch.bfloat16) for index in range(5)])
    assert len(launches) == 2 * few
    call_everything([draw((1, 32), FLOATS[index % 3]) for index in range(6)])
    assert len(launches) == 2 * few + 3 * few


@pytest.mark.parametrize("state", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_is_left_to_compile_after_preparing(
    launches: list[tuple[Any, ...]], dtype: torch.dtype, state: torch.dtype
) -> None:
    draw, pattern = Source(), Pattern(1, 3)
    w = draw((3, 48), dtype)
    fused._warm.cache_clear()
    fused.prepare(w, state, pattern)
    compiled = set(launches)
    launches.clear()
    fused.prepare(w.clone(), state, pattern)
    assert not launches
    call_everything([w, draw((5, 96), dtype)], pattern, state)
    for factor in (None, torch.ones_like(w, dtype=torch.float32)):
        if state == torch.uint8:
            fused.advance_mask(w, pack(keep_mask(w, pattern)), pattern, -1, factor)
        else:
            fused.advance_hidden(w, torch.zeros_like(w, dtype=state), pattern, -1, factor)
    if state != torch.uint8:
        fused.advance(w, torch.zeros_like(w, dtype=state), pattern, -1, True, 0.5)
        fused.advance(w, torch.zeros_like(w, dtype=state), pattern, -1, False, 1.0, 77)
    assert launches
    assert set(launches) <= compiled


def test_preparing_what_has_no_kernel_does_nothing(launches: list[Any]) -> None:
    fused.prepare(torch.zeros(2, 8, dtype=torch.float64, device=DEVICE), torch.float64, QUICK)
    fused.prepare(torch.zeros(2, 8, device="meta"), torch.float32, QUICK)
    fused.prepare(torch.zeros(2, 64, device=DEVICE), torch.float32, Pattern(2, 64))
    assert not [name for name, *_ in launches if name.startswith("advance")]


def test_table_is_built_once_and_again_when_a_tensor_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    new_plan = fused._new_plan
    monkeypatch.setattr(fused, "_new_plan", lambda items: built.append(len(items)) or new_plan(items))
    draw = Source()
    ws, masks = [draw((3, 8), torch.float32) for _ in range(3)], [draw((3, 8), torch.float32) > 0 for _ in range(3)]
    for _ in range(3):
        assert_same_in_place(ws, masks)
    assert built == [3]
    hold = ws[1]
    ws[1] = draw((3, 8), torch.float32)
    assert_same_in_place(ws, masks)
    assert built == [3, 3]
    ws[1] = hold.view(torch.bfloat16)[:, :8]  # the same memory, read as something else
    ws[2] = ws[2].view(8, 3).t()
    assert_same_in_place(ws, masks)
    assert built == [3, 3, 3]


def assert_same_in_place(ws: list[Tensor], masks: list[Tensor]) -> None:
    expected = [twin(w) for w in ws]
    eager.shrink(expected, masks, 1.5)
    fused.shrink(ws, masks, 1.5)
    assert all(map(alike, ws, expected))


def test_tables_that_are_kept_are_few() -> None:
    many = [torch.ones(8, device=DEVICE) for _ in range(fused._PLANS + 5)]
    for w in many:
        fused.keep_only([w], [w > 0])
    assert len(fused._plans) == fused._PLANS


def test_autograd_sees_that_a_weight_has_changed() -> None:
    w = torch.ones(2, 8, device=DEVICE, requires_grad=True)
    loss = (w * w).sum()
    fused.keep_only([w.detach()], [w > 0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_kernels_compile_to_plain_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are checked by the compiler alone, and contracted or flushed operations would round otherwise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    module, tl = load_kernels("compiled_kernels"), triton.language
    assert not module.INTERPRETED
    table = {"table": "*i64", "count": "i32"}
    dealt = {"groups": "i64", "inner": "i64", "tiles": "i64"}
    lists = {"aligned": True, "size": module.BLOCK}
    groups = {"keep": 2, "group": 4, "width": 4, "rows": module.TILE // 4}
    half, single, byte = tl.bfloat16, tl.float32, tl.uint8
    pointers = {"w_at": "*bf16", "factor": "*fp32", "figures": "*fp32"}
    update = {"with_dual": "i32", "minus_scale": "fp32", "seed": "i32"}
    cases: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("add_penalty", {**table, "rho": "fp32"}, {"g_type": half, "w_type": half, "v_type": single, **lists}),
        ("pull", {**table, "fraction": "fp32", "rest": "fp32"}, {"w_type": half, "v_type": single, **lists}),
        ("reveal", table, {"w_type": half, "h_type": tl.float16, **lists}),
        ("conceal", {**table, "rest": "fp32"}, {"w_type": half, "h_type": half, **lists}),
        ("scale", {**table, "divisor": "fp32"}, {"w_type": half, "mask_type": byte, "shrink": True, **lists}),
        ("keep_only", table, {"t_type": half, "mask_type": tl.int8, **lists}),
    ]
    for step in (0, 4):
        here = {**groups, "step": step}
        cases += [
            ("advance", {**pointers, "v_at": "*bf16", **dealt, **update}, {"stochastic": step == 0, **here}),
            ("advance_hidden", {**pointers, "h_at": "*fp32", **dealt}, {"weighted": True, **here}),
            ("advance_mask", {**pointers, "mask_at": "*u8", **dealt}, {"weighted": step == 0, "packed": True, **here}),
        ]
    for name, signature, constants in cases:
        kernel = getattr(module, name)
        ordered = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
        places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        aligned = {
            (index,): [["tt.divisibility", 16]] for index, kind in enumerate(ordered.values()) if kind.startswith("*")
        }
        source = ASTSource(fn=kernel, signature=ordered, constexprs=places, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=dict(fused._OPTIONS))
        text = compiled.asm["ptx"]
        assert "fma." not in text, name
        assert ".ftz" not in text, name
        assert "div.full" not in text, name
        assert "div.approx" not in text, name
        # Wide weights are loaded sixteen bytes at a time, or eight where a group has no more.
        assert "ld.global.v4.b32" in text or "ld.global.v2.b32" in text, name


# ---------------------------------------------------------------- what is missing


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else capability)
    monkeypatch.setattr(torch.version, "hip", None)


def test_missing_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fused.missing() == "torch sees no CUDA or ROCm device"


def test_device_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (7, 5))
    assert fused.missing() == "a device has compute capability 7.5; the kernels need 8.0 (Ampere) or above"


def test_triton_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = fused.missing()
    assert reason is not None
    assert reason.startswith("Triton does not run here (ModuleNotFoundError: ")


def test_triton_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(triton, "__version__", "3.5.1+git123")
    assert fused.missing() == "Triton 3.5.1+git123 is too old; the kernels need 3.6 or above"


def test_triton_that_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)

    def broken() -> ModuleType:
        raise OSError("no compiler")

    monkeypatch.setattr(fused, "_kernels", broken)
    assert fused.missing() == "Triton does not run here (OSError: no compiler)"


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are not interpreted")
def test_interpreter_is_not_taken_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert fused.missing() == "Triton is in interpreter mode (TRITON_INTERPRET)"


@needs_cuda
def test_nothing_is_missing_on_a_device() -> None:
    assert fused.missing() is None


# ---------------------------------------------------------------- on a device


def large(count: int = 3) -> tuple[list[Tensor], ...]:
    """Weights, states, packed masks and gradients of a few million entries each."""
    ws = [torch.randn(1024, 1024 + 512 * index, device="cuda").bfloat16() for index in range(count)]
    vs = [torch.randn_like(w, dtype=torch.float32) for w in ws]
    return ws, vs, [pack(keep_mask(w, QUICK)) for w in ws], [torch.randn_like(w) for w in ws]


def train_once(ws: list[Tensor], vs: list[Tensor], masks: list[Tensor], gs: list[Tensor]) -> list[Tensor]:
    """Everything once, on the fused backend."""
    fused.add_penalty(gs, ws, vs, 0.1)
    fused.pull(ws, vs, 0.2)
    fused.reveal(ws, vs)
    fused.conceal(ws, vs, 0.3)
    fused.shrink(ws, masks, 1.5)
    fused.restore(ws, masks, 1.5)
    fused.keep_only(gs, masks)
    figures = [fused.advance(w, v, QUICK, -1, True, 0.9) for w, v in zip(ws, vs, strict=True)]
    figures += [fused.advance_hidden(w, v, QUICK, -1, None) for w, v in zip(ws, vs, strict=True)]
    return figures + [fused.advance_mask(w, m, QUICK, -1, None) for w, m in zip(ws, masks, strict=True)]


@needs_cuda
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_bits_of_eager_at_large_size(dtypes: tuple[torch.dtype, torch.dtype], pattern: Pattern, dim: int) -> None:
    side = 32 * pattern.group
    w, v = (torch.randn(side, side, device="cuda").to(dtype) for dtype in dtypes)
    assert_same_advance("advance", w, v.clone(), pattern, dim, True, 0.7, 99)
    h = eager.hide(v, keep_mask(v, pattern, dim), dtypes[1])
    factor = torch.rand(side, side, device="cuda")
    assert_same_as_eager("conceal", ([w], [h]), 0.3)
    assert_same_as_eager("reveal", ([w], [h]))
    assert_same_advance("advance_hidden", w, h, pattern, dim, factor)
    for stored in (keep_mask(v, pattern, dim), pack(keep_mask(v, pattern, dim))):
        for name, arguments in (("shrink", (1.37,)), ("restore", (1.37,)), ("keep_only", ())):
            assert_same_as_eager(name, ([w], [stored]), *arguments)
        assert_same_advance("advance_mask", w, stored, pattern, dim, factor)


@needs_cuda
def test_nothing_waits_for_the_device() -> None:
    tensors = large()
    train_once(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_once(*tensors)
        fused.keep_only(*(list(reversed(tensors[index])) for index in (0, 2)))  # with a table that is new
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_memory_does_not_grow_with_the_weights() -> None:
    tensors = large()
    train_once(*tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_once(*tensors)
    assert torch.cuda.max_memory_allocated() - before < 2**20


@needs_cuda
def test_graph_has_the_bits_of_the_calls() -> None:
    tensors = large()
    start = [[t.clone() for t in row] for row in tensors]

    def reset() -> None:
        for row, old in zip(tensors, start, strict=True):
            for t, before in zip(row, old, strict=True):
                t.copy_(before)

    figures = train_once(*tensors)
    expected = [[t.clone() for t in row] for row in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train_once(*tensors)
    for w in [torch.ones(8, device="cuda") for _ in range(2 * fused._PLANS)]:
        fused.keep_only([w], [w > 0])  # the tables of the graph must outlive the cache
    for _ in range(2):
        reset()
        graph.replay()
        for row, theirs in zip(tensors, expected, strict=True):
            assert all(map(same, row, theirs))
        assert all(map(same_bits, captured, figures))
    fused._captured.clear()


@needs_cuda
def test_table_of_another_stream_is_waited_for() -> None:
    ws = [torch.randn(1024, 1024, device="cuda") for _ in range(3)]
    masks = [w > 0 for w in ws]
    expected = [torch.where(mask, w, 0.0) for w, mask in zip(ws, masks, strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        fused.keep_only(ws, masks)
    fused.keep_only(ws, masks)
    torch.cuda.synchronize()
    assert all(map(same_bits, ws, expected))


@needs_cuda
def test_places_beyond_32_bits() -> None:
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip("needs 10 GB on the device")
    w = torch.ones(count // 64, 64, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(count // 64, 8, dtype=torch.uint8, device="cuda")
    figures = fused.advance_mask(w, mask, QUICK, -1, None)
    assert figures.tolist() == [count / 2, count, count / 2, count / 2]
    assert bool((mask == 0b00110011).all())
    fused.keep_only([w], [mask])
    assert w[-1].tolist() == [1.0, 1.0, 0.0, 0.0] * 16
    assert float(w.sum(dtype=torch.float64)) == count / 2
