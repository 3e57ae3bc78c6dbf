"""The NxM pattern: how many weights of each group may stay non-zero."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Pattern"]

_SPELLING = re.compile(r"\s*(\d+)\s*([:x])\s*(\d+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Pattern:
    """At most ``keep`` non-zero weights in every ``group`` consecutive weights.

    Groups run along the reduction (input) dimension of a weight. Sparse tensor cores take ``Pattern(keep=2, group=4)``.

    Args:
        keep: from 1 to ``group``.
        group: how many consecutive weights form a group.

    Raises:
        TypeError, ValueError: not integers, or out of range.

    Source: NxMTransformer (arXiv 2110.15766), section 3.1, where N is ``group`` and M is ``keep``.

    >>> Pattern.parse("2:4") == Pattern.parse("4x2") == Pattern(keep=2, group=4)
    True
    >>> str(Pattern(keep=1, group=4)), Pattern(keep=1, group=4).sparsity
    ('1:4', 0.75)
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("group", self.group)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Pattern {name}={value!r} is a {type(value).__name__}; an int is needed, such as 4")
        if self.keep < 1:
            raise ValueError(f"Pattern keep={self.keep} is below 1: nothing would be left; choose keep >= 1")
        if self.group < 1:
            raise ValueError(f"Pattern group={self.group} is below 1: choose group >= keep, such as group=4")
        if self.keep > self.group:
            raise ValueError(
                f"Pattern keep={self.keep} exceeds group={self.group}; "
                f"did you mean Pattern(keep={self.group}, group={self.keep})?"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read a pattern from ``"2:4"`` (keep:group, as hardware vendors write) or ``"4x2"`` (NxM, as in the paper).

        Args:
            text: the spelling, or a :class:`Pattern`, which is returned as it is.

        Raises:
            TypeError, ValueError: another type, an unknown spelling, or its numbers in the other notation's order.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f'pattern is {text!r}; a Pattern or a string such as "2:4" is needed')
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(
                f'pattern {text!r} is not understood; write "keep:group" such as "2:4", or "NxM" such as "4x2"'
            )
        first, separator, second = int(match[1]), match[2].lower(), int(match[3])
        keep, group = (first, second) if separator == ":" else (second, first)
        if keep > group >= 1:
            order = "keep:group" if separator == ":" else "NxM (group, then how many are kept)"
            raise ValueError(
                f"pattern {text!r} would keep {keep} of every {group} weights: the order is {order}; "
                f'write "{second}{separator}{first}"'
            )
        return cls(keep=keep, group=group)

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero, ``1 - keep / group``."""
        return 1.0 - self.keep / self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"
