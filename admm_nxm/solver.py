"""The layer problem: the best NxM weight of one layer in the metric of its second moments, as pure functions.

For a weight W0 (rows x columns, grouped along its columns) and the second moments A (columns x columns) and
G (rows x rows), it solves

    minimise  tr(G (W - W0) A (W - W0)^T)   subject to   W has at most `keep` non-zeros in each group

by ADMM with an exact w-step, followed by least squares on the mask that ADMM has found.

Sources: Boyd et al. 2011, section 3.1.1 and 3.4.1 (scaled ADMM with a rising rho); Martens and Grosse 2015,
arXiv 1503.05671 (the Kronecker-factored metric); Meng et al. 2024, ALPS, arXiv 2406.07831 (ADMM with A alone, a rising
rho, and conjugate gradients on the mask).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .pattern import Pattern
from .projection import keep_mask, zero_outside

__all__ = ["INPUT_DAMPING", "OUTPUT_DAMPING", "Factor", "Solved", "factorise", "model_error", "solve"]

INPUT_DAMPING = 0.01
OUTPUT_DAMPING = 0.1

# The eigendecomposition fails on some matrices of low rank. Each further try adds this many times more damping.
_MORE_DAMPING = (1.0, 10.0, 100.0)
# Over-relaxation (Boyd 3.4.3): with 1.6 a dozen rounds reach what takes twice as many without it.
_RELAXATION = 1.6
# The eigenvalues are one in the mean. While rho is far below them v hardly moves w, and a mask that stands still then
# has not settled.
_TELLING = 0.1
# Conjugate gradients end here at the latest; by then they gain next to nothing.
_ITERATIONS = 200
# Up to so many entries all masks are refitted, with those of further schedules; in larger problems masks that lose so
# many times more than ours before any refit are left out.
_SMALL = 2**14
_MARGIN = 1.1
# By what the first rho is multiplied, to what power growth is raised, and the relaxation. Over 200 problems of 2 x 8
# the worst is 2.8 times the best mask with one schedule and 1.5 with these.
_MORE_SCHEDULES = ((1.0, 0.33, 1.0), (1.0, 0.33, 1.6), (10.0, 0.25, 1.6))


@dataclass(frozen=True)
class Factor:
    """A second moment made ready for :func:`solve`: damped, scaled to a unit diagonal, and eigendecomposed.

    Make it once with :func:`factorise` for weights that share their input, such as those of query, key and value.

    Args:
        scale: roots of the damped diagonal, (d,), up to a common power of two.
        matrix: the damped moment divided by ``scale`` on both sides, (d, d); None for the identity.
        values: its eigenvalues, (d,), none below zero.
        vectors: its eigenvectors as columns, (d, d); None for the identity.
    """

    scale: Tensor
    matrix: Tensor | None
    values: Tensor
    vectors: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Factor:
        """Return the factor on ``device`` in ``dtype``."""
        matrix = None if self.matrix is None else self.matrix.to(device, dtype)
        vectors = None if self.vectors is None else self.vectors.to(device, dtype)
        return Factor(self.scale.to(device, dtype), matrix, self.values.to(device, dtype), vectors)


@dataclass(frozen=True)
class Solved:
    """The outcome of :func:`solve`.

    Args:
        weight: the pruned weight, like the dense one; zero off the mask.
        mask: True = kept, exactly ``keep`` in each group.
        error: the model error in the damped metric, which was minimised; see :func:`model_error`.
        rounds: of ADMM.
    """

    weight: Tensor
    mask: Tensor
    error: float
    rounds: int


def factorise(moment: Tensor, damping: float) -> Factor:
    """Damp a second moment, scale it to a unit diagonal, and eigendecompose it.

    Args:
        moment: symmetric positive semidefinite, (d, d); float64 is factorised as such, other floating dtypes in
            float32. A sum over tokens serves as well as a mean.
        damping: the share of the mean diagonal that is added to the diagonal.

    Returns:
        The factor. A moment that is zero tells nothing, and counts as the identity.

    Raises:
        ValueError: ``moment`` is no second moment, ``damping`` is not positive, or no eigendecomposition could be had.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping={damping!r} is not above zero; choose a small share, such as {INPUT_DAMPING}")
    _check_moment(moment)
    moment = moment.detach()
    dtype = _compute_dtype(moment.dtype)
    diagonal = moment.diagonal().to(dtype)
    largest = float(diagonal.max()) if diagonal.numel() else 0.0
    if largest == 0.0:
        return _identity(torch.ones_like(diagonal))
    # By a power of two, so that a moment of any size gives the same bits.
    exponent = -math.frexp(largest)[1]
    diagonal = _times_power_of_two(diagonal, exponent)
    mean = float(_double(diagonal).mean())
    if bool(torch.count_nonzero(moment) == torch.count_nonzero(moment.diagonal())):
        return _identity((diagonal + damping * mean).sqrt())
    failure: RuntimeError | None = None
    for more in _MORE_DAMPING:
        scale = (diagonal + damping * more * mean).sqrt()
        scaled = _times_power_of_two(moment.to(dtype), exponent).div_(scale).div_(scale[:, None])
        scaled.fill_diagonal_(1.0)
        for precise in (False, True) if dtype != torch.float64 else (True,):
            try:
                values, vectors = torch.linalg.eigh(_double(scaled) if precise else scaled)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch.linalg.LinAlgError, and what some backends raise in its place
                failure = error
                continue
            if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
                return Factor(scale, scaled, values.to(scale).clamp_min_(0.0), vectors.to(scale))
    raise ValueError(
        f"no eigendecomposition of a second moment of shape {tuple(moment.shape)}, with damping up to "
        f"{damping * _MORE_DAMPING[-1]:g} neither; gather it from more tokens, or raise the damping"
    ) from failure


