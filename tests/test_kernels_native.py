"""The native backend against the eager one: shapes, strides, blocks and threads; how it is built, and what if not."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import admm_nxm
from admm_nxm import ADMMNxM, Pattern, keep_mask, kernels
from admm_nxm.factors import Root
from admm_nxm.kernels import _build, available, backend_for, eager, native
from admm_nxm.masks import PACKED, stored_as
from tests.helpers import make_net, same_bits
from tests.test_kernels import alike, awkward

needs_compiler = pytest.mark.skipif(native.missing() is not None, reason="no C compiler")
CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# Groups in the lanes of a vector, groups ranked in columns, and groups ranked by their bits.
GROUPED = [
    (Pattern(2, 4), F32, F32),
    (Pattern(2, 4), BF16, BF16),
    (Pattern(2, 4), F32, BF16),
    (Pattern(1, 2), F32, F32),
    (Pattern(9, 16), F32, F32),
    (Pattern(3, 5), F32, F32),
    (Pattern(5, 32), F16, F32),
    (Pattern(7, 48), F32, F32),
    (Pattern(3, 300), BF16, F32),
    (Pattern(4, 4), F32, F32),
]


def layouts(group: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shape and grouped dimension: innermost, outermost, in the middle; of several blocks and of less than a chunk."""
    yield (3, 8 * group), 1
    yield (7, 40 * group + group * (8 // math.gcd(8, group))), 1
    yield (2 * group, 24), 0
    yield (3, group, 5, 8), 1
    yield (group,), 0
    yield (1, group, 1), 1
    if group <= 16:
        yield (5, 4096 * group), 1
        yield (2 * group, 5000), 0


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, wild: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = awkward(generator, math.prod(shape), dtype, infinities=wild, nans=wild).view(shape)
    w[w.isnan()] = float("nan")
    return w


def assert_same_figures(mine: Tensor, theirs: Tensor, exactly_known: bool) -> None:
    assert torch.equal(mine[2:], theirs[2:])
    if exactly_known:
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize("wild", [False, True], ids=["tame", "wild"])
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}".replace("torch.", ""))
def test_updates_have_the_bits_of_the_eager_backend(case: tuple[Pattern, torch.dtype, torch.dtype], wild: bool) -> None:
    pattern, dtype, state_dtype = case
    for seed, (shape, dim) in enumerate(layouts(pattern.group)):
        w, v = draw(shape, dtype, seed, wild), draw(shape, state_dtype, seed + 50, wild)
        for with_dual, scale in ((True, 1.0), (True, 0.7), (False, 1.0)):
            mine, theirs = v.clone(), v.clone()
            figures = native.advance(w, mine, pattern, dim, with_dual, scale)
            expected = eager.advance(w, theirs, pattern, dim, with_dual, scale)
            assert alike(mine, theirs), (shape, dim)
            assert_same_figures(figures, expected, not wild)
        hidden = eager.hide(v.to(dtype), keep_mask(v, pattern, dim), state_dtype)
        for factor in (None, draw(shape, F32, seed + 99).abs()):
            mine, theirs = hidden.clone(), hidden.clone()
            figures = native.advance_hidden(w, mine, pattern, dim, factor)
            expected = eager.advance_hidden(w, theirs, pattern, dim, factor)
            assert alike(mine, theirs), (shape, dim)
            assert_same_figures(figures, expected, not wild)
            for layout in (PACKED, torch.bool) if shape[-1] % 8 == 0 else (torch.bool,):
                mine = stored_as(keep_mask(v, pattern, dim), layout)
                theirs = mine.clone()
                figures = native.advance_mask(w, mine, pattern, dim, factor)
                expected = eager.advance_mask(w, theirs, pattern, dim, factor)
                assert torch.equal(mine, theirs), (shape, dim)
                assert_same_figures(figures, expected, not wild)


SIZES = [0, 8, 1024, 65536, 65544, 200_000]


@needs_compiler
def test_passes_over_many_weights_at_once_have_the_bits_of_the_eager_backend() -> None:
    """Several sizes, dtypes and layouts of masks in one call, blocks and threads that end within a weight."""
    pairs = [(F32, F32), (BF16, BF16), (F32, BF16), (F16, F16), (torch.float64, F32)]
    for wild in (False, True):
        weights = [draw((n,), dtype, n, wild) for n in SIZES for dtype, _ in pairs]
        others = [draw((n,), dtype, n + 1, wild) for n in SIZES for _, dtype in pairs]
        kept = [keep_mask(w, Pattern(2, 4)) for w in weights]
        masks = [stored_as(mask, PACKED if i % 2 else torch.bool) for i, mask in enumerate(kept)]
        hidden = [eager.hide(v.to(w.dtype), m, v.dtype) for v, w, m in zip(others, weights, kept, strict=True)]

        def both(name: str, changed: list[list[Tensor]], *rest: Any, read: int = 0) -> None:
            """The first ``read`` lists are changed; all must come out alike."""
            mine, theirs = ([[t.clone() for t in ts] for ts in changed] for _ in range(2))
            getattr(native, name)(*mine, *rest)
            getattr(eager, name)(*theirs, *rest)
            for a, b in zip(mine, theirs, strict=True):
                assert all(map(alike, a, b)), name

        both("shrink", [weights], masks, 3.7)
        both("restore", [weights], masks, 3.7)
        both("keep_only", [weights], masks)
        both("reveal", [weights, hidden])
        for fraction in (0.0, 0.3, 1.0):
            both("conceal", [weights, hidden], fraction)


@needs_compiler
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_pull_and_penalty_are_close_to_those_of_the_eager_backend(fraction: float) -> None:
    for dtype, state_dtype in ((F32, F32), (BF16, BF16), (F32, BF16)):
        w, v, g = (torch.randn(100_001) for _ in range(3))
        w, v, g = w.to(dtype), v.to(state_dtype), g.to(dtype)
        mine, theirs = w.clone(), w.clone()
        native.pull([mine], [v], fraction)
        eager.pull([theirs], [v], fraction)
        torch.testing.assert_close(mine, theirs, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        if fraction in (0.0, 1.0):
            assert torch.equal(mine, [w, v.to(dtype)][int(fraction)])
        mine, theirs = g.clone(), g.clone()
        native.add_penalty([mine], [w], [v], fraction)
        eager.add_penalty([theirs], [w], [v], fraction)
        torch.testing.assert_close(mine, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def views(t: Tensor) -> Iterator[Tensor]:
    """The same values with other strides: transposed memory, gaps, repeats, a slice of something larger."""
    yield t.t().contiguous().t()
    yield torch.stack([t, -t], -1)[..., 0]
    yield torch.cat([t, t], 1)[:, : t.shape[1]]
    yield torch.cat([t, t], 0)[: t.shape[0]]


@needs_compiler
@pytest.mark.parametrize("dim", [0, 1])
def test_strides_of_any_kind_give_the_same_bits_without_a_copy(dim: int) -> None:
    pattern = Pattern(2, 4)
    w, v = draw((16, 24), F32, 1), draw((16, 24), F32, 2)
    expected = v.clone()
    eager.advance(w, expected, pattern, dim, True, 0.7)
    mask = stored_as(keep_mask(v, pattern, dim), PACKED)
    new_mask = mask.clone()
    eager.advance_mask(w, new_mask, pattern, dim, None)
    shrunk = w.clone()
    eager.shrink([shrunk], [mask], 3.0)
    for held in views(w):
        for state in (*views(v), v.clone()):
            place = state.data_ptr()
            native.advance(held, state, pattern, dim, True, 0.7)
            assert same_bits(state.contiguous(), expected)
            assert state.data_ptr() == place
            state.copy_(v)
        packed = mask.clone()
        native.advance_mask(held, packed, pattern, dim, None)
        assert torch.equal(packed, new_mask)
        native.shrink([held], [mask], 3.0)
        assert same_bits(held.contiguous(), shrunk)


@needs_compiler
def test_figures_and_states_do_not_depend_on_the_number_of_threads() -> None:
    pattern, w = Pattern(2, 4), torch.randn(1000, 1024)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            v = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(1))
            figures = native.advance(w, v, pattern, 1, True, 1.0)
            mask = stored_as(keep_mask(v, pattern), PACKED)
            moved = w.clone()
            native.shrink([moved, v], [mask, mask], 1.7)
            results.append((figures, v, moved))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


@needs_compiler
def test_sums_over_large_weights_are_as_exact_as_float32_can_hold() -> None:
    w = torch.full((512, 4096), 1e-2)
    v = torch.zeros_like(w)
    figures = native.advance(w, v, Pattern(2, 4), 1, False, 1.0)
    norm = w.double().square().sum().item()
    assert figures.tolist() == pytest.approx([norm / 2, norm, 0, w.numel() / 2], rel=5e-6)


@needs_compiler
def test_stride_of_a_dimension_of_one_entry_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.empty_strided((1, 16), (999, 1)).copy_(torch.randn(1, 16))
    w = torch.randn(1, 16)
    monkeypatch.delattr(eager, "reveal")
    native.reveal([w], [h])
    assert torch.equal(w, h)


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("backend", [eager, pytest.param(native, marks=needs_compiler)], ids=["eager", "native"])
def test_root_ranks_as_its_values_do(backend: Any, dtype: torch.dtype, exponent: float) -> None:
    """Whole chunks and less, along either dimension, in one block and several; zeros, infinities and NaNs included."""
    for pattern, shape, dim in (
        (Pattern(2, 4), (3, 2048), 1),
        (Pattern(2, 4), (200, 1000), 1),
        (Pattern(3, 5), (40, 40), 1),
        (Pattern(2, 4), (64, 24), 0),
    ):
        w = draw(shape, F32, 5)
        h = draw(shape, dtype, 6, wild=True).square()
        root = Root(h, exponent)
        expected = h.float().clamp_min(1e-20)
        expected = expected.sqrt().sqrt() if exponent == 0.25 else expected**exponent
        kept = keep_mask(w * expected, pattern, dim)
        old = keep_mask(w, pattern, dim)
        before = h.clone()
        mask = stored_as(old, PACKED)
        figures = backend.advance_mask(w, mask, pattern, dim, root)
        assert torch.equal(mask, stored_as(kept, PACKED))
        assert figures[2:].tolist() == [int((kept & ~old).sum()), int(kept.sum())]
        hidden = eager.hide(w, old, F32)
        backend.advance_hidden(w, hidden, pattern, dim, root)
        assert torch.equal(eager.hidden_mask(hidden), kept)
        assert alike(h, before)


# ---------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("backend", [eager, pytest.param(native, marks=needs_compiler)], ids=["eager", "native"])
@pytest.mark.parametrize("dim", [0, 1])
def test_seeded_update_rounds_at_random_by_the_hash_of_the_place(backend: Any, dim: int) -> None:
    pattern, w = Pattern(2, 4), draw((16, 40), F32, 3, wild=True)
    v = draw((16, 40), BF16, 4)
    kept = keep_mask(v, pattern, dim)
    a = w + torch.where(kept, torch.zeros(()), -v.float())
    rounded = a.bfloat16().flatten()
    for i, value in enumerate(a.flatten().tolist()):
        h = (i * 0x9E3779B1 + 77) % 2**32
        h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
        h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
        h ^= h >> 16
        if math.isfinite(value):
            bits = ctypes.c_uint32.from_buffer_copy(ctypes.c_float(value)).value
            up = ctypes.c_uint32(bits + h % 2**16 & 0xFFFF0000)
            rounded[i] = ctypes.c_float.from_buffer_copy(up).value
    rounded = rounded.view(16, 40)
    mask = keep_mask(rounded, pattern, dim)
    backend.advance(w, v, pattern, dim, True, 1.0, seed=77)
    assert alike(v, torch.where(mask, rounded, -rounded))


def test_stochastic_rounding_is_right_on_average_and_exact_where_nothing_is_lost() -> None:
    a = torch.tensor([1.0 + 2**-9, 1.0 + 3 * 2**-10, -3.0 - 2**-8, 1.5, -0.0, 1e-40, 65280.0])
    rounded = torch.stack([eager.round_stochastically(a, BF16, seed).double() for seed in range(4000)])
    for column, value in zip(rounded.unbind(1), a.double(), strict=True):
        spread = column.std().item() / 4000**0.5
        assert abs(column.mean() - value) <= 5 * spread + 1e-12
    exact = rounded[:, 3:5]
    assert torch.equal(exact, a[3:5].double().expand_as(exact))
    assert len(rounded[:, 0].unique()) == 2


# ---------------------------------------------------------------- choosing


def test_fastest_backend_that_works_is_the_default() -> None:
    expected = ["native", "eager"] if native.missing() is None else ["eager"]
    assert available(CPU) == expected
    assert backend_for(CPU) is (native if native.missing() is None else eager)
    assert backend_for(torch.device("meta")) is eager
    assert backend_for(CPU, "eager") is eager


def test_backend_for_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"\"triton\" has no kernels for device 'cpu'.*\"eager\", \"native\""):
        backend_for(CPU, "triton")
    with pytest.raises(RuntimeError, match=r"\"native\" has no kernels for device 'meta'; what it has are \"eager\""):
        backend_for(torch.device("meta"), "native")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (_build.compiler, kernels._choose, native._trial)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_eager_backend_does_it() -> None:
    assert available(CPU) == ["eager"]
    assert backend_for(CPU) is eager
    with pytest.raises(RuntimeError, match=r'backend="native" does not work here: there is no C compiler.*leave back'):
        backend_for(CPU, "native")
    net = make_net()
    with pytest.raises(RuntimeError, match="no C compiler"):
        ADMMNxM(torch.optim.SGD(net.parameters(), lr=0.1), net, backend="native")


@pytest.mark.usefixtures("no_compiler")
def test_compiler_that_fails_is_told_of_and_the_eager_backend_does_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("ADMM_NXM_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match=r"could not be built.*eager.*this compiler is broken"):
        assert backend_for(CPU) is eager
    with pytest.raises(RuntimeError, match="this compiler is broken"):
        backend_for(CPU, "native")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
@pytest.mark.parametrize(("chosen", "other"), [("eager", native), ("native", eager)])
def test_optimizer_uses_the_backend_that_it_was_told_to_use(
    chosen: Literal["eager", "native"], other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each backend has moved the mask when its advance_mask was called, and the other one was not asked to."""
    called = []
    wanted = {"eager": eager, "native": native}[chosen]
    moves = wanted.advance_mask
    monkeypatch.setattr(wanted, "advance_mask", lambda *args: called.append(chosen) or moves(*args))
    monkeypatch.setattr(other, "advance_mask", lambda *args: pytest.fail(f"asked for {chosen}"))
    net = make_net()
    optimizer = ADMMNxM(torch.optim.SGD(net.parameters(), lr=1e-3), net, total_steps=20, backend=chosen)
    for _ in range(20):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert called
    assert optimizer.finalize().ok


# ---------------------------------------------------------------- building

SOURCE = "int answer(void) { return ANSWER; }\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


@needs_compiler
def test_library_is_compiled_once_and_again_when_anything_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("ADMM_NXM_CACHE", str(cache))
    assert _build.load(source, ["ANSWER=42"]).answer() == 42
    (first,) = cache.iterdir()
    written = first.stat().st_mtime_ns
    assert _build.load(source, ["ANSWER=42"]).answer() == 42
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]
    assert _build.load(source, ["ANSWER=43"]).answer() == 43
    source.write_text(SOURCE + "/* changed */\n")
    assert _build.load(source, ["ANSWER=42"]).answer() == 42
    assert len(list(cache.iterdir())) == 3
    assert cache.stat().st_mode & 0o077 == 0


@needs_compiler
def test_home_that_cannot_be_written_to_costs_a_compilation_a_process(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADMM_NXM_CACHE", str(tmp_path / "file" / "cache"))
    assert _build.load(source, ["ANSWER=42"]).answer() == 42


@needs_compiler
def test_damaged_library_and_broken_source_are_told_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("ADMM_NXM_CACHE", str(cache))
    _build.load(source, ["ANSWER=1"])
    (library,) = cache.iterdir()
    damaged = library.with_name("damaged.so")
    damaged.write_bytes(library.read_bytes()[:100])
    os.replace(damaged, library)  # a loaded library is known by its file: this is another one
    imports = "import sys; from pathlib import Path; from admm_nxm.kernels import _build"
    script = f"{imports}; _build.load(Path(sys.argv[1]), ['ANSWER=1'])"
    done = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True, check=False)
    assert "cannot be loaded" in done.stderr
    assert "delete it" in done.stderr
    source.write_text("this is no C\n")
    with pytest.raises(_build.CompileError, match=r"answer\.c.*failed: .*error"):
        _build.load(source, ["ANSWER=1"])
    assert len(list(cache.iterdir())) == 1


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMM_NXM_CACHE", "/somewhere")
    assert _build.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("ADMM_NXM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert _build.cache_folder() == Path("/cache/admm_nxm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _build.cache_folder() == Path("/home/someone/.cache/admm_nxm")


@needs_compiler
def test_optimizer_compiles_what_it_needs_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to compile in the training loop."""
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-3), net, pattern="3:8", total_steps=20)

    def refuse(*args: object) -> None:
        raise AssertionError(f"compiled in the training loop: {args}")

    monkeypatch.setattr(native, "load", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", admm_nxm.ConvergenceWarning)
        for _ in range(20):
            net(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.finalize().ok


@pytest.mark.parametrize("penalty", ["proximal", "gradient"])
def test_stochastic_rounding_of_weights_that_need_none_is_refused(penalty: Any) -> None:
    net = make_net(dtype=BF16)
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"rounds what is float32, and the prunable weights are torch\.bfloat16"):
        ADMMNxM(inner, net, penalty=penalty, state_dtype=BF16, state_rounding="stochastic")


def test_random_bits_differ_between_weights_and_steps_and_are_the_same_in_a_run_again() -> None:
    def states(name: str) -> list[Tensor]:
        net = torch.nn.Module()
        net.add_module(name, torch.nn.Linear(64, 64, bias=False))
        with torch.no_grad():
            next(net.parameters()).fill_(1.0 + 2**-9)
        inner = torch.optim.SGD(net.parameters(), lr=0.0)
        options: dict[str, Any] = {"state_dtype": BF16, "state_rounding": "stochastic", "penalty": "proximal"}
        optimizer = ADMMNxM(inner, net, select={".*": "4:4"}, rho=1e-30, update_every=1, **options)
        (p,) = net.parameters()
        seen = []
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
            seen.append(optimizer.state[p]["admm_consensus"].clone())
        return seen

    first, second, third = states("a")
    assert {x.unique().numel() for x in (first, second, third)} == {2}
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, states("b")[0])
    assert all(map(torch.equal, (first, second, third), states("a")))


@needs_compiler
def test_backward_through_a_weight_that_was_changed_since_is_an_error() -> None:
    """As after any in-place operation of torch: the gradient would be that of other weights."""
    w = torch.randn(8, 16, requires_grad=True)
    loss = (w * w).sum()
    native.shrink([w.detach()], [stored_as(keep_mask(w.detach(), Pattern(2, 4)), PACKED)], 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
