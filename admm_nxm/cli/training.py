"""The run behind ``admm-nxm train``: data, model, fine-tuning, test, and everything that is saved."""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from torch import Tensor
from transformers import DataCollatorWithPadding, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .._version import __version__
from ..export.card import model_card, write_model_card
from ..integrations.transformers import ADMMConfig, ADMMTrainer
from ..io.files import atomic_folder
from ..io.selection_record import record_selection
from ..io.verify import verify
from ..optimizer import ConvergenceWarning
from ..pattern import Pattern
from ..report import model_report
from ..report.history import Recorder
from ..report.plots import plot_history, plot_model_error, plot_sparsity, plot_weights, save_figure
from ..selection import Selection, select_weights
from ..sparsity import SparsityReport
from .classifier import find_device, length_limit, load_classifier, load_tokenizer, quiet
from .commands import as_dict
from .console import Result, note, plain
from .errors import InputError, blaming
from .options import Rules
from .progress import StepProgress
from .texts import Columns, Row, count_labels, held_out, interval, label_names, read_file, split

_LENGTH = 128
_SHORTEST, _PASSES = 200, 3
_DEVICE_OF_ACCELERATE = "ACCELERATE_TORCH_DEVICE"
_READINGS = 50  # of the loss in a run: a reading waits for the device


@dataclass(frozen=True)
class Settings:
    """Hold the options of the user; None where the run chooses."""

    model: str
    data: Path
    output: Path
    pattern: Pattern
    select: Rules | None
    steps: int | None
    batch_size: int
    lr: float
    max_length: int | None
    text_columns: tuple[str, ...]
    label_column: str
    eval_data: Path | None
    seed: int
    device: str
    overwrite: bool


