"""ADMMNxM: the life of a run, around any torch optimizer."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import checkpoint
from .consensus import primal_sums
from .diagnosis import diagnose_loaded
from .exact import ExactStep
from .inner import check_inner, has_no_effect, is_capturing, load_or_restore, raw_step, share_step_hooks
from .paper import PenaltyStep
from .pattern import Pattern
from .progress import Figures, Progress
from .projection import keep_mask, project, zero_outside
from .residuals import Residuals, measure
from .run import Run, check_finite
from .schedules import Penalty, Schedule, UpdateSchedule, make_plan, make_timeline
from .selection import Ineligible, Select, Selection, select_weights, unwrap_model, with_late_weights
from .sharding import local, reduce_sums, wrap_like
from .sparsity import SparsityReport, check_weights
from .statistics import refuse_compiled
from .weights import CONSENSUS, MASK, Weight, Weights

__all__ = ["ADMMNxM", "ConvergenceWarning"]

_HOOKS_OF_ITS_OWN = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def _inner_attribute(name: str, doc: str) -> Any:
    return property(
        lambda self: getattr(self.inner, name), lambda self, value: setattr(self.inner, name, value), doc=doc
    )


class ConvergenceWarning(UserWarning):
    """The weights were pruned before the run had prepared them for it."""


class ADMMNxM(Optimizer):
    """Brings the prunable weights of a model into NxM semi-structured form while any inner optimizer trains it.

    The loop stays as it was. Until ``prune_at`` each step is the inner optimizer's own, bit for bit. In the last steps
    before that, hooks gather the second moments A and G of each layer's inputs and output gradients. Then the layer
    problems are solved (:func:`admm_nxm.solve`), and the rest of the run trains what was kept under frozen masks.
    :meth:`finalize` counts the result. :meth:`paper` builds the form of the paper.

    The parameters hold w at all times. Attributes that ADMMNxM lacks are looked up on the inner optimizer.

    Args:
        optimizer: the inner optimizer, any ``torch.optim.Optimizer`` whose ``step()`` works without a closure.
        model: the module that is trained.
        pattern: pattern of the default selection rules, such as ``"2:4"`` or ``Pattern(2, 4)``.
        total_steps: number of optimizer steps of the whole run; may be left out if ``prune_at`` is given.
        prune_at: the step after which the weights are pruned, an int, or a float: the share of the run, by default
            0.85. 0 begins with a model that is pruned already (:func:`admm_nxm.prune`), and keeps its zeros.
        w_step: ``"exact"`` solves ADMM's w-step in closed form; ``"optimizer"``, or a :class:`Penalty` with rho and
            the update schedule, leaves it to the inner optimizer, as the paper does.
        calibration_steps: steps in which A and G of one window of weights are gathered; by default 16, or a fifth of
            a short run.
        statistics_memory: bytes that A and G may take at a time; by default 4 a prunable weight and at least 256 MB.
            Weights that need more are calibrated and solved in several windows, one after the other.
        select: rules that replace the default selection: a mapping from regular expressions (whole parameter name,
            first match wins) to a Pattern, its spelling or None (leave dense), or a callable ``(name, module)``.
        dims: regular expression -> grouped dimension, where the module's input dimension is not the one.
        ineligible: ``"error"`` or ``"skip"``, for weights that the rules ask for and that cannot be pruned (frozen,
            not held by the inner optimizer, width no multiple of the group, not floating point).

    Raises:
        TypeError, ValueError: bad input; the message says the value, what is allowed and the remedy.

    Source: Holmes, Zhang, He, Wu, NxMTransformer (arXiv 2110.15766); Boyd et al. 2011, section 3.1.1; Martens and
    Grosse 2015 (arXiv 1503.05671) for the model of the loss.
    """

    inner: Optimizer
    """The wrapped optimizer."""

    total_steps: int | None
    calibration_steps: int
    """Calibration steps of each window; 0 in the paper's form."""

    _step_supports_amp_scaling = False  # a scaler must unscale and skip by itself, whatever the inner optimizer can do
    _run: Run
    _w_step: ExactStep | PenaltyStep

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        pattern: Pattern | str = "2:4",
        total_steps: int | None = None,
        prune_at: int | float | None = None,
        w_step: Literal["exact", "optimizer"] | Penalty = "exact",
        calibration_steps: int | None = None,
        statistics_memory: int | None = None,
        select: Select | None = None,
        dims: Mapping[str, int] | None = None,
        ineligible: Ineligible = "error",
    ) -> None:
        check_inner(optimizer, ADMMNxM)
        if w_step not in ("exact", "optimizer") and not isinstance(w_step, Penalty):
            raise ValueError(f'w_step={w_step!r} must be "exact", "optimizer" or a Penalty(rho=..., update_every=...)')
        exact = w_step == "exact"
        module = unwrap_model(model) if isinstance(model, nn.Module) else None
        if exact and module is None:
            raise TypeError(
                f'model is a {type(model).__name__}, and w_step="exact" watches the passes of modules; pass the '
                "torch.nn.Module itself, or use ADMMNxM.paper(...)"
            )
        given = {"calibration_steps": calibration_steps, "statistics_memory": statistics_memory}
        wrong = [key for key, value in given.items() if value is not None and not exact]
        if wrong:
            raise TypeError(f'for w_step="exact" alone: {" and ".join(wrong)}; leave out here')
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        selection, params = select_weights(
            model, Pattern.parse(pattern), select, dims=dims, ineligible=ineligible, held=held
        )
        weights = Weights(selection, params, module)
        weights.check_placement()
        step: ExactStep | PenaltyStep
        if exact:
            refuse_compiled(model)  # type: ignore[arg-type]
            windows = weights.assign_windows(statistics_memory)
            timeline = make_timeline(total_steps, prune_at, calibration_steps, windows)
            if calibration_steps is None and timeline.few_calibration_steps is not None:
                warnings.warn(timeline.few_calibration_steps, stacklevel=2)
            step = ExactStep(timeline)
            selection = weights.note_unobserved(selection)
        else:
            penalty = w_step if isinstance(w_step, Penalty) else Penalty()
            step = PenaltyStep(make_plan(penalty, total_steps, prune_at))
        self.__setstate__(
            {
                "inner": optimizer,
                "total_steps": total_steps,
                "calibration_steps": step.timeline.calibration_steps if isinstance(step, ExactStep) else 0,
                "_w_step": step,
                "_run": Run(optimizer, selection, weights, Progress(optimizer)),
            }
        )
        with torch.no_grad():
            self._begin()

    @classmethod
    def paper(
        cls,
        optimizer: Optimizer,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        rho: float | Schedule = 1e-2,
        update_every: int | UpdateSchedule | None = None,
        **options: Any,
    ) -> ADMMNxM:
        """Build the paper's form: the inner optimizer does the w-step, with the penalty in its gradient.

        z and u move together from the start; after ``prune_at``, by default 70 % of the run, the kept weights are
        fine-tuned under the frozen mask.

        Args:
            optimizer: the inner optimizer.
            model: the module, or its ``named_parameters()``.
            rho: penalty, in units of the loss per squared weight; it wants tuning, by factors of 10.
            update_every: steps between two z/u updates; by default a fifteenth of the run.
            options: further arguments of :class:`ADMMNxM`, such as ``pattern`` and ``total_steps``.

        Returns:
            The optimizer.

        Raises:
            TypeError, ValueError: as for :class:`ADMMNxM`.

        Source: Holmes, Zhang, He, Wu, NxMTransformer (arXiv 2110.15766), algorithm 1.
        """
        return cls(optimizer, model, w_step=Penalty(rho, update_every), **options)

    # ------------------------------------------------------------------ the contract of torch.optim.Optimizer

    param_groups = _inner_attribute("param_groups", "The inner optimizer's own parameter groups.")
    state = _inner_attribute("state", "The inner optimizer's own per-parameter state.")
    defaults = _inner_attribute("defaults", "The inner optimizer's own defaults.")

    def __getattr__(self, name: str) -> Any:
        # Called for what neither the instance nor the class has. Pickle asks before there is an inner optimizer.
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

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
        if self._run.statistics is not None:
            self._run.statistics.attach()  # a copy made inside calibration watches its own modules

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer. They stay dense, and the report says so."""
        self.inner.add_param_group(param_group)
        self._run.progress.announce()
        run = self._run
        if run.weights.model is not None:
            run.selection = with_late_weights(run.selection, run.weights.model, self.param_groups[-1]["params"])

    def __repr__(self) -> str:
        now = self.figures()
        patterns = ", ".join(sorted({str(weight.pattern) for weight in self.selection}))
        lines = [
            f"ADMMNxM({type(self.inner).__name__})",
            f'pattern {patterns}, w_step "{self.w_step}"',
            f"phase {now.phase}, step {now.step}" + ("" if now.total_steps is None else f" of {now.total_steps}"),
            f"{now.weights} weights with {now.entries:,} entries, "
            + (
                f"to be pruned after step {now.prune_at}"
                if now.pruned_at is None
                else f"{now.sparsity:.1%} of them zero"
            ),
        ]
        if now.model_error is not None:
            lines.append(f"model error {now.model_error:.2g}, mean over weights")
        return "\n  ".join(lines)

    # ------------------------------------------------------------------ a step

    # A compiled training step calls this as it is: what a step does depends on counters, and tracing it again whenever
    # one of them moves would cost minutes.
    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of the inner optimizer, and what the phase of the run asks for.

        Args:
            closure: evaluates the loss and its gradients; called once, first.

        Returns:
            What the closure returns; None without one.

        Raises:
            RuntimeError: within :meth:`projected`, after :meth:`unwrap`, or a CUDA graph is being captured before the
                masks are frozen.
            ValueError: a weight is no longer where it was, has no statistics at the solve, or is not finite.
        """
        run = self._run
        if run.refusal is not None:
            raise RuntimeError(run.refusal)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            run.weights.rebind(self.inner)
            first = run.progress.step == 0
            trial = first and has_no_effect(self.inner)
            if first:
                run.weights.check_placement()
            if not run.progress.frozen:
                self._refuse_to_be_captured()
            pruned = run.pruned()
            # Before the first step, weights may have been loaded since they were pruned, and masks stored by a trial.
            masks = [weight.mask_in_value() if first else weight.mask(self.inner) for weight in pruned]
            for weight, mask in zip(pruned, masks, strict=True):
                if (gradient := weight.gradient) is not None:
                    zero_outside(gradient, mask)  # so that no momentum builds up where nothing may move
                if first:
                    zero_outside(weight.w, mask)
            moving = self._w_step.before(run)
            # Some optimizers drop the gradients in their step.
            stepped = dict.fromkeys(p for group in self.param_groups for p in group["params"] if p.grad is not None)
            raw_step(self.inner, first=first)
            for weight, mask in zip(pruned, masks, strict=True):
                for t in (weight.w, *weight.copies(self.inner)):
                    zero_outside(t, mask)
            run.store_masks(dict(zip((weight.name for weight in pruned), masks, strict=True)), stepped)
            self._w_step.after(run, moving)
            if not trial:  # torch.distributed.checkpoint steps with zero gradients at a zero rate, to learn the keys
                run.progress.step += 1
                self._w_step.advance(run, moving)
        return loss

    def _refuse_to_be_captured(self) -> None:
        if is_capturing(self._run.weights.each[0].w.device):
            raise RuntimeError(
                f"step {self._run.progress.step + 1} was to be captured in a CUDA graph, which would repeat it and "
                "never come to the solve: capture the forward and backward pass alone "
                "(torch.cuda.make_graphed_callables) and call optimizer.step() outside of the graph; once the masks "
                "are frozen, step() may be captured"
            )

    # ------------------------------------------------------------------ the end of a run

    @torch.no_grad()
    def finalize(self) -> SparsityReport:
        """Make sure that the weights satisfy the pattern, and count them as the model holds them.

        A run that ends before its solve is pruned now, with the statistics there are, and a warning. Weights that were
        loaded into the model after the masks were set are projected, and give the mask. Further steps keep the masks;
        doing it again changes nothing. A collective where weights are sharded.

        Returns:
            The count of every group of every prunable weight, with its model error where that is known.

        Warns:
            ConvergenceWarning: the run ended before its solve; weights without the pattern were loaded after it; in
                the paper's form, the weights were far from the pattern when they were projected.

        Raises:
            RuntimeError: within :meth:`projected`, or after :meth:`unwrap`.
            ValueError: a prunable weight has a NaN or an infinity, or is no longer held; nothing is changed then.
        """
        run = self._run
        if run.refusal is not None:
            raise RuntimeError(run.refusal)
        run.weights.rebind(self.inner)
        check_finite(run, list(run.weights))
        strays = self._project_what_was_loaded() if run.progress.frozen else 0
        verdicts = (diagnose_loaded(strays), self._w_step.finish(run))
        run.progress.finalized = 1
        for verdict in verdicts:
            if verdict is not None:
                warnings.warn(verdict, ConvergenceWarning, stacklevel=3)  # past torch's no_grad wrapper
        return check_weights(run.selection, lambda name: run.weights[name].param, run.model_errors)

    def _project_what_was_loaded(self) -> int:
        """Prune by magnitude what is not what the masks left, because somebody has loaded or averaged these weights
        since; return how many did not have the pattern."""
        run = self._run
        weights = list(run.weights)
        device = weights[0].w.device
        strays = [((w.w != 0) & ~w.mask(self.inner)).sum().reshape(1).to(device) for w in weights]
        counts = reduce_sums(strays, [weight.param for weight in weights]).flatten().tolist()
        dense = 0
        for weight, count in zip(weights, counts, strict=True):
            if count:
                pattern, dim = weight.spec.pattern, weight.spec.dim
                z, mask = project(weight.w, pattern, dim), keep_mask(weight.w, pattern, dim)
                dense += not torch.equal(z, weight.w)
                weight.replace_value(self.inner, z, mask)
        return dense

    @torch.no_grad()
    def unwrap(self) -> Optimizer:
        """Take ADMM off, and leave nothing of it in the inner optimizer's state.

        For a run that goes on without ADMM, or begins again with other settings. The weights stay as they are: sparse,
        if they were pruned, and nothing holds them there any more. This wrapper cannot be stepped again.

        Returns:
            The inner optimizer.
        """
        run = self._run
        for weight in run.weights:
            state = self.inner.state.get(weight.param, {})
            for key in (MASK, CONSENSUS):
                state.pop(key, None)
        run.progress.clear()
        run.forget()
        run.refusal = "ADMM was taken off with unwrap(); step the inner optimizer, or build ADMMNxM around it again"
        return self.inner

    def _begin(self, statistics: Mapping[str, Any] | None = None) -> None:
        run = self._run
        self._w_step.begin(run, statistics)
        run.progress.selection = checkpoint.selection_number(run, paper=self.w_step == "optimizer")
        run.progress.announce()

    # ------------------------------------------------------------------ looking at a run

    @property
    def selection(self) -> Selection:
        """The pruned weights with their patterns and dimensions, and the other parameters with the reason."""
        return self._run.selection

    @property
    def w_step(self) -> Literal["exact", "optimizer"]:
        """The way in which ADMM's w-step is done."""
        return self._w_step.name

    @property
    def prune_at(self) -> int:
        """The step after which the weights are pruned."""
        return self._w_step.prune_at

    @property
    def phase(self) -> str:
        """``"dense"``, ``"calibration"`` or ``"frozen"``; the paper's form has ``"admm"`` and ``"frozen"``."""
        return self._w_step.phase(self._run)

    @property
    def frozen(self) -> bool:
        """Whether all masks are set."""
        return self._run.progress.frozen

    @property
    def finalized(self) -> bool:
        """Whether :meth:`finalize` has been called."""
        return bool(self._run.progress.finalized)

    @property
    def rho(self) -> float:
        """The penalty in force in the paper's form; 0 otherwise."""
        return self._run.progress.rho

    def figures(self) -> Figures:
        """Return where the run stands, in plain numbers; does not wait for the device."""
        run, step = self._run, self._w_step
        entries = sum(weight.param.numel() for weight in run.weights)
        zeros = sum(weight.param.numel() * weight.spec.pattern.sparsity for weight in run.pruned())
        errors = dict(run.model_errors)
        return Figures(
            phase=self.phase,
            step=run.progress.step,
            total_steps=self.total_steps,
            prune_at=step.prune_at,
            windows=step.windows,
            windows_solved=run.progress.windows_solved,
            weights=len(run.weights),
            entries=entries,
            sparsity=zeros / entries,
            model_error=sum(errors.values()) / len(errors) if errors else None,
            model_errors=errors,
            rho=run.progress.rho,
            pruned_at=run.progress.pruned_at if run.progress.frozen else None,
        )

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Return name -> boolean mask of each prunable weight, True = kept, shaped and sharded like the weight.

        In the exact form a weight that is not pruned yet keeps all; in the paper's form the mask is that of z.
        """
        run = self._run
        run.weights.rebind(self.inner)
        return {weight.name: wrap_like(self._w_step.mask(run, weight).clone(), weight.param) for weight in run.weights}

    @torch.no_grad()
    def auxiliary(self, name: str) -> Tensor:
        """Return the auxiliary weight z of one prunable weight, a point of the NxM set.

        Args:
            name: the weight's name in the model.

        Returns:
            A new tensor shaped and sharded like the weight; once it is pruned, the weight itself, and before that, in
            the exact form, its projection.

        Raises:
            KeyError: no prunable weight has that name.
        """
        weight = self._find(name)
        return wrap_like(self._w_step.auxiliary(self._run, weight), weight.param)

    @torch.no_grad()
    def dual(self, name: str) -> Tensor:
        """Return the scaled dual u of one prunable weight as :meth:`auxiliary` returns z.

        It is zero in the exact form, where u lives in the solve only.
        """
        weight = self._find(name)
        return wrap_like(self._w_step.dual(self._run, weight), weight.param)

    @torch.no_grad()
    def residuals(self) -> Residuals:
        """Measure how far w is from z. Waits for the device; a collective where weights are sharded.

        Returns:
            Primal and dual residual and mask churn, overall and per weight; the latter two are NaN before z has moved.
        """
        run = self._run
        run.weights.rebind(self.inner)
        weights = list(run.weights)
        unknown = torch.full((4,), 0.0 if run.progress.frozen else float("nan"))
        rows = []
        for weight in weights:
            movement = run.movement.get(weight.name, unknown)
            sums = primal_sums(weight.w, self._w_step.auxiliary(run, weight))
            rows.append(torch.cat([sums, movement.to(sums.device)]).to(weights[0].w.device))
        table = reduce_sums(rows, [weight.param for weight in weights]).tolist()
        return measure({weight.name: row for weight, row in zip(weights, table, strict=True)})

    def _find(self, name: str) -> Weight:
        self._run.weights.rebind(self.inner)
        return self._run.weights[name]

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Let the model hold what it would be if it were pruned now, P(w + u), within a ``with`` block.

        On leaving, the weights are back bit for bit. Needs memory for a copy of the prunable weights.
        """
        run = self._run
        if run.refusal is not None or run.progress.frozen:
            yield
            return
        run.weights.rebind(self.inner)
        backup = {}
        with torch.no_grad():
            for weight in run.weights:
                backup[weight.name] = weight.w.clone()
                weight.w.copy_(self._w_step.target(run, weight))
        run.refusal = "the model holds its projected weights; leave the projected() block first"
        try:
            yield
        finally:
            run.refusal = None
            with torch.no_grad():
                for weight in run.weights:
                    weight.w.copy_(backup[weight.name])

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, with the ADMM state in it; only tensors and plain values.

        Warns:
            ConvergenceWarning: as :meth:`finalize`, once, for a run of the paper's form that may end without it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        run = self._run
        run.weights.rebind(self.inner)
        verdict = self._w_step.verdict(run)
        if verdict is not None:
            warnings.warn(verdict, ConvergenceWarning, stacklevel=2)
        with torch.no_grad():
            if run.progress.step == 0:
                # Where the inner optimizer has state before its first step (Adagrad), loaders look for ours as well.
                for weight in run.weights:
                    if self.inner.state.get(weight.param):
                        for key, part in self._w_step.state(run, weight).items():
                            if weight.stored(self.inner, key) is None:
                                weight.store(self.inner, key, part)
        state_dict = checkpoint.join(run, self.inner.state_dict())
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or a state dict of the inner optimizer alone.

        With the latter ADMM starts from the beginning. The model's weights are not part of it: load them too.

        Args:
            state_dict: not changed.

        Raises:
            ValueError: the checkpoint does not fit the model, the selection or the pattern; nothing is loaded then.

        Warns:
            UserWarning: the checkpoint was made inside a calibration and does not carry its statistics (those of
                torch.distributed.checkpoint do not): the calibration of that window begins again.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        run = self._run
        if run.refusal is not None:
            raise RuntimeError(run.refusal)
        run.weights.rebind(self.inner)
        loaded = checkpoint.check(run, state_dict, paper=self.w_step == "optimizer")
        self._w_step.check_resume(run, loaded.counters, loaded.statistics)
        load_or_restore(self.inner, loaded.inner)
        run.forget()
        run.progress.load(loaded.counters)
        for weight in run.weights:
            for key, part in loaded.own.get(weight.name, {}).items():
                dtype = torch.bool if key == MASK else weight.param.dtype
                weight.store(self.inner, key, local(part).to(weight.w.device, dtype, copy=True))
            if weight.name in loaded.copies:
                weight.copy_flags = dict(loaded.copies[weight.name])
        run.model_errors.update(loaded.model_errors)
        self._begin(loaded.statistics)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)
