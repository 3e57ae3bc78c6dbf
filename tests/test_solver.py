"""The layer problem: against plain loops, against every mask there is, and at its limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from admm_nxm import solver
from admm_nxm.pattern import Pattern
from admm_nxm.projection import keep_mask, project
from admm_nxm.reference import solve_by_loops
from admm_nxm.solver import Factor, factorise, model_error, solve

PATTERNS = ("2:4", "1:4", "1:2", "3:4")
few = settings(max_examples=15)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(size: int, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """A second moment with correlations, and scales that differ by some powers of two."""
    mixing = torch.randn(size, size, generator=generator) / math.sqrt(size) + torch.eye(size)
    samples = torch.randn(rank or 2 * size, size, generator=generator) @ mixing
    samples *= torch.randn(size, generator=generator).exp()
    return samples.T @ samples


def problem(seed: int, rows: int = 6, columns: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = random(seed)
    return torch.randn(rows, columns, generator=generator), moment(columns, generator), moment(rows, generator)


def is_feasible(weight: Tensor, mask: Tensor, pattern: str) -> bool:
    p = Pattern.parse(pattern)
    kept = mask.unflatten(-1, (-1, p.group)).sum(-1)
    return bool((kept == p.keep).all() and (weight[~mask] == 0).all() and torch.isfinite(weight).all())


def refit_exactly(weight: Tensor, mask: Tensor, a: Factor, g: Factor) -> float:
    """The least loss on a mask in the damped metric, as a share of the loss at zero, by a dense solve in float64."""
    metric = torch.kron(matrix(g), matrix(a))
    w = (weight * a.scale * g.scale[:, None]).double().flatten()
    on = mask.flatten()
    x = torch.zeros_like(w)
    x[on] = torch.linalg.solve(metric[on][:, on], (metric @ w)[on])
    return float((x - w) @ metric @ (x - w) / (w @ metric @ w))


def matrix(factor: Factor) -> Tensor:
    return torch.eye(len(factor.scale)).double() if factor.matrix is None else factor.matrix.double()


def identity(size: int) -> Factor:
    return factorise(torch.eye(size), 0.1)


# Against plain loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_agrees_with_plain_loops(seed: int, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "_MORE_SCHEDULES", ())
    weight, a, g = problem(seed, rows=(2, 4, 6)[seed % 3], columns=8)
    options = {"input_damping": 0.01, "output_damping": 0.1, "rho": 0.01, "growth": 1.5, "rounds": 40}
    expected, mask, error, rounds = solve_by_loops(
        weight,
        Pattern.parse(pattern),
        a,
        g,
        **options,
        relaxation=solver._RELAXATION,
        telling=solver._TELLING,
    )
    found = solve(weight.double(), pattern, a.double(), g.double(), settled=0.0, tolerance=1e-12, **options)
    assert found.mask.tolist() == mask
    assert found.rounds == rounds
    assert found.error == pytest.approx(error, abs=1e-5, rel=1e-5)
    torch.testing.assert_close(found.weight, torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert solve(weight, pattern, a, g, tolerance=1e-6).error == pytest.approx(error, rel=1e-2, abs=1e-5)


def test_near_the_best_of_all_masks() -> None:
    """Every 2:4 mask of a 2 x 8 weight, 1,296 of them, each with its exact optimum."""
    choices = [[k in pair for k in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = torch.tensor(
        [[kept for group in groups for kept in group] for groups in itertools.product(choices, repeat=4)]
    )
    on = masks.nonzero()[:, 1].view(len(masks), 8)
    ratios = []
    for seed in range(30):
        weight, a, g = problem(seed, rows=2, columns=8)
        fa, fg = factorise(a, 0.01), factorise(g, 0.1)
        metric = torch.kron(matrix(fg), matrix(fa))
        w = (weight * fa.scale * fg.scale[:, None]).double().flatten()
        pull = metric @ w
        x = torch.linalg.solve(metric[on[:, :, None], on[:, None, :]], pull[on])
        best = 1.0 - float((x * pull[on]).sum(1).max() / (w @ pull))
        ratios.append(solve(weight, "2:4", fa, fg).error / best)
    assert min(ratios) > 0.99
    assert torch.tensor(ratios).median() <= 1.05
    assert max(ratios) <= 1.5


# Properties ---------------------------------------------------------------------------------------------------------


@few
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(PATTERNS), outputs=st.booleans(), rows=st.integers(1, 9))
def test_feasible_and_never_worse_than_magnitude_refitted(seed: int, pattern: str, outputs: bool, rows: int) -> None:
    weight, a, g = problem(seed, rows)
    fa, fg = factorise(a, 0.01), factorise(g, 0.1) if outputs else identity(rows)
    found = solve(weight, pattern, fa, fg if outputs else None)
    assert is_feasible(found.weight, found.mask, pattern)
    for score in (weight, weight * fa.scale):
        assert found.error <= refit_exactly(weight, keep_mask(score, pattern), fa, fg) * 1.005 + 1e-6
    # What is reported is what was returned, and least squares on the mask has converged.
    best = refit_exactly(weight, found.mask, fa, fg)
    assert best * 0.999 - 1e-6 <= found.error <= best * 1.01 + 1e-6
    scaled, dense = (w.double() * fa.scale * fg.scale[:, None] for w in (found.weight - weight, weight))
    measured = model_error(dense, dense + scaled, matrix(fa), matrix(fg))
    assert found.error == pytest.approx(measured, rel=1e-3, abs=1e-6)


@few
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(PATTERNS), size=st.sampled_from([1.0, 0.3, 1e20, 1e-20]))
def test_identity_is_the_projection(seed: int, pattern: str, size: float) -> None:
    weight = torch.randn(6, 16, generator=random(seed)).round(decimals=1)  # with ties
    expected = project(weight, pattern)
    for inputs in (None, size * torch.eye(16)):
        for outputs in (None, size * torch.eye(6)):
            found = solve(weight, pattern, inputs, outputs)
            assert torch.equal(found.weight, expected)
            assert torch.equal(found.mask, keep_mask(weight, pattern))
            assert found.error == pytest.approx(model_error(weight, expected, None), rel=1e-5)
    zero = solve(weight, pattern, torch.zeros(16, 16), torch.zeros(6, 6))
    assert torch.equal(zero.weight, expected)


@few
@given(seed=st.integers(0, 10**6), size=st.floats(1e-6, 1e6))
def test_outputs_of_one_size_are_no_outputs(seed: int, size: float) -> None:
    weight, a, _ = problem(seed)
    # To convergence: rows that are coupled stop together, and others each for itself.
    alone, both = (solve(weight, "2:4", a, g, tolerance=1e-7) for g in (None, size * torch.eye(6)))
    assert torch.equal(alone.mask, both.mask)
    torch.testing.assert_close(alone.weight, both.weight, rtol=1e-3, atol=1e-3)


@few
@given(seed=st.integers(0, 10**6), w=st.integers(-60, 60), a=st.integers(-60, 60), g=st.integers(-60, 60))
def test_powers_of_two_scale_the_result(seed: int, w: int, a: int, g: int) -> None:
    weight, inputs, outputs = problem(seed)
    for some in (None, outputs):
        plain = solve(weight, "2:4", inputs, some)
        scaled = solve(weight * 2.0**w, "2:4", inputs * 2.0**a, None if some is None else some * 2.0**g)
        assert torch.equal(scaled.weight, plain.weight * 2.0**w)
        assert torch.equal(scaled.mask, plain.mask)
        assert scaled.error == plain.error


@few
@given(seed=st.integers(0, 10**6))
def test_rows_permute_with_outputs(seed: int) -> None:
    weight, a, g = (t.double() for t in problem(seed))
    order = torch.randperm(6, generator=random(seed))
    plain, permuted = solve(weight, "2:4", a, g), solve(weight[order], "2:4", a, g[order][:, order])
    assert torch.equal(permuted.mask, plain.mask[order])
    torch.testing.assert_close(permuted.weight, plain.weight[order], rtol=1e-6, atol=1e-6)


@few
@given(seed=st.integers(0, 10**6), outputs=st.booleans())
def test_the_other_dimension_is_the_transpose(seed: int, outputs: bool) -> None:
    weight, a, g = problem(seed)
    plain, turned = (
        solve(weight, "2:4", a, g if outputs else None),
        solve(weight.T, "2:4", a, g if outputs else None, dim=0),
    )
    assert torch.equal(turned.weight, plain.weight.T)
    assert torch.equal(turned.mask, plain.mask.T)
    assert turned.error == plain.error
    measured = model_error(weight, plain.weight, a, g)
    assert model_error(weight.T, plain.weight.T, a, g, dim=0) == pytest.approx(measured)


@few
@given(
    seed=st.integers(0, 10**6),
    rank_a=st.integers(1, 3),
    rank_g=st.integers(1, 3),
    size=st.sampled_from([1.0, 1e-30, 1e30]),
    pattern=st.sampled_from(PATTERNS),
)
def test_singular_moments_dead_rows_and_any_size(
    seed: int, rank_a: int, rank_g: int, size: float, pattern: str
) -> None:
    generator = random(seed)
    weight = torch.randn(6, 16, generator=generator) * size
    a, g = moment(16, generator, rank_a), moment(6, generator, rank_g)
    a[:, :5] = a[:5] = 0.0
    g[:, 2] = g[2] = 0.0
    weight[3] = 0.0
    weight[:, 7] = 0.0
    for outputs in (None, g, g / size):
        for inputs in (None, a, a * size):
            found = solve(weight, pattern, inputs, outputs)
            assert is_feasible(found.weight, found.mask, pattern)
            assert 0.0 <= found.error <= 1.0
            assert math.isfinite(model_error(weight, found.weight, inputs, outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_weights(dtype: torch.dtype) -> None:
    weight, a, g = problem(3)
    weight = weight.to(dtype)
    found = solve(weight, "2:4", a, g)
    assert found.weight.dtype == dtype
    assert is_feasible(found.weight.float(), found.mask, "2:4")
    if dtype != torch.float64:  # solved in float32 and rounded once
        assert torch.equal(found.weight, solve(weight.float(), "2:4", a, g).weight.to(dtype))


def test_largest_finite_weights_stay_finite() -> None:
    weight, a, g = problem(4)
    weight = (weight / weight.abs().max() * torch.finfo(torch.float16).max).half()
    assert torch.isfinite(solve(weight, "1:4", a, g).weight).all()


@pytest.mark.parametrize("with_moments", [False, True])
def test_a_weight_that_fits_comes_back_as_it_was(with_moments: bool) -> None:
    weight, a, g = problem(5)
    moments = (a, g) if with_moments else (None, None)
    everything = solve(weight, "4:4", *moments)
    assert torch.equal(everything.weight, weight)
    assert bool(everything.mask.all())
    assert everything.error == 0.0
    pruned = project(weight, "2:4")
    again = solve(pruned, "2:4", *moments)
    assert torch.equal(again.weight, pruned)
    assert again.error == 0.0
    assert again.weight is not pruned


def test_without_moments_any_shape() -> None:
    weight = torch.randn(3, 8, 5, generator=random(6))
    found = solve(weight, "2:4", None, dim=1)
    assert torch.equal(found.weight, project(weight, "2:4", 1))
    assert found.error == pytest.approx(model_error(weight, found.weight, None, dim=1))
    with pytest.raises(ValueError, match="two dimensions"):
        solve(weight, "2:4", torch.eye(8), dim=1)


def test_large_problems_leave_out_hopeless_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is the same; only the work for masks that lose anyway is saved."""
    monkeypatch.setattr(solver, "_MORE_SCHEDULES", ())
    weight, a, g = problem(7, rows=24, columns=64)
    full = solve(weight, "2:4", a, g)
    monkeypatch.setattr(solver, "_SMALL", 0)
    assert torch.equal(solve(weight, "2:4", a, g).weight, full.weight)


