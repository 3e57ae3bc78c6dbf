"""The run behind ``admm-nxm train``: data, model, fine-tuning and test; ``saving`` writes what comes of it."""

from __future__ import annotations

import hashlib
import math
import platform
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.utils import patch_environment  # type: ignore[import-untyped]
from transformers import DataCollatorWithPadding, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .._version import __version__
from ..integrations.transformers import ADMMConfig
from ..io.files import atomic_folder
from ..io.verify import verify
from ..optimizer import ConvergenceWarning
from ..pattern import Pattern
from ..report.model import ModelReport, model_report
from ..report.tensor_cores import obstacles
from ..selection import Selection, select_weights
from ..sparsity import SparsityReport
from .classifier import find_device, length_limit, load_classifier, load_tokenizer, quiet
from .commands import as_dict
from .console import Result, note
from .errors import InputError, blaming
from .options import Rules
from .progress import StepProgress
from .runs import DenseTrainer, Run, SparseTrainer
from .saving import Trained, check_space, save
from .testing import accuracy_of, told
from .texts import Columns, Row, check_texts, count_labels, held_out, label_names, read_file, split

LENGTH = 128
"""Tokens of a text that a model sees by default."""

_SHORTEST, _PASSES = 200, 3
_DEVICE_OF_ACCELERATE = "ACCELERATE_TORCH_DEVICE"
_READINGS = 50  # of the loss in a run: a reading waits for the device
_NOT_THE_RUN = ("output", "device", "checkpoint_every", "resume", "overwrite")


@dataclass(frozen=True)
class Settings:
    """Hold the options of the user; None where the run chooses."""

    model: str
    data: Path
    output: Path
    pattern: Pattern
    select: Rules | None
    dense: bool
    compare_dense: bool
    steps: int | None
    batch_size: int
    lr: float
    max_length: int | None
    text_columns: tuple[str, ...]
    label_column: str
    on_bad_row: str
    eval_data: Path | None
    dtype: str
    seed: int
    device: str
    checkpoint_every: int | None
    resume: bool
    overwrite: bool

    @property
    def columns(self) -> Columns:
        """Name the columns of the data."""
        hint = "; name others with --text-column and --label-column"
        return Columns(self.text_columns, self.label_column, hint, self.on_bad_row)


