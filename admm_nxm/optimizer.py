"""ADMMNxM: the life of a run, around any torch optimizer."""

from __future__ import annotations

import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import consensus as admm
from .checkpoint import CONSENSUS, COUNTERS, PRIMAL, check_entry, check_kind, counters_of, fingerprint, split
from .factors import Factor
from .forms import FORMS, Form, form_of, is_lean
from .inner import check_inner, has_no_effect, is_capturing, raw_step, share_step_hooks
from .kernels import Backend, BackendName, backend_for, check_backend
from .masks import PACKED, is_mask, stored_as, unpack
from .pattern import Pattern
from .projection import keep_mask, project
from .residuals import Residuals, WeightResidual, ratio
from .saliency import Curvature, Saliency
from .schedules import Every, Penalty, Plan, Schedule, Update, UpdateSchedule, check_update, make_plan, next_rho
from .selection import TRAINABLE_DTYPES, Ineligible, Select, SelectedWeight, Selection, select_weights
from .sharding import check_sharding, local, reduce_sums, rows_divide_into_bytes, wrap_like
from .sparsity import SparsityReport, check_weights

__all__ = ["ADMMNxM", "ConvergenceWarning", "Residuals", "WeightResidual"]

_HOOKS_OF_ITS_OWN = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


_RESTLESS = 0.1
"""Mask churn at the last z-step above which the frozen mask is called arbitrary."""

_WHY_RESTLESS = "the dual was at work while the mask moved, and u grows by w until pruned weights out-rank kept ones"


class ConvergenceWarning(UserWarning):
    """The weights were far from the pattern when they were projected onto it."""


@dataclass(frozen=True)
class _Bound:
    """A prunable weight and its present parameter object."""

    spec: SelectedWeight
    param: Tensor
    maximize: bool

    @property
    def w(self) -> Tensor:
        return local(self.param.detach())

    @property
    def g(self) -> Tensor:
        assert self.param.grad is not None
        return local(self.param.grad)

    @property
    def grouping(self) -> tuple[Pattern, int]:
        return self.spec.pattern, self.spec.dim


