"""``admm-nxm train``: a text classifier on the user's own data, fine-tuned into the pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..pattern import Pattern
from .console import Result
from .options import Json, Output, Overwrite, PatternText, Select, a_count, a_rate, a_seed, rules_of


def train(
    model: Annotated[str, typer.Option(metavar="M", show_default=False, help="A model folder, or a name of the hub.")],
    data: Annotated[
        Path, typer.Option(metavar="FILE", show_default=False, help="Labelled texts: .csv, .tsv or .jsonl in UTF-8.")
    ],
    output: Output,
    pattern: PatternText = None,
    select: Select = None,
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
    text_column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Column of the text; give it twice for pairs of texts.  [default: text]"),
    ] = None,
    label_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the label.")] = "label",
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts to test on.  [default: a quarter of the data, by label]"),
    ] = None,
    seed: Annotated[int, typer.Option(parser=a_seed, metavar="N", help="Of split, classifier, batches, dropout.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
) -> Result:
    """Fine-tune a classifier on your own texts.

    The model comes out in the pattern. It is tested on held-out texts, saved with a card, records and pictures, and
    verified. The exit status is 1 if the saved weights violate the pattern.
    """
    options = dict(locals())
    del options["json"], options["text_column"]
    parsed, rules = rules_of(pattern, select)
    options |= {"pattern": parsed or Pattern(2, 4), "select": rules, "text_columns": tuple(text_column or ("text",))}
    from .training import Settings
    from .training import train as run

    return run(Settings(**options))