class _Texts(NamedTuple):
    """Texts as the model reads them, with their labels: those to train and those to test on."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    labels: list[str]
    max_length: int


def train(settings: Settings) -> Result:
    """Fine-tune a classifier into the pattern, test it, save it and verify what was saved."""
    import matplotlib as _  # noqa: F401 - the pictures come last, and would be missed then

    started = time.perf_counter()
    check_texts(settings.text_columns)
    device = find_device(settings.device)
    with ExitStack() as stack:
        read = [place for place in (settings.data, settings.eval_data, settings.model) if place is not None]
        with blaming(f"--output {settings.output}", OSError, ValueError):
            writer = atomic_folder(settings.output, overwrite=settings.overwrite, source=read)
            folder = stack.enter_context(writer)
        run = Run(settings.output, _identity(settings), resume=settings.resume, overwrite=settings.overwrite)
        stack.enter_context(run.kept_if_stopped())
        facts, report = _fill(folder, run, settings, device)
    seconds = time.perf_counter() - started
    return _result(settings, facts, report, None if report is None else verify(settings.output), seconds)


def _identity(settings: Settings) -> dict[str, Any]:
    """Return what has to be the same for a run to be the same, the texts by what they are."""
    chosen = {key: value for key, value in asdict(settings).items() if key not in _NOT_THE_RUN}
    for key in ("data", "eval_data"):
        if (path := chosen[key]) is not None and Path(path).is_file():
            chosen[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return {**chosen, "pattern": str(settings.pattern), "text_columns": list(settings.text_columns)}


def _fill(
    folder: Path, run: Run, settings: Settings, device: torch.device
) -> tuple[dict[str, Any], ModelReport | None]:
    """Do all that the output is made of; return what there is to tell, and the report on what is sparse."""
    note(f"model   {settings.model}{'' if Path(settings.model).is_dir() else ' (no folder here: a name of the hub)'}")
    rows = read_file(settings.data, settings.columns, tell=lambda text: note(f"note    --data: {text}"))
    note(f"data    {count_labels(rows)}")
    tests = None
    if settings.eval_data is not None:
        say = lambda text: note(f"note    --eval-data: {text}")  # noqa: E731
        tests = read_file(settings.eval_data, settings.columns, "--eval-data", tell=say)
        note(f"test    {count_labels(tests)}")
    labels = label_names(rows)
    note(f"labels  {', '.join(f'{i} = {name}' for i, name in enumerate(labels[:8]))}{', ...' if labels[8:] else ''}")
    tokenizer = load_tokenizer(settings.model)
    start = {"seed": settings.seed, "max_length": settings.max_length or 1}
    model, fresh = load_classifier(settings.model, labels, tokenizer, **start)
    if fresh:
        note(f"note    {len(fresh)} weights start at random, as the checkpoint does not have them: {min(fresh)}, ...")
    texts = _encode(settings, rows, tests, labels, model, tokenizer)
    _try_out(settings, model, tokenizer, texts)
    dtype = getattr(torch, settings.dtype)
    with blaming(f"--output {settings.output}", OSError):
        check_space(model, dtype, folder, checkpoints=settings.checkpoint_every is not None)
    usual = max(_SHORTEST, math.ceil(_PASSES * len(texts.train) / settings.batch_size))
    steps = settings.steps or usual
    selection = None if settings.dense else _select(settings, model)
    note(f"budget  {steps} steps of {settings.batch_size} texts, lr {settings.lr:g}, seed {settings.seed}, on {device}")
    if settings.compare_dense and "dense" not in run.found:
        note("dense   the run without pruning comes first")
        trainer, _ = _fine_tune(
            _arguments(settings, steps, device, run.folder / "dense"), run, None, model, tokenizer, texts
        )
        run.found["dense"] = accuracy_of(trainer, texts.test, texts.labels, texts.train)
        note(f"dense   accuracy {told(run.found['dense'])}")
        model, _ = load_classifier(settings.model, labels, tokenizer, **start)  # from the same start
    before = {weight.name: model.get_parameter(weight.name).detach().clone() for weight in selection or ()}
    config = None if selection is None else ADMMConfig(str(settings.pattern), select=settings.select)
    args = _arguments(settings, steps, device, run.folder / ("dense" if settings.dense else "sparse"))
    trainer, notes = _fine_tune(args, run, config, model, tokenizer, texts)
    if steps < usual:
        few = f"{steps} steps are few: by default it would be {usual}."
        held = "" if settings.dense else " The pattern holds all the same, but the kept weights were trained little."
        notes.insert(0, f"{few}{held} For a result that counts, give more --steps, or leave the option out")
    for text in notes:
        note(f"note    {text}")
    with trainer.kept():
        model.to(dtype)
        accuracy = accuracy_of(trainer, texts.test, texts.labels, texts.train)
        pruning = None
        if (admm := getattr(trainer, "admm", None)) is not None:
            now = admm.figures()
            pruning = {"pruned_at": now.pruned_at, "model_error": now.model_error}
            pruning["model_errors"] = {**now.model_errors}
        chosen = {"pattern": None if settings.dense else str(settings.pattern), "steps": steps, "device": str(device)}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        facts = {
            "settings": {**asdict(settings), **chosen, "max_length": texts.max_length},
            "versions": {"admm-nxm": __version__, **versions, "python": platform.python_version()},
            "data": {"labels": labels, "train": len(texts.train), "test": len(texts.test)},
            "accuracy": accuracy,
            "dense_accuracy": run.found.get("dense"),
            "pruning": pruning,
            "notes": notes,
        }
        model.to("cpu")
        report = None if selection is None else model_report(model, selection)
        save(folder, settings.output, Trained(trainer, model, tokenizer, before, report, facts))
    return facts, report


def _encode(
    settings: Settings, rows: list[Row], tests: list[Row] | None, labels: list[str], model: Any, tokenizer: Any
) -> _Texts:
    """Turn texts into tokens, leave duplicates out and set the test apart."""
    special = tokenizer.num_special_tokens_to_add(pair=len(settings.text_columns) == 2)
    max_length = settings.max_length or int(min(LENGTH, length_limit(model, tokenizer)))
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
    return _Texts([inputs[i] for i in found.train], [inputs[i] for i in found.test], labels, max_length)


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


@dataclass
class _OneDevice(TrainingArguments):
    """Trainer's settings for exactly one device, whichever it would take by itself."""

    wanted: str = "cpu"

    @property
    def device(self) -> torch.device:
        super().device  # noqa: B018 - sets the process up, for the first GPU if there is one
        return torch.device(self.wanted)

    @property
    def n_gpu(self) -> int:
        return int(self.device.type != "cpu")