def model_error(
    weight: Tensor, pruned: Tensor, inputs: Tensor | None, outputs: Tensor | None = None, *, dim: int = -1
) -> float:
    """Measure the quadratic loss at ``pruned`` as a share of the loss at zero, ``tr(G D A D^T) / tr(G W A W^T)``.

    Args:
        weight: the dense weight W, 2-D; with neither moment, of any shape.
        pruned: of the same shape; D is the difference.
        inputs: A, the second moment along ``dim``, without damping; None for the identity.
        outputs: G, the second moment along the other dimension, likewise.
        dim: the grouped dimension.

    Returns:
        0 if nothing is lost, 1 if all is.

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.shape != pruned.shape:
        raise ValueError(f"the dense weight has shape {tuple(weight.shape)}, the pruned one {tuple(pruned.shape)}")
    _check_weight(weight, dim, inputs, outputs)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dense = _double(weight.detach())
        change = _double(pruned.detach()) - dense
        if weight.ndim == 2 and dim % 2 == 0:
            dense, change = dense.T, change.T

        def loss(w: Tensor) -> float:
            product = w if inputs is None else w @ _double(inputs)
            return float(((product if outputs is None else _double(outputs) @ product) * w).sum())

        at_zero = loss(dense)
        return max(loss(change), 0.0) / at_zero if at_zero > 0 else 0.0


def solve(
    weight: Tensor,
    pattern: Pattern | str,
    inputs: Tensor | Factor | None,
    outputs: Tensor | Factor | None = None,
    *,
    dim: int = -1,
    input_damping: float = INPUT_DAMPING,
    output_damping: float = OUTPUT_DAMPING,
    rho: float = 0.01,
    growth: float = 1.5,
    rounds: int = 60,
    settled: float = 0.003,
    tolerance: float = 1e-3,
) -> Solved:
    """Find the NxM weight that loses least in the metric of (A, G).

    Args:
        weight: the dense weight, 2-D; with neither moment, of any shape.
        pattern: a Pattern or its spelling.
        inputs: A, the second moment along ``dim``, raw or made ready by :func:`factorise`; None for the identity.
        outputs: G, the second moment along the other dimension, likewise.
        dim: the grouped dimension.
        input_damping: the share of A's mean diagonal that is added to it, if it comes raw.
        output_damping: the same for G.
        rho: the first penalty, in the scaling where A and G have unit diagonals.
        growth: of rho from round to round.
        rounds: at most; they end before where the mask stands still.
        settled: the mask stands still when a round changes at most this share of it.
        tolerance: least squares ends when an iteration gains less than this share of the loss that remains.

    Returns:
        The pruned weight with its mask, never worse in the damped metric than least squares on the masks of magnitude
        and of magnitude times ``sqrt(diag A)`` (in a weight of more than 16,384 entries these are left out where they
        lose over a tenth more than ours before least squares). With neither moment: exactly :func:`admm_nxm.project`.

    Raises:
        TypeError, IndexError, ValueError: as in :func:`admm_nxm.project`; shapes that do not fit, values that are not
            finite, or an option out of range.

    Source: see the head of this module.
    """
    pattern = Pattern.parse(pattern)
    _check_options(rho, growth, rounds, settled, tolerance)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dense = weight.detach()
        by_magnitude = keep_mask(dense, pattern, dim)
        _check_weight(dense, dim, inputs, outputs)
        zero = torch.zeros((), dtype=dense.dtype, device=dense.device)
        projected = torch.where(by_magnitude, dense, zero)
        if not bool(torch.isfinite(dense).all()):
            raise ValueError(f"the weight of shape {tuple(dense.shape)} holds values that are not finite")
        if torch.equal(projected, dense):
            return Solved(dense.clone(), by_magnitude, 0.0, 0)
        if inputs is None and outputs is None:
            return Solved(projected, by_magnitude, _share_lost(dense, by_magnitude), 0)
        del projected
        dtype = _compute_dtype(dense.dtype)
        a = _factor(inputs, dense.shape[dim], input_damping, dense.device, dtype)
        g = _factor(outputs, dense.shape[1 - dim % 2], output_damping, dense.device, dtype)
        transposed = dim % 2 == 0
        if transposed:
            dense, by_magnitude = dense.T, by_magnitude.T
        exponent = math.frexp(float(dense.abs().max()))[1]
        normal = _times_power_of_two(dense.to(dtype), -exponent)
        if a.matrix is None and g.matrix is None:
            # Nothing couples two weights: what is kept stays as it is.
            mask = keep_mask(normal * (a.scale / a.scale.max()), pattern)
            error = _share_lost(normal * a.scale * g.scale[:, None], mask)
            best, count = torch.where(mask, dense, zero), 0
        else:
            problem = _Problem(normal.mul_(a.scale).mul_(g.scale[:, None]), a, g)
            mask, start, count = _admm(problem, pattern, rho, growth, rounds, settled, _RELAXATION)
            masks = [mask, by_magnitude.contiguous(), keep_mask(problem.weight, pattern)]
            if problem.weight.numel() <= _SMALL:
                for first, power, relaxation in _MORE_SCHEDULES:
                    masks.append(_admm(problem, pattern, rho * first, growth**power, rounds, 0.0, relaxation)[0])
            candidate = _best(problem, masks, start, tolerance)
            mask = candidate.mask
            error = float(candidate.loss.sum()) / float((problem.weight * problem.metric(problem.weight)).sum())
            best = _times_power_of_two(candidate.weight / a.scale / g.scale[:, None], exponent)
            limits = torch.finfo(weight.dtype)
            best = best.clamp_(limits.min, limits.max).to(weight.dtype)
            zero_outside(best, mask)  # +0.0, as from a projection
        if transposed:
            best, mask = best.T.contiguous(), mask.T.contiguous()
        return Solved(best, mask, max(error, 0.0), count)


class _Problem:
    """The layer problem with both moments scaled to unit diagonals, and the weight with them."""

    def __init__(self, weight: Tensor, a: Factor, g: Factor) -> None:
        self.weight, self.a, self.g = weight, a, g
        self.rows_couple = g.matrix is not None

    def metric(self, x: Tensor) -> Tensor:
        """Return G x A."""
        x = x if self.a.matrix is None else x @ self.a.matrix
        return x if self.g.matrix is None else self.g.matrix @ x

    def pull(self, x: Tensor, spare: Tensor, rho: float) -> tuple[Tensor, Tensor]:
        """Return y with ``G y A + rho y = rho x``, and the buffer that is free again; both buffers are overwritten."""
        a, g = self.a, self.g
        if a.vectors is not None:
            x, spare = torch.mm(x, a.vectors, out=spare), x
        if g.vectors is not None:
            x, spare = torch.mm(g.vectors.T, x, out=spare), x
        if self.rows_couple:
            x /= torch.outer(g.values / rho, a.values, out=spare).add_(1.0)
        else:
            x /= a.values / rho + 1.0
        if g.vectors is not None:
            x, spare = torch.mm(g.vectors, x, out=spare), x
        if a.vectors is not None:
            x, spare = torch.mm(x, a.vectors.T, out=spare), x
        return x, spare

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the inner product in each independent problem: each row, (rows, 1), or all rows together, (1, 1)."""
        if self.rows_couple:
            return torch.dot(x.flatten(), y.flatten()).view(1, 1)
        products: Tensor = torch.linalg.vecdot(x, y)
        return products[:, None]


