"""Data and model names for the examples: by default those of quickstart.py, which need no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import quickstart

from admm_nxm.cli.classifier import load_tokenizer
from admm_nxm.cli.texts import label_names, split


@dataclass
class DataArguments:
    """What to train on what.

    Args:
        model: folder or hub name; MiniLM-L6 out of a package by default.
        data: hub dataset; BBC News topics out of a package by default.
        data_config: its configuration, such as the task of GLUE.
        text_columns: one column, or two with a comma between for pairs.
        label_column: the column with the label.
        eval_split: the split to evaluate on.
        max_length: tokens a text is cut to.
    """

    model: str | None = field(default=None, metadata={"help": "folder or hub name; MiniLM-L6 by default"})
    data: str | None = field(default=None, metadata={"help": "hub dataset; BBC News topics by default"})
    data_config: str | None = field(default=None, metadata={"help": "its configuration, such as sst2"})
    text_columns: str = field(default="text", metadata={"help": "column, or two with a comma between"})
    label_column: str = field(default="label", metadata={"help": "column of the label"})
    eval_split: str = field(default="validation", metadata={"help": "split to evaluate on"})
    max_length: int = field(default=64, metadata={"help": "tokens a text is cut to"})

    @property
    def model_name(self) -> str:
        """Folder or hub name of the model."""
        return self.model or str(quickstart.default_model())


def load(args: DataArguments, seed: int) -> tuple[Any, Any, Any, list[str]]:
    """Return the tokenizer, the training and the test rows, and the names of the labels."""
    tokenizer = load_tokenizer(args.model_name)

    def encode(texts: tuple[str, ...], label: int) -> dict[str, Any]:
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": label}

    if args.data is None:
        rows = quickstart.read_bbc()
        names = label_names(rows)
        encoded = [encode(row[:-1], names.index(row[-1])) for row in rows]
        found = split([tuple(row["input_ids"]) for row in encoded], rows, names, seed)
        return tokenizer, [encoded[i] for i in found.train], [encoded[i] for i in found.test], names
    import datasets

    loaded = datasets.load_dataset(args.data, args.data_config)
    columns = args.text_columns.split(",")
    splits = [
        [encode(tuple(row[column] for column in columns), row[args.label_column]) for row in loaded[part]]
        for part in ("train", args.eval_split)
    ]
    return tokenizer, *splits, list(loaded["train"].features[args.label_column].names)
