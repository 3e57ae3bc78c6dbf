"""``admm-nxm prune``: a saved model without training, by magnitude or calibrated on the user's own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..sparsity import SparsityReport
from .commands import as_dict, as_text
from .console import Result, note
from .errors import InputError
from .options import (
    Json,
    Output,
    Overwrite,
    PatternText,
    PerWeight,
    Select,
    Source,
    TextColumns,
    a_count,
    a_seed,
    one_of,
    rules_of,
)

_BASELINE = (
    "The smallest weights were set to zero, and nothing made up for them: expect to lose accuracy. With --data the "
    "weights are chosen and adjusted by what some texts of yours tell, without training."
)


def prune(
    path: Source,
    output: Output,
    pattern: PatternText = None,
    select: Select = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to calibrate on: .csv, .tsv, .jsonl, or .txt (plain), in UTF-8."),
    ] = None,
    text_column: TextColumns = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the label, for a classifier.  [default: label]")
    ] = None,
    on_bad_row: Annotated[
        str | None,
        typer.Option(
            parser=one_of("error", "skip"), metavar="error|skip", help="What to do with bad rows.  [default: error]"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            parser=a_count, metavar="N", help="Texts to take, by chance.  [default: 128; of a language model 64 pieces]"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            parser=a_count, metavar="N", help="Tokens of a text.  [default: 128; of a piece 256; or what it takes]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(parser=a_seed, metavar="N", help="Of the choice of texts.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...  [default: a GPU if there is one]")
    ] = None,
    overwrite: Overwrite = False,
    per_weight: PerWeight = False,
    json: Json = False,  # noqa: ARG001 - read from the command line as a whole, see app.py
) -> Result:
    """Prune once, without training.

    By itself it sets the smallest weights of each group to zero. With --data it passes texts through the model,
    chooses what the loss can do without, and adjusts the rest. All else in the files stays, and the result is verified.
    """
    parsed, rules = rules_of(pattern, select)
    payload: dict[str, Any] = {"command": "prune", "path": str(path), "output": str(output)}
    if data is None:
        from ..io.prune import prune_files

        options: dict[str, object] = {
            "text-column": text_column,
            "label-column": label_column,
            "on-bad-row": on_bad_row,
        }
        options |= {"samples": samples, "max-length": max_length, "seed": seed, "device": device}
        given = [f"--{name}" for name, value in options.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} is about the texts of --data; give --data too, or leave {given[0]} out")
        report = prune_files(path, output, parsed or "2:4", select=rules, overwrite=overwrite)
        payload["note"], text = _BASELINE, f"{as_text(report, per_weight)}\nsaved to {output}. {_BASELINE}"
    else:
        from .calibration import Settings, calibrate

        settings = Settings(
            path,
            output,
            parsed or "2:4",
            rules,
            data,
            None if text_column is None else tuple(text_column),
            label_column,
            on_bad_row,
            samples,
            max_length,
            seed or 0,
            device or "auto",
            overwrite,
        )
        report, facts = calibrate(settings)
        payload |= {"calibration": facts, "model_errors": dict(report.model_errors)}
        text = f"{as_text(report, per_weight)}\nsaved to {output}"
    if (card := output / "README.md").is_file():
        _tell_in_card(card, report, "by magnitude" if data is None else "calibrated on texts")
    payload |= {**as_dict(report), "left_out": report.left_out}
    return Result(payload, text, 0 if report.ok else 1)


def _tell_in_card(card: Path, report: SparsityReport, how: str) -> None:
    """Say in a card that came with the model that the weights, and so its figures, are others now."""
    from ..export.card import model_card, write_model_card

    method = f"pruned once, {how}, without training; the rest of this card is about the model before that"
    try:
        write_model_card(card.parent, model_card(report, method=method), library_name=None)
    except ValueError as error:  # the weights are written, and no reason to fail
        note(f"note    {card} stays as it was, and is about the model before: {error}")
