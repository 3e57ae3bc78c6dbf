"""Texts -> batches of token ids: tokenised once, sorted by length, the same batches for every method."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tasks import Split

CHUNK = 8  # batches that are sorted by length together, so that little of a batch is padding


@dataclass(frozen=True)
class Batch:
    """Rows of one split.

    Args:
        rows: their numbers in the split, int64 of shape (rows,), on the CPU.
        ids: token ids, int64 of shape (rows, longest).
        attention: 1 where there is a token.
        types: 0 in the first text, 1 in the second.
        labels: int64 of shape (rows,).
    """

    rows: Tensor
    ids: Tensor
    attention: Tensor
    types: Tensor
    labels: Tensor


class Encoded:
    """A tokenised split.

    Args:
        split: texts and labels.
        folder: the pretrained model, for its tokenizer.
        max_length: tokens after which a row is cut.
        device: where the batches go.
    """

    def __init__(self, split: Split, folder: Path, max_length: int, device: str) -> None:
        tokens = AutoTokenizer.from_pretrained(folder)(split.text, split.pair, truncation=True, max_length=max_length)
        self.ids: list[list[int]] = tokens["input_ids"]
        self.types: list[list[int]] = tokens["token_type_ids"]
        self.labels = split.label
        self.device = device

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: list[int]) -> Batch:
        """Pad some rows to the longest of them."""
        longest = max(len(self.ids[row]) for row in rows)

        def padded(lists: list[list[int]]) -> Tensor:
            return torch.tensor([lists[row] + [0] * (longest - len(lists[row])) for row in rows])

        attention = torch.tensor([[1] * len(self.ids[r]) + [0] * (longest - len(self.ids[r])) for r in rows])
        return Batch(
            torch.tensor(rows),
            padded(self.ids).to(self.device),
            attention.to(self.device),
            padded(self.types).to(self.device),
            torch.tensor([self.labels[row] for row in rows]).to(self.device),
        )

    def some(self, rows: Iterable[int], size: int = 64) -> list[Batch]:
        """Return rows once, by length."""
        ordered = sorted(rows, key=lambda row: len(self.ids[row]))
        return [self.batch(ordered[first : first + size]) for first in range(0, len(ordered), size)]

    def all(self, size: int = 64) -> list[Batch]:
        """Return all rows once, by length."""
        return self.some(range(len(self)), size)

    def train(self, size: int, steps: int, seed: int) -> Iterator[Batch]:
        """Yield ``steps`` batches, shuffled again each time the split has been gone through; the seed decides all."""
        rng = random.Random(seed)
        pool: list[int] = []
        queue: list[list[int]] = []
        for _ in range(steps):
            if not queue:
                while len(pool) < CHUNK * size:
                    epoch = list(range(len(self)))
                    rng.shuffle(epoch)
                    pool = epoch + pool
                chunk = sorted((pool.pop() for _ in range(CHUNK * size)), key=lambda row: len(self.ids[row]))
                queue = [chunk[first : first + size] for first in range(0, len(chunk), size)]
                rng.shuffle(queue)
            yield self.batch(queue.pop())