@dataclass(frozen=True)
class _Candidate:
    """A feasible weight, with what it loses in each independent problem."""

    weight: Tensor
    mask: Tensor
    loss: Tensor


def _admm(
    problem: _Problem, pattern: Pattern, rho: float, growth: float, rounds: int, settled: float, relaxation: float
) -> tuple[Tensor, Tensor, int]:
    """Alternate the w-step, the projection and the dual step; return the mask, z and the number of rounds.

    v = z - u is one buffer: z is v on the mask, and u is -v off it.
    """
    weight = problem.weight
    mask = keep_mask(weight, pattern)
    kept = mask.to(weight.dtype)
    v = weight * kept
    w, spare = torch.empty_like(weight), torch.empty_like(weight)
    done = 0
    while done < rounds:
        # w - w0 solves G (w - w0) A + rho (w - w0) = rho (v - w0).
        w, spare = problem.pull(torch.sub(v, weight, out=w), spare, rho)
        # The point to project: w, relaxed towards w beyond z, plus u.
        w.add_(weight).mul_(relaxation).sub_(v)
        w.add_(v.mul_(kept), alpha=2.0 - relaxation)
        before, mask = mask, keep_mask(w, pattern)
        kept.copy_(mask)
        # z on the mask; off it -u, where u shrinks as rho grows (Boyd 3.4.1).
        torch.mul(w, kept, out=v)
        v.add_(w.sub_(v), alpha=-1.0 / growth)
        done += 1
        changed = float(torch.count_nonzero(before != mask)) / max(mask.numel(), 1)
        if changed <= settled and rho >= _TELLING:
            break
        rho *= growth
    return mask, v.mul_(kept), done


