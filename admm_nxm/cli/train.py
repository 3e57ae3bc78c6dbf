"""``admm-nxm train``: a text classifier on the user's own data, fine-tuned into the pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..pattern import Pattern
from .console import Result
from .errors import InputError
from .options import (
    Device,
    Json,
    OnBadRow,
    Output,
    Overwrite,
    PatternText,
    Select,
    TextColumns,
    a_count,
    a_rate,
    a_seed,
    one_of,
    rules_of,
)


def train(
    model: Annotated[str, typer.Option(metavar="M", show_default=False, help="A model folder, or a name of the hub.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default=False, help="Labelled texts: .csv, .tsv or .jsonl in UTF-8.")
    ],
    output: Output,
    pattern: PatternText = None,
    select: Select = None,
    dense: Annotated[bool, typer.Option("--dense", help="Prune nothing: the baseline.")] = False,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Train dense first, and show both accuracies.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            parser=a_count, metavar="N", help="Optimizer steps.  [default: three passes over the data, at least 200]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=a_count, metavar="N", help="Texts a step.")] = 16,
    lr: Annotated[
        float, typer.Option(parser=a_rate, metavar="X", help="Peak learning rate, after a tenth of the steps.")
    ] = 1e-4,
    max_length: Annotated[
        int | None,
        typer.Option(
            parser=a_count, metavar="N", help="Tokens of a text that the model sees.  [default: 128, or what it takes]"
        ),
    ] = None,
    text_column: TextColumns = None,
    label_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the label.")] = "label",
    on_bad_row: OnBadRow = "error",
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to test on.  [default: a quarter of the data, by label]"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            parser=one_of("float32", "bfloat16", "float16"),
            metavar="NAME",
            help="Of the saved weights: float32, bfloat16 or float16. On a GPU, 16 bits also train in autocast.",
        ),
    ] = "float32",
    seed: Annotated[int, typer.Option(parser=a_seed, metavar="N", help="Of split, classifier, batches, dropout.")] = 0,
    device: Device = "auto",
    checkpoint_every: Annotated[
        int | None, typer.Option(parser=a_count, metavar="N", help="Keep a checkpoint every N steps, in OUT.run.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped; give its other options again.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> Result:
    """Fine-tune a classifier on your own texts.

    The model comes out in the pattern. It is tested on held-out texts, saved with a card, records and pictures, and
    verified. Ctrl-C keeps a checkpoint. The exit status is 1 if the saved weights violate the pattern.
    """
    options = dict(locals())
    del options["json"], options["text_column"]
    parsed, rules = rules_of(pattern, select)
    if dense and (pattern is not None or select or compare_dense):
        given = "--compare-dense" if compare_dense else "--pattern and --select"
        raise InputError(f"--dense prunes nothing, and excludes {given}; leave one of them out")
    options |= {"pattern": parsed or Pattern(2, 4), "select": rules, "text_columns": tuple(text_column or ("text",))}
    from .training import Settings
    from .training import train as run

    return run(Settings(**options))
