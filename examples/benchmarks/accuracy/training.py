"""One run of the study: a model, a task, a method, a seed."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from admm_nxm import Pattern, verify
from batches import Encoded
from methods import METHODS, Job
from network import Classifier, accuracy, logits_of
from tasks import load_task, model_folder

HEAD_LR = 1e-3
BATCH = 16
MAX_LENGTH = 48
WARMUP = 0.1
DEV_ROWS_BESIDE_TEST = 1000  # where test is scored, dev chooses nothing any more and only shows what a projection costs
DISTILLED = "+kd"
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Spec:
    """Everything that decides a run's outcome.

    Args:
        task: one of tasks.TASKS.
        layers: encoder layers.
        pattern: spelling of the pattern, None for dense.
        method: a key of methods.METHODS, with ``+kd`` behind it for distillation from the dense run of the same seed.
        seed: of the head, the batches and dropout.
        lr: peak learning rate of the encoder.
        steps: optimizer steps.
        setting: JSON of the method's own hyperparameters.
        stage: see records.py; test is scored in "final" and "budget" only.
        teacher_lr: learning rate of the teacher's dense run, None without distillation.
    """

    task: str
    layers: int
    pattern: str | None
    method: str
    seed: int
    lr: float
    steps: int
    setting: str = "{}"
    stage: str = "final"
    teacher_lr: float | None = None

    @property
    def model(self) -> str:
        return f"MiniLM-L6, first {self.layers} layers"

    def key(self) -> tuple[Any, ...]:
        """What tells one line of the raw results from another."""
        return (
            self.task,
            self.model,
            self.pattern,
            self.method,
            self.seed,
            self.lr,
            self.steps,
            self.setting,
            self.stage,
        )


@functools.lru_cache(maxsize=4)
def encoded(task: str, split: str, cache: Path, device: str) -> Encoded:
    """Tokenise a split once per process."""
    return Encoded(getattr(load_task(task, cache), split), model_folder(cache), MAX_LENGTH, device)


def train(spec: Spec, cache: Path, device: str) -> tuple[Classifier, dict[str, Any]]:
    """Train one model and measure it on dev, and on test where the stage says so.

    Args:
        spec: the run.
        cache: what prepare.py filled.
        device: "cpu" or "cuda".

    Returns:
        The model, and the measured part of its line of raw results, with the trace.

    Raises:
        RuntimeError: the weights are not sparse at the end.
    """
    began = time.perf_counter()
    task = load_task(spec.task, cache)
    # Before the seed is set: it may have to be trained first, and draws random numbers then.
    teacher = teacher_logits(spec, cache, device) if spec.method.endswith(DISTILLED) else None
    torch.manual_seed(spec.seed)
    model = Classifier(model_folder(cache), spec.layers, len(task.labels)).to(device).train()
    named = {name: p for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": model.head.parameters(), "lr": HEAD_LR}]
    inner = torch.optim.AdamW(groups, lr=spec.lr, weight_decay=0.01, fused=True)
    base = spec.method.removesuffix(DISTILLED)
    pattern = None if spec.pattern is None else Pattern.parse(spec.pattern)
    method = METHODS[base](Job(inner, dict(named), pattern, spec.steps, json.loads(spec.setting), spec.seed == 0))
    warmup = max(1, round(WARMUP * spec.steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        method.optimizer, lambda done: min((done + 1) / warmup, (spec.steps - done) / max(1, spec.steps - warmup))
    )
    tested = spec.stage in ("final", "budget")
    training = encoded(spec.task, "train", cache, device)
    dev = encoded(spec.task, "dev", cache, device).all(limit=DEV_ROWS_BESIDE_TEST if tested else None)
    loss_at_projection = None
    for number, batch in enumerate(training.train(BATCH, spec.steps, spec.seed), start=1):
        logits = model(batch)
        loss = cross_entropy(logits, batch.labels)
        if teacher is not None:
            loss = (loss + distillation(logits, teacher[batch.rows].to(device))) / 2
        method.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        method.step(number)
        scheduler.step()
        if (projected := method.at_projection(number)) is not None:
            before = accuracy(model, dev)
            with projected():
                loss_at_projection = before - accuracy(model, dev)
    figures = method.finish()
    if pattern is not None:
        report = verify(dict(named), pattern)
        if not report.ok:
            raise RuntimeError(f"{spec} did not end in its pattern: {report}")
    return model, {
        "dev": round(accuracy(model, dev), 3),
        "test": round(accuracy(model, encoded(spec.task, "test", cache, device).all()), 3) if tested else None,
        "primal_residual": figures.primal_residual,
        "projection_loss": None if loss_at_projection is None else round(loss_at_projection, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "trace": figures.trace,
    }


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of the softened class distributions (Hinton, Vinyals, Dean 2015)."""
    return TEMPERATURE**2 * kl_div(
        log_softmax(student / TEMPERATURE, -1),
        log_softmax(teacher / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )


def teacher_logits(spec: Spec, cache: Path, device: str) -> Tensor:
    """Return the dense model's logits of the training rows; trained once for each task, seed, length and rate."""
    assert spec.teacher_lr is not None, "distillation needs the teacher's learning rate"
    teacher = Spec(spec.task, spec.layers, None, "dense", spec.seed, spec.teacher_lr, spec.steps, stage="tune")
    name = f"{spec.task}-{spec.layers}-{spec.seed}-{spec.teacher_lr:g}-{spec.steps}.pt"
    file = cache / "teachers" / device / name
    if not file.exists():
        model, _ = train(teacher, cache, device)
        logits = logits_of(model, encoded(spec.task, "train", cache, device).all())
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{torch.initial_seed()}.{time.time_ns()}")
        torch.save(logits, unfinished)
        unfinished.replace(file)
    logits_of_all: Tensor = torch.load(file, weights_only=True)
    return logits_of_all


def line_of(spec: Spec, measured: dict[str, Any], device: str, commit: str, versions: dict[str, str]) -> dict[str, Any]:
    """Return one line of raw results."""
    given = asdict(spec)
    fields = {key: given[key] for key in ("task", "pattern", "method", "seed", "lr", "steps")}
    return {
        **fields,
        "model": spec.model,
        **{key: value for key, value in measured.items() if key != "trace"},
        "device": device,
        "commit": commit,
        "versions": versions,
        "setting": json.loads(spec.setting),
        "stage": spec.stage,
    }