class _Texts(NamedTuple):
    """Texts as the model reads them, with their labels: those to train and those to test on."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    max_length: int


def train(settings: Settings) -> Result:
    """Fine-tune a classifier into the pattern, test it, save it and verify what was saved."""
    import matplotlib as _  # noqa: F401 - the pictures come last, and would be missed then

    started = time.perf_counter()
    if not 1 <= len(settings.text_columns) <= 2:
        raise InputError(f"--text-column is given {len(settings.text_columns)} times; give one, or two for pairs")
    device = find_device(settings.device)
    with ExitStack() as stack:
        read = [place for place in (settings.data, settings.eval_data, settings.model) if place is not None]
        with blaming(f"--output {settings.output}", OSError, ValueError):
            writer = atomic_folder(settings.output, overwrite=settings.overwrite, source=read)
            folder = stack.enter_context(writer)
        facts = _fill(folder, settings, device)
    return _result(settings, facts, verify(settings.output), time.perf_counter() - started)


def _fill(folder: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Do all that the output is made of, and return what there is to tell."""
    note(f"model   {settings.model}{'' if Path(settings.model).is_dir() else ' (no folder here: a name of the hub)'}")
    hint = "; other columns are named with --text-column and --label-column"
    columns = Columns(settings.text_columns, settings.label_column, hint)
    rows = read_file(settings.data, columns)
    note(f"data    {count_labels(rows)}")
    tests = None if settings.eval_data is None else read_file(settings.eval_data, columns, "--eval-data")
    if tests is not None:
        note(f"test    {count_labels(tests)}")
    labels = label_names(rows)
    tokenizer = load_tokenizer(settings.model)
    model, fresh = load_classifier(
        settings.model, labels, tokenizer, seed=settings.seed, max_length=settings.max_length or 1
    )
    if fresh:
        note(f"note    {len(fresh)} weights start at random, as the checkpoint does not have them: {min(fresh)}, ...")
    texts = _encode(settings, rows, tests, labels, model, tokenizer)
    _try_out(settings, model, tokenizer, texts)
    usual = max(_SHORTEST, math.ceil(_PASSES * len(texts.train) / settings.batch_size))
    steps = settings.steps or usual
    selection = _select(settings, model)
    note(f"budget  {steps} steps of {settings.batch_size} texts, lr {settings.lr:g}, seed {settings.seed}, on {device}")
    before = {weight.name: model.get_parameter(weight.name).detach().clone() for weight in selection}
    with tempfile.TemporaryDirectory() as scratch:
        args = _arguments(settings, steps, device, scratch)
        config = ADMMConfig(str(settings.pattern), select=settings.select)
        trainer, notes = _fine_tune(args, config, model, tokenizer, texts)
        assert trainer.admm is not None
        if steps < usual:
            few = f"{steps} steps are few: by default it would be {usual}. The pattern holds all the same, but the rest"
            notes.insert(0, f"{few} of the weights has had little time to make up for what is gone")
        for text in notes:
            note(f"note    {text}")
        accuracy = _accuracy(trainer, texts, labels)
        now = trainer.admm.figures()
    chosen = {"pattern": str(settings.pattern), "steps": steps, "max_length": texts.max_length, "device": str(device)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts = {
        "settings": {**asdict(settings), **chosen},
        "versions": {"admm-nxm": __version__, **versions, "python": platform.python_version()},
        "data": {"labels": labels, "train": len(texts.train), "test": len(texts.test)},
        "accuracy": accuracy,
        "pruning": {
            "pruned_at": now.pruned_at,
            "model_error": now.model_error,
            "model_errors": {**now.model_errors},
        },
        "notes": notes,
    }
    _save(folder, trainer, model, tokenizer, before, facts)
    return facts


def _encode(
    settings: Settings, rows: list[Row], tests: list[Row] | None, labels: list[str], model: Any, tokenizer: Any
) -> _Texts:
    """Turn texts into tokens, leave duplicates out and set the test apart."""
    special = tokenizer.num_special_tokens_to_add(pair=len(settings.text_columns) == 2)
    max_length = settings.max_length or int(min(_LENGTH, length_limit(model, tokenizer)))
    if max_length <= special:
        raise InputError(f"--max-length {max_length} leaves no room beside {special} special tokens; give more")
    everything = rows + (tests or [])
    columns = [list(column) for column in zip(*(row[:-1] for row in everything), strict=True)]
    with quiet():
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    keys = [tuple(ids) for ids in encoded["input_ids"]]
    if tests is None:
        found = split(keys, everything, labels, settings.seed)
    else:
        found = held_out(keys, len(rows), labels, everything)
    shares = f"{len(found.train):,} to train, {len(found.test):,} to test"
    note(f"        {found.distinct:,} of them distinct in their first {max_length} tokens: {shares}")
    place = {label: i for i, label in enumerate(labels)}
    inputs = [
        {**{key: values[i] for key, values in encoded.items()}, "labels": place.get(row[-1], -1)}
        for i, row in enumerate(everything)
    ]
    return _Texts([inputs[i] for i in found.train], [inputs[i] for i in found.test], max_length)


@torch.no_grad()
def _try_out(settings: Settings, model: Any, tokenizer: Any, texts: _Texts) -> None:
    """Pass two texts through the model: what it lacks shows now, and not after the first minutes."""
    batch = DataCollatorWithPadding(tokenizer)(texts.train[:2])
    remedy = "; give a model that transformers can fine-tune as a text classifier"
    with blaming(f"--model {settings.model} fails on the first texts", Exception, remedy=remedy), quiet():
        model.eval()
        model(**batch)


def _select(settings: Settings, model: Any) -> Selection:
    """Choose the weights as the run is going to."""
    with blaming("", ValueError):
        selection, _ = select_weights(model, settings.pattern, settings.select)
    pruned = sum(math.prod(weight.shape) for weight in selection)
    total = sum(parameter.numel() for parameter in model.parameters())
    patterns = ", ".join(sorted({str(weight.pattern) for weight in selection}))
    note(f"prune   {len(selection)} weights, {pruned:,} of {total:,} parameters, to {patterns}; the rest stays dense")
    return selection


def _arguments(settings: Settings, steps: int, device: torch.device, scratch: str) -> TrainingArguments:
    """Return Trainer's settings: as in the quickstart, on exactly one device."""

    class OneDevice(TrainingArguments):
        @property
        def device(self) -> torch.device:
            super().device  # noqa: B018 - sets the process up, for the first GPU if there is one
            return device

        @property
        def n_gpu(self) -> int:
            return int(device.type != "cpu")

    with patch_environment(**{_DEVICE_OF_ACCELERATE: device}):
        args = OneDevice(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=settings.lr,
            warmup_steps=steps // 10,
            weight_decay=0.01,
            seed=settings.seed,
            logging_steps=max(1, steps // _READINGS),
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            use_cpu=device.type == "cpu",
        )
        if args.device.type == "cuda":
            torch.cuda.set_device(device)
    return args


def _fine_tune(
    args: TrainingArguments, config: ADMMConfig, model: Any, tokenizer: Any, texts: _Texts
) -> tuple[ADMMTrainer, list[str]]:
    """Train to the end, and return what the run has to be told about with it."""
    progress = StepProgress()
    remedy = "; give a smaller --batch-size or --max-length"
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="the run is short")  # which a note says in terms of --steps
        trainer = ADMMTrainer(
            model,
            args,
            train_dataset=texts.train,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[progress],
            admm_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        bar = progress.bar if progress.on_terminal else nullcontext()  # older rich prints an empty line for none
        with bar, blaming("", torch.OutOfMemoryError, remedy=remedy), blaming("", ValueError):
            trainer.train()
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    return trainer, [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]


def _accuracy(trainer: ADMMTrainer, texts: _Texts, labels: list[str]) -> dict[str, Any]:
    """Test the model, and the guess that needs none: always the label most frequent in training."""
    with quiet():
        test: Any = texts.test  # a list does for a dataset
        predicted = trainer.predict(test).predictions
    logits = predicted[0] if isinstance(predicted, tuple) else predicted
    truth = [row["labels"] for row in texts.test]
    guess = Counter(row["labels"] for row in texts.train).most_common(1)[0][0]
    correct = sum(int(row.argmax()) == label for row, label in zip(logits, truth, strict=True))
    low, high = interval(correct, len(truth))
    return {
        "correct": correct,
        "total": len(truth),
        "share": correct / len(truth),
        "interval": [low, high],
        "most_frequent_label": labels[guess],
        "most_frequent_share": truth.count(guess) / len(truth),
    }


def _save(
    folder: Path, trainer: ADMMTrainer, model: Any, tokenizer: Any, before: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write model, tokenizer, records, pictures and model card."""
    admm = trainer.admm
    assert admm is not None
    model.to("cpu")
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    published = _to_publish(facts)
    (folder / "training.json").write_text(json.dumps(plain(published), indent=2) + "\n", encoding="utf-8")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    Recorder(admm, rows).save(folder / "history.jsonl")
    record_selection(folder, admm.selection)
    report = model_report(model, admm.selection)
    save_figure(plot_history(rows), folder / "history.svg")
    save_figure(plot_model_error(facts["pruning"]["model_errors"]), folder / "model_error.svg")
    save_figure(plot_sparsity(report), folder / "sparsity.svg")
    save_figure(plot_weights(before, model, select=admm.selection), folder / "weights.svg")
    (folder / "README.md").write_text(_about(published), encoding="utf-8")
    name = facts["settings"]["model"]
    write_model_card(folder, model_card(report, optimizer=admm), base_model=None if Path(name).is_dir() else name)


def _to_publish(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts without the folders of this disk: the record goes where the model goes."""
    settings = dict(facts["settings"])
    for key in ("model", "data", "eval_data", "output"):
        place = settings[key]
        if place is not None and (key != "model" or Path(place).is_dir()):  # else the model is a name of the hub
            settings[key] = Path(place).resolve().name
    return {**facts, "settings": settings}


def _about(facts: dict[str, Any]) -> str:
    """Return what the model card says beside its section on sparsity."""
    settings, data, accuracy = facts["settings"], facts["data"], facts["accuracy"]
    labels = ", ".join(f"`{' '.join(label.split())}`" for label in data["labels"][:20])
    low, high = accuracy["interval"]
    pictures = {
        "history": "loss and share of zeros over the steps",
        "model_error": "what pruning cost each weight, by the quadratic model of the loss",
        "sparsity": "share of zeros in each weight",
        "weights": "distribution of the pruned weights before and after",
    }
    return (
        f"# {settings['output']}\n\n"
        f"A text classifier, fine-tuned from {settings['model']} on {data['train']:,} texts in "
        f"{settings['steps']:,} steps of {settings['batch_size']} (learning rate {settings['lr']:g}, seed "
        f"{settings['seed']}). Texts are cut to {settings['max_length']} tokens. `training.json` has "
        "all settings and versions.\n\n"
        f"Labels: {labels}{', …' if len(data['labels']) > 20 else ''}.\n\n"
        f"Accuracy: {accuracy['share']:.1%} ({accuracy['correct']:,} of {accuracy['total']:,} held-out texts; 95 % "
        f"interval {low:.1%} to {high:.1%}, for the choice of these texts alone: seeds differ besides).\n"
        + "".join(f"\n![{shown}]({file}.svg)\n" for file, shown in pictures.items())
    )


def _result(settings: Settings, facts: dict[str, Any], report: SparsityReport, seconds: float) -> Result:
    out, accuracy, pruning = settings.output, facts["accuracy"], facts["pruning"]
    low, high = accuracy["interval"]
    tested = f"{accuracy['correct']:,} of {accuracy['total']:,} held-out texts right"
    if report.ok:
        verdict = f"verify    ok ({len(report.weights)} weights in {out}, {report.sparsity:.2%} zeros)"
    else:
        verdict = f"verify    FAILED for {out}\n{report}"
    baseline = f"always '{accuracy['most_frequent_label']}' is right for {accuracy['most_frequent_share']:.1%}"
    lines = [
        f"pruned    after step {pruning['pruned_at']}, model error {pruning['model_error']:.4f}",
        f"accuracy  {accuracy['share']:.1%}: {tested}, 95 % interval {low:.1%} to {high:.1%}; {baseline}",
        verdict,
        f"saved     {out}: model, tokenizer, card, training.json, history.jsonl, pictures ({seconds:.0f} s in all)",
    ]
    if report.ok:
        lines += [
            f"next      admm-nxm report {quote(str(out))}",
            f"          admm-nxm pack {quote(str(out))} -o {quote(f'{out}-packed')}",
        ]
    payload = {"command": "train", "ok": report.ok, "output": str(out), **facts}
    payload |= {"seconds": seconds, "verify": as_dict(report)}
    return Result(payload, "\n".join(lines), 0 if report.ok else 1)
