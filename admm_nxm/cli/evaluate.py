"""``admm-nxm eval``: the accuracy of a saved classifier on labelled texts."""

from __future__ import annotations

import json as json_module
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Result, note
from .errors import InputError
from .options import Device, Json, OnBadRow, TextColumns, a_count


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", show_default=False, help="A folder with a trained classifier; packed too."),
    ],
    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default=False, help="Labelled texts: .csv, .tsv or .jsonl in UTF-8.")
    ],
    text_column: TextColumns = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the label.  [default: label]")
    ] = None,
    on_bad_row: OnBadRow = "error",
    max_length: Annotated[
        int | None, typer.Option(parser=a_count, metavar="N", help="Tokens of a text.  [default: as in training]")
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=a_count, metavar="N", help="Texts at a time.")] = 64,
    device: Device = "auto",
    json: Json = False,  # noqa: ARG001 - read from the command line as a whole, see app.py
) -> Result:
    """Test a trained classifier on labelled texts.

    Prints the accuracy with its 95 % interval. Columns and length are those of the training, if `train` made the model.
    """
    from transformers import DataCollatorWithPadding, Trainer

    from .classifier import (
        check_length,
        class_numbers,
        find_device,
        length_limit,
        load_tokenizer,
        load_trained,
        of_an_argument,
    )
    from .testing import accuracy_of, told
    from .texts import Columns, check_texts, count_labels, read_file
    from .training import LENGTH, on_one_device

    if not model.is_dir():
        raise InputError(f"{model}: no such folder; give one that `admm-nxm train` or save_pretrained has written")
    trained = _settings_of(model)
    texts = tuple(text_column or trained.get("text_columns", ("text",)))
    check_texts(texts)
    columns = Columns(
        texts,
        label_column or trained.get("label_column", "label"),
        "; name others with --text-column and --label-column",
        on_bad_row,
    )
    where = find_device(device)
    rows = read_file(data, columns, tell=lambda text: note(f"note    --data: {text}"))
    with of_an_argument():
        tokenizer = load_tokenizer(str(model))
    classifier = load_trained(model)
    note(f"data    {count_labels(rows)}")
    labels = [classifier.config.id2label[i] for i in range(classifier.config.num_labels)]
    numbers = class_numbers([row[-1] for row in rows], classifier.config)
    limit = length_limit(classifier, tokenizer)
    length = max_length or trained.get("max_length") or int(min(LENGTH, limit))
    check_length(str(model), length, limit)
    encoded = tokenizer(*zip(*(row[:-1] for row in rows), strict=True), truncation=True, max_length=length)
    test = [
        {**{key: values[i] for key, values in encoded.items()}, "labels": number} for i, number in enumerate(numbers)
    ]
    collator = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:  # Trainer makes a folder, and does not need it here
        args = on_one_device(where, Path(scratch), per_device_eval_batch_size=batch_size)
        accuracy = accuracy_of(Trainer(classifier, args, data_collator=collator), test, labels)
    guess = f"always '{accuracy['most_frequent_label']}' is right for {accuracy['most_frequent_share']:.1%}"
    payload = {"command": "eval", "path": str(model), "data": str(data), "labels": labels, "max_length": length}
    return Result({**payload, "accuracy": accuracy}, f"accuracy  {told(accuracy, 'texts')}; {guess}")


def _settings_of(model: Path) -> dict[str, Any]:
    """Return how a model was trained; nothing if `train` did not make it."""
    try:
        settings = json_module.loads((model / "training.json").read_text(encoding="utf-8"))["settings"]
        return dict(settings)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