class ADMMNxM(Optimizer):
    """Fine-tunes the prunable weights of a model into NxM semi-structured form, with any inner optimizer.

    The loop stays as it was; at its end :meth:`finalize` makes the weights satisfy the pattern exactly. With
    ``total_steps`` the run goes through its phases by itself: a short dense start, a constrained phase in which the
    penalty rises and z moves, and from 90 % of the steps a frozen mask under which the kept weights are fine-tuned.
    :meth:`paper` builds the form of the paper.

    The state is one tensor per prunable weight: the mask, packed into bits, for the lazy form, and one buffer of the
    weight's size for the others. It is created in the first step and lives in the inner optimizer's state, so
    checkpoints, ``deepcopy`` and sharding treat it like a momentum.

    Args:
        optimizer: the inner optimizer, any ``torch.optim.Optimizer`` whose ``step()`` works without a closure.
        model: the module, or its ``named_parameters()``.
        pattern: pattern of the default selection rules, such as ``"2:4"`` or ``Pattern(2, 4)``.
        penalty: ``"lazy"`` evaluates the model at the proximal point, w moved toward z by ``rho / (1 + rho)`` (rho is
            dimensionless), and lets w itself be: pruned weights fade out of the model, keep learning, and may come
            back. The parameters hold that point between steps. ``"proximal"`` moves w itself after each inner step.
            ``"gradient"`` adds ``rho * (w - v)`` to the gradient, as in the paper (rho in units of the loss per
            squared weight); optimizers that bound a weight's travel per step, such as Adam, then need many steps to
            bring weights to zero.
        rho: penalty, a number or a schedule (step -> rho, read whenever z moves); by default it rises.
        saliency: what the mask ranks by. ``"curvature"`` (the default of the lazy form) weighs magnitudes by the inner
            optimizer's second moment, see :class:`Curvature`; ``"magnitude"`` does not; or a callable. The other
            forms read the mask off the consensus and know magnitude only.
        update_every: steps between two z/u updates, or a schedule (step -> Update); by default at most 10.
            ``Every(interval)`` uses the dual from the beginning; the lazy form has none, the default plan of the
            proximal form uses it late.
        total_steps: number of optimizer steps of the whole run, frozen phase included. None: the penalty rises until
            :meth:`finalize` is called.
        freeze_at: number of steps after which the mask freezes; by default 90 % of ``total_steps`` (70 % unless lazy).
        select: rules that replace the default selection: a mapping from regular expressions (whole parameter name,
            first match wins) to a Pattern, its spelling or None (leave dense), or a callable ``(name, module)``.
        dims: regular expression -> grouped dimension, where the module's input dimension is not the one.
        ineligible: ``"error"`` or ``"skip"``, for weights that the rules ask for and that cannot be pruned (frozen,
            not held by the inner optimizer, width no multiple of the group, not floating point).
        state_dtype: dtype of the state. By default the lazy form stores the mask alone where all weights have 32 bits
            or more, and makes w of what the model holds, to within a rounding of the weight each time rho changes;
            with a floating dtype, and by default for 16-bit weights, it stores w itself; ``torch.bool`` asks for the
            mask alone whatever the weights are (not for float16: small weights do not come back from a high rho). The
            other forms need a floating dtype, by default each weight's own.
        state_rounding: ``"stochastic"`` rounds a float32 weight's update at random to a bfloat16 state, so that what is
            too small for 8 bits is not lost on average; repeatable, and the same after a resume.
        backend: ``"eager"`` (plain torch), ``"native"`` (C, on CPUs) or ``"triton"`` (on CUDA); None takes the fastest
            that works where the weights are then; named, it must fit the device where they are now. Results are alike,
            but for the last bit of the proximal and gradient forms.
        residual_tolerance: primal residual above which projecting the weights warns, as a share of their norm.

    Raises:
        TypeError, ValueError: bad input; the message says the value, what is allowed and the remedy.

    Source: Holmes, Zhang, He, Wu, NxMTransformer (arXiv 2110.15766), algorithm 1; Boyd et al. 2011, section 3.1.1.
    """

    inner: Optimizer
    """The wrapped optimizer."""

    selection: Selection
    """What is pruned with which pattern along which dimension, and what was skipped and why."""

    plan: Plan
    """The schedules in force."""

    penalty: Penalty
    saliency: Saliency | None
    total_steps: int | None
    state_dtype: torch.dtype | None
    state_rounding: Literal["nearest", "stochastic"]
    backend: BackendName | None
    residual_tolerance: float
    _full: bool
    _places: list[tuple[int, int]]
    _movement: dict[str, Tensor]
    _freeze_sums: Tensor | None
    _backup: dict[str, Tensor] | None
    _announced: bool

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        pattern: Pattern | str = "2:4",
        penalty: Penalty = "lazy",
        rho: float | Schedule | None = None,
        saliency: Saliency | Literal["curvature", "magnitude"] | None = None,
        update_every: int | UpdateSchedule | None = None,
        total_steps: int | None = None,
        freeze_at: int | None = None,
        select: Select | None = None,
        dims: Mapping[str, int] | None = None,
        ineligible: Ineligible = "error",
        state_dtype: torch.dtype | None = None,
        state_rounding: Literal["nearest", "stochastic"] = "nearest",
        backend: BackendName | None = None,
        residual_tolerance: float = 0.02,
    ) -> None:
        check_inner(optimizer, ADMMNxM)
        if penalty not in FORMS:
            allowed = ", ".join(f'"{name}"' for name in FORMS)
            raise ValueError(f"penalty={penalty!r} must be one of {allowed}")
        check_backend(backend)
        _check_state(penalty, state_dtype, state_rounding)
        if not isinstance(residual_tolerance, (int, float)) or not residual_tolerance > 0:
            raise ValueError(f"residual_tolerance={residual_tolerance!r} must be above 0: a share of the weights' norm")
        ranking = _saliency_of(saliency, penalty)
        plan = make_plan(penalty, total_steps, rho, update_every, freeze_at, FORMS[penalty].takes_dual)
        places = {
            id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
        }
        selection, params = select_weights(
            model, Pattern.parse(pattern), select, dims=dims, ineligible=ineligible, held=places
        )
        dtypes = {params[weight.name].dtype for weight in selection}
        if state_rounding == "stochastic" and torch.float32 not in dtypes:
            raise ValueError(
                'state_rounding="stochastic" rounds what is float32, and the prunable weights are '
                f'{", ".join(sorted(map(str, dtypes)))}; use state_rounding="nearest"'
            )
        for weight in selection:
            check_sharding(weight.name, params[weight.name], weight.dim, weight.pattern.group)
            backend_for(params[weight.name].device, backend)  # refuses one that does not work there
        self.__setstate__(
            {
                "inner": optimizer,
                "selection": selection,
                "plan": plan,
                "penalty": penalty,
                "saliency": ranking,
                "total_steps": total_steps,
                "state_dtype": state_dtype,
                "state_rounding": state_rounding,
                "backend": backend,
                "_full": _is_full(penalty, state_dtype, dtypes),
                "residual_tolerance": float(residual_tolerance),
                # Parameter objects may be exchanged before the first step (FSDP2); their places in the groups stay.
                "_places": [places[id(params[weight.name])] for weight in selection],
                "_movement": {},
                "_freeze_sums": None,
                "_backup": None,
                "_announced": False,
            }
        )
        self._set(**{key: self._get(key) for key in COUNTERS})
        self._set(admm_selection=self._fingerprint())
        self._prepare()

    @classmethod
    def paper(
        cls,
        optimizer: Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        total_steps: int,
        rho: float | Schedule = 1e-2,
        update_every: int | UpdateSchedule | None = None,
        **options: Any,
    ) -> ADMMNxM:
        """Build the paper's form: the penalty in the gradient, a constant rho, the dual from the start.

        The last 30 % of the run fine-tune the kept weights under the frozen mask; ``freeze_at=total_steps`` leaves
        that out.

        Args:
            optimizer: the inner optimizer.
            model: the module, or its ``named_parameters()``.
            total_steps: number of optimizer steps of the whole run.
            rho: penalty, in units of the loss per squared weight; it wants tuning, by factors of 10.
            update_every: steps between two z/u updates; by default a fifteenth of the run.
            options: further arguments of :class:`ADMMNxM`, ``penalty`` and ``saliency`` excepted.

        Returns:
            The optimizer.

        Raises:
            TypeError, ValueError: as for :class:`ADMMNxM`.

        Source: Holmes, Zhang, He, Wu, NxMTransformer (arXiv 2110.15766), algorithm 1.
        """
        fixed = sorted({"penalty", "saliency"} & options.keys())
        if fixed:
            raise TypeError(f"{', '.join(fixed)} cannot be set in the paper's form; call ADMMNxM(...) instead")
        if update_every is None:
            update_every = max(1, total_steps // 15) if isinstance(total_steps, int) else 1
        if isinstance(update_every, int) and not isinstance(update_every, bool) and update_every > 0:
            update_every = Every(update_every)
        return cls(
            optimizer,
            model,
            penalty="gradient",
            rho=rho,
            update_every=update_every,
            total_steps=total_steps,
            **options,
        )

    # ------------------------------------------------------------------ the contract of torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's own parameter groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's own per-parameter state."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's own defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        hooks = (*_HOOKS_OF_ITS_OWN, "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        # ``step`` and its kin stand here if an LR scheduler or a scaler has put its own wrapping on this instance.
        wrapped = {key for key, value in self.__dict__.items() if callable(value) and hasattr(type(self), key)}
        return {key: value for key, value in self.__dict__.items() if key not in hooks and key not in wrapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _HOOKS_OF_ITS_OWN:
            setattr(self, name, OrderedDict())
        share_step_hooks(self.inner, self)
        self._patch_step_function()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer. They stay dense: the selection is fixed at construction."""
        self.inner.add_param_group(param_group)
        self._set(**{key: self._get(key) for key in COUNTERS})

    # ------------------------------------------------------------------ a step

    # A compiled training step calls this as it is: what a step does depends on counters, and tracing it anew whenever
    # one of them moves would cost minutes.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of the inner optimizer on the penalised loss, and the z- and u-steps that are due.

        Weights without a gradient are left alone, as the inner optimizer leaves them.

        Args:
            closure: evaluates the loss and its gradients; called once, first.

        Returns:
            What the closure returns; None without one.

        Raises:
            RuntimeError: the model holds its projected weights (after :meth:`eval` or in :meth:`projected`), or a CUDA
                graph is being captured before the mask is frozen.
        """
        if self._backup is not None:
            raise RuntimeError("the model holds its projected weights; call optimizer.train() before step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self._get("admm_step") == 0 and has_no_effect(self.inner):
                self._create_state()
            elif self.frozen:
                self._masked_step()
            else:
                self._refuse_to_be_captured()
                self._constrained_step()
        return loss

    def _refuse_to_be_captured(self) -> None:
        """A CUDA graph would repeat one step's penalty for ever, and move neither z nor rho."""
        if is_capturing(self._bound()[0].w.device):
            raise RuntimeError(
                f"step {int(self._get('admm_step')) + 1} was to be captured in a CUDA graph, which cannot follow the "
                "schedules: capture the forward and backward pass alone (torch.cuda.make_graphed_callables) and call "
                "optimizer.step() outside of the graph; once the mask is frozen, step() may be captured"
            )

    def _constrained_step(self) -> None:
        if self._get("admm_step") == 0:
            self._set(admm_rho=next_rho(self.plan, 0, 0.0, False))
        rho = self._get("admm_rho")
        active = self._active()
        alike = _alike(active)
        # w-step: the inner optimizer on f(w) + rho/2 * ||w - z + u||^2
        for (device, maximize), (bounds, states) in alike.items():
            gradients, weights = [b.g for b in bounds], [b.w for b in bounds]
            self._form.before(self._backend(device), gradients, weights, states, rho, maximize)
        try:
            raw_step(self.inner)
            self._store(active)
            for (device, _), (bounds, states) in alike.items():
                self._form.after(self._backend(device), [b.w for b in bounds], states, rho)
            step = int(self._get("admm_step")) + 1
            self._set(admm_step=step)
            # z-step and u-step
            update = self.plan.updates(step)
            freezing = self.plan.freeze_at is not None and step >= self.plan.freeze_at
            if update is not Update.NONE and not (freezing and self._form.freezes_what_was_shown):
                self._move_consensus(active, update, step)
        finally:  # after an error as well: the next step takes what the model holds for what it was shown
            self._show(active)
        if freezing:
            self._freeze()

    def _show(self, active: list[tuple[_Bound, Tensor]]) -> None:
        """Leave in the weights what the model is evaluated at next. One whose first step has failed holds w, from which
        its next step starts anew."""
        started, rho = self._get("admm_step") > 0, self._get("admm_rho")
        shown = [(bound, v) for bound, v in active if started and self._consensus(bound) is not None]
        for (device, _), (bounds, states) in _alike(shown).items():
            self._form.show(self._backend(device), [b.w for b in bounds], states, rho)

    def _masked_step(self) -> None:
        active = self._active()
        alike = _alike(active)
        for (device, _), (bounds, masks) in alike.items():
            # The gradient as well, so that no momentum builds up where nothing may move.
            self._backend(device).keep_only([b.g for b in bounds], masks)
        raw_step(self.inner)
        self._store(active)
        for (device, _), (bounds, masks) in alike.items():
            self._backend(device).keep_only([b.w for b in bounds], masks)
        self._set(admm_step=int(self._get("admm_step")) + 1)

    def _create_state(self) -> None:
        """A step that changes no weight: let the inner optimizer create its state, and create ours beside it."""
        active = self._active()
        raw_step(self.inner)
        self._store(active)

    def _move_consensus(self, active: list[tuple[_Bound, Tensor]], update: Update, step: int) -> None:
        # Only weights that had their w-step: for one that stands still, u would grow by w at each update.
        moved = {bound.spec.name for bound, _ in active}
        check_update(update, self._form.takes_dual, step)
        with_dual = update is Update.AUXILIARY_AND_DUAL
        in_use = bool(self._get("admm_dual_in_use")) or with_dual
        old = self._get("admm_rho")
        new = next_rho(self.plan, step, old, in_use)
        # The unscaled dual rho * u stays what it is when rho rises (Boyd et al. 2011, section 3.4.1).
        scale = old / new if old > 0 and new > 0 else 1.0
        still = []
        for bound in self._bound():
            v = self._consensus(bound)
            if v is None:
                continue
            if bound.spec.name not in moved:
                still.append((bound, v))
                continue
            self._movement[bound.spec.name] = self._form.advance(
                self._backend(v.device),
                bound.w,
                v,
                *bound.grouping,
                factor=self._factor(bound),
                with_dual=with_dual,
                dual_scale=scale,
                seed=self._seed(bound, step),
            )
        for bound, v in still:  # when no ranking of the user's own can fail any more
            if in_use and scale != 1.0:
                self._form.rescale(v, *bound.grouping, scale)
            self._form.follow(self._backend(v.device), bound.w, v, old, new)
        self._set(admm_rho=new, admm_dual_in_use=int(in_use))

    def _freeze(self) -> None:
        """W = P(w + u); from now on only the mask is kept."""
        sums = []
        for bound in self._bound():
            z, mask = self._projected(bound)
            moved = self._movement.get(bound.spec.name)
            churn = mask.new_zeros(2, dtype=torch.float32) if moved is None else moved[2:].to(mask.device)
            sums.append(torch.cat([admm.primal_sums(bound.w, z), churn]))
            bound.w.copy_(z)
            state = self.inner.state.get(bound.param)
            if state is None or CONSENSUS not in state:
                continue  # never stepped: its mask can be read off the weight itself
            state[CONSENSUS] = wrap_like(stored_as(mask, self._mask_dtype(bound)), bound.param)
            for value in map(local, filter(torch.is_tensor, state.values())):
                # Quantised states stay: masked gradients let what they hold off the mask fade, and no weight follows.
                if type(value) is Tensor and value.is_floating_point() and value.shape == mask.shape:
                    self._backend(mask.device).keep_only([value], [mask])
        self._freeze_sums = torch.stack(sums)
        self._movement.clear()
        self._set(admm_frozen_at=int(self._get("admm_step")))

    # ------------------------------------------------------------------ the end of a run

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed."""
        return self._get("admm_frozen_at") >= 0

    @property
    def finalized(self) -> bool:
        """Whether :meth:`finalize` has been called."""
        return bool(self._get("admm_finalized"))

    @torch.no_grad()
    def finalize(self) -> SparsityReport:
        """Make the weights satisfy the pattern exactly, and keep the mask for all further steps.

        Projects w + u onto the pattern unless the mask is frozen already, and keeps the mask alone. Weights that were
        loaded into the model after the freeze are projected, and give the mask. Doing it again changes nothing.
        Leaves the evaluation mode. A collective where weights are sharded.

        Returns:
            The count of every group of every prunable weight.

        Warns:
            ConvergenceWarning: the primal residual at the projection was above ``residual_tolerance`` over all weights,
                or above five times that for one of them; or the last z-step before the freeze replaced more than a
                tenth of the kept places.

        Raises:
            ValueError: a prunable weight has a NaN or an infinity; nothing is changed then.
        """
        self._check_finite()
        self._swap_out()
        if not self.frozen:
            self._freeze()
        else:
            self._project_what_was_loaded()
        self._set(admm_finalized=1)
        if self._read_freeze_residual(everywhere=True) or not self._announced:
            self._warn_if_far(stacklevel=4)  # past torch's no_grad wrapper
        params = {bound.spec.name: bound.param for bound in self._bound()}
        return check_weights(self.selection, params.__getitem__)

    def _check_finite(self) -> None:
        bounds = self._bound()
        counts = []
        for bound in bounds:
            z, _ = self._projected(bound)
            bad = sum((~t.isfinite()).sum() for t in (bound.w, self._training_weight(bound), z))
            counts.append(torch.as_tensor(bad).reshape(1).to(bounds[0].param.device))
        totals = reduce_sums(counts, [bound.param for bound in bounds]).flatten().tolist()
        names = [bound.spec.name for bound, count in zip(bounds, totals, strict=True) if count]
        if names:
            raise ValueError(
                f"{len(names)} weights have NaN or infinite entries after step {int(self._get('admm_step'))}: "
                f"{', '.join(names)}; nothing was changed. Load an earlier checkpoint, lower the learning rate, or "
                "clip the gradients"
            )

    def _project_what_was_loaded(self) -> None:
        """Hold weights to the pattern that are not what the frozen mask left: somebody has loaded them since."""
        bounds = self._bound()
        masks = [self._mask(bound) for bound in bounds]
        strays = [
            ((bound.w != 0) & ~mask).sum().reshape(1).to(bounds[0].param.device)
            for bound, mask in zip(bounds, masks, strict=True)
        ]
        counts = reduce_sums(strays, [bound.param for bound in bounds]).flatten().tolist()
        if not any(counts):
            return
        sums = []
        for bound, count in zip(bounds, counts, strict=True):
            z = bound.w if not count else project(bound.w, *bound.grouping)
            sums.append(torch.cat([admm.primal_sums(bound.w, z), z.new_zeros(2, dtype=torch.float32)]))
            if count:
                stored = self._consensus(bound)
                if stored is not None:
                    stored.copy_(stored_as(keep_mask(bound.w, *bound.grouping), stored.dtype))
                bound.w.copy_(z)
        self._freeze_sums = torch.stack(sums)

    def _read_freeze_residual(self, *, everywhere: bool) -> bool:
        """Turn the sums left by a projection into numbers, over all ranks or this one's parts alone; return whether
        there were any."""
        sums = self._freeze_sums
        if sums is None:
            return False
        if everywhere:
            sums = reduce_sums(list(sums), [bound.param for bound in self._bound()])
            self._freeze_sums = None
        each = [ratio(difference, norm) for difference, norm, *_ in sums.tolist()]
        worst = max(range(len(each)), key=each.__getitem__)
        difference, norm, gained, kept = sums.sum(0).tolist()
        self._set(
            admm_freeze_residual=ratio(difference, norm),
            admm_freeze_churn=gained / kept if kept else 0.0,
            admm_far_weights=sum(residual > 5 * self.residual_tolerance for residual in each),
            admm_worst_residual=each[worst],
            admm_worst_weight=worst,
        )
        return True

    def _warn_if_far(self, *, stacklevel: int) -> None:
        self._announced = True
        residual, worst = self._get("admm_freeze_residual"), self._get("admm_worst_residual")
        churn = self._get("admm_freeze_churn")
        far = residual > self.residual_tolerance or worst > 5 * self.residual_tolerance
        if not far and churn <= _RESTLESS:
            return
        if not far:
            warnings.warn(
                f"the mask had not settled: the last z-step before the freeze replaced {churn:.0%} of the kept places "
                f"(more than {_RESTLESS:.0%}), so the frozen mask is the one that happened to be there. Likely cause: "
                f"{_WHY_RESTLESS if self._get('admm_dual_in_use') else 'the learning rate is high up to the freeze'}. "
                "Remedy: leave the dual out (update_every=Every(interval, dual_start=None)) or let it wait, let the "
                "learning rate decay before the freeze, or leave penalty, rho and update_every at their defaults.",
                ConvergenceWarning,
                stacklevel=stacklevel,
            )
            return
        step, rho = int(self._get("admm_frozen_at")), self._get("admm_rho")
        if rho == 0:
            cause = "no penalty was in force (rho = 0), so this is one-shot magnitude pruning"
            remedy = "leave rho at its default and give total_steps"
        elif self.plan.freeze_at is not None and step < self.plan.freeze_at:
            cause = f"finalize() came after {step} steps, and the penalty was to rise until step {self.plan.freeze_at}"
            remedy = "train to the end, or give the true number of optimizer steps as total_steps"
        elif 0 < 2 * self._get("admm_far_weights") <= len(self.selection):
            cause = "this weight had no gradient for long, or its learning rate is far from the others'"
            remedy = "train it, or leave it dense by a select rule"
        elif self.penalty == "gradient":
            cause = (
                f"the penalty in the gradient (rho = {rho:.3g}) has not brought the pruned weights to zero in {step} "
                f"steps of {type(self.inner).__name__}; a step moves a weight by no more than about the learning rate "
                "under Adam and its kin, and by learning rate * rho * distance under SGD"
            )
            remedy = "leave penalty at its default, or use a larger rho, a longer run, or a larger learning rate"
        elif churn > _RESTLESS and self._get("admm_dual_in_use"):
            cause = f"the last z-step still replaced {churn:.0%} of the kept places: {_WHY_RESTLESS}"
            remedy = (
                "leave the dual out (update_every=Every(interval, dual_start=None)) or let it wait until the mask has "
                "settled, or leave penalty, rho and update_every at their defaults"
            )
        else:
            cause = f"the pull toward the pattern was weak (rho = {rho:.3g} after {step} steps)"
            remedy = "leave rho at its default and give total_steps, so that rho rises far enough, or a larger rho"
        name = self.selection.weights[int(self._get("admm_worst_weight"))].name
        warnings.warn(
            f"the run has not reached its pattern: projecting the weights changed them by {residual:.1%} of their "
            f"norm (tolerance {self.residual_tolerance:.1%}), most of all {name!r}, by {worst:.1%}, so accuracy "
            f"measured before does not hold. Likely cause: {cause}. Remedy: {remedy}.",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )

    # ------------------------------------------------------------------ looking at a run

    @property
    def rho(self) -> float:
        """The penalty in force."""
        return float(self._get("admm_rho"))

    @property
    def phase(self) -> str:
        """``"dense"`` (no penalty yet), ``"constrained"`` or ``"frozen"``."""
        if self.frozen:
            return "frozen"
        return "constrained" if self.rho > 0 else "dense"

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return name -> boolean mask of each prunable weight, True = kept, shaped and sharded like the weight."""
        return {bound.spec.name: wrap_like(self._mask(bound).clone(), bound.param) for bound in self._bound()}

    @torch.no_grad()
    def auxiliary(self, name: str) -> Tensor:
        """Return the auxiliary weight z of one prunable weight, a point of the NxM set.

        Args:
            name: the weight's name in the model.

        Returns:
            A new tensor shaped and sharded like the weight, in the dtype of the state, or of the weight where the state
            is a mask; once frozen, the weight itself.

        Raises:
            KeyError: no prunable weight has that name.
        """
        bound = self._find(name)
        return wrap_like(self._auxiliary(bound), bound.param)

    @torch.no_grad()
    def dual(self, name: str) -> Tensor:
        """Return the scaled dual u of one prunable weight.

        Args:
            name: the weight's name in the model.

        Returns:
            A new tensor shaped and sharded like the weight, in the dtype of the state, or of the weight where the state
            is a mask; once frozen, zeros.

        Raises:
            KeyError: no prunable weight has that name.
        """
        bound = self._find(name)
        v = self._consensus_or_initial(bound)
        u = torch.zeros_like(bound.w) if is_mask(v) else self._form.dual(v, *bound.grouping)
        return wrap_like(u, bound.param)

    @torch.no_grad()
    def residuals(self) -> Residuals:
        """Measure how far the run is from its pattern. Waits for the device; a collective where weights are sharded.

        Returns:
            Primal and dual residual and mask churn, overall and per weight.
        """
        bounds = self._bound()
        unmeasured = torch.full((4,), float("nan"))
        rows = []
        for bound in bounds:
            w, z = self._training_weight(bound), self._auxiliary(bound)
            movement = unmeasured.new_zeros(4) if self.frozen else self._movement.get(bound.spec.name, unmeasured)
            rows.append(torch.cat([admm.primal_sums(w, z), movement.to(w.device)]).to(bounds[0].param.device))
        table = reduce_sums(rows, [bound.param for bound in bounds])

        def figures(row: list[float]) -> tuple[float, float, float]:
            gap, norm, moved, norm_then, gained, kept = row
            return ratio(gap, norm), ratio(moved, norm_then), gained / kept if kept else 0.0

        per_weight = {
            bound.spec.name: WeightResidual(*figures(row)) for bound, row in zip(bounds, table.tolist(), strict=True)
        }
        unmeasured_rows = table[:, 2:].isnan().all(1)
        if not unmeasured_rows.all():
            table[unmeasured_rows, 2:] = 0.0  # a weight that never had a gradient: its z stands still
        return Residuals(*figures(table.sum(0).tolist()), per_weight)

    # ------------------------------------------------------------------ the projected model

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Let the model hold the projected weights, P(w + u), within a ``with`` block.

        On leaving, the training weights are back bit for bit. Needs memory for a copy of the prunable weights.
        """
        if self._backup is not None:
            yield
            return
        self._swap_in()
        try:
            yield
        finally:
            self._swap_out()

    def eval(self) -> None:
        """Let the model hold the projected weights until :meth:`train` is called, so that what is evaluated (and
        saved) is what will ship. Puts the inner optimizer into its evaluation mode first, if it has one."""
        if callable(inner_eval := getattr(self.inner, "eval", None)):
            inner_eval()
        if self._backup is None:
            self._swap_in()

    def train(self) -> None:
        """Bring the training weights back, bit for bit, and the inner optimizer into its training mode.

        A weight that was changed while the model held the projected weights (a checkpoint was loaded into the model)
        is what training goes on from, and its ADMM state starts anew from it.
        """
        self._swap_out()
        if callable(inner_train := getattr(self.inner, "train", None)):
            inner_train()

    @torch.no_grad()
    def _swap_in(self) -> None:
        backup = {}
        for bound in [] if self.frozen else self._bound():
            z, _ = self._projected(bound)
            backup[bound.spec.name] = wrap_like(bound.w.clone(), bound.param)
            bound.w.copy_(z)
        self._backup = backup
        self._set(admm_projected=1)

    @torch.no_grad()
    def _swap_out(self) -> None:
        if self._backup is None:
            return
        bounds = [bound for bound in self._bound() if bound.spec.name in self._backup]
        changed = []
        for bound in bounds:
            z, _ = self._projected(bound)
            same = (bound.w == z) | (bound.w.isnan() & z.isnan())
            changed.append((~same).sum().reshape(1).to(bounds[0].param.device))
        counts = reduce_sums(changed, [bound.param for bound in bounds]).flatten().tolist() if bounds else []
        for bound, count in zip(bounds, counts, strict=True):
            v = self._consensus(bound)
            if not count:
                bound.w.copy_(local(self._backup[bound.spec.name]))
            elif v is not None:
                v.copy_(self._form.initial(bound.w, *bound.grouping, v.dtype))
                self._form.follow(self._backend(v.device), bound.w, v, 0.0, self._get("admm_rho"))
                self._movement.pop(bound.spec.name, None)
        self._backup = None
        self._set(admm_projected=0)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, the ADMM state in it; only tensors and plain values.

        Saved in evaluation mode, it also holds the weights that training goes on from.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if self._read_freeze_residual(everywhere=False) and not self._announced:
            self._warn_if_far(stacklevel=3)  # a run may end without finalize(); what it saves must not pass in silence
        self._announce_keys()
        state_dict = self.inner.state_dict()
        if self._backup:
            order = self._order()
            state = dict(state_dict["state"])
            for bound in self._bound():
                key = order[id(bound.param)]
                state[key] = {**state.get(key, {}), PRIMAL: self._backup[bound.spec.name]}
            state_dict = {**state_dict, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @torch.no_grad()
    def _announce_keys(self) -> None:
        """Let loaders that fill a state dict in place find our keys, where the inner optimizer has state before its
        first step (Adagrad) or was wrapped in the middle of a run. The first step makes v anew."""
        for bound in self._bound() if self._get("admm_step") == 0 else []:
            state = self.inner.state.get(bound.param)
            if state and CONSENSUS not in state:
                state[CONSENSUS] = wrap_like(self._consensus_or_initial(bound), bound.param)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a state dict of the inner optimizer alone (ADMM then starts anew).

        The model's weights are not part of it: load them too. State keeps its own dtype.

        Args:
            state_dict: not changed.

        Raises:
            ValueError: the checkpoint does not fit the model, the selection or the pattern; nothing is loaded then.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        inner_part, own, stepped = split(state_dict)
        saved_counters = counters_of(state_dict, len(self.selection))
        order, bounds = self._order(), self._bound()
        entries = {}
        for bound in bounds:
            position = order[id(bound.param)]
            entries[bound.spec.name] = own.pop(position, {})
            entry, was_stepped = entries[bound.spec.name], stepped.get(position, False)
            check_entry(bound.spec, entry, was_stepped, saved_counters)
        if own:
            raise ValueError(
                f"the checkpoint has ADMM state for {len(own)} parameters that are not selected here (positions "
                f"{sorted(own)} in the optimizer); build ADMMNxM with the selection that the checkpoint was made with"
            )
        mine = self._fingerprint()
        if saved_counters["admm_step"] > 0 and saved_counters["admm_selection"] not in (0, mine):
            self._refuse_another_state(saved_counters["admm_selection"], entries.values())
        for bound in bounds:
            check_kind(bound.spec, entries[bound.spec.name], saved_counters, self._state_dtype_of(bound))
        self._check_plan_goes_on(saved_counters)
        self.inner.load_state_dict(inner_part)
        self._set(**{**saved_counters, "admm_selection": mine})
        self._announced = False
        self._movement.clear()
        self._freeze_sums = None
        self._backup = {} if saved_counters["admm_projected"] else None
        for bound in self._bound():
            entry = entries[bound.spec.name]
            if CONSENSUS in entry:
                v = self._adopt(bound, entry[CONSENSUS])
                self.inner.state[bound.param][CONSENSUS] = v
            if PRIMAL in entry and self._backup is not None:
                part = local(entry[PRIMAL]).to(device=bound.w.device, dtype=bound.w.dtype, copy=True)
                self._backup[bound.spec.name] = wrap_like(part, bound.param)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _refuse_another_state(self, saved: int | float, entries: Iterable[Mapping[str, Tensor]]) -> None:
        """Say why a checkpoint with this fingerprint does not fit."""
        other = form_of(self.penalty, full=not self._full)
        if saved != fingerprint(self.selection, self._places, other.stores):
            raise ValueError(
                "the checkpoint was made with another selection, pattern, grouped dimension or form of the penalty, "
                "under which its ADMM state means something else; build ADMMNxM as it was built then"
            )
        dtypes = {entry[CONSENSUS].dtype for entry in entries if CONSENSUS in entry}
        floating = sorted(str(dtype) for dtype in dtypes if dtype.is_floating_point)
        remedy = "torch.bool" if is_lean(other) else " or ".join(floating) or "the floating-point dtype of that run"
        raise ValueError(
            f"the checkpoint's run stored {other.stores}, and what is stored here is {self._form.stores}; build "
            f"ADMMNxM with state_dtype={remedy}"
        )

    def _check_plan_goes_on(self, saved: Mapping[str, int | float]) -> None:
        step, rho = int(saved["admm_step"]), saved["admm_rho"]
        if saved["admm_frozen_at"] < 0 and saved["admm_dual_in_use"] and self.plan.rho(step) < rho:
            raise ValueError(
                f"the checkpoint has rho = {rho:.4g} at step {step} with the dual in use, and the schedule built here "
                f"(total_steps={self.total_steps}) goes on from {self.plan.rho(step):.4g}; rho may not fall then. "
                "Build ADMMNxM with the schedule of the checkpoint's run; to train longer, extend the frozen phase by "
                "giving freeze_at"
            )

    def _adopt(self, bound: _Bound, saved: Tensor) -> Tensor:
        """Bring a saved v or mask to the weight's device and the state's dtype, as a tensor of our own."""
        part = local(saved).to(bound.w.device, copy=True)
        dtype = self._state_dtype_of(bound)
        if self.frozen:
            # Loaders that write in place have put the mask into floating-point numbers.
            part = stored_as(unpack(part) if is_mask(part) else part != 0, self._mask_dtype(bound))
        elif part.dtype != dtype:
            part = self._form.recast(part, *bound.grouping, dtype)
        return wrap_like(part, bound.param)

    @torch.no_grad()
    def unwrap(self) -> Optimizer:
        """Take ADMM off: w itself is back in the weights, and the inner optimizer has nothing of ADMM in its state.

        For a run that begins again with other settings, or without ADMM. A mask that is frozen has done its work: the
        weights stay sparse, and nothing holds them there any more. The wrapper starts anew if it is stepped again.

        Returns:
            The inner optimizer.
        """
        self._swap_out()
        for bound in self._bound():
            state = self.inner.state.get(bound.param)
            if state is None or CONSENSUS not in state:
                continue
            if not self.frozen and self.rho > 0:
                bound.w.copy_(self._form.primal(bound.w, local(state[CONSENSUS]), self.rho))
            del state[CONSENSUS]
        for group in self.param_groups:
            for key in COUNTERS:
                group.pop(key, None)
        self._movement.clear()
        self._freeze_sums = None
        self._announced = False
        return self.inner

    # ------------------------------------------------------------------ where things are

    @property
    def _form(self) -> Form:
        return form_of(self.penalty, full=self._full)

    def _backend(self, device: torch.device) -> Backend:
        return backend_for(device, self.backend)

    def _prepare(self) -> None:
        """Let the backends compile what they will need."""
        for bound in self._bound():
            self._backend(bound.w.device).prepare(bound.w, self._state_dtype_of(bound), bound.spec.pattern)

    def _fingerprint(self) -> int:
        return fingerprint(self.selection, self._places, self._form.stores)

    def _get(self, key: str) -> int | float:
        value: int | float = self.param_groups[0].get(key, COUNTERS[key])
        return value

    def _set(self, **values: int | float) -> None:
        for group in self.param_groups:
            group.update(values)

    def _order(self) -> dict[int, int]:
        """Parameter id -> position in the state dict."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        return {id(p): position for position, p in enumerate(params)}

    def _bound(self) -> list[_Bound]:
        bounds = []
        for spec, (g, i) in zip(self.selection, self._places, strict=True):
            group = self.param_groups[g]
            if i >= len(group["params"]):
                raise ValueError(
                    f"weight {spec.name!r} was parameter {i} of group {g} at construction, and the group now has "
                    f"{len(group['params'])}: parameters were joined or partitioned (ZeRO, flat FSDP1), and their "
                    "groups are torn apart. Shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
                )
            bounds.append(_Bound(spec, group["params"][i], bool(group.get("maximize", False))))
        return bounds

    def _find(self, name: str) -> _Bound:
        spec = self.selection[name]
        return next(bound for bound in self._bound() if bound.spec is spec)

    def _state_dtype_of(self, bound: _Bound) -> torch.dtype:
        if is_lean(self._form):
            return self._mask_dtype(bound)
        return self.state_dtype or bound.param.dtype

    def _mask_dtype(self, bound: _Bound) -> torch.dtype:
        """How the mask is stored. The frozen mask of a form with a buffer stays of the weight's shape, in which
        checkpoints that are loaded in place know it."""
        return PACKED if is_lean(self._form) and rows_divide_into_bytes(bound.param) else torch.bool

    def _seed(self, bound: _Bound, step: int) -> int | None:
        """Seed of the stochastic rounding of one weight at one step; None rounds to nearest."""
        if self.state_rounding == "nearest":
            return None
        return zlib.crc32(f"{bound.spec.name} {step}".encode())

    def _consensus(self, bound: _Bound) -> Tensor | None:
        """This rank's part of the stored v (once frozen, the mask); None before the weight's first step."""
        v = self.inner.state.get(bound.param, {}).get(CONSENSUS)
        return None if v is None else local(v)

    def _consensus_or_initial(self, bound: _Bound) -> Tensor:
        """The same, or what it would start from: a weight that never had a gradient has not moved since."""
        v = self._consensus(bound)
        if v is None:
            v = self._initial(bound, self._training_weight(bound))
        return v

    def _initial(self, bound: _Bound, weight: Tensor) -> Tensor:
        """The state that a weight starts from; once frozen, its mask."""
        state = self._form.initial(weight, *bound.grouping, self._state_dtype_of(bound))
        if not self.frozen:
            return state
        return stored_as(self._form.mask(state, *bound.grouping), self._mask_dtype(bound))

    def _mask(self, bound: _Bound) -> Tensor:
        """The boolean mask in force."""
        state = self._consensus_or_initial(bound)
        return unpack(state) if self.frozen else self._form.mask(state, *bound.grouping)

    def _auxiliary(self, bound: _Bound) -> Tensor:
        if self.frozen:
            return self._projected(bound)[0]
        return self._form.auxiliary(self._training_weight(bound), self._consensus_or_initial(bound), *bound.grouping)

    def _training_weight(self, bound: _Bound) -> Tensor:
        backup = None if self._backup is None else self._backup.get(bound.spec.name)
        return bound.w if backup is None else local(backup)

    def _projected(self, bound: _Bound) -> tuple[Tensor, Tensor]:
        weight = self._training_weight(bound)
        if self.frozen:
            mask = self._mask(bound)
            return torch.where(mask, weight, torch.zeros_like(weight)), mask
        state = self._consensus_or_initial(bound)
        return self._form.projected(weight, state, *bound.grouping, self._factor(bound), self._get("admm_rho"))

    def _factor(self, bound: _Bound) -> Factor | None:
        """What the projection ranks by beside the magnitude; None where there is nothing."""
        if self.saliency is None:
            return None
        state = self.inner.state.get(bound.param, {})
        return self.saliency(
            {key: local(value) if torch.is_tensor(value) else value for key, value in state.items()}, bound.w.shape
        )

    def _active(self) -> list[tuple[_Bound, Tensor]]:
        """The weights that have a gradient, each with its v (or mask), newly made in its first step."""
        first = self._get("admm_step") == 0
        present = [
            (bound, None if first else self._consensus(bound))
            for bound in self._bound()
            if bound.param.grad is not None
        ]
        for bound, v in present:
            if v is None:
                self._check_unchanged(bound)
        return [(bound, self._come_in(bound) if v is None else v) for bound, v in present]

    def _come_in(self, bound: _Bound) -> Tensor:
        """Make the state of a weight that holds w, and leave the weight as all others are held between steps."""
        v = self._initial(bound, bound.w)
        if not self.frozen:
            self._form.follow(self._backend(v.device), bound.w, v, 0.0, self._get("admm_rho"))
        return v

    def _store(self, active: list[tuple[_Bound, Tensor]]) -> None:
        """Put new state beside the inner optimizer's own, after the step in which that was created."""
        for bound, v in active:
            state = self.inner.state[bound.param]
            if CONSENSUS not in state or local(state[CONSENSUS]) is not v:
                state[CONSENSUS] = wrap_like(v, bound.param)
        if self._get("admm_step") == 0:
            # A loader may have been shown the state of a weight that turns out to have no gradient yet.
            stepped = {bound.spec.name for bound, _ in active}
            for bound in self._bound():
                if bound.spec.name not in stepped and self._consensus(bound) is not None:
                    self.inner.state[bound.param][CONSENSUS] = wrap_like(self._come_in(bound), bound.param)
            # torch.distributed.checkpoint wants an entry for all parameters or for none; a stateless inner optimizer
            # has none of its own.
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.inner.state.setdefault(p, {})

    def _check_unchanged(self, bound: _Bound) -> None:
        """Parameters may have been exchanged since construction; their shape and grouping must have survived."""
        if tuple(bound.param.shape) != bound.spec.shape:
            raise ValueError(
                f"weight {bound.spec.name!r} had shape {bound.spec.shape} at construction and now has "
                f"{tuple(bound.param.shape)}: it was flattened or partitioned, and its groups are torn apart. Shard "
                "with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if bound.param.grad is not None and bound.param.grad.layout != torch.strided:
            raise ValueError(f"weight {bound.spec.name!r} has a {bound.param.grad.layout} gradient; dense is needed")
        check_sharding(bound.spec.name, bound.param, bound.spec.dim, bound.spec.pattern.group)


def _check_state(penalty: Penalty, dtype: object, rounding: object) -> None:
    """Refuse a state that the form cannot have."""
    allowed = ", ".join(map(str, TRAINABLE_DTYPES))
    if dtype is not None and dtype not in TRAINABLE_DTYPES:
        if not is_lean(FORMS[penalty]):
            raise ValueError(f"state_dtype={dtype!r} must be one of {allowed}, or None for the weights' own")
        if dtype is not torch.bool:
            raise ValueError(
                f"state_dtype={dtype!r} must be one of {allowed}, torch.bool for the mask alone, or None for that "
                "where the weights have 32 bits or more"
            )
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'state_rounding={rounding!r} must be "nearest" or "stochastic"')
    if rounding == "stochastic" and (dtype is not torch.bfloat16 or is_lean(FORMS[penalty])):
        raise ValueError(
            'state_rounding="stochastic" needs state_dtype=torch.bfloat16 and a form whose state adds up changes, '
            f'penalty="proximal" or "gradient"; here are state_dtype={dtype} and penalty="{penalty}"'
        )


def _is_full(penalty: Penalty, dtype: torch.dtype | None, weights: Iterable[torch.dtype]) -> bool:
    """Decide whether the state is a floating-point tensor of the weight's size, in a form that can do without."""
    if dtype is None:
        # In 16 bits, w made of what the model holds would be off by what 16-bit training lives on.
        return not is_lean(FORMS[penalty]) or any(weight.itemsize < 4 for weight in weights)
    return dtype is not torch.bool


def _saliency_of(saliency: object, penalty: Penalty) -> Saliency | None:
    """Fill in the form's default, and refuse what it cannot rank by; None is magnitude."""
    possible = FORMS[penalty].takes_saliency
    if saliency is None:
        return Curvature() if possible else None
    if saliency == "magnitude":
        return None
    ranking = Curvature() if saliency == "curvature" else saliency
    if isinstance(ranking, str) or not callable(ranking):
        raise ValueError(
            f'saliency={saliency!r} must be "curvature", "magnitude", Curvature(exponent) or a callable '
            "(state of the inner optimizer, shape) -> factor"
        )
    if not possible:
        raise ValueError(
            f'saliency={saliency!r} needs penalty="lazy": with penalty="{penalty}" the mask is read off the '
            'consensus by magnitude; use saliency="magnitude" or leave it out'
        )
    ranking_: Saliency = ranking
    return ranking_


def _alike(
    active: list[tuple[_Bound, Tensor]],
) -> dict[tuple[torch.device, bool], tuple[list[_Bound], list[Tensor]]]:
    """Sort weights and their states by device and by the direction in which their group optimises."""
    groups: dict[tuple[torch.device, bool], tuple[list[_Bound], list[Tensor]]] = {}
    for bound, v in active:
        bounds, states = groups.setdefault((bound.w.device, bound.maximize), ([], []))
        bounds.append(bound)
        states.append(v)
    return groups
