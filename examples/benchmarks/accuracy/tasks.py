"""The tasks of the accuracy study as prepare.py leaves them: fixed texts, labels and splits, read without the network.

prepare.py says where the texts come from and how they were split.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS: tuple[str, ...] = ("polarity", "tweets", "topics", "supersense", "entailment")
SPLITS: tuple[str, ...] = ("train", "dev", "test")
CACHE_VARIABLE = "ADMM_NXM_CACHE"


class TaskError(Exception):
    """Report something that the user can put right; the message is one line that says how."""


@dataclass(frozen=True)
class Split:
    """The rows of one split, as columns.

    Args:
        text: The texts.
        pair: The second text of each row, or None where a row has one text only.
        label: The labels, as indices into the task's labels.

    Raises:
        TaskError: The columns differ in length.
    """

    text: list[str]
    pair: list[str] | None
    label: list[int]

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (self.text, self.pair, self.label) if column is not None}
        if len(lengths) > 1:
            raise TaskError(f"the columns of a split have {sorted(lengths)} rows; they must have equally many")

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Task:
    """A classification task.

    Args:
        name: One of TASKS.
        source: The package and version that the texts come from.
        licence: The licence of the texts.
        labels: The names of the classes.
        train: Rows to train on.
        dev: Rows to choose hyperparameters on.
        test: Rows for the reported figures.

    Raises:
        TaskError: A label is no index into labels.
    """

    name: str
    source: str
    licence: str
    labels: list[str]
    train: Split
    dev: Split
    test: Split

    def __post_init__(self) -> None:
        for name in SPLITS:
            split: Split = getattr(self, name)
            wrong = sorted(set(split.label) - set(range(len(self.labels))))
            if wrong:
                raise TaskError(
                    f"task {self.name}, split {name}: label {wrong[0]} is none of 0 to {len(self.labels) - 1}"
                )


def default_cache() -> Path:
    """Return the folder named by ADMM_NXM_CACHE, else ~/.cache/admm_nxm/accuracy."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "admm_nxm" / "accuracy"


def prepare_command(cache: Path) -> str:
    """Return the command that fills this cache."""
    return f"python examples/benchmarks/accuracy/prepare.py --cache {cache}"


def load_task(name: str, cache: Path | None = None) -> Task:
    """Read a prepared task.

    Args:
        name: One of TASKS.
        cache: The folder that prepare.py filled; by default the one it fills by default.

    Returns:
        The task with its three splits.

    Raises:
        TaskError: There is no such task, it is not prepared, or its file is damaged.
    """
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    cache = default_cache() if cache is None else cache
    file = cache / f"{name}.json"
    if not file.is_file():
        raise TaskError(f"task {name} is not prepared ({file} is missing); run: {prepare_command(cache)}")
    try:
        return task_of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, TaskError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TaskError(f"{file} is damaged ({reason}); to make it again, run: {prepare_command(cache)}") from error


def task_of(record: dict[str, Any]) -> Task:
    """Build a task from the contents of its JSON file."""
    splits = {name: Split(**{column: record[name][column] for column in ("text", "pair", "label")}) for name in SPLITS}
    return Task(record["name"], record["source"], record["licence"], record["labels"], **splits)


def model_folder(cache: Path | None = None) -> Path:
    """Return the folder of the pretrained model, for ``AutoModel*.from_pretrained``.

    Args:
        cache: The folder that prepare.py filled; by default the one it fills by default.

    Returns:
        The folder with config, weights and tokenizer.

    Raises:
        TaskError: The model is not there.
    """
    cache = default_cache() if cache is None else cache
    folder = cache / "model"
    if not (folder / "config.json").is_file():
        raise TaskError(f"the model is not prepared ({folder} is missing); run: {prepare_command(cache)}")
    return folder