def on_one_device(device: torch.device, folder: Path, **options: Any) -> TrainingArguments:
    """Return Trainer's settings for exactly one device, with nothing reported and no bars."""
    with patch_environment(**{_DEVICE_OF_ACCELERATE: device}):
        args = _OneDevice(
            str(folder),
            wanted=str(device),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device.type == "cuda",
            use_cpu=device.type == "cpu",
            **options,
        )
        if args.device.type == "cuda":
            torch.cuda.set_device(device)
    return args


def _arguments(settings: Settings, steps: int, device: torch.device, folder: Path) -> TrainingArguments:
    """Return the settings of a run: as in the quickstart."""
    return on_one_device(
        device,
        folder,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=settings.lr,
        warmup_steps=steps // 10,
        weight_decay=0.01,
        seed=settings.seed,
        bf16=device.type == "cuda" and settings.dtype == "bfloat16",
        fp16=device.type == "cuda" and settings.dtype == "float16",
        logging_steps=max(1, steps // _READINGS),
        logging_first_step=True,
        save_strategy="no" if settings.checkpoint_every is None else "steps",
        save_steps=settings.checkpoint_every or steps,
        save_total_limit=1,
    )


def _fine_tune(
    args: TrainingArguments, run: Run, config: ADMMConfig | None, model: Any, tokenizer: Any, texts: _Texts
) -> tuple[DenseTrainer | SparseTrainer, list[str]]:
    """Train to the end, into a pattern or as it is, and return what the run has to be told about with it."""
    progress = StepProgress()
    remedy = "; give a smaller --batch-size or --max-length"
    kind: Any = DenseTrainer if config is None else partial(SparseTrainer, admm_config=config)
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        collator = DataCollatorWithPadding(tokenizer)
        trainer = kind(model, args, train_dataset=texts.train, data_collator=collator, callbacks=[progress])
        trainer.run = run
        trainer.remove_callback(PrinterCallback)
        with progress.shown(), blaming("", torch.OutOfMemoryError, remedy=remedy), blaming("", ValueError):
            trainer.train_on()
    return trainer, [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]


def _result(
    settings: Settings,
    facts: dict[str, Any],
    report: ModelReport | None,
    count: SparsityReport | None,
    seconds: float,
) -> Result:
    out, pruning, dense = settings.output, facts["pruning"], facts["dense_accuracy"]
    accuracy = facts["accuracy"]
    ok = count is None or count.ok
    lines = []
    if pruning is not None:
        lines.append(f"pruned    after step {pruning['pruned_at']}, model error {pruning['model_error']:.2g}")
    if dense is not None:
        lines.append(f"dense     {told(dense)}")
    baseline = f"always '{accuracy['most_frequent_label']}' is right for {accuracy['most_frequent_share']:.1%}"
    lines.append(f"accuracy  {told(accuracy)}; {baseline}")
    if count is not None and ok:
        lines.append(f"verify    ok ({len(count.weights)} weights in {out}, {count.sparsity:.2%} zeros)")
    elif count is not None:
        lines.append(f"verify    FAILED for {out}\n{count}")
    what = "model, tokenizer, card, training.json, history.jsonl"
    lines.append(f"saved     {out}: {what}{', pictures' if report else ''} ({seconds:.0f} s in all)")
    if report is not None and ok:
        lines += [
            f"use       {_use(report)}",
            f"next      admm-nxm report {quote(str(out))}",
            f"          admm-nxm pack {quote(str(out))} -o {quote(f'{out}-packed')}",
        ]
    payload = {"command": "train", "ok": ok, "output": str(out), **facts, "seconds": seconds}
    payload["verify"] = None if count is None else as_dict(count)
    return Result(payload, "\n".join(lines), 0 if ok else 1)


def _use(report: ModelReport) -> str:
    """Return what a result is good for."""
    taken, total = report.tensor_cores().weights, len(report.weights)
    if taken:
        return f"sparse tensor cores can take {taken} of {total} weights, by admm_nxm.export.to_semi_structured"
    smaller = "As it is, the zeros make files smaller (admm-nxm pack), and nothing faster"
    in_16_bits = sum(None in obstacles(w.shape, torch.bfloat16, w.pattern, w.dim).values() for w in report)
    if in_16_bits:
        return f"sparse tensor cores could take {in_16_bits} of {total} weights in 16 bits: --dtype bfloat16. {smaller}"
    reason = next(iter(report.weights[0].tensor_cores.values()))
    return f"sparse tensor cores take none of it ({reason}). {smaller}"
