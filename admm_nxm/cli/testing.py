"""Accuracy of a classifier on labelled texts, with its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from .classifier import quiet
from .texts import interval


def accuracy_of(
    trainer: Trainer, test: Any, labels: Sequence[str], train: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Test a model, and the guess that needs none: always the label that is most frequent, in training if there was."""
    with quiet():
        predicted = trainer.predict(test).predictions  # a list does for a dataset
    logits = predicted[0] if isinstance(predicted, tuple) else predicted
    truth = [row["labels"] for row in test]
    guess = Counter(row["labels"] for row in (train or test)).most_common(1)[0][0]
    correct = sum(int(row.argmax()) == label for row, label in zip(logits, truth, strict=True))
    return {
        "correct": correct,
        "total": len(truth),
        "share": correct / len(truth),
        "interval": list(interval(correct, len(truth))),
        "most_frequent_label": labels[guess],
        "most_frequent_share": truth.count(guess) / len(truth),
    }


def told(accuracy: dict[str, Any], texts: str = "held-out texts") -> str:
    """Return an accuracy in words."""
    low, high = accuracy["interval"]
    right = f"{accuracy['correct']:,} of {accuracy['total']:,} {texts} right"
    return f"{accuracy['share']:.1%}: {right}, 95 % interval {low:.1%} to {high:.1%}"
