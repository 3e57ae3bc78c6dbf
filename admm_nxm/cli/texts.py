"""Labelled texts from files, their split, and the interval of a share. The standard library is enough."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, blaming

Row = tuple[str, ...]
"""One text, or two, and the label; it is empty where none is read."""

FILE_KINDS = (".csv", ".tsv", ".jsonl")
TEST_SHARE = 0.25
_LONGEST_FIELD = 2**31 - 1  # what the csv module takes on every platform; by itself it stops at 128 KiB


@dataclass(frozen=True)
class Columns:
    """Name the columns of a table, and say what to do with rows that lack something."""

    texts: tuple[str, ...] = ("text",)
    label: str | None = "label"
    """None where there is none to read."""
    hint: str = ""
    on_bad_row: str | None = None
    """None where there is no such option."""

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.texts, *(() if self.label is None else (self.label,)))))


def check_texts(columns: Sequence[str]) -> None:
    """Refuse more than a pair of texts."""
    if not 1 <= len(columns) <= 2:
        raise InputError(f"--text-column is given {len(columns)} times; give one, or two for pairs")


def check_kind(path: Path, option: str = "--data", kinds: Sequence[str] = FILE_KINDS) -> str:
    """Return the ending of a file, in small letters; refuse a file that is not there or ends otherwise."""
    known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    if not path.is_file():
        raise InputError(f"{option} {path}: no such file; give a {known} file")
    if (kind := path.suffix.lower()) not in kinds:
        raise InputError(f"{option} {path} ends in {path.suffix or 'nothing'}, which is not known; give a {known} file")
    return kind


def read_file(
    path: Path,
    columns: Columns | None = None,
    option: str = "--data",
    *,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Read texts and their labels: a .csv or .tsv file with a header, or a .jsonl file with one object a line; UTF-8.

    ``tell`` gets what is to be said of the file, such as the number of bad rows where they are skipped.
    """
    name, columns = f"{option} {path}", columns or Columns()
    kind = check_kind(path, option)
    remedy = f"; a {kind} file in UTF-8 is needed"
    with blaming(name, OSError, UnicodeDecodeError, remedy=remedy), path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(file)
    if not any(line.strip() for line in lines):
        raise InputError(f"{name} is empty; give a file with {' and '.join(columns)} in each row")
    records = _json_records(lines, name) if kind == ".jsonl" else _table_records(lines, name, kind, columns, tell)
    rows: list[Row] = []
    bad: list[InputError] = []
    limit = csv.field_size_limit(_LONGEST_FIELD)  # one for the whole process
    try:
        for number, (line, record) in enumerate(records, 1):
            try:
                rows.append(row_of(record, f"{name}, line {line}: record {number}", columns))
            except InputError as error:  # noqa: PERF203
                if columns.on_bad_row != "skip":
                    way_out = "; --on-bad-row skip leaves such rows out" if columns.on_bad_row else ""
                    raise InputError(f"{error}{way_out}") from None
                bad.append(error)
    finally:
        csv.field_size_limit(limit)
    if bad:
        tell(f"{len(bad)} of {len(bad) + len(rows)} rows skipped, the first as: {bad[0]}")
    if not rows:
        what = f": {bad[0]}" if bad else f" below its header; add rows with {' and '.join(columns)}"
        raise InputError(f"{name} has no usable row{what}")
    return rows


def _json_records(lines: list[str], name: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"{name}, line {number} is not JSON: {error}")


def _table_records(
    lines: list[str], name: str, kind: str, columns: Columns, tell: Callable[[str], None]
) -> Iterator[tuple[int, Any]]:
    separator, word = ("\t", "tab") if kind == ".tsv" else (",", "comma")
    by_semicolons = next(csv.reader([lines[0]], delimiter=";"))
    if kind == ".csv" and ";" in lines[0] and ("," not in lines[0] or set(columns) <= set(by_semicolons)):
        separator, word = ";", "semicolon"  # as spreadsheets write it where the comma is a decimal point
        tell("the columns are separated by semicolons")
    # Strict: a quotation mark in the wrong place would otherwise swallow records without a word.
    reader = csv.DictReader(lines, delimiter=separator, strict=True)
    remedy = f"; put quotation marks around a text that holds a {word} or a line break, and double those inside it"

    with blaming(f"{name}, line 1", csv.Error, remedy=remedy):
        header = list(reader.fieldnames or ())
    twice = [column for column, times in Counter(header).items() if times > 1]
    if twice:
        raise InputError(f"{name} has the column {twice[0]!r} twice; give each column a name of its own")
    if missing := [column for column in columns if column not in header]:
        raise InputError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; the columns in its first line are "
            f"{', '.join(map(repr, header))}{columns.hint}. If that line is a row already, put a header above it: "
            f"{separator.join(columns)}"
        )
    while True:
        line = reader.line_num + 1  # where the record begins
        try:
            record: Any = next(reader, None)
        except csv.Error as error:
            record = InputError(f"{name}, line {line}: {error}{remedy}")
        if record is None:
            return
        if isinstance(record, dict) and None in record:
            fields = len(header) + len(record[None])
            record = InputError(f"{name}, line {line} has {fields} fields, and the header has {len(header)}{remedy}")
        yield line, record