def test_autocast_and_gradients_are_left_out() -> None:
    weight, a, g = problem(8)
    expected = solve(weight, "2:4", a, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve(torch.nn.Parameter(weight), "2:4", a, g)
    assert torch.equal(found.weight, expected.weight)
    assert not found.weight.requires_grad


def test_inputs_are_not_changed() -> None:
    weight, a, g = problem(9)
    before = [t.clone() for t in (weight, a, g)]
    solve(weight, "2:4", a, g)
    assert all(torch.equal(t, b) for t, b in zip((weight, a, g), before, strict=True))


# The eigendecomposition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "dtype"), [(1, torch.float64), (2, torch.float32), (3, torch.float64)])
def test_eigendecomposition_is_tried_again(monkeypatch: pytest.MonkeyPatch, failures: int, dtype: torch.dtype) -> None:
    """In float64, then with more damping."""
    _, a, _ = problem(10)
    eigh, seen = torch.linalg.eigh, []

    def failing(m: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(m.dtype)
        if len(seen) <= failures:
            if len(seen) % 2:
                raise torch.linalg.LinAlgError("did not converge")
            return torch.full(m.shape[:1], math.nan), m
        return eigh(m)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    factor = factorise(a, 0.01)
    assert seen[-1] == dtype
    assert len(seen) == failures + 1
    rebuilt = factor.vectors @ (factor.values[:, None] * factor.vectors.T)
    torch.testing.assert_close(rebuilt, factor.matrix, rtol=1e-4, atol=1e-4)


def test_no_eigendecomposition_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(m: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(ValueError, match="no eigendecomposition"):
        factorise(problem(11)[1], 0.01)


# A device without float64 -------------------------------------------------------------------------------------------


class WithoutFloat64(TorchDispatchMode):
    """Makes a float64 tensor only of another one, or of one that ``Tensor.cpu`` has returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.on_cpu: list[Tensor] = []
        monkeypatch.setattr(Tensor, "cpu", lambda t: self.on_cpu.append(t.clone()) or self.on_cpu[-1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        allowed = any(t.dtype == torch.float64 or any(t is moved for moved in self.on_cpu) for t in given)
        if not allowed and any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(result)):
            raise TypeError("the device has no float64")
        return result


def test_a_device_without_float64_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, g = problem(13)
    eigh = torch.linalg.eigh

    def in_float64(m: Tensor) -> tuple[Tensor, Tensor]:
        if m.dtype != torch.float64:
            raise NotImplementedError("not on this device")
        return eigh(m)

    monkeypatch.setattr(torch.linalg, "eigh", in_float64)
    wanted = solve(weight, "2:4", a, g), solve(weight, "2:4", torch.eye(16)), solve(weight, "2:4", None)
    error = model_error(weight, wanted[0].weight, a, g)
    with WithoutFloat64(monkeypatch), pytest.raises(TypeError, match="no float64"):
        weight.double()
    with WithoutFloat64(monkeypatch):
        found = solve(weight, "2:4", a, g), solve(weight, "2:4", torch.eye(16)), solve(weight, "2:4", None)
        assert model_error(weight, found[0].weight, a, g) == error
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.error == other.error


# Bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    weight, a, g = problem(12)
    broken = weight.clone()
    broken[0, 0] = math.inf
    holes = a.clone()
    holes[0, 0] = math.nan
    lopsided = a.clone()
    lopsided[0, 1] += a.trace()
    for match, arguments in {
        "weight .* not finite": (broken, "2:4", a, g),
        "moment holds values that are not finite": (weight, "2:4", holes, g),
        "not symmetric": (weight, "2:4", lopsided),
        "negative": (weight, "2:4", -a),
        "square": (weight, "2:4", a[:, :8]),
        "inputs has 6 rows.* needs 16": (weight, "2:4", g),
        "outputs has 16 rows.* needs 6": (weight, "2:4", a, a),
        "no multiple": (weight[:, :15], "2:4", a),
        "floating-point": (weight, "2:4", a.long()),
    }.items():
        with pytest.raises(ValueError, match=match):
            solve(*arguments)
    with pytest.raises(ValueError, match="not finite"):
        solve(broken, "2:4", None)
    with pytest.raises(ValueError, match="shape"):
        model_error(weight, weight[:, :8], a)


@pytest.mark.parametrize(
    "option",
    [
        {"rho": 0.0},
        {"growth": 0.9},
        {"rounds": 0},
        {"settled": 1.0},
        {"tolerance": math.nan},
        {"input_damping": 0.0},
        {"output_damping": -1.0},
    ],
)
def test_options_out_of_range(option: dict[str, float]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=name.split("_")[-1]):
        solve(*problem(13)[:1], "2:4", *problem(13)[1:], **option)
