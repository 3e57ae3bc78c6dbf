"""Runs of the study that begin alike: a model, a task, a seed, a learning rate, and several methods."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import Optimizer

from admm_nxm import Pattern, keep_mask, solve
from admm_nxm.solver import model_error
from admm_nxm.statistics import Statistics
from batches import Encoded
from methods import METHODS, Dense, Job, Method, dense_steps, weight_of, windows
from network import Classifier, accuracy, logits_of
from plans import DISTILLED, Spec, model_name
from tasks import load_task, model_folder

HEAD_LR = 1e-3
BATCH = 16
MAX_LENGTH = 48
WARMUP = 0.1
REWARM_STEPS = 10
TEMPERATURE = 2.0


def dense_steps_of(spec: Spec) -> int:
    """Return how many steps of a run are those of the dense run."""
    pattern = None if spec.pattern is None else Pattern.parse(spec.pattern)
    return dense_steps(spec.method.removesuffix(DISTILLED), pattern, spec.options, spec.steps)


@functools.lru_cache(maxsize=4)
def encoded(task: str, split: str, cache: Path, device: str) -> Encoded:
    """Tokenise a split once per process."""
    return Encoded(getattr(load_task(task, cache), split), model_folder(cache), MAX_LENGTH, device)


def lr_factor(number: int, steps: int, rewarm: tuple[int, float] | None = None) -> float:
    """Return the learning rate of step ``number``, counted from 1, as a share of its peak.

    Args:
        number: the step.
        steps: length of the run.
        rewarm: a step after which it rises again over ten steps, and to which share; then it falls to zero.

    Returns:
        The share.
    """
    warmup = max(1, round(WARMUP * steps))
    if rewarm is not None and number > rewarm[0]:
        rise = (number - rewarm[0]) / REWARM_STEPS
        return rewarm[1] * min(rise, (steps - number + 1) / max(1, steps - rewarm[0] - REWARM_STEPS))
    return min(number / warmup, (steps - number + 1) / max(1, steps - warmup))


class Run:
    """A model in training.

    Args:
        spec: any of the runs that begin alike.
        cache: what prepare.py filled.
        device: "cpu" or "cuda".
    """

    def __init__(self, spec: Spec, cache: Path, device: str) -> None:
        self.spec, self.cache, self.device = spec, cache, device
        classes = len(load_task(spec.task, cache).labels)
        # Before the seed is set: it may have to be trained first, and draws random numbers then.
        self.teacher = teacher_logits(spec, cache, device) if "teacher_lr" in spec.options else None
        torch.manual_seed(spec.seed)
        self.model = Classifier(model_folder(cache), spec.layers, classes).to(device).train()
        self.modules: dict[str, nn.Module] = {
            f"{name}.weight": module
            for name, module in self.model.named_modules()
            if ".layer." in name and isinstance(module, nn.Linear)
        }
        self.batches = list(encoded(spec.task, "train", cache, device).train(BATCH, spec.steps, spec.seed))

    def inner(self) -> Optimizer:
        """Make AdamW over all trainable parameters; each group knows its peak learning rate."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        head = [p for name, p in named if name.startswith("head.")]
        others = [p for name, p in named if not name.startswith("head.")]
        groups = [{"params": others, "peak": self.spec.lr}, {"params": head, "peak": HEAD_LR}]
        return torch.optim.AdamW(groups, weight_decay=0.01, fused=True)

    def method(self, spec: Spec, inner: Optimizer, done: int) -> Method:
        """Build the method of a run."""
        pattern = None if spec.pattern is None else Pattern.parse(spec.pattern)
        job = Job(inner, self.model, self.modules, pattern, spec.steps, done, spec.options)
        return METHODS[spec.method.removesuffix(DISTILLED)](job)

    def advance(self, method: Method, first: int, last: int, rewarm: tuple[int, float] | None = None) -> None:
        """Do the steps after ``first`` up to ``last``."""
        for number in range(first + 1, last + 1):
            batch = self.batches[number - 1]
            factor = lr_factor(number, self.spec.steps, rewarm)
            for group in method.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            logits = self.model(batch)
            loss = cross_entropy(logits, batch.labels)
            if self.teacher is not None:
                loss = (loss + distillation(logits, self.teacher[batch.rows].to(self.device))) / 2
            method.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            method.step(number)

    def snapshot(self, inner: Optimizer) -> dict[str, Any]:
        """Copy all that a continuation depends on."""
        trained = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        random = {"cpu": torch.get_rng_state()}
        if self.device == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {"parameters": trained, "optimizer": copy.deepcopy(inner.state_dict()), "random": random}

    @torch.no_grad()
    def restore(self, kept: dict[str, Any]) -> Optimizer:
        """Go back to a snapshot; return a new AdamW in the state of the old one."""
        for name, value in kept["parameters"].items():
            self.model.get_parameter(name).copy_(value)
        inner = self.inner()
        inner.load_state_dict(copy.deepcopy(kept["optimizer"]))
        torch.set_rng_state(kept["random"]["cpu"])
        if self.device == "cuda":
            torch.cuda.set_rng_state(kept["random"]["cuda"])
        return inner

    def measure(self, spec: Spec) -> dict[str, Any]:
        """Score the model as its stage wants."""
        split = "test" if spec.stage == "final" else "dev"
        score = round(accuracy(self.model, encoded(spec.task, split, self.cache, self.device).all()), 3)
        return {"dev": None if split == "test" else score, "test": score if split == "test" else None}