def row_of(record: Any, where: str, columns: Columns | None = None) -> Row:
    """Take a record's texts and its label, empty without one; a record may be an error, which is raised."""
    if isinstance(record, InputError):
        raise record
    columns = columns or Columns()
    found = record if isinstance(record, dict) else {}
    missing = [column for column in columns if _is_missing(found.get(column))]
    if missing:
        remedy = columns.hint if any(column not in found for column in missing) else ""
        raise InputError(
            f"{where} has no {' and no '.join(missing)} (columns: {', '.join(map(str, found)) or 'none'}){remedy}"
        )
    for column in columns:
        if isinstance(found[column], (dict, list)):
            kind = "a list" if isinstance(found[column], list) else "an object"
            raise InputError(f"{where} has {kind} as {column}; a text or a number is needed")
    label = "" if columns.label is None else _label(found[columns.label])
    return (*(str(found[column]) for column in columns.texts), label)


def _label(value: Any) -> str:
    """Return a label as text: 1.0, which tables make of 1 where a row lacks a label, is 1."""
    text = str(value)
    return text.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", text) else text


def _is_missing(value: Any) -> bool:
    return value is None or not str(value).strip() or (isinstance(value, float) and math.isnan(value))


def count_labels(rows: Sequence[Row]) -> str:
    """Return how many texts have which label, the most frequent first, for people."""
    counts = Counter(row[-1] for row in rows)
    shares = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(8))
    return f"{len(rows):,} texts: {shares}{', …' if len(counts) > 8 else ''}"


def label_names(rows: Sequence[Row]) -> list[str]:
    """Return the labels in order: by number if all are whole numbers."""
    names = {row[-1] for row in rows}
    if len(names) < 2:
        raise InputError(
            f"the data has {len(rows)} texts with the labels {sorted(names)}; at least 2 different ones are needed"
        )
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    if all(re.fullmatch(r"-?\d*\.?\d+([eE][+-]?\d+)?", name) for name in names):
        example = next(name for name in sorted(names) if not name.lstrip("-").isdigit())
        raise InputError(
            f"the labels are numbers such as {example}, and regression is not supported: labels name classes. Give "
            "whole numbers or words"
        )
    return sorted(names)


@dataclass(frozen=True)
class Split:
    """Positions of the texts to train on and to test on, and how many distinct ones there are."""

    train: list[int]
    test: list[int]
    distinct: int


def _first_of_each(keys: Sequence[Hashable]) -> list[int]:
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return list(first.values())


def split(keys: Sequence[Hashable], rows: Sequence[Row], names: Sequence[str], seed: int) -> Split:
    """Hold out a quarter of the distinct texts of each label; of those that are alike after truncation one stays."""
    first = _first_of_each(keys)
    train: list[int] = []
    test: list[int] = []
    for name in names:
        members = [i for i in first if rows[i][-1] == name]
        if len(members) < 2:
            raise InputError(f"label {name!r} has {len(members)} distinct text; 2 are needed, to train and to test")
        random.Random(seed).shuffle(members)
        count = max(1, round(TEST_SHARE * len(members)))
        test += members[:count]
        train += members[count:]
    return Split(train, test, len(first))


def held_out(keys: Sequence[Hashable], count: int, names: Sequence[str], rows: Sequence[Row]) -> Split:
    """Split where the texts to test on are given: those from ``count`` on, which no text to train on is like."""
    first = _first_of_each(keys[count:])
    tested = {keys[count + i] for i in first}
    train = [i for i in _first_of_each(keys[:count]) if keys[i] not in tested]
    test = [count + i for i in first]
    if not test:
        raise InputError("--eval-data has no texts; give some to test on, or leave the option out")
    unknown = sorted({rows[i][-1] for i in test} - set(names))
    if unknown:
        raise InputError(f"--eval-data has the label {unknown[0]!r}, which --data lacks (it has {', '.join(names)})")
    gone = sorted(set(names) - {rows[i][-1] for i in train})
    if gone:
        raise InputError(
            f"all texts with label {gone[0]!r} of --data are in --eval-data too, and none is left to train on; "
            "take them out of one of the two"
        )
    return Split(train, test, len(train) + len(test))


def interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a binomial share."""
    share, spread = correct / total, z * z / total
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low, high = (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)
    return (low if correct else 0.0), (high if correct < total else 1.0)  # which they are but for rounding
