"""Make each failure that docs/choosing.md tells of happen, and draw it beside the defaults.

    python examples/benchmarks/accuracy/failures.py            # train, minutes on a CPU
    python examples/benchmarks/accuracy/failures.py --redraw   # from the stored traces

Traces go to docs/results/failures/*.json with the warning that the run gave, pictures to the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Ramp
from batches import Encoded
from network import Classifier, accuracy
from tasks import default_cache, load_task, model_folder

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "results" / "failures"
TASK, LAYERS, STEPS, BATCH, LR, PATTERN, SEED = "supersense", 2, 120, 16, 9e-4, "1:4", 0


@dataclass(frozen=True)
class Failure:
    """A run that goes wrong, or the one that does not.

    Args:
        build: ADMMNxM, or ADMMNxM.paper.
        options: its arguments besides optimizer, model and pattern.
        unused: part of the names of weights that never get a gradient.
    """

    build: Callable[..., ADMMNxM] = ADMMNxM
    options: Mapping[str, Any] = field(default_factory=lambda: {"total_steps": STEPS})
    unused: str | None = None


FAILURES: dict[str, Failure] = {
    "default": Failure(),
    "penalty-too-weak": Failure(ADMMNxM.paper, {"total_steps": STEPS, "rho": 1e-3}),
    "dual-too-early": Failure(
        options={
            "total_steps": STEPS,
            "penalty": "proximal",
            "rho": Ramp(1e-2, 0.3, start=6, stop=84),
            "update_every": Every(2, dual_start=0),
        }
    ),
    "ended-early": Failure(options={"total_steps": 4 * STEPS}),
    "no-penalty": Failure(options={"total_steps": STEPS, "rho": 0.0}),
    "weight-without-gradient": Failure(unused="layer.1.output.dense"),
}


def run(failure: Failure, cache: Path) -> dict[str, Any]:
    """Train once.

    Returns:
        Trace (step, primal_residual, churn), dev accuracy before and after finalize, and the text of the warning.
    """
    task, folder = load_task(TASK, cache), model_folder(cache)
    torch.manual_seed(SEED)
    model = Classifier(folder, LAYERS, len(task.labels)).train()
    named = {name: p for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2}
    unused = [p for name, p in named.items() if failure.unused is not None and failure.unused in name]
    inner = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LR)
    optimizer = failure.build(inner, model, pattern=PATTERN, **failure.options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    dev = Encoded(task.dev, folder, 48, "cpu").all()
    trace: dict[str, list[Any]] = {"step": [], "primal_residual": [], "churn": []}
    for number, batch in enumerate(Encoded(task.train, folder, 48, "cpu").train(BATCH, STEPS, SEED), start=1):
        optimizer.zero_grad()
        cross_entropy(model(batch), batch.labels).backward()  # type: ignore[no-untyped-call]
        for p in unused:
            p.grad = None
        optimizer.step()
        scheduler.step()
        if number % 2 == 0:
            now = optimizer.residuals()
            values = (number, now.primal, None if now.mask_churn != now.mask_churn else now.mask_churn)
            for key, value in zip(trace, values, strict=True):
                trace[key].append(value)
    before = accuracy(model, dev)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.finalize()
    said = [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]
    return {"trace": trace, "dev_before": before, "dev_after": accuracy(model, dev), "warnings": said}


def draw(name: str, record: Mapping[str, Any], default: Mapping[str, Any]) -> bytes:
    """Draw residual and churn of one failure in colour over those of the defaults in grey."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    from plots import STYLE

    with rc_context(STYLE):
        canvas = Canvas(figsize=(6.6, 2.3), layout="constrained")
        for axes, key, title in zip(
            canvas.subplots(1, 2), ("primal_residual", "churn"), ("primal residual", "mask churn"), strict=True
        ):
            for other, colour, label in ((default, "#999999", "defaults"), (record, "#d55e00", name)):
                values = [float("nan") if value is None else value for value in other["trace"][key]]
                axes.plot(other["trace"]["step"], values, color=colour, label=label, linewidth=1.2)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.legend(frameon=False, fontsize=7)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())


def main() -> int:
    """Train what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--redraw", action="store_true", help="draw from the stored traces, train nothing")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    records = {}
    for name, failure in FAILURES.items():
        file = FOLDER / f"{name}.json"
        if not options.redraw:
            record = run(failure, options.cache)
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        records[name] = json.loads(file.read_text(encoding="utf-8"))
        said = "; ".join(records[name]["warnings"]) or "no warning"
        print(f"{name}: dev {records[name]['dev_before']:.1f} -> {records[name]['dev_after']:.1f}; {said}", flush=True)
    for name, record in records.items():
        if name != "default":
            (FOLDER / f"{name}.svg").write_bytes(draw(name, record, records["default"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