def train(specs: Sequence[Spec], cache: Path, device: str) -> Iterator[tuple[Spec, dict[str, Any]]]:
    """Train runs that begin alike; the steps in which they do nothing but dense training are done once.

    Args:
        specs: runs with the same trunk.
        cache: what prepare.py filled.
        device: "cpu" or "cuda".

    Yields:
        Each run and the measured part of its line of raw results.

    Raises:
        ValueError: the runs have no common beginning.
        RuntimeError: the weights are not sparse at the end of a run.
    """
    if len({spec.trunk for spec in specs}) != 1:
        raise ValueError(f"runs that are trained together must begin alike; got {len(specs)} that do not")
    run = Run(specs[0], cache, device)
    inner, at = run.inner(), 0
    dense = Dense(Job(inner, run.model, run.modules, None, specs[0].steps, 0, {}))
    for spec in sorted(specs, key=dense_steps_of):
        run.advance(dense, at, start := dense_steps_of(spec))
        at = start
        kept = run.snapshot(inner)
        began = time.perf_counter()
        method = run.method(spec, run.restore(kept), at)
        rewarm = None
        if "rewarm" in spec.options:
            last = windows(Pattern.parse(str(spec.pattern)), spec.options, spec.steps)[-1]
            rewarm = (last.prune_at, float(spec.options["rewarm"]))
        run.advance(method, at, spec.steps, rewarm)
        error = method.finish()
        for name, module in run.modules.items():
            w = weight_of(module).detach()
            if spec.pattern is not None and bool((w[~keep_mask(w, spec.pattern, -1)] != 0).any()):
                raise RuntimeError(f"{spec} did not end in its pattern: {name}")
        measured = {**run.measure(spec), "model_error": error, "from_step": at}
        yield spec, {**measured, "seconds": round(time.perf_counter() - began, 1)}
        run.restore(kept)


def layers_alone(spec: Spec, cache: Path, device: str) -> Iterator[tuple[Spec, dict[str, Any]]]:
    """Prune one weight at a time, of the dense model at the step of the solve, and measure what that does on dev.

    Args:
        spec: a run of ``admm`` with its default window.
        cache: what prepare.py filled.
        device: "cpu" or "cuda".

    Yields:
        The run, and for each weight: its name, its model error, the same times the model's loss at zero ("predicted"),
        and how dev loss and dev accuracy change.
    """
    began = time.perf_counter()
    run, pattern = Run(spec, cache, device), Pattern.parse(str(spec.pattern))
    (window,) = windows(pattern, spec.options, spec.steps)
    dense = Dense(Job(run.inner(), run.model, run.modules, None, spec.steps, 0, {}))
    run.advance(dense, 0, window.start)
    statistics = Statistics(run.modules)
    statistics.attach()
    run.advance(dense, window.start, window.prune_at)
    statistics.detach()
    loss, score = dev_loss(run)
    for name, module in run.modules.items():
        weight, moments = weight_of(module).detach(), statistics.moments[name]
        assert moments.inputs is not None, "statistics gather A unless told not to"
        assert moments.outputs is not None, "and G"
        original = weight.clone()
        weight.copy_(solve(weight, pattern, moments.inputs, moments.outputs).weight)
        error = model_error(original, weight, moments.inputs, moments.outputs)
        at_zero = (moments.outputs @ original * (original @ moments.inputs)).sum().item() / moments.tokens.item() ** 2
        pruned_loss, pruned_score = dev_loss(run)
        weight.copy_(original)
        yield (
            spec,
            {
                "weight": name,
                "model_error": error,
                "predicted": error * at_zero,
                "loss": round(pruned_loss - loss, 6),
                "dev": round(pruned_score - score, 3),
                "seconds": round(time.perf_counter() - began, 1),
            },
        )


def dev_loss(run: Run) -> tuple[float, float]:
    """Return mean loss and accuracy on dev."""
    split = encoded(run.spec.task, "dev", run.cache, run.device)
    logits, labels = logits_of(run.model, split.all()), torch.tensor(split.labels)
    return cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).float().mean().item()


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of the softened class distributions (Hinton, Vinyals, Dean 2015)."""
    return TEMPERATURE**2 * kl_div(
        log_softmax(student / TEMPERATURE, -1),
        log_softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )


def teacher_logits(spec: Spec, cache: Path, device: str) -> Tensor:
    """Return the dense model's logits of the training rows that the run sees, trained once; other rows are NaN."""
    lr = float(spec.options["teacher_lr"])
    teacher = Spec(spec.task, spec.layers, None, "dense", spec.seed, lr, spec.steps)
    file = cache / "teachers" / device / f"{spec.task}-{spec.layers}-{spec.seed}-{lr:g}-{spec.steps}.pt"
    if not file.exists():
        run = Run(teacher, cache, device)
        run.advance(Dense(Job(run.inner(), run.model, run.modules, None, spec.steps, 0, {})), 0, spec.steps)
        training = encoded(spec.task, "train", cache, device)
        seen = torch.cat([batch.rows for batch in run.batches]).unique()  # type: ignore[no-untyped-call]
        logits = torch.full((len(training), run.model.head.out_features), float("nan"))
        logits[seen] = logits_of(run.model, training.some(seen.tolist()))[seen]
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save(logits, unfinished)
        unfinished.replace(file)
    logits_of_all: Tensor = torch.load(file, weights_only=True)
    return logits_of_all


def line_of(spec: Spec, measured: dict[str, Any], device: str, commit: str, versions: dict[str, str]) -> dict[str, Any]:
    """Return one line of raw results."""
    given = asdict(spec)
    fields = {key: given[key] for key in ("task", "pattern", "method", "seed", "lr", "steps", "stage")}
    provenance = {"device": device, "commit": commit, "versions": versions}
    return {**fields, "model": model_name(spec.layers), "setting": spec.options, **measured, **provenance}