def _refit(problem: _Problem, mask: Tensor, start: Tensor, tolerance: float, rival: Tensor | None = None) -> _Candidate:
    """Solve the least squares on ``mask`` by conjugate gradients from ``start``; give up where a rival's loss is out of
    reach. The diagonal of the metric is one: it needs no preconditioner."""
    kept = mask.to(start.dtype)
    x = start * kept
    direction = problem.weight - x
    r = problem.metric(direction)
    loss = problem.inner(direction, r)
    r *= kept
    direction.copy_(r)
    slope = problem.inner(r, r)
    still = 0
    for iteration in range(1, _ITERATIONS + 1):
        curved = problem.metric(direction).mul_(kept)
        step = _ratio(slope, problem.inner(direction, curved))
        gain = step * slope
        loss = loss - gain
        x.addcmul_(step, direction)
        r.addcmul_(step, curved, value=-1.0)
        still = still + 1 if float(gain.sum()) <= tolerance * float(loss.sum()) else 0
        beaten = rival is not None and iteration >= 10 and bool((loss - iteration * gain > rival).all())
        if still == 2 or beaten:
            break
        before, slope = slope, problem.inner(r, r)
        torch.addcmul(r, _ratio(slope, before), direction, out=direction)
    return _Candidate(x, mask, loss.clamp_min(0.0))


def _best(problem: _Problem, masks: list[Tensor], start: Tensor, tolerance: float) -> _Candidate:
    """Refit the first mask from ``start``, and the others as far as they could be better.

    Each independent problem takes the best. In a large one a mask that is far behind before any refit is left out.
    """
    first, *others = masks
    best = _refit(problem, first, start, tolerance)
    large = problem.weight.numel() > _SMALL
    limit = _MARGIN * _loss_unrefitted(problem, first) if large else math.inf
    for mask in others:
        if large and _loss_unrefitted(problem, mask) > limit:
            continue
        begin = torch.where(best.mask, best.weight, problem.weight)
        other = _refit(problem, mask, begin, tolerance, best.loss)
        wins = other.loss < best.loss
        pairs = ((other.weight, best.weight), (other.mask, best.mask), (other.loss, best.loss))
        best = _Candidate(*(torch.where(wins, *pair) for pair in pairs))
    return best


