"""The folder that ``admm-nxm train`` writes, and what becomes of the weights if it cannot be written."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..export.card import model_card, write_model_card
from ..io.selection_record import record_selection
from ..report.model import ModelReport
from ..report.plots import plot_history, plot_model_error, plot_sparsity, plot_weights, save_figure
from .classifier import quiet
from .console import note, plain
from .errors import InputError, reason_of

_BESIDE_THE_WEIGHTS = 8 << 20  # bytes: tokenizer, records, pictures
_PICTURES = {
    "history": "loss and share of zeros over the steps",
    "model_error": "model error of each weight: the loss by its quadratic model, as a share of that at zero weights",
    "sparsity": "share of zeros in each weight",
    "weights": "distribution of the pruned weights before and after",
}


@dataclass(frozen=True)
class Trained:
    """Hold the result of a run: its trainer, the model on the CPU with its tokenizer, the selected weights before it,
    the report on the sparse ones (None for a dense run), and the facts that go on record."""

    trainer: Any
    model: Any
    tokenizer: Any
    before: dict[str, Tensor]
    report: ModelReport | None
    facts: dict[str, Any]


def _size(model: Any, dtype: torch.dtype) -> int:
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in model.state_dict().values())


def check_space(model: Any, dtype: torch.dtype, folder: Path, *, checkpoints: bool) -> None:
    """Raise OSError if the disk has no room for what is to be saved; with checkpoints, for two of them besides."""
    needed = _size(model, dtype) + _BESIDE_THE_WEIGHTS
    if checkpoints:
        needed += 2 * 3 * _size(model, torch.float32)  # weights and two moments; the next is written beside the last
    if (free := shutil.disk_usage(folder).free) < needed:
        what = "the model and its checkpoints take" if checkpoints else "the model takes"
        raise OSError(
            f"{what} {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there; make room, or name another disk"
        )


def save(folder: Path, output: Path, trained: Trained) -> None:
    """Write model, tokenizer, records, pictures and model card; if that fails, the weights go where there is room."""
    try:
        _write_model(folder, trained)
        _write_records(folder, trained)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)  # which makes room
        kept = _rescue(output, trained)
        if not isinstance(error, (OSError, SafetensorError)):
            note(f"kept    {kept}")
            raise
        raise InputError(f"--output {output} could not be written: {reason_of(error)}; {kept}") from error


def _write_model(folder: Path, trained: Trained) -> None:
    with quiet():
        trained.model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    if trained.report is not None:
        record_selection(folder, trained.trainer.admm.selection)


def _rescue(output: Path, trained: Trained) -> str:
    """Save the trained model elsewhere, and return where."""
    for place in (output.parent, Path(tempfile.gettempdir()), Path.home()):
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{output.name}-", dir=place))
            _write_model(folder, trained)
        except (OSError, SafetensorError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return f"the trained model is kept in {folder}"
    return "the trained model is lost, as no other disk had room for it either"


def _write_records(folder: Path, trained: Trained) -> None:
    trainer, facts = trained.trainer, _to_publish(trained.facts)
    (folder / "training.json").write_text(json.dumps(plain(facts), indent=2) + "\n", encoding="utf-8")
    # A run that is stopped after its last step is resumed with a further one, at learning rate 0.
    rows = [row for row in trainer.state.log_history if "loss" in row and row["step"] <= trainer.state.max_steps]
    (folder / "README.md").write_text(_about(facts, pictures=trained.report is not None), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "history.jsonl").write_text(lines, encoding="utf-8")
    if trained.report is None:
        return
    admm = trainer.admm
    save_figure(plot_history(rows), folder / "history.svg")
    save_figure(plot_model_error(facts["pruning"]["model_errors"]), folder / "model_error.svg")
    save_figure(plot_sparsity(trained.report), folder / "sparsity.svg")
    save_figure(plot_weights(trained.before, trained.model, select=admm.selection), folder / "weights.svg")
    name = facts["settings"]["model"]
    base_model = None if Path(trained.facts["settings"]["model"]).is_dir() else name
    write_model_card(folder, model_card(trained.report, optimizer=admm), base_model=base_model)


def _to_publish(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts without the folders of this disk: the record goes where the model goes."""
    settings = dict(facts["settings"])
    for key in ("model", "data", "eval_data", "output"):
        place = settings[key]
        if place is not None and (key != "model" or Path(place).is_dir()):  # else the model is a name of the hub
            settings[key] = Path(place).resolve().name
    return {**facts, "settings": settings}


def _about(facts: dict[str, Any], *, pictures: bool) -> str:
    """Return what the model card says beside its section on sparsity."""
    settings, data, accuracy = facts["settings"], facts["data"], facts["accuracy"]
    labels = ", ".join(f"`{' '.join(label.split())}`" for label in data["labels"][:20])
    low, high = accuracy["interval"]
    dense = facts["dense_accuracy"]
    beside = "" if dense is None else f" A dense run with the same settings: {dense['share']:.1%}."
    return (
        f"# {settings['output']}\n\n"
        f"A text classifier, fine-tuned from {settings['model']} on {data['train']:,} texts in "
        f"{settings['steps']:,} steps of {settings['batch_size']} (learning rate {settings['lr']:g}, seed "
        f"{settings['seed']}). Texts are cut to {settings['max_length']} tokens. `training.json` has "
        "all settings and versions.\n\n"
        f"Labels: {labels}{', …' if len(data['labels']) > 20 else ''}.\n\n"
        f"Accuracy: {accuracy['share']:.1%} ({accuracy['correct']:,} of {accuracy['total']:,} held-out texts; 95 % "
        f"interval {low:.1%} to {high:.1%}, for the choice of these texts alone: seeds differ besides).{beside}\n"
        + "".join(f"\n![{shown}]({file}.svg)\n" for file, shown in _PICTURES.items() if pictures)
    )
