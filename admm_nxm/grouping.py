"""Many weights in few lines: alike ones together, under one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["grouped", "joint_name", "starred", "such_as"]

_T = TypeVar("_T")


def grouped(items: Iterable[_T], key: Callable[[_T], object]) -> list[list[_T]]:
    """Return lists of the items with equal keys, in the order of their first ones.

    >>> grouped([1, 4, 2, 3], lambda number: number % 2)
    [[1, 3], [4, 2]]
    """
    groups: dict[object, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def starred(name: str) -> str:
    """Return a name with a star for each number: the same for a weight of every block.

    >>> starred("encoder.layer.11.output.dense.weight")
    'encoder.layer.*.output.dense.weight'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def joint_name(names: Sequence[str]) -> str:
    """Return a name for weights that are alike: their own, one with stars, or the first of them.

    >>> joint_name(["layers.0.fc.weight", "layers.1.fc.weight"])
    'layers.*.fc.weight'
    """
    stars = {starred(name) for name in names}
    return stars.pop() if len(names) > 1 and len(stars) == 1 else such_as(names)


def such_as(names: Sequence[str]) -> str:
    """Return the first name, with an ellipsis if there are more.

    >>> such_as(["a.weight"]), such_as(["a.weight", "b.weight"])
    ('a.weight', 'a.weight, …')
    """
    return names[0] + (", …" if len(names) > 1 else "")