def _loss_unrefitted(problem: _Problem, mask: Tensor) -> float:
    lost = problem.weight * mask.logical_not()
    return float(problem.inner(lost, problem.metric(lost)).sum())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.zeros_like(above))


def _identity(scale: Tensor) -> Factor:
    return Factor(scale, None, torch.ones_like(scale), None)


def _factor(
    moment: Tensor | Factor | None, size: int, damping: float, device: torch.device, dtype: torch.dtype
) -> Factor:
    if moment is None:
        return _identity(torch.ones(size, device=device, dtype=dtype))
    return (factorise(moment, damping) if isinstance(moment, Tensor) else moment).to(device, dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _double(t: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has no such numbers, as GPUs of Apple and Intel."""
    try:
        return t.double()
    except (TypeError, RuntimeError):
        return t.cpu().double()


def _times_power_of_two(t: Tensor, exponent: int) -> Tensor:
    """Multiply by ``2**exponent``, in two steps because one factor alone could overflow."""
    half = exponent // 2
    return (t * 2.0**half).mul_(2.0 ** (exponent - half))


def _share_lost(weight: Tensor, mask: Tensor) -> float:
    squares = _double(weight).square()
    return float(squares.masked_fill(mask.to(squares.device), 0.0).sum() / squares.sum())


def _check_options(rho: float, growth: float, rounds: int, settled: float, tolerance: float) -> None:
    finite = math.isfinite
    for name, value, allowed, needed in (
        ("rho", rho, finite(rho) and rho > 0, "above zero, such as 0.01"),
        ("growth", growth, finite(growth) and growth >= 1, "1 or more, as rho must not fall: 1.5, say"),
        ("rounds", rounds, rounds >= 1, "1 or more, such as 60"),
        ("settled", settled, 0 <= settled < 1, "a share of the mask, from 0 to below 1, such as 0.003"),
        ("tolerance", tolerance, finite(tolerance) and tolerance > 0, "above zero, such as 1e-3"),
    ):
        if not allowed:
            raise ValueError(f"{name}={value!r} must be {needed}")


def _check_weight(weight: Tensor, dim: int, inputs: Tensor | Factor | None, outputs: Tensor | Factor | None) -> None:
    if inputs is None and outputs is None:
        return
    if weight.ndim != 2:
        raise ValueError(
            f"second moments need a weight of two dimensions, not of shape {tuple(weight.shape)}; pass inputs=None and "
            "outputs=None to project it"
        )
    sides = (("inputs", inputs, weight.shape[dim]), ("outputs", outputs, weight.shape[1 - dim % 2]))
    for name, moment, size in sides:
        if moment is None:
            continue
        found = len(moment) if isinstance(moment, Tensor) else len(moment.scale)
        if found != size:
            raise ValueError(
                f"{name} has {found} rows, but the weight of shape {tuple(weight.shape)}, grouped along dim={dim}, "
                f"needs {size}"
            )


def _check_moment(moment: Tensor) -> None:
    square = moment.ndim == 2 and moment.shape[0] == moment.shape[1]
    if not (square and moment.is_floating_point()):
        raise ValueError(
            f"the moment is {moment.dtype} of shape {tuple(moment.shape)}; a floating-point square matrix is needed"
        )
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("the moment holds values that are not finite")
    if bool((moment.diagonal() < 0).any()):
        raise ValueError("the moment has a negative number on its diagonal: it is no second moment")
    sums = [moment.sum(dim=side, dtype=_compute_dtype(moment.dtype)) for side in (0, 1)]
    limit = 1e-3 * float(_double(moment.diagonal()).sum())
    if bool(((sums[0] - sums[1]).abs() > limit).any()):
        raise ValueError("the moment is not symmetric: it is no second moment")
