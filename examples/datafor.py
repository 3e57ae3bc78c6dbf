"""Data and model names for the examples: by default those of quickstart.py, which need no network."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import quickstart
from transformers import AutoTokenizer

TEST_SHARE = 0.25


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
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(texts: tuple[str, ...], label: int) -> dict[str, Any]:
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": label}

    if args.data is None:
        rows = quickstart.read_bbc()
        names = sorted({label for _, label in rows})
        # Articles that are alike in what the model sees must not stand on both sides of the split.
        distinct: dict[tuple[int, ...], dict[str, Any]] = {}
        for text, label in rows:
            row = encode((text,), names.index(label))
            distinct.setdefault(tuple(row["input_ids"]), row)
        encoded = list(distinct.values())
        random.Random(seed).shuffle(encoded)
        held_out = round(TEST_SHARE * len(encoded))
        return tokenizer, encoded[held_out:], encoded[:held_out], names
    import datasets

    loaded = datasets.load_dataset(args.data, args.data_config)
    columns = args.text_columns.split(",")
    splits = [
        [encode(tuple(row[column] for column in columns), row[args.label_column]) for row in loaded[split]]
        for split in ("train", args.eval_split)
    ]
    return tokenizer, *splits, list(loaded["train"].features[args.label_column].names)
